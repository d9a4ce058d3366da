"""Texts: documents, conversations and questions, and where they come from.

The embedded task needs no file. Some public datasets are known by name; they come from a local mirror, if ``data_dir``
names one, or from the hub. Any other data is a file of your own, or a dataset's id on the hub (runtime/rows.py)::

    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}
    {"prompt": "2+3?", "completion": "5"}  # also a conversation
    {"prompt": "2+3?", "answer": 5}  # a question
    {"text": "Once upon a time ..."}  # a document

Nothing is dropped in silence: every row that cannot be used is counted by its reason, and the count is printed. Nothing
that is held out is trained on, in any stage: of a dataset without a validation split all stages keep the same rows (as
long as it goes by the same name).

Run ``python texts.py`` to see some rows become conversations and questions.
"""

import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import arithmetic
from runtime.errors import UserError
from runtime.rows import EVERY, columns, converted, is_file, is_own, own_rows, read_dataset, report_skipped, sources
from verify import Gold, parse_gold, read_gold

# ----------------------------------------------------------------------------------------------------------------------
# Documents, for pretraining

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
    """The documents of one split, of one or several sources, "books+tinystories"; ``limit`` is of each. A source is
    arith, a name in CORPORA, a text file, a folder of them, or rows with a "text". Of a user's data the split "whole"
    is all; of the others, what "validation" is.
    """
    for name in sources(source):
        yield from itertools.islice(_documents(name, split, data_dir, seed, rename), limit)


def _documents(source: str, split: str, data_dir: str, seed: int, rename: Sequence[str]) -> Iterator[str]:
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
    yield from texts


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
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no UTF-8 text (byte {error.start}): convert it first") from None
        if "\0" in text:
            raise UserError(f"{file} is no text: it holds null bytes")
        cut = int(0.95 * len(text))
        yield {"train": text[:cut], "validation": text[cut:]}.get(split, text)


# ----------------------------------------------------------------------------------------------------------------------
# Conversations, for fine-tuning


def load_chats(
    names: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None, rename: Sequence[str] = ()
) -> list[list[dict]]:
    """Conversations of one or several sources, ``"gsm8k+dolly+my_chats.jsonl"``, as lists of messages that end with
    the assistant's.

    arith: ``n`` problems of the embedded task (384; for validation 256). The others have no validation split of their
    own here: every 50th row is kept for it. Of a user's data the split "whole" is all. ``n`` limits each source.
    """
    chats, skipped = [], Counter()
    for name in sources(names):
        if name == "arith":
            part, most = ("train", 384) if split == "train" else ("validation", 256)
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
        chats += converted(itertools.islice(rows, n), convert, hub_id, split, skipped)
    report_skipped(skipped, f"{split} rows of {names}")
    if not chats:
        beside = "" if split == "train" else "; --eval_data names a file of its own for it"
        raise UserError(f"--data {names}: no usable conversation ({split}{beside})")
    return chats


def messages_of(value) -> list[dict] | None:
    """A text, as the user's message, or a list of messages; None if it is neither.

    Messages are ``{"role": "user", "content": "Hi"}`` or ShareGPT's ``{"from": "human", "value": "Hi"}``.
    """
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value == value:  # NaN is no text
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
    conversation = next((name for name in ("messages", "conversations") if name in row), None)
    if "completion" not in row and conversation is None and "instruction" in row and "output" in row:
        return _instruction_chat("instruction", "input", "output")({"input": ""} | row, source, skipped)
    if "completion" in row or (conversation is None and "prompt" in row):
        prompt, completion = columns(row, ["prompt", "completion"], source)
        before, after = messages_of(prompt), messages_of(completion)
        if before is None or after is None:
            skipped["whose prompt or completion is neither a text nor messages"] += 1
            return None
        if isinstance(completion, (str, int, float)):
            after = [{"role": "assistant", "content": after[0]["content"]}]
        messages = before + after
    else:
        (found,) = columns(row, [conversation or "messages"], source)
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


# ----------------------------------------------------------------------------------------------------------------------
# Questions, for reinforcement learning and evaluation


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
    prompts = list(itertools.islice(converted(rows, convert, hub_id, split, skipped), n))
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
    if "choices" in row:
        if not isinstance(row["choices"], (list, tuple)) or not row["choices"]:
            skipped["whose choices are no list"] += 1
            return None
        options = [str(choice) for choice in row["choices"]]
        letters = [chr(ord("A") + i) for i in range(len(options))]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))
        messages[-1]["content"] += f"\n{lines}"
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
            answer = letters[answer]
        answer = str(answer)
        place = letters.index(answer) if answer in letters else options.index(answer) if answer in options else None
        if place is None:
            skipped["whose answer is none of its choices"] += 1
            return None
        return Prompt(tuple(messages), (letters[place], options[place]), row)
    try:
        gold = read_gold(answer)
    except UserError:  # perhaps only a reward of the user's own reads it
        gold = None
    return Prompt(tuple(messages), gold, row)


if __name__ == "__main__":
    rows = [
        {"prompt": "2+3?", "completion": "5"},
        {"messages": [*messages_of("Hi"), {"role": "assistant", "content": "Yo"}]},
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        {"prompt": "2+3?", "answer": "#### 5"},
        {"prompt": "Which is odd?", "choices": ["2", "3"], "answer": 1},
    ]
    with tempfile.TemporaryDirectory() as folder:
        for i, row in enumerate(rows):
            path = Path(folder) / f"{i}.jsonl"
            path.write_text(json.dumps(row))
            print(json.dumps(row))
            if "answer" in row:
                (question,) = load_prompts(str(path), "whole")
                print(f"  {question.messages[-1]['content']!r}, to be answered by {question.gold}")
            else:
                (messages,) = load_chats(str(path), "whole")
                print("".join(f"  {message['role']}: {message['content']!r}" for message in messages))
