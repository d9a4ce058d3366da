"""What it costs to look twice: saving and reading a checkpoint, with and without its checks, at 400 million parameters.

Saved are the weights and AdamW's two moments in float32, as a run saves them: flushed to the disk and renamed. Before
that, a run looks whether all weights are numbers. Before it reads a file, it looks at the checksum of every part. A
figure is the median of three; the file is in the cache of the system when it is read.

    python bench/checkpoint.py --out DIR             # needs 5 GB there, and 10 GB of memory
    python bench/checkpoint.py --out DIR --quick     # 13 million parameters
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from runtime.checkpoint import check_sums, save_checkpoint  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters  # noqa: E402


def seconds(deed, repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        deed()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the file, which is removed")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    shape = ModelConfig(512, 256, 16, 4) if options.quick else ModelConfig(50304, 1024, 24, 16)
    model = Transformer(shape)
    weights = model.state_dict()
    moments = {i: {"exp_avg": p.clone(), "exp_avg_sq": p.clone()} for i, p in enumerate(weights.values())}
    state = {"model": weights, "optimizers": [{"state": moments}], "step": 1}
    path, repeats = options.out / "ckpt.pt", 3
    saving = seconds(lambda: save_checkpoint(options.out, state), repeats)
    looking = seconds(lambda: all(torch.isfinite(p).all() for p in model.parameters()), repeats)
    reading = seconds(lambda: torch.load(path, weights_only=True), repeats)
    sums = seconds(lambda: check_sums(path), repeats)
    size = path.stat().st_size / 1e9
    path.unlink()
    print(f"{count_parameters(model) / 1e6:.0f} M parameters, {size:.2f} GB, torch {torch.__version__}\n")
    print("| | without checks, s | the checks, s | more |\n| --- | --- | --- | --- |")
    print(f"| save | {saving:.2f} | {looking:.2f} | {100 * looking / saving:.0f} % |")
    print(f"| read | {reading:.2f} | {sums:.2f} | {100 * sums / reading:.0f} % |")
