"""intervals against SciPy, statsmodels, brute force over pairs and two other packages, and under simulation with a known truth."""
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import binom, binomtest, bootstrap, norm
from sklearn.metrics import roc_auc_score

from medxfer_nb.core import MedxferError
from medxfer_nb.intervals import (
    bca,
    bca_interval,
    delong,
    delong_covariance,
    delong_difference,
    mcnemar,
    proportion,
    recommended,
)
from medxfer_nb.metrics import accuracy, auroc, balanced_accuracy, checked, interval, logit_interval, paired_difference, resamples, score

with warnings.catch_warnings():
    warnings.simplefilter("ignore")          # what statsmodels says while it is imported is not ours
    from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
    from statsmodels.stats.proportion import proportion_confint


def draw(rng, n, true, prevalence=0.3, each=1, mixed=False):
    "Labels, probabilities and patients; `mixed`: a patient has sick and healthy images."
    groups, y = np.repeat(np.arange(n), each), np.zeros(n * each, dtype=bool)
    while min(len(np.unique(groups[y])), len(np.unique(groups[~y]))) < 2:
        y = rng.random(n * each) < prevalence if mixed else (rng.random(n) < prevalence)[groups]
    noise = np.sqrt(0.6) * rng.normal(size=n)[groups] + np.sqrt(0.4) * rng.normal(size=n * each)
    return y.astype(int), norm.cdf(noise + np.sqrt(2) * norm.ppf(true) * y), groups


def two(seed, n=60, each=1, mixed=False):
    "Labels, the tied probabilities of two networks, and patients."
    rng = np.random.default_rng(seed)
    y, a, groups = draw(rng, n, 0.8, each=each, mixed=mixed)
    return y, np.round(a, 2), np.round(norm.cdf(0.7 * norm.ppf(a) + 0.7 * rng.normal(size=len(y)) + 0.4 * y), 2), groups


# --- shares ---


@given(n=st.integers(1, 60), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_proportion_equals_statsmodels(n, data, level):
    k = data.draw(st.integers(0, n))
    for ours, theirs in (("exact", "beta"), ("wilson", "wilson")):
        s = proportion(k, n, level, ours)
        assert np.allclose((s.low, s.high), proportion_confint(k, n, 1 - level, theirs), atol=1e-9) and 0 <= s.low <= s.value <= s.high <= 1


def test_five_of_five():
    s = proportion(5, 5)
    assert str(s) == "1.00 [0.48, 1.00]" and np.isclose(s.low, 0.025**0.2) and proportion(0, 5).high == pytest.approx(1 - s.low)


@pytest.mark.parametrize("k, n, more", [(6, 5, {}), (-1, 5, {}), (1.5, 5, {}), (0, 0, {}), (1, 5, {"level": 95})])
def test_impossible_shares_are_named(k, n, more):
    with pytest.raises(MedxferError, match="successes must be an integer from 0 to n"): proportion(k, n, **more)


def test_unknown_methods_are_named():
    with pytest.raises(MedxferError, match="did you mean 'wilson'"): proportion(1, 2, method="willson")
    with pytest.raises(MedxferError, match="McNemar's test 'fisher'"): mcnemar([0, 1], [0.1, 0.9], [0.2, 0.8], method="fisher")


def test_exact_covers_every_truth():
    for true in np.linspace(0.02, 0.98, 25):
        held = [s.low <= true <= s.high for s in (proportion(k, 20) for k in range(21))]
        assert binom.pmf(np.arange(21), 20, true)[held].sum() >= 0.95


# --- BCa ---


@pytest.mark.parametrize("metric", [auroc, accuracy, balanced_accuracy])
@pytest.mark.parametrize("classes", [2, 3])
def test_bca_equals_scipy(metric, classes):
    rng = np.random.default_rng(classes)
    y = rng.permutation(np.arange(45) % classes)
    p = softmax(rng.normal(size=(45, classes)) + 1.5 * np.eye(classes)[y], axis=1)
    p = p[:, 1] if classes == 2 else p

    def of(i, axis): return np.apply_along_axis(lambda rows: metric(y[rows], p[rows]), axis, i)

    theirs = bootstrap((np.arange(45),), of, method="BCa", n_resamples=300, rng=np.random.default_rng(7)).confidence_interval
    ours = bca(metric, y, p, n_boot=300, seed=7)
    assert np.allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=1e-10) and "BCa" in ours.method


def test_bca_of_patients_equals_bca_of_their_sums():
    rng = np.random.default_rng(0)
    y, p, groups = draw(rng, 25, 0.8, each=4)
    right = (p > 0.5) == y

    def of(i, axis): return np.apply_along_axis(lambda k: np.mean(right.reshape(25, 4)[k]), axis, i)

    theirs = bootstrap((np.arange(25),), of, method="BCa", n_resamples=400, rng=np.random.default_rng(0)).confidence_interval
    ours = bca(accuracy, y, p, groups, n_boot=400)
    assert np.allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=1e-10)


def test_bca_without_bias_and_skewness_is_the_percentile_interval():
    draws = np.linspace(-1, 1, 2001)
    assert np.allclose(bca_interval(0.0, draws, np.array([-1.0, 0.0, 1.0])), np.quantile(draws, [0.025, 0.975]), atol=1e-3)
    assert np.allclose(bca_interval(0.0, draws, np.zeros(5)), np.quantile(draws, [0.025, 0.975]), atol=1e-3)
    assert max(bca_interval(2.0, draws, np.zeros(5))) <= 1          # every draw below the value


def test_lone_patient_of_a_class_has_no_bca_and_no_delong():
    y, p = np.array([1] + [0] * 30), np.r_[0.5, np.linspace(0.9, 0.1, 30)]
    for s in (bca(auroc, y, p), delong(y, p)): assert s.low is None and "one patient only" in s.why and np.isclose(s.value, auroc(y, p))


# --- logit ---


def test_score_uses_the_spread_of_the_same_resamples():
    y, p, groups = draw(np.random.default_rng(0), 30, 0.8, each=2)
    s = score(auroc, y, p, groups, n_boot=200, seed=3)
    labels, probabilities, patients = checked(y, p, groups)
    draws = np.concatenate([auroc.values(labels, probabilities, w) for w in resamples(patients, 200, seed=3)])
    assert np.allclose((s.low, s.high), logit_interval(s.value, draws.std() * np.sqrt(30 / 29), 29)) and "30 patients" in s.method


@pytest.mark.parametrize("method", [bca, recommended])
def test_no_error_and_one_class_are_left_to_score(method):
    y, p = [0, 1] * 10, [0.1, 0.9] * 10
    for metric in (auroc, balanced_accuracy):
        assert method(metric, y, p).low == score(metric, y, p).low and method(metric, y, p).high == 1
    assert str(method(auroc, [1, 1, 1], [0.2, 0.4, 0.9])) == "not estimable (only class 1 is in y)"


@pytest.mark.parametrize("method", [bca, recommended])
def test_absent_class_is_named(method):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 40)
    s = method(balanced_accuracy, y, softmax(rng.normal(size=(40, 3)), axis=1))
    assert s.why == "class 2 absent and left out"


@settings(max_examples=150, deadline=None)
@given(y=st.lists(st.integers(0, 2), min_size=1, max_size=12), classes=st.integers(2, 3), seed=st.integers(0, 9), patients=st.integers(1, 12))
def test_random_labels_give_a_score_or_a_clear_error(y, classes, seed, patients):
    rng = np.random.default_rng(seed)
    p, groups = softmax(np.round(rng.normal(size=(len(y), classes)), 1), axis=1), rng.integers(0, patients, len(y))
    for method in (recommended, *(lambda *a, f=f: f(*a, n_boot=100) for f in (bca, score))):
        for metric in (auroc, accuracy, balanced_accuracy):
            try: s = method(metric, y, p, groups)
            except MedxferError:
                assert max(y) >= classes
                continue
            assert "nan" not in str(s) and (s.low is None or 0 <= s.low <= s.high <= 1)
            assert method is not recommended or s.low is None or s.low <= s.value <= s.high


# --- DeLong ---


def structural(y, s):
    "The components of DeLong et al. 1988 by brute force: V10 of each positive, V01 of each negative."
    psi = (s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0])
    return psi.mean(axis=1), psi.mean(axis=0)


@pytest.mark.parametrize("seed", range(10))
def test_covariance_equals_brute_force(seed):
    y, a, b, groups = two(seed)
    (a10, a01), (b10, b01) = structural(y, a), structural(y, b)
    expected = np.cov(a10, b10) / len(a10) + np.cov(a01, b01) / len(a01)
    value, parts = delong_covariance(y == 1, np.stack([a, b]), groups)
    assert np.allclose(value, [roc_auc_score(y, a), roc_auc_score(y, b)], atol=1e-12)
    assert np.allclose(parts.sum(axis=0), expected, atol=1e-12) and len(np.unique(a)) < len(a)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_patients_equal_obuchowski_by_loops(seed, mixed):
    y, a, _, groups = two(seed, n=20, each=3, mixed=mixed)
    v10, v01 = structural(y, a)
    auc, m, n = roc_auc_score(y, a), (y == 1).sum(), (y == 0).sum()
    s10 = s01 = s11 = 0.0
    for k in np.unique(groups):
        x, z = v10[groups[y == 1] == k], v01[groups[y == 0] == k]
        up, down = x.sum() - len(x) * auc, z.sum() - len(z) * auc
        s10, s01, s11 = s10 + up**2, s01 + down**2, s11 + up * down
    i10, i01, i = len(np.unique(groups[y == 1])), len(np.unique(groups[y == 0])), len(np.unique(groups))
    s10, s01, s11 = i10 / ((i10 - 1) * m) * s10, i01 / ((i01 - 1) * n) * s01, i / (i - 1) * s11
    expected = s10 / m + s01 / n + 2 / (m * n) * s11
    assert np.isclose(delong_covariance(y == 1, a[None], groups)[1].sum(), expected, atol=1e-12) and (s11 != 0) == mixed


def reference():
    "Sixty images with ties; the two other packages saw the same numbers."
    rng, y = np.random.default_rng(0), (np.arange(60) % 3 == 0).astype(int)
    a = np.round(rng.normal(size=60) + 1.2 * y, 1)
    b = np.round(0.5 * a + rng.normal(size=60) + 0.6 * y, 1)
    return y, 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))


def test_delong_equals_mlstatkit():
    "MLstatkit 0.1.91: `from MLstatkit import Delong_test; Delong_test(y, a, b)` gave these z, p, AUROCs and var_diff."
    y, a, b = reference()
    found, (value, parts) = delong_difference(y, a, b), delong_covariance(y == 1, np.stack([a, b]), np.arange(60))
    variance = np.array([1, -1]) @ parts.sum(axis=0) @ np.array([1, -1])
    assert np.allclose((-found.z, found.p), (-1.5416965420437032, 0.12314735264364175), atol=1e-9)      # their z is that of b - a
    assert np.allclose((*value, variance), (0.78125, 0.644375, 0.00788225476551957), atol=1e-9)


def test_delong_equals_confidenceinterval():
    "confidenceinterval 1.0.5: `from confidenceinterval.delong import delong_roc_variance; delong_roc_variance(y, a)`, in single precision."
    y, a, _ = reference()
    assert np.isclose(delong_covariance(y == 1, a[None], np.arange(60))[1].sum(), 0.0045336539320491994, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_delong_agrees_with_the_bootstrap_by_patient(seed):
    y, a, b, groups = two(seed, n=120, each=2, mixed=True)
    one, other = delong(y, a, groups), score(auroc, y, a, groups)
    assert np.allclose((one.low, one.high), (other.low, other.high), atol=0.012) and one.value == pytest.approx(other.value)
    one, other = delong_difference(y, a, b, groups).effect, paired_difference(auroc, y, a, b, groups)
    assert np.allclose((one.low, one.high), (other.low, other.high), atol=0.02) and one.value == pytest.approx(other.value)


@given(seed=st.integers(0, 30), power=st.floats(0.3, 3))
@settings(deadline=None, max_examples=50)
def test_delong_ignores_monotone_transforms_and_mirrors(seed, power):
    y, a, b, _ = two(seed)
    s, moved, mirrored = delong(y, a), delong(y, a**power), delong(1 - y, a)
    assert np.allclose((s.low, s.high), (moved.low, moved.high), atol=1e-12)
    assert np.allclose((s.low, s.high), (1 - mirrored.high, 1 - mirrored.low), atol=1e-12)
    ab, ba = delong_difference(y, a, b), delong_difference(y, b, a)
    assert np.isclose(ab.p, ba.p) and np.isclose(ab.effect.low, -ba.effect.high) and (ab.p < 0.05) == (ab.effect.low > 0 or ab.effect.high < 0)


def test_repeating_every_image_changes_nothing_by_patient():
    y, a, b, _ = two(0)
    once = delong(y, a, np.arange(60))
    thrice = delong(np.repeat(y, 3), np.repeat(a, 3), np.repeat(np.arange(60), 3))
    assert np.allclose((once.low, once.high), (thrice.low, thrice.high), atol=1e-12)
    tripled = delong_difference(*(np.repeat(x, 3) for x in (y, a, b, np.arange(60))))
    assert np.isclose(tripled.z, delong_difference(y, a, b).z) and tripled.p > delong_difference(y, a, b).p


def test_a_network_against_itself_has_no_test():
    y, a, _, _ = two(1)
    found = delong_difference(y, a, a)
    assert found.p is found.z is found.effect.low is None and repr(found) == "+0.000 [no interval] (the difference does not vary), p = none"


def test_delong_at_one_has_the_exact_bound():
    assert delong([0, 1] * 10, [0.1, 0.9] * 10) == score(auroc, [0, 1] * 10, [0.1, 0.9] * 10)
    assert str(delong([1, 1], [0.2, 0.3])) == "not estimable (only class 1 is in y)"
    assert delong([0, 1] * 10, [0.5] * 20).low is None


def test_bad_input_is_named():
    with pytest.raises(MedxferError, match="two classes and p has 3"): delong([0, 1, 2], np.eye(3))
    with pytest.raises(MedxferError, match="two classes and p has 3"): delong_difference([0, 1, 2], np.eye(3), np.eye(3))
    with pytest.raises(MedxferError, match="at least two patients in y"): delong_difference([0, 1, 1], [0.1, 0.2, 0.3], [0.1, 0.3, 0.2])
    with pytest.raises(MedxferError, match="y has 2 labels and p has 3 rows"): delong([0, 1], [0.1, 0.2, 0.3])
    for f in (bca, score):
        with pytest.raises(MedxferError, match="level must lie"): f(auroc, [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.15], level=95)
        with pytest.raises(MedxferError, match="n_boot"): f(auroc, [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.15], n_boot=5)


# --- McNemar ---


@given(b=st.integers(0, 40), c=st.integers(0, 40), both=st.integers(1, 20))
@settings(deadline=None)
def test_mcnemar_equals_statsmodels(b, c, both):
    y = np.ones(b + c + both, dtype=int)
    p_a, p_b = np.r_[[0.9] * b, [0.1] * c, [0.9] * both], np.r_[[0.1] * b, [0.9] * c, [0.8] * both]
    for name, exact in (("exact", True), ("chi-square", False)):
        ours = mcnemar(y, p_a, p_b, method=name)
        assert (ours.b, ours.c, ours.method) == (b, c, name)
        expected = their_mcnemar([[both, b], [c, 0]], exact=exact, correction=True).pvalue if b + c else 1.0
        assert np.isclose(ours.p, expected, atol=1e-12)
    if b != c: assert np.isclose(mcnemar(y, p_a, p_b, method="mid-p").p, binomtest(b, b + c).pvalue - binom.pmf(b, b + c, 0.5), atol=1e-12)
    else: assert mcnemar(y, p_a, p_b, method="mid-p").p == 1


def test_mcnemar_refuses_repeated_patients_and_other_classes():
    with pytest.raises(MedxferError, match="one image a patient; use paired_difference"): mcnemar([0, 1], [0.1, 0.9], [0.2, 0.8], groups=["a", "a"])
    with pytest.raises(MedxferError, match="same classes"): mcnemar([0, 1], [0.1, 0.9], np.eye(3)[:2])
    assert mcnemar([0, 1, 2], np.eye(3), np.eye(3)[[1, 1, 2]], groups=["x", "y", "z"]).b == 1


def test_mcnemar_raises_no_more_alarms_than_it_says():
    for n in (8, 15, 30):
        p = [mcnemar(np.ones(n, int), np.r_[[0.9] * b, [0.1] * (n - b)], np.r_[[0.1] * b, [0.9] * (n - b)]).p for b in range(n + 1)]
        assert binom.pmf(np.arange(n + 1), n, 0.5)[np.array(p) <= 0.05].sum() <= 0.05


# --- promises ---


def test_recommended_takes_the_interval_that_the_lesson_names():
    y, p, groups = draw(np.random.default_rng(0), 30, 0.8, each=2)
    assert recommended(auroc, y, p, groups) == delong(y, p, groups)
    assert recommended(accuracy, y, p, groups) == score(accuracy, y, p, groups)
    assert recommended(balanced_accuracy, y, p) == score(balanced_accuracy, y, p)
    alone, hits = recommended(accuracy, y, p), int(((p > 0.5) == y).sum())
    flawless = recommended(accuracy, y, y.astype(float))
    assert (flawless.low, flawless.high) == binomtest(60, 60).proportion_ci(method="exact")
    assert np.isclose(alone.value, accuracy(y, p)) and (alone.low, alone.high) == binomtest(hits, 60).proportion_ci(method="wilson")


@pytest.mark.parametrize("n, true, each", [(50, 0.75, 1), (50, 0.95, 1), (100, 0.9, 1), (40, 0.85, 3)])
def test_delong_holds_the_truth_in_95_of_100(n, true, each):
    rng = np.random.default_rng(n)
    held = [s.low <= true <= s.high for s in (delong(*draw(rng, n, true, each=each)) for _ in range(1000))]
    assert 0.93 <= np.mean(held) <= 0.97


def test_freedom_is_never_below_the_smaller_class_where_patients_have_both():
    for seed in range(30):
        y, p, groups = draw(np.random.default_rng(seed), 12, 0.8, prevalence=0.5, each=4, mixed=True)
        df = int(re.search(r"t with (\d+) degrees", delong(y, p, groups).method)[1])
        smaller = min(len(np.unique(groups[y == k])) for k in (0, 1))
        assert df >= smaller - 1


@pytest.mark.parametrize("metric", [auroc, balanced_accuracy])
def test_logit_bootstrap_holds_the_truth_in_95_of_100_and_percentile_does_not(metric):
    rng, true, held = np.random.default_rng(0), 0.95, {"logit": [], "percentile": []}
    d = np.sqrt(2) * norm.ppf(true) if metric is auroc else 2 * norm.ppf(true)
    for _ in range(400):
        y, s, _ = draw(rng, 60, 0.5)
        p = norm.cdf(norm.ppf(s) + d * y - d / 2)
        s, (labels, said, groups) = score(metric, y, p, n_boot=200), checked(y, p)
        low, high, why = interval(np.concatenate([metric.values(labels, said, w) for w in resamples(groups, 200)]))
        held["logit"].append(s.low <= true <= s.high)
        held["percentile"].append(held["logit"][-1] if why else low <= true <= high)          # no error: the exact bound
    assert 0.93 <= np.mean(held["logit"]) <= 0.985 and np.mean(held["percentile"]) < 0.92


def test_difference_raises_a_false_alarm_in_5_of_100():
    rng, alarms = np.random.default_rng(2), []
    for _ in range(1000):
        y, a, _ = draw(rng, 100, 0.8)
        b = norm.cdf(0.6 * (norm.ppf(a) - np.sqrt(2) * norm.ppf(0.8) * y) + 0.8 * rng.normal(size=100) + np.sqrt(2) * norm.ppf(0.8) * y)
        alarms.append(delong_difference(y, a, b).p < 0.05)
    assert 0.03 <= np.mean(alarms) <= 0.07
