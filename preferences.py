"""Preferences: two answers to one prompt, and which of them was liked better.

A person who cannot write the best answer can still say which of two is better, and that is what most alignment data is:
``{prompt, chosen, rejected}``. The reward model learns to predict the choice; DPO and its relatives train the policy
on it directly; KTO needs only single answers, each labelled desirable or undesirable.

The loss of all of them lives in the difference between two answers, so the one thing that must not go wrong is to
lose it: too long a dialogue is cut at the beginning of its prompt, and the same prompt stands before both answers; a
pair whose answers are equal, or become equal when a very long answer is cut, teaches nothing and is left out. What is
left out or cut is counted and said.

An answer becomes a row [prompt | answer, end-of-text | padding], as in ``rollout.py``: column t of ``mask`` is about
token t+1.

Where the answers come from matters as much as which is better. Pairs that somebody else wrote tell a policy what it
would not have said anyway; a right and a wrong answer of its *own* show it the very point where it goes astray, and
``--policy`` makes such pairs, judged by ``verify.py``.

    python preferences.py                                                       # rows of two pairs
    python preferences.py --policy out/arith/sft --write own.jsonl              # the policy's own answers
    python preferences.py --data hh-harmless --data_dir DIR --write pairs.jsonl # any source as JSONL, to look at
"""

import dataclasses
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import arithmetic
from data import encode_prompts
from rollout import sample_answers, score, to_verify
from runtime import processes
from runtime.checkpoint import find_checkpoint, write_text
from runtime.config import AtLeast, Count, CountOrNone, parse, validate
from runtime.device import pick_device
from runtime.errors import UserError, run_main
from runtime.rows import EVERY, columns, converted, held_out, is_own, own_rows, read_dataset, report_skipped
from runtime.rows import sources as parts_of_data
from stages import load_stage
from texts import Prompt, dialogue, load_prompts, messages_of
from tokenizer import ByteTokenizer, Tokenizer, encode_answer, encode_chat
from transformer import Transformer

# ----------------------------------------------------------------------------------------------------------------------
# Where pairs come from


@dataclass(frozen=True)
class Pair:
    """Messages that end with the user's, the preferred answer, the other one, and, where it is known, what is wrong
    with that.
    """

    prompt: tuple[dict, ...]
    chosen: str
    rejected: str
    flaw: str = ""


@dataclass(frozen=True)
class Judged:
    """One answer and its label: what KTO learns from."""

    prompt: tuple[dict, ...]
    answer: str
    desirable: bool


LABELS = {"true": True, "1": True, "false": False, "0": False}
SOURCES = {  # hub id, configuration, split for training, split for the test
    "hh-harmless": ("Anthropic/hh-rlhf", "harmless-base", "train", "test"),
    "hh-helpful": ("Anthropic/hh-rlhf", "helpful-base", "train", "test"),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"),
}


def load_pairs(
    name: str | list[str], split: str, data_dir: str = "", seed: int = 0, n: int | None = None,
    rename: Sequence[str] = (),
) -> list[Pair]:  # fmt: skip
    """At most ``n`` pairs of "arith", of "sums" (plain ones, none held out), of a name in SOURCES, or of a user's data
    with the columns prompt, chosen and rejected; of several, in a list or joined by "+", at most ``n`` of each.

    split: "train", "validation" (of a dataset without one, every 50th row of train), "test", or "whole", which of a
    user's data is all of it, like "test", and of the others "validation".
    """
    if len(sources(name)) > 1:
        return [pair for part in sources(name) for pair in load_pairs(part, split, data_dir, seed, n, rename)]
    (name,) = sources(name)
    if split == "whole" and not is_own(name):
        split = "validation"
    if name == "arith":
        most, start = (2048, f"{seed}") if split == "train" else (512, split)
        found = arithmetic.preference_pairs(n or most, start, split)
        return [Pair(tuple(row["prompt"]), row["chosen"], row["rejected"], row["flaw"]) for row in found]
    if name == "sums":
        found = arithmetic.sum_pairs(n or 2048, f"{split} {seed}")
        return [Pair(tuple(row["prompt"]), row["chosen"], row["rejected"], row["flaw"]) for row in found]
    skipped = Counter()
    pairs = list(converted(itertools.islice(_rows(name, split, data_dir, rename), n), _read_pair, name, split, skipped))
    report_skipped(skipped, f"{split} pairs of {name}")
    if not pairs:
        raise UserError(f"{name} ({split}) has no usable pair")
    return pairs


def load_judged(
    name: str | list[str], split: str, data_dir: str = "", seed: int = 0, n: int | None = None,
    rename: Sequence[str] = (),
) -> list[Judged]:  # fmt: skip
    """Single answers with a label, in random order: both answers of each of ``n`` pairs, or the rows of a user's data
    with the columns prompt, completion and label.
    """
    if has_labels(name, data_dir, rename):
        (name,), skipped = sources(name), Counter()
        rows = itertools.islice(_rows(name, split, data_dir, rename), n)
        judged = list(converted(rows, _read_judged, name, split, skipped))
        report_skipped(skipped, f"{split} answers of {name}")
        if not judged:
            raise UserError(f"{name} ({split}) has no usable answer")
    else:
        pairs = load_pairs(name, split, data_dir, seed, n, rename)
        judged = [Judged(pair.prompt, pair.chosen, True) for pair in pairs]
        judged += [Judged(pair.prompt, pair.rejected, False) for pair in pairs]
    random.Random(f"judged {seed}").shuffle(judged)
    return judged


def has_labels(data: str | list[str], data_dir: str = "", rename: Sequence[str] = ()) -> bool:
    """Is this a dataset of single answers with labels?"""
    first, *more = sources(data)
    row = next(own_rows(first, "whole", data_dir, rename), {}) if not more and is_own(first) else {}
    return "label" in row and "completion" in row


def sources(data: str | list[str], own: str = "") -> list[str]:
    """The parts of "a+b", with the file ``own`` in place of "own", if it is given."""
    return [own if own and part == "own" else part for part in parts_of_data(data)]


def _rows(name: str, split: str, data_dir: str, rename: Sequence[str]):
    if is_own(name):
        return own_rows(name, "whole" if split == "test" else split, data_dir, rename)
    if name not in SOURCES:
        if name == "own":
            raise UserError("own answers need the policy that gives them: --policy out/arith/sft")
        raise UserError(
            f"--data {name}: no pairs called so; there are arith, {', '.join(SOURCES)}, a file of rows (.jsonl), and "
            "the datasets of the hub (org/name)"
        )
    hub_id, config, train, test = SOURCES[name]
    if split == "test":
        return read_dataset(hub_id, config, test, data_dir)
    rows = read_dataset(hub_id, config, train, data_dir)
    return (row for i, row in enumerate(rows) if (i % EVERY == 0) == (split != "train"))


def _read_judged(row: dict, name: str, skipped: Counter) -> Judged | None:
    prompt, answer, label = columns(row, ["prompt", "completion", "label"], name)
    messages, text = tuple(messages_of(prompt) or ()), _text(answer)
    if not messages:
        skipped["whose prompt is neither a text nor messages"] += 1
    elif not text:
        skipped["with an empty answer"] += 1
    elif str(label).lower() not in LABELS:
        skipped["with a label that is neither true nor false"] += 1
    else:
        return Judged(messages, text, LABELS[str(label).lower()])
    return None


def _read_pair(row: dict, name: str, skipped: Counter) -> Pair | None:
    """A row of any source as a pair, or None, with the reason counted.

    Without a prompt, chosen and rejected are two whole dialogues, equal up to the last answer: as HH-RLHF's text or,
    as in TRL's implicit prompts, as messages. With one, they are answers (UltraFeedback: messages, the last of which
    is the answer).
    """
    better, worse = columns(row, ["chosen", "rejected"], name)
    if "prompt" not in row:
        read = [dialogue(side) if isinstance(side, str) else messages_of(side) or [] for side in (better, worse)]
        for messages in read:
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                skipped["whose dialogue does not end in an answer"] += 1
                return None
        chosen, rejected = read
        if chosen[:-1] != rejected[:-1]:
            skipped["whose answers have different prompts"] += 1
            return None
        prompt, better, worse = tuple(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]
    else:
        prompt, better, worse = tuple(messages_of(row["prompt"]) or ()), _text(better), _text(worse)
    if not better or not worse:
        skipped["with an empty answer"] += 1
    elif better == worse:
        skipped["with two equal answers"] += 1
    elif not any(message["content"] for message in prompt):
        skipped["without a prompt"] += 1
    else:
        return Pair(prompt, better, worse, str(row.get("flaw", "")))
    return None


def _text(answer) -> str:
    """An answer's text: the answer itself, or the last of a list of messages; empty if it is neither."""
    messages = messages_of(answer)
    return messages[-1]["content"] if messages else ""


@torch.no_grad()
def sample_pairs(
    policy: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    n: int = 4,
    max_new: int = 48,
    seed: int = 0,
    size: int = 512,
    show: bool = True,
) -> list[Pair]:
    """``n`` answers of the policy to each question, at temperature 1. Each right one among them is paired with a wrong
    one, as far as they go. Answers that were cut off are passed over. ``size`` answers at a time.
    """
    longest, pairs = policy.config.max_seq_len - max_new, []
    encoded, prompts = encode_prompts(list(prompts), tokenizer, longest)
    for first in tqdm(range(0, len(prompts), max(1, size // n)), desc="answers", leave=False, disable=not show):
        some = slice(first, first + max(1, size // n))
        rollout = sample_answers(policy, tokenizer, encoded[some], n, max_new, 1.0, seed=seed * 1_000_003 + first)
        correct, _ = score(rollout.texts, [p.gold for p in prompts[some] for _ in range(n)], rollout.finished)
        for i, prompt in enumerate(prompts[some]):
            whole = [k for k in range(i * n, (i + 1) * n) if rollout.finished[k]]
            right, wrong = ([rollout.texts[k] for k in whole if correct[k] == value] for value in (1, 0))
            pairs += [Pair(prompt.messages, a, b, "own") for a, b in zip(right, wrong)]
    return pairs


def own_pairs(policy: Transformer, tokenizer: Tokenizer, checkpoint: str, seed: int) -> str:
    """The file with pairs of the policy's own answers to the embedded questions: on-policy pairs.

    They are sampled once for each seed, four answers to each of 4,096 questions, and kept beside the policy's
    checkpoint until that changes, so that all methods learn from the same ones.
    """
    found = find_checkpoint(checkpoint)
    path = found.with_name(f"own_pairs_{found.stem}_{seed}.jsonl")
    if processes.rank() == 0 and not (path.exists() and path.stat().st_mtime >= found.stat().st_mtime):
        prompts = load_prompts("arith", "train", seed=seed)
        write_pairs(path, pairs_of_answers(policy, tokenizer, prompts, checkpoint, seed=seed))
    processes.barrier(alone=True)
    return str(path)


def pairs_of_answers(
    policy: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], name: str, n: int = 4, max_new: int = 48,
    seed: int = 0,
) -> list[Pair]:  # fmt: skip
    """``sample_pairs``, with a line about what came of it; a policy without any pair is refused."""
    if policy.config.max_seq_len <= max_new:
        raise UserError(f"max_new_tokens {max_new} leaves no room in {policy.config.max_seq_len} tokens")
    pairs = sample_pairs(policy, tokenizer, prompts, n, max_new, seed)
    if not pairs:
        raise UserError(
            f"{name} gave no question both a right and a wrong answer: try more --samples or another --data"
        )
    print(f"{len(prompts):,} questions, {n} answers each: {len(pairs):,} pairs of a right and a wrong one")
    return pairs


def load_held_out_pairs(config, data: list[str], split: str, n: int) -> list[Pair]:
    """At most ``n`` pairs to validate on, as many of each source, as long as it has them."""
    parts = [load_pairs(name, split, config.data_dir, rename=config.columns) for name in data]
    turns = itertools.zip_longest(*parts)
    return [pair for turn in turns for pair in turn if pair is not None][:n]


def held_out_of(config) -> tuple[list[str], str]:
    """What a stage validates on, and which split of it: ``eval_data``, or the data itself, but for "own" pairs, whose
    questions were trained on, arith."""
    data, part = held_out(config)
    return list(dict.fromkeys("arith" if one == "own" else one for one in sources(data))), part


# ----------------------------------------------------------------------------------------------------------------------
# Rows of tokens


@dataclass
class PairRows:
    """Encoded pairs: three lists of ids each. Both answers of a pair follow the very same prompt."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    pairs: list[Pair]
    pad_id: int

    def __len__(self) -> int:
        return len(self.prompts)

    def lengths(self) -> list[int]:
        """Of the longer row of each pair."""
        return [len(p) + max(len(c), len(r)) for p, c, r in zip(self.prompts, self.chosen, self.rejected)]

    def batch(self, rows: Sequence[int], device=None) -> tuple[Tensor, Tensor, Tensor]:
        """``lay_out`` of b pairs as 2b rows: first all chosen answers, then all rejected ones."""
        answers = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
        return lay_out([self.prompts[i] for i in rows] * 2, answers, self.pad_id, device)


@dataclass
class JudgedRows:
    """Encoded single answers, and which of them are desirable."""

    prompts: list[list[int]]  # uncut: how much of one fits depends on the answer
    answers: list[list[int]]
    desirable: Tensor  # (N,) boolean
    pad_id: int
    length: int  # of a row, at most

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Sequence[int], device=None) -> tuple[Tensor, Tensor, Tensor]:
        return self._lay_out(rows, [self.answers[i] for i in rows], device)

    def mismatched(self, rows: Sequence[int], device=None) -> tuple[Tensor, Tensor, Tensor]:
        """The same prompts, each with the answer of the row before it in the whole data: as the order is random, one to
        another question."""
        return self._lay_out(rows, [self.answers[i - 1] for i in rows], device)  # row 0 takes the last one's

    def _lay_out(self, rows: Sequence[int], answers: list[list[int]], device):
        fitted = [fit(self.prompts[i], [answer], self.length) for i, answer in zip(rows, answers)]
        return lay_out([prompt for prompt, _ in fitted], [answer for _, (answer,) in fitted], self.pad_id, device)


def lay_out(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int, device=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [prompt | answer | padding]: tokens (N, T); mask (N, T-1) boolean, is token t+1 of the answer?; real (N, T)
    boolean, is it a token at all?
    """
    T = max(len(p) + len(a) for p, a in zip(prompts, answers))
    tokens = torch.full((len(prompts), T), pad_id)
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    ends = starts + torch.tensor([len(a) for a in answers])[:, None]
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    column = torch.arange(T)
    mask = (column >= starts) & (column < ends)  # about the token itself; shifted below
    return tokens.to(device), mask[:, 1:].to(device), (column < ends).to(device)


def fit(prompt: list[int], answers: Sequence[list[int]], length: int) -> tuple[list[int], list[list[int]]]:
    """A prompt and the answers to it, cut to at most ``length`` tokens together.

    The prompt loses its beginning, as far as it must and down to a quarter of the length; only then do answers lose
    their end.

    >>> fit([1, 2, 3, 4, 5, 6], [[7, 8, 9], [7, 8]], length=8)
    ([2, 3, 4, 5, 6], [[7, 8, 9], [7, 8]])
    """
    room = max(length - max(map(len, answers)), length // 4)
    prompt = prompt[-room:]
    return prompt, [answer[: length - len(prompt)] for answer in answers]


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, length: int) -> PairRows:
    """Pairs as ids, at most ``length`` in a row. Pairs whose answers a cut makes identical are left out, and
    counted."""
    rows, cut = PairRows([], [], [], [], tokenizer.pad_id), Counter()
    for pair in pairs:
        prompt = encode_chat(tokenizer, pair.prompt, add_generation_prompt=True)[0]
        answers = [encode_answer(tokenizer, text) for text in (pair.chosen, pair.rejected)]
        kept, (chosen, rejected) = fit(prompt, answers, length)
        if chosen == rejected:
            cut["identical after truncation (left out)"] += 1
            continue
        cut["with the beginning of the prompt cut"] += len(kept) < len(prompt)
        cut["with the end of an answer cut"] += [chosen, rejected] != answers
        rows.prompts.append(kept)
        rows.chosen.append(chosen)
        rows.rejected.append(rejected)
        rows.pairs.append(pair)
    _report_cut(cut, len(pairs), length, "pairs")
    if not len(rows):
        raise UserError(f"no pair is left at a length of {length} tokens: use a longer --max_length")
    return rows


def encode_judged(judged: Sequence[Judged], tokenizer: Tokenizer, length: int) -> JudgedRows:
    """Single answers as ids, at most ``length`` in a row. Those that a cut makes identical to another one with the
    opposite label are left out, and counted."""
    cut, encoded, labels = Counter(), [], defaultdict(set)
    for one in judged:
        prompt = encode_chat(tokenizer, one.prompt, add_generation_prompt=True)[0]
        whole = encode_answer(tokenizer, one.answer)
        kept, (answer,) = fit(prompt, [whole], length)
        row = (*kept, -1, *answer)
        labels[row].add(one.desirable)
        encoded.append((one.desirable, prompt, whole, row, len(kept) < len(prompt), answer != whole))
    rows, desirable = JudgedRows([], [], torch.empty(0), tokenizer.pad_id, length), []
    for label, prompt, whole, row, prompt_cut, answer_cut in encoded:
        if answer_cut and len(labels[row]) == 2:
            cut["of opposite labels, identical after truncation (left out)"] += 1
            continue
        cut["with the beginning of the prompt cut"] += prompt_cut
        cut["with the end of the answer cut"] += answer_cut
        rows.prompts.append(prompt)
        rows.answers.append(whole)
        desirable.append(label)
    rows.desirable = torch.tensor(desirable, dtype=torch.bool)
    _report_cut(cut, len(judged), length, "answers")
    if not len(rows):
        raise UserError(f"no answer is left at a length of {length} tokens: use a longer --max_length")
    return rows


def _report_cut(cut: Counter, n: int, length: int, what: str) -> None:
    cut = +cut  # without the zeros
    if cut and processes.rank() == 0:
        print(f"of {n} {what} at {length} tokens: " + ", ".join(f"{count} {why}" for why, count in cut.items()))


# ----------------------------------------------------------------------------------------------------------------------
# Looking at them


@dataclass(frozen=True)
class Config:
    data: str = "arith"
    """arith, sums, hh-harmless, hh-helpful, ultrafeedback, a file of rows (.jsonl), a dataset of the hub (org/name), or
    several, joined by "+"; with --policy: arith, gsm8k, svamp, or questions of your own, a file or on the hub."""
    columns: tuple[str, ...] = ()
    """The columns of your own data that have other names, as meaning=column, for example chosen=better."""
    split: Literal["train", "validation", "test", "whole"] = "train"
    """The split of the data; of your own data, train leaves out every 50th row, validation is those."""
    data_dir: str = ""
    """A local mirror of datasets, looked in before the hub."""
    n: CountOrNone = None
    """Use at most this many pairs; with --policy, questions (None: 4096 of arith, all of the others)."""
    seed: int = 0
    """The seed of the embedded pairs and of the sampling."""
    write: str = ""
    """Write them to this JSONL file."""
    policy: str = ""
    """Make pairs of this model's own answers: a run's folder or a checkpoint."""
    samples: Annotated[int, AtLeast(2)] = 4
    """With --policy: the number of answers to each question."""
    max_new_tokens: Count = 48
    """With --policy: an answer that does not end by then is passed over."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def collect(config: Config) -> list[Pair]:
    """The pairs that ``config`` asks for."""
    validate(config)
    if not config.policy:
        return load_pairs(config.data, config.split, config.data_dir, config.seed, config.n, config.columns)
    policy, tokenizer, _ = load_stage(config.policy, device=pick_device(config.device))
    prompts = load_prompts(config.data, config.split, config.data_dir, config.seed, config.n, config.columns)
    answers = config.samples, config.max_new_tokens, config.seed
    return pairs_of_answers(policy, tokenizer, to_verify(prompts, config.data), config.policy, *answers)


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """As JSONL, which ``load_pairs`` reads."""
    text = "".join(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    write_text(Path(path), text)


def main() -> None:
    config = parse(Config)
    pairs = collect(config)
    if config.write:
        write_pairs(config.write, pairs)
        print(f"{len(pairs):,} pairs in {config.write}")
        return
    print(f"{len(pairs):,} pairs of {config.data}, {config.split}; the first three:")
    for pair in pairs[:3]:
        said = "\n".join(f"  {m['role']}: {m['content']}" for m in pair.prompt)
        print(f"{said}\n  chosen:   {pair.chosen}\n  rejected: {pair.rejected}" + f"  ({pair.flaw})" * bool(pair.flaw))
    demo = ByteTokenizer()
    pair = Pair(({"role": "user", "content": "2+3?"},), "5", "23")
    tokens, mask, real = encode_pairs([pair], demo, 20).batch([0])
    print("\na pair as two rows; 1 = a token of the answer, whose log-probability counts")
    for name, row, counts, exists in zip(("chosen", "rejected"), tokens, mask, real):
        print(f"  {name}")
        for t, token in enumerate(row.tolist()):
            score = int(counts[t - 1]) if t else 0
            print(f"    {demo.decode([token])!r:18} {score}" + ("" if exists[t] else "  padding"))


if __name__ == "__main__":
    run_main(main)
