"""Runs a built Lockstep for gpu_check.py, alone or as several ranks. Each command has a time limit
and leaves nothing running.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from gpu_driver import Gpu
from outcomes import Failed, NotRun
from processes import Processes, start, until
from runs import last_step

JOB = re.compile(r"SLURM_|PMIX?_(?!MCA_)|OMPI_COMM_")  # what Slurm and mpirun tell their ranks
RUN_S = 120  # for a run of a few dozen steps
CONFIG = {
    "seed": 7,
    "data": {"layout": "packed", "block_size": 64, "batch_size": 16},
    "model": {"preset": "gpt-micro"},
    "train": {"eval_every": 0, "save_every": 0},
}


class Unusable(Exception):
    """Nothing can be checked, and what to do about it."""


def find_libtorch():
    """The folder of the LibTorch to use."""
    folder = os.environ.get("LIBTORCH")
    if not folder:
        # Only found, not imported: an import would take seconds.
        torch = importlib.util.find_spec("torch")
        folder = torch.submodule_search_locations[0] if torch else None
    if not folder or not Path(folder, "lib", "libtorch_cpu.so").exists():
        found = f"{folder}, which has no lib/libtorch_cpu.so" if folder else "none"
        raise Unusable(
            f"expected a LibTorch, found {found}; name its folder in LIBTORCH, run launch/setup, "
            f"or use a python3 that has torch (this one is {sys.executable})"
        )
    return Path(folder).resolve()


def find_mpirun(folder):
    """mpirun or None: from the folder, from the MPI that Lockstep was set up with, or from PATH."""
    if folder:
        mpirun = Path(folder, "bin", "mpirun").resolve()
        if not os.access(mpirun, os.X_OK):
            raise Unusable(f"--mpi {folder}: expected a program bin/mpirun there, found none")
        return mpirun
    wrapper = os.environ.get("MPICC")
    places = [str(Path(wrapper).parent)] if wrapper and "/" in wrapper else []
    places += os.environ.get("PATH", "").split(os.pathsep)
    found = (Path(place, "mpirun") for place in places)
    return next((path for path in found if os.access(path, os.X_OK)), None)


def output(*command, environment=None):
    """What a command prints; nothing if it cannot be run."""
    with suppress(OSError, subprocess.SubprocessError):
        options = {"capture_output": True, "text": True, "timeout": 60, "check": True}
        return subprocess.run(command, env=environment, **options).stdout.strip()
    return ""


def libraries(binary, environment):
    """Where the loader finds what a program is linked to, by name: None if nowhere."""
    found = {}
    for line in output("ldd", binary, environment=environment).splitlines():
        name, arrow, place = line.strip().partition(" => ")
        if arrow:
            found[name] = None if place == "not found" else Path(place.split(" (")[0])
    return found


def tail(path, count, pattern=""):
    """The last lines of a file that match a pattern in any case; long lines are cut."""
    lines = path.read_text(errors="replace").splitlines()
    return [line[:300] for line in lines if line and re.search(pattern, line, re.I)][-count:]


class Job:
    """A running command, whose standard output and log are files."""

    def __init__(self, process, out, log, session):
        self.process, self.out, self.log, self.session = process, out, log, session
        self.show_all = False  # if it fails, show the whole log, not just the important lines

    def wait(self, seconds):
        """Its exit code; negative for a signal."""
        left = self.session.seconds_left()
        try:
            return self.process.wait(min(seconds, left))
        except subprocess.TimeoutExpired:
            if left < seconds:
                raise self.session.used_up() from None
            raise Failed(f"it had not ended after {seconds:.0f} s", self) from None

    def wait_for_step(self, train_csv, step, seconds):
        """The last step in train.csv, once that is at least `step`."""
        left = self.session.seconds_left()

        def reached():
            last = last_step(train_csv)
            return last if last >= step else 0

        if last := until(reached, min(seconds, left), self.process):
            return last
        if (code := self.process.poll()) is not None:
            raise Failed(f"it ended with exit code {code} before it was struck", self)
        if left < seconds:
            raise self.session.used_up()
        raise Failed(f"it did not come to step {step} within {seconds} s", self)

    def complaint(self):
        """The last complaint in its log, for the record."""
        return "".join(tail(self.log, 1, r"lockstep:|error|panic") or tail(self.log, 1))

    def last_lines(self):
        """What to show if it failed: the end of its output, its complaints, and NCCL's."""
        if self.show_all:
            return self.log.read_text(errors="replace").splitlines()
        lines = tail(self.out, 25)
        # mpirun's own messages can be longer than all of the ranks' messages.
        lines += tail(self.log, 15, r"lockstep:|error|warn|panic") or tail(self.log, 15)
        for path in sorted(self.session.nccl_logs(self.log.stem)):
            lines += tail(path, 5, "NCCL WARN")
        return lines


class Session:
    """The binary, its surroundings, and the runs that several checks share."""

    def __init__(self, binary, work, device, mpi=None, data=None, budget=560, gpu=None):
        self.binary, self.work, self.device, self.data = binary, work, device, data
        self.libtorch, self.mpirun = find_libtorch(), find_mpirun(mpi)
        self.gpu = gpu or Gpu()
        self.budget, self.until = budget, time.monotonic() + budget
        self.done = {}  # what `once` keeps
        self.hung = {}  # a run's name, by its number of ranks
        for folder in ("lib", "logs", "nccl", "runs", "tmp"):
            (work / folder).mkdir()
        self.processes = Processes("LOCKSTEP_GPU_CHECK")
        # Hides a job around this one: mpirun would spread the ranks over that job's machines, and
        # each program that starts here would take itself for one of its ranks.
        self.outside = {k: v for k, v in os.environ.items() if not JOB.match(k)}
        self.outside |= self.processes.mark | {"TMPDIR": str(work / "tmp")}
        # The environment in which a user starts the binary.
        self.bare = self.outside | self.library_path()
        self.environment = self.bare | self.surroundings(mpi)
        self.open_mpi = False
        if self.mpirun:
            said = output(self.mpirun, "--version", environment=self.environment)
            if not said:
                raise Unusable(
                    f"`{self.mpirun} --version` fails; is this MPI whole? --mpi DIR names another"
                )
            self.open_mpi = "Open MPI" in said
        # mpirun starts this. NCCL refuses to share a GPU between two ranks of one host, so each
        # rank becomes its own host.
        self.rank = work / "rank"
        number = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}"
        command = f'NCCL_HOSTID="gpu-check-{number}" exec {shlex.quote(str(binary))} "$@"'
        self.rank.write_text(f"#!/bin/sh\n{command}\n")
        self.rank.chmod(0o755)

    def library_path(self):
        """The user's LD_LIBRARY_PATH, then what a binary from another machine needs.

        Nothing more: if the trainer fails to load a library by itself, the checks must fail too.
        """
        given, folders = os.environ.get("LD_LIBRARY_PATH"), []
        prefix = self.mpirun.parent.parent if self.mpirun else Path("/nonexistent")
        for name, found in libraries(self.binary, self.outside).items():
            if name == "libtorch_cpu.so":
                wanted = self.libtorch / "lib" / name
            elif name.startswith("libmpi.so"):
                wanted = prefix / "lib" / name
            else:
                continue
            if wanted.exists() and not (found and found.samefile(wanted)):
                folders.append(str(wanted.parent))
        nccl = next(self.libtorch.parent.glob("nvidia/*/lib/libnccl.so.2"), None)
        if nccl and not (self.libtorch / "lib" / "libnccl.so").exists():
            # The program looks for this name. launch/setup makes it; NVIDIA's wheel lacks it.
            (self.work / "lib" / "libnccl.so").symlink_to(nccl)
            folders.append(str(self.work / "lib"))
        self.added = folders
        path = ":".join([given, *folders] if given else folders)
        return {"LD_LIBRARY_PATH": path} if path else {}

    def with_libtorch(self):
        """The environment of a process that lacks the binary's RUNPATH to LibTorch's folder."""
        given, lib = self.environment.get("LD_LIBRARY_PATH"), str(self.libtorch / "lib")
        return self.environment | {"LD_LIBRARY_PATH": f"{given}:{lib}" if given else lib}

    def surroundings(self, mpi):
        """Variables for the checks with several ranks on one GPU."""
        variables = {
            "LIBTORCH": str(self.libtorch),
            "OMP_WAIT_POLICY": "passive",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        if mpi:
            variables["OPAL_PREFIX"] = str(self.mpirun.parent.parent)
        if self.device == "cuda":
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
            variables |= {"CUDA_VISIBLE_DEVICES": gpu}
            # Ranks that pose as separate hosts meet on this machine, whatever network it has.
            variables |= {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
        return variables

    def used_up(self):
        """The reason for the checks not made, which tells nothing about the binary."""
        return NotRun(
            f"the {self.budget} s for all checks were used up; --budget gives more, and --only "
            "makes the rest in another call"
        )

    def seconds_left(self):
        """The seconds left for all checks together; more than 0."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise self.used_up()
        return left

    @contextmanager
    def start(self, name, command, environment):
        """Starts a command as a Job; when the block ends, no process of it is left."""
        self.seconds_left()
        out, log = (self.work / "logs" / f"{name}.{ending}" for ending in ("out", "log"))
        try:
            process = start(command, log, out, env=environment)
        except OSError as error:
            raise Failed(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            yield Job(process, out, log, self)
        finally:
            self.processes.end()
            # A process stuck in the kernel in a driver cannot be ended, and must not stop the rest.
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def lockstep(self, name, arguments, ranks=0, recover=False):
        """Starts the binary, alone (0 ranks) or through mpirun."""
        # Each further run would hang as long, and use up all the time.
        if hung := next((run for n, run in self.hung.items() if n <= ranks), None):
            raise NotRun(f"the run {hung} had hung")
        cores = len(os.sched_getaffinity(0))
        threads = 1 if self.device == "cpu" else max(1, cores // max(1, ranks))
        environment = self.environment | {
            "OMP_NUM_THREADS": str(threads),
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_FILE": str(self.work / "nccl" / f"{name}.%p"),
        }
        if not ranks:
            return self.start(name, [self.binary, *arguments], environment)
        options = ["-n", ranks]
        if self.open_mpi:
            options += ["--bind-to", "none", "--oversubscribe"]
            # With this option, mpirun does not end the other ranks if one is lost.
            options += ["--enable-recovery"] if recover else []
        return self.start(name, [self.mpirun, *options, self.rank, *arguments], environment)

    def say(self, name, arguments, seconds=60):
        """What the binary prints; it must succeed."""
        with self.lockstep(name, arguments) as job:
            code = job.wait(seconds)
        if code:
            raise Failed(f"`lockstep {name}` ended with exit code {code}", job)
        return job.out.read_text()

    def once(self, name, measure):
        """The result or the failure of `measure` from the first time this name was asked for."""
        if name not in self.done:
            try:
                self.done[name] = measure()
            except (Failed, NotRun) as failure:
                self.done[name] = failure
        if isinstance(self.done[name], Exception):
            raise self.done[name]
        return self.done[name]

    def sample(self, tokenizer):
        """A data folder of the corpus that comes with the binary."""
        out = self.work / f"data-{tokenizer}"
        source = ["--source", "sample", "--tokenizer", tokenizer, "--out", out]
        self.once(out.name, lambda: self.say("prepare", ["prepare", *source]))
        return out

    def config(self, name, values, data=None):
        """A configuration file. JSON is YAML, and needs no library to be read."""
        data = str(data or self.data or self.sample("bpe:800"))
        path = self.work / f"{name}.yaml"
        values = values | {"device": self.device, "data": values["data"] | {"dir": data}}
        path.write_text(json.dumps(values))
        return path

    def arguments(self, name, settings, config=None, run_dir=None):
        """The arguments of `lockstep train`, and the run directory."""
        config = config or self.config("config", CONFIG)
        folder = run_dir or self.work / "runs" / name
        words = ["train", "--config", config, "--run-dir", folder]
        for key, value in ({"device": self.device} | settings).items():
            words += ["--set", f"{key}={value}"]
        return words, folder

    def train(self, name, settings, ranks=0, config=None, run_dir=None):
        """Trains or resumes; returns the run directory."""
        arguments, folder = self.arguments(name, settings, config, run_dir)
        with self.lockstep(name, arguments, ranks) as job:
            try:
                code = job.wait(RUN_S)
            except Failed:
                if ranks:
                    self.hung[ranks] = name
                raise
        if code:
            raise Failed(f"the run {name} ended with exit code {code}", job)
        if ranks and self.device == "cuda" and (joined := self.joined(name, ranks)) != ranks:
            raise Failed(f"by NCCL's own log it joined {joined} of {ranks} ranks", job)
        return folder

    def nccl_logs(self, name):
        return (self.work / "nccl").glob(f"{name}.*")

    def joined(self, name, ranks):
        """How many ranks joined a world of this size, by NCCL's own log."""
        found = set()
        for path in self.nccl_logs(name):
            text = path.read_text(errors="replace")
            found |= set(re.findall(rf"\brank (\d+) nranks {ranks} .*Init COMPLETE", text))
        return len(found)
