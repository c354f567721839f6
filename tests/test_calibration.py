"""calibration against scikit-learn, closed forms, hand-computed net benefit, and simulations with a known truth."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logit, softmax
from scipy.stats import binomtest, norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss, roc_curve

from medxfer_nb.calibration import (
    Threshold,
    calibration_error,
    decision_curve,
    fit_temperature,
    fit_threshold,
    plot_decision_curve,
    plot_reliability,
    reliability,
)
from medxfer_nb.core import MedxferError

EQUAL = st.sampled_from(["width", "mass"])


def people(rng, n, sure=1.0):
    log_odds = 1.5 * rng.normal(size=n)
    return (rng.random(n) < expit(log_odds)).astype(int), expit(sure * log_odds)


def classes(seed, n=200, k=4, sure=1.0):
    "Classes drawn from known probabilities, and logits that are `sure` times too large."
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n, k))
    return np.array([rng.choice(k, p=q) for q in softmax(z, axis=1)]), sure * z


# --- reliability and ECE ---


@pytest.mark.parametrize("equal, strategy", [("width", "uniform"), ("mass", "quantile")])
@pytest.mark.parametrize("bins", [1, 5, 10, 17])
def test_reliability_equals_sklearn(equal, strategy, bins):
    for seed in range(5):
        y, p = people(np.random.default_rng(seed), 150)
        p = np.round(p, 2)                                                    # ties, also at the limits of bins
        table, (true, said) = reliability(y, p, bins, equal), calibration_curve(y, p, n_bins=bins, strategy=strategy)
        assert np.allclose(table["true"], true, atol=1e-12) and np.allclose(table.said, said, atol=1e-12) and table.images.sum() == 150
        assert (table["from"] - 1e-12 <= table.said).all() and (table.said <= table["to"] + 1e-12).all()


def test_bins_have_exact_intervals():
    y, p = people(np.random.default_rng(0), 300)
    for _, row in reliability(y, p, level=0.9).iterrows():
        ends = binomtest(round(row["true"] * row.images), int(row.images)).proportion_ci(0.9, "exact")
        assert (row["true low"], row["true high"]) == (ends.low, ends.high)


def test_more_classes_judge_the_class_that_was_called():
    y, z = classes(0)
    p = softmax(z, axis=1)
    table, (true, said) = reliability(y, p, 5), calibration_curve(p.argmax(1) == y, p.max(1), n_bins=5)
    assert np.allclose(table["true"], true) and np.allclose(table.said, said)


@given(a=st.integers(1, 30), b=st.integers(1, 30), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), equal=EQUAL)
@settings(deadline=None, max_examples=200)
def test_two_bins_in_closed_form(a, b, share, equal):
    ka, kb = round(share[0] * a), round(share[1] * b)
    y, p = np.r_[np.arange(a) < ka, np.arange(b) < kb].astype(int), np.r_[np.full(a, 0.25), np.full(b, 0.75)]
    expected = (abs(ka - 0.25 * a) + abs(kb - 0.75 * b)) / (a + b)
    bins = 2 if equal == "width" else 40
    assert calibration_error(y, p, bins=bins, equal=equal, n_boot=100).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("equal", ["width", "mass"])
def test_error_is_the_weighted_distance_of_the_table(equal):
    y, p = people(np.random.default_rng(1), 500, 2)
    t = reliability(y, p, 10, equal)
    assert calibration_error(y, p, equal=equal).value == pytest.approx((t.images * (t["true"] - t.said).abs()).sum() / 500)


def test_squared_distances_of_the_table_are_the_reliability_part_of_the_brier_score():
    y, p = people(np.random.default_rng(2), 500)
    p = (np.floor(p * 8) + 0.5) / 8                                          # one probability a bin, so that Murphy's sum is exact
    t, base = reliability(y, p, 8), y.mean()
    part = lambda d: (t.images * d**2).sum() / 500
    assert brier_score_loss(y, p) == pytest.approx(part(t["true"] - t.said) - part(t["true"] - base) + base * (1 - base))


def test_interval_holds_the_truth_for_a_calibrated_network_with_patients():
    rng, held = np.random.default_rng(3), []
    groups = np.repeat(np.arange(60), 4)
    for _ in range(150):
        a, b = (np.sqrt(0.6) * rng.normal(size=60)[groups] + np.sqrt(0.4) * rng.normal(size=240) for _ in "ab")
        p = expit(1.5 * a)
        s = calibration_error((norm.cdf(b) < p).astype(int), p, groups, n_boot=200)
        held.append(s.low == 0)
        assert s.low <= s.value <= s.high and "calibrated network would show" in s.why
    assert np.mean(held) > 0.92


def test_interval_refutes_calibration_where_it_is_wrong():
    y, p = people(np.random.default_rng(4), 1000, 3.0)
    true = np.abs(expit(logit(p) / 3) - p).mean()
    s = calibration_error(y, p)
    assert 0 < s.low < true < s.high


def test_patients_widen_the_interval():
    y, p = people(np.random.default_rng(5), 100, 2.0)
    one, five = calibration_error(y, p), calibration_error(np.repeat(y, 5), np.repeat(p, 5), np.repeat(np.arange(100), 5))
    assert one.value == pytest.approx(five.value) and one.high == pytest.approx(five.high) and five.n == 500
    assert calibration_error(np.repeat(y, 5), np.repeat(p, 5)).high < five.high


def test_flawless_certainty_has_no_error_and_no_interval():
    assert str(calibration_error([0, 1] * 10, [0.0, 1.0] * 10)) == "0.00 [no interval] (every resample gives the same value)"


@settings(max_examples=300, deadline=None)
@given(y=st.lists(st.integers(0, 2), min_size=1, max_size=10), bins=st.integers(1, 20), equal=EQUAL, seed=st.integers(0, 9))
def test_any_labels_give_an_error_between_0_and_1(y, bins, equal, seed):
    p = softmax(np.round(np.random.default_rng(seed).normal(size=(len(y), 3))), axis=1)
    s = calibration_error(y, p, bins=bins, equal=equal, n_boot=100)
    assert 0 <= s.value <= 1 and (s.low is None or 0 <= s.low <= s.value <= s.high) and "nan" not in str(s)
    assert reliability(y, p, bins, equal).images.sum() == len(y)


def test_wrong_bins_are_named():
    with pytest.raises(MedxferError, match="did you mean 'width'"): reliability([0, 1], [0.2, 0.7], equal="widht")
    with pytest.raises(MedxferError, match="bins must be at least 1"): calibration_error([0, 1], [0.2, 0.7], bins=0)


# --- temperature ---


@pytest.mark.parametrize("sure", [0.4, 1.0, 2.5])
def test_temperature_is_found(sure):
    y, z = classes(0, 4000, sure=sure)
    t = fit_temperature(y, z, "val", logits=True)
    assert t.value == pytest.approx(sure, rel=0.1) and t.n == 4000 and t.after <= t.before
    assert t.after == pytest.approx(log_loss(y, t.predict(z, logits=True))) and t.before == pytest.approx(log_loss(y, softmax(z, axis=1)))


def test_temperature_is_a_minimum():
    y, z = classes(1, sure=2)
    t = fit_temperature(y, z, "val", logits=True)
    nll = lambda temperature: -log_softmax(z / temperature, axis=1)[np.arange(len(y)), y].mean()
    assert t.after <= min(nll(x) for x in np.geomspace(0.1, 10, 2000)) + 1e-9


@given(seed=st.integers(0, 200), k=st.integers(2, 6), sure=st.floats(0.1, 5))
@settings(deadline=None, max_examples=200)
def test_answers_stay_and_validation_is_never_worse(seed, k, sure):
    y, z = classes(seed, 30, k, sure)
    for logits in (False, True):
        given_ = z if logits else softmax(z, axis=1)
        t = fit_temperature(y, given_, "val", logits=logits)
        q = t.predict(given_, logits=logits)
        assert t.after <= t.before and (q.argmax(1) == z.argmax(1)).all() and np.allclose(q.sum(1), 1)


def test_logits_and_probabilities_agree():
    y, z = classes(2, sure=2)
    a, b = fit_temperature(y, z, "val", logits=True), fit_temperature(y, softmax(z, axis=1), "val")
    assert a.value == pytest.approx(b.value, rel=1e-4) and np.allclose(a.predict(z, logits=True), b.predict(softmax(z, axis=1)), atol=1e-5)


def test_shape_stays_and_certainty_is_no_trouble():
    y, p = people(np.random.default_rng(6), 200, 2)
    p[:3] = 0, 1, 1
    t = fit_temperature(y, p, "val")
    assert t.predict(p).shape == (200,) and np.allclose(t.predict(np.stack([1 - p, p], 1))[:, 1], t.predict(p))
    assert np.isfinite([t.before, t.after]).all() and ((t.predict(p) > 0.5) == (p > 0.5)).all()


def test_temperature_that_cannot_be_told_is_said():
    flawless, useless = fit_temperature([0, 1] * 5, [0.4, 0.6] * 5, "val"), fit_temperature([1, 0] * 5, [0.4, 0.6] * 5, "val")
    assert flawless.value == 1 and "left at 1" in repr(flawless) and "10 validation images" in repr(flawless)
    assert useless.value > 99 and "end of its range" in repr(useless) and useless.after == pytest.approx(np.log(2), abs=5e-3)


@pytest.mark.parametrize("fit", [fit_temperature, fit_threshold])
@pytest.mark.parametrize("split, message", [("test", "cannot be tested there any more"), ("train", "too sure"), ("valid", "split='val'")])
def test_only_validation_images_are_taken(fit, split, message):
    with pytest.raises(MedxferError, match=message): fit([0, 1], [0.2, 0.7], split)


def test_wrong_logits_are_named():
    with pytest.raises(MedxferError, match=r"logits must be \(n, classes\)"): fit_temperature([0, 1], [0.2, 2.0], "val", logits=True)
    with pytest.raises(MedxferError, match="NaN"): fit_temperature([0, 1], [[0.2, np.nan], [1, 2]], "val", logits=True)
    with pytest.raises(MedxferError, match="softmax"): fit_temperature([0, 1], [[0.2, 3.0], [1, 2]], "val")


# --- thresholds ---


@pytest.mark.parametrize("seed", range(10))
def test_youden_equals_the_roc_curve(seed):
    y, p = people(np.random.default_rng(seed), 80)
    p = np.round(p, 1)
    fpr, tpr, _ = roc_curve(y, p, drop_intermediate=False)
    t = fit_threshold(y, p, "val")
    (tn, fp), (fn, tp) = confusion_matrix(y, t.predict(p))
    assert t.sensitivity + t.specificity - 1 == pytest.approx((tpr - fpr).max())
    assert (t.sensitivity, t.specificity) == (pytest.approx(tp / (tp + fn)), pytest.approx(tn / (tn + fp)))


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.95, 1])
def test_wanted_sensitivity_with_the_best_specificity(wanted):
    y, p = people(np.random.default_rng(0), 80)
    fpr, tpr, _ = roc_curve(y, p, drop_intermediate=False)
    t = fit_threshold(y, p, "val", sensitivity=wanted)
    assert t.sensitivity >= wanted and 1 - t.specificity == pytest.approx(fpr[tpr >= wanted].min())


@pytest.mark.parametrize("costs", [(1, 1), (9, 1), (1, 9), (1e6, 1), (1, 1e6)])
def test_costs_are_least(costs):
    y, p = people(np.random.default_rng(1), 80)
    cost = lambda called: costs[0] * (y & ~called).sum() + costs[1] * (~y.astype(bool) & called).sum()
    t = fit_threshold(y, p, "val", costs=costs)
    assert cost(t.predict(p).astype(bool)) == min(cost(p >= cut) for cut in [*p, 2.0])


def test_dear_alarms_call_nobody_and_dear_misses_everybody():
    y, p = [0, 1, 0, 1], [0.2, 0.4, 1.0, 0.0]
    assert fit_threshold(y, p, "val", costs=(1, 1e6)).predict(p).sum() == 0 and fit_threshold(y, p, "val", costs=(1e6, 1)).predict(p).sum() == 4


def test_judge_counts_by_patient_with_an_exact_bound():
    t = fit_threshold([0, 1] * 10, [0.2, 0.8] * 10, "val")
    s = t.judge([1, 1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.9, 0.1, 0.2], [0, 0, 1, 1, 2, 3, 4])
    assert s["sensitivity"].value == 1 and s["sensitivity"].low == pytest.approx(0.025 ** (1 / 2)) and s["specificity"].value == pytest.approx(2 / 3)
    assert t.value == pytest.approx(0.5) and t.n == 20 and "20 validation images" in repr(t)
    assert str(t.judge([1, 1], [0.9, 0.2])["specificity"]) == "not estimable (no image of class 0)"


def test_threshold_includes_its_own_value():
    t = Threshold(0.5, "by hand", 1, 1.0, 1.0)
    assert t.predict([0.5, 0.49]).tolist() == [1, 0] and t.predict([[0.5, 0.5], [0.51, 0.49]]).tolist() == [1, 0]


@pytest.mark.parametrize("change, message", [
    (dict(sensitivity=90), "pass 0.9"), (dict(sensitivity=0), "pass 0.9"),
    (dict(costs=(1,)), "a miss, a false alarm"), (dict(costs=(1, 0)), "above 0"),
    (dict(sensitivity=0.9, costs=(1, 1)), "not both"), (dict(y=[1, 1]), "only class 1"), (dict(p=np.full((2, 3), 1 / 3)), "needs two"),
])
def test_bad_wishes_are_named(change, message):
    with pytest.raises(MedxferError, match=message): fit_threshold(**dict(y=[0, 1], p=[0.2, 0.7], split="val") | change)


# --- decision curve ---


def test_net_benefit_by_hand():
    y, p = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0.9, 0.6, 0.2, 0.7, 0.5, 0.3, 0.2, 0.1, 0.1, 0.05]
    table = decision_curve(y, p, thresholds=[0.1, 0.25, 0.5, 0.8]).set_index("threshold")
    assert table.model.tolist() == pytest.approx([0.3 - 0.6 / 9, 0.2 - 0.3 / 3, 0.2 - 0.2, 0.1])
    assert table["treat all"].tolist() == pytest.approx([0.3 - 0.7 / 9, 0.3 - 0.7 / 3, 0.3 - 0.7, 0.3 - 0.7 * 4]) and (table["treat none"] == 0).all()
    assert np.allclose(table["over all"], table.model - table["treat all"])


@given(seed=st.integers(0, 100), t=st.floats(0.02, 0.98))
@settings(deadline=None, max_examples=50)
def test_net_benefit_from_the_confusion_matrix(seed, t):
    y, p = people(np.random.default_rng(seed), 60)
    (_, fp), (_, tp) = confusion_matrix(y, p >= t, labels=[0, 1])
    assert decision_curve(y, p, thresholds=[t], n_boot=100).model[0] == pytest.approx(tp / 60 - fp / 60 * t / (1 - t), abs=1e-12)


def test_band_is_a_bootstrap_of_patients():
    y, p = people(np.random.default_rng(7), 40)
    y5, p5, groups = np.repeat(y, 5), np.repeat(p, 5), np.repeat(np.arange(40), 5)
    a, b, c = decision_curve(y, p), decision_curve(y5, p5, groups), decision_curve(y5, p5)
    assert np.allclose(a, b, equal_nan=True) and (c.high - c.low).mean() < 0.7 * (b.high - b.low).mean()
    inside = a.low.notna()
    assert (a.low <= a.model + 1e-12)[inside].all() and (a.model <= a.high + 1e-12)[inside].all()


def test_constant_probabilities_are_treat_all_or_none():
    y = [1] * 3 + [0] * 7
    table = decision_curve(y, np.full(10, 0.3), thresholds=[0.2, 0.4])
    assert table.model.tolist() == pytest.approx([table["treat all"][0], 0]) and np.isnan(table.low[1]) and np.isnan(table["over all low"][0])


def test_band_holds_the_truth():
    big_y, big_p = people(np.random.default_rng(8), 200_000)
    truth = decision_curve(big_y, big_p, thresholds=[0.3], n_boot=100).model[0]
    rng, held = np.random.default_rng(9), []
    for _ in range(200):
        row = decision_curve(*people(rng, 150), thresholds=[0.3], n_boot=200).iloc[0]
        held.append(row.low <= truth <= row.high)
    assert np.mean(held) > 0.9


@pytest.mark.parametrize("wrong", [[0.0, 0.5], [0.5, 1.0], [], 0.5, [np.nan]])
def test_wrong_thresholds_are_named(wrong):
    with pytest.raises(MedxferError, match="above 0 and below 1"): decision_curve([0, 1], [0.2, 0.7], thresholds=wrong)
    with pytest.raises(MedxferError, match="needs two"): decision_curve([0, 1], np.full((2, 3), 1 / 3))


@pytest.fixture
def alts(monkeypatch):
    from matplotlib import pyplot as plt

    texts = []
    monkeypatch.setattr("medxfer_nb.calibration.show", lambda fig, alt: (texts.append(alt), fig.canvas.draw(), plt.close(fig)))
    return texts


def test_pictures_describe_themselves(alts):
    y, p = people(np.random.default_rng(10), 300)
    plot_reliability({"one": reliability(y, p), "two": reliability(y, p, equal="mass")})
    plot_decision_curve(decision_curve(y, p))
    plot_decision_curve(decision_curve([0, 1] * 5, np.full(10, 0.5)), "Nothing")
    assert "one: farthest from the diagonal" in alts[0] and "lie above 0 from 0." in alts[1] and "nowhere" in alts[2]


def test_inputs_are_left_alone():
    y, p = people(np.random.default_rng(11), 50)
    before = y.copy(), p.copy()
    calibration_error(y, p), reliability(y, p), fit_temperature(y, p, "val").predict(p), fit_threshold(y, p, "val").judge(y, p), decision_curve(y, p)
    assert np.array_equal(y, before[0]) and np.array_equal(p, before[1])
