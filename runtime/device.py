"""Where the numbers live: the device, its precision, its threads, and whether compiling pays."""

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch

from runtime.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch has no MPS device; use --device cpu")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32; --precision bf16 is the fast one
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """auto: bf16 on a GPU that has it, fp16 on an older one, fp32 elsewhere (a CPU without bf16 units is slower in
    bf16).
    """
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16 is for GPUs; on a CPU use fp32 or bf16")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def autocast(device: torch.device, precision: str):
    """Matrix products in ``precision``; weights, and everything that is summed for a log-probability, stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler and Python's headers, and on a GPU Triton."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))
    if device.type == "cuda":
        try:
            import triton  # noqa: F401

            return any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang", "cc"))
        except ImportError:
            return False
    return False


def compile_blocks(model, dynamic: bool | None = None) -> None:
    """Compile the blocks in place, for training. They have one shape, so one compilation serves all of them; names and
    weights stay what they are, and whoever calls ``forward_hidden`` gets the compiled blocks (generation goes past
    them). Compiling all of ``forward_hidden`` or of ``token_logps`` takes longer to warm up and runs no faster.
    """
    for block in model.blocks:
        block.compile(dynamic=dynamic)
    if model.embed.weight.device.type == "cuda":  # casts, softmax and gather in one pass over the logits
        model.compiled_logps = torch.compile(model.compiled_logps, dynamic=True)


def keep_freed_memory() -> bool:
    """Let this process keep large blocks of memory that were freed, rather than return them to the kernel.

    A step frees its activations, and the next one asks for the same sizes again; to be given pages anew, each of them
    zeroed, can cost as much as the arithmetic on them. Only glibc is like that, so only there something is done; and
    nothing if the environment sets up malloc already. Returns whether it was done.
    """
    if not sys.platform.startswith("linux") or any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    if mallopt is None or mallopt(trim_threshold, 2**31 - 1) != 1:
        return False
    return mallopt(mmap_threshold, 2**30) == 1 or mallopt(mmap_threshold, 2**25) == 1  # older ones allow no more


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Dense 16-bit (or, for MPS and unknown cards, measured) peak in floating-point operations per second, from the
# vendors' data sheets. The first name that a card's name holds counts, so longer ones stand above.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, precision: str) -> float:
    """What the device could do at best: the data sheet for known GPUs in 16 bits, else a large matrix product,
    timed.
    """
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for card, peak in _PEAKS.items():
            if card in name:
                return peak
    n = 1024 if device.type == "cpu" else 4096
    a = torch.ones(n, n, device=device, dtype=PRECISIONS[precision])  # not random: a run's dice are its own
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
