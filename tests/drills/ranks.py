"""Drills on ranks: killed, stopped, slowed, signalled, two jobs at once, and wrong clocks."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from drills.lab import GONE_S, Drill, Run
from outcomes import Failed, NotRun
from runs import CURVE, heartbeat

# Steps are long enough to kill a rank in one. The deadline is too long to end ranks that others
# should end.
SLOWER = {
    "data": {"batch_size": 64},
    "train": {"steps": 100},
    "fault": {"step_deadline_s": 2 * GONE_S},
}
PHASES = ("start", "step", "all-reduce", "evaluation", "save")
ASKING = (signal.SIGUSR1, signal.SIGTERM)


def kill_at_random(lab, times):
    """Kills a run at random times until it is done; it must end like an undisturbed run."""
    expected = lab.undisturbed()
    kills = 0
    run = lab.run("killed")
    while kills < times:
        run.start()
        if run.reaches(run.step() + lab.random.randint(1, 6)):
            kills += 1
            run.kill()
            run.verify()
        else:
            run.ends(0)
            run.same_as(expected)
            run = lab.run(f"killed-{kills}")
    run.start().ends(0)
    run.same_as(expected)
    return f"{kills} kills, each resumed; logs and tensors identical"


def phase(run, rank):
    """What a rank is doing, by its last heartbeat."""
    beat = heartbeat(run.dir, rank)
    return beat and beat["phase"]


def evaluated(run):
    """The steps of its evaluations."""
    with suppress(OSError):
        return {line.split(",")[0] for line in (run.dir / "eval.csv").read_text().split("\n")[1:-1]}
    return set()


def strike(lab, run, where, rank):
    """Kills a rank in a phase. Returns the time; None if the run finished first."""
    victim = run.shows("a rank", lambda: lab.rank(rank))
    done, every = run.step(), lab.random.randint(1, 3)
    if where == "start":
        time.sleep(lab.random.uniform(0, 1))
    elif where == "step":
        if not run.reaches(done + every):
            return None
        time.sleep(lab.random.uniform(0, 0.02))
    elif where == "all-reduce":
        # Its peer is stopped, so the rank reaches the exchange and stays there.
        if not run.reaches(done + every):
            return None
        peer = lab.rank((rank + 1) % run.ranks)
        os.kill(peer, signal.SIGSTOP)
        time.sleep(1.2)
        if not run.shows("an exchange", lambda: phase(run, rank) == "exchange"):
            return None
        os.kill(victim, signal.SIGKILL)
        os.kill(peer, signal.SIGCONT)
        return time.monotonic()
    elif where == "evaluation":
        seen = evaluated(run)
        due = next(s for s in range(14, 1000, 14) if s > done and str(s) not in seen)
        if not run.reaches(due):
            return None
    elif where == "save":
        folder = run.dir / "checkpoints"
        if not run.reaches(done + 1) or not run.shows(
            "a save", lambda: any("tmp" in path.name for path in folder.glob("step-*"))
        ):
            return None
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        return time.monotonic()
    return None


def kill_each_rank(lab, times):
    """Kills each rank in each phase; all must be gone soon, and the resumed run must be exact."""
    expected, codes, longest = lab.undisturbed(2, **SLOWER), Counter(), 0.0
    places = [(where, n % 2) for n, where in enumerate(PHASES * 2)]
    kills, runs = 0, 0
    run = lab.run("bereft", 2, **SLOWER)
    while kills < times:
        where, rank = places[kills % len(places)]
        begun = strike(lab, run.start(), where, rank)
        code = run.ends(within=GONE_S if begun else 600)
        if code == 0:
            # It finished first; try again.
            run.same_as(expected)
            runs += 1
            run = lab.run(f"bereft-{runs}", 2, **SLOWER)
            continue
        if begun is None:
            raise Failed(f"{run.name} ended by itself with {code}: {run.said()[-2000:]}")
        longest = max(longest, time.monotonic() - begun)
        kills += 1
        codes[code] += 1
        run.verify()
    run.start().ends(0)
    run.same_as(expected)
    return (
        f"{kills} kills in {len(PHASES)} phases; all gone within {longest:.1f} s; exit codes "
        f"{counted(codes)}; {runs + 1} runs resumed, identical"
    )


def counted(counter):
    return ", ".join(f"{what} ({n})" for what, n in sorted(counter.items()))


def stop_a_rank(lab, times):
    """Stops each rank in turn; it must be named, and the job must exit with 6."""
    deadline, longest = 3, 0.0
    for number in range(times):
        # Nothing but steps: a rank that waits for a save has a different deadline.
        train = {"steps": 100000, "eval_every": 0, "save_every": 0, "sample_every": 0}
        fault = {"step_deadline_s": deadline}
        run = lab.run(f"stopped-{number}", 2, train=train, fault=fault).start()
        run.reaches(5)
        victim = lab.rank(number % 2)
        begun = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        run.ends(6, within=deadline + GONE_S)
        longest = max(longest, time.monotonic() - begun)
        if f"(process {victim}) has stopped" not in run.said():
            raise Failed(f"the stopped rank is not named: {run.said()[-2000:]}")
    return (
        f"{times} times named, exit code 6; {longest:.1f} s at most, of which {deadline} s deadline"
    )


def wait_for_quiet():
    """Waits for an otherwise idle machine, which a measurement of time needs."""
    until = time.monotonic() + 90
    while (load := os.getloadavg()[0]) > os.cpu_count():
        if time.monotonic() > until:
            raise NotRun(f"the machine is not quiet: its load is {load:.1f}")
        time.sleep(1)


@contextmanager
def half_speed(pid):
    """Lets the process run only half of the time."""
    end = threading.Event()

    def slow():
        with suppress(ProcessLookupError):
            while not end.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.02)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.02)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def slow_a_rank(lab, times):
    """A rank at half speed is named soon."""
    columns, taken = ("step", "rank"), []
    wait_for_quiet()
    for number in range(times):
        large = {"data": {"batch_size": 64, "micro_batch": 32}, "model": {"n_embd": 128}}
        endless = {"steps": 100000, "eval_every": 0, "save_every": 0, "sample_every": 0}
        run = lab.run(f"slowed-{number}", 2, train=endless, **large).start()
        run.reaches(12)
        begun, rank = run.step(), number % 2
        with half_speed(lab.rank(rank)):
            while not (found := run.rows("ranks.csv", columns)) and run.step() < begun + 30:
                time.sleep(0.02)
        if not found or int(found[0][1]) != rank:
            raise Failed(f"rank {rank} was slowed after step {begun}, and ranks.csv has {found}")
        taken.append(int(found[0][0]) - begun)
        run.kill()
    if max(taken) > 20:
        raise Failed(f"named after {taken} steps")
    return f"{times} times named after {min(taken)} to {max(taken)} steps"


def leave_in_peace(lab, times):
    """Ranks that run at full speed are never named as slow."""
    wait_for_quiet()
    for number in range(times):
        steps = {"steps": 1000, "eval_every": 0, "save_every": 0}
        run = lab.run(f"quiet-{number}", 2, train=steps).start()
        run.ends(0)
        if found := run.rows("ranks.csv", ("step", "rank")):
            raise Failed(f"false alarms: {found}")
    return f"{times} x 1,000 steps, nobody named"


def tensors(path):
    """The tensors of a safetensors file, all fp32, by name."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content[start:][slice(*entry["data_offsets"])], "<f4")
        for name, entry in header.items()
    }


def overwrite(pid, found, replaced):
    """Replaces bytes in a process's memory; returns how often it found them."""
    count = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", 0) as memory:
        for line in maps:
            span, rights, _, _, inode, *_ = line.split()
            if not rights.startswith("rw") or inode != "0":
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            memory.seek(start)
            with suppress(OSError):
                content, at = memory.read(end - start), -1
                while (at := content.find(found, at + 1)) >= 0:
                    memory.seek(start + at)
                    memory.write(replaced)
                    count += 1
    return count


def poison_a_rank(lab, times):
    """Writes NaN into the weights in one rank's memory."""
    for number in range(times):
        rank = number % 2
        # Weights that do not change can be found by their bytes.
        still = {"optim": {"lr": 1e-30}, "train": {"steps": 100000, "sample_every": 0}}
        run = lab.run(f"poisoned-{number}", 2, **still).start()
        run.reaches(lab.random.randint(7, 20))
        victim = lab.rank(rank)
        step = run.shows("a checkpoint", run.checkpoints)[-1]
        saved = tensors(run.dir / f"checkpoints/step-{step:08}/model.safetensors")
        weights = saved["transformer.wpe.weight"][:32].tobytes()
        os.kill(victim, signal.SIGSTOP)
        try:
            count = overwrite(victim, weights, np.full(32, np.nan, "<f4").tobytes())
        except PermissionError as reason:
            raise NotRun(
                f"the system lets nobody write into a process's memory: {reason}"
            ) from None
        os.kill(victim, signal.SIGCONT)
        if not count:
            raise Failed("the weights were not found in the rank's memory")
        run.ends(5)
        last = run.steps()
        parts = [
            rf"rank {rank}: step {last + 1}: its loss is NaN; first gradients that are not "
            r"finite: transformer\.\S+, .*its samples: \[\d+, ",
            rf"step {last + 1}: the loss is NaN .* of ranks \[{rank}\]; nothing was changed",
        ]
        for part in parts:
            if not re.search(part, run.said()):
                raise Failed(f"no {part!r} in {run.said()[-2000:]}")
        run.verify()
        path = run.dir / f"checkpoints/step-{run.checkpoints()[-1]:08}"
        for file in path.glob("*.safetensors"):
            for name, values in tensors(file).items():
                if not np.isfinite(values).all():
                    raise Failed(f"{name} in {file} is not finite")
    return f"{times} times exit code 5, rank, step, samples and parameters named; checkpoint finite"


def listens(pid, number):
    """Whether a process has a handler for a signal."""
    with suppress(OSError, TypeError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = re.search(r"SigCgt:\s*(\S+)", status)[1]
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False


def stops(run):
    """The steps after which each rank stopped on request, by its log."""
    said = re.compile(r"stopped on request after step (\d+)")
    logs = [run.dir / f"logs/rank-{rank:04}.log" for rank in range(run.ranks)]
    return [said.findall(log.read_text()) if log.exists() else [] for log in logs]


def signal_at_random(lab, times):
    """Sends USR1 or TERM to the launcher or to a rank; all ranks must save the same step, once."""
    begun = time.monotonic()
    expected, seen, runs = lab.undisturbed(2), Counter(), 0
    whole = time.monotonic() - begun
    run = lab.run("asked", 2)
    for _ in range(times):
        before = stops(run)
        run.start("-v")  # so that rank 1 has a log, too
        to, number = lab.random.choice([None, 0, 1]), lab.random.choice(ASKING)
        time.sleep(lab.random.uniform(0, whole))

        def target(run=run, to=to, number=number):
            pid = run.process.pid if to is None else lab.rank(to)
            return pid if listens(pid, number) else None

        if pid := run.shows("a handler", target):
            where = phase(run, to or 0) or "no heartbeat yet"
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        code = run.ends(0, 75)
        if code == 0:
            seen["done before"] += 1
            run.same_as(expected, f"step-{run.steps():08}")
            runs += 1
            run = lab.run(f"asked-{runs}", 2)
            continue
        after = stops(run)
        new = [there[len(here) :] for here, there in zip(before, after, strict=True)]
        if new == [[], []] and "INFO" not in run.said():
            seen["before the ranks"] += 1
            continue
        seen[where] += 1
        last = str(run.steps())
        if new != [[last], [last]] or run.checkpoints()[-1] != int(last):
            raise Failed(
                f"stopped after {new}, the log ends at {last}, checkpoints {run.checkpoints()}: "
                f"{run.said()[-2000:]}"
            )
    run.start().ends(0)
    run.same_as(expected, f"step-{run.steps():08}")
    return (
        f"{times} signals ({counted(seen)}): exit code 75 (0 where done), one save, the same step "
        f"on both ranks; {runs + 1} runs resumed, identical"
    )


def insist(lab, times):
    """A second TERM or INT ends a job at once if it cannot finish its step."""
    ways = [(None, signal.SIGTERM), (1, signal.SIGTERM), (None, signal.SIGINT), (0, signal.SIGINT)]
    expected, longest = lab.undisturbed(2), 0.0
    for number in range(times):
        run = lab.run(f"insisted-{number}", 2)
        # Opening this waits for a reader, so rank 0 hangs in step 9.
        fifo = run.dir / "samples/step-00000009.txt.tmp"
        fifo.parent.mkdir(parents=True)
        os.mkfifo(fifo)
        run.start().reaches(9)
        to, what = ways[number % len(ways)]
        pid = run.process.pid if to is None else lab.rank(to)
        os.kill(pid, what)
        time.sleep(0.5)
        if run.process.poll() is not None:
            raise Failed(f"one {what.name} ended it: {run.said()[-2000:]}")
        begun = time.monotonic()
        os.kill(pid, what)
        run.ends(143 if to is None else 128 + what, within=GONE_S)
        longest = max(longest, time.monotonic() - begun)
        fifo.unlink()
        run.start().ends(0)
        run.same_as(expected)
    return f"{times} jobs ended within {longest:.1f} s of the second signal; resumed runs identical"


def twin(run, name):
    """Another job with the same run directory."""
    other = Run(run.lab, run.name, run.ranks)
    other.log = run.lab.folder / f"{name}.log"
    return other


def two_jobs(lab, times):
    """A second job is refused; a requeued job takes over from a start that may be dying."""
    long = {
        "data": {"batch_size": 128, "micro_batch": 16},
        "train": {"steps": 100000, "save_every": 20, "sample_every": 20},
    }
    ends = Counter()
    for number in range(times):
        held = lab.run(f"held-{number}", **long).start()
        held.reaches(5)
        second = twin(held, "second")
        second.ranks = 2
        code = second.start().process.wait(600)
        named = f"process {held.process.pid} on"
        if code != 2 or named not in second.said() or "which is alive" not in second.said():
            raise Failed(f"a second job ended with {code}: {second.said()[-2000:]}")
        held.reaches(held.step() + 3)
        held.process.terminate()
        held.ends(75)
        held.verify()

        old = lab.run(f"queued-{number}", **long)
        old.start(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="0").reaches(5)
        # Further than the earlier start will get.
        until = ("--set", f"train.steps={old.step() + 200}")
        new = twin(old, "new").start(*until, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
        time.sleep(lab.random.uniform(0, 1))
        if lab.random.random() < 0.5:
            old.process.terminate()
        code = old.process.wait(600)
        if code not in (6, 75) or (code == 6 and "writes nothing more" not in old.said()):
            raise Failed(f"the earlier start ended with {code}: {old.said()[-2000:]}")
        ends[code] += 1
        new.ends(0)

        expected = lab.run(f"undisturbed-{number}", **long).start(*until)
        expected.ends(0)
        new.same_as(expected, f"step-{new.steps():08}")
        rows = [run.rows("train.csv", CURVE) for run in (held, expected)]
        if any(one != other for one, other in zip(*rows, strict=False)):
            raise Failed(f"{held.dir / 'train.csv'} was harmed by the job that was refused")
    return (
        f"{times} times refused with 2 and the holder's name, the first unharmed; {times} times "
        f"taken over, earlier starts ended with {counted(ends)}; all identical"
    )


def turn_the_clock(lab, times):
    """Between restarts, the clock and the times of all files jump a day ahead or back."""
    if not shutil.which("cc"):
        raise NotRun("there is no C compiler")
    library = lab.folder / "clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    expected, turns, day = lab.undisturbed(2), 0, 86400
    run = lab.run("elsewhen", 2)
    while turns < times:
        wrong = day if turns % 2 else -day
        for path in run.dir.rglob("*"):
            there = time.time() + lab.random.choice([-day, day])
            os.utime(path, (there, there))
        run.start(LD_PRELOAD=str(library), DRILL_CLOCK=str(wrong))
        if not run.reaches(run.step() + lab.random.randint(3, 12)):
            run.ends(0)
            run.same_as(expected)
            run = lab.run(f"elsewhen-{turns}", 2)
            continue
        since = json.loads((run.dir / "lease.json").read_text())["since"]
        if since[:10] != time.strftime("%Y-%m-%d", time.gmtime(time.time() + wrong)):
            raise Failed(f"the clock was not turned: {since}")
        turns += 1
        run.kill()
        run.verify()
    run.start().ends(0)
    run.same_as(expected)
    return f"{turns} times killed and resumed a day ahead or back; logs and tensors identical"


DRILLS = [
    Drill("kill -9 at random steps, one rank", 0, 50, kill_at_random),  # ranks/resume.rs
    Drill("kill -9 of each rank in each phase", 5, 60, kill_each_rank),
    Drill("SIGSTOP of a rank", 0, 10, stop_a_rank),  # ranks/watchdog.rs
    Drill("a rank slowed twofold", 0, 6, slow_a_rank),
    Drill("quiet ranks", 0, 3, leave_in_peace),
    Drill("NaN in one rank's memory", 0, 10, poison_a_rank),  # ranks/nonfinite.rs
    Drill("USR1 and TERM at random times", 0, 100, signal_at_random),  # ranks/resume.rs
    Drill("a second TERM or INT", 2, 12, insist),
    Drill("two jobs on one run directory", 0, 10, two_jobs),  # quick/lease.rs
    Drill("clock a day ahead or back", 2, 20, turn_the_clock),
]
