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
from runtime.errors import UserError

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
    return pipeline.Config(out=str(out), device="cpu", compile="off", samples=2, quick=True, all=True)


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
            assert 0 <= row["larger"] <= 1 and 0 <= row["longer"] <= 1
        else:
            assert 0 <= row["best@2"] <= 1
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


def test_each_stage_goes_by_its_own_name(ran):
    """Dr. GRPO, DAPO, GSPO and CISPO are runs of grpo.py, but not called so; what comes next the pipeline knows."""
    for number, stage in enumerate(REAL_STAGES(pipeline.Config()), start=1):
        assert f"\nstage {number} of 16: {stage.label}, about " in ran["printed"]
        assert f"\n{stage.label} done: " in ran["printed"]
    assert "next:" not in ran["printed"]


def test_the_bar_has_the_stage_s_own_name(out, ran, small, capsys):
    shutil.rmtree(out / "dr_grpo")
    pipeline.main(config(out))
    err = capsys.readouterr().err
    assert "12/16 Dr. GRPO:" in err and "grpo:" not in err


def test_after_each_stage_its_examination_and_the_time_left(ran):
    lines = [line for line in ran["printed"].splitlines() if line.startswith("examined: ")]
    assert len(lines) == 16 and all(" (95 %: 0." in line and "n = 8)" in line for line in lines)
    assert all("left" in line for line in lines[:-1]) and "left" not in lines[-1]
    assert lines[2].startswith("examined: ranks pairs rightly ")


def test_quick_says_that_it_shows_no_learning(out, ran):
    assert (
        ran["printed"].count("it shows no learning") == 2 and "it shows no learning" in (out / "report.md").read_text()
    )


def test_the_same_question_is_answered_by_the_base_the_tuned_and_the_last(ran):
    end = ran["printed"].split("One question, answered greedily")[1]
    assert pipeline.QUESTION in end and str(pipeline.ANSWER) in end
    assert [line.split()[0] for line in end.splitlines() if "   accuracy " in line] == ["Base", "SFT", "GRPO", "GDPO"]


def refuse(*_, **__):
    raise AssertionError("this was done already")


def test_a_finished_pipeline_loads_no_data_and_no_model(out, ran, small, monkeypatch):
    pipeline.main(config(out))  # whatever an earlier test has left unfinished
    chain = [replace(stage, main=refuse) for stage in tiny_stages(config(out))]
    monkeypatch.setattr(pipeline, "stages", lambda _: chain)
    for where, name in ((pipeline.evaluate, "measure"), (pipeline, "answer"), (pipeline, "plot_stages")):
        monkeypatch.setattr(where, name, refuse)
    assert len(pipeline.main(config(out))) == 16
    assert [row["stage"] for row in pipeline.main(replace(config(out), only=("GDPO",)))] == [s.label for s in chain]


def test_another_configuration_or_another_start_is_not_finished(out, ran, small, tmp_path):
    pipeline.main(config(out))
    stage = {stage.name: stage for stage in tiny_stages(config(out))}["grpo"]
    assert pipeline.is_finished(stage)
    assert not pipeline.is_finished(replace(stage, config=replace(stage.config, lr=0.5)))
    moved = shutil.copytree(out, tmp_path / "arith")
    (other,) = [one for one in tiny_stages(config(moved)) if one.name == "grpo"]
    assert not pipeline.is_finished(other)  # it started from the folder that was copied
    kept = (out / "sft" / "ckpt.pt").read_bytes()
    shutil.copyfile(out / "dpo" / "ckpt.pt", out / "sft" / "ckpt.pt")
    assert not pipeline.is_finished(stage)
    (out / "sft" / "ckpt.pt").write_bytes(kept)
    assert pipeline.is_finished(stage)
    (out / "grpo" / "config.json").write_text("{")  # of no importance: the checkpoint says it all
    assert pipeline.is_finished(stage)


def names_of(*only: str) -> list[str]:
    return [stage.name for stage in pipeline.chosen(only, REAL_STAGES(pipeline.Config(out="o")))]


def test_only_takes_names_and_labels_and_adds_what_they_start_from():
    assert names_of() == ["pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo", "gdpo"]
    every = pipeline.chosen((), REAL_STAGES(pipeline.Config(out="o")), relatives=True)
    assert [stage.name for stage in every] == NAMES and len(NAMES) == 16
    assert names_of("grpo") == ["pretrain", "sft", "grpo"] and names_of("pretrain") == ["pretrain"]
    assert names_of("ppo_reward") == ["pretrain", "sft", "reward", "ppo_reward"]
    assert names_of("Dr. GRPO", "dpo") == ["pretrain", "sft", "dpo", "dr_grpo"]


def test_only_takes_names_between_commas_and_a_label_that_has_one():
    assert names_of("dpo,kto") == names_of("dpo", "kto") and names_of("dpo,") == names_of("dpo")
    assert names_of("PPO, reward model") == names_of("ppo_reward")


def test_only_with_an_unknown_name_is_one_line_before_anything_runs(tmp_path):
    for wrong, words in (("gropo", "did you mean grpo"), ("zzz", "there are pretrain, sft")):
        with pytest.raises(UserError, match=words) as caught:
            pipeline.main(replace(config(tmp_path / "new"), only=("sft", wrong)))
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_only_runs_what_is_needed_and_keeps_the_report_of_the_others(out, ran, small):
    pipeline.main(config(out))
    before = state_of(out)
    shutil.rmtree(out / "grpo")
    shutil.rmtree(out / "kto")
    rows = pipeline.main(replace(config(out), only=("grpo",)))
    assert (out / "grpo" / "ckpt.pt").exists() and not (out / "kto").exists()
    assert len(rows) == 15 and len(json.loads((out / "report.json").read_text())) == 15
    pipeline.main(config(out))
    assert {name for name, when in state_of(out).items() if before[name] != when} == {"grpo", "kto"}


def test_the_time_left_follows_the_stages_of_today_and_those_of_the_last_time(tmp_path):
    a, b, c = (replace(stage, config=None) for stage in REAL_STAGES(pipeline.Config(out="o"))[:3])
    (tmp_path / "times.json").write_text(json.dumps({"pretrain": 10.0, "sft": 20.0, "reward": 600.0}))
    times = pipeline.Times(tmp_path, quick=False)
    assert times.left([c]) == "about 10 min left" and times.left([a, b]) == "about 30 s left"
    times.note(a, 20.0, whole=False)  # it went on from its middle: that says nothing
    assert times.left([c]) == "about 10 min left"
    times.note(a, 20.0, whole=True)  # twice as slow as the last time
    assert times.left([c]) == "about 20 min left"
    assert json.loads((tmp_path / "times.json").read_text())["pretrain"] == 20.0
    (tmp_path / "times.json").write_text("{")
    assert pipeline.Times(tmp_path, quick=False).left([c]) == "about 4 min left"  # the table of the file


@pytest.mark.slow
def test_the_quick_pipeline_runs_as_a_script(tmp_path):
    command = [sys.executable, "pipeline.py", "--quick", "--out", str(tmp_path / "q"), "--device", "cpu"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| GRPO |" in done.stdout and "| GDPO |" in done.stdout
    assert {"report.md", "report.json", "curves.png"} <= {path.name for path in (tmp_path / "q").iterdir()}
