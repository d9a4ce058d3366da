"""tokenizer.json, the form in which the hub keeps a vocabulary, read into the plain values of our tokenizers'
``state()`` and written from them.

Byte-level vocabularies write each byte as a printable character (a space is ``Ġ``), so that their pieces are texts;
those of SentencePiece have characters and write a space as ``▁``. Everything that would make another tokenizer of it
than ours (a normaliser, another way of dividing the text, merges that are not in the order of the ids) is refused.
"""

import base64

from runtime.errors import UserError


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself if it is printable, else one of those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


CHARACTER = _byte_characters()  # of each byte
BYTE = {character: b for b, character in CHARACTER.items()}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own


def piece_bytes(piece: str) -> bytes:
    """
    >>> piece_bytes("Ġthe")
    b' the'
    """
    return bytes(BYTE[character] for character in piece)


def piece_text(piece: bytes) -> str:
    return "".join(CHARACTER[b] for b in piece)


def is_byte_level(tokenizer: dict) -> bool:
    """Of tokenizer.json: are its pieces bytes? (Otherwise characters.)"""
    return any(step.get("type") == "ByteLevel" for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def steps(part: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer, pre_tokenizer or post_processor, which may be one or a sequence."""
    part = part or {}
    return part.get(name, []) if part.get("type") == "Sequence" else [part] if part else []


def ids_of(tokenizer: dict) -> list[int]:
    """The ids of all pieces."""
    return (
        list(range(len(tokenizer["pieces"]))) if "pieces" in tokenizer else list(tokenizer["model"]["vocab"].values())
    )


def merges_of(tokenizer: dict) -> list[tuple[str, str]]:
    """The pairs, which older files write as one text with a space."""
    merges = tokenizer["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_byte_level(tokenizer: dict) -> tuple[dict, dict[bytes, int], list[tuple[bytes, bytes]]]:
    """(ranks, splits and nfc of a ``PublishedTokenizer``; the pieces by id; the merges) of a tokenizer.json."""
    model = tokenizer["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type", "BPE") != "BPE" or odd or model.get("byte_fallback"):
        raise UserError(f"the vocabulary is of a kind that is not known here ({odd[0] if odd else model.get('type')})")
    normalizers = [step.get("type") for step in steps(tokenizer.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise UserError(f"the vocabulary changes its text ({', '.join(map(str, normalizers))}): not known here")
    added = {one["id"] for one in tokenizer.get("added_tokens", [])}
    try:
        pieces = {piece_bytes(piece): i for piece, i in model["vocab"].items() if i not in added}
        merges = [(piece_bytes(a), piece_bytes(b)) for a, b in merges_of(tokenizer)]
    except (KeyError, ValueError) as error:
        raise UserError(f"the vocabulary is not one of bytes ({error})") from None
    made = [pieces.get(a + b, -1) for a, b in merges]
    if any(a > b for a, b in zip(made, made[1:])) or -1 in made:
        raise UserError("the vocabulary's ids do not rise with its merges, which tiktoken needs")
    unmade = [piece for piece, i in pieces.items() if len(piece) > 1 and i not in set(made)] if made else []
    if unmade and not model.get("ignore_merges"):
        raise UserError(f"the vocabulary has pieces that no merge makes, {unmade[0]!r} for one")
    if len(pieces) < 256 and model.get("unk_token") and any(bytes([b]) not in pieces for b in range(256)):
        raise UserError("the vocabulary writes an unknown token for bytes that it lacks")
    lines = sorted((i, base64.b64encode(piece).decode()) for piece, i in pieces.items())
    ranks = "".join(f"{piece} {i}\n" for i, piece in lines)
    return {"ranks": ranks, "splits": splits_of(tokenizer), "nfc": normalizers == ["NFC"]}, pieces, merges


def splits_of(tokenizer: dict) -> list[str]:
    """How the text is divided before anything is joined, as regular expressions applied one after the other."""
    splits = []
    for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern", {})
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in pattern:
            splits.append(pattern["Regex"])
        elif kind == "Digits":
            splits.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            splits += [GPT2_SPLIT] if step.get("use_regex", True) else []
        else:
            raise UserError(f"the vocabulary divides its text in a way that is not known here ({kind})")
    return splits or [r"(?s:.+)"]


def read_pieces(tokenizer: dict) -> dict:
    """The pieces, merges and prefix of a ``PieceTokenizer``, of a tokenizer.json or of pieces with scores."""
    if "scores" in tokenizer:
        return read_scores(tokenizer)
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback") or model.get("dropout"):
        raise UserError(f"the vocabulary is of a kind that is not known here ({model.get('type')})")
    size = max(model["vocab"].values()) + 1
    pieces = [""] * size
    for piece, i in model["vocab"].items():
        pieces[i] = piece
    merges = []
    for rank, (a, b) in enumerate(merges_of(tokenizer)):
        if not {a, b, a + b} <= model["vocab"].keys():
            raise UserError(f"the vocabulary merges {a!r} and {b!r}, which it lacks")
        merges.append([model["vocab"][a], model["vocab"][b], rank])
    return {"pieces": pieces, "merges": merges, "prefix": prefix_of(tokenizer)}


def prefix_of(tokenizer: dict) -> str:
    """Where a space is put before a text: see ``PieceTokenizer``."""
    before = [step.get("type") for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    normalizers = steps(tokenizer.get("normalizer"), "normalizers")
    kinds = [step.get("type") for step in normalizers]
    replaces = [step for step in normalizers if step.get("type") == "Replace"]
    right = all(s.get("pattern") == {"String": " "} and s.get("content") == SPACE for s in replaces)
    if not before and kinds == ["Prepend", "Replace"] and right and normalizers[0].get("prepend") == SPACE:
        return "text"
    if not before and kinds == ["Replace"] and right:
        return "none"
    step = (tokenizer.get("pre_tokenizer") or {}) if before == ["Metaspace"] and not kinds else {}
    scheme = {"always": "bare text", "first": "bare first", "never": "none"}.get(step.get("prepend_scheme", "always"))
    if not step or step.get("replacement") != SPACE or step.get("split", True) or scheme is None:
        raise UserError(
            f"the vocabulary changes or divides its text in an unknown way ({', '.join([*kinds, *before])})"
        )
    return scheme


def read_scores(tokenizer: dict) -> dict:
    """SentencePiece's own files give each piece a score: of all neighbours that spell a piece, those of the highest
    score are joined first."""
    pieces, scores = tokenizer["pieces"], tokenizer["scores"]
    added = {one["id"] for one in tokenizer.get("added_tokens", [])}
    ids = {piece: i for i, piece in enumerate(pieces) if i not in added and not _is_byte(piece)}
    rank = {score: n for n, score in enumerate(sorted({scores[i] for i in ids.values()}, reverse=True))}
    merges = [
        [ids[piece[:cut]], ids[piece[cut:]], rank[scores[i]]]
        for piece, i in ids.items() for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids
    ]  # fmt: skip
    return {"pieces": pieces, "merges": sorted(merges, key=lambda merge: merge[2]), "prefix": tokenizer["prefix"]}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def begins_with(tokenizer: dict) -> str | None:
    """The special token that a tokenizer.json puts before every text."""
    for step in steps(tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing" and step.get("single") and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def byte_level_json(ranks: dict[bytes, int], splits: list[str], nfc: bool) -> dict:
    """tokenizer.json of a byte-level vocabulary, without its special tokens. As merges it has every pair that spells a
    piece, in the order of the ids, which is what tiktoken does."""
    merges = []
    for piece, _ in sorted(ranks.items(), key=lambda one: one[1]):
        for cut in range(1, len(piece)):
            if piece[:cut] in ranks and piece[cut:] in ranks:
                merges.append([piece_text(piece[:cut]), piece_text(piece[cut:])])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    isolated = [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in splits]
    return {
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*isolated, level]},
        "decoder": level,
        "model": bpe_json({piece_text(piece): i for piece, i in ranks.items()}, merges) | {"ignore_merges": True},
    }


def pieces_json(pieces: list[str], merges: list[tuple[int, int, int]], prefix: str, unknown: str | None) -> dict:
    """tokenizer.json of a vocabulary of characters, without its special tokens."""
    scheme = {"bare text": "always", "bare first": "first"}.get(prefix)
    ordered = [[pieces[a], pieces[b]] for a, b, _ in sorted(merges, key=lambda merge: merge[2])]
    vocabulary = {piece: i for i, piece in enumerate(pieces) if piece}
    taken = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix != "none" else []
    replaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix == "text" else []
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "normalizer": None if scheme else {"type": "Sequence", "normalizers": [*prepend, spaces]},
        "pre_tokenizer": metaspace if scheme else None,
        "decoder": {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}, *taken]},
        "model": bpe_json(vocabulary, ordered) | {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown},
    }


def bpe_json(vocabulary: dict[str, int], merges: list) -> dict:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": merges,
    }  # fmt: skip


def with_specials(tokenizer: dict, specials: dict[str, int], text_specials: dict[str, int], bos: str | None) -> dict:
    """tokenizer.json with its special tokens, and the one that begins every text."""
    added = [(i, name, True) for name, i in specials.items()] + [(i, name, False) for name, i in text_specials.items()]
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": i, "content": name, **about, "special": special} for i, name, special in sorted(added)]
    model = tokenizer["model"] | {"vocab": specials | text_specials | tokenizer["model"]["vocab"]}
    after = None
    if bos is not None:
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        named = {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}}
        pair = [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, second]
        after = {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": named}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": tokenizer["normalizer"], "pre_tokenizer": tokenizer["pre_tokenizer"],
        "post_processor": after, "decoder": tokenizer["decoder"], "model": model,
    }  # fmt: skip
