"""The reward model: a number for every answer, learned from comparisons.

A person cannot say how good an answer is on a scale that others share, but can say which of two is better. Bradley and
Terry (1952) turn one into the other: give each answer a score r, and let the chance that it is preferred be the
sigmoid of the difference (Ouyang et al. 2022, InstructGPT, eq. 1)::

    P(chosen ≻ rejected) = σ(r_chosen - r_rejected)
    L = - mean log σ(r_chosen - r_rejected - margin)  +  center · mean (r_chosen + r_rejected)²

One bit about a whole answer is little to learn from, so the pairs are also compared at every token after the first one
that differs, as far as the shorter one goes: an answer that has gone wrong should score less from then
on, whatever stands beside it (the verifiers of Cobbe et al. 2021 also judge at every
token, though one answer at a time)::

    L ← (1 - token_weight) · L + token_weight · (- mean_t log σ(r_chosen(t) - r_rejected(t)))

(``loss`` in the metrics is this one, ``val_loss`` that of whole answers.)

Only differences count, so the scores of each prompt may drift where they like, and answers to different prompts could
not be compared, though PPO has to: ``center`` pulls them to zero (Eisenstein et al. 2023), and after training we
shift and scale the head so that answers of the starting policy to training prompts have mean 0 and variance 1
(Ziegler et al. 2019); to fresh ones they begin a little lower. ``margin`` asks for more distance (where the judge was
more certain, in Touvron et al. 2023, Llama 2, eq. 2).

The model is the fine-tuned policy, its output head replaced by one linear map from the stream to a number. The score of
an answer is read at the last real token, which has seen the whole answer. "Last real" by the mask, never by position
-1, where padding may stand, nor by looking for the padding's id, which a text may contain.

To see that 12+15=28 is wrong, a language model that would itself write 27 still has to learn how to *check*, which is
another skill. On the embedded task it practises on plain sums among the stories (``n_sums``), as large
reward models are first trained on cheap comparisons (Askell et al. 2021).

What to watch, and what it should look like:

* ``accuracy``, how often the chosen answer scores higher: from about 0.5 up. ``val_accuracy`` follows it, below.
* ``margin``, the difference of the two scores: up. While it grows and ``val_accuracy`` does not, the model becomes
  surer of pairs that it gets wrong, and ``val_calibration_error`` rises.
* ``samples.txt``: the flaws that it sees and those that it does not, and whether it prefers long answers as such.

    python reward.py                                                    # the embedded pairs, after sft.py
    python reward.py configs/reward_hh_cpu.py --data_dir DIR            # HH-RLHF, harmless-base
    python reward.py --encoder out/arith/mlm                            # an encoder reads the answers (encoder.py)
    python reward.py --example                                          # from two scores to a gradient, by hand

To score answers of your own::

    judge, tokenizer, _ = load_reward_model("out/arith/reward")
    question = {"role": "user", "content": "What is 2+3?"}
    pair = Pair((question,), "<answer>5</answer>", "<answer>6</answer>")
    print(scores(judge, encode_pairs([pair], tokenizer, 256)))
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import at_least_float32
from data import epoch_batch, parts_of, similar_lengths
from encoder import load_encoder, pool
from optim import learning_rate, make_optimizers, update
from preferences import Pair, PairRows, encode_pairs, held_out_of, load_pairs, own_pairs, sources
from rollout import sample_answers
from runtime import processes
from runtime.checkpoint import extra, load_weights, need_checkpoint
from runtime.config import (
    AtLeast,
    Count,
    CountOrNone,
    CountOrZero,
    NotNegative,
    Positive,
    TrainConfig,
    check_shared,
    run_stage,
    validate,
)
from runtime.errors import UserError
from runtime.rows import few
from runtime.run import Run
from stages import begin, load_stage, with_start
from tokenizer import Tokenizer
from transformer import Transformer, model_size, shared_hidden

DEFAULTS = {"arith": 8192}  # pairs


@dataclass(frozen=True)
class Config(TrainConfig):
    data: str = "arith+own"
    """arith, own (right and wrong answers of the starting policy to the embedded questions), hh-harmless, hh-helpful,
    ultrafeedback, a file of rows with the columns prompt, chosen, rejected (.jsonl), a dataset of the hub (org/name),
    or several of these, joined by "+".
    """
    n_pairs: CountOrNone = None
    """Use at most this many pairs of each source (None: 8192 of arith, all of the others)."""
    n_sums: CountOrZero = 32_768
    """arith: the number of pairs about plain sums among them."""
    init_from: str = ""
    """The fine-tuned policy whose body it takes: a run's folder or a checkpoint. Default: out/<task>/sft."""
    encoder: str = ""
    """Take the body of this masked language model (encoder.py) instead; it must have the policy's tokenizer."""
    max_length: Annotated[int, AtLeast(8)] = 256
    """The tokens of a row; a longer one loses the beginning of its prompt."""
    batch_size: Count = 32
    """The pairs of one step, over all processes; they are of similar length."""
    epochs: Positive = 1.0
    """Passes over the pairs."""
    token_weight: Annotated[float | None, AtLeast(0, most=1)] = None
    """The weight of the loss at every token after the first one that differs; that of the whole answer has the rest
    (None: 0.7, and 0 with an encoder, whose tokens see what comes after them)."""
    margin: NotNegative = 0.0
    """The distance that the scores of a pair should keep."""
    center: NotNegative = 0.05
    """The weight of the pull of the scores to zero (Eisenstein et al.: 0.01; 0: none)."""
    normalize_on: CountOrZero = 128
    """The number of answers of the starting policy whose scores get mean 0 and variance 1 at the end (0: leave the
    scores as they are).
    """
    max_new_tokens: Count = 48
    """The length of those answers, at most."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """The optimizer. muon: of the matrices inside the blocks."""
    lr: NotNegative = 2e-3
    """Peak learning rate; with adamw a tenth of it is a better start."""
    final_lr: Annotated[float, AtLeast(0, below=100)] = 0.0
    warmup: CountOrZero = 20
    weight_decay: NotNegative = 0.01
    eval_every: Count = 200
    eval_pairs: Count = 512
    """The held-out pairs of a validation."""


# ----------------------------------------------------------------------------------------------------------------------
# The model and its loss


class RewardModel(nn.Module):
    """A body with ``forward_hidden(tokens, mask) -> (B, T, D)`` and a linear head: one score for each row. Of a decoder
    the head reads the last real token, of an encoder the mean of all.
    """

    def __init__(self, backbone: Transformer):
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        if not self.config.tie_embeddings:
            backbone.head.requires_grad_(False)  # the words are not asked for
        d = self.config.d_model
        self.score = nn.Linear(d, 1).to(backbone.head.weight.device)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(d + 1))  # scores of about unit size (Ziegler et al. 2019)
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, T), mask (B, T) with 1 = a real token, padding on either side -> scores (B,), float32."""
        if not self.config.causal:
            last_real(mask)  # refuses empty rows
            tokens = F.pad(tokens, (1, 0), value=self.config.vocab_size - 1)  # [CLS], with which its texts begin
            mask = F.pad(mask, (1, 0), value=1)
            hidden = pool(at_least_float32(self.backbone.forward_hidden(tokens, mask=mask)), mask)  # (B, D)
            return (hidden * self.score.weight).sum(dim=1) + self.score.bias
        return self.at_every_token(tokens, mask).gather(1, last_real(mask)[:, None])[:, 0]

    def at_every_token(self, tokens: Tensor, mask: Tensor, answers: Tensor | None = None) -> Tensor:
        """What the head reads at each token of a decoder: (B, T), float32, padded columns without meaning; if
        ``answers`` (B, T-1) marks the answers' tokens, without meaning before them (``shared_hidden``)."""
        if answers is not None:
            hidden = shared_hidden(self.backbone, tokens, answers)  # (B, T, D)
        else:
            hidden = self.backbone.forward_hidden(tokens, mask=None if _right_padded(mask) else mask)  # (B, T, D)
        hidden = at_least_float32(hidden).masked_fill(~mask.bool()[:, :, None], 0.0)
        return (hidden * self.score.weight).sum(dim=2) + self.score.bias  # autocast would multiply in 16 bits

    @torch.no_grad()
    def normalize(self, mean: float, std: float) -> None:
        """Shift and scale the head so that scores with this mean and standard deviation become 0 and 1."""
        self.score.weight.div_(std)
        self.score.bias.sub_(mean).div_(std)


def last_real(mask: Tensor) -> Tensor:
    """(B, T) -> (B,): the column of the last 1 of each row. A row without one is a ValueError.

    >>> last_real(torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 0]]))
    tensor([1, 2, 1])
    """
    mask = mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a row without a real token has no score")
    return (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=1)


def _right_padded(mask: Tensor) -> bool:
    """Then no real token can see padding, and the plain causal mask is enough."""
    mask = mask.bool()
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    """``-mean log σ(r_c - r_r - margin) + center · mean (r_c + r_r)²``: two (B,) -> a scalar.

    >>> bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor(0.5032)
    """
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    return loss + center * (chosen + rejected).square().mean() if center else loss


def token_loss(chosen: Tensor, rejected: Tensor, where: Tensor) -> Tensor:
    """``-log σ(r_chosen(t) - r_rejected(t))``, averaged over the columns ``where`` of a pair, then over the pairs: all
    (B, T) -> a scalar.
    """
    where = where.to(chosen.dtype)
    return (-F.logsigmoid(chosen - rejected) * where).sum(dim=1).div(where.sum(dim=1).clamp(min=1)).mean()


def from_first_difference(tokens: Tensor, real: Tensor) -> Tensor:
    """Rows of chosen answers above those of rejected ones, (2B, T), padded on the right -> (B, T): the columns from
    the first in which they differ to the end of the shorter one. Before it the two are the same text, and no score
    could tell them apart.

    >>> from_first_difference(torch.tensor([[5, 6, 7, 8], [5, 9, 7, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    tensor([[False,  True,  True, False]])
    """
    (chosen, rejected), (a, b) = tokens.chunk(2), real.bool().chunk(2)
    return ((chosen != rejected).cumsum(dim=1) > 0) & a & b


# ----------------------------------------------------------------------------------------------------------------------
# What it has learned


@torch.no_grad()
def scores(model: RewardModel, rows: PairRows, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Scores of all chosen and of all rejected answers, (N,) each, on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: len(rows.prompts[i]) + len(rows.chosen[i]))  # less padding
    out = torch.empty(2, len(rows))
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        tokens, _, real = rows.batch(some, model.score.weight.device)
        out[:, some] = model(tokens, real).view(2, -1).cpu()
    return out[0], out[1]


def calibration(margins: Tensor, bins: int = 5) -> tuple[float, list[tuple[float, float, int]]]:
    """Does σ(margin) mean what it says? Expected calibration error, and for each bin the mean predicted probability
    of the answer that the model prefers, how often that one was preferred, and the number of pairs.

    margins: r_chosen - r_rejected, (N,). Predictions lie between 0.5 and 1; ``bins`` of equal width.

    >>> round(calibration(torch.tensor([2.0, 2.0, 2.0, -2.0]))[0], 3)  # says 0.88, and is right three times of four
    0.131
    """
    sure = margins.abs().sigmoid()  # (N,)
    right = (margins > 0).float()
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        here = place == b
        if here.any():
            predicted, observed = float(sure[here].mean()), float(right[here].mean())
            table.append((predicted, observed, int(here.sum())))
            error += abs(predicted - observed) * int(here.sum()) / len(margins)
    return error, table


def judge(chosen: Tensor, rejected: Tensor, margin: float = 0.0, center: float = 0.0) -> dict:
    """Figures of held-out pairs. A tie counts as wrong."""
    return {
        "val_loss": float(bradley_terry_loss(chosen, rejected, margin, center)),
        "val_accuracy": float((chosen > rejected).float().mean()),
        "val_margin": float((chosen - rejected).mean()),
        "val_calibration_error": calibration(chosen - rejected)[0],
    }


def report(rows: PairRows, chosen: Tensor, rejected: Tensor) -> str:
    """What a score depends on: which flaws it sees, whether it means its probabilities, and what length does to it."""
    right = (chosen > rejected).float()
    lines = []
    for flaw in sorted({pair.flaw for pair in rows.pairs} - {""}):
        here = torch.tensor([pair.flaw == flaw for pair in rows.pairs])
        lines.append(
            f"flaw {flaw!r}: accuracy {right[here].mean():.3f}, a right answer scores {chosen[here].mean():+.2f}, "
            f"the flawed one {rejected[here].mean():+.2f} ({int(here.sum())} pairs)"
        )
    error, table = calibration(chosen - rejected)
    cells = ", ".join(f"says {p:.2f} is {o:.2f} ({n})" for p, o, n in table)
    lines.append(f"calibration: {cells}; expected error {error:.3f}")
    n_chosen, n_rejected = (torch.tensor([len(a) for a in answers]).float() for answers in (rows.chosen, rows.rejected))
    lengths, every = torch.cat([n_chosen, n_rejected]), torch.cat([chosen, rejected])
    if lengths.std() > 0 and every.std() > 0:
        correlation = float(torch.corrcoef(torch.stack([lengths, every]))[0, 1])
        lines.append(f"length: correlation of score and number of tokens {correlation:+.3f}")
    for name, here in {
        "shorter": n_chosen < n_rejected, "as long": n_chosen == n_rejected, "longer": n_chosen > n_rejected
    }.items():  # fmt: skip
        if here.any():
            lines.append(f"  accuracy where the better answer is {name}: {right[here].mean():.3f} ({int(here.sum())})")
    return "\n".join(lines)


@torch.no_grad()
def normalize(run: Run, model: RewardModel, policy: Transformer, tokenizer: Tokenizer, rows: PairRows, config: Config):
    """Mean 0 and variance 1 on answers of the starting policy to prompts of the training pairs."""
    found, prompts = [], prompts_with_room(policy, model.backbone, rows, config)
    for first in range(0, len(prompts), 64):
        some = prompts[first : first + 64]
        with run.autocast(), run.eager():
            rollout = sample_answers(policy, tokenizer, some, 1, config.max_new_tokens, 1.0, config.seed + first)
            found.append(model(rollout.tokens, real_tokens(rollout.tokens, rollout.mask)).cpu())
    found = torch.cat(found)
    model.normalize(float(found.mean()), float(found.std().clamp(min=1e-6)))
    return float(found.mean()), float(found.std())


def context_of(body: Transformer) -> int:
    """The longest row that a reward model with this body can read: an encoder puts [CLS] in front (for which rotary
    positions always have room)."""
    return body.config.max_seq_len - int(not body.config.causal and body.config.positions != "rope")


def prompts_with_room(policy: Transformer, judge: Transformer, rows: PairRows, config: Config) -> list[list[int]]:
    """The first of those to which the policy can write an answer that the reward model's body can read (of several
    sources in ``--data`` they are the first one's)."""
    longest = min(policy.config.max_seq_len, context_of(judge)) - config.max_new_tokens
    prompts = [prompt for prompt in rows.prompts if len(prompt) <= longest][: config.normalize_on]
    if config.normalize_on and len(prompts) < 2:
        raise UserError("normalize_on needs at least two prompts that leave room for an answer: lower --max_new_tokens")
    return prompts


def real_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """(N, T) boolean of rows [prompt | answer | padding] whose answers ``mask`` (N, T-1) marks: all up to the last."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= last_real(mask)[:, None] + 1


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def load_reward_model(path: str, device="cpu") -> tuple[RewardModel, Tokenizer, dict]:
    """(model, tokenizer, state) of a checkpoint that this chapter wrote."""
    backbone, tokenizer, state = load_stage(path, "python reward.py", device, scores=True)
    if state["stage"] != "reward":
        raise UserError(f"{path} holds a {state['stage']} model, not a reward model; make one with: python reward.py")
    model = RewardModel(backbone)
    load_weights(model, state["model"], path)
    return model, tokenizer, state


def training_pairs(config: Config, own: str = "") -> list[Pair]:
    """The pairs of all sources; own: the file with those of the starting policy's own answers."""
    pairs = []
    for name in sources(config.data, own):
        n = config.n_pairs or DEFAULTS.get(name)
        pairs += load_pairs(name, "train", config.data_dir, config.seed, n, config.columns)
        if name == "arith" and config.n_sums:
            pairs += load_pairs("sums", "train", seed=config.seed, n=config.n_sums)
    return pairs


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    if config.token_weight and config.encoder:
        raise UserError("token_weight: an encoder has one score for the whole answer")
    check_shared("batch_size", config.batch_size)


def make_body(run: Run, config: Config, tokenizer: Tokenizer) -> Transformer:
    """The body that the head is put on: the starting policy's once more, or the encoder's, which must read what the
    policy writes."""
    if not config.encoder:
        return load_stage(config.init_from, device=run.device)[0]
    body, its_tokenizer, its_state = load_encoder(config.encoder, run.device)
    if its_tokenizer.state() != tokenizer.state() or extra(its_state, "lowercase", bool):
        raise UserError(
            f"{config.encoder} reads other tokens than {config.init_from} writes; make one that reads them with: "
            f"python encoder.py --objective mlm --tokenizer_from {config.init_from}"
        )
    if config.max_length > context_of(body):
        raise UserError(f"max_length {config.max_length} is more than the encoder's {context_of(body)}")
    return body


def load_held_out(config: Config, tokenizer: Tokenizer) -> PairRows:
    """The held-out pairs as rows; of several sources, some of each."""
    pairs = load_pairs(*held_out_of(config), config.data_dir, config.seed, rename=config.columns)
    random.Random("held out").shuffle(pairs)
    return encode_pairs(pairs[: config.eval_pairs], tokenizer, config.max_length)


def held_out_scores(run: Run, model: RewardModel, rows: PairRows) -> tuple[Tensor, Tensor]:
    with run.autocast(), run.eager():
        return scores(model, rows)


def announce(run: Run, model: RewardModel, config: Config, rows: PairRows, held_out: PairRows, steps: int) -> None:
    """Say what the run will do."""
    run.banner(
        model_size(model.backbone, config.max_length, words=0.0), steps, 2 * config.batch_size * config.max_length,
        "eager (rows differ in length)", starts=config.encoder or config.init_from,
        data=f"{config.data}: {len(rows):,} pairs, {len(held_out):,} held out{few(len(held_out))}",
    )  # fmt: skip


def main(config: Config) -> dict:
    """Train, and return the held-out accuracy. A finished run returns at once, an unfinished one continues."""
    config = with_start(config, "sft")
    check(config)
    if config.token_weight is None:
        config = replace(config, token_weight=0.0 if config.encoder else 0.7)
    if config.encoder:
        need_checkpoint(config.encoder, f"python encoder.py --objective mlm --tokenizer_from {config.init_from}")
    run, policy, tokenizer = begin(config, "reward", "python sft.py")
    if config.max_length > policy.config.max_seq_len:
        raise UserError(f"max_length {config.max_length} is more than the context of {policy.config.max_seq_len}")

    # Pairs as rows of tokens. "own" are on-policy: the starting policy answers, and a right answer is paired with a
    # wrong one.
    own = own_pairs(policy, tokenizer, config.init_from, config.seed) if "own" in sources(config.data) else ""
    rows = encode_pairs(training_pairs(config, own), tokenizer, config.max_length)
    held_out = load_held_out(config, tokenizer)
    batches = similar_lengths(rows.lengths(), config.batch_size, config.seed)
    steps = max(1, math.ceil(config.epochs * len(batches)))

    # The policy's body under a new head.
    torch.manual_seed(config.seed)
    body = make_body(run, config, tokenizer)
    prompts_with_room(policy, body, rows, config)  # refuses what leaves none
    model = RewardModel(body)
    body.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay, kind=config.optimizer)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, model, config, rows, held_out, steps)

    for step in run.steps(first, steps):
        batch = processes.my_share(batches[epoch_batch(len(batches), 1, step, config.seed)[0]])
        loss = right = margin = tokens_seen = 0.0
        for part in parts_of(batch, config.micro_batch_size):
            # (2b, T): the chosen answers above the rejected ones; (2b, T-1): true where the next token is the answer's
            tokens, mask, real = rows.batch(part, run.device)
            with run.autocast():
                if config.encoder:
                    scored = model(tokens, real)  # (2b,)
                else:
                    every = model.at_every_token(tokens, real, mask)  # (2b, T)
                    scored = every.gather(1, last_real(real)[:, None])[:, 0]  # (2b,)
            chosen, rejected = scored.chunk(2)  # (b,) each
            part_loss = bradley_terry_loss(chosen, rejected, config.margin, config.center)
            if config.token_weight:
                of_tokens = token_loss(*every.chunk(2), from_first_difference(tokens, real))
                part_loss = (1 - config.token_weight) * part_loss + config.token_weight * of_tokens
            part_loss = part_loss * len(part) / config.batch_size  # parts add up to the mean over the whole batch
            run.scaler.scale(part_loss).backward()
            loss, tokens_seen = loss + float(part_loss.detach()), tokens_seen + int(real.sum())
            right += float((chosen > rejected).sum()) / config.batch_size
            margin += float((chosen - rejected).detach().sum()) / config.batch_size
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)

        loss, right, margin, tokens_seen = processes.sum_numbers([loss, right, margin, tokens_seen])
        figures = {"loss": loss, "accuracy": right, "margin": margin, "grad_norm": grad_norm, "lr": lr}
        run.log(step, int(tokens_seen), show=("loss", "accuracy"), **figures)
        last, figures = step + 1 == steps, {}
        if last or (step + 1) % config.eval_every == 0:
            figures = judge(*held_out_scores(run, model, held_out), config.margin, config.center)
            run.evaluation(step + 1, **figures)
        if last:  # the report comes first: a scaled head no longer says what it means
            text = report(held_out, *held_out_scores(run, model, held_out))
            run.sample(steps, text)
            run.print(text)
        if last and config.normalize_on:
            mean, std = normalize(run, model, policy, tokenizer, rows, config)
            run.print(f"scores of the starting policy's answers had mean {mean:.2f}, std {std:.2f}; now 0 and 1")
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer)  # no best.pt: only the last one's scores are scaled

    accuracy = judge(*held_out_scores(run, model, held_out))["val_accuracy"]  # which scaling leaves as it was
    asked = "" if "arith" in held_out_of(config)[0] else f" --task {config.task} --data QUESTIONS.jsonl"
    asked += f" --reward {run.folder} --beta 0.05 --out_dir {run.folder.with_name('ppo_' + run.folder.name)}"
    run.close(f"held-out accuracy {accuracy:.3f}", next_command=f"python ppo.py{asked}")
    return {"val_accuracy": accuracy}


def example() -> None:
    """The loss of one pair, from two scores to the gradient."""
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (1.5, 0.5))
    print(f"score of the chosen answer {chosen.item():.4f}, of the rejected one {rejected.item():.4f}")
    difference = (chosen - rejected).item()
    print(f"difference {difference:.4f}")
    print(f"P(chosen is preferred) = σ(difference) = {torch.tensor(difference).sigmoid().item():.4f}")
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    print(f"loss -log σ(difference) = {loss.item():.4f}")
    print(f"gradient for the chosen score {chosen.grad.item():.4f}, for the rejected one {rejected.grad.item():.4f}")
    print("that is -(1 - P) and its opposite: only the difference is learned, and the less, the surer it is")
    with_margin = bradley_terry_loss(chosen.detach(), rejected.detach(), margin=1.0).item()
    print(f"with a margin of 1 the loss is {with_margin:.4f}")
    centered = bradley_terry_loss(chosen.detach(), rejected.detach(), center=0.05).item()
    print(f"with center 0.05 it is {centered:.4f}: 0.05 · (1.5 + 0.5)² is added")


if __name__ == "__main__":
    run_stage(main, Config, example)
