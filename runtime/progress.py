"""The loop of a run as a user sees it: a bar, Ctrl-C, and, if asked for, a profile."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm


def printable(text: str) -> str:
    r"""A model may write any bytes, and some of them steer a terminal: those, and marks that turn the direction of
    text around, are shown as escapes, and so is half of a surrogate pair. Line ends and tabs stay.

    >>> printable("a\x1b[2Jb\r\n")
    'a\\x1b[2Jb\\r\n'
    """
    steering = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(steering, lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Names:
    """What a run is called on the screen, as a part of something larger."""

    title: str  # above its banner
    bar: str  # before its bar
    name: str  # in its last line


_names: Names | None = None


@contextlib.contextmanager
def called(title: str, bar: str, name: str) -> Iterator[None]:
    """Runs that start inside have these names, and name no next command: who starts them knows what is next."""
    global _names
    before, _names = _names, Names(title, bar, name)
    try:
        yield
    finally:
        _names = before


class Progress:
    def __init__(self, stage: str, folder: Path, world: int, is_main: bool):
        self.folder, self.world, self.is_main = folder, world, is_main
        self.part = _names is not None  # of something larger
        self.names = _names or Names(stage, stage, stage)
        self.interrupted = False  # Ctrl-C has been pressed ...
        self.saved_for_stop = False  # ... and what was done until then is saved
        self.bar: tqdm | None = None

    def print(self, text: str) -> None:
        """A line above the bar, in one process."""
        if self.is_main:
            tqdm.write(printable(text))  # some of it a model has written
            sys.stdout.flush()

    def show(self, row: dict, names: tuple[str, ...]) -> None:
        """Those of a row's metrics, and its speed, on the bar."""
        if self.bar is not None and names:
            speed = {"tok/s": f"{row['tokens_per_second']:,.0f}"} if "tokens_per_second" in row else {}
            self.bar.set_postfix({k: f"{row[k]:.3f}" for k in names if k in row} | speed, refresh=False)

    def steps(self, first: int, last: int, profile_steps: int, device: torch.device) -> Iterator[int]:
        """first, first + 1, ..., last - 1 under a progress bar. Ctrl-C finishes the step, which saves, and stops; a
        second one stops at once, as the first does under torchrun. Of ``profile_steps`` steps a trace is written.
        """
        before = {}
        if self.world == 1 and threading.current_thread() is threading.main_thread():

            def interrupt(number, frame):
                self.interrupted = True
                for n, handler in before.items():
                    signal.signal(n, handler)
                os.write(2, b"\nfinishing this step, then saving (again to stop at once)\n")  # print is not reentrant

            before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        profiler = start_profiler(profile_steps, device) if profile_steps and self.is_main else None
        self.bar = tqdm(
            total=last,
            initial=first,
            desc=self.names.bar,
            disable=not self.is_main,
            dynamic_ncols=True,
            mininterval=0.5,
        )  # fmt: skip
        try:
            for step in range(first, last):
                yield step
                self.bar.update()
                if profiler is not None:
                    profiler.step()
                if self.saved_for_stop:  # pressed too late for this step's save: the next step saves
                    raise KeyboardInterrupt
        finally:
            self.bar.close()
            if profiler is not None:
                profiler.__exit__(None, None, None)
                profiler.export_chrome_trace(str(self.folder / "trace.json"))
                self.print(f"profile: {self.folder / 'trace.json'} (open it in ui.perfetto.dev)")
            for n, handler in before.items():
                signal.signal(n, handler)


def start_profiler(steps: int, device: torch.device):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule).__enter__()
