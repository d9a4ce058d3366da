"""What the metrics are called in words: the one place from which pictures and tables of runs take them.

[docs/metrics.md](docs/metrics.md) explains each; a test holds that all its names stand here.
"""

import difflib
import re
from collections.abc import Iterable

from runtime.errors import UserError

WORDS: dict[str, tuple[str, str]] = {  # name: (words, unit); a pure number, or a unit that differs by stage, has none
    "step": ("step", ""),
    "time": ("time since the start", "seconds"),
    "loss": ("training loss", ""),
    "grad_norm": ("gradient norm before clipping", ""),
    "lr": ("learning rate", ""),
    "tokens_per_second": ("speed", "tokens a second"),
    "mfu": ("model FLOPs utilisation", "share of the peak"),
    "val_loss": ("validation loss", "nats"),
    "bits_per_byte": ("bits per byte of held-out text", ""),
    "perplexity": ("perplexity of held-out text", ""),
    "val_token_accuracy": ("held-out tokens predicted", "share of tokens"),
    "share_learned": ("tokens that count in the loss", "share of tokens"),
    "busiest": ("load of the busiest expert", "times an even share"),
    "idlest": ("load of the idlest expert", "times an even share"),
    "router_entropy": ("entropy of the router", "nats"),
    "accuracy": ("accuracy", "share"),
    "val_accuracy": ("held-out accuracy", "share"),
    "margin": ("margin between chosen and rejected", "reward"),
    "val_margin": ("held-out margin", "reward"),
    "val_calibration_error": ("calibration error", "share"),
    "reward_chosen": ("reward of the chosen answers", "reward"),
    "reward_rejected": ("reward of the rejected answers", "reward"),
    "logp_chosen": ("log-probability of the chosen answers", "nats"),
    "logp_rejected": ("log-probability of the rejected answers", "nats"),
    "kl": ("estimated KL to the reference", "nats"),
    "val_questions": ("greedy accuracy on held-out questions", "share"),
    "reward": ("mean reward", "reward"),
    "val_reward": ("reward of greedy answers, held out", "reward"),
    "val_score": ("score of greedy answers, held out", "reward"),
    "score": ("mean score", "reward"),
    "correct": ("right answers among the sampled", "share"),
    "formatted": ("answers in the right form", "share"),
    "short": ("short answers", "share"),
    "integer": ("answers that are integers", "share"),
    "overlong": ("penalty for length", "reward"),
    "answers": ("answers sampled", "a step"),
    "finished": ("answers that ended by themselves", "share"),
    "truncated": ("answers that were cut off", "share"),
    "length": ("length of an answer", "tokens"),
    "entropy": ("entropy of the policy", "nats a token"),
    "flat_groups": ("flat groups", "share"),
    "distinct_advantages": ("reward vectors kept apart", "share"),
    "sampler_gap": ("log-probability gap to the sampler", "nats"),
    "kl_old": ("KL to the policy that sampled", "nats a token"),
    "kl_ref": ("KL to the reference", "nats"),
    "clip_fraction": ("tokens held back by the clip", "share of tokens"),
    "policy_loss": ("policy loss", ""),
    "value_loss": ("value loss", ""),
    "value_clip_fraction": ("values outside the clip", "share of tokens"),
    "explained_variance": ("variance explained by the critic", "share"),
    "first_ratio_gap": ("distance of the first ratios from 1", ""),
    "beta": ("cost of the KL, β", "reward a nat"),
    "rollout_share": ("time spent on sampling", "share of the step"),
    "loss@position": ("validation loss", "nats"),  # the curves that studies/probe.py finds
    "start_gradient@layer": ("gradient norm before training", ""),
    "end_gradient@layer": ("gradient norm after training", ""),
}  # fmt: skip


def words_of(name: str) -> tuple[str, str]:
    """A metric's words and unit; of a curve NAME@x, NAME's; of an unknown one, its name with spaces.

    >>> words_of("val_loss"), words_of("val_reward_chosen"), words_of("load_2_0"), words_of("my_own")
    (('validation loss', 'nats'), ('reward of the chosen answers, held out', 'reward'), \
('load of expert 0 in block 2', 'share of tokens'), ('my own', ''))
    """
    if name in WORDS:
        return WORDS[name]
    if (plain := name.partition("@")[0]) in WORDS:
        return WORDS[plain]
    if (plain := name.removeprefix("val_")) in WORDS:
        return f"{WORDS[plain][0]}, held out", WORDS[plain][1]
    if load := re.fullmatch(r"load_(\d+)_(\d+)", name):
        return f"load of expert {load[2]} in block {load[1]}", "share of tokens"
    plain = name.removeprefix("val_").replace("_", " ")
    return plain + (", held out" if name.startswith("val_") else ""), ""


def label_of(name: str) -> str:
    """Words and unit, as they stand on an axis.

    >>> label_of("length"), label_of("grad_norm")
    ('length of an answer (tokens)', 'gradient norm before clipping')
    """
    words, unit = words_of(name)
    return f"{words} ({unit})" if unit else words


def check_names(wanted: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not among the known ones, in one line with the nearest that is."""
    known = list(known)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? There are " if near else "there are "
            raise UserError(f"{where} no curve {name!r}; {hint}{', '.join(sorted(known)) or 'none'}")
