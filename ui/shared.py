"""What the pages of the panel share: the folder of runs, the queue, and how a text is shown that anyone may have
written.
"""

import os
import re
import sys
from pathlib import Path

import streamlit as st

from runtime.errors import UserError
from runtime.progress import printable
from ui.folder import Run, Runs
from ui.jobs import Queue

HERE = ("127.0.0.1", "localhost", "::1")
STATES = {
    "running": "● running",
    "finished": "✓ finished",
    "stopped": "‖ stopped",
    "new": "○ new",
    "unread": "… being read",
    "damaged": "! damaged",
}
COLOURS = ("#2f7fc1", "#d5651f", "#12936f", "#b4689a", "#8a7b2c", "#5b54b8", "#a33a3a", "#6f6f78")


def root() -> Path:
    """The folder of runs: what ``--runs`` names, or the environment variable ALIGNBOOK_RUNS, else out/."""
    words = sys.argv[1:]
    given = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--runs"), "")
    given = given or next((word.partition("=")[2] for word in words if word.startswith("--runs=")), "")
    given = os.environ.get("ALIGNBOOK_RUNS", "") or given
    return Path(given).resolve() if given else Path(__file__).resolve().parent.parent / "out"


def refuse_other_machines() -> None:
    """Show nothing if the server listens to more than this machine."""
    safe = st.get_option("server.address") in HERE
    safe = safe and st.get_option("server.enableCORS") and st.get_option("server.enableXsrfProtection")
    safe = safe and not st.get_option("server.corsAllowedOrigins") and not st.get_option("global.developmentMode")
    if not safe:
        st.error(
            "This panel starts processes, so it answers to this machine and to its own page alone. A setting of "
            "Streamlit's (server.address, server.enableCORS, server.enableXsrfProtection, server.corsAllowedOrigins, "
            "global.developmentMode) says otherwise than ui/.streamlit/config.toml."
        )
        st.stop()


@st.cache_resource
def _runs(path: str) -> Runs:
    return Runs(Path(path))


@st.cache_resource
def _queue(path: str) -> Queue:
    queue = Queue(Path(path))
    queue.watch()
    return queue


def runs() -> Runs:
    return _runs(str(root()))


def queue() -> Queue:
    return _queue(str(root()))


def plain(text: str) -> str:
    """A text for a place that reads markdown: shown as it is.

    >>> plain("a*b* :red[c] <b> $x$")
    'a\\\\*b\\\\* \\\\:red\\\\[c\\\\] \\\\<b\\\\> \\\\$x\\\\$'
    """
    text = printable(str(text)).replace("\n", " ").replace("\t", " ")
    text = re.sub(r"(?i)(https?|ftp|mailto|www)(?=[.:])|(?=@)", lambda found: f"{found[0]}\u200b", text)  # no link
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~$:&^=])", r"\\\1", text)


def one_line(text: str, most: int = 200) -> str:
    """A text for a place that reads none: what would turn the direction of text around is shown as an escape."""
    text = printable(str(text)).replace("\n", "⏎").replace("\t", " ")
    return text if len(text) <= most else text[: most - 1] + "…"


def state_in_words(run: Run) -> str:
    told = STATES[run.state]
    if run.state == "stopped" and run.steps:
        told += f" at {run.step:,} of {run.steps:,}"
    return told


def short(path: Path) -> str:
    """A path as it is typed in the repository's root."""
    here = Path(__file__).resolve().parent.parent
    return str(path.relative_to(here)) if here in path.parents else str(path)


def go_on(number: int) -> None:
    """Put a job that was stopped into the queue again, and show the page anew."""
    try:
        queue().go_on(number)
    except UserError as error:
        st.error(plain(str(error)))
    else:
        st.rerun()


def nothing_yet() -> None:
    """What a page says while there are no runs."""
    st.info(
        "There are no runs yet. The page Start makes some: its first button takes two to three minutes on two busy "
        "cores."
    )
    if st.button("Start", key="to start", type="primary"):
        st.switch_page("panel/start.py")
