"Layer by layer: what moves, what the losses are, and where it equals ordinary training."
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import bright_or_dark, small
from torch.nn import functional as F

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.layerwise import Supervised, fit_deep_supervision, fit_layerwise, grainy, layers
from medxfer_nb.training import fit

ARCHITECTURES = ("alexnet", "vgg11", "googlenet", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "tf_efficientnet_lite0")


def weights(net): return {name: value.clone() for name, value in net.state_dict().items()}


def moved(net, before): return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def owned(net, name): return {id(p) for p in [*layers(net)[name].parameters(), *layers(net)[name].buffers()]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_trained_layer_moves(name):
    net = create_model(name, pretrained=False, num_classes=2, size=64)
    for last in (list(layers(net))[-3], "head"):
        before = weights(net)
        allowed = set().union(*(owned(net, n) for n in list(layers(net))[list(layers(net)).index(last):]))
        fit_layerwise(net, bright_or_dark(4), 1, start=last, batch_size=4)
        tensors = dict([*net.named_parameters(), *net.named_buffers()])
        changed = moved(net, before)
        assert changed and all(id(tensors[n]) in allowed for n in changed)


def test_with_the_head_alone_it_is_ordinary_training_of_the_head():
    ours, theirs = small(), small()
    fit_layerwise(ours, bright_or_dark(), 3, lr=1e-2, start="head")
    theirs.stages.requires_grad_(False)
    fit(theirs, bright_or_dark(), 3, lr=1e-2, augmented=False)
    for name, value in ours.state_dict().items(): torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_sum_is_the_sum_of_the_parts():
    net, ds = small(), bright_or_dark(8)
    model, y = Supervised(net).eval(), torch.tensor(ds.target())
    total = sum(F.cross_entropy(s, y) for s in model(net.batch(ds.images)).values())
    run = fit_layerwise(net, ds, 1, start="head", total=True, batch_size=8, lr=0.0)
    net.eval()
    assert run.history["total"].iloc[0] == pytest.approx(total.item(), rel=0.1)  # dropout in the auxiliary heads
    assert run.history["own"].iloc[0] == pytest.approx(F.cross_entropy(net(net.batch(ds.images)), y).item(), rel=1e-4)


def test_earlier_losses_send_no_gradient_and_own_loss_is_greedy():
    "The sum and the own loss move the last layer alike, and an earlier layer differently."
    def step(start, total):
        net = small()
        fit_layerwise(net, bright_or_dark(8), 1, start=start, total=total, batch_size=8)
        return net
    assert moved(step("head", True), step("head", False).state_dict()) == set()
    assert "stages.stage2.stages2.0.weight" in moved(step("stage2", True), step("stage2", False).state_dict())


def test_hanging_the_heads_on_a_network_in_training_leaves_it_as_it_was():
    "At 32 px the last map of ResNet-18 is one place, of which BatchNorm in training could not make an average."
    net = create_model("resnet18", pretrained=False, num_classes=2, size=32).train()
    before = weights(net)
    assert Supervised(net).training and net.training and not moved(net, before)


def test_hooks_are_gone_after_a_failure():
    net = small()
    with pytest.raises(RuntimeError): Supervised(net).tap(torch.zeros(1, 5, 32, 32))
    assert not any(m._forward_hooks for m in net.modules())


def test_killed_between_layers_it_goes_on(tmp_path):
    whole, net, ds = small(), small(), bright_or_dark()
    fit_layerwise(whole, ds, 2)
    fit_layerwise(net, ds, 2, checkpoint=tmp_path / "c")
    again = small()
    run = fit_layerwise(again, ds, 2, checkpoint=tmp_path / "c")
    assert moved(again, whole.state_dict()) == set() and len(run.history) == 2 * len(layers(net))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"c.{name}" for name in layers(net))


def test_deep_supervision_trains_every_layer_and_a_copy_is_left_alone():
    net = small()
    copied, before = copy.deepcopy(net), weights(net)
    run = fit_deep_supervision(net, bright_or_dark(), 2)
    assert {n for n in before if "weight" in n} <= moved(net, before) and moved(copied, before) == set()
    assert (run.history["total"] > run.history["own"]).all() and np.isfinite(run.history["loss"]).all()


def test_a_head_for_other_classes_is_refused():
    with pytest.raises(MedxferError, match="reset_classifier"): fit_layerwise(small().reset_classifier(3), bright_or_dark(), 1)
    with pytest.raises(MedxferError, match="unknown layer"): fit_layerwise(small(), bright_or_dark(), 1, start="stage9")


@pytest.mark.parametrize("how", [fit_layerwise, fit_deep_supervision])
def test_rows_without_a_label_are_left_out(how):
    ds = bright_or_dark()
    hidden = replace(ds, table=ds.table.assign(bright=np.where(np.arange(len(ds)) < 10, ds.target(), -1)))
    nets = small(), small()
    runs = [how(net, d, 1) for net, d in zip(nets, (hidden, ds.take(range(10))))]
    assert runs[0].config["n"] == 10 and moved(nets[0], weights(nets[1])) == set()
    with pytest.raises(MedxferError, match="no picture has a label"): how(small(), replace(ds, table=ds.table.assign(bright=-1)), 1)


def test_grainy_keeps_labels_and_turns_the_greys_round():
    ds = bright_or_dark()
    other = grainy(ds)
    assert np.array_equal(other.target(), ds.target()) and np.corrcoef(other.images.ravel(), ds.images.ravel())[0, 1] < -0.3
    assert np.array_equal(other.images, grainy(ds).images) and not np.array_equal(other.images, grainy(ds, seed=1).images)
    other.openings["test"] += 1
    assert ds.openings["test"] == 0
