"""study: false alarms and planted effects from simulated predictions, one by one and many at once; files that keep a study."""
import numpy as np
import pytest
from scipy.stats import norm

from medxfer_nb.core import MedxferError
from medxfer_nb.measures import METRICS, brier
from medxfer_nb.metrics import accuracy, auroc, score
from medxfer_nb.study import Arm, Study, _spread, load_study, two_level

AB = {name: Arm(name) for name in "ab"}


def simulated(rng, gain=0.0, luck=0.3, seeds=5, patients=24, each=5, n_boot=300):
    "A study of two strategies; on average a is better by `gain` standard deviations."
    groups = np.repeat(np.arange(patients), each)
    y = (rng.random(len(groups)) < 0.4).astype(int)
    hard = 0.6 * rng.normal(size=patients)[groups] + 0.6 * rng.normal(size=len(y))
    study = Study("simulated", y, groups, AB, seeds, n_boot=n_boot)
    for name in "ab":
        habit = 0.35 * rng.normal(size=patients)[groups] + 0.35 * rng.normal(size=len(y))
        for seed in range(seeds):
            quality = 1.2 + gain * (name == "a") + luck * rng.normal()
            study.predictions[name, seed] = norm.cdf(quality * y + hard + habit + 0.4 * rng.normal(size=len(y)))
            study.seconds[name, seed] = 1.0
    return study


@pytest.mark.parametrize("luck, seeds", [(0.0, 5), (0.3, 5), (0.5, 3)])
def test_null_studies_give_no_evidence(luck, seeds):
    rng = np.random.default_rng(2)
    words = [simulated(rng, luck=luck, seeds=seeds).verdict("a", "b").word for _ in range(100)]
    assert sum(w != "no evidence" for w in words) <= 9          # 5 expected; 9 or fewer in 97 % of such hundreds


@pytest.mark.parametrize("gain, word", [(1.5, "helped"), (-1.0, "hurt")])
def test_a_planted_effect_is_found(gain, word):
    rng = np.random.default_rng(3)
    words = [simulated(rng, gain=gain, luck=0.1).verdict("a", "b").word for _ in range(20)]
    assert words.count(word) >= 18 and set(words) <= {word, "no evidence"}


def test_effect_is_the_difference_of_the_means_and_turns_its_sign():
    study = simulated(np.random.default_rng(4))
    ab, ba, rows = study.difference("a", "b"), study.difference("b", "a"), study.table.mean(axis=1)
    assert np.isclose(ab.value, rows["a"] - rows["b"]) and np.isclose(ab.value, -ba.value)
    assert study.table.loc["a", 2] == auroc(study.y, study.predictions["a", 2])
    assert np.isclose(study.summary().loc["b", "accuracy"].value, np.mean([accuracy(study.y, study.predictions["b", s]) for s in range(5)]))


def test_same_study_same_interval():
    one, two = (simulated(np.random.default_rng(5)) for _ in range(2))
    assert one.difference("a", "b") == two.difference("a", "b") and one.verdict("a", "b") == two.verdict("a", "b")


def test_seeds_widen_the_interval_by_t():
    rng = np.random.default_rng(0)
    v = np.array([0.1, 0.2, 0.3])
    draws = two_level(np.tile(v, (100_000, 1)), v, rng)          # test patients without any luck
    half = np.diff(np.quantile(draws, [0.025, 0.975]))[0] / 2
    assert np.isclose(half, 4.303 * 0.1 / np.sqrt(3), rtol=0.03)       # t(2), 97.5 %: 4.303


def test_an_arm_of_one_seed_has_the_interval_of_score():
    study = simulated(np.random.default_rng(2), gain=0.5, seeds=1)
    s, alone = study.summary()["AUROC"]["a"], score(auroc, study.y, study.predictions["a", 0], study.groups, study.n_boot)
    assert (s.value, s.low, s.high) == pytest.approx((alone.value, alone.low, alone.high)) and "one seed" in s.why


def test_the_spread_of_an_arm_joins_patients_and_seeds():
    rng, patients = np.random.default_rng(0), 30
    seeds_only = np.tile([0.7, 0.8, 0.9], (500, 1))                # every resample of the patients gives the same
    assert _spread(seeds_only, patients) == pytest.approx((0.1 / np.sqrt(3), 2))
    patients_only = np.repeat(rng.normal(0.8, 0.05, (20_001, 1)), 3, axis=1)      # every seed gives the same
    assert _spread(patients_only, patients) == pytest.approx((0.05 * np.sqrt(30 / 29), 29), rel=0.02)
    equal = np.r_[[[0.8 - 0.05 * np.sqrt(3), 0.8, 0.8 + 0.05 * np.sqrt(3)]], patients_only[1:]]  # two parts alike: 4 / (1/29 + 1/2)
    assert _spread(equal, patients)[1] == pytest.approx(4 / (1 / 29 + 1 / 2), rel=0.05)


def test_one_seed_is_no_evidence_and_says_why():
    study = simulated(np.random.default_rng(6), gain=3.0, seeds=1)
    v = study.verdict("a", "b")
    assert v.word == "no evidence" and "one seed" in v.effect.why and v.effect.low > 0


def test_one_class_in_the_test_set_is_not_estimable():
    study = simulated(np.random.default_rng(7))
    study.y = np.ones_like(study.y)
    v = study.verdict("a", "b")
    assert v.word == "no evidence" and v.effect.value is None and "only class 1" in str(v) and "not estimable" in repr(study)


def test_one_test_patient_proves_nothing():
    study = simulated(np.random.default_rng(0), gain=3.0)
    study.groups = np.zeros(len(study.y), int)
    v = study.verdict("a", "b")
    assert v.word == "no evidence" and v.effect.low is None and v.effect.why == "one patient"
    with pytest.raises(MedxferError, match="one patient"): study.verdicts("b")


def test_a_flawless_arm_keeps_its_exact_bound_where_resamples_lack_a_class():
    study = simulated(np.random.default_rng(0), patients=20, each=1)
    study.y = (np.arange(len(study.y)) < 3).astype(int)
    for key in study.predictions: study.predictions[key] = study.y.astype(float)
    study._cache.clear()
    assert np.isnan(study.resampled("a", [0])).any()
    s, alone = study.summary()["AUROC"]["a"], score(auroc, study.y, study.y.astype(float), study.groups, study.n_boot)
    assert (s.value, s.low) == (1, alone.low) and s.low is not None


def test_a_study_without_seconds_is_saved(tmp_path):
    study = simulated(np.random.default_rng(0))
    study.seconds.clear()
    study.save(tmp_path / "s.npz")
    assert np.isnan(load_study(tmp_path / "s.npz").runs()["seconds"]).all()


def test_scores_stay_in_range():
    study = simulated(np.random.default_rng(8), gain=4.0, seeds=2)
    for s in study.summary()["AUROC"]: assert 0 <= s.low <= s.high <= 1


def many(rng, gains, seeds=4, each=200):
    "A study of arms s0, s1, ... with one budget; arm i is better than s0 by gains[i]."
    y, hard = rng.integers(0, 2, each), rng.normal(size=each)
    study = Study("many", y, np.arange(each) // 2, {f"s{i}": Arm(f"s{i}", "net", 10) for i in range(len(gains))}, seeds, n_boot=300)
    for i, gain in enumerate(gains):
        for seed in range(seeds):
            study.predictions[f"s{i}", seed] = norm.cdf((1 + gain + 0.05 * rng.normal()) * y + hard + 0.3 * rng.normal(size=each))
            study.seconds[f"s{i}", seed] = 1.0
    return study


def test_draws_of_many_quantities_are_as_correlated_as_their_seeds():
    v = np.array([[0.1, 0.1, -0.1], [0.3, 0.3, -0.3], [0.2, 0.2, -0.2], [0.5, 0.5, -0.5]])
    draws = two_level(np.tile(v, (20_000, 1, 1)), v, np.random.default_rng(0))
    alone = two_level(np.tile(v[:, 0], (20_000, 1)), v[:, 0], np.random.default_rng(1))
    assert np.allclose(draws[:, 0], draws[:, 1]) and np.allclose(draws[:, 0], -draws[:, 2])
    assert np.allclose(np.quantile(draws[:, 0], [0.025, 0.5, 0.975]), np.quantile(alone, [0.025, 0.5, 0.975]), atol=0.02)


def test_verdicts_together_are_wider_than_alone_and_find_what_is_large():
    study = many(np.random.default_rng(0), [0, 0, 1.5, -1.0, 0, 0])
    table = study.verdicts("s0")
    assert table["verdict"].to_dict() == {"s1": "no evidence", "s2": "helped", "s3": "hurt", "s4": "no evidence", "s5": "no evidence"}
    for arm, together in table["difference"].items():
        alone = study.difference(arm, "s0")
        assert np.isclose(together.value, alone.value) and together.high - together.low > alone.high - alone.low


def test_verdicts_of_one_pair_are_the_verdict():
    study = many(np.random.default_rng(1), [0, 0.4], each=400)
    together, alone = study.verdicts("s0")["difference"]["s1"], study.difference("s1", "s0")
    assert np.allclose([together.low, together.high], [alone.low, alone.high], atol=0.02)      # symmetric here, percentiles there


def test_verdicts_need_two_common_seeds_and_a_known_strategy():
    study = many(np.random.default_rng(2), [0, 1, 1], seeds=2)
    with pytest.raises(MedxferError, match="did you mean 's"): study.verdicts("s")
    del study.predictions["s1", 0], study.predictions["s2", 1]
    with pytest.raises(MedxferError, match="two seeds"): study.verdicts("s0")


def test_arms_are_compared_at_equal_budgets():
    study = many(np.random.default_rng(3), [0, 0, 1, 1])
    study.arms = {"s0": Arm("scratch", "own", 10), "s1": Arm("scratch", "own", 20), "s2": Arm("probe", "net", 10), "s3": Arm("probe", "net", 20)}
    assert study.verdicts("scratch")["against"].to_dict() == {"s2": "s0", "s3": "s1"}


def test_a_study_comes_back_from_its_file(tmp_path):
    study = simulated(np.random.default_rng(9), gain=1.0)
    study.valid = simulated(np.random.default_rng(10))
    study.groups = study.groups.astype(str).astype(object)
    study.save(tmp_path / "new" / "study.npz")
    back = load_study(tmp_path / "new" / "study.npz")
    assert back.table.equals(study.table) and back.valid.table.equals(study.valid.table) and back.arms == study.arms
    assert back.verdict("a", "b") == study.verdict("a", "b") and back.runs().equals(study.runs())


def test_a_damaged_file_is_no_study(tmp_path):
    file = tmp_path / "study.npz"
    simulated(np.random.default_rng(11)).save(file)
    for damage in (b"", file.read_bytes()[:500], b"something else"):
        file.write_bytes(damage)
        with pytest.raises(MedxferError, match="study.npz is no study"): load_study(file)
    with pytest.raises(MedxferError, match="is no study"): load_study(tmp_path / "gone.npz")


# --- metrics of other ranges ---


def test_less_is_better_where_the_best_value_is_the_lowest():
    s, rng = simulated(np.random.default_rng(1)), np.random.default_rng(1)
    s.metric = brier
    for arm, seed in s.predictions: s.predictions[arm, seed] = 0.5 + 0.3 * (arm == "a") * (2 * s.y - 1) + rng.uniform(-0.1, 0.1, len(s.y))
    assert s.difference("a", "b").high < 0 and [s.verdict("a", "b").word, s.verdict("b", "a").word] == ["helped", "hurt"]
    assert "below 0: a helped" in s.verdict("a", "b").sentence and s.verdicts("b").loc["a", "verdict"] == "helped"


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_every_metric_makes_a_study_that_comes_back(metric, tmp_path):
    s = simulated(np.random.default_rng(2), gain=0.5)
    s.metric, s.flops = metric, dict.fromkeys(s.predictions, 2e9)
    low, high = sorted((metric.worst, metric.best))
    assert all(low <= v.low <= v.value <= v.high <= high for v in s.summary()[metric.name])
    s.save(tmp_path / "s.npz")
    back = load_study(tmp_path / "s.npz")
    assert back.table.equals(s.table) and back.verdict("a", "b") == s.verdict("a", "b") and (back.runs()["GFLOP"] == 2).all()
