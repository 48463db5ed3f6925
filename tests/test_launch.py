"""The launch scripts, with stand-ins for the binary and for tools that a machine may lack."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Prints its arguments. On USR1 it saves for longer than mpirun lets its ranks live after TERM.
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
    """A folder that the binary's stand-in writes to, and the environment to run it in."""
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


def start_two_ranks(ranks, stderr=subprocess.DEVNULL):
    """Starts two ranks through launch/local; returns its process and the ranks' process ids."""
    folder, environment = ranks
    local = subprocess.Popen(
        [ROOT / "launch/local", "2", "train"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore INT. Their children inherit that, and bash keeps it.
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


def test_rank_does_not_ask_pmix_for_what_it_may_lack(tmp_path):
    script(tmp_path, "binary", 'echo "${PMIX_MCA_psec-}"')
    usual = {**os.environ, "LOCKSTEP_BIN": str(tmp_path / "binary")}
    for variables, expected in [
        ({"PMIX_SECURITY_MODE": "munge,native"}, "native"),
        ({"PMIX_SECURITY_MODE": "munge"}, ""),
        ({}, ""),
        ({"PMIX_SECURITY_MODE": "munge,native", "PMIX_MCA_psec": "munge"}, "munge"),
    ]:
        said = subprocess.check_output(
            [ROOT / "launch/rank"], env={**usual, **variables}, text=True
        )
        assert said == f"{expected}\n"


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
    # The whole process group, like a terminal's Ctrl-C or `timeout`.
    os.killpg(local.pid, stop)
    assert local.wait(timeout=300) == 75
    folder, _ = ranks
    assert (folder / "saved-0").exists()
    assert (folder / "saved-1").exists()
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_second_signal_ends_the_ranks_at_once(ranks):
    ranks[1]["SAVE_S"] = "1000"
    local, pids = start_two_ranks(ranks, subprocess.PIPE)
    os.kill(local.pid, signal.SIGTERM)
    assert local.stderr.readline().startswith("local: asking the ranks to save and stop")
    os.kill(local.pid, signal.SIGTERM)
    assert local.wait(timeout=300) == 143
    wait_until(lambda: not any(map(is_running, pids)))
    folder, _ = ranks
    assert not list(folder.glob("saved-*"))


def local_says(folder, ranks, body):
    """The exit code and stderr of launch/local with a shell script in place of the binary."""
    script(folder, "stand-in", f"rank=$OMPI_COMM_WORLD_RANK\n{body}")
    environment = {**os.environ, "LOCKSTEP_BIN": str(folder / "stand-in")}
    done = subprocess.run(
        [ROOT / "launch/local", str(ranks), "train"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def together(folder, ranks):
    """Holds each rank until all have arrived: mpirun ends the others once one has exited."""
    there = " && ".join(f"-e {folder}/{rank}" for rank in range(ranks))
    return f"touch {folder}/$rank; until [[ {there} ]]; do sleep 0.05; done"


def test_ranks_that_end_for_the_same_reason_say_it_once_and_last(tmp_path):
    body = f"""
echo "lockstep: rank $rank: no space left" >&2
echo "12:00:00Z  INFO rank $rank works" >&2
{together(tmp_path, 3)}
exit 4
"""
    code, said = local_says(tmp_path, 3, body)
    lines = said.splitlines()
    assert (code, lines[-1]) == (4, "lockstep: ranks 0, 1, 2: no space left")
    assert sorted(lines[:-1]) == [f"12:00:00Z  INFO rank {rank} works" for rank in range(3)]
    # Messages from before they know their rank.
    body = f"echo 'lockstep: no such file' >&2; {together(tmp_path, 3)}; exit 2"
    assert local_says(tmp_path, 3, body) == (2, "lockstep: no such file\n")


def test_ranks_with_reasons_of_their_own_all_say_them_in_their_order(tmp_path):
    # One process prints them all: messages from several would reach mpirun in any order.
    said = ["rank 9: the disk is full", "rank 1: rank 9 is lost", "rank 10: rank 9 is lost"]
    body = "".join(f"echo 'lockstep: {words}' >&2\n" for words in said)
    expected = "lockstep: rank 9: the disk is full\nlockstep: ranks 1, 10: rank 9 is lost\n"
    assert local_says(tmp_path, 1, f"{body}exit 3") == (3, expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[[ $rank == 0 ]] || kill -SEGV $$; sleep 1000", "signal 11"),
        ("exit 9", "non-zero status"),
    ],
)
def test_what_ranks_do_not_explain_themselves_is_not_hidden(tmp_path, body, words):
    code, said = local_says(tmp_path, 2, body)
    assert code != 0
    assert words in said


def test_local_ends_though_nobody_reads_what_it_says(ranks):
    """Neither a pipe whose reader is gone nor a full one that nobody reads can block it."""
    _, environment = ranks
    reader, writer = os.pipe()
    os.close(reader)
    command = [ROOT / "launch/local", "2", "exit", "3"]
    assert subprocess.run(command, env=environment, stderr=writer).returncode == 3
    os.close(writer)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(1 << 12))
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    assert subprocess.run(command, env=environment, stderr=writer).returncode == 3


# Stand-ins for the Slurm commands of the job scripts. `srun` notes how it was called, and starts
# what follows its own options unless it is told to refuse, or a node is silent.
SLURM = {
    "srun": """
echo "srun $*" >>"${CALLS:-/dev/null}"
case " $* " in
  *' --mpi=list '*) echo pmix; exit ;;
  *' --nodes=1 '*' true '*) exit 0 ;;
  *' true '*) exit "${SILENT_NODE:-0}" ;;
esac
while [[ $1 == --* ]]; do shift; done
if [[ -n ${REFUSES:-} ]]; then echo "srun: fatal: $REFUSES" >&2; exit 1; fi
if [[ -w ${LOCKSTEP_BEGAN:-} ]]; then echo begun >"$LOCKSTEP_BEGAN"; fi
exec "$@"
""",
    "scontrol": """
echo "scontrol $*" >>"${CALLS:-/dev/null}"
case $* in
  *'--oneliner job'*) printf '%s\\n' "${RECORD:-}" ;;
  'show job'*) printf '   Command=%s\\n' "${COMMAND:-(null)}" ;;
  'show config') echo 'SlurmdTimeout = 300 sec' ;;
esac
exit "${SCONTROL:-0}"
""",
    "sinfo": 'echo "${NODES:-allocated}"',
    "sleep": 'echo "sleep $*" >>"${CALLS:-/dev/null}"',
}


def clone_with_a_build(folder):
    """Makes a clone with this one's build; returns an environment in which cargo does nothing."""
    for name in ("launch", "configs", "analysis"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".venv", "target"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "Cargo.toml", folder)
    (folder / "tools").mkdir()
    script(folder / "tools", "cargo", "")
    return os.environ | {"PATH": f"{folder}/tools:{os.environ['PATH']}"}


def test_the_quickstart_shows_learning_and_resuming(tmp_path):
    environment = clone_with_a_build(tmp_path)
    command = [tmp_path / "launch/quickstart"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "yes: all weights have the same bits" in said.stdout
    assert "yes: so have loss and gradient norm of each of the 400 steps" in said.stdout
    # Each prompt's first line stands beside itself: what the model knew after 1, 200 and 400 steps.
    assert any(line.count(" One day") == 3 for line in said.stdout.splitlines()), said.stdout
    assert (tmp_path / "runs/sample/plots/loss.png").exists()

    # Asked again, it trains nothing, and still shows it all.
    rows = (tmp_path / "runs/sample-stopped/train.csv").read_bytes()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "It goes on" not in again.stdout and "same bits" in again.stdout
    assert (tmp_path / "runs/sample-stopped/train.csv").read_bytes() == rows


@pytest.mark.full
def test_the_homework_is_done_in_one_command_and_goes_on_if_it_is_stopped(tmp_path):
    """A rehearsal on the sample, with a small batch."""
    environment = clone_with_a_build(tmp_path)
    command = [tmp_path / "launch/homework", "--minutes", "0.1", "--source", "sample"]
    command += ["--set", "data.batch_size=8"]
    out = tmp_path / "runs/rehearsal"
    rows = out / "gpt-nano/train.csv"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    wait_until(lambda: first.poll() is not None or (rows.exists() and rows.stat().st_size > 400))
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate()
    assert first.returncode in (0, 75), said
    measured = (out / "compare.csv").read_text()
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, **pipes)
    assert done.returncode == 0, done.stdout
    # What was done is not done again.
    assert (out / "compare.csv").read_text() == measured
    assert "data is there already, with the text of sample" in done.stdout
    other = subprocess.run([*command, "--source", "b.txt"], cwd=tmp_path, env=environment, **pipes)
    assert other.returncode == 2 and "has the text of sample, not of b.txt" in other.stdout

    step_ms = float(measured.splitlines()[1].split(",")[4])
    steps = max(1, int(0.1 * 60_000 / step_ms / 4)) * 4
    assert f"{steps} steps fit into 0.1 minutes" in done.stdout
    numbers = [int(line.split(",")[0]) for line in rows.read_text().splitlines()[1:]]
    assert numbers == list(range(1, steps + 1))

    # The tokens that the first merges leave are those that the program itself makes.
    tokenize = [ROOT / "target/release/lockstep", "tokenize", "--tokenizer"]
    tokenize += [out / "tokenizer/tokenizer.json", out / "sentences/train.txt"]
    ids = subprocess.check_output(tokenize, text=True).splitlines()[0].split()
    last = next(line for line in done.stdout.splitlines() if line.startswith("32 "))
    assert last.split()[-1] == str(len(ids))

    page = (out / "homework.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for prompt in ("The best perks of", "It is a truth", "The best way to", "According to the"):
        assert f"<pre> {prompt}" in page and prompt in done.stdout
    assert '<th scope="row">CPU</th>' in page
    assert f"{steps:,} steps are what fits" in page and "not comparable" in page
    assert "data.batch_size is 8, not 256" in page
    if not Path("/dev/nvidiactl").exists():
        assert "There is no GPU here" in done.stdout
        assert '<th scope="row">GPU</th><td>not measured</td>' in page


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes"], ["--minute", "5"]])
def test_the_homework_explains_its_arguments(wrong):
    done = subprocess.run([ROOT / "launch/homework", *wrong], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--minute" in done.stderr


def in_a_job(folder, commands, **environment):
    """Runs commands in bash as in a job script, after its preparations."""
    for name, text in SLURM.items():
        script(folder, name, text)
    (folder / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch/words.sh", folder / "launch")
    text = f"set -euo pipefail\nroot='{folder}' nodes=1 per_node=1 cpus=1\n"
    text += f". '{ROOT}/slurm/job.sh'\n{commands}\n"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)


def job(folder, script_of, *arguments, clone=True, **environment):
    """Runs a job script as Slurm does: a copy in another folder, on nodes that do not exist.

    Returns how it ended, and the calls of Slurm's commands.
    """
    spool, tree, bin_folder = (folder / name for name in ("spool", "clone", "bin"))
    for path in (spool, tree / "launch", tree / ".venv", bin_folder):
        path.mkdir(parents=True, exist_ok=True)
    for name, text in SLURM.items():
        script(bin_folder, name, text)
    shutil.copytree(ROOT / "slurm", tree / "slurm", dirs_exist_ok=True)
    shutil.copy(ROOT / "launch/words.sh", tree / "launch")
    (tree / ".venv/lockstep.env").touch()
    # Stands in for the program: prints its run directory, and its ranks exit with CODE.
    script(
        tree / "launch",
        "rank",
        """
if [[ $1 == config ]]; then
  if [[ -n ${STOPPED_EARLY:-} ]]; then kill -USR1 "$(pgrep --oldest --full "$SCRIPT")"; fi
  echo run
  exit
fi
printf '%b' "${WORDS:-}" >&2
exit "${CODE:-0}"
""",
    )
    shutil.copy(ROOT / "slurm" / script_of, spool / "slurm_script")
    calls = folder / "calls"
    calls.write_text("")
    environment = {
        **{name: value for name, value in os.environ.items() if "SLURM" not in name},
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SCRIPT": str(spool / "slurm_script"),
        "LOCKSTEP_BIN": shutil.which("true"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": script_of.removesuffix(".sbatch"),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "RECORD": RECORD.format(2),
        **({"SLURM_SUBMIT_DIR": str(tree)} if clone else {}),
        **environment,
    }
    command = ["bash", spool / "slurm_script", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return done, calls.read_text().splitlines()


# scontrol's record of a job that was given only a number of nodes.
RECORD = (
    "JobId=7 JobName=train JobState=RUNNING Restarts=0 NumNodes={0} NumTasks={0} CPUs/Task=1 "
    "NtasksPerN:B:S:C=0:0:*:* CoreSpec=*"
)


def starts(calls):
    """The calls that tried to start ranks."""
    return [call for call in calls if "launch/rank train" in call]


@pytest.mark.parametrize("name", ["train.sbatch", "scaling.sbatch", "compare.sbatch"])
def test_a_job_script_finds_the_clone_from_wherever_it_was_copied(tmp_path, name):
    lost, _ = job(tmp_path, name, clone=False, SLURM_SUBMIT_DIR=str(tmp_path))
    assert lost.returncode == 2
    assert f"{tmp_path} is not a clone of Lockstep" in lost.stderr
    assert "LOCKSTEP_ROOT=DIR sbatch" in lost.stderr
    link = tmp_path / "a link.sbatch"
    link.symlink_to(tmp_path / "clone/slurm" / name)
    for place in (
        {"SLURM_SUBMIT_DIR": str(tmp_path / "clone")},
        {"LOCKSTEP_ROOT": str(tmp_path / "clone")},
        {"COMMAND": f"{tmp_path}/clone/slurm/{name}"},
        {"COMMAND": f"{link} some.yaml --set 'a b'"},
    ):
        found, _ = job(tmp_path, name, clone=False, **place)
        assert "no configuration is named" in found.stderr, place
    wrong, _ = job(tmp_path, name, LOCKSTEP_ROOT="/nowhere")
    assert "/nowhere is not a clone" in wrong.stderr


def test_the_job_scripts_find_the_clone_in_the_same_way():
    texts = [
        (ROOT / "slurm" / f"{name}.sbatch").read_text()
        for name in ("train", "scaling", "compare", "homework")
    ]
    ways = {
        text[text.index("# Slurm runs a copy") : text.index('. "$root/slurm/job.sh"')]
        for text in texts
    }
    assert len(ways) == 1


def test_the_homeworks_job_becomes_the_launch_script(tmp_path):
    """So Slurm's request to stop reaches it, and its exit code is the job's."""
    (tmp_path / "clone/launch").mkdir(parents=True)
    script(tmp_path / "clone/launch", "homework", 'echo "$PPID $LOCKSTEP_BIN $*"; exit 75')
    done, _ = job(tmp_path, "homework.sbatch", "--minutes", "5")
    expected = f"{os.getpid()} {shutil.which('true')} --minutes 5\n"
    assert (done.returncode, done.stdout) == (75, expected)


@pytest.mark.parametrize(("element", "path"), [("1", "c/first.yaml"), ("2", "c/two words#2.yaml")])
def test_a_list_of_configurations_may_have_comments_and_blanks(tmp_path, element, path):
    lines = ["# a sweep", "  c/first.yaml\t# fast", "", " \t", "c/two words#2.yaml  "]
    (tmp_path / "sweep.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    array = {"SLURM_ARRAY_TASK_ID": element, "RECORD": f"{RECORD.format(1)} ArrayTaskId={element}"}
    done, _ = job(tmp_path, "train.sbatch", "sweep.txt", **array)
    assert f"no configuration {path} in " in done.stderr
    array = {"SLURM_ARRAY_TASK_ID": "3", "RECORD": f"{RECORD.format(1)} ArrayTaskId=3"}
    done, _ = job(tmp_path, "train.sbatch", "sweep.txt", **array)
    assert "sweep.txt lists 2 configurations, there is no number 3" in done.stderr


def test_what_srun_refuses_ends_the_job_at_once(tmp_path):
    (tmp_path / "some.yaml").touch()
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", REFUSES="they are mutually exclusive")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[-2:] == [
        "srun: fatal: they are mutually exclusive",
        "train: srun started no rank; its words are above",
    ]
    assert len(starts(calls)) == 1
    assert not any(call.startswith(("sleep", "scontrol requeue")) for call in calls)


@pytest.mark.parametrize(
    "silent",
    [{"NODES": "allocated\ndown*"}, {"NODES": "allocated*"}, {"SILENT_NODE": "1"}],
    ids=["down", "not responding", "no step starts there"],
)
@pytest.mark.parametrize("lost", [{"CODE": "6"}, {"REFUSES": "Task launch failed on node n2"}])
def test_a_job_whose_node_is_lost_waits_for_slurm_and_is_queued_again(tmp_path, silent, lost):
    (tmp_path / "some.yaml").touch()
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", **silent, **lost)
    assert done.returncode not in (0, 2), done.stderr
    assert len(starts(calls)) == 3
    assert calls.count("sleep 360") == 3  # SlurmdTimeout and a minute
    assert calls.count("scontrol requeue 7") == 1


def test_a_lost_rank_makes_no_node_suspect(tmp_path):
    (tmp_path / "some.yaml").touch()
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", CODE="6")
    assert done.returncode == 6
    assert len(starts(calls)) == 3
    assert "does not answer" not in done.stderr
    assert calls.count("scontrol requeue 7") == 1


@pytest.mark.parametrize("stopped", [{"CODE": "75"}, {"STOPPED_EARLY": "1"}], ids=["ranks", "job"])
def test_a_job_that_is_stopped_before_it_saves_is_queued_again_but_not_for_ever(tmp_path, stopped):
    (tmp_path / "some.yaml").touch()
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", **stopped)
    assert done.returncode == 75, done.stderr
    assert len(starts(calls)) == ("CODE" in stopped)
    assert calls.count("scontrol requeue 7") == 1
    assert done.stderr.endswith("train: queueing the job again, to go on from the start\n")
    record = RECORD.format(2).replace("Restarts=0", "Restarts=10")
    often = {"SLURM_RESTART_COUNT": "10", "RECORD": record}
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", **stopped, **often)
    assert done.returncode == 75, done.stderr
    assert calls.count("scontrol requeue 7") == 0
    assert "never got further: not queued again" in done.stderr


def test_ranks_of_a_job_say_a_reason_once_and_last(tmp_path):
    (tmp_path / "some.yaml").touch()
    words = r"lockstep: rank 1: full\nlockstep: rank 0: full\nINFO step 3\n"
    done, _ = job(tmp_path, "train.sbatch", "some.yaml", WORDS=words, CODE="4")
    assert done.returncode == 4
    assert done.stderr.splitlines()[-2:] == ["INFO step 3", "lockstep: ranks 0, 1: full"]


def test_slurm_that_does_not_answer_is_no_refusal(tmp_path):
    (tmp_path / "some.yaml").touch()
    done, calls = job(tmp_path, "train.sbatch", "some.yaml", REFUSES="no controller", RECORD="")
    assert done.returncode == 1
    assert len(starts(calls)) == 3


def test_a_request_to_stop_between_two_starts_of_a_job(tmp_path):
    (tmp_path / "launch").mkdir()
    script(tmp_path / "launch", "rank", "exit 6")
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
    # mpirun starts its ranks from its own step.
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
    # An exclusive job owns all of a node's GPUs, but its steps get only what was asked for.
    job["SLURM_JOB_NUM_NODES"] = "1"
    done = in_a_job(tmp_path, LAID_OUT, **job, SLURM_GPUS="h100:2", SLURM_GPUS_ON_NODE="4")
    assert done.stdout.startswith("2 in 2:"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("inherited", "record", "expected"),
    [
        # sbatch --nodes=3 inside `srun -N1 --exclusive bash`
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, "", "3 in 1: 2 CPUs"),
        # inside `salloc -n3 -c1`, whose number of tasks happens to equal that of the nodes
        ({"SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "1"}, "", "3 in 1: 2 CPUs"),
        # inside a job with GPUs
        (
            {"SLURM_GPUS": "8", "SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "h100:4"},
            "",
            "3 in 1: 2 CPUs",
        ),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "6"}, "", "3 in 1: 2 CPUs"),
    ],
)
def test_variables_of_another_allocation_do_not_count(tmp_path, inherited, record, expected):
    done = laid_out(tmp_path, record, **inherited)
    assert done.stdout.startswith(expected), done.stdout + done.stderr
    assert "--gpu-bind" not in done.stdout
    assert done.stderr.count("\n") == 1
    for name, value in inherited.items():
        if name != "SLURM_STEP_NUM_TASKS":
            assert f"{name}={value}" in done.stderr


@pytest.mark.parametrize(
    ("told", "record", "expected"),
    [
        # --ntasks=6
        ({"SLURM_NTASKS": "6"}, "NumTasks=6", "6 in 2: 1 CPUs"),
        # --ntasks=3 --cpus-per-task=1
        (
            {"SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "1(x3)"},
            "",
            "3 in 1: 1 CPUs",
        ),
        # --ntasks=5 --ntasks-per-node=2: a limit, and the record counts two for each node
        (
            {"SLURM_NTASKS": "5", "SLURM_NTASKS_PER_NODE": "2"},
            "NumTasks=6 NtasksPerN:B:S:C=2:0:*:*",
            "5 in 2: 1 CPUs",
        ),
        # --gpus-per-node=h100:2
        (
            {"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_NODE": "h100:2"},
            "TresPerNode=gres/gpu:h100:2",
            "6 in 2: 1 CPUs",
        ),
        # --gpus=6
        ({"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS": "6"}, "TresPerJob=gres:gpu:6", "6 in 2: 1 CPUs"),
    ],
)
def test_what_sbatch_was_told_counts(tmp_path, told, record, expected):
    done = laid_out(tmp_path, record, **told)
    assert done.stdout.startswith(expected), done.stdout + done.stderr
    assert done.stderr == ""


def laid_out(folder, told, **variables):
    """Lays out a job of three nodes, two CPUs each, with variables; `told` edits its record."""
    record = RECORD.format(3)
    for word in told.split():
        field = word.partition("=")[0]
        words = [known for known in record.split() if not known.startswith(f"{field}=")]
        record = " ".join([*words[:-1], word, words[-1]])
    facts = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_CPUS_PER_NODE": "2(x3)"}
    facts |= {"SLURM_TASKS_PER_NODE": "2(x3)", "RECORD": record}
    commands = (
        'lay_out; choose_launcher "$ranks"; echo "$ranks in $per_node: $cpus CPUs" "${launcher[@]}"'
    )
    return in_a_job(folder, commands, **facts | variables)


def test_a_job_inside_another_is_no_element_and_was_not_restarted(tmp_path):
    outer = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_CPU": "100"}
    outer |= {"SLURM_MEM_PER_NODE": "300", "PMIX_RANK": "0", "PMIX_MCA_psec": "none"}
    commands = "env"
    done = in_a_job(tmp_path, commands, SLURM_JOB_ID="7", RECORD=RECORD.format(1), **outer)
    names = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert not set(outer) - {"PMIX_MCA_psec"} & set(names)
    assert "PMIX_MCA_psec" in names  # the user's
    # The job's own variables stay.
    own = f"{RECORD.format(1)} ArrayTaskId=4".replace("Restarts=0", "Restarts=2")
    done = in_a_job(tmp_path, commands, SLURM_JOB_ID="7", RECORD=own, **outer)
    assert "SLURM_ARRAY_TASK_ID=4\n" in done.stdout and "SLURM_RESTART_COUNT=2\n" in done.stdout


def test_a_contradiction_that_slurm_cannot_resolve_ends_the_job(tmp_path):
    done = laid_out(tmp_path, "", SLURM_NTASKS="1", SCONTROL="1", RECORD="")
    assert done.returncode == 2
    assert "SLURM_NTASKS=1 contradicts 3 nodes with 2(x3) tasks" in done.stderr


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_ranks_do_not_outlive_a_killed_local(ranks):
    local, pids = start_two_ranks(ranks)
    local.kill()
    local.wait()
    wait_until(lambda: not any(map(is_running, pids)))


# launch/setup on machines that lack something: a clone in a temporary folder, and a PATH with only
# the tools named here.
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
        # Not a link: some programs look at the path by which they were called.
        real = sys.executable if name == "python3" else shutil.which(name)
        script(bin_folder, name, f'exec {real} "$@"')


def script(bin_folder, name, body):
    path = bin_folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def setup(bare, *arguments, **environment):
    """Runs launch/setup, which must fail with one line; returns that reason."""
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
    # A machine with a GPU gets CUDA by default; without Python the set-up ends there.
    said = setup_says(bare).stdout
    warning = "warning: the NVIDIA driver of this machine is 570.86.15, CUDA 13 needs 580 or newer"
    assert (warning in said) == version.startswith("570"), said
    assert "driver" not in setup_says(bare, "--cpu").stdout


def test_setup_with_an_unknown_argument(bare):
    assert "unknown argument --gpu" in setup(bare, "--gpu")
