"""Talk to any checkpoint.

    python chat.py out/arith/grpo --prompt "Tom has 4 apples and finds 3 more. How many apples does Tom have?"
    python chat.py out/arith/grpo                            # a conversation; an empty line ends it, /new forgets it
    python chat.py out/arith/pretrain --raw --prompt "One day Tom went to"
    python chat.py out/arith/pretrain --raw --prompt "Tom" --window 64 --max_new_tokens 100000     # a text without end

The model answers in the chat template it was trained with; a base model knows none, so with ``--raw`` it continues
the text itself.
"""

import codecs
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tyro

from generate import stream
from runtime.config import parse
from runtime.device import autocast, pick_device, pick_precision
from runtime.errors import UserError, run_main
from stages import load_stage
from tokenizer import Tokenizer, encode_chat


@dataclass(frozen=True)
class Config:
    checkpoint: tyro.conf.Positional[str] = "out/arith/grpo"
    """A run's folder or a checkpoint file."""
    prompt: str = ""
    """Answer this and stop. Without it, a conversation."""
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
    """The longest answer."""
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


def main() -> None:
    config = parse(Config)
    check(config)
    device = pick_device(config.device)
    model, tokenizer, state = load_stage(config.checkpoint, "python pipeline.py", device)
    model.eval()
    if config.window is not None:
        model.config = dataclasses.replace(model.config, window=config.window, sinks=config.sinks)
    # Rotary positions go on behind the longest text of training, and in a short window no distance is longer than
    # there.
    longest = model.config.max_seq_len
    seen = longest + 1 if model.config.window is None else model.config.window + model.config.sinks
    if config.window is not None and seen > longest:
        raise UserError(f"a window of {config.window} with {config.sinks} sinks: the model's context holds {longest}")
    endless = seen <= longest and model.config.positions == "rope"
    context = sys.maxsize if endless else model.config.max_seq_len
    if state["stage"] == "pretrain" and not config.raw:
        print("note: a pretrained model knows no chat template; --raw continues the text itself", file=sys.stderr)

    def reply(ids: list[int], show: bool = True) -> str:
        room = context - len(ids)
        knobs = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        text = ""
        last = -1 if endless and config.raw else tokenizer.eot_id  # -1: no token is the last
        with autocast(device, pick_precision("auto", device)):
            drawn = stream(model, ids, min(config.max_new_tokens, room), eot_id=last, seed=config.seed, **knobs)
            for piece in pieces(tokenizer, drawn):
                text += piece
                print(piece, end="", flush=True)
        print()
        return text

    if config.raw:
        try:
            text = config.prompt or input("text: ")
        except EOFError:
            return
        ids = tokenizer.encode(text) or [tokenizer.eot_id]
        if len(ids) >= context:
            raise UserError(f"the text has {len(ids)} tokens; the model's context holds {context}")
        print(text, end="")
        reply(ids)
        return
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(start)
    while True:
        question = config.prompt
        if not question:
            try:
                question = input("you: ").strip()
            except EOFError:
                question = ""
            if question == "/new":
                messages = list(start)
                continue
            if not question:
                return
        messages.append({"role": "user", "content": question})
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
        forgotten = 0
        while len(ids) > context - 16 and len(messages) > len(start) + 1:
            del messages[len(start) : len(start) + 2]  # the oldest question and its answer
            forgotten += 1
            ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
        if forgotten:
            print(f"({forgotten} earlier questions no longer fit into the context and were forgotten)", file=sys.stderr)
        if len(ids) >= context:
            raise UserError(f"the question has {len(ids)} tokens; the model's context holds {context}")
        if not config.prompt:
            print("model: ", end="")
        messages.append({"role": "assistant", "content": reply(ids)})
        if config.prompt:
            return


if __name__ == "__main__":
    run_main(main)
