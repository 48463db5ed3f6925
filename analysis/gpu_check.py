"""Checks a built Lockstep on the one GPU of this machine; launch/gpu-check starts it.

Every check is a number with a bound. Runs are compared by train.csv: the largest relative
difference in a column, over all steps. Several ranks share the GPU, through NCCL and the loopback
interface: that shows whether their sums are right, and says nothing of their speed.

Prints a table, and writes it as a CSV record. The exit code is 0 where nothing failed, 1 where
something did, 2 where nothing could be checked.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_record import Row, default_path, has_gpu, machine, table, write
from gpu_session import Failed, NotRun, Session, Unusable, output

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("doctor", "resume", "devices", "one-rank", "ranks", "fault", "speed")
STEPS = {"resume": 150, "devices": 20, "ranks": 30, "speed": 20}
WARM_UP = 5  # first steps, left out of the speed
DEADLINE_S = 20  # fault.step_deadline_s
# When nothing may be left of a broken run. After the deadline NCCL gets 5 s to let go, and MPI 10 s
# to end the others; as much again is for mpirun, and for the step that was under way.
GONE_S = DEADLINE_S + 15 + 15
RESUMED = ("tokens", "loss", "lr", "grad_norm")
# Dropout, micro-steps, evaluations and checkpoints: what a resumed run has to take up.
RESUME = {
    "train.steps": STEPS["resume"],
    "train.eval_every": 50,
    "train.save_every": 25,
    "model.preset": "gpt-nano",
    "model.dropout": 0.1,
    "data.micro_batch": 8,
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
                failure.job = None  # shown once, however many checks share the run
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


def compare_files(reference, found, pattern):
    """Fails unless the files of a pattern have the same names and bytes in both folders."""
    expected, seen = (sorted(p.name for p in Path(f).glob(pattern)) for f in (reference, found))
    if not expected or expected != seen:
        raise Failed(f"{found}: expected the files {expected or pattern}, found {seen}")
    for name in expected:
        if Path(reference, name).read_bytes() != Path(found, name).read_bytes():
            raise Failed(f"{Path(found, name)} differs from the undisturbed run's")


class Checks:
    """The measurements: methods that return a value and a note."""

    def __init__(self, session):
        self.session = session
        self.gpu = session.device == "cuda"
        self.deterministic = {"deterministic": "true"} if self.gpu else {}

    def plan(self):
        """All checks, in order."""
        yield Check("doctor", "alone", "exit code", 0, lambda: self.doctor(0))
        yield Check("doctor", "1 rank", "exit code", 0, lambda: self.doctor(1), mpirun=True)
        for name, number in (("stopped by USR1", signal.SIGUSR1), ("killed", signal.SIGKILL)):
            what = f"{name} and resumed, against undisturbed"
            yield Check("resume", what, "relative", 0, lambda n=number: self.resume(n))
        yield Check("resume", "eval against eval.csv", "relative", 1e-6, self.evaluate)
        yield Check("resume", "generate twice, texts that differ", "", 0, self.generate)
        for precision, bound in (("fp32", 1e-4), ("bf16", 0.02)):
            run = self.bind(self.devices, precision)
            what = f"{precision} against fp32 on the CPU"
            yield Check("devices", what, "relative", bound, run, gpu_only=True)
        run = self.bind(self.ranks, 1, {})
        yield Check("one-rank", "mpirun -n 1 against alone", "relative", 1e-5, run, mpirun=True)
        yield from self.plan_ranks(2)
        yield from self.plan_ranks(4)
        for what, number, recover in (
            ("rank 1 killed", signal.SIGKILL, False),
            ("rank 1 killed, mpirun told to go on", signal.SIGKILL, True),
            ("rank 1 stands still", signal.SIGSTOP, False),
        ):
            run = self.bind(self.fault, number, recover)
            yield Check("fault", f"{what}: until all are gone", "s", GONE_S, run, mpirun=True)
        yield Check("fault", "losses that are not finite", "exit code", 5, self.not_finite)
        for program in ("lockstep", "pytorch", "pytorch-compiled"):
            for column in ("step_ms", "tokens_per_s", "mfu", "memory_mib"):
                if program == "lockstep" or column != "mfu":  # PyTorch knows no mfu
                    run = self.bind(self.speed, program, column)
                    yield Check("speed", f"{program}: {column}", "", None, run)

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
            run, what = self.bind(self.ranks, ranks, settings), f"{ranks} against 1, {what}"
            yield Check("ranks", what, "relative", bound, run, gpu_only, mpirun=True)
        # Two numbers have one sum. More of them NCCL may add in an order that goes by the bucket.
        bound, run = 1e-5 if self.gpu and ranks > 2 else 0, self.bind(self.overlap, ranks)
        what = f"{ranks} ranks, comm.overlap off against on"
        yield Check("ranks", what, "relative", bound, run, mpirun=True)

    @staticmethod
    def bind(method, *arguments):
        return lambda: method(*arguments)

    def doctor(self, ranks):
        with self.session.lockstep(f"doctor-{ranks}", ["doctor"], ranks) as job:
            code = job.wait(90)
        if code:
            raise Failed(f"`lockstep doctor` ended with exit code {code}", job)
        return code, ""

    def undisturbed(self):
        run = self.bind(self.session.train, "undisturbed", RESUME | self.deterministic)
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
        compare_files(reference / last, folder / last, "*.safetensors")
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
        """The train.csv of a short run; one for all checks that want the same."""
        settings = settings | {"train.steps": steps}
        name = "-".join([str(ranks), *(f"{key}-{value}" for key, value in settings.items())])
        train = self.bind(self.session.train, name, settings, ranks)
        return self.session.once(name, train) / "train.csv"

    def devices(self, precision):
        steps = STEPS["devices"]
        reference = self.run({"device": "cpu"}, steps)
        return difference(reference, self.run({"precision": precision}, steps), steps)

    def ranks(self, ranks, settings):
        """Against one process of the same precision."""
        steps = STEPS["ranks"]
        alone = {key: value for key, value in settings.items() if key == "precision"}
        # Small buckets, so that this small model has several.
        buckets = {"comm.bucket_mib": 1} if ranks > 1 else {}
        found = self.run(buckets | settings, steps, ranks)
        if "bf16" in settings.values():
            fp32 = self.run(buckets, steps, ranks)
            if difference(fp32, found, steps)[0] == 0:
                raise Failed(f"{settings} had no effect: the losses are those of fp32")
        return difference(self.run(alone, steps), found, steps)

    def overlap(self, ranks):
        both = {"comm.bucket_mib": 1} | self.deterministic
        runs = (
            self.run(both | {"comm.overlap": on}, STEPS["ranks"], ranks) for on in ("true", "false")
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
            victim = session.process_of_rank(1)
            if victim is None:
                raise Failed("found no process of rank 1", job)
            os.kill(victim, number)
            struck = time.monotonic()
            code = job.wait(GONE_S + 20)
            while session.processes() and time.monotonic() < struck + GONE_S + 20:
                time.sleep(0.1)
            seconds = time.monotonic() - struck
        if recover:
            # Then mpirun's exit code says nothing of its ranks.
            if "lockstep: rank 0: " not in job.log.read_text(errors="replace"):
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
        # The last one may be on its way, under another name.
        saved = (folder / "checkpoints").glob("step-" + 8 * "[0-9]")
        first, *later = sorted(saved) or [folder]
        if code != 5 or not later:
            said = f"it ended with exit code {code} after {len(later)} batches were skipped"
            raise Failed(f"{said}; expected 5, and some", job)
        for checkpoint in later:
            compare_files(first, checkpoint, "*.safetensors")
        return code, f"{len(later)} batches skipped, the tensors' bits as they were"

    def speed(self, program, column):
        """The median of a column of train.csv, without the first steps."""
        with (self.session.once(program, self.bind(self.timed, program))).open(newline="") as file:
            cells = [row[column] for row in csv.DictReader(file)][WARM_UP:]
        if not cells or not all(cells):
            raise NotRun(f"train.csv leaves {column} empty")
        run = "gpt2, bf16, 16 x 1,024 tokens" if self.gpu else "gpt-nano, fp32, 8 x 64 tokens"
        return statistics.median(map(float, cells)), f"{run}; median of {len(cells)} steps"

    def timed(self, program):
        """The train.csv of a run of 124M parameters (small on a CPU), by Lockstep or by PyTorch."""
        session, config = self.session, self.session.work / "speed.yaml"
        size = (16, 1024, "gpt2", "bf16") if self.gpu else (8, 64, "gpt-nano", "fp32")
        batch, block, preset, precision = size
        config.write_text(
            f"precision: {precision}\nmodel: {{preset: {preset}}}\n"
            f"data: {{dir: {json.dumps(str(session.sample('gpt2')))}, block_size: {block}, "
            f"batch_size: {batch}, micro_batch: {batch}}}\n"
            f"train: {{steps: {STEPS['speed']}, eval_every: 0, save_every: 0}}\n"
        )
        if program == "lockstep":
            folder = session.train("speed", {}, config=config)
            shutil.rmtree(folder / "checkpoints")  # 1.5 GB that nobody reads
            return folder / "train.csv"
        folder = session.work / "runs" / program
        command = [sys.executable, ROOT / "analysis" / "peer.py", "--config", config]
        command += ["--out", folder, "--set", f"device={session.device}"]
        command += ["--compile"] if program.endswith("compiled") else []
        # A comparison that cannot be made is no fault of the binary's.
        try:
            with session.start(program, command, session.outside) as job:
                code = job.wait(150)
        except Failed as failure:
            raise NotRun(f"analysis/peer.py: {failure}") from None
        if code:
            said = job.log.read_text(errors="replace").splitlines()
            raise NotRun(f"analysis/peer.py: {said[-1] if said else f'exit code {code}'}")
        return folder / "train.csv"


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
    said = "seconds for all checks (480); what is left then is NOT RUN"
    parser.add_argument("--budget", type=int, default=480, help=said)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    # Ended by a signal, it still ends what it started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    work = Path(tempfile.mkdtemp(prefix="lockstep-gpu-check-"))
    rows = []
    try:
        if not args.cpu and not has_gpu():
            raise Unusable("this machine has no NVIDIA GPU; --cpu tries the script on CPU ranks")
        binary = args.binary.resolve()
        if not os.access(binary, os.X_OK):
            raise Unusable(f"{binary} is not there; build it: launch/quickstart, or name another")
        data = args.data.resolve() if args.data else None
        device = "cpu" if args.cpu else "cuda"
        session = Session(binary, work, device, args.mpi, data, args.budget)
        version = output(binary, "--version", environment=session.environment)
        if not version:
            with session.lockstep("version", ["--version"]) as job:
                job.wait(60)
            said = " ".join(job.last_lines())
            raise Unusable(
                f"cannot run {binary}: {said}; --mpi DIR names an MPI, LIBTORCH another LibTorch"
            )
        facts = machine(session, version)
        record = args.out or default_path(ROOT / "analysis" / "records", facts)
        write(record, facts, rows)
        for check in Checks(session).plan():
            if not args.only or check.group in args.only:
                rows.append(check.row(session))
                write(record, facts, rows)  # what was measured stays, should this be ended
                print(f"{rows[-1].result:8} {check.group}: {check.what}", flush=True)
    except (Unusable, Failed, NotRun) as problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 2
    finally:
        failed = any(row.result == "FAIL" for row in rows)
        if not failed:
            shutil.rmtree(work, ignore_errors=True)
    print(table(facts, rows))
    print(f"\nwritten to {record}" + (f"; the runs and logs are in {work}" if failed else ""))
    return int(failed or all(row.result != "PASS" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
