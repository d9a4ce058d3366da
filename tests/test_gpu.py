"""On a GPU: the same numbers as on a CPU, every stage in every precision, a run that goes on, two runs alike.

pytest tests/test_gpu.py tests/test_engine.py       # skipped where there is no GPU
"""

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_pretrain, tiny_sft

import dpo
import evaluate
import gdpo
import grpo
import kto
import ppo
import pretrain
import reward
import sft
from rollout import sample_answers
from runtime.device import compile_blocks, pick_precision
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer, token_logps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PRECISIONS = ["fp32", "bf16", "fp16"]


def model(**form) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**({"vocab_size": 512, "d_model": 128, "n_layers": 3, "max_seq_len": 128} | form)))


def gradients(model: Transformer, tokens: torch.Tensor, precision: str, **settings) -> dict[str, torch.Tensor]:
    model.zero_grad()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast(tokens.device.type, dtype, enabled=precision != "fp32"):
        loss = -token_logps(model, tokens, **settings).mean()
    scale = 2.0**12 if precision == "fp16" else 1.0  # as the scaler does: small gradients would vanish in 16 bits
    (scale * loss).backward()
    return {"loss": loss.detach().cpu()} | {name: p.grad.cpu() / scale for name, p in model.named_parameters()}


def difference(a: dict, b: dict) -> float:
    """The largest relative error, in the norm, of any gradient."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.mark.parametrize(
    "form", [{}, {"n_kv_heads": 2}, {"norm": "layernorm", "positions": "learned", "mlp": "gelu"}], ids=str
)
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-4), ("bf16", 0.03), ("fp16", 0.01)])
@pytest.mark.parametrize("how", ["eager", "compiled", "chunks"])
def test_gradients_are_those_of_a_cpu(form, precision, limit, how):
    tokens = torch.randint(512, (4, 96))
    want = gradients(model(**form), tokens, "fp32")
    ours = model(**form).cuda()
    if how == "compiled":
        compile_blocks(ours)
    got = gradients(ours, tokens.cuda(), precision, **({"max_logits": 512 * 50} if how == "chunks" else {}))
    assert difference(got, want) < limit


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.05)])
def test_the_policy_that_samples_is_the_policy_that_trains(precision, limit):
    policy, tokenizer = model(vocab_size=ByteTokenizer().vocab_size).cuda(), ByteTokenizer()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
        rollout = sample_answers(policy, tokenizer, [[*b"Hi"], [*b"Hello"]], 8, 60, 1.0, seed=0)
        with torch.no_grad():
            logps = token_logps(policy, rollout.tokens, where=rollout.mask)
    gap = ((logps - rollout.sampled_logps).abs() * rollout.mask).sum() / rollout.mask.sum()
    assert gap < limit


@pytest.fixture(scope="module", params=PRECISIONS)
def chain(request, tmp_path_factory):
    """Every stage, a few steps each, from the one before."""
    root, on = tmp_path_factory.mktemp(request.param), {"device": "cuda", "precision": request.param}
    pretrain.main(tiny_pretrain(root / "pretrain", max_seq_len=256, **on))
    sft.main(tiny_sft(root / "sft", root / "pretrain", seq_len=128, **on))
    start = {"init_from": str(root / "sft"), "eval_every": 1, "log_every": 1} | on
    pairs = {"data": "arith", "n_pairs": 16, "batch_size": 4, "epochs": 1.0, "max_length": 128, "eval_pairs": 8}
    for method in ("dpo", "ipo", "simpo", "orpo"):
        dpo.main(dpo.Config(out_dir=str(root / method), method=method, eval_prompts=4, **start, **pairs))
    kto.main(kto.Config(out_dir=str(root / "kto"), eval_prompts=4, **start, **pairs))
    reward.main(
        reward.Config(out_dir=str(root / "reward"), n_sums=8, normalize_on=8, max_new_tokens=8, **start, **pairs)
    )
    answers = {"max_new_tokens": 24, "eval_prompts": 4, "n_prompts": 16, "steps": 3}
    ppo.main(ppo.Config(out_dir=str(root / "ppo"), reward=str(root / "reward"), prompts_per_step=8, **start, **answers))
    groups = {"prompts_per_step": 4, "group_size": 4} | answers
    grpo.main(grpo.Config(out_dir=str(root / "grpo"), beta=0.05, **start, **groups))
    grpo.main(grpo.Config(out_dir=str(root / "lora"), lora_rank=2, beta=0.05, **start, **groups))
    gdpo.main(gdpo.Config(out_dir=str(root / "gdpo"), **start, **groups))
    return root


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_trains_on_finite_numbers(chain):
    for stage in ("pretrain", "sft", "dpo", "ipo", "kto", "simpo", "orpo", "reward", "ppo", "grpo", "lora", "gdpo"):
        metrics = rows(chain / stage)
        if stage != "gdpo":  # all of whose groups may be flat: then it trains on nothing
            assert any(row.get("tokens_per_second", 0) > 0 for row in metrics), stage
        for row in metrics:
            assert all(value == value and abs(value) < 1e6 for value in row.values()), (stage, row)


def test_every_stage_can_be_examined(chain):
    for name in ("sft", "dpo", "ppo", "grpo", "gdpo"):
        figures = evaluate.measure(str(chain / name), evaluate.Config(n=4, max_new_tokens=8, device="cuda"))
        assert 0 <= figures["accuracy"] <= 1


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.02)])
def test_losses_are_those_of_a_cpu(tmp_path, precision, tolerance):
    on_cpu, on_gpu = tmp_path / "cpu", tmp_path / "gpu"
    pretrain.main(tiny_pretrain(on_cpu))
    pretrain.main(tiny_pretrain(on_gpu, device="cuda", precision=precision))
    for a, b in zip(rows(on_cpu), rows(on_gpu), strict=True):
        for name in ("loss", "val_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=tolerance), (name, a["step"])


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "ckpt.pt", weights_only=True, map_location="cpu")["model"]


def far_apart(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def test_two_runs_are_alike_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    """Within 1 % in the norm of every matrix: some kernels add up in another order each time."""
    configs = [tiny_pretrain(tmp_path / name, device="cuda", precision="bf16") for name in ("a", "b", "c")]
    pretrain.main(configs[0])
    pretrain.main(configs[1])
    save, saves = pretrain.Run.save, []

    def stop_after_one(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saves.append(1)
        if len(saves) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrain.Run, "save", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(configs[2])
    pretrain.main(configs[2])
    a, b, c = (weights(tmp_path / name) for name in ("a", "b", "c"))
    print(f"two runs {far_apart(a, b):.2e}, stopped and continued {far_apart(a, c):.2e}")
    assert far_apart(a, b) < 0.01 and far_apart(a, c) < 0.01


def test_auto_is_bf16_on_a_card_that_has_it():
    wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert pick_precision("auto", torch.device("cuda")) == wanted
    assert replace(pretrain.Config(), device="cuda").precision == "auto"
