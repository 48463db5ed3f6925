"""The speed of one step for gpu_check.py: Lockstep's, and that of the same step in PyTorch."""

import csv
import importlib.util
import os
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_session import tail
from outcomes import Failed, NotRun

ROOT = Path(__file__).resolve().parents[1]
PEER_S = 150  # for a PyTorch run; torch.compile may take most of it
PROGRAMS = ("lockstep", "pytorch", "pytorch-compiled")
COLUMNS = ("step_ms", "tokens_per_s", "mfu", "memory_mib")
QUIET = {"eval_every": 0, "save_every": 0}
# The values of configs/homework.yaml; launch/gpu-check can be copied without that file.
HOMEWORK = {
    "data": {"layout": "paragraphs", "block_size": 32, "batch_size": 256},
    "model": {
        "preset": "gpt-nano",
        "dropout": 0.1,
        "norm": "pre",
        "activation": "gelu",
        "tied_head": False,
    },
    "optim": {
        "lr": 5e-4,
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "schedule": "constant",
    },
    "train": {"loss": "sequence_mean"},
}
# What the program logs for a card whose data sheet it knows (src/torch/peak.rs).
SHEET = re.compile(r"([\d.]+) % of its data sheet's")


@dataclass
class Shape:
    """A model that is timed, and beside what; the first steps are left out."""

    name: str
    says: str
    values: dict
    steps: int
    programs: tuple = PROGRAMS
    warm_up: int = 5


def pretraining(preset, precision, batch, micro_batch, block):
    """A preset that learns packed blocks, and how it is named."""
    values = {
        "precision": precision,
        "model": {"preset": preset},
        "data": {
            "layout": "packed",
            "block_size": block,
            "batch_size": batch,
            "micro_batch": micro_batch,
        },
        "train": QUIET,
    }
    return f"{precision}, {batch} x {block:,} tokens, {micro_batch} at a time", values


def homework(precision, batch):
    """The homework's model, and how it is named."""
    values = HOMEWORK | {
        "precision": precision,
        "data": HOMEWORK["data"] | {"batch_size": batch, "micro_batch": batch},
        "train": HOMEWORK["train"] | QUIET,
    }
    return f"gpt-nano, {precision}, {batch} x 32 tokens, vocabulary 50,257", values


def shapes(gpu):
    """GPT-2 and the homework's model. On a CPU, which only tries the script, smaller ones."""
    preset, *sizes = ("gpt2", "bf16", 16, 16, 1024) if gpu else ("gpt-nano", "fp32", 8, 8, 64)
    yield Shape(preset, *pretraining(preset, *sizes), 20)
    yield Shape("homework", *homework("fp32", 256 if gpu else 16), 100 if gpu else 20)


def bench_shapes(gpu):
    """GPT-2 with half a million tokens a step, the homework's 50 steps, larger GPT-2s. What matters
    most comes first. PyTorch as it is usually written would take too long for the large ones."""
    compiled = PROGRAMS[::2]
    if not gpu:
        yield Shape("gpt-nano", *pretraining("gpt-nano", "fp32", 8, 4, 64), 8, compiled)
        yield Shape("homework-bf16", *homework("bf16", 16), 8)
        return
    yield Shape("gpt2", *pretraining("gpt2", "bf16", 512, 32, 1024), 12, compiled, 4)
    yield Shape("homework", *homework("fp32", 256), 50)
    yield Shape("homework-bf16", *homework("bf16", 256), 50)
    for preset, size in (("gpt2-medium", 16), ("gpt2-large", 8)):
        yield Shape(preset, *pretraining(preset, "bf16", 8 * size, size, 1024), 10, compiled, 4)


class Speed:
    """Measures the shapes in a session."""

    def __init__(self, session, bench=False):
        self.session = session
        self.gpu = session.device == "cuda"
        self.shapes = bench_shapes(self.gpu) if bench else shapes(self.gpu)

    def plan(self):
        """(what, a function that measures it), in order."""
        for shape in self.shapes:
            for program in shape.programs:
                what = f"{shape.name}, {program}: "
                for column in COLUMNS:
                    if program == "lockstep" or column != "mfu":  # the PyTorch run has no mfu
                        yield what + column, partial(self.median, shape, program, column)
                if program == "lockstep" and self.gpu:
                    yield what + "share of the data sheet's peak", partial(self.share, shape)

    def share(self, shape):
        """mfu relative to the data sheet's peak."""
        mfu, note = self.median(shape, "lockstep", "mfu")
        log = self.session.work / "logs" / f"{shape.name}-lockstep.log"
        if not (said := SHEET.search(log.read_text(errors="replace"))):
            raise NotRun("the program does not know this card's data sheet")
        return mfu * float(said[1]) / 100, note

    def median(self, shape, program, column):
        """The median of a column of train.csv, without the first steps."""
        session = self.session
        if session.gpu.emulated:
            raise NotRun("speed and memory of an emulated GPU mean nothing")
        time = partial(self.timed, shape, program)
        with session.once(f"{shape.name}-{program}", time).open(newline="") as file:
            cells = [row[column] for row in csv.DictReader(file)][shape.warm_up :]
        if not cells or not all(cells):
            raise NotRun(f"train.csv leaves {column} empty")
        return statistics.median(map(float, cells)), f"{shape.says}; median of {len(cells)} steps"

    def timed(self, shape, program):
        """The train.csv of a run, by Lockstep or by PyTorch."""
        session, name = self.session, f"{shape.name}-{program}"
        values = shape.values | {"train": shape.values["train"] | {"steps": shape.steps}}
        config = session.config(name, values, session.sample("gpt2"))
        if program == "lockstep":
            folder = session.train(name, {}, config=config)
            shutil.rmtree(folder / "checkpoints")  # up to 1.5 GB that nobody reads
            return folder / "train.csv"
        compiled = program.endswith("compiled")
        if compiled and (lacking := self.compiler_lacks()):
            raise NotRun(f"torch.compile needs {lacking}")
        folder = session.work / "runs" / name
        command = [sys.executable, ROOT / "analysis" / "bench" / "peer.py", "--config", config]
        command += ["--out", folder, *(["--compile"] if compiled else [])]
        # If the comparison cannot be made, that is not the binary's fault.
        try:
            with session.start(name, command, session.outside) as job:
                code = job.wait(PEER_S)
        except Failed as failure:
            raise NotRun(f"analysis/bench/peer.py: {failure}") from None
        if code:
            said = tail(job.log, 1, r"error") or tail(job.log, 1) or [f"exit code {code}"]
            raise NotRun(f"analysis/bench/peer.py: {said[0]}")
        return folder / "train.csv"

    def compiler_lacks(self):
        """What torch.compile needs and this machine does not have; None if nothing."""
        if self.gpu and importlib.util.find_spec("triton") is None:
            return "triton, which this python3 does not have"
        variable, *names = ("CC", "gcc", "clang") if self.gpu else ("CXX", "g++", "clang++")
        if not os.environ.get(variable) and not any(map(shutil.which, names)):
            return f"a compiler: {' or '.join(names)}, or {variable} to name another"
        return None
