"""probes against scikit-learn with tight tolerances, closed forms and invariances, and what is refused."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medxfer_nb import probes
from medxfer_nb.core import MedxferError
from medxfer_nb.probes import Probe, logistic, patient_folds, probe

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHAPES = [(12, 40), (40, 12), (40, 40), (60, 200), (200, 30)]


def some(seed=0, n=60, width=20, classes=2, signal=1.0):
    "Features on different scales that know a little of the class; every class is there."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    x = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) / np.sqrt(width) + signal * rng.normal(size=(classes, width))[y]
    return x * rng.uniform(0.1, 10, width) + rng.normal(size=width), y


def sklearn(x, y, C, weights=None, solver="newton-cholesky"):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, solver=solver, tol=1e-10, max_iter=100_000))
    w = np.ones(len(y)) if weights is None else weights
    return model.fit(x, y, standardscaler__sample_weight=w, logisticregression__sample_weight=w)


def gradient(p, x, y, weights=None):
    "The gradient of f by each weight of the standardised features, and by each intercept."
    w = np.ones(len(y)) if weights is None else weights
    scaler = StandardScaler().fit(x, sample_weight=w)
    truth = np.eye(y.max() + 1)[y][:, -p.coef.shape[-2]:]
    left = w[:, None] * (p.predict_proba(x)[:, -p.coef.shape[-2]:] - truth)
    return np.abs(left.T @ scaler.transform(x) + p.coef * scaler.scale_ / p.C).max(), np.abs(left.sum(0)).max()


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("n, width", SHAPES)
def test_logistic_equals_scikit_learn(n, width, classes, C):
    x, y = some(n=n, width=width, classes=classes)
    ours, theirs = logistic(x, y, C), sklearn(x, y, C)
    fresh = some(seed=1, n=50, width=width)[0]
    for v in (x, fresh): np.testing.assert_allclose(ours.predict_proba(v), theirs.predict_proba(v), atol=1e-5)
    np.testing.assert_allclose(ours.predict_proba(x), sklearn(x, y, C, solver="lbfgs").predict_proba(x), atol=1e-4)
    regression = theirs[-1]
    np.testing.assert_allclose(ours.coef * theirs[0].scale_, regression.coef_, atol=1e-4 * max(1, np.abs(regression.coef_).max()))
    assert ours.coef.shape == regression.coef_.shape and ours.intercept.shape == regression.intercept_.shape


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("n, width", SHAPES)
def test_the_gradient_is_nothing_at_the_solution(n, width, classes):
    x, y = some(n=n, width=width, classes=classes, signal=0.3)
    for C in (*PENALTIES, 1e3):
        assert max(gradient(logistic(x, y, C), x, y)) < 1e-5
    away = logistic(x, y, 1.0)
    assert max(gradient(Probe(1.01 * away.coef, away.intercept, away.C), x, y)) > 1e-3


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [1.0, 1e2, 1e4])
def test_separable_data_with_a_weak_penalty(C, classes):
    x, y = some(n=30, width=100, classes=classes, signal=10)
    ours, theirs = logistic(x, y, C), sklearn(x, y, C)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-5)
    np.testing.assert_allclose(ours.predict_proba(-x), theirs.predict_proba(-x), atol=1e-4)


@pytest.mark.parametrize("width", [5, 60])
def test_a_constant_feature_has_scale_1_and_no_weight(width):
    x, y = some(n=30, width=width)
    x[:, 2], x[:, 3] = 0.1, 1e6 + 0.1
    ours, theirs = logistic(x, y, 0.1), sklearn(x, y, 0.1)
    assert np.abs(ours.coef[:, 2:4]).max() < 1e-12
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-6)
    x[:, 2] = 5                                                           # on new pictures it may change, and changes nothing
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n, width", [(150, 300), (400, 20)])
def test_a_very_rare_class(n, width, classes):
    x, y = some(n=n, width=width, classes=classes)
    y[:] = np.where(np.arange(n) == 7, classes - 1, y % max(classes - 1, 1))      # a single picture of the last class
    for C in (1e-3, 1.0):
        np.testing.assert_allclose(logistic(x, y, C).predict_proba(x), sklearn(x, y, C).predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("n, width", SHAPES)
def test_equal_rows_and_dependent_features(n, width):
    x, y = some(n=n, width=width)
    x, y = np.concatenate([x, x[::-1]]), np.concatenate([y, y[::-1]])
    x = np.concatenate([x, 3 * x[:, ::-1]], axis=1)
    np.testing.assert_allclose(logistic(x, y, 0.1).predict_proba(x), sklearn(x, y, 0.1).predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n, width", [(40, 100), (80, 10)])
def test_weights_are_repeated_rows_and_zero_is_absent(n, width, classes):
    x, y = some(n=n, width=width, classes=classes)
    weights = np.random.default_rng(0).integers(0, 4, (3, n)).astype(float)
    many = logistic(x, y, PENALTIES, weights)
    assert many.coef.shape == (3, 5, 1 if classes == 2 else classes, width) and many.C.shape == (3, 5)
    assert many.predict_proba(x).shape == (3, 5, n, classes)
    for b, w in enumerate(weights.astype(int)):
        again = logistic(np.repeat(x, w, axis=0), np.repeat(y, w), PENALTIES)
        np.testing.assert_allclose(many.predict_proba(x)[b], again.predict_proba(x), atol=1e-5)
        np.testing.assert_allclose(many.predict_proba(x)[b, 2], sklearn(x, y, PENALTIES[2], w).predict_proba(x), atol=1e-5)


def test_fractions_are_weights_too():
    x, y = some()
    weights = np.random.default_rng(0).uniform(0, 2, len(y))
    np.testing.assert_allclose(logistic(x, y, 0.1, weights).predict_proba(x), sklearn(x, y, 0.1, weights).predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_order_of_rows_does_not_matter(classes):
    x, y = some(n=40, width=90, classes=classes)
    order = np.random.default_rng(0).permutation(40)
    a, b = logistic(x, y, PENALTIES), logistic(x[order], y[order], PENALTIES)
    np.testing.assert_allclose(a.predict_proba(x), b.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_whitened_features_may_be_turned(classes):
    x, y = some(n=60, width=12, classes=classes)
    x = np.linalg.svd(x - x.mean(0), full_matrices=False)[0] * np.sqrt(60)          # mean 0, deviation 1, whichever way they are turned
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    a, b = logistic(x, y, PENALTIES), logistic(x @ turn, y, PENALTIES)
    np.testing.assert_allclose(a.predict_proba(x), b.predict_proba(x @ turn), atol=1e-5)
    np.testing.assert_allclose(a.coef @ turn, b.coef, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n, width", SHAPES)
def test_scale_and_shift_of_features_do_not_matter(n, width, classes):
    x, y = some(n=n, width=width, classes=classes)
    a, b = logistic(x, y, 0.1), logistic(100 * x[:, ::-1] + 5, y, 0.1)
    np.testing.assert_allclose(a.predict_proba(x), b.predict_proba(100 * x[:, ::-1] + 5), atol=1e-5)


@given(seed=st.integers(0, 10_000), n=st.integers(4, 30), width=st.integers(1, 30), classes=st.integers(2, 4), C=st.sampled_from([1e-4, 1.0, 30.0]))
@settings(deadline=None, max_examples=60)
def test_random_problems_are_solved(seed, n, width, classes, C):
    x, y = some(seed, n + classes, width, classes)
    assert max(gradient(logistic(x, y, C), x, y)) < 1e-5


def test_a_very_strong_penalty_leaves_the_shares_of_the_classes():
    x, y = some(n=50, classes=2)
    y[:40] = 0
    np.testing.assert_allclose(logistic(x, y, 1e-12).predict_proba(x)[:, 1], y.mean(), atol=1e-6)


def test_a_batch_of_many_parts_is_the_same_as_one_part(monkeypatch):
    x, y = some(n=30, width=50)
    weights = np.random.default_rng(0).integers(1, 3, (7, 30))
    whole = logistic(x, y, PENALTIES, weights).coef
    monkeypatch.setattr(probes, "_parts", lambda count, cells: [slice(i, i + 2) for i in range(0, count, 2)])
    np.testing.assert_allclose(logistic(x, y, PENALTIES, weights).coef, whole, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_computes_the_same_with_one_vector_a_class(classes):
    x, y = some(classes=classes)
    p = logistic(x, y, PENALTIES)
    weight, bias = p.head()
    assert weight.shape == (5, classes, 20) and bias.shape == (5, classes)
    np.testing.assert_allclose(softmax(x @ weight[3].T + bias[3], axis=1), p.predict_proba(x)[3], atol=1e-12)
    np.testing.assert_allclose(weight.sum(-2), 0, atol=1e-6)
    if classes == 2: assert np.array_equal(weight[:, 1] - weight[:, 0], p.coef[:, 0]) and np.array_equal(weight[:, 0], -weight[:, 1])


# --- probe ---


def searched(x, y, groups):
    model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky", tol=1e-10))
    return GridSearchCV(model, {"logisticregression__C": PENALTIES}, scoring="neg_log_loss", cv=patient_folds(y, groups)).fit(x, y)


@pytest.mark.parametrize("n, width, classes", [(60, 20, 2), (60, 90, 2), (60, 90, 3)])
def test_probe_chooses_as_grid_search_does(n, width, classes):
    chosen = set()
    for seed, signal in enumerate((0.0, 0.5)):
        x, y = some(seed, n, width, classes, signal)
        groups, rng = np.arange(n) // 2, np.random.default_rng(seed)
        draws = [rng.permutation(n)[:size] for size in (24, 40)] + [np.arange(n)]
        for draw, p in zip(draws, probe(x, y, groups, draws)):
            theirs = searched(x[draw], y[draw], groups[draw])
            assert p.C == theirs.best_params_["logisticregression__C"]
            np.testing.assert_allclose(p.predict_proba(x), theirs.predict_proba(x), atol=1e-4)
            chosen.add(float(p.C))
    assert len(chosen) > 1


def test_the_log_losses_are_those_of_the_search():
    x, y = some(n=50, width=70, signal=0.5)
    groups = np.arange(50) // 2
    losses = np.zeros(5)
    for a, b in patient_folds(y, groups):
        p = logistic(x, y, PENALTIES, np.isin(np.arange(50), a).astype(float)).predict_proba(x)
        losses -= np.log(p[:, b, y[b]]).mean(1) / len(patient_folds(y, groups))
    np.testing.assert_allclose(-searched(x, y, groups).cv_results_["mean_test_score"], losses, atol=1e-6)


def test_a_hopeless_fold_counts_as_scikit_learn_counts_it():
    x, y = some(n=40, width=2, signal=0)
    x[:, 0] = y + 1e-4 * np.arange(40)
    x[::10, 0] = 1e7 * (1 - 2 * y[::10])                                       # far off on the wrong side
    theirs = searched(x, y, np.arange(40))
    (p,) = probe(x, y, np.arange(40), [range(40)])
    assert p.C == theirs.best_params_["logisticregression__C"]


def test_equal_draws_are_solved_once_whatever_their_order():
    x, y = some(n=40)
    a, b, c, d = probe(x, y, np.arange(40), [range(40), np.arange(40)[::-1], range(30), np.random.default_rng(0).permutation(40)])
    assert a is b is d and c is not a and c.coef.shape == a.coef.shape == (1, 20)


def test_a_probe_alone_is_the_probe_in_a_batch():
    x, y = some(n=80, width=100, classes=3)
    draws = [np.random.default_rng(seed).permutation(80)[:n] for seed in range(3) for n in (30, 50)]
    for draw, p in zip(draws, probe(x, y, np.arange(80), draws)):
        (alone,) = probe(x[draw], y[draw], np.arange(80)[draw], [range(len(draw))])
        assert alone.C == p.C
        np.testing.assert_allclose(alone.predict_proba(x), p.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("groups", [np.zeros(4, int), np.array([0, 0, 1, 1])])
def test_without_folds_the_middle_penalty_is_taken(groups):
    x, y = some(n=4)
    y[:] = [0, 0, 1, 1]
    assert patient_folds(y, groups) == []
    assert probe(x, y, groups, [range(4)])[0].C == 1e-2
    assert probe(x, y, groups, [range(4)], penalties=(5.0,))[0].C == 5
    with_folds, without = probe(np.tile(x, (10, 1)), np.tile(y, 10), np.arange(40), [range(40), [0, 2]])
    assert without.C == 1e-2


@given(seed=st.integers(0, 1000), patients=st.integers(1, 12), classes=st.integers(1, 4))
@settings(deadline=None)
def test_folds_keep_patients_together_and_have_every_class_on_both_sides(seed, patients, classes):
    rng = np.random.default_rng(seed)
    y, groups = rng.integers(0, classes, 30), rng.integers(0, patients, 30)
    folds = patient_folds(y, groups)
    assert len(folds) <= 5
    for a, b in folds:
        assert sorted([*a, *b]) == list(range(30)) and not set(groups[a]) & set(groups[b]) and set(y[a]) == set(y[b]) == set(y)


def test_single_precision_and_tensors_are_taken():
    x, y = some()
    a, b = logistic(torch.tensor(x).float(), torch.tensor(y)), logistic(x.astype(np.float32), y.tolist())
    assert np.array_equal(a.coef, b.coef) and a.coef.dtype == np.float64


def test_the_inputs_are_left_as_they_are():
    x, y = some()
    before = x.copy()
    logistic(x, y, PENALTIES)
    probe(x, y, np.arange(60), [range(60)])
    assert np.array_equal(x, before)


X, Y = some(n=10, width=3)
EACH = np.arange(10)


@pytest.mark.parametrize("call, words", [
    (lambda: logistic(np.where(EACH[:, None] == 3, np.nan, X), Y), "x holds NaN"),
    (lambda: logistic(X[0], Y), "x has shape"),
    (lambda: logistic(np.zeros((10, 0)), Y), "x has shape"),
    (lambda: logistic([["a"]], [0]), "numbers only"),
    (lambda: logistic(X, Y[:5]), "y 5"),
    (lambda: logistic(X, 0 * Y), "only class 0"),
    (lambda: logistic(X, 2 * Y), "no row of class 1"),
    (lambda: logistic(X, Y - 1), "class numbers"),
    (lambda: logistic(X, Y / 2), "class numbers"),
    (lambda: logistic(X, Y, 0), "C must be above 0"),
    (lambda: logistic(X, Y, [1, -1]), "holds -1"),
    (lambda: logistic(X, Y, np.inf), "C holds NaN or infinite"),
    (lambda: logistic(X, Y, 1, np.ones((2, 9))), "weights 9"),
    (lambda: logistic(X, Y, 1, -np.ones(10)), "not be negative"),
    (lambda: logistic(X, Y, 1, [np.ones(10), Y]), "training set 1 has no row of class 0"),
    (lambda: logistic(X, Y).predict_proba(X[:, :2]), "fitted on 3"),
    (lambda: logistic(X, Y).predict_proba(X[0]), "x has shape"),
    (lambda: probe(X, Y, EACH[:5], [EACH]), "groups 5"),
    (lambda: probe(X, Y, EACH, []), "no draw"),
    (lambda: probe(X, Y, EACH, [[]]), "list of row numbers"),
    (lambda: probe(X, Y, EACH, [Y > 0]), "list of row numbers"),
    (lambda: probe(X, Y, EACH, [[0, 10]]), "rows 0 to 9"),
    (lambda: probe(X, Y, EACH, [[-1, 2]]), "rows 0 to 9"),
    (lambda: probe(X, Y, EACH, [EACH, np.flatnonzero(Y == 1)]), "training set 1 has no row of class 0"),
    (lambda: probe(X, Y, EACH, [EACH], penalties=()), "penalties has shape"),
    (lambda: probe(X, Y, EACH, [EACH], penalties=(1, 0)), "penalties must be above 0"),
])
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(MedxferError, match=words): call()


def test_a_problem_without_a_solution_in_sight_is_an_error(monkeypatch):
    monkeypatch.setattr(probes, "_direction", lambda problems, p, g, live: 0 * g)
    with pytest.raises(MedxferError, match="take a smaller C"): logistic(X, Y)
