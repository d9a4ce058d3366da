"""Verifiable rewards: did the model answer, and is the answer right? No model judges; a rule does.

An answer looks like this, with white space allowed around the parts and the number::

    <think>4+3=7 7-2=5</think><answer>5</answer>

A policy learns whatever earns reward, so every looseness of the rule will be found and used. Ours is strict: one
thinking part that is not empty, one answer part, nothing after it; in the answer one plain number and nothing else.
Refused are lists ("3 or 5"), sums ("2+3"), units, percent, ``1_000``, ``1e3``, digits of other scripts, thousands
separators in the wrong place, a second pair of tags, tags inside the thinking, tags in capitals. ``$``, a sign,
separators in the right place, a final full stop and the Unicode minus are accepted. Numbers are compared exactly, as
decimals: 72 is 72.0, and no string from the model is ever evaluated.

``correctness_reward`` is 0 if there is no valid answer: a right number in the wrong place earns nothing.

Run ``python verify.py`` for a table of what passes and what does not.
"""

import re
from decimal import Decimal

from runtime.errors import UserError

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
    shape = _SHAPE.fullmatch(text)
    if shape is None or not shape["thinking"].strip():
        return None
    return _number(shape["answer"])


def correctness_reward(text: str, gold: Decimal | str | int) -> float:
    """1.0 if the answer equals ``gold``, else 0.0 (also when there is no valid answer)."""
    answer = extract_answer(text)
    return float(answer is not None and answer == parse_gold(gold))


def format_reward(text: str) -> float:
    """1.0 if the text has the strict form, whatever its number."""
    return float(extract_answer(text) is not None)


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
