//! The GPT: token and position embeddings, transformer blocks, and the backward pass block by block.
//!
//! B sequences, T tokens, C = n_embd channels, H heads of D = C / H, V = vocab_size.
//!
//! Radford et al. 2019 (`norm: pre`), Vaswani et al. 2017 (`norm: post`).

use tch::{no_grad, Device, Kind, Tensor};

use super::cache::Cache;
use super::head::{self, Score, Targets};
use super::parameters::Parameters;
use super::written::{self, Written};
use crate::config::{Activation, Norm, Shape};
use crate::random::mix;
use crate::torch;

impl Shape {
    /// Floating-point operations that one token of training needs: 6 N + 12 L C T, N without the embedding tables but
    /// with the head (Kaplan et al. 2020; the second term is attention's).
    pub fn flop_per_token(&self) -> f64 {
        let matrices: i64 = self
            .tensors()
            .iter()
            .filter(|(name, ..)| !name.ends_with("wte.weight") && !name.ends_with("wpe.weight"))
            .map(|(_, shape, _)| shape.iter().product::<i64>())
            .sum();
        let tied = if self.tied_head { self.vocab_size * self.n_embd } else { 0 };
        6.0 * (matrices + tied) as f64 + (12 * self.n_layer * self.n_embd * self.block_size) as f64
    }

    /// How many parameters there are.
    pub fn parameters(&self) -> i64 {
        self.tensors().iter().map(|(_, shape, _)| shape.iter().product::<i64>()).sum()
    }

    /// (name, shape, decay) of every parameter, in the order in which backward finishes their gradients.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>, bool)> {
        let c = self.n_embd;
        let mut all = Vec::new();
        if !self.tied_head {
            all.push((HEAD.to_string(), vec![self.vocab_size, c], true));
        }
        let mut push = |name: String, shape: Vec<i64>, bias: bool| {
            let (matrix, width) = (shape.len() == 2, shape[0]);
            all.push((format!("{name}.weight"), shape, matrix));
            if bias {
                all.push((format!("{name}.bias"), vec![width], false));
            }
        };
        if self.norm == Norm::Pre {
            push("transformer.ln_f".into(), vec![c], self.bias);
        }
        for layer in (0..self.n_layer).rev() {
            let h = format!("transformer.h.{layer}");
            push(format!("{h}.mlp.c_proj"), vec![c, 4 * c], self.bias);
            push(format!("{h}.mlp.c_fc"), vec![4 * c, c], self.bias);
            push(format!("{h}.ln_2"), vec![c], self.bias);
            push(format!("{h}.attn.c_proj"), vec![c, c], self.bias);
            push(format!("{h}.attn.c_attn"), vec![3 * c, c], self.bias);
            push(format!("{h}.ln_1"), vec![c], self.bias);
        }
        all.push((WPE.into(), vec![self.block_size, c], false));
        all.push((WTE.into(), vec![self.vocab_size, c], false));
        all
    }
}

/// The name of an untied head's weight, (V, C).
pub const HEAD: &str = "lm_head.weight";
/// The name of the token embedding, (V, C).
pub const WTE: &str = "transformer.wte.weight";
/// The name of the position embedding, (T, C).
pub const WPE: &str = "transformer.wpe.weight";
/// Added to a variance in a layer norm, as in GPT-2.
pub const NORM_EPSILON: f64 = 1e-5;

/// A weight and its bias, as views of the flat parameters, and their gradients, as views of the fp32 ones.
pub(super) struct Affine {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) weight_grad: Tensor,
    pub(super) bias_grad: Option<Tensor>,
}

impl Affine {
    pub(super) fn linear(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }

    fn layer_norm(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), self.bias.as_ref(), NORM_EPSILON, true)
    }
}

pub(super) struct Block {
    pub(super) ln_1: Affine,
    pub(super) c_attn: Affine,
    pub(super) attn_proj: Affine,
    pub(super) ln_2: Affine,
    pub(super) c_fc: Affine,
    pub(super) mlp_proj: Affine,
}

/// A stage's input, and what of its forward pass the backward pass needs.
struct Taped {
    input: Tensor,
    kept: Kept,
}

enum Kept {
    /// Nothing: it is computed again.
    Nothing,
    /// Its output, with autograd's graph.
    Graph(Tensor),
    /// What the block that is written out keeps.
    Written(written::Kept),
}

/// The model and its parameters.
pub struct Gpt {
    /// What it is.
    pub shape: Shape,
    /// Its flat memory.
    pub parameters: Parameters,
    wte: Tensor,
    wpe: Tensor,
    blocks: Vec<Block>,
    ln_f: Option<Affine>,
    /// (V, C): `wte` itself if the head is tied.
    head: Tensor,
    /// fp32 views of the flat gradient that are filled without autograd.
    head_grad: Tensor,
    wte_grad: Tensor,
    wpe_grad: Tensor,
    /// Where each stage's parameters end in the flat tensors.
    ends: Vec<i64>,
}

impl Gpt {
    /// A model of zeros: [`Gpt::initialize`] it, or load a checkpoint into its parameters and publish them.
    ///
    /// `kind` is the type of weights and activations in the forward and backward pass: `Float` or `BFloat16`.
    pub fn new(shape: Shape, device: Device, kind: Kind) -> Self {
        let parameters = Parameters::new(shape.tensors(), device, kind);
        // `shapes` and the names here are two readings of one table; a name that it lacks cannot be asked for.
        let leaf = |name: &str| parameters.leaf(name).unwrap_or_else(|| unreachable!("no parameter {name}"));
        let grad = |name: &str| parameters.grad_of(name).unwrap_or_else(|| unreachable!("no parameter {name}"));
        let affine = |name: String| Affine {
            weight: leaf(&format!("{name}.weight")),
            bias: shape.bias.then(|| leaf(&format!("{name}.bias"))),
            weight_grad: grad(&format!("{name}.weight")),
            bias_grad: shape.bias.then(|| grad(&format!("{name}.bias"))),
        };
        let blocks = (0..shape.n_layer)
            .map(|layer| {
                let part = |name: &str| affine(format!("transformer.h.{layer}.{name}"));
                Block {
                    ln_1: part("ln_1"),
                    c_attn: part("attn.c_attn"),
                    attn_proj: part("attn.c_proj"),
                    ln_2: part("ln_2"),
                    c_fc: part("mlp.c_fc"),
                    mlp_proj: part("mlp.c_proj"),
                }
            })
            .collect();
        let head = if shape.tied_head { WTE } else { HEAD };
        let embedded = parameters.end_of("transformer.h.0.");
        let ends = (0..shape.n_layer).map(|layer| parameters.end_of(&format!("transformer.h.{layer}.")));
        let ends = [embedded].into_iter().chain(ends).chain([parameters.end_of("transformer.ln_f.")]).collect();
        Self {
            wte: leaf(WTE),
            wpe: leaf(WPE),
            blocks,
            ln_f: (shape.norm == Norm::Pre).then(|| affine("transformer.ln_f".into())),
            head: leaf(head),
            head_grad: grad(head),
            wte_grad: grad(WTE),
            wpe_grad: grad(WPE),
            ends,
            shape,
            parameters,
        }
    }

    /// The type of weights and activations in the forward and backward pass.
    pub fn kind(&self) -> Kind {
        self.wte.kind()
    }

    /// GPT-2's initialisation: normal with deviation 0.02, residual projections 0.02 / sqrt(2 n_layer), biases 0, norms 1.
    ///
    /// Drawn on the CPU in the order of the names, so that a seed means the same weights on every device.
    pub fn initialize(&mut self, seed: u64) {
        tch::manual_seed(mix(seed, 0) as i64);
        let mut specs: Vec<_> = self.parameters.specs.iter().collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        no_grad(|| {
            for spec in specs {
                let mut view = spec.view(&self.parameters.flat);
                if spec.shape.len() == 1 {
                    let _ = view.fill_(if spec.name.ends_with("weight") { 1.0 } else { 0.0 });
                    continue;
                }
                let residual = spec.name.ends_with("c_proj.weight");
                let deviation = if residual { 0.02 / ((2 * self.shape.n_layer) as f64).sqrt() } else { 0.02 };
                let mut draws = Tensor::empty(&spec.shape[..], (Kind::Float, Device::Cpu));
                view.copy_(&draws.normal_(0.0, deviation));
            }
        });
        self.parameters.publish();
    }

    /// An empty cache for `batch` sequences.
    pub fn cache(&self, batch: i64) -> Cache {
        let (heads, width) = (self.shape.n_head, self.shape.n_embd / self.shape.n_head);
        let empty = || Tensor::empty([batch, heads, 0, width], (self.kind(), self.wte.device()));
        Cache { layers: (0..self.shape.n_layer).map(|_| (empty(), empty())).collect() }
    }

    /// Hidden states after the last block and norm, for evaluation and generation.
    ///
    /// `ids` (B, T) holds the tokens at positions `start` to `start + T`; with a `cache` of the `start` tokens before,
    /// it is extended by these: any number of them if it is empty, one if it is not. Returns (B, T, C).
    pub fn hidden(&self, ids: &Tensor, mut cache: Option<&mut Cache>) -> Tensor {
        no_grad(|| {
            let start = cache.as_ref().map_or(0, |cache| cache.len());
            let mut x = self.embed(ids, start);
            for (layer, block) in self.blocks.iter().enumerate() {
                let layer_cache = cache.as_mut().map(|cache| &mut cache.layers[layer]);
                x = self.block(block, &x, 0.0, layer_cache);
            }
            match &self.ln_f {
                Some(norm) => norm.layer_norm(&x),
                None => x,
            }
        })
    }

    /// Scores of the next token: hidden states (..., C) to logits (..., V), fp32.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        no_grad(|| hidden.linear(&self.head, None::<&Tensor>).to_kind(Kind::Float))
    }

    /// How well each of (B, T) targets that counts is predicted, row after row, with (B, T) weights. `counted` as in
    /// [`Gpt::forward_backward`].
    pub fn scores(&self, inputs: &Tensor, targets: &Tensor, weights: &Tensor, counted: Option<&Tensor>) -> Vec<Score> {
        let hidden = self.hidden(inputs, None);
        head::scores(&hidden, &self.head, &Targets { ids: targets, weights, counted })
    }

    /// One micro-step: the weighted loss of a batch, (1,) fp64 on the model's device, its gradients added to the flat gradient.
    ///
    /// `inputs` and `targets` are (B, T) int64, `weights` (B, T) fp32; the objective is the sum over tokens of weight
    /// times negative log-likelihood. `counted`, (N,) int64, names the positions of the flattened targets whose weight is not
    /// 0, if not all count; the others then cost nothing in the head. `seed` fixes dropout's draws. Nothing waits for a GPU.
    ///
    /// The graph is cut at every block's border, so that a block's activations are freed, and its gradients final, as soon as
    /// the backward pass has left it: `finished` is then told the flat gradient, and up to which element it will not change any
    /// more. If the loss is not finite, the gradient is not either.
    pub fn forward_backward(
        &mut self,
        inputs: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        counted: Option<&Tensor>,
        seed: u64,
        finished: &mut dyn FnMut(&Tensor, i64),
    ) -> Tensor {
        let mut tape = Vec::with_capacity(self.stages());
        let mut x = no_grad(|| self.embed(inputs, 0));
        for stage in 0..self.stages() {
            let input = x.detach().set_requires_grad(true);
            let (output, kept) = self.taped(stage, &input, seed, !self.shape.recompute);
            x = output;
            tape.push(Taped { input, kept });
        }

        let targets = Targets { ids: targets, weights, counted };
        let (loss, mut grad) = head::loss_and_gradients(&x, &self.head, &targets, &mut self.head_grad);
        drop(x);
        // Whether an update may be made is seen from the gradient's norm, by every rank, since the ranks add it up.
        let _ = no_grad(|| self.parameters.grad.narrow(0, 0, 1).g_add_(&(&loss * 0.0)));
        let mut end = if self.shape.tied_head { 0 } else { self.parameters.end_of(HEAD) };
        finished(&self.parameters.grad, end);

        while let Some(Taped { input, kept }) = tape.pop() {
            let stage = tape.len();
            let begin = std::mem::replace(&mut end, self.ends[stage]);
            let kept = match kept {
                Kept::Nothing => self.taped(stage, &input, seed, true).1,
                kept => kept,
            };
            grad = match kept {
                Kept::Graph(output) => {
                    torch::backward(&output, &grad);
                    self.parameters.collect_gradients(begin, end);
                    input.grad()
                }
                Kept::Written(kept) => {
                    let (written, block) = self.written(stage, seed).unwrap_or_else(|| unreachable!("no such block"));
                    written.backward(block, kept, &grad)
                }
                Kept::Nothing => unreachable!("a stage whose output is not kept"),
            };
            finished(&self.parameters.grad, end);
        }
        no_grad(|| {
            let rows = inputs.reshape([-1]);
            let grad = grad.to_kind(Kind::Float);
            let _ = self.wpe_grad.narrow(0, 0, inputs.size()[1]).g_add_(&grad.sum_dim_intlist(0, false, Kind::Float));
            let _ = self.wte_grad.index_add_(0, &rows, &grad.reshape([-1, self.shape.n_embd]));
        });
        finished(&self.parameters.grad, self.parameters.numel());
        loss
    }

    /// (B, T) tokens at positions `start`.. to (B, T, C).
    fn embed(&self, ids: &Tensor, start: i64) -> Tensor {
        let positions = self.wpe.narrow(0, start, ids.size()[1]); // (T, C)
        self.wte.index_select(0, &ids.reshape([-1])).view([ids.size()[0], ids.size()[1], -1]) + positions
    }

    /// The pieces between which the graph is cut: the embedding's dropout, the blocks, the final norm.
    fn stages(&self) -> usize {
        1 + self.blocks.len() + usize::from(self.ln_f.is_some())
    }

    /// A stage's output without a graph, and what it keeps for the backward pass, if it is to.
    fn taped(&self, stage: usize, input: &Tensor, seed: u64, keeps: bool) -> (Tensor, Kept) {
        if let Some((written, block)) = self.written(stage, seed) {
            let attend = |qkv: &Tensor| self.attend(qkv, self.shape.dropout, None);
            let (output, kept) = written.forward(block, input, attend);
            return (output, if keeps { Kept::Written(kept) } else { Kept::Nothing });
        }
        if !keeps {
            return (no_grad(|| self.stage(stage, input, seed)), Kept::Nothing);
        }
        let output = self.stage(stage, input, seed);
        (output.detach(), Kept::Graph(output))
    }

    /// The block of a stage, if kernels of our own compute it.
    fn written(&self, stage: usize, seed: u64) -> Option<(Written<'_>, &Block)> {
        let block = self.blocks.get(stage.wrapping_sub(1))?;
        let Shape { activation, dropout, .. } = self.shape;
        if !self.shape.fits_kernels(self.kind()) {
            return None;
        }
        let kernels = torch::kernels(self.wte.device())?;
        Some((Written { kernels, activation, dropout, seed: mix(seed, stage as u64) }, block))
    }

    fn stage(&self, stage: usize, x: &Tensor, seed: u64) -> Tensor {
        let dropout = self.shape.dropout;
        if dropout > 0.0 {
            // Seeded per stage, so that a block computed again draws what it drew before.
            tch::manual_seed(mix(seed, stage as u64) as i64);
        }
        match (stage, self.blocks.get(stage.wrapping_sub(1)), &self.ln_f) {
            (0, ..) => x.dropout(dropout, dropout > 0.0),
            (_, Some(block), _) => self.block(block, x, dropout, None),
            (_, None, Some(norm)) => norm.layer_norm(x),
            (_, None, None) => x.shallow_clone(),
        }
    }

    fn block(&self, block: &Block, x: &Tensor, dropout: f64, cache: Option<&mut (Tensor, Tensor)>) -> Tensor {
        match self.shape.norm {
            Norm::Pre => {
                let x = x + self.attention(block, &block.ln_1.layer_norm(x), dropout, cache);
                &x + self.mlp(block, &block.ln_2.layer_norm(&x), dropout)
            }
            Norm::Post => {
                let x = block.ln_1.layer_norm(&(x + self.attention(block, x, dropout, cache)));
                block.ln_2.layer_norm(&(&x + self.mlp(block, &x, dropout)))
            }
        }
    }

    /// Causal self-attention, (B, T, C) to (B, T, C); with a cache, T new tokens attend to all before them as well.
    fn attention(&self, block: &Block, x: &Tensor, dropout: f64, cache: Option<&mut (Tensor, Tensor)>) -> Tensor {
        let y = self.attend(&block.c_attn.linear(x), dropout, cache);
        block.attn_proj.linear(&y).dropout(dropout, dropout > 0.0)
    }

    /// Attention between its projections, (B, T, 3C) to (B, T, C).
    fn attend(&self, qkv: &Tensor, dropout: f64, cache: Option<&mut (Tensor, Tensor)>) -> Tensor {
        let (b, t, c) = (qkv.size()[0], qkv.size()[1], self.shape.n_embd);
        let heads = |x: &Tensor| x.view([b, t, self.shape.n_head, -1]).transpose(1, 2); // (B, H, T, D)
        let parts = qkv.split(c, 2); // 3 x (B, T, C)
        let (q, mut k, mut v) = (heads(&parts[0]), heads(&parts[1]), heads(&parts[2]));
        let mut causal = true;
        if let Some((keys, values)) = cache {
            if keys.size()[2] > 0 {
                k = Tensor::cat(&[&*keys, &k], 2); // (B, H, past + T, D)
                v = Tensor::cat(&[&*values, &v], 2);
                // The fused kernel's causal mask is aligned to the first key. One new token may see all of them; more
                // than one start an empty cache.
                causal = false;
            }
            (*keys, *values) = (k.shallow_clone(), v.shallow_clone());
        }
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, dropout, causal, None, false);
        y.transpose(1, 2).reshape([b, t, c])
    }

    /// (B, T, C) to (B, T, 4C) and back.
    fn mlp(&self, block: &Block, x: &Tensor, dropout: f64) -> Tensor {
        let x = block.c_fc.linear(x);
        let x = match self.shape.activation {
            Activation::Gelu => x.gelu("tanh"),
            Activation::Relu => x.relu(),
        };
        block.mlp_proj.linear(&x).dropout(dropout, dropout > 0.0)
    }
}
