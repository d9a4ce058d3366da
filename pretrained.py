"""Models from and for others: bring a published model, align it, hand it on.

``import`` makes a run's folder of a published model, from which every stage starts and with which ``evaluate.py`` and
``chat.py`` work; ``export`` writes a run as a folder that transformers loads. Both are a renaming (families.py) and a
tokenizer (templates.py). What does not fit is refused in one line that names it: no weight is left random, and none is
left over.

    python pretrained.py import HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2/start     # or a folder, .gguf, .bin
    python chat.py out/smollm2/start --prompt "What is the capital of France?"
    python grpo.py configs/grpo_smollm2_sums.py
    python pretrained.py export out/smollm2/grpo exported      # for AutoModelForCausalLM and AutoTokenizer
    python pretrained.py                                       # a tiny model there and back

The weights of an imported checkpoint are those of the file, in its precision; a stage that trains copies them into
float32. Of adapters alone (``adapters.pt``) the export is PEFT's form; a run with adapters otherwise goes out merged. A
reward model goes out as AutoModelForSequenceClassification, of PPO the policy.

In transformers a text that contains the name of a special token is that token, so there a user can forge a role, and
the exported model's card says so. Here none can, unless the template spells its roles in ordinary letters (TinyLlama's,
``--template plain``): those a user can write, too.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import regex
import torch
import tyro

from families import FAMILIES, config_json, family_of, shape_from, their_name, weights_for, weights_from
from layers import ModelConfig
from lora import LoRAConfig, load_state
from runtime.checkpoint import ADAPTERS, find_checkpoint, read_archive, save_checkpoint, write_text
from runtime.config import as_dict, parse
from runtime.errors import UserError, run_main
from runtime.published import read_published, write_json, write_weights
from stages import load_stage, read_state, shape_in
from templates import padding_for_others, tokenizer_files, tokenizer_from
from tokenizer import ByteTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer
from transformer import Transformer, count_parameters, estimate_memory

# ----------------------------------------------------------------------------------------------------------------------
# From others


DAMAGE = (  # what a file whose parts do not fit runs into
    LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError, regex.error,
)  # fmt: skip


def import_model(source: str, out: str, template: str = "file", tokenizer: str = "") -> dict:
    """Make a run's folder of a published model; its checkpoint. The weights stay what they are in the file, 16 bits
    included: a stage that trains copies them into float32."""
    if (Path(out) / "ckpt.pt").exists():
        raise UserError(f"{out} holds a checkpoint already: choose another folder")
    try:
        model = read_published(source, tokenizer)
        shape = shape_from(model.config, tied="lm_head.weight" not in model.tensors)
        family = model.config["model_type"]
        weights = weights_from(model.tensors, shape, family)
        tokens = tokenizer_from(model, shape.vocab_size, template)
    except UserError as error:
        raise UserError(str(error) if source in str(error) else f"{source}: {error}") from None
    except DAMAGE as error:
        raise UserError(
            f"{source} is damaged, or of a form that is not known here: {type(error).__name__} {error}"
        ) from None
    state = {
        "model": weights, "model_config": as_dict(shape), "tokenizer": tokens.state(), "stage": "imported",
        "config": {"data": f"what {source} was trained on", "source": source, "family": family, "seed": 0},
        "step": 0, "lineage": [],
    }  # fmt: skip
    save_checkpoint(Path(out), state)
    return state


def describe(state: dict) -> str:
    """What was imported, and what the smallest step of training on it takes."""
    shape, tokenizer = ModelConfig(**state["model_config"]), load_tokenizer(state["tokenizer"])
    with torch.device("meta"):
        n = count_parameters(Transformer(shape))
    kinds = ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in state["model"].values()}))
    said = lambda ids: " ".join(tokenizer.decode([i]) or str(i) for i in ids)  # noqa: E731
    form = f"a question begins with {tokenizer.form.user[0]!r}" if tokenizer.form else "none (chat.py --raw goes on)"
    row = min(512, shape.max_seq_len)
    memory = estimate_memory(shape, batch=1, seq_len=row)
    facts = {
        "family": f"{state['config']['family']}, {n:,} parameters in {kinds}",
        "context": f"{shape.max_seq_len:,} tokens",
        "tokens": f"{tokenizer.vocab_size:,}; end {said(tokenizer.end_ids)}, padding {said([tokenizer.pad_id])}",
        "template": form,
        "memory": f"{gigabytes(memory['weights'])} to use it in float32, about {gigabytes(memory['total'])} to train on"
        f" rows of {row} tokens, one at a time (--print_config of a stage says what that stage takes)",
    }
    return "\n".join(f"  {name:10} {value}" for name, value in facts.items())


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB"


# ----------------------------------------------------------------------------------------------------------------------
# For others


def export_model(run: str, folder: str, dtype: str = "auto", base: str = "") -> list[str]:
    """Write a run as a folder that transformers (or, of an adapters.pt, PEFT) loads; the names of its files."""
    path, out = find_checkpoint(run), Path(folder)
    if any((out / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds a model already: choose another folder")
    adapters = read_archive(path, mmap=True)
    if adapters.get("magic") == ADAPTERS:
        return export_adapters(adapters, path, out, base)
    state = load_state(path)
    shape, tokenizer = shape_in(state, str(path)), load_tokenizer(state["tokenizer"])
    try:
        family = family_of(shape)
        weights, config = state["model"], config_json(shape, family)
        parts = {k.removeprefix("backbone."): w for k, w in weights.items() if k.startswith("backbone.")}
        score = weights.get("score.weight") if state["stage"] == "reward" else None
        tensors = weights_for(dict(parts or weights), shape, family)
    except UserError as error:
        raise UserError(f"{run} cannot be exported: {error}") from None
    if score is not None:  # a body and a head of one number
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = score
        config |= {
            "architectures": [re.sub("(ForCausalLM|LMHeadModel)", "ForSequenceClassification", FAMILIES[family])]
        }
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if dtype != "auto":
        tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    kinds = {str(value.dtype).removeprefix("torch.") for value in tensors.values()}
    config["dtype"] = config["torch_dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    files = tokenizer_files(tokenizer, shape)
    special = {"eos_token_id": list(tokenizer.end_ids), "bos_token_id": tokenizer.bos_id}
    special["pad_token_id"] = padding_for_others(tokenizer)[1]
    out.mkdir(parents=True, exist_ok=True)
    names = write_weights(out, tensors)
    for name, text in files.items():
        write_text(out / name, text)
    # Without these transformers would cut every distribution to its 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if score is None:
        write_json(out / "generation_config.json", special | sampling)
    write_text(out / "README.md", model_card(state, shape, family, tokenizer))
    write_json(out / "config.json", config | special)  # last: with it the folder is a model
    names += [*files, *(["generation_config.json"] if score is None else [])]
    return [*names, "README.md", "config.json"]


def export_adapters(state: dict, path: Path, out: Path, base: str) -> list[str]:
    """An adapters.pt in PEFT's form. base: the folder or hub id of the model that they belong to."""
    if not state["lineage"]:
        raise UserError(f"{path} is damaged: it does not say which model its adapters belong to")
    start = state["lineage"][-1]["path"]
    origin = read_state(start)
    shape, lora = shape_in(origin, start), LoRAConfig(**state["lora"] | {"targets": tuple(state["lora"]["targets"])})
    family = family_of(shape)
    base = base or origin["config"].get("source", "")
    if not base:
        raise UserError(f"{path}: --base names the model that the adapters belong to, for example an export of {start}")
    if family == "gpt2" or any(".experts." in name for name in state["adapters"]):
        what = (
            "GPT-2 has q, k and v as one matrix" if family == "gpt2" else "transformers has all experts as one matrix"
        )
        raise UserError(f"{path}: {what}, which has no place for these adapters: export the run, they are merged there")
    parts = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    tensors, modules = {}, set()
    for name, value in state["adapters"].items():
        layer, _, part = name.rpartition(".")
        modules.add(module := their_name(layer, family))
        tensors[f"base_model.model.{module}.{parts[part]}"] = value
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(modules),
        "use_rslora": lora.rslora, "use_dora": lora.dora, "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    names = write_weights(out, tensors, "adapter_model")
    write_json(out / "adapter_config.json", config)
    return [*names, "adapter_config.json"]


def model_card(state: dict, shape: ModelConfig, family: str, tokenizer: Tokenizer) -> str:
    """README.md: where the model comes from, and what its reader should know."""
    settings, stages = state["config"], [*state["lineage"], {"stage": state["stage"], "step": state["step"]}]
    chain = [f"| {one['stage']} | {one['step']:,} | {one.get('path', '')} |" for one in stages]
    told = {
        name: settings[name]
        for name in ("data", "source", "lr", "beta", "seed")
        if settings.get(name) not in (None, "")
    }
    notes = [
        "In transformers, a text that contains the name of a special token is that token: a user can forge a role. "
        "Remove these names from what users write.",
    ]
    if tokenizer.vocab_size < shape.vocab_size or isinstance(tokenizer, TiktokenTokenizer):
        notes.append(f"The embedding has {shape.vocab_size:,} rows; some of them belong to no token.")
    if state["stage"] == "reward":
        bias = float(state["model"]["score.bias"])
        notes.append(f"The scores of the original are these plus {bias:.6g}: this class has no such constant.")
        notes.append(
            "A score is read at the token that ends the answer. transformers reads it at the last token that is no "
            "padding: leave out what the chat template writes behind that end, such as a line break."
        )
    if state["stage"] == "ppo":
        notes.append("This is PPO's policy; its critic is not in it.")
    facts = "\n".join(f"* {name}: {value}" for name, value in told.items())
    lines = "\n".join(f"* {note}" for note in notes)
    return (
        f"# {state['stage']}, a {FAMILIES[family]}\n\nTrained with alignbook and exported by its `pretrained.py`.\n\n"
        f"| stage | steps | started from |\n| --- | --- | --- |\n" + "\n".join(chain) + "\n\n"
        f"The last stage:\n\n{facts}\n\nTo know:\n\n{lines}\n"
        "* The licences of the model it began with, and of the data, hold for it too.\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The commands


@dataclass(frozen=True)
class Config:
    action: tyro.conf.Positional[Literal["", "import", "export"]] = ""
    """import: SOURCE, then the folder to make. export: a run's folder, a checkpoint or an adapters.pt, then the folder
    to make. Without it, a worked example."""
    source: tyro.conf.Positional[str] = ""
    """What to read: of import, a folder, a hub id (org/name), a .gguf, or llama2.c's .bin."""
    target: tyro.conf.Positional[str] = ""
    """The folder to write."""
    template: Literal["file", "chatml", "llama3", "plain", "none"] = "file"
    """import: the chat template, if not the file's own. plain: "User: ... Assistant: ...", for a base model."""
    tokenizer: str = ""
    """import: llama2.c's tokenizer file, if it does not lie beside the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """export: the precision of the weights (auto: as the checkpoint has them)."""
    base: str = ""
    """export of adapters alone: the model that they belong to, as PEFT is to find it."""


def main() -> None:
    config = parse(Config)
    if not config.action:
        return example()
    if not config.source or not config.target:
        raise UserError(
            f"python pretrained.py {config.action} {'SOURCE OUT' if config.action == 'import' else 'RUN FOLDER'}"
        )
    if config.action == "import":
        state = import_model(config.source, config.target, config.template, config.tokenizer)
        print(f"{config.source} -> {config.target}/ckpt.pt\n{describe(state)}")
        raw = "" if state["tokenizer"]["form"] else " --raw"
        print(f"next: python chat.py {config.target}{raw}, or a stage with --init_from {config.target}")
    else:
        names = export_model(config.source, config.target, config.dtype, config.base)
        print(f"{config.source} -> {config.target}: {', '.join(names)}")


def example() -> None:
    """A tiny model, exported and imported again."""
    torch.manual_seed(0)
    demo, shape = ByteTokenizer(), ModelConfig(ByteTokenizer().vocab_size, 32, n_layers=1, n_heads=2, n_kv_heads=1)
    model = Transformer(shape)
    state = {
        "model": model.state_dict(), "model_config": as_dict(shape), "tokenizer": demo.state(), "stage": "sft",
        "config": {"data": "arith", "seed": 0}, "step": 100, "lineage": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "run", state)
        for name in export_model(f"{folder}/run", f"{folder}/exported"):
            print(f"  {name:24} {(Path(folder) / 'exported' / name).stat().st_size:8,} bytes")
        back = import_model(f"{folder}/exported", f"{folder}/back")
        again, tokenizer, _ = load_stage(f"{folder}/back")
    print(describe(back))
    same = all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    print(f"there and back: weights equal bit for bit {same}, ", end="")
    print(f"tokens equal {tokenizer.encode('2+3?') == demo.encode('2+3?')}")


if __name__ == "__main__":
    run_main(main)
