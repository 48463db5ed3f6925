//! NVIDIA's real compiler on our own kernels, for every kind of GPU that is supported; it needs no GPU. The test installs the
//! compiler for itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::documents::root;
use crate::common::{finish, not_run, Workspace};

const NVRTC: &str = "nvidia-cuda-nvrtc==13.0.88";

/// The folder of NVRTC's library, installed once; why that is impossible here.
fn install() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc-13.0.88");
    if !folder.exists() {
        let partial = folder.with_extension("part");
        let _ = fs::remove_dir_all(&partial);
        let mut pip = Command::new("timeout");
        pip.arg("600").arg(root().join(".venv/bin/python"));
        pip.args(["-m", "pip", "install", "--quiet", "--retries", "1", "--no-deps", "--target"])
            .arg(&partial)
            .arg(NVRTC);
        let output = pip.output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(format!("{NVRTC} cannot be installed: {}", String::from_utf8_lossy(&output.stderr)));
        }
        fs::rename(&partial, &folder).map_err(|e| e.to_string())?;
    }
    Ok(folder.join("nvidia/cu13/lib"))
}

#[test]
fn kernels_compile_for_every_gpu_and_spill_nothing() {
    let compiler = match install() {
        Ok(folder) => folder,
        Err(reason) => return not_run(&reason),
    };
    let mut doctor = Workspace::new().command(&["doctor", "--libraries"]);
    doctor.env("LD_LIBRARY_PATH", compiler);
    // It finds fault with a machine that has no other library of NVIDIA's.
    let said = finish(doctor);
    for capability in [80, 90, 100] {
        let begin = format!("NVRTC       compiles the kernels for sm_{capability}: ");
        let line = said.stdout.lines().find(|line| line.starts_with(&begin));
        assert!(line.is_some_and(|line| line.ends_with(" bytes, 0 spilled")), "{}{}", said.stdout, said.stderr);
    }
}
