import re
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest

from arithmetic import (
    LARGER,
    MOST,
    OUTSIDE,
    documents,
    preference_pairs,
    problems,
    solution,
    split_of,
    sum_pairs,
    worked,
)
from verify import correctness_reward, extract_answer, format_reward

TRAIN, VALIDATION, TEST = problems(3000, seed=0), problems(1000, 0, "validation"), problems(1000, 0, "test")
HELD = VALIDATION + TEST
FAR = {part: problems(1000, 0, part) for part in OUTSIDE}
STARTS = {"have": 0, "groups": 1, "share": 1, "both": 2}  # and the steps that they take


def test_all_kinds_occur_in_every_split():
    kinds = {
        " ".join([start, *events])
        for start, taken in STARTS.items()
        for n in range(4 - taken)
        for events in product(("gain", "lose"), repeat=n)
    } - {"have"}
    assert {p.kind for p in TRAIN} == {p.kind for p in VALIDATION} == {p.kind for p in TEST} == kinds
    assert len(kinds) == 31


def test_the_exam_asks_many_problems_and_no_kind_fills_it():
    exam = problems(2048, "test", "test")
    assert len({(p.kind, p.numbers) for p in exam}) > 1000
    assert max(Counter(p.kind for p in exam).values()) < 0.15 * 2048
    assert 0.45 < sum(len(p.steps) == 2 for p in exam) / 2048 < 0.55


def test_what_lies_outside_is_outside():
    """A story of "larger" begins with more things than training ever names; a question of "longer" takes a step more.
    Neither in the questions that are asked, nor in the text that is read, but for plain sums."""
    in_training = TRAIN + problems(4096, "0 rl") + HELD
    assert max(len(p.steps) for p in in_training) == 3
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]  # noqa: E731
    assert max(n for p in in_training for n in numbers(p.question + " ".join(p.steps))) == MOST < LARGER[0]
    stories = [text for text in documents(6000, seed="0 train") if "=" not in text or "We know" in text]
    assert max(n for text in stories for n in numbers(text)) <= MOST
    assert max(text.count("=") for text in stories) == 3
    for p in FAR["larger"]:
        assert p.kind.startswith("have ") and LARGER[0] <= p.numbers[0] <= LARGER[1] and len(p.steps) < 4
        assert max(numbers(" ".join(p.steps))) < 100
    sums = [n for text in documents(6000, seed="0 train") if "=" in text and "We" not in text for n in numbers(text)]
    assert max(sums) == 99
    for p in FAR["longer"]:
        assert len(p.steps) == 4 and max(numbers(p.question + " ".join(p.steps))) <= MOST


@pytest.mark.parametrize("one, other", [(TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)])
def test_no_two_splits_share_a_question_or_its_numbers(one, other):
    assert not {p.question for p in one} & {p.question for p in other}
    assert not {(p.kind, p.numbers) for p in one} & {(p.kind, p.numbers) for p in other}


def test_an_eighth_is_held_out_half_of_it_for_the_test():
    worlds = Counter(
        split_of("have gain lose", (a, b, c)) for a in range(2, 31) for b in range(2, 20) for c in range(2, 20)
    )
    share = {split: count / worlds.total() for split, count in worlds.items()}
    assert abs(share["train"] - 7 / 8) < 0.02 and abs(share["validation"] - share["test"]) < 0.02


def test_no_stage_of_training_ever_sees_a_held_out_question_in_any_seed():
    held = {p.question for split in ("validation", "test") for p in problems(2000, "exam", split)}
    for seed in range(3):
        text = "\n".join(documents(4000, seed=f"{seed} train"))
        asked = {p.question for p in problems(768, seed=f"{seed} sft")} | {
            p.question for p in problems(4096, f"{seed} rl")
        }
        pairs = {pair["prompt"][0]["content"] for pair in preference_pairs(500, seed)}
        assert not held & (asked | pairs) and not any(question in text for question in held)


def test_no_question_comes_twice():
    assert len({p.question for p in TRAIN}) == len(TRAIN)


@pytest.mark.parametrize("problem", TRAIN[:200] + HELD[:100], ids=lambda p: f"{p.kind}{p.numbers}")
def test_steps_are_true_and_lead_to_the_answer(problem):
    for step in problem.steps:
        left, right = step.split("=")
        a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", left).groups()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": Fraction(int(a), int(b))}[sign]
        assert value == int(right) > 0
    assert int(problem.steps[-1].split("=")[1]) == problem.answer
    assert correctness_reward(solution(problem), problem.answer) == 1.0


@pytest.mark.parametrize("problem", TRAIN[:300] + FAR["longer"][:50], ids=lambda p: f"{p.kind}{p.numbers}")
def test_the_answer_is_that_of_the_story_worked_out_anew(problem):
    """From its words alone."""
    told = problem.question
    first, *rest = re.findall(r"[^.?]+[.?]", told)
    a, *b = map(int, re.findall(r"\d+", first))
    if re.search(r" more (\w+ )?than ", told):  # "B has 6 more pens than A. A has 7.", in either order
        both = f"{first} {rest.pop(0)}"
        more = int(re.search(r"(\d+) more", both)[1])
        less = next(int(n) for n in re.findall(r"has (\d+)\b(?! more)", both))
        have = less + (less + more)
    elif " in each" in first:
        have = a * b[0]
    elif "equally" in first:
        have = max(a, *b) // min(a, *b)
    else:
        have = a
    for event in rest[:-1]:
        (n,) = map(int, re.findall(r"\d+", event))
        have += n if re.search(r"gives .* more|finds? |buys? ", event) else -n
    assert problem.answer == have, told
    assert sorted(map(int, re.findall(r"\d+", told))) == sorted(problem.numbers)


def test_stories_tell_the_truth():
    """Follow every count through the pretraining text."""
    followed = 0
    for text in documents(3000, seed=1):
        if "Now" not in text:
            continue
        have = int(re.search(r"(?:with|had) (\d+) ", text).group(1))
        for sign, n, now in re.findall(
            r"(gave \w+ \d+ more|found|bought|lost|gave|sold) ?(\d*)[^.]*\. Now \w+ had (\d+)", text
        ):
            if sign.endswith("more"):
                have += int(re.search(r"\d+", sign).group())
            else:
                have += int(n) if sign in ("found", "bought") else -int(n)
            assert have == int(now), text
            followed += 1
    assert followed > 500


def test_pretraining_text_has_no_chat_and_no_tags():
    assert not any("<" in text or "|" in text for text in documents(2000, seed=0))


def test_same_seed_same_world():
    assert documents(50, seed=3) == documents(50, seed=3) != documents(50, seed=4)
    assert problems(50, seed=3) == problems(50, seed=3) != problems(50, seed=4)
    first = problems(1, seed=0)[0]
    assert first.question == problems(9, seed=0)[0].question


def test_preference_pairs_have_a_known_truth():
    pairs = preference_pairs(600, seed=0)
    right = {p.question: p.answer for p in problems(600, seed=0)}
    assert {pair["flaw"] for pair in pairs} == {"sum", "operation", "skipped", "form"}
    for pair in pairs:
        gold = right[pair["prompt"][0]["content"]]
        assert correctness_reward(pair["chosen"], gold) == 1.0 and correctness_reward(pair["rejected"], gold) == 0.0
        assert format_reward(pair["rejected"]) == (pair["flaw"] != "form")
        assert pair["flaw"] == "form" or extract_answer(pair["rejected"]) != gold


def test_a_wrong_sum_is_one_wrong_digit_and_is_carried_through():
    """Behind the wrong step everything follows from it: an error in the first step must not show anywhere else."""
    places = Counter()
    for problem, pair in zip(problems(3000, seed=1), preference_pairs(3000, seed=1)):
        if pair["flaw"] != "sum":
            continue
        written = pair["rejected"].removeprefix("<think>").split("</think>")[0].split()
        values = [int(step.split("=")[1]) for step in written]
        false = [i for i, step in enumerate(written) if not is_true(step)]
        assert len(written) == len(problem.steps) and len(false) == 1
        (i,) = false
        told, right = str(values[i]), problem.steps[i].split("=")[1]
        assert written[i].split("=")[0] == problem.steps[i].split("=")[0]
        assert len(told) == len(right) and sum(a != b for a, b in zip(told, right)) == 1
        if i + 1 < len(written):  # the next step reads what was written; in "both" the second one's second number is it
            a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)=\d+", problem.steps[i + 1]).groups()
            second = problem.kind.startswith("both") and i == 0
            assert right == (b if second else a)
            assert written[i + 1].split("=")[0] == (f"{a}{sign}{told}" if second else f"{told}{sign}{b}")
        assert pair["rejected"].endswith(f"</think><answer>{values[-1]}</answer>") and values[-1] >= 0
        places[i, len(written)] += 1
    assert min(places[key] for key in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))) >= 40


def test_pairs_of_plain_sums():
    for pair in sum_pairs(500, seed=0):
        question = pair["prompt"][0]["content"]
        right, wrong = (re.match(r"<think>(.*)</think>", pair[name]).group(1) for name in ("chosen", "rejected"))
        assert question == f"What is {right.split('=')[0]}?" and is_true(right) and not is_true(wrong)
        gold = int(right.split("=")[1])
        assert correctness_reward(pair["chosen"], gold) == 1.0 and correctness_reward(pair["rejected"], gold) == 0.0
        assert right.split("=")[0] == wrong.split("=")[0] and format_reward(pair["rejected"])


def is_true(step: str) -> bool:
    a, sign, b, value = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
    a, b, value = int(a), int(b), int(value)
    return a == b * value if sign == "/" else {"+": a + b, "-": a - b, "*": a * b}[sign] == value


def test_stories_do_not_tell_a_held_out_sum():
    """Neither one event nor two or three in a row, which would make a question of as many steps."""
    told = Counter()
    for text in documents(6000, seed="0 train"):
        if " Now " not in text:
            continue
        have, before = int(re.search(r"(?:with|had) (\d+)", text)[1]), []
        for event, now in re.findall(r"([^.]*)\. Now \w+ had (\d+)", text):
            n = int(re.search(r"\d+", event)[0])
            kind = "gain" if event.endswith("more") else "lose"
            assert have + (n if kind == "gain" else -n) == int(now)
            before.append((have, kind, n))
            for i in range(len(before)):
                events = " ".join(["have", *(kind for _, kind, _ in before[i:])])
                assert split_of(events, (before[i][0], *(n for _, _, n in before[i:]))) == "train", text
                told[len(before) - i] += 1
            have = int(now)
    assert told[1] > 2000 and told[2] > 500 and told[3] > 100


def test_a_slip_is_carried_on_and_no_other_step_changes():
    slip = lambda i, value: value + 1 if i == 1 else value  # noqa: E731
    assert worked("groups gain lose", (3, 4, 5, 6)) == ["3*4=12", "12+5=17", "17-6=11"]
    assert worked("groups gain lose", (3, 4, 5, 6), slip) == ["3*4=12", "12+5=18", "18-6=12"]
    assert worked("both", (3, 4), slip) == ["3+4=7", "3+7=11"]
    assert worked("both", (2, 3), lambda i, value: 0 if i == 0 else value) == ["2+3=0", "2+0=2"]
    assert worked("share lose", (12, 4, 2), slip) == ["12/4=3", "3-2=2"]
