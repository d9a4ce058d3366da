"""The encoder against BERT, its masking against the binomial distribution, and both of its objectives at work."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_npz
from tiny import assert_exact_resume, tiny_pretrain, tiny_sft

import arithmetic
import chat
import encoder
import optim
import ppo
import pretrain
import reward
import sft
from attention import make_cache
from encoder import (
    Classifier,
    Config,
    MaskedLM,
    Texts,
    fill_in,
    load_classifier,
    load_encoder,
    load_labelled,
    mask_tokens,
    pool,
    predictions,
    to_classify,
    to_fill_in,
)
from generate import generate
from runtime.checkpoint import load_checkpoint
from runtime.errors import UserError
from stages import load_stage
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer

BERT = load_npz("bert_tiny")


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------------------------------------------
# BERT, in transformers


def bert(prefix: str) -> tuple[Transformer, dict]:
    """The body, with the two token types of the fixture (0 in the first five columns, 1 in the last five) added to the
    positions; and the rest of the weights."""
    config = ModelConfig(
        37, 24, 2, 3, d_ff=32, max_seq_len=20, positions="learned", norm="layernorm", norm_eps=1e-12, mlp="gelu",
        bias=True, tie_embeddings=True, causal=False, post_norm=True,
    )  # fmt: skip
    w = {k.removeprefix(prefix): v for k, v in BERT.items() if k.startswith(prefix)}
    types = torch.tensor([0] * 5 + [1] * 15)
    assert torch.equal(BERT["token_type_ids"], types[:10].expand(2, -1))
    embed = "bert.embeddings."
    position = w[f"{embed}position_embeddings.weight"] + w[f"{embed}token_type_embeddings.weight"][types]
    state = {
        "embed.weight": w[f"{embed}word_embeddings.weight"], "head.weight": w[f"{embed}word_embeddings.weight"],
        "position_embed.weight": position
    }  # fmt: skip
    names = {
        "attention.self.query": "attn.q_proj", "attention.self.key": "attn.k_proj",
        "attention.self.value": "attn.v_proj",
        "attention.output.dense": "attn.o_proj", "attention.output.LayerNorm": "attn_norm",
        "intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj", "output.LayerNorm": "mlp_norm",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        state[f"embed_norm.{kind}"] = w[f"{embed}LayerNorm.{kind}"]
        for i in range(2):
            for theirs, ours in names.items():
                state[f"blocks.{i}.{ours}.{kind}"] = w[f"bert.encoder.layer.{i}.{theirs}.{kind}"]
    body = Transformer(config)
    body.load_state_dict(state)
    return body, w


def test_berts_masked_words():
    body, w = bert("mlm::")
    model = MaskedLM(body)
    with torch.no_grad():
        model.dense.weight.copy_(w["cls.predictions.transform.dense.weight"])
        model.dense.bias.copy_(w["cls.predictions.transform.dense.bias"])
        model.norm.weight.copy_(w["cls.predictions.transform.LayerNorm.weight"])
        model.norm.bias.copy_(w["cls.predictions.transform.LayerNorm.bias"])
        model.bias.copy_(w["cls.predictions.bias"])
    ids, mask, labels = BERT["input_ids"], BERT["attention_mask"], BERT["mlm_labels"]
    real = mask.bool()
    close(body.forward_hidden(ids, mask=mask)[real], BERT["mlm_hidden"][real], atol=1e-4)
    logits = model(ids, mask)
    close(logits[real], BERT["mlm_logits"][real], atol=1e-4)
    chosen = labels != -100
    close(model(ids, mask, chosen), logits[chosen])
    close(F.cross_entropy(model(ids, mask, chosen), labels[chosen]), BERT["mlm_loss"], atol=1e-4)


def test_berts_classes():
    body, w = bert("cls::")
    model = Classifier(body, 3, pooling="cls")
    with torch.no_grad():
        model.dense.weight.copy_(w["bert.pooler.dense.weight"])
        model.dense.bias.copy_(w["bert.pooler.dense.bias"])
        model.score.weight.copy_(w["classifier.weight"])
        model.score.bias.copy_(w["classifier.bias"])
    logits = model(BERT["input_ids"], BERT["attention_mask"])
    close(logits, BERT["cls_logits"], atol=1e-4)
    hidden = body.forward_hidden(BERT["input_ids"], mask=BERT["attention_mask"])
    close(torch.tanh(model.dense(pool(hidden, BERT["attention_mask"], "cls"))), BERT["cls_pooled"], atol=1e-4)
    close(F.cross_entropy(logits, BERT["cls_labels"]), BERT["cls_loss"], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Seeing both sides


def small(**fields) -> Transformer:
    torch.manual_seed(1)
    shape = {"vocab_size": 23, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 16, "causal": False}
    made = Transformer(ModelConfig(**(shape | fields)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_every_token_sees_all_others_and_no_padding(positions, post_norm):
    model, tokens = small(positions=positions, post_norm=post_norm), torch.randint(23, (2, 9))
    full = model.forward_hidden(tokens)
    for t in range(9):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 23
        moved = (model.forward_hidden(changed) - full).abs().amax(dim=2)  # (B, T)
        assert (moved[0] > 1e-6).all() and (moved[1] == 0).all()
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    padded = model.forward_hidden(tokens, mask=mask)
    close(padded[0], full[0])
    close(padded[1, :6], model.forward_hidden(tokens[1:, :6])[0])
    other = tokens.masked_fill(mask == 0, 5)
    assert torch.equal(model.forward_hidden(other, mask=mask)[1, :6], padded[1, :6])


def test_left_padding_changes_nothing():
    model, tokens = small(positions="learned"), torch.randint(23, (1, 6))
    shifted = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    close(model.forward_hidden(shifted, mask=mask)[:, 3:], model.forward_hidden(tokens))


def test_documents_of_one_row_do_not_see_each_other():
    model, tokens = small(), torch.randint(23, (1, 9))
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    both = model.forward_hidden(tokens, segments=segments)
    close(both[:, :4], model.forward_hidden(tokens[:, :4]))
    close(both[:, 4:], model.forward_hidden(tokens[:, 4:]))


def test_the_norm_after_each_half():
    model = small(post_norm=True, positions="learned")
    x = model.embed_norm(model.embed.weight[:5] + model.position_embed.weight[:5])[None]
    block = model.blocks[0]
    x1 = block.attn_norm(x + block.attn(x))
    close(block(x), block.mlp_norm(x1 + block.mlp(x1)))
    hidden = model.forward_hidden(torch.arange(5)[None])
    close(hidden, model.blocks[1](model.blocks[0](x)))  # nothing is normalised twice
    assert not hasattr(model, "final_norm")


def test_an_encoder_cannot_write():
    model = small()
    with pytest.raises(ValueError, match="cannot read or write one by one"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=make_cache(2, 1, 8))
    with pytest.raises(ValueError, match="one by one"):
        generate(model, [[1, 2]], 3, eot_id=0)
    with pytest.raises(ValueError, match="looks back"):
        ModelConfig(causal=False, window=4)


# ----------------------------------------------------------------------------------------------------------------------
# Masked language modelling


def test_the_shares_of_masking_are_binomial():
    n, vocab = 400_000, 50
    tokens = torch.arange(n).remainder(vocab).view(100, -1)
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:, ::10] = False
    corrupted, chosen = mask_tokens(tokens, maskable, vocab, mask_id=60, generator=torch.Generator().manual_seed(0))
    assert not chosen[~maskable].any() and torch.equal(corrupted[~chosen], tokens[~chosen])
    m = int(maskable.sum())

    def within(count, n, p):
        assert abs(count - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5, (count, n * p)

    c = int(chosen.sum())
    within(c, m, 0.15)
    masked = int((corrupted[chosen] == 60).sum())
    within(masked, c, 0.8)
    same = int((corrupted[chosen] == tokens[chosen]).sum())
    within(same, c, 0.1 + 0.1 / vocab)  # a random word may be the right one
    within(c - masked - same, c, 0.1 * (1 - 1 / vocab))
    changed = corrupted[chosen & (corrupted != 60) & (corrupted != tokens)]
    assert changed.max() == vocab - 1 and changed.min() == 0
    for word in range(vocab):  # all words alike
        within(int((changed == word).sum()), len(changed), 1 / vocab)


def test_each_token_has_its_own_coin():
    tokens = torch.zeros(2000, 20, dtype=torch.long)
    _, chosen = mask_tokens(tokens, torch.ones_like(tokens), 5, 9, generator=torch.Generator().manual_seed(1))
    counts = chosen.sum(1).double()
    assert abs(counts.var().item() - 20 * 0.15 * 0.85) < 0.25  # of exactly three in each row it would be 0
    columns = chosen.double().T.cov()
    assert (columns - columns.diag().diag()).abs().max() < 0.02


def test_masking_is_repeatable_and_leaves_its_input_alone():
    tokens = torch.randint(30, (4, 50))
    before, maskable = tokens.clone(), torch.ones(4, 50)
    one, two = (mask_tokens(tokens, maskable, 30, 40, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and torch.equal(tokens, before)
    assert torch.equal(maskable, torch.ones(4, 50))


def test_special_tokens_and_padding_are_never_chosen(tmp_path, monkeypatch):
    """As the stage calls it, and as the examination does."""
    tokenizer, calls = ByteTokenizer(), []

    def spy(tokens, maskable, vocab_size, mask_id, share, generator):
        calls.append((tokens.clone(), maskable.clone()))
        return mask_tokens(tokens, maskable, vocab_size, mask_id, share, generator)

    monkeypatch.setattr(encoder, "mask_tokens", spy)
    encoder.main(tiny(tmp_path / "mlm", objective="mlm", epochs=0.5))
    assert calls
    for tokens, maskable in calls:
        lengths = (tokens != tokenizer.pad_id).sum(1)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        assert (tokens[:, 0] == tokenizer.vocab_size + 1).all() and not maskable[:, 0].any()  # [CLS]
        assert torch.equal(maskable, real & (tokens < tokenizer.vocab_size))


def test_the_unchanged_words_are_predicted_too():
    """A model that copies what it sees is right on all chosen words but the masked and the random ones."""
    tokens = torch.randint(20, (50, 64))
    corrupted, chosen = mask_tokens(tokens, torch.ones_like(tokens), 20, 20, generator=torch.Generator().manual_seed(0))
    copied = (corrupted[chosen] == tokens[chosen]).float().mean()
    assert 0.07 < copied < 0.14


def test_the_figures_of_filling_in_by_hand():
    """A model that always says word 7 with certainty e / (e + V - 1)."""
    tokenizer = ByteTokenizer()
    vocab = tokenizer.vocab_size + 2

    class Seven(torch.nn.Module):
        bias = torch.zeros(vocab)

        def forward(self, tokens, mask, where):
            return F.one_hot(torch.tensor([7] * int(where.sum())), vocab).float()

    texts = Texts([[vocab - 1, 7, 7, 7], [vocab - 1, 7]], None, tokenizer.pad_id)
    figures = fill_in(Seven(), texts, tokenizer, share=0.9)
    e = torch.tensor(1.0).exp()
    assert figures["val_accuracy"] == 1.0
    assert figures["val_loss"] == pytest.approx(float(-(e / (e + vocab - 1)).log()), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Classification


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]], [[5.0, 5.0], [0.0, 1.0], [1.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    close(pool(hidden, mask), torch.tensor([[2.0, 4.0], [2.0, 2.0]]))
    close(pool(hidden, mask, "cls"), torch.tensor([[1.0, 2.0], [5.0, 5.0]]))
    close(pool(hidden[:, 1:], torch.tensor([[1, 0], [0, 1]])), torch.tensor([[3.0, 6.0], [1.0, 0.0]]))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_verdict(pooling):
    model = Classifier(small(), 3, pooling).eval()
    tokens = torch.randint(23, (1, 7))
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 4])
    close(model(padded, mask), model(tokens, mask[:, :7]))


def test_predictions_are_in_the_order_of_the_texts():
    model = Classifier(small(), 2)
    texts = Texts([[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]], [0, 1, 0, 1], 0)
    all_at_once = predictions(model, texts)
    for i in range(4):
        one = model(torch.tensor([texts.ids[i]]), torch.ones(1, len(texts.ids[i]))).log_softmax(-1)
        close(all_at_once[i], one[0], atol=1e-5)
    close(predictions(model, texts, batch=1), all_at_once, atol=1e-5)


def test_a_long_text_keeps_its_beginning_and_its_end():
    tokenizer = ByteTokenizer()
    text = "".join(chr(97 + i) for i in range(26))
    rows = to_classify([text, "ab"], [0, 1], tokenizer, length=9, lowercase=False)
    assert rows.ids[0] == [tokenizer.vocab_size + 1, *tokenizer.encode("abuvwxyz")]
    assert rows.ids[1] == [tokenizer.vocab_size + 1, *tokenizer.encode("ab")]
    assert to_classify(["AB"], [0], tokenizer, 9, lowercase=True).ids[0][1:] == tokenizer.encode("ab")
    tokens, real = rows.batch([1, 0])
    assert tokens.shape == (2, 9) and real.sum(1).tolist() == [3, 9] and tokens[0, 3] == tokenizer.pad_id


def test_to_fill_in_loses_no_word():
    tokenizer = ByteTokenizer()
    rows = to_fill_in(["abcdefghij", "k"], tokenizer, length=5, lowercase=False)
    assert [tokenizer.decode(ids[1:]) for ids in rows.ids] == ["abcd", "efgh", "ij", "k"]
    with pytest.raises(UserError, match="no text"):
        to_fill_in([""], tokenizer, 5, False)


def mirror(folder, name, **splits):
    (folder / name).mkdir(parents=True)
    for split, rows in splits.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_labelled_texts_of_a_local_mirror(tmp_path, capsys):
    rows = [(f"film {i}", int(i >= 20)) for i in range(40)]
    data = mirror(tmp_path, "stanfordnlp__imdb", train=rows, test=[("good", 1), ("bad", 0)])
    train, held = (load_labelled("imdb", split, data) for split in ("train", "validation"))
    assert held == (["film 0", "film 10", "film 20", "film 30"], [0, 0, 1, 1]) and len(train[0]) == 36
    assert not set(train[0]) & set(held[0])
    assert load_labelled("imdb", "test", data) == (["good", "bad"], [1, 0])
    some = load_labelled("imdb", "train", data, n=10)
    assert set(some[1]) == {0, 1} and len(some[0]) == 10  # although the file is sorted by label
    data = mirror(tmp_path / "b", "SetFit__sst2", train=[("fine", 1), ("", 0), ("odd", 7)], validation=[("so", 0)])
    assert load_labelled("sst2", "train", data) == (["fine"], [1])
    assert "skipped 2 train rows of SetFit/sst2" in capsys.readouterr().out
    assert load_labelled("sst2", "validation", data) == (["so"], [0])
    with pytest.raises(UserError, match="no labelled texts called 'films'"):
        load_labelled("films", "train")


def test_the_embedded_labels():
    texts, labels = load_labelled("arith", "train", seed=3, n=200)
    problems = {p.question: p for p in arithmetic.problems(200, seed="3 encoder")}
    for text, label in zip(texts, labels):
        first = int("".join(c if c.isdigit() else " " for c in text).split()[0])
        assert label == (problems[text].answer > first)
    assert 0.3 < sum(labels) / 200 < 0.7
    held, test = (load_labelled("arith", split)[0] for split in ("validation", "test"))
    assert len(held) == len(test) == 512 and not set(texts) & set(held) and held != test


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def tiny(folder, **changes) -> Config:
    settings = {
        "out_dir": str(folder), "tokenizer": "bytes", "d_model": 32, "n_layers": 1, "n_heads": 2, "n_texts": 48,
        "batch_size": 8, "epochs": 1.0, "warmup": 2, "eval_every": 3, "save_every": 2, "log_every": 1, "device": "cpu",
    }  # fmt: skip
    return replace(Config(), **(settings | changes))


@pytest.mark.parametrize("objective", ["classify", "mlm"])
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, objective):
    more = {"objective": objective, "micro_batch_size": 3}
    whole, stopped = (tiny(tmp_path / name, **more) for name in ("whole", "stopped"))
    one, two = assert_exact_resume(monkeypatch, encoder, whole, stopped, saves=2)
    assert one["best"] == two["best"] and one["stage"] == ("mlm" if objective == "mlm" else "encoder")
    assert one["model_config"]["causal"] is False


@pytest.mark.parametrize("objective", ["classify", "mlm"])
def test_micro_batches_give_the_same_gradient(tmp_path, objective):
    rows = []
    for size in (0, 3):
        folder = tmp_path / f"{size}"
        encoder.main(tiny(folder, objective=objective, micro_batch_size=size, epochs=0.1))
        rows.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    for name in ("loss", "grad_norm", "accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)


def test_it_learns_to_fill_in_and_to_classify(tmp_path):
    """Hidden letters of an alphabet can be told from their neighbours on both sides; and the made-up reviews differ in
    the order of two words, which a bag of words cannot see."""
    (tmp_path / "letters.txt").write_text("".join(chr(97 + i % 26) for i in range(26 * 480)))
    small = {"max_seq_len": 40, "eval_every": 50, "save_every": 500, "n_texts": None, "lr": 1e-2}
    figures = encoder.main(
        tiny(
            tmp_path / "mlm",
            objective="mlm",
            data=str(tmp_path / "letters.txt"),
            epochs=30.0,
            batch_size=32,
            hide=0.3,
            **small,
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "mlm" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 5.0 and figures["val_loss"] < 1.0 and figures["val_accuracy"] > 0.7
    told = [row["accuracy"] for row in rows if "accuracy" in row]  # of the words of a step
    assert told[0] < 0.1 and sum(told[-5:]) / 5 > 0.6
    steps = max(row["step"] for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == sorted({*range(50, steps, 50), steps})
    reviews = [(f"film {i} {'bad then good' if i % 2 else 'good then bad'}", i % 2) for i in range(200)]
    data = mirror(tmp_path, "SetFit__sst2", train=reviews, validation=reviews[:40], test=reviews[40:100])
    figures = encoder.main(
        tiny(
            tmp_path / "cls",
            data="sst2",
            data_dir=data,
            init_from=str(tmp_path / "mlm"),
            hide=0.02,
            epochs=8.0,
            **(small | {"max_seq_len": 44}),
        )
    )
    assert figures["test_accuracy"] > 0.9
    rows = [json.loads(line) for line in (tmp_path / "cls" / "metrics.jsonl").read_text().splitlines()]
    told = [row["accuracy"] for row in rows if "accuracy" in row]
    assert sum(told[-5:]) / 5 > 0.8
    state = load_checkpoint(tmp_path / "cls")
    assert state["lineage"][0]["stage"] == "mlm" and state["model_config"]["max_seq_len"] == 44
    assert state["model_config"]["tie_embeddings"]
    assert (tmp_path / "cls" / "samples.txt").read_text().count("positive") > 0


def test_the_best_checkpoint_is_the_one_that_is_tested(tmp_path, monkeypatch):
    """Validation accuracies are made up: the second examination is the best."""
    made_up, real_judge = iter([0.5, 0.9, 0.7, 0.6]), encoder.judge
    seen = []

    def judge(logps, texts):
        figures = real_judge(logps, texts)
        if len(texts) == 40:
            return figures | {"val_accuracy": next(made_up)}
        seen.append(logps)
        return figures

    monkeypatch.setattr(encoder, "judge", judge)
    real_load, sizes = encoder.load_labelled, {"train": None, "validation": 40, "test": 30}

    def load(name, split, *more):
        return tuple(column[: sizes[split]] for column in real_load(name, split, *more))

    monkeypatch.setattr(encoder, "load_labelled", load)
    figures = encoder.main(tiny(tmp_path / "run", epochs=2.0, keep_last=9))
    assert figures["val_accuracy"] == 0.9
    best, kept = load_checkpoint(tmp_path / "run" / "best.pt"), load_checkpoint(tmp_path / "run" / "ckpt_0000006.pt")
    assert best["step"] == 6 and all(torch.equal(best["model"][k], v) for k, v in kept["model"].items())
    last = load_checkpoint(tmp_path / "run")
    assert last["step"] == 12 and not torch.equal(last["model"]["score.weight"], best["model"]["score.weight"])
    body = Transformer(ModelConfig(**best["model_config"]))
    model = Classifier(body, 2)
    model.load_state_dict(best["model"])
    texts, labels = (x[:30] for x in real_load("arith", "test"))
    wanted = predictions(model, to_classify(texts, labels, ByteTokenizer(), 256, False))
    assert len(seen) == 1 and torch.equal(seen[0], wanted)
    again, read, classes = load_classifier(str(tmp_path / "run"))
    assert torch.equal(predictions(again, read(texts)), wanted) and classes == ("not more", "more")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"data": "films"}, "has no labels"),
        ({"data": "arith+imdb"}, "has no labels"),
        ({"objective": "mlm", "hide": 0.0}, "hides some"),
        ({"hide": 1.0}, "below 1"),
        ({"init_from": "nowhere"}, "there is no checkpoint in nowhere"),
        ({"init_from": "a", "tokenizer_from": "b"}, "its own tokenizer"),
        ({"init_from": "a", "objective": "mlm"}, "--init_from is for"),
        ({"n_heads": 5}, "multiple of n_heads"),
        ({"epochs": float("nan")}, "epochs"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        encoder.main(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_shorter_texts_than_the_masked_model_had(tmp_path, positions):
    encoder.main(tiny(tmp_path / "mlm", objective="mlm", epochs=0.2, positions=positions, max_seq_len=64))
    encoder.main(tiny(tmp_path / "short", init_from=str(tmp_path / "mlm"), epochs=0.5, max_seq_len=24))
    model, read, _ = load_classifier(str(tmp_path / "short"))
    assert model.config.max_seq_len == 64 and {len(ids) for ids in read(["a" * 100, "b" * 30]).ids} == {24}
    assert predictions(model, read(["What a film!"])).shape == (1, 2)


def test_small_letters_are_inherited(tmp_path):
    """By a classifier from the masked model, and by one that starts from that."""
    encoder.main(tiny(tmp_path / "mlm", objective="mlm", epochs=0.2, lowercase=True))
    for name, start in (("a", "mlm"), ("b", "a")):
        encoder.main(tiny(tmp_path / name, init_from=str(tmp_path / start), epochs=0.2))
        _, read, _ = load_classifier(str(tmp_path / name))
        assert read(["LOUD"]).ids == read(["loud"]).ids
    with pytest.raises(UserError, match="leave --lowercase out"):
        encoder.main(tiny(tmp_path / "c", init_from=str(tmp_path / "mlm"), lowercase=True))


def test_documents_without_text_are_skipped(monkeypatch, capsys):
    monkeypatch.setattr(encoder, "text_documents", lambda *args: iter(["one", None, " ", "two"]))
    assert list(encoder.plain_texts("tinystories", "train", Config())) == ["one", "two"]
    assert "skipped 2 train documents" in capsys.readouterr().out


def test_mistakes_of_fewer_texts_than_are_shown():
    texts = Texts([[9, 97], [9, 98]], [0, 1], 0)
    shown = encoder.mistakes(torch.tensor([[0.2, 0.8], [0.1, 0.9]]).log(), texts, ByteTokenizer(), ("no", "yes"))
    assert shown.count("the model says") == 1 + 2 and "no, the model says yes (0.80): a" in shown


def test_every_step_hides_other_words(tmp_path, monkeypatch):
    seeds, original = [], encoder.mask_tokens

    def noted(*args):
        seeds.append(args[-1].initial_seed())
        return original(*args)

    monkeypatch.setattr(encoder, "mask_tokens", noted)
    monkeypatch.setattr(encoder, "fill_in", lambda *args: {"val_loss": 0.0, "val_accuracy": 0.0})
    encoder.main(tiny(tmp_path / "a", objective="mlm", epochs=1.0))
    assert len(seeds) >= 6 and len(set(seeds)) == len(seeds)


def test_training_leaves_words_out_and_examining_leaves_out_none(tmp_path, monkeypatch):
    """Never [CLS]; and what is left stands together, before the padding."""
    seen, forward, tokenizer = [], Classifier.forward, ByteTokenizer()

    def noted(self, tokens, mask):
        seen.append((torch.is_grad_enabled(), tokens, mask))
        return forward(self, tokens, mask)

    monkeypatch.setattr(Classifier, "forward", noted)
    config = tiny(tmp_path, hide=0.3)
    encoder.main(config)
    texts = to_classify(*load_labelled("arith", "train", n=config.n_texts), tokenizer, 256, False).ids
    trained = [tokens[r, : int(mask[r].sum())].tolist() for t, tokens, mask in seen if t for r in range(len(tokens))]
    for _, tokens, mask in seen:
        assert (tokens[:, 0] == encoder.cls_id_of(tokenizer)).all() and (tokens[~mask] == tokenizer.pad_id).all()
        assert mask.equal(torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)) and mask[:, -1].any()
        assert not (tokens == encoder.mask_id_of(tokenizer)).any()
    is_part = lambda row, text: all(word in rest for rest in [iter(text)] for word in row)  # noqa: E731, in order
    assert len(trained) == len(texts) == 48 and all(any(is_part(row, text) for text in texts) for row in trained)
    words, left = sum(len(text) - 1 for text in texts), sum(len(row) - 1 for row in trained)
    assert abs(words - left - 0.3 * words) < 5 * (words * 0.3 * 0.7) ** 0.5 and words > 2000
    examined = [int(mask.sum()) for training, _, mask in seen if not training]
    whole = [len(ids) for split in ("validation", "validation", "test") for ids in arith_ids(split)]
    assert sum(examined) == sum(whole)


def arith_ids(split: str) -> list[list[int]]:
    return to_classify(*load_labelled("arith", split), ByteTokenizer(), 256, False).ids


def test_the_list_of_mistakes_survives_a_death_behind_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "mistakes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.main(tiny(tmp_path))
    monkeypatch.undo()
    for _ in range(2):
        encoder.main(tiny(tmp_path))
        assert (tmp_path / "samples.txt").read_text().count("most certain mistakes") == 1


def test_fewer_training_texts_are_examined_on_all_the_others(tmp_path):
    texts = [len(list(encoder.plain_texts("arith", split, tiny(tmp_path, n_texts=n)))) for split, n in TEXTS]
    assert texts[0] == 3 and texts[1] == texts[2] > 100


TEXTS = [("train", 3), ("validation", 3), ("validation", None)]


def test_a_seed_of_any_size(tmp_path):
    encoder.main(tiny(tmp_path, seed=2**62 + 5, epochs=0.2))


def test_other_stages_refuse_an_encoder_in_one_line(tmp_path):
    encoder.main(tiny(tmp_path / "mlm", objective="mlm", epochs=0.2))
    with pytest.raises(UserError, match="holds an encoder: it reads texts and writes none"):
        load_stage(str(tmp_path / "mlm"))
    with pytest.raises(UserError, match="holds an encoder"):
        sft.main(tiny_sft(tmp_path / "sft", tmp_path / "mlm"))
    assert chat.load_stage is load_stage
    with pytest.raises(UserError, match="knows no classes"):
        encoder.load_classifier(str(tmp_path / "mlm" / "ckpt.pt"))
    pretrain.main(tiny_pretrain(tmp_path / "base", steps=1))
    with pytest.raises(UserError, match="not an encoder"):
        load_encoder(str(tmp_path / "base"))


# ----------------------------------------------------------------------------------------------------------------------
# A reward model with an encoder's body


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    pretrain.main(tiny_pretrain(folder / "pretrain", steps=2))
    sft.main(tiny_sft(folder / "sft", folder / "pretrain", epochs=0.5))
    encoder.main(tiny(folder / "mlm", objective="mlm", epochs=0.5, tokenizer_from=str(folder / "sft")))
    return folder


def judging(policy, folder, **changes) -> reward.Config:
    settings = {
        "out_dir": str(folder), "init_from": str(policy / "sft"), "encoder": str(policy / "mlm"), "data": "arith",
        "n_pairs": 32, "n_sums": 0, "batch_size": 8, "eval_pairs": 16, "normalize_on": 8, "eval_every": 4,
        "save_every": 2, "log_every": 1, "device": "cpu",
    }  # fmt: skip
    return replace(reward.Config(), **(settings | changes))


def test_a_reward_model_on_an_encoder(tmp_path, monkeypatch, policy):
    whole, stopped = (judging(policy, tmp_path / name) for name in ("whole", "stopped"))
    one, _ = assert_exact_resume(monkeypatch, reward, whole, stopped, saves=1)
    judge, tokenizer, state = reward.load_reward_model(whole.out_dir)
    assert not judge.config.causal and state["lineage"][-1]["stage"] == "sft"
    tokens, mask = torch.randint(250, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    scored = judge(tokens, mask)
    cls = torch.full((1, 1), judge.config.vocab_size - 1)  # with which every text of the encoder has begun
    hidden = judge.backbone.forward_hidden(torch.cat([cls, tokens[1:, :7]], dim=1))
    padded = judge(F.pad(tokens[1:, :7], (3, 0)), F.pad(mask[1:, :7], (3, 0)))  # padding on the left
    close(padded[0], scored[1], atol=1e-4)
    close(scored[1], hidden.mean(1)[0] @ judge.score.weight[0] + judge.score.bias[0], atol=1e-4)
    with pytest.raises(ValueError, match="real token"):
        judge(tokens, torch.zeros(2, 12, dtype=torch.bool))


def test_its_gradient_reaches_the_body_and_rises_the_margin(policy):
    body, tokenizer, _ = load_encoder(str(policy / "mlm"))
    judge = reward.RewardModel(body)
    optimizers = optim.make_optimizers(judge, 3e-3)
    tokens, mask = torch.randint(250, (8, 10)), torch.ones(8, 10)
    margins = []
    for _ in range(10):
        chosen, rejected = judge(tokens, mask).chunk(2)
        margins.append(float((chosen - rejected).mean().detach()))
        reward.bradley_terry_loss(chosen, rejected).backward()
        assert body.blocks[0].attn.q_proj.weight.grad.abs().sum() > 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert margins[-1] > margins[0] + 0.5


def test_answers_that_the_encoder_has_no_room_for_are_refused(tmp_path, policy):
    encoder.main(
        tiny(
            tmp_path / "mlm",
            objective="mlm",
            epochs=0.2,
            max_seq_len=100,
            positions="learned",
            tokenizer_from=str(policy / "sft"),
        )
    )
    judge = judging(policy, tmp_path / "judge", encoder=str(tmp_path / "mlm"), max_length=96, max_new_tokens=40)
    reward.main(judge)
    more = {"init_from": str(policy / "sft"), "reward": str(tmp_path / "judge"), "device": "cpu"}
    with pytest.raises(UserError, match="max_new_tokens 100 leaves no room in a context of 99"):
        ppo.main(ppo.Config(out_dir=str(tmp_path / "ppo"), max_new_tokens=100, **more))
    with pytest.raises(UserError, match="more than the encoder's 99"):
        reward.main(replace(judge, out_dir=str(tmp_path / "c"), max_length=100))
    with pytest.raises(UserError, match="leave room for an answer"):
        reward.main(replace(judge, out_dir=str(tmp_path / "b"), max_new_tokens=99))


def test_what_does_not_fit_an_encoder_is_refused(tmp_path, policy):
    with pytest.raises(UserError, match="one score for the whole answer"):
        reward.main(judging(policy, tmp_path / "a", token_weight=0.5))
    with pytest.raises(UserError, match="not an encoder"):
        reward.main(judging(policy, tmp_path / "b", encoder=str(policy / "sft")))
    encoder.main(tiny(tmp_path / "mlm", objective="mlm", epochs=0.2))  # bytes, where the policy writes BPE
    with pytest.raises(UserError, match="reads other tokens .* --tokenizer_from"):
        reward.main(judging(policy, tmp_path / "c", encoder=str(tmp_path / "mlm")))
    with pytest.raises(UserError, match="there is no checkpoint"):
        reward.main(judging(policy, tmp_path / "d", encoder=str(tmp_path / "none")))
