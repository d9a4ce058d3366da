"""Pretraining: predict the next token.

Take a stretch of text, and at every position ask for the token that follows. The loss is the mean surprise, in nats::

    L = - 1/N  Σ log p(token t+1 | tokens ≤ t)

Nothing else happens in this stage, and everything the later ones shape comes from it. What is taught here and used by
all of them: a step with its accumulated gradients, and the validation loss as bits per byte, which unlike the loss does
not depend on the tokenizer. (The optimizer and the learning rate's schedule are those of ``optim.py``.)

    python pretrain.py                                            # the embedded task, two minutes on a laptop
    python pretrain.py configs/pretrain_tinystories_cpu.py --data_dir DIR
    python pretrain.py --optimizer adamw --lr 2e-3 --steps 2000
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
from torch import Tensor

from data import TokenFile, bits_per_byte, prepare_tokens, train_tokenizer
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
    parse,
    validate,
)
from runtime.errors import UserError, run_main
from runtime.run import Run, start
from tokenizer import Tokenizer, load_tokenizer
from transformer import Transformer, model_size, token_logps


@dataclass(frozen=True)
class Config(TrainConfig):
    data: str = "arith"
    """arith, tinystories, pile, books, or the path of a text file or of a folder with .txt files."""
    max_documents: CountOrNone = None
    """Read only so many documents of each split (None: all)."""
    tokenizer: Literal["bpe", "bytes", "r50k"] = "bpe"
    """bpe is trained on the data; r50k is GPT-2's."""
    vocab_size: int = 512
    """Of the BPE, special tokens included."""

    d_model: Count = 128
    """Width of the model."""
    n_layers: Count = 4
    """Blocks."""
    n_heads: Count = 4
    """Query heads."""
    n_kv_heads: Count = 2
    """Key/value heads, each shared by n_heads / n_kv_heads query heads."""
    d_ff: int | None = None
    """Width of the feed-forward layers (None: 4·d_model, or 2/3 of that for SwiGLU)."""
    max_seq_len: int = 256
    """The longest row that later stages may use."""
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    """How the model knows where a token stands."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """The normalisation before each half of a block."""
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """The feed-forward layer."""
    bias: bool = False
    """Biases in the linear layers."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    tie_embeddings: bool = False
    """One matrix for reading and for predicting tokens."""
    window: int | None = None
    """Sliding-window attention (None: full)."""
    sinks: int = 0
    """With a window: the first tokens that stay visible."""
    n_experts: CountOrZero = 0
    """More than 0: the feed-forward layers are mixtures of so many experts (moe.py)."""
    n_experts_per_token: int = 2
    """Experts that each token goes to."""
    n_shared_experts: CountOrZero = 0
    """Experts that every token goes to, besides."""
    d_expert: int | None = None
    """Width of an expert (None: a token's experts together are as wide as d_ff)."""
    expert_layers: tuple[int, ...] | None = None
    """Blocks with experts, counted from 0 (None: all); the others stay dense."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's scores are made."""
    balance: Literal["loss", "pooled", "bias", "none"] = "loss"
    """What keeps all experts at work: a loss for each layer (Switch), one for all layers together (as transformers has
    it for Mixtral), or a bias."""
    balance_weight: NotNegative = 0.01
    """Of the balancing loss, each layer's or the pooled one."""
    balance_rate: NotNegative = 1e-3
    """With --balance bias: what a step adds to the bias of an expert with too little to do."""
    z_weight: NotNegative = 1e-3
    """Of the router z-loss."""

    seq_len: Count = 128
    """Tokens of a training window."""
    batch_size: Count = 16
    """Windows of one step, over all processes."""
    steps: Count = 800
    """Updates."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: for the matrices inside the blocks; everything else stays with AdamW. adamw: for all."""
    lr: NotNegative = 4e-3
    """Peak learning rate. With adamw alone, half of this is a better start."""
    warmup: CountOrZero = 50
    weight_decay: NotNegative = 0.1
    beta2: Annotated[float, AtLeast(0, below=1)] = 0.95
    """AdamW's memory of squared gradients."""
    eval_every: Count = 200
    eval_windows: Count = 128
    """Windows of a validation, spread evenly over the split."""
    sample_prompt: str = "Tom has 4 apples. Mia gives Tom 3 more."
    """What the model continues at each validation."""


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def balancing(seen: dict[int, list[Tensor]], config: Config) -> Tensor:
    """What is added to the loss of a part of the batch so that its routers stay balanced and calm."""
    layers = [torch.cat(parts) for parts in seen.values()]  # (N, E) each
    extra = config.z_weight * router_z_loss(layers)
    counted_together = {"loss": layers, "pooled": [layers]}.get(config.balance, [])
    for logits in counted_together:  # of each layer, or all layers at once
        term = load_balancing_loss(logits, config.n_experts_per_token, score=config.router)
        extra = extra + config.balance_weight * term
    return extra


@torch.no_grad()
def validation_loss(run: Run, model: Transformer, file: TokenFile, windows: int, seq_len: int, batch: int) -> float:
    """Mean loss, in nats per token, over windows spread evenly over the validation split."""
    n = len(file.file["validation"]) - seq_len - 1
    if n < 0:
        raise UserError(f"the validation split is shorter than one window of {seq_len + 1} tokens")
    starts = torch.linspace(0, n, min(windows, n + 1), dtype=torch.float64).long().tolist()
    total = 0.0
    for first in range(0, len(starts), batch):
        tokens = file.windows("validation", starts[first : first + batch], seq_len + 1).to(run.device)
        with run.autocast():
            total -= float(token_logps(model, tokens).sum(dtype=torch.float64))
    return total / (len(starts) * seq_len)


def continuation(run: Run, model: Transformer, tokenizer: Tokenizer, prompt: str, n: int = 60) -> str:
    ids = (tokenizer.encode(prompt) or [tokenizer.eot_id])[-(model.config.max_seq_len // 2) :]
    n = min(n, model.config.max_seq_len - len(ids))
    with run.autocast():
        tokens, mask, _ = generate(model, [ids], n, temperature=0.8, eot_id=tokenizer.eot_id, seed=0)
    return prompt + tokenizer.decode(tokens[0][mask[0]].tolist())


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


def main(config: Config) -> dict:
    """Train, and return the last validation's figures. A finished run returns at once, an unfinished one continues."""
    check(config)
    run = start(config, "pretrain")

    # Data: a tokenizer, and a file of tokens made with it.
    if run.state is not None:
        tokenizer = load_tokenizer(run.state["tokenizer"])
    else:
        tokenizer = train_tokenizer(
            config.tokenizer, config.vocab_size, config.data, config.data_dir, config.seed, config.max_documents
        )
    path = run.folder / "tokens.h5"
    if run.is_main:
        prepare_tokens(path, tokenizer, config.data, config.data_dir, config.seed, config.max_documents)
    processes.barrier()
    file = TokenFile(path)

    # Model and optimizer.
    torch.manual_seed(config.seed)
    model = Transformer(model_config(config, tokenizer.vocab_size)).to(run.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.lr, config.weight_decay, config.beta2, config.optimizer)
    first = run.resume(model, optimizers)
    tokens_per_step = config.batch_size * config.seq_len

    def evaluate(step: int) -> dict:
        with run.eager():
            loss = validation_loss(run, model, file, config.eval_windows, config.seq_len, config.batch_size)
            text = continuation(run, model, tokenizer, config.sample_prompt)
        bpb = bits_per_byte(loss, file.bytes_per_token["validation"])
        run.sample(step, text)
        return {"val_loss": loss, "bits_per_byte": bpb}

    if not run.finished:
        how = run.maybe_compile(model, config.steps, tokens_per_step)
        run.banner(
            model_size(model, config.seq_len), config.steps, tokens_per_step, how,
            data=f"{config.data}: {len(file):,} tokens, {file.bytes_per_token['train']:.2f} bytes each",
        )  # fmt: skip
    for step in run.steps(first, config.steps):
        # Each step's windows depend on the seed and the step alone: a resumed run sees what it would have seen.
        windows = file.random_windows("train", config.batch_size, config.seq_len + 1, (config.seed, step))
        windows = processes.my_share(windows).to(run.device)  # (B, T+1)
        loss, loads, routing = torch.zeros((), device=run.device), 0, {}
        for tokens in windows.split(config.micro_batch_size or len(windows)):
            with run.autocast(), watch_routers(model) as seen:
                logps = token_logps(model, tokens)  # (b, T)
            part = -logps.sum() / tokens_per_step  # over the whole batch, so that parts add up to its mean
            loss += part.detach()
            if config.n_experts:
                part = part + balancing(seen, config) * len(tokens) / config.batch_size
                loads = loads + expert_loads(model, seen)
            run.scaler.scale(part).backward()
        if config.n_experts:
            loads = processes.sum_over_processes(loads)
            if config.balance == "bias":
                move_balance_bias(model, loads, config.balance_rate)
            if run.logs(step):
                routing = router_statistics(loads, seen)
        lr = learning_rate(step, config.steps, config.lr, config.warmup, config.final_lr)
        norm = update(run, model, optimizers, lr, config.clip)
        loss = processes.sum_over_processes(loss)
        run.log(step, tokens=tokens_per_step, show=("loss",), loss=loss, grad_norm=norm, lr=lr, **routing)

        figures = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            figures = evaluate(step + 1)
            run.evaluation(step + 1, **figures)
        if figures or run.should_save(step, config.steps):
            run.save(step, config.steps, model, optimizers, tokenizer, metric=figures.get("val_loss"))
    with run.eager():
        loss = validation_loss(run, model, file, config.eval_windows, config.seq_len, config.batch_size)
    file.close()
    figures = {"val_loss": loss, "bits_per_byte": bits_per_byte(loss, file.bytes_per_token["validation"])}
    hint = f"python sft.py --task {config.task} --init_from {run.folder}"
    run.close(f"{figures['bits_per_byte']:.3f} bits per byte", next_command=hint)
    return figures


if __name__ == "__main__":
    run_main(lambda: main(parse(Config)))
