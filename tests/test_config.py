"""Defaults, then a preset, then the command line; and one line for everything that can be wrong."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import tyro
from tiny import tiny_pretrain

import dpo
import encoder
import evaluate
import grpo
import pretrain
import sft
from runtime.config import (
    ELSEWHERE,
    Above,
    AtLeast,
    Finite,
    RunConfig,
    TrainConfig,
    as_dict,
    check_shared,
    fits,
    parse,
    validate,
)
from runtime.errors import UserError
from runtime.fields import groups_of, texts_of
from verify import load_rewards


@dataclass(frozen=True)
class Stage(RunConfig):
    """As a chapter would write it."""

    lr: float = 1e-3
    """Learning rate."""
    steps: int = 100
    shuffle: bool = True
    loss: typing.Literal["dapo", "grpo"] = "dapo"
    window: int | None = None
    weights: tuple[float, ...] = (1.0, 0.5)
    name: str = "x"
    level: typing.Literal[1, 2] = 1


@dataclass(frozen=True)
class Plain:
    lr: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)
    packed: bool = False


@dataclass(frozen=True)
class Talk:
    checkpoint: tyro.conf.Positional[str] = "out/grpo"
    top_k: int = 0


@dataclass(frozen=True)
class Compare:
    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    n: int = 1


def preset(tmp_path, text: str, name: str = "sft_gsm8k.py") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def refusal(config_class, argv) -> str:
    with pytest.raises(UserError) as error:
        parse(config_class, argv)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.strip() == text and text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# What is accepted


@pytest.mark.parametrize("config_class", [Stage, Plain, RunConfig])
def test_nothing_given_is_the_defaults(config_class):
    assert parse(config_class, []) == config_class()


@pytest.mark.parametrize(
    "argv, field, value",
    [
        (["--lr", "1e-5"], "lr", 1e-5),
        (["--lr=1e-5"], "lr", 1e-5),
        (["--lr", "3"], "lr", 3.0),
        (["--lr", "-0.5"], "lr", -0.5),
        (["--lr", "-1e-3"], "lr", -1e-3),
        (["--lr=-1"], "lr", -1.0),
        (["--steps", "-7"], "steps", -7),
        (["--no-shuffle"], "shuffle", False),
        (["--shuffle"], "shuffle", True),
        (["--fresh"], "fresh", True),
        (["--no-fresh"], "fresh", False),
        (["--loss", "grpo"], "loss", "grpo"),
        (["--level", "2"], "level", 2),
        (["--window", "4"], "window", 4),
        (["--window", "None"], "window", None),
        (["--weights", "1", "2", "-3.5"], "weights", (1.0, 2.0, -3.5)),
        (["--weights", "2"], "weights", (2.0,)),
        (["--name", "two words"], "name", "two words"),
        (["--out-dir", "here"], "out_dir", "here"),
        (["--out_dir", "here"], "out_dir", "here"),
        (["--precision", "bf16"], "precision", "bf16"),
    ],
)
def test_one_override(argv, field, value):
    config = parse(Stage, argv)
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    assert dataclasses.replace(config, **{field: getattr(Stage(), field)}) == Stage()


def test_several_overrides():
    config = parse(Stage, ["--weights", "1", "-2", "--no-shuffle", "--lr", "-1", "--steps", "5"])
    assert (config.weights, config.shuffle, config.lr, config.steps) == ((1.0, -2.0), False, -1.0, 5)


def test_a_plain_dataclass():
    assert parse(Plain, ["--sizes", "3", "4", "5", "--packed"]) == Plain(sizes=(3, 4, 5), packed=True)
    assert refusal(Plain, ["--steps", "3"])


def test_positional_fields_follow_the_preset(tmp_path):
    path = preset(tmp_path, "top_k = 3\n")
    assert parse(Talk, []) == Talk()
    assert parse(Talk, ["out/sft", "--top_k", "5"]) == Talk(checkpoint="out/sft", top_k=5)
    assert parse(Talk, [path, "out/sft"]) == Talk(checkpoint="out/sft", top_k=3)
    assert parse(Compare, ["a", "b", "--n", "2"]) == Compare(checkpoints=("a", "b"), n=2)
    assert "out/dpo" in refusal(Talk, ["out/sft", "out/dpo"])


def test_a_preset_changes_the_defaults(tmp_path):
    text = "import math\n_base = 4\nlr = math.sqrt(_base)\nsteps = _base * 5\nloss = 'grpo'\nwindow = 8\nfresh = True\n"
    config = parse(Stage, [preset(tmp_path, text)])
    assert config == Stage(lr=2.0, steps=20, loss="grpo", window=8, fresh=True)


def test_an_override_wins_over_the_preset(tmp_path):
    path = preset(tmp_path, "lr = 0.5\nsteps = 7\nshuffle = False\nweights = (1.0, 2.0)\n")
    config = parse(Stage, [path, "--lr", "0.25", "--shuffle"])
    assert (config.lr, config.steps, config.shuffle, config.weights) == (0.25, 7, True, (1.0, 2.0))


def test_a_whole_number_is_a_number_in_a_preset(tmp_path):
    assert parse(Stage, [preset(tmp_path, "lr = 1\nwindow = None\n")]).lr == 1


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(Stage, []).lr = 2.0


def test_as_dict_rebuilds_the_configuration():
    config = parse(Stage, ["--weights", "1", "2", "--window", "3"])
    assert Stage(**as_dict(config)) == config


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_fields(flag, capsys):
    with pytest.raises(SystemExit) as left:
        parse(Stage, [flag])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--lr" in text and "Learning rate." in text and "--no_shuffle" in text


def help_of(config_class, capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        parse(config_class, [*argv, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_groups_the_fields_and_says_what_the_program_is_for(capsys):
    text = help_of(grpo.Config, capsys)
    lines = text.splitlines()
    assert lines[0] == "usage: python grpo.py [PRESET.py] [--field VALUE ...]"
    assert lines[2] == "GRPO: reinforcement learning without a critic. An answer is measured against its siblings."
    titles = re.findall(r"^\W+ ((?:\S+ )?options) \W+$", text, re.MULTILINE)
    groups = ["grpo.py", "RolloutConfig", "LoRARunConfig", "TrainConfig", "RunConfig"]
    assert titles == ["options", *(f"{name} options" for name in groups)]
    places = {"group_size": "grpo.py", "temperature": "RolloutConfig", "dora": "LoRARunConfig", "lr": "TrainConfig"}
    for name, group in places.items():
        place = text.index(f"--{name} " if name != "dora" else "--dora,")
        assert text.index(f" {group} options") < place < text.index(f" {groups[groups.index(group) + 1]} options"), name
    words = " ".join(text.replace("│", " ").replace("|", " ").split())
    assert "What every stage that trains has besides." in words  # a group says what it is
    assert "--print_config" in text and "(at least 0, below 1; default: 0.99)" in words


def test_help_shows_the_values_of_a_preset(tmp_path, capsys):
    words = " ".join(
        help_of(Stage, capsys, preset(tmp_path, "lr = 0.125\n")).replace("│", " ").replace("|", " ").split()
    )
    assert "Learning rate. (default: 0.125)" in words
    assert help_of(Compare, capsys).startswith("usage: python test_config.py [PRESET.py] [CHECKPOINTS] [--field VALUE")


def test_the_text_of_a_field_is_the_nearest_one():
    texts = texts_of(pretrain.Config)
    assert texts["lr"] == "Peak learning rate. With adamw alone, half of this is a better start."
    assert texts["warmup"] == texts_of(TrainConfig)["warmup"] == "Linear warm-up of the learning rate, in steps."
    assert texts_of(Stage)["lr"] == "Learning rate." and "name" not in texts_of(Stage)
    assert all(texts_of(grpo.Config)[field.name] for field in dataclasses.fields(grpo.Config))


def test_a_field_belongs_to_the_class_that_introduces_it():
    groups = {cls.__name__: names for cls, names in groups_of(pretrain.Config).items()}
    assert list(groups) == ["Config", "TrainConfig", "RunConfig"] and "lr" in groups["TrainConfig"]
    for config_class in (pretrain.Config, grpo.Config, dpo.Config, encoder.Config, Stage, Plain):
        names = [name for names in groups_of(config_class).values() for name in names]
        assert sorted(names) == sorted(field.name for field in dataclasses.fields(config_class))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused on the command line


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--learning_rate", "1"], "no field 'learning_rate' in the test_config configuration"),
        (["--stepz", "3"], "no field 'stepz' in the test_config configuration; did you mean steps?"),
        (["--weight", "3"], "did you mean weights?"),
        (["--keep-lst", "3"], "did you mean keep_last?"),
        (["--zzzzqq", "3"], "--help lists them"),
        (["--out-dir", "-x"], "Missing argument; Missing value for argument '--out-dir'"),
        (["--stepz=3"], "did you mean steps?"),
        (["--no-lr"], "no field 'no_lr'"),
        (["--no-loss"], "no field 'no_loss'"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--lr", ""], "not a number"),
        (["--steps", "1.5"], "--steps 1.5: not a whole number"),
        (["--steps", "1e3"], "--steps 1e3: not a whole number"),
        (["--steps=many"], "--steps many: not a whole number"),
        (["--loss", "ppo"], "--loss ppo: not one of dapo, grpo"),
        (["--level", "3"], "--level 3: not one of 1, 2"),
        (["--precision", "fp8"], "--precision fp8: not one of auto, fp32, bf16, fp16"),
        (["--window", "wide"], "--window wide: not a whole number or None"),
        (["--weights", "1", "x"], "--weights x: not a list of a number"),
        (["--lr"], "--lr needs a value: a number"),
        (["--lr", "--steps", "3"], "--lr needs a value: a number"),
        (["--weights", "--steps", "3"], "--weights needs a value"),
        (["--shuffle", "true"], "--shuffle is a switch: write --shuffle or --no-shuffle"),
        (["--shuffle=False"], "--shuffle is a switch"),
        (["--steps", "3", "--lrr", "3"], "did you mean lr?"),
    ],
)
def test_a_wrong_argument_is_one_line(argv, says):
    assert says in refusal(Stage, argv)


@pytest.mark.parametrize(
    ("stage", "name", "says"),
    [
        (sft, "steps", "this stage counts epochs, passes over its data: use --epochs"),
        (dpo, "steps", "use --epochs"),
        (encoder, "max_steps", "use --epochs"),
        (pretrain, "epochs", "this stage counts steps: use --steps"),
        (pretrain, "num_train_epochs", "this stage counts steps: use --steps"),
        (grpo, "max_steps", "here it is called steps"),
        (grpo, "num_generations", "here it is called group_size"),
        (sft, "learning_rate", "here it is called lr"),
        (sft, "num_generations", "--help lists them"),  # it has neither
    ],
)
def test_a_name_from_elsewhere_is_translated(tmp_path, stage, name, says):
    start = f"no field {name!r} in the {stage.__name__} configuration; "
    assert refusal(stage.Config, [f"--{name}", "3"]).startswith(start)
    assert says in refusal(stage.Config, [f"--{name}", "3"])
    assert says in refusal(stage.Config, [preset(tmp_path, f"{name} = 3\n")])


def test_names_from_elsewhere_are_no_fields():
    for stage in (sft, dpo, encoder, pretrain, grpo):
        fields = {field.name for field in dataclasses.fields(stage.Config)}
        for name, others in ELSEWHERE.items():
            assert name in ("steps", "epochs") or name not in fields
            assert not others.keys() & ELSEWHERE.keys() - {"steps", "epochs"}


@pytest.mark.parametrize(
    "argv", [["foo"], ["--lr", "1", "2"], ["--shuffle", "foo"], ["-x"], ["--lr", "1", "preset.py"]]
)
def test_a_stray_word_is_one_line(argv):
    assert argv[-1] in refusal(Stage, argv)


SCRIPT = """
from dataclasses import dataclass
from runtime.config import RunConfig, run_stage
from runtime.errors import UserError

@dataclass(frozen=True)
class Config(RunConfig):
    lr: float = 1e-3
    '''Learning rate.'''

def main(config):
    if config.lr > 100:
        raise UserError("no stage can work with that")
    print("lr", config.lr)

def example():
    print("four answers")

if __name__ == "__main__":
    run_stage(main, Config, example)
"""


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["--lr", "2"], 0, "lr 2.0"),
        (["--help"], 0, "Learning rate."),
        (["--help"], 0, "stage.py --example"),
        (["--lrr", "2"], 1, "error: no field 'lrr' in the stage configuration; did you mean lr?"),
        (["--lr", "101"], 1, "error: no stage can work with that"),
        (["--example"], 0, "four answers"),
        (["--example", "--lr", "2"], 1, "error: no field 'example' in the stage configuration"),
    ],
)
def test_a_script_is_configured(tmp_path, argv, code, says):
    """As ``python stage.py``, where the class lives in ``__main__``."""
    script = tmp_path / "stage.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run([sys.executable, script, *argv], env=environment, capture_output=True, text=True)
    assert run.returncode == code and says in run.stdout + run.stderr and "Traceback" not in run.stderr
    assert code == 0 or len(run.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is refused in a preset


@pytest.mark.parametrize(
    "text, says",
    [
        ("lrr = 1e-3\n", "no field 'lrr' in the test_config configuration; did you mean lr?"),
        ("keep_lst = 2\n", "did you mean keep_last?"),
        ("lr = 'fast'\n", "lr = 'fast' is not a number"),
        ("lr = True\n", "lr = True is not a number"),
        ("lr = None\n", "lr = None is not a number"),
        ("steps = 1.5\n", "steps = 1.5 is not a whole number"),
        ("steps = True\n", "steps = True is not a whole number"),
        ("shuffle = 1\n", "shuffle = 1 is not True or False"),
        ("shuffle = 'no'\n", "shuffle = 'no' is not True or False"),
        ("loss = 'ppo'\n", "loss = 'ppo' is not one of dapo, grpo"),
        ("level = 3\n", "level = 3 is not one of 1, 2"),
        ("window = 'wide'\n", "window = 'wide' is not a whole number or None"),
        ("weights = 3.0\n", "weights = 3.0 is not a list of a number"),
        ("weights = (1.0, 'x')\n", "weights = (1.0, 'x') is not a list of a number"),
        ("name = 3\n", "name = 3 is not a text"),
        ("lr = 1 / 0\n", "does not run: ZeroDivisionError"),
        ("raise ValueError('two\\nlines')\n", "does not run: ValueError"),
        ("lr = (\n", "does not run: SyntaxError"),
    ],
)
def test_a_wrong_preset_is_one_line(tmp_path, text, says):
    path = preset(tmp_path, text)
    message = refusal(Stage, [path])
    assert says in message and path in message


REWARDS = """
import math
from pathlib import Path

steps = 7
_unit = 2.0


def short(prompt, answer, row):
    return _unit * _half(len(answer))


def _half(n):
    return n / 2
"""


def test_a_preset_that_defines_functions_defines_the_rewards(tmp_path):
    path = preset(tmp_path, REWARDS)
    config = parse(grpo.Config, [path])
    assert (config.reward, config.steps) == (path, 7)
    assert list(load_rewards(config.reward)) == ["short"] and load_rewards(path)["short"]("", "four", {}) == 4.0
    grpo.check_reward(config)
    assert parse(grpo.Config, [path, "--reward", "verifier"]).reward == "verifier"
    assert parse(evaluate.Config, [preset(tmp_path, REWARDS.replace("steps = 7", "n = 7"))]).reward == path


@pytest.mark.parametrize(
    "text",
    [
        "steps = 7\nfrom math import sqrt\nfrom textwrap import dedent\n",  # of other files
        "steps = 7\ndef _half(n):\n    return n / 2\n",
        "steps = 7\nclass Thing:\n    pass\n",
        "steps = 7\nreward = 'verifier'\ndef short(prompt, answer, row):\n    return 0.0\n",
    ],
)
def test_a_preset_without_rewards_of_its_own_leaves_the_verifier(tmp_path, text):
    assert parse(grpo.Config, [preset(tmp_path, text)]).reward == "verifier"


def test_functions_in_the_preset_of_a_stage_without_rewards_are_nothing(tmp_path):
    assert parse(sft.Config, [preset(tmp_path, "lr = 0.5\ndef helper():\n    pass\n")]).lr == 0.5


def test_a_missing_preset_names_the_nearest(tmp_path):
    preset(tmp_path, "lr = 1.0\n")
    message = refusal(Stage, [str(tmp_path / "sft_gsm8.py")])
    assert "there is no preset" in message and "sft_gsm8k.py?" in message
    assert "did you mean" not in refusal(Stage, ["no/such/folder/zzz.py"])


# ----------------------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.parametrize(
    "value, hint, yes",
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        ("a", typing.Literal["a", "b"], True),
        ("c", typing.Literal["a", "b"], False),
        (None, int | None, True),
        ("1", int | None, False),
        ([1, 2], tuple[int, ...], True),
        ((1, 2.5), tuple[int, ...], False),
        (3, tuple[int, ...], False),
        (1, typing.Annotated[int, "note"], True),
        ("x", typing.Annotated[int, "note"], False),
    ],
)
def test_fits(value, hint, yes):
    assert fits(value, hint) is yes


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (pretrain, {"lr": -1.0}, "lr is -1.0"),
        (pretrain, {"lr": float("nan")}, "lr is nan"),
        (pretrain, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (pretrain, {"beta2": 1.0}, "beta2 is 1.0: below 1"),
        (pretrain, {"seed": 2**64}, "below 2\\*\\*63"),
        (pretrain, {"keep_last": 0}, "keep_last is 0"),
        (pretrain, {"profile_steps": -1}, "profile_steps is -1"),
        (pretrain, {"lr": float("inf")}, "lr is infinite"),
        (encoder, {"epochs": float("inf")}, "epochs is infinite"),
        (encoder, {"lr": -1.0}, "lr is -1.0"),
        (encoder, {"final_lr": -0.1}, "final_lr is -0.1"),
    ],
)
def test_numbers_that_no_stage_can_work_with(tmp_path, stage, changes, words):
    with pytest.raises(UserError, match=words):
        stage.main(stage.Config(out_dir=str(tmp_path / "run"), device="cpu", **changes))
    assert not (tmp_path / "run").exists()


def test_a_list_that_may_also_be_none():
    words = ["--n_experts", "4", "--expert_layers", "1", "3", "--lr", "0.1"]
    config = parse(pretrain.Config, words)
    assert config.expert_layers == (1, 3) and config.lr == 0.1
    assert parse(pretrain.Config, []).expert_layers is None
    with pytest.raises(UserError, match="3"):
        parse(pretrain.Config, ["--window", "1", "3"])


# ----------------------------------------------------------------------------------------------------------------------
# Bounds


@dataclass(frozen=True)
class Bounded:
    steps: typing.Annotated[int, AtLeast(1)] = 45
    """Training steps."""
    beta2: typing.Annotated[float, AtLeast(0, below=1)] = 0.9
    share: typing.Annotated[float | None, Above(0, most=1)] = None
    weight: typing.Annotated[float, Finite()] = -1.0
    rates: typing.Annotated[tuple[float, ...], Above(0)] = ()


OUTSIDE = [
    ({"steps": 0}, "steps is 0: at least 1"),
    ({"beta2": 1.0}, "beta2 is 1.0: below 1"),
    ({"beta2": -0.5}, "beta2 is -0.5: at least 0"),
    ({"beta2": float("nan")}, "beta2 is nan: at least 0"),
    ({"share": 0.0}, "share is 0.0: above 0"),
    ({"share": 1.5}, "share is 1.5: at most 1"),
    ({"weight": float("inf")}, "weight is infinite"),
    ({"weight": float("-inf")}, "weight is infinite"),
    ({"weight": float("nan")}, "weight is nan: not a number"),
    ({"rates": (0.1, 0.0)}, "rates is 0.0: above 0"),
]


@pytest.mark.parametrize(("changes", "says"), OUTSIDE)
def test_a_number_outside_its_bounds_is_one_line(tmp_path, changes, says):
    with pytest.raises(UserError) as error:
        validate(Bounded(**changes))
    assert str(error.value) == says
    name, value = next(iter(changes.items()))
    values = value if isinstance(value, tuple) else (value,)
    assert refusal(Bounded, [f"--{name}", *map(str, values)]) == says
    if math.isfinite(sum(values)):
        assert refusal(Bounded, [preset(tmp_path, f"{name} = {value!r}\n")]) == says


def test_numbers_inside_their_bounds():
    for changes in ({"steps": 1}, {"beta2": 0.0}, {"share": 1.0}, {"share": None}, {"weight": -9.0}, {"rates": (1.0,)}):
        validate(Bounded(**changes))
    for changes in ({"beta2": 0}, {"share": 1}, {"weight": -9}):  # a whole number is a number
        validate(Bounded(**changes))
    validate(dpo.Config(label_smoothing=0))


def test_help_shows_the_bounds(capsys):
    with pytest.raises(SystemExit):
        parse(Bounded, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Training steps. (at least 1; default: 45)" in text and "(at least 0, below 1; default: 0.9)" in text
    assert "(above 0, at most 1; default: None)" in text


def test_a_batch_that_the_processes_cannot_share(monkeypatch):
    check_shared("batch_size", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_shared("batch_size", 4)
    with pytest.raises(UserError, match="batch_size 3 cannot be shared evenly by 2 processes"):
        check_shared("batch_size", 3)


def test_a_run_with_fields_that_are_gone_is_refused_in_one_line(tmp_path):
    """Its configuration says something that this version would not do."""
    pretrain.main(tiny_pretrain(tmp_path / "run", steps=2, eval_every=2))
    path = tmp_path / "run" / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["clip"] = state["config"].pop("max_grad_norm")
    torch.save(state, path)
    with pytest.raises(UserError, match="earlier version, with the field clip"):
        pretrain.main(tiny_pretrain(tmp_path / "run", steps=2, eval_every=2))
