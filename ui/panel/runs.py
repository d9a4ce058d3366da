"""Runs: what there is, how far it is, and its curves while it learns."""

import html
import json
import time

import pandas as pd
import streamlit as st

from runtime.errors import UserError
from runtime.reference import CURVES, FILE, band
from runtime.runs import COMPARED, duration
from runtime.words import label_of
from ui import shared
from ui.folder import Run, ago, thinned
from ui.forms import STAGES, check_words, differences, script_of, words_of_run
from ui.shared import one_line, plain

MOST = 12  # runs whose curves are drawn together
READING = 0.4  # seconds for runs that were never read; the others follow
TABLE = {
    "run": st.column_config.TextColumn("run", width="medium"),
    "done": st.column_config.ProgressColumn("done", format="percent", min_value=0, max_value=1, width="small"),
    "best figure": st.column_config.TextColumn("best figure", width="medium"),
}


def table(runs: list[Run]) -> pd.DataFrame:
    rows = [
        {
            "run": one_line(run.name), "stage": one_line(run.stage, 20), "state": shared.state_in_words(run),
            "done": 1.0 if run.state == "finished" else run.progress,
            "best figure": one_line(run.problem) if run.problem else run.best_at_a_glance(),
            "seed": "" if run.seed is None else str(run.seed), "took": duration(run.seconds),
            "changed": ago(run.changed),
        }
        for run in runs
    ]  # fmt: skip
    return pd.DataFrame(rows)


def picked() -> None:
    """The rows that were ticked in the table are the runs that are shown."""
    names = st.session_state.listed
    st.session_state.shown = [names[i] for i in st.session_state.table.selection.rows if i < len(names)][:MOST]


def wait_for_the_rest() -> None:
    """Show the page again, once a second, until all runs are read."""
    if time.monotonic() - st.session_state.drawn > 0.8:
        st.rerun()


def groups_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, and in the folders that follow from it, stand together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.config.items() if k not in ("seed", "out_dir", "init_from", "fresh", "reward")}
        found.setdefault(json.dumps([run.stage, same], sort_keys=True, default=str), []).append(run)
    named = {}
    for members in found.values():
        name = (
            members[0].name if len(members) == 1 else f"{members[0].stage}, {len(members)} seeds: {members[0].name} …"
        )
        named[one_line(name, 60)] = members
    return named


def reference_of(stage: str, curve: str) -> list[dict]:
    """The band of the reference, as points of a chart; nothing if there is none."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []
    mine = [row for row in rows if row["stage"] == stage and row["curve"] == curve]
    if len(mine) < 2:
        return []
    return [{"step": step, "low": low, "high": high} for step, low, high in zip(*band(mine))]


def chart(curve: str, groups: dict[str, list[Run]], with_band: str) -> dict | None:
    """One metric of all runs as a chart; None if no run has it."""
    points, domain = [], list(groups)
    for name, members in groups.items():
        for run in members:
            steps, values = shared.runs().series(run.name).curves.get(curve, ([], []))
            for step, value in zip(*thinned(steps, values)):
                points.append({"step": step, "value": value, "run": one_line(run.name), "group": name})
    if not points:
        return None
    colour = {
        "field": "group", "type": "nominal", "title": None, "sort": None,
        "scale": {"domain": domain, "range": [shared.COLOURS[i % len(shared.COLOURS)] for i in range(len(domain))]},
        "legend": None,  # one for all panels stands above them
    }  # fmt: skip
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1, "tickCount": 6}}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    tooltip = [{"field": "run"}, {"field": "step"}, {"field": "value", "format": ".4g"}]
    several = any(len(members) > 1 for members in groups.values())
    line = {"type": "line", "strokeWidth": 1.6, "opacity": 0.45 if several else 0.95, "point": len(points) < 40}
    layers = [
        {"mark": line, "encoding": {"x": x, "y": y, "color": colour, "detail": {"field": "run"}, "tooltip": tooltip}}
    ]
    if several:
        mean = {"field": "value", "type": "quantitative", "aggregate": "mean"}
        layers.append({"mark": {"type": "line", "strokeWidth": 2.6}, "encoding": {"x": x, "y": mean, "color": colour}})
    spec = {"data": {"values": points}, "layer": layers}
    last = max(point["step"] for point in points)
    area = [point for point in reference_of(with_band, curve) if point["step"] <= 1.05 * last] if with_band else []
    if len(area) > 1:  # else the run is too short for a band, whose scale would hide the curve
        edges = {"x": x, "y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
        mark = {"type": "area", "opacity": 0.16, "color": "#808080", "clip": True}
        spec["layer"] = [{"data": {"values": area}, "mark": mark, "encoding": edges}, *layers]
    return spec | {"title": {"text": label_of(curve), "fontSize": 13, "anchor": "start"}, "height": 250}


def has_band(spec: dict) -> bool:
    return any(layer["mark"]["type"] == "area" for layer in spec["layer"])


def legend(names: list[str]) -> str:
    """The colour of each group of runs, as markup in which every name is escaped."""
    colours = [shared.COLOURS[i % len(shared.COLOURS)] for i in range(len(names))]
    line = "display:inline-block;width:18px;height:3px;border-radius:2px;margin:0 6px 4px 0;background:"
    entries = [
        f'<span><i style="{line}{colour}"></i>{html.escape(name)}</span>' for name, colour in zip(names, colours)
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:2px 22px;font-size:14px">{"".join(entries)}</div>'


def curves_of(runs: list[Run]) -> tuple[list[str], list[str]]:
    """(the curves to begin with, all curves that there are)"""
    known = list(dict.fromkeys(name for run in runs for name in shared.runs().series(run.name).curves))
    main = [name for run in runs for name in CURVES.get(run.stage, ())] + list(COMPARED)
    return [name for name in dict.fromkeys(main) if name in known][:6], known[:400]


def draw_curves(names: list[str], chosen: list[str], with_band: str) -> None:
    runs = [shared.runs().look(name) for name in names]
    for run in runs:
        told = f"step {run.step:,} of {run.steps:,}" if run.steps else f"step {run.step:,}"
        if run.state == "running":
            st.progress(run.progress or 0.0, text=plain(f"{run.name}: {told}, {run.best_in_words()}"))
    groups = groups_of(runs)
    specs = [spec for spec in (chart(curve, groups, with_band) for curve in chosen) if spec is not None]
    if with_band and specs and not any(map(has_band, specs)):
        st.caption("There is no grey band for so short a run: that of the normal runs begins at a later step.")
    if len(groups) > 1 and specs:
        st.html(legend(list(groups)))
    for first in range(0, len(specs), 3):
        for column, spec in zip(st.columns(3 if len(specs) > 2 else 2), specs[first : first + 3]):
            column.vega_lite_chart(spec, width="stretch")
    if not specs:
        st.caption("No row of metrics yet.")


def go_on_with(run: Run) -> None:
    """Put a run that was not started here into the queue, with the configuration that it wrote."""
    try:
        script, config = script_of(run.stage), run.config | {"out_dir": shared.short(run.path)}
        if script not in STAGES or script == "pipeline":
            raise UserError(f"no stage of the panel writes a run that calls itself {run.stage!r}")
        words = words_of_run(script, config)
        check_words(shared.root(), script, words)  # a stranger's folder must not have more done with a click
        shared.queue().add(f"{script}.py", words, run.name)
    except UserError as error:
        st.error(plain(str(error)))
    else:
        st.rerun()


def show_buttons(run: Run) -> None:
    """What can be done with a run that the queue knows."""
    job = next(
        (job for job in shared.queue().jobs() if run.name == job.folder or run.name.startswith(f"{job.folder}/")), None
    )
    if job is None:
        if run.state == "stopped" and st.button("Go on", key="go on", help="The same command, from its checkpoint."):
            go_on_with(run)
        return
    if job.state in ("running", "waiting"):
        if st.button("Stop", key="stop", help="As Ctrl-C: it finishes its step, saves and ends."):
            shared.queue().stop(job.number)
            st.rerun()
    elif job.state == "stopping":
        st.caption("It finishes its step and saves.")
    elif run.state == "stopped" and st.button("Go on", key="go on", help="The same command, from its checkpoint."):
        shared.go_on(job.number)


def show_configuration(runs: list[Run], everything: list[Run]) -> None:
    run = runs[0]
    others = [one.name for one in everything if one.name != run.name and one.config]
    default = [one.name for one in runs[1:2]]
    left, right = st.columns(2)
    left.markdown(f"**{plain(run.name)}**")
    against = right.selectbox(
        "compared with",
        ["the defaults", *others],
        index=1 + others.index(default[0]) if default else 0,
        format_func=one_line,
    )
    other = None if against == "the defaults" else next(one.config for one in everything if one.name == against)
    rows = differences(run.stage, run.config, other)
    if rows:
        shown = [
            {"field": one_line(name), "here": one_line(mine), "there": one_line(theirs)} for name, mine, theirs in rows
        ]
        st.dataframe(pd.DataFrame(shown), hide_index=True, height=min(38 + 35 * len(shown), 420))
    else:
        st.caption("Every field is the same.")
    with st.expander("All fields"):
        st.code(json.dumps(run.config, indent=2, default=str)[:20_000], language=None)


def show_about(runs: list[Run]) -> None:
    for run in runs:
        chain = " → ".join([*(str(one.get("stage", "?")) for one in run.lineage), run.stage or "?"])
        st.markdown(f"**{plain(run.name)}**: {plain(chain)}")
        for one in run.lineage:
            step = one.get("step")
            st.caption(plain(f"{one.get('stage')} after {step} steps, {one.get('path')}, weights {one.get('weights')}"))


st.session_state.drawn = time.monotonic()
everything = shared.runs().all(READING)
st.session_state.listed = []
top = st.columns([3, 2], vertical_alignment="bottom")
top[0].title("Runs")
if not everything:
    st.caption(plain(f"in {shared.short(shared.root())}"))
    shared.nothing_yet()
    st.stop()
wanted = top[1].text_input("Find", placeholder="a part of a name, a stage or a state", label_visibility="collapsed")
listed = [
    run for run in everything
    if all(word in f"{run.name} {run.stage} {run.state}".lower() for word in wanted.lower().split())
]  # fmt: skip
listed.sort(key=lambda run: (run.state != "running", -run.changed))
st.session_state.listed = [run.name for run in listed]
running = sum(run.state == "running" for run in everything)
told = f"{len(listed)} of {len(everything)} in {shared.short(shared.root())}, {running} running"
st.caption(plain(f"{told}; tick rows to see their curves together"))
st.dataframe(
    table(listed), column_config=TABLE, hide_index=True, key="table", on_select=picked, selection_mode="multi-row",
    height=min(38 + 35 * max(1, len(listed)), 320),
)  # fmt: skip
unread = sum(run.state == "unread" for run in everything)
if unread:
    st.caption(f"{unread} runs are still being read.")
for place in shared.runs().denied:
    st.warning(plain(f"{place} cannot be looked into: it is a folder without rights."))

names = [run.name for run in everything]
if "shown" not in st.session_state:
    st.session_state.shown = st.session_state.listed[:1]
st.session_state.shown = [name for name in st.session_state.shown if name in names]
st.multiselect(
    "Shown", names, key="shown", format_func=one_line, max_selections=MOST, placeholder="Choose one or more runs"
)
shown = [shared.runs().look(name) for name in st.session_state.shown]
if unread:
    st.fragment(wait_for_the_rest, run_every=1)()
if not shown:
    st.stop()
for run in shown:
    if run.problem:
        st.warning(plain(f"{run.name}: {run.problem}."))
if len(shown) == 1:
    show_buttons(shown[0])

tabs = st.tabs(["Curves", "Samples", "Configuration", "Lineage"])
with tabs[0]:
    start, known = curves_of(shown)
    stages = {run.stage for run in shown}
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    key = f"curves of {sorted(stages)}"
    chosen = left.multiselect(
        "Curves", known, default=start, key=key, format_func=lambda name: one_line(label_of(name), 60)
    )
    stage = next(iter(stages)) if len(stages) == 1 else ""
    ours = stage in CURVES and all(run.config.get("data", "arith") in ("arith", "own") for run in shown)
    with_band = right.toggle(
        "Where normal runs lie", value=ours, disabled=not ours, help="The grey band: docs/normal.md"
    )
    live = any(run.state == "running" for run in shown)
    arguments = [run.name for run in shown], chosen, stage if ours and with_band else ""
    st.fragment(draw_curves, run_every=2 if live else None)(*arguments)
with tabs[1]:
    for run in shown[:3]:
        st.caption(plain(run.name))
        st.code(shared.runs().samples(run.name) or "(none yet)", language=None, wrap_lines=True, height=360)
with tabs[2]:
    show_configuration(shown, everything)
with tabs[3]:
    show_about(shown)
