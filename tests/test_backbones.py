"Backbones: the factory gives the library's networks, weights are checked, features can be read anywhere."
import hashlib
import shutil
import urllib.error
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.pyplot import imread
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models import EfficientNet_B0_Weights

from medxfer_nb import backbones
from medxfer_nb.backbones import CLASSIC, PACKAGED, Provenance, _library_model, create_model, extract
from medxfer_nb.core import MedxferError

RELATIVE = dict(atol=1e-4, rtol=1e-3)


def pictures(n, side, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


# --- the factory ---


@pytest.mark.parametrize("name", ["small_cnn", "googlenet", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "tf_efficientnet_lite0", "regnetx_002",
                                  "vit_tiny_patch16_224"])
def test_factory_gives_what_the_library_computes(name):
    torch.manual_seed(7)
    model, net = _library_model(name).eval(), create_model(name, pretrained=False, seed=7, size=None if "vit" in name else 64)
    with torch.inference_mode():
        x = net.batch(pictures(2, 64))
        torch.testing.assert_close(net(x), model(x), **RELATIVE)
    assert net.spec.name == name and net.spec.weights is None and not net.training


def test_a_transformer_can_be_fed_another_side():
    net = create_model("vit_tiny_patch16_224", pretrained=False, num_classes=2, size=96)
    assert net(net.batch(pictures(1, 30))).shape == (1, 2) and net.feature_map(net.batch(pictures(1, 30))).shape[-1] == 6
    with pytest.raises(MedxferError, match="8 px"): create_model("vit_tiny_patch16_224", pretrained=False, size=8)


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "coat_tiny"])
def test_a_network_that_cannot_be_cut_is_refused(name):
    with pytest.raises(MedxferError, match="cut into stages"): create_model(name, pretrained=False)


def test_one_seed_gives_one_network_and_leaves_the_global_generator():
    torch.manual_seed(5); expected = torch.rand(1); torch.manual_seed(5)
    a, b, c = (create_model("small_cnn", pretrained=False, num_classes=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, c.head.weight)


def test_stems():
    small = create_model("resnet18", pretrained=False, size=28, stem="small")
    assert small.feature_map(small.batch(pictures(1, 28)), "stem").shape == (1, 64, 28, 28)
    one = create_model("resnet18", pretrained=False, size=32, in_chans=1)
    assert one.batch(pictures(1, 28)).shape == (1, 1, 32, 32) and one(one.batch(pictures(1, 28))).shape == (1, 1000)
    for name, stem in (("mobilenet_v2", "small"), ("resnet18", "smal")):
        with pytest.raises(MedxferError, match="small"): create_model(name, pretrained=False, stem=stem)
    with pytest.raises(MedxferError, match="in_chans"): create_model("resnet18", pretrained=False, in_chans=2)


# --- vectors out ---


@pytest.fixture(scope="module")
def lite(): return create_model(size=64)


def test_extract_is_independent_of_the_batch_size(lite):
    x = pictures(5, 64)
    torch.testing.assert_close(extract(lite, x, batch_size=2), extract(lite, x), atol=1e-5, rtol=1e-4)


def test_extract_reads_many_stages_as_it_reads_each(lite):
    x, names = pictures(3, 64), ["stage3", "stem"]
    many = extract(lite, x, names, batch_size=2)
    assert list(many) == names
    for name, vectors in many.items():
        torch.testing.assert_close(vectors, extract(lite, x, name), atol=1e-5, rtol=1e-4)
        with torch.inference_mode(): torch.testing.assert_close(vectors, lite.feature_map(lite.batch(x), name).mean((2, 3)), atol=1e-5, rtol=1e-4)
    with pytest.raises(MedxferError, match="stage3"): extract(lite, x, ["stem", "stage33"])


def test_extract_computes_nothing_after_the_last_stage(lite):
    def refuse(*args): raise AssertionError("computed")
    hook = lite.stages.stage2.register_forward_hook(refuse)
    try: assert extract(lite, pictures(1, 64), ["stage1", "stem"])["stem"].shape == (1, 16)
    finally: hook.remove()


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_fully_connected_layers_can_be_read(name):
    net = create_model(name, pretrained=False, size=64)
    layers = extract(net, pictures(2, 64), ["fc6", "relu6", "fc7", "relu7"])
    assert all(v.shape == (2, 4096) for v in layers.values()) and torch.equal(layers["fc6"].relu(), layers["relu6"])
    assert torch.equal(layers["relu7"], extract(net, pictures(2, 64))) and torch.equal(layers["fc6"], extract(net, pictures(2, 64), "fc6"))
    with pytest.raises(MedxferError, match="fc7"): extract(net, pictures(2, 64), "fc8")


# --- auxiliary heads ---


def test_auxiliary_heads_are_the_library_s():
    torch.manual_seed(0)
    model = _library_model("googlenet", aux=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    net = create_model("googlenet", pretrained=False, aux=True, size=96)
    for m in (*model.modules(), *net.modules()):
        if isinstance(m, nn.Dropout): m.p = 0.0
    x = net.batch(pictures(3, 96))
    assert torch.equal(state["fc.weight"], net.head.weight)
    with torch.no_grad():
        expected = model.train()(x)
        got = net.train().forward_aux(x)
    wanted = [expected.logits, expected.aux_logits1, expected.aux_logits2]
    torch.testing.assert_close(got, wanted, **RELATIVE)
    assert [len(z[0]) for z in net.reset_classifier(4).forward_aux(x)] == [4, 4, 4]
    assert torch.equal(net.head.weight, create_model("googlenet", pretrained=False, num_classes=4, size=96).head.weight)
    assert not torch.equal(net.aux["inception4a"].fc2.weight, net.aux["inception4d"].fc2.weight)
    with pytest.raises(MedxferError, match="googlenet"): create_model("resnet18", pretrained=False, aux=True)


# --- weights ---


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights_know_what_is_on_a_photograph(name):
    net, labels = create_model(name), EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    hopper = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    for photo, what in ((load_sample_image("china.jpg"), "palace"), (hopper, "military uniform")):
        side = min(photo.shape[:2]); y, x = ((s - side) // 2 for s in photo.shape[:2])
        with torch.inference_mode(): assert labels[net(net.batch(photo[None, y:y + side, x:x + side])).argmax()] == what
    assert net.spec.size == {"0": 224, "1": 240, "2": 260}[name[-1]] and net.spec.mean == (127 / 255,) * 3 and net.spec.std == (128 / 255,) * 3
    assert net.spec.weights == Provenance("ImageNet-1k, 1000 classes", Path(PACKAGED[name][1]).name, PACKAGED[name][2], "Apache-2.0")


def test_weights_travel_through_a_local_file(tmp_path):
    source, file = _library_model("mobilenet_v3_small"), tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, file)
    net = create_model("mobilenet_v3_small", weights=file, size=64)
    assert torch.equal(net.head.weight, source.classifier[3].weight)
    assert net.spec.weights.file == file.name and net.spec.weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_weights_from_before_batchnorm_counted_its_batches(tmp_path, name):
    source = _library_model(name)
    torch.save({k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    net = create_model(name, weights=tmp_path / "old.pth", size=64)
    assert torch.equal(net.head.weight, source.fc.weight) and net.spec.weights.file == "old.pth"


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(_library_model("mobilenet_v3_small").state_dict(), tmp_path / "other.pth")
    with pytest.raises(MedxferError, match="another architecture"): create_model("mobilenet_v2", weights=tmp_path / "other.pth")


def test_a_damaged_or_missing_package_file_is_refused(tmp_path, monkeypatch):
    package, file, *_ = PACKAGED["tf_efficientnet_lite0"]
    copy = tmp_path / package / file
    copy.parent.mkdir(parents=True)
    shutil.copy(Path(find_spec(package).origin).parent / file, copy)
    data = bytearray(copy.read_bytes()); data[1_000_000] ^= 1; copy.write_bytes(data)

    class Found: origin = str(tmp_path / package / "__init__.py")
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(MedxferError, match="missing or damaged"): create_model()
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedxferError, match="pip install"): create_model()


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs): raise urllib.error.URLError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(MedxferError, match="pretrained=False"): create_model("resnet18")


def test_library_weights_come_with_their_fingerprint(tmp_path, monkeypatch):
    file = tmp_path / "hub/checkpoints/mobilenet_v3_small-047dcff4.pth"
    file.parent.mkdir(parents=True)
    torch.save(_library_model("mobilenet_v3_small").state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = create_model("mobilenet_v3_small", size=64).spec.weights
    assert weights.file == file.name and weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_timm_weights_come_with_their_fingerprint(tmp_path, monkeypatch):
    source = _library_model("test_convnext")
    repo = tmp_path / f"models--{source.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    file = repo / "snapshots/1234/model.safetensors"
    for folder in (file.parent, repo / "refs"): folder.mkdir(parents=True)
    (repo / "refs/main").write_text("1234")
    save_file(source.state_dict(), file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    net = create_model("test_convnext")
    assert torch.equal(net.head.weight, source.head.fc.weight)
    assert net.spec.weights.file == file.name and net.spec.weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_network_is_normalised_as_its_weights_were():
    assert create_model("convnext_atto", pretrained=False).spec.mean == (0.485, 0.456, 0.406)
    assert create_model("vit_tiny_patch16_224", pretrained=False).spec.std == (0.5, 0.5, 0.5)
    assert create_model("googlenet", pretrained=False).spec.mean == (0.5, 0.5, 0.5)
    net = create_model("mobilenet_v3_small", pretrained=False)
    assert net.spec.size == 224 and net.spec.mean == (0.485, 0.456, 0.406)


def test_names():
    with pytest.raises(MedxferError, match="resnet18"): create_model("resnet81")
    with pytest.raises(MedxferError, match="pretrained=False"): create_model("small_cnn")
    assert set(CLASSIC) <= set(backbones.list_models())
