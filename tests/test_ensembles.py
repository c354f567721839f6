"ensembles against numpy, scikit-learn and torch, and against members that remember what they were shown."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch.optim.swa_utils import AveragedModel

from medxfer_nb.backbones import create_model, extract
from medxfer_nb.core import MedxferError
from medxfer_nb.ensembles import (
    RULES,
    Ensemble,
    Stack,
    average_weights,
    concatenate_features,
    diversity,
    fit_weights,
    greedy_soup,
    mean_proba,
    out_of_fold,
    refresh_bn,
    walk_line,
)
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.training import fit, predict_proba
from medxfer_nb.transfer import fit_probe

seeds = st.integers(0, 10_000)


def some(seed=0, m=3, n=40, k=2):
    "Probabilities of `m` members that know something, and the labels."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    scores = rng.normal(size=(m, n, k)) + 1.5 * np.eye(k)[y] * rng.uniform(0, 2, (m, 1, 1))
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True), y


def pictures(patients=12, each=3, classes=2, side=32, seed=0):
    "Patients with several pictures; the brighter, the higher the class."
    rng, n = np.random.default_rng(seed), patients * each
    group = np.repeat(np.arange(patients), each)
    y = group % classes
    x = (rng.integers(0, 100, (n, side, side)) + 60 * y[:, None, None]).astype(np.uint8)
    table = pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], group=group, split="train", label=y))
    kind = "binary" if classes == 2 else "multiclass"
    return ImageSet(x, table, {"label": Task("label", kind, tuple("abcd"[:classes]))}, Info("made", "made", "made", "none", "here"))


def small(seed=0, classes=2, name="mobilenet_v3_small"): return create_model(name, pretrained=False, num_classes=classes, size=32, seed=seed)


class Spy:
    "A member that says whom it was trained on, and fails when it is asked about one of them."

    def __init__(self, ds): self.seen, self.share = set(ds.groups), np.bincount(ds.target(), minlength=len(ds.task.classes)) / len(ds)

    def predict_proba(self, ds):
        assert not self.seen & set(ds.groups)
        return np.tile(self.share, (len(ds), 1))


def brightness(ds): return (ds.images.mean((1, 2)) / 255)[:, None]


class Bright:
    "A member that can be written in scikit-learn too: logistic regression on the mean gray value."

    def __init__(self, ds, C=1.0): self.model = LogisticRegression(C=C).fit(brightness(ds), ds.target())

    def predict_proba(self, ds): return self.model.predict_proba(brightness(ds))


def faint(ds): return Bright(ds, 1e-2)


# --- probabilities ---


@settings(max_examples=40, deadline=None)
@given(seed=seeds, m=st.integers(1, 5), k=st.integers(2, 4))
def test_mean_equals_numpys_and_is_never_worse_than_the_average_member(seed, m, k):
    p, y = some(seed, m, k=k)
    np.testing.assert_allclose(mean_proba(p), np.mean(p, 0))
    np.testing.assert_allclose(mean_proba(list(p)).sum(1), 1)
    assert log_loss(y, mean_proba(p)) <= np.mean([log_loss(y, q) for q in p]) + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=seeds, m=st.integers(1, 5), k=st.integers(2, 4))
def test_weights_lie_on_the_simplex_and_no_other_mixture_is_better(seed, m, k):
    p, y = some(seed, m, k=k)
    w = fit_weights(p, y)
    assert w.min() >= 0 and np.isclose(w.sum(), 1)
    others = np.random.default_rng(seed).dirichlet(np.full(m, 0.5), 50)
    least = min(log_loss(y, mean_proba(p, v)) for v in [*others, *np.eye(m), np.full(m, 1 / m)])
    assert log_loss(y, mean_proba(p, w)) <= least + 1e-6


def test_weights_of_two_members_equal_a_search_along_the_line():
    p, y = some(3, 2, n=200)
    found = minimize_scalar(lambda v: log_loss(y, mean_proba(p, [v, 1 - v])), bounds=(0, 1), method="bounded")
    np.testing.assert_allclose(fit_weights(p, y)[0], found.x, atol=1e-3)


def test_a_member_that_is_always_right_gets_all_the_weight():
    y = np.arange(40) % 2
    right = np.eye(2)[y] * 0.98 + 0.01
    p = np.stack([np.full((40, 2), 0.5), right, 1 - right])
    np.testing.assert_allclose(fit_weights(p, y), [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(RULES["best"](p, y)(p), right)


def test_a_member_that_is_sure_and_wrong_gives_finite_weights():
    y = np.arange(20) % 2
    w = fit_weights(np.stack([np.eye(2)[1 - y], np.eye(2)[y] * 0.6 + 0.2]), y)
    np.testing.assert_allclose(w, [0, 1], atol=1e-6)


def test_probabilities_that_are_no_numbers_are_named():
    p, y = some()
    p[0, 0] = np.nan
    with pytest.raises(MedxferError, match="NaN"): fit_weights(p, y)


def test_best_takes_the_member_with_the_least_out_of_fold_loss_wherever_it_is_asked():
    p, y = some(5)
    new, _ = some(6)
    assert np.array_equal(RULES["best"](p, y)(new), new[np.argmin([log_loss(y, q) for q in p])])


def test_stack_turns_a_member_around_that_says_the_opposite():
    y = np.arange(60) % 2
    p = np.full((1, 60, 2), 0.2)
    p[0, np.arange(60), 1 - y] = 0.8
    assert (Stack(p, y)(p).argmax(1) == y).all() and (mean_proba(p).argmax(1) != y).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_stacking_equals_scikit_learns(classes):
    ds, new = pictures(classes=classes), pictures(classes=classes, seed=1)
    y, m = ds.target(), 2
    folds = list(StratifiedGroupKFold(4, shuffle=True, random_state=0).split(y, y, ds.groups))

    def odds(z):
        "What scikit-learn hands over: all columns for three classes, the second for two."
        p = np.stack([1 - z, z], -1) if classes == 2 else z.reshape(len(z), m, classes)
        return (np.log(p[..., 1:]) - np.log(p[..., :1])).reshape(len(z), -1)

    final = make_pipeline(FunctionTransformer(odds), LogisticRegression(max_iter=2000))
    theirs = StackingClassifier([("a", LogisticRegression()), ("b", LogisticRegression(C=1e-2))], final, cv=folds, stack_method="predict_proba")
    theirs.fit(brightness(ds), y)
    ours = Ensemble([Bright(ds), faint(ds)], "stack", out_of_fold([Bright, faint], ds, k=4), y)
    np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(brightness(new)), atol=1e-5)


# --- out of fold ---


@settings(max_examples=15, deadline=None)
@given(seed=seeds, k=st.integers(2, 5), classes=st.integers(2, 3))
def test_out_of_fold_leaves_the_patient_out_and_says_something_of_every_picture(seed, k, classes):
    p = out_of_fold([Spy, Spy], pictures(15, 2, classes), k, seed)
    assert p.shape == (2, 30, classes) and np.allclose(p.sum(-1), 1)


def test_out_of_fold_trains_each_recipe_once_a_fold_on_all_other_patients():
    sizes = []
    out_of_fold([lambda ds: sizes.append(len(ds)) or Spy(ds)], pictures(12, 3), k=4)
    assert len(sizes) == 4 and sum(36 - n for n in sizes) == 36


def test_out_of_fold_equals_cross_val_predict():
    ds = pictures()
    y = ds.target()
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=7).split(y, y, ds.groups)
    theirs = cross_val_predict(LogisticRegression(), brightness(ds), y, cv=list(folds), method="predict_proba")
    np.testing.assert_allclose(out_of_fold([Bright], ds, 3, seed=7)[0], theirs)


def test_out_of_fold_of_a_network_is_repeatable():
    ds = pictures(4)
    def recipe(part): return fit_probe(small(), part)
    assert np.array_equal(*(out_of_fold([recipe], ds, 2) for _ in range(2)))


def test_too_many_folds_missing_labels_and_other_tasks_are_named():
    ds = pictures()
    for k in (1, 7, 100):
        with pytest.raises(MedxferError, match="rarest class has 6 patients"): out_of_fold([Spy], ds, k)
    ds.table.loc[0, "label"] = -1
    with pytest.raises(MedxferError, match="1 pictures have no label"): out_of_fold([Spy], ds)
    ds.tasks = {"label": Task("label", "regression")}
    with pytest.raises(MedxferError, match="regression"): out_of_fold([Spy], ds)


def test_ensemble_predicts_like_a_run_and_its_faults_are_named():
    ds, new = pictures(), pictures(seed=1)
    members, p = [Bright(ds), faint(ds)], out_of_fold([Bright, faint], ds)
    for rule in RULES:
        q = Ensemble(members, rule, p, ds.target()).predict_proba(new)
        assert q.shape == (36, 2) and np.allclose(q.sum(1), 1)
    np.testing.assert_allclose(Ensemble(members).predict_proba(new), (members[0].predict_proba(new) + members[1].predict_proba(new)) / 2)
    with pytest.raises(MedxferError, match="did you mean 'stack'"): Ensemble(members, "stak", p, ds.target())
    for bad in (dict(), dict(p=p[:1], y=ds.target()), dict(p=p, y=ds.target()[1:])):
        with pytest.raises(MedxferError, match="out_of_fold"): Ensemble(members, "weighted", **bad)


# --- diversity ---


def test_diversity_equals_counting():
    p, y = some(2, 2)
    wrong = p.argmax(-1) != y
    row = diversity(p, y, "ab").loc["a / b"]
    assert row["disagree"] == np.mean(p[0].argmax(1) != p[1].argmax(1)) and row["both_wrong"] == np.mean(wrong[0] & wrong[1])
    np.testing.assert_allclose(row["correlation"], np.corrcoef(*[q[np.arange(40), y] for q in p])[0, 1])


def test_a_copy_adds_nothing():
    p, y = some()
    table = diversity(p[[0, 0]], y)
    assert table["disagree"].item() == 0 and np.isclose(table["correlation"].item(), 1)
    assert np.array_equal(mean_proba(p[[0, 0]]), p[0])


# --- features ---


def test_concatenated_features_are_those_of_each_network_in_its_own_normalisation():
    ds, nets = pictures(4), [small(), small(1, name="googlenet"), create_model("tf_efficientnet_lite0", size=32), small(2, name="small_cnn")]
    assert len({net.spec.mean for net in nets}) == 3
    joint = concatenate_features(nets, num_classes=3)
    alone = [extract(net, ds.images) for net in nets]
    assert joint.head.in_features == sum(x.shape[1] for x in alone) and joint.head.out_features == 3
    torch.testing.assert_close(extract(joint, ds.images), torch.cat(alone, 1), atol=1e-4, rtol=1e-3)


def test_concatenation_trains_and_leaves_its_parts_alone():
    ds, net = pictures(4), small()
    before = copy.deepcopy(net.state_dict())
    joint = concatenate_features([net, small(1)])
    run = fit(joint, ds, 1, seed=0)
    assert run.predict_proba(ds).shape == (12, 2)
    assert fit_probe(joint, ds).predict_proba(ds).shape == (12, 2)
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())


def test_networks_that_are_fed_differently_are_refused():
    with pytest.raises(MedxferError, match="fed differently"): concatenate_features([small(), create_model("small_cnn", False, size=64)])


# --- weights ---


def trained(seed):
    "A network whose weights and BatchNorm buffers have moved."
    net = small(seed)
    fit(net, pictures(4), 1, seed=seed)
    return net


def test_the_average_is_the_mean_of_every_tensor_and_keeps_counters_whole():
    nets = [trained(s) for s in range(3)]
    next(m for m in nets[0].modules() if isinstance(m, torch.nn.BatchNorm2d)).num_batches_tracked.fill_(7)
    states = [net.state_dict() for net in nets]
    for name, value in average_weights(nets).state_dict().items():
        assert value.dtype == states[0][name].dtype
        if not value.is_floating_point(): assert torch.equal(value, states[0][name])
        else: torch.testing.assert_close(value, torch.stack([s[name] for s in states]).mean(0))


def test_the_average_equals_torchs():
    nets = [trained(s) for s in range(2)]
    theirs = AveragedModel(nets[0], use_buffers=True)
    for net in nets: theirs.update_parameters(net)
    ours = average_weights(nets).state_dict()
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point(): torch.testing.assert_close(ours[name], value)


def test_the_average_of_a_network_with_itself_is_itself_and_weights_choose():
    a, b = trained(0), trained(1)
    for soup in (average_weights([a, a, a]), average_weights([a, b], [1, 0]), average_weights([b, a], [0, 1])):
        assert all(torch.equal(v, soup.state_dict()[name]) for name, v in a.state_dict().items())
    assert average_weights([a]).head.weight.data_ptr() != a.head.weight.data_ptr()


def test_different_architectures_or_heads_have_no_mean():
    for other in (small(name="small_cnn"), small(classes=3)):
        with pytest.raises(MedxferError, match="different architectures"): average_weights([small(), other])


def test_refreshed_statistics_are_those_of_the_pictures_even_if_batchnorm_was_frozen():
    ds, net = pictures(4), small(name="small_cnn")
    net.requires_grad_(False).bn_eval = True
    refresh_bn(net, ds.images)
    first = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    conv = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad(): x = conv(net.batch(ds.images))
    torch.testing.assert_close(first.running_mean, x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first.running_var, x.var((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert net.bn_eval and not net.training and not any(p.requires_grad for p in net.parameters())


def test_the_line_ends_in_its_two_networks_and_is_flat_between_equal_ones():
    ds, a, b = pictures(4), trained(0), trained(1)
    line = walk_line(a, b, ds, 3)
    for end, net in ((0.0, a), (1.0, b)): assert np.isclose(line.loc[end, "loss"], log_loss(ds.target(), predict_proba(net, ds)), rtol=1e-4)
    assert line.index.tolist() == [0, 0.5, 1] and line["above"].iloc[[0, -1]].tolist() == [0, 0]
    assert np.allclose(walk_line(a, a, ds, 3)["above"], 0, atol=1e-6)


def test_a_greedy_soup_holds_the_best_takes_no_harm_and_leaves_out_a_spoilt_network():
    ds, good = pictures(), fit_probe(small(), pictures(seed=2)).net
    spoilt = copy.deepcopy(good)
    with torch.no_grad(): spoilt.head.weight.neg_(), spoilt.head.bias.neg_()
    soup, chosen = greedy_soup([spoilt, good, copy.deepcopy(good)], ds)
    assert chosen == [1, 2]
    assert all(torch.equal(v, good.state_dict()[name]) for name, v in soup.state_dict().items())
