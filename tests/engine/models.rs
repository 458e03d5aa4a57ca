//! Tiny models with random weights, as values for the oracle and on the CPU for the engine.

use apbd::backend::cpu::Cpu;
use apbd::backend::{Backend, DType, HeadShape, WeightView};
use apbd::model::weights::{LayerWeights, RetainingHead, Weights};
use apbd::model::{ModelSpec, Rope};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A matrix as it would stand in a file: f32, row-major.
#[derive(Clone)]
pub struct Tensor {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f32>,
}

/// One layer, unstacked.
#[derive(Clone)]
pub struct LayerTensors {
    pub attention_norm: Tensor,
    pub qkv: [Tensor; 3],
    pub qkv_bias: Option<[Tensor; 3]>,
    pub o: Tensor,
    pub o_bias: Option<Tensor>,
    pub mlp_norm: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
    pub w1: Tensor,
    pub w2: Tensor,
}

/// A model.
#[derive(Clone)]
pub struct TinyModel {
    pub spec: ModelSpec,
    pub embedding: Tensor,
    pub layers: Vec<LayerTensors>,
    pub final_norm: Tensor,
    pub head: Option<Tensor>,
}

/// What makes tiny models differ.
#[derive(Clone, Copy)]
pub struct Variant {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub layers: usize,
    pub biases: bool,
    pub tied: bool,
    pub rope_scale: f32,
}

/// Grouped heads, an own language-model head.
pub const GROUPED: Variant =
    Variant { heads: 4, kv_heads: 2, head_dim: 8, layers: 3, biases: false, tied: false, rope_scale: 1.0 };
/// One KV head, biases everywhere, tied embeddings, a factor on sine and cosine.
pub const MULTI_QUERY: Variant =
    Variant { heads: 3, kv_heads: 1, head_dim: 4, layers: 3, biases: true, tied: true, rope_scale: 1.1 };

/// Rows of the vocabulary: more than any test has tokens, so that no token has to repeat.
pub const VOCAB: usize = 160;
const HIDDEN: usize = 20;
const INTERMEDIATE: usize = 28;
pub const RETAINING_WIDTH: usize = 12;

struct Random(StdRng);

impl Random {
    fn tensor(&mut self, rows: usize, cols: usize, scale: f32, offset: f32) -> Tensor {
        let values = (0..rows * cols).map(|_| offset + scale * (2.0 * self.0.random::<f32>() - 1.0)).collect();
        Tensor { rows, cols, values }
    }
    /// Keeps the size of what goes through it.
    fn linear(&mut self, rows: usize, cols: usize) -> Tensor {
        self.tensor(rows, cols, (3.0 / cols as f32).sqrt() * 1.3, 0.0)
    }
    fn norm(&mut self) -> Tensor {
        self.tensor(1, HIDDEN, 0.3, 1.0)
    }
}

impl TinyModel {
    pub fn new(variant: Variant, seed: u64) -> Self {
        let mut random = Random(StdRng::seed_from_u64(seed));
        let Variant { heads, kv_heads, head_dim, layers, biases, tied, rope_scale } = variant;
        let shape = HeadShape { heads, kv_heads, head_dim };
        let inv_freq = (0..head_dim / 2).map(|i| 100f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let spec = ModelSpec {
            family: "llama".to_owned(),
            layers,
            hidden: HIDDEN,
            intermediate: INTERMEDIATE,
            shape,
            vocab: VOCAB,
            epsilon: 1e-5,
            rope: Rope { inv_freq, scale: rope_scale },
            max_positions: 4096,
            qkv_bias: biases,
            o_bias: biases,
            tied_embeddings: tied,
            stop_tokens: Vec::new(),
        };
        let embedding = random.tensor(VOCAB, HIDDEN, 1.0, 0.0);
        let layers = (0..layers).map(|_| layer(&mut random, shape, biases)).collect();
        let final_norm = random.norm();
        let head = (!tied).then(|| random.linear(VOCAB, HIDDEN));
        Self { spec, embedding, layers, final_norm, head }
    }

    /// The weights as the engine takes them.
    pub fn weights<B: Backend>(&self, backend: &B) -> Weights<B> {
        let one = |tensor: &Tensor| stacked(backend, &[tensor]);
        let layer = |layer: &LayerTensors| LayerWeights {
            attention_norm: one(&layer.attention_norm),
            qkv: stacked(backend, &layer.qkv.each_ref()),
            qkv_bias: layer.qkv_bias.as_ref().map(|biases| one(&side_by_side(biases))),
            o: one(&layer.o),
            o_bias: layer.o_bias.as_ref().map(one),
            mlp_norm: one(&layer.mlp_norm),
            gate_up: stacked(backend, &[&layer.gate, &layer.up]),
            down: one(&layer.down),
        };
        let heads = self.layers.iter().map(|layer| RetainingHead {
            width: RETAINING_WIDTH,
            w1: one(&layer.w1),
            w2: one(&layer.w2),
        });
        Weights {
            embedding: one(&self.embedding),
            layers: self.layers.iter().map(layer).collect(),
            final_norm: one(&self.final_norm),
            head: self.head.as_ref().map(one),
            retaining_heads: Some(heads.collect()),
        }
    }
}

/// A CPU backend with one thread, as every rank of a test has.
pub fn cpu() -> Cpu {
    Cpu::new(1).unwrap()
}

fn layer(random: &mut Random, shape: HeadShape, biases: bool) -> LayerTensors {
    let widths = [shape.q_width(), shape.kv_width(), shape.kv_width()];
    LayerTensors {
        attention_norm: random.norm(),
        qkv: widths.map(|width| random.linear(width, HIDDEN)),
        qkv_bias: biases.then(|| widths.map(|width| random.tensor(1, width, 0.5, 0.0))),
        o: random.linear(HIDDEN, shape.q_width()),
        o_bias: biases.then(|| random.tensor(1, HIDDEN, 0.3, 0.0)),
        mlp_norm: random.norm(),
        gate: random.linear(INTERMEDIATE, HIDDEN),
        up: random.linear(INTERMEDIATE, HIDDEN),
        down: random.linear(HIDDEN, INTERMEDIATE),
        w1: random.linear(RETAINING_WIDTH, shape.qkv_width()),
        w2: random.linear(shape.kv_heads, RETAINING_WIDTH),
    }
}

fn stacked<B: Backend>(backend: &B, tensors: &[&Tensor]) -> B::Weight {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|tensor| little_endian(&tensor.values)).collect();
    let view =
        |(tensor, bytes): (&&Tensor, _)| WeightView { rows: tensor.rows, cols: tensor.cols, dtype: DType::F32, bytes };
    let views: Vec<WeightView<'_>> = tensors.iter().zip(bytes.iter().map(Vec::as_slice)).map(view).collect();
    match &views[..] {
        [one] => backend.weight(*one).unwrap(),
        several => backend.weight_stacked(several).unwrap(),
    }
}

/// Bytes as they stand in a file.
pub fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn side_by_side(vectors: &[Tensor]) -> Tensor {
    let values: Vec<f32> = vectors.iter().flat_map(|vector| vector.values.clone()).collect();
    Tensor { rows: 1, cols: values.len(), values }
}

/// Tokens in which none repeats: equal tokens would have equal scores up to rounding, and rounding would choose.
pub fn distinct_tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..VOCAB as u32).collect();
    let mut random = StdRng::seed_from_u64(seed);
    for index in 0..count {
        let other = random.random_range(index..VOCAB);
        tokens.swap(index, other);
    }
    tokens.truncate(count);
    tokens
}
