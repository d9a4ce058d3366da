"""What a stage leaves behind, loaded again: its model, its tokenizer, and everything else in its checkpoint.

A checkpoint holds the shape of its model and its tokenizer beside the weights, so a folder or a file is all that the
next stage, ``evaluate.py`` or ``chat.py`` need::

    model, tokenizer, state = load_stage("out/arith/sft")
    print(state["stage"], state["step"], [before["stage"] for before in state["lineage"]])

An ``adapters.pt`` (lora.py) is loaded like any other, as the merged model that it makes of its base.

Run ``python stages.py`` to see what a checkpoint holds.
"""

import dataclasses
import math
import os
import sys
import tempfile
import typing
from pathlib import Path

import torch

from layers import ModelConfig
from lora import load_state
from runtime.checkpoint import (
    ADAPTERS,
    check_checkpoint,
    find_checkpoint,
    load_weights,
    need_checkpoint,
    read_archive,
    save_checkpoint,
)
from runtime.errors import UserError
from runtime.run import Run, start
from tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from transformer import Transformer


def load_stage(
    path: str, command: str = "", device="cpu", scores: bool = False, encoders: bool = False
) -> tuple[Transformer, Tokenizer, dict]:
    """(model, tokenizer, state) of a finished or unfinished stage; if it is missing, ``command`` is what makes it.

    Of a policy with a value head, the policy. A reward model has a body but no words: only with ``scores``; an encoder
    cannot write: only with ``encoders``.
    """
    need_checkpoint(path, command)
    state = load_state(path)
    model = Transformer(shape_in(state, path))
    if state["stage"] == "reward" and not scores:
        raise UserError(f"{path} holds a reward model: it scores answers and writes none")
    if not model.config.causal and not encoders and not scores:
        raise UserError(f"{path} holds an encoder: it reads texts and writes none")
    weights = {k.removeprefix("backbone."): v for k, v in state["model"].items() if k.startswith("backbone.")}
    load_weights(model, weights or state["model"], path)
    tokenizer = load_tokenizer(state["tokenizer"])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{path} is damaged: its tokenizer has more tokens than its model")
    return model.to(device), tokenizer, state


EMBEDDED = ("arith", "own")  # the data that needs no file


def begin(config, stage: str, command: str) -> tuple[Run, Transformer, Tokenizer]:
    """Open the run of a stage that starts from another stage's model: (run, model on the run's device, tokenizer).

    config.init_from names that model, see ``with_start``; if it is missing, ``command`` is what makes it.
    """
    need_checkpoint(config.init_from, command)
    run = start(config, stage)
    model, tokenizer, state = load_stage(config.init_from, device=run.device)
    run.record_parent(state, config.init_from)
    run.tokenizer = tokenizer
    theirs = state["config"].get("data", "arith")
    if config.data in EMBEDDED and theirs not in EMBEDDED:
        run.print(f"WARNING: {config.init_from} learned from {theirs}; this is the embedded task (--data names yours)")
    return run, model, tokenizer


def context_length(path: str, command: str) -> int:
    """The most tokens that the model of a stage can read; if it is missing, ``command`` is what makes it."""
    there = need_checkpoint(path, command)
    return shape_of(path).max_seq_len if there else sys.maxsize  # it is missed only by --print_config, which goes on


def shape_of(path: str) -> ModelConfig:
    """The shape of a stage's model, without reading its weights."""
    return shape_in(read_state(path), path)


def shape_in(state: dict, path: str) -> ModelConfig:
    """The shape of the model in a checkpoint. UserError: this version knows no such model, or it would be larger than
    the weights that are there.
    """
    try:
        shape = ModelConfig(**state["model_config"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} describes a model this version does not know: {error}") from None
    weights = state["model"].values()
    largest = max([len(weights), *(size for weight in weights for size in weight.shape)])
    limits = {"window": 2**24, "sinks": 2**24}  # which no weight is as large as
    limits |= {"max_seq_len": 2**24} if shape.positions != "learned" else {}
    limits |= {"d_ff": largest * (shape.n_experts + shape.n_shared_experts)} if shape.n_experts else {}  # shared out
    if isinstance(shape.head_dim, int) and isinstance(shape.n_heads, int) and shape.n_heads * shape.head_dim > largest:
        raise UserError(f"{path} is damaged: its model has heads that do not fit its weights")
    for name, kind in typing.get_type_hints(ModelConfig).items():
        value = getattr(shape, name)
        limit = limits.get(name, largest)
        fits = isinstance(value, {float: int | float, tuple[int, ...] | None: tuple | None}.get(kind, kind))
        fits = fits and (kind is not float or 0 < value < math.inf)
        if not fits or (isinstance(value, int) and not 0 <= value <= limit):
            raise UserError(
                f"{path} is damaged: its model has {name} {str(value)[:40]}, which does not fit its weights"
            )
    return shape


def read_state(path: str) -> dict:
    """A stage's checkpoint, whose tensors are read when they are used; adapters are put together with their base."""
    state = read_archive(find_checkpoint(path), mmap=True)
    return load_state(path) if state.get("magic") == ADAPTERS else check_checkpoint(state, path)


def with_start(config, stage: str):
    """The configuration with ``init_from`` filled in: by default the folder of that earlier stage of the same task."""
    return dataclasses.replace(config, init_from=os.path.normpath(config.init_from or f"out/{config.task}/{stage}"))


if __name__ == "__main__":
    torch.manual_seed(0)
    demo, shape = ByteTokenizer(), ModelConfig(vocab_size=ByteTokenizer().vocab_size, d_model=32, n_layers=1, n_heads=2)
    state = {
        "model": Transformer(shape).state_dict(), "model_config": vars(shape), "tokenizer": demo.state(),
        "stage": "pretrain", "config": {"seed": 0}, "step": 100, "lineage": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), state)
        model, tokenizer, loaded = load_stage(folder)
    for name, value in loaded.items():
        if name == "model":
            print(f"{name:13} {len(value)} tensors, {sum(p.numel() for p in model.parameters()):,} parameters")
        else:
            print(f"{name:13} {str(value)[:90]}")
    print(f"{type(model).__name__} and {type(tokenizer).__name__}: from the file alone")
