"""Pictures of a run: one panel for each metric, drawn from metrics.jsonl alone."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint import write_atomically
from runtime.config import parse
from runtime.errors import UserError, run_main

_HIDDEN = {"step", "time", "lr", "mfu", "tokens_per_second"}


def read_metrics(path: Path) -> dict[str, tuple[list, list]]:
    """Each metric's (steps, values) in the order of the file."""
    series: dict[str, tuple[list, list]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def _axes(n: int, columns: int = 3):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for extra in axes.flat[n:]:
        extra.set_visible(False)
    return figure, axes.flat


def _draw(axis, steps, values, label=None) -> None:
    """The values, faint if there are many, under their running mean."""
    if len(values) <= 30:
        axis.plot(steps, values, marker=".", label=label)
        return
    line = axis.plot(steps, values, alpha=0.25, linewidth=0.8)[0]
    axis.plot(steps, _smooth(values, max(2, len(values) // 20)), color=line.get_color(), label=label)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    plt.close(figure)


def plot_curves(metrics: Path, path: Path, title: str = "") -> None:
    """One panel for each metric of a run."""
    series = {name: xy for name, xy in read_metrics(metrics).items() if name not in _HIDDEN}
    if not series:
        return
    panels: dict[str, list[str]] = {}  # load_2_0, load_2_1, ...: the experts of block 2 share a panel
    for name in series:
        expert = re.fullmatch(r"load_(\d+)_\d+", name)
        panels.setdefault(f"share of each expert, block {expert[1]}" if expert else name, []).append(name)
    figure, axes = _axes(len(panels))
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            _draw(axis, *series[name])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_stages(folders: dict[str, Path], path: Path, wanted: dict[str, list[str]]) -> None:
    """One picture for a chain of stages: ``wanted[stage]`` names the metrics that share its panel."""
    figure, axes = _axes(len(folders), columns=min(3, len(folders)))
    for axis, (stage, folder) in zip(axes, folders.items()):
        series = read_metrics(Path(folder) / "metrics.jsonl")
        for name in wanted.get(stage, []):
            if name in series:
                _draw(axis, *series[name], label=name)
        axis.set_title(stage)
        axis.set_xlabel("step", fontsize=8)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_lines(panels: dict[str, dict[str, tuple[list, list]]], path: Path, x: str, logarithmic: bool = False) -> None:
    """A panel for each title: the lines {label: (xs, ys)} over a common kind of x."""
    figure, axes = _axes(len(panels), columns=min(3, len(panels)))
    for axis, (title, lines) in zip(axes, panels.items()):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x, fontsize=8)
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, framealpha=0.5)
    _save(figure, path)


def plot_study(runs: dict, path: Path, curves: list[str], scatter: list[str], names: dict[str, str]) -> None:
    """The cells of a study: ``runs[part, label]`` is a list of rows, one for each seed.

    A panel for each part and curve, a line for each cell, the mean over its seeds in a band from the least to the
    greatest; or, with two columns to ``scatter``, one panel with a point for each cell, bars over its seeds, and a
    line through the cells of each part.

    A curve NAME-first is a difference to the first cell. A curve NAME@x has x on its axis, whose values are means
    over seeds too, and is drawn as it was measured; one against steps is smoothed if it has many points. Against
    positions, a dotted line ends the trained length.
    """
    parts = list(dict.fromkeys(part for part, _ in runs))
    if scatter:
        figure, axes = _axes(1, columns=1)
        figure.set_size_inches(6.5, 4.5)
        for part in parts:
            points = []
            for (which, label), rows in runs.items():
                if which == part:
                    known = [row for row in rows if all(row.get(name) is not None for name in scatter)]
                    if not known:
                        continue
                    xs, ys = ([row[name] for row in known] for name in scatter)
                    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
                    spread = [[x - min(xs)], [max(xs) - x]], [[y - min(ys)], [max(ys) - y]]
                    points.append((x, y, spread, label))
            line = axes[0].plot([p[0] for p in points], [p[1] for p in points], marker="o", label=part)[0]
            for x, y, (wide, high), label in points:
                axes[0].errorbar([x], [y], xerr=wide, yerr=high, color=line.get_color(), alpha=0.4)
                axes[0].annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes[0].set_xlabel(names.get(scatter[0], scatter[0]), fontsize=9)
        axes[0].set_ylabel(names.get(scatter[1], scatter[1]), fontsize=9)
        axes[0].grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        return _save(figure, path)
    panels = [(part, curve) for part in parts for curve in curves]
    labels = list(dict.fromkeys(label for _, label in runs))  # a label has the same colour in all panels
    figure, axes = _axes(len(panels), columns=min(3, len(panels)) if len(curves) == 1 else len(curves))
    for axis, (part, curve) in zip(axes, panels):
        plain = curve.removesuffix("-first")
        name, _, what = plain.partition("@")
        title = names.get(plain) or names.get(name, name)
        if plain != curve:
            title += ", minus the first's"
            axis.axhline(0, color="black", linewidth=0.5)
        for (which, label), rows in runs.items():
            seeds = [row["curves"][curve] for row in rows if curve in row.get("curves", {})]
            if which != part or not seeds:
                continue
            n = min(len(steps) for steps, _ in seeds)  # a value that was no number is left out
            steps = [sum(steps[i] for steps, _ in seeds) / len(seeds) for i in range(n)]
            smooth = [v if what else _smooth(v, len(v) // 12) for _, v in seeds]
            values = [[v[i] for v in smooth] for i in range(n)]
            colour = f"C{labels.index(label) % 10}"
            line = axis.plot(steps, [sum(v) / len(v) for v in values], label=label, color=colour)[0]
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], alpha=0.12, color=line.get_color()
            )
        if what == "position":
            axis.axvline(next(iter(runs.values()))[0]["trained_length"], color="black", linestyle=":", linewidth=1)
        if what == "layer":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{part}: {title}" if part else title, fontsize=10)
        axis.set_xlabel(what or "step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, framealpha=0.5)
    _save(figure, path)


def _smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and the ``width`` before it."""
    parts = [values[max(0, i - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_sweep(results: list[dict], path: Path) -> None:
    """Validation loss against the learning rate, on a logarithmic axis."""
    figure, axes = _axes(1, columns=1)
    axis = axes[0]
    ordered = sorted(results, key=lambda row: row["lr"])
    axis.plot([row["lr"] for row in ordered], [row["val_loss"] for row in ordered], marker="o")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation loss")
    axis.grid(alpha=0.3)
    _save(figure, path)


def read_report(path: Path) -> list[dict]:
    """The rows of a report.json that have an accuracy."""
    if not path.exists():
        raise UserError(f"there is no {path}; python pipeline.py makes out/arith/report.json")
    try:
        rows = [row for row in json.loads(path.read_text()) if "accuracy" in row]
        if not rows or not all({"stage", "low", "high"} <= set(row) for row in rows):
            raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path} holds no report card: rows with a stage, an accuracy, low and high") from None
    return rows


def plot_report(rows: list[dict], path: Path) -> None:
    """The accuracy of each stage of a report card, from top to bottom, with its 95 % interval."""
    figure, axes = _axes(1, columns=1)
    figure.set_size_inches(6.5, 0.9 + 0.26 * len(rows))
    for y, row in enumerate(rows):
        reach = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes[0].errorbar([row["accuracy"]], [y], xerr=reach, fmt="o", color="C0", markersize=5, capsize=3)
        axes[0].annotate(f"{row['accuracy']:.3f}", (1.03, y), fontsize=8, va="center", annotation_clip=False)
    axes[0].set_yticks(range(len(rows)), [row["stage"] for row in rows], fontsize=9)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_xlim(-0.02, 1.02)
    axes[0].set_xlabel("accuracy and its 95 % interval", fontsize=9)
    axes[0].grid(alpha=0.3, axis="x")
    _save(figure, path)


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ()
    """Folders of runs, a panel for each."""
    report: str = ""
    """Instead of runs: a report.json, whose accuracies are drawn with their intervals."""
    curves: tuple[str, ...] = ("loss",)
    """Metrics that share a panel."""
    write: str = "curves.png"
    """The picture."""


def main() -> None:
    """Curves of runs, or the report card of a pipeline::

        python -m runtime.plots --runs out/a out/b --curves score correct --write picture.png
        python -m runtime.plots --report out/arith/report.json --write picture.png

    Prints where the picture is.
    """
    config = parse(Config)
    if config.report:
        plot_report(read_report(Path(config.report)), Path(config.write))
        print(config.write)
        return
    for run in config.runs:
        if not (Path(run) / "metrics.jsonl").exists():
            raise UserError(f"{run} holds no metrics.jsonl")
    if not config.runs:
        raise UserError("which runs? --runs out/arith/ppo out/arith/grpo")
    folders = {Path(run).name: Path(run) for run in config.runs}
    plot_stages(folders, Path(config.write), dict.fromkeys(folders, list(config.curves)))
    print(config.write)


if __name__ == "__main__":
    run_main(main)
