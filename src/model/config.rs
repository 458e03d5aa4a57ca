//! `config.json` and `generation_config.json`, in the forms that `transformers` has written over the years.
//!
//! Invariant: what is not understood is refused by name; a default is taken only where the format itself defines one.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::rope;
use super::{ModelError, ModelSpec};
use crate::backend::HeadShape;

/// Families of models and how their configurations differ.
struct Family {
    name: &'static str,
    architecture: &'static str,
    /// Biases on q, k and v that are not in the configuration.
    always_qkv_bias: bool,
}

const FAMILIES: [Family; 2] = [
    Family { name: "llama", architecture: "LlamaForCausalLM", always_qkv_bias: false },
    Family { name: "qwen2", architecture: "Qwen2ForCausalLM", always_qkv_bias: true },
];

impl ModelSpec {
    /// Reads the configuration of a model directory.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let config = Config::read(directory.join("config.json"))?;
        let family = family(&config)?;
        refuse_unsupported(&config)?;
        let shape = head_shape(&config)?;
        let max_positions = config.size("max_position_embeddings")?;
        // Llama's bias switch covers the output projection too; Qwen2 has biases on q, k and v whatever its configuration says.
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(Self {
            family: family.name.to_owned(),
            layers: config.size("num_hidden_layers")?,
            hidden: config.size("hidden_size")?,
            intermediate: config.size("intermediate_size")?,
            shape,
            vocab: config.size("vocab_size")?,
            epsilon: config.optional("rms_norm_eps", Value::as_f64, "a number")?.unwrap_or(1e-6) as f32,
            rope: rope::read(&config, shape.head_dim, max_positions)?,
            max_positions,
            qkv_bias: family.always_qkv_bias || attention_bias,
            o_bias: !family.always_qkv_bias && attention_bias,
            tied_embeddings: config.flag("tie_word_embeddings", false)?,
            stop_tokens: stop_tokens(directory, &config)?,
        })
    }
}

fn family(config: &Config) -> Result<&'static Family, ModelError> {
    let architectures: Vec<&str> = match config.value("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let model_type = config.value("model_type").and_then(Value::as_str).unwrap_or_default();
    let is_known = |family: &&Family| match architectures.first() {
        Some(architecture) => *architecture == family.architecture,
        None => model_type == family.name,
    };
    FAMILIES.iter().find(is_known).ok_or_else(|| {
        let given = architectures.first().copied().unwrap_or(model_type);
        let known = FAMILIES.map(|family| family.architecture).join(" and ");
        config.error("architectures", &format!("'{given}' is not supported; {known} are"))
    })
}

/// Switches that would change the arithmetic.
fn refuse_unsupported(config: &Config) -> Result<(), ModelError> {
    if config.flag("mlp_bias", false)? {
        return Err(config.error("mlp_bias", "biases in the MLP are not supported"));
    }
    if config.flag("use_sliding_window", false)? {
        return Err(config.error("use_sliding_window", "sliding-window attention is not supported"));
    }
    if config.value("quantization_config").is_some() {
        return Err(
            config.error("quantization_config", "quantised weights are not supported; use the f32, f16 or bf16 ones")
        );
    }
    let activation = config.optional("hidden_act", Value::as_str, "a string")?.unwrap_or("silu");
    if activation != "silu" {
        return Err(config.error("hidden_act", &format!("'{activation}' is not supported; silu is")));
    }
    Ok(())
}

fn head_shape(config: &Config) -> Result<HeadShape, ModelError> {
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    let hidden = config.size("hidden_size")?;
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(config.error("num_attention_heads", &format!("{heads} does not divide hidden_size {hidden}")));
        }
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(
            config.error("num_key_value_heads", &format!("{kv_heads} does not divide num_attention_heads {heads}"))
        );
    }
    if !head_dim.is_multiple_of(2) {
        return Err(config.error("head_dim", &format!("{head_dim} is odd, but RoPE rotates pairs")));
    }
    Ok(HeadShape { heads, kv_heads, head_dim })
}

/// From `generation_config.json` if it names any, else from `config.json`.
fn stop_tokens(directory: &Path, config: &Config) -> Result<Vec<u32>, ModelError> {
    let path = directory.join("generation_config.json");
    if path.is_file() {
        let generation = Config::read(path)?;
        if generation.value("eos_token_id").is_some() {
            return token_ids(&generation);
        }
    }
    token_ids(config)
}

/// `eos_token_id`: one id, a list of ids, or none.
fn token_ids(config: &Config) -> Result<Vec<u32>, ModelError> {
    let one = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| config.error("eos_token_id", "expected a token id or a list of them"))
    };
    match config.value("eos_token_id") {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => one(id).map(|id| vec![id]),
    }
}

/// A JSON object and where it came from.
pub(super) struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    fn read(path: PathBuf) -> Result<Self, ModelError> {
        let failed = |reason: String| ModelError::File { path: path.clone(), reason };
        let text = fs::read_to_string(&path).map_err(|error| failed(error.to_string()))?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Self { path, fields }),
            Ok(_) => Err(failed("expected a JSON object".to_owned())),
            Err(error) => Err(failed(format!("no valid JSON: {error}"))),
        }
    }

    /// A field that is an object of its own; absent and `null` are the same.
    pub fn section(&self, name: &str) -> Result<Option<Self>, ModelError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self { path: self.path.clone(), fields: fields.clone() })),
            Some(_) => Err(self.error(name, "expected an object")),
        }
    }

    /// A field; absent and `null` are the same.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    pub fn error(&self, field: &str, reason: &str) -> ModelError {
        ModelError::Config { path: self.path.clone(), field: field.to_owned(), reason: reason.to_owned() }
    }

    /// A field of one type, if it is there.
    pub fn optional<'a, T>(
        &'a self,
        name: &str,
        read: impl Fn(&'a Value) -> Option<T>,
        wanted: &str,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(name, &format!("expected {wanted}, got {value}")))
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>, ModelError> {
        self.optional(name, Value::as_f64, "a number")
    }

    pub fn flag(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.optional(name, Value::as_bool, "true or false")?.unwrap_or(default))
    }

    fn optional_size(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let positive = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        self.optional(name, positive, "a positive integer")
    }

    fn size(&self, name: &str) -> Result<usize, ModelError> {
        self.optional_size(name)?.ok_or_else(|| self.error(name, "is missing"))
    }
}
