//! Mistakes of a caller, and memory that does not suffice: errors that say what, and a device that goes on.

use apbd::backend::cuda::{Cuda, CudaOptions};
use apbd::backend::{AttentionTask, Backend, BackendError, HeadShape, KvRef, Mask, Segment};

use super::Test;
use super::values::Values;

pub const TESTS: &[Test] = &[
    ("wrong_shapes_are_refused", shapes),
    ("too_much_memory_is_refused_and_given_back", memory),
    ("a_device_that_is_not_there_is_said_so", missing),
];

fn shapes(cuda: &Cuda) {
    let (x, w) = (Values::random(1, 4, 64, 1.0), Values::random(2, 8, 72, 1.0));
    let mut out = cuda.matrix(4, 8).unwrap();
    let error = cuda.linear(4, &x.matrix(cuda), &w.weight(cuda), None, false, &mut out).unwrap_err();
    assert!(matches!(error, BackendError::Shape { op: "linear", .. }), "{error}");
    let table = w.weight(cuda);
    let mut embedded = cuda.matrix(4, 72).unwrap();
    assert!(matches!(cuda.embed(&table, &[8], &mut embedded), Err(BackendError::Shape { op: "embed", .. })));
    let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: 64 };
    let kv = x.matrix(cuda);
    let beyond = Segment { source: 0, rows: 0..5, mask: Mask::Full };
    let task = AttentionTask { queries: 0..1, segments: vec![beyond] };
    let mut attended = cuda.matrix(4, 64).unwrap();
    let error = cuda.attention(shape, &kv, &[KvRef { k: &kv, v: &kv }], &[task], &mut attended, None).unwrap_err();
    assert!(matches!(error, BackendError::Shape { op: "attention", .. }), "{error}");
}

fn memory(cuda: &Cuda) {
    let before = cuda.free_bytes();
    let error = cuda.matrix(1 << 20, 1 << 14).err().unwrap();
    assert!(matches!(error, BackendError::OutOfMemory { bytes, .. } if bytes == 1 << 35), "{error}");
    let held = cuda.matrix(1 << 10, 1 << 14).unwrap();
    assert!(cuda.free_bytes() <= before - (1 << 25));
    drop(held);
    assert_eq!(cuda.free_bytes(), before);
}

fn missing(_: &Cuda) {
    let options = CudaOptions { memory_bytes: Some(1 << 20), ..CudaOptions::default() };
    let error = Cuda::open(1000, &options).err().unwrap().to_string();
    assert!(error.contains("no such device"), "{error}");
}
