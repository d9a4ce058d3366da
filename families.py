"""The same transformer under other names: the families of published models.

A published model is a folder. Its ``config.json`` says what shape the model has, each family in words of its own, and
its ``model.safetensors`` holds the weights under the names of the family's classes in transformers. To read one is a
renaming, as long as nothing is guessed; what goes wrong in practice goes wrong in silence::

    names        a weight that is missing stays random, one left over is dropped, and the model still writes
    layouts      GPT-2 has q, k and v as one matrix, transposed; a tied head is not in the file
    rotations    pairs are halves (transformers, attention.py) or neighbours (Meta, llama2.c, GGUF's Llama):
                 undone where the file is read (runtime/published.py)
    routing      Mixtral's chosen experts' weights sum to 1: of a single one it is 1, and its router has no effect

So the two sets of names must be equal here, every field that changes what is computed is read or refused, and what a
family cannot say is not exported as one of it. The families: Llama (SmolLM2, TinyLlama, Llama 3.2), Mistral, Qwen2,
Qwen3, Mixtral, Qwen3-MoE and GPT-2.

Run ``python families.py`` to see one block's weights in two families.
"""

import torch
from torch import Tensor

from attention import RopeScaling
from layers import ModelConfig
from runtime.errors import UserError
from runtime.published import halves_from_neighbours
from transformer import Transformer

# ----------------------------------------------------------------------------------------------------------------------
# Shapes: config.json, in each family's words

FAMILIES = {  # model_type -> the class of transformers that it is
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}  # fmt: skip
# GPT-2's activations, theirs -> ours; of two names for one the first is written
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh"}


def shape_from(config: dict, tied: bool) -> ModelConfig:
    """The shape that a config.json describes. tied: whether the head is, if it has no tie_word_embeddings.
    UserError: of a family that is not known, or with something that ``ModelConfig`` cannot say.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {family}: known are {', '.join(FAMILIES)}")
    if "quantization_config" in config:
        raise UserError("its weights are quantised (quantization_config): import the original, or a .gguf")
    try:
        fields = gpt2_fields(config) if family == "gpt2" else llama_fields(config, family)
        fields |= {"vocab_size": config["vocab_size"], "tie_embeddings": bool(config.get("tie_word_embeddings", tied))}
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len"):
            if not isinstance(fields[name], int) or fields[name] < 1:
                raise UserError(f"{name} {fields[name]}: a whole number is wanted")
        return ModelConfig(**fields)
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json describes an impossible model: {error}") from None


def refuse(config: dict, **allowed: tuple) -> None:
    """UserError for a field with another value than the allowed ones; None stands for a field that is not there."""
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise UserError(f"{name} {str(config[name])[:60]}: not known here")


def llama_fields(config: dict, family: str) -> dict:
    """Llama and its kin: RMSNorm, SwiGLU, rotary positions. They differ in a bias, a norm, a window, experts."""
    refuse(config, hidden_act=("silu", None), partial_rotary_factor=(1.0, None), attn_logit_softcapping=(None,))
    theta, scaling = rotation_of(config)
    heads = config["num_attention_heads"]
    fields = {
        "d_model": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads, "head_dim": config.get("head_dim"),
        "d_ff": config["intermediate_size"], "max_seq_len": config["max_position_embeddings"],
        "rope_theta": theta, "rope_scaling": scaling, "norm_eps": config["rms_norm_eps"],
        "qk_norm": family in ("qwen3", "qwen3_moe"), "qkv_bias": family == "qwen2", "window": window_of(config, family),
    }  # fmt: skip
    biased, mlp_biased = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if biased or mlp_biased:
        if not (biased and mlp_biased and family == "llama"):
            raise UserError("attention_bias, mlp_bias: known are both at once, in Llama, or none")
        fields["bias"] = True
    if family == "mixtral":
        fields |= {"n_experts": config["num_local_experts"], "n_experts_per_token": config["num_experts_per_tok"]}
        fields |= {"d_expert": config["intermediate_size"]}
        if fields["n_experts_per_token"] == 1:
            raise UserError("one active expert, whose weight Mixtral makes 1 (num_experts_per_tok)")
    if family == "qwen3_moe":
        fields |= qwen3_experts(config)
    return fields


def qwen3_experts(config: dict) -> dict:
    """Which blocks have experts, and how many. Our router divides the weights of the chosen experts by their sum if it
    chooses several, so the file's must."""
    k, layers = config["num_experts_per_tok"], config["num_hidden_layers"]
    if bool(config["norm_topk_prob"]) != (k > 1):
        raise UserError(f"norm_topk_prob {config['norm_topk_prob']} with {k} active experts")
    sparse = [
        i for i in range(layers)
        if i not in (config.get("mlp_only_layers") or []) and (i + 1) % config.get("decoder_sparse_step", 1) == 0
    ]  # fmt: skip
    return {
        "n_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        "n_experts_per_token": k, "d_expert": config["moe_intermediate_size"],
        "expert_layers": None if len(sparse) == layers else tuple(sparse),
    }  # fmt: skip


def gpt2_fields(config: dict) -> dict:
    """GPT-2: LayerNorm, learned positions, biases everywhere, no gate, all heads alike."""
    refuse(config, scale_attn_weights=(True, None), scale_attn_by_inverse_layer_idx=(False, None))
    refuse(config, add_cross_attention=(False, None), activation_function=(*ACTIVATIONS, None))
    return {
        "d_model": config["n_embd"], "n_layers": config["n_layer"], "n_heads": config["n_head"],
        "d_ff": config.get("n_inner") or 4 * config["n_embd"], "max_seq_len": config["n_positions"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5), "positions": "learned", "norm": "layernorm", "bias": True,
        "mlp": ACTIVATIONS[config.get("activation_function") or "gelu_new"],
    }  # fmt: skip


def rotation_of(config: dict) -> tuple[float, RopeScaling | None]:
    """θ and what slows the rotations down: ``rope_parameters`` in new files, ``rope_theta`` and ``rope_scaling`` in
    older ones."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta, kind = found.get("rope_theta", config.get("rope_theta")), found.get("rope_type", found.get("type"))
    refuse(found, partial_rotary_factor=(1.0, None))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(**dict(zip(("factor", "low", "high", "original"), (found[name] for name in names))))
    elif kind in (None, "default"):
        scaling = None
    else:
        raise UserError(f"rope_type {kind}: known are default and llama3")
    if theta is None and config["model_type"] != "llama":  # whose files of before 2024 leave it out
        raise KeyError("rope_theta")
    return 10000.0 if theta is None else float(theta), scaling


def window_of(config: dict, family: str) -> int | None:
    """The width of the sliding window, if every block has one."""
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return None
    kinds = set(config.get("layer_types") or ())
    if not kinds and family in ("qwen2", "qwen3") and config.get("sliding_window"):
        first = config.get("max_window_layers", 28)  # the blocks before it see all
        layers = range(config["num_hidden_layers"])
        kinds = {"sliding_attention" if i >= first else "full_attention" for i in layers}
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"blocks of different attention ({', '.join(sorted(kinds))})")
    windowed = family != "llama" and kinds != {"full_attention"}  # Llama's class has no window, whatever its file says
    if windowed and "sliding_window" not in config:
        raise KeyError("sliding_window")
    return config.get("sliding_window") if windowed else None


def family_of(shape: ModelConfig) -> str:
    """The family that a model of ours is one of. UserError: none is (``ModelConfig`` can say more than any of them)."""
    c, k = shape, shape.n_experts_per_token
    odd = {
        "sinks": c.sinks, "causal = False": not c.causal, "post_norm": c.post_norm,
        "the sigmoid router": c.n_experts and c.router != "softmax", "shared experts": c.n_shared_experts,
        "sinusoidal positions": c.positions == "sinusoidal",
        "experts with biases": c.n_experts and (c.bias or c.qkv_bias),
        "qk_norm with biases": c.qk_norm and (c.bias or c.qkv_bias), "a window with biases": c.window and c.bias,
    }  # fmt: skip
    for what, there in odd.items():
        if there:
            raise UserError(f"no published family has {what}")
    if c.positions == "learned":
        like_gpt2 = c.norm == "layernorm" and c.mlp != "swiglu" and c.bias and c.n_kv_heads == c.n_heads
        if not like_gpt2 or c.qk_norm or c.window or c.n_experts or c.head_dim * c.n_heads != c.d_model:
            raise UserError(
                "learned positions go out as GPT-2's alone: LayerNorm, biases, no gate, no groups, no window"
            )
        return "gpt2"
    if c.norm != "rmsnorm" or c.mlp != "swiglu":
        raise UserError(f"no published family has rotary positions with norm {c.norm} and mlp {c.mlp}")
    if c.n_experts:
        if not c.qk_norm and (k == 1 or c.expert_layers is not None):
            what = "one active expert" if k == 1 else "experts in some blocks alone"
            raise UserError(f"{what} goes out as Qwen3-MoE alone, whose queries and keys are normalised (qk_norm)")
        return "qwen3_moe" if c.qk_norm else "mixtral"
    return "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias and not c.bias else "mistral" if c.window else "llama"


def config_json(shape: ModelConfig, family: str) -> dict:
    """config.json of a model of ours, as that family writes it."""
    c = shape
    common = {"model_type": family, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings}
    common |= {"architectures": [FAMILIES[family]]}
    if family == "gpt2":
        activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[c.mlp]
        return common | {
            "n_embd": c.d_model, "n_layer": c.n_layers, "n_head": c.n_heads, "n_inner": c.d_ff,
            "n_positions": c.max_seq_len, "layer_norm_epsilon": c.norm_eps, "activation_function": activation,
        }  # fmt: skip
    rotation = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        s = c.rope_scaling
        rotation |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high}
        rotation |= {"original_max_position_embeddings": s.original}
    config = common | {
        "hidden_size": c.d_model, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "intermediate_size": c.d_ff, "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "rope_parameters": rotation,  # version 5 of transformers reads these, older ones the two that follow
        "rope_scaling": None if c.rope_scaling is None else rotation,
    }  # fmt: skip
    if family == "llama":
        config |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    elif family in ("mistral", "mixtral"):
        config |= {"sliding_window": c.window}
    else:
        config |= {"use_sliding_window": c.window is not None, "sliding_window": c.window, "max_window_layers": 0}
        config |= {"attention_bias": False} if family != "qwen2" else {}
    if family == "mixtral":
        config |= {"num_local_experts": c.n_experts, "num_experts_per_tok": c.n_experts_per_token}
        config |= {"intermediate_size": c.d_expert}
    if family == "qwen3_moe":
        dense = [i for i in range(c.n_layers) if c.expert_layers is not None and i not in c.expert_layers]
        config |= {"num_experts": c.n_experts, "num_local_experts": c.n_experts, "decoder_sparse_step": 1}
        config |= {"num_experts_per_tok": c.n_experts_per_token, "moe_intermediate_size": c.d_expert}
        config |= {"norm_topk_prob": c.n_experts_per_token > 1, "mlp_only_layers": dense}
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Weights: the same tensors under other names

TOP_NAMES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "mlp": "mlp",
}
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's
GPT2_NAMES = {
    "embed": "wte", "position_embed": "wpe", "final_norm": "ln_f", "attn_norm": "ln_1", "mlp_norm": "ln_2",
    "attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


def their_name(name: str, family: str) -> str:
    """What a weight or a layer of ours is called in the Llama-shaped families.

    >>> their_name("blocks.3.attn.q_proj.weight", "llama")
    'model.layers.3.self_attn.q_proj.weight'
    >>> their_name("blocks.3.mlp.experts.0.gate_proj.weight", "mixtral")
    'model.layers.3.block_sparse_moe.experts.0.w1.weight'
    """
    first, *rest = name.split(".")
    if first != "blocks":
        return ".".join([TOP_NAMES[first], *rest])
    layer, part, *rest = rest
    names = [f"model.layers.{layer}", BLOCK_NAMES[part], *rest]
    if family == "mixtral" and part == "mlp":
        names = [names[0], "block_sparse_moe", *(EXPERT_NAMES.get(one, one) for one in rest)]
    return ".".join("gate" if one == "router" else one for one in names)


def to_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as one matrix, and every matrix of a block transposed: its layers multiply from the other side."""
    renamed = {}
    for name, value in weights.items():
        *path, kind = name.split(".")
        prefix = ["transformer"]
        if path[0] == "blocks":
            prefix, path = ["transformer", "h", path[1]], path[2:]
            value = value.T if value.dim() == 2 else value
        layer = ".".join(path)
        if layer in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
            renamed.setdefault(".".join([*prefix, "attn.c_attn", kind]), []).append(value)
        else:
            renamed["lm_head.weight" if layer == "head" else ".".join([*prefix, GPT2_NAMES[layer], kind])] = value
    joint = {name: torch.cat(value, dim=-1) for name, value in renamed.items() if isinstance(value, list)}
    return {name: value.contiguous() for name, value in (renamed | joint).items()}


def from_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_gpt2``. An unknown name passes through, and ``weights_from`` says that it is left over."""
    ours, renamed = {theirs: name for name, theirs in GPT2_NAMES.items()}, {}
    for name, value in tensors.items():
        *path, kind = name.removeprefix("transformer.").split(".")
        if path and path[-1] == "attn" and kind in ("bias", "masked_bias"):  # not weights: the causal mask
            continue
        before = ""
        if path[:1] == ["h"]:
            before, path = f"blocks.{path[1]}.", path[2:]
            value = value.T.contiguous() if value.dim() == 2 else value
        layer = ".".join(path)
        if layer == "attn.c_attn" and len(value) % 3 == 0:
            renamed |= {f"{before}attn.{part}_proj.{kind}": one.clone() for part, one in zip("qkv", value.chunk(3))}
        else:
            renamed["head.weight" if layer == "lm_head" else f"{before}{ours.get(layer, layer)}.{kind}"] = value
    return renamed


def weights_from(tensors: dict[str, Tensor], shape: ModelConfig, family: str) -> dict[str, Tensor]:
    """A published model's tensors under our names, as they are in the file. UserError: one is missing, left over, or of
    another shape."""
    for name, n in (("blocks", shape.n_layers), ("experts", shape.n_experts)):
        if n > len(tensors):  # a skeleton of them would need no memory, but each is an object of Python's
            raise UserError(f"config.json says {n:,} {name}, and the file has {len(tensors):,} weights")
    with torch.device("meta"):
        wanted = Transformer(shape).state_dict()
    tensors = {name: value for name, value in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if family == "gpt2":
        found, called = from_gpt2(tensors), {name: name for name in wanted}
    else:
        called = {name: their_name(name, family) for name in wanted if not name.endswith("balance_bias")}
        left = tensors.keys() - set(called.values())
        found = {name: tensors[theirs] for name, theirs in called.items() if theirs in tensors}
        found |= {theirs: tensors[theirs] for theirs in left}
    if shape.tie_embeddings and "embed.weight" in found:  # mostly the file has the matrix once
        if not torch.equal(found.setdefault("head.weight", found["embed.weight"]), found["embed.weight"]):
            raise UserError("the head is tied to the embedding, and yet it is another matrix in the file")
        found["head.weight"] = found["embed.weight"]
    found |= {name: torch.zeros(value.shape) for name, value in wanted.items() if name.endswith("balance_bias")}
    missing, left = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or left:
        what = [f"lacks {called.get(missing[0], missing[0])}"] if missing else []
        what += [f"has {left[0]}, for which there is no place"] if left else []
        more = f" ({len(missing) + len(left)} names do not fit)" if len(missing) + len(left) > 1 else ""
        raise UserError(f"the file {' and '.join(what)}{more}")
    for name, value in found.items():
        if value.shape != wanted[name].shape or not value.is_floating_point():
            kind = f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
            raise UserError(f"{called.get(name, name)} is {kind}; its config.json wants {tuple(wanted[name].shape)}")
    return {name: found[name] for name in wanted}


def weights_for(weights: dict[str, Tensor], shape: ModelConfig, family: str) -> dict[str, Tensor]:
    """Our weights under a family's names; a tied head is left out."""
    moved = [name for name, value in weights.items() if name.endswith("balance_bias") and bool(value.any())]
    if moved:
        raise UserError(f"its routers were balanced by a bias ({moved[0]}), which no published family has")
    weights = {name: value for name, value in weights.items() if not name.endswith("balance_bias")}
    if shape.tie_embeddings:
        weights.pop("head.weight", None)
    return to_gpt2(weights) if family == "gpt2" else {their_name(name, family): w for name, w in weights.items()}


if __name__ == "__main__":
    print("the weights of a block, and what Llama and its kin call them")
    for name in Transformer(ModelConfig(64, 8, n_layers=1, n_heads=2)).state_dict():
        if name.startswith("blocks"):
            print(f"  {name:30} {their_name(name, 'llama')}")
    print("GPT-2 has q, k and v as one matrix, and its matrices are transposed")
    model = Transformer(ModelConfig(64, 8, n_layers=1, n_heads=2, mlp="gelu_tanh", bias=True, norm="layernorm"))
    for name, value in to_gpt2({k: v for k, v in model.state_dict().items() if k.startswith("blocks")}).items():
        print(f"  {name:38} {tuple(value.shape)}")
    rows = torch.arange(8.0)[:, None]
    print("rows of a q projection of 2 heads, for pairs of neighbours", rows[:, 0].int().tolist())
    turned = halves_from_neighbours(rows, 2)[:, 0].int().tolist()
    print("the same rows for pairs of halves                         ", turned)
    frequencies = 500000.0 ** (-torch.arange(0, 64, 8) / 64)
    slowed = RopeScaling(factor=32.0, low=1.0, high=4.0, original=8192).slowed(frequencies)
    print("Llama 3.2 turns these pairs slower by", " ".join(f"{float(a / b):.3g}" for a, b in zip(frequencies, slowed)))
    for fields in ({}, {"window": 16}, {"qkv_bias": True}, {"qk_norm": True}, {"n_experts": 4}):
        option = ", ".join(f"{name} {value}" for name, value in fields.items()) or "no option"
        print(f"a model with {option} is {family_of(ModelConfig(**fields))}")
