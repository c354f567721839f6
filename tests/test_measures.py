"""measures against scikit-learn, with repeated images, on random label sets, and by closed forms."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binomtest
from scipy.stats import t as student
from sklearn import metrics as sk

from medxfer_nb.core import MedxferError
from medxfer_nb.measures import METRICS, average_precision, brier, f1, kappa, label_scores, quadratic_kappa, report, sensitivity_at
from medxfer_nb.metrics import auroc, paired_difference, resamples, score

OURS = [average_precision, f1, sensitivity_at(0.9), sensitivity_at(0.5), sensitivity_at(1), kappa, quadratic_kappa, brier]


def some(seed, n=60, classes=3, decimals=1):
    "Labels with every class present, and probabilities with many ties."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    return y, softmax(np.round(rng.normal(size=(n, classes)) + np.eye(classes)[y], decimals), axis=1)


def sk_sensitivity(specificity):
    def value(y, s, w):
        fpr, tpr, _ = sk.roc_curve(y, s, sample_weight=w, drop_intermediate=False)
        return tpr[fpr <= 1 - specificity + 1e-9].max()
    return value


def one_vs_rest(f):
    def value(y, p, w):
        if p.shape[1] == 2: return f(y == 1, p[:, 1], w)
        return np.mean([f(y == k, p[:, k], w) for k in range(p.shape[1])])
    return value


ORACLES = {
    average_precision: one_vs_rest(lambda y, s, w: sk.average_precision_score(y, s, sample_weight=w)),
    f1: lambda y, p, w: sk.f1_score(y, p.argmax(1), average="binary" if p.shape[1] == 2 else "macro", sample_weight=w),
    **{sensitivity_at(s): one_vs_rest(sk_sensitivity(s)) for s in (0.9, 0.5, 1)},
    kappa: lambda y, p, w: sk.cohen_kappa_score(y, p.argmax(1), sample_weight=w),
    quadratic_kappa: lambda y, p, w: sk.cohen_kappa_score(y, p.argmax(1), weights="quadratic", labels=range(p.shape[1]), sample_weight=w),
    brier: lambda y, p, w: sk.brier_score_loss(y, p if p.shape[1] > 2 else p[:, 1], labels=range(p.shape[1]), scale_by_half=True, sample_weight=w),
}


@pytest.mark.parametrize("metric", OURS, ids=lambda m: m.name)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_equal_sklearn_with_and_without_weights(metric, classes):
    for seed in range(4):
        y, p = some(seed, classes=classes)
        w = np.stack([np.ones(len(y)), np.random.default_rng(seed).integers(1, 4, len(y)), np.random.default_rng(seed).random(len(y))])
        oracle = [ORACLES[metric](y, p, row) for row in w]
        assert np.allclose(metric.values(y, p, w), oracle, rtol=0, atol=1e-12)
        assert metric(y, p) == pytest.approx(oracle[0], abs=1e-12)


@pytest.mark.parametrize("metric", OURS, ids=lambda m: m.name)
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_equal_repeated_images(metric, classes):
    y, p = some(0, classes=classes)
    (w,) = resamples(np.arange(len(y)), n_boot=50, seed=1)
    repeated = [metric(np.repeat(y, row), np.repeat(p, row, axis=0)) for row in w]
    assert np.allclose(metric.values(y, p, w), repeated, rtol=0, atol=1e-12)


@settings(max_examples=1000, deadline=None)
@given(y=st.lists(st.integers(-1, 4), max_size=12), classes=st.integers(2, 4), seed=st.integers(0, 9), patients=st.integers(1, 12))
def test_random_labels_give_a_score_or_a_clear_error(y, classes, seed, patients):
    rng = np.random.default_rng(seed)
    p, groups = softmax(np.round(rng.normal(size=(len(y), classes))), axis=1), rng.integers(0, patients, len(y))
    for metric in OURS:
        try: s = score(metric, y, p, groups, n_boot=100)
        except MedxferError:
            assert not y or min(y) < 0 or max(y) >= classes
            continue
        lone = {f1: classes == 2 and set(y) == {0}, brier: False}.get(metric, len(set(y)) == 1)
        assert "nan" not in str(s) and s.n == len(y) and (s.value is None) == lone and (s.value is not None or "only class" in s.why)
        low, high = sorted((metric.worst, metric.best))
        assert s.low is None or low - 1e-12 <= s.low <= s.high <= high + 1e-12


@given(y=st.lists(st.integers(0, 4), min_size=2, max_size=30).filter(lambda y: len(set(y)) > 1))
@settings(deadline=None, max_examples=60)
def test_perfect_is_best_whichever_classes_are_missing(y):
    missing = set(range(5)) - set(y)
    for metric in OURS:
        s = score(metric, y, np.eye(5)[y], n_boot=100)
        assert s.value == metric(y, np.eye(5)[y]) == metric.best == (metric is not brier)
        assert s.low is None or s.low < s.high
        assert not metric.by_class or all(str(k) in s.why for k in missing)


def test_absent_class_is_left_out_and_named():
    y, p = np.array([0, 1, 0, 1, 1, 0]), softmax(np.random.default_rng(0).normal(size=(6, 3)), axis=1)
    assert "class 2 absent and left out" in score(f1, y, p).why
    assert f1(y, p) == pytest.approx(sk.f1_score(y, p.argmax(1), labels=[0, 1], average="macro"))


@pytest.mark.parametrize("metric", [average_precision, sensitivity_at(0.9), kappa, quadratic_kappa])
def test_one_class_is_not_estimable(metric):
    assert str(score(metric, [1, 1, 1], [0.2, 0.4, 0.9])) == "not estimable (only class 1 is in y)"
    with pytest.raises(MedxferError, match="not estimable: only class 0"): metric([0, 0], [0.2, 0.4])


def test_flawless_results_have_an_exact_bound_only_where_one_is_known():
    y, p = [0, 1] * 10, [0.0, 1.0] * 10
    j, a = (binomtest(n, n).proportion_ci(method="exact").low for n in (10, 20))
    for metric, ends in {f1: (2 * j / (1 + j), 1), brier: (0, 1 - a), average_precision: (None, None), kappa: (None, None)}.items():
        s = score(metric, y, p)
        assert (s.low, s.high) == (pytest.approx(ends[0]), pytest.approx(ends[1])) if ends[0] is not None else (None, None)
        assert ("exact" in s.method) == (ends[0] is not None)


def test_always_wrong_results_mirror_the_bound():
    y, p, a = [1, 0] * 10, [0.0, 1.0] * 10, binomtest(20, 20).proportion_ci(method="exact").low
    assert (score(brier, y, p).low, score(brier, y, p).high) == (pytest.approx(a), 1)
    j = 1 - a                                             # 20 images are of class 1 or called so, and no image is both
    assert (score(f1, y, p).low, score(f1, y, p).high) == (0, pytest.approx(2 * j / (1 + j)))
    assert score(kappa, y, p).value == -1 and score(kappa, y, p).high <= 0


def test_a_constant_value_that_is_not_flawless_gets_no_exact_bound():
    s = score(brier, [0, 1] * 10, [0.2, 0.8] * 10)
    assert s.value == pytest.approx(0.04) and s.low is None and "same value" in s.why


@pytest.mark.parametrize("images", [8, 40])
def test_few_patients_are_said_of_every_metric(images):
    y, p = np.arange(images) % 2, np.where(np.arange(images) % 2, 0.9, 0.1) + np.linspace(-0.05, 0.05, images)
    p[[3, 4]] = 0.12, 0.2
    assert all(s.low is not None and (s.why == "few patients, interval may be too narrow") == (images == 8) for s in report(y, p).score)


def test_paired_difference_of_brier_scores_is_a_mean_of_differences():
    y, p = some(0, classes=2)
    q = np.sqrt(p) / np.sqrt(p).sum(1, keepdims=True)
    s = paired_difference(brier, y, p, q)
    assert s.value == pytest.approx(np.mean((p[:, 1] - y) ** 2 - (q[:, 1] - y) ** 2)) and s.low <= s.value <= s.high


def test_kappa_of_independent_readers_is_nought():
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 3, (2, 200_000))
    assert abs(kappa(y, np.eye(3)[said])) < 0.01 and abs(quadratic_kappa(y, np.eye(3)[said])) < 0.01


@given(seed=st.integers(0, 50))
@settings(deadline=None)
def test_f1_does_not_see_true_negatives_and_ranks_ignore_monotone_transforms(seed):
    y, p = some(seed, classes=2)
    assert f1(np.r_[y, np.zeros(50, int)], np.r_[p[:, 1], np.zeros(50)]) == pytest.approx(f1(y, p), abs=1e-12)
    s = np.round(p[:, 1], 3)
    for metric in (average_precision, sensitivity_at(0.8)): assert metric(y, s) == pytest.approx(metric(y, s**2), abs=1e-12)


def test_registry_finds_each_metric_by_its_own_name():
    assert all(m.name == name for name, m in METRICS.items()) and {"AUROC", "accuracy", "balanced accuracy", "Brier score", "F1"} <= set(METRICS)
    assert METRICS["sensitivity at 90% specificity"] == sensitivity_at(0.9) == sensitivity_at() != sensitivity_at(0.8)


@pytest.mark.parametrize("wrong", [90, 0, -0.1])
def test_wrong_specificity_is_named(wrong):
    with pytest.raises(MedxferError, match="specificity must lie"): sensitivity_at(wrong)


def test_report_is_the_same_as_the_scores():
    y, p = some(1)
    groups = np.arange(len(y)) // 3
    table = report(y, p, groups)
    assert list(table.index) == list(METRICS) and all(table.score[n] == score(m, y, p, groups) for n, m in METRICS.items())
    assert table.best["Brier score"] == 0 and report(y, p, names=["kappa"]).shape == (1, 2)
    with pytest.raises(MedxferError, match="did you mean 'kappa'"): report(y, p, names=["kapa"])


# --- several labels ---


def labelled(seed=0, patients=40):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), 2)
    y = rng.integers(0, 2, (2 * patients, 3))
    return y, np.clip(0.5 + 0.25 * rng.normal(size=y.shape) + 0.2 * (y - 0.5), 0, 1), groups


@pytest.mark.parametrize("metric", list(METRICS.values()), ids=lambda m: m.name)
def test_labels_without_unknowns_are_ordinary_scores_of_the_same_resamples(metric):
    y, p, groups = labelled()
    s = label_scores(metric, y, p, groups)
    assert all(s[f"label {j}"] == score(metric, y[:, j], p[:, j], groups) for j in range(3))
    (w,) = resamples(groups, 2000)
    draws = np.mean([metric.values(y[:, j], np.stack([1 - p[:, j], p[:, j]], 1), w) for j in range(3)], axis=0)
    low, high = sorted((metric.worst, metric.best))
    u = (s["mean"].value - low) / (high - low)
    half = student.ppf(0.975, 39) * np.nanstd(draws) * np.sqrt(40 / 39) / (high - low) / (u * (1 - u))
    assert np.allclose((s["mean"].low, s["mean"].high), [low + (high - low) / (1 + (1 / u - 1) * np.exp(side * half)) for side in (1, -1)])
    assert s["mean"].value == pytest.approx(np.mean([s.iloc[j].value for j in range(3)]))


def test_unknown_answers_do_not_count():
    y, p, groups = labelled()
    unknown = np.random.default_rng(1).random(len(y)) < 0.3
    y[unknown, 1] = -1
    s, other = label_scores(auroc, y, p, groups), np.where(unknown[:, None], 1 - p, p)
    assert s["label 1"].value == auroc(y[~unknown, 1], p[~unknown, 1]) and s["label 1"].n == (~unknown).sum()
    p[:, 1] = other[:, 1]
    assert label_scores(auroc, y, p, groups).equals(s)


@pytest.mark.parametrize("metric", list(METRICS.values()), ids=lambda m: m.name)
def test_label_without_positives_is_named_and_left_out(metric):
    y, p, groups = labelled()
    y[:, 2] = np.where(y[:, 2] == 1, -1, 0)
    s = label_scores(metric, y, p, groups, names=["fluid", "fracture", "tumour"])
    assert s["tumour"].value is None and "no positive" in s["tumour"].why and "tumour left out" in s["mean"].why
    assert s["mean"].value == pytest.approx((s["fluid"].value + s["fracture"].value) / 2)
    y[:] = -1
    assert label_scores(metric, y, p, groups)["mean"].value is None


def test_flawless_labels_share_the_exact_bound():
    y, _, _ = labelled()
    s = label_scores(auroc, y, y.astype(float))["mean"]
    m = [min(column.sum(), len(column) - column.sum()) for column in y.T]
    assert s.value == 1 and s.low == pytest.approx(np.mean([(0.025 / 3) ** (1 / k) for k in m]))


@settings(max_examples=1000, deadline=None)
@given(y=st.lists(st.lists(st.integers(-1, 1), min_size=2, max_size=2), min_size=1, max_size=10), seed=st.integers(0, 9), patients=st.integers(1, 6))
def test_random_labels_give_scores(y, seed, patients):
    rng = np.random.default_rng(seed)
    p, groups = rng.random((len(y), 2)), rng.integers(0, patients, len(y))
    for metric in (auroc, f1, brier, METRICS["balanced accuracy"]):
        s = label_scores(metric, y, p, groups, n_boot=100)
        assert "nan" not in s.map(str).str.cat()
        assert [v.value is None for v in s[:-1]] == [not {0, 1} <= set(column) for column in np.transpose(y).tolist()]


@pytest.mark.parametrize("change, message", [
    (dict(y=[0, 1], p=[0.1, 0.2]), r"must both be \(images, labels\)"),
    (dict(y=[[0, 1]], p=[[0.1, 0.2, 0.3]]), r"must both be \(images, labels\)"),
    (dict(y=np.zeros((0, 2)), p=np.zeros((0, 2))), r"must both be \(images, labels\)"),
    (dict(y=[[0, 2]], p=[[0.1, 0.2]]), "-1 for unknown"),
    (dict(y=[[0, np.nan]], p=[[0.1, 0.2]]), "-1 for unknown"),
    (dict(y=[["yes", "no"]], p=[[0.1, 0.2]]), "numbers only"),
    (dict(y=[[0, 1]], p=[[0.1, 2.2]]), "sigmoid"),
    (dict(y=[[0, 1]], p=[[0.1, np.nan]]), "sigmoid"),
    (dict(y=[[0, 1]], p=[[0.1, 0.2]], groups=[1, 2]), "groups has 2 entries"),
    (dict(y=[[0, 1]], p=[[0.1, 0.2]], names=["a"]), "names 1"),
    (dict(y=[[0, 1]], p=[[0.1, 0.2]], names=["a", "mean"]), "twice, or 'mean'"),
])
def test_bad_labels_are_named(change, message):
    with pytest.raises(MedxferError, match=message): label_scores(auroc, **change)


@pytest.mark.parametrize("metric", list(METRICS.values()), ids=lambda m: m.name)
def test_inputs_are_left_alone(metric):
    y, p, groups = labelled()
    before = y.copy(), p.copy(), groups.copy()
    label_scores(metric, y, p, groups, n_boot=100)
    score(metric, y[:, 0], p[:, 0], groups, n_boot=100)
    assert all(np.array_equal(a, b) for a, b in zip((y, p, groups), before))
