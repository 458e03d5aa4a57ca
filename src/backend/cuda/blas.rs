//! Matrix products by cuBLASLt: bf16 operands, f32 sums.
//!
//! An algorithm is chosen once for each shape and kept.
//! Invariant: the library never sees a shape it was not asked about first; one product is issued at a time.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::arena::{Arena, Piece};
use super::driver::Stream;
use crate::BackendError;

/// What the library advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLAS_OP_T`, which the binding of cuBLASLt does not have.
const TRANSPOSED: i32 = 1;
/// Shapes that are kept; a document brings a few dozen.
const MOST_PLANS: usize = 1024;

fn failed(error: CublasError) -> BackendError {
    BackendError::Device { op: "linear", reason: format!("cuBLASLt: {:?}", error.0) }
}

/// The form of a product: `out [rows, width] = x [rows, inner] · wᵀ`, `w` being `[width, inner]`. Any of them may be columns of a wider matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    pub rows: usize,
    pub width: usize,
    pub inner: usize,
    /// Elements from a row of `w` to the next.
    pub w_stride: usize,
    /// Elements from a row of `out` to the next.
    pub out_stride: usize,
    /// `out` is f32, else bf16.
    pub wide: bool,
    /// A vector `[width]` is added to each row.
    pub bias: bool,
    /// The product is added to what `out` holds.
    pub accumulate: bool,
}

impl Form {
    /// A plain product of whole matrices, to bf16.
    pub fn new(rows: usize, width: usize, inner: usize) -> Self {
        Self { rows, width, inner, w_stride: inner, out_stride: width, wide: false, bias: false, accumulate: false }
    }
}

/// Device addresses of a product's matrices; `bias` is 0 where the form has none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub x: u64,
    pub w: u64,
    pub bias: u64,
    pub out: u64,
}

/// The library, with its workspace.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Piece,
    plans: Mutex<HashMap<Form, Plan>>,
}

// SAFETY: the handle may be used by any thread.
unsafe impl Send for Blas {}
// SAFETY: as above; descriptors are used under the lock only.
unsafe impl Sync for Blas {}

/// Descriptors of a form, with the algorithm. The library is column-major: it computes outᵀ = w xᵀ.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    /// Opens the library. Its absence is `Unavailable`.
    pub fn new(arena: &Arc<Arena>) -> Result<Self, BackendError> {
        // SAFETY: (1) looking for a library runs its constructors only; cuBLASLt's are harmless.
        if !unsafe { sys::is_culib_present() } {
            return Err(BackendError::Unavailable("cuBLASLt 13 (libcublasLt.so) was not found".to_owned()));
        }
        let workspace = arena.take("cuBLASLt workspace", WORKSPACE_BYTES)?;
        Ok(Self { handle: result::create_handle().map_err(failed)?, workspace, plans: Mutex::default() })
    }

    /// Issues a product.
    ///
    /// # Safety
    /// 1. The operands have the form's shapes and stay allocated until the stream has passed the product.
    pub unsafe fn multiply(&self, stream: &Stream, form: Form, operands: Operands) -> Result<(), BackendError> {
        stream.bind("linear")?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= MOST_PLANS && !plans.contains_key(&form) {
            plans.clear();
        }
        let plan = match plans.entry(form) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Plan::new(self.handle, form)?),
        };
        if form.bias {
            plan.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        let (one, beta) = (1f32, if form.accumulate { 1f32 } else { 0f32 });
        let (pointer, scalar) = (|at: u64| at as *mut c_void, |value: &f32| std::ptr::from_ref(value).cast::<c_void>());
        // SAFETY: (1) operands by the caller; descriptors live in the plan; the algorithm was chosen for them, within the workspace's size.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                scalar(&one),
                scalar(&beta),
                pointer(operands.w),
                plan.w,
                pointer(operands.x),
                plan.x,
                pointer(operands.out),
                plan.out,
                pointer(operands.out),
                plan.out,
                &plan.algorithm,
                pointer(self.workspace.address()),
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        }
        .map_err(failed)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: (1) made once; the backend has synchronised its stream. There is nobody left to act on a failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, form: Form) -> Result<Self, BackendError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let layout = |kind, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(kind, rows as u64, cols as u64, stride as i64).map_err(failed)
        };
        let out_kind = if form.wide { CUDA_R_32F } else { CUDA_R_16BF };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut plan = Self {
            product: result::create_matmul_desc(compute, CUDA_R_32F).map_err(failed)?,
            w: layout(CUDA_R_16BF, form.inner, form.width, form.w_stride)?,
            x: layout(CUDA_R_16BF, form.inner, form.rows, form.inner)?,
            out: layout(out_kind, form.width, form.rows, form.out_stride)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if form.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        plan.algorithm = plan.choose(handle)?;
        Ok(plan)
    }

    fn set<T>(&mut self, which: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), BackendError> {
        // SAFETY: (1) the descriptor lives; (2) `value` has the attribute's size.
        unsafe {
            result::set_matmul_desc_attribute(self.product, which, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
        .map_err(failed)
    }

    fn choose(&self, handle: sys::cublasLtHandle_t) -> Result<sys::cublasLtMatmulAlgo_t, BackendError> {
        let preference = result::create_matmul_pref().map_err(failed)?;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: (1) all descriptors live; (2) the workspace's size is a usize, as the attribute wants.
        let chosen = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                most,
                std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                result::get_matmul_algo_heuristic(handle, self.product, self.w, self.x, self.out, self.out, preference)
            })
        };
        // SAFETY: (1) made above, not used again.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        Ok(chosen.map_err(failed)?.algo)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: (1) each was made once and is not used again.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
