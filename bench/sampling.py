"""Tokens per second of batched sampling: ``generate`` against the ``generate`` of transformers.

64 prompts of 64 tokens, 128 new tokens each at temperature 1, from a model of 5 million parameters with random weights
and a vocabulary of 4,096, in float32; neither side can stop early. Ours also returns the log-probability of each token,
theirs does not. The two take turns inside one process; the ratio is the median of the ratios of neighbouring calls, and
above 1 means that ours is faster. The first call of each is left out.

    pip install -e ".[bench]"
    python bench/sampling.py
    python bench/sampling.py --quick     # 32 new tokens, few repeats
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import transformers  # noqa: E402
from training_step import llama, ratio, take_turns  # noqa: E402

from generate import generate  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default 8; quick: 3)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 8)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    rows, length, new = 64, 64, 32 if options.quick else 128
    config = ModelConfig(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, max_seq_len=256)
    ours, theirs = Transformer(config).eval(), llama(config).eval()
    assert count_parameters(ours) == count_parameters(theirs)
    prompts = torch.randint(config.vocab_size, (rows, length))
    never = config.vocab_size  # an end-of-text that no row can draw

    def sample_ours():
        tokens, mask, _ = generate(ours, prompts.tolist(), new, temperature=1.0, eot_id=never)
        assert tokens.shape == (rows, new) and mask.all()

    def sample_theirs():
        tokens = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            use_cache=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens.shape == (rows, length + new)

    calls = {"ours": sample_ours, "theirs": sample_theirs}
    take_turns(calls, 1)
    seconds = take_turns(calls, repeats)
    print(
        f"{count_parameters(ours) / 1e6:.1f} M parameters, {rows} × ({length} + {new}) tokens, {repeats} repeats, "
        f"{options.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    speed = {name: rows * new / statistics.median(times) for name, times in seconds.items()}
    print("| | tokens per second | ours / theirs |\n| --- | --- | --- |")
    print(f"| theirs | {speed['theirs']:,.0f} | |")
    print(f"| ours | {speed['ours']:,.0f} | {ratio(seconds['theirs'], seconds['ours']):.2f} |")
