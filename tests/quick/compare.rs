//! `lockstep compare`: one training on each device, timed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{binary, finish, not_run, numbers, table, Workspace};

const COLUMNS: &str = "device,world_size,steps,total_s,step_ms_median,tokens_per_s,final_loss,speedup\n";

/// A short comparison of `tiny.yaml`.
const COMPARE: &str = "-q compare --config tiny.yaml --steps 12";

/// The rows of a table, after a check of its header.
#[track_caller]
fn measured(text: &str) -> Vec<BTreeMap<String, String>> {
    assert!(text.starts_with(COLUMNS), "{text:?}");
    table(text).1
}

#[track_caller]
fn number(row: &BTreeMap<String, String>, column: &str) -> f64 {
    row[column].parse().unwrap_or_else(|e| panic!("{column} {:?}: {e}", row[column]))
}

/// What is in the folder besides the workspace's own two.
fn left(work: &Workspace) -> Vec<String> {
    let names = fs::read_dir(work.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !["data", "tiny.yaml"].contains(&name.as_str())).collect();
    names.sort();
    names
}

#[test]
fn the_cpu_alone_is_timed_over_the_same_training_as_trains() {
    let work = Workspace::new();
    let output = work.lockstep(&format!("{COMPARE} --devices cpu --set seed=7")).ok();
    assert_eq!(left(&work), ["compare.csv"]);
    let file = fs::read_to_string(work.path("compare.csv")).unwrap();
    assert_eq!(output.stdout, file);
    let rows = measured(&file);
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!((row["device"].as_str(), row["world_size"].as_str(), row["steps"].as_str()), ("cpu", "1", "12"));
    assert_eq!(number(row, "speedup"), 1.0);

    // Evaluations and saves, which `tiny.yaml` asks for, change nothing that is learnt.
    work.train("run", "--set seed=7").ok();
    let losses = numbers(&work.path("run/train.csv"), "loss");
    assert_eq!(number(row, "final_loss"), losses[11]);
    work.train("another", "").ok();
    assert_ne!(number(row, "final_loss"), numbers(&work.path("another/train.csv"), "loss")[11], "--set had no effect");

    // 8 sequences of 32 tokens a step; 7 of the 12 steps count, 4 of them at or above the median, however slow one is.
    let (median, seconds) = (number(row, "step_ms_median"), number(row, "total_s"));
    assert!(median > 0.0 && seconds * 1000.0 > 3.0 * median, "{row:?}");
    let tokens_per_step = number(row, "tokens_per_s") * median / 1000.0;
    assert!(tokens_per_step > 0.0 && tokens_per_step < 256.0 * 7.0 / 3.0, "{row:?}");
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_after_the_cpus_row() {
    let work = Workspace::new();
    // `cpu,cuda` is the default.
    for devices in ["", "--devices cpu,cuda"] {
        let arguments = format!("{COMPARE} {devices} --out table.csv");
        let mut command = work.command(&arguments.split_whitespace().collect::<Vec<_>>());
        command.env("CUDA_VISIBLE_DEVICES", ""); // where there is a GPU, it is hidden
        let said = ["device: cuda was asked for", "comparing on cuda", "exit code 2", "--devices cpu"];
        let output = finish(command).fails(2, &said);
        // It failed before it had written anything.
        assert_eq!(left(&work), ["table.csv"]);
        let file = fs::read_to_string(work.path("table.csv")).unwrap();
        assert_eq!(output.stdout, file);
        let rows = measured(&file);
        assert_eq!(rows.iter().map(|row| row["device"].as_str()).collect::<Vec<_>>(), ["cpu"]);
        fs::remove_file(work.path("table.csv")).unwrap();
    }
}

#[test]
fn a_gpu_is_compared_with_the_first_device() {
    if !lockstep::torch::has_driver() {
        return not_run("this machine has no NVIDIA driver");
    }
    let work = Workspace::new();
    for devices in [["cpu", "cuda"], ["cuda", "cpu"]] {
        let output = work.lockstep(&format!("{COMPARE} --devices {}", devices.join(","))).ok();
        let rows = measured(&output.stdout);
        assert_eq!(rows.iter().map(|row| row["device"].as_str()).collect::<Vec<_>>(), devices);
        let of = |column: &str| [number(&rows[0], column), number(&rows[1], column)];
        let ([first, second], speedup) = (of("step_ms_median"), of("speedup"));
        assert_eq!(speedup[0], 1.0);
        assert!((speedup[1] - first / second).abs() < 1e-3, "{rows:?}");
        let [a, b] = of("final_loss");
        assert!((a / b - 1.0).abs() < 1e-4, "{rows:?}");
    }
}

#[test]
fn it_is_a_world_of_one_wherever_it_starts() {
    let work = Workspace::new();
    let arguments: Vec<String> = format!("{COMPARE} --devices cpu").split(' ').map(String::from).collect();
    // One task of srun, and one rank of mpirun: the run must not look for their server.
    let place = [("PMIX_RANK", "0"), ("PMIX_NAMESPACE", "gone"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")];
    for more in [("PMI_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")] {
        let mut command = work.command(&arguments);
        command.envs(place).env(more.0, more.1);
        assert_eq!(measured(&finish(command).ok().stdout)[0]["world_size"], "1");
    }
    for name in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let mut command = work.command(&arguments);
        command.env(name, "2");
        finish(command).fails(2, &["compare runs once", "one of 2 ranks", "srun --ntasks=1"]);
    }
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_is_run() {
    let work = Workspace::new();
    let refused = |more: &str, code: i32, parts: &[&str]| {
        let output = work.lockstep(&format!("compare --config tiny.yaml {more}")).fails(code, parts);
        assert!(!output.stderr.contains("training"), "{more} was run: {}", output.stderr);
        assert_eq!(output.stdout, "");
    };
    refused("--devices tpu", 2, &["--devices", "'tpu'", "cpu, cuda"]);
    refused("--devices auto", 2, &["--devices", "'auto'", "cpu, cuda"]);
    refused("--devices cpu,cuda,cpu", 2, &["--devices: expected each device once, found cpu twice"]);
    refused("--steps 0", 2, &["--steps", "'0'", "0 is not in 1.."]);
    refused("--steps few", 2, &["--steps", "'few'"]);
    refused("--set train.stesp=3", 2, &["in --set train.stesp=3", "did you mean `train.steps`?"]);
    refused("--set data.micro_batch=3", 2, &["data.micro_batch: 3"]);
    for set in ["device=cuda", "train.steps=3", "train.eval_every=2"] {
        refused(&format!("--set {set}"), 2, &[&format!("--set {set}: compare sets this key itself"), "--steps"]);
    }
    refused("--out nowhere/table.csv", 4, &["cannot write nowhere/table.csv", "No such file or directory"]);
    refused("--out data", 4, &["cannot write data", "directory"]);
    refused("--out tiny.yaml", 4, &["tiny.yaml exists and is not a comparison", "begin with device,", "another --out"]);
    assert_eq!(fs::read_to_string(work.path("tiny.yaml")).unwrap(), crate::common::TINY);
    assert!(left(&work).is_empty(), "{:?}", left(&work));
    work.lockstep("compare --config missing.yaml").fails(2, &["missing.yaml"]);
    work.lockstep("compare").fails(2, &["--config <CONFIG>", "--help"]);
}

#[test]
fn a_run_that_fails_is_kept_and_its_exit_code_stands() {
    let work = Workspace::new();
    let older = COLUMNS.to_owned() + "cpu,1,50,1.0,20.0,12800.0,5.0,1.0\n";
    fs::write(work.path("compare.csv"), &older).unwrap();
    fs::create_dir(work.path("compare.csv.run-1")).unwrap();
    let parts = ["step 2: the loss is NaN", "comparing on cpu", "compare.csv.run-2, is kept", "exit code 5"];
    work.lockstep(&format!("{COMPARE} --devices cpu,cuda --set optim.lr=1e30")).fails(5, &parts);
    // Neither an older table nor a folder that another run left is touched.
    assert_eq!(left(&work), ["compare.csv", "compare.csv.run-1", "compare.csv.run-2"]);
    assert_eq!(fs::read_to_string(work.path("compare.csv")).unwrap(), older);
    assert_eq!(numbers(&work.path("compare.csv.run-2/train.csv"), "step"), [1.0]);
    work.lockstep(&format!("{COMPARE} --devices cpu --set data.dir=nowhere")).fails(3, &["nowhere", "exit code 3"]);
}

#[test]
fn a_signal_ends_the_run_too_and_leaves_nothing() {
    let work = Workspace::new();
    let mut command = Command::new(binary());
    command.args(["-q", "compare", "--config", "tiny.yaml", "--steps", "1000000", "--devices", "cpu"]);
    command.current_dir(work.path("")).env("OMP_NUM_THREADS", "1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let wait = |what: &str, done: &mut dyn FnMut() -> bool| {
        let until = Instant::now() + Duration::from_secs(600);
        while !done() {
            assert!(Instant::now() < until, "no {what} in ten minutes");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait("row", &mut || {
        fs::read_to_string(work.path("compare.csv.run-1/train.csv")).is_ok_and(|t| t.lines().count() > 2)
    });
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let train = fs::read_to_string(children).unwrap().trim().to_owned();
    assert!(fs::read_to_string(format!("/proc/{train}/cmdline")).unwrap().contains("train"), "{train}");

    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    wait("end", &mut || child.try_wait().unwrap().is_some());
    if Path::new("/proc").join(&train).exists() {
        let _ = Command::new("kill").args(["-KILL", &train]).status();
        panic!("the run goes on without its parent");
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(15));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("stopped by a signal before cpu was measured"), "{said}");
    assert!(left(&work).is_empty(), "{:?}", left(&work));
}
