"""What entropy buys: accuracy against the entropy that was spent for it.

RL on verified answers makes a policy surer, and in many runs of others the accuracy R followed the entropy H of a token
along one curve (Cui et al. 2025)::

    R = b - a · exp(H)

so that entropy is what accuracy is bought with, and b - a, at H = 0, is what a run can reach. Two things are looked at
here: whether the runs of the GRPO study, which differ in one setting each, end on one such curve, and which settings
end above or below it; and whether the first part of a run foretells its end::

    python studies/entropy.py                                       # the page anew, from the rows that are there
    python studies/entropy.py out/seed1 out/seed2 out/seed3         # with the runs of these starts (pipeline.py)
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import ablate
import intervals
from pages import keep_rows, read_rows, write_table
from runtime.config import parse, read_preset
from runtime.errors import UserError, run_main
from runtime.plots import plot_points, read_metrics

ROOT = Path(__file__).parents[1]
RUNS = {"ppo": "PPO", "grpo": "GRPO", "gdpo": "GDPO"}
SHARE = 0.4  # of a run, from which its end is foretold
LEAST = 0.3  # runs that end with fewer right answers never learned: they are on no curve


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py, whose runs of PPO, GRPO and GDPO are added."""
    ends: str = str(ROOT / "docs" / "experiments" / "grpo.jsonl")
    """The rows of the GRPO study."""
    page: str = "docs/experiments/entropy.md"
    """The page whose tables are written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


def fit(entropy: list[float], right: list[float]) -> tuple[float, float, float]:
    """b, a and R² of R = b - a · exp(H), by least squares.

    >>> fit([0.0, math.log(2), math.log(3)], [0.9, 0.7, 0.5])  # 1.1 - 0.2 · exp(H)
    (1.1, 0.2, 1.0)
    """
    h, r = (torch.tensor(values, dtype=torch.float64) for values in (entropy, right))
    terms = torch.stack([torch.ones_like(h), -h.exp()], dim=1)
    b, a = torch.linalg.lstsq(terms, r[:, None]).solution[:, 0].tolist()
    left = float((r - b + a * h.exp()).square().sum() / (r - r.mean()).square().sum())
    return round(b, 6), round(a, 6), round(1 - left, 6)


def settings() -> dict[str, str]:
    """The cells of the GRPO study, by their key, in words; the reference only once."""
    config = ablate.Config(**read_preset(ablate.Config, str(ROOT / "configs" / "ablate_grpo.py")))
    return {cell.key: f"{cell.part}: {cell.label}" for cell in reversed(ablate.read_cells(config))}


def ends(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each setting that starts where the others do: (entropy, share of right sampled answers) of its runs' ends."""
    names, found = settings(), {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "start=" not in row["cell"] and row["correct"] >= LEAST:
            found.setdefault(names[row["cell"]], []).append((row["entropy"], row["correct"]))
    return found


def off_the_curve(cells: dict[str, list[tuple[float, float]]], b: float, a: float) -> list[tuple[str, float, float]]:
    """Of each setting how far its runs lie above the curve, on average, and Holm's p of that; the largest first."""
    residuals = {name: [r - b + a * math.exp(h) for h, r in points] for name, points in cells.items()}
    s, df, _ = intervals.pooled(list(residuals.values()))
    means = {name: statistics.fmean(values) for name, values in residuals.items()}
    ps = [intervals.tail(means[name] / (s / math.sqrt(len(values))), df) for name, values in residuals.items()]
    found = [(name, means[name], p) for name, p in zip(residuals, intervals.holm(ps))]
    return sorted(found, key=lambda row: -abs(row[1]))


def course(folder: Path) -> list[tuple[float, float]]:
    """(entropy, share of right answers) of every rollout of a run."""
    metrics = read_metrics(folder / "metrics.jsonl")
    return [(round(h, 5), round(r, 5)) for h, r in zip(metrics["entropy"][1], metrics["correct"][1])]


def foretold(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The accuracy of a run's last tenth, as its first part foretells it from its entropy, what it is, and R² of the
    whole run."""
    early, late = points[: int(SHARE * len(points))], points[-max(1, len(points) // 10) :]
    b, a, _ = fit(*map(list, zip(*early)))
    predicted = statistics.fmean(b - a * math.exp(h) for h, _ in late)
    return predicted, statistics.fmean(r for _, r in late), fit(*map(list, zip(*points)))[2]


def table_of_settings(cells: dict[str, list[tuple[float, float]]]) -> str:
    h, r = zip(*(point for points in cells.values() for point in points))
    b, a, r2 = fit(list(h), list(r))
    lines = [
        f"The curve: R = {b:.3f} - {a:.3f} · exp(H), so {b - a:.3f} at H = 0; {len(h)} runs of {len(cells)} settings, "
        f"R² = {r2:.2f}.", "",
        "| setting | entropy | right | above the curve |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, above, p in off_the_curve(cells, b, a):
        entropy, right = (statistics.fmean(values) for values in zip(*cells[name]))
        said = f"{above:+.3f} (p {'< 0.001' if p < 0.0005 else f'= {p:.3f}'})"
        lines.append(f"| {name} | {entropy:.3f} | {right:.3f} | {f'**{said}**' if p <= 0.05 else said} |")
    return "\n".join(lines)


def table_of_runs(rows: list[dict]) -> str:
    lines = [
        f"| method | foretold from the first {SHARE:.0%} | reached | R² of the whole run | runs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [foretold(row["course"]) for row in rows if row["method"] == method]
        cells = [f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in zip(*found)]
        lines.append("| " + " | ".join([method, *cells, str(len(found))]) + " |")
    return "\n".join(lines)


def main() -> None:
    config = parse(Config)
    page, cells = Path(config.page), ends(Path(config.ends))
    rows = read_rows(page)
    for start in map(Path, config.starts):
        for stage, method in RUNS.items():
            if not (start / stage / "metrics.jsonl").exists():
                raise UserError(f"{start} has no finished {stage}: python pipeline.py --out {start}")
            rows = [row for row in rows if (row["start"], row["method"]) != (start.name, method)]
            rows.append({"start": start.name, "method": method, "course": course(start / stage)})
    keep_rows(page, rows)
    panels = {
        "ends of the runs of the GRPO study": {part: [] for part in dict.fromkeys(n.split(":")[0] for n in cells)}
    }
    for name, points in cells.items():
        panels["ends of the runs of the GRPO study"][name.split(":")[0]] += points
    panels |= {
        f"{method}: every rollout of {sum(row['method'] == method for row in rows)} runs": {
            row["start"]: row["course"] for row in rows if row["method"] == method
        }
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    plot_points(panels, page.with_suffix(".png"), "entropy of a token, nats", "share of right answers")
    made = table_of_settings(cells) + ("\n\n" + table_of_runs(rows) if rows else "")
    write_table(page, made)
    print(made)


if __name__ == "__main__":
    run_main(main)
