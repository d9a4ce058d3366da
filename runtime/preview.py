"""What a run would do, printed instead of done: ``--print_config`` of a stage (see runtime/rehearsal.py).

The size of the model and the memory are counted, on a model without memory (PyTorch's "meta" device). The time is an
estimate of the training passes alone, from their floating-point operations and a matrix product that is timed now.
"""

import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from runtime import processes
from runtime.checkpoint import find_checkpoint, load_checkpoint
from runtime.device import PRECISIONS, pick_device, pick_precision, synchronize
from runtime.errors import UserError
from runtime.fields import table
from runtime.folder import check_same_run, run_folder
from runtime.rehearsal import Rehearsal
from runtime.rows import is_file, sources

PAIRS = ("dpo", "ipo", "simpo", "orpo", "reward")  # the stages of whose batches each item is two rows
BODIES = ("encoder", "reward")  # those that train a body without its words
HEADS = {"encoder": "classifier's", "mlm": "filling-in", "reward": "score's", "ppo": "critic's"}


def chapter(name: str):
    """A chapter that the running stage has imported: the plumbing itself imports none."""
    return sys.modules[name]


def show(rehearsal: Rehearsal, config, stage: str) -> None:
    """Print what the run would do, in one process. config: as the stage has filled it in."""
    if processes.launched()[0]:
        return
    check_files(config)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    shape = shape_of_model(config)
    for name in ("seq_len", "max_length") if shape is not None and not getattr(config, "encoder", "") else ():
        if getattr(config, name, 0) > shape.max_seq_len:
            raise UserError(f"{name} {getattr(config, name)} is more than the context of {shape.max_seq_len}")
    facts = {"folder": folder_of(config, stage)} | starts_of(rehearsal)
    facts["device"] = f"{device}, {precision}"
    if shape is None:
        facts["model"] = "its size, the memory and the time are known once the checkpoint is there"
    else:
        model, work = make_model(shape, config), work_of(config, stage, shape)
        facts |= {"model": describe_model(model, stage), "work": describe_work(config, work)}
        facts |= {"memory": describe_memory(memory_of(model, config, stage, work, precision), config)}
        facts |= {"time": describe_time(model, config, stage, work, device, precision)}
    print(table(*filled_in(rehearsal, config)))
    print(stage + (", the first run of --sweep" if getattr(rehearsal.config, "sweep", ()) else ""))
    for name, value in facts.items():
        for line in value.splitlines():
            print(textwrap.fill(line, 120, initial_indent=f"  {name:10} ", subsequent_indent=13 * " "))
            name = ""


def check_files(config) -> None:
    """A file that is named and not there would be found only when it is read."""
    for name in ("data", "eval_data"):
        for source in sources(getattr(config, name, "") or ""):
            if is_file(source) and not Path(source).is_file():
                raise UserError(f"--{name}: there is no file {source}")


def filled_in(rehearsal: Rehearsal, config) -> tuple:
    """(the configuration, where its values come from), with what the stage has put where nothing was said."""
    before, after = asdict(rehearsal.config), asdict(config)
    filled = {name: after[name] for name, value in before.items() if value in (None, "") and value != after[name]}
    return replace(rehearsal.config, **filled), rehearsal.origins | dict.fromkeys(filled, "default, filled in")


# ----------------------------------------------------------------------------------------------------------------------
# The folder and the start


def folder_of(config, stage: str) -> str:
    """The run's folder, and what the run would find there."""
    folder = run_folder(config, stage)
    if config.fresh and folder.exists():
        return f"{folder}: what is there would be moved aside"
    if not (folder / "ckpt.pt").exists():
        return f"{folder}: no run yet"
    try:
        state = load_checkpoint(folder, mmap=True)
        check_same_run(folder, state, config, stage)
    except UserError as error:
        return f"refused: {error}"
    if state.get("finished"):
        return f"{folder}: finished ({state['step']} steps); --fresh would start again"
    return f"{folder}: would be continued at step {state['step']}"


def starts_of(rehearsal: Rehearsal) -> dict[str, str]:
    """The checkpoints that the run needs, and whether they are there."""
    told = []
    for path, command in rehearsal.starts.items():
        if not find_checkpoint(path).exists():
            told.append(f"{path}: not there" + (f"; make it with: {command}" if command else ""))
            continue
        try:
            state = chapter("stages").read_state(path)
            told.append(f"{path}: there, {state['stage']} after {state['step']} steps")
        except UserError as error:
            told.append(f"refused: {error}")
    return {"starts": "\n".join(told)} if told else {}


# ----------------------------------------------------------------------------------------------------------------------
# The model


def shape_of_model(config):
    """The ``ModelConfig`` that the run would have; None if it is that of a checkpoint that cannot be read."""
    stage = sys.modules[type(config).__module__]
    start = getattr(config, "encoder", "") or getattr(config, "init_from", "")
    if start or not hasattr(stage, "model_config"):
        return shape_in(start)
    if path := getattr(config, "tokenizer_from", ""):
        theirs = shape_in(path)
        return None if theirs is None else stage.model_config(config, theirs.vocab_size)
    known = {"bytes": chapter("tokenizer").ByteTokenizer().vocab_size, "r50k": 50304}
    return stage.model_config(config, known.get(config.tokenizer, config.vocab_size))


def shape_in(path: str):
    """The ``ModelConfig`` in a checkpoint; None if it cannot be read, which ``starts_of`` says."""
    try:
        return chapter("stages").shape_of(path)
    except UserError:
        return None


def make_model(shape, config):
    """The model without its memory, with the adapters that the configuration asks for."""
    with torch.device("meta"):
        model = chapter("transformer").Transformer(shape)
    if getattr(config, "lora_rank", 0):
        lora = chapter("lora")
        lora.start_lora(model, replace(config, dora=False))
        for layer in lora.lora_layers(model).values() if config.dora else ():  # its lengths cannot be taken here
            layer.magnitude = torch.nn.Parameter(layer.B.new_empty(len(layer.B)))
    return model


def describe_model(model, stage: str) -> str:
    size = chapter("transformer").model_size(model, model.config.max_seq_len)
    text = f"{size.parameters:,} parameters"
    text += f", {size.active:,} of them for one token" if size.active < size.parameters else ""
    text += f", {size.trained:,} of them trained" if size.trained < size.parameters else ""
    c = model.config
    text += f" (width {c.d_model}, {c.n_layers} blocks, vocabulary {c.vocab_size:,}, context {c.max_seq_len:,})"
    return text + (f", without the {HEADS[stage]} head" if stage in HEADS else "")


# ----------------------------------------------------------------------------------------------------------------------
# The work


@dataclass(frozen=True)
class Work:
    """What one process does in a step."""

    rows: int
    at_once: int  # of them, those whose activations are kept together
    tokens: int  # of a row
    passes: int  # over the same rows
    exact: bool  # is every row that long?


def work_of(config, stage: str, shape) -> Work:
    """How many rows of how many tokens a step trains on; of answers, a prompt is taken to be as long as its answer."""
    world = processes.launched()[1]
    if hasattr(config, "prompts_per_step"):
        rows = config.prompts_per_step * getattr(config, "group_size", 1) // world
        at_once = min(config.micro_batch_size, math.ceil(rows / config.minibatches))
        return Work(rows, at_once, min(2 * config.max_new_tokens, shape.max_seq_len), config.epochs, exact=False)
    each, rows = 2 if stage in PAIRS else 1, config.batch_size // world
    at_once = min(config.micro_batch_size or rows, rows)
    for name, exact in {"seq_len": True, "max_length": False}.items():
        if hasattr(config, name):
            return Work(each * rows, each * at_once, getattr(config, name), 1, exact)
    return Work(rows, at_once, config.max_seq_len or shape.max_seq_len, 1, exact=False)


def describe_work(config, work: Work) -> str:
    counted = hasattr(config, "steps")
    text = f"{config.steps:,} steps" if counted else "steps"
    text += f" of {work.rows:,} rows of {'' if work.exact else 'up to '}{work.tokens:,} tokens"
    text += f", each {work.passes} times" if work.passes > 1 else ""
    if hasattr(config, "prompts_per_step"):
        return text + " (a prompt is taken to be as long as an answer may be)"
    return text if counted else text + "; how many is known when the data is loaded"


# ----------------------------------------------------------------------------------------------------------------------
# The memory


def memory_of(model, config, stage: str, work: Work, precision: str) -> dict[str, float]:
    """Bytes of a training step, by what they are for."""
    estimate = chapter("transformer").estimate_memory
    parts = estimate(model.config, work.at_once, work.tokens, 4 if precision == "fp32" else 2)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = getattr(config, "optimizer", "adamw") == "muon"  # one moment of the matrices inside the blocks, not two
    moments = {name: 1 if muon and p.dim() == 2 and "blocks." in name else 2 for name, p in trained}
    parts["weights"] = 4.0 * sum(p.numel() for p in model.parameters())
    parts["gradients"] = 4.0 * sum(p.numel() for _, p in trained)
    parts["optimizer"] = 4.0 * sum(moments[name] * p.numel() for name, p in trained)
    if stage in BODIES:
        parts["logits"] = 0.0
    if config.activation_checkpointing:  # the stream before each block, and one block whole
        blocks, tokens = model.config.n_layers, work.at_once * work.tokens
        parts["activations"] = parts["activations"] / blocks + 4.0 * tokens * model.config.d_model * blocks
    if hasattr(config, "prompts_per_step") and config.beta and not getattr(config, "lora_rank", 0):
        thin = chapter("transformer").thin_weights(model, PRECISIONS[precision])
        parts["reference"] = parts["weights"] - sum((4.0 - w.element_size()) * w.numel() for w in thin.values())
    parts["total"] = sum(value for name, value in parts.items() if name != "total")
    return parts


def describe_memory(parts: dict[str, float], config) -> str:
    listed = ", ".join(f"{name} {size_of(value)}" for name, value in parts.items() if value and name != "total")
    missing = "the caches of sampling, the evaluations" if hasattr(config, "prompts_per_step") else "the evaluations"
    return f"about {size_of(parts['total'])} for a training step: {listed}; not in it are {missing} and PyTorch itself"


def size_of(n: float) -> str:
    """
    >>> size_of(3_600_000), size_of(12e9)
    ('3.6 MB', '12 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:.2g} {name}" if n < 100 * unit else f"{n / unit:.0f} {name}"
    return f"{n / 1e3:.2g} kB" if n < 1e5 else f"{n / 1e3:.0f} kB"


# ----------------------------------------------------------------------------------------------------------------------
# The time


def operations_of(model, config, stage: str, work: Work) -> float:
    """Floating-point operations of a step's training passes."""
    words = 0.0 if stage in BODIES else config.hide if stage == "mlm" else 1.0
    per_token = chapter("transformer").model_size(model, work.tokens, words).flops_per_token
    recomputed = 4 / 3 if config.activation_checkpointing else 1.0
    return per_token * recomputed * work.rows * work.tokens * work.passes


def measured_rate(device: torch.device, precision: str, rows: int, d_model: int, d_ff: int, most: float = 0.3) -> float:
    """Floating-point operations in a second of a matrix product as a model of this width has them, timed now, for
    ``most`` seconds."""
    dtype = PRECISIONS[precision]
    x, w = torch.ones(rows, d_model, device=device, dtype=dtype), torch.ones(d_model, d_ff, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + most
    while time.perf_counter() < end:
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(8):
            x @ w
        synchronize(device)
        best = min(best, (time.perf_counter() - begun) / 8)
    return 2.0 * rows * d_model * d_ff / best


def describe_time(model, config, stage: str, work: Work, device: torch.device, precision: str) -> str:
    c, rows = model.config, min(work.at_once * work.tokens, 8192)
    rate = measured_rate(device, precision, rows, c.d_model, c.d_ff)
    step = operations_of(model, config, stage, work) / rate
    whole = f", {duration(step * config.steps)} in all" if hasattr(config, "steps") else ""
    others = "sampling" if hasattr(config, "prompts_per_step") else "the data"
    return (
        f"at least {duration(step)} a step{whole}: an estimate of the training passes alone, without {others} and the "
        f"evaluations, at {rate / 1e9:,.0f} GFLOP/s, which a product of matrices of this width reached just now"
    )


def duration(seconds: float) -> str:
    """
    >>> duration(0.0123), duration(0.35), duration(45), duration(600), duration(7300), duration(1e7)
    ('12 ms', '350 ms', '45 s', '10.0 min', '2.0 h', '116 days')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds > 0.01 else f"{1000 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds > 10 else f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
