"The explorers, driven without a browser: what they say and draw must be what the models do."
import io
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from medxfer_nb.backbones import extract
from medxfer_nb.core import MedxferError
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.metrics import auroc, score
from medxfer_nb.surgery import Network, Spec
from medxfer_nb.widgets import CamExplorer, FreezeExplorer, linear_probe, probe_grid, stage_features


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    return tmp_path


def tiny_net(seed=0):
    "Two random stages."
    torch.manual_seed(seed)
    stages = nn.Sequential()
    stages.add_module("stem", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    stages.add_module("stage1", nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()))
    return Network(stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 2), Spec("tiny", size=16)).eval()


def tiny_set(kind="binary"):
    "60 patients with a picture each; the sick are brighter."
    rng, sick = np.random.default_rng(0), np.arange(60) % 2
    pictures = np.clip(rng.normal(100 + 12 * sick[:, None, None], 30, (60, 16, 16)), 0, 255).astype(np.uint8)
    table = pd.DataFrame(dict(id=np.arange(60), group=np.arange(60), split=["train"] * 30 + ["val"] * 30, sick=sick))
    return ImageSet(pictures, table, {"sick": Task("sick", kind, ("healthy", "sick"))}, Info("tiny", "noise", "none", "CC0", "made here"))


def test_features_are_computed_once_for_the_same_question(cache):
    net, pictures = tiny_net(), tiny_set().images
    first = stage_features(net, pictures)
    for arguments in [(net, pictures), (tiny_net(1), pictures), (net, pictures[:30])]: again = stage_features(*arguments)
    np.testing.assert_array_equal(stage_features(net, pictures)["stem"], first["stem"])
    assert len([f for f in (cache / "features").iterdir() if f.is_dir()]) == 3 and len(again["stem"]) == 30


def test_network_is_left_as_it_was():
    net = tiny_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    probe_grid(tiny_set(), net, budgets=(10,))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())


def test_grid_agrees_with_sklearn():
    ds, net = tiny_set(), tiny_net()
    row = probe_grid(ds, net, budgets=(30,)).set_index("stage").loc["stage1"]
    train, valid = ds.split("train"), ds.split("val")
    x, x_valid = (extract(net, part.images, "stage1").numpy() for part in (train, valid))
    p = linear_probe(x, train.target()).predict_proba(x_valid)
    assert row["score"].value == pytest.approx(roc_auc_score(valid.target(), p[:, 1]))
    assert row["score"] == score(auroc, valid.target(), p, valid.groups)
    assert row["frozen"] == sum(p.numel() for p in net.stages.parameters()) and row["trained"] == 8 + 1


def test_grid_leaves_the_test_set_closed():
    ds = tiny_set()
    probe_grid(ds, tiny_net(), budgets=(10,))
    assert ds.openings["test"] == 0


@pytest.mark.parametrize("budgets", [(), (1,), (31,)])
def test_budgets_that_do_not_fit(budgets):
    with pytest.raises(MedxferError, match="budgets="): probe_grid(tiny_set(), tiny_net(), budgets=budgets)


def test_probe_needs_classes():
    with pytest.raises(MedxferError, match="regression"): probe_grid(tiny_set("regression"), tiny_net())


@pytest.fixture
def explorer(): return FreezeExplorer(probe_grid(tiny_set(), tiny_net(), budgets=(4, 10, 30)))


def test_every_move_changes_label_and_picture(explorer):
    seen = set()
    for stage, n in product(("stem", "stage1"), (4, 10, 30)):
        explorer.stage.value, explorer.budget.value = stage, n
        row = explorer.grid.loc[(stage, n)]
        assert f"on {n} labels. Validation AUROC {row.score}." in explorer.label.value and f"{row.frozen:,} parameters" in explorer.label.value
        seen.add((explorer.label.value, explorer.picture.value))
    assert len(seen) == 6


def test_picture_is_a_png(explorer):
    assert Image.open(io.BytesIO(explorer.picture.value)).format == "PNG"


def test_error_in_the_reaction_is_not_swallowed(explorer):
    explorer.grid = explorer.grid.iloc[:0]
    with pytest.raises(KeyError): explorer.budget.value = 30


def test_controls_have_names(explorer):
    assert [c.description for c in explorer.view.children[:2]] == ["frozen up to", "labels"]


def test_explorer_shows_itself_as_a_widget(explorer):
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.fixture
def cams():
    "Three pictures, two classes, two layers; the strongest cell is known."
    maps = {"early": np.zeros((3, 2, 4, 4)), "late": np.zeros((3, 2, 2, 2))}
    maps["early"][1, 1, 2, 3], maps["late"][:, 1, 0, 0] = 5, 2
    masks = np.zeros((3, 16, 16), np.uint8)
    masks[1, 8:12, 12:16] = 1
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    return CamExplorer(tiny_set().images[:3], maps, p, ("healthy", "sick"), np.array([0, 1, 1]), masks)


def test_cams_say_truth_prediction_and_raw_evidence(cams):
    cams.index.value, cams.kind.value, cams.layer.value = 1, "sick", "early"
    expected = ("Picture 1, in truth sick. Predicted: healthy 0.20, sick 0.80. "
                "Evidence for sick after early: at most 5, at row 10, column 14, inside the true outline.")
    assert cams.text() == cams.label.value == expected
    cams.layer.value = "late"
    assert "at most 2, at row 4, column 4, outside the true outline" in cams.label.value


def test_every_move_of_cams_changes_the_picture(cams):
    seen = set()
    for i, kind, layer in product(range(3), cams.classes, cams.maps):
        cams.index.value, cams.kind.value, cams.layer.value = i, kind, layer
        seen.add(cams.picture.value)
    assert len(seen) == 12


def test_cams_share_one_scale(cams):
    "A map of zeros must look like nothing, and not be stretched to its own maximum."
    cams.index.value, cams.kind.value, cams.layer.value = 0, "sick", "early"
    heat = cams.figure().axes[1].images[1]
    assert heat.get_clim() == (0, 5) and np.asarray(heat.get_array()).max() == 0


def test_cams_start_at_the_predicted_class(cams): assert cams.kind.value == "healthy"


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 2, 4, 4)])
def test_maps_that_do_not_fit(shape):
    with pytest.raises(MedxferError, match="3 pictures and 2 classes"):
        CamExplorer(tiny_set().images[:3], {"late": np.zeros(shape)}, np.full((3, 2), 0.5), ("healthy", "sick"))


def test_colour_pictures_without_truth():
    pictures = np.zeros((1, 16, 16, 3), np.uint8)
    assert "in truth" not in CamExplorer(pictures, {"late": np.zeros((1, 2, 2, 2))}, np.full((1, 2), 0.5), ("a", "b")).label.value
