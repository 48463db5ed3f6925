"""Training on the emulated GPU: what can be proved without a real one.

The unchanged binary computes there what it computes on CPUs, and every memory access is checked
for races. tests/emulated_gpu/README.md explains how far that goes.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from statistics import mean

import pytest

import gpu_step
from emulation import BINARY, FAILED, LIBRARIES, ROOT, Emulation, apart, figures

FP32, BF16 = 1e-5, 0.02  # relative, in every step's loss

ZERO1 = {"optim.zero1": "true"}
# Our kernels take their time there: each access to memory is checked.
IN_BF16 = {"precision": "bf16", "train.steps": 6}
SENT_IN_BF16 = {"comm.grad_dtype": "bf16"}
PARAGRAPHS = {"data.layout": "paragraphs"}
SEQUENCES = {"train.loss": "sequence_mean"}
DROPOUT = {"model.dropout": 0.1}
POST = {"model.norm": "post", "model.activation": "relu"}
UNTIED = {"model.tied_head": "false", "model.bias": "false"}
RECOMPUTE = {"model.recompute": "true"}
DETERMINISTIC = {"deterministic": "true"}
MICRO_STEPS = {"data.micro_batch": 2}
NO_OVERLAP = {"comm.overlap": "false"}
# Big enough for several buckets of 1 MiB, which gpt-nano is not. At gpt-nano's rate it leaps at a
# step, which makes much of every rounding.
BUCKETS = {
    "model.preset": "gpt-mini",
    "comm.bucket_mib": 1,
    "train.steps": 10,
    "optim.lr": 3e-4,
}


# A case of the full tier.
full = partial(pytest.param, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    ("ranks", "settings", "bound"),
    [
        (0, {}, FP32),
        full(0, MICRO_STEPS | RECOMPUTE, FP32),
        full(0, PARAGRAPHS | SEQUENCES | UNTIED, FP32),
        full(0, POST | DROPOUT, FP32),
        full(0, DETERMINISTIC | DROPOUT | PARAGRAPHS, FP32),
        full(0, IN_BF16, BF16),
        full(0, IN_BF16 | DROPOUT | PARAGRAPHS | MICRO_STEPS, BF16),
        full(1, DETERMINISTIC, FP32),
        full(2, {}, FP32),
        full(2, MICRO_STEPS | PARAGRAPHS | SEQUENCES, FP32),
        full(2, BUCKETS, FP32),
        full(2, BUCKETS | NO_OVERLAP, FP32),
        (2, BUCKETS | ZERO1 | MICRO_STEPS, FP32),
        full(2, ZERO1 | DROPOUT | DETERMINISTIC | RECOMPUTE, FP32),
        full(2, UNTIED | POST | ZERO1, FP32),
        full(2, SENT_IN_BF16, BF16),
        full(2, IN_BF16 | ZERO1 | SENT_IN_BF16, BF16),
        full(4, DROPOUT, FP32),
        full(4, BUCKETS | ZERO1, FP32),
        full(4, IN_BF16 | BUCKETS | ZERO1 | SENT_IN_BF16 | MICRO_STEPS, BF16),
    ],
    ids=lambda value: (
        ",".join(f"{key.split('.')[-1]}={word}" for key, word in value.items()) or "defaults"
        if isinstance(value, dict)
        else None
    ),
)
def test_gpus_learn_what_cpus_learn(gpu, request, ranks, settings, bound):
    # Only dropout's draws depend on the rank; nothing else that is learnt does.
    expected = gpu.on_cpu(
        {k: v for k, v in settings.items() if k != "precision"},
        ranks if DROPOUT.items() <= settings.items() else 0,
    )
    done = gpu.train(request.node.name, settings, ranks)
    assert done.code == 0, done.log
    found, expected = done.column("loss"), expected.column("loss")
    if bound == BF16 and DROPOUT.items() <= settings.items():
        # Our kernels draw in their own way, so that losses are alike on average only.
        found, expected = [mean(found)], [mean(expected)]
    distance = apart(found, expected)
    assert distance <= bound, distance
    # Something must have been computed differently.
    if bound == BF16:
        assert distance > 1e-7
    print(f"{ranks} ranks, {settings}: {distance:.1e}")


@pytest.mark.full
def test_memory_is_seen_and_smaller_micro_batches_need_less(gpu):
    """memory_mib is the allocator's own count."""
    plain = gpu.train("memory", {"train.steps": 2})
    micro = gpu.train("memory-micro", {"train.steps": 2} | MICRO_STEPS)
    [most], [least] = (set(done.column("memory_mib")[1:]) for done in (plain, micro))
    # Weights, gradients and two moments, 4 bytes each.
    parameters = 110448
    assert 16 * parameters / 2**20 < least < most


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (0, MICRO_STEPS),
        full(0, MICRO_STEPS | PARAGRAPHS | SEQUENCES | IN_BF16),
        full(2, BUCKETS | ZERO1 | MICRO_STEPS),
    ],
    ids=["alone", "padded, in bf16", "two ranks, ZeRO-1"],
)
def test_the_host_waits_for_the_gpu_once_a_step(gpu, tmp_path, request, ranks, settings):
    """Waits that leave the GPU with nothing to do, in a run of 4 steps and in one of 8."""
    waits = {}
    for steps in (4, 8):
        log = tmp_path / str(steps)
        name, settings = f"{request.node.name}-{steps}", settings | {"train.steps": steps}
        done = gpu.train(name, settings, ranks, EMULATED_GPU_LOG=str(log))
        assert done.code == 0, done.log
        waits[steps] = {name: n for name, n in figures(log).items() if name.startswith("waits")}
        # Before the first step, the measurement of the peak runs as many as it has time for.
        waits[steps].pop("waits after aten::mm.out", None)
    more = {name: n - waits[4].get(name, 0) for name, n in waits[8].items()}
    assert sum(more.values()) == 4, more


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, {"attention_cudnn"}),
        ({"model.dropout": 0.125}, {"attention_cudnn"}),
        ({"model.dropout": 0.1}, {"attention_flash"}),
        (PARAGRAPHS, {"attention_flash"}),
        (DETERMINISTIC, {"attention_flash"}),
        ({"train.sample_every": 2, "train.eval_every": 2}, {"attention_cudnn", "attention_flash"}),
    ],
    ids=["no dropout", "two sixteenths", "a tenth", "padded", "deterministic", "with samples"],
)
def test_cudnns_attention_is_for_one_shape_and_sixteenths(
    gpu, tmp_path, request, settings, kernels
):
    """It rounds dropout to sixteenths, and needs a new plan for each shape (samples, padding)."""
    log = tmp_path / "log"
    settings = IN_BF16 | {"train.steps": 2, "model.preset": "gpt-micro"} | settings
    done = gpu.train(request.node.name, settings, EMULATED_GPU_LOG=str(log))
    assert done.code == 0, done.log
    seen = {name: n for name, n in figures(log).items() if name.startswith("attention")}
    assert set(seen) == kernels
    if "attention_cudnn" in kernels:
        # 2 steps of one micro-batch, 4 layers.
        assert seen["attention_cudnn"] == 2 * 4


@pytest.mark.full
def test_the_whole_of_a_run_on_a_gpu(gpu, tmp_path):
    """A run evaluates, saves, samples and generates text, and is compared with the CPU."""
    settings = {
        "train.eval_every": 10,
        "train.save_every": 10,
        "train.sample_every": 30,
        **DETERMINISTIC,
    }
    done = gpu.train("whole", settings)
    assert done.code == 0, done.log
    assert (done.run / "samples/step-00000030.txt").read_text().strip()
    expected = gpu.on_cpu({"train.eval_every": 10})
    assert apart(done.column("loss", "eval.csv"), expected.column("loss", "eval.csv")) < FP32

    said = gpu.call(["eval", "--run-dir", done.run, "--checkpoint", "latest"])
    assert said.code == 0, said.log
    header, row = (line.split(",") for line in said.out.splitlines())
    loss = float(dict(zip(header, row, strict=True))["loss"])
    assert loss == pytest.approx(done.column("loss", "eval.csv")[-1], rel=1e-6)

    generate = ["generate", "--run-dir", done.run, "--prompt", " The river", "--tokens", "20"]
    texts = [gpu.call(generate) for _ in range(2)]
    assert texts[0].code == 0, texts[0].log
    assert len(texts[0].out) > 20
    assert texts[0].out == texts[1].out

    table = tmp_path / "compare.csv"
    compare = ["compare", "--config", gpu.config, "--steps", "12", "--out", table]
    said = gpu.call([*compare, "--devices", "cpu,cuda"])
    assert said.code == 0, said.log
    cpu, cuda = (line.split(",") for line in table.read_text().splitlines()[1:])
    assert (cpu[0], cuda[0]) == ("cpu", "cuda")
    assert float(cuda[6]) == pytest.approx(float(cpu[6]), rel=FP32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "more"),
    [(0, {}), (0, {"precision": "bf16"}), (2, ZERO1)],
    ids=["alone", "bf16", "ZeRO-1"],
)
def test_a_run_resumes_bit_for_bit(gpu, tmp_path, ranks, more):
    settings = DETERMINISTIC | DROPOUT | {"device": "cuda", "name": "proof"} | more
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    arguments = ["checkpoint", "prove", "--config", gpu.config, "--steps", "10", *words]
    # It writes its runs to runs/ in its working folder.
    done = gpu.call(arguments, ranks, cwd=tmp_path)
    assert done.code == 0, done.log + done.out


@pytest.mark.full
@pytest.mark.parametrize("ranks", [0, 2])
def test_doctor_finds_no_fault(gpu, ranks):
    done = gpu.call(["doctor", "--run-dir", gpu.folder / "runs"], ranks)
    assert done.code == 0, done.out + done.log
    assert "this job can train" in done.out
    assert "Emulated GPU" in done.out
    if ranks:
        assert f"ranks: {ranks}" in done.out
        assert "every sum is compared" in done.out and "through NCCL" in done.out


@pytest.mark.full
def test_ranks_that_share_a_gpu_are_refused(gpu):
    done = gpu.train("shared", {}, 2, CUDA_VISIBLE_DEVICES="1")
    assert done.code == 2, done.log
    assert "ranks 0 and 1 share the GPU 0000:11:00" in done.log


# ---- The emulation catches mistakes ----


@pytest.mark.parametrize(
    ("mutation", "operator"),
    [
        ("ignore-waits-of-nccl", "nccl"),
        ("ignore-waits-of-libtorch", "aten::"),
    ],
)
@pytest.mark.parametrize(
    "settings", [{}, full(ZERO1), full(SENT_IN_BF16)], ids=["fp32", "ZeRO-1", "bf16"]
)
def test_streams_that_do_not_wait_are_caught(gpu, request, mutation, operator, settings):
    """The driver ignores the waits between streams that comm/nccl.rs asks for."""
    done = gpu.train(request.node.name, settings, 2, EMULATED_GPU_FAULT=mutation)
    assert done.code != 0
    race = next(line for line in done.log.splitlines() if "RACE" in line)
    first, last = race.split("RACE: ")[1].split("were last touched by ")
    assert first.startswith(operator), race
    assert "bytes at 0x" in first
    assert last.startswith("aten::" if operator == "nccl" else "nccl"), race


def test_an_operator_that_cuda_lacks_is_refused(gpu, tmp_path):
    libraries = tmp_path / "libraries"
    shutil.copytree(LIBRARIES, libraries, symlinks=True)
    names = (LIBRARIES / "operators.txt").read_text()
    (libraries / "operators.txt").write_text(names.replace("aten::gelu.out\n", ""))
    assert names.count("aten::gelu.out\n") == 1
    done = gpu.call(gpu.arguments("no-gelu", {})[0], binary=gpu.wrap(libraries, "lockstep-no-gelu"))
    assert done.code == FAILED, done.log
    assert "no CUDA kernel for aten::gelu.out" in done.log


def test_deterministic_products_need_cublas_told(gpu):
    """The trainer tells it. A user's own setting is kept, and LibTorch refuses a wrong one."""
    settings = DETERMINISTIC | {"train.steps": 1}
    assert gpu.train("told", settings).code == 0
    done = gpu.train("mistold", settings, CUBLAS_WORKSPACE_CONFIG=":1:1")
    assert done.code == 1, done.log
    assert "CUBLAS_WORKSPACE_CONFIG" in done.log


@pytest.mark.parametrize(
    "settings", [{}, full(UNTIED | PARAGRAPHS)], ids=["tied", "untied, padded"]
)
def test_without_our_kernels_libtorch_computes_the_same(gpu, tmp_path, request, settings):
    """The log says so once. Both ways are as far from fp32 as bf16 is."""
    said = "LibTorch computes without kernels of our own"
    settings = IN_BF16 | {"train.steps": 10} | settings
    ours = gpu.train(f"{request.node.name}-ours", settings, EMULATED_GPU_LOG=str(tmp_path / "ours"))
    theirs = gpu.train(
        f"{request.node.name}-theirs",
        settings,
        EMULATED_GPU_LOG=str(tmp_path / "theirs"),
        EMULATED_GPU_FAULT="no-kernels",
        XDG_CACHE_HOME=str(tmp_path / "empty"),
    )
    assert (ours.code, theirs.code) == (0, 0), ours.log + theirs.log
    assert (ours.log.count(said), theirs.log.count(said)) == (0, 1), theirs.log
    ours_log, theirs_log = figures(tmp_path / "ours"), figures(tmp_path / "theirs")
    assert ours_log["launches of cross_entropy"] == 10
    assert "launches of cross_entropy" not in theirs_log
    assert 0 < apart(ours.column("loss"), theirs.column("loss")) < BF16 / 4


@pytest.mark.parametrize("own", [True, False], ids=["our kernels", "LibTorch's way"])
@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        ("gpt-nano", gpu_step.Shape(3, 3, 48, 500, 32, 8, 2)),
        full("gpt-mini", gpu_step.Shape(6, 6, 192, 500, 32, 4, 4)),
    ],
)
def test_a_step_launches_and_moves_what_the_page_says(gpu, tmp_path, request, preset, shape, own):
    """The formulas behind docs/gpu-step.md, for a small model, operator by operator."""
    settings = IN_BF16 | {"model.preset": preset, "data.micro_batch": shape.sequences}
    fault = {} if own else {"EMULATED_GPU_FAULT": "no-kernels", "XDG_CACHE_HOME": str(tmp_path)}
    seen = []
    for steps in (1, 2):
        log = tmp_path / f"log-{steps}"
        name, settings = f"{request.node.name}-{steps}", settings | {"train.steps": steps}
        done = gpu.train(name, settings, EMULATED_GPU_LOG=str(log), **fault)
        assert done.code == 0, done.log
        seen.append(Counter(figures(log)))
    step = {name: n for name, n in (seen[1] - seen[0]).items() if " of " in name}
    launches, moved = Counter(), Counter()
    for one in gpu_step.of_step(shape, own):
        launches[f"launches of {one.name}"] += one.times
        moved[f"bytes of {one.name}"] += one.bytes
    assert launches == {name: n for name, n in step.items() if name.startswith("launches")}
    # What is not counted to the byte: numbers of single rows.
    assert moved == pytest.approx(
        {name: n for name, n in step.items() if name.startswith("bytes")}, rel=0.03, abs=256
    )


def test_compiled_kernels_are_kept(gpu, tmp_path):
    """A second start compiles nothing; what is broken is made again; no cache is no error."""
    settings = IN_BF16 | {"train.steps": 2}
    cache = tmp_path / "cache"

    def train(name, **variables):
        done = gpu.train(f"kept-{name}", settings, XDG_CACHE_HOME=str(cache), **variables)
        assert done.code == 0, done.log
        return "without kernels of our own" not in done.log

    assert train("made")
    [file] = (cache / "lockstep").iterdir()
    whole = file.read_bytes()
    assert train("read", EMULATED_GPU_FAULT="no-kernels")
    file.write_bytes(whole[:1000])
    assert not train("broken", EMULATED_GPU_FAULT="no-kernels")
    assert train("mended")
    assert len(file.read_bytes()) == len(whole)
    assert [file] == list((cache / "lockstep").iterdir())
    shutil.rmtree(cache)
    cache.write_text("a file, where a folder should be")
    assert train("nowhere")


# Runs a kernel over six numbers with so many blocks of three threads.
KERNEL = r"""
import ctypes, sys
from ctypes import byref

libraries, source, blocks = sys.argv[1:]
driver, compiler = (ctypes.CDLL(f"{libraries}/{name}") for name in ("libcuda.so", "libnvrtc.so"))
program, size = ctypes.c_void_p(), ctypes.c_size_t()
assert compiler.nvrtcCreateProgram(byref(program), source.encode(), b"", 0, None, None) == 0
assert compiler.nvrtcCompileProgram(program, 0, None) == 0
assert compiler.nvrtcGetCUBINSize(program, byref(size)) == 0
code = ctypes.create_string_buffer(size.value)
assert compiler.nvrtcGetCUBIN(program, code) == 0
module, function, memory = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuModuleLoadData(byref(module), b"\x7fELF, but no kernel" + bytes(64)) == 200
assert driver.cuModuleLoadData(byref(module), code) == 0
assert driver.cuModuleGetFunction(byref(function), module, b"other") == 500
assert driver.cuModuleGetFunction(byref(function), module, b"work") == 0
assert driver.cuMemAlloc_v2(byref(memory), 24) == 0
numbers = (ctypes.c_float * 6).from_address(memory.value)
numbers[:] = range(6)
parameters = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
size = (int(blocks), 1, 1, 3, 1, 1)
assert driver.cuLaunchKernel(function, *size, 0, None, parameters, None) == 0
print(list(numbers))
"""


@pytest.mark.parametrize(
    ("body", "blocks", "said"),
    [
        ("x[3 * blockIdx.x + threadIdx.x] *= 2;", 2, [0, 2, 4, 6, 8, 10]),
        ("x[3 * blockIdx.x + threadIdx.x] *= 2;", 3, "work reads 4 bytes at"),
        ("if (threadIdx.x) __syncthreads(); else __shfl_xor_sync(7, 1, 1);", 2, "for ever"),
    ],
    ids=["right", "beyond its tensor", "divergent"],
)
def test_the_emulated_processor_runs_kernels_and_finds_their_mistakes(
    gpu, tmp_path, body, blocks, said
):
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    source = f'extern "C" __global__ void work(float* x) {{ {body} }}'
    command = [sys.executable, script, LIBRARIES, source, str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if isinstance(said, str):
        assert done.returncode == FAILED and said in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == said


@pytest.mark.full
def test_gpu_check_passes_and_judges_no_speed(gpu, tmp_path):
    """Runs all of it, as on the first real GPU."""
    record = tmp_path / "record.csv"
    command = [ROOT / "launch/gpu-check", BINARY, "--budget", "1500", "--out", record]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == {"Emulated GPU"}
    for row in rows:
        assert row["result"] == ("NOT RUN" if row["check"] == "speed" else "PASS"), row
    assert {row["check"] for row in rows} > {"first", "devices", "resume", "ranks", "fault"}
