//! Configurations as published, broken ones, and broken weights.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::weights::Weights;
use super::*;
use crate::backend::cpu::Cpu;

/// What every configuration here has.
fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": 7
    })
}

fn with(changes: Value) -> Value {
    let mut config = base();
    for (name, value) in changes.as_object().expect("an object") {
        config[name] = value.clone();
    }
    config
}

fn directory(config: &Value) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    fs::write(directory.path().join("config.json"), config.to_string()).expect("written");
    directory
}

fn load(config: &Value) -> Result<ModelSpec, ModelError> {
    ModelSpec::load(directory(config).path())
}

#[track_caller]
fn refused(changes: Value, parts: &[&str]) {
    let error = load(&with(changes)).expect_err("refused").to_string();
    for part in parts.iter().chain(&["config.json"]) {
        assert!(error.contains(part), "'{error}' does not say '{part}'");
    }
}

#[test]
fn old_and_new_forms_mean_the_same() {
    let scaling = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
    let mut old = scaling.clone();
    old["type"] = json!("llama3");
    let mut new = scaling;
    new["rope_type"] = json!("llama3");
    new["rope_theta"] = json!(500_000.0);
    let old = load(&with(json!({ "rope_theta": 500_000.0, "rope_scaling": old, "torch_dtype": "bfloat16" })))
        .expect("old form");
    let new = load(&with(json!({ "rope_parameters": new, "dtype": "bfloat16" }))).expect("new form");
    assert_eq!(old, new);
    assert_eq!(old.rope.inv_freq.len(), 4);
}

#[test]
fn families_differ_in_biases_and_head_sizes() {
    let llama = load(&with(json!({ "attention_bias": true, "head_dim": 16 }))).expect("llama");
    assert!(llama.qkv_bias && llama.o_bias && llama.shape.head_dim == 16);
    let qwen =
        load(&with(json!({ "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": true }))).expect("qwen2");
    assert!(qwen.qkv_bias && !qwen.o_bias && qwen.tied_embeddings && qwen.shape.head_dim == 8);
    assert_eq!((qwen.family.as_str(), qwen.stop_tokens), ("qwen2", vec![7]));
}

#[test]
fn stop_tokens_of_the_generation_config_come_first() {
    let directory = directory(&base());
    fs::write(directory.path().join("generation_config.json"), r#"{"eos_token_id": [3, 4]}"#).expect("written");
    assert_eq!(ModelSpec::load(directory.path()).expect("loads").stop_tokens, [3, 4]);
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let plain = load(&base()).expect("loads").rope;
    let linear = load(&with(json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }))).expect("loads").rope;
    for (plain, linear) in plain.inv_freq.iter().zip(&linear.inv_freq) {
        assert!((plain / 4.0 - linear).abs() < 1e-9);
    }
}

#[test]
fn yarn_keeps_fast_pairs_stretches_slow_ones_and_scales_attention() {
    let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768 });
    let changes = json!({ "head_dim": 128, "rope_theta": 1e6, "rope_scaling": scaling });
    let (plain, yarn) = (load(&with(json!({ "head_dim": 128, "rope_theta": 1e6 }))), load(&with(changes)));
    let (plain, yarn) = (plain.expect("loads").rope, yarn.expect("loads").rope);
    assert_eq!(plain.inv_freq[0], yarn.inv_freq[0]);
    assert!((plain.inv_freq[63] / 4.0 - yarn.inv_freq[63]).abs() < 1e-9);
    assert!((yarn.scale - (0.1 * 4.0_f32.ln() + 1.0)).abs() < 1e-6);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    refused(
        json!({ "architectures": ["MambaForCausalLM"] }),
        &["architectures", "MambaForCausalLM", "LlamaForCausalLM"],
    );
    refused(json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), &["rope_type", "dynamic"]);
    refused(json!({ "rope_scaling": { "type": "linear" } }), &["factor", "missing"]);
    refused(json!({ "mlp_bias": true }), &["mlp_bias"]);
    refused(json!({ "use_sliding_window": true }), &["sliding"]);
    refused(json!({ "quantization_config": { "bits": 4 } }), &["quantization_config"]);
    refused(json!({ "hidden_act": "gelu" }), &["hidden_act", "gelu"]);
    refused(json!({ "num_key_value_heads": 3 }), &["num_key_value_heads", "3"]);
    refused(json!({ "vocab_size": "many" }), &["vocab_size", "positive integer"]);
    refused(json!({ "hidden_size": null }), &["hidden_size", "missing"]);
}

#[test]
fn files_that_are_no_configuration_are_named() {
    let directory = TempDir::new().expect("a temporary directory");
    let error = ModelSpec::load(directory.path()).expect_err("nothing there").to_string();
    assert!(error.contains("config.json"), "{error}");
    fs::write(directory.path().join("config.json"), "{").expect("written");
    let error = ModelSpec::load(directory.path()).expect_err("no JSON").to_string();
    assert!(error.contains("no valid JSON"), "{error}");
}

/// The tiny model of a golden, copied so that it can be damaged.
fn golden() -> TempDir {
    let copy = TempDir::new().expect("a temporary directory");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/goldens/llama-3.1");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), copy.path().join(name)).expect("copied");
    }
    copy
}

fn weights(directory: &Path) -> Result<Weights<Cpu>, ModelError> {
    let spec = ModelSpec::load(directory).expect("a good configuration");
    Weights::load(&Cpu::new(1).expect("a thread"), directory, &spec, None)
}

#[track_caller]
fn weights_refused(directory: &Path, parts: &[&str]) {
    let error = weights(directory).err().expect("refused").to_string();
    for part in parts {
        assert!(error.contains(part), "'{error}' does not say '{part}'");
    }
}

#[test]
fn damaged_weights_are_refused_with_the_tensor_or_file() {
    let copy = golden();
    assert!(weights(copy.path()).is_ok());
    let file = copy.path().join("model.safetensors");
    let whole = fs::read(&file).expect("read");
    fs::write(&file, &whole[..whole.len() - 100]).expect("written");
    weights_refused(copy.path(), &["model.safetensors", "no complete safetensors file"]);
    let mut poisoned = whole.clone();
    let end = poisoned.len();
    poisoned[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, &poisoned).expect("written");
    weights_refused(copy.path(), &["tensor", "finite", "NaN"]);
    fs::write(&file, &whole).expect("written");
    let config = fs::read_to_string(copy.path().join("config.json")).expect("read");
    fs::write(
        copy.path().join("config.json"),
        config.replace("\"intermediate_size\": 96", "\"intermediate_size\": 80"),
    )
    .expect("written");
    weights_refused(copy.path(), &["mlp.gate_proj.weight", "[80, 64]", "[96, 64]"]);
    fs::remove_file(&file).expect("removed");
    weights_refused(copy.path(), &["model.safetensors.index.json"]);
}

#[test]
fn shards_are_found_through_their_index_and_only_beside_it() {
    let copy = golden();
    fs::rename(copy.path().join("model.safetensors"), copy.path().join("part-1.safetensors")).expect("renamed");
    let index = |name: &str| {
        let index = json!({ "metadata": {}, "weight_map": { "model.norm.weight": name } });
        fs::write(copy.path().join("model.safetensors.index.json"), index.to_string()).expect("written");
    };
    index("part-1.safetensors");
    assert!(weights(copy.path()).is_ok());
    index("../part-1.safetensors");
    weights_refused(copy.path(), &["'../part-1.safetensors'", "same directory"]);
    index("part-2.safetensors");
    weights_refused(copy.path(), &["part-2.safetensors"]);
}

#[test]
fn retaining_heads_of_the_fixture_model_load() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let spec = ModelSpec::load(&directory).expect("loads");
    let backend = Cpu::new(1).expect("a thread");
    let weights = Weights::load(&backend, &directory, &spec, Some(&directory.join(HEADS_FILE))).expect("loads");
    let heads = weights.retaining_heads.expect("they were asked for");
    assert_eq!((heads.len(), heads[0].w1.rows(), heads[0].w2.rows()), (8, 128, 2));
}
