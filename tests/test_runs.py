"""The table of runs and their comparison."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_pretrain

import pretrain
from runtime import plots, runs
from runtime.checkpoint import load_checkpoint, need_checkpoint
from runtime.errors import UserError, run_main
from runtime.lock import is_held

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished run and one that was stopped after two of four steps."""
    root = tmp_path_factory.mktemp("out")
    settings = {"max_documents": 60, "vocab_size": 270, "eval_every": 2, "save_every": 2}
    pretrain.main(tiny_pretrain(root / "a" / "pretrain", steps=4, **settings))
    stop = tiny_pretrain(root / "b" / "pretrain", steps=4, **settings)
    with pytest.MonkeyPatch.context() as patch:
        evaluate = pretrain.Run.save

        def save_and_stop(self, *args, **more):
            evaluate(self, *args, **more)
            raise KeyboardInterrupt

        patch.setattr(pretrain.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(stop)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["runs", *map(str, arguments)])
        status = 0
        try:
            run_main(runs.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def line_of(text: str, folder) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{folder} ")]
    return line


def test_finished_and_stopped_runs_with_their_best_figure(root, command):
    status, out, _ = command(root)
    assert status == 0 and out.splitlines()[0].split() == [
        "folder",
        "stage",
        "started",
        "state",
        "best",
        "figure",
        "time",
    ]
    done = line_of(out, root / "a" / "pretrain")
    losses = runs.read_metrics(root / "a" / "pretrain" / "metrics.jsonl")["val_loss"][1]
    assert "pretrain  20" in done and "finished, 4 steps" in done and f"validation loss {min(losses):.3f}" in done
    assert "stopped at step 2 of 4" in line_of(out, root / "b" / "pretrain")
    assert load_checkpoint(root / "b" / "pretrain")["steps"] == 4


def test_a_run_that_goes_on_is_running_until_its_process_ends(root, command):
    folder = root / "b" / "pretrain"
    code = "import pathlib, sys, runtime.lock as l; l.hold(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    child.stdout.readline()
    assert "running, saved at step 2 of 4" in line_of(command(root)[1], folder)
    child.kill()
    child.wait()
    assert not is_held(folder) and "stopped at step 2 of 4" in line_of(command(root)[1], folder)


def test_a_run_marks_its_folder_only_while_it_runs(tmp_path, monkeypatch):
    seen = []
    real = pretrain.Run.save
    monkeypatch.setattr(
        pretrain.Run, "save", lambda self, *a, **k: seen.append(is_held(tmp_path)) or real(self, *a, **k)
    )
    pretrain.main(tiny_pretrain(tmp_path, steps=2, max_documents=60, vocab_size=270))
    assert set(seen) == {True} and not is_held(tmp_path)


def test_damaged_and_foreign_folders_are_rows(root, command):
    good = root / "a" / "pretrain"
    cut, bare, odd, foreign = (root / name for name in ("cut", "bare", "odd", "foreign"))
    for folder in (cut, bare, odd):
        shutil.copytree(good, folder)
    (cut / "ckpt.pt").write_bytes((good / "ckpt.pt").read_bytes()[:1000])
    (bare / "config.json").unlink()
    (odd / "metrics.jsonl").write_text('[1, 2]\n{"step":')
    foreign.mkdir()
    (foreign / "notes.txt").write_text("hello")
    status, out, err = command(root)
    assert status == 0 and err == "" and "Traceback" not in out
    assert "damaged" in line_of(out, cut) and "config.json is missing" in line_of(out, bare)
    assert "damaged" in line_of(out, odd) and "no run" in line_of(out, foreign)
    assert "finished" in line_of(out, good)


def test_a_folder_without_runs_is_one_line(tmp_path, command):
    for folder in (tmp_path, tmp_path / "nothing"):
        status, out, err = command(folder)
        assert (status, out, len(err.splitlines())) == (1, "", 1) and "pipeline.py" in err


def test_runs_are_compared_in_one_picture(root, command, monkeypatch):
    drawn = []
    monkeypatch.setattr(runs, "plot_compared", lambda *given: drawn.append(given) or plots.plot_compared(*given))
    status, out, err = command(root, "--compare", root / "a" / "pretrain", "b/pretrain")  # a path, or one below root
    assert status == 0 and out.strip() == str(root / "compared.png"), err
    assert (root / "compared.png").read_bytes()[:4] == b"\x89PNG"
    names, _, curves = drawn[0]
    assert list(names) == ["a/pretrain", "b/pretrain"] and curves == ["val_loss", "loss"]
    command(root, "--compare", "a/pretrain", "b/pretrain", "--curves", "grad_norm", "--write", root / "x.png")
    assert drawn[1][2] == ["grad_norm"] and (root / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", "a/pretrainn"], "is no run; did you mean .*a/pretrain"),
        (["--compare", "a/pretrain", "--curves", "val_los"], "no curve 'val_los'; did you mean val_loss"),
        (["--curves", "loss"], "--curves belongs to --compare"),
        (["--write", "x.png"], "--write belongs to --compare"),
    ],
)
def test_what_cannot_be_compared_is_one_line(root, command, arguments, words):
    status, out, err = command(root, *arguments)
    assert status == 1 and out == "" and len(err.splitlines()) == 1 and re.search(words, err), err


def test_a_missing_start_names_the_preset_that_makes_it(tmp_path, monkeypatch):
    """``configs/ppo_hack.py`` starts from the reward model of another preset, not from that of ``reward.py``."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"make it with: python reward.py configs/reward_weak.py$"):
        need_checkpoint("out/arith/reward_weak", "python reward.py")
    with pytest.raises(UserError, match=r"make it with: python reward.py$"):
        need_checkpoint("out/arith/no_such_reward", "python reward.py")


def test_the_time_is_that_of_the_last_row(root):
    rows = [json.loads(line) for line in (root / "a" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert runs.describe(root / "a" / "pretrain").seconds == rows[-1]["time"]
