"""The exact pass@k of studies/sharpen.py, and its page's tables anew from the rows."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_pretrain

import pages
import pretrain
import sharpen
from arithmetic import chat, documents, problems
from stages import load_stage
from tokenizer import ByteTokenizer, encode_chat
from transformer import token_logps

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "sharpen.md"


def test_the_expected_pass_by_hand_and_by_drawing():
    logps = torch.tensor([0.5, 0.25, 0.0]).log()  # the last one is never solved
    assert sharpen.expected_pass(logps, 1) == pytest.approx(0.25)
    assert sharpen.expected_pass(logps, 2) == pytest.approx((0.75 + 0.4375 + 0) / 3)
    drawn = np.random.default_rng(0).random((200_000, 5, 2)) < np.array([0.5, 0.25])
    assert sharpen.expected_pass(logps, 5) == pytest.approx(drawn.any(axis=1).mean(axis=0).sum() / 3, abs=2e-3)
    tiny = torch.tensor([math.log(1e-12)], dtype=torch.float64)
    assert sharpen.expected_pass(tiny, 1000) == pytest.approx(1e-9, rel=1e-6)  # not rounded to 0
    assert sharpen.expected_pass(torch.tensor([1e-6]), 3) == 1.0  # a rounding above probability 1


def test_the_base_is_asked_in_the_form_of_its_text():
    """Question and worked solution, as pretraining has them between two ends of text."""
    texts = {text for text in documents(3000, seed=0) if "We know" in text}
    tokenizer = ByteTokenizer()
    for problem in problems(40, 0):
        prompt, answer = sharpen.canonical(problem, tokenizer, base=True)
        assert prompt[0] == answer[-1] == tokenizer.eot_id
        written = tokenizer.decode(prompt[1:]) + tokenizer.decode(answer[:-1])
        shape = re.sub(r"\d+", "0", written.removeprefix(problem.question))
        assert any(re.sub(r"\d+", "0", text).endswith(shape) for text in texts)
        asked, answer = sharpen.canonical(problem, tokenizer, base=False)
        whole, mask = encode_chat(tokenizer, chat(problem))
        assert [*asked, *answer] == whole and mask == [0] * len(asked) + [1] * len(answer)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pretrain.main(tiny_pretrain(folder / "pretrain", steps=3))
    return folder


def test_the_log_probability_is_the_sum_over_the_answer_and_its_end(start):
    """Of rows of unequal length in batches of three, against each row alone."""
    model, tokenizer, _ = load_stage(str(start / "pretrain"))
    rows = [sharpen.canonical(p, tokenizer, base=True) for p in problems(7, 0)]
    found = sharpen.log_probabilities(model, rows, tokenizer.pad_id, batch=3)
    for (prompt, answer), logp in zip(rows, found.tolist()):
        alone = token_logps(model, torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 :]
        assert len(alone) == len(answer) and logp == pytest.approx(float(alone.sum().detach()), rel=1e-5)


def test_a_row_is_measured_once_and_the_page_is_written_from_the_rows(start, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    monkeypatch.setattr(sharpen, "LABELS", {"pretrain": "Base"})
    monkeypatch.setattr("sys.argv", ["sharpen.py", str(start), "--n", "5", "--page", str(page)])
    sharpen.main()
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["part"], row["n"]) for row in rows] == [("test", 5), ("larger", 5), ("longer", 5)]
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert "old" not in page.read_text() and "| Base | 0.000" in page.read_text()
    assert page.with_suffix(".png").exists()
    monkeypatch.setattr(sharpen, "measure", lambda *_: pytest.fail("measured twice"))
    sharpen.main()


def test_the_difference_and_its_interval_by_hand():
    """Three starts, differences 0.1, 0.2 and 0.3: mean 0.2, standard deviation 0.1, t(2) = 4.303."""
    rows = []
    for start, (before, after) in enumerate([(0.5, 0.6), (0.4, 0.6), (0.3, 0.6)]):
        for stage, value in (("sft", before), ("grpo", after)):
            rows.append({"start": str(start), "stage": stage, "part": "test", "pass": {"8": value}})
    mean, half = sharpen.difference(rows, "test", "grpo", 8)
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/sharpen.py")
def test_the_tables_of_the_page_are_those_of_its_rows():
    """Recomputed without the study's own code."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    text, checked = PAGE.read_text(), 0
    for part, words in sharpen.PARTS.items():
        after = text.split(f"**{words.capitalize()}**", 1)
        if len(after) == 1:
            continue
        block = after[1].split("**")[0]
        for line in block.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            stage = next((name for name, label in sharpen.LABELS.items() if label == cells[0]), None)
            if stage is None:
                continue
            for k, cell in zip(sharpen.SHOWN, cells[1:]):
                of = {
                    name: np.array([r["pass"][str(k)] for r in rows if r["part"] == part and r["stage"] == name])
                    for name in (stage, "sft")
                }
                assert float(cell.split()[0]) == pytest.approx(of[stage].mean(), abs=6e-4)
                checked += 1
                if "±" in cell:
                    mean, half = map(float, re.search(r"\(([-+.\d]+) ± ([.\d]+)\)", cell).groups())
                    differences = of[stage] - of["sft"]
                    n = len(differences)
                    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}[n]
                    assert mean == pytest.approx(differences.mean(), abs=6e-4)
                    assert half == pytest.approx(t * differences.std(ddof=1) / n**0.5, abs=6e-4)
    assert checked >= 6 * len(sharpen.LABELS)
