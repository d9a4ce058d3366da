"""Every chapter runs, explains its fields, and imports only what a reader has read before."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from runtime.config import parse, read_preset
from transformer import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
ORDER = [
    "tokenizer", "attention", "layers", "moe", "transformer", "lora", "stages", "generate", "engine", "arithmetic",
    "verify", "texts", "data", "optim", "pretrain", "encoder", "sft", "rollout", "watch", "preferences", "reward",
    "dpo", "kto", "ppo", "grpo", "gdpo", "families", "templates", "pretrained", "evaluate", "chat", "pipeline",
]  # fmt: skip
STUDIES = [
    "probe", "intervals", "pages", "ablate", "combine", "structure", "card", "sharpen", "overoptimise", "entropy",
    "spurious", "critic", "displacement", "rank", "exhibits", "museum",
]  # fmt: skip
PATHS = {name: f"{name}.py" for name in ORDER} | {name: f"studies/{name}.py" for name in STUDIES}
CHAPTERS = list(PATHS)
STAGES = [name for name in CHAPTERS if hasattr(importlib.import_module(name), "Config")]
PARTS = ["pages", "card", "exhibits"]  # of studies: nothing to run by themselves
CONCEPTS = [name for name in CHAPTERS if name not in STAGES + PARTS]
PRESETS = sorted((ROOT / "configs").glob("*.py"))


LAUNCHER = """
import contextlib, json, os, runpy, sys, traceback
import datasets, matplotlib, numpy, regex, tiktoken, torch, tqdm, tyro  # once for all scripts

for name, command in json.load(sys.stdin).items():
    if os.fork() == 0:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{number}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.path[0], status = command, os.path.dirname(os.path.abspath(command[0])), 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_all(commands: dict[str, list[str]]) -> dict[str, subprocess.CompletedProcess]:
    """Run all scripts, each in a process of its own, whose parent has imported the large libraries; their results."""
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-c", LAUNCHER, folder], cwd=ROOT, text=True, input=json.dumps(commands),
            capture_output=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        status = dict(line.rsplit(" ", 1) for line in ran.stdout.splitlines())
        printed = {name: [Path(folder, f"{name}.{n}").read_text() for n in (1, 2)] for name in commands}
    return {name: subprocess.CompletedProcess(commands[name], int(status[name]), *printed[name]) for name in commands}


@pytest.fixture(scope="module")
def printed():
    return run_all({name: [PATHS[name]] for name in CONCEPTS})


EXAMPLES = {
    "tokenizer": ["merges, in the order", "5 times", "tokens instead of 103 bytes", "'<|assistant|>'", "loss 1"],
    "attention": ["who may see whom", "rotary positions", "k and v (1, 2, 3, 2)", "whole pass: True"],
    "layers": ["RMSNorm divides it by 1.887", "LayerNorm subtracts 0.625", "swiglu: 128 -> 352 -> 128, 135,168"],
    "stages": ["tensors, 30,112 parameters", "from the file alone"],
    "transformer": ["parameters", "ln 512 = 6.238", "(4, 64, 128)", "(4, 64, 512)", "(4, 63)"],
    "moe": ["five tokens, four experts", "none is dropped", "that sum: True"],
    "lora": ["merged: W + 2 · B A", "with the adapters off", "trained 9,856 of"],
    "generate": ["top_k 2", "min_p 0.25", "10,000 draws"],
    "engine": ["fast_generate", "128 columns from the start", "equal: True"],
    "intervals": ["pooled standard deviation 0.0163, 6 degrees", "Holm's 0.048"],
    "combine": ["| right .08, in form .2, short if right .05 | 4 | 0.811 | 0.998 | 0.520 | 0.140 | 0.139 |"],
    "structure": ["| stage | lines", "| grpo.py |"],
    "verify": ["format 1  correct 1", "format 1  correct 0", "format 0  correct 0"],
    "arithmetic": ["pretraining text", "<think>", "held-out questions", "rejected answers"],
    "texts": ["user: '2+3?'  assistant: '5'", "to be answered by 5", "('B', '3')"],
    "data": ["document 1  loss 0", "document 2  loss 1", "document 0"],
    "optim": ["lr 0.001000", "Muon, weight decay 0.1: [(8, 8)]"],
    "rollout": ["finished", "counts, log p"],
    "watch": ["flat groups 0.50", "holds back 0.00 of the tokens", "the same policy", "differ by 0.0500"],
    "probe": ["learned positions", "rope positions", "before training", "after"],
    "families": ["self_attn.q_proj", "attn.c_attn.weight     (8, 24)", "[0, 2, 1, 3, 4, 6, 5, 7]", "3.29 32"],
    "templates": ["learned: '5<|im_end|>'", "'<s>[INST] 2+3? [/INST] 5</s>'", "again: True", "{% generation %}"],
    "preferences": ["pairs of arith", "a pair as two rows", "padding"],
}


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_prints_its_example(name, printed):
    done = printed[name]
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.splitlines()) >= 5
    for words in EXAMPLES.get(name, []):
        assert words in done.stdout


def numbers_below(text: str, heading: str) -> list[list[float]]:
    """The rows of the tensor that is printed after a heading."""
    after = text.split(heading, 1)[1].split("tensor(", 1)[1].split(")", 1)[0].split(", dtype", 1)[0]
    return [[float(x) for x in re.findall(r"-?\d+\.?\d*", row)] for row in after.split("\n")]


def test_the_numbers_that_attention_prints_are_right(printed):
    out = printed["attention"].stdout
    q, k, v = (torch.tensor(numbers_below(out, heading)) for heading in ("queries", "keys", "values"))
    scores = q @ k.T / 2**0.5
    torch.testing.assert_close(torch.tensor(numbers_below(out, "scores")), scores, atol=6e-4, rtol=0)
    seen = torch.tensor(numbers_below(out, "who may see whom"))
    assert torch.equal(seen, torch.ones(3, 3).tril())
    exponentials = scores.exp() * seen
    weights = exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(numbers_below(out, "weights")), weights, atol=6e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(numbers_below(out, "output")), weights @ v, atol=6e-4, rtol=0)
    windowed = exponentials.clone()
    windowed[2, 0] = 0
    windowed /= windowed.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(numbers_below(out, "window of 2")), windowed, atol=6e-4, rtol=0)
    one, two = map(float, re.search(r"distance alone: (\S+) (\S+)", out).groups())
    assert one == pytest.approx(two, abs=1e-6) and one == pytest.approx(2 * torch.cos(torch.tensor(1.0)).item())


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_examples_in_docstrings_are_true(name):
    torch.set_printoptions(profile="default")  # a worked example may have chosen its own
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    if name in ("attention", "optim", "sft", "grpo", "evaluate", "generate", "verify", "tokenizer"):
        assert tried


# ----------------------------------------------------------------------------------------------------------------------
# Formulas in docstrings


SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "runtime").glob("*.py")])


def docstrings(source: str) -> list[str]:
    """Every string that stands alone in a file: of the module, its classes and functions, and under fields."""
    alone = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [(node.col_offset, node.value.value) for node in alone if isinstance(node.value, ast.Constant)]
    return [textwrap.indent(inspect.cleandoc(text), margin * " ") for margin, text in texts if isinstance(text, str)]


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def blocks_of(text: str) -> list[list[str]]:
    """The lines that each ``::`` at the end of a line announces: a blank line, then all that is indented deeper."""
    lines, blocks = text.splitlines(), []
    for i, line in enumerate(lines):
        if line.endswith("::"):
            block: list[str] = []
            for after in lines[i + 1 :]:
                if after.strip() and (indentation(after) <= indentation(line) or not block):
                    break
                block.append(after)
            blocks.append([one for one in block if one.strip()])
    return blocks


def broken_as_if_filled(block: list[str]) -> list[str]:
    """The lines of a block that end where a sentence would be broken: the first word of the next line has no room."""
    return [one for one, two in itertools.pairwise(block) if len(one) + 1 + len(two.split()[0]) > 120]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_double_colon_announces_a_block(path):
    """And the block is none that a formatter filled like a paragraph, nor as wide as what it would fill."""
    for text in docstrings(path.read_text()):
        for block in blocks_of(text):
            assert block and not broken_as_if_filled(block), block


def test_a_formatter_leaves_the_blocks_as_they_are(tmp_path):
    """It takes the indentation from a block that ends its docstring: a sentence must follow there."""
    for path in SOURCES:
        (tmp_path / f"{path.parent.name}_{path.name}").write_text(path.read_text())
    options = ["--isolated", "--line-length=120", "--config=format.docstring-code-format=true"]
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *options, tmp_path], check=True)
    for path in SOURCES:
        before, after = path.read_text(), (tmp_path / f"{path.parent.name}_{path.name}").read_text()
        assert [blocks_of(text) for text in docstrings(before)] == [blocks_of(text) for text in docstrings(after)], path


def test_a_block_that_a_formatter_spoiled_is_noticed():
    table, *_ = blocks_of(docstrings((ROOT / "dpo.py").read_text())[0])
    for n in range(2, len(table) + 1):  # any end of it may have been taken for a sentence
        filled = textwrap.wrap(" ".join(" ".join(table[-n:]).split()), 116)
        assert broken_as_if_filled(table[:-n] + [" " * 4 + line for line in filled])
    assert blocks_of("As in::\n\na = b") == blocks_of("As in::\n    a = b") == [[]]
    assert blocks_of("As in::\n\n    a = b\n\nand so on") == [["    a = b"]]


def test_the_head_of_dpo_gives_each_loss_a_line():
    table, *_ = blocks_of(docstrings((ROOT / "dpo.py").read_text())[0])
    names = [line.split()[0] for line in table if not line.startswith(" " * 5)]
    assert names == ["DPO", "IPO", "SimPO", "ORPO"]


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", STAGES)
def test_help_explains_every_field(name, capsys):
    config_class = importlib.import_module(name).Config
    with pytest.raises(SystemExit) as stop:
        parse(config_class, ["--help"])
    assert stop.value.code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field, text in documented_fields(config_class).items():
        first = re.findall(r"\w+", text)[:2]  # a long text is broken into lines, but its first words stand together
        assert re.search(r"\W+".join(first), words), field


def documented_fields(config_class) -> dict[str, str]:
    """The docstrings that stand under the fields, in the class and those it inherits from."""
    texts: dict[str, str] = {}
    for base in config_class.__mro__[:-1]:
        tree = ast.parse(Path(sys.modules[base.__module__].__file__).read_text())
        body = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == base.__name__).body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts.setdefault(field.target.id, str(text.value.value).strip())
    return texts


@pytest.mark.parametrize("name", STAGES)
def test_every_field_has_a_docstring(name):
    config_class = importlib.import_module(name).Config
    texts = documented_fields(config_class)
    assert all(len(texts.get(field.name, "")) >= 5 for field in dataclasses.fields(config_class)), texts


def attributes_read(path: Path) -> set[str]:
    """Names that occur as ``something.name`` or ``getattr(something, "name")`` outside the fields of a dataclass."""
    tree = ast.parse(path.read_text())
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            names |= {a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    loops = [n.iter for n in ast.walk(tree) if isinstance(n, (ast.For, ast.comprehension))]
    texts = [c.value for loop in loops for c in ast.walk(loop) if isinstance(c, ast.Constant)]
    return names | {text for text in texts if isinstance(text, str)}  # getattr(config, name) for name in ("...", ...)


@pytest.mark.parametrize("name", STAGES)
def test_no_field_is_dead(name):
    module = importlib.import_module(name)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    shared = {field.name for base in module.Config.__mro__[1:-1] for field in dataclasses.fields(base)}
    own = attributes_read(ROOT / PATHS[name])
    runtime = set().union(*(attributes_read(path) for path in (ROOT / "runtime").glob("*.py")))
    if name in ("pretrain", "encoder"):  # it hands on by name whatever the model's configuration has too
        own |= {field.name for field in dataclasses.fields(ModelConfig)}
    if name == "evaluate":  # it hands its rewards to rollout.py, which reads them
        own |= attributes_read(ROOT / "rollout.py") & {"reward", "reward_weights"}
    for base in module.Config.__mro__[1:-1]:  # what a chapter takes over from another is read there
        runtime |= attributes_read(Path(sys.modules[base.__module__].__file__))
    assert not (fields - shared) - own
    assert not (fields & shared) - own - runtime


def test_no_field_of_the_model_is_dead():
    read = set().union(*(attributes_read(ROOT / f"{name}.py") for name in ("layers", "moe", "transformer", "generate")))
    assert not {field.name for field in dataclasses.fields(ModelConfig)} - read


def test_the_search_for_dead_fields_finds_one(tmp_path):
    (tmp_path / "stage.py").write_text("class C:\n    dead: int = 0\n    alive: int = 1\n\nprint(C().alive)\n")
    assert "alive" in attributes_read(tmp_path / "stage.py") and "dead" not in attributes_read(tmp_path / "stage.py")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_stage_and_builds_its_model(path):
    stage = importlib.import_module(path.stem.split("_")[0])
    values = read_preset(stage.Config, str(path))
    assert values and ast.get_docstring(ast.parse(path.read_text()))
    config = stage.Config(**values)
    assert config == parse(stage.Config, [str(path)])
    if hasattr(stage, "check"):
        stage.check(config)
    if path.stem.startswith("pretrain"):
        with torch.device("meta"):  # in full size, without its memory
            model = Transformer(stage.model_config(config, config.vocab_size))
        assert model.config.d_model == config.d_model
        heads = max(1, config.n_heads // config.n_kv_heads)
        small = dataclasses.replace(config, d_model=16 * heads, n_heads=heads, n_kv_heads=1, n_layers=1, d_ff=32)
        model = Transformer(stage.model_config(small, 64))
        assert model(torch.randint(64, (1, 8))).shape == (1, 8, 64)


def test_presets_are_named_after_their_stage():
    assert {path.stem.split("_")[0] for path in PRESETS} <= set(STAGES)


@pytest.fixture(scope="module")
def refused():
    return run_all({name: [PATHS[name], "--no_such_field", "1"] for name in STAGES})


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_flag_is_one_line_and_status_1(name, refused):
    assert refused[name].returncode == 1 and refused[name].stdout == ""
    assert len(refused[name].stderr.splitlines()) == 1
    assert refused[name].stderr.startswith("error: no field 'no_such_field'") and name in refused[name].stderr


# ----------------------------------------------------------------------------------------------------------------------
# Imports


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


ALLOWED = {
    "torch", "numpy", "tiktoken", "regex", "datasets", "tyro", "tqdm", "matplotlib", "PIL", "tensorboard",
    "wandb", "safetensors",
} | set(sys.stdlib_module_names)  # fmt: skip


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_imports_only_what_comes_before_it(name):
    """And a study whatever it likes; but nothing imports a study, except another."""
    before = set(CHAPTERS[: CHAPTERS.index(name)])
    assert imported(ROOT / PATHS[name]) <= before | {"runtime"} | ALLOWED


def test_importing_grpo_loads_only_what_grpo_needs():
    loaded = reached(import_graph(ROOT), "grpo")
    assert not loaded & {"encoder", "sft", "preferences", "reward", "dpo", "ppo", "gdpo", "evaluate", "pretrain"}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which files of the project each of them imports, imports inside functions counted."""
    paths = {path.stem: path for path in root.glob("*.py")}
    paths |= {f"runtime.{path.stem}": path for path in (root / "runtime").glob("*.py") if path.stem != "__init__"}
    graph = {}
    for name, path in paths.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = found & set(paths)
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that importing ``start`` loads."""
    seen, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def circles(graph: dict[str, set[str]]) -> set[str]:
    return {name for name in graph if name in reached(graph, name)}


def test_no_import_goes_in_a_circle():
    assert not circles(import_graph(ROOT))


def test_the_search_for_circles_finds_one_inside_a_function(tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "c.py").write_text("def f():\n    import a\n")
    (tmp_path / "a.py").write_text("from b import x\n")
    (tmp_path / "b.py").write_text("def f():\n    from runtime import c\n")
    (tmp_path / "d.py").write_text("import a\n")
    assert circles(import_graph(tmp_path)) == {"a", "b", "runtime.c"}


def test_an_installation_brings_no_module(tmp_path):
    """``data`` or ``tokenizer`` in site-packages would stand in the way of others' modules of that name."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "runtime").mkdir()
    for path in (tmp_path / "data.py", tmp_path / "runtime" / "__init__.py"):
        path.write_text("")
    made = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build", "--build-lib", "lib"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert not list(tmp_path.glob("lib/**/*.py")) and not list((tmp_path / "build").glob("**/*.py"))


def test_every_file_at_the_root_has_its_place_in_the_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)
    assert {path.stem for path in (ROOT / "studies").glob("*.py")} == set(STUDIES)


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").glob("*.py")), ids=lambda path: path.name)
def test_the_plumbing_imports_no_chapter(path):
    assert imported(path) <= {"runtime", "triton", "gguf", "huggingface_hub"} | ALLOWED
