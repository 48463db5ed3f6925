//! NVIDIA's driver, and LibTorch's libraries for it: whether they are there, and how they are loaded.

use std::ffi::c_int;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::{result as calls, sys, DriverError};
use cudarc::nvrtc::sys as nvrtc;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::libtorch;

/// NVIDIA's driver, as this process finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    /// Nothing to compute on, and nobody would expect it: no driver, or one on a machine without a GPU.
    Absent(String),
    /// There is a driver, or a GPU, which this process cannot use; why, and what helps.
    Unusable(String),
    /// It has started, has at least one GPU for this process, and serves CUDA up to this version.
    Ready {
        /// As in 13.0.
        cuda: [i32; 2],
    },
}

/// The driver: the one place that answers whether this process can expect a GPU. It asks the driver's library, since
/// device files differ (Windows' Linux has none of NVIDIA's); if there is none, that takes a millisecond.
pub fn driver() -> &'static Driver {
    static FOUND: OnceLock<Driver> = OnceLock::new();
    FOUND.get_or_init(find_driver)
}

/// Whether this machine looks as if it had a GPU, usable or not.
pub fn has_driver() -> bool {
    !matches!(driver(), Driver::Absent(_))
}

fn find_driver() -> Driver {
    let is_device = |file: &str| fs::metadata(file).is_ok_and(|found| found.file_type().is_char_device());
    let nvidia = is_device("/dev/nvidiactl");
    // SAFETY: opens the driver's library by its names and closes it; its initialisers may run in any program.
    if !unsafe { sys::is_culib_present() } {
        return match nvidia {
            true => Driver::Unusable(
                "the NVIDIA driver's library libcuda.so.1 is not found, although /dev/nvidiactl exists; a container gets it \
                 by `docker run --gpus all` or `apptainer exec --nv`"
                    .into(),
            ),
            false => Driver::Absent("this machine has no NVIDIA driver".into()),
        };
    }
    match calls::init().and_then(|()| calls::device::get_count()) {
        Ok(0) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
            // Slurm sets the variable on nodes without a GPU, too. /dev/dxg is the graphics card on Windows' Linux.
            match visible.filter(|_| nvidia || is_device("/dev/dxg")) {
                Some(list) => Driver::Unusable(format!(
                    "the NVIDIA driver shows this process no GPU: CUDA_VISIBLE_DEVICES is \"{list}\""
                )),
                None => Driver::Absent("the NVIDIA driver finds no GPU on this machine".into()),
            }
        }
        Err(error) => Driver::Unusable(format!(
            "the NVIDIA driver is installed, but does not start: {}{}; `nvidia-smi` may say more",
            name(&error),
            module()
        )),
        Ok(_) => {
            let mut version: c_int = 0;
            // SAFETY: writes one number to where this one lies.
            if let Err(error) = unsafe { sys::cuDriverGetVersion(&mut version) }.result() {
                return Driver::Unusable(format!("the NVIDIA driver does not tell its version: {}", name(&error)));
            }
            let cuda = [version / 1000, version % 1000 / 10];
            match too_old(cuda, libtorch_cuda_version(), &module()) {
                Some(reason) => Driver::Unusable(reason),
                None => Driver::Ready { cuda },
            }
        }
    }
}

/// The name of a driver's error, such as CUDA_ERROR_SYSTEM_NOT_READY; its number if the driver has none for it.
fn name(error: &DriverError) -> String {
    error.error_name().map_or_else(|_| format!("error {}", error.0 as i32), |name| name.to_string_lossy().into_owned())
}

/// " (kernel module 580.95.05)", if the system knows it.
fn module() -> String {
    driver_module().map(|version| format!(" (kernel module {version})")).unwrap_or_default()
}

/// What is wrong if a driver that serves CUDA up to `found` is to run a LibTorch made with `needed`. Within a major
/// version every driver serves every LibTorch.
fn too_old(found: [i32; 2], needed: Option<[i32; 2]>, module: &str) -> Option<String> {
    let [needed, minor] = needed.filter(|needed| found[0] < needed[0])?;
    // NVIDIA's table of the oldest driver for each major version.
    let driver = match needed {
        12 => "525",
        13 => "580",
        _ => "a driver",
    };
    Some(format!(
        "the NVIDIA driver is too old: it serves CUDA up to {}.{}{module}, and this LibTorch is made with CUDA \
         {needed}.{minor}, which needs driver {driver} or newer; update the driver, or name by LIBTORCH a LibTorch of the \
         same version for an older CUDA",
        found[0], found[1],
    ))
}

/// The version of NVIDIA's kernel module, as 580.95.05, if the system knows it.
pub fn driver_module() -> Option<String> {
    module_in(&fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

fn module_in(text: &str) -> Option<String> {
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_string)
}

/// Where this process has mapped a library whose file's name begins so.
pub(super) fn mapped(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| Some(Path::new(line[line.find('/')?..].trim())));
    paths
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)))
        .map(Path::to_path_buf)
}

/// A file in the folder that LibTorch was loaded from; its libraries are in `lib` there.
fn libtorch_file(name: &str) -> Option<String> {
    fs::read_to_string(mapped("libtorch_cpu.so")?.parent()?.parent()?.join(name)).ok()
}

/// The version of the LibTorch that this process runs on; "unknown" if its folder does not say.
pub fn libtorch_version() -> String {
    // The Python wheel says it in version.py, the C++ archive in build-version.
    let wheel = libtorch_file("version.py").and_then(|text| python_value(&text, "__version__").map(str::to_string));
    let archive = || libtorch_file("build-version").map(|text| text.trim().to_string());
    wheel.or_else(archive).unwrap_or_else(|| "unknown".into())
}

/// The version of CUDA that LibTorch was made with, as 13.0; `None` if it does not say, or was made without.
pub fn libtorch_cuda() -> Option<String> {
    libtorch_cuda_version().map(|[major, minor]| format!("{major}.{minor}"))
}

/// The same as numbers.
fn libtorch_cuda_version() -> Option<[i32; 2]> {
    let text = libtorch_file("version.py")?;
    let (major, minor) = python_value(&text, "cuda")?.split_once('.')?;
    Some([major.parse().ok()?, minor.parse().ok()?])
}

/// The text that a line of a Python file gives a name, with or without a type beside it.
fn python_value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (left, right) = line.split_once(" = ")?;
        (left.split(':').next()? == name).then(|| right.trim().strip_prefix('\'')?.strip_suffix('\'')).flatten()
    })
}

/// Loads libtorch_cuda, once, if there is a driver that it can use. The linker drops it from the binary because nothing
/// names a symbol of it, and without it LibTorch reports no GPU and no reason.
///
/// LibTorch must not be asked about CUDA before this, not even for a seed of its generators: it keeps the answer of
/// the first time, and would know no GPU from then on.
pub(super) fn load_cuda() -> Result<(), String> {
    match driver() {
        Driver::Absent(reason) | Driver::Unusable(reason) => Err(reason.clone()),
        Driver::Ready { .. } => load_libraries(),
    }
}

/// Loads libtorch_cuda and what it would not find by itself, once, whether there is a driver or not.
pub(super) fn load_libraries() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        // What is compiled at run time misses it; all else does without.
        if let Err(reason) = load_nvrtc() {
            tracing::debug!("kernels cannot be compiled at run time: {reason}");
        }
        open(Path::new("libtorch_cuda.so"))?;
        libtorch::allow_cudnn_attention(false);
        Ok(())
    };
    LOADED.get_or_init(load).clone()
}

/// Loads NVIDIA's run-time compiler and its built-in functions. Those who use the compiler (cuDNN, LibTorch) ask for it by
/// name, and so does it for its built-in functions, without which it fails: in a wheel nothing leads to their folder.
fn load_nvrtc() -> Result<(), String> {
    let major = libtorch_cuda_version().map(|[major, _]| major);
    let is_compiler = |path: &PathBuf| {
        let version =
            path.file_name().and_then(|name| name.to_str()?.strip_prefix("libnvrtc.so.")?.parse::<i32>().ok());
        version.is_some_and(|version| major.is_none_or(|major| version == major))
    };
    let beside = library_folders().iter().flat_map(|folder| files(folder)).find(is_compiler);
    let by_name = || major.map_or("libnvrtc.so".into(), |major| format!("libnvrtc.so.{major}")).into();
    let compiler = beside.unwrap_or_else(by_name);
    open(&compiler)?;
    let version = nvrtc_version()?;
    let built_in = compiler.with_file_name(format!("libnvrtc-builtins.so.{version}"));
    match built_in.exists() {
        true => open(&built_in),
        false => open(Path::new(built_in.file_name().unwrap_or_default())),
    }
}

/// The version of NVRTC, as 13.0.
///
/// # Errors
/// That there is none.
pub(super) fn nvrtc_version() -> Result<String, String> {
    // SAFETY: opens the compiler's library by its names and closes it; [`load_nvrtc`] keeps it loaded.
    if !unsafe { nvrtc::is_culib_present() } {
        return Err("NVIDIA's compiler libnvrtc.so is not found".into());
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: writes one number to each place.
    unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| format!("NVRTC fails: {e}"))?;
    Ok(format!("{major}.{minor}"))
}

/// Where LibTorch's libraries of NVIDIA's may be: in wheels beside its own, or among its own.
fn library_folders() -> Vec<PathBuf> {
    let Some(own) = mapped("libtorch_cpu.so").and_then(|path| Some(path.parent()?.to_path_buf())) else {
        return Vec::new();
    };
    let site = own.parent().and_then(Path::parent).map(|site| site.join("nvidia"));
    let wheels = site.iter().flat_map(|site| files(site)).map(|wheel| wheel.join("lib"));
    wheels.chain([own.clone()]).collect()
}

/// What is in a folder, in the order of the names; nothing if there is no such folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path()).collect();
    paths.sort();
    paths
}

/// Loads a library for good, for all that is loaded after it; a bare name is looked for as the loader does, on
/// LD_LIBRARY_PATH first.
pub(super) fn open(library: &Path) -> Result<(), String> {
    // SAFETY: only LibTorch's libraries are loaded so, of the LibTorch that the binary is linked to, and NVIDIA's that
    // belong to it; their initialisers register kernels and no more. None is ever unloaded (`forget`), so no pointer into
    // one can dangle.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    std::mem::forget(loaded.map_err(|e| format!("{} cannot be loaded ({e})", library.display()))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_modules_version_is_read() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (x)\n\
                    GCC version:  gcc version 13.3.0";
        assert_eq!(module_in(open).as_deref(), Some("580.159.04"));
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue";
        assert_eq!(module_in(closed).as_deref(), Some("535.54.03"));
        assert_eq!(module_in(""), None);
    }

    #[test]
    fn a_driver_of_an_older_cuda_is_refused_with_the_versions() {
        assert_eq!(too_old([13, 0], Some([13, 0]), ""), None);
        assert_eq!(too_old([13, 0], Some([13, 2]), ""), None);
        assert_eq!(too_old([14, 0], Some([13, 0]), ""), None);
        assert_eq!(too_old([11, 0], None, ""), None);
        let said = too_old([12, 8], Some([13, 0]), " (kernel module 570.86.15)").unwrap();
        for part in ["CUDA up to 12.8 (kernel module 570.86.15)", "CUDA 13.0, which needs driver 580", "LIBTORCH"] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn libtorch_says_its_versions_in_python() {
        let text = "from typing import Optional\n\n__version__ = '2.11.0+cu130'\ndebug = False\n\
                    cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n";
        assert_eq!(python_value(text, "__version__"), Some("2.11.0+cu130"));
        assert_eq!(python_value(text, "cuda"), Some("13.0"));
        assert_eq!(python_value(text, "hip"), None);
        assert_eq!(python_value(text, "xpu"), None);
    }
}
