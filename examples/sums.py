"""Sums for a published model that can nearly do them: ``python examples/sums.py sums/``.

Two worked sums, as turns of a conversation, and a third to answer, with numbers of 2 to 19. A quarter of the sums is
held out: whichever examples stand before them, the policy never learns on them.
"""

import itertools
import json
import random
import sys
from pathlib import Path

LEAST, MOST = 2, 19


def is_held_out(a: int, b: int) -> bool:
    """A quarter of the sums, b + a together with a + b."""
    return random.Random(f"{min(a, b)}+{max(a, b)}").random() < 0.25


def ask(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def questions(held_out: bool, examples: int, seed: int) -> list[dict]:
    """Every sum of one side, each after that many different pairs of examples, which are sums to learn on."""
    draw = random.Random(seed)
    sums = list(itertools.product(range(LEAST, MOST + 1), repeat=2))
    shown = [one for one in sums if not is_held_out(*one)]
    rows = []
    for a, b in [one for one in sums if is_held_out(*one) == held_out] * examples:
        before = draw.sample([one for one in shown if one not in ((a, b), (b, a))], 2)
        messages = [{"role": "system", "content": "You add numbers. Answer with the number alone."}]
        for c, d in before:
            messages += [{"role": "user", "content": ask(c, d)}, {"role": "assistant", "content": str(c + d)}]
        rows.append({"messages": [*messages, {"role": "user", "content": ask(a, b)}], "answer": a + b})
    draw.shuffle(rows)
    return rows


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "sums")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": questions(False, 8, seed=0), "held_out": questions(True, 6, seed=1)}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} questions")
