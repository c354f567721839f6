"reuse against independent straightforward formulas, and under the changes that must not matter."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import entropy, kendalltau, multivariate_normal, weightedtau
from sklearn.covariance import LedoitWolf
from sklearn.metrics import mutual_info_score
from torch import nn

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.reuse import Agreement, cka, graft, h_score, leep, logme, nce, rank_agreement, reset_from, stage_cka, transrate, weight_distance

SHAPES = [(30, 5, 2), (60, 12, 3), (20, 40, 2)]  # pictures, features, classes: also more features than pictures
seeds = st.integers(0, 10_000)


def some(seed=0, n=60, channels=8, classes=3):
    "Features that say something about the labels, and the labels."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    return rng.normal(size=(n, channels)) + rng.normal(size=(classes, channels))[y] + 0.5, y


def probabilities(seed=0, n=40, source=6, classes=3):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(source, 0.5), size=n), rng.permutation(np.arange(n) % classes)


def rotation(rng, channels): return np.linalg.qr(rng.normal(size=(channels, channels)))[0]


def pictures(n=12, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, 32, 32), dtype=np.uint8)


def small(seed=0): return create_model("mobilenet_v3_small", pretrained=False, num_classes=2, size=32, seed=seed)


def tensors(net): return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


# --- CKA ---


def song_hsic(K, L):
    "The unbiased estimate as Song et al. 2012, equation 5, and Nguyen et al. 2021, equation 3, print it."
    n, one = len(K), np.ones(len(K))
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    return (np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


@pytest.mark.parametrize("n, a, b", [(4, 3, 3), (10, 50, 2), (40, 7, 90)])
def test_cka_equals_songs_formula(n, a, b):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, a)) + 1
    y = rng.normal(size=(n, b)) + x[:, :1]
    K, L = x @ x.T, y @ y.T
    assert np.isclose(cka(x, y), song_hsic(K, L) / np.sqrt(song_hsic(K, K) * song_hsic(L, L)), atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(5, 30), channels=st.integers(2, 60), scale=st.floats(1e-3, 1e3))
def test_cka_ignores_rotation_scale_and_shift(seed, n, channels, scale):
    rng = np.random.default_rng(seed)
    x, y, shift = rng.normal(size=(n, channels)), rng.normal(size=(n, 3)), rng.normal(size=channels)
    turned = scale * x @ rotation(rng, channels) + shift
    assert np.isclose(cka(x, turned), 1, atol=1e-7)
    assert np.isclose(cka(x, y), cka(turned, y), atol=1e-6) and np.isclose(cka(x, y), cka(y, x), atol=1e-12)
    assert -1 - 1e-9 <= cka(x, y) <= 1 + 1e-9


def test_cka_of_independent_representations_is_zero_on_average_however_many_channels():
    rng = np.random.default_rng(0)
    values = [cka(rng.normal(size=(20, 300)), rng.normal(size=(20, 300))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_cka_depends_on_the_order_of_the_pictures():
    x, _ = some()
    assert cka(x, x[::-1]) < 0.5


def test_cka_takes_activation_maps():
    x = np.random.default_rng(0).normal(size=(10, 4, 3, 3))
    assert np.isclose(cka(x, x.reshape(10, -1)), 1)


def test_stage_cka_of_a_network_with_itself_and_with_another():
    own, other = stage_cka(small(), small(), pictures()), stage_cka(small(), small(seed=1), pictures())
    assert np.allclose(np.diag(own), 1) and np.allclose(own, own.T)
    assert list(other.index) == small().stage_names and (np.diag(other) < 0.999).any()


def test_stage_cka_equals_cka_of_the_maps():
    a, b, x = small(), small(seed=1), pictures()
    with torch.inference_mode(): maps = [net.eval().feature_map(net.batch(x), "stage1").numpy() for net in (a, b)]
    assert np.isclose(stage_cka(a, b, x).loc["stage1", "stage1"], cka(*maps), atol=1e-6)


# --- weights ---


def test_weight_distance_by_hand():
    a, b = small(), small()
    with torch.no_grad():
        for p in b.stages.stage1.parameters(): p.mul_(3 if p.ndim > 1 else 7)       # kernels only are counted
    table = weight_distance(a, b)
    assert np.isclose(table.loc["stage1", "relative"], 2) and np.isclose(table.loc["stage1", "cosine"], 1)
    assert (table["relative"].drop("stage1") == 0).all()


def test_two_random_networks_are_strangers():
    table = weight_distance(*(create_model("tf_efficientnet_lite0", pretrained=False, size=32, seed=s) for s in (0, 1)))
    assert table["cosine"].abs().max() < 0.2 and np.allclose(table["relative"], np.sqrt(2), atol=0.2)


def test_graft_takes_the_named_stages_and_leaves_both_networks_alone():
    net, donor = small(), small(seed=1)
    before = tensors(net), tensors(donor)
    new = graft(net, donor, ["stage1"])
    assert same(before[0], tensors(net)) and same(before[1], tensors(donor))
    assert same(tensors(new.stages.stage1), tensors(donor.stages.stage1))
    assert same(tensors(new.stages.stem), tensors(net.stages.stem)) and same(tensors(new.head), tensors(net.head))


@pytest.mark.parametrize("k", ["stem", "stage1", "stage3"])
def test_reset_from_keeps_what_is_before_and_forgets_the_rest(k):
    net = small()
    before, new = tensors(net), reset_from(net, k, pictures(), seed=5)
    names = net.stage_names
    for name in names:
        kept = same(tensors(getattr(net.stages, name)), tensors(getattr(new.stages, name)))
        assert kept == (names.index(name) < names.index(k))
    assert same(before, tensors(net)) and same(tensors(net.head), tensors(new.head)) and not new.training
    assert same(tensors(new), tensors(reset_from(net, k, pictures(), seed=5)))


def test_what_was_reset_can_be_trained():
    new = reset_from(small(), "stage3", pictures())
    new.train()(new.batch(pictures())).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_reset_batchnorm_knows_what_arrives():
    "The averages of the first fresh BatchNorm are those of the pictures it was shown."
    x = pictures(40)
    new = reset_from(small(), "stage2", x)
    norm = next(m for m in new.stages.stage2.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.inference_mode(): new(new.batch(x))
    assert torch.allclose(seen[0].mean((0, 2, 3)), norm.running_mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(seen[0].var((0, 2, 3)), norm.running_var, rtol=1e-4, atol=1e-8)


# --- LogME ---


def evidence(a, b, x, y):
    "log p(y | X, α, β): the density of y after the weights are integrated out."
    return multivariate_normal.logpdf(y, np.zeros(len(y)), np.eye(len(y)) / b + x @ x.T / a)


@pytest.mark.parametrize("n, channels, classes", SHAPES)
def test_logme_is_the_highest_evidence(n, channels, classes):
    x, labels = some(1, n, channels, classes)
    best = []
    for c in range(classes):
        y = (labels == c).astype(float)
        def loss(v, y=y): return -evidence(*np.exp(v), x, y)
        best.append(max(-minimize(loss, start, method="Nelder-Mead", bounds=[(-15, 15)] * 2).fun for start in ((0, 0), (3, 2), (-2, 4), (8, 1))) / n)
    assert np.isclose(logme(x, labels), np.mean(best), atol=1e-4)


def you_2021(x, y, steps=2000):
    "The fixed point of You et al. 2021, algorithm 1, with plain matrices, and their formula of the evidence."
    n, d = x.shape
    a = b = 1.0
    for _ in range(steps):
        A = a * np.eye(d) + b * x.T @ x
        m = b * np.linalg.solve(A, x.T @ y)
        gamma = sum(b * s / (a + b * s) for s in np.linalg.eigvalsh(x.T @ x))
        a, b = gamma / (m @ m), (n - gamma) / ((x @ m - y) ** 2).sum()
    A = a * np.eye(d) + b * x.T @ x
    m = b * np.linalg.solve(A, x.T @ y)
    residual = ((x @ m - y) ** 2).sum()
    log_det = np.linalg.slogdet(A)[1]
    return (n / 2 * np.log(b) + d / 2 * np.log(a) - n / 2 * np.log(2 * np.pi) - b / 2 * residual - a / 2 * m @ m - log_det / 2) / n


@pytest.mark.parametrize("n, channels, classes", SHAPES[:2])
def test_logme_equals_the_papers_algorithm(n, channels, classes):
    x, labels = some(2, n, channels, classes)
    assert np.isclose(logme(x, labels), np.mean([you_2021(x, (labels == c).astype(float)) for c in range(classes)]), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, scale=st.floats(1e-3, 1e3), channels=st.integers(2, 60))
def test_logme_and_h_score_ignore_rotation_and_scale(seed, scale, channels):
    x, y = some(seed, 40, channels)
    turned = scale * x @ rotation(np.random.default_rng(seed), channels)
    assert np.isclose(logme(x, y), logme(turned, y), atol=1e-6)
    for shrink in (False, True): assert np.isclose(h_score(x, y, shrink), h_score(turned + 3, y, shrink), atol=1e-6)


@pytest.mark.parametrize("f", [logme, h_score, transrate])
def test_informative_features_score_higher_than_the_same_features_with_shuffled_labels(f):
    x, y = some(3, 90, 10)
    assert f(x, y) > max(f(x, np.random.default_rng(s).permutation(y)) for s in range(20))


# --- H-score ---


def covariances(x, y):
    g = np.zeros_like(x)
    for c in np.unique(y): g[y == c] = x[y == c].mean(0)
    return np.cov(x, rowvar=False, bias=True), np.cov(g, rowvar=False, bias=True)


@pytest.mark.parametrize("n, channels, classes", SHAPES)
def test_h_score_equals_explicit_covariances(n, channels, classes):
    x, y = some(4, n, channels, classes)
    cov, between = covariances(x, y)
    assert np.isclose(h_score(x, y, shrink=False), np.trace(np.linalg.pinv(cov, rcond=1e-10) @ between), atol=1e-8)
    shrunk = LedoitWolf().fit(x)
    expected = np.trace(np.linalg.inv(shrunk.covariance_) @ ((1 - shrunk.shrinkage_) * between))
    assert np.isclose(h_score(x, y), expected, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(6, 50), channels=st.integers(1, 60), classes=st.integers(2, 5), shrink=st.booleans())
def test_h_score_lies_between_0_and_classes_minus_1(seed, n, channels, classes, shrink):
    x, y = some(seed, n, channels, classes)
    assert -1e-9 <= h_score(x, y, shrink) <= classes - 1 + 1e-6


def test_plain_h_score_is_blind_with_more_channels_than_pictures():
    x, y = np.random.default_rng(0).normal(size=(30, 100)), np.arange(30) % 3
    assert np.isclose(h_score(x, y, shrink=False), 2) and h_score(x, y) < 1.9


# --- TransRate ---


def ten_lines(x, y, eps=1e-4):
    "The code in Huang et al. 2022: every class with the same weight."
    def rate(z): return 0.5 * np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / (len(z) * eps))[1]
    z = x - x.mean(0)
    return rate(z) - np.mean([rate(z[y == c]) for c in range(y.max() + 1)])


@pytest.mark.parametrize("n, channels, classes", SHAPES)
def test_transrate_equals_the_papers_code_for_balanced_classes(n, channels, classes):
    x, y = some(5, n, channels, classes)
    assert np.isclose(transrate(x, y), ten_lines(x, y))


def test_transrate_weights_classes_by_their_pictures():
    "The coding rate of z is that of its covariance, and a log determinant is concave: the gain is never negative."
    x, y = some(6, 60)
    y = np.where(y == 2, 0, y)
    assert transrate(x, y) >= 0 and transrate(np.repeat(x, 2, 0), np.repeat(y, 2)) == pytest.approx(transrate(x, y))


# --- LEEP and NCE ---


def leep_by_loops(theta, y):
    n, k = theta.shape
    total = 0
    for i in range(n):
        likelihood = 0
        for z in range(k):
            joint = sum(theta[j, z] for j in range(n) if y[j] == y[i]) / n
            likelihood += joint / (sum(theta[j, z] for j in range(n)) / n) * theta[i, z]
        total += np.log(likelihood)
    return total / n


@pytest.mark.parametrize("seed, source, classes", [(0, 2, 2), (1, 6, 3), (2, 50, 2)])
def test_leep_equals_loops(seed, source, classes):
    theta, y = probabilities(seed, 25, source, classes)
    assert np.isclose(leep(theta, y), leep_by_loops(theta, y), atol=1e-12)


def test_a_source_class_that_never_speaks_changes_nothing():
    theta, y = probabilities()
    assert np.isclose(leep(np.hstack([theta, np.zeros((len(y), 3))]), y), leep(theta, y))


@settings(max_examples=100, deadline=None)
@given(seed=seeds, n=st.integers(4, 60), source=st.integers(1, 8), classes=st.integers(2, 4))
def test_nce_is_minus_the_conditional_entropy(seed, n, source, classes):
    rng = np.random.default_rng(seed)
    z, y = rng.integers(0, source, n), rng.permutation(np.arange(n) % classes)
    expected = mutual_info_score(z, y) - entropy(np.bincount(y))
    assert np.isclose(nce(z, y), expected, atol=1e-9) and nce(z, y) <= 1e-12


@settings(max_examples=50, deadline=None)
@given(seed=seeds, source=st.integers(1, 20))
def test_leep_is_never_below_what_a_mute_source_reaches(seed, source):
    theta, y = probabilities(seed, 40, source)
    assert -entropy(np.bincount(y)) - 1e-9 <= leep(theta, y) <= 1e-12


# --- rank agreement ---


def test_rank_agreement_is_scipys_tau():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9))
    assert rank_agreement(a, b).tau == pytest.approx(weightedtau(a, b).statistic)


def test_p_of_few_candidates_is_exact():
    "Five candidates: all 120 orders are dealt; only the perfect one orders as well."
    assert rank_agreement(range(5), range(5)).p == pytest.approx(1 / 120)
    assert rank_agreement(range(5), range(5)[::-1]).p == 1


def test_p_is_small_as_often_as_it_says_when_there_is_nothing_to_find():
    rng = np.random.default_rng(0)
    p = np.array([rank_agreement(*rng.normal(size=(2, 4))).p for _ in range(200)])      # 24 orders of four candidates
    assert 0.15 <= (p <= 0.25).mean() <= 0.35


def test_p_agrees_with_kendalls_exact_test_in_direction():
    a, b = np.arange(8), np.array([0, 1, 3, 2, 4, 6, 5, 7])
    assert rank_agreement(a, b).p < 0.05 and kendalltau(a, b, alternative="greater").pvalue < 0.05


@pytest.mark.parametrize("a, b, why", [([1, 2], [1, 2], "2 candidates"), ([1, 1 + 1e-13, 1], [1, 2, 3], "equal"), ([0, 0, 0], [1, 2, 3], "equal")])
def test_rank_agreement_says_when_there_is_none_to_measure(a, b, why):
    found = rank_agreement(a, b)
    assert isinstance(found, Agreement) and found.tau is None and why in repr(found)


# --- faults ---

X, Y = some()
P, Q = probabilities()

FAULTS = {
    "different pictures": (lambda: cka(X, X[1:]), "same pictures"),
    "three pictures": (lambda: cka(X[:3], X[:3]), "at least 4"),
    "infinite": (lambda: cka(X, np.where(X > 1, np.inf, X)), "finite"),
    "constant layer": (lambda: cka(X, np.ones_like(X)), "same numbers"),
    "other architecture": (lambda: weight_distance(small(), create_model("resnet18", pretrained=False, size=32)), "one architecture"),
    "other donor": (lambda: graft(small(), create_model("resnet18", pretrained=False, size=32), ["stage1"]), "one architecture"),
    "unknown stage": (lambda: reset_from(small(), "stage9", pictures()), "unknown stage"),
    "labels too short": (lambda: logme(X, Y[1:]), "shapes"),
    "flat features": (lambda: h_score(X[:, 0], Y), "shapes"),
    "not finite": (lambda: transrate(X * np.nan, Y), "not finite"),
    "unlabelled": (lambda: logme(X, Y - 1), "leave those pictures out"),
    "one class": (lambda: h_score(X, 0 * Y), "two classes"),
    "logits": (lambda: leep(P * 2, Q), "softmax"),
    "probabilities for nce": (lambda: nce(P, Q), "argmax"),
    "scores of others": (lambda: rank_agreement([1, 2, 3], [1, 2]), "for each candidate"),
    "missing score": (lambda: rank_agreement([1, 2, np.nan], [1, 2, 3]), "finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_misuse_is_a_clear_error(name):
    call, says = FAULTS[name]
    with pytest.raises(MedxferError, match=says): call()
