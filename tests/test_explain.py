"Grad-CAM against a hand-written one, on frozen trunks, on every classic; and what it must leave alone."
import copy

import numpy as np
import pytest
import torch
from torch import nn

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError, show
from medxfer_nb.explain import Maps, centre_blob, energy_inside, grad_cam, pointing_hits, show_cams, unchanged
from medxfer_nb.imageset import Task
from medxfer_nb.multitask import MultiTaskNet
from medxfer_nb.surgery import Network, Spec


def tiny_net(seed=0, classes=3):
    "Two random stages with batch normalisation and dropout."
    torch.manual_seed(seed)
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)))
    stages.add_module("stage1", nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()))
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    return Network(stages, neck, nn.Linear(8, classes), Spec("tiny", size=32)).eval()


def batch(n=4, side=32, seed=0): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def by_hand(net, x, targets, module):
    "Selvaraju et al. 2017, equations 1 and 2, without the ReLU, on a copy whose weights all ask for gradients."
    net, caught = copy.deepcopy(net).eval().requires_grad_(True), []
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    dict(net.named_modules())[module].register_forward_hook(lambda m, i, o: caught.append(o))
    logits = net(x)
    (g,) = torch.autograd.grad(logits[range(len(x)), targets].sum(), caught[0])
    return (g.mean((2, 3), keepdim=True) * caught[0]).sum(1).detach().numpy()


def state(net):
    "All that a look inside might change."
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()]
    weights = [(p.requires_grad, id(p), id(p.grad), None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    return {k: v.clone() for k, v in net.state_dict().items()}, flags, weights, torch.get_rng_state()


def assert_same(before, after):
    assert before[1] == after[1] and [w[:3] for w in before[2]] == [w[:3] for w in after[2]] and torch.equal(before[3], after[3])
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert all(a[3] is None or torch.equal(a[3], b[3]) for a, b in zip(before[2], after[2]))


@pytest.mark.parametrize("module", ["stages.stem", "stages.stage1", "stages.stem.0", "stages.stem.1"])
def test_equals_the_hand_written_map(module):
    net, x = tiny_net(), batch()
    maps = grad_cam(net, x, [0, 1, 2, 1], dict(net.named_modules())[module])      # stem.1 is followed by a layer that writes in place
    np.testing.assert_allclose(maps.raw, by_hand(net, x, [0, 1, 2, 1], module), atol=1e-6)


def test_cells_add_up_to_the_logit():
    net, x = tiny_net(), batch()
    with torch.no_grad(): logits = (net(x) - net.head.bias)[:, 2]
    np.testing.assert_allclose(grad_cam(net, x, 2).raw.sum((1, 2)), logits, atol=1e-5)


def test_default_target_is_the_predicted_class():
    net, x = tiny_net(), batch(8)
    maps = grad_cam(net, x)
    np.testing.assert_array_equal(maps.targets, net(x).argmax(1))
    np.testing.assert_array_equal(maps.raw, grad_cam(net, x, maps.targets).raw)
    assert maps.layer == "stage1" and maps.evidence().shape == (8, 32, 32)


def test_frozen_trunk_gives_the_same_map():
    net, x = tiny_net(), batch()
    free = grad_cam(net, x, 1).raw
    net.stages.requires_grad_(False)
    np.testing.assert_array_equal(grad_cam(net, x, 1).raw, free)
    net.requires_grad_(False)
    with torch.inference_mode(): np.testing.assert_array_equal(grad_cam(net, x, 1, "stage1").raw, free)


def calls(net):
    "Calls that work and calls that raise, at the door, in the forward pass and in the middle of it."
    x = batch()
    def breaks(module, args): raise IndexError("out of memory, say")
    def interrupted():
        handle = net.head.register_forward_pre_hook(breaks)
        try: grad_cam(net, x)
        finally: handle.remove()
    good = [lambda: grad_cam(net, x), lambda: grad_cam(net, x, 2, "stem"), lambda: grad_cam(net, x, [0, 1, 2, 0], net.stages[0][0])]
    bad = [lambda: grad_cam(net, x, 3), lambda: grad_cam(net, x, -1), lambda: grad_cam(net, x, layer="stage9"),
           lambda: grad_cam(net, x, layer=nn.ReLU()), lambda: grad_cam(net, x, layer=net.neck), lambda: grad_cam(net, x * torch.nan), interrupted]
    return good, bad


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was_in_100_calls(training, frozen):
    net = tiny_net().train(training)
    net.stages.requires_grad_(not frozen)
    net.stages[1].train(not training)                        # modes may differ between parts
    net.head.weight.grad = torch.randn(3, 8)
    good, bad = calls(net)
    before, x, g = state(net), batch(), torch.get_rng_state()
    for _ in range(10):
        for call in good: call()
        for call in bad:
            with pytest.raises((MedxferError, IndexError)): call()
    assert_same(before, state(net))
    assert torch.equal(torch.get_rng_state(), g) and torch.equal(x, batch()) and not x.requires_grad


@pytest.mark.parametrize("kwargs, words", [
    (dict(target=3), "classes 0 to 2"), (dict(target=-1), "classes 0 to 2"), (dict(target=[0, 1]), "one a picture"),
    (dict(target=0.5), "one class number"), (dict(layer="stage2"), "did you mean 'stage1'"), (dict(layer=nn.ReLU()), "no part of this network"),
    (dict(batch=batch() * torch.nan), "not finite"), (dict(batch=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), "net.batch"),
    (dict(batch=torch.zeros(3, 8, 8)), "net.batch")])
def test_errors(kwargs, words):
    with pytest.raises(MedxferError, match=words): grad_cam(tiny_net(), **dict(batch=batch()) | kwargs)


def test_layers_that_give_no_map_or_take_no_part():
    net = tiny_net()
    net.stages.stem.extra = nn.Conv2d(6, 6, 1)
    net.stages.stem.forward = lambda x: net.stages.stem[2](net.stages.stem[1](net.stages.stem[0](x)))
    with pytest.raises(MedxferError, match="takes no part"): grad_cam(net, batch(), layer=net.stages.stem.extra)
    with pytest.raises(MedxferError, match="no map of places"): grad_cam(net, batch(), layer=net.head)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "googlenet", "alexnet", "tf_efficientnet_lite0", "small_cnn"])
def test_every_classic(name):
    net = create_model(name, pretrained=False, num_classes=2, size=64)
    net.stages.requires_grad_(False)
    x = batch(2, 64).to(net.head.weight.device)
    for layer in (None, net.stage_names[-2]):
        maps = grad_cam(net, x, 1, layer)
        assert maps.raw.shape[0] == 2 and np.isfinite(maps.raw).all() and maps.evidence().shape == (2, 64, 64)


def test_a_network_with_two_heads():
    tasks = {"sick": Task("sick", "binary", ("healthy", "sick")), "mask": Task("mask", "segmentation", ("background", "lesion"))}
    net, x = MultiTaskNet(tiny_net(), tasks), batch()
    before = state(net)
    np.testing.assert_allclose(grad_cam(net, x, 1).raw, by_hand(net, x, [1] * 4, "stages.stage1"), atol=1e-6)
    assert_same(before, state(net))


def test_heat_has_one_scale_and_a_blank_map_stays_blank():
    maps = Maps(np.stack([np.full((2, 2), v, np.float32) for v in (4, 1, -3)]), np.ones(3, int), "stage1", (8, 8), ["", "", "no evidence"])
    assert maps.heat().max((1, 2)).tolist() == [1, 0.25, 0] and maps.heat((5, 5)).shape == (3, 5, 5)
    net = tiny_net()
    nn.init.zeros_(net.head.weight)
    silent = grad_cam(net, batch(), 1)
    assert silent.heat().max() == 0 and all(w.startswith("no gradient") for w in silent.why)
    nn.init.constant_(net.head.weight, -1)
    assert all(w == "no evidence for class 1" for w in grad_cam(net, batch(), 1).why)
    net.stages.stage1[2] = nn.Threshold(1e9, 0)
    assert set(grad_cam(net, batch(), 1).why) == {"the layer is silent for this picture"}


def test_unchanged_restores_after_an_error():
    net = tiny_net()
    before = state(net)
    with pytest.raises(ZeroDivisionError), unchanged(net):
        net.train().requires_grad_(False)
        net.head.weight.grad = torch.ones_like(net.head.weight)
        torch.rand(3)
        1 / 0
    assert_same(before, state(net))


def test_counts_by_hand():
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(20, 9, 9)), rng.random((20, 9, 9)) < 0.3
    for i in range(20):
        r, c = np.unravel_index(maps[i].argmax(), (9, 9))
        assert pointing_hits(maps, masks)[i] == masks[i, r, c]
        positive = maps[i][maps[i] > 0]
        assert energy_inside(maps, masks)[i] == pytest.approx(maps[i][(maps[i] > 0) & masks[i]].sum() / positive.sum())
    blank = -np.ones((1, 9, 9))
    assert not pointing_hits(blank, np.ones((1, 9, 9))).any() and energy_inside(blank, np.ones((1, 9, 9))) == 0
    assert pointing_hits(centre_blob((1, 9, 9)), centre_blob((1, 9, 9)) > 0.9).all()
    with pytest.raises(MedxferError, match="empty"): pointing_hits(maps, masks * 0)
    with pytest.raises(MedxferError, match="evidence"): energy_inside(maps, masks[:, :5])


def spots(n, seed):
    "Noise with a square of finer noise in half of the pictures, equally bright; its place; and labels."
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n, 16, 16)).repeat(2, 1).repeat(2, 2)
    y, masks = np.arange(n) % 2, np.zeros((n, 32, 32), bool)
    for i in np.flatnonzero(y): masks[i, (r := rng.integers(0, 22)):r + 10, (c := rng.integers(0, 22)):c + 10] = True
    return np.where(masks, rng.normal(size=(n, 32, 32)), coarse), y, masks


def test_a_trained_network_points_and_a_randomised_one_does_not():
    pictures, y, masks = spots(200, 0)
    x, labels = torch.tensor(pictures, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1), torch.tensor(y)
    sick, area = y == 1, masks[y == 1].mean()
    net = create_model("small_cnn", pretrained=False, num_classes=2, size=32)
    x = x.to(net.head.weight.device)
    def hits(net): return pointing_hits(grad_cam(net, x[sick], 1, "stage1").evidence(), masks[sick]).mean()
    randomised = np.mean([hits(create_model("small_cnn", pretrained=False, num_classes=2, size=32, seed=s)) for s in range(8)])
    optimiser = torch.optim.Adam(net.train().parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad(); nn.functional.cross_entropy(net(x), labels.to(x.device)).backward(); optimiser.step()
    assert hits(net.eval()) > 0.6 and randomised < area + 0.05, (hits(net), randomised, area)


def test_show_cams_draws_and_describes(monkeypatch):
    import medxfer_nb.explain as explain

    shown = []
    monkeypatch.setattr(explain, "show", lambda fig, alt: shown.append((fig, alt)) or show(fig, alt))
    net, pictures = tiny_net(), np.zeros((3, 48, 48), np.uint8)
    masks = np.zeros((3, 48, 48)); masks[0, 9:20, 9:20] = 1
    maps = grad_cam(net, net.batch(pictures), 1)
    show_cams(pictures, maps, masks, ["a", "b", "c"])
    fig, alt = shown[0]
    assert "3 pictures" in alt and "stage1" in alt and [a.get_title() for a in fig.axes[:3]] == ["a", "b", "c"]
    assert fig.axes[-1].get_ylabel() == "evidence a cell of stage1 (logits)"
    with pytest.raises(MedxferError, match="3 maps"): show_cams(pictures[:2], maps)
