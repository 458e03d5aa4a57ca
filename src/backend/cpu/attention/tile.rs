//! One tile: the queries of a block that share a KV head, over a run of key blocks.
//!
//! Scores are in base 2: the queries are scaled by `log2(e) / sqrt(head_dim)` when they are packed.
//!
//! Invariant: row `i * group + g` of a tile is query `i` of the block and head `g` of the group.

use super::keys::{KEYS, KeyBlock};
use super::softmax::{Softmax, SoftmaxBlock};
use super::{Inputs, QueryBlock};
use crate::HeadShape;
use crate::cpu::vector::{blend, dispatch, few_rows_add, few_rows_transposed, scale};
use crate::cpu::view::{View, ViewMut, multiply_add, multiply_transposed};

/// Up to this many rows a tile is bound by reading keys and values, and computed without packing them.
const FEW_ROWS: usize = 8;

/// What a tile reads.
pub(super) struct Tile<'a> {
    pub inputs: Inputs<'a>,
    pub kv_head: usize,
    /// Row of `q` of the first query.
    pub first_row: usize,
    pub queries: usize,
}

/// Attention over some of the keys: outputs before they are divided by the sums of the softmax.
pub(super) struct Partial {
    softmax: Softmax,
    /// `[rows, head_dim]`.
    out: Vec<f32>,
}

impl Tile<'_> {
    /// Attention of the tile's queries over `keys`. `scratch` is grown as needed.
    pub fn attend(&self, keys: &[KeyBlock], scratch: &mut Vec<f32>) -> Partial {
        let (d, group) = (self.inputs.shape.head_dim, self.inputs.shape.group());
        let rows = self.queries * group;
        let needed = rows * (d + KEYS);
        scratch.resize(scratch.len().max(needed), 0.0);
        let (q, scores) = scratch[..needed].split_at_mut(rows * d);
        self.pack_queries(q);
        let q = View::new(q, rows, d, d);
        let mut partial = Partial { softmax: Softmax::new(rows), out: vec![0.0; rows * d] };
        for block in keys {
            let source = &self.inputs.sources[block.source];
            let head = self.kv_head * d..(self.kv_head + 1) * d;
            let k = View::of(source.k, block.rows.clone(), head.clone());
            let v = View::of(source.v, block.rows.clone(), head);
            let width = block.len();
            self.product_with_keys(q, k, ViewMut::new(scores, rows, width, KEYS));
            dispatch(SoftmaxBlock {
                scores: ViewMut::new(scores, rows, width, KEYS),
                block,
                group,
                state: &mut partial.softmax,
                out: ViewMut::new(&mut partial.out, rows, d, d),
            });
            self.product_with_values(
                View::new(scores, rows, width, KEYS),
                v,
                ViewMut::new(&mut partial.out, rows, d, d),
            );
        }
        partial
    }

    fn pack_queries(&self, packed: &mut [f32]) {
        let (d, group) = (self.inputs.shape.head_dim, self.inputs.shape.group());
        let head = self.kv_head * group * d;
        for (i, packed) in packed.chunks_mut(group * d).enumerate() {
            packed.copy_from_slice(&self.inputs.q.row(self.first_row + i)[head..head + group * d]);
        }
        scale(packed, std::f32::consts::LOG2_E / (d as f32).sqrt());
    }

    fn product_with_keys(&self, q: View<'_>, k: View<'_>, scores: ViewMut<'_>) {
        if q.rows <= FEW_ROWS {
            few_rows_transposed(q, k, scores, false);
        } else {
            multiply_transposed(q, k, scores, false);
        }
    }

    fn product_with_values(&self, p: View<'_>, v: View<'_>, out: ViewMut<'_>) {
        if p.rows <= FEW_ROWS {
            few_rows_add(p, v, out);
        } else {
            multiply_add(p, v, out);
        }
    }
}

impl Partial {
    /// Adds attention over other keys.
    pub fn absorb(&mut self, other: &Partial) {
        let rows = self.softmax.maximum.len();
        let d = self.out.len() / rows.max(1);
        for row in 0..rows {
            let (keep, add) = self.softmax.absorb(row, &other.softmax);
            let out = row * d..(row + 1) * d;
            blend(&mut self.out[out.clone()], keep, &other.out[out], add);
        }
    }

    /// Writes the results of one KV head. A query that saw nothing has output 0 and LSE -inf.
    pub fn store(&self, shape: HeadShape, kv_head: usize, block: &mut QueryBlock<'_>) {
        let (d, group) = (shape.head_dim, shape.group());
        for (row, part) in self.out.chunks(d).enumerate() {
            let (query, head) = (row / group, kv_head * group + row % group);
            let out = &mut block.out.row_mut(query)[head * d..(head + 1) * d];
            out.copy_from_slice(part);
            let sum = self.softmax.sum[row];
            scale(out, if sum == 0.0 { 0.0 } else { 1.0 / sum });
            if let Some(lse) = &mut block.lse {
                lse.row_mut(query)[head] = self.softmax.log_sum_exp(row);
            }
        }
    }
}
