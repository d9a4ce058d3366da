"""Published models, there and back: against transformers on random models of each family, and what is refused."""

import dataclasses
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import but_slow, tiny_pretrain, tiny_sft

import dpo
import evaluate
import gdpo
import grpo
import kto
import ppo
import pretrain
import pretrained
import reward
import sft
from attention import RopeScaling
from families import family_of, from_gpt2, shape_from, their_name, to_gpt2, weights_for, weights_from
from generate import generate
from layers import ModelConfig
from pretrained import export_model, import_model
from runtime.config import read_preset
from runtime.errors import UserError
from runtime.published import check_gguf_counts, halves_from_neighbours, read_published
from stages import load_stage, shape_in
from tokenizer import ByteTokenizer, encode_chat
from transformer import Transformer

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[dev]"')
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
VOCABULARY = 271  # more rows than the tokenizer of 261 has tokens
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 8,
    "num_key_value_heads": 2, "intermediate_size": 44, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 5}
QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 96, "n_inner": 50}
MODELS = {  # of each family several forms: the configuration of transformers
    "llama": ("Llama", SHAPE | THETA),
    "llama, tied": ("Llama", SHAPE | {"tie_word_embeddings": True}),
    "llama, biased": ("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama 3.2": ("Llama", SHAPE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SHAPE | {"sliding_window": None}),
    "mistral, window": ("Mistral", SHAPE | {"sliding_window": 16}),
    "qwen2": ("Qwen2", {k: v for k, v in SHAPE.items() if k != "head_dim"} | {"tie_word_embeddings": True}),
    "qwen2, window": (
        "Qwen2",
        {k: v for k, v in SHAPE.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", SHAPE | THETA),
    "qwen3, window": ("Qwen3", SHAPE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    "mixtral": ("Mixtral", SHAPE | EXPERTS | THETA),
    "mixtral, window": ("Mixtral", SHAPE | EXPERTS | {"sliding_window": 16}),
    "qwen3 moe": ("Qwen3Moe", SHAPE | QWEN_EXPERTS),
    "qwen3 moe, some dense": ("Qwen3Moe", SHAPE | QWEN_EXPERTS | {"mlp_only_layers": [1]}),
    "qwen3 moe, one active": ("Qwen3Moe", SHAPE | QWEN_EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
}  # fmt: skip
FEW = ("llama 3.2", "qwen2", "qwen3", "mistral, window", "mixtral", "qwen3 moe, some dense", "gpt2")


def theirs(name: str):
    """A random model of transformers, whose norms and biases are no ones and zeros."""
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    torch.manual_seed(3)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The files of a byte tokenizer, as an export of ours writes them."""
    folder = tmp_path_factory.mktemp("bytes")
    pretrain.main(tiny_pretrain(folder / "run", steps=1, tokenizer="bytes", eval_every=1))
    export_model(str(folder / "run"), str(folder / "exported"))
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    return {name: (folder / "exported" / name).read_text() for name in names}


def saved(model, folder, vocabulary, **how):
    model.save_pretrained(folder, **how)
    for name, text in vocabulary.items():
        (folder / name).write_text(text)
    return folder


def logits_differ(a, b) -> float:
    return float((a.float() - b.float()).abs().max())


def padded_batch():
    """Prompts of unequal length, padded on the left, and their mask."""
    tokens = torch.randint(0, 256, (3, 64))
    mask = torch.ones_like(tokens)
    mask[1, :7] = mask[2, :20] = 0
    return tokens, mask


def asked(model, mask) -> dict:
    """What transformers is to be told of a batch: GPT-2 takes its positions from nothing else."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": mask} | ({"position_ids": positions} if "gpt2" in model.config.model_type else {})


@pytest.mark.parametrize("name", but_slow(MODELS, *FEW))
def test_a_published_model_says_the_same_here_and_back_again(name, tmp_path, vocabulary):
    """Its logits, its greedy continuation, and after the export every tensor bit for bit."""
    model = theirs(name)
    folder = saved(model, tmp_path / "published", vocabulary)
    import_model(str(folder), str(tmp_path / "run"))
    ours, tokenizer, _ = load_stage(str(tmp_path / "run"))
    tokens, mask = padded_batch()
    with torch.no_grad():
        expected = model(tokens, **asked(model, mask)).logits
        found = ours(tokens, mask=mask)
    assert float(expected.std()) > 0.05
    assert logits_differ(expected[mask.bool()], found[mask.bool()]) < 1e-4
    prompts = [row[keep.bool()].tolist() for row, keep in zip(tokens[:, -30:], mask[:, -30:])]
    new = generate(ours, prompts, 12, temperature=0, eot_id=VOCABULARY)[0]  # no token
    written = model.generate(
        tokens[:, -30:], attention_mask=mask[:, -30:], max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[:, 30:]  # fmt: skip
    assert new.equal(written)

    export_model(str(tmp_path / "run"), str(tmp_path / "exported"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    again, about = type(model).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert logits_differ(again(tokens, **asked(again, mask)).logits, expected) < 1e-5
    assert again.generation_config.top_k == 0 and again.generation_config.temperature == 1.0


OURS = {  # models of ours, and the family that each goes out as
    "llama": ({}, "llama"),
    "llama, head of any width": ({"head_dim": 10, "tie_embeddings": True, "rope_theta": 100.0}, "llama"),
    "llama, biased": ({"bias": True}, "llama"),
    "llama, slowed": ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, "llama"),
    "mistral": ({"window": 16}, "mistral"),
    "qwen2": ({"qkv_bias": True}, "qwen2"),
    "qwen2, window": ({"qkv_bias": True, "window": 16}, "qwen2"),
    "qwen3": ({"qk_norm": True}, "qwen3"),
    "qwen3, window": ({"qk_norm": True, "window": 16}, "qwen3"),
    "mixtral": ({"n_experts": 4}, "mixtral"),
    "mixtral, window": ({"n_experts": 4, "window": 16, "head_dim": 10}, "mixtral"),
    "qwen3 moe": ({"n_experts": 4, "qk_norm": True, "expert_layers": (1,), "d_expert": 20}, "qwen3_moe"),
    "qwen3 moe, window": ({"n_experts": 4, "qk_norm": True, "window": 16}, "qwen3_moe"),
    "qwen3 moe, one active": ({"n_experts": 4, "qk_norm": True, "n_experts_per_token": 1}, "qwen3_moe"),
    "gpt2": (
        {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "n_kv_heads": 4}
        | {"tie_embeddings": True},
        "gpt2",
    ),
    "gpt2, relu": ({"positions": "learned", "norm": "layernorm", "mlp": "relu", "bias": True, "n_kv_heads": 4}, "gpt2"),
}  # fmt: skip


def run_of(folder, state: dict | None = None, **fields) -> Transformer:
    """A checkpoint of a random model of ours."""
    shape = {"vocab_size": 261, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 96}
    model = Transformer(ModelConfig(**(shape | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    about = {
        "model": model.state_dict(), "model_config": dataclasses.asdict(model.config),
        "tokenizer": ByteTokenizer().state(), "stage": "sft", "config": {"data": "arith", "lr": 1e-3}, "step": 7,
        "lineage": [{"stage": "pretrain", "path": "out/arith/pretrain", "step": 60, "weights": "0"}],
    }  # fmt: skip
    pretrained.save_checkpoint(folder, about | (state or {}))
    return model


@pytest.mark.parametrize("name", but_slow(OURS, "llama, slowed", "qwen2", "qwen3 moe", "gpt2"))
def test_a_model_of_ours_says_the_same_in_transformers(name, tmp_path):
    fields, family = OURS[name]
    ours = run_of(tmp_path / "run", **fields)
    assert family_of(ours.config) == family
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    model, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = padded_batch()
    with torch.no_grad():
        expected, found = ours(tokens, mask=mask), model(tokens, **asked(model, mask)).logits
    assert float(expected.std()) > 0.05
    assert logits_differ(expected[mask.bool()], found[mask.bool()]) < 1e-4
    import_model(str(tmp_path / "out"), str(tmp_path / "back"))
    again, _, _ = load_stage(str(tmp_path / "back"))
    assert again.config == ours.config or name.startswith("mixtral")  # whose d_ff is an expert's
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"window": 8, "sinks": 2}, "sinks"),
        ({"positions": "sinusoidal"}, "sinusoidal positions"),
        ({"post_norm": True}, "post_norm"),
        ({"causal": False}, "causal = False"),
        ({"mlp": "gelu"}, "rotary positions with norm rmsnorm and mlp gelu"),
        ({"norm": "layernorm"}, "rotary positions with norm layernorm"),
        ({"n_experts": 4, "n_experts_per_token": 1}, "one active expert goes out as Qwen3-MoE alone"),
        ({"n_experts": 4, "expert_layers": (1,)}, "experts in some blocks alone"),
        ({"n_experts": 4, "n_shared_experts": 1}, "shared experts"),
        ({"n_experts": 4, "router": "sigmoid"}, "the sigmoid router"),
        ({"n_experts": 4, "bias": True}, "experts with biases"),
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm with biases"),
        ({"window": 8, "bias": True}, "a window with biases"),
        ({"positions": "learned"}, "GPT-2's alone"),
    ],
    ids=str,
)
def test_a_model_without_a_twin_is_not_exported(fields, says, tmp_path):
    run_of(tmp_path / "run", **fields)
    with pytest.raises(UserError, match=says):
        export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_routers_that_a_bias_balances_are_not_exported(tmp_path):
    weights = Transformer(ModelConfig(n_experts=4)).state_dict()
    weights_for(dict(weights), ModelConfig(n_experts=4), "mixtral")
    weights["blocks.1.mlp.balance_bias"] = torch.tensor([0.0, 0.1, 0.0, 0.0])
    with pytest.raises(UserError, match="balanced by a bias"):
        weights_for(weights, ModelConfig(n_experts=4), "mixtral")


# ----------------------------------------------------------------------------------------------------------------------
# What is not read


BASE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 44, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
QWEN = {"model_type": "qwen2", "rope_theta": 1e4, "use_sliding_window": True, "sliding_window": 8}
MIXTRAL = EXPERTS | {"model_type": "mixtral", "rope_theta": 1e4, "sliding_window": None}
MOE = QWEN_EXPERTS | {"model_type": "qwen3_moe", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "gemma2"}, "model_type gemma2: known are llama"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias, mlp_bias: known are both at once"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rms_norm_eps": 1e-5, "num_attention_heads": 5}, "impossible model: d_model 32 is not a multiple"),
        ({"vocab_size": None}, "vocab_size None: a whole number is wanted"),
        ({"num_key_value_heads": 3}, "impossible model: n_heads 4 is not a multiple"),
        ({"model_type": "mistral", "rope_theta": 1e4}, "lacks sliding_window"),
        ({"model_type": "qwen3"}, "lacks rope_theta"),
        (QWEN | {"max_window_layers": 1}, "blocks of different attention"),
        (QWEN | {"layer_types": ["full_attention", "sliding_attention"]}, "blocks of different attention"),
        (MIXTRAL | {"num_experts_per_tok": 1}, "one active expert"),
        (MOE | {"norm_topk_prob": False}, "norm_topk_prob False with 2 active experts"),
        (MOE | {"num_experts_per_tok": 1}, "norm_topk_prob True with 1 active experts"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "activation_function": "swish"}, "activation_function swish"),
    ],
    ids=str,
)
def test_a_shape_that_is_not_known_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        shape_from(BASE | changes, tied=True)


@pytest.mark.parametrize("name", [name for name in BASE if name != "hidden_act"])
def test_a_config_that_lacks_a_field_is_refused(name):
    config = {key: value for key, value in BASE.items() if key != name}
    with pytest.raises(UserError, match="lacks" if name != "model_type" else "model_type None"):
        shape_from(config, tied=True)


def llama_tensors(tied: bool = False) -> tuple[dict, ModelConfig]:
    shape = ModelConfig(64, 32, 2, 4, 2, 44, tie_embeddings=tied)
    return weights_for(Transformer(shape).state_dict(), shape, "llama"), shape


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
            "has model.layers.2",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "for which there is no place"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight is \(31,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "of int8"),
    ],
    ids=["lacks", "lacks the head", "one block more", "a bias", "another shape", "no float"],
)
def test_weights_that_do_not_fit_are_refused(change, says):
    """Nothing is left random and nothing is left over."""
    tensors, shape = llama_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old files have it, and it is no weight
    assert weights_from(dict(tensors), shape, "llama").keys() == Transformer(shape).state_dict().keys()
    change(tensors)
    with pytest.raises(UserError, match=says):
        weights_from(tensors, shape, "llama")


def test_a_tied_head_that_is_another_matrix_is_refused():
    tensors, shape = llama_tensors(tied=True)
    weights = weights_from(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, shape, "llama")
    assert weights["head.weight"] is weights["embed.weight"]
    with pytest.raises(UserError, match="another matrix in the file"):
        weights_from(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, shape, "llama")


def test_gpt2_is_turned_and_joined():
    model = Transformer(ModelConfig(64, 8, 1, 2, d_ff=12, mlp="gelu_tanh", bias=True, norm="layernorm"))
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("blocks")}
    turned = to_gpt2(weights)
    assert turned["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    assert turned["transformer.h.0.mlp.c_fc.weight"].equal(weights["blocks.0.mlp.up_proj.weight"].T)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    back = from_gpt2({name.removeprefix("transformer."): value for name, value in turned.items()} | masks)
    assert back.keys() == weights.keys() and all(back[key].equal(value) for key, value in weights.items())


def test_names_of_the_parts():
    assert their_name("final_norm.weight", "qwen3") == "model.norm.weight"
    assert their_name("blocks.1.mlp.router.weight", "qwen3_moe") == "model.layers.1.mlp.gate.weight"
    assert their_name("blocks.1.mlp.router.weight", "mixtral") == "model.layers.1.block_sparse_moe.gate.weight"


# ----------------------------------------------------------------------------------------------------------------------
# Folders and files


def test_parts_and_sixteen_bits(tmp_path, vocabulary):
    """A sharded bf16 folder is read as it is, used in float32, and written back bit for bit, sharded or not."""
    model = theirs("qwen2").to(torch.bfloat16)
    folder = saved(model, tmp_path / "published", vocabulary, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    state = import_model(str(folder), str(tmp_path / "run"))
    assert {value.dtype for value in state["model"].values()} == {torch.bfloat16}
    ours, _, _ = load_stage(str(tmp_path / "run"))
    assert ours.embed.weight.dtype == torch.float32
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        model = type(model).from_pretrained(folder, dtype=torch.float32)
        assert logits_differ(ours(tokens), model(tokens).logits) < 1e-4
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    before = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    pretrained.write_weights(tmp_path / "out", after, "parts", most=20_000)
    assert len(list((tmp_path / "out").glob("parts-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "parts.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    export_model(str(tmp_path / "run"), str(tmp_path / "wide"), dtype="float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(wide[key].equal(value.float()) for key, value in before.items())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle, which could run code"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged or no safetensors file"),
        (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds adapters alone"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "--template names one, or none"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}'),
            "has no ../secret.safetensors",
        ),
    ],
    ids=["no config", "broken json", "pickle", "damaged", "no tokenizer", "adapters", "template", "outside"],
)
def test_a_folder_that_cannot_be_read_is_one_line(change, says, tmp_path, vocabulary):
    folder = saved(theirs("llama"), tmp_path / "published", vocabulary)
    change(folder)
    with pytest.raises(UserError, match=says) as refused:
        import_model(str(folder), str(tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_published(str(tmp_path / "nothing.gguf"))
    with pytest.raises(UserError, match="no-such-org/no-such-model could not be had from the hub"):
        read_published("no-such-org/no-such-model")
    run_of(tmp_path / "run")
    with pytest.raises(UserError, match="holds a checkpoint already"):
        import_model(str(tmp_path), str(tmp_path / "run"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model already"):
        export_model(str(tmp_path / "run"), str(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------------------
# llama2.c and GGUF: rotations of neighbours


def neighbours_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    d = len(weight) // heads
    return weight.view(heads, 2, d // 2, -1).transpose(1, 2).reshape(weight.shape)


def test_layouts_of_rotations_are_told_apart():
    weight = torch.randn(4 * 6, 5)
    assert halves_from_neighbours(neighbours_from_halves(weight, 4), 4).equal(weight)
    assert not halves_from_neighbours(weight, 4).equal(weight)


def write_llama2c(folder, model: Transformer) -> None:
    c, w = model.config, model.state_dict()
    order = ("attn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp_norm", "mlp.gate_proj")
    parts = [w["embed.weight"]]
    for name in (*order, "mlp.down_proj", "mlp.up_proj"):
        for i in range(c.n_layers):
            value, heads = w[f"blocks.{i}.{name}.weight"], {"attn.q_proj": c.n_heads, "attn.k_proj": c.n_kv_heads}
            parts.append(neighbours_from_halves(value, heads[name]) if name in heads else value)
    parts += [w["final_norm.weight"], torch.zeros(2 * c.max_seq_len * c.head_dim // 2)]
    parts += [] if c.tie_embeddings else [w["head.weight"]]
    rows = c.vocab_size if c.tie_embeddings else -c.vocab_size
    head = struct.pack("<7i", c.d_model, c.d_ff, c.n_layers, c.n_heads, c.n_kv_heads, rows, c.max_seq_len)
    folder.mkdir()
    (folder / "model.bin").write_bytes(head + b"".join(part.numpy().tobytes() for part in parts))
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), " ", "a", "b", " a", "ab", " ab"]
    scores = [0.0] * 262 + [-1.0, -2.0, -0.5]
    coded = [(score, piece.encode()) for score, piece in zip(scores, pieces)]
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in coded)
    (folder / "tok265.bin").write_bytes(struct.pack("<i", 6) + body)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_is_read(tied, tmp_path):
    ours = run_of(tmp_path / "mine", vocab_size=265, tie_embeddings=tied)
    write_llama2c(tmp_path / "c", ours)
    import_model(str(tmp_path / "c" / "model.bin"), str(tmp_path / "run"))
    model, tokenizer, _ = load_stage(str(tmp_path / "run"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.state_dict().items())
    assert model.config == ours.config
    assert tokenizer.bos_id == 1 and tokenizer.end_ids == (2,) and tokenizer.pad_id == 0
    said = [tokenizer.pieces[i] for i in tokenizer.encode("ab aé\n")]
    assert said == ["▁ab", "▁a", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab aé\n")) == " ab aé\n"


DAMAGED = [lambda raw: raw[:-4], lambda raw: raw + b"\0" * 4, lambda raw: b"\xff" * 40, lambda raw: b""]


@pytest.mark.parametrize("change", DAMAGED, ids=["cut", "longer", "numbers", "empty"])
def test_a_damaged_llama2c_file_is_one_line(change, tmp_path):
    write_llama2c(tmp_path / "c", run_of(tmp_path / "mine", vocab_size=265))
    file = tmp_path / "c" / "model.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match="llama2.c"):
        import_model(str(file), str(tmp_path / "run"))


def write_gguf(path, model: Transformer, family: str, neighbours: bool) -> None:
    gguf = pytest.importorskip("gguf", reason='needs gguf: pip install -e ".[gguf]"')
    c, w = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(c.n_layers)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_context_length(c.max_seq_len)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_key_length(c.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    from runtime.vocabulary import CHARACTER

    tokens = [*(CHARACTER[b] for b in range(256)), "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3 + [4])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    block = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up"}
    block |= {f"attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
    block |= {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
    whole = {"embed.weight": "token_embd.weight", "final_norm.weight": "output_norm.weight"}
    for name, value in w.items():
        if name == "head.weight":
            continue
        _, i, *inner, kind = name.split(".") if name.startswith("blocks") else ("", "", "")
        heads = {"attn.q_proj": c.n_heads, "attn.k_proj": c.n_kv_heads}.get(".".join(inner))
        value = neighbours_from_halves(value[:, None] if value.dim() == 1 else value, heads).view(value.shape) if (
            heads and neighbours
        ) else value  # fmt: skip
        writer.add_tensor(whole.get(name) or f"blk.{i}.{block['.'.join(inner)]}.{kind}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family, fields", [("llama", {}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})])
def test_gguf_is_read(family, fields, tmp_path):
    """Of the Llama family q and k are stored for neighbours, of Qwen's for halves."""
    ours = run_of(tmp_path / "mine", head_dim=10, tie_embeddings=True, **fields)
    write_gguf(tmp_path / "model.gguf", ours, family, neighbours=family == "llama")
    import_model(str(tmp_path / "model.gguf"), str(tmp_path / "run"))
    model, tokenizer, _ = load_stage(str(tmp_path / "run"))
    assert model.config == ours.config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.state_dict().items())
    assert tokenizer.encode("ab 12<tool>") == [256, 32, ord("1"), ord("2"), 260]
    assert tokenizer.end_ids == (258,) and tokenizer.pad_id not in (258, 259)
    assert tokenizer.form.assistant == ("<|im_start|>assistant\n", "<|im_end|>", "\n")


@pytest.mark.parametrize("what", ["tensors", "facts", "array", "texts", "nested", "text", "end"])
def test_a_gguf_header_that_counts_more_than_its_file_has_is_refused_at_once(what, tmp_path):
    """Its reader would go through 2**40 of them."""
    many, file = 2**40, tmp_path / "model.gguf"
    text = struct.pack("<Q", 1) + b"a"
    array = {"array": (4, many), "texts": (8, many), "nested": (9, many)}.get(what)
    fact = text + (struct.pack("<IIQ", 9, *array) if array else struct.pack("<IQ", 8, many if what == "text" else 0))
    counts = (many if what == "tensors" else 0, many if what == "facts" else 2 if what == "end" else 1)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + fact + bytes(64 if what != "end" else 0))
    with pytest.raises((ValueError, struct.error), match="larger than the file|requires a buffer"):
        check_gguf_counts(file)
    pytest.importorskip("gguf", reason='needs gguf: pip install -e ".[gguf]"')
    with pytest.raises(UserError, match="damaged or no GGUF file") as refused:
        import_model(str(file), str(tmp_path / "run"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_config_of_more_blocks_or_experts_than_there_are_weights_is_refused_at_once(name, tmp_path, vocabulary):
    folder = saved(theirs(name), tmp_path / "published", vocabulary)
    config = json.loads((folder / "config.json").read_text())
    what = {"llama": "num_hidden_layers", "mixtral": "num_local_experts"}[name]
    (folder / "config.json").write_text(json.dumps(config | {what: 9_999}))
    with pytest.raises(UserError, match=r"config.json says 9,999 (blocks|experts), and the file has"):
        import_model(str(folder), str(tmp_path / "run"))


# ----------------------------------------------------------------------------------------------------------------------
# Every stage


@pytest.fixture(scope="module")
def published(tmp_path_factory, vocabulary):
    """Two tiny published models, imported: Qwen2 with ChatML, its end and a second one, and Llama 3.2."""
    root = tmp_path_factory.mktemp("published")
    for name in ("qwen2", "llama 3.2"):
        files = dict(vocabulary)
        tokenizer = json.loads(files["tokenizer.json"])
        for one, new in zip(
            tokenizer["added_tokens"], ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<x>")
        ):
            one["content"] = new
        vocabulary_ids = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {k: i for k, i in vocabulary_ids.items() if i < 256}
        tokenizer["model"]["vocab"] |= {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
        files["tokenizer.json"] = json.dumps(tokenizer)
        files["tokenizer_config.json"] = json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
        files["generation_config.json"] = json.dumps({"eos_token_id": [259, 256]})
        files["chat_template.jinja"] = (
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
            " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
            "{% endif %}"
        )
        kind, fields = MODELS[name]
        config = getattr(transformers, f"{kind}Config")(**fields | {"max_position_embeddings": 256})
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        saved(model.to(torch.bfloat16), root / f"{name} published", files)
        import_model(str(root / f"{name} published"), str(root / name))
    return root


SHORT = {"eval_every": 1, "log_every": 1, "device": "cpu"}
PAIRS = {"data": "arith", "n_pairs": 8, "batch_size": 4, "epochs": 0.5, "max_length": 256} | SHORT
ANSWERS = {"max_new_tokens": 6, "eval_prompts": 4, "n_prompts": 16, "steps": 1, "prompts_per_step": 2} | SHORT


def same_in_transformers(run, folder, auto=transformers.AutoModelForCausalLM) -> None:
    """The exported policy's greedy answer is that of the run."""
    export_model(str(run), str(folder))
    theirs, words = auto.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer, _ = load_stage(str(run))
    messages = [{"role": "user", "content": "Tom has 3 apples. How many?"}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
    asked = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == ids
    new, mask, _ = generate(ours, [ids], 20, temperature=0, eot_id=tokenizer.end_ids)
    written = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert written.tolist() == new[mask].tolist()


def test_fine_tuning_and_grpo_start_from_a_published_model_and_go_out_again(published, tmp_path):
    """Also with adapters, which go out merged."""
    sft.main(tiny_sft(tmp_path / "sft", published / "qwen2", seq_len=256, epochs=0.1))
    lora = {"beta": 0.1, "lora_rank": 2, "lr": 1e-2, "init_from": str(tmp_path / "sft")}
    grpo.main(grpo.Config(out_dir=str(tmp_path / "grpo"), **ANSWERS, **lora))
    for stage in ("sft", "grpo"):
        same_in_transformers(tmp_path / stage, tmp_path / f"{stage} out")
    card = (tmp_path / "grpo out" / "README.md").read_text()
    assert "# grpo" in card and "| imported | 0 |" in card and "| sft | " in card and "forge a role" in card


@pytest.mark.slow
def test_every_stage_starts_from_a_published_model_and_goes_out_again(published, tmp_path):
    """SFT, DPO, KTO, GRPO, GDPO, a reward model and PPO; also with adapters."""
    start = {"init_from": str(published / "qwen2")}
    sft.main(tiny_sft(tmp_path / "sft", published / "qwen2", seq_len=256, epochs=0.4))
    dpo.main(dpo.Config(out_dir=str(tmp_path / "dpo"), **start, **PAIRS))
    kto.main(kto.Config(out_dir=str(tmp_path / "kto"), **start, **PAIRS))
    reward.main(
        reward.Config(out_dir=str(tmp_path / "reward"), **start, **PAIRS, n_sums=0, normalize_on=4, max_new_tokens=6)
    )
    ppo.main(ppo.Config(out_dir=str(tmp_path / "ppo"), reward=str(tmp_path / "reward"), **start, **ANSWERS))
    grpo.main(grpo.Config(out_dir=str(tmp_path / "grpo"), **start, **ANSWERS, beta=0.1, lora_rank=2, lr=1e-2))
    gdpo.main(gdpo.Config(out_dir=str(tmp_path / "gdpo"), **start, **ANSWERS))
    for stage in ("sft", "dpo", "kto", "ppo", "grpo", "gdpo"):
        same_in_transformers(tmp_path / stage, tmp_path / f"{stage} out")
    rows = evaluate.measure(str(tmp_path / "grpo"), evaluate.Config(n=2, max_new_tokens=4, device="cpu"))
    assert rows["stage"] == "grpo" and rows["bits_per_byte"] > 0


@pytest.mark.parametrize("name", but_slow(["qwen2", "llama 3.2"], "qwen2"))
def test_a_reward_model_scores_the_same_in_transformers(name, published, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    start = {"init_from": str(published / name), "out_dir": str(run)}
    reward.main(reward.Config(**start, **PAIRS, n_sums=0, normalize_on=4, max_new_tokens=6))
    export_model(str(run), str(out))
    theirs, about = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokenizer, state = reward.load_reward_model(str(run))
    tokens = torch.randint(0, 250, (3, 30))
    mask = torch.ones_like(tokens)
    mask[1, 20:] = mask[2, 7:] = 0
    tokens[mask == 0] = tokenizer.pad_id
    with torch.no_grad():
        scores = theirs(tokens, attention_mask=mask).logits[:, 0] + state["model"]["score.bias"]
        torch.testing.assert_close(scores, ours(tokens, mask), atol=1e-4, rtol=1e-4)
    assert f"plus {float(state['model']['score.bias']):.6g}" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_alone_are_peft_s(kind, published, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    run, out = tmp_path / "sft", tmp_path / "out"
    adapted = {"lora_rank": 3, "lr": 3e-2, "lora_targets": ("*_proj",)} | kind
    sft.main(tiny_sft(run, published / "qwen2", seq_len=256, epochs=0.4, **adapted))
    export_model(str(run / "adapters.pt"), str(out))
    base = transformers.AutoModelForCausalLM.from_pretrained(published / "qwen2 published", dtype=torch.float32)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(published / "qwen2 published") and config["r"] == 3
    tokens = torch.randint(0, 250, (2, 30))
    with torch.no_grad():
        before = base(tokens).logits
        after = peft.PeftModel.from_pretrained(base, out)(tokens).logits
        assert logits_differ(before, after) > 1e-2
        assert logits_differ(load_stage(str(run))[0](tokens), after) < 1e-4


def test_adapters_that_have_no_place_are_refused(published, tmp_path):
    adapted = {"lora_rank": 1, "lora_targets": ("q_proj",)}
    sft.main(tiny_sft(tmp_path / "sft", published / "qwen2", seq_len=256, epochs=0.2, **adapted))
    state = torch.load(tmp_path / "sft" / "adapters.pt", weights_only=True)
    state["adapters"]["blocks.0.mlp.experts.0.up_proj.A"] = torch.zeros(1)
    torch.save(state, tmp_path / "adapters.pt")
    with pytest.raises(UserError, match="no place for these adapters: export the run"):
        export_model(str(tmp_path / "adapters.pt"), str(tmp_path / "out"))


def test_the_commands(published, tmp_path, monkeypatch, capsys):
    command = lambda *words: monkeypatch.setattr("sys.argv", ["pretrained.py", *map(str, words)])  # noqa: E731
    command("import", published / "qwen2 published", tmp_path / "run")
    pretrained.main()
    said = capsys.readouterr().out
    assert "qwen2, " in said and "in bfloat16" in said and "end <|im_end|> <|endoftext|>, padding <|pad|>" in said
    command("export", tmp_path / "run", tmp_path / "out", "--dtype", "float16")
    pretrained.main()
    assert "model.safetensors, tokenizer.json" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    command("import", tmp_path / "run")
    with pytest.raises(UserError, match="pretrained.py import SOURCE OUT"):
        pretrained.main()


PUBLISHED = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if re.search("smollm2|qwen", path.stem))


def mirror(folder: Path) -> Path:
    """A few rows of the datasets that the presets name, in their own columns."""

    def write(name, rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows * 60))

    said = lambda who, text: {"role": who, "content": text}  # noqa: E731
    pair = {kind: [said("user", "Hi?"), said("assistant", kind)] for kind in ("chosen", "rejected")}
    write("openai__gsm8k/main/train.jsonl", [{"question": "2+3?", "answer": "2+3=5\n#### 5"}])
    write("ChilleD__SVAMP/train.jsonl", [{"Body": "Tom has 2.", "Question": "How many?", "Answer": "2.0"}])
    for split in ("train_prefs", "test_prefs"):
        write(f"HuggingFaceH4__ultrafeedback_binarized/{split}.jsonl", [{"prompt": "Hi?", **pair}])
    dolly = {"instruction": "Say hi.", "context": "", "response": "Hi."}
    write("databricks__databricks-dolly-15k/train.jsonl", [dolly])
    for name in ("train", "held_out"):
        write(f"sums/{name}.jsonl", [{"messages": [said("user", "What is 2 + 3?")], "answer": 5}])
    return folder


@pytest.mark.parametrize("name", but_slow(PUBLISHED, "grpo_smollm2_sums", "dpo_qwen05b_ultrafeedback"))
def test_a_preset_runs_on_a_tiny_model_of_its_family(name, published, tmp_path, monkeypatch):
    stage = {"grpo": grpo, "dpo": dpo, "sft": sft}[name.partition("_")[0]]
    given = read_preset(stage.Config, str(ROOT / "configs" / f"{name}.py"))
    assert given["init_from"] == f"out/{given['task']}/start"
    family = "qwen2" if "qwen" in name else "llama 3.2"
    small = {
        "init_from": str(published / family), "out_dir": str(tmp_path / "run"), "data_dir": str(mirror(tmp_path)),
        "device": "cpu", "micro_batch_size": 2, "steps": 1, "prompts_per_step": 2, "group_size": 2, "eval_prompts": 2,
        "max_new_tokens": 4, "batch_size": 2, "n_pairs": 8, "n_examples": 8, "eval_pairs": 2, "seq_len": 128,
        "max_length": 128, "lora_rank": min(2, given.get("lora_rank", 0)), "epochs": 1 if stage is grpo else 0.1,
    }  # fmt: skip
    small = {field.name: small[field.name] for field in dataclasses.fields(stage.Config) if field.name in small}
    monkeypatch.chdir(mirror(tmp_path))  # the sums' files
    stage.main(stage.Config(**given | small))
    assert (tmp_path / "run" / "ckpt.pt").exists()


STORIES = Path(os.environ.get("ALIGNBOOK_DATA", "")) / "models" / "stories260K" / "stories260K.bin"


@pytest.mark.skipif(not STORIES.is_file(), reason="ALIGNBOOK_DATA names no folder with models/stories260K")
def test_stories260k_tells_its_story(tmp_path):
    state = import_model(str(STORIES), str(tmp_path / "run"))
    model, tokenizer, _ = load_stage(str(tmp_path / "run"))
    assert (
        sum(p.numel() for p in model.parameters())
        == 260_032
        == sum(value.numel() for name, value in state["model"].items() if name != "head.weight")
    )
    ids = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    new = generate(model, [ids], 40, temperature=0, eot_id=tokenizer.end_ids)[0][0]
    told = "there was a little girl named Lily. She loved to play outside in the park."
    assert told in tokenizer.decode(new.tolist())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**61},
        {"head_dim": 16.0},
        {"num_key_value_heads": -1},
        {"model_type": ["llama"]},
        {"vocab_size": 2**62},
    ],
    ids=str,
)
def test_an_impossible_config_is_one_line(changes, tmp_path):
    folder = tmp_path / "published"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    ))  # fmt: skip
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        pretrained.import_model(str(folder), str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_model_with_biases_everywhere_is_a_llama():
    """Qwen2's class would leave those of o_proj and of the feed-forward layers out."""
    assert family_of(ModelConfig(bias=True, qkv_bias=True)) == family_of(ModelConfig(bias=True)) == "llama"
    assert family_of(ModelConfig(qkv_bias=True)) == "qwen2"


def test_heads_that_would_be_larger_than_the_weights_are_refused():
    """A forged shape of a few bytes must not ask for a matrix of n_heads · head_dim rows that no weight has."""
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 32, "n_kv_heads": 1, "head_dim": 64, "d_ff": 64}
    state = {"model": {"embed.weight": torch.zeros(64, 32)}, "model_config": shape}
    with pytest.raises(UserError, match="heads that do not fit"):
        shape_in(state, "x")
    assert shape_in(state | {"model_config": shape | {"n_heads": 1}}, "x").head_dim == 64
