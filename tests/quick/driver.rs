//! What `doctor` and training report about a driver that does not start, has no GPU, or is too old. The training may
//! require a GPU or not. The driver is a library of a few lines.

use std::fs;
use std::process::Command;

use crate::common::{finish, Output, Workspace};

/// Answers with the numbers in FAKE_INIT, FAKE_COUNT and FAKE_VERSION; prints which variables the libraries would see.
const DRIVER: &str = r#"
#include <stdio.h>
#include <stdlib.h>
static int number(const char *name) { return atoi(getenv(name)); }
static const char *text(const char *name) { return getenv(name) ? getenv(name) : "not set"; }
int cuInit(unsigned flags) {
  fprintf(stderr, "cuBLAS: %s, algorithms: %s\n", text("CUBLAS_WORKSPACE_CONFIG"), text("NCCL_ALGO"));
  return number("FAKE_INIT");
}
int cuDeviceGetCount(int *count) { *count = number("FAKE_COUNT"); return 0; }
int cuDriverGetVersion(int *version) { *version = number("FAKE_VERSION"); return 0; }
/* NVRTC asks for it where it finds a driver. */
int cuGetExportTable(const void **table, const void *id) { return 801; }
int cuGetErrorName(int error, const char **name) { *name = error == 802 ? "CUDA_ERROR_SYSTEM_NOT_READY" : "?"; return 0; }
"#;

/// A folder that contains the driver.
fn with_driver() -> Workspace {
    let work = Workspace::new();
    fs::write(work.path("driver.c"), DRIVER).unwrap();
    let mut compile = Command::new(std::env::var("CC").unwrap_or("cc".into()));
    compile.args(["-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]).current_dir(work.path(""));
    assert!(compile.status().unwrap().success());
    // The program asks for this name first, and a machine with CUDA may have one.
    fs::copy(work.path("libcuda.so.1"), work.path("libcuda.so")).unwrap();
    work
}

fn run(work: &Workspace, arguments: &str, [init, count, version]: [i32; 3]) -> Output {
    let mut command = work.command(&arguments.split_whitespace().collect::<Vec<_>>());
    command.env("FAKE_INIT", init.to_string()).env("FAKE_COUNT", count.to_string());
    command.env("FAKE_VERSION", version.to_string());
    for name in ["CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"] {
        command.env_remove(name);
    }
    command.env("LD_LIBRARY_PATH", work.path(""));
    finish(command)
}

const TRAIN: &str = "train --config tiny.yaml --run-dir run --set train.steps=2 --set device=";

#[test]
fn a_driver_that_does_not_start_is_named_with_its_error() {
    let work = with_driver();
    let broken = [802, 1, 13000];
    let reason = "the NVIDIA driver is installed, but does not start: CUDA_ERROR_SYSTEM_NOT_READY";
    run(&work, &format!("{TRAIN}cuda"), broken).fails(2, &[reason, "nvidia-smi", "--set device=cpu"]);
    run(&work, &format!("{TRAIN}auto"), broken).ok().says(&["computing on the CPU", reason]);
    // doctor reports what training does.
    let said = run(&work, "doctor", broken).ok();
    said.reports(&[
        "warning:    rank 0 on ",
        "`device: auto` means the CPU, since no GPU can be used",
        reason,
        "job can train",
    ]);
    let said = run(&work, "doctor --device cuda", broken).fails(2, &["doctor found 1 fault"]);
    said.reports(&["fault:      rank 0 on ", "no GPU can be used", reason]);
}

#[test]
fn a_driver_without_a_gpu_is_no_driver() {
    let work = with_driver();
    for without in [[100, 0, 13000], [0, 0, 13000]] {
        let said = run(&work, "doctor", without).ok();
        assert!(said.stdout.contains("not used: the NVIDIA driver finds no GPU on this machine"), "{}", said.stdout);
        let said = run(&work, &format!("{TRAIN}auto"), without).ok();
        assert!(!said.stderr.contains("NVIDIA"), "{}", said.stderr);
    }
}

#[test]
fn deterministic_runs_ask_cublas_and_nccl_for_sums_in_order() {
    let work = with_driver();
    let none = [100, 0, 13000];
    run(&work, &format!("{TRAIN}auto"), none).ok().says(&["cuBLAS: not set, algorithms: not set"]);
    let asked = "cuBLAS: :4096:8, algorithms: ^NVLS,NVLSTree";
    let train = TRAIN.replace("run --set", "ordered --set");
    run(&work, &format!("{train}auto --set deterministic=true"), none).ok().says(&[asked]);
}

#[test]
fn deterministic_kernels_do_not_cost_a_filling_of_new_memory() {
    let mut alone = Command::new(std::env::current_exe().unwrap());
    alone.args(["--exact", "driver::new_memory_is_as_it_is", "--ignored"]);
    assert!(finish(alone).ok().stdout.contains("1 passed"));
}

#[test]
#[ignore = "a process of the test above: the choice of kernels is the whole process's"]
fn new_memory_is_as_it_is() {
    lockstep::torch::use_deterministic_kernels();
    // LibTorch would fill it with NaN.
    let fresh = tch::Tensor::empty([1 << 20], (tch::Kind::Float, tch::Device::Cpu));
    assert!(!bool::try_from(fresh.isnan().all()).unwrap());
}

#[test]
fn a_driver_that_is_too_old_for_libtorch_is_named_with_both_versions() {
    if !lockstep::torch::libtorch_version().contains("+cu13") {
        return crate::common::not_run("this LibTorch is not made with CUDA 13");
    }
    let work = with_driver();
    let parts = ["CUDA up to 12.8", "CUDA 13.0", "580 or newer", "LIBTORCH"];
    run(&work, &format!("{TRAIN}cuda"), [0, 1, 12080]).fails(2, &parts);
    run(&work, &format!("{TRAIN}auto"), [0, 1, 12080]).ok().says(&parts);
    let said = run(&work, "doctor --libraries", [0, 1, 12080]);
    assert!(said.stdout.contains("driver      not used here: the NVIDIA driver is too old"), "{}", said.stdout);
    let said = run(&work, "doctor --libraries", [0, 1, 13000]);
    assert!(said.stdout.contains("driver      serves CUDA up to 13.0"), "{}", said.stdout);
}
