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
