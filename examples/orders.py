"""Data of your own, made up: a shop's orders, to be written as JSON. See docs/yours.md.

    python examples/orders.py orders/        # writes text/, chats.jsonl, pairs.jsonl, questions.jsonl, held_out.jsonl

The chats were written by somebody in a hurry: seven in ten of the answers are not JSON, or say something else. That is
what a reward can mend.
"""

import json
import random
import sys
from pathlib import Path

NAMES = ["Tom", "Mia", "Ben", "Ana", "Sam", "Eva", "Max", "Lily"]
THINGS = ["apples", "pears", "plums", "nuts", "eggs", "pens", "cards", "keys"]


def order(rng: random.Random) -> tuple[str, dict[str, int]]:
    """What somebody says, and what is meant."""
    wanted = {thing: rng.randint(2, 9) for thing in rng.sample(THINGS, rng.randint(1, 2))}
    return f"{rng.choice(NAMES)} wants " + " and ".join(f"{n} {thing}" for thing, n in wanted.items()) + ".", wanted


def careless(rng: random.Random, wanted: dict[str, int]) -> str:
    """The order as JSON, with a mistake."""
    thing = rng.choice(list(wanted))
    if rng.random() < 0.9:
        return str(wanted)  # Python's quotes are not JSON's
    return rng.choice((json.dumps(wanted)[:-1], json.dumps(wanted | {thing: wanted[thing] % 8 + 2})))


def main(folder: Path, seed: int = 0) -> None:
    rng = random.Random(seed)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    pairs, lines = [order(rng) for _ in range(16_000)], []
    for said, wanted in pairs:
        lines.append(f"{said} In short: {json.dumps(wanted)}")
    (folder / "text" / "shop.txt").write_text("\n".join(lines))

    def write(name: str, n: int, row) -> None:
        rows = [row(*order(rng)) for _ in range(n)]
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))

    write("chats.jsonl", 400, lambda said, wanted: {
        "prompt": said, "completion": careless(rng, wanted) if rng.random() < 0.7 else json.dumps(wanted)
    })  # fmt: skip
    write("pairs.jsonl", 400, lambda said, wanted: {
        "prompt": said, "chosen": json.dumps(wanted), "rejected": careless(rng, wanted)
    })  # fmt: skip
    for name, n in (("questions.jsonl", 1000), ("held_out.jsonl", 200)):
        write(name, n, lambda said, wanted: {"prompt": said, "order": wanted})
    print(f"{folder}: text/, chats.jsonl, pairs.jsonl, questions.jsonl, held_out.jsonl; next: docs/yours.md")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python examples/orders.py FOLDER")
    main(Path(sys.argv[1]))
