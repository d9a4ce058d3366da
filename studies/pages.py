"""A study's page: its table between two marks, and beside it the rows (.jsonl) that the table is made of; and the
figure that most studies end with, the accuracy of a policy's greedy answers."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

from data import encode_prompts
from rollout import answer_greedily
from runtime.checkpoint import write_text
from runtime.errors import UserError
from stages import load_stage
from texts import load_prompts

BEGIN, END = "<!-- table -->\n", "<!-- /table -->"


def read_rows(page: Path) -> list[dict]:
    """The rows beside a page that were made before; none, if there are none."""
    kept = page.with_suffix(".jsonl")
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def keep_rows(page: Path, rows: list[dict]) -> None:
    """Write the rows beside the page, whose folder is made if it is missing."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def frame(page: Path) -> tuple[str, str]:
    """What stands before and after a page's table, with the marks. UserError: there is no page, or it has no marks."""
    if not page.exists():
        raise UserError(f"there is no page {page}")
    before, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError(f"{page} has no place for a table: {BEGIN.strip()} and {END} on lines of their own")
    return before + mark, end + after


def write_table(page: Path, made: str) -> None:
    """Put a new table in the place of the old one; a page that is missing becomes one with nothing else on it."""
    before, after = frame(page) if page.exists() else (BEGIN, f"{END}\n")
    write_text(page, f"{before}\n{made}\n\n{after}")


@torch.no_grad()
def right_answers(folder: Path, n: int, split: str) -> float:
    """The share of ``n`` questions of the embedded task that the policy in a folder answers rightly, greedily."""
    model, tokenizer, _ = load_stage(str(folder))
    ids, prompts = encode_prompts(load_prompts("arith", split, n=n), tokenizer, model.config.max_seq_len - 64)
    return answer_greedily(model, tokenizer, ids, [prompt.gold for prompt in prompts], 64, 256)["accuracy"]
