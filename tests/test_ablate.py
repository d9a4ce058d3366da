import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import field, make_dataclass, replace
from pathlib import Path

import pytest
import torch
from test_grpo import start  # noqa: F401  (a fixture)

import ablate
import grpo
from ablate import Config, curve_mean, describe, distributions, measure, read_cells, steps_to, table
from data import encode_prompts
from rollout import sample_answers, score
from runtime.config import parse
from runtime.errors import UserError
from stages import load_stage
from texts import load_prompts
from transformer import Transformer

ROOT = Path(__file__).parent.parent
PAGES = [
    p for p in sorted((ROOT / "docs" / "experiments").glob("*.md")) if (ROOT / f"configs/ablate_{p.stem}.py").exists()
]
BASE = "steps=2 prompts_per_step=4 eval_every=1 eval_prompts=8 n_prompts=32"


def tiny(tmp_path, start, **changes) -> Config:  # noqa: F811
    settings = {
        "base": BASE, "init_from": str(start), "pretrained": str(start.parent / "pretrain"), "seeds": 2, "jobs": 1,
        "out": str(tmp_path / "study"), "questions": 16,
        "cells": ("size | 2 | group_size=2", "size | 4 | group_size=4", "scale | of the group | group_size=4"),
    }  # fmt: skip
    return Config(**(settings | changes))


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5, 0.7, 0.9, 0.9], 15.0), ([0.5, 1.0], 6.0), ([0.5, 0.7], None), ([0.8, 0.5, 0.9], 0), ([0, 1, 0.5, 1], 8.0)],
)
def test_steps_to_a_fixed_accuracy(values, expected):
    assert steps_to(list(range(0, 10 * len(values), 10)), values, 0.8) == pytest.approx(expected)


def test_the_mean_of_a_curve_does_not_depend_on_where_it_was_measured():
    """0.5 to 0.9 in 10 steps and 0.9 for 30 more: (0.7 · 10 + 0.9 · 30) / 40."""
    assert curve_mean([0, 10, 40], [0.5, 0.9, 0.9]) == pytest.approx(0.85)
    assert curve_mean([0, 10, 20, 30, 40], [0.5, 0.9, 0.9, 0.9, 0.9]) == pytest.approx(0.85)


def test_entropy_and_kl_of_whole_distributions(start):  # noqa: F811
    model, tokenizer, _ = load_stage(str(start))
    torch.manual_seed(1)
    other = Transformer(model.config)
    rollout = sample_answers(model, tokenizer, [[65, 66], [67]], 2, 8, 1.0, seed=0)
    with torch.no_grad():
        entropy, kl = distributions(model, other, rollout)
        same = distributions(model, model, rollout)[1]
    assert same.abs().max() < 1e-5 and (kl > 0).all()
    for i in range(4):
        h = d = 0.0
        for t in rollout.mask[i].nonzero().squeeze(1).tolist():
            with torch.no_grad():
                p, q = (m(rollout.tokens[i : i + 1, : t + 1])[0, -1].softmax(-1) for m in (model, other))
            h -= float((p * p.log()).sum())
            d += float((p * (p / q).log()).sum())
        assert float(entropy[i]) == pytest.approx(h, rel=1e-3) and float(kl[i]) == pytest.approx(d, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_cells_and_their_configurations():
    config = Config(base="steps=5 lr=1e-4", cells=("a | x | lr=1e-3 mask_truncated=True", "b | lr=1e-4", "b | plain |"))
    cells = read_cells(config)
    assert [(cell.part, cell.label) for cell in cells] == [("a", "x"), ("b", "lr=1e-4"), ("b", "plain")]
    assert cells[1].key == cells[2].key == "lr=1e-4 steps=5"  # one run for both
    made = ablate.stage_config(config, cells[0], 3)
    assert (made.steps, made.lr, made.mask_truncated, made.seed) == (5, 1e-3, True, 3)
    assert made.out_dir.endswith("seed3") and made.init_from == "out/arith/sft"
    off = ablate.stage_config(
        replace(config, cells=()), ablate.Cell("", "", (("activation_checkpointing", "False"),)), 0
    )
    assert off.activation_checkpointing is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cells": ()}, "no cells"),
        ({"cells": ("group_size=4",)}, "is not a cell"),
        ({"cells": ("a | b | c | d",)}, "is not a cell"),
        ({"cells": ("a | group_size",)}, "is not a setting"),
        ({"cells": ("a | groupsize=4",)}, "group_size"),
        ({"cells": ("a | group_size=x",)}, "group_size x"),
        ({"cells": ("a | start=weak",)}, "start=weak"),
        ({"cells": ("a | lr=1",), "starts": ("weak",)}, "is not a start"),
        ({"cells": ("a | lr=1",), "starts": ("weak | n_exmples=8",)}, "n_exmples"),
        ({"cells": ("a | group_size=1",)}, "group_size=1.*group_size is 1: at least 2"),
        ({"cells": ("a | seed=3",)}, "seed is the same for all cells"),
        ({"cells": ("a | init_from=x",)}, "--starts"),
        ({"base": "data=gsm8k"}, "data is the same for all cells"),
        ({"scatter": ("kl",)}, "two columns"),
        ({"scatter": ("kl", "akkuracy")}, "no column akkuracy"),
        ({"columns": ("speed",)}, "no column speed"),
        ({"columns": ("distinct_advantages-mean",)}, "name it in curves"),
        ({"columns": ("distinct_advantages",)}, "no column distinct_advantages"),
        ({"columns": ("kl-mean",)}, "no column kl-mean"),
        ({"columns": ("rollouts",), "curves": ("correct",)}, "read off the curve accuracy"),
        ({"reference": "group_size=8"}, "no cell has just the settings group_size=8"),
        ({"tuned_seeds": (0,)}, "name its settings"),
        ({"report_only": True}, "no results in"),
        ({"curves": ("correct", "speed")}, "no curve speed"),
        ({"page": "nowhere.md"}, "no page nowhere.md"),
        ({"init_from": "nowhere"}, "there is no checkpoint in nowhere"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(tmp_path, start, changes, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        ablate.main(tiny(tmp_path, start, **changes))
    assert not (tmp_path / "study" / "runs").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ablate_*.py")), ids=lambda p: p.stem)
def test_the_studies_of_the_book_can_run_and_have_a_page(path):
    config = parse(Config, [str(path)])
    cells = read_cells(config)
    assert config.name and len(cells) >= 2
    page = ROOT / "docs" / "experiments" / f"{config.name}.md"
    assert f"python studies/ablate.py configs/{path.name}" in page.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# A whole study


@pytest.fixture(scope="module")
def study(tmp_path_factory, start):  # noqa: F811
    folder = tmp_path_factory.mktemp("ablation")
    config = tiny(folder, start, starts=("weak | n_examples=8 epochs=1",))
    config = replace(config, cells=(*config.cells, "start | weak | group_size=2 start=weak"))
    return config, ablate.main(config)


def test_a_study_runs_every_cell_with_every_seed_once(study):
    config, rows = study
    assert len(rows) == 6  # three different settings, two seeds
    assert {(row["cell"], row["seed"]) for row in rows} == {(c.key, s) for c in read_cells(config) for s in (0, 1)}
    stored = [json.loads(line) for line in Path(config.out, "results.jsonl").read_text().splitlines()]
    assert stored == rows
    for row in rows:
        assert {
            "accuracy",
            "correct",
            "formatted",
            "short",
            "length",
            "kl",
            "entropy",
            "start",
        } <= row.keys()
        assert row["curves"]["accuracy"][0] == [0, 1, 2] and row["kl"] >= 0 and row["answers"] in (16, 32)
    assert (
        not list(Path(config.out, "runs").rglob("*.pt")) and len(list(Path(config.out, "runs").rglob("log.txt"))) == 6
    )
    assert Path(config.out, "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_has_the_means_of_the_rows(study):
    config, rows = study
    text = Path(config.out, "table.md").read_text()
    lines = text.split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 4 and lines[0].startswith("| part | setting | greedy accuracy |")
    mine = [row["accuracy"] for row in rows if row["cell"] == read_cells(config)[0].key]
    assert lines[2].startswith(f"| size | 2 | {describe(mine, 2, 3)} | - |") and lines[2].endswith("| 2 |")
    head, *same = (line.split("|")[3:] for line in (lines[0], *lines[3:5]))  # the same runs in two parts
    for title, one, two in zip(head, *same):
        assert (two == " - ") if "minus the reference's" in title else (one == two)


def test_a_column_can_be_the_mean_of_a_curve(study):
    config, rows = study
    config = replace(config, columns=("distinct_advantages-mean",), curves=("accuracy", "distinct_advantages"))
    cells = read_cells(config)[:1]
    rows = [
        {"cell": cells[0].key, "seed": seed, "curves": {"distinct_advantages": [[1, 2, 3], [1.0, 0.5, x]]}}
        for seed, x in enumerate((1.0, 0.0))
    ]  # 0.75 and 0.5
    assert ablate.table(config, cells, rows).splitlines()[-1].endswith("| 0.625 (0.177) | 2 |")


def test_the_reference_runs_with_seeds_that_it_was_not_tuned_with():
    """Its tuned rows stay in the file, but neither table nor plot has them; the others keep all of theirs."""
    config = Config(cells=("a | lr=1", "a | lr=2", "b | lr=2", "b | lr=3"), reference="lr=2", tuned_seeds=(0, 2))
    cells = read_cells(config)
    assert [ablate.seeds_of(config, cell) for cell in cells] == [[0, 1, 2], [1, 3, 4], [1, 3, 4], [0, 1, 2]]
    config = replace(config, columns=("accuracy", "accuracy-reference"))
    rows = [{"cell": "lr=1", "seed": seed, "accuracy": x} for seed, x in enumerate((0.5, 0.6, 0.7))]
    rows += [{"cell": "lr=2", "seed": seed, "accuracy": x} for seed, x in enumerate((0.9, 0.5, 0.9, 0.7))]
    one, two, again = [line.split(" | ") for line in table(config, cells, rows).splitlines()[2:5]]
    assert two[2:] == again[2:] == ["0.600 (0.141)", "-", "2 |"]
    # squares 0.02 + 0.02 over 2 + 1: s 0.11547, t of 3 degrees of freedom 3.182, √(1/3 + 1/2) 0.91287
    assert one[2:] == ["0.600 (0.100)", "0.000 ± 0.335 (p = 1.000)", "3 |"]


def test_the_cells_of_a_study_share_their_standard_deviation():
    """By hand, a part of three and one of two: squares 0.02, 0.02, 0.08 and 0.02 over 8: s 0.13229, t 2.306."""
    config = Config(cells=("a | lr=1", "a | lr=2", "a | lr=3", "b | lr=4", "b | lr=1"), columns=("accuracy-reference",))
    figures = {"1": (0.4, 0.5, 0.6), "2": (0.8, 0.9, 1.0), "3": (0.5, 0.7, 0.9), "4": (0.5, 0.6, 0.7)}
    rows = [
        {"cell": f"lr={lr}", "seed": seed, "accuracy": x} for lr, some in figures.items() for seed, x in enumerate(some)
    ]
    text = table(config, read_cells(config), rows)
    entries = [line.split(" | ")[2] for line in text.splitlines()[2:7]]
    assert entries[0] == entries[3] == "-"
    assert entries[1] == "**0.400 ± 0.249** (p = 0.012)"  # t 3.703, p 0.00600, twice
    assert entries[2] == "0.200 ± 0.249 (p = 0.101)"  # t 1.852, p 0.1013
    assert entries[4] == "-0.100 ± 0.249 (p = 0.382)"  # t 0.926, p 0.3816, alone in its part
    assert "0.1323, 8 degrees of freedom (of single cells: 0.1000 to 0.2000)" in text
    assert "find a difference of 0.393 (at 5 % / 2" in text  # (t(0.9875) 2.752 + t(0.8) 0.889) · 0.10801


def test_a_report_alone_runs_nothing_and_needs_no_start(study, tmp_path, monkeypatch):
    config, rows = study
    page = tmp_path / "page.md"
    page.write_text("# Q\n<!-- table -->\n<!-- /table -->\n")
    shutil.copy(Path(config.out) / "results.jsonl", page.with_suffix(".jsonl"))
    monkeypatch.setattr(ablate, "run_cell", None)
    again = replace(config, page=str(page), report_only=True, out=str(tmp_path / "new"), init_from="nowhere")
    before = page.with_suffix(".jsonl").read_bytes()
    assert ablate.main(again) == rows and page.with_suffix(".jsonl").read_bytes() == before
    assert page.read_text().strip("\n").count(table(config, read_cells(config), rows)) == 1
    assert page.with_suffix(".png").exists() and not (tmp_path / "new" / "study.json").exists()


def test_a_gdpo_study_keeps_its_own_length_limit(study, tmp_path, start):  # noqa: F811
    """The stage has a field of that name too, for the reward."""
    config, _ = study
    config = replace(config, stage="gdpo", out=str(tmp_path), length_limit=20, starts=())
    ablate.check_same_study(config)
    ablate.check_same_study(config)
    for changes in ({"length_limit": 21}, {"stage": "grpo"}, {"curves": ("correct",)}):
        with pytest.raises(UserError, match=f"{next(iter(changes))} .*, now"):
            ablate.check_same_study(replace(config, **changes))


def test_a_start_of_its_own_is_made_and_used(study):
    config, _ = study
    weak = Path(config.out) / "starts" / "weak"
    assert torch.load(weak / "ckpt.pt", weights_only=True)["config"]["n_examples"] == 8
    settings = [json.loads(p.read_text()) for p in Path(config.out, "runs").rglob("config.json")]
    assert sorted({Path(s["init_from"]).name for s in settings}) == ["sft", "weak"]


@pytest.mark.slow
def test_a_second_call_runs_what_is_missing_and_nothing_else(study, tmp_path, monkeypatch, capsys):
    config, rows = study
    shutil.copytree(config.out, tmp_path / "study")
    again = replace(config, out=str(tmp_path / "study"))
    path = tmp_path / "study" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:40])  # a crash: one row cut off, one not written
    shutil.rmtree(tmp_path / "study" / "runs")  # nor is it found there
    new = ablate.main(again)
    assert "2 runs to do" in capsys.readouterr().out
    assert len(list((tmp_path / "study" / "runs").rglob("log.txt"))) == 2
    without_time = [sorted((k, str(v)) for k, v in row.items()) for row in new]
    assert sorted(without_time) == sorted(
        sorted((k, str(v)) for k, v in row.items()) for row in rows
    )  # the same figures


def test_results_of_other_questions_starts_or_defaults_are_not_mixed_in(study, tmp_path, start, monkeypatch):  # noqa: F811
    config, _ = study
    shutil.copytree(config.out, tmp_path / "study")
    again = replace(config, out=str(tmp_path / "study"))
    with pytest.raises(UserError, match="questions 16, now 17"):
        ablate.main(replace(again, questions=17))
    with pytest.raises(UserError, match="start "):
        ablate.main(replace(again, init_from=str(start.parent / "pretrain")))
    with pytest.raises(UserError, match="start weak n_examples=8 epochs=1, now n_examples=9 epochs=1"):
        ablate.main(replace(again, starts=("weak | n_examples=9 epochs=1",)))
    monkeypatch.setattr(
        grpo, "Config", make_dataclass("Config", [("lr", float, field(default=1.0))], bases=(grpo.Config,), frozen=True)
    )
    with pytest.raises(UserError, match="lr 0.0002, now 1.0"):
        ablate.main(again)


def test_a_row_that_the_study_did_not_note_is_found_in_its_folder(study, tmp_path, capsys):
    config, rows = study
    shutil.copytree(config.out, tmp_path / "study")
    again = replace(config, out=str(tmp_path / "study"))
    path = tmp_path / "study" / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    new = ablate.main(again)
    assert "0 runs to do" in capsys.readouterr().out
    assert sorted(map(str, new)) == sorted(map(str, rows))


@pytest.mark.skipif(os.name != "posix", reason="interrupts by signal")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_study_stops_and_goes_on(tmp_path, start, number):  # noqa: F811
    """Ctrl-C reaches the parent and its workers; kill -9 the parent alone. Nothing more is begun, nothing is lost."""
    config = tiny(tmp_path, start)
    command = [
        sys.executable,
        "studies/ablate.py",
        "--init_from",
        str(start),
        "--out",
        config.out,
        "--seeds",
        "6",
        "--jobs",
        "1",
    ]
    command += ["--base", BASE, "--questions", "16", "--cells", "size | group_size=2", "size | group_size=4"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    results, runs = tmp_path / "study" / "results.jsonl", tmp_path / "study" / "runs"
    deadline = time.time() + 120
    while not (results.exists() and results.read_text().count("\n") >= 2) and time.time() < deadline:
        time.sleep(0.1)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.wait(timeout=60)
    time.sleep(6 if number == signal.SIGKILL else 1)
    noted = results.read_text().count("\n")
    measured = len(list(runs.rglob("row.json")))
    begun = len(list(runs.rglob("log.txt")))
    assert 2 <= noted <= measured <= begun < 12 and begun <= noted + 3
    rows = ablate.main(replace(config, cells=config.cells[:2], seeds=6))
    assert len(rows) == 12 and len({(row["cell"], row["seed"]) for row in rows}) == 12


@pytest.mark.slow
def test_a_start_that_was_interrupted_goes_on(tmp_path, start, monkeypatch):  # noqa: F811
    config = tiny(tmp_path, start, starts=("weak | n_examples=16 epochs=4 save_every=1 log_every=1",), seeds=1)
    config = replace(config, cells=("start | weak | group_size=2 start=weak",))
    original, saves = ablate.sft.Run.save, []

    def save(self, *args, **more):
        original(self, *args, **more)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablate.sft.Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            ablate.main(config)
    weak = Path(config.out) / "starts" / "weak"
    assert not torch.load(weak / "ckpt.pt", weights_only=True)["finished"]
    ablate.main(config)
    assert torch.load(weak / "ckpt.pt", weights_only=True)["finished"]


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_stay(tmp_path, start):  # noqa: F811
    config = tiny(tmp_path, start, cells=("a | group_size=2", "a | group_size=2 max_new_tokens=4000"), seeds=1)
    with pytest.raises(UserError, match="max_new_tokens"):
        ablate.main(config)
    assert len((tmp_path / "study" / "results.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "study" / "table.md").exists()


def test_the_page_gets_the_table_and_keeps_its_words(study, tmp_path):
    config, rows = study
    page = tmp_path / "page.md"
    page.write_text("# Question\n\n<!-- table -->\nold\n<!-- /table -->\n\nThe answer.\n")
    for _ in range(2):
        ablate.main(replace(config, page=str(page)))
    text = page.read_text()
    assert text.startswith("# Question\n\n<!-- table -->\n\n| part |") and text.endswith(
        "<!-- /table -->\n\nThe answer.\n"
    )
    assert "old" not in text and text.count("| part |") == 1
    assert page.with_suffix(".png").exists() and len(page.with_suffix(".jsonl").read_text().splitlines()) == len(rows)
    page.write_text("no marks")
    with pytest.raises(UserError, match="no place for a table"):
        ablate.main(replace(config, page=str(page)))
    assert page.read_text() == "no marks"


def test_a_scatter_plot_of_two_columns(study, tmp_path):
    config, rows = study
    cells = read_cells(config)
    drawn = replace(config, scatter=("kl", "accuracy"), out=str(tmp_path))
    ablate.report(drawn, cells, [rows[0] | {"kl": None}, *rows[1:]])
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_measure_counts_what_it_says(study, tmp_path, start):  # noqa: F811
    """Of a run whose weights are still there: greedy accuracy is that of the examination on the same questions."""
    config, _ = study
    settings = grpo.Config(
        out_dir=str(tmp_path), init_from=str(start), steps=1, prompts_per_step=2, eval_prompts=16, eval_every=1,
        device="cpu", n_prompts=32,
    )  # fmt: skip
    figures = grpo.main(settings)
    row = measure(str(tmp_path), str(start), replace(config, questions=16))
    assert row["accuracy"] == pytest.approx(figures["accuracy"])
    assert row["all"] <= min(row["correct"], row["short"]) and row["correct"] <= row["formatted"] <= row["finished"]
    assert row["answers"] == 8
    by_hand(tmp_path, start, replace(config, questions=16))
    model, tokenizer, _ = load_stage(str(start))
    held = encode_prompts(load_prompts("arith", "validation", n=16), tokenizer, 400)
    before = sample_answers(model, tokenizer, held[0], 1, 48, 0.0, seed=0)
    right = score(before.texts, [prompt.gold for prompt in held[1]], before.finished)[0]
    assert row["start"] == pytest.approx(float(right.mean()))


def by_hand(folder, origin, config) -> None:
    """What is sampled, row by row, of a policy far from its start and believed by a lax verifier."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    state["model"]["head.weight"] *= 1.5
    state["config"]["verifier"] = "any"
    torch.save(state, folder / "ckpt.pt")
    (policy, tokenizer, _), (reference, *_) = load_stage(str(folder)), load_stage(str(origin))
    ids, prompts = encode_prompts(load_prompts("arith", "validation", n=16), tokenizer, 400)
    rollout = sample_answers(policy, tokenizer, ids, 1, 48, 1.0, seed=0)
    lengths = rollout.mask.sum(dim=1)
    limit = int(lengths[rollout.finished].median())  # one of them has it exactly
    row = measure(str(folder), str(origin), replace(config, length_limit=limit))
    golds = [prompt.gold for prompt in prompts]
    believed = score(rollout.texts, golds, rollout.finished, "any")[0]
    assert row["believed"] == pytest.approx(float(believed.mean()))
    assert row["short"] == pytest.approx(float(((lengths <= limit) & rollout.finished).float().mean()))
    assert row["length"] == pytest.approx(float(lengths.float().mean()))
    with torch.no_grad():
        ours, theirs = (model(rollout.tokens)[:, :-1].double().log_softmax(-1) for model in (policy, reference))
    kl = ((ours.exp() * (ours - theirs)).sum(-1) * rollout.mask).sum() / 16
    entropy = -((ours.exp() * ours).sum(-1) * rollout.mask).sum() / rollout.mask.sum()
    assert row["kl"] == pytest.approx(float(kl), rel=1e-3) and kl > 0.5
    assert row["entropy"] == pytest.approx(float(entropy), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Studies of pretraining

TEXT = (
    "d_model=32 n_layers=2 n_heads=2 n_kv_heads=1 seq_len=32 max_seq_len=64 batch_size=4 steps=4 eval_every=2 "
    "eval_windows=8 warmup=1 compile=off max_documents=300 vocab_size=300 log_every=1"
)


def text_study(folder, **changes) -> Config:
    settings = {
        "stage": "pretrain", "base": TEXT, "seeds": 2, "jobs": 1, "out": str(folder / "study"), "init_from": "nowhere",
        "cells": ("norm | RMS | norm=rmsnorm", "norm | mean too | norm=layernorm"),
        "columns": ("val_loss", "val_loss-reference", "beyond", "parameters", "seconds"),
        "curves": ("val_loss@seconds", "loss@position", "end_gradient@layer"),
    }  # fmt: skip
    return Config(**(settings | changes))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    config = text_study(tmp_path_factory.mktemp("texts"))
    return config, ablate.main(config)


def test_a_study_of_pretraining_runs_without_a_start(texts, capsys):
    config, rows = texts
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    for row in rows:
        assert set(row["curves"]) == {"val_loss@seconds", "loss@position", "end_gradient@layer"}
        assert len(row["curves"]["val_loss@seconds"][0]) == 2 and row["trained_length"] == 32
        assert 4 < row["beyond"] < 7 and row["parameters"] == rows[0]["parameters"]
    left = {path.suffix for path in Path(config.out, "runs").rglob("*") if path.is_file()}
    assert left == {".json", ".jsonl", ".txt", ".png"}  # neither weights nor tokens
    assert Path(config.out, "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert ablate.main(config) == rows and "0 runs to do" in capsys.readouterr().out


def test_differences_in_pretraining_are_taken_seed_by_seed(texts):
    config, rows = texts
    text = Path(config.out, "table.md").read_text()
    one, two = (line.split(" | ") for line in text.splitlines()[2:4])
    loss = {(row["cell"].split("norm=")[1].split()[0], row["seed"]): row["val_loss"] for row in rows}
    differences = [loss["layernorm", seed] - loss["rmsnorm", seed] for seed in (0, 1)]
    half = 12.706 * statistics.stdev(differences) / math.sqrt(2)  # with two cells it is the paired t
    assert one[3] == "-" and two[3].strip("*").startswith(f"{statistics.mean(differences):.3f} ± {half:.3f}")
    assert "* validation loss: paired by seed;" in text
    head = text.splitlines()[0]
    assert head.startswith("| part | setting | validation loss | validation loss, minus the reference's | loss past")


def test_paired_differences_by_hand():
    """Of seeds that all cells have: 1 and 2 of the first two, since the third has none on seed 0."""
    cells = ("a | lr=1", "a | lr=2", "b | lr=2", "b | lr=3")
    config = text_study(Path("."), columns=("val_loss-reference",), cells=cells)
    cells = read_cells(config)
    figures = {1: (1.0, 1.5, 2.0), 2: (1.5, 2.5, 2.6), 3: (None, 2.0, 2.5)}
    rows = [
        {"cell": cell.key, "seed": seed, "val_loss": figures[int(dict(cell.settings)["lr"])][seed]}
        for cell, seeds in ((cells[0], (0, 1, 2)), (cells[1], (2, 0, 1)), (cells[3], (1, 2, 0)))
        for seed in seeds
    ]
    # seeds 1 and 2 differ by 0.5, 0.1 and 0.5, mean 0.3667; half of the squares about it, 0.05333, over 2: s 0.1633
    lines = [line.split(" | ")[2] for line in table(config, cells, rows).splitlines()[2:6]]
    assert lines[0] == lines[2] == "-"
    assert lines[1] == "**0.800 ± 0.703** (p = 0.039)" and lines[3].startswith("-0.300 ± 0.703 (p = ")  # 4.303 · s


def test_without_a_spread_there_is_a_difference_but_no_interval():
    config = Config(cells=("a | lr=1", "a | lr=2"), columns=("accuracy-reference",))
    rows = [{"cell": f"lr={lr}", "seed": 0, "accuracy": lr / 4} for lr in (1, 2)]
    text = table(config, read_cells(config), rows)
    assert text.splitlines()[-1] == "| a | lr=2 | 0.250 | 1 |" and "pooled" not in text


def test_differences_of_curves_by_hand():
    row = lambda seed, ys, cell: {"cell": cell, "seed": seed, "curves": {"loss": [[1, 2], ys]}}  # noqa: E731
    first = [row(0, [3.0, 2.0], "a"), row(1, [5.0, 4.0], "a"), row(3, [1.0], "a")]
    mine = [row(1, [4.0, 4.5], "b"), row(0, [3.5, 1.0], "b"), row(2, [0.0, 0.0], "b"), row(3, [1.0, 1.0], "b")]
    made = ablate.with_differences(mine, first)
    assert [r["curves"].get("loss-reference") for r in made] == [
        [[1, 2], [-1.0, 0.5]],
        [[1, 2], [0.5, -1.0]],
        None,
        None,
    ]
    assert "loss-reference" not in mine[0]["curves"] and made[0]["curves"]["loss"] == mine[0]["curves"]["loss"]
    assert [list(r["curves"]) for r in ablate.with_differences(first, first)] == [["loss"]] * 3


def test_the_plot_shows_each_part_against_its_own_reference(tmp_path, monkeypatch):
    config = text_study(
        tmp_path, cells=("a | lr=1", "a | lr=2", "b | lr=2", "b | lr=3"), curves=("val_loss-reference",)
    )
    assert ablate.kept_curves(config) == ["val_loss"]
    cells, drawn = read_cells(config), []
    rows = [
        {"cell": cell.key, "seed": 0, "curves": {"val_loss": [[1], [float(dict(cell.settings)["lr"]) ** 2]]}}
        for cell in (cells[3], cells[1], cells[0])
    ]
    monkeypatch.setattr(ablate, "plot_study", lambda runs, *more: drawn.append(runs))
    (tmp_path / "study").mkdir()
    ablate.report(config, cells, rows)
    ys = {
        key: [row["curves"].get("val_loss-reference", [0, None])[1] for row in mine] for key, mine in drawn[0].items()
    }
    assert ys == {("a", "lr=1"): [None], ("a", "lr=2"): [[3.0]], ("b", "lr=2"): [None], ("b", "lr=3"): [[5.0]]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cells": ("a | group_size=4",)}, "group_size"),
        ({"cells": ("a | norm=batchnorm",)}, "norm"),
        ({"cells": ("a | seq_len=65",)}, "seq_len=65.*seq_len 65 is longer than max_seq_len 64"),
        ({"cells": ("a | n_heads=3",)}, "n_heads"),
        ({"cells": ("a | seed=1",)}, "seed is the same"),
        ({"cells": ("a | start=weak",)}, "start=weak"),
        ({"starts": ("weak | n_examples=8",)}, "starts from nothing"),
        ({"columns": ("accuracy",)}, "no column accuracy"),
        ({"columns": ("-reference",)}, "no column -reference"),
        ({"curves": ("accuracy",)}, "no curve accuracy"),
        ({"curves": ("val_loss@layer",)}, "no curve val_loss@layer"),
        ({"curves": ("@tokens",)}, "no curve @tokens"),
        ({"scatter": ("seconds", "val_loss-reference")}, "no column val_loss-reference"),
    ],
)
def test_what_cannot_work_in_a_study_of_pretraining(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        ablate.main(text_study(tmp_path, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "study").exists()


def test_a_policy_has_no_curve_against_tokens(tmp_path, start):  # noqa: F811
    with pytest.raises(UserError, match="no curve accuracy@tokens"):
        ablate.main(tiny(tmp_path, start, curves=("accuracy@tokens",)))


@pytest.mark.parametrize("stage", ablate.STAGES)
def test_each_stage_has_columns_and_curves_of_its_own(stage):
    config = Config(stage=stage)
    columns, curves = ablate.names_of(config)
    plain = {name.removesuffix("-reference") for name in ablate.columns_of(config)}
    assert {name for name in plain if not name.endswith("-mean")} <= set(columns)
    assert {name.removesuffix("-mean") for name in plain if name.endswith("-mean")} <= set(curves)
    assert set(ablate.curves_of(config)) <= set(curves)
    assert ablate.columns_of(replace(config, columns=("x",))) == ("x",)


def test_cells_with_equal_parameters_have_equal_parameters():
    """Three matrices of 2/3 the width are two of the whole, exactly."""
    config = parse(Config, [str(ROOT / "configs" / "ablate_activations.py")])
    sizes = set()
    for cell in read_cells(config):
        shape = ablate.pretrain.model_config(ablate.stage_config(config, cell, 0), 512)
        sizes.add(sum(p.numel() for p in Transformer(shape).parameters()))
    assert len(sizes) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_holds_the_table_of_its_results(page):
    """Nobody has edited a figure by hand: the table is that of the rows beside it."""
    preset = ROOT / "configs" / f"ablate_{page.stem}.py"
    config = parse(Config, [str(preset)])
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    inside = page.read_text().split("<!-- table -->")[1].split("<!-- /table -->")[0].strip()
    assert inside == table(config, read_cells(config), rows)
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and f"{page.stem}.png" in page.read_text()
    counted = {cell.key: sum(row["cell"] == cell.key for row in rows) for cell in read_cells(config)}
    assert min(counted.values()) >= 3, counted


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_exact_figure_of_a_page_stands_in_its_table(page):
    """No sentence without its number, and no number that the table does not have."""
    text = page.read_text()
    before, rest = text.split("<!-- table -->")
    inside, after = rest.split("<!-- /table -->")
    if "<!-- ways -->" in before:  # another table, with a test of its own
        start, rest = before.split("<!-- ways -->")
        table_of_ways, end = rest.split("<!-- /ways -->")
        before, inside = start + end, inside + table_of_ways
    figures = re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", before + after)
    assert len(figures) >= 5 and not [figure for figure in figures if figure not in inside]
