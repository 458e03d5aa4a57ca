//! The models that are published for long contexts, by shape: their own configurations with fewer layers, heads and vocabulary rows, random
//! weights in bf16 shards, run through `apbd forward`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

const VOCAB: usize = 160;
const LAYERS: usize = 2;

/// What is scaled down: heads stay in proportion to KV heads, a head keeps its size.
fn smaller(mut config: Value, heads: usize, kv_heads: usize) -> Value {
    for (name, size) in [
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("hidden_size", heads * 128),
        ("intermediate_size", heads * 96),
        ("num_hidden_layers", LAYERS),
        ("vocab_size", VOCAB),
    ] {
        config[name] = json!(size);
    }
    config
}

fn llama_3_1_8b_instruct() -> Value {
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": scaling, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256
    });
    smaller(config, 8, 2)
}

fn llama_3_8b_1m() -> Value {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 1048576, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 3580165449.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256
    });
    smaller(config, 8, 2)
}

fn qwen_2_5_14b_instruct() -> Value {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 5120, "intermediate_size": 13824, "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2",
        "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": { "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn" },
        "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 152064
    });
    smaller(config, 10, 2)
}

fn yi_34b_200k() -> Value {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 20480, "max_position_embeddings": 200000, "model_type": "llama", "num_attention_heads": 56,
        "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_scaling": null,
        "rope_theta": 10000000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 64000
    });
    smaller(config, 7, 1)
}

/// Names and shapes of all tensors.
fn tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |name: &str| config[name].as_u64().expect("a size") as usize;
    let (hidden, inner) = (size("hidden_size"), size("intermediate_size"));
    let (q, kv) = (size("num_attention_heads") * 128, size("num_key_value_heads") * 128);
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![VOCAB, hidden]),
    ];
    for layer in 0..LAYERS {
        let mut add = |part: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{part}"), shape.to_vec()));
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            if config["model_type"] == "qwen2" {
                add(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
        }
        add("self_attn.o_proj.weight", &[hidden, q]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
    }
    all
}

/// A directory as published: configuration, index, two shards.
fn publish(config: &Value, directory: &Path) {
    let rng = &mut StdRng::seed_from_u64(1);
    let all = tensors(config);
    let mut weight_map = HashMap::new();
    for (i, part) in all.chunks(all.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let data: Vec<Vec<u8>> = part.iter().map(|(name, shape)| random(rng, name, shape)).collect();
        let views = part.iter().zip(&data).map(|((name, shape), data)| {
            (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).expect("a tensor"))
        });
        safetensors::serialize_to_file(views, None, &directory.join(&name)).expect("written");
        weight_map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    fs::write(directory.join("model.safetensors.index.json"), index.to_string()).expect("written");
    fs::write(directory.join("config.json"), config.to_string()).expect("written");
}

fn random(rng: &mut StdRng, name: &str, shape: &[usize]) -> Vec<u8> {
    let fan_in = *shape.last().expect("a shape") as f32;
    let (centre, spread) = match shape.len() {
        1 if name.contains("norm") => (1.0, 0.1),
        1 => (0.0, 0.5),
        _ => (0.0, 2.0 / fan_in.sqrt()),
    };
    let count: usize = shape.iter().product();
    (0..count).flat_map(|_| bf16::from_f32(centre + spread * rng.random_range(-1.0..1.0_f32)).to_le_bytes()).collect()
}

/// Output of `apbd forward` on 600 tokens.
fn forward(directory: &Path, arguments: &[&str]) -> Value {
    let rng = &mut StdRng::seed_from_u64(2);
    let ids = |count: usize, rng: &mut StdRng| (0..count).map(|_| rng.random_range(0..VOCAB)).collect::<Vec<_>>();
    let input = json!({ "context": ids(580, rng), "query": ids(20, rng) });
    fs::write(directory.join("input.json"), input.to_string()).expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_apbd"))
        .args(["forward", "--steps", "3", "--threads", "2"])
        .arg("--model")
        .arg(directory)
        .arg("--input")
        .arg(directory.join("input.json"))
        .args(arguments)
        .output()
        .expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn logits(output: &Value) -> Vec<f64> {
    output["last_logits"].as_array().expect("logits").iter().map(|logit| logit.as_f64().expect("finite")).collect()
}

/// Greatest difference, relative to the greatest logit.
fn difference(a: &Value, b: &Value) -> f64 {
    let (a, b) = (logits(a), logits(b));
    let scale = a.iter().fold(0.0_f64, |most, logit| most.max(logit.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale
}

fn runs_as_published(config: &Value) {
    let directory = TempDir::new().expect("a temporary directory");
    publish(config, directory.path());
    let full = forward(directory.path(), &["--attention", "full"]);
    assert_eq!(logits(&full).len(), VOCAB);
    let ring = forward(directory.path(), &["--attention", "ring", "--hosts", "3", "--ranks", "2"]);
    assert!(difference(&full, &ring) < 1e-3, "ring is exact");
    assert_eq!(full["greedy"], ring["greedy"]);
    let settings = ["--attention", "apb", "--hosts", "4", "--anchor", "64", "--passing", "32"];
    let apb = forward(directory.path(), &settings);
    let on_ranks = forward(directory.path(), &[&settings[..], &["--ranks", "3"]].concat());
    assert!(difference(&apb, &on_ranks) < 1e-3, "results do not depend on ranks");
    assert!(difference(&full, &apb) > 1e-3, "APB left something out");
}

#[test]
fn llama_3_1_8b_instruct_runs() {
    runs_as_published(&llama_3_1_8b_instruct());
}

#[test]
fn llama_3_8b_1m_runs() {
    runs_as_published(&llama_3_8b_1m());
}

#[test]
fn qwen_2_5_14b_instruct_runs() {
    runs_as_published(&qwen_2_5_14b_instruct());
}

#[test]
fn yi_34b_200k_runs() {
    runs_as_published(&yi_34b_200k());
}
