//! The driver, thinly: context, stream, events, modules, copies. Everything that calls libcuda is here.
//!
//! Invariant: a missing library or device is an error, never a panic; every return code is checked; handles are
//! released in the reverse order of their making.
#![allow(unsafe_code)]

use std::ffi::{CString, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::BackendError;

/// What a driver call's failure means to the caller of `op`.
pub(super) fn failed(op: &'static str) -> impl Fn(DriverError) -> BackendError {
    move |error| {
        let describe =
            |text: Result<&std::ffi::CStr, DriverError>| text.map_or("?".into(), |t| t.to_string_lossy().into_owned());
        BackendError::Device {
            op,
            reason: format!("{}: {}", describe(error.error_name()), describe(error.error_string())),
        }
    }
}

/// A device and its primary context.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// Name of the device, as the driver gives it.
    pub name: String,
    /// Major * 10 + minor.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory of one of them, bytes.
    pub shared_bytes: usize,
}

// SAFETY: a context is a handle; the driver allows any thread to make it current.
unsafe impl Send for Context {}
// SAFETY: as above; the calls made through a shared reference are thread-safe in the driver.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the `ordinal`-th device. `Unavailable` says what is missing: the driver, its initialisation, the device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, BackendError> {
        let unavailable = |what: String| BackendError::Unavailable(format!("cuda:{ordinal}: {what}"));
        start_driver().map_err(unavailable)?;
        let count = result::device::get_count().map_err(failed("open"))?;
        let index = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if index >= count {
            return Err(unavailable(format!("no such device, the driver sees {count}")));
        }
        let device = result::device::get(index).map_err(failed("open"))?;
        let name = result::device::get_name(device).map_err(failed("open"))?;
        let attribute = |which| {
            // SAFETY: (1) `device` came from the driver.
            unsafe { result::device::get_attribute(device, which) }
                .map_err(failed("open"))
                .map(|value| value.unsigned_abs())
        };
        use sys::CUdevice_attribute as Attribute;
        let capability = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as usize;
        // SAFETY: (1) `device` came from the driver; (2) released in Drop.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(failed("open"))?;
        let context = Arc::new(Self { device, raw, name, capability, multiprocessors, shared_bytes });
        context.bind("open")?;
        Ok(context)
    }

    /// Makes the context current on this thread; cheap, and asked before every call.
    pub fn bind(&self, op: &'static str) -> Result<(), BackendError> {
        // SAFETY: (1) the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.raw) }.map_err(failed(op))
    }

    /// Free and total bytes of the device.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.bind("memory")?;
        result::mem_get_info().map_err(failed("memory"))
    }

    /// One block of device memory.
    pub fn allocate(&self, bytes: usize) -> Result<u64, BackendError> {
        self.bind("allocate")?;
        // SAFETY: (1) contents are undefined, as the arena says of its own; (2) freed by `free`.
        unsafe { result::malloc_sync(bytes) }.map_err(|_| BackendError::OutOfMemory { op: "device memory", bytes })
    }

    /// Gives a block back.
    ///
    /// # Safety
    /// 1. `at` came from [`Context::allocate`] and nothing on the device uses it any more.
    pub unsafe fn free(&self, at: u64) {
        if self.bind("free").is_ok() {
            // SAFETY: (1) by the caller. A failure at this point has nobody left to act on it.
            let _ = unsafe { result::memory_free(at) };
        }
    }

    /// Lets kernels of this device read and write memory of another; `false` if there is no way to it.
    pub fn reach(&self, other: &Self) -> Result<bool, BackendError> {
        let (op, mut can) = ("peer memory", 0);
        // SAFETY: (1) both devices came from the driver; (2) the out-pointer is valid.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, other.device) }.result().map_err(failed(op))?;
        if can == 0 {
            return Ok(false);
        }
        self.bind(op)?;
        // SAFETY: (1) the context is retained as long as `other` lives, and its memory is used no longer.
        match unsafe { sys::cuCtxEnablePeerAccess(other.raw, 0) }.result() {
            Ok(()) | Err(DriverError(sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_TOO_MANY_PEERS)) => Ok(false),
            Err(error) => Err(failed(op)(error)),
        }
    }

    /// Loads a cubin.
    pub fn load(self: &Arc<Self>, image: &[u8]) -> Result<Module, BackendError> {
        self.bind("load kernels")?;
        let mut aligned = vec![0u64; image.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..image.len()].copy_from_slice(image);
        // SAFETY: (1) the image is a whole cubin, compiled by kernels/build.rs; the driver copies it.
        let raw = unsafe { result::module::load_data(aligned.as_ptr().cast()) }.map_err(failed("load kernels"))?;
        Ok(Module { raw, _context: self.clone() })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: (1) retained once, in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// How fast the link from one device to another is: 0 is the fastest there is, absent is none at all.
pub(super) fn link(from: usize, to: usize) -> Result<Option<u32>, BackendError> {
    use sys::CUdevice_P2PAttribute as Attribute;
    let device = |ordinal: usize| {
        result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(failed("links between devices"))
    };
    let (from, to) = (device(from)?, device(to)?);
    let ask = |which| {
        let mut value = 0;
        // SAFETY: (1) both devices came from the driver; (2) the out-pointer is valid.
        unsafe { sys::cuDeviceGetP2PAttribute(&mut value, which, from, to) }
            .result()
            .map_err(failed("links between devices"))
            .map(|()| value)
    };
    if ask(Attribute::CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED)? == 0 {
        return Ok(None);
    }
    Ok(Some(ask(Attribute::CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK)?.unsigned_abs()))
}

/// Finds and initialises the driver; more than once does no harm. The kernels and cuBLASLt are of CUDA 13.0.
pub(super) fn start_driver() -> Result<(), String> {
    // SAFETY: (1) looking for a library runs its constructors only; libcuda's are harmless.
    if !unsafe { sys::is_culib_present() } {
        return Err("this machine has no NVIDIA driver (libcuda.so was not found)".to_owned());
    }
    result::init().map_err(|e| format!("the NVIDIA driver does not start: {e:?}"))?;
    let mut version = 0;
    // SAFETY: (1) the out-pointer is valid.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|e| format!("the NVIDIA driver gives no version: {e:?}"))?;
    if version < 13000 {
        return Err(format!(
            "the NVIDIA driver is for CUDA {}.{}, 13.0 is needed",
            version / 1000,
            version % 1000 / 10
        ));
    }
    Ok(())
}

/// A loaded cubin.
pub(super) struct Module {
    raw: sys::CUmodule,
    _context: Arc<Context>,
}

// SAFETY: a module is a handle that is only looked into.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// A kernel by its name, launched with `shared_bytes` of dynamic shared memory; made ready for up to `most_bytes` if that is more.
    pub fn function(
        &self,
        name: &'static str,
        shared_bytes: usize,
        most_bytes: usize,
    ) -> Result<Function, BackendError> {
        let c_name = CString::new(name).map_err(|e| BackendError::Device { op: name, reason: e.to_string() })?;
        // SAFETY: (1) the module is loaded.
        let raw = unsafe { result::module::get_function(self.raw, c_name) }.map_err(failed(name))?;
        let most_bytes = most_bytes.max(shared_bytes);
        if most_bytes > 48 << 10 {
            use sys::CUfunction_attribute as Attribute;
            // All of a multiprocessor's shared memory, so that it holds as many blocks as fit; kernels that need less run beside them as it is.
            for (attribute, value) in [
                (Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most_bytes as i32),
                (Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ] {
                // SAFETY: (1) the function belongs to a loaded module.
                unsafe { result::function::set_function_attribute(raw, attribute, value) }.map_err(failed(name))?;
            }
        }
        Ok(Function {
            raw,
            name,
            shared_bytes: shared_bytes as u32,
            most_shared_bytes: most_bytes as u32,
            overlaps: false,
        })
    }
}

/// A kernel that is ready to be launched.
#[derive(Clone, Copy)]
pub(super) struct Function {
    raw: sys::CUfunction,
    name: &'static str,
    shared_bytes: u32,
    most_shared_bytes: u32,
    overlaps: bool,
}

impl Function {
    /// Lets launches begin while the kernel before is still at work.
    ///
    /// # Safety
    /// 1. The kernel waits for earlier grids before it touches what a kernel may write (kernels/ptx/simt.cuh), and the device is of
    ///    capability 9.0 or later.
    pub unsafe fn overlapping(self) -> Self {
        Self { overlaps: true, ..self }
    }

    /// The same with at least so much dynamic shared memory, as far as it was made ready for it.
    pub fn with_shared(self, bytes: usize) -> Self {
        Self { shared_bytes: self.shared_bytes.max((bytes as u32).min(self.most_shared_bytes)), ..self }
    }
}

// SAFETY: a function is a handle into its module, which the backend keeps for as long.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// The parameters of a launch: a pointer to each value.
macro_rules! parameters {
    ($($value:expr),* $(,)?) => {
        &mut [$(std::ptr::from_ref(&$value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use parameters;

/// Blocks of a launch in x, y, z.
pub(super) type Grid = (usize, usize, usize);

/// A stream: operations on it are done in the order of their issue.
pub(super) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a stream is a handle; the driver serialises what threads issue on it.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not synchronise with the default one.
    pub fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        context.bind("stream")?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("stream"))?;
        Ok(Self { raw, context: context.clone() })
    }

    /// Makes the stream's context current on this thread.
    pub fn bind(&self, op: &'static str) -> Result<(), BackendError> {
        self.context.bind(op)
    }

    /// The handle as cuBLASLt takes it.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Launches `function` on `grid` blocks of `threads` threads. An empty grid is no launch.
    ///
    /// # Safety
    /// 1. `parameters` point to values of exactly the kernel's parameter types, in order.
    /// 2. Device memory the kernel touches stays allocated until the stream has passed the launch.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: Grid,
        threads: usize,
        parameters: &mut [*mut c_void],
    ) -> Result<(), BackendError> {
        if grid.0 * grid.1 * grid.2 == 0 {
            return Ok(());
        }
        self.context.bind(function.name)?;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: function.shared_bytes,
            hStream: self.raw,
            attrs: &mut overlap,
            numAttrs: u32::from(function.overlaps),
        };
        // SAFETY: (1), (2) by the caller; the function's module is loaded, and the driver reads the configuration before it returns.
        let code =
            unsafe { sys::cuLaunchKernelEx(&config, function.raw, parameters.as_mut_ptr(), std::ptr::null_mut()) };
        code.result().map_err(failed(function.name))
    }

    /// Copies host memory to the device. The driver has taken pageable memory over when this returns; pinned memory has to stay unchanged
    /// until the stream has passed the copy.
    ///
    /// # Safety
    /// 1. `to` has room for `from`.
    pub unsafe fn upload(&self, op: &'static str, from: &[u8], to: u64) -> Result<(), BackendError> {
        self.context.bind(op)?;
        // SAFETY: (1) by the caller.
        unsafe { result::memcpy_htod_async(to, from, self.raw) }.map_err(failed(op))
    }

    /// Copies device memory to the host and waits for it, and so for everything issued before.
    ///
    /// # Safety
    /// 1. `from` has as many bytes as `to`.
    pub unsafe fn download(&self, op: &'static str, from: u64, to: &mut [u8]) -> Result<(), BackendError> {
        self.context.bind(op)?;
        // SAFETY: (1) by the caller; `to` is borrowed until the synchronisation below.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw) }.map_err(failed(op))?;
        self.synchronize(op)
    }

    /// Copies within the device.
    ///
    /// # Safety
    /// 1. Both ranges are allocated and do not overlap.
    pub unsafe fn copy(&self, op: &'static str, from: u64, to: u64, bytes: usize) -> Result<(), BackendError> {
        self.context.bind(op)?;
        // SAFETY: (1) by the caller.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw) }.map_err(failed(op))
    }

    /// Fills device memory.
    ///
    /// # Safety
    /// 1. The range is allocated.
    pub unsafe fn fill(&self, op: &'static str, at: u64, value: u8, bytes: usize) -> Result<(), BackendError> {
        self.context.bind(op)?;
        // SAFETY: (1) by the caller.
        unsafe { result::memset_d8_async(at, value, bytes, self.raw) }.map_err(failed(op))
    }

    /// What is issued from here on comes after `event`, which may be of another stream.
    pub fn wait(&self, event: &Event) -> Result<(), BackendError> {
        self.context.bind("event")?;
        // SAFETY: (1) both handles live; the driver keeps what the stream still needs of the event.
        unsafe { result::stream::wait_event(self.raw, event.raw, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("event"))
    }

    /// Waits until everything issued has been done.
    pub fn synchronize(&self, op: &'static str) -> Result<(), BackendError> {
        self.context.bind(op)?;
        // SAFETY: (1) the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed(op))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.synchronize("close").is_ok() {
            // SAFETY: (1) nothing is under way, and the handle is not used again.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point in a stream, with its time.
pub(super) struct Event {
    raw: sys::CUevent,
}

// SAFETY: an event is a handle.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event with timing.
    pub fn new(context: &Context) -> Result<Self, BackendError> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// An event without a time, which costs the device less.
    pub fn untimed(context: &Context) -> Result<Self, BackendError> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn with(context: &Context, flags: sys::CUevent_flags) -> Result<Self, BackendError> {
        context.bind("event")?;
        Ok(Self { raw: result::event::create(flags).map_err(failed("event"))? })
    }

    /// Whether the stream has passed the event.
    pub fn has_passed(&self) -> Result<bool, BackendError> {
        // SAFETY: (1) the handle lives.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(failed("event")(error)),
        }
    }

    /// Sets the event at the stream's present end.
    pub fn record(&self, stream: &Stream) -> Result<(), BackendError> {
        stream.context.bind("event")?;
        // SAFETY: (1) both handles live.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(failed("event"))
    }

    /// Waits on the host until the stream has passed the event.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        // SAFETY: (1) the handle lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("event"))
    }

    /// Milliseconds from `self` to `end`; both have to have happened.
    pub fn milliseconds_to(&self, end: &Self) -> Result<f32, BackendError> {
        // SAFETY: (1) both handles live.
        unsafe { result::event::elapsed(self.raw, end.raw) }.map_err(failed("event"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: (1) not used again; the driver keeps what a stream still needs.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Page-locked host memory, which the device reads at the bus's full speed.
pub(super) struct Pinned {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` of zeroed memory.
    pub fn new(context: &Context, bytes: usize) -> Result<Self, BackendError> {
        context.bind("pinned memory")?;
        // SAFETY: (1) zeroed before it is ever read.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|_| BackendError::OutOfMemory { op: "pinned memory", bytes })?;
        // SAFETY: (1) just allocated with this size.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Self { at: at.cast(), bytes })
    }

    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: (1) allocated with this size, initialised, borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// Its first four bytes as a word that the device may read at any time.
    pub fn word(&self) -> &AtomicU32 {
        assert!(self.bytes >= size_of::<u32>(), "a word of {} bytes", self.bytes);
        // SAFETY: (1) allocated with a page's alignment, initialised, borrowed with `self`; who asks for words asks for nothing else.
        unsafe { AtomicU32::from_ptr(self.at.cast()) }
    }

    /// Where a device sees it.
    pub fn address_on(&self, context: &Context) -> Result<u64, BackendError> {
        let (op, mut at) = ("pinned memory", 0);
        context.bind(op)?;
        // SAFETY: (1) the memory came from the driver; (2) the out-pointer is valid.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut at, self.at.cast(), 0) }.result().map_err(failed(op))?;
        Ok(at)
    }

    /// The memory, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: (1) as in `bytes`, and uniquely borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: (1) came from `malloc_host`; not used again.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}

/// A tensor map: how the copy engine of Hopper cuts boxes out of a matrix. Layout of `CUtensorMap`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    /// A map that is never used.
    pub const UNUSED: Self = Self([0; 16]);

    /// Boxes of `box_rows` rows by `box_blocks` blocks of 64 columns, with 128-byte swizzle, of the bf16 matrix of `rows` rows at `at` whose rows are
    /// `stride_bytes` apart and have `blocks` such blocks. What a box has beyond the last row is read as 0.
    pub fn new(
        at: u64,
        rows: usize,
        blocks: usize,
        stride_bytes: usize,
        box_rows: usize,
        box_blocks: usize,
    ) -> Result<Self, BackendError> {
        let size = [64, rows as u64, blocks as u64];
        let strides = [stride_bytes as u64, 128];
        let boxed = [64, box_rows as u32, box_blocks as u32];
        let steps = [1u32; 3];
        let mut map = MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: (1) all arrays have the rank's length; (2) the driver only reads them and writes the map.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                3,
                at as *mut c_void,
                size.as_ptr(),
                strides.as_ptr(),
                boxed.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        code.result().map_err(failed("tensor map"))?;
        // SAFETY: (1) written by the successful call above.
        Ok(Self(unsafe { map.assume_init() }.opaque))
    }
}
