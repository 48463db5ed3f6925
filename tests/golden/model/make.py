"""Golden values of the model and the optimizer, from PyTorch.

An independent, deliberately plain implementation of the model that docs/design.md describes:
functions over a dictionary of parameters, attention written out as matrix products. Each
*.safetensors file beside this script holds one small model, one batch, and what must come out.

    python3 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.11.0 numpy==2.4.6 safetensors==0.8.0
    /tmp/golden/bin/python tests/golden/model/make.py        # seconds; rewrites the files here

Last run with Python 3.11.7 and the versions above, on a CPU. Run again it gives the same tensors;
only the order of the metadata inside the header may differ. Parameters and batches are drawn in
float32; everything after that is computed in float64 and rounded to float32 once, when written, so
the files are the truth that a float32 implementation is measured against, not a second opinion.

Letters: B sequences, T positions, C channels, H heads, V tokens in the vocabulary.

A case file `{pre,post}-{gelu,relu}-{tied,untied}[-nobias].safetensors` holds
    param.NAME                 parameters; linear weights are (out, in)
    inputs, targets (B, T)     token ids, i64
    weights (B, T)             the objective is sum(weights * negative log-likelihood), here the
                               sequence_mean of 12, 7 and 4 targets; padding weighs 0
    logits (B, T, V), loss (1)
    grad.NAME, grad_norm (1)   gradients of the objective and their global norm, before clipping
    after_1.NAME, after_10.NAME  parameters after 1 and 10 AdamW steps, each on this same batch
`curve.safetensors` holds `param.NAME`, `curve_inputs` (50, B, T + 1), where inputs are [:, :-1] and
targets [:, 1:], and `curve` (50), the token-mean loss before each of 50 AdamW steps.
The metadata of every file holds the model's dimensions and the optimizer's settings, as strings.

Key biases (the middle third of c_attn.bias) want care: they shift all scores of a row alike, so
their gradient is zero in exact arithmetic. Here they stay where they were; in float32 Adam divides
noise by noise and lets each drift, by at most lr a step, without any effect on the model's output.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE, VOCAB_SIZE, BATCH = 2, 2, 16, 12, 61, 3
LR, BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
TARGETS_PER_SEQUENCE = (12, 7, 4)
CURVE_STEPS = 50


def draw_parameters(case, generator):
    """Random parameters by name, float32: large enough that a wrong term shows in every output."""
    params = {}

    def matrix(name, rows, columns):
        params[f"{name}.weight"] = 0.1 * torch.randn(rows, columns, generator=generator)

    def linear(name, rows, columns):
        matrix(name, rows, columns)
        if case["bias"]:
            params[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)

    def norm(name):
        params[f"{name}.weight"] = 1 + 0.1 * torch.randn(N_EMBD, generator=generator)
        if case["bias"]:
            params[f"{name}.bias"] = 0.1 * torch.randn(N_EMBD, generator=generator)

    matrix("transformer.wte", VOCAB_SIZE, N_EMBD)
    matrix("transformer.wpe", BLOCK_SIZE, N_EMBD)
    for layer in range(N_LAYER):
        h = f"transformer.h.{layer}"
        norm(f"{h}.ln_1")
        linear(f"{h}.attn.c_attn", 3 * N_EMBD, N_EMBD)
        linear(f"{h}.attn.c_proj", N_EMBD, N_EMBD)
        norm(f"{h}.ln_2")
        linear(f"{h}.mlp.c_fc", 4 * N_EMBD, N_EMBD)
        linear(f"{h}.mlp.c_proj", N_EMBD, 4 * N_EMBD)
    if case["norm"] == "pre":
        norm("transformer.ln_f")
    if not case["tied_head"]:
        matrix("lm_head", VOCAB_SIZE, N_EMBD)
    return params


def linear(params, name, x):
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def layer_norm(params, name, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(variance + 1e-5) * params[f"{name}.weight"]
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def attention(params, name, x):
    B, T, C = x.shape
    q, k, v = linear(params, f"{name}.c_attn", x).split(C, dim=-1)  # (B, T, C) each
    heads = (B, T, N_HEAD, C // N_HEAD)
    q, k, v = (a.view(heads).transpose(1, 2) for a in (q, k, v))  # (B, H, T, C/H) each
    scores = q @ k.transpose(-1, -2) / math.sqrt(C // N_HEAD)  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    y = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v  # (B, H, T, C/H)
    return linear(params, f"{name}.c_proj", y.transpose(1, 2).reshape(B, T, C))


def activation(case, x):
    if case["activation"] == "relu":
        return x.clamp(min=0)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(case, params, name, x):
    return linear(params, f"{name}.c_proj", activation(case, linear(params, f"{name}.c_fc", x)))


def model(case, params, inputs):
    """Logits (B, T, V) of `inputs` (B, T)."""
    x = params["transformer.wte.weight"][inputs]  # (B, T, C)
    x = x + params["transformer.wpe.weight"][: inputs.shape[1]]
    for layer in range(N_LAYER):
        h = f"transformer.h.{layer}"
        if case["norm"] == "pre":
            x = x + attention(params, f"{h}.attn", layer_norm(params, f"{h}.ln_1", x))
            x = x + mlp(case, params, f"{h}.mlp", layer_norm(params, f"{h}.ln_2", x))
        else:
            x = layer_norm(params, f"{h}.ln_1", x + attention(params, f"{h}.attn", x))
            x = layer_norm(params, f"{h}.ln_2", x + mlp(case, params, f"{h}.mlp", x))
    if case["norm"] == "pre":
        x = layer_norm(params, "transformer.ln_f", x)
    head = "transformer.wte.weight" if case["tied_head"] else "lm_head.weight"
    return x @ params[head].T


def objective(logits, targets, weights):
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B*T)
    return (weights.flatten() * nll).sum()


def adamw(params):
    """PyTorch's own optimizer, decaying the matrices of linear layers only."""
    decayed = [p for n, p in params.items() if p.ndim == 2 and "wte" not in n and "wpe" not in n]
    rest = [p for p in params.values() if not any(p is d for d in decayed)]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def train_step(case, params, optimizer, inputs, targets, weights):
    """One clipped AdamW step; the loss before it."""
    optimizer.zero_grad()
    loss = objective(model(case, params, inputs), targets, weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params.values(), GRAD_CLIP)
    optimizer.step()
    return loss.item()


def trainable(params, dtype):
    return {n: p.detach().to(dtype, copy=True).requires_grad_(True) for n, p in params.items()}


def draw_batch(generator):
    inputs = torch.randint(VOCAB_SIZE, (BATCH, BLOCK_SIZE), generator=generator)
    targets = torch.randint(VOCAB_SIZE, (BATCH, BLOCK_SIZE), generator=generator)
    weights = torch.zeros(BATCH, BLOCK_SIZE)
    for sequence, n in enumerate(TARGETS_PER_SEQUENCE):
        weights[sequence, :n] = 1 / (BATCH * n)
    return inputs, targets, weights


def make_case(case, dtype=torch.float64):
    """All tensors of one case file."""
    generator = torch.Generator().manual_seed(case["seed"])
    drawn = draw_parameters(case, generator)
    inputs, targets, weights = draw_batch(generator)
    params = trainable(drawn, dtype)
    batch = (inputs, targets, weights.to(dtype))

    logits = model(case, params, inputs)
    loss = objective(logits, *batch[1:])
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in params.values()]).norm()
    tensors = {f"param.{n}": p for n, p in drawn.items()}
    tensors |= {"inputs": inputs, "targets": targets, "weights": weights}
    tensors |= {"logits": logits, "loss": loss.view(1), "grad_norm": grad_norm.view(1)}
    tensors |= {f"grad.{n}": p.grad.clone() for n, p in params.items()}

    optimizer = adamw(params)
    for step in range(1, 11):
        train_step(case, params, optimizer, *batch)
        if step in (1, 10):
            tensors |= {f"after_{step}.{n}": p.detach().clone() for n, p in params.items()}
    return tensors


def make_curve(case, dtype=torch.float64):
    """All tensors of the loss curve's file."""
    generator = torch.Generator().manual_seed(case["seed"])
    drawn = draw_parameters(case, generator)
    # Each token follows its predecessor by a rule, so that the curve has something to learn.
    first = torch.randint(VOCAB_SIZE, (CURVE_STEPS, BATCH, 1), generator=generator)
    batches = (first + 7 * torch.arange(BLOCK_SIZE + 1)) % VOCAB_SIZE  # (steps, B, T + 1)
    weights = torch.full((BATCH, BLOCK_SIZE), 1 / (BATCH * BLOCK_SIZE), dtype=dtype)
    params = trainable(drawn, dtype)
    optimizer = adamw(params)
    losses = [
        train_step(case, params, optimizer, batch[:, :-1], batch[:, 1:], weights)
        for batch in batches
    ]
    tensors = {f"param.{n}": p for n, p in drawn.items()}
    return tensors | {"curve_inputs": batches, "curve": torch.tensor(losses, dtype=dtype)}


def cases():
    """Name and settings of every case, the curve's last."""
    found = {}
    for norm in ("pre", "post"):
        for act in ("gelu", "relu"):
            for tied in (True, False):
                name = f"{norm}-{act}-{'tied' if tied else 'untied'}"
                found[name] = {"norm": norm, "activation": act, "tied_head": tied, "bias": True}
    plain = {"norm": "pre", "activation": "gelu", "tied_head": False}
    found["pre-gelu-untied-nobias"] = plain | {"bias": False}
    found["curve"] = plain | {"bias": True}
    return {name: case | {"seed": seed} for seed, (name, case) in enumerate(found.items(), 1)}


def metadata(case):
    values = {
        "n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": N_EMBD, "block_size": BLOCK_SIZE,
        "vocab_size": VOCAB_SIZE, "norm": case["norm"], "activation": case["activation"],
        "tied_head": str(case["tied_head"]).lower(), "bias": str(case["bias"]).lower(),
        "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": "1e-8",
        "weight_decay": WEIGHT_DECAY, "grad_clip": GRAD_CLIP,
    }  # fmt: skip
    return {key: str(value) for key, value in values.items()}


def main():
    torch.set_num_threads(1)
    for name, case in cases().items():
        tensors = make_curve(case) if name == "curve" else make_case(case)
        tensors = {
            key: (t.float() if t.is_floating_point() else t).detach().contiguous()
            for key, t in tensors.items()
        }
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata(case))
        print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
