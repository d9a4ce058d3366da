"""Tokenizers: how text becomes integers, and how a conversation becomes a training row.

A language model sees integers. Three ways to make them stand here, from the simplest to the one that GPT-2 used:

* ``ByteTokenizer``: the 256 bytes of UTF-8. Nothing to learn, nothing unknown, long sequences.
* ``BPETokenizer``: byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019). Start with bytes; join
  the most frequent neighbouring pair into a new token; repeat. We train it, and encode with it, in plain Python;
  ``tiktoken`` then does the same encoding fast, and a test holds the two equal.
* ``TiktokenTokenizer``: a published vocabulary (``r50k_base``, GPT-2's), for models of real size.

All three know five special tokens. They are ids that no text can produce: ``encode("<|user|>")`` gives the letters,
never the token, so a user cannot forge a role. ``<|pad|>`` is not ``<|endoftext|>``: a model must learn to stop, and
must never learn from padding, which is impossible when the two are one id.

A model that others have trained (pretrained.py) brings its own vocabulary and its own special tokens:
``PublishedTokenizer`` if its pieces are bytes, ``PieceTokenizer`` if they are characters (SentencePiece). Neither lets
a text produce a special token. What ends an answer (``eot_id``) is then not always what ends a document
(``document_id``), and generation stops at several tokens (``end_ids``).

The chat template is as small as it can be::

    the row      <|system|>Be brief.<|user|>What is 2+3?<|assistant|>5<|endoftext|>
    loss_mask                                                        11

The 1s mark what the assistant says, and the token with which it stops. Published models have other templates; a
``ChatForm`` describes one.

Run ``python tokenizer.py`` to watch a tokenizer learn its first merges.
"""

import base64
import dataclasses
import heapq
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex
import tiktoken

from runtime.errors import UserError

LONGEST = 2**16  # bytes of a token
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")

# Merges never cross these pieces: a word with its leading space, one digit, a run of punctuation, white space.
# GPT-2's pattern but for \p{N}: there digits come in runs, so that "12" may be one token and "13" two. A model that
# shall learn column addition wants every digit to look the same wherever it stands, hence one digit, one token.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # half a surrogate pair, as broken JSON has them, becomes "?"


def _decode(tokenizer, ids: Iterable[int]) -> str:
    return b"".join(tokenizer.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")


class OurSpecials:
    """What follows from our five special tokens: one token ends a document, an answer and generation, and the chat
    template is our own."""

    form = None  # a ChatForm, of a published model
    bos_id = None  # a token with which every text begins

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which generation stops."""
        return (self.eot_id,)

    @property
    def document_id(self) -> int:
        """What stands between two documents."""
        return self.eot_id


class ByteTokenizer(OurSpecials):
    """The 256 bytes, then the special tokens.

    >>> ByteTokenizer().encode("hé")
    [104, 195, 169]
    >>> ByteTokenizer().decode([104, 195, 169])
    'hé'
    """

    def __init__(self):
        self.specials = {name: 256 + i for i, name in enumerate(SPECIALS)}
        self.eot_id, self.pad_id = self.specials["<|endoftext|>"], self.specials["<|pad|>"]
        self.vocab_size = 256 + len(SPECIALS)
        self._names = {i: name.encode() for name, i in self.specials.items()}

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else self._names.get(token, b"\xef\xbf\xbd")

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def state(self) -> dict:
        """What a checkpoint stores, and ``load_tokenizer`` reads."""
        return {"kind": "bytes"}


class BPETokenizer(OurSpecials):
    """Byte-pair encoding. ``merges[i]`` is the pair of ids that became id ``256 + i``; the special tokens come last.

    >>> tokenizer = BPETokenizer.train(["low low low lower lowest"], vocab_size=256 + 3 + len(SPECIALS))
    >>> [tokenizer.token_bytes(i) for i in (256, 257, 258)]
    [b'lo', b'low', b' low']
    >>> [tokenizer.token_bytes(i) for i in tokenizer.encode(" lower")]
    [b' low', b'e', b'r']
    """

    def __init__(self, merges: Sequence[Sequence[int]]):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self._bytes = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            if not (0 <= a < len(self._bytes) and 0 <= b < len(self._bytes)):
                raise ValueError(f"tokens {a} and {b} are merged before they are there")
            self._bytes.append(self._bytes[a] + self._bytes[b])
            if len(self._bytes[-1]) > LONGEST:  # each merge may double it: some thirty would fill the memory
                raise ValueError(f"a token is longer than {LONGEST:,} bytes")
        self.ranks = {piece: i for i, piece in enumerate(self._bytes)}
        first = len(self._bytes)
        self.specials = {name: first + i for i, name in enumerate(SPECIALS)}
        self.eot_id, self.pad_id = self.specials["<|endoftext|>"], self.specials["<|pad|>"]
        self.vocab_size = first + len(SPECIALS)
        self._bytes += [name.encode() for name in SPECIALS]
        self._fast = tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens=self.specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn ``vocab_size - 256 - len(SPECIALS)`` merges; fewer, with a warning, if the text runs out of repeated
        pairs.

        Joining the most frequent pair changes only the words that contain it, so we keep where each pair occurs and
        correct the counts there. Ties go to the pair with the smaller ids: the same text always gives the same
        tokenizer.
        """
        n_merges = vocab_size - 256 - len(SPECIALS)
        if n_merges < 0:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens come first"
            )
        pieces: Counter[str] = Counter()
        for text in texts:
            pieces.update(regex.findall(SPLIT, text))
        words = [list(_utf8(piece))[:LONGEST] for piece in pieces]  # each distinct word once, as ids ...
        counts = list(pieces.values())  # ... with how often it occurs
        pair_counts: Counter[tuple[int, int]] = Counter()
        found_in: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for w, ids in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += counts[w]
                found_in[pair].add(w)

        merges: list[tuple[int, int]] = []
        vocabulary = [bytes([i]) for i in range(256)]
        ids_of = {piece: i for i, piece in enumerate(vocabulary)}
        queue = [(-count, pair) for pair, count in pair_counts.items()]
        heapq.heapify(queue)
        while len(merges) < n_merges and queue:
            count, pair = heapq.heappop(queue)
            if -count != pair_counts[pair]:  # an outdated entry: the pair has changed since it was queued
                continue
            if -count < 2:
                break
            joined = vocabulary[pair[0]] + vocabulary[pair[1]]
            new_id = ids_of.get(joined)  # "a"+"bc" may spell what "ab"+"c" already is: then it is that token
            if new_id is None:
                new_id = ids_of[joined] = len(vocabulary)
                vocabulary.append(joined)
                merges.append(pair)
            changed = set()
            for w in found_in.pop(pair):
                before, after = words[w], _merge(words[w], pair, new_id)
                for old in zip(before, before[1:]):
                    pair_counts[old] -= counts[w]
                    changed.add(old)
                for new in zip(after, after[1:]):
                    pair_counts[new] += counts[w]
                    found_in[new].add(w)
                    changed.add(new)
                words[w] = after
            for other in changed:
                if pair_counts[other] > 0:
                    heapq.heappush(queue, (-pair_counts[other], other))
        if len(merges) < n_merges:
            warnings.warn(f"the text has only {len(merges)} repeated pairs, {n_merges} were asked for", stacklevel=2)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        return self._fast.encode_ordinary(_utf8(text).decode("utf-8"))

    def encode_readable(self, text: str) -> list[int]:
        """The same ids as ``encode``, by the rule itself: in each piece, join the pair that was learned first, until
        none is left.
        """
        out = []
        for piece in regex.findall(SPLIT, _utf8(text).decode("utf-8")):
            ids = list(_utf8(piece))
            while len(ids) > 1:
                ranks = [self.ranks.get(self._bytes[a] + self._bytes[b], len(self.ranks)) for a, b in zip(ids, ids[1:])]
                best = min(range(len(ranks)), key=ranks.__getitem__)  # the leftmost, if it occurs twice
                if ranks[best] == len(self.ranks):
                    break
                ids[best : best + 2] = [ranks[best]]
            out += ids
        return out

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if 0 <= token < self.vocab_size else b"\xef\xbf\xbd"

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def state(self) -> dict:
        return {"kind": "bpe", "merges": [list(pair) for pair in self.merges]}


def _merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each occurrence of ``pair``, from left to right. ``[1, 1, 1]`` with pair (1, 1) gives ``[new, 1]``."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


class TiktokenTokenizer(OurSpecials):
    """A published tiktoken vocabulary; its size is rounded up to a multiple of 128 (r50k_base: 50,257 to 50,304),
    which matrix units like, and our special tokens live in the ids gained by it. The vocabulary is downloaded once;
    offline, set ``TIKTOKEN_CACHE_DIR`` to a folder that holds it.
    """

    def __init__(self, name: str = "r50k_base"):
        try:
            self._fast = tiktoken.get_encoding(name)
        except ValueError as error:
            raise UserError(f"tiktoken has no vocabulary {name!r}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # whatever the network stack raises
            raise UserError(
                f"the tiktoken vocabulary {name!r} could not be loaded ({type(error).__name__}): connect once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from None
        self.name, n = name, self._fast.n_vocab
        self.specials = {special: n + i for i, special in enumerate(SPECIALS[1:])}
        self.specials["<|endoftext|>"] = self._fast.eot_token  # tiktoken has its own
        self.eot_id, self.pad_id = self.specials["<|endoftext|>"], self.specials["<|pad|>"]
        self.vocab_size = -(-(n + len(SPECIALS) - 1) // 128) * 128
        self._names = {i: special.encode() for special, i in self.specials.items()}

    def encode(self, text: str) -> list[int]:
        return self._fast.encode_ordinary(_utf8(text).decode("utf-8"))

    def token_bytes(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token]
        if token >= self._fast.n_vocab:
            return b"\xef\xbf\xbd"  # an id that only rounds the size up: an untrained model may still choose it
        return self._fast.decode_single_token_bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def state(self) -> dict:
        return {"kind": "tiktoken", "name": self.name}


# ----------------------------------------------------------------------------------------------------------------------
# The vocabularies of published models


@dataclass(frozen=True)
class ChatForm:
    """How a published model lays out a conversation: the text around each message, in which the names of special tokens
    stand for the tokens. ``assistant`` has three parts: what stands before an answer, and with it a prompt ends; the
    token that ends an answer, which is learned; and what follows, which is not."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    start: str = ""  # before the first message
    default_system: str | None = None  # what the system says in a conversation that has no such message
    system_prefix: str = ""  # before what the system says, always
    system_in_user: bool = False  # there is no system message: it begins the first question
    lead: str = ""  # with which every answer begins, a space
    trim: str = "none"  # of which messages the white space around them is taken off: none | answers | all
    think: bool = False  # Qwen3: an answer begins with its thinking, which is left out of the turns before

    def __post_init__(self):
        for name in ("system", "user", "assistant"):  # a checkpoint gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 2 + (name == "assistant"):
                raise ValueError(f"the template of {name} has {len(getattr(self, name))} parts")

    def stretches(self, messages: Sequence[dict], add_generation_prompt: bool) -> Iterator[tuple[str, str]]:
        """The conversation as (kind, text): "template", "said", an "answer", or the "end" of one."""
        messages = [self.trimmed(message) for message in messages]
        yield "template", self.start
        if self.system_in_user and messages and messages[0]["role"] == "system":
            first, *messages = messages
            if not messages or messages[0]["role"] != "user":
                raise UserError("this model's chat template has no system message without a question after it")
            messages[0]["content"] = f"{first['content']}\n\n{messages[0]['content']}"
        elif self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "assistant":
                last = i > asked and (i + 1 == len(messages) or "</think>" in content)
                content = thought_out(content, last) if self.think else content
                before, end, after = self.assistant
                yield from (("template", before), ("answer", self.led(content)), ("end", end), ("template", after))
            else:
                before, after = self.system if role == "system" else self.user
                prefix = self.system_prefix if role == "system" else ""
                yield from (("template", before + prefix), ("said", content), ("template", after))
        if add_generation_prompt:
            yield "template", self.assistant[0]

    def led(self, content: str) -> str:
        """An answer with the space that stands before it in this form; one that the model wrote has it already."""
        return content if self.lead and content.startswith(self.lead) else self.lead + content

    def trimmed(self, message: dict) -> dict:
        trims = self.trim == "all" or (self.trim == "answers" and message["role"] == "assistant")
        return message | {"content": message["content"].strip() if trims else message["content"]}


def thought_out(answer: str, last: bool) -> str:
    """An answer as Qwen3 is shown it: the last one with its thinking, if need be an empty one, earlier ones without.

    >>> thought_out("<think>2+3 is 5.</think>5", last=True)
    '<think>\\n2+3 is 5.\\n</think>\\n\\n5'
    >>> thought_out("<think>2+3 is 5.</think>5", last=False)
    '5'
    """
    before, *others = answer.split("</think>")
    thought, after = (before.split("<think>")[-1].strip("\n"), others[-1]) if others else ("", before)
    after = after.lstrip("\n") if others or last else after
    return f"<think>\n{thought}\n</think>\n\n{after}" if last else after


class Published:
    """What the two kinds of published tokenizers share: special tokens, the ends, the template.

    specials: the tokens that no text can produce, by name; text_specials: those that a text can (Qwen3's ``<think>``);
    ends: where generation stops, first the end of an answer; document: what ends a text; bos: what begins one, or None;
    template: the original's source, which is kept and never run.
    """

    first_only = False  # does a text get its space only where nothing at all stands before it, no special token either?

    def __init__(
        self, specials: dict[str, int], text_specials: dict[str, int], ends: Sequence[int], document: int, pad: int,
        bos: int | None = None, form: dict | None = None, template: str = "",
    ):  # fmt: skip
        self.specials, self.text_specials = dict(specials), dict(text_specials)
        self.end_ids, self.eot_id, self.document_id, self.pad_id = tuple(ends), ends[0], document, pad
        self.bos_id, self.form, self.template = bos, None if form is None else ChatForm(**form), template
        if pad in self.end_ids:
            raise ValueError("the padding is a token that ends a text")
        named = [*self.specials.values(), *self.text_specials.values(), *self.end_ids, document, pad]
        if not all(type(i) is int and 0 <= i < 2**31 for i in [*named, *([] if bos is None else [bos])]):
            raise ValueError("the id of a token is no number of a row")
        self._names = {i: name.encode() for name, i in (self.specials | self.text_specials).items()}
        self._special_in_text = _any_of(self.text_specials)
        self._special_in_form = _any_of(self.specials)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text; ``continues``: other text stands before it."""
        text, ids = _utf8(text).decode("utf-8"), []
        for part, special in _split(self._special_in_text, text):
            if special:
                ids.append(self.text_specials[part])
            elif part:
                ids += self._encode_part(part, continues or bool(ids))
        return ids

    def template_parts(self, text: str) -> Iterator[tuple[int | None, str]]:
        """A template's text as special tokens, by id, and the text between them."""
        for part, special in _split(self._special_in_form, text):
            if part:
                yield (self.specials[part], "") if special else (None, part)

    def token_bytes(self, token: int) -> bytes:
        return self._names.get(token) or self._bytes.get(token, b"\xef\xbf\xbd")

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def _state(self) -> dict:
        form = None if self.form is None else dataclasses.asdict(self.form)
        return {
            "specials": self.specials, "text_specials": self.text_specials, "ends": list(self.end_ids),
            "document": self.document_id, "pad": self.pad_id, "bos": self.bos_id, "form": form,
            "template": self.template,
        }  # fmt: skip


def _any_of(names: Iterable[str]) -> regex.Pattern | None:
    """Finds the longest of these names that begins first."""
    longest = sorted(names, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest))) if longest else None


def _split(pattern: regex.Pattern | None, text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts, each with whether it is what the pattern finds or what stands between."""
    start = 0
    for found in pattern.finditer(text) if pattern is not None else ():
        if found.end() > found.start():
            yield text[start : found.start()], False
            yield found.group(), True
            start = found.end()
    yield text[start:], False


class PublishedTokenizer(Published):
    """A byte-level vocabulary, run by tiktoken: Llama 3's, Qwen's, SmolLM's, GPT-2's.

    ranks: each piece's bytes with its id, in tiktoken's format, a line for each: base64, a space, the id. A piece is
    made from two earlier ones, and the pair that makes the piece of the smallest id is joined first. splits: regular
    expressions; each divides what the ones before left into what it finds and what stands between, and no piece crosses
    these borders. nfc: the text is brought to Unicode's composed form first.

    Some vocabularies lack single bytes, which tiktoken wants: they get ids past the vocabulary, and are left out, as
    the original leaves them out.
    """

    def __init__(self, ranks: str, splits: Sequence[str], nfc: bool = False, **published):
        super().__init__(**published)
        self._ranks_text, self.splits, self.nfc = ranks, list(splits), nfc
        self.ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, ranks.splitlines())}
        if not self.ranks or not self.splits or max(map(len, self.ranks)) > LONGEST:
            raise ValueError("a vocabulary without pieces, or with one that is too long")
        self._bytes = {i: piece for piece, i in self.ranks.items()}
        known = [*self._bytes, *self._names]
        if len(known) != len(set(known)) or len(self._bytes) != len(self.ranks) or min(known) < 0:
            raise ValueError("two pieces have one id")
        self.vocab_size = max(*known, self.pad_id, self.document_id, *self.end_ids) + 1
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in self.ranks]
        self._missing = regex.compile(b"[" + b"".join(map(regex.escape, missing)) + b"]") if missing else None
        spare = {piece: self.vocab_size + i for i, piece in enumerate(missing)}
        self._splits = [regex.compile(split) for split in self.splits[:-1]]
        last = self.splits[-1]
        self._last = regex.compile(last)
        # What the pattern does not find is a piece too: tiktoken alone would drop it.
        whole = rf"{last}|(?s:(?:(?!{last}).)+)"
        self._fast = tiktoken.Encoding(
            "published", pat_str=whole, mergeable_ranks=self.ranks | spare, special_tokens={}
        )

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        parts = [text]
        for split in self._splits:
            parts = [piece for part in parts for piece, _ in _split(split, part) if piece]
        if self._missing is None or not self._missing.search(text.encode()):
            return [i for part in parts for i in self._fast.encode_ordinary(part)]
        pieces = [piece for part in parts for piece, _ in _split(self._last, part) if piece]
        return [i for piece in pieces for i in joined(self._missing.sub(b"", piece.encode()), self.ranks)]

    def state(self) -> dict:
        kind = {"kind": "published", "ranks": self._ranks_text, "splits": self.splits, "nfc": self.nfc}
        return kind | self._state()


def joined(piece: bytes, ranks: dict[bytes, int], below: float = float("inf")) -> list[int]:
    """The rule itself: the bytes of a piece, of whose neighbours those that make the token of the smallest id, and that
    id ``below`` a limit, are joined until none is left.

    >>> joined(b"lower", {b"l": 0, b"o": 1, b"w": 2, b"e": 3, b"r": 4, b"lo": 5, b"er": 6, b"low": 7})
    [7, 6]
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        found = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:])]
        least = min(found)
        if least >= below:
            break
        i = found.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # ▁, what SentencePiece writes for a space


class PieceTokenizer(Published):
    """A vocabulary of characters, SentencePiece's (Kudo and Richardson 2018): Llama 2's, Mistral's, TinyLlama's,
    llama2.c's.

    pieces: the texts, by id, ``▁`` for a space, ``<0x0A>`` for a byte. merges: triples of two ids and a rank; of all
    neighbours those of the smallest rank are joined first. Nothing divides a text, so pieces may cross words; a
    character that has no piece is spelled in bytes. prefix: a space goes before every "text", before every "bare text",
    that does not begin with one, before a "bare first" one, where nothing stands before it, or before "none".
    """

    def __init__(self, pieces: Sequence[str], merges: Sequence[Sequence[int]], prefix: str = "text", **published):
        super().__init__(**published)
        self.pieces, self.merges, self.prefix = list(pieces), [tuple(merge) for merge in merges], prefix
        self.first_only = prefix == "bare first"
        self.vocab_size = max(len(self.pieces) - 1, *self._names, self.pad_id, self.document_id, *self.end_ids) + 1
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i not in self._names}
        self._joins = {(a, b): (rank, self._ids[self.pieces[a] + self.pieces[b]]) for a, b, rank in self.merges}
        self._byte = {b: self._ids[f"<0x{b:02X}>"] for b in range(256) if f"<0x{b:02X}>" in self._ids}
        if len(self._byte) < 256:
            raise ValueError("a vocabulary of characters needs all 256 bytes for those that it lacks")
        self._bytes = {i: piece.replace(SPACE, " ").encode() for piece, i in self._ids.items()}
        self._bytes |= {i: bytes([b]) for b, i in self._byte.items()}

    def _encode_part(self, text: str, continues: bool) -> list[int]:
        bare = not text.startswith((" ", SPACE))
        if not continues and (self.prefix == "text" or (self.prefix == "bare text" and bare)):
            text = " " + text
        ids = []
        for character in text.replace(" ", SPACE):
            known = self._ids.get(character)
            ids += [self._byte[b] for b in character.encode()] if known is None else [known]
        return self._joined(ids)

    def _joined(self, ids: list[int]) -> list[int]:
        """A queue of the pairs that can be joined, and for each place the next and the one before that is left."""
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        pairs = [(*self._joins[pair], i, pair) for i, pair in enumerate(zip(ids, ids[1:])) if pair in self._joins]
        queue = [(rank, i, new, pair) for rank, new, i, pair in pairs]
        heapq.heapify(queue)
        while queue:
            _, i, new, pair = heapq.heappop(queue)
            j = after[i]
            if j >= len(ids) or (ids[i], ids[j]) != pair:  # one of the two is something else by now
                continue
            ids[i], ids[j], after[i] = new, -1, after[j]
            if after[j] < len(ids):
                before[after[j]] = i
            for left in (before[i], i):
                pair = (ids[left], ids[after[left]]) if left >= 0 and after[left] < len(ids) else None
                if pair in self._joins:
                    rank, made = self._joins[pair]
                    heapq.heappush(queue, (rank, left, made, pair))
        return [i for i in ids if i >= 0]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        first = self.prefix == "bare first" and not continues and text and not text.startswith((" ", SPACE))
        return super().encode(" " + text if first else text, continues)

    def state(self) -> dict:
        merges = [list(merge) for merge in self.merges]
        return {"kind": "pieces", "pieces": self.pieces, "merges": merges, "prefix": self.prefix} | self._state()


Tokenizer = ByteTokenizer | BPETokenizer | TiktokenTokenizer | PublishedTokenizer | PieceTokenizer


def load_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer whose ``state()`` this is."""
    kind = state.get("kind")
    try:
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "bpe":
            return BPETokenizer(state["merges"])
        if kind == "tiktoken":
            return TiktokenTokenizer(state["name"])
        published = {"published": PublishedTokenizer, "pieces": PieceTokenizer}
        if kind in published:
            return published[kind](**{name: value for name, value in state.items() if name != "kind"})
    except (LookupError, TypeError, ValueError, AttributeError, regex.error) as error:
        raise UserError(f"the checkpoint is damaged: its tokenizer cannot be made ({error})") from None
    raise UserError(f"unknown kind of tokenizer: {str(kind)[:40]!r}")


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[dict], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """A conversation as ids, and a mask of the same length: 1 on what the assistant says and on the token that ends it.

    messages: ``[{"role": "system" | "user" | "assistant", "content": str}, ...]``. In our own template each role is a
    token of its own, so no merge crosses a boundary: the ids of the prompt are always a prefix of the ids of the whole.
    A published model has its own template, see ``encode_form``. With ``add_generation_prompt`` the row ends in
    ``<|assistant|>``, the point from which a model answers. An unknown role is a ``UserError``.

    >>> encode_chat(ByteTokenizer(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    ([259, 72, 105, 260, 89, 111, 256], [0, 0, 0, 0, 1, 1, 1])
    """
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"unknown role {message['role']!r}: a message is from 'system', 'user' or 'assistant'")
    if isinstance(tokenizer, Published):
        return encode_form(tokenizer, messages, add_generation_prompt)
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        role = message["role"]
        speaks = int(role == "assistant")
        body = tokenizer.encode(message["content"]) + [tokenizer.eot_id] * speaks
        ids += [tokenizer.specials[f"<|{role}|>"]] + body
        mask += [0] + [speaks] * len(body)
    if add_generation_prompt:
        ids.append(tokenizer.specials["<|assistant|>"])
        mask.append(0)
    return ids, mask


def encode_form(
    tokenizer: Published, messages: Sequence[dict], add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """``encode_chat`` in the template of a published model.

    A special token's name is the token where the template has it, and letters where somebody says it. A message and the
    text of the template beside it are encoded together, as the original does; an answer is encoded by itself, since it
    is continued from a prompt: otherwise the white space with which it begins might join the template's, and the
    prompt would not be the beginning of the whole.
    """
    if tokenizer.form is None:
        raise UserError(
            "this model came without a chat template that is known here: python pretrained.py import --template names "
            "one (chat.py --raw continues a text)"
        )
    ids: list[int] = []
    mask: list[int] = []
    text, in_text = "", False  # what waits to be encoded; does text stand right before it?
    follows = lambda: bool(ids) if tokenizer.first_only else in_text  # noqa: E731
    for kind, said in [*tokenizer.form.stretches(messages, add_generation_prompt), ("answer", "")]:
        if kind == "said":
            text += said
            continue
        for special, part in [(None, said)] if kind == "answer" else tokenizer.template_parts(said):
            if kind != "answer" and special is None:
                text += part
                continue
            if text:
                new = tokenizer.encode(text, continues=follows())
                ids, mask, text, in_text = ids + new, mask + [0] * len(new), "", True
            new = tokenizer.encode(part, continues=follows()) if special is None else [special]
            ids, mask, in_text = ids + new, mask + [int(kind != "template")] * len(new), special is None
    return ids, mask


def encode_answer(tokenizer: Tokenizer, answer: str) -> list[int]:
    """What the assistant says, and the token that ends it: what follows a prompt of ``encode_chat``."""
    if tokenizer.form is None:
        return [*tokenizer.encode(answer), tokenizer.eot_id]
    question = [{"role": "user", "content": "?"}]
    prompt = encode_chat(tokenizer, question, add_generation_prompt=True)[0]
    ids, mask = encode_chat(tokenizer, [*question, {"role": "assistant", "content": answer}])
    return [i for i, counts in zip(ids[len(prompt) :], mask[len(prompt) :]) if counts]


if __name__ == "__main__":
    text = "Tom has 12 apples. Mia has 3 apples. Tom gives Mia 4 apples. Now Mia has 7 apples and Tom has 8 apples."
    print("the text:", text)
    demo = BPETokenizer.train([text], vocab_size=256 + 12 + len(SPECIALS))
    print("merges, in the order in which they were learned; how often the pair stands in the text when it is joined:")
    words = [list(piece.encode()) for piece in regex.findall(SPLIT, text)]
    for new_id, (left, right) in enumerate(demo.merges, start=256):
        count = sum(pair == (left, right) for ids in words for pair in zip(ids, ids[1:]))
        words = [_merge(ids, (left, right), new_id) for ids in words]
        print(f"  {new_id}: {demo.token_bytes(left)!r:8} + {demo.token_bytes(right)!r:8} {count} times")
    print(f"the text is now {sum(map(len, words))} tokens instead of {len(text.encode())} bytes")
    ids = demo.encode("Mia has 12 apples.")
    print("Mia has 12 apples.  ->", ids)
    print("                    ->", [demo.token_bytes(i).decode() for i in ids])
    chat = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    for token, counts in zip(*encode_chat(demo, chat)):
        print(f"  {token:4d}  loss {counts}  {demo.decode([token])!r}")
