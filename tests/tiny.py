"""Small things that several tests share: a tiny model, its weights from a fixture, and runs of a few seconds."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pretrain
import runtime.run
import sft
from transformer import ModelConfig, Transformer

NAMES = {  # Hugging Face's name -> ours
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "lm_head": "head",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "model.layers": "blocks",
}

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "seq_len": 64, "batch_size": 4}

MEASURED_BY_A_CLOCK = {"time", "tokens_per_second", "mfu", "rollout_share"}


def but_slow(values, *quick) -> list:
    """A test's parameters: those in ``quick`` always run, the others with --slow. Several for one test are a tuple."""
    several = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    return [value if value in quick else pytest.param(*several(value), marks=pytest.mark.slow) for value in values]


def llama_tiny(fixture: dict, prefix: str = "w::", config: ModelConfig | None = None) -> Transformer:
    """The model of llama_tiny.npz (or of another fixture of that family, by prefix and shape) in our names."""
    shape = ModelConfig(61, 32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=44, max_seq_len=64, norm_eps=1e-5)
    model = Transformer(config or shape)
    weights = {}
    for key, value in fixture.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = value
    model.load_state_dict(weights)
    return model


def tiny_pretrain(folder, **changes) -> pretrain.Config:
    """A pretraining run of a few seconds."""
    settings = SMALL | {
        "out_dir": str(folder), "steps": 6, "eval_every": 3, "save_every": 2, "log_every": 1, "eval_windows": 8,
        "warmup": 2, "compile": "off", "device": "cpu", "max_documents": 300, "vocab_size": 300,
    }  # fmt: skip
    return replace(pretrain.Config(), **(settings | changes))


def tiny_sft(folder, init_from, **changes) -> sft.Config:
    settings = {
        "out_dir": str(folder), "init_from": str(init_from), "n_examples": 24, "epochs": 2.0, "batch_size": 4,
        "eval_every": 3, "save_every": 2, "log_every": 1, "compile": "off", "device": "cpu",
    }  # fmt: skip
    return replace(sft.Config(), **(settings | changes))


def assert_exact_resume(monkeypatch, stage, whole, stopped, saves: int) -> tuple[dict, dict]:
    """A run of ``stage`` (a chapter) that is cut off behind its save number ``saves`` and started again ends with the
    same weights, bit for bit, as one that never stopped. ``whole`` and ``stopped`` are the two configurations; returns
    the two checkpoints."""
    stage.main(whole)
    original, done = runtime.run.Run.save, 0

    def save(self, *args, **kwargs):
        nonlocal done
        original(self, *args, **kwargs)
        done += 1
        if done == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runtime.run.Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            stage.main(stopped)
    stage.main(stopped)
    one, two = (torch.load(f"{c.out_dir}/ckpt.pt", weights_only=True) for c in (whole, stopped))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    return one, two


def assert_same_training(one: Path, other: Path) -> None:
    """The same losses and gradient norms in every step, and the same weights, but for rounding."""
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows):
        for name in ("loss", "grad_norm"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3), (name, a["step"])
    a, b = (torch.load(f / "ckpt.pt", weights_only=True)["model"] for f in (one, other))
    for name in a:  # Adam turns the rounding of a gradient near zero into a step of full size, so: in the norm
        assert float((a[name] - b[name]).norm()) < 0.01 * float(a[name].norm()), name


def rows_of(folder: Path) -> list[dict]:
    rows = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # it may be being written
                rows.append(json.loads(line))
    return rows


def same(a, b, where="checkpoint") -> None:
    """Equal in every tensor, number and text, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def content(value):
    """Every tensor and number of a state, as something that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: content(one) for key, one in value.items()}
    return [content(one) for one in value] if isinstance(value, (list, tuple)) else repr(value)
