"""Chat templates and the tokens of published models: how a conversation becomes what they were trained on.

``tokenizer.json`` holds a published model's vocabulary, ``chat_template.jinja`` how a conversation is laid out, and
``generation_config.json`` where an answer ends. Three things are easily wrong, and none of them gives an error:

* **The same text, other ids.** A digit by itself or in threes, a space before a text or not. A byte-level vocabulary
  runs on tiktoken here, if that is exactly what the original does (``check_merges``); anything else is refused.
* **A role that a user typed.** ``<|im_start|>user`` is a role where the template has it, and must be letters where
  somebody says it. So the texts are encoded apart from the tokens (tokenizer.py).
* **An end that is not learned, or padding that is.** A model may stop at several tokens, and many published ones pad
  with one of them. Here padding is a token that ends nothing, and the mask of fine-tuning is 1 on an answer and the
  token that ends it.

A template is a program (jinja), and a published file's program is not run here. It is recognised by its form: ChatML
(SmolLM2, Qwen), Llama 3's, Mistral's, Zephyr's (TinyLlama) and our own. ``--template`` of pretrained.py gives a model
without one a form.

Run ``python templates.py`` to see one conversation in four of them.
"""

import dataclasses
import json
import re

from layers import ModelConfig
from runtime import vocabulary
from runtime.errors import UserError
from runtime.published import PublishedModel
from tokenizer import (
    SPLIT,
    ChatForm,
    PieceTokenizer,
    Published,
    PublishedTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    joined,
)

# ----------------------------------------------------------------------------------------------------------------------
# Chat templates, recognised by their form

_ROLES = ("<|im_start|>{}\n", "<|im_end|>\n"), ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>")
OWN = ChatForm(("<|system|>", ""), ("<|user|>", ""), ("<|assistant|>", "<|endoftext|>", ""))
CHATML = ChatForm(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>", "\n"),
)
LLAMA3 = ChatForm(
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    start="<|begin_of_text|>",
    trim="all",
)


def plain_form(eos: str) -> ChatForm:
    """For a base model, which has no roles: words that it has read, and the token that ends its texts."""
    return ChatForm(("", "\n\n"), ("User: ", "\n"), ("Assistant:", eos, "\n"), lead=" ")


def chat_form(template: str, bos: str | None, eos: str | None) -> ChatForm | None:
    """The form of a chat template's source; None if it is none that is known here. bos, eos: what the template calls
    ``bos_token`` and ``eos_token``.

    A template is recognised by the texts in it: the tokens of its roles and what stands around a message. Whatever else
    it can do (tools, pictures) is not used.
    """
    if template.strip() == jinja_of(OWN):
        return OWN
    text = re.sub(r"""['"]\s*\+\s*['"]""", "", template.replace("\\n", "\n"))  # 'a' + 'b' is 'ab'
    roles = set(re.findall(r"<\|[^|<>]+\|>", text))
    trims = re.search(r"""content(?:['"]\])?\s*\|\s*trim""", text) is not None
    # What would change a text or put one in, and is not read here: then nothing is guessed.
    content = r"""(?:message\[['"]content['"]\]|message\.content)"""
    if "<|start_header_id|>" not in roles and "[INST]" not in text:
        added = "bos_token" in text or re.search(rf"{content}\s*\.\s*strip\(", text)
        if added or re.search(r"""set\s+\w*system\w*\s*=\s*['"]""", text):
            return None
    elif re.search(r"""set\s+\w*system\w*\s*=\s*(['"])(?!\1)|system<\|end_header_id\|>\n\n(?!['"])""", text):
        return None
    if "<|im_start|>" in roles:
        thinks = "reasoning_content" in text and "<think>" in text
        known = roles <= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} and "<|im_end|>\n" in text
        if not known or "<|im_start|>assistant\n" not in text or "<|im_start|>assistant\n<think>" in text:
            return None
        said = re.search(r"""<\|im_start\|>system\n((?:(?!['"]\s*(?:\+|\}\})|<\|).)+)<\|im_end\|>""", text, re.DOTALL)
        default = said[1].replace("\\'", "'") if said else None
        return dataclasses.replace(CHATML, default_system=default, think=thinks, trim="all" if trims else "none")
    if "<|start_header_id|>" in roles:
        others = {"<|begin_of_text|>", "<|eom_id|>", "<|python_tag|>"}
        known = roles <= {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} | others and trims
        if not known or "<|start_header_id|>assistant<|end_header_id|>\n\n" not in text:
            return None
        return llama3_form(text)
    if {"<|user|>", "<|assistant|>"} <= roles <= {"<|user|>", "<|assistant|>", "<|system|>"} and eos:
        said = re.search(r"""<\|user\|>\n['"]\s*\+\s*message(?:\['content'\]|\.content)\s*\+\s*eos_token""", text)
        ends = re.findall(r"eos_token\s*([^}]*\}\})(\n?)\s*(\{%-)?", text)
        if not said or any(end != ("}}", "\n", "") for end in ends):  # a line break after each, and it stays
            return None
        return ChatForm(("<|system|>\n", f"{eos}\n"), ("<|user|>\n", f"{eos}\n"), ("<|assistant|>\n", eos, "\n"))
    if "[INST]" in text and not roles and bos and eos:
        return mistral_form(text, bos, eos)
    return None


def llama3_form(text: str) -> ChatForm | None:
    """Llama 3's. From 3.1 on the system always says two dates; today's is the one that the template has for engines
    without a clock, so that the same conversation is the same tokens tomorrow."""
    cutting = re.search(r"""Cutting Knowledge Date: [^\n'"]+\n""", text)
    if cutting is None:
        return LLAMA3
    today = re.search(r"""date_string = ['"]([^'"]+)['"]""", text)
    if today is None or "Today Date: " not in text:
        return None
    prefix = f"{cutting[0]}Today Date: {today[1]}\n\n"
    return dataclasses.replace(LLAMA3, default_system="", system_prefix=prefix)


def mistral_form(text: str, bos: str, eos: str) -> ChatForm | None:
    """Mistral's, whose versions differ in spaces. What the system says begins the first question."""
    before = set(re.findall(r"""(\[INST\]\s*)['"]\s*\+""", text))
    after = set(re.findall(r"""\+\s*['"](\s*\[/INST\]\s*)['"]""", text))
    content = r"""message(?:\[['"]content['"]\]|\.content)\s*(\|\s*trim)?\s*"""
    answer = re.findall(rf"""(?:['"](\s*)['"]\s*\+\s*)?{content}\+\s*eos_token(?:\s*\+\s*['"](\s*)['"])?""", text)
    if "<<SYS>>" in text or "[SYSTEM_PROMPT]" in text or not len(before) == len(after) == len(set(answer)) == 1:
        return None
    (lead, trims, behind), user = answer[0], (before.pop(), after.pop())
    return ChatForm(
        ("", ""),
        user,
        ("", eos, behind),
        start=bos,
        lead=lead,
        system_in_user=True,
        trim="answers" if trims else "none",
    )


def jinja_of(form: ChatForm) -> str:
    """A chat template for a form that has no source of its own, with the marks that transformers takes the loss mask
    from."""
    quote = lambda text: json.dumps(text, ensure_ascii=False)  # noqa: E731
    said = lambda before, after: f"{{{{- {quote(before)} + message['content'] + {quote(after)} }}}}"  # noqa: E731
    prompt, end, after = form.assistant
    parts = [f"{{{{- {quote(form.start)} }}}}"] if form.start else []
    if form.default_system is not None:
        default = "".join([form.system[0], form.system_prefix, form.default_system, form.system[1]])
        parts.append(f"{{%- if messages[0]['role'] != 'system' %}}{{{{- {quote(default)} }}}}{{%- endif %}}")
    parts += [
        "{%- for message in messages %}",
        f"{{%- if message['role'] == 'system' %}}{said(form.system[0] + form.system_prefix, form.system[1])}",
        f"{{%- elif message['role'] == 'user' %}}{said(*form.user)}",
        f"{{%- else %}}{{{{- {quote(prompt)} }}}}{{% generation %}}{said(form.lead, end)}{{% endgeneration %}}"
        f"{{{{- {quote(after)} }}}}{{%- endif %}}",
        "{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {quote(prompt)} }}}}{{%- endif %}}",
    ]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def tokenizer_from(model: PublishedModel, rows: int, template: str = "file") -> Published:
    """A published model's tokenizer. rows: of its embedding; template: "file", or the name of a form to give it."""
    source = model.tokenizer
    if not source or ("model" not in source and "pieces" not in source):
        raise UserError("there is no tokenizer.json")
    try:
        if "pieces" not in source and vocabulary.is_byte_level(source):
            kind, (state, pieces, merges) = PublishedTokenizer, vocabulary.read_byte_level(source)
            check_merges(pieces, merges)
        else:
            kind, state = PieceTokenizer, vocabulary.read_pieces(source)
        about = special_tokens(model, rows, template)
        tokenizer = kind(**state, **about)
    except (KeyError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"its tokenizer cannot be made: {type(error).__name__} {error}") from None
    if tokenizer.vocab_size > rows:
        raise UserError(f"its tokenizer has {tokenizer.vocab_size:,} tokens and its embedding {rows:,} rows")
    return tokenizer


def check_merges(pieces: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> None:
    """tiktoken joins any two neighbours that spell a piece; the original only those that it lists. The two are the same
    if every piece, spelled by itself, comes together at last by a listed pair of two smaller ids."""
    listed, by_id = set(merges), {i: piece for piece, i in pieces.items()}
    made = {a + b for a, b in merges}
    for piece in made:
        pair = tuple(by_id[i] for i in joined(piece, pieces, below=pieces[piece]))
        if pair not in listed:
            raise UserError(f"its piece {piece!r} is not made by its own merges")


def special_tokens(model: PublishedModel, rows: int, template: str) -> dict:
    """What ``Published`` wants to know besides the vocabulary: which tokens no text can produce, what ends and begins a
    text, what pads, and the template."""
    added, config = model.tokenizer.get("added_tokens", []), model.tokenizer_config
    names = {one["content"]: one["id"] for one in added}
    bos, eos, pad = (content_of(config.get(f"{role}_token")) for role in ("bos", "eos", "pad"))
    # Where generation stops: first the end of an answer, then what the files name.
    stops = model.generation_config.get("eos_token_id", model.config.get("eos_token_id"))
    stops = [names.get(eos), *(stops if isinstance(stops, list) else [stops])]
    eos = eos or next((name for name, i in names.items() if i in stops), None)  # GPT-2's files have its id alone
    form = form_of(model.template, template, bos, eos, names)
    ends = [names[form.assistant[1]]] * (form is not None) if form else []
    ends = list(dict.fromkeys(i for i in [*ends, *stops] if i is not None and 0 <= i < rows))
    if not ends:
        raise UserError("its files name no token that ends a text (eos_token)")
    document = next((names[one] for one in ("<|endoftext|>", "<|end_of_text|>", "</s>") if one in names), ends[0])
    begins = vocabulary.begins_with(model.tokenizer) or (bos if config.get("add_bos_token") else None)
    last = max([*names.values(), *vocabulary.ids_of(model.tokenizer)])
    padding = padding_id(pad, names, {*ends, document, names.get(begins)}, range(last + 1, rows), form)
    used = {*ends, document, padding, names.get(begins), *(names.get(one) for one in tokens_in(form))}
    specials = {one["content"]: one["id"] for one in added if one.get("special", True) or one["id"] in used}
    others = [one for one in added if one["content"] not in specials]
    if odd := [one["content"] for one in others if one.get("lstrip") or one.get("rstrip") or one.get("single_word")]:
        raise UserError(f"its token {odd[0]!r} takes the white space beside it away")
    return {
        "specials": specials, "text_specials": {one["content"]: one["id"] for one in others}, "ends": ends,
        "document": document, "pad": padding, "bos": names.get(begins),
        "template": model.template if form and template == "file" else "",
        "form": None if form is None else dataclasses.asdict(form),
    }  # fmt: skip


def form_of(source: str, template: str, bos: str | None, eos: str | None, names: dict[str, int]) -> ChatForm | None:
    """The form of a model's template, or the one that the user names."""
    if template == "file":
        form = chat_form(source, bos, eos) if source.strip() else None
        if form is None and source.strip():
            raise UserError("its chat template has a form that is not known here: --template names one, or none")
    elif template == "plain" and not eos:
        raise UserError("--template plain: its files name no token that ends a text (eos_token)")
    else:
        known = {"none": None, "chatml": CHATML, "llama3": LLAMA3, "plain": plain_form(eos or "")}
        form = known[template]
    missing = [one for one in tokens_in(form) if one not in names]
    if missing:
        raise UserError(f"its template wants the token {missing[0]!r}, which its vocabulary lacks")
    return form


def tokens_in(form: ChatForm | None) -> list[str]:
    """The special tokens that a form names."""
    if form is None:
        return []
    texts = [form.start, *form.system, *form.user, *form.assistant]
    spelled = re.findall(r"<\|[^|<>]+\|>", "".join(texts)) if form.assistant[1].startswith("<|") else []
    return [*filter(None, [form.start, form.assistant[1]]), *spelled]


def padding_id(name: str | None, names: dict[str, int], taken: set, unused: range, form: ChatForm | None) -> int:
    """A token to pad with that ends nothing: the file's own, one that is called so, an ``unused`` row of the embedding,
    or any. Nothing is ever told from padding by its id, so that the last may be a token of the text."""
    taken = taken | {names[one] for one in tokens_in(form)}
    called = [i for one, i in names.items() if "pad" in one.lower()]
    unknown = [names[one] for one in ("<unk>", "<empty_output>") if one in names]
    wanted = [names.get(name), *called, *unused[:1], *unknown, *range(len(taken) + 1)]
    return next(i for i in wanted if i is not None and i not in taken)


def content_of(token) -> str | None:
    """A special token in tokenizer_config.json is a text, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


# ----------------------------------------------------------------------------------------------------------------------
# Written for others


def tokenizer_files(tokenizer: Tokenizer, shape: ModelConfig) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and, if there is a template, chat_template.jinja."""
    specials, others = dict(tokenizer.specials), dict(getattr(tokenizer, "text_specials", {}))
    named = {i: name for name, i in (specials | others).items()}
    if tokenizer.pad_id not in named and tokenizer.pad_id == tokenizer.vocab_size - 1:  # a row that no token has
        specials["<|pad|>"], named[tokenizer.pad_id] = tokenizer.pad_id, "<|pad|>"
    form = tokenizer.form if isinstance(tokenizer, Published) else OWN
    bos = named.get(tokenizer.bos_id)
    if isinstance(tokenizer, PieceTokenizer):
        unknown = tokenizer.pieces[0] if 0 in named else None
        content = vocabulary.pieces_json(tokenizer.pieces, tokenizer.merges, tokenizer.prefix, unknown)
    else:
        content = vocabulary.byte_level_json(*byte_level_of(tokenizer))
    content = vocabulary.with_specials(content, specials, others, bos)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.max_seq_len, "padding_side": "left",
        "clean_up_tokenization_spaces": False, "eos_token": named.get(tokenizer.eot_id),
        "bos_token": bos or (form and form.start) or None,
        "pad_token": named.get(tokenizer.pad_id, named.get(tokenizer.document_id)),
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    as_text = lambda value: json.dumps(value, ensure_ascii=False, indent=2) + "\n"  # noqa: E731
    files = {"tokenizer.json": as_text(content), "tokenizer_config.json": as_text(config)}
    if form is not None:
        files["chat_template.jinja"] = getattr(tokenizer, "template", "") or jinja_of(form)
    return files


def byte_level_of(tokenizer: Tokenizer) -> tuple[dict[bytes, int], list[str], bool]:
    """(pieces, splits, nfc) of a byte-level vocabulary, whichever of ours it is."""
    if isinstance(tokenizer, PublishedTokenizer):
        return tokenizer.ranks, tokenizer.splits, tokenizer.nfc
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer._fast._mergeable_ranks, [tokenizer._fast._pat_str], False
    return getattr(tokenizer, "ranks", {bytes([b]): b for b in range(256)}), [SPLIT], False


if __name__ == "__main__":
    chat = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    spaces = {"system": ("", ""), "user": ("[INST] ", " [/INST]"), "assistant": ("", "</s>", "")}
    forms = {"our own": OWN, "ChatML": CHATML, "Llama 3": LLAMA3}
    forms |= {"Mistral": ChatForm(**spaces, start="<s>", lead=" "), "plain": plain_form("<|endoftext|>")}
    for name, form in forms.items():
        stretches = list(form.stretches(chat, add_generation_prompt=False))
        print(f"{name:8} {''.join(text for _, text in stretches)!r}")
        print(f"{'':8} learned: {''.join(text for kind, text in stretches if kind in ('answer', 'end'))!r}")
    print(
        "the template that our own form is exported with, recognised again:",
        chat_form(jinja_of(OWN), None, None) == OWN,
    )
    print(jinja_of(OWN))
