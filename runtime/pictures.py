"""The picture of a run, drawn while it goes on.

Drawing takes about as long as a step or two of a small model, so it happens seldom: at an evaluation or a checkpoint,
if the last picture is old enough. It is never worth a run: whatever goes wrong in it is said once, and the run goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path

from runtime.plots import plot_curves

EVERY = 30.0  # seconds between two pictures ...
SHARE = 0.03  # ... and no more of the time than this


class Pictures:
    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self._drawn, self._took, self._failed = time.perf_counter(), 0.0, False

    def draw_if_due(self) -> None:
        """The picture, if the last one is some time ago."""
        if time.perf_counter() - self._drawn >= max(EVERY, self._took / SHARE):
            self.draw()

    def draw(self) -> None:
        begun = time.perf_counter()
        try:
            plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", title=str(self.folder))
        except Exception as error:  # a full disk, a broken font cache, a file that someone else is changing
            if not self._failed:
                self.say(f"note: {self.folder / 'curves.png'} could not be drawn ({type(error).__name__}: {error})")
            self._failed = True
        self._drawn = time.perf_counter()
        self._took = self._drawn - begun
