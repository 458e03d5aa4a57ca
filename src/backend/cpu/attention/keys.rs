//! Which keys a block of queries sees, in blocks.
//!
//! Invariant: keys that no query of the block sees are in no key block.

use std::ops::Range;

use super::visible;
use crate::{AttentionTask, Mask};

/// Keys of a block: with [`super::TILE_ROWS`] rows, a block of scores stays in the second-level cache.
pub(super) const KEYS: usize = 256;

/// A run of key rows of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyBlock {
    pub source: usize,
    pub rows: Range<usize>,
    /// How many of them the first query of the block sees, each later one seeing one more; absent if all see all.
    seen_by_first: Option<isize>,
}

impl KeyBlock {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// How many of the keys query `i` of the block sees.
    pub fn visible(&self, i: usize) -> usize {
        match self.seen_by_first {
            Some(seen) => (seen + i as isize).clamp(0, self.len() as isize) as usize,
            None => self.len(),
        }
    }
}

/// The keys seen by queries `first..first + count` of a task, in order.
pub(super) fn key_blocks(task: &AttentionTask, first: usize, count: usize) -> Vec<KeyBlock> {
    let mut blocks = Vec::new();
    let queries = task.queries.len();
    for segment in &task.segments {
        let keys = segment.rows.len();
        let seen_by_last = visible(segment.mask, queries, keys, first + count - 1).max(0) as usize;
        for key in (0..seen_by_last).step_by(KEYS) {
            let start = segment.rows.start + key;
            let seen_by_first = visible(segment.mask, queries, keys, first) - key as isize;
            blocks.push(KeyBlock {
                source: segment.source,
                rows: start..start + KEYS.min(seen_by_last - key),
                seen_by_first: (segment.mask == Mask::Causal).then_some(seen_by_first),
            });
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::key_blocks;
    use crate::cpu::attention::visible;
    use crate::{AttentionTask, Mask, Segment};

    proptest! {
        #[test]
        fn every_query_sees_what_its_mask_lets_it_see(
            queries in 1usize..40, keys in 0usize..600, causal: bool, start in 0usize..9, cut in 0usize..40, count in 1usize..40,
        ) {
            let mask = if causal { Mask::Causal } else { Mask::Full };
            let first = cut % queries;
            let count = count.min(queries - first);
            let segments = vec![Segment { source: 3, rows: start..start + keys, mask }];
            let task = AttentionTask { queries: 5..5 + queries, segments };
            let blocks = key_blocks(&task, first, count);
            for i in 0..count {
                let seen: Vec<usize> = blocks.iter().flat_map(|block| block.rows.clone().take(block.visible(i))).collect();
                let wanted = visible(mask, queries, keys, first + i).clamp(0, keys as isize) as usize;
                prop_assert_eq!(seen, (start..start + wanted).collect::<Vec<_>>());
            }
        }
    }
}
