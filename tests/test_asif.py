"""What a GPU would have to do, counted without one (asif.py): every stage on it, waits, launches, compilations.

The limits in this file are what was counted, so that it cannot get worse unseen.
"""

import copy
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from asif import GPU, pretended_gpu
from tiny import but_slow, tiny_pretrain, tiny_sft

import attention
import dpo
import encoder
import engine
import evaluate
import gdpo
import generate
import grpo
import kto
import ppo
import pretrain
import reward
import runtime.run
import sft
from runtime.device import compile_blocks
from transformer import ModelConfig, Transformer, token_logps

CUDA = torch.device("cuda", 0)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8]]
NEVER = 64  # an end-of-text outside the vocabulary


def model(n_layers: int = 2, **form) -> Transformer:
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128}
    return Transformer(ModelConfig(n_layers=n_layers, **(shape | form)))


# ----------------------------------------------------------------------------------------------------------------------
# The pretended GPU itself


OPERATIONS = {  # what is done with x (2, 3) on the GPU and c on the CPU, and what has to be noticed
    "sum": (lambda x, c: x + x, {"launches": 1}),
    "view": (lambda x, c: x.view(3, 2).t()[:1], {}),
    "both devices": (lambda x, c: x + c, {"mixed": 1}),
    "both devices, stacked": (lambda x, c: torch.stack([x[0, 0], c[0, 0]]), {"mixed": 1}),
    "written to the CPU": (lambda x, c: c.add_(x), {"mixed": 1}),
    "a number of the CPU": (lambda x, c: x * c.sum(), {"mixed": 0}),
    "rows by indices of the CPU": (lambda x, c: x[torch.tensor([1, 0])], {"copies": 1, "syncs": 0, "mixed": 0}),
    "rows by a mask": (lambda x, c: x[x > 0], {"syncs": 1}),
    "item": (lambda x, c: x.sum().item(), {"syncs": 1}),
    "if": (lambda x, c: bool((x > 0).any()), {"syncs": 1}),
    "tolist": (lambda x, c: x.tolist(), {"syncs": 1}),
    "nonzero": (lambda x, c: x.nonzero(), {"syncs": 1}),
    "down": (lambda x, c: x.cpu() + c, {"syncs": 1, "mixed": 0}),
    "down and in 64 bits": (lambda x, c: x.cpu().sum(dtype=torch.float64), {"doubles": 0}),
    "in 64 bits": (lambda x, c: x.sum(dtype=torch.float64), {"doubles": 1}),
    "up": (lambda x, c: x + c.to(x.device), {"copies": 1, "mixed": 0, "launches": 2}),
    "a list": (lambda x, c: torch.tensor([1.0, 2.0, 3.0], device=x.device) + x, {"copies": 1, "mixed": 0}),
    "there already": (lambda x, c: x.to(x.device), {"launches": 0}),
    "attention": (lambda x, c: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]), {"launches": 1}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_asks_of_a_gpu_is_noticed(name):
    operation, want = OPERATIONS[name]
    with pretended_gpu() as gpu:
        x = torch.ones(2, 3, device=CUDA)
        for counter in (gpu.launches, gpu.copies):
            counter.clear()
        operation(x, torch.ones(2, 3))
    for kind, n in want.items():
        counter = getattr(gpu, kind)
        assert sum(counter.values()) == n, (kind, counter)
        assert all(place.startswith("tests/test_asif.py:") for _, place in counter)


def test_numbers_are_those_of_the_cpu():
    tokens = torch.randint(64, (3, 20))
    ours = model(tie_embeddings=True)
    theirs = copy.deepcopy(ours)
    (-token_logps(ours, tokens).mean()).backward()
    with pretended_gpu() as gpu:
        theirs = copy.deepcopy(theirs.to(CUDA))
        assert theirs.head.weight is theirs.embed.weight and theirs.head.weight.is_cuda
        with pytest.raises((TypeError, RuntimeError)):
            theirs.head.weight.detach().numpy()
        (-token_logps(theirs, tokens.to(CUDA)).mean()).backward()
        gradients = {name: p.grad.cpu() for name, p in theirs.named_parameters()}
        assert not gpu.mixed and not gpu.doubles
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_autocast_is_that_of_a_gpu():
    with pretended_gpu() as gpu:
        weight, x = nn.Parameter(torch.ones(4, 4, device=CUDA)), torch.ones(2, 4, device=CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            y = nn.functional.linear(x, weight)
            before = sum(gpu.launches.values())
            nn.functional.linear(y, weight)  # neither is cast again
            assert sum(gpu.launches.values()) == before + 1
            assert y.dtype == torch.bfloat16 and y.softmax(-1).dtype == y.exp().dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert (x @ weight).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Every stage


ON = {"device": "cuda", "precision": "bf16"}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """What the stages start from, made on the CPU."""
    root = tmp_path_factory.mktemp("before")
    pretrain.main(tiny_pretrain(root / "pretrain", steps=2, max_seq_len=256))
    sft.main(tiny_sft(root / "sft", root / "pretrain", seq_len=128, n_examples=8, epochs=1.0))
    reward.main(tiny_reward(root / "reward", root, device="cpu"))
    return root


def started(before, folder, **changes) -> dict:
    return {"out_dir": str(folder), "init_from": str(before / "sft"), "eval_every": 1, "log_every": 1} | ON | changes


def tiny_reward(folder, before, **changes) -> reward.Config:
    settings = {"data": "arith", "n_pairs": 4, "n_sums": 4, "normalize_on": 4, "max_new_tokens": 8, "batch_size": 4}
    settings |= {"epochs": 1.0, "max_length": 128, "eval_pairs": 4}
    return reward.Config(**(started(before, folder) | settings | changes))


def pairs(stage, before, folder, **changes):
    """A configuration of dpo or kto."""
    settings = {"data": "arith", "n_pairs": 4, "batch_size": 4, "epochs": 1.0, "max_length": 128, "eval_pairs": 4}
    return stage.Config(**(started(before, folder) | settings | {"eval_prompts": 2} | changes))


def answers(stage, before, folder, **changes):
    """A configuration of ppo, grpo or gdpo."""
    settings = {"max_new_tokens": 8, "eval_prompts": 2, "n_prompts": 8, "steps": 1, "prompts_per_step": 2}
    settings |= {} if stage is ppo else {"group_size": 4}
    return stage.Config(**(started(before, folder) | settings | changes))


def tiny_encoder(folder, **changes) -> encoder.Config:
    settings = {"out_dir": str(folder), "tokenizer": "bytes", "d_model": 32, "n_layers": 1, "n_heads": 2, "n_texts": 16}
    settings |= {"batch_size": 8, "epochs": 1.0, "warmup": 2, "log_every": 1}
    return replace(encoder.Config(), **(settings | ON | changes))


def with_pretrain(**form):
    return lambda b, f: pretrain.main(tiny_pretrain(f, steps=1, **({"max_seq_len": 128} | ON | form)))


def with_pairs(stage, **form):
    return lambda b, f: stage.main(pairs(stage, b, f, **form))


def with_answers(stage, **form):
    return lambda b, f: stage.main(answers(stage, b, f, **form))


def with_measure(**form):
    return lambda b, f: evaluate.measure(str(b / "sft"), evaluate.Config(n=4, max_new_tokens=8, **ON, **form))


STAGES = {  # a name, and what runs a step or two of it
    "pretrain": with_pretrain(),
    "pretrain fp16": with_pretrain(precision="fp16"),
    "pretrain checkpointed": with_pretrain(activation_checkpointing=True, micro_batch_size=2),
    "pretrain gpt2": with_pretrain(positions="learned", norm="layernorm", mlp="gelu", bias=True, tie_embeddings=True),
    "experts": with_pretrain(n_experts=4, n_shared_experts=1, balance="bias"),
    "experts pooled": with_pretrain(n_experts=4, router="sigmoid", balance="pooled", optimizer="adamw"),
    "window": with_pretrain(window=8, sinks=2, qk_norm=True),
    "sft": lambda b, f: sft.main(tiny_sft(f, b / "pretrain", seq_len=128, n_examples=8, epochs=1.0, **ON)),
    "sft alone": lambda b, f: sft.main(tiny_sft(f, b / "pretrain", seq_len=128, n_examples=4, packing=False, **ON)),
    "reward": lambda b, f: reward.main(tiny_reward(f, b)),
    "dpo": with_pairs(dpo),
    "ipo": with_pairs(dpo, method="ipo"),
    "simpo": with_pairs(dpo, method="simpo"),
    "orpo": with_pairs(dpo, method="orpo"),
    "dpo lora": with_pairs(dpo, lora_rank=2),
    "kto": with_pairs(kto),
    "ppo": with_answers(ppo),
    "ppo reward": lambda b, f: ppo.main(answers(ppo, b, f, reward=str(b / "reward"), beta=0.05, kl_target=0.1)),
    "grpo": with_answers(grpo),
    "grpo beta": with_answers(grpo, beta=0.05),
    "grpo draws": with_answers(grpo, draws=2, mask_truncated=True, overlong_buffer=4, beta=0.05),
    "gspo": with_answers(grpo, ratio_level="sequence", loss_type="grpo", scale="batch", beta=0.05, kl_in="reward"),
    "cispo": with_answers(grpo, loss_type="cispo", beta=0.05),
    "grpo lora": with_answers(grpo, lora_rank=2, beta=0.05),
    "gdpo": with_answers(gdpo, beta=0.05),
    "classify": lambda b, f: encoder.main(tiny_encoder(f)),
    "mlm": lambda b, f: encoder.main(tiny_encoder(f, objective="mlm")),
    "evaluate": with_measure(),
    "evaluate samples": with_measure(samples=4, ks=(1, 4)),
}
QUICK = ("sft", "ppo reward", "grpo draws", "classify", "evaluate")

IN_FLOAT64 = {  # where float64 is wanted on a device, which is not Apple's
    "generate.py sample",  # asks for the device
    "attention.py rope_cos_sin",  # asks for the device
    "optim.py update",  # fp16: PyTorch's scaler, which knows Apple's devices
    "engine.py prepare", "engine.py <lambda>", "engine.py draw", "engine.py fast_generate",  # for CUDA alone
}  # fmt: skip


def unguarded(gpu: GPU) -> dict:
    return {key: n for key, n in gpu.doubles.items() if re.sub(r":\d+", "", key[1]) not in IN_FLOAT64}


@pytest.mark.parametrize("name", but_slow(STAGES, *QUICK))
def test_a_stage_runs_on_a_gpu(before, tmp_path, name):
    with pretended_gpu() as gpu:
        STAGES[name](before, tmp_path / "run")
    assert sum(gpu.launches.values()) > 300
    assert not gpu.mixed
    assert not unguarded(gpu)


class Enough(BaseException):
    """What a test ends a run with."""


def forgetful(logps, mask):
    return -(logps * mask.cpu()).sum() / mask.sum()


def exact(logps, mask):
    return -(logps * mask).sum(dtype=torch.float64) / mask.sum()


@pytest.mark.parametrize("mistake", [forgetful, exact])
def test_a_mistake_in_a_stage_is_seen(before, tmp_path, monkeypatch, mistake):
    def stop(*args, **kwargs):  # after a step
        raise Enough

    monkeypatch.setattr(sft, "sft_loss", mistake)
    monkeypatch.setattr(runtime.run.Run, "log", stop)
    with pretended_gpu() as gpu, pytest.raises(Enough):
        STAGES["sft"](before, tmp_path / "run")
    found, where = (gpu.mixed, "forgetful") if mistake is forgetful else (unguarded(gpu), "exact")
    assert found and all(where in place or "sft.py" in place for _, place in found)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def per_token(how, eager: bool = False, blocks: bool = False, **form) -> tuple[float, float]:
    """Launches and waits for one more token of a batch that goes on, at 8 layers in bf16. eager: the engine without its
    graph; blocks: and with a compiled block, and what draws, as one kernel each."""
    counts = []
    for n in (2, 18):
        with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
            if eager or blocks:
                patch.setattr(engine.Decoder, "advance", engine.Decoder.step)
            for name in ("run_block", "draw") if blocks else ():
                patch.setattr(engine, name, gpu.one_kernel(getattr(engine, name)))
            policy = model(8, **form).to(CUDA)
            with torch.autocast("cuda", torch.bfloat16):
                how(policy, PROMPTS, n, 2, eot_id=NEVER, pad_id=0, seed=3)
        assert not gpu.mixed
        counts.append([sum(gpu.launches.values()), sum(gpu.syncs.values())])
    return tuple((b - a) / 16 for a, b in zip(*counts))


def test_generate_waits_once_for_a_token():
    launches, waits = per_token(generate.generate)
    assert launches <= 359 and waits <= 1


def test_the_engine_waits_once_in_16_tokens_and_launches_a_graph():
    """In eager mode a step is about as many kernels as ``generate``'s. A real GPU compiles the blocks and the drawing
    (9 of the 39.2 launches; a compiled call may be a few kernels), records the step, and replays it as one: the 9
    others that remain for a token are the random numbers and the bookkeeping of the result."""
    for eager, blocks, limit in ((True, False, 423.2), (True, True, 39.2), (False, False, 10.2)):
        launches, waits = per_token(engine.fast_generate, eager, blocks)
        assert launches <= limit and waits <= 1 / 16, (eager, blocks, launches, waits)


def test_a_look_at_every_token_is_seen(monkeypatch):
    advance = engine.Decoder.advance
    monkeypatch.setattr(engine.Decoder, "advance", lambda self, *key: (self.going.sum().item(), advance(self, *key)))
    assert per_token(engine.fast_generate)[1] > 1


def test_a_wait_in_a_recorded_step_is_refused(monkeypatch):
    step = engine.Decoder.step
    monkeypatch.setattr(engine.Decoder, "step", lambda self, *key: (self.going.sum().item(), step(self, *key)))
    with pytest.raises(RuntimeError, match="while a graph is recorded"):
        per_token(engine.fast_generate)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_replayed_graph_writes_what_generate_writes(temperature, monkeypatch):
    """The step is recorded once for each size and then made again on its buffers."""
    monkeypatch.setattr(engine, "LOOK_EVERY", 4)
    policy, eot = model(), NEVER if temperature else 5
    with torch.no_grad():
        policy.head.weight[5] *= 1 if temperature else 4  # greedy rows leave early, sampled ones never
    want = generate.generate(policy, PROMPTS, 40, 4, temperature, eot_id=eot, pad_id=0, seed=3)
    with pretended_gpu() as gpu:
        on_gpu = policy.to(CUDA)
        for _ in range(2):  # another rollout takes the graphs of the first
            got = engine.fast_generate(on_gpu, PROMPTS, 40, 4, temperature, eot_id=eot, pad_id=0, seed=3)
            got = [x.cpu() for x in got]
            for a, b in zip(want[:2], got[:2]):
                assert torch.equal(a, b)
            torch.testing.assert_close(want[2], got[2], atol=1e-4, rtol=1e-4)
        assert not gpu.mixed


def test_a_step_that_keeps_something_outside_its_buffers_goes_wrong(monkeypatch):
    """The mistake that a recorded graph makes of ``self.token = ...`` instead of ``self.token.copy_(...)``."""

    def step(self, rows, temperature, eot_id):
        kept = self.token
        self.token = kept.clone()
        right(self, rows, temperature, eot_id)

    right, policy = engine.Decoder.step, model()
    want = generate.generate(policy, PROMPTS, 20, temperature=0, eot_id=NEVER, pad_id=0)[0]
    monkeypatch.setattr(engine.Decoder, "step", step)
    with pretended_gpu():
        got = engine.fast_generate(policy.to(CUDA), PROMPTS, 20, temperature=0, eot_id=NEVER, pad_id=0)[0].cpu()
    assert not torch.equal(want, got)


# ----------------------------------------------------------------------------------------------------------------------
# Waits of a training step


def waits_of_a_step(monkeypatch, stage, config) -> int:
    """Those of a stage's third step, in which nothing is examined or saved."""
    seen, log = [], runtime.run.Run.log

    def logged(self, *args, **kwargs):
        log(self, *args, **kwargs)
        seen.append(Counter(gpu.syncs))
        if len(seen) == 3:
            raise Enough

    with pretended_gpu() as gpu, monkeypatch.context() as patch:
        patch.setattr(runtime.run.Run, "log", logged)
        with pytest.raises(Enough):
            stage.main(config)
    assert not gpu.mixed and not unguarded(gpu)
    step = seen[2] - seen[1]
    print(sum(step.values()), *(f"\n  {n} {what}, {place}" for (what, place), n in sorted(step.items())))
    return sum(step.values())


RARELY = {"eval_every": 100, "save_every": 100, "log_every": 100}
LEARNED = RARELY | {"steps": 4, "max_new_tokens": 16, "n_prompts": 32, "minibatches": 1, "epochs": 1}
CONFIGS = {  # of a stage: its configuration from (before, folder, the size of a micro-batch), and the rows of a step
    pretrain: (lambda b, f, n: tiny_pretrain(f, steps=4, micro_batch_size=n, **(RARELY | ON)), 4),
    sft: (lambda b, f, n: tiny_sft(f, b / "pretrain", seq_len=128, epochs=4.0, micro_batch_size=n, **(RARELY | ON)), 4),
    grpo: (lambda b, f, n: answers(grpo, b, f, prompts_per_step=4, beta=0.05, micro_batch_size=n, **LEARNED), 16),
    ppo: (lambda b, f, n: answers(ppo, b, f, prompts_per_step=8, micro_batch_size=n, **LEARNED), 8),
    dpo: (lambda b, f, n: pairs(dpo, b, f, n_pairs=16, micro_batch_size=n, **RARELY), 4),
    kto: (lambda b, f, n: pairs(kto, b, f, n_pairs=16, micro_batch_size=n, **RARELY), 4),
}
WAITS = [(pretrain, 1, 0), (sft, 2, 1), (grpo, 34, 7), (ppo, 28, 5), (dpo, 6, 5), (kto, 9, 8)]


@pytest.mark.parametrize(("stage", "limit", "more"), but_slow(WAITS, WAITS[0], WAITS[2]))
def test_a_step_waits_a_bounded_number_of_times(before, tmp_path, monkeypatch, stage, limit, more):
    """limit: a step of one micro-batch; more: a second one."""
    config, rows = CONFIGS[stage]
    once = waits_of_a_step(monkeypatch, stage, config(before, tmp_path / "one", rows))
    twice = waits_of_a_step(monkeypatch, stage, config(before, tmp_path / "two", rows // 2))
    assert once <= limit and twice - once <= more, (once, twice)


def test_a_wait_more_in_a_micro_batch_is_seen(before, tmp_path, monkeypatch):
    logps_of = pretrain.token_logps
    monkeypatch.setattr(pretrain, "token_logps", lambda *args: (logps_of(*args).sum().item(), logps_of(*args))[1])
    config = CONFIGS[pretrain][0](before, tmp_path / "one", 2)
    assert waits_of_a_step(monkeypatch, pretrain, config) == WAITS[0][1] + 2


# ----------------------------------------------------------------------------------------------------------------------
# What torch.compile makes of it


def breaks(f, *args, **kwargs) -> list[str]:
    torch._dynamo.reset()
    return [str(one.reason) for one in torch._dynamo.explain(f)(*args, **kwargs).break_reasons]


def test_no_graph_breaks():
    policy, tokens = model(), torch.randint(64, (4, 20))
    x, rope = policy.embed(tokens).detach(), attention.rope_cos_sin(torch.arange(20), 8)
    assert breaks(policy.blocks[0], x, rope) == []
    assert breaks(policy.forward_hidden, tokens) == []
    assert breaks(policy.forward_hidden, tokens, segments=torch.zeros_like(tokens)) == []
    assert breaks(policy.forward_hidden, tokens, mask=torch.ones_like(tokens)) == []
    assert breaks(token_logps, policy, tokens) == []
    with torch.no_grad():
        decoder = engine.Decoder(policy)
        decoder.prepare(policy, 4, 128, torch.float32)
        decoder.cache.real[:, :3] = True
        assert breaks(decoder.step, 4, 1.0, NEVER) == []
    wanted = tokens[:, 1:] > 20  # how many they are no compiler knows; that is the only break
    assert all("nonzero" in reason for reason in breaks(token_logps, policy, tokens, where=wanted))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert breaks(token_logps, policy, tokens, where=wanted) == []


def test_a_graph_break_is_seen(monkeypatch):
    feed_forward = type(model().blocks[0].mlp)
    forward = feed_forward.forward

    def curious(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(feed_forward, "forward", curious)
    policy = model()
    assert breaks(policy.blocks[0], policy.embed(torch.zeros(4, 20, dtype=torch.long)).detach())


def compilations(shapes, dynamic: bool | None = None, n_layers: int = 3) -> int:
    """How often the blocks are compiled in training steps on batches of these shapes, one after the other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy = model(n_layers)
    with pytest.MonkeyPatch.context() as patch:
        compiled = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend="eager", **how))
        compile_blocks(policy, dynamic)
    for shape in shapes:
        token_logps(policy, torch.randint(64, shape)).mean().backward()
        generate.generate(policy, PROMPTS, 3, eot_id=NEVER, pad_id=0, seed=0)  # goes past what is compiled
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


SHAPES = [(6, 30), (6, 30), (6, 41), (12, 24), (3, 57), (5, 16), (10, 64), (7, 33)]


def test_blocks_are_compiled_once_for_a_shape_and_once_for_all_others():
    assert compilations([(6, 30)] * 3) == 1
    assert compilations(SHAPES) <= 3
    assert compilations(SHAPES, dynamic=True) == 1
