"""Runs of the real binary to be disturbed, and the table of what was seen, for launch/faults.

A drill is a function that disturbs runs some number of times and returns what was seen, in a line.
It raises Broken where anything but what is promised was seen, and NotRun where this machine cannot
show it.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("LOCKSTEP_BIN", ROOT / "target/release/lockstep")).absolute()

# Small, with all that a resumed run has to take up: dropout, micro-steps, evaluations, samples.
CONFIG = {
    "seed": 11,
    "device": "cpu",
    "data": {"layout": "packed", "block_size": 32, "batch_size": 16, "micro_batch": 4},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 10},
    "train": {"steps": 60, "eval_every": 14, "save_every": 6, "sample_every": 9, "keep_last": 3},
    "fault": {"step_deadline_s": 20},
}
# Seconds in which all of a run must be gone: far more than it takes, since a killed process that
# waits for a disk is gone only then. The seconds that it took are reported.
GONE_S = 60
# What a disturbed run's logs have in common with an undisturbed one's; the other columns are times.
CURVE = ("step", "tokens", "loss", "ppl", "lr", "grad_norm", "world_size")
EVALUATION = ("step", "split", "loss", "ppl", "word_ppl", "tokens")


class Broken(Exception):
    """What was promised and was not seen."""


class NotRun(Exception):
    """Why a drill cannot be done on this machine."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    fault: str
    times: int
    result: str
    seen: str
    seconds: float


@dataclass(frozen=True)
class Drill:
    """A disturbance, and how often it is made in the short (0: not at all) and in the long form."""

    fault: str
    short: int
    long: int
    disturb: object  # a function of (lab, times) that returns what was seen

    def row(self, folder, times):
        """Does the drill in a folder of its own, which is kept where it shows what broke."""
        start, result = time.monotonic(), "PASS"
        folder.mkdir(parents=True)
        lab = Lab(folder)
        try:
            seen = self.disturb(lab, times)
        except NotRun as reason:
            result, seen = "NOT RUN", str(reason)
        except Broken as broken:
            result, seen = "FAIL", f"{broken}; kept in {folder}"
        finally:
            lab.end_all()
        if result != "FAIL":
            shutil.rmtree(folder, ignore_errors=True)
        return Row(self.fault, times, result, seen, round(time.monotonic() - start, 1))


class Lab:
    """A folder with data, in which runs are made; all their processes can be found and ended."""

    def __init__(self, folder, seed=1):
        self.folder, self.random = folder, random.Random(seed)
        self.mark = f"LOCKSTEP_DRILL={uuid.uuid4().hex}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment |= dict([self.mark.split("=")])
        self.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.environment["LOCKSTEP_BIN"] = str(BINARY)
        self.references = {}

    def say(self, *arguments, code=0, **environment):
        """What a verb of the binary prints, on standard output and on standard error."""
        done = subprocess.run(
            [str(BINARY), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != code:
            raise Broken(
                f"`lockstep {arguments[0]}` ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout + done.stderr

    def run(self, name, ranks=1, **sections):
        """A run that has not begun; `sections` change those of the configuration."""
        if not (self.folder / "data").exists():
            self.say(
                "-q", "prepare", "--source", "sample", "--tokenizer", "bpe:512", "--out", "data"
            )
        config = {
            k: v | sections.get(k, {}) if isinstance(v, dict) else v for k, v in CONFIG.items()
        }
        config["data"] = {"dir": "data"} | config["data"]
        for section in sections.keys() - CONFIG.keys():
            config[section] = sections[section]
        # JSON is YAML.
        (self.folder / f"{name}.yaml").write_text(json.dumps(config))
        return Run(self, name, ranks)

    def undisturbed(self, ranks=1, **sections):
        """A run that was left in peace; made once."""
        key = json.dumps([ranks, sections], sort_keys=True)
        if key not in self.references:
            run = self.run(f"undisturbed-{len(self.references)}", ranks, **sections)
            run.start().ends(0, within=1800)
            self.references[key] = run
        return self.references[key]

    def processes(self):
        """The process ids of all that was started here and lives."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    # A zombie has no environment.
                    if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def rank(self, rank):
        """The process id of a rank of the run under way; None where there is none yet."""
        for pid in self.processes():
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if Path(f"/proc/{pid}/exe").resolve() != BINARY.resolve():
                    continue
                if f"OMPI_COMM_WORLD_RANK={rank}".encode() in variables:
                    return pid
        return None

    def end_all(self):
        """Kills what is left."""
        until = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < until:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


class Run:
    """A training run of one rank, or of several through launch/local."""

    def __init__(self, lab, name, ranks):
        self.lab, self.name, self.ranks = lab, name, ranks
        self.dir = lab.folder / name
        self.process = self.started = None
        self.log = lab.folder / f"{name}.log"

    def start(self, *more, under=(), **environment):
        """Starts or resumes it, `under` another program if wanted."""
        command = [str(BINARY)]
        if self.ranks > 1:
            command = [str(ROOT / "launch/local"), str(self.ranks)]
        command += ["train", "--config", f"{self.name}.yaml", "--run-dir", self.name, *more]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, under), *command],
                cwd=self.lab.folder,
                env=self.lab.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started = time.monotonic()
        return self

    def said(self):
        """What the last start said so far."""
        return self.log.read_text(errors="replace")

    def ends(self, *codes, within=600):
        """Waits for its end, after which no process of it may be left; returns the exit code."""
        begun = time.monotonic()
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise Broken(f"{self.name} goes on after {within} s: {self.said()[-2000:]}") from None
        while left := self.lab.processes():
            if time.monotonic() > begun + within:
                raise Broken(f"{self.name} has ended, processes {left} have not")
            time.sleep(0.01)
        if codes and code not in codes:
            raise Broken(f"{self.name} ended with {code}, expected {codes}: {self.said()[-2000:]}")
        return code

    def kill(self):
        """Kills every process of the run outright."""
        self.lab.end_all()
        self.process.wait()

    def step(self):
        """The last step in its log; 0 where there is none."""
        with suppress(OSError, ValueError, IndexError):
            return int((self.dir / "train.csv").read_text().rsplit("\n", 2)[-2].split(",")[0])
        return 0

    def reaches(self, step, within=600):
        """Waits for a step; False where the run ended before."""
        until = time.monotonic() + within
        while self.step() < step:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > until:
                raise Broken(f"{self.name} did not come to step {step}: {self.said()[-2000:]}")
            time.sleep(0.002)
        return True

    def rows(self, table, columns):
        """The cells of some columns of a CSV, which must be whole."""
        text = (self.dir / table).read_text()
        rows = list(csv.DictReader(text.splitlines()))
        if not text.endswith("\n") or any(None in row or None in row.values() for row in rows):
            raise Broken(f"{self.dir / table} is not whole")
        return [tuple(row[column] for column in columns) for row in rows]

    def steps(self):
        """The steps in its log, each once and in order; the last of them."""
        steps = [int(row[0]) for row in self.rows("train.csv", ("step",))]
        if steps != list(range(1, len(steps) + 1)):
            raise Broken(f"{self.dir / 'train.csv'} has the steps {steps}")
        return len(steps)

    def checkpoints(self):
        """The steps of its complete checkpoints."""
        complete = (self.dir / "checkpoints").glob("step-????????/MANIFEST.json")
        return sorted(int(path.parent.name[5:]) for path in complete)

    def verify(self):
        """Every checkpoint must be what was written; how many there are."""
        if self.checkpoints():
            self.lab.say("checkpoint", "verify", "--run-dir", self.name)
        return len(self.checkpoints())

    def same_as(self, other, checkpoints="step-*"):
        """Its logs, samples and tensors must be those of a run left in peace, bit by bit.

        One that was stopped keeps checkpoints of other steps, so only some of them can be compared.
        """
        for table, columns in (("train.csv", CURVE), ("eval.csv", EVALUATION)):
            mine, theirs = self.rows(table, columns), other.rows(table, columns)
            for found, expected in zip(mine, theirs, strict=False):
                if found != expected:
                    raise Broken(f"{self.dir / table}: found {found}, expected {expected}")
            if len(mine) != len(theirs):
                raise Broken(f"{self.dir / table} has {len(mine)} rows, expected {len(theirs)}")
        self.steps()
        for pattern in (f"checkpoints/{checkpoints}/*.safetensors", "samples/*.txt", "best.json"):
            names = [
                sorted(str(p.relative_to(run.dir)) for p in run.dir.glob(pattern))
                for run in (self, other)
            ]
            if names[0] != names[1] or not names[0]:
                raise Broken(f"{self.dir} has {names[0]}, expected {names[1]}")
            for name in names[0]:
                if (self.dir / name).read_bytes() != (other.dir / name).read_bytes():
                    raise Broken(f"{self.dir / name} is not that of a run left in peace")


def table(rows):
    """The rows as a table for people."""
    lines = [[str(cell) for cell in astuple(row)] for row in rows]
    head = [field.name for field in fields(Row)]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    form = "  ".join(f"{{:<{width}}}" for width in widths)
    return "\n".join(form.format(*line).rstrip() for line in [head, *lines])
