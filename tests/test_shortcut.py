"Networks that are known to read the mark, or not; verdicts at their borders; and the committed table of the bench."
import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.metrics import Score
from medxfer_nb.shortcut import Audit, audit, balanced, mark_region, painted, planted
from medxfer_nb.surgery import Network, Spec

SIDE = 32
GROUPS = np.repeat(np.arange(10), 2)


def pictures(n=20, seed=0, shape=()): return np.random.default_rng(seed).integers(0, 120, (n, SIDE, SIDE, *shape)).astype(np.uint8)


class Window(nn.Module):
    "Lets a rectangle of the picture through."
    def __init__(self, rows, columns):
        super().__init__()
        self.register_buffer("open", torch.zeros(1, 1, SIDE, SIDE))
        self.open[..., rows, columns] = 1

    def forward(self, x): return x * self.open


def reader(rows, columns, gain):
    "A network whose logit is the mean brightness in a rectangle, above that of `pictures`, times `gain`."
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(Window(rows, columns)))
    net = Network(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 2), Spec("reader", (0, 0, 0), (1, 1, 1), SIDE)).eval()
    usual = 3 * gain * 59.5 / 255 * stages.stem[0].open.mean()
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[-gain] * 3, [gain] * 3]))
        net.head.bias.copy_(torch.stack([usual, -usual]))
    return net


CORNER, MIDDLE = (slice(20, 32), slice(0, 10)), (slice(8, 18), slice(12, 22))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_mark_is_in_its_region_and_in_its_pictures_only(shape):
    x, rows = pictures(6, shape=shape), np.arange(6) % 2 == 0
    before, region = x.copy(), mark_region((SIDE, SIDE))
    y = planted(x, rows)
    changed = (y != x).reshape(6, SIDE, SIDE, -1).any(3)
    assert np.array_equal(x, before) and changed.any((1, 2)).tolist() == rows.tolist() and not changed[:, ~region].any()
    assert (y[changed] == 255).all() and 0 < changed[0].sum() < region.sum() and np.array_equal(planted(x)[rows], y[rows])
    assert np.array_equal(planted(x, np.zeros(6, bool)), x)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_painting_takes_every_mark_away(shape):
    x, region = pictures(5, shape=shape), mark_region((SIDE, SIDE))
    clean = painted(planted(x), region)
    np.testing.assert_array_equal(clean, painted(x, region))                # nothing of what lay in the region is left
    np.testing.assert_array_equal(clean[:, ~region], x[:, ~region])
    assert set(np.unique(clean[0])) <= set(np.unique(x[0][~region]))


def test_painting_takes_the_nearest_pixel():
    x, region = np.arange(25, dtype=np.uint8).reshape(1, 5, 5), np.zeros((5, 5), bool)
    region[2:, :2] = True
    assert painted(x, region)[0, 2].tolist() in ([5, 6, 12, 13, 14], [5, 12, 12, 13, 14])
    for bad in (np.ones((5, 5), bool), np.zeros((4, 5), bool)):
        with pytest.raises(MedxferError, match="must be a part of a picture"): painted(x, bad)


def test_balancing_marks_one_half_whatever_the_label():
    n = 200
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", sick=np.arange(n) % 2))
    tasks, info = {"sick": Task("sick", "binary", ("no", "yes"))}, Info("toy", "toy", "none", "none", "none")
    ds = ImageSet(planted(pictures(n), table["sick"] == 1), table, tasks, info)
    region, shares = mark_region((SIDE, SIDE)), []
    for seed in range(20):
        new = balanced(ds, planted, lambda x: painted(x, region), seed)
        has = (new.images[:, region] == 255).any(1)
        assert has.sum() == n // 2 and np.array_equal(new.target(), ds.target())
        shares.append(has[new.target() == 1].mean())
    assert abs(np.mean(shares) - 0.5) < 0.05 and len(set(shares)) > 1


@pytest.mark.parametrize("low, high, word", [
    (0.11, 0.9, "shortcut"), (-0.9, -0.11, "shortcut"), (0.09, 0.9, "undecided"), (-0.9, 0.0, "undecided"), (-0.2, 0.2, "undecided"),
    (-0.09, 0.09, "no shortcut"), (0.02, 0.05, "no shortcut"), (None, None, "shortcut")])
def test_verdicts_at_their_borders(low, high, word):
    change = Score(0.5 if low is None else (low + high) / 2, low, high, 20, "")
    assert Audit(change, change, 0.1).verdict == word and repr(Audit(change, change, 0.1)).startswith(word)


@pytest.mark.parametrize("place, gain, word", [
    (CORNER, 40, "shortcut"), (CORNER, -40, "shortcut"), (MIDDLE, 40, "no shortcut"), (CORNER, 1, "no shortcut")])
def test_a_network_that_reads_the_corner_is_found_and_one_that_does_not_is_left_in_peace(place, gain, word):
    net, x = reader(*place, gain).train(), pictures()
    found = audit(net, x, planted(x), GROUPS)
    assert found.verdict == word and net.training and net.head.weight.grad is None
    if place == MIDDLE: assert found.change.value == 0
    if word == "shortcut": assert np.sign(found.change.value) == np.sign(gain)


def test_change_and_evidence_by_hand():
    net, x = reader(*CORNER, 20), pictures()
    y = planted(x)
    with torch.no_grad(): p, q = (net(net.batch(v)).softmax(1)[:, 1].numpy() for v in (x, y))
    found, region = audit(net, x, y, GROUPS), mark_region((SIDE, SIDE))
    assert found.change.value == pytest.approx((q - p).mean(), abs=1e-6)
    bright = (y / 255.0).copy(); bright[:, :CORNER[0].start] = 0; bright[:, :, CORNER[1].stop:] = 0
    share = bright[:, region].sum(1) / bright.sum((1, 2))
    assert found.evidence.value == pytest.approx(share.mean() - region.mean(), abs=1e-3) and found.evidence.low > 0
    assert audit(net, x, y, GROUPS, target=0).change.value == pytest.approx(-found.change.value, abs=1e-6)


def test_the_limit_is_the_readers():
    net, x = reader(*CORNER, 20), pictures()
    change = audit(net, x, planted(x), GROUPS).change
    assert audit(net, x, planted(x), GROUPS, limit=change.high + 0.01).verdict == "no shortcut"
    assert audit(net, x, planted(x), GROUPS, limit=change.low - 0.01).verdict == "shortcut"


def test_pictures_that_do_not_pair():
    net, x = reader(*CORNER, 20), pictures()
    with pytest.raises(MedxferError, match="same pictures twice"): audit(net, x, planted(x)[:5])
    with pytest.raises(MedxferError, match="picture 3 is the same in both"): audit(net, x, planted(x, np.arange(20) != 3))
    with pytest.raises(MedxferError, match="of one patient"): audit(net, x, planted(x), np.zeros(20))
    with pytest.raises(MedxferError, match="of one patient"): audit(net, x[:1], planted(x[:1]))


def test_the_committed_bench_keeps_the_promise():
    rows = list(csv.DictReader((Path(__file__).parents[1] / "bench" / "shortcut.csv").read_text().splitlines()))
    for marks, count in (("with the label", range(19, 21)), ("by lot", range(2))):
        kind = [r for r in rows if r["marks"] == marks]
        assert sorted(int(r["seed"]) for r in kind) == list(range(20))
        assert sum(r["verdict"] == "shortcut" for r in kind) in count
        for r in kind:
            change = Score(float(r["change"]), float(r["low"]), float(r["high"]), 180, "")
            assert change.low <= change.value <= change.high and Audit(change, change, 0.1).verdict == r["verdict"]
