//! What a request leaves open: mode, hosts, anchor and passing length, by the length of the context and the number of hosts.
//!
//! Invariant: no default hangs on ranks, and all agree with the paper's table, which is for 8 hosts: 32K 1K/0.5K, 64K 2K/1K, 128K 4K/2K, 256K 8K/4K,
//! 512K 8K/8K (anchor/passing).

use super::AttentionMode;

/// Hosts of the paper's table.
const HOSTS: usize = 8;
/// The longest local block of the table.
const LONGEST_BLOCK: usize = 64 * 1024;

/// Below this many tokens exact attention costs little, and is what `auto` picks.
const FULL_BELOW: usize = 8 * 1024;
/// The longest anchor of the table, and the longest compressed block.
const LONGEST: usize = 8 * 1024;

/// What `auto` picks for a context of `n` tokens.
pub(super) fn mode(n: usize) -> AttentionMode {
    if n < FULL_BELOW { AttentionMode::Full } else { AttentionMode::Apb }
}

/// Hosts of a plan whose request names none: those of the table, and as many more as keep local blocks as short as there.
pub fn hosts(n: usize) -> usize {
    HOSTS.max(n.div_ceil(LONGEST_BLOCK))
}

/// Anchor length of the paper's table, between its rows in proportion to `n`.
pub(super) fn anchor(n: usize) -> usize {
    n.div_ceil(32).min(LONGEST)
}

/// Passing length of the paper's table, between its rows in proportion to `n`. More hosts than the table's pass on as much together: the same share
/// of their shorter blocks.
pub(super) fn passing(n: usize, hosts: usize) -> usize {
    let of_table = n.div_ceil(64).min(LONGEST);
    (of_table * HOSTS).div_ceil(hosts.max(HOSTS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_papers_table() {
        const K: usize = 1024;
        let table = [(32, K, K / 2), (64, 2 * K, K), (128, 4 * K, 2 * K), (256, 8 * K, 4 * K), (512, 8 * K, 8 * K)];
        for (n, anchor_length, passing_length) in table {
            assert_eq!((hosts(n * K), anchor(n * K), passing(n * K, 8)), (8, anchor_length, passing_length), "{n}K");
        }
    }

    #[test]
    fn contexts_longer_than_the_tables_have_more_hosts_and_no_longer_blocks() {
        const M: usize = 1024 * 1024;
        assert_eq!([M / 2, M / 2 + 1, M, 2 * M].map(hosts), [8, 9, 16, 32]);
    }

    #[test]
    fn more_hosts_pass_on_as_much_together_and_fewer_no_more_each() {
        let passed = |hosts| passing(1024 * 1024, hosts);
        assert_eq!([1, 2, 8, 16, 32, 64].map(passed), [8192, 8192, 8192, 4096, 2048, 1024]);
    }

    #[test]
    fn auto_is_full_for_short_contexts_only() {
        assert_eq!(mode(8 * 1024 - 1), AttentionMode::Full);
        assert_eq!(mode(8 * 1024), AttentionMode::Apb);
    }
}
