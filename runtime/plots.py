"""Pictures of runs, of studies and of a report card, drawn from their numbers alone.

One style for all: lines that stand out on white and that colour-blind readers can tell apart, axes with words and
units, legends outside the data, the same colour for the same thing in all panels, one range for what is compared.
"""

import functools
import io
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint import write_atomically
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.metrics import whole_row
from runtime.words import check_names, label_of, words_of

# Okabe and Ito's palette ("Color universal design", 2008) with orange and yellow left out and blue, purple and sky blue
# darkened: thin lines need a contrast of 3 to 1 with white, and some of theirs have 2.
COLOURS = ("#005A9C", "#D55E00", "#009E73", "#C56FA0", "#3E9BDC", "#000000")
DASHES = ("-", "--", ":", "-.")  # of the seventh line and so on
SHARED = ("#000000", *COLOURS[:-1])  # of settings that several parts of a study share
STYLE = {
    "figure.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 8.5, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 1.6,
    "lines.linewidth": 1.5, "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "axes.titlelocation": "left", "figure.titlesize": 11,
}  # fmt: skip
GREY = "#5F5F5F"
_HIDDEN = {"step", "time", "lr", "mfu", "tokens_per_second"}


def read_metrics(path: Path) -> dict[str, tuple[list, list]]:
    """Each metric's (steps, values) in the order of the file. Lines that are damaged are left out; ValueError if all
    are."""
    series: dict[str, tuple[list, list]] = {}
    lines = Path(path).read_bytes().decode("utf-8", "replace").splitlines()
    rows = [row for row in map(whole_row, lines) if row is not None]
    if lines and not rows:
        raise ValueError("no line of it is a row of metrics")
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


# ----------------------------------------------------------------------------------------------------------------------
# What all pictures are made of


@functools.cache
def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    import matplotlib.pyplot as plt

    return plt


def _axes(n: int, columns: int = 3, width: float = 3.8, height: float = 2.5):
    rows = -(-n // columns)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    for extra in axes.flat[n:]:
        extra.set_visible(False)
    return figure, list(axes.flat[:n])


def _line_style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """The mean of each value and the ``half`` on either side; of fewer towards the ends, as many on both sides, so that
    a straight line stays where it is.

    >>> _smooth([0.0, 3.0, 0.0, 3.0, 0.0], 1)
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def _draw(axis, steps, values, label=None, **style) -> None:
    """The values; if there are many, faint behind their running mean."""
    if len(values) <= 30:
        axis.plot(steps, values, marker="o", markersize=3, label=label, **style)
        return
    axis.plot(steps, values, linewidth=0.7, alpha=0.3, color=style.get("color"))
    axis.plot(steps, _smooth(values, max(1, len(values) // 40)), label=label, **style)


def _legend_below(figure, axes: Iterable, most: int = 6) -> None:
    """One legend for all axes, below them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        inches = max(len(label) for label in handles) * 0.065 + 0.5  # of the widest entry
        columns = max(1, min(len(handles), most, int(figure.get_figwidth() / inches)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _share_ranges(groups: Iterable[list]) -> None:
    """The same range for the axes of each group: a difference between panels is one of the data. An axis that would
    press all others together, to less than half of the height, keeps its own and says so.
    """
    for axes in groups:
        if len(axes) < 2:
            continue
        common = list(axes)
        for axis in axes:
            others = [one.get_ylim() for one in common if one is not axis]
            rest, everything = _span(others), _span([one.get_ylim() for one in common])
            if len(others) > 1 and rest[1] - rest[0] < 0.5 * (everything[1] - everything[0]):
                common.remove(axis)
                axis.set_title(f"{axis.get_title(loc='left')} (a range of its own)", loc="left")
        low, high = _span([axis.get_ylim() for axis in common])
        for axis in common:
            axis.set_ylim(low, high)


def _span(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _save(figure, path: Path, most: int = 300_000) -> None:
    """As a PNG of at most ``most`` bytes, if that can be had: of 256 colours, which is a third as large and looks the
    same, or of fewer.
    """
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    _pyplot().close(figure)
    image = Image.open(drawn).convert("RGB")
    for colours in (256, 64, 24):
        packed = io.BytesIO()
        image.quantize(colours, kmeans=1, dither=Image.Dither.NONE).save(packed, format="PNG", optimize=True)
        if packed.tell() <= most:
            break
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(packed.getvalue()))


# ----------------------------------------------------------------------------------------------------------------------
# Curves of runs


def plot_curves(metrics: Path, path: Path, title: str = "") -> None:
    """One panel for each metric of a run; those that never changed are named below the title, with their value."""
    series = {name: xy for name, xy in read_metrics(metrics).items() if name not in _HIDDEN}
    if not series:
        return
    still = {name: y[0] for name, (_, y) in series.items() if len(y) > 2 and min(y) == max(y)}
    if len(still) < len(series):
        series = {name: xy for name, xy in series.items() if name not in still}
        told = ", ".join(f"{words_of(name)[0]} {value:.4g}" for name, value in still.items())
        title += f"\n{textwrap.fill(f'unchanged: {told}', 110)}" if still else ""
    panels: dict[str, list[str]] = {}  # load_2_0, load_2_1, ...: the experts of block 2 share a panel
    for name in series:
        expert = re.fullmatch(r"load_(\d+)_\d+", name)
        panels.setdefault(f"load of each expert, block {expert[1]}" if expert else words_of(name)[0], []).append(name)
    figure, axes = _axes(len(panels), columns=min(4, len(panels)), width=3.3, height=2.2)
    for axis, (words, names) in zip(axes, panels.items()):
        for i, name in enumerate(names):
            _draw(axis, *series[name], **_line_style(i))
        axis.set_title(textwrap.fill(words.replace(", held out", ", held\u00a0out"), 36))
        axis.set_xlabel("step")
        axis.set_ylabel(words_of(names[0])[1])
    figure.suptitle(title)
    _save(figure, path)


def plot_stages(folders: dict[str, Path], path: Path, wanted: dict[str, list[str]]) -> None:
    """One picture for a chain of stages: ``wanted[stage]`` names the metrics that share its panel. A metric has one
    colour in all panels, and panels of the same quantity have the same range.
    """
    names = list(dict.fromkeys(name for stage in folders for name in wanted.get(stage, [])))
    figure, axes = _axes(len(folders), columns=min(4, len(folders)), width=3.3 if len(folders) > 3 else 4.2)
    ranges: dict[frozenset, list] = {}
    for axis, (stage, folder) in zip(axes, folders.items()):
        series = read_metrics(Path(folder) / "metrics.jsonl")
        shown = [name for name in wanted.get(stage, []) if name in series]
        for name in shown:
            _draw(axis, *series[name], label=label_of(name), **_line_style(names.index(name)))
        units = frozenset(words_of(name)[1] for name in shown)
        ranges.setdefault(units, []).append(axis)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.set_ylabel(" · ".join(sorted(filter(None, units))) or (words_of(shown[0])[0] if shown else ""))
    _share_ranges(ranges.values())
    _legend_below(figure, axes)
    _save(figure, path)


def plot_compared(folders: dict[str, Path], path: Path, curves: Sequence[str]) -> None:
    """Runs against each other: a panel for each metric, a line, in one colour throughout, for each run."""
    figure, axes = _axes(len(curves), columns=min(3, len(curves)), width=4.2, height=2.8)
    series = {name: read_metrics(Path(folder) / "metrics.jsonl") for name, folder in folders.items()}
    for axis, curve in zip(axes, curves):
        for i, (name, mine) in enumerate(series.items()):
            if curve in mine:
                _draw(axis, *mine[curve], label=name, **_line_style(i))
        axis.set_title(words_of(curve)[0])
        axis.set_xlabel("step")
        axis.set_ylabel(words_of(curve)[1] or words_of(curve)[0])
    _legend_below(figure, axes)
    _save(figure, path)


def short_names(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Each folder by the end of its path, as much of it as tells it from the others.

    >>> list(short_names(["out/a/sft", "out/b/sft", "out/b/grpo"]))
    ['a/sft', 'b/sft', 'grpo']
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    given = {Path(folder).resolve(): Path(folder) for folder in folders}
    names = {}
    for path in paths:
        longest = len(path.parts)
        for n in range(1, longest + 1):
            name = "/".join(path.parts[longest - n :])
            if sum(other.parts[-n:] == path.parts[-n:] for other in paths) == 1:
                break
        names[name] = given[path]
    return names


def plot_lines(panels: dict[str, dict[str, tuple[list, list]]], path: Path, x: str, logarithmic: str = "") -> None:
    """A panel for each title: the lines {label: (xs, ys)} over a common kind of x; "x" or "y" may be logarithmic."""
    figure, axes = _axes(len(panels), columns=min(3, len(panels)))
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items()):
        for label, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=label, **_line_style(labels.index(label)))
        axis.set_title(title)
        axis.set_xlabel(x)
        if logarithmic:
            axis.set(**{f"{logarithmic}scale": "log"})
    _legend_below(figure, axes)
    _save(figure, path)


def plot_band(panels: dict[str, tuple[tuple[list, list, list], tuple[list, list]]], path: Path) -> None:
    """A panel for each title: the band (steps, low, high) in which a run should lie, and the run (steps, values)."""
    figure, axes = _axes(len(panels), columns=min(3, len(panels)), width=3.8, height=2.6)
    for axis, (title, ((steps, low, high), mine)) in zip(axes, panels.items()):
        axis.fill_between(steps, low, high, color=GREY, alpha=0.2, linewidth=0, label="where 95 % of runs lie")
        axis.plot(*mine, label="this run", **_line_style(0))
        axis.set_title(textwrap.fill(title, 44))
        axis.set_xlabel("step")
    _legend_below(figure, axes)
    _save(figure, path)


def plot_points(panels: dict[str, dict[str, list[tuple[float, float]]]], path: Path, x: str, y: str) -> None:
    """A panel for each title: the points (x, y) of each label, a colour for each of all labels."""
    figure, axes = _axes(len(panels), columns=min(2, len(panels)), width=4.4, height=3.0)
    labels = list(dict.fromkeys(label for points in panels.values() for label in points))
    for axis, (title, points) in zip(axes, panels.items()):
        for label, mine in points.items():
            style = _line_style(labels.index(label))
            axis.plot(
                [p[0] for p in mine], [p[1] for p in mine], "os^Dv"[labels.index(label) % 5], label=label,
                color=style["color"], markersize=3, alpha=0.7,
            )  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    _legend_below(figure, axes)
    _save(figure, path)


def plot_sweep(results: list[dict], path: Path) -> None:
    """Validation loss against the learning rate, on a logarithmic axis."""
    figure, (axis,) = _axes(1, columns=1, width=4.5, height=3)
    ordered = sorted(results, key=lambda row: row["lr"])
    axis.plot([row["lr"] for row in ordered], [row["val_loss"] for row in ordered], marker="o", color=COLOURS[0])
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel(label_of("val_loss"))
    _save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Studies


def plot_study(runs: dict, path: Path, curves: list[str], scatter: list[str], names: dict[str, str]) -> None:
    """The cells of a study: ``runs[part, label]`` is a list of rows, one for each seed.

    A panel for each part and curve, a line for each cell, the mean over its seeds in a band from the least to the
    greatest; or, with two columns to ``scatter``, see ``plot_scatter``. ``names``: words that are this study's own.

    A curve NAME-reference is a difference to the reference cell. A curve NAME@x has x on its axis, whose values are
    means over seeds too, and is drawn as it was measured; one against steps is smoothed if it has many points. Against
    positions, a dotted line ends the trained length.
    """
    if scatter:
        return plot_scatter(runs, path, scatter, names)
    parts = list(dict.fromkeys(part for part, _ in runs))
    panels = [(part, curve) for part in parts for curve in curves]
    colours = _study_colours({key: rows[0].get("cell", key[1]) for key, rows in runs.items()})
    one_legend = len({label for _, label in runs}) <= len(COLOURS)
    columns = min(3, len(panels)) if len(curves) == 1 else len(curves)
    figure, axes = _axes(len(panels), columns, width=3.6, height=2.5 if one_legend else 3.0)
    for axis, (part, curve) in zip(axes, panels):
        plain = curve.removesuffix("-reference")
        what = plain.partition("@")[2]
        if plain != curve:
            axis.axhline(0, color="black", linewidth=0.5)
        for (which, label), rows in runs.items():
            seeds = _have(rows, curve)
            if which != part or not seeds:
                continue
            n = min(len(steps) for steps, _ in seeds)  # a value that was no number is left out
            steps = [sum(steps[i] for steps, _ in seeds) / len(seeds) for i in range(n)]
            smooth = [v[:n] if what else _smooth(v[:n], n // 24) for _, v in seeds]
            values = [[v[i] for v in smooth] for i in range(n)]
            style = colours[part, label]
            axis.plot(steps, [sum(v) / len(v) for v in values], label=label, **style)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, alpha=0.13, color=style["color"], linewidth=0)
        if what == "position":
            axis.axvline(next(iter(runs.values()))[0]["trained_length"], color="black", linestyle=":", linewidth=1)
        if what == "tokens":
            axis.xaxis.set_major_formatter(_pyplot().matplotlib.ticker.EngFormatter(sep=""))  # 100k
        if what == "layer":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(part)
        axis.set_xlabel(what or "step")
        mine = {label: rows for (which, label), rows in runs.items() if which == part}
        reference = next((label for label, rows in mine.items() if not _have(rows, curve)), next(iter(mine)))
        axis.set_ylabel(_curve_label(curve, names, reference))
        if not one_legend:  # below its own panel, in as many columns as fit
            labels = axis.get_legend_handles_labels()[1]
            fit = max(1, int(3.6 / (0.4 + 0.06 * max(map(len, labels), default=1))))  # inches
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
            axis.legend(**place, ncols=min(fit, len(labels)), columnspacing=1.0)
    _share_ranges([[axis for axis, (_, which) in zip(axes, panels) if which == curve] for curve in curves])
    if one_legend:
        _legend_below(figure, axes)
    _save(figure, path)


def _have(rows: list[dict], curve: str) -> list:
    """The curves of that name; the reference cell has none of its difference to itself."""
    return [row["curves"][curve] for row in rows if curve in row.get("curves", {})]


def _curve_label(curve: str, names: dict[str, str], reference: str) -> str:
    """The words of a study's curve, with its unit; a long one in several lines. reference: the label of the cell that
    a difference is to.

    >>> _curve_label("val_loss-reference", {}, "dense")
    'validation loss, minus that of\\n“dense” (nats)'
    """
    plain = curve.removesuffix("-reference")
    words, unit = words_of(plain)
    words = names.get(plain) or names.get(plain.partition("@")[0]) or words
    words += f", minus that of “{reference}”" if plain != curve else ""
    return textwrap.fill(f"{words} ({unit})" if unit else words, 30)


def _study_colours(cells: dict[tuple[str, str], str]) -> dict[tuple[str, str], dict]:
    """A colour for each line, ``cells[part, label]`` being its setting: one that several parts share has the same in
    all of them, black for the first; a label that several parts share, too; and a part whose labels are numbers has
    the shades of a ramp, from little, dark, to much, light.
    """
    parts: dict[str, dict[str, str]] = {}
    for (part, label), cell in cells.items():
        parts.setdefault(part, {})[label] = cell
    same_cell = Counter(cell for part in parts.values() for cell in set(part.values()))
    same_label = Counter(label for part in parts.values() for label in part)
    fixed: dict[str, str] = {}  # of settings, and of labels
    styles: dict[tuple[str, str], dict] = {}
    for part, mine in parts.items():
        for cell in mine.values():
            if same_cell[cell] > 1 and len(fixed) < len(SHARED):
                fixed.setdefault(f"cell {cell}", SHARED[len(fixed)])
        numbers = _numbers(list(mine))
        if numbers:
            ramp = _pyplot().get_cmap("plasma")
            for i, label in enumerate(sorted(mine, key=numbers.__getitem__)):
                shade = tuple(ramp(0.12 + 0.48 * i / max(1, len(mine) - 1))[:3])
                styles[part, label] = {"color": fixed.get(f"cell {mine[label]}", shade), "linestyle": "-"}
            continue
        taken = {fixed.get(f"cell {cell}") for cell in mine.values()}
        taken |= {fixed.get(f"label {label}") for label in mine}
        free = [colour for colour in COLOURS if colour not in taken]
        for i, (label, cell) in enumerate(mine.items()):
            colour = fixed.get(f"cell {cell}") or fixed.get(f"label {label}")
            if colour is None:
                colour = free.pop(0) if free else COLOURS[i % len(COLOURS)]
                if same_label[label] > 1:
                    fixed[f"label {label}"] = colour
            used = sum(style["color"] == colour for (which, _), style in styles.items() if which == part)
            styles[part, label] = {"color": colour, "linestyle": DASHES[used % len(DASHES)]}
    return styles


def _numbers(labels: list[str]) -> dict[str, float]:
    """The number in each label, if they differ in nothing before it; else nothing.

    >>> _numbers(["lr 4e-3", "lr 2e-3"]), _numbers(["none", "0.1"])
    ({'lr 4e-3': 0.004, 'lr 2e-3': 0.002}, {})
    """
    found = {label: re.match(r"(\D*)(\d+(?:\.\d+)?(?:e-?\d+)?)", label) for label in labels}
    if len(labels) < 2 or not all(found.values()) or len({match[1] for match in found.values()}) > 1:
        return {}
    numbers = {label: float(match[2]) for label, match in found.items()}
    return numbers if len(set(numbers.values())) == len(labels) else {}


def plot_scatter(runs: dict, path: Path, scatter: list[str], names: dict[str, str]) -> None:
    """The end of each cell of a study in the plane of two columns, with bars from the least to the greatest seed and a
    line through the cells that share the first half of their key.
    """
    figure, (axis,) = _axes(1, columns=1, width=7.0, height=4.8)
    points = []
    for i, part in enumerate(dict.fromkeys(part for part, _ in runs)):
        style, mine = _line_style(i), []
        for (which, label), rows in runs.items():
            known = [row for row in rows if all(row.get(name) is not None for name in scatter)]
            if which != part or not known:
                continue
            xs, ys = ([row[name] for row in known] for name in scatter)
            x, y = sum(xs) / len(xs), sum(ys) / len(ys)
            spread = {"xerr": [[x - min(xs)], [max(xs) - x]], "yerr": [[y - min(ys)], [max(ys) - y]]}
            axis.errorbar([x], [y], **spread, color=style["color"], alpha=0.35, linewidth=1)
            mine.append((x, y, label))
        axis.plot([x for x, *_ in mine], [y for _, y, _ in mine], marker="os^Dv"[i % 5], label=part, **style)
        points += [(x, y, label, style["color"]) for x, y, label in mine]
    axis.margins(0.12)
    for axis_label, name in zip((axis.set_xlabel, axis.set_ylabel), scatter):
        unit = words_of(name)[1]
        axis_label(names.get(name, words_of(name)[0]) + (f" ({unit})" if unit else ""))
    _legend_below(figure, [axis])
    _label_points(figure, axis, points)
    _save(figure, path)


def _label_points(figure, axis, points: list[tuple[float, float, str, str]]) -> None:
    """A label beside each point (x, y, label, colour), where none covers another or a point; one that had to go far
    is tied to its point.
    """
    figure.draw_without_rendering()  # the layout decides where the points are
    pixel = figure.dpi / 72
    at = [axis.transData.transform((x, y)) for x, y, *_ in points]
    around = lambda x, y, r: (x - r * pixel, y - r * pixel, x + r * pixel, y + r * pixel)  # noqa: E731
    taken = [around(x, y, 5) for x, y in at]
    for line in axis.lines:  # nor a line, if there is room
        corners = axis.transData.transform(line.get_xydata())
        for (x0, y0), (x1, y1) in zip(corners, corners[1:]):
            n = max(1, int(math.hypot(x1 - x0, y1 - y0) / (6 * pixel)))
            taken += [around(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n, 2) for i in range(n + 1)]
    for (x, y), (px, py), label, colour in [(p[:2], a, *p[2:]) for p, a in zip(points, at)]:
        wide, high = (2 + 4.8 * len(label)) * pixel, 9 * pixel
        for distance, angle in ((d, a) for d in range(10, 160, 6) for a in range(0, 360, 30)):
            dx, dy = (f(math.radians(angle + 45)) * distance * pixel for f in (math.cos, math.sin))
            box = (px + dx - wide / 2, py + dy - high / 2, px + dx + wide / 2, py + dy + high / 2)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        tie = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axis.annotate(
            label, (x, y), xytext=(dx / pixel, dy / pixel), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=colour, annotation_clip=False, arrowprops=tie if distance > 16 else None,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The report card

FAMILIES = {  # of the stages, in the order of the book; a stage goes by its name in the report or by its own
    "before alignment": ("Base", "SFT", "pretrain"),
    "reward model: pairs ranked rightly": ("Reward model", "reward"),
    "learning from preferences": ("DPO", "IPO", "KTO", "SimPO", "ORPO"),
    "PPO, with a critic": ("PPO, reward model", "PPO, verifier", "PPO", "ppo_reward"),
    "GRPO and its relatives": ("GRPO", "Dr. GRPO", "DAPO", "GSPO", "CISPO", "dr_grpo"),
    "several rewards": ("GDPO",),
}


def family_of(stage: str) -> str:
    """
    >>> family_of("Dr. GRPO"), family_of("sft"), family_of("mine")
    ('GRPO and its relatives', 'before alignment', 'others')
    """
    for family, members in FAMILIES.items():
        if stage.lower() in (member.lower() for member in members):
            return family
    return "others"


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


def of_several(reports: list[list[dict]]) -> list[dict]:
    """The rows of one report; of several, for each stage that all have, the mean accuracy with the least and the
    greatest as its low and high, and "each" of them.

    >>> of_several([[{"stage": "SFT", "accuracy": 0.5}], [{"stage": "SFT", "accuracy": 0.75}]])
    [{'stage': 'SFT', 'accuracy': 0.625, 'low': 0.5, 'high': 0.75, 'each': [0.5, 0.75]}]
    """
    if len(reports) == 1:
        return reports[0]
    found, rows = [{row["stage"]: row["accuracy"] for row in rows} for rows in reports], []
    for stage in (name for name in found[0] if all(name in one for one in found)):
        each = [one[stage] for one in found]
        mean = sum(each) / len(each)
        rows.append({"stage": stage, "accuracy": mean, "low": min(each), "high": max(each), "each": each})
    return rows


def plot_report(reports: list[list[dict]], path: Path) -> None:
    """The accuracy of each stage of a report card with its 95 % interval, or, of several cards, the mean with all of
    them: by family, and in each family in the order of the book, because most differences there are smaller than the
    intervals. A line marks the base model, a line and a band the fine-tuned one, from which the others start.
    """
    rows = of_several(reports)
    families: dict[str, list[dict]] = {family: [] for family in (*FAMILIES, "others")}
    for row in rows:
        families[family_of(row["stage"])].append(row)
    families = {family: mine for family, mine in families.items() if mine}
    height = 0.9 + 0.235 * (len(rows) + 1.25 * len(families))
    figure, (axis,) = _axes(1, columns=1, width=7.2, height=height)
    ticks, y = {}, 0.0
    for i, (family, mine) in enumerate(families.items()):
        colour = COLOURS[(5, 4, 0, 1, 2, 3, 5)[i % 7]]
        axis.annotate(
            family, (0, y), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=GREY, style="italic", annotation_clip=False,
        )  # fmt: skip
        y += 1
        for row in mine:
            of_pairs = family.startswith("reward model")  # another measure, another mark
            reach = [[max(0.0, row["accuracy"] - row["low"])], [max(0.0, row["high"] - row["accuracy"])]]
            axis.errorbar(
                [row["accuracy"]], [y], xerr=reach, fmt="D" if of_pairs else "o", color=colour, capsize=3,
                markersize=5, markerfacecolor="white" if of_pairs else colour,
            )  # fmt: skip
            axis.plot(row.get("each", []), [y] * len(row.get("each", [])), "|", color=colour, markersize=9, zorder=1)
            for x, text, shade in (
                (1.06, f"{row['accuracy']:.3f}", "black"),
                (1.17, f"{row['low']:.3f} to {row['high']:.3f}", GREY),
            ):
                axis.annotate(
                    text, (x, y), xycoords=("axes fraction", "data"), ha="center" if x < 1.1 else "left", va="center",
                    fontsize=8, color=shade, annotation_clip=False,
                )  # fmt: skip
            ticks[y] = row["stage"]
            y += 1
        y += 0.25
    for row in rows:
        dashes = {"base": ":", "pretrain": ":", "sft": "--"}.get(row["stage"].lower())
        if dashes:
            axis.axvline(row["accuracy"], color="black", linewidth=0.9, linestyle=dashes, zorder=0)
        if dashes == "--":
            axis.axvspan(row["low"], row["high"], color="black", alpha=0.07, linewidth=0, zorder=0)
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(y - 0.5, -0.6)
    axis.set_xlim(-0.02, 1.02)
    asked = {row["n"] for rows in reports for row in rows if "n" in row}
    questions = f"{asked.pop():,} held-out questions" if len(asked) == 1 else "held-out questions"
    what = f"mean and each of {len(reports)} starts" if len(reports) > 1 else "with its 95 % interval"
    axis.set_xlabel(f"greedy accuracy on {questions}, {what}; dashed: SFT, dotted: base")
    axis.grid(visible=False, axis="y")
    _save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ()
    """Folders of runs, a panel for each."""
    report: tuple[str, ...] = ()
    """Instead of runs: a report.json, whose accuracies are drawn with their intervals; several, of several seeds, are
    drawn as one picture."""
    curves: tuple[str, ...] = ("loss",)
    """Metrics that share a panel; docs/metrics.md explains them."""
    write: str = "curves.png"
    """The picture."""


def read_runs(folders: Sequence[str], example: str) -> dict[str, dict]:
    """The metrics of each run, by its folder. UserError: no folder is named (as in ``example``), or one is no run."""
    if not folders:
        raise UserError(f"which runs? {example}")
    found = {}
    for run in folders:
        path = Path(run) / "metrics.jsonl"
        if not path.exists():
            raise UserError(f"{run} holds no metrics.jsonl")
        try:
            found[run] = read_metrics(path)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path} is damaged: not every line is a row of metrics") from None
    return found


def main() -> None:
    """Curves of runs, or the report card of a pipeline::

        python -m runtime.plots --runs out/a out/b --curves score correct --write picture.png
        python -m runtime.plots --report out/arith/report.json --write picture.png

    What it wrote, it prints.
    """
    config = parse(Config)
    if config.report:
        plot_report([read_report(Path(report)) for report in config.report], Path(config.write))
        print(config.write)
        return
    series = read_runs(config.runs, "--runs out/arith/ppo out/arith/grpo")
    check_names(config.curves, dict.fromkeys(name for mine in series.values() for name in mine), "these runs have")
    for run, mine in series.items():
        if not set(config.curves) & set(mine):
            wanted, there = ", ".join(config.curves), ", ".join(sorted(mine))
            raise UserError(f"{run} has no curve {wanted}: it has {there}")
    folders = short_names(config.runs)
    plot_stages(folders, Path(config.write), dict.fromkeys(folders, list(config.curves)))
    print(config.write)


if __name__ == "__main__":
    run_main(main)
