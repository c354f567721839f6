"""metrics against scikit-learn, on random label sets, and under simulation with a known truth."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binomtest, norm, t
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from medxfer_nb.core import MedxferError
from medxfer_nb.measures import kappa
from medxfer_nb.metrics import (
    Metric,
    accuracy,
    auroc,
    balanced_accuracy,
    checked,
    interval,
    logit_interval,
    mean_score,
    paired_difference,
    resamples,
    score,
)

METRICS = [auroc, accuracy, balanced_accuracy]


def some(seed, n=60, classes=3, decimals=1):
    "Labels with every class present, and probabilities with many ties."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    return y, softmax(np.round(rng.normal(size=(n, classes)) + np.eye(classes)[y], decimals), axis=1)


def study(rng, n, true):
    y = (rng.random(n) < 0.3).astype(int)
    return y, norm.cdf(rng.normal(size=n) + np.sqrt(2) * norm.ppf(true) * y)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_equal_sklearn(seed, classes):
    y, p = some(seed, classes=classes)
    q = p[:, 1] if classes == 2 else p
    assert np.isclose(auroc(y, p), roc_auc_score(y, q, multi_class="ovr"), atol=1e-12)
    assert accuracy(y, p) == accuracy_score(y, p.argmax(1))
    assert np.isclose(balanced_accuracy(y, p), balanced_accuracy_score(y, p.argmax(1)), atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_equal_repeated_images(metric, classes):
    y, p = some(0, classes=classes)
    (w,) = resamples(np.arange(len(y)), n_boot=50, seed=1)
    repeated = [metric(np.repeat(y, row), np.repeat(p, row, axis=0)) for row in w]
    assert np.allclose(metric.values(y, p, w), repeated, atol=1e-12)


@settings(max_examples=1000, deadline=None)
@given(y=st.lists(st.integers(-1, 4), max_size=12), classes=st.integers(2, 4), seed=st.integers(0, 9), patients=st.integers(1, 12))
def test_random_labels_give_a_score_or_a_clear_error(y, classes, seed, patients):
    rng = np.random.default_rng(seed)
    p, groups = softmax(rng.normal(size=(len(y), classes)), axis=1), rng.integers(0, patients, len(y))
    for metric in METRICS:
        try: s = score(metric, y, p, groups, n_boot=100)
        except MedxferError:
            assert not y or min(y) < 0 or max(y) >= classes
            continue
        assert "nan" not in str(s) and s.n == len(y)
        assert (s.value is None) == (metric is auroc and len(set(y)) == 1)
        assert s.low is None or 0 <= s.low <= s.high <= 1


@given(seed=st.integers(0, 50), power=st.floats(0.3, 3))
@settings(deadline=None)
def test_auroc_ignores_monotone_transforms(seed, power):
    y, p = some(seed, classes=2)
    p = np.round(p[:, 1], 3)                     # exact ties, and no two values that differ by rounding error only
    assert np.isclose(auroc(y, p), auroc(y, p**power), atol=1e-12)
    assert np.isclose(auroc(y, p), 1 - auroc(y, 1 - p), atol=1e-12)


@given(y=st.lists(st.integers(0, 4), min_size=2, max_size=30).filter(lambda y: len(set(y)) > 1))
@settings(deadline=None)
def test_perfect_is_one_whichever_classes_are_missing(y):
    for metric in METRICS:
        s = score(metric, y, np.eye(5)[y], n_boot=100)
        assert s.value == s.high == metric(y, np.eye(5)[y]) == 1.0 and s.low < 1
        assert metric is accuracy or all(str(k) in s.why for k in set(range(5)) - set(y))


def test_one_class_is_not_estimable():
    assert str(score(auroc, [1, 1, 1], [0.2, 0.4, 0.9])) == "not estimable (only class 1 is in y)"
    assert str(score(auroc, [2, 2], np.full((2, 3), 1 / 3))) == "not estimable (only class 2 is in y)"
    assert str(paired_difference(auroc, [0, 0], [0.1, 0.2], [0.3, 0.4])) == "not estimable (only class 0 is in y)"
    with pytest.raises(MedxferError, match="not estimable: only class 1"): auroc([1, 1], [0.2, 0.4])


@pytest.mark.parametrize("y, p, message", [
    ([0, 1], [0.1, 0.2, 0.3], "y has 2 labels and p has 3 rows"),
    ([0, 1], [[2.0, -1.0], [0.0, 1.0]], "softmax"),
    ([0, 1], [[0.5, 0.6], [0.0, 1.0]], "softmax"),
    ([0, 2], [0.1, 0.2], "classes 0 to 1"),
    ([0, -1], [0.1, 0.2], "unlabelled"),
    ([0, 0.5], [0.1, 0.2], "number them so"),
    ([0, np.nan], [0.1, 0.2], "y is empty or holds NaN"),
    ([0, 1], [0.1, np.nan], "p is empty or holds NaN"),
    ([], [], "y is empty"),
    (["cyst", "none"], [0.1, 0.2], "y must hold numbers"),
    ([[0], [1]], [0.1, 0.2], r"y must be \(n,\)"),
    ([0, 1, 2], np.full((3, 1), 1.0), r"p \(n, classes\)"),
])
def test_bad_input_is_named(y, p, message):
    with pytest.raises(MedxferError, match=message): score(auroc, y, p)


def test_bad_groups_and_settings_are_named():
    with pytest.raises(MedxferError, match="one patient for each of the 2 images"): score(auroc, [0, 1], [0.1, 0.2], groups=[1, 2, 3])
    with pytest.raises(MedxferError, match="same classes"): paired_difference(auroc, [0, 1], [0.1, 0.2], np.full((2, 4), 0.25))
    for wrong in ({"level": 95}, {"n_boot": 10}):
        with pytest.raises(MedxferError, match="level must lie"): score(auroc, [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], **wrong)


def test_patients_named_by_strings_and_by_numbers_agree():
    y, p = some(3)
    numbers = np.arange(len(y)) // 4
    names = np.array([f"patient {g:03d}" for g in numbers])
    assert score(auroc, y, p, numbers) == score(auroc, y, p, names) != score(auroc, y, p)


def test_one_patient_has_no_interval():
    y, p = some(0, classes=2)
    for metric in METRICS:
        assert str(score(metric, y, p, np.zeros(len(y)))).endswith("[no interval] (one patient)")
        assert str(score(metric, y, np.eye(2)[y], np.zeros(len(y)))) == "1.00 [no interval] (one patient)"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("each", [1, 3])
def test_interval_is_symmetric_on_the_logit_scale_with_the_spread_of_loops_over_patients(metric, level, each):
    y, p = some(5, n=90, classes=3)
    groups, rng = np.repeat(np.arange(90 // each), each), np.random.default_rng(4)
    k, draws = groups[-1] + 1, []
    for drawn in rng.integers(0, k, (150, k)):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in drawn])
        draws.append(metric(y[rows], p[rows]))
    s = score(metric, y, p, groups, n_boot=150, level=level, seed=4)
    v, spread = metric(y, p), np.std(draws, ddof=0) * np.sqrt(k / (k - 1))
    half = t.ppf((1 + level) / 2, k - 1) * spread / (v * (1 - v))
    assert np.allclose(np.log([s.low / (1 - s.low), s.high / (1 - s.high)]), np.log(v / (1 - v)) + np.array([-half, half]))
    unit = "90 images" if each == 1 else "30 patients"
    assert s.method == f"{level:.0%} logit bootstrap, 150 resamples of {unit}, t with {k - 1} degrees of freedom"


def test_ends_are_those_of_the_metric():
    y, p = some(6, classes=2)
    twice = replace(accuracy, name="2 accuracy - 1", parts=lambda y, p, w: 2 * accuracy.parts(y, p, w) - 1, worst=-1.0, bound=None)
    errors = replace(accuracy, name="errors", parts=lambda y, p, w: 1 - accuracy.parts(y, p, w), worst=1.0, best=0.0, bound=None)
    s, stretched, turned = (score(m, y, p) for m in (accuracy, twice, errors))
    assert np.allclose((stretched.low, stretched.high), (2 * s.low - 1, 2 * s.high - 1), atol=1e-12)
    assert np.allclose((turned.low, turned.high), (1 - s.high, 1 - s.low), atol=1e-12)


def test_value_at_an_end_with_draws_that_differ_has_percentiles_and_a_warning():
    y, p, groups = checked([1, 0] * 10, [0.0, 1.0] * 10)
    (w,) = resamples(groups, 2000)
    s = score(kappa, y, p)                               # always wrong: -1, but above -1 in uneven resamples
    assert (s.value, s.low) == (-1, -1) and s.high == np.nanquantile(kappa.values(y, p, w), 0.975) > -1
    assert s.why == "at the end of its scale, interval may be too narrow" and "percentile" in s.method
    balance = Metric("imbalance", lambda y, p, w: np.abs(w @ (y - p[:, 1]))[:, None] / w.sum(1)[:, None], accuracy.trials, worst=1.0, best=0.0)
    flat = np.full((20, 2), 0.5)
    s = score(balance, y, flat)
    assert s.value == s.low == 0 and s.high == np.quantile(balance.values(y, flat, w), 0.975) > 0 and s.why.startswith("at the end")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rare", [3, 9, 10, 12])
def test_few_patients_are_said(metric, rare):
    y, p = np.repeat([1, 0], [rare, 30]), np.random.default_rng(rare).random(rare + 30)
    s = score(metric, y, p)
    assert s.low is not None and (s.why == "few patients, interval may be too narrow") == (metric is not accuracy and rare < 10)
    assert score(metric, np.tile(y, 3), np.tile(p, 3), np.tile(np.arange(rare + 30), 3)).why == s.why        # images do not help


def test_fewer_than_half_of_the_resamples_is_too_few():
    y = np.array([0, 1] + [2] * 30)
    s = score(balanced_accuracy, y, softmax(np.random.default_rng(0).normal(size=(32, 3)), axis=1))
    assert s.low is None and "of 2000 resamples hold every class" in s.why and "logit" in s.method


def test_blocks_do_not_change_the_draws():
    (whole,) = resamples(np.arange(7), 30, seed=5)
    parts = list(resamples(np.arange(7), 30, seed=5, block=28))
    assert len(parts) == 8 and np.array_equal(np.concatenate(parts), whole) and (whole.sum(1) == 7).all()


def test_images_of_one_patient_are_drawn_together():
    groups = np.array([0, 0, 1, 1, 1, 2])
    (w,) = resamples(groups, 200)
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 2] == w[:, 4]).all() and (w[:, [0, 2, 5]].sum(1) == 3).all()


def test_flawless_accuracy_has_the_exact_bound():
    s = score(accuracy, [0, 1] * 10, [0.1, 0.9] * 10)
    assert np.isclose(s.low, binomtest(20, 20).proportion_ci(method="exact").low) and s.high == 1 and "exact" in s.method
    assert score(accuracy, [1, 0] * 10, [0.1, 0.9] * 10).high == 1 - s.low


def test_pairs_of_patients_bound_a_flawless_auroc():
    y, groups = [0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]        # at most 2 pairs share no patient
    s = score(auroc, y, np.asarray(y, dtype=float), groups)
    assert np.isclose(s.low, 0.025 ** (1 / 2)) and s.value == 1


def test_rare_class_leaves_draws_out_and_says_so():
    y = np.array([1] + [0] * 30)
    s = score(auroc, y, np.r_[0.5, np.linspace(0.9, 0.1, 30)])
    assert "left out for lack of a class" in s.method and s.why.startswith("few patients")


def test_difference_of_a_model_with_itself_is_zero_without_interval():
    y, p = some(1)
    assert str(paired_difference(auroc, y, p, p)) == "0.00 [no interval] (every resample gives the same value)"


def test_difference_turns_its_sign_with_the_order():
    y, a = some(1)
    b = softmax(np.log(a) + np.random.default_rng(0).normal(size=a.shape), axis=1)
    ab, ba = paired_difference(auroc, y, a, b), paired_difference(auroc, y, b, a)
    assert np.allclose((ab.value, ab.low, ab.high), (-ba.value, -ba.high, -ba.low))
    assert np.isclose(ab.value, auroc(y, a) - auroc(y, b))


@pytest.mark.parametrize("metric", METRICS)
def test_inputs_are_left_alone(metric):
    y, p = some(2)
    before = y.copy(), p.copy()
    score(metric, y, p, n_boot=100)
    assert np.array_equal(y, before[0]) and np.array_equal(p, before[1])
    assert checked(y, p)[0] is not y


def test_interval_holds_the_truth_in_95_of_100_studies():
    rng = np.random.default_rng(0)
    held = [s.low <= 0.8 <= s.high for s in (score(auroc, *study(rng, 100, 0.8), n_boot=1000) for _ in range(300))]
    assert 0.92 <= np.mean(held) <= 0.98


def test_interval_of_60_images_keeps_its_promise_where_the_percentiles_do_not():
    rng, (w,), held = np.random.default_rng(3), resamples(np.arange(60), n_boot=400), []
    for _ in range(600):
        y, p, groups = checked(*study(rng, 60, 0.85))
        draws = auroc.values(y, p, w)
        s, (low, high, _) = auroc.judge(y, p, groups, draws), interval(draws)
        held.append((s.low <= 0.85 <= s.high, low <= 0.85 <= high))
    ours, percentile = np.mean(held, axis=0)
    assert 0.93 <= ours <= 0.97 and percentile < ours - 0.02


def test_flawless_interval_errs_on_the_safe_side():
    rng = np.random.default_rng(1)
    held = [s.low <= 0.97 <= s.high for s in (score(auroc, *study(rng, 30, 0.97), n_boot=200) for _ in range(300)) if s.value == 1]
    assert len(held) > 50 and np.mean(held) > 0.95


def test_mean_score_resamples_patients_and_pairs():
    rng = np.random.default_rng(0)
    groups, own = np.repeat(np.arange(30), 6), np.repeat(rng.normal(size=30), 6)
    a = own + 0.1 * rng.normal(size=180)
    by_patient, by_image = mean_score(a, groups), mean_score(a)
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)
    assert mean_score(a + 0.2, groups, minus=a).value == pytest.approx(0.2) and mean_score(a, groups, minus=a).low is None
    for bad in (dict(groups=groups[1:]), dict(minus=a[1:])):
        with pytest.raises(MedxferError, match="one entry an image"): mean_score(a, **bad)


def test_best_value_by_balance_is_not_taken_for_flawless():
    balance = Metric("imbalance", lambda y, p, w: np.abs(w @ (y - p[:, 1]))[:, None] / w.sum(1)[:, None], accuracy.trials, by_class=False,
                     worst=1.0, best=0.0, share=accuracy.parts, bound=lambda share: 1 - share)
    s = score(balance, [0, 1] * 10, np.full(20, 0.5), np.repeat(np.arange(10), 2))          # one of each in every patient: always 0
    assert s.value == 0 and s.low is None and "same value" in s.why
    assert score(balance, [0, 1] * 10, [0.0, 1.0] * 10).high == pytest.approx(1 - binomtest(20, 20).proportion_ci(method="exact").low)


@given(value=st.floats(0.01, 0.99), se=st.floats(0.001, 0.2), df=st.sampled_from([4, 30, np.inf]))
def test_logit_interval_stays_inside_and_holds_the_value(value, se, df):
    low, high = logit_interval(value, se, df)
    assert 0 <= low < value < high <= 1
    mirrored = logit_interval(1 - value, se, df)
    assert np.allclose((1 - high, 1 - low), mirrored, atol=1e-12)
    assert np.allclose(logit_interval(2 * value - 1, 2 * se, df, ends=(-1, 1)), (2 * low - 1, 2 * high - 1), atol=1e-12)


def test_logit_of_a_share_has_the_textbook_form():
    low, high = logit_interval(0.8, np.sqrt(0.8 * 0.2 / 50))
    half = norm.ppf(0.975) * np.sqrt(1 / 40 + 1 / 10)
    assert np.allclose((np.log(low / (1 - low)), np.log(high / (1 - high))), (np.log(4) - half, np.log(4) + half))


@pytest.mark.parametrize("value, more", [(1.0, {}), (0.0, {}), (0.5, {"level": 95}), (0.2, {"ends": (0.5, 1)})])
def test_logit_at_the_ends_is_named(value, more):
    with pytest.raises(MedxferError, match="level must lie between 0 and 1 and value inside"): logit_interval(value, 0.1, **more)


def test_differences_and_means_keep_the_percentiles():
    y, p = some(7, classes=2)
    q, groups = np.roll(p, 1, axis=0), np.arange(60)
    (w,) = resamples(groups, 2000)
    s = paired_difference(accuracy, y, p, q)
    assert np.allclose((s.low, s.high), np.quantile(accuracy.values(y, p, w) - accuracy.values(y, q, w), [0.025, 0.975]), atol=1e-12)
    hits = (p.argmax(1) == y).astype(float)
    assert np.allclose(np.quantile((w @ hits) / 60, [0.025, 0.975]), ((m := mean_score(hits)).low, m.high), atol=1e-12)
    assert s.method == "paired 95% percentile bootstrap, 2000 resamples of 60 images" and m.method == s.method.removeprefix("paired ")


def test_metrics_of_one_name_are_equal():
    assert auroc == replace(auroc, parts=accuracy.parts) != replace(auroc, name="other")
