import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_pretrain

import chat
import generate
import pretrain
from chat import below, pieces, printable
from runtime.errors import run_main
from runtime.progress import Progress
from stages import load_stage
from tokenizer import BPETokenizer, ByteTokenizer, encode_chat

ROOT = Path(__file__).parent.parent
TEXT = "aé€😀 z"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train([TEXT * 3], 262)], ids=["bytes", "bpe"])
def test_a_character_comes_when_its_last_byte_has_come(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)  # some characters are spread over tokens
    parts = list(pieces(tokenizer, ids))
    assert "".join(parts) == TEXT and "\N{REPLACEMENT CHARACTER}" not in "".join(parts)
    assert all(parts)  # nothing is given out before there is something


def test_pieces_come_as_early_as_they_can():
    asked = []

    def ids():
        for token in ByteTokenizer().encode("é!"):
            asked.append(token)
            yield token

    stream = pieces(ByteTokenizer(), ids())
    assert next(stream) == "é" and len(asked) == 2
    assert next(stream) == "!" and len(asked) == 3


def test_bytes_that_are_no_character_are_replaced_and_the_rest_goes_on():
    assert "".join(pieces(ByteTokenizer(), [0xC3, ord("x"), 0xE2, 0x82])) == "\ufffdx\ufffd"
    assert list(pieces(ByteTokenizer(), [])) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pretrain.main(tiny_pretrain(folder, steps=2, max_documents=60, vocab_size=270, max_seq_len=96))
    return folder


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """``python chat.py MODEL ARGUMENTS`` with lines on stdin: (status, stdout, stderr)."""

    def run(*arguments, lines="", checkpoint=model):
        monkeypatch.setattr(sys, "argv", ["chat.py", str(checkpoint), *map(str, arguments), "--device", "cpu"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = 0
        try:
            run_main(chat.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def greedy(folder, ids: list[int], n: int) -> str:
    """The likeliest continuation, computed anew for each token."""
    net, tokenizer, _ = load_stage(str(folder))
    new: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            token = int(net(torch.tensor([ids + new]))[0, -1].argmax())
            if token == tokenizer.eot_id:
                break
            new.append(token)
    return "".join(pieces(tokenizer, new))


def test_a_prompt_is_answered_in_the_chat_template(talk, model):
    status, out, err = talk("--prompt", "How many?", "--system", "Be brief.", "--temperature", 0, "--max_new_tokens", 6)
    tokenizer = load_stage(str(model))[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    assert status == 0 and out == printable(greedy(model, encode_chat(tokenizer, messages, True)[0], 6)) + "\n"
    assert "--raw" in err  # a base model knows no template, and that is said


def test_raw_continues_the_text_itself(talk, model):
    status, out, err = talk("--raw", "--prompt", "Tom has", "--temperature", 0, "--max_new_tokens", 6)
    tokenizer = load_stage(str(model))[1]
    assert (status, err) == (0, "") and out == printable(
        "Tom has" + greedy(model, tokenizer.encode("Tom has"), 6)
    ) + "\n"


def test_raw_asks_for_the_text_and_its_end_is_no_error(talk):
    assert talk("--raw", "--max_new_tokens", 2, lines="Tom\n")[0] == 0
    status, _, err = talk("--raw", "--max_new_tokens", 2)
    assert "Traceback" not in err and len(err.splitlines()) <= 1


def test_the_same_seed_gives_the_same_answer(talk):
    first, again, other = (
        talk("--prompt", "Hi", "--temperature", 2, "--seed", s, "--max_new_tokens", 20) for s in (1, 1, 2)
    )
    assert first == again != other


def test_with_a_window_a_text_goes_on_behind_its_end(talk, monkeypatch):
    """A pretrained model ends every document; a stream of text goes on with the next one."""
    monkeypatch.setattr(chat, "stream", lambda model, ids, n, eot_id, **rest: iter([97, 98] if eot_id == -1 else [97]))
    assert talk("--raw", "--prompt", "Tom", "--window", 8)[1] == "Tomab\n"
    assert talk("--raw", "--prompt", "Tom")[1] == "Toma\n"
    assert talk("--prompt", "Tom", "--window", 8)[1] == "a\n"  # an answer ends where it ends


def test_a_window_wider_than_the_context_is_refused(talk, model):
    longest = load_stage(str(model))[0].config.max_seq_len
    status, _, err = talk("--raw", "--prompt", "Tom", "--window", longest - 3, "--sinks", 4)
    assert status == 1 and f"context holds {longest}" in err and len(err.splitlines()) == 1


def test_with_a_window_a_text_may_be_longer_than_the_context(talk, model):
    """And each token is the likeliest of what the window shows."""
    net, tokenizer, _ = load_stage(str(model))
    n = net.config.max_seq_len + 20
    long = ("--raw", "--prompt", "Tom has", "--temperature", 0, "--max_new_tokens", n)
    status, out, _ = talk(*long, "--window", 8, "--sinks", 2)
    assert status == 0
    net.config = dataclasses.replace(net.config, window=8, sinks=2)
    start = tokenizer.encode("Tom has")
    new: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            new.append(int(net(torch.tensor([start + new]))[0, -1].argmax()))
    assert out == printable("Tom has" + "".join(pieces(tokenizer, new))) + "\n"
    assert len(new) > net.config.max_seq_len - len(start)
    assert len(talk(*long)[1]) < len(out)  # without one it stops at the end of the context
    for wrong in (("--window", 0), ("--window", 8, "--sinks", -1)):
        status, _, err = talk(*long, *wrong)
        assert status == 1 and "a window starts at 1" in err


@pytest.fixture
def prompts_of(monkeypatch):
    """The ids from which each answer starts; the answers are ``x`` and ``y`` in turn."""
    seen: list[list[int]] = []

    def stream(model, ids, *args, **more):
        seen.append(list(ids))
        yield ord("xy"[len(seen) % 2])

    monkeypatch.setattr(chat, "stream", stream)
    return seen


def test_a_conversation_remembers_until_new_and_an_empty_line_is_none(talk, model, prompts_of):
    status, out, _ = talk(lines="one\n\ntwo\n/new\nthree\n/quit\nnever asked\n")
    tokenizer = load_stage(str(model))[1]
    assert status == 0 and out.count("model: ") == 3
    one = [{"role": "user", "content": "one"}]
    two = [*one, {"role": "assistant", "content": "y"}, {"role": "user", "content": "two"}]
    expected = [one, two, [{"role": "user", "content": "three"}]]
    assert prompts_of == [encode_chat(tokenizer, messages, True)[0] for messages in expected]


def test_the_end_of_the_input_ends_the_conversation(talk, prompts_of):
    status, out, err = talk(lines="one\n")
    assert status == 0 and "Traceback" not in err and len(prompts_of) == 1


def test_new_keeps_the_system_message(talk, model, prompts_of):
    talk("--system", "S", lines="one\n/new\ntwo\n\n")
    tokenizer = load_stage(str(model))[1]
    expected = [{"role": "system", "content": "S"}, {"role": "user", "content": "two"}]
    assert prompts_of[-1] == encode_chat(tokenizer, expected, True)[0]


def test_a_long_conversation_forgets_its_oldest_questions(talk, model, prompts_of):
    status, _, err = talk("--system", "S", lines="a" * 30 + "\n" + "b" * 30 + "\n" + "c" * 30 + "\n\n")
    tokenizer = load_stage(str(model))[1]
    kept = tokenizer.decode(prompts_of[-1])
    assert status == 0 and "forgotten" in err
    assert "a" * 30 not in kept and "c" * 30 in kept and "S" in kept  # the system message stays
    assert all(len(ids) < 96 for ids in prompts_of)


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["chat", "raw"])
def test_a_question_longer_than_the_context_is_one_line(talk, raw):
    status, _, err = talk("--prompt", "q" * 500, *raw)
    error = [line for line in err.splitlines() if not line.startswith("note")]
    assert status == 1 and len(error) == 1 and "tokens; the model's context holds 96" in error[0]


def test_an_answer_stops_where_the_context_ends(talk):
    status, out, _ = talk("--raw", "--prompt", "q" * 90, "--max_new_tokens", 500, "--temperature", 0)
    assert status == 0 and len(out) < 200


@pytest.mark.parametrize(
    ("flag", "value"),
    [("temperature", -1), ("temperature", "nan"), ("temperature", 1e-40), ("seed", 10**25), ("top_p", 0),
     ("top_p", 1.5), ("min_p", -0.1), ("min_p", 2), ("top_k", -3), ("max_new_tokens", 0)],
)  # fmt: skip
def test_knobs_out_of_range_are_one_line(talk, flag, value):
    status, out, err = talk("--prompt", "x", f"--{flag}", value)
    assert status == 1 and out == "" and len(err.splitlines()) == 1 and flag in err


def test_a_wrong_path_is_one_line_that_says_how_to_make_one(talk, tmp_path):
    status, out, err = talk("--prompt", "x", checkpoint=tmp_path / "nothing")
    assert status == 1 and out == "" and len(err.splitlines()) == 1
    assert str(tmp_path / "nothing") in err and "python pipeline.py" in err


def test_a_file_that_is_no_checkpoint_is_one_line(talk, tmp_path):
    (tmp_path / "x.pt").write_text("hello")
    status, _, err = talk("--prompt", "x", checkpoint=tmp_path / "x.pt")
    assert status == 1 and len(err.splitlines()) == 1 and "x.pt" in err


def test_a_conversation_begins_with_who_speaks_and_how_to_leave(talk, model, prompts_of):
    status, out, err = talk(lines="one\n\n\ntwo\n/quit\nthree\n")  # an empty line is none
    assert out.count("model: ") == 2
    assert status == 0 and out.splitlines()[0].startswith("you: model: ")
    assert f"{model}: pretrain after 2 steps (pretrain)" in err and "context of 96 tokens" in err
    assert all(word in err for word in ("/new", "/help", "/quit", "Ctrl-D", "parameters"))
    assert "/new" not in talk("--prompt", "one")[2]  # one answer needs no greeting


def test_the_greeting_names_the_parents(talk, model, prompts_of, monkeypatch):
    net, tokenizer, state = load_stage(str(model))
    state |= {"stage": "grpo", "lineage": [{"stage": "pretrain"}, {"stage": "sft"}]}
    monkeypatch.setattr(chat, "load_stage", lambda *_: (net, tokenizer, state))
    assert "(pretrain → sft → grpo)" in talk(lines="")[2]


def test_commands_are_answered_and_not_asked(talk, prompts_of):
    status, _, err = talk(lines="/help\n/nwe\nreal\n/quit\nnever asked\n")
    assert status == 0 and len(prompts_of) == 1
    assert err.count("Ctrl-C stops an answer") == 2 and "no command /nwe" in err


STEERING = "a\x1b[2J\x07b\r\n\tc\x9b31m\u202ed\x7f"


def test_what_steers_a_terminal_does_not_reach_it(talk, monkeypatch):
    assert printable(STEERING) == "a\\x1b[2J\\x07b\\r\n\tc\\x9b31m\\u202ed\\x7f"
    assert printable(TEXT) == TEXT
    monkeypatch.setattr(chat, "stream", lambda *_, **__: iter(STEERING.encode()))
    for arguments in (("--prompt", "x"), ("--raw", "--prompt", "x")):
        out = talk(*arguments)[1]
        assert printable(STEERING) in out and not set(out) & set("\x1b\x07\r\x9b\x7f\u202e")


def test_the_conversation_remembers_what_the_model_wrote_not_what_was_shown(talk, model, monkeypatch):
    seen = []

    def stream(model, ids, *_, **__):
        seen.append(list(ids))
        yield 0x1B

    monkeypatch.setattr(chat, "stream", stream)
    talk(lines="one\ntwo\n\n")
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "\x1b"}]
    messages.append({"role": "user", "content": "two"})
    assert seen[1] == encode_chat(load_stage(str(model))[1], messages, True)[0]


def fixed(*pairs):
    return lambda *_, **__: iter([(byte, p) for text, p in pairs for byte in text.encode()])


def test_probabilities_stand_below_the_tokens_where_there_are_no_colours(talk, monkeypatch):
    monkeypatch.setattr(chat, "stream_with_probs", fixed(("a", 0.98), (" ", 0.5), ("é", 0.5), ("\x1b", 0.125)))
    out = talk("--prompt", "x", "--probs")[1]
    above, under = out.strip().splitlines()
    assert above.split() == ["a", "·", "é", "\\x1b"] and under.split() == ["0.98", "0.50", "0.25", "0.12"]
    assert [above.index(word) for word in above.split()] == [under.index(p) for p in under.split()]
    wrapped = below([("token", 0.5)] * 9, width=30).splitlines()
    assert len(wrapped) == 6 and max(map(len, wrapped)) <= 30
    assert talk("--probs", lines="x\n\n")[1].count("0.98") == 1  # in a conversation too


def test_probabilities_are_colours_where_there_are_some(talk, monkeypatch):
    monkeypatch.setattr(chat, "stream_with_probs", fixed(("a", 0.98), ("b", 0.6), ("\x1b", 0.1)))
    monkeypatch.setattr(chat, "has_colours", lambda: True)
    status, out, err = talk("--prompt", "x", "--probs")
    assert status == 0 and out == "a\033[33mb\033[0m\033[7m\\x1b\033[0m\n" and "0.9 or more" in err


def test_the_probability_is_that_of_the_model_before_temperature(model):
    net, tokenizer, _ = load_stage(str(model))
    ids = tokenizer.encode("Tom has")
    knobs = {"eot_id": -1, "seed": 1, "temperature": 0.5, "top_k": 3}
    drawn = list(generate.stream_with_probs(net, ids, 5, **knobs))
    assert [token for token, _ in drawn] == list(generate.stream(net, ids, 5, **knobs))
    for i, (token, probability) in enumerate(drawn):
        with torch.no_grad():
            logits = net(torch.tensor([ids + [t for t, _ in drawn[:i]]]))[0, -1]
        assert probability == pytest.approx(float(logits.softmax(-1)[token]), abs=1e-5)


def test_ctrl_c_stops_an_answer_and_at_a_prompt_leaves(talk, monkeypatch):
    def stream(*_, **__):
        yield ord("a")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", stream)
    status, out, err = talk(lines="one\ntwo\n\n")
    assert status == 0 and out.count("a (stopped)") == 2
    status, out, err = talk("--prompt", "x")
    assert status == 130 and "checkpoint" not in err and "Traceback" not in err and err.endswith("stopped\n")

    def pressed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    status, out, err = talk()
    assert status == 130 and "left the chat" in err and "checkpoint" not in err and "Traceback" not in err


def test_the_script_itself(model):
    done = subprocess.run(
        [sys.executable, "chat.py", str(model), "--raw", "--prompt", "Tom", "--temperature", "0", "--max_new_tokens=4"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("Tom") and done.stderr == ""


def test_what_a_run_prints_of_its_answers_does_not_steer_the_terminal_either(tmp_path, capsys):
    Progress("grpo", tmp_path, world=1, is_main=True).print(f"wrong: {STEERING}")
    out = capsys.readouterr().out
    assert printable(STEERING) in out and not set(out) & set("\x1b\x07\x9b\x7f")
