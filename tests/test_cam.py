"The closed form against grad-cam itself, its sums, the layers that may stand between, and the heads that have no closed form."
import copy

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from medxfer_nb.backbones import create_model
from medxfer_nb.cam import as_maps, cam, contrast, places
from medxfer_nb.core import MedxferError
from medxfer_nb.explain import explain
from medxfer_nb.features import features
from medxfer_nb.surgery import Network, Spec

NECKS = {
    "average": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "dropout": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)),
    "efficientnet": lambda: nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                          nn.Dropout(0.2)),
    "rectified twice": lambda: nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}
OTHERS = {
    "hidden layer": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU()),
    "activation behind": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Hardswish()),
    "normalisation behind": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(1, 8), nn.Flatten()),
    "maximum": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "all places": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    "sum": lambda: nn.Sequential(nn.LPPool2d(1, 7), nn.Flatten()),
}


def tiny_net(neck="average", seed=0, classes=3):
    "One random stage with signed activations, with averages that training has moved."
    torch.manual_seed(seed)
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8)))
    head = nn.Linear({"efficientnet": 12, "all places": 32}.get(neck, 8), classes)
    net = Network(stages, (NECKS | OTHERS)[neck](), head, Spec("tiny", size=32))
    net.train()(batch(16, seed=1))
    return net.eval()


def batch(n=4, side=32, seed=0): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def last_places(net):
    "The module whose output is averaged."
    neck = list(net.neck)
    at = next(i for i, m in enumerate(neck) if isinstance(m, nn.AdaptiveAvgPool2d))
    return neck[at - 1] if at else net.stages[-1]


@pytest.mark.parametrize("neck", NECKS)
def test_equals_the_library_s_grad_cam_and_hires_cam(neck):
    net, x = tiny_net(neck), batch()
    ours = cam(net, x)
    for kind in (GradCAM, HiResCAM):
        theirs, kept = copy.deepcopy(net), []
        for m in theirs.modules():
            if hasattr(m, "inplace"): m.inplace = False
        raw = type("Raw", (kind,), dict(get_cam_image=lambda self, *a, kind=kind, kept=kept: kept.append(kind.get_cam_image(self, *a)) or kept[-1]))
        look = raw(theirs, [last_places(theirs)])
        for c in range(3):
            stretched = look(x, [ClassifierOutputTarget(c)] * 4)
            np.testing.assert_allclose(ours[:, c], kept[-1], atol=1e-5)
            np.testing.assert_allclose(scale_cam_image(scale_cam_image(ours[:, c].clamp(min=0).numpy(), (32, 32))), stretched, atol=1e-4)


@pytest.mark.parametrize("neck", NECKS)
def test_cells_and_bias_add_up_to_every_logit(neck):
    net, x = tiny_net(neck), batch()
    with torch.no_grad(): logits = net(x)
    torch.testing.assert_close(cam(net, x).sum((2, 3)) + net.head.bias, logits, atol=1e-5, rtol=1e-5)
    without = copy.deepcopy(net)
    nn.init.zeros_(without.head.bias)
    torch.testing.assert_close(cam(without, x), cam(net, x))                       # the bias belongs to no place


def test_the_map_says_what_a_place_gives():
    net, x = tiny_net(), batch(1)
    with torch.no_grad():
        a = net.feature_map(x)
        gone = a.clone()
        gone[:, :, 2, 4] = 0
        lost = net.head(net.neck(a)) - net.head(net.neck(gone))
    torch.testing.assert_close(cam(net, x)[:, :, 2, 4], lost, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("neck", OTHERS)
def test_other_heads_are_refused_and_say_what_to_use(neck):
    with pytest.raises(MedxferError, match="tiny: .*use explain"): cam(tiny_net(neck), batch())


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm, as it resizes a ViT's places
@pytest.mark.parametrize("name, closed", [
    ("small_cnn", True), ("googlenet", True), ("resnet18", True), ("mobilenet_v2", True), ("tf_efficientnet_lite0", True), ("alexnet", False),
    ("mobilenet_v3_small", False), ("vit_tiny_patch16_224", False), ("convnext_atto", False)])
def test_every_network_is_closed_exactly_or_refused(name, closed):
    net = create_model(name, pretrained=False, num_classes=3, size=64).eval()
    x = batch(2, 64).to(net.head.weight.device)
    if not closed:
        with pytest.raises(MedxferError, match="use explain"): cam(net, x)
        return
    evidence = cam(net, x)
    assert len(places(net, net.feature_map(x))) == 0
    for c in range(3): np.testing.assert_allclose(evidence[:, c].cpu(), explain(net, x, c).raw, atol=1e-5)


def test_pictures_maps_and_batches_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    net, pictures = tiny_net("efficientnet"), np.random.default_rng(0).integers(0, 256, (7, 40, 40), dtype=np.uint8)
    expected = cam(net, net.batch(pictures))
    torch.testing.assert_close(cam(net, pictures, batch_size=3), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cam(net, features(net, pictures, pooled=False)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cam(net, net.batch(pictures), batch_size=2), expected, atol=1e-5, rtol=1e-4)
    def never(*args): raise AssertionError("the trunk ran although its maps are in the cache")
    net.stages.stem[0].register_forward_hook(never)
    torch.testing.assert_close(cam(net, pictures, batch_size=3), expected, atol=1e-5, rtol=1e-4)


def test_the_network_is_left_as_it_was():
    for neck in (*NECKS, "hidden layer"):
        net = tiny_net(neck).train()
        net.stages.eval()
        net.head.weight.grad = torch.ones_like(net.head.weight)
        before, chance, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state(), batch()
        for given in (x, x[:, :2], x[0]):
            try: cam(net, given)
            except MedxferError: pass
        assert net.training and net.neck.training and not net.stages.training and torch.equal(torch.get_rng_state(), chance)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and (net.head.weight.grad == 1).all()
        assert not cam(tiny_net(), x).requires_grad and not any(m._forward_hooks for m in net.modules())


def test_contrast_is_what_the_softmax_sees():
    net, x = tiny_net(), batch()
    twin = copy.deepcopy(net)
    with torch.no_grad(): twin.head.weight += torch.randn(1, 8)
    with torch.no_grad(): torch.testing.assert_close(twin(x).softmax(1), net(x).softmax(1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(cam(twin, x), cam(net, x), atol=1e-2)
    torch.testing.assert_close(contrast(cam(twin, x)), contrast(cam(net, x)), atol=1e-5, rtol=1e-4)
    assert contrast(cam(net, x)).sum(1).abs().max() < 1e-6


def test_as_maps_are_those_of_explain():
    net, x = tiny_net(), batch(8)
    evidence = cam(net, x)
    for target in (None, 2, [0, 1, 2, 0, 1, 2, 0, 1]):
        ours, theirs = as_maps(evidence, net, target), explain(net, x, target, layer="stem")
        np.testing.assert_allclose(ours.raw, theirs.raw, atol=1e-6)
        np.testing.assert_allclose(ours.p, theirs.p, atol=1e-6)
        assert ours.targets.tolist() == theirs.targets.tolist() and (ours.layer, ours.side, ours.unit) == (theirs.layer, theirs.side, theirs.unit)
    np.testing.assert_allclose(as_maps(evidence, net, 1, against=True).raw, contrast(evidence)[:, 1], atol=1e-6)
    assert set(as_maps(-evidence.abs(), net, 1).why) == {"no evidence for class 1"}


@pytest.mark.parametrize("x, words", [
    (torch.zeros(2, 5, 7, 7), "5 channels, and the head reads 8"), (torch.zeros(3, 32, 32), "give a batch"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "give a batch"), (np.zeros((2, 32, 32)), "uint8")])
def test_wrong_input(x, words):
    with pytest.raises(MedxferError, match=words): cam(tiny_net(), x)


def test_maps_that_the_neck_cannot_read_and_classes_that_are_not_there():
    with pytest.raises(MedxferError, match="not what the last stage gives"): cam(tiny_net("efficientnet"), torch.zeros(2, 5, 7, 7))
    net = tiny_net()
    evidence = cam(net, batch(4))
    for target in (3, -1, [0, 1, 2, 3]):
        with pytest.raises(MedxferError, match="classes 0 to 2"): as_maps(evidence, net, target)
    for target in (0.5, [0, 1], "one"):
        with pytest.raises(MedxferError, match="give one class number, or 4, one a picture"): as_maps(evidence, net, target)
