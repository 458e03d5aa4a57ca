//! Every operation against a plain reference in f64.
