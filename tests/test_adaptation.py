"Adaptation: each loss against its formula, what AdaBN moves, the distance of domains, resumes and faults."
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import bright_or_dark, equal, small
from torch.nn import functional as F

from medxfer_nb.adaptation import METHODS, Judge, Reverse, a_distance, adabn, adapt, confusion, coral, mmd, multilinear, show_domains
from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import Task
from medxfer_nb.loop import Callback

sizes = st.integers(2, 12)


def draw(*shape, seed=0, **options): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def darker(n=20, seed=1):
    ds = bright_or_dark(n, seed)
    return replace(ds, images=(ds.images // 2).astype(np.uint8))


# --- the losses ---


@given(sizes, sizes, st.integers(1, 5), st.integers(0, 9))
def test_coral_is_the_frobenius_distance_of_covariances(n, m, d, seed):
    s, t = draw(n, d, seed=seed), 3 * draw(m, d, seed=seed + 100)
    c_s, c_t = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (s, t))
    assert coral(s, t).item() == pytest.approx(np.linalg.norm(c_s - c_t, "fro") ** 2 / (4 * d**2))


def test_coral_of_stretched_features_has_a_closed_form():
    s = draw(30, 4)
    for c in (0.5, 1.0, 3.0):
        assert coral(s, c * s).item() == pytest.approx((1 - c**2) ** 2 * torch.cov(s.T).square().sum().item() / 64)


@settings(max_examples=20)
@given(sizes, sizes, st.integers(0, 9))
def test_mmd_is_the_biased_estimate_written_as_loops(n, m, seed):
    s, t = draw(n, 3, seed=seed).numpy(), draw(m, 3, seed=seed + 100).numpy() + 1
    both = [*s, *t]
    width = np.mean([((x - y) ** 2).sum() for i, x in enumerate(both) for j, y in enumerate(both) if i != j])
    def k(x, y): return np.mean([np.exp(-((x - y) ** 2).sum() / (f * width)) for f in (0.25, 0.5, 1, 2, 4)])
    def mean(a, b): return np.mean([k(x, y) for x in a for y in b])
    expected = mean(s, s) + mean(t, t) - 2 * mean(s, t)
    assert mmd(torch.tensor(s), torch.tensor(t)).item() == pytest.approx(expected, abs=1e-12) and expected >= 0


def test_mmd_of_two_points_has_a_closed_form_and_of_a_set_with_itself_is_zero():
    a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert mmd(a, b).item() == pytest.approx(2 - 2 * np.mean(np.exp([-4, -2, -1, -1 / 2, -1 / 4])))
    assert mmd(draw(9, 3), draw(9, 3)).item() == pytest.approx(0)


def test_a_step_down_each_distance_brings_features_together():
    for distance in (coral, mmd):
        s, t = draw(20, 3), (2 * draw(20, 3, seed=1) + 1).requires_grad_(True)
        before = distance(s, t)
        before.backward()
        assert distance(s, t.detach() - t.grad / t.grad.norm() * 0.1) < before


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_reverse_is_the_identity_with_a_turned_gradient(strength):
    x, plain = draw(4, 3, requires_grad=True), draw(4, 3).requires_grad_(True)
    y = Reverse.apply(x, strength)
    assert torch.equal(y, x)
    y.square().sum().backward(); plain.square().sum().backward()
    torch.testing.assert_close(x.grad, -strength * plain.grad)


def test_the_judge_learns_what_its_input_unlearns():
    "One step down the loss: the judge gets better on the old features, the moved features are harder for the old judge."
    judge, s, t = Judge(3), draw(8, 3).float(), draw(8, 3, seed=1).float().requires_grad_(True)
    judge.strength = 1.0
    before, old = judge(s, t), copy.deepcopy(judge)
    before.backward()
    assert old(s, (t - 0.1 * t.grad).detach()) > before
    with torch.no_grad():
        for p in judge.parameters(): p -= 0.1 * p.grad
    assert judge(s, t) < before


def test_judge_is_the_cross_entropy_of_domains():
    judge, s, t = Judge(3), draw(5, 3).float(), draw(7, 3, seed=1).float()
    z = judge.score(torch.cat([s, t]))[:, 0]
    expected = -(F.logsigmoid(z[:5]).sum() + F.logsigmoid(-z[5:]).sum()) / 12
    torch.testing.assert_close(judge(s, t), expected)
    weights = torch.arange(12.0)
    by_hand = -(weights[:5] * F.logsigmoid(z[:5])).sum() - (weights[5:] * F.logsigmoid(-z[5:])).sum()
    torch.testing.assert_close(judge(s, t, weights), by_hand / 12)


@given(sizes, st.integers(1, 6), st.integers(2, 4))
def test_multilinear_is_the_outer_product_of_each_picture(n, f, c):
    x, g = draw(n, f), draw(n, c, seed=1).softmax(1)
    for row, a, b in zip(multilinear(x, g), x, g): torch.testing.assert_close(row.reshape(c, f), torch.outer(b, a))
    torch.testing.assert_close(multilinear(x, g).reshape(n, c, f).sum(1), x)  # probabilities sum to 1


@given(st.integers(2, 12), st.integers(2, 5), st.floats(0.5, 4))
def test_confusion_is_its_formula_written_as_loops(n, c, temperature):
    z = 3 * draw(n, c)
    y = np.exp(z.numpy() / temperature) / np.exp(z.numpy() / temperature).sum(1, keepdims=True)
    w = 1 + np.exp((y * np.log(y)).sum(1))
    w = n * w / w.sum()
    table = np.array([[sum(w[i] * y[i, a] * y[i, b] for i in range(n)) for b in range(c)] for a in range(c)])
    table /= table.sum(1, keepdims=True)
    expected = sum(table[a, b] for a in range(c) for b in range(c) if a != b) / c
    assert confusion(z, temperature).item() == pytest.approx(expected)


# --- AdaBN ---


def test_adabn_takes_the_targets_mean_and_variance_and_nothing_else():
    net, pictures = small(), darker().images
    before = copy.deepcopy(net.state_dict())
    assert adabn(net, pictures) is net and not net.training
    x = net.batch(pictures)
    with torch.no_grad():
        for stage in net.stages:
            convolution, norm, relu, pool = list(stage.modules())[2:]
            z = convolution(x)
            torch.testing.assert_close(norm.running_mean, z.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(norm.running_var, z.var((0, 2, 3)), atol=1e-4, rtol=5e-3)
            x = stage(x)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_adabn_in_batches_is_near_adabn_at_once():
    a, b = (adabn(small(), bright_or_dark(64).images, batch_size=n) for n in (64, 16))
    for name, value in a.state_dict().items():
        if name.endswith("running_mean"): torch.testing.assert_close(value, b.state_dict()[name], atol=0.05, rtol=0.1)


def test_adabn_works_where_batchnorm_is_frozen():
    net, other = small(), small()
    net.bn_eval = True
    net.requires_grad_(False)
    assert equal(adabn(net, darker().images), adabn(other, darker().images))


def test_adabn_names_what_it_cannot_do():
    net = create_model("alexnet", pretrained=False, num_classes=2, size=64)
    with pytest.raises(MedxferError, match="alexnet has no BatchNorm"): adabn(net, darker().images)
    with pytest.raises(MedxferError, match="at least 2 pictures"): adabn(small(), darker().images[:1])


# --- the distance of domains ---


def test_a_distance_of_one_distribution_is_near_zero_and_of_two_far_ones_two():
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    a, b = rng.normal(0, 1, (2, 300, 5))
    assert abs(a_distance(a, b, patients, patients).value) < 0.3
    assert a_distance(a, b + 20, patients, patients).value == 2


def test_a_distance_does_not_take_patients_for_domains():
    "Two domains that differ by nothing but their patients, each with a look of his own."
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    a, b = (rng.normal(0, 1, (30, 20))[patients] + rng.normal(0, 0.1, (300, 20)) for _ in range(2))
    assert abs(a_distance(a, b, patients, patients).value) < 0.8


def test_a_distance_counts_each_domain_as_a_half():
    rng = np.random.default_rng(0)
    d = a_distance(rng.normal(0, 1, (40, 2)), rng.normal(0, 1, (800, 2)), np.arange(40), np.arange(800))
    assert abs(d.value) < 0.7  # guessing the larger domain would give 1.8 if pictures were counted


def test_a_distance_needs_patients():
    with pytest.raises(MedxferError, match="5 folds needs as many patients in each domain, not 2"):
        a_distance(np.zeros((4, 2)), np.zeros((9, 2)), [0, 0, 1, 1], np.arange(9))


# --- adapt ---


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_its_parts(method):
    net, before = small(), small()
    run = adapt(net, bright_or_dark(18), darker(), method, epochs=2, batch_size=8, weight=0.5)
    assert not equal(net, before) and run.net is net and not net.training
    total = run.history["source"] + 0.5 * run.history["domain"]
    np.testing.assert_allclose(run.history["loss"], total, rtol=1e-5)
    assert (run.history["domain"] == 0).all() == (method == "none")
    assert run.config["method"] == method and run.predict_proba(darker()).shape == (20, 2)


def test_the_targets_labels_are_not_read():
    target = darker()
    hidden = replace(target, table=target.table.assign(bright=-1))
    runs = [adapt(small(), bright_or_dark(), t, "cdan_e", epochs=1) for t in (target, hidden)]
    assert runs[0].history.equals(runs[1].history) and equal(runs[0].net, runs[1].net)


def test_source_pictures_without_a_label_are_left_out():
    source = bright_or_dark()
    some = replace(source, table=source.table.assign(bright=np.where(np.arange(24) < 10, source.target(), -1)))
    assert adapt(small(), some, darker(), epochs=1).config["n"] == 10


def test_the_weight_counts_and_the_seed_decides():
    def run(**options): return adapt(small(), bright_or_dark(), darker(), "mmd", epochs=1, **options)
    assert equal(run().net, run().net) and equal(run(weight=1.0).net, run().net)
    assert not equal(run().net, run(weight=9.0).net) and not equal(run().net, run(seed=1).net)


def test_a_last_batch_of_one_picture_is_no_fault():
    history = adapt(small(), bright_or_dark(9), darker(), "coral", epochs=2, batch_size=8).history
    assert np.isfinite(history.to_numpy()).all()


class Stop(Callback):
    "Ends a training after so many steps, as a kill would."
    def __init__(self, steps): self.steps = steps

    def after_step(self, loop):
        self.steps -= 1
        if self.steps == 0: raise KeyboardInterrupt

    def __repr__(self): return "Stop"


@pytest.mark.parametrize("method", ["coral", "dann", "cdan_e"])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_killed_adaptation_goes_on_as_if_nothing_had_happened(tmp_path, method, steps):
    def run(steps, **options):
        return adapt(small(), bright_or_dark(), darker(), method, epochs=3, batch_size=8, callbacks=[Stop(steps)], **options)

    whole = run(99)
    with pytest.raises(KeyboardInterrupt): run(steps, checkpoint=tmp_path / "c", every=0)
    resumed = run(99, checkpoint=tmp_path / "c", every=0)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net)


# --- faults ---


def test_faults_name_what_is_wrong():
    source, target, net = bright_or_dark(), darker(), small()
    finding = replace(target, tasks={"bright": Task("bright", "binary", ("cyst", "solid"))})
    faults = {"unknown method 'corall'; did you mean 'coral'": dict(method="corall"),
              "the target holds 0 pictures": dict(target=target.take([])),
              r"the classes differ, \('no', 'yes'\) and \('cyst', 'solid'\)": dict(target=finding),
              "at least two classes": dict(source=source.take(np.arange(0, 24, 2))),
              "the head has 5": dict(net=small().reset_classifier(5)),
              "kind of task": dict(source=bright_or_dark(kind="multilabel"))}
    for message, change in faults.items():
        with pytest.raises(MedxferError, match=message): adapt(**(dict(net=net, source=source, target=target) | change))


def test_the_map_of_domains_needs_a_text():
    x = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(MedxferError, match="alt"): show_domains({"a": (x, x + 1)}, " ")
