//! What benchmarks print: rows of named figures.
//!
//! Invariant: JSON and table have the same figures.

use serde_json::{Map, Value};

use super::Format;
use crate::cli::CliError;
use crate::cli::database::{cell, print_json, print_table};

/// Figures by name, in the order of their columns.
pub(super) type Row = Map<String, Value>;

/// Prints rows; those of a table may have different columns, which then stay empty.
pub(super) fn print(rows: &[Row], format: Format) -> Result<(), CliError> {
    if format == Format::Json {
        return print_json(&rows);
    }
    let mut columns: Vec<&str> = Vec::new();
    for name in rows.iter().flat_map(Map::keys) {
        if !columns.contains(&name.as_str()) {
            columns.push(name);
        }
    }
    let cells =
        rows.iter().map(|row| columns.iter().map(|name| row.get(*name).map(shown).unwrap_or_default()).collect());
    print_table(&columns, cells.collect())
}

/// A figure with the decimals it has.
fn shown(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => number.as_f64().map(|float| float.to_string()).unwrap_or_default(),
        other => cell(other),
    }
}

/// The one in the middle; of an even number the earlier.
#[cfg(any(feature = "cuda", test))]
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// With so many decimals.
pub(super) fn rounded(value: f64, decimals: i32) -> Value {
    let unit = 10f64.powi(decimals);
    Value::from((value * unit).round() / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_as_they_were_rounded() {
        assert_eq!(shown(&rounded(0.8049, 3)), "0.805");
        assert_eq!(shown(&rounded(29_462.4, 0)), "29462");
        assert_eq!(shown(&Value::from(8)), "8");
    }

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 1.0);
        assert!(median(vec![]).is_nan());
    }
}
