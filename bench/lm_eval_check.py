"""An independent check of evaluate.py: the same questions, asked and judged by lm-eval.

lm-eval (EleutherAI's harness) gets the model through the adapter below, reads a local task of two files, and counts
the exact matches itself. The accuracy must be evaluate.py's: the prompts are the same ids, the answers greedy, and an
answer is right if it is the number and nothing else.

    pip install lm-eval==0.4.13
    python examples/sums.py sums/
    python bench/lm_eval_check.py out/smollm2/start --data sums/held_out.jsonl --n 64
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1])]  # behind lm-eval, which imports another module of the name evaluate

from data import encode_prompts  # noqa: E402
from generate import generate  # noqa: E402
from rollout import sample_answers  # noqa: E402
from stages import load_stage  # noqa: E402
from texts import load_prompts  # noqa: E402
from tokenizer import Tokenizer, encode_chat  # noqa: E402
from transformer import Transformer, token_logps  # noqa: E402

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [], max_gen_toks: {new}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Adapter(TemplateLM):
    """A run for lm-eval. A question comes as the JSON of its messages, so that the model's own template lays it out."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot_id

    def tok_encode(self, string: str, **_) -> list[int]:
        return self.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            tokens = torch.tensor([[*(context or [self.tokenizer.document_id]), *continuation]])
            logps = token_logps(self.model, tokens)[0, -len(continuation) :]
            best = self.model(tokens)[0, -len(continuation) - 1 : -1].argmax(dim=-1)
            found.append((float(logps.sum()), bool((best == tokens[0, -len(continuation) :]).all())))
        return found

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return [self._loglikelihood_tokens([(None, [], ids)])[0][0] for ids in texts]

    def generate_until(self, requests, **_) -> list[str]:
        answers = []
        for request in requests:
            text, how = request.args
            ids = encode_chat(self.tokenizer, json.loads(text), add_generation_prompt=True)[0]
            new, mask, _ = generate(
                self.model, [ids], how["max_gen_toks"], temperature=0, eot_id=self.tokenizer.end_ids
            )
            said = [i for i in new[0][mask[0]].tolist() if i not in self.tokenizer.end_ids]
            answers.append(self.tokenizer.decode(said).strip())
        return answers


def theirs(model: Transformer, tokenizer: Tokenizer, prompts: list, new: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        rows = [{"prompt": json.dumps(list(one.messages)), "target": str(one.gold)} for one in prompts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(folder) / "sums.yaml").write_text(TASK.format(name="sums", file=file, new=new))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        found = simple_evaluate(Adapter(model, tokenizer), tasks=["sums"], task_manager=tasks, bootstrap_iters=0)
    return float(found["results"]["sums"]["exact_match,none"])


def ours(model: Transformer, tokenizer: Tokenizer, prompts: list, new: int) -> float:
    """As evaluate.py asks: all questions in one left-padded batch."""
    ids, prompts = encode_prompts(prompts, tokenizer, model.config.max_seq_len - new)
    rollout = sample_answers(model, tokenizer, ids, 1, new, 0.0, seed=0)
    return sum(text.strip() == str(one.gold) for text, one in zip(rollout.texts, prompts)) / len(prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="sums/held_out.jsonl")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=6)
    options = parser.parse_args()
    model, tokenizer, _ = load_stage(options.run)
    prompts = load_prompts(options.data, "whole", n=options.n)
    here = ours(model, tokenizer, prompts, options.max_new_tokens)
    there = theirs(model, tokenizer, prompts, options.max_new_tokens)
    print(
        f"{len(prompts)} questions: ours {here:.4f}, lm-eval {there:.4f}: {'equal' if here == there else 'DIFFERENT'}"
    )
    sys.exit(here != there)
