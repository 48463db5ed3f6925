"""Runs of the real binary to be disturbed, and the table of what was seen, for launch/faults.

A drill is a function that disturbs runs a number of times and returns what it saw, in one line.
It raises Failed if it saw anything other than what is promised, and NotRun if this machine cannot
show it.
"""

import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import runs
from outcomes import Failed, NotRun, aligned
from processes import Processes, start, until

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("LOCKSTEP_BIN", ROOT / "target/release/lockstep")).absolute()

# Small, with all that a resumed run has to continue: dropout, micro-steps, evaluations, samples.
CONFIG = {
    "seed": 11,
    "device": "cpu",
    "data": {"layout": "packed", "block_size": 32, "batch_size": 16, "micro_batch": 4},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 10},
    "train": {"steps": 60, "eval_every": 14, "save_every": 6, "sample_every": 9, "keep_last": 3},
    "fault": {"step_deadline_s": 20},
}
# All processes of a run must be gone within so many seconds. That is far more than needed, since a
# killed process that waits for a disk ends only after the wait. The time it took is reported.
GONE_S = 60


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
    """A disturbance, and how often it is made in the short form, for pytest, and in the long one.

    The short form leaves out (0) what another test already shows.
    """

    fault: str
    short: int
    long: int
    disturb: object  # a function of (lab, times) that returns what was seen

    def row(self, folder, times):
        """Runs the drill in its own folder, which is kept if the drill fails."""
        start, result = time.monotonic(), "PASS"
        folder.mkdir(parents=True)
        lab = Lab(folder)
        try:
            seen = self.disturb(lab, times)
        except NotRun as reason:
            result, seen = "NOT RUN", str(reason)
        except Failed as failure:
            result, seen = "FAIL", f"{failure}; kept in {folder}"
        finally:
            lab.processes.end()
        if result != "FAIL":
            shutil.rmtree(folder, ignore_errors=True)
        return Row(self.fault, times, result, seen, round(time.monotonic() - start, 1))


class Lab:
    """A folder with data for runs, all of whose processes can be found and ended."""

    def __init__(self, folder, seed=1):
        self.folder, self.random = folder, random.Random(seed)
        self.processes = Processes("LOCKSTEP_DRILL")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment |= self.processes.mark
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
            raise Failed(
                f"`lockstep {arguments[0]}` ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout + done.stderr

    def run(self, name, ranks=1, **sections):
        """A run that has not begun; `sections` override those of the configuration."""
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

    def rank(self, number):
        """The process id of a rank of the run under way; None if there is none yet."""
        return self.processes.rank(BINARY, number)

    def undisturbed(self, ranks=1, **sections):
        """An undisturbed run; made once."""
        key = json.dumps([ranks, sections], sort_keys=True)
        if key not in self.references:
            run = self.run(f"undisturbed-{len(self.references)}", ranks, **sections)
            run.start().ends(0, within=1800)
            self.references[key] = run
        return self.references[key]


class Run:
    """A training run of one rank, or of several through launch/local."""

    def __init__(self, lab, name, ranks):
        self.lab, self.name, self.ranks = lab, name, ranks
        self.dir = lab.folder / name
        self.process = None
        self.log = lab.folder / f"{name}.log"

    def start(self, *more, under=(), **environment):
        """Starts or resumes it, `under` another program if one is given."""
        command = [str(BINARY)]
        if self.ranks > 1:
            command = [str(ROOT / "launch/local"), str(self.ranks)]
        command += ["train", "--config", f"{self.name}.yaml", "--run-dir", self.name, *more]
        environment = self.lab.environment | environment
        self.process = start([*under, *command], self.log, cwd=self.lab.folder, env=environment)
        return self

    def said(self):
        """What the last start has printed so far."""
        return self.log.read_text(errors="replace")

    def ends(self, *codes, within=600):
        """Waits until it and all its processes have ended; returns the exit code."""
        begun = time.monotonic()
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} goes on after {within} s: {self.said()[-2000:]}") from None
        left = begun + within - time.monotonic()
        if not until(lambda: not self.lab.processes.living(), left):
            living = [pid for pid, _ in self.lab.processes.living()]
            raise Failed(f"{self.name} has ended, processes {living} have not")
        if codes and code not in codes:
            raise Failed(f"{self.name} ended with {code}, expected {codes}: {self.said()[-2000:]}")
        return code

    def kill(self):
        """Kills every process of the run outright."""
        self.lab.processes.end()
        self.process.wait()

    def step(self):
        """The last step in its log; 0 if there is none."""
        return runs.last_step(self.dir / "train.csv")

    def reaches(self, step, within=600):
        """Waits for a step; False if the run ends first."""
        return bool(self.shows(f"step {step}", lambda: self.step() >= step, within))

    def shows(self, what, sign, within=600):
        """Waits until `sign` returns something, and returns it; None if the run ends first."""
        found = until(sign, within, self.process)
        if not found and self.process.poll() is None:
            raise Failed(f"{self.name} did not come to {what}: {self.said()[-2000:]}")
        return found

    def rows(self, table, columns):
        """The cells of some columns of a CSV, which must be whole."""
        return runs.rows(self.dir / table, columns)

    def steps(self):
        """The last step in its log, which must have each once and in order."""
        return runs.steps(self.dir)

    def checkpoints(self):
        """The steps of its complete checkpoints."""
        complete = (self.dir / "checkpoints").glob("step-????????/MANIFEST.json")
        return sorted(int(path.parent.name[5:]) for path in complete)

    def verify(self):
        """Fails unless every checkpoint is what was written; returns their number."""
        if self.checkpoints():
            self.lab.say("checkpoint", "verify", "--run-dir", self.name)
        return len(self.checkpoints())

    def same_as(self, other, checkpoints="step-*"):
        """Fails unless its logs, samples and tensors equal another run's, bit for bit."""
        runs.same(self.dir, other.dir, checkpoints)


def table(rows):
    """The rows as a table for people."""
    head = [field.name for field in fields(Row)]
    return "\n".join(aligned([head, *([str(cell) for cell in astuple(row)] for row in rows)]))
