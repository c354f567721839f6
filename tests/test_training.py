"Training: views, frozen parts, answers, and a resume that is exact."
import numpy as np
import pandas as pd
import pytest
import torch
from test_loop import Leave, equal

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.loop import Callback
from medxfer_nb.training import augment, fit, frozen_stages, loss_function, predict_proba


def bright_or_dark(n=24, seed=0, kind="binary"):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = (rng.integers(0, 100, (n, 32, 32)) + 120 * y[:, None, None]).astype(np.uint8)
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", bright=y, dark=1 - y))
    task = Task("bright", kind, ("bright", "dark") if kind == "multilabel" else ("no", "yes"))
    return ImageSet(images, table, {"bright": task}, Info("squares", "squares", "none", "CC0", "here"))


def small(seed=0): return create_model("small_cnn", pretrained=False, num_classes=2, size=32, seed=seed)


def test_it_learns_what_can_be_learnt():
    ds = bright_or_dark()
    assert (fit(small(), ds, 8, lr=3e-3).predict_proba(ds).argmax(1) == ds.target()).all()


def test_a_run_depends_on_its_seed_alone():
    torch.manual_seed(1); a = fit(small(), bright_or_dark(), 2)
    torch.manual_seed(2); b = fit(small(), bright_or_dark(), 2)
    assert a.history.equals(b.history) and equal(a.net, b.net)
    assert not equal(a.net, fit(small(), bright_or_dark(), 2, seed=1).net)


def test_cached_frozen_part_equals_running_it_each_time():
    nets = [small(), small()]
    for net in nets: net.stages[:2].requires_grad_(False)
    quick = fit(nets[0], bright_or_dark(), 3, augmented=False)
    next(nets[1].stages[0].parameters()).requires_grad_(True)  # one weight at rate 0: nothing can be cached, nothing moves
    slow = fit(nets[1], bright_or_dark(), 3, lr=[(nets[1].stages[0].parameters(), 0.0), (nets[1].stages[2:].parameters(), 1e-3),
                                                 (nets[1].head.parameters(), 1e-3)], augmented=False)
    np.testing.assert_allclose(quick.history["loss"], slow.history["loss"], rtol=1e-4)


def test_frozen_stages_counts_from_the_input():
    net = small()
    net.stages[1].requires_grad_(False)
    assert frozen_stages(net) == 0 and frozen_stages(net.requires_grad_(False)) == len(net.stages)


def head_only(dropout=0.0):
    net, calls = small(), []
    net.neck = torch.nn.Sequential(net.neck, torch.nn.Dropout(dropout))
    net.requires_grad_(False).head.requires_grad_(True)
    net.neck.register_forward_hook(lambda *_: calls.append(1))
    return net, calls


@pytest.mark.parametrize(("dropout", "augmented", "calls"), [(0.0, False, 1), (0.5, False, 6), (0.0, True, 6)])
def test_a_frozen_neck_is_asked_once_unless_chance_or_views_change_its_answer(dropout, augmented, calls):
    net, asked = head_only(dropout)
    fit(net, bright_or_dark(), 3, augmented=augmented)              # 24 pictures, batches of 16
    assert len(asked) == calls


@pytest.mark.parametrize("change", [lambda x: x * 0, lambda x: x.zero_()])
def test_a_batch_that_a_callback_changes_is_asked_anew(change):
    class Black(Callback):
        def before_batch(self, loop): loop.x = change(loop.x)
        def after_loss(self, loop): self.features = loop.features

    black, (net, _) = Black(), head_only()
    fit(net, bright_or_dark(), 1, augmented=False, callbacks=[black])
    assert (black.features == 0).all()


def test_a_batch_that_nobody_needs_can_still_be_looked_at_later():
    class Late(Callback):
        def after_loss(self, loop): torch.testing.assert_close(loop.net.neck(loop.x), loop.features)

    net, calls = head_only()
    fit(net, bright_or_dark(), 1, augmented=False, callbacks=[Late()])
    assert len(calls) == 1 + 2                                      # once for all, and twice by the callback


def test_multilabel_rows_do_not_sum_to_one():
    ds = bright_or_dark(kind="multilabel")
    p = fit(small(), ds, 6, lr=3e-3).predict_proba(ds)
    assert ((p > 0.5) == ds.target()).all()


def test_a_last_batch_of_one_picture_is_a_batch():
    for augmented in (True, False): assert np.isfinite(fit(small(), bright_or_dark(25), 1, batch_size=8, augmented=augmented).history["loss"]).all()


def test_rows_without_a_label_are_left_out():
    ds = bright_or_dark()
    ds.table.loc[:3, "bright"] = -1
    assert fit(small(), ds, 1).config["n"] == 20


def test_probabilities_are_rows_of_one_and_leave_the_mode():
    ds, net = bright_or_dark(), small()
    p = predict_proba(net, ds)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert p.shape == (24, 2) and not net.training


def test_augmentation_without_strength_is_nothing_and_flip_is_a_mirror():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    still = augment(x, torch.Generator().manual_seed(0), turn=0, move=0, zoom=0, contrast=0)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=1e-4)
    mirrored = augment(x, torch.Generator().manual_seed(0), flip=True, turn=0, move=0, zoom=0, contrast=0)
    assert {torch.allclose(m, a, atol=1e-4) or torch.allclose(m, a.flip(-1), atol=1e-4) for m, a in zip(mirrored, x)} == {True}


def test_what_cannot_be_trained_is_refused():
    one_class = bright_or_dark().take(np.arange(0, 24, 2))
    with pytest.raises(MedxferError, match="two classes"): fit(small(), one_class, 1)
    with pytest.raises(MedxferError, match="frozen"): fit(small().requires_grad_(False), bright_or_dark(), 1)
    with pytest.raises(MedxferError, match="multitask"): loss_function("regression")
    for classes in (1, 3, 1000):
        wrong = small().reset_classifier(classes)
        with pytest.raises(MedxferError, match=f"has 2 classes, the head has {classes} outputs"): fit(wrong, bright_or_dark(), 1)


def test_a_loss_that_is_no_number_names_the_pictures():
    net = small()
    net.head.register_forward_hook(lambda module, args, out: out * float("nan"))
    ds = bright_or_dark()
    ds.table["id"] = [f"scan {i}" for i in range(24)]
    with pytest.raises(MedxferError, match=r"epoch 1, batch 1 \(pictures scan [\w, .]+\); the weights are finite"): fit(net, ds, 2)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumed_with_views_and_without_it_is_the_same_training(tmp_path, stop, augmented):
    def train(at, **options):
        net = small()
        net.stages[:1].requires_grad_(False)
        return fit(net, bright_or_dark(), 3, batch_size=8, augmented=augmented, callbacks=[Leave(at)], **options)
    with pytest.raises(KeyboardInterrupt): train(stop, checkpoint=tmp_path / "c", every=0)
    resumed, whole = train(99, checkpoint=tmp_path / "c", every=0), train(99)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net)


class See(Callback):
    "Keeps what the head sees and says."
    def __init__(self): self.batches = []
    def before_batch(self, loop): self.batches.append([loop.x, loop.y])
    def after_loss(self, loop): self.batches[-1] += [loop.features, loop.logits]


def test_a_policy_makes_the_views(tmp_path):
    def black(x, generator): return x * 0
    see, net = See(), small()
    run = fit(net, bright_or_dark(), 1, augmented=black, callbacks=[see], checkpoint=tmp_path / "c")
    assert all((x == 0).all() and len(x) == len(y) for x, y, *_ in see.batches) and run.config["augmented"] == "black"
    with pytest.raises(MedxferError, match="another training"): fit(small(), bright_or_dark(), 1, callbacks=[see], checkpoint=tmp_path / "c")


def test_the_usual_views_are_augment_and_mirror_where_the_set_allows_it():
    usual, same, ds = See(), See(), bright_or_dark()
    ds.info = Info("squares", "squares", "none", "CC0", "here", flip=True)
    fit(small(), ds, 1, callbacks=[usual])
    fit(small(), ds, 1, callbacks=[same], augmented=lambda x, generator: augment(x, generator, flip=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(usual.batches, same.batches))


def test_callbacks_see_what_the_head_sees_and_says():
    see, net = See(), small().requires_grad_(False)
    net.head.requires_grad_(True)
    fit(net, bright_or_dark(), 1, lr=0.0, augmented=False, callbacks=[see])
    for x, y, features, logits in see.batches:
        torch.testing.assert_close(net.neck(x), features)  # all stages are frozen, so a batch is their map
        torch.testing.assert_close(net.head(features), logits)
        assert len(y) == len(x)


# --- views that are kept ---


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    return tmp_path


def half_frozen():
    net = small()
    net.stages[:2].requires_grad_(False)
    return net


def passes_of(net):
    "Grows by one for each batch that goes through the first stage."
    passes = []
    net.stages[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_kept_views_are_computed_once_and_drawn_from(cache):
    ds, net = bright_or_dark(), half_frozen()
    passes = passes_of(net)
    run = fit(net, ds, 6, lr=3e-3, views=3)
    assert len(passes) == 3 and len(run.history) == 6 and run.config["views"] == 3
    fit(half_frozen(), ds, 1, views=3)
    assert len(passes) == 3 and (run.predict_proba(ds).argmax(1) == ds.target()).mean() > 0.9


def test_kept_views_differ_and_depend_on_the_seed(cache):
    seen = {}
    class Look(Callback):
        def before_batch(self, loop): seen.setdefault(loop.seed, []).append(loop.x.clone())
    for seed in (0, 1): fit(half_frozen(), bright_or_dark(4), 20, views=2, callbacks=[Look()], seed=seed)
    kinds = {seed: len({tuple(x.flatten().tolist()) for batch in batches for x in batch}) for seed, batches in seen.items()}
    assert kinds == {0: 8, 1: 8} and not torch.equal(seen[0][0].sum(0), seen[1][0].sum(0))


def test_a_training_with_kept_views_resumes_exactly(cache, tmp_path):
    whole, killed = fit(half_frozen(), bright_or_dark(), 4, views=2), half_frozen()
    with pytest.raises(KeyboardInterrupt): fit(killed, bright_or_dark(), 4, views=2, callbacks=[Leave(3)], checkpoint=tmp_path / "c", every=0)
    again = fit(half_frozen(), bright_or_dark(), 4, views=2, callbacks=[Leave(10**6)], checkpoint=tmp_path / "c", every=0)
    assert again.history.equals(whole.history) and equal(again.net, whole.net)


def test_kept_views_without_augmentation_are_an_error():
    with pytest.raises(MedxferError, match="views=3"): fit(small(), bright_or_dark(), 1, augmented=False, views=3)


# --- a pool, of which many trainings draw ---


def test_a_pool_is_computed_once_for_all_draws_and_changes_no_training(cache):
    pool, first = bright_or_dark(), half_frozen()
    passes = passes_of(first)
    for net, rows in ((first, range(8)), (half_frozen(), [5, 2, 9, 20]), (half_frozen(), range(24))):
        shared = fit(net, pool.take(rows), 3, lr=3e-3, augmented=False, pool=pool)
        alone = fit(half_frozen(), pool.take(rows), 3, lr=3e-3, augmented=False)
        np.testing.assert_allclose(shared.history["loss"], alone.history["loss"], rtol=1e-3)
        assert shared.config["pool"] == 24 and "pool" not in alone.config
    assert len(passes) == 1 and len(list((cache / "features").glob("*/manifest.json"))) == 1


def test_a_head_on_a_pool_learns_from_its_own_pictures(cache):
    pool, rows = bright_or_dark(), [7, 0, 3, 12]
    nets = [small().requires_grad_(False) for _ in range(2)]
    for net in nets: net.head.requires_grad_(True)
    shared, alone = (fit(net, pool.take(rows), 5, lr=3e-2, augmented=False, pool=p) for net, p in zip(nets, (pool, None)))
    np.testing.assert_allclose(shared.net.head.weight.detach(), alone.net.head.weight.detach(), atol=1e-5)


def test_kept_views_of_a_pool_are_the_same_for_all_seeds(cache):
    pool, seen = bright_or_dark(4), {}
    class Look(Callback):
        def before_batch(self, loop): seen.setdefault(loop.seed, set()).update(tuple(x.flatten().tolist()) for x in loop.x)
    for seed in (0, 1): fit(half_frozen(), pool, 20, views=2, callbacks=[Look()], seed=seed, pool=pool)
    assert seen[0] == seen[1] and len(seen[0]) == 8


def test_a_pool_without_all_pictures_is_refused(cache):
    ds = bright_or_dark()
    doubled = ds.take([*range(24), 0])
    for pool in (ds.take(range(20)), bright_or_dark(seed=1), doubled):
        with pytest.raises(MedxferError, match="pool= has not all 24 pictures of squares"): fit(half_frozen(), ds, 1, augmented=False, pool=pool)


def test_a_training_without_a_pool_does_not_go_on_with_one(cache, tmp_path):
    ds, how = bright_or_dark(), dict(views=2, checkpoint=tmp_path / "c", every=0)
    with pytest.raises(KeyboardInterrupt): fit(half_frozen(), ds, 4, callbacks=[Leave(3)], **how)
    with pytest.raises(MedxferError, match="another training"): fit(half_frozen(), ds, 4, callbacks=[Leave(99)], pool=ds, **how)
