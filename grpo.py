"""GRPO: reinforcement learning without a critic. An answer is measured against its siblings.

For every prompt the policy writes G answers; a rule says how good each one is; an answer is pushed up or down by how
much better or worse it did than the others (Shao et al. 2024, DeepSeekMath, section 4.1). PPO's critic, a second
network that foresees the reward, is gone: the mean of the siblings takes its place. For token t of answer i::

    r_i   = Σ weight · reward                                           of all rewards: right, well-formed, ...
    A_i   = (r_i - mean(r_group)) / (std(r_group) + 1e-4)               the same for all tokens of the answer
    ρ_i,t = π(token t) / π_old(token t)                                 1 until the first update after sampling
    L     = mean over tokens [ - min( ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A )  +  β · kl ]

The mean is our default, DAPO's: over all tokens of the batch. DeepSeekMath takes it within each answer first, and has
one ε (see the relatives). Dividing by the std gives every question advantages of one size, however far apart its
rewards are.

At ρ = 1 the gradient of ρ A is A times that of log π: tokens of better answers become likelier, those of worse ones
less likely. So the value of L is no measure of progress; the reward is. Sampling is the dear part of a step, so its
answers serve several updates; the ratio corrects for the policy that is no longer the one that sampled. The minimum is
one-sided on purpose: the clip takes the gradient away only where the ratio has already moved by more than ε in the
direction of the advantage's sign; a token that moved the wrong way can always come back. The term kl estimates the
KL(π ‖ π_ref) of a token (``kl_estimate``): to stay near the policy of the start keeps its language whole, and its
answers from what the rewards do not look at. ``--example`` shows all but the KL with numbers.

Shapes: P groups of one process, each of a question and its G answers; N = P · G answers, n of them in a minibatch, B in
a micro-batch. ``tokens`` (N, T) holds prompt, answer and padding; ``mask`` and log-probabilities are (N, T-1): column t
is about token t+1, and the mask is true where the policy chose it. The formulas below call that width C.

What to watch, and what it should look like:

* ``reward``, the mean of r, and ``correct``, one of its parts: up, together. If only the reward rises, the policy
  exploits the rule.
* ``flat_groups``: the share of groups whose answers all earned the same, from which nothing can be learned. Near 1 at
  the start, the policy is too weak (or the questions too hard); towards the end it rises because all are right.
* ``clip_fraction``: a few percent of the tokens with an advantage; ``kl_old``, the KL to the policy that sampled, in
  nats per token: well below 0.1. More of either means too large steps.
* ``entropy`` (an estimate, nats per token): slowly down; near 0 nothing is explored any more.
* ``kl_ref`` (with ``beta``), the KL to the reference, nats per token: well below 1.
* ``truncated``: near 0, or the answers need more room. ``sampler_gap``, how far the log-probabilities in training are
  from those of sampling: rounding, about 1e-6 in float32.

What its relatives change, each a preset of a few lines (``configs/grpo_*.py``):

* **GRPO** as DeepSeekMath has it: ``loss_type = grpo``, mean over each answer's tokens, then over answers, so a token
  of a short answer weighs more; β 0.04, 64 answers to a question, one update.
* **Dr. GRPO** (Liu et al. 2025): no division by the group's std (``scale = none``), because dividing favours questions
  that are nearly always or nearly never answered, and a sum over tokens divided by a constant (``loss_type =
  dr_grpo``), so that a long wrong answer is not excused for its length.
* **DAPO** (Yu et al. 2025): the mean over all tokens of the batch (``loss_type = dapo``; the paper's eq. 8 averages
  within each group, TRL, like us, over the batch); ε_high 0.28, above ε_low 0.2, so that improbable tokens can gain
  probability; groups in which no reward differs are replaced by fresh ones (``draws``; the paper compares correctness
  only); answers that were cut off leave the loss (``mask_truncated``), and long ones lose reward before they are
  (``overlong_buffer``). No KL.
* **GSPO** (Zheng et al. 2025): one ratio for the whole answer, the geometric mean of its tokens'
  (``ratio_level = sequence``), with ``loss_type = grpo``; it hardly moves, so ε is 3e-4 and 4e-4 there, for answers
  much longer than ours.
* **CISPO** (MiniMax 2025): the ratio as a clipped, detached weight on log π (``loss_type = cispo``), so that no token
  ever loses its gradient. Only the upper bound acts, at 1 + clip_high, which the paper does not disclose.

With one update per rollout (``epochs`` and ``minibatches`` 1; the default is two of each) every ratio is 1 and no clip
acts: GSPO is then GRPO with the same ``loss_type``, and CISPO is ``dapo``.

The tokens are sampled at ``temperature`` with no top-k or top-p, and every log-probability is computed at the same
temperature: the policy that samples is the policy that trains. Each rollout asserts it before its first update.

    python grpo.py --example                                 # four answers, step by step
    python grpo.py                                           # the embedded task, after sft.py
    python grpo.py configs/grpo_dapo.py
    python grpo.py configs/grpo_gsm8k.py --data_dir DIR
    python grpo.py --beta 0.02 --kl k2 --out_dir out/arith/grpo_kl
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lora import LoRARunConfig, adapters_off, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from rollout import (
    Questions,
    Rollout,
    RolloutConfig,
    announce,
    check_reward,
    join,
    longest_prompt,
    micro_batches,
    minibatches,
    own_rewards,
    own_weights,
    policy_logps,
    sample_answers,
    sampling_seed,
    score,
    stop_if_a_reward_failed,
    total_reward,
)
from runtime import processes
from runtime.config import AtLeast, Count, CountOrZero, Finite, NotNegative, check_shared, run_stage, validate
from runtime.device import PRECISIONS
from runtime.errors import UserError
from runtime.rows import evaluate_command
from runtime.run import Run
from stages import begin, context_length, with_start
from texts import Prompt
from transformer import Transformer, frozen_copy, shared_logps
from verify import overlong_penalty
from watch import (
    Alarm,
    UpdateSums,
    assert_same_in_float32,
    assert_same_policy,
    describe,
    keep_answers,
    mean_per_token,
    render,
    report_start,
    reward_signal,
    sampler_gap,
    show,
    step_figures,
)


@dataclass(frozen=True)
class Config(RolloutConfig, LoRARunConfig):
    prompts_per_step: Count = 64
    """The prompts of one rollout, over all processes."""
    group_size: Annotated[int, AtLeast(2)] = 4
    """Answers to each prompt. The papers have 8 to 64; with a small budget of answers, more questions help more."""
    verifier: Literal["strict", "last", "any"] = "strict"
    """What counts as right: the strict form, or, for the reward-hacking study, the text's last number or any number.
    Evaluations are always strict."""
    correct_weight: Annotated[float, Finite()] = 1.0
    """The reward for the right answer. Negative, it makes the policy unlearn: a test of the signs."""
    overlong_buffer: CountOrZero = 0
    """The number of tokens before max_new_tokens over which the reward falls by up to 1 (DAPO: 4096 of 20480)."""
    mask_truncated: bool = False
    """Whether answers that were cut off leave the loss (DAPO); they stay in the mean of their group."""
    draws: Count = 1
    """The most draws of prompts in a step (DAPO's dynamic sampling): groups in which no reward differs are replaced by
    those of the next draw, of twice as many prompts as are missing; after the last, flat ones fill the batch. 1:
    nothing is replaced."""
    scale: Literal["group", "batch", "none"] = "group"
    """What divides the advantages: the std of the group, of the whole batch, or nothing."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = "dapo"
    """How the tokens are weighted; see above."""
    ratio_level: Literal["token", "sequence"] = "token"
    """One ratio for each token, or one for the whole answer (GSPO)."""
    clip_low: NotNegative = 0.2
    """Ratios below 1 - clip_low are clipped (GSPO: 3e-4)."""
    clip_high: NotNegative = 0.2
    """Ratios above 1 + clip_high are clipped (DAPO: 0.28; GSPO: 4e-4; CISPO: 4, so that the bound is TRL's 5)."""
    beta: NotNegative = 0.0
    """The weight of the KL to the reference, which is the starting policy, frozen (DeepSeekMath: 0.04). 0: none."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """The estimator of the KL."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL goes: a term of the loss, or subtracted from each answer's reward. In the reward, scale = group
    makes a full-size advantage of it wherever the other rewards are equal, whatever beta is."""
    kl_times_ratio: bool = False
    """Whether k1 or k3 in the loss is weighted by the ratio, which makes its gradient that of the KL (TRL's way)."""
    epochs: Count = 2
    """Passes over the same answers. From the second update on, ratios differ from 1 and the clip acts."""
    lr: NotNegative = 2e-4
    arith_warmup: CountOrZero = 0
    """The number of first steps whose prompts come from the embedded task: a weak model finds no reward in GSM8K."""
    arith_fade: CountOrZero = 0
    """Over how many further steps the share of its prompts falls to 0."""


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm, as functions of numbers


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """How much better each answer did than its siblings (DeepSeekMath, section 4.1.2; Dr. GRPO drops the division)::

        A_i = (r_i - mean(r_group)) / (std + eps)

    rewards: (N,), whole groups, the answers of one prompt side by side; in training those of all processes. scale: std
    of the "group", of the whole "batch" (the mean stays the group's), or "none". The std is the sample's (ddof = 1), as
    in TRL and verl. A reward of NaN is unknown: it enters no statistic, and its advantage is 0. Returns (N,), no
    gradient.

    >>> group_advantages(torch.tensor([1., 0., 0., 1.]), group_size=4, scale="none")
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """
    if group_size < 2:
        raise ValueError("a group of one answer has no siblings to compare it with")
    groups = rewards.detach().view(-1, group_size)  # (P, G)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    # The least and the greatest known reward; a group of NaNs alone gets inf > -inf and counts as flat.
    low, high = groups.nan_to_num(float("inf")).amin(1, True), groups.nan_to_num(float("-inf")).amax(1, True)
    if scale == "group":
        centered = centered / (_nanstd(groups) + eps)  # (P, G) / (P, 1)
    elif scale == "batch":
        centered = centered / (_nanstd(groups.reshape(1, -1)) + eps)
    elif scale != "none":
        raise ValueError(f"scale {scale!r}: group, batch or none")
    nothing = (low >= high) | groups.isnan()  # a flat group teaches nothing: exactly 0, however its mean rounds
    return centered.masked_fill(nothing, 0.0).flatten()


def _nanstd(rows: Tensor) -> Tensor:
    """Sample standard deviation of each row, without the NaNs: (rows, columns) -> (rows, 1). One value or none: 0."""
    known = ~rows.isnan()
    squares = (rows - rows.nanmean(dim=1, keepdim=True)).nan_to_num(0.0).square().sum(dim=1, keepdim=True)
    return (squares / (known.sum(dim=1, keepdim=True) - 1).clamp(min=1)).sqrt()


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimates of KL(π ‖ π_ref) from tokens sampled by π (Schulman 2020), with d = log π - log π_ref::

        k1 = d                      right on average, often negative; as a loss useless: its expected gradient is 0
        k2 = d² / 2                 biased, but its gradient is on average that of the KL
        k3 = exp(-d) - 1 + d        right on average, never negative; its gradient is that of KL(π_ref ‖ π)

    Gradients are meant on average, and while π is still the policy that sampled. k3 is DeepSeekMath's.

    logps, ref_logps: of one shape, which is that of the result.
    """
    d = logps - ref_logps
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl {kind!r}: k1, k2 or k3")


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "dapo",
    ratio_level: str = "token",
    max_length: int | None = None,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """The clipped objective with its KL term, negated: a scalar to minimise.

    logps, old_logps, ref_logps, mask: (B, C), the answers' tokens; advantages: (B,). max_length: the constant of
    dr_grpo. kl_times_ratio: weigh each KL estimate by ρ, which makes the gradient of k1 and k3 that of the KL (TRL's
    default since 1.16). normalizer: what the sum is divided by when this is one part of a larger batch,
    ``loss_normalizer`` of the whole; by default of this batch. An answer with no token that counts adds 0 and is
    counted in B.
    """
    mask = mask.to(logps.dtype)
    weight = advantages.unsqueeze(1)  # (B, 1): every token of an answer has its advantage
    log_ratio = logps - old_logps.detach()
    if ratio_level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    elif ratio_level != "token":
        raise ValueError(f"ratio_level {ratio_level!r}: token or sequence")
    ratio = log_ratio.exp()  # (B, C) or (B, 1)

    if loss_type == "cispo":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * weight * logps
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        per_token = -torch.minimum(ratio * weight, clipped * weight)  # the worse of the two, whatever the sign of A
    if beta:
        penalty = kl_estimate(logps, ref_logps.detach(), kl)  # (B, C)
        per_token = per_token + beta * (penalty * ratio if kl_times_ratio else penalty)

    per_token = per_token * mask  # (B, C); of GSPO's one ratio for an answer, a copy for each token
    if loss_type == "grpo":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    elif loss_type == "dr_grpo":
        if max_length is None:
            raise ValueError("dr_grpo divides by a constant: give max_length")
        per_token = per_token / max_length
    if normalizer is None:
        normalizer = loss_normalizer(mask, loss_type).clamp(min=1)
    return per_token.sum() / normalizer


def loss_normalizer(mask: Tensor, loss_type: str) -> Tensor:
    """What the sum over a whole batch is divided by: its tokens (dapo, cispo) or its answers (grpo, dr_grpo). Parts of
    a batch add up, so take the sum over processes before you guard against 0.
    """
    if loss_type in ("dapo", "cispo"):
        return mask.sum()
    if loss_type in ("grpo", "dr_grpo"):
        return torch.tensor(float(len(mask)), device=mask.device)
    raise ValueError(f"loss_type {loss_type!r}: grpo, dapo, dr_grpo or cispo")


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def judge(rollout: Rollout, asked: list[Prompt], config: Config) -> dict[str, Tensor]:
    """What each answer earns, by the name of the reward, (N,) each, before weights. asked: the question of each of the
    N answers."""
    if config.reward == "verifier":
        golds = [question.gold for question in asked]
        rewards = dict(zip(("correct", "formatted"), score(rollout.texts, golds, rollout.finished, config.verifier)))
    else:
        rewards = own_rewards(rollout, asked, config.reward)
    if config.overlong_buffer:
        limit, buffer = config.max_new_tokens, config.overlong_buffer
        penalties = [overlong_penalty(n, limit, buffer) for n in rollout.mask.sum(dim=1).tolist()]
        rewards["overlong"] = torch.tensor(penalties, device=rollout.tokens.device)
    return rewards


def weights_of(config: Config) -> dict[str, float]:
    """How much each reward counts. A KL in the reward is a cost: what strays from the reference earns less."""
    if config.reward == "verifier":
        judgements = {"correct": config.correct_weight, "formatted": config.format_weight}
    else:
        judgements = own_weights(config)
    return judgements | {"overlong": 1.0, "kl": -config.beta}


# ----------------------------------------------------------------------------------------------------------------------
# Dynamic sampling (DAPO, section 3.2): a group whose answers all earn the same makes room for another one


def groups_that_teach(rewards: dict[str, Tensor], weights: dict[str, float], group_size: int) -> Tensor:
    """(P,) boolean: does any reward with a weight differ between the answers of the group? rewards: (N,) each.

    Each reward by itself. A group whose rewards differ and cancel in the sum passes, although it teaches GRPO nothing:
    to GDPO (gdpo.py), which shares this test, each of them is a lesson."""
    teaches = torch.zeros(len(next(iter(rewards.values()))) // group_size, dtype=torch.bool)
    for name, values in rewards.items():
        if weights[name]:
            groups = values.view(-1, group_size)  # (P, G); what is unknown (NaN) differs from nothing
            least, most = groups.nan_to_num(math.inf).amin(dim=1), groups.nan_to_num(-math.inf).amax(dim=1)
            teaches |= (most > least).cpu()
    return teaches


def keep_groups(
    rollout: Rollout, rewards: dict[str, Tensor], asked: list[Prompt], teaches: Tensor, n: int, group_size: int
) -> tuple[Rollout, dict[str, Tensor], list[Prompt]]:
    """The answers, rewards and questions of n groups: those that teach are chosen first, flat ones fill up, and all
    stand in the order drawn. teaches: (P,) boolean."""
    groups = torch.argsort(~teaches, stable=True)[:n].sort().values  # (n,)
    rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()  # (n · G,)
    kept = {name: values[rows.to(values.device)] for name, values in rewards.items()}
    return rollout.rows(rows.to(rollout.mask.device)), kept, [asked[i] for i in groups.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# The update


def can_train(advantages: Tensor, config: Config) -> Tensor:
    """(n,) boolean: the answers that can have a gradient, those with an advantage; with a KL in the loss, all."""
    return (advantages != 0) | bool(config.beta and config.kl_in == "loss")


def accumulate_gradients(
    run: Run,
    policy: Transformer,
    rollout: Rollout,
    advantages: Tensor,
    config: Config,
    old_logps: Tensor,
    ref_logps: Tensor | None = None,
) -> dict[str, float]:
    """The gradient of the loss over one minibatch of answers, in micro-batches; returns statistics of the update.

    advantages: (n,); old_logps, ref_logps: (n, T-1). The gradients of all processes add up to that of the whole batch.
    """
    in_loss = bool(config.beta) and config.kl_in == "loss"
    counts = rollout.mask & rollout.finished[:, None] if config.mask_truncated else rollout.mask  # (n, T-1)
    normalizer = processes.sum_over_processes(loss_normalizer(counts, config.loss_type)).clamp(min=1)
    # The model need not run on an answer without a gradient, which stays counted in the normalizer.
    has_gradient = counts.any(dim=1) & can_train(advantages, config)  # (n,)
    bounded = config.loss_type != "cispo"
    sums = UpdateSums(config.clip_low, config.clip_high, config.ratio_level, lower_bound=bounded, reference=in_loss)
    chosen, G = has_gradient.nonzero().squeeze(1), config.group_size
    for rows, width in micro_batches(rollout.mask, chosen, config.micro_batch_size, G):
        mask, old = counts[rows, :width], old_logps[rows, :width]  # (b, width)
        ref = ref_logps[rows, :width] if in_loss else None
        with run.autocast():
            logps = shared_logps(policy, rollout.tokens[rows, : width + 1], mask, config.temperature)
        beta, length = config.beta if in_loss else 0.0, config.max_new_tokens
        loss = grpo_loss(
            logps, old, advantages[rows], mask, ref, beta, config.clip_low, config.clip_high, config.loss_type,
            config.ratio_level, length, config.kl, config.kl_times_ratio, normalizer,
        )  # fmt: skip
        run.scaler.scale(loss).backward()
        sums.add(logps, old, advantages[rows], mask, ref, loss=loss)
    return sums.means()


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def frozen_reference(run: Run, policy: Transformer, config: Config) -> Transformer:
    """What the policy is at the start: a copy, in 16 bits if the run multiplies in those, or, with adapters, the policy
    itself, whose adapters are switched off (``adapters_off``). They are never merged for sampling: merging and
    unmerging would round the base's weights each time, and the policy that samples would not quite be the one that
    trains.
    """
    return policy if config.lora_rank else frozen_copy(policy, PRECISIONS[run.precision])


def reference_logps(run: Run, reference: Transformer | None, rollout: Rollout, config: Config) -> Tensor | None:
    """(N, T-1) log-probabilities of the answers' tokens under the reference; None if there is none."""
    if reference is None:
        return None
    with adapters_off(reference):
        return policy_logps(run, reference, rollout, config, group=config.group_size)


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    check_lora(config)
    check_shared("prompts_per_step", config.prompts_per_step)
    questions = config.prompts_per_step // processes.launched()[1]
    if questions < config.minibatches:
        raise UserError(
            f"the answers to {questions} questions do not make {config.minibatches} minibatches per process"
        )
    if config.data == "arith" and (config.arith_warmup or config.arith_fade):
        raise UserError("arith_warmup and arith_fade lead from the embedded task to another one: choose --data")
    if config.arith_warmup >= config.steps and config.data != "arith":
        raise UserError(f"arith_warmup {config.arith_warmup} leaves no step of {config.steps} for {config.data}")
    if config.overlong_buffer > config.max_new_tokens:
        raise UserError(f"overlong_buffer {config.overlong_buffer} is longer than max_new_tokens")
    if config.beta and config.kl == "k1" and config.kl_in == "loss" and not config.kl_times_ratio:
        raise UserError("k1 as a loss has an expected gradient of zero: use --kl k2 or k3, or --kl_in reward")
    if config.kl_times_ratio and (not config.beta or config.kl_in == "reward" or config.kl == "k2"):
        raise UserError("kl_times_ratio is for k1 or k3 in the loss, with a --beta")
    if config.kl_times_ratio and config.ratio_level == "sequence":
        raise UserError("kl_times_ratio weighs the KL of a token by its own ratio: it wants --ratio_level token")
    check_reward(config)
    verified = config.correct_weight or config.format_weight or config.overlong_buffer or config.beta
    if config.reward == "verifier" and not verified:
        raise UserError("all weights are 0: there is nothing to learn")


def notes(config: Config) -> list[str]:
    """What is possible, but perhaps not what was meant."""
    found = []
    if config.beta and config.kl_in == "reward" and config.scale == "group":
        found.append(
            "note: in a group whose answers earned the same, the std is that of the KL alone, so the KL pushes in full "
            "however small --beta is; --scale none keeps it small"
        )
    if config.loss_type == "dr_grpo" and config.scale == "group":
        found.append(
            "note: Dr. GRPO also drops the division by the group's std; add --scale none for the paper's method"
        )
    return found


def main(config: Config) -> dict:
    """Train; return the last evaluation's figures. A finished run is only evaluated, an unfinished one continues."""
    config = with_start(config, "sft")
    check(config)
    longest = longest_prompt(config, context_length(config.init_from, "python sft.py"))
    processes.print_once(*notes(config))
    run, policy, tokenizer = begin(config, "grpo", "python sft.py")
    questions = Questions(config, tokenizer, longest, config.arith_warmup, config.arith_fade)
    start_lora(policy, config)
    policy.activation_checkpointing = config.activation_checkpointing
    reference = frozen_reference(run, policy, config) if config.beta else None  # before resume: the policy of the start
    optimizers = make_optimizers(policy, config.lr, config.weight_decay, config.beta2)
    first = run.resume(policy, optimizers)
    G, share = config.group_size, config.prompts_per_step // processes.world_size()  # answers to each of these prompts
    announce(run, policy, questions, answers=config.prompts_per_step * G, starts=config.init_from)
    if first == 0:
        run.evaluation(0, **questions.examine(run, policy))
        assert_same_in_float32(run, policy, questions, config)
    weights, alarm = weights_of(config), Alarm(run)

    for step in run.steps(first, config.steps):
        # 1. Every question is answered G times and judged. (DAPO draws others for those whose answers earn the same.)
        begun, missing, rollouts, asked = time.perf_counter(), share, [], []
        for draw in range(config.draws):
            if not (batch := questions.batch(step, draw, without=asked, most=2 * missing)):
                break
            ids, seed = [ids for ids, _ in batch], sampling_seed(config.seed, step, draw, config.draws)
            with run.autocast(), run.eager():
                more = sample_answers(policy, tokenizer, ids, G, config.max_new_tokens, config.temperature, seed)
            rollouts.append(more)
            asked += [question for _, question in batch]
            rollout = join(rollouts, tokenizer.pad_id)  # N = G · questions rows, those of one question side by side
            rewards = judge(rollout, [question for question in asked for _ in range(G)], config)  # (N,) each
            teaches = groups_that_teach(rewards, weights, G)  # (P,), P of all draws so far
            missing = share - int(teaches.sum())
            if missing <= 0:
                break
        stop_if_a_reward_failed(config)
        sampled = describe(rollout, rewards | {"reward": total_reward(rewards, weights)})
        rollout, rewards, asked = keep_groups(rollout, rewards, asked, teaches, share, G)

        # 2. The reference is who the policy was at the start. With a beta, straying from it costs reward here, or loss.
        ref_logps = reference_logps(run, reference, rollout, config)  # (N, T-1), or None
        if config.beta and config.kl_in == "reward":
            logps = policy_logps(run, policy, rollout, config, group=G)  # the sampler's rounding is no KL
            rewards["kl"] = (kl_estimate(logps, ref_logps, config.kl) * rollout.mask).sum(dim=1)  # of a whole answer

        # 3. Advantages: how much better each answer did than its siblings, which are all on one process.
        all_rewards = {name: processes.gather(values) for name, values in rewards.items()}  # scale = batch wants them
        advantages = group_advantages(total_reward(all_rewards, weights), G, config.scale)
        signal = reward_signal(all_rewards, weights, advantages, G)  # flat groups, distinct advantages
        advantages = processes.my_share(advantages)  # (N,)

        # 4. π_old is the policy that sampled, before any update: every ratio of this step is to it. Its
        #    log-probabilities are computed again, as training does it, since the sampler's differ by rounding.
        has_gradient = can_train(advantages, config)  # (N,): the other rows are left out of every update, too
        old_logps = policy_logps(run, policy, rollout, config, has_gradient, G)  # (N, T-1), 0 in the other rows
        assert_same_policy(run, gap := sampler_gap(rollout, old_logps, has_gradient))
        if step == 0:
            report_start(run, rollout, rewards, sampled, signal["flat_groups"], asked[0])
        sampling_seconds = time.perf_counter() - begun

        # 5. Several updates on the same answers. From the second on, ratios differ from 1 and the clip acts.
        lr, updates = learning_rate(step, config.steps, config.lr, config.warmup, config.final_lr), []
        for epoch in range(config.epochs):
            for rows in minibatches(len(rollout), config.minibatches, step, epoch, config.seed, G):
                part, ref = rollout.rows(rows), None if ref_logps is None else ref_logps[rows]
                statistics = accumulate_gradients(run, policy, part, advantages[rows], config, old_logps[rows], ref)
                # If no token of any process has a gradient, momentum must not move the weights by itself.
                norm = update(run, policy, optimizers, lr, config.max_grad_norm) if statistics["tokens"] else 0.0
                updates.append(statistics | {"grad_norm": norm})

        # 6. What happened.
        keep_answers(run, step, policy, rollout, asked, rewards, weights, advantages, old_logps, ref_logps)
        figures = step_figures(sampled, updates) | signal | {"sampler_gap": gap}
        figures |= {"kl_ref": mean_per_token(rewards["kl"], rollout.mask)} if "kl" in rewards else {}
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
    run.close(questions.summary(held_out, run), evaluate_command(config, run.folder, config.eval_data or config.data))
    return held_out


def example() -> None:
    """One question, four answers of at most three tokens, after a first update: from rewards to the next gradient."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])  # the tokens of each answer
    old_logps = torch.tensor([[0.5, 0.5, 0.8], [0.4, 0.5, 1.0], [0.5, 0.2, 0.6], [0.3, 1.0, 1.0]]).log()
    now = torch.tensor([[0.7, 0.5, 0.8], [0.2, 0.5, 1.0], [0.5, 0.3, 0.6], [0.33, 1.0, 1.0]])  # after one update
    advantages = group_advantages(rewards, group_size=4)
    print("rewards                  ", show(rewards))
    print("mean, std of the group   ", show(torch.stack([rewards.mean(), rewards.std()])))
    print("advantages               ", show(advantages), " (one for all tokens of an answer)")
    logps = now.log().requires_grad_()
    loss = grpo_loss(logps, old_logps, advantages, mask)
    loss.backward()
    ratios = now / old_logps.exp()
    clipped = ratios.clamp(0.8, 1.2)
    for i in range(4):
        tokens = mask[i].bool()
        rho, a = ratios[i, tokens], advantages[i]
        print(f"answer {i + 1}: ratios ρ         ", show(rho))
        print("          ρ A, clip(ρ) A ", show(rho * a), " ", show(clipped[i, tokens] * a))
        print("          the smaller    ", show(torch.minimum(rho * a, clipped[i, tokens] * a)))
        print("          dL / d log π   ", show(logps.grad[i, tokens]))
    print(f"loss = -(their sum) / {int(mask.sum())} tokens = {loss.item():.4f}")
    print(
        "No gradient where the ratio has moved by more than ε with the advantage: answer 1, token 1, answer 2, token 1."
    )
    print("Answer 3, token 2 moved the wrong way, to 1.5: it keeps its gradient and comes back.")


if __name__ == "__main__":
    run_stage(main, Config, example)
