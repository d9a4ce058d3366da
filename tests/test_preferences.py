import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_pretrain

import dpo
import preferences
import pretrain
from preferences import (
    Judged,
    Pair,
    dialogue,
    encode_judged,
    encode_pairs,
    fit,
    has_labels,
    held_out_of,
    lay_out,
    load_held_out_pairs,
    load_judged,
    load_pairs,
    own_pairs,
    sample_pairs,
    sources,
)
from runtime.errors import UserError
from stages import load_stage
from texts import load_prompts
from tokenizer import ByteTokenizer, encode_chat

T = ByteTokenizer()


def hh(*turns: str) -> str:
    return "".join(f"\n\n{who}: {said}" for who, said in zip(["Human", "Assistant"] * 9, turns))


def mirror(tmp_path, rows, place="Anthropic__hh-rlhf/harmless-base", split="train"):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(folder / f"{split}.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(tmp_path)


FILLER = {"chosen": hh("x", "y"), "rejected": hh("x", "z")}  # row 0 is for validation


def test_each_source_has_its_share_of_the_held_out_pairs(tmp_path):
    """And not the first one all of them."""
    names = []
    for letter, n in (("a", 6), ("b", 3), ("c", 1)):
        row = {"prompt": letter, "chosen": "x", "rejected": "y"}
        names.append(str(tmp_path / f"{letter}.jsonl"))
        Path(names[-1]).write_text("".join(json.dumps(row) + "\n" for _ in range(n)))
    for most, expected in ((5, "abcab"), (100, "abcabaaaab")):
        found = load_held_out_pairs(SimpleNamespace(data_dir="", columns=()), names, "whole", most)
        assert sorted(pair.prompt[0]["content"] for pair in found) == sorted(expected)


def test_hh_dialogues_become_a_prompt_and_two_answers(tmp_path):
    row = {"chosen": hh("Hi", "Hello", "How?", "So."), "rejected": hh("Hi", "Hello", "How?", "Go away.")}
    (pair,) = load_pairs("hh-harmless", "train", mirror(tmp_path, [FILLER, row]))
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]
    assert [m["content"] for m in pair.prompt] == ["Hi", "Hello", "How?"]
    assert (pair.chosen, pair.rejected) == ("So.", "Go away.")


def test_ultrafeedback_messages(tmp_path):
    def messages(text):
        return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]

    row = {"prompt": "Q", "chosen": messages("good"), "rejected": messages("bad"), "score_chosen": 8.0}
    place = "HuggingFaceH4__ultrafeedback_binarized"
    (pair,) = load_pairs("ultrafeedback", "train", mirror(tmp_path, [row, row], place, "train_prefs"))
    assert pair == Pair(({"role": "user", "content": "Q"},), "good", "bad")


def test_what_cannot_be_used_is_counted(tmp_path, capsys):
    rows = [
        FILLER,
        {"chosen": hh("a", "same"), "rejected": hh("a", "same")},
        {"chosen": hh("a", "same "), "rejected": hh("a", " same")},
        {"chosen": hh("a", ""), "rejected": hh("a", "x")},
        {"chosen": hh("a", "x"), "rejected": hh("other", "y")},
        {"chosen": hh("a", "x", "and?"), "rejected": hh("a", "x", "and!")},
        {"chosen": hh("a", "good"), "rejected": hh("a", "bad")},
    ]
    (pair,) = load_pairs("hh-harmless", "train", mirror(tmp_path, rows))
    assert pair.chosen == "good"
    out = capsys.readouterr().out
    assert "skipped 5" in out and "2 with two equal answers" in out and "1 with an empty answer" in out
    assert "1 whose answers have different prompts" in out and "1 whose dialogue does not end in an answer" in out


def test_splits_share_no_row(tmp_path):
    rows = [{"chosen": hh(f"q{i}", "x"), "rejected": hh(f"q{i}", "y")} for i in range(120)]
    folder = mirror(tmp_path, rows)
    mirror(tmp_path, rows[:3], split="test")
    train, held = (
        {p.prompt[0]["content"] for p in load_pairs("hh-harmless", s, folder)} for s in ("train", "validation")
    )
    assert held == {"q0", "q50", "q100"} and len(train) == 117 and not train & held
    assert len(load_pairs("hh-harmless", "test", folder)) == 3


def test_a_file_of_pairs_written_and_read_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "pairs.jsonl"
    monkeypatch.setattr("sys.argv", ["preferences.py", "--n", "60", "--write", str(path)])
    preferences.main()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == 60 and set(written[0]) == {"prompt", "chosen", "rejected", "flaw"}
    pairs = load_pairs(str(path), "train")
    assert pairs == load_pairs("arith", "train", n=60)[1:50] + load_pairs("arith", "train", n=60)[51:]


def test_a_file_with_plain_prompts_and_with_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 3 == 0} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert has_labels(str(path))
    judged = load_judged(str(path), "train")
    assert len(judged) == 9 and sum(one.desirable for one in judged) == 3
    with pytest.raises(UserError, match="no column chosen, rejected"):
        load_pairs(str(path), "train")


def test_both_answers_of_a_pair_become_single_ones():
    pairs, judged = load_pairs("arith", "train", n=20), load_judged("arith", "train", n=20)
    assert sorted(one.answer for one in judged if one.desirable) == sorted(pair.chosen for pair in pairs)
    assert sorted(one.answer for one in judged if not one.desirable) == sorted(pair.rejected for pair in pairs)
    labels = [one.desirable for one in judged]
    assert labels != sorted(labels, reverse=True)  # mixed


def even_is_right(texts, golds, finished):
    """Of an untrained policy's answers: right if their length is even."""
    return torch.tensor([float(len(text) % 2 == 0) for text in texts]), torch.ones(len(texts))


@pytest.fixture
def untrained(tmp_path):
    """The folder of a policy that says anything; its answers end after some tokens, or not at all."""
    pretrain.main(tiny_pretrain(tmp_path / "base", steps=2, save_every=100, max_seq_len=384))
    state = torch.load(tmp_path / "base" / "ckpt.pt", weights_only=True)
    state["model"]["head.weight"].mul_(0.1)  # all tokens are about equally likely
    torch.save(state, tmp_path / "base" / "ckpt.pt")
    return str(tmp_path / "base")


def test_own_pairs_are_a_right_and_a_wrong_whole_answer_to_one_question(untrained, monkeypatch):
    seen = []

    def score(texts, golds, finished):
        seen.append((texts, golds, finished))
        return even_is_right(texts, golds, finished)

    monkeypatch.setattr(preferences, "score", score)
    policy, tokenizer, _ = load_stage(untrained)
    prompts = load_prompts("arith", "train", n=30)
    pairs = sample_pairs(policy, tokenizer, prompts, n=6, max_new=200, size=60, show=False)
    asked = {prompt.messages[0]["content"]: prompt.gold for prompt in prompts}
    sampled = {}  # question -> its six answers
    for texts, golds, finished in seen:
        assert len(texts) == len(golds) == len(finished)
        for i in range(0, len(texts), 6):
            question = list(asked)[len(sampled)]
            assert golds[i : i + 6] == [asked[question]] * 6
            sampled[question] = [text for text, whole in zip(texts[i : i + 6], finished[i : i + 6]) if whole]
    assert any(len(texts) < 6 for texts in sampled.values())  # some were cut off
    expected = []
    for question, texts in sampled.items():
        right, wrong = ([text for text in texts if len(text) % 2 == odd] for odd in (0, 1))
        expected += [(question, a, b) for a, b in zip(right, wrong)]
    assert [(pair.prompt[0]["content"], pair.chosen, pair.rejected) for pair in pairs] == expected
    assert len(expected) > len({question for question, _, _ in expected}) > 10
    again = sample_pairs(policy, tokenizer, prompts, n=6, max_new=200, size=60, show=False)
    assert again == pairs != sample_pairs(policy, tokenizer, prompts, n=6, max_new=200, size=60, seed=1, show=False)


def test_own_pairs_are_written_by_a_command_and_dpo_learns_from_them(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preferences, "score", even_is_right)
    path, command = tmp_path / "own.jsonl", ["preferences.py", "--policy", untrained, "--n", "40", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--write", str(path), "--max_new_tokens", "200"])
    preferences.main()
    assert "40 questions, 4 answers each" in capsys.readouterr().out
    assert all(pair.flaw == "own" for pair in load_pairs(str(path), "train"))
    figures = dpo.main(
        dpo.Config(
            data=str(path), eval_data="arith", init_from=untrained, out_dir=str(tmp_path / "dpo"), epochs=0.1,
            batch_size=2, eval_pairs=6, eval_prompts=4, device="cpu", max_length=256,
        )
    )  # fmt: skip
    assert set(figures) > {"val_accuracy", "val_logp_chosen"}
    rows = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert "val_questions" in rows[0]  # held-out questions of the embedded task, although the pairs are a file's
    monkeypatch.setattr(preferences, "score", lambda texts, *_: (torch.zeros(len(texts)), None))
    with pytest.raises(UserError, match="no question both a right and a wrong answer"):
        preferences.main()


def test_own_pairs_are_sampled_once_until_the_policy_changes(untrained, monkeypatch):
    asked, folder = [], Path(untrained)
    policy, tokenizer, _ = load_stage(untrained)
    pair = Pair(({"role": "user", "content": "2+3?"},), "5", "6", "own")
    monkeypatch.setattr(preferences, "sample_pairs", lambda *args: asked.append(args) or [pair])
    assert sources("arith+hh-helpful") == ["arith", "hh-helpful"]
    data = sources("arith+own", own_pairs(policy, tokenizer, untrained, 3))
    assert data == ["arith", str(folder / "own_pairs_ckpt_3.jsonl")]
    assert asked[0] == (policy, tokenizer, load_prompts("arith", "train", seed=3), 4, 48, 3)
    assert load_pairs(data, "validation") == [*load_pairs("arith", "validation"), pair]
    assert own_pairs(policy, tokenizer, untrained, 3) == data[1] and len(asked) == 1
    named = own_pairs(policy, tokenizer, str(folder / "ckpt.pt"), 4)
    assert named == str(folder / "own_pairs_ckpt_4.jsonl")
    (folder / "best.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    best = own_pairs(policy, tokenizer, str(folder / "best.pt"), 3)
    assert best == str(folder / "own_pairs_best_3.jsonl") and len(asked) == 3  # not ckpt's
    later = (folder / "own_pairs_ckpt_3.jsonl").stat().st_mtime + 5
    os.utime(folder / "ckpt.pt", (later, later))
    own_pairs(policy, tokenizer, untrained, 3)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "chosen": "b"}\n' * 2, "no column rejected"),
        ('{"prompt": "a", "chosen": "b", "rejec\n', "line 1: not JSON"),
        ("[1]\n", "line 1: not an object"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2, "no usable pair"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        load_pairs(str(tmp_path / "x.jsonl"), "train")
    with pytest.raises(UserError, match="there is no file"):
        load_pairs(str(tmp_path / "y.jsonl"), "train")


def test_dialogue_keeps_line_breaks_and_colons():
    text = "\n\nHuman: a: b\n\nc\n\nAssistant: d\n\nHuman:\n\nAssistant: e"
    assert [m["content"] for m in dialogue(text)] == ["a: b\n\nc", "d", "", "e"]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_a_row_is_the_chat_template_and_the_mask_its_loss_mask():
    """The layout of pairs and that of SFT must be the same, or the reference is asked about another text."""
    prompt = (
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "what?"},
        {"role": "user", "content": "5"},
    )
    rows = encode_pairs([Pair(prompt, "yes", "no")], T, 64)
    tokens, mask, real = rows.batch([0])
    for row, answer in enumerate(("yes", "no")):
        ids, _ = encode_chat(T, [*prompt, {"role": "assistant", "content": answer}])
        assert tokens[row, : len(ids)].tolist() == ids and (tokens[row, len(ids) :] == T.pad_id).all()
        assert real[row].tolist() == [True] * len(ids) + [False] * (tokens.shape[1] - len(ids))
        counted = [ids[t + 1] for t in range(len(ids) - 1) if mask[row, t]]
        assert counted == T.encode(answer) + [T.eot_id]  # the end-of-text too, nothing of the prompt


def test_the_layout_by_hand():
    tokens, mask, real = lay_out([[1, 2], [3]], [[7, 8], [9]], pad_id=0)
    assert tokens.tolist() == [[1, 2, 7, 8], [3, 9, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert real.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_an_answer_may_contain_the_padding_id():
    tokens, mask, real = lay_out([[1]], [[0, 5, 0]], pad_id=0)
    assert mask.int().tolist() == [[1, 1, 1]] and bool(real.all())


def test_truncation_takes_the_beginning_of_the_prompt_and_the_same_for_both():
    prompt, answers = fit(list(range(100)), [[1] * 10, [2] * 6], length=32)
    assert prompt == list(range(78, 100)) and [len(a) for a in answers] == [10, 6]


def test_only_what_still_does_not_fit_loses_its_end():
    prompt, answers = fit(list(range(100)), [[1] * 50, [2] * 6], length=32)
    assert prompt == list(range(92, 100)) and [len(a) for a in answers] == [24, 6]
    assert all(len(prompt) + len(a) <= 32 for a in answers)


def test_pairs_that_truncation_makes_identical_are_left_out_and_counted(capsys):
    question = ({"role": "user", "content": "q" * 60},)
    far = Pair(question, "a" * 40 + "x", "a" * 40 + "y")  # they differ behind the cut
    near = Pair(question, "x" + "a" * 40, "y" + "a" * 40)
    rows = encode_pairs([far, near], T, 32)
    assert len(rows) == 1 and rows.pairs == [near] and rows.chosen[0] != rows.rejected[0]
    out = capsys.readouterr().out
    assert "1 identical after truncation" in out and "1 with the beginning of the prompt cut" in out
    with pytest.raises(UserError, match="no pair is left"):
        encode_pairs([far], T, 32)


def test_a_mismatched_row_has_the_answer_of_another_prompt():
    judged = [Judged(({"role": "user", "content": c},), c.upper(), True) for c in "abc"]
    rows = encode_judged(judged, T, 32)
    tokens, mask, _ = rows.mismatched([0, 2])
    said = [
        "".join(T.decode([int(t)]) for t, m in zip(row[1:], counts) if m and t != T.eot_id)
        for row, counts in zip(tokens, mask)
    ]
    assert said == ["C", "B"]
    assert ["a" in T.decode(tokens[0].tolist()), "c" in T.decode(tokens[1].tolist())] == [True, True]


def test_no_row_is_longer_than_asked_whatever_answer_it_gets():
    """A short answer leaves much of its prompt; the long answer of the row before it must not come on top of that."""
    long, short = "x" * 60, "y"
    judged = [Judged(({"role": "user", "content": "q" * 200},), a, True) for a in (long, short, long, short)]
    rows = encode_judged(judged, T, 96)
    for tokens, mask, real in (rows.batch(range(4)), rows.mismatched(range(4))):
        assert tokens.shape[1] == 96 and int(real.sum(dim=1).max()) == 96
        assert mask.sum(dim=1).min() == 2 and mask.sum(dim=1).max() == 61  # no answer was cut


def test_parts_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b.jsonl").write_text('{"prompt": "q", "chosen": "x", "rejected": "y"}\n')
    assert len(load_pairs("a+b.jsonl", "validation")) == 1 and not has_labels("a+b.jsonl")
    assert len(load_pairs(["arith", "a+b.jsonl"], "validation")) == 513
    for data in ("own", "arith+own"):
        assert held_out_of(dpo.Config(data=data)) == (["arith"], "validation")
    assert held_out_of(dpo.Config(data="hh-helpful+own")) == (["hh-helpful", "arith"], "validation")
    assert held_out_of(dpo.Config(data="a.jsonl", eval_data="b.jsonl")) == (["b.jsonl"], "whole")


def test_batches_of_pairs_have_the_chosen_answers_first():
    rows = encode_pairs(load_pairs("arith", "train", n=6), T, 256)
    tokens, mask, _ = rows.batch([4, 1])
    assert tokens.shape[0] == 4 and mask.dtype == torch.bool
    for row, (i, answers) in enumerate([(4, rows.chosen), (1, rows.chosen), (4, rows.rejected), (1, rows.rejected)]):
        assert tokens[row, 1:][mask[row]].tolist() == answers[i]
