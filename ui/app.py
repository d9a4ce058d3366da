"""The control panel: look at runs, start them, open a rollout, talk to a model, compare stages.

    pip install -e ".[ui]" && streamlit run ui/app.py          # the runs below out/, at http://127.0.0.1:8501
    streamlit run ui/app.py -- --runs DIR                      # those of another folder

It answers to this machine alone, starts stages as processes of their own (``jobs.py``), and reads and writes nothing
outside the folder of runs. The book does not know of it: nothing imports ``ui/``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "ui"))]

import streamlit as st

from ui import shared

PAGES = {"runs": "Runs", "start": "Start", "rollouts": "Rollouts", "talk": "Chat", "card": "Report card"}

st.set_page_config(page_title="alignbook", page_icon="📖", layout="wide")
st.html("<style>.stMainBlockContainer { padding-top: 4.2rem; } h1 { font-size: 2rem !important; }</style>")
shared.refuse_other_machines()
shared.queue()
here = ROOT / "ui" / "panel"
pages = [
    st.Page(here / f"{name}.py", title=title, url_path=title.lower().replace(" ", "-"), default=name == "runs")
    for name, title in PAGES.items()
]
st.navigation(pages, position="top").run()
