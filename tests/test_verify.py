"""The strict rule, case by case, and the exploits that other verifiers pay for."""

import builtins
import os
from decimal import Decimal

import pytest
import torch
from conftest import load_json
from hypothesis import given, settings
from hypothesis import strategies as st

import verify
from rollout import score
from runtime.errors import UserError
from verify import correctness_reward, extract_answer, format_reward, length_reward, parse_gold

FACTS = load_json("gsm8k_verifier_facts.json")["extractors"]


def answered(answer: str, thinking: str = "4+3=7") -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def refused(text: str) -> bool:
    """No answer, no reward of either kind, for any gold that the text might have been after."""
    golds = [7, 8, -3, 2, 3, 5, 72, 1000, 1080, Decimal("0.5"), 0]
    return (
        extract_answer(text) is None
        and format_reward(text) == 0.0
        and all(correctness_reward(text, g) == 0.0 for g in golds)
    )


# ----------------------------------------------------------------------------------------------------------------------
# What is a number


@pytest.mark.parametrize(
    "answer, value",
    [
        ("7", "7"),
        (" 7 ", "7"),
        ("\n7\n", "7"),
        ("7.", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        ("7.5.", "7.5"),
        ("007", "7"),
        ("-7", "-7"),
        ("+7", "7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("$7", "7"),
        ("-$7", "-7"),
        ("0", "0"),
        ("-0", "0"),
        ("1,080", "1080"),
        ("$1,007.50", "1007.5"),
        ("192,000,000", "192000000"),
        ("1234567", "1234567"),
        ("9" * 32, "9" * 32),
    ],
)
def test_plain_numbers_are_read(answer, value):
    assert extract_answer(answered(answer)) == Decimal(value)
    assert format_reward(answered(answer)) == 1.0
    assert correctness_reward(answered(answer), Decimal(value)) == 1.0
    assert correctness_reward(answered(answer), Decimal(value) + 1) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        ".",
        "-",
        "$",
        ",",
        "seven",
        "7 or 8",
        "7, 8",
        "7,8",
        "7 8",
        "7\n8",
        "7;8",
        "7/8",
        "5-3",
        "5 - 3",
        "5+3",
        "4+3=7",
        "7=7",
        "x=7",
        "2*4",
        "2**3",
        "\\boxed{7}",
        "**7**",
        "7 apples",
        "apples 7",
        "7%",
        "7 %",
        "7$",
        "$ 7",
        "$-7",
        "$$7",
        "€7",
        "1_000",
        "1e3",
        "1E3",
        "0x7",
        "0b111",
        "nan",
        "NaN",
        "inf",
        "Infinity",
        "-inf",
        "--7",
        "+-7",
        "- 7",
        "7-",
        "(7)",
        "[7]",
        "'7'",
        "7..",
        "7.0.0",
        "1.2.3",
        ".5",
        "1,08,0",
        "10,80",
        "1,0800",
        "1000,000",
        ",080",
        "1,080,",
        "1,,080",
        "0.5,000",
        "1 080",
        "1\N{THIN SPACE}080",
        "٧",
        "７",
        "৭",
        "²",
        "7²",
        "½",
        "Ⅶ",
        "7\N{ZERO WIDTH SPACE}",
        "7\x00",
        "\N{EN DASH}7",
        "9" * 33,
        "0" * 33 + "7",
        "__import__('os')",
        "3 + 4 #",
    ],
)
def test_anything_else_is_refused(answer):
    assert refused(answered(answer))


def test_five_minus_three_is_not_minus_three_nor_two():
    assert correctness_reward(answered("5-3"), -3) == correctness_reward(answered("5-3"), 2) == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# What is an answer


@pytest.mark.parametrize(
    "text",
    [
        answered("7"),
        "<think>4+3=7</think> <answer>7</answer>",
        "<think>4+3=7</think>\n\n<answer>7</answer>\n",
        " \n<think>\n4+3=7\nso 7\n</think>\t<answer>7</answer>  ",
        answered("7", "a < b > c, </b> <thin> <answers> 3 or 5"),
        answered("7", "x"),
        answered("7", "思考 ½ ٧"),
    ],
)
def test_the_form_is_accepted(text):
    assert extract_answer(text) == 7 and format_reward(text) == 1.0 and correctness_reward(text, 7) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "#### 7",
        "The answer is 7",
        "\\boxed{7}",
        "<answer>7</answer>",
        "<think>4+3=7</think>",
        "<think>4+3=7</think>7",
        "<think>4+3=7</think><answer>7",
        "<think>4+3=7</think>7</answer>",
        "<think>4+3=7<answer>7</answer>",
        "4+3=7</think><answer>7</answer>",
        "<answer>7</answer><think>4+3=7</think>",
        "<think><answer>7</answer></think>",
        answered("7", ""),
        answered("7", " \n\t"),
        answered("7", "\N{NO-BREAK SPACE}"),
        answered("7") + " I hope this helps!",
        answered("7") + ".",
        answered("7") + "<answer>8</answer>",
        answered("8") + "<answer>7</answer>",
        answered("7") + answered("7"),
        answered("7") + "</answer>",
        answered("7") + "<think>",
        "So: " + answered("7"),
        "<think>4+3=7</think> so <answer>7</answer>",
        "<think>a</think><think>b</think><answer>7</answer>",
        "<think>a</think></think><answer>7</answer>",
        "<think><think>a</think><answer>7</answer>",
        answered("7", "is it <answer>7</answer>?"),
        answered("7", "is it <answer>7"),
        answered("7", "</answer>"),
        answered("7", "<Answer>"),
        answered("7", "</THINK>"),
        answered("7", "a</think><answer>7</answer><think>b"),
        answered("<answer>7</answer>"),
        answered("<think>7</think>"),
        answered("7<ANSWER>"),
        "<THINK>4+3=7</THINK><ANSWER>7</ANSWER>",
        "<Think>4+3=7</Think><answer>7</answer>",
        "<think>4+3=7</think><Answer>7</Answer>",
        "<think >4+3=7</think><answer>7</answer>",
        "<think>4+3=7</think><answer >7</answer>",
        "<think>4+3=7</think>< answer>7</answer>",
        "<think>4+3=7</think><answer>7</ answer>",
        "<think>4+3=7</think>\n#### 7",
        "<reasoning>4+3=7</reasoning><answer>7</answer>",
    ],
)
def test_any_other_form_is_refused(text):
    assert refused(text)


# One entry for each text of the fixture that our rule accepts; every other text is refused.
ACCEPTED = {
    "<think>a</think>\n<answer>72</answer>": "72",
    "<think>a</think>\n<answer> 72 </answer>": "72",
    "<think>a</think>\n<answer>1,080</answer>": "1080",
    "<think>a</think>\n<answer>-10</answer>": "-10",
    "<think>a</think><answer>72</answer>": "72",
    "<think>a</think>\n<answer>$72</answer>": "72",
    "<think>a</think>\n<answer>72.0</answer>": "72",
}


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: repr(fact["text"]))
def test_the_texts_that_other_verifiers_were_asked(fact):
    text, gold = fact["full_text"], fact["gold_assumed"]
    if text in ACCEPTED:
        assert extract_answer(text) == Decimal(ACCEPTED[text]) == parse_gold(gold)
        assert correctness_reward(text, gold) == format_reward(text) == 1.0
    else:
        assert extract_answer(text) is None
        assert correctness_reward(text, gold) == format_reward(text) == 0.0


def test_the_exploits_of_other_verifiers_earn_nothing():
    """Texts with no form, two answers or text behind that NVlabs' rewards, verl's or OpenAI's call right."""
    assert set(ACCEPTED) <= {fact["full_text"] for fact in FACTS}
    paid = [f for f in FACTS if f["nvlabs_correct"] == 1.0 or f["verl_score_strict"] == 1.0]
    exploits = [f for f in paid if f["full_text"] not in ACCEPTED]
    assert {"72", "<answer>72", "<think>a</think>\n<answer>72</answer> trailing"} <= {f["text"] for f in exploits}
    assert all(correctness_reward(f["full_text"], f["gold_assumed"]) == 0.0 for f in exploits)


# ----------------------------------------------------------------------------------------------------------------------
# Any text at all


@given(
    st.integers(-(10**20), 10**20), st.booleans(), st.sampled_from(["", "$"]), st.sampled_from(["", ".", ".0", ".00"])
)
@settings(max_examples=200, deadline=None)
def test_every_integer_is_read_back(n, separators, dollar, end):
    digits = f"{abs(n):,}" if separators else str(abs(n))
    text = answered(("-" if n < 0 else "") + dollar + digits + end)
    if len(text) - len(answered("")) <= 32:
        assert extract_answer(text) == n
        assert correctness_reward(text, n) == correctness_reward(text, f"#### {n:,}") == 1.0
        assert correctness_reward(text, n + 1) == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3))
@settings(max_examples=100, deadline=None)
def test_every_decimal_is_read_back(value):
    assert extract_answer(answered(f"{value:f}")) == value


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
FRAGMENTS = st.sampled_from([*TAGS, "<ANSWER>", "7", "72", "-", ",", ".", "x", "$", "٧", "=", "+", " ", "\n"])


@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=14).map("".join)))
@settings(max_examples=500, deadline=None)
def test_random_text_earns_nothing_unless_it_has_the_form(text):
    """The rule once more, written as counting and cutting instead of a pattern."""
    lower = text.lower()
    has_form = all(text.count(tag) == lower.count(tag) == 1 for tag in TAGS)
    if has_form:
        before, rest = text.split("<think>")
        thinking, _, rest = rest.partition("</think>")
        between, _, rest = rest.partition("<answer>")
        inside, _, after = rest.partition("</answer>")
        has_form = (
            "</answer>" in rest
            and not (before + between + after).strip()
            and bool(thinking.strip())
            and not any(tag in thinking for tag in TAGS)
            and inside.strip(" \n+-$.,0123456789") == ""
            and any(c in "0123456789" for c in inside)
        )
    assert has_form or (extract_answer(text) is None and format_reward(text) == 0.0)
    if extract_answer(text) is None:
        assert all(correctness_reward(text, gold) == 0.0 for gold in (7, 72))


@given(st.one_of(st.text(max_size=12), st.text("0123456789,.$+-", max_size=8)), st.integers(-100, 100))
@settings(max_examples=300, deadline=None)
def test_correct_implies_form(answer, gold):
    text = answered(answer)
    assert correctness_reward(text, gold) <= format_reward(text)


def test_form_without_a_right_number():
    assert format_reward(answered("8")) == 1.0 and correctness_reward(answered("8"), 7) == 0.0


def test_nothing_is_evaluated(monkeypatch):
    answers = ["__import__('os').system('true')", "exec('1')", "(lambda: 7)()", "7 if True else 8", "7", "3+4"]
    calls = []
    with monkeypatch.context() as patch:
        for place, name in [(builtins, "eval"), (builtins, "exec"), (builtins, "compile"), (os, "system")]:
            patch.setattr(place, name, lambda *a, **k: calls.append(a))
        results = [correctness_reward(text, 7) for answer in answers for text in (answered(answer), answer)]
    assert calls == [] and results == [0.0] * 8 + [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 150_000,
        "<think>a</think>" * 60_000,
        "<think>" + "a" * 1_000_000,
        "<think>" + "<" * 1_000_000 + "</think><answer>7</answer>x",
        "<think>a</think>" + " " * 1_000_000,
        " " * 1_000_000 + "x",
        answered("7" * 1_000_000),
        answered("1" + ",000" * 250_000),
        answered(" " * 500_000 + "7" + " " * 500_000 + "x"),
    ],
    ids=lambda text: f"{text[:8]}...{text[-12:]}",
)
def test_a_long_adversarial_text_is_refused(text):
    """Finishes at all: a pattern that backtracks would not."""
    assert extract_answer(text) is None


def test_long_thinking_is_no_obstacle():
    assert extract_answer(answered("7", "so 7 " * 200_000)) == 7


# ----------------------------------------------------------------------------------------------------------------------
# Gold and length


@pytest.mark.parametrize(
    "gold, value",
    [
        (72, "72"),
        (Decimal("7.5"), "7.5"),
        ("72", "72"),
        (" 72 ", "72"),
        ("-10", "-10"),
        ("1,080", "1080"),
        ("$5", "5"),
        ("0.5", "0.5"),
        ("He has 2*36 = <<2*36=72>>72 eggs.\n#### 72", "72"),
        ("He sold 12, then 30.\n#### 192,000,000", "192000000"),
        ("It fell.\n#### -3", "-3"),
        ("####7", "7"),
    ],
)
def test_gold_is_read(gold, value):
    assert parse_gold(gold) == Decimal(value)
    assert correctness_reward(answered(value), gold) == 1.0


@pytest.mark.parametrize(
    "gold",
    ["", "#### ", "seven", "#### 7 apples", "7 or 8", "#### 7\n#### 8", "1_000", "5-3", "1,08,0", "٧", "nan", "1e3"],
)
def test_a_gold_that_is_no_number_is_an_error(gold):
    with pytest.raises(UserError) as error:
        parse_gold(gold)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError):
        correctness_reward(answered("7"), gold)


def test_length_reward():
    assert [length_reward(n, 5) for n in (1, 4, 5, 6, 100)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_rewards_are_floats():
    for reward in (correctness_reward(answered("7"), 7), format_reward("x"), length_reward(1, 2)):
        assert type(reward) is float


# ----------------------------------------------------------------------------------------------------------------------
# Whole numbers, lengths, and verifiers that are too kind


@pytest.mark.parametrize("i", range(26))
def test_the_penalty_for_length_is_dapos(i):
    fixture = load_json("dapo_soft_overlong.json")
    n, penalty = fixture["lengths"][i], fixture["penalty"][i]
    assert verify.overlong_penalty(n, fixture["max_len"], fixture["cache"]) == pytest.approx(penalty)


@pytest.mark.parametrize(("limit", "buffer"), [(20, 0), (20, 21), (20, -1)])
def test_a_buffer_that_cannot_be_is_refused(limit, buffer):
    with pytest.raises(ValueError):
        verify.overlong_penalty(5, limit, buffer)


@pytest.mark.parametrize(
    ("answer", "whole"),
    [("7", 1), ("1,080", 1), ("-3", 1), ("7.0", 1), ("7.5", 0), ("²", 0), ("٣", 0), ("seven", 0), ("", 0)],
)
def test_whole_numbers(answer, whole):
    assert verify.integer_reward(f"<think>a</think><answer>{answer}</answer>") == whole
    assert verify.integer_reward(answer) == 0  # in no form at all


@pytest.mark.parametrize(
    ("text", "last", "any_of_them"),
    [
        ("<think>3+4=7</think><answer>7</answer>", 1, 1),
        ("7", 1, 1),
        ("it is 7, or 8", 0, 1),
        ("8 7", 1, 1),
        ("1,007", 0, 0),
        ("it was 1,007 and then 7.0", 1, 1),
        ("-7", 0, 0),
        ("3+4=7", 1, 1),
        ("", 0, 0),
        ("٧", 0, 0),
    ],
)
def test_lax_verifiers(text, last, any_of_them):
    assert verify.lax_correctness_reward(text, 7, "last") == last
    assert verify.lax_correctness_reward(text, "He has #### 7", "any") == any_of_them


def test_there_is_no_other_lax_verifier():
    with pytest.raises(ValueError, match="last or any"):
        verify.lax_correctness_reward("7", 7, "strict")


def test_only_the_strict_verifier_looks_at_the_end_and_the_form():
    texts, done = ["<think>a</think><answer>7</answer>", "so 7", "so 7 8"], torch.tensor([False, False, True])
    for verifier, expected in {"strict": [0, 0, 0], "last": [1, 1, 0], "any": [1, 1, 1]}.items():
        correct, formed = score(texts, [7] * 3, done, verifier)
        assert correct.tolist() == expected and formed.tolist() == [0, 0, 0]
    assert score(texts[:1], [7], torch.tensor([True]))[0].tolist() == [1]
