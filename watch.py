"""Reinforcement learning fails in silence: what to look at before and while it runs.

A run of reinforcement learning that learns nothing looks like one that learns: the loss is a number near zero, the
answers change a little. So each of its stages says what it sees, in these functions.

* Before the first step, ``report_start``: how often the policy is right already, how often it is cut off, and in how
  many groups all rewards are equal. Where nothing differs, nothing can be learned.
* Before the first update on each rollout, ``assert_same_policy``: log-probabilities in training are those of sampling.
* In each update, ``update_sums``: how many tokens the clip holds back, how far the policy has moved.
* After each step, ``describe``: what the answers were like; and ``warn``, loudly, if all groups were flat, all answers
  cut off, or the gradient zero or not finite.

Run ``python watch.py`` for the figures of eight answers.
"""

import math

import torch
from torch import Tensor

from data import Prompt
from rollout import Rollout
from runtime import processes
from runtime.errors import UserError
from runtime.run import Run

# ----------------------------------------------------------------------------------------------------------------------
# What the answers and their rewards are like


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """The share of groups whose rewards are all equal: between equals nothing can be learned."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean()


def kept_apart(rewards: Tensor, advantages: Tensor, group_size: int) -> float:
    """How many different advantages there are for each different row of rewards, in groups that are not flat. Below 1,
    answers that earned different things were treated as equals: their sum forgot the difference (gdpo.py).

    rewards: (N, K), advantages: (N,).

    >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    >>> round(kept_apart(rewards, torch.tensor([0.5, 0.5, -1.5, 0.5]), group_size=4), 3)
    0.667
    """
    combinations = distinct = 0
    for rows, values in zip(rewards.split(group_size), advantages.split(group_size)):
        n = len({tuple(row) for row in rows.tolist()})
        if n > 1:
            combinations += n
            distinct += len({round(value, 4) for value in values.tolist()})
    return distinct / combinations if combinations else 1.0


def describe(rollout: Rollout, rewards: dict[str, Tensor]) -> dict[str, float]:
    """Means over answers: each of the rewards, (N,), the share that ended by themselves, tokens, the sampled estimate
    of the entropy (of a whole answer); and how many answers there are."""
    means = {name: float(values.mean()) for name, values in rewards.items()}
    means["finished"] = float(rollout.finished.float().mean())
    means["length"] = float(rollout.mask.sum()) / len(rollout)
    means["entropy"] = -float(rollout.sampled_logps.sum()) / len(rollout)
    return means | {"answers": float(len(rollout))}


def mean_over_answers(figures: dict[str, float]) -> dict[str, float]:
    """The figures of ``describe`` over the answers of all processes, which may have sampled differently many."""
    n = figures["answers"]
    sums = torch.tensor([n * value for name, value in figures.items() if name != "answers"] + [n], dtype=torch.float64)
    *sums, n = processes.sum_over_processes(sums).tolist()
    names = [name for name in figures if name != "answers"]
    return {name: value / n for name, value in zip(names, sums)} | {"answers": n}


def render(prompt: Prompt, rollout: Rollout, correct: Tensor, n: int = 4) -> str:
    """A question and the first ``n`` answers to it, for a human eye."""
    lines = [f"question: {prompt.messages[-1]['content']}", f"gold:     {prompt.gold}"]
    for text, ok, done in list(zip(rollout.texts, correct.tolist(), rollout.finished.tolist()))[:n]:
        lines.append(f"{'right' if ok else 'wrong'}{'' if done else ', cut off'}: {text}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Whether it can learn, and whether it does


def report_start(run: Run, rollout: Rollout, correct: Tensor, figures: dict, flat: float, asked: Prompt) -> None:
    """What the policy can do before the first step: if it never succeeds, it has nothing to learn from.

    figures: the means of "correct", "formatted" and "finished" over this process's answers; correct: (N,), of the
    answers that are shown; flat: the share of flat groups, of all processes.
    """
    mine = torch.tensor([figures[name] for name in ("correct", "formatted", "finished")], dtype=torch.float64)
    solved, shaped, finished = (processes.sum_over_processes(mine) / processes.world_size()).tolist()
    run.print(
        f"  start      pass@1 {solved:.3f}, well-formed {shaped:.3f}, "
        f"finished {finished:.3f}, cut off {1 - finished:.3f}, groups with equal rewards {flat:.3f}"
    )
    run.print("             " + render(asked, rollout, correct, n=1).replace("\n", "\n             "))
    if flat == 1:
        run.print(
            "WARNING: all rewards are equal, so nothing can be learned: start from a better model, or raise "
            "--temperature (grpo.py also has --group_size and --arith_warmup)"
        )
    if finished == 0:
        run.print("WARNING: every answer was cut off: raise --max_new_tokens, or start from a model that can end")


def warn(run: Run, silent: int, figures: dict, norm: float) -> None:
    """Say loudly when a run learns nothing. ``silent``: how many steps in a row have taught nothing."""
    if silent and silent % 10 == 0:
        run.print(
            f"WARNING: {silent} steps in a row taught nothing (flat groups: {figures['flat_groups']:.2f}, "
            f"gradient {norm:.1e}): raise --temperature (grpo.py also has --group_size), or change the prompts"
        )
    if figures["finished"] == 0:
        run.print("WARNING: every answer of this step was cut off: raise --max_new_tokens")
    if not math.isfinite(norm) and not run.scaler.is_enabled():  # the scaler of fp16 looks for its factor like this
        run.print("WARNING: the gradient is not finite: lower --lr")


def assert_same_policy(run: Run, gap: float) -> None:
    """``gap``: how far, on average, the log-probabilities that training begins with lie from those of sampling."""
    if gap != gap:
        raise UserError("the policy's log-probabilities are not numbers any more: lower --lr")
    if not gap < (1e-3 if run.precision == "fp32" else 0.1):
        raise AssertionError(
            f"the policy that trains is not the policy that sampled: log-probabilities differ by {gap:.4f} on "
            "average before the first update"
        )


@torch.no_grad()
def update_sums(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float,
    sequence: bool = False, lower_bound: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Figures of one part of an update, as sums over its tokens, so that those of all parts add up.

    logps, old_logps, mask: (B, C); advantages: (B,) or (B, C). sequence: one ratio for a whole answer (GSPO);
    lower_bound: whether ratios below 1 - clip_low are clipped too (in CISPO they are not). Returns "tokens"; "pushed",
    tokens with an advantage; "clipped", those of them whose gradient the clip takes away; "moved", the k3 estimate of
    KL(π_old ‖ π) in nats.
    """
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    change = log_ratio = logps - old_logps
    if sequence:
        change = (change * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    too_high, too_low = change.exp() > 1 + clip_high, change.exp() < 1 - clip_low
    up, down = advantages > 0, advantages < 0
    outside = (up & too_high) | (down & too_low) if lower_bound else (up | down) & too_high
    return {
        "tokens": float(mask.sum()),
        "pushed": float(((up | down) & mask).sum()),
        "clipped": float((outside & mask).sum()),
        "moved": float(((torch.expm1(log_ratio) - log_ratio) * mask).sum()),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # two prompts, four answers to each
    advantages = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    print(f"rewards {rewards.tolist()}: flat groups {float(flat_groups(rewards, 4)):.2f}")
    old = -torch.rand(8, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]] * 2).bool()
    for moved in (0.0, 0.1, 0.4):
        sums = update_sums(old + moved * torch.randn(8, 3), old, advantages, mask, 0.2, 0.2)
        n, pushed = sums["tokens"], sums["pushed"]
        print(
            f"log-probabilities moved by about {moved}: clipped {sums['clipped']:.0f} of {pushed:.0f} tokens with an "
            f"advantage, KL to the policy that sampled {sums['moved'] / n:.4f} nats a token"
        )
    for precision, gap in (("fp32", 1e-6), ("fp32", 0.05)):
        try:
            assert_same_policy(type("Run", (), {"precision": precision}), gap)
            print(f"a gap of {gap} in {precision}: the same policy")
        except AssertionError as error:
            print(f"a gap of {gap} in {precision}: {error}")
