"""Made-up patients: the real layouts, the same from the same seed, not to be told by brightness."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_opening

import phantom
from common import BadInput

FEW = {"amos": (2, 1), "brats": (2,), "deeplesion": (8,), "nodule": (60, 3, 3), "ricord": (2, 1, 1)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with fewer patients than usual, made in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(phantom, "COUNTS", FEW)
        root = tmp_path_factory.mktemp("phantom")
        phantom.write_phantom(root, workers=1)
        yield root


def arrays(*paths):
    """The voxels of NIfTI files, [X, Y, Z] in RAS+."""
    return [np.asarray(nib.as_closest_canonical(nib.load(p)).dataobj) for p in paths]


def test_same_seed_same_bytes_with_any_workers(home, tmp_path):
    parts = ("brats", "nodule", "ricord")
    phantom.write_phantom(tmp_path / "a", parts, workers=2)
    phantom.write_phantom(tmp_path / "b", ["brats"], seed=1, workers=2)
    files = [f.relative_to(home) for part in parts for f in (home / part).rglob("*.*")]
    assert len(files) == 21
    for f in files:
        assert (home / f).read_bytes() == (tmp_path / "a" / f).read_bytes()
        if f.parts[0] == "brats":
            assert (home / f).read_bytes() != (tmp_path / "b" / f).read_bytes()


def test_keeps_what_is_there_and_refuses_another_phantom(home):
    gone, kept, *_ = sorted((home / "brats").rglob("*.nii.gz"))
    table = home / "deeplesion/DL_info.csv"
    before, times = gone.read_bytes(), [f.stat().st_mtime for f in (kept, table)]
    gone.unlink()
    phantom.write_phantom(home, ("brats", "deeplesion"), workers=1)
    assert gone.read_bytes() == before
    assert times == [f.stat().st_mtime for f in (kept, table)]
    with pytest.raises(BadInput, match="'seed': 9"):
        phantom.write_phantom(home, ["amos"], seed=9)
    with pytest.raises(BadInput, match="liver"):
        phantom.write_phantom(home, ["liver"])


def test_amos(home):
    about = json.loads((home / "amos/dataset.json").read_text())
    assert about["labels"]["15"] == "prostate/uterus" and len(about["labels"]) == 16
    assert len(about["training"]) == 2 and len(about["validation"]) == 1
    for pair in about["training"] + about["validation"]:
        image, organs = (home / "amos" / pair[k] for k in ("image", "label"))
        assert np.array_equal(nib.load(image).affine, nib.load(organs).affine)
        hu, codes = arrays(image, organs)
        assert hu.min() == -1024 and abs(np.median(hu[hu < -900]) + 1000) < 30
        assert {*np.unique(codes)} == {*range(16)}
        orders = (
            (0, "right kidney, postcava, aorta, left kidney, spleen"),  # from the right
            (1, "gall bladder, pancreas, aorta, left kidney"),  # from the front
            (2, "left adrenal gland, left kidney, bladder, prostate/uterus"),  # from the head
        )
        for axis, order in orders:
            numbers = [list(phantom.LOOKS).index(name) for name in order.split(", ")]
            at = [np.argwhere(codes == k)[:, axis].mean() for k in numbers]
            assert at == sorted(at, reverse=True)


def test_brats(home):
    for case in (home / "brats").glob("BraTS-GLI-*"):
        kinds = ("seg", "t1n", "t1c", "t2w", "t2f")
        seg, *contrasts = arrays(*(case / f"{case.name}-{kind}.nii.gz" for kind in kinds))
        brain = contrasts[0] > 0
        assert 0.15 < brain.mean() < 0.6
        assert not seg[~brain].any() and {*np.unique(seg)} == {0, 1, 2, 3}
        assert all(np.array_equal(c > 0, brain) for c in contrasts)
        t1n, t1c, _, t2f = (c / c[brain & (seg == 0)].mean() for c in contrasts)
        assert t1c[seg == 3].mean() > 1.3 * t1n[seg == 3].mean()  # it takes up contrast agent
        assert t2f[seg == 2].mean() > 1.25


def test_lesions_lie_in_their_boxes_and_do_not_differ_in_brightness(home, tmp_path, monkeypatch):
    with open(home / "deeplesion/DL_info.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header[6:12:3] == ["Bounding_boxes", "Coarse_lesion_type"] and len(header) == 18
    masks, paint = [], phantom.lesion
    monkeypatch.setattr(phantom, "lesion", lambda *a: masks.append(paint(*a)) or masks[-1])
    for i in range(8):
        phantom.write_patient("deeplesion", tmp_path, 0, i)
    means = []
    for row, mask in zip(rows, masks, strict=True):
        first, last = map(int, row[11].split(", "))
        stem, key = row[0].removesuffix(".png").rsplit("_", 1)
        path = home / f"deeplesion/Images_nifti/{stem}_{first:03d}-{last:03d}.nii.gz"
        hu = nib.load(path).get_fdata()
        mask = np.flip(mask).transpose(1, 0, 2)
        assert hu.shape == mask.shape == (*mask.shape[:2], last - first + 1)
        y, x = np.nonzero(mask[:, :, int(key) - first])  # rows, columns
        box = [x.min() - 1, y.min() - 1, x.max() + 2, y.max() + 2]
        assert box == [int(v) for v in row[6].split(", ")]
        means.append(hu[mask].mean())
    types = np.array([row[9] for row in rows])[np.argsort(means)]
    assert {*types} == {"-1", *"12345678"}
    assert np.mean(types[1:] == types[:-1]) < 0.4


def test_nodules_differ_in_shape_and_not_in_grey_levels(home):
    with np.load(home / "nodule/nodulemnist3d.npz") as f:
        assert {*f} == {f"{s}_{k}" for s in phantom.SPLITS for k in ("images", "labels")}
        x, y = f["train_images"], f["train_labels"]
    assert x.shape == (60, 28, 28, 28) and y.shape == (60, 1)
    flat, y = x.reshape(60, -1), y[:, 0] == 1
    for values in (flat.mean(1), flat.std(1)):
        hits = (values > values[:, None]) == y
        assert max(hits.mean(1).max(), 1 - hits.mean(1).min()) < 0.72  # at the best threshold
    bright = x[:, 5:23, 5:23, 5:23] > 110
    thin = np.array([1 - binary_opening(v).sum() / v.sum() for v in bright])
    assert thin[y].mean() > 1.3 * thin[~y].mean()


def test_ricord(home):
    lines = [(home / f"ricord/{split}.txt").read_text().split() for split in phantom.SPLITS]
    assert [v[1::2] for v in lines] == [["0", "1"], ["0"], ["1"]]
    assert all((home / "ricord" / f).exists() for v in lines for f in v[::2])
    rng = np.random.default_rng(1)
    for sick in (0, 1):
        canvas, _ = phantom.trunk(rng, (60, 60, 30), 447, 290)
        before, lung = canvas.image.copy(), canvas.where("lung")
        phantom.opacities(rng, canvas, sick)
        change = (canvas.image - before)[0]
        assert not change[~lung].any() and (change[lung].std() > 30) == sick
        assert -831 < canvas.image[0][lung].mean() < -749
