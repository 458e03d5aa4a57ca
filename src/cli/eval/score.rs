//! Whether an answer is right.
//!
//! Invariant: pure. Case, runs of white space and punctuation at the ends never decide; every word and digit does.

use serde_json::Value;

use crate::job::Task;

/// Whether `given`, the model's output, says what `expected` says: a string for `ask`, an object for `extract`, a list of lines for `summarise`.
pub(super) fn right(task: Task, expected: &Value, given: &str) -> bool {
    match task {
        Task::Ask => same(expected, &Value::String(given.to_owned())),
        Task::Extract => serde_json::from_str(given).is_ok_and(|given: Value| same(expected, &given)),
        Task::Summarise => {
            let lines = given.lines().map(|line| line.trim_start().trim_start_matches(['-', '*']).to_owned());
            same(expected, &lines.map(Value::String).collect())
        }
    }
}

fn same(expected: &Value, given: &Value) -> bool {
    match (expected, given) {
        (Value::Object(expected), Value::Object(given)) => {
            let has = |(key, value): (&String, &Value)| given.get(key).is_some_and(|other| same(value, other));
            expected.len() == given.len() && expected.iter().all(has)
        }
        (Value::Array(expected), Value::Array(given)) => {
            expected.len() == given.len() && expected.iter().zip(given).all(|(one, other)| same(one, other))
        }
        (Value::Object(_) | Value::Array(_), _) | (_, Value::Object(_) | Value::Array(_)) => false,
        (expected, given) => normal(expected) == normal(given),
    }
}

fn normal(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_lowercase);
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.trim_matches(['.', ',', ';', ':', '!', '?', '"', '\'', '“', '”']).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_reader_would_call_the_same_is_right() {
        assert!(right(Task::Ask, &json!("3 December 1953"), " 3  december 1953.\n"));
        assert!(right(Task::Ask, &json!(1540), "1540"));
        assert!(right(Task::Extract, &json!({"owner": "Kate", "n": 3}), r#"{"n": "3", "owner": "kate"}"#));
        assert!(right(Task::Summarise, &json!(["One", "Two"]), "- One\n  - Two"));
    }

    #[test]
    fn every_word_digit_and_field_counts() {
        assert!(!right(Task::Ask, &json!("3 December 1953"), "3 December 1954"));
        assert!(!right(Task::Ask, &json!("152/1540"), "152 1540"));
        assert!(!right(Task::Ask, &json!("$1,000"), "1,000"));
        assert!(!right(Task::Extract, &json!({"owner": "Kate"}), r#"{"owner": "Kate", "more": "x"}"#));
        assert!(!right(Task::Extract, &json!({"owner": "Kate"}), r#"{"owner": "Ka"#));
        assert!(!right(Task::Summarise, &json!(["One", "Two"]), "- Two\n- One"));
    }
}
