"""The embedded task: a small world of stories and sums on which the whole book can be trained, without a network or a
file.

People have things; they find, lose, buy, give and share them; questions ask how many are left. From a seed this file
makes all that the stages need:

* ``documents``: text for pretraining, in which stories, plain sums and worked questions occur, but no chat and no tags;
* ``problems``: questions with their steps and answer, for SFT (with ``solution``) and for RL (the answer alone);
* ``preference_pairs``: a right and a wrong answer to one question, where the truth about which is better is known
  exactly.

The split of a question (train, validation or test) is decided by its kind and its numbers alone, not by its words,
and for all stages at once: no stage of training, in any seed, ever sees the numbers of a held-out question in its kind
of story, whoever owns the apples; and what a method is tuned on is not what it is tested on.

Run ``python arithmetic.py`` to read some of it.
"""

import hashlib
import operator
import random
import zlib
from dataclasses import dataclass

NAMES = [
    "Tom",
    "Mia",
    "Ben",
    "Ana",
    "Sam",
    "Eva",
    "Max",
    "Lily",
    "Leo",
    "Zoe",
    "Finn",
    "Ruth",
    "Omar",
    "Ida",
    "Jack",
    "Nora",
    "Hugo",
    "Kim",
    "Paul",
    "Rosa",
]
THINGS = [
    "apples",
    "pears",
    "plums",
    "nuts",
    "stones",
    "shells",
    "books",
    "coins",
    "cards",
    "eggs",
    "cakes",
    "pens",
    "stamps",
    "balls",
    "keys",
    "bells",
]
BOXES = ["boxes", "bags", "baskets", "jars"]
PLACES = ["the market", "the garden", "the river", "school", "the hill", "the old barn", "town", "the forest"]

# kind -> the ways to ask it. {A} and {B} are people, {x} things, {box} what things come in, {a} {b} {c} numbers.
QUESTIONS = {
    "gain": (
        "{A} has {a} {x}. {B} gives {A} {b} more. How many {x} does {A} have now?",
        "{A} has {a} {x} and finds {b} more. How many {x} does {A} have?",
        "{A} had {a} {x} and bought {b} more. How many {x} does {A} have?",
    ),
    "lose": (
        "{A} has {a} {x} and gives {b} of them to {B}. How many {x} does {A} have left?",
        "{A} had {a} {x} but lost {b} of them. How many {x} are left?",
        "There are {a} {x}. {A} takes {b} away. How many {x} are left?",
    ),
    "gain_lose": (
        "{A} has {a} {x}. {B} gives {A} {b} more. Then {A} loses {c}. How many {x} does {A} have now?",
        "{A} had {a} {x}, bought {b} more and gave {c} to {B}. How many {x} does {A} have left?",
    ),
    "lose_gain": (
        "{A} has {a} {x} and gives {b} of them to {B}. Then {A} finds {c} more. How many {x} does {A} have now?",
        "{A} had {a} {x}, lost {b} of them and bought {c} more. How many {x} does {A} have?",
    ),
    "groups": (
        "{A} has {a} {box} with {b} {x} in each. How many {x} does {A} have?",
        "There are {b} {x} in each of the {a} {box} of {A}. How many {x} is that?",
    ),
    "groups_gain": (
        "{A} has {a} {box} with {b} {x} in each and {c} more {x}. How many {x} does {A} have?",
        "{A} buys {a} {box} with {b} {x} in each. {B} gives {A} {c} more. How many {x} does {A} have?",
    ),
    "share": (
        "{A} shares {a} {x} equally among {b} friends. How many {x} does each friend get?",
        "{A} puts {a} {x} into {b} {box}, the same number in each. How many {x} are in each?",
    ),
    "share_gain": (
        "{A} shares {a} {x} equally among {b} friends. Each then finds {c} more. How many {x} does each friend have?",
        "{A} puts {a} {x} into {b} {box}, the same number in each, then {c} more into each. How many {x} are in each?",
    ),
    "both": (
        "{A} has {a} {x}. {B} has {b} more than {A}. How many {x} do they have together?",
        "{B} has {b} more {x} than {A}. {A} has {a}. How many {x} do both have together?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A question, the steps that solve it (``("4+3=7", "7-2=5")``) and the answer (5)."""

    kind: str
    numbers: tuple[int, ...]
    question: str
    steps: tuple[str, ...]
    answer: int


def split_of(kind: str, numbers: tuple[int, ...]) -> str:
    """Of the combinations of kind and numbers, seven in eight are for "train"; half of the rest is for "validation",
    half for "test".
    """
    name = f"{kind} {numbers}".encode()
    if zlib.crc32(name) % 8:
        return "train"
    return ("validation", "test")[hashlib.sha256(name).digest()[0] % 2]


def _numbers(rng: random.Random, kind: str) -> tuple[int, ...]:
    small = lambda: rng.randint(2, 9)  # noqa: E731
    if kind == "gain":
        return rng.randint(2, 40), rng.randint(2, 19)
    if kind == "lose":
        a = rng.randint(4, 50)
        return a, rng.randint(2, min(a - 1, 19))
    if kind == "gain_lose":
        a, b = rng.randint(2, 30), rng.randint(2, 19)
        return a, b, rng.randint(2, min(a + b - 1, 19))
    if kind == "lose_gain":
        a = rng.randint(4, 40)
        return a, rng.randint(2, min(a - 1, 19)), rng.randint(2, 12)
    if kind == "groups":
        return small(), small()
    if kind == "groups_gain":
        return small(), small(), rng.randint(2, 12)
    if kind in ("share", "share_gain"):
        b = small()
        return (b * small(), b) if kind == "share" else (b * small(), b, rng.randint(2, 12))
    return rng.randint(2, 20), rng.randint(2, 12)  # both: a + (a + b)


# The first step of each kind; some have a second.
FIRST = {
    "gain": "+", "lose": "-", "gain_lose": "+", "lose_gain": "-", "groups": "*", "groups_gain": "*",
    "share": "/", "share_gain": "/", "both": "+",
}  # fmt: skip


def _step(a: int, sign: str, b: int) -> tuple[str, int]:
    value = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}[sign](a, b)
    return f"{a}{sign}{b}={value}", value


def _steps(kind: str, n: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
    first, value = _step(n[0], FIRST[kind], n[1])
    if kind == "both":  # B has more than A: then A's and B's
        second, value = _step(n[0], "+", value)
    elif len(n) == 3:
        second, value = _step(value, "-" if kind == "gain_lose" else "+", n[2])
    else:
        return (first,), value
    return (first, second), value


def make_problem(rng: random.Random, split: str = "train") -> Problem:
    """One problem of a random kind, from that part of the world."""
    kind = rng.choice(list(QUESTIONS))
    numbers = _numbers(rng, kind)
    while split_of(kind, numbers) != split:
        numbers = _numbers(rng, kind)
    A, B = rng.sample(NAMES, 2)
    words = {"A": A, "B": B, "x": rng.choice(THINGS), "box": rng.choice(BOXES)} | dict(zip("abc", numbers))
    steps, answer = _steps(kind, numbers)
    return Problem(kind, numbers, rng.choice(QUESTIONS[kind]).format(**words), steps, answer)


def problems(n: int, seed: int | str, split: str = "train") -> list[Problem]:
    """``n`` problems, no question twice. The same seed gives the same list."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split {split!r}: train, validation or test")
    rng = random.Random(f"problems {seed} {split}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = make_problem(rng, split)
        found.setdefault(problem.question, problem)
    return list(found.values())


def solution(problem: Problem) -> str:
    """The answer in the form that ``verify.py`` accepts.

    >>> solution(Problem("gain_lose", (4, 3, 2), "", ("4+3=7", "7-2=5"), 5))
    '<think>4+3=7 7-2=5</think><answer>5</answer>'
    """
    return f"<think>{' '.join(problem.steps)}</think><answer>{problem.answer}</answer>"


def chat(problem: Problem) -> list[dict]:
    """Question and solution as a conversation."""
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": solution(problem)}]


# ----------------------------------------------------------------------------------------------------------------------
# Text for pretraining


def _sum(rng: random.Random) -> str:
    while True:
        kind = rng.choice(("gain", "lose", "groups", "share", "gain_lose"))
        steps, _ = _steps(kind, _numbers(rng, kind))
        return steps[-1]


def _story(rng: random.Random) -> str:
    """Two people and what happens to their things; every count that is told is true, and no event, nor any two that
    make a question of two steps, has the numbers of a held-out one.
    """
    A, B = rng.sample(NAMES, 2)
    x, place = rng.choice(THINGS), rng.choice(PLACES)
    have = rng.randint(2, 30)
    lines = [
        rng.choice((
            f"One day {A} went to {place} with {have} {x}.",
            f"{A} lived near {place} and had {have} {x}.",
            f"{A} and {B} met at {place}. {A} had {have} {x}.",
        ))
    ]  # fmt: skip
    last = ()  # the kind of the event before, and its numbers
    for _ in range(rng.randint(1, 3)):
        more = have < 5 or (have < 40 and rng.random() < 0.5)
        n = rng.randint(2, 19) if more else rng.randint(2, min(have - 2, 19))
        kind = "gain" if more else "lose"
        told = [(kind, (have, n))]
        if last and last[0] != kind:
            told.append((f"{last[0]}_{kind}", (*last[1], n)))
        if any(split_of(*question) != "train" for question in told):
            continue
        last = told[0]
        if more:
            event = rng.choice((f"{B} gave {A} {n} more", f"{A} found {n} more", f"{A} bought {n} more"))
            have += n
        else:
            event = rng.choice((f"{A} lost {n} of them", f"{A} gave {n} to {B}", f"{A} sold {n} of them"))
            have -= n
        lines.append(rng.choice((f"Then {event}.", f"{event}.")) + f" Now {A} had {have} {x}.")
    lines.append(rng.choice((f"{A} was happy.", f"{B} smiled.", "They went home.", f"It was a good day at {place}.")))
    return " ".join(lines)


def _worked(rng: random.Random) -> str:
    """A question with its steps and answer, in another form than the chat has."""
    problem = make_problem(rng)
    return f"{problem.question} We know {', '.join(problem.steps)}. So it is {problem.answer}."


def documents(n: int, seed: int) -> list[str]:
    """``n`` documents: three tenths stories, three tenths plain sums, four tenths worked questions."""
    rng = random.Random(f"documents {seed}")
    out = []
    for _ in range(n):
        kind = rng.random()
        if kind < 0.3:
            out.append(_story(rng))
        elif kind < 0.6:
            out.append(" ".join(_sum(rng) for _ in range(8)))
        else:
            out.append(_worked(rng))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Preferences


def preference_pairs(n: int, seed: int | str, split: str = "train") -> list[dict]:
    """``{"prompt": messages, "chosen": text, "rejected": text, "flaw": kind}``: chosen is right, rejected has one
    known flaw.

    The flaw is a wrong digit in one of the sums (the error is carried through to the answer), a wrong operation, a
    skipped second step, or the right answer outside the answer tags.
    """
    rng = random.Random(f"pairs {seed} {split}")
    pairs = []
    for problem in problems(n, seed, split):
        flaw, rejected = _flawed(rng, problem)
        prompt = [{"role": "user", "content": problem.question}]
        pairs.append({"prompt": prompt, "chosen": solution(problem), "rejected": rejected, "flaw": flaw})
    return pairs


def sum_pairs(n: int, seed: int) -> list[dict]:
    """The same of plain sums: right, and with one wrong digit. Plain sums belong to no story, so none is held out."""
    rng = random.Random(f"sum pairs {seed}")
    pairs = []
    for _ in range(n):
        left, value = _sum(rng).split("=")
        chosen, rejected = (
            f"<think>{left}={x}</think><answer>{x}</answer>" for x in (int(value), _slip(rng, int(value)))
        )
        prompt = [{"role": "user", "content": f"What is {left}?"}]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "flaw": "sum"})
    return pairs


def _slip(rng: random.Random, value: int) -> int:
    """The number with one wrong digit.

    >>> _slip(random.Random(0), 47)
    46
    """
    digits = str(value)
    while True:
        i = rng.randrange(len(digits))
        wrong = digits[:i] + rng.choice("0123456789") + digits[i + 1 :]
        if wrong != digits and str(int(wrong)) == wrong:  # 7 for 47 would be another length
            return int(wrong)


def _flawed(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """A kind of flaw, and an answer to the problem that has it."""
    right = [int(step.split("=")[1]) for step in problem.steps]
    flaw = rng.choice(("sum", "operation", "skipped", "form"))
    while True:
        steps, answer = list(problem.steps), problem.answer
        if flaw == "skipped" and len(steps) == 2 and right[0] != answer:
            steps, answer = steps[:1], right[0]
        elif flaw == "operation":
            a, sign, b = _operands(steps[-1])
            steps[-1], answer = _step(a, "-" if sign == "+" and a > b else "+", b)
        elif flaw in ("sum", "skipped"):
            flaw, wrong = "sum", rng.randrange(len(steps))
            steps[wrong] = steps[wrong].split("=")[0] + f"={_slip(rng, right[wrong])}"
            answer = int(steps[wrong].split("=")[1])
            if wrong + 1 < len(steps):  # the error is carried through
                a, sign, b = _operands(steps[1])
                steps[1], answer = _step(a, sign, answer) if problem.kind == "both" else _step(answer, sign, b)
        if flaw == "form" or (answer != problem.answer and answer >= 0):
            break
        flaw = "sum"  # 2+2 for 2*2 is no flaw
    written = f"<think>{' '.join(steps)}</think>"
    return flaw, written + (f"{answer}" if flaw == "form" else f"<answer>{answer}</answer>")


def _operands(step: str) -> tuple[int, str, int]:
    """``"4+3=7"`` -> (4, "+", 3)."""
    left = step.split("=")[0]
    sign = next(s for s in "+-*/" if s in left)
    a, b = left.split(sign)
    return int(a), sign, int(b)


if __name__ == "__main__":
    print("pretraining text")
    for text in documents(6, seed=0):
        print("  ", text)
    print("\nquestions with solutions")
    for problem in problems(6, seed=0):
        print("  ", problem.question, "->", solution(problem))
    print("\nheld-out questions")
    for problem in problems(3, seed=0, split="test"):
        print("  ", problem.question, problem.answer)
    print("\npreferences: rejected answers")
    for pair in preference_pairs(4, seed=0):
        print("  ", pair["prompt"][0]["content"], "->", pair["rejected"], f"({pair['flaw']})")
