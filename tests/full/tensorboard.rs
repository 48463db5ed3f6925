//! `train.tensorboard` against TensorBoard itself, which the test installs for itself: its reader shows each step once,
//! with the CSV's values, although the run was killed and did some steps again.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::documents::root;
use crate::common::runs::{last_step, Run, VARIED};
use crate::common::{not_run, numbers};

const TENSORBOARD: &str = "2.21.0";

/// Prints each curve that TensorBoard shows of a run: tag, then pairs of step and value.
const READ: &str = "
import json, sys
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray
multiplexer = EventMultiplexer(tensor_size_guidance={'scalars': 0})
multiplexer.AddRunsFromDirectory(sys.argv[1])
multiplexer.Reload()
run = multiplexer.GetAccumulator('run')
print(json.dumps({
    tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in run.Tensors(tag)]
    for tag in run.Tags()['tensors']
}))
";

fn python() -> Command {
    let mut command = Command::new("timeout");
    command.arg("600").arg(root().join(".venv/bin/python"));
    command
}

/// The folder of TensorBoard's packages, installed once; why that is impossible here.
fn install() -> Result<std::path::PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tensorboard-{TENSORBOARD}"));
    if !folder.exists() {
        let partial = folder.with_extension("part");
        let _ = fs::remove_dir_all(&partial);
        let mut pip = python();
        pip.args(["-m", "pip", "install", "--quiet", "--retries", "1", "--target"]).arg(&partial);
        pip.arg(format!("tensorboard=={TENSORBOARD}")).arg("setuptools<81");
        let output = pip.output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("tensorboard {TENSORBOARD} cannot be installed: {said}"));
        }
        fs::rename(&partial, &folder).map_err(|e| e.to_string())?;
    }
    Ok(folder)
}

#[test]
fn tensorboard_shows_each_step_once_although_some_were_done_again() {
    let packages = match install() {
        Ok(packages) => packages,
        Err(reason) => return not_run(&reason),
    };
    let folder = tempfile::tempdir().unwrap();
    let config = VARIED.replace("MICRO", "16").replace("train: {", "train: {tensorboard: true, ");
    let run = Run::new(folder.path(), "run", &config, 1);
    let killed = run.kill_at(40, &[]);
    assert!(!killed.success());
    let repeated = last_step(&run.dir);
    assert_eq!(run.start(&[]).code(), Some(0));
    assert!(repeated >= 40);

    let mut read = python();
    read.args(["-c", READ]).arg(folder.path()).env("PYTHONPATH", packages);
    let output = read.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let curves: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (tag, file, column) in [
        ("train/loss", "train.csv", "loss"),
        ("train/tokens_per_s", "train.csv", "tokens_per_s"),
        ("valid/loss", "eval.csv", "loss"),
    ] {
        let steps = numbers(&run.dir.join(file), "step");
        let values = numbers(&run.dir.join(file), column);
        let expected: Vec<(u64, f32)> =
            steps.into_iter().zip(values).map(|(step, value)| (step as u64, value as f32)).collect();
        let shown: Vec<(u64, f32)> = serde_json::from_value(curves[tag].clone()).unwrap();
        assert_eq!(shown, expected, "{tag}");
    }
}
