//! Keys and values: of the rows at hand, on their way between ranks, and those a rank keeps of a prefill.
//!
//! Invariant: the rows a rank keeps are in the order of the document, though perhaps not all of a stretch of it; neither anchor nor passing block is ever among them. The
//! rank of the last host, and it alone, has room for the query and for what is generated.

use crate::backend::{Backend, BackendError, HeadShape, KvMut, KvRef, Mask, Segment};
use crate::comm::{Comm, CommError};
use crate::model::ModelSpec;
use crate::plan::{PrefillPlan, RankLayout};

/// Keys (after RoPE) and values of some rows, `[rows, kv_heads * head_dim]` each.
pub(super) struct KeyValues<M> {
    k: M,
    v: M,
}

impl<M> KeyValues<M> {
    /// Contents undefined; at least one row, because a device may not know empty matrices.
    pub fn new<B: Backend<Matrix = M>>(backend: &B, shape: HeadShape, rows: usize) -> Result<Self, BackendError> {
        let (rows, cols) = (rows.max(1), shape.kv_width());
        Ok(Self { k: backend.matrix(rows, cols)?, v: backend.matrix(rows, cols)? })
    }

    /// As [`new`](Self::new), to be kept for decode.
    pub fn kept<B: Backend<Matrix = M>>(backend: &B, shape: HeadShape, rows: usize) -> Result<Self, BackendError> {
        let rows = rows.max(1);
        Ok(Self { k: backend.kv_matrix(shape, rows)?, v: backend.kv_matrix(shape, rows)? })
    }

    /// The keys alone.
    pub fn keys(&self) -> &M {
        &self.k
    }

    /// All rows, for attention.
    pub fn view(&self) -> KvRef<'_, M> {
        KvRef { k: &self.k, v: &self.v }
    }

    /// A place for new rows.
    pub fn at(&mut self, first_row: usize) -> KvMut<'_, M> {
        KvMut { k: &mut self.k, v: &mut self.v, first_row }
    }

    /// `self[row + i] = source[source_row + i]` for `rows` rows.
    pub fn copy_from<B: Backend<Matrix = M>>(
        &mut self,
        backend: &B,
        row: usize,
        source: &Self,
        source_row: usize,
        rows: usize,
    ) -> Result<(), BackendError> {
        backend.copy_rows(&source.k, source_row, rows, &mut self.k, row)?;
        backend.copy_rows(&source.v, source_row, rows, &mut self.v, row)
    }

    /// Starts [`Comm::all_gather`] of both.
    pub fn all_gather<S, C: Comm<M, S>>(self, comm: &C, counts: &[usize]) -> Result<C::Pending<2>, CommError> {
        comm.all_gather([self.k, self.v], counts)
    }

    /// Starts [`Comm::rotate`] of both: the first `send_rows` rows go, `receive_rows` come to `receive`.
    pub fn rotate<S, C: Comm<M, S>>(
        self,
        comm: &C,
        send_rows: usize,
        receive: Self,
        receive_rows: usize,
    ) -> Result<C::Exchange<2>, CommError> {
        comm.rotate([self.k, self.v], send_rows, [receive.k, receive.v], receive_rows)
    }

    /// Awaits a [`rotate`](Self::rotate): what was sent (contents undefined), and what has come.
    pub fn exchanged<S, C: Comm<M, S>>(comm: &C, moving: C::Exchange<2>) -> Result<(Self, Self), CommError> {
        let both = comm.finish_all_to_all(moving)?;
        let [sent, received] = <[_; 2]>::from(both).map(|[k, v]| Self { k, v });
        Ok((sent, received))
    }

    /// Awaits an [`all_gather`](Self::all_gather).
    pub fn arrived<S, C: Comm<M, S>>(comm: &C, moving: C::Pending<2>) -> Result<Self, CommError> {
        let [k, v] = comm.finish(moving)?;
        Ok(Self { k, v })
    }
}

/// Keys and values that one rank keeps.
pub(super) struct KvCache<B: Backend> {
    /// One a layer.
    pub layers: Vec<KeyValues<B::Matrix>>,
    /// Rows of the local blocks, or of what is kept of them; the tail follows them.
    pub local: usize,
    /// Rows for query and generated tokens: 0 but on the rank of the last host.
    pub tail: usize,
}

impl<B: Backend> KvCache<B> {
    /// Room for the rank's local blocks, and for the tail if it has the last host.
    pub fn new(
        backend: &B,
        spec: &ModelSpec,
        plan: &PrefillPlan,
        layout: &RankLayout,
        new_tokens: usize,
    ) -> Result<Self, BackendError> {
        let has_last = layout.hosts.contains(&(plan.hosts.len() - 1));
        let local = layout.hosts.iter().map(|host| plan.hosts[*host].kept_rows()).sum();
        let (local, tail) = (local, if has_last { plan.cache_tail(new_tokens) } else { 0 });
        let layer = |_| KeyValues::kept(backend, spec.shape, local + tail);
        Ok(Self { layers: (0..spec.layers).map(layer).collect::<Result<_, _>>()?, local, tail })
    }

    /// What `rows` new rows see, in source `source`, that come after `stored` others since the prefill: the local blocks, and, where they are kept,
    /// themselves and those.
    pub fn segments(&self, source: usize, stored: usize, rows: usize) -> Vec<Segment> {
        let mut segments = vec![Segment { source, rows: 0..self.local, mask: Mask::Full }];
        if self.tail > 0 {
            segments.push(Segment { source, rows: self.local..self.local + stored + rows, mask: Mask::Causal });
        }
        segments
    }

    /// Where a layer's keys and values of the token go that comes after `stored` others since the prefill.
    pub fn tail_at(&mut self, layer: usize, stored: usize) -> KvMut<'_, B::Matrix> {
        let first_row = self.local + stored;
        self.layers[layer].at(first_row)
    }
}
