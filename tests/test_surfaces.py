"Outlines and sizes: against brute force, MONAI and scikit-image; ellipses of known axes; agreement against its formulas; the ends of each scale."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import HausdorffDistanceMetric, compute_hausdorff_distance, compute_iou, compute_surface_dice
from scipy import ndimage as ndi
from scipy.stats import norm
from skimage.measure import label, regionprops
from skimage.metrics import hausdorff_distance
from skimage.segmentation import find_boundaries

from medxfer_nb import surfaces
from medxfer_nb.core import MedxferError
from medxfer_nb.surfaces import agreement, boundary_f1, dice, hausdorff95, iou, longest_diameter, measure, outline_scores, show_agreement

SQUARE, MOVED, NOTHING, UNKNOWN = np.zeros((4, 1, 12, 9))
SQUARE[0, 3:7, 2:6] = MOVED[0, 3:7, 3:7] = 1
UNKNOWN[:] = 255
FOUR = [dice, iou, lambda p, m: boundary_f1(p, m, 0.5), lambda p, m: hausdorff95(p, m, 0.5)]


def masks_of(seed, a=0.3, b=0.3, shape=(4, 13, 11)):
    "Random drawn and true masks; neither is ever empty."
    rng = np.random.default_rng(seed)
    drawn, true = rng.random(shape) < a, rng.random(shape) < b
    drawn[:, 2, 3] = true[:, 4, 5] = True
    return drawn, true


def monai(f, drawn, true, *args, **options):
    "One value a picture; MONAI warns about its own deprecated arguments and about empty masks."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*(torch.tensor(np.asarray(m) > 0)[:, None] for m in (drawn, true)), *args, **options)[:, 0].numpy()


def gaps(drawn, true, mm):
    "Distances of edge pixels by brute force, edges from scikit-image."
    a, b = (np.argwhere(find_boundaries(np.pad(m, 1), mode="inner")) * mm for m in (drawn, true))
    d = np.linalg.norm(a[:, None] - b, axis=-1)
    return d.min(1), d.min(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.9), st.floats(0, 0.9))
def test_overlaps_are_their_formulas(seed, a, b):
    drawn, true = masks_of(seed, a, b)
    common, both, joint = (drawn & true).sum((1, 2)), drawn.sum((1, 2)) + true.sum((1, 2)), (drawn | true).sum((1, 2))
    np.testing.assert_allclose(dice(drawn, true), 2 * common / both, atol=1e-6)
    np.testing.assert_allclose(iou(drawn, true), common / joint, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0.1, 3), st.floats(0, 4))
def test_boundary_numbers_are_brute_force(seed, a, b, mm, tolerance):
    drawn, true = masks_of(seed, a, b)
    far, near = hausdorff95(drawn, true, mm), boundary_f1(drawn, true, mm, tolerance)
    for i, (there, back) in enumerate(gaps(*pair, mm) for pair in zip(drawn, true)):
        assert far[i] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
        precision, recall = np.mean(there <= tolerance * (1 + 1e-9)), np.mean(back <= tolerance * (1 + 1e-9))
        assert near[i] == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0)


@pytest.mark.parametrize("seed", range(5))
def test_boundary_numbers_are_monai_s_and_scikit_image_s(seed):
    (drawn, true), mm = masks_of(seed), np.array([0.5, 1, 2, 0.7])
    own = [[float(s)] * 2 for s in mm]
    np.testing.assert_allclose(hausdorff95(drawn, true, mm), monai(compute_hausdorff_distance, drawn, true, percentile=95, spacing=own), rtol=1e-5)
    for d, t, s in zip(drawn, true, mm):
        there, back = surfaces._gaps(d, t, s)
        edges = [find_boundaries(np.pad(m, 1), mode="inner") for m in (d, t)]
        assert max(there.max(), back.max()) == pytest.approx(s * hausdorff_distance(*edges))
        surface_dice = monai(compute_surface_dice, d[None], t[None], [1.1 * s], spacing=float(s))[0]
        precision, recall = np.mean(there <= 1.1 * s), np.mean(back <= 1.1 * s)                  # surface Dice pools what F1 averages
        assert surface_dice == pytest.approx((len(there) * precision + len(back) * recall) / (len(there) + len(back)), abs=1e-6)
        assert boundary_f1(d[None], t[None], s, 1.1 * s)[0] == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_list_of_spacings_is_one_a_picture_here_and_one_an_axis_in_monai():
    drawn, true = (np.repeat(m, 2, 0) for m in (MOVED, SQUARE))
    assert hausdorff95(drawn, true, [1.0, 3.0]).tolist() == [1, 3]
    assert monai(compute_hausdorff_distance, drawn, true, percentile=95, spacing=[1.0, 3.0]).tolist() == [3, 3]


def test_monai_leaves_misses_out_of_its_mean_and_we_do_not():
    assert monai(compute_hausdorff_distance, NOTHING, SQUARE).tolist() == [np.inf]
    assert np.isnan(monai(compute_hausdorff_distance, NOTHING, SQUARE, percentile=95)).all()
    assert np.isnan(monai(compute_hausdorff_distance, SQUARE, NOTHING, percentile=95)).all()
    assert np.isnan(monai(compute_iou, SQUARE, NOTHING)).all()
    mean = HausdorffDistanceMetric(percentile=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean(*(torch.tensor(np.stack(m)) for m in ([MOVED, NOTHING], [SQUARE, SQUARE])))
    assert mean.aggregate().item() == 1
    assert hausdorff95(np.concatenate([MOVED, NOTHING]), np.concatenate([SQUARE, SQUARE]), 1).mean() == (1 + np.hypot(12, 9)) / 2


@pytest.mark.parametrize("f", FOUR)
def test_without_a_true_lesion_there_is_no_number(f):
    for truth in (NOTHING, UNKNOWN):
        for drawn in (SQUARE, NOTHING): assert np.isnan(f(drawn, truth)).all()


def test_nothing_drawn_is_the_worst_of_each_scale():
    assert [f(NOTHING, SQUARE)[0] for f in FOUR] == [0, 0, 0, 0.5 * np.hypot(12, 9)]
    corner, other = np.zeros((2, 1, 12, 9))
    corner[0, 0, 0] = other[0, -1, -1] = 1
    assert hausdorff95(corner, other, 0.5) < hausdorff95(NOTHING, SQUARE, 0.5)               # no drawing is farther than none


def test_above_one_half_is_drawn():
    p = SQUARE * np.array([0.5, 0.51, 0.499])[:, None, None]
    assert dice(p, np.repeat(SQUARE, 3, 0)).tolist() == [0, 1, 0] and measure(p, 1)["pieces"].tolist() == [0, 1, 0]


def test_one_pixel_a_lesion_on_the_border_and_a_full_picture():
    pixel, border = np.zeros((2, 1, 12, 9))
    pixel[0, 5, 5] = border[0, :4, :3] = 1
    for mask in (pixel, border, np.ones((1, 12, 9))): assert [f(mask, mask)[0] for f in FOUR] == [1, 1, 1, 0]
    shifted = np.roll(pixel, 3, axis=1)
    assert hausdorff95(pixel, shifted, 0.5) == 1.5 and boundary_f1(pixel, shifted, 0.5, 1.4) == 0 and boundary_f1(pixel, shifted, 0.5, 1.5) == 1
    assert hausdorff95(np.ones((1, 12, 9)), border, 1) == np.percentile(gaps(np.ones((12, 9), bool), border[0] > 0, 1.0)[0], 95)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_symmetric_in_the_masks_and_linear_in_millimetres(seed, mm):
    drawn, true = masks_of(seed)
    for f in FOUR: np.testing.assert_allclose(f(drawn, true), f(true, drawn), atol=1e-6)
    np.testing.assert_allclose(hausdorff95(drawn, true, mm), mm * hausdorff95(drawn, true, 1))
    np.testing.assert_allclose(boundary_f1(drawn, true, mm, 1.5 * mm), boundary_f1(drawn, true, 1, 1.5))
    np.testing.assert_allclose(dice(drawn, true), 2 * (u := iou(drawn, true)) / (1 + u), atol=1e-6)


def test_a_distance_equal_to_the_tolerance_is_inside():
    for mm in (0.1, 0.7, 1.1, 0.3):
        a, b = np.zeros((2, 1, 12, 12))
        a[0, 5, 2] = b[0, 5, 5] = 1
        assert boundary_f1(a, b, mm, tolerance=round(3 * mm, 6)) == 1
    assert boundary_f1(a, b, 2 / 3) == 1 and boundary_f1(a, b, 0.67) == 0                  # 2 mm where nothing else is said


def ellipse(a, b, turn, at, n=56, fine=8):
    "The share of each pixel that an ellipse covers, centre `at` (row, column)."
    g = (np.arange(n * fine) + 0.5) / fine - 0.5
    x, y = g - at[1], (g - at[0])[:, None]
    along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    return ((along / a) ** 2 + (across / b) ** 2 < 1).reshape(n, fine, n, fine).mean((1, 3))


@settings(max_examples=40, deadline=None)
@given(st.floats(4, 22), st.floats(1, 2.5), st.floats(0, np.pi), st.floats(-0.5, 0.5), st.floats(0.3, 2))
def test_an_ellipse_gives_its_axes_within_one_pixel(a, ratio, turn, shift, mm):
    b = a / ratio
    cover = ellipse(a, b, turn, (27.5 + shift, 27.5 - shift / 2))[None]
    (_, mask), (_, soft) = (next(measure(m, mm).iterrows()) for m in (cover > 0.5, cover))
    assert abs(mask["diameter_mm"] - 2 * a * mm) < mm and abs(soft["diameter_mm"] - 2 * a * mm) < 0.5 * mm
    assert mask["area_mm2"] == pytest.approx((cover > 0.5).sum() * mm**2)

    def flat(long, short): return np.sqrt(max(1 - (short / long) ** 2, 0))

    assert flat(2 * a - 1, 2 * b + 1) - 1e-9 <= mask["eccentricity"] <= flat(2 * a + 1, 2 * b - 1)
    assert (a - 0.5) * (b - 0.5) / ((a + 0.5) * (b + 0.5)) <= mask["solidity"] <= 1                    # an ellipse is convex: 1, less a staircase


def test_measures_are_scikit_image_s():
    drawn = ellipse(14, 6, 0.7, (27, 28)) > 0.5
    drawn[20:24, 30:50] = True
    one, two = measure(drawn[None], 0.5).iloc[0], regionprops(drawn.astype(int), spacing=0.5)[0]
    assert one["eccentricity"] == pytest.approx(two.eccentricity) and one["solidity"] == pytest.approx(two.solidity)
    assert one["area_mm2"] == pytest.approx(two.area) and two.feret_diameter_max - 0.5 <= one["diameter_mm"] <= two.feret_diameter_max + 1e-9


def test_a_row_of_pixels_is_as_long_as_it_is():
    row, pixel = np.zeros((2, 1, 9, 9))
    row[0, 4, 1:8] = pixel[0, 4, 4] = 1
    assert measure(row, 2)["diameter_mm"][0] == 14 and measure(pixel, 2)["diameter_mm"][0] == 2 and measure(pixel, 2)["area_mm2"][0] == 4
    assert measure(row, 1)["solidity"][0] == 1 and measure(pixel, 1)["eccentricity"][0] == 0 < measure(row, 1)["eccentricity"][0]
    assert measure(np.ones((1, 9, 9)), 1)["diameter_mm"][0] == pytest.approx(np.hypot(9, 8))


def test_only_the_largest_piece_is_measured_and_all_are_counted():
    alone = ellipse(9, 6, 0.4, (30, 30))[None]
    both = alone.copy()
    both[0, 2:5, 2:5] = 0.9
    a, b = measure(alone, 1).iloc[0], measure(both, 1).iloc[0]
    assert a.drop("pieces").equals(b.drop("pieces")) and (a["pieces"], b["pieces"]) == (1, 2) == (1, label(both[0] > 0.5).max())


def test_nothing_drawn_and_unknown_masks_measure_nothing():
    rows = measure(np.concatenate([SQUARE, NOTHING, UNKNOWN]), [1, 2, 3])
    assert rows["pieces"].tolist() == [1, 0, 0] and rows.iloc[1:].drop(columns="pieces").isna().all(axis=None) and not rows.iloc[0].isna().any()


def test_agreement_is_bland_and_altman_s_formulas():
    truth, errors = np.linspace(10, 40, 300), norm.ppf((np.arange(300) + 0.5) / 300)          # normal without the luck of a draw
    estimate = truth + 0.7 + 1.5 * np.random.default_rng(0).permutation(errors)
    d, found = estimate - truth, agreement(truth, estimate)
    assert found.bias.value == pytest.approx(d.mean()) and found.mae.value == pytest.approx(abs(d).mean())
    assert [found.low.value, found.high.value] == pytest.approx([d.mean() + s * 1.96 * d.std(ddof=1) for s in (-1, 1)])
    se = d.std(ddof=1) * np.sqrt(1 / 300 + 1.96**2 / (2 * 299))
    for s in (found.low, found.high): assert (s.high - s.low) / 2 == pytest.approx(1.96 * se, rel=0.15)
    assert (found.bias.high - found.bias.low) / 2 == pytest.approx(1.96 * d.std(ddof=1) / np.sqrt(300), rel=0.1)


def test_pictures_of_one_patient_widen_the_intervals():
    rng = np.random.default_rng(1)
    groups = np.repeat([f"p{i}" for i in range(30)], 6)
    truth = rng.uniform(10, 40, 180)
    estimate = truth + np.repeat(rng.normal(0, 2, 30), 6) + rng.normal(0, 0.3, 180)
    by_patient, by_picture = agreement(truth, estimate, groups), agreement(truth, estimate)
    for a, b in zip(by_patient[:4], by_picture[:4]): assert a.value == b.value and a.high - a.low > 1.7 * (b.high - b.low)
    assert "30 patients" in by_patient.high.method


def test_what_was_not_measured_is_counted():
    truth, estimate = np.array([10, 20, 30, np.nan, 25, np.nan]), np.array([11, np.nan, 32, 9, 24, np.nan])
    found = agreement(truth, estimate, n_boot=200)
    assert found.missed == 1 and found.bias.n == 3 and found.bias.value == pytest.approx(2 / 3)
    with pytest.raises(MedxferError, match="1 pictures have both"): agreement(truth[1:4], np.array([np.nan, 9, 9]))
    with pytest.raises(MedxferError, match="one entry a picture"): agreement(truth, estimate, groups=[1, 2])


def test_show_agreement_says_in_words_what_it_shows(monkeypatch):
    said = []
    monkeypatch.setattr(surfaces, "show", lambda fig, alt: said.append((fig.axes[0].get_title(loc="left"), fig.axes[0].get_xlabel(), alt)))
    show_agreement(np.array([10.0, 20, 30, 40]), np.array([11.0, 21, np.nan, 43]), unit="cm", what="length")
    (title, label_, alt), = said
    assert title == "length, 3 pictures, 1 not measured" and label_ == "truth (cm)" and "Bias +1.7" in alt and "1 were not measured" in alt


def test_all_scores_at_once():
    rng = np.random.default_rng(2)
    masks, groups, mm = np.zeros((24, 20, 20), np.uint8), np.repeat(np.arange(8), 3), rng.uniform(0.5, 2, 24)
    for i in range(16): masks[i, 4:4 + (k := rng.integers(4, 9)), 5:5 + k] = 1
    p = np.roll(masks, 1, axis=2) * 0.9
    p[3], p[20, :3, :3], masks[23] = 0, 1, 255                                    # one missed, one false alarm, one unknown
    scores = outline_scores(p, masks, mm, groups, tolerance=1.0)
    assert list(scores) == ["Dice", "IoU", "boundary F1 at 1 mm", "HD95 (mm)", "lesions missed", "drawn without a lesion"]
    lesion = np.arange(24) < 16
    for s, v in zip(scores.values(), (dice(p, masks), iou(p, masks), boundary_f1(p, masks, mm, 1), hausdorff95(p, masks, mm))):
        assert s.n == 16 and s.low < s.value < s.high and s.value == pytest.approx(v[lesion].mean()) and np.isnan(v[~lesion]).all()
    assert scores["lesions missed"].value == 1 / 16 and (scores["drawn without a lesion"].value, scores["drawn without a lesion"].n) == (1 / 7, 7)


def test_a_set_without_lesions_says_so():
    scores = outline_scores(np.concatenate([SQUARE, NOTHING]), np.concatenate([NOTHING, NOTHING]), 1.0)
    assert str(scores["Dice"]) == "not estimable (no such picture)" == str(scores["lesions missed"]) and scores["drawn without a lesion"].value == 0.5


@pytest.mark.parametrize("f, words", [
    (lambda: dice(SQUARE, 255 * SQUARE), "divide masks of 0 and 255 by 255"),
    (lambda: dice(SQUARE, 0.5 * SQUARE), "other values than 0 and 1"),
    (lambda: iou(8 * SQUARE - 4, SQUARE), r"sigmoid\(logits\)"),
    (lambda: iou(np.nan * SQUARE, SQUARE), "numbers from 0 to 1"),
    (lambda: dice(SQUARE, SQUARE[:, :5]), "must be equal"),
    (lambda: dice(SQUARE[0], SQUARE[0]), r"must be \(pictures, height, width\)"),
    (lambda: hausdorff95(SQUARE, SQUARE, [1, 2]), r"spacing has the shape \(2,\)"),
    (lambda: boundary_f1(SQUARE, SQUARE, -1), "not above 0"),
    (lambda: measure(SQUARE, np.nan), "not above 0"),
    (lambda: measure(SQUARE, np.inf), "not above 0"),
    (lambda: measure(255 * SQUARE, 1), "divide a mask of 0 and 255 by 255"),
])
def test_wrong_input_is_named(f, words):
    with pytest.raises(MedxferError, match=words): f()


def test_nothing_is_changed_in_place():
    p, masks = np.concatenate([SQUARE, NOTHING]), np.concatenate([MOVED, UNKNOWN])
    before = p.copy(), masks.copy()
    outline_scores(p, masks, 1.0), measure(p, 1.0), measure(masks, 1.0)
    np.testing.assert_array_equal(p, before[0])
    np.testing.assert_array_equal(masks, before[1])


def test_the_longest_diameter_is_the_one_that_is_measured():
    rng = np.random.default_rng(0)
    for p in ndi.gaussian_filter(rng.random((5, 40, 40)), (0, 3, 3)) * 1.0:
        p = np.clip((p - p.min()) / np.ptp(p), 0, 1)
        ends = longest_diameter(p)
        assert np.hypot(*(ends[1] - ends[0])) == pytest.approx(measure(p[None], 1)["diameter_mm"][0])
    assert longest_diameter(np.zeros((9, 9))) is None
