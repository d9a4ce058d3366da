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
