"""A run that was stopped, at whatever moment, ends where one that was never stopped ends: bit for bit."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MEASURED_BY_A_CLOCK, but_slow, rows_of, same, tiny_pretrain, tiny_sft

import grpo
import optim
import pretrain
import runtime.run
import sft
from runtime.checkpoint import load_checkpoint
from runtime.errors import UserError, run_main
from runtime.rollouts import NAME as ROLLOUTS
from runtime.run import Run, start
from transformer import ModelConfig, Transformer

STAGES = {"pretrain": pretrain, "sft": sft, "grpo": grpo}
STEPS, SAVE, EVAL = 9, 3, 5  # saves and examinations at different steps: every mixture of them is resumed from
SAVES = sum(step % SAVE == 0 or step % EVAL == 0 or step == STEPS for step in range(1, STEPS + 1))

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signal")


def settings(stage: str, folder: Path, starts: dict, **changes):
    changes = {"save_every": SAVE, "eval_every": EVAL} | changes
    if stage == "pretrain":
        small = {"steps": STEPS, "max_documents": 60, "vocab_size": 270, "eval_windows": 4}
        return tiny_pretrain(folder, **(small | changes))
    if stage == "sft":
        return tiny_sft(folder, starts["sft"], packing=False, **(changes | {"n_examples": 16, "epochs": 2.25}))
    small = {
        "out_dir": str(folder), "init_from": str(starts["grpo"]), "steps": STEPS, "prompts_per_step": 2,
        "group_size": 4, "n_prompts": 32, "eval_prompts": 4, "max_new_tokens": 8, "device": "cpu", "beta": 0.05,
        "epochs": 2, "minibatches": 2, "draws": 2, "lr": 2e-3,
    }  # fmt: skip
    return grpo.Config(**(small | changes))


def child(stage: str, config, pause: float, dies_in_save: int, dies_behind_save: int) -> None:
    """One start of the stage, as a process of its own. pause: seconds that each update takes longer, so that a signal
    meets the run and not its end; dies_in_save: which writing of a checkpoint ends half-way in kill -9;
    dies_behind_save: which one is its last deed."""
    torch.set_num_threads(1)
    module, real_update, real_save = STAGES[stage], optim.update, torch.save
    real_save_checkpoint = runtime.run.save_checkpoint
    saves = 0

    def update(*args, **more):
        time.sleep(pause)
        return real_update(*args, **more)

    def save(state, path):
        nonlocal saves
        saves += 1
        if saves == dies_in_save:
            whole = io.BytesIO()
            real_save(state, whole)
            Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(state, path)

    def save_checkpoint(*args):
        real_save_checkpoint(*args)
        if saves == dies_behind_save:
            os.kill(os.getpid(), signal.SIGKILL)

    def score(texts, golds, finished, verifier):  # a reward that an untrained policy earns now and then
        return torch.tensor([float(text.count("e")) for text in texts]), torch.zeros(len(texts))

    module.update, torch.save, grpo.score = update, save, score
    runtime.run.save_checkpoint = save_checkpoint
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run_main(lambda: module.main(config))


@pytest.fixture(scope="module")
def launch():
    """Starts ``child`` in a new process, which has the imports done already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo", "tiny", "test_resume", "torch._dynamo", "matplotlib.pyplot"])

    def start(stage, config, pause=0.0, dies_in_save=0, dies_behind_save=0):
        process = context.Process(target=child, args=(stage, config, pause, dies_in_save, dies_behind_save))
        with pytest.MonkeyPatch.context() as patch:  # the server that forks is started by the first process
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            patch.setenv("OMP_NUM_THREADS", "1")
            process.start()
        return process

    return start


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    pretrain.main(tiny_pretrain(folder / "base", steps=2, max_documents=60, vocab_size=270))
    return {"sft": folder / "base", "grpo": folder / "base"}


@pytest.fixture(scope="module")
def never_stopped(launch, starts, tmp_path_factory):
    """The folder of an undisturbed run of a stage, made once."""
    made: dict[str, Path] = {}

    def folder_of(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"whole_{stage}")
            process = launch(stage, settings(stage, made[stage], starts))
            process.join()
            assert process.exitcode == 0
        return made[stage]

    return folder_of


def wait_for_step(process, folder: Path, step: int, since: int) -> None:
    """Until this start of the run has trained ``step``: rows of an earlier one are cut back to the checkpoint's
    step."""
    while process.is_alive():
        trained = [row["step"] for row in rows_of(folder) if "grad_norm" in row]
        if trained and trained[-1] >= step and os.stat(folder / "metrics.jsonl").st_mtime_ns > since:
            return
        time.sleep(0.003)
    raise AssertionError(f"the run ended (status {process.exitcode}) before step {step}")


def assert_ended_as_if_never_stopped(folder: Path, whole: Path, saved_elsewhere: bool = False) -> None:
    ours, theirs = load_checkpoint(folder), load_checkpoint(whole)
    assert ours.pop("config").keys() == theirs.pop("config").keys()  # out_dir differs
    if saved_elsewhere:  # which checkpoint was the best depends on which there were
        ours.pop("best"), theirs.pop("best")
    same(ours, theirs)
    clean = [
        [{k: v for k, v in row.items() if k not in MEASURED_BY_A_CLOCK} for row in rows_of(f)] for f in (folder, whole)
    ]
    assert clean[0] == clean[1]  # every step once, in order, with the same figures
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(clean[0])  # and no broken line
    assert (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    written = [path.read_text() if path.exists() else "" for path in (folder / ROLLOUTS, whole / ROLLOUTS)]
    assert written[0] == written[1]
    trained = [row["step"] for row in clean[0] if "grad_norm" in row]
    assert trained == list(range(1, ours["step"] + 1)) and ours["finished"]


def kill_at(process, folder: Path, step: int, delay: float, since: int) -> None:
    wait_for_step(process, folder, step, since)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before the kill"


@pytest.mark.parametrize("stage", but_slow(STAGES, "grpo"))
def test_killed_again_and_again_a_run_ends_as_if_never_stopped(stage, launch, starts, never_stopped, tmp_path):
    rng = random.Random(f"kills {stage}")
    # before the first checkpoint; after it; right behind a checkpoint, so that it is killed before the next examination
    for step in (SAVE - 1, SAVE + 1, 2 * SAVE):
        since = time.time_ns()
        process = launch(stage, settings(stage, tmp_path, starts, log_every=1), pause=0.06)
        kill_at(process, tmp_path, step, rng.uniform(0, 0.06), since)
    process = launch(stage, settings(stage, tmp_path, starts))
    process.join()
    assert process.exitcode == 0
    assert_ended_as_if_never_stopped(tmp_path, never_stopped(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_while_a_checkpoint_is_written_costs_no_checkpoint(stage, launch, starts, never_stopped, tmp_path):
    process = launch(stage, settings(stage, tmp_path, starts), dies_in_save=2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load_checkpoint(tmp_path)["step"] == SAVE  # the first one: the second was being written
    process = launch(stage, settings(stage, tmp_path, starts))
    process.join()
    assert process.exitcode == 0
    assert_ended_as_if_never_stopped(tmp_path, never_stopped(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_behind_the_last_checkpoint_leaves_nothing_undone(stage, launch, starts, never_stopped, tmp_path):
    process = launch(stage, settings(stage, tmp_path, starts), dies_behind_save=SAVES)
    process.join()
    assert process.exitcode == -signal.SIGKILL and load_checkpoint(tmp_path)["finished"]
    process = launch(stage, settings(stage, tmp_path, starts))
    process.join()
    assert process.exitcode == 0 and (tmp_path / "curves.png").exists()
    assert_ended_as_if_never_stopped(tmp_path, never_stopped(stage))


@pytest.mark.parametrize("stage", but_slow(STAGES, "grpo"))
def test_ctrl_c_saves_and_the_same_command_continues(stage, launch, starts, never_stopped, tmp_path):
    for step in (2, 5):  # the second one meets a run that was continued
        since = time.time_ns()
        process = launch(stage, settings(stage, tmp_path, starts, save_every=100), pause=0.06)
        wait_for_step(process, tmp_path, step, since)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == 130
        state = load_checkpoint(tmp_path)
        assert step <= state["step"] < STEPS and not state["finished"]
        assert rows_of(tmp_path)[-1]["step"] == state["step"]
    process = launch(stage, settings(stage, tmp_path, starts))
    process.join()
    assert process.exitcode == 0
    assert_ended_as_if_never_stopped(tmp_path, never_stopped(stage), saved_elsewhere=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_returns_at_once_and_changes_nothing(stage, starts, never_stopped, monkeypatch):
    folder = never_stopped(stage)
    names = ("ckpt.pt", "best.pt", "metrics.jsonl", "samples.txt", "config.json")
    before = {name: (folder / name).read_bytes() for name in names}
    written = (folder / "ckpt.pt").stat().st_mtime_ns
    monkeypatch.setattr(STAGES[stage], "update", lambda *_: pytest.fail("it trains"))
    figures = STAGES[stage].main(settings(stage, folder, starts))
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert (folder / "ckpt.pt").stat().st_mtime_ns == written
    last = {k: v for row in rows_of(folder) for k, v in row.items()}
    if stage != "grpo":  # its figure rests on a reward that the child made up
        assert figures == {name: pytest.approx(last[name]) for name in figures}


@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(stage, damage, starts, tmp_path):
    whole = (starts["sft"] / "ckpt.pt").read_bytes()
    content = {"cut off": whole[: len(whole) // 2], "garbage": b"\x00\xff" * 500, "empty": b""}[damage]
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError) as error:
        STAGES[stage].main(settings(stage, tmp_path, starts))
    assert str(tmp_path / "ckpt.pt") in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "ckpt.pt").read_bytes() == content  # and nothing was written over it


def test_the_runs_of_these_tests_do_train(starts, never_stopped):
    """A policy that never moved would resume perfectly."""
    for stage in STAGES:
        state = load_checkpoint(never_stopped(stage))
        norms = [row["grad_norm"] for row in rows_of(never_stopped(stage)) if "grad_norm" in row]
        assert state["step"] == STEPS and all(norm > 0 for norm in norms)
        if stage != "pretrain":
            start = load_checkpoint(starts[stage])["model"]
            assert not any(torch.equal(start[name], state["model"][name]) for name in start if "proj" in name)


def test_a_folder_of_another_stage_is_not_continued(starts, never_stopped):
    config = replace(settings("sft", never_stopped("pretrain"), starts), fresh=False)
    with pytest.raises(UserError, match="holds a pretrain run"):
        sft.main(config)


def test_ctrl_c_in_the_middle_of_a_print_is_no_error(tmp_path, monkeypatch):
    """A stream that is being written cannot be entered again: the handler must not print."""

    class Signals(io.RawIOBase):
        sent = 0

        def writable(self):
            return True

        def write(self, data):
            if not self.sent:
                self.sent = 1
                os.kill(os.getpid(), signal.SIGINT)
            return len(data)

    run, save = run_that_saves(tmp_path)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps(0, 5):
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Signals())))
            run.print("a line of the run")
            monkeypatch.undo()
            done.append(step)
            if run.should_save(step, 5):
                save(step)
    assert done == [0]  # the step was finished


def run_that_saves(folder) -> tuple[Run, Callable]:
    """A run, and its save after a step, of a model without weights."""
    run = start(pretrain.Config(out_dir=str(folder), device="cpu"), "pretrain")
    model = types.SimpleNamespace(state_dict=dict, parameters=list, config=ModelConfig())
    return run, lambda step: run.save(step, 5, model, [], types.SimpleNamespace(state=dict))


def test_a_signal_behind_the_save_of_its_step_is_obeyed_after_the_next(tmp_path):
    """Nothing is lost: the run stops only when what it has done is on the disk."""
    run, save = run_that_saves(tmp_path)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps(0, 5):
            done.append(step)
            if run.should_save(step, 5):
                save(step)
            if step == 1:  # the question whether to save has just been answered
                os.kill(os.getpid(), signal.SIGINT)
    assert done == [0, 1, 2] and load_checkpoint(tmp_path)["step"] == 3


def test_a_figure_that_is_no_number_is_never_the_best(tmp_path):
    run = start(pretrain.Config(out_dir=str(tmp_path), device="cpu"), "pretrain")
    model, tokenizer = Transformer(ModelConfig(64, 16, 1, 2)), types.SimpleNamespace(state=dict)
    kept = []
    for step, metric in enumerate([float("nan"), 1.0, float("nan"), 2.0]):
        run.save(step, 9, model, [], tokenizer, metric=metric, lower_is_better=False)
        kept.append(load_checkpoint(tmp_path / "best.pt")["step"] if (tmp_path / "best.pt").exists() else None)
    assert kept == [None, 2, 2, 4] and run.best == 2.0
    run.evaluation(5, val_loss=float("nan"))
    with pytest.raises(UserError, match="the held-out loss is no number"):
        run.save(4, 9, model, [], tokenizer)
    assert load_checkpoint(tmp_path)["step"] == 4
