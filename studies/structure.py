"""The structure of the stages in numbers: how long they are, how deep their loops lie, what they hand around.

A stage should read from top to bottom: short, its loop on one screen, no function handed to another, few files to open
for one step. ``code`` counts lines that are neither blank nor comment nor docstring; ``loop at`` and ``loop`` are the
first line and the length of ``for step in run.steps(...)``; ``own fields`` are those of the stage's own configuration;
``handed`` counts parameters that are functions and ``nested`` functions inside functions; ``files`` are the chapters
whose functions the loop calls by name, the stage's own helpers followed; ``modules`` is what importing the stage loads.

    python studies/structure.py
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "encoder", "sft", "reward", "dpo", "kto", "ppo", "grpo", "gdpo")


def sources() -> dict[str, Path]:
    """Module names of the chapters and the plumbing, and where they are."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(tree: ast.AST, names: dict[str, Path]) -> dict[str, str]:
    """Each name that a file imports from the project, and the module that it comes from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module = whole if whole in names else node.module
                if module in names:
                    found[alias.asname or alias.name] = module
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in names}
    return found


def reached(stage: str, names: dict[str, Path]) -> set[str]:
    """The project's modules that importing a stage loads."""
    seen, todo = set(), [stage]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += set(imported(ast.parse(names[module].read_text()), names).values())
    return seen


def code_lines(source: str) -> int:
    """Lines with code: neither blank, nor comment, nor docstring."""
    tree, lines = ast.parse(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def files_of_a_step(loop: ast.AST, tree: ast.Module, origin: dict[str, str]) -> set[str]:
    """The chapters whose functions a loop calls by name; what the stage itself defines is followed."""
    functions = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found, seen, todo = set(), set(), list(loop.body)
    while todo:
        for node in ast.walk(todo.pop()):
            name = node.id if isinstance(node, ast.Name) else None
            if name in functions and name not in seen:
                seen.add(name)
                todo += functions[name].body  # without the annotations of its parameters
            elif name in origin and not origin[name].startswith("runtime"):
                found.add(origin[name])
    return found


def measure(stage: str) -> dict[str, int]:
    """The numbers of one stage."""
    names = sources()
    source = names[stage].read_text()
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For) and ".steps(" in ast.unparse(n.iter)]
    loop = max(loops, key=lambda n: n.end_lineno - n.lineno)
    parameters = [a for f in functions for a in (*f.args.args, *f.args.kwonlyargs) if a.annotation]
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    inside = [node for f in functions for node in ast.walk(f) if node is not f]
    return {
        "lines": source.count("\n"), "code": code_lines(source), "loop at": loop.lineno,
        "loop": loop.end_lineno - loop.lineno + 1, "longest": max(f.end_lineno - f.lineno + 1 for f in functions),
        "own fields": sum(isinstance(node, ast.AnnAssign) for node in config.body),
        "handed": sum("Callable" in ast.unparse(a.annotation) for a in parameters),
        "nested": sum(isinstance(node, ast.FunctionDef) for node in inside),
        "files": len(files_of_a_step(loop, tree, imported(tree, names)) | {stage}),
        "modules": len(reached(stage, names)),
    }  # fmt: skip


if __name__ == "__main__":
    rows = {stage: measure(stage) for stage in STAGES if (ROOT / f"{stage}.py").exists()}
    columns = list(next(iter(rows.values())))
    print("| stage | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for stage, row in rows.items():
        print(f"| {stage}.py | " + " | ".join(str(row[name]) for name in columns) + " |")
