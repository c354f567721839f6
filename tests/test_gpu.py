"On a graphics card: the processor's answers, the same network from the same seed, resumes that are exact. Skipped where there is none."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from test_imageset import random_set
from test_loop import Leave, equal
from test_multitask import TASKS, tiny_net, tiny_set, with_heads
from test_training import bright_or_dark
from test_transfer import QUICK, source

from medxfer_nb.backbones import create_model, extract
from medxfer_nb.cam import cam
from medxfer_nb.compare import compare
from medxfer_nb.core import device
from medxfer_nb.explain import METHODS, explain
from medxfer_nb.multitask import fit_multitask, predict
from medxfer_nb.speed import LAYOUTS, PRECISIONS, fastest
from medxfer_nb.training import fit
from medxfer_nb.transfer import STRATEGIES, transfer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")
PICTURES = np.random.default_rng(0).integers(0, 255, (6, 64, 64), dtype=np.uint8)


@pytest.fixture
def where(monkeypatch):
    "A function that chooses the device."
    monkeypatch.setenv("MEDXFER_DEVICE", "cuda")
    return lambda name: monkeypatch.setenv("MEDXFER_DEVICE", name)


def both(where, f):
    "What `f` gives on the processor and on the card."
    results = []
    for name in ("cpu", "cuda"):
        where(name)
        results.append(f())
    return results


def agree(card, processor):
    "Up to rounding."
    torch.testing.assert_close(card, processor, rtol=1e-3, atol=1e-4 * processor.abs().max().item())


def new(name):
    net = create_model(name, pretrained=False, num_classes=2, size=64)
    net.bn_eval = True
    return net


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "alexnet", "mobilenet_v2"])
def test_features_are_those_of_the_processor(where, name):
    processor, card = both(where, lambda: extract(new(name), PICTURES))
    assert card.device.type == "cpu"
    agree(card, processor)


def test_a_pretrained_network_answers_alike(where):
    processor, card = both(where, lambda: extract(create_model(size=64), PICTURES))
    agree(card, processor)


@pytest.mark.parametrize("name", ["small_cnn", "tf_efficientnet_lite0", "resnet18"])
def test_the_same_seed_gives_the_same_network(where, name):
    a, b = (fit(new(name), bright_or_dark(), 2) for _ in range(2))
    assert next(a.net.parameters()).device.type == "cuda"
    assert a.history.equals(b.history) and equal(a.net, b.net)


def test_the_first_epoch_is_that_of_the_processor(where):
    processor, card = both(where, lambda: fit(new("small_cnn"), bright_or_dark(), 1, lr=1e-4).history["loss"])
    np.testing.assert_allclose(card, processor, rtol=1e-3)


@pytest.mark.parametrize("name", ["small_cnn", "tf_efficientnet_lite0"])
def test_a_resume_is_exact(where, tmp_path, name):
    def train(at, **options): return fit(new(name), bright_or_dark(), 3, batch_size=12, callbacks=[Leave(at)], every=0, **options)
    with pytest.raises(KeyboardInterrupt): train(3, checkpoint=tmp_path / "c")
    resumed, whole = train(99, checkpoint=tmp_path / "c"), train(99)
    assert resumed.history.equals(whole.history) and equal(resumed.net, whole.net)


def test_what_began_on_the_card_ends_on_the_processor(where, tmp_path):
    def train(at, **options): return fit(new("small_cnn"), bright_or_dark(), 3, lr=1e-4, batch_size=12, callbacks=[Leave(at)], every=0, **options)
    with pytest.raises(KeyboardInterrupt): train(3, checkpoint=tmp_path / "c")
    where("cpu")
    np.testing.assert_allclose(train(99, checkpoint=tmp_path / "c").history["loss"], train(99).history["loss"], rtol=1e-3)


@pytest.mark.parametrize("views", [0, 2])
def test_frozen_stages_computed_once_train_alike(where, views):
    net = new("small_cnn")
    net.stages[:2].requires_grad_(False)
    runs = [fit(copy.deepcopy(net), bright_or_dark(), 3, augmented=bool(views), views=views) for _ in range(2)]
    assert equal(runs[0].net, runs[1].net) and equal(runs[0].net.stages[:2], net.stages[:2]) and not equal(runs[0].net, net)


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_give_probabilities_in_memory(where, name, precision):
    p = transfer(random_set(), QUICK[name], n=20, size=32, net_a=source(), precision=precision).predict_proba(random_set().split("test"))
    assert isinstance(p, np.ndarray) and np.allclose(p.sum(1), 1, atol=1e-5)


def test_the_fastest_way_is_one_that_was_measured(where, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    choice = fastest(new("tf_efficientnet_lite0"))
    assert choice.layout in LAYOUTS and choice.precision in PRECISIONS


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_runs_on_the_card(where, workers):
    study = compare(random_set(), [QUICK["scratch"]], (10, 20), 2, "small_cnn", size=32, workers=workers)
    assert not study.failed and len(study.predictions) == 4


@pytest.mark.parametrize("method", METHODS)
def test_evidence_is_that_of_the_processor(where, method):
    processor, card = both(where, lambda: explain(new("mobilenet_v2"), PICTURES, 1, method).raw)
    np.testing.assert_allclose(card, processor, rtol=0, atol=2e-3 * np.abs(processor).max())


def test_class_maps_are_those_of_the_processor(where):
    processor, card = both(where, lambda: cam(new("resnet18"), PICTURES).detach().cpu())
    agree(card, processor)


def test_five_questions_train_and_answer(where):
    def go():
        run = fit_multitask(with_heads(*TASKS, net=tiny_net().to(device())), tiny_set(16), 2, lr=1e-4, seed=3)
        return run.history, predict(run.net, tiny_set(8, seed=9))
    (history, answers), (on_card, same) = both(where, go)
    pd.testing.assert_frame_equal(on_card, history, rtol=1e-2)
    for name, values in answers.items(): np.testing.assert_allclose(same[name], values, atol=1e-2 * np.abs(values).max())
