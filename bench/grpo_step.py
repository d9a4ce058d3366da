"""One step of GRPO, from prompts to changed weights: ours against TRL's ``GRPOTrainer``.

16 prompts of 32 tokens, 8 answers of 128 tokens to each, a reward (the share of even token ids), the log-probabilities
of a frozen reference (β = 0.04, k3), one update of AdamW; the same shapes on both sides, a vocabulary of 4,096, no
activation checkpointing; float32 on a CPU, bfloat16 autocast on a GPU. No answer can end early: the end-of-text is a
token that the models do not have. Both sides accumulate the gradient over micro-batches of the same size
(``--micro_batch``) and sample from the full distribution at temperature 1. Each has a process of its own, so that
neither runs with the other's settings, and they take turns, ours between two steps of theirs; a figure is the median
over the steps, the ratio the median of the ratios of neighbours, above 1 means that ours is faster. The first steps of
each are left out.

Ours runs as its stages do, with freed memory kept (runtime/device.py; set MALLOC_ARENA_MAX to switch that off); TRL
as it comes, where the KL is also multiplied by the ratio, which is 1 here.

    pip install -e ".[bench]"
    python bench/grpo_step.py
    python bench/grpo_step.py --quick     # 32 new tokens, few repeats
    python bench/grpo_step.py --device cuda --size 50M --micro_batch 128
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["HF_HUB_OFFLINE"] = "1"  # everything is made here

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from training_step import llama  # noqa: E402

import grpo  # noqa: E402
from optim import make_optimizers, update  # noqa: E402
from rollout import sample_answers  # noqa: E402
from runtime.run import start  # noqa: E402
from transformer import ModelConfig, Transformer, count_parameters  # noqa: E402

PROMPTS, GROUP, LENGTH, VOCABULARY = 16, 8, 32, 4096
SIZES = {
    "5M": ModelConfig(VOCABULARY, d_model=256, n_layers=4, n_heads=8, max_seq_len=256),
    "50M": ModelConfig(VOCABULARY, d_model=512, n_layers=14, n_heads=8, max_seq_len=512),
}
PARTS = ("rollout", "reward", "reference", "update")


def wait() -> None:
    """A GPU computes while Python goes on: a clock read without waiting would show the launches alone."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Adds up the seconds of each part of a step."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.inside = False

    def time(self, part: str, call):
        def timed(*args, **kwargs):
            if self.inside:  # a part within a part belongs to the outer one
                return call(*args, **kwargs)
            self.inside, begun = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                wait()
                self.inside = False
                self.seconds[part] += time.perf_counter() - begun

        return timed


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 4,096 words, whose end-of-text is one more token, which no model here can write."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)} | {"<end>": VOCABULARY}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="w1", unk_token="w0", padding_side="left"
    )


class Ours:
    def __init__(self, config: ModelConfig, new: int, micro_batch: int, folder: str, device: str):
        torch.manual_seed(0)
        self.config = grpo.Config(
            out_dir=folder, device=device, prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=new, beta=0.04,
            lr=1e-6, minibatches=1, micro_batch_size=micro_batch,
        )  # fmt: skip
        self.run = start(self.config, "grpo")
        self.model = Transformer(config).to(self.run.device)
        self.reference = Transformer(config).to(self.run.device).requires_grad_(False)
        self.optimizers = make_optimizers(self.model, self.config.lr, 0.0, self.config.beta2)
        self.n = 0

        class Tokenizer:
            eot_id, pad_id = VOCABULARY, 0

            def decode(self, ids):
                return " ".join(f"w{i}" for i in ids)

        self.tokenizer = Tokenizer()

    def step(self, prompts: list[list[int]]) -> dict:
        clock, begun = Clock(), time.perf_counter()
        with self.run.autocast(), self.run.eager():
            rollout = clock.time("rollout", sample_answers)(
                self.model, self.tokenizer, prompts, GROUP, self.config.max_new_tokens, 1.0, seed=self.n
            )
        assert int(rollout.mask.sum()) == PROMPTS * GROUP * self.config.max_new_tokens
        reward = lambda: torch.tensor([even(text) for text in rollout.texts])  # noqa: E731
        advantages = grpo.group_advantages(clock.time("reward", reward)().to(self.run.device), GROUP)
        ref = clock.time("reference", grpo.policy_logps)(self.run, self.reference, rollout, self.config, group=GROUP)

        def learn():
            old = grpo.policy_logps(self.run, self.model, rollout, self.config, group=GROUP)
            grpo.accumulate_gradients(self.run, self.model, rollout, advantages, self.config, old, ref)
            update(self.run, self.model, self.optimizers, self.config.lr, 1.0)

        clock.time("update", learn)()
        self.n += 1
        return clock.seconds | {"all": time.perf_counter() - begun}


def even(text: str) -> float:
    ids = [int(word[1:]) for word in text.split()]
    return sum(i % 2 == 0 for i in ids) / len(ids)


def serve(pipe, threads: int, *setting) -> None:
    """Our process: a step for each list of prompts that comes, until None does."""
    torch.set_num_threads(threads)
    ours = Ours(*setting)
    pipe.send(count_parameters(ours.model))
    while (prompts := pipe.recv()) is not None:
        pipe.send(ours.step(prompts))


def run(
    size: str, device: str, new: int, repeats: int, warm_up: int, micro_batch: int
) -> tuple[list[dict], list[dict]]:
    """Seconds by part of each step, of ours and of theirs."""
    config = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (PROMPTS, LENGTH), generator=generator).tolist()
    rows = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        ours, other_end = multiprocessing.get_context("spawn").Pipe()
        setting = (config, new, micro_batch, folder + "/ours", device)
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(other_end, torch.get_num_threads(), *setting), daemon=True
        )
        process.start()
        path = folder + "/llama"
        theirs = llama(config)
        parameters = ours.recv()
        assert parameters == count_parameters(theirs)
        theirs.config.eos_token_id = theirs.generation_config.eos_token_id = None
        theirs.save_pretrained(path)
        theirs_clock = Clock()

        def reward(completions, **_):
            return [even(text) for text in completions]

        settings = trl.GRPOConfig(
            output_dir=folder + "/theirs", use_cpu=device == "cpu", bf16=device != "cpu", gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch, num_generations=GROUP,
            gradient_accumulation_steps=PROMPTS * GROUP // micro_batch,
            max_completion_length=new, beta=0.04, learning_rate=1e-6, max_steps=warm_up + repeats, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        text = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in prompts]
        trainer = trl.GRPOTrainer(
            model=path, reward_funcs=reward, args=settings, processing_class=words(),
            train_dataset=datasets.Dataset.from_list(text * (warm_up + repeats)),
        )  # fmt: skip
        for part, name in {
            "rollout": "_generate", "reward": "_calculate_rewards", "reference": "_get_per_token_logps_and_entropies"
        }.items():  # fmt: skip
            setattr(trainer, name, theirs_clock.time(part, getattr(trainer, name)))
        loss_of = trainer._compute_loss

        def compute_loss(*args, **kwargs):  # in here the policy's log-probabilities are part of the update
            theirs_clock.inside, before = True, theirs_clock.inside
            try:
                return loss_of(*args, **kwargs)
            finally:
                theirs_clock.inside = before

        trainer._compute_loss = compute_loss
        loaded = [trainer.model.config.vocab_size, count_parameters(trainer.model)]
        assert loaded == [VOCABULARY, parameters]
        lengths = []
        trainer.add_callback(Turns(ours, prompts, theirs_clock, rows))
        score = trainer._calculate_rewards

        def lengths_seen(inputs, prompts, completions, completion_ids):
            lengths.extend(len(ids) for ids in completion_ids)
            return score(inputs, prompts, completions, completion_ids)

        trainer._calculate_rewards = lengths_seen
        trainer.train()
        ours.send(None)
        process.join(timeout=30)
        process.kill()  # a process with CUDA graphs may take its time to end
        assert set(lengths) == {new}, f"answers of TRL ended early: {sorted(set(lengths))}"
        assert len(lengths) == PROMPTS * GROUP * (warm_up + repeats)
    return rows["ours"][warm_up:], rows["theirs"][warm_up:]


class Turns(transformers.TrainerCallback):
    def __init__(self, ours: Connection, prompts: list, clock: Clock, rows: dict):
        self.ours, self.prompts, self.clock, self.rows = ours, prompts, clock, rows

    def on_step_begin(self, args, state, control, **kwargs):
        wait()
        self.clock.seconds, self.begun = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        total, seconds = time.perf_counter() - self.begun, self.clock.seconds
        seconds["update"] = total - sum(seconds.values())  # forward, loss, backward, optimizer, and all the rest
        self.rows["theirs"].append(seconds | {"all": total})
        self.ours.send(self.prompts)
        self.rows["ours"].append(self.ours.recv())
        theirs, ours = (self.rows[name][-1]["all"] for name in ("theirs", "ours"))
        print(f"step {len(self.rows['ours'])}: TRL {theirs:.2f} s, ours {ours:.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=None, help="steps (default 10; quick: 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", choices=SIZES, default="5M", help="parameters of the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro_batch", type=int, default=32, help="answers at a time in the update, on both sides")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    new, repeats = (32, options.repeats or 3) if options.quick else (128, options.repeats or 10)
    warm_up = 1 if options.quick else 2
    ours, theirs = run(options.size, options.device, new, repeats, warm_up, options.micro_batch)
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(
        f"{options.size}: {PROMPTS} × {GROUP} answers of {new} tokens, {options.micro_batch} at a time, "
        f"{repeats} steps, {place}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}\n"
    )
    print("| | seconds a step | " + " | ".join(PARTS) + " |\n" + "| --- " * (len(PARTS) + 2) + "|")
    for name, rows in (("TRL", theirs), ("ours", ours)):
        shares = [statistics.median(row[part] / row["all"] for row in rows) for part in PARTS]
        seconds = statistics.median(row["all"] for row in rows)
        print(f"| {name} | {seconds:.2f} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    ratios = [statistics.median(b[part] / a[part] for a, b in zip(ours, theirs)) for part in ("all", *PARTS)]
    print(f"| TRL / ours | {ratios[0]:.2f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios[1:]) + " |")
