"""The encoder: a model that reads and does not write.

Take the causal mask away, and every token sees the whole text. Such a model cannot generate, but for the question what
a text *is* (its sentiment, its topic, how good an answer is) both sides of a word help. The blocks are the decoder's.
It learns in two ways.

**Masked language modelling** (Devlin et al. 2019, BERT, section 3.1) needs no labels. Choose 15 % of the tokens, each
by its own coin, never padding or specials. Of the chosen, 80 % are replaced by [MASK], 10 % by a random token, and 10 %
stay as they are; then predict all the chosen ones, the unchanged too::

    L = - 1/|chosen|  Σ_{t chosen} log p(token t | the corrupted text)

[MASK] never occurs in a real text; the other 20 % keep the model from thinking about [MASK] alone, since any
token might be the wrong one.

**Classification**: one vector for the text, either the stream at the special token [CLS] that begins it or the mean of
the stream over the real tokens, then ::

    logits = W₂ tanh(W₁ pool(h) + b₁) + b₂              L = - mean log softmax(logits)[label]

A small model that has seen a few thousand labelled texts learns them by heart. Against that, training leaves out a
share of the words (``hide``; word dropout, Iyyer et al. 2015), so that no single one can carry the verdict. They are
taken out and not put behind [MASK], since the texts that are judged later have no [MASK] either. And the checkpoint
that was best on the validation split is the one that is tested.

What to watch, and what it should look like:

* mlm, ``loss``: from the logarithm of the vocabulary's size (6.2 on the embedded texts), down: at first quickly,
  while the frequencies of tokens are learned, then slowly, while words come to depend on their neighbours.
* mlm, ``val_accuracy``, the share of hidden tokens that are named: up. Never near 1, since often several words fit.
* classify, ``loss``: from the logarithm of the number of classes (0.69 for two). ``accuracy`` is of one batch, with
  words left out, and may well be below ``val_accuracy``.
* classify, ``val_accuracy``: up, then flat. When ``val_loss`` rises while ``loss`` falls, the texts are learned by
  heart: raise --hide, lower --epochs, or start from a masked language model.
* ``samples.txt``: the texts that the classifier gets wrong with most certainty, each with its label: read both.

    python encoder.py                                                      # embedded: will the story end with more?
    python encoder.py configs/encoder_imdb_cpu.py --data_dir DIR           # the sentiment of film reviews
    python encoder.py configs/encoder_mlm_cpu.py --data_dir DIR            # masked words first, then
    python encoder.py configs/encoder_sst2_cpu.py --data_dir DIR           # the sentiment of single sentences
    python encoder.py --objective mlm --tokenizer_from out/arith/sft       # the embedded texts in a policy's tokens,
    python reward.py --encoder out/arith/mlm                               # and a reward model with that body

To classify texts of your own::

    model, read, classes = load_classifier("out/reviews/imdb")
    for p in predictions(model, read(["What a film!", "I left early."])).exp():
        print(dict(zip(classes, p.tolist())))
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import arithmetic
from attention import at_least_float32
from data import epoch_batch, parts_of, similar_lengths
from layers import ModelConfig, make_norm
from lora import load_state
from optim import learning_rate, make_optimizers, update
from runtime import processes
from runtime.checkpoint import extra, load_checkpoint, load_weights, need_checkpoint
from runtime.config import (
    Above,
    AtLeast,
    Count,
    CountOrNone,
    CountOrZero,
    NotNegative,
    TrainConfig,
    check_shared,
    run_stage,
    validate,
)
from runtime.errors import UserError
from runtime.linear import Linear, linear
from runtime.rows import columns, few, is_own, own_rows, read_dataset, report_skipped
from runtime.rows import held_out as held_out_rows
from runtime.run import Run, start
from stages import load_stage
from texts import text_documents
from tokenizer import BPETokenizer, ByteTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer
from transformer import Transformer, model_size


@dataclass(frozen=True)
class Config(TrainConfig):
    objective: Literal["classify", "mlm"] = "classify"
    """classify: learn the labels. mlm: learn to fill in hidden words, without labels."""
    data: str = "arith"
    """arith, imdb, sst2, rotten_tomatoes, or rows with a text and a label: a file (.jsonl), a dataset of the hub
    (org/name). For mlm also several joined by "+", and all that pretrain.py reads."""
    n_texts: CountOrNone = None
    """Use at most this many training texts of each source (None: all; of arith 4096 to classify)."""
    init_from: str = ""
    """A masked language model to start from: its tokenizer and its shape are taken over. Empty: from scratch."""
    tokenizer_from: str = ""
    """Take the tokenizer of this checkpoint instead of training one (a reward model needs its policy's)."""
    tokenizer: Literal["bpe", "bytes", "r50k"] = "bpe"
    """bpe is trained on the data."""
    vocab_size: Count = 512
    """The vocabulary of the BPE, special tokens included."""
    lowercase: bool = False
    """Read all text in small letters."""

    d_model: Count = 128
    """Width of the model."""
    n_layers: Count = 3
    """Blocks."""
    n_heads: Count = 4
    """Attention heads."""
    d_ff: CountOrNone = None
    """Width of the feed-forward layers (None: 4·d_model, or 2/3 of that for SwiGLU)."""
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    """How the model knows where a token stands."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """The normalisation."""
    post_norm: bool = False
    """Normalise after each half of a block, as BERT does, instead of before it."""
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """The feed-forward layer."""
    bias: bool = False
    """Biases in the linear layers."""
    max_seq_len: Annotated[int | None, AtLeast(4)] = None
    """Tokens of a text, [CLS] included; to classify a longer one, its beginning and its end are kept (None: 256, or
    what ``init_from`` has; rotary positions may also go on)."""
    pooling: Literal["mean", "cls"] = "mean"
    """What stands for the whole text."""

    hide: Annotated[float, AtLeast(0, below=1)] = 0.15
    """mlm: the share of tokens that is chosen. classify: the share that is left out of a text in training."""
    batch_size: Count = 32
    """Texts of one step, over all processes; they are of similar length."""
    epochs: Annotated[float | None, Above(0)] = None
    """Passes over the texts (None: 6 to classify, 2 for mlm)."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: for the matrices inside the blocks."""
    lr: NotNegative = 2e-3
    final_lr: Annotated[float, AtLeast(0, below=100)] = 0.0
    warmup: CountOrZero = 50
    weight_decay: NotNegative = 0.1
    eval_every: Count = 100


# ----------------------------------------------------------------------------------------------------------------------
# Masked language modelling


def mask_tokens(
    tokens: Tensor,
    maskable: Tensor,
    vocab_size: int,
    mask_id: int,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrupt a text for masked language modelling: 15 % chosen; of these 80 % [MASK], 10 % random, 10 % unchanged.

    tokens (B, T); maskable (B, T) boolean, False on padding and specials; random tokens are below ``vocab_size`` (and
    may happen to be the original). Returns the corrupted tokens (a copy) and which were chosen, (B, T) boolean:
    those are to be predicted, whatever stands there now.
    """
    draws = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    chosen = (draws < share) & maskable.bool()
    fate = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    words = torch.randint(vocab_size, tokens.shape, generator=generator).to(tokens.device)
    corrupted = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    return torch.where(chosen & (fate >= 0.8) & (fate < 0.9), words, corrupted), chosen


class MaskedLM(nn.Module):
    """BERT's head on an encoder: ``decoder(norm(gelu(dense(h)))) + bias``, the decoder tied to the embedding."""

    def __init__(self, backbone: Transformer):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        d = self.config.d_model
        self.dense = Linear(d, d)
        self.norm = make_norm(self.config)
        self.bias = nn.Parameter(torch.zeros(self.config.vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """tokens (B, T), mask (B, T) with 1 = a real token -> logits (B, T, V); or (n, V), at the n positions that
        ``where`` (B, T) marks, in the order of the text. At least float32.
        """
        hidden = self.backbone.forward_hidden(tokens, mask=mask)  # (B, T, D)
        hidden = hidden if where is None else hidden[where.bool()]
        words = self.norm(F.gelu(self.dense(hidden)))
        return at_least_float32(linear(words, self.backbone.head.weight)) + self.bias


# ----------------------------------------------------------------------------------------------------------------------
# Classification


def pool(hidden: Tensor, mask: Tensor, how: str = "mean") -> Tensor:
    """The stream (B, T, D) of texts with ``mask`` (B, T), 1 = a real token, as one vector each, (B, D): "mean" over the
    real tokens, or the first, "cls".

    >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    if how == "cls":
        return hidden[:, 0]
    mask = mask.bool().unsqueeze(-1)  # (B, T, 1)
    return hidden.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # what padding holds may be NaN


class Classifier(nn.Module):
    """An encoder and BERT's pooler: ``score(tanh(dense(pool(h))))``."""

    def __init__(self, backbone: Transformer, n_classes: int, pooling: str = "mean"):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        self.pooling = pooling
        d = self.config.d_model
        self.dense, self.score = nn.Linear(d, d), nn.Linear(d, n_classes)
        for layer in (self.dense, self.score):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, T), mask (B, T) with 1 = a real token -> logits (B, C), at least float32."""
        pooled = pool(at_least_float32(self.backbone.forward_hidden(tokens, mask=mask)), mask, self.pooling)  # (B, D)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.score(torch.tanh(self.dense(pooled)))


def leave_out(tokens: Tensor, keep: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """tokens (B, T) without those where ``keep`` (B, T) is False: the others move together, padding follows. Returns
    the shorter rows (B, T') and which of their tokens are real.

    >>> leave_out(torch.tensor([[7, 8, 9], [5, 6, 0]]), torch.tensor([[True, False, True], [True, False, False]]), 0)
    (tensor([[7, 9],
            [5, 0]]), tensor([[ True,  True],
            [ True, False]]))
    """
    longest = int(keep.sum(dim=1).max())
    front = (~keep).int().argsort(dim=1, stable=True)[:, :longest]  # (B, T'): the kept ones first, in their order
    real = keep.gather(1, front)  # (B, T')
    return tokens.gather(1, front).masked_fill(~real, pad_id), real


# ----------------------------------------------------------------------------------------------------------------------
# Texts

LABELLED = {  # hub id, the names of labels 0, 1, ...; the columns are called text and label
    "imdb": ("stanfordnlp/imdb", ("negative", "positive")),
    "sst2": ("SetFit/sst2", ("negative", "positive")),
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", ("negative", "positive")),
}
ARITH_CLASSES = ("not more", "more")


def class_names(config: Config) -> tuple[str, ...]:
    """The names of the labels; of a user's data those that its training rows have, sorted."""
    if config.data == "arith":
        return ARITH_CLASSES
    if config.data in LABELLED:
        return LABELLED[config.data][1]
    rows = own_rows(config.data, "train", config.data_dir, config.columns)
    labels = (columns(row, ["text", "label"], config.data)[1] for row in rows)
    found = sorted({str(label) for label in labels if label is not None})
    if len(found) < 2:
        raise UserError(f"{config.data} has fewer than two labels ({', '.join(found)}): there is nothing to tell apart")
    return tuple(found)


def load_labelled(
    name: str, split: str, data_dir: str = "", seed: int = 0, n: int | None = None, rename: Sequence[str] = (),
    own_classes: Sequence[str] = (),
) -> tuple[list[str], list[int]]:  # fmt: skip
    """Texts and labels of "train", "validation" or "test"; of a user's data, "whole" is all of it. IMDB has no
    validation split: every tenth training text is kept for it. ``n``: at most so many, drawn at random (the files may
    be sorted by label). own_classes: the names of a user's labels.

    arith: a question of the embedded task; label 1 if its answer is more than the first number it names.
    """
    if split == "whole" and not is_own(name):
        split = "validation"
    if name == "arith":
        most, start = (4096, f"{seed} encoder") if split == "train" else (512, split)
        found = arithmetic.problems(n or most, start, split)
        return [p.question for p in found], [int(p.answer > int(re.search(r"\d+", p.question)[0])) for p in found]
    if is_own(name):
        hub_id, classes = name, tuple(own_classes)
        number = {label: i for i, label in enumerate(classes)}
        rows = own_rows(name, split, data_dir, rename)
        rows = (
            row | {"label": number.get(str(row["label"]), -1) if row.get("label") is not None else -1} for row in rows
        )
    elif name in LABELLED:
        hub_id, classes = LABELLED[name]
        own = split if split == "test" or name != "imdb" else "train"
        rows = read_dataset(hub_id, None, own, data_dir)
        if name == "imdb" and own == "train":
            rows = (row for i, row in enumerate(rows) if (i % 10 == 0) == (split == "validation"))
    else:
        raise UserError(f"no labelled texts called {name!r}; there are arith, {', '.join(LABELLED)}, or rows (.jsonl)")
    texts, labels, skipped = [], [], Counter()
    for row in rows:
        text, label = columns(row, ["text", "label"], hub_id)
        if not isinstance(text, str) or not text.strip() or label not in range(len(classes)):
            skipped["without a text or a label"] += 1
            continue
        texts.append(text)
        labels.append(int(label))
    report_skipped(skipped, f"{split} rows of {hub_id}")
    if not texts:
        raise UserError(f"{hub_id} ({split}) has no usable row")
    some = epoch_batch(len(texts), min(n or len(texts), len(texts)), 0, seed=0).tolist() if n else range(len(texts))
    return [texts[i] for i in some], [labels[i] for i in some]


def plain_texts(names: str, split: str, config: Config) -> Iterable[str]:
    """Texts to fill in, of sources joined by "+". Of labelled ones never the test split. (What one source tests another
    may train on: most sentences of Rotten Tomatoes are in SST-2, so a model of the one cannot be tested on the other.)
    """
    skipped = Counter()
    n = config.n_texts if split == "train" else None
    for name in names.split("+"):
        if name in LABELLED:
            yield from load_labelled(name, split, config.data_dir, config.seed, n)[0]
        else:
            for text in text_documents(name, split, config.data_dir, config.seed, n, config.columns):
                if isinstance(text, str) and text.strip():
                    yield text
                else:
                    skipped["without text"] += 1
    report_skipped(skipped, f"{split} documents")


@dataclass
class Texts:
    """Texts as ids, each after [CLS], and their labels (None: there are none)."""

    ids: list[list[int]]
    labels: list[int] | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], device=None) -> tuple[Tensor, Tensor]:
        """tokens (B, T), padded on the right, and which are real (B, T)."""
        lengths = torch.tensor([len(self.ids[i]) for i in rows])
        tokens = torch.full((len(rows), int(lengths.max())), self.pad_id)
        for r, i in enumerate(rows):
            tokens[r, : lengths[r]] = torch.tensor(self.ids[i])
        return tokens.to(device), (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)

    def labels_of(self, rows: Sequence[int], device=None) -> Tensor:
        return torch.tensor([self.labels[i] for i in rows], device=device)


def mask_id_of(tokenizer: Tokenizer) -> int:
    """[MASK] and [CLS] are the two ids behind the tokenizer's own."""
    return tokenizer.vocab_size


def cls_id_of(tokenizer: Tokenizer) -> int:
    return tokenizer.vocab_size + 1


def to_classify(
    texts: Iterable[str], labels: list[int] | None, tokenizer: Tokenizer, length: int, lowercase: bool
) -> Texts:
    """Each text in one row. Of a longer one the first quarter of the room goes to its beginning and the rest to its
    end, where reviews give their verdict (Sun et al. 2019).
    """
    room, ids = length - 1, []
    for text in texts:
        words = tokenizer.encode(text.lower() if lowercase else text)
        if len(words) > room:
            words = words[: room // 4] + words[len(words) - (room - room // 4) :]
        ids.append([cls_id_of(tokenizer), *words])
    return Texts(ids, labels, tokenizer.pad_id)


def to_fill_in(texts: Iterable[str], tokenizer: Tokenizer, length: int, lowercase: bool) -> Texts:
    """Each text in as many rows as it needs."""
    ids = []
    for text in texts:
        words = tokenizer.encode(text.lower() if lowercase else text)
        ids += [[cls_id_of(tokenizer), *words[i : i + length - 1]] for i in range(0, len(words), length - 1)]
    if not ids:
        raise UserError("there is no text to fill in")
    return Texts(ids, None, tokenizer.pad_id)


def labelled_texts(config: Config, split: str, tokenizer: Tokenizer, length: int, lowercase: bool) -> Texts:
    """A split as rows to classify; ``n_texts`` bounds the training split only. With ``eval_data``, all of that is what
    is validated and tested on; a user's data has no test split either, and is tested on the rows that validate."""
    n, name = config.n_texts if split == "train" else None, config.data
    if split == "validation" or (split == "test" and (is_own(name) or config.eval_data)):
        name, split = held_out_rows(config)
    texts, labels = load_labelled(name, split, config.data_dir, config.seed, n, config.columns, class_names(config))
    return to_classify(texts, labels, tokenizer, length, lowercase)


def make_tokenizer(run: Run, config: Config) -> Tokenizer:
    """The run's own if it continues, that of the checkpoint it starts from, or a new one, trained on the data."""
    if run.state is not None:
        return load_tokenizer(run.state["tokenizer"])
    if config.init_from or config.tokenizer_from:
        return load_tokenizer(load_state(config.init_from or config.tokenizer_from)["tokenizer"])
    if config.tokenizer != "bpe":
        return ByteTokenizer() if config.tokenizer == "bytes" else TiktokenTokenizer("r50k_base")
    sample, size = [], 0
    for text in plain_texts(config.data, "train", config):
        sample.append(text.lower() if config.lowercase else text)
        size += len(text)
        if size >= 20_000_000:
            break
    return BPETokenizer.train(sample, config.vocab_size)


# ----------------------------------------------------------------------------------------------------------------------
# What it has learned


@torch.no_grad()
def fill_in(model: MaskedLM, texts: Texts, tokenizer: Tokenizer, share: float, batch: int = 64, seed: int = 0) -> dict:
    """Mean loss, in nats, and accuracy over hidden tokens of held-out texts; the same tokens every time."""
    device = model.bias.device
    total = right = n = 0.0
    for first in range(0, len(texts), batch):
        tokens, real = texts.batch(range(first, min(first + batch, len(texts))), device)
        generator = torch.Generator().manual_seed(seed + first)
        vocab, mask_id = tokenizer.vocab_size, mask_id_of(tokenizer)
        corrupted, chosen = mask_tokens(tokens, real & (tokens < vocab), vocab, mask_id, share, generator)
        logits = model(corrupted, real, chosen)  # (n, V)
        total += float(F.cross_entropy(logits, tokens[chosen], reduction="sum"))
        right += float((logits.argmax(dim=-1) == tokens[chosen]).sum())
        n += int(chosen.sum())
    return {"val_loss": total / max(n, 1), "val_accuracy": right / max(n, 1)}


@torch.no_grad()
def predictions(model: Classifier, texts: Texts, batch: int = 64) -> Tensor:
    """log p(class) of each text, (N, C), on the CPU."""
    order = sorted(range(len(texts)), key=lambda i: len(texts.ids[i]))  # less padding
    out = torch.empty(len(texts), model.score.out_features)
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        out[some] = model(*texts.batch(some, model.score.weight.device)).log_softmax(dim=-1).float().cpu()
    return out


def judge(logps: Tensor, texts: Texts) -> dict:
    """Loss and accuracy of predictions (N, C)."""
    labels = texts.labels_of(range(len(texts)))
    return {
        "val_loss": float(F.nll_loss(logps, labels)),
        "val_accuracy": float((logps.argmax(dim=1) == labels).float().mean()),
    }


def mistakes(logps: Tensor, texts: Texts, tokenizer: Tokenizer, classes: Sequence[str], n: int = 8) -> str:
    """The texts of which the model was most certain and wrong, and the first ones beside them."""
    labels = texts.labels_of(range(len(texts)))
    sure, said = logps.exp().max(dim=1)
    wrong = (said != labels).nonzero().squeeze(1)
    lines = []
    for title, rows in (
        ("most certain mistakes", wrong[sure[wrong].argsort(descending=True)]),
        ("others", range(min(n, len(texts)))),
    ):
        lines.append(f"{title}:")
        for i in [int(i) for i in rows][:n]:
            text = tokenizer.decode(texts.ids[i][1:])
            text = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
            lines.append(f"  {classes[labels[i]]}, the model says {classes[said[i]]} ({sure[i]:.2f}): {text}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    if config.objective == "mlm" and config.hide == 0:
        raise UserError("mlm hides some tokens: --hide above 0")
    if config.objective == "classify" and config.data not in ("arith", *LABELLED) and not is_own(config.data):
        raise UserError(f"--data {config.data} has no labels; there are arith, {', '.join(LABELLED)}, or rows (.jsonl)")
    if config.init_from and config.tokenizer_from:
        raise UserError("--init_from brings its own tokenizer: leave --tokenizer_from out")
    if config.init_from and config.lowercase:
        raise UserError("--init_from knows whether it reads small letters: leave --lowercase out")
    if config.init_from and config.objective == "mlm":
        raise UserError("--init_from is for --objective classify; an unfinished mlm run continues by itself")
    try:
        model_config(config, config.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_shared("batch_size", config.batch_size)


def model_config(config: Config, vocab_size: int) -> ModelConfig:
    names = {field.name for field in fields(ModelConfig)} & {field.name for field in fields(Config)} - {"vocab_size"}
    shape = {name: getattr(config, name) for name in names} | {"max_seq_len": config.max_seq_len or 256}
    return ModelConfig(vocab_size=vocab_size + 2, causal=False, tie_embeddings=True, **shape)  # + [MASK] and [CLS]


def load_encoder(path: str, device="cpu") -> tuple[Transformer, Tokenizer, dict]:
    """(body, tokenizer, state) of a checkpoint that this chapter wrote."""
    backbone, tokenizer, state = load_stage(path, "python encoder.py --objective mlm", device, encoders=True)
    if backbone.config.causal:
        raise UserError(f"{path} holds a {state['stage']} model, not an encoder")
    return backbone, tokenizer, state


def load_classifier(path: str, device="cpu") -> tuple[Classifier, Callable[[list[str]], Texts], tuple[str, ...]]:
    """Of a run of this chapter: the model, what turns texts into its rows, and the names of the classes. A folder means
    its ``best.pt``."""
    path = str(Path(path) / "best.pt") if Path(path).is_dir() else path
    backbone, tokenizer, state = load_encoder(path, device)
    if state["stage"] != "encoder":
        raise UserError(f"{path} knows no classes: train them with --init_from {path}")
    classes, config = tuple(extra(state, "classes", list)), state["config"]
    model = Classifier(backbone, len(classes), config["pooling"]).to(device).eval()
    load_weights(model, state["model"], path)
    lowercase, length = extra(state, "lowercase", bool), extra(state, "length", int)
    read = partial(to_classify, labels=None, tokenizer=tokenizer, length=length, lowercase=lowercase)
    return model, read, classes


def need_starts(config: Config) -> None:
    """Refuse a checkpoint that is not there, with the command that makes one."""
    if config.init_from:
        need_checkpoint(config.init_from, "python encoder.py --objective mlm")
    if config.tokenizer_from:
        need_checkpoint(config.tokenizer_from, "python pretrain.py")


def make_body(run: Run, config: Config, tokenizer: Tokenizer) -> tuple[Transformer, bool, int]:
    """(body, whether it reads small letters, tokens of a text, [CLS] included): from scratch, or of ``init_from``. The
    seed is set so that body and head, which is made next, are the same every time.
    """
    if not config.init_from:
        torch.manual_seed(config.seed)
        body = Transformer(model_config(config, tokenizer.vocab_size)).to(run.device)
        return body, config.lowercase, config.max_seq_len or 256
    body, _, state = load_encoder(config.init_from, run.device)
    run.record_parent(state, config.init_from)
    length = config.max_seq_len or body.config.max_seq_len
    if length > body.config.max_seq_len and body.config.positions != "rope":
        raise UserError(f"max_seq_len {length}: the {body.config.positions} positions of {config.init_from} end")
    body.config = replace(body.config, max_seq_len=max(length, body.config.max_seq_len))
    torch.manual_seed(config.seed)
    return body, extra(state, "lowercase", bool), length


def step_generator(config: Config, step: int) -> torch.Generator:
    """Of the seed and the step alone: every process draws the same, and a resumed run what it would have drawn."""
    return torch.Generator().manual_seed(((config.seed << 32) + step) % 2**63)


def announce(run: Run, body: Transformer, config: Config, train: Texts, held_out: Texts, steps: int) -> None:
    """Say what the run will do."""
    mean_length = sum(map(len, train.ids)) / len(train)
    words = config.hide if config.objective == "mlm" else 0.0  # the share of tokens at which words are predicted
    run.banner(
        model_size(body, int(mean_length), words=words), steps, int(config.batch_size * mean_length),
        "eager (texts differ in length)",
        data=f"{config.data}: {len(train):,} texts of {mean_length:.0f} tokens, {len(held_out):,} held out"
        + few(len(held_out)),
        starts=config.init_from,
    )  # fmt: skip


def train_mlm(config: Config) -> dict:
    """Learn to fill in hidden words; return the figures of the held-out ones, of the last step."""
    run = start(config, "mlm")
    tokenizer = make_tokenizer(run, config)
    body, lowercase, length = make_body(run, config, tokenizer)
    model = MaskedLM(body).to(run.device)
    body.activation_checkpointing = config.activation_checkpointing
    vocab, mask_id = tokenizer.vocab_size, mask_id_of(tokenizer)

    # Texts, cut into rows of at most ``length`` tokens; those of a batch are of similar length.
    train = to_fill_in(plain_texts(config.data, "train", config), tokenizer, length, lowercase)
    held_out = to_fill_in(plain_texts(*held_out_rows(config), config), tokenizer, length, lowercase)
    held_out.ids = held_out.ids[:: max(1, len(held_out) // 1024)]  # about a thousand are enough
    batches = similar_lengths([len(ids) for ids in train.ids], config.batch_size, config.seed)
    steps = max(1, math.ceil((2.0 if config.epochs is None else config.epochs) * len(batches)))
    run.extra = {"classes": [], "lowercase": lowercase, "length": length}  # saved with every checkpoint

    optimizers = make_optimizers(model, config.lr, config.weight_decay, kind=config.optimizer)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, body, config, train, held_out, steps)

    for step in run.steps(first, steps):
        # Every step hides other words of its texts, never [CLS] or padding.
        rows = batches[epoch_batch(len(batches), 1, step, config.seed)[0]]
        tokens, real = train.batch(rows, run.device)  # (B, T) each
        maskable = real & (tokens < vocab)  # (B, T)
        generator = step_generator(config, step)
        corrupted, chosen = mask_tokens(tokens, maskable, vocab, mask_id, config.hide, generator)  # (B, T) each
        n_chosen = int(chosen.sum())  # of the whole batch
        share = processes.my_share(torch.arange(len(rows), device=run.device))
        loss = accuracy = torch.zeros((), device=run.device)
        for part in parts_of(share, config.micro_batch_size):
            targets = tokens[part][chosen[part]]  # (n,): what stood where a word was chosen
            with run.autocast():
                logits = model(corrupted[part], real[part], chosen[part])  # (n, V)
            # A sum over this part, divided by the count of the whole batch: parts and processes add up to the mean.
            part_loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, n_chosen)
            run.scaler.scale(part_loss).backward()
            loss = loss + part_loss.detach()
            accuracy = accuracy + (logits.argmax(dim=-1) == targets).sum() / max(1, n_chosen)
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        # If by chance no word was hidden, momentum must not move the weights by itself.
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm) if n_chosen else 0.0

        loss, accuracy = processes.sum_over_processes(torch.stack([loss, accuracy])).tolist()
        figures = {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "lr": lr}
        run.log(step, int(real.sum()), show=("loss", "accuracy"), **figures)
        figures = {}
        if run.due(step, config.eval_every, steps):
            with run.autocast(), run.eager():
                figures = fill_in(model, held_out, tokenizer, config.hide)
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, steps):
            accuracy = figures.get("val_accuracy")
            run.save(step, steps, model, optimizers, tokenizer, accuracy, lower_is_better=False)

    with run.autocast(), run.eager():
        figures = fill_in(model, held_out, tokenizer, config.hide)
    hint = f"python encoder.py --task {config.task} --init_from {run.folder}"
    run.close(f"{figures['val_accuracy']:.3f} of the hidden words, loss {figures['val_loss']:.3f}", hint)
    return figures


def train_classifier(config: Config) -> dict:
    """Learn the labels; return the accuracy on the test split, and on the validation split, of the best checkpoint."""
    run = start(config, "encoder")
    tokenizer = make_tokenizer(run, config)
    body, lowercase, length = make_body(run, config, tokenizer)
    classes = class_names(config)  # C names
    model = Classifier(body, len(classes), config.pooling).to(run.device)
    body.activation_checkpointing = config.activation_checkpointing

    # Texts, each a row of at most ``length`` tokens; those of a batch are of similar length.
    train = labelled_texts(config, "train", tokenizer, length, lowercase)
    held_out = labelled_texts(config, "validation", tokenizer, length, lowercase)
    test = labelled_texts(config, "test", tokenizer, length, lowercase)
    batches = similar_lengths([len(ids) for ids in train.ids], config.batch_size, config.seed)
    steps = max(1, math.ceil((6.0 if config.epochs is None else config.epochs) * len(batches)))
    run.extra = {"classes": list(classes), "lowercase": lowercase, "length": length}  # saved with every checkpoint

    optimizers = make_optimizers(model, config.lr, config.weight_decay, kind=config.optimizer)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, body, config, train, held_out, steps)

    for step in run.steps(first, steps):
        # Every step leaves other words out of its texts, never [CLS].
        rows = batches[epoch_batch(len(batches), 1, step, config.seed)[0]]
        tokens, real = train.batch(rows, run.device)  # (B, T) each
        drawn = torch.rand(tokens.shape, generator=step_generator(config, step)) < config.hide  # (B, T)
        left_out = drawn.to(run.device) & real & (tokens < tokenizer.vocab_size)  # (B, T)
        tokens, real = leave_out(tokens, real & ~left_out, tokenizer.pad_id)  # (B, T') each
        labels = train.labels_of(rows, run.device)  # (B,)
        share = processes.my_share(torch.arange(len(rows), device=run.device))
        loss = accuracy = torch.zeros((), device=run.device)
        for part in parts_of(share, config.micro_batch_size):
            with run.autocast():
                logits = model(tokens[part], real[part])  # (b, C)
            # A sum over this part, divided by the count of the whole batch: parts and processes add up to the mean.
            part_loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(rows)
            run.scaler.scale(part_loss).backward()
            loss = loss + part_loss.detach()
            accuracy = accuracy + (logits.argmax(dim=-1) == labels[part]).sum() / len(rows)
        lr = learning_rate(step, steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)

        loss, accuracy = processes.sum_over_processes(torch.stack([loss, accuracy])).tolist()
        figures = {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "lr": lr}
        run.log(step, int(real.sum()), show=("loss", "accuracy"), **figures)
        figures = {}
        if run.due(step, config.eval_every, steps):
            with run.autocast(), run.eager():
                figures = judge(predictions(model, held_out), held_out)
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, steps):
            accuracy = figures.get("val_accuracy")
            run.save(step, steps, model, optimizers, tokenizer, accuracy, lower_is_better=False)

    # The last checkpoint need not be the best: the one with the highest validation accuracy is tested.
    best = load_checkpoint(run.folder / "best.pt")
    load_weights(model, best["model"], run.folder)
    with run.autocast(), run.eager():
        logps = predictions(model, test)  # (N, C)
    accuracy = judge(logps, test)["val_accuracy"]
    if not run.has_sample(steps):
        run.sample(steps, mistakes(logps, test, tokenizer, classes))
    validated = f"validation {best['best']:.3f}, step {best['step']}"
    run.close(f"test accuracy {accuracy:.3f} on {len(test):,} texts ({validated})")
    return {"test_accuracy": accuracy, "val_accuracy": best["best"]}


def main(config: Config) -> dict:
    """Train what ``objective`` names, and return its figures. A finished run returns at once, an unfinished one
    continues.
    """
    check(config)
    need_starts(config)
    return train_mlm(config) if config.objective == "mlm" else train_classifier(config)


if __name__ == "__main__":
    run_stage(main, Config)
