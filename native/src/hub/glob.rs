//! Patterns over paths: `*` and `?` within a component, `**` over any number of components.

/// Whether `path` is what `pattern` describes.
#[must_use]
pub fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('/').collect();
    let path: Vec<&str> = path.split('/').collect();
    // reached[j]: the components so far describe the first j components of the path.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    for part in pattern {
        let mut next = vec![false; path.len() + 1];
        if part == "**" {
            let mut any = false;
            for (to, from) in next.iter_mut().zip(&reached) {
                any |= *from;
                *to = any;
            }
        } else {
            for (j, component) in path.iter().enumerate() {
                next[j + 1] = reached[j] && component_matches(part.as_bytes(), component.as_bytes());
            }
        }
        reached = next;
    }
    reached[path.len()]
}

fn component_matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on after the last star, if what was tried since does not fit.
    let mut again: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match again {
                Some((after, from)) => {
                    (p, t) = (after, from + 1);
                    again = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stay_in_their_component_and_double_stars_do_not() {
        for (pattern, path) in [
            ("data/*.parquet", "data/train-0.parquet"),
            ("data/train-*-of-*.parquet", "data/train-00-of-of-04.parquet"),
            ("**/*.jsonl", "a.jsonl"),
            ("**/*.jsonl", "x/y/a.jsonl"),
            ("a/**", "a/b/c"),
            ("a?c", "abc"),
            ("*", "a"),
            ("a**b", "axb"),
        ] {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("*.parquet", "data/a.parquet"),
            ("data/*.parquet", "data/a.parquet.gz"),
            ("a/**/b", "a/c"),
            ("a?c", "ac"),
            ("", "a"),
            ("*a", "ab"),
        ] {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
        // Many stars take polynomial time.
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
    }
}
