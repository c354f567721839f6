"bench: what its README shows is what was measured, and the small programs beside it do what they say."
import json
from importlib import import_module
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return import_module("report")


@pytest.fixture
def results(): return json.loads((BENCH / "results.json").read_text())


def test_readme_shows_the_results(report, results):
    assert report.tables(results) in (BENCH / "README.md").read_text()


def test_results_say_when_where_and_with_what(results):
    assert results["date"] and results["machine"]["cpu"] and results["machine"]["cores"] and {"torch", "fastai"} <= set(results["versions"])


def test_times_are_ratios_and_spread_the_one_time_cost(report):
    epoch = dict(players=dict(ours=dict(min=2.0, once=10.0, phase=5), fastai=dict(min=8.0)))
    assert report.times(epoch, "fastai") == 4 and report.times(epoch, "fastai", once=True) == 2


def test_a_target_that_is_missed_is_said_to_be(report, results):
    slow = json.loads(json.dumps(results))
    slow["probes"]["seconds"], slow["study"]["wall"] = 6.0, 500.0
    reached = {row["what"]: row["reached"] for row in report.targets(slow)}
    assert reached["label study"] == "no" and [v for k, v in reached.items() if "probes" in k] == ["no"]
