"""Looking into a language model: its loss at each position, its gradient in each layer.

The validation loss is a mean over everything. Two of its parts answer what the mean hides::

    L(t)  =  mean over windows of  - log p(token t+1 | tokens 1 ... t)
    g(l)  =  √( Σ over the weights w of block l  (∂L/∂w)² )

L(t) should fall while more context helps; past the length of training it need not. g(l) says what pulls at each layer,
and whether it fades or grows on its way down.

``measure`` looks so at a finished run of pretrain.py; the studies of ``ablate.py`` compare models by it::

    python studies/probe.py                         # two small models, with learned and with rotary positions
    python studies/probe.py out/arith/pretrain      # a run of yours
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

from data import TokenFile
from optim import make_optimizers
from runtime.checkpoint import load_checkpoint, need_checkpoint
from runtime.errors import UserError, run_main
from runtime.plots import read_metrics
from stages import load_stage
from transformer import ModelConfig, Transformer, active_parameters, count_parameters, token_logps

COLUMNS = {  # figures of the end of a run, with their names in words; any metric that pretrain.py logs may stand here
    "val_loss": "validation loss", "bits_per_byte": "bits per byte", "loss": "training loss",
    "grad_norm": "gradient norm", "parameters": "parameters", "seconds": "processor seconds",
    "active": "parameters of a token", "busiest": "busiest expert (fair: 1)", "idlest": "idlest expert (fair: 1)",
    "near": "loss, second half of the trained length", "beyond": "loss past the trained length",
}  # fmt: skip
CURVES = (  # metrics that pretrain.py logs, against steps (NAME@tokens, NAME@seconds), and what is found here
    "val_loss", "bits_per_byte", "loss", "grad_norm", "busiest", "loss@position", "start_gradient@layer",
    "end_gradient@layer",
)  # fmt: skip


def validation_windows(file: TokenFile, n: int, length: int) -> Tensor:
    """(n, length): windows spread evenly over the validation split."""
    last = len(file.splits["validation"]) - length
    return file.windows("validation", torch.linspace(0, last, n, dtype=torch.float64).long().tolist(), length)


@torch.no_grad()
def loss_by_position(model: Transformer, windows: Tensor) -> Tensor:
    """(N, T+1) tokens -> (T,): the mean loss, in nats, of the token that follows t others, t = 1 to T."""
    return -torch.cat([token_logps(model, some) for some in windows.split(32)]).double().mean(dim=0)


def gradient_norms(model: Transformer, tokens: Tensor) -> list[float]:
    """The length of the gradient of the mean loss in each block, first to last. tokens (B, T+1)."""
    model.zero_grad()
    (-token_logps(model, tokens).mean()).backward()
    gradients = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.blocks]  # idle experts
    squares = [sum(float(gradient.double().square().sum()) for gradient in block) for block in gradients]
    model.zero_grad()
    return [math.sqrt(square) for square in squares]


def step_seconds(model: Transformer, settings: dict, tokens: Tensor, n: int = 21) -> float:
    """The time of a step of pretrain.py on ``tokens`` (B, T+1): the median of n, at a learning rate of 0, eager and in
    one piece, without recomputed blocks and without the terms that balance experts.

    In seconds of the processor, not of the clock: what other processes take away does not count, so that runs on a
    busy machine can be compared. That still depends on the machine: only a ratio of two such figures means something.
    """
    optimizers = make_optimizers(model, 0.0, settings["weight_decay"], settings["beta2"], settings["optimizer"])
    taken = []
    for _ in range(n):
        begun = time.process_time()
        (-token_logps(model, tokens).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def measure(folder: str) -> tuple[dict, dict]:
    """The figures of a finished pretraining run, and its curves as (x, values), on the run's own validation split.

    Figures: the last value of each logged metric (None if it was no number); parameters; seconds: of all steps
    together, see ``step_seconds``; near and beyond: the loss in the second half of the trained length, and past it,
    up to four times as far if ``max_seq_len`` allows (None if not).

    Curves: NAME, NAME@tokens and NAME@seconds of each logged metric; loss@position in eighths of the trained length;
    start_gradient@layer and end_gradient@layer: of one fixed batch, with the first and with the last weights.
    """
    model, _, state = load_stage(folder)
    settings, logged = state["config"], read_metrics(Path(folder) / "metrics.jsonl")
    steps, seq_len = settings["steps"], settings["seq_len"]
    file = TokenFile(Path(folder) / "tokens.bin")
    longest = min(4 * seq_len, model.config.max_seq_len - 1, len(file.splits["validation"]) - 1)
    by_position = loss_by_position(model, validation_windows(file, 512, longest + 1))  # (longest,)
    batch = validation_windows(file, settings["batch_size"], seq_len + 1)
    file.close()
    at_end, seconds = gradient_norms(model, batch), step_seconds(model, settings, batch)
    torch.manual_seed(settings["seed"])
    at_start = gradient_norms(Transformer(model.config), batch)  # the weights that pretrain.py began with

    tokens = settings["batch_size"] * seq_len  # of a step
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    last = {name: value for line in lines for name, value in json.loads(line).items() if name in COLUMNS}
    row = {name: value if value is not None and math.isfinite(value) else None for name, value in last.items()}
    row |= {"parameters": count_parameters(model), "active": active_parameters(model)}
    row |= {"seconds": steps * seconds, "trained_length": seq_len}
    row["near"] = float(by_position[seq_len // 2 : seq_len].mean())
    row["beyond"] = float(by_position[seq_len:].mean()) if longest > seq_len else None

    curves = dict(logged)
    for name, (at, values) in logged.items():
        curves[f"{name}@tokens"] = [step * tokens for step in at], values
        curves[f"{name}@seconds"] = [round(step * seconds, 3) for step in at], values
    curves["loss@position"] = in_spans(by_position, max(1, seq_len // 8))
    layers = list(range(1, len(model.blocks) + 1))
    return row, curves | {"start_gradient@layer": (layers, at_start), "end_gradient@layer": (layers, at_end)}


def in_spans(losses: Tensor, width: int) -> tuple[list[float], list[float]]:
    """The middle of each ``width`` positions, counted from 1, and the mean loss there.

    >>> in_spans(torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0]), 2)
    ([1.5, 3.5, 5.0], [2.0, 3.0, 5.0])
    """
    spans = torch.arange(1, len(losses) + 1, dtype=torch.float64).split(width), losses.split(width)
    return tuple([float(span.mean()) for span in some] for some in spans)


def look(folder: str) -> None:
    """Print what ``measure`` finds in a finished run of pretrain.py. UserError: the folder holds no such run."""
    need_checkpoint(folder, "python pretrain.py")
    stage = load_checkpoint(folder, mmap=True)["stage"]
    if stage != "pretrain" or not Path(folder, "tokens.bin").exists():
        why = f"it is a {stage} run" if stage != "pretrain" else "tokens.bin is missing"
        raise UserError(f"{folder} holds no run of pretrain.py whose text can be looked at: {why}")
    row, curves = measure(folder)
    known = f", validation loss {row['val_loss']:.3f} nats" if row.get("val_loss") is not None else ""
    print(f"{folder}: {row['parameters']:,} parameters{known}")
    show("position", *curves["loss@position"], "loss", digits=1)
    show("layer", *curves["start_gradient@layer"], "gradient before training", digits=0)
    show("layer", *curves["end_gradient@layer"], "gradient after training", digits=0)


def show(x: str, xs: list, ys: list, y: str, digits: int, columns: int = 8) -> None:
    """Two rows of numbers, broken into lines of so many columns."""
    for first in range(0, len(xs), columns):
        some = slice(first, first + columns)
        print(f"\n  {x:26}" + "".join(f"{value:8.{digits}f}" for value in xs[some]))
        print(f"  {y:26}" + "".join(f"{value:8.3f}" for value in ys[some]))


def example() -> None:
    """Two small models, one with learned and one with rotary positions, past the trained length."""
    print("each row repeats three letters; trained on 16 tokens, measured on 32; loss in nats, 26 letters\n")
    rows = lambda n, seed: torch.randint(26, (n, 3), generator=torch.Generator().manual_seed(seed)).repeat(1, 11)  # noqa: E731
    torch.set_num_threads(1)
    for positions in ("learned", "rope"):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(26, 32, n_layers=2, n_heads=2, max_seq_len=33, positions=positions))
        before = gradient_norms(model, rows(64, -1)[:, :17])
        (optimizer,) = make_optimizers(model, 1e-2)
        for step in range(150):
            (-token_logps(model, rows(32, step)[:, :17]).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        where, losses = in_spans(loss_by_position(model, rows(256, -2)[:, :33]), 4)
        after = gradient_norms(model, rows(64, -1)[:, :17])
        print(f"{positions} positions")
        print("  position         " + "".join(f"{x:7.1f}" for x in where))
        print("  loss             " + "".join(f"{x:7.3f}" for x in losses))
        print("  gradient by layer" + "".join(f"{x:7.3f}" for x in before) + "  before training")
        print("                   " + "".join(f"{x:7.3f}" for x in after) + "  after")


def main() -> None:
    """The example; or the runs that the command line names."""
    if not sys.argv[1:]:
        return example()
    for folder in sys.argv[1:]:
        if folder.startswith("-"):
            raise UserError(f"{folder}: probe.py takes folders of pretrain.py and no options")
        look(folder)


if __name__ == "__main__":
    run_main(main)
