"""What the NVIDIA driver and NCCL report about this machine.

They are asked in a separate process: the loader reads LD_LIBRARY_PATH when a process starts, a
driver that hangs or crashes must not take the checks down with it, and CUDA must not be initialised
in the process that starts all others.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass

SECONDS = 60  # a driver that was not in use can take 10 to come up


@dataclass
class Gpu:
    """The first GPU that a program may use; if there is none, `problem` says why."""

    name: str = ""
    memory_mib: int | str = ""
    cuda: str = ""  # the newest CUDA that the driver knows
    problem: str = ""

    @property
    def emulated(self):
        """Whether it is the tests' stand-in, whose speed and memory mean nothing."""
        return self.name.startswith("Emulated")


def ask(what, environment):
    """What a process with these variables finds: a dictionary, or a text that says what failed."""
    command = [sys.executable, __file__, what]
    options = {"capture_output": True, "text": True, "timeout": SECONDS}
    try:
        done = subprocess.run(command, env=environment, check=False, **options)
    except subprocess.TimeoutExpired:
        return f"its driver did not answer within {SECONDS} s"
    try:
        return json.loads(done.stdout)
    except ValueError:
        return f"asking its driver ended with exit code {done.returncode}"


def find_gpu(environment):
    """The GPU that programs with these variables use."""
    said = ask("gpu", environment)
    return Gpu(problem=said) if isinstance(said, str) else Gpu(**said)


def nccl_version(environment):
    """The version of the libnccl.so that programs with these variables load; empty if unknown."""
    said = ask("nccl", environment)
    return said["nccl"] if isinstance(said, dict) else ""


def gpu():
    """Asks the driver library, since WSL2 has the library but no device files."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"its driver library cannot be loaded ({error})"
    number, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    if code := cuda.cuInit(0):
        return f"its driver says CUDA error {code} (cuInit)"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    if not number.value:
        return "its driver shows no device; is CUDA_VISIBLE_DEVICES empty?"
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDriverGetVersion(ctypes.byref(number))
    return {
        "name": name.value.decode(errors="replace"),
        "memory_mib": memory.value >> 20,
        "cuda": f"{number.value // 1000}.{number.value % 1000 // 10}",
    }


def nccl():
    """The version as NCCL itself reports it, for example 2.28.9."""
    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so").ncclGetVersion(ctypes.byref(number))
    major, rest = divmod(number.value, 10000)
    return {"nccl": f"{major}.{rest // 100}.{rest % 100}"}


if __name__ == "__main__":
    print(json.dumps({"gpu": gpu, "nccl": nccl}[sys.argv[1]]()))
