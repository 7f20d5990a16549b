//! Shaping documents: cutting long ones where the text itself pauses, joining hard-wrapped lines.

use std::borrow::Cow;

/// Where to cut `bytes`, which go on, so that at most `most` bytes come first: after the last paragraph end in the second half, else
/// the last line end, else the last space, else the last whole character.
pub(super) fn cut_at(bytes: &[u8], most: usize) -> usize {
    if bytes.len() <= most {
        return bytes.len();
    }
    let half = most / 2;
    let second = &bytes[half..most];
    if let Some(at) = second.windows(2).rposition(|w| w == b"\n\n") {
        return half + at + 2;
    }
    for wanted in [b'\n', b' '] {
        if let Some(at) = second.iter().rposition(|&b| b == wanted) {
            return half + at + 1;
        }
    }
    // Bytes 10xxxxxx go on a character; a character has at most three of them.
    (most - 3..=most).rev().find(|&at| bytes[at] & 0xC0 != 0x80).unwrap_or(most)
}

/// Joins hard-wrapped lines: a line break between two lines that hold text becomes one space; runs of blank
/// lines become one paragraph break. Carriage returns go.
pub(super) fn unwrap_lines(text: &str) -> Cow<'_, str> {
    if !text.contains('\n') {
        return Cow::Borrowed(text);
    }
    let mut joined = String::with_capacity(text.len());
    let mut blank = false;
    for line in text.lines().map(str::trim) {
        if line.is_empty() {
            blank = true;
            continue;
        }
        if !joined.is_empty() {
            joined.push_str(if blank { "\n\n" } else { " " });
        }
        joined.push_str(line);
        blank = false;
    }
    Cow::Owned(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_where_the_text_pauses() {
        let cut = |text: &str, most| text[..cut_at(text.as_bytes(), most)].to_owned();
        assert_eq!(cut("short", 64), "short");
        assert_eq!(cut("one two.\n\nthree\nfour five", 16), "one two.\n\n");
        assert_eq!(cut("one two three\nfour five", 18), "one two three\n");
        assert_eq!(cut("one two three four", 12), "one two ");
        assert_eq!(cut(&"é".repeat(9), 9), "é".repeat(4));
        assert_eq!(cut_at(&[0x80; 20], 10), 10);
    }

    #[test]
    fn hard_wrapped_lines_are_joined() {
        assert_eq!(unwrap_lines("a\r\nb\n \n\n\nc\nd\n"), "a b\n\nc d");
        assert_eq!(unwrap_lines("no break"), "no break");
    }
}
