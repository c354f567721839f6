"Surgery: the cut changes nothing, frozen parts stay, stems compute what they replace."
import copy
import hashlib
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medxfer_nb.concepts import SmallCNN
from medxfer_nb.core import MedxferError
from medxfer_nb.explain import explain
from medxfer_nb.surgery import FromMap, Network, Spec, ToMap, cut, cut_stages, one_channel, small_stem, unroll
from medxfer_nb.transfer import build_target, copy_weights, freeze

CLASSIC = ("alexnet", "vgg16", "googlenet", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
SMALLER = {"vit_tiny_patch16_224": dict(img_size=64), "swin_tiny_patch4_window7_224": dict(embed_dim=24),
           "cait_xxs24_224": dict(img_size=64, depth=6)}
TIMM = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "regnetx_002", "convnext_atto", "hrnet_w18_small", "dla46x_c",
        "test_vit_relpos", *SMALLER)
RELATIVE = dict(atol=1e-4, rtol=1e-3)


def pictures(n, side): return np.random.default_rng(0).integers(0, 256, (n, side, side), dtype=np.uint8)


def narrow(name):
    "AlexNet or VGG with 32 channels in place of the 4096 of its fully connected layers: the cut does not depend on their width."
    with torch.device("meta"): model = torchvision.models.get_model(name, weights=None)
    full = [i for i, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
    widths = [model.classifier[full[0]].in_features, 32, 32, 9]
    for i, inputs, outputs in zip(full, widths, widths[1:]): model.classifier[i] = nn.Linear(inputs, outputs)
    model.to_empty(device="cpu").apply(lambda m: isinstance(m, (nn.Conv2d, nn.Linear)) and m.reset_parameters())
    return model


def library(name):
    "The library's own model with random weights."
    torch.manual_seed(3)
    if name == "small_cnn": return nn.Sequential(OrderedDict(SmallCNN(9).named_children()))
    if name in TIMM: return timm.create_model(name, num_classes=9, **SMALLER.get(name, {}))
    if name in ("alexnet", "vgg16"): return narrow(name)
    return torchvision.models.get_model(name, weights=None, **dict(init_weights=False, aux_logits=False) if name == "googlenet" else {})


def side(name):
    "A small one, where the architecture leaves it free."
    return {"swin_tiny_patch4_window7_224": 224, "test_vit_relpos": 160, "alexnet": 96}.get(name, 64)


@pytest.fixture(scope="module", params=("small_cnn", *CLASSIC, *TIMM))
def built(request):
    "The library's model, the same as a network of ours, and two pictures."
    model = library(request.param).eval()
    net = Network(*cut(model, side(request.param)), Spec(request.param, size=side(request.param))).eval()
    return model, net, net.batch(pictures(2, net.spec.size))


@pytest.fixture
def net(built): return copy.deepcopy(built[1])


@pytest.fixture
def x(built): return built[2]


def fingerprint(weights):
    digest = hashlib.sha256()
    for t in weights.values(): digest.update(np.ascontiguousarray(t.numpy()))
    return digest.hexdigest()


# --- the cut ---


def test_network_computes_what_the_library_computes(built):
    model, net, x = built
    with torch.inference_mode():
        torch.testing.assert_close(net(x), model(x), **RELATIVE)
        assert torch.equal(net.head(net.neck(net.feature_map(x))), net(x))


def test_unrolled_layers_compute_what_the_library_computes(built):
    model, _, x = built
    with torch.inference_mode(): torch.testing.assert_close(nn.Sequential(unroll(model))(x), model(x), **RELATIVE)


def test_every_stage_hands_on_a_map_that_does_not_grow(net, x):
    with torch.inference_mode(): maps = [net.feature_map(x, stage) for stage in net.stage_names]
    sides = [m.shape[-1] for m in maps]
    assert all(m.ndim == 4 and m.shape[2] == m.shape[3] for m in maps) and sides == sorted(sides, reverse=True) and len(maps) > 1
    with torch.inference_mode(): torch.testing.assert_close(net.neck(maps[-1]), net.embed(x))
    assert len(net.embed(x)) == 2 and net.embed(x).shape[1] == net.head.in_features


@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5))
def test_tokens_survive_as_maps(extra, side, channels):
    x, to_map, seen = torch.randn(2, extra + side**2, channels), ToMap(extra), []
    to_map.places.register_forward_hook(lambda module, given, places: seen.append(places))
    m = to_map(x)
    assert m.shape == (2, channels * (1 + extra), side, side) and torch.equal(FromMap(extra)(m), x) and torch.equal(m[:, :channels], seen[0])
    assert torch.equal(m[0, :channels, side - 1, 0], x[0, extra + side * (side - 1)])      # row by row


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_stages_begin_where_the_resolution_falls(falls):
    layers = {f"conv{i}": nn.Conv2d(3, 3, 3, 1 + fall, padding=1) for i, fall in enumerate(falls)}
    stages = cut_stages(layers, 64)
    assert len(stages) == 1 + sum(falls[1:]) and [n for s in stages for n, _ in s.named_children()] == list(layers)


# --- the promises ---


def test_frozen_stages_get_no_gradient_and_do_not_drift(net, x):
    upto = net.stage_names[len(net.stages) // 2]
    k = net.stage_names.index(upto) + 1
    freeze(net, upto)
    before = {n: v.clone() for n, v in net.stages[:k].state_dict().items()}
    net.train()(x).sum().backward()
    assert all(p.grad is None for p in net.stages[:k].parameters()) and net.head.weight.grad is not None
    assert all(torch.equal(v, before[n]) for n, v in net.stages[:k].state_dict().items())
    assert any(p.grad is not None for p in [*net.stages[k:].parameters(), *net.neck.parameters(), *net.head.parameters()])


def test_target_equals_source_until_it_trains_and_the_weights_are_a_deep_copy(net, x):
    net_a, weights = net, copy_weights(net)
    net_b, before = build_target(net_a, weights, 5), fingerprint(weights)
    with torch.inference_mode(): assert torch.equal(net_a.embed(x), net_b.embed(x)) and net_b(x).shape == (2, 5)
    net_b.train()(x).square().mean().backward()
    with torch.no_grad():
        for p in net_b.parameters():
            if p.grad is not None: p -= p.grad.sign()
    assert fingerprint(weights) == before == fingerprint(net_a.state_dict())
    with torch.inference_mode(): assert not torch.equal(net_a.embed(x), net_b.eval().embed(x))


def test_every_network_has_a_heat_map_that_depends_on_the_place(net, x):
    maps = explain(net, x, target=1)
    assert maps.raw.shape[0] == 2 and maps.raw.ndim == 3 and maps.raw.any() and np.ptp(maps.raw, axis=(1, 2)).min() > 0


def test_all_normalisation_rests_with_bn_eval():
    net = Network(*cut(library("resnet18"), 64), Spec("resnet18", size=64))
    before = {n: v.clone() for n, v in net.named_buffers()}
    net.bn_eval = True
    net.train()(net.batch(pictures(4, 64)))
    assert net.training and all(torch.equal(v, before[n]) for n, v in net.named_buffers())
    net.bn_eval = False
    net.train()(net.batch(pictures(4, 64)))
    assert not torch.equal(net.stages.stem.bn1.running_mean, before["stages.stem.bn1.running_mean"])


# --- pictures in ---


@pytest.fixture(scope="module")
def small(): return Network(*cut(SmallCNN(2), 32), Spec("small", size=32)).eval()


def test_grey_pictures_fill_three_channels_and_colour_keeps_them(small):
    grey = np.arange(64 * 64, dtype=np.uint8).reshape(1, 64, 64)
    assert torch.equal(small.batch(grey), small.batch(np.repeat(grey[..., None], 3, 3))) and small.batch(grey).shape == (1, 3, 32, 32)
    colour = np.zeros((1, 32, 32, 3), np.uint8); colour[..., 1] = 255
    expected = [(value - mean) / std for value, mean, std in zip((0, 1, 0), Spec.mean, Spec.std)]
    np.testing.assert_allclose(small.batch(colour)[0, :, 5, 7].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("wrong", [np.zeros((2, 9, 9)), np.zeros((9, 9), np.uint8), np.zeros((1, 2, 3, 4, 5), np.uint8)])
def test_wrong_pictures_are_refused(small, wrong):
    with pytest.raises(MedxferError, match="batch"): small.batch(wrong)


@given(st.integers(1, 20), st.integers(1, 9))
def test_batches_are_all_pictures_in_order_in_equal_parts(small, n, batch_size):
    x, parts = pictures(n, 32), list(small.batches(pictures(n, 32), batch_size))
    sizes = [len(part) for part in parts]
    assert torch.equal(torch.cat(parts), small.batch(x)) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


# --- heads and stems ---


def test_a_fresh_head_depends_on_its_seed_alone(small):
    torch.manual_seed(5); expected = torch.rand(1); torch.manual_seed(5)
    a, b, c = (copy.deepcopy(small).reset_classifier(4, seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected) and a.shape[0] == 4 and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "mobilenet_v2", "convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_lite1"])
def test_one_channel_computes_what_three_equal_ones_do(name):
    three = Network(*cut(library(name), side(name)), Spec(name, size=side(name))).eval()
    one, grey = one_channel(copy.deepcopy(three)), torch.randn(2, 1, side(name), side(name))
    with torch.inference_mode(): torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)), **RELATIVE)
    assert one.batch(pictures(2, 30)).shape == grey.shape
    with pytest.raises(MedxferError, match="batch"): one.batch(np.zeros((1, 9, 9, 3), np.uint8))


def test_one_channel_is_refused_where_the_stem_is_no_convolution_of_colours():
    net = Network(*cut(timm.create_model("tresnet_m"), 64), Spec("tresnet_m", size=64)).eval()
    with pytest.raises(MedxferError, match="in_chans=1"): one_channel(net)


def test_small_stem_keeps_the_side_and_the_middle_of_the_kernels():
    usual = library("resnet18")
    kernels = usual.conv1.weight.clone()
    net = Network(*cut(small_stem(usual)), Spec("resnet18", size=28)).eval()
    x = net.batch(pictures(2, 28))
    assert net.feature_map(x, "stem").shape == (2, 64, 28, 28) and net.feature_map(x).shape == (2, 512, 4, 4)
    assert torch.equal(net.stages.stem.conv1.weight, kernels[:, :, 2:5, 2:5])
    with pytest.raises(MedxferError, match="small"): small_stem(library("mobilenet_v2"))


def test_mirrored_views_of_an_array_are_pictures_too(small):
    pictures = np.arange(4 * 32 * 32).reshape(4, 32, 32).astype(np.uint8)
    assert torch.equal(small.batch(pictures[:, :, ::-1]), small.batch(pictures[:, :, ::-1].copy()))
