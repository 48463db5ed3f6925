"""The job scripts on a real Slurm of several nodes, which launch/cluster starts on this machine."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import heartbeat, same
from virtual_cluster import BINARY, ROOT, script, start, wait_until

pytestmark = [pytest.mark.full, pytest.mark.slurm]

# More steps than any machine can do while a test waits for something. Once that has happened, the
# test rewrites the configuration to give the run an end.
ENDLESS = 1_000_000

# Prints what it was started with. Job scripts that ask for a setting still get the real answer.
STAND_IN = f"""#!/bin/bash
if [[ $1 == config ]]; then exec {BINARY} "$@"; fi
echo "rank $SLURM_PROCID, $SLURM_CPUS_PER_TASK CPUs, $OMP_NUM_THREADS threads, word $WORD: $*"
exit ${{CODE:-0}}
"""

# Makes srun look like that of a Slurm built without PMIx.
NO_PMIX = """#!/bin/bash
if [[ $* == --mpi=list ]]; then printf 'MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n'; exit; fi
exec {srun} "$@"
"""


# Sends 4 MiB over a link; the last byte is answered.
RECEIVE = """
import socket
server = socket.create_server(("", 9000))
print("listening", flush=True)
link = server.accept()[0]
link.makefile("rb").read()
link.sendall(b".")
"""
SEND = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 9000))
begin = time.monotonic()
link.sendall(bytes(4 << 20))
link.shutdown(socket.SHUT_WR)
link.recv(1)
print(time.monotonic() - begin)
"""


@pytest.fixture(scope="module")
def alone(nodes):
    """The rows of a single-rank run without Slurm."""
    config = nodes.config("alone", 50)
    nodes.call(BINARY, "train", "--config", config)
    return nodes.rows("runs/alone")


def assert_as_if_undisturbed(cluster, run):
    """Asserts that the run has learnt the same as two undisturbed ranks in as many steps."""
    steps = len(cluster.losses(run))
    config = cluster.config("undisturbed", steps)
    reference = "runs/undisturbed-" + run.removeprefix("runs/")
    cluster.call(ROOT / "launch/local", 2, "train", "--config", config, "--run-dir", reference)
    same(cluster.work / run, cluster.work / reference, f"step-{steps:08}")


def let_end(cluster, name, run, more=30):
    """Lets a run of ENDLESS steps end after its next start; returns its number of steps."""
    steps = len(cluster.rows(run)) + more
    cluster.config(name, steps, save_every=50)
    return steps


def restarts(cluster, job):
    return int(cluster.facts(job)["Restarts"])


@pytest.mark.parametrize(
    ("options", "ranks"),
    [(["--nodes=2"], 2), (["--nodes=3"], 3), (["--nodes=2", "--ntasks=3"], 3)],
    ids=["two nodes", "three nodes", "two ranks on a node and one on another"],
)
def test_ranks_on_several_nodes_train_as_one(cluster, alone, options, ranks):
    run = "runs/nodes " + "".join(options)
    job = cluster.submit(*options, arguments=[cluster.config("nodes", 50), "--run-dir", run])
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    on_a_node = 2 if "--ntasks=3" in options else 1
    assert f"{ranks} x lockstep train, at most {on_a_node} on a node" in cluster.output(job)
    assert [row["world_size"] for row in cluster.rows(run)] == [str(ranks)] * 50
    for found, expected in zip(cluster.rows(run), alone, strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    # The ranks of a node share a file of heartbeats, and only rank 0 has something to log.
    folder = cluster.work / run
    assert len([*folder.glob("heartbeats/*")]) == (3 if "--nodes=3" in options else 2)
    beats = [heartbeat(folder, rank) for rank in range(ranks)]
    assert len({beat["host"] for beat in beats}) == (3 if "--nodes=3" in options else 2)
    assert [path.name for path in folder.glob("logs/*")] == ["rank-0000.log"]


def test_the_time_limit_strikes(cluster):
    run = "runs/limited"
    arguments = [cluster.config("limited", ENDLESS, save_every=50), "--run-dir", run]
    # As soon as the job gets its limit the signal is due; the job's end is some minutes later.
    job = cluster.submit("--nodes=2", "--signal=B:USR1@600", arguments=arguments)
    wait_until(lambda: len(cluster.rows(run)) > 10, explain=cluster.situation)
    cluster.call("scontrol", "update", f"jobid={job}", "timelimit=10")
    wait_until(lambda: restarts(cluster, job) == 1, explain=cluster.situation)
    cluster.call("scontrol", "update", f"jobid={job}", "timelimit=1000")
    steps = let_end(cluster, "limited", run)
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    said = cluster.output(job)
    assert "stopped on request" in said
    assert "queueing the job again, to go on from step-" in said
    assert "resuming from" in said
    assert len(cluster.losses(run)) == steps
    assert_as_if_undisturbed(cluster, run)


def test_a_node_dies(cluster):
    run = "runs/bereaved"
    arguments = [cluster.config("bereaved", ENDLESS, save_every=50), "--run-dir", run]
    job = cluster.submit("--nodes=2", arguments=arguments)
    wait_until(lambda: len(cluster.rows(run)) > 70, explain=cluster.situation)
    assert cluster.facts(job)["NodeList"] == "n[1-2]"
    try:
        assert cluster.launch("kill", 2).returncode == 0
        steps = let_end(cluster, "bereaved", run)
        facts = cluster.wait(job)
    finally:
        cluster.launch("start", 2)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    assert (facts["Restarts"], facts["NodeList"]) == ("1", "n[1,3]")
    assert "resuming from" in cluster.output(job)
    assert len(cluster.losses(run)) == steps
    assert_as_if_undisturbed(cluster, run)


def test_nodes_that_died_before(cluster):
    """What their PMIx leaves behind does not prevent a job from starting there again."""
    run = "runs/haunted"
    arguments = [cluster.config("haunted", ENDLESS), "--run-dir", run]
    job = cluster.submit("--nodes=2", arguments=arguments)
    wait_until(lambda: len(cluster.rows(run)) > 10, explain=cluster.situation)
    cluster.call("scontrol", "requeuehold", job)
    wait_until(lambda: cluster.facts(job)["JobState"] == "PENDING", explain=cluster.situation)
    wait_until(lambda: not cluster.call("squeue", "-h", "-t", "CG"), explain=cluster.situation)
    steps = let_end(cluster, "haunted", run)
    for spool in (cluster.state / "spool").glob("n?"):
        for step in range(9):
            with socket.socket(socket.AF_UNIX) as left_behind:
                left_behind.bind(str(spool / f"stepd.slurm.pmix.{job}.{step}"))
    cluster.call("scontrol", "release", job)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert cluster.output(job).count("starts 2 x lockstep train") == 2
    assert len(cluster.losses(run)) == steps


@pytest.mark.parametrize(
    ("outer", "options", "ranks"),
    [
        (["srun", "--nodes=1", "--exclusive"], ["--nodes=3"], 3),
        (["salloc", "--ntasks=3", "--nodes=2", "--cpus-per-task=1"], ["--nodes=1", "--mem=100"], 1),
    ],
)
def test_a_job_inside_another_allocation_is_laid_out_as_if_outside(cluster, outer, options, ranks):
    run = f"runs/inside-{ranks}"
    arguments = [cluster.config("inside", 3), "--run-dir", run]
    train = ROOT / "slurm/train.sbatch"
    memory = {"SLURM_MEM_PER_CPU": "50"}  # as from salloc --mem-per-cpu
    with cluster.own_environment(**memory):
        said = cluster.call(*outer, "sbatch", "--parsable", *options, train, *arguments)
    job = said.split()[-1]
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), cluster.output(job)
    said = cluster.output(job)
    assert f"srun starts {ranks} x lockstep train, at most 1 on a node, CPUs for each: 2" in said
    assert "left over from another allocation, so without effect: SLURM_NTASKS=" in said
    assert {row["world_size"] for row in cluster.rows(run)} == {str(ranks)}


def test_what_srun_refuses_ends_the_job(cluster):
    arguments = [cluster.config("refused", 3)]
    job = cluster.submit("--nodes=2", arguments=arguments, SLURM_MPI_TYPE="nonsense")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    said = cluster.output(job)
    assert said.count("lockstep train") == 1
    assert "Invalid MPI type 'nonsense'" in said
    assert said.endswith("train: srun started no rank; its words are above\n")


def test_ranks_that_end_for_the_same_reason_say_it_once(cluster):
    arguments = [cluster.config("without", 3), "--set", "data.dir=nowhere"]
    job = cluster.submit("--nodes=3", arguments=arguments)
    assert cluster.wait(job)["ExitCode"] == "3:0"
    said = cluster.output(job)
    # Slurm may end a rank before it says anything.
    assert said.count("expected a data folder, found nothing") == 1, said
    assert said.splitlines()[-1].startswith("lockstep: rank"), said


def test_a_stopped_job_is_queued_again_however_its_name_is_spelt(cluster):
    (cluster.work / "odd.yaml").write_text(
        '"name": "it\'s # odd"\r\n'
        "data: {dir: ../data, block_size: 64, batch_size: 24}\r\n"
        "model: {preset: gpt-nano}\r\n"
        f"train: {{steps: {ENDLESS}, eval_every: 0, save_every: 0}}\r\n"
    )
    run = "runs/it's # odd"
    job = cluster.submit(arguments=["odd.yaml"])
    wait_until(lambda: cluster.rows(run), explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: restarts(cluster, job) == 1, explain=cluster.situation)
    cluster.call("scancel", job)
    cluster.wait(job)
    assert "queueing the job again, to go on from step-" in cluster.output(job)


def test_a_copy_of_the_script_works_from_a_clone_and_by_its_name(cluster):
    clone = cluster.clone("copied from")
    shutil.copy(clone / "slurm/train.sbatch", cluster.work / "my.sbatch")
    config = cluster.config("copied", 2)
    job = cluster.submit(script="my.sbatch", arguments=[config])
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "is not a clone of Lockstep" in cluster.output(job)
    (cluster.work / "link.sbatch").symlink_to(clone / "slurm/train.sbatch")
    named = {"LOCKSTEP_ROOT": str(clone)}
    jobs = [
        cluster.submit(script="my.sbatch", arguments=[config], **named),
        cluster.submit(script="link.sbatch", arguments=[config]),
        # Submitted through standard input, in the clone.
        cluster.call(
            "bash", "-c", f"cd '{clone}' && sbatch --parsable <slurm/train.sbatch"
        ).strip(),
    ]
    states = [cluster.wait(job)["JobState"] for job in jobs]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    said = (clone / f"slurm-{jobs[-1]}.out").read_text()
    assert said.startswith("train: no configuration is named")


def test_ranks_do_not_say_what_pmix_lacks(cluster):
    """Slurm's PMIx offers munge if the machine has it; the ranks' PMIx may lack it."""
    arguments = ["--mpi=pmix", "--nodes=3", "env", "PMIX_SECURITY_MODE=munge,native"]
    train = [ROOT / "launch/rank", "train", "--config", cluster.config("quiet", 2)]
    command = list(map(str, ["srun", "-Q", *arguments, *train]))
    done = subprocess.run(
        command, cwd=cluster.work, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "munge" not in done.stderr
    assert {row["world_size"] for row in cluster.rows("runs/quiet")} == {"3"}


def test_an_array_over_configurations(cluster):
    for name in ("first", "second"):
        cluster.config(name, 3)
    (cluster.work / "sweep.txt").write_text("first.yaml\n\nsecond.yaml\n")
    prompts = 'train.prompts=["two words", "%a"]'
    job = cluster.submit("--array=1-2", "--nodes=1", arguments=["sweep.txt", "--set", prompts])
    cluster.wait(job)
    assert len(cluster.losses("runs/first")) == len(cluster.losses("runs/second")) == 3
    assert "- two words\n  - '2'" in (cluster.work / "runs/second/config.yaml").read_text()
    # Each element has an output file, named by its number in the array.
    for element in (1, 2):
        assert "the 72 sequences of steps 1 to 3" in cluster.output(f"{job}_{element}")


def test_a_list_may_hold_arguments(cluster):
    cluster.config("listed", 3)
    (cluster.work / "two words.yaml").write_text((cluster.work / "listed.yaml").read_text())
    (cluster.work / "rates.txt").write_text(
        "listed.yaml --set optim.lr=1e-3 --run-dir runs/rate-%a # the first\n"
        "'two words.yaml' --set 'train.prompts=[\"two  words\"]' --run-dir 'runs/rate 2'\n"
        "two words.yaml\n"
    )
    job = cluster.submit("--array=1-3", "--nodes=1", arguments=["rates.txt", "--set", "seed=%a"])
    cluster.wait(job)
    written = [
        (cluster.work / f"runs/{run}/config.yaml").read_text()
        for run in ("rate-1", "rate 2", "listed")
    ]
    for element, (config, part) in enumerate(
        zip(written, ("lr: 0.001", "- two  words", "name: listed"), strict=True), 1
    ):
        assert part in config and f"seed: {element}" in config, cluster.output(job)


def test_a_chain_of_jobs_that_are_not_requeued(cluster):
    run = "runs/chain"
    arguments = [cluster.config("chain", ENDLESS, save_every=50), "--run-dir", run]
    options = ["--nodes=1", "--no-requeue", "--dependency=singleton", "--job-name=chain"]
    first = cluster.submit(*options, arguments=arguments)
    # The others are held until the run has been given an end.
    others = [cluster.submit(*options, "--hold", arguments=arguments) for _ in range(2)]
    wait_until(lambda: len(cluster.rows(run)) > 10, explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    facts = cluster.wait(first)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    assert "unless the next job of a chain does" in cluster.output(first)
    steps = let_end(cluster, "chain", run)
    cluster.call("scontrol", "release", ",".join(others))
    for job, words in zip(others, ("resuming from", "is complete"), strict=True):
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
        assert words in cluster.output(job), cluster.output(job)
    assert len(cluster.losses(run)) == steps


def test_an_array_over_seeds(cluster):
    arguments = [cluster.config("seeds", 2), "--set", "seed=%a", "--run-dir", "runs/seed-%a"]
    job = cluster.submit("--array=5,6", "--nodes=1", arguments=arguments)
    cluster.wait(job)
    assert "seed: 6" in (cluster.work / "runs/seed-6/config.yaml").read_text()
    assert cluster.losses("runs/seed-5") != cluster.losses("runs/seed-6")


def test_a_job_stopped_in_an_array_goes_on(cluster):
    arguments = [cluster.config("element", ENDLESS), "--run-dir", "runs/element-%a"]
    job = cluster.submit("--array=1-2", "--nodes=1", arguments=arguments)
    runs = ["runs/element-1", "runs/element-2"]
    wait_until(lambda: all(len(cluster.rows(run)) > 10 for run in runs), explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_2")
    wait_until(lambda: restarts(cluster, f"{job}_2") == 1, explain=cluster.situation)
    stopped = len(cluster.rows(runs[1]))
    enough = lambda: all(len(cluster.rows(run)) > stopped + 10 for run in runs)  # noqa: E731
    wait_until(enough, explain=cluster.situation)
    # The other element is left alone, although the last one has the array's own number.
    assert [restarts(cluster, f"{job}_{k}") for k in (1, 2)] == [0, 1]
    cluster.call("scancel", job)
    cluster.wait(job)
    one, two = map(cluster.losses, runs)
    shared = min(len(one), len(two))
    assert shared > stopped and one[:shared] == two[:shared]
    assert "resuming from" in cluster.output(f"{job}_2")


@pytest.mark.parametrize(
    ("options", "arguments", "environment", "message"),
    [
        ([], [], {}, "no configuration is named; for example: sbatch"),
        ([], ["none.yaml"], {}, "no configuration none.yaml in "),
        (
            [],
            ["some.yaml"],
            {"LOCKSTEP_BIN": "/nowhere/lockstep"},
            "/nowhere/lockstep is not there",
        ),
        (["--array=1"], ["some.yaml"], {}, "each element of the array would train the same"),
        (["--array=2"], ["one.txt"], {}, "one.txt lists 1 configurations, there is no number 2"),
    ],
)
def test_what_is_missing_is_said_in_a_line(cluster, options, arguments, environment, message):
    cluster.config("some", 1)
    (cluster.work / "one.txt").write_text("some.yaml\n")
    job = cluster.submit(*options, arguments=arguments, **environment)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    said = cluster.output(job)
    assert said.startswith(f"train: {message}")
    assert said.count("\n") == 1


def test_mpirun_where_srun_has_no_pmix(cluster, alone):
    """Also with a site file, and a clone in another place."""
    path = script(cluster.folder / "no-pmix/srun", NO_PMIX.format(srun=shutil.which("srun"))).parent
    clone = cluster.clone("a clone", site=f"export PATH='{path}':$PATH\n")
    config = cluster.config("mpirun", ENDLESS)
    options = ["--nodes=2", "--ntasks=3"]
    job = cluster.submit(*options, script=clone / "slurm/train.sbatch", arguments=[config])
    # It stops and resumes here too: mpirun passes the signal on.
    wait_until(lambda: len(cluster.rows("runs/mpirun")) > 30, explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: restarts(cluster, job) == 1, explain=cluster.situation)
    let_end(cluster, "mpirun", "runs/mpirun")
    cluster.wait(job)
    assert "mpirun starts 3 x lockstep train, at most 2 on a node" in cluster.output(job)
    assert "resuming from" in cluster.output(job)
    assert {row["world_size"] for row in cluster.rows("runs/mpirun")} == {"3"}
    for found, expected in zip(cluster.losses("runs/mpirun")[:50], alone, strict=True):
        assert float(found) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_nodes_with_a_network_that_leads_nowhere(cluster):
    """Each has a docker0 with the same address, as with Docker; Open MPI alone would fail."""
    number = (cluster.state / "number").read_text().strip()
    for node in (1, 2):
        inside = ["ip", "-n", f"lockstep{number}-n{node}"]
        veth = ["docker0", "type", "veth", "peer", "name", "docker1"]
        cluster.call(*inside, "link", "add", *veth)
        cluster.call(*inside, "address", "add", "172.17.0.1/16", "dev", "docker0")
        cluster.call(*inside, "link", "set", "docker0", "up")
        cluster.call(*inside, "link", "set", "docker1", "up")
    try:
        arguments = [cluster.config("docker", 2)]
        job = cluster.submit("--nodelist=n[1-2]", "--nodes=2", arguments=arguments)
        cluster.wait(job)
        assert len(cluster.losses("runs/docker")) == 2, cluster.output(job)
        # The user's setting is kept.
        chosen = {"OMPI_MCA_btl_tcp_if_include": "docker0", "NCCL_SOCKET_IFNAME": "lo"}
        command = ["srun", "--nodelist=n[1-2]", "--nodes=2", ROOT / "launch/rank"]
        cluster.environment["LOCKSTEP_BIN"] = shutil.which("env")
        said = cluster.call(*command)
        assert said.count("OMPI_MCA_btl_tcp_if_include=eth0\n") == 2
        assert said.count("NCCL_SOCKET_IFNAME==eth0\n") == 2
        cluster.environment.update(chosen)
        said = cluster.call(*command)
        for name, value in chosen.items():
            assert said.count(f"{name}={value}\n") == 2
    finally:
        for node in (1, 2):
            cluster.call("ip", "-n", f"lockstep{number}-n{node}", "link", "delete", "docker0")


def test_scaling_runs_each_number_of_ranks(cluster):
    arguments = [cluster.config("scaling", 99), "--set", "train.steps=3"]
    job = cluster.submit("--nodes=3", script=ROOT / "slurm/scaling.sbatch", arguments=arguments)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    tokens = {}
    for kind in ("strong", "weak"):
        for ranks in (1, 2, 3):
            run = f"runs/scaling-{job}/{kind}-{ranks}"
            rows = cluster.rows(run)
            assert [row["world_size"] for row in rows] == [str(ranks)] * 3
            tokens[kind, ranks] = int(rows[-1]["tokens"])
            assert (cluster.work / run / "config.yaml").exists()
            assert f"{run}\n" in cluster.output(job)
    assert {tokens["strong", ranks] for ranks in (1, 2, 3)} == {24 * 64 * 3}
    assert [tokens["weak", ranks] for ranks in (1, 2, 3)] == [
        ranks * 8 * 64 * 3 for ranks in (1, 2, 3)
    ]


def test_scaling_finds_a_batch_that_all_can_share(cluster):
    arguments = [
        cluster.config("scaling", 1),
        "--set",
        "data.batch_size=20",
        "--set",
        "train.steps=1",
    ]
    job = cluster.submit("--nodes=3", script=ROOT / "slurm/scaling.sbatch", arguments=arguments)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    assert "the batch is 18, not 20" in cluster.output(job)


def test_compare_is_one_task_with_all_cores(cluster):
    binary = script(cluster.folder / "bin/stand-in", STAND_IN)
    arguments = [cluster.config("some", 1), "--steps", "9"]
    job = cluster.submit(
        script=ROOT / "slurm/compare.sbatch", arguments=arguments, LOCKSTEP_BIN=str(binary)
    )
    cluster.wait(job)
    said = cluster.output(job)
    expected = f"--config some.yaml --devices=cpu,cuda --out=compare-{job}.csv --steps 9\n"
    assert f"rank 0, 2 CPUs, 1 threads, word : compare {expected}" in said
    assert said.count("rank ") == 1


def test_one_rank_for_each_gpu(gpu_cluster):
    """The site's file asks for two GPUs."""
    cluster = gpu_cluster
    site = "export SBATCH_GPUS_PER_NODE=2 WORD='from the site'"
    clone = cluster.clone("clone", site=f"{site}\nmodule_that_fails\n")
    cluster.environment["LOCKSTEP_BIN"] = str(script(cluster.folder / "bin/stand-in", STAND_IN))
    del cluster.environment["OMP_NUM_THREADS"]
    train = clone / "slurm/train.sbatch"
    arguments = [cluster.config("some", 1)]
    sourced = f". '{clone}/slurm/site.sh' 2>/dev/null; sbatch --parsable '{train}' some.yaml"
    job = cluster.call("bash", "-c", sourced).strip()
    cluster.wait(job)
    said = cluster.output(job)
    for rank in (0, 1):
        line = f"rank {rank}, 2 CPUs, 2 threads, word from the site: train --config some.yaml\n"
        assert line in said
    assert said.count("rank ") == 2
    # The command line wins.
    job = cluster.submit("--ntasks=4", script=train, arguments=arguments)
    cluster.wait(job)
    assert cluster.output(job).count("1 CPUs, 1 threads") == 4
    # A job ignores the GPUs of another allocation.
    outer = ["salloc", "--nodes=1", "--gpus-per-node=1", "--ntasks=1"]
    options = ["--nodes=1", "--gpus-per-node=2"]
    said = cluster.call(*outer, "sbatch", "--parsable", *options, train, *arguments)
    job = said.split()[-1]
    cluster.wait(job)
    assert "srun starts 2 x lockstep train, at most 2 on a node" in cluster.output(job)


def test_one_gpu_of_a_node_that_others_share(gpu_cluster):
    """Two such jobs run at the same time, each with a GPU of its own."""
    cluster = gpu_cluster
    stand_in = f"""#!/bin/bash
if [[ $1 == config ]]; then exec {BINARY} "$@"; fi
touch "runs-$SLURM_JOB_ID"
until [[ -e seen ]]; do sleep 0.1; done
"""
    binary = str(script(cluster.folder / "bin/shares", stand_in))
    options = ["--oversubscribe", "--gpus=1", "--cpus-per-task=1"]
    arguments = [cluster.config("some", 1)]
    jobs = [cluster.submit(*options, arguments=arguments, LOCKSTEP_BIN=binary) for _ in range(2)]
    run = [cluster.work / f"runs-{job}" for job in jobs]
    wait_until(lambda: all(path.exists() for path in run), explain=cluster.situation)
    records = [cluster.call("scontrol", "--details", "show", "job", job) for job in jobs]
    (cluster.work / "seen").touch()
    gpus = [re.search(r"GRES=gpu:1\(IDX:(\d)\)", record) for record in records]
    assert sorted(gpu[1] for gpu in gpus) == ["0", "1"], records
    for job in jobs:
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
        words = "srun starts 1 x lockstep train, at most 1 on a node, CPUs for each: 1"
        assert words in cluster.output(job)


def test_shaped_links(cluster):
    number = (cluster.state / "number").read_text().strip()

    def round_trip_s():
        begin = time.monotonic()
        socket.create_connection((f"10.77.{number}.11", 26800)).close()
        return time.monotonic() - begin

    def megabytes_per_s():
        """The rate from one node to another; the sender times from its connection to the answer."""
        inside = ["ip", "netns", "exec"]
        receiver = [*inside, f"lockstep{number}-n2", sys.executable, "-c", RECEIVE]
        with subprocess.Popen(receiver, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout.readline() == "listening\n"
            sender = [*inside, f"lockstep{number}-n1", sys.executable, "-c", SEND]
            seconds = float(cluster.call(*sender, f"10.77.{number}.12"))
            assert listener.wait(300) == 0
        return 4 / seconds

    refused = cluster.launch("shape", "fast", "0ms")
    assert refused.returncode == 2
    assert "tc does not take the rate 'fast' and the delay '0ms'" in refused.stderr
    try:
        assert cluster.launch("shape", "40mbit", "0ms").returncode == 0
        assert megabytes_per_s() < 6
        delayed = cluster.launch("shape", "1gbit", "80ms")
        if "netem" in delayed.stderr:
            pytest.skip(f"NOT RUN, delayed links; rates were: {delayed.stderr.strip()}")
        # Only one direction passes through the node's own interface.
        assert round_trip_s() > 0.08
    finally:
        assert cluster.launch("shape", "off").returncode == 0
    for node in (1, 2, 3):
        rules = cluster.call(
            "tc", "-n", f"lockstep{number}-n{node}", "qdisc", "show", "dev", "eth0"
        )
        assert "tbf" not in rules and "netem" not in rules


def test_a_cancelled_job_stays_cancelled(cluster):
    job = cluster.submit(arguments=[cluster.config("cancelled", ENDLESS)])
    wait_until(lambda: cluster.rows("runs/cancelled"), explain=cluster.situation)
    cluster.call("scancel", job)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)
    assert cluster.losses("runs/cancelled")


def test_cluster_verbs(cluster):
    again = cluster.launch("up", 3)
    assert (again.returncode, "are up already" in again.stdout) == (0, True)
    other = cluster.launch("up", 2)
    assert other.returncode == 2
    assert "3 nodes of 2 cores and 0 GPUs are up already, not 2 nodes" in other.stderr
    assert cluster.launch("kill", 4).returncode == 2
    assert cluster.launch("start", 1).returncode == 2
    assert "n3" in cluster.launch("status").stdout


def test_down_leaves_nothing_behind(nodes):
    """Tested with a second cluster beside the first."""
    folder = nodes.folder / "short"
    folder.mkdir()
    cluster = start(folder, 2)
    number = (cluster.state / "number").read_text().strip()
    try:
        # A process of a node that would outlive its job.
        wrapped = "--wrap=setsid sleep 1000 & sleep 0.1"
        cluster.wait(cluster.submit("--nodes=1", wrapped, script="--quiet"))
        assert f"lockstep{number}-n2" in cluster.call("ip", "netns", "list")
    finally:
        assert cluster.launch("down").returncode == 0
    assert f"lockstep{number}" not in cluster.call("ip", "netns", "list")
    links = cluster.call("ip", "-o", "link")
    assert f"lockstep{number}" not in links
    assert f"ls{number}n" not in links
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert str(cluster.state).encode() not in path.read_bytes()
    assert cluster.launch("down").returncode == 0
    status = cluster.launch("status")
    assert status.returncode == 2
    assert "no cluster is up" in status.stderr
    cluster.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PATH": "missing"}, "slurmctld slurmd srun munged"),
        ({"LOCKSTEP_CLUSTER": "/tmp/cluster"}, "each node has a /tmp of its own"),
    ],
)
def test_what_cluster_lacks_is_said_in_a_line(tmp_path, change, message):
    if os.geteuid() != 0:
        change, message = {}, "it takes root"
    elif "PATH" in change:
        for name in ("bash", "cat", "dirname", "realpath"):
            (tmp_path / name).symlink_to(shutil.which(name))
        change = {"PATH": str(tmp_path)}
    elif shutil.which("slurmctld") is None:
        pytest.skip("NOT RUN: Slurm is not installed")
    environment = {**os.environ, "LOCKSTEP_CLUSTER": str(tmp_path / "state"), **change}
    command = [ROOT / "launch/cluster", "up", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("cluster: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
