"""The pairs of studies/displacement.py, what it measures, and its page's table anew from the rows."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_pretrain, tiny_sft

import displacement
import pretrain
import sft
from arithmetic import problems
from stages import load_stage
from tokenizer import encode_chat
from verify import extract_answer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "displacement.md"


@pytest.mark.parametrize("kind", displacement.KINDS)
def test_only_the_rejected_answer_differs_between_the_kinds(kind):
    pairs = displacement.make_pairs(kind, 64, "train", 0)
    golds = {problem.question: problem.answer for problem in problems(64, "0 displacement", "train")}
    assert len(pairs) >= 60
    if kind == "flawed":
        return
    for pair in pairs:
        gold = golds[pair.prompt[-1]["content"]]
        assert extract_answer(pair.chosen) == gold
        if kind == "another":
            assert extract_answer(pair.rejected) is not None and pair.rejected != pair.chosen
            continue
        assert len(pair.chosen) == len(pair.rejected)
        (place,) = [i for i, (a, b) in enumerate(zip(pair.chosen, pair.rejected)) if a != b]
        assert place > pair.chosen.index("<answer>") and pair.rejected[place].isdigit()
        assert extract_answer(pair.rejected) != gold


def test_every_digit_and_place_can_change_but_a_number_never_begins_with_zero():
    rng = random.Random(0)
    found = {displacement.with_one_digit_changed("<think>9</think><answer>40</answer>", rng) for _ in range(400)}
    numbers = {int(re.search(r"<answer>(\d+)<", text)[1]) for text in found}
    assert numbers == {10, 20, 30, 50, 60, 70, 80, 90} | set(range(41, 50))
    assert all("<think>9</think>" in text for text in found)


def test_the_sums_are_those_of_whole_answers(tmp_path):
    """Against one row at a time, from the logits."""
    pretrain.main(tiny_pretrain(tmp_path / "base"))
    sft.main(tiny_sft(tmp_path / "sft", tmp_path / "base"))
    pairs = displacement.make_pairs("one digit", 3, "validation", 0)
    found = displacement.answer_sums(tmp_path / "sft", pairs)
    model, tokenizer, _ = load_stage(str(tmp_path / "sft"))
    for column, pair in enumerate(pairs):
        for row, answer in enumerate((pair.chosen, pair.rejected)):
            chat = [*pair.prompt, {"role": "assistant", "content": answer}]
            ids, speaks = encode_chat(tokenizer, chat)
            with torch.no_grad():
                logps = model(torch.tensor([ids]))[0].log_softmax(-1)
            each = [float(logps[t - 1, ids[t]]) for t in range(1, len(ids)) if speaks[t]]
            assert float(found[row, column]) == pytest.approx(sum(each), abs=1e-3)


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/displacement.py")
def test_the_table_of_the_page_is_that_of_its_rows():
    """Recomputed without the study's own code."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    text, names = PAGE.read_text(), {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO"}
    groups: dict = {}
    for row in rows:
        groups.setdefault((row["pairs"], row["method"]), []).append(row)
    assert len(groups) == 12
    for (kind, method), mine in groups.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {kind} | {names[method]} |")).split("|")
        for cell, name in ((3, "chosen"), (4, "rejected"), (5, "fell"), (6, "after")):
            value = float(line[cell].split("±")[0])
            assert value == pytest.approx(np.mean([row[name] for row in mine]), abs=6e-3)
        gain = np.mean([row["after"] - row["before"] for row in mine])
        assert float(line[7].split("±")[0]) == pytest.approx(gain, abs=6e-4) and int(line[8]) == len(mine)
    for name, unit in (("chosen", 3), ("gain", 7)):
        values = [[r["chosen"] if name == "chosen" else r["after"] - r["before"] for r in g] for g in groups.values()]
        df = sum(len(v) - 1 for v in values)
        s = np.sqrt(sum((len(v) - 1) * np.var(v, ddof=1) for v in values) / df)
        t = {12: 2.179, 24: 2.064, 36: 2.028, 48: 2.011}[df]
        line = next(line for line in text.splitlines() if line.startswith("| one digit | DPO |")).split("|")
        half = float(line[unit].split("±")[1])
        assert half == pytest.approx(t * s / np.sqrt(len(groups["one digit", "dpo"])), abs=6e-3)
