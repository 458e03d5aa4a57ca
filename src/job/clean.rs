//! Text as every database can hold it and every terminal can show it.
//!
//! Invariant: cleaned text has no control character but tab, line feed and carriage return; cleaning it again changes nothing.

use std::borrow::Cow;

use serde_json::Value;

fn unwanted(c: char) -> bool {
    c.is_control() && !matches!(c, '\t' | '\n' | '\r')
}

/// Whether `text` has a character that [`clean`] would remove.
pub fn needs_cleaning(text: &str) -> bool {
    text.chars().any(unwanted)
}

/// `text` without control characters (PostgreSQL holds no NUL, terminals obey the others). Borrowed if it had none.
pub fn clean(text: &str) -> Cow<'_, str> {
    if needs_cleaning(text) { text.chars().filter(|c| !unwanted(*c)).collect::<String>().into() } else { text.into() }
}

/// Cleans every string and key of a JSON value in place; returns whether one needed it.
pub fn clean_json(value: &mut Value) -> bool {
    match value {
        Value::String(text) => match clean(text) {
            Cow::Borrowed(_) => false,
            Cow::Owned(cleaned) => {
                *text = cleaned;
                true
            }
        },
        Value::Array(items) => items.iter_mut().fold(false, |changed, item| clean_json(item) || changed),
        Value::Object(fields) => {
            let mut changed = fields.values_mut().fold(false, |changed, item| clean_json(item) || changed);
            if fields.keys().any(|name| needs_cleaning(name)) {
                *fields =
                    std::mem::take(fields).into_iter().map(|(name, item)| (clean(&name).into_owned(), item)).collect();
                changed = true;
            }
            changed
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_go_and_white_space_stays() {
        assert_eq!(clean("a\0b\u{1b}[31m\u{85}\tc\r\n"), "ab[31m\tc\r\n");
        assert!(matches!(clean("plain é 漢\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn json_is_cleaned_in_keys_and_depth() {
        let mut value = serde_json::json!({"a\0": ["x\0", {"b": "\u{7}y"}], "n": 1});
        assert!(clean_json(&mut value));
        assert_eq!(value, serde_json::json!({"a": ["x", {"b": "y"}], "n": 1}));
        assert!(!clean_json(&mut value));
    }
}
