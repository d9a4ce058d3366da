"""The report cards of several starts as one table: of each figure the mean, and of accuracies the range.

One start is one draw: another seed, or another processor with the same seed, gives another card. So the table of the
front page has several, none of which anything was tuned on::

    for seed in 1 2 3 4 5; do python pipeline.py --seed $seed --out out/seed$seed; done
    python studies/card.py out/seed*/report.json                       # the table
    python -m runtime.plots --report out/seed*/report.json --write accuracy.png
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

from evaluate import COLUMNS, DIGITS
from runtime.errors import UserError, run_main
from runtime.plots import read_report

RANGES = ("accuracy", "larger", "longer")
HIDDEN = {"stage", "path", "step", "data", "low", "high", "n", "documents_bytes", "cut_off", "unreadable", "tokens"}


def card(reports: list[list[dict]]) -> str:
    """A markdown table of the stages that all reports have, in the order of the first.

    >>> print(card([[{"stage": "SFT", "accuracy": 0.5}], [{"stage": "SFT", "accuracy": 0.75}]]))
    | stage | accuracy |
    | --- | --- |
    | SFT | 0.625 (0.500 to 0.750) |
    """
    found = [{row["stage"]: row for row in rows} for rows in reports]
    stages = [name for name in found[0] if all(name in rows for rows in found)]
    names = list(dict.fromkeys(n for rows in found for row in rows.values() for n in row if n not in HIDDEN))
    names.sort(key=lambda name: RANGES.index(name) if name in RANGES else len(RANGES))
    lines = ["| " + " | ".join(["stage", *(COLUMNS.get(name, name) for name in names)]) + " |"]
    lines.append("| " + " | ".join("---" for _ in range(len(names) + 1)) + " |")
    for stage in stages:
        rows = [one[stage] for one in found]
        lines.append(
            "| " + " | ".join([stage, *(cell([row.get(name) for row in rows], name) for name in names)]) + " |"
        )
    return "\n".join(lines)


def cell(values: list[float | None], name: str) -> str:
    """The mean of a figure over the starts, with the range if it is an accuracy; nothing if one has none."""
    if None in values:
        return ""
    digits = DIGITS.get(name, 3)
    text = f"{mean(values):.{digits}f}"
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})" if name in RANGES else text


def main() -> None:
    paths = sys.argv[1:]
    if not paths or paths[0].startswith("-"):
        raise UserError("which reports? python studies/card.py out/seed*/report.json")
    print(card([read_report(Path(path)) for path in paths]))


if __name__ == "__main__":
    run_main(main)
