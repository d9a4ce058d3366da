"""GDPO: several rewards at once, each compared with its own kind before they are added.

An answer can be right, well-formed, short. GRPO adds such rewards first and compares siblings then, and the sum
forgets what it was made of: with two rewards of 0 or 1 and two answers, the totals (0, 1), (0, 2) and (1, 2) all give
the advantages (-0.71, 0.71), although the second pair differs twice as much. GDPO (Liu et al. 2026, arXiv 2601.05242)
turns the order around; for answer i and reward k, with weights w::

    A_ik = (r_ik - mean(r_k of the group)) / (std(r_k of the group) + eps)      each reward on its own   (eq. 4)
    S_i  = Σ_k w_k A_ik                                                         weights come after       (eq. 5, 7)
    A_i  = (S_i - mean(S of the batch)) / (std(S of the batch) + eps)           one scale for the batch  (eq. 6)

and the rest is ``grpo.py``. What to know about it:

* A weight on a raw reward would cancel in eq. 4; on the normalised advantage it counts.
* A rarer success counts more: one right answer among four gets 1.5 from its reward, two of four 0.87 each.
* But the std of four rewards of 0 or 1 is 0.50 or 0.58 wherever they differ, so in groups of 4 this is nearly a sum
  without a std, up to a constant; what fails there is the division by the std of the *sum* (``studies/combine.py``).
* Equal weights on two opposed rewards still cancel: r1 = (1, 1, 0), r2 = (0, 0, 1) gives A_1 = -A_2 and no lesson,
  although the paper shows this case as one that GDPO saves. Other weights do save it.
* The last step makes an advantage depend on the rest of the batch: beside dead groups, whose rewards are all equal, a
  live one is scaled up (of four answers with the rewards 00, 00, 01 and 11, the largest grows from 1.33 alone to 8.66
  beside 31 dead groups). ``draws`` replaces them; the paper's runs do so too.
* With one reward this is GRPO, except for the last step.

Where the published codes differ: TRL and NVlabs' fork of it take the batch's mean and std over answers, NVlabs' and
verl's own verl over tokens, so that long answers count more, and the answers of a dead group get an advantage that is
not 0 (``batch_over = tokens``). NVlabs leaves out the last step for a single reward, TRL does not, and neither do we.
A reward of NaN is unknown (TRL): it enters no statistic and adds nothing; NVlabs takes it for 0.

    python gdpo.py --example                                            # two questions, two rewards, step by step
    python gdpo.py                                                      # the embedded task, after sft.py
    python gdpo.py --combine sum --out_dir out/arith/summed             # the same rewards, GRPO's order
    python gdpo.py --no-conditioned --out_dir out/arith/gdpo_short      # short counts for itself
"""

import itertools
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

import grpo
from grpo import (
    accumulate_gradients,
    frozen_reference,
    group_advantages,
    groups_that_teach,
    keep_groups,
    reference_logps,
)
from lora import start_lora
from optim import learning_rate, make_optimizers, update
from rollout import (
    Questions,
    Rollout,
    announce,
    join,
    longest_prompt,
    minibatches,
    own_weights,
    policy_logps,
    sample_answers,
    sampling_seed,
    stop_if_a_reward_failed,
    total_reward,
)
from runtime import processes
from runtime.config import Count, Finite, run_stage
from runtime.errors import UserError
from runtime.rows import evaluate_command
from stages import begin, context_length, with_start
from texts import Prompt
from verify import integer_reward, length_reward
from watch import (
    Alarm,
    assert_same_in_float32,
    assert_same_policy,
    describe,
    keep_answers,
    render,
    report_start,
    reward_signal,
    sampler_gap,
    show,
    step_figures,
)


@dataclass(frozen=True)
class Config(grpo.Config):
    combine: Literal["gdpo", "sum"] = "gdpo"
    """Normalise each reward, then add (GDPO); or add, then normalise (GRPO)."""
    format_weight: Annotated[float, Finite()] = 1.0
    """The weight of the strict form, whatever the number."""
    length_weight: Annotated[float, Finite()] = 1.0
    """The weight of an answer of at most length_limit tokens."""
    length_limit: Count = 26
    """The longest short answer, in tokens, the end-of-text among them. A third of the fine-tuned model's are short."""
    integer_weight: Annotated[float, Finite()] = 0.0
    """The weight of an answer that is a whole number."""
    conditioned: bool = True
    """Whether a short answer counts as short only if it is right (eq. 8). Otherwise the easiest way to shorten an
    answer is to think less, and the policy finds that out."""
    batch_over: Literal["sequences", "tokens"] = "sequences"
    """What the mean and std of the batch are taken over."""


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm, as functions of numbers


def gdpo_advantages(
    rewards: Tensor,
    group_size: int,
    weights: Tensor | None = None,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> Tensor:
    """Each reward normalised in its group, the weighted sum normalised over the batch (GDPO, eq. 4 to 7).

    rewards: (N, K), the answers of one prompt side by side, NaN where a reward is unknown; weights: (K,), by default
    all 1. lengths: (N,), tokens of each answer: if given, the batch's mean and variance are over tokens (verl), else
    over answers (TRL). Returns (N,), no gradient; 0 for an answer without any known reward, and, over answers, exactly
    0 in a group in which every reward is flat or the rewards cancel.

    >>> rewards = torch.tensor([[0., 0.], [0., 1.], [0., 0.], [1., 1.], [0., 1.], [1., 1.]])     # 3 prompts, 2 answers
    >>> gdpo_advantages(rewards, group_size=2)
    tensor([-0.6454,  0.6454, -1.2909,  1.2909, -0.6454,  0.6454])
    """
    summed = group_sums(rewards, group_size, weights, eps)  # (N,)
    known = ~rewards.isnan().all(dim=1)
    least = 1e-5 * (1.0 if weights is None else float(weights.abs().sum()))  # opposed rewards cancel, up to rounding
    teaches = summed.view(-1, group_size).abs().amax(dim=1) > least
    summed = summed.masked_fill(~teaches.repeat_interleave(group_size), 0.0)
    values = summed[known]
    if lengths is None:
        std = values.std() if len(values) > 1 else torch.zeros(())
        advantages = (summed - values.mean()) / (std + eps)
        known = known & teaches.repeat_interleave(group_size)  # the rest is 0, not rounding
    else:
        counts = lengths[known].to(values.dtype)
        mean = (values * counts).sum() / counts.sum()
        variance = ((values - mean).square() * counts).sum() / (counts.sum() - 1).clamp(min=1)
        advantages = (summed - mean) * (variance + 1e-8).rsqrt()
    return advantages.masked_fill(~known, 0.0)


def group_sums(rewards: Tensor, group_size: int, weights: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Σ_k w_k A_ik, before the step over the batch. rewards: (N, K); returns (N,)."""
    weights = torch.ones(rewards.shape[1]) if weights is None else weights
    each = [group_advantages(rewards[:, k], group_size, "group", eps) for k in range(rewards.shape[1])]
    return torch.stack(each, dim=1) @ weights.to(rewards)


def condition(reward: Tensor, on: Tensor, threshold: float = 1.0) -> Tensor:
    """``reward`` where ``on`` reaches the threshold, else 0 (eq. 8). Before any normalisation.

    >>> condition(torch.tensor([1., 1., 0.]), on=torch.tensor([1., 0., 1.]))
    tensor([1., 0., 0.])
    """
    return torch.where(on >= threshold, reward, torch.zeros_like(reward))


def count_lessons(group_size: int, n_rewards: int, weights: tuple[float, ...] = ()) -> tuple[int, int, int]:
    """How many different lessons (advantages of a group, order aside) all tables of 0/1 rewards give: when rewards are
    added (GRPO), added without the division by the std, and by GDPO before its step over the batch. weights: by default
    all 1.

    >>> count_lessons(group_size=2, n_rewards=2), count_lessons(group_size=2, n_rewards=2, weights=(1, 0.9))
    ((2, 3, 3), (2, 5, 5))
    """
    rows = list(itertools.product((0.0, 1.0), repeat=n_rewards))
    weighed = torch.tensor(weights or (1.0,) * n_rewards, dtype=torch.float64)
    found: tuple[set, set, set] = (set(), set(), set())
    for table in itertools.combinations_with_replacement(rows, group_size):
        rewards = torch.tensor(table, dtype=torch.float64)
        total = rewards @ weighed
        advantages = (
            group_advantages(total, group_size, eps=0.0), group_advantages(total, group_size, "none"),
            group_sums(rewards, group_size, weighed, eps=0.0),
        )  # fmt: skip
        for different, values in zip(found, advantages):
            different.add(tuple(sorted(round(value, 6) + 0.0 for value in values.tolist())))  # + 0.0: no -0.0
    return tuple(map(len, found))


# ----------------------------------------------------------------------------------------------------------------------
# The rewards


def judge(rollout: Rollout, asked: list[Prompt], config: Config) -> dict[str, Tensor]:
    """What each answer earns, by the name of the reward, (N,) each, before weights. asked: the N questions."""
    rewards = grpo.judge(rollout, asked, config)
    if config.reward != "verifier":
        return rewards
    short = [length_reward(n, config.length_limit) for n in rollout.mask.sum(dim=1).tolist()]
    rewards["short"] = torch.tensor(short).to(rewards["correct"]) * rollout.finished
    if config.conditioned:
        rewards["short"] = condition(rewards["short"], rewards["correct"])
    if config.integer_weight:
        whole = [integer_reward(text) for text in rollout.texts]
        rewards["integer"] = torch.tensor(whole).to(rewards["correct"]) * rollout.finished
    return rewards


def weights_of(config: Config) -> dict[str, float]:
    """How much each reward counts."""
    verified = {"short": config.length_weight, "integer": config.integer_weight} if config.reward == "verifier" else {}
    return grpo.weights_of(config) | verified


def advantages_of(rewards: dict[str, Tensor], lengths: Tensor, config: Config) -> Tensor:
    """(N,) advantages of the answers of all processes from their rewards, (N,) each, and their lengths in tokens, (N,):
    by GDPO, or, to compare, by GRPO on the weighted sum."""
    weights = weights_of(config)
    if config.combine == "sum":
        return group_advantages(total_reward(rewards, weights), config.group_size, config.scale)
    table = torch.stack(list(rewards.values()), dim=1)  # (N, K)
    counts = lengths if config.batch_over == "tokens" else None
    return gdpo_advantages(table, config.group_size, torch.tensor([weights[name] for name in rewards]), lengths=counts)


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    grpo.check(config)
    if not rewards_that_count(config):
        raise UserError("all weights are 0: there is nothing to learn")
    if config.combine == "gdpo" and config.scale != "group":
        raise UserError("GDPO divides each reward by its std in the group: --scale is for --combine sum")
    if config.kl_in == "reward":
        raise UserError("GDPO would normalise a KL in the reward like any other reward: use --kl_in loss")
    if config.combine == "sum" and config.batch_over == "tokens":
        raise UserError("--combine sum has no step over the batch: --batch_over is for GDPO")


def notes(config: Config) -> list[str]:
    """What is possible, but perhaps not what was meant."""
    found = grpo.notes(config)
    if config.combine == "gdpo" and rewards_that_count(config) == 1:
        found.append(
            "note: with one reward GDPO is GRPO but for its last step: the advantages are also divided by their std "
            "over the batch, so they grow when many groups are flat (grpo.py leaves them as they are)"
        )
    return found


def rewards_that_count(config: Config) -> int:
    """The number of rewards with a weight."""
    if config.reward == "verifier":
        weights = [config.correct_weight, config.format_weight, config.length_weight, config.integer_weight]
    else:
        weights = list(own_weights(config).values())
    return sum(bool(weight) for weight in weights) + bool(config.overlong_buffer)


def main(config: Config) -> dict:
    """Train; return the last evaluation's figures. A finished run is only evaluated, an unfinished one continues."""
    config = with_start(config, "sft")
    check(config)
    longest = longest_prompt(config, context_length(config.init_from, "python sft.py"))
    processes.print_once(*notes(config))
    run, policy, tokenizer = begin(config, "gdpo", "python sft.py")
    questions = Questions(config, tokenizer, longest, config.arith_warmup, config.arith_fade)
    start_lora(policy, config)
    policy.activation_checkpointing = config.activation_checkpointing
    reference = frozen_reference(run, policy, config) if config.beta else None
    optimizers = make_optimizers(policy, config.lr, config.weight_decay, config.beta2)
    first = run.resume(policy, optimizers)
    G, share = config.group_size, config.prompts_per_step // processes.world_size()  # answers to each of these prompts
    announce(run, policy, questions, answers=config.prompts_per_step * G, starts=config.init_from)
    if first == 0:
        run.evaluation(0, **questions.examine(run, policy))
        assert_same_in_float32(run, policy, questions, config)
    weights, alarm = weights_of(config), Alarm(run)

    for step in run.steps(first, config.steps):
        # 1. Every question is answered G times, and rules say what each answer is worth, each reward by its name.
        begun, rollouts, asked, missing = time.perf_counter(), [], [], share
        for draw in range(config.draws):
            if not (batch := questions.batch(step, draw, without=asked, most=2 * missing)):
                break
            prompts, seed = [ids for ids, _ in batch], sampling_seed(config.seed, step, draw, config.draws)
            with run.autocast(), run.eager():
                more = sample_answers(policy, tokenizer, prompts, G, config.max_new_tokens, config.temperature, seed)
            rollouts.append(more)
            asked += [question for _, question in batch]
            rollout = join(rollouts, tokenizer.pad_id)  # N = G · questions rows, those of one question side by side
            rewards = judge(rollout, [question for question in asked for _ in range(G)], config)  # (N,) each
            teaches = groups_that_teach(rewards, weights, G)  # (questions,)
            missing = share - int(teaches.sum())
            if missing <= 0:
                break
        stop_if_a_reward_failed(config)
        sampled = describe(rollout, rewards | {"reward": total_reward(rewards, weights)})
        rollout, rewards, asked = keep_groups(rollout, rewards, asked, teaches, share, G)

        # 2. What GDPO changes: siblings are compared in each reward by itself, and the comparisons are added.
        all_rewards = {name: processes.gather(values) for name, values in rewards.items()}  # of all processes
        advantages = advantages_of(all_rewards, processes.gather(rollout.mask.sum(dim=1)), config)
        signal = reward_signal(all_rewards, weights, advantages, G)  # flat groups, distinct advantages
        advantages = processes.my_share(advantages)  # (N,)

        # 3. All the rest is GRPO: the reference, the policy that sampled, and a few updates on the same answers.
        ref_logps = reference_logps(run, reference, rollout, config)  # (N, T-1), or None
        has_gradient = (advantages != 0) | (config.beta > 0)  # (N,)
        old_logps = policy_logps(run, policy, rollout, config, has_gradient, G)  # (N, T-1), 0 in the other rows
        assert_same_policy(run, gap := sampler_gap(rollout, old_logps, has_gradient))
        if step == 0:
            report_start(run, rollout, rewards, sampled, signal["flat_groups"], asked[0])
        sampling_seconds = time.perf_counter() - begun

        lr = learning_rate(step, config.steps, config.lr, config.warmup, config.final_lr)
        updates = []
        for epoch in range(config.epochs):
            for rows in minibatches(len(rollout), config.minibatches, step, epoch, config.seed, G):
                part, ref = rollout.rows(rows), None if ref_logps is None else ref_logps[rows]
                statistics = accumulate_gradients(run, policy, part, advantages[rows], config, old_logps[rows], ref)
                # If no token of any process has a gradient, momentum must not move the weights by itself.
                norm = update(run, policy, optimizers, lr, config.max_grad_norm) if statistics["tokens"] else 0.0
                updates.append(statistics | {"grad_norm": norm})

        # 4. What happened.
        keep_answers(run, step, policy, rollout, asked, rewards, weights, advantages, old_logps, ref_logps)
        figures = step_figures(sampled, updates) | signal | {"sampler_gap": gap}
        figures["rollout_share"] = sampling_seconds / (time.perf_counter() - begun)
        run.log(step, int(figures.pop("tokens")), always=True, show=("reward", *rewards), lr=lr, **figures)
        alarm.check(figures)
        held_out = {}
        if run.due(step, config.eval_every, config.steps):
            held_out = questions.examine(run, policy)
            run.evaluation(step + 1, **held_out)
            run.sample(step + 1, render(asked[0], rollout, rewards, min(4, G)))
        if held_out or run.should_save(step, config.steps):
            best = held_out.get(questions.goal)
            run.save(step, config.steps, policy, optimizers, tokenizer, metric=best, lower_is_better=False)
    held_out = questions.examine(run, policy)
    hint = evaluate_command(config, run.folder, config.eval_data or config.data)
    run.close(questions.summary(held_out, run), next_command=hint)
    return held_out


def example() -> None:
    """Two questions, two answers each, two rewards: what GRPO's sum forgets, and GDPO's three steps."""
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])  # right, short
    print("rewards (right, short)             ", "  ".join(f"{r[0]:.0f},{r[1]:.0f}" for r in rewards.tolist()))
    print("GRPO: their sum                    ", show(rewards.sum(dim=1)))
    print("      compared with siblings       ", show(group_advantages(rewards.sum(dim=1), group_size=2)))
    for k, name in enumerate(("right", "short")):
        print(f"GDPO: {name}, compared by itself   ", show(group_advantages(rewards[:, k], group_size=2)))
    print("      the sum of both              ", show(group_sums(rewards, group_size=2)))
    print("      over the std of the batch    ", show(gdpo_advantages(rewards, group_size=2)))
    print("To GRPO one reward more is as good as two; to GDPO two are twice as good.")


if __name__ == "__main__":
    run_stage(main, Config, example)
