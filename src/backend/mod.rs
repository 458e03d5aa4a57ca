//! The fused operations a transformer needs, on some device.
//!
//! [`Backend`] is the one seam between the layer loop (`engine`) and the hardware. It is deliberately short: each
//! operation is what one kernel (or one small group of kernels) does on a GPU, so that a backend loses nothing by
//! implementing it. All matrices are row-major, one row a token. Activations have the backend's own type (f32 on the CPU,
//! bf16 on CUDA); scores and log-sum-exps are always f32.
//!
//! Invariant: nothing here knows of models, plans, hosts, queues or documents; only shapes. `unsafe` lives here alone.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod mapped;

use std::ops::Range;

/// Columns that the parts of an MLP are made of: 16 bytes, which is what kernels read at a time.
pub const PART_COLS: usize = 8;

/// Columns that are part `index` of `cols` columns in `count` parts. All parts are of one width, for which the last ones may begin before the one ahead of them ends.
pub fn even_part(cols: usize, index: usize, count: usize) -> Range<usize> {
    let width = cols.div_ceil(count).next_multiple_of(PART_COLS).min(cols);
    let first = (index * width).min(cols - width);
    first..first + width
}

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A tensor had another shape than the operation needs; a mistake in the caller or in a weights file.
    #[error("{op}: expected {expected}, got {got}")]
    Shape { op: &'static str, expected: String, got: String },
    /// The device has too little memory.
    #[error("{op}: out of memory, {bytes} bytes were asked for")]
    OutOfMemory { op: &'static str, bytes: usize },
    /// The device failed; nothing on it can be trusted any more, the process has to go.
    #[error("{op}: the device failed: {reason}")]
    Device { op: &'static str, reason: String },
    /// The backend or the device asked for is not there.
    #[error("{0}")]
    Unavailable(String),
}

/// Element type of weights as they stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain float: the upper half of an f32.
    Bf16,
}

/// A weight as it stands in a (memory-mapped) file: little-endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct WeightView<'a> {
    /// Rows (output features of a linear layer; 1 for a vector).
    pub rows: usize,
    /// Columns (input features).
    pub cols: usize,
    /// Element type of `bytes`.
    pub dtype: DType,
    /// `rows * cols` elements.
    pub bytes: &'a [u8],
}

/// Head layout of an attention layer. A packed `qkv` row is `[heads | kv_heads | kv_heads] * head_dim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Width of a packed qkv row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Width of a row of queries, and of an attention output.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Width of a row of keys, or of values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// Bytes of a row of keys and its values as [`Backend::quantize_kv`] has it: `[key codes | value codes | key scales | value scales]`, a byte for
    /// each element and four for each scale, filled up to whole 16 bytes.
    pub fn quantized_row_bytes(&self) -> usize {
        (2 * self.kv_width() + 2 * self.kv_heads * size_of::<f32>()).next_multiple_of(16)
    }
    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// What a query row may see of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Every row.
    Full,
    /// Bottom-right aligned: of `m` queries over `n` rows, query `i` sees the first `n - m + i + 1`.
    Causal,
}

/// A run of key/value rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Which of the sources given to [`Backend::attention`].
    pub source: usize,
    /// Rows of that source.
    pub rows: Range<usize>,
    /// What the task's queries may see of them.
    pub mask: Mask,
}

/// One piece of attention: a run of query rows over a list of segments, as if those were concatenated.
/// One call takes the tasks of all hosts of a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionTask {
    /// Rows of `q`, and of the output.
    pub queries: Range<usize>,
    /// What they attend to. Empty rows ranges are allowed; a query that sees nothing gives output 0 and LSE -inf.
    pub segments: Vec<Segment>,
}

/// Keys and values of some rows: both `[rows, kv_heads * head_dim]`, keys after RoPE.
pub struct KvRef<'a, M> {
    /// Keys.
    pub k: &'a M,
    /// Values.
    pub v: &'a M,
}

/// Where each new row's key and value go.
pub struct KvMut<'a, M> {
    /// Keys.
    pub k: &'a mut M,
    /// Values.
    pub v: &'a mut M,
    /// Destination row of the first of them.
    pub first_row: usize,
}

/// What makes logits of the hidden state.
pub struct Head<'a, W> {
    /// Of the final RMSNorm.
    pub norm: &'a W,
    /// As in [`Backend::rms_norm`].
    pub epsilon: f32,
    /// The language-model head, `[vocab, hidden]`.
    pub weights: &'a W,
}

/// What is wanted of a row's logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// The logits themselves.
    Logits,
    /// A token by temperature, nucleus and draw, see [`Backend::next_tokens`].
    Token((f32, f32, f32)),
}

/// What came of a row's logits.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// `vocab` logits: they were wanted, the backend does not choose, or one of them is not finite.
    Logits(Vec<f32>),
    /// The token that was chosen.
    Token(u32),
}

/// A device that can run the layers. One value per rank; it owns its threads or its stream.
///
/// Operations are issued in order and may be asynchronous; only the methods that return host data wait for them.
pub trait Backend: Send + Sync {
    /// Activations, keys, values: `[rows, cols]` in the compute type.
    type Matrix: Send + Sync;
    /// f32 scores or log-sum-exps: `[rows, cols]`.
    type Scores: Send + Sync;
    /// Row numbers chosen by [`Backend::top_k`]: `[kv_heads, k]`, ascending in each row.
    type Rows: Send + Sync;
    /// A matrix of weights, in whatever form the device computes with fastest.
    type Weight: Send + Sync;

    /// Name for people: `cpu`, `cuda:0`.
    fn name(&self) -> String;

    /// Puts a weight on the device. Non-finite elements are an error (`Shape`, naming the element).
    fn weight(&self, view: WeightView<'_>) -> Result<Self::Weight, BackendError>;
    /// As [`Backend::weight`] for several matrices stacked by rows (q, k and v; gate and up).
    fn weight_stacked(&self, views: &[WeightView<'_>]) -> Result<Self::Weight, BackendError>;
    /// An activation matrix; contents undefined.
    fn matrix(&self, rows: usize, cols: usize) -> Result<Self::Matrix, BackendError>;
    /// A matrix to keep keys or values in for decode, `[rows, kv_heads * head_dim]`; contents undefined. A device may keep them in a smaller type than
    /// it computes with: [`Backend::rope_store`] and [`Backend::copy_rows`] write to such a matrix, [`Backend::attention`] reads it, nothing else does.
    fn kv_matrix(&self, shape: HeadShape, rows: usize) -> Result<Self::Matrix, BackendError> {
        self.matrix(rows, shape.kv_width())
    }
    /// A score matrix; contents undefined.
    fn scores(&self, rows: usize, cols: usize) -> Result<Self::Scores, BackendError>;

    /// `x[i] = table[ids[i]]`, into the first `ids.len()` rows.
    fn embed(&self, table: &Self::Weight, ids: &[u32], x: &mut Self::Matrix) -> Result<(), BackendError>;
    /// `out = x / rms(x) * w`, for the first `rows` rows; the mean of squares in f32.
    fn rms_norm(
        &self,
        rows: usize,
        x: &Self::Matrix,
        w: &Self::Weight,
        epsilon: f32,
        out: &mut Self::Matrix,
    ) -> Result<(), BackendError>;
    /// `out = x wᵀ (+ bias)`, or `out += …` if `accumulate` (the residual), for the first `rows` rows.
    fn linear(
        &self,
        rows: usize,
        x: &Self::Matrix,
        w: &Self::Weight,
        bias: Option<&Self::Weight>,
        accumulate: bool,
        out: &mut Self::Matrix,
    ) -> Result<(), BackendError>;
    /// `x += w_down · (silu(gate) * up)` with `[gate; up] = w_gate_up · h`, for the first `rows` rows, in chunks of rows so
    /// that no `[rows, 2 * width]` matrix is needed. `h` is the normed input.
    fn mlp(
        &self,
        rows: usize,
        h: &Self::Matrix,
        gate_up: &Self::Weight,
        down: &Self::Weight,
        x: &mut Self::Matrix,
    ) -> Result<(), BackendError>;
    /// What columns `part` of the width give of [`Backend::mlp`], in f32 and by itself: `out[first_row + i] = w_down[.., part] · (silu(gate) * up)` with
    /// rows `part` of gate and of up, for the first `rows` rows. Both ends of a part are multiples of [`PART_COLS`], or the width itself; an empty one
    /// gives zeros.
    #[allow(clippy::too_many_arguments)]
    fn mlp_part(
        &self,
        rows: usize,
        h: &Self::Matrix,
        gate_up: &Self::Weight,
        down: &Self::Weight,
        part: Range<usize>,
        out: &mut Self::Scores,
        first_row: usize,
    ) -> Result<(), BackendError>;
    /// `x[i] += partials[i] + partials[rows + i] + …` for the first `rows` rows, over `count` partial results that are stacked; summed in f32, in their order.
    fn add_partials(
        &self,
        rows: usize,
        count: usize,
        partials: &Self::Scores,
        x: &mut Self::Matrix,
    ) -> Result<(), BackendError>;

    /// Rotates q and k of rows `rows` of `qkv` in place (the half-split form of Hugging Face: element `i` pairs with
    /// `i + head_dim/2`) and copies the rotated keys and the values to `kv`. `positions[j]` belongs to row `rows.start + j`;
    /// `inv_freq` has `head_dim / 2` entries in radians per position; `scale` multiplies sine and cosine (yarn's attention factor).
    #[allow(clippy::too_many_arguments)]
    fn rope_store(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        qkv: &mut Self::Matrix,
        kv: KvMut<'_, Self::Matrix>,
    ) -> Result<(), BackendError>;

    /// As [`Backend::rope_store`] for the first rows of `qkv`, each of which belongs to another sequence: row `i` has `positions[i]`, and its key and value
    /// go to `places[i]`. What a batch of decodes needs; a device may well do it in one launch.
    fn rope_store_each(
        &self,
        shape: HeadShape,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        qkv: &mut Self::Matrix,
        places: Vec<KvMut<'_, Self::Matrix>>,
    ) -> Result<(), BackendError> {
        for (row, place) in places.into_iter().enumerate() {
            self.rope_store(shape, row..row + 1, &positions[row..=row], inv_freq, scale, qkv, place)?;
        }
        Ok(())
    }

    /// Retaining-head scores `out[h, i] = w2[h] · silu(w1 · qkv[i])` for the first `rows` rows, before RoPE: `out` is `[kv_heads, rows]`.
    fn retaining_scores(
        &self,
        rows: usize,
        qkv: &Self::Matrix,
        w1: &Self::Weight,
        w2: &Self::Weight,
        out: &mut Self::Scores,
    ) -> Result<(), BackendError>;
    /// Query-aware scores: `out[h, i]` is the mean over the query rows and the query heads of group `h` of `q · k`, both after
    /// RoPE, scaled by `1/sqrt(head_dim)`. Queries are rows `queries` of `q_qkv`; keys are rows `0..rows` of `k`.
    fn query_aware_scores(
        &self,
        shape: HeadShape,
        queries: Range<usize>,
        q_qkv: &Self::Matrix,
        rows: usize,
        k: &Self::Matrix,
        out: &mut Self::Scores,
    ) -> Result<(), BackendError>;
    /// Puts given scores (`[rows, cols]`, row-major) on the device; what random selection uses.
    fn set_scores(&self, values: &[f32], out: &mut Self::Scores) -> Result<(), BackendError>;
    /// For each KV head, the `k` best of the columns `candidates` after a max-pool of 5 over the sequence made of the columns
    /// `before` followed by `candidates` (a host's anchor and its local block); of equals the lowest column wins. Columns `excluded`
    /// (a prefix of `candidates`) take part in the pooling but are never chosen. `pool` = false leaves the pooling out.
    fn top_k(
        &self,
        scores: &Self::Scores,
        before: Range<usize>,
        candidates: Range<usize>,
        excluded: usize,
        k: usize,
        pool: bool,
    ) -> Result<Self::Rows, BackendError>;
    /// Copies the chosen rows: `dst[first_row + i, h] = src[chosen[h][i] - source_offset, h]` for keys and values. Rows
    /// are numbered as in the scores; `source_offset` is the score column of row 0 of `src`.
    fn gather_kv(
        &self,
        shape: HeadShape,
        chosen: &Self::Rows,
        source_offset: usize,
        src: KvRef<'_, Self::Matrix>,
        dst: KvMut<'_, Self::Matrix>,
    ) -> Result<(), BackendError>;

    /// Softmax attention of every task, scaled by `1/sqrt(head_dim)`; GQA. `q` is a packed qkv matrix or a `[_, heads * head_dim]` one (its
    /// first columns are the queries). Writes `out[row, head * head_dim ..]` and, if asked for, `lse[row, head]` (natural
    /// log) for the query rows of the tasks. Rows belong to at most one task.
    fn attention(
        &self,
        shape: HeadShape,
        q: &Self::Matrix,
        sources: &[KvRef<'_, Self::Matrix>],
        tasks: &[AttentionTask],
        out: &mut Self::Matrix,
        lse: Option<&mut Self::Scores>,
    ) -> Result<(), BackendError>;
    /// Merges a partial result into another over the first `rows` rows: `out = e^(lse - m) out + e^(lse_p - m) part`, normalised, and
    /// `lse = m + ln(…)`. `part_first_row` is where the partial's rows start in `part` and `part_lse`. Rows whose LSEs are both -inf stay 0.
    #[allow(clippy::too_many_arguments)]
    fn merge(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        out: &mut Self::Matrix,
        lse: &mut Self::Scores,
        part: &Self::Matrix,
        part_lse: &Self::Scores,
        part_first_row: usize,
    ) -> Result<(), BackendError>;

    /// Merges `count` partial results of the same `rows` query rows, which are stacked in `parts` and `part_lse` (partial `i` is
    /// rows `i * rows ..`), into the first `rows` rows of `out`, in the order of the stack: what the distributed query and
    /// decode need, once a layer and token. A backend may well do it in one kernel.
    fn merge_stacked(
        &self,
        shape: HeadShape,
        rows: usize,
        count: usize,
        parts: &Self::Matrix,
        part_lse: &Self::Scores,
        out: &mut Self::Matrix,
    ) -> Result<(), BackendError> {
        let mut lse = self.scores(rows, shape.heads)?;
        // A finite `out` with an LSE of -inf weighs nothing, so that the first merge is a copy.
        self.copy_rows(parts, 0, rows, out, 0)?;
        self.set_scores(&vec![f32::NEG_INFINITY; rows * shape.heads], &mut lse)?;
        for part in 0..count {
            self.merge(shape, 0..rows, out, &mut lse, parts, part_lse, part * rows)?;
        }
        Ok(())
    }

    /// `dst[dst_row + i] = src[src_row + i]` for `rows` rows.
    fn copy_rows(
        &self,
        src: &Self::Matrix,
        src_row: usize,
        rows: usize,
        dst: &mut Self::Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError>;
    /// Puts groups of columns below each other: `dst[dst_row + g * rows + i] = src[row + i, col + g * width ..]` for `groups` groups `g` and `rows`
    /// rows `i`, with `(row, col)` = `src_at` and `width` the columns of `dst`. Of queries, keys or values it makes rows by head, as they go from rank to rank.
    fn stack_columns(
        &self,
        src: &Self::Matrix,
        src_at: (usize, usize),
        rows: usize,
        groups: usize,
        dst: &mut Self::Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError>;
    /// The opposite: `dst[dst_row + i, g * width ..] = src[src_row + g * rows + i]`, with `width` the columns of `src`.
    fn unstack_columns(
        &self,
        src: &Self::Matrix,
        src_row: usize,
        rows: usize,
        groups: usize,
        dst: &mut Self::Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError>;
    /// A matrix for keys and values as [`Backend::quantize_kv`] has them; rows of [`HeadShape::quantized_row_bytes`], contents undefined.
    fn quantized_kv(&self, shape: HeadShape, rows: usize) -> Result<Self::Matrix, BackendError>;
    /// Quantises rows `row..row + rows` of keys and values to FP8 (e4m3, a scale for every row and KV head), into `out` from row `out_row` on: a
    /// matrix of [`Backend::quantized_kv`], which is good for [`Backend::restore_kv`] and to travel, and for nothing else.
    fn quantize_kv(
        &self,
        shape: HeadShape,
        kv: KvRef<'_, Self::Matrix>,
        row: usize,
        rows: usize,
        out: &mut Self::Matrix,
        out_row: usize,
    ) -> Result<(), BackendError>;
    /// The keys and values of rows `row..row + rows` again, to where `kv` says.
    fn restore_kv(
        &self,
        shape: HeadShape,
        from: &Self::Matrix,
        row: usize,
        rows: usize,
        kv: KvMut<'_, Self::Matrix>,
    ) -> Result<(), BackendError>;
    /// Final norm and the rows `part` of the language-model head, for the first `rows` rows of `x`: `out[first_row + i, j]` is the logit of token
    /// `part.start + j`. `out` has as many columns as the part has tokens.
    fn logits(
        &self,
        rows: usize,
        x: &Self::Matrix,
        head: &Head<'_, Self::Weight>,
        part: Range<usize>,
        out: &mut Self::Scores,
        first_row: usize,
    ) -> Result<(), BackendError>;
    /// Puts the columns of `count` parts side by side, for the first `rows` rows of `out`: `out[i, first + j] = parts[p * rows + i, j]`, where columns
    /// `first..` are [`even_part`] `p`. A column that two parts have is taken from the first of them.
    fn join_columns(
        &self,
        rows: usize,
        count: usize,
        parts: &Self::Scores,
        out: &mut Self::Scores,
    ) -> Result<(), BackendError>;
    /// For each of the first `wanted.len()` rows of logits what is wanted of it: the next tokens of a batch. A device that chooses brings no logits to the host for
    /// it. A choice is temperature, nucleus and draw: with temperature 0 the highest logit, of equals the lowest token. Otherwise weights are
    /// e^(logit / temperature); the nucleus are the most probable tokens, as few as hold that share of all weights, and all that equal the last of them; in the
    /// order of the tokens, the first at which the sum of the weights exceeds the draw (in 0..1) times that of the nucleus. Where a logit is not finite, or where
    /// this backend leaves the choice to its caller, the logits come instead.
    fn next_tokens(&self, logits: &Self::Scores, wanted: &[Wanted]) -> Result<Vec<Next>, BackendError>;

    /// Called between layers. A device that runs behind the host lets it get ahead by a few calls at most, so that a caller who
    /// is told of progress, or cancels, is not told long before the device has come there.
    fn pace(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Waits until everything issued has been done, and reports a device error if there was one.
    fn synchronize(&self) -> Result<(), BackendError>;
}
