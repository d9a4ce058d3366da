"""Data and rewards of the user's own, in every stage."""

import csv
import gzip
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import start, tiny_grpo  # noqa: F401  (a fixture)
from tiny import but_slow, tiny_pretrain, tiny_sft

import dpo
import encoder
import evaluate
import gdpo
import grpo
import kto
import ppo
import pretrain
import rollout as rollout_module
import runtime.errors
import sft
import watch
from preferences import Judged, Pair, encode_judged, has_labels, load_judged, load_pairs
from rollout import Questions, Rollout, own_rewards, own_weights, total_reward
from runtime import runs
from runtime.checkpoint import load_checkpoint
from runtime.config import parse
from runtime.errors import RewardError, UserError
from runtime.rows import column_names, describe_held_out, evaluate_command, few, is_own, own_rows, stamps
from texts import Prompt, load_chats, load_prompts, text_documents
from tokenizer import ByteTokenizer
from verify import call_reward, correctness_reward, extract_text, format_reward, load_rewards, read_gold

T = ByteTokenizer()


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_a_file_is_split_into_every_fiftieth_row_and_the_rest_or_used_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"i": i} for i in range(120)])
    train, held, whole = ([row["i"] for row in own_rows(path, s)] for s in ("train", "validation", "whole"))
    assert held == [0, 50, 100] and len(train) == 117 and not set(held) & set(train) and whole == list(range(120))


def test_compressed_files_and_tables_are_read_too(tmp_path):
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y\nz"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["a", "b"])
        table.writeheader()
        table.writerows(rows)
    assert list(own_rows(str(tmp_path / "a.jsonl.gz"), "whole")) == rows
    assert list(own_rows(str(tmp_path / "a.csv"), "whole")) == [{"a": "1", "b": "x"}, {"a": "2", "b": "y\nz"}]


def test_a_table_of_texts_stays_what_it_is(tmp_path):
    """No cell becomes a number or nothing because of what stands in another one."""
    (tmp_path / "q.csv").write_text("\ufeffprompt,answer\na,5\nb,\nc,00123\nd,NA\n", encoding="utf-8")
    rows = list(own_rows(str(tmp_path / "q.csv"), "whole"))
    assert [row["answer"] for row in rows] == ["5", None, "00123", "NA"] and rows[0]["prompt"] == "a"
    (tmp_path / "l.csv").write_text("prompt,completion,label\n" + "a,b,1\n" * 2 + "a,c,false\n")
    assert [one.desirable for one in load_judged(str(tmp_path / "l.csv"), "whole")].count(True) == 2


def test_a_dataset_of_the_hub_is_named_by_its_id_configuration_and_split(tmp_path):
    write(tmp_path / "org__data" / "train.jsonl", [{"x": "plain"}])
    write(tmp_path / "org__data" / "small" / "train.jsonl", [{"x": "small"}])
    write(tmp_path / "org__data" / "small" / "dev.jsonl", [{"x": "dev"}])
    for name, x in (("org/data", "plain"), ("org/data:small", "small"), ("org/data:small:dev", "dev")):
        assert is_own(name) and list(own_rows(name, "whole", str(tmp_path))) == [{"x": x}]
    with pytest.raises(UserError, match="org/name:config:split"):
        next(own_rows("org/data:a:b:c", "whole", str(tmp_path)))


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "2+3?", "final": "#### 5", "note": 1}] * 2)
    prompt = load_prompts(path, "test", rename=("prompt=q", "answer=final"))[0]
    assert prompt.messages == said("2+3?") and prompt.gold == 5 and prompt.row["note"] == 1
    with pytest.raises(UserError, match="has no column z for prompt; it has q, final, note"):
        load_prompts(path, "test", rename=("prompt=z",))
    with pytest.raises(UserError, match="write meaning=column"):
        load_prompts(path, "test", rename=("prompt",))


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "null", '{"a": ', "1" * 5000, "[" * 100_000])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not "):
        list(own_rows(str(path), "whole"))


# ----------------------------------------------------------------------------------------------------------------------
# What rows mean


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]},
        {"instruction": "Hi", "input": "", "output": "Yo"},
        {"instruction": "Hi", "output": "Yo"},
    ],
)
def test_every_form_of_a_chat(tmp_path, row):
    path = write(tmp_path / "chats.jsonl", [row] * 3)
    chat = [*said("Hi"), {"role": "assistant", "content": "Yo"}]
    assert load_chats(path, "train") == [chat] * 2 and load_chats(path, "whole") == [chat] * 3
    assert (
        load_chats(f"arith+{path}", "train", n=2)[2:] == [chat] * 2 or load_chats(f"arith+{path}", "train")[-1] == chat
    )


def test_chats_that_cannot_be_used_are_counted(tmp_path, capsys):
    good = {"prompt": "a", "completion": "b"}
    bad = [
        {"prompt": "a", "completion": ""}, {"prompt": None, "completion": "b"}, {"messages": "text"},
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user", "content": "x"}]},
    ]  # fmt: skip
    assert len(load_chats(write(tmp_path / "c.jsonl", [good, good, *bad]), "train")) == 1
    assert "skipped 5" in capsys.readouterr().out
    with pytest.raises(UserError, match="no column messages"):
        load_chats(write(tmp_path / "d.jsonl", [{"text": "x"}] * 2), "train")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(7, Decimal(7)), (7.5, Decimal("7.5")), ("1,080", Decimal(1080)), ("so #### 3", Decimal(3)), ("Paris", ("Paris",)),
     (["a", "b"], ("a", "b")), (True, ("True",))],
)  # fmt: skip
def test_reference_answers(answer, gold):
    assert read_gold(answer) == gold


def test_a_minus_is_a_minus():
    assert read_gold("\N{MINUS SIGN}3") == -3 and read_gold(10**400) == 10**400


@pytest.mark.parametrize("answer", [None, float("nan"), {}, [], "", [1, 2], " . "])
def test_what_is_no_reference_answer(answer):
    with pytest.raises(UserError):
        read_gold(answer)


def test_questions_with_choices(tmp_path):
    rows = [{"prompt": "Sky?", "choices": ["red", "blue"], "answer": answer} for answer in ("B", 1, "blue", "green", 2)]
    prompts = load_prompts(write(tmp_path / "q.jsonl", rows), "whole")
    assert [prompt.gold for prompt in prompts] == [("B", "blue")] * 3
    odd = [{"text": ["red"], "label": ["A"]}, "red, blue", [], None]
    rows = [{"prompt": "Sky?", "choices": choices, "answer": "A"} for choices in odd]
    rows += [{"prompt": "?", "choices": ["True", "False"], "answer": True}]
    rows += [{"prompt": "?", "choices": [4, 5, 6], "answer": 5}, {"prompt": "?", "choices": [3, 2, 1], "answer": 1}]
    found = load_prompts(write(tmp_path / "odd.jsonl", rows), "whole")
    assert [prompt.gold for prompt in found] == [("A", "True"), ("B", "5"), ("B", "2")]
    assert prompts[0].messages == said("Sky?\nA. red\nB. blue")
    for text, right in (("b", 1), ("Blue.", 1), ("A", 0), ("B or A", 0), ("", 0)):
        assert correctness_reward(f"<think>x</think><answer> {text} </answer>", prompts[0].gold) == right
    assert correctness_reward("B", prompts[0].gold) == 0  # outside the form nothing counts
    assert (
        format_reward("<think>x</think><answer>Q</answer>", ("B",)) == 1 and extract_text("<answer>B</answer>") is None
    )


def test_questions_as_messages_leave_the_last_answer_to_the_policy(tmp_path):
    chat = [*said("a"), {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*chat, *said("c")]}, {"messages": chat}, {"question": "d"}, {"prompt": ""}]
    prompts = load_prompts(write(tmp_path / "q.jsonl", rows), "whole")
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["c", "a", "d"]
    assert prompts[0].gold is None and len(prompts[0].messages) == 3


def test_preferences_in_trls_forms(tmp_path):
    good, bad = ([*said("Q"), {"role": "assistant", "content": text}] for text in ("yes", "no"))
    rows = [
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": list(said("Q")), "chosen": good[-1:], "rejected": bad[-1:]},
        {"chosen": good, "rejected": bad},
        {"chosen": "\n\nHuman: Q\n\nAssistant: yes", "rejected": "\n\nHuman: Q\n\nAssistant: no"},
        {"chosen": good, "rejected": [*said("other"), bad[-1]]},
    ]
    assert load_pairs(write(tmp_path / "p.jsonl", rows), "whole") == [Pair(said("Q"), "yes", "no")] * 4


def test_held_out_data_that_is_named_is_used_whole(tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(60)])
    labels = write(tmp_path / "l.jsonl", [{"prompt": f"{i}", "completion": "a", "label": True} for i in range(60)])
    for split, n in (("whole", 60), ("test", 60), ("validation", 2), ("train", 58)):
        assert len(load_pairs(pairs, split)) == n and len(load_judged(labels, split)) == n
    assert has_labels(labels) and not has_labels(pairs)


def test_pretraining_and_preferences_hold_out_the_same_rows_of_hh(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: q{i}\n\nAssistant: x", "rejected": f"\n\nHuman: q{i}\n\nAssistant: y"}
        for i in range(120)
    ]
    write(tmp_path / "Anthropic__hh-rlhf" / "harmless-base" / "train.jsonl", rows)
    text = "".join(text_documents("hh-harmless", "train", str(tmp_path)))
    for pair in load_pairs("hh-harmless", "validation", str(tmp_path)):
        assert f"Human: {pair.prompt[0]['content']}\n" not in text


def test_answers_that_a_cut_makes_contradict_each_other_are_left_out(capsys):
    long = "x" * 80
    judged = [Judged(said("q"), long + "a", True), Judged(said("q"), long + "b", False), Judged(said("q"), "c", True)]
    rows = encode_judged(judged, T, 32)
    assert len(rows) == 1 and rows.desirable.tolist() == [True]
    assert "2 of opposite labels, identical after truncation (left out)" in capsys.readouterr().out
    assert len(encode_judged(judged, T, 256)) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def reward_file(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def some_rollout(texts: list[str]) -> Rollout:
    n = len(texts)
    mask = torch.ones(n, 3, dtype=torch.bool)
    return Rollout(torch.zeros(n, 4, dtype=torch.long), mask, mask.float(), texts, torch.arange(n) > 0)


def test_each_public_function_of_a_file_is_a_reward(tmp_path):
    path = reward_file(
        tmp_path / "r.py",
        "import json\nfrom verify import format_reward\n"
        "def long(prompt, answer, row): return len(answer) + len(prompt) + 10 * row['bonus'] + 100 * row['finished']\n"
        "def known(prompt, answer, row): return None if answer == 'b' else 1\n"
        "def _helper(): pass\n",
    )
    assert list(load_rewards(path)) == ["long", "known"]
    asked = [SimpleNamespace(messages=said("qq"), row={"bonus": b}) for b in (1, 2)]
    rewards = own_rewards(some_rollout(["aaa", "b"]), asked, path)
    assert rewards["long"].tolist() == [3 + 2 + 10, 1 + 2 + 20 + 100]
    assert rewards["known"][0] == 1 and math.isnan(rewards["known"][1])
    config = SimpleNamespace(reward=path, reward_weights=("long=0.5",))
    assert own_weights(config) == {"long": 0.5, "known": 1.0}
    assert total_reward(rewards, own_weights(config)).tolist() == [7.5 + 1, 61.5]  # what is unknown adds nothing
    assert total_reward({"known": rewards["known"]}, {"known": 1.0}).isnan().tolist() == [False, True]


def test_a_reward_of_no_weight_does_not_make_an_answer_known():
    rewards = {"a": torch.tensor([1.0, math.nan]), "b": torch.zeros(2)}
    assert total_reward(rewards, {"a": 1.0, "b": 0.0}).isnan().tolist() == [False, True]
    assert total_reward(rewards, {"a": 1.0, "b": 1.0}).tolist() == [1.0, 0.0]


def test_means_of_rewards_are_over_the_answers_for_which_they_are_known(monkeypatch):
    """Of all processes: here another one that knows three answers of four, all worth 1."""
    rollout = some_rollout(["a", "b", "c", "d"])
    figures = watch.describe(rollout, {"own": torch.tensor([4.0, math.nan, math.nan, math.nan])})
    other = watch.describe(rollout, {"own": torch.tensor([1.0, 1.0, 1.0, math.nan])})

    def both(sums):
        names = [name for name in other if name not in ("answers", "known answers")]
        counts = torch.tensor([other["known answers"].get(name, 4.0) for name in names] + [4.0], dtype=torch.float64)
        values = torch.tensor([other[name] for name in names] + [1.0], dtype=torch.float64)
        return sums + torch.stack([values * counts, counts])

    monkeypatch.setattr(watch.processes, "sum_over_processes", both)
    means = watch.mean_over_answers(figures)
    assert means["own"] == pytest.approx((4 + 3) / 4) and means["answers"] == 8 and means["length"] == 3


def test_a_reward_that_judges_nothing_is_said_to_be_unknown(tmp_path, start, capsys):  # noqa: F811
    """Not to be 0: neither in the figures, where JSON has null for it, nor on the last line."""
    text = "def dumb(prompt, answer, row): return None\ndef dull(prompt, answer, row): return 1.0"
    path = reward_file(tmp_path / "r.py", text)
    settings = {"data": questions(tmp_path), "reward": path, "steps": 1}
    config = tiny_grpo(tmp_path / "run", start, **settings)
    grpo.main(config)
    out = capsys.readouterr().out
    assert "dumb nan" in out and "the reward dumb judged none of the answers" in out
    assert "earn the same (on average 1.000)" in out and "ask something harder" in out
    assert "held-out dumb unknown" in out and "held-out dull 1.000" in out
    rows = [json.loads(line) for line in Path(config.out_dir, "metrics.jsonl").read_text().splitlines()]
    assert {row["dumb"] for row in rows if "dumb" in row} == {None}
    assert {row["val_dumb"] for row in rows if "val_dumb" in row} == {None}
    assert {row["dull"] for row in rows if "dull" in row} == {1.0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return row['price']", r"failed in line 2 of .*r.py \(KeyError: 'price'\)"),
        ("import json\n    return json.loads(answer)['a']", r"failed in line 3 of .*r.py \(JSONDecodeError"),
        ("return {}", "returned '{}', which is no number"),
        ("return 'much'", "returned 'much', which is no number"),
        ("return 1e999", "is infinite"),
        ("return 10**400", "which is no number"),
    ],
)
def test_a_faulty_reward_is_told_with_its_line(tmp_path, body, message):
    path = reward_file(tmp_path / "r.py", f"def f(prompt, answer, row):\n    {body}\n")
    with pytest.raises(RewardError, match=message):
        call_reward("f", load_rewards(path)["f"], "q", "no", {})


def test_a_reward_that_fails_in_a_decorator_from_elsewhere_is_told_without_a_line(tmp_path, monkeypatch):
    deco = "def strict(f):\n    @functools.wraps(f)\n    def g(*a):\n        raise ValueError('no')\n    return g\n"
    (tmp_path / "deco.py").write_text("import functools\n" + deco)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = reward_file(
        tmp_path / "r.py", "from deco import strict\n@strict\ndef f(prompt, answer, row):\n    return 1\n"
    )
    with pytest.raises(RewardError, match=r"the reward f failed \(ValueError: no\)"):
        call_reward("f", load_rewards(path)["f"], "q", "no", {})


def test_a_meaning_with_a_slip_of_the_pen_is_refused():
    assert column_names(("answer=final", "price=cost")) == {"answer": "final", "price": "cost"}  # price: of a reward
    for pair, meant in (("prompts=question", "prompt"), ("anwser=final", "answer"), ("choosen=good", "chosen")):
        with pytest.raises(UserError, match=f"did you mean {meant}"):
            column_names((pair,))


def test_hints_at_columns_point_to_the_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"ask": "2+3?", "reply": "5"}] * 3)
    with pytest.raises(UserError, match="no column aks for prompt; it has ask, reply; did you mean prompt=ask"):
        load_chats(path, "whole", rename=("prompt=aks", "completion=reply"))
    with pytest.raises(UserError, match="no column prompt for note; .* it is meaning=column: did you mean prompt=note"):
        load_chats(path, "whole", rename=("note=prompt",))


def test_a_row_without_the_columns_is_counted_and_not_the_end(tmp_path, capsys):
    chats = [{"prompt": "2+3?", "completion": "5"}] * 4
    path = write(tmp_path / "a.jsonl", [*chats, {"msgs": "x"}, {"prompt": "x"}, *chats])
    assert len(load_chats(path, "whole")) == 8 and "2 without the columns" in capsys.readouterr().out
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    assert len(load_pairs(write(tmp_path / "p.jsonl", [*pairs, {"chosen": "b"}]), "whole")) == 2
    assert len(load_prompts(write(tmp_path / "q.jsonl", [{"prompt": "a"}, {"text": "b"}]), "whole")) == 1
    with pytest.raises(UserError, match="has no column prompt; it has text"):  # if all lack it, that is what is said
        load_prompts(write(tmp_path / "q.jsonl", [{"text": "b"}, {"text": "b"}]), "whole")
    with pytest.raises(UserError, match="has no rows"):
        load_chats(write(tmp_path / "empty.jsonl", []), "whole")


def test_a_name_that_is_no_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    write(tmp_path / "mine/chats.jsonl", [{"prompt": "a", "completion": "b"}])
    for name in ("mine/chats.jsnl", "./mine/chats.jsnl", "mine/chat.jsonl"):
        with pytest.raises(UserError, match="there is no file .*mine/chats.jsnl; did you mean mine/chats.jsonl|"
                           "there is no file mine/chat.jsonl; did you mean mine/chats.jsonl"):  # fmt: skip
            load_chats(name, "whole")
    with pytest.raises(UserError, match="mine/ is a folder|mine is a folder"):
        load_chats("./mine", "whole")


def test_texts_that_are_no_utf8_are_refused(tmp_path):
    for data, message in (
        ("Jürgen".encode("latin1"), "no UTF-8 text"),
        ("a".encode("utf-16"), "no UTF-8"),
        (b"a\0b", "null"),
    ):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(UserError, match=message):
            list(text_documents(str(tmp_path / "a.txt"), "whole"))
    (tmp_path / "a.txt").write_bytes("\ufeffJürgen".encode())
    assert list(text_documents(str(tmp_path / "a.txt"), "whole")) == ["Jürgen"]


def test_a_run_is_not_continued_on_other_data(tmp_path, start, capsys):  # noqa: F811
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(60)]
    path = write(tmp_path / "chats.jsonl", rows)
    config = tiny_sft(tmp_path / "run", start, data=path)
    sft.main(config)
    sft.main(config)
    write(tmp_path / "chats.jsonl", rows[:-1])
    with pytest.raises(UserError, match="holds a run on .*chats.jsonl as it was then"):
        sft.main(config)
    sft.main(replace(config, fresh=True))
    assert load_checkpoint(tmp_path / "run")["finished"]


def test_only_the_files_that_a_run_reads_are_remembered(tmp_path, monkeypatch):
    """Not what lies in the working directory, other runs' samples among it, nor a folder with a corpus's name."""
    monkeypatch.chdir(tmp_path)
    for name in ("samples.txt", "books/a.txt", "mine/b.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("text")
    write(tmp_path / "a+b.jsonl", [{"text": "a"}])
    given = {"arith": set(), "books": set(), "mine/": {"mine/"}, "a+b.jsonl": {"a+b.jsonl"}, "arith+mine/": {"mine/"}}
    for data, expected in given.items():
        assert set(stamps(SimpleNamespace(data=data, eval_data=""))) == expected
    before = stamps(SimpleNamespace(data="mine/", eval_data="a+b.jsonl"))
    Path("samples.txt").write_text("more")
    assert stamps(SimpleNamespace(data="mine/", eval_data="a+b.jsonl")) == before and len(before) == 2
    Path("mine/b.txt").write_text("test")  # as long as before
    assert stamps(SimpleNamespace(data="mine/", eval_data="a+b.jsonl")) != before


def test_runs_beside_each_other_do_not_disturb_a_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("other", "run", "other2", "run"):
        pretrain.main(tiny_pretrain(Path(name), steps=2))
    assert "data" in load_checkpoint("run") and load_checkpoint("run")["data"] == {}


def test_a_source_without_the_columns_is_an_error_beside_another_one(tmp_path):
    good = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    one, two = write(tmp_path / "a.jsonl", good), write(tmp_path / "b.jsonl", [{"x": 1}] * 3)
    with pytest.raises(UserError, match="b.jsonl has no column messages"):
        load_chats(f"{one}+{two}", "whole")


def test_a_mirror_is_read_though_a_folder_has_the_name_of_its_organisation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mirror/acme__x").mkdir(parents=True)
    Path("acme").mkdir()
    write(tmp_path / "mirror/acme__x/train.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    assert len(load_chats("acme/x", "whole", "mirror")) == 3


def test_joined_texts_are_examined_as_texts(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 50)
    path = write(tmp_path / "b.jsonl", [{"text": "words"}] * 3)
    for data in (
        f"{tmp_path}/a.txt+{path}",
        f"{path}+{tmp_path}/a.txt",
        f"arith+{tmp_path}/a.txt",
        "books+tinystories",
    ):
        assert evaluate.kind_of(evaluate.Config(data=data)) == "text"
    assert evaluate.kind_of(evaluate.Config(data="gsm8k+dolly")) == "references"


def test_a_failed_start_leaves_no_folder(tmp_path, start, capsys):  # noqa: F811
    config = tiny_sft(tmp_path / "run", start, data=write(tmp_path / "a.jsonl", [{"text": "x"}] * 3))
    with pytest.raises(SystemExit):
        runtime.errors.run_main(lambda: sft.main(config))
    assert not (tmp_path / "run").exists()
    good = replace(config, data=write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}] * 60))
    sft.main(good)
    with pytest.raises(SystemExit):
        runtime.errors.run_main(lambda: sft.main(replace(good, data=config.data)))
    assert load_checkpoint(tmp_path / "run")["finished"]  # a run that is there stays


def test_a_stage_on_the_embedded_task_after_ones_own_data_is_warned_of(tmp_path, start, capsys):  # noqa: F811
    data = write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}] * 60)
    sft.main(tiny_sft(tmp_path / "own", start, data=data))
    assert "this is the embedded task" not in capsys.readouterr().out
    grpo.main(tiny_grpo(tmp_path / "run", str(tmp_path / "own"), steps=1))
    assert f"learned from {data}; this is the embedded task" in capsys.readouterr().out


def test_a_run_that_made_the_model_worse_says_so(tmp_path, monkeypatch):
    config = SimpleNamespace(reward="verifier")
    asked = Questions.__new__(Questions)
    asked.config = config
    run = SimpleNamespace(at_start=lambda name: {"accuracy": 0.5}[name])
    assert asked.summary({"accuracy": 0.4}, run) == (
        "held-out accuracy 0.400 (WARNING: worse than before the first step, 0.500)"
    )
    assert asked.summary({"accuracy": 0.5}, run) == "held-out accuracy 0.500"


def test_the_banner_says_that_few_rows_are_held_out():
    assert few(20) == few(0) == "" and "a single one of the 2 is 50 %" in few(2)
    config = SimpleNamespace(data="a/b", eval_data="")
    assert describe_held_out(config, 200) == "; held out: every 50th row" and "few" in describe_held_out(config, 3)


def test_a_question_is_shown_with_what_was_said_before_it():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    asked = Prompt([*messages, {"role": "user", "content": "2+3?"}], None, {})
    shown = watch.render(asked, some_rollout(["5"]), {"own": torch.ones(1)})
    assert shown.splitlines() == ["user: Hi", "assistant: Yes?", "question: 2+3?", "own 1, cut off: 5"]


def test_gdpo_weighs_a_users_rewards_as_he_says(tmp_path):
    """Also those that have the names of its own."""
    text = "def short(prompt, answer, row): return 1.0\ndef integer(prompt, answer, row): return 1.0"
    config = gdpo.Config(reward=reward_file(tmp_path / "r.py", text), reward_weights=("short=0.1", "integer=5"))
    weights = gdpo.weights_of(config)
    assert weights["short"] == 0.1 and weights["integer"] == 5


def test_a_decorated_function_is_a_reward_too(tmp_path):
    path = reward_file(tmp_path / "r.py", "import torch\n@torch.no_grad()\ndef f(prompt, answer, row): return 2.0")
    assert load_rewards(path)["f"]("", "", {}) == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function"),
        ("def f(a): pass", "should take three arguments"),
        ("1/0", "does not run: ZeroDivisionError"),
        ("def f(:", "does not run: SyntaxError"),
        ("def length(prompt, answer, row): return 1.0", "logs a figure called length; call the reward length_reward"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path, text, message):
    path = reward_file(tmp_path / "r.py", text)
    with pytest.raises(UserError, match=message):
        grpo.check(grpo.Config(reward=path))


@pytest.mark.parametrize("weight", ["none=1", "f=x", "f=nan", "f", "f=0"])
def test_weights_that_cannot_be_meant_are_refused(tmp_path, weight):
    path = reward_file(tmp_path / "r.py", "def f(prompt, answer, row): return 1.0")
    with pytest.raises(UserError):
        grpo.check(grpo.Config(reward=path, reward_weights=(weight,)))
    with pytest.raises(UserError, match="for the functions of a file"):
        grpo.check(grpo.Config(reward_weights=("f=1",)))
    with pytest.raises(UserError, match="ppo.py"):
        grpo.check(grpo.Config(reward="out/arith/reward"))


def test_an_unknown_reward_teaches_nothing_and_makes_no_group_teach():
    nan = math.nan
    rewards = {"a": torch.tensor([1.0, nan, nan, nan, 1.0, 0.0])}
    assert grpo.groups_that_teach(rewards, {"a": 1.0}, 2).tolist() == [False, False, True]
    table = torch.tensor([[1.0, nan], [1.0, nan]])
    assert watch.distinct_advantages(table, torch.tensor([0.5, -0.5]), 2) == 1.0


LETTER = """
def letter(prompt, answer, row):
    return answer.count("e") / max(1, len(answer))

def known(prompt, answer, row):
    return float("nan") if len(answer) % 3 == 0 else 0.0
"""


def questions(tmp_path) -> str:
    rows = [{"prompt": f"Say {i}", "tag": i} for i in range(60)]
    return write(tmp_path / "questions.jsonl", rows)


@pytest.mark.parametrize("stage", but_slow([grpo, gdpo, ppo], grpo))
def test_a_stage_learns_from_rewards_of_ones_own_and_unlearns_with_their_sign(tmp_path, start, stage):  # noqa: F811
    """Without any answer to compare with; samples, evaluations and the best checkpoint follow the reward."""
    path, data, ends = reward_file(tmp_path / "r.py", LETTER), questions(tmp_path), []
    for sign in (1, -1):
        settings = {
            "init_from": str(start), "data": data, "reward": path, "steps": 12, "prompts_per_step": 16, "lr": 2e-3,
            "warmup": 1, "eval_every": 6, "max_new_tokens": 12, "device": "cpu", "n_prompts": 32, "beta": 0.0,
            "out_dir": str(tmp_path / f"run{sign}"), "reward_weights": (f"letter={sign}",),
        }  # fmt: skip
        if stage is ppo:  # which needs a score for every answer
            settings |= {
                "reward": reward_file(tmp_path / "p.py", LETTER.split("\ndef known")[0]),
                "prompts_per_step": 64,
            }
        figures = stage.main(stage.Config(**settings))
        rows = [json.loads(line) for line in (tmp_path / f"run{sign}" / "metrics.jsonl").read_text().splitlines()]
        held = [row["val_letter"] for row in rows if "val_letter" in row]
        assert figures["val_letter"] == pytest.approx(held[-1]) and len(held) == 3
        ends.append((rows[1]["letter"], [row["letter"] for row in rows if "letter" in row][-1]))
        best = torch.load(tmp_path / f"run{sign}" / "best.pt", weights_only=True)
        assert best["best"] == pytest.approx(
            max(row["val_reward"] for row in rows if "val_reward" in row and row["step"])
        )
        told = runs.read_figures(tmp_path / f"run{sign}" / "metrics.jsonl")["best"]
        assert told.startswith("reward of greedy answers, held out")
    (before, risen), (_, fallen) = ends
    assert risen > before + 0.02 and fallen < before - 0.02
    assert "letter 0" in (tmp_path / "run1" / "samples.txt").read_text()


def test_a_preset_that_holds_its_rewards(tmp_path, start):  # noqa: F811
    """Its functions are the rewards, its assignments the settings; the same command continues."""
    settings = {
        "init_from": str(start), "data": questions(tmp_path), "out_dir": str(tmp_path / "run"), "device": "cpu",
        "steps": 2, "prompts_per_step": 8, "minibatches": 1, "epochs": 1, "max_new_tokens": 12, "eval_every": 1,
        "n_prompts": 32, "eval_prompts": 8,
    }  # fmt: skip
    path = tmp_path / "grpo_mine.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()) + "\n\n" + LETTER)
    config = parse(grpo.Config, [str(path)])
    assert config == grpo.Config(**settings, reward=str(path))
    figures = grpo.main(config)
    names = {f"val_{name}" for name in ("reward", *load_rewards(str(path)))}
    assert set(figures) == names and "val_letter" in names
    assert grpo.main(parse(grpo.Config, [str(path)])) == pytest.approx(figures, nan_ok=True)


@pytest.mark.parametrize("eval_every", [100, 2])
def test_a_reward_that_fails_ends_the_run_after_a_save(tmp_path, start, monkeypatch, capsys, eval_every):  # noqa: F811
    """In one line, be it in a rollout or in an evaluation; and the same command goes on, to the same weights, bit for
    bit."""
    data = questions(tmp_path)
    failing = LETTER.replace("return answer", "if FAIL.exists(): raise KeyError('price')\n    return answer")
    failing = f"from pathlib import Path\nFAIL = Path({str(tmp_path / 'fail')!r})\n" + failing
    path = reward_file(tmp_path / "r.py", failing)
    settings = {
        "data": data,
        "reward": path,
        "steps": 4,
        "save_every": 100,
        "eval_every": eval_every,
        "max_new_tokens": 8,
    }
    grpo.main(tiny_grpo(tmp_path / "whole", start, **settings))
    real, calls = rollout_module.own_rewards, []

    def own(*args):
        calls.append(1)
        (tmp_path / "fail").touch() if len(
            calls
        ) == 4 else None  # the first examination, and three rollouts, or two and another one
        return real(*args)

    monkeypatch.setattr(grpo, "own_rewards", own)
    monkeypatch.setattr(rollout_module, "own_rewards", own)
    config = tiny_grpo(tmp_path / "stopped", start, **settings)
    with pytest.raises(SystemExit):
        runtime.errors.run_main(lambda: grpo.main(config))
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].startswith("error: the reward letter failed")
    assert "saved after 2 steps; the same command continues" in said.out
    state = torch.load(tmp_path / "stopped" / "ckpt.pt", weights_only=True)
    assert state["step"] == 2 and not state["finished"]
    assert {float(one["step"]) for one in state["optimizers"][0]["state"].values()} == {2.0}
    with pytest.raises(
        RewardError, match=r"reward letter failed in line \d+ of .* \(KeyError: 'price'\) on the answer .* to .*'tag'"
    ):
        grpo.main(config)
    (tmp_path / "fail").unlink()
    monkeypatch.undo()
    grpo.main(config)
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_questions_without_answers_want_a_reward(tmp_path, start):  # noqa: F811
    with pytest.raises(UserError, match="no answer to compare with"):
        grpo.main(tiny_grpo(tmp_path / "run", start, data=questions(tmp_path)))


def test_in_16_bits_another_temperature_does_not_go_unnoticed(tmp_path, start, monkeypatch):  # noqa: F811
    """Its gap of 0.02 nats would pass for the rounding of 16 bits."""
    config = tiny_grpo(tmp_path / "run", start, precision="bf16", steps=1, max_new_tokens=12)
    grpo.main(config)
    sample = watch.sample_answers

    def warmer(model, tokenizer, prompts, n, max_new, temperature, seed, **knobs):
        return sample(model, tokenizer, prompts, n, max_new, 1.2 * temperature, seed, **knobs)

    monkeypatch.setattr(watch, "sample_answers", warmer)
    with pytest.raises(AssertionError, match="not the policy that sampled"):
        grpo.main(tiny_grpo(tmp_path / "other", start, precision="bf16", steps=1, max_new_tokens=12))


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def test_a_folder_of_data_leads_to_a_policy_and_every_next_command_is_about_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts.jsonl", [{"text": f"Tom says {i} and then {i + 1}. " * 4} for i in range(200)])
    write(tmp_path / "chats.jsonl", [{"prompt": f"After {i}?", "completion": f"{i + 1}"} for i in range(120)])
    pairs = [{"prompt": f"After {i}?", "chosen": f"{i + 1}", "rejected": "no"} for i in range(60)]
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "questions.jsonl", [{"q": f"After {i}?", "answer": i + 1} for i in range(60)])
    reward_file(tmp_path / "r.py", "def short(prompt, answer, row): return float(len(answer) < 5)")
    base = tiny_pretrain(tmp_path / "base", data="texts.jsonl", task="mine", out_dir="", max_documents=None)
    pretrain.main(base)
    assert "python sft.py --task mine --data CHATS.jsonl" in capsys.readouterr().out
    sft.main(tiny_sft("", "out/mine/pretrain", data="chats.jsonl", task="mine", out_dir="", n_examples=None))
    out = capsys.readouterr().out
    assert "chats.jsonl: 117 conversations" in out and "held out: every 50th row" in out
    assert "--task mine --data QUESTIONS.jsonl" in out and "arith" not in out
    small = {"task": "mine", "device": "cpu", "eval_every": 100, "save_every": 100}
    dpo.main(dpo.Config(data="pairs.jsonl", **small))
    told = capsys.readouterr().out
    assert "python evaluate.py out/mine/sft out/mine/dpo --data pairs.jsonl --split validation" in told
    kto.main(kto.Config(data="pairs.jsonl", eval_data="pairs.jsonl", **small))
    config = grpo.Config(
        data="questions.jsonl",
        columns=("prompt=q",),
        reward="r.py",
        steps=1,
        prompts_per_step=4,
        max_new_tokens=8,
        **small,
    )
    grpo.main(config)
    told = capsys.readouterr().out
    command = evaluate_command(config, "out/mine/grpo", "questions.jsonl").replace("  ", f" {'out/mine/sft'} ")
    assert command in told and "--columns prompt=q --reward r.py" in command and "--data arith" not in told
    monkeypatch.setattr("sys.argv", command.split()[1:] + ["--device", "cpu"])
    evaluate.main()
    table = capsys.readouterr().out
    assert "| reward | 95 % interval | short |" in table and table.count("| 2 |") == 2
    row = evaluate.measure("out/mine/sft", evaluate.Config(data="chats.jsonl", split="validation", device="cpu"))
    assert row["n"] == 3 and "rouge_l" in row
    row = evaluate.measure("out/mine/sft", evaluate.Config(data="questions.jsonl", columns=("prompt=q",), device="cpu"))
    assert row["n"] == 60 and row["accuracy"] == 0
    row = evaluate.measure("out/mine/dpo", evaluate.Config(data="pairs.jsonl", device="cpu"))
    assert row["n"] == 60
    assert "bits_per_byte" in evaluate.measure("out/mine/sft", evaluate.Config(data="texts.jsonl", n=5, device="cpu"))


def test_columns_that_a_row_has_besides_do_not_hide_the_conversation(tmp_path):
    chat = [*said("Hi"), {"role": "assistant", "content": "Yo"}]
    both = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "prompt_id": "x", "messages": chat}])
    assert load_chats(both, "whole") == [chat]
    better = write(tmp_path / "b.jsonl", [{"instruction": "Hi", "output": "no", "better": "Yo"}])
    assert load_chats(better, "whole", rename=("prompt=instruction", "completion=better")) == [chat]


def test_a_file_that_was_mended_is_read_again(tmp_path):
    short = [{"text": "x"}] + [{"text": "some words " * 40}] * 40
    path = write(tmp_path / "t.jsonl", short)
    config = tiny_pretrain(tmp_path / "run", data=path, tokenizer="bytes")
    with pytest.raises(UserError, match="the validation split has 2 tokens"):
        pretrain.main(config)
    write(tmp_path / "t.jsonl", short[1:])
    assert math.isfinite(pretrain.main(config)["val_loss"])


def test_a_classifier_is_validated_on_what_was_named(tmp_path):
    """Also where the data has splits of its own, and where the held-out data is known by name."""
    config = encoder.Config(data="arith", eval_data="arith")
    texts = encoder.labelled_texts(config, "validation", T, 64, False)
    assert len(texts) == 512
    rows = [{"text": f"{i}", "label": label} for i in range(4) for label in ("more", "not more", None)]
    config = encoder.Config(data="arith", eval_data=write(tmp_path / "l.jsonl", rows))
    for split in ("validation", "test"):
        assert len(encoder.labelled_texts(config, split, T, 64, False)) == 8
    with pytest.raises(ValueError, match="train, validation, test, larger or longer"):
        encoder.arithmetic.problems(1, 0, "whole")


def test_what_data_asks_for_is_seen_in_its_columns(tmp_path):
    path = reward_file(tmp_path / "r.py", LETTER)

    def kind(row, **more):
        return evaluate.kind_of(evaluate.Config(data=write(tmp_path / "x.jsonl", [row]), **more))

    assert kind({"prompt": "q", "answer": 1, "text": "context"}) == "answers"
    assert kind({"prompt": "q", "text": "context"}, reward=path) == "answers"
    assert kind({"text": "x"}) == "text" and kind({"prompt": "q", "completion": "a"}) == "references"
    assert kind({"messages": "hello"}) == kind({"messages": [1]}) == kind({"conversations": {"a": 1}}) == "answers"
    with pytest.raises(UserError, match="a reward model is for ppo.py"):
        evaluate.need_all([], evaluate.Config(reward="out/arith/reward"))


def test_nothing_is_examined_if_one_checkpoint_is_missing(tmp_path, start, monkeypatch, capsys):  # noqa: F811
    measured = []
    monkeypatch.setattr(evaluate, "measure", lambda *args: measured.append(args))
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(start), str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="there is no checkpoint in .*nowhere"):
        evaluate.main()
    assert not measured


def test_a_validation_split_that_is_too_short_is_found_before_the_first_step(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "x"}] + [{"text": "some words " * 40}] * 40)
    with pytest.raises(UserError, match="the validation split has 2 tokens, fewer than one window of 65"):
        pretrain.main(tiny_pretrain(tmp_path / "run", data=path, tokenizer="bytes"))
    assert not (tmp_path / "run" / "ckpt.pt").exists()
    config = tiny_pretrain(tmp_path / "other", data=path, eval_data=path, tokenizer="bytes")
    assert math.isfinite(pretrain.main(config)["val_loss"])


def test_a_classifier_learns_labels_of_ones_own(tmp_path):
    rows = [{"words": f"{word} {i}", "label": word} for i in range(100) for word in ("cat", "dog", "emu")]
    path = write(tmp_path / "labels.jsonl", rows)
    settings = {"columns": ("text=words",), "d_model": 32, "n_layers": 1, "n_heads": 2, "epochs": 4.0, "lr": 5e-3}
    settings |= {"data": path, "device": "cpu", "vocab_size": 300, "out_dir": str(tmp_path / "run"), "batch_size": 16}
    figures = encoder.main(encoder.Config(**settings))
    assert figures["val_accuracy"] == figures["test_accuracy"] == 1.0
    assert encoder.load_classifier(str(tmp_path / "run"))[2] == ("cat", "dog", "emu")
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": 1}] * 9)
    with pytest.raises(UserError, match="fewer than two labels"):
        encoder.main(encoder.Config(data=one, device="cpu", out_dir=str(tmp_path / "other")))


def test_a_batch_in_which_no_word_was_hidden_moves_nothing(tmp_path, monkeypatch):
    """Weight decay and momentum would."""
    steps = []
    real = encoder.update
    monkeypatch.setattr(encoder, "update", lambda *args: steps.append(1) or real(*args))
    monkeypatch.setattr(encoder, "fill_in", lambda *args: {"val_accuracy": 0.0, "val_loss": 0.0})
    settings = {"objective": "mlm", "d_model": 32, "n_layers": 1, "n_heads": 2, "n_texts": 8, "epochs": 1.0}
    settings |= {"device": "cpu", "vocab_size": 300, "batch_size": 4, "hide": 1e-9}
    encoder.main(encoder.Config(out_dir=str(tmp_path / "run"), **settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not steps and rows[0]["loss"] == 0 and rows[0]["grad_norm"] == 0


def test_sft_counts_the_conversations_that_it_trains_on(tmp_path, start, capsys):  # noqa: F811
    rows = [{"prompt": "a", "completion": "b" * (900 if i % 2 else 3)} for i in range(21)]
    sft.main(
        tiny_sft(tmp_path / "run", start.parent / "pretrain", data=write(tmp_path / "c.jsonl", rows), n_examples=None)
    )
    assert "10 conversations in" in capsys.readouterr().out


def test_the_last_step_is_logged_and_a_tie_is_half_right(tmp_path, start):  # noqa: F811
    settings = {"init_from": str(start), "data": "arith", "n_pairs": 64, "log_every": 100, "device": "cpu"}
    dpo.main(dpo.Config(out_dir=str(tmp_path / "run"), eval_pairs=16, eval_prompts=2, **settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 4]
    same = dpo.reward_figures(torch.zeros(2, 4), torch.zeros(2, 4))
    assert same["accuracy"] == 2.0


def test_labels_of_one_kind_end_without_an_accuracy(tmp_path, start, capsys):  # noqa: F811
    rows = [{"prompt": f"{i}?", "completion": "x", "label": i % 2 == 0} for i in range(40)]
    held = write(tmp_path / "held.jsonl", [{"prompt": "1?", "completion": "x", "label": True}] * 3)
    data = write(tmp_path / "l.jsonl", rows)
    out = str(tmp_path / "run")
    kto.main(kto.Config(init_from=str(start), data=data, eval_data=held, device="cpu", out_dir=out))
    told = capsys.readouterr().out
    assert "held-out answers: loss" in told and "nan" not in told


@pytest.mark.slow
def test_the_example_of_the_page_learns_what_its_rewards_ask_for(tmp_path, monkeypatch):
    """The commands of docs/yours.md, one after the other: fine-tuning learns the mistake, the reward mends it."""
    root = Path(__file__).parent.parent
    monkeypatch.chdir(tmp_path)
    block = re.search(r"\n\n((?:    .*\n)+)", (root / "docs" / "yours.md").read_text())[1].replace("\\\n", " ")
    for line in block.strip().splitlines():
        words = shlex.split(line, comments=True)
        words = [str(root / word) if word.endswith(".py") else word for word in words[1:]]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr[-2000:])
        if words[0].endswith("evaluate.py"):
            table = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in done.stdout.splitlines()[2:]}
    assert table["sft"] < 0.2 and table["grpo"] > 1.5
    assert json.loads(done.stdout) == {"plums": 8, "keys": 3}  # what chat.py says at the end
