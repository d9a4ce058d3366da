"""Supervised fine-tuning: from a model of text to a model that answers.

The same loss as in pretraining, with two differences. The text is conversations, in the chat template. And only what
the assistant says is learned, its end-of-text included: the model should answer questions, not ask them. With m = 1
on those tokens::

    L = - Σ m_t log p(token t | tokens < t)  /  Σ m_t            over the whole batch, not averaged row by row

The order of sum and division matters. A mean of row means gives each row the same weight, so that a token in a short
answer counts more than one in a long answer, and the result depends on how rows were distributed over micro-batches
and processes.

Short conversations share a row (packing): a token attends to its own conversation only, positions restart in each.

What to watch, and what it should look like:

* ``loss``: down within the first steps, because the form of an answer is learned first; then slowly.
* ``val_loss``: down, then flat. When it rises while ``loss`` falls, the answers are learned by heart: fewer --epochs.
* ``val_token_accuracy``: up. An answer is right only if all its tokens are, so 0.9 is less than it sounds.
* ``share_learned``, the share of a batch that counts: steady. Near 0 the rows are mostly padding or questions.
* ``samples.txt``: answers that end by themselves, in the form of the reference beside them.

    python sft.py                                            # the embedded task, after pretrain.py
    python sft.py configs/sft_gsm8k.py --data_dir DIR        # GSM8K, Dolly and Alpaca together
    python sft.py --sweep 3e-4 1e-3 3e-3                     # one run for each learning rate: a table and a plot
    python sft.py --example                                  # the loss of five tokens, by hand
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from data import PackedRows, epoch_batch, pack, parts_of
from generate import generate
from lora import TARGETS, LoRARunConfig, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from runtime import processes
from runtime.checkpoint import write_text
from runtime.config import AtLeast, Count, CountOrNone, NotNegative, Positive, check_shared, run_stage, validate
from runtime.errors import UserError
from runtime.folder import run_folder
from runtime.plots import plot_sweep
from runtime.rows import describe_held_out, held_out
from runtime.run import Run
from stages import begin, with_start
from texts import load_chats
from tokenizer import Tokenizer, encode_chat
from transformer import Transformer, model_size, token_logps


@dataclass(frozen=True)
class Config(LoRARunConfig):
    data: str = "arith"
    """The conversations: arith, gsm8k, alpaca, dolly, hh-harmless, a file of rows (.jsonl: messages, or prompt and
    completion), a dataset of the hub (org/name), or several joined by "+"."""
    n_examples: CountOrNone = None
    """Use at most this many conversations of each source (None: 384 of arith, all of the others)."""
    init_from: str = ""
    """The pretrained model: a run's folder or a checkpoint. Default: out/<task>/pretrain."""
    seq_len: Annotated[int, AtLeast(2)] = 256
    """The tokens of a row."""
    packing: bool = True
    """Whether several conversations share a row, unable to see each other."""
    batch_size: Count = 2
    """The rows of one step, over all processes."""
    epochs: Positive = 8.0
    """Passes over the data."""
    weight_decay: NotNegative = 0.01
    lora_targets: tuple[str, ...] = (*TARGETS, "head")
    """The linear layers that get adapters. Here the head is one of them: pretraining never showed the tokens of the
    answer's form, their rows of the head are all alike, and frozen they would stay it."""
    sweep: Annotated[tuple[float, ...], AtLeast(0)] = ()
    """The learning rates to try, one run for each in <out_dir>/lr_<rate>; table and plot stand in <out_dir>."""


def sft_loss(logps: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean negative log-probability of the tokens that count.

    logps: (B, T-1), column t the log-probability of token t+1 (``token_logps``); loss_mask: (B, T-1), aligned to it,
    that is the row's mask without its first column. A batch in which nothing counts gives 0.

    >>> sft_loss(torch.tensor([[-1.0, -3.0], [-5.0, -7.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(3.)
    """
    mask = loss_mask.to(logps.dtype)
    return -(logps * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def validation(run: Run, model: Transformer, rows: PackedRows, batch: int) -> dict:
    """Loss, perplexity (the exponential of the mean over all tokens), and how often the likeliest token is right."""
    total = right = count = 0.0
    for first in range(0, len(rows), batch):
        tokens, mask, segments = (x.to(run.device) for x in rows.batch(range(first, min(first + batch, len(rows)))))
        with run.autocast(), run.eager():
            hidden = model.forward_hidden(tokens, segments=segments)[:, :-1][mask[:, 1:]]  # (n, D)
            logps = model.head(hidden).float().log_softmax(dim=-1)
        targets = tokens[:, 1:][mask[:, 1:]]
        total -= float(logps.gather(1, targets[:, None]).cpu().sum(dtype=torch.float64))
        right += float((logps.argmax(dim=-1) == targets).sum())
        count += len(targets)
    loss = total / count
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 50)), "val_token_accuracy": right / count}


def answers(run: Run, model: Transformer, tokenizer: Tokenizer, chats: list, n: int = 3) -> str:
    """The model's greedy answers to the first questions of ``chats``, beside the reference."""
    prompts = [encode_chat(tokenizer, chat[:-1], add_generation_prompt=True)[0] for chat in chats]
    short = [(chat, ids) for chat, ids in zip(chats, prompts) if len(ids) < model.config.max_seq_len][:n]
    if not short:
        return "every question is longer than the context"
    chats, prompts = zip(*short)
    max_new = min(200, model.config.max_seq_len - max(map(len, prompts)))
    with run.autocast(), run.eager():
        tokens, mask, _ = generate(model, prompts, max_new, temperature=0, eot_id=tokenizer.end_ids)
    lines = []
    for chat, ids, real in zip(chats, tokens, mask):
        lines += [f"question:  {chat[-2]['content']}", f"answer:    {tokenizer.decode(ids[real].tolist())}"]
        lines += [f"reference: {chat[-1]['content']}", ""]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    check_lora(config)
    check_shared("batch_size", config.batch_size)


def announce(run: Run, model: Transformer, config: Config, rows: PackedRows, n_held_out: int, steps: int) -> None:
    """Compile the model if that pays, and say what the run will do."""
    tokens_per_step = config.batch_size * config.seq_len
    how = run.maybe_compile(model, steps, tokens_per_step)
    learned = f"{int(rows.loss_mask.sum()):,} tokens to learn"
    run.banner(
        model_size(model, config.seq_len), steps, tokens_per_step, how, starts=config.init_from,
        data=f"{config.data}: {rows.n_documents():,} conversations in {len(rows):,} rows, {learned}"
        + describe_held_out(config, n_held_out),
    )  # fmt: skip


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    config = with_start(config, "pretrain")
    check(config)
    run, model, tokenizer = begin(config, "sft", "python pretrain.py")
    if config.seq_len > model.config.max_seq_len:
        raise UserError(f"seq_len {config.seq_len} is longer than the model's max_seq_len {model.config.max_seq_len}")

    # Conversations, packed into rows of T = seq_len tokens; the mask is 1 on what the assistant says.
    where = config.data_dir, config.seed
    chats = load_chats(config.data, "train", *where, config.n_examples, config.columns)
    most = None if config.eval_data else config.n_examples
    chats_held_out = load_chats(*held_out(config), *where, most, config.columns)
    rows = pack(chats, tokenizer, config.seq_len, config.packing, "training")
    held_out_rows = pack(chats_held_out, tokenizer, config.seq_len, what="validation")
    steps = max(1, math.ceil(config.epochs * len(rows) / config.batch_size))

    start_lora(model, config)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, model, config, rows, held_out_rows.n_documents(), steps)

    for step in run.steps(first, steps):
        batch = processes.my_share(epoch_batch(len(rows), config.batch_size, step, config.seed))
        learned = rows.loss_mask[batch, 1:].sum().to(run.device)
        learned = processes.sum_over_processes(learned).clamp(min=1)  # tokens to learn in the whole batch
        loss = torch.zeros((), device=run.device)
        for part in parts_of(batch, config.micro_batch_size):
            tokens, mask, segments = (x.to(run.device) for x in rows.batch(part))  # (b, T) each
            mask = mask[:, 1:]  # (b, T-1): is token t+1 one to learn?
            with run.autocast():
                logps = token_logps(model, tokens, where=mask, segments=segments)  # (b, T-1): log p(token t+1 | ≤ t)
            # A sum over this part, divided by the count of the whole batch: parts and processes add up to the mean.
            part_loss = sft_loss(logps, mask) * mask.sum() / learned
            run.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)

        loss, tokens_per_step = processes.sum_over_processes(loss), config.batch_size * config.seq_len
        figures = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "share_learned": learned / tokens_per_step}
        run.log(step, tokens_per_step, show=("loss",), **figures)
        last, figures = step + 1 == steps, {}
        if last or (step + 1) % config.eval_every == 0:
            figures = validation(run, model, held_out_rows, config.batch_size)
            run.evaluation(step + 1, **figures)
        if last:
            run.sample(steps, answers(run, model, tokenizer, chats_held_out))
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))

    figures = validation(run, model, held_out_rows, config.batch_size)
    run.close(f"validation loss {figures['val_loss']:.4f}", next_command=next_command(config, run))
    return figures


def next_command(config: Config, run: Run) -> str:
    """GRPO, on questions of the same kind, or on the user's."""
    data = next((name for name in ("arith", "gsm8k") if name in config.data.split("+")), "QUESTIONS.jsonl")
    return f"python grpo.py --task {config.task} --data {data} --init_from {run.folder}"


def sweep(config: Config) -> None:
    """One run for each learning rate; a table and a plot of their validation losses."""
    folder = run_folder(config, "sft")
    folder = folder.with_name(folder.name + "_sweep") if not config.out_dir else folder
    results = []
    for lr in config.sweep:
        one = dataclasses.replace(config, lr=lr, sweep=(), out_dir=str(folder / f"lr_{lr:g}"))
        results.append({"lr": lr, **main(one)})
    if processes.rank() == 0:
        write_sweep(folder, results)


def write_sweep(folder: Path, results: list[dict]) -> None:
    best = min(results, key=lambda row: row["val_loss"])
    lines = ["| learning rate | validation loss | perplexity | token accuracy |", "| --- | --- | --- | --- |"]
    for row in results:
        rate = f"{row['lr']:g}{' (best)' if row is best else ''}"
        lines.append(f"| {rate} | {row['val_loss']:.4f} | {row['perplexity']:.3f} | {row['val_token_accuracy']:.3f} |")
    write_text(folder / "sweep.md", "\n".join(lines) + "\n")
    write_text(folder / "sweep.json", json.dumps(results, indent=2) + "\n")
    plot_sweep(results, folder / "sweep.png")
    print("\n".join(lines) + f"\n{folder / 'sweep.md'}, {folder / 'sweep.png'}")


def train_or_sweep(config: Config) -> None:
    sweep(config) if config.sweep else main(config)


def example() -> None:
    """The loss of one question and its answer, token by token."""
    tokens = ["<user>", "2+3?", "<assistant>", "5", "<eot>"]
    probabilities = torch.tensor([[0.10, 0.20, 0.50, 0.80]])  # of each token after the first, given those before it
    mask = torch.tensor([[0, 0, 1, 1]])
    logps = probabilities.log().requires_grad_()
    print(f"{'token':12} mask     p     log p\n{tokens[0]:12}              (nothing predicts the first one)")
    for t, token in enumerate(tokens[1:]):
        print(f"{token:12} {mask[0, t]:4d}  {probabilities[0, t]:.2f}  {logps[0, t].item():8.4f}")
    loss = sft_loss(logps, mask)
    loss.backward()
    print(f"loss = -(sum of the log p where the mask is 1) / {int(mask.sum())} = {loss.item():.4f}")
    print("its gradient at each log p:      ", " ".join(f"{g + 0.0:7.4f}" for g in logps.grad[0]))
    at_logit = logps.grad * (1 - probabilities)
    print("at each token's own logit, (1-p)·:", " ".join(f"{g + 0.0:7.4f}" for g in at_logit[0]))
    print("the question gets no gradient; the surer the model is of a token, the smaller the push")


if __name__ == "__main__":
    run_stage(train_or_sweep, Config, example)
