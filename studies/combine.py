"""What three ways to combine rewards have in common, by enumeration.

GDPO divides each reward by its std in the group. Of G answers with rewards of 0 or 1, k of them 1, that is::

    s = √( k (G - k) / (G (G - 1)) )            G = 4:  0.500 for k = 1 and 3,  0.577 for k = 2

so in groups of 4 GDPO is nearly a sum that is divided by a constant; in larger groups the std of a rare reward is far
from that of a common one. GRPO divides by the std of the *sum*, which is another thing. Every group that can occur is
enumerated, with its probability, for answers that are independent of each other, and two figures say how alike the
advantages are:

* R²: the squared correlation of the advantages of two ways, over the answers of all groups.
* The share of squared advantage in groups whose answers do not differ in being right: what is spent on other rewards.

    python studies/combine.py
    python studies/combine.py out/arith/sft --settings "reward=examples/graded.py"      # how a policy's rewards vary

The second measures, over the answers of a policy to questions of training, the std of each reward that counts: what
the weights of a sum would have to be for no reward to speak louder than another at the start.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import gdpo
from ablate import read_settings, to_arguments
from data import encode_prompts
from gdpo import group_sums
from grpo import group_advantages
from rollout import sample_answers
from runtime.config import parse
from runtime.errors import run_main
from stages import load_stage
from texts import load_prompts

WEAK = {(0, 0, 0): 0.8, (0, 1, 0): 0.12, (1, 1, 0): 0.03, (1, 1, 1): 0.05}  # right, in form, short if right
CASES = {  # how often an answer earns which rewards, the first of them for being right
    "right .08, in form .2, short if right .05": (WEAK, (4, 16)),
    "independent: .5, .5, .5": ((0.5, 0.5, 0.5), (4,)),
    "independent: .9, .5, .5": ((0.9, 0.5, 0.5), (4,)),
    "independent: .1, .1, .1": ((0.1, 0.1, 0.1), (4,)),
    "independent: .5, .5": ((0.5, 0.5), (4, 16)),
    "independent: .5, .98": ((0.5, 0.98), (4, 16)),
}


def independent(rates: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    """
    >>> independent((0.5, 0.75))
    {(0, 0): 0.125, (0, 1): 0.375, (1, 0): 0.125, (1, 1): 0.375}
    """
    rows = itertools.product((0, 1), repeat=len(rates))
    return {row: math.prod(p if earned else 1 - p for earned, p in zip(row, rates)) for row in rows}


def all_groups(answers: dict[tuple[int, ...], float], group_size: int) -> tuple[Tensor, Tensor]:
    """Every group of so many independent answers, order aside: rewards (groups, G, K) and probabilities (groups,)."""
    groups, chances = [], []
    for group in itertools.combinations_with_replacement(answers, group_size):
        counts = [group.count(row) for row in answers]
        orders = math.factorial(group_size) // math.prod(map(math.factorial, counts))
        groups.append(group)
        chances.append(orders * math.prod(answers[row] ** n for row, n in zip(answers, counts)))
    return torch.tensor(groups, dtype=torch.float64), torch.tensor(chances, dtype=torch.float64)


def advantages(rewards: Tensor) -> dict[str, Tensor]:
    """(groups, G, K) rewards of weight 1 -> (groups, G) by each way, before GDPO's step over the batch."""
    n, G, K = rewards.shape
    flat, eps = rewards.reshape(n * G, K), 1e-12
    ways = {
        "added": group_advantages(flat.sum(dim=1), G, eps=eps), "no std": group_advantages(flat.sum(dim=1), G, "none"),
        "GDPO": group_sums(flat, G, eps=eps),
    }  # fmt: skip
    return {name: values.view(n, G) for name, values in ways.items()}


def compare(answers: dict[tuple[int, ...], float], group_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """R² of GDPO with the two sums, and of each way the share of squared advantage where nobody differs in right."""
    rewards, chances = all_groups(answers, group_size)
    found = advantages(rewards)
    mean = lambda values: float((chances[:, None] * values).sum())  # noqa: E731
    gdpo = found["GDPO"]  # all have the mean 0
    squared = {
        name: mean(values * gdpo) ** 2 / (mean(values**2) * mean(gdpo**2))
        for name, values in found.items()
        if name != "GDPO"
    }
    alike = (rewards[:, :, 0] == rewards[:, :1, 0]).all(dim=1)[:, None]
    return squared, {name: mean(values**2 * alike) / mean(values**2) for name, values in found.items()}


@dataclass(frozen=True)
class Config:
    run: tyro.conf.Positional[str] = ""
    """A policy, whose rewards are measured instead."""
    settings: str = ""
    """Settings of gdpo.py, as in a cell of ablate.py: they say which rewards there are."""


def measured(config: Config, questions: int = 512, answers: int = 4) -> dict[str, tuple[float, float]]:
    """The mean and the std of each reward over answers of a policy, all of them together."""
    settings = parse(gdpo.Config, to_arguments(read_settings(config.settings)))
    model, tokenizer, _ = load_stage(config.run)
    most = model.config.max_seq_len - settings.max_new_tokens
    ids, prompts = encode_prompts(load_prompts("arith", "train", n=questions), tokenizer, most)
    asked = [prompt for prompt in prompts for _ in range(answers)]
    sampled = sample_answers(model, tokenizer, ids, answers, settings.max_new_tokens, settings.temperature, seed=0)
    rewards, weights = gdpo.judge(sampled, asked, settings), gdpo.weights_of(settings)
    return {name: (float(values.mean()), float(values.std())) for name, values in rewards.items() if weights[name]}


def main() -> None:
    config = parse(Config)
    if config.run:
        print("| reward | mean | std | 1/std, the first as 1 |\n| --- | --- | --- | --- |")
        found = measured(config)
        unit = next(iter(found.values()))[1]
        for name, (mean, std) in found.items():
            print(f"| {name} | {mean:.3f} | {std:.3f} | {unit / max(std, 1e-9):.3g} |")
        return
    print("| how often an answer earns what | G | R² of GDPO and added | and no std | share: added | no std | GDPO |")
    print("| --- " * 7 + "|")
    for name, (answers, sizes) in CASES.items():
        for size in sizes:
            squared, share = compare(answers if isinstance(answers, dict) else independent(answers), size)
            figures = " | ".join(f"{value:.3f}" for value in (*squared.values(), *share.values()))
            print(f"| {name} | {size} | {figures} |")


if __name__ == "__main__":
    run_main(main)
