//! `lockstep config`: what a configuration and its overrides come to. Job scripts ask it, so that they read no YAML.

use std::path::{Path, PathBuf};

use serde_json::{json, Map, Value};

use super::args::Training;
use super::print;
use crate::config::{in_place, Config, PRESETS};
use crate::error::Result;

/// Prints the whole configuration as YAML, or the value of one key in a line.
pub fn show(path: Option<&Path>, training: &Training, key: Option<&str>) -> Result<()> {
    let config = match path {
        // What is wrong for one rank is wrong for any number of them.
        Some(path) => {
            let plan = Config::load(path, &training.overrides)?.validate(1);
            plan.map_err(|e| in_place(e, path, &training.overrides))?.config
        }
        None => Config::parse("", &training.overrides)?,
    };
    match key {
        None => print::line(config.to_yaml()?.trim_end()),
        Some("run_dir") => print::line(&run_dir(training, &config).display().to_string()),
        Some(key) => {
            print::line(&config.value(key).map_err(|e| e.context("--print takes `run_dir`, or a configuration's key"))?)
        }
    }
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
