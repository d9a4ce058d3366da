"""KTO: preferences of single answers, each labelled desirable or undesirable.

Pairs are rare; a thumb up or down is what people give. KTO (Ethayarajh et al. 2024) needs no more. With the implicit
reward of DPO, β Δ = β (log π(y|x) - log π_ref(y|x)) summed over an answer y, a desirable answer should lie above a
reference point z, an undesirable one below it::

    L = mean of   λ_D (1 - σ( β (Δ - z) ))   of desirable answers
                  λ_U (1 - σ( β (z - Δ) ))   of undesirable ones
    z = max(0, mean Δ of answers to other prompts)                  no gradient flows through it

z is how far the policy is from the reference anyway. It is estimated with answers to *other* prompts, because with the
right ones it would be the very gain that the loss compares with it. The sigmoid is flat on both sides: an answer far
above or far below the reference point moves little, as gains and losses do for people (prospect theory).

What to watch, and what it should look like:

* ``loss``: from 0.5, where all Δ are 0 and the weights 1, down.
* ``reward_chosen`` up and ``reward_rejected`` down; ``margin`` is their difference.
* ``kl``, the z before it is cut at 0: around 0, then slowly up. If it grows with ``reward_chosen``, everything becomes
  likelier and nothing is told apart.
* ``logp_chosen``, per token: unlike DPO's it should not fall, since desirable answers are raised as such.
* ``val_questions``, greedy accuracy on held-out questions of the embedded task: what it is all for.

    python kto.py                                     # after sft.py: on right and wrong answers of its model
    python kto.py --data labels.jsonl                 # columns prompt, completion, label
    python kto.py --example                           # four answers, from log-probabilities to a gradient, by hand
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from data import epoch_batch, parts_of
from dpo import (
    as_chats,
    check_context,
    load_questions,
    question_accuracy,
    reference_logps,
    reward_figures,
)
from lora import LoRARunConfig, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from preferences import (
    JudgedRows,
    PairRows,
    encode_judged,
    encode_pairs,
    has_labels,
    held_out_of,
    load_held_out_pairs,
    load_judged,
    own_pairs,
    sources,
)
from runtime import processes
from runtime.config import AtLeast, Count, CountOrNone, NotNegative, Positive, check_shared, run_stage, validate
from runtime.errors import UserError
from runtime.rows import evaluate_command, few
from runtime.run import Run
from sft import answers
from stages import begin, with_start
from transformer import Transformer, answer_logps, model_size
from watch import KeptRows


@dataclass(frozen=True)
class Config(LoRARunConfig):
    data: str = "own"
    """The answers: both of each pair of own (right and wrong answers of the starting policy to the embedded
    questions), arith, hh-harmless, hh-helpful, ultrafeedback, or a file of rows (.jsonl) or dataset of the hub
    (org/name) with the columns prompt, chosen, rejected; or one with the columns prompt, completion, label.
    """
    n_pairs: CountOrNone = None
    """Use at most this many pairs, or labelled answers (None: 2048 of arith, all of the others)."""
    init_from: str = ""
    """The policy to start from, and the reference: a run's folder or a checkpoint. Default: out/<task>/sft."""
    max_length: Annotated[int, AtLeast(8)] = 256
    """The tokens of a row; a longer one loses the beginning of its prompt."""
    beta: Positive = 0.5
    """How strongly the loss reacts to a gain, and how much it costs to leave the reference. The paper has 0.1; 0.5
    suits a small model with short answers."""
    desirable_weight: Annotated[float, AtLeast(0, most=1e6)] = 1.0
    """The weight of answers labelled desirable. With n_D and n_U answers of either kind, the paper wants
    desirable_weight · n_D / (undesirable_weight · n_U) between 1 and 4/3.
    """
    undesirable_weight: Annotated[float, AtLeast(0, most=1e6)] = 1.0
    """The weight of answers labelled undesirable."""
    batch_size: Count = 32
    """The answers of one step, over all processes."""
    epochs: Positive = 1.0
    """Passes over the data."""
    lr: NotNegative = 1e-4
    eval_pairs: Count = 512
    """The held-out pairs, or labelled answers, of a validation."""
    eval_prompts: Count = 128
    """The held-out questions answered at each validation, if the data is the embedded task."""


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


@torch.no_grad()
def batch_kl(run: Run, model: Transformer, rows: JudgedRows, ref: Tensor, batch: list[int], size: int) -> Tensor:
    """z before it is cut at 0: the mean over the whole batch, of all processes, of Δ for prompts with answers to
    *other* prompts. ref: (N,) from ``reference_logps`` of ``rows.mismatched``.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in parts_of(batch, size):
        tokens, mask, _ = rows.mismatched(part, run.device)
        with run.autocast():
            sums = answer_logps(model, tokens, mask)[0].cpu()
        total += (sums - ref[part]).sum(dtype=torch.float64)
    n = processes.sum_over_processes(torch.tensor([float(total), len(batch)], dtype=torch.float64))
    return (n[0] / n[1]).float().to(run.device)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def answer_figures(config: Config, gains: Tensor, averages: Tensor, desirable: Tensor) -> dict:
    """What is logged of b answers, as sums over either class: rewards β Δ and log π per token; all (b,),
    ``desirable`` on the CPU, where they are added up."""
    gains, averages = torch.stack([gains, averages]).cpu()
    rewards = config.beta * gains
    return {
        "desirable": float(desirable.sum()),
        "reward_chosen": float(rewards[desirable].sum()),
        "reward_rejected": float(rewards[~desirable].sum()),
        "logp_chosen": float(averages[desirable].sum()),
        "logp_rejected": float(averages[~desirable].sum()),
    }


def class_means(sums: dict, n: int) -> dict:
    """The means of n answers' figures over either class, of the classes that occur."""
    counts, out = {"chosen": sums["desirable"], "rejected": n - sums["desirable"]}, {}
    for name, count in counts.items():
        if count:
            out |= {f"{what}_{name}": sums[f"{what}_{name}"] / count for what in ("reward", "logp")}
    if all(counts.values()):
        out["margin"] = out["reward_chosen"] - out["reward_rejected"]
    return out


@torch.no_grad()
def validation(run: Run, model: Transformer, rows: JudgedRows | PairRows, ref: Tensor, config: Config) -> dict:
    """The loss and the figures of held-out answers, with a KL of 0."""
    if isinstance(rows, PairRows):
        return validation_of_pairs(run, model, rows, ref, config)
    rewards, total = torch.empty(len(rows)), 0.0
    for part in parts_of(list(range(len(rows))), 64):
        tokens, mask, _ = rows.batch(part, run.device)
        with run.autocast(), run.eager():
            gains = answer_logps(model, tokens, mask)[0].cpu() - ref[part]
        rewards[part] = config.beta * gains
        weights = config.desirable_weight, config.undesirable_weight
        loss = kto_loss(gains, torch.zeros_like(gains), rows.desirable[part], torch.zeros(()), config.beta, *weights)
        total += len(part) * float(loss)
    liked, disliked = rewards[rows.desirable], rewards[~rows.desirable]
    figures = {"val_loss": total / len(rows)}
    if len(liked) and len(disliked):  # how often a desirable answer has the higher reward, of all pairs of the two
        difference = liked[:, None] - disliked[None, :]
        figures["val_accuracy"] = float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())
        figures["val_margin"] = float(liked.mean() - disliked.mean())
    return figures


@torch.no_grad()
def validation_of_pairs(run: Run, model: Transformer, rows: PairRows, ref: Tensor, config: Config) -> dict:
    """The same of pairs, whose two answers are compared with each other. ref: (2, N)."""
    total, sums = 0.0, Counter()
    for part in parts_of(list(range(len(rows))), 32):
        tokens, mask, _ = rows.batch(part, run.device)
        with run.autocast(), run.eager():
            logps, lengths = answer_logps(model, tokens, mask)  # (2b,): the chosen answers, then the rejected ones
        part_ref = ref[:, part].to(run.device)
        desirable = torch.arange(2 * len(part), device=run.device) < len(part)
        weights = config.desirable_weight, config.undesirable_weight
        zero = torch.zeros((), device=run.device)
        total += len(part) * float(kto_loss(logps, part_ref.flatten(), desirable, zero, config.beta, *weights))
        sums.update(reward_figures(config.beta * (logps.view(2, -1) - part_ref), (logps / lengths).view(2, -1)))
    return {"val_loss": total / len(rows)} | {f"val_{name}": value / len(rows) for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    check_lora(config)
    check_shared("batch_size", config.batch_size)


def load_held_out(config: Config, tokenizer, eval_data: list[str], part: str) -> tuple[JudgedRows | PairRows, list]:
    """Held-out rows, of that split, and the desirable answers among them as conversations."""
    if has_labels(eval_data, config.data_dir, config.columns):
        judged = load_judged(eval_data, part, config.data_dir, rename=config.columns)[: config.eval_pairs]
        liked = [(one.prompt, one.answer) for one in judged if one.desirable]
        return encode_judged(judged, tokenizer, config.max_length), as_chats(liked)
    pairs = load_held_out_pairs(config, eval_data, part, config.eval_pairs)
    return encode_pairs(pairs, tokenizer, config.max_length), as_chats([(p.prompt, p.chosen) for p in pairs])


def announce(run: Run, model: Transformer, config: Config, rows: JudgedRows, n_held_out: int, steps: int) -> None:
    """Say what the run will do."""
    run.banner(
        model_size(model, config.max_length), steps, config.batch_size * config.max_length,
        "eager (rows differ in length)",
        data=f"{config.data}: {len(rows):,} answers, {n_held_out:,} held out{few(n_held_out)}",
        method=f"kto, beta {config.beta:g}", starts=config.init_from,
    )  # fmt: skip


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    config = with_start(config, "sft")
    check(config)
    run, model, tokenizer = begin(config, "kto", "python sft.py")
    check_context(config, model)

    # Single answers in random order. "own" are on-policy: right and wrong answers of the starting policy.
    own = own_pairs(model, tokenizer, config.init_from, config.seed) if "own" in sources(config.data) else ""
    chosen = sources(config.data, own)
    judged = load_judged(chosen, "train", config.data_dir, config.seed, config.n_pairs, config.columns)
    rows = encode_judged(judged, tokenizer, config.max_length)
    if len(rows) < 2:
        raise UserError("kto compares answers with those to other prompts: it needs at least two")
    eval_data, part = held_out_of(config)
    held_out, chats = load_held_out(config, tokenizer, eval_data, part)
    questions = load_questions(eval_data, tokenizer, model, config.eval_prompts)
    steps = max(1, math.ceil(config.epochs * len(rows) / config.batch_size))

    # The reference is the policy as it is now: what it says of every answer is noted, of those to other prompts too.
    start_lora(model, config)
    model.activation_checkpointing = config.activation_checkpointing
    with run.autocast():
        held_out_ref = reference_logps(model, held_out.batch, len(held_out), show=run.is_main)
        if not run.finished:
            ref = reference_logps(model, rows.batch, len(rows), show=run.is_main)  # (N,)
            other_ref = reference_logps(model, rows.mismatched, len(rows), show=run.is_main)  # (N,)
    kept = KeptRows(run, model, {"training": rows, "held out": held_out})
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, model, config, rows, len(held_out), steps)
    if first == 0:
        figures = validation(run, model, held_out, held_out_ref, config)
        figures |= question_accuracy(run, model, tokenizer, questions)
        run.sample(0, answers(run, model, tokenizer, chats))
        run.evaluation(0, **figures)
        if not abs(figures.get("val_margin", 0.0)) < 0.05:
            raise AssertionError(f"before the first step policy and reference differ: {figures['val_margin']:.4f}")

    for step in run.steps(first, steps):
        batch = processes.my_share(epoch_batch(len(rows), config.batch_size, step, config.seed)).tolist()
        kl = batch_kl(run, model, rows, other_ref, batch, config.micro_batch_size)  # of the whole batch, no gradient
        loss, tokens_seen, sums = 0.0, 0.0, Counter()
        for part in parts_of(batch, config.micro_batch_size):
            tokens, mask, real = rows.batch(part, run.device)  # (b, T), (b, T-1), (b, T)
            with run.autocast():
                logps, lengths = answer_logps(model, tokens, mask)  # (b,), summed over the answers
            desirable, part_ref = rows.desirable[part].to(run.device), ref[part].to(run.device)  # (b,)
            weights = config.desirable_weight, config.undesirable_weight
            part_loss = kto_loss(logps, part_ref, desirable, kl, config.beta, *weights)
            share = len(part) / config.batch_size  # parts add up to the mean over the whole batch
            run.scaler.scale(part_loss * share).backward()
            loss, tokens_seen = loss + float(part_loss.detach()) * share, tokens_seen + int(real.sum())
            gains, averages = (logps - part_ref).detach(), (logps / lengths).detach()
            sums.update(answer_figures(config, gains, averages, rows.desirable[part]))
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)
        kept.keep(step, steps, model)

        loss, tokens_seen, *sums_of_all = processes.sum_numbers([loss, tokens_seen, *sums.values()])
        figures = {"loss": loss} | class_means(dict(zip(sums, sums_of_all)), config.batch_size)
        run.log(step, int(tokens_seen), show=("loss", "margin"), **figures, grad_norm=grad_norm, lr=lr, kl=kl)
        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            figures = validation(run, model, held_out, held_out_ref, config)
            figures |= question_accuracy(run, model, tokenizer, questions)
            run.sample(step + 1, answers(run, model, tokenizer, chats))
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))

    figures = validation(run, model, held_out, held_out_ref, config)
    hint = evaluate_command(config, run.folder, eval_data[0]) if isinstance(held_out, PairRows) else ""
    told = f", accuracy {figures['val_accuracy']:.3f}" if "val_accuracy" in figures else ""  # of one class: none
    run.close(f"held-out answers: loss {figures['val_loss']:.4f}{told}", next_command=hint)
    return figures


def example() -> None:
    """KTO's loss of four answers, from log-probabilities to the gradient."""
    beta, kl = 0.5, torch.tensor(0.4)
    policy = torch.tensor([-8.0, -5.0, -7.0, -9.0], requires_grad=True)
    ref = torch.tensor([-10.0, -5.0, -8.0, -6.0])
    desirable = torch.tensor([True, True, False, False])
    kto_loss(policy, ref, desirable, kl, beta).backward()
    print(f"reference point z = {kl:.2f}, the mean log-ratio of answers to other prompts; beta {beta}")
    print("answer         policy  reference  log-ratio Δ  β (Δ - z)    loss  gradient for log π")
    for i, liked in enumerate(desirable.tolist()):
        one = kto_loss(policy[i : i + 1].detach(), ref[i : i + 1], desirable[i : i + 1], kl, beta).item()
        ratio = (policy[i] - ref[i]).item()
        print(
            f"{'desirable' if liked else 'undesirable':12} {policy[i].item():8.2f} {ref[i].item():10.2f} {ratio:12.2f}"
            f" {beta * (ratio - kl.item()):10.2f} {one:7.4f} {policy.grad[i].item():19.4f}"
        )
    print(f"loss, the mean of the four: {kto_loss(policy, ref, desirable, kl, beta).item():.4f}")
    print("desirable answers are pushed up, undesirable ones down; most strongly near the reference point")


if __name__ == "__main__":
    run_stage(main, Config, example)
