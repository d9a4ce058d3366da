"""Talk to any checkpoint.

    python chat.py out/arith/grpo --prompt "Tom has 4 apples and finds 3 more. How many apples does Tom have?"
    python chat.py out/arith/grpo                            # a conversation; /help says how to steer it
    python chat.py out/arith/grpo --probs --prompt "12+15="  # how sure the model was of each token
    python chat.py out/arith/pretrain --raw --prompt "One day Tom went to"
    python chat.py out/arith/pretrain --raw --prompt "Tom" --window 64 --max_new_tokens 100000     # a text without end

The model answers in the chat template it was trained with; a base model knows none, so with ``--raw`` it continues
the text itself.
"""

import codecs
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tyro

from generate import stream, stream_with_probs
from runtime.config import parse
from runtime.device import PRECISIONS, autocast, pick_device, pick_precision
from runtime.errors import UserError, run_main
from runtime.progress import printable
from stages import load_stage
from tokenizer import Tokenizer, encode_chat
from transformer import Transformer, count_parameters, for_inference


@dataclass(frozen=True)
class Config:
    checkpoint: tyro.conf.Positional[str] = "out/arith/grpo"
    """A run's folder or a checkpoint file."""
    prompt: str = ""
    """Answer this and stop. Without a prompt, chat."""
    system: str = ""
    """A system message before the conversation."""
    raw: bool = False
    """Continue the prompt as text, without the chat template."""
    temperature: float = 0.7
    """0: always the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least so likely, compared with the likeliest."""
    max_new_tokens: int = 256
    """The longest answer, in tokens."""
    probs: bool = False
    """Show the probability that the model gave each token, before temperature and cuts: as a colour, or, where the
    output is no terminal with colours, as a number below it."""
    window: int | None = None
    """Let each token see only the last so many, itself included (None: as the model was trained). With a window the
    memory of the model rolls: --raw goes on past the end of a text and writes the next, up to max_new_tokens."""
    sinks: int = 4
    """With --window: the first tokens, which stay visible."""
    seed: int | None = None
    """The same seed gives the same answer."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they arrive. A character whose bytes are spread over several tokens comes when it is
    complete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if text := decoder.decode(tokenizer.token_bytes(token)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def check(config: Config) -> None:
    if config.temperature != 0 and not 1e-3 <= config.temperature <= 1e3:  # NaN too
        raise UserError("temperature is 0 (always the likeliest token) or lies between 0.001 and 1000")
    if not 0 < config.top_p <= 1 or not 0 <= config.min_p <= 1 or config.top_k < 0:
        raise UserError("top_k starts at 0; top_p lies between 0 and 1 (not 0), min_p between 0 and 1")
    if config.seed is not None and not 0 <= config.seed < 2**63:
        raise UserError("seed lies between 0 and 2**63")
    if config.max_new_tokens < 1:
        raise UserError("max_new_tokens starts at 1")
    if (config.window is not None and config.window < 1) or config.sinks < 0:
        raise UserError("a window starts at 1, sinks at 0")


# ----------------------------------------------------------------------------------------------------------------------
# What reaches the terminal


SHADES = ((0.9, ""), (0.5, "\033[33m"), (0.2, "\033[35m"), (0.0, "\033[7m"))  # from sure to unsure: the last stands out
PLAIN = "\033[0m"


def has_colours() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ


def shaded(text: str, probability: float) -> str:
    """The text in the colour of how sure the model was."""
    shade = next(code for least, code in SHADES if probability >= least)
    return f"{shade}{text}{PLAIN}" if shade else text


def below(tokens: list[tuple[str, float]], width: int) -> str:
    """Tokens in lines of at most ``width``, the probability of each below it.

    >>> print(below([("9*6=", 0.98), ("54", 0.5), ("+11=", 1.0)], width=80))
    9*6=  54    +11=
    0.98  0.50  1.00
    """
    lines: list[tuple[str, str]] = [("", "")]
    for text, probability in tokens:
        number = f"{probability:.2f}"
        wide = max(len(text), len(number)) + 2
        if lines[-1][0] and len(lines[-1][0]) + wide > width:
            lines.append(("", ""))
        above, under = lines[-1]
        lines[-1] = above + text.ljust(wide), under + number.ljust(wide)
    return "\n".join(line.rstrip() for pair in lines for line in pair)


# ----------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass(frozen=True)
class Speaker:
    """A model that answers, and how."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    context: int  # the most tokens that it can hold; without an end for a rolling window
    endless: bool

    def drawn(self, ids: list[int], probs: bool = False) -> Iterator:
        """The tokens that are drawn after ids, with their probabilities if asked for."""
        knobs = {name: getattr(self.config, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
        last = -1 if self.endless and self.config.raw else self.tokenizer.end_ids  # -1: no token is the last
        n = min(self.config.max_new_tokens, self.context - len(ids))
        device = self.model.head.weight.device
        with autocast(device, pick_precision("auto", device)):
            yield from (stream_with_probs if probs else stream)(self.model, ids, n, eot_id=last, **knobs)

    def reply(self, ids: list[int]) -> str:
        """Write what comes after ids as it is drawn; return it. Ctrl-C ends it where it is."""
        text = ""
        try:
            for piece in self.with_probs(ids) if self.config.probs else pieces(self.tokenizer, self.drawn(ids)):
                text += piece
                if not self.config.probs:
                    print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            if self.config.prompt:
                raise
            print(" (stopped)", end="")
        print()
        return text

    def with_probs(self, ids: list[int]) -> Iterator[str]:
        """The pieces of the answer, each printed with its probability before it is given out."""
        tokens: list[tuple[str, float]] = []
        decoder, together, colours = codecs.getincrementaldecoder("utf-8")(errors="replace"), 1.0, has_colours()
        try:
            for token, probability in self.drawn(ids, probs=True):
                together *= probability  # of the bytes of one character, all
                if text := decoder.decode(self.tokenizer.token_bytes(token)):
                    shown = printable(text)
                    if colours:
                        print(shaded(shown, together), end="", flush=True)
                    tokens.append((shown.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·"), together))
                    together = 1.0
                    yield text
        finally:
            if not colours:
                under = "\n" if self.config.raw or not self.config.prompt else ""  # what is already on the line
                print(under + below(tokens, shutil.get_terminal_size().columns), end="")


def make_speaker(config: Config, model: Transformer, tokenizer: Tokenizer) -> Speaker:
    """Give the model its window, if it is to have one. UserError: it does not fit into the context."""
    device = model.head.weight.device
    for_inference(model.eval(), PRECISIONS[pick_precision("auto", device)])
    if config.window is not None:
        model.config = dataclasses.replace(model.config, window=config.window, sinks=config.sinks)
    # Rotary positions go on behind the longest text of training, and in a short window no distance is longer than
    # there.
    longest = model.config.max_seq_len
    seen = longest + 1 if model.config.window is None else model.config.window + model.config.sinks
    if config.window is not None and seen > longest:
        raise UserError(f"a window of {config.window} with {config.sinks} sinks: the model's context holds {longest}")
    endless = seen <= longest and model.config.positions == "rope"
    return Speaker(model, tokenizer, config, sys.maxsize if endless else longest, endless)


def answer(path: str, question: str, raw: bool = False, device: str = "auto") -> str:
    """What the model of a checkpoint answers, greedily; with ``raw``, how it continues the question as text."""
    model, tokenizer, _ = load_stage(path, device=pick_device(device))
    speaker = make_speaker(Config(path, raw=raw, temperature=0.0, max_new_tokens=48), model, tokenizer)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.encode(question) if raw else encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
    return "".join(pieces(tokenizer, speaker.drawn(ids)))


# ----------------------------------------------------------------------------------------------------------------------
# The conversation

HELP = """  /new    forget the conversation and start another
  /help   this list
  /quit   leave; so does Ctrl-D. Ctrl-C stops an answer, or leaves"""


def greeting(speaker: Speaker, state: dict) -> str:
    """Who is speaking, where it comes from, how much it remembers, and how to steer it."""
    parents = " → ".join([*(stage["stage"] for stage in state["lineage"]), state["stage"]])
    context = "a rolling window" if speaker.endless else f"a context of {speaker.context} tokens"
    return (
        f"{speaker.config.checkpoint}: {state['stage']} after {state['step']:,} steps ({parents}), "
        f"{count_parameters(speaker.model):,} parameters, {context}\n{HELP}"
    )


def main() -> None:
    config = parse(Config)
    check(config)
    try:
        talk(config)
    except KeyboardInterrupt:
        print("\nstopped" if config.prompt or config.raw else "\nleft the chat", file=sys.stderr)
        sys.exit(130)


def talk(config: Config) -> None:
    """Answer the prompt, or questions until there are no more."""
    model, tokenizer, state = load_stage(config.checkpoint, "python pipeline.py", pick_device(config.device))
    speaker = make_speaker(config, model, tokenizer)
    if state["stage"] == "pretrain" and not config.raw:
        print("note: a pretrained model knows no chat template; --raw continues the text itself", file=sys.stderr)
    if config.probs and has_colours():
        names = ("0.9 or more", "0.5 to 0.9", "0.2 to 0.5", "less than 0.2")
        shades = ", ".join(shaded(name, least) for name, (least, _) in zip(names, SHADES))
        print(f"probability of each token: {shades}", file=sys.stderr)
    if config.raw:
        return continue_text(speaker)
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(start)
    if not config.prompt:
        print(greeting(speaker, state), file=sys.stderr)
    while True:
        try:
            question = config.prompt or input("you: ").strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if not question:
            continue
        if question.startswith("/") and not config.prompt:
            if question == "/new":
                messages = list(start)
            print(HELP if question == "/help" else "a new conversation" if question == "/new" else
                  f"there is no command {question}; /help lists them", file=sys.stderr)  # fmt: skip
            continue
        messages.append({"role": "user", "content": question})
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
        forgotten = 0
        while len(ids) > speaker.context - 16 and len(messages) > len(start) + 1:
            del messages[len(start) : len(start) + 2]  # the oldest question and its answer
            forgotten += 1
            ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
        if forgotten:
            what = f"{forgotten} oldest questions" if forgotten > 1 else "oldest question"
            print(f"(the context is full: the {what} had to be forgotten)", file=sys.stderr)
        if len(ids) >= speaker.context:
            raise UserError(f"the question has {len(ids)} tokens; the model's context holds {speaker.context}")
        if not config.prompt:
            print("model: ", end="", flush=True)
        messages.append({"role": "assistant", "content": speaker.reply(ids)})
        if config.prompt:
            return


def continue_text(speaker: Speaker) -> None:
    """Continue the prompt, or a line of input, as text."""
    try:
        text = speaker.config.prompt or input("text: ")
    except EOFError:
        return
    tokenizer = speaker.tokenizer
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*ids, *tokenizer.encode(text)] or [tokenizer.document_id]
    if len(ids) >= speaker.context:
        raise UserError(f"the text has {len(ids)} tokens; the model's context holds {speaker.context}")
    print(text, end="", flush=True)
    speaker.reply(ids)


if __name__ == "__main__":
    run_main(main)
