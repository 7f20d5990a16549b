//! Data that may still be coming, may be there, or may have failed for a reason that is shown.

use std::fmt;

/// Something fetched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Load<T> {
    /// Not here yet.
    #[default]
    Loading,
    /// Here.
    Ready(T),
    /// Not coming.
    Failed(Failure),
}

/// Why something could not be shown, and what a reader can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was being done, as the start of a sentence: "reading pack.json".
    pub what: String,
    /// What went wrong.
    pub reason: String,
    /// What to do.
    pub hint: &'static str,
}

impl Failure {
    /// A file that did not arrive.
    #[must_use]
    pub fn fetch(path: &str, reason: impl fmt::Display) -> Self {
        Self {
            what: format!("Fetching {path}"),
            reason: reason.to_string(),
            hint: "Check the connection and that the site was copied whole, then try again.",
        }
    }

    /// A file that arrived but is not what it should be.
    #[must_use]
    pub fn content(path: &str, reason: impl fmt::Display) -> Self {
        Self {
            what: format!("Reading {path}"),
            reason: reason.to_string(),
            hint: "The file is damaged or of another version; build the site again from its packs.",
        }
    }

    /// Something the address names but the data lacks.
    #[must_use]
    pub fn absent(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            what: what.into(),
            reason: reason.to_string(),
            hint: "The address may be mistyped or belong to another version of this site.",
        }
    }

    /// A computation that failed.
    #[must_use]
    pub fn compute(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            what: what.into(),
            reason: reason.to_string(),
            hint: "Reload the page; add backend=cpu to the address to leave the graphics device out.",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}. {}", self.what, self.reason, self.hint)
    }
}

impl std::error::Error for Failure {}

impl<T> Load<T> {
    /// The value when it is here.
    pub fn ready(&self) -> Option<&T> {
        match self {
            Self::Ready(value) => Some(value),
            Self::Loading | Self::Failed(_) => None,
        }
    }

    /// The value, or how far it is from being one.
    pub fn map<U>(&self, f: impl FnOnce(&T) -> U) -> Load<U> {
        match self {
            Self::Loading => Load::Loading,
            Self::Ready(value) => Load::Ready(f(value)),
            Self::Failed(failure) => Load::Failed(failure.clone()),
        }
    }
}

impl<T> From<Result<T, Failure>> for Load<T> {
    fn from(result: Result<T, Failure>) -> Self {
        match result {
            Ok(value) => Self::Ready(value),
            Err(failure) => Self::Failed(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_why_and_what_to_do() {
        let failed: Load<u8> = Err(Failure::fetch("packs/a/pack.json", "HTTP status 404")).into();
        assert_eq!(failed.ready(), None);
        let Load::Failed(failure) = failed.map(|v| v + 1) else { panic!("lost the failure") };
        let text = failure.to_string();
        assert!(text.starts_with("Fetching packs/a/pack.json: HTTP status 404. Check"), "{text}");
        assert_eq!(Load::Ready(1).map(|v| v + 1), Load::Ready(2));
    }
}
