"""Over-optimisation with the truth known: what happens to the real reward as the proxy is optimised.

A reward model is a proxy. Choose by it among ever more answers and the proxy rises for ever, while the true quality
rises, stops, and falls (Gao et al. 2023): the more is chosen, the more the proxy's mistakes are what is chosen. Here
the truth is the verifier, so both are known exactly.

Best of n: of n answers of the policy to a question the one with the highest score is taken. From N sampled answers the
expectation over all subsets of n is a sum, without chance: with the answers sorted by score, the best of a subset is
the i-th with probability (C(i, n) - C(i-1, n)) / C(N, n); answers with equal scores share theirs. How far that moves
the policy is known, too: KL(n) = ln n - (n - 1)/n. Gao et al. fitted the true reward by

    R(d) = d (α - β d)          with d = √KL, for best of n: α is what a little optimisation brings, β what it costs

The sizes are pairs of the policy's own answers that a reward model learned from, a right one and a wrong one each, and
at last the reward model of the pipeline. The starts are folders of ``pipeline.py``::

    python studies/overoptimise.py out/seed1 out/seed2 out/seed3 out/seed4 out/seed5   # adds what is missing
"""

import contextlib
import io
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import intervals
import reward
from arithmetic import problems
from pages import keep_rows, read_rows, write_table
from preferences import own_pairs
from reward import load_reward_model
from rollout import sample_answers, score
from runtime.checkpoint import need_checkpoint
from runtime.config import Count, parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_lines
from runtime.rows import read_file
from stages import load_stage
from tokenizer import encode_chat

SIZES = (64, 128, 256, 512, 1024)  # pairs; and all that there are, with the stories and sums of the pipeline's
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHOWN = (1, 4, 16, 64, 256)  # in the table


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py; none: the page is written anew from the rows that are there."""
    sizes: tuple[int, ...] = SIZES
    """How many pairs the reward models learn from."""
    questions: Count = 256
    """Held-out questions."""
    answers: Count = 256
    """Answers to each; the largest n."""
    page: str = "docs/experiments/overoptimise.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


def best_of(scores: Tensor, values: Tensor, n: int) -> float:
    """The expected value of the answer with the highest score among n of N different ones; (N,) each.

    >>> best_of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]), 2)  # the pairs' bests are 2, 3, 3
    0.3333333333333333
    >>> best_of(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]), 2)  # all tied: any of them
    0.3333333333333333
    """
    N, below, total = len(scores), 0, 0.0
    for level in scores.unique():  # from the lowest
        here = scores == level
        up_to = below + int(here.sum())
        chance = (math.comb(up_to, n) - math.comb(below, n)) / math.comb(N, n)
        total += chance * float(values[here].double().mean())
        below = up_to
    return total


def kl_of(n: int) -> float:
    """KL(best of n ‖ policy), in nats.

    >>> round(kl_of(4), 3)
    0.636
    """
    return math.log(n) - (n - 1) / n


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """α, β of R = d (α - β d) by least squares, and R²; points (d, R), d > 0.

    >>> fit([(1.0, 0.9), (2.0, 1.6), (3.0, 2.1)])  # d - 0.1 d²
    (1.0, 0.1, 1.0)
    """
    d = torch.tensor([x for x, _ in points], dtype=torch.float64)
    gain = torch.tensor([y for _, y in points], dtype=torch.float64)
    terms = torch.stack([d, -d.square()], dim=1)
    solved = torch.linalg.lstsq(terms, gain[:, None]).solution[:, 0]
    left = (gain - terms @ solved).square().sum() / (gain - gain.mean()).square().sum()
    return round(float(solved[0]), 4), round(float(solved[1]), 4), round(1 - float(left), 4)


@dataclass
class Answers:
    """The different answers to each question, and which sample is which of them."""

    tokens: list[Tensor]  # of a question: (M, T), [prompt | answer | padding]
    real: list[Tensor]  # (M, T) boolean
    which: list[Tensor]  # (N,): sample -> row of tokens
    right: Tensor  # (questions, N), 0 or 1


@torch.no_grad()
def sampled(folder: Path, config: Config) -> Answers:
    """What the fine-tuned policy of a start writes to held-out questions, at temperature 1."""
    policy, tokenizer, _ = load_stage(str(folder / "sft"))
    found = Answers([], [], [], torch.empty(config.questions, config.answers))
    for i, problem in enumerate(tqdm(problems(config.questions, "best of n", "test"), desc="sampling", leave=False)):
        prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": problem.question}], add_generation_prompt=True)
        rollout = sample_answers(policy, tokenizer, [prompt], config.answers, 64, 1.0, seed=i)
        real = reward.real_tokens(rollout.tokens, rollout.mask)
        tokens, which = rollout.tokens.masked_fill(~real, tokenizer.pad_id).unique(dim=0, return_inverse=True)
        first = torch.stack([(which == row).nonzero()[0, 0] for row in range(len(tokens))])
        found.tokens.append(tokens)
        found.real.append(real[first])
        found.which.append(which)
        found.right[i] = score(rollout.texts, [problem.answer] * config.answers, rollout.finished)[0]
    return found


def trained(folder: Path, size: int, seed: int) -> Path:
    """The folder of a reward model that learned from so many of the policy's own pairs."""
    out = folder / f"reward_{size}"
    steps = size * EPOCHS // 8
    settings = reward.Config(
        init_from=str(folder / "sft"), out_dir=str(out), data="own", n_pairs=size, n_sums=0, batch_size=8,
        epochs=float(EPOCHS), eval_every=steps, device="cpu", compile="off", normalize_on=64, seed=seed,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        reward.main(settings)
    return out


EPOCHS = 4


@torch.no_grad()
def measure(folder: Path, judge_folder: Path, size: int, answers: Answers) -> dict:
    """One row: a reward model of a start, its best of n, by the verifier (gold) and by itself (proxy)."""
    judge, _, _ = load_reward_model(str(judge_folder))
    gold, proxy = dict.fromkeys(NS, 0.0), dict.fromkeys(NS, 0.0)
    scores = [judge(tokens, real)[which] for tokens, real, which in zip(answers.tokens, answers.real, answers.which)]
    every = torch.cat(scores)
    for values, right in zip(scores, answers.right):
        standard = (values - every.mean()) / every.std()  # in standard deviations of the policy's answers
        for n in (n for n in NS if n <= len(values)):
            gold[n] += best_of(values, right, n) / len(scores)
            proxy[n] += best_of(values, standard, n) / len(scores)
    row = {"start": folder.name, "pairs": size, "questions": len(scores), "answers": len(every) // len(scores)}
    return row | {
        "gold": {str(n): round(gold[n], 5) for n in NS if n <= len(scores[0])},
        "proxy": {str(n): round(proxy[n], 5) for n in NS if n <= len(scores[0])},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The page

PIPELINE = 0  # as a size: the pipeline's reward model


def label(size: int) -> str:
    return "the pipeline's" if size == PIPELINE else f"{size:,} pairs"


def interval(values: list[float]) -> str:
    """The mean over the starts and the half width of its 95 % interval.

    >>> interval([0.5, 0.75])
    '0.625 ± 1.588'
    """
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) < 2:
        return mean
    half = intervals.quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.3f}"


def table(rows: list[dict]) -> str:
    """Markdown: for each size, the accuracy of best of n, where it is highest, the loss from there, and the fit."""
    lines = [
        "| learned from | " + " | ".join(f"n = {n}" for n in SHOWN) + " | highest at n | lost by the end | α | β | R² |"
    ]
    lines.append("| --- |" + " --- |" * (len(SHOWN) + 5))
    for size in sorted({row["pairs"] for row in rows}, key=lambda size: (size == PIPELINE, size)):
        mine = [row for row in rows if row["pairs"] == size]
        ns = [n for n in NS if all(str(n) in row["gold"] for row in mine)]
        means = {n: statistics.fmean(row["gold"][str(n)] for row in mine) for n in ns}
        peak = max(means, key=means.get)
        lost = [row["gold"][str(peak)] - row["gold"][str(ns[-1])] for row in mine]
        alpha, beta, r2 = fit([(math.sqrt(kl_of(n)), means[n] - means[1]) for n in ns if n > 1])
        cells = [interval([row["gold"][str(n)] for row in mine]) for n in SHOWN if n in ns]
        lines.append(
            "| "
            + " | ".join([label(size), *cells, str(peak), interval(lost), f"{alpha:.3f}", f"{beta:.3f}", f"{r2:.2f}"])
            + " |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy and score of the chosen answer over √KL, the mean over the starts."""
    panels: dict[str, dict[str, tuple[list, list]]] = {}
    for name, words in (("gold", "accuracy of the chosen answer"), ("proxy", "its score, in standard deviations")):
        for size in sorted({row["pairs"] for row in rows}, key=lambda size: (size == PIPELINE, size)):
            mine = [row[name] for row in rows if row["pairs"] == size]
            ns = [n for n in NS if all(str(n) in one for one in mine)]
            means = [statistics.fmean(one[str(n)] for one in mine) for n in ns]
            panels.setdefault(words, {})[label(size)] = ([math.sqrt(kl_of(n)) for n in ns], means)
    plot_lines(panels, path, "√KL of best of n, n = 1 to 256")


def main() -> None:
    config = parse(Config)
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["start"], row["pairs"]) for row in rows}
    for start in map(Path, config.starts):
        todo = [size for size in (*config.sizes, PIPELINE) if (start.name, size) not in there]
        if not todo:
            continue
        need_checkpoint(str(start / "sft"), f"python pipeline.py --out {start}")
        if PIPELINE in todo:
            need_checkpoint(str(start / "reward"), f"python pipeline.py --out {start}")
        policy, tokenizer, state = load_stage(str(start / "sft"))
        seed = state["config"]["seed"]
        most = len(list(read_file(own_pairs(policy, tokenizer, str(start / "sft"), seed))))
        if max(todo) > most:
            raise UserError(f"--sizes {max(todo)}: the policy of {start} made {most} pairs")
        answers = sampled(start, config)
        for size in tqdm(todo, desc=start.name):
            folder = start / "reward" if size == PIPELINE else trained(start, size, seed)
            rows.append(measure(start, folder, size, answers))
            keep_rows(page, rows)
    if not rows:
        raise UserError("no start: python studies/overoptimise.py out/seed1 out/seed2, folders of pipeline.py")
    draw(rows, page.with_suffix(".png"))
    write_table(page, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
