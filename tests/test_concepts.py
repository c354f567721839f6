"The hand-made layers, gradients, splits and features against independent ones."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax as scipy_softmax
from torch import nn

from medxfer_nb.concepts import SmallCNN, TwoLayerNet, conv2d, digits, hog, max_pool2d, softmax, three_splits
from medxfer_nb.core import MedxferError

SMALL = st.integers(1, 4)


@given(SMALL, SMALL, SMALL, SMALL, st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_conv2d_is_torchs(channels, out, h, w, more_h, more_w, seed):
    rng = np.random.default_rng(seed)
    image, kernels = rng.normal(size=(channels, h + more_h, w + more_w)), rng.normal(size=(out, channels, h, w))
    assert np.allclose(conv2d(image, kernels), nn.functional.conv2d(torch.tensor(image), torch.tensor(kernels)).numpy())


@given(SMALL, st.integers(4, 12), st.integers(4, 12), SMALL, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_max_pool2d_is_torchs(channels, h, w, size, seed):
    image = np.random.default_rng(seed).normal(size=(channels, h, w))
    assert np.array_equal(max_pool2d(image, size), nn.functional.max_pool2d(torch.tensor(image), size).numpy())


def test_a_kernel_with_other_channels_is_refused():
    with pytest.raises(MedxferError, match="3 channels"): conv2d(np.zeros((3, 5, 5)), np.zeros((1, 2, 3, 3)))


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gradients_are_finite_differences(n, inputs, hidden, classes, seed):
    rng = np.random.default_rng(seed)
    net, x, y = TwoLayerNet(inputs, hidden, classes, seed), rng.normal(size=(n, inputs)), rng.integers(0, classes, n)
    _, gradients = net.gradients(x, y)
    for name, g in gradients.items():
        weight, direction = getattr(net, name), rng.normal(size=g.shape)
        losses = []
        for side in (1e-6, -1e-6):
            setattr(net, name, weight + side * direction)
            losses.append(net.gradients(x, y)[0])
        setattr(net, name, weight)
        assert abs((losses[0] - losses[1]) / 2e-6 - (g * direction).sum()) < 1e-4


def test_steps_lower_the_loss():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    net = TwoLayerNet(5, 16, 3)
    losses = [net.step(x, y, 0.1) for _ in range(50)]
    assert all(np.diff(losses) < 0) and net(x).shape == (40, 3)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
def test_softmax_is_scipys(scores):
    assert np.allclose(softmax(np.array([scores])), scipy_softmax([scores], axis=1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_splits_share_nothing_and_lose_nothing(labels, seed):
    labels = np.array(labels)
    parts = three_splits(labels, seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for c in np.unique(labels):
        n = (labels == c).sum()
        assert all(abs((labels[p] == c).sum() - share * n) <= 1 for p, share in zip(parts, (0.6, 0.2, 0.2)))
    assert all(np.array_equal(a, b) for a, b in zip(parts, three_splits(labels, seed=seed)))


@pytest.mark.parametrize("shares", [(0.9, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(MedxferError, match="shares="): three_splits([0, 1], shares)


def test_hog_ignores_brightness_contrast_and_sign():
    p = np.random.default_rng(0).random((3, 28, 28))
    assert hog(p).shape == (3, 128) and np.allclose(np.linalg.norm(hog(p), axis=1), 1)
    assert np.allclose(hog(p), hog(p * 50 + 7), atol=1e-4) and np.allclose(hog(p), hog(1 - p), atol=1e-4)
    assert not hog(np.zeros((1, 28, 28))).any()
    with pytest.raises(MedxferError, match="cells of 7"): hog(np.zeros((1, 30, 28)))


def test_hog_votes_for_the_direction_of_a_ramp():
    ramp = np.tile(np.arange(28.0), (28, 1))
    for picture, direction in ((ramp, 0), (ramp.T, 4)): assert hog(picture[None]).reshape(-1, 8).sum(0).argmax() == direction


@pytest.mark.parametrize("size", [(28, 28), (37, 64), (128, 128)])
def test_small_cnn_takes_any_size_and_gray_is_three_equal_channels(size):
    net = SmallCNN(7, channels=(4, 8, 8, 16)).eval()
    gray = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert net(gray).shape == (2, 7) and net.embed(gray).shape == (2, 16)
        assert torch.equal(net(gray), net(gray.repeat(1, 3, 1, 1))) and torch.equal(net(gray), net.head(net.embed(gray)))


def test_small_cnn_depends_on_its_seed_only():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (SmallCNN(3, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["head.weight"], c["head.weight"])


def test_all_weights_of_small_cnn_learn():
    net = SmallCNN(3)
    nn.functional.cross_entropy(net(torch.rand(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_digits_are_balanced_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    pictures, labels = digits()
    again, _ = digits()
    assert pictures.dtype == np.uint8 and pictures.max() == 255 and np.array_equal(pictures, again)
    assert (np.bincount(labels) == 500).all() and list(tmp_path.glob("digits/mnist5k/*.npy"))
