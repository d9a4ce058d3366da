"""Start: a form for every stage, the command that it stands for, and the queue."""

import shlex
import subprocess
import sys
from pathlib import Path

import streamlit as st

from runtime.errors import UserError
from runtime.rollouts import NAME
from ui import forms, shared
from ui.folder import OWN, inside, plain_file
from ui.forms import STAGES, STARTS, Field, shown, value_of
from ui.jobs import OPEN, ROOT, RUNNING, STOPPED, STOPPING, WAITING, Job, cores, spoken, stage_in
from ui.shared import one_line, plain, short

FIRST = {
    "quick": ("A quick look", "Pretraining, SFT and GRPO with next to no training, in two to three minutes on two busy "
              "cores: all of it runs, nothing is learned.", ["--quick", "--only", "grpo"], "arith_quick"),
    "learns": ("A first look that learns", "Pretraining, SFT and GRPO on sums in stories: five to ten minutes.",
               ["--only", "grpo"], "arith"),
}  # fmt: skip
MARKS = {WAITING: "○", RUNNING: "●", STOPPING: "◐", "finished": "✓", STOPPED: "‖", "failed": "!"}


def start_first(words: list[str], folder: str) -> None:
    try:
        shared.queue().add("pipeline.py", [*words, "--out", short(shared.root() / folder)], folder)
    except UserError as error:
        st.session_state.refused = str(error)


# ----------------------------------------------------------------------------------------------------------------------
# The queue


def show_job(job: Job, is_last: bool) -> None:
    """is_last: no later job is about the same run."""
    with st.container(border=True):
        left, right = st.columns([5, 2], vertical_alignment="center")
        stage = f"{job.script.removesuffix('.py')} → {job.folder}"
        left.markdown(f"{MARKS[job.state]} **{plain(stage)}** · {job.state}")
        if job.told:
            left.caption(plain(one_line(job.told, 240)))
        buttons = right.container(horizontal=True, horizontal_alignment="right")
        if job.state in (WAITING, RUNNING) and buttons.button(
            "Stop" if job.state == RUNNING else "Take out", key=f"stop {job.number}",
            help="As Ctrl-C: the stage finishes its step, saves and ends. It can go on from there.",
        ):  # fmt: skip
            shared.queue().stop(job.number)
            st.rerun(scope="fragment")
        if job.state in (STOPPED, "failed") and is_last and buttons.button("Go on", key=f"go on {job.number}"):
            shared.go_on(job.number)
        if job.state == "finished":
            show_ways_on(job, buttons)
        if job.state not in OPEN and buttons.button(
            "Remove from the list", key=f"remove {job.number}", help="The run stays."
        ):
            shared.queue().forget(job.number)
            st.rerun(scope="fragment")
        if job.state in (RUNNING, STOPPING):
            show_progress(job)
        with st.expander("What it prints", expanded=job.state == "failed"):
            st.code(job.command(), language=None, wrap_lines=True)
            st.code(printed(job), language=None, height=220)


def show_ways_on(job: Job, buttons) -> None:
    """Buttons that lead from a finished job to the pages which show what it made."""
    if (run := talker(job)) and buttons.button("Chat with it", key=f"chat {job.number}"):
        st.session_state.one = run
        st.switch_page("panel/talk.py")
    if (run := witness(job)) and buttons.button("Rollouts", key=f"rollouts {job.number}"):
        st.session_state.run = run
        st.switch_page("panel/rollouts.py")
    card = f"{job.folder}/report.json"
    if plain_file(shared.root() / card) and buttons.button("Report card", key=f"card {job.number}"):
        st.session_state.card = card
        st.switch_page("panel/card.py")


def witness(job: Job) -> str:
    """The run of a job that wrote rollouts down last; empty if none did."""
    folders = [job.folder, *(f"{job.folder}/{name}" for name in ("dpo", "kto", "ppo", "grpo", "gdpo"))]
    found = [(stat.st_mtime, name) for name in folders if (stat := plain_file(shared.root() / name / NAME))]
    return max(found, default=(0, ""))[1]


def talker(job: Job) -> str:
    """The run of a finished job whose model can answer; of the pipeline, the last one; empty if there is none."""
    wanted = ("sft", "dpo", "kto", "ppo", "grpo") if job.script == "pipeline.py" else ("",)
    runs = [shared.runs().look(f"{job.folder}/{name}".rstrip("/")) for name in wanted]
    able = [run for run in runs if run.saved and not run.problem and run.stage not in ("reward", "encoder", "mlm")]
    return able[-1].name if able else ""


def printed(job: Job) -> str:
    """The last lines of a job, without the parts that only draw a bar."""
    lines = [one_line(line, 400) for line in shared.queue().log(job.number).splitlines() if line.strip()]
    return "\n".join(lines[-40:]) or "(nothing yet)"


def show_progress(job: Job) -> None:
    """How far the run is; of the pipeline, the stage that is running."""
    names = [job.folder] if job.script != "pipeline.py" else shared.runs().names()
    runs = [shared.runs().look(name) for name in names if name == job.folder or name.startswith(f"{job.folder}/")]
    run = next((run for run in runs if run.state == "running"), None)
    said = spoken(shared.queue().log(job.number, 100_000))
    stage = stage_in(said)
    if run is not None and run.steps:
        place = f"{stage}, " if stage else ""
        told = f"{place}{run.stage or run.name}: step {run.step:,} of {run.steps:,}  {run.best_in_words()}"
        st.progress(run.progress, text=plain(told))
    elif job.state == RUNNING:
        st.caption(plain(one_line(said[-1], 160)) if said else "It is starting: the libraries take some seconds.")


def show_queue() -> None:
    jobs = shared.queue().jobs()
    if not jobs:
        st.caption("Nothing is in the queue.")
        return
    for i, job in enumerate(jobs[:12]):
        show_job(job, not any(later.folder == job.folder for later in jobs[:i]))
    if len(jobs) > 12:
        st.caption(f"and {len(jobs) - 12} older ones")


# ----------------------------------------------------------------------------------------------------------------------
# The form


def show_field(field: Field, value, key: str):
    """One field, and what was typed into it. UserError: it is no such value."""
    told = plain(field.text) + (f" ({plain(field.bounds)})" if field.bounds else "")
    told += " Empty: none." if field.optional else ""
    label = plain(field.name)
    if field.kind == "switch":
        return st.toggle(label, value=bool(value), help=told, key=key)
    if field.kind == "choice":
        choices = [*field.choices, *([] if value in field.choices else [value])]
        return st.selectbox(label, choices, index=choices.index(value), help=told, key=key)
    return value_of(field, st.text_input(label, value=shown(value), help=told, key=key))


def default_folder(stage: str, values: dict) -> str:
    """Where a run of the stage goes: as the stage itself would have it, but in this folder of runs."""
    given = values.get("out_dir") or values.get("out") or ""
    return given.removeprefix("out/") or (
        values.get("task", "arith") if stage == "pipeline" else f"{values.get('task', 'arith')}/{stage}"
    )


def show_start_from(stage: str, values: dict, key: str) -> str | None:
    """The run to start from, below the folder of runs; None if the stage starts from nothing."""
    if "init_from" not in values:
        return None
    first = STARTS.get(stage, "")
    default = (values["init_from"] or "").removeprefix("out/") or (f"{values['task']}/{first}" if first else "")
    known = [run.name for run in shared.runs().all(1.0) if run.stage not in ("reward", "encoder") and run.saved]
    queued = [job.folder for job in shared.queue().jobs() if job.state in OPEN]
    nothing = [] if first else [""]
    options = list(dict.fromkeys([*nothing, *([default] if default else []), *queued, *known]))
    told = dict.fromkeys(queued, " (in the queue)") | dict.fromkeys(known, "")
    named = {name: one_line(name) + told.get(name, " (not there yet)") for name in options} | {"": "nothing"}
    return st.selectbox(
        "Start from", options, key=key, format_func=named.get,
        help=plain("The model to start from: a run of this folder (init_from)."),
    )  # fmt: skip


def show_form() -> None:
    stage = st.pills("Stage", list(STAGES), default="grpo", key="stage", required=True)
    st.caption(plain(f"{stage}.py {STAGES[stage]}."))
    presets = {"": "the defaults"} | forms.presets(stage)
    left, middle, right = st.columns(3)
    preset = left.selectbox(
        "Preset", list(presets), key=f"preset {stage}", format_func=lambda path: Path(path).stem or "defaults",
        help=plain("A file of configs/ that fills in the form."),
    )  # fmt: skip
    if preset:
        st.caption(plain(presets[preset]))
    key, problems = f"{stage}|{preset}", []
    start = forms.start_values(stage, preset)
    folder = middle.text_input(
        "Folder", value=default_folder(stage, start), key=f"folder {key}",
        help=plain("Where the run writes, below the folder of runs. A run that is there is continued."),
    )  # fmt: skip
    with right:
        source = show_start_from(stage, start, f"from {key}")
    values = {}
    for number, (title, (about, fields)) in enumerate(forms.groups(stage).items()):
        with st.expander(title, expanded=number == 0):
            if about:
                st.caption(plain(about))
            columns = st.columns(3)
            for i, field in enumerate(fields):
                with columns[i % 3]:
                    try:
                        values[field.name] = show_field(field, start[field.name], f"{key}|{field.name}")
                    except UserError as error:
                        problems.append(str(error))
    fresh = (shared.root() / folder / "ckpt.pt").exists() and st.checkbox(
        "Start again: the run that is there is moved aside", key=f"fresh {key}"
    )
    show_command(stage, preset, values, folder, source, fresh, problems)


def place_words(stage: str, folder: str, source: str | None, values: dict) -> tuple[list[str], list[str]]:
    """(the words that name folders, the runs that are needed). UserError: one lies outside the folder of runs."""
    root = shared.root()
    place = inside(root, folder)
    if place == root.resolve() or OWN in place.relative_to(root.resolve()).parts:
        raise UserError("a run needs a folder of its own below the folder of runs")
    words, needs = ["--out" if stage == "pipeline" else "--out_dir", short(place)], []
    if source:
        words += ["--init_from", short(inside(root, source))]
        needs.append(source)
    judge = values.get("reward", "verifier")
    if stage == "ppo" and judge != "verifier" and not judge.endswith(".py"):
        needs.append(str(inside(root, ROOT / judge).relative_to(root.resolve())))
    return words, needs


def show_command(stage, preset, values, folder, source, fresh, problems) -> None:
    words, needs = [], []
    if not problems:
        try:
            places, needs = place_words(stage, folder, source, values)
            words = [*forms.words_of(stage, preset, values), *places, *(["--fresh"] if fresh else [])]
        except (UserError, ValueError) as error:
            problems = [str(error)]
    for problem in problems:
        st.error(plain(problem))
    script = f"{stage}.py"
    if not problems:
        st.code(shlex.join(["python", script, *words]), language="bash", wrap_lines=True)
    left, right, _ = st.columns([1, 1, 3])
    if left.button("Start", type="primary", disabled=bool(problems), key="start", width="stretch"):
        try:
            job = shared.queue().add(script, words, folder, needs)
            st.session_state.accepted = f"Job {job.number} is in the queue, above."
            st.rerun()
        except UserError as error:
            st.error(plain(str(error)))
    if right.button("What will it need?", disabled=bool(problems), key="need", width="stretch"):
        with st.spinner("asking the stage"):
            st.code(needed(script, words), language=None, wrap_lines=True)


def needed(script: str, words: list[str]) -> str:
    """What the stage says that it would do: its model, memory and time."""
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *words, "--print_config"], cwd=ROOT, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it did not answer within two minutes"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return "\n".join(one_line(line, 400) for line in lines[-80:])


st.title("Start")
if told := st.session_state.pop("refused", ""):
    st.warning(plain(told))
if told := st.session_state.pop("accepted", ""):
    st.success(plain(told))
st.subheader("New here?")
for column, (name, (title, about, words, folder)) in zip(st.columns(2), FIRST.items()):
    with column.container(border=True):
        st.markdown(f"**{title}**")
        st.caption(about)
        st.button("Start it", key=f"first {name}", on_click=start_first, args=(words, folder))
head, tail = st.columns([4, 1], vertical_alignment="bottom")
head.subheader("The queue")
most = max(2, cores())
at_once = tail.number_input(
    "at once",
    1,
    most,
    min(shared.queue().at_once, most),
    help=plain(f"This machine has {cores()} cores; the runs share them."),
)
shared.queue().at_once = at_once
is_open = any(job.state in OPEN for job in shared.queue().jobs())
st.fragment(show_queue, run_every=1.5 if is_open else None)()
st.subheader("A stage of your own choice")
show_form()
