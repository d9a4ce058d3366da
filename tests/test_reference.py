"""Is my curve normal? The band by hand, what is inside and what is not, and the reference curves of the book."""

import json
import math
from pathlib import Path

import pytest
import torch

from runtime import reference
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from runtime.words import WORDS

ROOT = Path(__file__).parent.parent


def rows(stage: str, curve: str, *curves: list[float]) -> list[dict]:
    steps = list(range(0, 10 * len(curves[0]), 10))
    return [{"stage": stage, "curve": curve, "seed": i, "steps": steps, "values": v} for i, v in enumerate(curves)]


def test_the_band_is_a_prediction_interval():
    """Three seeds 1, 2 and 3: mean 2, standard deviation 1, t(2) = 4.303, so 2 ± 4.303 · √(1 + 1/3)."""
    steps, low, high = reference.band(rows("grpo", "correct", [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]))
    half = 4.303 * math.sqrt(4 / 3)
    assert steps == [0, 10] and low == pytest.approx([2 - half, 5]) and high == pytest.approx([2 + half, 5])


def test_a_further_run_lies_in_its_band_in_95_of_100_cases():
    torch.manual_seed(0)
    inside = 0
    for _ in range(2000):
        values = torch.randn(6).tolist()
        _, low, high = reference.band(rows("grpo", "correct", *([v] for v in values[:5])))
        inside += low[0] <= values[5] <= high[0]
    assert abs(inside / 2000 - 0.95) < 0.015


def test_a_quarter_of_the_points_outside_is_outside():
    its_band = [0, 10, 20, 30], [0.0] * 4, [1.0] * 4
    steps = [0, 10, 20, 30]
    assert reference.verdict((steps, [0.5, 0.5, 0.5, 0.5]), its_band) == ("inside", 1.0)
    assert reference.verdict((steps, [0.5, 0.5, 0.5, 2.0]), its_band) == ("above", 0.25)
    assert reference.verdict((steps, [-1, -1, 0.5, 2.0]), its_band) == ("below", 0.5)
    assert reference.verdict((range(5), [0.5, 0.5, 0.5, 0.5, 9]), its_band)[0] == "inside"  # one of five
    longer = [0, 10, 20, 30, 40, 50], [0.5, 0.5, 0.5, 0.5, 9, 9]
    assert reference.verdict(longer, its_band) == ("inside", 1.0)  # past the end of the others nothing is said


def test_curves_are_thinned_to_means():
    steps, values = reference.thinned(list(range(1, 101)), [float(x) for x in range(1, 101)])
    assert len(steps) <= reference.POINTS and values[0] == 2.0 and steps[0] == 2 and values[-1] == 100.0
    assert reference.thinned([3], [0.123456789]) == ([3], [0.12346])


EMPTY = {"model_config": {}, "tokenizer": {}, "lineage": []}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    save_checkpoint(folder, {"stage": "grpo", "config": {}, "model": {}, "step": 40} | EMPTY)
    lines = [{"step": s, "correct": 0.9, "entropy": 0.5, "accuracy": 0.1} for s in (0, 10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_looked_at(run, tmp_path, capsys, monkeypatch):
    made = rows("grpo", "correct", [0.89] * 4, [0.91] * 4) + rows("grpo", "accuracy", [0.8] * 4, [0.81] * 4)
    file = tmp_path / "reference.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    head, *said = reference.look(run, file)
    assert "2 runs of grpo" in head and (run / "reference.png").read_bytes()[:4] == b"\x89PNG"
    accuracy, correct = said  # in the order in which to look at them; entropy has no reference here
    assert correct == "right answers among the sampled: inside"
    assert accuracy.startswith("accuracy: below for 100% of the run; usual reasons: a weaker start")
    with pytest.raises(UserError, match="nothing"):
        reference.look(tmp_path / "nothing", file)
    monkeypatch.setattr("sys.argv", ["reference", "--reasons"])
    reference.main()
    assert "| flat groups | above |" in capsys.readouterr().out


def test_every_reason_is_of_a_curve_that_is_looked_at():
    looked = {curve for curves in reference.CURVES.values() for curve in curves}
    assert {curve for curve, _ in reference.REASONS} <= looked <= set(WORDS)
    assert {side for _, side in reference.REASONS} == {"above", "below"}


def test_the_page_has_the_reasons():
    assert reference.table_of_reasons() in (ROOT / "docs" / "normal.md").read_text(encoding="utf-8")


def test_the_reference_curves_are_whole():
    """Every curve of every stage from the same seeds, and small."""
    made = [json.loads(line) for line in reference.FILE.read_text().splitlines()]
    seeds = {row["seed"] for row in made}
    assert len(seeds) >= 3 and reference.FILE.stat().st_size < 300_000
    for stage, curves in reference.CURVES.items():
        for curve in curves:
            mine = [row for row in made if (row["stage"], row["curve"]) == (stage, curve)]
            assert {row["seed"] for row in mine} == seeds, (stage, curve)
            assert len({row["of"] for row in mine}) <= 4 and all(
                len(row["steps"]) == len(row["values"]) for row in mine
            )
