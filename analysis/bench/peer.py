"""Does the same run in ordinary PyTorch, to compare with Lockstep.

Reads a Lockstep configuration and the data folder that it names, and trains the same model as it is
usually written: an nn.Module, logits of a whole micro-batch, F.cross_entropy, torch.optim.AdamW.
One process takes the whole batch, at once if data.micro_batch does not say otherwise. train.csv and
eval.csv have Lockstep's columns, so analysis/plot.py can draw both runs in one picture; cells that
PyTorch cannot fill stay empty.

    .venv/bin/python analysis/bench/peer.py --config configs/wikitext2.yaml --out runs/peer

It needs the data folder that `lockstep prepare` wrote, and all of PyTorch, which `launch/setup
--cuda` installs, with or without a GPU: the LibTorch for CPUs lacks libraries that Python loads.

Weights, sample order and dropout come from generators other than Lockstep's: alike, not equal.
B sequences, T positions, C channels, H heads, V tokens in the vocabulary.
"""

import argparse
import csv
import json
import math
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from presets import presets

# torch and yaml are imported late: the reader and the schedule do not need them.
# The keys that are read, with Lockstep's defaults.
# fmt: off
DEFAULTS = {
    "seed": 3407, "device": "auto", "precision": "fp32", "threads": "auto",
    "data.dir": "data/sample", "data.layout": "packed", "data.block_size": 128,
    "data.batch_size": 32, "data.micro_batch": "auto", "model.preset": None, "model.n_layer": None,
    "model.n_head": None, "model.n_embd": None, "model.dropout": 0.0, "model.norm": "pre",
    "model.activation": "gelu", "model.tied_head": True, "model.bias": True,
    "optim.lr": 5e-4, "optim.betas": [0.9, 0.95], "optim.eps": 1e-8, "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0, "optim.schedule": "constant", "optim.warmup_steps": 0,
    "optim.decay_steps": 0, "optim.min_lr": 0.0,
    "train.steps": 1000, "train.loss": "token_mean", "train.log_every": 1, "train.eval_every": 250,
}
# fmt: on
TRAIN_HEADER = (
    "step,tokens,loss,ppl,lr,grad_norm,step_ms,data_ms,compute_ms,comm_exposed_ms,optimizer_ms,"
    "tokens_per_s,mfu,memory_mib,world_size,elapsed_s\n"
)
EVAL_HEADER = "step,split,loss,ppl,word_ppl,tokens,eval_s\n"
IGNORED = -100  # F.cross_entropy's mark of a target that does not count


def parse(text):
    """Parses YAML. JSON needs no YAML library, which a machine may lack."""
    try:
        return json.loads(text)
    except ValueError:
        import yaml

        return yaml.safe_load(text)


def load_config(text, overrides=()):
    """A YAML configuration as one flat dictionary: `optim.lr` and the like, defaults filled in."""
    config = dict(DEFAULTS)
    for name, value in (parse(text) or {}).items():
        nested = isinstance(value, dict)
        config |= {f"{name}.{k}": v for k, v in value.items()} if nested else {name: value}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or key not in DEFAULTS:
            sys.exit(f"--set {item}: expected KEY=VALUE with a key of: {', '.join(DEFAULTS)}")
        config[key] = parse(value)
    for key in ("train.tokens", "train.epochs"):
        if config.get(key) is not None:
            sys.exit(f"{key}: expected train.steps; `lockstep train --dry-run` says how many")
    for key, default in DEFAULTS.items():  # 3e-4 is text to YAML 1.1
        config[key] = float(config[key]) if isinstance(default, float) else config[key]
    if config["model.preset"] is not None:
        shape = presets()[config["model.preset"]]
        config |= {f"model.{key}": value for key, value in shape.items()}
    return config


class Split:
    """One split's shard, memory-mapped, cut into samples; docs/formats.md has the format.

    `packed` leaves out the last, incomplete block unless `tail` asks for it.
    """

    def __init__(self, path, layout, block_size, tail=False):
        # Magic, version, token width, tokens, lines, words. Lockstep checks everything else.
        header = np.fromfile(path, np.dtype("S8,<u4,<u4,<u8,<u8,<u8"), 1).tolist()
        if not header or header[0][:2] != (b"LOCKSTEP", 1):
            sys.exit(f"{path}: not a Lockstep shard of version 1; make it with lockstep prepare")
        _, _, width, n_tokens, n_lines, n_words = header[0]
        self.words_and_lines = n_words + n_lines
        self.tokens = np.memmap(path, f"<u{width}", "r", offset=128, shape=(n_tokens,))
        if layout == "packed":
            n_blocks = -(-(n_tokens - 1) // block_size) if tail else (n_tokens - 1) // block_size
            self.starts = np.arange(n_blocks) * block_size
            self.lengths = np.minimum(block_size, n_tokens - 1 - self.starts)  # in targets
            return
        at = 128 + (n_tokens * width + 7) // 8 * 8
        offsets = np.fromfile(path, "<u8", n_lines + 1, offset=at).astype(np.int64)
        first, end = offsets[:-1], offsets[1:]
        n_pieces = -(-(end - first) // block_size)
        line = np.repeat(np.arange(n_lines), n_pieces)  # of each piece, like all that follow
        number_in_line = np.arange(len(line)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        starts = first[line] + block_size * number_in_line
        lengths = np.minimum(block_size, end[line] - starts) - 1
        self.starts, self.lengths = starts[lengths > 0], lengths[lengths > 0]

    def batch(self, chosen, padding):
        """Inputs and targets (B, T), int64: padded to the longest, padding's targets ignored."""
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        inputs = np.full((len(starts), lengths.max()), padding, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            inputs[row, :n] = self.tokens[start : start + n]
            targets[row, :n] = self.tokens[start + 1 : start + n + 1]
        return inputs, targets


def shuffled(n_samples, batch_size, seed):
    """Sample numbers of one batch after another, in a different order each epoch."""
    generator = np.random.default_rng(seed)
    queue = generator.permutation(n_samples)
    while True:
        while len(queue) < batch_size:
            queue = np.concatenate([queue, generator.permutation(n_samples)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def learning_rate(config, step):
    """The learning rate of step 1, 2, ..., as in Lockstep's src/optim/schedule.rs."""
    lr, warmup, steps = config["optim.lr"], config["optim.warmup_steps"], config["train.steps"]
    schedule, decay = config["optim.schedule"], config["optim.decay_steps"]
    if step < warmup:
        return lr * step / warmup
    if schedule == "constant":
        return lr
    start, end = warmup, decay or steps
    if schedule == "wsd":
        start, end = max(steps - decay, warmup), steps
    done = min(max(step - start, 0) / (end - start), 1) if end > start else 1
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return config["optim.min_lr"] + (lr - config["optim.min_lr"]) * left


def build_model(config, vocab_size):
    """The model with its initial weights. Its classes are local because torch is imported late."""
    import torch
    from torch import nn

    F = nn.functional
    n_layer, n_head, C = (config[f"model.{key}"] for key in ("n_layer", "n_head", "n_embd"))
    dropout, bias = config["model.dropout"], config["model.bias"]
    pre = config["model.norm"] == "pre"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
            self.c_attn = nn.Linear(C, 3 * C, bias=bias)
            self.attn_proj = nn.Linear(C, C, bias=bias)
            activation = nn.GELU("tanh") if config["model.activation"] == "gelu" else nn.ReLU()
            up, down = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)
            self.mlp = nn.Sequential(up, activation, down, nn.Dropout(dropout))
            self.dropout = nn.Dropout(dropout)

        def attend(self, x):
            B, T, _ = x.shape
            qkv = self.c_attn(x).view(B, T, 3, n_head, C // n_head)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
            p = dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            return self.dropout(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))

        def forward(self, x):
            if pre:
                x = x + self.attend(self.ln_1(x))
                return x + self.mlp(self.ln_2(x))
            x = self.ln_1(x + self.attend(x))
            return self.ln_2(x + self.mlp(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(vocab_size, C)
            self.wpe = nn.Embedding(config["data.block_size"], C)
            self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
            self.ln_f = nn.LayerNorm(C, bias=bias) if pre else nn.Identity()
            self.dropout = nn.Dropout(dropout)
            self.lm_head = nn.Linear(C, vocab_size, bias=False)
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    residual = name.endswith(("attn_proj.weight", "mlp.2.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)
            if config["model.tied_head"]:
                self.lm_head.weight = self.wte.weight

        def forward(self, inputs, targets):
            """Negative log-likelihood of each target (B, T); 0 where it is ignored."""
            at = torch.arange(inputs.shape[1], device=inputs.device)
            x = self.dropout(self.wte(inputs) + self.wpe(at))
            for block in self.blocks:
                x = block(x)
            logits = self.lm_head(self.ln_f(x)).flatten(0, 1)  # (B*T, V)
            nll = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED)
            return nll.view_as(targets)

    return GPT()


def objective(nll, targets, kind, sequences, tokens):
    """A micro-batch's part of the loss of a batch of so many sequences with so many targets, from
    the negative log-likelihoods (B, T) of its own targets."""
    if kind == "sequence_mean":
        return (nll.sum(dim=1) / (targets != IGNORED).sum(dim=1)).sum() / sequences
    return nll.sum() / tokens


def append_row(path, values):
    """Adds a row to a CSV file."""
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(values)


def check_torch():
    """Ends with a sentence if this Python cannot load PyTorch."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        print(
            f"peer: {sys.executable} cannot load PyTorch: {error}; `launch/setup --cuda` installs "
            "all that it needs (5 GB), with or without a GPU",
            file=sys.stderr,
        )
        sys.exit(2)


class Run:
    """A training run: what its steps and evaluations share."""

    def __init__(self, config, out, compile_model):
        import torch

        self.torch, self.config, self.out = torch, config, out
        if config["threads"] != "auto":
            torch.set_num_threads(config["threads"])
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = auto if config["device"] == "auto" else config["device"]
        self.autocast = torch.autocast(self.device, torch.bfloat16, config["precision"] == "bf16")
        torch.manual_seed(config["seed"])
        folder = Path(config["data.dir"])
        meta = json.loads((folder / "meta.json").read_text())
        self.padding = 50256 if meta["tokenizer"] == "gpt2" else 0  # <|endoftext|>
        cut = config["data.layout"], config["data.block_size"]
        self.training = Split(folder / "train.bin", *cut)
        self.validation = Split(folder / "valid.bin", *cut, tail=True)
        vocab_size = meta["vocab_size"]
        if self.device == "cuda" and config["precision"] == "bf16":
            vocab_size = -(-vocab_size // 64) * 64  # tensor cores are slow at odd sizes
        self.model = build_model(config, vocab_size).to(self.device)
        # Only matrices of linear layers decay; a tied head counts as an embedding.
        groups = [{"params": [], "weight_decay": d} for d in (0.0, config["optim.weight_decay"])]
        for name, p in self.model.named_parameters():
            groups[p.dim() == 2 and name not in ("wte.weight", "wpe.weight")]["params"].append(p)
        betas, eps = config["optim.betas"], config["optim.eps"]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
        # Evaluation uses the model that is not compiled, because its batches vary in shape.
        self.forward = torch.compile(self.model) if compile_model else self.model
        out.mkdir(parents=True, exist_ok=True)
        (out / "train.csv").write_text(TRAIN_HEADER)
        (out / "eval.csv").write_text(EVAL_HEADER)

    def batch(self, split, chosen):
        """Inputs and targets of the chosen samples, on the device."""
        arrays = split.batch(chosen, self.padding)
        return [self.torch.from_numpy(array).to(self.device) for array in arrays]

    def now(self):
        """The time in seconds, once the device has finished its work."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def memory_mib(self):
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB

    def train(self):
        """Runs all steps with their evaluations, if any; returns the figures to report, by name."""
        config, optimizer, lengths = self.config, self.optimizer, self.training.lengths
        clip, limit = self.torch.nn.utils.clip_grad_norm_, config["optim.grad_clip"] or math.inf
        batches = shuffled(len(lengths), config["data.batch_size"], config["seed"])
        seconds, tokens, logged = [], [], 0  # of each step; `logged`: steps at the last row
        for step in range(1, config["train.steps"] + 1):
            t0 = self.now()
            chosen = next(batches)
            micro = config["data.micro_batch"]
            size = len(chosen) if micro == "auto" else micro
            parts = (chosen[at : at + size] for at in range(0, len(chosen), size))
            micro_batches = [self.batch(self.training, part) for part in parts]
            t1 = self.now()
            optimizer.zero_grad(set_to_none=True)
            whole, loss = (len(chosen), int(lengths[chosen].sum())), 0.0
            for inputs, targets in micro_batches:
                with self.autocast:
                    nll = self.forward(inputs, targets)
                    share = objective(nll, targets, config["train.loss"], *whole)
                share.backward()
                loss += share.detach()
            t2 = self.now()
            norm = clip(self.model.parameters(), limit)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            t3 = self.now()
            seconds.append(t3 - t0)
            tokens.append(whole[1])
            if step % config["train.log_every"] == 0:
                value = loss.item()
                row = [step, sum(tokens), value, math.exp(value), group["lr"], norm.item()]
                row += [round(1e3 * s, 3) for s in (t3 - t0, t1 - t0, t2 - t1, 0.0, t3 - t2)]
                row += [round(sum(tokens[logged:]) / sum(seconds[logged:]), 1), ""]
                row += [round(self.memory_mib(), 1), 1, round(sum(seconds), 3)]
                append_row(self.out / "train.csv", row)
                logged = step
                print(f"step {step}  loss {value:.4f}  {t3 - t0:.3f} s", file=sys.stderr)
            every = config["train.eval_every"]
            if every and step % every == 0 and step < config["train.steps"]:
                self.evaluate(step)
        figures = {
            "seconds per step, median": np.median(seconds),
            "seconds, first step": seconds[0],
            "seconds, all steps": sum(seconds),
            "tokens per second, median": np.median(np.divide(tokens, seconds)),
            "peak memory, MiB": self.memory_mib(),
        }
        # 0 means never, the end included, as for Lockstep.
        return figures | (
            self.evaluate(config["train.steps"]) if config["train.eval_every"] else {}
        )

    def evaluate(self, step):
        """Writes the token mean over the validation split to eval.csv; returns figures by name."""
        began, split, size = self.now(), self.validation, self.config["data.batch_size"]
        total, count = 0.0, int(split.lengths.sum())
        self.model.eval()
        with self.torch.inference_mode(), self.autocast:
            for at in range(0, len(split.lengths), size):
                total += self.model(*self.batch(split, slice(at, at + size))).double().sum().item()
        self.model.train()
        figures = {"validation loss": total / count, "validation ppl": math.exp(total / count)}
        if self.config["data.layout"] == "packed":
            figures["validation word_ppl"] = math.exp(total / split.words_and_lines)
        loss, ppl, word_ppl = [*figures.values(), ""][:3]
        row = [step, "valid", loss, ppl, word_ppl, count, round(self.now() - began, 3)]
        append_row(self.out / "eval.csv", row)
        return figures


def main():
    parser = argparse.ArgumentParser(
        description="A Lockstep configuration, run by PyTorch.",
        epilog="example: .venv/bin/python analysis/bench/peer.py --config configs/wikitext2.yaml "
        "--out runs/peer",
    )
    parser.add_argument("--config", required=True, type=Path, help="Lockstep's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, help="the same as --set train.steps=N")
    parser.add_argument("--threads", type=int, help="the same as --set threads=N")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.csv and eval.csv")
    args = parser.parse_args()
    check_torch()
    flags = {"train.steps": args.steps, "threads": args.threads}
    overrides = args.set + [f"{key}={value}" for key, value in flags.items() if value]
    config = load_config(args.config.read_text(), overrides)
    for name, value in Run(config, args.out, args.compile).train().items():
        print(f"{name:26} {value:12.4f}")


if __name__ == "__main__":
    main()
