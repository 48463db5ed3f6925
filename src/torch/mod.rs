//! Where the tensors are, how many threads compute, and how fast this machine multiplies.
#![allow(unsafe_code)]

mod compile;
mod cuda;
mod kernels;
mod libraries;
mod libtorch;
mod mark;
mod peak;
mod threads;
mod views;

use std::ffi::c_int;
use std::path::Path;

use cudarc::driver::result as driver;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use serde::{Deserialize, Serialize};
use tch::{Cuda, Device};

pub use self::compile::{compile, Compiled};
pub use self::cuda::{driver, driver_module, has_driver, libtorch_cuda, libtorch_version, Driver};
pub use self::kernels::{kernels, Dropout, Kernels, Normed, Update, MOST_CHANNELS};
pub use self::libraries::{load_every_library, Library};
pub use self::libtorch::{
    allow_cudnn_attention, ask_for_deterministic_libraries, backward, cudnn_attention_is_exact, fused_adamw,
    keep_memory, use_deterministic_kernels, AdamWNumbers,
};
pub use self::mark::{Mark, Marks};
pub use self::peak::{describe_peak, measure_peak, measure_product};
pub use self::threads::{bound_waiting, set_threads};
pub use self::views::{bf16, floats, floats_mut, halves_mut};
use crate::error::{Error, Result};

/// The device that `device: cpu|cuda|auto` means for this rank.
///
/// `cuda` takes the only visible GPU, else the one with the number of the rank on its node; `auto` takes
/// a GPU if LibTorch can use one, else the CPU.
///
/// # Errors
/// Usage, if `cuda` is asked for and LibTorch sees no GPU, or fewer GPUs than ranks on this node.
pub fn select(wanted: &str, local_rank: usize) -> Result<Device> {
    if wanted == "cpu" {
        return Ok(Device::Cpu);
    }
    let loaded = cuda::load_cuda();
    let visible = if loaded.is_ok() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
    match visible {
        0 if wanted == "auto" => {
            // One rank of a node says it for all.
            if local_rank == 0 && has_driver() {
                let reason = loaded.err().unwrap_or_else(|| "LibTorch sees no GPU".into());
                tracing::warn!(
                    "computing on the CPU of a machine with an NVIDIA driver: {reason}; see `launch/setup --cuda`"
                );
            }
            Ok(Device::Cpu)
        }
        0 => {
            let reason = loaded.err().unwrap_or_else(|| "LibTorch sees no GPU".into());
            Err(Error::Usage(format!(
                "device: cuda was asked for, but {reason}; install the CUDA libraries with `launch/setup --cuda`, \
                 check `nvidia-smi`, or use `--set device=cpu`"
            ))
            .into())
        }
        1 => Ok(Device::Cuda(0)),
        n if local_rank < n => Ok(Device::Cuda(local_rank)),
        n => Err(Error::Usage(format!(
            "this is rank {local_rank} on its node (from 0), but only {n} GPUs are visible here (CUDA_VISIBLE_DEVICES: \
             {}); start at most {n} ranks a node, and let each see all of its node's GPUs (`srun --gpu-bind=none`)",
            std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".into())
        ))
        .into()),
    }
}

/// A GPU, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its number among those that this process sees.
    pub index: usize,
    /// Its model.
    pub name: String,
    /// All of its memory.
    pub memory_mib: usize,
    /// Which of the node's GPUs it is: PCI domain, bus and device.
    pub bus: String,
}

/// Describes a GPU that [`select`] has returned.
///
/// # Errors
/// The driver's, if the GPU does not answer.
pub fn gpu(index: usize) -> std::result::Result<Gpu, String> {
    let ask = || {
        driver::init()?;
        let gpu = driver::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
        // SAFETY: the driver has just named this device, and is asked for numbers of it only.
        let number = |attribute| unsafe { driver::device::get_attribute(gpu, attribute) };
        let bus = format!(
            "{:04x}:{:02x}:{:02x}",
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
        );
        // SAFETY: as above.
        let bytes = unsafe { driver::device::total_mem(gpu) }?;
        Ok(Gpu { index, name: driver::device::get_name(gpu)?, memory_mib: bytes >> 20, bus })
    };
    ask().map_err(|e: driver::DriverError| format!("GPU {index} does not answer: {e}"))
}

/// MKL's question whether this is an Intel processor, answered yes.
///
/// LibTorch's MKL multiplies matrices with its AVX2 kernels on other makers' processors, whatever they can do; with this
/// answer it goes by the instruction sets that the processor reports, as on Intel's. On an AMD EPYC with AVX-512 that
/// halved the time of a training step. The loader takes this function for MKL's own of the same name because the
/// executable exports it (build.rs); if LibTorch has no MKL, nobody calls it.
#[no_mangle]
pub extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    1
}

/// The most memory this process has held on the device, in MiB: resident on the CPU; on a GPU what its tensors took, as
/// PyTorch's `max_memory_allocated` counts.
pub fn peak_memory_mib(device: Device) -> Option<f64> {
    match device {
        Device::Cuda(index) => libtorch::peak_bytes(index).map(|bytes| bytes as f64 / 1048576.0),
        _ => peak_resident_mib(),
    }
}

/// Waits until the device has done what it was given, so that a clock read next is right.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// The memory of this process that is resident now, in MiB; `None` if the system does not say.
pub fn resident_mib() -> Option<f64> {
    status_mib("VmRSS:")
}

/// `None` if the system does not say.
fn peak_resident_mib() -> Option<f64> {
    status_mib("VmHWM:")
}

fn status_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// The model of the processor or GPU; "unknown" if the system does not say.
pub fn hardware(device: Device) -> String {
    let field = |path: &Path, name: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let found = match device {
        Device::Cuda(index) => gpu(index).ok().map(|gpu| gpu.name),
        _ => field(Path::new("/proc/cpuinfo"), "model name"),
    };
    found.unwrap_or_else(|| "unknown".into())
}
