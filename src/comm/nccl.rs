//! NCCL: the collectives of GPU tensors, loaded when the first GPU is used.
//!
//! LibTorch computes on CUDA's legacy default stream. NCCL has a stream of its own that does not wait for that one, so
//! that sums travel while the backward pass goes on; events say what each must wait for in the other. The communicator
//! is non-blocking (NCCL's user guide, "Fault tolerance"): every call returns at once and is asked after until a
//! deadline, so a peer that is gone cannot hold this rank.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void, CStr};
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use cudarc::driver::result::stream::get_priority_range;
use cudarc::driver::{CudaContext, CudaStream, DriverError};
use cudarc::nccl::result::{self as nccl, NcclError, NcclStatus};
use cudarc::nccl::sys;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::patience::{within, Patience};

/// How long NCCL may take to let go of a communicator: less than by how much the watchdog is more patient than `comm`, whose
/// error says more.
const GRACE: Duration = Duration::from_secs(3);

/// What names a group of ranks: made on rank 0, sent to the others by MPI.
pub type UniqueId = [u8; 128];

/// The ranks' GPUs.
pub struct Group {
    context: Arc<CudaContext>,
    /// NCCL's.
    stream: Arc<CudaStream>,
    /// LibTorch's.
    compute: Arc<CudaStream>,
    comm: sys::ncclComm_t,
    rank: usize,
    /// What a step's waiting may last.
    deadline: Duration,
    /// Whether the communicator was aborted, and must not be used or destroyed any more.
    aborted: Cell<bool>,
}

/// NCCL's version, as 2.28.9.
pub fn version() -> Result<String> {
    present()?;
    let code = nccl::get_nccl_version().map_err(|e| refused("ncclGetVersion", &e))?;
    Ok(format!("{}.{}.{}", code / 10000, code / 100 % 100, code % 100))
}

/// A new name for a group of ranks.
pub fn unique_id() -> Result<UniqueId> {
    present()?;
    let id = nccl::get_uniqueid().map_err(|e| refused("ncclGetUniqueId", &e))?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// Looks for the library first: cudarc panics if it is missing.
fn present() -> Result<()> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads NVIDIA's library, whose initialisers may run anywhere, and calls nothing in it.
    if *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Ok(());
    }
    Err(Error::Usage(
        "NCCL cannot be loaded: no libnccl.so in LibTorch's folder or on LD_LIBRARY_PATH; `launch/setup --cuda` installs \
         it, and a cluster may have a module for it; if that has only libnccl.so.2, build again with the module loaded"
            .into(),
    )
    .into())
}

impl Group {
    /// Joins the group `id` as `rank` of `world_size` with GPU number `device`; all ranks must do so within `startup`.
    pub fn start(
        device: usize,
        id: UniqueId,
        rank: usize,
        world_size: usize,
        startup: Duration,
        deadline: Duration,
    ) -> Result<Self> {
        present()?;
        // The primary context, which LibTorch uses, too.
        let context = CudaContext::new(device).map_err(|e| failed("opening the GPU", &e))?;
        // Of the highest priority: a sum that waits for room beside the backward pass is not hidden behind it.
        let stream = get_priority_range().and_then(|(_, highest)| context.new_stream_with_priority(highest));
        let stream = stream.map_err(|e| failed("making a stream", &e))?;
        let compute = context.default_stream();
        let mut group =
            Self { context, stream, compute, comm: ptr::null_mut(), rank, deadline, aborted: Cell::new(false) };
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as std::ffi::c_char) };
        let mut config = config();
        // SAFETY: `comm` and `config` outlive the call, which copies the latter; `id` is plain bytes that rank 0's NCCL made.
        let begun =
            unsafe { nccl::comm_init_rank_config(&mut group.comm, number(world_size), id, number(rank), &mut config) };
        group.settle("ncclCommInitRankConfig", begun, startup)?;
        Ok(group)
    }

    /// Begins to replace a tensor by its sum over the ranks; it must not be touched until [`Group::complete`].
    pub fn begin_all_reduce(&self, tensor: &Tensor) -> Result<()> {
        let (data, count, kind) = self.begin(tensor)?;
        // SAFETY: `begin` has checked that `count` elements of `kind` lie at `data` on this GPU; the caller keeps the
        // tensor alive and untouched until `finish`, and the stream and communicator are this group's own.
        let begun =
            unsafe { nccl::all_reduce(data, data, count, kind, sys::ncclRedOp_t::ncclSum, self.comm, self.stream()) };
        self.settle("ncclAllReduce", begun, self.deadline)
    }

    /// Begins to replace rank r's part of a tensor, `bounds[r]..bounds[r + 1]`, by its sum over the ranks.
    pub fn begin_reduce_scatter(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        let (data, _, kind) = self.begin(tensor)?;
        let sum = sys::ncclRedOp_t::ncclSum;
        let part = |rank: usize| (offset(data, bounds[rank], tensor.kind()), bounds[rank + 1] - bounds[rank]);
        if let Some(each) = even(bounds) {
            let (mine, _) = part(self.rank);
            // SAFETY: as in `begin_all_reduce`; the parts are equal and lie one after another, and NCCL documents the
            // sum in place at the rank's own part.
            let begun = unsafe { nccl::reduce_scatter(data, mine, each, kind, sum, self.comm, self.stream()) };
            return self.settle("ncclReduceScatter", begun, self.deadline);
        }
        self.grouped("ncclReduce", bounds, |rank| {
            let (start, length) = part(rank);
            // SAFETY: as in `begin_all_reduce`, for the part of one rank, which `bounds` keeps within the tensor.
            unsafe { nccl::reduce(start, start, length, kind, sum, number(rank), self.comm, self.stream()) }
        })
    }

    /// Begins to send each rank's part of a tensor to all the others.
    pub fn begin_all_gather(&self, tensor: &Tensor, bounds: &[usize]) -> Result<()> {
        let (data, _, kind) = self.begin(tensor)?;
        let part = |rank: usize| (offset(data, bounds[rank], tensor.kind()), bounds[rank + 1] - bounds[rank]);
        if let Some(each) = even(bounds) {
            let (mine, _) = part(self.rank);
            // SAFETY: as in `begin_reduce_scatter`.
            let begun = unsafe { nccl::all_gather(mine, data, each, kind, self.comm, self.stream()) };
            return self.settle("ncclAllGather", begun, self.deadline);
        }
        self.grouped("ncclBroadcast", bounds, |rank| {
            let (start, length) = part(rank);
            // SAFETY: as in `begin_reduce_scatter`.
            unsafe { nccl::broadcast(start, start, length, kind, number(rank), self.comm, self.stream()) }
        })
    }

    /// Begins to replace a tensor by rank 0's.
    pub fn begin_broadcast(&self, tensor: &Tensor) -> Result<()> {
        let (data, count, kind) = self.begin(tensor)?;
        // SAFETY: as in `begin_all_reduce`.
        let begun = unsafe { nccl::broadcast(data, data, count, kind, 0, self.comm, self.stream()) };
        self.settle("ncclBroadcast", begun, self.deadline)
    }

    /// LibTorch's stream waits for all that was begun; the host does not.
    pub fn complete(&self) -> Result<()> {
        self.compute.join(&self.stream).map_err(|e| failed("ordering the streams", &e))
    }

    /// Whether what was begun still goes its way, for a host that has waited for it for so long.
    pub fn check(&self, waited: Duration) -> Result<()> {
        // After a failed collective the computation still ends; whoever began it reports the failure.
        if !self.aborted.get() {
            self.in_progress("summing over the ranks")?;
        }
        if waited > self.deadline {
            return Err(self.late("summing over the ranks", self.deadline));
        }
        Ok(())
    }

    /// One call a part that is not empty, as one group. A group's calls do not wait for each other.
    fn grouped(
        &self,
        what: &str,
        bounds: &[usize],
        call: impl Fn(usize) -> std::result::Result<NcclStatus, NcclError>,
    ) -> Result<()> {
        let ranks = (0..bounds.len() - 1).filter(|&rank| bounds[rank] < bounds[rank + 1]);
        let begun = nccl::group_start().and_then(|_| {
            let calls = ranks.map(call).collect::<std::result::Result<Vec<_>, _>>();
            // Ended even after a failed call: an open group would swallow every later one.
            let ended = nccl::group_end();
            calls.and(ended)
        });
        self.settle(what, begun, self.deadline)
    }

    /// Checks a tensor, and makes NCCL's stream wait for what computes it: (address, elements, type).
    fn begin(&self, tensor: &Tensor) -> Result<(*mut c_void, usize, sys::ncclDataType_t)> {
        if self.aborted.get() {
            return Err(Error::Communication("NCCL was aborted after an earlier failure".into()).into());
        }
        let kind = match tensor.kind() {
            Kind::Float => sys::ncclDataType_t::ncclFloat32,
            Kind::BFloat16 => sys::ncclDataType_t::ncclBfloat16,
            Kind::Half => sys::ncclDataType_t::ncclFloat16,
            Kind::Double => sys::ncclDataType_t::ncclFloat64,
            Kind::Int => sys::ncclDataType_t::ncclInt32,
            Kind::Int64 => sys::ncclDataType_t::ncclInt64,
            other => return Err(Error::Communication(format!("NCCL has no sum of {other:?} tensors")).into()),
        };
        if tensor.device() != Device::Cuda(self.context.ordinal()) || !tensor.is_contiguous() {
            return Err(Error::Communication(format!(
                "NCCL works on contiguous tensors on GPU {} here, this one is on {:?}",
                self.context.ordinal(),
                tensor.device()
            ))
            .into());
        }
        self.context.bind_to_thread().map_err(|e| failed("using the GPU", &e))?;
        self.stream.join(&self.compute).map_err(|e| failed("ordering the streams", &e))?;
        Ok((tensor.data_ptr(), tensor.numel(), kind))
    }

    fn stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }

    /// Asks after a call until NCCL has taken it.
    fn settle(&self, what: &str, begun: std::result::Result<NcclStatus, NcclError>, deadline: Duration) -> Result<()> {
        if let Err(error) = begun {
            return Err(self.abort(what, &error));
        }
        let mut patience = Patience::begin();
        while self.in_progress(what)? {
            if patience.waited() > deadline {
                return Err(self.late(what, deadline));
            }
            thread::yield_now();
        }
        Ok(())
    }

    fn in_progress(&self, what: &str) -> Result<bool> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: `comm` is this group's, which was not aborted (`begin`, `check`), and `state` outlives the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) }.result();
        match asked.and_then(|_| state.result()) {
            Ok(status) => Ok(status == NcclStatus::InProgress),
            Err(error) => Err(self.abort(what, &error)),
        }
    }

    fn late(&self, what: &str, deadline: Duration) -> anyhow::Error {
        self.let_go();
        Error::Communication(format!(
            "NCCL: {what} took longer than {} s: a rank or its GPU hangs or is lost; NCCL_DEBUG=INFO shows what it waits for",
            deadline.as_secs()
        ))
        .into()
    }

    fn abort(&self, what: &str, error: &NcclError) -> anyhow::Error {
        let reason = if self.comm.is_null() { refused(what, error) } else { self.last_error(what, error) };
        self.let_go();
        reason
    }

    fn last_error(&self, what: &str, error: &NcclError) -> anyhow::Error {
        // SAFETY: NCCL returns a text that ends in zero and lives as long as the communicator.
        let text = unsafe { CStr::from_ptr(sys::ncclGetLastError(self.comm)) }.to_string_lossy();
        Error::Communication(format!(
            "NCCL: {what}: {}{}{text}; NCCL_DEBUG=WARN says more, and `lockstep doctor` checks the usual causes",
            meaning(error),
            if text.is_empty() { "" } else { ": " }
        ))
        .into()
    }

    /// Aborts the communicator, so that its kernels leave the GPU. That can hang itself, so it is only tried for a while,
    /// in a thread that may stay behind.
    fn let_go(&self) {
        if self.comm.is_null() || self.aborted.replace(true) {
            return;
        }
        let comm = self.comm as usize;
        // SAFETY: the address is that of a communicator which, being marked as aborted, nobody else uses any more.
        let _ = within(GRACE, move || unsafe { nccl::comm_abort(comm as sys::ncclComm_t) });
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.comm.is_null() || self.aborted.get() {
            return;
        }
        // SAFETY: the communicator is this group's and was not aborted; nobody can use it after this.
        let begun = unsafe { nccl::comm_finalize(self.comm) };
        if self.settle("ncclCommFinalize", begun, GRACE).is_ok() {
            // SAFETY: as above; it is finalised.
            let _ = unsafe { nccl::comm_destroy(self.comm) };
        }
    }
}

/// A configuration with everything left to NCCL but that calls return at once.
fn config() -> sys::ncclConfig_t {
    // NCCL's header marks an undefined number so. It reads no field that came after the version given here.
    const UNDEFINED: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 21700,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// The length of each part, if all are equal.
fn even(bounds: &[usize]) -> Option<usize> {
    let first = bounds[1] - bounds[0];
    bounds.windows(2).all(|w| w[1] - w[0] == first).then_some(first)
}

fn offset(data: *mut c_void, elements: usize, kind: Kind) -> *mut c_void {
    data.wrapping_byte_add(elements * kind.elt_size_in_bytes())
}

/// A rank or a number of ranks, far below C's largest int.
fn number(n: usize) -> c_int {
    c_int::try_from(n).unwrap_or(c_int::MAX)
}

fn refused(what: &str, error: &NcclError) -> anyhow::Error {
    Error::Communication(format!("NCCL: {what}: {}; NCCL_DEBUG=WARN says more", meaning(error))).into()
}

/// A result's name, and what NCCL says it means.
fn meaning(error: &NcclError) -> String {
    // SAFETY: NCCL returns a constant text that ends in zero, whatever the number.
    let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(error.0)) };
    format!("{:?} ({})", error.0, text.to_string_lossy())
}

fn failed(what: &str, error: &DriverError) -> anyhow::Error {
    Error::Communication(format!("CUDA: {what}: {error}")).into()
}
