"""The mistakes of the field, each as a patch of a few lines to this book. See museum.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exhibit:
    """One mistake: what is written instead of what."""

    name: str
    title: str
    file: str
    old: str
    """The lines that it replaces; they stand exactly once in the file."""
    new: str
    tests: str
    """The file of tests that must turn red."""
    why: str
    """What goes wrong, in words."""
    run: str = ""
    """The stage and settings whose curve shows it, or "" if there is none to show."""
    seen: str = ""
    """Where such a thing is or was to be found."""


RUN = "grpo steps=45"
HALF_MINUTE = "ppo steps=30"
KL = "grpo steps=45 beta=0.1"

EXHIBITS = [
    # ------------------------------------------------------------------------------------------------------------------
    # The KL
    Exhibit(
        "k3_flipped",
        "k3 with the log-ratio's sign flipped",
        "grpo.py",
        "        return torch.expm1(-d) + d\n",
        "        return torch.expm1(d) - d\n",
        "tests/test_grpo.py",
        "It is still never negative and still 0 where the two agree, so it looks right. But on the policy's own samples "
        "its mean is not the KL, and it grows without bound where the policy has become surer than the reference.",
        KL,
        seen="the appendix of hands-on-modern-rl had it until June 2026 ([hands-on-modern-rl#27](https://github.com/walkinglabs/hands-on-modern-rl/issues/27)).",
    ),
    Exhibit(
        "k1_as_loss",
        "k1 as the KL term of the loss",
        "grpo.py",
        "        return torch.expm1(-d) + d\n",
        "        return d\n",
        "tests/test_grpo.py",
        "Its mean is the KL, and its expected gradient is zero: the term is logged, weighed, and pulls nowhere. What is "
        "left is noise.",
        KL,
        seen="open-instruct's GRPO in January 2025 ([open-instruct#534](https://github.com/allenai/open-instruct/issues/534)); as an option in several libraries.",
    ),
    Exhibit(
        "kl_rewarded",
        "the KL added to the reward instead of subtracted",
        "grpo.py",
        '"kl": -config.beta}',
        '"kl": config.beta}',
        "tests/test_grpo.py",
        "The policy is paid for leaving the reference.",
        KL + " kl_in=reward kl=k1",
        seen="of the same sign: verl's KL loss was maximised until early 2025, as a project that had copied it found ([Logic-RL#58](https://github.com/Unakar/Logic-RL/issues/58)).",
    ),
    Exhibit(
        "kl_to_old",
        "the KL to the policy that sampled, not to the reference",
        "grpo.py",
        "        ref = ref_logps[rows, :width] if in_loss else None\n",
        "        ref = old if in_loss else None\n",
        "tests/test_grpo.py",
        "A leash that is tied to the dog: it slows each step and forbids nothing in the long run. The KL that is logged "
        "stays small while the policy walks away.",
        KL,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The clip
    Exhibit(
        "clip_max",
        "max instead of min in the clipped objective",
        "grpo.py",
        "-torch.minimum(ratio * weight, clipped * weight)",
        "-torch.maximum(ratio * weight, clipped * weight)",
        "tests/test_grpo.py",
        "The better of the two values is taken: a ratio that has gone too far in the right direction is pushed on, and "
        "one that has gone wrong is forgiven.",
        RUN,
    ),
    Exhibit(
        "clip_alone",
        "the clip without the min",
        "grpo.py",
        "-torch.minimum(ratio * weight, clipped * weight)",
        "-(clipped * weight)",
        "tests/test_grpo.py",
        "A token whose ratio left the range in the wrong direction has no gradient any more, so nothing brings it back.",
        RUN,
    ),
    Exhibit(
        "exp_of_probabilities",
        "probabilities taken for log-probabilities",
        "grpo.py",
        "    log_ratio = logps - old_logps.detach()\n",
        "    log_ratio = logps.exp() - old_logps.detach().exp()\n",
        "tests/test_grpo.py",
        "The ratio is 1 at the first update, as it should be, and afterwards always near it: no clip ever acts, and rare "
        "tokens get next to no gradient.",
        RUN,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Sampling
    Exhibit(
        "temperature_forgotten",
        "the temperature in sampling, but not in training",
        "grpo.py",
        "mask, config.temperature)\n        beta, length",
        "mask)\n        beta, length",
        "tests/test_grpo.py",
        "The policy that trains is not the policy that sampled: at the first update the ratios are not 1.",
        RUN + " temperature=1.5",
        seen="TRL's GRPO until March 2025 ([trl#3029](https://github.com/huggingface/trl/pull/3029)), NeMo RL until May 2025 ([RL#316](https://github.com/NVIDIA-NeMo/RL/pull/316)).",
    ),
    Exhibit(
        "top_p_in_training",
        "answers for training sampled with top-p",
        "grpo.py",
        "G, config.max_new_tokens, config.temperature, seed)\n            rollouts",
        "G, config.max_new_tokens, config.temperature, seed, top_p=0.9)\n            rollouts",
        "tests/test_grpo.py",
        "The unlikely tokens never come, so they are never unlearned, and no answer is found that they would begin.",
        RUN,
        "Common as a default of generation settings that are passed on to training.",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Masks
    Exhibit(
        "no_stop_token",
        "the token that stops left out of the loss",
        "tokenizer.py",
        "        mask += [0] + [speaks] * len(body)\n",
        "        mask += [0] + [speaks] * (len(body) - 1) + [0]\n",
        "tests/test_tokenizer.py",
        "The model never learns to end. It answers, and then goes on until it is cut off.",
        "sft",
        seen="the usual consequence of masking every token that equals the padding where pad = eos: TRL's GKD and GOLD until July 2026 ([trl#6357](https://github.com/huggingface/trl/pull/6357)), Megatron Bridge ([Megatron-Bridge#4660](https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/4660)).",
    ),
    Exhibit(
        "prompt_in_loss",
        "the prompt in the loss of fine-tuning",
        "sft.py",
        "            mask = mask[:, 1:]  # (b, T-1): is token t+1 one to learn?\n",
        "            mask = torch.ones_like(mask[:, 1:])\n",
        "tests/test_sft.py",
        "Most of the gradient goes into predicting questions. It is no error of mathematics, and nothing looks wrong.",
        "sft",
    ),
    Exhibit(
        "mask_shifted",
        "the loss mask off by one",
        "sft.py",
        "            mask = mask[:, 1:]  # (b, T-1): is token t+1 one to learn?\n",
        "            mask = mask[:, :-1]\n",
        "tests/test_sft.py",
        "The first token of the answer is not learned, and what follows its end is.",
        "sft",
        seen="NeMo's datasets for fine-tuning in 2023 ([Speech#6409](https://github.com/NVIDIA-NeMo/Speech/pull/6409)), NeMo Automodel in 2025 ([Automodel#272](https://github.com/NVIDIA-NeMo/Automodel/pull/272)).",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Reductions
    Exhibit(
        "mean_of_means",
        "the mean of micro-batch means",
        "grpo.py",
        "config.ratio_level, length, config.kl, config.kl_times_ratio, normalizer,",
        "config.ratio_level, length, config.kl, config.kl_times_ratio, None,",
        "tests/test_grpo.py",
        "Every micro-batch weighs the same, however many tokens it has, and the whole gradient grows with their number.",
        RUN + " micro_batch_size=8",
        "transformers until its version 4.46 averaged the means of accumulated batches of unequal length.",
    ),
    Exhibit(
        "dr_grpo_by_length",
        "Dr. GRPO divided by the actual length",
        "grpo.py",
        "        per_token = per_token / max_length\n",
        "        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)\n",
        "tests/test_grpo.py",
        "It is GRPO's mean over each answer again: long wrong answers are punished less for every token.",
        RUN + " loss_type=dr_grpo scale=none",
        seen="TRL 0.16 divided by the tokens that there were, until Dr. GRPO's constant came as a choice of its own ([trl#3138](https://github.com/huggingface/trl/pull/3138), [trl#3256](https://github.com/huggingface/trl/pull/3256)).",
    ),
    Exhibit(
        "dpo_averaged",
        "DPO with means instead of sums",
        "dpo.py",
        "        return dpo_loss(chosen, rejected, *ref, beta, config.label_smoothing)\n",
        "        return dpo_loss(chosen_avg, rejected_avg, *(ref / lengths.view(2, b)), beta, config.label_smoothing)\n",
        "tests/test_dpo.py",
        "The implicit reward shrinks by the length, so the same β is a leash many times as long.",
        "dpo",
    ),
    Exhibit(
        "simpo_summed",
        "SimPO with sums instead of means",
        "dpo.py",
        "        return simpo_loss(chosen_avg, rejected_avg, beta, config.gamma)\n",
        "        return simpo_loss(chosen, rejected, beta, config.gamma)\n",
        "tests/test_dpo.py",
        "What SimPO is about is gone: the longer answer loses by its length alone.",
        "dpo method=simpo",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Advantages
    Exhibit(
        "std_of_population",
        "the population's std for the sample's",
        "grpo.py",
        "(known.sum(dim=1, keepdim=True) - 1).clamp(min=1)",
        "known.sum(dim=1, keepdim=True).clamp(min=1)",
        "tests/test_grpo.py",
        "In groups of four all advantages are larger by √(4/3). Adam divides by it again.",
        RUN,
        "numpy's std has ddof = 0 by default, torch's 1.",
    ),
    Exhibit(
        "flat_groups_divided",
        "no guard where all rewards of a group are equal",
        "grpo.py",
        "        centered = centered / (_nanstd(groups) + eps)  # (P, G) / (P, 1)\n",
        "        return (centered / _nanstd(groups)).flatten()\n",
        "tests/test_grpo.py",
        "0 / 0 is NaN, and one flat group makes a NaN of every weight.",
        RUN,
    ),
    Exhibit(
        "groups_interleaved",
        "groups read interleaved",
        "grpo.py",
        "    groups = rewards.detach().view(-1, group_size)  # (P, G)\n",
        "    groups = rewards.detach().view(group_size, -1).T  # (P, G)\n",
        "tests/test_grpo.py",
        "The answers to one prompt stand side by side, but are compared with answers to other prompts: the group's mean "
        "says nothing about the difficulty of its question, and the advantages come back in the wrong order.",
        RUN,
        seen="R1-V's GRPO with more than one prompt on a device ([R1-V#67](https://github.com/StarsfieldAI/R1-V/issues/67)).",
    ),
    Exhibit(
        "batch_std",
        "the std of the batch for the std of the group",
        "grpo.py",
        "        centered = centered / (_nanstd(groups) + eps)  # (P, G) / (P, 1)\n",
        "        centered = centered / (_nanstd(groups.reshape(1, -1)) + eps)\n",
        "tests/test_grpo.py",
        "Groups that hardly differ weigh little, and groups that are undecided much: another weighting of the questions, "
        "and no worse here.",
        RUN,
        seen="grpo-flat, with the mean of the batch as well, until April 2025 ([grpo-flat#2](https://github.com/XU-YIJIE/grpo-flat/issues/2)).",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Several rewards
    Exhibit(
        "gdpo_sums_first",
        "GDPO that adds the rewards before it normalises",
        "gdpo.py",
        '    each = [group_advantages(rewards[:, k], group_size, "group", eps) for k in range(rewards.shape[1])]\n'
        "    return torch.stack(each, dim=1) @ weights.to(rewards)\n",
        '    return group_advantages(rewards @ weights.to(rewards), group_size, "group", eps)\n',
        "tests/test_gdpo.py",
        "It is GRPO on a sum, which GDPO was made to replace.",
        "gdpo steps=45",
    ),
    Exhibit(
        "gdpo_weights_first",
        "GDPO's weights before the normalisation",
        "gdpo.py",
        '    each = [group_advantages(rewards[:, k], group_size, "group", eps) for k in range(rewards.shape[1])]\n'
        "    return torch.stack(each, dim=1) @ weights.to(rewards)\n",
        '    each = [group_advantages(w * rewards[:, k], group_size, "group", eps) for k, w in enumerate(weights)]\n'
        "    return torch.stack(each, dim=1).sum(dim=1)\n",
        "tests/test_gdpo.py",
        "The division takes every positive weight out again: whatever one writes, all rewards weigh the same.",
        "gdpo steps=45 length_weight=0.1",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # KTO and ORPO
    Exhibit(
        "kto_matched",
        "KTO's reference point from matched pairs",
        "preferences.py",
        "[self.answers[i - 1] for i in rows]",
        "[self.answers[i] for i in rows]",
        "tests/test_dpo.py",
        "The KL is measured on the very answers that are being learned: it grows with what is liked, and takes the gain "
        "away again.",
        "kto",
        seen="of a part: TRL reversed a batch's answers, which leaves the middle one of an odd batch with its own question ([trl#1911](https://github.com/huggingface/trl/issues/1911)).",
    ),
    Exhibit(
        "kto_unclamped",
        "KTO's reference point below zero",
        "kto.py",
        "    kl = kl.detach().clamp(min=0)\n",
        "    kl = kl.detach()\n",
        "tests/test_dpo.py",
        "A KL is never negative, its estimate is. Unclamped, noise moves the point from which gains are counted.",
        "kto",
    ),
    Exhibit(
        "orpo_overflow",
        "log(1 - exp(x)) as it stands",
        "dpo.py",
        "    x = x.clamp(max=-torch.finfo(x.dtype).tiny)\n",
        "    return torch.log(1 - x.exp())\n",
        "tests/test_dpo.py",
        "Where the policy is sure of an answer, 1 - e^x is 0 in float32, its logarithm -inf, and the gradient NaN.",
        "dpo method=orpo",
        seen="TRL, as log1p(-exp(x)), until it took another form ([trl#3237](https://github.com/huggingface/trl/issues/3237)); ColossalAI adds 1.0001 instead ([ColossalAI#6407](https://github.com/hpcaitech/ColossalAI/pull/6407)).",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # PPO
    Exhibit(
        "bootstrap_past_the_end",
        "a value after the last token",
        "ppo.py",
        "        following = (delta + gamma * lam * following) * mask[:, t]\n        following_value = values[:, t]\n",
        "        following = delta + gamma * lam * following\n        following_value = values[:, max(t, 1) - 1]\n",
        "tests/test_ppo.py",
        "What the critic says of padding, or of the wrong token, flows back into the advantages of the answer.",
        HALF_MINUTE,
        seen="ROLL's GAE took the critic's value at a masked position for the next one ([ROLL#447](https://github.com/alibaba/ROLL/pull/447)).",
    ),
    Exhibit(
        "padding_whitened",
        "padding in the mean and the variance of the advantages",
        "ppo.py",
        "    mask = mask.to(x.dtype)\n    n = processes",
        "    kept, mask = mask, torch.ones_like(x)\n    n = processes",
        "tests/test_ppo.py",
        "The zeros of the padding pull the mean to 0 and shrink the variance: advantages depend on how long the longest "
        "answer of the batch is.",
        HALF_MINUTE,
        seen="SkyRL in March 2026: the mean over all positions, the variance over those that count ([SkyRL#1305](https://github.com/NovaSky-AI/SkyRL/issues/1305)).",
    ),
    Exhibit(
        "score_on_padding",
        "the score on the last column",
        "ppo.py",
        "    last = (column * mask.bool()).amax(dim=1)  # (B,): never a padded column\n",
        "    last = torch.full((len(mask),), mask.shape[1] - 1, device=mask.device)\n",
        "tests/test_ppo.py",
        "Only the longest answer of a batch ever sees its reward.",
        HALF_MINUTE,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The reward model
    Exhibit(
        "pooled_at_the_end",
        "the score read at position -1",
        "reward.py",
        "        return self.at_every_token(tokens, mask).gather(1, last_real(mask)[:, None])[:, 0]\n",
        "        return self.at_every_token(tokens, mask)[:, -1]\n",
        "tests/test_reward.py",
        "Padding is scored instead of the answer, for all but the longest of a batch.",
        "",
        "transformers' models for sequence classification look for the rightmost token that is not the padding's id, "
        "which fails where an answer ends with it.",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The model
    Exhibit(
        "scaled_by_the_model",
        "1/√d_model instead of 1/√d_head",
        "attention.py",
        "    return F.scaled_dot_product_attention(\n        q, k, v, attn_mask=mask,",
        "    return F.scaled_dot_product_attention(\n        q / q.shape[1] ** 0.5, k, v, attn_mask=mask,",
        "tests/test_attention.py",
        "The scores are smaller by the root of the number of heads. A model that is trained so learns all the same; one "
        "that is loaded is broken.",
        "pretrain steps=300",
    ),
    Exhibit(
        "groups_tiled",
        "key/value heads repeated 0, 1, 0, 1",
        "attention.py",
        "    k = k.repeat_interleave(repeats, dim=1)  # (B, H, Tk, d): heads 0,0,1,1 and not 0,1,0,1\n",
        "    k = k.repeat(1, repeats, 1, 1)\n",
        "tests/test_attention.py",
        "Query heads read the wrong keys. Trained so, nobody notices; with weights of others it is rubbish.",
        "",
    ),
    Exhibit(
        "window_one_too_wide",
        "a window of W + 1",
        "attention.py",
        "((distance < window) |",
        "((distance <= window) |",
        "tests/test_attention.py",
        "Sources count differently: here and in transformers a window of W holds the query itself.",
        "",
        "The FlexAttention tutorial's mask has W + 1 keys; flash-attn counts the keys besides the query, so transformers "
        "passes W - 1.",
    ),
    Exhibit(
        "tied_copied",
        "a tied head that is a copy",
        "transformer.py",
        "            self.head.weight = self.embed.weight  # the same Parameter, not a copy: gradients of both uses add\n",
        "            self.head.weight.data.copy_(self.embed.weight.data)\n",
        "tests/test_transformer.py",
        "Equal at the start and never again: each is trained by half of the gradient.",
        "pretrain steps=300 tie_embeddings=True",
    ),
    Exhibit(
        "first_choice_counted",
        "only the first of k experts counted",
        "moe.py",
        "    counts = F.one_hot(chosen, E).sum(dim=1).to(p.dtype)  # (N, E)\n",
        "    counts = F.one_hot(chosen[:, 0], E).to(p.dtype)  # (N, E)\n",
        "tests/test_moe.py",
        "The loss balances first choices, and the second may all go to one expert.",
        "",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The verifier
    Exhibit(
        "empty_thinking",
        "answers without a thought accepted",
        "verify.py",
        'return None if shape is None or not shape["thinking"].strip() else shape["answer"]',
        'return None if shape is None else shape["answer"]',
        "tests/test_verify.py",
        "An empty pair of tags is the shortest way to the reward for form.",
        "",
        seen="a form that is paid for whatever is in it: Soup's built-in format reward ([Soup#814](https://github.com/MakazhanAlpamys/Soup/issues/814)).",
    ),
    Exhibit(
        "cut_off_accepted",
        "answers that were cut off are judged",
        "rollout.py",
        "        correct = [correctness_reward(text, gold) * ok for text, gold, ok in zip(texts, golds, done)]\n",
        "        correct = [correctness_reward(text, gold) for text, gold, ok in zip(texts, golds, done)]\n",
        "tests/test_verify.py",
        "An answer that never ends is right as soon as its first part is.",
        RUN,
    ),
]
