"""eval.py: surface scores against brute force, predictions on odd grids, and what its sub-commands write."""
import csv
import json
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import eval as ev
from common import BadInput, place, save_checkpoint
from model import CLS_FORMAT, SEGMENTER, SIZES, Classifier, Config, Model, Segmenter
from serialize import read_scan


@pytest.fixture
def go(monkeypatch, capsys):
    """go("seg", "--ckpt", …): eval.main() in this process; what it printed."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        ev.main()
        return capsys.readouterr().out
    return run


# ---------------------------------------------------------------- scores


def surface_by_hand(mask):
    """Voxels of a mask with a face neighbour that is not in it, or that lies beyond the volume."""
    padded, found = np.pad(mask, 1), []
    for x, y, z in np.argwhere(mask):
        c = np.array([x, y, z]) + 1
        if not all(padded[tuple(c + s * np.eye(3, dtype=int)[a])] for a in range(3) for s in (1, -1)):
            found.append((x, y, z))
    return np.array(found)


@pytest.mark.parametrize("seed", range(6))
def test_scores_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape, spacing, tolerances = rng.integers(5, 11, 3), rng.uniform(0.4, 4, 3), rng.uniform(0.5, 4, 3)
    truth = rng.integers(0, 4, shape)
    truth[:, :2] = truth[:, :2] * 0 + rng.integers(1, 4)                               # a solid part: voxels that are no surface
    found = np.where(rng.random(shape) < 0.7, truth, rng.integers(0, 4, shape))
    scores = ev.score_case(found.astype(np.uint8), truth.astype(np.uint8), spacing, tolerances)
    for k in range(1, 4):
        a, b = found == k, truth == k
        p, q = (surface_by_hand(m) * spacing for m in (a, b))
        assert len(q) < b.sum() or k != truth[0, 0, 0]
        d = np.sqrt(((p[:, None] - q) ** 2).sum(-1))
        to_b, to_a = d.min(1), d.min(0)
        nsd = ((to_b <= tolerances[k - 1]).sum() + (to_a <= tolerances[k - 1]).sum()) / (len(p) + len(q))
        hd95 = max(np.percentile(to_b, 95), np.percentile(to_a, 95))
        expected = [2 * (a & b).sum() / (a.sum() + b.sum()), nsd, hd95, (a.sum() - b.sum()) * spacing.prod() / 1000]
        assert np.allclose(scores[k - 1], expected, rtol=0, atol=1e-6)


def test_a_shift_is_measured_in_millimetres():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[4:10, 5:9, 3:12] = 1
    found = np.roll(truth, 2, 2)
    dice, nsd, hd95, error = ev.score_case(found, truth, (1, 1, 2.5), [5.0])[0]
    assert (dice, nsd, hd95, error) == (pytest.approx(7 / 9), 1, 5.0, 0)
    assert ev.score_case(found, truth, (1, 1, 2.5), [4.9])[0, 1] < 1


def test_the_rule_for_empty_classes():
    truth, found = np.zeros((2, 6, 6, 6), np.uint8)
    truth[1, 1, 1:4], found[4, 4, 4] = 1, 2
    found[0, 0, 0] = truth[0, 0, 0] = 4
    scores = ev.score_case(found, truth, (1, 1, 1), [1.0] * 4)
    assert scores[0, :2].tolist() == [0, 0] and np.isnan(scores[0, 2]) and scores[0, 3] == pytest.approx(-0.003)      # in the truth only
    assert scores[1, :2].tolist() == [0, 0] and np.isnan(scores[1, 2]) and scores[1, 3] == pytest.approx(0.001)  # in the prediction only
    assert np.isnan(scores[2]).all() and scores[3].tolist() == [1, 1, 0, 0]                             # in neither; in both


def test_intervals_hold_the_mean_and_leave_out_what_is_undefined():
    values = np.array([[0.2, np.nan], [0.4, np.nan], [0.9, np.nan], [np.nan, np.nan]])
    mean, low, high = ev.bootstrap_mean(values)
    assert mean[0] == pytest.approx(0.5) and 0.2 <= low[0] < 0.5 < high[0] <= 0.9
    assert np.isnan([mean[1], low[1], high[1]]).all()
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip((mean, low, high), ev.bootstrap_mean(values)))


# ---------------------------------------------------------------- a segmenter that thresholds

CLASSES = ["ball", "box"]


class Threshold(torch.nn.Module):
    encoder = SimpleNamespace(use=lambda kernels: None)

    """Background at 0.5, ball at 1, box at 0 of the window: no mixture of two of them looks like the third."""

    def forward(self, v):
        return -80 * (v[:, None] - torch.tensor([0.5, 1, 0]).view(1, 3, 1, 1, 1)) ** 2


@pytest.fixture
def threshold(monkeypatch, tmp_path):
    made = dict(task="mine", data=str(tmp_path / "set"), classes=CLASSES, window=[0, 200], mr_after=None, spacing=[1.5, 1.5, 1.5], roi=[16, 16, 16],
                features=4, overlap=0.5)
    monkeypatch.setattr(ev, "load_segmenter", lambda path: (Threshold(), dict(made)))
    path = tmp_path / "best.pt"
    save_checkpoint(path, format=SEGMENTER)
    return path


def oblique(spacing=(0.8, 1.1, 2.5)):
    """An LPS affine turned by 20 degrees about z and 10 about x, with a far origin."""
    a, b = np.deg2rad([20, 10])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1]) * spacing
    affine[:3, 3] = 120, 80, -300
    return affine


def patient(seed=0, shape=(44, 36, 20), affine=None):
    """A scan of 100 with a ball of 200 and a box of 0, its labels, and their affine."""
    rng, affine = np.random.default_rng(seed), oblique() if affine is None else affine
    labels = np.zeros(shape, np.uint8)
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * nib.affines.voxel_sizes(affine)
    labels[((at - [12 + rng.integers(3), 14, 18]) ** 2).sum(-1) < 8 ** 2] = 1
    labels[26:36, 20:30, 5:16] = 2
    return np.array([100, 200, 0], np.int16)[labels], labels, affine


def centroids(labels, affine):
    return [nib.affines.apply_affine(affine, np.argwhere(labels == k).mean(0)) for k in (1, 2)]


@pytest.mark.parametrize("kind", ["lps", "ras", "stored with an intercept"])
def test_a_prediction_opens_aligned_on_its_scan(go, threshold, tmp_path, kind):
    image, labels, affine = patient(affine=np.diag([1, 1.4, 2, 1]) if kind == "ras" else None)
    scan = nib.Nifti1Image(image, affine)
    scan.header.set_xyzt_units("mm", "sec")
    if kind == "stored with an intercept":
        scan = nib.Nifti1Image(image + 1024, affine)
        scan.header.set_slope_inter(1, -1024)
    scan.set_qform(affine, 1)
    scan.set_sform(affine, 2)
    nib.save(scan, tmp_path / "scan.nii.gz")
    out = tmp_path / "pred"
    go("predict", "--ckpt", threshold, tmp_path / "scan.nii.gz", "--out", out, "--probabilities")
    written, original = nib.load(out / "scan.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    assert written.shape == original.shape and np.array_equal(written.affine, original.affine)
    assert written.get_data_dtype() == np.uint8 and written.header["sform_code"] == 2 and written.header["qform_code"] == 1
    found = np.asarray(written.dataobj)
    assert set(np.unique(found)) == {0, 1, 2} and found.dtype.kind in "uif" and written.dataobj.slope == 1
    for a, b in zip(centroids(found, written.affine), centroids(labels, affine)):
        assert np.linalg.norm(a - b) < nib.affines.voxel_sizes(affine).min()
    scores = ev.score_case(found.astype(np.uint8), labels, nib.affines.voxel_sizes(affine), [2.0, 2.0])
    assert scores[:, 0].min() > 0.85 and scores[:, 2].max() < 3.0
    shares = nib.load(out / "scan.probabilities.nii.gz")
    p = shares.get_fdata()
    assert p.shape == (*image.shape, 3) and np.abs(p.sum(-1) - 1).max() < 0.01 and shares.get_data_dtype() == np.uint8
    assert (p.argmax(-1) == labels).mean() > 0.95
    notes = json.loads((out / "scan.json").read_text())
    voxel = nib.affines.voxel_sizes(affine).prod() / 1000
    assert notes["volume_ml"]["box"] == pytest.approx((found == 2).sum() * voxel, abs=1e-3)
    assert json.loads((out / "labels.json").read_text()) == {"0": "background", "1": "ball", "2": "box"}
    assert (out / "scan.png").stat().st_size > 5000


def test_predict_goes_on_after_a_bad_scan_and_after_a_stop(go, threshold, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "pred"
    for name in ("a/x.nii.gz", "b/x.nii.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(patient()[0], oblique()), folder / name)
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 3), np.int16), np.eye(4)), folder / "frames.nii.gz")
    said = go("predict", "--ckpt", threshold, folder, "--out", out, "--no-overlay")
    assert "2 of 4 scans have their label map" in said and (out / "a/x.nii.gz").exists() and (out / "b/x.nii.gz").exists()
    rows = {r["scan"]: r["reason"] for r in csv.DictReader(open(out / "skipped.csv"))}
    assert set(rows) == {str(folder / "broken.nii.gz"), str(folder / "frames.nii.gz")} and "4D" in rows[str(folder / "frames.nii.gz")]
    # done is done; what is missing, or was made from another file, is made anew
    before = (out / "a/x.nii.gz").stat().st_mtime_ns
    (out / "b/x.nii.gz").unlink()
    assert "(1 had it already" in go("predict", "--ckpt", threshold, folder, "--out", out, "--no-overlay")
    assert (out / "b/x.nii.gz").exists() and (out / "a/x.nii.gz").stat().st_mtime_ns == before
    nib.save(nib.Nifti1Image(patient(1)[0], oblique()), folder / "a/x.nii.gz")
    assert "(1 had it already" in go("predict", "--ckpt", threshold, folder, "--out", out, "--no-overlay")
    with pytest.raises(BadInput, match="2 scans would be written to one file"):
        go("predict", "--ckpt", threshold, folder / "a/x.nii.gz", folder / "b/x.nii.gz", "--out", out)
    with pytest.raises(BadInput, match="none of the scans could be used.*no such file"):
        go("predict", "--ckpt", threshold, folder / "gone.nii.gz", "--out", out)
    whole = (folder / "a/x.nii.gz").read_bytes()
    with pytest.raises(BadInput, match="the label map would replace the scan"):
        go("predict", "--ckpt", threshold, folder / "a/x.nii.gz", "--out", folder / "a")
    assert (folder / "a/x.nii.gz").read_bytes() == whole


def test_predict_takes_what_scanners_write_and_leaves_what_others_wrote(go, threshold, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    image, _, affine = patient()
    nib.save(nib.Nifti1Image(image[..., None], affine), folder / "one-frame.nii.gz")
    nib.save(nib.Nifti1Image(image, affine), folder / "x_seg.nii.gz")
    (tmp_path / "empty").mkdir()
    words = ["predict", "--ckpt", threshold, folder, tmp_path / "empty", "--out", folder / "pred", "--no-overlay"]
    assert "1 of 1 scans have their label map" in go(*words)
    assert nib.load(folder / "pred/one-frame.nii.gz").shape == image.shape
    rows = {r["scan"]: r["reason"] for r in csv.DictReader(open(folder / "pred/skipped.csv"))}
    assert "no scans in it" in rows[str(tmp_path / "empty")] and "label map" in rows[str(folder / "x_seg.nii.gz")]
    assert "1 of 1 scans have their label map" in go(*words)                           # its own output is no scan
    (folder / "one-frame.json").write_text('{"EchoTime": 3}')                          # BIDS keeps such files beside scans
    with pytest.raises(BadInput, match="one-frame.json is not a prediction's and would be replaced"):
        go("predict", "--ckpt", threshold, folder / "one-frame.nii.gz", "--out", folder, "--redo")
    assert (folder / "one-frame.json").read_text() == '{"EchoTime": 3}'
    with pytest.raises(BadInput, match="a file is in the way"):
        go("predict", "--ckpt", threshold, folder / "one-frame.nii.gz", "--out", folder / "one-frame.json")
    with pytest.raises(BadInput, match="--windows 0"):
        go("predict", "--ckpt", threshold, folder, "--windows", 0)
    dicom = tmp_path / "IM0001"
    dicom.write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    assert ev.scans_under(tmp_path / "IM0001", ())[0] == [tmp_path] and not ev.scans_under(folder, ())[1]


def write_set(root, n=4):
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image, labels, affine = patient(i)
        if i == 1:
            labels[labels == 2] = 0                                                    # found in the image all the same
        nib.save(nib.Nifti1Image(image, affine), root / f"imagesTr/c{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), root / f"labelsTr/c{i}.nii.gz")


def test_seg_scores_both_grids_in_one_pass(go, threshold, tmp_path):
    write_set(tmp_path / "set")
    nib.save(nib.Nifti1Image(patient(0)[1][:-2], oblique()), tmp_path / "set/labelsTr/c3.nii.gz")      # not on its image's grid
    said = go("seg", "--ckpt", threshold, "--split", "all", "--grid", "both", "--out", tmp_path / "e")
    m = json.loads((tmp_path / "e/metrics.json").read_text())
    assert m["cases"] == 3 and m["skipped"] == 1 and "left out: c3" in said and "label 42x36x20" in said
    rows = list(csv.DictReader(open(tmp_path / "e/cases.csv")))
    assert len(rows) == 2 * 3 * 2
    for grid in ("own", "resampled"):
        ball, box = m["grids"][grid]["classes"].values()
        assert ball["dice"]["value"] > 0.85 and ball["cases"] == 3 and ball["missed"] == 0 and ball["hd95_mm"]["value"] < 3
        assert box["missed"] == 1 and box["cases"] == 3                                # a prediction without a truth counts 0
        dice = [float(r["dice"]) for r in rows if r["grid"] == grid and r["class"] == "box"]
        assert sorted(dice)[0] == 0 and np.mean(dice) == pytest.approx(box["dice"]["value"], abs=1e-5)
    assert all((tmp_path / "e" / f).stat().st_size > 5000 for f in ("cases.png", "boxes-own.png", "boxes-resampled.png"))
    with pytest.raises(BadInput, match="one number, or 2"):
        go("seg", "--ckpt", threshold, "--tolerance", 1, 2, 3)
    with pytest.raises(BadInput, match="15 classes .* knows 2"):
        (tmp_path / "amos/imagesTr").mkdir(parents=True)
        (tmp_path / "amos/labelsTr").mkdir(parents=True)
        for part in ("images", "labels"):
            (tmp_path / f"amos/{part}Tr/c0.nii.gz").touch()
        go("seg", "--ckpt", threshold, "--task", "amos", "--data", tmp_path / "amos")


def test_a_real_segmenter_predicts(go, tmp_path):
    """The file that finetune_seg.py writes, with untrained weights: its format chooses the sub-command."""
    net = Segmenter(Model(Config(**SIZES["nano"])), 3, 4)
    made = dict(task="mine", data=str(tmp_path / "set"), classes=CLASSES, window="percentiles", mr_after=None, spacing=[2.0, 2.0, 2.0], roi=[16, 16, 16],
                features=4, overlap=0.0)
    save_checkpoint(tmp_path / "best.pt", format=SEGMENTER, config=vars(net.encoder.config), made=made, model=net.state_dict())
    write_set(tmp_path / "set", 2)
    go("--device", "cpu", f"--ckpt={tmp_path / 'best.pt'}", "--split", "all")
    m = json.loads((tmp_path / "eval-all/metrics.json").read_text())
    assert m["cases"] == 2 and 0 <= m["grids"]["own"]["mean"]["dice"]["value"] < 0.6
    where = place("cpu", "fp32")
    net, made, _ = ev.open_segmenter(type("Args", (), dict(ckpt=tmp_path / "best.pt", overlap=None, device="cpu", dtype="fp32", kernels="torch", windows=2)))
    volume = np.random.default_rng(0).random((20, 16, 16)).astype(np.float16)
    logits = ev.segment(net, made, volume, type("Args", (), dict(windows=2, mirror=False)), where)
    with torch.no_grad():
        whole = net(torch.from_numpy(volume[:16]).float()[None])[0]
    assert logits.shape == (3, 20, 16, 16) and torch.allclose(logits[:, :4], whole[:, :4], atol=1e-4)


# ---------------------------------------------------------------- a classifier


def test_cls_scores_the_split_that_is_named(go, tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 6), ("val", 10), ("test", 16)):
        y = np.arange(n) % 2
        arrays[f"{split}_images"] = (rng.integers(0, 60, (n, 16, 16, 16)) + 150 * y[:, None, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = y[:, None].astype(np.uint8)
    np.savez(tmp_path / "n.npz", **arrays)
    torch.manual_seed(0)
    model = Classifier(Model(Config(**SIZES["nano"])), 2)
    made = dict(task="nodule", flavour="nodule", data=str(tmp_path / "n.npz"), lists=None, patient=None)
    save_checkpoint(tmp_path / "best.pt", format=CLS_FORMAT, config=vars(model.encoder.config), model=model.state_dict(), pool="mean",
                    classes=["benign", "malignant"], volume=[16, 16, 16], window=[0, 255], args=made)
    said = go("cls", "--ckpt", tmp_path / "best.pt", "--cache", tmp_path / "cache", "--out", tmp_path / "e", "--bootstrap", 50, "--dtype", "fp32")
    m, rows = json.loads((tmp_path / "e/metrics.json").read_text()), list(csv.DictReader(open(tmp_path / "e/scores.csv")))
    assert m["cases"] == 16 and len(rows) == 16 and "test, 16 cases of 16 patients" in said
    with torch.no_grad():
        x = torch.from_numpy(arrays["test_images"] / np.float32(255)).half().float()
        expected = model(x).softmax(1)[:, 1]
    assert np.allclose([float(r["p_1"]) for r in rows], expected, atol=1e-4)
    pos, neg = expected[1::2], expected[::2]
    assert m["scores"]["auc"]["value"] == pytest.approx(((pos[:, None] > neg).float() + 0.5 * (pos[:, None] == neg)).mean().item())
    with pytest.raises(BadInput, match="format is 'ar3d-classifier-1', and 'ar3d-seg-1' is needed"):
        go("seg", "--ckpt", tmp_path / "best.pt")


# ---------------------------------------------------------------- the real thing


def test_the_phantom_is_read_as_a_scan_of_any_orientation(phantom_home, go, threshold, tmp_path, monkeypatch):
    """Label maps of the phantom's scans, stored in as many orientations, lie where the scans lie."""
    made = dict(ev.load_segmenter(threshold)[1], spacing=[4.5, 4.5, 4.5], roi=[64, 64, 64])
    monkeypatch.setattr(ev, "load_segmenter", lambda path: (Threshold(), dict(made)))
    folder = phantom_home / "data/phantom/amos/imagesVa"
    go("predict", "--ckpt", threshold, folder, "--out", tmp_path / "pred", "--no-overlay")
    for scan in sorted(folder.glob("*.nii.gz")):
        written, original = nib.load(tmp_path / "pred" / scan.name), nib.load(scan)
        assert np.array_equal(written.affine, original.affine) and written.shape == original.shape
        values, labels = read_scan(scan)[0], read_scan(tmp_path / "pred" / scan.name)[0]
        assert values[labels == 1].mean() > 150 > 50 > values[labels == 2].mean()
