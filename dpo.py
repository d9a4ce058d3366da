"""The DPO family: preferences without a reward model and without sampling.

The policy that is best for a reward r while staying near a reference, max E[r] - β KL(π, π_ref), is known in closed
form: π ∝ π_ref exp(r / β). Solved for r it reads r = β log (π / π_ref) plus a term that depends on the prompt alone
(Rafailov et al. 2023, eq. 5). Put into Bradley-Terry, that term cancels, and the reward model's loss becomes a loss on
the policy itself. With Δ = log π(y|x) - log π_ref(y|x), summed over the tokens of an answer y (its end-of-text among
them, the prompt not), βΔ, the answer's *implicit reward*, and w, l for chosen and rejected::

    DPO     - log σ( β (Δ_w - Δ_l) )                                label smoothing ε: flipped labels occur
    IPO     ( (Δ_w - Δ_l) - 1/(2β) )²                               a target for the gap instead of "more"
    KTO     λ_D (1 - σ( β (Δ - z) ))  or  λ_U (1 - σ( β (z - Δ) ))  single answers, desirable or undesirable
    SimPO   - log σ( β (a_w - a_l) - γ )                            a = mean log π of a token; no reference
    ORPO    NLL(chosen) - β log σ( log (odds_w / odds_l) )          odds = e^a / (1 - e^a); no reference

(Azar et al. 2023; Ethayarajh et al. 2024; Meng et al. 2024; Hong et al. 2024.) KTO's z is the mean Δ of answers to
other prompts, or 0 if that is negative. ORPO's NLL, per token of the chosen row with its prompt, is the fine-tuning
that the other methods expect to have happened before. Mind what is summed and what is averaged: DPO and KTO sum, SimPO
and ORPO average. IPO's paper sums, TRL averages since its authors said so; ``ipo_average`` chooses.

What to watch, and what it should look like:

* ``accuracy``, how often the chosen answer has the higher implicit reward: up, from 0 (at first all rewards are 0, and
  a tie counts as wrong). In SimPO and ORPO the "reward" is log π per token itself, and starts where the start stands.
* ``val_questions``, greedy accuracy on held-out questions of the embedded task: what it is all for. ``val_accuracy``
  need not rise with it: those pairs were written by others.
* ``margin``, the difference of the two rewards: up.
* ``logp_chosen``, the log-probability of a token of the chosen answer: often *down*, though less than
  ``logp_rejected``. The loss sees the difference alone. If it falls far, the policy has forgotten how to answer:
  lower --lr, raise --beta, or use ORPO.

Both answers of all pairs of a batch go through the model together. The reference never changes, so its
log-probabilities are computed once, before the first step.

    python dpo.py                                     # after sft.py: on right and wrong answers of its model
    python dpo.py --method kto
    python dpo.py --data arith --out_dir out/arith/dpo_others      # on pairs that others wrote: it helps little
    python dpo.py configs/dpo_hh_cpu.py --data_dir DIR             # HH-RLHF
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import encode_prompts, epoch_batch, load_prompts
from lora import LoRARunConfig, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from preferences import (
    JudgedRows,
    PairRows,
    encode_judged,
    encode_pairs,
    has_labels,
    held_out_of,
    load_judged,
    load_pairs,
    with_own_pairs,
)
from rollout import greedy_accuracy
from runtime import processes
from runtime.checkpoint import need_checkpoint
from runtime.config import Above, AtLeast, Count, CountOrNone, NotNegative, Positive, check_shared, parse, validate
from runtime.errors import UserError, run_main
from runtime.run import Run, start
from sft import answers
from stages import load_stage
from transformer import Transformer, answer_logps, model_size, token_logps

# What suits a small model with short answers. The papers have 0.1 (DPO, IPO, KTO, ORPO) and 2 (SimPO): with those the
# embedded task's policy learns to tell the answers apart, and forgets how to give one.
BETAS = {"dpo": 0.5, "ipo": 5.0, "kto": 0.5, "simpo": 10.0, "orpo": 0.1}


@dataclass(frozen=True)
class Config(LoRARunConfig):
    method: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    """Which loss."""
    data: str = "own"
    """own (right and wrong answers of the starting policy to the embedded questions), arith (pairs about them that the
    policy did not write), hh-harmless, hh-helpful, ultrafeedback, or a .jsonl file with the columns prompt, chosen,
    rejected (for kto also prompt, completion, label).
    """
    eval_data: str = ""
    """Where held-out pairs come from, and questions, if it is arith. Default: the same data; for own, arith."""
    n_pairs: CountOrNone = None
    """Use only so many (None: 2048 of arith, all of the others)."""
    init_from: str = ""
    """The policy to start from, and the reference: a run's folder or a checkpoint. Default: out/<task>/sft."""
    max_length: Annotated[int, AtLeast(8)] = 256
    """Tokens of a row; a longer one loses the beginning of its prompt."""
    beta: Annotated[float | None, Above(0)] = None
    """How strongly the loss reacts to a difference; in DPO, IPO and KTO also how much it costs to leave the reference.
    Default: dpo and kto 0.5, ipo 5, simpo 10, orpo 0.1.
    """
    label_smoothing: Annotated[float, AtLeast(0, below=0.5)] = 0.0
    """dpo: the share of pairs whose labels are believed to be flipped (conservative DPO). With half of them flipped
    nothing would be left to learn."""
    ipo_average: bool = True
    """ipo: log-probabilities per token instead of sums."""
    gamma: NotNegative = 1.0
    """simpo: the margin by which the better answer should win (the paper's γ; β times its "gamma_beta_ratio")."""
    desirable_weight: NotNegative = 1.0
    """kto: weight of answers with a thumb up. With n_D and n_U answers of either kind, the paper wants
    desirable_weight · n_D / (undesirable_weight · n_U) between 1 and 4/3.
    """
    undesirable_weight: NotNegative = 1.0
    """kto: weight of answers with a thumb down."""
    batch_size: Count = 16
    """Pairs of one step, over all processes; for kto twice as many single answers."""
    epochs: Positive = 1.0
    """Passes over the data."""
    lr: NotNegative = 1e-4
    eval_pairs: Count = 512
    """Held-out pairs of a validation."""
    eval_prompts: Count = 128
    """Held-out questions answered at each validation, if the data is the embedded task."""


# ----------------------------------------------------------------------------------------------------------------------
# The losses, as functions of numbers


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-(1-ε) log σ(β δ) - ε log σ(-β δ)`` with δ = Δ_w - Δ_l (Rafailov et al. 2023, eq. 7; ε: Mitchell 2023).

    Summed log-probabilities of the answers, (B,) each -> a scalar, the mean over pairs. While policy and reference
    are the same it is log 2.

    >>> dpo_loss(torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-11.0]))
    tensor(0.5981)
    """
    logits = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -((1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)).mean()


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """``(δ - 1/(2β))²``: a gap that is too large costs as much as one that is too small, so that pairs on which all
    judges agree cannot drive the policy away from the reference (Azar et al. 2023, eq. 17).

    Log-probabilities summed over an answer (the paper) or per token (TRL), (B,) each -> the mean over pairs.
    """
    gap = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return (gap - 1 / (2 * beta)).square().mean()


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Gains and losses as people feel them, against a reference point (Ethayarajh et al. 2024, eq. 8).

    policy, ref: summed log-probabilities of the answers, (B,); desirable: (B,) boolean; kl: a scalar, how far the
    policy is from the reference on average, estimated from answers to *other* prompts; below zero it is noise, and
    is taken as 0; no gradient flows through it. Returns the mean over all answers (not of two class means).
    """
    gain = policy - ref
    kl = kl.detach().clamp(min=0)
    liked = desirable_weight * (1 - torch.sigmoid(beta * (gain - kl)))
    disliked = undesirable_weight * (1 - torch.sigmoid(beta * (kl - gain)))
    return torch.where(desirable, liked, disliked).mean()


def simpo_loss(chosen_avg: Tensor, rejected_avg: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """``-log σ(β (a_w - a_l) - γ)``: per token, so that length earns nothing, and by a margin (Meng et al. 2024, eq.
    6).

    Log-probabilities per token, (B,) each -> the mean over pairs. (TRL adds an SFT term by default, and gives γ/β.)
    """
    return -F.logsigmoid(beta * (chosen_avg - rejected_avg) - gamma).mean()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without loss of digits: written as it stands it is -inf from x = -1e-8 on in float32.

    Near 0 we need e^x - 1 exactly, far from 0 the logarithm near 1 (Mächler 2012). x = 0 is taken as the number before.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch sees only values that it can take: where() would pass on the NaN gradient of the other one.
    return torch.where(
        near, torch.log(-torch.expm1(x.where(near, -1.0))), torch.log1p(-torch.exp(x.where(~near, -1.0)))
    )


def orpo_loss(chosen_avg: Tensor, rejected_avg: Tensor, chosen_nll: Tensor, beta: float = 0.1) -> Tensor:
    """``NLL(chosen) - β log σ(log odds ratio)``: fine-tuning on the chosen answer, and a push away from the other in
    one loss (Hong et al. 2024, eq. 6 to 8; β is the paper's λ).

    Log-probabilities per token of the answers, (B,) each; chosen_nll: the negative log-probability per token of the
    chosen rows, prompt included, as the authors' code and TRL have it. Returns a scalar.
    """
    log_odds = (chosen_avg - rejected_avg) - (log1mexp(chosen_avg) - log1mexp(rejected_avg))
    return chosen_nll - beta * F.logsigmoid(log_odds).mean()


# ----------------------------------------------------------------------------------------------------------------------
# From rows to losses


@torch.no_grad()
def reference_logps(model: Transformer, layout, n: int, batch: int = 32, show: bool = True) -> Tensor:
    """Summed log-probabilities under the reference of all rows that ``layout(indices, device)`` lays out, (n,) or, for
    pairs, (2, n), on the CPU. ``model`` must still be the reference.
    """
    parts = []
    for first in tqdm(range(0, n, batch), desc="reference", leave=False, disable=not show):
        rows = range(first, min(first + batch, n))
        tokens, mask, _ = layout(rows, model.head.weight.device)
        parts.append(answer_logps(model, tokens, mask)[0].view(-1, len(rows)).cpu())
    return torch.cat(parts, dim=1).squeeze(0)


def pair_loss(
    config: Config, model: Transformer, rows: PairRows, ref: Tensor | None, some: list[int], n_words: Tensor | None, run
) -> tuple[Tensor, dict]:
    """The loss of the pairs ``some``, their mean, and their figures, summed.

    ref: (2, N) from ``reference_logps``. n_words: for ORPO, the tokens of the chosen rows per pair of the whole batch.
    """
    tokens, mask, real = rows.batch(some, run.device)  # (2b, T), (2b, T-1), (2b, T)
    b, beta = len(some), config.beta
    where = mask
    if config.method == "orpo":
        where = mask.clone()
        where[:b] = real[:b, 1:]  # of the chosen rows all, the prompt too
    with run.autocast():
        logps = token_logps(model, tokens, where=where)  # (2b, T-1)
    sums, lengths = (logps * mask).sum(dim=1), mask.sum(dim=1)  # (2b,)
    chosen, rejected = sums.chunk(2)
    chosen_avg, rejected_avg = (sums / lengths).chunk(2)
    if config.method in ("dpo", "ipo"):
        reference = ref[:, some].to(run.device)  # (2, b)
        if config.method == "dpo":
            loss = dpo_loss(chosen, rejected, *reference, beta, config.label_smoothing)
        elif config.ipo_average:
            reference = reference / lengths.view(2, b)
            loss = ipo_loss(chosen_avg, rejected_avg, *reference, beta)
        else:
            loss = ipo_loss(chosen, rejected, *reference, beta)
        rewards = beta * (sums.view(2, b) - ref[:, some].to(run.device))
    elif config.method == "simpo":
        loss, rewards = simpo_loss(chosen_avg, rejected_avg, beta, config.gamma), beta * (sums / lengths).view(2, b)
    else:
        nll = -logps[:b].sum() / (b * n_words)
        loss, rewards = orpo_loss(chosen_avg, rejected_avg, nll, beta), beta * (sums / lengths).view(2, b)
    return loss, _figures(rewards.detach(), (sums / lengths).detach().view(2, b))


def _figures(rewards: Tensor, averages: Tensor) -> dict:
    """Sums over the pairs; both (2, b)."""
    return {
        "accuracy": float((rewards[0] > rewards[1]).sum()),  # a tie is no preference
        "margin": float((rewards[0] - rewards[1]).sum()),
        "reward_chosen": float(rewards[0].sum()),
        "reward_rejected": float(rewards[1].sum()),
        "logp_chosen": float(averages[0].sum()),
        "logp_rejected": float(averages[1].sum()),
    }


def judged_loss(
    config: Config, model: Transformer, rows: JudgedRows, ref: Tensor, some: list[int], kl: Tensor, run
) -> tuple[Tensor, dict]:
    """KTO's loss of the answers ``some``, their mean; figures as sums over either class, with their counts."""
    tokens, mask, _ = rows.batch(some, run.device)
    with run.autocast():
        sums, lengths = answer_logps(model, tokens, mask)  # (b,)
    desirable, reference = rows.desirable[some].to(run.device), ref[some].to(run.device)
    loss = kto_loss(
        sums, reference, desirable, kl, config.beta, config.desirable_weight, config.undesirable_weight
    )  # fmt: skip
    rewards, averages = config.beta * (sums - reference).detach(), (sums / lengths).detach()
    return loss, {
        "desirable": float(desirable.sum()),
        "reward_chosen": float(rewards[desirable].sum()),
        "reward_rejected": float(rewards[~desirable].sum()),
        "logp_chosen": float(averages[desirable].sum()),
        "logp_rejected": float(averages[~desirable].sum()),
    }


@torch.no_grad()
def batch_kl(run: Run, model: Transformer, rows: JudgedRows, ref: Tensor, some: list[int], size: int) -> Tensor:
    """KTO's z: the mean over the whole batch, of all processes, of Δ for prompts with answers to *other* prompts.

    With the right answers it would be the very gain that the loss compares with it.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in (some[i : i + size] for i in range(0, len(some), size)):
        tokens, mask, _ = rows.mismatched(part, run.device)
        with run.autocast():
            sums = answer_logps(model, tokens, mask)[0].cpu()
        total += (sums - ref[part]).sum(dtype=torch.float64)
    n = processes.sum_over_processes(torch.tensor([float(total), len(some)], dtype=torch.float64))
    return (n[0] / n[1]).float().to(run.device)


@torch.no_grad()
def validation(run: Run, model: Transformer, rows: PairRows, ref: Tensor, config: Config) -> dict:
    """Figures of held-out pairs; the loss is the method's own, of KTO with the batch's own KL taken as 0."""
    sums, total, words = {}, 0.0, sum(len(p) + len(c) - 1 for p, c in zip(rows.prompts, rows.chosen)) / len(rows)
    for first in range(0, len(rows), 32):
        some = list(range(first, min(first + 32, len(rows))))
        if config.method == "kto":
            tokens, mask, _ = rows.batch(some, run.device)
            with run.autocast():
                logps, lengths = answer_logps(model, tokens, mask)
            reference = ref[:, some].to(run.device)
            gains, averages = logps.view(2, -1) - reference, (logps / lengths).view(2, -1)
            desirable = torch.arange(2 * len(some), device=run.device) < len(some)
            loss = kto_loss(
                logps, reference.flatten(), desirable, torch.zeros((), device=run.device), config.beta,
                config.desirable_weight, config.undesirable_weight,
            )  # fmt: skip
            figures = _figures(config.beta * gains, averages)
        else:
            loss, figures = pair_loss(config, model, rows, ref, some, torch.tensor(words), run)
        total += float(loss) * len(some)
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
    n = len(rows)
    return {"val_loss": total / n} | {f"val_{name}": value / n for name, value in sums.items()}


@torch.no_grad()
def judged_validation(run: Run, model: Transformer, rows: JudgedRows, ref: Tensor, config: Config) -> dict:
    """The same for single answers: means of either class, and how often a desirable one has the higher reward."""
    rewards, total = torch.empty(len(rows)), 0.0
    for first in range(0, len(rows), 64):
        some = list(range(first, min(first + 64, len(rows))))
        tokens, mask, _ = rows.batch(some, run.device)
        with run.autocast():
            gains = answer_logps(model, tokens, mask)[0].cpu() - ref[some]
        rewards[some] = config.beta * gains
        total += len(some) * float(
            kto_loss(
                gains, torch.zeros_like(gains), rows.desirable[some], torch.zeros(()), config.beta,
                config.desirable_weight, config.undesirable_weight,
            )
        )  # fmt: skip
    liked, disliked = rewards[rows.desirable], rewards[~rows.desirable]
    figures = {"val_loss": total / len(rows)}
    if len(liked) and len(disliked):
        figures["val_accuracy"] = float((liked[:, None] > disliked[None, :]).float().mean())
        figures["val_margin"] = float(liked.mean() - disliked.mean())
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    if config.label_smoothing and config.method != "dpo":
        raise UserError("label_smoothing belongs to --method dpo")
    check_lora(config)
    check_shared("batch_size", config.batch_size)


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    beta = BETAS[config.method] if config.beta is None else config.beta
    config = replace(
        config, beta=beta, init_from=os.path.normpath(config.init_from or f"out/{config.task}/sft"),
        out_dir=config.out_dir or f"out/{config.task}/{config.method}",
    )  # fmt: skip
    check(config)
    need_checkpoint(config.init_from, "python sft.py")
    run = start(config, config.method)
    model, tokenizer, state = load_stage(config.init_from, device=run.device)
    if config.max_length > model.config.max_seq_len:
        raise UserError(f"max_length {config.max_length} is more than the context of {model.config.max_seq_len}")
    run.record_parent(state, config.init_from)

    # Data: pairs as rows, or single answers; held-out pairs; held-out questions, if there are any.
    kto, eval_data = config.method == "kto", held_out_of(config.eval_data or config.data)
    encode, load = (encode_judged, load_judged) if kto else (encode_pairs, load_pairs)
    data = with_own_pairs(config.data, config.init_from, config.seed, config.device)
    rows = encode(load(data, "train", config.data_dir, config.seed, config.n_pairs), tokenizer, config.max_length)
    if kto and len(rows) < 2:
        raise UserError("kto compares answers with those to other prompts: it needs at least two")
    if kto and has_labels(eval_data):
        judged = load_judged(eval_data, "validation", config.data_dir)[: config.eval_pairs]
        held = encode_judged(judged, tokenizer, config.max_length)
        liked = [(one.prompt, one.answer) for one in judged if one.desirable]
    else:
        pairs = load_pairs(eval_data, "validation", config.data_dir)[: config.eval_pairs]
        held = encode_pairs(pairs, tokenizer, config.max_length)
        liked = [(pair.prompt, pair.chosen) for pair in pairs]
    liked = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in liked]
    ids, prompts = [], []
    if "arith" in eval_data:
        prompts = load_prompts("arith", "validation", n=config.eval_prompts)
        ids, prompts = encode_prompts(prompts, tokenizer, model.config.max_seq_len - 48)
    per_step = 2 * config.batch_size if kto else config.batch_size
    steps = max(1, math.ceil(config.epochs * len(rows) / per_step))

    # The reference is the policy as it is now: what it says of every answer is noted, and then it may go. Adapters
    # change nothing before their first update.
    start_lora(model, config)
    model.activation_checkpointing = config.activation_checkpointing
    ref = ref_other = held_ref = None
    if config.method in ("dpo", "ipo", "kto"):
        with run.autocast():
            held_ref = reference_logps(model, held.batch, len(held), show=run.is_main)
            if not run.finished:
                ref = reference_logps(model, rows.batch, len(rows), show=run.is_main)
                ref_other = reference_logps(model, rows.mismatched, len(rows), show=run.is_main) if kto else None
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    first = run.resume(model, optimizers)
    if not run.finished:
        what = "answers" if kto else "pairs"
        run.banner(
            model_size(model, config.max_length), steps, (1 if kto else 2) * per_step * config.max_length,
            "eager (rows differ in length)", data=f"{config.data}: {len(rows):,} {what}, {len(held):,} held out",
            method=f"{config.method}, beta {config.beta:g}", starts=config.init_from,
        )  # fmt: skip

    def evaluate(step: int) -> dict:
        with run.eager():
            how = judged_validation if isinstance(held, JudgedRows) else validation
            figures = how(run, model, held, held_ref, config)
            if ids:
                figures["val_questions"] = greedy_accuracy(run, model, tokenizer, ids, prompts, 48)
            run.sample(step, answers(run, model, tokenizer, liked))
        run.evaluation(step, **figures)
        return figures

    if first == 0:
        figures = evaluate(0)
        if config.method in ("dpo", "ipo", "kto") and not abs(figures.get("val_margin", 0.0)) < 0.05:
            raise AssertionError(f"before the first step policy and reference differ: {figures['val_margin']:.4f}")
    for step in run.steps(first, steps):
        mine = processes.my_share(epoch_batch(len(rows), per_step, step, config.seed)).tolist()
        size = (config.micro_batch_size or config.batch_size) * (2 if kto else 1)
        kl = batch_kl(run, model, rows, ref_other, mine, size) if kto else None
        words = None
        if config.method == "orpo":  # tokens of the chosen rows, prompts included, per pair of the whole batch
            count = sum(len(rows.prompts[i]) + len(rows.chosen[i]) - 1 for i in mine)
            words = processes.sum_over_processes(torch.tensor(count / config.batch_size, device=run.device))
        sums: dict[str, float] = {"loss": 0.0}
        n_tokens = 0
        for some in (mine[i : i + size] for i in range(0, len(mine), size)):
            if kto:
                loss, figures = judged_loss(config, model, rows, ref, some, kl, run)
                n_tokens += sum(min(len(rows.prompts[i]) + len(rows.answers[i]), rows.length) for i in some)
            else:
                loss, figures = pair_loss(config, model, rows, ref, some, words, run)
                n_tokens += sum(2 * len(rows.prompts[i]) + len(rows.chosen[i]) + len(rows.rejected[i]) for i in some)
            share = len(some) / per_step  # parts add up to the mean over the whole batch
            run.scaler.scale(loss * share).backward()
            sums["loss"] += float(loss.detach()) * share
            sums |= {name: sums.get(name, 0.0) + value for name, value in figures.items()}
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        norm = update(run, model, optimizers, lr, config.clip)
        numbers = torch.tensor([*sums.values(), n_tokens], dtype=torch.float64)
        *values, n_tokens = processes.sum_over_processes(numbers).tolist()
        figures = means(dict(zip(sums, values)), per_step, kto)
        run.log(
            step, int(n_tokens), show=("loss", "accuracy", "margin"), grad_norm=norm, lr=lr, kl=kl, **figures,
        )  # fmt: skip

        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            figures = evaluate(step + 1)
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))
    with run.eager():
        how = judged_validation if isinstance(held, JudgedRows) else validation
        figures = how(run, model, held, held_ref, config)
    hint = "" if has_labels(eval_data) else f"python evaluate.py {config.init_from} {run.folder} --data {eval_data[0]}"
    run.close(f"held-out pairs: accuracy {figures.get('val_accuracy', math.nan):.3f}", next_command=hint)
    return figures


def means(sums: dict, n: int, kto: bool) -> dict:
    """Figures of a batch from its sums: per pair, or, of single answers, per answer of each class."""
    if not kto:
        return {name: value if name == "loss" else value / n for name, value in sums.items()}
    liked, disliked = sums["desirable"], n - sums["desirable"]
    out = {"loss": sums["loss"]}
    for name, count in (("chosen", liked), ("rejected", disliked)):
        if count:
            out |= {f"{what}_{name}": sums[f"{what}_{name}"] / count for what in ("reward", "logp")}
    if liked and disliked:
        out["margin"] = out["reward_chosen"] - out["reward_rejected"]
    return out


if __name__ == "__main__":
    run_main(lambda: main(parse(Config)))
