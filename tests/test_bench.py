"bench: results that are committed say when and where they were measured, and keep what was asked for."
import json
from importlib import import_module
from pathlib import Path

import pytest

from medxfer_nb.backbones import create_model

BENCH = Path(__file__).parents[1] / "bench"
CAM = json.loads((BENCH / "cam.json").read_text())


def test_results_say_when_and_on_what():
    assert CAM["date"] and CAM["machine"]["cpu"] and CAM["machine"]["cores"] and (CAM["batch"], CAM["size"], CAM["threads"]) == (16, 224, 2)


@pytest.mark.parametrize("row", CAM["rows"], ids=lambda row: row["network"])
def test_class_maps_without_a_backward_pass_are_as_fast_as_promised(row):
    s = row["seconds"]
    ratios = [s["grad-cam"] / s[f"ours, {start}"] for start in ("raw", "cached")]
    assert [row["raw_faster"], row["cached_faster"]] == pytest.approx(ratios)
    assert row["raw_faster"] >= 2.5 and row["largest_difference_of_the_stretched_maps"] < 1e-5
    assert row["cached_faster"] >= 50 or row["network"] == "small_cnn"  # which bench/README.md says: so small a network leaves little to save


def test_the_readme_names_every_program():
    readme = (BENCH / "README.md").read_text()
    helpers = {"common", "ours", "peers", "ceiling"}  # called by run.py
    assert [p.name for p in BENCH.glob("*.py") if p.stem not in helpers and f"bench/{p.name}" not in readme] == []


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return import_module("report")


@pytest.fixture
def results(): return json.loads((BENCH / "results.json").read_text())


def test_the_readme_shows_the_results(report, results):
    assert report.tables(results) in (BENCH / "README.md").read_text()
    assert results["date"] and results["machine"]["cpu"] and results["machine"]["cores"] and {"torch", "fastai"} <= set(results["versions"])
    assert results["data"]["name"] == "breastmnist" and not results["study"]["failed"]


def test_times_are_ratios_and_spread_the_one_time_cost(report):
    epoch = dict(players=dict(ours=dict(min=2.0, once=10.0, phase=5), fastai=dict(min=8.0)))
    assert report.times(epoch, "fastai") == 4 and report.times(epoch, "fastai", once=True) == 2


def test_a_target_that_is_missed_is_said_to_be(report, results):
    slow = json.loads(json.dumps(results))
    slow["probes"]["seconds"], slow["study"]["wall"] = 6.0, 500.0
    for epoch in slow["epochs"]: epoch["players"]["fastai"]["min"] = epoch["players"]["ours"]["min"]
    assert {row["reached"] for row in report.targets(slow) if row["what"] != "full fine-tuning in it"} == {"no"}
    for epoch in slow["epochs"]: epoch["players"]["fastai"]["min"] = 1000 * epoch["players"]["ours"]["min"]
    slow["probes"]["seconds"], slow["study"]["wall"], slow["study"]["seconds"]["fine_tuning"] = 4.0, 400.0, 300.0
    assert {row["reached"] for row in report.targets(slow)} == {"yes"}


@pytest.mark.parametrize("share, most", [(1.0, 1.0), (0.5, 4 / 3), (0.01, 34.0)])
def test_what_skipping_frozen_stages_can_give(report, share, most):
    "A pass forward costs 1, of the trained share backward twice that share; what is left is three times the share."
    ceiling = {"2": dict(steps=dict(net=dict(partial=share)))}
    assert report.partial_bound(dict(ceiling=ceiling), dict(threads=2, network="net")) == pytest.approx(most)


def test_a_step_moves_what_is_trained_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    module, nets = import_module("step"), []
    monkeypatch.setattr(module, "create_model", lambda *args, **kwargs: nets.append(create_model(*args, **kwargs)) or nets[-1])
    step = module.stepper("last two stages", 2, False)
    before = {name: v.clone() for name, v in nets[0].state_dict().items()}
    step()
    moved = {name.split(".")[1] for name, v in nets[0].stages.named_parameters(prefix="stages") if not v.equal(before[name])}
    assert moved == set(nets[0].stage_names[-2:])
    assert module.parts(step, 1).between(0, 100).all() and set(module.in_turns({"one": step}, 1).index) == {"one"}
