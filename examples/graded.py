"""Rewards on unequal scales: how near the number is, from -3 to 3, beside the form, 0 or 1 (as a tool call is graded in
the GDPO paper, section 4.1). ``correct`` is there to be seen, with a weight of 0. See docs/experiments/gdpo.md.

    python gdpo.py --reward examples/graded.py --reward_weights correct=0 formatted=1 graded=1
"""

import re

from verify import correctness_reward, format_reward


def correct(prompt, answer, row):
    """Right, in the strict form?"""
    return correctness_reward(answer, row["answer"]) * row["finished"]


def formatted(prompt, answer, row):
    """In the strict form, whatever the number?"""
    return format_reward(answer) * row["finished"]


def graded(prompt, answer, row):
    """3 for the right number, one less for every one that the last number is away from it, -3 at least."""
    numbers = re.findall(r"-?\d+", answer)
    return 3.0 - min(6, abs(int(numbers[-1]) - int(row["answer"]))) if numbers else -3.0
