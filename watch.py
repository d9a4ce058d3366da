"""Reinforcement learning fails in silence: what to look at before and while it runs.

A run of reinforcement learning that learns nothing looks like one that learns: the loss is a number near zero, the
answers change a little. So each of its stages says what it sees, in these functions.

* Before the first step, ``report_start``: how often the policy is right already, how often it is cut off, and in how
  many groups all rewards are equal. Where nothing differs, nothing can be learned.
* Before the first update on each rollout, ``assert_same_policy``: log-probabilities in training are those of sampling.
* In each update, ``UpdateSums``: how many tokens the clip holds back, how far the policy has moved.
* After each step, ``describe``: what the answers were like; and ``Alarm``, loudly, if all groups were flat, all answers
  cut off, or the gradient zero or not finite.
* Now and then ``keep_answers`` and ``KeptRows`` write some answers down token by token, with what the method saw of
  each: ``python ui/rollouts.py RUN --write page.html`` shows them.

Run ``python watch.py`` for the figures of eight answers.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from rollout import Questions, Rollout, policy_logps, sample_answers, sampling_seed, total_reward
from runtime import processes
from runtime.errors import UserError
from runtime.rollouts import (
    ANSWERS,
    QUESTION,
    answer_of,
    append,
    choose_groups,
    is_kept,
    longest,
    numbers_of,
    prompt_of,
)
from runtime.run import Run
from texts import Prompt
from transformer import Transformer, shared_logps

# ----------------------------------------------------------------------------------------------------------------------
# What the answers and their rewards are like


UNKNOWN = -12345.0  # in the place of NaN, which equals nothing


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """The share of groups whose rewards are all equal: between equals nothing can be learned."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean()


def distinct_advantages(rewards: Tensor, advantages: Tensor, group_size: int) -> float:
    """Distinct advantages per distinct reward vector, over groups that are not flat. Below 1, answers that earned
    different things were treated as equals: their sum forgot the difference (gdpo.py).

    rewards: (N, K), advantages: (N,).

    >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    >>> round(distinct_advantages(rewards, torch.tensor([0.5, 0.5, -1.5, 0.5]), group_size=4), 3)
    0.667
    """
    combinations = distinct = 0
    for rows, values in zip(rewards.cpu().split(group_size), advantages.cpu().split(group_size)):
        n = len({tuple(row) for row in rows.nan_to_num(UNKNOWN).tolist()})
        if n > 1:
            combinations += n
            distinct += len({round(value, 4) for value in values.tolist()})
    return distinct / combinations if combinations else 1.0


def describe(rollout: Rollout, rewards: dict[str, Tensor]) -> dict[str, float]:
    """Means over answers: each of the rewards, (N,), as far as they are known, the share that ended by themselves,
    tokens, the sampled estimate of the entropy (of a whole answer); and how many answers there are."""
    means = {name: float(values.nanmean().nan_to_num(0.0)) for name, values in rewards.items()}
    known = {name: float((~values.isnan()).sum()) for name, values in rewards.items()}
    means["finished"] = float(rollout.finished.float().mean())
    means["length"] = float(rollout.mask.sum()) / len(rollout)
    means["entropy"] = -float(rollout.sampled_logps.sum()) / len(rollout)
    return means | {"answers": float(len(rollout)), "known answers": known}


def mean_over_answers(figures: dict[str, float]) -> dict[str, float]:
    """The figures of ``describe`` over the answers of all processes, which may have sampled differently many; NaN for a
    reward that judged none of them."""
    n, known = figures["answers"], figures.get("known answers", {})  # of a reward, the answers for which it is known
    names = [name for name in figures if name not in ("answers", "known answers")]
    counts = torch.tensor([known.get(name, n) for name in names] + [n], dtype=torch.float64)
    sums = torch.tensor([figures[name] for name in names] + [1.0], dtype=torch.float64) * counts
    sums, counts = processes.sum_over_processes(torch.stack([sums, counts])).tolist()
    means = {name: value / count if count else math.nan for name, value, count in zip(names, sums, counts)}
    return means | {"answers": counts[-1]}


def reward_signal(rewards: dict[str, Tensor], weights: dict[str, float], advantages: Tensor, group_size: int) -> dict:
    """How much a step's rewards can teach: "flat_groups", the share of groups in which no answer has an advantage, and
    "distinct_advantages". rewards: (N,) each, of which those with a weight count; advantages: (N,)."""
    counted = [values for name, values in rewards.items() if weights[name]] or list(rewards.values())
    distinct = distinct_advantages(torch.stack(counted, dim=1), advantages, group_size)
    return {"flat_groups": float(flat_groups(advantages, group_size)), "distinct_advantages": distinct}


def step_figures(sampled: dict[str, float], updates: Sequence[dict]) -> dict[str, float]:
    """What a step logs: the figures of all processes' answers, see ``describe``, with the entropy of a token instead of
    an answer; the means over the updates; "tokens", the sum of those that the updates trained on."""
    figures = mean_over_answers(sampled)
    figures["entropy"] /= figures["length"]
    figures["truncated"] = 1 - figures["finished"]
    means = {name: sum(one[name] for one in updates) / len(updates) for name in updates[0]}
    return figures | means | {"tokens": sum(one["tokens"] for one in updates)}


def mean_per_token(values: Tensor, mask: Tensor) -> float:
    """The mean, over the tokens of all processes, of what was summed over each answer: values (N,), mask (N, C)."""
    return float(torch.div(*processes.sum_over_processes(torch.stack([values.sum(), mask.sum().to(values)]))))


def render(prompt: Prompt, rollout: Rollout, rewards: dict[str, Tensor], n: int = 4) -> str:
    """A question and the first ``n`` answers to it, for a human eye. rewards: (N,) each; "correct" as a word."""
    *before, last = prompt.messages
    lines = [f"{message['role']}: {message['content']}" for message in before] + [f"question: {last['content']}"]
    if prompt.gold is not None:
        lines.append(f"gold:     {' or '.join(prompt.gold) if isinstance(prompt.gold, tuple) else prompt.gold}")
    for i, (text, done) in enumerate(list(zip(rollout.texts, rollout.finished.tolist()))[:n]):
        if "correct" in rewards:
            correct = float(rewards["correct"][i])
            judged = {1.0: "right", 0.0: "wrong"}.get(correct, f"correct {correct:.3g}")
        else:
            judged = ", ".join(f"{name} {float(values[i]):.3g}" for name, values in rewards.items())
        lines.append(f"{judged}{'' if done else ', cut off'}: {text}")
    return "\n".join(lines)


def show(values: Tensor) -> str:
    """Numbers side by side, for the worked examples."""
    return " ".join(f"{value + 0.0:7.4f}" for value in values.flatten().tolist())  # + 0.0: no -0.0


# ----------------------------------------------------------------------------------------------------------------------
# Whether it can learn, and whether it does


def report_start(
    run: Run, rollout: Rollout, rewards: dict[str, Tensor], figures: dict, flat: float, asked: Prompt
) -> None:
    """What the policy can do before the first step: if it never succeeds, it has nothing to learn from.

    figures: those of ``describe``, of this process; rewards: (N,) each, of the answers that are shown; flat: the share
    of flat groups, of all processes.
    """
    means, names = mean_over_answers(figures), {"correct": "pass@1", "formatted": "well-formed"}
    finished = means["finished"]
    earned = ", ".join(f"{names.get(name, name)} {means[name]:.3f}" for name in rewards if name in means)
    run.print(
        f"  start      sampled at temperature {run.config.temperature:g}: {earned}, finished {finished:.3f}, "
        f"cut off {1 - finished:.3f}; groups with equal rewards {flat:.3f}"
    )
    run.print("             " + render(asked, rollout, rewards, n=1).replace("\n", "\n             "))
    for name in rewards:
        if math.isnan(means.get(name, 0.0)):
            run.print(f"WARNING: the reward {name} judged none of the answers: it teaches nothing until it does")
    earns = means["reward"] if "reward" in means else means["score"]  # PPO has a score
    if flat == 1 and not math.isnan(earns):
        run.print(
            f"WARNING: the answers to each question earn the same (on average {earns:.3f}), so nothing can be "
            "learned. If that is the least there is to earn, start from a better model or raise --temperature (grpo.py "
            "also has --group_size and --arith_warmup); if it is the most, ask something harder"
        )
    if finished == 0:
        run.print("WARNING: every answer was cut off: raise --max_new_tokens, or start from a model that can end")


class Alarm:
    """Says loudly when a run learns nothing."""

    def __init__(self, run: Run):
        self.run, self.silent = run, 0  # silent: steps in a row from which nothing could be learned

    def check(self, figures: dict[str, float]) -> None:
        """figures: a step's "flat_groups", "finished" and "grad_norm"."""
        flat, norm = figures["flat_groups"], figures["grad_norm"]
        self.silent = self.silent + 1 if flat == 1 or norm == 0 else 0
        if self.silent and self.silent % 10 == 0:
            self.run.print(
                f"WARNING: {self.silent} steps in a row taught nothing (flat groups: {flat:.2f}, gradient {norm:.1e}): "
                "raise --temperature (grpo.py also has --group_size), or change the prompts"
            )
        if figures["finished"] == 0:
            self.run.print("WARNING: every answer of this step was cut off: raise --max_new_tokens")
        if not math.isfinite(norm) and not self.run.scaler.is_enabled():  # fp16's scaler looks for its factor like this
            self.run.print("WARNING: the gradient is not finite: lower --lr")


def sampler_gap(rollout: Rollout, old_logps: Tensor, rows: Tensor | None = None) -> float:
    """How far, on average over the tokens of all processes, the log-probabilities that training begins with, (N, T-1),
    lie from those of sampling. rows: (N,) boolean, the answers that are looked at; None: all."""
    mask = rollout.mask if rows is None else rollout.mask & rows[:, None]  # NaN stays NaN, also times 0
    gaps = ((old_logps - rollout.sampled_logps).abs() * mask).sum()
    total, n = processes.sum_over_processes(torch.stack([gaps, mask.sum().to(gaps)])).tolist()
    return total / max(n, 1.0)


def assert_same_policy(run: Run, gap: float) -> None:
    """The policy that trains is the policy that sampled, if the ``sampler_gap`` is no more than rounding: about 1e-6 in
    float32, up to 3e-3 in 16 bits. (A temperature of 1.2 that training does not know of makes one of 0.02, so in 16
    bits ``assert_same_in_float32`` looks more closely once.)"""
    if gap != gap:
        raise UserError("the policy's log-probabilities are not numbers any more: lower --lr")
    if not gap < (1e-3 if run.precision == "fp32" else 0.03):
        raise AssertionError(
            f"the policy that trains is not the policy that sampled: log-probabilities differ by {gap:.4f} on "
            "average before the first update"
        )


def assert_same_in_float32(run: Run, policy: Transformer, questions: Questions, config) -> None:
    """Before the first step of a run in 16 bits: a few answers are sampled, and their log-probabilities computed as in
    training, in float32, where rounding hides nothing. (A run in float32 looks at every rollout.)"""
    if run.precision == "fp32":
        return
    with run.in_float32():
        prompts = [ids for ids, _ in questions.batch(0)[:4]]
        with run.eager():
            args = config.max_new_tokens, config.temperature, sampling_seed(config.seed, 0)
            rollout = sample_answers(policy, questions.tokenizer, prompts, 2, *args)
        assert_same_policy(run, sampler_gap(rollout, policy_logps(run, policy, rollout, config)))


def assert_ratio_is_one(run: Run, gap: float) -> None:
    """Before the first update on a rollout nothing has moved: π / π_old is 1, up to rounding. gap: the mean distance
    from it."""
    if not gap < (1e-3 if run.precision == "fp32" else 0.03):
        raise AssertionError(f"before the first update every ratio is 1, but they differ from it by {gap:.4f}")


class UpdateSums:
    """Statistics of one update, added up over its micro-batches and over all processes.

    clip_low, clip_high: the ratios 1 - clip_low and 1 + clip_high are where the clip begins; ratio_level: "token", or
    "sequence" for one ratio for a whole answer (GSPO); lower_bound: whether ratios are clipped from below too (in CISPO
    they are not); totals: names of what else is added up; reference: whether there is one, of which a part of the batch
    without any token says nothing.
    """

    def __init__(
        self, clip_low: float, clip_high: float, ratio_level: str = "token", lower_bound: bool = True,
        totals: Sequence[str] = (), reference: bool = False,
    ):  # fmt: skip
        self.clip_low, self.clip_high = clip_low, clip_high
        self.ratio_level, self.lower_bound, self.totals = ratio_level, lower_bound, tuple(totals)
        names = ("loss", "tokens", "pushed", "clipped", "moved", "strayed", *self.totals)
        self.sums: dict[str, float] = dict.fromkeys(names, 0.0)
        self.reference = reference

    @torch.no_grad()
    def add(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, ref_logps: Tensor | None = None,
        loss: float | Tensor = 0.0, **totals: float | Tensor,
    ) -> None:  # fmt: skip
        """One micro-batch. logps, old_logps, ref_logps, mask: (B, C); advantages: (B,) or (B, C); loss and ``totals``:
        its share of them."""
        advantages = advantages if advantages.dim() == 2 else advantages[:, None]
        change = log_ratio = logps - old_logps
        if self.ratio_level == "sequence":
            change = (change * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        too_high, too_low = change.exp() > 1 + self.clip_high, change.exp() < 1 - self.clip_low
        up, down = advantages > 0, advantages < 0
        outside = (up & too_high) | (down & too_low) if self.lower_bound else (up | down) & too_high
        found = {"loss": loss, **totals, "tokens": mask.sum()}
        found["pushed"] = ((up | down) & mask).sum()  # tokens with an advantage
        found["clipped"] = (outside & mask).sum()  # those of them whose gradient the clip takes away
        found["moved"] = ((torch.expm1(log_ratio) - log_ratio) * mask).sum()  # k3 of KL(π_old ‖ π)
        if ref_logps is not None:
            strayed = logps - ref_logps
            found["strayed"] = ((torch.expm1(-strayed) + strayed) * mask).sum()  # k3 of KL(π ‖ π_ref)
        values = torch.stack([torch.as_tensor(value, device=mask.device) for value in found.values()]).tolist()
        for name, value in zip(found, values):  # read together: the program waits for the device once
            self.sums[name] += value

    def means(self) -> dict[str, float]:
        """Of all processes: "loss"; "tokens", their number; "kl_old" and, with a reference, "kl_ref", nats of a token;
        "clip_fraction", of the tokens with an advantage; and each of ``totals``, as it adds up."""
        totals = processes.sum_over_processes(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        sums = dict(zip(self.sums, totals))
        n = max(sums["tokens"], 1.0)
        means = {"loss": sums["loss"], "tokens": sums["tokens"], "kl_old": sums["moved"] / n}
        means["clip_fraction"] = sums["clipped"] / max(sums["pushed"], 1.0)
        means |= {name: sums[name] for name in self.totals}
        return means | ({"kl_ref": sums["strayed"] / n} if self.reference else {})


# ----------------------------------------------------------------------------------------------------------------------
# Answers in full, token by token (runtime/rollouts.py)


def keep_answers(
    run: Run, step: int, policy: Transformer, rollout: Rollout, asked: Sequence[Prompt], rewards: dict[str, Tensor],
    weights: dict[str, float], advantages: Tensor, old_logps: Tensor, ref_logps: Tensor | None = None,
    values: Tensor | None = None,
) -> None:  # fmt: skip
    """Write some groups of a step's answers down, if it is one of the steps of which that is done; after the updates,
    so that it is seen how far they moved each token. Of several processes the first one writes some of its own.

    asked: the P questions; rewards: (N,) each, whose sum with ``weights`` counts; advantages: (N,) or (N, T-1);
    old_logps, ref_logps, values: (N, T-1).
    """
    config = run.config
    if not run.is_main or not is_kept(step, config.steps, config.eval_every):
        return
    P, G = len(asked), len(rollout) // len(asked)
    flat = (advantages.view(P, -1) == 0).all(dim=1).tolist()
    groups, g = choose_groups(rollout.mask.sum(dim=1).view(P, G).tolist(), flat), min(G, ANSWERS)
    rows = (torch.tensor(groups)[:, None] * G + torch.arange(g)).flatten().to(rollout.tokens.device)  # (n,)
    some, old = rollout.rows(rows), old_logps[rows]
    old = torch.where((old == 0).all(dim=1, keepdim=True), some.sampled_logps, old)  # rows that had no gradient
    series = {"sampled": some.sampled_logps, "old": old, "now": policy_logps(run, policy, some, config, group=g)}
    series |= {} if ref_logps is None else {"ref": ref_logps[rows]}
    series |= {} if values is None else {"values": values[rows], "advantages": advantages[rows]}
    earned = {name: value[rows.to(value.device)] for name, value in rewards.items()}
    totals = total_reward({name: value for name, value in rewards.items() if name in weights}, weights)  # (N,)
    total = numbers_of(totals[rows])
    left_out = ~some.finished if getattr(config, "mask_truncated", False) else torch.zeros_like(some.finished)
    earned = {name: numbers_of(value) for name, value in earned.items()}
    series = {name: value.cpu() for name, value in series.items()}
    tokens, mask, most = some.tokens.cpu(), some.mask.cpu(), longest(len(rows))
    written = []
    for k, group in enumerate(groups):
        one, its = asked[group], range(k * g, (k + 1) * g)
        answers = []
        for i in its:
            its_series = {name: value[i] for name, value in series.items()}
            answer = answer_of(run.tokenizer, tokens[i], mask[i], most, **its_series)
            answer |= {"finished": bool(some.finished[i]), "counts": not left_out[i], "reward": total[i]}
            answer |= whole_of(mask[i], its_series)
            answer |= {"rewards": {name: values[i] for name, values in earned.items()}}
            answer |= {} if advantages.dim() == 2 else {"advantage": round(float(advantages[int(rows[i])]), 4)}
            answers.append(answer)
        question = "\n".join(message["content"] for message in one.messages)[:QUESTION]
        gold = " or ".join(one.gold) if isinstance(one.gold, tuple) else one.gold
        prompt = prompt_of(run.tokenizer, tokens[k * g], mask[k * g])
        siblings = totals.view(P, G)[group].float()  # all of them, also those for which there is no room
        facts = {"size": G, "mean": float(siblings.mean()), "std": float(siblings.std()) if G > 1 else 0.0}
        facts = {name: round(value, 4) if math.isfinite(value) else None for name, value in facts.items()}
        facts |= {"equal": bool((siblings == siblings[0]).all())}  # nobody is better than a sibling
        written.append({"question": question, "gold": gold if gold is None else str(gold), **facts, "prompt": prompt,
                        "answers": answers})  # fmt: skip
    facts = {"step": step + 1, "stage": run.stage, "kind": "groups", "clip": clip_of(config)}
    facts |= {"level": getattr(config, "ratio_level", "token")}
    facts |= {"weights": {name: weights[name] for name in rewards if name in weights}}
    append(run.folder, facts | {"groups": written})


def whole_of(mask: Tensor, series: dict[str, Tensor]) -> dict[str, float]:
    """Of a whole answer, however much of it is written down: its estimate of the KL to the reference, the sum of
    log π_old - log π_ref, and the ratio of the sequence, the geometric mean of those of its tokens.

    >>> one = torch.ones(3)
    >>> whole_of(torch.tensor([False, True, True]), {"old": -one, "now": 0 * one, "ref": -one})
    {'ratio': 2.71828, 'kl': 0.0}
    """
    own = {name: values[mask].double() for name, values in series.items()}
    found = {"ratio": round(math.exp(float((own["now"] - own["old"]).mean())), 5)} if bool(mask.any()) else {}
    return found | ({"kl": round(float((own["old"] - own["ref"]).sum()), 4)} if "ref" in own else {})


def clip_of(config) -> list[float | None]:
    """The ratios between which nothing is clipped; None where there is no bound."""
    if hasattr(config, "clip_ratio"):  # PPO
        return [1 - config.clip_ratio, 1 + config.clip_ratio]
    return [None if config.loss_type == "cispo" else 1 - config.clip_low, 1 + config.clip_high]


class KeptRows:
    """Some pairs, or labelled answers, of which is written down how likely each token became. Made before the first
    step, while ``model`` is the reference.

    parts: the rows by what they are, "training" or "held out"; has_reference: whether the method has one; averaged:
    whether its implicit reward is a mean over tokens and not a sum.
    """

    N = 4  # of each part, the first ones

    def __init__(self, run: Run, model: Transformer, parts: dict, has_reference: bool = True, averaged: bool = False):
        self.run, self.parts, self.averaged = run, parts, averaged
        self.writes = run.is_main and not run.finished
        self.ref = {part: self._logps(model, rows) for part, rows in parts.items()} if self.writes else {}
        self.ref = self.ref if has_reference else {}

    @torch.no_grad()
    def _logps(self, model: Transformer, rows) -> Tensor:
        """(n, T-1), or (2n, T-1) with the chosen answers above the rejected ones; on the CPU."""
        tokens, mask, _ = rows.batch(range(min(self.N, len(rows))), self.run.device)
        with self.run.autocast(), self.run.eager():
            return shared_logps(model, tokens, mask).cpu()

    def keep(self, step: int, steps: int, model: Transformer) -> None:
        """Write them down, if it is one of the steps of which that is done; after its update."""
        config, groups = self.run.config, []
        if not self.writes or not is_kept(step, steps, config.eval_every):
            return
        for part, rows in self.parts.items():
            n, now, ref = min(self.N, len(rows)), self._logps(model, rows), self.ref.get(part)
            tokens, mask, _ = rows.batch(range(n))
            refs = [None] * len(now) if ref is None else ref
            answers = [self._answer(*one) for one in zip(tokens, mask, now, refs)]
            pairs = hasattr(rows, "pairs")
            for i in range(n):
                prompt = prompt_of(self.run.tokenizer, tokens[i], mask[i])
                if pairs:
                    its = [answers[i] | {"label": "chosen"}, answers[n + i] | {"label": "rejected"}]
                    question = "\n".join(message["content"] for message in rows.pairs[i].prompt)
                else:
                    its = [answers[i] | {"label": "desirable" if rows.desirable[i] else "undesirable"}]
                    question = re.sub(r"<\|\w+\|>", " ", "".join(prompt[1])).strip()  # without the template's marks
                groups.append({"question": question[:QUESTION], "part": part, "prompt": prompt, "answers": its})
        facts = {"step": step + 1, "stage": self.run.stage, "kind": "preferences", "beta": config.beta}
        append(self.run.folder, facts | {"averaged": self.averaged, "groups": groups})

    def _answer(self, tokens: Tensor, mask: Tensor, now: Tensor, ref: Tensor | None) -> dict:
        answer = answer_of(self.run.tokenizer, tokens, mask, longest(4 * self.N), now=now, ref=ref)
        gain = now if ref is None else now - ref
        total = float(gain[mask].sum()) / (max(1, int(mask.sum())) if self.averaged else 1)
        return answer | {"reward": round(self.run.config.beta * total, 4)}


if __name__ == "__main__":
    torch.manual_seed(0)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # two prompts, four answers to each
    advantages = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    print(f"rewards {rewards.tolist()}: flat groups {float(flat_groups(rewards, 4)):.2f}")
    old = -torch.rand(8, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]] * 2).bool()
    for moved in (0.0, 0.1, 0.4):
        sums = UpdateSums(clip_low=0.2, clip_high=0.2)
        sums.add(old + moved * torch.randn(8, 3), old, advantages, mask)
        means = sums.means()
        print(
            f"log-probabilities moved by about {moved}: the clip holds back {means['clip_fraction']:.2f} of the tokens "
            f"with an advantage, KL to the policy that sampled {means['kl_old']:.4f} nats a token"
        )
    for precision, gap in (("fp32", 1e-6), ("fp32", 0.05)):
        try:
            assert_same_policy(type("Run", (), {"precision": precision}), gap)
            print(f"a gap of {gap} in {precision}: the same policy")
        except AssertionError as error:
            print(f"a gap of {gap} in {precision}: {error}")
