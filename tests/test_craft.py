"Craft: oracles for every part, resumes that are exact with each callback, and wrong uses."
import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from test_loop import Leave, equal
from test_training import bright_or_dark, small
from torch.nn import functional as F

from medxfer_nb.core import MedxferError
from medxfer_nb.craft import (
    EMA,
    EarlyStopping,
    GradientClip,
    MixedPrecision,
    WeightedSampler,
    _balanced,
    _valley,
    cosine,
    lr_find,
    weighted_loss,
)
from medxfer_nb.loop import Callback
from medxfer_nb.training import fit


def lopsided(n=24): return bright_or_dark(n).take(np.r_[np.arange(0, n, 2), 1, 3, 5])  # 12 dark, 3 bright


class Record(Callback):
    "Keeps the batches, targets and gradients of a training."
    def __init__(self): self.x, self.y, self.gradients, self.orders, self.states = [], [], [], [], []
    def before_epoch(self, loop): self.orders.append(loop.order)
    def before_batch(self, loop): self.x.append(loop.x); self.y.append(loop.y)
    def before_step(self, loop): self.gradients.append([p.grad.clone() for p in loop.net.parameters()])
    def after_step(self, loop): self.states.append(copy.deepcopy(loop.net.state_dict()))


# --- the rate ---


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 9), training=st.booleans(), bn_eval=st.booleans(), frozen=st.integers(0, 3), augmented=st.booleans())
def test_the_test_of_rates_leaves_no_trace(seed, training, bn_eval, frozen, augmented):
    net = small(seed).train(training)
    net.bn_eval = bn_eval
    net.stages[:frozen].requires_grad_(False)
    facts = lambda: [[m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], [p.grad for p in net.parameters()]]
    before, state, chance, numbers = facts(), copy.deepcopy(net.state_dict()), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    lr_find(net, bright_or_dark(), num_it=20, augmented=augmented)
    assert facts() == before and torch.equal(torch.get_rng_state(), chance) and (np.random.get_state()[1] == numbers).all()  # noqa: NPY002
    assert all(v.numpy().tobytes() == state[k].numpy().tobytes() for k, v in net.state_dict().items())


def test_the_rate_rises_by_a_constant_factor():
    found = lr_find(small(), bright_or_dark(), start_lr=1e-6, end_lr=1e-2, num_it=40)
    np.testing.assert_allclose(found.curve["rate"], 1e-6 * 1e4 ** (np.arange(40) / 40), rtol=1e-6)
    assert 1e-6 < found.valley < 1e-2 and "valley" in repr(found)


def test_the_curve_is_a_bias_free_running_mean_of_the_losses():
    losses = []
    class Listen(Callback):
        def after_loss(self, loop): losses.append(loop.loss.item())
    curve = lr_find(small(), bright_or_dark(), end_lr=1e-3, num_it=20, callbacks=[Listen()]).curve["loss"]
    expected = [np.average(losses[:i + 1], weights=0.98 ** np.arange(i, -1, -1)) for i in range(20)]
    np.testing.assert_allclose(curve, expected, rtol=1e-6)


def test_the_test_of_rates_ends_when_the_loss_explodes():
    found = lr_find(small(), bright_or_dark(), start_lr=1e-4, end_lr=1e5, num_it=200)
    too_high = found.curve["loss"] > 4 * found.curve["loss"].cummin()
    assert len(found.curve) < 200 and too_high.iloc[-1] and not too_high.iloc[:-1].any()
    assert found.valley < found.curve["rate"].iloc[-1]


def longest_fall(losses):
    "The length of the longest falling series of each prefix, by trying all of them."
    series = [[]]
    for loss in losses: series += [s + [loss] for s in series if not s or s[-1] > loss]
    return max(map(len, series))


@given(st.lists(st.integers(0, 20), min_size=3, max_size=10))
def test_valley_ends_where_the_longest_fall_ends(losses):
    fall, i = longest_fall(losses), _valley(losses)
    end = next(k for k in range(len(losses)) if longest_fall(losses[:k + 1]) == fall)
    assert max(end - fall, 0) <= i <= end


def test_valley_of_a_v_lies_half_way_down():
    losses = [5.0] * 20 + list(np.linspace(5, 1, 31)) + list(np.linspace(1, 9, 20))
    assert 30 <= _valley(losses) <= 40


@pytest.mark.parametrize("peak,steps,share", [(1e-3, 50, 0.1), (0.3, 7, 0.5), (1e-2, 20, 0.0)])
def test_cosine_is_its_formula(peak, steps, share):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    plan, warm = cosine(optimiser, steps, share), round(share * steps)
    for i in range(steps):
        part = (i + 1) / (warm + 1) if i < warm else 0.5 * (1 + math.cos(math.pi * (i - warm) / (steps - warm)))
        assert math.isclose(optimiser.param_groups[0]["lr"], peak * part, rel_tol=1e-9, abs_tol=1e-12)
        optimiser.step(); plan.step()
    assert abs(optimiser.param_groups[0]["lr"]) < 1e-12


def test_cosine_without_warm_up_is_torchs():
    rates = []
    for schedule in (partial(cosine, pct_start=0), lambda o, steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        plan = schedule(optimiser, 30)
        rates.append([(optimiser.param_groups[0]["lr"], optimiser.step(), plan.step())[0] for _ in range(30)])
    np.testing.assert_allclose(*rates, rtol=1e-6, atol=1e-12)


# --- gradients, stopping, averages ---


def test_clip_is_torchs():
    plain, clipped, clip = Record(), Record(), GradientClip(0.01)
    fit(small(), bright_or_dark(), 1, batch_size=24, callbacks=[plain])
    run = fit(small(), bright_or_dark(), 1, batch_size=24, callbacks=[clip, clipped])
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in plain.gradients[0]]
    for w, g in zip(weights, plain.gradients[0]): w.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(weights, 0.01)
    for w, g in zip(weights, clipped.gradients[0]): assert torch.equal(w.grad, g)
    assert norm > 0.01 and math.isclose(run.history["grad_norm"].iloc[0], norm.item(), rel_tol=1e-6)


class Script(Callback):
    "A column of the history that was written before, and the weights of each epoch."
    def __init__(self, name, values): self.name, self.values, self.states = name, values, []
    def after_epoch(self, loop):
        loop.history[-1][self.name] = self.values[loop.epoch - 1]
        self.states.append(copy.deepcopy(loop.net.state_dict()))


@pytest.mark.parametrize("name,values,patience,delta,ends,best", [
    ("test_loss", [3, 2, 1, 2, 0.5, 0.4], 1, 0, 4, 3), ("test_loss", [3, 2, 1, 2, 0.5, 0.4], 2, 0, 6, 6), ("auroc", [0.5, 0.7, 0.6, 0.9], 1, 0, 3, 2),
    ("test_loss", [3, 2.9, 2.8, 1], 2, 0.5, 3, 1), ("error", [1, math.nan, math.nan, 0], 2, 0, 3, 1), ("test_loss", [2, 1, 0.5], 9, 0, 3, 3)])
def test_early_stopping_stops_where_it_must_and_gives_the_best_back(name, values, patience, delta, ends, best):
    script = Script(name, values)
    run = fit(small(), bright_or_dark(), len(values), callbacks=[script, EarlyStopping(name, delta, patience)])
    assert len(run.history) == ends
    assert all(torch.equal(v, script.states[best - 1][k]) for k, v in run.net.state_dict().items())


def test_early_stopping_on_other_patients_keeps_their_best_loss():
    ds, valid = bright_or_dark(), bright_or_dark(seed=1)
    run = fit(small(), ds, 4, lr=0.03, valid=valid, callbacks=[EarlyStopping(patience=4)])
    p, y = run.predict_proba(valid), valid.target()
    assert math.isclose(-np.log(p[np.arange(len(y)), y]).mean(), run.history["valid_loss"].min(), rel_tol=1e-4)


def test_a_callback_can_serve_two_trainings():
    for callback in (EarlyStopping("loss"), EMA(), GradientClip()):
        a, b = (fit(small(), bright_or_dark(), 2, callbacks=[callback]) for _ in range(2))
        assert a.history.equals(b.history) and equal(a.net, b.net)


def test_ema_is_the_closed_form_sum():
    record, decay = Record(), 0.7
    run = fit(small(), bright_or_dark(), 3, callbacks=[record, EMA(decay)])
    n = len(record.states)
    weights = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - t) for t in range(1, n)]
    assert n == 6 and math.isclose(sum(weights), 1)
    for name, value in run.net.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(w * s[name] for w, s in zip(weights, record.states)), atol=1e-5, rtol=1e-4)


def test_the_later_of_ema_and_early_stopping_has_the_last_word():
    script, stopper = Script("x_loss", [1, 2]), EarlyStopping("x_loss", patience=2)
    kept = fit(small(), bright_or_dark(), 2, callbacks=[script, EMA(), stopper]).net
    assert all(torch.equal(v, script.states[0][k]) for k, v in kept.state_dict().items())
    averaged = fit(small(), bright_or_dark(), 2, callbacks=[Script("x_loss", [1, 2]), stopper, EMA()]).net
    assert equal(averaged, fit(small(), bright_or_dark(), 2, callbacks=[EMA()]).net)


# --- precision and rare classes ---


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_float32():
    seen = []
    net = small()
    net.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run = fit(net, bright_or_dark(), 6, lr=3e-3, callbacks=[MixedPrecision()])
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in net.parameters()} == {torch.float32} and math.isfinite(run.history["loss"].iloc[-1])
    assert (run.predict_proba(bright_or_dark()).argmax(1) == bright_or_dark().target()).mean() > 0.9


def test_balanced_weights_are_sklearns_and_count_only_labelled_pictures():
    ds = lopsided()
    ds.table.loc[0, "bright"] = -1
    y = ds.target()[1:]
    weight, labels = _balanced(ds)
    np.testing.assert_allclose(weight, compute_class_weight("balanced", classes=np.array([0, 1]), y=y))
    np.testing.assert_allclose(weight, [14 / (2 * 11), 14 / (2 * 3)])
    np.testing.assert_array_equal(labels, y)


def test_weighted_loss_counts_classes_alike():
    ds, z = lopsided(), torch.randn(15, 2, generator=torch.Generator().manual_seed(0))
    y = torch.tensor(ds.target())
    each = F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(weighted_loss(ds)(z, y), (each[y == 0].mean() + each[y == 1].mean()) / 2)
    fit(small(), ds, 1, loss=weighted_loss(ds), callbacks=[MixedPrecision()])


def test_weighted_sampler_shows_classes_alike():
    ds, record = bright_or_dark(300).take(np.r_[np.arange(0, 300, 2), 1, 3, 5]), Record()
    fit(small(), ds, 4, batch_size=153, callbacks=[WeightedSampler(ds), record])
    shown = torch.tensor(ds.target())[torch.cat(record.orders)].float()
    assert all(len(order) == 153 for order in record.orders) and abs(shown.mean() - 0.5) < 0.1


# --- kills ---


CALLBACKS = {
    "GradientClip": lambda ds: [GradientClip(0.5)], "EMA": lambda ds: [EMA(0.8)],
    "EarlyStopping": lambda ds: [EarlyStopping("loss")], "MixedPrecision": lambda ds: [MixedPrecision()],
    "WeightedSampler": lambda ds: [WeightedSampler(ds)],
    "all": lambda ds: [GradientClip(), WeightedSampler(ds), EMA(), EarlyStopping("loss")],
}


@pytest.mark.parametrize("stop", [2, 3, 5])  # after an epoch, in the middle of the second one, near the end of it
@pytest.mark.parametrize("name", CALLBACKS)
def test_resumed_in_the_middle_each_callback_goes_on_exactly(tmp_path, name, stop):
    def train(at, **options):
        ds = lopsided(16)
        return fit(small(), ds, 3, batch_size=4, schedule=cosine, callbacks=[*CALLBACKS[name](ds), Leave(at)], **options)
    with pytest.raises(KeyboardInterrupt): train(stop, checkpoint=tmp_path / "c", every=0)
    resumed, whole = train(99, checkpoint=tmp_path / "c", every=0), train(99)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net)
    assert equal(train(99, checkpoint=tmp_path / "c").net, whole.net)  # asked for again when it is finished


def test_a_checkpoint_knows_the_callbacks_settings(tmp_path):
    fit(small(), bright_or_dark(), 1, callbacks=[EMA(0.8)], checkpoint=tmp_path / "c")
    with pytest.raises(MedxferError, match="another training"): fit(small(), bright_or_dark(), 1, callbacks=[EMA(0.9)], checkpoint=tmp_path / "c")


# --- wrong uses ---


@pytest.mark.parametrize("make", [lambda: GradientClip(0), lambda: EMA(1), lambda: EMA(-0.1), lambda: EarlyStopping(patience=0),
                                  lambda: EarlyStopping(min_delta=-1)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(MedxferError, match="=.*(above 0|must be|0 or more)"): make()


def test_a_monitor_that_cannot_be_there_is_refused_before_the_first_step():
    net, before = small(), small()
    with pytest.raises(MedxferError, match="pass valid="): fit(net, bright_or_dark(), 2, callbacks=[EarlyStopping()])
    assert equal(net, before)
    with pytest.raises(MedxferError, match="did you mean 'loss'"): fit(small(), bright_or_dark(), 2, callbacks=[EarlyStopping("lost")])


def test_wrong_uses_are_refused():
    ds = bright_or_dark()
    with pytest.raises(MedxferError, match="start_lr"): lr_find(small(), ds, start_lr=1, end_lr=0.1)
    with pytest.raises(MedxferError, match="lower start_lr"): lr_find(small(), ds, start_lr=1e8, end_lr=1e10)
    with pytest.raises(MedxferError, match="pct_start"): cosine(None, 10, 1.5)
    with pytest.raises(MedxferError, match="24 pictures, the training 15"): fit(small(), lopsided(), 1, callbacks=[WeightedSampler(ds)])
    with pytest.raises(MedxferError, match="'yes'"): weighted_loss(ds.take(np.arange(0, 24, 2)))
    with pytest.raises(MedxferError, match="multilabel"): WeightedSampler(bright_or_dark(kind="multilabel"))
