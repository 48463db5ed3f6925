"""Checks a built Lockstep on the one GPU of this machine; launch/gpu-check starts it.

Every check is a number with a bound. Runs are compared by train.csv: the largest relative
difference in a column, over all steps. Several ranks share the GPU, through NCCL and the loopback
interface: that shows whether their sums are right, but nothing about their speed.

Prints a table, and rewrites it as a CSV record before each check. The exit code is 0 if nothing
failed, 1 if something did, 2 if nothing could be checked, and 128 + N if signal N ended it.
"""

import argparse
import csv
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_driver import find_gpu
from gpu_record import Row, default_path, machine, table, write
from gpu_session import CONFIG, Session, Unusable, output
from gpu_speed import Speed
from outcomes import Failed, NotRun
from processes import until
from runs import same_files

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
GROUPS = ("first", "devices", "resume", "one-rank", "ranks", "speed", "fault", "doctor")
STEPS = {"first": 2, "resume": 150, "devices": 10, "ranks": 10}
DEADLINE_S = 20  # fault.step_deadline_s
# By then nothing may be left of a broken run. After the deadline NCCL gets 5 s to let go, and MPI
# 10 s to end the others; mpirun and the step under way get as much again.
GONE_S = DEADLINE_S + 15 + 15
RESUMED = ("tokens", "loss", "lr", "grad_norm")
# Everything that a resumed run has to continue: dropout, micro-steps, evaluations, checkpoints.
RESUME = {
    "train.steps": STEPS["resume"],
    "train.eval_every": 50,
    "train.save_every": 25,
    "model.preset": "gpt-nano",
    "model.dropout": 0.1,
    "data.micro_batch": 8,
}
# Heads of 64 channels, packed: for this shape LibTorch prefers cuDNN's attention, which is compiled
# on first use. The smaller models here have shapes that cuDNN does not take.
FIRST = CONFIG | {
    "precision": "bf16",
    "data": {"layout": "packed", "block_size": 128, "batch_size": 8},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 128},
}


@dataclass
class Check:
    """What is measured, in which unit, and how large it may be (None: reported, not judged)."""

    group: str
    what: str
    unit: str
    bound: float | None
    measure: object  # a function that returns a value and a note, or raises Failed or NotRun
    gpu_only: bool = False
    mpirun: bool = False

    def pending(self):
        """Its row until it has been made."""
        note = "all ended before its turn"
        return Row(self.group, self.what, None, self.unit, self.bound, "NOT RUN", 0.0, note)

    def row(self, session):
        """Makes the check."""
        start, value, result = time.monotonic(), None, "NOT RUN"
        try:
            if self.gpu_only and session.device == "cpu":
                raise NotRun("needs a GPU")
            if self.mpirun and session.mpirun is None:
                raise NotRun("there is no mpirun; name the folder of an MPI with --mpi")
            value, note = self.measure()
            # A NaN is not within any bound.
            result = "PASS" if self.bound is None or value <= self.bound else "FAIL"
        except NotRun as reason:
            note = str(reason)
        except Failed as failure:
            result, note = "FAIL", str(failure)
            if failure.job:
                print(*(f"  | {line}" for line in failure.job.last_lines()), sep="\n")
                failure.job = None  # show it only once, even if several checks share the run
        seconds = round(time.monotonic() - start, 1)
        return Row(self.group, self.what, value, self.unit, self.bound, result, seconds, note)


def read_steps(path, steps, columns):
    """The numbers of `columns` in a train.csv that must have steps 1 to `steps`, once, in order."""
    try:
        with Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror}") from error
    for number in range(1, max(steps, len(rows)) + 1):
        found = rows[number - 1].get("step") if number <= len(rows) else "no row"
        if number > steps or found != str(number):
            expected = f"step {number}" if number <= steps else f"no more than {steps} steps"
            raise Failed(f"{path}: expected {expected}, found {found}")
    numbers = []
    for row in rows:
        numbers.append([])
        for column in columns:
            try:
                number = float(row[column])
            except (KeyError, TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                place = f"{path}, step {row['step']}, {column}"
                raise Failed(f"{place}: expected a finite number, found {row.get(column)!r}")
            numbers[-1].append(number)
    return numbers


def difference(reference, found, steps, columns=("loss",)):
    """The largest relative difference between two train.csv files, and where it is."""
    worst, place = 0.0, "equal in every step"
    logs = (read_steps(path, steps, columns) for path in (reference, found))
    for step, (expected, seen) in enumerate(zip(*logs, strict=True), 1):
        for column, a, b in zip(columns, expected, seen, strict=True):
            apart = abs(a - b) / (abs(a) or 1.0)
            if apart > worst:
                worst, place = apart, f"{column} of step {step} is {b}, expected {a}"
    return worst, place


class Checks:
    """The measurements: methods that return a value and a note."""

    def __init__(self, session, bench=False):
        self.session, self.bench = session, bench
        self.gpu = session.device == "cuda"
        self.deterministic = {"deterministic": "true"} if self.gpu else {}

    def plan(self):
        """All checks, in order: what most runs depend on comes first, what takes long last."""
        if self.bench:
            yield from self.plan_speed()
            return
        for dropout in (0.0, 0.1):
            what = f"{STEPS['first']} steps in bf16, heads of 64, dropout {dropout:g}"
            yield Check("first", what, "exit code", 0, partial(self.first, dropout))
        for precision, bound in (("fp32", 1e-4), ("bf16", 0.02)):
            run = partial(self.devices, precision)
            what = f"{precision} against fp32 on the CPU"
            yield Check("devices", what, "relative", bound, run, gpu_only=True)
        for name, number in (("stopped by USR1", signal.SIGUSR1), ("killed", signal.SIGKILL)):
            what = f"{name} and resumed, against undisturbed"
            yield Check("resume", what, "relative", 0, partial(self.resume, number))
        yield Check("resume", "eval against eval.csv", "relative", 1e-6, self.evaluate)
        yield Check("resume", "generate twice, texts that differ", "", 0, self.generate)
        run = partial(self.ranks, 1, {})
        yield Check("one-rank", "mpirun -n 1 against alone", "relative", 1e-5, run, mpirun=True)
        yield from self.plan_ranks(2)
        yield from self.plan_speed()
        for what, number, recover in (
            ("rank 1 killed", signal.SIGKILL, False),
            ("rank 1 killed, mpirun told to go on", signal.SIGKILL, True),
            ("rank 1 stands still", signal.SIGSTOP, False),
        ):
            run = partial(self.fault, number, recover)
            yield Check("fault", f"{what}: until all are gone", "s", GONE_S, run, mpirun=True)
        yield Check("fault", "losses that are not finite", "exit code", 5, self.not_finite)
        yield from self.plan_ranks(4)
        yield Check("doctor", "alone", "exit code", 0, partial(self.doctor, 0))
        yield Check("doctor", "1 rank", "exit code", 0, partial(self.doctor, 1), mpirun=True)

    def plan_speed(self):
        for what, measure in Speed(self.session, self.bench).plan():
            yield Check("speed", what, "", None, measure)

    def plan_ranks(self, ranks):
        zero1, sent = {"optim.zero1": "true"}, {"comm.grad_dtype": "bf16"}
        bf16 = {"precision": "bf16"}
        for what, settings, bound, gpu_only in (
            ("fp32", {}, 1e-5, False),
            ("ZeRO-1", zero1, 1e-5, False),
            ("bf16", bf16, 0.02, False),
            ("gradients sent as bf16", sent, 0.02, True),
            ("bf16, ZeRO-1, gradients sent as bf16", bf16 | zero1 | sent, 0.02, True),
        ):
            run, what = partial(self.ranks, ranks, settings), f"{ranks} against 1, {what}"
            yield Check("ranks", what, "relative", bound, run, gpu_only, mpirun=True)
        # Two numbers have only one sum. NCCL may add more of them in an order that depends on the
        # bucket.
        bound, run = 1e-5 if self.gpu and ranks > 2 else 0, partial(self.overlap, ranks)
        what = f"{ranks} ranks, comm.overlap off against on"
        yield Check("ranks", what, "relative", bound, run, mpirun=True)

    def first(self, dropout):
        """A run as a user would start it. If it fails, its whole log is shown."""
        session, name = self.session, f"first-dropout-{dropout:g}"
        settings = {"train.steps": STEPS["first"], "model.dropout": dropout}
        arguments, folder = session.arguments(name, settings, session.config("first", FIRST))
        with session.start(name, [session.binary, *arguments], session.bare) as job:
            job.show_all = True
            # The first one loads gigabytes of libraries, perhaps from a slow disk.
            code = job.wait(240)
        if code:
            raise Failed(f"it ended with exit code {code}", job)
        losses = read_steps(folder / "train.csv", STEPS["first"], ("loss", "grad_norm"))
        return code, f"losses {', '.join(str(loss) for loss, _ in losses)}"

    def doctor(self, ranks):
        # Without this, a CPU trial on a machine with a GPU would examine the GPU.
        device = [] if self.gpu else ["--device", "cpu"]
        with self.session.lockstep(f"doctor-{ranks}", ["doctor", *device], ranks) as job:
            code = job.wait(90)
        if code:
            raise Failed(f"`lockstep doctor` ended with exit code {code}", job)
        return code, ""

    def undisturbed(self):
        run = partial(self.session.train, "undisturbed", RESUME | self.deterministic)
        return self.session.once("undisturbed", run)

    def resume(self, number):
        reference, settings = self.undisturbed(), RESUME | self.deterministic
        name, expected = {signal.SIGUSR1: ("stopped", 75)}.get(number, ("killed", -number))
        arguments, folder = self.session.arguments(name, settings)
        with self.session.lockstep(name, arguments) as job:
            step = job.wait_for_step(folder / "train.csv", 60, 90)
            job.process.send_signal(number)
            code = job.wait(60)
        if code != expected:
            raise Failed(f"when struck it ended with exit code {code}, expected {expected}", job)
        self.session.train(f"{name}-resumed", settings, run_dir=folder)
        logs = (run / "train.csv" for run in (reference, folder))
        apart, place = difference(*logs, STEPS["resume"], RESUMED)
        if apart:
            return apart, place
        last = f"checkpoints/step-{STEPS['resume']:08}"
        if not same_files(folder / last, reference / last, "*.safetensors"):
            raise Failed(f"{folder / last}: expected tensors, found none")
        return apart, f"struck after step {step}; the same bits in log and tensors"

    def evaluate(self):
        run, step = self.undisturbed(), str(STEPS["resume"])
        said = self.session.say("eval", ["eval", "--run-dir", run, "--checkpoint", "latest"])
        with (run / "eval.csv").open(newline="") as file:
            logged = list(csv.DictReader(file))
        try:
            expected, loss = (
                next(float(row["loss"]) for row in rows if row["step"] == step)
                for rows in (logged, csv.DictReader(said.splitlines()))
            )
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise Failed(f"expected losses of step {step} in eval.csv and in {said!r}") from None
        return abs(loss - expected) / expected, f"loss {loss}"

    def generate(self):
        prompt, run = " The river", self.undisturbed()
        arguments = ["generate", "--run-dir", run, "--prompt", prompt, "--tokens", "40"]
        texts = [self.session.say("generate", [*arguments, "--seed", "1"]) for _ in range(2)]
        if prompt not in texts[0] or len(texts[0].strip()) < len(prompt) + 10:
            raise Failed(f"expected {prompt!r} and how it goes on, found {texts[0]!r}")
        return float(texts[0] != texts[1]), f"{len(texts[0])} characters, twice with one seed"

    def run(self, settings, steps, ranks=0):
        """The train.csv of a short run, which all checks that need the same run share."""
        settings = settings | {"train.steps": steps}
        name = "-".join([str(ranks), *(f"{key}-{value}" for key, value in settings.items())])
        train = partial(self.session.train, name, settings, ranks)
        return self.session.once(name, train) / "train.csv"

    def devices(self, precision):
        steps = STEPS["devices"]
        reference = self.run({"device": "cpu"}, steps)
        return difference(reference, self.run({"precision": precision}, steps), steps)

    def ranks(self, ranks, settings):
        """Against one process of the same precision, both with kernels that sum in a fixed order.

        Otherwise a GPU adds the embeddings' gradients with atomics, in any order, and two equal
        runs may differ by more than the bound.
        """
        steps, settings = STEPS["ranks"], settings | self.deterministic
        alone = {k: v for k, v in settings.items() if k in ("precision", "deterministic")}
        # Small buckets give this small model several of them.
        buckets = {"comm.bucket_mib": 1} if ranks > 1 else {}
        found = self.run(buckets | settings, steps, ranks)
        if "bf16" in settings.values():
            fp32 = self.run(buckets | self.deterministic, steps, ranks)
            if difference(fp32, found, steps)[0] == 0:
                raise Failed(f"{settings} had no effect: the losses are those of fp32")
        return difference(self.run(alone, steps), found, steps)

    def overlap(self, ranks):
        both = {"comm.bucket_mib": 1} | self.deterministic
        runs = (
            self.run(both | off, STEPS["ranks"], ranks) for off in ({}, {"comm.overlap": "false"})
        )
        return difference(*runs, STEPS["ranks"], ("loss", "grad_norm"))

    def fault(self, number, recover):
        session = self.session
        if recover and not session.open_mpi:
            raise NotRun("only Open MPI's mpirun can be told to")
        name = f"fault-{number.name}{'-recover' if recover else ''}"
        settings = {"train.steps": 1000000, "fault.step_deadline_s": DEADLINE_S}
        arguments, folder = session.arguments(name, settings)
        with session.lockstep(name, arguments, 2, recover) as job:
            job.wait_for_step(folder / "train.csv", 10, 90)
            victim = session.processes.rank(session.binary, 1)
            if victim is None:
                raise Failed("found no process of rank 1", job)
            os.kill(victim, number)
            struck = time.monotonic()
            code = job.wait(GONE_S + 20)
            until(lambda: not session.processes.living(), GONE_S + 20)
            seconds = time.monotonic() - struck
        if recover:
            # Here mpirun's exit code tells nothing about its ranks. The watchdog's message counts
            # too: the watchdog ends a rank whose NCCL does not let go in time.
            said = job.log.read_text(errors="replace")
            if not re.search(r"lockstep: rank 0: |ERROR rank 0 on ", said):
                raise Failed("rank 0 ended without an error that names it", job)
        elif code == 0:
            raise Failed("it ended with exit code 0, as if no rank were lost", job)
        return seconds, f"mpirun's exit code {code}; step deadline {DEADLINE_S} s"

    def not_finite(self):
        """A rate that throws the weights away: later losses are not finite and change nothing."""
        settings = {"train.steps": 20, "train.save_every": 1, "train.keep_last": 20}
        settings |= {"optim.lr": "1e30", "fault.nonfinite": "skip"}
        arguments, folder = self.session.arguments("not-finite", settings)
        with self.session.lockstep("not-finite", arguments) as job:
            code = job.wait(90)
        # The last one may still be being written, under another name.
        saved = (folder / "checkpoints").glob("step-" + 8 * "[0-9]")
        first, *later = sorted(saved) or [folder]
        if code != 5 or not later:
            said = f"it ended with exit code {code} after {len(later)} batches were skipped"
            raise Failed(f"{said}; expected 5, and some", job)
        for checkpoint in later:
            same_files(checkpoint, first, "*.safetensors")
        return code, f"{len(later)} batches skipped, the tensors' bits as they were"


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="launch/gpu-check", description="Checks a built Lockstep on this machine's GPU."
    )
    default = os.environ.get("LOCKSTEP_BIN") or ROOT / "target" / "release" / "lockstep"
    parser.add_argument("binary", nargs="?", type=Path, default=Path(default))
    parser.add_argument("--mpi", metavar="DIR", help="an MPI's folder, with bin/mpirun and lib/")
    parser.add_argument("--data", metavar="DIR", type=Path, help="data to use, not the sample")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the record to write")
    parser.add_argument("--only", action="append", choices=GROUPS, help="these checks only")
    parser.add_argument("--cpu", action="store_true", help="on CPU ranks, to try this script")
    said = "speed alone, of more and larger models, beside PyTorch"
    parser.add_argument("--bench", action="store_true", help=said)
    said = "seconds for all checks (560, with --bench 470); what is left then is NOT RUN"
    parser.add_argument("--budget", type=int, help=said)
    args = parser.parse_args(arguments)
    args.budget = args.budget or (470 if args.bench else 560)
    return args


def end(number, _):
    """On a signal, still ends what was started and reports what was found."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def open_session(args, work):
    """The session, and the version that the binary prints."""
    gpu = None if args.cpu else find_gpu(os.environ)
    if gpu and gpu.problem:
        raise Unusable(
            f"this machine has no NVIDIA GPU that can be used: {gpu.problem}; --cpu tries the "
            "script on CPU ranks"
        )
    binary = args.binary.resolve()
    if not os.access(binary, os.X_OK):
        raise Unusable(f"{binary} is not there; build it: launch/quickstart, or name another")
    data = args.data.resolve() if args.data else None
    device = "cpu" if args.cpu else "cuda"
    session = Session(binary, work, device, args.mpi, data, args.budget, gpu)
    session.processes.guard()
    version = output(binary, "-V", environment=session.environment)
    if not version:
        with session.lockstep("version", ["-V"]) as job:
            job.wait(60)
        said = " ".join(job.last_lines())
        raise Unusable(
            f"cannot run {binary}: {said}; --mpi DIR names an MPI, LIBTORCH another LibTorch"
        )
    if session.added:
        print(f"LD_LIBRARY_PATH for these checks ends with {':'.join(session.added)}", flush=True)
    return session, version


def main(arguments=None):
    args = parse(arguments)
    for number in SIGNALS:
        signal.signal(number, end)
    work = Path(tempfile.mkdtemp(prefix="lockstep-gpu-check-"))
    rows, ended = [], 0
    try:
        session, version = open_session(args, work)
        facts = machine(session, version)
        kind = "bench" if args.bench else "check"
        record = args.out or default_path(ROOT / "analysis" / "records", facts, kind)
        plan = Checks(session, args.bench).plan()
        plan = [check for check in plan if not args.only or check.group in args.only]
        rows = [check.pending() for check in plan]
        try:
            for place, check in enumerate(plan):
                # If this process is killed, the record still holds what was measured.
                rows[place].note = "all ended while it was under way"
                write(record, facts, rows)
                rows[place] = check.row(session)
                print(f"{rows[place].result:8} {check.group}: {check.what}", flush=True)
        except SystemExit as signalled:
            ended = signalled.code
        write(record, facts, rows)
    except (Unusable, Failed, NotRun) as problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    finally:
        failed = any(row.result == "FAIL" for row in rows)
        if not failed:
            shutil.rmtree(work, ignore_errors=True)
    print(table(facts, rows))
    print(f"\nwritten to {record}" + (f"; the runs and logs are in {work}" if failed else ""))
    return ended or int(failed or all(row.result != "PASS" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
