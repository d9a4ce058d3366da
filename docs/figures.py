"""The figures of docs/foundations/, each computed by the book's own functions in a few seconds.

python docs/figures.py              # all of them, into docs/foundations/
python docs/figures.py kl family    # these
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import torch

from arithmetic import documents
from attention import attention, causal_mask
from generate import filter_logits
from grpo import kl_estimate
from ppo import ppo_policy_loss
from reward import bradley_terry_loss
from runtime.errors import UserError, run_main
from runtime.plots import COLOURS, GREY, _axes, _legend_below, _save, read_metrics

WORDS = ["Tom", "has", "4", "apples", ".", "He"]


def language_model(path: Path) -> None:
    """Bits per byte of held-out text against how many bytes before it a counting model looks at."""
    orders = range(7)
    counts: list[dict] = [defaultdict(Counter) for _ in orders]
    for text in documents(4000, seed=0):
        data = text.encode()
        for n in orders:
            for i in range(n, len(data)):
                counts[n][data[i - n : i]][data[i]] += 1
    bits, size = [0.0] * len(orders), 0
    for text in documents(300, seed=1):
        data = text.encode()
        size += len(data)
        for i in range(len(data)):
            p = 1 / 256
            for n in orders:  # each order corrects the one below it, the more so the more often it saw this context
                if n <= i:
                    seen = counts[n].get(data[i - n : i], Counter())
                    p = (seen[data[i]] + 2 * p) / (seen.total() + 2)
                bits[n] -= math.log2(p)
    base = next(row for row in json.loads((ROOT / "docs/reports/seed1.json").read_text()) if row["stage"] == "Base")
    figure, (axis,) = _axes(1, columns=1, width=5.6, height=3.2)
    axis.plot(list(orders), [one / size for one in bits], marker="o", color=COLOURS[0], label="counting")
    axis.axhline(base["bits_per_byte"], color=COLOURS[1], linestyle="--", label="the book's base model")
    axis.set(xlabel="bytes before it that are looked at", ylabel="bits per byte of held-out text", ylim=(0, None))
    axis.legend()
    _save(figure, path)


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of six words, made by hand: "He" looks for a person, "apples" for a number."""
    person, number = [3.0, 0.0], [0.0, 3.0]
    keys = torch.tensor([person, [0.0, 0.0], number, [0.5, 0.0], [0.0, 0.0], [1.0, 0.0]])
    queries = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.3, 0.3], [0.0, 1.5], [0.2, 0.2], [1.5, 0.0]])
    return queries, keys, torch.eye(6)


def attention_by_hand(path: Path) -> None:
    """Who looks at whom, with the causal mask and with a window of three."""
    q, k, v = (x[None, None] for x in heads())
    figure, axes = _axes(2, columns=2, width=3.9, height=3.5)
    for axis, window in zip(axes, (None, 3)):
        weights = attention(q, k, v, causal_mask(6, 6, window=window))[1][0, 0]
        axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        for i in range(6):
            for j in range(i + 1):
                shade = "white" if weights[i, j] > 0.55 else "black"
                axis.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=7, color=shade)
        axis.set_xticks(range(6), WORDS)
        axis.set_yticks(range(6), WORDS)
        axis.grid(False)
        axis.set(xlabel="looked at (key)", ylabel="looking (query)")
        axis.set_title("all words before" if window is None else f"a window of {window}")
    _save(figure, path)


def policy(path: Path) -> None:
    """The same logits at three temperatures."""
    tokens, logits = ["7", "8", "6", "17", "apples"], torch.tensor([3.0, 2.0, 1.5, 0.5, -1.0])
    figure, axes = _axes(3, columns=3, width=2.8, height=2.6)
    for axis, temperature in zip(axes, (0.5, 1.0, 2.0)):
        p = filter_logits(logits, temperature=temperature).softmax(dim=-1)
        entropy = -(p * p.log()).sum()
        axis.bar(tokens, p, color=COLOURS[0])
        axis.set(ylim=(0, 1), ylabel="probability" if temperature == 0.5 else "", xlabel="next token")
        axis.set_title(f"temperature {temperature:g}, entropy {entropy:.2f} nats", fontsize=8.5)
    _save(figure, path)


def rewards(path: Path) -> None:
    """Bradley-Terry: what a difference of rewards means, and what it costs."""
    gap = torch.linspace(-5, 5, 201)
    losses = [bradley_terry_loss(g[None], torch.zeros(1)).item() for g in gap]
    figure, axes = _axes(2, columns=2, width=3.9, height=2.8)
    axes[0].plot(gap, gap.sigmoid(), color=COLOURS[0])
    axes[0].set(xlabel="reward of the chosen minus reward of the rejected", ylabel="probability that it is chosen")
    axes[1].plot(gap, losses, color=COLOURS[1])
    axes[1].set(xlabel="reward of the chosen minus reward of the rejected", ylabel="loss of the pair (nats)")
    _save(figure, path)


def kl(path: Path) -> None:
    """The three estimates of one token, and how much they scatter, exactly, over 50 tokens."""
    d = torch.linspace(-2, 2, 201)
    figure, axes = _axes(2, columns=2, width=3.9, height=3.0)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    policy, shift = logits.log_softmax(dim=-1), torch.randn(50, generator=torch.Generator().manual_seed(1))
    for kind, colour in zip(("k1", "k2", "k3"), COLOURS):
        axes[0].plot(d, kl_estimate(d, torch.zeros_like(d), kind), color=colour, label=kind)
        truth, scatter = [], []
        for strength in torch.linspace(0.05, 1.2, 24):
            reference = (logits + strength * shift).log_softmax(dim=-1)
            p, value = policy.exp(), kl_estimate(policy, reference, kind)
            truth.append((p * (policy - reference)).sum().item())
            scatter.append((p * (value - (p * value).sum()).square()).sum().sqrt().item())
        axes[1].plot(truth, scatter, color=colour, label=kind)
    axes[0].set(xlabel="log π - log π_ref of the sampled token", ylabel="estimate (nats)")
    axes[1].set(xlabel="true KL (nats)", ylabel="standard deviation of one estimate")
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    _legend_below(figure, axes)
    _save(figure, path)


def family(path: Path) -> None:
    """The clipped objective and its gradient, for a good and for a bad token."""
    ratio = torch.linspace(0.4, 1.6, 241)
    figure, axes = _axes(2, columns=2, width=3.9, height=2.8)
    for axis, advantage in zip(axes, (1.0, -1.0)):
        values = []
        for r in ratio:
            one = r.log().view(1, 1)
            values.append(
                -ppo_policy_loss(one, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1)).item()
            )
        axis.plot(ratio, ratio * advantage, color=GREY, linestyle=":", label="ρ A")
        axis.plot(ratio, values, color=COLOURS[0], label="min(ρ A, clip(ρ) A)")
        axis.axvline(1, color=GREY, linewidth=0.6)
        axis.set(xlabel="ratio ρ = π / π_old", ylabel="objective of the token")
        axis.set_title(f"advantage {advantage:+g}")
    _legend_below(figure, axes)
    _save(figure, path)


def silence(path: Path) -> None:
    """How many groups teach nothing, by how often the policy is right."""
    p = torch.linspace(0.002, 0.998, 400)
    figure, (axis,) = _axes(1, columns=1, width=5.6, height=3.2)
    for size, colour in zip((4, 8, 16, 64), COLOURS):
        axis.plot(p, p**size + (1 - p) ** size, color=colour, label=f"{size} answers")
    run = read_metrics(ROOT / "docs/reference/h200_50m_grpo.jsonl")
    right, flat = (run[name][1][30:] for name in ("correct", "flat_groups"))
    axis.plot(
        sum(right) / len(right), sum(flat) / len(flat), "*", color="black", markersize=9, label="a run, 16 answers"
    )
    axis.set(xlabel="probability that an answer is right", ylabel="share of groups without a difference", ylim=(0, 1))
    axis.legend()
    _save(figure, path)


PANELS = {  # metric: what it should do
    "correct": "right answers among the sampled",
    "accuracy": "greedy accuracy, held out",
    "flat_groups": "flat groups",
    "entropy": "entropy (nats a token)",
    "clip_fraction": "tokens held back by the clip",
    "kl_old": "KL to the sampler (nats a token)",
}


def curves(path: Path) -> None:
    """A run that learns and one that does not."""
    runs = {
        "the embedded task, from a start that is right in 7 of 10 answers": ROOT / "docs/foundations/curves.jsonl",
        "GSM8K at 50 million parameters, from a start that is right in 2 of 100": ROOT
        / "docs/reference/h200_50m_grpo.jsonl",
    }
    figure, axes = _axes(len(PANELS), columns=3, width=3.0, height=2.2)
    for (label, file), colour in zip(runs.items(), COLOURS):
        series = read_metrics(file)
        for axis, (name, words) in zip(axes, PANELS.items()):
            steps, values = series.get(name, ([], []))
            axis.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 8 else None)
            axis.set_title(words, fontsize=9)
            axis.set_xlabel("step")
            if name != "entropy":
                axis.set_ylim(0, 1 if name in ("correct", "accuracy", "flat_groups") else None)
    _legend_below(figure, axes, most=1)
    _save(figure, path)


FIGURES = {
    "language_model": language_model, "attention": attention_by_hand, "policy": policy, "rewards": rewards, "kl": kl,
    "family": family, "silence": silence, "curves": curves,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/foundations/.")
    parser.add_argument("names", nargs="*", help=f"which ones: {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--out", default=str(ROOT / "docs" / "foundations"), help="the folder of the pictures")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        raise UserError(f"there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    for name in options.names or FIGURES:
        path = Path(options.out) / f"{name}.png"
        FIGURES[name](path)
        print(path, flush=True)


if __name__ == "__main__":
    run_main(main)
