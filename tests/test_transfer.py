"Transfer: what must hold after each step, and what each strategy may touch."
import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_imageset import random_set
from test_training import bright_or_dark

from medxfer_nb.backbones import create_model, extract
from medxfer_nb.core import MedxferError
from medxfer_nb.loop import Callback
from medxfer_nb.training import fit, predict_proba
from medxfer_nb.transfer import (
    STRATEGIES,
    Phase,
    Strategy,
    build_target,
    copy_weights,
    fit_probe,
    freeze,
    large_batches,
    rates,
    train_source,
    transfer,
)

QUICK = {name: Strategy(name, name, tuple(Phase(1, p.lr, p.frozen, p.body, p.decay, p.augmented) for p in s.phases), s.pretrained, "small_cnn")
         for name, s in STRATEGIES.items()}


def fingerprint(net): return hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def source(seed=0): return create_model("small_cnn", pretrained=False, num_classes=4, size=32, seed=seed)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "scratch"])
def test_the_source_network_is_never_changed(name):
    net_a = source()
    before = fingerprint(net_a)
    run = transfer(random_set(), QUICK[name], n=20, size=32, net_a=net_a)
    assert fingerprint(net_a) == before and run.net is not net_a


@pytest.mark.parametrize("name, still", [("feature_extraction", True), ("fully_connected", True), ("fine_tuning", False), ("scratch", False)])
def test_frozen_strategies_leave_the_trunk_as_it_was(name, still):
    net_a = source()
    trunk = transfer(random_set(), QUICK[name], n=20, size=32, net_a=net_a).net.stages.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in net_a.stages.state_dict().items()) == still


def test_scratch_uses_no_weight_of_the_source():
    runs = [transfer(random_set(), QUICK["scratch"], n=20, size=32, net_a=source(s)) for s in (0, 1)]
    assert fingerprint(runs[0].net) == fingerprint(runs[1].net)


def test_only_the_budget_and_the_training_split_are_used():
    ds = random_set()
    expected = transfer(ds, QUICK["fine_tuning"], n=10, size=32, net_a=source())
    drawn = set(ds.split("train").few(10, 0).table["id"])
    other = [i for i, row in enumerate(ds.table["id"]) if row not in drawn]
    ds.images[other] = 0
    assert fingerprint(transfer(ds, QUICK["fine_tuning"], n=10, size=32, net_a=source()).net) == fingerprint(expected.net)
    assert ds.openings["test"] == 0 and ds.openings["val"] == 0


@pytest.mark.parametrize("classes", [2, 4])
def test_probe_equals_scikit_learn(classes):
    train, net = random_set(classes=classes), source()
    run, x = fit_probe(net, train), extract(net, train.images).double().numpy()
    sk = make_pipeline(StandardScaler(), LogisticRegression(C=run.config["C"], max_iter=2000, tol=1e-8)).fit(x, train.target())
    np.testing.assert_allclose(run.predict_proba(train), sk.predict_proba(x), atol=1e-4)


def test_probe_of_two_classes_gives_evidence_for_both():
    head = fit_probe(source(), random_set()).net.head
    assert torch.equal(head.weight[0], -head.weight[1]) and head.weight.any()


def test_probe_on_too_few_patients_takes_the_middle_penalty():
    train = random_set()
    assert fit_probe(source(), train.take([np.argmax(train.target() == k) for k in (0, 1)])).config["C"] == 1e-2


@pytest.mark.parametrize("upto, frozen", [(None, []), ("stem", [0]), ("stage2", [0, 1, 2]), ("neck", [0, 1, 2, 3]),
                                          (slice(None, -3), [0, 1]), (slice(2, None), [2, 3]), (slice(None, -9), [])])
def test_freeze_freezes_all_up_to_a_stage_or_a_slice(upto, frozen):
    net = freeze(freeze(source(), "neck"), upto)
    assert [i for i, s in enumerate(net.stages) if not any(p.requires_grad for p in s.parameters())] == frozen
    assert all(p.requires_grad for p in net.head.parameters())


def test_rates_cover_every_weight_once_and_fall_towards_the_input():
    net = create_model("alexnet", pretrained=False, num_classes=2)
    groups = rates(net, Phase(1, 1e-2, body=0.1, decay=0.5))
    ids = [id(p) for params, _ in groups for p in params]
    assert sorted(ids) == sorted(map(id, net.parameters())) and [r for _, r in groups] == sorted((r for _, r in groups), reverse=True)


def test_weights_are_a_deep_copy_and_build_target_starts_from_them():
    net_a = source()
    w = copy_weights(net_a)
    with torch.no_grad(): net_a.stages[0][0][0].weight.zero_()
    net_b = build_target(net_a, w, 3)
    assert net_b.stages[0][0][0].weight.abs().sum() > 0 and net_b.head.out_features == 3


def test_source_below_target_is_refused():
    with pytest.raises(MedxferError, match="0.9 wanted"): train_source(random_set(200), epochs=1, lr=1e-6)
    assert train_source(bright_or_dark(), epochs=8).net.head.out_features == 2


def test_a_control_has_the_architecture_of_the_given_source():
    control = Strategy("control", "control", (Phase(1, 1e-3),), pretrained=False)
    net = transfer(random_set(), control, n=10, net_a=source()).net
    assert (net.spec.name, net.spec.size) == ("small_cnn", 32)


def test_a_strategy_has_pictures_of_its_own_size():
    own = replace(STRATEGIES["scratch"], phases=(Phase(1, 1e-3),), size=24)
    assert transfer(random_set(), own, n=10, size=48).net.spec.size == 24
    assert transfer(random_set(), replace(own, size=None), n=10, size=48).net.spec.size == 48
    assert transfer(random_set(), replace(own, backbone=None), n=10, net_a=source()).net.spec.size == 24
    assert transfer(random_set(), replace(STRATEGIES["feature_extraction"], size=24), n=10, net_a=source()).net.spec.size == 32  # the given one


@given(n=st.integers(1, 10_000))
def test_large_batches_leave_eight_steps_or_sixteen_pictures(n):
    assert 16 <= large_batches(n) <= 64 and large_batches(n) <= large_batches(n + 1)
    assert -(-n // large_batches(n)) >= 8 or large_batches(n) == 16


@pytest.mark.parametrize("batch_size, wanted", [(16, 16), (5, 5), (lambda n: n // 3, 8)])
def test_a_phase_says_how_many_pictures_a_step_has(batch_size, wanted):
    class Count(Callback):
        def after_step(self, loop): seen.append(len(loop.rows))
    seen, phase = [], Phase(1, 1e-3, batch_size=batch_size, callbacks=(lambda net, source, train: Count(),))
    run = transfer(random_set(), Strategy("s", "s", (phase,)), n=24, net_a=source())
    assert run.config["batch_size"] == wanted == seen[0] and sum(seen) == 24 and len(seen) == -(-24 // wanted)


@pytest.mark.parametrize("batch_size", [0, -4, 2.5, lambda n: n / 16])
def test_a_batch_that_is_no_number_of_pictures_is_refused(batch_size):
    s = Strategy("s", "s", (Phase(1, 1e-3, batch_size=batch_size),))
    with pytest.raises(MedxferError, match="batch_size asks for .* of 24; give a whole number"): transfer(random_set(), s, n=24, net_a=source())


def test_preparation_sees_the_pixels_of_the_rest_and_nothing_else():
    ds, seen = random_set(), []
    def prepare(net, train, rest, seed, checkpoint):
        seen.append((len(train), rest.copy(), seed, checkpoint))
        return train.take(range(8))
    run = transfer(ds, Strategy("p", "p", (Phase(1, 1e-3),), prepare=prepare), n=10, seed=3, net_a=source())
    (n, rest, seed, checkpoint), part = seen[0], ds.split("train")
    drawn = set(part.few(10, 3).table["id"])
    np.testing.assert_array_equal(rest, part.images[[i not in drawn for i in part.table["id"]]])
    assert (n, seed, checkpoint, run.config["n"]) == (10, 3, None, 8) and ds.openings["val"] == ds.openings["test"] == 0


def test_a_killed_transfer_goes_on_in_its_phase(tmp_path):
    class Stop(Callback):
        def __init__(self, at): self.left = at
        def after_step(self, loop):
            self.left -= 1
            if self.left == 0: raise KeyboardInterrupt
    def run(at, **kwargs):
        phases = (Phase(2, 1e-3, "neck", augmented=False), Phase(3, 1e-3, callbacks=(lambda net, source, train: Stop(at),)))
        return transfer(random_set(), Strategy("two", "two", phases), n=20, net_a=source(), **kwargs)
    with pytest.raises(KeyboardInterrupt): run(4, checkpoint=tmp_path / "new" / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*.ckpt")) == ["two-seed0-1.ckpt", "two-seed0-2.ckpt"]
    resumed, undisturbed = run(99, checkpoint=tmp_path / "new" / "folder"), run(99)
    assert resumed.history.equals(undisturbed.history) and fingerprint(resumed.net) == fingerprint(undisturbed.net)


def test_mistakes_are_named():
    with pytest.raises(MedxferError, match="did you mean 'scratch'"): transfer(random_set(), "scatch")
    with pytest.raises(MedxferError, match="pictures to draw from"): transfer(random_set(), QUICK["scratch"], n=1000)
    with pytest.raises(MedxferError, match="stage"): freeze(source(), "stage7")


def test_each_seed_of_a_training_from_scratch_has_its_own_start():
    first, second, again = (next(create_model("small_cnn", pretrained=False, size=32, seed=seed).parameters()) for seed in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_plain_descent_steps_by_its_formula():
    "Cross-entropy and SGD with momentum, at a constant rate: v = m v + g, w = w - rate v, worked out by hand."
    ds, net = bright_or_dark(16), freeze(create_model("small_cnn", pretrained=False, num_classes=2, size=32), "neck")
    x, y = extract(net, ds.images).double(), torch.tensor(ds.target())
    w = torch.cat([net.head.weight, net.head.bias[:, None]], 1).detach().double()
    v, x = torch.zeros_like(w), torch.cat([x, torch.ones(len(x), 1)], 1)
    for _ in range(3):
        g = ((x @ w.T).softmax(1) - torch.eye(2)[y]).T @ x / len(x)
        v = 0.9 * v + g
        w = w - 0.05 * v
    def constant(optimiser, steps): return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    fit(net, ds, 3, 0.05, augmented=False, batch_size=16, weight_decay=0, optimiser=partial(torch.optim.SGD, momentum=0.9), schedule=constant)
    torch.testing.assert_close(torch.cat([net.head.weight, net.head.bias[:, None]], 1).detach().double(), w, rtol=1e-4, atol=1e-5)


def test_the_probe_leaves_out_rows_without_a_label():
    ds = random_set()
    hidden = replace(ds, table=ds.table.assign(**{ds.task.name: np.where(np.arange(len(ds)) < 30, ds.target(), -1)}))
    a, b = fit_probe(source(), hidden), fit_probe(source(), ds.take(range(30)))
    assert a.config["n"] == 30 and torch.equal(a.net.head.weight, b.net.head.weight)


# --- frozen stages, shared by many transfers ---


@pytest.fixture
def kept(monkeypatch, tmp_path):
    "A function that counts the entries of a fresh cache of features."
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    return lambda: len(list((tmp_path / "features").glob("*/manifest.json")))


HEAD, UPPER = Phase(3, 4e-3, frozen="neck", augmented=False), Phase(2, 1e-3, frozen="stage1", views=2)


def test_what_stays_frozen_is_computed_once_for_all_draws_and_seeds(kept):
    two = Strategy("two", "head, then upper stages", (HEAD, UPPER))
    runs = [transfer(random_set(), two, n, seed, size=32, net_a=source(), shared=True) for n, seed in ((20, 0), (20, 1), (None, 2))]
    assert kept() == 2  # the maps for the head, and the views for the upper stages
    other = random_set(seed=1)
    for run in runs: np.testing.assert_allclose(run.predict_proba(other), predict_proba(run.net, other), atol=1e-5)
    assert kept() == 3 and all(run.kept == 2 for run in runs)  # and the maps of the pictures that all are asked about


def test_a_shared_transfer_learns_what_it_learns_alone(kept):
    head = Strategy("head", "head", (HEAD,))
    alone, shared = (transfer(random_set(), head, 20, 0, size=32, net_a=source(), shared=shared) for shared in (False, True))
    np.testing.assert_allclose(shared.history["loss"], alone.history["loss"], rtol=1e-4)
    torch.testing.assert_close(shared.net.head.weight, alone.net.head.weight, atol=1e-5, rtol=1e-4)


def test_what_is_no_longer_the_source_s_is_not_shared(kept):
    prepared = Strategy("prepared", "prepared", (HEAD,), prepare=lambda net, train, *_: train)
    random_start = Strategy("random", "random start", (HEAD,), pretrained=False, backbone="small_cnn")
    for s in (prepared, random_start): transfer(random_set(), s, 20, 0, size=32, net_a=source(), shared=True)
    assert kept() == 0
    moved = Strategy("moved", "all, then the head", (Phase(1, 1e-3), HEAD))
    run = transfer(random_set(), moved, 20, 0, size=32, net_a=source(), shared=True)
    run.predict_proba(random_set())
    assert kept() == run.kept == 0


def test_pictures_that_no_id_tells_apart_are_not_shared(kept):
    ds = random_set()
    ds.table["id"] = "same"
    run = transfer(ds, Strategy("head", "head", (HEAD,)), 20, 0, size=32, net_a=source(), shared=True)
    assert kept() == 0 and "pool" not in run.config
