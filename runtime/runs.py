"""The runs in a folder, as a table, and their curves in one picture.

    python -m runtime.runs                                          # what there is under out/
    python -m runtime.runs out/seed1
    python -m runtime.runs --compare out/arith/grpo out/arith/ppo   # one colour for each run, a panel for each metric

A run is ``finished``, ``running`` (a process on this machine has it open) or ``stopped``: the same command would go
on from the step of its last checkpoint. A folder that cannot be read is a row that says why.
"""

import difflib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from runtime.checkpoint import load_checkpoint
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.lock import is_held
from runtime.plots import plot_compared, read_metrics, read_runs, short_names
from runtime.words import check_names, words_of

OURS = ("config.json", "metrics.jsonl", "ckpt.pt")
FIGURES = {  # the first that a run has says how good it is; whether more is better
    "val_reward": True, "val_score": True, "val_questions": True, "val_accuracy": True, "accuracy": True,
    "val_loss": False, "loss": False,
}  # fmt: skip
COMPARED = (*FIGURES, "reward", "score", "correct", "length", "entropy")


@dataclass(frozen=True)
class Config:
    folder: tyro.conf.Positional[str] = "out"
    """Where to look."""
    compare: tuple[str, ...] = ()
    """Instead of the table: runs whose curves are drawn into one picture."""
    curves: tuple[str, ...] = ()
    """Metrics to compare, a panel for each (docs/metrics.md). Default: the main ones that at least two runs have."""
    write: str = ""
    """The picture. Default: compared.png in the folder."""


@dataclass(frozen=True)
class Row:
    """What is known about one folder."""

    folder: Path
    stage: str = "?"
    started: float = 0.0  # seconds since 1970; of the last start
    state: str = ""
    best: str = ""
    seconds: float | None = None


def find_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """The folders that hold a run, or a part of one; and those that hold other files and no run below them."""
    runs: list[Path] = []
    others: list[Path] = []
    for path, folders, files in os.walk(root):
        folders.sort()
        if any(name in files for name in OURS):
            runs.append(Path(path))
        elif files and Path(path) != root:
            others.append(Path(path))
    with_runs = {parent for run in runs for parent in (run, *run.parents)}
    return runs, [path for path in others if path not in with_runs and not any(p in runs for p in path.parents)]


def describe(folder: Path) -> Row:
    """The row of a folder; what is damaged is said in ``state``."""
    facts: dict = {}
    known = next((folder / name for name in OURS if (folder / name).exists()), folder)
    try:
        facts["started"] = known.stat().st_mtime
        state = load_checkpoint(folder, mmap=True) if (folder / "ckpt.pt").exists() else {}
        facts["stage"] = str(state.get("stage", "?"))
        facts["state"] = state_of(folder, state)
        if (folder / "metrics.jsonl").exists():
            facts |= read_figures(folder / "metrics.jsonl")
        if not (folder / "config.json").exists():
            facts["state"] = "damaged: config.json is missing"
    except UserError as error:
        facts["state"] = f"damaged: {str(error).removeprefix(str(folder / 'ckpt.pt')).strip()}"
    except Exception as error:  # whatever a stranger's file of that name holds, the others are shown
        facts["state"] = f"damaged: {type(error).__name__} {' '.join(str(error).split())[:80]}"
    return Row(folder, **facts)


def state_of(folder: Path, state: dict) -> str:
    """finished, running or stopped, and where."""
    step = state.get("step", 0)
    total = state.get("steps") or (state.get("config") or {}).get("steps")
    where = f"step {step:,}" + (f" of {total:,}" if total else "")
    if is_held(folder):
        return f"running, saved at {where}" if step else "running, nothing saved yet"
    if state.get("finished"):
        return f"finished, {step:,} steps"
    return f"stopped at {where}" if step else "stopped, nothing saved"


def read_figures(path: Path) -> dict:
    """The best figure, with its name and step, and the time that the last start took."""
    series = read_metrics(path)
    lines = path.read_text().splitlines()
    found: dict = {"seconds": json.loads(lines[-1]).get("time")} if lines else {}
    for name, more in FIGURES.items():
        if name in series:
            steps, values = series[name]
            best = (max if more else min)(range(len(values)), key=values.__getitem__)
            return found | {"best": f"{words_of(name)[0]} {values[best]:.3f} at step {steps[best]:,}"}
    return found


def duration(seconds: float | None) -> str:
    """
    >>> duration(75), duration(4000), duration(200000), duration(None)
    ('75 s', '67 min', '55.6 h', '')
    """
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(rows: list[Row]) -> str:
    """Columns side by side, a line for each row."""
    head = ("folder", "stage", "started", "state", "best figure", "time")
    cells = [head]
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.started)) if row.started else ""
        cells.append((str(row.folder), row.stage, started, row.state, row.best, duration(row.seconds)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def find_run(name: str, root: Path) -> str:
    """The folder that ``name`` means: a path, or one below ``root``. UserError, with the nearest, if there is none."""
    for path in (Path(name), root / name):
        if (path / "metrics.jsonl").exists():
            return str(path)
    below = find_folders(root)[0] if root.is_dir() else []
    known = {str(one): path for path in below for one in (path, path.relative_to(root))}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise UserError(f"{name} is no run" + (f"; did you mean {known[near[0]]}?" if near else ""))


def compare(config: Config) -> Path:
    """Draw the runs' curves; the picture's path."""
    root = Path(config.folder)
    series = read_runs([find_run(name, root) for name in config.compare], "--compare out/arith/ppo out/arith/grpo")
    known = dict.fromkeys(name for mine in series.values() for name in mine)
    check_names(config.curves, known, "these runs have")
    shared = [name for name in known if sum(name in mine for mine in series.values()) >= min(2, len(series))]
    curves = config.curves or [name for name in COMPARED if name in shared][:6]
    if not curves:
        raise UserError(f"these runs have no main metric in common; --curves names some: {', '.join(sorted(known))}")
    path = Path(config.write) if config.write else root / "compared.png"
    plot_compared(short_names(list(series)), path, list(curves))
    return path


def main() -> None:
    config = parse(Config)
    if config.compare:
        return print(compare(config))
    for name in ("curves", "write"):
        if getattr(config, name):
            raise UserError(f"--{name} belongs to --compare: it says what is drawn, and where")
    root = Path(config.folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; python pipeline.py makes out/arith")
    runs, others = find_folders(root)
    if not runs and not others:
        raise UserError(f"{root} holds no runs; python pipeline.py makes some")
    rows = [describe(folder) for folder in runs] + [Row(folder, state="no run: other files") for folder in others]
    print(table(sorted(rows, key=lambda row: str(row.folder))))
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
