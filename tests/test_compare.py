"""compare: the grid, its crashes and its resume with a fast learner on pixels."""
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from medxfer_nb.backbones import create_model
from medxfer_nb.compare import _key, compare
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.measures import brier
from medxfer_nb.study import Arm, load_study
from medxfer_nb.transfer import STRATEGIES, Strategy, transfer

module = import_module("medxfer_nb.compare")  # medxfer_nb.compare is the function

PAIR = ("scratch", "fully_connected")


@pytest.fixture
def ds():
    "120 pictures of 40 patients whose brightness tells the class, more or less."
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 3)
    y = rng.integers(0, 2, 120)
    images = np.clip(100 + 25 * y[:, None, None] + rng.normal(0, 60, (120, 6, 6)), 0, 255).astype(np.uint8)
    split = np.select([group < 20, group < 24], ["train", "val"], "test")
    table = pd.DataFrame({"id": np.arange(120), "group": group, "split": split, "bright": y})
    return ImageSet(images, table, {"bright": Task("bright", "binary", ("dark", "bright"))}, Info("toy", "toy", "none", "none", "made here"))


class Pixels:
    "In place of a network, which takes seconds: logistic regression on pixels; remembers what it was given."

    def __init__(self): self.given, self.shared = [], set()

    def __call__(self, ds, strategy, n, seed, size, checkpoint, precision, shared, backbone="", net_a=None):
        self.shared.add(shared)
        few = ds.split("train").few(n or 60, seed)
        self.given.append((strategy.name, seed, tuple(few.table["id"])))
        penalty = 1.0 if strategy.name == "scratch" else 1e-4
        model = LogisticRegression(C=penalty).fit(few.images.reshape(len(few), -1) / 255, few.target())
        return SimpleNamespace(predict_proba=lambda test: model.predict_proba(test.images.reshape(len(test), -1) / 255), seconds=0.5, flops=1e6)


@pytest.fixture
def pixels(monkeypatch):
    learner = Pixels()
    monkeypatch.setattr(module, "transfer", learner)
    return learner


def test_every_strategy_gets_the_same_images(ds, pixels):
    compare(ds, PAIR, budgets=30, seeds=3)
    drawn = {(name, seed): ids for name, seed, ids in pixels.given}
    assert all(drawn["scratch", s] == drawn["fully_connected", s] for s in range(3))
    assert len({drawn["scratch", s] for s in range(3)}) == 3


@pytest.mark.parametrize("budgets, shared", [(30, False), ((30, 50), False), ((30, "all"), True), (60, True)])
def test_who_asks_for_all_images_has_frozen_stages_computed_once(ds, pixels, budgets, shared):
    compare(ds, PAIR, budgets, seeds=2)
    assert pixels.shared == {shared}


def test_study_is_scored_on_the_test_patients(ds, pixels):
    study = compare(ds, PAIR, budgets=30, seeds=2)
    test = ds.split("test")
    assert np.array_equal(study.groups, test.groups) and np.array_equal(study.y, test.target())
    assert study.table.shape == (2, 2) and study.table.notna().all(axis=None)
    assert "48 test images of 16 patients, 2 seeds" in repr(study) and "missing" not in repr(study)


def test_unlabelled_test_images_are_left_out(ds, pixels):
    rows = np.flatnonzero(ds.table["split"] == "test")[:5]
    ds.table.loc[rows, "bright"] = -1
    assert len(compare(ds, PAIR[:1], budgets=30, seeds=1).y) == 43


def test_resume_gives_the_same_table_without_training(ds, pixels, tmp_path):
    first = compare(ds, PAIR, budgets=30, seeds=2, folder=tmp_path)
    again = compare(ds, PAIR, budgets=30, seeds=2, folder=tmp_path)
    assert len(pixels.given) == 4 and first.table.equals(again.table) and first.seconds == again.seconds
    assert str(first.verdict(*PAIR)) == str(again.verdict(*PAIR))
    compare(ds, PAIR, budgets=30, seeds=3, folder=tmp_path)
    assert len(pixels.given) == 6


def test_data_are_hashed_once_a_study_and_only_for_a_folder(ds, pixels, monkeypatch, tmp_path):
    hashed, content = [], module._content
    monkeypatch.setattr(module, "_content", lambda ds: hashed.append(ds) or content(ds))
    compare(ds, PAIR, budgets=30, seeds=2)
    assert not hashed
    compare(ds, PAIR, budgets=30, seeds=2, folder=tmp_path)
    assert len(hashed) == 1 and len(list(tmp_path.iterdir())) == 4


def test_other_pixels_or_labels_or_splits_are_other_runs(ds, pixels, tmp_path):
    brighter = ds.images.copy()
    brighter[0, 0, 0] ^= 1
    moved = ds.table.assign(split=ds.table["split"].replace({"val": "train"}))
    others = ds, replace(ds, images=brighter), replace(ds, table=moved), ds.shuffled(0), replace(ds, info=replace(ds.info, flip=not ds.info.flip))
    for other in others: compare(other, PAIR[:1], budgets=30, seeds=1, folder=tmp_path)
    assert len(pixels.given) == len(list(tmp_path.iterdir())) == 5


def test_another_setting_is_another_run(ds, pixels, tmp_path):
    for budget, name in ((20, "lite"), (30, "lite"), (30, "resnet18")): compare(ds, PAIR[1:], budget, 1, name, folder=tmp_path)
    compare(ds.shuffled(0), PAIR[:1], budgets=30, seeds=1, folder=tmp_path)
    assert len(pixels.given) == len(list(tmp_path.iterdir())) == 4


def test_a_grid_has_an_arm_for_each_cell_and_one_for_a_strategy_with_its_own_backbone(ds, pixels):
    study = compare(ds, PAIR, budgets=(10, "all"), seeds=2, backbones=["lite", "resnet18"])
    assert set(study.arms) == {f"{a}, n={n}" for n in (10, 60) for a in ("scratch", "fully_connected, lite", "fully_connected, resnet18")}
    assert len(pixels.given) == 12 and sorted({len(ids) for *_, ids in pixels.given}) == [10, 60]
    grid, scores = study.grid(), study.summary()["AUROC"]
    assert grid.loc[(10, "scratch"), "lite"] == ""
    assert grid.loc[(60, "fully_connected"), "resnet18"] == scores["fully_connected, resnet18, n=60"]


def test_validation_predictions_choose_and_are_no_test_predictions(ds, pixels, tmp_path):
    study = [compare(ds, PAIR, 30, 2, folder=tmp_path) for _ in range(2)][1]
    valid = ds.split("val")
    assert np.array_equal(study.valid.y, valid.target()) and study.valid.predictions["scratch", 1].shape == (len(valid), 2)
    assert study.valid.table.shape == (2, 2) and study.valid.summary().loc["scratch", "seconds"] == 0.5


def test_no_validation_split_is_no_error(ds, pixels):
    ds = ds.take(np.flatnonzero(ds.table["split"] != "val"))
    assert compare(ds, PAIR, 30, 1).valid is None


def test_labels_needed_looks_up_the_curve(ds, pixels):
    study = compare(ds, PAIR, budgets=(10, 20, 40), seeds=3)
    def put(strategy, n, quality):
        noise = 0.5 * np.random.default_rng(n).normal(size=(3, len(study.y)))
        for s in range(3): study.predictions[f"{strategy}, n={n}", s] = norm.cdf(quality * (study.y - 0.5) + noise[s])
    for i, n in enumerate((10, 20, 40)): put("scratch", n, 0.3 + 0.3 * i); put("fully_connected", n, 0.6 + 0.3 * i)
    study._cache.clear()
    scores = study.table.mean(axis=1)
    goal, low, high = scores["scratch, n=40"], scores["fully_connected, n=10"], scores["fully_connected, n=20"]
    needed = study.labels_needed("fully_connected", "scratch")
    assert low < goal <= high and needed.low <= needed.value <= needed.high
    assert np.isclose(needed.value, 10 * 2 ** ((goal - low) / (high - low)))
    assert study.labels_needed("scratch", "fully_connected").value == np.inf
    with pytest.raises(MedxferError, match="one budget"): compare(ds, PAIR, 20, 2).labels_needed("fully_connected", "scratch")
    upside_down = replace(study, metric=brier)                      # less is better, and the order of the budgets is the same
    assert 10 < upside_down.labels_needed("fully_connected", "scratch").value < 20
    for s in range(3): del study.predictions["scratch, n=40", s]
    with pytest.raises(MedxferError, match="run the study to its end"): study.labels_needed("fully_connected", "scratch")


def test_several_backbones_must_be_named_for_labels_needed(ds, pixels):
    study = compare(ds, PAIR, budgets=(10, 20), seeds=2, backbones=["lite0", "lite1"])
    with pytest.raises(MedxferError, match="backbone"): study.labels_needed("fully_connected", "scratch")
    assert study.labels_needed("fully_connected", "scratch", backbone="lite1").value >= 10


def test_networks_of_ones_own_are_told_apart_by_their_weights(ds, tmp_path):
    nets = {f"seed {s}": create_model("small_cnn", False, num_classes=2, size=32, seed=s) for s in (0, 1)}
    study = compare(ds, ["feature_extraction"], 20, 1, nets, folder=tmp_path)
    assert set(study.arms) == {"feature_extraction, seed 0", "feature_extraction, seed 1"} and len(list(tmp_path.iterdir())) == 2
    again = compare(ds, ["feature_extraction"], 20, 1, {"other name": nets["seed 1"]}, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and again.table.iloc[0, 0] == study.table.iloc[1, 0]


def test_two_workers_find_what_one_finds_and_leave_no_checkpoint(ds, tmp_path):
    short = replace(STRATEGIES["scratch"], phases=(replace(STRATEGIES["scratch"].phases[0], epochs=2),))
    one, two = (compare(ds, [short], 20, 2, "small_cnn", size=32, folder=tmp_path / str(w), workers=w) for w in (1, 2))
    assert np.allclose(one.table, two.table, atol=1e-6) and not two.failed
    assert {f.suffix for f in (tmp_path / "2").iterdir()} == {".npz"}


def test_a_damaged_file_is_trained_again(ds, pixels, tmp_path):
    first = compare(ds, PAIR[:1], budgets=30, seeds=1, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"not a zip at all"):
        file.write_bytes(damage)
        assert compare(ds, PAIR[:1], budgets=30, seeds=1, folder=tmp_path).table.equals(first.table)
        assert file.read_bytes()[:2] == b"PK"
    assert len(pixels.given) == 4


def failing(learner, exception):
    def train(ds, strategy, **options):
        if (strategy.name, options["seed"]) == ("fully_connected", 1): raise exception
        return learner(ds, strategy, **options)
    return train


def test_a_crash_leaves_the_finished_runs(ds, pixels, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "transfer", failing(pixels, RuntimeError("out of memory")))
    study = compare(ds, PAIR, budgets=30, seeds=3, folder=tmp_path)
    assert len(study.predictions) == 5 and study.done(*PAIR) == [0, 2]
    assert "fully_connected, seed 1: RuntimeError: out of memory" in repr(study) and np.isnan(study.table.loc["fully_connected", 1])
    assert "2 seeds" in study.verdict(*PAIR).sentence
    monkeypatch.setattr(module, "transfer", pixels)
    assert compare(ds, PAIR, budgets=30, seeds=3, folder=tmp_path).table.notna().all(axis=None) and len(pixels.given) == 6


def test_an_interrupt_leaves_the_finished_runs(ds, pixels, monkeypatch, capsys):
    monkeypatch.setattr(module, "transfer", failing(pixels, KeyboardInterrupt()))
    study = compare(ds, PAIR, budgets=30, seeds=3)
    assert sorted(study.predictions) == [("fully_connected", 0), ("scratch", 0), ("scratch", 1)]
    assert "stopped after 3 of 6 runs" in capsys.readouterr().out and "scratch, seed 2: not run" in repr(study)
    study.plot()


def test_when_every_run_fails_the_reason_is_raised(ds, monkeypatch):
    def train(*args, **options): raise MedxferError("unknown backbone 'resnet81'")
    monkeypatch.setattr(module, "transfer", train)
    with pytest.raises(MedxferError, match="resnet81"): compare(ds, PAIR, budgets=30, seeds=2)


def test_mistakes_are_named_before_any_training(ds, pixels, tmp_path):
    with pytest.raises(MedxferError, match="did you mean 'fine_tuning'"): compare(ds, ["fine_tunning"], budgets=30)
    with pytest.raises(MedxferError, match="has 60 labelled pictures"): compare(ds, budgets=61)
    with pytest.raises(MedxferError, match="twice"): compare(ds, ["scratch", "scratch"], budgets=30)
    with pytest.raises(MedxferError, match="seeds"): compare(ds, PAIR, budgets=30, seeds=0)
    ds.tasks["bright"] = Task("bright", "regression")
    with pytest.raises(MedxferError, match="regression task"): compare(ds, budgets=30)
    assert not pixels.given


def test_an_unknown_strategy_in_a_question_suggests_the_nearest(ds, pixels):
    study = compare(ds, PAIR, budgets=30, seeds=2)
    with pytest.raises(MedxferError, match="did you mean 'scratch'"): study.verdict("fully_connected", "scrach")


def test_a_strategy_value_is_as_good_as_its_name(ds, pixels):
    by_value, by_name = compare(ds, [STRATEGIES["scratch"]], budgets=30, seeds=1), compare(ds, ["scratch"], budgets=30, seeds=1)
    assert by_value.table.equals(by_name.table)


def test_names_of_lesson_strategies_are_known(ds, pixels):
    with pytest.raises(MedxferError, match="did you mean 'l2_sp'"): compare(ds, ["l2sp"], budgets=30)
    assert compare(ds, ["l2_sp"], budgets=30, seeds=1).arms == {"l2_sp": Arm("l2_sp", "tf_efficientnet_lite0", 30)}


def test_a_finished_run_is_found_again_by_another_process():
    def strategy():
        def prepare(net, train, rest, seed, checkpoint): return train
        return Strategy("s", "s", prepare=prepare)
    a, b = strategy(), strategy()               # the same function at two places in memory
    assert repr(a) != repr(b) and _key((1, 2, 3, 4), a, 30) == _key((1, 2, 3, 4), b, 30) != _key((1, 2, 3, 4), a, 31)


def test_shuffled_labels_give_no_evidence(ds, pixels):
    words = [compare(ds.shuffled(seed), PAIR, budgets=30, seeds=5).verdict(*PAIR).word for seed in range(10)]
    assert words.count("no evidence") >= 8


# --- probes are solved together ---


def lite(seed=0): return create_model("small_cnn", pretrained=False, size=32, seed=seed)


def test_solved_together_is_solved_one_by_one(ds):
    net = lite()
    study = compare(ds, ["feature_extraction"], (10, 30, "all"), 2, {"mine": net})
    for n, whole in ((10, 10), (30, 30), (60, None)):
        for seed in range(2):
            run = transfer(ds, "feature_extraction", n=whole, seed=seed, net_a=net)
            np.testing.assert_allclose(study.predictions[f"feature_extraction, n={n}", seed], run.predict_proba(ds.split("test")), atol=1e-4)
            assert study.flops[f"feature_extraction, n={n}", seed] == run.flops > 0
    assert (study.table.loc["feature_extraction, n=60"].nunique(), len(study.valid.predictions)) == (1, 6)


def test_probes_and_trainings_share_a_study_and_its_folder(ds, pixels, tmp_path):
    arms = ["feature_extraction", "scratch"]
    study = compare(ds, arms, 20, 2, {"mine": lite()}, folder=tmp_path)
    assert {name for name, *_ in pixels.given} == {"scratch"} and len(list(tmp_path.glob("*.npz"))) == 4
    pixels.given.clear()
    again = compare(ds, arms, 20, 2, {"mine": lite()}, folder=tmp_path)
    assert again.table.equals(study.table) and again.flops == study.flops and not pixels.given


def test_a_probe_that_fails_leaves_the_trainings(ds, pixels, monkeypatch):
    def broken(*_): raise MedxferError("no room")
    monkeypatch.setattr(module, "features", broken)
    study = compare(ds, ["feature_extraction", "scratch"], 20, 2, {"mine": lite()})
    assert len(study.predictions) == 2 and "feature_extraction, seed 0: MedxferError: no room" in repr(study)


def test_a_probe_with_a_backbone_of_its_own_is_not_solved_on_another(ds, monkeypatch):
    monkeypatch.setattr(import_module("medxfer_nb.transfer"), "_ready", lambda name, size: {"one": lite(0), "two": lite(1)}[name])
    own = replace(STRATEGIES["feature_extraction"], name="own", backbone="two")
    study = compare(ds, ["feature_extraction", own], 20, 1, "one")
    for name, seed in (("feature_extraction", 0), ("own", 1)):
        expected = compare(ds, ["feature_extraction"], 20, 1, {"mine": lite(seed)}).predictions["feature_extraction", 0]
        np.testing.assert_allclose(study.predictions[name, 0], expected, atol=1e-6)
    assert not np.allclose(study.predictions["own", 0], study.predictions["feature_extraction", 0], atol=1e-3)


def test_a_probe_with_a_size_of_its_own_is_not_solved_on_other_pictures(ds, monkeypatch):
    monkeypatch.setattr(import_module("medxfer_nb.transfer"), "_ready", lambda name, size: create_model("small_cnn", False, size=size))
    own = replace(STRATEGIES["feature_extraction"], name="own", size=48)
    study = compare(ds, ["feature_extraction", own], 20, 1, "one", size=64)
    for name, size in (("feature_extraction", 64), ("own", 48)):
        expected = transfer(ds, own, n=20, net_a=create_model("small_cnn", False, size=size)).predict_proba(ds.split("test"))
        np.testing.assert_allclose(study.predictions[name, 0], expected, atol=1e-4)
    assert not np.allclose(study.predictions["own", 0], study.predictions["feature_extraction", 0], atol=1e-3)


def test_networks_that_differ_in_the_head_alone_are_other_sources():
    net, other = lite(), lite()
    other.reset_classifier(5, seed=1)
    assert module._source(net) == module._source(lite()) != module._source(other)


# --- an earlier study goes on ---


def test_known_runs_are_taken_over(ds, pixels, tmp_path):
    compare(ds, PAIR, 20, 2).save(tmp_path / "first.npz")
    pixels.given.clear()
    more = compare(ds, PAIR, 20, 3, known=load_study(tmp_path / "first.npz"))
    assert {seed for _, seed, _ in pixels.given} == {2} and more.table.equals(compare(ds, PAIR, 20, 3).table)
    assert len(more.valid.predictions) == len(more.seconds) == len(more.flops) == 6


def test_only_what_belongs_to_the_study_is_taken_over(ds, pixels):
    first = compare(ds, PAIR, (20, 30), 3)
    pixels.given.clear()
    assert compare(ds, PAIR[:1], 20, 2, known=first).failed == {} and len(pixels.given) == 2        # with one budget, the arms have other names
    assert list(compare(ds, PAIR[:1], (20, 30), 2, known=first).predictions) == [(f"scratch, n={n}", s) for s in range(2) for n in (30, 20)]
    assert len(pixels.given) == 2


def test_a_study_of_other_images_is_refused(ds, pixels):
    first = compare(ds, PAIR, 20, 2)
    with pytest.raises(MedxferError, match="other images"): compare(ds.shuffled(1), PAIR, 20, 2, known=first)
    first.valid = None
    with pytest.raises(MedxferError, match="other images"): compare(ds, PAIR, 20, 2, known=first)
