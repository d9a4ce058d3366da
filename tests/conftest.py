"""Shared by all tests: the numbers of the reference libraries, and the switch for slow tests."""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, a core for each process
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test waits for a network

import numpy as np
import pytest
import torch

from runtime import plots
from runtime.checkpoint import write_atomically

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="module", autouse=True)
def small_pictures(request):
    """Every run of a stage ends with a picture, which takes longer than a tiny run: outside test_plots it is small."""

    import matplotlib.pyplot as plt

    def save(figure, path):
        figure.set_layout_engine("none")
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=10, format="png"))
        plt.close(figure)

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_plots":
            patch.setattr(plots, "_save", save)
        yield


def load_npz(name: str) -> dict[str, torch.Tensor]:
    """tests/fixtures/<name>.npz as tensors."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def load_json(name: str):
    return json.loads((FIXTURES / name).read_text())
