//! The kernels, loaded: the cubins that the build embedded, and every function by name.
//!
//! Invariant: a function is launched by one typed wrapper only, beside the operation it serves.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::driver::{Context, Function, Module};
use crate::BackendError;

/// `(module, architecture, image)`, preferred architectures first.
const CUBINS: &[(&str, &str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// Kernels of decode, which are short and many: each may begin while the one before ends. All of them wait for earlier grids first.
const OVERLAPPING: &[&str] = &[
    "add_from_peers",
    "add_partials",
    "attention_combine",
    "attention_decode_128",
    "attention_decode_64",
    "attention_decode_32",
    "attention_decode_16",
    "attention_decode_fp8_128",
    "attention_decode_fp8_64",
    "choose_tokens",
    "gemv",
    "gemv_f32",
    "gemv_swiglu",
    "join_columns",
    "join_from_peers",
    "keep_fp8",
    "merge_from_peers",
    "merge_stacked",
    "rms_norm",
    "rope_store",
    "rope_store_each",
    "rope_store_each_fp8",
    "skinny_8",
    "skinny_16",
    "skinny_32",
    "skinny_f32_8",
    "skinny_f32_16",
    "skinny_f32_32",
    "skinny_swiglu_8",
    "skinny_swiglu_16",
    "skinny_swiglu_32",
];

/// The modules of one device.
pub(super) struct Modules {
    loaded: Vec<(&'static str, Module)>,
    can_overlap: bool,
    /// Shared memory of a multiprocessor, bytes.
    pub shared_bytes: usize,
}

impl Modules {
    /// Loads what this device can run.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let Some(architecture) = architecture_for(context.capability) else {
            return Err(BackendError::Unavailable(format!(
                "{} has compute capability {}.{}; the kernels are for 8.x and 9.0",
                context.name,
                context.capability / 10,
                context.capability % 10
            )));
        };
        let wanted = CUBINS.iter().filter(|(_, of, _)| *of == architecture);
        let loaded =
            wanted.map(|(name, _, image)| Ok((*name, context.load(image)?))).collect::<Result<_, BackendError>>()?;
        Ok(Self { loaded, can_overlap: context.capability >= 90, shared_bytes: context.shared_bytes })
    }

    /// Whether the device runs this module at all.
    pub fn has(&self, module: &str) -> bool {
        self.loaded.iter().any(|(name, _)| *name == module)
    }

    /// A function, ready to use `shared_bytes` of dynamic shared memory.
    pub fn function(&self, module: &str, name: &'static str, shared_bytes: usize) -> Result<Function, BackendError> {
        self.function_up_to(module, name, shared_bytes, 0)
    }

    /// The same of a function that may be launched with up to `most_bytes` instead.
    pub fn function_up_to(
        &self,
        module: &str,
        name: &'static str,
        shared_bytes: usize,
        most_bytes: usize,
    ) -> Result<Function, BackendError> {
        let found = self.loaded.iter().find(|(loaded, _)| *loaded == module);
        let (_, module) =
            found.ok_or_else(|| BackendError::Device { op: name, reason: format!("no module {module}") })?;
        let function = module.function(name, shared_bytes, most_bytes)?;
        match self.can_overlap && OVERLAPPING.contains(&name) {
            // SAFETY: (1) the listed kernels call wait_for_earlier_grids; the capability was asked for.
            true => Ok(unsafe { function.overlapping() }),
            false => Ok(function),
        }
    }
}

/// Cubins run within their major capability; those for 90a on 9.0 alone.
fn architecture_for(capability: u32) -> Option<&'static str> {
    match capability {
        80..90 => Some("80"),
        90 => Some("90a"),
        _ => None,
    }
}

macro_rules! functions {
    ($($name:ident in $module:literal;)*) => {
        /// Every kernel but those of attention.
        pub(super) struct Functions {
            $(pub $name: Function,)*
        }
        impl Functions {
            /// Looks all of them up.
            pub fn new(modules: &Modules) -> Result<Self, BackendError> {
                Ok(Self { $($name: modules.function($module, stringify!($name), 0)?,)* })
            }
        }
    };
}

functions! {
    convert_weights in "weights";
    random_bf16 in "random";
    embed in "embed";
    keep_fp8 in "kv_fp8";
    rms_norm in "rms_norm";
    rope_store in "rope_store";
    rope_store_each in "rope_store";
    rope_store_each_fp8 in "rope_store";
    swiglu in "swiglu";
    add_partials in "add_partials";
    gemv in "gemv";
    gemv_f32 in "gemv";
    gemv_swiglu in "gemv";
    retaining_scores in "retaining";
    query_mean in "query_aware";
    query_scores in "query_aware";
    top_k in "top_k";
    gather_kv in "gather_kv";
    add_from_peers in "peers";
    merge_from_peers in "peers";
    join_from_peers in "peers";
    join_columns in "join_columns";
    move_columns in "columns";
    quantize_kv in "passing_fp8";
    restore_kv in "passing_fp8";
    choose_tokens in "choose";
    merge in "merge";
    merge_stacked in "merge_stacked";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_cubins_it_can_run() {
        assert_eq!(
            [75, 80, 86, 89, 90, 100].map(architecture_for),
            [None, Some("80"), Some("80"), Some("80"), Some("90a"), None]
        );
    }

    #[test]
    fn every_module_is_there_for_both_architectures_but_hoppers_own() {
        let modules = |of| CUBINS.iter().filter(|c| c.1 == of).map(|c| c.0).collect::<Vec<_>>();
        let (ampere, hopper) = (modules("80"), modules("90a"));
        assert!(hopper.contains(&"attention/hopper"));
        assert_eq!(ampere, hopper.into_iter().filter(|name| *name != "attention/hopper").collect::<Vec<_>>());
    }
}
