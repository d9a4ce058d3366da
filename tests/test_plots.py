import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from tiny import tiny_pretrain

import pretrain
from runtime import plots, words
from runtime.errors import UserError
from runtime.pictures import Pictures

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    return made(tmp_path / "a")


def made(folder: Path, **more) -> Path:
    """A folder with the metrics of a run: forty losses, and whatever else, at step 40."""
    folder.mkdir(parents=True)
    rows = [{"step": i, "time": i, "loss": 1 / (i + 1), "note": "x"} for i in range(40)]
    rows += [{"step": 40, "val_loss": 0.5, "loss": float("nan")} | more]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    yield drawn
    for figure in drawn:
        plots._pyplot().close(figure)


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["plots", *map(str, arguments)])
    plots.main()


def test_metrics_are_read_in_order_without_words_and_holes(run):
    series = plots.read_metrics(run / "metrics.jsonl")
    assert set(series) == {"loss", "val_loss"} and series["val_loss"] == ([40], [0.5])
    assert series["loss"][0] == list(range(40)) and series["loss"][1][1] == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Words and style


def test_every_metric_of_the_page_has_words():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    first = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    names = re.findall(r"`(\w+)`", first)
    assert len(names) > 45
    assert [name for name in names if name not in words.WORDS and name != "load_L_E"] == []
    assert (
        "expert 3 in block 0" in words.label_of("load_0_3") and words.label_of("val_loss") == "validation loss (nats)"
    )


def luminance(colour) -> float:
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_thin_lines_stand_out_on_white():
    """The contrast of WCAG 2, which asks for 3 to 1 in graphics; also of the shades for numbers."""
    styles = plots._study_colours({("size", str(2**i)): str(i) for i in range(6)})
    shades = [to_hex(style["color"]) for style in styles.values()]
    assert len(set(shades)) == 6 and to_hex(colormaps["plasma"](0.6)) in shades
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in (*plots.COLOURS, *shades))
    lights = [luminance(shade) for shade in shades]
    assert lights == sorted(lights)  # in grey, too, more is lighter


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3).tolist(),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour, eyes) -> np.ndarray:
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    seen = np.clip(np.array(eyes) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-9))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_readers_can_tell_the_lines_apart(kind):
    """Ten of CIE's units (CIE76) are seen at a glance; 2.3 are just seen side by side."""
    for a, b in itertools.combinations(plots.COLOURS, 2):
        assert np.linalg.norm(lab(a, BLINDNESS[kind]) - lab(b, BLINDNESS[kind])) > 10, (a, b)


def test_smoothing_is_centred_and_leaves_a_straight_line_where_it_is():
    line = [0.5 * i for i in range(30)]
    assert plots._smooth(line, 4) == pytest.approx(line)
    peak = [0.0] * 7 + [1.0] + [0.0] * 7
    assert plots._smooth(peak, 2) == pytest.approx(plots._smooth(peak, 2)[::-1])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_picture_of_a_run_bears_its_title_and_words(run, tmp_path, figures):
    plots.plot_curves(run / "metrics.jsonl", tmp_path / "p.png", title="out/arith/mine")
    (figure,) = figures
    assert figure.get_suptitle() == "out/arith/mine"
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["training loss", "validation loss"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "nats"]  # a unit; the words stand above


def test_what_never_changed_is_named_and_has_no_panel(tmp_path, figures):
    rows = [{"step": i, "answers": 256, "my_own": 2.0, "val_my_own": i, "loss": 1 / i} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "p.png", title="a run")
    assert figures[0].get_suptitle() == "a run\nunchanged: answers sampled 256, my own 2"
    titles = [axis.get_title(loc="left") for axis in figures[0].axes]
    assert titles == ["my own, held\u00a0out", "training loss"]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"loss": 1, "val_my_own": 1}) + "\n" for row in rows)
    )
    plots.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "p.png")
    assert len(figures[1].axes) == 4  # if nothing changed, all are shown


def test_the_experts_of_a_block_share_a_panel(tmp_path, figures):
    folder = made(tmp_path / "m", load_0_0=0.3, load_0_1=0.7, load_1_0=0.5)
    plots.plot_curves(folder / "metrics.jsonl", tmp_path / "p.png")
    titles = {axis.get_title(loc="left"): len(axis.lines) for axis in figures[0].axes}
    assert titles["load of each expert, block 0"] == 2 and titles["load of each expert, block 1"] == 1


def test_a_picture_of_several_runs_by_one_command(run, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "p.png"
    command(monkeypatch, "--runs", run, "--curves", "loss", "val_loss", "--write", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no metrics"):
        command(monkeypatch, "--runs", tmp_path / "b")
    with pytest.raises(UserError, match="which runs"):
        command(monkeypatch)


def test_two_runs_of_one_name_are_two_panels(tmp_path, monkeypatch, figures):
    runs = [made(tmp_path / "a" / "sft"), made(tmp_path / "b" / "sft", val_loss=9.0)]
    command(monkeypatch, "--runs", *runs, "--curves", "val_loss")
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["a/sft", "b/sft"]
    assert [float(axis.lines[0].get_ydata()[0]) for axis in figures[0].axes] == [0.5, 9.0]


def test_a_curve_that_no_run_has_is_one_line_with_the_nearest(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no curve 'vall_loss'; did you mean val_loss") as caught:
        command(monkeypatch, "--runs", run, "--curves", "loss", "vall_loss", "--write", tmp_path / "p.png")
    assert "\n" not in str(caught.value) and not (tmp_path / "p.png").exists()
    other = made(tmp_path / "b", accuracy=1.0)
    with pytest.raises(UserError, match="a has no curve accuracy: it has loss, val_loss"):
        command(monkeypatch, "--runs", other, run, "--curves", "accuracy", "--write", tmp_path / "p.png")
    (run / "metrics.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="is damaged"):
        command(monkeypatch, "--runs", run)


def test_panels_of_one_quantity_share_their_range_and_a_metric_its_colour(tmp_path, figures):
    folders = {
        "A": made(tmp_path / "a"),
        "B": made(tmp_path / "b", val_loss=3.0),
        "C": made(tmp_path / "c", length=9.0),
    }
    wanted = {"A": ["val_loss"], "B": ["val_loss"], "C": ["length"]}
    plots.plot_stages(folders, tmp_path / "p.png", wanted)
    a, b, c = figures[0].axes
    assert a.get_ylim() == b.get_ylim() != c.get_ylim()
    assert a.lines[-1].get_color() == b.lines[-1].get_color() != c.lines[-1].get_color()
    assert not any(axis.get_legend() for axis in (a, b, c)) and len(figures[0].legends) == 1  # below, not on the data
    assert [axis.get_ylabel() for axis in (a, b, c)] == ["nats", "nats", "tokens"]


def test_a_panel_that_would_press_the_others_flat_keeps_its_range(tmp_path, figures):
    folders = {name: made(tmp_path / name, val_loss=v) for name, v in zip("ABC", (1.0, 1.01, 90.0))}
    plots.plot_stages(folders, tmp_path / "p.png", dict.fromkeys(folders, ["val_loss"]))
    a, b, c = figures[0].axes
    assert a.get_ylim() == b.get_ylim() != c.get_ylim() and "a range of its own" in c.get_title(loc="left")


def test_runs_are_compared_with_one_colour_each(tmp_path, figures):
    folders = {"A": made(tmp_path / "a"), "B": made(tmp_path / "b", length=9.0), "C": made(tmp_path / "c", length=8.0)}
    plots.plot_compared(folders, tmp_path / "p.png", ["val_loss", "length"])
    loss, length = figures[0].axes
    assert [line.get_label() for line in length.lines] == ["B", "C"]
    assert [line.get_color() for line in loss.lines[1:]] == [line.get_color() for line in length.lines]


def test_a_large_picture_is_a_small_file(tmp_path):
    """Sixteen stages with three noisy curves each, noisier than the pipeline's."""
    noise = np.random.default_rng(0).random((16, 3, 60)) * 0.25 + np.array([0.0, 0.3, 0.6])[:, None]
    folders = {}
    for i, curves in enumerate(noise):
        folders[f"stage {i}"] = folder = tmp_path / str(i)
        folder.mkdir()
        rows = [dict(zip(("correct", "accuracy", "flat_groups"), x), step=j) for j, x in enumerate(curves.T.tolist())]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = dict.fromkeys(folders, ["correct", "accuracy", "flat_groups"])
    plots.plot_stages(folders, tmp_path / "p.png", wanted)
    assert (tmp_path / "p.png").stat().st_size < 300_000


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.png")), ids=lambda path: path.stem)
def test_a_picture_of_the_pages_is_a_small_file(picture):
    assert picture.stat().st_size <= 300_000


# ----------------------------------------------------------------------------------------------------------------------
# The report card


def test_a_report_card_as_a_picture(tmp_path, monkeypatch, capsys, figures):
    """A row for each stage with an accuracy, by family, each with its interval and number; a wrong file is one line."""
    rows = [
        {"stage": "GRPO", "accuracy": 0.9, "low": 0.88, "high": 0.93, "n": 512},
        {"stage": "Base", "accuracy": 0.0, "low": 0.0, "high": 0.007, "n": 512},
        {"stage": "text alone", "bits_per_byte": 0.5},
        {"stage": "SFT", "accuracy": 0.66, "low": 0.618, "high": 0.7, "n": 512},
        {"stage": "my own", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 512},
    ]
    report, picture = tmp_path / "report.json", tmp_path / "p.png"
    given = ("--report", report, "--write", picture)
    with pytest.raises(UserError, match="there is no"):
        command(monkeypatch, *given)
    for text in ("{", "[]", '[{"accuracy": 1}]'):
        report.write_text(text)
        with pytest.raises(UserError, match="holds no report card"):
            command(monkeypatch, *given)
    report.write_text(json.dumps(rows))
    command(monkeypatch, *given)
    assert str(picture) in capsys.readouterr().out
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Base", "SFT", "GRPO", "my own"]
    assert axis.yaxis_inverted() and "512 held-out questions" in axis.get_xlabel()
    assert [bar.lines[0].get_xdata()[0] for bar in axis.containers] == [0.0, 0.66, 0.9, 0.5]
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers]
    assert ends == [pytest.approx(pair) for pair in ([0, 0.007], [0.618, 0.7], [0.88, 0.93], [0.4, 0.6])]
    texts = {text.get_text() for text in axis.texts}
    assert {"0.660", "0.618 to 0.700", "before alignment", "GRPO and its relatives", "others"} <= texts
    verticals = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
    assert {0.0, 0.66} <= set(verticals)


def test_several_report_cards_as_one_picture(tmp_path, monkeypatch, figures):
    """Each stage's mean, its range, and a mark for each start; a stage that one start lacks is left out."""
    reports = [tmp_path / "a.json", tmp_path / "b.json"]
    for report, accuracies in zip(reports, ({"SFT": 0.6, "GRPO": 0.9, "KTO": 0.5}, {"SFT": 0.7, "GRPO": 0.8})):
        rows = [{"stage": s, "accuracy": a, "low": 0.0, "high": 1.0, "n": 2048} for s, a in accuracies.items()]
        report.write_text(json.dumps(rows))
    command(monkeypatch, "--report", *reports, "--write", tmp_path / "p.png")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SFT", "GRPO"]
    assert [bar.lines[0].get_xdata()[0] for bar in axis.containers] == pytest.approx([0.65, 0.85])
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers]
    assert ends == [pytest.approx([0.6, 0.7]), pytest.approx([0.8, 0.9])]
    marks = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "|" and len(line.get_xdata()) == 2]
    assert [0.6, 0.7] in marks and [0.9, 0.8] in marks
    assert "2,048 held-out questions, mean and each of 2 starts" in axis.get_xlabel()


# ----------------------------------------------------------------------------------------------------------------------
# Studies


def test_a_study_against_another_axis(tmp_path, figures):
    """The x of a curve NAME@x is a mean over seeds, its values are not smoothed; the trained length is marked."""
    values = [float(i) for i in range(24)]
    rows = [
        {"trained_length": 64, "curves": {"val_loss@seconds": [[k * x for x in values], values],
         "loss@position": [values, values], "reward": [values, [v % 2 for v in values]]}}
        for k in (1, 3)
    ]  # fmt: skip
    rows[0]["curves"]["val_loss@seconds-reference"] = [[0.0, 1.0], [-1.0, 2.0]]
    curves = ["val_loss@seconds", "loss@position", "reward", "val_loss@seconds-reference"]
    plots.plot_study({("", "a"): rows}, tmp_path / "p.png", curves, [], {"reward": "my reward"})
    seconds, position, step, difference = figures[0].axes[:4]
    assert difference.get_ylabel() == "validation loss, minus that of\n“a” (nats)"
    assert difference.get_xlabel() == "seconds" and list(difference.lines[1].get_ydata()) == [-1.0, 2.0]
    assert (seconds.get_xlabel(), position.get_xlabel(), step.get_xlabel()) == ("seconds", "position", "step")
    assert seconds.get_ylabel() == "validation loss (nats)" and step.get_ylabel() == "my reward (reward)"
    assert list(seconds.lines[0].get_xdata()) == [2 * x for x in values]
    assert list(seconds.lines[0].get_ydata()) == values
    assert [list(line.get_xdata()) for line in position.lines[1:]] == [[64, 64]] and len(seconds.lines) == 1
    assert list(step.lines[0].get_ydata())[1] == pytest.approx(1 / 3)  # against steps: the mean with its neighbours


def test_a_setting_has_one_colour_in_all_parts_and_numbers_have_shades():
    cells = {
        ("size", "2"): "g=2", ("size", "4"): "g=4", ("size", "8"): "g=8",
        ("std", "of the group"): "g=4", ("std", "none"): "scale=none", ("clip", "off"): "clip=0", ("clip", "on"): "g=4",
        ("a", "LoRA"): "a lora", ("a", "all"): "a all", ("b", "all"): "b all", ("b", "LoRA"): "b lora",
    }  # fmt: skip
    colour = {key: style["color"] for key, style in plots._study_colours(cells).items()}
    assert colour["size", "4"] == colour["std", "of the group"] == colour["clip", "on"]
    assert colour["a", "LoRA"] == colour["b", "LoRA"] != colour["a", "all"] == colour["b", "all"]
    assert luminance(colour["size", "2"]) < luminance(colour["size", "8"])
    for part in ("size", "std", "clip", "a", "b"):
        mine = [str(value) for (which, _), value in colour.items() if which == part]
        assert len(set(mine)) == len(mine)


def test_the_parts_of_a_study_share_their_range(tmp_path, figures):
    row = lambda low, high: [{"curves": {"accuracy": [[0, 1], [low, high]]}}]  # noqa: E731
    plots.plot_study({("a", "x"): row(0.5, 0.6), ("b", "x"): row(0.5, 0.9)}, tmp_path / "p", ["accuracy"], [], {})
    a, b = figures[0].axes
    assert a.get_ylim() == b.get_ylim() and a.get_ylim()[0] < 0.5 and a.get_ylim()[1] > 0.9
    assert a.lines[0].get_color() == b.lines[0].get_color()


def test_labels_beside_points_do_not_overlap(tmp_path, figures):
    """Eight points of two parts nearly on one spot, two far away."""
    runs = {}
    for part in ("added", "GDPO"):
        for i in range(5):
            x = 0.5 + 0.004 * i if i < 4 else 1.0
            runs[part, f"0.{i}5"] = [{"short": x + d, "correct": 0.8 - 0.5 * (i == 4) + d} for d in (0, 0.004)]
    plots.plot_study(runs, tmp_path / "p.png", [], ["short", "correct"], {"short": "short"})
    figure = figures[0]
    figure.canvas.draw()
    axis = figure.axes[0]
    assert axis.get_xlabel() == "short (share)" and len(axis.texts) == 10
    # An annotation's extent includes the tie to its point: only the text's own box counts.
    boxes = [super(type(text), text).get_window_extent(figure.canvas.get_renderer()) for text in axis.texts]
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


# ----------------------------------------------------------------------------------------------------------------------
# While a run goes on


def test_a_run_is_drawn_while_it_goes_on_but_seldom(run, monkeypatch):
    now, drawn = [0.0], []

    def draw(metrics, path, title):
        drawn.append(now[0])
        now[0] += 3.0  # a slow machine

    monkeypatch.setattr("runtime.pictures.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("runtime.pictures.plot_curves", draw)
    pictures = Pictures(run, print)
    for _ in range(300):
        pictures.draw_if_due()
        now[0] += 1.0
    assert drawn[0] == 30.0 and len(drawn) == 3  # then 3 s of 100


def test_a_picture_that_fails_stops_no_run_and_is_said_once(run):
    said = []
    (run / "metrics.jsonl").write_text("{")
    pictures = Pictures(run, said.append)
    for _ in range(3):
        pictures.draw()
    assert len(said) == 1 and "could not be drawn" in said[0] and "\n" not in said[0]


def test_the_picture_is_there_before_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.pictures.EVERY", 0.0)
    monkeypatch.setattr("runtime.pictures.SHARE", 1e9)
    drawn = []
    monkeypatch.setattr("runtime.pictures.plot_curves", lambda metrics, *a, **k: drawn.append(metrics.read_text()))
    pretrain.main(tiny_pretrain(tmp_path, steps=4, eval_every=2, save_every=100, max_documents=60, vocab_size=270))
    assert len(drawn) > 2 and drawn[0] in drawn[-1] and len(drawn[0]) < len(drawn[-1])
