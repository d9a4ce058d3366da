"""Peak memory of log-probabilities, forward and backward: ``token_logps`` against all the logits at once.

The naive way holds the logits of every position in float32, takes their log-softmax and gathers the entry of each
token. Each way runs in a process of its own; the figure is how far the peak resident memory grew beyond what it was
before the call, with the model, the tokens and one warm-up call on a few tokens already there.

    python bench/logps_memory.py             # 8 × 1,024 tokens, 50,304 words
    python bench/logps_memory.py --quick     # 2 × 1,024 tokens
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformer import ModelConfig, Transformer, token_logps  # noqa: E402


def naive_logps(model, tokens):
    logps = model(tokens)[:, :-1].float().log_softmax(dim=-1)
    return logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)


WAYS = {"naive": naive_logps, "token_logps": token_logps}


def peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def growth(way: str, rows: int) -> float:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50304, d_model=64, n_layers=1, n_heads=2, max_seq_len=1024))
    tokens = torch.randint(50304, (rows, 1024))
    WAYS[way](model, tokens[:1, :8]).mean().backward()
    before = peak()
    WAYS[way](model, tokens).mean().backward()
    return peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and print its number")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = 2 if options.quick else 8
    if options.way:
        print(growth(options.way, rows))
    else:
        found = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--threads", str(options.threads)]
            command += ["--quick"] if options.quick else []
            runs = [float(subprocess.check_output(command)) for _ in range(options.repeats)]
            found[way] = sorted(runs)[len(runs) // 2]
        print(f"{rows} × 1024 tokens, 50,304 words, {options.repeats} repeats, {options.threads} threads, ", end="")
        print(f"torch {torch.__version__}\n")
        print("| | peak growth, MB | of naive |\n| --- | --- | --- |")
        for way, megabytes in found.items():
            print(f"| {way} | {megabytes:,.0f} | {megabytes / found['naive']:.2f} |")
