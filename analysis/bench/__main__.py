"""Times Lockstep beside what its users would take instead, on this machine's CPU.

    launch/bench

installs the other programs and calls this. Programs take turns, ours and a peer's (A B A B), each a
process of its own; a figure is the median of its rounds. Writes OUT/bench-DATE-CPU.csv, after every
comparison anew, and OUT/bench.png. Groups of an earlier call on the same day stay, unless they are
measured again.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# The data's tokenizer, and the keys of one configuration for both; gpt-nano's is the homework's.
TRAINING = {
    "gpt-nano, 256 x 32, V 50,257, fp32": (
        "gpt2",
        {
            "data": {"layout": "paragraphs", "block_size": 32, "batch_size": 256},
            "model": {"preset": "gpt-nano", "dropout": 0.1, "tied_head": False},
            "train": {"loss": "sequence_mean"},
        },
    ),
    "gpt-mini, 32 x 128, V 8,192, fp32": (
        "bpe:8192",
        {"data": {"block_size": 128, "batch_size": 32}, "model": {"preset": "gpt-mini"}},
    ),
    "gpt2, 4 x 256, fp32": (
        "gpt2",
        {"data": {"block_size": 256, "batch_size": 4}, "model": {"preset": "gpt2"}},
    ),
    "gpt2, 4 x 256, bf16": (
        "gpt2",
        {
            "precision": "bf16",
            "data": {"block_size": 256, "batch_size": 4},
            "model": {"preset": "gpt2"},
        },
    ),
}
# Presets, tokens of a sequence, and sequences of each rank.
RANKS = [("gpt-micro", 128, 16), ("gpt-mini", 128, 16), ("gpt2", 256, 2)]
# Which package's version a peer has.
PACKAGES = {
    "PyTorch compiled": "torch",
    "transformers": "transformers",
    "gigatoken": "gigatoken",
    "tiktoken": "tiktoken",
    "huggingface": "tokenizers",
}
# Sequences, type of weights, and whether transformers is asked too.
GENERATION = [(1, "fp32", True), (1, "bf16", True), (8, "fp32", True), (8, "bf16", False)]
COLUMNS = [
    *(
        "date",
        "cpu",
        "cores",
        "memory_gib",
        "kernel",
        "lockstep",
        "group",
        "what",
        "unit",
        "rounds",
    ),
    *("ours", "ours_min", "ours_max", "peer", "peer_version"),
    *("theirs", "theirs_min", "theirs_max", "ratio"),
]


def read(path, key):
    """The first value of `key` in a file of /proc."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def machine(binary):
    """What every row begins with."""
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": read("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(read("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "kernel": platform.release(),
        "lockstep": version.stdout.split("\n")[0].removeprefix("lockstep "),
    }


class Bench:
    """The record, and how two programs are compared."""

    def __init__(self, out, rounds, binary, groups):
        self.out, self.rounds, self.machine, self.rows = out, rounds, machine(binary), []
        cpu = "".join(c if c.isalnum() else "-" for c in self.machine["cpu"])
        self.record = out / f"bench-{self.machine['date']}-{cpu}.csv"
        out.mkdir(parents=True, exist_ok=True)
        if self.record.exists():
            with self.record.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["group"] not in groups]

    def compare(self, group, what, ours, peer, theirs, kept):
        """Runs both in turn, each {figure: (value, unit)}, and records the figures in `kept`."""
        print(f"{group}: {what}", flush=True)
        values = {name: ([], [], "") for name in kept}
        for _ in range(self.rounds):
            for side, measure in enumerate((ours, theirs)):
                found = measure()
                for name in kept:
                    values[name] = (*values[name][:2], found[name][1])
                    values[name][side].append(found[name][0])
        for name, (mine, others, unit) in values.items():
            less_is_better = unit in ("s", "MB")
            pairs = zip(mine, others, strict=True)
            ratio = statistics.median(b / a if less_is_better else a / b for a, b in pairs)
            self.write(group, f"{what}: {name}", unit, spread(mine), peer, spread(others), ratio)

    def write(self, group, what, unit, ours, peer, theirs, ratio):
        """Adds a row: a figure of ours and a peer's, each (median, least, most)."""
        package = PACKAGES.get(peer)
        version = importlib.metadata.version(package) if package else ""
        own = dict(zip(("ours", "ours_min", "ours_max"), ours, strict=True))
        other = dict(zip(("theirs", "theirs_min", "theirs_max"), theirs, strict=True))
        row = self.machine | own | other
        row |= {"group": group, "what": what, "unit": unit, "rounds": self.rounds}
        row |= {"peer": peer, "peer_version": version, "ratio": ratio}
        figures = ("ours", "ours_min", "ours_max", "theirs", "theirs_min", "theirs_max", "ratio")
        self.rows.append(
            {name: f"{row[name]:.4g}" if name in figures else row[name] for name in COLUMNS}
        )
        with self.record.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
        print(
            f"  {what}: {ours[0]:.4g} ({ours[1]:.4g} to {ours[2]:.4g}) {unit}, {peer} "
            f"{theirs[0]:.4g} ({theirs[1]:.4g} to {theirs[2]:.4g}): {ratio:.2f}",
            flush=True,
        )


def spread(values):
    return statistics.median(values), min(values), max(values)


def environment(threads):
    threads = str(threads or len(os.sched_getaffinity(0)))
    return os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}


def run(command, threads=None, **variables):
    """What a command prints with so many threads or all cores; its words, if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        env=environment(threads) | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"bench: {' '.join(map(str, command))} ended with {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return done.stdout


def steps(folder, command, count, threads=None):
    """A run's median step but for the first ones, and its most memory, by its train.csv."""
    run([*command, "--set", f"train.steps={count}"], threads)
    with (folder / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    late = [float(row["step_ms"]) / 1e3 for row in rows[3:]]
    figures = {
        "step": (statistics.median(late), "s"),
        "memory": (max(float(row["memory_mib"]) for row in rows) * 2**20 / 1e6, "MB"),
    }
    if rows[0]["mfu"]:
        times = [float(row["mfu"]) * float(row["step_ms"]) / 1e3 for row in rows[3:]]
        figures["arithmetic"] = (statistics.median(times), "s")
    return figures


def training(bench, binary, prepared, scratch):
    """Training steps beside PyTorch, compiled."""
    base = {"device": "cpu", "optim": {"lr": 3e-4}}
    for number, (what, (tokenizer, keys)) in enumerate(TRAINING.items()):
        config = base | keys
        config["name"] = "bench"
        config["data"] = keys["data"] | {"dir": str(prepared(tokenizer))}
        config["train"] = keys.get("train", {}) | {"eval_every": 0, "save_every": 0}
        path = scratch / f"{number}.yaml"
        path.write_text(json.dumps(config))
        numbers, seen = itertools.count(), []

        def ours(path=path, numbers=numbers, seen=seen):
            folder = scratch / f"run-{path.stem}-{next(numbers)}"
            command = [binary, "train", "--config", path, "--run-dir", folder]
            seen.append(steps(folder, command, 10))
            return seen[-1]

        def theirs(path=path, numbers=numbers):
            folder = scratch / f"peer-{path.stem}-{next(numbers)}"
            command = [
                sys.executable,
                HERE / "peer.py",
                "--config",
                path,
                "--compile",
                "--out",
                folder,
            ]
            return steps(folder, command, 10)

        bench.compare("training", what, ours, "PyTorch compiled", theirs, ["step", "memory"])
        # What a step computes, at the speed of a large product, measured as the run begins.
        step, alone = ([run[name][0] for run in seen] for name in ("step", "arithmetic"))
        ratio = statistics.median(a / b for a, b in zip(alone, step, strict=True))
        name = f"{what}: step"
        bench.write("training", name, "s", spread(step), "its products alone", spread(alone), ratio)


def ranks(bench, binary, examples, prepared, scratch):
    """As many ranks as cores beside one rank with all of them, for the same batch; and the sum of a
    vector over the ranks beside a copy of it."""
    cores = len(os.sched_getaffinity(0))
    mib, times = 64, ([], [])
    print("ranks: all-reduce", flush=True)
    for _ in range(bench.rounds):
        program = {"LOCKSTEP_BIN": str(examples / "bench_all_reduce")}
        told = json.loads(run([ROOT / "launch/local", cores, mib], 1, **program))
        times[0].append(told["all_reduce_s"])
        times[1].append(told["copy_s"])
    ratio = statistics.median(copy / sum for sum, copy in zip(*times, strict=True))
    what = f"all-reduce of {mib} MiB, {cores} ranks: time"
    bench.write("ranks", what, "s", spread(times[0]), "a copy of it", spread(times[1]), ratio)
    for preset, length, batch in RANKS:
        data = {"dir": str(prepared("bpe:8192")), "block_size": length, "batch_size": batch * cores}
        config = {"name": "bench", "device": "cpu", "data": data, "model": {"preset": preset}}
        config["train"] = {"eval_every": 0, "save_every": 0}
        path = scratch / f"ranks-{preset}.yaml"
        path.write_text(json.dumps(config))
        numbers = itertools.count()

        def measure(launcher, threads, path=path, numbers=numbers):
            folder = scratch / f"{path.stem}-{next(numbers)}"
            command = [*launcher, "train", "--config", path, "--run-dir", folder]
            return steps(folder, command, 20, threads)

        bench.compare(
            "ranks",
            f"{preset}, {batch * cores} x {length}, {cores} ranks",
            functools.partial(measure, [ROOT / "launch/local", cores], 1),
            "one rank",
            functools.partial(measure, [binary], cores),
            ["step"],
        )


def generation(bench, examples):
    """An untrained GPT-2's text beside transformers, and beside the memory's bandwidth."""
    tokens = 48
    for sequences, dtype, has_peer in GENERATION:
        what = f"gpt2, {sequences} sequence{'s' * (sequences > 1)}, {dtype}"
        seen = []

        def ours(sequences=sequences, dtype=dtype, seen=seen):
            told = json.loads(run([examples / "bench_generate", "gpt2", dtype, sequences, tokens]))
            seen.append(told)
            return {"speed": (told["tokens_per_s"], "tokens/s")}

        def theirs(sequences=sequences, dtype=dtype):
            told = run([sys.executable, __file__, "--transformers", dtype, sequences, tokens])
            return {"speed": (float(told), "tokens/s")}

        if has_peer:
            bench.compare("generation", what, ours, "transformers", theirs, ["speed"])
        else:
            print(f"generation: {what}", flush=True)
            for _ in range(bench.rounds):
                ours()
        read = [told["tokens_per_s"] / sequences * told["gb_per_token"] for told in seen]
        bandwidth = [told["read_gb_per_s"] for told in seen]
        ratio = statistics.median(a / b for a, b in zip(read, bandwidth, strict=True))
        most = spread(bandwidth)
        bench.write(
            "generation", f"{what}: weights read", "GB/s", spread(read), "the memory", most, ratio
        )


def time_transformers(dtype, sequences, tokens):
    """Tokens a second of transformers' GPT-2 with random weights and its key-value cache."""
    import time

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = GPT2LMHeadModel(GPT2Config()).to(kind).eval()
    prompt = torch.full((sequences, 1), 464)

    def seconds(n):
        start = time.perf_counter()
        options = {"min_new_tokens": n, "do_sample": True, "top_k": 40, "temperature": 0.8}
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=n, pad_token_id=50256, **options)
        return time.perf_counter() - start

    seconds(4)
    few, many = seconds(1), seconds(tokens + 1)
    print(sequences * tokens / (many - few))


def tokenizer(bench, text, vocabulary, scratch):
    """GPT-2's encoder and BPE's training, beside three libraries, by bench_tokenizer.py."""
    print("tokenizer", flush=True)
    out = scratch / "tokenizer.json"
    command = [sys.executable, HERE / "bench_tokenizer.py", text, "--gpt2", vocabulary]
    run([*command, "--rounds", bench.rounds, "--out", out])
    figures = {}
    for row in json.loads(out.read_text()):
        key = row["figure"], row["threads"]
        seconds = tuple(row[name] for name in ("median_s", "min_s", "max_s"))
        figures.setdefault(key, {})[row["program"]] = seconds
    names = {"train_s": "BPE training", "encode_s": "encoding", "again_s": "encoding once more"}
    for (figure, threads), programs in figures.items():
        ours = programs.pop("lockstep")
        for peer, theirs in programs.items():
            what = f"{names[figure]}, {threads} thread{'s' * (threads > 1)}"
            bench.write("tokenizer", what, "s", ours, peer, theirs, theirs[0] / ours[0])


def draw(bench):
    """One bar for each comparison: how many times as fast, or how many times less memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = bench.rows[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.4), layout="constrained")
    colors = {
        "training": "#3b6ea5",
        "ranks": "#7a5aa6",
        "generation": "#c26a2e",
        "tokenizer": "#4b8f5a",
    }
    bars = axes.barh(
        [f"{row['what']} (vs. {row['peer']})" for row in rows],
        [float(row["ratio"]) for row in rows],
        color=[colors[row["group"]] for row in rows],
    )
    axes.bar_label(bars, [f"{float(row['ratio']):.2f}" for row in rows], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="times as good as the peer",
        title=f"{rows[0]['cpu']}, {rows[0]['cores']} cores",
    )
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(bench.out / "bench.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the record and its picture"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each program runs (default: 5)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=["training", "ranks", "generation", "tokenizer"],
        help="these groups",
    )
    parser.add_argument("--text", type=Path, help="a folder with WikiText-2 (default: downloaded)")
    args = parser.parse_args()
    binary = Path(os.environ.get("LOCKSTEP_BIN", ROOT / "target/release/lockstep"))
    groups = args.only or ["training", "ranks", "generation", "tokenizer"]
    bench = Bench(args.out, args.rounds, binary, groups)
    if args.text is None and "tokenizer" in groups:
        print("tokenizer: NOT RUN, it needs a folder with WikiText-2's text: --text FOLDER")
        groups.remove("tokenizer")
    data = args.out / "data"

    def prepared(tokenizer):
        folder = data / tokenizer.replace(":", "-")
        if not (folder / "meta.json").exists():
            run(
                [
                    binary,
                    "prepare",
                    "--source",
                    args.text or "wikitext-2-raw",
                    "--tokenizer",
                    tokenizer,
                    "--out",
                    folder,
                ]
            )
        return folder

    with tempfile.TemporaryDirectory() as scratch:
        if "training" in groups:
            training(bench, binary, prepared, Path(scratch))
        if "ranks" in groups:
            ranks(bench, binary, binary.parent / "examples", prepared, Path(scratch))
        if "generation" in groups:
            generation(bench, binary.parent / "examples")
        if "tokenizer" in groups:
            vocabulary = prepared("gpt2") / "tokenizer.json"
            tokenizer(bench, args.text / "wiki.train.tokens", vocabulary, Path(scratch))
    draw(bench)
    print(f"{bench.record} and {args.out / 'bench.png'} are written")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--transformers"]:
        time_transformers(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
