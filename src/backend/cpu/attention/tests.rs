//! Attention against a plain reference in f64.
