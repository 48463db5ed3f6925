//! Every library that training on a GPU loads, sooner or later, loaded now: on a machine without a GPU, too.

use std::ffi::c_int;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, Symbol};

use super::cuda::{libtorch_version, load_libraries, mapped, nvrtc_version, open};

/// A library, as this process has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// The beginning of its file's name.
    pub name: String,
    /// Its version, if it has one, and its file; or why it was not found.
    pub found: Result<(String, PathBuf), String>,
}

/// cuDNN's parts, which it loads by name when it first needs them: what looks for a kernel, and the kernels.
const CUDNN_PARTS: [&str; 7] =
    ["graph", "ops", "cnn", "adv", "heuristic", "engines_precompiled", "engines_runtime_compiled"];

/// Loads libtorch_cuda as a training on a GPU does, and all that it, cuDNN and the trainer load after it.
pub fn load_every_library() -> Vec<Library> {
    let loaded = load_libraries();
    let torch = loaded.and_then(|()| here("libtorch_cuda.so", Some(libtorch_version())));
    let missing = torch.is_err();
    let mut all = vec![Library { name: "libtorch_cuda".into(), found: torch }];
    let mut add = |name: &str, found| all.push(Library { name: name.into(), found });
    if !missing {
        add("libcudart", here("libcudart.so", number("cudaRuntimeGetVersion").map(cuda_version)));
        add("libcublas", here("libcublas.so", properties("cublasGetProperty")));
        add("libcublasLt", here("libcublasLt.so", properties("cublasLtGetProperty")));
        let cudnn = here("libcudnn.so", properties("cudnnGetProperty"));
        let beside = cudnn.as_ref().ok().map(|(_, path)| path.clone());
        add("libcudnn", cudnn);
        for part in CUDNN_PARTS {
            let name = format!("libcudnn_{part}");
            let found = beside.as_ref().map_or(Err("cuDNN is missing".into()), |cudnn| cudnn_part(cudnn, &name));
            add(&name, found);
        }
        add("libnccl", nccl());
    }
    add("libnvrtc", here("libnvrtc.so", nvrtc_version().ok()));
    add("libnvrtc-builtins", here("libnvrtc-builtins.so", None));
    all
}

/// The mapped file whose name begins so; its version, or nothing if it has none.
fn here(name: &str, version: Option<String>) -> Result<(String, PathBuf), String> {
    let path = mapped(name).ok_or_else(|| format!("{name} is not found"))?;
    Ok((version.unwrap_or_default(), path))
}

/// Loads a part of cuDNN from where cuDNN looks for it, beside itself; its file ends as cuDNN's own.
fn cudnn_part(cudnn: &Path, name: &str) -> Result<(String, PathBuf), String> {
    let file = cudnn.file_name().map(|file| file.to_string_lossy().replacen("libcudnn", name, 1)).unwrap_or_default();
    open(&cudnn.with_file_name(file))?;
    here(&format!("{name}.so"), None)
}

/// A function of a library that is loaded, by its name.
///
/// # Safety
/// `F` is the type that the library's header gives the function.
unsafe fn function<F>(name: &str) -> Option<Symbol<F>> {
    Handle::this().get(format!("{name}\0").as_bytes()).ok()
}

/// What a function of this kind answers: one number, through a pointer, and success as 0.
fn number(name: &str) -> Option<c_int> {
    let mut number = 0;
    // SAFETY: cudaRuntimeGetVersion and ncclGetVersion, which alone are asked for, have this type.
    let status = unsafe { function::<unsafe extern "C" fn(*mut c_int) -> c_int>(name)?(&mut number) };
    (status == 0).then_some(number)
}

/// 13000 is 13.0.
fn cuda_version(code: c_int) -> String {
    format!("{}.{}", code / 1000, code % 1000 / 10)
}

/// A library's version from its three properties.
fn properties(name: &str) -> Option<String> {
    let property = |which: c_int| {
        let mut value = 0;
        // SAFETY: cublasGetProperty, cublasLtGetProperty and cudnnGetProperty, which alone are asked for, have this type:
        // a libraryPropertyType, which is 0 to 2, and where the number goes.
        let status = unsafe { function::<unsafe extern "C" fn(c_int, *mut c_int) -> c_int>(name)?(which, &mut value) };
        (status == 0).then(|| value.to_string())
    };
    Some([property(0)?, property(1)?, property(2)?].join("."))
}

/// NCCL, by the names that the trainer's bindings look for, of which NVIDIA's wheel has none.
fn nccl() -> Result<(String, PathBuf), String> {
    // SAFETY: opens NCCL by its names and closes it; LibTorch, which needs it too, keeps it loaded.
    if !unsafe { cudarc::nccl::sys::is_culib_present() } {
        return Err("nothing of the name libnccl.so is found".into());
    }
    let version = |code: c_int| format!("{}.{}.{}", code / 10000, code % 10000 / 100, code % 100);
    here("libnccl.so", number("ncclGetVersion").map(version))
}
