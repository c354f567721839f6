"Many heads on one trunk: losses against their formulas, labels that are missing or contradict, distances, sizes in mm, strategies."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from medxfer_nb import multitask
from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.metrics import auroc
from medxfer_nb.multitask import (
    REACH,
    UNKNOWN,
    Fixed,
    MultiTaskNet,
    asking,
    fit_multitask,
    predict,
    show_outlines,
    signed_distance,
    task_loss,
    transfer_tasks,
    widening,
)
from medxfer_nb.surfaces import dice
from medxfer_nb.surgery import Network, Spec
from medxfer_nb.training import augment, predict_proba
from medxfer_nb.transfer import Phase, Strategy

TASKS = {"sick": Task("sick", "binary", ("healthy", "sick")), "kind": Task("kind", "multiclass", ("none", "round", "square")),
         "mm": Task("mm", "regression", unit="mm"), "mask": Task("mask", "segmentation", ("background", "lesion")),
         "boundary": Task("boundary", "segmentation", unit="mm")}


def tiny_net(seed=0):
    torch.manual_seed(seed)
    stages = nn.Sequential()
    for name, a, b in (("stem", 3, 8), ("stage1", 8, 16), ("stage2", 16, 16)):
        stages.add_module(name, nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()))
    net = Network(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, 5), Spec("tiny", size=32)).eval()
    net.bn_eval = True
    return net


def tiny_set(n=32, seed=0):
    "Gray noise with a bright square in every second picture; 2 mm a pixel in one half of the pictures, 1 mm in the other."
    rng = np.random.default_rng(seed)
    pictures, masks, sick = rng.integers(0, 60, (n, 32, 32), dtype=np.uint8), np.zeros((n, 32, 32), np.uint8), np.arange(n) % 2
    side, spacing = rng.integers(6, 16, n), np.where(np.arange(n) < n // 2, 2.0, 1.0)
    for i in np.flatnonzero(sick): masks[i, (r := rng.integers(0, 32 - side[i])):r + side[i], (c := rng.integers(0, 32 - side[i])):c + side[i]] = 1
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", sick=sick, kind=2 * sick, mm=np.where(sick, side * spacing, np.nan),
                              spacing_mm=spacing, organ=np.where(np.arange(n) % 3, "liver", "lung")))
    return ImageSet(pictures + 150 * masks, table, TASKS, Info("tiny", "squares", "none", "CC0", "made here"), masks)


def with_heads(*names, net=None): return MultiTaskNet(net or tiny_net(), {name: TASKS[name] for name in names or ("sick", "mask")})


def batch(ds):
    "Name -> labels of all pictures, as tensors."
    far = torch.tensor(signed_distance(ds.masks, ds.table["spacing_mm"].to_numpy()))[:, None]
    return dict(sick=torch.tensor(ds.target("sick")), kind=torch.tensor(ds.target("kind")), mm=torch.tensor(ds.target("mm")).float(),
                mask=torch.tensor(ds.masks)[:, None].float(), boundary=torch.where(far == UNKNOWN, far, far / REACH))


# --- distances and questions ---


def test_a_distance_is_that_to_the_nearest_pixel_of_the_other_side():
    rng = np.random.default_rng(0)
    masks = (rng.random((3, 9, 11)) > 0.6).astype(np.uint8)
    far, spacing = signed_distance(masks, np.array([1.0, 2.0, 0.5])), (1.0, 2.0, 0.5)
    at = np.argwhere(np.ones((9, 11)))
    for m, f, mm in zip(masks, far, spacing):
        gaps = np.linalg.norm(at[:, None] - at[None], axis=2)
        for k, (i, j) in enumerate(at):
            nearest = gaps[k][(m != m[i, j]).ravel()].min() - 0.5
            assert f[i, j] == pytest.approx(np.clip((-1 if m[i, j] else 1) * nearest * mm, -REACH, REACH))


def test_distances_at_their_ends():
    masks = np.stack([np.zeros((40, 40)), np.full((40, 40), UNKNOWN), np.pad(np.ones((1, 1)), (0, 39))]).astype(np.uint8)
    far = signed_distance(masks, np.ones(3))
    assert (far[0] == REACH).all() and (far[1] == UNKNOWN).all()
    assert far[2, 0, 0] == -0.5 and far[2, 0, 1] == 0.5 and far[2].max() == REACH     # a lesion in the corner of the picture


def test_a_column_of_words_becomes_a_task_and_one_word_is_refused():
    ds = asking(tiny_set(), "organ")
    assert ds.tasks["organ"] == Task("organ", "binary", ("liver", "lung")) and (ds.target("organ") == (tiny_set().table["organ"] == "lung")).all()
    same = replace(tiny_set(), table=tiny_set().table.assign(organ="liver"))
    with pytest.raises(MedxferError, match="every picture's organ is 'liver'"): asking(same, "organ")
    with pytest.raises(MedxferError, match="unknown column 'organs'; did you mean 'organ'"): asking(tiny_set(), "organs")


# --- the network ---


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "mobilenet_v2", "tf_efficientnet_lite0", "small_cnn"])
def test_shapes_on_every_kind_of_trunk(name):
    net = MultiTaskNet(create_model(name, pretrained=False, size=64), TASKS)
    with torch.no_grad(): out = net.outputs(torch.zeros(2, 3, 64, 64, device=net.head.weight.device))
    sides = {"sick": (2, 2), "kind": (2, 3), "mm": (2, 2), "mask": (2, 1, 64, 64), "boundary": (2, 1, 64, 64)}
    assert {k: tuple(v.shape) for k, v in out.items()} == sides
    assert (out["mm"][:, 1] > 0).all()


def test_it_is_still_a_network():
    ds, net = tiny_set(), with_heads()
    answers = predict(net, ds, batch_size=5)
    assert answers["mask"].shape == (32, 32, 32) and 0 <= answers["mask"].min() and answers["mask"].max() <= 1
    np.testing.assert_allclose(answers["sick"], predict_proba(net, ds), atol=1e-6)
    small = replace(ds, images=ds.images[:, :20, :20], masks=ds.masks[:, :20, :20])
    assert predict(net, small)["mask"].shape == (32, 20, 20)              # at the side of the pictures, not of the network


def test_the_trunk_is_shared_and_both_losses_reach_it():
    trunk, ds = tiny_net(), tiny_set(8)
    net, y = with_heads(*TASKS, net=trunk), batch(ds)
    out = net.outputs(net.batch(ds.images))
    for name in TASKS:
        net.zero_grad()
        task_loss(TASKS[name], out[name], y[name]).backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.stages.stage2[0].parameters()), name
        own = (net.heads[name] if name in net.heads else net.head).parameters()
        assert all(p.grad is not None for p in own)
    assert all(a is b for a, b in zip(net.stages.parameters(), trunk.stages.parameters()))


def test_new_heads_follow_their_seed_and_leave_the_callers_chance_alone():
    first, again, other = (MultiTaskNet(tiny_net(), TASKS, seed=s).pyramid.lateral[0].weight for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    trunk, state = tiny_net(), torch.get_rng_state()
    MultiTaskNet(trunk, TASKS)
    assert torch.equal(torch.get_rng_state(), state)


# --- losses ---


def test_missing_labels_say_nothing():
    out, y = torch.randn(6, 3, requires_grad=True), torch.tensor([2, -1, 0, 1, -1, -1])
    loss = task_loss(TASKS["kind"], out, y)
    assert torch.isclose(loss, F.cross_entropy(out[[0, 2, 3]], y[[0, 2, 3]]))
    (g,) = torch.autograd.grad(loss, out)
    assert (g[[1, 4, 5]] == 0).all() and (g[[0, 2, 3]] != 0).all()
    drawn, sizes, nan = torch.randn(2, 1, 4, 4, requires_grad=True), torch.rand(6, 2).add(0.2).requires_grad_(), torch.full((6,), torch.nan)
    nobody = torch.full((2, 1, 4, 4), float(UNKNOWN))
    for name, logits, none in (("kind", out, torch.full((6,), -1)), ("mask", drawn, nobody), ("boundary", drawn, nobody), ("mm", sizes, nan)):
        loss = task_loss(TASKS[name], logits, none)
        assert loss == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_the_loss_of_a_size_is_a_normal_log_likelihood():
    mean, spread, y = torch.randn(5), torch.rand(5) + 0.2, torch.tensor([0.3, torch.nan, -1.0, 2.0, torch.nan])
    loss, known = task_loss(TASKS["mm"], torch.stack([mean, spread], 1), y), [0, 2, 3]
    truth = -norm.logpdf(y[known], mean[known], spread[known]).mean()
    assert loss.item() == pytest.approx(truth - np.log(0.1) - np.log(2 * np.pi) / 2, rel=1e-5)
    assert task_loss(TASKS["mm"], torch.tensor([[0.3, 0.1]]), torch.tensor([0.3])) == 0                  # the least that it can be


@pytest.mark.parametrize("name", list(TASKS))
def test_a_picture_without_a_label_leaves_exactly_the_gradient_of_the_others(name):
    ds, net = tiny_set(6), with_heads(*TASKS).double().eval()
    y = {k: v.double() if v.is_floating_point() else v for k, v in batch(ds).items()}
    missing = y[name].clone()
    missing[3] = {"sick": -1, "kind": -1, "mm": torch.nan}.get(name, UNKNOWN)
    def gradient(rows, labels):
        net.zero_grad()
        task_loss(TASKS[name], net.outputs(net.batch(ds.images[rows]).double())[name], labels[rows]).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with_it, without, labelled = gradient(range(6), missing), gradient([0, 1, 2, 4, 5], y[name]), gradient(range(6), y[name])
    for a, b in zip(with_it, without): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(with_it, labelled))


def test_an_empty_mask_is_a_label():
    out, y = torch.randn(3, 1, 6, 6), (torch.rand(3, 1, 6, 6) > 0.5).float()
    unknown, empty = y.clone(), y.clone()
    unknown[2], empty[2] = UNKNOWN, 0
    assert not torch.isclose(task_loss(TASKS["mask"], out, empty), task_loss(TASKS["mask"], out, unknown))
    all_empty = task_loss(TASKS["mask"], out.requires_grad_(), torch.zeros_like(y))
    assert torch.isfinite(all_empty) and torch.isfinite(torch.autograd.grad(all_empty, out)[0]).all()


# --- training ---


def test_training_answers_all_five_questions():
    ds = tiny_set(48)
    ds.table.loc[::5, "sick"] = -1
    ds.masks[::7] = UNKNOWN
    net, new = fit_multitask(with_heads(*TASKS), ds, epochs=25, lr=1e-2, seed=3).net, tiny_set(40, seed=9)
    answers, ill = predict(net, new), new.target() == 1
    assert auroc(new.target(), answers["sick"]) > 0.9 and np.nanmean(dice(answers["mask"], new.masks)) > 0.6
    error = abs(answers["mm"][:, 0] - new.target("mm"))[ill].mean()
    assert error < 0.6 * abs(new.target("mm") - np.nanmean(new.target("mm")))[ill].mean()
    inside = new.masks[ill] == 1
    assert answers["boundary"][ill][inside].mean() < 0 < answers["boundary"][ill][~inside].mean()


def test_training_repeats():
    histories = [fit_multitask(with_heads(*TASKS), tiny_set(16), 2, seed=3).history for _ in range(2)]
    pd.testing.assert_frame_equal(*histories)


def test_the_history_holds_means_over_labelled_pictures():
    ds = tiny_set(20)
    ds.table.loc[3:, "sick"] = -1                                        # most batches of 4 have no label
    net = with_heads()
    y, x = batch(ds), net.batch(ds.images)
    with torch.no_grad(): truth = {k: [task_loss(TASKS[k], net.outputs(x[i:i + 1])[k], y[k][i:i + 1]).item() for i in range(20)] for k in net.tasks}
    run = fit_multitask(net, ds, 1, lr=[(net.parameters(), 1e-12)], augmented=False, batch_size=1, weight_decay=0.0)
    assert run.history["sick"].iloc[0] == pytest.approx(np.mean(truth["sick"][:3]), rel=1e-4)
    assert run.history["mask"].iloc[0] == pytest.approx(np.mean(truth["mask"]), rel=1e-4)


def test_a_picture_without_any_label_changes_nothing():
    ds = tiny_set(16)
    masks, table = ds.masks.copy(), ds.table.assign(sick=ds.table["sick"].where(ds.table["id"] != 5, -1))
    masks[5] = UNKNOWN
    histories = [fit_multitask(with_heads(), part, 2, batch_size=4).history
                 for part in (replace(ds, masks=masks, table=table), ds.take([i for i in range(16) if i != 5]))]
    pd.testing.assert_frame_equal(*histories)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_frozen_stages_computed_once_give_the_same_losses(k):
    nets = [with_heads(), with_heads()]
    for net in nets: net.stages[:k].requires_grad_(False)
    next(nets[1].stages.stem.parameters()).requires_grad_(True)              # one trainable weight in the stem: nothing is cached ...
    free = list(nets[1].stages.stem.parameters())
    rates = [None, [(free, 0.0), ([p for p in nets[1].parameters() if all(p is not f for f in free)], 3e-3)]]       # ... at a rate of zero
    histories = [fit_multitask(net, tiny_set(), 3, lr=lr or 3e-3, augmented=False).history for net, lr in zip(nets, rates)]
    np.testing.assert_allclose(*histories, rtol=1e-3)


def test_frozen_weights_and_caller_stay():
    ds, net = tiny_set(), with_heads(*TASKS)
    net.stages.requires_grad_(False)
    before, images, chance = {k: v.clone() for k, v in net.stages.state_dict().items()}, ds.images.copy(), torch.get_rng_state()
    fit_multitask(net, ds, 2)
    assert all(torch.equal(v, before[k]) for k, v in net.stages.state_dict().items())
    assert (ds.images == images).all() and torch.equal(torch.get_rng_state(), chance) and not net.training


def test_a_weight_of_zero_leaves_a_head_alone():
    net = with_heads()
    before = net.heads["mask"].weight.clone()
    run = fit_multitask(net, tiny_set(), 2, balance=Fixed(mask=0.0), weight_decay=0.0, augmented=False)
    assert torch.equal(net.heads["mask"].weight, before)
    np.testing.assert_allclose(run.history["sick"], run.history["loss"], rtol=1e-5)


def test_masks_and_distances_move_with_their_pictures():
    square = torch.zeros(4, 1, 32, 32)
    square[:, :, 8:16, 18:26] = 1
    x, masks = augment(square.expand(-1, 3, -1, -1), torch.Generator().manual_seed(1), flip=True, contrast=0.0, masks=square)
    assert set(masks.unique().tolist()) == {0, 1} and ((x[:, :1] > 0.5) != (masks > 0.5)).float().mean() < 0.01
    net, ds = with_heads("mask", "boundary"), tiny_set(8)
    _, y = multitask._views(net, ds.images, {k: v for k, v in batch(ds).items() if k in net.tasks}, True, torch.Generator().manual_seed(1))
    assert ((y["boundary"] < 0) == (y["mask"] == 1)).all() and not torch.equal(y["mask"], batch(ds)["mask"])


# --- sizes ---


def test_a_size_counts_in_mm_whatever_a_pixel_is():
    ds, net = tiny_set(), with_heads("mm")
    fit_multitask(net, ds, 1)
    one, two = (predict(net, replace(ds, table=ds.table.assign(spacing_mm=s)))["mm"] for s in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    bare = replace(ds, table=ds.table.drop(columns="spacing_mm"))
    fit_multitask(bare_net := with_heads("mm"), bare, 1)
    mean, spread = np.nanmean(ds.target("mm")), np.nanstd(ds.target("mm"))
    np.testing.assert_allclose(bare_net.heads["mm"].scale.numpy(), [mean, spread], rtol=1e-5)


def test_widened_intervals_hold_new_truths_as_often_as_asked():
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        sizes, truth = np.stack([np.zeros(80), rng.uniform(1, 3, 80)], 1), rng.standard_t(3, 80) * rng.uniform(0.5, 2, 80)
        q = widening(sizes[:40], truth[:40], 0.9)
        held.append((abs(truth[40:]) <= q * sizes[40:, 1]).mean())
    assert 0.89 < np.mean(held) < 0.94                                    # between 0.9 and 0.9 + 1 / 41
    gaps = np.concatenate([truth[:40], [np.nan]])
    assert widening(np.concatenate([sizes[:40], [[0, 1]]]), gaps) == widening(sizes[:40], truth[:40])
    with pytest.raises(MedxferError, match="5 sizes are too few for intervals of 90%; have 9"): widening(sizes[:5], truth[:5])


# --- strategies ---


def split(ds): return replace(ds, table=ds.table.assign(split=np.where(np.arange(len(ds)) % 4, "train", "val")))


@pytest.mark.parametrize("name", ["scratch", "fully_connected", "fine_tuning", "gradual"])
def test_strategies_with_phases_carry_every_head(name):
    phases = {"scratch": (Phase(1, 3e-3),), "fully_connected": (Phase(1, 4e-3, frozen="neck", augmented=False),),
              "fine_tuning": (Phase(1, 4e-3, frozen="neck", augmented=False), Phase(1, 3e-3, body=0.1, decay=0.5)),
              "gradual": (Phase(1, 3e-3, frozen=slice(None, -2)), Phase(1, 3e-3, frozen=slice(None, -3)))}
    s = Strategy(name, name, phases[name], pretrained=False, backbone="small_cnn")
    before = transfer_tasks(split(tiny_set(16)), TASKS, replace(s, phases=(Phase(1, 1e-12, frozen="neck"),)), n=8, size=32).net
    run = transfer_tasks(split(tiny_set(16)), TASKS, s, n=8, size=32)
    moved = [not torch.equal(a, b) for a, b in zip(run.net.stages.parameters(), before.stages.parameters())]
    assert {"scratch": all(moved), "fully_connected": not any(moved), "fine_tuning": all(moved), "gradual": any(moved) and not all(moved)}[name]
    assert list(run.history.columns) == [*TASKS, "loss"] and len(run.history) == len(s.phases)
    assert not torch.equal(run.net.heads["mask"].weight, before.heads["mask"].weight)


def test_a_phase_says_how_many_pictures_a_step_of_all_heads_has():
    s = Strategy("s", "s", (Phase(1, 1e-3, batch_size=lambda n: n // 2),), pretrained=False, backbone="small_cnn")
    ds = split(tiny_set(16))
    assert transfer_tasks(ds, TASKS, s, n=8, size=32).config["batch_size"] == 4
    assert transfer_tasks(ds, TASKS, s, n=8, size=32, batch_size=2).config["batch_size"] == 2   # what is asked for in the call comes first


@pytest.mark.parametrize("name", ["feature_extraction", "lwf", "pseudo_labels"])
def test_strategies_made_for_one_question_are_refused(name):
    from medxfer_nb.strategies import KNOWN
    with pytest.raises(MedxferError, match="made for one question about classes"): transfer_tasks(split(tiny_set(16)), TASKS, KNOWN[name], n=8)


def test_a_killed_transfer_goes_on(tmp_path):
    from medxfer_nb.loop import Callback

    class Kill(Callback):
        def before_step(self, loop):
            if loop.epoch == 1 and loop.at: raise KeyboardInterrupt

    class Look(Kill):
        def before_step(self, loop): "Nothing."
        def __repr__(self): return "Kill"

    s, ds = Strategy("two", "two", (Phase(1, 3e-3), Phase(3, 3e-3, frozen="stem")), pretrained=False, backbone="small_cnn"), split(tiny_set(24))
    def go(callback, checkpoint=None):
        return transfer_tasks(ds, TASKS, s, n=16, size=32, callbacks=[callback], checkpoint=checkpoint, batch_size=4, every=0)
    with pytest.raises(KeyboardInterrupt): go(Kill(), tmp_path / "run")
    resumed, whole = go(Look(), tmp_path / "run"), go(Look())
    pd.testing.assert_frame_equal(resumed.history, whole.history)
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.state_dict().values(), whole.net.state_dict().values()))


# --- faults and figures ---


def test_labels_that_contradict_are_named():
    ds = tiny_set(8)
    said_none, no_size = (replace(ds, table=ds.table.assign(**{column: v})) for column, v in (("sick", 0), ("mm", np.nan)))
    emptied = replace(ds, masks=ds.masks * (np.arange(8) != 3)[:, None, None].astype(np.uint8))
    net = with_heads(*TASKS)
    with pytest.raises(MedxferError, match="picture 1 is 'healthy' in 'sick', but an outline is drawn"): fit_multitask(net, said_none, 1)
    with pytest.raises(MedxferError, match="picture 3 is 'sick' in 'sick', but the mask is empty"): fit_multitask(net, emptied, 1)
    sized = with_heads("sick", "mm")
    unseen = replace(said_none, masks=None)
    with pytest.raises(MedxferError, match="picture 1 is 'healthy' in 'sick', but a size is given"): fit_multitask(sized, unseen, 1)
    fit_multitask(with_heads("mask"), replace(ds, table=ds.table.assign(sick=-1)), 1)          # unknown contradicts nothing
    aged = replace(unseen, tasks=unseen.tasks | dict(mm=replace(TASKS["mm"], unit="years")))   # an age says nothing about a lesion
    fit_multitask(MultiTaskNet(tiny_net(), {name: aged.tasks[name] for name in ("sick", "mm")}), aged, 1)
    fit_multitask(with_heads("sick", "mask"), no_size, 1)


def test_errors():
    ds, net = tiny_set(), with_heads()
    nobody = replace(ds, masks=np.full_like(ds.masks, UNKNOWN))
    unlabelled = replace(ds, table=ds.table.assign(sick=-1))
    for wrong, words in ((replace(ds, masks=None), "no masks"), (nobody, "no picture has a label for 'mask'"), (unlabelled, "label for 'sick'"),
                         (replace(ds, tasks={"mask": TASKS["mask"]}), "unknown task 'sick'")):
        with pytest.raises(MedxferError, match=words): fit_multitask(net, wrong, 1)
    bare = replace(ds, table=ds.table.drop(columns="spacing_mm"))
    with pytest.raises(MedxferError, match="no column 'spacing_mm'"): fit_multitask(with_heads("boundary"), bare, 1)
    with pytest.raises(MedxferError, match="unknown task 'masks'; did you mean 'mask'"): fit_multitask(net, ds, 1, balance=Fixed(masks=1))
    with pytest.raises(MedxferError, match="multilabel"): MultiTaskNet(tiny_net(), {"many": Task("many", "multilabel", ("a", "b"))})
    with pytest.raises(MedxferError, match="every weight is frozen"): fit_multitask(with_heads().requires_grad_(False), ds, 1)


def test_the_figure_names_overlap_and_diameters(monkeypatch):
    said = []
    monkeypatch.setattr(multitask, "show", lambda fig, alt: (said.append(alt), plt.close(fig)))
    ds = tiny_set(4)
    show_outlines(ds.images, ds.masks, ds.masks.astype(float), spacing=ds.table["spacing_mm"].to_numpy())
    show_outlines(ds.images[:1], ds.masks[:1], np.zeros((1, 32, 32)))
    assert "no lesion" in said[0] and "Dice 1.00" in said[0] and "mm, drawn" in said[0] and "no lesion" in said[1]
