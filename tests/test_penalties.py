"Penalties: each against its formula worked out by hand."
import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_imageset import random_set
from test_training import bright_or_dark
from test_transfer import source
from torch import nn
from torch.nn import functional as F

from medxfer_nb.core import MedxferError
from medxfer_nb.loop import Callback
from medxfer_nb.penalties import (
    BSS,
    DELTA,
    L2SP,
    CoTuning,
    LwF,
    StochNorm,
    _channel_attention,
    _old_logits,
    _relationship,
    _TwoBranch,
    calibrate,
    distance,
    trunk,
)
from medxfer_nb.training import fit, predict_proba
from medxfer_nb.transfer import build_target, copy_weights, freeze


def target(net_a): return build_target(net_a, copy_weights(net_a), 2)


def looking_at(net, x, y=None):
    "What a callback sees after the loss of one batch."
    features = net.embed(x)
    return SimpleNamespace(net=net, x=x, y=y, features=features, loss=torch.zeros(()), log=lambda *args: None, config=dict(augmented=True),
                           optimiser=torch.optim.AdamW(net.parameters()))


def batch(net, n=6): return net.batch(random_set().images[:n])


class Watcher(Callback):
    "Remembers a value of the loop at each step."
    def __init__(self, read): self.read, self.seen = read, []
    def after_loss(self, loop): self.seen.append(self.read(loop))


# --- what is measured ---


def test_the_distance_is_the_length_of_the_difference():
    net_a, net = source(), source(seed=1)
    flat = [torch.cat([w.detach().flatten() for w in trunk(n)]) for n in (net, net_a)]
    assert distance(net, net_a) == pytest.approx((flat[0] - flat[1]).norm().item(), rel=1e-5) and distance(net_a, net_a) == 0


# --- penalties against their formulas ---


def test_l2_sp_and_its_gradient_equal_the_closed_form():
    net_a = source()
    net, chance = target(net_a), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in trunk(net): w += torch.randn(w.shape, generator=chance)
    penalty = L2SP(net, net_a, None, alpha=0.3, beta=0.02)
    value = penalty.penalty(looking_at(net, batch(net)))
    value.backward()
    by_hand = sum(0.15 * ((w - w0) ** 2).sum() for w, w0 in zip(trunk(net), trunk(net_a))) + sum(0.01 * (w**2).sum() for w in net.head.parameters())
    torch.testing.assert_close(value, by_hand)
    for w, w0 in zip(trunk(net), trunk(net_a)): torch.testing.assert_close(w.grad, 0.3 * (w - w0))
    for w in net.head.parameters(): torch.testing.assert_close(w.grad, 0.02 * w)


def test_l2_sp_takes_the_place_of_weight_decay_and_bounds_the_distance():
    far, net_a = [], source()
    for alpha in (0, 100):
        net, decay = target(net_a), Watcher(lambda loop: {g["weight_decay"] for g in loop.optimiser.param_groups})
        fit(net, random_set(), 3, 1e-3, augmented=False, callbacks=[L2SP(net, net_a, None, alpha), decay])
        far.append(sum((a - b).square().sum() for a, b in zip(trunk(net), trunk(net_a))))
        assert decay.seen[0] == {0}
    assert far[1] < far[0] / 2


def test_delta_is_zero_at_the_start_but_for_the_head():
    net_a, ds = source(), random_set()
    net = target(net_a)
    net.bn_eval = True
    first = Watcher(lambda loop: loop.loss.item())
    fit(net, ds, 1, 1e-3, batch_size=60, loss=lambda z, y: z.sum() * 0, callbacks=[DELTA(net, net_a, ds, beta=0), first])
    assert first.seen == [0] and not net.stages[-1]._forward_hooks


def test_delta_equals_its_formula():
    net_a, ds = source(), random_set()
    net = target(source(seed=1))
    penalty, x = DELTA(net, net_a, ds, weight=0.7, beta=0.1), batch(net)
    penalty.map = net.feature_map(x)
    gap, (b, c, h, w) = penalty.map - net_a.feature_map(x), penalty.map.shape
    by_hand = 0.7 / 2 * sum(penalty.attention[j] * gap[i, j].norm() ** 2 / (h * w) for i in range(b) for j in range(c)) / b
    by_hand = by_hand + 0.1 / 2 * sum((w**2).sum() for w in net.head.parameters())
    torch.testing.assert_close(penalty.penalty(looking_at(net, x)), by_hand)


def test_delta_asks_the_source_about_cached_activations_too():
    net_a, ds = source(), random_set()
    net = freeze(target(net_a), "stage1")
    net.bn_eval = True
    first = Watcher(lambda loop: loop.loss.item())
    fit(net, ds, 1, 1e-3, augmented=False, batch_size=60, loss=lambda z, y: z.sum() * 0, callbacks=[DELTA(net, net_a, ds, beta=0), first])
    assert first.seen == [0]


@pytest.mark.parametrize("make", [lambda *a: DELTA(*a, beta=0), lambda *a: LwF(*a)], ids=["delta", "lwf"])
def test_the_source_goes_on_from_kept_views(make, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    net_a, ds = source(), random_set()
    net = freeze(target(net_a), "stage1")
    net.bn_eval = True
    assert np.isfinite(fit(net, ds, 1, 1e-3, views=2, callbacks=[make(net, net_a, ds)]).history["loss"]).all()


def test_attention_follows_the_rise_of_the_loss():
    net, ds = target(source()), random_set()
    features, y = net.embed(net.batch(ds.images)).detach(), torch.tensor(ds.target())
    whole = net.head(features)     # the neck is a mean, so a channel less is a feature less
    rise = torch.stack([F.cross_entropy(whole - features[:, [j]] * net.head.weight[:, j], y) for j in range(features.shape[1])])
    rise = (rise - F.cross_entropy(whole, y)).detach().double()
    by_hand = ((rise - rise.mean()) / rise.std() / 5).exp()
    torch.testing.assert_close(_channel_attention(net, ds).double(), by_hand / by_hand.sum(), rtol=1e-2, atol=1e-5)


def test_attention_leaves_out_rows_without_a_label():
    net, ds = target(source()), random_set()
    hidden = replace(ds, table=ds.table.assign(label=np.where(np.arange(len(ds)) < 30, ds.target(), -1)))
    assert torch.equal(_channel_attention(net, hidden), _channel_attention(net, ds.take(range(30))))


@pytest.mark.parametrize("k", [1, 3])
def test_bss_equals_the_smallest_singular_values_by_hand(k):
    net = target(source())
    loop = looking_at(net, batch(net, 8))
    eigenvalues = torch.linalg.eigvalsh((loop.features @ loop.features.T).double())  # their roots are the singular values
    torch.testing.assert_close(BSS(net, None, None, eta=0.5, k=k).penalty(loop).double(), 0.5 * eigenvalues[:k].sum(), rtol=1e-2, atol=1e-5)


def test_lwf_at_the_start_is_the_entropy_of_the_old_answers():
    net_a = source()
    net = target(net_a)
    loop = looking_at(net, batch(net))
    p = (net_a(loop.x) / 2).softmax(1)
    torch.testing.assert_close(LwF(net, net_a, None).penalty(loop), -(p * p.log()).sum(1).mean())


def test_lwf_rises_when_the_answers_change():
    net_a = source()
    net, penalty = target(net_a), LwF(target(net_a), net_a, None)
    loop = looking_at(net, batch(net))
    start = penalty.penalty(loop)
    with torch.no_grad(): penalty.head.bias[0] += 3
    assert penalty.penalty(loop) > start + 0.1


def test_relationship_is_the_mean_answer_of_each_class():
    net_a, ds = source(), random_set()
    p, y = predict_proba(net_a, ds), ds.target()
    np.testing.assert_allclose(_relationship(net_a, ds), [p[y == k].mean(0) for k in (0, 1)], atol=1e-6)


def test_co_tuning_equals_cross_entropy_by_hand():
    net_a, ds = source(), random_set()
    net, y = target(net_a), torch.tensor(ds.target()[:6])
    loop, relation = looking_at(net, batch(net), y), _relationship(net_a, ds)
    by_hand = -(relation[y] * net_a(loop.x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(CoTuning(net, net_a, ds, weight=1.0).penalty(loop), by_hand)
    with pytest.raises(MedxferError, match="one class a picture"): _relationship(net_a, bright_or_dark(kind="multilabel"))


@pytest.mark.parametrize("make", [LwF, CoTuning])
def test_the_old_head_learns_and_survives_a_kill(make, tmp_path):
    def train(stop=None):
        net, ds, made = target(source()), random_set(), []
        class Stop(Callback):
            def after_step(self, loop):
                if stop and loop.epoch == 1: raise KeyboardInterrupt
        made.append(make(net, source(), ds))
        run = fit(net, ds, 3, 1e-2, augmented=False, callbacks=[*made, Stop()], checkpoint=tmp_path / "c.ckpt" if stop is not False else None)
        return run, made[0].head.weight
    with pytest.raises(KeyboardInterrupt): train(stop=True)
    (resumed, head), (undisturbed, same) = train(), train(stop=False)
    assert resumed.history.equals(undisturbed.history) and torch.equal(head, same) and not torch.equal(head, source().head.weight)


# --- calibration ---


def test_calibration_undoes_a_stretch_of_the_logits():
    net, ds = source(), random_set(60, classes=4)
    t = calibrate(net, ds)
    with torch.no_grad():
        net.head.weight.mul_(3); net.head.bias.mul_(3)
    assert calibrate(net, ds) == pytest.approx(3 * t, rel=1e-2)


def test_the_calibrated_cross_entropy_is_the_smallest_of_all_temperatures():
    net, ds = source(), random_set(60, classes=4)
    logits, y = _old_logits(net, ds), torch.tensor(ds.target())
    best = F.cross_entropy(logits / calibrate(net, ds), y)
    assert all(best <= F.cross_entropy(logits / t, y) + 1e-5 for t in np.geomspace(0.06, 19, 40))


def test_the_temperature_softens_the_relationship():
    net_a, ds = source(), random_set()
    p = (_old_logits(net_a, ds) / 5).softmax(1)
    y = torch.tensor(ds.target())
    penalty = CoTuning(target(net_a), net_a, ds, temperature=5)
    torch.testing.assert_close(penalty.relation, torch.stack([p[y == k].mean(0) for k in (0, 1)]))
    assert penalty.relation.max() < _relationship(net_a, ds).max() and "temperature=5" in repr(penalty)


# --- normalisation ---


@pytest.mark.parametrize("p, as_in", [(0, "eval"), (1, "train")])
def test_two_branches_at_their_ends_are_batch_norm(p, as_in):
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5) * 2 + 1
    plain = getattr(copy.deepcopy(norm), as_in)()
    assert torch.equal(_TwoBranch(norm, p).train()(x), plain(x))
    assert not torch.equal(norm.running_mean, torch.zeros(3))      # the moving averages learn from every batch


def test_two_branches_are_batch_norm_in_evaluation_and_where_frozen():
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    plain = copy.deepcopy(norm).eval()(x)
    assert torch.equal(_TwoBranch(norm, 0.5).eval()(x), plain)
    norm.requires_grad_(False)
    assert torch.equal(_TwoBranch(norm, 1).train()(x), plain) and (norm.running_mean == 0).all()


def test_stochnorm_is_gone_after_the_training_and_its_layers_learned():
    net_a, ds = source(), random_set()
    net = target(net_a)
    inside = Watcher(lambda loop: sum(isinstance(m, _TwoBranch) for m in loop.net.modules()))
    fit(net, ds, 1, 1e-2, callbacks=[StochNorm(net, net_a, ds), inside])
    norms = [(a, b) for a, b in zip(net.modules(), net_a.modules()) if isinstance(a, nn.BatchNorm2d)]
    assert inside.seen[0] == len(norms) > 0 and list(net.state_dict()) == list(target(net_a).state_dict())
    assert all(not torch.equal(a.weight, b.weight) and not torch.equal(a.running_mean, b.running_mean) for a, b in norms)
