//! Names in the order in which people count: `chapter 2` before `chapter 10`.
//!
//! Invariant: a total order; names that differ are never equal.

use std::cmp::Ordering;
use std::path::Path;

/// Compares two paths part by part.
pub fn natural(one: &Path, other: &Path) -> Ordering {
    let parts = |path: &Path| path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    let (ones, others): (Vec<String>, Vec<String>) = (parts(one), parts(other));
    let by_part = ones.iter().zip(&others).map(|(one, other)| compare(one, other)).find(|order| order.is_ne());
    by_part.unwrap_or_else(|| ones.len().cmp(&others.len())).then_with(|| one.cmp(other))
}

fn compare(mut one: &str, mut other: &str) -> Ordering {
    while !one.is_empty() && !other.is_empty() {
        let ((a, one_rest), (b, other_rest)) = (split(one), split(other));
        let order = match (number(a), number(b)) {
            (Some(a), Some(b)) => a.len().cmp(&b.len()).then_with(|| a.cmp(b)),
            _ => a.to_lowercase().cmp(&b.to_lowercase()),
        };
        if order.is_ne() {
            return order;
        }
        (one, other) = (one_rest, other_rest);
    }
    one.len().cmp(&other.len())
}

/// The leading run of digits, or of anything else.
fn split(text: &str) -> (&str, &str) {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
    text.split_at(end)
}

/// The digits without leading zeros: the longer one is the greater number.
fn number(run: &str) -> Option<&str> {
    run.starts_with(|c: char| c.is_ascii_digit()).then(|| run.trim_start_matches('0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_count() {
        let mut names = ["b/1.txt", "a10.txt", "A2.txt", "a002b.txt", "a/z.txt", "a2.txt", "ü.txt"].map(Path::new);
        names.sort_by(|a, b| natural(a, b));
        let expected = ["a/z.txt", "A2.txt", "a2.txt", "a002b.txt", "a10.txt", "b/1.txt", "ü.txt"];
        assert_eq!(names, expected.map(Path::new));
    }

    proptest! {
        #[test]
        fn the_order_is_total(names in prop::collection::vec("[aAb012/.]{0,6}", 3)) {
            let [a, b, c] = [&names[0], &names[1], &names[2]].map(Path::new);
            prop_assert_eq!(natural(a, b), natural(b, a).reverse());
            prop_assert_eq!(natural(a, b).is_eq(), a == b);
            if natural(a, b).is_le() && natural(b, c).is_le() {
                prop_assert!(natural(a, c).is_le());
            }
        }
    }
}
