"""The ranking's bootstrap and bookkeeping, and its page's table anew from the rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import rank

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "rank.md"


def test_answers_are_packed_and_unpacked():
    torch.manual_seed(0)
    for n in (1, 4, 9, 2048):
        right = torch.randint(2, (n,)).bool()
        assert torch.equal(rank.unpacked(rank.packed(right), n), right) and len(rank.packed(right)) == -(-n // 4)


def test_the_bootstrap_has_the_error_of_both_kinds_of_chance():
    """One difference per start, the same for all its questions, with a spread of 0.1 between five starts: a standard
    error of 0.1 · √(4/5) / √5. Of questions alone, whose differences spread by 1: 1 / √400."""
    torch.manual_seed(0)
    zero = torch.zeros(5, 400, dtype=torch.float64)
    effects = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64) / 10
    of_starts = rank.bootstrap({"grpo": zero, "dpo": zero + effects[:, None]}, 4000)["dpo"]
    assert float(of_starts.mean()) == pytest.approx(0, abs=0.01)
    assert float(of_starts.std()) == pytest.approx(float(effects.std(correction=0)) / 5**0.5, rel=0.05)
    questions = torch.randn(400, dtype=torch.float64)
    of_questions = rank.bootstrap({"grpo": zero, "dpo": zero + questions}, 4000)["dpo"]
    assert float(of_questions.mean()) == pytest.approx(float(questions.mean()), abs=5e-3)
    assert float(of_questions.std()) == pytest.approx(float(questions.std(correction=0)) / 20, rel=0.05)
    same = rank.bootstrap({"grpo": zero + 0.5, "dpo": zero + 0.75}, 10)
    assert same["grpo"].abs().max() == 0 and same["dpo"].tolist() == pytest.approx(
        [0.25] * 10
    )  # within a start and a question


def test_methods_share_their_budget_and_their_start(tmp_path):
    for method, (_, chapter, _) in rank.METHODS.items():
        settings = rank.settings_of(method, tmp_path / "seed3", 3, 1 / 3)
        assert settings.init_from == str(tmp_path / "seed3" / "sft") and settings.seed == 3
        assert settings.out_dir == str(tmp_path / "seed3" / f"{method}_0.33")
        plain = rank.settings_of(method, tmp_path / "seed3", 3, 1.0)
        assert settings.lr == pytest.approx(plain.lr / 3)
        if chapter in (rank.grpo, rank.ppo):
            size = getattr(settings, "group_size", 1)
            assert settings.steps * settings.prompts_per_step * size == 4 * 4096
        else:
            assert settings.data == "own" and settings.n_pairs is None
    assert rank.settings_of("gspo", tmp_path, 1, 1.0).ratio_level == "sequence"
    assert rank.settings_of("orpo", tmp_path, 1, 1.0).method == "orpo"


def rows_of(seeds, method, factor, split, accuracy):
    rows = []
    for seed in seeds:
        right = torch.arange(100) < round(100 * accuracy) + seed
        rows.append({"method": method, "seed": seed, "factor": factor, "split": split, "n": 100})
        rows[-1] |= {"accuracy": float(right.float().mean()), "right": rank.packed(right)}
    return rows


def test_the_rate_is_chosen_on_the_starts_of_the_tuning_and_the_test_decides_nothing(monkeypatch):
    monkeypatch.setattr(rank, "METHODS", {name: rank.METHODS[name] for name in ("grpo", "dpo")})
    rows = [row for method in ("grpo", "dpo") for row in rows_of((1, 2, 3), method, 1.0, "test", 0.5)]
    for factor, accuracy in ((0.3333, 0.6), (1.0, 0.5), (3.0, 0.2)):
        rows += rows_of((101, 102), "grpo", factor, "validation", accuracy - 1)
        rows += rows_of((101, 102), "dpo", factor, "validation", 0.2 - accuracy)
    for row in rows:
        if row["split"] == "validation":
            row["accuracy"] += 1
    assert rank.best_factors(rows) == {"grpo": 0.3333, "dpo": 3.0}
    text = rank.table(rows)
    assert "| GRPO | 0.33 × default | 0.520 (0.510 to 0.530) |  |" in text
    assert "| DPO | 3 × default | 0.520 (0.510 to 0.530) | +0.000 (+0.000 to +0.000) |" in text
    assert rank.answers_of(rows[:-1] + [rows[0] | {"seed": 4}]).keys() == {"grpo"}  # dpo lacks a start


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/rank.py")
def test_the_table_of_the_page_is_that_of_its_rows():
    """Recomputed without the study's own code; the intervals by the normal approximation of the same two levels."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    right = {}
    for row in rows:
        bits = bin(int("1" + row["right"], 16))[3:][: row["n"]]
        right.setdefault(row["method"], {})[row["seed"]] = np.array([bit == "1" for bit in bits], dtype=float)
    checked = 0
    for method, by_seed in right.items():
        line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {rank.METHODS[method][0]} |"))
        numbers = re.findall(r"[-+]?\d\.\d{3}", line)
        each = [by_seed[seed].mean() for seed in sorted(by_seed)]
        assert [float(x) for x in numbers[:3]] == pytest.approx([np.mean(each), min(each), max(each)], abs=6e-4)
        if method != rank.REFERENCE:
            differences = np.stack([by_seed[seed] - right[rank.REFERENCE][seed] for seed in sorted(by_seed)])
            S, Q = differences.shape
            error = np.sqrt(differences.mean(1).var() / S + differences.mean(0).var() / Q)
            mean, low, high = (float(x) for x in numbers[3:6])
            assert mean == pytest.approx(differences.mean(), abs=6e-4)
            assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
        checked += 1
    assert checked == len(rank.METHODS)
