"""What a GPU makes of the book: training MFU, sampling, and memory, piece by piece.

Each piece takes minutes at most, prints a table row by row, and appends one line of JSON for each figure to ``--out``,
so that a machine that is taken away loses nothing. MFU is the share of the card's dense 16-bit peak (its data sheet's,
runtime/device.py) that the model's own operations take (``flops_per_token``); recomputed work does not count. bf16
throughout; times are medians after a warm-up, the first compilation left out.

    python bench/gpu.py train                     # 50 M, 77 M, 124 M and 406 M: eager, compiled, transformers' Llama
    python bench/gpu.py decode                    # 64, 512 and 1,024 rows: generate, fast_generate, transformers
    python bench/gpu.py train decode --tiny --device cpu       # does it run? sizes for a CPU
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from engine import fast_generate  # noqa: E402
from generate import generate  # noqa: E402
from optim import make_optimizers  # noqa: E402
from runtime.device import compile_blocks, peak_flops, pick_device, synchronize  # noqa: E402
from transformer import ModelConfig, Transformer, flops_per_token, token_logps  # noqa: E402

# name: shape, tokens of a row, rows of a micro-batch
GPT2 = {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "tie_embeddings": True}
SIZES = {
    "50M": (ModelConfig(4096, 512, 14, 8, max_seq_len=512), 512, 128),
    "77M": (ModelConfig(50304, 512, 8, 8, max_seq_len=512), 512, 64),
    "124M": (ModelConfig(50304, 768, 12, 12, max_seq_len=1024, **GPT2), 1024, 32),
    "406M": (ModelConfig(50304, 1024, 24, 16, max_seq_len=1024), 1024, 32),
}
TINY = {"tiny": (ModelConfig(512, 64, 2, 4, max_seq_len=64), 64, 4)}


class Report:
    def __init__(self, path: str, device: torch.device):
        self.path, self.device = path, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.facts = {"device": name, "torch": torch.__version__}

    def add(self, **row) -> None:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(self.facts | row) + "\n")


def median_seconds(call, device: torch.device, repeats: int, warm_up: int) -> tuple[float, float]:
    """(median seconds of a call, seconds of the warm-up)."""
    begun = time.perf_counter()
    for _ in range(warm_up):
        call()
    synchronize(device)
    warm, seconds = time.perf_counter() - begun, []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), warm


def peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def forget(device: torch.device) -> None:
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def train(report: Report, sizes: dict, repeats: int, theirs: bool) -> None:
    """One forward, backward and AdamW step on one micro-batch of random tokens."""
    device = report.device
    peak = peak_flops(device, "bf16")
    for name, (config, length, rows) in sizes.items():
        tokens = torch.randint(config.vocab_size, (rows, length), device=device)
        for who in ("eager", "compiled", *(("llama", "llama compiled") if theirs and config.norm == "rmsnorm" else ())):
            forget(device)
            try:
                if who.startswith("llama"):
                    from training_step import llama

                    model = llama(config).to(device)
                    called = torch.compile(model) if who.endswith("compiled") else model
                    loss_of = lambda f=called, tokens=tokens: f(input_ids=tokens, labels=tokens, use_cache=False).loss  # noqa: E731
                else:
                    model = Transformer(config).to(device)
                    if who == "compiled":
                        compile_blocks(model)
                    loss_of = lambda m=model, tokens=tokens: -token_logps(m, tokens).mean()  # noqa: E731
                optimizers = make_optimizers(model, 1e-4)

                def step(loss_of=loss_of, optimizers=optimizers):
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = loss_of()
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)

                seconds, warm = median_seconds(step, device, repeats, 3)
                speed = rows * length / seconds
                flops = flops_per_token(Transformer(config), length)
                report.add(
                    piece="train", size=name, how=who, rows=rows, tokens_per_second=speed, mfu=speed * flops / peak,
                    gigabytes=peak_memory(device), warm_up=warm,
                )  # fmt: skip
            except Exception as error:  # the other rows still count
                report.add(piece="train", size=name, how=who, failed=f"{type(error).__name__}: {str(error)[:300]}")
            model = called = loss_of = optimizers = step = None


def decode(
    report: Report, sizes: dict, rows_list: list[int], length: int, new: int, repeats: int, theirs: bool
) -> None:
    """Tokens per second of sampling: prompts of equal length, no row ends early."""
    from training_step import llama

    device = report.device
    for name, (config, _, _) in sizes.items():
        ours = Transformer(config).to(device).eval()
        end = {"eot_id": config.vocab_size, "pad_id": 0, "seed": 0}  # a token that no row can draw
        for rows in rows_list:
            prompts = torch.randint(config.vocab_size, (rows, length), device=device)
            lists = prompts.tolist()
            calls = {
                "generate": lambda m=ours, p=lists, end=end: generate(m, p, new, **end),
                "fast_generate": lambda m=ours, p=lists, end=end: fast_generate(m, p, new, **end),
            }
            if theirs:
                model = llama(config).to(device).eval().to(torch.bfloat16)
                settings = {
                    "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new,
                    "eos_token_id": None, "pad_token_id": 0,
                }  # fmt: skip
                for kind in ("dynamic", "static"):
                    calls[f"transformers {kind}"] = lambda p=prompts, k=kind, s=settings, m=model: m.generate(
                        p,
                        attention_mask=torch.ones_like(p),
                        **s,
                        **({"cache_implementation": "static"} if k == "static" else {}),
                    )
            for who, call in calls.items():
                forget(device)
                half = (
                    contextlib.nullcontext() if who.startswith("trans") else torch.autocast(device.type, torch.bfloat16)
                )
                try:
                    with half:
                        seconds, warm = median_seconds(
                            call, device, repeats, 2 if "fast" in who or "static" in who else 1
                        )
                    report.add(
                        piece="decode", size=name, rows=rows, how=who, tokens_per_second=rows * new / seconds,
                        ms_per_token=1000 * seconds / new, gigabytes=peak_memory(device), warm_up=warm,
                    )  # fmt: skip
                except Exception as error:
                    report.add(
                        piece="decode",
                        size=name,
                        rows=rows,
                        how=who,
                        failed=f"{type(error).__name__}: {str(error)[:300]}",
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="+", choices=("train", "decode"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="gpu.jsonl")
    parser.add_argument("--sizes", default="50M,77M,124M,406M")
    parser.add_argument("--rows", default="64,512,1024")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ours", action="store_true", help="leave the other libraries out")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report(options.out, pick_device(options.device))
    sizes = TINY if options.tiny else {name: SIZES[name] for name in options.sizes.split(",")}
    if "train" in options.pieces:
        train(report, sizes, options.repeats, not options.ours)
    if "decode" in options.pieces:
        rows = [4] if options.tiny else [int(n) for n in options.rows.split(",")]
        length, new = (8, 40) if options.tiny else (64, 192)
        decode(report, sizes, rows, length, new, max(2, options.repeats // 3), not options.ours)
