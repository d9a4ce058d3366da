"""Verifiable rewards: did the model answer, and is the answer right? No model judges; a rule does.

An answer looks like this, with white space allowed around the parts and the number::

    <think>4+3=7 7-2=5</think><answer>5</answer>

A policy learns whatever earns reward, so every looseness of the rule will be found and used. Ours is strict: one
thinking part that is not empty, one answer part, nothing after it; in the answer one plain number and nothing else.
Refused are lists ("3 or 5"), sums ("2+3"), units, percent, ``1_000``, ``1e3``, digits of other scripts, thousands
separators in the wrong place, a second pair of tags, tags inside the thinking, tags in capitals. ``$``, a sign,
separators in the right place, a final full stop and the Unicode minus are accepted. Numbers are compared exactly, as
decimals: 72 is 72.0, and no string from the model is ever evaluated.

``correctness_reward`` is 0 if there is no valid answer: a right number in the wrong place earns nothing. Where the
reference is a text, as in multiple choice, the answer part must be that text, but for case and white space.

A rule of your own is a Python function in a file (``--reward my_rewards.py``)::

    def short(prompt, answer, row):
        return 1.0 if len(answer) < 80 else 0.0

``prompt`` is the question, ``answer`` what the policy wrote, and ``row`` holds all columns of the question's row. Each
public function of the file is one reward, by its name; NaN says that an answer cannot be judged. ``row`` also has
``row["finished"]``: whether the answer ended by itself. docs/yours.md has an example that learns.

Run ``python verify.py`` for a table of what passes and what does not.
"""

import functools
import inspect
import math
import re
import runpy
import traceback
from collections.abc import Callable
from decimal import Decimal
from types import FunctionType

from runtime.errors import RewardError, UserError
from runtime.words import WORDS

Gold = Decimal | tuple[str, ...]  # a reference answer: a number, or the texts that are right

# The whole answer, from the first character to the last. The lookahead in THINKING refuses any further tag inside the
# thinking.
_TAG = r"(?i:</?(?:think|answer)>)"
_SHAPE = re.compile(
    rf"\s*<think>(?P<thinking>(?:(?!{_TAG}).)*)</think>\s*<answer>(?P<answer>(?:(?!{_TAG}).)*)</answer>\s*", re.DOTALL
)
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?\.?", re.ASCII)
_ANYWHERE = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?", re.ASCII)
_GOLD = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)


def _number(text: str) -> Decimal | None:
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if len(text) > 32 or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace("$", "").replace(",", "").removesuffix("."))


def extract_answer(text: str) -> Decimal | None:
    """The number in the answer part, or None if the text does not have the strict form.

    >>> extract_answer("<think>4+3=7</think> <answer>$1,007.50</answer>")
    Decimal('1007.50')
    >>> extract_answer("<think>4+3=7</think><answer>5-3</answer>") is None
    True
    >>> extract_answer("<think></think><answer>7</answer>") is None
    True
    """
    answer = _answer_part(text)
    return None if answer is None else _number(answer)


def extract_text(text: str) -> str | None:
    """The answer part as a text, in lower case, white space made single, or None if there is none or the form is wrong.

    >>> extract_text("<think>The largest is Asia.</think><answer> South  Asia. </answer>")
    'south asia'
    """
    return _plain(_answer_part(text) or "") or None


def _answer_part(text: str) -> str | None:
    shape = _SHAPE.fullmatch(text)
    return None if shape is None or not shape["thinking"].strip() else shape["answer"]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def read_answer(text: str, gold: Gold) -> Decimal | str | None:
    """The answer as a number, or where ``gold`` is a text, as a text; None if it cannot be read."""
    return extract_text(text) if isinstance(gold, tuple) else extract_answer(text)


def is_right(answer: Decimal | str | None, gold: Gold) -> bool:
    """Whether an answer that ``read_answer`` has read is ``gold``, or one of its texts."""
    return answer is not None and (
        answer in {_plain(one) for one in gold} if isinstance(gold, tuple) else answer == gold
    )


def correctness_reward(text: str, gold: Gold | str | int) -> float:
    """1.0 if the answer equals ``gold``, else 0.0 (also when there is no valid answer)."""
    gold = gold if isinstance(gold, tuple) else parse_gold(gold)
    return float(is_right(read_answer(text, gold), gold))


def format_reward(text: str, gold: Gold | str | int = 0) -> float:
    """1.0 if the text has the strict form, whatever its answer: a number, or where ``gold`` is a text, any text."""
    return float(read_answer(text, gold) is not None)


def lax_correctness_reward(text: str, gold: Decimal | str | int, verifier: str = "last") -> float:
    """1.0 if the "last" number of the text, wherever it stands, equals ``gold``; or if "any" of its numbers does.

    Many public verifiers fall back on such rules. They are here to be hacked (docs/experiments/hack.md); nothing
    in the book trains with them unless told to.

    >>> [lax_correctness_reward(text, 7) for text in ("so it is 7", "7 or 8")]
    [1.0, 0.0]
    >>> lax_correctness_reward("7 or 8", 7, "any")
    1.0
    """
    if verifier not in ("last", "any"):
        raise ValueError(f"verifier {verifier!r}: last or any")
    numbers = [Decimal(n.replace(",", "")) for n in _ANYWHERE.findall(text)]
    return float(parse_gold(gold) in (numbers[-1:] if verifier == "last" else numbers))


def integer_reward(text: str) -> float:
    """1.0 if the answer is a whole number (7, 1,080, 7.0), else 0.0.

    >>> [integer_reward(f"<think>14/2=7</think><answer>{number}</answer>") for number in ("7", "3.5")]
    [1.0, 0.0]
    """
    answer = extract_answer(text)
    return float(answer is not None and answer == answer.to_integral_value())


def length_reward(n_tokens: int, limit: int) -> float:
    """1.0 if the answer took at most ``limit`` tokens, its end-of-text among them, else 0.0."""
    return float(n_tokens <= limit)


def overlong_penalty(n_tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13): 0 up to ``limit - buffer`` tokens, then falling in a
    straight line to -1 at ``limit``, and -1 beyond.

    >>> [overlong_penalty(n, limit=20, buffer=5) for n in (15, 16, 20, 25)]
    [0.0, -0.2, -1.0, -1.0]
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"a buffer of {buffer} tokens in a limit of {limit}")
    return max(-1.0, min(0.0, (limit - buffer - n_tokens) / buffer))


def read_gold(answer) -> Gold:
    """A reference answer of a user's data: a number, a text that holds one or ends in ``#### 7``, any other text, or a
    list of texts of which each is right.

    >>> read_gold("1,080"), read_gold("Paris"), read_gold(["Paris", "Paris, France"])
    (Decimal('1080'), ('Paris',), ('Paris', 'Paris, France'))
    """
    if isinstance(answer, str):
        answer = answer.replace("\N{MINUS SIGN}", "-")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return Decimal(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        return Decimal(str(answer))
    if isinstance(answer, str) and ("####" in answer or _GOLD.fullmatch(answer.strip())):
        return parse_gold(answer)
    texts = answer if isinstance(answer, (list, tuple)) else [str(answer)] if isinstance(answer, (str, bool)) else []
    if not texts or not all(isinstance(text, str) and _plain(text) for text in texts):
        raise UserError(f"not a reference answer: {str(answer)[:60]!r}")
    return tuple(texts)


def parse_gold(gold: Decimal | str | int) -> Decimal:
    """The reference answer as a Decimal: a number, or GSM8K's ``... #### 1,080``, of which the part after ``####``
    counts.

    >>> parse_gold("He has 2*36 = <<2*36=72>>72 eggs.\\n#### 72")
    Decimal('72')
    """
    if isinstance(gold, (Decimal, int)):
        return Decimal(gold)
    if gold.count("####") > 1:
        raise UserError(f"a reference answer with several ####: {gold[-60:]!r}")
    text = gold.rsplit("####", 1)[-1].strip()
    if not _GOLD.fullmatch(text):
        raise UserError(f"not a reference answer: {gold[-60:]!r}")
    return Decimal(text.replace("$", "").replace(",", ""))


# ----------------------------------------------------------------------------------------------------------------------
# Rewards of the user's own

Reward = Callable[[str, str, dict], float]
TAKEN = {*WORDS, "always", "show", "tokens", "n", "low", "high", "cut_off", "stage", "path", "data"}
TAKEN -= {"correct", "formatted", "short", "integer"}  # a reward of the user's own may stand in for these


@functools.cache
def load_rewards(path: str) -> dict[str, Reward]:
    """The public functions of a Python file, by name: each one a reward. A file without any is a ``UserError``."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"--reward {path}: {error.strerror}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}") from None
    found = {
        name: value
        for name, value in names.items()
        if isinstance(value, FunctionType)
        and inspect.unwrap(value).__code__.co_filename == path
        and not name.startswith("_")
    }
    for name, function in found.items():
        if name in TAKEN:
            raise UserError(
                f"{path}: every run logs a figure called {name}; call the reward {name}_reward, for example"
            )
        try:
            inspect.signature(function).bind("prompt", "answer", {})
        except TypeError:
            takes = f"{name}{inspect.signature(function)}"
            raise UserError(
                f"{path}: {takes} should take three arguments, (prompt, answer, row); a helper's name begins with an "
                f"underscore: _{name}"
            ) from None
    if not found:
        raise UserError(f"{path} defines no function: write def my_reward(prompt, answer, row): return a number")
    return found


def call_reward(name: str, reward: Reward, prompt: str, answer: str, row: dict) -> float:
    """The reward of one answer as a float, NaN if it is None; whatever goes wrong in it is a ``RewardError``."""
    where = f"the answer {answer[:80]!r} to {str(row)[:300]}"
    try:
        value = reward(prompt, answer, row)
    except Exception as error:
        shown = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        file = inspect.unwrap(reward).__code__.co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        at = f" in line {lines[-1]} of {file}" if lines else ""  # none if a decorator from elsewhere raised it
        raise RewardError(f"the reward {name} failed{at} ({shown}) on {where}") from None
    try:
        value = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(f"the reward {name} returned {str(value)[:80]!r}, which is no number, for {where}") from None
    if math.isinf(value):
        raise RewardError(f"the reward {name} is infinite for {where}")
    return value


if __name__ == "__main__":
    for text in [
        "<think>4+3=7</think><answer>7</answer>",
        "<think>4+3=7</think>\n<answer> 7.0 </answer>\n",
        "<think>4+3=7</think><answer>8</answer>",
        "7",
        "<answer>7</answer>",
        "<think></think><answer>7</answer>",
        "<think>4+3=7</think><answer>7 or 8</answer>",
        "<think>4+3=7</think><answer>4+3</answer>",
        "<think>4+3=7</think><answer>7</answer><answer>8</answer>",
        "<think>4+3=7</think><answer>7</answer> I hope this helps!",
        "<THINK>4+3=7</THINK><ANSWER>7</ANSWER>",
        "<think>is it <answer>7</answer>?</think><answer>7</answer>",
    ]:
        print(f"format {format_reward(text):.0f}  correct {correctness_reward(text, 7):.0f}  {text!r}")
