"""Drills on a real Slurm of several nodes on this machine, with the unchanged slurm/train.sbatch.

No job is submitted twice: whatever happens to it, the job must requeue itself, or Slurm does.
"""

import csv
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from drills.lab import BINARY, GONE_S, ROOT, Drill, Lab
from outcomes import Failed, NotRun
from processes import until
from runs import heartbeat
from virtual_cluster import Cluster

# The nodes send so slowly that a step takes a third of a second but hardly any CPU time.
SLOW = "4mbit"
# Before the first start.
NONE = (-1, 0)
TRAIN = {"steps": 1200, "save_every": 10, "eval_every": 50, "sample_every": 70}


class Site:
    """A cluster, and a lab in the folder from which jobs are submitted."""

    def __init__(self, folder, nodes):
        self.cluster = Cluster(folder, nodes)
        self.lab = Lab(self.cluster.work)
        self.cluster.environment |= self.lab.processes.mark

    def submit(self, run, *options):
        arguments = [f"{run.name}.yaml", "--run-dir", run.name]
        return Job(self, run, self.cluster.submit(*options, arguments=arguments))

    def slurmd(self, node, signal_number):
        """Sends a signal to a node's slurmd; the processes that it started do not notice."""
        daemon = f"slurmd -D -N n{node} -f {self.cluster.state}/etc/slurm.conf".split()
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if entry.read_bytes().decode(errors="replace").split("\0")[:-1] == daemon:
                    os.kill(int(entry.parent.name), signal_number)


@contextmanager
def site(nodes):
    """A cluster in a folder that its nodes see too. The folder is kept if something broke."""
    if not (ROOT / "launch/cluster").exists() or not shutil.which("slurmctld"):
        raise NotRun("there is no Slurm here")
    (ROOT / "target").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-cluster-", dir=ROOT / "target"))
    here = Site(folder, nodes)
    try:
        if here.cluster.started.returncode == 2:
            raise NotRun(f"no cluster: {here.cluster.started.stderr.strip()}")
        if here.cluster.started.returncode:
            raise Failed(f"no cluster: {here.cluster.started.stderr.strip()}")
        yield here
    except (AssertionError, Failed) as failure:
        raise Failed(f"{failure}; the runs are in {folder}") from None
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        here.cluster.close()
        here.lab.processes.end()
        if here.cluster.started.returncode == 2:
            shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A job that trains a run and is restarted again and again under one number."""

    def __init__(self, place, run, number):
        self.site, self.cluster, self.run, self.number = place, place.cluster, run, number

    def facts(self):
        return self.cluster.facts(self.number)

    def restarts(self):
        return int(self.facts()["Restarts"])

    def said(self):
        return self.cluster.output(self.number)

    def starts(self):
        """{start: {rank: process id}} of all living ranks, on all nodes.

        A start is how often Slurm had requeued the job, and the step's number within the job.
        """
        found = {}
        for pid, known in self.site.lab.processes.running(BINARY):
            # The job script also runs the program; that process is not a rank.
            if known.get("SLURM_JOB_ID") == self.number and "SLURM_STEP_ID" in known:
                start = int(known.get("SLURM_RESTART_COUNT", 0)), int(known["SLURM_STEP_ID"])
                found.setdefault(start, {})[int(known["SLURM_PROCID"])] = pid
        return found

    def ranks(self, start):
        """The process ids of a start's ranks, by rank."""
        return self.starts().get(start, {})

    def newest(self):
        """The latest start that is still alive."""
        return max(self.starts(), default=NONE)

    def nodes(self):
        """The numbers of the job's nodes."""
        names = self.cluster.call("scontrol", "show", "hostnames", self.facts()["NodeList"])
        return [int(name[1:]) for name in names.split()]

    def until(self, what, condition, within=600):
        """Waits until `condition` is true while the job goes on; returns its value."""
        if not (found := until(condition, within, every=0.02)):
            raise Failed(f"waited {within} s for {what}\n{self.cluster.situation()[-4000:]}")
        return found

    def until_going_on(self, after=NONE):
        """Waits until a start after `after` trains; returns that start."""

        def found():
            start, ranks = max(self.starts().items(), default=(NONE, {}))
            beat = self.beat(0)
            # The heartbeat may be left over from an earlier start.
            mine = beat and 0 in ranks and beat["pid"] == _pid_on_its_node(ranks[0])
            return mine and start > after and beat["phase"] != "start-up" and start

        return self.until("a new start and its first step", found)

    def beat(self, rank):
        """A rank's heartbeat, which tells what it is doing; None if it has none."""
        return heartbeat(self.run.dir, rank)

    def goes_on_for(self, steps):
        """Waits for some more steps and a new checkpoint."""
        first, saved = self.run.step(), max(self.run.checkpoints(), default=0)
        self.until(f"{steps} steps after {first}", lambda: self.run.step() >= first + steps)
        self.until("a checkpoint", lambda: max(self.run.checkpoints(), default=0) > saved)

    def ends(self, state="COMPLETED", within=3600):
        self.cluster.wait(self.number, within)
        if self.facts()["JobState"] != state:
            raise Failed(f"the job ended as {self.facts()['JobState']}: {self.said()[-3000:]}")

    def same_as(self, expected):
        """Lets the job finish at full speed; its result must equal that of an undisturbed run."""
        self.cluster.launch("shape", "off")
        self.ends()
        self.run.verify()
        self.run.same_as(expected)


def _pid_on_its_node(pid):
    """A process's id on its own node: each node numbers its own processes."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("NSpid:")[1].split("\n")[0].split()[-1])
    return None


def kill_in_each_phase(_, times):
    """Kills each rank in each phase; Slurm and the other ranks end the start; the job goes on."""
    slowest = 0.0
    with site(2) as here:
        # At full speed, or ranks would do nothing but exchange.
        # The deadline is too long to end ranks that Slurm should end.
        sections = {"train": TRAIN | {"eval_every": 5}, "fault": {"step_deadline_s": 2 * GONE_S}}
        expected = here.lab.undisturbed(2, **sections)
        run = here.lab.run("killed", 2, **sections)
        job = here.submit(run, "--nodes=2")
        phases = ["start-up", "step", "exchange", "evaluation", "save"]
        victims = [(phase, rank) for phase in phases for rank in (0, 1)]
        start = NONE
        for number in range(times):
            phase, rank = victims[number % len(victims)]
            if phase == "start-up":
                job.until("a new start", lambda before=start: job.newest() > before)
                start = job.newest()
            else:
                start = job.until_going_on(start)
                job.goes_on_for(3)
            pid = await_phase(job, start, rank, phase)
            os.kill(pid, signal.SIGKILL)
            begun = time.monotonic()
            job.until("the end of all", lambda s=start: not job.ranks(s), GONE_S)
            slowest = max(slowest, time.monotonic() - begun)
        job.until_going_on(start)
        job.same_as(expected)
        queued = job.restarts()
    return (
        f"{times} kills, everyone gone within {slowest:.1f} s, started again each time; "
        f"{queued} times in the queue again; result identical"
    )


def await_phase(job, start, rank, phase):
    """Waits until a rank of a start is in a phase; returns its process id."""

    def process():
        return job.ranks(start).get(rank)

    if phase == "start-up":
        return job.until("a rank", process)
    pid = process()
    if phase == "save":
        # Rank 0 is writing at this moment.
        job.until("a save", lambda: any((job.run.dir / "checkpoints").glob("step-*.tmp")))
        return pid
    if phase == "exchange":
        # Stopping the other rank makes sure of it.
        other = job.ranks(start)[1 - rank]
        os.kill(other, signal.SIGSTOP)
        job.until(phase, lambda: job.beat(rank)["phase"] == phase)
        os.kill(other, signal.SIGCONT)
        return pid
    job.until(phase, lambda: (job.beat(rank) or {}).get("phase") == phase)
    return pid


def requeue_while_the_old_dies(_, times):
    """The job restarts while its old start dies slowly, or lives on a node that Slurm lost."""
    with site(2) as here:
        # On one node: if Slurm loses all of several nodes at once, it may hold the job.
        train = {"steps": 3000, "save_every": 50, "eval_every": 500, "sample_every": 500}
        # On a node that Slurm lost, only a deadline ends a rank that waits for the other's save.
        sections = {"train": train, "fault": {"save_deadline_s": 20}}
        expected = here.lab.undisturbed(2, **sections)
        for number in range(times):
            run = here.lab.run(f"requeued-{number}", 2, **sections)
            job = here.submit(run, "--nodes=1", "--ntasks=2")
            start = job.until_going_on()
            job.goes_on_for(5)
            old, [node] = job.ranks(start), job.nodes()
            kind = ("stopped", "out of sight", "out of sight and stopped")[number % 3]
            if kind != "out of sight":
                for pid in old.values():
                    os.kill(pid, signal.SIGSTOP)
            if kind == "stopped":
                here.cluster.call("scontrol", "requeue", job.number)
            else:
                # The node does not answer, and Slurm starts the job on the other node.
                here.slurmd(node, signal.SIGSTOP)
            job.until_going_on(start)
            if kind != "stopped" and not takes_over(job):
                raise Failed(f"the new start did not take over: {job.said()[-3000:]}")
            if kind == "out of sight and stopped":
                job.goes_on_for(20)
                for pid in old.values():
                    os.kill(pid, signal.SIGCONT)
            job.until("the end of the old", lambda s=start, j=job: not j.ranks(s))
            job.goes_on_for(5)
            here.slurmd(node, signal.SIGCONT)
            job.same_as(expected)
            if job.restarts() != 1:
                again = f"queued {job.restarts()} times again, not once"
                raise Failed(f"{again}: {job.said()[-3000:]}")
    return f"{times} times taken over, the old start wrote nothing more; result identical"


def takes_over(job):
    return "it is an earlier start of this job, which was queued again" in job.said()


def two_jobs_in_one_place(_, times):
    """The second job is refused, with the number of the first, which does not notice."""
    with site(2) as here:
        # Long enough, even on a fast machine, for some seconds for each other job that comes.
        train = TRAIN | {"steps": 2500 * times, "save_every": 50}
        expected = here.lab.undisturbed(train=train)
        run = here.lab.run("shared", train=train)
        job = here.submit(run, "--nodes=1")
        job.until_going_on()
        for _ in range(times):
            second = here.submit(run, "--nodes=1")
            second.ends("FAILED")
            facts = second.facts()
            if (facts["ExitCode"], facts["Restarts"]) != ("2:0", "0"):
                raise Failed(f"the second job ended with {facts['ExitCode']}: {second.said()}")
            if f"is in use: {run.name}/lease.json names job {job.number}, " not in second.said():
                raise Failed(f"the first job is not named: {second.said()[-3000:]}")
        job.same_as(expected)
    return f"{times} refused, exit code 2, the other job named; its result identical"


def preemptions_and_a_dead_node(_, times):
    """Each time, five preemptions of all kinds, and a node that dies between them."""
    with site(3) as here:
        expected = here.lab.undisturbed(2, train=TRAIN)
        for number in range(times):
            here.cluster.launch("shape", SLOW, "0ms")
            run = here.lab.run(f"preempted-{number}", 2, train=TRAIN)
            job = here.submit(run, "--nodes=2")
            start = NONE
            for preempt in (usr1, requeue, time_limit, dead_node, term, usr1):
                start = job.until_going_on(start)
                job.goes_on_for(here.lab.random.randint(1, 15))
                preempt(job)
            job.until_going_on(start)
            job.same_as(expected)
    return f"{times} x (2 x USR1, TERM, requeue, time limit, a dead node); result identical"


def usr1(job):
    job.cluster.call("scancel", "--batch", "--signal=USR1", job.number)


def term(job):
    job.cluster.call("scancel", "--signal=TERM", job.number)


def requeue(job):
    job.cluster.call("scontrol", "requeue", job.number)


def time_limit(job):
    """Brings the time limit near, and lifts it again once the job has saved and ended."""
    before = job.restarts()
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.until("the limit to strike", lambda: job.restarts() > before)
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")


def dead_node(job):
    """Kills one of the job's nodes, and brings it back once the job has been requeued."""
    before = job.restarts()
    node = job.site.lab.random.choice(job.nodes())
    job.cluster.launch("kill", node)
    job.until("Slurm to queue the job again", lambda: job.restarts() > before)
    job.cluster.launch("start", node)


def kill_a_rank(job):
    ranks = job.ranks(job.newest())
    os.kill(ranks[job.site.lab.random.choice(sorted(ranks))], signal.SIGKILL)


def stop_a_rank(job):
    """Stops a rank for longer than the others tolerate."""
    ranks = job.ranks(job.newest())
    os.kill(ranks[job.site.lab.random.choice(sorted(ranks))], signal.SIGSTOP)


def damage(job):
    """Changes a byte of the newest checkpoint, which is noticed once that checkpoint is needed."""
    job.until("an older checkpoint", lambda: len(job.run.checkpoints()) > 1)
    while True:
        with suppress(OSError):  # it may just be cleared away
            newest = job.run.dir / "checkpoints" / f"step-{job.run.checkpoints()[-1]:08}"
            file = job.site.lab.random.choice(sorted(newest.iterdir()))
            place = job.site.lab.random.randrange(file.stat().st_size)
            with file.open("r+b") as opened:
                opened.seek(place)
                byte = opened.read(1)[0]
                opened.seek(place)
                opened.write(bytes([byte ^ 1 << job.site.lab.random.randrange(8)]))
            break
    kill_a_rank(job)


# Seconds from a start of the soak to its next fault, on average. A fault costs some seconds, mostly
# for repeated steps and deadlines. If faults are hours apart, next to nothing is lost.
BETWEEN_S = 105


def soak(_, times):
    """Random faults of all kinds in one job that nobody helps.

    The useful time is that of the steps in the final train.csv, each counted once. The whole is the
    time in which the job had its nodes. So starts, repeated steps and the detection of dead ranks
    count as lost, and also evaluations, samples and saves.
    """
    kinds = [kill_a_rank, usr1, term, stop_a_rank, requeue, dead_node, damage]
    with site(3) as here:
        train = {"steps": times * BETWEEN_S * 4, "save_every": 4}
        train |= {"eval_every": 500, "sample_every": 500}
        sections = {"train": train, "fault": {"step_deadline_s": 5}}
        # This runs first: it waits until no process of the lab is left, and the daemon of a revived
        # node would be one.
        expected = here.lab.undisturbed(2, **sections)
        run = here.lab.run("soaked", 2, **sections)
        here.cluster.launch("shape", SLOW, "0ms")
        job = here.submit(run, "--nodes=2")
        start, done = NONE, []
        with Clock(job) as clock:
            for _ in range(times):
                start = job.until_going_on(start)
                time.sleep(here.lab.random.uniform(0.2, 1.8) * BETWEEN_S)
                job.until("a checkpoint", run.checkpoints)
                done.append(here.lab.random.choice(kinds))
                so_far = f"{useful_s(run):.0f} of {clock.seconds:.0f} s useful"
                print(f"    {time.strftime('%X')} {so_far}: {done[-1].__name__}", flush=True)
                done[-1](job)
            start = job.until_going_on(start)
            time.sleep(BETWEEN_S)
            useful, whole = useful_s(run), clock.seconds
        counts = ", ".join(f"{done.count(kind)} x {kind.__name__}" for kind in kinds)
        share = f"{useful:.0f} of {whole:.0f} s ({useful / whole:.1%}) useful"
        here.cluster.launch("shape", "off")
        job.ends()
        job.same_as(expected)
    if useful < 0.9 * whole:
        raise Failed(f"only {share}, {counts}")
    return f"{times} faults ({counts}); {share}; result identical"


def useful_s(run):
    """Seconds of the steps in a run's log, whose last row may still be being written."""
    whole = (run.dir / "train.csv").read_text().rpartition("\n")[0]
    return sum(float(row["step_ms"]) for row in csv.DictReader(whole.splitlines())) / 1000


class Clock:
    """Counts the seconds in which a job has its nodes."""

    def __init__(self, job):
        self.job, self.seconds, self.over = job, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.count, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def count(self):
        before, state = time.monotonic(), ""
        while not self.over.wait(0.3):
            with suppress(AssertionError):  # Slurm does not answer; keep the last state
                asked = self.job.cluster.call("squeue", "-h", "-o", "%T", "-j", self.job.number)
                state = asked.strip()
            now = time.monotonic()
            # The time in which Slurm ends a start counts too.
            self.seconds += (now - before) * (state in ("RUNNING", "COMPLETING"))
            before = now


DRILLS = [
    Drill("Slurm: kill -9 of each rank in each phase", 1, 10, kill_in_each_phase),
    Drill("Slurm: requeued while the old start lives", 0, 6, requeue_while_the_old_dies),
    Drill("Slurm: two jobs on one run directory", 0, 3, two_jobs_in_one_place),  # quick/lease.rs
    Drill("Slurm: five preemptions and a dead node", 0, 1, preemptions_and_a_dead_node),
    Drill("Slurm: soak", 0, 50, soak),
]
