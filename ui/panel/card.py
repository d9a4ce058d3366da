"""Report card: what every stage reached, with its interval; and question by question, which of them is right."""

from pathlib import Path

import pandas as pd
import streamlit as st

from runtime.errors import UserError
from ui import report, shared
from ui.folder import inside, plain_file
from ui.shared import one_line, plain


def chart(rows: list[report.Row]) -> dict:
    """A point with its interval for each stage, in the order of the card."""
    values = [
        {"stage": one_line(row.stage, 40), "figure": row.figure, "low": row.low, "high": row.high, "n": row.n}
        for row in rows if row.figure is not None
    ]  # fmt: skip
    order = [value["stage"] for value in values]
    y = {"field": "stage", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 260}}
    shares = all(0 <= value["figure"] <= 1 for value in values)
    scale = {"domain": [0, end_of(values)], "nice": False} if shares else {"zero": False}
    title = f"{next(row.name for row in rows if row.figure is not None)}, with its 95 % interval"
    x = {"field": "figure", "type": "quantitative", "title": title, "scale": scale, "axis": {"tickCount": 8}}
    tooltip = [
        {"field": "stage"},
        *({"field": name, "format": ".3f"} for name in ("figure", "low", "high")),
        {"field": "n"},
    ]
    rule = {"mark": {"type": "rule", "strokeWidth": 2, "color": shared.COLOURS[0], "opacity": 0.6},
            "encoding": {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}}}  # fmt: skip
    point = {"mark": {"type": "point", "filled": True, "size": 90, "color": shared.COLOURS[0], "opacity": 1},
             "encoding": {"y": y, "x": x, "tooltip": tooltip}}  # fmt: skip
    text = {"mark": {"type": "text", "dy": -11, "fontSize": 11, "color": "gray"},
            "encoding": {"y": y, "x": x, "text": {"field": "figure", "format": ".3f"}}}  # fmt: skip
    return {"data": {"values": values}, "layer": [rule, point, text], "height": {"step": 40}}


def end_of(values: list[dict]) -> float:
    """Where the axis of shares ends: a little above the largest of them and of their intervals."""
    largest = max(value for one in values for value in (one["figure"], one["high"]) if value is not None)
    return min(1.0, 1.1 * largest) or 1.0


def interval(row: report.Row) -> str:
    """As evaluate.py writes it."""
    if row.low is None or row.high is None:
        return ""
    return f"{row.low:.3f} to {row.high:.3f}" if row.low < row.high else "all equal"


def table(rows: list[report.Row]) -> tuple[pd.DataFrame, dict]:
    """(the card, how its columns are shown): headings as evaluate.py has them, explanations from docs/metrics.md."""
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    heads = {name: one_line(report.heading(name), 40) for name in names}
    cells = [
        {"stage": one_line(row.stage, 40), row.name: row.figure, "95 % interval": interval(row)}
        | {heads[name]: row.others.get(name) for name in names} | {"n": row.n}
        for row in rows
    ]  # fmt: skip
    frame = pd.DataFrame(cells)
    shown = {
        name: st.column_config.NumberColumn(help=told, format="%.1f" if name == "tokens" else "%.3f")
        for name in frame.columns if name not in ("n", "95 % interval") and (told := report.explained(name))
    }  # fmt: skip
    shown["95 % interval"] = st.column_config.TextColumn(help=report.explained("95 % interval"))
    shown["n"] = st.column_config.NumberColumn(help=report.explained("n"))
    return frame, shown


@st.cache_data(max_entries=64, show_spinner=False)
def answers_for(path: str, stamp: tuple, n: int) -> report.Answers:
    """A run's answers, remembered while its checkpoint is the same."""
    told, found = plain(f"{Path(path).name} answers {n} questions"), None
    bar = st.progress(0.0, text=told)
    for share, answers in report.answers_of(Path(path), report.questions(n)):
        bar.progress(share, text=told)
        found = answers
    bar.empty()
    return found


def show_questions(names: list[str], n: int) -> None:
    asked, found = report.questions(n), {}
    for name in names:
        path = inside(shared.root(), name)
        stat = plain_file(path / "ckpt.pt")
        try:
            if stat is None:
                raise UserError(f"there is no checkpoint in {name}")
            found[name] = answers_for(str(path), (stat.st_mtime_ns, stat.st_size), n)
        except UserError as error:
            st.warning(plain(f"{name}: {error}"))
    if not found:
        return
    rows = []
    for i, one in enumerate(asked):
        row = {"question": one_line(one.messages[-1]["content"], 300)}
        rows.append(row | {one_line(name): "✓" if answers.right[i] else "✗" for name, answers in found.items()})
    shares = ", ".join(f"{name} {sum(answers.right)} of {n}" for name, answers in found.items())
    st.caption(plain(f"✓ right, ✗ wrong, answered greedily: {shares}. Tick a row to read the answers."))
    picked = st.dataframe(
        pd.DataFrame(rows), hide_index=True, on_select="rerun", selection_mode="single-row", height=340,
        key="questions",
        column_config={"question": st.column_config.TextColumn("question", width="large")},
    )  # fmt: skip
    chosen = picked.selection.rows[0] if picked.selection.rows else 0
    one = asked[chosen]
    st.markdown(f"**{plain(one.messages[-1]['content'])}**")
    st.caption(plain(f"right answer {one.gold}"))
    for name, answers in found.items():
        st.caption(plain(f"{name}: {'right' if answers.right[chosen] else 'wrong'}"))
        st.code(one_line(answers.texts[chosen], 2000), language=None, wrap_lines=True)


st.title("Report card")
names = report.reports(shared.root())
if names:
    name = st.selectbox("Card", names, format_func=one_line, key="card")
    try:
        rows = report.read(shared.root(), name)
        if report.is_quick(shared.root(), name):
            st.info("This card is of the quick look, with next to no training: its figures mean nothing.")
        if any(row.figure is not None for row in rows):
            st.vega_lite_chart(chart(rows), width="stretch")
        frame, columns = table(rows)
        st.dataframe(frame, hide_index=True, column_config=columns)
        st.caption(
            "Accuracy is of greedy answers, pass@1 of sampled ones. A heading that is pointed at says what it is. How "
            "it was measured stands in the report.md beside it; what it can and cannot say, in docs/results.md."
        )
    except UserError as error:
        st.warning(plain(str(error)))
else:
    st.info(
        "There is no report card yet: the pipeline writes one after every stage (the page Start, its first buttons)."
    )
st.subheader("Question by question")
silent = ("pretrain", "reward", "encoder", "mlm")
known = [run.name for run in shared.runs().all(1.0) if run.saved and run.stage not in silent]
if not known:
    st.caption("No run can answer yet.")
    st.stop()
left, right = st.columns([4, 1], vertical_alignment="bottom")
folder = names[0].rpartition("/")[0] if names else ""
first = [one for one in known if one.startswith(f"{folder}/")][:4] or known[:2]
asked = left.multiselect("Runs", known, default=first, format_func=one_line, max_selections=8)
n = right.number_input("questions", 8, 256, 32, step=8)
if st.toggle(
    "Let them answer", key="answer", help="Held-out questions of the embedded task, answered greedily, here and now."
):
    show_questions(asked, int(n))
