//! Weights of a model's shapes without the model: what benchmarks and tests of speed need.
//!
//! Invariant: every matrix comes from a seed of its own, so that the same spec has the same weights everywhere.

use super::ModelSpec;
use super::weights::{LayerWeights, RetainingHead, Weights};
use crate::backend::{Backend, BackendError};

/// A matrix that is asked for: elements uniform in `[-scale, scale)`.
#[derive(Debug, Clone, Copy)]
pub struct RandomMatrix {
    /// Tells it from the others.
    pub seed: u64,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Largest magnitude.
    pub scale: f32,
}

impl<B: Backend> Weights<B> {
    /// All weights of `spec`, with retaining heads of `head_width` hidden units (none if 0). `make` puts one matrix on the device.
    pub fn random<F>(spec: &ModelSpec, head_width: usize, make: F) -> Result<Self, BackendError>
    where
        F: FnMut(RandomMatrix) -> Result<B::Weight, BackendError>,
    {
        let mut source = Source { make, seed: 0 };
        let layers = (0..spec.layers).map(|_| source.layer::<B>(spec)).collect::<Result<_, _>>()?;
        let heads = (0..spec.layers).map(|_| {
            let w1 = source.linear(head_width, spec.shape.qkv_width())?;
            Ok(RetainingHead { width: head_width, w1, w2: source.linear(spec.shape.kv_heads, head_width)? })
        });
        let retaining_heads = if head_width > 0 { Some(heads.collect::<Result<_, BackendError>>()?) } else { None };
        let head = if spec.tied_embeddings { None } else { Some(source.linear(spec.vocab, spec.hidden)?) };
        Ok(Self {
            embedding: source.matrix(spec.vocab, spec.hidden, 1.0)?,
            layers,
            final_norm: source.matrix(1, spec.hidden, 1.0)?,
            head,
            retaining_heads,
        })
    }
}

struct Source<F> {
    make: F,
    seed: u64,
}

impl<F> Source<F> {
    fn matrix<W>(&mut self, rows: usize, cols: usize, scale: f32) -> Result<W, BackendError>
    where
        F: FnMut(RandomMatrix) -> Result<W, BackendError>,
    {
        self.seed += 1;
        (self.make)(RandomMatrix { seed: self.seed, rows, cols, scale })
    }

    /// Keeps the variance of what goes through: uniform in `[-s, s)` has a variance of `s² / 3`.
    fn linear<W>(&mut self, rows: usize, cols: usize) -> Result<W, BackendError>
    where
        F: FnMut(RandomMatrix) -> Result<W, BackendError>,
    {
        self.matrix(rows, cols, (3.0 / cols as f32).sqrt())
    }

    fn layer<B: Backend>(&mut self, spec: &ModelSpec) -> Result<LayerWeights<B>, BackendError>
    where
        F: FnMut(RandomMatrix) -> Result<B::Weight, BackendError>,
    {
        let (shape, hidden) = (spec.shape, spec.hidden);
        let bias = |wanted: bool, width: usize| wanted.then_some(width);
        let (qkv_bias, o_bias) = (bias(spec.qkv_bias, shape.qkv_width()), bias(spec.o_bias, hidden));
        Ok(LayerWeights {
            attention_norm: self.matrix(1, hidden, 1.0)?,
            qkv: self.linear(shape.qkv_width(), hidden)?,
            qkv_bias: qkv_bias.map(|width| self.matrix(1, width, 1.0)).transpose()?,
            o: self.linear(hidden, shape.q_width())?,
            o_bias: o_bias.map(|width| self.matrix(1, width, 1.0)).transpose()?,
            mlp_norm: self.matrix(1, hidden, 1.0)?,
            gate_up: self.linear(2 * spec.intermediate, hidden)?,
            down: self.linear(hidden, spec.intermediate)?,
        })
    }
}
