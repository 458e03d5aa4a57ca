//! NCCL's library: found, opened, and its calls with their codes as errors.
//!
//! Invariant: a library or a function of it that is missing is an error that says where it was looked for, never a panic.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::offset_of;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use cudarc::nccl::sys;
use libloading::Library;

/// Where the library is, if it is not where the system looks.
pub const LIBRARY_VARIABLE: &str = "APBD_NCCL_LIBRARY";
/// NVLink multicast, which NCCL reads for itself.
const MULTICAST_VARIABLE: &str = "NCCL_NVLS_ENABLE";
/// Names that the system is asked for: what the wheel ships, and what a developer's package does.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

const SUCCESS: c_int = sys::ncclResult_t::ncclSuccess as c_int;
const IN_PROGRESS: c_int = sys::ncclResult_t::ncclInProgress as c_int;
/// Everything is sent as bytes.
const BYTES: c_int = sys::ncclDataType_t::ncclUint8 as c_int;
/// `NCCL_CONFIG_UNDEF_INT`: NCCL chooses.
const UNSET: c_int = c_int::MIN;
/// The configuration is that of 2.28; older and newer libraries take of it what they know.
const CONFIG_VERSION: u32 = 2_28_00;
const CONFIG_MAGIC: u32 = 0xcafe_beef;

type Communicator = sys::ncclComm_t;

/// How far a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    UnderWay,
}

/// What tells the ranks of one communicator from those of others.
#[derive(Clone, Copy)]
pub struct UniqueId(sys::ncclUniqueId);

/// The calls that are used. Codes are plain integers: a newer library may have more of them than the binding knows.
pub(super) struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut sys::ncclUniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Communicator, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> c_int,
    get_async_error: unsafe extern "C" fn(Communicator, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Communicator) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Communicator, *mut c_void) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Communicator, *mut c_void) -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Communicator, *mut c_void) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(Communicator) -> *const c_char,
    // Last: the functions are in it.
    _library: Library,
}

/// A rank's communicator. Ended by [`Nccl::abort`] alone, because every other way waits for peers that may be gone.
pub(super) struct Handle(Communicator);

// SAFETY: a communicator may be used by any thread, by one at a time.
unsafe impl Send for Handle {}

/// One thing that a collective does to a rank's device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    /// `bytes` at `from` go to rank `to`.
    Send { from: u64, bytes: usize, to: usize },
    /// `bytes` of rank `from` come to `to`.
    Receive { to: u64, bytes: usize, from: usize },
    /// Rank `r` has `bytes` at `at + r * bytes`, and afterwards all have those of all.
    Gather { at: u64, bytes: usize, rank: usize },
}

/// Leaves NVLink multicast off unless the environment decides on it: where a machine's fabric does not have it, NCCL would fail to start.
/// To be called at the start of a program, while it has one thread.
pub fn leave_multicast_off() {
    if std::env::var_os(MULTICAST_VARIABLE).is_none() {
        // SAFETY: (1) the caller's: no other thread reads the environment meanwhile.
        unsafe { std::env::set_var(MULTICAST_VARIABLE, "0") };
    }
}

/// The library, opened once.
pub(super) fn nccl() -> Result<&'static Nccl, String> {
    static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
    NCCL.get_or_init(Nccl::open).as_ref().map_err(Clone::clone)
}

impl UniqueId {
    /// One of this process. The ranks of a communicator all need the same.
    pub fn new() -> Result<Self, String> {
        let nccl = nccl()?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: (1) the out-pointer is valid.
        let code = unsafe { (nccl.get_unique_id)(&mut id) };
        nccl.check(None, code)?;
        Ok(Self(id))
    }

    /// As it goes to other nodes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.internal.iter().map(|byte| *byte as u8).collect()
    }

    /// The opposite of [`UniqueId::to_bytes`]; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 128] = bytes.try_into().ok()?;
        Some(Self(sys::ncclUniqueId { internal: bytes.map(|byte| byte as c_char) }))
    }
}

impl Nccl {
    fn open() -> Result<Self, String> {
        let library = find()?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: (1) the field's type is the function's, as NCCL's header has it; (2) the library is kept with it.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|error| format!("NCCL: {} is not in the library: {error}", $name))?
            };
        }
        Ok(Self {
            get_unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            get_async_error: function!("ncclCommGetAsyncError"),
            abort: function!("ncclCommAbort"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            send: function!("ncclSend"),
            receive: function!("ncclRecv"),
            all_gather: function!("ncclAllGather"),
            error_string: function!("ncclGetErrorString"),
            last_error: function!("ncclGetLastError"),
            _library: library,
        })
    }

    /// Begins to make rank `rank` of `size` on the device that is current; it is ready when [`Nccl::poll`] says done.
    pub fn begin(&self, id: UniqueId, rank: usize, size: usize) -> Result<Handle, String> {
        let mut config = configuration();
        // The library writes it again when the communicator is ready, from a thread of its own that nothing here can wait for: kept for ever.
        let communicator: &AtomicPtr<_> = Box::leak(Box::default());
        // SAFETY: (1) the configuration is valid for the call, after which the library has its own copy; (2) where the communicator goes is valid for ever.
        let code = unsafe { (self.init)(communicator.as_ptr(), size as c_int, id.0, rank as c_int, &mut config) };
        self.check(None, code)?;
        Ok(Handle(communicator.load(Ordering::Acquire)))
    }

    /// How far what was begun last has come; also tells what has gone wrong since, on its own.
    pub fn poll(&self, handle: &Handle) -> Result<Progress, String> {
        let mut state = SUCCESS;
        // SAFETY: (1) the communicator has not been aborted, or there would be no handle; (2) the out-pointer is valid.
        let code = unsafe { (self.get_async_error)(handle.0, &mut state) };
        self.check(Some(handle), code)?;
        self.check(Some(handle), state)
    }

    /// Ends the communicator: what it does on the device stops where it is.
    pub fn abort(&self, handle: Handle) -> Result<(), String> {
        // SAFETY: (1) the handle is given away, so that this is its last use.
        let code = unsafe { (self.abort)(handle.0) };
        self.check(None, code).map(drop)
    }

    /// Begins `transfers` as one operation on `stream`; it has been issued when [`Nccl::poll`] says done.
    ///
    /// # Safety
    /// 1. All addresses are of the communicator's device and stay allocated until the stream has passed the operation or the communicator is aborted.
    /// 2. `stream` is a stream of that device, which is current on this thread.
    pub unsafe fn transfer(
        &self,
        handle: &Handle,
        transfers: &[Transfer],
        stream: *mut c_void,
    ) -> Result<Progress, String> {
        // SAFETY: (1) takes nothing.
        self.check(None, unsafe { (self.group_start)() })?;
        let mut added = Ok(Progress::Done);
        for transfer in transfers {
            // SAFETY: (1), (2) by the caller.
            let code = unsafe { self.add(handle, *transfer, stream) };
            added = added.and_then(|_| self.check(Some(handle), code));
        }
        // SAFETY: (1) the group was started above; it has to be ended whatever came of its parts.
        let ended = unsafe { (self.group_end)() };
        added.and_then(|_| self.check(Some(handle), ended))
    }

    /// # Safety
    /// As for [`Nccl::transfer`].
    unsafe fn add(&self, handle: &Handle, transfer: Transfer, stream: *mut c_void) -> c_int {
        match transfer {
            Transfer::Send { from, bytes, to } => {
                // SAFETY: (1) by the caller.
                unsafe { (self.send)(from as *const c_void, bytes, BYTES, to as c_int, handle.0, stream) }
            }
            Transfer::Receive { to, bytes, from } => {
                // SAFETY: (1) by the caller.
                unsafe { (self.receive)(to as *mut c_void, bytes, BYTES, from as c_int, handle.0, stream) }
            }
            Transfer::Gather { at, bytes, rank } => {
                let own = at + (rank * bytes) as u64;
                // SAFETY: (1) by the caller; a rank's own part in its place is how NCCL gathers in place.
                unsafe { (self.all_gather)(own as *const c_void, at as *mut c_void, bytes, BYTES, handle.0, stream) }
            }
        }
    }

    fn check(&self, handle: Option<&Handle>, code: c_int) -> Result<Progress, String> {
        match code {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::UnderWay),
            code => Err(self.describe(handle, code)),
        }
    }

    fn describe(&self, handle: Option<&Handle>, code: c_int) -> String {
        let text = |at: *const c_char| match at.is_null() {
            true => String::new(),
            // SAFETY: (1) NCCL's texts end with a zero and are its own for ever.
            false => unsafe { CStr::from_ptr(at) }.to_string_lossy().trim().to_owned(),
        };
        // SAFETY: (1) any code is allowed.
        let name = text(unsafe { (self.error_string)(code) });
        // SAFETY: (1) the argument is not looked at by any release; a null is allowed.
        let last = text(unsafe { (self.last_error)(handle.map_or(ptr::null_mut(), |handle| handle.0)) });
        match last.is_empty() {
            true => format!("NCCL: {name}"),
            false => format!("NCCL: {name}: {last}"),
        }
    }
}

fn find() -> Result<Library, String> {
    if let Some(path) = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        // SAFETY: (1) opening runs the library's constructors; NCCL's are harmless.
        return unsafe { Library::new(&path) }.map_err(|error| format!("NCCL: {LIBRARY_VARIABLE}: {error}"));
    }
    for name in NAMES {
        // SAFETY: (1) as above.
        if let Ok(library) = unsafe { Library::new(name) } {
            return Ok(library);
        }
    }
    let names = NAMES.join(", ");
    Err(format!(
        "NCCL, which joins several GPUs, was not found (looked for {names}); install it, or give its path in {LIBRARY_VARIABLE}"
    ))
}

/// Calls that return at once, and all else as NCCL would choose.
fn configuration() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        // What 2.28 has; what came later stays unset.
        size: offset_of!(sys::ncclConfig_t, graphUsageMode),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
    }
}
