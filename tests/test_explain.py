"Eleven methods against hand-written ones, the library and closed forms; on several heads, ensembles and all classics; and what they leave alone."
import copy
import random
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam import AblationCAM, EigenCAM, GradCAM, HiResCAM, LayerCAM, ScoreCAM, XGradCAM
from pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.nn import functional as F

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError, show
from medxfer_nb.ensembles import Ensemble
from medxfer_nb.explain import METHODS, Maps, explain, show_cams, unchanged
from medxfer_nb.faithful import pointing_hits
from medxfer_nb.imageset import Task
from medxfer_nb.multitask import MultiTaskNet
from medxfer_nb.surgery import Network, Spec

module = import_module("medxfer_nb.explain")  # medxfer_nb.explain is the function
TASKS = {"sick": Task("sick", "binary", ("healthy", "sick")), "kind": Task("kind", "multiclass", ("none", "round", "square")),
         "mask": Task("mask", "segmentation", ("background", "lesion"))}
AT_LAYER, AT_PIXELS = ([name for name, m in METHODS.items() if m.pixels == pixels] for pixels in (False, True))


def tiny_net(seed=0, classes=3):
    "Two random stages with batch normalisation and dropout."
    torch.manual_seed(seed)
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)))
    stages.add_module("stage1", nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()))
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    return Network(stages, neck, nn.Linear(8, classes), Spec("tiny", size=32)).eval()


def tiny_tasks(): return MultiTaskNet(tiny_net(), TASKS, width=8).eval()


def batch(n=4, side=32, seed=0): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pictures(n=4, side=32, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


def by_hand(net, x, score, name):
    "Selvaraju et al. 2017, equations 1 and 2, without the ReLU, on a copy whose weights all ask for gradients."
    net, caught = copy.deepcopy(net).eval().requires_grad_(True), []
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    dict(net.named_modules())[name].register_forward_hook(lambda m, i, o: caught.append(o))
    (g,) = torch.autograd.grad(score(net, x).sum(), caught[0])
    return (g.mean((2, 3), keepdim=True) * caught[0]).sum(1).detach().numpy()


def classes(targets): return lambda net, x: net(x)[range(len(x)), targets]


def state(net):
    "All that a look inside might change."
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), list(m._modules)) for m in net.modules()]
    weights = [(p.requires_grad, id(p), id(p.grad), None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 (libraries use the global generator)
    return {k: v.clone() for k, v in net.state_dict().items()}, flags, weights, chance


def assert_same(before, after):
    assert before[1] == after[1] and [w[:3] for w in before[2]] == [w[:3] for w in after[2]]
    assert torch.equal(before[3][0], after[3][0]) and before[3][1:] == after[3][1:]
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert all(a[3] is None or torch.equal(a[3], b[3]) for a, b in zip(before[2], after[2]))


# --- formulas ---


@pytest.mark.parametrize("name", ["stages.stem", "stages.stage1", "stages.stem.0", "stages.stem.1"])
def test_equals_the_hand_written_map(name):
    net, x = tiny_net(), batch()
    maps = explain(net, x, [0, 1, 2, 1], layer=dict(net.named_modules())[name])      # stem.1 is followed by a layer that writes in place
    np.testing.assert_allclose(maps.raw, by_hand(net, x, classes([0, 1, 2, 1]), name), atol=1e-6)
    np.testing.assert_array_equal(explain(net, x, [0, 1, 2, 1], layer=name.removeprefix("stages.")).raw, maps.raw)


LIBRARY = {"grad_cam": GradCAM, "hires_cam": HiResCAM, "layer_cam": LayerCAM, "xgrad_cam": XGradCAM, "eigen_cam": EigenCAM, "score_cam": ScoreCAM,
           "ablation_cam": AblationCAM}


@pytest.mark.parametrize("method", LIBRARY)
@pytest.mark.parametrize("layer", ["stem", "stage1"])
def test_equals_the_library_before_its_stretching(method, layer):
    net, x, targets = tiny_net(), batch(), [0, 1, 2, 1]
    with torch.no_grad(): net.head.bias -= 0.06              # scores of both signs
    theirs, kept = copy.deepcopy(net), []
    cam = type("Raw", (LIBRARY[method],), dict(get_cam_image=lambda self, *a: kept.append(LIBRARY[method].get_cam_image(self, *a)) or kept[-1]))(
        theirs, [theirs.stages.get_submodule(layer)])
    stretched = cam(x, [ClassifierOutputTarget(t) for t in targets])
    ours = explain(net, x, targets, method, layer)
    if method == "ablation_cam":  # they divide by the score
        with torch.no_grad(): y = net(x)[range(4), targets].numpy()
        assert (y < 0).any() and (y > 0).any()
        kept[0] = kept[0] * y[:, None, None]
    if method == "eigen_cam": kept[0] = kept[0] * np.sign((kept[0] * ours.raw).sum((1, 2), keepdims=True))  # their sign is what comes
    np.testing.assert_allclose(ours.raw, kept[0], atol=1e-5 * max(1, np.abs(kept[0]).max()))
    if method == "grad_cam": np.testing.assert_allclose(scale_cam_image(scale_cam_image(ours.raw.clip(0), (32, 32))), stretched, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
def test_grad_cam_plus_plus_is_its_equation_however_small_the_gradients(scale):
    net, x, caught = tiny_net(), batch(), []
    with torch.no_grad(): net.head.weight *= scale
    net.stages.stage1.register_forward_hook(lambda m, i, o: caught.append(o))
    (g,) = torch.autograd.grad(net(x)[:, 1].sum(), caught[0])
    a, g = caught[0].detach().double(), g.double()
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + g**3 * a.sum((2, 3), keepdim=True)), 0)          # equation 19
    expected = ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1).numpy()
    np.testing.assert_allclose(explain(net, x, 1, "grad_cam++", "stage1").raw, expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "xgrad_cam"])
def test_cells_add_up_to_the_logit(method):
    net, x = tiny_net(), batch()
    with torch.no_grad(): logits = (net(x) - net.head.bias)[:, 2]
    np.testing.assert_allclose(explain(net, x, 2, method).raw.sum((1, 2)), logits, atol=1e-5)


def test_the_sign_of_eigen_cam_follows_the_activity():
    net, x = tiny_net(), batch(8)
    with torch.no_grad(): active = net.feature_map(x).sum(1).numpy()
    raw = explain(net, x, method="eigen_cam").raw
    assert all(np.corrcoef(r.ravel(), a.ravel())[0, 1] > 0 for r, a in zip(raw, active)) and np.allclose(raw.mean((1, 2)), 0, atol=1e-5)


class Linear(nn.Module):
    "Every pixel and colour has its weight."
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    def forward(self, x): return (x * self.weight).sum(1, keepdim=True)


def linear_net():
    net = Network(nn.Sequential(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(1, 2), Spec("linear", size=32)).eval()
    net.stages.add_module("stem", Linear())
    return net


def test_at_the_pixels_of_a_linear_network():
    net, x = linear_net(), batch()
    share = (x * net.stages.stem.weight).sum(1).detach().numpy() * net.head.weight[1].item() / 32**2
    np.testing.assert_allclose(explain(net, x, 1, "integrated_gradients").raw, share, atol=1e-6)
    covered = explain(net, x, 1, "occlusion").raw                                    # cells of 4 pixels, squares of 8
    np.testing.assert_allclose(covered[:, 3, 5], share[:, 10:18, 18:26].sum((1, 2)), atol=1e-6)
    np.testing.assert_allclose(covered[:, 0, 7], share[:, 0:6, 26:32].sum((1, 2)), atol=1e-6)
    plain = (net.stages.stem.weight * net.head.weight[1]).abs().amax(1) / 32**2
    np.testing.assert_allclose(explain(net, x, 1, "guided_backprop").raw, plain.expand(4, -1, -1).detach().numpy(), atol=1e-6)


def test_integrated_gradients_add_up():
    net, x = tiny_net(), batch()
    with torch.no_grad(): owed = (net(x) - net(torch.zeros_like(x)))[:, 1].numpy()
    np.testing.assert_allclose(explain(net, x, 1, "integrated_gradients").raw.sum((1, 2)), owed, atol=0.1 * np.abs(owed).max())


@pytest.mark.parametrize("kind", ["module", "function", "relu6"])
def test_guided_backprop_is_the_library_s_and_sees_every_rectifier(kind):
    net, x = tiny_net(), batch() / 10                                                # small: nothing reaches 6
    theirs = copy.deepcopy(net)
    expected = np.stack([np.abs(GuidedBackpropReLUModel(theirs)(x[i:i + 1].clone(), 1)).max(2) for i in range(4)])
    class Function(nn.Module):
        def forward(self, x): return F.relu(x, inplace=True)
    for stage in net.stages: stage[2] = {"module": stage[2], "function": Function(), "relu6": nn.ReLU6(inplace=True)}[kind]
    np.testing.assert_allclose(explain(net, x, 1, "guided_backprop").raw, expected, atol=1e-6)
    with torch.enable_grad():
        (plain,) = torch.autograd.grad(net(leaf := x.clone().requires_grad_())[:, 1].sum(), leaf)
    assert not np.allclose(plain.abs().amax(1), expected, atol=1e-4)


# --- what is asked: classes, tasks, ensembles ---


@pytest.mark.parametrize("method", METHODS)
def test_default_target_is_the_predicted_class_and_parts_make_the_whole(method):
    net, x = tiny_net(), batch(7)
    maps = explain(net, x, method=method)
    np.testing.assert_array_equal(maps.targets, net(x).argmax(1))
    np.testing.assert_allclose(maps.p, net(x).softmax(1).detach(), atol=1e-6)
    parts = explain(net, x, maps.targets, method, batch_size=3)
    np.testing.assert_allclose(parts.raw, maps.raw, atol=1e-5 * max(1, np.abs(maps.raw).max()))
    assert maps.layer == ("input" if METHODS[method].pixels else "stage1") and maps.evidence().shape == (7, 32, 32) and len(parts.why) == 7
    assert (maps.method, maps.unit, maps.signed) == (method, METHODS[method].unit, METHODS[method].signed)


def test_pictures_are_made_into_batches():
    net, images = tiny_net(), pictures(5, 48)
    np.testing.assert_array_equal(explain(net, images, 1, batch_size=2).raw, explain(net, net.batch(images), 1).raw)


def test_frozen_trunk_gives_the_same_map():
    net, x = tiny_net(), batch()
    free = {method: explain(net, x, 1, method).raw for method in METHODS}
    net.requires_grad_(False)
    for method, raw in free.items():
        with torch.inference_mode(): np.testing.assert_array_equal(explain(net, x, 1, method).raw, raw)


def test_every_task_of_a_network_with_three_heads():
    net, x = tiny_tasks(), batch()
    np.testing.assert_allclose(explain(net, x, 1).raw, by_hand(net, x, classes([1] * 4), "stages.stage1"), atol=1e-6)
    kind = explain(net, x, 2, task="kind")
    np.testing.assert_allclose(kind.raw, by_hand(net, x, lambda net, x: net.outputs(x)["kind"][:, 2], "stages.stage1"), atol=1e-6)
    assert kind.p.shape == (4, 3) and kind.unit == "logits"


def test_a_drawn_region_an_outline_and_a_size():
    tasks = {"mask": TASKS["mask"], "outline": Task("outline", "segmentation", unit="mm"), "size": Task("size", "regression", unit="mm")}
    net, x = MultiTaskNet(tiny_net(), tasks, width=8).eval(), batch()
    with torch.no_grad():
        for name in ("mask", "outline"): net.heads[name].bias.fill_(0)
        net.heads["size"].scale[1] = 7
    drawn, inside = net.outputs(x)["mask"] > 0, net.outputs(x)["outline"] < 0
    assert 0 < drawn.float().mean() < 1 and 0 < inside.float().mean() < 1
    expected = {"mask": lambda net, x: (net.outputs(x)["mask"] * drawn).sum((1, 2, 3)), "size": lambda net, x: 7 * net.outputs(x)["size"][:, 0],
                "outline": lambda net, x: -(net.outputs(x)["outline"] * inside).sum((1, 2, 3))}
    units = {"mask": "logits of the drawn region", "outline": "depth of the drawn region", "size": "mm"}
    for name, score in expected.items():
        maps = explain(net, x, task=name, layer="stem")
        want = by_hand(net, x, score, "stages.stem")
        np.testing.assert_allclose(maps.raw, want, atol=1e-4 * max(1, np.abs(want).max()))
        assert maps.p is None and maps.unit == units[name]
    np.testing.assert_array_equal(explain(net, x).raw, explain(net, x, task="mask").raw)       # its first task, not a head that nobody trained
    with torch.no_grad(): net.heads["mask"].bias.fill_(-1e3)
    assert set(explain(net, x, task="mask").why) == {"the network draws nothing here"}


class Member:
    def __init__(self, net): self.net = net
    def __repr__(self): return "Member"


def test_the_evidence_of_an_ensemble_is_the_mean_of_its_members():
    images, nets = pictures(), [tiny_net(0), tiny_net(1)]
    nets[1].spec = replace(nets[1].spec, size=48)                                    # a map of another side
    one, two = (explain(net, images, 1).raw for net in nets)
    both = explain(Ensemble([Member(net) for net in nets]), images, 1)
    assert one.shape == (4, 7, 7) and two.shape == (4, 11, 11) == both.raw.shape and both.side == (48, 48)
    np.testing.assert_allclose(both.raw.sum((1, 2)), (one.sum((1, 2)) + two.sum((1, 2))) / 2, atol=1e-5)
    p = np.stack([net(net.batch(images)).softmax(1).detach() for net in nets])
    assert np.allclose(both.p, p.mean(0), atol=1e-6) and (explain(Ensemble([Member(n) for n in nets]), images).targets == p.mean(0).argmax(1)).all()
    y = np.array([0, 1, 2, 0])
    best = Ensemble([Member(net) for net in nets], "best", p, y)
    chosen = explain(best, images, 1).raw
    k = best.combine.keywords["weights"].argmax()
    np.testing.assert_allclose(chosen.sum((1, 2)), (one, two)[k].sum((1, 2)), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_cells_are_shared_out_by_area(n, m):
    s = module._shares(n, m)
    assert s.shape == (m, n) and (s >= -1e-12).all() and np.allclose(s.sum(0), 1)
    assert np.allclose(s @ np.full(n, 1 / n), 1 / m)                                 # even stays even
    if m % n == 0: assert np.allclose(s, np.kron(np.eye(n), np.ones((m // n, 1))) * n / m)


# --- left as it was ---


def calls(net):
    "Calls that work and calls that raise, at the door, in the forward pass and in the middle of it."
    x = batch(2)
    def breaks(module, args): raise IndexError("out of memory, say")
    def interrupted(method):
        handle = net.head.register_forward_pre_hook(breaks)
        try: explain(net, x, method=method)
        finally: handle.remove()
    def later(method, n=[0]):  # noqa: B006 (it counts)
        def count(module, args):
            n[0] += 1
            if n[0] % 3 == 0: raise IndexError("out of memory, say")
        handle = net.neck.register_forward_pre_hook(count)
        try: explain(net, x, method=method, layer=None if METHODS[method].pixels else "stem")
        finally: handle.remove(); n[0] = 0
    good = [lambda m=m: explain(net, x, 1, m) for m in METHODS] + [lambda: explain(net, x, [0, 1], layer=net.stages[0][0])]
    if hasattr(net, "tasks"): good += [lambda m=m: explain(net, x, method=m, task="mask") for m in ("grad_cam", "ablation_cam", "guided_backprop")]
    bad = [lambda m=m: interrupted(m) for m in METHODS]
    bad += [lambda m=m: later(m) for m in ("score_cam", "ablation_cam", "occlusion", "integrated_gradients")]
    bad += [lambda: explain(net, x, 3), lambda: explain(net, x, layer="stage9"), lambda: explain(net, x, layer=net.neck),
            lambda: explain(net, x * torch.nan), lambda: explain(net, x * torch.nan, method="eigen_cam"), lambda: explain(net, x, method="guess")]
    return good, bad


@pytest.mark.parametrize("make", [tiny_net, tiny_tasks])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was_after_every_call(make, training, frozen):
    net = make().train(training)
    net.stages.requires_grad_(not frozen)
    net.stages[1].train(not training)                        # modes may differ between parts
    net.head.weight.grad = torch.randn_like(net.head.weight)
    good, bad = calls(net)
    assert len(good) + len(bad) >= 25                        # four networks: more than 100 calls in all
    before, x = state(net), batch()
    for call in good:
        call()
        assert_same(before, state(net))
    for call in bad:
        with pytest.raises((MedxferError, IndexError)): call()
        assert_same(before, state(net))
    assert torch.equal(x, batch()) and not x.requires_grad


def test_unchanged_restores_after_an_error():
    net = tiny_net()
    before = state(net)
    with pytest.raises(ZeroDivisionError), unchanged(net):
        net.train().requires_grad_(False)
        net.head.weight.grad = torch.ones_like(net.head.weight)
        net(batch())                                         # moves the averages of BatchNorm
        torch.rand(3)
        1 / 0
    assert_same(before, state(net))


# --- errors and blank maps ---


@pytest.mark.parametrize("kwargs, words", [
    (dict(target=3), "classes 0 to 2"), (dict(target=-1), "classes 0 to 2"), (dict(target=[0, 1]), "one a picture"),
    (dict(target=0.5), "one class number"), (dict(layer="stage2"), "did you mean 'stage1'"), (dict(layer=nn.ReLU()), "no part of this network"),
    (dict(batch=batch() * torch.nan), "not finite"), (dict(batch=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), "net.batch"),
    (dict(batch=torch.zeros(3, 8, 8)), "net.batch"), (dict(batch=batch(0)), "net.batch"), (dict(batch=np.zeros((2, 8, 8))), "uint8"),
    (dict(method="gradcam"), "did you mean 'grad_cam'"), (dict(method="occlusion", layer="stem"), "leave layer out"),
    (dict(task="mask"), "single head"), (dict(batch=batch(2, 7)), "single place"),
    *[(dict(batch=batch() * torch.nan, method=m), "not finite") for m in METHODS]])
def test_errors(kwargs, words):
    with pytest.raises(MedxferError, match=words): explain(tiny_net(), **dict(batch=batch()) | kwargs)


def test_errors_of_heads_and_ensembles():
    net, images = tiny_tasks(), pictures()
    with pytest.raises(MedxferError, match="has no classes"): explain(net, images, 1, task="mask")
    with pytest.raises(MedxferError, match="unknown task 'kid'; did you mean 'kind'"): explain(net, images, task="kid")
    nets = [tiny_net(0), tiny_net(1)]
    with pytest.raises(MedxferError, match="leave task out"): explain(Ensemble([Member(n) for n in nets]), images, task="mask")
    with pytest.raises(MedxferError, match="uint8 pictures"): explain(Ensemble([Member(n) for n in nets]), batch())
    with pytest.raises(MedxferError, match="member 1 of the ensemble has no `net`"): explain(Ensemble([Member(nets[0]), Member(None)]), images)
    p = np.stack([net(net.batch(pictures(30))).softmax(1).detach() for net in nets])
    with pytest.raises(MedxferError, match="stack"): explain(Ensemble([Member(n) for n in nets], "stack", p, np.arange(30) % 3), images)


def test_layers_that_give_no_map_or_take_no_part_or_run_twice():
    net = tiny_net()
    net.stages.stem.extra = nn.Conv2d(6, 6, 1)
    net.stages.stem.forward = lambda x: net.stages.stem[2](net.stages.stem[1](net.stages.stem[0](x)))
    with pytest.raises(MedxferError, match="takes no part"): explain(net, batch(), layer="stem.extra")
    with pytest.raises(MedxferError, match="no map of places"): explain(net, batch(), layer="head")
    net.stages.stem[0] = nn.Sequential(nn.Conv2d(3, 3, 1), relu := nn.ReLU(), nn.Conv2d(3, 6, 3), relu)
    with pytest.raises(MedxferError, match="runs 2 times"): explain(net, batch(), layer=relu)


def test_a_blank_map_says_why():
    net = tiny_net()
    nn.init.zeros_(net.head.weight)
    silent = explain(net, batch(), 1)
    assert silent.heat().max() == 0 and all(w.startswith("no gradient") for w in silent.why)
    nn.init.constant_(net.head.weight, -1)
    assert all(w == "no evidence for class 1" for w in explain(net, batch(), 1).why)
    twins = explain(Ensemble([Member(net), Member(net)]), pictures(), 1)
    assert set(twins.why) == {"no evidence for class 1"}
    net.stages.stage1[2] = nn.Threshold(1e9, 0)
    assert set(explain(net, batch(), 1).why) == {"the layer is silent for this picture"}


def test_a_blank_map_of_a_size_or_a_region_names_no_class():
    net = MultiTaskNet(tiny_net(), TASKS | {"mm": Task("mm", "regression", unit="mm")}, width=8).eval()
    for head in net.heads.values():
        for p in head.parameters(): nn.init.zeros_(p)
    assert set(explain(net, pictures(), task="mm").why) == {"no gradient: the score of what is asked does not depend on this layer"}
    assert set(explain(net, pictures(), task="mask").why) == {"the network draws nothing here"}


def test_heat_has_one_scale_and_a_blank_map_stays_blank():
    maps = Maps(np.stack([np.full((2, 2), v, np.float32) for v in (4, 1, -3)]), np.ones(3, int), "stage1", (8, 8), ["", "", "no evidence"])
    assert maps.heat().max((1, 2)).tolist() == [1, 0.25, 0] and maps.heat((5, 5)).shape == (3, 5, 5)


# --- every network ---


CLASSICS = {"small_cnn": "stage3", "alexnet": "stage2.features11", "vgg16": "stage4.features29", "googlenet": "stage4", "resnet18": "stage4",
            "resnet50": "stage4", "mobilenet_v2": "stage4", "mobilenet_v3_small": "stage4", "mobilenet_v3_large": "stage4",
            "tf_efficientnet_lite0": "stage4", "vit_tiny_patch16_224": "stage4.look.0.places"}
COSTLY = {"alexnet", "vgg16", "googlenet", "resnet18", "resnet50", "vit_tiny_patch16_224"}  # no pass a channel here; `bench/cam.py --product` does it


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm, as it resizes a ViT's places
@pytest.mark.parametrize("name", CLASSICS)
def test_every_method_on_every_classic(name, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", 2)
    monkeypatch.setattr(module, "_STEPS", 2)
    side = 32 if name == "vgg16" else 64
    net = create_model(name, pretrained=False, num_classes=2, size=side)
    x = batch(2, side).to(net.head.weight.device)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.0
    with torch.no_grad(): net.requires_grad_(True).train()(x)                        # else a random MobileNet answers all pictures alike
    net.eval().stages.requires_grad_(False)
    for method in METHODS:
        slow = method in ("score_cam", "ablation_cam")
        if slow and name in COSTLY: continue
        maps = explain(net, x, 1, method, "stem" if slow else None)
        assert maps.raw.shape[0] == 2 and np.isfinite(maps.raw).all() and maps.raw.any() and maps.evidence().shape == (2, side, side), method
        if not slow: assert maps.layer == ("input" if METHODS[method].pixels else CLASSICS[name])
    assert np.isfinite(explain(net, x, 1, layer=net.stage_names[-2]).raw).all()


def spots(n, seed):
    "Noise with a square of finer noise in half of the pictures, equally bright; its place; and labels."
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n, 16, 16)).repeat(2, 1).repeat(2, 2)
    y, masks = np.arange(n) % 2, np.zeros((n, 32, 32), bool)
    for i in np.flatnonzero(y): masks[i, (r := rng.integers(0, 22)):r + 10, (c := rng.integers(0, 22)):c + 10] = True
    return np.where(masks, rng.normal(size=(n, 32, 32)), coarse), y, masks


def test_a_trained_network_points_and_a_randomised_one_does_not():
    images, y, masks = spots(200, 0)
    x, labels = torch.tensor(images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1), torch.tensor(y)
    sick, area = y == 1, masks[y == 1].mean()
    net = create_model("small_cnn", pretrained=False, num_classes=2, size=32)
    x = x.to(net.head.weight.device)
    def hits(net): return pointing_hits(explain(net, x[sick], 1, layer="stage1").evidence(), masks[sick]).mean()
    randomised = np.mean([hits(create_model("small_cnn", pretrained=False, num_classes=2, size=32, seed=s)) for s in range(5)])
    optimiser = torch.optim.Adam(net.train().parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad(); nn.functional.cross_entropy(net(x), labels.to(x.device)).backward(); optimiser.step()
    assert hits(net.eval()) > 0.6 and randomised < area + 0.05, (hits(net), randomised, area)


# --- figures ---


@pytest.fixture
def shown(monkeypatch):
    figures = []
    monkeypatch.setattr(module, "show", lambda fig, alt: figures.append((fig, alt)) or show(fig, alt))
    return figures


def test_show_cams_draws_and_describes(shown):
    net, images = tiny_net(), np.zeros((3, 48, 48), np.uint8)
    masks = np.zeros((3, 48, 48)); masks[0, 9:20, 9:20] = 1
    maps = explain(net, images, 1)
    show_cams(images, maps, masks, ["a", "b", "c"])
    show_cams(images, maps, classes=("none", "round", "square"), signed=True)
    fig, alt = shown[0]
    assert "3 pictures" in alt and "grad_cam at stage1" in alt and f"{maps.raw[0].max():.2g}" in alt
    assert [a.get_title() for a in fig.axes[:3]] == ["a", "b", "c"] and fig.axes[-1].get_ylabel() == "grad_cam: evidence a cell of stage1\n(logits)"
    heat, both = (f.axes[3].images[1] for f, _ in shown)
    assert heat.get_clim() == (0, max(maps.raw.max(), 1e-12)) and both.get_clim() == (-np.abs(maps.raw).max(), np.abs(maps.raw).max())
    likeliest = ("none", "round", "square")[maps.p[0].argmax()]
    assert shown[1][0].axes[0].get_title().startswith(f"{likeliest} {maps.p[0].max():.0%}\n")
    with pytest.raises(MedxferError, match="3 maps"): show_cams(images[:2], maps)
    with pytest.raises(MedxferError, match="no evidence against"): show_cams(images, explain(net, images, method="eigen_cam"), signed=True)
