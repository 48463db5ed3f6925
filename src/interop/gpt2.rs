//! `config.json` of a GPT-2: what of it a model here can be, and what of a model here it can say.

use std::path::Path;

use serde::Deserialize;
use serde_json::{json, Value};
use tracing::warn;

use super::CONFIG;
use crate::config::{Activation, Config, Data, Model, Norm, Shape};
use crate::error::{Error, Result};
use crate::model::gpt::NORM_EPSILON;

/// The keys that decide what a GPT-2 computes; one that is absent has the value of `transformers`.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct Gpt2Config {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    n_positions: usize,
    n_embd: usize,
    n_layer: usize,
    n_head: usize,
    n_inner: Option<usize>,
    activation_function: String,
    resid_pdrop: f64,
    embd_pdrop: f64,
    attn_pdrop: f64,
    layer_norm_epsilon: f64,
    scale_attn_weights: bool,
    scale_attn_by_inverse_layer_idx: bool,
    add_cross_attention: bool,
    /// Whether the head is the token embedding.
    pub tie_word_embeddings: bool,
}

impl Default for Gpt2Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: "gelu_new".into(),
            resid_pdrop: 0.1,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            layer_norm_epsilon: NORM_EPSILON,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            add_cross_attention: false,
            tie_word_embeddings: true,
        }
    }
}

impl Gpt2Config {
    /// Reads a folder's `config.json`, and refuses a model that is none of ours.
    ///
    /// # Errors
    /// Usage, with the key, what was expected and what was found.
    pub fn read(path: &Path, text: &[u8]) -> Result<Self> {
        let refuse = |reason: String| -> anyhow::Error { Error::Usage(format!("{}: {reason}", path.display())).into() };
        let value: Value = serde_json::from_slice(text).map_err(|e| refuse(format!("this is not JSON: {e}")))?;
        let found = &value["model_type"];
        if found != "gpt2" {
            return Err(refuse(format!("model_type is {found}; only \"gpt2\" can be imported")));
        }
        let config = Self::deserialize(&value).map_err(|e| refuse(format!("this is no GPT-2's: {e}")))?;
        match config.unsupported() {
            Some((key, found, expected)) => Err(refuse(format!(
                "{key} is {found}; a model here has {expected}, so this one would compute otherwise"
            ))),
            None => Ok(config),
        }
    }

    /// (key, what was found, what a model here has) of the first key that no model here can follow.
    fn unsupported(&self) -> Option<(&'static str, String, String)> {
        let inner = self.n_embd.saturating_mul(4);
        let rules = [
            (
                self.activation().is_some(),
                "activation_function",
                self.activation_function.clone(),
                "gelu_new (the tanh form) or relu".into(),
            ),
            (
                self.n_inner.is_none_or(|found| found == inner),
                "n_inner",
                self.n_inner.unwrap_or_default().to_string(),
                format!("{inner}, four times n_embd"),
            ),
            (
                (self.layer_norm_epsilon / NORM_EPSILON - 1.0).abs() < 1e-6,
                "layer_norm_epsilon",
                self.layer_norm_epsilon.to_string(),
                format!("{NORM_EPSILON}"),
            ),
            (
                self.scale_attn_weights,
                "scale_attn_weights",
                "false".into(),
                "scores scaled by their heads' size".into(),
            ),
            (
                !self.scale_attn_by_inverse_layer_idx,
                "scale_attn_by_inverse_layer_idx",
                "true".into(),
                "the same scale in each layer".into(),
            ),
            (!self.add_cross_attention, "add_cross_attention", "true".into(), "no cross attention".into()),
        ];
        let (_, key, found, expected) = rules.into_iter().find(|(supported, ..)| !supported)?;
        Some((key, found, expected))
    }

    fn activation(&self) -> Option<Activation> {
        match self.activation_function.as_str() {
            "gelu_new" | "gelu_pytorch_tanh" => Some(Activation::Gelu),
            "relu" => Some(Activation::Relu),
            _ => None,
        }
    }

    /// The configuration of a run with this model; its data folder is named like the run.
    pub fn run(&self, name: &str) -> Config {
        if [self.embd_pdrop, self.attn_pdrop].iter().any(|&dropout| dropout != self.resid_pdrop) {
            warn!(
                "the model was trained with three different dropouts; a run has one: model.dropout becomes resid_pdrop, {}",
                self.resid_pdrop
            );
        }
        let model = Model {
            n_layer: Some(self.n_layer),
            n_head: Some(self.n_head),
            n_embd: Some(self.n_embd),
            dropout: self.resid_pdrop,
            norm: Norm::Pre,
            activation: self.activation().unwrap_or(Activation::Gelu),
            tied_head: self.tie_word_embeddings,
            bias: true,
            ..Model::default()
        };
        let data = Data { dir: Path::new("data").join(name), block_size: self.n_positions, ..Data::default() };
        Config { name: name.into(), data, model, ..Config::default() }
    }
}

/// The `config.json` of a model here, whose weights have this type, such as `float32`.
///
/// # Errors
/// Usage, if no GPT-2 computes what the model computes.
pub fn describe(shape: &Shape, end_of_text: u32, dtype: &str) -> Result<Value> {
    if shape.norm == Norm::Post {
        return Err(Error::Usage(format!(
            "the model has model.norm: post, and {CONFIG} of a GPT-2 cannot say so: its norms come before attention and MLP; \
             only a run with model.norm: pre can be exported"
        ))
        .into());
    }
    let activation = match shape.activation {
        Activation::Gelu => "gelu_new",
        Activation::Relu => "relu",
    };
    Ok(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": null,
        "activation_function": activation,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
        "layer_norm_epsilon": NORM_EPSILON,
        "initializer_range": 0.02,
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        "tie_word_embeddings": shape.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
    }))
}
