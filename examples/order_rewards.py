"""Rewards of your own: every function is one, called with the question, the answer, and the question's row."""

import json


def valid(prompt, answer, row):
    """Is it JSON?"""
    try:
        return float(isinstance(json.loads(answer), dict))
    except ValueError:
        return 0.0


def right(prompt, answer, row):
    """Does it say what was ordered?"""
    return float(valid(prompt, answer, row) and json.loads(answer) == row["order"])
