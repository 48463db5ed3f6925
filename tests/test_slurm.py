"""The job scripts on a real Slurm of several nodes, which launch/cluster starts on this machine."""

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from runs import same
from virtual_cluster import BINARY, ROOT, script, start, wait_until

# Says what it was started with.
STAND_IN = """#!/bin/bash
echo "rank $SLURM_PROCID, $SLURM_CPUS_PER_TASK CPUs, $OMP_NUM_THREADS threads, word $WORD: $*"
exit ${CODE:-0}
"""

# A Slurm that was built without PMIx, as srun shows it.
NO_PMIX = """#!/bin/bash
if [[ $* == --mpi=list ]]; then printf 'MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n'; exit; fi
exec {srun} "$@"
"""


# 4 MiB over a link, and an answer to the last byte.
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
def folder():
    (ROOT / "target").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir=ROOT / "target"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder):
    """Three nodes of two cores."""
    cluster = start(folder, 3)
    try:
        assert BINARY.exists(), f"{BINARY} is not there; build it: cargo build --release"
        command = [BINARY, "prepare", "--source", "sample", "--tokenizer", "bpe:512"]
        cluster.call(*command, "--out", "../data")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def alone(cluster):
    """The rows of a run of one rank without Slurm."""
    config = cluster.config("alone", 50)
    cluster.call(BINARY, "train", "--config", config)
    return cluster.rows("runs/alone")


@pytest.fixture(scope="module")
def undisturbed(cluster, alone):
    """A configuration, its number of steps, and the job that trains it undisturbed, on one node.

    The steps take a minute while another job runs beside it; there are more of them than the tests
    wait for.
    """
    step_s = statistics.median(float(row["step_ms"]) for row in alone) / 1000
    # Two jobs of two ranks want four cores.
    step_s *= max(1, 4 / len(os.sched_getaffinity(0))) / 2
    steps = max(120, round(60 / step_s))
    config = cluster.config("undisturbed", steps, save_every=50)
    options = ["--nodes=1", "--ntasks=2", "--nodelist=n3"]
    return config, steps, cluster.submit(*options, arguments=[config])


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


def test_the_time_limit_strikes(cluster, undisturbed):
    config, steps, reference = undisturbed
    run = "runs/limited"
    # A limit of a minute, and the signal 25 seconds before it or up to 30 seconds earlier.
    options = ["--nodes=2", "--time=1", "--signal=B:USR1@25"]
    job = cluster.submit(*options, arguments=[config, "--run-dir", run])
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    assert int(facts["Restarts"]) >= 1, "the limit did not strike"
    said = cluster.output(job)
    assert "stopped on request" in said
    assert "queueing the job again, to go on from step-" in said
    assert "resuming from" in said
    assert cluster.wait(reference)["JobState"] == "COMPLETED", cluster.output(reference)
    assert len(cluster.losses(run)) == steps
    same(cluster.work / run, cluster.work / "runs/undisturbed", f"step-{steps:08}")


def test_a_node_dies(cluster, undisturbed):
    _, steps, reference = undisturbed
    cluster.wait(reference)
    run = "runs/bereaved"
    config = cluster.config("bereaved", min(steps, 400), save_every=50)
    job = cluster.submit("--nodes=2", arguments=[config, "--run-dir", run])
    wait_until(lambda: len(cluster.rows(run)) > 70, explain=cluster.situation)
    assert cluster.facts(job)["NodeList"] == "n[1-2]"
    try:
        assert cluster.launch("kill", 2).returncode == 0
        facts = cluster.wait(job)
    finally:
        cluster.launch("start", 2)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    assert (facts["Restarts"], facts["NodeList"]) == ("1", "n[1,3]")
    assert "resuming from" in cluster.output(job)
    losses = cluster.losses(run)
    assert len(losses) == min(steps, 400)
    assert losses == cluster.losses("runs/undisturbed")[: len(losses)]


def test_nodes_that_died_before(cluster):
    """What their PMIx leaves behind does not keep a job from being started there again."""
    run = "runs/haunted"
    job = cluster.submit("--nodes=2", arguments=[cluster.config("haunted", 150), "--run-dir", run])
    wait_until(lambda: len(cluster.rows(run)) > 10, explain=cluster.situation)
    cluster.call("scontrol", "requeuehold", job)
    wait_until(lambda: cluster.facts(job)["JobState"] == "PENDING", explain=cluster.situation)
    wait_until(lambda: not cluster.call("squeue", "-h", "-t", "CG"), explain=cluster.situation)
    for spool in (cluster.state / "spool").glob("n?"):
        for step in range(9):
            with socket.socket(socket.AF_UNIX) as left_behind:
                left_behind.bind(str(spool / f"stepd.slurm.pmix.{job}.{step}"))
    cluster.call("scontrol", "release", job)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    assert cluster.output(job).count("starts 2 x lockstep train") == 2
    assert len(cluster.losses(run)) == 150


def test_an_array_over_configurations(cluster):
    for name in ("first", "second"):
        cluster.config(name, 3)
    (cluster.work / "sweep.txt").write_text("first.yaml\n\nsecond.yaml\n")
    prompts = 'train.prompts=["two words", "%a"]'
    job = cluster.submit("--array=1-2", "--nodes=1", arguments=["sweep.txt", "--set", prompts])
    cluster.wait(job)
    assert len(cluster.losses("runs/first")) == len(cluster.losses("runs/second")) == 3
    assert "- two words\n  - '2'" in (cluster.work / "runs/second/config.yaml").read_text()
    # An output file for each.
    assert cluster.output().count("the 72 sequences of steps 1 to 3") == 2


def test_an_array_over_seeds(cluster):
    arguments = [cluster.config("seeds", 2), "--set", "seed=%a", "--run-dir", "runs/seed-%a"]
    job = cluster.submit("--array=5,6", "--nodes=1", arguments=arguments)
    cluster.wait(job)
    assert "seed: 6" in (cluster.work / "runs/seed-6/config.yaml").read_text()
    assert cluster.losses("runs/seed-5") != cluster.losses("runs/seed-6")


def test_a_job_stopped_in_an_array_goes_on(cluster):
    arguments = [cluster.config("element", 250), "--run-dir", "runs/element-%a"]
    job = cluster.submit("--array=1-2", "--nodes=1", arguments=arguments)
    wait_until(lambda: len(cluster.rows("runs/element-2")) > 10, explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_2")
    cluster.wait(job)
    assert cluster.losses("runs/element-1") == cluster.losses("runs/element-2")
    # The other element is left alone, though the last one bears the number of the whole.
    assert [cluster.facts(f"{job}_{k}")["Restarts"] for k in (1, 2)] == ["0", "1"]


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


def test_a_stop_without_a_new_checkpoint_is_the_last(cluster, folder):
    binary = script(folder / "bin/stand-in", STAND_IN)
    job = cluster.submit(arguments=[cluster.config("some", 1)], LOCKSTEP_BIN=str(binary), CODE="75")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    assert "another time would be no better: not queued again" in cluster.output(job)


def test_mpirun_where_srun_has_no_pmix(cluster, alone):
    """And a site's own file, and a clone in another place."""
    path = script(cluster.folder / "no-pmix/srun", NO_PMIX.format(srun=shutil.which("srun"))).parent
    clone = cluster.clone("a clone", site=f"export PATH='{path}':$PATH\n")
    config = cluster.config("mpirun", 150)
    options = ["--nodes=2", "--ntasks=3"]
    job = cluster.submit(*options, script=clone / "slurm/train.sbatch", arguments=[config])
    # It stops and goes on here, too: mpirun hands the signal on.
    wait_until(lambda: cluster.rows("runs/mpirun"), explain=cluster.situation)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job)
    assert "mpirun starts 3 x lockstep train, at most 2 on a node" in cluster.output(job)
    assert "resuming from" in cluster.output(job)
    assert {row["world_size"] for row in cluster.rows("runs/mpirun")} == {"3"}
    for found, expected in zip(cluster.losses("runs/mpirun")[:50], alone, strict=True):
        assert float(found) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_nodes_with_a_network_that_leads_nowhere(cluster):
    """Each has a docker0 with the same address, as Docker makes it; Open MPI alone would fail."""
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
        # What the user says stands.
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
            del cluster.environment[name]
    finally:
        cluster.environment["LOCKSTEP_BIN"] = str(BINARY)
        for node in (1, 2):
            cluster.call("ip", "-n", f"lockstep{number}-n{node}", "link", "delete", "docker0")


def test_scaling_runs_each_number_of_ranks(cluster):
    arguments = [cluster.config("scaling", 99), "--set", "train.steps=3"]
    job = cluster.submit("--nodes=3", script=ROOT / "slurm/scaling.sbatch", arguments=arguments)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job, "scaling")
    tokens = {}
    for kind in ("strong", "weak"):
        for ranks in (1, 2, 3):
            run = f"runs/scaling-{job}/{kind}-{ranks}"
            rows = cluster.rows(run)
            assert [row["world_size"] for row in rows] == [str(ranks)] * 3
            tokens[kind, ranks] = int(rows[-1]["tokens"])
            assert (cluster.work / run / "config.yaml").exists()
            assert f"{run}\n" in cluster.output(job, "scaling")
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
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job, "scaling")
    assert "the batch is 18, not 20" in cluster.output(job, "scaling")


def test_compare_is_one_task_with_all_cores(cluster, folder):
    binary = script(folder / "bin/stand-in", STAND_IN)
    arguments = [cluster.config("some", 1), "--steps", "9"]
    job = cluster.submit(
        script=ROOT / "slurm/compare.sbatch", arguments=arguments, LOCKSTEP_BIN=str(binary)
    )
    cluster.wait(job)
    said = cluster.output(job, "compare")
    expected = f"--config some.yaml --devices=cpu,cuda --out=compare-{job}.csv --steps 9\n"
    assert f"rank 0, 2 CPUs, 1 threads, word : compare {expected}" in said
    assert said.count("rank ") == 1


def test_one_rank_for_each_gpu(folder):
    """On a cluster beside the first, whose site wants two GPUs, and says so in its file."""
    (folder / "gpus").mkdir()
    cluster = start(folder / "gpus", 1, 4, 2)
    try:
        site = "export SBATCH_GPUS_PER_NODE=2 WORD='from the site'"
        clone = cluster.clone("clone", site=f"{site}\nmodule_that_fails\n")
        binary = script(folder / "bin/stand-in", STAND_IN)
        environment = {"LOCKSTEP_BIN": str(binary)}
        del cluster.environment["OMP_NUM_THREADS"]
        train = clone / "slurm/train.sbatch"
        arguments = [cluster.config("some", 1)]
        sourced = f". '{clone}/slurm/site.sh' 2>/dev/null; sbatch --parsable '{train}' some.yaml"
        cluster.environment.update(environment)
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
    finally:
        cluster.close()


def test_shaped_links(cluster):
    number = (cluster.state / "number").read_text().strip()

    def round_trip_s():
        begin = time.monotonic()
        socket.create_connection((f"10.77.{number}.11", 26800)).close()
        return time.monotonic() - begin

    def megabytes_per_s():
        """From one node to another, by the sender's clock, from its connection to the answer."""
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
        # One direction passes through the node's own interface.
        assert round_trip_s() > 0.08
    finally:
        assert cluster.launch("shape", "off").returncode == 0
    assert min(round_trip_s() for _ in range(5)) < 0.08
    assert megabytes_per_s() > 6


def test_a_cancelled_job_stays_cancelled(cluster):
    job = cluster.submit(arguments=[cluster.config("cancelled", 5000)])
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


def test_down_leaves_nothing_behind(folder):
    (folder / "short").mkdir()
    cluster = start(folder / "short", 2)
    number = (cluster.state / "number").read_text().strip()
    try:
        # A process of a node that would outlive its job.
        cluster.submit("--nodes=1", "--wrap=setsid sleep 1000 & sleep 0.1", script="--quiet")
        time.sleep(1)
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
