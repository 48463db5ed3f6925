"""A cluster from launch/cluster, for the tests."""

import contextlib
import csv
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("LOCKSTEP_BIN", ROOT / "target/release/lockstep")).absolute()

CONFIG = """name: {name}
data: {{dir: ../data, block_size: 64, batch_size: 24}}
model: {{preset: gpt-nano}}
train: {{steps: {steps}, eval_every: 0, save_every: {save_every}, keep_last: 2}}
"""


class Cluster:
    """A cluster, and a folder that all its nodes see, with data and its own clone."""

    def __init__(self, folder, *size):
        self.folder = folder
        self.work = folder / "work folder"  # jobs are submitted from here, not from the clone
        self.work.mkdir()
        # Each node has its own /tmp, and munged mistrusts folders of other users.
        self.state = Path(tempfile.mkdtemp(prefix="lockstep-cluster-", dir="/var/tmp"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if "SLURM" not in name},
            "LOCKSTEP_CLUSTER": str(self.state),
            "SLURM_CONF": str(self.state / "etc/slurm.conf"),
            "LOCKSTEP_BIN": str(BINARY),
            # Three nodes share the machine's cores, and waiting threads must not hold them.
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self.started = self.launch("up", *size)

    def launch(self, *arguments):
        command = [ROOT / "launch/cluster", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def close(self):
        self.launch("down")
        shutil.rmtree(self.state, ignore_errors=True)

    def call(self, *command):
        """What a command prints. A query that a busy Slurm does not answer is repeated."""
        command = list(map(str, command))
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                command, cwd=self.work, env=self.environment, capture_output=True, text=True
            )
            asks = command[0] == "squeue" or command[:2] == ["scontrol", "show"]
            silent = "Unable to contact" in done.stderr or "timed out" in done.stderr
            if not (done.returncode and asks and silent and time.monotonic() < deadline):
                break
            time.sleep(1)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def config(self, name, steps, save_every=0):
        (self.work / f"{name}.yaml").write_text(
            CONFIG.format(name=name, steps=steps, save_every=save_every)
        )
        return f"{name}.yaml"

    @contextlib.contextmanager
    def own_environment(self, **variables):
        """Undoes changes of the environment at the end of the block."""
        usual = self.environment
        self.environment = {**usual, **variables}
        try:
            yield
        finally:
            self.environment = usual

    def submit(self, *options, script=ROOT / "slurm/train.sbatch", arguments=(), **environment):
        """Submits a job; returns its number."""
        with self.own_environment(**environment):
            return self.call("sbatch", "--parsable", *options, script, *arguments).strip()

    def facts(self, job):
        """What Slurm knows of a job, by name."""
        words = self.call("scontrol", "show", "--oneliner", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job, seconds=900):
        """Waits until the job is over; returns what Slurm knows of it."""
        wait_until(
            lambda: not self.call("squeue", "-h", "-j", job).strip(), seconds, self.situation
        )
        return self.facts(job)

    def output(self, job="*"):
        """What a job, an array or all of them printed: in the folder they were submitted from."""
        paths = sorted({*self.work.glob(f"slurm-{job}.out"), *self.work.glob(f"slurm-{job}_*.out")})
        return "\n".join(path.read_text() for path in paths)

    def situation(self):
        """What helps to explain why something did not happen."""
        status = self.launch("status").stdout
        return f"{status}\n{self.call('scontrol', 'show', 'job')}\n{self.output()}"

    def rows(self, run, table="train.csv"):
        path = self.work / run / table
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def losses(self, run):
        """A run's losses as written in the file, which must have each step once and in order."""
        rows = self.rows(run)
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def clone(self, name, site=""):
        """A clone with the unchanged scripts and a site file."""
        clone = self.folder / name
        for folder in ("launch", "slurm"):
            shutil.copytree(ROOT / folder, clone / folder)
        (clone / ".venv").symlink_to((ROOT / ".venv").resolve())
        (clone / "slurm/site.sh").write_text(site)
        return clone


def wait_until(condition, seconds=300, explain=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{explain()}"
        time.sleep(0.2)


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(folder, *size):
    """A running cluster; skips the test if this machine cannot run one."""
    cluster = Cluster(folder, *size)
    done = cluster.started
    if done.returncode == 2:
        cluster.close()
        pytest.skip(f"NOT RUN, nothing was tried on a real Slurm: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return cluster
