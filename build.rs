//! Writes into the binary where its libraries lie (its RUNPATH), so that it runs from any folder and
//! needs no LD_LIBRARY_PATH; and GPT-2's merges, so that no run has to work them out.

use std::collections::HashMap;
use std::env;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=MPICC");

    match env::var("LIBTORCH") {
        Ok(folder) => {
            add_runpath(&Path::new(&folder).join("lib"));
            name_nccl(Path::new(&folder));
            compile_libtorch_calls(&Path::new(&folder).join("include"));
        }
        Err(_) => println!(
            "cargo:warning=LIBTORCH is not set, so LibTorch may not be found; \
             run launch/setup, then `. .venv/lockstep.env`, and build again"
        ),
    }
    write_gpt2_merges();
    export_mkl_answer();
    if env::var_os("CARGO_FEATURE_MPI").is_some() {
        for folder in mpi_library_folders() {
            add_runpath(Path::new(&folder));
        }
    }
}

/// Compiles the calls that the `tch` crate lacks.
fn compile_libtorch_calls(headers: &Path) {
    println!("cargo:rerun-if-changed=src/torch/libtorch.cpp");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or("1".into());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false) // LibTorch's headers have plenty
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .include(headers)
        .file("src/torch/libtorch.cpp")
        .compile("lockstep_libtorch");
    println!("cargo:rustc-link-lib=dylib=c10");
}

/// Gives NCCL the name by which the program looks for it, libnccl.so, where it lies beside LibTorch, on LD_LIBRARY_PATH or
/// in the system's folders by its versioned name only, as in NVIDIA's wheels. The link lies in the build's own folder:
/// LibTorch's may be a cluster's.
fn name_nccl(libtorch: &Path) {
    let Some(out) = env::var_os("OUT_DIR") else { return };
    let wheels = libtorch.parent().map(|site| site.join("nvidia/nccl/lib"));
    let listed = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let system = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"].map(PathBuf::from);
    let folders: Vec<PathBuf> =
        [libtorch.join("lib")].into_iter().chain(wheels).chain(env::split_paths(&listed)).chain(system).collect();
    if folders[0].join("libnccl.so").exists() {
        return;
    }
    let Some(library) = folders.iter().map(|folder| folder.join("libnccl.so.2")).find(|path| path.exists()) else {
        return;
    };
    let link = Path::new(&out).join("libnccl.so");
    let _ = std::fs::remove_file(&link);
    if symlink(library.canonicalize().unwrap_or(library), link).is_ok() {
        add_runpath(Path::new(&out));
    }
}

/// Lets LibTorch see the function of `src/torch/mod.rs` that answers MKL's question for the processor's maker; an
/// executable keeps its functions to itself otherwise.
fn export_mkl_answer() {
    let Some(folder) = env::var_os("OUT_DIR") else { return };
    let list = Path::new(&folder).join("exported.list");
    if std::fs::write(&list, "{ mkl_serv_intel_cpu_true; };\n").is_ok() {
        println!("cargo:rustc-link-arg=-Wl,--dynamic-list={}", list.display());
    }
}

/// Writes GPT-2's merges, `gpt2.merges`: the ids of each one's parts, two bytes each. tiktoken lists tokens only; a
/// merge's parts are what the merges before it leave of its token.
fn write_gpt2_merges() {
    const BYTES: usize = 256;
    const END_OF_TEXT: u32 = 50_256;
    let Some(out) = env::var_os("OUT_DIR") else { return };
    let vocabulary = tiktoken_rs::r50k_base().expect("tiktoken-rs has GPT-2's vocabulary");
    let tokens: Vec<Vec<u8>> =
        (0..END_OF_TEXT).map(|id| vocabulary.decode_bytes(&[id]).expect("GPT-2's vocabulary has no gaps")).collect();
    let ids: HashMap<&[u8], u16> = (0..).zip(&tokens).map(|(id, token)| (&token[..], id)).collect();

    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().skip(BYTES) {
        // Where the parts of the token end.
        let mut ends: Vec<usize> = (0..=token.len()).collect();
        while ends.len() > 3 {
            let earliest =
                ends.windows(3).zip(1..).filter_map(|(part, at)| Some((ids.get(&token[part[0]..part[2]])?, at)));
            let (_, at) = earliest.min().expect("a token of GPT-2's is a merge of two");
            ends.remove(at);
        }
        for part in [&token[..ends[1]], &token[ends[1]..]] {
            let part = ids[part];
            assert!(usize::from(part) < id, "token {id} of GPT-2's is made of earlier ones");
            merges.extend_from_slice(&part.to_le_bytes());
        }
    }
    std::fs::write(Path::new(&out).join("gpt2.merges"), merges).expect("the build's own folder can be written");
}

/// Adds a folder to the RUNPATH; an absolute one, because a relative one would mean the folder that the
/// binary is started from.
fn add_runpath(folder: &Path) {
    let folder = folder.canonicalize().unwrap_or(folder.to_path_buf());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
}

/// The library folders that MPI's compiler wrapper links with; none where there is no wrapper to ask,
/// which is no error here: MPI may come from pkg-config, and then lies in one of the system's folders.
fn mpi_library_folders() -> Vec<String> {
    let wrapper = env::var("MPICC").unwrap_or("mpicc".into());
    // Open MPI, MPICH and their relatives all answer `-show` with the command line that they would run.
    let Ok(answer) = Command::new(wrapper).arg("-show").output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&answer.stdout)
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("-L"))
        .map(str::to_owned)
        .collect()
}
