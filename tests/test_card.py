import json
import sys

import pytest

import card
from runtime.errors import UserError


def test_a_table_of_several_reports(tmp_path, monkeypatch, capsys):
    """Means by hand, ranges of accuracies only, an empty cell where a stage has no such figure, no stage that one
    report lacks."""
    reports = (
        [
            {"stage": "SFT", "accuracy": 0.5, "low": 0, "high": 1, "n": 9, "bits_per_byte": 1.0, "longer": 0.0},
            {"stage": "Reward model", "accuracy": 0.9, "low": 0, "high": 1, "n": 9, "AUC": 0.8},
            {"stage": "KTO", "accuracy": 0.9, "low": 0, "high": 1, "n": 9},
        ],
        [
            {"stage": "Reward model", "accuracy": 1.0, "low": 0, "high": 1, "n": 9, "AUC": 0.9},
            {"stage": "SFT", "accuracy": 0.7, "low": 0, "high": 1, "n": 9, "bits_per_byte": 2.0, "longer": 0.1},
        ],
    )
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows in zip(paths, reports):
        path.write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["card.py", *map(str, paths)])
    card.main()
    assert capsys.readouterr().out.splitlines() == [
        "| stage | accuracy | longer | bits per byte | AUC |",
        "| --- | --- | --- | --- | --- |",
        "| SFT | 0.600 (0.500 to 0.700) | 0.050 (0.000 to 0.100) | 1.500 |  |",
        "| Reward model | 0.950 (0.900 to 1.000) |  |  | 0.850 |",
    ]
    monkeypatch.setattr(sys, "argv", ["card.py"])
    with pytest.raises(UserError, match="which reports"):
        card.main()
