"""A run's folder: what is in it, whether this run may go on with it, and what is written beside the checkpoint.

::

    out/<task>/<stage>/config.json      the configuration of the last start
                       metrics.jsonl    a row for each step that was logged, and for each evaluation
                       samples.txt      generated text
                       rollouts.jsonl   some answers token by token (runtime/rollouts.py)
                       ckpt.pt          the checkpoint (runtime/checkpoint.py)
                       curves.png       the metrics, drawn now and then and at the end
"""

import json
import re
from pathlib import Path

from runtime import lock, processes
from runtime.checkpoint import load_checkpoint, mend_best, plain, write_text
from runtime.config import FREE_FIELDS, as_dict
from runtime.errors import UserError
from runtime.metrics import whole_row
from runtime.rollouts import NAME as ROLLOUTS
from runtime.rows import stamps


def run_folder(config, stage: str) -> Path:
    return Path(config.out_dir or f"out/{config.task}/{stage}")


def open_folder(folder: Path, config, stage: str) -> dict | None:
    """Make the folder ready for this run, in all processes. Returns the checkpoint with which the run goes on, or None.

    With ``fresh``, a run that is there is moved aside. UserError: the folder holds a run of another stage or with
    another configuration.
    """
    is_main = processes.rank() == 0
    enter(folder, config.fresh)
    state = load_checkpoint(folder) if (folder / "ckpt.pt").exists() else None
    if state is not None:
        check_same_run(folder, state, config, stage)
    if is_main:
        forget_parts(folder)
        if state is not None:
            mend_best(folder, state)
        write_text(folder / "config.json", json.dumps(as_dict(config), indent=2) + "\n")
        cut_back(folder, state["step"] if state else -1)
    return state


def enter(folder: Path, fresh: bool) -> None:
    """Hold the folder, in the first process, for the run of all; all refuse if another run holds it."""
    problem = None
    if processes.rank() == 0:
        try:
            lock.hold(folder)
            if fresh and any(path.name != lock.NAME for path in folder.iterdir()):
                lock.release(folder)
                print(f"{folder} was moved to {move_aside(folder)}")
                lock.hold(folder)
        except UserError as error:
            problem = error
    if processes.sum_numbers([float(problem is not None)])[0]:
        raise problem or UserError(f"{folder} is in use, see the message of the first process")


def forget_parts(folder: Path) -> None:
    """Remove what a killed process had begun to write. Only who holds the folder may do that."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def move_aside(folder: Path) -> Path:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old{n}")).exists():
        n += 1
    folder.rename(aside)
    return aside


def check_same_run(folder: Path, state: dict, config, stage: str) -> None:
    """Refuse to go on with a checkpoint that another stage or another configuration has written."""
    if state["stage"] != stage:
        raise UserError(f"{folder} holds a {state['stage']} run; choose another --out_dir")
    now, stored = as_dict(config), state["config"]
    if unknown := sorted(set(stored) - set(now) - FREE_FIELDS):
        what = f"{folder} holds a run of an earlier version, with the field {unknown[0]}"
        raise UserError(f"{what}: choose another folder, or --fresh to start again")
    changed = [k for k in now if k not in FREE_FIELDS and k in stored and plain(now[k]) != plain(stored[k])]
    if changed:
        what = ", ".join(f"{k}={stored[k]!r}, now {now[k]!r}" for k in changed)
        raise UserError(f"{folder} holds a run with {what}: choose another folder, or --fresh to start again")
    then, today = state.get("data") or {}, stamps(config)
    if other := [name for name in then if name in today and then[name] != today[name]]:
        what = f"{other[0]} as it was then ({then[other[0]]}; now {today[other[0]]})"
        raise UserError(f"{folder} holds a run on {what}: choose another folder, or --fresh to start again")
    if "optimizers" not in state:
        raise UserError(f"{folder} holds merged adapters, not a run that could go on; choose another --out_dir")


def cut_back(folder: Path, step: int) -> None:
    """Forget metrics and samples that were written after the checkpoint: those steps will be done again."""
    metrics, rollouts, samples = folder / "metrics.jsonl", folder / ROLLOUTS, folder / "samples.txt"
    for path in (metrics, rollouts):
        rows = []
        if path.exists():
            for line in path.read_bytes().decode("utf-8", "replace").splitlines():
                if (row := whole_row(line)) is not None and row["step"] <= step:
                    rows.append(line + "\n")
        if path is metrics or path.exists():
            write_text(path, "".join(rows))
    text = samples.read_bytes().decode("utf-8", "replace") if samples.exists() else ""
    parts = re.split(r"^(?==== step \d+ ===$)", text, flags=re.MULTILINE)[1:]
    write_text(samples, "".join(p for p in parts if int(p.split(" ", 3)[2]) <= step))


def append_sample(folder: Path, step: int, text: str) -> None:
    """Append generated text to samples.txt."""
    # Half of a surrogate pair, which a row of JSON may hold, is no text that UTF-8 knows.
    with open(folder / "samples.txt", "a", encoding="utf-8", errors="replace", newline="") as file:
        file.write(f"=== step {step} ===\n{text.rstrip()}\n\n")


def has_sample(folder: Path, step: int) -> bool:
    """Whether samples.txt holds a text of that step."""
    path = folder / "samples.txt"
    return path.exists() and f"=== step {step} ===\n" in path.read_text(encoding="utf-8", errors="replace")
