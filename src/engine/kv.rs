//! What a rank keeps of a prefill: keys and values of its local blocks, in every layer.
//!
//! Invariant: rows are in the order of the document; neither anchor nor passing block is ever in here. The rank of the last
//! host, and it alone, has room for the query and for what is generated.

use crate::backend::{Backend, BackendError};
use crate::model::ModelSpec;
use crate::plan::{PrefillPlan, RankLayout};

use super::rank::KeyValues;

/// Keys and values of one rank.
pub(super) struct KvCache<B: Backend> {
    /// One a layer.
    pub layers: Vec<KeyValues<B::Matrix>>,
    /// Rows of the local blocks; the tail follows them.
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
        let (local, tail) = (layout.local_rows().len(), if has_last { plan.cache_tail(new_tokens) } else { 0 });
        let layer = |_| KeyValues::new(backend, spec.shape, local + tail);
        Ok(Self { layers: (0..spec.layers).map(layer).collect::<Result<_, _>>()?, local, tail })
    }
}
