"""How long one training step takes: ours against the Llama of transformers.

Both sides do the same work on the same shapes: forward, mean cross-entropy over the tokens, backward, one fused AdamW
step, random weights. Ours goes through ``token_logps``, as every chapter does; theirs is ``LlamaForCausalLM`` with
PyTorch's fused attention, called with labels. Each runs as written ("eager") and through torch.compile ("compiled";
ours is ``compile_blocks`` of runtime/device.py). The four take turns inside one process, so that whatever else the
machine does hits all of them; a figure is the median of the ratios of steps that ran one after the other, and above 1
means that ours is faster.

    pip install -e ".[bench]"
    python bench/training_step.py            # about 1, 5 and 25 million parameters
    python bench/training_step.py --quick    # the smallest alone, few repeats
    python bench/training_step.py --bf16     # under bfloat16 autocast instead of in float32
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers  # noqa: E402

from runtime.device import compile_blocks  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters, token_logps  # noqa: E402

# vocabulary, d_model, blocks, heads, and the batch: rows × tokens
SIZES = {"1 M": (512, 128, 4, 4, 32, 128), "5 M": (4096, 256, 4, 8, 8, 256), "25 M": (6144, 512, 6, 8, 4, 256)}


def llama(config: ModelConfig) -> torch.nn.Module:
    """The same shape in transformers."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.d_ff,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            attn_implementation="sdpa",
        )
    )


def take_turns(steps: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; the order is reversed from one round to the next."""
    seconds = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast))


def training_step(model, loss_of, bf16: bool):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return step


def measure(size: str, repeats: int, bf16: bool) -> None:
    vocab_size, d_model, n_layers, n_heads, rows, length = SIZES[size]
    config = ModelConfig(vocab_size, d_model, n_layers, n_heads, max_seq_len=length)
    tokens = torch.randint(vocab_size, (rows, length))
    steps, warm_up = {}, {}
    for how in ("eager", "compiled"):
        ours, theirs = Transformer(config), llama(config)
        assert count_parameters(ours) == count_parameters(theirs)
        theirs_called = theirs
        if how == "compiled":
            compile_blocks(ours)
            theirs_called = torch.compile(theirs)
        steps[f"ours {how}"] = training_step(ours, lambda m=ours: -token_logps(m, tokens).mean(), bf16)
        steps[f"theirs {how}"] = training_step(
            theirs, lambda m=theirs_called: m(input_ids=tokens, labels=tokens, use_cache=False).loss, bf16
        )
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        step()
        warm_up[name] = time.perf_counter() - start
    seconds = take_turns(steps, repeats)
    pairs = [("eager", "eager"), ("compiled", "compiled"), ("eager", "compiled")]
    ratios = [ratio(seconds[f"theirs {a}"], seconds[f"ours {b}"]) for a, b in pairs]
    medians = [
        1000 * statistics.median(seconds[f"{who} {how}"]) for how in ("eager", "compiled") for who in ("ours", "theirs")
    ]
    print(
        f"| {size} | {rows} × {length} | "
        + " | ".join(f"{r:.2f}" for r in ratios)
        + " | "
        + " | ".join(f"{m:.0f}" for m in medians)
        + f" | {warm_up['ours compiled']:.0f} s, {warm_up['theirs compiled']:.0f} s |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default 20; quick: 6)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    repeats = options.repeats or (6 if options.quick else 20)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{'bfloat16 autocast' if options.bf16 else 'float32'}, {repeats} repeats, {options.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print(
        "| parameters | batch | eager / eager | compiled / compiled | their eager / our compiled "
        "| ours, ms | theirs, ms | ours compiled, ms | theirs compiled, ms | warm-up, ours and theirs |"
    )
    print("| --- " * 10 + "|")
    for size in ["1 M"] if options.quick else SIZES:
        measure(size, repeats, options.bf16)
