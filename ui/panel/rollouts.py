"""Rollouts: what a run wrote and what the method saw of it, token by token."""

import shlex
from pathlib import Path

import streamlit as st

from runtime.rollouts import NAME
from ui import shared
from ui.folder import plain_file
from ui.rollouts import load, note_of, page_of
from ui.shared import one_line, plain

# The page of a run is as high as the window, less what stands above it.
FULL = """.stMainBlockContainer { padding-bottom: 1rem; }
.stMainBlockContainer :has(> iframe) { height: auto !important; flex: none !important; }
.stMainBlockContainer iframe { height: max(560px, calc(100vh - 260px)) !important; }"""
MOST = 1_500_000  # bytes of records in the panel; the file that can be saved holds more


@st.cache_data(max_entries=6, show_spinner="reading")
def page_for(path: str, title: str, stamp: tuple, most: int) -> tuple[str, int]:
    """(the page, how many steps it shows), remembered while the file is the same."""
    records, known, damaged = load(Path(path), most)
    return page_of(records, title, note_of(len(records), known, damaged)), len(records)


def show(name: str) -> None:
    path = shared.runs().root / name / NAME
    found = plain_file(path)
    if found is None:
        st.warning(plain(f"{name} holds no {NAME} any more."))
        return
    stamp = (found.st_mtime_ns, found.st_size)
    page, steps = page_for(str(path), one_line(name), stamp, MOST)
    if not steps:
        st.warning(plain(f"No line of {name}/{NAME} is a whole record."))
        return
    st.html(f"<style>{FULL}</style>")
    st.iframe(page, height=900)


def written() -> list[str]:
    """The runs that wrote rollouts down, the newest first."""
    runs = shared.runs()
    found = [(plain_file(runs.root / name / NAME), name) for name in runs.names()]
    return [name for stat, name in sorted(((s, n) for s, n in found if s), key=lambda pair: -pair[0].st_mtime)]


st.title("Rollouts")
names = written()
if not names:
    st.info("No run has written rollouts down yet. PPO, GRPO, GDPO, DPO and KTO do, at every evaluation.")
    st.stop()
left, right = st.columns([4, 1], vertical_alignment="bottom")
name = left.selectbox("Run", names, key="run", format_func=one_line)
path = shared.runs().root / name / NAME
found = plain_file(path)
with right.popover("Save as a page", width="stretch"):
    st.caption("One file with everything in it, which opens without this panel and asks no other machine.")
    st.code(
        f"python ui/rollouts.py {shlex.quote(shared.short(path.parent))} --write page.html",
        language="bash",
        wrap_lines=True,
    )
    if found is not None and st.toggle("Make it now", key=f"make {name}"):
        page, _ = page_for(str(path), one_line(name), (found.st_mtime_ns, found.st_size), 6_000_000)
        st.download_button("page.html", page, "page.html", "text/html", on_click="ignore")
live = shared.runs().look(name).state == "running"
if live:
    st.caption("The run goes on: new steps appear when the page is loaded again.")
show(name)
