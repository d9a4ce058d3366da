"""Is my curve normal? A run beside the runs of others: the band in which one of its kind should lie, and what the usual
reasons are if it does not.

    python -m runtime.reference out/arith/grpo                # draws it into the run's folder, and says what is outside
    python -m runtime.reference --make out/seed1 out/seed2    # the reference curves anew, from folders of pipeline.py

The reference curves are those of the embedded task with the defaults, from several seeds (docs/reference/arith.jsonl).
The band at a step is where a further run lies with 95 % probability, if runs scatter normally: with mean m and standard
deviation s over n seeds, m ± t · s · √(1 + 1/n), with Student's t of n - 1 degrees of freedom.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from runtime.checkpoint import find_checkpoint, load_checkpoint, need_checkpoint, write_text
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_band, read_metrics
from runtime.words import words_of

FILE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "arith.jsonl"
CURVES = {  # of each stage, the curves that say most, in the order in which to look at them
    "pretrain": ("val_loss", "loss", "grad_norm"),
    "sft": ("val_loss", "loss", "grad_norm"),
    "reward": ("val_accuracy", "accuracy", "loss", "margin"),
    "dpo": ("val_questions", "accuracy", "margin", "logp_chosen"),
    "kto": ("val_questions", "margin", "kl", "logp_chosen"),
    "ppo": ("accuracy", "correct", "entropy", "kl_old", "clip_fraction", "explained_variance", "length"),
    "grpo": ("accuracy", "correct", "flat_groups", "entropy", "kl_old", "clip_fraction", "grad_norm", "length"),
    "gdpo": ("accuracy", "correct", "short", "flat_groups", "entropy", "kl_old", "clip_fraction", "length"),
}
POINTS = 40  # of a curve, at most: means of neighbouring steps
SHARE = 0.25  # of a curve's points, from which on it counts as outside
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # at 97.5 %

REASONS = {  # (curve, side) -> what it usually is
    ("val_loss", "above"): "fewer steps or data than the reference, a learning rate far from it, or a mask that hides "
    "what should be learned",
    ("val_loss", "below"): "held-out text that was trained on, or an easier tokenizer (compare bits per byte)",
    ("loss", "above"): "the learning rate (try half of it, and twice), a precision of 16 bits, or other data",
    ("loss", "below"): "the loss counts tokens that are easy to foresee, such as the prompt's",
    ("grad_norm", "above"): "a learning rate that is too high, or sums where the loss should average",
    ("grad_norm", "below"): "a loss that is divided too often, or parameters that do not learn",
    ("accuracy", "below"): "a weaker start, a reward that is rarely earned, too few updates, or a sign that is wrong: "
    "look at correct and at flat_groups",
    ("accuracy", "above"): "a stronger start, or held-out questions that were trained on",
    (
        "correct",
        "below",
    ): "a weaker start, a higher temperature, or a verifier that cannot read the answers (samples.txt shows some)",
    ("correct", "above"): "a lax verifier: compare with the held-out accuracy, which is always strict",
    ("flat_groups", "above"): "all answers to a question are right, or all wrong: correct says which; easier or harder "
    "questions, larger groups and a higher temperature help",
    ("flat_groups", "below"): "a reward with noise in it: answers that are alike earn different rewards",
    ("entropy", "below"): "a low temperature, or updates that are too large: the policy has stopped trying",
    ("entropy", "above"): "a high temperature, or nothing learned yet",
    ("kl_old", "above"): "updates that are too large or too many for one rollout: a lower learning rate, fewer epochs",
    ("kl_old", "below"): "a learning rate that is too low, or advantages near zero",
    ("clip_fraction", "above"): "updates that are too large or too many for one rollout",
    ("clip_fraction", "below"): "one update for each rollout (then it is 0 and should be), or a low learning rate",
    ("explained_variance", "below"): "a critic that has not learned yet, or values of the wrong tokens",
    ("length", "above"): "answers that do not end: look at truncated, and at the stop token in the loss",
    ("length", "below"): "answers that end before they have said anything: look at samples.txt",
    ("margin", "above"): "a large β or learning rate: look whether the chosen answers' log-probability falls",
    ("margin", "below"): "a small learning rate, or pairs whose answers hardly differ",
    (
        "logp_chosen",
        "below",
    ): "the policy unlearns both answers to tell them apart: a larger β or a lower learning rate",
    ("val_accuracy", "below"): "pairs that hardly differ, too few of them, or a score that is read at padding",
    ("val_questions", "below"): "a policy that tells answers apart and forgets how to give one: a larger β",
}


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """The run to look at; with --make, folders of pipeline.py."""
    make: bool = False
    """Write the reference curves anew, from these folders."""
    reasons: bool = False
    """Print the usual reasons, and stop."""
    write: str = ""
    """The picture. Default: reference.png in the run's folder."""


def thinned(steps: list, values: list) -> tuple[list[int], list[float]]:
    """At most POINTS points, the means of as many neighbours each."""
    size = math.ceil(len(steps) / POINTS)
    parts = range(0, len(steps), size)
    return (
        [round(statistics.fmean(steps[i : i + size])) for i in parts],
        [float(f"{statistics.fmean(values[i : i + size]):.5g}") for i in parts],
    )


def make(folders: list[Path], file: Path = FILE) -> int:
    """Write the curves of these starts; returns their number."""
    rows = []
    for folder in folders:
        for stage, curves in CURVES.items():
            path = folder / stage / "metrics.jsonl"
            if not path.exists():
                raise UserError(f"{folder} has no run of {stage}: python pipeline.py --out {folder}")
            series, settings = read_metrics(path), json.loads((folder / stage / "config.json").read_text())
            for curve in (curve for curve in curves if curve in series):
                steps, values = thinned(*series[curve])
                row = {"stage": stage, "curve": curve, "seed": settings["seed"], "of": len(series[curve][0])}
                rows.append(row | {"steps": steps, "values": values})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def band(rows: list[dict]) -> tuple[list[int], list[float], list[float]]:
    """(steps, low, high) of one curve from its rows, one for each seed.

    >>> low, high = band([{"steps": [0, 9], "values": [1.0, x]} for x in (2.0, 4.0)])[1:]
    >>> [round(x, 2) for x in (*low, *high)]  # 3 ± 12.706 · 1.414 · √1.5
    [1.0, -19.01, 1.0, 25.01]
    """
    n, shortest = len(rows), min(len(row["steps"]) for row in rows)
    low, high = [], []
    for i in range(shortest):
        values = [row["values"][i] for row in rows]
        half = T.get(n - 1, 2.0) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
        low.append(statistics.fmean(values) - half)
        high.append(statistics.fmean(values) + half)
    return rows[0]["steps"][:shortest], low, high


def at(steps: list, values: list, step: float) -> float:
    """The value at a step, on the line between its neighbours.

    >>> at([0, 10, 20], [0.0, 1.0, 3.0], 15), at([0, 10], [0.0, 1.0], 99)
    (2.0, 1.0)
    """
    if step <= steps[0]:
        return values[0]
    for (s0, v0), (s1, v1) in zip(zip(steps, values), zip(steps[1:], values[1:])):
        if step <= s1:
            return v0 + (v1 - v0) * (step - s0) / max(s1 - s0, 1e-9)
    return values[-1]


def verdict(mine: tuple[list, list], its_band: tuple[list, list, list]) -> tuple[str, float]:
    """("inside", "above" or "below"; the share of the points on that side), of the steps that both have."""
    steps, low, high = its_band
    points = [(s, v) for s, v in zip(*mine) if s <= steps[-1]]
    above = sum(v > at(steps, high, s) for s, v in points) / max(1, len(points))
    below = sum(v < at(steps, low, s) for s, v in points) / max(1, len(points))
    side, share = max((("above", above), ("below", below)), key=lambda pair: pair[1])
    return (side, share) if share >= SHARE else ("inside", 1 - above - below)


def look(run: Path, file: Path = FILE, write: Path | None = None) -> list[str]:
    """Draw a run's curves in their bands, and say of each where it lies."""
    need_checkpoint(str(run))
    if not (run / "metrics.jsonl").exists():
        raise UserError(f"{run} holds no metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stage = load_checkpoint(find_checkpoint(str(run)), mmap=True)["stage"]
    mine = [row for row in rows if row["stage"] == stage]
    if not mine:
        raise UserError(f"{run} is a run of {stage}: there are reference curves of {', '.join(CURVES)}")
    series, said, panels = read_metrics(run / "metrics.jsonl"), [], {}
    for curve in CURVES[stage]:
        of_seeds = [row for row in mine if row["curve"] == curve]
        if len(of_seeds) < 2 or curve not in series:
            continue
        its_band, own = band(of_seeds), thinned(*series[curve])
        side, share = verdict(own, its_band)
        reason = REASONS.get((curve, side), "")
        said.append(f"{words_of(curve)[0]}: {side}" + (f" for {share:.0%} of the run" if side != "inside" else ""))
        said[-1] += f"; usual reasons: {reason}" if reason else ""
        panels[f"{words_of(curve)[0]}: {side}"] = (its_band, own)
    plot_band(panels, write or run / "reference.png")
    seeds = len({row["seed"] for row in mine})
    return [f"{run} beside {seeds} runs of {stage} on the embedded task with the defaults", *said]


def table_of_reasons() -> str:
    """Markdown: what it usually is if a curve lies outside its band."""
    lines = ["| curve | lies | usual reasons |", "| --- | --- | --- |"]
    lines += [f"| {words_of(curve)[0]} | {side} | {reason} |" for (curve, side), reason in REASONS.items()]
    return "\n".join(lines)


def main() -> None:
    config = parse(Config)
    if config.reasons:
        print(table_of_reasons())
        return
    if config.make:
        print(f"{FILE}: {make([Path(run) for run in config.runs])} curves")
        return
    if len(config.runs) != 1:
        raise UserError("which run? python -m runtime.reference out/arith/grpo")
    run = Path(config.runs[0])
    print("\n".join(look(run, write=Path(config.write) if config.write else None)))
    print(config.write or run / "reference.png")


if __name__ == "__main__":
    run_main(main)
