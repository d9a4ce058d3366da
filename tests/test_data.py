import gzip
import json
import lzma
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
import torch

import data
from data import (
    PackedRows,
    TokenFile,
    encode_prompts,
    epoch_batch,
    pack,
    prepare_tokens,
    similar_lengths,
    write_tokens,
)
from runtime.errors import UserError
from runtime.rows import read_dataset
from texts import load_chats, load_prompts, text_documents
from tokenizer import ByteTokenizer, encode_chat
from transformer import ModelConfig, Transformer

BYTES = ByteTokenizer()


def mirror(root, hub_id, split, rows, config=None, ending="jsonl.xz"):
    folder = root / hub_id.replace("/", "__") / (config or "")
    folder.mkdir(parents=True, exist_ok=True)
    opener = {"jsonl.xz": lzma.open, "jsonl.gz": gzip.open, "jsonl": open}[ending]
    path = folder / f"{split}.{ending}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


GSM8K = [
    {"question": "How many eggs?", "answer": "He has 2*36 = <<2*36=72>>72 eggs.\n#### 72"},
    {"question": "How much?", "answer": "It is $1,080.\n#### 1,080"},
    {"question": "No gold", "answer": "It is 5."},
    {"question": "  ", "answer": "x\n#### 5"},
    {"question": "Below zero?", "answer": "It is -10.\n#### -10"},
]


# ----------------------------------------------------------------------------------------------------------------------
# Where rows come from


@pytest.mark.parametrize("ending", ["jsonl.xz", "jsonl.gz", "jsonl"])
@pytest.mark.parametrize("config", [None, "main"])
def test_the_mirror_is_read_in_every_form(tmp_path, ending, config):
    mirror(tmp_path, "some/thing", "train", [{"a": 1}, {"a": "é\u2028x"}], config, ending)
    assert list(read_dataset("some/thing", config, "train", str(tmp_path))) == [{"a": 1}, {"a": "é\u2028x"}]


def test_the_hub_path_loads_through_datasets(tmp_path):
    """A local directory stands in for a hub id; the code that loads is the same."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for streaming in (False, True):
        rows = read_dataset(str(tmp_path), None, "train", streaming=streaming)
        assert [row["text"] for row in rows] == ["one", "two"]


def test_no_network_and_no_mirror_is_one_line_with_both_ways(tmp_path):
    with pytest.raises(UserError) as error:
        list(read_dataset("no-such/data", None, "train"))
    text = str(error.value)
    assert "no-such/data" in text and "--data_dir" in text and "ALIGNBOOK_DATA" in text and "\n" not in text
    with pytest.raises(UserError, match="no-such__data/train.jsonl"):
        list(read_dataset("no-such/data", None, "train", str(tmp_path)))


@pytest.mark.parametrize("ending", ["jsonl.xz", "jsonl.gz", "jsonl"])
def test_a_cut_off_file_is_an_error_that_counts_its_rows(tmp_path, ending):
    path = mirror(tmp_path, "x/y", "train", [{"a": i, "b": i * i} for i in range(4000)], ending=ending)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="cut off|damaged"):
        list(read_dataset("x/y", None, "train", str(tmp_path)))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    mirror(tmp_path, "openai/gsm8k", "train", [{"Question": "x", "answer": "#### 1"}] * 60, "main")
    with pytest.raises(UserError, match="no column question; it has Question, answer"):
        load_chats("gsm8k", "train", str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens for pretraining


def test_token_file_holds_every_document_and_counts_its_bytes(tmp_path, capsys):
    texts = ["héllo", "", "  ", None, "world"]
    write_tokens(tmp_path / "t.bin", BYTES, {"train": texts, "validation": ["x"]}, "f")
    assert "2 empty" in capsys.readouterr().out
    file = TokenFile(tmp_path / "t.bin")
    ids = [*BYTES.encode("héllo"), BYTES.eot_id, *BYTES.encode("world"), BYTES.eot_id]
    assert file.splits["train"].tolist() == ids and file.splits["train"].dtype == np.uint16
    assert file.bytes_per_token["train"] == 11 / 13 and len(file) == 13
    file.close()


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    class Large(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size, self.eot_id = 100_000, 99_999

    write_tokens(tmp_path / "t.bin", Large(), {"train": ["a"], "validation": ["b"]}, "f")
    tokens = TokenFile(tmp_path / "t.bin").splits["train"]
    assert tokens.dtype == np.uint32 and tokens.tolist() == [97, 99_999]


def test_windows_are_stretches_of_the_file_and_depend_on_the_seed_alone(tmp_path):
    write_tokens(tmp_path / "t.bin", BYTES, {"train": ["abcdefghij" * 20], "validation": ["x" * 50]}, "f")
    file = TokenFile(tmp_path / "t.bin")
    whole = file.splits["train"].astype(int).tolist()
    first = file.random_starts("train", 5, 20, (0, 7))
    assert np.array_equal(first, file.random_starts("train", 5, 20, (0, 7)))
    assert not np.array_equal(first, file.random_starts("train", 5, 20, (0, 8)))
    for row in file.windows("train", first, 20).tolist():
        assert any(whole[i : i + 20] == row for i in range(len(whole)))
    starts = {int(s) for seed in range(300) for s in file.random_starts("train", 1, 20, (0, seed))}
    assert max(starts) == len(whole) - 20  # the last window is reachable
    with pytest.raises(UserError, match="fewer than one window"):
        file.random_starts("train", 1, 1000, (0, 0))
    file.close()


def test_an_interrupted_token_file_is_made_again(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(b"half a file")
    prepare_tokens(path, BYTES, "arith", "", 0, limit=50)
    before, whole = path.stat().st_mtime_ns, path.read_bytes()
    prepare_tokens(path, BYTES, "arith", "", 0, limit=50)
    assert path.stat().st_mtime_ns == before  # made from the same source: kept
    for place in (0, 20, 45, 75, 85, 5000, len(whole) - 1):  # one bit: of the header, of a token
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        prepare_tokens(path, BYTES, "arith", "", 0, limit=50)
        assert path.read_bytes() == whole
    prepare_tokens(path, BYTES, "arith", "", 0, limit=60)
    assert path.stat().st_mtime_ns != before


def test_text_files_and_folders_are_split_without_overlap(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "sub" / "b.txt").write_text("b" * 200)
    assert list(text_documents(str(tmp_path), "train")) == ["a" * 95, "b" * 190]
    assert list(text_documents(str(tmp_path / "a.txt"), "validation")) == ["a" * 5]
    with pytest.raises(UserError, match="nowhere"):
        list(text_documents(str(tmp_path / "nowhere"), "train"))


def test_several_sources_of_text_are_read_one_after_the_other(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    both = f"{tmp_path / 'a.txt'}+{tmp_path / 'b.txt'}"
    assert list(text_documents(both, "train")) == ["a" * 95, "b" * 95]
    assert list(text_documents(both, "validation")) == ["a" * 5, "b" * 5]
    assert [len(list(text_documents(f"arith+{tmp_path / 'a.txt'}", "train", limit=n))) for n in (1, 3)] == [2, 4]
    path = tmp_path / "t.bin"
    prepare_tokens(path, BYTES, both, "", 0, limit=None)
    before = path.stat().st_mtime_ns
    (tmp_path / "b.txt").write_text("c" * 100)
    prepare_tokens(path, BYTES, both, "", 0, limit=None)
    assert path.stat().st_mtime_ns != before  # one of the files was mended
    made = []
    for seed in (0, 1):
        prepare_tokens(path, BYTES, f"arith+{tmp_path / 'a.txt'}", "", seed, limit=20)
        made.append(path.read_bytes())
    assert made[0] != made[1]  # the embedded task's text is another one for another seed


def test_a_corpus_without_validation_split_keeps_every_hundredth_document(tmp_path):
    mirror(tmp_path, "monology/pile-uncopyrighted", "train", [{"text": str(i)} for i in range(250)], ending="jsonl")
    train = list(text_documents("pile", "train", str(tmp_path)))
    held = list(text_documents("pile", "validation", str(tmp_path)))
    assert held == ["0", "100", "200"] and len(train) == 247 and not set(train) & set(held)


# ----------------------------------------------------------------------------------------------------------------------
# Chats in packed rows


def test_gsm8k_becomes_thinking_and_answer_and_bad_rows_are_counted(tmp_path, capsys):
    mirror(tmp_path, "openai/gsm8k", "train", [GSM8K[0], *GSM8K], "main")
    chats = load_chats("gsm8k", "train", str(tmp_path))  # row 0 is kept for validation
    assert chats[0][1]["content"] == "<think>He has 2*36 = 72 eggs.</think><answer>72</answer>"
    assert [chat[1]["content"].split("<answer>")[1] for chat in chats] == [
        "72</answer>",
        "1080</answer>",
        "-10</answer>",
    ]
    out = capsys.readouterr().out
    assert "skipped 2" in out and "1 with a gold answer without ####" in out and "1 without a question" in out
    assert len(load_chats("gsm8k", "validation", str(tmp_path))) == 1


def test_instructions_join_their_context_and_empty_ones_are_counted(tmp_path, capsys):
    rows = [
        {"instruction": "held", "input": "", "output": "x"},
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Nothing", "input": "", "output": " "},
    ]
    mirror(tmp_path, "tatsu-lab/alpaca", "train", rows)
    chats = load_chats("alpaca", "train", str(tmp_path))
    assert [chat[0]["content"] for chat in chats] == ["Add.\n\n2 and 3", "Say hi."]
    assert "1 with an empty instruction or response" in capsys.readouterr().out


def test_sources_are_joined_and_unknown_ones_refused(tmp_path):
    assert len(load_chats("arith+arith", "train", n=5)) == 10
    with pytest.raises(UserError, match="no chats called 'nope'"):
        load_chats("arith+nope", "train")


LENGTHS = [(3, 4), (2, 9), (5, 1), (20, 20), (1, 1), (6, 6)]
CHATS = [[{"role": "user", "content": "q" * a}, {"role": "assistant", "content": "a" * b}] for a, b in LENGTHS]


@pytest.mark.parametrize("packing", [True, False])
def test_packing_keeps_every_conversation_whole_and_once(packing, capsys):
    rows = pack(CHATS, BYTES, 32, packing)
    found = Counter()
    for tokens, mask, segments in zip(rows.tokens, rows.loss_mask, rows.segments):
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            found[tuple(tokens[here].tolist()), tuple(mask[here].int().tolist())] += 1
        padding = segments == 0
        assert (tokens[padding] == BYTES.pad_id).all() and not mask[padding].any()
    expected = Counter(
        (tuple(ids), tuple(mask)) for ids, mask in (encode_chat(BYTES, chat) for chat in CHATS) if len(ids) <= 32
    )
    assert found == expected and "1 longer than 32 tokens" in capsys.readouterr().out
    assert packing == (len(rows) < 5)
    first = [int(row[0]) for row in (rows.segments > 0).long().cumsum(1)]
    assert first == [1] * len(rows)


def test_packed_conversations_do_not_see_each_other():
    rows = pack(CHATS[:3], BYTES, 40)
    assert len(rows) == 1 and int(rows.segments.max()) == 3
    model = Transformer(ModelConfig(BYTES.vocab_size, 32, 2, 2))
    packed = model(rows.tokens, segments=rows.segments)[0]
    start = 0
    for chat in CHATS[:3]:
        ids = torch.tensor([encode_chat(BYTES, chat)[0]])
        torch.testing.assert_close(packed[start : start + ids.shape[1]], model(ids)[0], rtol=1e-4, atol=1e-5)
        start += ids.shape[1]


@pytest.mark.parametrize("packing", [True, False])
def test_a_conversation_that_just_fills_a_row_is_kept(packing, capsys):
    chats = [chat for chat in CHATS if len(encode_chat(BYTES, chat)[0]) <= 32]
    longest = max(len(encode_chat(BYTES, chat)[0]) for chat in chats)
    rows = pack(chats, BYTES, longest, packing)
    assert sum(int(row.max()) for row in rows.segments) == len(chats) and "longer than" not in capsys.readouterr().out
    assert (rows.segments == 1).all(dim=1).any()  # it fills its row


def test_rows_that_are_all_too_long_are_an_error():
    with pytest.raises(UserError, match="longer than 4 tokens"):
        pack(CHATS, BYTES, 4)


def test_every_row_once_in_each_epoch_and_the_step_alone_decides():
    taken = np.concatenate([epoch_batch(10, 4, step, seed=1) for step in range(5)])
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10)) and list(taken[:10]) != list(taken[10:])
    assert list(epoch_batch(10, 4, 3, seed=1)) == list(taken[12:16])


def test_batches_of_similar_lengths_hold_every_row_and_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 200, 103).tolist()
    batches = similar_lengths(lengths, 8, seed=1)
    assert len(batches) == 13 and all(len(batch) == 8 for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts) == set(range(103)) and sum(counts.values()) == 104
    widest = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert widest < 1.4 * sum(lengths)
    blind = sum(8 * max(lengths[i : i + 8]) for i in range(0, 96, 8))
    assert blind > 1.6 * sum(lengths[:96])
    assert batches == similar_lengths(lengths, 8, seed=1) != similar_lengths(lengths, 8, seed=2)
    assert similar_lengths([5, 3], 5, seed=0) == [[1, 0, 1, 0, 1]]
    assert isinstance(pack(CHATS, BYTES, 64), PackedRows)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_of_gsm8k_have_their_gold_and_bad_rows_are_counted(tmp_path, capsys):
    mirror(tmp_path, "openai/gsm8k", "test", GSM8K, "main")
    prompts = load_prompts("gsm8k", "test", str(tmp_path))
    assert [p.gold for p in prompts] == [Decimal(72), Decimal(1080), Decimal(-10)]
    assert "skipped 2" in capsys.readouterr().out


def test_prompts_of_svamp_join_body_and_question(tmp_path):
    row = {"ID": "1", "Body": "Tom has 3 pens", "Question": "How many?", "Equation": "3", "Answer": "3.0", "Type": "x"}
    mirror(tmp_path, "ChilleD/SVAMP", "test", [row])
    prompt = load_prompts("svamp", "test", str(tmp_path))[0]
    assert prompt.messages[0]["content"] == "Tom has 3 pens. How many?" and prompt.gold == 3


def test_the_exam_is_the_same_for_every_seed_and_disjoint_from_training():
    exam = load_prompts("arith", "test", seed=1, n=100)
    assert exam == load_prompts("arith", "test", seed=2, n=100)
    train = {p.messages[0]["content"] for p in load_prompts("arith", "train", seed=1)}
    assert not train & {p.messages[0]["content"] for p in exam}
    held_out = load_prompts("arith", "validation", seed=1)
    assert held_out == load_prompts("arith", "validation", seed=2) and len(held_out) == 512
    assert not train & {p.messages[0]["content"] for p in held_out} and len(load_prompts("arith", "train")) == 4096


def test_long_prompts_are_left_out_and_counted(capsys):
    prompts = load_prompts("arith", "test", n=20)
    lengths = sorted(len(encode_chat(BYTES, p.messages, True)[0]) for p in prompts)
    ids, kept = encode_prompts(prompts, BYTES, lengths[10])
    assert len(ids) == len(kept) and all(len(i) <= lengths[10] for i in ids) and len(ids) < 20
    assert f"{20 - len(ids)} longer than" in capsys.readouterr().out
    assert ids[0][-1] == BYTES.specials["<|assistant|>"]
    with pytest.raises(UserError):
        encode_prompts(prompts, BYTES, 3)


def test_bits_per_byte():
    assert data.bits_per_byte(0.6931471805599453, 1.0) == pytest.approx(1.0)
    assert data.bits_per_byte(2 * 0.6931471805599453, 4.0) == pytest.approx(0.5)
