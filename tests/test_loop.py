"The loop: kills, resumes, callbacks, and losses that are no numbers, on a network of a few weights."
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medxfer_nb.core import MedxferError
from medxfer_nb.loop import Callback, Loop, _name, one_cycle

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def small(seed=0):
    "A little of everything that has a state: BatchNorm, dropout, weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))


def train(net, epochs=3, checkpoint=None, x=X, lr=0.01, batch_size=8, **options):
    "Teach `net` the sum of three numbers."
    def loss_of(loop, rows): return (net(x[rows])[:, 0] - x[rows].sum(1)).square().mean()
    return Loop(net, len(x), loss_of, epochs, lr, batch_size, **options).run(checkpoint)


def steady(optimiser, steps): return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)


def equal(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Count(Callback):
    def __init__(self): self.steps = 0
    def after_step(self, loop): self.steps += 1
    def state_dict(self): return dict(steps=self.steps)
    def load_state_dict(self, state): self.steps = state["steps"]


class Leave(Callback):
    "The user presses Ctrl+C before step `step`, counted from 0."
    def __init__(self, step): self.step = step
    def __repr__(self): return "leave"
    def before_step(self, loop):
        self.step -= 1
        if self.step < 0: raise KeyboardInterrupt


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_what_can_be_learnt(seed):
    torch.manual_seed(seed)
    net = nn.Linear(3, 1)
    assert train(net, 100, lr=0.1, weight_decay=0).history["loss"].iloc[-1] < 1e-5  # decay would pull the weights off the solution
    torch.testing.assert_close(net.weight, torch.ones(1, 3), atol=0.02, rtol=0)


def test_a_run_depends_on_its_seed_alone():
    torch.manual_seed(1); a = train(small())
    torch.manual_seed(2); b = train(small())
    assert a.history.equals(b.history) and equal(a.net, b.net) and not a.net.training
    assert not equal(a.net, train(small(), seed=1).net)


def test_training_leaves_the_callers_generator_alone():
    torch.manual_seed(1); expected = torch.rand(1); torch.manual_seed(1)
    train(small())
    assert torch.equal(torch.rand(1), expected)


def test_one_step_of_the_loop_is_one_step_of_torch():
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    train(ours, 1, lr=0.1, batch_size=24, weight_decay=0, optimiser=torch.optim.SGD, schedule=steady)
    (theirs(X)[:, 0] - X.sum(1)).square().mean().backward()
    torch.testing.assert_close(ours.weight, theirs.weight - 0.1 * theirs.weight.grad)


def test_each_epoch_sees_each_row_once_and_the_history_is_a_mean_over_rows():
    seen, losses = [], []
    class Look(Callback):
        def after_step(self, loop): seen.append(loop.rows); losses.append(loop.loss.item() * len(loop.rows))
    run = train(small(), 2, x=X[:21], callbacks=[Look()])
    assert [len(rows) for rows in seen] == [8, 8, 5] * 2
    for k in (0, 3): assert sorted(torch.cat(seen[k:k + 3]).tolist()) == list(range(21))
    np.testing.assert_allclose(run.history["loss"], [sum(losses[:3]) / 21, sum(losses[3:]) / 21], rtol=1e-6)


def test_groups_have_rates_of_their_own_and_frozen_weights_stay():
    net = small()
    net[0].requires_grad_(False)
    before, stays = net[0].weight.clone(), net[3].weight.clone()
    train(net, lr=[(net[0].parameters(), 1.0), (net[3].parameters(), 0.0), (net[1].parameters(), 0.1)])
    assert torch.equal(net[0].weight, before) and torch.equal(net[3].weight, stays) and not torch.equal(net[1].weight, torch.ones(4))


def test_one_cycle_ends_near_zero_and_each_group_keeps_its_share():
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=rate) for rate in (0.1, 0.01)]
    optimiser = torch.optim.SGD(groups)
    plan, rates = one_cycle(optimiser, 50), []
    for _ in range(50):
        rates.append([g["lr"] for g in optimiser.param_groups])
        optimiser.step(); plan.step()
    np.testing.assert_allclose(np.array(rates)[:, 0], 10 * np.array(rates)[:, 1], rtol=1e-9)
    assert max(rates)[0] == pytest.approx(0.1) and rates[-1][0] < 1e-5


@pytest.mark.parametrize("make", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adagrad])
def test_one_cycle_leaves_momentum_to_the_reader(make):
    optimiser = make([nn.Parameter(torch.zeros(1))], lr=0.1)
    before = optimiser.defaults.get("momentum")
    plan, seen = one_cycle(optimiser, 10), set()
    for _ in range(10):
        seen.add(optimiser.param_groups[0].get("momentum"))
        optimiser.step(); plan.step()
    assert seen == {before}


# --- kills ---


def test_kills_leave_no_trace(tmp_path):  # `python bench/kills.py --trials 100` is the long form
    script = Path(__file__).parents[1] / "bench" / "kills.py"
    found = subprocess.run([sys.executable, script, "--trials", "6", "--folder", tmp_path], capture_output=True, text=True, check=True)
    counted = json.loads(found.stdout)
    assert counted["trials"] == counted["identical"] == 6 and counted["unloadable"] == 0
    assert counted["killed"] >= 5 and counted["killed in a save"] >= 1


@pytest.mark.parametrize("stop", range(9))
def test_resumed_at_any_step_it_is_the_same_training(tmp_path, stop):
    def run(at, **options):
        count = Count()
        return train(small(), callbacks=[count, Leave(at)], every=0, **options), count.steps
    with pytest.raises(KeyboardInterrupt): run(stop, checkpoint=tmp_path / "c")
    (resumed, steps), (whole, all_steps) = run(99, checkpoint=tmp_path / "c"), run(99)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net) and steps == all_steps == 9


def test_a_stopped_training_stays_stopped(tmp_path):
    class Enough(Callback):
        def after_epoch(self, loop): loop.stop = loop.epoch == 2
    runs = [train(small(), 5, tmp_path / "c", callbacks=[Enough()]) for _ in range(2)]
    assert [len(r.history) for r in runs] == [2, 2] and equal(runs[0].net, runs[1].net)


def test_callbacks_hear_the_end_of_a_failed_training():
    class Bell(Callback):
        rung = 0
        def after_fit(self, loop): self.rung += 1
    bell = Bell()
    with pytest.raises(KeyboardInterrupt): train(small(), callbacks=[Leave(0), bell])
    assert bell.rung == 1


# --- what is no number, and what does not belong together ---


def test_nan_never_reaches_the_weights(tmp_path):
    damaged, net = X.clone(), small()
    damaged[5] = torch.nan
    train(net, checkpoint=tmp_path / "c")
    good, before = (tmp_path / "c").read_bytes(), [p.clone() for p in net.parameters()]
    names = [f"picture {i}" for i in range(24)]
    with pytest.raises(MedxferError, match=r"loss is nan in epoch 1, batch 1 \(pictures .*picture 5.*; the weights are finite"):
        train(net, x=damaged[:6], names=names)
    assert all(map(torch.equal, before, net.parameters())) and (tmp_path / "c").read_bytes() == good


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Spoil(Callback):
        def after_step(self, loop):
            if loop.epoch == 1: loop.net[3].bias.data[0] = float("inf")
    with pytest.raises(MedxferError, match=r"3.bias.*lower lr"): train(small(), checkpoint=tmp_path / "c", callbacks=[Spoil()], batch_size=24)
    kept = torch.load(tmp_path / "c", weights_only=True)
    assert kept["epoch"] == 1 and all(v.isfinite().all() for v in kept["model"].values())


def test_nothing_to_train_is_refused():
    with pytest.raises(MedxferError, match="frozen"): train(small().requires_grad_(False))


@pytest.mark.parametrize("other", [dict(lr=0.02), dict(seed=1), dict(epochs=4), dict(schedule=partial(one_cycle)), dict(data="others")])
def test_foreign_checkpoints_are_refused(tmp_path, other):
    train(small(), checkpoint=tmp_path / "c")
    with pytest.raises(MedxferError, match="another training"): train(small(), checkpoint=tmp_path / "c", **other)


def test_damaged_checkpoints_are_refused(tmp_path):
    train(small(), checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:500])
    with pytest.raises(MedxferError, match="damaged"): train(small(), checkpoint=tmp_path / "c")


def test_functions_stand_in_the_record_by_name(tmp_path):
    assert _name(steady) == "steady" and _name(partial(steady, steps=3)) == "steady(){'steps': 3}" and _name(slice(2)) == "slice(None, 2, None)"
    config = train(small(), 1, tmp_path / "c", schedule=steady, policy=partial(steady, 1)).config
    assert (config["schedule"], config["policy"], config["optimiser"]) == ("steady", "steady(1,){}", "AdamW(){'fused': True}")
    assert torch.load(tmp_path / "c", weights_only=True)["config"] == config
