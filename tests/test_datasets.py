"Data sets: the phantom, MedMNIST, folders, MURA's tree, studies, and what goes wrong with files."
import errno
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medxfer_nb import datasets
from medxfer_nb.core import MedxferError
from medxfer_nb.datasets import by_study, list_datasets, load, medmnist_info
from medxfer_nb.imageset import UNKNOWN, Task, coarse_target, leaks, split_by_group


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 50), value, np.uint8)).save(path)


def folder_of(tmp_path, a=6, b=6, base=10):
    for i in range(a): write(tmp_path / "a" / f"p{i // 2}_{i}.png", base + i)
    for i in range(b): write(tmp_path / "b" / f"q{i // 2}_{i}.png", base + 100 + i)
    return tmp_path


def test_folder_is_read_and_patients_kept_together(tmp_path):
    ds = load(folder_of(tmp_path), size=32, patient=r"(\w\d+)_")
    assert len(ds) == 12 and ds.task.classes == ("a", "b") and ds.images.shape == (12, 32, 32) and ds.table["group"].nunique() == 6


def test_folder_with_given_splits(tmp_path):
    for i, s in enumerate(("train", "val", "test")): folder_of(tmp_path / s, 2, 2, base=10 + 10 * i)
    assert load(tmp_path, size=32).table["split"].value_counts().to_dict() == {"test": 4, "train": 4, "val": 4}


def test_a_picture_in_two_given_splits_is_named(tmp_path):
    for s in ("train", "test"): folder_of(tmp_path / s, 2, 2)
    with pytest.raises(MedxferError, match="test/a/p0_0.png and train/a/p0_0.png are the same picture"): load(tmp_path, size=32)


def test_identical_pictures_stay_on_one_side(tmp_path):
    for i in range(12): write(tmp_path / "a" / f"{i}.png", 10 + i // 2)
    for i in range(12): write(tmp_path / "b" / f"{i}.png", 110 + i // 2)
    assert len(leaks(load(tmp_path, size=32))) == 0


def chain(tmp_path):
    "Ten patients a class, four pictures each; a0 shares a picture with a1, a1 with b2, and nobody else shares any."
    for y, name in enumerate("ab"):
        for i in range(40): write(tmp_path / name / f"{name}{i // 4}_{i}.png", 10 + 100 * y + i)
    write(tmp_path / "a" / "a1_copy.png", 10)           # the first picture of a0
    write(tmp_path / "b" / "b2_copy.png", 14)           # the first picture of a1
    return tmp_path


@pytest.mark.parametrize("seed", range(8))
def test_patients_who_share_a_picture_are_split_as_one(tmp_path, seed):
    ds = load(chain(tmp_path), size=16, patient=r"(\w\d+)_", seed=seed)
    assert len(leaks(ds)) == 0 and ds.table["group"].nunique() == 20
    assert ds.table.loc[ds.table["group"].isin(["a0", "a1", "b2"]), "split"].nunique() == 1
    assert "3 patients share identical pictures and are split together, for instance a0 and a1" in repr(ds)


def test_patients_who_share_nothing_are_split_as_before(tmp_path):
    ds = load(folder_of(tmp_path), size=16, patient=r"(\w\d+)_")
    assert "identical pictures" not in repr(ds) and ds.table["split"].tolist() == split_by_group(ds.groups, ds.target()).tolist()


def test_a_picture_of_two_patients_in_two_given_splits_is_named(tmp_path):
    for s, base in {"train": 10, "test": 40}.items(): folder_of(tmp_path / s, 2, 2, base=base)
    for s in ("train", "test"):
        for p in (tmp_path / s).rglob("*.png"): p.rename(p.with_name(f"{s}{p.name}"))
    write(tmp_path / "test" / "a" / "other9_0.png", 10)
    with pytest.raises(MedxferError, match="test/a/other9_0.png and train/a/trainp0_0.png are the same picture"):
        load(tmp_path, size=16, patient=r"(\w+)_")


def test_a_patient_in_two_given_splits_is_named_whatever_the_name(tmp_path):
    for s, base in {"train": 10, "test": 40}.items():
        for name in "ab": write(tmp_path / s / name / f"image{name}_{s}.png", base + ord(name))
    with pytest.raises(MedxferError, match="are of the same patient 'imagea' in two splits"): load(tmp_path, size=16, patient=r"(\w+)_")


def draw_quickly(monkeypatch, cache):
    "Let the phantom be four black pictures of four patients, built into `cache`."
    columns = dict(id=list("abcd"), group=list("abcd"), scanner="C1", finding=["none", "cyst", "solid", "cyst"], diameter_mm=["", 3, 4, 5],
                   shape=["", "round", "oval", "round"], organ="liver", echo_grade="", spacing_mm=1)

    def build(modality, folder, **options):
        pd.DataFrame(columns).to_csv(folder / "table.csv", index=False)
        for name in ("images", "masks"): np.save(folder / f"{name}.npy", np.zeros((4, 8, 8), np.uint8))

    monkeypatch.setenv("MEDXFER_CACHE", str(cache))
    monkeypatch.setattr(datasets.phantom, "build_set", build)


def test_a_new_version_of_the_phantom_clears_the_old_one(tmp_path, monkeypatch):
    draw_quickly(monkeypatch, tmp_path)

    def version(name, **options):
        monkeypatch.setattr(datasets, "_code_key", lambda *modules: name)
        load("phantom/ct", size=32, **options)
        for manifest in (tmp_path / "phantom").glob("*/manifest.json"): os.utime(manifest, (0, 0))   # last opened long ago

    version("a" * 10, patients=2)
    version("b" * 10, patients=3)
    version("c" * 10, patients=2)
    names = sorted(f.name for f in (tmp_path / "phantom").glob("ct-seed*") if f.is_dir())
    assert names == ["ct-seed0-size32-patients2-cccccccccc", "ct-seed0-size32-patients3-bbbbbbbbbb"]


def test_unreadable_picture_is_named_and_the_rest_used(tmp_path, capsys):
    (folder_of(tmp_path) / "a" / "broken.png").write_bytes(b"nothing")
    assert len(load(tmp_path, size=32)) == 12
    assert "read 12 of 13" in (out := capsys.readouterr().out) and "broken.png" in out


def test_colour_and_gray_are_stacked_together(tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8) + 7).save(folder_of(tmp_path) / "a" / "colour.png")
    assert load(tmp_path, size=16).images.shape == (13, 16, 16, 3)


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "holds no picture"),
    (lambda p: folder_of(p, b=0), "at least two"),
    (lambda p: write(p / "loose.png", 3), "at least two"),
])
def test_useless_folders_are_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(MedxferError, match=words): load(tmp_path)


@pytest.mark.parametrize("name, near", [("phantom/ultrasnd", "phantom/ultrasound"), ("brestmnist", "breastmnist"), ("digit", "digits")])
def test_misspelt_names_suggest_the_nearest(name, near):
    with pytest.raises(MedxferError, match=near): load(name)


def test_every_two_dimensional_medmnist_set_has_a_name():
    names = set(list_datasets())
    assert {"pathmnist", "chestmnist", "organamnist", "retinamnist", "tissuemnist"} <= names and not any("3d" in n for n in names)


def test_missing_and_damaged_medmnist_files_say_what_to_do(tmp_path):
    with pytest.raises(MedxferError, match="missing.*download=True"): load("bloodmnist", root=tmp_path)
    (tmp_path / "bloodmnist.npz").write_bytes(b"not a zip")
    with pytest.raises(MedxferError, match="damaged"): load("bloodmnist", root=tmp_path)


def test_multilabel_medmnist_file(tmp_path):
    rng = np.random.default_rng(0)
    parts = {f"{s}_images": rng.integers(0, 255, (6, 28, 28), dtype=np.uint8) for s in ("train", "val", "test")}
    np.savez(tmp_path / "chestmnist.npz", **parts, **{f"{s}_labels": rng.integers(0, 2, (6, 14)) for s in ("train", "val", "test")})
    ds = load("chestmnist", root=tmp_path)
    assert ds.task.kind == "multilabel" and ds.target().shape == (18, 14) and ds.split("test").target().shape == (6, 14)


def test_full_disk_while_the_phantom_is_built_leaves_no_half(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))

    def full(modality, folder, **kwargs):
        (folder / "images.npy").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.phantom, "build_set", full)
    with pytest.raises(MedxferError, match="disk is full"): load("phantom/ct")
    assert not [p for p in (tmp_path / "phantom").iterdir() if p.is_dir()]


def test_every_medmnist_set_names_how_its_pictures_were_made():
    assert set(datasets._MODALITY) == set(medmnist_info())
    words = {"X-Ray": "X-ray", "ultrasound": "ultrasound", "(CT)": "CT", "dermatoscop": "skin", "fundus": "eye", "coherence": "eye",
             "histolog": "microscopy", "cells": "microscopy"}
    for flag, facts in medmnist_info().items():
        for word, modality in words.items():
            if word in facts["description"]: assert datasets._MODALITY[flag].startswith(modality), flag


def test_medmnist_keeps_its_modality(tmp_path):
    parts = {f"{s}_images": np.zeros((2, 28, 28), np.uint8) for s in ("train", "val", "test")}
    np.savez(tmp_path / "breastmnist.npz", **parts, **{f"{s}_labels": np.array([[0], [1]]) for s in ("train", "val", "test")})
    assert load("breastmnist", root=tmp_path).info.modality == "ultrasound"


# --- pictures with masks ---


def outlined(root, n=12, labels=True, sub=lambda i: ""):
    "Pictures of 40 x 50 with a square of 10 in every second one; two pictures a patient; pixels of 0.8 mm."
    rows = []
    for i in range(n):
        name, mask = f"{sub(i)}p{i // 2}_{i}.png", np.zeros((40, 50), np.uint8)
        write(root / "images" / name, 10 + i)
        if i % 2: mask[10:20, 5 + i:15 + i] = 255
        (root / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / name)
        rows.append(dict(id=name, group=f"p{i // 2}", spacing_mm=0.8, finding=["none", "cyst"][i % 2], size_mm=8.0 if i % 2 else None))
    if labels: pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


def put(root, name, mask): Image.fromarray(mask).save(root / "masks" / name)


def relabel(root, **columns):
    pd.read_csv(root / "labels.csv", keep_default_na=False).assign(**columns).to_csv(root / "labels.csv", index=False)


def test_masks_are_read_beside_their_pictures(tmp_path):
    ds = load(outlined(tmp_path), size=50)
    assert list(ds.tasks) == ["finding", "size_mm", "mask"] and ds.task.classes == ("cyst", "none") and ds.tasks["size_mm"].unit == "mm"
    for row, mask in zip(ds.table.itertuples(), ds.masks):
        i = int(row.id[:-4].split("_")[1])
        expected = np.zeros((50, 50), np.uint8)                                   # five rows of border above and below
        if i % 2: expected[15:25, 5 + i:15 + i] = 1
        np.testing.assert_array_equal(mask, expected)
    assert ds.table["group"].nunique() == 6 and (ds.table["spacing_mm"] == 0.8).all() and np.isnan(ds.target("size_mm")).sum() == 6


def test_spacing_and_area_survive_a_resize(tmp_path):
    ds = load(outlined(tmp_path), size=25)
    assert np.allclose(ds.table["spacing_mm"], 1.6)
    area = ds.masks.sum((1, 2)) * ds.table["spacing_mm"] ** 2
    assert np.allclose(area[ds.target() == 0], 64, rtol=0.25) and (area[ds.target() == 1] == 0).all()


def test_a_missing_mask_is_unknown_and_an_empty_one_is_an_answer(tmp_path):
    outlined(tmp_path, labels=False)
    for name in ("p0_0.png", "p0_1.png"): (tmp_path / "masks" / name).unlink()
    ds = load(tmp_path, size=50, patient=r"(p\d+)_")
    unknown = ds.table["id"].isin(["p0_0.png", "p0_1.png"]).to_numpy()
    assert (ds.masks[unknown] == UNKNOWN).all() and (ds.masks[~unknown] <= 1).all() and "2 pictures have no mask" in repr(ds)
    assert list(ds.tasks) == ["mask"] and len(ds.labelled()) == 10 and np.array_equal(ds.known, ~unknown)
    with pytest.raises(MedxferError, match="n=12"): ds.few(12)


def test_a_word_for_a_picture_that_nobody_has_outlined_is_no_contradiction(tmp_path):
    (outlined(tmp_path) / "masks" / "p0_1.png").unlink()
    ds = load(tmp_path, size=50)
    row = ds.table["id"].tolist().index("p0_1.png")
    assert ds.task.classes[ds.target()[row]] == "cyst" and (ds.masks[row] == UNKNOWN).all()


def test_patients_stay_together_with_masks_too(tmp_path):
    ds = load(outlined(tmp_path, 40), size=32)
    assert set(ds.table["split"]) == {"train", "val", "test"} and ds.table.groupby("group")["split"].nunique().max() == 1 and len(leaks(ds)) == 0


def test_sub_folders_are_classes_and_splits(tmp_path):
    ds = load(outlined(tmp_path / "a", labels=False, sub=lambda i: ["normal/", "benign/"][i % 2]), size=32)
    assert ds.task == Task("label", "binary", ("benign", "normal")) and ds.target().sum() == 6
    ds = load(outlined(tmp_path / "b", labels=False, sub=lambda i: f"{['train', 'test'][i // 6]}/{['normal', 'benign'][i % 2]}/"), size=32)
    assert ds.table["split"].value_counts().to_dict() == {"train": 6, "test": 6} and ds.task.classes == ("benign", "normal")


def test_masks_of_0_and_1_of_another_ending_and_in_numpy(tmp_path):
    root = outlined(tmp_path)
    mask = np.array(Image.open(root / "masks" / "p0_1.png"))
    (root / "masks" / "p0_1.png").unlink()
    np.save(root / "masks" / "p0_1.npy", mask > 0)
    put(root, "p1_3.png", np.array(Image.open(root / "masks" / "p1_3.png")) // 255)
    ds = load(root, size=50)
    assert ds.masks[ds.table["id"].isin(["p0_1.png", "p1_3.png"])].sum((1, 2)).tolist() == [100, 100]


def test_given_splits_and_missing_answers(tmp_path):
    relabel(outlined(tmp_path), split=["train"] * 8 + ["val"] * 2 + ["test"] * 2, finding=["", "cyst"] + ["none", "cyst"] * 5, sick=[0, 1] * 6)
    ds = load(tmp_path, size=32)
    assert ds.table["split"].tolist() == ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    assert (ds.target() == -1).sum() == 1 and ds.tasks["sick"].classes == ("0", "1") and ds.target("sick").sum() == 6


def test_pictures_without_a_row_keep_their_mask(tmp_path):
    root = outlined(tmp_path)
    pd.read_csv(root / "labels.csv").drop(columns="group").iloc[:8].to_csv(root / "labels.csv", index=False)
    ds = load(root, size=50, patient=r"(p\d+)_")
    assert len(ds) == 12 and (ds.target() == -1).sum() == 4 and ds.masks.sum() == 600 and ds.table["group"].nunique() == 6


def test_a_mask_that_fills_its_picture_leaves_the_border_out(tmp_path):
    put(outlined(tmp_path), "p0_1.png", np.full((40, 50), 255, np.uint8))
    ds = load(tmp_path, size=50)
    assert ds.masks[ds.table["id"] == "p0_1.png"].sum() == 40 * 50


def test_a_damaged_picture_is_left_out_with_its_mask(tmp_path, capsys):
    (outlined(tmp_path) / "images" / "p0_1.png").write_bytes(b"nothing")
    ds = load(tmp_path, size=50)
    assert len(ds) == 11 and ds.masks.sum() == 500 and "p0_1.png" in capsys.readouterr().out


def csv(root, text): (root / "labels.csv").write_text(text)
def same_name(root): np.save(root / "images" / "p0_0.npy", np.zeros((40, 50), np.uint8))


@pytest.mark.parametrize("spoil, words", [
    (lambda r: put(r, "p0_1.png", np.zeros((50, 40), np.uint8)), r"p0_1.png has the shape \(50, 40\) and its picture \(40, 50\)"),
    (lambda r: put(r, "p0_1.png", np.full((40, 50), 7, np.uint8)), r"p0_1.png holds \[7\]"),
    (lambda r: put(r, "p0_1.png", np.tile(np.uint8([0, 128, 255, 3, 9]), (40, 10))), "p0_1.png holds .* save it as PNG"),
    (lambda r: (r / "masks" / "p0_1.png").write_bytes(b"nothing"), "cannot read .*masks.*p0_1.png"),
    (lambda r: put(r, "other.png", np.zeros((40, 50), np.uint8)), "other.png is the mask of no picture"),
    (lambda r: put(r, "p0_0.png", np.full((40, 50), 255, np.uint8)), "p0_0.png: its finding is 'none', but something is outlined"),
    (lambda r: put(r, "p0_1.png", np.zeros((40, 50), np.uint8)), "p0_1.png: its finding is 'cyst', but the mask is empty"),
    (lambda r: relabel(r, finding=[1, 0] * 6), "p0_0.png: its finding is '1', but the mask is empty"),
    (lambda r: put(r, "p0_1.png", np.eye(40, 50, 3, dtype=np.uint8) * (np.arange(50) == 5)), "p0_1.png is lost at size=20"),
    (same_name, "p0_0.* and .*p0_0.* have one name"),
    (lambda r: [p.unlink() for p in (r / "masks").iterdir()], "masks holds no picture"),
    (lambda r: shutil.rmtree(r / "images"), "images holds no picture"),
    (lambda r: csv(r, "name,finding\na,1\n"), "no column 'id'"),
    (lambda r: csv(r, "id,finding\np0_2.png,none\n"), "unknown picture in .*labels.csv 'p0_2.png'; did you mean"),
    (lambda r: csv(r, "id,finding\np0_0.png,none\np0_0.png,none\n"), "two rows for p0_0.png"),
    (lambda r: csv(r, ""), "cannot read .*labels.csv"),
    (lambda r: relabel(r, group=[""] + ["p"] * 11), "has no group for p0_0.png"),
    (lambda r: relabel(r, split="trian"), "unknown split in .*labels.csv 'trian'; did you mean 'train'"),
    (lambda r: relabel(r, split=["train", "test"] * 6), "of the same patient 'p0' in two splits"),
])
def test_a_spoilt_set_with_masks_is_refused(tmp_path, spoil, words):
    spoil(outlined(tmp_path))
    with pytest.raises(MedxferError, match=words): load(tmp_path, size=20)


def test_a_label_is_given_once(tmp_path):
    root = outlined(tmp_path, sub=lambda i: ["normal/", "benign/"][i % 2])
    relabel(root, label="x")
    with pytest.raises(MedxferError, match="both labels.csv and the folders below images give a label"): load(root, size=20)


def test_a_word_that_denies_nothing_is_no_contradiction(tmp_path):
    relabel(outlined(tmp_path), finding=["cyst", "solid"] * 6)         # no class says that there is nothing
    assert len(load(tmp_path, size=20)) == 12


# --- MURA's tree ---


def tree(root, train=20, valid=6, parts=("WRIST", "ELBOW")):
    "A patient has two studies of each body part, one positive and one negative, of two views each; every picture is of its own."
    value = 0
    for n in range(train + valid):
        side = "train" if n < train else "valid"
        for part in parts:
            for study, word in enumerate(("positive", "negative"), 1):
                for view in (1, 2):
                    picture = np.zeros((20, 16), np.uint8)
                    picture[0, :2] = divmod(value := value + 1, 256)
                    path = root / side / f"XR_{part}" / f"patient{n + 1:05d}" / f"study{study}_{word}" / f"image{view}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
    return root


def test_mura_tells_all_by_its_paths(tmp_path):
    ds = load(tree(tmp_path / "MURA-v1.1"), size=20)
    row = ds.table.set_index("id").loc["train/XR_WRIST/patient00001/study1_positive/image2.png"]
    assert row[["group", "abnormal", "body_part", "study"]].tolist() == ["patient00001", 1, "wrist", "XR_WRIST/patient00001/study1_positive"]
    assert len(ds) == 208 and ds.target().sum() == 104 and ds.table["study"].nunique() == 104
    assert ds.task == Task("abnormal", "binary", ("normal", "abnormal"))


def test_mura_s_valid_is_the_test_part_and_val_comes_from_train(tmp_path):
    table = load(tree(tmp_path), size=20).table
    assert set(table.loc[table["id"].str.startswith("valid/"), "split"]) == {"test"}
    assert table[table["id"].str.startswith("train/")].groupby("split")["group"].nunique().to_dict() == {"train": 17, "val": 3}
    assert table.groupby("group")["split"].nunique().max() == 1


def test_patients_of_mura_who_share_a_picture_are_on_one_side(tmp_path):
    tree(tmp_path)
    for n in range(2, 21): shutil.copy(tmp_path / "train/XR_WRIST/patient00001/study1_positive/image1.png",
                                       tmp_path / f"train/XR_WRIST/patient{n:05d}/study1_positive/copy.png")
    table = load(tmp_path, size=20).table
    assert table[table["id"].str.startswith("train/")]["split"].nunique() == 1       # all twenty are one


def test_validation_patients_of_mura_are_the_same_for_every_body_part(tmp_path):
    shutil.rmtree(tree(tmp_path) / "train/XR_ELBOW/patient00001")
    home = load(tmp_path, size=20).table.groupby("group")["split"].first()
    for part in ("elbow", "wrist"):
        table = load(tmp_path, size=20, body_part=part).table
        assert table["split"].tolist() == home[table["group"]].tolist() and set(table["split"]) == {"train", "val", "test"}


def test_mura_by_body_part_and_what_stands_beside_the_pictures(tmp_path):
    tree(tmp_path)
    (tmp_path / "train_image_paths.csv").write_text("not needed")
    (tmp_path / "train/XR_WRIST/patient00001/study1_positive/._image1.png").write_bytes(b"left by a Mac")
    ds = load(tmp_path, body_part="wrist", size=20)
    assert set(ds.table["body_part"]) == {"wrist"} and len(ds) == 104


def test_an_unreadable_view_of_mura_is_left_out(tmp_path, capsys):
    bad = tree(tmp_path) / "train/XR_ELBOW/patient00002/study2_negative/image1.png"
    bad.write_bytes(b"nothing")
    ds = load(tmp_path, size=20)
    assert len(ds) == 207 and "image1.png" in capsys.readouterr().out
    values = ds.images[:, 0, 2].astype(int) * 256 + ds.images[:, 0, 3]              # 20 x 16 is padded by two columns on each side
    assert len(set(values)) == 207 and all(f"patient{(v - 1) // 8 + 1:05d}" == g for v, g in zip(values, ds.groups))


def test_only_one_side_of_mura_s_tree(tmp_path):
    shutil.rmtree(tree(tmp_path / "a") / "train")
    assert set(load(tmp_path / "a", size=20).table["split"]) == {"test"}
    shutil.rmtree(tree(tmp_path / "b") / "valid")
    assert set(load(tmp_path / "b", size=20).table["split"]) == {"train", "val"}


def unclear(root): (root / "train/XR_WRIST/patient00003/study1_positive").rename(root / "train/XR_WRIST/patient00003/study1_unclear")
def loose(root): shutil.copy(root / "train/XR_WRIST/patient00003/study1_positive/image1.png", root / "train/XR_WRIST/image1.png")


@pytest.mark.parametrize("spoil, options, words", [
    (unclear, {}, "train/XR_WRIST/patient00003/study1_unclear/image1.png ends in neither _positive nor _negative"),
    (loose, {}, "train/XR_WRIST/image1.png does not lie in a study; expected MURA's tree"),
    (lambda root: shutil.rmtree(root / "train/XR_WRIST"), dict(body_part="knee"), "unknown body part 'knee'; known: elbow, wrist"),
    (lambda root: None, dict(body_part="wirst"), "did you mean 'wrist'"),
])
def test_a_spoilt_tree_of_mura_is_refused(tmp_path, spoil, options, words):
    spoil(tree(tmp_path))
    with pytest.raises(MedxferError, match=words): load(tmp_path, size=20, **options)


def test_a_tree_of_mura_without_pictures_is_refused(tmp_path):
    (tmp_path / "train" / "XR_WRIST" / "patient00001").mkdir(parents=True)
    with pytest.raises(MedxferError, match="holds no picture; expected MURA's tree"): load(tmp_path)


# --- studies ---


def test_by_study_is_the_mean_of_the_views(tmp_path):
    test = load(tree(tmp_path), size=20).split("test")
    p = np.random.default_rng(0).dirichlet((1, 1), len(test))
    studies = by_study(p, test)
    for name, row in studies.iterrows():
        views = [i for i, s in enumerate(test.table["study"]) if s == name]
        assert row["views"] == len(views) == 2 and row["group"] in name and row["y"] == name.endswith("positive")
        assert np.allclose(row[["normal", "abnormal"]].astype(float), sum(p[i] for i in views) / 2)
    assert len(studies) == 24 and np.array_equal(by_study(p.tolist(), test), studies)


def test_by_study_refuses_what_it_cannot_put_together(tmp_path):
    ds = load(tree(tmp_path, 4, 1), size=20)
    with pytest.raises(MedxferError, match="has the shape"): by_study(np.ones((3, 2)), ds)
    with pytest.raises(MedxferError, match="no column 'study'"): by_study(np.ones((5000, 10)), load("digits"))
    ds.table.loc[0, "abnormal"] = 1 - ds.table.loc[0, "abnormal"]
    with pytest.raises(MedxferError, match="differ in their answers"): by_study(np.ones((len(ds), 2)), ds)


def test_the_phantom_s_coarse_answer_follows_from_the_fine_one(monkeypatch, tmp_path):
    draw_quickly(monkeypatch, tmp_path)
    ds = load("phantom/ct")
    assert ds.target("finding").tolist() == [0, 1, 2, 1] and ds.target("lesion").tolist() == [0, 1, 1, 1]
    assert np.array_equal(coarse_target(ds.tasks["finding"], ds.target("finding")), ds.coarsened("finding", "lesion").target())
