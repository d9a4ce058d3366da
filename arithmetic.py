"""The embedded task: a small world of stories and sums on which the whole book can be trained, without a network or a
file.

People have things, in boxes or shared among friends; they find and lose some; questions ask how many there are then.
From a seed this file makes all that the stages need:

* ``documents``: text for pretraining, in which stories, plain sums and worked questions occur, but no chat and no tags;
* ``problems``: questions with their steps and answer, for SFT (with ``solution``) and for RL (the answer alone);
* ``preference_pairs``: a right and a wrong answer to one question, where the truth about which is better is known
  exactly.

The split of a question (train, validation or test) is decided by its kind and its numbers alone, not by its words,
and for all stages at once: no stage of training, in any seed, ever sees the numbers of a held-out question in its kind
of story, whoever owns the apples; and what a method is tuned on is not what it is tested on.

Two more parts lie outside what is trained on: ``larger``, whose stories begin with more things than any number that a
story of training names (plain sums of that size are read in pretraining), and ``longer``, whose questions take four
steps, where three are the most in training. They ask whether a method taught sums of stories or only these stories.

Run ``python arithmetic.py`` to read some of it.
"""

import hashlib
import operator
import random
import re
import zlib
from collections.abc import Callable
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

MOST = 60  # no number in a story of training is larger
LARGER = (61, 80)  # with so many things the stories of the part "larger" begin; their numbers stay below 100

# A story begins in one of four ways, {a} and {b} are its numbers, and goes on with events.
STARTS = {
    "have": ("{A} has {a} {x}.", "{A} had {a} {x}.", "There are {a} {x} in the {box} of {A}."),
    "groups": ("{A} has {a} {box} with {b} {x} in each.", "There are {b} {x} in each of the {a} {box} of {A}."),
    "share": (
        "{A} shares {a} {x} equally among {b} friends.",
        "{b} friends of {A} get {a} {x} and share them equally.",
    ),
    "both": ("{A} has {a} {x}. {B} has {b} more than {A}.", "{B} has {b} more {x} than {A}. {A} has {a}."),
}
EVENTS = {
    "gain": ("{C} gives {whom} {n} more.", "Then {who} find{s} {n} more.", "Then {who} buy{s} {n} more."),
    "lose": ("Then {who} lose{s} {n} of them.", "Then {who} give{s} {n} of them to {C}.", "{C} takes {n} from {whom}."),
}
ASK = {
    "have": "How many {x} does {A} have now?",
    "groups": "How many {x} does {A} have now?",
    "share": "How many {x} does each friend have now?",
    "both": "How many {x} do they have together?",
}
# Whose things they are: as the subject of a sentence, as its object, and the ending of the verb.
OWNERS = {
    "have": ("{A}", "{A}", "s"),
    "groups": ("{A}", "{A}", "s"),
    "share": ("each friend", "each friend", "s"),
    "both": ("they", "them", ""),
}


@dataclass(frozen=True)
class Problem:
    """A question, the steps that solve it (``("4+3=7", "7-2=5")``) and the answer (5)."""

    kind: str  # how the story begins, and its events: "have gain lose"
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


def _kind(rng: random.Random, steps: int) -> str:
    """A kind of question that takes so many steps, from 1. Of the beginnings "have" comes twice as often: it has the
    most numbers to ask about.
    """
    taken = {"have": 0, "groups": 1, "share": 1, "both": 2}  # steps, before the first event
    start = rng.choice([name for name in ("have", *STARTS) if taken[name] <= steps])
    return " ".join([start, *(rng.choice(("gain", "lose")) for _ in range(steps - taken[start]))])


def _numbers(rng: random.Random, kind: str, larger: bool = False) -> tuple[int, ...] | None:
    """Numbers for a question of that kind; None if they lead out of the range."""
    start, *events = kind.split()
    if start == "have":
        numbers = (rng.randint(*LARGER) if larger else rng.randint(2, 40),)
    elif start == "groups":
        numbers = rng.randint(2, 9), rng.randint(2, 9)
    elif start == "share":
        b = rng.randint(2, 9)
        numbers = b * rng.randint(2, 9), b
    else:
        numbers = rng.randint(2, 24), rng.randint(2, 19)
    numbers += tuple(rng.randint(2, 19) for _ in events)
    values = [step.split("=")[1] for step in worked(kind, numbers)]
    most = 99 if larger else MOST
    return numbers if all(0 < int(value) <= most for value in values) and max(numbers) <= most else None


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def worked(kind: str, numbers: tuple[int, ...], slip: Callable[[int, int], int] = lambda i, value: value) -> list[str]:
    """The steps of a question. ``slip``: of step i and its value, the value that is written; all that follows goes on
    from it.

    >>> worked("have gain lose", (4, 3, 2))
    ['4+3=7', '7-2=5']
    >>> worked("both lose", (4, 3, 2))
    ['4+3=7', '4+7=11', '11-2=9']
    """
    start, *events = kind.split()
    steps: list[str] = []

    def step(a: int, sign: str, b: int) -> int:
        value = slip(len(steps), SIGNS[sign](a, b))
        steps.append(f"{a}{sign}{b}={value}")
        return value

    value, *more = numbers
    if start != "have":
        other, *more = more
        first = value
        value = step(first, {"groups": "*", "share": "/", "both": "+"}[start], other)
        if start == "both":  # what B has; then A's and B's
            value = step(first, "+", value)
    for event, n in zip(events, more):
        value = step(value, "+" if event == "gain" else "-", n)
    return steps


OUTSIDE = ("larger", "longer")  # parts that no training comes near


def make_problem(rng: random.Random, split: str = "train") -> Problem:
    """One problem of a random kind, from that part of the world: of one, two or three steps, most often two."""
    steps = 4 if split == "longer" else rng.choice((1, 2, 2, 3))
    kind = _kind(rng, steps)
    if split == "larger":
        kind = "have " + " ".join(rng.choice(("gain", "lose")) for _ in range(steps))
    numbers = None
    while numbers is None or (split not in OUTSIDE and split_of(kind, numbers) != split):
        numbers = _numbers(rng, kind, split == "larger")
    steps = tuple(worked(kind, numbers))
    return Problem(kind, numbers, _told(rng, kind, numbers), steps, int(steps[-1].split("=")[1]))


def _told(rng: random.Random, kind: str, numbers: tuple[int, ...]) -> str:
    """The question in words."""
    start, *events = kind.split()
    A, B, C = rng.sample(NAMES, 3)
    who, whom, s = (word.format(A=A) for word in OWNERS[start])
    words = {"A": A, "B": B, "C": C, "x": rng.choice(THINGS), "box": rng.choice(BOXES), "s": s}
    words |= dict(zip("ab", numbers)) | {"who": who, "whom": whom}
    told = [rng.choice(STARTS[start]).format(**words)]
    for event, n in zip(events, numbers[len(numbers) - len(events) :]):
        told.append(rng.choice(EVENTS[event]).format(n=n, **words))
    return " ".join([*told, ASK[start].format(**words)])


def problems(n: int, seed: int | str, split: str = "train") -> list[Problem]:
    """``n`` problems, no question twice. The same seed gives the same list."""
    if split not in ("train", "validation", "test", *OUTSIDE):
        raise ValueError(f"split {split!r}: train, validation, test, larger or longer")
    rng = random.Random(f"problems {seed} {split}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = make_problem(rng, split)
        found.setdefault(problem.question, problem)
    return list(found.values())


def solution(problem: Problem) -> str:
    """The answer in the form that ``verify.py`` accepts.

    >>> solution(Problem("have gain lose", (4, 3, 2), "", ("4+3=7", "7-2=5"), 5))
    '<think>4+3=7 7-2=5</think><answer>5</answer>'
    """
    return f"<think>{' '.join(problem.steps)}</think><answer>{problem.answer}</answer>"


def chat(problem: Problem) -> list[dict]:
    """Question and solution as a conversation."""
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": solution(problem)}]


# ----------------------------------------------------------------------------------------------------------------------
# Text for pretraining


def _sum(rng: random.Random) -> str:
    """A plain sum. Those of ``+`` and ``-`` go up to 99, beyond what stories tell."""
    sign = rng.choice("++--*/")
    if sign in "*/":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"{a}*{b}={a * b}" if sign == "*" else f"{a * b}/{b}={a}"
    if sign == "+":
        a = rng.randint(2, 90)
        b = rng.randint(2, min(99 - a, 19))
        return f"{a}+{b}={a + b}"
    a = rng.randint(4, 99)
    b = rng.randint(2, min(a - 1, 19))
    return f"{a}-{b}={a - b}"


def _story(rng: random.Random) -> str:
    """Two people and what happens to their things; every count that is told is true, and no event, nor any two or three
    in a row, which would make a question of as many steps, have the numbers of a held-out one.
    """
    A, B = rng.sample(NAMES, 2)
    x, place = rng.choice(THINGS), rng.choice(PLACES)
    have = rng.randint(2, 40)
    lines = [
        rng.choice((
            f"One day {A} went to {place} with {have} {x}.",
            f"{A} lived near {place} and had {have} {x}.",
            f"{A} and {B} met at {place}. {A} had {have} {x}.",
        ))
    ]  # fmt: skip
    told: list[tuple[int, str, int]] = []  # of each event: how many there were, what it was, how many came or went
    for _ in range(rng.randint(1, 3)):
        more = have < 5 or (have < 40 and rng.random() < 0.5)
        n = rng.randint(2, 19) if more else rng.randint(2, min(have - 2, 19))
        now = [*told, (have, "gain" if more else "lose", n)]
        asked = [now[i:] for i in range(len(now))]  # questions that the last events would answer
        if any(
            split_of(" ".join(["have", *(event for _, event, _ in part)]), (part[0][0], *(n for _, _, n in part)))
            != "train"
            for part in asked
        ):
            continue
        told = now
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
    skipped last step, or the right answer outside the answer tags.
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
    flaw = rng.choice(("sum", "operation", "skipped", "form"))
    while True:
        steps = list(problem.steps)
        if flaw == "skipped" and len(steps) > 1:
            steps.pop()
        elif flaw == "operation":
            a, sign, b = re.fullmatch(r"(\d+)(\D)(\d+)=.*", steps[-1]).groups()
            less = sign == "+" and int(a) > int(b)
            steps[-1] = f"{a}-{b}={int(a) - int(b)}" if less else f"{a}+{b}={int(a) + int(b)}"
        elif flaw != "form":
            flaw, at = "sum", rng.randrange(len(steps))
            steps = worked(
                problem.kind, problem.numbers, lambda i, value, at=at: _slip(rng, value) if i == at else value
            )
        answer = int(steps[-1].split("=")[1])
        if flaw == "form" or (answer != problem.answer and all(int(step.split("=")[1]) >= 0 for step in steps)):
            break
        flaw = "sum"  # 2+2 for 2*2 is no flaw
    written = f"<think>{' '.join(steps)}</think>"
    return flaw, written + (f"{answer}" if flaw == "form" else f"<answer>{answer}</answer>")


if __name__ == "__main__":
    print("pretraining text")
    for text in documents(6, seed=0):
        print("  ", text)
    print("\nquestions with solutions")
    for problem in problems(6, seed=0):
        print("  ", problem.question, "->", solution(problem))
    for split in ("test", *OUTSIDE):
        print(f"\nheld-out questions: {split}")
        for problem in problems(3, seed=0, split=split):
            print("  ", problem.question, problem.answer)
    print("\npreferences: rejected answers")
    for pair in preference_pairs(4, seed=0):
        print("  ", pair["prompt"][0]["content"], "->", pair["rejected"], f"({pair['flaw']})")
