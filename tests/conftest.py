"""Fixtures that several test files share: Slurm clusters, started once a session."""

import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from virtual_cluster import BINARY, ROOT, start

# Whoever ends the tests, such as launch/test, should not leave their processes and clusters behind.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def session_of(*size):
    """A cluster of this size (nodes, cores, GPUs) for the whole session, with a data folder."""
    (ROOT / "target").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir=ROOT / "target"))
    cluster = start(folder, *size)
    try:
        assert BINARY.exists(), f"{BINARY} is not there; build it: cargo build --release"
        command = [BINARY, "prepare", "--source", "sample", "--tokenizer", "bpe:512"]
        cluster.call(*command, "--out", "../data")
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nodes():
    """Three nodes of two cores."""
    yield from session_of(3)


@pytest.fixture(scope="session")
def gpu_nodes():
    """Two nodes of four cores and two GPUs, which exist in Slurm's books only."""
    yield from session_of(2, 4, 2)


@pytest.fixture
def cluster(nodes):
    """Three nodes of two cores, with an environment that the test may change."""
    with nodes.own_environment():
        yield nodes


@pytest.fixture
def gpu_cluster(gpu_nodes):
    """Two nodes of four cores and two GPUs, with an environment that the test may change."""
    with gpu_nodes.own_environment():
        yield gpu_nodes
