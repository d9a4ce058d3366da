"""PPO: reinforcement learning with a critic, the algorithm that made language models follow instructions.

An answer is a walk: the state is the text so far, the action is the next token, the reward comes at the end. A
critic, here one more number that the policy's own body computes at every token, learns to foresee that reward; an
action is good if things turned out better than the critic had foreseen. One step of training (Schulman et al. 2017;
Ouyang et al. 2022; Huang et al. 2023)::

    r_t = -β (log π_old(t) - log π_ref(t))      at every token: straying from the reference costs
          + score                               at the last token of the answer: from a verifier or a reward model
    δ_t = r_t + γ V_{t+1} - V_t                 V after the last token is 0: the answer is over
    A_t = δ_t + γ λ A_{t+1}                     GAE: λ = 1 believes the rewards alone, λ = 0 the critic
    R_t = A_t + V_t                             what the critic should have said
    A   ← (A - mean) / std                      over all tokens of the batch; R is made before, of the raw A

    L_policy = - mean min( ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t )               ρ_t = π(t) / π_old(t)
    L_value  = ½ mean max( (V_t - R_t)², (clip(V_t, V_old,t ± ε_v) - R_t)² )    the worse of both, as above
    L = L_policy + c · L_value

The same answers are used for several epochs of minibatches; the clip keeps that honest. In the first minibatch on each
rollout nothing has moved yet, so every ρ_t is 1, and we assert it. In the fields below, ε is ``clip_ratio``, ε_v
``clip_value``, c ``value_weight``; π_old is the policy that sampled.

What to watch, and what it should look like:

* ``score`` and ``correct``: up, together. If only the score rises, the reward is being hacked.
* ``kl_ref``, nats of an answer to the reference: a few. If it runs away, raise --beta or lower --lr.
* ``entropy`` (an estimate, nats of a token): slowly down; near 0 nothing is explored any more.
* ``clip_fraction``: a few percent; ``kl_old``, nats of a token from the policy that sampled: well below 0.1. More of
  either means too large steps.
* ``explained_variance``: how much of the returns the critic foresees: up, from 0 to 1 in the best case. In a short
  run it stays near 0, and the whitening does the critic's work, as a mean over the batch.
* ``finished``: near 1, or the answers need more room.

Two conventions must not be mixed with others': V_t is the value *before* token t+1 is chosen (the stream at column t,
which has seen the tokens up to t), and the score stands on the answer's last token, its end-of-text if it has one (TRL
1.9 puts it one column later). Columns
are those of ``token_logps``: column t is about token t+1.

    python ppo.py --example                                   # one answer, token by token
    python ppo.py                                             # reward from the verifier, after sft.py
    python ppo.py --reward out/arith/reward --beta 0.05 --out_dir out/arith/ppo_reward      # from the reward model
    python ppo.py configs/ppo_hack.py                         # from a weak one without a leash: see the answers go bad
"""

import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
from torch import Tensor

from attention import at_least_float32
from data import parts_of
from optim import learning_rate, make_optimizers, update
from reward import RewardModel, context_of, load_reward_model, real_tokens
from rollout import (
    Questions,
    Rollout,
    RolloutConfig,
    announce,
    check_reward,
    has_own_rewards,
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
from runtime.checkpoint import extra, need_checkpoint
from runtime.config import Above, AtLeast, Count, Finite, NotNegative, Positive, check_shared, run_stage, validate
from runtime.device import PRECISIONS
from runtime.errors import RewardError, UserError
from runtime.rows import evaluate_command
from runtime.run import Run
from stages import begin, with_start
from texts import Prompt
from tokenizer import Tokenizer
from transformer import Transformer, frozen_copy, hidden_logps
from watch import (
    Alarm,
    UpdateSums,
    assert_ratio_is_one,
    assert_same_in_float32,
    assert_same_policy,
    describe,
    flat_groups,
    keep_answers,
    render,
    report_start,
    sampler_gap,
    show,
    step_figures,
)


@dataclass(frozen=True)
class Config(RolloutConfig):
    reward: str = "verifier"
    """What judges the answers: "verifier" (verify.py), a Python file, each function of which is one reward, or the
    folder of a reward model (reward.py)."""
    correct_weight: Annotated[float, Finite()] = 1.0
    """The verifier's reward for the right answer in the strict form. Negative, it makes the policy unlearn."""
    unfinished_penalty: Annotated[float, Finite()] = 1.0
    """What an answer that was cut off loses of its score."""
    prompts_per_step: Annotated[int, AtLeast(2)] = 256
    """The prompts of one rollout, over all processes, with one answer each."""
    epochs: Count = 1
    """Passes over each rollout. (TRL: 4. Here a second one took a quarter of the time and brought nothing.)"""
    gamma: Annotated[float, AtLeast(0, most=1)] = 1.0
    """The discount γ of later rewards."""
    lam: Annotated[float, AtLeast(0, most=1)] = 1.0
    """GAE's λ. TRL and the papers have 0.95, for longer answers and a critic that has had time to learn."""
    clip_ratio: Positive = 0.2
    """Ratios outside 1 ± clip_ratio are clipped."""
    clip_value: Positive = 0.2
    """Values farther than this from what they were at sampling are clipped."""
    value_weight: NotNegative = 0.1
    """The weight of the critic's loss."""
    beta: NotNegative = 0.02
    """The cost of straying from the reference, per nat of KL. 0: no reference is kept."""
    kl_target: Annotated[float | None, Above(0)] = None
    """The KL of an answer, in nats, near which an adapting beta keeps it (Ziegler et al. 2019: 6). None: fixed."""
    kl_horizon: Count = 10_000
    """The number of answers in which an adapting beta changes by at most a fifth."""
    whiten_rewards: bool = False
    """Whether the tokens' rewards are given standard deviation 1 (lm-human-preferences does it, TRL does not)."""
    lr: NotNegative = 3e-4


# ----------------------------------------------------------------------------------------------------------------------
# The model


class ActorCritic(nn.Module):
    """A policy, and a value head on the same body. The head starts at zero: the first advantages are sums of
    rewards alone."""

    def __init__(self, backbone: Transformer):
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.value = nn.Linear(self.config.d_model, 1).to(backbone.head.weight.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """tokens (B, T), mask (B, T-1) -> the log-probabilities of the tokens that count, and the values before them:
        (B, T-1) each, float32, 0 where the mask is False. One forward pass for both.
        """
        hidden = self.backbone.forward_hidden(tokens)  # (B, T, D)
        logps = hidden_logps(self.backbone, hidden, tokens, temperature, where=mask)
        head, stream = self.value, at_least_float32(hidden[:, :-1])  # what stands at t has seen up to t
        values = (stream * head.weight).sum(dim=-1) + head.bias  # (B, T-1); autocast would multiply in 16 bits
        return logps, values.masked_fill(~mask, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm, as functions of numbers


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, beta: float) -> Tensor:
    """``-β (log π_old - log π_ref)`` at every token that counts, and the score on the last of them.

    scores (B,), logps, ref_logps and mask (B, C) -> (B, C), 0 where the mask is 0. Averaged over answers
    of the policy, the sum of log π_old - log π_ref is the KL; of a single token it may be negative.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-2.0, -1.0, 0.0]]),
    ...               torch.tensor([[1, 1, 0]]), beta=0.1)
    tensor([[-0.1000,  1.0000,  0.0000]])
    """
    counts = mask.to(logps.dtype)
    rewards = torch.zeros_like(logps) if ref_logps is None else beta * (ref_logps - logps) * counts
    column = torch.arange(mask.shape[1], device=mask.device)
    last = (column * mask.bool()).amax(dim=1)  # (B,): never a padded column
    has = mask.bool().any(dim=1)
    return rewards.scatter_add(1, last[:, None], (scores * has).to(rewards.dtype)[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2016): ``δ_t = r_t + γ V_{t+1} - V_t``, ``A_t = δ_t + γ λ
    A_{t+1}``.

    rewards, values, mask: (B, C), each row's tokens that count in one stretch -> advantages and returns A + V, (B, C),
    without gradient, 0 where the mask is 0. After the last token there is nothing: neither a value nor an advantage
    of padding flows back.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.6]]), torch.ones(1, 2), lam=0.5)
    (tensor([[0.3000, 0.4000]]), tensor([[0.8000, 1.0000]]))
    """
    mask = mask.to(rewards.dtype)
    rewards, values = rewards.detach() * mask, values.detach() * mask
    advantages = torch.zeros_like(rewards)
    following_value = following = torch.zeros_like(rewards[:, 0])  # V and A of the token after
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        following_value = values[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Standard deviation 1 over the entries that count, of all processes, and mean 0 (or the mean they had, without
    ``shift_mean``).

    x, mask: (B, C) -> (B, C), 0 where the mask is 0. The variance is the sample's (ddof = 1), as in TRL and verl.
    """
    mask = mask.to(x.dtype)
    n = processes.sum_over_processes(mask.sum())
    mean = processes.sum_over_processes((x * mask).sum()) / n.clamp(min=1)
    variance = processes.sum_over_processes(((x - mean).square() * mask).sum()) / (n - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """The clipped objective, negated: all (B, C) -> a scalar, the mean over the tokens that count.

    normalizer: the number of tokens of the whole batch, if this is a part of it.
    """
    mask = mask.to(logps.dtype)
    ratio = (logps - old_logps.detach()).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)  # the worse of the two, whatever A's sign
    return (per_token * mask).sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Half the squared error, of the value or of the value clipped to ``old ± clip``, whichever is larger: all (B, C)
    -> a scalar.
    """
    mask = mask.to(values.dtype)
    old_values = old_values.detach()
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (errors * mask).sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)


def adapt_beta(beta: float, kl: float, target: float, n_answers: int, horizon: int) -> float:
    """A proportional controller (Ziegler et al. 2019, section 2.2): the cost rises while the KL of an answer is above
    its target, by at most a factor 1 + 0.2 · n_answers / horizon at a time.

    >>> round(adapt_beta(0.15, kl=3.0, target=6.0, n_answers=512, horizon=10000), 6)
    0.148464
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n_answers / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(R - V) / var(R) over the tokens that count: 1 = the critic foresees all, 0 = no better than a
    constant."""
    mask, returns, errors = mask.float(), returns * mask, (returns - values) * mask
    moments = [mask, returns, returns.square(), errors, errors.square()]
    n, r, rr, e, ee = processes.sum_over_processes(torch.stack([m.sum() for m in moments])).tolist()
    variance = rr / n - (r / n) ** 2
    return 1 - (ee / n - (e / n) ** 2) / variance if variance > 1e-12 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# What a step is made of


def load_judge(config: Config, tokenizer: Tokenizer, device: torch.device) -> RewardModel | None:
    """The reward model that ``config.reward`` names, frozen; None if rules judge. UserError if it reads other tokens
    than the policy writes."""
    if judged_by_rules(config):
        return None
    judge, other, _ = load_reward_model(config.reward, device)
    if other.state() != tokenizer.state():
        raise UserError(f"{config.reward} reads other tokens than {config.init_from} writes")
    return judge.requires_grad_(False)


def judged_by_rules(config: Config) -> bool:
    """Does a rule judge, the verifier's or the user's own, and no reward model?"""
    return config.reward == "verifier" or has_own_rewards(config)


@torch.no_grad()
def score_answers(
    run: Run, judge: RewardModel | None, rollout: Rollout, asked: list[Prompt], config: Config, answers_known: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The score of each answer, (N,), before what it loses for being cut off; and the rewards that rules gave it, (N,)
    each by name, which a reward model's score does not consist of. asked: the N questions; answers_known: whether all
    questions of the run have an answer."""
    if has_own_rewards(config):
        rewards = own_rewards(rollout, asked, config.reward)
        stop_if_a_reward_failed(config)
        scores = total_reward(rewards, own_weights(config))
        if processes.sum_numbers([float(scores.isnan().any())])[0]:
            unknown = [name for name, values in rewards.items() if values.isnan().any()]
            names = " and ".join(unknown) or "a reward of another process"
            raise RewardError(
                f"PPO needs a score for every answer, but {names} of {config.reward} gave one none (None or NaN)"
            )
        return scores, rewards
    rewards = {}
    if answers_known:
        golds = [question.gold for question in asked]
        rewards = dict(zip(("correct", "formatted"), score(rollout.texts, golds, rollout.finished)))
    if judge is None:
        return config.correct_weight * rewards["correct"] + config.format_weight * rewards["formatted"], rewards
    size = config.micro_batch_size
    parts = zip(rollout.tokens.split(size), real_tokens(rollout.tokens, rollout.mask).split(size))
    with run.autocast(), run.eager():
        return torch.cat([judge(tokens, real) for tokens, real in parts]), rewards


@torch.no_grad()
def examine(
    run: Run, policy: Transformer, judge: RewardModel | None, questions: Questions, config: Config
) -> dict[str, float]:
    """What ``Questions.examine`` finds; of questions whose answers nobody knows, "val_score", the reward model's mean
    score of the greedy answers."""
    if judge is None or questions.answers_known:
        return questions.examine(run, policy)
    scores = []
    for part in parts_of(list(range(len(questions.held))), 64):
        ids, asked = [questions.held_ids[i] for i in part], [questions.held[i] for i in part]
        with run.autocast(), run.eager():
            rollout = sample_answers(policy, questions.tokenizer, ids, 1, config.max_new_tokens, 0.0, seed=0)
        scores.append(score_answers(run, judge, rollout, asked, config, answers_known=False)[0])
    return {"val_score": float(torch.cat(scores).mean())}


@torch.no_grad()
def policy_and_values(run: Run, model: ActorCritic, rollout: Rollout, config: Config) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the answers' tokens and the values before them, (N, T-1) each, without gradient."""
    logps, values = torch.zeros_like(rollout.sampled_logps), torch.zeros_like(rollout.sampled_logps)
    everyone = torch.arange(len(rollout), device=logps.device)
    for rows, width in micro_batches(rollout.mask, everyone, config.micro_batch_size):
        with run.autocast():
            some = model(rollout.tokens[rows, : width + 1], rollout.mask[rows, :width], config.temperature)
        logps[rows, :width], values[rows, :width] = some
    return logps, values


@dataclass
class Batch:
    """What the updates need of a rollout; (N, C) each but ``tokens`` (N, T), C = T - 1."""

    tokens: Tensor
    mask: Tensor
    logps: Tensor  # of the policy that sampled
    values: Tensor  # of the critic at that time
    advantages: Tensor
    returns: Tensor


def accumulate_gradients(
    run: Run, model: ActorCritic, batch: Batch, rows: Tensor, config: Config, first: bool
) -> dict[str, float]:
    """The gradient of both losses over one minibatch, in micro-batches; returns statistics of the update.

    rows: (n,), indices. first: nothing has moved since sampling, so every ratio is 1; AssertionError if not. The
    gradients of all processes add up to that of the whole batch.
    """
    n_tokens = processes.sum_over_processes(batch.mask[rows].sum()).clamp(min=1)
    sums = UpdateSums(config.clip_ratio, config.clip_ratio, totals=("value_loss", "value_clip_fraction", "ratio_gap"))
    for some, width in micro_batches(batch.mask, rows.to(batch.mask.device), config.micro_batch_size):
        mask, tokens = batch.mask[some, :width], batch.tokens[some, : width + 1]
        old, old_values, advantages, returns = (
            x[some, :width] for x in (batch.logps, batch.values, batch.advantages, batch.returns)
        )  # (b, width) each
        with run.autocast():
            logps, values = model(tokens, mask, config.temperature)
        policy_loss = ppo_policy_loss(logps, old, advantages, mask, config.clip_ratio, n_tokens)
        value_loss = ppo_value_loss(values, old_values, returns, mask, config.clip_value, n_tokens)
        run.scaler.scale(policy_loss + config.value_weight * value_loss).backward()
        with torch.no_grad():
            far = (((values - old_values).abs() > config.clip_value) & mask).sum() / n_tokens
            gap = (((logps - old).exp() - 1).abs() * mask).sum() / n_tokens
            sums.add(
                logps, old, advantages, mask, loss=policy_loss, value_loss=value_loss, value_clip_fraction=far,
                ratio_gap=gap,
            )  # fmt: skip
    statistics = sums.means()
    if first:
        assert_ratio_is_one(run, statistics["ratio_gap"])
    return statistics


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    check_shared("prompts_per_step", config.prompts_per_step)
    if config.prompts_per_step // processes.launched()[1] < config.minibatches:
        raise UserError(f"{config.prompts_per_step} prompts do not make {config.minibatches} minibatches per process")
    if config.kl_target is not None and config.prompts_per_step > config.kl_horizon:
        raise UserError(f"kl_horizon {config.kl_horizon} is less than one step of {config.prompts_per_step} answers")
    if judged_by_rules(config):
        check_reward(config)
    if config.kl_target is not None and not config.beta:
        raise UserError("a beta of 0 cannot adapt: give --beta a start, or drop --kl_target")


def main(config: Config) -> dict:
    """Train; return the last evaluation's figures. A finished run is only evaluated, an unfinished one continues."""
    config = with_start(config, "sft")
    check(config)
    if not judged_by_rules(config):
        need_checkpoint(config.reward, "python reward.py")
    run, policy, tokenizer = begin(config, "ppo", "python sft.py")
    judge = load_judge(config, tokenizer, run.device)
    context = policy.config.max_seq_len
    if judge is not None:  # an encoder may read less than the policy can write
        context = min(context, context_of(judge.backbone))
    questions = Questions(config, tokenizer, longest_prompt(config, context))

    # The policy with its critic learns; the reference stays what the policy was at the start.
    reference = frozen_copy(policy, PRECISIONS[run.precision]) if config.beta else None
    model = ActorCritic(policy)
    policy.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay, config.beta2)
    first = run.resume(model, optimizers)
    beta = extra(run.state, "beta", int | float) if run.state and not run.finished else config.beta
    announce(run, policy, questions, config.prompts_per_step, reward=config.reward, starts=config.init_from)
    if first == 0:
        run.evaluation(0, **examine(run, policy, judge, questions, config))
        assert_same_in_float32(run, policy, questions, config)
    alarm = Alarm(run)

    for step in run.steps(first, config.steps):
        # 1. Every question is answered once; a rule, or a reward model, says what the answer is worth.
        begun, batch = time.perf_counter(), questions.batch(step)
        ids, asked, seed = [ids for ids, _ in batch], [one for _, one in batch], sampling_seed(config.seed, step)
        with run.autocast(), run.eager():
            rollout = sample_answers(policy, tokenizer, ids, 1, config.max_new_tokens, config.temperature, seed)
        scores, judged = score_answers(run, judge, rollout, asked, config, questions.answers_known)  # (N,); (N,) each
        scores = scores - config.unfinished_penalty * (~rollout.finished)

        # 2. What the policy, its critic and the reference say of every token, before anything moves.
        old_logps, values = policy_and_values(run, model, rollout, config)  # (N, T-1) each
        ref_logps = policy_logps(run, reference, rollout, config) if reference is not None else None
        assert_same_policy(run, sampler_gap(rollout, old_logps))

        # 3. The score comes at the last token, the cost of straying at each; the critic had foreseen some of it.
        rewards = token_rewards(scores, old_logps, ref_logps, rollout.mask, beta)
        if config.whiten_rewards:
            rewards = whiten(rewards, rollout.mask, shift_mean=False)
        advantages, returns = gae(rewards, values, rollout.mask, config.gamma, config.lam)
        advantages = whiten(advantages, rollout.mask)  # the returns are those of the raw ones
        batch = Batch(rollout.tokens, rollout.mask, old_logps, values, advantages, returns)
        flat = float(flat_groups(processes.gather(scores), config.prompts_per_step))  # are all scores equal?
        kl = torch.zeros_like(scores) if ref_logps is None else ((old_logps - ref_logps) * rollout.mask).sum(dim=1)
        sampled = describe(rollout, {"score": scores, **judged, "kl_ref": kl})
        if step == 0:
            report_start(run, rollout, judged, sampled, flat, asked[0])
        sampling_seconds = time.perf_counter() - begun

        # 4. Epochs of minibatches on the same answers; the clip keeps that honest.
        lr = learning_rate(step, config.steps, config.lr, config.warmup, config.final_lr)
        updates = []
        for epoch in range(config.epochs):
            for rows in minibatches(len(rollout), config.minibatches, step, epoch, config.seed + processes.rank()):
                statistics = accumulate_gradients(run, model, batch, rows, config, first=not updates)
                norm = update(run, model, optimizers, lr, config.max_grad_norm)
                updates.append(statistics | {"grad_norm": norm})

        # 5. What happened.
        earned, counts = {"score": scores, **judged}, {"score": 1.0}
        keep_answers(run, step, policy, rollout, asked, earned, counts, advantages, old_logps, ref_logps, values)
        figures = step_figures(sampled, updates) | {"beta": beta, "flat_groups": flat}
        figures["policy_loss"] = figures.pop("loss")
        figures["first_ratio_gap"] = updates[0]["ratio_gap"]
        del figures["ratio_gap"]  # later it only says how far the updates went
        figures["explained_variance"] = explained_variance(values, returns, rollout.mask)
        figures["rollout_share"] = sampling_seconds / (time.perf_counter() - begun)
        run.log(step, int(figures.pop("tokens")), always=True, show=("score", *judged), lr=lr, **figures)
        alarm.check(figures)
        if config.kl_target is not None:
            beta = adapt_beta(beta, figures["kl_ref"], config.kl_target, config.prompts_per_step, config.kl_horizon)
        run.extra, held_out = {"beta": beta}, {}
        if run.due(step, config.eval_every, config.steps):
            held_out = examine(run, policy, judge, questions, config)
            run.evaluation(step + 1, **held_out)
            run.sample(step + 1, render(asked[0], rollout, judged, n=1))
        if held_out or run.should_save(step, config.steps):
            best = held_out.get(questions.goal, held_out.get("val_score"))
            run.save(step, config.steps, model, optimizers, tokenizer, metric=best, lower_is_better=False)
    held_out = examine(run, policy, judge, questions, config)
    hint = evaluate_command(config, run.folder, config.eval_data or config.data)
    run.close(questions.summary(held_out, run), hint if questions.answers_known or judge is None else "")
    return held_out


def example() -> None:
    """One answer of three tokens: from its score to advantages, to both losses and their gradients."""
    mask = torch.ones(1, 3)
    old_logps, ref_logps = torch.tensor([[0.5, 0.4, 0.8]]).log(), torch.tensor([[0.5, 0.2, 0.8]]).log()
    values = torch.tensor([[0.2, 0.5, 0.9]])  # what the critic foresaw before each token
    rewards = token_rewards(torch.tensor([1.0]), old_logps, ref_logps, mask, beta=0.1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    print("log π_old - log π_ref         ", show(old_logps - ref_logps))
    print("rewards: -0.1 of it, + score 1", show(rewards))
    print("values V_t                    ", show(values))
    following = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    print("δ_t = r_t + V_t+1 - V_t       ", show(rewards + following - values), " (nothing after the last)")
    print("A_t = δ_t + ½ A_t+1           ", show(advantages))
    print("R_t = A_t + V_t               ", show(returns))
    white = whiten(advantages, mask)
    print("A, whitened                   ", show(white))
    logps = torch.tensor([[0.65, 0.35, 0.8]]).log().requires_grad_()  # the policy and the critic have moved
    new_values = torch.tensor([[0.1, 0.8, 0.9]]).requires_grad_()
    policy_loss, value_loss = ppo_policy_loss(logps, old_logps, white, mask), ppo_value_loss(
        new_values, values, returns, mask
    )  # fmt: skip
    (policy_loss + 0.1 * value_loss).backward()
    print("ratios ρ, clipped at 0.8, 1.2 ", show((logps.detach() - old_logps).exp()))
    print(f"policy loss {policy_loss.item():.4f}; dL/dlog π   ", show(logps.grad))
    print(f"value loss  {value_loss.item():.4f}; 0.1 dL/dV    ", show(new_values.grad))


if __name__ == "__main__":
    run_stage(main, Config, example)
