"""Runs the binary on the emulated GPU, alone or as ranks under launch/local."""

import csv
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("LOCKSTEP_BIN") or ROOT / "target/release/lockstep").absolute()
LIBRARIES = ROOT / "target/emulated-gpu"
FAILED = 99  # how the emulation ends a process

# Runs the binary with the emulation ahead of LibTorch's own folder, which has NVIDIA's library.
WRAPPER = """#!/bin/sh
LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}} exec {binary} "$@"
"""


@dataclass
class Done:
    """How a command ended, and for a run also its directory."""

    code: int
    out: str
    log: str
    run: Path | None = None

    def rows(self, table="train.csv"):
        with (self.run / table).open(newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name, table="train.csv"):
        return [float(row[name]) for row in self.rows(table)]


class Emulation:
    """A folder for data, runs and the wrapper."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run([ROOT / "tests/emulated_gpu/build.sh", LIBRARIES], check=True)
        self.binary = self.wrap(LIBRARIES)
        self.data = folder / "data"
        # Not a multiple of 64 words, to which the head is filled up.
        command = [BINARY, "prepare", "--source", "sample", "--tokenizer", "bpe:500"]
        subprocess.run([*command, "--out", self.data], check=True, capture_output=True)
        self.config = folder / "config.yaml"
        self.config.write_text(
            "seed: 5\n"
            f"data: {{dir: {self.data}, block_size: 32, batch_size: 16}}\n"
            "model: {preset: gpt-nano}\n"
            "optim: {lr: 1.0e-3}\n"
            "train: {steps: 30, eval_every: 0, save_every: 0}\n"
        )
        self.known = {}  # runs that several tests compare with

    def wrap(self, libraries, name="lockstep"):
        """A script that starts the binary with these libraries."""
        path = self.folder / name
        path.write_text(WRAPPER.format(libraries=libraries, binary=BINARY))
        path.chmod(0o755)
        return path

    def start(self, arguments, ranks=0, binary=None, cwd=None, **variables):
        """Starts the binary, with a GPU for each rank; without a launcher if ranks is 0."""
        binary = binary or self.binary
        # Ranks share the machine's cores, and waiting threads must not hold them.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            # For the kernels, so that they are compiled once for all tests.
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "EMULATED_GPU_DEVICES": str(max(1, ranks)),
            "LOCKSTEP_BIN": str(binary),
            **variables,
        }
        command = [ROOT / "launch/local", str(ranks)] if ranks else [binary]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            env=environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, arguments, ranks=0, binary=None, cwd=None, **variables):
        process = self.start(arguments, ranks, binary, cwd, **variables)
        out, log = process.communicate(timeout=600)
        return Done(process.returncode, out, log)

    def arguments(self, name, settings):
        """The arguments of `train`, and its run directory."""
        run = self.folder / "runs" / name
        words = ["train", "--config", self.config, "--run-dir", run]
        for key, value in ({"device": "cuda"} | settings).items():
            words += ["--set", f"{key}={value}"]
        return words, run

    def train(self, name, settings, ranks=0, **variables):
        words, run = self.arguments(name, settings)
        done = self.call(words, ranks, **variables)
        done.run = run
        return done

    def on_cpu(self, settings, ranks=0):
        """The same run on CPUs, trained once, without the settings that only a GPU uses."""
        settings = {
            k: v for k, v in settings.items() if k not in ("deterministic", "comm.grad_dtype")
        }
        name = "-".join(["cpu", str(ranks), *(f"{k}-{v}" for k, v in settings.items())])
        if name not in self.known:
            done = self.train(name, settings | {"device": "cpu"}, ranks, binary=BINARY)
            assert done.code == 0, done.log
            self.known[name] = done
        return self.known[name]


def figures(path):
    """The contents of EMULATED_GPU_LOG: numbers by name."""
    words = (line.rsplit(" ", 1) for line in path.read_text().splitlines())
    return {name: int(number) for name, number in words}


def apart(found, expected):
    """The largest relative difference of two lists of numbers."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
