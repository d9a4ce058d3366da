"""The report card for the panel: rows with their intervals, and which stage answers which question rightly."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data import encode_prompts
from evaluate import COLUMNS
from rollout import sample_answers, score, to_verify
from runtime.errors import UserError
from stages import load_stage
from texts import load_prompts
from ui.folder import inside, plain_file, tail


@dataclass(frozen=True)
class Row:
    """A line of a report card."""

    stage: str
    path: str
    figure: float | None
    low: float | None
    high: float | None
    n: int
    others: dict[str, float]
    name: str = "accuracy"  # of the figure


def reports(root: Path) -> list[str]:
    """Every report.json below ``root``, by its path."""
    found = []
    for path in root.resolve().glob("**/report.json"):
        parts = path.relative_to(root.resolve()).parts
        if plain_file(path) is not None and not any(part.startswith(".") for part in parts):
            found.append("/".join(parts))
    return sorted(found)


def read(root: Path, name: str) -> list[Row]:
    """The rows of a report card. UserError: it is none."""
    path = inside(root, name)
    if plain_file(path) is None:
        raise UserError(f"there is no report card {name}")
    try:
        rows = json.loads(path.read_bytes()[: 1 << 22].decode("utf-8", "replace"))
        rows = [_row(row) for row in rows if isinstance(row, dict)]
    except (ValueError, TypeError, RecursionError, OSError):
        rows = []
    if not rows:
        raise UserError(f"{name} holds no report card")
    return rows


HIDDEN = {"stage", "path", "step", "data", "low", "high", "n", "documents_bytes", "accuracy", "reward"}


def _row(row: dict) -> Row:
    figure = row.get("accuracy", row.get("reward"))
    others = {str(name): value for name, value in row.items() if name not in HIDDEN and _is_number(value)}
    figure, low, high = (value if _is_number(value) else None for value in (figure, row.get("low"), row.get("high")))
    n = row["n"] if isinstance(row.get("n"), int) else 0
    name = "reward" if "reward" in row and "accuracy" not in row else "accuracy"
    return Row(str(row.get("stage", "?")), str(row.get("path", "")), figure, low, high, n, others, name)


def is_quick(root: Path, name: str) -> bool:
    """Whether the card is of ``pipeline.py --quick``, as its report.md says."""
    return "--quick: next to no training" in tail(inside(root, name).with_name("report.md"), 100_000)


def explanations() -> dict[str, str]:
    """What each column of a report card is: the table of docs/metrics.md."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page.partition("## The report card")[2], re.M)
    return {name: text for name, text in rows if name not in ("column", "---")}


def heading(name: str) -> str:
    """A figure's name as evaluate.py's table has it."""
    return COLUMNS.get(name, name)


def explained(name: str) -> str | None:
    """What that heading is; None if nobody says.

    >>> explained("pass@8")
    'The share of questions of which at least one of k sampled answers is right.'
    """
    return explanations().get(re.sub(r"@\d+$", "@k", name))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12


@dataclass(frozen=True)
class Answers:
    """What a stage answers to each question, greedily."""

    texts: list[str]
    right: list[bool]


def questions(n: int, part: str = "test") -> list:
    """Held-out questions of the embedded task."""
    return to_verify(load_prompts("arith", part, n=n), "arith")


@torch.no_grad()
def answers_of(path: Path, asked: list, batch_size: int = 32) -> Iterator[tuple[float, Answers | None]]:
    """(the share that is done, None), and at the end (1, the answers). UserError: this run cannot answer."""
    model, tokenizer, _ = load_stage(str(path))
    max_new = min(64, model.config.max_seq_len // 2)
    ids, kept = encode_prompts(asked, tokenizer, model.config.max_seq_len - max_new)
    if len(kept) < len(asked):
        raise UserError("some of these questions do not fit into the model's context")
    texts, right = [], []
    for first in range(0, len(ids), batch_size):
        some = slice(first, first + batch_size)
        rollout = sample_answers(model, tokenizer, ids[some], 1, max_new, 0.0, seed=0)
        correct, _ = score(rollout.texts, [one.gold for one in kept[some]], rollout.finished)
        texts += [text if done else f"{text} …" for text, done in zip(rollout.texts, rollout.finished.tolist())]
        right += [value == 1.0 for value in correct.tolist()]
        yield min(0.99, (first + batch_size) / len(ids)), None
    yield 1.0, Answers(texts, right)
