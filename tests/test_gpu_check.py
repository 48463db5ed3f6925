"""launch/gpu-check: it finds what is wrong, leaves nothing running, and passes on CPU ranks."""

import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import yaml

import gpu_check
import gpu_driver
import gpu_record
import gpu_session
import gpu_speed
from gpu_check import Check, difference
from outcomes import Failed, NotRun
from processes import Processes, until

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("LOCKSTEP_BIN") or ROOT / "target" / "release" / "lockstep")
SECONDS = 300  # for what takes only a moment on an idle machine; this one may be busy


def write_log(path, losses, header="step,loss,grad_norm"):
    """A train.csv with these losses; each loss can be given together with its step."""
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


@pytest.fixture
def open_session(session, tmp_path):
    """Makes sessions like `session`."""

    def make(binary, device="cpu", mpi=None):
        work = Path(tempfile.mkdtemp(dir=tmp_path))
        return gpu_session.Session(Path(binary).resolve(), work, device, mpi)

    return make


@pytest.fixture
def nccl(tmp_path):
    """NCCL beside LibTorch, as in NVIDIA's wheel."""
    library = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    return library


@pytest.mark.parametrize("given", [None, "/user/one:/user/two"])
def test_the_binary_runs_with_the_users_library_path(open_session, nccl, monkeypatch, given):
    if given:
        monkeypatch.setenv("LD_LIBRARY_PATH", given)
    else:
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    session = open_session("/bin/true")
    link = session.work / "lib"
    assert (link / "libnccl.so").resolve() == nccl
    # The user's folders come first. NVIDIA's are not added: they could hide a missing library.
    assert session.bare["LD_LIBRARY_PATH"] == (f"{given}:{link}" if given else str(link))
    (session.libtorch / "lib" / "libnccl.so").symlink_to(nccl)
    session = open_session("/bin/true")
    for variables in (session.bare, session.environment):
        assert variables.get("LD_LIBRARY_PATH") == given
    assert not session.added


def test_a_job_around_it_is_forgotten(open_session, monkeypatch):
    for name in ("SLURM_JOB_ID", "PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "0")
    kept = {"OMPI_MCA_btl": "self,sm", "PMIX_MCA_gds": "hash"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    seen = open_session("/bin/true").bare
    assert not [name for name in seen if gpu_session.JOB.match(name)]
    assert kept.items() <= seen.items()


def compile_c(path, source, *options):
    path.with_suffix(".c").write_text(source)
    subprocess.run(["cc", path.with_suffix(".c"), "-o", path, *options], check=True)
    return path


def test_a_binary_that_was_moved_finds_libtorch_and_mpi(open_session, tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/user")
    mpi, libtorch = tmp_path / "mpi", tmp_path / "torch" / "lib"
    for folder in ("bin", "lib"):
        (mpi / folder).mkdir(parents=True)
    (mpi / "bin" / "mpirun").write_text("#!/bin/sh\necho mpirun 9\n")
    (mpi / "bin" / "mpirun").chmod(0o755)
    linked = []
    for library in (libtorch / "libtorch_cpu.so", mpi / "lib" / "libmpi.so.40"):
        compile_c(library, "", "-shared", f"-Wl,-soname,{library.name}")
        linked.append(library)
    linked.append("-Wl,--no-as-needed")
    main = "int main(void) { return 0; }"
    moved = compile_c(tmp_path / "moved", main, *reversed(linked))
    expected = f"/user:{mpi}/lib:{libtorch}"
    assert set(open_session(moved, mpi=mpi).bare["LD_LIBRARY_PATH"].split(":")) == set(
        expected.split(":")
    )
    paths = [f"-Wl,-rpath,{folder}" for folder in (libtorch, mpi / "lib")]
    at_home = compile_c(tmp_path / "at_home", main, *reversed(linked), *paths)
    assert open_session(at_home, mpi=mpi).bare["LD_LIBRARY_PATH"] == "/user"


def test_a_gpus_ranks_are_hosts_of_their_own(open_session, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    gpu = open_session("/usr/bin/env", "cuda")
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
    script = "echo begun; setsid sleep 1000 & sleep 1000"
    slow = session.start("slow", ["sh", "-c", script], session.environment)
    with pytest.raises(Failed, match="had not ended after 1 s") as failure, slow as job:
        assert until(lambda: len(session.processes.living()) == 3, SECONDS)
        job.wait(1)
    assert session.processes.living() == []
    assert failure.value.job.last_lines() == ["begun"]


def test_after_a_run_that_hung_no_larger_one_is_tried(session, monkeypatch):
    session.mpirun = Path("/bin/false")
    hangs = session.start("hangs", ["sleep", "1000"], session.environment)
    monkeypatch.setattr(session, "lockstep", lambda *_: hangs)
    monkeypatch.setattr(gpu_session, "RUN_S", 0.2)
    with pytest.raises(Failed, match=r"had not ended after"):
        session.train("hangs", {}, 2, config="config.yaml")
    monkeypatch.undo()
    for ranks in (2, 4):
        with pytest.raises(NotRun, match="the run hangs had hung"):
            session.lockstep("next", [], ranks)
    for ranks in (0, 1):
        with session.lockstep("next", [], ranks) as job:
            job.wait(60)


def test_what_matters_most_comes_first(session):
    plan = list(gpu_check.Checks(session).plan())
    groups = list(dict.fromkeys(check.group for check in plan))
    assert groups == list(gpu_check.GROUPS)
    names = [check.what for check in plan]
    assert "bf16" in names[0]
    two, four = (
        [at for at, name in enumerate(names) if re.match(f"{n} (against|ranks)", name)]
        for n in (2, 4)
    )
    assert len(two) == len(four) > 1
    speed = [at for at, check in enumerate(plan) if check.group == "speed"]
    assert max(two) < min(speed) < max(speed) < min(four)


def test_sums_that_are_held_to_a_last_digit_have_an_order_on_a_gpu(open_session, monkeypatch):
    checks = gpu_check.Checks(open_session("/bin/true", "cuda"))
    asked = []

    def train(name, settings, ranks=0):
        asked.append(settings)
        raise NotRun("only asked")

    monkeypatch.setattr(checks.session, "train", train)
    for check in checks.plan():
        if check.group in ("one-rank", "ranks", "resume"):
            with pytest.raises(NotRun, match="only asked"):
                check.measure()
    assert asked
    assert all(settings["deterministic"] == "true" for settings in asked)


def test_the_homework_is_timed_as_its_configuration_says():
    written = yaml.safe_load((ROOT / "configs/homework.yaml").read_text())
    shapes = [*gpu_speed.shapes(gpu=True), *gpu_speed.bench_shapes(gpu=True)]
    timed = [shape.values for shape in shapes if shape.name.startswith("homework")]
    assert [values.pop("precision") for values in timed] == ["fp32", "fp32", "bf16"]
    for values in timed:
        for name in ("model", "optim"):
            assert values[name] == written[name]
        assert values["data"] == {k: v for k, v in written["data"].items() if k != "dir"} | {
            "micro_batch": 256
        }
        assert values["train"]["loss"] == written["train"]["loss"]
    assert written.get("precision", "fp32") == "fp32"


def test_the_bench_times_gpt2_first_as_its_configuration_says(session):
    written = yaml.safe_load((ROOT / "configs/gpt2-124m.yaml").read_text())
    shape = next(gpu_speed.bench_shapes(gpu=True))
    assert shape.values["precision"] == written["precision"]
    assert shape.values["model"]["preset"] == written["model"]["preset"]
    assert shape.values["data"] == {k: v for k, v in written["data"].items() if k != "dir"}
    plan = list(gpu_check.Checks(session, bench=True).plan())
    assert {check.group for check in plan} == {"speed"}


def test_the_data_sheets_share_is_mfus_by_what_the_program_says(tmp_path, monkeypatch):
    log = tmp_path / "logs" / "gpt2-lockstep.log"
    log.parent.mkdir()
    speed = gpu_speed.Speed(types.SimpleNamespace(device="cuda", work=tmp_path))
    monkeypatch.setattr(speed, "median", lambda shape, program, column: (0.5, column))
    shape = next(gpu_speed.shapes(gpu=True))
    said = "NVIDIA H200 multiplies large matrices at 740 TFLOP/s, 74.8 % of its data sheet's 989;"
    log.write_text(f"INFO {said} mfu is a share of the former\n")
    assert speed.share(shape) == (pytest.approx(0.374), "mfu")
    log.write_text("INFO step 1/20\n")
    with pytest.raises(NotRun, match="data sheet"):
        speed.share(shape)


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
        session.start("slow", ["sleep", "1000"], session.environment) as job,
    ):
        wait(job)
    assert session.processes.living() == []


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
    assert "has no NVIDIA GPU that can be used: its driver" in result.stderr
    assert "--cpu" in result.stderr


DRIVER = """\
#include <stdlib.h>
#include <string.h>
static int gpus(void) { const char *n = getenv("TEST_GPUS"); return n ? atoi(n) : 1; }
int cuInit(unsigned flags) {
  if (getenv("TEST_CRASH")) abort();
  return gpus() < 0 ? 803 : flags;
}
int cuDeviceGetCount(int *n) { *n = gpus(); return 0; }
int cuDeviceGet(int *device, int n) { *device = n; return 0; }
int cuDeviceGetName(char *name, int n, int device) {
  strncpy(name, "Emulated GPU", n);
  return device;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 5ull << 30; return device; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
"""


@pytest.fixture
def driver(tmp_path):
    """The folder of a driver library that reports an emulated GPU."""
    folder = tmp_path / "driver"
    folder.mkdir()
    compile_c(folder / "libcuda.so.1", DRIVER, "-shared", "-fPIC")
    return str(folder)


def test_the_driver_itself_is_asked_for_the_gpu(driver):
    found = gpu_driver.find_gpu({"LD_LIBRARY_PATH": driver})
    assert found == gpu_driver.Gpu("Emulated GPU", 5120, "13.0")
    assert found.emulated
    for variables, said in (
        ({"TEST_GPUS": "0"}, "shows no device"),
        ({"TEST_GPUS": "-1"}, "says CUDA error 803 (cuInit)"),
        ({"TEST_CRASH": "1"}, "ended with exit code -6"),
    ):
        assert said in gpu_driver.find_gpu({"LD_LIBRARY_PATH": driver} | variables).problem


def stand_in(path, then):
    """A program in place of lockstep that runs `then` when asked to train."""
    path.write_text(f"#!/bin/sh\ncase $1 in\n-V) echo lockstep 9 ;;\ntrain) {then} ;;\nesac\n")
    path.chmod(0o755)
    return path


def test_an_emulated_gpu_has_no_speed_and_bears_its_name(driver, tmp_path):
    record = tmp_path / "record.csv"
    binary = stand_in(tmp_path / "lockstep", "exit 3")
    arguments = ("--only", "speed", "--only", "first", "--out", record)
    result = launch(binary, *arguments, LD_LIBRARY_PATH=driver)
    assert result.returncode == 1, result.stdout + result.stderr
    rows = pd.read_csv(record)
    assert (rows.gpu == "Emulated GPU").all()
    assert (rows.driver == "CUDA 13.0").all()
    speed = rows[rows.check == "speed"]
    assert len(speed) > 10
    assert (speed.result == "NOT RUN").all()
    assert speed.value.isna().all()
    assert speed.note.str.contains("an emulated GPU mean nothing").all()
    assert (rows[rows.check == "first"].result == "FAIL").all()
    shutil.rmtree(result.stdout.rsplit(" in ", 1)[1].strip())


def test_the_first_check_is_a_run_as_a_user_starts_it(tmp_path, monkeypatch):
    record, seen = tmp_path / "record.csv", tmp_path / "seen"
    says = "echo 'loading'; echo 'lockstep: no builtins'; echo 'try this'"
    binary = stand_in(tmp_path / "lockstep", f'env >"{seen}"; ({says}) >&2; exit 1')
    monkeypatch.setenv("LD_LIBRARY_PATH", "/user")
    result = launch(binary, "--cpu", "--only", "first", "--out", record)
    assert result.returncode == 1
    # Its whole log is shown, and its error is in the record.
    assert "  | loading\n  | lockstep: no builtins\n  | try this\n" in result.stdout
    rows = pd.read_csv(record)
    assert rows.note.tolist() == ["it ended with exit code 1: lockstep: no builtins"] * 2
    variables = seen.read_text().splitlines()
    assert "LD_LIBRARY_PATH=/user" in variables
    assert not any(line.startswith(("NCCL_", "OMP_WAIT", "OMPI_ALLOW")) for line in variables)
    shutil.rmtree(result.stdout.rsplit(" in ", 1)[1].strip())


def test_it_says_what_it_lacks(tmp_path):
    result = launch("--cpu", "/nonexistent/lockstep")
    assert result.returncode == 2
    assert "/nonexistent/lockstep is not there" in result.stderr
    result = launch("--cpu", "/bin/true", "--mpi", str(tmp_path))
    assert result.returncode == 2
    assert "expected a program bin/mpirun there" in result.stderr
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").symlink_to("/bin/false")
    result = launch("--cpu", "/bin/true", "--mpi", str(tmp_path))
    assert result.returncode == 2
    assert "--version` fails; is this MPI whole?" in result.stderr
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
    (tmp_path / "checks").symlink_to(ROOT / "checks")
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_by_a_signal_it_leaves_a_record_and_nothing_that_runs(tmp_path, number):
    hanging, record = tmp_path / "hanging", tmp_path / "record.csv"
    processes = Processes("LOCKSTEP_TEST")
    # The first run ends, the second never does. Its child has its own session, like a rank.
    hang = f'setsid sleep 1000 & >"{hanging}"; wait'
    binary = stand_in(
        tmp_path / "lockstep", f"case $* in *dropout=0.1*) {hang} ;; *) exit 1 ;; esac"
    )
    command = [ROOT / "launch/gpu-check", binary, "--cpu", "--out", record]
    command += ["--only", "first", "--only", "one-rank"]
    environment = os.environ | {"TMPDIR": str(tmp_path)} | processes.mark
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert until(hanging.exists, SECONDS, process)
        process.send_signal(number)
        said = process.communicate(timeout=SECONDS)[0]
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert killed or f"written to {record}" in said
    rows = pd.read_csv(record)
    assert rows.result.tolist() == ["FAIL", "NOT RUN", "NOT RUN"]
    ends = ["it ended with exit code 1", "while it was under way", "before its turn"]
    assert all(said in note for said, note in zip(ends, rows.note, strict=True))
    assert until(lambda: not processes.living(), SECONDS)


@pytest.fixture
def binary(capsys):
    """The real binary and an mpirun, or a skip that is hard to overlook."""
    lacking = "mpirun" if gpu_session.find_mpirun(None) is None else None
    lacking = lacking if os.access(BINARY, os.X_OK) else str(BINARY)
    if lacking:
        with capsys.disabled():
            print(f"\nNOT RUN: launch/gpu-check --cpu: there is no {lacking}")
        pytest.skip(f"there is no {lacking}")
    return BINARY


@pytest.mark.full
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


@pytest.mark.full
def test_ranks_that_learn_otherwise_fail(binary, tmp_path):
    """A program that uses a different seed when mpirun starts it."""
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
