"""launch/gpu-check: it finds what is wrong, leaves nothing running, and passes on CPU ranks."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analysis"))
import gpu_check
import gpu_record
import gpu_session
from gpu_check import Check, difference
from gpu_session import Failed, NotRun

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("LOCKSTEP_BIN") or ROOT / "target" / "release" / "lockstep")


def write_log(path, losses, header="step,loss,grad_norm"):
    """A train.csv with these losses; a step's number can be given beside its loss."""
    lines = [header]
    for number, loss in enumerate(losses, 1):
        step, loss = loss if isinstance(loss, tuple) else (number, loss)
        lines.append(f"{step},{loss},0.5")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def reference(tmp_path):
    return write_log(tmp_path / "reference.csv", [4.0, 3.0, 2.0])


def test_equal_logs_do_not_differ(tmp_path, reference):
    same = write_log(tmp_path / "found.csv", [4.0, 3.0, 2.0])
    assert difference(reference, same, 3, ("loss", "grad_norm"))[0] == 0


def test_the_largest_difference_is_found_and_placed(tmp_path, reference):
    found = write_log(tmp_path / "found.csv", [4.0004, 3.003, 2.0])
    value, place = difference(reference, found, 3)
    assert value == pytest.approx(1e-3)
    assert place == "loss of step 2 is 3.003, expected 3.0"


def test_the_last_bit_counts(tmp_path, reference):
    found = write_log(tmp_path / "found.csv", [4.0, 3.0, math.nextafter(2.0, 3.0)])
    assert difference(reference, found, 3)[0] > 0


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([4.0, 3.0], "expected step 3, found no row"),
        ([4.0, 3.0, 2.0, 1.0], "expected no more than 3 steps, found 4"),
        ([4.0, (3, 2.0)], "expected step 2, found 3"),
        ([4.0, (1, 4.0), (2, 3.0), (3, 2.0)], "expected step 2, found 1"),
        ([4.0, math.nan, 2.0], "step 2, loss: expected a finite number, found 'nan'"),
        ([4.0, math.inf, 2.0], "step 2, loss: expected a finite number, found 'inf'"),
        ([4.0, 3.0, ""], "step 3, loss: expected a finite number, found ''"),
        ([], "expected step 1, found no row"),
    ],
)
def test_a_log_that_is_not_whole_fails(tmp_path, reference, losses, said):
    found = write_log(tmp_path / "found.csv", losses)
    for pair in ((reference, found), (found, reference)):
        with pytest.raises(Failed) as failure:
            difference(*pair, 3)
        assert said in str(failure.value)
        assert "found.csv" in str(failure.value)


def test_a_missing_column_or_file_fails(tmp_path, reference):
    short = write_log(tmp_path / "short.csv", [4.0, 3.0, 2.0], "step,nll,grad_norm")
    with pytest.raises(Failed, match="step 1, loss: expected a finite number, found None"):
        difference(reference, short, 3)
    with pytest.raises(Failed, match=r"cannot read .*gone\.csv: No such file"):
        difference(reference, tmp_path / "gone.csv", 3)


def test_files_are_compared_byte_for_byte(tmp_path):
    folders = [tmp_path / name for name in ("reference", "found")]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(Failed, match="expected the files"):
        gpu_check.compare_files(*folders, "*.safetensors")
    for folder in folders:
        (folder / "model.safetensors").write_bytes(b"weights")
    gpu_check.compare_files(*folders, "*.safetensors")
    (folders[1] / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(Failed, match=r"model\.safetensors differs"):
        gpu_check.compare_files(*folders, "*.safetensors")
    (folders[1] / "model.safetensors").write_bytes(b"weights")
    (folders[1] / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(Failed, match="expected the files"):
        gpu_check.compare_files(*folders, "*.safetensors")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session whose LibTorch and binary are only names."""
    libtorch = tmp_path / "torch"
    (libtorch / "lib").mkdir(parents=True)
    (libtorch / "lib" / "libtorch_cpu.so").touch()
    monkeypatch.setenv("LIBTORCH", str(libtorch))
    work = tmp_path / "work"
    work.mkdir()
    return gpu_session.Session(Path("/bin/true").resolve(), work, "cpu")


def test_a_gpus_ranks_find_nccl_and_are_hosts_of_their_own(session, tmp_path, monkeypatch):
    library = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    work = tmp_path / "gpu"
    work.mkdir()
    gpu = gpu_session.Session(Path("/usr/bin/env"), work, "cuda")
    folders = gpu.environment["LD_LIBRARY_PATH"].split(":")
    first = next(Path(folder) for folder in folders if Path(folder, "libnccl.so").exists())
    assert (first / "libnccl.so").resolve() == library
    assert str(library.parent) in folders
    seen = [
        subprocess.check_output(
            [gpu.rank], env=gpu.environment | {"OMPI_COMM_WORLD_RANK": rank}, text=True
        ).split("\n")
        for rank in "01"
    ]
    for rank, variables in enumerate(seen):
        assert f"NCCL_HOSTID=gpu-check-{rank}" in variables
        assert "CUDA_VISIBLE_DEVICES=3" in variables
        assert "NCCL_SOCKET_IFNAME=lo" in variables
        assert "NCCL_NET=Socket" in variables


def raises(error):
    def measure():
        raise error

    return measure


@pytest.mark.parametrize(
    ("measure", "bound", "result"),
    [
        (lambda: (1e-5, ""), 1e-5, "PASS"),
        (lambda: (1.1e-5, "loss of step 3"), 1e-5, "FAIL"),
        (lambda: (math.nan, ""), 1e-5, "FAIL"),
        (lambda: (1e-30, ""), 0, "FAIL"),
        (lambda: (123.0, ""), None, "PASS"),
        (raises(Failed("exit code 6")), 1e-5, "FAIL"),
        (raises(NotRun("no torch")), None, "NOT RUN"),
    ],
)
def test_a_check_is_judged_by_its_bound(session, measure, bound, result):
    assert Check("ranks", "losses", "", bound, measure).row(session).result == result


def test_a_check_that_cannot_be_made_is_not_passed(session):
    session.mpirun = None
    for options, reason in (({"gpu_only": True}, "needs a GPU"), ({"mpirun": True}, "no mpirun")):
        row = Check("ranks", "losses", "", 0, lambda: (0, ""), **options).row(session)
        assert (row.result, row.value) == ("NOT RUN", None)
        assert reason in row.note


def test_ranks_that_nccl_joined_are_counted_by_its_own_log(session):
    line = "vm:9:9 [0] NCCL INFO ncclCommInitRankConfig comm 0x5f rank {} nranks {} cudaDev 0 "
    line += "nvmlDev 0 busId 4000 commId 0x8a - Init {}\n"
    for rank, (size, state) in enumerate([(2, "COMPLETE"), (2, "START"), (4, "COMPLETE")]):
        log = session.work / "nccl" / f"run.{1000 + rank}"
        log.write_text("NCCL version 2.28.9\n" + line.format(rank, size, state))
    assert session.joined("run", 2) == 1
    assert session.joined("run", 4) == 1
    assert session.joined("other", 2) == 0


def test_a_command_past_its_time_fails_and_leaves_nothing_running(session):
    script = "echo begun; setsid sleep 120 & sleep 120"
    slow = session.start("slow", ["sh", "-c", script], session.environment)
    with pytest.raises(Failed, match="had not ended after 1 s") as failure, slow as job:
        while len(session.processes()) < 3:
            time.sleep(0.01)
        job.wait(1)
    assert session.processes() == []
    assert failure.value.job.last_lines() == ["begun"]


def test_used_up_time_fails_nothing(session):
    session.until = time.monotonic()
    check = Check("doctor", "alone", "", 0, lambda: gpu_check.Checks(session).doctor(0))
    row = check.row(session)
    assert row.result == "NOT RUN"
    assert "were used up" in row.note


@pytest.mark.parametrize(
    "wait", [lambda job: job.wait(60), lambda job: job.wait_for_step(Path("no.csv"), 1, 60)]
)
def test_a_check_that_the_end_of_the_time_cuts_off_has_not_failed(session, wait):
    session.until = time.monotonic() + 0.5
    with (
        pytest.raises(NotRun, match="were used up"),
        session.start("slow", ["sleep", "60"], session.environment) as job,
    ):
        wait(job)
    assert session.processes() == []


def test_a_broken_run_may_last_as_long_as_its_deadlines_allow():
    def seconds(path, name):
        found = re.search(
            rf"const {name}: Duration = Duration::from_secs\((\d+)\)", path.read_text()
        )
        return int(found[1])

    comm = ROOT / "src" / "comm"
    grace = seconds(comm / "nccl.rs", "GRACE") + seconds(comm / "mpi.rs", "ABORT_GRACE")
    assert gpu_check.DEADLINE_S + grace + 10 <= gpu_check.GONE_S


def test_a_failed_run_is_not_repeated(session):
    calls = []

    def measure():
        calls.append(1)
        raise Failed("exit code 5")

    for _ in range(2):
        with pytest.raises(Failed, match="exit code 5"):
            session.once("run", measure)
    assert len(calls) == 1


def test_pandas_reads_the_record(tmp_path):
    facts = {"date": "2026-01-31T12:00:00Z", "device": "cuda", "gpu": 'NVIDIA "H100", 80GB'}
    rows = [
        gpu_record.Row("ranks", "2 against 1", 3e-7, "relative", 1e-5, "PASS", 8.1, "a, b"),
        gpu_record.Row("speed", "mfu", None, "", None, "NOT RUN", 0.0, "leaves mfu empty"),
    ]
    path = tmp_path / "records" / "record.csv"
    gpu_record.write(path, facts, rows)
    read = pd.read_csv(path)
    assert read.gpu.tolist() == ['NVIDIA "H100", 80GB'] * 2
    assert read.result.tolist() == ["PASS", "NOT RUN"]
    assert read.value[0] == 3e-7
    assert math.isnan(read.value[1])
    name = gpu_record.default_path(Path("records"), facts).name
    assert name == "gpu-check-2026-01-31-nvidia-h100-80gb.csv"


def launch(*arguments, **environment):
    """Runs launch/gpu-check."""
    return subprocess.run(
        [ROOT / "launch/gpu-check", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(gpu_record.has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    result = launch()
    assert result.returncode == 2
    assert "has no NVIDIA GPU; --cpu" in result.stderr


def test_it_says_what_it_lacks(tmp_path):
    result = launch("--cpu", "/nonexistent/lockstep")
    assert result.returncode == 2
    assert "/nonexistent/lockstep is not there" in result.stderr
    result = launch("--cpu", "/bin/true", "--mpi", str(tmp_path))
    assert result.returncode == 2
    assert "expected a program bin/mpirun there" in result.stderr
    result = launch("--cpu", "/bin/true", LIBTORCH=str(tmp_path))
    assert result.returncode == 2
    assert "no lib/libtorch_cpu.so" in result.stderr
    result = launch("--cpu", "/bin/false", LIBTORCH=os.environ.get("LIBTORCH", ""))
    assert result.returncode == 2
    assert "cannot run" in result.stderr


@pytest.mark.parametrize("lacking", ["libtorch", "mpirun"])
def test_settings_of_another_machine_are_passed_over(tmp_path, lacking):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/gpu-check", tmp_path / "launch")
    (tmp_path / "analysis").symlink_to(ROOT / "analysis")
    libtorch = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
    libtorch.parent.mkdir(parents=True)
    libtorch.touch()
    named = tmp_path / "gone" if lacking == "libtorch" else libtorch.parents[1]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/lockstep.env").write_text(
        f"export LIBTORCH='{named}' OPAL_PREFIX='{tmp_path}'\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("LIBTORCH", "OPAL_PREFIX")}
    result = subprocess.run(
        [tmp_path / "launch/gpu-check", "--cpu", "/bin/false"],
        env=environment | {"LIBTORCH": str(libtorch.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "names libraries that are not here; going on without it" in result.stderr
    assert "cannot run" in result.stderr


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ended_by_a_signal_it_ends_what_it_started(tmp_path):
    stand_in = tmp_path / "lockstep"
    stand_in.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo lockstep 9; exit; fi\n'
        f'echo $$ >"{tmp_path}/pid"\n'
        "sleep 120\n"
    )
    stand_in.chmod(0o755)
    command = [ROOT / "launch/gpu-check", stand_in, "--cpu", "--only", "one-rank"]
    command += ["--out", tmp_path / "record.csv"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text().strip()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not is_running(int(pid.read_text()))


@pytest.fixture
def binary(capsys):
    """The real binary and an mpirun, or a skip that cannot be overlooked."""
    lacking = "mpirun" if gpu_session.find_mpirun(None) is None else None
    lacking = lacking if os.access(BINARY, os.X_OK) else str(BINARY)
    if lacking:
        with capsys.disabled():
            print(f"\nNOT RUN: launch/gpu-check --cpu: there is no {lacking}")
        pytest.skip(f"there is no {lacking}")
    return BINARY


def test_it_passes_on_cpu_ranks(binary, tmp_path):
    record = tmp_path / "record.csv"
    only = [word for name in ("resume", "devices", "one-rank") for word in ("--only", name)]
    result = launch(str(binary), "--cpu", *only, "--budget", "1800", "--out", str(record))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = pd.read_csv(record)
    expected = {"resume": "PASS", "devices": "NOT RUN", "one-rank": "PASS"}
    assert dict(zip(rows.check, rows.result, strict=True)) == expected
    assert (rows.device == "cpu").all()
    assert rows.lockstep[0].startswith("lockstep ")
    work = {path.name for path in Path("/tmp").glob("lockstep-gpu-check-*")}
    assert not any(name in result.stdout for name in work), "the folder of a good run was kept"


def test_ranks_that_learn_otherwise_fail(binary, tmp_path):
    """A program that has another seed when mpirun starts it."""
    wrong = tmp_path / "lockstep"
    wrong.write_text(
        "#!/bin/sh\n"
        'if [ -n "$OMPI_COMM_WORLD_RANK$PMI_RANK" ]; then set -- "$@" --set seed=8; fi\n'
        f'exec "{binary}" "$@"\n'
    )
    wrong.chmod(0o755)
    record = tmp_path / "record.csv"
    result = launch(str(wrong), "--cpu", "--only", "one-rank", "--out", str(record))
    assert result.returncode == 1, result.stdout + result.stderr
    row = pd.read_csv(record).iloc[0]
    assert row.result == "FAIL"
    assert 1e-4 < row.value < 1
    assert "loss of step" in row.note
    kept = Path(result.stdout.rsplit(" in ", 1)[1].strip())
    assert (kept / "logs").is_dir()
    shutil.rmtree(kept)
