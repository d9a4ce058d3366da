"""Pretraining: predict the next token.

Take a stretch of text, and at every position ask for the token that follows. The loss is the mean surprise, in nats::

    L = - 1/N  Σ log p(token t+1 | tokens ≤ t)

Nothing else happens in this stage, and everything the later ones shape comes from it. What is taught here and used by
all of them: a step with its accumulated gradients, and the validation loss as bits per byte, which unlike the loss does
not depend on the tokenizer. (The optimizer and the learning rate's schedule are those of ``optim.py``.)

What to watch, and what it should look like:

* ``loss``: at first about ln(vocabulary size), the surprise of guessing; a fast fall while the model learns which
  tokens are frequent, then a slow one. A jump that does not come back: lower --lr, or raise --warmup.
* ``val_loss`` and ``bits_per_byte``: down with it. While they are, more --steps help; a gap to ``loss`` that grows
  means that the text is being learned by heart.
* ``grad_norm``: highest in the first steps, then steady, mostly below the norm at which it is cut.
* ``samples.txt``: first frequent words, then grammar, then sense.

    python pretrain.py                                            # the embedded task, two minutes on a laptop
    python pretrain.py configs/pretrain_tinystories_cpu.py --data_dir DIR
    python pretrain.py --optimizer adamw --lr 2e-3 --steps 2000
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
from torch import Tensor

from data import TokenFile, bits_per_byte, parts_of, prepare_tokens, train_tokenizer
from generate import generate
from layers import ModelConfig
from moe import (
    expert_loads,
    load_balancing_loss,
    move_balance_bias,
    router_statistics,
    router_z_loss,
    watch_routers,
)
from optim import learning_rate, make_optimizers, update
from runtime import processes
from runtime.config import (
    AtLeast,
    Count,
    CountOrNone,
    CountOrZero,
    NotNegative,
    TrainConfig,
    check_shared,
    run_stage,
    validate,
)
from runtime.errors import UserError
from runtime.rows import held_out
from runtime.run import Run, start
from texts import CHATS
from tokenizer import Tokenizer, load_tokenizer
from transformer import Transformer, model_size, token_logps


@dataclass(frozen=True)
class Config(TrainConfig):
    data: str = "arith"
    """The text: arith, tinystories, pile, books, a text file or a folder with .txt files, or rows with a "text": a file
    (.jsonl) or a dataset of the hub (org/name); several joined by +."""
    max_documents: CountOrNone = None
    """Read at most this many documents of each split (None: all)."""
    tokenizer: Literal["bpe", "bytes", "r50k"] = "bpe"
    """The tokenizer: bpe is trained on the data, r50k is GPT-2's."""
    vocab_size: Count = 512
    """The vocabulary of the BPE, special tokens included."""

    d_model: Count = 128
    """The width of the model."""
    n_layers: Count = 4
    """The number of blocks."""
    n_heads: Count = 4
    """The number of query heads."""
    n_kv_heads: Count = 2
    """The number of key/value heads, each shared by n_heads / n_kv_heads query heads."""
    d_ff: CountOrNone = None
    """The width of the feed-forward layers (None: 4·d_model, or 2/3 of that for SwiGLU)."""
    max_seq_len: Count = 256
    """The longest row that later stages may use."""
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    """How the model knows where a token stands."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """The normalisation before each half of a block."""
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """The feed-forward layer."""
    bias: bool = False
    """Whether the linear layers have biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    tie_embeddings: bool = False
    """Whether one matrix both reads and predicts tokens."""
    window: CountOrNone = None
    """The width of sliding-window attention (None: full attention)."""
    sinks: CountOrZero = 0
    """With a window: how many of the first tokens stay visible."""
    n_experts: CountOrZero = 0
    """The number of experts of each feed-forward layer (moe.py; 0: a dense layer)."""
    n_experts_per_token: Count = 2
    """The number of experts that each token goes to."""
    n_shared_experts: CountOrZero = 0
    """The number of experts that every token goes to, besides."""
    d_expert: CountOrNone = None
    """The width of an expert (None: a token's experts together are as wide as d_ff)."""
    expert_layers: tuple[int, ...] | None = None
    """The blocks with experts, counted from 0 (None: all); the others stay dense."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's scores are made."""
    balance: Literal["loss", "pooled", "bias", "none"] = "loss"
    """What keeps all experts at work: a loss for each layer (Switch), one for all layers together (as transformers has
    it for Mixtral), or a bias."""
    balance_weight: NotNegative = 0.01
    """The weight of the balancing loss, each layer's or the pooled one."""
    balance_rate: NotNegative = 1e-3
    """With --balance bias: what a step adds to the bias of an expert with too little to do."""
    z_weight: NotNegative = 1e-3
    """The weight of the router z-loss."""

    seq_len: Count = 128
    """The tokens of a training window."""
    batch_size: Count = 16
    """The windows of one step, over all processes."""
    steps: Count = 800
    """Training steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """The optimizer. muon: of the matrices inside the blocks; everything else stays with AdamW. adamw: of all."""
    lr: NotNegative = 4e-3
    """Peak learning rate. With adamw alone, half of this is a better start."""
    warmup: CountOrZero = 50
    weight_decay: NotNegative = 0.1
    beta2: Annotated[float, AtLeast(0, below=1)] = 0.95
    """AdamW's memory of squared gradients, β2."""
    eval_every: Count = 200
    eval_windows: Count = 128
    """The windows of a validation, spread evenly over the split."""
    sample_prompt: str = ""
    """What the model continues in samples.txt. Default: the beginning of the validation text."""


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def balancing(routers: dict[int, list[Tensor]], config: Config) -> Tensor | float:
    """What a mixture of experts adds to the loss of a part of the batch, so that its routers stay balanced and calm."""
    if not routers:
        return 0.0
    layers = [torch.cat(parts) for parts in routers.values()]  # (N, E) each
    extra = config.z_weight * router_z_loss(layers)
    counted_together = {"loss": layers, "pooled": [layers]}.get(config.balance, [])
    for logits in counted_together:  # of each layer, or all layers at once
        term = load_balancing_loss(logits, config.n_experts_per_token, score=config.router)
        extra = extra + config.balance_weight * term
    return extra


@torch.no_grad()
def validation(run: Run, model: Transformer, file: TokenFile, config: Config) -> dict:
    """Mean loss, in nats per token, over windows spread evenly over the validation split, and bits per byte."""
    n = len(file.splits["validation"]) - config.seq_len - 1
    starts = torch.linspace(0, n, min(config.eval_windows, n + 1), dtype=torch.float64).long().tolist()
    total = 0.0
    for part in parts_of(starts, config.batch_size):
        tokens = file.windows("validation", part, config.seq_len + 1).to(run.device)
        with run.autocast(), run.eager():
            total -= float(token_logps(model, tokens).cpu().sum(dtype=torch.float64))
    loss = total / (len(starts) * config.seq_len)
    return {"val_loss": loss, "bits_per_byte": bits_per_byte(loss, file.bytes_per_token["validation"])}


def continuation(run: Run, model: Transformer, tokenizer: Tokenizer, prompt: str, n: int = 60) -> str:
    """How the model goes on after ``prompt``, sampled."""
    ids = (tokenizer.encode(prompt) or [tokenizer.document_id])[-(model.config.max_seq_len // 2) :]
    n = min(n, model.config.max_seq_len - len(ids))
    with run.autocast(), run.eager():
        tokens, mask, _ = generate(model, [ids], n, temperature=0.8, eot_id=tokenizer.document_id, seed=0)
    return prompt + tokenizer.decode(tokens[0][mask[0]].tolist())


def beginning(file: TokenFile, tokenizer: Tokenizer, n: int = 12) -> str:
    """The first words of the first validation document."""
    ids = file.windows("validation", [0], n)[0].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.document_id)] if tokenizer.document_id in ids else ids)


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    validate(config)
    if config.seq_len > config.max_seq_len:
        raise UserError(f"seq_len {config.seq_len} is longer than max_seq_len {config.max_seq_len}")
    if config.seq_len == config.max_seq_len and config.positions != "rope":  # a window has a last token to predict
        raise UserError(
            f"max_seq_len {config.max_seq_len} must be above seq_len: {config.positions} positions end there"
        )
    if config.tokenizer == "r50k" and config.vocab_size not in (512, 50304):
        raise UserError("vocab_size belongs to --tokenizer bpe; r50k has 50,304")
    try:
        model_config(config, config.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_shared("batch_size", config.batch_size)


def model_config(config: Config, vocab_size: int) -> ModelConfig:
    names = {field.name for field in fields(ModelConfig)} & {field.name for field in fields(Config)} - {"vocab_size"}
    return ModelConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})


def tokens_of(run: Run, config: Config) -> tuple[Tokenizer, TokenFile]:
    """A tokenizer, and the data as tokens in a file of the run's folder; both are made once."""
    data = config.data, config.data_dir, config.seed, config.max_documents, config.columns
    if run.state is not None:
        tokenizer = load_tokenizer(run.state["tokenizer"])
    else:
        tokenizer = train_tokenizer(config.tokenizer, config.vocab_size, *data)
    if run.is_main:
        prepare_tokens(run.folder / "tokens.bin", tokenizer, *data, held_out=held_out(config))
    processes.barrier(alone=True)
    file = TokenFile(run.folder / "tokens.bin")
    for split, tokens in file.splits.items():
        if len(tokens) <= config.seq_len:
            raise UserError(
                f"the {split} split has {len(tokens):,} tokens, fewer than one window of {config.seq_len + 1}: "
                "give more text, or a shorter --seq_len"
            )
    return tokenizer, file


def announce(run: Run, model: Transformer, config: Config, file: TokenFile) -> None:
    """Compile the model if that pays, and say what the run will do."""
    tokens_per_step = config.batch_size * config.seq_len
    how = run.maybe_compile(model, config.steps, tokens_per_step)
    data = f"{config.data}: {len(file):,} tokens, {file.bytes_per_token['train']:.2f} bytes each"
    run.banner(model_size(model, config.seq_len), config.steps, tokens_per_step, how, data=data)


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    check(config)
    run = start(config, "pretrain")
    tokenizer, file = tokens_of(run, config)

    torch.manual_seed(config.seed)
    model = Transformer(model_config(config, tokenizer.vocab_size)).to(run.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay, config.beta2, config.optimizer)
    first = run.resume(model, optimizers)
    if not run.finished:
        announce(run, model, config, file)

    tokens_per_step = config.batch_size * config.seq_len
    for step in run.steps(first, config.steps):
        # The windows of a step depend on the seed and the step alone: a resumed run sees what it would have seen.
        starts = file.random_starts("train", config.batch_size, config.seq_len + 1, (config.seed, step))
        windows = file.windows("train", processes.my_share(starts), config.seq_len + 1).to(run.device)  # (B, T+1)
        loss, loads = torch.zeros((), device=run.device), 0
        for tokens in parts_of(windows, config.micro_batch_size):
            with run.autocast(), watch_routers(model) as routers:
                logps = token_logps(model, tokens)  # (b, T): log p(token t+1 | tokens ≤ t)
            part_loss = -logps.sum() / tokens_per_step  # divided by the whole batch, so that parts add up to its mean
            loss += part_loss.detach()
            part_loss = part_loss + balancing(routers, config) * len(tokens) / config.batch_size
            run.scaler.scale(part_loss).backward()
            loads = loads + expert_loads(model, routers) if config.n_experts else loads
        if config.n_experts:
            loads = processes.sum_over_processes(loads)  # tokens of each expert, in the whole batch
            if config.balance == "bias":
                move_balance_bias(model, loads, config.balance_rate)
        lr = learning_rate(step, config.steps, config.lr, config.warmup, config.final_lr)
        grad_norm = update(run, model, optimizers, lr, config.max_grad_norm)

        routing = router_statistics(loads, routers) if config.n_experts and run.logs(step) else {}
        figures = {"loss": processes.sum_over_processes(loss), "grad_norm": grad_norm, "lr": lr} | routing
        run.log(step, tokens_per_step, show=("loss",), **figures)
        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            figures = validation(run, model, file, config)
            prompt = config.sample_prompt or beginning(file, tokenizer)
            run.sample(step + 1, continuation(run, model, tokenizer, prompt))
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, config.steps):
            run.save(step, config.steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))

    figures = validation(run, model, file, config)
    file.close()
    chats = config.data if config.data in CHATS or config.data == "arith" else "CHATS.jsonl"
    hint = f"python sft.py --task {config.task} --data {chats} --init_from {run.folder}"
    run.close(f"{figures['bits_per_byte']:.3f} bits per byte", next_command=hint)
    return figures


if __name__ == "__main__":
    run_stage(main, Config)
