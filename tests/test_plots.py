import json

import pytest

from runtime import plots
from runtime.errors import UserError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "a").mkdir()
    rows = [{"step": i, "time": i, "loss": 1 / (i + 1), "note": "x"} for i in range(40)]
    rows += [{"step": 40, "val_loss": 0.5, "loss": float("nan")}]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a"


def test_metrics_are_read_in_order_without_words_and_holes(run):
    series = plots.read_metrics(run / "metrics.jsonl")
    assert set(series) == {"loss", "val_loss"} and series["val_loss"] == ([40], [0.5])
    assert series["loss"][0] == list(range(40)) and series["loss"][1][1] == 0.5


def test_a_picture_of_several_runs_by_one_command(run, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "p.png"
    monkeypatch.setattr(
        "sys.argv", ["plots", "--runs", str(run), "--curves", "loss", "nothing", "--write", str(picture)]
    )
    plots.main()
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plots", "--runs", str(tmp_path / "b")])
    with pytest.raises(UserError, match="holds no metrics"):
        plots.main()
    monkeypatch.setattr("sys.argv", ["plots"])
    with pytest.raises(UserError, match="which runs"):
        plots.main()


def test_a_report_card_as_a_picture(tmp_path, monkeypatch, capsys):
    """A row for each stage with an accuracy, from top to bottom, each within its interval; a wrong file is one line."""
    rows = [
        {"stage": "Base", "accuracy": 0.0, "low": 0.0, "high": 0.007, "n": 512},
        {"stage": "text alone", "bits_per_byte": 0.5},
        {"stage": "SFT", "accuracy": 0.66, "low": 0.618, "high": 0.7, "n": 512},
    ]
    report, picture = tmp_path / "report.json", tmp_path / "p.png"
    command = ["plots", "--report", str(report), "--write", str(picture)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match="there is no"):
        plots.main()
    for text in ("{", "[]", '[{"accuracy": 1}]'):
        report.write_text(text)
        with pytest.raises(UserError, match="holds no report card"):
            plots.main()
    report.write_text(json.dumps(rows))
    plots.main()
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in capsys.readouterr().out
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.main()
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Base", "SFT"] and axis.yaxis_inverted()
    assert [bar.lines[0].get_xdata()[0] for bar in axis.containers] == [0.0, 0.66]
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers]
    assert ends == [pytest.approx([0.0, 0.007]), pytest.approx([0.618, 0.7])]


def test_a_study_against_another_axis(tmp_path, monkeypatch):
    """The x of a curve NAME@x is a mean over seeds, its values are not smoothed; the trained length is marked."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    values = [float(i) for i in range(24)]
    rows = [
        {"trained_length": 64, "curves": {"val_loss@seconds": [[k * x for x in values], values],
         "loss@position": [values, values], "reward": [values, values]}}
        for k in (1, 3)
    ]  # fmt: skip
    rows[0]["curves"]["val_loss@seconds-first"] = [[0.0, 1.0], [-1.0, 2.0]]
    curves = ["val_loss@seconds", "loss@position", "reward", "val_loss@seconds-first"]
    plots.plot_study({("", "a"): rows}, tmp_path / "p.png", curves, [], {"val_loss": "validation loss"})
    seconds, position, step, difference = figures[0].axes[:4]
    assert difference.get_title() == "validation loss, minus the first's" and difference.get_xlabel() == "seconds"
    assert list(difference.lines[1].get_ydata()) == [-1.0, 2.0]
    assert (seconds.get_xlabel(), position.get_xlabel(), step.get_xlabel()) == ("seconds", "position", "step")
    assert seconds.get_title() == "validation loss"
    assert list(seconds.lines[0].get_xdata()) == [2 * x for x in values]
    assert list(seconds.lines[0].get_ydata()) == values
    assert [list(line.get_xdata()) for line in position.lines[1:]] == [[64, 64]] and len(seconds.lines) == 1
    assert list(step.lines[0].get_ydata())[-1] == 22.0  # against steps: the mean of the last three
