//! The whole model in f64, one row at a time, with every host's sequence written out as the algorithm describes it.
//!
//! A host's sequence is `[anchor; local block; query]`, the query only where query-aware selection looks through it. Each row sees
//! the rows before it in its own sequence and, behind the anchor, what earlier hosts passed on. Nothing is shared between hosts.

use apbd::plan::{AttentionMode, Execution, PassingType, Selector};

use super::models::{LayerTensors, Tensor, TinyModel};

/// What is asked for; lengths in tokens.
#[derive(Clone, Debug)]
pub struct Case {
    pub mode: AttentionMode,
    pub hosts: usize,
    pub anchor: usize,
    pub passing: usize,
    pub query_at: usize,
    pub query_in_anchor: bool,
    pub selector: Selector,
    /// Tokens kept for query and output, per KV head, by retaining heads.
    pub kv_budget: Option<usize>,
    /// The oracle has no ranks: of all this it knows only the type of the passing blocks.
    pub execution: Execution,
}

/// What the model answers.
pub struct Answer {
    /// Logits after the query, and after each forced token.
    pub logits: Vec<Vec<f64>>,
    /// The least difference between a chosen and a rejected score: under the engine's rounding the choice could differ.
    pub margin: f64,
}

type Row = Vec<f64>;

/// Keys (rotated) and values of a row, all KV heads.
#[derive(Clone)]
struct KeyValue {
    k: Row,
    v: Row,
}

struct Sequence {
    /// Tokens of the whole context.
    context: usize,
    tokens: Vec<u32>,
    positions: Vec<usize>,
    anchor: usize,
    local: usize,
    first_position: usize,
    /// Tokens to pass on.
    passes: usize,
    /// Local tokens at the start that are never passed on.
    excluded: usize,
}

/// Runs context, query and forced tokens.
pub fn answer(model: &TinyModel, context: &[u32], query: &[u32], forced: &[u32], case: &Case) -> Answer {
    let oracle = Oracle { model, case };
    let sequences = oracle.sequences(context, query);
    let (mut kept, margin) = oracle.prefill(&sequences);
    let mut logits = Vec::new();
    for (index, token) in query.iter().chain(forced).enumerate() {
        let hidden = oracle.append(*token, context.len() + index, &mut kept);
        if index + 1 >= query.len() {
            logits.push(oracle.logits(&hidden));
        }
    }
    Answer { logits, margin }
}

struct Oracle<'a> {
    model: &'a TinyModel,
    case: &'a Case,
}

impl Oracle<'_> {
    fn sequences(&self, context: &[u32], query: &[u32]) -> Vec<Sequence> {
        let (n, case) = (context.len(), self.case);
        let hosts = if case.mode == AttentionMode::Apb || case.mode == AttentionMode::Star { case.hosts } else { 1 };
        let block = n.div_ceil(hosts);
        let starts: Vec<usize> = (0..hosts).map(|host| host * block).filter(|start| *start < n).collect();
        let anchor = self.anchor(context, query, block);
        let sequence = |(host, start): (usize, &usize)| {
            let end = n.min(start + block);
            let is_last = end == n;
            let own_anchor = if host == 0 { Vec::new() } else { anchor.clone() };
            let excluded = if host == 0 && starts.len() > 1 { anchor.len().min(end) } else { 0 };
            let may_pass = case.mode == AttentionMode::Apb && case.selector != Selector::None && !is_last;
            let passes = if may_pass { case.passing.min(end - start - excluded) } else { 0 };
            let probe: &[u32] = if passes > 0 && case.selector == Selector::QueryAware { query } else { &[] };
            let positions = (0..own_anchor.len()).chain(*start..end).chain(n..n + probe.len()).collect();
            Sequence {
                context: n,
                anchor: own_anchor.len(),
                tokens: [&own_anchor[..], &context[*start..end], probe].concat(),
                positions,
                local: end - start,
                first_position: *start,
                passes,
                excluded,
            }
        };
        starts.iter().enumerate().map(sequence).collect()
    }

    fn anchor(&self, context: &[u32], query: &[u32], block: usize) -> Vec<u32> {
        let case = self.case;
        let p = case.query_at;
        match case.mode {
            AttentionMode::Star => context[..block].to_vec(),
            AttentionMode::Apb if case.query_in_anchor && p + query.len() <= case.anchor => {
                let all = [&context[..p], query, &context[p..]].concat();
                all[..case.anchor.min(all.len())].to_vec()
            }
            AttentionMode::Apb => context[..case.anchor.min(context.len())].to_vec(),
            _ => Vec::new(),
        }
    }

    /// What is kept of the local blocks in every layer, by KV head, in the order of the document, and the margin of the choices.
    fn prefill(&self, sequences: &[Sequence]) -> (Vec<Vec<Vec<KeyValue>>>, f64) {
        let mut hidden: Vec<Vec<Row>> =
            sequences.iter().map(|s| s.tokens.iter().map(|t| self.embed(*t)).collect()).collect();
        let mut kept = Vec::new();
        let mut margin = f64::INFINITY;
        for (index, layer) in self.model.layers.iter().enumerate() {
            // For each KV head, what the hosts so far have passed on.
            let mut passed: Vec<Vec<KeyValue>> = vec![Vec::new(); self.model.spec.shape.kv_heads];
            let mut layer_kept = vec![Vec::new(); self.model.spec.shape.kv_heads];
            for (sequence, rows) in sequences.iter().zip(&mut hidden) {
                let raw: Vec<Row> = rows.iter().map(|x| self.qkv(layer, x)).collect();
                let (queries, own) = self.rotated(&raw, &sequence.positions);
                let scores = self.scores(index, layer, sequence, &raw, &queries, &own);
                for (i, x) in rows.iter_mut().enumerate() {
                    let empty = Vec::new();
                    let seen = |head: usize| {
                        let before = if i < sequence.anchor { &empty } else { &passed[head] };
                        before.iter().chain(&own[..=i])
                    };
                    let attended = self.attend(&queries[i], seen);
                    self.finish_layer(layer, x, &attended);
                }
                for (head, scores) in scores.iter().enumerate() {
                    let (chosen, gap) = self.choose(sequence, scores);
                    margin = margin.min(gap);
                    for row in chosen {
                        let (passing, gap) = self.passed_on(&own[row], head);
                        margin = margin.min(gap);
                        passed[head].push(passing);
                    }
                }
                margin = margin.min(self.keep(layer, sequence, &raw, &own, &mut layer_kept));
            }
            kept.push(layer_kept);
        }
        (kept, margin)
    }

    /// Adds what is kept of a host, and says by how much it is better than the rest.
    fn keep(
        &self,
        layer: &LayerTensors,
        sequence: &Sequence,
        raw: &[Row],
        own: &[KeyValue],
        kept: &mut [Vec<KeyValue>],
    ) -> f64 {
        let (first, end) = (sequence.anchor, sequence.anchor + sequence.local);
        let Some(budget) = self.case.kv_budget.filter(|budget| *budget < sequence.context) else {
            kept.iter_mut().for_each(|kept| kept.extend_from_slice(&own[first..end]));
            return f64::INFINITY;
        };
        let count = (budget * sequence.local).div_ceil(sequence.context);
        let scores: Vec<Row> = raw[..end].iter().map(|raw| self.retained(layer, raw)).collect();
        let mut margin = f64::INFINITY;
        for (head, kept) in kept.iter_mut().enumerate() {
            let scores: Row = scores.iter().map(|row| row[head]).collect();
            let (chosen, gap) = best(&scores, first, count, 2);
            margin = margin.min(gap);
            kept.extend(chosen.into_iter().map(|row| own[row].clone()));
        }
        margin
    }

    /// What the retaining heads say of a row, by KV head.
    fn retained(&self, layer: &LayerTensors, raw: &Row) -> Row {
        let inner: Row = product(&layer.w1, raw).into_iter().map(silu).collect();
        product(&layer.w2, &inner)
    }

    /// A row as others see it, of which they look at one KV head, and how clearly its codes are what they are.
    fn passed_on(&self, row: &KeyValue, head: usize) -> (KeyValue, f64) {
        let (mut passing, mut margin) = (row.clone(), f64::INFINITY);
        if self.case.execution.passing_type == PassingType::Fp8 {
            let dim = self.model.spec.shape.head_dim;
            for part in [&mut passing.k, &mut passing.v] {
                margin = margin.min(round_to_fp8(&mut part[head * dim..(head + 1) * dim]));
            }
        }
        (passing, margin)
    }

    fn append(&self, token: u32, position: usize, kept: &mut [Vec<Vec<KeyValue>>]) -> Row {
        let mut x = self.embed(token);
        for (layer, kept) in self.model.layers.iter().zip(kept) {
            let raw = self.qkv(layer, &x);
            let (queries, own) = self.rotated(&[raw], &[position]);
            kept.iter_mut().for_each(|kept| kept.extend_from_slice(&own));
            let attended = self.attend(&queries[0], |head| kept[head].iter());
            self.finish_layer(layer, &mut x, &attended);
        }
        x
    }

    /// Scores of `[anchor; local]`, per KV head, not yet pooled; nothing where nothing is passed on.
    fn scores(
        &self,
        index: usize,
        layer: &LayerTensors,
        sequence: &Sequence,
        raw: &[Row],
        queries: &[Row],
        own: &[KeyValue],
    ) -> Vec<Vec<f64>> {
        let shape = self.model.spec.shape;
        let (anchor, rows) = (sequence.anchor, sequence.anchor + sequence.local);
        if sequence.passes == 0 {
            return Vec::new();
        }
        let score = |head: usize, row: usize| match self.case.selector {
            Selector::RetainingHead => self.retained(layer, &raw[row])[head],
            Selector::QueryAware => {
                let group = shape.heads / shape.kv_heads;
                let key = slice(&own[row].k, head, shape.head_dim);
                let dots: Vec<f64> = queries[rows..]
                    .iter()
                    .flat_map(|q| (0..group).map(move |g| dot(slice(q, head * group + g, shape.head_dim), key)))
                    .collect();
                dots.iter().sum::<f64>() / dots.len() as f64 / (shape.head_dim as f64).sqrt()
            }
            Selector::Random { .. } if row < anchor => 0.0,
            Selector::Random { seed } => drawn(seed, index, head, sequence.first_position + row - anchor),
            Selector::None => unreachable!("nothing is passed on"),
        };
        (0..shape.kv_heads).map(|head| (0..rows).map(|row| score(head, row)).collect()).collect()
    }

    /// Rows of the best local tokens in their order, and by how much they are better than the others.
    fn choose(&self, sequence: &Sequence, scores: &[f64]) -> (Vec<usize>, f64) {
        let reach = if matches!(self.case.selector, Selector::Random { .. }) { 0 } else { 2 };
        best(scores, sequence.anchor + sequence.excluded, sequence.passes, reach)
    }

    fn embed(&self, token: u32) -> Row {
        row(&self.model.embedding, token as usize)
    }

    fn qkv(&self, layer: &LayerTensors, x: &Row) -> Row {
        let h = self.norm(x, &layer.attention_norm);
        let part = |index: usize| {
            let mut out = product(&layer.qkv[index], &h);
            if let Some(biases) = &layer.qkv_bias {
                add(&mut out, &row(&biases[index], 0));
            }
            out
        };
        [part(0), part(1), part(2)].concat()
    }

    /// Rotated queries, and rotated keys with their values.
    fn rotated(&self, raw: &[Row], positions: &[usize]) -> (Vec<Row>, Vec<KeyValue>) {
        let shape = self.model.spec.shape;
        let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let split = |(row, position): (&Row, &usize)| {
            let q = self.rotate(&row[..q_width], *position);
            let k = self.rotate(&row[q_width..q_width + kv_width], *position);
            (q, KeyValue { k, v: row[q_width + kv_width..].to_vec() })
        };
        raw.iter().zip(positions).map(split).unzip()
    }

    fn rotate(&self, heads: &[f64], position: usize) -> Row {
        let (rope, dim) = (&self.model.spec.rope, self.model.spec.shape.head_dim);
        let half = dim / 2;
        let mut out = heads.to_vec();
        for (head, turned) in heads.chunks(dim).zip(out.chunks_mut(dim)) {
            for i in 0..half {
                let angle = position as f64 * f64::from(rope.inv_freq[i]);
                let (sin, cos) = (angle.sin() * f64::from(rope.scale), angle.cos() * f64::from(rope.scale));
                turned[i] = head[i] * cos - head[i + half] * sin;
                turned[i + half] = head[i + half] * cos + head[i] * sin;
            }
        }
        out
    }

    /// Softmax attention of one row; `seen` gives what a KV head shows.
    fn attend<'k, I: Iterator<Item = &'k KeyValue>>(&self, q: &Row, seen: impl Fn(usize) -> I) -> Row {
        let shape = self.model.spec.shape;
        let mut out = Vec::new();
        for head in 0..shape.heads {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let rows: Vec<&KeyValue> = seen(kv_head).collect();
            let query = slice(q, head, shape.head_dim);
            let logit =
                |row: &&KeyValue| dot(query, slice(&row.k, kv_head, shape.head_dim)) / (shape.head_dim as f64).sqrt();
            let logits: Vec<f64> = rows.iter().map(logit).collect();
            let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|logit| (logit - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..shape.head_dim).map(|i| {
                rows.iter()
                    .zip(&weights)
                    .map(|(row, weight)| weight * slice(&row.v, kv_head, shape.head_dim)[i])
                    .sum::<f64>()
                    / total
            }));
        }
        out
    }

    fn finish_layer(&self, layer: &LayerTensors, x: &mut Row, attended: &Row) {
        add(x, &product(&layer.o, attended));
        if let Some(bias) = &layer.o_bias {
            add(x, &row(bias, 0));
        }
        let h = self.norm(x, &layer.mlp_norm);
        let gated: Row =
            product(&layer.gate, &h).into_iter().zip(product(&layer.up, &h)).map(|(g, u)| silu(g) * u).collect();
        add(x, &product(&layer.down, &gated));
    }

    fn logits(&self, x: &Row) -> Row {
        let head = self.model.head.as_ref().unwrap_or(&self.model.embedding);
        product(head, &self.norm(x, &self.model.final_norm))
    }

    fn norm(&self, x: &Row, weight: &Tensor) -> Row {
        let mean = x.iter().map(|value| value * value).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(self.model.spec.epsilon)).sqrt();
        x.iter().zip(&weight.values).map(|(value, weight)| value * scale * f64::from(*weight)).collect()
    }
}

/// The `count` best rows from `first` on, each as good as the best within `reach` of it, in their order; and by how much they are better than the others.
fn best(scores: &[f64], first: usize, count: usize, reach: usize) -> (Vec<usize>, f64) {
    let pooled = |row: usize| {
        let window = row.saturating_sub(reach)..scores.len().min(row + reach + 1);
        window.map(|near| scores[near]).fold(f64::NEG_INFINITY, f64::max)
    };
    let mut candidates: Vec<usize> = (first..scores.len()).collect();
    candidates.sort_by(|a, b| pooled(*b).total_cmp(&pooled(*a)).then(a.cmp(b)));
    let rejected = candidates.split_off(count);
    let gap = match (candidates.last(), rejected.first()) {
        (Some(worst), Some(best)) => pooled(*worst) - pooled(*best),
        _ => f64::INFINITY,
    };
    candidates.sort_unstable();
    // Neighbours that share a maximum are equal in any precision.
    (candidates, if gap == 0.0 { f64::INFINITY } else { gap })
}

/// Rounds the elements of a head to four bits, relative to a scale of eight. Returns the least distance to where another code or scale would be
/// taken, in tenths of the largest element; codes whose neighbour is within a thousandth of that are not counted.
fn round_to_fp8(elements: &mut [f64]) -> f64 {
    let largest = elements.iter().fold(0.0f64, |largest, element| largest.max(element.abs()));
    let step_of = |value: f64, bits: i32, least: i32| 2f64.powi((value.log2().floor() as i32).max(least) - (bits - 1));
    let unit = step_of(largest / 448.0, 8, i32::MIN / 2);
    let units = largest / 448.0 / unit;
    let scale = units.ceil() * unit;
    let mut margin = 10.0 * (units - units.round()).abs() / units;
    for element in elements {
        let step = step_of((*element / scale).abs(), 4, -6);
        let steps = *element / scale / step;
        if step * scale > 1e-3 * largest {
            margin = margin.min(10.0 * ((steps - steps.floor()) - 0.5).abs() * step * scale / largest);
        }
        *element = steps.round_ties_even() * step * scale;
    }
    margin
}

fn row(tensor: &Tensor, index: usize) -> Row {
    tensor.values[index * tensor.cols..(index + 1) * tensor.cols].iter().map(|value| f64::from(*value)).collect()
}

fn product(weight: &Tensor, x: &Row) -> Row {
    assert_eq!(weight.cols, x.len());
    (0..weight.rows).map(|index| dot(&row(weight, index), x)).collect()
}

fn slice(row: &Row, head: usize, dim: usize) -> &[f64] {
    &row[head * dim..(head + 1) * dim]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut Row, other: &Row) {
    x.iter_mut().zip(other).for_each(|(x, other)| *x += other);
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// The documented draw: splitmix64 over seed, layer, KV head and position; the upper 24 bits as a fraction.
fn drawn(seed: u64, layer: usize, head: usize, position: usize) -> f64 {
    let splitmix = |state: u64| {
        let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut state = seed;
    for part in [layer, head, position] {
        state = splitmix(state ^ splitmix(part as u64));
    }
    (state >> 40) as f64 / f64::from(1 << 24)
}
