"""The folder of runs that the panel was given: what is in it, read quickly, and nothing outside of it.

Everything that is read is remembered with the size and the time of its file, so that looking again costs what has
changed. A file that cannot be read, or is no longer what a run wrote, becomes a sentence. Symbolic links are not
followed.
"""

import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint import load_checkpoint
from runtime.errors import UserError
from runtime.lock import is_held
from runtime.metrics import whole_row
from runtime.runs import FIGURES
from runtime.words import words_of

OURS = ("config.json", "metrics.jsonl", "ckpt.pt")
OWN = ".panel"  # what the panel itself writes there: its queue, and what the stages print
LARGE = 4_000_000  # bytes of a file of metrics that is read after the others
PART = 1 << 26  # bytes of a file of metrics that are read at once


def inside(root: Path, path: str | Path) -> Path:
    """The path, if it lies in ``root``, links resolved. UserError: it does not."""
    if "\0" in str(path):
        raise UserError("a path holds no zero byte")
    resolved, root = os.path.realpath(os.path.join(root, path)), os.path.realpath(root)
    if resolved != root and not resolved.startswith(root.rstrip(os.sep) + os.sep):
        raise UserError(f"{str(path)!r} lies outside the folder of runs {root}")
    return Path(resolved)


def plain_file(path: Path) -> os.stat_result | None:
    """What the system knows of a file; None if there is none, or a link in its place."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    return found if (found.st_mode & 0o170000) == 0o100000 else None


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


class Series:
    """The curves of one metrics.jsonl, {name: (steps, values)}; ``refresh`` reads what was added since."""

    def __init__(self, path: Path):
        self.path, self.curves, self.seconds, self.rows = path, {}, None, 0
        self._place, self._file = 0, None
        self._busy = threading.Lock()

    def refresh(self) -> "Series":
        with self._busy:
            found = plain_file(self.path)
            if found is None:
                self._forget(None)
                return self
            if self._file != found.st_ino or found.st_size < self._place:  # rewritten: a run went on from a checkpoint
                self._forget(found.st_ino)
            while self._place < found.st_size and self._read():
                pass
        return self

    def _forget(self, file: int | None) -> None:
        self.curves, self.seconds, self.rows, self._place, self._file = {}, None, 0, 0, file

    def _read(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(self._place)
            part = file.read(PART)
        whole = part.rfind(b"\n") + 1  # the last line may still be being written
        self._place += whole or (len(part) if len(part) == PART else 0)
        self._add(rows_of(part[:whole]))
        return whole > 0

    def _add(self, rows: list[dict]) -> None:
        self.rows += len(rows)
        for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
            if name == "step":
                continue
            known = [row for row in rows if type(row.get(name)) in (float, int) and -1e300 < row[name] < 1e300]
            if known and name == "time":
                self.seconds = known[-1][name]
            elif known:
                steps, values = self.curves.setdefault(name, ([], []))
                steps += [row["step"] for row in known]
                values += [row[name] for row in known]


def rows_of(text: bytes) -> list[dict]:
    """The whole rows among lines; all at once if none is damaged, which is faster."""
    lines = text.decode("utf-8", "replace").splitlines()
    try:
        rows = json.loads(f"[{','.join(lines)}]")
        if all(type(row) is dict and type(row.get("step")) is int and abs(row["step"]) < 2**53 for row in rows):
            return rows
    except (ValueError, RecursionError):
        pass
    return [row for row in map(whole_row, lines) if row is not None and abs(row["step"]) < 2**53]


def thinned(steps: Sequence, values: Sequence, most: int = 240) -> tuple[list, list]:
    """At most ``most`` points: means of neighbours, the last point as it is.

    >>> thinned([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], most=3)
    ([1.5, 3.5, 5], [2.0, 6.0, 9.0])
    """
    if len(steps) <= most:
        return list(steps), list(values)
    size = math.ceil((len(steps) - 1) / (most - 1))
    parts = range(0, len(steps) - 1, size)
    mean = lambda row, i: sum(row[i : min(i + size, len(row) - 1)]) / len(row[i : min(i + size, len(row) - 1)])  # noqa: E731
    return [*(mean(steps, i) for i in parts), steps[-1]], [*(mean(values, i) for i in parts), values[-1]]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Run:
    """What is known about one folder. ``problem`` is what is wrong with it, in a sentence."""

    name: str  # its path below the folder of runs
    path: Path
    stage: str = ""
    state: str = "new"  # running, finished, stopped, new, damaged or, not looked at yet, unread
    step: int = 0  # the last one that is known of
    saved: int = 0  # the one of its checkpoint; 0: there is none
    steps: int = 0
    seed: int | None = None
    best: float | None = None
    best_name: str = ""
    best_step: int = 0
    seconds: float | None = None
    changed: float = 0.0
    problem: str = ""
    config: dict = field(default_factory=dict)
    lineage: list[dict] = field(default_factory=list)

    @property
    def progress(self) -> float | None:
        """The share of the steps that are done, as far as that is known."""
        return round(max(0.0, min(1.0, self.step / self.steps)), 2) if self.steps else None

    def best_at_a_glance(self) -> str:
        return "" if self.best is None else f"{self.best:.3f} {words_of(self.best_name)[0]}"

    def best_in_words(self) -> str:
        if self.best is None:
            return ""
        return f"{words_of(self.best_name)[0]} {self.best:.3f} at step {self.best_step:,}"


class Runs:
    """All runs below ``root``; every call looks again, and reads what has changed."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._series: dict[Path, Series] = {}
        self._states: dict[Path, tuple[tuple, dict]] = {}
        self._configs: dict[Path, tuple[tuple, dict | str]] = {}
        self._busy = threading.Lock()
        self._seen: set[str] = set()  # the names of the runs that were read before
        self._reader: threading.Thread | None = None
        self.denied: list[str] = []

    def names(self) -> list[str]:
        """Every folder that holds a run, by its path below the root. Those that cannot be looked into: ``denied``."""
        found, denied = [], []
        for path, folders, files in os.walk(self.root, onerror=denied.append, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if any(name in files for name in OURS) and Path(path) != self.root:
                found.append(os.path.relpath(path, self.root))
        self.denied = [
            os.path.relpath(error.filename, self.root) for error in denied if error.filename != str(self.root)
        ]
        return sorted(found, key=_natural)

    def all(self, seconds: float = math.inf) -> list[Run]:
        """All runs. After so many ``seconds`` those that were never read are left ``unread``, and read meanwhile, so
        that a later call has them."""
        names, end = self.names(), time.monotonic() + seconds
        found = {}
        new = [name for name in names if name not in self._seen]  # the others cost little
        files = {name: plain_file(self.root / name / "metrics.jsonl") for name in new}
        changed = {name: found.st_mtime if found else 0.0 for name, found in files.items()}
        new.sort(key=lambda name: (files[name] is not None and files[name].st_size > LARGE, -changed[name]))
        for name in [*(name for name in names if name in self._seen), *new]:
            late = name not in self._seen and time.monotonic() > end
            unread = Run(
                name, self.root / name, _stage_of_name(Path(name).name), "unread", changed=changed.get(name, 0.0)
            )
            found[name] = unread if late else self.look(name)
        if any(run.state == "unread" for run in found.values()) and not (self._reader and self._reader.is_alive()):
            rest = [name for name, run in found.items() if run.state == "unread"]
            self._reader = threading.Thread(target=lambda: [self.look(name) for name in rest], daemon=True)
            self._reader.start()
        return [found[name] for name in names]

    def series(self, name: str) -> Series:
        """A run's curves, with what was added since the last look."""
        return self._series_in(inside(self.root, name))

    def _series_in(self, path: Path) -> Series:
        with self._busy:
            series = self._series.setdefault(path, Series(path / "metrics.jsonl"))
        return series.refresh()

    def look(self, name: str) -> Run:
        """What is known about that run."""
        path = inside(self.root, name)
        run = Run(name, path)
        try:
            state, problem = self._state(path)
            run.problem = problem
            run.stage, run.step = str(state.get("stage", "")), state.get("step", 0)
            run.saved = run.step
            run.config, config_problem = self._config(path, state)
            run.lineage = state.get("lineage", [])
            run.steps = _count(state.get("steps")) or _count(run.config.get("steps"))
            run.seed = run.config.get("seed") if isinstance(run.config.get("seed"), int) else None
            run.problem = run.problem or config_problem
            series = self._series_in(path)
            self._figures(run, series)
        except OSError as error:
            run.problem = f"it cannot be read: {error.strerror}"
            state = {}
        self._seen.add(name)
        run.stage = run.stage or _stage_of_name(path.name)
        if run.problem:
            run.state = "damaged"
        elif is_held(path):
            run.state = "running"
            run.step = max(run.step, _last(series.curves))
        elif state.get("finished"):
            run.state = "finished"
        else:
            run.state = "stopped" if run.step else "new"
        return run

    def _figures(self, run: Run, series: Series) -> None:
        run.seconds = series.seconds
        found = plain_file(series.path) or plain_file(run.path / "config.json") or plain_file(run.path / "ckpt.pt")
        run.changed = found.st_mtime if found else 0.0
        for name, more in FIGURES.items():
            if name in series.curves:
                steps, values = series.curves[name]
                place = values.index((max if more else min)(values))
                run.best, run.best_name, run.best_step = values[place], name, steps[place]
                return

    def _state(self, path: Path) -> tuple[dict, str]:
        """(the facts of a checkpoint, what is wrong with it)"""
        file = path / "ckpt.pt"
        found = plain_file(file)
        if found is None:
            return {}, "its checkpoint is a link" if file.is_symlink() else ""
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = self._states.get(file)
        if known is None or known[0] != stamp:
            try:
                whole = load_checkpoint(file, mmap=True)
                kept = ("stage", "step", "steps", "finished", "best", "best_step", "lineage", "config", "model_config")
                facts = {name: whole[name] for name in kept if name in whole}
            except UserError as error:
                facts = {
                    "problem": str(error).replace(f"{file} ", "its checkpoint ").replace(str(file), "its checkpoint")
                }
            except Exception as error:  # whatever a stranger's file leads to, the others are shown
                facts = {"problem": f"its checkpoint cannot be read: {type(error).__name__}"}
            known = self._states[file] = (stamp, facts)
        return (known[1], "") if "problem" not in known[1] else ({}, known[1]["problem"])

    def _config(self, path: Path, state: dict) -> tuple[dict, str]:
        file = path / "config.json"
        found = plain_file(file)
        if found is None:
            missing = "config.json is missing" if state and not file.is_symlink() else ""
            return dict(state.get("config", {})), "config.json is a link" if file.is_symlink() else missing
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = self._configs.get(file)
        if known is None or known[0] != stamp:
            try:
                read = json.loads(file.read_bytes()[: 1 << 22].decode("utf-8", "replace"))
                known = (stamp, read if _is_configuration(read) else "config.json holds no configuration")
            except (ValueError, RecursionError):
                known = (stamp, "config.json is damaged")
            self._configs[file] = known
        return (known[1], "") if isinstance(known[1], dict) else ({}, known[1])

    def samples(self, name: str, most: int = 6000) -> str:
        """The end of a run's samples.txt."""
        file = inside(self.root, name) / "samples.txt"
        return tail(file, most)


def tail(file: Path, most: int) -> str:
    """The last ``most`` bytes of a file as text, from the beginning of a line; empty if there is none."""
    found = plain_file(file)
    if found is None:
        return ""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, found.st_size - most))
            text = opened.read(most).decode("utf-8", "replace")
    except OSError as error:
        return f"({file.name} cannot be read: {error.strerror})"
    return text if found.st_size <= most else text.partition("\n")[2]


def _natural(name: str) -> list:
    """An order in which seed10 comes after seed9: texts and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def _count(value) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _is_configuration(values) -> bool:
    """A configuration has values and lists of them, and nothing deeper."""
    if not isinstance(values, dict):
        return False
    parts = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values.values())
    return not any(isinstance(part, (dict, list)) for part in parts)


def _last(curves: dict) -> int:
    return max((steps[-1] for steps, _ in curves.values()), default=0)


def _stage_of_name(name: str) -> str:
    known = ("pretrain", "encoder", "sft", "reward", "dpo", "ipo", "simpo", "orpo", "kto", "ppo", "grpo", "gdpo")
    return next((stage for stage in known if name == stage or name.startswith(f"{stage}_")), "")


def ago(seconds: float, now: float | None = None) -> str:
    """How long ago that time was.

    >>> ago(0, now=30), ago(0, now=600), ago(0, now=90000), ago(0, now=9e6)
    ('just now', '10 min ago', '25 h ago', '104 days ago')
    """
    passed = (time.time() if now is None else now) - seconds
    if passed < 60:
        return "just now"
    if passed < 7200:
        return f"{passed / 60:.0f} min ago"
    return f"{passed / 3600:.0f} h ago" if passed < 48 * 3600 else f"{passed / 86400:.0f} days ago"
