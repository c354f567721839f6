"One loss of several: PCGrad against its formula, GradNorm's equal pulls, Kendall's optimum, silent tasks, and resumes to the last bit."
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from test_multitask import TASKS, tiny_set, with_heads
from torch import nn

from medxfer_nb import balancing
from medxfer_nb.balancing import Conflicts, GradNorm, PCGrad, Uncertainty, gradients, pcgrad, show_conflicts
from medxfer_nb.core import MedxferError
from medxfer_nb.loop import Callback, Loop
from medxfer_nb.multitask import Fixed, fit_multitask

BALANCES = {"fixed": lambda: Fixed(mask=2.0), "kendall": Uncertainty, "gradnorm": GradNorm, "pcgrad": PCGrad}


class Toy(nn.Module):
    "Quadratic losses of one shared vector w: scale |w - wish|^2 a task."

    def __init__(self, wishes, scales):
        super().__init__()
        self.tasks, self.stages = dict.fromkeys(map(str, range(len(wishes)))), nn.Sequential(nn.Linear(1, len(wishes[0]), bias=False))
        nn.init.zeros_(self.stages[0].weight)
        self.wishes, self.scales = torch.tensor(wishes), scales

    @property
    def shared(self): return self.stages.parameters()
    def losses(self): return {k: s * (self.stages[0].weight[:, 0] - wish).square().sum() for k, s, wish in zip(self.tasks, self.scales, self.wishes)}


def steady(optimiser, steps): return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)


def sgd(groups, weight_decay): return torch.optim.SGD(groups)


def play(toy, balance, steps, lr, absent=()):
    def loss_of(loop, rows):
        loop.losses = {k: v for k, v in toy.losses().items() if k not in absent}
        return balance.total(loop, loop.losses)
    Loop(toy, steps, loss_of, 1, lr, batch_size=1, callbacks=[balance], schedule=steady, optimiser=sgd).run()
    return toy.stages[0].weight.detach()[:, 0]


# --- PCGrad ---


def test_pcgrad_on_two_tasks_is_its_formula():
    for seed in range(20):
        a, b = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
        dot = a @ b
        expected = a + b if dot >= 0 else a - dot / (b @ b) * b + b - dot / (a @ a) * a
        torch.testing.assert_close(pcgrad(torch.stack([a, b])), expected)


def test_pcgrad_of_many_tasks_leaves_each_part_at_no_more_than_a_right_angle_to_the_last_it_was_held_against(monkeypatch):
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n))
    steps = []
    for i in range(3):
        mine = g[i].numpy().astype(float)
        for j in range(3):
            other = g[j].numpy().astype(float)
            if j != i and (dot := mine @ other) < 0: mine = mine - dot / (other @ other) * other
        steps.append(mine)
    np.testing.assert_allclose(pcgrad(g).numpy(), np.sum(steps, axis=0), rtol=1e-4, atol=1e-5)


def test_a_step_of_pcgrad_moves_two_quadratics_by_the_projected_gradients():
    toy, lr = Toy([[1.0, 0.0], [-1.0, 0.5]], (1.0, 3.0)), 0.01
    g = torch.tensor([[-2.0, 0.0], [6.0, -3.0]])                          # 2 scale (w - wish) at w = 0
    torch.testing.assert_close(gradients(toy.losses(), list(toy.shared)), g)
    torch.testing.assert_close(play(toy, PCGrad(), 1, lr), -lr * pcgrad(g))


def test_pcgrad_leaves_heads_to_their_own_losses():
    ds, nets = tiny_set(8), [with_heads(), with_heads()]
    for net, balance in zip(nets, (PCGrad(), None)):
        fit_multitask(net, ds, 1, lr=0.1, balance=balance, augmented=False, batch_size=8, weight_decay=0.0, optimiser=sgd, schedule=steady)
    torch.testing.assert_close(nets[0].heads["mask"].weight, nets[1].heads["mask"].weight)
    torch.testing.assert_close(nets[0].head.weight, nets[1].head.weight)


# --- GradNorm and Kendall ---


def test_gradnorm_makes_pulls_equal():
    toy, balance = Toy([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], (1.0, 10.0, 0.2)), GradNorm(alpha=0.0)
    play(toy, balance, 600, 0.0)
    lengths = gradients(toy.losses(), list(toy.shared)).norm(dim=1)
    weights = torch.stack([balance.weight(k) for k in toy.tasks])
    torch.testing.assert_close(weights, 3 / lengths / (1 / lengths).sum(), rtol=0.1, atol=0.0)
    assert torch.isclose(weights.sum(), torch.tensor(3.0))


def test_gradnorm_lets_the_task_that_lags_pull_more():
    def weight_of_the_first(alpha):
        toy, balance = Toy([[1.0, 0.0], [0.0, 1.0]], (1.0, 1.0)), GradNorm(alpha)
        def loss_of(loop, rows):                                          # both pull alike; of the second half of the loss is left
            balance.first = {"0": 1.0, "1": 2.0}
            return balance.total(loop, toy.losses())
        Loop(toy, 300, loss_of, 1, 0.0, batch_size=1, callbacks=[balance], schedule=steady, optimiser=sgd).run()
        return balance.weight("0").item()
    assert weight_of_the_first(0.0) == pytest.approx(1, abs=0.05) and weight_of_the_first(1.0) == pytest.approx(4 / 3, abs=0.05)


def test_kendalls_weights_reach_their_closed_form():
    toy, balance = Toy([[1.0, 0.0], [0.0, 3.0]], (0.5, 1.0)), Uncertainty(lr=0.05)
    play(toy, balance, 600, 0.0)
    for name, loss in toy.losses().items(): assert balance.weight(name).item() == pytest.approx(1 / (2 * loss.item()), rel=0.02)


@pytest.mark.parametrize("balance", [Uncertainty(), GradNorm(), PCGrad(), Fixed()], ids=str)
def test_a_task_without_a_label_moves_nothing(balance):
    alone = play(Toy([[1.0, 0.0]], (1.0,)), type(balance)(), 20, 0.05)
    with_other = play(Toy([[1.0, 0.0], [0.0, 1.0]], (1.0, 5.0)), balance, 20, 0.05, absent="1")
    if isinstance(balance, (Uncertainty, GradNorm)): assert balance.numbers["1"] == 0
    torch.testing.assert_close(alone, with_other)


# --- training ---


@pytest.mark.parametrize("name", BALANCES)
def test_a_killed_training_goes_on_to_the_last_bit(name, tmp_path):
    class Kill(Callback):
        def __init__(self, when): self.when = when
        def __repr__(self): return "Kill"
        def before_step(self, loop):
            if (loop.epoch, loop.at) == self.when: raise KeyboardInterrupt

    def go(when, checkpoint=None):
        balance, fight = BALANCES[name](), Conflicts(every=3)
        options = dict(balance=balance, callbacks=[fight, Kill(when)], batch_size=4, every=0, checkpoint=checkpoint)
        run = fit_multitask(with_heads(*TASKS), tiny_set(16), 3, **options)
        return run, fight.table
    with pytest.raises(KeyboardInterrupt): go((1, 8), tmp_path / "run.ckpt")
    (resumed, fought), (whole, fight) = go(None, tmp_path / "run.ckpt"), go(None)
    pd.testing.assert_frame_equal(resumed.history, whole.history)
    pd.testing.assert_frame_equal(fought, fight)
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.state_dict().values(), whole.net.state_dict().values()))


@pytest.mark.parametrize("name", ["kendall", "gradnorm"])
def test_learned_weights_are_in_the_history(name):
    run = fit_multitask(with_heads(), tiny_set(16), 3, balance=BALANCES[name](), batch_size=4)
    weights = run.history[["weight of sick", "weight of mask"]]
    assert (weights > 0).all().all() and weights.iloc[-1].nunique() == 2


def test_conflicts_are_cosines():
    net, fight = with_heads("sick", "mask", "mm"), Conflicts(every=1)
    looked = []

    class Own(Callback):
        def after_loss(self, loop):
            w = [*loop.net.stages.stage2.parameters()]
            a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loop.losses[k], w, retain_graph=True)]) for k in ("sick", "mask"))
            looked.append((a @ b / a.norm() / b.norm()).item())

    net.stages.stem.requires_grad_(False)
    fit_multitask(net, tiny_set(16), 2, callbacks=[fight, Own()], batch_size=8)
    table = fight.table
    mine = table[(table["stage"] == "stage2") & (table["a"] == "sick") & (table["b"] == "mask")]["cosine"]
    np.testing.assert_allclose(mine, looked, atol=1e-5)
    assert set(table["stage"]) == {"stage1", "stage2", "pyramid"} and len(table) == 4 * 3 * 3 and table["step"].max() == 3


def test_watching_changes_nothing():
    plain, watched = (fit_multitask(with_heads(), tiny_set(16), 2, callbacks=c).history for c in ([], [Conflicts(every=1)]))
    pd.testing.assert_frame_equal(plain, watched)


def test_a_frozen_trunk_has_nothing_to_balance():
    for balance, words in ((GradNorm(), "last stage, which is frozen"), (PCGrad(), "nothing that the tasks share is trained")):
        net = with_heads("sick", "kind")
        net.stages.requires_grad_(False)
        with pytest.raises(MedxferError, match=words): fit_multitask(net, tiny_set(8), 1, balance=balance)


def test_the_figure_says_the_mean_cosine_of_each_pair(monkeypatch):
    said = []
    monkeypatch.setattr(balancing, "show", lambda fig, alt: (said.append(alt), plt.close(fig)))
    rows = [[step, stage, "a", "b", c] for step, stage, c in ((0, "stem", 0.5), (0, "stage1", -0.5), (10, "stem", 0.5), (10, "stage1", 0.1))]
    show_conflicts(pd.DataFrame(rows, columns=["step", "stage", "a", "b", "cosine"]))
    assert "a and b +0.15" in said[0]
