//! Tensors of a directory to the weights of a model on a device.
//!
//! Invariant: tensor names are those of Hugging Face; each is read once.

use std::path::Path;

use super::tensors::Tensors;
use super::weights::{LayerWeights, RetainingHead, Weights};
use super::{ModelError, ModelSpec};
use crate::backend::{Backend, WeightView};

/// Retaining heads in the model's own directory.
pub const HEADS_FILE: &str = "retaining_heads.safetensors";

impl<B: Backend> Weights<B> {
    /// Loads the model in `directory` onto a device, with the retaining heads in `heads` if that is given.
    pub fn load(backend: &B, directory: &Path, spec: &ModelSpec, heads: Option<&Path>) -> Result<Self, ModelError> {
        let tensors = Tensors::of_model(directory)?;
        let loader = Loader { backend, tensors: &tensors, spec };
        let layers = (0..spec.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let head = match spec.tied_embeddings {
            true => None,
            false => Some(loader.matrix("lm_head.weight", spec.vocab, spec.hidden)?),
        };
        Ok(Self {
            embedding: loader.matrix("model.embed_tokens.weight", spec.vocab, spec.hidden)?,
            layers,
            final_norm: loader.vector("model.norm.weight", spec.hidden)?,
            head,
            retaining_heads: heads.map(|path| retaining_heads(backend, path, spec)).transpose()?,
        })
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    tensors: &'a Tensors,
    spec: &'a ModelSpec,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&self, layer: usize) -> Result<LayerWeights<B>, ModelError> {
        let (spec, shape) = (self.spec, self.spec.shape);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let projections = [("q", q), ("k", kv), ("v", kv)];
        let qkv = projections.map(|(x, rows)| (name(&format!("self_attn.{x}_proj.weight")), rows, spec.hidden));
        let mlp = ["gate", "up"].map(|x| (name(&format!("mlp.{x}_proj.weight")), spec.intermediate, spec.hidden));
        let o_bias = name("self_attn.o_proj.bias");
        Ok(LayerWeights {
            attention_norm: self.vector(&name("input_layernorm.weight"), spec.hidden)?,
            qkv: self.stacked(&qkv)?,
            qkv_bias: match spec.qkv_bias {
                true => {
                    Some(self.joined_bias(&projections.map(|(x, n)| (name(&format!("self_attn.{x}_proj.bias")), n)))?)
                }
                false => None,
            },
            o: self.matrix(&name("self_attn.o_proj.weight"), spec.hidden, q)?,
            o_bias: spec.o_bias.then(|| self.vector(&o_bias, spec.hidden)).transpose()?,
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), spec.hidden)?,
            gate_up: self.stacked(&mlp)?,
            down: self.matrix(&name("mlp.down_proj.weight"), spec.hidden, spec.intermediate)?,
        })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Weight, ModelError> {
        self.put(name, self.tensors.matrix(name, rows, cols)?)
    }

    fn vector(&self, name: &str, length: usize) -> Result<B::Weight, ModelError> {
        self.put(name, self.tensors.vector(name, length)?)
    }

    fn put(&self, name: &str, view: WeightView<'_>) -> Result<B::Weight, ModelError> {
        self.backend.weight(view).map_err(|source| self.refused(name, source))
    }

    fn stacked(&self, parts: &[(String, usize, usize)]) -> Result<B::Weight, ModelError> {
        let view = |(name, rows, cols): &(String, usize, usize)| self.tensors.matrix(name, *rows, *cols);
        let views: Vec<WeightView<'_>> = parts.iter().map(view).collect::<Result<_, _>>()?;
        self.backend.weight_stacked(&views).map_err(|source| self.refused(&joined(parts.iter().map(|p| &p.0)), source))
    }

    /// Vectors one after the other, as one row.
    fn joined_bias(&self, parts: &[(String, usize)]) -> Result<B::Weight, ModelError> {
        let view = |(name, length): &(String, usize)| self.tensors.vector(name, *length);
        let views: Vec<WeightView<'_>> = parts.iter().map(view).collect::<Result<_, _>>()?;
        let (names, length) = (joined(parts.iter().map(|p| &p.0)), parts.iter().map(|p| p.1).sum());
        let dtype = views[0].dtype;
        if views.iter().any(|view| view.dtype != dtype) {
            let path = self.tensors.path_of(&parts[0].0).to_owned();
            return Err(ModelError::Tensor { path, name: names, reason: "are of different types".to_owned() });
        }
        let bytes: Vec<u8> = views.iter().flat_map(|view| view.bytes).copied().collect();
        self.put(&names, WeightView { rows: 1, cols: length, dtype, bytes: &bytes })
    }

    fn refused(&self, name: &str, source: crate::backend::BackendError) -> ModelError {
        let first = name.split(", ").next().unwrap_or(name);
        ModelError::Backend { path: self.tensors.path_of(first).to_owned(), name: name.to_owned(), source }
    }
}

fn joined<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// `model.layers.{i}.self_attn.fc1.weight` and `.fc2.weight` of every layer, with or without `model.`; the width is the file's.
fn retaining_heads<B: Backend>(
    backend: &B,
    path: &Path,
    spec: &ModelSpec,
) -> Result<Vec<RetainingHead<B>>, ModelError> {
    let tensors = Tensors::of_file(path)?;
    let loader = Loader { backend, tensors: &tensors, spec };
    let prefix = if tensors.contains("layers.0.self_attn.fc1.weight") { "" } else { "model." };
    let one = |layer: usize| {
        let name = |part: &str| format!("{prefix}layers.{layer}.self_attn.{part}.weight");
        let width = tensors.shape(&name("fc1"))?.first().copied().unwrap_or(0);
        Ok(RetainingHead {
            width,
            w1: loader.matrix(&name("fc1"), width, spec.shape.qkv_width())?,
            w2: loader.matrix(&name("fc2"), spec.shape.kv_heads, width)?,
        })
    };
    (0..spec.layers).map(one).collect()
}
