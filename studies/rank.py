"""A ranking of methods, and what it can resolve.

A table of one seed ranks nothing: the start decides more than the method does. Here every method learns from the same
number of sampled answers (16,384), from the same starts, which nothing was tuned on; each has its own learning rate,
the best of three on two other starts; and what is compared are differences to GRPO within a start. The interval is that
of a bootstrap in two levels, which draws starts anew and, within them, questions, the same ones for all methods::

    d*(m) = mean over drawn starts of mean over drawn questions of [right(m) - right(GRPO)]       10,000 times

so it covers both kinds of chance. The share of draws in which a method is first says how sure the ranking is::

    python studies/rank.py --out out/rank                 # hours; any interruption may come, the same command goes on
    python studies/rank.py --out out/rank --starts 14     # adds to what is there
    python studies/rank.py --report_only                  # the table anew, from the rows beside the page
"""

import contextlib
import io
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import dpo
import grpo
import kto
import pipeline
import ppo
from data import encode_prompts
from pages import keep_rows, read_rows, write_table
from rollout import sample_answers, score
from runtime.config import Count, parse, read_preset
from runtime.errors import UserError, run_main
from runtime.plots import plot_report
from stages import load_stage
from texts import load_prompts

STEPS = 64  # of 256 answers each: as many as the DPO family's pairs are made of, four to each of 4,096 questions
FACTORS = (1 / 3, 1.0, 3.0)  # of a method's default learning rate
TUNING = (101, 102)  # seeds of the starts on which learning rates are chosen
METHODS: dict[str, tuple[str, Any, dict]] = {  # name: label, chapter, settings
    "grpo": ("GRPO", grpo, {}),
    "dr_grpo": ("Dr. GRPO", grpo, {"preset": "grpo_dr.py"}),
    "gspo": ("GSPO", grpo, {"preset": "grpo_gspo.py"}),
    "cispo": ("CISPO", grpo, {"preset": "grpo_cispo.py"}),
    "ppo": ("PPO, verifier", ppo, {}),
    "dpo": ("DPO", dpo, {"method": "dpo"}),
    "orpo": ("ORPO", dpo, {"method": "orpo"}),
    "kto": ("KTO", kto, {}),
}
REFERENCE = "grpo"


@dataclass(frozen=True)
class Config:
    out: str = "out/rank"
    """Where starts and runs are kept."""
    starts: Count = 7
    """Seeds 1 to so many."""
    questions: Count = 2048
    """Test questions, answered greedily."""
    page: str = "docs/experiments/rank.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""
    report_only: bool = False
    """Run nothing."""


def start_of(seed: int, config: Config) -> Path:
    """The folder of a start: pretraining and SFT with this seed, as the pipeline does them."""
    folder = Path(config.out) / f"seed{seed}"
    for stage in pipeline.stages(pipeline.Config(out=str(folder), seed=seed, device="cpu"))[:2]:
        if not pipeline.is_finished(stage):
            stage.main(stage.config)
    return folder


def settings_of(method: str, folder: Path, seed: int, factor: float) -> Any:
    """A method's configuration with its default learning rate times ``factor``."""
    _, chapter, more = METHODS[method]
    fields = dict(more)
    if preset := fields.pop("preset", ""):
        fields = read_preset(chapter.Config, str(Path(__file__).parents[1] / "configs" / preset)) | fields
    if chapter in (grpo, ppo):
        fields["steps"] = STEPS
    fields |= {"init_from": str(folder / "sft"), "seed": seed, "device": "cpu"}
    plain = chapter.Config(**fields | {"out_dir": str(folder / f"{method}_{factor:.2g}")})
    return replace(plain, lr=factor * plain.lr)


@torch.no_grad()
def answered(folder: str, split: str, n: int) -> Tensor:
    """(n,) boolean: which questions of a split a checkpoint answers rightly, greedily."""
    model, tokenizer, _ = load_stage(folder)
    ids, prompts = encode_prompts(load_prompts("arith", split, n=n), tokenizer, model.config.max_seq_len - 64)
    right = torch.empty(len(ids))
    for first in range(0, len(ids), 512):
        some = slice(first, first + 512)
        rollout = sample_answers(model, tokenizer, ids[some], 1, 64, 0.0, seed=0)
        right[some] = score(rollout.texts, [prompt.gold for prompt in prompts[some]], rollout.finished)[0].cpu()
    return right.bool()


def packed(right: Tensor) -> str:
    """A boolean (n,) as hexadecimal digits, the first one in the highest bit; ``unpacked`` is its inverse.

    >>> packed(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]).bool()), unpacked("818", 9).int().tolist()
    ('818', [1, 0, 0, 0, 0, 0, 0, 1, 1])
    """
    bits = "".join("01"[int(x)] for x in right.tolist())
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))


def unpacked(digits: str, n: int) -> Tensor:
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)[:n]
    return torch.tensor([bit == "1" for bit in bits])


def run(method: str, seed: int, factor: float, split: str, config: Config) -> dict:
    """One row: a run, and which questions it answers."""
    folder = start_of(seed, config)
    settings = settings_of(method, folder, seed, factor)
    with contextlib.redirect_stdout(io.StringIO()):
        METHODS[method][1].main(settings)
    right = answered(settings.out_dir, split, config.questions)
    row = {"method": method, "seed": seed, "factor": round(factor, 4), "split": split, "n": len(right)}
    return row | {"accuracy": round(float(right.float().mean()), 5), "right": packed(right)}


# ----------------------------------------------------------------------------------------------------------------------
# The page


def best_factors(rows: list[dict]) -> dict[str, float]:
    """The factor of the learning rate with which a method did best on the starts of the tuning, on average."""
    found = {}
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method and row["split"] == "validation"]
        means = {
            factor: statistics.fmean(row["accuracy"] for row in mine if row["factor"] == factor)
            for factor in dict.fromkeys(row["factor"] for row in mine)
        }
        if means:
            found[method] = max(means, key=means.get)
    return found


def answers_of(rows: list[dict]) -> dict[str, Tensor]:
    """Of each method that ran from every start: (starts, questions), 0 or 1."""
    mine = [row for row in rows if row["split"] == "test"]
    seeds = sorted({row["seed"] for row in mine})
    found = {}
    for method in METHODS:
        by_seed = {row["seed"]: unpacked(row["right"], row["n"]) for row in mine if row["method"] == method}
        if set(by_seed) == set(seeds):
            found[method] = torch.stack([by_seed[seed] for seed in seeds]).double()
    return found


def bootstrap(answers: dict[str, Tensor], draws: int = 10_000, seed: int = 0) -> dict[str, Tensor]:
    """Of each method (draws,): its mean accuracy minus the reference's, with starts and questions drawn anew. The
    questions of a draw are the same for all starts and methods."""
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.stack([answers[method] - answers[REFERENCE] for method in answers])  # (M, S, Q)
    M, S, Q = stacked.shape
    found = []
    for first in range(0, draws, 500):
        starts, questions = (counts(min(500, draws - first), n, generator) / n for n in (S, Q))  # (D, S), (D, Q)
        of_starts = (stacked.view(M * S, Q) @ questions.T).view(M, S, -1)  # (M, S, D)
        found.append((of_starts * starts.T).sum(dim=1))  # (M, D)
    return dict(zip(answers, torch.cat(found, dim=1)))


def counts(draws: int, n: int, generator: torch.Generator) -> Tensor:
    """(draws, n): how often each of n things comes in n draws with replacement."""
    drawn = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, n, dtype=torch.float64))


def table(rows: list[dict]) -> str:
    """Markdown: accuracy over the starts, the difference to GRPO with its interval, and how often a method is first."""
    answers, factors = answers_of(rows), best_factors(rows)
    drawn = bootstrap(answers)
    first = torch.stack(list(drawn.values())).argmax(dim=0)
    lines = ["| method | learning rate | accuracy, mean and range | minus GRPO, 95 % | first |"]
    lines.append("| --- | --- | --- | --- | --- |")
    order = sorted(answers, key=lambda method: -float(answers[method].mean()))
    for method in order:
        each = answers[method].mean(dim=1)
        low, high = drawn[method].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        mean = float((answers[method] - answers[REFERENCE]).mean())
        against = "" if method == REFERENCE else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        spread = f"{float(each.mean()):.3f} ({float(each.min()):.3f} to {float(each.max()):.3f})"
        ahead = float((first == list(drawn).index(method)).double().mean())
        cells = [METHODS[method][0], f"{factors[method]:.2g} × default", spread, against, f"{ahead:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    starts, questions = next(iter(answers.values())).shape
    errors = [float(values.std()) for method, values in drawn.items() if method != REFERENCE]
    lines += [
        "", f"{starts} starts, {questions:,} questions. A difference has a standard error of {min(errors):.3f} to "
        f"{max(errors):.3f}; 80 % of rankings like this one find one of {2.8 * max(errors):.3f}.",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    config = parse(Config)
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["method"], row["seed"], row["factor"]) for row in rows}
    if not config.report_only:
        tuning = [(m, seed, f) for seed in TUNING for m in METHODS for f in FACTORS]
        for method, seed, factor in tqdm(tuning, desc="learning rates"):
            if (method, seed, round(factor, 4)) not in there:
                rows.append(run(method, seed, factor, "validation", config))
                keep_rows(page, rows)
        factors = best_factors(rows)
        ranked = [(method, seed) for seed in range(1, config.starts + 1) for method in METHODS]
        for method, seed in tqdm(ranked, desc="starts"):
            if (method, seed, factors[method]) not in there:
                exact = min(FACTORS, key=lambda one: abs(one - factors[method]))
                rows.append(run(method, seed, exact, "test", config))
                keep_rows(page, rows)
    if len(answers_of(rows)) < 2:
        raise UserError("no rows yet: python studies/rank.py runs for hours and goes on where it was")
    each = {method: answers.mean(dim=1).tolist() for method, answers in answers_of(rows).items()}
    n = next(iter(answers_of(rows).values())).shape[1]
    reports = [
        [{"stage": METHODS[m][0], "accuracy": values[i], "low": 0.0, "high": 1.0, "n": n} for m, values in each.items()]
        for i in range(len(next(iter(each.values()))))
    ]
    plot_report(reports, page.with_suffix(".png"))
    write_table(page, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
