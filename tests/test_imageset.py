"Image sets: kinds of answers, coarse and fine, splits by patient, small draws, shuffled labels, identical pictures."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task, coarse_proba, coarse_target, fingerprints, leaks, linked, split_by_group


def random_set(n=60, patients=20, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    group = np.arange(n) % patients
    y = rng.integers(0, classes, n)
    table = pd.DataFrame(dict(id=range(n), group=group, split=split_by_group(group, y), label=y))
    images = rng.integers(0, 255, (n, 28, 28), dtype=np.uint8)
    kind = "binary" if classes == 2 else "multiclass"
    return ImageSet(images, table, {"label": Task("label", kind, tuple(map(str, range(classes))))}, Info("random", "noise", "none", "CC0", "here"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)), min_size=1, max_size=80), st.integers(0, 99))
def test_no_patient_is_ever_in_two_splits(rows, seed):
    groups, labels = np.array(rows).T
    split = split_by_group(groups, labels, seed=seed)
    assert pd.DataFrame(dict(g=groups, s=split)).groupby("g")["s"].nunique().max() == 1 and set(split) <= {"train", "val", "test"}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 99))
def test_few_is_balanced_and_nested(n, classes, seed):
    ds = random_set(classes=classes)
    counts = np.bincount(ds.target(), minlength=classes)
    drawn = np.bincount(ds.few(n, seed).target(), minlength=classes)
    assert drawn.sum() == n and all(d == c or d >= drawn.max() - 1 for d, c in zip(drawn, counts))  # short only where the class is used up
    assert set(ds.few(max(1, n // 2), seed).table["id"]) <= set(ds.few(n, seed).table["id"])


def test_few_never_draws_a_picture_without_a_label():
    ds = random_set()
    ds.table.loc[:29, "label"] = -1
    assert set(ds.few(30).table["id"]) == set(range(30, 60))
    with pytest.raises(MedxferError, match="30 labelled"): ds.few(31)


def test_shuffled_keeps_pictures_and_counts_but_breaks_the_link():
    ds = random_set()
    null = ds.shuffled(1)
    assert np.array_equal(null.images, ds.images) and (null.target() != ds.target()).any()
    for s in ("train", "val", "test"): assert null.split(s).target().sum() == ds.split(s).target().sum()


def test_shuffled_moves_the_labels_of_a_patient_together():
    ds = random_set(n=80, patients=20)
    ds.table["label"] = (ds.table["group"] % 2).to_numpy()
    assert ds.shuffled(3).table.groupby("group")["label"].nunique().max() == 1


def test_openings_are_counted_by_all_parts_together():
    ds = random_set()
    ds.shuffled(0).split("test"); ds.split("test")
    assert ds.openings["test"] == 2 and "test opened 2 times" in repr(ds)


def with_task(kind, values, classes=("no", "yes")):
    "A random set of as many pictures as `values`, asked one question of this kind."
    names = list(classes) if kind == "multilabel" else ["label"]
    ds = random_set(len(values), patients=len(values))
    table = ds.table.drop(columns="label").join(pd.DataFrame(values, columns=names))
    return replace(ds, table=table, tasks={"label": Task("label", kind, classes)}, masks=np.zeros((len(values), 28, 28), np.uint8))


@pytest.mark.parametrize("kind, values, left", [
    ("binary", [0, -1, 1, 1], [0, 2, 3]),
    ("multiclass", [2, 0, -1, -1], [0, 1]),
    ("multilabel", [[0, 1], [-1, 1], [0, 0], [-1, -1]], [0, 2]),
    ("regression", [0.0, -1.0, np.nan, 3.0], [0, 1, 3]),
    ("segmentation", [0, 0, 0, 0], [0, 1, 2, 3]),
    ("binary", [-1, -1], []),
])
def test_labelled_keeps_the_pictures_with_an_answer(kind, values, left):
    ds = with_task(kind, values, ("a", "b", "c") if kind == "multiclass" else ("no", "yes"))
    part = ds.labelled()
    assert part.table["id"].tolist() == left and np.array_equal(part.images, ds.images[left]) and len(part.masks) == len(left)
    assert len(part) == len(ds) or part is not ds


def test_labelled_shares_the_count_of_openings():
    ds = with_task("binary", [0, -1, 1, 1] * 5)
    ds.labelled().split("test")
    assert ds.openings["test"] == 1


@pytest.mark.parametrize("kind", ["multilabel", "regression", "segmentation"])
def test_sets_without_classes_are_counted_and_printed(kind):
    ds = with_task(kind, [[0, 1]] * 8 if kind == "multilabel" else [0.5] * 8)
    assert ds.counts()["pictures"].sum() == 8 and list(ds.counts()) == ["pictures", "patients"] and "8 pictures" in repr(ds)


def test_few_draws_no_picture_without_a_number():
    ds = with_task("regression", [1.0, np.nan, 2.0, np.nan])
    assert set(ds.few(2).table["id"]) == {0, 2}
    with pytest.raises(MedxferError, match="2 labelled"): ds.few(3)


def test_a_segmentation_has_no_labels_to_shuffle():
    with pytest.raises(MedxferError, match="segmentation"): with_task("segmentation", [0, 0]).shuffled()


# --- coarse and fine ---


ORGANS = Task("organ", "multiclass", ("liver", "left lung", "kidney", "right lung"), within=("abdomen", "chest", "abdomen", "chest"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=8), st.integers(0, 99))
def test_coarse_probabilities_are_sums_of_the_fine_ones(within, seed):
    task = Task("fine", "multiclass", tuple(map(str, range(len(within)))), within=tuple(within))
    p = np.random.default_rng(seed).dirichlet(np.ones(len(within)), 5)
    summed = pd.DataFrame(p.T).groupby(np.array(within), sort=False).sum().T
    assert np.allclose(coarse_proba(task, p), summed) and np.allclose(coarse_proba(task, p).sum(1), 1)
    sure = np.eye(len(within))
    assert np.array_equal(coarse_proba(task, sure).argmax(1), coarse_target(task, np.arange(len(within))))


def test_coarse_answers_follow_the_names_and_missing_ones_stay_missing():
    y = np.array([0, 1, 2, 3, -1])
    assert coarse_target(ORGANS, y).tolist() == [0, 1, 0, 1, -1]
    assert coarse_target(ORGANS, np.empty(0, int)).tolist() == []


@pytest.mark.parametrize("facts, words", [
    (dict(kind="multilabel", classes=("a", "b"), within=("x", "y")), "exactly one is true"),
    (dict(kind="regression", within=("x",)), "exactly one is true"),
    (dict(kind="multiclass", classes=("a", "b", "c"), within=("x", "y")), "2 coarse classes for 3 classes"),
])
def test_a_hierarchy_needs_one_coarse_class_for_each_fine_one(facts, words):
    with pytest.raises(MedxferError, match=words): Task("t", **facts)


def test_a_task_without_a_hierarchy_has_no_coarse_answer():
    with pytest.raises(MedxferError, match="within="): coarse_target(Task("t", "multiclass", ("a", "b")), np.array([0]))


def organs(**columns):
    ds = with_task("multiclass", [0, 1, 2, 3, -1, 0], ORGANS.classes)
    table = ds.table.rename(columns={"label": "organ"}).assign(**columns)
    return replace(ds, table=table, tasks={"organ": ORGANS} | {c: Task(c, "binary", ("abdomen", "chest")) for c in columns})


def test_coarsened_asks_the_coarse_question_first_and_keeps_the_others():
    ds = organs().coarsened("organ", "region")
    assert list(ds.tasks) == ["region", "organ"] and ds.task == Task("region", "binary", ("abdomen", "chest"))
    assert ds.target().tolist() == [0, 1, 0, 1, -1, 0] and "region" not in organs().table


def test_coarsened_keeps_a_coarse_answer_where_the_fine_one_is_missing():
    assert organs(region=[0, 1, -1, 1, 1, 0]).coarsened("organ", "region").target().tolist() == [0, 1, 0, 1, 1, 0]


def test_coarse_and_fine_answers_that_contradict_are_named():
    with pytest.raises(MedxferError, match="picture 2 is 'kidney', so 'abdomen', but its region is 'chest'"):
        organs(region=[0, 1, 1, 1, -1, 1]).coarsened("organ", "region")
    ds = organs(region=[0, 1, 0, 1, -1, 0])
    ds.tasks["region"] = Task("region", "binary", ("chest", "abdomen"))
    with pytest.raises(MedxferError, match="region has the classes"): ds.coarsened("organ", "region")


# --- identical pictures ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=30))
def test_linked_is_what_hangs_together(rows):
    groups, prints = np.array(rows).T
    name = groups.copy()                                 # the oracle: take the smallest name over and over, until nothing changes
    while True:
        new = pd.Series(pd.Series(name).groupby(groups).transform("min")).groupby(prints).transform("min").to_numpy()
        if np.array_equal(new, name): break
        name = new
    assert np.array_equal(linked(groups, prints), name)


def test_fingerprints_differ_by_one_pixel():
    pictures = np.zeros((3, 4, 4), np.uint8)
    pictures[2, 3, 3] = 1
    a, b, c = fingerprints(pictures)
    assert a == b != c


def test_leaks_names_both_places():
    ds = random_set()
    train, test = (np.flatnonzero(ds.table["split"] == s)[0] for s in ("train", "test"))
    ds.images[test] = ds.images[train]
    assert leaks(ds).to_numpy().tolist() == [[test, "test", train, "train"]]
