//! Predictions against what an H100 took.
//!
//! The rates of [`Calibration::h100`] come from the stages of one prefill (Llama-3.1-8B, APB, 128K), from causal attention at 128K alone and from one
//! token at 128K: all other figures are predictions.

use serde::Deserialize;

use super::{CostModel, planned};
use crate::cost::{Calibration, DecodeFigure, Figures, ModelShape, PrefillFigure};
use crate::plan::{AttentionMode, PrefillPlan};

const H100: &str = include_str!("../../../tests/bench/results/h100.json");
const BATCHES: &str = include_str!("../../../tests/bench/results/h100/decode_batches.json");

/// How far a prefill and its memory may be off, and a generated token after full attention.
const TOLERANCE: f64 = 0.02;
/// A token after APB: when it was measured, every host had a partial result of its own, merged with the others; the model has one a rank.
const TOKEN_AFTER_APB: f64 = 0.10;
/// A step of a batch.
const STEP: f64 = 0.06;
/// Of contexts from this length on; where many have little to read, products of many rows take longer than the model knows.
const LONG_ENOUGH: usize = 16 << 10;
/// Each stage of the prefill that the rates come from.
const STAGE: f64 = 0.02;

#[derive(Deserialize)]
struct Measured {
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
}

#[derive(Debug, Deserialize)]
struct Prefill {
    shape: String,
    attention: AttentionMode,
    tokens: usize,
    hosts: usize,
    anchor: Option<usize>,
    passing: Option<usize>,
    tokens_s: f64,
    peak_gib: Option<f64>,
    stages_ms: Option<std::collections::BTreeMap<String, f64>>,
}

#[derive(Debug, Deserialize)]
struct Decode {
    shape: String,
    attention: AttentionMode,
    tokens: usize,
    ms_a_token: f64,
}

/// A step of a batch whose sequences all have so many tokens.
#[derive(Debug, Deserialize)]
struct Batch {
    shape: String,
    tokens: usize,
    batch: usize,
    kv_cache: String,
    products: String,
    ms_a_step: f64,
}

fn measured() -> Measured {
    serde_json::from_str(H100).expect("figures")
}

fn model(shape: &str) -> CostModel {
    CostModel::new(ModelShape::published(shape, 1024).expect("a shape"), Calibration::h100())
}

fn plan_of(case: &Prefill) -> PrefillPlan {
    planned(case.attention, case.tokens, case.hosts, case.anchor, case.passing)
}

fn assert_within(predicted: f64, measured: f64, tolerance: f64, what: &str) {
    let off = predicted / measured - 1.0;
    println!("{what}: predicted {predicted:.3}, measured {measured:.3}, {:+.1} %", 100.0 * off);
    assert!(off.abs() <= tolerance, "{what}: predicted {predicted:.3}, measured {measured:.3}");
}

#[test]
fn prefills_take_as_long_as_predicted() {
    for case in measured().prefill {
        let predicted = model(&case.shape).prefill(&plan_of(&case), 1).seconds;
        let what = format!("{} {:?} {} hosts {}, s", case.shape, case.attention, case.tokens, case.hosts);
        assert_within(predicted, case.tokens as f64 / case.tokens_s, TOLERANCE, &what);
    }
}

#[test]
fn prefills_need_as_much_memory_as_predicted() {
    for case in measured().prefill {
        let Some(peak_gib) = case.peak_gib else { continue };
        let model = model(&case.shape);
        let bytes = model.shape.weight_bytes() + model.memory_of_rank(&plan_of(&case), 0, 1, 1);
        let what = format!("{} {:?} {}, GiB", case.shape, case.attention, case.tokens);
        assert_within(bytes as f64 / f64::from(1 << 30), peak_gib, TOLERANCE, &what);
    }
}

#[test]
fn stages_take_as_long_as_predicted() {
    let mut checked = 0;
    for case in measured().prefill {
        let Some(stages_ms) = &case.stages_ms else { continue };
        let stages = model(&case.shape).prefill(&plan_of(&case), 1).ranks[0].stages;
        for (name, measured) in stages_ms {
            let predicted = match name.as_str() {
                "qkv" => stages.qkv_s,
                "retaining_head" => stages.retaining_head_s,
                "attention" => stages.attention_s,
                "o" => stages.o_s,
                "ffn" => stages.ffn_s,
                "other" => stages.other_s,
                _ => panic!("{name} is no stage"),
            };
            assert_within(1e3 * predicted, *measured, STAGE, name);
            checked += 1;
        }
    }
    assert_eq!(checked, 6);
}

#[test]
fn tokens_take_as_long_as_predicted() {
    for case in measured().decode {
        let predicted = 1e3 * model(&case.shape).decode_step_s(&[case.tokens], 1);
        let tolerance = if case.attention == AttentionMode::Full { TOLERANCE } else { TOKEN_AFTER_APB };
        assert_within(predicted, case.ms_a_token, tolerance, &format!("{:?} {}, ms", case.attention, case.tokens));
    }
}

#[test]
fn steps_of_batches_take_as_long_as_predicted() {
    let rows: Vec<serde_json::Value> = serde_json::from_str(BATCHES).expect("figures");
    let steps = rows.into_iter().filter(|row| row["what"] == "decode").map(serde_json::from_value::<Batch>);
    // Other kernels than those that are taken are there for comparison.
    let is_taken = |step: &Batch| step.products == "skinny" && step.tokens >= LONG_ENOUGH;
    let taken: Vec<_> = steps.map(|step| step.expect("a figure")).filter(is_taken).collect();
    assert!(taken.len() >= 17);
    for step in taken {
        let model = match step.kv_cache.as_str() {
            "fp8" => CostModel::new(model(&step.shape).shape.kept_in_fp8(), Calibration::h100()),
            _ => model(&step.shape),
        };
        let predicted = 1e3 * model.decode_step_s(&vec![step.tokens; step.batch], 1);
        let what = format!("{} of {} tokens, {}, ms", step.batch, step.tokens, step.kv_cache);
        assert_within(predicted, step.ms_a_step, STEP, &what);
    }
}

#[test]
fn a_calibration_is_found_again_from_what_it_predicts() {
    found_again(&Calibration::h100());
    let mut apart = Calibration::h100();
    apart.rates.weights_gb_s = Some(2400.0);
    found_again(&apart);
}

fn found_again(truth: &Calibration) {
    let figures = |calibration: &Calibration| {
        let of_model =
            |shape: &str| CostModel::new(ModelShape::published(shape, 1024).expect("a shape"), calibration.clone());
        let prefill = measured().prefill.into_iter().map(|case| {
            let (model, plan) = (of_model(&case.shape), plan_of(&case));
            let cost = model.prefill(&plan, 1);
            PrefillFigure { shape: model.shape, plan, seconds: cost.seconds, stages: cost.ranks[0].stages }
        });
        let decode = measured().decode.into_iter().map(|case| {
            let (model, contexts) = (of_model(&case.shape), vec![case.tokens; 3]);
            DecodeFigure { shape: model.shape, seconds: model.decode_step_s(&contexts, 1), contexts }
        });
        let copy_gb_s = Some(calibration.rates.decode_gb_s);
        let weights_gb_s = calibration.rates.weights_gb_s;
        Figures { device: None, copy_gb_s, weights_gb_s, prefill: prefill.collect(), decode: decode.collect() }
    };
    let mut start = truth.clone();
    start.rates.weights_gb_s = truth.rates.weights_gb_s.map(|rate| 0.6 * rate);
    for rate in [
        &mut start.rates.qkv_tflops,
        &mut start.rates.o_tflops,
        &mut start.rates.ffn_tflops,
        &mut start.rates.retaining_head_tflops,
        &mut start.rates.causal_tflops,
        &mut start.rates.segments_tflops,
        &mut start.rates.memory_gb_s,
        &mut start.rates.decode_gb_s,
        &mut start.rates.layer_us,
    ] {
        *rate *= 0.6;
    }
    let found = start.refined(&figures(truth)).rates;
    let near = |one: f64, other: f64| (one / other - 1.0).abs() < 0.02;
    let (found, expected) = (serde_json::json!(found), serde_json::json!(truth.rates));
    for (name, expected) in expected.as_object().expect("rates") {
        let (found, expected) = (found[name].as_f64().expect("a number"), expected.as_f64().expect("a number"));
        assert!(near(found, expected), "{name}: {found} is not {expected}");
    }
    assert_eq!(found.get("weights_gb_s"), expected.get("weights_gb_s"));
    let unsaid = Figures { weights_gb_s: None, ..figures(truth) };
    assert_eq!(start.refined(&unsaid).rates.weights_gb_s, start.rates.weights_gb_s);
    let none = start.refined(&Figures::default());
    assert_eq!(none, start);
}
