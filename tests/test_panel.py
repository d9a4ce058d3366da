"""Every page of the control panel, run as Streamlit runs it, without a browser."""

import json
import shutil
import time
from pathlib import Path

import pytest
from tiny import tiny_pretrain, tiny_sft

import grpo
import pretrain
import sft
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import parse
from ui import jobs

pytest.importorskip("streamlit", reason='streamlit is not installed: pip install -e ".[ui]"')

import streamlit as st
from streamlit.testing.v1 import AppTest

from ui import shared

ROOT = Path(__file__).parent.parent
EVIL = "<img src=x onerror=alert(1)> **bold** :red[red] $x$ [a](http:x) `"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("panel")
    pretrain.main(tiny_pretrain(root / "a" / "pretrain", max_documents=60, vocab_size=270))
    sft.main(tiny_sft(root / "a" / "sft", root / "a" / "pretrain"))
    settings = {
        "init_from": str(root / "a" / "sft"), "steps": 2, "prompts_per_step": 4, "n_prompts": 64, "eval_prompts": 8,
        "eval_every": 2, "device": "cpu", "beta": 0.05, "max_new_tokens": 16,
    }  # fmt: skip
    for seed in (0, 1):
        grpo.main(grpo.Config(out_dir=str(root / f"seed{seed}" / "grpo"), seed=seed, **settings))
    rows = [{"stage": "SFT", "path": "x", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 128, "pass@1": 0.4}]
    (root / "a" / "report.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def page(root, monkeypatch):
    """Open a page on the folder of runs."""
    monkeypatch.setenv("ALIGNBOOK_RUNS", str(root))

    def opened(name: str) -> AppTest:
        test = AppTest.from_file(str(ROOT / "ui" / "panel" / f"{name}.py"), default_timeout=120).run()
        assert not test.exception, test.exception[0].message
        return test

    return opened


def run(test: AppTest) -> AppTest:
    test.run()
    assert not test.exception, test.exception[0].message
    return test


def markdown_of(test: AppTest) -> list[str]:
    """Every text that the page hands to something that reads markdown."""
    kinds = (test.markdown, test.caption, test.title, test.subheader, test.warning, test.error, test.info, test.success)
    texts = [element.value for kind in kinds for element in kind]
    labels = [element.label for kind in (test.button, test.toggle, test.text_input, test.selectbox) for element in kind]
    return texts + labels


def assert_shown_as_text(test: AppTest) -> None:
    """Whatever of the hostile name stands in markdown is escaped there."""
    for text in markdown_of(test):
        for mark in ("<img", "*bold", ":red", "$ ", "](http"):
            assert mark not in text.replace(f"\\{mark}", ""), text


def charts(test: AppTest) -> list[dict]:
    return [json.loads(element.proto.spec) for element in test.get("vega_lite_chart")]


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Stages that say their words and end, instead of those of the book."""
    here = tmp_path / "repository"
    here.mkdir()
    for name in ("pipeline", "grpo", "sft"):
        (here / f"{name}.py").write_text("import sys\nprint(sys.argv[1:])\n")
    monkeypatch.setattr(jobs, "ROOT", here)


def started(root: Path, n: int) -> list[dict]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [json.loads(path.read_text()) for path in sorted((root / ".panel").glob("*.json"))]
        if len(found) >= n and all(one["state"] == "finished" for one in found):
            return found
        time.sleep(0.1)
    raise AssertionError(found)


PAGES = ("runs", "start", "rollouts", "talk", "card")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_on_a_folder_with_nothing_in_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ALIGNBOOK_RUNS", str(tmp_path / "none"))
    test = AppTest.from_file(str(ROOT / "ui" / "panel" / f"{name}.py"), default_timeout=120).run()
    assert not test.exception and not (tmp_path / "none").exists()
    assert name == "start" or test.info


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_hostile_names_and_texts_as_text(root, page, name):
    for stage in ("sft", "grpo"):
        source = root / "a" / "sft" if stage == "sft" else root / "seed0" / "grpo"
        shutil.copytree(source, root / EVIL.replace("/", "") / stage)
    folder = root / EVIL / "grpo"
    config = json.loads((folder / "config.json").read_text()) | {"data": EVIL, EVIL: EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.txt").write_text(EVIL)
    lines = (folder / "rollouts.jsonl").read_text().replace("How many", EVIL)
    (folder / "rollouts.jsonl").write_text(lines)
    rows = [{"stage": EVIL, "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 8, EVIL: 1.0}]
    (root / EVIL / "report.json").write_text(json.dumps(rows))
    broken = root / f"{EVIL} broken"
    shutil.copytree(root / "a" / "pretrain", broken)
    (broken / "ckpt.pt").write_bytes(b"PK")
    test = page(name)
    names = [f"{EVIL}/grpo", f"{EVIL} broken"]
    if name == "runs":
        test.multiselect(key="shown").set_value(names)
        assert any("damaged" in warning.value for warning in run(test).warning)
    elif name == "rollouts":
        test.selectbox(key="run").set_value(names[0])
        (frame,) = run(test).get("iframe")
        shown = frame.proto.srcdoc.partition("</style>")[2]
        assert "<img" not in shown and "\\u003cimg" in shown
    elif name == "talk":
        test.selectbox(key="one").set_value(names[0])
        run(test).chat_input[0].set_value(EVIL)
        run(test)
        assert all("<img" not in element.value for element in test.get("html") if hasattr(element, "value"))
    elif name == "card":
        test.selectbox(key="card").set_value(f"{EVIL}/report.json")
        run(test)
    assert_shown_as_text(test)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_runs_draws_the_curves_of_the_newest_run_and_compares_others(root, page):
    test = page("runs")
    frame = test.dataframe[0].value
    assert list(frame["run"]) and set(frame["state"]) == {"✓ finished"} and len(frame) == 4
    assert test.multiselect(key="shown").value == [frame["run"][0]] and charts(test)
    test.multiselect(key="shown").set_value(["seed0/grpo", "seed1/grpo"])
    specs = charts(run(test))
    titles = [spec["title"]["text"] for spec in specs]
    assert any("accuracy" in title for title in titles)
    lines = next(layer for layer in specs[0]["layer"] if layer["mark"]["type"] == "line")
    names = lines["encoding"]["color"]["scale"]["domain"]
    assert len(names) == 1 and "2 seeds" in names[0]  # they differ in their seed alone
    has_area = lambda specs: any(layer["mark"]["type"] == "area" for spec in specs for layer in spec["layer"])  # noqa: E731
    too_short = lambda: any("no grey band for so short a run" in caption.value for caption in test.caption)  # noqa: E731
    assert not has_area(specs) and too_short()
    with open(root / "seed0" / "grpo" / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "accuracy": 0.5, "correct": 0.5}\n')
    assert has_area(charts(run(test))) and not too_short()  # the reference
    test.multiselect(key="shown").set_value(["a/sft", "seed1/grpo"])
    lines = charts(run(test))[0]["layer"][0]
    assert lines["encoding"]["color"]["scale"]["domain"] == ["a/sft", "seed1/grpo"]


def test_runs_says_how_a_configuration_differs(page):
    test = page("runs")
    test.multiselect(key="shown").set_value(["seed1/grpo", "seed0/grpo"])
    run(test)
    frame = next(one.value for one in test.dataframe if "field" in one.value.columns)
    assert dict(zip(frame["field"], frame["here"]))["seed"] == "1" and set(frame["field"]) == {"seed", "out_dir"}


def test_runs_finds_and_shows_what_is_damaged(root, page):
    (root / "a" / "sft" / "ckpt.pt").write_bytes(b"PK")
    shutil.copytree(root / "a" / "pretrain", root / "denied")
    (root / "denied").chmod(0)
    try:
        test = page("runs")
        assert "damaged" in test.dataframe[0].value.set_index("run").loc["a/sft"]["best figure"]
        test.text_input[0].set_value("GRPO finished")
        assert sorted(run(test).dataframe[0].value["run"]) == ["seed0/grpo", "seed1/grpo"]
    finally:
        (root / "denied").chmod(0o755)


def test_runs_follows_a_run_that_is_going_on(root, page, monkeypatch):
    from runtime import lock

    folder = root / "a" / "sft"
    lock.hold(folder)
    try:
        test = page("runs")
        test.multiselect(key="shown").set_value(["a/sft"])
        before = [str(chart.proto) for chart in run(test).get("vega_lite_chart")]
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 500, "loss": 0.125, "val_loss": 0.125}\n{"step": 501, "lo')
        after = [str(chart.proto) for chart in run(test).get("vega_lite_chart")]
        assert len(before) == len(after) and before != after
        assert [values[-1] for values in shared.runs().series("a/sft").curves["loss"]] == [500, 0.125]
        assert "● running" in list(test.dataframe[0].value["state"])
    finally:
        lock.release(folder)


def stopped(root: Path, **changes) -> None:
    """a/sft as a run that was stopped after three steps, with these values in its configuration."""
    folder = root / "a" / "sft"
    state = load_checkpoint(folder)
    state["finished"], state["step"] = False, 3
    save_checkpoint(folder, {name: value for name, value in state.items() if name != "magic"})
    config = json.loads((folder / "config.json").read_text()) | {"init_from": str(root / "a" / "pretrain")} | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_that_was_started_elsewhere_can_go_on(root, page, stages):
    stopped(root)
    test = page("runs")
    test.multiselect(key="shown").set_value(["a/sft"])
    run(test).button(key="go on").click()
    run(test)
    (job,) = started(root, 1)
    config = parse(sft.Config, job["words"])
    assert job["script"] == "sft.py" and config.n_examples == 24 and config.out_dir == str(root / "a" / "sft")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_from": "/etc"}, "outside the folder"), ({"init_from": "../x"}, "outside the folder"),
        ({"n_examples": "many"}, "does not know"), ({"columns": ["--fresh"]}, "cannot be given"),
        ({"lr": -1.0}, "at least 0"), ({"data": "evil.py"}, "more than the stage"),
        ({"data": "/etc/passwd.jsonl"}, "outside the folder"),
    ],
)  # fmt: skip
def test_a_strange_configuration_starts_nothing(root, page, stages, changes, said):
    stopped(root, **changes)
    test = page("runs")
    test.multiselect(key="shown").set_value(["a/sft"])
    run(test).button(key="go on").click()
    run(test)
    assert any(said in error.value.replace("\\", "") for error in test.error), [error.value for error in test.error]
    assert not (root / ".panel").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Start


def test_start_begins_with_one_click(root, page, stages):
    test = page("start")
    test.button(key="first quick").click()
    run(test)
    (job,) = started(root, 1)
    assert (
        job["words"] == ["--quick", "--only", "grpo", "--out", str(root / "arith_quick")]
        and job["script"] == "pipeline.py"
    )


def test_a_finished_job_leads_to_what_it_made(root, page, stages):
    code = """
print("3 stages, 3 of them finished, nothing to do")
print("--quick: next to no training. A first look that learns: python pipeline.py --only grpo")
print("talk to it: python chat.py x")
"""
    (jobs.ROOT / "pipeline.py").write_text(code)
    shutil.copytree(root / "seed0" / "grpo", root / "a" / "grpo")
    queue = jobs.Queue(root)
    number = queue.add("pipeline.py", ["--quick"], "a").number
    while queue.jobs()[0].state in jobs.OPEN:
        time.sleep(0.05)
    (job,) = started(root, 1)
    assert job["told"] == "it had nothing to do: all of it was finished before"
    test = page("start")
    names = [button.label for button in test.button if button.key and button.key.endswith(f" {number}")]
    assert names == ["Chat with it", "Rollouts", "Report card", "Remove from the list"]
    assert not any("first look that learns:" in caption.value for caption in test.caption)


def test_start_makes_a_command_of_a_form_and_starts_it(root, page, stages):
    test = page("start")
    key = "grpo|"
    test.text_input(key=f"folder {key}").set_value("mine/grpo")
    test.selectbox(key=f"from {key}").set_value("a/sft")
    test.text_input(key=f"{key}|lr").set_value("1e-5")
    test.selectbox(key=f"{key}|scale").set_value("none")
    test.toggle(key=f"{key}|mask_truncated").set_value(True)
    run(test)
    words = ["--mask_truncated", "--scale", "none", "--lr", "1e-05"]
    places = ["--out_dir", str(root / "mine" / "grpo"), "--init_from", str(root / "a" / "sft")]
    assert test.code[-1].value == " ".join(["python", "grpo.py", *words, *places])
    test.button(key="start").click()
    run(test)
    (job,) = started(root, 1)
    assert job["words"] == [*words, *places] and job["folder"] == "mine/grpo" and job["needs"] == ["a/sft"]
    assert test.success


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("folder grpo|", "../x", "outside the folder"), ("folder grpo|", "/elsewhere", "outside the folder"),
        ("folder grpo|", "", "a folder of its own"), ("folder grpo|", ".panel/x", "a folder of its own"),
        ("grpo||lr", "fast", "not a number"), ("grpo||group_size", "1", "at least 2"),
        ("grpo||steps", "", "whole number"),
        ("grpo||columns", "--fresh", "cannot be given"),
    ],
)  # fmt: skip
def test_start_refuses_what_cannot_be(root, page, stages, key, value, said):
    test = page("start")
    test.text_input(key=key).set_value(value)
    run(test)
    assert any(said in error.value.replace("\\", "") for error in test.error), [error.value for error in test.error]
    assert test.button(key="start").disabled and not (root / ".panel").exists()


def test_a_value_that_looks_like_an_option_stays_a_value(root, page, stages):
    test = page("start")
    test.text_input(key="grpo||data").set_value("--fresh")
    run(test)
    assert "--data=--fresh" in test.code[-1].value
    test.button(key="start").click()
    run(test)
    assert "--data=--fresh" in started(root, 1)[0]["words"]


def test_every_stage_and_preset_has_its_form(page):
    test = page("start")
    for stage in ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "gdpo", "encoder", "pipeline"):
        test.pills(key="stage").set_value(stage)
        run(test)
        assert f"python {stage}.py" in test.code[-1].value, stage
    test.pills(key="stage").set_value("grpo")
    run(test)
    test.selectbox(key="preset grpo").set_value("configs/grpo_dapo.py")
    run(test)
    assert "python grpo.py configs/grpo_dapo.py" in test.code[-1].value
    assert float(test.text_input(key="grpo|configs/grpo_dapo.py|clip_high").value) == 0.28


@pytest.mark.slow
def test_start_says_what_a_run_would_need(root, page):
    test = page("start")
    test.selectbox(key="from grpo|").set_value("a/sft")
    run(test)
    test.button(key="need").click()
    run(test)
    assert "memory" in test.code[-1].value and "parameters" in test.code[-1].value


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts, chat, report card


def test_rollouts_shows_the_page_of_the_run(root, page):
    test = page("rollouts")
    test.selectbox(key="run").set_value("seed1/grpo")
    (frame,) = run(test).get("iframe")
    assert "seed1/grpo" in frame.proto.srcdoc and '"step":2' in frame.proto.srcdoc
    (root / "seed1" / "grpo" / "rollouts.jsonl").write_text("damaged\n")
    run(test)
    assert "whole record" in test.warning[0].value and not test.get("iframe")


def test_two_models_answer_the_same_question_with_the_same_seed(page):
    test = page("talk")
    test.selectbox(key="one").set_value("seed0/grpo")
    test.selectbox(key="two").set_value("seed1/grpo")
    run(test)
    test.chat_input[0].set_value("Tom has 4 apples. How many?")
    run(test)
    (turn,) = test.session_state["turns"]
    assert turn["question"] == "Tom has 4 apples. How many?" and list(turn["answers"]) == ["seed0/grpo", "seed1/grpo"]
    assert all(tokens for tokens in turn["answers"].values())
    tables = [one.value for one in test.dataframe]
    assert len(tables) == 2 and all("%" in table["likeliest"][0] for table in tables)
    before = turn["answers"]["seed0/grpo"]
    test.button(key="new").click()
    run(test)
    test.chat_input[0].set_value("Tom has 4 apples. How many?")
    run(test)
    assert test.session_state["turns"][0]["answers"]["seed0/grpo"] == before


def test_chat_keeps_its_settings_and_says_what_the_colours_mean(root, monkeypatch):
    monkeypatch.setenv("ALIGNBOOK_RUNS", str(root))
    real = st.get_option
    monkeypatch.setattr(st, "get_option", lambda name: "127.0.0.1" if name == "server.address" else real(name))
    test = AppTest.from_file(str(ROOT / "ui" / "app.py"), default_timeout=120).run()
    test.switch_page("panel/talk.py")
    run(test).slider(key="chat temperature").set_value(0.2)
    test.selectbox(key="one").set_value("a/sft")
    run(test).switch_page("panel/card.py")
    run(test).switch_page("panel/talk.py")
    assert run(test).slider(key="chat temperature").value == 0.2 and test.selectbox(key="one").value == "a/sft"
    test.chat_input[0].set_value("Tom has 4 apples. How many?")
    run(test)
    assert any("Hover a token" in element.proto.body for element in test.get("html"))


def test_chat_tells_a_run_that_has_not_saved_from_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNBOOK_RUNS", str(tmp_path))
    (tmp_path / "arith" / "pretrain").mkdir(parents=True)
    (tmp_path / "arith" / "pretrain" / "config.json").write_text("{}")
    test = AppTest.from_file(str(ROOT / "ui" / "panel" / "talk.py"), default_timeout=120).run()
    assert not test.exception and "No run can answer yet" in test.info[0].value


def test_a_damaged_checkpoint_cannot_talk_and_says_so(root, page):
    test = page("talk")
    (root / "seed0" / "grpo" / "ckpt.pt").write_bytes((root / "a" / "sft" / "ckpt.pt").read_bytes()[:500])
    test.selectbox(key="one").set_value("seed0/grpo")
    test.run()
    assert not test.exception and (test.error or test.info or test.selectbox(key="one").value != "seed0/grpo")


def test_the_card_of_a_quick_look_says_that_its_figures_mean_nothing(root, page):
    (root / "a" / "report.md").write_text("# Report card\n\n--quick: next to no training. It shows ...\n")
    assert "mean nothing" in page("card").info[0].value


def test_the_card_has_its_intervals_and_every_question_its_answers(page):
    test = page("card")
    (spec,) = charts(test)
    assert spec["layer"][1]["encoding"]["x"]["field"] == "figure"
    assert spec["layer"][1]["encoding"]["x"]["scale"]["domain"] == [0, pytest.approx(0.66)]
    frame = test.dataframe[0].value
    assert list(frame.columns) == ["stage", "accuracy", "95 % interval", "pass@1", "n"]
    assert frame["accuracy"][0] == 0.5 and frame["95 % interval"][0] == "0.400 to 0.600"
    assert "sampled answers" in test.dataframe[0].proto.columns and not test.info
    test.number_input[0].set_value(8)
    test.toggle(key="answer").set_value(True)
    run(test)
    frame = next(one.value for one in test.dataframe if "question" in one.value.columns)
    assert len(frame) == 8 and len(frame.columns) >= 2 and set(frame[frame.columns[1]]) <= {"✓", "✗"}
    assert any("✗ wrong" in caption.value.replace("\\", "") for caption in test.caption)


# ----------------------------------------------------------------------------------------------------------------------
# The panel as a whole


def test_the_panel_answers_to_this_machine_alone(root, monkeypatch):
    monkeypatch.setenv("ALIGNBOOK_RUNS", str(root))
    real = st.get_option
    for address, refused in (("0.0.0.0", True), (None, True), ("127.0.0.1", False)):
        monkeypatch.setattr(st, "get_option", lambda name, a=address: a if name == "server.address" else real(name))
        test = AppTest.from_file(str(ROOT / "ui" / "app.py"), default_timeout=120).run()
        assert not test.exception and bool(test.error) == refused and bool(test.dataframe) != refused


def test_its_configuration_says_so_too():
    text = (ROOT / "ui" / ".streamlit" / "config.toml").read_text()
    assert 'address = "127.0.0.1"' in text and "gatherUsageStats = false" in text


def test_texts_are_escaped_for_markdown():
    assert shared.plain(EVIL) == (
        "\\<img src\\=x onerror\\=alert\\(1\\)\\> \\*\\*bold\\*\\* \\:red\\[red\\] \\$x\\$ "
        "\\[a\\]\\(http\u200b\\:x\\) \\`"
    )
    assert "\u202e" not in shared.one_line("a\u202eb") and shared.one_line("a\nb") == "a⏎b"


def test_the_core_imports_nothing_of_the_panel():
    for path in (*ROOT.glob("*.py"), *(ROOT / "runtime").glob("*.py"), *(ROOT / "studies").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "import streamlit" not in text and "from ui" not in text and "import ui" not in text, path


def test_a_name_is_no_link():
    for name in ("www.evil.example", "https://evil.example", "mailto:a", "a@evil.example"):
        assert "\u200b" in shared.plain(name)
