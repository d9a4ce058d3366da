"""Shared by all tests: the numbers of the reference libraries, and the switch for slow tests."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test waits for a network

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


def load_npz(name: str) -> dict[str, torch.Tensor]:
    """tests/fixtures/<name>.npz as tensors."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def load_json(name: str):
    return json.loads((FIXTURES / name).read_text())
