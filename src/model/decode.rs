//! One token after another on the CPU, at the speed of its memory.
//!
//! LibTorch computes a prompt, many tokens at once. What follows is one token of each sequence at a time: products of a matrix
//! with few vectors, which [`Matrix`] computes, and so little else that it is written plainly.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::cache::Cache;
use super::gpt::{Gpt, HEAD, NORM_EPSILON, WPE, WTE};
use super::head::exp_of_negative;
use super::product::Matrix;
use crate::config::{Activation, Norm, Shape};
use crate::torch;

/// A model's weights as they are read, and what attention needs to know of the tokens before.
pub struct Decoder<'a> {
    shape: &'a Shape,
    wte: Matrix<'a>,
    wpe: Matrix<'a>,
    blocks: Vec<Block<'a>>,
    ln_f: Option<Affine<'a>>,
    /// `None` if it is tied to `wte`.
    head: Option<Matrix<'a>>,
    /// Tokens seen.
    length: usize,
}

struct Block<'a> {
    ln_1: Affine<'a>,
    c_attn: Linear<'a>,
    attn_proj: Linear<'a>,
    ln_2: Affine<'a>,
    c_fc: Linear<'a>,
    mlp_proj: Linear<'a>,
    /// Of each sequence's heads, sequence after sequence.
    heads: Vec<Head>,
}

/// The past of a sequence in a head of D elements.
struct Head {
    /// (tokens seen, D)
    keys: Vec<f32>,
    /// (tokens seen, D)
    values: Vec<f32>,
}

struct Affine<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

struct Linear<'a> {
    weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
}

impl<'a> Decoder<'a> {
    /// Goes on after the tokens in `cache`. `kind` is the type that matrices are read in, `Float` or `BFloat16`: they are
    /// rounded to it, sums are fp32.
    pub fn new(model: &'a Gpt, cache: &Cache, kind: Kind) -> Self {
        let (shape, flat) = (&model.shape, torch::floats(&model.parameters.flat));
        let find = |name: &str| {
            let spec = model.parameters.specs.iter().find(|spec| spec.name == name)?;
            Some((&flat[spec.offset as usize..][..spec.numel() as usize], spec.shape[spec.shape.len() - 1] as usize))
        };
        let matrix = |name: &str| {
            let (elements, width) = find(name)?;
            Some(if kind == Kind::Float { Matrix::float(elements, width) } else { Matrix::bf16(elements, width) })
        };
        // The names here and `Shape::tensors` are two readings of one table.
        let known = |name: &str| matrix(name).unwrap_or_else(|| unreachable!("no parameter {name}"));
        let bias = |name: &str| find(&format!("{name}.bias")).map(|(elements, _)| elements);
        let affine = |name: &str| {
            let weight = find(&format!("{name}.weight")).map(|(elements, _)| elements);
            weight.map(|weight| Affine { weight, bias: bias(name) })
        };
        let norm = |name: &str| affine(name).unwrap_or_else(|| unreachable!("no parameter {name}"));
        let linear = |name: &str| Linear { weight: known(&format!("{name}.weight")), bias: bias(name) };
        let blocks = cache.layers.iter().enumerate().map(|(layer, (keys, values))| {
            let name = |part: &str| format!("transformer.h.{layer}.{part}");
            Block {
                ln_1: norm(&name("ln_1")),
                c_attn: linear(&name("attn.c_attn")),
                attn_proj: linear(&name("attn.c_proj")),
                ln_2: norm(&name("ln_2")),
                c_fc: linear(&name("mlp.c_fc")),
                mlp_proj: linear(&name("mlp.c_proj")),
                heads: past(keys).into_iter().zip(past(values)).map(|(keys, values)| Head { keys, values }).collect(),
            }
        });
        Self {
            shape,
            wte: known(WTE),
            wpe: known(WPE),
            blocks: blocks.collect(),
            ln_f: affine("transformer.ln_f"),
            head: matrix(HEAD),
            length: cache.len() as usize,
        }
    }

    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// The logits of the token after these, (n, V), row after row; `ids` has one token of each of the n sequences.
    pub fn step(&mut self, ids: &[u32]) -> Vec<f32> {
        // On one of rayon's threads, so that the many small products need not wake one first.
        rayon::scope(|_| {
            let position = self.wpe.row(self.length);
            let embed = |&id: &u32| add(self.wte.row(id as usize), &position);
            let mut x: Vec<f32> = ids.iter().flat_map(embed).collect(); // (n, C)
            for block in &mut self.blocks {
                x = block.step(x, self.shape);
            }
            self.length += 1;
            if let Some(norm) = &self.ln_f {
                x = norm.layer_norm(&x);
            }
            self.head.as_ref().unwrap_or(&self.wte).times(&x)
        })
    }
}

impl Block<'_> {
    /// (n, C) to (n, C), as [`Gpt`]'s block.
    fn step(&mut self, x: Vec<f32>, shape: &Shape) -> Vec<f32> {
        match shape.norm {
            Norm::Pre => {
                let x = add(self.attention(&self.ln_1.layer_norm(&x), shape), &x);
                add(self.mlp(&self.ln_2.layer_norm(&x), shape.activation), &x)
            }
            Norm::Post => {
                let attended = self.attention(&x, shape);
                let x = self.ln_1.layer_norm(&add(attended, &x));
                self.ln_2.layer_norm(&add(self.mlp(&x, shape.activation), &x))
            }
        }
    }

    fn attention(&mut self, x: &[f32], shape: &Shape) -> Vec<f32> {
        let (c, d) = (shape.n_embd as usize, (shape.n_embd / shape.n_head) as usize);
        let parts = self.c_attn.times(x); // (n, 3 C)
        let mut y = vec![0.0; x.len()]; // (n, C)
        let per_sequence = c / d;
        self.heads.par_iter_mut().zip(y.par_chunks_mut(d)).enumerate().for_each(|(number, (head, y))| {
            let (sequence, at) = (number / per_sequence, number % per_sequence * d);
            let part = |which: usize| &parts[(3 * sequence + which) * c + at..][..d];
            head.attend(part(0), part(1), part(2), y);
        });
        self.attn_proj.times(&y)
    }

    fn mlp(&self, x: &[f32], activation: Activation) -> Vec<f32> {
        let mut x = self.c_fc.times(x);
        for x in &mut x {
            *x = match activation {
                Activation::Gelu => gelu(*x),
                Activation::Relu => x.max(0.0),
            };
        }
        self.mlp_proj.times(&x)
    }
}

impl Head {
    /// Remembers a token's `key` and `value`, and adds to `y` what its `query` finds; (D,) each.
    fn attend(&mut self, query: &[f32], key: &[f32], value: &[f32], y: &mut [f32]) {
        self.keys.extend_from_slice(key);
        self.values.extend_from_slice(value);
        let scale = 1.0 / (query.len() as f32).sqrt();
        let mut weights = Matrix::float(&self.keys, query.len()).times(query); // (tokens,)
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = exp_of_negative((*weight - largest) * scale));
        let sum: f32 = weights.iter().sum();
        for (weight, value) in weights.iter().zip(self.values.chunks_exact(query.len())) {
            let weight = weight / sum;
            y.iter_mut().zip(value).for_each(|(y, value)| *y += weight * value);
        }
    }
}

impl Affine<'_> {
    /// Over the last dimension of (n, C).
    fn layer_norm(&self, x: &[f32]) -> Vec<f32> {
        let width = self.weight.len();
        let mut normed = Vec::with_capacity(x.len());
        for row in x.chunks_exact(width) {
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
            let scale = 1.0 / (variance + NORM_EPSILON as f32).sqrt();
            normed.extend(row.iter().zip(self.weight).map(|(x, weight)| (x - mean) * scale * weight));
        }
        with_bias(normed, self.bias)
    }
}

impl Linear<'_> {
    fn times(&self, x: &[f32]) -> Vec<f32> {
        with_bias(self.weight.times(x), self.bias)
    }
}

fn with_bias(mut x: Vec<f32>, bias: Option<&[f32]>) -> Vec<f32> {
    if let Some(bias) = bias {
        for row in x.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
    }
    x
}

fn add(mut x: Vec<f32>, y: &[f32]) -> Vec<f32> {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    x
}

/// GELU by tanh, as GPT-2's.
fn gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    let small = exp_of_negative(-2.0 * inner.abs());
    let tanh = (1.0 - small) / (1.0 + small);
    0.5 * x * (1.0 + tanh.copysign(inner))
}

/// (B, H, past, D) as the (past, D) of each sequence's heads.
fn past(tensor: &Tensor) -> Vec<Vec<f32>> {
    let tensor = tensor.to_kind(Kind::Float).contiguous();
    let [b, h, past, d] = tensor.size()[..] else { unreachable!("a cache has four dimensions") };
    let elements = torch::floats(&tensor);
    let length = (past * d) as usize;
    (0..(b * h) as usize).map(|head| elements[head * length..][..length].to_vec()).collect()
}
