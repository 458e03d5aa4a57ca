//! The CPU backend: f32, a pool of threads per rank, matrix products by the `gemm` crate, blocked attention.
