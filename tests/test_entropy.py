"""The law of entropy: its fit, what lies off the curve, and the page's tables anew from the rows."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import entropy

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "entropy.md"


def test_the_fit_is_that_of_numpy():
    rng = np.random.default_rng(0)
    h = rng.random(50) * 0.3
    r = 1.2 - 0.4 * np.exp(h) + 0.02 * rng.normal(size=50)
    b, a, r2 = entropy.fit(h.tolist(), r.tolist())
    slope, intercept = np.polyfit(np.exp(h), r, 1)
    assert (b, a) == (pytest.approx(intercept, abs=2e-6), pytest.approx(-slope, abs=2e-6))
    assert r2 == pytest.approx(np.corrcoef(np.exp(h), r)[0, 1] ** 2, abs=2e-6)


def test_a_run_on_the_curve_is_foretold_and_one_that_turns_is_not():
    h = np.linspace(0.3, 0.02, 50)
    on = [(x, 1.5 - 0.8 * math.exp(x)) for x in h]
    predicted, reached, r2 = entropy.foretold(on)
    assert predicted == pytest.approx(reached, abs=1e-4) and r2 == 1.0
    turned = [(x, r if i < 20 else on[20][1]) for i, (x, r) in enumerate(on)]  # entropy falls on, nothing is gained
    predicted, reached, r2 = entropy.foretold(turned)
    assert predicted > reached + 0.1 and r2 < 0.9


def test_what_lies_off_the_curve_by_hand():
    """Residuals of two settings: 0.1 and 0.3, -0.2 and 0.0, around the curve R = 1 (a = 0). Pooled: s² = (0.02 + 0.02)
    / 2, so t = 0.2 / (s / √2) = 2 and -1, with 2 degrees of freedom: p = 0.1835 and 0.4226, the first doubled."""
    cells = {"one": [(0.1, 1.1), (0.2, 1.3)], "two": [(0.1, 0.8), (0.3, 1.0)]}
    (first, above, p), (second, below, q) = entropy.off_the_curve(cells, 1.0, 0.0)
    assert (first, second) == ("one", "two") and (above, below) == (pytest.approx(0.2), pytest.approx(-0.1))
    assert (p, q) == (pytest.approx(2 * 0.1835, abs=1e-3), pytest.approx(0.4226, abs=1e-3))


def test_every_setting_of_the_study_has_its_words():
    cells = entropy.ends(ROOT / "docs" / "experiments" / "grpo.jsonl")
    assert len(cells) == 29 and all(len(points) == 3 for points in cells.values())
    assert "group size: 4" in cells and not any("start" in name for name in cells)


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/entropy.py")
def test_the_tables_of_the_page_are_those_of_its_rows():
    """Recomputed without the study's own code."""
    text = PAGE.read_text()
    rows = [json.loads(line) for line in (ROOT / "docs" / "experiments" / "grpo.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "start=" not in row["cell"] and row["correct"] >= 0.3]
    h, r = (np.array([row[name] for row in kept]) for name in ("entropy", "correct"))
    slope, intercept = np.polyfit(np.exp(h), r, 1)
    b, a = map(float, re.search(r"R = ([.\d]+) - ([.\d]+) · exp\(H\)", text).groups())
    assert (b, a) == (pytest.approx(intercept, abs=6e-4), pytest.approx(-slope, abs=6e-4))
    groups = {}
    for row, residual in zip(kept, r - intercept - slope * np.exp(h)):
        groups.setdefault(row["cell"], []).append(residual)
    by_mean = sorted(round(float(np.mean(values)), 3) for values in groups.values())
    shown = re.findall(r"^\| [^|]*: [^|]* \| [.\d]+ \| [.\d]+ \| \**([-+.\d]+) \(p", text, flags=re.M)
    assert sorted(map(float, shown)) == pytest.approx(by_mean, abs=1.1e-3)

    runs = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    for method in {run["method"] for run in runs}:
        reached = []
        for run in runs:
            if run["method"] == method:
                last = run["course"][-max(1, len(run["course"]) // 10) :]
                reached.append(np.mean([right for _, right in last]))
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
        mean = float(line.split("|")[3].split()[0])
        assert mean == pytest.approx(np.mean(reached), abs=6e-4)
