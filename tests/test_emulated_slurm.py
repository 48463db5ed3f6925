"""Jobs with GPUs on a real Slurm from launch/cluster, whose nodes have emulated GPUs."""

import pytest

from emulation import Emulation, apart

pytestmark = [pytest.mark.full, pytest.mark.slurm]


@pytest.fixture(scope="module")
def gpu(gpu_nodes):
    """The emulation, in a folder that the nodes can see."""
    folder = gpu_nodes.folder / "emulation"
    folder.mkdir()
    return Emulation(folder)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (["--nodes=2", "--gpus-per-node=2"], 4),
        (["--nodes=1", "--gpus-per-node=2"], 2),
        (["--nodes=1", "--ntasks=2", "--gpus-per-task=1"], 2),
    ],
    ids=["two nodes", "one node", "a GPU a task"],
)
def test_a_job_with_gpus_has_a_rank_on_each(gpu_cluster, gpu, options, ranks):
    cluster = gpu_cluster
    cluster.environment |= {"LOCKSTEP_BIN": str(gpu.binary), "EMULATED_GPU_DEVICES": "2"}
    run = "runs/" + "".join(options)
    arguments = [gpu.config, "--set", "device=cuda", "--set", "optim.zero1=true", "--run-dir", run]
    job = cluster.submit(*options, arguments=arguments)
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    assert f"{ranks} x lockstep train" in cluster.output(job)
    assert "Emulated GPU" in cluster.output(job)
    rows = cluster.rows(run)
    assert {row["world_size"] for row in rows} == {str(ranks)}
    losses = [float(row["loss"]) for row in rows]
    assert apart(losses, gpu.on_cpu({}).column("loss")) < 1e-5
