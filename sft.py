"""Supervised fine-tuning: from a model of text to a model that answers.

The same loss as in pretraining, with two differences. The text is conversations, in the chat template. And only what
the assistant says is learned, its end-of-text included: the model should answer questions, not ask them. With m = 1
on those tokens::

    L = - Σ m_t log p(token t | tokens < t)  /  Σ m_t            over the whole batch, not averaged row by row

The order of sum and division matters. A mean of row means gives each row the same weight, so that a token in a short
answer counts more than one in a long answer, and the result depends on how rows were distributed over micro-batches
and processes.

Short conversations share a row (packing): a token attends to its own conversation only, positions restart in each.

    python sft.py                                            # the embedded task, after pretrain.py
    python sft.py configs/sft_gsm8k.py --data_dir DIR        # GSM8K, Dolly and Alpaca together
    python sft.py --sweep 3e-4 1e-3 3e-3                     # one run for each learning rate: a table and a plot
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from data import PackedRows, epoch_batch, load_chats, pack
from generate import generate
from lora import TARGETS, LoRARunConfig, check_lora, start_lora
from optim import learning_rate, make_optimizers, update
from runtime import processes
from runtime.checkpoint import need_checkpoint, write_text
from runtime.config import AtLeast, Count, CountOrNone, NotNegative, Positive, check_shared, parse, validate
from runtime.errors import UserError, run_main
from runtime.folder import run_folder
from runtime.plots import plot_sweep
from runtime.run import Run, start
from stages import load_stage
from tokenizer import Tokenizer, encode_chat
from transformer import Transformer, model_size, token_logps


@dataclass(frozen=True)
class Config(LoRARunConfig):
    data: str = "arith"
    """arith, gsm8k, alpaca, dolly, or several joined by +."""
    n_examples: CountOrNone = None
    """Conversations of each source (None: 192 of arith, all of the others)."""
    init_from: str = ""
    """The pretrained model: a run's folder or a checkpoint. Default: out/<task>/pretrain."""
    seq_len: Annotated[int, AtLeast(2)] = 256
    """Tokens of a row."""
    packing: bool = True
    """Several conversations in one row, unable to see each other."""
    curriculum: bool = False
    """Short conversations first, in every epoch; otherwise a new random order in each."""
    batch_size: Count = 2
    """Rows of one step, over all processes."""
    epochs: Positive = 8.0
    """Passes over the data."""
    weight_decay: NotNegative = 0.01
    lora_targets: tuple[str, ...] = (*TARGETS, "head")
    """The linear layers that get adapters. Here the head is one of them: pretraining never showed the tokens of the
    answer's form, their rows of the head are all alike, and frozen they would stay it."""
    sweep: Annotated[tuple[float, ...], AtLeast(0)] = ()
    """Learning rates to try, one run for each, in <out_dir>/lr_<rate>; the table and the plot stand in <out_dir>."""


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
        with run.autocast():
            hidden = model.forward_hidden(tokens, segments=segments)[:, :-1][mask[:, 1:]]  # (n, D)
            logps = model.head(hidden).float().log_softmax(dim=-1)
        targets = tokens[:, 1:][mask[:, 1:]]
        total -= float(logps.gather(1, targets[:, None]).sum(dtype=torch.float64))
        right += float((logps.argmax(dim=-1) == targets).sum())
        count += len(targets)
    loss = total / count
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 50)), "val_token_accuracy": right / count}


def answers(run: Run, model: Transformer, tokenizer: Tokenizer, chats: list, n: int = 3) -> str:
    """The model's own answers to the first questions of ``chats``, beside the reference."""
    asked = [(chat, encode_chat(tokenizer, chat[:-1], add_generation_prompt=True)[0]) for chat in chats]
    asked = [(chat, ids) for chat, ids in asked if len(ids) < model.config.max_seq_len][:n]
    if not asked:
        return "every question is longer than the context"
    chats, prompts = zip(*asked)
    new = min(200, model.config.max_seq_len - max(map(len, prompts)))
    with run.autocast():
        tokens, mask, _ = generate(model, prompts, new, temperature=0, eot_id=tokenizer.eot_id)
    lines = []
    for chat, ids, real in zip(chats, tokens, mask):
        lines += [f"question:  {chat[-2]['content']}", f"answer:    {tokenizer.decode(ids[real].tolist())}"]
        lines += [f"reference: {chat[-1]['content']}", ""]
    return "\n".join(lines)


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    check_lora(config)
    check_shared("batch_size", config.batch_size)


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    config = dataclasses.replace(config, init_from=os.path.normpath(config.init_from or f"out/{config.task}/pretrain"))
    check(config)
    need_checkpoint(config.init_from, "python pretrain.py")
    run = start(config, "sft")
    model, tokenizer, state = load_stage(config.init_from, device=run.device)
    if config.seq_len > model.config.max_seq_len:
        raise UserError(f"seq_len {config.seq_len} is longer than the model's max_seq_len {model.config.max_seq_len}")
    run.record_parent(state, config.init_from)

    # Data: conversations in rows of seq_len tokens.
    chats = load_chats(config.data, "train", config.data_dir, config.seed, config.n_examples)
    held = load_chats(config.data, "validation", config.data_dir, config.seed, config.n_examples)
    rows = pack(chats, tokenizer, config.seq_len, config.packing, config.curriculum)
    held_rows = pack(held, tokenizer, config.seq_len)
    steps = max(1, math.ceil(config.epochs * len(rows) / config.batch_size))

    start_lora(model, config)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay)
    first = run.resume(model, optimizers)
    if not run.finished:
        tokens_per_step = config.batch_size * config.seq_len
        work = 6 * sum(p.numel() for p in model.parameters()) * tokens_per_step
        how = run.maybe_compile(model, steps, step_seconds=work / (1e11 if run.device.type == "cpu" else 1e14))
        counted = int(rows.loss_mask.sum())
        run.banner(
            model_size(model, config.seq_len), steps, tokens_per_step, how,
            data=f"{config.data}: {len(chats):,} conversations in {len(rows):,} rows, {counted:,} tokens to learn",
            starts=config.init_from,
        )  # fmt: skip

    def evaluate() -> dict:
        with run.eager():
            return validation(run, model, held_rows, config.batch_size)

    for step in run.steps(first, steps):
        chosen = epoch_batch(len(rows), config.batch_size, step, config.seed, shuffle=not config.curriculum)
        tokens, mask, segments = (processes.my_share(x).to(run.device) for x in rows.batch(chosen))  # (B, T) each
        count = mask[:, 1:].sum()
        whole_count = processes.sum_over_processes(count).clamp(min=1)  # of the whole batch
        loss = torch.zeros((), device=run.device)
        size = config.micro_batch_size or len(tokens)
        for tok, m, seg in zip(tokens.split(size), mask.split(size), segments.split(size)):
            with run.autocast():
                logps = token_logps(model, tok, where=m[:, 1:], segments=seg)  # (b, T-1)
            part = sft_loss(logps, m[:, 1:]) * m[:, 1:].sum() / whole_count  # this part's share of the whole mean
            run.scaler.scale(part).backward()
            loss += part.detach()
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        norm = update(run, model, optimizers, lr, config.clip)
        loss = processes.sum_over_processes(loss)
        run.log(
            step, tokens=config.batch_size * config.seq_len, show=("loss",), loss=loss, grad_norm=norm, lr=lr,
            share_learned=whole_count / (config.batch_size * config.seq_len),
        )  # fmt: skip

        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            figures = evaluate()
            run.evaluation(step + 1, **figures)
        if step + 1 == steps:
            with run.eager():
                run.sample(steps, answers(run, model, tokenizer, held))
        if figures or run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))
    figures = evaluate()
    data = next((name for name in ("arith", "gsm8k") if name in config.data.split("+")), "")
    hint = f"python grpo.py --task {config.task} --data {data} --init_from {run.folder}" if data else ""
    run.close(f"validation loss {figures['val_loss']:.4f}", next_command=hint)
    return figures


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


if __name__ == "__main__":
    run_main(lambda: train_or_sweep(parse(Config)))
