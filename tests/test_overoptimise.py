"""Best of n by counting, and the page's table anew from its rows."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import overoptimise
import pages
from overoptimise import best_of, fit, kl_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "overoptimise.md"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """With ties, whose place is drawn: every order of the tied ones counts alike."""
    scores = torch.tensor([0.5, 2.0, 2.0, -1.0, 2.0, 0.5])
    values = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    found = []
    for some in itertools.combinations(range(6), n):
        top = max(float(scores[i]) for i in some)
        tied = [float(values[i]) for i in some if float(scores[i]) == top]
        found.append(sum(tied) / len(tied))
    assert best_of(scores, values, n) == pytest.approx(sum(found) / len(found))


def test_best_of_one_is_the_mean_and_of_all_the_top():
    torch.manual_seed(0)
    scores, values = torch.randn(256), torch.randint(2, (256,)).float()
    assert best_of(scores, values, 1) == pytest.approx(float(values.mean()))
    assert best_of(scores, values, 256) == float(values[scores.argmax()])


def test_the_kl_of_best_of_n_is_that_of_its_distribution():
    """The score's rank u is uniform; of the best of n its density is n·u^(n-1), and KL = ∫ p log p."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (1, 2, 8, 64):
        density = n * u ** (n - 1)
        assert kl_of(n) == pytest.approx(float(np.mean(density * np.log(np.maximum(density, 1e-300)))), abs=1e-4)


def test_the_fit_finds_the_form_and_says_what_is_left():
    points = [(d, d * (0.4 - 0.1 * d)) for d in (0.5, 1.0, 1.5, 2.0)]
    assert fit(points) == (0.4, 0.1, 1.0)
    assert fit([(1.0, 0.0), (2.0, 1.0), (3.0, 0.0), (4.0, 1.0)])[2] < 0.5


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/overoptimise.py")
def test_the_table_of_the_page_is_that_of_its_rows():
    """Recomputed without the study's own code."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    text, checked = PAGE.read_text().split(pages.BEGIN)[1].split(pages.END)[0], 0
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}

    def close(cell: str, values: np.ndarray) -> None:
        mean, half = map(float, re.fullmatch(r"(-?[.\d]+) ± ([.\d]+)", cell).groups())
        assert mean == pytest.approx(values.mean(), abs=6e-4)
        assert half == pytest.approx(t[len(values)] * values.std(ddof=1) / len(values) ** 0.5, abs=6e-4)

    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        named = re.fullmatch(r"([\d,]+) pairs", cells[0])
        size = int(named[1].replace(",", "")) if named else 0
        mine = [row for row in rows if row["pairs"] == size]
        if len(cells) < 5 or not mine or not (named or cells[0] == "the pipeline's"):
            continue
        gold = {n: np.array([row["gold"][str(n)] for row in mine]) for n in map(int, mine[0]["gold"])}
        shown = [n for n in overoptimise.SHOWN if n in gold]
        for n, cell in zip(shown, cells[1:]):
            close(cell, gold[n])
        peak, lost, alpha, beta, r2 = cells[1 + len(shown) :]
        assert int(peak) == max(gold, key=lambda n: gold[n].mean())
        close(lost, gold[int(peak)] - gold[max(gold)])
        d = np.array([math.sqrt(math.log(n) - (n - 1) / n) for n in gold if n > 1])
        gain = np.array([gold[n].mean() - gold[1].mean() for n in gold if n > 1])
        solved, left, *_ = np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), gain, rcond=None)
        assert [float(alpha), float(beta)] == pytest.approx(solved.tolist(), abs=6e-4)
        assert float(r2) == pytest.approx(1 - float(left[0]) / float(((gain - gain.mean()) ** 2).sum()), abs=6e-3)
        checked += 1
    assert checked == len({row["pairs"] for row in rows}) > 3
