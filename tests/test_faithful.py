"Counts against other implementations, controls that must not win, and what a toy network is known to use."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from sklearn.metrics import jaccard_score
from torch import nn

import medxfer_nb.faithful as faithful
from medxfer_nb.core import MedxferError, show
from medxfer_nb.faithful import MEASURES, centre_blob, controls, energy_inside, overlap, pixel_precision, pointing_hits, removal, road
from medxfer_nb.measures import average_precision
from medxfer_nb.metrics import Score


def drawn(n=20, side=9, seed=0):
    "Random maps, some negative, and random masks."
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, side, side)), rng.random((n, side, side)) < 0.3


def test_counts_by_hand():
    maps, masks = drawn()
    for i, (m, k) in enumerate(zip(maps, masks)):
        r, c = np.unravel_index(m.argmax(), m.shape)
        assert pointing_hits(maps, masks)[i] == k[r, c]
        assert energy_inside(maps, masks)[i] == pytest.approx(m[(m > 0) & k].sum() / m[m > 0].sum())
        assert overlap(maps, masks, 0.3)[i] == pytest.approx(jaccard_score(k.ravel(), (m > 0.3 * m.max()).ravel()))


def test_pixel_precision_is_the_average_precision_of_lesson_measures():
    maps, masks = drawn()
    other = [average_precision(k.ravel(), 1 / (1 + np.exp(-m.ravel()))) for m, k in zip(maps, masks)]
    np.testing.assert_allclose(pixel_precision(maps, masks), other, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 50))
def test_scale_changes_no_measure_and_truth_is_perfect(seed, scale):
    maps, masks = drawn(4, 7, seed)
    masks[:, 0, 0] = True
    for f in MEASURES.values():
        np.testing.assert_allclose(f(maps * scale, masks), f(maps, masks), atol=1e-9)
        assert (f(masks.astype(float), masks) == 1).all()


def test_a_blank_map_is_a_miss_and_a_flat_map_knows_the_area_only():
    masks = drawn()[1]
    blank, flat = -np.ones(masks.shape), np.ones(masks.shape)
    assert not any(f(blank, masks).any() for f in (pointing_hits, energy_inside, overlap))
    for f in (energy_inside, overlap, pixel_precision): np.testing.assert_allclose(f(flat, masks), masks.mean((1, 2)))


@pytest.mark.parametrize("f", MEASURES.values())
def test_masks_that_do_not_fit(f):
    maps, masks = drawn()
    with pytest.raises(MedxferError, match="picture 0 is empty"): f(maps, masks * 0)
    with pytest.raises(MedxferError, match="evidence"): f(maps, masks[:, :5])
    with pytest.raises(MedxferError, match="NaN"): f(maps * np.nan, masks)


@pytest.mark.parametrize("shape", [(5, 32, 32), (5, 32, 32, 3)])
def test_controls_know_picture_and_place_but_no_network(shape):
    pictures = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    known = np.zeros((7, 64, 64)); known[:, 10:20, 40:50] = 1
    found = controls(pictures, known)
    assert list(found) == ["random", "blob", "bright", "edges", "where lesions lay"] and all(m.shape == (5, 32, 32) for m in found.values())
    assert found["where lesions lay"][0].argmax() in np.flatnonzero(known[0, ::2, ::2])
    assert np.array_equal(found["random"], controls(pictures)["random"]) and not np.array_equal(found["random"], controls(pictures, seed=1)["random"])
    assert pointing_hits(found["blob"], centre_blob((5, 32, 32)) > 0.9).all() and len(controls(pictures)) == 4


def test_edges_lie_on_edges():
    pictures = np.zeros((1, 64, 64), np.uint8); pictures[:, :, 32:] = 200
    assert abs(controls(pictures)["edges"][0].argmax(1) - 31.5).max() <= 1


def lesions(rng, patients=15, each=2, side=12):
    "Masks with a square at a random place, and the patients."
    masks = np.zeros((patients * each, side, side), bool)
    for m in masks: m[(r := rng.integers(0, side - 4)):r + 4, (c := rng.integers(0, side - 4)):c + 4] = True
    return masks, np.repeat(np.arange(patients), each)


def test_the_table_finds_a_pointer_and_gives_blind_maps_no_win():
    wins = dict(pointer=0, blind=0)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        masks, groups = lesions(rng)
        rivals = dict(random=rng.random(masks.shape), blob=centre_blob(masks.shape))
        maps = dict(pointer=masks + 0.5 * rng.normal(size=masks.shape), blind=rng.random(masks.shape))
        table = faithful.score_maps(maps, masks, rivals, groups, dict(precision=pixel_precision))
        for name in wins: wins[name] += faithful.beats(table.loc[name].iloc[1])
    assert wins["pointer"] == 10 and wins["blind"] <= 1, wins


def test_each_measure_names_its_best_control():
    masks = np.zeros((6, 16, 16), bool); masks[:, 6:10, 6:10] = True
    rivals = dict(blob=centre_blob(masks.shape), corner=np.eye(16)[None].repeat(6, 0) * (np.arange(16) < 2))
    table = faithful.score_maps(dict(truth=masks * 1.0), masks, rivals)
    assert list(table) == [t for m in MEASURES for t in (m, f"{m} - blob")]
    assert table.loc["truth", "precision - blob"].value == pytest.approx(1 - pixel_precision(rivals["blob"], masks).mean())


def test_beats_needs_an_interval():
    def s(low): return Score(0.3, low, 0.5, 9, "")
    assert [faithful.beats(s(low)) for low in (0.01, 0.0, -0.1, None)] == [True, False, False, False]


class Reads(nn.Module):
    "A network whose answer is the mean of a square of its picture."
    def __init__(self, side=16, gain=4.0):
        super().__init__()
        self.where, self.gain = nn.Parameter(torch.zeros(side, side)), gain
        with torch.no_grad(): self.where[3:7, 8:12] = 1 / 16

    def forward(self, x):
        z = self.gain * (x.mean(1) * self.where).sum((1, 2))
        return torch.stack([-z, z], 1)


def scene(n=6, seed=0):
    "Pictures that are bright in the square that the network reads, its map, and noise maps."
    torch.manual_seed(seed)
    net, x = Reads(), 0.2 * torch.randn(n, 3, 16, 16)
    x[:, :, 3:7, 8:12] += 1
    return net, x, (net.where.detach() > 0).numpy()[None].repeat(n, 0) * 1.0, np.random.default_rng(seed).random((n, 16, 16))


@pytest.mark.parametrize("insert", [False, True])
def test_curves_begin_and_end_at_the_picture_and_its_blur(insert):
    net, x, truth, _ = scene()
    curve = removal(net, x, truth, 1, (0, 1 / 16, 1), insert)
    with torch.no_grad(): whole, = (net(x).softmax(1)[:, 1].numpy(),)
    ends = curve[:, [-1, 0]] if insert else curve[:, [0, -1]]
    np.testing.assert_allclose(ends[:, 0], whole, atol=1e-6)
    assert (ends[:, 1] < whole).all()
    if not insert: assert (curve[:, 1] < 0.9 * whole).all()          # 16 of 256 pixels: just the square


def test_what_is_used_falls_first_and_rises_first():
    net, x, truth, noise = scene()
    def mean(m, insert): return removal(net, x, m, 1, insert=insert).mean(1)
    assert (mean(truth, False) < mean(noise, False)).all() and (mean(truth, True) > mean(noise, True)).all()
    assert (road(net, x, truth, 1) > road(net, x, noise, 1)).all() and (road(net, x, -truth, 1) < 0).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 1.0])
def test_ties_are_broken_by_lot_so_that_a_flat_map_loses_the_share_that_was_asked_for(value):
    rank = faithful._ranks(np.full((3, 8, 8), value))
    assert ((rank > 0.75).sum((1, 2)) == 16).all() and not (rank[0] == rank[1]).all()
    maps = drawn()[0]
    assert (np.argsort(maps.reshape(20, -1)) == np.argsort(faithful._ranks(maps).reshape(20, -1))).all()


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_road_is_grad_cams_on_ranks_and_leaves_everything_as_it_was():
    net, x, _, noise = scene()
    net.train()
    before = torch.get_rng_state()
    mine = road(net, x, noise, 1, shares=(0.1, 0.3))
    assert torch.equal(torch.get_rng_state(), before) and net.training and torch.equal(x, scene()[1])
    torch.manual_seed(0)
    theirs = ROADCombined([90, 70])(x, faithful._ranks(noise), [ClassifierOutputSoftmaxTarget(1)] * 6, net)
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
    removal(net, x, noise, 1)
    assert net.training and net.where.grad is None


def test_maps_of_another_side_are_refused():
    net, x, truth, _ = scene()
    for f in (removal, road):
        with pytest.raises(MedxferError, match=r"maps.evidence\(\)"): f(net, x, truth[:, ::2], 1)


def test_show_rows_draws_and_describes(monkeypatch):
    shown = []
    monkeypatch.setattr(faithful, "show", lambda fig, alt: shown.append((len(fig.axes), alt)) or show(fig, alt))
    masks = np.zeros((3, 16, 16), bool); masks[0, 4:9, 4:9] = True
    faithful.show_rows(np.zeros((3, 16, 16), np.uint8), dict(one=np.ones((3, 4, 4)), none=-np.ones((3, 4, 4))), masks, "Two rows")
    faithful.show_rows(np.zeros((1, 16, 16), np.uint8), dict(one=np.ones((1, 4, 4))))
    assert shown[0][0] == 10 and "Two rows: 3 pictures" in shown[0][1] and "one, none" in shown[0][1]
