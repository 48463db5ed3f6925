"""Starts processes, finds all that they start in turn, waits for them, and ends them.

Each process has a mark in its environment, which its children inherit. The mark also finds ranks,
although mpirun puts each into its own process group.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import nullcontext, suppress
from pathlib import Path

# How Open MPI and MPICH tell a process its rank.
RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Processes:
    """All processes with the same mark."""

    def __init__(self, name, value=None):
        self.name, self.value = name, value or uuid.uuid4().hex

    @property
    def mark(self):
        """The environment variable that makes a process one of these."""
        return {self.name: self.value}

    def living(self):
        """All but this one: (process id, environment). A zombie no longer has an environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    text = (entry / "environ").read_bytes().decode(errors="replace")
                    variables = dict(
                        variable.split("=", 1) for variable in text.split("\0") if "=" in variable
                    )
                    if variables.get(self.name) == self.value:
                        found.append((int(entry.name), variables))
        return found

    def running(self, binary):
        """Those that run `binary`, not a launcher or a shell: (process id, environment)."""
        binary = str(Path(binary).resolve())
        for pid, variables in self.living():
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/exe") == binary:
                    yield pid, variables

    def rank(self, binary, number):
        """The process id of a rank that runs the program; None if there is none."""
        for pid, variables in self.running(binary):
            if str(number) in map(variables.get, RANK):
                return pid
        return None

    def end(self):
        """Kills what is left. A process stuck in the kernel in a driver cannot be ended."""

        def none_left():
            for pid, _ in (left := self.living()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        until(none_left, 10, every=0.02)

    def guard(self):
        """Starts a process that ends these if this one ends without having done so."""
        with suppress(OSError):
            # Its standard input closes when this process ends, for whatever reason.
            self.watcher = subprocess.Popen(
                [sys.executable, __file__, self.name, self.value],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


def start(command, log, out=None, **options):
    """Starts a command in its own session.

    Its standard error goes to the file `log`. Its standard output goes to `out` if given, else also
    to `log`.
    """
    with log.open("wb") as errors, out.open("wb") if out else nullcontext(errors) as standard:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=standard,
            stderr=errors,
            start_new_session=True,
            **options,
        )


def until(condition, seconds, process=None, every=0.002):
    """What `condition` returns once it is true; None if the time or the process ends first.

    It is checked every `every` seconds, often enough to hit a run in a certain step.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end or (process is not None and process.poll() is not None):
            return None
        time.sleep(every)
    return found


if __name__ == "__main__":
    sys.stdin.read()
    Processes(*sys.argv[1:]).end()
