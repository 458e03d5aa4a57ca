//! Stop strings, found where they span tokens.
//!
//! Invariant: every byte of the text is looked at once; half a character is never shown to the search.

/// Turns tokens into text, special tokens left out.
pub type Decode<'a> = &'a (dyn Fn(&[u32]) -> String + Sync);

/// The text so far, and the strings that end it.
pub struct StopStrings<'a> {
    stops: Vec<&'a str>,
    longest: usize,
    decode: Decode<'a>,
    text: String,
    /// Tokens before this one are no longer needed to decode the next.
    context_from: usize,
    /// Tokens before this one are in `text`.
    read: usize,
}

impl<'a> StopStrings<'a> {
    /// Empty strings are no stop strings.
    pub fn new(stops: &'a [String], decode: Decode<'a>) -> Self {
        let stops: Vec<&str> = stops.iter().map(String::as_str).filter(|stop| !stop.is_empty()).collect();
        let longest = stops.iter().map(|stop| stop.len()).max().unwrap_or(0);
        Self { stops, longest, decode, text: String::new(), context_from: 0, read: 0 }
    }

    /// Looks at the last of `tokens` (all of them so far); the text before the first stop string if there is one now.
    pub fn found(&mut self, tokens: &[u32]) -> Option<&str> {
        if self.stops.is_empty() {
            return None;
        }
        let searched = self.text.len();
        self.extend(tokens);
        // A stop string may have begun in what was searched before.
        let mut from = searched.saturating_sub(self.longest - 1);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        let tail = &self.text[from..];
        let at = self.stops.iter().filter_map(|stop| tail.find(stop)).min()?;
        Some(&self.text[..from + at])
    }

    /// Decodes the new tokens together with the ones just before, because a tokenizer may spread a character over
    /// tokens and treats the first token of a text in its own way.
    fn extend(&mut self, tokens: &[u32]) {
        let known = (self.decode)(&tokens[self.context_from..self.read]);
        let now = (self.decode)(&tokens[self.context_from..]);
        if now.ends_with(char::REPLACEMENT_CHARACTER) {
            return;
        }
        if let Some(new) = now.get(known.len()..).filter(|new| !new.is_empty()) {
            self.text.push_str(new);
            self.context_from = self.read;
            self.read = tokens.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token is a byte.
    fn bytes(tokens: &[u32]) -> String {
        String::from_utf8_lossy(&tokens.iter().map(|token| *token as u8).collect::<Vec<_>>()).into_owned()
    }

    fn until_stopped(text: &str, stops: &[&str]) -> Option<(usize, String)> {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut search = StopStrings::new(&stops, &bytes);
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        (1..=tokens.len()).find_map(|count| search.found(&tokens[..count]).map(|text| (count, text.to_owned())))
    }

    #[test]
    fn a_stop_string_over_several_tokens_ends_the_text_before_it() {
        assert_eq!(until_stopped("one\n\ntwo", &["\n\n"]), Some((5, "one".to_owned())));
        assert_eq!(until_stopped("aab", &["ab"]), Some((3, "a".to_owned())));
        assert_eq!(until_stopped("abc", &["x", ""]), None);
    }

    #[test]
    fn the_earliest_of_several_counts() {
        assert_eq!(until_stopped("a--END", &["END", "--END"]), Some((6, "a".to_owned())));
    }

    #[test]
    fn characters_of_several_tokens_are_whole() {
        assert_eq!(until_stopped("naïve → ✓ done", &["→ ✓"]), Some(("naïve → ✓".len(), "naïve ".to_owned())));
    }
}
