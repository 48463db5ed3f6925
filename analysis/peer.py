"""The same run in ordinary PyTorch, to compare Lockstep with.

Reads a Lockstep configuration and the data folder that it names, and trains the same model the way
it is usually written: an nn.Module, logits of the whole batch, F.cross_entropy, torch.optim.AdamW.
One process, the whole batch at once. train.csv and eval.csv have Lockstep's columns, so
analysis/plot.py draws both runs in one picture; what PyTorch does not know stays empty.

    python3 -m venv peer && peer/bin/pip install torch==2.11.0 numpy==2.4.6 pyyaml==6.0.3
    peer/bin/python analysis/peer.py --config configs/wikitext2.yaml --compile --out runs/peer

Initial weights, the order of the samples and dropout are drawn by PyTorch's and numpy's generators:
equal in distribution to Lockstep's, not in bits. Letters: B sequences, T positions, C channels,
H heads, V tokens in the vocabulary.
"""

import argparse
import csv
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

# torch and yaml are imported where they are used: the reader and the schedule are tested without.

# fmt: off
PRESETS = {  # n_layer, n_head, n_embd
    "gpt-nano": (3, 3, 48), "gpt-micro": (4, 4, 128), "gpt-mini": (6, 6, 192),
    "gopher-44m": (8, 16, 512), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}
# The keys that are read, with Lockstep's defaults.
DEFAULTS = {
    "seed": 3407, "device": "auto", "precision": "fp32", "threads": "auto",
    "data.dir": "data/sample", "data.layout": "packed", "data.block_size": 128,
    "data.batch_size": 32,
    "model.preset": None, "model.n_layer": None, "model.n_head": None, "model.n_embd": None,
    "model.dropout": 0.0, "model.norm": "pre", "model.activation": "gelu",
    "model.tied_head": True, "model.bias": True,
    "optim.lr": 5e-4, "optim.betas": [0.9, 0.95], "optim.eps": 1e-8, "optim.weight_decay": 0.1,
    "optim.grad_clip": 1.0, "optim.schedule": "constant", "optim.warmup_steps": 0,
    "optim.decay_steps": 0, "optim.min_lr": 0.0,
    "train.steps": 1000, "train.loss": "token_mean", "train.log_every": 1, "train.eval_every": 250,
}
TRAIN_COLUMNS = [
    "step", "tokens", "loss", "ppl", "lr", "grad_norm", "step_ms", "data_ms", "compute_ms",
    "comm_exposed_ms", "optimizer_ms", "tokens_per_s", "mfu", "memory_mib", "world_size",
    "elapsed_s",
]
# fmt: on
EVAL_COLUMNS = ["step", "split", "loss", "ppl", "word_ppl", "tokens", "eval_s"]
IGNORED = -100  # F.cross_entropy's mark of a target that does not count


def load_config(text, overrides=()):
    """A YAML configuration as one flat dictionary: `optim.lr` and the like, defaults filled in."""
    import yaml

    config = dict(DEFAULTS)
    for section, value in (yaml.safe_load(text) or {}).items():
        keys = {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        config |= keys or {section: value}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or key not in DEFAULTS:
            sys.exit(f"--set {item}: expected KEY=VALUE with a key of: {', '.join(DEFAULTS)}")
        config[key] = yaml.safe_load(value)
    for key, default in DEFAULTS.items():  # 3e-4 is text to YAML 1.1
        config[key] = float(config[key]) if isinstance(default, float) else config[key]
    if config["model.preset"] is not None:
        sizes = PRESETS[config["model.preset"]]
        config |= dict(zip(("model.n_layer", "model.n_head", "model.n_embd"), sizes, strict=True))
    return config


class Shard:
    """The token ids of one split, memory-mapped; docs/design.md has the format."""

    def __init__(self, path):
        # Magic, version, token width, tokens, lines, words. All else is for Lockstep to check.
        fields = np.dtype("S8,<u4,<u4,<u8,<u8,<u8")
        header = np.fromfile(path, fields, 1)
        if len(header) == 0 or header[0].item()[:2] != (b"LOCKSTEP", 1):
            sys.exit(f"{path}: not a Lockstep shard of version 1; make it with lockstep prepare")
        _, _, width, n_tokens, n_lines, n_words = header[0].item()
        offsets_at = 128 + (n_tokens * width + 7) // 8 * 8
        self.n_lines, self.n_words = n_lines, n_words
        self.tokens = np.memmap(path, f"<u{width}", "r", offset=128, shape=(n_tokens,))
        self.offsets = np.memmap(path, "<u8", "r", offset=offsets_at, shape=(n_lines + 1,))


def cut_samples(shard, layout, block_size, tail=False):
    """Where each sample starts and how many targets it has, two arrays.

    `packed` leaves out the last, incomplete block unless `tail` asks for it.
    """
    if layout == "packed":
        targets = len(shard.tokens) - 1
        count = -(-targets // block_size) if tail else targets // block_size
        starts = np.arange(count) * block_size
        return starts, np.minimum(block_size, targets - starts)
    first, end = shard.offsets[:-1].astype(np.int64), shard.offsets[1:].astype(np.int64)
    n_pieces = -(-(end - first) // block_size)
    line = np.repeat(np.arange(shard.n_lines), n_pieces)  # of each piece, as the next two are
    number_in_line = np.arange(len(line)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    starts = first[line] + block_size * number_in_line
    targets = np.minimum(block_size, end[line] - starts) - 1
    return starts[targets > 0], targets[targets > 0]


def read_batch(shard, starts, targets, padding):
    """Inputs and targets (B, T), int64: padded to the longest sample, padding's targets ignored."""
    inputs = np.full((len(starts), targets.max()), padding, dtype=np.int64)
    labels = np.full_like(inputs, IGNORED)
    for row, (start, n) in enumerate(zip(starts, targets, strict=True)):
        inputs[row, :n] = shard.tokens[start : start + n]
        labels[row, :n] = shard.tokens[start + 1 : start + n + 1]
    return inputs, labels


def shuffled(n_samples, batch_size, seed):
    """Sample numbers of one batch after another, each epoch in an order of its own."""
    queue, epoch = np.empty(0, dtype=np.int64), 0
    while True:
        while len(queue) < batch_size:
            order = np.random.default_rng((seed, epoch)).permutation(n_samples)
            queue, epoch = np.concatenate([queue, order]), epoch + 1
        yield queue[:batch_size]
        queue = queue[batch_size:]


def learning_rate(config, step):
    """The learning rate of step 1, 2, ..., as Lockstep's train/schedule.rs has it."""
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
    """The model, with its initial weights. Its classes stand inside because torch comes late."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    n_layer, n_head, C = (config[f"model.{key}"] for key in ("n_layer", "n_head", "n_embd"))
    dropout, bias = config["model.dropout"], config["model.bias"]
    pre = config["model.norm"] == "pre"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
            self.c_attn = nn.Linear(C, 3 * C, bias=bias)
            self.attn_proj = nn.Linear(C, C, bias=bias)
            self.c_fc = nn.Linear(C, 4 * C, bias=bias)
            self.mlp_proj = nn.Linear(4 * C, C, bias=bias)
            gelu = config["model.activation"] == "gelu"
            self.activation = nn.GELU(approximate="tanh") if gelu else nn.ReLU()
            self.dropout = nn.Dropout(dropout)

        def attend(self, x):
            B, T, _ = x.shape
            qkv = self.c_attn(x).view(B, T, 3, n_head, C // n_head)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
            p = dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            return self.dropout(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))

        def feed_forward(self, x):
            return self.dropout(self.mlp_proj(self.activation(self.c_fc(x))))

        def forward(self, x):
            if pre:
                x = x + self.attend(self.ln_1(x))
                return x + self.feed_forward(self.ln_2(x))
            x = self.ln_1(x + self.attend(x))
            return self.ln_2(x + self.feed_forward(x))

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
                    residual = name.endswith("proj.weight")
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


def build_optimizer(model, config):
    """AdamW that decays the matrices of linear layers only; a tied head counts as embedding."""
    import torch

    groups = [
        {"params": [], "weight_decay": decay} for decay in (0.0, config["optim.weight_decay"])
    ]
    for name, p in model.named_parameters():
        groups[p.dim() == 2 and name not in ("wte.weight", "wpe.weight")]["params"].append(p)
    betas, eps = config["optim.betas"], config["optim.eps"]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def objective(nll, targets, kind):
    """The loss to go down, from (B, T) of each."""
    counted = targets != IGNORED
    if kind == "sequence_mean":
        return (nll.sum(dim=1) / counted.sum(dim=1)).mean()
    return nll.sum() / counted.sum()


def append_row(path, values):
    """Adds a row to a CSV file."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(values)


class Run:
    """A training run: what its steps and evaluations share."""

    def __init__(self, config, out, compile_model):
        import torch

        self.torch, self.config, self.out = torch, config, out
        if config["threads"] != "auto":
            torch.set_num_threads(config["threads"])
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = auto if config["device"] == "auto" else config["device"]
        self.autocast = torch.autocast(
            self.device, torch.bfloat16, enabled=config["precision"] == "bf16"
        )
        torch.manual_seed(config["seed"])
        folder = Path(config["data.dir"])
        meta = json.loads((folder / "meta.json").read_text())
        self.padding = 50256 if meta["tokenizer"] == "gpt2" else 0  # <|endoftext|>
        self.shards = {split: Shard(folder / f"{split}.bin") for split in ("train", "valid")}
        self.model = build_model(config, meta["vocab_size"]).to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        # Evaluation, whose batches vary in shape, stays with the model that is not compiled.
        self.forward = torch.compile(self.model) if compile_model else self.model
        out.mkdir(parents=True, exist_ok=True)
        for name, columns in (("train.csv", TRAIN_COLUMNS), ("eval.csv", EVAL_COLUMNS)):
            (out / name).unlink(missing_ok=True)
            append_row(out / name, columns)

    def cut(self, split, tail):
        """Starts and target counts of a split's samples."""
        layout, block_size = self.config["data.layout"], self.config["data.block_size"]
        return cut_samples(self.shards[split], layout, block_size, tail)

    def batch(self, split, starts, targets):
        arrays = read_batch(self.shards[split], starts, targets, self.padding)
        return [self.torch.from_numpy(array).to(self.device) for array in arrays]

    def now(self):
        """Seconds, once the device has done what it was told."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def memory_mib(self):
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB

    def train(self):
        """All steps with their evaluations: train.csv's rows and the last evaluation."""
        config, optimizer = self.config, self.optimizer
        clip, limit = self.torch.nn.utils.clip_grad_norm_, config["optim.grad_clip"] or math.inf
        starts, lengths = self.cut("train", tail=False)
        batches = shuffled(len(starts), config["data.batch_size"], config["seed"])
        rows, evaluation, tokens, elapsed = [], None, 0, 0.0
        logged = (0, 0.0)  # tokens and seconds at the last row
        for step in range(1, config["train.steps"] + 1):
            t0 = self.now()
            chosen = next(batches)
            inputs, targets = self.batch("train", starts[chosen], lengths[chosen])
            t1 = self.now()
            optimizer.zero_grad(set_to_none=True)
            with self.autocast:
                loss = objective(self.forward(inputs, targets), targets, config["train.loss"])
            loss.backward()
            t2 = self.now()
            norm = clip(self.model.parameters(), limit)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            t3 = self.now()
            tokens, elapsed = tokens + int(lengths[chosen].sum()), elapsed + t3 - t0
            if step % config["train.log_every"] == 0:
                value = loss.item()
                row = [step, tokens, value, math.exp(value), group["lr"], norm.item()]
                row += [round(1e3 * s, 3) for s in (t3 - t0, t1 - t0, t2 - t1, 0.0, t3 - t2)]
                row += [round((tokens - logged[0]) / (elapsed - logged[1]), 1), ""]
                row += [round(self.memory_mib(), 1), 1, round(elapsed, 3)]
                append_row(self.out / "train.csv", row)
                rows.append(dict(zip(TRAIN_COLUMNS, row, strict=True)))
                logged = (tokens, elapsed)
                print(f"step {step}  loss {value:.4f}  {t3 - t0:.3f} s", file=sys.stderr)
            every = config["train.eval_every"]
            if step == config["train.steps"] or (every and step % every == 0):
                evaluation = self.evaluate(step)
        return rows, evaluation

    def evaluate(self, step):
        """Token mean over the validation split, as a row of eval.csv."""
        began, shard, size = self.now(), self.shards["valid"], self.config["data.batch_size"]
        starts, lengths = self.cut("valid", tail=True)
        total, count = 0.0, int(lengths.sum())
        self.model.eval()
        with self.torch.inference_mode(), self.autocast:
            for at in range(0, len(starts), size):
                batch = self.batch("valid", starts[at : at + size], lengths[at : at + size])
                total += self.model(*batch).sum().item()
        self.model.train()
        loss, packed = total / count, self.config["data.layout"] == "packed"
        word_ppl = math.exp(total / (shard.n_words + shard.n_lines)) if packed else ""
        row = [step, "valid", loss, math.exp(loss), word_ppl, count, round(self.now() - began, 3)]
        print(f"step {step}  validation loss {loss:.4f}", file=sys.stderr)
        append_row(self.out / "eval.csv", row)
        return dict(zip(EVAL_COLUMNS, row, strict=True))


def main():
    parser = argparse.ArgumentParser(description="A Lockstep configuration, run by PyTorch.")
    parser.add_argument("--config", required=True, help="Lockstep's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, help="the same as --set train.steps=N")
    parser.add_argument("--threads", type=int, help="the same as --set threads=N")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.csv and eval.csv")
    args = parser.parse_args()
    flags = {"train.steps": args.steps, "threads": args.threads}
    overrides = args.set + [f"{key}={value}" for key, value in flags.items() if value]
    config = load_config(Path(args.config).read_text(), overrides)
    rows, evaluation = Run(config, args.out, args.compile).train()
    step_ms = statistics.median(row["step_ms"] for row in rows)
    print(f"seconds per step, median   {step_ms / 1e3:.4f}")
    print(f"seconds, first step        {rows[0]['step_ms'] / 1e3:.3f}")
    print(f"seconds, all steps         {rows[-1]['elapsed_s']:.3f}")
    print(f"tokens per second, median  {statistics.median(r['tokens_per_s'] for r in rows):.0f}")
    print(f"peak memory, MiB           {rows[-1]['memory_mib']:.0f}")
    for column in ("loss", "ppl", "word_ppl"):
        if evaluation[column] != "":
            print(f"validation {column:15} {evaluation[column]:.4f}")


if __name__ == "__main__":
    main()
