//! How fast a device and its network are: the rates that predictions divide by, and those of an H100.
//!
//! Invariant: every rate is positive and finite; where one comes from is said beside it.

use serde::{Deserialize, Serialize};

/// Rates of a device and of the network between devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The device it was measured on.
    pub device: String,
    /// Bytes of a device that weights and inferences may use.
    pub memory_bytes: u64,
    /// Rates of the operations.
    pub rates: Rates,
    /// Between the devices.
    pub network: Network,
}

/// Rates of one device.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// TFLOP/s of the projection to queries, keys and values.
    pub qkv_tflops: f64,
    /// TFLOP/s of the output projection.
    pub o_tflops: f64,
    /// TFLOP/s of the MLP, its activation included.
    pub ffn_tflops: f64,
    /// TFLOP/s of retaining heads, the selection of tokens included.
    pub retaining_head_tflops: f64,
    /// TFLOP/s of attention over one long causal block.
    pub causal_tflops: f64,
    /// TFLOP/s of attention over lists of segments: hosts with anchors and passing blocks.
    pub segments_tflops: f64,
    /// GB/s of operations bound by memory, read and written bytes together.
    pub memory_gb_s: f64,
    /// GB/s of keys and values read by a pass of few rows, and of weights.
    pub decode_gb_s: f64,
    /// Of weights, where those are read at another rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_gb_s: Option<f64>,
    /// GB/s of keys and values kept in FP8, in the bytes that they have there.
    pub decode_fp8_gb_s: f64,
    /// Microseconds of a layer that a pass of few rows needs beyond what its bytes take: starts and ends of its launches.
    pub layer_us: f64,
}

/// What connects the devices.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Devices of a node.
    pub gpus_per_node: usize,
    /// Between devices of a node.
    pub within: Link,
    /// Microseconds until partial results have come to all devices of a node and are one, beyond what their bytes take: devices write them into each
    /// other's memory.
    #[serde(default = "partials_us")]
    pub partials_us: f64,
    /// Between nodes, for each device.
    pub between: Link,
}

/// What two H100 and two H200 take for a token says so.
fn partials_us() -> f64 {
    7.0
}

/// One device's end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Microseconds from when a collective could begin until its first byte arrives, its launch included.
    pub latency_us: f64,
    /// GB/s in one direction.
    pub gb_s: f64,
    /// Whether it was measured; else it is what the hardware's makers and users say of such links.
    pub measured: bool,
}

/// A calibration that can not be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    /// A rate that nothing can be divided by.
    #[error("{field} is {value}; it has to be a positive number")]
    Rate { field: &'static str, value: f64 },
    /// Sizes that are not there.
    #[error("{field} is 0")]
    Zero { field: &'static str },
}

impl Rates {
    /// GB/s of weights read by a pass of few rows.
    pub fn weights_gb_s(&self) -> f64 {
        self.weights_gb_s.unwrap_or(self.decode_gb_s)
    }
}

impl Calibration {
    /// An H100 80GB HBM3. The rates are those of the stages of one prefill (Llama-3.1-8B shape, APB with 8 hosts, 128K tokens), of causal attention over 128K
    /// tokens alone, of a copy, and of a step of one token at 128K, in FP8 of two (`kernels/README.md` has the figures); how far other prefills and steps are
    /// off is held by tests. The link within a node is what the exchanges of Ulysses reach between two H200, which have the same NVLink, and the time until
    /// its first byte what the partial results of a token took there by NCCL; that between nodes is not measured: one
    /// adapter of 400 Gbit/s a device has 50 GB/s, and a byte is taken to be 10 µs longer on its way.
    pub fn h100() -> Self {
        Self {
            device: "NVIDIA H100 80GB HBM3".to_owned(),
            memory_bytes: 78 << 30,
            rates: Rates {
                qkv_tflops: 707.0,
                o_tflops: 721.0,
                ffn_tflops: 674.0,
                retaining_head_tflops: 371.0,
                causal_tflops: 661.0,
                segments_tflops: 603.0,
                memory_gb_s: 2700.0,
                decode_gb_s: 2968.0,
                weights_gb_s: None,
                decode_fp8_gb_s: 2800.0,
                layer_us: 27.0,
            },
            network: Network {
                gpus_per_node: 8,
                within: Link { latency_us: 30.0, gb_s: 225.0, measured: true },
                partials_us: partials_us(),
                between: Link { latency_us: 36.0, gb_s: 45.0, measured: false },
            },
        }
    }

    /// Checks what a file or a person said.
    pub fn check(&self) -> Result<(), CalibrationError> {
        let rates = &self.rates;
        let network = &self.network;
        let positive = [
            ("rates.qkv_tflops", rates.qkv_tflops),
            ("rates.o_tflops", rates.o_tflops),
            ("rates.ffn_tflops", rates.ffn_tflops),
            ("rates.retaining_head_tflops", rates.retaining_head_tflops),
            ("rates.causal_tflops", rates.causal_tflops),
            ("rates.segments_tflops", rates.segments_tflops),
            ("rates.memory_gb_s", rates.memory_gb_s),
            ("rates.decode_gb_s", rates.decode_gb_s),
            ("rates.weights_gb_s", rates.weights_gb_s()),
            ("rates.decode_fp8_gb_s", rates.decode_fp8_gb_s),
            ("network.within.gb_s", network.within.gb_s),
            ("network.between.gb_s", network.between.gb_s),
        ];
        let latencies = [
            ("rates.layer_us", rates.layer_us),
            ("network.within.latency_us", network.within.latency_us),
            ("network.partials_us", network.partials_us),
            ("network.between.latency_us", network.between.latency_us),
        ];
        let wrong = positive.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0));
        let wrong = wrong.or_else(|| latencies.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)));
        if let Some((field, value)) = wrong {
            return Err(CalibrationError::Rate { field, value });
        }
        match () {
            () if self.memory_bytes == 0 => Err(CalibrationError::Zero { field: "memory_bytes" }),
            () if network.gpus_per_node == 0 => Err(CalibrationError::Zero { field: "network.gpus_per_node" }),
            () => Ok(()),
        }
    }
}
