"""A few answers of a run in full, token by token: rollouts.jsonl.

A line is what one step saw: of reinforcement learning some questions with the group of answers to each; of preferences
some pairs or labelled answers, always the same. It holds ids, texts and numbers alone::

    {"step": 20, "stage": "grpo", "kind": "groups", "clip": [0.8, 1.2], "level": "token",
     "weights": {"correct": 1.0, ...}, "groups": [a group, ...]}
    a group:  {"question": "...", "gold": "25", "size": 4, "mean": 0.6, "std": 0.58, "equal": false,
               "prompt": [[ids], [texts]], "answers": [an answer, ...]}
    an answer:  {"ids": [...], "texts": [...], "mask": [...], "finished": true, "counts": true,
                 "reward": 1.1, "rewards": {"correct": 1.0, ...}, "advantage": 0.87,
                 "kl": 0.3, "ratio": 1.02,
                 "sampled": [...], "old": [...], "now": [...], "ref": [...]}

Of a token: ``sampled`` is its log-probability when it was drawn, ``old`` the same as training computes it, ``now`` that
of the policy after the step's updates, ``ref`` that of the reference, if there is one; PPO has ``advantages`` and
``values`` too. (Preferences have ``now`` and ``ref``, and ``beta``.) Column i of all of them is about ``ids[i]``, and
the mask is 1 where the policy chose it.

A line is appended whole, like one of metrics.jsonl: of a crash at most the last line is cut off, which readers leave
out, and a run that goes on forgets the lines that lie after its checkpoint. The file is bounded: at most ``RECORDS``
lines and the first and last step, of at most ``TOKENS`` tokens each and ``PROMPT`` of each prompt.
"""

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

NAME = "rollouts.jsonl"
RECORDS = 64  # of a run, besides the first and the last step
GROUPS = 12  # of a record
ANSWERS = 24
TOKENS = 4096  # of all answers of a record
PROMPT = 512  # of the prompt of a group
QUESTION = 4000  # characters
LINE = 8_000_000  # bytes; a longer line is none of ours


def is_kept(step: int, steps: int, every: int) -> bool:
    """Whether a step, counted from 0, is written down: the first, the last and every ``every``-th, or fewer if these
    are more than ``RECORDS``. It depends on nothing else, so a resumed run writes what it would have written.

    >>> [step for step in range(9) if is_kept(step, 9, every=4)]
    [0, 3, 7, 8]
    """
    every *= max(1, math.ceil(steps / every / RECORDS))
    return step == 0 or (step + 1) % every == 0 or step + 1 == steps


def choose_groups(lengths: Sequence[Sequence[int]], flat: Sequence[bool]) -> list[int]:
    """The groups that are written down, as many of the first ones as have room; if none of these has anything to teach,
    the first that has takes the last one's place.

    lengths: the tokens of each answer of each group; flat: of each group, are its answers worth the same?

    >>> choose_groups([[9, 9]] * 20, flat=[True] * 15 + [False] * 5)
    [0, 1, 2, 3, 4, 15]
    """
    chosen, answers, tokens = [], 0, 0
    for group, its in enumerate(lengths):
        answers, tokens = answers + min(len(its), ANSWERS), tokens + sum(its[:ANSWERS])
        if chosen and (answers > ANSWERS or tokens > TOKENS or len(chosen) == GROUPS):
            break
        chosen.append(group)
    lively = next((group for group, is_flat in enumerate(flat) if not is_flat), None)
    if lively is not None and lively not in chosen:
        chosen[-1] = lively
    return chosen


def texts_of(tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each id. Of a character whose bytes are spread over several tokens, the last one has it, and those
    before it have none."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(tokenizer.token_bytes(token)) for token in ids]
    if texts and (rest := decoder.decode(b"", final=True)):
        texts[-1] += rest
    return texts


def numbers_of(values: Tensor) -> list:
    """A row of numbers for JSON, which knows no NaN: four digits are enough for the eye."""
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


def answer_of(tokenizer, tokens: Tensor, mask: Tensor, most: int, **values: Tensor | None) -> dict:
    """One answer of a row [prompt | answer | padding]: from the first token that the mask marks to the last one.

    tokens: (T,); mask: (T-1,), column t about token t+1; values: (T-1,) each, by name. most: the tokens that are
    written down; of a longer answer the rest is counted, as ``more``.
    """
    marked = mask.nonzero().flatten().tolist()
    first, end = (marked[0], marked[-1] + 1) if marked else (0, 0)
    part = slice(first, min(end, first + most))
    ids = tokens[1:][part].tolist()
    row = {"ids": ids, "texts": texts_of(tokenizer, ids), "mask": [int(one) for one in mask[part].tolist()]}
    row |= {name: numbers_of(value[part].float()) for name, value in values.items() if value is not None}
    return row | ({"more": end - first - most} if end - first > most else {})


def prompt_of(tokenizer, tokens: Tensor, mask: Tensor) -> list[list]:
    """[ids, texts] of what stands before an answer, at most the last ``PROMPT`` tokens. tokens: (T,); mask: (T-1,)."""
    marked = mask.nonzero().flatten().tolist()
    ids = tokens[: marked[0] + 1].tolist()[-PROMPT:] if marked else []
    return [ids, texts_of(tokenizer, ids)]


def longest(n_answers: int) -> int:
    """The tokens that each of so many answers may have in a record."""
    return max(64, TOKENS // max(1, n_answers))


def append(folder: Path, record: dict) -> None:
    """Write a record as the next line."""
    with open(folder / NAME, "a", encoding="utf-8", newline="") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Reading, of files that anyone may have written


def records_in(path: Path) -> list[tuple[int, int, int]]:
    """(step, where it begins, bytes) of each whole line, without reading what is in it; of a step that was written
    twice, the last."""
    found: dict[int, tuple[int, int, int]] = {}
    place = 0
    with open(path, "rb") as file:
        for line in _lines(file):
            head = re.match(rb'\{"step": ?(\d{1,12}),', line)
            if head and line.endswith(b"}\n") and len(line) <= LINE:
                found[int(head[1])] = (int(head[1]), place, len(line))
            place += len(line)
    return sorted(found.values())


def _lines(file) -> Iterator[bytes]:
    """The lines of a file; of one that is too long the pieces, none of which is a record."""
    while line := file.readline(LINE + 1):
        yield line


def read_record(path: Path, place: int, size: int) -> dict | None:
    """The record there, ``checked``."""
    with open(path, "rb") as file:
        file.seek(place)
        line = file.read(min(size, LINE))
    try:
        return checked(json.loads(line))
    except (ValueError, RecursionError):
        return None


def read_all(path: Path) -> list[dict]:
    """All records that are whole."""
    records = [read_record(path, place, size) for _, place, size in records_in(path)]
    return [record for record in records if record is not None]


SERIES = ("sampled", "old", "now", "ref", "advantages", "values")


def checked(record) -> dict | None:
    """What can be shown of a record, in the types that it must have; None if it is none."""
    if not isinstance(record, dict) or not _whole(record.get("step")) or record.get("kind") not in KINDS:
        return None
    groups = [_group(one) for one in _list(record.get("groups"))]
    clip = [_number(value) for value in _list(record.get("clip"))]
    return {
        "step": record["step"], "stage": str(record.get("stage", ""))[:40], "kind": record["kind"],
        "groups": [one for one in groups if one is not None], "clip": clip if len(clip) == 2 else [None, None],
        "weights": _numbers(record.get("weights")), "beta": _number(record.get("beta")),
        "averaged": record.get("averaged") is True, "level": str(record.get("level", "token"))[:20],
    }  # fmt: skip


KINDS = ("groups", "preferences")


def _group(group) -> dict | None:
    if not isinstance(group, dict):
        return None
    answers = [_answer(one) for one in _list(group.get("answers"))]
    prompt = _list(group.get("prompt"))
    ids, texts = (_list(part) for part in prompt) if len(prompt) == 2 else ([], [])
    if len(ids) != len(texts) or not all(_whole(one) for one in ids):
        ids, texts = [], []
    gold = group.get("gold")
    return {
        "question": str(group.get("question", "")), "gold": None if gold is None else str(gold),
        "size": group["size"] if _whole(group.get("size")) else len(answers), "equal": group.get("equal") is True,
        "mean": _number(group.get("mean")), "std": _number(group.get("std")),
        "part": str(group.get("part", ""))[:40], "prompt": [ids, [str(one) for one in texts]],
        "answers": [one for one in answers if one is not None],
    }  # fmt: skip


def _answer(answer) -> dict | None:
    if not isinstance(answer, dict):
        return None
    ids, texts = _list(answer.get("ids")), _list(answer.get("texts"))
    if len(ids) != len(texts) or not all(_whole(one) for one in ids):
        return None
    shown = {"ids": ids, "texts": [str(one) for one in texts], "finished": answer.get("finished") is not False}
    shown |= {"counts": answer.get("counts") is not False}
    shown["mask"] = [1 if one else 0 for one in _list(answer.get("mask"))]
    shown["mask"] = shown["mask"] if len(shown["mask"]) == len(ids) else [1] * len(ids)
    for name in SERIES:
        values = [_number(one) for one in _list(answer.get(name))]
        if len(values) == len(ids):
            shown[name] = values
    shown |= {"rewards": _numbers(answer.get("rewards")), "more": answer["more"] if _whole(answer.get("more")) else 0}
    shown |= {name: _number(answer.get(name)) for name in ("reward", "advantage", "kl", "ratio")}
    return shown | {"label": str(answer["label"])[:40] if "label" in answer else ""}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return value if known and math.isfinite(value) else None


def _numbers(value) -> dict[str, float | None]:
    return {str(name)[:80]: _number(one) for name, one in value.items()} if isinstance(value, dict) else {}
