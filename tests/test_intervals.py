"""The statistics of the studies, against published tables, values worked by hand, and all tables of the pages anew."""

import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import combine
import gdpo
from intervals import holm, pooled, quantile, smallest, tail

ROOT = Path(__file__).parent.parent
PAGES = [
    p for p in sorted((ROOT / "docs" / "experiments").glob("*.md")) if (ROOT / f"configs/ablate_{p.stem}.py").exists()
]

STUDENT = {  # degrees of freedom: t at 0.975, 0.9, 0.995, from the usual printed tables
    1: (12.706, 3.078, 63.657), 2: (4.303, 1.886, 9.925), 3: (3.182, 1.638, 5.841), 4: (2.776, 1.533, 4.604),
    5: (2.571, 1.476, 4.032), 6: (2.447, 1.440, 3.707), 7: (2.365, 1.415, 3.499), 8: (2.306, 1.397, 3.355),
    9: (2.262, 1.383, 3.250), 10: (2.228, 1.372, 3.169), 20: (2.086, 1.325, 2.845), 29: (2.045, 1.311, 2.756),
    30: (2.042, 1.310, 2.750), 60: (2.000, 1.296, 2.660), 120: (1.980, 1.289, 2.617),
}  # fmt: skip


@pytest.mark.parametrize("df", STUDENT)
def test_the_quantiles_are_those_of_the_printed_tables(df):
    assert [round(quantile(p, df), 3) for p in (0.975, 0.9, 0.995)] == list(STUDENT[df])


def upper(df: int) -> tuple[np.ndarray, np.ndarray]:
    """P(|T| > t) on a grid of t, by summing Student's density."""
    t = np.concatenate([np.arange(0, 60, 2e-4), np.geomspace(60, 1e7, 20000)])
    top = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = top * (1 + t * t / df) ** (-(df + 1) / 2)
    inside = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return t, 1 - 2 * inside


@pytest.mark.parametrize("df", [1, 2, 3, 4, 10, 61])
def test_the_tail_is_that_of_the_density(df):
    t, p = upper(df)
    for x in (0.0, 0.3, 1.0, 2.5, 8.0):
        assert tail(x, df) == tail(-x, df) == pytest.approx(np.interp(x, t, p), abs=2e-6)


def test_the_pooled_standard_deviation_by_hand():
    """Squares about the means 2, 4 and 6: 2, 8 and 2, over 2 + 1 + 1 degrees of freedom; a constant group adds none."""
    s, df, own = pooled([[1.0, 2.0, 3.0], [2.0, 6.0], [5.0, 7.0], [9.0, 9.0, 9.0]])
    assert df == 4 and s == pytest.approx(math.sqrt(12 / 4))
    assert own == pytest.approx([1.0, math.sqrt(8), math.sqrt(2)])
    assert pooled([[1.0], [1.0, 1.0]])[1] == pooled([])[1] == pooled([[1.0, 2.0]], paired=True)[1] == 0


def test_the_paired_standard_deviation_by_hand():
    """Cells (1, 2, 6) and (3, 5, 4): means 3 and 4, of the seeds 2, 3.5 and 5, of all 3.5. Residuals of the first:
    -0.5, -1, 1.5; of the second the same with the other sign. Squares 3.5 each, over (2 - 1)(3 - 1)."""
    s, df, own = pooled([[1.0, 2.0, 6.0], [3.0, 5.0, 4.0]], paired=True)
    assert df == 2 and s == pytest.approx(math.sqrt(7 / 2)) and own == pytest.approx([s, s])
    differences = [2.0, 3.0, -2.0]  # of two cells it is the paired t: s · √2 is the std of the differences
    assert s * math.sqrt(2) == pytest.approx(np.std(differences, ddof=1))
    shifted = pooled([[11.0, 2.0, 6.0], [13.0, 5.0, 4.0]], paired=True)[0]
    assert shifted == pytest.approx(s)  # what a seed does to all cells does not count
    with_constant = pooled([[1.0, 2.0, 6.0], [3.0, 5.0, 4.0], [0.0, 0.0, 0.0]], paired=True)
    assert with_constant[:2] == (pytest.approx(s), 2)


def test_holm_by_hand():
    """0.01 · 4; 0.02 · 3; 0.03 · 2 = 0.06; 0.035 · 1 is smaller than 0.06 and becomes 0.06."""
    assert holm([0.03, 0.01, 0.035, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.04]) == [0.04] and holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_holm_errs_in_one_of_twenty_families():
    """Eight differences of one reference, all chance: at least one is found in at most 5 % of families."""
    values = np.random.default_rng(0).normal(size=(1500, 9, 3))
    wrong = 0
    for cells in values.tolist():
        s, df, _ = pooled(cells)
        means = [sum(cell) / 3 for cell in cells]
        ps = [tail((mean - means[0]) / (s * math.sqrt(2 / 3)), df) for mean in means[1:]]
        wrong += min(holm(ps)) <= 0.05
    assert 0.02 < wrong / 1500 < 0.06


def test_the_smallest_difference_is_found_in_four_of_five_studies():
    error = math.sqrt(2 / 3)
    true = smallest(error, 6)
    assert true == pytest.approx((2.4469 + 0.9057) * error, rel=1e-4)  # t(0.975) and t(0.8) of 6 degrees of freedom
    values = np.random.default_rng(1).normal(size=(4000, 3, 3)) + np.array([[0.0], [true], [0.0]])
    found = 0
    for cells in values.tolist():
        s, df, _ = pooled(cells)
        found += abs(np.mean(cells[1]) - np.mean(cells[0])) > quantile(0.975, df) * s * error
    assert 0.77 < found / 4000 < 0.83


# ----------------------------------------------------------------------------------------------------------------------
# The tables of the pages, from the rows beside them and the presets alone

WORDS = {
    "greedy accuracy before": "start", "greedy accuracy": "accuracy", "sampled, right": "correct",
    "right, says its verifier": "believed", "in form": "formatted", "short": "short", "right and short": "all",
    "KL (nats an answer)": "kl", "entropy (nats a token)": "entropy", "tokens": "length", "finished": "finished",
    "answers sampled": "answers", "validation loss": "val_loss", "bits per byte": "bits_per_byte",
    "parameters": "parameters", "processor seconds": "seconds", "parameters of a token": "active",
    "busiest expert (fair: 1)": "busiest", "idlest expert (fair: 1)": "idlest",
    "loss, second half of the trained length": "near", "loss past the trained length": "beyond",
}  # fmt: skip
CURVES = {
    "greedy accuracy": "accuracy", "right, as rewarded": "correct",
    "reward vectors kept apart": "distinct_advantages",
}  # fmt: skip


def fields(text: str) -> dict:
    return dict(word.split("=") for word in text.split())


def value(row: dict, head: str):
    """What a column shows of a row, by the words of its head."""
    if head.endswith(", mean of the curve"):
        x, y = map(np.array, row["curves"][CURVES[head.removesuffix(", mean of the curve")]])
        return np.trapezoid(y, x) / (x[-1] - x[0])
    if head.startswith("rollouts to "):
        x, y = map(np.array, row["curves"]["accuracy"])
        goal = float(head.split()[-1])
        fine = np.linspace(x[0], x[-1], 450001)
        above = np.interp(fine, x, y) >= goal - 1e-9
        return fine[above.argmax()] if above.any() else None
    return row.get(WORDS[head])


def regression(values: np.ndarray, seeds: bool) -> tuple[float, int]:
    """(C, n) -> residual std and degrees of freedom of the model cell (+ seed), by least squares. NaN: no such run."""
    C, n = values.shape
    cell, seed = np.divmod(np.arange(C * n), n)
    design = np.concatenate([np.eye(C)[cell], np.eye(n)[seed]] if seeds else [np.eye(C)[cell]], axis=1)
    there = ~np.isnan(values.ravel())
    design, y = design[there], values.ravel()[there]
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df = len(y) - rank
    return math.sqrt(((y - design @ fit) ** 2).sum() / df), int(df)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_figure_of_a_table_is_that_of_the_rows(page):
    preset = runpy.run_path(str(ROOT / "configs" / f"ablate_{page.stem}.py"))
    base, cells, own = fields(preset["base"]), {}, None
    for line in preset["cells"]:
        part, *label, settings = (piece.strip() for piece in line.split("|"))
        made = base | fields(settings)
        cells[part, label[0] if label else settings] = " ".join(f"{k}={made[k]}" for k in sorted(made))
    if "reference" in preset:
        made = base | fields(preset["reference"])
        own = " ".join(f"{k}={made[k]}" for k in sorted(made))
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    rows = [row for row in rows if not (row["cell"] == own and row["seed"] in preset.get("tuned_seeds", ()))]
    paired = preset["stage"] == "pretrain" or preset.get("paired", False)

    inside = page.read_text(encoding="utf-8").split("<!-- table -->")[1].split("<!-- /table -->")[0]
    head, _, *body = [[x.strip() for x in line.strip("| ").split(" | ")] for line in inside.splitlines() if "|" in line]
    notes = [line for line in inside.splitlines() if line.startswith("* ")]
    assert [(line[0], line[1]) for line in body] == list(cells) and head[-1] == "seeds"
    assert [line[-1] for line in body] == [str(sum(row["cell"] == key for row in rows)) for key in cells.values()]
    compared = 0
    for column, title in enumerate(head[2:-1], start=2):
        plain = title.removesuffix(", minus the reference's")
        shown = {cell: line[column] for cell, line in zip(cells, body)}
        unique = list(dict.fromkeys(cells.values()))
        found = np.full((len(unique), 1 + max(row["seed"] for row in rows)), np.nan)
        for row in rows:
            if (x := value(row, plain)) is not None:
                found[unique.index(row["cell"]), row["seed"]] = x
        if plain == title:
            for cell, text in shown.items():
                check_mean(text, found[unique.index(cells[cell])], sum(row["cell"] == cells[cell] for row in rows))
            continue
        spread = found[[np.nanstd(some) > 0 for some in found]]
        s, df = regression(spread, paired)
        t, p = upper(df)
        errors, most = [], 0
        for part in dict.fromkeys(part for part, _ in cells):
            mine = [cell for cell in cells if cell[0] == part]
            reference = next((cell for cell in mine if cells[cell] == own), mine[0])
            first, raw = found[unique.index(cells[reference])], {}
            assert shown[reference] == "-"
            for cell in mine:
                other = found[unique.index(cells[cell])]
                if cell != reference and not np.isnan(other).all():
                    error = s * math.sqrt(1 / (~np.isnan(first)).sum() + 1 / (~np.isnan(other)).sum())
                    difference = np.nanmean(other) - np.nanmean(first)
                    raw[cell] = difference, np.interp(-0.05, -p, t) * error, np.interp(abs(difference) / error, t, p)
                    errors.append(error)
            done = [q for *_, q in raw.values()]
            for cell, (difference, half, q) in raw.items():
                # Holm: the largest of all p that are at most this one, each times the number that are not smaller
                corrected = min(1, max(x * sum(y >= x for y in done) for x in done if x <= q))
                bold, d, h, sign, number = re.fullmatch(
                    r"(\*\*)?(-?[\d.]+) ± ([\d.]+)(?:\*\*)? \(p ([=<]) ([\d.]+)\)", shown[cell]
                ).groups()
                unit = 0.51 * 10.0 ** -len(d.partition(".")[2])
                assert float(d) == pytest.approx(difference, abs=unit) and float(h) == pytest.approx(half, abs=unit)
                assert float(number) == pytest.approx(corrected, abs=5.1e-4) if sign == "=" else corrected < 0.001
                assert (bold is not None) == (corrected <= 0.05)
                compared += 1
            most = max(most, len(raw))
        (note,) = (line for line in notes if line.startswith(f"* {plain}: "))
        assert ("paired by seed" in note) == paired and ("independent seeds" in note) != paired
        least = (np.interp(-0.05 / most, -p, t) + np.interp(-0.4, -p, t)) * max(errors)  # P(T > t) = 0.2
        pattern = r"deviation ([\d.]+), (\d+) degrees of freedom .*a difference of ([\d.]+) \(at 5 %(?: / (\d+))?[,)]"
        said = re.search(pattern, note).groups()
        assert int(said[1]) == df and int(said[3] or 1) == most
        for text, expected in zip(said[::2], (s, least)):
            assert float(text) == pytest.approx(expected, abs=0.51 * 10.0 ** -len(text.partition(".")[2]))
    assert compared and len(notes) == sum("minus the reference's" in title for title in head)


def check_mean(text: str, values: np.ndarray, runs: int) -> None:
    """``0.861 (0.026)``: the mean and the standard deviation; ``, 2 of 3`` if a run has none."""
    known = values[~np.isnan(values)]
    if not len(known):
        assert text == "-"
        return
    mean, spread, count, of = re.fullmatch(r"(-?[\d.]+)(?: \(([\d.]+)\))?(?:, (\d+) of (\d+))?", text).groups()
    unit = 0.51 * 10.0 ** -len(mean.partition(".")[2])
    assert float(mean) == pytest.approx(known.mean(), abs=unit)
    assert float(spread or 0) == pytest.approx(known.std(ddof=1) if len(known) > 1 else 0, abs=unit)
    assert (int(count), int(of)) == (len(known), runs) if count else len(known) == runs


def test_how_many_differences_the_study_of_grpo_finds():
    """What its page says: ten by the mean of the curve, four at the end, of 28 in all parts but that of the starts."""
    page = (ROOT / "docs" / "experiments" / "grpo.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.split("<!-- table -->")[1].splitlines() if line.startswith("| ")][2:]
    lines = [line for line in lines if line[0] != "| start"]
    assert len({line[0] for line in lines}) == 11 and sum("±" in line[6] for line in lines) == 28
    assert [sum("**" in line[column] for line in lines) for column in (4, 6)] == [4, 10]


@pytest.mark.parametrize(
    ("name", "figure", "said"),
    [
        ("positions", "bits_per_byte", "their F is 60"),
        ("lora", "accuracy", "F is 1.6 in greedy"),
        ("lora", "correct", "5.0 in sampled"),
        ("norms", "bits_per_byte", "(F 0.1)"),
    ],
)
def test_how_much_a_seed_moves_all_cells(name, figure, said):
    """F of the seed, beside the cell: what the pages say for and against pairing."""
    path = ROOT / "docs" / "experiments" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    found = np.full((len(cells), 3), np.nan)
    for row in rows:
        found[cells.index(row["cell"]), row["seed"]] = row[figure]
    (without, more), (s, df) = regression(found, seeds=False), regression(found, seeds=True)
    F = (without**2 * more - s**2 * df) / (more - df) / s**2
    assert said in " ".join(path.with_suffix(".md").read_text(encoding="utf-8").split())
    assert float(re.search(r"\d+(\.\d)?", said)[0]) == pytest.approx(F, abs=0.5 if F > 10 else 0.05)


def test_who_ends_above_and_below_the_weak_start():
    """What the page on GDPO says of single seeds."""
    rows = [json.loads(line) for line in (ROOT / "docs/experiments/gdpo.jsonl").read_text().splitlines()]
    ends = {"combine=sum": [], "scale=batch": [], "scale=none": [], "GDPO": []}
    for row in rows:
        settings = row["cell"].split()
        if "start=sft_96" in settings and "format_weight=0" not in settings:
            name = next((name for name in ("scale=batch", "scale=none", "combine=sum") if name in settings), "GDPO")
            ends[name].append(row["accuracy"] - row["start"])
    assert {name: sorted(np.sign(values)) for name, values in ends.items()} == {
        "combine=sum": [-1, -1, -1], "scale=batch": [1, 1, 1], "scale=none": [1, 1, 1], "GDPO": [1, 1, 1],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The ways to combine rewards


def test_two_answers_and_one_reward_by_hand():
    """p = 0.25: one of two with 2 · 0.25 · 0.75; its advantages are ±0.5 or, divided by √0.5, ±0.71."""
    rewards, chances = combine.all_groups(combine.independent((0.25,)), 2)
    assert rewards.tolist() == [[[0], [0]], [[0], [1]], [[1], [1]]]
    assert chances.tolist() == pytest.approx([0.5625, 0.375, 0.0625])
    ways = combine.advantages(rewards)
    assert ways["no std"].tolist() == [[0, 0], [-0.5, 0.5], [0, 0]]
    assert ways["GDPO"][1].tolist() == ways["added"][1].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    squared, share = combine.compare(combine.independent((0.25,)), 2)
    assert list(squared.values()) == pytest.approx([1, 1]) and list(share.values()) == pytest.approx([0, 0, 0])


def test_sampled_groups_give_the_same_figures():
    generator = np.random.default_rng(0)
    rows, rates = np.array(list(combine.WEAK)), list(combine.WEAK.values())
    r = rows[generator.choice(len(rows), size=(60000, 4), p=rates)].astype(float)  # (groups, 4, 3)
    total = r.sum(2)
    center = lambda x: x - x.mean(1, keepdims=True)  # noqa: E731
    divide = lambda x: center(x) / np.maximum(x.std(1, ddof=1, keepdims=True), 1e-9)  # noqa: E731
    ways = {"added": divide(total), "no std": center(total), "GDPO": sum(divide(r[:, :, k]) for k in range(3))}
    squared, share = combine.compare(combine.WEAK, 4)
    alike = r[:, :, 0].std(1) == 0
    for name, a in ways.items():
        assert share[name] == pytest.approx((a[alike] ** 2).sum() / (a**2).sum(), abs=0.01)
        if name != "GDPO":
            assert squared[name] == pytest.approx(np.corrcoef(a.ravel(), ways["GDPO"].ravel())[0, 1] ** 2, abs=0.01)


def test_the_page_has_the_figures_of_the_enumeration():
    page = (ROOT / "docs" / "experiments" / "gdpo.md").read_text(encoding="utf-8")
    lines = page.split("<!-- ways -->")[1].split("<!-- /ways -->")[0].strip().splitlines()[2:]
    expected = []
    for name, (answers, sizes) in combine.CASES.items():
        for size in sizes:
            squared, share = combine.compare(
                answers if isinstance(answers, dict) else combine.independent(answers), size
            )
            expected.append((name, size, *squared.values(), *share.values()))
    assert len(lines) == len(expected)
    for line, (name, size, *figures) in zip(lines, expected):
        cells = line.strip("| ").split(" | ")
        assert cells[:2] == [name, str(size)] and [float(x) for x in cells[2:]] == pytest.approx(figures, abs=5.1e-4)
    assert min(x[3] for x in expected if x[1] == 4) >= 0.995 - 5e-4


def test_other_weights_undo_the_collapse():
    assert gdpo.count_lessons(4, 3) == gdpo.count_lessons(4, 3, (1, 1, 1)) == (14, 20, 45)
    assert gdpo.count_lessons(4, 3, (1, 0.9, 0.79)) == (203, 239, 239)
    page = (ROOT / "docs" / "experiments" / "gdpo.md").read_text(encoding="utf-8")
    assert "weights=(1, 0.9, 0.79)" in page
    assert re.search(r"give 203 lessons, without the std 239, and GDPO 239", page)
