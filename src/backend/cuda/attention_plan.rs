//! How an attention call is cut into pieces of work; the layout in memory that kernels/attention/plan.h describes.
//!
//! Invariant: every query row of every task belongs to exactly one row tile, and every key tile a row tile sees to exactly one of its pieces.

use std::cmp::Reverse;

use crate::{AttentionTask, Mask};

/// A row tile's and a key tile's size, and how far a row tile's keys may be split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    /// Rows of a row tile: queries, or queries times heads of a group where `group` is more than 1.
    pub rows: usize,
    /// Rows of a key tile.
    pub keys: usize,
    /// Query heads packed into a row tile.
    pub group: usize,
    /// How far a row tile's keys are split.
    pub splitting: Splitting,
    /// Key tiles of a piece at least, where keys are split.
    pub least_tiles: usize,
}

/// Into how many pieces keys are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Splitting {
    Never,
    /// All row tiles into so many pieces, which keep the device busy, if there are fewer row tiles.
    Together(usize),
    /// Each row tile into so many, whatever others there are: its result hangs on its own keys alone.
    Alone(usize),
}

/// Records of a launch, as words; see `Task`, `Segment`, `Work` and `Merge` in plan.h.
#[derive(Debug, Default)]
pub(super) struct WorkList {
    pub tasks: Vec<[i32; 4]>,
    pub segments: Vec<[i32; 5]>,
    pub works: Vec<[i32; 5]>,
    pub merges: Vec<[i32; 4]>,
    /// Partial results.
    pub slots: usize,
    /// Packed rows at most of a row tile whose keys are split.
    pub merged_rows: usize,
    /// Distinct key/value ranges, in the order of their numbers: `(source, first row, rows)`.
    pub maps: Vec<(usize, usize, usize)>,
}

/// A row tile with the number of key tiles it sees.
struct RowTile {
    task: usize,
    first_row: usize,
    rows: usize,
    tiles: usize,
}

impl WorkList {
    /// Cuts `tasks`. Those with the longest row tiles come first, so that what ends last is short; the pieces of a task stay together, since they
    /// read the same keys and values at about the same time.
    pub fn new<'a>(tasks: impl IntoIterator<Item = &'a AttentionTask>, tiling: &Tiling) -> Self {
        let mut list = Self::default();
        let mut row_tiles = Vec::new();
        let mut longest = Vec::new();
        for task in tasks {
            list.add(task);
            let first = row_tiles.len();
            row_tiles.extend(row_tiles_of(list.tasks.len() - 1, task, tiling));
            longest.push(row_tiles[first..].iter().map(|row_tile| row_tile.tiles).max().unwrap_or(0));
        }
        let together = tiles_of_a_piece(&row_tiles, tiling);
        for row_tile in &row_tiles {
            let most = match tiling.splitting {
                Splitting::Alone(_) => tiles_of_a_piece(std::slice::from_ref(row_tile), tiling),
                _ => together,
            };
            list.split(row_tile, most);
        }
        list.works.sort_by_key(|&[task, _, _, tiles, _]| (Reverse(longest[task as usize]), task, Reverse(tiles)));
        list
    }

    fn add(&mut self, task: &AttentionTask) {
        let first_segment = self.segments.len();
        for segment in task.segments.iter().filter(|segment| !segment.rows.is_empty()) {
            let range = (segment.source, segment.rows.start, segment.rows.len());
            let map = self.maps.iter().position(|known| *known == range).unwrap_or_else(|| {
                self.maps.push(range);
                self.maps.len() - 1
            });
            let causal = usize::from(segment.mask == Mask::Causal);
            self.segments.push([range.0, range.1, range.2, causal, map].map(word));
        }
        let segments = self.segments.len() - first_segment;
        self.tasks.push([task.queries.start, task.queries.len(), first_segment, segments].map(word));
    }

    fn split(&mut self, row_tile: &RowTile, most: usize) {
        let &RowTile { task, first_row, rows, tiles } = row_tile;
        let pieces = tiles.div_ceil(most).max(1);
        if pieces == 1 {
            self.works.push([word(task), word(first_row), 0, word(tiles), -1]);
            return;
        }
        for piece in 0..pieces {
            let (from, to) = (tiles * piece / pieces, tiles * (piece + 1) / pieces);
            self.works.push([task, first_row, from, to - from, self.slots + piece].map(word));
        }
        self.merges.push([task, first_row, self.slots, pieces].map(word));
        self.slots += pieces;
        self.merged_rows = self.merged_rows.max(rows);
    }
}

/// Kernels count in 32 bits; the wrapper has checked that rows fit.
fn word(value: usize) -> i32 {
    value as i32
}

/// Rows of a segment that query `i` of `queries` sees.
fn visible(rows: usize, mask: Mask, queries: usize, i: usize) -> usize {
    match mask {
        Mask::Full => rows,
        Mask::Causal => (rows + i + 1).saturating_sub(queries).min(rows),
    }
}

fn row_tiles_of(index: usize, task: &AttentionTask, tiling: &Tiling) -> impl Iterator<Item = RowTile> {
    let queries = task.queries.len();
    (0..queries * tiling.group).step_by(tiling.rows).map(move |first_row| {
        let last = ((first_row + tiling.rows - 1) / tiling.group).min(queries - 1);
        let seen = task.segments.iter().map(|s| visible(s.rows.len(), s.mask, queries, last).div_ceil(tiling.keys));
        let rows = tiling.rows.min(queries * tiling.group - first_row);
        RowTile { task: index, first_row, rows, tiles: seen.sum() }
    })
}

/// Key tiles of a piece at most: as few as give all the pieces that are wanted, and not one more, since a piece too many is a second wave.
fn tiles_of_a_piece(row_tiles: &[RowTile], tiling: &Tiling) -> usize {
    let (Splitting::Together(wanted) | Splitting::Alone(wanted)) = tiling.splitting else {
        return usize::MAX;
    };
    let longest = row_tiles.iter().map(|row_tile| row_tile.tiles).max().unwrap_or(0).max(1);
    let pieces = |most: usize| row_tiles.iter().map(|row_tile| row_tile.tiles.div_ceil(most).max(1)).sum::<usize>();
    if wanted <= row_tiles.len() {
        return longest;
    }
    let total: usize = row_tiles.iter().map(|row_tile| row_tile.tiles).sum();
    let mut most = total.div_ceil(wanted).max(tiling.least_tiles);
    while most < longest && pieces(most) > wanted {
        most += most.div_ceil(64);
    }
    most.min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Segment;
    use proptest::prelude::*;

    fn tasks() -> impl Strategy<Value = Vec<AttentionTask>> {
        let segment = (0..3usize, 0..50usize, 0..700usize, any::<bool>()).prop_map(|(source, first, rows, causal)| {
            Segment { source, rows: first..first + rows, mask: if causal { Mask::Causal } else { Mask::Full } }
        });
        let task = (1..300usize, proptest::collection::vec(segment, 0..5));
        proptest::collection::vec(task, 1..6).prop_map(|tasks| {
            let mut first = 0;
            let mut place = |(queries, segments): (usize, Vec<Segment>)| {
                first += queries;
                AttentionTask { queries: first - queries..first, segments }
            };
            tasks.into_iter().map(&mut place).collect()
        })
    }

    fn tiling() -> impl Strategy<Value = Tiling> {
        let splitting = prop_oneof![
            Just(Splitting::Never),
            (0..300usize).prop_map(Splitting::Together),
            (0..40usize).prop_map(Splitting::Alone)
        ];
        (prop_oneof![Just(16usize), Just(64), Just(128)], 1..5usize, splitting, 1..9usize)
            .prop_map(|(rows, group, splitting, least_tiles)| Tiling { rows, keys: 32, group, splitting, least_tiles })
    }

    proptest! {
        #[test]
        fn each_row_tile_is_worked_on_once_over_all_its_keys(tasks in tasks(), tiling in tiling()) {
            let list = WorkList::new(&tasks, &tiling);
            for (index, task) in tasks.iter().enumerate() {
                for row_tile in row_tiles_of(index, task, &tiling) {
                    let at = [word(index), word(row_tile.first_row)];
                    let mut pieces: Vec<_> = list.works.iter().filter(|work| work[..2] == at).collect();
                    pieces.sort_by_key(|work| work[2]);
                    let mut next = 0;
                    for piece in &pieces {
                        prop_assert_eq!(piece[2], next);
                        next += piece[3];
                    }
                    prop_assert_eq!(next, word(row_tile.tiles));
                    let merges: Vec<_> = list.merges.iter().filter(|merge| merge[..2] == at).collect();
                    prop_assert_eq!(merges.len(), usize::from(pieces.len() > 1));
                    prop_assert!(pieces.len() > 1 || pieces[0][4] == -1);
                    for merge in merges {
                        let slots: Vec<_> = pieces.iter().map(|piece| piece[4]).collect();
                        prop_assert_eq!(slots, (merge[2]..merge[2] + merge[3]).collect::<Vec<_>>());
                    }
                }
            }
        }

        #[test]
        fn there_are_no_more_pieces_than_wanted_or_than_row_tiles(tasks in tasks(), tiling in tiling()) {
            let list = WorkList::new(&tasks, &tiling);
            let row_tiles: usize = tasks.iter().enumerate().map(|(i, task)| row_tiles_of(i, task, &tiling).count()).sum();
            let most = match tiling.splitting {
                Splitting::Never => row_tiles,
                Splitting::Together(wanted) => wanted.max(row_tiles),
                Splitting::Alone(wanted) => wanted.max(1) * row_tiles,
            };
            prop_assert!(list.works.len() <= most);
        }

        #[test]
        fn a_task_that_is_split_alone_is_split_the_same_among_others(tasks in tasks(), wanted in 0..40usize) {
            let tiling = Tiling { rows: 16, keys: 32, group: 4, splitting: Splitting::Alone(wanted), least_tiles: 2 };
            let among_others = WorkList::new(&tasks, &tiling);
            for (index, task) in tasks.iter().enumerate() {
                let pieces = |list: &WorkList, of: usize| {
                    let own = list.works.iter().filter(|work| work[0] == word(of));
                    let mut own: Vec<_> = own.map(|&[_, row, first, tiles, _]| (row, first, tiles)).collect();
                    own.sort_unstable();
                    own
                };
                prop_assert_eq!(pieces(&among_others, index), pieces(&WorkList::new([task], &tiling), 0));
            }
        }
    }

    #[test]
    fn a_long_cache_is_split_over_the_whole_device() {
        let task =
            AttentionTask { queries: 0..1, segments: vec![Segment { source: 0, rows: 0..131072, mask: Mask::Full }] };
        for splitting in [Splitting::Together(16), Splitting::Alone(16)] {
            let tiling = Tiling { rows: 16, keys: 32, group: 4, splitting, least_tiles: 8 };
            let list = WorkList::new([&task], &tiling);
            assert_eq!((list.works.len(), list.slots, list.merges.len(), list.merged_rows), (16, 16, 1, 4));
        }
    }
}
