"""Likelihood displacement: what a preference loss does to the answer that was preferred.

DPO, IPO and SimPO see only the difference between two answers. It grows as well when both fall and the rejected one
falls further, and then the probability goes to a third answer that no pair names (Pal et al. 2024; Razin et al. 2024).
How far depends on what the two have in common. Here the preferred answer is always the same, the worked solution of a
story, and only the rejected one differs:

* ``one digit``: the same text with one digit of the final number changed;
* ``flawed``: the book's off-policy pairs, where a step is wrong, or its form;
* ``another``: the right answer to another question, in a good form.

Each policy learns from 2,048 pairs with the settings of dpo.py. The change of log π, in nats of a whole answer, is
measured on pairs of the same kind about 512 held-out questions. ORPO has a term that raises the preferred answer by
itself. The starts are folders of ``pipeline.py``::

    python studies/displacement.py out/seed1 out/seed2 out/seed3     # adds what is missing
    python studies/displacement.py                                   # the page anew, from the rows beside it
"""

import json
import math
import random
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import dpo
import intervals
from arithmetic import chat, problems
from pages import keep_rows, read_rows, right_answers, write_table
from preferences import Pair, encode_pairs, load_pairs
from runtime.checkpoint import load_checkpoint, need_checkpoint, write_text
from runtime.config import Count, parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_points
from stages import load_stage

KINDS = ("one digit", "flawed", "another")
METHODS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO"}


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py; none: the page is written anew from the rows that are there."""
    pairs: Count = 2048
    """Of training."""
    n: Count = 512
    """Held-out pairs whose log-probabilities are compared, and test questions answered greedily."""
    page: str = "docs/experiments/displacement.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


# ----------------------------------------------------------------------------------------------------------------------
# The pairs


def make_pairs(kind: str, n: int, split: str, seed: int) -> list[Pair]:
    """Pairs of one kind, about ``n`` stories of "train" or "validation"."""
    if kind == "flawed":
        return load_pairs("arith", split, seed=seed, n=n)
    rng = random.Random(f"{seed} displacement {split}")
    chats = [chat(problem) for problem in problems(n, f"{seed} displacement", split)]
    answers = [said[-1]["content"] for said in chats]
    if kind == "one digit":
        others = [with_one_digit_changed(answer, rng) for answer in answers]
    else:
        others = answers[1:] + answers[:1]
    pairs = [Pair(tuple(said[:-1]), good, bad) for said, good, bad in zip(chats, answers, others)]
    return [pair for pair in pairs if pair.chosen != pair.rejected]


def with_one_digit_changed(answer: str, rng: random.Random) -> str:
    """
    >>> with_one_digit_changed("<think>4+3=7</think><answer>7</answer>", random.Random(0))
    '<think>4+3=7</think><answer>6</answer>'
    """
    number = re.search(r"<answer>\D*(\d+)", answer)
    place = rng.randrange(*number.span(1))
    first = place == number.start(1) and len(number[1]) > 1
    digit = rng.choice([d for d in "0123456789"[first:] if d != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def write_pairs(path: Path, pairs: list[Pair]) -> str:
    rows = ({"prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected} for p in pairs)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# A run


@torch.no_grad()
def answer_sums(folder: Path, pairs: list[Pair]) -> torch.Tensor:
    """(2, n): the log-probability of each pair's chosen and rejected answer, in nats."""
    model, tokenizer, _ = load_stage(str(folder))
    rows = encode_pairs(pairs, tokenizer, 256)
    return dpo.reference_logps(model, rows.batch, len(rows), show=False)


def run(start: Path, kind: str, method: str, config: Config) -> dict:
    """One row: what a method made of the log-probabilities of held-out pairs, and of the greedy answers."""
    seed = load_checkpoint(str(start / "sft"))["config"]["seed"]
    name = f"displacement_{kind.replace(' ', '_')}"
    out, held_out = start / f"{name}_{method}", make_pairs(kind, config.n, "validation", seed)
    settings = dpo.Config(
        method=method, data=write_pairs(start / f"{name}.jsonl", make_pairs(kind, config.pairs, "train", seed)),
        eval_data=write_pairs(start / f"{name}_held_out.jsonl", held_out), init_from=str(start / "sft"),
        out_dir=str(out), seed=seed, device="cpu", compile="off",
    )  # fmt: skip
    dpo.main(settings)
    before, after = (answer_sums(path, held_out) for path in (start / "sft", out))
    accuracy = [right_answers(path, config.n, "test") for path in (start / "sft", out)]
    change = after - before
    return {
        "start": start.name, "pairs": kind, "method": method, "chosen": round(float(change[0].mean()), 4),
        "rejected": round(float(change[1].mean()), 4), "fell": round(float((change[0] < 0).float().mean()), 4),
        "before": round(accuracy[0], 4), "after": round(accuracy[1], 4), "n": config.n,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The page


def with_interval(values: list[float], s: float, df: int, digits: int = 2) -> str:
    text = f"{statistics.fmean(values):+.{digits}f}"
    return text + (f" ± {intervals.quantile(0.975, df) * s / math.sqrt(len(values)):.{digits}f}" if df else "")


def table(rows: list[dict]) -> str:
    """Markdown: the changes of log π of both answers and of the greedy accuracy, means over the starts."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for kind in KINDS:
        for method in METHODS:
            if mine := [row for row in rows if (row["pairs"], row["method"]) == (kind, method)]:
                cells[kind, method] = mine
    gains = [[row["after"] - row["before"] for row in mine] for mine in cells.values()]
    s, df, _ = intervals.pooled([[row["chosen"] for row in mine] for mine in cells.values()])
    s_gain, df_gain, _ = intervals.pooled(gains)
    lines = [
        "| rejected | method | log π of the chosen answer | of the rejected one | the chosen one fell | "
        "greedy accuracy | change | starts |",
        "| --- " * 8 + "|",
    ]
    for (kind, method), mine in cells.items():
        mean = {name: statistics.fmean(row[name] for row in mine) for name in ("rejected", "fell", "after")}
        chosen = with_interval([row["chosen"] for row in mine], s, df)
        gain = with_interval([row["after"] - row["before"] for row in mine], s_gain, df_gain, 3)
        lines.append(
            f"| {kind} | {METHODS[method]} | {chosen} | {mean['rejected']:+.2f} | {mean['fell']:.3f} | "
            f"{mean['after']:.3f} | {gain} | {len(mine)} |"
        )
    if df and df_gain:
        n = min(map(len, cells.values()))
        least = intervals.smallest(s_gain / math.sqrt(n), df_gain)
        lines += [
            "",
            f"±: 95 %, with the pooled standard deviations, {s:.2f} nats ({df} degrees of freedom) and {s_gain:.3f} "
            f"({df_gain}). 80 % of studies like this one find a change of accuracy of {least:.3f}.",
        ]
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Each run as a point: the change of log π of the chosen answer and of the rejected one."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for kind in KINDS:
        for method, label in METHODS.items():
            mine = [row for row in rows if (row["pairs"], row["method"]) == (kind, method)]
            if mine:
                points = [(row["chosen"], row["rejected"]) for row in mine]
                panels.setdefault(f"rejected: {kind}", {})[label] = points
    plot_points(panels, path, "change of log π(chosen), nats", "of log π(rejected)")


def main() -> None:
    config = parse(Config)
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["start"], row["pairs"], row["method"]) for row in rows}
    for start in map(Path, config.starts):
        need_checkpoint(str(start / "sft"), f"python pipeline.py --only sft --out {start}")
    for start in map(Path, config.starts):
        for kind in KINDS:
            for method in METHODS:
                if (start.name, kind, method) not in there:
                    rows.append(run(start, kind, method, config))
                    keep_rows(page, rows)
    if not rows:
        raise UserError("no start: python studies/displacement.py out/seed1 out/seed2, folders of pipeline.py")
    draw(rows, page.with_suffix(".png"))
    write_table(page, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
