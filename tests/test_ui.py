"""What stands behind the control panel, without a browser and without Streamlit: the folder of runs, the queue, the
forms, the page of rollouts, the answers."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_pretrain, tiny_sft

import chat
import evaluate
import pretrain
import sft
from runtime import rollouts
from runtime.checkpoint import write_text
from runtime.config import parse
from runtime.errors import UserError, run_main
from runtime.lock import is_held
from ui import forms, jobs, report, talk
from ui import rollouts as page
from ui.folder import Runs, Series, inside, rows_of, tail, thinned
from ui.jobs import FAILED, FINISHED, RUNNING, STOPPED, STOPPING, WAITING, Queue, born, checked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("panel")
    pretrain.main(tiny_pretrain(root / "a" / "pretrain", max_documents=60, vocab_size=270))
    sft.main(tiny_sft(root / "a" / "sft", root / "a" / "pretrain"))
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def test_runs_are_found_with_their_state_and_figures(root):
    runs = {run.name: run for run in Runs(root).all()}
    assert list(runs) == ["a/pretrain", "a/sft"]
    one, two = runs.values()
    assert (one.stage, one.state, one.step, one.steps, one.progress) == ("pretrain", "finished", 6, 6, 1.0)
    assert "validation loss" in one.best_in_words() and one.seed == 0 and one.problem == ""
    assert two.stage == "sft" and [parent["stage"] for parent in two.lineage] == ["pretrain"]


@contextlib.contextmanager
def held_elsewhere(folder):
    """Another process works in the folder."""
    code = "import pathlib, sys, runtime.lock as l; l.hold(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    child.stdout.readline()
    yield
    child.kill()
    child.wait()


def test_a_run_that_another_process_killed_is_stopped(root):
    runs = Runs(root)
    with held_elsewhere(root / "a" / "sft"):
        assert runs.look("a/sft").state == "running"
    assert runs.look("a/sft").state == "finished"  # as its checkpoint says


def test_what_is_damaged_is_a_sentence_and_the_others_are_shown(root):
    good = root / "a" / "pretrain"
    for name in ("cut", "bare", "odd", "evil", "no rights"):
        shutil.copytree(good, root / name)
    (root / "cut" / "ckpt.pt").write_bytes((good / "ckpt.pt").read_bytes()[:1000])
    (root / "bare" / "config.json").unlink()
    (root / "odd" / "config.json").write_text("[1, 2")
    (root / "odd" / "metrics.jsonl").write_text('[1, 2]\n{"step":')
    torch.save({"x": Path("/")}, root / "evil" / "ckpt.pt")  # more than weights_only admits
    (root / "no rights" / "metrics.jsonl").chmod(0)
    runs = {run.name: run for run in Runs(root).all()}
    assert "damaged or not a checkpoint" in runs["cut"].problem and runs["cut"].state == "damaged"
    assert "config.json is missing" in runs["bare"].problem and "config.json is damaged" in runs["odd"].problem
    assert "could run code" in runs["evil"].problem
    if os.geteuid():
        assert "Permission denied" in runs["no rights"].problem
    assert runs["a/pretrain"].problem == "" and len(runs) == 7
    assert not any("\n" in run.problem or str(root) in run.problem for run in runs.values())


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "time": 3}\n{"step": 2, "lo')
    series = Series(path).refresh()
    assert series.curves == {"loss": ([1], [2.0])} and series.seconds == 3
    with open(path, "a") as file:
        file.write('ss": 1.5}\n{"step": 3, "loss": null, "odd": NaN, "text": "x"}\n')
    assert series.refresh().curves == {"loss": ([1, 2], [2.0, 1.5])} and series.rows == 3
    path.unlink()
    path.write_text('{"step": 1, "loss": 9.0}\n')  # a run went on from a checkpoint, or another began
    assert series.refresh().curves == {"loss": ([1], [9.0])}
    path.unlink()
    assert series.refresh().curves == {}


def test_damaged_rows_among_good_ones_are_left_out():
    assert rows_of(b'{"step": 1}\nnonsense\n[1]\n{"step": true}\n{"step": 2}\n') == [{"step": 1}, {"step": 2}]


def test_many_points_are_thinned_and_the_last_one_stays():
    steps, values = thinned(range(100_000), [float(i) for i in range(100_000)])
    assert len(steps) <= 240 and steps[-1] == 99_999 and values[-1] == 99_999.0
    assert all(abs(a - b) < 1e-6 for a, b in zip(steps, values))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "link/x", "link", "\0"])
def test_nothing_outside_the_folder_has_a_path(tmp_path, path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError):
        inside(tmp_path / "out", path)
    assert inside(tmp_path / "out", "a/b") == tmp_path / "out" / "a" / "b"


def test_links_are_not_followed(root, tmp_path):
    secret = tmp_path / "secret"
    shutil.copytree(root / "a" / "pretrain", secret)
    (root / "linked").symlink_to(secret)
    for name in ("metrics.jsonl", "config.json", "ckpt.pt", "samples.txt"):
        folder = root / f"with {name}"
        shutil.copytree(root / "a" / "pretrain", folder)
        (folder / name).unlink()
        (folder / name).symlink_to(secret / name)
    runs = {run.name: run for run in Runs(root).all()}
    assert "linked" not in runs
    assert runs["with metrics.jsonl"].best is None and "link" in runs["with config.json"].problem
    assert "link" in runs["with ckpt.pt"].problem and runs["with ckpt.pt"].saved == 0
    assert tail(root / "with samples.txt" / "samples.txt", 100) == ""


def test_with_many_runs_a_look_does_not_wait_for_all_of_them(root):
    for i in range(30):
        shutil.copytree(root / "a" / "pretrain", root / f"seed{i}")
    runs = Runs(root)
    first = runs.all(seconds=0.0)
    assert len(first) == 32 and sum(run.state == "unread" for run in first) >= 30
    runs._reader.join()
    assert not any(run.state == "unread" for run in runs.all(seconds=0.0))
    assert [run.name for run in first][2:5] == ["seed0", "seed1", "seed2"]  # and seed10 comes after seed9


# ----------------------------------------------------------------------------------------------------------------------
# The queue


def until(queue: Queue, number: int, *states: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = next(job for job in queue.jobs() if job.number == number)
        if job.state in states:
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job}\n{queue.log(number)}")


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """A repository whose stages are small: they say their words, wait for a file or for Ctrl-C, and end."""
    here = tmp_path / "repository"
    here.mkdir()
    (here / "grpo.py").write_text(
        "import json, os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell starts with &
        "print(json.dumps([sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.getpid()]), flush=True)\n"
        "try:\n"
        "    while '--wait' in sys.argv and not pathlib.Path(sys.argv[-1]).exists(): time.sleep(0.02)\n"
        "except KeyboardInterrupt:\n"
        "    print('saved'), sys.exit(130)\n"
        "if '--fail' in sys.argv: print('error: no such thing'); sys.exit(1)\n"
    )
    monkeypatch.setattr(jobs, "ROOT", here)
    return here


def test_the_status_line_has_no_bars_and_names_the_stage():
    said = jobs.spoken("\nstage 2 of 3: SFT, about 1 min left\n2/3 SFT:  37%|###  | 3/8\ngreedy:   0%|   | 0/1\n")
    assert said == ["stage 2 of 3: SFT, about 1 min left"] and jobs.stage_in(said) == "stage 2 of 3"
    assert jobs.stage_in(["sft done"]) == "" and jobs.spoken("talk to it: python chat.py x") == []
    done = "out/a is finished (6 steps); --fresh would start again"
    assert jobs.had_nothing_to_do("sft.py", [done]) and not jobs.had_nothing_to_do("pipeline.py", [done])


def test_a_job_gets_its_words_as_they_are(stages, tmp_path):
    root = tmp_path / "out"
    queue, words = Queue(root), ["--a", "$(touch x); `ls` 'q\" \\", "--b=--fresh", "ü\n*"]
    job = queue.add("grpo.py", words, "one")
    assert until(queue, job.number, FINISHED).told
    said = json.loads(queue.log(job.number).splitlines()[0])
    assert said[0] == words and not (stages / "x").exists()
    assert Queue(root).jobs()[0].words == words  # and another panel knows of it


def test_the_queue_knows_how_many_may_run_and_who_waits_for_whom(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "cores", lambda: 2)
    queue, go = Queue(tmp_path / "out"), tmp_path / "go"
    assert queue.at_once == 2
    first = queue.add("grpo.py", ["--wait", str(go)], "task/sft")
    second = queue.add("grpo.py", ["--wait", str(go)], "task/grpo", needs=["task/sft"])
    third = queue.add("grpo.py", ["--wait", str(go)], "b")
    fourth = queue.add("grpo.py", ["--wait", str(go)], "c")
    states = {job.folder: (job.state, job.told) for job in queue.jobs()}
    assert states["task/sft"][0] == states["b"][0] == RUNNING
    assert states["task/grpo"] == (WAITING, "waits for task/sft") and states["c"] == (WAITING, "waits for its turn")
    go.touch()
    for job in (first, second, third, fourth):
        until(queue, job.number, FINISHED)
    assert json.loads(queue.log(first.number).splitlines()[0])[1] == "1"  # two at once on two cores: one thread each
    queue.at_once = 1
    alone = queue.add("grpo.py", [], "d")
    until(queue, alone.number, FINISHED)
    assert json.loads(queue.log(alone.number).splitlines()[0])[1] == "2"


def test_stop_is_ctrl_c_and_go_on_is_the_same_command(stages, tmp_path):
    queue = Queue(tmp_path / "out")
    job = queue.add("grpo.py", ["--fresh", "--wait", str(tmp_path / "never")], "one")
    until(queue, job.number, RUNNING)
    while not queue.log(job.number):
        time.sleep(0.02)
    queue.stop(job.number)
    done = until(queue, job.number, STOPPED)
    assert "saved" in queue.log(job.number) and done.words[0] == "--fresh"
    again = queue.go_on(job.number)
    assert again.words == ["--wait", str(tmp_path / "never")] and again.folder == "one"
    until(queue, again.number, RUNNING)
    with pytest.raises(UserError, match="already in the queue"):
        queue.add("grpo.py", [], "one")
    while not queue.log(again.number):
        time.sleep(0.02)
    os.kill(next(one for one in queue.jobs() if one.number == again.number).pid, signal.SIGKILL)  # behind its back
    assert "killed by signal 9" in until(queue, again.number, FAILED).told
    failed = queue.add("grpo.py", ["--fail"], "one")
    assert until(queue, failed.number, FAILED).told == "no such thing"
    queue.forget(failed.number)
    assert failed.number not in [one.number for one in queue.jobs()]


def test_a_job_outlives_the_panel(stages, tmp_path):
    queue, go = Queue(tmp_path / "out"), tmp_path / "go"
    job = queue.add("grpo.py", ["--wait", str(go)], "one")
    running = until(queue, job.number, RUNNING)
    other = Queue(tmp_path / "out")  # a panel that is started anew
    assert other.jobs()[0].state == RUNNING and born(running.pid) == running.born != ""
    while not queue.log(job.number):
        time.sleep(0.02)
    other.stop(job.number)
    assert until(other, job.number, STOPPED, STOPPING)
    queue._children[job.number].wait(60)
    assert until(other, job.number, STOPPED).state == STOPPED
    assert born(running.pid) == "" and born(0) == "" and born(1) == ""


def test_another_process_with_the_number_of_a_job_is_left_alone(stages, tmp_path):
    queue = Queue(tmp_path / "out")
    job = queue.add("grpo.py", [], "one")
    until(queue, job.number, FINISHED)
    innocent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    queue._jobs[job.number].state, queue._jobs[job.number].pid = RUNNING, innocent.pid
    queue.stop(job.number)
    time.sleep(0.2)
    assert innocent.poll() is None
    innocent.communicate(b"\n")


@pytest.mark.parametrize("folder", ["../x", "/elsewhere", "", ".", ".panel", ".panel/x", "a/.panel"])
def test_a_job_writes_nowhere_else(stages, tmp_path, folder):
    with pytest.raises(UserError):
        Queue(tmp_path / "out").add("grpo.py", [], folder)


def on_disk(root, **changes) -> None:
    """A job as a stranger may have left it in the folder of runs."""
    values = {"number": 1, "script": "grpo.py", "words": [], "folder": "one", "state": "waiting", "added": 1.0}
    (root / ".panel").mkdir(parents=True, exist_ok=True)
    (root / ".panel" / "00001.json").write_text(json.dumps(values | changes))


def test_nothing_that_was_read_starts_by_itself(stages, tmp_path):
    on_disk(tmp_path / "out", words=["--wait", str(tmp_path / "never")])
    queue = Queue(tmp_path / "out")
    queue.tick()
    assert [job.state for job in queue.jobs()] == [STOPPED] and not queue._children
    for changes in ({"script": "evil.py"}, {"folder": "../../etc"}, {"needs": ["/etc"]}):
        on_disk(tmp_path / "out", **changes)
        assert Queue(tmp_path / "out").jobs() == []


@pytest.mark.parametrize(
    "script, words",
    [
        ("grpo.py", ["{out}/evil.py", "--print_config"]),
        ("grpo.py", ["--print_config"]),
        ("grpo.py", ["--reward", "{out}/evil.py"]),
        ("grpo.py", ["--out_dir", "{elsewhere}"]),
        ("grpo.py", ["--data", "{elsewhere}/passwd.jsonl"]),
        ("grpo.py", ["--data_dir", "{elsewhere}"]),
        ("reward.py", ["--encoder", "{elsewhere}"]),
        ("ppo.py", ["--reward", "{elsewhere}/judge"]),
        ("pipeline.py", ["--out", "{elsewhere}"]),
        ("sft.py", ["--init_from", "../secret"]),
    ],
    ids=str,
)
def test_what_was_read_may_only_train_in_the_folder_of_runs(script, words, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    words = [word.format(out=out, elsewhere=elsewhere) for word in words]
    out.mkdir()
    (out / "evil.py").write_text("raise SystemExit('it ran')")
    on_disk(out, script=script, words=words, state="stopped")
    with pytest.raises(UserError):
        Queue(out).go_on(1)
    kept = [word.replace(str(elsewhere), str(out / "x")).replace("../secret", str(out / "x")) for word in words]
    if not any(word.endswith(".py") or word == "--print_config" for word in kept):
        forms.check_words(out, script, kept)  # the same, inside


def test_a_second_panel_only_looks(stages, tmp_path):
    (tmp_path / "out" / ".panel").mkdir(parents=True)
    with held_elsewhere(tmp_path / "out" / ".panel"):
        with pytest.raises(UserError, match="another panel looks after"):
            Queue(tmp_path / "out").add("grpo.py", [], "one")
    queue = Queue(tmp_path / "out")
    until(queue, queue.add("grpo.py", [], "one").number, FINISHED)


def test_a_full_disk_starts_nothing_and_nothing_twice(stages, tmp_path, monkeypatch):
    queue = Queue(tmp_path / "out", at_once=1)

    def full(path, text):
        raise UserError("no space left on the disk")

    monkeypatch.setattr(jobs, "write_text", full)
    with pytest.raises(UserError, match="no space left"):
        queue.add("grpo.py", [], "one")
    assert queue.jobs() == [] and not queue._children
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "ROOT", stages)
    written = []

    def once(path, text):
        written.append(json.loads(text)["state"])
        return full(path, text) if len(written) > 2 else write_text(path, text)

    monkeypatch.setattr(jobs, "write_text", once)
    job = queue.add("grpo.py", ["--wait", str(tmp_path / "never")], "one")
    assert written == ["waiting", "running", "running"] and queue.jobs()[0].state == RUNNING
    assert json.loads((tmp_path / "out" / ".panel" / "00001.json").read_text())["state"] == "running"
    monkeypatch.undo()
    while not queue.log(job.number):  # it must have begun to listen
        time.sleep(0.02)
    queue.stop(job.number)
    until(queue, job.number, STOPPED)


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert not is_held(tmp_path)


@pytest.mark.parametrize("script", ["../grpo.py", "/bin/sh", "stage", "no.py", "-c.py", "a b.py"])
def test_a_job_is_a_stage_of_the_book(stages, tmp_path, script):
    with pytest.raises(UserError, match="is no stage"):
        Queue(tmp_path / "out").add(script, [], "one")


def test_what_a_job_prints_goes_through_no_link(stages, tmp_path):
    home, secret = tmp_path / "out" / ".panel", tmp_path / "secret"
    home.mkdir(parents=True)
    secret.write_text("mine")
    (home / "00001.log").symlink_to(secret)
    queue = Queue(tmp_path / "out")
    job = queue.add("grpo.py", [], "one")
    assert "could not be started" in until(queue, job.number, FAILED).told and secret.read_text() == "mine"
    assert queue.log(job.number) == ""
    shutil.rmtree(home)
    home.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        Queue(tmp_path / "out").add("grpo.py", [], "two")


def test_a_queue_that_someone_else_wrote_starts_nothing_strange(stages, tmp_path):
    home = tmp_path / "out" / ".panel"
    home.mkdir(parents=True)
    good = {"number": 1, "script": "grpo.py", "words": [], "folder": "one", "state": "waiting"}
    bad = [
        good | {"script": "../../bin/sh"}, good | {"words": "x"}, good | {"words": [1]}, good | {"state": "x"},
        good | {"more": 1}, [good], good | {"number": True}, good | {"words": ["a\0b"]}, good | {"number": 90},
    ]  # fmt: skip
    for i, one in enumerate(bad, start=1):
        values = one | {"number": i} if isinstance(one, dict) and one["number"] is good["number"] else one
        (home / f"{i:05d}.json").write_text(json.dumps(values))
    (home / "00099.json").write_text('{"number": 99, "scr')
    assert Queue(tmp_path / "out").jobs() == [] and checked(good) is not None


@pytest.mark.slow
def test_the_real_stage_stops_and_goes_on_through_the_queue(tmp_path):
    queue = Queue(tmp_path / "out")
    words = ["--out_dir", str(tmp_path / "out" / "one"), "--steps", "40", "--d_model", "32", "--n_layers", "1"]
    words += ["--n_heads", "2", "--n_kv_heads", "1", "--seq_len", "64", "--batch_size", "4", "--max_documents", "60"]
    words += ["--vocab_size", "270", "--eval_every", "100", "--log_every", "1", "--device", "cpu", "--compile", "off"]
    job, runs = queue.add("pretrain.py", words, "one"), Runs(tmp_path / "out")
    end = time.monotonic() + 240
    while time.monotonic() < end and runs.look("one").step < 2 if (tmp_path / "out" / "one").exists() else True:
        assert queue.jobs()[0].state in (WAITING, RUNNING), queue.log(job.number)
        time.sleep(0.05)
    queue.stop(job.number)
    assert until(queue, job.number, STOPPED, FINISHED).state == STOPPED, queue.log(job.number)
    run = runs.look("one")
    assert run.state == "stopped" and 2 <= run.saved < 40
    again = queue.go_on(job.number)
    until(queue, again.number, FINISHED)
    assert runs.look("one").state == "finished"
    assert f"continuing {tmp_path / 'out' / 'one'} at step {run.saved}" in queue.log(again.number)


# ----------------------------------------------------------------------------------------------------------------------
# The forms


@pytest.mark.parametrize("stage", forms.STAGES)
def test_every_stage_has_a_form_that_means_its_defaults(stage):
    groups = forms.groups(stage)
    fields = {field.name: field for _, part in groups.values() for field in part}
    assert all(len(field.text) > 4 for field in fields.values())
    values = {name: forms.value_of(field, forms.shown(field.default)) if field.kind not in ("switch", "choice")
              else field.default for name, field in fields.items()}  # fmt: skip
    assert forms.words_of(stage, "", values) == []
    assert not set(fields) & {"out_dir", "init_from", "fresh"}


@pytest.mark.parametrize("stage", ["grpo", "pretrain", "sft", "ppo", "dpo", "encoder"])
def test_every_preset_fills_its_form(stage):
    assert forms.presets(stage)
    for path in forms.presets(stage):
        start = forms.start_values(stage, path)
        values = {name: value for name, value in start.items() if name not in forms.UNSHOWN}
        assert forms.words_of(stage, path, values) == [path]


def test_the_form_knows_types_bounds_and_choices():
    fields = {field.name: field for _, part in forms.groups("grpo").values() for field in part}
    assert fields["group_size"].kind == "whole" and fields["group_size"].bounds == "at least 2"
    assert fields["scale"].choices == ("group", "batch", "none") and fields["mask_truncated"].kind == "switch"
    assert fields["n_prompts"].optional and fields["reward_weights"].kind == "list" and fields["lr"].kind == "number"
    assert list(forms.groups("grpo"))[0] == "grpo.py"


CHANGES = [
    {"lr": 1e-5, "steps": 7, "mask_truncated": True}, {"n_prompts": 12, "beta": 0.1, "kl": "k2"},
    {"correct_weight": -1.0}, {"data": "--help"}, {"data": "-1"}, {"data": "a b; rm -rf /"}, {"data": "é\u202e<b>"},
    {"columns": ("answer=final", "prompt=q")}, {"loss_type": "dr_grpo", "scale": "none"}, {"data": "--fresh"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_words_mean_what_the_form_says(changes):
    import grpo

    start = forms.start_values("grpo")
    values = {name: value for name, value in start.items() if name not in forms.UNSHOWN} | changes
    words = forms.words_of("grpo", "", values)
    config = parse(grpo.Config, words)
    assert all(getattr(config, name) == value for name, value in changes.items())
    assert not config.fresh and words


REFUSED = [
    ({"group_size": 1}, "at least 2"), ({"beta": 0.1, "kl": "k1"}, "expected gradient of zero"),
    ({"columns": ("--fresh",)}, "cannot be given"), ({"temperature": 0.0}, "above 0"), ({"steps": 0}, "at least 1"),
    ({"correct_weight": 0.0, "format_weight": 0.0}, "nothing to learn"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=str)
def test_what_cannot_work_is_said_before_anything_starts(changes, said):
    values = {name: value for name, value in forms.start_values("grpo").items() if name not in forms.UNSHOWN}
    with pytest.raises(UserError, match=said):
        forms.words_of("grpo", "", values | changes)


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e400", "nan", "--1"])
def test_what_is_no_number_is_said(text):
    fields = {field.name: field for _, part in forms.groups("grpo").values() for field in part}
    with pytest.raises(UserError):
        forms.value_of(fields["steps"], text)
    assert forms.value_of(fields["n_prompts"], "") is None


def test_the_rewards_of_a_user_do_not_run_in_the_panel(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('it ran')\ndef good(prompt, answer): return 1.0\n")
    values = {name: value for name, value in forms.start_values("grpo").items() if name not in forms.UNSHOWN}
    assert str(file) in forms.words_of("grpo", "", values | {"reward": str(file)})


def test_differences_are_named(root):
    config = json.loads((root / "a" / "sft" / "config.json").read_text())
    found = {name: (mine, other) for name, mine, other in forms.differences("sft", config)}
    assert found["n_examples"][0] == "24" and "lr" not in found
    assert forms.differences("sft", config, config) == []


# ----------------------------------------------------------------------------------------------------------------------
# The page of rollouts


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 {title}"


def record(text: str = EVIL, step: int = 3) -> dict:
    answer = {
        "ids": [1, 2], "texts": [text, "b"], "mask": [1, 1], "now": [-0.5, -1.0], "old": [-0.4, -1.0],
        "reward": 1.0, "rewards": {text: 1.0}, "advantage": 0.5, "label": text, "finished": True,
    }  # fmt: skip
    group = {"question": text, "gold": text, "part": text, "prompt": [[5], [text]], "answers": [answer, answer]}
    return rollouts.checked({"step": step, "stage": text, "kind": "groups", "clip": [0.8, 1.2], "weights": {text: 1.0},
                             "groups": [group]})  # fmt: skip


def test_no_text_becomes_markup():
    text = page.page_of([record()], EVIL, EVIL)
    body = text.partition("</style>")[2].replace((ROOT / "ui" / "rollouts.js").read_text(), "")
    assert "<script>alert" not in body and "onerror" not in re.sub(
        r'<script type="application/json".*?</script>', "", body.replace("&lt;img src=x onerror", ""), flags=re.S
    )
    assert text.count("</script>") == 2 and text.count("<script") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["records"][0]["groups"][0]["question"] == EVIL  # and it is all there


def test_the_page_asks_nobody_and_runs_only_its_own_script():
    text = page.page_of([record("plain")], "run")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r'(src|href)="(?!data:,)', text) and "@import" not in text and "url(" not in text
    assert "innerHTML" not in text and "outerHTML" not in text and "document.write" not in text and "eval(" not in text
    assert f"'{page._hash((ROOT / 'ui' / 'rollouts.js').read_text())}'" in policy


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    lines = "".join(json.dumps(record("plain", step)) + "\n" for step in (1, 5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts.jsonl").write_text(lines + '{"step": 9, "kind"')
    monkeypatch.setattr(sys, "argv", ["ui/rollouts.py", str(tmp_path / "run"), "--write", str(tmp_path / "p.html")])
    page.main()
    assert "2 steps" in capsys.readouterr().out and "<title>" in (tmp_path / "p.html").read_text()
    for words, said in (([str(tmp_path)], "holds no rollouts.jsonl"), ([str(tmp_path / "no")], "there is no run")):
        monkeypatch.setattr(sys, "argv", ["ui/rollouts.py", *words])
        with pytest.raises(SystemExit):
            run_main(page.main)
        assert said in capsys.readouterr().err


def test_an_unknown_run_is_answered_with_those_nearby(tmp_path):
    for name in ("arith_quick/grpo", "arith_quick/sft", "other/dpo"):
        (tmp_path / name).mkdir(parents=True)
        if "sft" not in name:
            (tmp_path / name / "rollouts.jsonl").write_text("")
    with pytest.raises(UserError) as told:
        page.find(str(tmp_path / "arith" / "grpo"))
    said = str(told.value)
    assert "there is no run" in said and said.endswith(f"{tmp_path}/arith_quick/grpo, {tmp_path}/other/dpo")
    with pytest.raises(UserError, match="arith_quick/grpo$"):
        page.find(str(tmp_path / "arith_quick" / "sft"))


def test_help_offers_its_own_words_alone():
    done = subprocess.run([sys.executable, "ui/rollouts.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "[RUN] [--write PAGE]" in done.stdout and "PRESET" not in done.stdout


def test_the_script_runs_as_a_file(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(record("plain")) + "\n")
    done = subprocess.run([sys.executable, "ui/rollouts.py", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rollouts.html").exists()


def test_a_large_file_gives_a_page_of_some_steps(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(record("plain", step)) + "\n" for step in range(1, 60)))
    records, known, damaged = page.load(path, most=10 * len(json.dumps(record("plain"))))
    assert known == 59 and damaged == 0 and 5 <= len(records) <= 10 and records[-1]["step"] == 59
    assert page.note_of(len(records), known, 0) == f"{len(records)} of 59 steps that were written down"


# ----------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "top_k": 20, "top_p": 0.9}], ids=str
)
def test_the_panel_answers_as_chat_does(root, capsys, settings):
    loaded = talk.load(root / "a" / "sft")
    question = "Tom has 4 apples and finds 3 more. How many apples does Tom have?"
    config = chat.Config(str(root / "a" / "sft"), prompt=question, max_new_tokens=20, **settings)
    tokens = list(talk.answer(loaded, [{"role": "user", "content": question}], config))
    chat.talk(config)
    assert "".join(token.text for token in tokens).strip() == capsys.readouterr().out.strip()
    for token in tokens:
        assert (
            list(token.others) == sorted(token.others, key=lambda pair: -pair[1]) and len(token.others) == talk.OTHERS
        )
        assert 0 < token.probability <= 1
    if settings["temperature"] == 0:
        assert all(token.probability == pytest.approx(token.others[0][1]) for token in tokens)


def test_an_answer_is_shown_as_text():
    token = talk.Token(EVIL, 0.5, ((EVIL, 0.5), ('"><b>', 0.1)))
    text = talk.as_html([token])
    assert "<script" not in text and "<img" not in text and "<b>" not in text and text.count("<span") == 1


def test_a_model_that_cannot_write_is_refused(root):
    with pytest.raises(UserError):
        talk.load(root / "nothing")
    (root / "a" / "sft" / "ckpt.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        talk.load(root / "a" / "sft")


def test_every_column_of_a_report_card_is_explained():
    written = [row for path in (ROOT / "docs" / "reports").glob("*.json") for row in json.loads(path.read_text())]
    names = {name for row in written for name in row} - (report.HIDDEN - {"accuracy"})
    assert len(names) > 8
    for name in [*names, "95 % interval", "n", *evaluate.COLUMNS, "maj@4", "perplexity"]:
        assert report.explained(report.heading(name)), name
    assert report.explained("of nobody") is None


def test_report_cards_are_read_and_questions_answered(root):
    rows = [{"stage": "SFT", "path": "x", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 128, "pass@1": 0.4, "step": 3}]
    (root / "a" / "report.json").write_text(json.dumps(rows))
    (root / "b").mkdir()
    (root / "b" / "report.json").write_text("{")
    (root / "c").mkdir()
    (root / "c" / "report.json").symlink_to(root / "a" / "report.json")
    assert report.reports(root) == ["a/report.json", "b/report.json"]
    (row,) = report.read(root, "a/report.json")
    assert (row.stage, row.figure, row.low, row.high, row.n, row.others) == ("SFT", 0.5, 0.4, 0.6, 128, {"pass@1": 0.4})
    for name in ("b/report.json", "../x"):
        with pytest.raises(UserError):
            report.read(root, name)
    asked = report.questions(6)
    *shares, (last, answers) = report.answers_of(root / "a" / "sft", asked, batch_size=4)
    assert last == 1.0 and len(answers.texts) == len(answers.right) == 6 and all(share < 1 for share, _ in shares)
