//! What there is of CUDA on this machine, for people.

use serde::Serialize;

use super::libraries::Libraries;

/// Libraries, versions and cards; and what stands in the way of using one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Libraries, and where they were looked for.
    pub libraries: Libraries,
    /// The version of CUDA that the driver runs.
    pub driver: Option<String>,
    /// The version of the run-time compiler.
    pub compiler: Option<String>,
    /// The cards.
    pub cards: Vec<CardInfo>,
    /// What stands in the way.
    pub problem: Option<String>,
}

/// What a card is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CardInfo {
    /// Its own name.
    pub name: String,
    /// Compute capability, such as `9.0`.
    pub capability: String,
    /// Bytes of memory.
    pub memory: u64,
}

/// Looks. Never fails: what does not work is said.
#[must_use]
pub fn look() -> Found {
    let libraries = Libraries::find().clone();
    let mut found = Found { libraries, driver: None, compiler: None, cards: Vec::new(), problem: None };
    fill(&mut found);
    found
}

impl Found {
    /// Lines for people.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let of = |version: &Option<String>| version.as_deref().map_or_else(String::new, |v| format!(" {v}"));
        let libraries = [
            (format!("driver (CUDA{})", of(&self.driver)), &self.libraries.driver),
            (format!("compiler (NVRTC{})", of(&self.compiler)), &self.libraries.nvrtc),
            ("matrix library (cuBLASLt)".to_owned(), &self.libraries.cublas_lt),
        ];
        let mut lines: Vec<String> = self
            .cards
            .iter()
            .enumerate()
            .map(|(number, card)| {
                let gib = card.memory >> 30;
                format!("cuda:{number} is {}, compute capability {}, {gib} GiB", card.name, card.capability)
            })
            .collect();
        lines.extend(libraries.into_iter().map(|(name, path)| match path {
            Some(path) => format!("{name}: {}", path.display()),
            None => format!("{name}: not found"),
        }));
        if self.libraries.missing().is_some() {
            let tried: Vec<String> =
                self.libraries.tried.iter().map(|path| path.display().to_string()).collect();
            let tried = if tried.is_empty() { "no other folder".to_owned() } else { tried.join(", ") };
            lines.push(format!(
                "looked for libraries where the loader does, and in {tried}; STRATASCOPE_CUDA_LIBS names a folder to look in first"
            ));
        }
        lines.extend(self.problem.clone());
        lines
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn fill(found: &mut Found) {
    found.problem = Some("cards are used on Linux on x86-64 only".to_owned());
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn fill(found: &mut Found) {
    found.compiler = super::nvrtc::version().ok().map(|(major, minor)| format!("{major}.{minor}"));
    match super::card::cards() {
        Ok((driver, cards)) => (found.driver, found.cards) = (Some(driver), cards),
        Err(error) => found.problem = Some(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_and_what_is_not_is_said() {
        let nothing = Found {
            libraries: Libraries::default(),
            driver: None,
            compiler: None,
            cards: vec![],
            problem: Some("no driver".to_owned()),
        };
        let text = nothing.lines().join("\n");
        assert!(
            text.contains("driver (CUDA): not found") && text.contains("STRATASCOPE_CUDA_LIBS"),
            "{text}"
        );
        assert!(text.ends_with("no driver"));
        let card = CardInfo { name: "H100".to_owned(), capability: "9.0".to_owned(), memory: 80 << 30 };
        let path = Some("lib".into());
        let libraries =
            Libraries { driver: path.clone(), nvrtc: path.clone(), cublas_lt: path, tried: vec![] };
        let all = Found {
            libraries,
            driver: Some("13.0".to_owned()),
            compiler: None,
            cards: vec![card],
            problem: None,
        };
        let text = all.lines().join("\n");
        assert!(text.starts_with("cuda:0 is H100, compute capability 9.0, 80 GiB"), "{text}");
        assert!(text.contains("driver (CUDA 13.0): lib") && !text.contains("STRATASCOPE"), "{text}");
    }

    #[test]
    fn looking_never_fails() {
        assert!(!look().lines().is_empty());
    }
}
