"""Drills on storage: runs killed during saves, and disks that fail, at random and at each call.

shim.c disturbs one call of the C library; strace shows what the kernel gets, and in which order.
The promise about every checkpoint is checked here by its manifest, without the binary.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from drills.lab import Drill
from outcomes import Failed, NotRun
from runs import CURVE, EVALUATION

SHIM = Path(__file__).with_name("shim.c")
# Writes everything that a run can write, in as few steps as possible: the last save purges the
# first.
BRIEF = {"train": {"steps": 5, "save_every": 2, "eval_every": 3, "sample_every": 3, "keep_last": 1}}
# Saves of some milliseconds, and almost nothing between them.
SAVING = {
    "data": {"batch_size": 4},
    "model": {"n_embd": 128},
    "train": {"steps": 60, "save_every": 1, "eval_every": 20, "sample_every": 20},
}
# The reason and the remedy that a message must contain.
ERRORS = {
    errno.ENOSPC: ("No space left", "free space"),
    errno.EDQUOT: ("quota exceeded", "larger quota"),
    errno.EIO: ("Input/output error", "looked at"),
    errno.EROFS: ("Read-only file system", "name a folder that you may write to"),
}
FAILING = ("open", "write", "sync", "rename", "mkdir")
# Files only for people or for a takeover; a run goes on without them.
SPARED = ("/logs/", "/heartbeats/", "/lease.json")
SPARED_NAMES = ("heartbeats", "lease.json")


def shim(lab):
    """The compiled shim."""
    library, compiler = lab.folder / "shim.so", shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise NotRun("there is no C compiler")
    if not library.exists():
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotRun(f"{SHIM.name} cannot be compiled: {done.stderr[-500:]}")
    return library


def struck(lab, run, at, **fault):
    """Starts a run under the shim, and returns what the shim noted, once `at` has ended it."""
    trace = lab.folder / "trace"
    trace.unlink(missing_ok=True)
    fault |= {"PRELOAD": shim(lab), "AT": at, "PATH": f"{run.name}/", "TRACE": trace}
    names = {"PRELOAD": "LD_PRELOAD"}
    run.start(**{names.get(key, f"FAULT_{key}"): str(value) for key, value in fault.items()})
    run.ends(*((0,) if at == 0 else ()))
    return trace.read_text().splitlines() if trace.exists() else []


def calls(lab):
    """The calls of a brief run that change its folder, as (kind, path)."""
    lines = struck(lab, lab.run("counted", **BRIEF), 0)
    return [tuple(line.rsplit(" ", 1)) for line in lines]


def spread(points, times):
    """As many of the points as asked for, evenly spread."""
    times = min(times, len(points))
    return [points[index * len(points) // times] for index in range(times)]


def intact(run):
    """The step of the newest checkpoint, or 0 if there is none; all must be whole."""
    for step in run.checkpoints():
        folder = run.dir / f"checkpoints/step-{step:08}"
        for name, entry in json.loads((folder / "MANIFEST.json").read_text())["files"].items():
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise Failed(f"{folder / name} is not what its manifest says")
    return max(run.checkpoints(), default=0)


def goes_on(run, newest):
    """A run that was killed or failed must resume from its newest checkpoint and succeed."""
    run.start().ends(0)
    resumed = re.search(r"resuming from \S+ after (\d+) steps", run.said())
    if (int(resumed[1]) if resumed else 0) != newest or "passing over" in run.said():
        raise Failed(f"{run.name} did not go on after step {newest}: {run.said()[-2000:]}")


def lost(run, save_every):
    """The number of steps to repeat, which must be at most those between two saves: the first save
    may still be in progress when the second is due."""
    steps = run.step() - intact(run)
    if steps > 2 * save_every:
        raise Failed(f"{run.name} lost {steps} steps, saved every {save_every}")
    return steps


def kill_amid_saves(lab, times):
    """Kills a run that only saves; each time it must go on from an intact checkpoint."""
    expected = lab.undisturbed(**SAVING)
    kills = amid = most = runs = 0
    run = lab.run("killed-0", **SAVING)
    while kills < times:
        begun = time.time()
        run.start()
        if run.reaches(run.step() + lab.random.randint(1, 4)):
            time.sleep(lab.random.uniform(0, 0.03))
        if run.process.poll() is None:
            run.kill()
            kills += 1
            unfinished = run.dir.glob("checkpoints/*.tmp")
            amid += any(folder.stat().st_mtime > begun for folder in unfinished)
            most = max(most, lost(run, 1))
            if "passing over" in run.said():
                raise Failed(f"{run.name} found a bad checkpoint: {run.said()[-2000:]}")
        else:
            run.ends(0)
            run.same_as(expected)
            shutil.rmtree(run.dir)
            runs += 1
            run = lab.run(f"killed-{runs}", **SAVING)
    goes_on(run, intact(run))
    run.same_as(expected)
    return (
        f"{kills} kills, {amid} of them amid a save: 0 unloadable, at most {most} steps lost with "
        f"a save at each; {runs + 1} runs identical to one left in peace"
    )


def kill_at_each_call(lab, times):
    """Kills a run at each call that changes its folder: before it, and in the middle of a write."""
    shim(lab)
    expected, every = lab.undisturbed(**BRIEF), calls(lab)
    kills = most = 0
    for at in spread(range(1, len(every) + 1), times):
        run = lab.run(f"call-{at}", **BRIEF)
        struck(lab, run, at)
        # The order of calls depends on the threads, so a run may end before the last of them.
        kills += run.process.returncode < 0
        most = max(most, lost(run, BRIEF["train"]["save_every"]))
        goes_on(run, intact(run))
        run.same_as(expected)
        shutil.rmtree(run.dir)
    saves = sum(kind == "rename" and bool(re.search(r"/step-\d+$", path)) for kind, path in every)
    return (
        f"killed at {kills} of {len(every)} calls of a run with {saves} saves: "
        f"0 unloadable, at most {most} steps lost with a save every 2, each identical in the end"
    )


def fail_at_each_call(lab, times):
    """From each call that changes a run's folder on, makes its calls fail as disks do."""
    shim(lab)
    expected = lab.undisturbed(**BRIEF)
    kinds = [kind for kind, _ in calls(lab)]
    points = [
        (kind, at, error)
        for kind in FAILING
        for at in range(1, kinds.count(kind) + 1)
        for error in ERRORS
        # A disk that becomes read-only still writes what is open.
        if error != errno.EROFS or kind in ("open", "rename", "mkdir")
    ]
    lab.random.shuffle(points)
    failed = harmless = 0
    for number, (kind, at, error) in enumerate(points[:times]):
        run = lab.run(f"failed-{number}", **BRIEF)
        seen = struck(lab, run, at, KIND=kind, ERRNO=error)
        paths = [line.split(" ", 1)[1] for line in seen]
        if run.process.returncode == 0 and all(any(part in p for part in SPARED) for p in paths):
            harmless += 1
        else:
            failed += 1
            refuses(run, paths, error, f"{kind} {at}")
        goes_on(run, intact(run))
        run.same_as(expected)
        shutil.rmtree(run.dir)
    return (
        f"{failed} failures told with exit code 4, the file and a remedy; {harmless} of what a run "
        "can do without; CSVs and checkpoints whole, and each identical in the end"
    )


def refuses(run, paths, error, what):
    """A run must have exited with 4 and named one of the files, and its files must be whole."""
    run.ends(4)
    said = "".join(line for line in run.said().splitlines() if line.startswith("lockstep: "))
    # A file has another name while it is being written.
    names = [re.sub(r"/\.tmp\w+$|(?<=/lease.json)\.\w+$|\.tmp", "", path) for path in paths]
    if not any(name in said.replace(".tmp", "") for name in names):
        raise Failed(f"{what}: none of {names} is named: {said}")
    if any(part not in said for part in ERRORS[error]):
        raise Failed(f"{what}: no reason or no remedy: {said}")
    intact(run)
    for table, columns in (("train.csv", CURVE), ("eval.csv", EVALUATION)):
        if (run.dir / table).exists():
            run.rows(table, columns)


def read_only(lab, times):
    """Makes a run's disk read-only: it exits with 4, and goes on once it can write again."""
    unshare, nsenter = shutil.which("unshare"), shutil.which("nsenter")
    if os.geteuid() or not unshare or not nsenter:
        raise NotRun("needs root, unshare and nsenter")
    if subprocess.run([unshare, "-m", "true"], capture_output=True).returncode:
        raise NotRun("this machine gives no mount namespaces")
    expected = lab.undisturbed(**SAVING)
    for number in range(times):
        run = lab.run(f"read-only-{number}", **SAVING)
        run.start(under=[unshare, "-m"])
        run.reaches(lab.random.randint(2, 20))
        # Made read-only elsewhere first: the folder itself is busy with a save.
        folder, aside = run.dir / "checkpoints", lab.folder / f"aside-{number}"
        aside.mkdir()
        again = f'mount --bind "{folder}" "{aside}" && mount -o remount,bind,ro "{aside}" && '
        again += f'mount --move "{aside}" "{folder}"'
        inside = [nsenter, "-m", f"--target={run.process.pid}", "--", "sh", "-c", again]
        done = subprocess.run(inside, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"the folder cannot be made read-only: {done.stderr}")
        run.process.wait()
        refuses(run, [f"{run.name}/checkpoints"], errno.EROFS, "read-only")
        lost(run, 1)
        goes_on(run, intact(run))
        run.same_as(expected)
        shutil.rmtree(run.dir)
    return f"{times} times: exit code 4 with the file named, checkpoints whole, the rest identical"


# A call of strace -ff -ttt -y: its time, its name, and the arguments.
CALL = re.compile(r"(\d+\.\d+) (\w+)\((.*)\) += (?!-)(\S+)")


def system_calls(lab, run):
    """What a run asked of the kernel about its folder, in order: (what, path, path renamed to)."""
    strace = shutil.which("strace")
    if not strace:
        raise NotRun("there is no strace")
    names = "open,openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,"
    trace = lab.folder / "strace"
    under = [strace, "-ff", "-ttt", "-y", "-s", "0", "-qq", "-e", f"trace={names}renameat2,mkdir"]
    run.start(under=[*under, "-o", trace], SLURM_JOB_ID="7").ends(0)
    found = []
    for file in lab.folder.glob("strace.*"):
        found += filter(None, map(CALL.match, file.read_text(errors="replace").splitlines()))
    calls = []
    for call in sorted(found, key=lambda call: float(call[1])):
        what, arguments, result = call[2], call[3], call[4]
        paths = re.findall(r'"([^"]*)"', arguments)
        of_descriptor = re.search(r"<([^>]*)>", arguments if "open" not in what else result)
        if what.startswith("rename"):
            what = "rename"
        elif what == "mkdir":
            pass
        elif "open" in what or what == "creat":
            what, paths = "create" if "O_CREAT" in arguments else "look", [of_descriptor[1]]
        else:
            what = "sync" if "sync" in what else "write"
            paths = [of_descriptor[1]] if of_descriptor else []
        paths = [os.path.relpath(lab.folder / path, run.dir) for path in paths if path]
        if paths and not paths[0].startswith("../") and what != "look":
            calls.append((what, *paths))
    return calls


def order_of_calls(lab, times):
    """A file or a checkpoint must be made durable before anything relies on it."""
    return in_order(system_calls(lab, lab.run("traced", **BRIEF)))


def in_order(calls):
    """Checks the order of the calls of a whole run."""
    files = checkpoints = 0
    for index, (what, *paths) in enumerate(calls):
        if what != "rename":
            continue
        source, target = paths
        before, after = calls[:index], calls[index + 1 :]
        folder = str(Path(target).parent)
        if target.startswith(SPARED_NAMES) or ".tmp" in target:
            continue
        if target.startswith("checkpoints/step-"):
            checkpoint_is_durable(before, source, int(target[-8:]))
            checkpoints += 1
        else:
            durable(before, source)
            files += 1
        # Nothing else may be renamed before this rename is durable.
        following = [call for call in after if call == ("sync", folder) or call[0] == "rename"]
        following = [call for call in following if not str(call[-1]).startswith(SPARED_NAMES)]
        if not following or following[0][0] != "sync":
            raise Failed(f"{folder}, with {target}, is not made durable: {following[:1]}")
    first = next(n for n, call in enumerate(calls) if call[-1].startswith("checkpoints/step-"))
    for folder in (".", "checkpoints"):
        above = os.path.normpath(f"{folder}/..")
        made = calls.index(("mkdir", folder))
        if ("sync", above) not in calls[made:first]:
            raise Failed(f"the name of {folder} is not made durable before its first checkpoint")
    renamed = {target for what, *paths in calls if what == "rename" for target in paths[1:]}
    must = {"config.yaml", "tokenizer.json", "train.csv", "eval.csv", "best.json", "restarts.json"}
    if must - renamed:
        raise Failed(f"{sorted(must - renamed)} are not written beside and renamed")
    return (
        f"{checkpoints} checkpoints (CSV rows, each file, then MANIFEST.json, then the folder, its "
        f"name, and the folder above) and {files} other files in order"
    )


def durable(before, path):
    """The index of the sync of a file, which must follow its last write."""
    changes = ("create", "write", "rename")
    written = [n for n, call in enumerate(before) if call[0] in changes and call[-1] == path]
    synced = [n for n, call in enumerate(before) if call == ("sync", path)]
    if not written or not synced or synced[-1] < written[-1]:
        raise Failed(f"{path} is not made durable before it is renamed")
    return synced[-1]


def checkpoint_is_durable(before, folder, step):
    """All that must be on the disk before a checkpoint gets its name."""
    named = {call[-1] for call in before if call[0] in ("create", "rename")}
    named -= {call[1] for call in before if call[0] == "rename"}
    files = {path for path in named if path.startswith(f"{folder}/")}
    manifest = f"{folder}/MANIFEST.json"
    if len(files) < 4 or manifest not in files:
        raise Failed(f"{folder} has {sorted(files)}")
    begun = before.index(("create", manifest))
    if any(durable(before, file) > begun for file in files - {manifest}):
        raise Failed(f"{manifest} is not the last file written")
    if ("sync", folder) not in before[durable(before, manifest) :]:
        raise Failed(f"{folder} itself is not made durable")
    for log, rows in (("train.csv", step), ("eval.csv", step // BRIEF["train"]["eval_every"])):
        with suppress(ValueError):
            last = len(before) - 1 - before[::-1].index(("sync", log))
            if before[:last].count(("write", log)) >= rows:
                continue
        raise Failed(f"{log} is not made durable before the checkpoint of its step {step}")


DRILLS = [
    Drill("kill -9 at random times amid saves", 0, 200, kill_amid_saves),  # the next has saves
    Drill("kill -9 at each call of a run that saves", 5, 1000, kill_at_each_call),
    Drill("order of write, fsync, rename, fsync of the folder", 1, 1, order_of_calls),
    Drill("ENOSPC, EDQUOT, EIO, EROFS at each call", 5, 1000, fail_at_each_call),
    Drill("a disk becomes read-only", 0, 20, read_only),  # the one above has EROFS
]
