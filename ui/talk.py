"""Answers for the panel's conversation: as chat.py gives them, with what else each token could have been."""

import codecs
import html
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import chat
from generate import cache_for, goes_on, prefill, sample
from runtime.device import autocast, pick_device, pick_precision
from runtime.errors import UserError
from stages import load_stage
from tokenizer import Tokenizer, encode_chat
from ui.folder import plain_file

KEPT = 3  # models that stay in memory
OTHERS = 6  # alternatives to a token


@dataclass(frozen=True)
class Token:
    """One token of an answer, with the probability that the model gave it, and the likeliest ones in its place."""

    text: str
    probability: float
    others: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Loaded:
    speaker: chat.Speaker
    stage: str
    about: str
    step: int


_loaded: OrderedDict[tuple, Loaded] = OrderedDict()
_busy = threading.Lock()


def load(path: Path) -> Loaded:
    """The model of a run, kept in memory while its checkpoint is the same. UserError: it cannot write."""
    found = plain_file(path / "ckpt.pt" if path.is_dir() else path)
    if found is None:
        raise UserError(f"there is no checkpoint in {path.name}")
    key = (str(path), found.st_mtime_ns, found.st_size)
    with _busy:
        if key not in _loaded:
            model, tokenizer, state = load_stage(str(path), device=pick_device("auto"))
            speaker = chat.make_speaker(chat.Config(str(path)), model, tokenizer)
            chain = " → ".join([*(str(one.get("stage")) for one in state["lineage"]), state["stage"]])
            _loaded[key] = Loaded(speaker, state["stage"], f"{chain}, {state['step']:,} steps", state["step"])
            while len(_loaded) > KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def prompt_ids(loaded: Loaded, messages: list[dict], raw: bool) -> list[int]:
    """What the model reads: the conversation in its template, or the last message as text. UserError: too long."""
    speaker = loaded.speaker
    if raw:
        tokenizer = speaker.tokenizer
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = [*ids, *tokenizer.encode(messages[-1]["content"])] or [tokenizer.document_id]
    else:
        ids = encode_chat(speaker.tokenizer, messages, add_generation_prompt=True)[0]
    if len(ids) >= speaker.context:
        raise UserError(f"this has {len(ids)} tokens; the model's context holds {speaker.context}")
    return ids


@torch.no_grad()
def answer(loaded: Loaded, messages: list[dict], settings: chat.Config) -> Iterator[Token]:
    """The answer, token by token as it is drawn: the same tokens as chat.py's for the same settings and seed."""
    chat.check(settings)
    speaker = replace(loaded.speaker, config=replace(settings, checkpoint=loaded.speaker.config.checkpoint))
    model, tokenizer, ids = speaker.model, speaker.tokenizer, prompt_ids(loaded, messages, settings.raw)
    last = -1 if speaker.endless and settings.raw else tokenizer.end_ids
    knobs = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    device, most = model.head.weight.device, min(settings.max_new_tokens, speaker.context - len(ids))
    generator = None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with autocast(device, pick_precision("auto", device)):
        cache = cache_for(model, 1, len(ids) + most)
        hidden = prefill(model, torch.tensor([ids], device=device), None, cache)
        for n in range(1, most + 1):
            logits = model.head(hidden)  # (1, V)
            token, _ = sample(logits, generator, **knobs)
            if not goes_on(token, last):
                break
            probabilities = logits.float().softmax(dim=-1)[0]
            best = probabilities.topk(min(OTHERS, len(probabilities)))
            others = tuple((text_of(tokenizer, i), p) for i, p in zip(best.indices.tolist(), best.values.tolist()))
            yield Token(decoder.decode(tokenizer.token_bytes(int(token))), float(probabilities[token]), others)
            if n < most:
                hidden = model.forward_hidden(token[:, None], cache=cache)[:, -1]
    if rest := decoder.decode(b"", final=True):
        yield Token(rest, 1.0, ())


def text_of(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def shade(probability: float) -> str:
    """The colour behind a token of that probability.

    >>> shade(1.0), shade(0.5)
    ('rgba(213,94,0,0.00)', 'rgba(213,94,0,0.30)')
    """
    return f"rgba(213,94,0,{min(0.55, 0.6 * (1 - probability)):.2f})"


def as_html(tokens: list[Token]) -> str:
    """The answer as markup in which every text is escaped: the less likely a token, the stronger its colour; what else
    it could have been stands in its title."""
    spans = []
    for token in tokens:
        others = "\n".join(f"{p:7.1%}  {visible(text)}" for text, p in token.others)
        spans.append(
            f'<span title="{html.escape(f"{token.probability:.1%}{chr(10)}{others}", quote=True)}" '
            f'style="background:{shade(token.probability)};border-radius:3px">{html.escape(token.text)}</span>'
        )
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.8 ui-monospace,Menlo,Consolas,monospace"
    return f'<div style="{style}">{"".join(spans) or "&nbsp;"}</div>'


def _legend() -> str:
    box = "display:inline-block;padding:0 7px;border:1px solid rgba(128,128,128,.35);border-radius:3px;margin-left:6px"
    boxes = "".join(f'<span style="{box};background:{shade(p)}">{p:.0%}</span>' for p in (1.0, 0.5, 0.1))
    told = "Hover a token to see how sure the model was of it, and what else could have stood there. Its probability:"
    return f'<div style="font-size:13px;opacity:.8">{told}{boxes}</div>'


LEGEND = _legend()


def visible(text: str) -> str:
    """A token's text on one line."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
