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

The chat template is as small as it can be::

    the row      <|system|>Be brief.<|user|>What is 2+3?<|assistant|>5<|endoftext|>
    loss_mask                                                        11

The 1s mark what the assistant says, and the token with which it stops.

Run ``python tokenizer.py`` to watch a tokenizer learn its first merges.
"""

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

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


class ByteTokenizer:
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


class BPETokenizer:
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


class TiktokenTokenizer:
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


Tokenizer = ByteTokenizer | BPETokenizer | TiktokenTokenizer


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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint is damaged: its tokenizer cannot be made ({error})") from None
    raise UserError(f"unknown kind of tokenizer: {str(kind)[:40]!r}")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[dict], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """A conversation as ids, and a mask of the same length: 1 on what the assistant says and on the end-of-text that
    ends it.

    messages: ``[{"role": "system" | "user" | "assistant", "content": str}, ...]``. Each role is a token of its own,
    so no merge crosses a boundary: the ids of the prompt are always a prefix of the ids of the whole. With
    ``add_generation_prompt`` the row ends in ``<|assistant|>``, the point from which a model answers. An unknown role
    is a ``UserError``.

    >>> encode_chat(ByteTokenizer(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    ([259, 72, 105, 260, 89, 111, 256], [0, 0, 0, 0, 1, 1, 1])
    """
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"unknown role {role!r}: a message is from 'system', 'user' or 'assistant'")
        speaks = int(role == "assistant")
        body = tokenizer.encode(message["content"]) + [tokenizer.eot_id] * speaks
        ids += [tokenizer.specials[f"<|{role}|>"]] + body
        mask += [0] + [speaks] * len(body)
    if add_generation_prompt:
        ids.append(tokenizer.specials["<|assistant|>"])
        mask.append(0)
    return ids, mask


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
