//! The time of a prefill: the layers of all ranks on one timeline, where nobody goes on before what is sent has come.
//!
//! Invariant: the stages of a rank add up to the time at which it ends its last layer, but for what is hidden.

use crate::plan::{AttentionMode, PrefillPlan};

use super::CostModel;
use super::work::{Exchange, LayerWork, RankWork};

/// Seconds of each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Stages {
    /// Projection to queries, keys and values.
    pub qkv_s: f64,
    /// Scores of the tokens, and the choice of those that are passed on.
    pub retaining_head_s: f64,
    /// Transfers behind which attention is computed.
    pub communication_hidden_s: f64,
    /// Transfers that are waited for.
    pub communication_s: f64,
    /// Waiting for ranks that have more to do.
    pub waiting_s: f64,
    /// Attention, merging included.
    pub attention_s: f64,
    /// Output projection.
    pub o_s: f64,
    /// MLP.
    pub ffn_s: f64,
    /// Norms, RoPE, copies, starts of launches.
    pub other_s: f64,
}

impl Stages {
    /// Seconds of all that is not hidden.
    pub fn seconds(&self) -> f64 {
        let before = self.qkv_s + self.retaining_head_s + self.communication_s + self.waiting_s;
        before + self.attention_s + self.o_s + self.ffn_s + self.other_s
    }

    /// Seconds in which the device computes.
    pub fn busy_s(&self) -> f64 {
        self.seconds() - self.communication_s - self.waiting_s
    }
}

/// What a prefill costs one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct RankCost {
    /// Rows of anchor, local blocks and probes.
    pub rows: usize,
    /// FLOPs of all layers.
    pub flops: f64,
    /// Where the time goes.
    pub stages: Stages,
}

/// What a prefill costs.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillCost {
    /// Seconds until the last rank has ended; not those of a query that goes through after its context.
    pub seconds: f64,
    /// Each rank; those without hosts have the query at most.
    pub ranks: Vec<RankCost>,
}

impl PrefillCost {
    /// FLOPs of all ranks.
    pub fn flops(&self) -> f64 {
        self.ranks.iter().map(|rank| rank.flops).sum()
    }
}

/// Seconds of one rank's part of a layer.
struct RankTimes {
    qkv: f64,
    selection: f64,
    /// Scores by which the last layer chooses what is kept.
    last_selection: f64,
    before: f64,
    own_attention: f64,
    late_attention: Vec<f64>,
    /// Of the query, where it goes with its context.
    query_attention: f64,
    o: f64,
    ffn: f64,
    after: f64,
    /// Output projection and MLP of the last layer.
    last: [f64; 2],
}

impl CostModel {
    /// Cost of the context's pass through all layers on `ranks` ranks.
    pub fn prefill(&self, plan: &PrefillPlan, ranks: usize) -> PrefillCost {
        let work = LayerWork::of(plan, ranks, &self.shape);
        let times: Vec<RankTimes> = work.ranks.iter().map(|rank| self.rank_times(plan, rank)).collect();
        let layers = self.shape.layers;
        let mut line = Timeline::new(work.ranks.iter().map(|rank| self.embed_s(rank)).collect());
        for layer in 0..layers {
            line.project(&times);
            let is_last = layer + 1 == layers;
            let network = &self.calibration.network;
            match work.exchange {
                _ if is_last => line.select_last(&times),
                Exchange::Nothing => line.attend_alone(&times),
                Exchange::Gather { bytes } => {
                    line.gather(&times, network.all_gather_s(times.len(), bytes), work.overlap);
                }
                Exchange::Rotate { bytes, steps } => {
                    line.rotate(&times, steps, network.rotate_s(times.len(), bytes), work.overlap);
                }
                Exchange::Swap { to_heads_bytes, back_bytes } => {
                    let swap_s = |bytes| network.all_to_all_s(times.len(), bytes);
                    line.swap(&times, [swap_s(to_heads_bytes), swap_s(back_bytes)]);
                }
            }
            if plan.query_rows() > 0 {
                line.attend_query(&times, self.partials_s(plan.query_rows(), times.len()));
            }
            line.close(&times, is_last);
        }
        let seconds = line.ends.iter().copied().fold(0.0, f64::max);
        let rank = |(work, stages): (&RankWork, Stages)| {
            let flops = (layers - 1) as f64 * work.flops() + work.last_flops();
            RankCost { rows: work.rows, flops, stages }
        };
        PrefillCost { seconds, ranks: work.ranks.iter().zip(line.stages).map(rank).collect() }
    }

    fn embed_s(&self, work: &RankWork) -> f64 {
        self.calibration.memory_s((2 * work.rows * self.shape.hidden * self.shape.element_bytes) as f64)
    }

    fn rank_times(&self, plan: &PrefillPlan, work: &RankWork) -> RankTimes {
        let (shape, rates) = (&self.shape, &self.calibration.rates);
        let segments = match plan.mode {
            AttentionMode::Full | AttentionMode::Ring | AttentionMode::Ulysses => rates.causal_tflops,
            _ if plan.hosts.len() == 1 => rates.causal_tflops,
            _ => rates.segments_tflops,
        };
        let attention = |flops: &f64| flops / (segments * 1e12);
        let merge = self.calibration.memory_s(work.merge_bytes);
        let late = |flops: &f64| if *flops > 0.0 { attention(flops) + merge } else { 0.0 };
        let scoring = |flops: f64| flops / (rates.retaining_head_tflops * 1e12);
        let reading = work.query_bytes / (self.kept_gb_s() * 1e9);
        let [o, ffn] = [
            (shape.hidden * shape.q_width(), rates.o_tflops),
            (3 * shape.hidden * shape.intermediate, rates.ffn_tflops),
        ];
        RankTimes {
            qkv: self.product_s(work.qkv_flops, rates.qkv_tflops, shape.hidden * shape.qkv_width()),
            last_selection: scoring(work.last_scoring_flops),
            selection: scoring(work.scoring_flops) + self.calibration.memory_s(work.selection_bytes),
            before: self.calibration.memory_s(work.before_bytes) + rates.layer_us * 1e-6,
            own_attention: attention(&work.own_attention_flops),
            late_attention: work.late_attention_flops.iter().map(late).collect(),
            query_attention: attention(&work.query_attention_flops).max(reading),
            o: self.product_s(work.o_flops, o.1, o.0),
            ffn: self.product_s(work.ffn_flops, ffn.1, ffn.0),
            after: self.calibration.memory_s(work.after_bytes),
            last: [self.product_s(work.last_o_flops, o.1, o.0), self.product_s(work.last_ffn_flops, ffn.1, ffn.0)],
        }
    }

    /// Seconds of a product: what its FLOPs take, or its weights' bytes if that is longer; none without rows.
    pub(super) fn product_s(&self, flops: f64, tflops: f64, weights: usize) -> f64 {
        if flops == 0.0 {
            return 0.0;
        }
        let bytes = (weights * self.shape.element_bytes) as f64;
        (flops / (tflops * 1e12)).max(bytes / (self.calibration.rates.weights_gb_s() * 1e9))
    }
}

/// Where every rank is.
struct Timeline {
    /// When it will have done what it was given.
    ends: Vec<f64>,
    stages: Vec<Stages>,
}

impl Timeline {
    fn new(embed: Vec<f64>) -> Self {
        let stages = embed.iter().map(|embed| Stages { other_s: *embed, ..Stages::default() }).collect();
        Self { ends: embed, stages }
    }

    /// Up to where keys and values are stored.
    fn project(&mut self, times: &[RankTimes]) {
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end += time.qkv + time.before;
            stages.qkv_s += time.qkv;
            stages.other_s += time.before;
        }
    }

    /// From the output projection to the end of the layer; of the last one for the query alone.
    fn close(&mut self, times: &[RankTimes], is_last: bool) {
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            let ([o, ffn], after) = if is_last { (time.last, 0.0) } else { ([time.o, time.ffn], time.after) };
            *end += o + ffn + after;
            stages.o_s += o;
            stages.ffn_s += ffn;
            stages.other_s += after;
        }
    }

    /// The query attends to what each rank keeps; the partial results of all ranks come to each.
    fn attend_query(&mut self, times: &[RankTimes], transfer: f64) {
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end += time.query_attention;
            stages.attention_s += time.query_attention;
        }
        if times.len() > 1 {
            let all_ready = self.all_ready();
            for (end, stages) in self.ends.iter_mut().zip(&mut self.stages) {
                *end = stages.await_transfer(*end, all_ready, transfer);
            }
        }
    }

    fn select(&mut self, times: &[RankTimes]) {
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end += time.selection;
            stages.retaining_head_s += time.selection;
        }
    }

    fn select_last(&mut self, times: &[RankTimes]) {
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end += time.last_selection;
            stages.retaining_head_s += time.last_selection;
        }
    }

    fn attend_alone(&mut self, times: &[RankTimes]) {
        self.select(times);
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end += time.own_attention;
            stages.attention_s += time.own_attention;
        }
    }

    /// Everybody selects; what is selected travels while everybody attends to what is his own, and is attended to when it has come.
    fn gather(&mut self, times: &[RankTimes], transfer: f64, overlap: bool) {
        self.select(times);
        let all_ready = self.all_ready();
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            let late: f64 = time.late_attention.iter().sum();
            stages.attention_s += time.own_attention + late;
            *end = match overlap {
                true => stages.await_transfer(*end + time.own_attention, all_ready, transfer) + late,
                false => stages.await_transfer(*end, all_ready, transfer) + time.own_attention,
            };
        }
    }

    /// In every step rows travel while others are attended to; nobody goes on before the step has ended for all.
    fn rotate(&mut self, times: &[RankTimes], steps: usize, transfer: f64, overlap: bool) {
        self.select(times);
        for step in 0..=steps {
            let mut begun = self.all_ready();
            let attention =
                |time: &RankTimes| if step == 0 { time.own_attention } else { time.late_attention[step - 1] };
            if !overlap {
                let computed = self.ends.iter().zip(times).map(|(end, time)| end + attention(time));
                begun = computed.fold(0.0, f64::max);
            }
            for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
                let computed = *end + attention(time);
                stages.attention_s += attention(time);
                *end = if step < steps { stages.await_transfer(computed, begun, transfer) } else { computed };
            }
        }
    }

    /// Queries, keys and values go to the ranks of their heads, are attended with, and what comes of it goes back; nothing hides any of it.
    fn swap(&mut self, times: &[RankTimes], [to_heads, back]: [f64; 2]) {
        self.select(times);
        let all_ready = self.all_ready();
        for ((end, stages), time) in self.ends.iter_mut().zip(&mut self.stages).zip(times) {
            *end = stages.await_transfer(*end, all_ready, to_heads) + time.own_attention;
            stages.attention_s += time.own_attention;
        }
        let all_ready = self.all_ready();
        for (end, stages) in self.ends.iter_mut().zip(&mut self.stages) {
            *end = stages.await_transfer(*end, all_ready, back);
        }
    }

    /// When the last rank is where the others wait for it.
    fn all_ready(&self) -> f64 {
        self.ends.iter().copied().fold(0.0, f64::max)
    }
}

impl Stages {
    /// When a rank goes on that is done at `done` and awaits a transfer that began when all were ready.
    fn await_transfer(&mut self, done: f64, all_ready: f64, transfer: f64) -> f64 {
        let comes = all_ready + transfer;
        let waiting = (all_ready - done).max(0.0);
        let exposed = (comes - done.max(all_ready)).max(0.0);
        self.waiting_s += waiting;
        self.communication_s += exposed;
        self.communication_hidden_s += (transfer - exposed).max(0.0);
        done.max(comes)
    }
}
