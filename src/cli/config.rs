//! `lockstep config`: what a configuration and its overrides come to. Job scripts ask it, so that they read no YAML.

use std::path::{Path, PathBuf};

use serde_json::{json, Map, Value};

use super::args::Training;
use super::print;
use crate::config::{in_place, Config, PRESETS};
use crate::error::{Error, Result};
use crate::run::RunDir;

/// Prints the whole configuration as YAML, or the value of one key in a line.
pub fn show(path: Option<&Path>, training: &Training, key: Option<&str>) -> Result<()> {
    let config = match (path, &training.run_dir) {
        (None, None) => Config::parse("", &training.overrides)?,
        // What is wrong for one rank is wrong for any number of them.
        _ => {
            let path = file(path, training)?;
            let plan = Config::load(&path, &training.overrides)?.validate(1);
            plan.map_err(|e| in_place(e, &path, &training.overrides))?.config
        }
    };
    match key {
        None => print::line(config.to_yaml()?.trim_end()),
        Some("run_dir") => print::line(&run_dir(training, &config).display().to_string()),
        Some(key) => {
            print::line(&config.value(key).map_err(|e| e.context("--print takes `run_dir`, or a configuration's key"))?)
        }
    }
}

/// The file that a training reads: the one that is named, or else that of the run that is to go on.
pub fn file(named: Option<&Path>, training: &Training) -> Result<PathBuf> {
    let run = match (named, &training.run_dir) {
        (Some(path), _) => return Ok(path.into()),
        (None, Some(run)) => RunDir(run.clone()),
        (None, None) => return Err(Error::Usage("name a configuration with --config".into()).into()),
    };
    if !run.config().exists() {
        return Err(Error::Usage(format!(
            "--run-dir {}: expected a run to go on with, found no config.yaml there; a new run needs --config FILE",
            run.0.display()
        ))
        .into());
    }
    run.load_config()?;
    Ok(run.config())
}

/// Prints the sizes of all presets as JSON, for programs that know no YAML and no Rust.
pub fn show_presets() -> Result<()> {
    let preset = |&(name, n_layer, n_head, n_embd): &(&str, usize, usize, usize)| {
        (name.to_owned(), json!({"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}))
    };
    let all: Map<String, Value> = PRESETS.iter().map(preset).collect();
    print::line(&serde_json::to_string_pretty(&all)?)
}

/// Where a training's files go.
pub fn run_dir(training: &Training, config: &Config) -> PathBuf {
    training.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&config.name))
}
