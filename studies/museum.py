"""The museum of mistakes: each put into the running book, caught by a test, and shown beside the right one.

Most mistakes in alignment code raise no error. Some make a run fail at once, some make it a little worse, and some
cannot be seen in any curve; those are the reason for tests. ``exhibits.py`` has each as a patch of a few lines. Here a
patch is put into a copy of the book; then

* ``--catch`` runs its tests there, one of which must turn red, and notes which one;
* ``--starts`` runs its stage there, from the SFT models of these folders of ``pipeline.py``, beside the right one.

::

    python studies/museum.py --catch                                  # all of them: minutes
    python studies/museum.py --catch --only k3_flipped                # one
    python studies/museum.py --starts out/seed1 out/seed2             # the curves: hours; goes on where it was
    python studies/museum.py                                          # the page anew, from the rows beside it
"""

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

from exhibits import EXHIBITS, Exhibit
from pages import keep_rows, read_rows, right_answers, write_table
from runtime.checkpoint import load_checkpoint, need_checkpoint
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_lines, read_metrics

ROOT = Path(__file__).resolve().parents[1]
CURVES = {"sft": "val_loss", "pretrain": "val_loss", "dpo": "val_questions", "kto": "val_questions"}  # else: accuracy


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()
    """Exhibits, by name. Default: all."""
    catch: bool = False
    """Run the tests of each."""
    starts: tuple[str, ...] = ()
    """Folders of pipeline.py, from whose models each is run."""
    page: str = "docs/museum.md"
    """The page whose exhibits are written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


@contextmanager
def copy_of_the_book(exhibit: Exhibit | None = None):
    """A folder with the chapters, tests and what they need, and the exhibit's patch in it."""
    with tempfile.TemporaryDirectory(prefix="museum-") as folder:
        copy = Path(folder)
        for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
            shutil.copy(path, copy / path.name)
        for name in ("runtime", "configs", "tests", "studies", "bench", "examples", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        if exhibit is not None:
            put_in(exhibit, copy)
        yield copy


def put_in(exhibit: Exhibit, root: Path) -> None:
    """Patch the file of the exhibit. ValueError: the lines that it replaces are not there exactly once."""
    path = root / exhibit.file
    text = path.read_text(encoding="utf-8")
    if text.count(exhibit.old) != 1:
        raise ValueError(f"{exhibit.name}: its lines stand {text.count(exhibit.old)} times in {exhibit.file}")
    path.write_text(text.replace(exhibit.old, exhibit.new), encoding="utf-8")


def red_test(exhibit: Exhibit) -> str:
    """The first test that turns red; "" if none does."""
    with copy_of_the_book(exhibit) as copy:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *exhibit.tests.split(),
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+)", done.stdout, flags=re.M)
    return found[1] if found and done.returncode == 1 else ""


def run(exhibit: Exhibit | None, what: str, start: Path) -> dict:
    """A run of the stage and settings ``what`` from a start, with the exhibit's patch or rightly: its curve, and how
    many of 512 validation questions its last checkpoint answers rightly, by the right book ("end"; of pretraining, the
    validation loss). A run that ended in an error has neither."""
    stage, *settings = what.split()
    seed = load_checkpoint(str(start / "sft"))["config"]["seed"]
    before = {"pretrain": "", "sft": str((start / "pretrain").resolve())}.get(stage, str((start / "sft").resolve()))
    row = {"exhibit": exhibit.name if exhibit else "", "run": what, "start": start.name}
    with copy_of_the_book(exhibit) as copy:
        fields = dict(setting.split("=") for setting in settings) | {
            "seed": seed,
            "out_dir": "'run'",
            "device": "'cpu'",
        }
        fields |= {"init_from": repr(before)} if before else {}
        lines = [f"{name} = {value if is_literal(value) else repr(value)}" for name, value in fields.items()]
        (copy / "settings.py").write_text("\n".join(lines) + "\n")
        command = [sys.executable, f"{stage}.py", "settings.py", "--compile", "off"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
            return row | {"error": lines[-1][:200]}
        steps, values = read_metrics(copy / "run" / "metrics.jsonl")[CURVES.get(stage, "accuracy")]
        row["curve"] = [list(steps), [round(value, 5) for value in values]]
        end = values[-1] if stage == "pretrain" else right_answers(copy / "run", 512, "validation")
    return row | {"end": round(end, 5) if math.isfinite(end) else None}


def is_literal(value) -> bool:
    """Is it a number, a truth value or a quoted text, as Python writes them?

    >>> [is_literal(value) for value in (3, "0.1", "True", "'cpu'", "k1")]
    [True, True, True, True, False]
    """
    return re.fullmatch(r"-?[\d.]+(e-?\d+)?|True|False|None|'.*'", str(value)) is not None


# ----------------------------------------------------------------------------------------------------------------------
# The page

LOUD, SLOW, INVISIBLE, UNSEEN = "loud", "slow", "invisible", "not run"
HEADS = {
    LOUD: ("Loud", "The run ends in an error, learns nothing, or is worse than its start."),
    SLOW: ("Slow", "The run learns, and ends worse than the right one by more than two standard errors."),
    INVISIBLE: (
        "Invisible",
        "No curve shows it: the run ends where the right one does, as far as these starts can tell. Only a test finds "
        "it.",
    ),
    UNSEEN: (
        "Without a run",
        "No run of the embedded task would show them: they break what others bring, or a case that the task does not "
        "have.",
    ),
}


def visibility(exhibit: Exhibit, rows: list[dict]) -> str:
    """How visible the mistake is: by the ends of its runs and of the right ones, each from the same starts."""
    mine = {row["start"]: row for row in rows if row.get("exhibit") == exhibit.name and "run" in row}
    right = {row["start"]: row for row in rows if row.get("exhibit") == "" and row["run"] == exhibit.run}
    common = [start for start in mine if start in right]
    if not common:
        return UNSEEN
    if any(mine[start].get("end") is None for start in common):
        return LOUD
    pretrains = exhibit.run.startswith("pretrain")
    worse = [(mine[s]["end"] - right[s]["end"]) * (1 if pretrains else -1) for s in common]
    gains = [right[s]["end"] - right[s]["curve"][1][0] for s in common]
    if not pretrains and statistics.fmean(worse) >= statistics.fmean(gains) > 0:
        return LOUD
    error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
    floor = 0.02 if pretrains else 0.03  # what 512 questions, or another order of additions, move by themselves
    return SLOW if statistics.fmean(worse) > max(2 * error, floor) else INVISIBLE


def ends(rows: list[dict], name: str, what: str) -> str:
    """The ends of the runs, one for each start."""
    mine = [row for row in rows if row.get("exhibit") == name and row.get("run") == what]
    return ", ".join("error" if row.get("end") is None else f"{row['end']:.3f}" for row in mine)


def described(exhibit: Exhibit, rows: list[dict]) -> str:
    """An exhibit as markdown."""
    red = next((row["red"] for row in rows if row.get("exhibit") == exhibit.name and "red" in row), "")
    removed = "".join(f"-{line}\n" for line in exhibit.old.splitlines())
    added = "".join(f"+{line}\n" for line in exhibit.new.splitlines())
    lines = [f"### {exhibit.title[0].upper()}{exhibit.title[1:]}", "", exhibit.why]
    lines += ["", f"Seen elsewhere: {exhibit.seen}"] if exhibit.seen else []
    lines += ["", f"[`{exhibit.file}`](../{exhibit.file}):", "", f"```diff\n{removed}{added}```", ""]
    if exhibit.run and ends(rows, exhibit.name, exhibit.run):
        what = "validation loss" if exhibit.run.startswith("pretrain") else "right answers of 512"
        lines.append(
            f"* `{exhibit.run}` ends at {ends(rows, exhibit.name, exhibit.run)} ({what}); the right one at "
            f"{ends(rows, '', exhibit.run)}."
        )
        error = next((row["error"] for row in rows if row.get("exhibit") == exhibit.name and "error" in row), "")
        lines += [f"* It says: `{error}`"] if error else []
    lines += [f"* Red: `{red}`"] if red else []
    lines.append(f"* Put it in: `python studies/museum.py --catch --only {exhibit.name}`")
    return "\n".join(lines)


def halls(rows: list[dict]) -> str:
    """All exhibits, the most visible first."""
    found = {kind: [e for e in EXHIBITS if visibility(e, rows) == kind] for kind in HEADS}
    parts = []
    for kind, (head, words) in HEADS.items():
        if found[kind]:
            parts += [f"## {head}: {len(found[kind])}", words, *(described(exhibit, rows) for exhibit in found[kind])]
    return "\n\n".join(parts)


def draw(rows: list[dict], path: Path) -> None:
    """The mean curve of each mistake beside the right one's."""
    panels: dict[str, dict[str, tuple[list, list]]] = {}
    for exhibit in EXHIBITS:
        lines = {}
        for label, name in (("right", ""), ("mistaken", exhibit.name)):
            curves = [
                r["curve"] for r in rows if r.get("exhibit") == name and r.get("run") == exhibit.run and "curve" in r
            ]
            if curves:
                n = min(len(curve[0]) for curve in curves)
                means = [statistics.fmean(curve[1][i] for curve in curves) for i in range(n)]
                lines[label] = (curves[0][0][:n], means)
        if "mistaken" in lines:
            panels[exhibit.name] = lines
    if panels:
        plot_lines(panels, path, "steps")


def main() -> None:
    config = parse(Config)
    names = [exhibit.name for exhibit in EXHIBITS]
    if unknown := [name for name in config.only if name not in names]:
        raise UserError(f"--only {unknown[0]}: no such exhibit; there are {', '.join(names)}")
    page, wanted = Path(config.page), [exhibit for exhibit in EXHIBITS if exhibit.name in (config.only or names)]
    rows = read_rows(page)
    if config.catch:
        for exhibit in tqdm(wanted, desc="tests"):
            red = red_test(exhibit)
            rows = [row for row in rows if not (row["exhibit"] == exhibit.name and "red" in row)]
            rows.append({"exhibit": exhibit.name, "red": red})
            keep_rows(page, rows)
            tqdm.write(f"{exhibit.name}: {red or 'NOT CAUGHT'}")
    for start in config.starts:
        for stage in ("pretrain", "sft"):
            need_checkpoint(str(Path(start) / stage), f"python pipeline.py --only sft --out {start}")
    there = {(row["exhibit"], row.get("run"), row.get("start")) for row in rows}
    todo: dict[tuple, None] = {}  # in order, once each
    for start in map(Path, config.starts):
        for exhibit in (exhibit for exhibit in wanted if exhibit.run):
            todo |= dict.fromkeys([(None, exhibit.run, start), (exhibit, exhibit.run, start)])
    for exhibit, what, start in tqdm(todo, desc="runs", disable=not todo):
        if (exhibit.name if exhibit else "", what, start.name) not in there:
            rows.append(run(exhibit, what, start))
            keep_rows(page, rows)
    draw(rows, page.with_suffix(".png"))
    write_table(page, halls(rows))
    missed = [row["exhibit"] for row in rows if row.get("red") == ""]
    if missed:
        raise UserError(f"no test turned red for {', '.join(missed)}")
    print(f"{page}: {len(EXHIBITS)} exhibits")


if __name__ == "__main__":
    run_main(main)
