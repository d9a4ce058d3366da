"""Data: where text comes from, and how it becomes batches.

Three shapes are enough:

* a flat array of tokens, documents joined by end-of-text, of which pretraining reads random windows (``TokenFile``);
* conversations packed into rows of fixed length with a loss mask, and with document numbers so that no document
  attends to another (``load_chats``, ``pack``);
* prompts with a gold answer, for reinforcement learning and evaluation (``load_prompts``).

The embedded task needs no file. The public datasets are named by their hub ids: they come from a local mirror, if
``data_dir`` names one, or from the hub. Nothing is dropped in silence: every row that cannot be used is counted by
its reason, and the count is printed.

Run ``python data.py`` to see two conversations packed into one row.
"""

import gzip
import itertools
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import arithmetic
from runtime import processes
from runtime.checkpoint import write_atomically
from runtime.errors import UserError
from tokenizer import BPETokenizer, ByteTokenizer, TiktokenTokenizer, Tokenizer, encode_chat
from verify import parse_gold

# ----------------------------------------------------------------------------------------------------------------------
# Rows of a dataset


def read_dataset(
    hub_id: str, config: str | None, split: str, data_dir: str = "", streaming: bool = False
) -> Iterator[dict]:
    """The rows of ``DIR/<hub id, / as __>/[config/]<split>.jsonl[.xz|.gz]`` if ``data_dir`` has it, else of the hub's
    dataset.
    """
    stem = Path(data_dir, hub_id.replace("/", "__"), config or "", split)
    for ending, opener in ((".jsonl.xz", lzma.open), (".jsonl.gz", gzip.open), (".jsonl", open)):
        path = Path(f"{stem}{ending}")
        if data_dir and path.is_file():
            return _read_lines(path, opener)
    looked = f"{stem}.jsonl[.xz|.gz]" if data_dir else ""
    if hub_id.startswith("local/"):
        raise UserError(
            f"{hub_id} is on no hub: "
            + (f"it should be at {looked}" if looked else "name the folder that holds it with --data_dir DIR")
        )
    return _read_hub(hub_id, config, split, streaming, looked)


def _read_lines(path: Path, opener) -> Iterator[dict]:
    n = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)
                    n += 1
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cut off after {n} rows ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, row {n + 1}: not JSON, or cut off ({error.msg})") from None


FOLDERS = ("Anthropic/hh-rlhf",)  # datasets whose configurations are folders on the hub


def _read_hub(hub_id: str, config: str | None, split: str, streaming: bool, looked: str) -> Iterator[dict]:
    import datasets  # seconds to import, so only here

    try:
        if hub_id in FOLDERS:
            return iter(datasets.load_dataset(hub_id, data_dir=config, split=split, streaming=streaming))
        return iter(datasets.load_dataset(hub_id, config, split=split, streaming=streaming))
    except Exception as error:  # whatever the network stack, the hub or the file formats raise
        why = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise UserError(
            f"the dataset {hub_id} ({split}) could not be loaded ({type(error).__name__}: {why}): go online, "
            + (f"or put it at {looked}" if looked else "or name a local mirror with --data_dir DIR or ALIGNBOOK_DATA")
        ) from None


def columns(row: dict, names: Sequence[str], source: str) -> list:
    """The values of these columns, or an error that says which the dataset has."""
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(f"{source} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}")
    return [row[name] for name in names]


def report_skipped(skipped: Counter, what: str) -> None:
    if skipped and processes.rank() == 0:
        print(f"skipped {sum(skipped.values())} {what}: " + ", ".join(f"{n} {why}" for why, n in skipped.most_common()))


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining: one flat array of tokens

CORPORA = {  # hub id, configuration, column, split for training, split for validation (None: every 100th document)
    "tinystories": ("roneneldan/TinyStories", None, "text", "train", "validation"),
    "pile": ("monology/pile-uncopyrighted", None, "text", "train", None),
    "books": ("local/classic_books", None, "text", "train", None),
    "hh-harmless": ("Anthropic/hh-rlhf", "harmless-base", "chosen", "train", None),
}
ARITH_DOCUMENTS = 24_000


def text_documents(
    source: str, split: str, data_dir: str = "", seed: int = 0, limit: int | None = None
) -> Iterator[str]:
    """The documents of one split: "arith", a name in CORPORA, or the path of a text file or of a folder of them."""
    if source == "arith":
        n = ARITH_DOCUMENTS if split == "train" else 500
        texts = iter(arithmetic.documents(n, seed=f"{seed} {split}"))
    elif source in CORPORA:
        hub_id, config, column, train, validation = CORPORA[source]
        if split == "train" or validation:
            rows = read_dataset(hub_id, config, train if split == "train" else validation, data_dir, streaming=True)
        else:
            rows = read_dataset(hub_id, config, train, data_dir, streaming=True)
        if validation is None:
            rows = (row for i, row in enumerate(rows) if (i % 100 == 0) == (split == "validation"))
        texts = (columns(row, [column], hub_id)[0] for row in rows)
    else:
        texts = _text_files(source, split)
    return itertools.islice(texts, limit)


def _text_files(source: str, split: str) -> Iterator[str]:
    """Each file's first 95 % train, the rest validates."""
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"--data {source}: neither arith, {', '.join(CORPORA)}, nor a text file or a folder with .txt files"
        )
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        cut = int(0.95 * len(text))
        yield text[:cut] if split == "train" else text[cut:]


def train_tokenizer(kind: str, vocab_size: int, source: str, data_dir: str, seed: int, limit: int | None) -> Tokenizer:
    """ "bytes", "r50k", or "bpe": trained on the first 20 million characters of the training split."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "r50k":
        return TiktokenTokenizer("r50k_base")
    sample, size = [], 0
    for text in text_documents(source, "train", data_dir, seed, limit):
        if isinstance(text, str):
            sample.append(text[: 20_000_000 - size])
            size += len(sample[-1])
        if size >= 20_000_000 or (source == "arith" and len(sample) == 4000):
            break
    if source == "arith":  # the tags will be needed; pretraining text has none
        sample += [arithmetic.solution(problem) for problem in arithmetic.problems(500, seed=f"{seed} tokenizer")]
    return BPETokenizer.train(sample, vocab_size)


class TokenFile:
    """A token file on disk (HDF5: ``train`` and ``validation``, uint16 or uint32). Windows are read without loading
    it.
    """

    def __init__(self, path: Path):
        self.file = h5py.File(path, "r")
        self.bytes_per_token = {
            s: self.file[s].attrs["bytes"] / max(1, len(self.file[s])) for s in ("train", "validation")
        }

    def __len__(self) -> int:
        return len(self.file["train"])

    def windows(self, split: str, starts: Sequence[int], length: int) -> Tensor:
        """(len(starts), length) ids, each row a stretch of the file."""
        tokens = self.file[split]
        return torch.from_numpy(np.stack([tokens[int(s) : int(s) + length] for s in starts]).astype(np.int64))

    def random_windows(self, split: str, n: int, length: int, seed: Sequence[int]) -> Tensor:
        """``n`` windows anywhere in the file; the same ``seed``, for example (seed, step), gives the same windows."""
        last = len(self.file[split]) - length
        if last < 0:
            raise UserError(
                f"{split} has {len(self.file[split])} tokens, fewer than one window of {length}: use more text"
            )
        return self.windows(split, np.random.default_rng(list(seed)).integers(0, last + 1, n), length)

    def close(self) -> None:
        self.file.close()


def write_tokens(path: Path, tokenizer: Tokenizer, splits: dict[str, Iterable[str]], fingerprint: str) -> None:
    """Encode the documents of each split into a new token file, as they stream in; every document ends with
    end-of-text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    def write(temporary):
        with h5py.File(temporary, "w") as file:
            file.attrs["fingerprint"] = fingerprint
            for split, texts in splits.items():
                skipped: Counter = Counter()
                tokens = file.create_dataset(split, (0,), dtype, maxshape=(None,), chunks=(2**16,))
                n_bytes, buffer = 0, []
                for text in tqdm(texts, desc=f"encoding {split}", unit=" documents", mininterval=1.0, leave=False):
                    if not isinstance(text, str):
                        skipped["without text"] += 1
                    elif not text.strip():
                        skipped["empty"] += 1
                    else:
                        buffer += [*tokenizer.encode(text), tokenizer.eot_id]
                        n_bytes += len(text.encode("utf-8", errors="replace"))
                    if len(buffer) >= 2**20:
                        _append(tokens, buffer)
                        buffer = []
                _append(tokens, buffer)
                tokens.attrs["bytes"] = n_bytes
                report_skipped(skipped, f"{split} documents")
                if not len(tokens):
                    raise UserError(f"no text for {split}: every document was empty")

    write_atomically(path, write)


def _append(tokens: h5py.Dataset, ids: list[int]) -> None:
    start = len(tokens)
    tokens.resize((start + len(ids),))
    tokens[start:] = np.array(ids, tokens.dtype)


def prepare_tokens(path: Path, tokenizer: Tokenizer, source: str, data_dir: str, seed: int, limit: int | None) -> None:
    """Make the token file of a run, unless it is there and was made from the same source with the same tokenizer."""
    state = json.dumps([tokenizer.state(), source, limit, seed if source == "arith" else None])
    fingerprint = f"{zlib.crc32(state.encode()):08x}"
    if path.exists():
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("fingerprint") == fingerprint:
                    return
        except OSError:
            pass  # damaged: made again
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = {s: text_documents(source, s, data_dir, seed, limit) for s in ("train", "validation")}
    write_tokens(path, tokenizer, splits, fingerprint)


# ----------------------------------------------------------------------------------------------------------------------
# SFT: conversations in packed rows


def load_chats(names: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None) -> list[list[dict]]:
    """Conversations of one or several sources, ``"gsm8k+dolly+alpaca"``, as lists of messages.

    arith: ``n`` problems of the embedded task (192; for validation 256 held-out ones). The others have no
    validation split of their own here: every 50th row is kept for it. ``n`` limits each source.
    """
    chats, skipped = [], Counter()
    for name in names.split("+"):
        if name == "arith":
            found = arithmetic.problems(n or (192 if split == "train" else 256), f"{seed} sft", split)
            chats += [arithmetic.chat(problem) for problem in found]
        elif name in CHATS:
            hub_id, config, convert = CHATS[name]
            rows = read_dataset(hub_id, config, "train", data_dir)
            rows = (row for i, row in enumerate(rows) if (i % 50 == 0) == (split == "validation"))
            for row in itertools.islice(rows, n):
                chat = convert(row, hub_id, skipped)
                if chat is not None:
                    chats.append(chat)
        else:
            raise UserError(
                f"--data {names}: no chats called {name!r}; there are arith, {', '.join(CHATS)}, joined by +"
            )
    report_skipped(skipped, f"{split} rows of {names}")
    if not chats:
        raise UserError(f"--data {names}: no usable conversation")
    return chats


def _gsm8k_chat(row: dict, source: str, skipped: Counter) -> list[dict] | None:
    """GSM8K's solution as thinking, without its calculator notes ``<<2*36=72>>``, and its gold answer in the tags."""
    question, answer = columns(row, ["question", "answer"], source)
    gold = _gold(answer, skipped)
    if gold is None or not str(question).strip():
        skipped["without a question"] += gold is not None
        return None
    thinking = answer.rsplit("####", 1)[0].strip()
    while "<<" in thinking and ">>" in thinking.split("<<", 1)[1]:
        before, rest = thinking.split("<<", 1)
        thinking = before + rest.split(">>", 1)[1]
    if not thinking:
        skipped["without a solution"] += 1
        return None
    return _pair(question, f"<think>{thinking}</think><answer>{gold}</answer>")


def _instruction_chat(instruction: str, context: str, response: str):
    def convert(row: dict, source: str, skipped: Counter) -> list[dict] | None:
        ask, more, reply = (
            str(value or "").strip() for value in columns(row, [instruction, context, response], source)
        )
        if not ask or not reply:
            skipped["with an empty instruction or response"] += 1
            return None
        return _pair(f"{ask}\n\n{more}" if more else ask, reply)

    return convert


def _dialogue_chat(row: dict, source: str, skipped: Counter) -> list[dict] | None:
    messages = dialogue(columns(row, ["chosen"], source)[0])
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        skipped["whose dialogue does not end in an answer"] += 1
        return None
    return messages


def dialogue(text: str) -> list[dict]:
    """HH-RLHF's ``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages.

    >>> dialogue("\\n\\nHuman: Hi\\n\\nAssistant: Hello!")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]


def _pair(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer}]


CHATS = {  # hub id, configuration, row -> messages
    "gsm8k": ("openai/gsm8k", "main", _gsm8k_chat),
    "alpaca": ("tatsu-lab/alpaca", None, _instruction_chat("instruction", "input", "output")),
    "dolly": ("databricks/databricks-dolly-15k", None, _instruction_chat("instruction", "context", "response")),
    "hh-harmless": ("Anthropic/hh-rlhf", "harmless-base", _dialogue_chat),
}


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

    def batch(self, rows) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(rows)
        return self.tokens[rows], self.loss_mask[rows], self.segments[rows]


def pack(chats: Sequence[Sequence[dict]], tokenizer: Tokenizer, length: int, packing: bool = True) -> PackedRows:
    """Lay conversations into rows of ``length`` tokens, each whole; one that is longer than a row is counted,
    reported and left out.

    A conversation goes into the first of the open rows with room for it. packing=False: one in each row.
    """
    encoded = [encode_chat(tokenizer, chat) for chat in chats]
    skipped = Counter(f"longer than {length} tokens" for ids, _ in encoded if len(ids) > length)
    report_skipped(skipped, "conversations")
    encoded = [(ids, mask) for ids, mask in encoded if len(ids) <= length]
    if not encoded:
        raise UserError(f"every conversation is longer than {length} tokens: use a larger max_seq_len")
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


@dataclass(frozen=True)
class Prompt:
    """A question as messages, and the number that answers it."""

    messages: tuple[dict, ...]
    gold: Decimal


def _gold(answer, skipped: Counter) -> Decimal | None:
    if "####" not in str(answer):
        skipped["with a gold answer without ####"] += 1
        return None
    try:
        return parse_gold(str(answer))
    except UserError:
        skipped["with a gold answer that is no number"] += 1
        return None


def load_prompts(name: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None) -> list[Prompt]:
    """``n`` prompts of "arith", "gsm8k" or "svamp" from the split "train", "validation" (of a dataset without one,
    every 50th row of train) or "test". The last two do not depend on the seed, so that every run is evaluated on the
    same questions.
    """
    if name == "arith":
        most, start = (4096, f"{seed} rl") if split == "train" else (512, split)
        found = arithmetic.problems(n or most, start, split)
        return [Prompt(({"role": "user", "content": p.question},), Decimal(p.answer)) for p in found]
    if name not in ("gsm8k", "svamp"):
        raise UserError(f"no prompts called {name!r}; there are arith, gsm8k, svamp")
    skipped, prompts = Counter(), []
    hub_id, config = ("openai/gsm8k", "main") if name == "gsm8k" else ("ChilleD/SVAMP", None)
    for i, row in enumerate(read_dataset(hub_id, config, "test" if split == "test" else "train", data_dir)):
        if split != "test" and (i % 50 == 0) != (split == "validation"):
            continue
        if name == "gsm8k":
            question, answer = columns(row, ["question", "answer"], hub_id)
        else:
            body, ask, answer = columns(row, ["Body", "Question", "Answer"], hub_id)
            question, answer = (
                f"{body.strip()}{'' if body.strip().endswith('.') else '.'} {ask.strip()}",
                f"#### {answer}",
            )
        gold = _gold(answer, skipped)
        if gold is None:
            continue
        if not question.strip():
            skipped["without a question"] += 1
            continue
        prompts.append(Prompt(({"role": "user", "content": question.strip()},), gold))
        if n is not None and len(prompts) == n:
            break
    report_skipped(skipped, f"{split} rows of {hub_id}")
    if not prompts:
        raise UserError(f"{hub_id} ({split}) has no usable row")
    return prompts


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
    chats = [_pair("2+3?", "5"), _pair("Hi", "Yo")]
    packed = pack(chats, demo, length=20)
    print(
        "two conversations in one row of 20 tokens; a target counts where loss is 1; a token sees its own document only"
    )
    for token, counts, segment in zip(packed.tokens[0], packed.loss_mask[0], packed.segments[0]):
        print(f"  document {segment}  loss {int(counts)}  {demo.decode([token])!r}")
