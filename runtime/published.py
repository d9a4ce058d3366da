"""Published models as they lie on a disk, each brought to one form: that of a folder of the hub.

Three formats: a folder with ``config.json`` and safetensors (or its id on the hub), llama.cpp's GGUF, and llama2.c's
``.bin``. What comes out has the hub's names for everything, whatever the file called it, and weights in the layout of
transformers: GGUF (of the Llama family) and llama2.c store queries and keys for rotations of *neighbouring*
coordinates, which is undone here. What the names mean is the chapters' matter (families.py, templates.py).

Nothing of a file is run: no pickle is opened, and a chat template is a text.
"""

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from runtime.checkpoint import write_atomically, write_text
from runtime.errors import UserError


@dataclass
class PublishedModel:
    """A model in the form of the hub: each field is the content of the file of that name."""

    config: dict
    tensors: dict[str, Tensor]
    tokenizer: dict  # tokenizer.json; or of SentencePiece files {"pieces": [...], "scores": [...], "kinds": [...]}
    tokenizer_config: dict = field(default_factory=dict)
    generation_config: dict = field(default_factory=dict)
    template: str = ""  # chat_template.jinja


def read_published(source: str, tokenizer: str = "") -> PublishedModel:
    """The model in a folder, in a .gguf or .bin file, or on the hub (org/name). tokenizer: the file of llama2.c's."""
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return read_gguf(path)
    if path.is_file() and path.suffix == ".bin":
        return read_llama2c(path, tokenizer)
    if (
        path.exists()
        or source.count("/") != 1
        or source.startswith((".", "/", "~"))
        or path.suffix in (".gguf", ".bin")
    ):
        what = "is none of these" if path.exists() else "is not there"
        raise UserError(
            f"{source} {what}: a folder of the hub's form, a .gguf, llama2.c's .bin, or a hub id (org/name)"
        )
    return read_folder(download(source), source)


def download(hub_id: str) -> Path:
    """The folder of a model of the hub, downloaded once."""
    from huggingface_hub import snapshot_download  # loaded when it is needed: it takes a second

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except Exception as error:  # whatever the network stack raises
        why = " ".join(str(error).split())[:100]
        raise UserError(
            f"{hub_id} could not be had from the hub ({type(error).__name__}: {why}): connect once, or give a folder "
            "that holds the model"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# The hub's folder


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object")
    return content


def read_folder(folder: Path, name: str = "") -> PublishedModel:
    name = name or str(folder)
    config = read_json(folder / "config.json")
    if not config:
        raise UserError(f"{name} has no config.json: not a model's folder")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{name} holds adapters alone: merge them into their base first")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.is_file() else tokenizer_config.get("chat_template") or ""
    if isinstance(source, list):  # several, by name
        source = {one.get("name"): one.get("template") for one in source}.get("default") or ""
    return PublishedModel(
        config, read_safetensors(folder, name), read_json(folder / "tokenizer.json"), tokenizer_config,
        read_json(folder / "generation_config.json"), str(source),
    )  # fmt: skip


def read_safetensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a folder's model.safetensors, or of the parts that model.safetensors.index.json names."""
    index = read_json(folder / "model.safetensors.index.json")
    parts = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        path = folder / part
        if Path(part).name != part or not path.is_file():
            others = sorted(one.name for one in folder.glob("*.bin"))
            beside = f"; {others[0]} is a pickle, which could run code" if others else ""
            raise UserError(f"{name} has no {part}{beside}")
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or no safetensors file ({' '.join(str(error).split())[:100]})"
            ) from None
    missing = sorted(set(index.get("weight_map", {})) - set(tensors))
    if missing:
        raise UserError(f"{name} lacks {missing[0]}, which its index names")
    return tensors


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_weights(folder: Path, tensors: dict[str, Tensor], stem: str = "model", most: int = 5 * 10**9) -> list[str]:
    """safetensors, in parts of at most ``most`` bytes; the names of the files. The index comes last."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        n = value.numel() * value.element_size()
        if parts[-1] and size + n > most:
            parts.append({})
            size = 0
        parts[-1][name] = value.contiguous()
        size += n
    names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else [f"{stem}.safetensors"]
    for name, part in zip(names, parts):
        write_atomically(folder / name, lambda temporary, part=part: save_file(part, temporary, {"format": "pt"}))
    if len(parts) > 1:
        total = sum(value.numel() * value.element_size() for value in tensors.values())
        where = {key: name for name, part in zip(names, parts) for key in part}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        names.append(f"{stem}.safetensors.index.json")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Rotations


def halves_from_neighbours(weight: Tensor, heads: int) -> Tensor:
    """The rows of a q or k projection (heads · d, D), laid out for rotating the pairs (x_2i, x_2i+1), as they are for
    the pairs (x_i, x_i+d/2) of transformers and of attention.py. Forgetting it gives fluent rubbish and no error.

    >>> halves_from_neighbours(torch.arange(4.0)[:, None], heads=1)[:, 0].tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    d = len(weight) // heads
    return weight.view(heads, d // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


# ----------------------------------------------------------------------------------------------------------------------
# GGUF

GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
NEIGHBOURS = ("llama",)  # the architectures whose files have q and k for neighbouring pairs
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
GGUF_SPLITS = {  # by tokenizer.ggml.pre: how the text is divided before anything is joined
    "gpt-2": [GPT2_SPLIT],
    "smollm": [r"\p{N}", GPT2_SPLIT],
    "llama-bpe": [_WORDS % "{1,3}"],
    "qwen2": [_WORDS % ""],
}


GGUF_BYTES = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)  # of a value of each type; 8 is a text, 9 an array


def check_gguf_counts(path: Path) -> None:
    """ValueError where a header counts more than the file has bytes for: a reader would be busy with it for days."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(8)

        def number(form: str) -> int:
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

        def skip(n: int) -> None:
            if n > size - file.tell():
                raise ValueError("a count that is larger than the file")
            file.seek(n, os.SEEK_CUR)

        def value(kind: int) -> None:
            if kind == 8:
                skip(number("<Q"))
            elif kind == 9:
                of, n = number("<I"), number("<Q")
                if of in (8, 9):
                    if n > (size - file.tell()) // 8:  # each begins with a length
                        raise ValueError("a count that is larger than the file")
                    for _ in range(n):
                        value(of)
                else:
                    skip(n * GGUF_BYTES[of])
            else:
                skip(GGUF_BYTES[kind])

        tensors, facts = number("<Q"), number("<Q")
        if tensors > size // 24 or facts > size // 12:
            raise ValueError("a count that is larger than the file")
        for _ in range(facts):
            value(8)
            value(number("<I"))


def read_gguf(path: Path) -> PublishedModel:
    """llama.cpp's format; weights in blocks of few bits become float32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError(f'{path}: GGUF files want the package gguf: pip install -e ".[gguf]"') from None
    try:
        check_gguf_counts(path)
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"{path} is damaged or no GGUF file ({type(error).__name__})") from None
    family = facts.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3") or facts.get(f"{family}.expert_count"):
        what = "a mixture of experts" if facts.get(f"{family}.expert_count") else family
        raise UserError(f"{path} holds {what}: of GGUF files llama, qwen2 and qwen3 are read, without experts")
    config = gguf_config(facts, family, path)
    tensors = {}
    for one in tqdm(reader.tensors, desc="reading", unit=" weights", mininterval=1.0, leave=False):
        block, _, rest = one.name.removeprefix("blk.").partition(".")
        inner, _, kind = rest.rpartition(".")
        name = GGUF_NAMES.get(one.name)
        if name is None and one.name.startswith("blk.") and inner in GGUF_BLOCK:
            name = f"model.layers.{block}.{GGUF_BLOCK[inner]}.{kind}"
        if name is None:
            raise UserError(f"{path} holds {one.name}, for which there is no place: import the hub's folder instead")
        try:
            value = torch.from_numpy(np.array(dequantize(one.data, one.tensor_type), dtype=np.float32))
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{path}: {one.name} is stored as {one.tensor_type.name}, not known ({error})") from None
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        if family in NEIGHBOURS and inner in heads:
            value = halves_from_neighbours(value, heads[inner])
        tensors[name] = value
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    tokenizer, tokenizer_config = gguf_tokenizer(facts, path)
    ends = [facts[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in facts]
    template = str(facts.get("tokenizer.chat_template", ""))
    return PublishedModel(config, tensors, tokenizer, tokenizer_config, {"eos_token_id": ends}, template)


def gguf_config(facts: dict, family: str, path: Path) -> dict:
    """The facts of a GGUF file as a config.json."""
    names = {
        "num_hidden_layers": "block_count", "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }  # fmt: skip
    missing = [theirs for theirs in names.values() if f"{family}.{theirs}" not in facts]
    if missing or "tokenizer.ggml.tokens" not in facts:
        raise UserError(f"{path} lacks {family}.{missing[0]}" if missing else f"{path} has no vocabulary")
    config = {ours: facts[f"{family}.{theirs}"] for ours, theirs in names.items()}
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # it was float32
    wide = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = facts.get(f"{family}.attention.key_length", wide)
    turned = facts.get(f"{family}.rope.dimension_count", config["head_dim"])
    scaled = facts.get(f"{family}.rope.scaling.type", "none")
    if turned != config["head_dim"] or scaled != "none":
        raise UserError(
            f"{path}: rotations of {turned} of {config['head_dim']} coordinates, scaling {scaled}: not read"
        )
    config["rope_theta"] = facts.get(f"{family}.rope.freq_base", 10000.0)
    return config | {"model_type": family, "vocab_size": len(facts["tokenizer.ggml.tokens"]), "hidden_act": "silu"}


def gguf_tokenizer(facts: dict, path: Path) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json) of the vocabulary in a GGUF file."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    name = lambda role: tokens[facts[key]] if (key := f"tokenizer.ggml.{role}_token_id") in facts else None  # noqa: E731
    named = {f"{ours}_token": name(theirs) for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()}
    # Kind 3 are special tokens, 4 added ones that a text can produce, 5 unused ones.
    added = [{"id": i, "content": tokens[i], "special": kind != 4} for i, kind in enumerate(kinds) if kind in (3, 4, 5)]
    model, before = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre", "gpt-2")
    named["add_bos_token"] = bool(facts.get("tokenizer.ggml.add_bos_token", model == "llama"))
    if model == "llama":
        scores = facts["tokenizer.ggml.scores"]
        prefix = "text" if facts.get("tokenizer.ggml.add_space_prefix", True) else "none"
        return {"pieces": tokens, "scores": scores, "added_tokens": added, "prefix": prefix}, named
    if model != "gpt2" or before not in GGUF_SPLITS:
        known = ", ".join(GGUF_SPLITS)
        raise UserError(f"{path}: the vocabulary is of kind {model}, {before}; read are llama, and gpt2 with {known}")
    special = {one["id"] for one in added}
    vocabulary = {token: i for i, token in enumerate(tokens) if i not in special}
    splits = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated"} for one in GGUF_SPLITS[before]]
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": facts["tokenizer.ggml.merges"]},
        "normalizer": {"type": "NFC"} if before == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, {"type": "ByteLevel", "use_regex": False}]},
        "added_tokens": added,
    }, named  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# llama2.c


def read_llama2c(path: Path, tokenizer: str = "") -> PublishedModel:
    """llama2.c's first format: seven numbers, then float32 weights, those of all layers side by side."""
    raw = path.read_bytes()
    if len(raw) < 28:
        raise UserError(f"{path} is no model of llama2.c: it is too short")
    D, F, L, H, K, V, T = struct.unpack("<7i", raw[:28])
    tied, V = V > 0, abs(V)
    if not all(0 < n < 2**24 for n in (D, F, L, H, K, V, T)) or D % H:
        raise UserError(f"{path} is no model of llama2.c (or of its later, quantised format)")
    d = D // H
    parts = {
        "model.embed_tokens": (V, D), "input_layernorm": (L, D), "self_attn.q_proj": (L, H * d, D),
        "self_attn.k_proj": (L, K * d, D), "self_attn.v_proj": (L, K * d, D), "self_attn.o_proj": (L, D, H * d),
        "post_attention_layernorm": (L, D), "mlp.gate_proj": (L, F, D), "mlp.down_proj": (L, D, F),
        "mlp.up_proj": (L, F, D), "model.norm": (D,), "cosines": (T, d // 2), "sines": (T, d // 2),
    }  # fmt: skip
    parts |= {} if tied else {"lm_head": (V, D)}
    size = sum(int(np.prod(shape)) for shape in parts.values())
    if len(raw) != 28 + 4 * size:
        raise UserError(f"{path} has {len(raw):,} bytes; a model of llama2.c of this shape has {28 + 4 * size:,}")
    tensors, start = {}, 28
    for name, shape in parts.items():
        n = int(np.prod(shape))
        value = torch.from_numpy(np.frombuffer(raw, "<f4", n, start).astype(np.float32).reshape(shape))
        start += 4 * n
        if name in ("cosines", "sines"):  # of the rotations, which follow from the shape
            continue
        if name.startswith(("model.", "lm_head")):
            tensors[f"{name}.weight"] = value
            continue
        heads = {"self_attn.q_proj": H, "self_attn.k_proj": K}.get(name)
        for i, one in enumerate(value):
            one = one if heads is None else halves_from_neighbours(one, heads)
            tensors[f"model.layers.{i}.{name}.weight"] = one.clone()
    config = {
        "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": H, "num_key_value_heads": K, "vocab_size": V, "max_position_embeddings": T,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": tied,
    }  # fmt: skip
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return PublishedModel(config, tensors, llama2c_tokenizer(path, tokenizer, V), named)


def llama2c_tokenizer(model: Path, path: str, size: int) -> dict:
    """The pieces and scores in llama2.c's tokenizer file; by default the one beside the model."""
    beside = sorted(one for one in model.parent.glob("tok*.bin") if one != model)
    if not path and len(beside) != 1:
        raise UserError(f"{model}: --tokenizer names its vocabulary (llama2.c's tokenizer.bin)")
    file = Path(path) if path else beside[0]
    if not file.is_file():
        raise UserError(f"there is no tokenizer {file}")
    raw, pieces, scores, at = file.read_bytes(), [], [], 4
    try:
        for _ in range(size):
            score, n = struct.unpack_from("<fi", raw, at)
            at += 8 + n
            if n < 0 or at > len(raw):
                raise ValueError
            pieces.append(raw[at - n : at].decode("utf-8"))
            scores.append(score)
    except (struct.error, ValueError):
        raise UserError(f"{file} is no tokenizer of llama2.c with {size} tokens") from None
    if at != len(raw):
        raise UserError(f"{file} has more than the model's {size} tokens")
    pieces = ["<unk>", "<s>", "</s>", *(piece.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}") for piece in pieces[3:])]
    added = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    return {"pieces": pieces, "scores": scores, "added_tokens": added, "prefix": "text"}
