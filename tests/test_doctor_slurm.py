"""`lockstep doctor` on a real Slurm of two nodes, healthy and with injected faults."""

import shutil
import subprocess

import pytest

from virtual_cluster import BINARY, ROOT, script

pytestmark = [pytest.mark.full, pytest.mark.slurm]

VARIABLE = "OMPI_MCA_btl_tcp_if_include"


def doctor(cluster, *arguments, options=("--mpi=pmix", "-N2", "-n2"), **environment):
    """Runs it on the nodes; returns the exit code and its stdout."""
    command = ["srun", "--nodelist=n[1-2]", *options]
    command += [ROOT / "launch/rank", "-q", "doctor", *arguments]
    work = cluster.folder / "doctor"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        list(map(str, command)),
        cwd=work,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout, done.stderr)
    assert not (work / "runs").exists(), "it left something in the run directory"
    return done.returncode, done.stdout


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_job_that_is_well(cluster, ranks):
    code, report = doctor(cluster, options=["--mpi=pmix", "-N2", f"-n{ranks}"])
    assert code == 0
    assert report.endswith("verdict:    this job can train\n")
    assert f"launcher    srun, tasks: {ranks}, nodes: 2\n" in report
    assert "PMI         PMIx " in report
    rows = [line.split()[:3] for line in report.splitlines() if line.endswith("cpu")]
    places = [["0", "n1", "0"], ["1", "n1", "1"], ["2", "n2", "0"]]
    assert rows == (places if ranks == 3 else [["0", "n1", "0"], ["1", "n2", "0"]])
    assert f"{ranks} of {ranks} ranks see rank 0's file there" in report


@pytest.mark.parametrize("pmi", ["none", "pmi2"])
def test_no_pmi_that_mpi_understands(cluster, pmi):
    code, report = doctor(cluster, options=[f"--mpi={pmi}", "-N2", "-n2"])
    assert code == 2
    assert "remedy: " in report
    assert "start the ranks with `srun --mpi=pmix`, which this Slurm has" in report
    assert "verdict:    this job cannot train: 1 fault" in report


def test_a_node_without_the_shared_folder(cluster):
    # Each node has its own /tmp.
    code, report = doctor(cluster, "--run-dir", "/tmp/runs")
    assert code == 6
    assert "fault:      rank 1 on n2: does not see in /tmp/runs what rank 0 wrote" in report
    assert "remedy: name a folder that every node mounts" in report


def test_another_binary_on_one_node(cluster):
    folder = cluster.folder / "doctor"
    folder.mkdir(exist_ok=True)
    other = folder / "other"
    shutil.copy(BINARY, other)
    with other.open("ab") as file:
        file.write(b"x")
    text = f'#!/bin/sh\n[ "$SLURM_PROCID" = 1 ] && exec {other} "$@"\nexec {BINARY} "$@"\n'
    code, report = doctor(cluster, LOCKSTEP_BIN=str(script(folder / "either", text)))
    assert code == 6
    assert "fault:      rank 1 on n2 with another binary (by SHA-256) than rank 0" in report
    assert "remedy: build once" in report


@pytest.mark.parametrize(
    ("interface", "fault"),
    [
        ("nosuch0", "on n2: {variable}=nosuch0 names no interface of this node; it has eth0 10."),
        ("lo", "on n2: {variable}=lo names the loopback, which reaches no other node"),
        # Like docker0, which has the same address everywhere.
        ("same0", "n1 does not reach n2 through same0 at 172.17.0.1"),
        ("apart0", "n1 does not reach n2 through apart0 at 172.30.2.1"),
    ],
)
def test_a_wrong_interface(cluster, interface, fault):
    number = (cluster.state / "number").read_text().strip()
    made = interface in ("same0", "apart0")
    for node in (1, 2):
        ip = ["ip", "-n", f"lockstep{number}-n{node}"]
        address = "172.17.0.1/16" if interface == "same0" else f"172.30.{node}.1/24"
        if made:
            cluster.call(*ip, "link", "add", interface, "type", "bridge")
            cluster.call(*ip, "address", "add", address, "dev", interface)
            cluster.call(*ip, "link", "set", interface, "up")
    try:
        code, report = doctor(cluster, **{VARIABLE: interface})
        assert code == 6
        assert fault.format(variable=VARIABLE) in report
        assert f"remedy: set {VARIABLE} to the interface" in report
        # launch/rank names the right network if nobody else names one.
        assert doctor(cluster)[0] == 0
    finally:
        for node in (1, 2) if made else ():
            cluster.call("ip", "-n", f"lockstep{number}-n{node}", "link", "delete", interface)
