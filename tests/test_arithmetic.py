import re
from collections import Counter
from fractions import Fraction

import pytest

from arithmetic import QUESTIONS, documents, preference_pairs, problems, solution, split_of, sum_pairs
from verify import correctness_reward, extract_answer, format_reward

TRAIN, VALIDATION, TEST = problems(3000, seed=0), problems(1000, 0, "validation"), problems(1000, 0, "test")
HELD = VALIDATION + TEST


def test_all_kinds_occur_in_every_split():
    assert {p.kind for p in TRAIN} == {p.kind for p in VALIDATION} == {p.kind for p in TEST} == set(QUESTIONS)


@pytest.mark.parametrize("one, other", [(TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)])
def test_no_two_splits_share_a_question_or_its_numbers(one, other):
    assert not {p.question for p in one} & {p.question for p in other}
    assert not {(p.kind, p.numbers) for p in one} & {(p.kind, p.numbers) for p in other}


def test_an_eighth_is_held_out_half_of_it_for_the_test():
    worlds = Counter(split_of("gain_lose", (a, b, c)) for a in range(2, 31) for b in range(2, 20) for c in range(2, 20))
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


@pytest.mark.parametrize("problem", TRAIN[:200], ids=lambda p: f"{p.kind}{p.numbers}")
def test_the_answer_is_that_of_the_story_worked_out_anew(problem):
    n = problem.numbers
    expected = {
        "gain": lambda: n[0] + n[1], "lose": lambda: n[0] - n[1],
        "gain_lose": lambda: n[0] + n[1] - n[2], "lose_gain": lambda: n[0] - n[1] + n[2],
        "groups": lambda: n[0] * n[1], "groups_gain": lambda: n[0] * n[1] + n[2],
        "share": lambda: n[0] // n[1], "share_gain": lambda: n[0] // n[1] + n[2], "both": lambda: n[0] + n[0] + n[1],
    }[problem.kind]()  # fmt: skip
    assert problem.answer == expected
    assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted(n)


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
        if i == 0 and len(written) == 2:
            a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)=\d+", problem.steps[1]).groups()
            assert right == (b if problem.kind == "both" else a)
            assert written[1].split("=")[0] == (f"{a}{sign}{told}" if problem.kind == "both" else f"{told}{sign}{b}")
        assert pair["rejected"].endswith(f"</think><answer>{values[-1]}</answer>") and values[-1] >= 0
        places[i, len(written)] += 1
    assert min(places[key] for key in ((0, 1), (0, 2), (1, 2))) > 100


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


def test_numbers_stay_small():
    assert max(max(p.numbers) for p in TRAIN) < 100 and max(p.answer for p in TRAIN) < 100


def test_stories_do_not_tell_a_held_out_sum():
    """Neither one event nor two in a row that are a question of two steps."""
    told = Counter()
    for text in documents(3000, seed="0 train"):
        if " Now " not in text:
            continue
        have, before = int(re.search(r"(?:with|had) (\d+)", text)[1]), None
        for event, now in re.findall(r"([^.]*)\. Now \w+ had (\d+)", text):
            n = int(re.search(r"\d+", event)[0])
            kind = "gain" if event.endswith("more") else "lose"
            assert have + (n if kind == "gain" else -n) == int(now)
            assert split_of(kind, (have, n)) == "train"
            if before and before[0] != kind:
                assert split_of(f"{before[0]}_{kind}", (*before[1], n)) == "train", text
                told["two"] += 1
            before, have = (kind, (have, n)), int(now)
            told["one"] += 1
    assert told["one"] > 1000 and told["two"] > 200
