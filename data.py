"""Data: texts become batches.

Three shapes are enough:

* a flat array of tokens, documents joined by end-of-text, of which pretraining reads random windows (``TokenFile``);
* conversations packed into rows of fixed length with a loss mask, and with document numbers so that no document
  attends to another (``pack``);
* prompts as ids that end where the assistant speaks (``encode_prompts``).

Run ``python data.py`` to see two conversations packed into one row.
"""

import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import arithmetic
from runtime.checkpoint import write_atomically
from runtime.errors import UserError
from runtime.rows import report_skipped, sources
from texts import Prompt, text_documents
from tokenizer import BPETokenizer, ByteTokenizer, TiktokenTokenizer, Tokenizer, encode_chat

# ----------------------------------------------------------------------------------------------------------------------
# Pretraining: one flat array of tokens


def train_tokenizer(
    kind: str, vocab_size: int, source: str, data_dir: str, seed: int, limit: int | None, rename: Sequence[str] = ()
) -> Tokenizer:
    """ "bytes", "r50k", or "bpe": trained on the first 20 million characters of the training split."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "r50k":
        return TiktokenTokenizer("r50k_base")
    sample, size = [], 0
    for text in text_documents(source, "train", data_dir, seed, limit, rename):
        if isinstance(text, str):
            sample.append(text[: 20_000_000 - size])
            size += len(sample[-1])
        if size >= 20_000_000 or (source == "arith" and len(sample) == 4000):
            break
    if "arith" in sources(source):  # the tags will be needed; pretraining text has none
        sample += [arithmetic.solution(problem) for problem in arithmetic.problems(500, seed=f"{seed} tokenizer")]
    return BPETokenizer.train(sample, vocab_size)


class TokenFile:
    """Tokens on disk, in splits::

        4,096 bytes    JSON: what the file was made from, the type of its numbers, a checksum,
                       and of each split how many tokens it has, of how many bytes of text
        the rest       the tokens of one split after the other, as uint16 or uint32

    Windows of them are read without loading the file.
    """

    HEADER = 4096

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.header = json.loads(file.read(self.HEADER))
        self.splits: dict[str, np.ndarray] = {}
        start, dtype = self.HEADER, np.dtype(self.header["dtype"])
        for name, (n_tokens, _) in self.header["splits"].items():
            self.splits[name] = np.memmap(path, dtype, "r", start, (n_tokens,))
            start += n_tokens * dtype.itemsize
        self.bytes_per_token = {name: n_bytes / n for name, (n, n_bytes) in self.header["splits"].items()}

    def __len__(self) -> int:
        return len(self.splits["train"])

    def windows(self, split: str, starts: Sequence[int], length: int) -> Tensor:
        """(len(starts), length) ids, each row a stretch of the file."""
        tokens = self.splits[split]
        return torch.from_numpy(np.stack([tokens[int(s) : int(s) + length] for s in starts]).astype(np.int64))

    def random_starts(self, split: str, n: int, length: int, seed: Sequence[int]) -> np.ndarray:
        """Where ``n`` windows begin, anywhere in the file; the same ``seed``, say (seed, step), gives the same ones."""
        last = len(self.splits[split]) - length
        if last < 0:
            have = f"{split} has {len(self.splits[split])} tokens"
            raise UserError(f"{have}, fewer than one window of {length}: use more text")
        return np.random.default_rng(list(seed)).integers(0, last + 1, n)

    def is_whole(self) -> bool:
        """Whether the tokens are those that were written."""
        checksum = 0
        for tokens in self.splits.values():
            checksum = zlib.crc32(tokens, checksum)
        facts = {name: value for name, value in self.header.items() if name != "checksum"}
        return zlib.crc32(json.dumps(facts).encode(), checksum) == self.header["checksum"]

    def close(self) -> None:
        self.splits.clear()


def write_tokens(path: Path, tokenizer: Tokenizer, splits: dict[str, Iterable[str]], fingerprint: str) -> None:
    """Encode the documents of each split into a new token file, as they stream in; every document ends with
    end-of-text.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    def write(temporary):
        sizes, checksum = {}, 0
        with open(temporary, "wb") as file:
            file.seek(TokenFile.HEADER)
            for split, texts in splits.items():
                n_tokens, n_bytes, skipped = 0, 0, Counter()
                texts = _read_to_the_end(texts)
                for text in tqdm(texts, desc=f"encoding {split}", unit=" documents", mininterval=1.0, leave=False):
                    if not isinstance(text, str):
                        skipped["without text"] += 1
                    elif not text.strip():
                        skipped["empty"] += 1
                    else:
                        ids = np.array([*tokenizer.encode(text), tokenizer.document_id], dtype)
                        file.write(ids.tobytes())
                        checksum = zlib.crc32(ids, checksum)
                        n_tokens += len(ids)
                        n_bytes += len(text.encode("utf-8", errors="replace"))
                report_skipped(skipped, f"{split} documents")
                if not n_tokens:
                    raise UserError(f"no text for {split}: every document was empty")
                sizes[split] = (n_tokens, n_bytes)
            facts = {"made_from": fingerprint, "dtype": dtype.str, "splits": sizes}
            checksum = zlib.crc32(json.dumps(facts).encode(), checksum)
            file.seek(0)
            file.write(json.dumps(facts | {"checksum": checksum}).encode().ljust(TokenFile.HEADER))

    write_atomically(path, write)


def _read_to_the_end(texts: Iterable[str]) -> Iterator[str]:
    """What fails while texts are read is not what fails while tokens are written."""
    try:
        yield from texts
    except (OSError, RuntimeError) as error:
        raise UserError(f"the text could not be read to its end ({' '.join(str(error).split())[:160]})") from None


def _is_made_from(path: Path, fingerprint: str) -> bool:
    """Whether a token file is there, whole, and made from what has that fingerprint."""
    try:
        file = TokenFile(path)
        return file.header["made_from"] == fingerprint and file.is_whole()
    except Exception:  # it is not there, or whatever a damaged header leads to
        return False


def _stamp(source: str) -> list:
    """What changes when a user mends his own files."""
    files: list[Path] = []
    for path in map(Path, sources(source)):
        files += sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def prepare_tokens(
    path: Path, tokenizer: Tokenizer, source: str, data_dir: str, seed: int, limit: int | None,
    rename: Sequence[str] = (), held_out: tuple[str, str] | None = None,
) -> None:  # fmt: skip
    """Make the token file of a run, unless it is there and was made from the same source with the same tokenizer.
    held_out: where its validation split comes from, a source and its split, if not from the same source.
    """
    held_out = held_out or (source, "validation")
    state = [tokenizer.state(), source, limit, seed if "arith" in sources(source) else None, *rename]
    state = json.dumps([*state, *held_out, *(_stamp(name) for name in dict.fromkeys((source, held_out[0])))])
    fingerprint = f"{zlib.crc32(state.encode()):08x}"
    if _is_made_from(path, fingerprint):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"train": (source, "train"), "validation": held_out}
    splits = {name: text_documents(*part, data_dir, seed, limit, rename) for name, part in parts.items()}
    write_tokens(path, tokenizer, splits, fingerprint)


# ----------------------------------------------------------------------------------------------------------------------
# SFT: conversations in packed rows


@dataclass
class PackedRows:
    """``tokens``, ``loss_mask`` and ``segments``, each (R, T). Segment 0 is padding; documents count from 1 in each
    row.
    """

    tokens: Tensor
    loss_mask: Tensor
    segments: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def n_documents(self) -> int:
        return int(self.segments.amax(dim=1).sum())

    def batch(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(rows)
        return self.tokens[rows], self.loss_mask[rows], self.segments[rows]


def pack(
    chats: Sequence[Sequence[dict]], tokenizer: Tokenizer, length: int, packing: bool = True, what: str = ""
) -> PackedRows:
    """Lay conversations into rows of ``length`` tokens, each whole; one that is longer than a row is counted,
    reported and left out. what: the split, for these messages.

    A conversation goes into the first of the open rows with room for it. packing=False: one in each row.
    """
    encoded = [encode_chat(tokenizer, chat) for chat in chats]
    skipped = Counter(f"longer than {length} tokens" for ids, _ in encoded if len(ids) > length)
    report_skipped(skipped, f"{what} conversations".lstrip())
    encoded = [(ids, mask) for ids, mask in encoded if len(ids) <= length]
    if not encoded:
        raise UserError(
            f"every {what} conversation is longer than {length} tokens".replace("  ", " ")
            + ": use a longer --seq_len, up to the model's context"
            + (", or name others with --eval_data" if what == "validation" else "")
        )
    rows: list[list] = []
    open_rows: list[int] = []  # indices of the rows that may still take one
    room: list[int] = []
    for ids, mask in encoded:
        place = next((r for r in open_rows if room[r] >= len(ids)), None) if packing else None
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(length)
            open_rows = [*open_rows, place][-64:]
        rows[place].append((ids, mask))
        room[place] -= len(ids)
    tokens = torch.full((len(rows), length), tokenizer.pad_id)
    loss_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    segments = torch.zeros(len(rows), length, dtype=torch.long)
    for r, documents in enumerate(rows):
        start = 0
        for number, (ids, mask) in enumerate(documents, start=1):
            end = start + len(ids)
            tokens[r, start:end] = torch.tensor(ids)
            loss_mask[r, start:end] = torch.tensor(mask, dtype=torch.bool)
            segments[r, start:end] = number
            start = end
    return PackedRows(tokens, loss_mask, segments)


def epoch_batch(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which of ``n`` rows make batch number ``step``: every row once in each epoch, each epoch in its own order.

    A function of the step and nothing else, so a resumed run goes on with the very next rows.
    """
    rows = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, i = divmod(place, n)
        rows.append(_epoch_order(n, seed, epoch)[i])
    return np.array(rows)


def parts_of(rows: Sequence, size: int) -> list:
    """The rows of a batch in parts of ``size``, the last one perhaps smaller; of size 0 all in one.

    >>> parts_of([5, 3, 8, 1, 2], 2)
    [[5, 3], [8, 1], [2]]
    """
    return [rows[i : i + size] for i in range(0, len(rows), size)] if size else [rows]


def similar_lengths(lengths: Sequence[int], batch: int, seed: int) -> list[list[int]]:
    """All rows in batches of ``batch``, those of similar length together, so that little is padding. ``epoch_batch``
    over the batches gives each epoch its order.

    Lengths are blurred by a fifth: rows of one length are often of one kind. The last batch is filled with rows from
    the start, if need be again and again.

    >>> similar_lengths([100, 10, 60, 30, 16], batch=2, seed=0)
    [[1, 4], [3, 2], [0, 1]]
    """
    lengths = np.array(lengths, dtype=float)
    order = np.argsort(lengths * np.random.default_rng(seed).uniform(0.8, 1.2, len(lengths)), kind="stable").tolist()
    filled = list(itertools.islice(itertools.cycle(order), -(-len(order) // batch) * batch))
    return [filled[i : i + batch] for i in range(0, len(filled), batch)]


_orders: dict = {}


def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    key = (n, seed, epoch)
    if key not in _orders:
        while len(_orders) > 8:
            _orders.pop(next(iter(_orders)))
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return _orders[key]


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning and evaluation: prompts with a gold answer


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int
) -> tuple[list[list[int]], list[Prompt]]:
    """Prompts as ids that end where the assistant speaks, and the prompts they belong to; longer ones are counted and
    left out.
    """
    encoded = [(encode_chat(tokenizer, prompt.messages, add_generation_prompt=True)[0], prompt) for prompt in prompts]
    kept = [(ids, prompt) for ids, prompt in encoded if len(ids) <= longest]
    if len(kept) < len(encoded):
        report_skipped(Counter({f"longer than {longest} tokens": len(encoded) - len(kept)}), "prompts")
    if not kept:
        raise UserError(f"every prompt is longer than {longest} tokens: the model's context is too short for them")
    return [ids for ids, _ in kept], [prompt for _, prompt in kept]


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte, which does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


if __name__ == "__main__":
    demo = ByteTokenizer()
    texts = (("2+3?", "5"), ("Hi", "Yo"))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    packed = pack(chats, demo, length=20)
    print(
        "two conversations in one row of 20 tokens; a target counts where loss is 1; a token sees its own document only"
    )
    for token, counts, segment in zip(packed.tokens[0], packed.loss_mask[0], packed.segments[0]):
        print(f"  document {segment}  loss {int(counts)}  {demo.decode([token])!r}")
