"""A run's rollouts as one page that needs no server: what the method saw, token by token.

    python ui/rollouts.py out/arith/grpo                       # rollouts.html in the run's folder
    python ui/rollouts.py out/arith/dpo --write page.html

It shows the questions and answers that the run wrote down (runtime/rollouts.py), the answers to a question side by
side: how likely each token was, how far the step moved it and whether the clip holds it back, how far it is from the
reference, its advantage; of preferences, the implicit reward of each token. The page is one file. It asks no other
machine, and nothing that a model wrote can become markup: texts enter it as data, and its policy runs no other script.
"""

import base64
import hashlib
import html
import json
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import tyro

sys.path[0] = str(Path(__file__).resolve().parent.parent) if __name__ == "__main__" else sys.path[0]

from runtime.checkpoint import write_text
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.rollouts import NAME, read_record, records_in

HERE = Path(__file__).resolve().parent
MOST = 6_000_000  # bytes of a page's data


@dataclass(frozen=True)
class Config:
    run: tyro.conf.Positional[str] = "out/arith/grpo"
    """The run's folder."""
    write: str = ""
    """The page. Default: rollouts.html in the run's folder."""


def load(path: Path, most: int = MOST) -> tuple[list[dict], int, int]:
    """(the records that fit into ``most`` bytes, evenly spaced and with the last one; how many steps the file has; how
    many of its lines are damaged)."""
    found = records_in(path)
    chosen = spaced(found, most)
    records = [read_record(path, place, size) for _, place, size in chosen]
    return [one for one in records if one is not None], len(found), sum(one is None for one in records)


def spaced(found: list[tuple[int, int, int]], most: int) -> list[tuple[int, int, int]]:
    """Every n-th of (step, place, bytes), and the last, with the smallest n that keeps their bytes below ``most``.

    >>> spaced([(step, 0, 10) for step in range(1, 8)], most=45)
    [(1, 0, 10), (3, 0, 10), (5, 0, 10), (7, 0, 10)]
    """
    for every in range(1, len(found) + 1):
        some = found[::-1][::every][::-1]
        if sum(size for _, _, size in some) <= most:
            return some
    return found[-1:]


def page_of(records: list[dict], title: str, note: str = "") -> str:
    """The page, as one text."""
    stage = records[-1]["stage"] if records else ""
    told = f"{stage}, {len(records)} step{'' if len(records) == 1 else 's'}" if records else ""
    data = json.dumps({"records": records}, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")  # no tag can end in it
    style, script = ((HERE / f"rollouts.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'"
    )
    body = BODY if records else '<p class="nothing">This run has written no answers down yet.</p>'
    return PAGE.format(
        policy=policy, title=html.escape(title), told=html.escape(told), note=html.escape(note), style=style, body=body,
        data=data, script=script,
    )  # fmt: skip


def _hash(text: str) -> str:
    """What a policy calls a script or a style of the page itself."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="sub">{told}</p><p class="note">{note}</p></header>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

BODY = """<nav id="steps" class="steps" aria-label="steps"></nav>
<p id="caption" class="caption"></p>
<p id="flat" class="flat"></p>
<div class="bar">
<div id="colour" class="choice" role="group" aria-label="what the colours show"></div>
<label>answers by <select id="sort"><option value="drawn">number</option><option value="reward">reward</option>
<option value="length">length</option><option value="kl">KL to the reference</option>
<option value="moved">how far they moved</option></select></label>
<div id="legend" class="legend"></div>
</div>
<p id="about" class="note"></p>
<main id="groups"></main>
<div id="tip" role="status"></div>"""


def note_of(shown: int, known: int, damaged: int) -> str:
    """What the page leaves out, in words."""
    left = f"{shown} of {known} steps that were written down" if shown + damaged < known else ""
    broken = f"{damaged} line{'' if damaged == 1 else 's'} of {NAME} could not be read" if damaged else ""
    return "; ".join(filter(None, (left, broken)))


def find(run: str) -> Path:
    """The file of a run's rollouts. UserError: there is none."""
    path = Path(run) if Path(run).is_file() else Path(run) / NAME
    if not path.is_file():
        kinds = "ppo, grpo, gdpo, dpo and kto write one"
        told = f"{run} holds no {NAME}: {kinds}" if Path(run).is_dir() else f"there is no run {run}"
        near = nearby(Path(run))
        raise UserError(f"{told}; these runs have one: {', '.join(near)}" if near else told)
    return path


def nearby(run: Path, most: int = 6) -> list[str]:
    """Runs below the nearest folder above ``run`` that has some with rollouts, those with the likest names first."""
    for above in list(run.parents)[:2]:
        found = [path.parent for depth in ("*", "*/*") for path in above.glob(f"{depth}/{NAME}") if path.is_file()]
        if found:
            like = lambda path: SequenceMatcher(None, str(run), str(path)).ratio()  # noqa: E731
            return [str(path) for path in sorted(found, key=lambda path: (-like(path), str(path)))[:most]]
    return []


USAGE = """usage: python ui/rollouts.py [RUN] [--write PAGE]

A run's rollouts as one page that needs no server: what the method saw, token by token.

  RUN           the run's folder (default: out/arith/grpo)
  --write PAGE  the page (default: rollouts.html in the run's folder)"""


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    config = parse(Config)
    path = find(config.run)
    records, known, damaged = load(path)
    if not records:
        raise UserError(f"no line of {path} is a whole record")
    page = page_of(records, "/".join(path.resolve().parent.parts[-2:]), note_of(len(records), known, damaged))
    target = Path(config.write) if config.write else path.parent / "rollouts.html"
    write_text(target, page)
    print(f"{target}: {len(records)} steps, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
