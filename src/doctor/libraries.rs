//! `lockstep doctor --libraries`: whether all is there that training on a GPU loads, on a machine that may have none.

use super::report::{Place, Report};
use crate::error::Result;
use crate::torch::{self, Compiled, Driver};

/// The GPUs that the kernels are compiled for: A100, H100 and H200, B200.
const CAPABILITIES: [i32; 3] = [80, 90, 100];

const REMEDY: &str = "run `launch/setup --cuda` and build again; if LibTorch is your own (LIBTORCH), install what \
                      it lacks, or name its folder by LD_LIBRARY_PATH";

/// Loads every library and shows where it is.
///
/// # Errors
/// Usage, if one is missing or does not work; what `show` returns.
pub fn run(show: impl Fn(&str) -> Result<()>) -> Result<()> {
    let mut report = Report::about("every library that training on a GPU needs is here", "libraries are missing");
    report.row("LibTorch", &torch::libtorch_version());
    let driver = match torch::driver() {
        Driver::Ready { cuda: [major, minor] } => {
            let module = torch::driver_module().map(|version| format!(", kernel module {version}"));
            format!("serves CUDA up to {major}.{minor}{}", module.unwrap_or_default())
        }
        Driver::Absent(reason) | Driver::Unusable(reason) => format!("not used here: {reason}"),
    };
    report.row("driver", &driver);
    report.gap();
    let libraries = torch::load_every_library();
    let rows: Vec<[String; 3]> = libraries
        .iter()
        .map(|library| match &library.found {
            Ok((version, path)) => [library.name.clone(), version.clone(), path.display().to_string()],
            Err(reason) => [library.name.clone(), "missing".into(), reason.clone()],
        })
        .collect();
    report.table(["library", "version", "found"], &rows);
    report.gap();
    for library in &libraries {
        if let Err(reason) = &library.found {
            report.fault(Place::Setup, format!("{}: {reason}", library.name), REMEDY);
        }
    }
    let compiler_is_here = libraries.iter().any(|library| library.name == "libnvrtc" && library.found.is_ok());
    for capability in CAPABILITIES.into_iter().filter(|_| compiler_is_here) {
        let said = match torch::compile(capability) {
            Ok(Some(Compiled { code, spilled })) => {
                format!("compiles the kernels for sm_{capability}: {} bytes, {spilled} spilled", code.len())
            }
            Ok(None) => format!("knows no sm_{capability}"),
            Err(reason) => {
                let what = format!("NVRTC cannot compile the kernels for sm_{capability}: {reason}");
                report.fault(Place::Setup, what, REMEDY);
                format!("fails for sm_{capability}: {reason}")
            }
        };
        report.row("NVRTC", &said);
    }
    show(&report.text())?;
    report.verdict()
}
