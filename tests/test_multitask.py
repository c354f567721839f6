"Two heads on one trunk: overlap against its formula, silent missing labels, and losses that reach the shared part."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.metrics import auroc
from medxfer_nb.multitask import UNKNOWN, MultiTaskNet, dice, fit_multitask, predict, task_loss
from medxfer_nb.surgery import Network, Spec
from medxfer_nb.training import augment, predict_proba

TASKS = {"sick": Task("sick", "binary", ("healthy", "sick")), "kind": Task("kind", "multiclass", ("none", "round", "square")),
         "mask": Task("mask", "segmentation", ("background", "lesion"))}


def tiny_net(seed=0):
    torch.manual_seed(seed)
    stages = nn.Sequential()
    for name, a, b in (("stem", 3, 8), ("stage1", 8, 16), ("stage2", 16, 16)):
        stages.add_module(name, nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()))
    return Network(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, 5), Spec("tiny", size=32)).eval()


def tiny_set(n=32, seed=0):
    "Gray noise with a bright square in every second picture."
    rng = np.random.default_rng(seed)
    pictures, masks, sick = rng.integers(0, 60, (n, 32, 32), dtype=np.uint8), np.zeros((n, 32, 32), np.uint8), np.arange(n) % 2
    for i in np.flatnonzero(sick): masks[i, (r := rng.integers(0, 22)):r + 10, (c := rng.integers(0, 22)):c + 10] = 1
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", sick=sick, kind=2 * sick))
    return ImageSet(pictures + 150 * masks, table, TASKS, Info("tiny", "squares", "none", "CC0", "made here"), masks)


def two(net=None): return MultiTaskNet(net or tiny_net(), {name: TASKS[name] for name in ("sick", "mask")})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_dice_is_its_formula(seed, a, b):
    rng = np.random.default_rng(seed)
    drawn, true = rng.random((4, 9, 7)) < a, rng.random((4, 9, 7)) < b
    for i, value in enumerate(dice(drawn.astype(float), true.astype(np.uint8))):
        if not true[i].any(): assert np.isnan(value)
        else: assert value == pytest.approx(2 * (drawn[i] & true[i]).sum() / (drawn[i].sum() + true[i].sum()), abs=1e-6)


def test_dice_at_its_ends():
    full, empty, unknown = np.ones((1, 4, 4)), np.zeros((1, 4, 4)), np.full((1, 4, 4), UNKNOWN)
    assert dice(full, full) == 1 and dice(empty, full) == 0 and np.isnan(dice(full, empty)) and np.isnan(dice(full, unknown))
    with pytest.raises(MedxferError, match="must be equal"): dice(full, full[:, :2])


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "tf_efficientnet_lite0", "small_cnn"])
def test_shapes_on_every_kind_of_trunk(name):
    net = MultiTaskNet(create_model(name, pretrained=False, size=64), TASKS)
    with torch.no_grad(): out = net.outputs(torch.zeros(2, 3, 64, 64, device=net.head.weight.device))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"sick": (2, 2), "kind": (2, 3), "mask": (2, 1, 64, 64)}


def test_it_is_still_a_network():
    ds, net = tiny_set(), two()
    answers = predict(net, ds, batch_size=5)
    assert answers["mask"].shape == (32, 32, 32) and 0 <= answers["mask"].min() and answers["mask"].max() <= 1
    np.testing.assert_allclose(answers["sick"], predict_proba(net, ds), atol=1e-6)
    small = replace(ds, images=ds.images[:, :20, :20], masks=ds.masks[:, :20, :20])
    assert predict(net, small)["mask"].shape == (32, 20, 20)              # at the side of the pictures, not of the network


def test_the_trunk_is_shared_and_both_losses_reach_it():
    trunk = tiny_net()
    net, ds = two(trunk), tiny_set(8)
    out = net.outputs(net.batch(ds.images))
    y = dict(sick=torch.tensor(ds.target("sick")), mask=torch.tensor(ds.masks)[:, None].float())
    for name in ("sick", "mask"):
        net.zero_grad()
        task_loss(TASKS[name], out[name], y[name]).backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.stages.stage2[0].parameters())
    assert net.stages is trunk.stages and net.heads["mask"].draw[0].weight.grad is not None


def test_missing_labels_say_nothing():
    out, y = torch.randn(6, 3, requires_grad=True), torch.tensor([2, -1, 0, 1, -1, -1])
    loss = task_loss(TASKS["kind"], out, y)
    assert torch.isclose(loss, F.cross_entropy(out[[0, 2, 3]], y[[0, 2, 3]]))
    (g,) = torch.autograd.grad(loss, out)
    assert (g[[1, 4, 5]] == 0).all() and (g[[0, 2, 3]] != 0).all()
    drawn = torch.randn(2, 1, 4, 4, requires_grad=True)
    for task, logits, none in ((TASKS["kind"], out, torch.full((6,), -1)), (TASKS["mask"], drawn, torch.full((2, 1, 4, 4), 255.0))):
        loss = task_loss(task, logits, none)
        assert loss == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_a_missing_mask_changes_nothing_for_the_others_and_an_empty_one_does():
    out, y = torch.randn(3, 1, 6, 6), (torch.rand(3, 1, 6, 6) > 0.5).float()
    unknown, empty = y.clone(), y.clone()
    unknown[2], empty[2] = UNKNOWN, 0
    assert torch.isclose(task_loss(TASKS["mask"], out, unknown), task_loss(TASKS["mask"], out[:2], y[:2]))
    assert not torch.isclose(task_loss(TASKS["mask"], out, empty), task_loss(TASKS["mask"], out, unknown))
    all_empty = task_loss(TASKS["mask"], out.requires_grad_(), torch.zeros_like(y))
    assert torch.isfinite(all_empty) and torch.isfinite(torch.autograd.grad(all_empty, out)[0]).all()


def test_training_finds_the_squares_and_repeats():
    ds = tiny_set(48)
    ds.table.loc[::5, "sick"] = -1
    ds.masks[::7] = UNKNOWN
    runs = [fit_multitask(two(), ds, epochs=25, lr=1e-2, augmented=False, seed=3) for _ in range(2)]
    pd.testing.assert_frame_equal(runs[0].history, runs[1].history)
    new = tiny_set(32, seed=9)
    answers = predict(runs[0].net, new)
    assert auroc(new.target(), answers["sick"]) > 0.9 and np.nanmean(dice(answers["mask"], new.masks)) > 0.6
    assert list(runs[0].history.columns) == ["sick", "mask", "loss"]
    np.testing.assert_allclose(runs[0].history["sick"] + runs[0].history["mask"], runs[0].history["loss"], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_frozen_stages_computed_once_give_the_same_losses(k):
    nets = [two(), two()]
    for net in nets: net.stages[:k].requires_grad_(False)
    next(nets[1].stages.stem.parameters()).requires_grad_(True)              # one trainable weight in the stem: nothing is cached ...
    free = list(nets[1].stages.stem.parameters())
    rates = [None, [(free, 0.0), ([p for p in nets[1].parameters() if all(p is not f for f in free)], 3e-3)]]       # ... at a rate of zero
    histories = [fit_multitask(net, tiny_set(), 3, lr=lr or 3e-3, augmented=False).history for net, lr in zip(nets, rates)]
    np.testing.assert_allclose(*histories, rtol=1e-3)


def test_frozen_weights_and_caller_stay():
    ds, net = tiny_set(), two()
    net.stages.requires_grad_(False)
    before, images, chance = {k: v.clone() for k, v in net.stages.state_dict().items()}, ds.images.copy(), torch.get_rng_state()
    fit_multitask(net, ds, 2)
    assert all(torch.equal(v, before[k]) for k, v in net.stages.state_dict().items())
    assert (ds.images == images).all() and torch.equal(torch.get_rng_state(), chance) and not net.training


def test_a_weight_of_zero_leaves_a_head_alone():
    net = two()
    before = net.heads["mask"].draw[0].weight.clone()
    fit_multitask(net, tiny_set(), 2, weights={"mask": 0.0}, weight_decay=0.0, augmented=False)
    assert torch.equal(net.heads["mask"].draw[0].weight, before)


def test_masks_move_with_their_pictures():
    square = torch.zeros(4, 1, 32, 32)
    square[:, :, 8:16, 18:26] = 1
    x, masks = augment(square.expand(-1, 3, -1, -1), torch.Generator().manual_seed(1), flip=True, contrast=0.0, masks=square)
    assert set(masks.unique().tolist()) == {0, 1} and ((x[:, :1] > 0.5) != (masks > 0.5)).float().mean() < 0.01
    assert not torch.equal(masks, square)


def test_errors():
    ds, net = tiny_set(), two()
    nobody = replace(ds, masks=np.full_like(ds.masks, UNKNOWN))
    unlabelled = replace(ds, table=ds.table.assign(sick=-1))
    for wrong, words in ((replace(ds, masks=None), "no masks"), (nobody, "no picture has a label for 'mask'"), (unlabelled, "label for 'sick'"),
                         (replace(ds, tasks={"mask": TASKS["mask"]}), "unknown task 'sick'")):
        with pytest.raises(MedxferError, match=words): fit_multitask(net, wrong, 1)
    with pytest.raises(MedxferError, match="unknown task"): fit_multitask(net, ds, 1, weights={"masks": 1})
    with pytest.raises(MedxferError, match="regression"): MultiTaskNet(tiny_net(), {"mm": Task("mm", "regression", unit="mm")})
    with pytest.raises(MedxferError, match="every weight is frozen"): fit_multitask(two().requires_grad_(False), ds, 1)
