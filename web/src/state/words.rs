//! Tokens as visible text.

/// A token inside running text: newlines as `↵`, tabs as `⇥`; blank tokens become no-break spaces, so that their
/// shading has a width. Spaces stay spaces.
#[must_use]
pub fn in_text(word: &str) -> String {
    if !word.is_empty() && word.chars().all(|c| c == ' ') {
        return "\u{a0}".repeat(word.chars().count());
    }
    if word.is_empty() {
        return "∅".to_owned();
    }
    word.chars()
        .map(|c| match c {
            '\n' => '↵',
            '\r' => '␍',
            '\t' => '⇥',
            c => c,
        })
        .collect()
}

/// A token that stands alone, in a list: leading and trailing spaces are drawn too, as `·`.
#[must_use]
pub fn alone(word: &str) -> String {
    let body = word.trim_matches(' ');
    if body.is_empty() {
        return if word.is_empty() { "∅".to_owned() } else { "·".repeat(word.len()) };
    }
    let leading = word.len() - word.trim_start_matches(' ').len();
    let trailing = word.len() - word.trim_end_matches(' ').len();
    format!("{}{}{}", "·".repeat(leading), in_text(body), "·".repeat(trailing))
}

/// Whether the text breaks after this token.
#[must_use]
pub fn ends_line(word: &str) -> bool {
    word.contains('\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_invisible() {
        for word in ["", " ", "  ", "\n", "\n\n", "\t", " the", "a ", "<0xE2>", "é"] {
            assert!(!in_text(word).is_empty() && !alone(word).trim().is_empty(), "{word:?}");
        }
        assert_eq!((in_text(" the"), alone(" the")), (" the".to_owned(), "·the".to_owned()));
        assert_eq!((in_text("\n"), alone("  ")), ("↵".to_owned(), "··".to_owned()));
        assert_eq!(in_text("  "), "\u{a0}\u{a0}");
        assert!(ends_line(".\n") && !ends_line("."));
    }
}
