//! `lockstep doctor --libraries`: NVIDIA's real libraries, loaded as training on a GPU loads them. It needs no GPU, and
//! does not set LD_LIBRARY_PATH, which would hide what the binary does not find by itself.

use std::path::{Path, PathBuf};

use crate::common::{finish, not_run, Output, Workspace};

/// The folder of NVIDIA's wheels beside LibTorch's, or why there is none.
fn wheels() -> Result<PathBuf, String> {
    let libtorch = std::env::var("LIBTORCH").map_err(|_| "LIBTORCH is not set (. .venv/lockstep.env)".to_string())?;
    let wheels = Path::new(&libtorch).join("../nvidia");
    match wheels.join("cu13/lib/libcublas.so.13").exists() && wheels.join("cudnn/lib").exists() {
        true => Ok(wheels),
        false => Err(format!("{libtorch} has no NVIDIA libraries beside it (launch/setup --cuda)")),
    }
}

/// The row of the report that begins with this name.
fn row<'a>(output: &'a Output, name: &str) -> &'a str {
    let found = output.stdout.lines().find(|line| line.split_whitespace().next() == Some(name));
    found.unwrap_or_else(|| panic!("no row {name} in\n{}\n{}", output.stdout, output.stderr))
}

#[test]
fn every_library_is_found_and_kernels_compile() {
    if let Err(reason) = wheels() {
        return not_run(&reason);
    }
    let work = Workspace::new();
    let mut command = work.command(&["doctor", "--libraries"]);
    command.env_remove("LD_LIBRARY_PATH");
    let said = finish(command).ok();
    let engines = ["graph", "ops", "cnn", "adv", "heuristic", "engines_precompiled", "engines_runtime_compiled"];
    let engines = engines.map(|part| format!("libcudnn_{part}"));
    let others = ["libtorch_cuda", "libcudart", "libcublas", "libcublasLt", "libcudnn", "libnccl", "libnvrtc"];
    for name in others.map(String::from).iter().chain(&engines).chain(&["libnvrtc-builtins".into()]) {
        let row = row(&said, name);
        let path = row.split_whitespace().last().unwrap();
        assert!(Path::new(path).is_file() && path.contains(&format!("/{name}.so")), "{row}");
        // The table has name, version and path.
        let has_version = row.split_whitespace().count() == 3;
        assert!(has_version || !others.contains(&name.as_str()), "{row}");
    }
    for capability in [80, 90, 100] {
        let begin = format!("NVRTC       compiles the kernels for sm_{capability}: ");
        let line = said.stdout.lines().find(|line| line.starts_with(&begin));
        assert!(line.is_some_and(|line| line.ends_with(" bytes, 0 spilled")), "{}", said.stdout);
    }
}

#[test]
fn what_is_missing_is_named_with_the_remedy() {
    let wheels = match wheels() {
        Ok(wheels) => wheels,
        Err(reason) => return not_run(&reason),
    };
    let work = Workspace::new();
    // An empty library, and what cannot be done without it.
    for (library, missing, broken) in [
        ("cu13/lib/libnvrtc-builtins.so.13.0", "libnvrtc-builtins", "cannot compile the kernels for sm_80"),
        ("cudnn/lib/libcudnn_engines_precompiled.so.9", "libcudnn_engines_precompiled", "file too short"),
        ("cu13/lib/libcublasLt.so.13", "libtorch_cuda", "libcublasLt.so.13"),
    ] {
        let hidden = wheels.join(library);
        let script = "unset LD_LIBRARY_PATH; mount --bind /dev/null";
        let script = format!("{script} '{}' && exec $lockstep doctor --libraries", hidden.display());
        let Some(said) = work.with_mounts(&script) else { return };
        let said = said.fails(2, &["doctor found", "launch/setup --cuda"]);
        assert!(row(&said, missing).contains("missing"), "{}", said.stdout);
        let fault = said.stdout.split("fault:").skip(1).any(|fault| fault.contains(broken));
        assert!(fault && said.stdout.contains("verdict:    libraries are missing"), "{}", said.stdout);
    }
}

#[test]
fn it_does_not_go_with_what_examines_a_job() {
    let said = Workspace::new().lockstep("doctor --libraries --device cpu");
    said.fails(2, &["--libraries", "cannot be used with"]);
}
