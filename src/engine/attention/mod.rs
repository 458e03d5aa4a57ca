//! What a row may see during prefill.
//!
//! [`blocks`] is full, star and APB attention: every host sees its passing block, the anchor and its local block; they differ
//! in what the plan puts there. [`selection`] chooses what is passed on. [`ring`] is exact attention over rotating blocks.
//!
//! Invariant: the plan alone decides what is seen; the number of ranks changes the order of additions at most.

pub mod blocks;
pub mod ring;
pub mod selection;
