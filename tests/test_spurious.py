"""The rewards of studies/spurious.py by hand, and its page's table anew from the rows."""

import json
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spurious

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "spurious.md"


def test_each_reward_by_hand():
    """Two questions, four answers each: to the first (7) 7, 9, 9 and one without form; to the second (3) four that were
    cut off but the first, which says 4."""
    say = lambda x: f"<think>1+1=2</think><answer>{x}</answer>"  # noqa: E731
    texts = [say(7), say(9), say(9), "9", say(4), say(3), say(3), say(3)]
    finished = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool()
    asked = [SimpleNamespace(gold=Decimal(gold)) for gold in (7, 7, 7, 7, 3, 3, 3, 3)]
    rollout, config = SimpleNamespace(texts=texts, finished=finished), SimpleNamespace(group_size=4)
    found = {kind: spurious.judged(kind, 0)(rollout, asked, config)["correct"].tolist() for kind in spurious.REWARDS}
    assert found["right"] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert found["majority"] == [0, 1, 1, 0, 1, 0, 0, 0]
    assert found["format"] == [1, 1, 1, 0, 1, 0, 0, 0]
    assert found["wrong"] == [0, 0, 0, 0, 1, 0, 0, 0]
    toss = spurious.judged("random", 0)
    tossed = torch.cat([toss(rollout, asked, config)["correct"] for _ in range(200)])
    assert 0.45 < float(tossed.mean()) < 0.55 and set(tossed.tolist()) == {0.0, 1.0}


def test_a_run_puts_its_reward_in_and_takes_it_out_again(monkeypatch, tmp_path):
    kept, seen = spurious.grpo.judge, {}
    monkeypatch.setattr(spurious, "load_checkpoint", lambda path: {"config": {"seed": 5}})

    def train(settings):
        seen.update(judge=spurious.grpo.judge, settings=settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(spurious.grpo, "main", train)
    with pytest.raises(KeyboardInterrupt):
        spurious.run(tmp_path / "seed5", "wrong", spurious.Config(steps=3))
    assert seen["judge"] is not kept and spurious.grpo.judge is kept
    settings = seen["settings"]
    assert (settings.seed, settings.steps, settings.format_weight) == (5, 3, 0.0)
    assert settings.prompts_per_step * settings.group_size == 256 and settings.out_dir.endswith("spurious_wrong")


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/spurious.py")
def test_the_table_of_the_page_is_that_of_its_rows():
    """Recomputed without the study's own code."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    gains = {}
    for row in rows:
        gains.setdefault(row["reward"], []).append(row["after"] - row["before"])
    df = sum(len(values) - 1 for values in gains.values())
    s = np.sqrt(sum((len(v) - 1) * np.var(v, ddof=1) for v in gains.values()) / df)
    t = {5: 2.571, 10: 2.228, 15: 2.131, 20: 2.086}[df]
    text, checked = PAGE.read_text(), 0
    for kind, values in gains.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {kind} |"))
        mean, half = map(float, re.search(r"([-+][.\d]+) ± ([.\d]+)", line).groups())
        assert mean == pytest.approx(np.mean(values), abs=6e-4)
        assert half == pytest.approx(t * s / np.sqrt(len(values)), abs=6e-4)
        checked += 1
    assert checked == len(spurious.REWARDS)
