"Rank correlation against scipy, planted looks whose badge is known, and a cascade that leaves its network alone."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from medxfer_nb.core import MedxferError
from medxfer_nb.metrics import mean_score
from medxfer_nb.sanity import FEWEST, LIMIT, Badge, badges, cascade, excess, rank_likeness
from medxfer_nb.surgery import Network, Spec


def tiny_net(seed=0, classes=2):
    "Two random stages with batch normalisation."
    torch.manual_seed(seed)
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()))
    stages.add_module("stage1", nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()))
    net = Network(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, classes), Spec("tiny", size=32)).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn_like(p))
    return net


def noise(n=24, side=6, seed=0): return np.random.default_rng(seed).normal(size=(n, side, side))


GROUPS = np.repeat(np.arange(12), 2)


def test_rank_likeness_is_scipys_with_ties_too():
    a, b = noise(5).round(), noise(4, seed=1).round(1)
    expected = [[spearmanr(x.ravel(), y.ravel()).statistic for y in b] for x in a]
    np.testing.assert_allclose(rank_likeness(a, b), expected, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_only_the_order_counts(seed):
    a, b = noise(3, 5, seed), noise(3, 5, seed + 1)
    np.testing.assert_allclose(rank_likeness(np.exp(a), b**3), rank_likeness(a, b), atol=1e-12)
    np.testing.assert_allclose(np.diag(rank_likeness(a, -a)), -1)


def test_flat_maps_are_like_nothing():
    assert (rank_likeness(np.ones((2, 5, 5)), noise(3, 5)) == 0).all()


@pytest.mark.parametrize("a, b, words", [
    (noise(2), noise(2, 7), "one layer"), (noise(2)[0], noise(2), "finite"), (noise(2) * np.nan, noise(2), "finite")])
def test_maps_that_cannot_be_compared(a, b, words):
    with pytest.raises(MedxferError, match=words): rank_likeness(a, b)


def test_excess_forgives_what_all_pictures_share():
    template, own = 5 * noise(1), noise(24, seed=1)
    a, b = template + 0.5 * noise(24, seed=2), template + 0.5 * noise(24, seed=3)
    assert np.diag(rank_likeness(a, b)).mean() > 0.9 and abs(excess(a, b, GROUPS).mean()) < 0.01
    assert abs(excess(own, own, GROUPS).mean() - 1) < 0.1
    assert excess(own, own + 0.5 * noise(24, seed=4), GROUPS).mean() > 0.7


def test_excess_of_unrelated_maps_holds_nothing():
    inside = 0
    for seed in range(40):
        s = mean_score(excess(noise(seed=2 * seed), noise(seed=2 * seed + 1), GROUPS), GROUPS, n_boot=400)
        inside += s.low < 0 < s.high
    assert inside >= 32, inside


def test_excess_by_hand():
    a, b, groups = noise(4), noise(4, seed=1), np.array([0, 0, 1, 2])
    c = rank_likeness(a, b)
    expected = [c[0, 0] - c[0, 2:].mean(), c[1, 1] - c[1, 2:].mean(), c[2, 2] - c[2, [0, 1, 3]].mean(), c[3, 3] - c[3, :3].mean()]
    np.testing.assert_allclose(excess(a, b, groups), expected)
    np.testing.assert_allclose(excess(a, [a, b], groups), (excess(a, a, groups) + excess(a, b, groups)) / 2)


def test_excess_needs_patients():
    with pytest.raises(MedxferError, match="one patient"): excess(noise(3), noise(3), np.zeros(3))
    with pytest.raises(MedxferError, match="one patient for each"): excess(noise(3), noise(3), np.zeros(2))


def test_cascade_goes_down_part_by_part_and_leaves_its_network_alone():
    net = tiny_net()
    before, chance = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    levels = dict(cascade(net))
    assert list(levels) == ["head", "stage1", "stem"]
    same = {k: [name for name, p in n.named_parameters() if torch.equal(p, before[name])] for k, n in levels.items()}
    assert {n.split(".")[0] for n in same["head"]} == {"stages"} and len(same["head"]) == 8
    assert all(n.startswith("stages.stem") for n in same["stage1"]) and len(same["stage1"]) == 4 and same["stem"] == []
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(torch.get_rng_state(), chance)
    assert torch.equal(levels["stem"].head.weight, levels["head"].head.weight)          # a level keeps the random parts of the one before
    assert all((m.running_mean == 0).all() for m in levels["stem"].modules() if isinstance(m, nn.BatchNorm2d))


def test_cascade_repeats_with_its_seed():
    a, b, c = (dict(cascade(tiny_net(), seed))["stem"].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["head.weight"], c["head.weight"])


def test_a_weight_without_a_rule_is_shuffled():
    net = tiny_net()
    net.stages.stage1.scale = nn.Parameter(torch.arange(50.0))
    scale = dict(cascade(net))["stage1"].stages.stage1.scale
    assert not torch.equal(scale, net.stages.stage1.scale) and torch.equal(scale.sort().values, net.stages.stage1.scale)


def seen(net, share):
    "Maps of which a share is the same for every network, and the rest hangs on the head's weights alone."
    seed = int(1e4 * net.head.weight.detach().abs().sum()) % 2**31
    return np.sqrt(share) * noise(seed=99) + np.sqrt(1 - share) * noise(seed=seed)


@pytest.mark.parametrize("share, state", [(0.0, "passed"), (0.2, "passed"), (0.8, "failed"), (1.0, "failed")])
def test_the_weights_badge_counts_what_is_kept(share, state):
    given = badges(lambda net: seen(net, share), tiny_net(0), GROUPS, tiny_net(1), tiny_net(2))
    assert given["weights"].state == given["labels"].state == state, given
    assert given["repeat"].state == given["all"].state == "failed"                       # the twin shares no more than the shuffled one


def test_a_look_that_follows_what_was_learned_passes_all():
    learned = {}
    def look(net): return noise(seed=1) + 0.3 * noise(seed=2) if learned.get(id(net)) else noise(seed=int(1e4 * net.head.weight.abs().sum()))
    net, twin = tiny_net(0), tiny_net(1)
    learned |= {id(net): True, id(twin): True}
    given = badges(look, net, GROUPS, twin, tiny_net(2), seeds=(0,))
    assert {b.state for b in given.values()} == {"passed"} and given["all"].reason == "all three tests"


def test_one_level_that_keeps_too_much_fails_the_weights():
    net = tiny_net()
    def look(n): return noise(seed=1) if torch.equal(n.stages.stem[0].weight, net.stages.stem[0].weight) else noise(seed=2)
    given = badges(look, net, GROUPS)
    assert given["weights"].state == "failed" and "keeps 1.00" in given["weights"].reason and f"limit is {LIMIT}" in given["weights"].reason


def test_not_tested_says_why():
    def look(net): return seen(net, 0)
    given = badges(look, tiny_net(), GROUPS)
    assert given["labels"].state == given["repeat"].state == given["all"].state == "not tested" and given["weights"].state == "passed"
    assert given["all"] == Badge("all", "not tested", "labels, repeat")
    few = badges(look, tiny_net(), np.arange(24) % (FEWEST - 1))
    assert {b.state for b in few.values()} == {"not tested"} and "at least 8" in few["weights"].reason
    flat = badges(lambda net: np.ones((24, 6, 6)), tiny_net(), GROUPS)
    assert {b.state for b in flat.values()} == {"not tested"} and "blank" in str(flat["all"])
    same = badges(lambda net: noise(1).repeat(24, 0), tiny_net(), GROUPS)
    assert "same for every picture" in same["all"].reason
