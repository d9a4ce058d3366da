"""The drawings of docs/map.md: the stages as the pipeline has them, the files as they import each other.

``python docs/build.py --draw`` writes both; a test holds that they are what the code says today.
"""

from html import escape

from making.book import Book

INK, SOFT, LINE, SHADE, LINK = (
    "var(--ink, #1d2126)", "var(--soft, #5b6570)", "var(--comment, #8a94a0)", "var(--shade, #f6f7f9)",
    "var(--link, #005a9c)",
)  # fmt: skip
FONT = "font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"]) + "\n"


def words(x: float, y: float, text: str, look: str, colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" style="{look}; fill: {colour}">{escape(text)}</text>'


def box(
    x: float, y: float, width: float, height: float, label: str, note: str = "", link: str = "", data: str = ""
) -> str:
    """A node: a rounded box with a name, and perhaps a smaller line below it."""
    middle, font = y + height / 2 + (4 if not note else -2), SANS if note else FONT
    text = words(x + width / 2, middle, label, f"text-anchor: middle; {font}; font-size: 12px")
    if note:
        look = f"text-anchor: middle; {FONT}; font-size: 10px"
        text += words(x + width / 2, y + height - 9, note, look, SOFT)
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
    shape = f'<rect {place} style="fill: {SHADE}; stroke: {LINK}"/>'
    inside = f'<a href="{escape(link)}">{shape}{text}</a>' if link else shape + text
    return f"<g {data}>{inside}</g>" if data else f"<g>{inside}</g>"


def arrow(x1: float, y1: float, x2: float, y2: float, data: str = "", across: bool = False) -> str:
    """A curve from one place to another, leaving and arriving straight."""
    if across:
        middle = (x1 + x2) / 2
        curve = f"M{x1:g} {y1:g} C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"
    else:
        reach = max(18, abs(y2 - y1) * 0.45)
        curve = f"M{x1:g} {y1:g} C{x1:g} {y1 + reach:g} {x2:g} {y2 - reach:g} {x2:g} {y2:g}"
    return f'<path {data} d="{curve}" style="fill: none; stroke: {LINE}; stroke-width: 1.2"/>'.replace(
        "<path  ", "<path "
    )


# ----------------------------------------------------------------------------------------------------------------------
# The files


def uses(book: Book) -> dict[str, set[str]]:
    """Which chapters each chapter imports, by path."""
    modules = {book.sources[path].module: path for path in book.order}
    return {
        path: {modules[module] for module, _ in book.sources[path].imports.values() if module in modules} - {path}
        for path in book.order
    }


def needed(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the imports that follow from others: what is imported by something imported is left out."""

    def reach(start: str) -> set[str]:
        return {start}.union(*(reach(other) for other in graph[start]))

    return {n: {m for m in used if not any(m in reach(o) for o in used - {m})} for n, used in graph.items()}


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """Chapters in rows: each stands one below the lowest that it imports; within a row, near those that it imports."""
    depth: dict[str, int] = {}
    for name in graph:  # in reading order, so what is imported has been seen
        depth[name] = max((depth[other] + 1 for other in graph[name]), default=0)
    rows = [[name for name in graph if depth[name] == d] for d in range(max(depth.values()) + 1)]
    users = {name: {other for other in graph if name in graph[other]} for name in graph}
    for sweep in range(12):
        place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
        near = graph if sweep % 2 == 0 else users
        for row in rows:
            row.sort(key=lambda name: _mean([place[other] for other in near[name]], place[name]))
    return rows


def _mean(values: list[float], default: float) -> float:
    return round(sum(sorted(values)) / len(values), 9) if values else default  # in one order: sets have none


def files(book: Book) -> str:
    """The chapters and what they build on."""
    graph = uses(book)
    short = needed(graph)
    rows, wide, tall, gap, width = layers(short), 118, 28, 62, 960
    place = {}
    for r, row in enumerate(rows):
        step = width / len(row)
        for i, name in enumerate(row):
            place[name] = (step * (i + 0.5), 16 + r * gap)
    parts = []
    for name, used in short.items():
        for other in sorted(used, key=book.order.index):
            (x1, y1), (x2, y2) = place[other], place[name]
            parts.append(arrow(x1, y1 + tall, x2, y2, f'data-from="{other}" data-to="{name}"'))
    for name in book.order:
        x, y = place[name]
        data = f'data-node="{name}" data-uses="{" ".join(sorted(graph[name]))}"'
        parts.append(box(x - wide / 2, y, wide, tall, name, link=f"../{name}", data=data))
    return svg(width, 16 + len(rows) * gap, parts, "The chapters, each below those that it builds on")


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def stages() -> str:
    """What the pipeline runs: each stage beside the one that it starts from."""
    import os

    from pipeline import Config, stages

    chain = stages(Config(out="out"))
    folders = {os.path.normpath(stage.config.out_dir): stage.name for stage in chain}
    starts, judges = {}, {}
    for stage in chain:
        starts[stage.name] = folders.get(os.path.normpath(getattr(stage.config, "init_from", "") or "."))
        reward = getattr(stage.config, "reward", "")
        judges[stage.name] = folders.get(os.path.normpath(reward)) if isinstance(reward, str) else None
    column = {}
    for stage in chain:
        before = [column[one] for one in (starts[stage.name], judges[stage.name]) if one]
        column[stage.name] = max(before, default=-1) + 1
    wide, tall, step, gap = 150, 38, 236, 46
    rows: dict[str, float] = {}
    for number in range(max(column.values()) + 1):
        names = [stage.name for stage in chain if column[stage.name] == number]
        for i, name in enumerate(names):
            judge = judges[name]
            rows[name] = rows[judge] if judge else float(i)
    last = max(rows.values())
    for name in [one for one in rows if sum(column[other] == column[one] for other in rows) == 1 and not judges[one]]:
        rows[name] = last / 2
    place = {stage.name: (16 + column[stage.name] * step, 12 + rows[stage.name] * gap) for stage in chain}
    parts = []
    for stage in chain:
        x, y = place[stage.name]
        for before in dict.fromkeys(one for one in (starts[stage.name], judges[stage.name]) if one):
            if judges[stage.name] and before == starts[stage.name]:
                continue  # it starts from the same model as its judge; the text says so
            x1, y1 = place[before]
            data = f'data-from="{before}" data-to="{stage.name}"'
            parts.append(arrow(x1 + wide, y1 + tall / 2, x, y + tall / 2, data, across=True))
    for stage in chain:
        x, y = place[stage.name]
        path = f"{stage.main.__module__}.py"
        before = " ".join(one for one in (starts[stage.name], judges[stage.name]) if one)
        data = f'data-node="{stage.name}" data-uses="{before}"'
        parts.append(box(x, y, wide, tall, stage.label, path, f"../{path}", data))
    width = 32 + max(column.values()) * step + wide
    return svg(
        width, int(24 + last * gap + tall), parts, "The stages of the pipeline, each after the one it starts from"
    )


STEPS = [  # method, file, and what the step to the next one changes
    ("REINFORCE", "", "subtract what was to be expected:\nthe same gradient on average, far less noise"),
    (
        "with a baseline",
        "",
        "a critic foresees the reward at every token;\na clipped ratio: an answer serves several updates",
    ),
    ("PPO", "ppo.py", "no critic: the baseline is the mean of\nseveral answers to the same question"),
    ("GRPO", "grpo.py", "several rewards: each is compared on its own,\nthen the comparisons are added"),
    ("GDPO", "gdpo.py", ""),
]


def family() -> str:
    """The chain from REINFORCE to GDPO, from top to bottom."""
    wide, tall, gap, x = 150, 40, 84, 16
    parts = []
    for i, (name, path, change) in enumerate(STEPS):
        y = 12 + i * gap
        if change:
            parts.append(arrow(x + wide / 2, y + tall, x + wide / 2, y + gap))
            for n, line in enumerate(change.split("\n")):
                parts.append(words(x + wide / 2 + 18, y + tall + 19 + 16 * n, line, f"{SANS}; font-size: 12.5px"))
        parts.append(box(x, y, wide, tall, name, path or "(on this page)", f"../../{path}" if path else ""))
    return svg(480, 24 + (len(STEPS) - 1) * gap + tall, parts, "What each method changes about the one before")
