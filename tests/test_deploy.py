"Bundles: what is packed comes back, and what was damaged, edited or would answer differently is refused."
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import numpy as arrays
from test_training import bright_or_dark

from medxfer_nb import deploy
from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError, sha256
from medxfer_nb.deploy import FILES, choose_threshold, decided, load_bundle, save_bundle
from medxfer_nb.imageset import Task
from medxfer_nb.metrics import auroc, balanced_accuracy, score
from medxfer_nb.training import fit, predict_proba


def pictures(**options):
    "48 bright or dark squares in three parts."
    ds = bright_or_dark(48, **options)
    ds.table["split"] = np.repeat(["train", "val", "test"], 16)
    return replace(ds, openings=Counter())


def network(name="small_cnn", classes=2, **options): return create_model(name, pretrained=False, num_classes=classes, **(dict(size=32) | options))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A data set, a run, and its bundle."
    ds = pictures()
    run = fit(network(), ds.split("train"), 6, 3e-3, augmented=False)
    return ds, run, save_bundle(run, ds, tmp_path_factory.mktemp("home") / "bundle")


@pytest.fixture
def copy(packed, tmp_path): return shutil.copytree(packed[2], tmp_path / "copy")


def rewrite(folder, name, data):
    "Change a file and its fingerprint, as somebody would who wants to."
    (folder / name).write_bytes(data)
    prints = json.loads((folder / "manifest.json").read_text()) | {name: sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(prints))


# --- round trip ---


def test_what_is_packed_gives_the_same_answers(packed):
    ds, run, folder = packed
    bundle = load_bundle(folder)
    np.testing.assert_allclose(bundle.predict(ds.images), predict_proba(run.net, ds), atol=1e-6)
    assert all(torch.equal(v, run.net.state_dict()[k]) for k, v in bundle.net.state_dict().items()) and bundle.net.spec == run.net.spec


def test_only_validation_pictures_are_opened(tmp_path):
    ds = pictures()
    save_bundle(network(), ds, tmp_path / "b")
    assert dict(ds.openings) == {"val": 1}


def test_the_threshold_is_chosen_on_validation_and_decides(packed):
    ds, run, folder = packed
    bundle, valid = load_bundle(folder), ds.split("val")
    p, y = predict_proba(run.net, valid), valid.target()
    cut = bundle.facts["threshold"]
    def reached(c): return balanced_accuracy(y, np.eye(2)[decided(p, c)])
    assert reached(cut) == max(map(reached, p[:, 1])) and cut not in p[:, 1]
    assert bundle.decide(valid.images) == [("no", "yes")[int(q >= cut)] for q in p[:, 1]]


def test_choose_threshold_separates_what_can_be_separated():
    p = np.linspace(0.3, 0.5, 11)
    assert p[p < 0.41].max() < choose_threshold((p > 0.41).astype(int), np.stack([1 - p, p], 1)) < p[p > 0.41].min()


@pytest.mark.parametrize("name, options", [("tf_efficientnet_lite0", {}), ("resnet18", dict(in_chans=1)), ("googlenet", dict(aux=True)),
                                           ("alexnet", {})])
def test_other_architectures_come_back(name, options, tmp_path):
    ds, net = pictures(), network(name, size=64, **options)
    bundle = load_bundle(save_bundle(net, ds, tmp_path / "b"))
    np.testing.assert_allclose(bundle.predict(ds.images[:4]), predict_proba(net, ds)[:4], atol=1e-5)


def test_three_classes_have_no_threshold(tmp_path):
    ds = pictures()
    ds.tasks = {"bright": Task("bright", "multiclass", ("a", "b", "c"))}
    bundle = load_bundle(save_bundle(network(classes=3), ds, tmp_path / "b"))
    p = bundle.predict(ds.images)
    assert bundle.facts["threshold"] is None and bundle.decide(ds.images) == [("a", "b", "c")[k] for k in p.argmax(1)]


def test_packaged_weights_keep_their_provenance(tmp_path):
    net = create_model(num_classes=2, size=32)
    bundle = load_bundle(save_bundle(net, pictures(), tmp_path / "b"))
    assert bundle.net.spec.weights == net.spec.weights and len(bundle.facts["backbone"]["sha256"]) == 64


def test_rows_without_a_label_choose_no_threshold(tmp_path):
    ds = pictures()
    hidden = ds.take(np.arange(len(ds)))
    hidden.table.loc[20:23, "bright"] = -1
    folders = [save_bundle(network(), d, tmp_path / n) for d, n in ((hidden, "a"), (ds.take(np.r_[:20, 24:48]), "b"))]
    assert load_bundle(folders[0]).facts["threshold"] == load_bundle(folders[1]).facts["threshold"]


# --- pictures as they come ---


def test_any_size_channels_and_depth(packed, tmp_path):
    from PIL import Image

    ds, _, folder = packed
    bundle, grey = load_bundle(folder), ds.images[1]
    Image.fromarray(grey).save(tmp_path / "a.png")
    colour = np.repeat(grey[..., None], 3, 2)
    p = bundle.predict([grey, colour, str(tmp_path / "a.png"), tmp_path / "a.png"])
    assert (p == p[0]).all()
    odd = bundle.predict([grey[:20], np.repeat(grey, 3, 0), colour.astype(np.uint16) * 257, grey.astype(np.float32)])
    assert odd.shape == (4, 2) and np.allclose(odd.sum(1), 1, atol=1e-6)


def test_a_network_of_colour_pictures_takes_grey_ones(tmp_path):
    grey = pictures()
    colour = replace(grey, images=np.repeat(grey.images[..., None], 3, -1))
    bundle = load_bundle(save_bundle(network(), colour, tmp_path / "b"))
    np.testing.assert_allclose(bundle.predict(grey.images), bundle.predict(colour.images))


def test_no_picture_is_an_error(packed):
    with pytest.raises(MedxferError, match="no pictures"): load_bundle(packed[2]).predict([])


# --- the card ---


def test_the_card_tells_scores_with_intervals_use_and_limits(packed, tmp_path):
    ds, run, _ = packed
    valid = ds.split("val")
    sealed = score(auroc, ds.target(), predict_proba(run.net, ds))
    card = ModelCard.load(save_bundle(run, ds, tmp_path / "b", scores={"AUROC, sealed test": sealed}, use="Sorting squares.") / "README.md")
    own = score(auroc, valid.target(), predict_proba(run.net, valid), valid.groups)
    told = (str(own), str(sealed), "sealed test", "Sorting squares.", "not for clinical use", "chose the threshold", "- seed: 0", "Random weights")
    assert [words for words in told if words not in card.text] == []
    assert {r.metric_value for r in card.data.eval_results} >= {own.value, sealed.value}


def test_a_threshold_that_was_given_is_not_said_to_be_chosen(packed, tmp_path):
    ds, run, _ = packed
    folder = save_bundle(run, ds, tmp_path / "b", threshold=0.5)
    assert load_bundle(folder).facts["threshold"] == 0.5 and "chose the threshold" not in (folder / "README.md").read_text()


# --- faults ---


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MedxferError, match=f"copy: {name} was damaged"): load_bundle(copy)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(MedxferError, match=f"copy: {name} is missing"): load_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_broken_manifest_is_one_clear_error(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(MedxferError, match="manifest.json is missing or damaged"): load_bundle(copy)


def test_an_edited_threshold_is_noticed(copy):
    facts = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(facts | dict(threshold=0.01), indent=1))
    with pytest.raises(MedxferError, match="bundle.json was damaged or edited"): load_bundle(copy)


def test_a_wrong_golden_vector_tells_the_bundle_and_the_difference(copy):
    golden = arrays.load((copy / "golden.safetensors").read_bytes())
    golden["probabilities"][0] += (0.25, -0.25)
    rewrite(copy, "golden.safetensors", arrays.save(golden))
    with pytest.raises(MedxferError, match=r"bundle .*copy.* off by up to 0\.25 \(0\.001 allowed\)"): load_bundle(copy)


@pytest.mark.parametrize("change", [dict(mean=[0, 0, 0]), dict(side=8)])
def test_other_preprocessing_is_noticed_by_the_golden_pictures(copy, change):
    facts = json.loads((copy / "bundle.json").read_text())
    facts["preprocessing"] |= change
    rewrite(copy, "bundle.json", json.dumps(facts).encode())
    with pytest.raises(MedxferError, match="off by up to"): load_bundle(copy)


def test_another_version_of_a_library_is_named_as_the_suspect(copy):
    facts = json.loads((copy / "bundle.json").read_text())
    facts["versions"]["pillow"] = "1.0"
    facts["preprocessing"]["mean"] = [0, 0, 0]
    rewrite(copy, "bundle.json", json.dumps(facts).encode())
    with pytest.raises(MedxferError, match="made with pillow 1.0"): load_bundle(copy)


def test_probabilities_that_are_no_numbers_are_off(copy):
    golden = arrays.load((copy / "golden.safetensors").read_bytes())
    golden["probabilities"][:] = np.nan
    rewrite(copy, "golden.safetensors", arrays.save(golden))
    with pytest.raises(MedxferError, match="off by up to nan"): load_bundle(copy)


def test_another_format_is_refused(copy):
    facts = json.loads((copy / "bundle.json").read_text())
    rewrite(copy, "bundle.json", json.dumps(facts | dict(format=2)).encode())
    with pytest.raises(MedxferError, match="has format 2"): load_bundle(copy)


def test_a_folder_that_exists_is_left_alone(packed, tmp_path):
    ds, run, folder = packed
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(MedxferError, match="exists already"): save_bundle(run, ds, folder)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(MedxferError, match="not a folder"): load_bundle(tmp_path / "none")


def test_a_packing_that_fails_leaves_nothing(packed, tmp_path, monkeypatch):
    ds, run, _ = packed
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(deploy.os, "replace", full)
    with pytest.raises(MedxferError, match="the disk is full"): save_bundle(run, ds, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_its_name_does_not_build_is_refused(tmp_path):
    net = network("alexnet", size=64)
    net.neck = net.neck[:4]
    net.head = torch.nn.Linear(4096, 2)
    with pytest.raises(MedxferError, match="do not fit alexnet"): save_bundle(net, pictures(), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_classifier_is_refused(tmp_path):
    ds = pictures(kind="multilabel")
    with pytest.raises(MedxferError, match="kind of task"): save_bundle(network(), ds, tmp_path / "b")
