//! Where the tensors live, how many threads compute, and how fast this machine multiplies.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void, CStr};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cudarc::driver::result as driver;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Cuda, Device, Kind, Tensor};

use crate::error::{Error, Result};

mod mark;

pub use mark::{Mark, Marks};

/// The device that `device: cpu|cuda|auto` means for this rank.
///
/// `cuda` takes the only visible GPU, else the one with the number of the rank on its node; `auto` takes
/// a GPU where LibTorch can use one and the CPU elsewhere.
///
/// # Errors
/// Usage, where `cuda` is asked for and LibTorch sees no GPU, or fewer GPUs than ranks on this node.
pub fn select(wanted: &str, local_rank: usize) -> Result<Device> {
    if wanted == "cpu" {
        return Ok(Device::Cpu);
    }
    let loaded = load_cuda();
    let visible = if loaded.is_ok() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
    match visible {
        0 if wanted == "auto" => {
            if Path::new("/dev/nvidiactl").exists() {
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
            "this is rank {local_rank} on its node, but only {n} GPUs are visible here; start at most {n} ranks a node"
        ))
        .into()),
    }
}

/// Loads libtorch_cuda, once. The linker drops it from the binary because nothing names a symbol of it, and
/// without it LibTorch reports no GPU and no reason.
///
/// LibTorch must not be asked about CUDA before this, not even for a seed of its generators: it keeps the answer of
/// the first time, and would know no GPU from then on.
fn load_cuda() -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let load = || {
        if !Path::new("/dev/nvidiactl").exists() {
            return Err("this machine has no NVIDIA driver".into());
        }
        // SAFETY: the library is LibTorch's own of the version that the binary is linked to; its initialisers
        // only register kernels. It is never unloaded (`forget`), so no registered pointer can dangle.
        let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) }
            .map_err(|e| format!("libtorch_cuda.so cannot be loaded ({e})"))?;
        std::mem::forget(library);
        Ok(())
    };
    LOADED.get_or_init(load).clone()
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
/// The driver's, where the GPU does not answer.
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
/// executable exports it (build.rs); where LibTorch has no MKL, nobody calls it.
#[no_mangle]
pub extern "C" fn mkl_serv_intel_cpu_true() -> c_int {
    1
}

/// Sets the threads that this process computes with, in LibTorch and in rayon alike.
///
/// `None` leaves the choice to `OMP_NUM_THREADS` or, where that is unset, to the cores this process may use.
/// Returns the number in force.
pub fn set_threads(threads: Option<usize>) -> usize {
    let threads = threads
        .or_else(|| std::env::var("OMP_NUM_THREADS").ok()?.parse().ok().filter(|&n| n > 0))
        .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
        .unwrap_or(1);
    // Rayon's threads call LibTorch from one core each. Asking for LibTorch's number first matters: it makes the thread
    // take the process' setting, which it would otherwise do later, over this one.
    let alone = |_| {
        tch::get_num_threads();
        tch::set_num_threads(1);
    };
    // A second call finds the pool built; the number of threads is then what the first one set.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(alone).build_global();
    // Each thread's setting is the process' too until the next: wait for them all, then set this one's.
    rayon::broadcast(|_| ());
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    threads
}

extern "C" {
    // src/libtorch.cpp
    fn lockstep_use_deterministic_algorithms();
    fn lockstep_peak_device_bytes(device: c_int) -> i64;
    fn lockstep_forget_device_memory(device: c_int);
    fn lockstep_fused_adamw(
        tensors: *const *const c_void,
        n: usize,
        step: *const c_void,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        scale: *const c_void,
        skip: *const c_void,
    ) -> *const c_char;
}

/// The numbers of an AdamW update.
pub struct AdamWNumbers {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One AdamW update in one pass, by LibTorch's fused kernel, which `tch` lacks.
///
/// A part is its weights, their gradient and its two moments, (n,) fp32 each. `step` counts from 1. The gradient is divided
/// by `scale`; where `skip` is 1, nothing is changed. These three are single fp32 numbers on the parts' device, for which the
/// host does not wait.
///
/// # Panics
/// With LibTorch's message where the kernel cannot be run, as `tch` does.
pub fn fused_adamw(parts: &[[Tensor; 4]], step: &Tensor, numbers: &AdamWNumbers, scale: &Tensor, skip: &Tensor) {
    if parts.is_empty() {
        return;
    }
    let address = |tensor: &Tensor| tensor.as_ptr().cast::<c_void>();
    let tensors: Vec<_> = parts.iter().flatten().map(address).collect();
    let AdamWNumbers { lr, betas: [beta1, beta2], weight_decay, eps } = *numbers;
    let (n, step, scale, skip) = (parts.len(), address(step), address(scale), address(skip));
    // SAFETY: a tch tensor's address is that of a C++ at::Tensor, alive as long as it; `tensors` holds four for each of the
    // n parts. LibTorch checks their shapes, types and devices; every C++ exception is caught.
    let error =
        unsafe { lockstep_fused_adamw(tensors.as_ptr(), n, step, lr, beta1, beta2, weight_decay, eps, scale, skip) };
    if !error.is_null() {
        // SAFETY: a text that ends in zero and stays until this thread's next call.
        panic!("{}", unsafe { CStr::from_ptr(error) }.to_string_lossy());
    }
}

/// Asks cuBLAS for sums that have an order, by the variable that it reads when it is first used, and on which LibTorch
/// insists for deterministic kernels. To be called while this process has no other thread: environments are not
/// theirs to share.
pub fn ask_for_deterministic_cublas() {
    if std::env::var_os("CUBLAS_WORKSPACE_CONFIG").is_none() {
        std::env::set_var("CUBLAS_WORKSPACE_CONFIG", ":4096:8");
    }
}

/// Asks LibTorch for kernels whose sums have an order, on CUDA too; those that have none become an error. To be called
/// after [`select`] and before the first product on a GPU.
pub fn use_deterministic_kernels() {
    // SAFETY: sets a flag of LibTorch's global context, which exists from its loading on.
    unsafe { lockstep_use_deterministic_algorithms() };
}

/// The most memory this process has held on the device, in MiB: resident on the CPU; on a GPU what its tensors took, as
/// PyTorch's `max_memory_allocated` counts.
pub fn peak_memory_mib(device: Device) -> Option<f64> {
    match device {
        Device::Cuda(index) => {
            // SAFETY: asks LibTorch's allocator, which was made when the first tensor went to this GPU, and catches
            // every C++ exception.
            let bytes = unsafe { lockstep_peak_device_bytes(index as c_int) };
            (bytes >= 0).then_some(bytes as f64 / 1048576.0)
        }
        _ => peak_resident_mib(),
    }
}

/// Waits until the device has done what it was given, so that a clock read next tells the truth.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Measures the peak of this device in FLOP/s, as a square matrix product reaches it: the denominator of mfu. NaN where
/// the device has no memory for it.
pub fn measure_peak(device: Device, kind: Kind) -> f64 {
    // On a GPU a product that keeps all of it busy, and several before the wait, whose cost would show in one.
    let (n, products, limit) = if device.is_cuda() { (8192, 8, 400) } else { (1024, 1, 150) };
    // Not equal ones: a GPU takes less power for numbers whose bits do not change, and runs faster than it ever trains.
    let matrix = || Tensor::f_randn([n, n], (kind, device));
    let (Ok(a), Ok(b), Ok(product)) = (matrix(), matrix(), matrix()) else { return f64::NAN };
    let time = || {
        let start = Instant::now();
        for _ in 0..products {
            let _ = a.mm_out(&product, &b);
        }
        synchronize(device);
        start.elapsed().as_secs_f64()
    };
    time();
    let until = Instant::now() + Duration::from_millis(limit);
    let mut best = f64::INFINITY;
    while Instant::now() < until {
        best = best.min(time());
    }
    drop((a, b, product));
    if let Device::Cuda(index) = device {
        // SAFETY: asks LibTorch's allocator, which had these matrices, and catches every C++ exception.
        unsafe { lockstep_forget_device_memory(index as c_int) };
    }
    f64::from(products) * 2.0 * (n as f64).powi(3) / best
}

/// `None` where the system does not say.
fn peak_resident_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// This node's name.
pub fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() {
        "this node".into()
    } else {
        name.trim().into()
    }
}

/// The version of the LibTorch that this process runs on; "unknown" where its folder does not say.
pub fn libtorch_version() -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library =
        maps.lines().find_map(|line| Some(line[line.find('/')?..].trim()).filter(|p| p.ends_with("libtorch_cpu.so")));
    let folder = library.and_then(|path| Path::new(path).parent()?.parent());
    let read = |name: &str| std::fs::read_to_string(folder?.join(name)).ok();
    // The Python wheel says it in version.py, the C++ archive in build-version.
    let wheel = read("version.py").and_then(|text| {
        Some(text.lines().find_map(|line| line.strip_prefix("__version__ = "))?.trim_matches('\'').to_string())
    });
    wheel.or_else(|| read("build-version").map(|text| text.trim().to_string())).unwrap_or_else(|| "unknown".into())
}

/// This program's file, and the SHA-256 of what it holds.
pub fn binary() -> std::io::Result<(String, String)> {
    let path = std::env::current_exe()?;
    let mut sha256 = Sha256::new();
    std::io::copy(&mut std::fs::File::open(&path)?, &mut sha256)?;
    let digest = sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((path.display().to_string(), digest))
}

/// The model of the processor or GPU; "unknown" where the system does not say.
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
