"""The made-up patients: real layouts, the same from the same seed, and nothing that brightness alone would solve."""
import csv
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import phantom  # noqa: E402
from common import BadInput  # noqa: E402

FEW = dict(amos=(4, 2), brats=2, deeplesion=48, nodule=(90, 5, 5), ricord=(2, 1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """part -> folder, of fewer patients than `small` has, made in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(phantom.COUNTS, "small", FEW)
        yield phantom.write_phantom(tmp_path_factory.mktemp("phantom"), workers=1)


def threshold_accuracy(value, label):
    """Best accuracy of a cut on one number: what a classifier would reach that sees nothing else."""
    value, label = np.asarray(value), np.asarray(label)
    cuts = [(value > c) == label for c in value]
    return max(max(c.mean(), 1 - c.mean()) for c in cuts)


def test_same_seed_same_bytes_with_any_workers(made, tmp_path):
    again = phantom.write_phantom(tmp_path / "a", parts=("brats", "ricord"), workers=2)
    other = phantom.write_phantom(tmp_path / "b", parts=("brats",), seed=1, workers=1)["brats"]
    for part in again:
        files = sorted(made[part].rglob("*.nii.gz"))
        assert len(files) == {"brats": 10, "ricord": 5}[part]
        for f in files:
            assert f.read_bytes() == (again[part] / f.relative_to(made[part])).read_bytes()
    f = next(made["brats"].rglob("*-t1n.nii.gz")).relative_to(made["brats"])
    assert (other / f).read_bytes() != (made["brats"] / f).read_bytes()


def test_keeps_what_is_there_and_refuses_another_phantom(made):
    f = next(made["amos"].rglob("*.nii.gz"))
    before = f.stat().st_mtime_ns
    phantom.write_phantom(made["amos"].parent, parts=("amos",), workers=1)
    assert f.stat().st_mtime_ns == before
    assert not [g for folder in made.values() for g in folder.rglob(".*")]
    with pytest.raises(BadInput, match="seed"):
        phantom.write_amos(made["amos"].parent, seed=9)
    with pytest.raises(BadInput, match="liver"):
        phantom.write_phantom(made["amos"].parent, parts=("liver",))


def test_amos_layout(made):
    about = json.loads((made["amos"] / "dataset.json").read_text())
    assert about["labels"]["15"] == "prostate/uterus" and len(about["labels"]) == 16
    assert len(about["training"]) == about["numTraining"] == 4 and len(about["validation"]) == 2
    codes, inters = set(), set()
    for pair in about["training"] + about["validation"]:
        image, label = (nib.load(made["amos"] / pair[k]) for k in ("image", "label"))
        assert image.shape == label.shape and min(image.shape) >= 64
        assert np.array_equal(image.affine, label.affine) and image.header["qform_code"] == image.header["sform_code"] == 1
        assert np.allclose(image.get_qform(), image.affine, atol=1e-3)
        organ, hu = np.asarray(label.dataobj), image.get_fdata()
        assert set(np.unique(organ)) == set(range(16)), pair
        assert image.get_data_dtype() == np.int16 and -1024 <= hu.min() < -990
        assert abs(np.median(hu[hu < -900]) + 1000) < 30  # air, once slope and intercept are applied
        codes.add(nib.aff2axcodes(image.affine))
        inters.add(float(image.dataobj.inter))
    assert len(codes) >= 4 and inters == {0.0, -1024.0}


def test_organs_lie_where_they_lie():
    """In RAS+: liver on the right of the spleen, aorta left of the cava, bladder below the kidneys, spine at the back."""
    hu, organ = phantom.abdomen(np.random.default_rng(5), (76, 76, 70), (5.0, 5.0, 5.5))
    at = {name: np.argwhere(organ == i).mean(0) for i, name in enumerate(phantom.ORGANS)}
    assert at["liver"][0] > at["stomach"][0] > at["spleen"][0]
    assert at["right kidney"][0] > at["postcava"][0] > at["aorta"][0] > at["left kidney"][0]
    assert at["bladder"][2] < at["duodenum"][2] < at["liver"][2] and at["prostate/uterus"][2] < at["left kidney"][2]
    assert at["right adrenal gland"][2] > at["right kidney"][2] and at["gall bladder"][2] < at["liver"][2]
    assert np.argwhere((hu > 400) & (np.abs(np.arange(76) - 38)[:, None, None] < 5))[:, 1].mean() < at["aorta"][1] < at["stomach"][1]


def test_patients_differ_by_more_than_scaling():
    """Each organ's centre, relative to the hull of all organs: a scaling (and a shift) would leave it unchanged."""
    def layout(seed):
        _, organ = phantom.abdomen(np.random.default_rng(seed), (70, 70, 66), (5.0, 5.0, 6.0))
        c = np.array([np.argwhere(organ == i).mean(0) for i in range(1, 16)])
        return (c - c.mean(0)) / c.std(0), np.array([(organ == i).sum() for i in range(1, 16)]) / (organ > 0).sum()
    (a, size_a), (b, size_b) = layout(1), layout(2)
    assert np.abs(a - b).max() > 0.15
    assert np.exp(np.abs(np.log(size_a / size_b))).max() > 1.2


def test_brats_layout(made):
    for case in sorted(made["brats"].glob("BraTS-GLI-*")):
        images = {c: nib.load(case / f"{case.name}-{c}.nii.gz") for c in (*phantom.CONTRASTS, "seg")}
        data = {c: np.asarray(i.dataobj) for c, i in images.items()}
        assert len({i.shape for i in images.values()}) == 1 and min(data["seg"].shape) >= 40
        assert all(np.array_equal(i.affine, images["seg"].affine) and i.get_data_dtype() == np.int16 for i in images.values())
        brain = data["t1n"] > 0
        assert 0.15 < brain.mean() < 0.6
        assert all(np.array_equal(data[c] > 0, brain) for c in phantom.CONTRASTS) and not data["seg"][~brain].any()
        seg = data["seg"]
        assert set(np.unique(seg)) <= {0, 1, 2, 3} and (seg == 2).sum() > 50 and (seg == 3).sum() > 20
        rest = brain & (seg == 0)
        ratio = {c: data[c][seg == 3].mean() / data[c][rest].mean() for c in ("t1n", "t1c")}
        assert ratio["t1c"] > 1.3 * ratio["t1n"] and ratio["t1n"] < 1.1  # the ring lights up with contrast agent only
        assert data["t2f"][seg == 2].mean() > 1.25 * data["t2f"][rest].mean()


def test_deeplesion_layout_and_boxes(made):
    with open(made["deeplesion"] / "DL_info.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert len(header) == 18 and [header[i] for i in (0, 6, 9, 11)] == ["File_name", "Bounding_boxes", "Coarse_lesion_type", "Slice_range"]
    patients, per_patient = {t: set() for t in (-1, *range(1, 9))}, {}
    for r in rows:
        patients[int(r[9])].add(r[1])
        per_patient[r[1]] = per_patient.get(r[1], 0) + 1
    assert all(len(patients[t]) >= 10 for t in range(1, 9)) and len(patients[-1]) >= 3
    assert set(per_patient.values()) == {1, 2, 3}
    for i in (0, 3, 5, 14):  # a lesion of every type, and a patient with three
        hu, spacing, lesions = phantom.deeplesion_scan(i, "small", 0)
        mine = [r for r in rows if int(r[1]) == i + 1]
        assert [int(r[9]) for r in mine] == [t for t, _ in lesions]
        for r, (_, mask) in zip(mine, lesions):
            first, last = map(int, r[11].split(", "))
            stem, key = r[0].removesuffix(".png").rsplit("_", 1)
            image = nib.load(made["deeplesion"] / "Images_nifti" / f"{stem}_{first:03d}-{last:03d}.nii.gz")
            assert image.shape == hu.shape and image.shape[2] == last - first + 1 and first <= int(key) == int(r[4]) <= last
            assert np.array_equal(np.asarray(image.dataobj), hu)
            assert np.allclose(image.affine[:3, :3], [[0, -spacing[0], 0], [-spacing[1], 0, 0], [0, 0, -spacing[2]]])
            x1, y1, x2, y2 = map(float, r[6].split(", "))
            y, x = np.nonzero(mask[:, :, int(key) - first])
            assert x1 <= x.min() and x.max() < x2 and y1 <= y.min() and y.max() < y2  # x: column, y: row
            assert (x2 - x1) * (y2 - y1) < 6 * len(x)


def test_brightness_does_not_tell_lesions_apart():
    means = {t: [] for t in range(1, 9)}
    for i in range(16):
        hu, _, lesions = phantom.deeplesion_scan(i, "small", 3)
        for t, mask in lesions:
            if t > 0:
                means[t].append(hu[mask].mean())
    value = np.concatenate(list(means.values()))
    label = np.repeat(list(means), [len(v) for v in means.values()])
    order = label[np.argsort(value)]  # one nearest neighbour on the mean alone, of eight types
    assert np.mean([order[i] in (order[i - 1], order[i + 1]) for i in range(1, len(order) - 1)]) < 0.6


def test_nodules(made):
    with np.load(made["nodule"] / "nodulemnist3d.npz") as f:
        data = dict(f)
    assert set(data) == {f"{s}_{k}" for s in ("train", "val", "test") for k in ("images", "labels")}
    x, y = data["train_images"], data["train_labels"]
    assert x.shape == (90, 28, 28, 28) and x.dtype == np.uint8 and y.shape == (90, 1) and y.dtype == np.uint8
    assert 0.3 < y.mean() < 0.6
    for edge in (0, 6, 10):  # the mean of the cube and of its middle
        middle = x[:, edge:28 - edge, edge:28 - edge, edge:28 - edge].mean((1, 2, 3))
        assert threshold_accuracy(middle, y[:, 0]) < 0.72
    small, large = phantom.nodule(np.random.default_rng(1), 1, (28, 56))
    halved = large.reshape(28, 2, 28, 2, 28, 2).mean((1, 3, 5))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.95  # the same nodule at both sizes


def test_ricord_lists_and_brightness(made):
    lists = [[line.split() for line in (made["ricord"] / f"{s}.txt").read_text().splitlines()] for s in ("train", "val", "test")]
    assert [len(v) for v in lists] == [2, 1, 2]
    files = [f for v in lists for f, _ in v]
    assert len(set(files)) == 5 and all((made["ricord"] / f).exists() for f in files)
    assert {label for v in lists for _, label in v} == {"0", "1"}


def test_opacities_do_not_change_the_mean_of_the_lungs():
    means, edges = [], []
    for i in range(4):
        for sick in (0, 1):
            rng = np.random.default_rng([i, sick])
            hu, lung = phantom.chest(rng, (66, 66, 40), (5.4, 5.4, 7.0))
            before = hu.copy()
            phantom.opacities(rng, hu, lung, (5.4, 5.4, 7.0), sick)
            assert np.array_equal(hu[~lung], before[~lung])
            means.append(hu[lung].mean())
            edges.append(np.std((hu - before)[lung]))
    assert max(means) < -700 and abs(np.mean(means[::2]) - np.mean(means[1::2])) < 40
    assert min(edges[1::2]) > 3 * max(edges[::2])  # but there are patches


def test_picture(made, tmp_path):
    phantom.draw({p: made[p] for p in ("amos", "nodule")}, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 20_000
