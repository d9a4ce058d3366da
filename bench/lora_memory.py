"""Peak memory of an update of all weights, of LoRA and of DoRA: SFT, and GRPO with a KL to the reference.

A model of 30 million parameters, few tokens, so that what is kept for each weight is most of the memory: the weight,
its gradient, Adam's two moments, and for GRPO's KL the reference, which is a second model, or the same one with its
adapters off. The stages' own code; two updates, because moments come with the first. A figure is how far the peak
resident memory of a process grew from before the model was made; beside it what gradients and moments hold, counted.

    python bench/lora_memory.py
    python bench/lora_memory.py --quick     # a quarter of the width
"""

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from logps_memory import peak  # noqa: E402

import grpo  # noqa: E402
import sft  # noqa: E402
from lora import adapters_off, add_lora, share_trained  # noqa: E402
from optim import make_optimizers, update  # noqa: E402
from rollout import Rollout  # noqa: E402
from runtime.run import start  # noqa: E402
from transformer import ModelConfig, Transformer, token_logps  # noqa: E402

V, T, PROMPT, N = 4096, 128, 64, 4
WAYS = {"all weights": {}, "LoRA, rank 8": {"dora": False}, "DoRA, rank 8": {"dora": True}}


def measure(stage: str, way: str, width: int) -> None:
    """Print the growth of the peak in MB, the MB of gradients and moments, and the share that learns."""
    torch.manual_seed(0)
    tokens = torch.randint(V, (N, T))
    mask = torch.arange(1, T).expand(N, -1) >= PROMPT
    config = grpo.Config(beta=0.04, minibatches=1, epochs=1, max_new_tokens=T - PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        run = start({"sft": sft, "grpo": grpo}[stage].Config(out_dir=folder, device="cpu"), stage)
        shape = ModelConfig(V, width, n_layers=8, n_heads=8, max_seq_len=T)
        make_optimizers(torch.nn.Linear(2, 2), 1e-3)  # PyTorch loads some of itself late
        before = peak()
        model = Transformer(shape)
        if WAYS[way]:
            add_lora(model, 8, 16.0, **WAYS[way])
        reference = None
        if stage == "grpo":
            reference = model if WAYS[way] else copy.deepcopy(model).requires_grad_(False)
        optimizers = make_optimizers(model, 1e-3)
        held = 0
        for _ in range(2):
            if stage == "sft":
                sft.sft_loss(token_logps(model, tokens, where=mask), mask).backward()
            else:
                sampled = torch.zeros(N, T - 1)
                rollout = Rollout(tokens, mask, sampled, [""] * N, torch.ones(N, dtype=torch.bool))
                with adapters_off(reference):
                    ref_logps = grpo.policy_logps(run, reference, rollout, config)
                advantages = torch.tensor([1.0, -1.0]).repeat(N // 2)
                old_logps = grpo.policy_logps(run, model, rollout, config)
                grpo.accumulate_gradients(run, model, rollout, advantages, config, old_logps, ref_logps)
            held = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
            update(run, model, optimizers, 1e-3, 1.0)
        moments = [x for o in optimizers for state in o.state.values() for x in state.values()]
        held += sum(x.numel() for x in moments if x.dim())
        print(peak() - before, held * 4e-6, share_trained(model).removeprefix("trained "), sep="|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=2, help="measure one stage and way in this process and print its numbers")
    options = parser.parse_args()
    if options.one:
        measure(*options.one, width=128 if options.quick else 512)
        sys.exit()
    print(f"torch {torch.__version__}, {N} rows of {T} tokens\n")
    heads = ("update", "what learns", "learns", "gradients and moments, MB", "peak, MB", "peak / that of all weights")
    print("| " + " | ".join(heads) + " |")
    print("| --- | --- | --- | --- | --- | --- |")
    quick = ["--quick"] if options.quick else []
    for stage in ("sft", "grpo"):
        whole = None
        for way in WAYS:
            command = [sys.executable, __file__, *quick, "--one", stage, way]
            grown, held, share = subprocess.check_output(command, text=True).strip().split("|")
            whole = whole or float(grown)
            name = {"sft": "SFT", "grpo": "GRPO with a KL"}[stage]
            print(
                f"| {name} | {way} | {share} | {float(held):,.1f} | {float(grown):,.0f} | {float(grown) / whole:.2f} |"
            )
