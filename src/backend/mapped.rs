//! Files mapped read-only.
