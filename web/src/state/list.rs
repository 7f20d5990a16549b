//! The list of latents: sorted, filtered, searched.

use std::cmp::Ordering;

use shared::pack::Index;

/// Above this density a latent counts as dense: it fires on more than one token in ten.
pub const DENSE: f32 = 0.1;

/// How the list is sorted, filtered and searched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListView {
    /// The column it is sorted by.
    pub sort: Sort,
    /// Against the column's own first direction.
    pub reversed: bool,
    /// Which latents are shown.
    pub filter: Filter,
    /// Text to look for in top tokens and top logits, or a latent's number.
    pub search: String,
}

/// A column to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sort {
    /// By number, ascending.
    #[default]
    Index,
    /// By density, descending.
    Density,
    /// By largest activation, descending.
    Max,
    /// By mean activation, descending.
    Mean,
}

/// Which latents are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filter {
    /// All of them.
    #[default]
    All,
    /// Those that fired.
    Alive,
    /// Those that never fired.
    Dead,
    /// Those above [`DENSE`].
    Dense,
}

impl Sort {
    /// Every column.
    pub const ALL: [Self; 4] = [Self::Index, Self::Density, Self::Max, Self::Mean];

    /// Its name in an address.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Density => "density",
            Self::Max => "max",
            Self::Mean => "mean",
        }
    }
}

impl Filter {
    /// Every filter.
    pub const ALL: [Self; 4] = [Self::All, Self::Alive, Self::Dead, Self::Dense];

    /// Its name in an address.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Alive => "alive",
            Self::Dead => "dead",
            Self::Dense => "dense",
        }
    }

    fn keeps(self, density: f32) -> bool {
        match self {
            Self::All => true,
            Self::Alive => density > 0.0,
            Self::Dead => density == 0.0,
            Self::Dense => density > DENSE,
        }
    }
}

impl ListView {
    /// Reads the keys `sort`, `dir`, `show` and `q`; what is missing or unknown keeps its default.
    pub fn parse<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Self {
        let sort = Sort::ALL.into_iter().find(|s| get("sort") == Some(s.key()));
        let filter = Filter::ALL.into_iter().find(|f| get("show") == Some(f.key()));
        Self {
            sort: sort.unwrap_or_default(),
            reversed: get("dir") == Some("reversed"),
            filter: filter.unwrap_or_default(),
            search: get("q").unwrap_or_default().to_owned(),
        }
    }

    /// The keys that differ from the default.
    #[must_use]
    pub fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        if self.sort != Sort::default() {
            query.push(("sort", self.sort.key().to_owned()));
        }
        if self.reversed {
            query.push(("dir", "reversed".to_owned()));
        }
        if self.filter != Filter::default() {
            query.push(("show", self.filter.key().to_owned()));
        }
        if !self.search.is_empty() {
            query.push(("q", self.search.clone()));
        }
        query
    }

    /// The view after a click on the head of `sort`: that column, or the other direction of it.
    #[must_use]
    pub fn sorted_by(&self, sort: Sort) -> Self {
        Self { sort, reversed: self.sort == sort && !self.reversed, ..self.clone() }
    }

    /// The latents shown, in order. Equal values keep the order of their numbers.
    #[must_use]
    pub fn select(&self, index: &Index) -> Vec<u32> {
        let search = self.search.trim().to_lowercase();
        let mut shown: Vec<u32> = (0u32..)
            .zip(&index.density)
            .filter(|&(_, &density)| self.filter.keeps(density))
            .map(|(latent, _)| latent)
            .filter(|&latent| search.is_empty() || matches(index, latent, &search))
            .collect();
        let descending = |values: &[f32], a: u32, b: u32| values[b as usize].total_cmp(&values[a as usize]);
        let order = |a: &u32, b: &u32| match self.sort {
            Sort::Index => Ordering::Equal,
            Sort::Density => descending(&index.density, *a, *b),
            Sort::Max => descending(&index.max_activation, *a, *b),
            Sort::Mean => descending(&index.mean_activation, *a, *b),
        };
        shown.sort_by(order);
        if self.reversed {
            shown.reverse();
        }
        shown
    }

    /// The latent `step` places after `latent` in this list, round the ends; the first when it is not in it.
    #[must_use]
    pub fn neighbour(shown: &[u32], latent: u32, step: isize) -> Option<u32> {
        let n = isize::try_from(shown.len()).ok().filter(|&n| n > 0)?;
        let at = shown.iter().position(|&l| l == latent).and_then(|p| isize::try_from(p).ok());
        let next = at.map_or(0, |p| (p + step).rem_euclid(n));
        shown.get(usize::try_from(next).ok()?).copied()
    }
}

/// Whether a latent's number is, or one of its words contains, the lower-case `search`.
fn matches(index: &Index, latent: u32, search: &str) -> bool {
    if search.strip_prefix('#').unwrap_or(search).parse() == Ok(latent) {
        return true;
    }
    let words = |lists: &[Vec<String>]| {
        lists.get(latent as usize).is_some_and(|l| l.iter().any(|w| w.to_lowercase().contains(search)))
    };
    words(&index.top_tokens) || words(&index.top_logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        let words = |lists: [&[&str]; 5]| lists.map(|l| l.iter().map(|w| (*w).to_owned()).collect()).to_vec();
        Index {
            density: vec![0.01, 0.0, 0.2, 0.01, 0.05],
            max_activation: vec![3.0, 0.0, 1.0, 9.0, 5.0],
            mean_activation: vec![1.0, 0.0, 0.5, 2.0, 3.0],
            top_tokens: words([&[" cat", " Cats"], &[], &[","], &[" dog"], &["4"]]),
            top_logits: words([&[" meow"], &[], &[" and"], &[" bark"], &[" CATALOGUE"]]),
        }
    }

    fn view(sort: Sort, filter: Filter, search: &str) -> ListView {
        ListView { sort, filter, search: search.to_owned(), reversed: false }
    }

    #[test]
    fn sorts_stably_and_both_ways() {
        let by_density = view(Sort::Density, Filter::All, "");
        assert_eq!(by_density.select(&index()), [2, 4, 0, 3, 1]);
        assert_eq!(by_density.sorted_by(Sort::Density).select(&index()), [1, 3, 0, 4, 2]);
        assert_eq!(view(Sort::Max, Filter::Alive, "").select(&index()), [3, 4, 0, 2]);
        assert_eq!(view(Sort::Mean, Filter::Dead, "").select(&index()), [1]);
        assert_eq!(view(Sort::Index, Filter::Dense, "").select(&index()), [2]);
        assert!(!by_density.sorted_by(Sort::Density).sorted_by(Sort::Max).reversed);
    }

    #[test]
    fn searches_words_without_case_and_numbers() {
        assert_eq!(view(Sort::Index, Filter::All, " CAT ").select(&index()), [0, 4]);
        assert_eq!(view(Sort::Index, Filter::All, "#3").select(&index()), [3]);
        assert_eq!(view(Sort::Index, Filter::All, "4").select(&index()), [4]);
        assert!(view(Sort::Index, Filter::All, "zebra").select(&index()).is_empty());
    }

    #[test]
    fn neighbours_go_round() {
        let shown = [2, 4, 0];
        assert_eq!(ListView::neighbour(&shown, 0, 1), Some(2));
        assert_eq!(ListView::neighbour(&shown, 2, -1), Some(0));
        assert_eq!(ListView::neighbour(&shown, 9, 1), Some(2));
        assert_eq!(ListView::neighbour(&[], 0, 1), None);
    }
}
