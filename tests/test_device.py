"""Devices: what does not need one. The rest is tested where it is used."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from runtime import run
from runtime.device import peak_flops

FAULTS = """
import resource, sys, torch
from runtime.device import keep_freed_memory
done = keep_freed_memory()
for i in range(28):
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(2**24)  # 64 MiB
    y = x + x
    del x, y
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment) -> tuple[bool, int]:
    """Whether freed memory is kept, and the pages that 24 rounds of two tensors asked the kernel for."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done, faults = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=Path(__file__).parent.parent, env=clean | environment, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return done == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again_without_asking_the_kernel():
    done, faults = page_faults()
    left_alone, anew = page_faults(MALLOC_ARENA_MAX="4")  # a user's own settings are
    assert done and not left_alone
    assert (
        anew > 768 and faults <= anew / 4
    )  # 786,432 small pages come anew, or 1,536 huge ones; kept, a few blocks may


def test_every_run_on_a_cpu_keeps_it(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(run, "pick_device", lambda name, local: torch.device("cpu"))
    run.start(pretrain.Config(out_dir=str(tmp_path / "a"), device="cpu"), "pretrain")
    assert called == [True]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_exact_card(monkeypatch, name, peak):
    """The first entry that the name holds is the one that counts: A100 is not A10, L40 is not L4."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
