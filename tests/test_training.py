"Training: kills, resumes, frozen parts, and losses that are no numbers."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.datasets import ImageSet, Info, Task
from medxfer_nb.training import augment, fit, frozen_stages, loss_function, predict_proba


def bright_or_dark(n=24, seed=0, kind="binary"):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    images = (rng.integers(0, 100, (n, 32, 32)) + 120 * y[:, None, None]).astype(np.uint8)
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", bright=y, dark=1 - y))
    task = Task("bright", kind, ("bright", "dark") if kind == "multilabel" else ("no", "yes"))
    return ImageSet(images, table, {"bright": task}, Info("squares", "squares", "none", "CC0", "here"))


def small(seed=0): return create_model("small_cnn", pretrained=False, num_classes=2, size=32, seed=seed)


def equal(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_it_learns_what_can_be_learnt():
    ds = bright_or_dark()
    assert (fit(small(), ds, 8, lr=3e-3).predict_proba(ds).argmax(1) == ds.target()).all()


def test_a_run_depends_on_its_seed_alone():
    torch.manual_seed(1); a = fit(small(), bright_or_dark(), 2)
    torch.manual_seed(2); b = fit(small(), bright_or_dark(), 2)
    assert a.history.equals(b.history) and equal(a.net, b.net)
    assert not equal(a.net, fit(small(), bright_or_dark(), 2, seed=1).net)


def test_training_leaves_the_callers_generator_alone():
    torch.manual_seed(1); expected = torch.rand(1); torch.manual_seed(1)
    fit(small(), bright_or_dark(), 1)
    assert torch.equal(torch.rand(1), expected)


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


def test_multilabel_rows_do_not_sum_to_one():
    ds = bright_or_dark(kind="multilabel")
    p = fit(small(), ds, 6, lr=3e-3).predict_proba(ds)
    assert ((p > 0.5) == ds.target()).all()


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


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_training import bright_or_dark, fit, small
run = fit(small(), bright_or_dark(), 30, checkpoint={file!r})
print(run.history["loss"].map(float.hex).str.cat(sep=" "))
"""


def test_killed_at_random_moments_and_resumed_it_is_bit_identical(tmp_path):
    script = SCRIPT.format(tests=os.path.dirname(__file__), file=str(tmp_path / "run.ckpt"))
    kills, rng = 0, np.random.default_rng(0)
    while kills < 4:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.iterdir()): time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4)); process.send_signal(signal.SIGKILL); kills += 1; process.wait()
        torch.load(tmp_path / "run.ckpt", weights_only=True)  # never unloadable
    resumed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    (tmp_path / "run.ckpt").unlink()
    assert resumed == subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert len(resumed) == 30


def test_nan_never_reaches_the_weights(tmp_path):
    net = small()
    fit(net, bright_or_dark(), 1, checkpoint=tmp_path / "c")
    good, before = (tmp_path / "c").read_bytes(), {k: v.clone() for k, v in net.state_dict().items() if "running" not in k and "num_batches" not in k}
    net.head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(MedxferError, match="lower lr"): fit(net, bright_or_dark(), 2)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items()) and (tmp_path / "c").read_bytes() == good


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    fit(small(), bright_or_dark(), 1, checkpoint=tmp_path / "c")
    with pytest.raises(MedxferError, match="another training"): fit(small(), bright_or_dark(), 1, lr=1e-4, checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes(b"damaged")
    with pytest.raises(MedxferError, match="damaged"): fit(small(), bright_or_dark(), 1, checkpoint=tmp_path / "c")


def test_what_cannot_be_trained_is_refused():
    one_class = bright_or_dark().take(np.arange(0, 24, 2))
    with pytest.raises(MedxferError, match="two classes"): fit(small(), one_class, 1)
    with pytest.raises(MedxferError, match="frozen"): fit(small().requires_grad_(False), bright_or_dark(), 1)
    with pytest.raises(MedxferError, match="multitask"): loss_function("regression")
