"""What launch/gpu-check and launch/faults share: processes by their mark, and runs compared."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from outcomes import Failed
from processes import Processes, start, until

CHECKS = Path(runs.__file__).parent
SECONDS = 300  # for what takes only a moment on an idle machine; this one may be busy

TRAIN = "step,tokens,loss,ppl,lr,grad_norm,world_size,step_ms\n"
EVAL = "step,split,loss,ppl,word_ppl,tokens,eval_s\n"


def write_run(folder, step_ms=9.0):
    """The directory of a run of two steps."""
    contents = {
        "train.csv": TRAIN + f"1,8,4.5,90.0,0.1,1.5,1,{step_ms}\n2,16,4.25,70.1,0.1,1.5,1,7.0\n",
        "eval.csv": EVAL + f"2,valid,4.25,70.1,,16,{step_ms}\n",
        "best.json": "{}",
        "samples/step-00000002.txt": "Once",
        "checkpoints/step-00000001/model.safetensors": "some",
        "checkpoints/step-00000002/model.safetensors": "weights",
        "checkpoints/step-00000002/optimizer.safetensors": "moments",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.fixture
def pair(tmp_path):
    """Two runs that learnt the same, at different speeds."""
    return write_run(tmp_path / "found"), write_run(tmp_path / "expected", step_ms=8.0)


def test_runs_that_learnt_the_same_are_the_same(pair):
    runs.same(*pair)
    # A run that was stopped keeps checkpoints of other steps.
    shutil.rmtree(pair[0] / "checkpoints/step-00000001")
    runs.same(*pair, "step-00000002")
    with pytest.raises(Failed, match="expected the files"):
        runs.same(*pair)
    with pytest.raises(Failed, match="expected checkpoints step-00000003, found none"):
        runs.same(*pair, "step-00000003")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("train.csv", "4.25", "4.2500001", "found .*'4.2500001'.*, expected"),
        ("train.csv", "2,16,4.25,70.1,0.1,1.5,1,7.0\n", "", "has 1 rows, expected 2"),
        ("train.csv", "1,7.0\n", "1,7.0", "is not whole"),
        ("train.csv", ",7.0", "", "is not whole"),
        ("eval.csv", "valid", "test", "found .*'test'"),
        ("best.json", "{}", "{ }", "best.json differs from"),
        ("samples/step-00000002.txt", "Once", "once", "step-00000002.txt differs from"),
        ("checkpoints/step-00000001/model.safetensors", "s", "S", "model.safetensors differs from"),
        ("checkpoints/step-00000002/optimizer.safetensors", "s", "S", "optimizer.*differs from"),
    ],
)
def test_the_smallest_difference_between_runs_is_told(pair, name, old, new, said):
    path = pair[0] / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Failed, match=said):
        runs.same(*pair)


@pytest.mark.parametrize("name", ["best.json", "samples/step-00000002.txt"])
def test_a_file_that_only_one_run_has_is_told(pair, name):
    (pair[1] / name).unlink()
    with pytest.raises(Failed, match="expected the files none, found"):
        runs.same(*pair)


def test_a_step_that_is_there_twice_is_told(pair):
    for run in pair:
        path = run / "train.csv"
        path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(Failed, match=r"has the steps \[1, 2, 2\]"):
        runs.same(*pair)


def test_the_last_step_is_that_of_the_last_whole_row(tmp_path):
    log = tmp_path / "train.csv"
    assert runs.last_step(log) == 0
    for text, step in (("step,loss\n", 0), ("step,loss\n1,4.5\n", 1), ("step,loss\n1,4\n2", 1)):
        log.write_text(text)
        assert runs.last_step(log) == step


@pytest.fixture
def processes():
    found = Processes("LOCKSTEP_TEST")
    yield found
    found.end()


def begin(processes, folder, script, **variables):
    """Starts shell commands with the mark."""
    environment = os.environ | processes.mark | variables
    return start(["sh", "-c", script], folder / "log", env=environment)


def test_processes_are_found_by_their_mark_and_ended(processes, tmp_path):
    sleep = Path(shutil.which("sleep")).resolve()
    script = "echo begun; setsid sleep 1000 & exec sleep 1000"
    parent = begin(processes, tmp_path, script, OMPI_COMM_WORLD_RANK="3")
    assert until(lambda: len(list(processes.running(sleep))) == 2, SECONDS)
    assert (tmp_path / "log").read_text() == "begun\n"
    assert processes.rank(sleep, 3) in {pid for pid, _ in processes.living()}
    assert processes.rank(sleep, 1) is None
    assert processes.rank(sys.executable, 3) is None
    assert Processes("LOCKSTEP_TEST").living() == []
    processes.end()
    assert parent.wait(SECONDS) == -signal.SIGKILL
    assert processes.living() == []


def test_what_is_waited_for_may_not_come(processes, tmp_path):
    assert until(lambda: 0, 0.01) is None
    assert until(lambda: 7, 0) == 7
    process = begin(processes, tmp_path, "exit 3")
    assert until(lambda: 0, 1000, process) is None
    assert process.wait() == 3


def test_a_guard_ends_them_with_the_process_that_forgot_to(processes, tmp_path):
    begin(processes, tmp_path, "exec sleep 1000")
    assert until(processes.living, SECONDS)
    script = "import sys; from processes import Processes; Processes(*sys.argv[1:]).guard()"
    [(name, value)] = processes.mark.items()
    subprocess.run([sys.executable, "-c", script, name, value], cwd=CHECKS, check=True)
    assert until(lambda: not processes.living(), SECONDS)


@pytest.mark.parametrize("module", sorted(path.stem for path in CHECKS.glob("*.py")))
def test_checks_need_the_standard_library_only(module):
    """A machine with a GPU may have a bare python3. -S leaves out all packages."""
    command = [sys.executable, "-S", "-c", f"import {module}"]
    done = subprocess.run(command, cwd=CHECKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
