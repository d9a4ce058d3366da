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

Run ``python templates.py`` to see one conversation in five of them.
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
#
# A ``ChatForm`` (tokenizer.py) is what stands around the messages: before and after what the system and the user say,
# and for an answer its prompt, the end that is learned, and what follows. Of a question and an answer ChatML makes
#
#     <|im_start|>user\n 2+3? <|im_end|>\n      <|im_start|>assistant\n 5 <|im_end|> \n

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


CONTENT = r"""message(?:\[['"]content['"]\]|\.content)"""  # how a template calls what is said


def chat_form(template: str, bos: str | None, eos: str | None) -> ChatForm | None:
    """The form of a chat template's source; None if it is not one of the known ones. bos, eos: what the template calls
    ``bos_token`` and ``eos_token``.

    A template is recognised by the texts in it: the tokens of its roles and what stands around a message. Whatever else
    it can do (tools, pictures) is not used, and where it may change a text in a way that is not read here, nothing is
    guessed.
    """
    if template.strip() == jinja_of(OWN):
        return OWN
    text = re.sub(r"""['"]\s*\+\s*['"]""", "", template.replace("\\n", "\n"))  # 'a' + 'b' is 'ab'
    roles = set(re.findall(r"<\|[^|<>]+\|>", text))
    if "<|im_start|>" in roles:
        return chatml_form(text, roles)
    if "<|start_header_id|>" in roles:
        return llama3_form(text, roles)
    if {"<|user|>", "<|assistant|>"} <= roles <= {"<|user|>", "<|assistant|>", "<|system|>"} and eos:
        return zephyr_form(text, eos)
    if "[INST]" in text and not roles and bos and eos:
        return mistral_form(text, bos, eos)
    return None


def adds_or_strips(text: str) -> bool:
    """Whether the template puts a token before everything, has a system message in a variable, or strips a message."""
    stripped = re.search(rf"{CONTENT}\s*\.\s*strip\(", text)
    return "bos_token" in text or bool(stripped or re.search(r"""set\s+\w*system\w*\s*=\s*['"]""", text))


def trim_of(text: str) -> str | None:
    """ "all" if the white space around every message is taken off, "none" if around none; None: around some."""
    for follows in (r"\+", r"\}\}"):  # what a tool says, a template writes by itself
        used = {bool(trims) for trims in re.findall(rf"{CONTENT}(\s*\|\s*trim)?\s*{follows}", text)}
        if used:
            return None if len(used) > 1 else "all" if used.pop() else "none"
    return "all" if re.search(r"""content(?:['"]\])?\s*\|\s*trim""", text) else "none"  # by way of a variable


def chatml_form(text: str, roles: set[str]) -> ChatForm | None:
    """ChatML: ``<|im_start|>user\\n2+3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n``. Many templates have a
    system message of their own, a text between its two marks, for conversations without one."""
    known = roles <= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} and "<|im_end|>\n" in text
    begins = "<|im_start|>assistant\n" in text and "<|im_start|>assistant\n<think>" not in text
    trim = trim_of(text)
    if not known or not begins or trim is None or adds_or_strips(text):
        return None
    default = None
    for said in re.findall(r"<\|im_start\|>system\n(.+?)<\|im_end\|>", text, re.DOTALL):
        if not re.search(r"""['"]\s*(?:[+~]|-?\}\})|<\||\{[{%]""", said):  # else it is an expression of the template
            default = re.sub(r"""\\(['"\\])""", r"\1", said.replace("\\t", "\t"))
            break
    thinks = "reasoning_content" in text and "<think>" in text
    return dataclasses.replace(CHATML, default_system=default, think=thinks, trim=trim)


def llama3_form(text: str, roles: set[str]) -> ChatForm | None:
    """Llama 3: ``<|start_header_id|>user<|end_header_id|>\\n\\n2+3?<|eot_id|>``. From 3.1 on the system always says two
    dates; today's is the one that the template has for engines without a clock, so that the same conversation is the
    same tokens tomorrow (transformers writes the day's)."""
    others = {"<|begin_of_text|>", "<|eom_id|>", "<|python_tag|>"}
    known = roles <= {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} | others and trim_of(text) == "all"
    # A system message in a variable, or between its marks, would be said without being asked for.
    says = r"""set\s+\w*system\w*\s*=\s*(['"])(?!\1)|system<\|end_header_id\|>\n\n(?!['"])"""
    if not known or "<|start_header_id|>assistant<|end_header_id|>\n\n" not in text or re.search(says, text):
        return None
    starts = "bos_token" in text or "<|begin_of_text|>" in roles
    form = LLAMA3 if starts else dataclasses.replace(LLAMA3, start="")
    cutting = re.search(r"""Cutting Knowledge Date: [^\n'"]+\n""", text)
    if cutting is None:
        return form
    today = re.search(r"""date_string = ['"]([^'"]+)['"]""", text)
    if today is None or "Today Date: " not in text:
        return None
    prefix = f"{cutting[0]}Today Date: {today[1]}\n\n"
    return dataclasses.replace(form, default_system="", system_prefix=prefix)


def zephyr_form(text: str, eos: str) -> ChatForm | None:
    """Zephyr's and TinyLlama's: ``<|user|>\\n2+3?</s>\\n<|assistant|>\\n5</s>\\n``; the roles are letters. The last
    line break of each is one of the source, which jinja keeps behind ``}}`` and not behind ``%}`` or before ``{%-``."""
    said = re.search(rf"<\|user\|>\n['\"]\s*\+\s*{CONTENT}\s*\+\s*eos_token", text)
    ends = re.findall(r"eos_token\s*([^}]*\}\})(\n?)\s*(\{%-)?", text)
    if not said or any(end != ("}}", "\n", "") for end in ends) or adds_or_strips(text) or trim_of(text) != "none":
        return None
    return ChatForm(("<|system|>\n", f"{eos}\n"), ("<|user|>\n", f"{eos}\n"), ("<|assistant|>\n", eos, "\n"))


def mistral_form(text: str, bos: str, eos: str) -> ChatForm | None:
    """Mistral's: ``<s>[INST] 2+3? [/INST] 5</s>``, whose versions differ in spaces. What the system says begins the
    first question."""
    before = set(re.findall(r"""['"](\s*\[INST\]\s*)['"]\s*\+""", text))
    after = set(re.findall(r"""\+\s*['"](\s*\[/INST\]\s*)['"]""", text))
    answers = re.findall(
        rf"(?:['\"](?P<lead>\s*)['\"]\s*\+\s*)?{CONTENT}\s*(?P<trim>\|\s*trim)?\s*\+\s*eos_token"
        r"(?:\s*\+\s*['\"](?P<behind>\s*)['\"])?",
        text,
    )
    last = "system" in text and "loop.last" in text  # the system's message would go to the last question
    if (
        "<<SYS>>" in text
        or "[SYSTEM_PROMPT]" in text
        or last
        or not len(before) == len(after) == len(set(answers)) == 1
    ):
        return None
    lead, trims, behind = answers[0]
    return ChatForm(
        system=("", ""), user=(before.pop(), after.pop()), assistant=("", eos, behind), lead=lead,
        start=bos if "bos_token" in text else "", system_in_user=True, trim="answers" if trims else "none",
    )  # fmt: skip


def jinja_of(form: ChatForm) -> str:
    """A chat template for a form that has no source of its own, with the marks that transformers takes the loss mask
    from."""
    if form.system_in_user or form.think or form.trim == "answers":
        raise ValueError("such a form has a template of its own")
    quote = lambda text: json.dumps(text, ensure_ascii=False)  # noqa: E731
    content = "message['content'] | trim" if form.trim == "all" else "message['content']"
    said = lambda before, after: f"{{{{- {quote(before)} + {content} + {quote(after)} }}}}"  # noqa: E731
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
    """tiktoken joins any two neighbours that spell a piece, the original only those that it lists; both begin with the
    smallest id (``read_byte_level``). They are the same if the last step to every piece, made of smaller ids alone, is
    a pair that is listed, or, of a piece that no merge makes, is none."""
    listed, by_id = set(merges), {i: piece for piece, i in pieces.items()}
    made = {a + b for a, b in merges}
    for piece in (piece for piece in pieces if len(piece) > 1):
        parts = tuple(by_id[i] for i in joined(piece, pieces, below=pieces[piece]))
        if (parts in listed) != (piece in made) or (len(parts) == 2 and piece not in made):
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
    ends = [names[form.assistant[1]]] if form else []
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
    met = others + [one for one in added if one["id"] in used]  # in a conversation: of the rest no text can make one
    if odd := [one["content"] for one in met if one.get("lstrip") or one.get("rstrip") or one.get("single_word")]:
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
    """The special tokens that a form names: its start, the end of an answer, and, but for Zephyr's, whose roles are
    letters, those of its roles."""
    if form is None:
        return []
    texts = [form.start, *form.system, *form.user, *form.assistant]
    spelled = [] if form.user[0] == "<|user|>\n" else re.findall(r"<\|[^|<>]+\|>", "".join(texts))
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
    padding, pad_id = padding_for_others(tokenizer)
    specials |= {padding: pad_id} if padding not in others else {}
    named = {i: name for name, i in (specials | others).items()}
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
        "pad_token": padding,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    as_text = lambda value: json.dumps(value, ensure_ascii=False, indent=2) + "\n"  # noqa: E731
    files = {"tokenizer.json": as_text(content), "tokenizer_config.json": as_text(config)}
    if form is not None:
        files["chat_template.jinja"] = getattr(tokenizer, "template", "") or jinja_of(form)
    return files


def padding_for_others(tokenizer: Tokenizer) -> tuple[str, int]:
    """The name and the id of the token that others are told to pad with. A row that no token has gets a name. A token
    of the text they would take for padding everywhere, so it is the one that stands between documents instead."""
    named = {i: name for name, i in (tokenizer.specials | getattr(tokenizer, "text_specials", {})).items()}
    if tokenizer.pad_id in named or tokenizer.pad_id == tokenizer.vocab_size - 1:
        return named.get(tokenizer.pad_id, "<|pad|>"), tokenizer.pad_id
    return named[tokenizer.document_id], tokenizer.document_id


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
