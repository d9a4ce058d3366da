"""Two processes compute what one computes on the whole batch. They meet through gloo, as under torchrun."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_grpo import TOKENIZER, StubRun
from test_ppo import prepare
from tiny import assert_same_training, but_slow, tiny_pretrain, tiny_sft

import dpo
import gdpo
import grpo
import kto
import ppo
import pretrain
import reward
import sft
from data import epoch_batch, pack
from grpo import Rollout, accumulate_gradients, group_advantages, sample_answers
from preferences import Judged, encode_judged
from rollout import join
from runtime import processes
from runtime.errors import UserError
from stages import load_stage
from texts import load_chats
from transformer import ModelConfig, Transformer, token_logps
from watch import mean_over_answers

ROOT = Path(__file__).parent.parent
STAGES = {
    "pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "orpo": dpo, "ppo": ppo, "grpo": grpo
}  # fmt: skip

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def worker(rank: int, world: int, meeting: str, function, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        result = function(*args)
    torch.save({"result": result, "printed": printed.getvalue()}, f"{meeting}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(folder: Path, function, *args) -> list:
    """``function(*args)`` on both of two processes: their results, by rank."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(["grpo", "tiny", "test_processes", "torch._dynamo", "matplotlib.pyplot"])
    meeting = folder / f"meeting{len(list(folder.iterdir()))}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        started = [context.Process(target=worker, args=(rank, 2, str(meeting), function, args)) for rank in (0, 1)]
        for process in started:
            process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in (0, 1)]


def results(both: list) -> list:
    return [one["result"] for one in both]


# ----------------------------------------------------------------------------------------------------------------------
# The helpers


def use_helpers() -> dict:
    rank = processes.rank()
    value = torch.tensor([1.0, 2.0]) + 10 * rank
    total = processes.sum_over_processes(value)
    layer, unused, idle = (torch.nn.Linear(2, 1) for _ in range(3))  # used by both, by one, by none
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    (layer(torch.ones(1, 2)) * (rank + 1)).sum().backward()
    if rank == 1:
        unused(torch.ones(1, 2)).sum().backward()
    processes.sum_gradients([*layer.parameters(), *unused.parameters(), *idle.parameters(), frozen])
    try:
        refused = processes.my_share(list(range(5)))
    except ValueError as error:
        refused = str(error)
    return {
        "rank": rank, "world": processes.world_size(), "sum": total.tolist(), "value": value.tolist(),
        "gather": processes.gather(torch.tensor([[rank, 5]])).tolist(),
        "objects": processes.gather_objects({"rank": rank}),
        "share": processes.my_share(list(range(6))), "rows": processes.my_share(torch.arange(4)).tolist(),
        "gradients": [p.grad.tolist() for p in (layer.weight, unused.weight)], "frozen": frozen.grad,
        "idle": idle.weight.grad,
        "refused": refused,
    }  # fmt: skip


def test_sums_shares_and_gathering(tmp_path):
    zero, one = results(on_two_processes(tmp_path, use_helpers))
    assert (zero.pop("rank"), one.pop("rank")) == (0, 1)
    assert (zero.pop("value"), one.pop("value")) == ([1.0, 2.0], [11.0, 12.0])  # the input of a sum is not written
    assert (zero.pop("share"), one.pop("share")) == ([0, 1, 2], [3, 4, 5])
    assert (zero.pop("rows"), one.pop("rows")) == ([0, 1], [2, 3])
    assert zero == one
    assert zero["sum"] == [12.0, 14.0] and zero["gather"] == [[0, 5], [1, 5]] and zero["world"] == 2
    assert zero["objects"] == [{"rank": 0}, {"rank": 1}]
    assert zero["gradients"] == [[[3.0, 3.0]], [[1.0, 1.0]]] and zero["frozen"] is None  # sums, not means
    assert zero["idle"] is None  # a gradient of zero would let the optimizer's momentum and decay move it
    assert "5 rows cannot be shared evenly by 2 processes" in zero["refused"]


def test_alone_the_helpers_change_nothing():
    value = torch.tensor([1.0, 2.0])
    assert processes.sum_over_processes(value).tolist() == [1.0, 2.0] and processes.gather(value) is value
    assert processes.my_share(value) is not None and len(processes.my_share(value)) == 2
    assert processes.gather_objects(7) == [7] and (processes.rank(), processes.world_size()) == (0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The gradient of GRPO on a given rollout


def policy_and_rollout() -> tuple[Transformer, Rollout]:
    torch.manual_seed(3)
    model = Transformer(ModelConfig(TOKENIZER.vocab_size, 32, 2, 2, max_seq_len=64))
    with torch.no_grad():
        model.head.weight.mul_(6)
        model.head.weight[TOKENIZER.eot_id] = model.head.weight.mean(0) + 0.5  # some answers end early
    prompts = [[65, 66, 67], [68], [69, 70], [71, 72, 73, 74]]
    return model, sample_answers(model, TOKENIZER, prompts, 3, 14, 0.7, seed=5)


REWARDS = {
    "both learn": torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0.5, 0, 1, 0, 1]),
    "one has only flat groups": torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]),
}
CASES = [
    {"loss_type": loss_type, "beta": beta, "micro_batch_size": size, "ratio_level": level}
    for loss_type in ("grpo", "dapo", "dr_grpo", "cispo")
    for beta, size, level in ((0.0, 64, "token"), (0.1, 4, "token"), (0.0, 5, "sequence"))
] + [{"loss_type": loss_type, "mask_truncated": True} for loss_type in ("grpo", "dapo")]


def grpo_gradients(rewards: dict) -> list:
    """For each case: the summed gradient of the first and of a second update, and the statistics."""
    model, rollout = policy_and_rollout()
    rollout.finished = torch.arange(12) >= 6  # with mask_truncated no token of the first process counts
    share = slice(None)
    if processes.world_size() == 2:
        share = slice(0, 6) if processes.rank() == 0 else slice(6, 12)
    mask = rollout.mask[share]
    width = int(mask.any(dim=0).nonzero().max()) + 1  # each process has its own longest answer
    mine = Rollout(
        rollout.tokens[share][:, : width + 1], mask[:, :width], rollout.sampled_logps[share][:, :width],
        rollout.texts[share], rollout.finished[share],
    )  # fmt: skip
    out = [{"tokens": int(mask.sum())}]
    for name, values in rewards.items():
        for case in CASES:
            if "mask_truncated" in case and name != "both learn":
                continue  # nothing would be left
            config = grpo.Config(temperature=0.7, max_new_tokens=14, group_size=3, **case)
            advantages = group_advantages(values, 3)[share]
            ref = mine.sampled_logps - 0.1 * mine.mask * (mine.tokens[:, 1:] % 3)
            old = mine.sampled_logps + 0.3 * mine.mask * ((mine.tokens[:, 1:] % 5) - 2)  # some ratios are clipped
            for old_logps in (mine.sampled_logps, old):
                model.zero_grad(set_to_none=True)
                statistics = accumulate_gradients(StubRun(), model, mine, advantages, config, old_logps, ref)
                processes.sum_gradients(model.parameters())
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
                out.append({"case": (name, case, old_logps is old), "gradient": gradient, **statistics})
    return out


def test_grpo_on_two_processes_has_the_gradient_of_the_whole_batch(tmp_path):
    whole = grpo_gradients(REWARDS)
    zero, one = results(on_two_processes(tmp_path, grpo_gradients, REWARDS))
    assert zero[0]["tokens"] != one[0]["tokens"] and zero[0]["tokens"] + one[0]["tokens"] == whole[0]["tokens"]
    for a, b, all_of_it in zip(zero[1:], one[1:], whole[1:]):
        assert torch.equal(a["gradient"], b["gradient"])
        assert all_of_it["gradient"].abs().max() > 1e-4, all_of_it["case"]
        torch.testing.assert_close(a["gradient"], all_of_it["gradient"], rtol=1e-3, atol=1e-6, msg=str(a["case"]))
        for name in ("loss", "clip_fraction", "kl_old", "tokens", "kl_ref"):
            if name in all_of_it:
                assert a[name] == pytest.approx(all_of_it[name], rel=1e-4, abs=1e-6), (name, a["case"])
    assert any(row["clip_fraction"] > 0 for row in whole[1:])


def gdpo_run(config) -> list:
    """The advantages of each update of a GDPO run on rewards that are made up; both processes must know all rewards."""
    seen, real = [], gdpo.accumulate_gradients
    judged = []

    def judge(rollout, golds, config):
        sums = torch.tensor([sum(map(ord, text)) for text in rollout.texts])
        rewards = {"correct": (sums % 2).float(), "formatted": (sums % 3 == 0).float(), "short": (sums % 5 < 2).float()}
        judged.append((rewards, rollout.mask.sum(dim=1)))
        return rewards

    def accumulated(run, model, rollout, advantages, *args):
        seen.append(advantages.clone())
        return real(run, model, rollout, advantages, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdpo, "judge", judge)
        patch.setattr(gdpo, "accumulate_gradients", accumulated)
        gdpo.main(config)
    return [judged, seen]


@pytest.mark.parametrize("over", ["sequences", "tokens"])
def test_gdpo_advantages_are_those_of_the_batch_of_all_processes(tmp_path, base, over):
    fields = {
        "out_dir": str(tmp_path / "run"), "init_from": str(base), "steps": 2, "prompts_per_step": 4, "group_size": 4,
        "n_prompts": 16, "eval_prompts": 4, "max_new_tokens": 8, "eval_every": 100, "device": "cpu", "minibatches": 1,
        "epochs": 1, "batch_over": over,
    }  # fmt: skip
    zero, one = results(on_two_processes(tmp_path, gdpo_run, gdpo.Config(**fields)))
    assert len(zero[0]) == len(zero[1]) == 2
    for (r0, n0), (r1, n1), a0, a1 in zip(zero[0], one[0], zero[1], one[1]):
        table = torch.cat([torch.stack(list(r.values()), dim=1) for r in (r0, r1)])
        lengths = torch.cat([n0, n1]) if over == "tokens" else None
        expected = gdpo.gdpo_advantages(table, 4, lengths=lengths)
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(torch.cat([a0, a1]), expected)


def unequal_figures() -> dict:
    mine = [{"correct": 0.5, "length": 10.0, "answers": 8.0}, {"correct": 0.125, "length": 20.0, "answers": 24.0}]
    return mean_over_answers(mine[processes.rank()])


def test_logged_figures_are_means_over_all_answers(tmp_path):
    """4 right ones of 8 and 3 of 24 are 7 of 32, not the mean of a half and an eighth."""
    for found in results(on_two_processes(tmp_path, unequal_figures)):
        assert found == pytest.approx({"correct": 7 / 32, "length": 17.5, "answers": 32})


# ----------------------------------------------------------------------------------------------------------------------
# PPO on a given rollout


def ppo_gradients() -> dict:
    """Advantages and returns, the gradient of one update on them, and the figures of both."""
    policy, rollout = policy_and_rollout()
    model = ppo.ActorCritic(policy)
    torch.nn.init.normal_(model.value.weight, std=0.1)
    reference = Transformer(policy.config)  # other weights
    half = slice(6 * processes.rank(), 6 * processes.rank() + 12 // processes.world_size())
    mask = rollout.mask[half]
    width = int(mask.any(dim=0).nonzero().max()) + 1  # each process has its own longest answer
    mine = Rollout(
        rollout.tokens[half][:, : width + 1], mask[:, :width], rollout.sampled_logps[half][:, :width],
        rollout.texts[half], rollout.finished[half],
    )  # fmt: skip
    scores = REWARDS["both learn"][half]
    config = ppo.Config(temperature=0.7, max_new_tokens=14, micro_batch_size=4, whiten_rewards=True)
    batch = prepare(StubRun(), model, reference, mine, scores, 0.1, config)
    batch.logps += 0.3 * mask[:, :width] * ((batch.tokens[:, 1:] % 5) - 2)  # some ratios are clipped
    figures = ppo.accumulate_gradients(StubRun(), model, batch, torch.arange(len(mask)), config, first=False)
    processes.sum_gradients(model.parameters())
    return {
        "advantages": batch.advantages[batch.mask], "returns": batch.returns[batch.mask], "figures": figures,
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    }  # fmt: skip


def test_ppo_on_two_processes_has_the_gradient_of_the_whole_batch(tmp_path):
    whole = ppo_gradients()
    zero, one = results(on_two_processes(tmp_path, ppo_gradients))
    assert len(zero["advantages"]) != len(one["advantages"])
    for name in ("advantages", "returns"):  # whitened with the mean and deviation of all tokens
        torch.testing.assert_close(torch.cat([zero[name], one[name]]), whole[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(zero["gradient"], one["gradient"]) and whole["gradient"].abs().max() > 1e-4
    torch.testing.assert_close(zero["gradient"], whole["gradient"], rtol=1e-3, atol=1e-6)
    assert whole["figures"]["clip_fraction"] > 0
    for name, value in whole["figures"].items():
        assert zero["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def kto_kl() -> float:
    policy, _ = policy_and_rollout()
    judged = [Judged(({"role": "user", "content": "q" * i},), "ab" * (1 + i), i % 2 == 0) for i in range(6)]
    rows = encode_judged(judged, TOKENIZER, 64)
    ref = dpo.reference_logps(Transformer(policy.config), rows.mismatched, 6, show=False)  # other weights
    some = processes.my_share(list(range(6)))
    return float(kto.batch_kl(StubRun(), policy, rows, ref, some, size=2))


def test_kl_of_kto_is_that_of_the_whole_batch(tmp_path):
    whole = kto_kl()
    zero, one = results(on_two_processes(tmp_path, kto_kl))
    assert zero == one == pytest.approx(whole, rel=1e-5) and abs(whole) > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Whole stages


def tiny(stage: str, folder: Path, start: Path, **changes):
    if stage == "pretrain":
        small = {"steps": 3, "max_documents": 60, "vocab_size": 270, "eval_windows": 4}
        return tiny_pretrain(folder, **(small | changes))
    if stage == "sft":
        return tiny_sft(
            folder, start, **({"n_examples": 16, "epochs": 1.0, "packing": False, "batch_size": 4} | changes)
        )
    common = {"out_dir": str(folder), "init_from": str(start), "device": "cpu", "eval_every": 2, "save_every": 2}
    pairs = {
        "data": "arith",
        "n_pairs": 12,
        "epochs": 1.0,
        "batch_size": 4,
        "eval_pairs": 4,
        "max_length": 96,
        "log_every": 1,
    }
    if stage == "reward":
        return reward.Config(
            **(common | pairs | {"n_sums": 4, "normalize_on": 4, "max_new_tokens": 4, "warmup": 2} | changes)
        )
    if stage == "kto":
        return kto.Config(**(common | pairs | {"batch_size": 8, "eval_prompts": 4, "warmup": 1} | changes))
    if stage in ("dpo", "orpo"):
        return dpo.Config(**(common | pairs | {"method": stage, "eval_prompts": 4, "warmup": 1} | changes))
    if stage == "ppo":
        small = {
            "steps": 3, "prompts_per_step": 8, "n_prompts": 16, "eval_prompts": 4, "max_new_tokens": 6, "lr": 2e-3,
            "minibatches": 2, "unfinished_penalty": 0.5,
        }  # fmt: skip
        return ppo.Config(**(common | small | changes))
    small = {
        "out_dir": str(folder), "init_from": str(start), "steps": 3, "prompts_per_step": 4, "group_size": 4,
        "n_prompts": 16, "eval_prompts": 4, "max_new_tokens": 8, "eval_every": 2, "save_every": 2, "device": "cpu",
        "lr": 2e-3, "minibatches": 1, "epochs": 1,
    }  # fmt: skip
    return grpo.Config(**(small | changes))


def watched_run(stage: str, config, flat_from: int = 1000) -> dict:
    """Run a stage; in GRPO, from rollout ``flat_from`` on, the rewards within each group are equal. Returns the
    gradients of its updates, its last weights, the files that this process opened for writing, and of GRPO the
    rewards and advantages of each step."""
    seen = {"gradients": [], "written": [], "rewards": [], "advantages": []}
    clip, accumulate = torch.nn.utils.clip_grad_norm_, grpo.accumulate_gradients
    parameters: list = []
    watching = True

    def clipped(params, *args):  # called when the gradients of all processes have been summed
        parameters[:] = list(params)
        seen["gradients"].append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        return clip(params, *args)

    def scored(texts, golds, finished, *verifier):  # of an untrained policy, something that differs between answers
        rewards = torch.tensor([sum(map(ord, text)) % 7 / 2 for text in texts])
        if len(seen["rewards"]) >= flat_from:
            rewards = torch.arange(len(texts)).div(4, rounding_mode="floor") + 2.0 * processes.rank()
        seen["rewards"].append(rewards)
        return seen["rewards"][-1], torch.zeros(len(texts))

    def accumulated(run, model, rollout, advantages, *args):
        seen["advantages"].append(advantages.clone())
        return accumulate(run, model, rollout, advantages, *args)

    def audit(event, args):
        if watching and event in ("open", "os.rename", "os.mkdir"):
            writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and str(args[0]).startswith(config.out_dir):
                seen["written"].append(str(args[0]))

    sys.addaudithook(audit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
        patch.setattr(grpo, "score", scored)
        patch.setattr(ppo, "score", scored)
        patch.setattr(grpo, "accumulate_gradients", accumulated)
        patch.setattr(gdpo, "accumulate_gradients", accumulated)
        STAGES[stage].main(config)
    watching = False  # a hook stays for ever
    return seen | {"weights": torch.cat([p.detach().flatten() for p in parameters])}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain.main(tiny_pretrain(folder, steps=2, max_documents=60, vocab_size=270))
    return folder


@pytest.mark.parametrize(
    "stage", but_slow(("pretrain", "sft", "reward", "dpo", "kto", "orpo"), "pretrain", "sft", "kto")
)
@pytest.mark.parametrize("changes", but_slow(({}, {"micro_batch_size": 1}), {"micro_batch_size": 1}), ids=str)
def test_a_stage_on_two_processes_takes_the_steps_of_one(tmp_path, base, stage, changes):
    one = watched_run(stage, tiny(stage, tmp_path / "one", base, **changes))
    both = results(on_two_processes(tmp_path, watched_run, stage, tiny(stage, tmp_path / "two", base, **changes)))
    assert len(one["gradients"]) == len(both[0]["gradients"]) > 2
    torch.testing.assert_close(both[0]["gradients"][0], one["gradients"][0], rtol=1e-3, atol=1e-6)
    for a, b in zip(both[0]["gradients"], both[1]["gradients"]):
        assert torch.equal(a, b)
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_the_halves_of_the_sft_batches_above_count_unequally(base):
    config = tiny("sft", base, base)
    _, tokenizer, _ = load_stage(str(base))
    rows = pack(load_chats("arith", "train", "", 0, 16), tokenizer, config.seq_len, packing=False)
    counts = rows.batch(epoch_batch(len(rows), 4, 0, 0))[1].sum(dim=1)
    assert counts[:2].sum() != counts[2:].sum()  # else a mean of means would pass


@pytest.mark.parametrize("stage", but_slow(STAGES, "sft", "ppo", "grpo"))
def test_only_the_first_process_writes_and_both_have_the_same_weights(tmp_path, base, stage):
    folder = tmp_path / "run"
    both = on_two_processes(tmp_path, watched_run, stage, tiny(stage, folder, base))
    zero, one = results(both)
    assert zero["written"] and one["written"] == []
    assert "done" in both[0]["printed"] and both[1]["printed"] == ""
    assert torch.equal(zero["weights"], one["weights"])
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    assert saved["finished"] and not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row["step"] for row in rows if "grad_norm" in row]
    assert trained == list(range(1, saved["step"] + 1))
    sections = re.findall(r"=== step (\d+) ===", (folder / "samples.txt").read_text())
    assert len(sections) == len(set(sections)) > 0
    names = {"config.json", "metrics.jsonl", "ckpt.pt", "samples.txt", "curves.png"}
    names |= {"best.pt"} if stage != "reward" else set()  # there only the last checkpoint's scores are scaled
    names |= {"rollouts.jsonl"} if stage in ("dpo", "orpo", "kto", "ppo", "grpo") else set()
    assert {path.name for path in folder.iterdir()} - {"tokens.bin"} == names


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages_are_those_of_the_batch_of_all_processes(tmp_path, base, scale):
    config = tiny("grpo", tmp_path / "run", base, scale=scale, eval_every=100, steps=2)
    zero, one = results(on_two_processes(tmp_path, watched_run, "grpo", config))
    rewards = [pair for pair in zip(zero["rewards"], one["rewards"]) if len(pair[0]) == 8]
    assert len(rewards) == len(zero["advantages"]) == 2
    for (r0, r1), a0, a1 in zip(rewards, zero["advantages"], one["advantages"]):
        assert r0.std() > 0 and r1.std() > 0 and not torch.equal(r0, r1)
        torch.testing.assert_close(torch.cat([a0, a1]), group_advantages(torch.cat([r0, r1]), 4, scale))


def test_flat_groups_that_differ_from_each_other_move_nothing(tmp_path, base):
    """Rewards (0, 0, 0, 0) and (1, 1, 1, 1) differ, but no answer did better than its siblings: the gradient is zero,
    and the optimizer's momentum alone must not move the weights."""
    config = tiny("grpo", tmp_path / "run", base, eval_every=100, steps=2, save_every=1, keep_last=2, weight_decay=0.1)
    on_two_processes(tmp_path, watched_run, "grpo", config, 1)  # step 1 has rewards
    start, one, two = (
        torch.load(path, weights_only=True)["model"]
        for path in (base / "ckpt.pt", tmp_path / "run" / "ckpt_0000001.pt", tmp_path / "run" / "ckpt_0000002.pt")
    )
    assert not torch.equal(start["head.weight"], one["head.weight"])
    assert all(torch.equal(one[name], two[name]) for name in one)


def grpo_by_question(config) -> list:
    """A whole run in which a question's answers depend on nothing but the question and the step, whoever asks it.
    Returns the gradients of all updates."""
    real = grpo.sample_answers

    def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, seed):
        step = seed // 1_000 // config.draws
        seeds = [sum(i * token for i, token in enumerate(ids, start=1)) + step for ids in prompts]
        each = [
            real(model, tokenizer, [ids], group_size, max_new_tokens, temperature, seed)
            for ids, seed in zip(prompts, seeds)
        ]
        return join(each, tokenizer.pad_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "sample_answers", sample)
        return watched_run("grpo", config)["gradients"]


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.5, "kl": "k2"},
        {"loss_type": "grpo", "scale": "batch", "micro_batch_size": 3},
        pytest.param({"loss_type": "dr_grpo", "scale": "none", "ratio_level": "sequence"}, marks=pytest.mark.slow),
        {"loss_type": "cispo", "beta": 0.5, "kl_in": "reward", "micro_batch_size": 1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_two_updates_on_two_processes_are_those_of_one(tmp_path, base, changes):
    changes = changes | {"steps": 2, "epochs": 2, "eval_every": 100, "lr": 1e-3}
    one = grpo_by_question(tiny("grpo", tmp_path / "one", base, **changes))
    config = tiny("grpo", tmp_path / "two", base, **changes)
    zero, other = results(on_two_processes(tmp_path, grpo_by_question, config))
    assert len(one) == len(zero) == 4 and all(gradient.norm() > 1e-4 for gradient in one)
    for ours, theirs, both in zip(zero, other, one):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, both, rtol=2e-3, atol=2e-3 * float(both.abs().max()))


@pytest.mark.parametrize("flat_from", [1000, 1])
def test_minibatches_and_replaced_groups_on_two_processes(tmp_path, base, flat_from):
    """Each process refills its share in as many draws as it needs, and both take the same updates, flat ones too."""
    fields = {"steps": 2, "draws": 3, "minibatches": 2, "epochs": 2, "eval_every": 100, "save_every": 1}
    config = tiny("grpo", tmp_path / "run", base, **fields)
    zero, one = results(on_two_processes(tmp_path, watched_run, "grpo", config, flat_from))
    assert len(zero["advantages"]) == len(one["advantages"]) == 2 * 2 * 2
    assert torch.equal(zero["weights"], one["weights"])
    assert all(map(torch.equal, zero["gradients"], one["gradients"]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in trained] == [1, 2]
    if flat_from == 1:  # step 1 has rewards
        assert trained[-1]["flat_groups"] == 1 and trained[-1]["answers"] > 16
        assert trained[-1]["grad_norm"] == 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_that_of_the_whole_answer(tmp_path, base, monkeypatch, kl):
    """Of the policy as it is now, at the sampling temperature, summed over the answer's tokens."""
    seen, judged, started = [], [], {}
    judge, sample = grpo.judge, grpo.sample_answers
    reference = load_stage(str(base))[0]

    def sampled(model, *args):
        rollout = sample(model, *args)
        started["logps"] = token_logps(model, rollout.tokens, 0.7, where=rollout.mask).detach()
        return rollout

    def judged_by(rollout, golds, config):
        ref = token_logps(reference, rollout.tokens, 0.7, where=rollout.mask).detach()
        judged.append((grpo.kl_estimate(started["logps"], ref, kl) * rollout.mask).sum(dim=1))
        return judge(rollout, golds, config)

    monkeypatch.setattr(grpo, "sample_answers", sampled)
    monkeypatch.setattr(grpo, "judge", judged_by)
    length = lambda texts, *_: (torch.tensor([sum(map(ord, text)) % 7 / 2 for text in texts]), torch.zeros(len(texts)))  # noqa: E731
    monkeypatch.setattr(grpo, "score", length)  # of an untrained policy, something that differs between answers
    real = grpo.reward_signal
    monkeypatch.setattr(grpo, "reward_signal", lambda r, *args: seen.append(r["kl"]) or real(r, *args))
    config = tiny("grpo", tmp_path / "run", base, warmup=1, lr=5e-3, eval_every=100, beta=0.5, kl=kl, kl_in="reward")
    grpo.main(replace(config, temperature=0.7, scale="none"))
    assert len(seen) == len(judged) == 3
    for found, expected in zip(seen, judged):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert seen[-1].abs().max() > 0.05


def test_what_strays_from_the_reference_earns_less(tmp_path, base, monkeypatch):
    """In the reward of the first step the KL is zero, at the sampling temperature; later it only takes away."""
    scored, rewarded = [], []
    real = grpo.group_advantages

    def score(texts, golds, finished, verifier):
        scored.append(torch.tensor([sum(map(ord, text)) % 7 / 2 for text in texts]))
        return scored[-1], torch.zeros(len(texts))

    monkeypatch.setattr(grpo, "score", score)
    monkeypatch.setattr(
        grpo, "group_advantages", lambda rewards, *args: rewarded.append(rewards) or real(rewards, *args)
    )
    more = {"beta": 0.5, "kl": "k3", "kl_in": "reward", "temperature": 0.7, "correct_weight": 2.0}
    grpo.main(tiny("grpo", tmp_path / "run", base, warmup=1, lr=5e-3, eval_every=100, **more))
    changes = [given - 2.0 * plain for given, plain in zip(rewarded, scored)]
    assert len(changes) == 3
    torch.testing.assert_close(changes[0], torch.zeros(16), rtol=0, atol=1e-4)
    assert all((change < 1e-4).all() and change.min() < -1e-3 for change in changes[1:])


def start_with_odd_batch(stage: str, config) -> str:
    try:
        STAGES[stage].main(config)
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("stage", "field"), [("pretrain", "batch_size"), ("sft", "batch_size"), ("grpo", "prompts_per_step")]
)
def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(tmp_path, base, stage, field):
    config = replace(tiny(stage, tmp_path / "run", base), **{field: 3})
    for message in results(on_two_processes(tmp_path, start_with_odd_batch, stage, config)):
        assert message == f"{field} 3 cannot be shared evenly by 2 processes"
    assert not (tmp_path / "run").exists()


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SMALL = ["--d_model", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1", "--seq_len", "32"]
SMALL += ["--max_documents", "60", "--vocab_size", "270"]


def test_torchrun_starts_a_stage_unchanged(tmp_path):
    done = torchrun(
        "pretrain.py", "--out_dir", str(tmp_path / "run"), *SMALL, "--steps", "2", "--eval_windows", "4",
        "--batch_size", "4", "--device", "cpu", "--compile", "off",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain done") == 1 and "2 processes" in done.stdout
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 2


@pytest.mark.slow
def test_two_machines_give_what_one_gives(tmp_path):
    """Two agents of torchrun, here on one machine, that meet at an address; the folder is one that both can see."""
    small = [*SMALL, "--steps", "3", "--eval_windows", "4", "--batch_size", "4", "--device", "cpu", "--compile", "off"]
    one = torchrun("pretrain.py", "--out_dir", str(tmp_path / "one"), *small)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=0"]
    agents = [
        subprocess.Popen(
            [*agent, f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            + ["pretrain.py", "--out_dir", str(tmp_path / "two"), *small],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in agents]
    assert one.returncode == 0 and [process.returncode for process in agents] == [0, 0], said
    assert [out.count("pretrain done") for out, _ in said] == [1, 0]
    first, second = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


@pytest.mark.slow
def test_torchrun_starts_the_whole_chain_and_refuses_in_one_line(tmp_path):
    common = ["--device", "cpu", "--compile", "off", "--log_every", "1"]
    base = ["pretrain.py", "--out_dir", str(tmp_path / "a"), *SMALL, "--steps", "4", "--batch_size", "4", *common]
    fine = ["sft.py", "--out_dir", str(tmp_path / "b"), "--init_from", str(tmp_path / "a"), "--n_examples", "16"]
    last = ["grpo.py", "--out_dir", str(tmp_path / "c"), "--init_from", str(tmp_path / "b"), "--steps", "2"]
    last += ["--prompts_per_step", "4", "--group_size", "4", "--n_prompts", "8", "--eval_prompts", "4", *common[:2]]
    for command in (base, [*fine, "--epochs", "1", *common], last):
        done = torchrun(*command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" done: ") == 1
    refused = torchrun(*base[:2], str(tmp_path / "d"), *base[3:], "--batch_size", "3")
    assert refused.returncode != 0 and "error: batch_size 3 cannot be shared evenly by 2 processes" in refused.stderr


WAITING = """
import datetime, sys, time
from runtime import processes
processes.TIMEOUT = datetime.timedelta(seconds=2)
rank, *_ = processes.setup_processes("cpu")
if rank == 0:
    time.sleep(5)
processes.barrier(alone=sys.argv[1] == "alone")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "together"])
def test_who_waits_for_one_that_works_alone_waits_longer(how, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "waiting.py"), how]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode == 0) == (how == "alone"), done.stderr[-2000:]
