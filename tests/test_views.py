"Views: what anatomy allows, shares of mixed pictures and labels, means over views, and resumes that are exact."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_loop import Leave, equal
from test_training import bright_or_dark, small
from torch.nn import functional as F

from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import Info, Task
from medxfer_nb.loop import Callback
from medxfer_nb.training import augment, fit, predict_proba
from medxfer_nb.views import AnatomyAware, CutMix, MixUp, preview, tta


class Record(Callback):
    "Keeps the batches and targets of a training."
    def __init__(self): self.x, self.y = [], []
    def __repr__(self): return "record"
    def before_batch(self, loop): self.x.append(loop.x); self.y.append(loop.y)


# --- mixed pictures ---


def batches(mix=None):
    "The batches and targets of one epoch, with and without a mix; one chance for both."
    record = Record()
    fit(small(), bright_or_dark(), 1, augmented=False, callbacks=[*([mix] if mix else []), record])
    return record.x, record.y


def test_mixup_is_the_line_between_two_pictures_and_their_labels():
    (plain, *_), (y, *_) = batches()
    (x, *_), (soft, *_) = batches(MixUp(alpha=1))
    own, hot = None, F.one_hot(y, 2).float()
    for i in range(len(x)):
        share = ((x[i] - plain[i - 1]) * (plain[i] - plain[i - 1])).sum() / (plain[i] - plain[i - 1]).square().sum()
        own = share if own is None else own
        torch.testing.assert_close(share, own, atol=1e-4, rtol=0)
        torch.testing.assert_close(soft[i], own * hot[i] + (1 - own) * hot[i - 1], atol=1e-4, rtol=0)
        torch.testing.assert_close(x[i], own * plain[i] + (1 - own) * plain[i - 1], atol=1e-4, rtol=0)
    assert 0 < own < 1


def test_cutmix_share_of_the_label_is_the_share_of_the_area():
    (plain, *_), (y, *_) = batches()
    (x, *_), (soft, *_) = batches(CutMix())
    hot, seen = F.one_hot(y, 2).float(), 0
    for i in range(len(x)):
        pasted = (x[i] != plain[i]).any(0)
        assert (x[i][:, pasted] == plain[i - 1][:, pasted]).all()
        if (plain[i] != plain[i - 1]).any(0).all():  # equal pixels hide where the rectangle was
            seen, share = seen + 1, pasted.float().mean()
            torch.testing.assert_close(soft[i], (1 - share) * hot[i] + share * hot[i - 1])
    assert seen


def test_mixing_takes_several_labels_and_mixed_labels():
    ds, record = bright_or_dark(kind="multilabel"), Record()
    fit(small(), ds, 1, callbacks=[MixUp(), CutMix(), record])
    assert all(y.dtype == torch.float32 and y.shape == (len(x), 2) for x, y in zip(record.x, record.y))


# --- views ---


def liver(**info): return replace(bright_or_dark(), info=replace(Info("liver", "", "ultrasound (B-mode)", "", ""), **info))


def test_anatomy_decides_what_may_change():
    assert not AnatomyAware.of(liver()).flip and AnatomyAware.of(liver(flip=True)).flip
    assert AnatomyAware.of(liver()).turn <= 10 < AnatomyAware.of(liver(modality="light microscopy")).turn
    names = dict(pathmnist=180, dermamnist=180, breastmnist=5, chestmnist=5, octmnist=5, organamnist=5)
    assert {n: AnatomyAware.of(liver(name=n, modality="MedMNIST")).turn for n in names} == names
    assert "not known" in AnatomyAware.of(liver(modality="unknown")).why
    assert "Hounsfield" in AnatomyAware.of(liver(modality="CT")).why or "calibrated" in AnatomyAware.of(liver(modality="CT")).why


@pytest.mark.parametrize("classes", [("kidney-left", "kidney-right"), ("Left lung", "heart")])
def test_a_class_that_names_a_side_forbids_mirrors(classes):
    ds = replace(liver(flip=True), tasks={"bright": Task("bright", "binary", classes)})
    assert not AnatomyAware.of(ds).flip and "side" in str(AnatomyAware.of(ds))


def test_without_strength_the_views_are_the_pictures():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    still = AnatomyAware(flip=False, turn=0, contrast=0, move=0, zoom=0)
    torch.testing.assert_close(still(x, torch.Generator()), x, atol=1e-5, rtol=1e-4)


def test_fit_takes_the_policy_and_its_checkpoint_knows_the_settings(tmp_path):
    views, (seen, other) = AnatomyAware(True, 20, 0.2), (Record(), Record())
    fit(small(), bright_or_dark(), 1, augmented=views, callbacks=[seen], checkpoint=tmp_path / "c")
    fit(small(), bright_or_dark(), 1, augmented=lambda x, chance: augment(x, chance, True, 20, contrast=0.2), callbacks=[other])
    assert all(map(torch.equal, seen.x, other.x))
    with pytest.raises(MedxferError, match="another training"):
        fit(small(), bright_or_dark(), 1, augmented=AnatomyAware(True, 21, 0.2), callbacks=[seen], checkpoint=tmp_path / "c")


def test_preview_shows_and_says_what_may_change(capsys):
    preview(liver(), 3, n=2)
    preview(replace(liver(), images=np.repeat(liver().images[..., None], 3, 3)), 0)
    assert "never mirrored" in capsys.readouterr().out
    with pytest.raises(MedxferError, match="rows 0 to 23"): preview(liver(), 24)


def test_tta_without_strength_is_predict_proba():
    ds, net = bright_or_dark(), small()
    still = AnatomyAware(flip=False, turn=0, contrast=0, move=0, zoom=0)
    np.testing.assert_allclose(tta(net, ds, policy=still), predict_proba(net, ds), atol=1e-4)
    np.testing.assert_allclose(tta(net, ds, beta=1), predict_proba(net, ds), atol=1e-6)


def test_tta_is_a_mean_that_its_seed_repeats():
    ds, net, policy = bright_or_dark(70), small(), AnatomyAware(flip=True, turn=30, contrast=0.3)
    p = tta(net, ds, n=3, beta=0, seed=4, policy=policy)
    np.testing.assert_array_equal(p, tta(net, ds, n=3, beta=0, seed=4, policy=policy))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    chance = torch.Generator().manual_seed(4)
    with torch.inference_mode():
        each = [torch.cat([net(policy(net.batch(ds.images[r]), chance)).softmax(1) for r in (slice(0, 35), slice(35, 70))]) for _ in range(3)]
    np.testing.assert_allclose(p, torch.stack(each).mean(0), atol=1e-6)
    assert not np.allclose(p, tta(net, ds, n=3, beta=0, seed=5, policy=policy))


# --- kills and wrong uses ---


WAYS = {"MixUp": dict(callbacks=[MixUp()]), "CutMix": dict(callbacks=[CutMix()]), "AnatomyAware": dict(augmented=AnatomyAware(True, 20, 0.2)),
        "all": dict(augmented=AnatomyAware(True, 20, 0.2), callbacks=[MixUp(), CutMix()])}


@pytest.mark.parametrize("stop", [2, 3, 5])  # after an epoch, in the middle of the second one, near the end of it
@pytest.mark.parametrize("name", WAYS)
def test_resumed_in_the_middle_each_goes_on_exactly(tmp_path, name, stop):
    def train(at, **options):
        way = {"callbacks": []} | WAYS[name]
        return fit(small(), bright_or_dark(), 3, batch_size=12, **way | dict(callbacks=[*way["callbacks"], Leave(at)]), **options)
    with pytest.raises(KeyboardInterrupt): train(stop, checkpoint=tmp_path / "c", every=0)
    resumed, whole = train(99, checkpoint=tmp_path / "c", every=0), train(99)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net)


def test_a_mix_can_serve_two_trainings():
    mix = MixUp()
    a, b = (fit(small(), bright_or_dark(), 2, callbacks=[mix]) for _ in range(2))
    assert a.history.equals(b.history) and equal(a.net, b.net)


@pytest.mark.parametrize("make", [lambda: MixUp(0), lambda: MixUp(-1), lambda: CutMix(math.nan), lambda: CutMix(math.inf)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(MedxferError, match="=.*above 0"): make()


@pytest.mark.parametrize("wrong", [dict(n=0), dict(beta=-0.1), dict(beta=1.1)])
def test_impossible_means_are_refused(wrong):
    with pytest.raises(MedxferError, match="n must be"): tta(small(), bright_or_dark(), **wrong)
