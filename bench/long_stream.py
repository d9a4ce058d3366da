"""A text of 50,000 tokens through a model that was trained on 128: full attention, a window, a window with sinks.

The model reads the text token by token, as it would write it, and at each token we note how surprised it is, how much
time of a processor the step took (on one thread; other processes on the machine do not count), and how many bytes of
keys and values it keeps.

* full: every token so far stays in the cache. Memory and time grow without end, and past the trained length the
  distances are such as the model has never met.
* window: the last W tokens, in a cache that rolls.
* window + sinks: the first tokens stay as well (Xiao et al. 2023). Attention must sum to one even where nothing is
  worth attending to, and trained models leave what they do not need at the first tokens; when those roll out of the
  window, it goes somewhere else.

    python pretrain.py && python bench/long_stream.py                    # the embedded corpus
    python bench/long_stream.py --init_from out/books/pretrain --data books --data_dir DIR

Writes stream.jsonl (a row for each thousand tokens), stream.md and stream.png into the folder ``--out``.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import arithmetic  # noqa: E402
from attention import KVCache, RollingCache  # noqa: E402
from data import text_documents  # noqa: E402
from generate import cache_for  # noqa: E402
from runtime.checkpoint import write_text  # noqa: E402
from runtime.errors import UserError, run_main  # noqa: E402
from runtime.plots import plot_lines  # noqa: E402
from stages import load_stage  # noqa: E402
from transformer import Transformer  # noqa: E402

BLOCK = 1000  # tokens of a row


def text_to_read(tokenizer, source: str, n: int, data_dir: str) -> list[int]:
    """``n`` tokens that the model has not been trained on, documents joined by end-of-text."""
    documents = (
        arithmetic.documents(n, "stream") if source == "arith" else text_documents(source, "validation", data_dir)
    )
    ids: list[int] = []
    for text in documents:
        ids += [*tokenizer.encode(text), tokenizer.eot_id]
        if len(ids) > n:
            return ids[: n + 1]
    raise UserError(f"{source} has only {len(ids)} tokens to read, {n} were asked for")


def bytes_of(cache: KVCache) -> int:
    """Of the keys and values that are kept: caches also hold some spare room, which says nothing."""
    columns = cache.n_slots if isinstance(cache, RollingCache) else cache.length
    kept = [t[..., : min(cache.length, columns), :] for t in [*cache.k, *cache.v] if t is not None]
    return sum(t.numel() * t.element_size() for t in kept)


@torch.no_grad()
def read(model: Transformer, ids: list[int], name: str, write) -> None:
    """One row for each thousand tokens: mean surprise in nats, median milliseconds of a token, bytes of the cache."""
    cache = cache_for(model, 1, len(ids))
    surprises, seconds = [], []
    for t in tqdm(range(len(ids) - 1), desc=name, unit=" tokens", mininterval=1.0):
        start = time.process_time()
        logits = model(torch.tensor([[ids[t]]]), cache=cache)[0, -1]
        seconds.append(time.process_time() - start)
        surprises.append(-float(logits.log_softmax(-1)[ids[t + 1]]))
        if (t + 1) % BLOCK == 0:
            nats, ms = statistics.fmean(surprises), 1000 * statistics.median(seconds)
            write({"kind": name, "tokens": t + 1, "nats": round(nats, 4), "ms": round(ms, 3), "bytes": bytes_of(cache)})
            surprises, seconds = [], []


def table(rows: list[dict]) -> str:
    """Markdown, from the rows alone."""
    head = ("attention", "perplexity of the first 1,000 tokens", "of the next 9,000", "of the last 10,000")
    head += ("ms a token, first 1,000", "last 1,000", "MB of keys and values, at 1,000", "at the end")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        perplexities = [
            math.exp(statistics.fmean(row["nats"] for row in p)) for p in (mine[:1], mine[1:10], mine[-10:])
        ]
        first, last = mine[0], mine[-1]
        figures = [*perplexities, first["ms"], last["ms"], first["bytes"] / 1e6, last["bytes"] / 1e6]
        lines.append(f"| {kind} | " + " | ".join(f"{x:.2f}" for x in figures) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init_from", default="out/arith/pretrain", help="a model with rotary positions")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--data", default="arith", help="arith, or what pretrain.py takes")
    parser.add_argument("--data_dir", default=os.environ.get("ALIGNBOOK_DATA", ""))
    parser.add_argument("--out", default="out/stream")
    chosen = parser.parse_args()
    model, tokenizer, _ = load_stage(chosen.init_from, "python pretrain.py")
    if model.config.positions != "rope":
        raise UserError(f"{chosen.init_from} has {model.config.positions} positions: they end at max_seq_len")
    if chosen.tokens < 11 * BLOCK or chosen.window < 1 or chosen.sinks < 1:
        raise UserError(f"--tokens starts at {11 * BLOCK}, --window and --sinks at 1")
    torch.set_num_threads(1)  # products of one row: a second thread has nothing to do
    model.eval()
    ids = text_to_read(tokenizer, chosen.data, chosen.tokens, chosen.data_dir)
    if chosen.window + chosen.sinks > model.config.max_seq_len:
        raise UserError(f"--window and --sinks: together at most the {model.config.max_seq_len} tokens of training")
    plain = dataclasses.replace(model.config, window=None, sinks=0)
    W, S = chosen.window, chosen.sinks
    kinds = {
        f"window of {W}": {"window": W},
        f"window of {W}, {S} sinks": {"window": W, "sinks": S},
        "full": {},
    }
    out, rows = Path(chosen.out), []
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "stream.jsonl", "w") as file:

        def write(row: dict) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        for name, fields in kinds.items():
            model.config = dataclasses.replace(plain, **fields)
            read(model, ids, name, write)
    write_text(out / "stream.md", table(rows) + "\n")
    lines = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    panels = {
        "perplexity": lambda row: math.exp(row["nats"]), "milliseconds a token": lambda row: row["ms"],
        "megabytes of keys and values": lambda row: row["bytes"] / 1e6,
    }  # fmt: skip
    plot_lines(
        {
            title: {kind: ([row["tokens"] for row in mine], [of(row) for row in mine]) for kind, mine in lines.items()}
            for title, of in panels.items()
        },
        out / "stream.png", "tokens read", logarithmic="y",
    )  # fmt: skip
    print(f"{table(rows)}\n{out / 'stream.md'}, {out / 'stream.png'}")


if __name__ == "__main__":
    run_main(main)
