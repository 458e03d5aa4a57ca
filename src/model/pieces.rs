//! Long text in pieces, cut only where a tokenizer with a pre-tokenizer of words begins a new word anyway, so that tokenizing costs memory for a
//! piece and not for the text.
//!
//! Invariant: the pieces, put together, are the text; a piece has at most the bytes asked for.

/// Cuts `text` into pieces of at most `at_most` bytes: before a line, or before a space between two letters. Text without such a place, which is no
/// prose of any script with spaces or lines, is cut between any two characters.
pub fn pieces(mut text: &str, at_most: usize) -> impl Iterator<Item = &str> {
    // Room for the longest character.
    let at_most = at_most.max(4);
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(first_cut(text, at_most));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

fn first_cut(text: &str, at_most: usize) -> usize {
    if text.len() <= at_most {
        return text.len();
    }
    // `at_most` is at least the length of a character, so this ends above 0.
    let end = (0..=at_most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(at_most);
    last_line(text, end).or_else(|| last_word(text, end)).unwrap_or(end)
}

/// The last beginning of a line that does not begin with white space, which could belong to the line break.
fn last_line(text: &str, end: usize) -> Option<usize> {
    let starts_word = |at: usize| text[at..].chars().next().is_some_and(|next| !next.is_whitespace());
    text[..end].rmatch_indices('\n').map(|(at, _)| at + 1).find(|&at| starts_word(at))
}

/// The last space that stands alone between two letters.
fn last_word(text: &str, end: usize) -> Option<usize> {
    let between_letters = |at: usize| {
        let before = text[..at].chars().next_back().is_some_and(char::is_alphabetic);
        before && text[at + 1..].chars().next().is_some_and(char::is_alphabetic)
    };
    text[..end].rmatch_indices(' ').map(|(at, _)| at).find(|&at| between_letters(at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::pieces;

    #[test]
    fn cuts_are_before_lines_then_before_words_then_anywhere() {
        let cut = |text| pieces(text, 12).collect::<Vec<_>>();
        assert_eq!(cut("short"), ["short"]);
        assert_eq!(cut(""), [""; 0]);
        assert_eq!(cut("one two\nthree four"), ["one two\n", "three four"]);
        assert_eq!(cut("one\n\n  two three"), ["one\n\n  two", " three"], "no line begins with white space");
        assert_eq!(cut("one two, three"), ["one", " two, three"], "a comma is no letter");
        assert_eq!(cut("漢漢漢漢漢"), ["漢漢漢漢", "漢"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(text in any::<String>(), at_most in 0_usize..20) {
            let parts: Vec<&str> = pieces(&text, at_most).collect();
            prop_assert_eq!(parts.concat(), &*text);
            prop_assert!(parts.iter().all(|part| !part.is_empty() && part.len() <= at_most.max(4)));
        }
    }
}
