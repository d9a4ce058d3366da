"""Data: where text comes from, and how it becomes batches.

Three shapes are enough:

* a flat array of tokens, documents joined by end-of-text, of which pretraining reads random windows (``TokenFile``);
* conversations packed into rows of fixed length with a loss mask, and with document numbers so that no document
  attends to another (``load_chats``, ``pack``);
* prompts with a gold answer, for reinforcement learning and evaluation (``load_prompts``).

The embedded task needs no file. Some public datasets are known by name; they come from a local mirror, if ``data_dir``
names one, or from the hub. Any other data is a file of your own or a dataset's id on the hub (runtime/rows.py)::

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}
    {"prompt": "2+3?", "completion": "5"}      # also a chat
    {"prompt": "2+3?", "answer": 5}            # a question
    {"text": "Once upon a time ..."}           # a document

Nothing is dropped in silence: every row that cannot be used is counted by its reason, and the count is printed.

Run ``python data.py`` to see two conversations packed into one row.
"""

import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import arithmetic
from runtime.checkpoint import write_atomically
from runtime.errors import UserError
from runtime.rows import EVERY, columns, is_file, is_own, own_rows, read_dataset, report_skipped, sources
from tokenizer import BPETokenizer, ByteTokenizer, TiktokenTokenizer, Tokenizer, encode_chat
from verify import Gold, parse_gold, read_gold

# ----------------------------------------------------------------------------------------------------------------------
# Pretraining: one flat array of tokens

CORPORA = {  # hub id, configuration, column, split for training; that for validation, or each how manieth document
    "tinystories": ("roneneldan/TinyStories", None, "text", "train", "validation"),
    "pile": ("monology/pile-uncopyrighted", None, "text", "train", 100),
    "books": ("local/classic_books", None, "text", "train", 100),
    "hh-harmless": ("Anthropic/hh-rlhf", "harmless-base", "chosen", "train", EVERY),  # the later stages' split
}
ARITH_DOCUMENTS = 24_000


def text_documents(
    source: str, split: str, data_dir: str = "", seed: int = 0, limit: int | None = None, rename: Sequence[str] = ()
) -> Iterator[str]:
    """The documents of one split: "arith", a name in CORPORA, a text file, a folder of them, or rows with a "text". Of
    a user's data the split "whole" is all; of the others, what "validation" is.
    """
    if source == "arith":
        n, part = (ARITH_DOCUMENTS, "train") if split == "train" else (500, "validation")
        texts = iter(arithmetic.documents(n, seed=f"{seed} {part}"))
    elif source in CORPORA:
        hub_id, config, column, train, validation = CORPORA[source]
        own = split != "train" and isinstance(validation, str)
        rows = read_dataset(hub_id, config, validation if own else train, data_dir, streaming=True)
        if isinstance(validation, int):
            rows = (row for i, row in enumerate(rows) if (i % validation == 0) == (split != "train"))
        texts = (columns(row, [column], hub_id)[0] for row in rows)
    elif is_file(source) or (is_own(source) and not Path(source).exists() and not source.endswith((".txt", "/"))):
        rows = own_rows(source, split, data_dir, rename, streaming=True)
        texts = (columns(row, ["text"], source)[0] for row in rows)
    else:
        texts = _text_files(source, split)
    return itertools.islice(texts, limit)


def _text_files(source: str, split: str) -> Iterator[str]:
    """Each file's first 95 % train, the rest validates."""
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"--data {source}: neither arith, {', '.join(CORPORA)}, nor a text file, a folder with .txt files, a file "
            "of rows (.jsonl), or a dataset of the hub (org/name)"
        )
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        cut = int(0.95 * len(text))
        yield {"train": text[:cut], "validation": text[cut:]}.get(split, text)


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


def prepare_tokens(
    path: Path, tokenizer: Tokenizer, source: str, data_dir: str, seed: int, limit: int | None,
    rename: Sequence[str] = (), held_out: tuple[str, str] | None = None,
) -> None:  # fmt: skip
    """Make the token file of a run, unless it is there and was made from the same source with the same tokenizer.
    held_out: where its validation split comes from, a source and its split, if not from the same source.
    """
    held_out = held_out or (source, "validation")
    state = [tokenizer.state(), source, limit, seed if source == "arith" else None, *rename]
    state = json.dumps(state + ([] if held_out[0] == source else [held_out[0]]))
    fingerprint = f"{zlib.crc32(state.encode()):08x}"
    if path.exists():
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("fingerprint") == fingerprint:
                    return
        except OSError:
            pass  # damaged: made again
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"train": (source, "train"), "validation": held_out}
    splits = {name: text_documents(*part, data_dir, seed, limit, rename) for name, part in parts.items()}
    write_tokens(path, tokenizer, splits, fingerprint)


# ----------------------------------------------------------------------------------------------------------------------
# SFT: conversations in packed rows


def load_chats(
    names: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None, rename: Sequence[str] = ()
) -> list[list[dict]]:
    """Conversations of one or several sources, ``"gsm8k+dolly+my_chats.jsonl"``, as lists of messages that end with
    the assistant's.

    arith: ``n`` problems of the embedded task (192; for validation 256). The others have no validation split of their
    own here: every 50th row is kept for it. Of a user's data the split "whole" is all. ``n`` limits each source.
    """
    chats, skipped = [], Counter()
    for name in sources(names):
        if name == "arith":
            part, most = ("train", 192) if split == "train" else ("validation", 256)
            found = arithmetic.problems(n or most, f"{seed} sft", part)
            chats += [arithmetic.chat(problem) for problem in found]
            continue
        if name in CHATS:
            hub_id, config, convert = CHATS[name]
            rows = read_dataset(hub_id, config, "train", data_dir)
            rows = (row for i, row in enumerate(rows) if (i % EVERY == 0) == (split != "train"))
        elif is_own(name):
            hub_id, convert, rows = name, _own_chat, own_rows(name, split, data_dir, rename)
        else:
            raise UserError(
                f"--data {names}: no chats called {name!r}; there are arith, {', '.join(CHATS)}, a file of rows "
                "(.jsonl), and the datasets of the hub (org/name), joined by +"
            )
        found = (convert(row, hub_id, skipped) for row in itertools.islice(rows, n))
        chats += [chat for chat in found if chat is not None]
    report_skipped(skipped, f"{split} rows of {names}")
    if not chats:
        raise UserError(f"--data {names}: no usable conversation ({split})")
    return chats


def messages_of(value) -> list[dict] | None:
    """A text, as the user's message, or a list of messages; None if it is neither.

    Messages are ``{"role": "user", "content": "Hi"}`` or ShareGPT's ``{"from": "human", "value": "Hi"}``.
    """
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return [{"role": "user", "content": str(value).strip()}]
    if not isinstance(value, (list, tuple)) or not value:
        return None
    names = {"human": "user", "gpt": "assistant"}
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = names.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content.strip()})
    return messages


def _own_chat(row: dict, source: str, skipped: Counter) -> list[dict] | None:
    """A row with messages (or conversations), with prompt and completion, or with instruction, input and output."""
    if "instruction" in row and "output" in row:
        return _instruction_chat("instruction", "input", "output")({"input": ""} | row, source, skipped)
    if "completion" in row or "prompt" in row:
        prompt, completion = columns(row, ["prompt", "completion"], source)
        before, after = messages_of(prompt), messages_of(completion)
        if before is None or after is None:
            skipped["whose prompt or completion is neither a text nor messages"] += 1
            return None
        if isinstance(completion, (str, int, float)):
            after = [{"role": "assistant", "content": after[0]["content"]}]
        messages = before + after
    else:
        (found,) = columns(row, ["messages" if "conversations" not in row else "conversations"], source)
        messages = messages_of(found) if isinstance(found, list) else None
        if messages is None:
            skipped["whose messages are not a list of role and content"] += 1
            return None
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"] or len(messages) < 2:
        skipped["that do not end in an answer"] += 1
        return None
    return messages


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

    def n_documents(self) -> int:
        return int(self.segments.amax(dim=1).sum())

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
    """A question as messages; the answer to it, a number, a text or several texts that are right (None: unknown); and
    all columns of its row.
    """

    messages: tuple[dict, ...]
    gold: Gold | None
    row: dict = field(default_factory=dict, compare=False, repr=False)


def _gold(answer, skipped: Counter) -> Decimal | None:
    if "####" not in str(answer):
        skipped["with a gold answer without ####"] += 1
        return None
    try:
        return parse_gold(str(answer))
    except UserError:
        skipped["with a gold answer that is no number"] += 1
        return None


PROMPTS = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP", None)}  # hub id, configuration


def load_prompts(
    name: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None, rename: Sequence[str] = ()
) -> list[Prompt]:
    """``n`` prompts of "arith", "gsm8k", "svamp" or of a user's data from the split "train", "validation" (of a dataset
    without one, every 50th row of train) or "test" (of a user's data, or "whole": all of it). Only the first depends
    on the seed, so every run is evaluated on the same questions.
    """
    if name == "arith":
        split = "validation" if split == "whole" else split
        most, start = (4096, f"{seed} rl") if split == "train" else (512, split)
        found = arithmetic.problems(n or most, start, split)
        return [Prompt(messages_of_question(p.question), Decimal(p.answer), {"answer": p.answer}) for p in found]
    if name in PROMPTS:
        hub_id, config = PROMPTS[name]
        rows = read_dataset(hub_id, config, "test" if split == "test" else "train", data_dir)
        if split != "test":
            rows = (row for i, row in enumerate(rows) if (i % EVERY == 0) == (split != "train"))
        convert = _gsm8k_prompt if name == "gsm8k" else _svamp_prompt
    elif is_own(name):
        hub_id, convert = name, _own_prompt
        rows = own_rows(name, "whole" if split == "test" else split, data_dir, rename)
    else:
        raise UserError(
            f"no prompts called {name!r}; there are arith, {', '.join(PROMPTS)}, a file of rows (.jsonl), and the "
            "datasets of the hub (org/name)"
        )
    skipped: Counter = Counter()
    found = (convert(row, hub_id, skipped) for row in rows)
    prompts = list(itertools.islice((prompt for prompt in found if prompt is not None), n))
    report_skipped(skipped, f"{split} rows of {hub_id}")
    if not prompts:
        raise UserError(f"{hub_id} ({split}) has no usable row")
    return prompts


def messages_of_question(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text.strip()},)


def _gsm8k_prompt(row: dict, source: str, skipped: Counter) -> Prompt | None:
    question, answer = columns(row, ["question", "answer"], source)
    gold = _gold(answer, skipped)
    if gold is not None and not question.strip():
        skipped["without a question"] += 1
        return None
    return None if gold is None else Prompt(messages_of_question(question), gold, row)


def _svamp_prompt(row: dict, source: str, skipped: Counter) -> Prompt | None:
    body, ask, answer = columns(row, ["Body", "Question", "Answer"], source)
    body = body.strip() + ("" if body.strip().endswith(".") else ".")
    gold = _gold(f"#### {answer}", skipped)
    return None if gold is None else Prompt(messages_of_question(f"{body} {ask.strip()}"), gold, row)


def _own_prompt(row: dict, source: str, skipped: Counter) -> Prompt | None:
    """A row with a prompt, a question or messages, and perhaps with an answer and choices."""
    name = next((name for name in ("messages", "question") if name in row and "prompt" not in row), "prompt")
    messages = messages_of(columns(row, [name], source)[0])
    if messages and messages[-1]["role"] == "assistant":  # a whole conversation: its last answer is left to the policy
        messages = messages[:-1]
    if not messages or not messages[-1]["content"]:
        skipped["without a question"] += 1
        return None
    answer = row.get("answer")
    if row.get("choices"):
        options = [str(choice) for choice in row["choices"]]
        letters = [chr(ord("A") + i) for i in range(len(options))]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))
        messages[-1]["content"] += f"\n{lines}"
        if isinstance(answer, int) and 0 <= answer < len(options):
            answer = letters[answer]
        place = letters.index(answer) if answer in letters else options.index(answer) if answer in options else None
        if place is None:
            skipped["whose answer is none of its choices"] += 1
            return None
        return Prompt(tuple(messages), (letters[place], options[place]), row)
    try:
        gold = None if answer is None else read_gold(answer)
    except UserError:
        skipped["with an answer that is neither a number nor a text"] += 1
        return None
    return Prompt(tuple(messages), gold, row)


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
