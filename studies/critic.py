"""PPO's critic: how much of an answer's worth does it foresee, and what is that worth to the policy?

A critic that foresees nothing makes of GAE with λ = 1 the score itself, less a constant: REINFORCE with a clip. The
explained variance, 1 - var(R - V) / var(R) over the tokens of a rollout, says which of the two a run is. The critics:

* ``none``: no loss of the critic, so that its values stay at zero;
* ``shared``: ppo.py's, a head on the policy's body, with a tenth of the loss;
* ``shared, weight 1``: with all of it;
* ``shared, faster head``: a head that learns ten times as fast;
* ``own body``: a body of its own, which starts as the policy's;
* ``reward model``: a body and a head of its own, those of the start's reward model (InstructGPT's way);
* ``reward model, λ .95``: and advantages that trust it beyond a few tokens.

All else is as in ppo.py, from the same starts, folders of ``pipeline.py``::

    python studies/critic.py out/seed1 out/seed2 out/seed3     # adds what is missing
    python studies/critic.py                                   # the page anew, from the rows beside it
"""

import copy
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import intervals
import ppo
from attention import at_least_float32
from pages import keep_rows, read_rows, write_table
from reward import load_reward_model
from runtime.checkpoint import load_checkpoint, need_checkpoint
from runtime.config import Count, parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_lines, read_metrics
from transformer import Transformer

VARIANTS = {  # settings of ppo.py, and what the critic is made of
    "none": ({"value_weight": 0.0}, "shared"),
    "shared": ({}, "shared"),
    "shared, weight 1": ({"value_weight": 1.0}, "shared"),
    "shared, faster head": ({}, "fast"),
    "own body": ({"value_weight": 1.0}, "own"),
    "reward model": ({"value_weight": 1.0}, "reward"),
    "reward model, λ .95": ({"value_weight": 1.0, "lam": 0.95}, "reward"),
}


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py; none: the page is written anew from the rows that are there."""
    only: tuple[str, ...] = ()
    """Critics, by name. Default: all."""
    steps: Count = 60
    """Of each run, 256 answers each."""
    page: str = "docs/experiments/critic.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


class FastHead(ppo.ActorCritic):
    """AdamW moves each weight by about its learning rate, whatever its gradient: what is multiplied by ten afterwards
    moves ten times as far."""

    def forward(self, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logps, values = super().forward(tokens, mask, temperature)
        return logps, 10 * values


class OwnBody(ppo.ActorCritic):
    """A critic with a transformer of its own, which shares nothing with the policy."""

    def __init__(self, backbone: Transformer, judge: str = ""):
        super().__init__(backbone)
        if judge:
            model = load_reward_model(judge)[0]
            self.body = model.backbone
            self.value.load_state_dict(model.score.state_dict())
        else:
            self.body = copy.deepcopy(backbone)
        self.body.requires_grad_(True)
        if not self.config.tie_embeddings:
            self.body.head.requires_grad_(False)  # the words are not asked for

    def forward(self, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logps, _ = super().forward(tokens, mask, temperature)
        stream = at_least_float32(self.body.forward_hidden(tokens)[:, :-1])
        values = (stream * self.value.weight).sum(dim=-1) + self.value.bias
        return logps, values.masked_fill(~mask, 0.0)


def made_of(kind: str, start: Path):
    """What stands in for ``ppo.ActorCritic``: backbone -> model."""
    if kind == "reward":
        return lambda backbone: OwnBody(backbone, str(start / "reward"))
    return {"shared": ppo.ActorCritic, "fast": FastHead, "own": OwnBody}[kind]


def run(start: Path, name: str, config: Config) -> dict:
    """One row: a run of PPO with one of the critics, and its curves."""
    fields, kind = VARIANTS[name]
    out = start / ("critic_" + "".join(letter if letter.isalnum() else "_" for letter in name))
    settings = ppo.Config(
        init_from=str(start / "sft"), out_dir=str(out), seed=load_checkpoint(str(start / "sft"))["config"]["seed"],
        steps=config.steps, eval_every=10, eval_prompts=512, device="cpu", compile="off", **fields,
    )  # fmt: skip
    kept, ppo.ActorCritic = ppo.ActorCritic, made_of(kind, start)
    try:
        ppo.main(settings)
    finally:
        ppo.ActorCritic = kept
    curves = read_metrics(out / "metrics.jsonl")
    row = {"start": start.name, "critic": name}
    for curve in ("accuracy", "explained_variance", "correct"):
        row[curve] = [list(curves[curve][0]), [round(value, 5) for value in curves[curve][1]]]
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The page


def half(row: dict, curve: str) -> float:
    """The mean of a curve over the second half of a run."""
    values = row[curve][1]
    return statistics.fmean(values[len(values) // 2 :])


def table(rows: list[dict]) -> str:
    """Markdown: what each critic foresees, the policy's accuracy, and its difference to that without a critic, within a
    start."""
    names = [name for name in VARIANTS if any(row["critic"] == name for row in rows)]
    by_key = {(row["critic"], row["start"]): row for row in rows}
    starts = sorted({row["start"] for row in rows})
    gains = {
        name: [
            by_key[name, one]["accuracy"][1][-1] - by_key["none", one]["accuracy"][1][-1]
            for one in starts
            if (name, one) in by_key and ("none", one) in by_key
        ]
        for name in names
        if name != "none"
    }
    s, df, _ = intervals.pooled(list(gains.values()))
    head = "| critic | explained variance, second half | greedy accuracy | minus none | starts |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for name in names:
        mine = [row for row in rows if row["critic"] == name]
        foreseen = statistics.fmean(half(row, "explained_variance") for row in mine)
        end, gain = statistics.fmean(row["accuracy"][1][-1] for row in mine), ""
        if gains.get(name):
            gain = f"{statistics.fmean(gains[name]):+.3f}"
            gain += f" ± {intervals.quantile(0.975, df) * s / math.sqrt(len(gains[name])):.3f}" if df else ""
        lines.append(f"| {name} | {foreseen:+.3f} | {end:.3f} | {gain} | {len(mine)} |")
    if df:
        least = intervals.smallest(s / math.sqrt(min(map(len, filter(None, gains.values())))), df)
        said = f"±: 95 %, with the pooled standard deviation of a difference, {s:.3f} ({df} degrees of freedom). "
        lines += ["", f"{said}80 % of studies like this one find a difference of {least:.3f}."]
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """What each critic foresees and the policy's accuracy over the run, means over the starts."""
    panels: dict[str, dict[str, tuple[list, list]]] = {}
    for title, curve in (("explained variance", "explained_variance"), ("greedy accuracy", "accuracy")):
        panels[title] = {}
        for name in VARIANTS:
            found = [row[curve] for row in rows if row["critic"] == name]
            if found:
                means = [statistics.fmean(values) for values in zip(*(one[1] for one in found))]
                panels[title][name] = (found[0][0], smooth(means) if curve == "explained_variance" else means)
    plot_lines(panels, path, "rollouts")


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Each the mean of itself and the ones before it, ``width`` in all.

    >>> smooth([1.0, 3.0, 5.0], width=2)
    [1.0, 2.0, 4.0]
    """
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def main() -> None:
    config = parse(Config)
    if unknown := [name for name in config.only if name not in VARIANTS]:
        raise UserError(f"--only {unknown[0]}: no such critic; there are {', '.join(VARIANTS)}")
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["start"], row["critic"]) for row in rows}
    for start in map(Path, config.starts):
        for stage in ("sft", "reward"):
            need_checkpoint(str(start / stage), f"python pipeline.py --only reward --out {start}")
    for start in map(Path, config.starts):
        for name in config.only or VARIANTS:
            if (start.name, name) not in there:
                rows.append(run(start, name, config))
                keep_rows(page, rows)
    if not rows:
        raise UserError("no start: python studies/critic.py out/seed1 out/seed2, folders of pipeline.py")
    draw(rows, page.with_suffix(".png"))
    write_table(page, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
