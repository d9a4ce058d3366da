"""The numbers of a run, as rows of metrics.jsonl, and how fast they come."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.device import peak_flops


class Metrics:
    """A row for each logged step and for each evaluation, to metrics.jsonl and to a tracker. One process writes."""

    def __init__(self, folder: Path, log_every: int, device: torch.device, precision: str, world: int):
        self.folder, self.log_every = folder, log_every
        self.device, self.precision, self.world = device, precision, world
        self.last = 0  # the number of steps of the run; ``Run.steps`` knows it
        self.flops_per_token = 0.0  # of a training token; the banner knows it
        self.tracker: Callable[[dict | None], None] | None = None
        self._peak: float | None = None
        self._tokens = self._seconds = 0.0
        self._started = self._mark = time.perf_counter()

    def seconds(self) -> float:
        """Since this run was started."""
        return time.perf_counter() - self._started

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a checkpoint) is not the training's speed."""
        self._mark = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether ``step``, counted from 0, gets a row by itself: the first, the last, and every ``log_every``-th."""
        return (step + 1) % self.log_every == 0 or step in (0, self.last - 1)

    def step_row(self, step: int, tokens: int, always: bool, metrics: dict) -> dict | None:
        """The row of a step, counted from 0, with the speed since the last row; None if it gets none."""
        self._tokens += tokens
        self._seconds += time.perf_counter() - self._mark
        self._mark = time.perf_counter()
        if not (always or self.due(step)):
            return None
        row = {"step": step + 1} | numbers(metrics)
        if self._tokens:
            self._seconds += time.perf_counter() - self._mark  # reading the values waited for the device
            row["tokens_per_second"] = self._tokens / self._seconds
            if self._peak is None:
                self._peak = peak_flops(self.device, self.precision)
            row["mfu"] = self.flops_per_token * row["tokens_per_second"] / (self._peak * self.world)
        self._tokens = self._seconds = 0.0
        self._mark = time.perf_counter()
        return row

    def write(self, row: dict) -> None:
        row["time"] = round(self.seconds(), 3)
        with open(self.folder / "metrics.jsonl", "a") as file:
            known = {name: value if math.isfinite(value) else None for name, value in row.items()}
            file.write(json.dumps(known) + "\n")  # JSON knows no NaN: what is unknown, or no number any more, is null
        if self.tracker is not None:
            self.tracker(row)


def numbers(metrics: dict) -> dict[str, float]:
    """Tensors and numbers as floats, without what is None."""
    return {name: float(value) for name, value in metrics.items() if value is not None}


def whole_row(line: str) -> dict | None:
    """A line of metrics.jsonl; None if a crash cut it off, or if it is none of ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if known else None
