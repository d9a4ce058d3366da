"""Pictures of a run: one panel for each metric, drawn from metrics.jsonl alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

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
    width = max(2, len(values) // 20)
    mean = [sum(values[max(0, i - width) : i + 1]) / len(values[max(0, i - width) : i + 1]) for i in range(len(values))]
    axis.plot(steps, mean, color=line.get_color(), label=label)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    from runtime.checkpoint import write_atomically

    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    plt.close(figure)


def plot_curves(metrics: Path, path: Path, title: str = "") -> None:
    """One panel for each metric of a run."""
    series = {name: xy for name, xy in read_metrics(metrics).items() if name not in _HIDDEN}
    if not series:
        return
    figure, axes = _axes(len(series))
    for axis, (name, (steps, values)) in zip(axes, series.items()):
        _draw(axis, steps, values)
        axis.set_title(name, fontsize=10)
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


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ()
    """Folders of runs, a panel for each."""
    curves: tuple[str, ...] = ("loss",)
    """Metrics that share a panel."""
    write: str = "curves.png"
    """The picture."""


def main() -> None:
    """``python -m runtime.plots --runs out/a out/b --curves score correct --write picture.png``"""
    from runtime.config import parse
    from runtime.errors import UserError

    config = parse(Config)
    for run in config.runs:
        if not (Path(run) / "metrics.jsonl").exists():
            raise UserError(f"{run} holds no metrics.jsonl")
    if not config.runs:
        raise UserError("which runs? --runs out/arith/ppo out/arith/grpo")
    folders = {Path(run).name: Path(run) for run in config.runs}
    plot_stages(folders, Path(config.write), dict.fromkeys(folders, list(config.curves)))
    print(config.write)


if __name__ == "__main__":
    from runtime.errors import run_main

    run_main(main)
