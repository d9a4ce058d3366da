"""The DPO family: preferences without a reward model and without sampling.

The policy that is best for a reward r while staying near a reference, max E[r] - β KL(π, π_ref), is known in closed
form: π ∝ π_ref exp(r / β). Solved for r it reads r = β log (π / π_ref) + β log Z(x), where Z depends on the prompt
alone (Rafailov et al. 2023, eq. 5). Bradley-Terry says P(w beats l) = σ(r_w - r_l) of two answers to one prompt
(``reward.py``), so Z cancels, and the reward model's loss becomes a loss on the policy itself. We write w for the
chosen answer, l for the rejected one, Δ = log π(y|x) - log π_ref(y|x), summed over the tokens of an answer y, its
end-of-text among them, the prompt not, and δ = Δ_w - Δ_l. βΔ is the *implicit reward* of the answer::

    DPO     - log σ( β δ )                                    with ``label_smoothing``: labels may be flipped
    IPO     ( δ - 1/(2β) )²                                   a target for the gap instead of "more"
    SimPO   - log σ( β (a_w - a_l) - γ )                      a = mean log π of a token; no reference
    ORPO    NLL(chosen) - β log σ( log (odds_w / odds_l) )    odds = e^a / (1 - e^a); no reference

(Azar et al. 2023; Meng et al. 2024; Hong et al. 2024.) KTO, which learns from single answers, is ``kto.py``. Mind what
is summed and what is averaged: DPO sums, SimPO and ORPO average. IPO's paper sums; its authors later asked for the mean
over tokens, which is TRL's way and our default (``ipo_average``): then 1/(2β) is the gap of a token. ORPO's NLL, the
mean over all tokens of the chosen rows with their prompts, is fine-tuning, so ORPO could start from a pretrained model;
here it starts from SFT like the others, so that they can be compared.

What to watch, and what it should look like:

* ``accuracy``, how often the chosen answer has the higher implicit reward: up, from about 0.5 (at first all rewards are
  0 up to rounding, and a tie counts half). SimPO and ORPO have no reference: there the "reward" is β times the mean
  log π of a token, and accuracy starts at whatever the starting policy scores.
* ``val_questions``, greedy accuracy on held-out questions of the embedded task: what it is all for. ``val_accuracy``
  need not rise with it: the held-out pairs are off-policy, written by a rule and not by this policy.
* ``margin``, the difference of the two rewards: up; with IPO to 1/2, β times the gap aimed at, and no further.
* ``logp_chosen``, the log-probability of a token of the chosen answer: often *down*, though less than
  ``logp_rejected``. All losses but ORPO's see the difference alone. If it falls far, the policy has forgotten how to
  answer: lower --lr, raise --beta (DPO, IPO), or use ORPO.

Both answers of a pair go through the model together. The reference never changes, so its log-probabilities are computed
once, before the first step.

    python dpo.py                                  # after sft.py: on right and wrong answers of its model
    python dpo.py --method orpo
    python dpo.py --data arith --out_dir out/arith/dpo_others      # on off-policy pairs: it helps little
    python dpo.py configs/dpo_hh_cpu.py --data_dir DIR             # HH-RLHF
    python dpo.py --example                                        # from four log-probabilities to a gradient, by hand
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import encode_prompts, epoch_batch, parts_of
from lora import LoRARunConfig, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from preferences import (
    PairRows,
    encode_pairs,
    held_out_of,
    load_held_out_pairs,
    load_pairs,
    own_pairs,
    sources,
)
from rollout import greedy_accuracy
from runtime import processes
from runtime.config import Above, AtLeast, Count, CountOrNone, NotNegative, Positive, check_shared, run_stage, validate
from runtime.errors import UserError
from runtime.rows import evaluate_command, few
from runtime.run import Run
from sft import answers
from stages import begin, with_start
from texts import load_prompts
from tokenizer import Tokenizer
from transformer import Transformer, answer_logps, model_size, shared_logps
from watch import KeptRows

# What suits a small model with short answers. The papers have 0.1 (DPO, IPO, ORPO) and 2 (SimPO): with those, every
# method except ORPO teaches the embedded task's policy to tell the answers apart, and it forgets how to give one.
BETAS = {"dpo": 0.5, "ipo": 5.0, "simpo": 10.0, "orpo": 0.1}
MAX_NEW_TOKENS = 48  # of an answer to a held-out question


@dataclass(frozen=True)
class Config(LoRARunConfig):
    method: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    """The loss. (kto is refused: it has a command of its own, python kto.py.)"""
    data: str = "own"
    """The pairs: own (right and wrong answers of the starting policy to the embedded questions, on-policy), arith (the
    same questions, off-policy), hh-harmless, hh-helpful, ultrafeedback, a file of rows with the columns prompt,
    chosen, rejected (.jsonl), or a dataset of the hub (org/name); several joined by "+".
    """
    n_pairs: CountOrNone = None
    """Use at most this many pairs of each source (None: 2048 of arith, all of the others)."""
    init_from: str = ""
    """The policy to start from, and the reference: a run's folder or a checkpoint. Default: out/<task>/sft."""
    max_length: Annotated[int, AtLeast(8)] = 256
    """The tokens of a row; a longer one loses the beginning of its prompt."""
    beta: Annotated[float | None, Above(0)] = None
    """dpo: the larger, the nearer to the reference; ipo: the gap aimed at is 1/(2β), of a token; simpo: scales the
    difference; orpo: the weight of the push away from the rejected answer. Default: dpo 0.5, ipo 5, simpo 10, orpo
    0.1."""
    label_smoothing: Annotated[float, AtLeast(0, below=0.5)] = 0.0
    """dpo: the share of pairs whose labels are believed to be flipped (conservative DPO). With half of them flipped
    nothing would be left to learn."""
    ipo_average: bool = True
    """ipo: whether log-probabilities are averaged per token instead of summed."""
    gamma: NotNegative = 1.0
    """simpo: the margin by which the better answer should win (the paper's γ; β times its "gamma_beta_ratio")."""
    batch_size: Count = 16
    """The pairs of one step, over all processes."""
    epochs: Positive = 1.0
    """Passes over the data."""
    lr: NotNegative = 1e-4
    eval_pairs: Count = 512
    """The held-out pairs of a validation."""
    eval_prompts: Count = 128
    """The held-out questions answered at each validation, if the data is the embedded task."""


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


def simpo_loss(chosen_avg: Tensor, rejected_avg: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """``-log σ(β (a_w - a_l) - γ)``: per token, so that length earns nothing, and by a margin (Meng et al. 2024, eq.
    6).

    Log-probabilities per token, (B,) each -> the mean over pairs. (TRL adds an SFT term by default, and gives γ/β.)
    """
    return -F.logsigmoid(beta * (chosen_avg - rejected_avg) - gamma).mean()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without loss of digits: written as it stands it is -inf between -1e-8 and 0 in float32.

    Near 0, expm1 keeps the small 1 - e^x; far from 0, log1p keeps the small e^x (Mächler 2012). x = 0 is taken as the
    largest number below it, so that the result stays finite.
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

    Log-probabilities per token of the answers, (B,) each; chosen_nll: a scalar, the mean negative log-probability over
    all tokens of the chosen rows, prompts included, as the authors' code and TRL have it. Returns a scalar.
    """
    # log odds = a - log(1 - e^a)
    log_odds = (chosen_avg - rejected_avg) - (log1mexp(chosen_avg) - log1mexp(rejected_avg))
    return chosen_nll - beta * F.logsigmoid(log_odds).mean()


# ----------------------------------------------------------------------------------------------------------------------
# From rows to losses


@torch.no_grad()
def reference_logps(model: Transformer, layout, n: int, batch_size: int = 32, show: bool = True) -> Tensor:
    """Summed log-probabilities under the reference of all rows that ``layout(indices, device)`` lays out, (n,) or, for
    pairs, (2, n), on the CPU. ``model`` must still be the reference.
    """
    parts = []
    for rows in tqdm(parts_of(range(n), batch_size), desc="reference", leave=False, disable=not show):
        tokens, mask, _ = layout(rows, model.head.weight.device)
        parts.append(answer_logps(model, tokens, mask)[0].view(-1, len(rows)).cpu())
    return torch.cat(parts, dim=1).squeeze(0)


def where_needed(config: Config, mask: Tensor, real: Tensor) -> Tensor:
    """(2b, T-1), column t about token t+1: the tokens whose log-probability the loss needs, those of the answers; for
    ORPO's NLL the whole chosen rows, too, which are the first b. mask, real: as of ``PairRows.batch``.
    """
    if config.method != "orpo":
        return mask
    return torch.cat([real[: len(mask) // 2, 1:], mask[len(mask) // 2 :]])


def pair_loss(config: Config, logps: Tensor, mask: Tensor, ref: Tensor, row_tokens: Tensor) -> Tensor:
    """The method's loss of b pairs, their mean.

    logps: (2b, T-1), 0 where it was not needed, the chosen answers above the rejected ones; mask: (2b, T-1), 1 on the
    answers; ref: (2, b), summed, of the reference; row_tokens: for ORPO, the predicted tokens of a chosen row, on
    average over the whole batch. The NLL of a part is its sum / (b · row_tokens), so that parts, each weighed by its
    share of the batch, add up to the mean over all tokens of the batch.
    """
    b, beta = ref.shape[1], config.beta
    sums, lengths = (logps * mask).sum(dim=1), mask.sum(dim=1)  # (2b,)
    chosen, rejected = sums.chunk(2)  # (b,)
    chosen_avg, rejected_avg = (sums / lengths).chunk(2)
    if config.method == "dpo":
        return dpo_loss(chosen, rejected, *ref, beta, config.label_smoothing)
    if config.method == "ipo" and config.ipo_average:
        return ipo_loss(chosen_avg, rejected_avg, *(ref / lengths.view(2, b)), beta)
    if config.method == "ipo":
        return ipo_loss(chosen, rejected, *ref, beta)
    if config.method == "simpo":
        return simpo_loss(chosen_avg, rejected_avg, beta, config.gamma)
    return orpo_loss(chosen_avg, rejected_avg, -logps[:b].sum() / (b * row_tokens), beta)


def chosen_tokens(rows: PairRows, indices: Iterable[int]) -> int:
    """The predicted tokens of the chosen rows, prompts included: what ORPO's NLL is a mean over."""
    return sum(len(rows.prompts[i]) + len(rows.chosen[i]) - 1 for i in indices)


def pair_figures(config: Config, logps: Tensor, mask: Tensor, ref: Tensor) -> dict:
    """What is logged of b pairs, as sums over them: the implicit rewards of ``rewards_of``, and log π per token."""
    averages = (logps.detach() * mask).sum(dim=1) / mask.sum(dim=1)
    return reward_figures(rewards_of(config, logps.detach(), mask, ref), averages.view(2, -1))


def rewards_of(config: Config, logps: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
    """(2, b), for the log: the implicit rewards β Δ; β log π of the methods without a reference; per token where the
    loss averages. (ORPO's loss compares odds, of which these rewards have the order and not the size.)"""
    sums, lengths = (logps * mask).sum(dim=1).view(2, -1), mask.sum(dim=1).view(2, -1)
    gains = sums - ref if has_reference(config) else sums
    return config.beta * (gains / lengths if is_averaged(config) else gains)


def reward_figures(rewards: Tensor, averages: Tensor) -> dict:
    """Sums over b pairs; rewards and log-probabilities per token, both (2, b). A tie, as before the first update, is
    half right: from there an accuracy rises by learning alone."""
    rewards, averages = torch.stack([rewards, averages]).cpu()  # all at once: a program waits for what it reads
    ties = rewards[0] == rewards[1]
    return {
        "accuracy": float((rewards[0] > rewards[1]).sum() + 0.5 * ties.sum()),
        "margin": float((rewards[0] - rewards[1]).sum()),
        "reward_chosen": float(rewards[0].sum()),
        "reward_rejected": float(rewards[1].sum()),
        "logp_chosen": float(averages[0].sum()),
        "logp_rejected": float(averages[1].sum()),
    }


def has_reference(config: Config) -> bool:
    return config.method in ("dpo", "ipo")


def is_averaged(config: Config) -> bool:
    """Whether the implicit reward is one per token."""
    return config.ipo_average if config.method == "ipo" else not has_reference(config)


# ----------------------------------------------------------------------------------------------------------------------
# What it has learned


@dataclass
class Questions:
    """Held-out questions of the embedded task, if the data has to do with it; none otherwise."""

    ids: list[list[int]]
    prompts: list


def load_questions(data: list[str], tokenizer: Tokenizer, model: Transformer, n: int) -> Questions:
    """At most ``n`` questions that leave the model room for an answer, if "arith" is among the sources ``data``."""
    if "arith" not in data:
        return Questions([], [])
    prompts = load_prompts("arith", "validation", n=n)
    return Questions(*encode_prompts(prompts, tokenizer, model.config.max_seq_len - MAX_NEW_TOKENS))


def question_accuracy(run: Run, model: Transformer, tokenizer: Tokenizer, questions: Questions) -> dict:
    """The share of the questions that are answered right, greedily; nothing if there are none."""
    if not questions.ids:
        return {}
    accuracy = greedy_accuracy(run, model, tokenizer, questions.ids, questions.prompts, MAX_NEW_TOKENS)
    return {"val_questions": accuracy}


def as_chats(liked: list[tuple]) -> list[list[dict]]:
    """(prompt, answer) as conversations, for ``sft.answers``."""
    return [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in liked]


@torch.no_grad()
def validation(run: Run, model: Transformer, rows: PairRows, ref: Tensor, config: Config) -> dict:
    """The loss and the figures of held-out pairs."""
    total, sums = 0.0, Counter()
    row_tokens = torch.tensor(chosen_tokens(rows, range(len(rows))) / len(rows))
    for part in parts_of(list(range(len(rows))), 32):
        tokens, mask, real = rows.batch(part, run.device)
        with run.autocast(), run.eager():
            logps = shared_logps(model, tokens, where_needed(config, mask, real))
        part_ref = ref[:, part].to(run.device)
        total += float(pair_loss(config, logps, mask, part_ref, row_tokens)) * len(part)
        sums.update(pair_figures(config, logps, mask, part_ref))
    return {"val_loss": total / len(rows)} | {f"val_{name}": value / len(rows) for name, value in sums.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    if config.method == "kto":
        raise UserError("KTO learns from single answers and has a command of its own: python kto.py")
    if config.label_smoothing and config.method != "dpo":
        raise UserError("label_smoothing belongs to --method dpo")
    check_lora(config)
    check_shared("batch_size", config.batch_size)


def check_context(config, model: Transformer) -> None:
    if config.max_length > model.config.max_seq_len:
        raise UserError(f"max_length {config.max_length} is more than the context of {model.config.max_seq_len}")


def announce(run: Run, model: Transformer, config: Config, rows: PairRows, held_out: PairRows, steps: int) -> None:
    """Say what the run will do."""
    run.banner(
        model_size(model, config.max_length), steps, 2 * config.batch_size * config.max_length,
        "eager (rows differ in length)",
        data=f"{config.data}: {len(rows):,} pairs, {len(held_out):,} held out{few(len(held_out))}",
        method=f"{config.method}, beta {config.beta:g}", starts=config.init_from,
    )  # fmt: skip


def main(config: Config) -> dict:
    """Train; return the last validation's figures. A finished run is only validated, an unfinished one continues."""
    check(config)
    beta = BETAS[config.method] if config.beta is None else config.beta
    config = with_start(replace(config, beta=beta), "sft")
    run, model, tokenizer = begin(config, config.method, "python sft.py")
    check_context(config, model)

    # Pairs. "own" are on-policy: the starting policy answers, and a right answer is paired with a wrong one.
    own_file = own_pairs(model, tokenizer, config.init_from, config.seed) if "own" in sources(config.data) else ""
    names = sources(config.data, own_file)
    pairs = load_pairs(names, "train", config.data_dir, config.seed, config.n_pairs, config.columns)
    eval_data, split = held_out_of(config)  # for "own" arith: the same pairs whatever policy starts
    held_out_pairs = load_held_out_pairs(config, eval_data, split, config.eval_pairs)
    rows = encode_pairs(pairs, tokenizer, config.max_length)
    held_out = encode_pairs(held_out_pairs, tokenizer, config.max_length)
    questions = load_questions(eval_data, tokenizer, model, config.eval_prompts)
    chats = as_chats([(pair.prompt, pair.chosen) for pair in held_out_pairs])
    steps = max(1, math.ceil(config.epochs * len(rows) / config.batch_size))

    # The reference is the starting policy: its log-probabilities of all answers are computed now, before ``resume``
    # loads trained weights, and no second model is needed. (Adapters change nothing before their first update.)
    start_lora(model, config)
    model.activation_checkpointing = config.activation_checkpointing
    ref, held_out_ref = torch.zeros(2, len(rows)), torch.zeros(2, len(held_out))
    if has_reference(config):
        with run.autocast():
            held_out_ref = reference_logps(model, held_out.batch, len(held_out), show=run.is_main)
            ref = ref if run.finished else reference_logps(model, rows.batch, len(rows), show=run.is_main)  # (2, N)
    kept = KeptRows(run, model, {"training": rows, "held out": held_out}, has_reference(config), is_averaged(config))
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, model, config, rows, held_out, steps)
    if first == 0:
        figures = validation(run, model, held_out, held_out_ref, config)
        figures |= question_accuracy(run, model, tokenizer, questions)
        run.sample(0, answers(run, model, tokenizer, chats))
        run.evaluation(0, **figures)
        assert_same_start(config, figures)

    for step in run.steps(first, steps):
        indices = processes.my_share(epoch_batch(len(rows), config.batch_size, step, config.seed)).tolist()
        row_tokens = torch.tensor(chosen_tokens(rows, indices) / config.batch_size, device=run.device)
        row_tokens = processes.sum_over_processes(row_tokens)  # of the whole batch, for ORPO
        loss, tokens_seen, sums = 0.0, 0.0, Counter()
        for part in parts_of(indices, config.micro_batch_size):
            # (2b, T), chosen above rejected; (2b, T-1), true where the next token is the answer's; (2b, T), no padding
            tokens, mask, real = rows.batch(part, run.device)
            with run.autocast():
                logps = shared_logps(model, tokens, where_needed(config, mask, real))  # (2b, T-1)
            part_ref = ref[:, part].to(run.device)  # (2, b), summed over the answers
            part_loss = pair_loss(config, logps, mask, part_ref, row_tokens)
            share = len(part) / config.batch_size  # parts add up to the mean over the whole batch
            run.scaler.scale(part_loss * share).backward()
            loss, tokens_seen = loss + float(part_loss.detach()) * share, tokens_seen + int(real.sum())
            sums.update(pair_figures(config, logps, mask, part_ref))
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)
        kept.keep(step, steps, model)

        loss, tokens_seen, *sums_of_all = processes.sum_numbers([loss, tokens_seen, *sums.values()])
        figures = {"loss": loss} | {name: value / config.batch_size for name, value in zip(sums, sums_of_all)}
        run.log(step, int(tokens_seen), show=("loss", "accuracy", "margin"), **figures, grad_norm=grad_norm, lr=lr)
        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            figures = validation(run, model, held_out, held_out_ref, config)
            figures |= question_accuracy(run, model, tokenizer, questions)
            run.sample(step + 1, answers(run, model, tokenizer, chats))
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))

    figures = validation(run, model, held_out, held_out_ref, config)
    hint = evaluate_command(config, run.folder, eval_data[0])
    run.close(f"held-out pairs: accuracy {figures['val_accuracy']:.3f}", next_command=hint)
    return figures


def assert_same_start(config: Config, figures: dict) -> None:
    """Before the first step, policy and reference are the same: the mean margin is 0 up to rounding."""
    if has_reference(config) and not abs(figures["val_margin"]) < 0.05:
        raise AssertionError(f"before the first step policy and reference differ: {figures['val_margin']:.4f}")


def example() -> None:
    """DPO's loss of one pair, from four log-probabilities to the gradient."""
    beta = 0.5
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-8.0, -7.0))
    ref_chosen, ref_rejected = torch.tensor([-10.0]), torch.tensor([-6.0])
    print("log-probability of the whole answer, summed over its tokens")
    print("            policy   reference   log-ratio Δ   implicit reward βΔ")
    for name, logp, ref in (("chosen", chosen, ref_chosen), ("rejected", rejected, ref_rejected)):
        ratio = (logp - ref).item()
        print(f"{name:9} {logp.item():8.2f}  {ref.item():10.2f}  {ratio:12.2f}  {beta * ratio:19.2f}")
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).item()
    print(f"margin β (Δ_w - Δ_l) = {margin:.4f}")
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    loss.backward()
    print(f"loss -log σ(margin) = {loss.item():.4f}   (log 2 = 0.6931 at the start, where all Δ are 0)")
    print(f"gradient for log π(chosen) {chosen.grad.item():.4f}, for log π(rejected) {rejected.grad.item():.4f}")
    print("that is -β σ(-margin) and its opposite: the surer the policy is of the pair, the smaller the push")


if __name__ == "__main__":
    run_stage(main, Config, example)
