//! A folder with a GPT-2 of Hugging Face's as a run: nothing is trained, and everything but resuming works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::Dtype;
use serde::Deserialize;
use tch::{no_grad, Device, Kind, Tensor};

use super::gpt2::Gpt2Config;
use super::{is_transposed, CONFIG, MODEL, TOKENIZER};
use crate::config::{Config, Plan, Shape};
use crate::error::{Error, Result};
use crate::files::{resolve_new, write_synced, Partial};
use crate::model::gpt::{HEAD, WTE};
use crate::model::Gpt;
use crate::optim::adamw::AdamW;
use crate::run::checkpoint::{parse_tensors, Conditions, Saving, State};
use crate::run::RunDir;
use crate::tokenizer::Tokenizer;
use crate::torch;

const INDEX: &str = "model.safetensors.index.json";
const PREFIX: &str = "transformer.";
/// No larger JSON file is read; the index of a thousand layers has 2 MB.
const MAX_JSON: u64 = 16 << 20;

/// Makes a run directory `out` of the GPT-2 in the folder `from`, and returns the run's configuration. The weights become
/// fp32. There is no optimizer's state beside them.
///
/// # Errors
/// Usage, if `out` exists, or the model is none that can be imported; data, if its tokenizer cannot be; storage, if its
/// tensors are not those of its `config.json`, or the run cannot be written.
pub fn import(from: &Path, out: &Path) -> Result<Config> {
    let place = resolve_new(out)?;
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let path = from.join(CONFIG);
    let gpt2 = Gpt2Config::read(&path, &read_json(&path)?)?;
    let plan = gpt2.run(&name).validate(1).map_err(|e| e.context(path.display().to_string()))?;
    let tokenizer = read_tokenizer(from)?;
    if gpt2.vocab_size != tokenizer.vocab_size() {
        return Err(Error::Usage(format!(
            "{}: vocab_size is {}, and the tokenizer beside it has {} tokens; only a model whose ids are its tokenizer's can \
             be imported",
            path.display(),
            gpt2.vocab_size,
            tokenizer.vocab_size()
        ))
        .into());
    }
    let model = Weights::read(from)?.into_model(plan.shape(tokenizer.vocab_size()))?;

    let partial = Partial::beside(&place)?;
    let dir = RunDir(partial.path().to_path_buf());
    write_synced(&dir.tokenizer(), tokenizer.to_json().as_bytes())?;
    dir.claim(&plan.config, &dir.tokenizer())?;
    save(&dir, &model, &plan)?;
    partial.appear()?;
    Ok(plan.config)
}

/// Saves the weights as the checkpoint of step 0.
fn save(dir: &RunDir, model: &Gpt, plan: &Plan) -> Result<()> {
    let state = State::imported(Conditions {
        lockstep: env!("CARGO_PKG_VERSION").into(),
        libtorch: torch::libtorch_version(),
        device: "cpu".into(),
        hardware: torch::hardware(Device::Cpu),
        world_size: 1,
        threads: 1,
        micro_batch: plan.micro_batch,
    });
    // An optimizer of no range has no state.
    let optimizer = AdamW::new(&model.parameters, Vec::new(), &plan.config.optim);
    Saving::begin(&dir.checkpoints(), &state, &model.parameters, &optimizer, None)?.publish(None, || Ok(())).map(drop)
}

fn read_tokenizer(from: &Path) -> Result<Tokenizer> {
    let [whole, vocab, merges] = [TOKENIZER, "vocab.json", "merges.txt"].map(|name| from.join(name));
    if whole.is_file() {
        return Tokenizer::from_file(&whole);
    }
    if vocab.is_file() && merges.is_file() {
        return Tokenizer::from_vocab_and_merges(&vocab, &merges);
    }
    let message =
        format!("{} has no {TOKENIZER}, nor vocab.json and merges.txt; copy the tokenizer there", from.display());
    Err(Error::Usage(message).into())
}

fn read_json(path: &Path) -> Result<Vec<u8>> {
    let size = path.metadata().map_or(0, |found| found.len());
    if size > MAX_JSON {
        return refuse(path, &format!("has {size} bytes, expected at most {MAX_JSON}"));
    }
    let missing =
        |e| Error::Usage(format!("cannot read {}: {e}; name a Hugging Face folder with a GPT-2", path.display()));
    Ok(fs::read(path).map_err(missing)?)
}

fn refuse<T>(path: &Path, what: &str) -> Result<T> {
    Err(Error::Storage(format!("{} {what}", path.display())).into())
}

/// The content of a model's safetensors files.
struct Weights(Vec<(PathBuf, Vec<u8>)>);

impl Weights {
    /// Reads `model.safetensors`, or the files that its index names.
    fn read(from: &Path) -> Result<Self> {
        let index = from.join(INDEX);
        let names = if from.join(MODEL).is_file() {
            BTreeSet::from([MODEL.to_owned()])
        } else if index.is_file() {
            shards(&index)?
        } else {
            return Err(no_tensors(from));
        };
        let read = |name: String| {
            let path = from.join(name);
            let bytes = fs::read(&path).map_err(|e| Error::Storage(format!("cannot read {}: {e}", path.display())))?;
            Ok((path, bytes))
        };
        names.into_iter().map(read).collect::<Result<_>>().map(Self)
    }

    /// The model of this shape with these weights: each must be there once, and no other.
    fn into_model(self, shape: Shape) -> Result<Gpt> {
        let mut found: BTreeMap<String, (&Path, TensorView)> = BTreeMap::new();
        for (path, bytes) in &self.0 {
            for (name, view) in parse_tensors(path, bytes)?.tensors() {
                let name = our_name(&name);
                if is_buffer(&name) {
                    continue;
                }
                if found.insert(name.clone(), (path, view)).is_some() {
                    return refuse(path, &format!("holds `{name}`, and so does another file, or under another name"));
                }
            }
        }
        if shape.tied_head {
            take_tied_head(&mut found)?;
        }
        // All of it is checked before memory is allocated for a model that a file only claims to have.
        let tensors = shape.tensors();
        for (name, expected, _) in &tensors {
            let Some((path, view)) = found.get(name) else {
                return refuse(&self.0[0].0, &format!("lacks `{name}`, which a model of its {CONFIG} has"));
            };
            let mut size: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            if is_transposed(name) {
                size.reverse();
            }
            if kind(view.dtype()).is_none() || size != *expected {
                let what = format!(
                    "holds `{name}` as {:?} {:?}; a model of its {CONFIG} has it as F32, BF16 or F16 {:?}",
                    view.dtype(),
                    view.shape(),
                    match is_transposed(name) {
                        true => expected.iter().rev().copied().collect(),
                        false => expected.clone(),
                    }
                );
                return refuse(path, &what);
            }
        }
        if let Some((name, (path, _))) =
            found.iter().find(|(name, _)| !tensors.iter().any(|(known, ..)| known == *name))
        {
            return refuse(path, &format!("holds `{name}`, which a model of its {CONFIG} does not have"));
        }
        let mut model = Gpt::new(shape, Device::Cpu, Kind::Float);
        for spec in &model.parameters.specs {
            let (_, view) = &found[&spec.name];
            let size: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            let source = Tensor::from_data_size(view.data(), &size, kind(view.dtype()).unwrap_or(Kind::Float));
            let source = if is_transposed(&spec.name) { source.tr() } else { source };
            no_grad(|| spec.view(&model.parameters.flat).copy_(&source));
        }
        model.parameters.publish();
        Ok(model)
    }
}

/// The files that an index names: beside it, and nowhere else.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_slice(&read_json(index)?)
        .map_err(|e| Error::Storage(format!("{}: expected an index of tensors: {e}", index.display())))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    match names.iter().find(|name| name.contains('/') || !name.ends_with(".safetensors")) {
        Some(name) => refuse(index, &format!("names {name:?}; expected safetensors files beside it")),
        None if names.is_empty() => refuse(index, "names no file"),
        None => Ok(names),
    }
}

fn no_tensors(from: &Path) -> anyhow::Error {
    let folder = from.display();
    let is_pickle = |name: &str| name.starts_with("pytorch_model") && name.contains(".bin");
    let entries = fs::read_dir(from).into_iter().flatten().flatten();
    let pickle = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).find(|name| is_pickle(name));
    let message = match pickle {
        Some(pickle) => format!(
            "{folder} has its weights in {pickle}, a pickle, which can run any program when it is read; if you trust it, \
             convert it where transformers is installed: python -c \"from transformers import GPT2LMHeadModel as M; \
             M.from_pretrained('{folder}').save_pretrained('{folder}', safe_serialization=True)\""
        ),
        None => format!("{folder} has no {MODEL}, nor {INDEX}; name a Hugging Face folder with a GPT-2"),
    };
    Error::Usage(message).into()
}

/// The name that a tensor has here: some files leave out the prefix.
fn our_name(name: &str) -> String {
    match name {
        HEAD => HEAD.to_owned(),
        _ => format!("{PREFIX}{}", name.strip_prefix(PREFIX).unwrap_or(name)),
    }
}

/// Whether this is the causal mask, or the number that it masks with, which older files hold beside the weights.
fn is_buffer(name: &str) -> bool {
    name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
}

/// A tied head may be in the file, too, if it is the embedding.
fn take_tied_head(found: &mut BTreeMap<String, (&Path, TensorView)>) -> Result<()> {
    let Some((path, head)) = found.remove(HEAD) else { return Ok(()) };
    match found.get(WTE) {
        Some((_, embedding)) if embedding.data() != head.data() => {
            refuse(path, &format!("holds `{HEAD}`, which is not `{WTE}`; {CONFIG} says tie_word_embeddings"))
        }
        _ => Ok(()),
    }
}

/// The type of a tensor's elements here; `None` if it cannot be widened to fp32.
fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
        _ => None,
    }
}
