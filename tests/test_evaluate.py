import json
import math
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from conftest import load_json
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_pretrain

import evaluate
import pretrain
from data import encode_prompts
from evaluate import majority_vote, pass_at_k, rouge_l, wilson_interval
from texts import load_prompts
from tokenizer import ByteTokenizer, encode_chat
from transformer import token_logps


@pytest.mark.parametrize("case", load_json("eval_pass_at_k.json")["pass_at_k"], ids=str)
def test_pass_at_k_is_that_of_human_eval(case):
    assert pass_at_k(case["n"], case["c"], case["k"]) == pytest.approx(case["pass_at_k"], rel=1e-9, abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_naive_formula_is_not():
    n, c, k = 4, 1, 2  # two answers of four: of the six pairs, three hold the right one
    assert pass_at_k(n, c, k) == 0.5 and 1 - (1 - c / n) ** k != 0.5
    with pytest.raises(ValueError):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize("case", load_json("eval_pass_at_k.json")["intervals_INDEPENDENT"], ids=str)
def test_wilson_interval_is_that_of_the_formula(case):
    assert wilson_interval(case["c"], case["n"]) == pytest.approx(tuple(case["wilson95"]), abs=1e-9)


@given(st.integers(0, 300), st.integers(1, 300))
def test_interval_holds_the_proportion_and_stays_in_bounds(c, n):
    c = min(c, n)
    low, high = wilson_interval(c, n)
    assert 0 <= low <= c / n <= high <= 1 and low < high


def test_votes():
    one, two = Decimal(1), Decimal(2)
    assert majority_vote([two, one, one]) == one
    assert majority_vote([None, None, two]) == two  # what could not be read does not vote
    assert majority_vote([two, one]) == two  # a tie goes to the first
    assert majority_vote([Decimal("1.0"), two, one]) == one  # equal numbers are one candidate
    assert majority_vote([None]) is None and majority_vote([]) is None


def test_rouge_l_by_hand():
    assert rouge_l("the cat", "the cat") == 1.0
    assert rouge_l("The CAT!", "the cat") == 1.0
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)  # order matters
    assert rouge_l("", "x") == 0.0 and rouge_l("a b c d", "a") == pytest.approx(2 * 1 * 0.25 / 1.25)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain.main(tiny_pretrain(folder, steps=4))
    return folder


def test_report_has_a_row_for_each_checkpoint_with_its_interval(base, tmp_path):
    config = evaluate.Config(data="arith", n=20, samples=4, ks=(1, 4, 16), out=str(tmp_path), device="cpu")
    row = evaluate.measure(str(base), config)
    assert {"stage", "accuracy", "low", "high", "n", "cut_off", "unreadable", "pass@1", "pass@4", "maj@4"} <= row.keys()
    assert "pass@16" not in row and row["n"] == 20 and row["low"] <= row["accuracy"] <= row["high"]
    evaluate.write_report(tmp_path, [row, row], "title")
    assert json.loads((tmp_path / "report.json").read_text())[1]["stage"] == "pretrain"
    table = (tmp_path / "report.md").read_text()
    assert table.count("| pretrain |") == 2 and "95 % interval" in table


def test_bits_per_byte_are_nats_over_bytes(base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One day Tom went to the market. " * 40)
    model, tokenizer, _ = evaluate.load_stage(str(base))
    for split, begin in (("validation", int(0.95 * 32 * 40)), ("test", 0)):  # a file is used whole, unless it was said
        row = evaluate.measure(str(base), evaluate.Config(data=str(text), split=split, n=1, device="cpu"))
        held = text.read_text()[begin:]
        ids = [tokenizer.eot_id, *tokenizer.encode(held), tokenizer.eot_id]
        length, nats = model.config.max_seq_len, 0.0
        for first in range(0, len(ids) - 1, length - 1):
            nats -= float(token_logps(model, torch.tensor([ids[first : first + length]])).detach().sum())
        assert row["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / len(held), rel=1e-4)


def test_long_documents_are_measured_in_pieces_and_empty_ones_not_at_all(base, monkeypatch, tmp_path):
    """Each token is predicted once, from those of its piece; a piece begins with the last token of the one before."""
    model, tokenizer, _ = evaluate.load_stage(str(base))
    texts, length = ["One day Tom went to the café. " * 50, "A short one."], model.config.max_seq_len
    documents = ["", texts[0], " \n", None, texts[1], "one too many"]
    monkeypatch.setattr(evaluate, "text_documents", lambda *args, **more: iter(documents))
    (tmp_path / "text.txt").write_text("in its place")
    row = evaluate.measure(str(base), evaluate.Config(data=str(tmp_path / "text.txt"), n=5, batch_size=2, device="cpu"))
    nats = 0.0
    for text in texts:
        ids, done = [tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id], 0
        while done < len(ids) - 1:
            piece = torch.tensor([ids[done : done + length]])
            nats -= float(token_logps(model, piece).detach().sum())
            done += piece.shape[1] - 1
    n_bytes = sum(len(text.encode()) for text in texts)
    assert len(ids) < length < len(tokenizer.encode(texts[0])) / 2 and row["documents_bytes"] == n_bytes
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_instruction_data_gives_perplexity_and_rouge(base, tmp_path):
    folder = tmp_path / "databricks__databricks-dolly-15k"
    folder.mkdir()
    row = {"instruction": "Name a fruit.", "context": "", "response": "An apple.", "category": "x"}
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for _ in range(60)))
    figures = evaluate.measure(
        str(base), evaluate.Config(data="dolly", data_dir=str(tmp_path), max_new_tokens=8, device="cpu")
    )
    assert figures["perplexity"] > 1 and 0 <= figures["rouge_l"] <= 1 and figures["n"] == 2


def test_each_reference_and_each_answer_counts_once(base, monkeypatch):
    """More rows and more questions than one batch has, and a question that leaves no room for an answer."""
    model, tokenizer, _ = evaluate.load_stage(str(base))
    length, words = model.config.max_seq_len, [f"word{i} " * (3 + i % 11) for i in range(40)]
    prompt_of = lambda text: encode_chat(tokenizer, [{"role": "user", "content": text}], True)[0]  # noqa: E731
    while len(prompt_of(words[7])) <= length - 8:
        words[7] += "a "
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"{i} " * (20 if i != 7 else 1)}]
        for i, text in enumerate(words)
    ]
    compared = []
    monkeypatch.setattr(evaluate, "load_chats", lambda *args, **more: chats)
    monkeypatch.setattr(evaluate, "rouge_l", lambda *args: compared.append(args) or 0.25)
    config = evaluate.Config(data="dolly", batch_size=6, max_new_tokens=8, device="cpu")
    figures = evaluate.measure(str(base), config)
    nats = count = 0.0
    expected = []
    for chat, text in zip(chats, words):
        ids, mask = (torch.tensor([x]) for x in encode_chat(tokenizer, chat))
        assert ids.shape[1] <= length
        nats -= float((token_logps(model, ids) * mask[:, 1:]).detach().sum())
        count += int(mask.sum())
        if text != words[7]:
            answer = evaluate.sample_answers(model, tokenizer, [prompt_of(text)], 1, 8, 0.0, seed=0)
            expected.append((answer.texts[0], chat[1]["content"]))
    assert len(evaluate.pack(chats, tokenizer, length)) > 16
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert sorted(compared) == sorted(expected) and len(set(expected)) == 39
    assert figures["n"] == 39 and figures["rouge_l"] == pytest.approx(0.25)


def test_the_samples_of_a_question_are_judged_together_and_by_its_own_gold(base, monkeypatch):
    """Of three answers to each question 2, 3, 1, 0 and 3 are right, the wrong ones all different and first."""
    tokenizer = evaluate.load_stage(str(base))[1]
    ids, prompts = encode_prompts(load_prompts("arith", "test", n=5), tokenizer, 200)
    gold_of, counts = {tuple(x): prompt.gold for x, prompt in zip(ids, prompts)}, iter([2, 3, 1, 0, 3])

    def sampled(model, tokenizer, prompts, n, *more, **knobs):
        texts = []
        for prompt in prompts:
            gold, right = gold_of[tuple(prompt)], next(counts)
            said = [gold + 1 + i for i in range(n - right)] + [gold] * right
            texts += [f"<think>so</think><answer>{value}</answer>" for value in said]
        return SimpleNamespace(texts=texts, finished=torch.ones(len(texts), dtype=torch.bool))

    greedy = {"accuracy": 0.4, "cut_off": 0.0, "unreadable": 0.0, "tokens": 9.0}
    monkeypatch.setattr(evaluate, "sample_answers", sampled)
    monkeypatch.setattr(evaluate, "answer_greedily", lambda *args, **more: dict(greedy))
    row = evaluate.measure(str(base), evaluate.Config(n=5, samples=3, ks=(1, 2, 3), batch_size=6, device="cpu"))
    assert row["pass@1"] == pytest.approx(9 / 15) and row["pass@3"] == pytest.approx(4 / 5)
    assert row["pass@2"] == pytest.approx((1 + 1 + 2 / 3 + 0 + 1) / 5)
    assert row["maj@3"] == pytest.approx(3 / 5) and row["accuracy"] == 0.4 and row["low"] < 0.4 < row["high"]


def test_two_runs_of_one_stage_go_by_their_folders(monkeypatch, capsys):
    found = {"a": "sft", "b/dpo": "dpo", "c/dpo": "dpo"}
    row = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    monkeypatch.setattr(evaluate, "measure", lambda path, config: {"stage": found[path], "path": path} | row)
    monkeypatch.setattr(evaluate, "need_checkpoint", lambda path: None)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *found])
    evaluate.main()
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert printed == ["sft", "b/dpo", "c/dpo"]


def test_the_choice_of_a_reward_model_by_hand(monkeypatch):
    """Three questions of four answers. The first: right ones score 3 and 1, wrong ones 2 and 1, so of four comparisons
    two are won and one is a tie, 2.5 / 4, and the best is right. The second: both wrong ones are ahead, 0 / 4. The
    third has no wrong answer: no area, and its best is right."""
    golds = [p.gold for p in load_prompts("arith", "test", n=3)]
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    written = lambda gold, ok: f"<think>1+1=2</think><answer>{gold if ok else gold + 1}</answer>"  # noqa: E731
    texts = [[written(gold, ok) for ok in row] for gold, row in zip(golds, right.tolist())]
    asked = []

    def sample(model, tokenizer, prompts, n, max_new, temperature, seed, **_):
        first = len(asked)
        asked.extend(prompts)
        some = [text for row in texts[first : len(asked)] for text in row]
        rows = torch.arange(first * n, len(asked) * n)[:, None]
        return SimpleNamespace(texts=some, finished=torch.ones(len(some), dtype=torch.bool), tokens=rows, mask=rows)

    policy = SimpleNamespace(config=SimpleNamespace(max_seq_len=256))
    tokenizer = ByteTokenizer()
    judge = lambda tokens, real: scores.flatten()[tokens[:, 0]]  # noqa: E731
    for name, stand_in in {
        "load_state": lambda path: {"config": {"init_from": "sft"}},
        "load_reward_model": lambda path, device: (judge, tokenizer, None),
        "load_stage": lambda path, device: (policy, tokenizer, None),
        "sample_answers": sample,
        "real_tokens": lambda tokens, mask: mask,
    }.items():
        monkeypatch.setattr(evaluate, name, stand_in)
    config = evaluate.Config(n=512, sampled=3, samples=4, batch_size=8, device="cpu")  # two questions, then one
    found = evaluate.measure_choice("reward", config)
    assert found == {"AUC": pytest.approx((2.5 / 4 + 0) / 2), "best@4": pytest.approx(2 / 3)}
    assert len(asked) == 3


def test_samples_are_of_the_first_questions_and_greedy_answers_of_all(base, monkeypatch):
    asked, sample = {}, evaluate.measure_samples
    monkeypatch.setattr(
        evaluate,
        "measure_samples",
        lambda m, t, ids, golds, *more: asked.update(n=len(ids)) or sample(m, t, ids, golds, *more),
    )
    row = evaluate.measure(str(base), evaluate.Config(n=20, samples=2, ks=(1,), sampled=6, device="cpu"))
    assert row["n"] == 20 and asked == {"n": 6} and "pass@1" in row


def test_the_parts_outside_of_training_are_measured_with_the_test(base, monkeypatch):
    """Each on its own questions, and with split = larger those alone."""
    rights = {"test": 0.5, "larger": 0.25, "longer": 0.0}
    of_question = {p.messages[0]["content"]: part for part in rights for p in load_prompts("arith", part, n=8)}
    tokenizer = evaluate.load_stage(str(base))[1]

    def greedy(model, tokenizer_, ids, golds, *_, **__):
        parts = {of_question[question] for question in of_question if encode(question) in ids}
        (part,) = parts
        return {"accuracy": rights[part], "cut_off": 0.0, "unreadable": 0.0, "tokens": 1.0}

    def encode(question):
        return encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)[0]

    monkeypatch.setattr(evaluate, "answer_greedily", greedy)
    row = evaluate.measure(str(base), evaluate.Config(n=8, device="cpu"))
    assert (row["accuracy"], row["larger"], row["longer"]) == (0.5, 0.25, 0.0)
    row = evaluate.measure(str(base), evaluate.Config(n=8, split="larger", device="cpu"))
    assert row["accuracy"] == 0.25 and "longer" not in row
    with pytest.raises(evaluate.UserError, match="embedded task"):
        evaluate.need_all([str(base)], evaluate.Config(data="gsm8k", split="longer"))
