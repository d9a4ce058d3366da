"""rollouts.jsonl: what a run writes down of some answers, token by token, and that it changes nothing else."""

import json
import math
import random
import statistics

import pytest
import torch
from tiny import assert_exact_resume, but_slow, rows_of, same, tiny_pretrain, tiny_sft

import dpo
import gdpo
import grpo
import kto
import ppo
import pretrain
import sft
import watch
from runtime import rollouts
from runtime.folder import cut_back
from runtime.rollouts import (
    answer_of,
    checked,
    choose_groups,
    is_kept,
    longest,
    prompt_of,
    read_all,
    records_in,
    texts_of,
)
from stages import load_stage
from tokenizer import BPETokenizer, ByteTokenizer
from transformer import token_logps

RL = {"grpo": grpo, "gdpo": gdpo, "ppo": ppo}
PAIRS = {"dpo": dpo, "kto": kto, "simpo": dpo, "ipo": dpo}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("before")
    pretrain.main(tiny_pretrain(root / "pretrain", steps=60, lr=5e-3, eval_every=60, save_every=60))
    sft.main(tiny_sft(root / "sft", root / "pretrain", n_examples=96, epochs=8.0, lr=5e-3, eval_every=100))
    return root / "sft"


def config_of(stage: str, folder, start, **changes):
    common = {"out_dir": str(folder), "init_from": str(start), "eval_every": 2, "save_every": 1, "device": "cpu"}
    if stage in RL:
        common |= {
            "steps": 5,
            "prompts_per_step": 4,
            "n_prompts": 64,
            "eval_prompts": 8,
            "micro_batch_size": 8,
            "lr": 1e-3,
        }
        common |= {} if stage == "ppo" else {"group_size": 4, "beta": 0.05}
        return RL[stage].Config(**(common | changes))
    common |= {"data": "arith", "n_pairs": 16, "epochs": 2.0, "batch_size": 8, "eval_pairs": 8, "eval_prompts": 4}
    common |= {"max_length": 96, "lr": 1e-3} | ({} if stage == "kto" else {"method": stage})
    return PAIRS[stage].Config(**(common | changes))


def main_of(stage: str):
    return (RL | PAIRS)[stage].main


@pytest.fixture(scope="module")
def made(start, tmp_path_factory):
    """The folder of a run of each stage, by its name; made when it is asked for."""

    class Folders(dict):
        def __missing__(self, stage: str):
            self[stage] = tmp_path_factory.mktemp(stage)
            main_of(stage)(config_of(stage, self[stage], start))
            return self[stage]

    return Folders()


def logps_of(path, prompt: list[int], ids: list[int], temperature: float = 1.0) -> list[float]:
    """The log-probabilities of an answer's tokens under the model of a checkpoint, computed on its own."""
    model, _, _ = load_stage(str(path))
    with torch.no_grad():
        found = token_logps(model, torch.tensor([prompt + ids]), temperature)[0]
    return found[len(prompt) - 1 :].tolist()


def close(one: list, other: list, within: float = 2e-3) -> bool:
    return len(one) == len(other) and all(abs(a - b) < within for a, b in zip(one, other))


@pytest.mark.parametrize("stage", but_slow(RL, "grpo", "ppo"))
def test_what_is_written_is_what_the_method_saw(made, start, stage):
    records = read_all(made[stage] / "rollouts.jsonl")
    assert [record["step"] for record in records] == [1, 2, 4, 5]
    _, tokenizer, _ = load_stage(str(start))
    last = records[-1]
    assert last["stage"] == stage and last["clip"] == [0.8, 1.2] and last["kind"] == "groups"
    answers = [(group, answer) for group in last["groups"] for answer in group["answers"]]
    assert len(answers) == (4 if stage == "ppo" else 16)
    for group, answer in answers:
        prompt = group["prompt"][0]
        assert group["question"] in "".join(group["prompt"][1]) and group["gold"]
        assert "".join(answer["texts"]) == tokenizer.decode(answer["ids"]) and answer["mask"] == [1] * len(
            answer["ids"]
        )
        assert (answer["ids"][-1] in tokenizer.end_ids) == answer["finished"]
        assert close(answer["now"], logps_of(made[stage], prompt, answer["ids"]))  # after the last update
        assert close(answer["ref"], logps_of(start, prompt, answer["ids"]))
        assert close(answer["old"], answer["sampled"])
        total = sum(weight * answer["rewards"][name] for name, weight in last["weights"].items())
        assert answer["reward"] == pytest.approx(total, abs=1e-3)
    assert any(not close(answer["now"], answer["old"], 1e-3) for _, answer in answers)  # and updates moved something


@pytest.mark.parametrize("stage", but_slow(("grpo", "gdpo"), "grpo"))
def test_a_group_s_advantages_are_those_of_its_rewards(made, stage):
    for record in read_all(made[stage] / "rollouts.jsonl"):
        for group in record["groups"]:
            rewards = torch.tensor([answer["reward"] for answer in group["answers"]])
            ours = [answer["advantage"] for answer in group["answers"]]
            if stage == "grpo":
                assert close(ours, grpo.group_advantages(rewards, 4).tolist())
            assert (max(rewards) == min(rewards)) <= (not any(ours))


def test_ppo_writes_an_advantage_and_a_value_for_every_token(made):
    answers = [a for record in read_all(made["ppo"] / "rollouts.jsonl") for g in record["groups"] for a in g["answers"]]
    assert all(len(a["values"]) == len(a["advantages"]) == len(a["ids"]) for a in answers)
    assert all(value == 0 for value in answers[0]["values"])  # the critic's head starts at zero
    assert len(set(answers[-1]["values"])) > 1


@pytest.mark.parametrize("stage", but_slow(PAIRS, "dpo", "kto"))
def test_preferences_are_written_with_the_implicit_reward_of_every_token(made, start, stage):
    records = read_all(made[stage] / "rollouts.jsonl")
    last, config = records[-1], config_of(stage, "", start)
    beta = last["beta"]
    assert beta == (dpo.BETAS[stage] if stage != "kto" else config.beta) and last["kind"] == "preferences"
    assert [[group["prompt"] for group in record["groups"]] for record in records] == (
        [[group["prompt"] for group in last["groups"]]] * len(records)
    )  # always the same
    assert {group["part"] for group in last["groups"]} == {"training", "held out"}
    labels = {answer["label"] for group in last["groups"] for answer in group["answers"]}
    assert labels <= ({"chosen", "rejected"} if stage != "kto" else {"chosen", "rejected", "desirable", "undesirable"})
    for group in last["groups"]:
        for answer in group["answers"]:
            assert close(answer["now"], logps_of(made[stage], group["prompt"][0], answer["ids"]))
            gains = answer["now"]
            if stage != "simpo":
                assert close(answer["ref"], logps_of(start, group["prompt"][0], answer["ids"]))
                gains = [now - ref for now, ref in zip(answer["now"], answer["ref"])]
            total = beta * sum(gains) / (len(gains) if last["averaged"] else 1)
            assert answer["reward"] == pytest.approx(total, abs=0.01 * beta)
    assert last["averaged"] == (stage in ("simpo", "ipo")) and ("ref" in answer) == (stage != "simpo")


@pytest.mark.parametrize("stage", but_slow((*RL, "dpo", "kto"), "grpo"))
def test_a_run_that_was_stopped_writes_the_same_lines(tmp_path, monkeypatch, start, made, stage):
    whole, stopped = (config_of(stage, tmp_path / name, start) for name in ("whole", "stopped"))
    assert_exact_resume(monkeypatch, (RL | PAIRS)[stage], whole, stopped, saves=3)
    lines = (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    assert (tmp_path / "stopped" / "rollouts.jsonl").read_bytes() == lines
    assert lines == (made[stage] / "rollouts.jsonl").read_bytes()


@pytest.mark.parametrize("stage", but_slow(("ppo", "grpo", "dpo"), "grpo"))
def test_writing_changes_no_number_of_training(tmp_path, monkeypatch, start, made, stage):
    monkeypatch.setattr(watch, "append", lambda folder, record: pytest.fail("it should write nothing"))
    monkeypatch.setattr(watch, "is_kept", lambda *step: False)
    main_of(stage)(config_of(stage, tmp_path, start))
    assert not (tmp_path / "rollouts.jsonl").exists()
    with_, without = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (made[stage], tmp_path))
    for name in ("model", "optimizers", "rng", "step", "extra", "best"):
        same(with_[name], without[name], name)
    steady = [[{k: v for k, v in row.items() if k in ("step", "loss", "reward", "grad_norm", "accuracy", "kl_old")}
               for row in rows_of(folder)] for folder in (made[stage], tmp_path)]  # fmt: skip
    assert steady[0] == steady[1]


# ----------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(("steps", "every"), [(1, 50), (140, 20), (7, 1), (5000, 1), (10**6, 20), (10**6, 999_999)])
def test_a_run_of_any_length_writes_a_bounded_number_of_lines(steps, every):
    candidates = {0, steps - 1, *range(every - 1, steps, every)}
    kept = [step for step in sorted(candidates) if is_kept(step, steps, every)]
    assert kept[0] == 0 and kept[-1] == steps - 1 and len(kept) <= rollouts.RECORDS + 2
    if steps / every > 2 * rollouts.RECORDS:
        assert len(kept) > rollouts.RECORDS / 2


def test_long_answers_are_cut_and_counted():
    tokens, mask = torch.arange(3000) % 256, torch.zeros(2999)
    mask[9:2990] = 1
    answer = answer_of(ByteTokenizer(), tokens, mask.bool(), longest(24), now=torch.arange(2999.0))
    assert longest(24) == len(answer["ids"]) == len(answer["texts"]) == len(answer["now"]) < 200
    assert answer["more"] == 2981 - longest(24) and answer["ids"][0] == tokens[10] and answer["now"][0] == 9.0
    ids, texts = prompt_of(ByteTokenizer(), tokens, (torch.arange(2999) > 2000))
    assert len(ids) == len(texts) == rollouts.PROMPT and ids[-1] == tokens[2001]
    whole = answer_of(ByteTokenizer(), tokens[:20], mask[:19].bool(), 64)
    assert "more" not in whole and len(whole["ids"]) == 10


def test_what_the_policy_did_not_write_is_kept_with_a_mask_of_0():
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()
    answer = answer_of(ByteTokenizer(), torch.arange(65, 73), mask, 64, now=mask.float())
    assert answer["texts"] == list("CDEFG") and answer["mask"] == [1, 1, 0, 0, 1]
    assert answer["now"] == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_groups_are_taken_as_long_as_there_is_room():
    assert choose_groups([[5] * 64] * 9, [False] * 9) == [0]  # a record has at least one group
    assert len(choose_groups([[5] * 4] * 64, [False] * 64)) == 6
    assert len(choose_groups([[5]] * 64, [False] * 64)) == rollouts.GROUPS
    assert choose_groups([[5] * 4] * 8, [True] * 7 + [False]) == [0, 1, 2, 3, 4, 7]
    assert choose_groups([[5] * 4] * 8, [True] * 8) == [0, 1, 2, 3, 4, 5]
    assert choose_groups([[3000, 10], [3000, 10], [10, 10]], [False] * 3) == [0]


def test_a_character_of_several_tokens_is_written_once():
    assert texts_of(ByteTokenizer(), "é€".encode()) == ["", "é", "", "", "€"]
    assert texts_of(ByteTokenizer(), "a€".encode()[:-1]) == ["a", "", "\ufffd"]
    tokenizer = BPETokenizer.train(["low lower lowest"] * 3, 268)
    assert "".join(texts_of(tokenizer, tokenizer.encode("lowest é"))) == "lowest é"


def test_lines_after_the_checkpoint_and_half_a_line_are_forgotten(tmp_path):
    lines = [json.dumps({"step": step, "kind": "groups", "groups": []}) + "\n" for step in (1, 2, 4)]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines) + '{"step": 5, "kind": "gro')
    assert [record["step"] for record in read_all(tmp_path / "rollouts.jsonl")] == [1, 2, 4]
    cut_back(tmp_path, 2)
    assert (tmp_path / "rollouts.jsonl").read_text() == "".join(lines[:2])
    (tmp_path / "other").mkdir()
    cut_back(tmp_path / "other", 2)
    assert not (tmp_path / "other" / "rollouts.jsonl").exists()  # a stage that samples nothing gets none


DAMAGED = [
    b"", b"\n", b"not json\n", b"[1, 2]\n", b'{"step": 1}\n', b'{"step": true, "kind": "groups"}\n',
    b'{"step": -1, "kind": "groups", "groups": []}\n', b'{"step": 3, "kind": "groups", "groups": 7}\n',
    b'{"step": 3, "kind": "other", "groups": []}\n', b'{"step": 3, "kind": "groups", "groups": [null, 3, {}]}\n',
    b'{"step": 4, "kind": "groups", "groups": [{"answers": [{"ids": [1, 2], "texts": ["a"]}]}]}\n',
    b'{"step": 4, "kind": "groups", "groups": [{"answers": [{"ids": ["x"], "texts": ["a"]}]}]}\n',
    b'{"step": 5, "kind": "groups", "groups": [{"answers": [{"ids": [1], "texts": [5], "now": [NaN], "old": ["x"],'
    b' "ref": [1, 2], "reward": Infinity, "rewards": {"a": null, "b": "c"}}]}]}\n',
    b'{"step": 6, ' + b"[" * 5000 + b"\n", b"\xff\xfe\x00\n", b'{"step": 7, "kind": "groups", "weights": [1]}\n',
]  # fmt: skip


def test_what_anyone_may_have_written_is_read_as_numbers_and_texts_or_not_at_all(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    random.seed(0)
    for _ in range(50):
        path.write_bytes(b"".join(random.sample(DAMAGED, len(DAMAGED))))
        for record in read_all(path):
            json.dumps(record, allow_nan=False)
            for group in record["groups"]:
                for answer in group["answers"]:
                    assert len(answer["ids"]) == len(answer["texts"]) == len(answer["mask"])
                    assert all(isinstance(text, str) for text in answer["texts"])
                    assert all(len(answer[name]) == len(answer["ids"]) for name in rollouts.SERIES if name in answer)
    path.write_bytes(DAMAGED[12])
    (answer,) = read_all(path)[0]["groups"][0]["answers"]
    assert answer["now"] == [None] and answer["old"] == [None] and "ref" not in answer and answer["reward"] is None
    assert answer["texts"] == ["5"] and answer["rewards"] == {"a": None, "b": None}
    assert checked({"step": 10**30, "kind": "groups"}) is None


def test_a_line_that_is_too_long_is_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "LINE", 100)
    path, line = tmp_path / "rollouts.jsonl", b'{"step": 1, "kind": "groups", "groups": []}\n'
    path.write_bytes(b'{"step": 2, "kind": "' + b"x" * 300 + b'"}\n' + line)
    assert [step for step, _, _ in records_in(path)] == [1] and len(read_all(path)) == 1


def test_numbers_without_a_value_become_null():
    assert rollouts.numbers_of(torch.tensor([1.23456, math.nan, -math.inf])) == [1.2346, None, None]


def test_what_is_said_of_a_group_is_about_all_of_its_answers():
    """Twenty-eight answers, of which there is room for twenty-four: mean, std and size are those of all."""
    group = {"size": 28, "mean": 0.5, "std": 0.1, "equal": False, "answers": []}
    record = {"step": 1, "kind": "groups", "groups": [group, {"answers": []}, {"size": -1, "mean": "x", "answers": []}]}
    first, second, third = rollouts.checked(record)["groups"]
    assert (first["size"], first["mean"], first["std"], first["equal"]) == (28, 0.5, 0.1, False)
    assert (second["size"], second["mean"], second["equal"]) == (0, None, False)
    assert (third["size"], third["mean"]) == (0, None)
    answer = {"ids": [1], "texts": ["a"], "counts": False, "kl": 2.5, "ratio": 1.1}
    (shown,) = rollouts.checked({"step": 1, "kind": "groups", "groups": [{"answers": [answer]}]})["groups"][0][
        "answers"
    ]
    assert (shown["counts"], shown["kl"], shown["ratio"]) == (False, 2.5, 1.1)


def test_a_cut_off_answer_is_said_to_be_left_out_and_the_whole_answer_is_counted(tmp_path, start):
    """With mask_truncated and few tokens some answers are cut off and out of the loss; KL and ratio are
    those of whole answers, by the numbers of their tokens."""
    config = config_of("grpo", tmp_path / "run", start, mask_truncated=True, max_new_tokens=20, beta=0.1, steps=2)
    grpo.main(config)
    answers, finished = 0, set()
    for record in rollouts.read_all(tmp_path / "run" / rollouts.NAME):
        for group in record["groups"]:
            assert group["size"] == config.group_size == len(group["answers"])
            totals = [one["reward"] for one in group["answers"]]
            assert group["mean"] == pytest.approx(statistics.fmean(totals), abs=1e-3)
            assert group["std"] == pytest.approx(statistics.stdev(totals), abs=1e-3)
            assert group["equal"] == (len(set(totals)) == 1)
            for one in group["answers"]:
                answers += 1
                finished.add(one["finished"])
                assert one["counts"] == one["finished"]
                strayed = sum(a - b for a, b in zip(one["old"], one["ref"]))
                moved = statistics.fmean(a - b for a, b in zip(one["now"], one["old"]))
                assert one["kl"] == pytest.approx(strayed, abs=2e-3)
                assert one["ratio"] == pytest.approx(math.exp(moved), abs=2e-3)
    assert answers and False in finished
