"""The launch scripts, with stand-ins for the binary and for what a machine may lack."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Says what it was given. On USR1 it saves for longer than mpirun lets its ranks live after TERM.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time

out, words = os.environ["OUT"], sys.argv[1:]
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))
world_size = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))

def write(name, text):
    with open(f"{{out}}/{{name}}-{{rank}}", "w") as file:
        print(text, file=file)

def save(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(float(os.environ.get("SAVE_S", 1.5)))
    write("saved", "")
    # Together: mpirun ends the others once one has left with another code than 0.
    others = [f"{{out}}/saved-{{other}}" for other in range(world_size)]
    while not all(map(os.path.exists, others)):
        time.sleep(0.01)
    sys.exit(75)

write("arguments", " ".join(words))
write("threads", os.environ["OMP_NUM_THREADS"])
signal.signal(signal.SIGUSR1, save)
if words[0] == "exit":
    sys.exit(int(words[1]))
write("ready", os.getpid())
time.sleep(1000)
"""


@pytest.fixture
def ranks(tmp_path):
    """A folder that the stand-in for the binary writes to, and the environment that runs it."""
    binary = tmp_path / "lockstep"
    binary.write_text(STAND_IN)
    binary.chmod(0o755)
    environment = {**os.environ, "LOCKSTEP_BIN": str(binary), "OUT": str(tmp_path)}
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        environment.pop(name, None)
    return tmp_path, environment


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_two_ranks(ranks):
    """Starts two ranks through launch/local; returns it, and the ranks' process ids."""
    folder, environment = ranks
    local = subprocess.Popen(
        [ROOT / "launch/local", "2", "train"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background jobs ignore INT; their children inherit that, and bash keeps to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    ready = [folder / f"ready-{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text().strip() for path in ready))
    return local, [int(path.read_text()) for path in ready]


def rank(ranks, *arguments, **environment):
    folder, base = ranks
    subprocess.run(
        [ROOT / "launch/rank", "exit", "0", *arguments], env={**base, **environment}, check=True
    )
    return folder


def test_rank_hands_arguments_on_unchanged(ranks):
    folder = rank(ranks, "--prompt", "two words")
    assert (folder / "arguments-0").read_text() == "exit 0 --prompt two words\n"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, len(os.sched_getaffinity(0))),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 5),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, max(1, len(os.sched_getaffinity(0)) // 2)),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1000"}, 1),
    ],
)
def test_rank_takes_its_share_of_the_cores(ranks, environment, threads):
    folder = rank(ranks, **environment)
    assert (folder / "threads-0").read_text() == f"{threads}\n"


def test_rank_says_how_to_build_a_missing_binary(ranks):
    _, environment = ranks
    environment["LOCKSTEP_BIN"] = "/nonexistent/lockstep"
    result = subprocess.run(
        [ROOT / "launch/rank", "doctor"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "/nonexistent/lockstep is not there" in result.stderr
    assert "cargo build --release" in result.stderr


@pytest.mark.parametrize("code", [0, 3, 75])
def test_local_exits_with_the_code_of_the_ranks(ranks, code):
    folder, environment = ranks
    result = subprocess.run(
        [ROOT / "launch/local", "3", "exit", str(code)], env=environment, capture_output=True
    )
    assert result.returncode == code
    if code == 0:
        assert len(list(folder.glob("arguments-*"))) == 3


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "train"], ["train", "2"]])
def test_local_explains_its_arguments(arguments):
    result = subprocess.run(
        [ROOT / "launch/local", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "launch/local 2 train" in result.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_local_lets_the_ranks_save_before_they_stop(ranks, stop):
    local, pids = start_two_ranks(ranks)
    # The whole process group, as a terminal's Ctrl-C or `timeout` does it.
    os.killpg(local.pid, stop)
    assert local.wait(timeout=300) == 75
    folder, _ = ranks
    assert (folder / "saved-0").exists()
    assert (folder / "saved-1").exists()
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_second_signal_ends_the_ranks_at_once(ranks):
    ranks[1]["SAVE_S"] = "1000"
    local, pids = start_two_ranks(ranks)
    os.kill(local.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(local.pid, signal.SIGTERM)
    assert local.wait(timeout=300) == 143
    wait_until(lambda: not any(map(is_running, pids)))
    folder, _ = ranks
    assert not list(folder.glob("saved-*"))


# What the job scripts ask of Slurm; `srun` starts what it is given after its own options.
SLURM = {
    "srun": """#!/bin/bash
if [[ $* == --mpi=list ]]; then echo pmix; exit; fi
while [[ $1 == --* ]]; do shift; done
printf 'begun\\n' >"${LOCKSTEP_BEGAN:-/dev/null}"
exec "$@"
""",
    "scontrol": "#!/bin/bash\nexit ${SCONTROL:-0}\n",
}


def in_a_job(folder, commands, **environment):
    """What bash says to commands in a job script, after its preparations."""
    for name, text in SLURM.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = f"set -euo pipefail\nroot='{folder}' nodes=1 per_node=1 cpus=1\n"
    script += f". '{ROOT}/slurm/job.sh'\n{commands}\n"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_a_request_to_stop_between_two_starts_of_a_job(tmp_path):
    (tmp_path / "launch").mkdir()
    rank = tmp_path / "launch/rank"
    rank.write_text("#!/bin/bash\nexit 6\n")
    rank.chmod(0o755)
    commands = 'start 1 train; echo "$code"; kill -USR1 $$; start 1 train; echo "$code"'
    done = in_a_job(tmp_path, commands)
    assert (done.returncode, done.stdout) == (0, "6\n75\n"), done.stderr


def test_a_job_queued_again_starts_though_slurm_does_not_answer(tmp_path):
    commands = 'choose_launcher 1; echo "${launcher[@]}"'
    done = in_a_job(tmp_path, commands, SLURM_RESTART_COUNT="1", SCONTROL="1")
    assert done.returncode == 0, done.stderr
    assert "--mpi=pmix" in done.stdout


LAID_OUT = 'lay_out; choose_launcher "$ranks"; echo "$ranks in $per_node:" "${launcher[@]}"'


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # --gpus-per-node, --gres
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "h100:4"}, "8 in 4:"),
        # --gpus, over all nodes
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "8"}, "8 in 4:"),
        # --ntasks=8 --gpus-per-task=1
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}
            | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"},
            "8 in 4:",
        ),
    ],
)
def test_every_rank_of_a_job_sees_all_gpus_of_its_node(tmp_path, asked, expected):
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "16(x2)", **asked}
    done = in_a_job(tmp_path, LAID_OUT, **job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected), done.stdout
    assert "--gpu-bind=none" in done.stdout.split()
    # mpirun starts its ranks from a step of its own.
    (tmp_path / "none").mkdir()
    script(tmp_path / "none", "mpirun", "exit 0")
    commands = f'srun() {{ :; }}; {LAID_OUT} "${{SLURM_GPU_BIND-}},${{SLURM_GPUS_PER_TASK-}}"'
    done = in_a_job(tmp_path, commands, MPICC=str(tmp_path / "none/mpicc"), **job)
    assert done.returncode == 0, done.stderr
    assert "/mpirun -n 8" in done.stdout and done.stdout.endswith(" none,\n"), done.stdout


def test_a_job_without_gpus_or_with_uneven_ones(tmp_path):
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "16(x2)"}
    done = in_a_job(tmp_path, LAID_OUT, **job)
    assert done.stdout.startswith("2 in 1:") and "--gpu-bind" not in done.stdout, done.stdout
    done = in_a_job(tmp_path, LAID_OUT, **job, SLURM_GPUS="5", SLURM_GPUS_ON_NODE="3")
    assert done.returncode == 2
    assert "5 GPUs" in done.stderr and "--gpus-per-node" in done.stderr
    # All of a node's GPUs are an exclusive job's, but its steps get what was asked for.
    job["SLURM_JOB_NUM_NODES"] = "1"
    done = in_a_job(tmp_path, LAID_OUT, **job, SLURM_GPUS="h100:2", SLURM_GPUS_ON_NODE="4")
    assert done.stdout.startswith("2 in 2:"), done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_ranks_do_not_outlive_a_killed_local(ranks):
    local, pids = start_two_ranks(ranks)
    local.kill()
    local.wait()
    wait_until(lambda: not any(map(is_running, pids)))


# launch/setup on machines that lack something: a clone in a temporary folder, and a PATH that has
# only the tools named here.
TOOLS = ["awk", "bash", "cat", "cut", "df", "dirname", "du", "env", "grep", "head", "ln", "ls"]
TOOLS += ["mkdir", "realpath", "rm", "rmdir", "sed", "sort", "tail"]
BUILD_TOOLS = ["c++", "cc", "cargo", "rustc", "as", "ld"]


@pytest.fixture
def bare(tmp_path):
    """A clone without a virtual environment, and a machine with nothing but a shell's tools."""
    clone = tmp_path / "clone"
    (clone / "analysis").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", clone / "launch")
    shutil.copy(ROOT / "analysis/requirements.txt", clone / "analysis")
    shutil.copy(ROOT / "Cargo.toml", clone)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in TOOLS:
        give(bin_folder, name)
    return clone, bin_folder


def give(bin_folder, *names):
    for name in names:
        # Not a link: some programs look at the path that they were called by.
        real = sys.executable if name == "python3" else shutil.which(name)
        script(bin_folder, name, f'exec {real} "$@"')


def script(bin_folder, name, body):
    path = bin_folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def setup(bare, *arguments, **environment):
    """Runs launch/setup, which must fail; returns the reason, which must be one line."""
    return setup_says(bare, *arguments, **environment).stderr


def setup_says(bare, *arguments, **environment):
    clone, bin_folder = bare
    kept = {name: os.environ[name] for name in ("HOME", "RUSTUP_HOME") if name in os.environ}
    result = subprocess.run(
        [clone / "launch/setup", *arguments],
        env={**kept, "PATH": str(bin_folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result


def test_setup_without_a_compiler(bare):
    message = setup(bare)
    assert "no C++ compiler" in message
    assert "apt install g++" in message


def test_setup_with_a_compiler_that_cannot_compile(bare):
    _, bin_folder = bare
    give(bin_folder, "cc")
    script(bin_folder, "c++", "exit 1")
    assert "cannot compile C++17" in setup(bare)


def test_setup_without_rust(bare):
    _, bin_folder = bare
    give(bin_folder, "c++", "cc", "as", "ld")
    assert "https://rustup.rs" in setup(bare)


def test_setup_with_an_old_rust(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS)
    script(bin_folder, "rustc", "echo 'rustc 1.70.0 (abc 2023-06-01)'")
    message = setup(bare)
    assert "Rust 1.70.0 is too old" in message
    assert "rustup update" in message


def test_setup_without_python(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS)
    assert "no Python on PATH" in setup(bare)


def test_setup_with_an_old_python(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS)
    script(bin_folder, "python3", '[[ $1 == --version ]] && echo "Python 3.6.8"')
    assert "Python 3.6.8 on PATH, 3.9 or newer is needed" in setup(bare)


def test_setup_with_a_python_that_cannot_make_environments(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS)
    script(bin_folder, "python3", "[[ $* != *ensurepip* ]]")
    assert "python3-venv" in setup(bare)


def test_setup_with_a_full_disk(bare):
    clone, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS, "python3")
    script(
        bin_folder,
        "df",
        "echo 'Filesystem 1M-blocks Used Available Capacity Mounted on'; echo 'd 9 9 123 99% /'",
    )
    message = setup(bare)
    assert f"{clone}/.venv has 123 MB free" in message
    assert "--prefix" in message


def test_setup_without_a_network(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS, "python3")
    # A port that nobody listens on.
    proxy = "http://127.0.0.1:9"
    message = setup(bare, HTTPS_PROXY=proxy, HTTP_PROXY=proxy)
    assert "cannot download Python packages; check the network" in message


def test_setup_spares_a_folder_of_other_things(bare, tmp_path):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS, "python3")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert "holds other things" in setup(bare, "--prefix", str(other))
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_setup_with_a_wrong_libtorch(bare):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS, "python3")
    message = setup(bare, LIBTORCH="/nonexistent")
    assert "LIBTORCH names /nonexistent" in message


@pytest.mark.parametrize("version", ["570.86.15", "580.65.06"])
def test_setup_warns_of_an_old_driver(bare, version):
    _, bin_folder = bare
    give(bin_folder, *BUILD_TOOLS)
    script(bin_folder, "nvidia-smi", f"echo {version}")
    # A machine with a GPU gets CUDA by itself; without Python the set-up ends there.
    said = setup_says(bare).stdout
    warning = "warning: the NVIDIA driver of this machine is 570.86.15, CUDA 13 needs 580 or newer"
    assert (warning in said) == version.startswith("570"), said
    assert "driver" not in setup_says(bare, "--cpu").stdout


def test_setup_with_an_unknown_argument(bare):
    assert "unknown argument --gpu" in setup(bare, "--gpu")
