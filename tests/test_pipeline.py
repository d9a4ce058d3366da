import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tiny import SMALL

import pipeline
from runtime.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
TINY = {
    "pretrain": SMALL | {"steps": 3, "max_documents": 60, "vocab_size": 270, "eval_windows": 4, "eval_every": 3},
    "sft": {"n_examples": 8, "epochs": 1.0, "eval_every": 10},
}
FEW = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "n_prompts": 8, "eval_prompts": 4, "eval_every": 2}
TINY |= dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo"), FEW)
PAIRS = {"n_pairs": 8, "epochs": 1.0, "batch_size": 4, "eval_pairs": 4, "eval_prompts": 4, "eval_every": 10}
TINY |= dict.fromkeys(("dpo", "ipo", "kto", "simpo", "orpo"), PAIRS)
TINY["reward"] = PAIRS | {"n_sums": 8, "normalize_on": 4, "max_new_tokens": 6}
TINY["ppo"] = TINY["ppo_reward"] = {
    "steps": 2, "prompts_per_step": 4, "n_prompts": 8, "eval_prompts": 4, "eval_every": 2, "max_new_tokens": 8,
}  # fmt: skip
REAL_STAGES = pipeline.stages


def tiny_stages(config):
    """The real chain, every stage of it as small as it gets."""
    small = []
    for stage in REAL_STAGES(config):
        names = {field.name for field in fields(stage.config)}
        changes = TINY.get(stage.name, {}) | {"save_every": 1, "log_every": 1}
        small.append(replace(stage, config=replace(stage.config, **{k: v for k, v in changes.items() if k in names})))
    return small


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pipeline, "stages", tiny_stages)
    draw = pipeline.plot_stages  # the picture of all stages, not one after each of them
    monkeypatch.setattr(
        pipeline, "plot_stages", lambda names, *more: draw(names, *more) if len(names) == len(NAMES) else None
    )
    exam = pipeline.evaluate.Config
    monkeypatch.setattr(pipeline.evaluate, "Config", lambda **settings: exam(**settings | {"n": 8}))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("book") / "arith"


def config(out) -> pipeline.Config:
    return pipeline.Config(out=str(out), device="cpu", compile="off", samples=2, quick=True)


NAMES = [stage.name for stage in REAL_STAGES(pipeline.Config())]


def state_of(out: Path) -> dict:
    return {name: (out / name / "ckpt.pt").stat().st_mtime_ns for name in NAMES}


@pytest.fixture
def ran(out, small, capsys):
    """The pipeline has run; what it returned and printed the first time."""
    if not (out / "first.json").exists():
        rows = pipeline.main(config(out))
        (out / "first.json").write_text(json.dumps({"rows": rows, "printed": capsys.readouterr().out}))
    return json.loads((out / "first.json").read_text())


def test_one_call_runs_the_chain_and_writes_the_report_card(out, ran):
    rows = json.loads((out / "report.json").read_text())
    assert rows == ran["rows"] and [row["stage"] for row in rows] == [s.label for s in REAL_STAGES(pipeline.Config())]
    for row in rows:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["n"] == 8
        if row["stage"] != "Reward model":  # it writes no text
            assert row["bits_per_byte"] > 0 and "pass@1" in row and "maj@2" in row
    report = (out / "report.md").read_text()
    assert all(f"| {row['stage']} |" in report for row in rows) and "Wilson" in report
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert pipeline.evaluate.table(rows) in ran["printed"] and "python chat.py" in ran["printed"]


def test_each_stage_starts_from_the_one_before(out, ran):
    for name in NAMES[2:]:
        assert [stage["stage"] for stage in load_checkpoint(out / name)["lineage"]] == ["pretrain", "sft"]
    assert [stage["stage"] for stage in load_checkpoint(out / "sft")["lineage"]] == ["pretrain"]
    assert all(load_checkpoint(out / name)["finished"] for name in NAMES)


def test_a_second_call_trains_nothing_and_reports_the_same(out, ran):
    before = state_of(out), (out / "report.json").read_text(), (out / "report.md").read_text()
    exams = {name: (out / name / "exam.json").stat().st_mtime_ns for name in NAMES}
    assert json.loads(json.dumps(pipeline.main(config(out)))) == ran["rows"]
    assert before == (state_of(out), (out / "report.json").read_text(), (out / "report.md").read_text())
    assert exams == {name: (out / name / "exam.json").stat().st_mtime_ns for name in NAMES}  # not measured again


def test_without_its_last_stage_only_that_runs_again(out, ran):
    before = state_of(out)
    weights = load_checkpoint(out / NAMES[-1])["model"]
    shutil.rmtree(out / NAMES[-1])
    rows = json.loads(json.dumps(pipeline.main(config(out))))
    after = state_of(out)
    assert {name for name in NAMES if before[name] != after[name]} == {NAMES[-1]}
    same = [{k: v for k, v in row.items() if k != "path"} for row in rows]
    assert same == [{k: v for k, v in row.items() if k != "path"} for row in ran["rows"]]  # the same seed, the same end
    again = load_checkpoint(out / NAMES[-1])["model"]
    assert all(bool((weights[name] == again[name]).all()) for name in weights)


def test_a_checkpoint_that_changed_is_measured_again(out, ran, monkeypatch):
    measured = []
    real = pipeline.evaluate.measure
    monkeypatch.setattr(pipeline.evaluate, "measure", lambda path, exam: measured.append(path) or real(path, exam))
    os.utime(out / "sft" / "ckpt.pt")
    pipeline.main(config(out))
    assert measured == [str(out / "sft")]


def test_settings_reach_every_stage(tmp_path):
    settings = pipeline.Config(out=str(tmp_path), seed=7, device="cpu", precision="bf16", compile="off")
    for stage in REAL_STAGES(settings):
        c = stage.config
        assert (c.seed, c.device, c.precision, c.compile) == (7, "cpu", "bf16", "off")
        assert c.out_dir == str(tmp_path / stage.name)


def test_preferences_come_from_own_answers_of_the_sft_model_unless_it_is_quick():
    for quick, dpo_data, reward_data in ((False, "own", "arith+own"), (True, "arith", "arith")):
        data = {stage.name: getattr(stage.config, "data", "") for stage in REAL_STAGES(pipeline.Config(quick=quick))}
        assert {data[name] for name in ("dpo", "ipo", "kto", "simpo", "orpo")} == {dpo_data}
        assert data["reward"] == reward_data


def test_the_family_has_one_budget_and_one_start():
    """Answers sampled: the same for PPO, GRPO, its relatives and GDPO; DAPO, which replaces groups, takes as many in
    fewer steps, between one and four draws in each."""
    found = {stage.name: stage.config for stage in REAL_STAGES(pipeline.Config(out="o"))}
    family = ("grpo", "dr_grpo", "gspo", "cispo", "gdpo")
    answers = {name: found[name].steps * found[name].prompts_per_step * found[name].group_size for name in family}
    assert set(answers.values()) == {found["ppo"].steps * found["ppo"].prompts_per_step}
    assert {found[name].init_from for name in (*family, "ppo", "dapo")} == {"o/sft"}
    dapo = found["dapo"]
    least = dapo.steps * dapo.prompts_per_step * dapo.group_size
    assert least < answers["grpo"] < dapo.draws * least
    assert (found["dr_grpo"].loss_type, found["gspo"].ratio_level, found["cispo"].loss_type) == (
        "dr_grpo",
        "sequence",
        "cispo",
    )


@pytest.mark.slow
def test_the_quick_pipeline_runs_as_a_script(tmp_path):
    command = [sys.executable, "pipeline.py", "--quick", "--out", str(tmp_path / "q"), "--device", "cpu"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| GRPO |" in done.stdout and "| GDPO |" in done.stdout
    assert {"report.md", "report.json", "curves.png"} <= {path.name for path in (tmp_path / "q").iterdir()}
