"""Drills on ranks: killed, stopped, slowed, signalled, and two jobs at once."""

import os
import signal

from fault_lab import Broken, Drill


def kill_at_random(lab, times):
    """Kills a run at random times until it is done; it must end as one left in peace."""
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


def stop_a_rank(lab, times):
    """A rank that stands still is named, and the job ends with 6."""
    for _ in range(times):
        run = lab.run("stopped", 2, train={"steps": 100000}, fault={"step_deadline_s": 5}).start()
        run.reaches(5)
        victim = lab.rank(1)
        os.kill(victim, signal.SIGSTOP)
        run.ends(6, within=15)
        if f"(process {victim}) has stopped" not in run.said():
            raise Broken(f"the stopped rank is not named: {run.said()[-2000:]}")
    return f"{times} times named, exit code 6 within the deadline and 10 s"


DRILLS = [
    Drill("kill -9 at random steps, one rank", 3, 50, kill_at_random),
    Drill("SIGSTOP of a rank", 1, 10, stop_a_rank),
]
