"""What ranks do if their GPUs or NCCL fail, on the emulated GPU, which fails on demand.

Each fault ends with its documented exit code and names the rank. The same command then resumes, and
ends as if nothing had happened.
"""

import pytest

from emulation import Emulation
from runs import same

pytestmark = pytest.mark.full

DEADLINE_S = 3
SETTINGS = {
    "deterministic": "true",
    "model.dropout": 0.1,
    "comm.bucket_mib": 1,
    "train.steps": 12,
    "train.save_every": 4,
    "fault.step_deadline_s": DEADLINE_S,
}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module", params=[{}, {"optim.zero1": "true"}], ids=["", "ZeRO-1"])
def undisturbed(gpu, request):
    """Settings, and an undisturbed run with them."""
    settings = SETTINGS | request.param
    done = gpu.train(f"undisturbed-{len(request.param)}", settings, 2)
    assert done.code == 0, done.log
    return settings, done


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("nccl-error:9@1", 6, "a peer was lost (emulated)"),
        ("nccl-error:9@1,nccl-abort-hang@1", 6, "a peer was lost (emulated)"),
        ("nccl-hang:9@1", 6, "took longer than 3 s"),
        ("nccl-hang:9@0,nccl-abort-hang@0", 6, "took longer than 3 s"),
        ("nccl-slow:1@1", 6, "took longer than 3 s"),
        ("nccl-kill:9@1", 137, ""),
        ("nccl-kill:1@0", 137, ""),
        ("oom:1000@1", 2, "not enough memory"),
    ],
)
def test_ranks_end_together_and_go_on(gpu, undisturbed, request, fault, code, said):
    settings, expected = undisturbed
    name = request.node.name.replace(":", "-")
    done = gpu.train(name, settings, 2, EMULATED_GPU_FAULT=fault)
    assert done.code == code, done.log
    if said:
        rank = fault[-1]
        # Both ranks may be late at the same time, and then each says what it knows.
        lines = [line for line in done.log.splitlines() if said in line]
        assert any(f"rank {rank}" in line for line in lines), done.log
    again = gpu.train(name, settings, 2)
    assert again.code == 0, again.log
    same(again.run, expected.run, f"step-{SETTINGS['train.steps']:08}")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("driver", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        ("old-driver", "12.2"),
        ("no-device", "finds no GPU"),
        ("oom:1", "not enough memory (CUDA out of memory. Tried to allocate"),
        ("oom:500", "use a smaller data.micro_batch"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_the_users_to_mend(gpu, request, fault, said):
    done = gpu.train(request.node.name, {"train.steps": 3}, EMULATED_GPU_FAULT=fault)
    assert done.code == 2, done.log
    assert said in done.log


@pytest.mark.parametrize("fault", ["driver", "old-driver"])
def test_auto_computes_on_the_cpu_and_says_why(gpu, request, fault):
    settings = {"train.steps": 2, "device": "auto"}
    done = gpu.train(request.node.name, settings, EMULATED_GPU_FAULT=fault)
    assert done.code == 0, done.log
    assert "computing on the CPU of a machine with an NVIDIA driver" in done.log


@pytest.mark.parametrize(
    ("visible", "ranks", "code"), [("0", 2, 2), ("", 1, 2), ("3,1", 2, 0), ("0,1,2", 4, 2)]
)
def test_ranks_take_the_gpus_that_they_see(gpu, request, visible, ranks, code):
    variables = {"CUDA_VISIBLE_DEVICES": visible, "EMULATED_GPU_DEVICES": "4"}
    done = gpu.train(request.node.name, {"train.steps": 2}, ranks, **variables)
    assert done.code == code, done.log
    if visible == "0":
        assert "ranks 0 and 1 share the GPU 0000:10:00" in done.log
    if ranks == 4:
        assert "only 3 GPUs are visible" in done.log
