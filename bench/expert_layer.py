"""What an expert layer costs: 8 experts of which each token uses 2, against a dense layer of the same active size.

Both sides multiply every token by the same number of weights: the two experts of a token are together as wide as the
dense layer. What the expert layer pays besides is the routing, the sorting of the tokens, and that its products are
smaller. A third column is the layer as one might first write it, in which every expert computes every token and most
of it is multiplied by zero. All take turns in one process; a figure is the median of the ratios of calls that ran one
after the other, time / time of the dense layer, for a forward pass and for forward and backward.

    python bench/expert_layer.py             # 4,096 tokens, d 256
    python bench/expert_layer.py --quick     # fewer repeats
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from layers import ModelConfig, SwiGLU  # noqa: E402
from moe import MoE, route  # noqa: E402
from runtime.device import keep_freed_memory  # noqa: E402

N, D, E, K = 4096, 256, 8, 2


def every_expert(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The same output with the work of all experts."""
    weights, experts = route(layer.router(x), layer.k)
    dense = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, experts, weights)  # (N, E)
    return sum(dense[:, e, None] * expert(x) for e, expert in enumerate(layer.experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 5 if parser.parse_args().quick else 40
    keep_freed_memory()  # as every run does
    torch.manual_seed(0)
    config = ModelConfig(d_model=D, n_heads=4, n_experts=E, n_experts_per_token=K)
    dense, experts = SwiGLU(config), MoE(config)
    x = torch.randn(N, D, requires_grad=True)
    torch.testing.assert_close(experts(x), every_expert(experts, x), atol=1e-5, rtol=1e-4)
    layers = {"dense": dense, "experts": experts, "every expert": lambda x: every_expert(experts, x)}

    def forward(layer):
        with torch.no_grad():
            layer(x)

    def both(layer):
        layer(x).square().sum().backward()
        for module in (dense, experts):
            module.zero_grad(set_to_none=True)
        x.grad = None

    print(f"{N:,} tokens, d {D}; dense {config.d_ff} wide, {E} experts {config.d_expert} wide, {K} for each token")
    print(f"{torch.get_num_threads()} threads, medians of {repeats} rounds\n")
    print("| pass | dense, ms | experts / dense | every expert / dense |\n| --- | --- | --- | --- |")
    for name, run in {"forward": forward, "forward and backward": both}.items():
        seconds = {layer: [] for layer in layers}
        for repeat in range(repeats + 2):
            for layer in list(layers)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                run(layers[layer])
                seconds[layer].append(time.perf_counter() - start)
        times = {layer: some[2:] for layer, some in seconds.items()}  # the first two rounds warm up
        ratios = [statistics.median(a / b for a, b in zip(times[layer], times["dense"])) for layer in list(layers)[1:]]
        milliseconds = 1000 * statistics.median(times["dense"])
        print(f"| {name} | {milliseconds:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
