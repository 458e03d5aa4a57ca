//! Attention over lists of segments: every kernel family, odd sizes, tails, empty segments, queries that see nothing.

use apbd::backend::cuda::{AttentionPath, Cuda, CudaMatrix};
use apbd::backend::{AttentionTask, Backend, HeadShape, KvRef, Mask, Segment};

use super::values::{Steps, Values, judge, poisoned, poisoned_scores};
use super::{Test, open};

pub const TESTS: &[Test] = &[
    ("attention_of_few_queries", few_queries),
    ("attention_of_chunks_of_queries", chunks),
    ("attention_of_many_queries", many_queries),
    ("attention_of_many_queries_on_every_architecture", portable),
    ("attention_over_a_long_cache_is_split_and_combined", long_cache),
    ("attention_of_hosts_over_passing_anchor_and_local_blocks", hosts),
    ("attention_is_the_same_every_time", repeats),
];

const OUT_OF_REACH: usize = 3;

/// An attention call.
pub struct Case {
    pub shape: HeadShape,
    /// Rows of each source.
    pub sources: Vec<usize>,
    pub tasks: Vec<AttentionTask>,
}

pub fn segment(source: usize, rows: std::ops::Range<usize>, mask: Mask) -> Segment {
    Segment { source, rows, mask }
}

pub fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

/// Output and log-sum-exp of the queries of all tasks, in their order, by definition.
fn reference(case: &Case, q: &Values, kv: &[(Values, Values)], steps: Steps) -> (Values, Values) {
    let HeadShape { heads, head_dim, .. } = case.shape;
    let (group, scale) = (case.shape.group(), 1.0 / (head_dim as f64).sqrt());
    let rows: Vec<(usize, &AttentionTask, usize)> = case
        .tasks
        .iter()
        .flat_map(|task| task.queries.clone().enumerate().map(move |(i, row)| (row, task, i)))
        .collect();
    let mut out = Values::from_fn(rows.len(), heads * head_dim, |_, _| 0.0);
    let mut lse = Values::from_fn(rows.len(), heads, |_, _| f64::NEG_INFINITY);
    for (at, (row, task, i)) in rows.into_iter().enumerate() {
        for head in 0..heads {
            let query = &q.row(row)[head * head_dim..(head + 1) * head_dim];
            let columns = (head / group) * head_dim..(head / group + 1) * head_dim;
            let mut seen: Vec<(f64, &[f64])> = Vec::new();
            for part in &task.segments {
                let visible = match part.mask {
                    Mask::Full => part.rows.len(),
                    Mask::Causal => (part.rows.len() + i + 1).saturating_sub(task.queries.len()).min(part.rows.len()),
                };
                let (k, v) = &kv[part.source];
                for key in part.rows.start..part.rows.start + visible {
                    let dot: f64 = query.iter().zip(&k.row(key)[columns.clone()]).map(|(a, b)| a * b).sum();
                    seen.push((steps.of(steps.of(dot) * scale), &v.row(key)[columns.clone()]));
                }
            }
            let most = seen.iter().map(|(score, _)| *score).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = seen.iter().map(|(score, _)| (score - most).exp()).sum();
            if seen.is_empty() {
                continue;
            }
            lse.data[at * heads + head] = most + sum.ln();
            for d in 0..head_dim {
                let value: f64 = seen.iter().map(|(score, v)| steps.of((score - most).exp() / sum) * v[d]).sum();
                out.data[at * heads * head_dim + head * head_dim + d] = steps.of(value);
            }
        }
    }
    (out, lse)
}

fn check(cuda: &Cuda, name: &str, case: &Case) {
    check_kept(cuda, name, case, &|values| values.matrix(cuda), &Values::clone);
}

/// Over keys and values that `place` brings to the device and that attention sees as `seen`.
pub fn check_kept(
    cuda: &Cuda,
    name: &str,
    case: &Case,
    place: &dyn Fn(&Values) -> CudaMatrix,
    seen: &dyn Fn(&Values) -> Values,
) {
    let rows = case.tasks.iter().map(|task| task.queries.end).max().unwrap() + OUT_OF_REACH;
    let width = case.shape.q_width();
    // The queries are the first columns of packed rows.
    let q = Values::random(1, rows, case.shape.qkv_width(), 2.0);
    let kv: Vec<(Values, Values)> = (0u64..)
        .zip(&case.sources)
        .map(|(i, rows)| {
            (
                Values::random(10 + i, *rows, case.shape.kv_width(), 2.0),
                Values::random(20 + i, *rows, case.shape.kv_width(), 1.0),
            )
        })
        .collect();
    let device: Vec<_> = kv.iter().map(|(k, v)| (place(k), place(v))).collect();
    let kv: Vec<_> = kv.iter().map(|(k, v)| (seen(k), seen(v))).collect();
    let sources: Vec<_> = device.iter().map(|(k, v)| KvRef { k, v }).collect();
    let (mut out, mut lse) = (poisoned(cuda, rows, width), poisoned_scores(cuda, rows, case.shape.heads));
    cuda.attention(case.shape, &q.matrix(cuda), &sources, &case.tasks, &mut out, Some(&mut lse)).unwrap();
    let (out, lse) = (Values::read(cuda, &out, rows, width), Values::read_scores(cuda, &lse, rows, case.shape.heads));
    let touched: Vec<usize> = case.tasks.iter().flat_map(|task| task.queries.clone()).collect();
    for row in (0..rows).filter(|row| !touched.contains(row)) {
        assert!(
            out.row(row).iter().all(|value| value.is_nan()),
            "{name}: row {row} belongs to no task and was written"
        );
        assert!(
            lse.row(row).iter().all(|value| value.is_nan()),
            "{name}: LSE of row {row} belongs to no task and was written"
        );
    }
    let pick = |of: &Values| Values::from_fn(touched.len(), of.cols, |i, col| of.at(touched[i], col));
    judge(name, &pick(&out), |steps| reference(case, &q, &kv, steps).0, 1e-3);
    let exact = reference(case, &q, &kv, Steps::Exact).1;
    for (got, exact) in pick(&lse).data.iter().zip(&exact.data) {
        assert!(got == exact || (got - exact).abs() < 2e-3, "{name}: LSE {got}, it should be {exact}");
    }
}

/// All head sizes and group sizes of interest.
pub fn shapes() -> [HeadShape; 6] {
    [shape(4, 4, 16), shape(6, 2, 32), shape(8, 2, 64), shape(4, 1, 128), shape(8, 1, 128), shape(5, 5, 128)]
}

pub fn one_task(shape: HeadShape, queries: std::ops::Range<usize>, segments: Vec<Segment>) -> Case {
    let rows = segments.iter().map(|segment| segment.rows.end).max().unwrap_or(1).max(1);
    Case { shape, sources: vec![rows, rows], tasks: vec![AttentionTask { queries, segments }] }
}

fn few_queries(cuda: &Cuda) {
    for shape in shapes() {
        check(cuda, &format!("{shape:?} one key"), &one_task(shape, 0..1, vec![segment(0, 0..1, Mask::Full)]));
        check(cuda, &format!("{shape:?} 77 keys"), &one_task(shape, 2..3, vec![segment(0, 0..77, Mask::Full)]));
        let segments =
            vec![segment(0, 3..103, Mask::Full), segment(1, 0..0, Mask::Full), segment(1, 5..38, Mask::Causal)];
        check(cuda, &format!("{shape:?} two queries, three segments"), &one_task(shape, 0..2, segments));
        check(cuda, &format!("{shape:?} nothing to see"), &one_task(shape, 1..2, vec![]));
    }
}

fn chunks(cuda: &Cuda) {
    for shape in shapes() {
        for queries in [17, 33, 64, 100] {
            let segments = vec![segment(0, 0..150, Mask::Full), segment(1, 1..130, Mask::Causal)];
            check(cuda, &format!("{shape:?} {queries} queries"), &one_task(shape, 0..queries, segments));
        }
        // The first queries see nothing at all.
        check(
            cuda,
            &format!("{shape:?} more queries than keys"),
            &one_task(shape, 0..40, vec![segment(0, 0..25, Mask::Causal)]),
        );
    }
}

fn many_cases() -> Vec<(String, Case)> {
    let mut cases = Vec::new();
    for shape in [shape(2, 2, 16), shape(4, 2, 32), shape(4, 2, 64), shape(4, 1, 128)] {
        for queries in [128, 200, 321] {
            let causal = vec![segment(0, 0..queries, Mask::Causal)];
            cases.push((format!("{shape:?} causal {queries}"), one_task(shape, 0..queries, causal)));
            let mixed = vec![
                segment(1, 7..300, Mask::Full),
                segment(0, 0..0, Mask::Full),
                segment(0, 11..queries + 50, Mask::Causal),
            ];
            cases.push((format!("{shape:?} segments {queries}"), one_task(shape, 5..5 + queries, mixed)));
        }
        let short = vec![segment(0, 0..90, Mask::Causal)];
        cases.push((format!("{shape:?} more queries than keys"), one_task(shape, 0..250, short)));
    }
    cases
}

fn many_queries(cuda: &Cuda) {
    for (name, case) in many_cases() {
        check(cuda, &name, &case);
    }
}

fn portable(_: &Cuda) {
    let cuda = open(AttentionPath::Portable).unwrap();
    for (name, case) in many_cases() {
        check(&cuda, &name, &case);
    }
}

fn long_cache(cuda: &Cuda) {
    for shape in [shape(8, 2, 64), shape(4, 1, 128), shape(6, 2, 32)] {
        let segments = vec![segment(0, 0..9001, Mask::Full), segment(1, 0..2, Mask::Causal)];
        check(cuda, &format!("{shape:?} one query"), &one_task(shape, 0..1, segments.clone()));
        check(cuda, &format!("{shape:?} 37 queries"), &one_task(shape, 0..37, vec![segment(0, 0..5003, Mask::Full)]));
    }
}

fn hosts(cuda: &Cuda) {
    for shape in [shape(4, 2, 64), shape(4, 1, 128)] {
        let (anchor, local, passing) = (61, 180, 24);
        let mut tasks = vec![AttentionTask { queries: 0..anchor, segments: vec![segment(0, 0..anchor, Mask::Causal)] }];
        for host in 0..4 {
            let own = anchor + host * local..anchor + (host + 1) * local;
            let segments = vec![
                segment(1, 0..host * passing, Mask::Full),
                segment(0, if host > 0 { 0..anchor } else { 0..0 }, Mask::Full),
                segment(0, own.clone(), Mask::Causal),
            ];
            tasks.push(AttentionTask { queries: own, segments });
        }
        check(cuda, &format!("{shape:?}"), &Case { shape, sources: vec![anchor + 4 * local, 4 * passing], tasks });
    }
}

fn repeats(cuda: &Cuda) {
    let shape = shape(4, 1, 128);
    for (queries, keys) in [(1, 9000), (50, 3000), (700, 700)] {
        let (q, k, v) = (
            Values::random(1, queries, shape.qkv_width(), 2.0).matrix(cuda),
            Values::random(2, keys, shape.kv_width(), 2.0).matrix(cuda),
            Values::random(3, keys, shape.kv_width(), 1.0).matrix(cuda),
        );
        let tasks = [AttentionTask { queries: 0..queries, segments: vec![segment(0, 0..keys, Mask::Causal)] }];
        let once = || {
            let (mut out, mut lse) =
                (poisoned(cuda, queries, shape.q_width()), poisoned_scores(cuda, queries, shape.heads));
            cuda.attention(shape, &q, &[KvRef { k: &k, v: &v }], &tasks, &mut out, Some(&mut lse)).unwrap();
            (
                cuda.read_matrix(&out).unwrap(),
                cuda.read_scores(&lse).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>(),
            )
        };
        let first = once();
        for _ in 0..9 {
            assert!(once() == first, "{queries} queries over {keys} keys");
        }
    }
}
