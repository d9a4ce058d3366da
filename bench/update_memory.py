"""Peak memory of one update of DPO and of PPO: the stages' own code against one that holds all logits.

A model of 25 million parameters at a vocabulary of 50,304. DPO: 8 pairs of 512 tokens, policy and reference. PPO: 16
answers of 384 tokens after a prompt of 128, policy, values and reference. The naive way computes the logits of all
positions at once and takes their log-softmax in float32, with gradient for the policy. Each figure is how far the
peak resident memory of a process grew beyond what it was with the models, the data and a warm-up update already
there. For comparison: one float32 tensor of all the logits of the batch.

    python bench/update_memory.py
    python bench/update_memory.py --quick    # a quarter of the rows
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from logps_memory import naive_logps, peak  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
from preferences import PairRows  # noqa: E402
from rollout import Rollout  # noqa: E402
from runtime.run import start  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters, token_logps  # noqa: E402

V, T, PROMPT = 50304, 512, 128
SHAPE = ModelConfig(vocab_size=V, d_model=224, n_layers=4, n_heads=7, max_seq_len=T)
ROWS = {"dpo": 8, "ppo": 16}  # pairs, answers


def dpo_update(run, n: int, naive: bool):
    policy, reference = Transformer(SHAPE), Transformer(SHAPE).requires_grad_(False)
    prompts = torch.randint(V, (n, PROMPT)).tolist()
    answers = torch.randint(V, (2 * n, T - PROMPT)).tolist()
    rows = PairRows(prompts, answers[:n], answers[n:], [], 0)
    config = dataclasses.replace(dpo.Config(), beta=0.1)

    def update(some):
        if naive:
            tokens, mask, _ = rows.batch(some)
            with torch.no_grad():
                ref = (naive_logps(reference, tokens) * mask).sum(1)
            ours = (naive_logps(policy, tokens) * mask).sum(1)
            loss = dpo.dpo_loss(*ours.chunk(2), *ref.chunk(2))
        else:
            ref = torch.zeros(2, n)
            ref[:, some] = dpo.reference_logps(
                reference, lambda i, device: rows.batch([some[j] for j in i], device), len(some), show=False
            ).view(2, -1)
            tokens, mask, _ = rows.batch(some)
            logps = token_logps(policy, tokens, where=mask)
            loss = dpo.pair_loss(config, logps, mask, ref[:, some], None)
        loss.backward()
        policy.zero_grad()

    return update, list(range(n)), [0]


def ppo_update(run, n: int, naive: bool):
    policy, reference = ppo.ActorCritic(Transformer(SHAPE)), Transformer(SHAPE).requires_grad_(False)
    tokens = torch.randint(V, (n, T))
    mask = torch.arange(1, T).expand(n, -1) >= PROMPT
    config = ppo.Config(minibatches=1, epochs=1)

    def update(some):
        some = torch.tensor(some)
        if naive:
            with torch.no_grad():
                old, ref = (naive_logps(m, tokens[some]) for m in (policy.backbone, reference))
            hidden = policy.backbone.forward_hidden(tokens[some])
            logps = policy.backbone.head(hidden)[:, :-1].float().log_softmax(-1)
            logps = logps.gather(-1, tokens[some, 1:, None]).squeeze(-1)
            rewards = ppo.token_rewards(torch.ones(len(some)), old, ref, mask[some], 0.1)
            advantages, _ = ppo.gae(rewards, torch.zeros_like(old), mask[some])
            ppo.ppo_policy_loss(logps, old, advantages, mask[some]).backward()
        else:
            with torch.no_grad():
                sampled = token_logps(policy.backbone, tokens[some], where=mask[some])
            rollout = Rollout(tokens[some], mask[some], sampled, [], torch.ones(len(some), dtype=torch.bool))
            old, values = ppo.policy_and_values(run, policy, rollout, config)
            ref = ppo.policy_logps(run, reference, rollout, config)
            rewards = ppo.token_rewards(torch.ones(len(some)), old, ref, rollout.mask, 0.1)
            advantages, returns = ppo.gae(rewards, values, rollout.mask, config.gamma, config.lam)
            batch = ppo.Batch(rollout.tokens, rollout.mask, old, values, advantages, returns)
            ppo.accumulate_gradients(run, policy, batch, torch.arange(len(some)), config, first=True)
        policy.zero_grad()

    return update, list(range(n)), [0]


def growth(stage: str, naive: bool, n: int) -> float:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = start({"dpo": dpo, "ppo": ppo}[stage].Config(out_dir=folder, device="cpu"), stage)
        update, rows, one = {"dpo": dpo_update, "ppo": ppo_update}[stage](run, n, naive)
        update(one)
        before = peak()
        update(rows)
    return peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=2, help="measure one stage and way in this process and print its number")
    options = parser.parse_args()
    rows = {stage: n // 4 if options.quick else n for stage, n in ROWS.items()}
    if options.one:
        stage, way = options.one
        print(growth(stage, way == "naive", rows[stage]))
        sys.exit()
    print(f"{count_parameters(Transformer(SHAPE)) / 1e6:.1f} M parameters, {V:,} words, torch {torch.__version__}\n")
    print("| update | all logits once, MB | naive, MB | ours, MB | ours / naive |\n| --- | --- | --- | --- | --- |")
    for stage, n in rows.items():
        quick = ["--quick"] if options.quick else []
        naive, ours = (
            float(subprocess.check_output([sys.executable, __file__, *quick, "--one", stage, way]))
            for way in ("naive", "ours")
        )
        once = (2 * n if stage == "dpo" else n) * T * V * 4 / 1e6
        print(f"| {stage} | {once:,.0f} | {naive:,.0f} | {ours:,.0f} | {ours / naive:.2f} |")
