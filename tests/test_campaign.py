"""A small round of the campaign of faults (campaign.py): trials of each kind, with --slow for each configuration."""

import dataclasses
import os

import campaign
import pytest
from tiny import but_slow

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and kills by signal")
QUICK = "sft, adapters"  # the configuration that takes the least time and writes the most files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("campaign")


@pytest.mark.parametrize("case", but_slow(campaign.ALL, QUICK))
@pytest.mark.parametrize("part", [part for part in campaign.PARTS if part != "kills"])
def test_nothing_is_lost_and_nothing_wrong_accepted(part, case, root):
    campaign.prepare(root, [case])
    for n in range({"flipped bits": 20, "hostile settings": 5, "damaged files": 3}.get(part, 1)):
        result = campaign.trial(root, part, case, n)
        assert not result["wrong"], result


@pytest.mark.parametrize("n", range(3))
def test_damaged_rows_are_refused_or_left_out(n, root):
    assert not campaign.trial(root, "damaged files", "rows", n)["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("case", campaign.ALL)
def test_killed_ten_times_a_run_ends_as_if_never_stopped(case, root):
    campaign.prepare(root, [case])
    result = campaign.trial(root, "kills", case, 0)
    assert result["count"] == campaign.KILLS and not result["wrong"], result


@pytest.mark.parametrize("case", but_slow(campaign.ALL, QUICK, "grpo"))
def test_a_hostile_setting_is_the_only_thing_wrong_with_its_command(case, root):
    """What else stands on the command line is what the configuration says."""
    config = campaign.stages(root)[case].config(root / "run")
    words = [word for field in dataclasses.fields(config) for word in campaign.as_words(config, field)]
    assert campaign.parse(type(config), words) == config


@pytest.mark.slow
def test_the_campaign_sees_what_is_wrong(root, monkeypatch):
    """A checkpoint that is not written in one piece, checksums that nobody looks at, a folder that two may use."""
    campaign.prepare(root, [QUICK])

    def seen(part, trials):
        return [result["wrong"] for n in range(trials) if (result := campaign.trial(root, part, QUICK, n))["wrong"]]

    with monkeypatch.context() as patch:
        patch.setattr(campaign.checkpoint, "check_sums", lambda path: None)
        assert any("other numbers" in wrong for wrong in seen("flipped bits", 10))
    with monkeypatch.context() as patch:
        patch.setattr(campaign.checkpoint, "write_atomically", lambda path, write: write(path))
        patch.setattr("runtime.run.write_atomically", lambda path, write: write(path))
        assert seen("kills", 2)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.lock.hold", lambda folder: None)
        assert seen("runs in one folder", 6)
