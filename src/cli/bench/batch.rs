//! Decodes of several sequences as one batch: milliseconds a step and tokens a second, beside what the bandwidth allows.
//!
//! Keys and values are random instead of prefilled; every sequence has its own.
//! Invariant: the time of a step is from one choice of tokens to the next, the choice itself included.

use std::time::Instant;

use serde_json::json;

use super::cuda::{device, failed, random_tokens};
use super::decode::{cache_bytes, weight_bytes};
use super::report::{Row, median, rounded};
use super::{Options, ceilings};
use crate::backend::cuda::{Cuda, CudaMatrix, CudaScores};
use crate::backend::{AttentionTask, Backend, BackendError, KvMut, KvRef, Mask, Next, Segment, Wanted};
use crate::cli::CliError;
use crate::model::ModelSpec;
use crate::model::weights::{LayerWeights, Weights};

/// Steps whose times do not count.
const WARM_UP: usize = 4;
/// The likeliest token: temperature, nucleus and draw.
const LIKELIEST: Wanted = Wanted::Token((0.0, 1.0, 0.0));

/// Appends a row for each length and batch.
pub(super) fn measure(options: &Options, batches: &[usize], rows: &mut Vec<Row>) -> Result<(), CliError> {
    let (cuda, spec) = (device(options)?, options.shape.spec());
    rows.push(ceilings::measure(&cuda, options).map_err(failed)?);
    let copy_gb_s = rows.last().and_then(|row| row.get("copy_gb_s")?.as_f64()).unwrap_or(f64::NAN);
    let make =
        |matrix: crate::model::RandomMatrix| cuda.random_weight(matrix.seed, matrix.scale, matrix.rows, matrix.cols);
    let weights = Weights::random(&spec, 0, make).map_err(failed)?;
    let largest = batches.iter().copied().max().unwrap_or(1);
    for &tokens in &options.tokens {
        let mut batch = Sequences::new(&cuda, &spec, &weights, largest, tokens, options.steps).map_err(failed)?;
        for &sequences in batches {
            let mut row = json!({
                "what": "decode", "shape": options.shape.as_str(), "tokens": tokens, "batch": sequences, "kv_cache": options.kv_cache.as_str(),
                "products": options.products.as_str()
            });
            let row = row.as_object_mut().expect("made as an object");
            if sequences > batch.fitting() {
                row.insert("ms_a_step".to_owned(), json!("does not fit"));
                rows.push(row.clone());
                continue;
            }
            let ms = batch.milliseconds_a_step(sequences, options.steps).map_err(failed)?;
            let bytes = weight_bytes(&spec, 1)
                + sequences as f64 * cache_bytes(&spec, tokens + options.steps / 2, options.kv_cache.of_cuda());
            row.insert("ms_a_step".to_owned(), rounded(ms, 3));
            // A copy reads and writes; reading alone is as fast per byte that passes.
            row.insert("floor_ms".to_owned(), rounded(bytes / copy_gb_s / 1e6, 2));
            row.insert("tokens_s".to_owned(), rounded(sequences as f64 * 1e3 / ms, 1));
            row.insert("gb_s".to_owned(), rounded(bytes / ms / 1e6, 0));
            for (op, ms) in batch.shares(sequences).map_err(failed)? {
                row.insert(format!("{op}_ms"), rounded(ms, 2));
            }
            rows.push(row.clone());
        }
    }
    Ok(())
}

/// Sequences that decode together.
struct Sequences<'a> {
    cuda: &'a Cuda,
    spec: &'a ModelSpec,
    weights: &'a Weights<Cuda>,
    /// `[layer][sequence]`.
    keys: Vec<Vec<CudaMatrix>>,
    values: Vec<Vec<CudaMatrix>>,
    x: CudaMatrix,
    h: CudaMatrix,
    qkv: CudaMatrix,
    attended: CudaMatrix,
    logits: CudaScores,
    /// Tokens of each sequence before the first step.
    context: usize,
    last: Vec<u32>,
}

impl<'a> Sequences<'a> {
    /// `largest` sequences of `context` tokens, or as many as fit, with room for `steps` more.
    fn new(
        cuda: &'a Cuda,
        spec: &'a ModelSpec,
        weights: &'a Weights<Cuda>,
        largest: usize,
        context: usize,
        steps: usize,
    ) -> Result<Self, BackendError> {
        let (shape, capacity) = (spec.shape, context + WARM_UP + steps + 2);
        let random = [1, 2].map(|seed| cuda.random_matrix(seed, 1.0, capacity, shape.kv_width()));
        let [keys, values] = random;
        let (some_keys, some_values) = (keys?, values?);
        let mut sequences = Self {
            cuda,
            spec,
            weights,
            keys: (0..spec.layers).map(|_| Vec::new()).collect(),
            values: (0..spec.layers).map(|_| Vec::new()).collect(),
            x: cuda.matrix(largest, spec.hidden)?,
            h: cuda.matrix(largest, spec.hidden)?,
            qkv: cuda.matrix(largest, shape.qkv_width())?,
            attended: cuda.matrix(largest, shape.q_width())?,
            logits: cuda.scores(largest, spec.vocab)?,
            context,
            last: Vec::new(),
        };
        let copied = |from: &CudaMatrix| {
            let mut kept = cuda.kv_matrix(shape, capacity)?;
            cuda.copy_rows(from, 0, capacity, &mut kept, 0)?;
            Ok(kept)
        };
        for _ in 0..largest {
            let layers = (0..spec.layers).map(|_| Ok((copied(&some_keys)?, copied(&some_values)?)));
            match layers.collect::<Result<Vec<_>, BackendError>>() {
                Ok(layers) => sequences.add(layers),
                Err(BackendError::OutOfMemory { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        cuda.synchronize()?;
        Ok(sequences)
    }

    fn add(&mut self, layers: Vec<(CudaMatrix, CudaMatrix)>) {
        for (layer, (keys, values)) in layers.into_iter().enumerate() {
            self.keys[layer].push(keys);
            self.values[layer].push(values);
        }
    }

    fn fitting(&self) -> usize {
        self.keys[0].len()
    }

    /// Median over `steps` steps of the first `count` sequences.
    fn milliseconds_a_step(&mut self, count: usize, steps: usize) -> Result<f64, BackendError> {
        self.last = random_tokens(count, self.spec.vocab);
        let mut chosen = Vec::with_capacity(steps + WARM_UP + 1);
        for step in 0..=steps + WARM_UP {
            self.step(self.context + step)?;
            chosen.push(Instant::now());
        }
        let times = chosen.windows(2).skip(WARM_UP).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3);
        Ok(median(times.collect()))
    }

    /// Milliseconds of each operation in one step, launches not overlapping.
    fn shares(&mut self, count: usize) -> Result<Vec<(&'static str, f64)>, BackendError> {
        self.last = random_tokens(count, self.spec.vocab);
        self.cuda.start_profile()?;
        self.step(self.context)?;
        let mut shares: Vec<(&'static str, f64)> = Vec::new();
        for (op, ms) in self.cuda.finish_profile()? {
            match shares.iter_mut().find(|(known, _)| *known == op) {
                Some((_, sum)) => *sum += f64::from(ms),
                None => shares.push((op, f64::from(ms))),
            }
        }
        Ok(shares)
    }

    /// Appends the last tokens at `position` and chooses the next.
    fn step(&mut self, position: usize) -> Result<(), BackendError> {
        let (cuda, spec, weights, rows) = (self.cuda, self.spec, self.weights, self.last.len());
        let positions = vec![position as u32; rows];
        let task = |row: usize| AttentionTask {
            queries: row..row + 1,
            segments: vec![Segment { source: row, rows: 0..position + 1, mask: Mask::Full }],
        };
        let tasks: Vec<_> = (0..rows).map(task).collect();
        cuda.embed(&weights.embedding, &self.last, &mut self.x)?;
        for (layer, of_layer) in weights.layers.iter().enumerate() {
            self.attend(layer, of_layer, &positions, &tasks)?;
            cuda.linear(rows, &self.attended, &of_layer.o, of_layer.o_bias.as_ref(), true, &mut self.x)?;
            cuda.rms_norm(rows, &self.x, &of_layer.mlp_norm, spec.epsilon, &mut self.h)?;
            cuda.mlp(rows, &self.h, &of_layer.gate_up, &of_layer.down, &mut self.x)?;
        }
        cuda.logits(rows, &self.x, &weights.language_model_head(spec), 0..spec.vocab, &mut self.logits, 0)?;
        let next = cuda.next_tokens(&self.logits, &vec![LIKELIEST; rows])?;
        let token = |next| match next {
            Next::Token(token) => Ok(token),
            Next::Logits(_) => {
                Err(BackendError::Device { op: "next_tokens", reason: "logits are not finite".to_owned() })
            }
        };
        self.last = next.into_iter().map(token).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        weights: &LayerWeights<Cuda>,
        positions: &[u32],
        tasks: &[AttentionTask],
    ) -> Result<(), BackendError> {
        let (cuda, spec, rows, shape) = (self.cuda, self.spec, positions.len(), self.spec.shape);
        cuda.rms_norm(rows, &self.x, &weights.attention_norm, spec.epsilon, &mut self.h)?;
        cuda.linear(rows, &self.h, &weights.qkv, weights.qkv_bias.as_ref(), false, &mut self.qkv)?;
        let (keys, values) = (&mut self.keys[layer][..rows], &mut self.values[layer][..rows]);
        let place = |((k, v), position): ((_, _), &u32)| KvMut { k, v, first_row: *position as usize };
        let places = keys.iter_mut().zip(values.iter_mut()).zip(positions).map(place).collect();
        cuda.rope_store_each(shape, positions, &spec.rope.inv_freq, spec.rope.scale, &mut self.qkv, places)?;
        let sources: Vec<_> = keys.iter().zip(values.iter()).map(|(k, v)| KvRef { k, v }).collect();
        cuda.attention(shape, &self.qkv, &sources, tasks, &mut self.attended, None)
    }
}
