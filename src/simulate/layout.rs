//! How the devices of a pool are cut into groups.
//!
//! Invariant: the groups of a layout use every device once; they are sorted by size, the largest first.

use std::fmt;

/// Sizes of the groups.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Devices of each group, descending.
    pub groups: Vec<usize>,
}

/// Devices up to which every cut into powers of two is tried.
const ALL_CUTS_UP_TO: usize = 16;

impl Layout {
    /// Groups of the given sizes.
    pub fn new(mut groups: Vec<usize>) -> Self {
        groups.sort_unstable_by(|one, other| other.cmp(one));
        Self { groups }
    }

    /// Devices in all.
    pub fn devices(&self) -> usize {
        self.groups.iter().sum()
    }

    /// The same cut on each of `nodes` nodes.
    fn on_nodes(&self, nodes: usize) -> Self {
        Self::new((0..nodes).flat_map(|_| self.groups.iter().copied()).collect())
    }

    /// Sizes that occur, descending, and how often.
    pub fn sizes(&self) -> Vec<(usize, usize)> {
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        for group in &self.groups {
            match sizes.last_mut().filter(|(size, _)| size == group) {
                Some((_, count)) => *count += 1,
                None => sizes.push((*group, 1)),
            }
        }
        sizes
    }
}

impl fmt::Display for Layout {
    /// Count and size of the groups: `2x4`, `1x4+4x1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<_> = self.sizes().into_iter().map(|(size, count)| format!("{count}x{size}")).collect();
        f.write_str(&sizes.join("+"))
    }
}

/// Cuts worth trying of `nodes` nodes with `per_node` devices: of a node into groups of a power of two (or all of it), the same on every node; and groups
/// of several whole nodes.
pub fn layouts(per_node: usize, nodes: usize) -> Vec<Layout> {
    let cuts = if per_node <= ALL_CUTS_UP_TO { cuts(per_node, per_node) } else { even_cuts(per_node) };
    let mut layouts: Vec<Layout> = cuts.into_iter().map(|cut| Layout::new(cut).on_nodes(nodes)).collect();
    let several = (1..=nodes).filter(|of_group| *of_group > 1 && nodes.is_multiple_of(*of_group));
    layouts.extend(several.map(|of_group| Layout::new(vec![of_group * per_node; nodes / of_group])));
    layouts
}

/// Groups of one size each.
fn even_cuts(devices: usize) -> Vec<Vec<usize>> {
    (1..=devices).filter(|size| devices.is_multiple_of(*size)).map(|size| vec![size; devices / size]).collect()
}

/// All cuts of `devices` into powers of two of at most `largest`, and the whole.
fn cuts(devices: usize, largest: usize) -> Vec<Vec<usize>> {
    if devices == 0 {
        return vec![Vec::new()];
    }
    let sizes = (1..=devices.min(largest)).rev().filter(|size| size.is_power_of_two() || *size == devices);
    let with = |size: usize| {
        cuts(devices - size, size).into_iter().map(move |mut rest| {
            rest.insert(0, size);
            rest
        })
    };
    sizes.flat_map(with).collect()
}
