"The recipe as a machine: its order, its gates, and what must not change on the way."
import gc
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import bright_or_dark

from medxfer_nb.core import MedxferError
from medxfer_nb.datasets import load
from medxfer_nb.deploy import load_bundle
from medxfer_nb.procedure import STEPS, Procedure, more_views
from medxfer_nb.training import predict_proba
from medxfer_nb.transfer import copy_weights


def split_set(name, seed):
    "48 bright or dark squares in three parts."
    ds = bright_or_dark(48, seed)
    ds.table["split"] = np.repeat(["train", "val", "test"], 16)
    return replace(ds, info=replace(ds.info, name=name), openings=Counter())


def machine(mode="sound", **options):
    asked = dict(n_a=16, enough=24, n_b=16, accuracy=0.6, epochs=8, rest=4) | options
    return Procedure(split_set("A", 0), split_set("B", 1), mode, **asked)


@pytest.mark.parametrize("mode", ["sound", "literal"])
def test_all_steps_run_in_the_articles_order(mode):
    m = machine(mode)
    for name in STEPS:
        assert m.next == name
        m.step()
    assert m.next is None and list(m.record) == list(STEPS) and str(m).count("[x]") == len(STEPS)
    with pytest.raises(MedxferError, match="all steps are done"): m.step()


def test_test_is_opened_once_and_by_the_test_step_alone():
    m = machine().run("train_rest")
    assert m.target.openings["test"] == 0
    assert m.run().target.openings["test"] == 1
    assert machine("literal").run().target.openings["test"] == 2  # it adjusts by the test result


def test_source_weights_copy_and_frozen_layers_stay():
    m = machine().run("freeze")
    before, frozen = copy_weights(m.net_a), [p.clone() for p in m.net_b.stages[0].parameters()]
    m.step()
    assert all(torch.equal(v, before[k]) for k, v in m.net_a.state_dict().items())
    assert all(torch.equal(v, m.weights[k]) for k, v in before.items())
    assert all(torch.equal(p, q) for p, q in zip(m.net_b.stages[0].parameters(), frozen))
    assert not torch.equal(m.net_b.stages[1][0][0].weight, m.net_a.stages[1][0][0].weight)


def test_below_the_wanted_accuracy_it_stays_where_it_was():
    m = machine(accuracy=1.01, epochs=1).run("preprocess")
    with pytest.raises(MedxferError, match="1.01 wanted"): m.step()
    assert m.next == "train_source" and "sample" in m.record


def test_a_changed_source_is_noticed():
    m = machine().run("freeze")
    with torch.no_grad(): m.net_a.head.bias += 1
    with pytest.raises(MedxferError, match="must stay fixed"): m.step()


def test_literal_teaches_with_pictures_of_a_and_sound_with_pictures_of_b():
    assert "of A" in machine("literal").run("choose").record["choose"] and "of B" in machine("sound").run("choose").record["choose"]
    assert len(machine("literal").run("sample").d_a) == 24 and len(machine("sound").run("sample").d_a) == 16


def test_the_threshold_is_the_best_of_the_validation_pictures():
    m = machine().run()
    reached = float(re.search(r"balanced accuracy ([\d.]+)", m.record["adjust"])[1])
    assert 0 <= m.threshold <= 1 and reached >= 0.5


def test_more_views_keep_pictures_labels_and_colour():
    ds = bright_or_dark(6)
    colour = replace(ds, images=np.repeat(ds.images[..., None], 3, -1))
    for one in (ds, colour):
        more = more_views(one, 14, seed=1)
        assert len(more) == 14 and more.images.shape[1:] == one.images.shape[1:] and more.images.dtype == np.uint8
        assert np.array_equal(more.images[:6], one.images) and np.array_equal(more.target(), np.resize(one.target(), 14))
    assert more_views(ds, 3) is ds and not np.array_equal(more_views(ds, 12).images[6:], ds.images)


def test_classes_that_differ_are_refused_in_the_literal_mode():
    b = split_set("B", 1)
    b.tasks = {"bright": replace(b.task, kind="multiclass", classes=("no", "yes", "very"))}
    with pytest.raises(MedxferError, match="mode='sound'"): Procedure(split_set("A", 0), b, "literal")


def test_the_bundles_hold_what_was_tested_and_what_was_adjusted(tmp_path):
    m = machine(folder=tmp_path / "home").run("deploy")
    deployed = {f.name: f.read_bytes() for f in (tmp_path / "home" / "deployed").iterdir()}
    m.run()
    first, second = (load_bundle(tmp_path / "home" / name) for name in ("deployed", "adjusted"))
    assert (first.facts["threshold"], second.facts["threshold"]) == (0.5, m.threshold)
    assert first.facts["training"]["test"] == m.record["test"] and str(m.scores) in (tmp_path / "home" / "deployed" / "README.md").read_text()
    np.testing.assert_allclose(first.predict(m.x.images), predict_proba(m.net_b, m.x), atol=1e-6)
    assert deployed == {f.name: f.read_bytes() for f in (tmp_path / "home" / "deployed").iterdir()}


def test_without_a_folder_the_bundle_goes_with_the_machine():
    m = machine().run("deploy")
    folder = m.folder
    assert (folder / "deployed").is_dir()
    del m
    gc.collect()
    assert not folder.exists()


@pytest.mark.real_data
@pytest.mark.slow
def test_pneumonia_to_breast():
    m = Procedure(load("pneumoniamnist"), load("breastmnist"), n_a=1000, n_b=200, accuracy=0.8, epochs=6).run("test")
    assert m.scores.n == 156 and m.scores.low > 0.5
