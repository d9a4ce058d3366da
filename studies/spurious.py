"""Rewards that should not work: what GRPO learns from them, beside the right one.

Rewards that know nothing of the truth have been seen to raise the accuracy of some models nearly as much as the truth
does (Shao et al. 2025; TTRL, Zuo et al. 2025): what a policy already does more often than not is strengthened by the
sampling, the clip, or its own majority. On the embedded task every such reward can stand beside the right one, from
several starts. An answer earns 1 if it

* ``right``: is right;
* ``majority``: agrees with what most of the eight answers to its question say;
* ``format``: has the form of an answer, whatever it says;
* ``random``: wins a toss of a coin;
* ``wrong``: says one more than the right answer.

All else is as in grpo.py, with groups of eight. The starts are folders of ``pipeline.py``::

    python studies/spurious.py out/seed1 out/seed2 out/seed3 out/seed4 out/seed5     # adds what is missing
"""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import grpo
import intervals
from evaluate import majority_vote
from pages import keep_rows, read_rows, right_answers, write_table
from rollout import Rollout, score
from runtime.checkpoint import load_checkpoint, need_checkpoint
from runtime.config import Count, parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_lines, read_metrics
from texts import Prompt
from verify import is_right, read_answer

REWARDS = ("right", "majority", "format", "random", "wrong")
GROUP = 8


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py; none: the page is written anew from the rows that are there."""
    steps: Count = 60
    """Of each run, 256 answers each."""
    n: Count = 1024
    """Test questions at the end of a run, answered greedily."""
    page: str = "docs/experiments/spurious.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


def judged(kind: str, seed: int):
    """What stands in for ``grpo.judge``: (rollout, asked, config) -> rewards by name."""
    tosses = torch.Generator().manual_seed(seed)

    def judge(rollout: Rollout, asked: list[Prompt], config: grpo.Config) -> dict[str, Tensor]:
        golds = [question.gold for question in asked]
        right, formed = score(rollout.texts, golds, rollout.finished)
        if kind == "majority":
            read = [read_answer(t, g) if ok else None for t, g, ok in zip(rollout.texts, golds, rollout.finished)]
            found = agrees(read, config.group_size)
        elif kind == "random":
            found = torch.randint(2, (len(golds),), generator=tosses).float()
        elif kind == "wrong":
            found = score(rollout.texts, [gold + 1 for gold in golds], rollout.finished)[0]
        else:
            found = right if kind == "right" else formed
        return {"correct": found, "formatted": formed}

    return judge


def agrees(answers: list, group_size: int) -> Tensor:
    """(N,): 1 where an answer is the one that most of its group gave; what could not be read agrees with nothing.

    >>> agrees([5, 7, 5, None], 4)
    tensor([1., 0., 1., 0.])
    """
    found = torch.zeros(len(answers))
    for first in range(0, len(answers), group_size):
        vote = majority_vote(answers[first : first + group_size])
        for i in range(first, first + group_size):
            found[i] = float(vote is not None and is_right(answers[i], vote))
    return found


def run(start: Path, kind: str, config: Config) -> dict:
    """One row: a run from a start on one of the rewards, and what came of it by the verifier."""
    out, seed = start / f"spurious_{kind}", load_checkpoint(str(start / "sft"))["config"]["seed"]
    settings = grpo.Config(
        init_from=str(start / "sft"), out_dir=str(out), seed=seed, steps=config.steps, group_size=GROUP,
        prompts_per_step=256 // GROUP, format_weight=0.0, eval_prompts=512, device="cpu", compile="off",
    )  # fmt: skip
    kept, grpo.judge = grpo.judge, judged(kind, seed)
    try:
        grpo.main(settings)
    finally:
        grpo.judge = kept
    before, after = (right_answers(path, config.n, "test") for path in (start / "sft", out))
    steps, values = read_metrics(out / "metrics.jsonl")["accuracy"]
    curve = [list(steps), [round(value, 5) for value in values]]
    return {"start": start.name, "reward": kind, "before": before, "after": after, "curve": curve, "n": config.n}


# ----------------------------------------------------------------------------------------------------------------------
# The page


def table(rows: list[dict]) -> str:
    """Markdown: accuracy after each reward, and the gain within a start with its 95 % interval."""
    kinds = [kind for kind in REWARDS if any(row["reward"] == kind for row in rows)]
    gains = {kind: [row["after"] - row["before"] for row in rows if row["reward"] == kind] for kind in kinds}
    s, df, _ = intervals.pooled(list(gains.values()))
    lines = ["| reward | before | after | gain | starts |", "| --- | --- | --- | --- | --- |"]
    for kind in kinds:
        mine = [row for row in rows if row["reward"] == kind]
        before, after = (statistics.fmean(row[name] for row in mine) for name in ("before", "after"))
        gain = f"{statistics.fmean(gains[kind]):+.3f}"
        if df:
            gain += f" ± {intervals.quantile(0.975, df) * s / math.sqrt(len(mine)):.3f}"
        lines.append(f"| {kind} | {before:.3f} | {after:.3f} | {gain} | {len(mine)} |")
    if df:
        least = intervals.smallest(s / math.sqrt(min(map(len, gains.values()))), df)
        lines += ["", f"±: 95 %, with the pooled standard deviation of a gain, {s:.3f} ({df} degrees of freedom). "
                  f"80 % of studies like this one find a gain of {least:.3f}."]  # fmt: skip
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Held-out accuracy over the run, the mean over the starts."""
    lines: dict[str, tuple[list, list]] = {}
    for kind in REWARDS:
        curves = [row["curve"] for row in rows if row["reward"] == kind]
        if curves:
            lines[kind] = (curves[0][0], [statistics.fmean(values) for values in zip(*(c[1] for c in curves))])
    plot_lines({"greedy accuracy, held-out questions": lines}, path, "rollouts")


def main() -> None:
    config = parse(Config)
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["start"], row["reward"]) for row in rows}
    for start in map(Path, config.starts):
        need_checkpoint(str(start / "sft"), f"python pipeline.py --only sft --out {start}")
    for start in map(Path, config.starts):
        for kind in (kind for kind in REWARDS if (start.name, kind) not in there):
            rows.append(run(start, kind, config))
            keep_rows(page, rows)
    if not rows:
        raise UserError("no start: python studies/spurious.py out/seed1 out/seed2, folders of pipeline.py")
    draw(rows, page.with_suffix(".png"))
    write_table(page, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
