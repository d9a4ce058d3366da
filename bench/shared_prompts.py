"""Prompts that are read once for several answers: time and memory of an update, against a row for each answer.

Forward and backward pass of the answers' log-probabilities, in micro-batches of 32 answers, float32. Three shapes: the
embedded task's groups of four; groups of sixteen long answers, as in GSM8K; pairs, as DPO has them. The two ways take
turns; a figure is the median of the ratios of neighbours, above 1 means that shared prompts are faster. Peak memory is
how far a process of its own grew beyond what it was with model and data.

    python bench/shared_prompts.py
    python bench/shared_prompts.py --quick     # few repeats
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from logps_memory import peak  # noqa: E402

import pretrain  # noqa: E402
from rollout import micro_batches  # noqa: E402
from runtime.device import keep_freed_memory  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters, shared_logps, token_logps  # noqa: E402

EMBEDDED = pretrain.model_config(pretrain.Config(), 512)
LARGER = ModelConfig(4096, 256, 4, 8, max_seq_len=512)
SHAPES = {  # name: model, prompts, answers to each, tokens of a prompt, of an answer
    "the embedded task": (EMBEDDED, 64, 4, 36, 25),
    "groups of sixteen": (LARGER, 4, 16, 100, 150),
    "pairs": (LARGER, 16, 2, 100, 100),
}
WAYS = {
    "rows": lambda model, tokens, where: token_logps(model, tokens, where=where),
    "shared": shared_logps,
}


def data(prompts: int, group: int, prompt: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of rows [prompt | answer | padding] whose lengths vary by a fifth."""
    torch.manual_seed(0)
    spread = lambda n: int(n * (0.8 + 0.4 * torch.rand(())))  # noqa: E731
    width = int(1.2 * (prompt + answer)) + 2
    tokens, mask = torch.randint(1, 500, (prompts * group, width)), torch.zeros(prompts * group, width - 1).bool()
    for first in range(0, len(tokens), group):
        length = spread(prompt)
        tokens[first : first + group, :length] = tokens[first, :length]
        for i in range(first, first + group):
            mask[i, length - 1 : length - 1 + spread(answer)] = True
    return tokens, mask


def update(name: str, way: str):
    """A function that runs one update of a shape in that way."""
    shape, prompts, group, *lengths = SHAPES[name]
    model, (tokens, mask) = Transformer(shape), data(prompts, group, *lengths)
    parts = micro_batches(mask, torch.arange(len(tokens)), 32, group if way == "shared" else 1)

    def run(n: int | None = None):
        for rows, width in parts[:n]:
            WAYS[way](model, tokens[rows, : width + 1], mask[rows, :width]).sum().backward()
        model.zero_grad()

    return run


def growth(name: str, way: str) -> float:
    run = update(name, way)
    one = torch.randint(1, 500, (1, 8))
    token_logps(Transformer(SHAPES[name][0]), one).sum().backward()  # what the first backward pass brings in
    before = peak()
    run()
    return peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, help="measure one shape and way in this process and print its number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(growth(*options.memory))
        sys.exit()
    memory = {  # first, since a process inherits the peak of the one that starts it
        (name, way): float(subprocess.check_output([sys.executable, __file__, "--memory", name, way]))
        for name in SHAPES
        for way in WAYS
    }
    keep_freed_memory()
    print("| | parameters | answers, prompt + answer | rows / shared, time | rows, MB | shared, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (shape, prompts, group, prompt, answer) in SHAPES.items():
        runs, seconds = {way: update(name, way) for way in WAYS}, {way: [] for way in WAYS}
        for repeat in range(4 if options.quick else 16):
            for way in list(runs)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                runs[way]()
                seconds[way].append(time.perf_counter() - start)
        faster = statistics.median(a / b for a, b in zip(seconds["rows"][1:], seconds["shared"][1:]))
        size, peaks = count_parameters(Transformer(shape)) / 1e6, [f"{memory[name, way]:,.0f}" for way in WAYS]
        lengths = f"{prompts} × {group}, {prompt} + {answer}"
        print(f"| {name} | {size:.1f} M | {lengths} | {faster:.2f} | {' | '.join(peaks)} |")
