"""eval.py: scores against brute force, predictions on odd grids, probes, completions, the table."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import eval as ev
from common import BadInput, save_checkpoint, write_json, write_table
from finetune_cls import CLASSIFIER, Classifier, auc, logistic, scores_of
from finetune_seg import SEGMENTER, Segmenter
from model import Config, Model, checkpoint_state, standardise, unpatchify
from serialize import Sequences

TINY = Config(width=24, layers=2, heads=2, patch=8)
CLASSES = ["ball", "box"]


@pytest.fixture
def go(monkeypatch, capsys, phantom_home):
    """go("seg", "--ckpt", …): eval.main() in the phantom's folder; what it printed."""
    monkeypatch.chdir(phantom_home)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        ev.main()
        return capsys.readouterr().out

    return run


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text())


# ---- scores ----------------------------------------------------------------------------------


def surface_by_hand(mask):
    """Voxels of a mask with a face neighbour that is not in it, or that lies beyond the volume."""
    padded, surface = np.pad(mask, 1), []
    for at in np.argwhere(mask):
        steps = [s * np.eye(3, dtype=int)[a] for a in range(3) for s in (1, -1)]
        if not all(padded[tuple(at + 1 + step)] for step in steps):
            surface.append(at)
    return np.array(surface)


@pytest.mark.parametrize("seed", range(6))
def test_scores_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape, spacing = rng.integers(5, 11, 3), rng.uniform(0.4, 4, 3)
    tolerances, target = rng.uniform(0.5, 4, 3), rng.integers(0, 4, shape)
    target[:, :2] = rng.integers(1, 4)  # a solid part: voxels that are no surface
    prediction = np.where(rng.random(shape) < 0.7, target, rng.integers(0, 4, shape))
    scores = ev.score_case(prediction, target, spacing, tolerances)
    for k in range(1, 4):
        a, b = prediction == k, target == k
        p, q = (surface_by_hand(m) * spacing for m in (a, b))
        assert len(q) < b.sum() or k != target[0, 0, 0]
        d = np.sqrt(((p[:, None] - q) ** 2).sum(-1))
        to_b, to_a = d.min(1), d.min(0)
        close = (to_b <= tolerances[k - 1]).sum() + (to_a <= tolerances[k - 1]).sum()
        dice, error = 2 * (a & b).sum() / (a.sum() + b.sum()), int(a.sum()) - int(b.sum())
        hd95 = max(np.percentile(to_b, 95), np.percentile(to_a, 95))
        expected = [dice, close / (len(p) + len(q)), hd95, error * spacing.prod() / 1000]
        assert np.allclose(scores[k - 1], expected, rtol=0, atol=1e-6)


def test_a_distance_of_just_the_tolerance_is_within_it_on_an_oblique_grid_too():
    inner, outer = np.zeros((2, 12, 12, 12), np.uint8)
    inner[4:8, 4:8, 4:8] = outer[2:10, 2:10, 2:10] = 1
    turn = Rotation.from_euler("z", 12, degrees=True).as_matrix().astype(np.float32)  # as stored
    sizes = nib.affines.voxel_sizes(nib.affines.from_matvec(turn.astype(float)))
    assert 1 < max(sizes) < 1.000001
    straight = ev.score_case(inner, outer, [1, 1, 1], [2.0])
    assert straight[0, 1] > 0.4 and np.allclose(ev.score_case(inner, outer, sizes, [2.0]), straight)


def test_the_rule_for_empty_classes():
    target, prediction = np.zeros((2, 6, 6, 6), np.uint8)
    target[1, 1, 1:4], prediction[4, 4, 4] = 1, 2
    prediction[0, 0, 0] = target[0, 0, 0] = 4
    scores = ev.score_case(prediction, target, (1, 1, 1), [1.0] * 4)
    # in the target only, in the prediction only, in neither, in both
    expected = [[0, 0, np.nan, -0.003], [0, 0, np.nan, 0.001], [np.nan] * 4, [1, 1, 0, 0]]
    np.testing.assert_allclose(scores, expected)


def test_intervals_hold_the_mean_and_leave_out_what_is_undefined():
    values = np.array([[0.2, np.nan], [0.4, np.nan], [0.9, np.nan], [np.nan, np.nan]])
    one, none = ev.mean_intervals(values, 0)
    assert one["value"] == pytest.approx(0.5) and 0.2 <= one["low"] < 0.5 < one["high"] <= 0.9
    assert none == {"value": None, "low": None, "high": None}
    assert ev.mean_intervals(values, 0) == [one, none]


# ---- a segmenter that thresholds -------------------------------------------------------------


class Threshold(torch.nn.Module):
    """Background at 0.5, ball at 1, box at 0: no mixture of two of them looks like the third."""

    encoder = SimpleNamespace(use=lambda kernels: None)

    def forward(self, v):
        return -80 * (v[:, None] - torch.tensor([0.5, 1, 0]).view(1, 3, 1, 1, 1)) ** 2


SETTING = {
    "task": "mine",
    "classes": CLASSES,
    "intensity_range": [0, 200],
    "mr_after": None,
    "spacing": [1.5, 1.5, 1.5],
    "roi": [16, 16, 16],
    "features": 4,
    "decoder": "unetr",
    "overlap": 0.5,
}


@pytest.fixture
def threshold(monkeypatch, tmp_path):
    setting = {**SETTING, "data": str(tmp_path / "set")}
    monkeypatch.setattr(ev, "load_segmenter", lambda path: (Threshold(), dict(setting)))
    save_checkpoint(tmp_path / "best.pt", format=SEGMENTER)
    return tmp_path / "best.pt"


def oblique():
    """An LPS affine turned by 20 degrees about z and 10 about x, with a far origin."""
    turn = Rotation.from_euler("zx", [20, 10], degrees=True).as_matrix()
    return nib.affines.from_matvec(turn @ np.diag([-0.8, -1.1, 2.5]), [120, 80, -300])


def patient(seed=0, affine=None):
    """A scan of 100 with a ball of 200 and a box of 0, its labels, and their affine."""
    rng, affine = np.random.default_rng(seed), oblique() if affine is None else affine
    labels = np.zeros((44, 36, 20), np.uint8)
    at = np.moveaxis(np.indices(labels.shape), 0, -1) * nib.affines.voxel_sizes(affine)
    labels[((at - [12 + rng.integers(3), 14, 18]) ** 2).sum(-1) < 8**2] = 1
    labels[26:36, 20:30, 5:16] = 2
    return np.array([100, 200, 0], np.int16)[labels], labels, affine


def save(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, oblique() if affine is None else affine), path)


def centroids(labels, affine):
    return np.array(
        [nib.affines.apply_affine(affine, np.argwhere(labels == k).mean(0)) for k in (1, 2)]
    )


@pytest.mark.parametrize("kind", ["lps", "ras", "turned", "stored with an intercept"])
def test_a_prediction_opens_aligned_on_its_scan(go, threshold, tmp_path, kind):
    axes = {"ras": np.diag([1, 1.4, 2, 1]), "turned": oblique()[:, [1, 2, 0, 3]]}
    image, labels, affine = patient(affine=axes.get(kind))
    scan = nib.Nifti1Image(image + 1024 * (kind[0] == "s"), affine)
    scan.header.set_slope_inter(1, -1024 * (kind[0] == "s"))
    scan.set_qform(affine, 1)
    scan.set_sform(affine, 2)
    nib.save(scan, tmp_path / "scan.nii.gz")
    out = tmp_path / "pred"
    scan = tmp_path / "scan.nii.gz"
    go("predict", "--ckpt", threshold, scan, "--out", out, "--probabilities")
    written, original = nib.load(out / "scan.nii.gz"), nib.load(scan)
    assert written.shape == original.shape and np.array_equal(written.affine, original.affine)
    assert written.get_data_dtype() == np.uint8 and written.dataobj.slope == 1
    assert (written.header["sform_code"], written.header["qform_code"]) == (2, 1)
    prediction, sizes = np.asarray(written.dataobj), nib.affines.voxel_sizes(affine)
    off = np.linalg.norm(centroids(prediction, affine) - centroids(labels, affine), axis=1)
    assert off.max() < sizes.min()
    scores = ev.score_case(prediction.astype(np.uint8), labels, sizes, [2.0, 2.0])
    assert scores[:, 0].min() > 0.85 and scores[:, 2].max() < 3.0
    shares = nib.load(out / "scan.probabilities.nii.gz")
    p = shares.get_fdata()
    assert p.shape == (*image.shape, 3) and np.abs(p.sum(-1) - 1).max() < 0.01
    assert (p.argmax(-1) == labels).mean() > 0.95 and shares.get_data_dtype() == np.uint8
    volumes = json.loads((out / "scan.prediction.json").read_text())["volume_ml"]
    assert volumes["box"] == pytest.approx((prediction == 2).sum() * sizes.prod() / 1000, abs=2e-3)
    names = json.loads((out / "labels.json").read_text())
    assert names == {"0": "background", "1": "ball", "2": "box"}
    assert (out / "scan.png").stat().st_size > 5000


def test_predict_goes_on_after_a_bad_scan_and_after_a_stop(go, threshold, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "pred"
    image = patient()[0]
    save(folder / "a/x.nii.gz", image[..., None])  # one frame
    save(folder / "b/x.nii.gz", image)
    save(folder / "x_seg.nii.gz", image)
    save(folder / "frames.nii.gz", np.zeros((8, 8, 8, 3), np.int16))
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    words = ["predict", "--ckpt", threshold, folder, "--out", out, "--no-overlay"]
    assert "2 predicted, 0 done before" in go(*words)
    assert nib.load(out / "a/x.nii.gz").shape == image.shape
    why = {r["scan"].split("/")[-1]: r["reason"] for r in rows_of(out / "skipped.csv")}
    assert set(why) == {"broken.nii.gz", "frames.nii.gz", "x_seg.nii.gz"}
    assert "4D" in why["frames.nii.gz"] and "label map" in why["x_seg.nii.gz"]
    # done is done; what was cut short, or was made from another file or in another way, is not
    for name in ("b/x.prediction.json", "b/x.nii.gz"):
        (out / name).unlink()
        assert "1 predicted, 1 done before" in go(*words)
    save(folder / "a/x.nii.gz", patient(1)[0])
    assert "1 predicted, 1 done before" in go(*words)
    assert "2 predicted, 0 done before" in go(*words, "--mirror")
    # a scan of the same bytes and time, from elsewhere
    (tmp_path / "other/a").mkdir(parents=True)
    twin = shutil.copy2(folder / "a/x.nii.gz", tmp_path / "other/a")
    assert "1 predicted, 0 done before" in go(
        *words[:3], twin, "--out", out / "a", "--no-overlay", "--mirror"
    )
    for more, message in (
        ([folder / "a/x.nii.gz", folder / "b/x.nii.gz"], "2 scans would be written to one file"),
        ([folder / "gone.nii.gz"], "none of the scans could be used.*no such"),
        ([folder / "a/x.nii.gz", "--out", folder / "a"], "the label map would replace the scan"),
        ([folder, "--overlap", 1], "--overlap 1: from 0 to below 1"),
        ([folder / "a", "--out", folder], "none of the scans could be used.*: lies in --out"),
    ):
        before = (folder / "a/x.nii.gz").read_bytes()
        with pytest.raises(BadInput, match=message):
            go("predict", "--ckpt", threshold, "--out", out, *more)
        assert (folder / "a/x.nii.gz").read_bytes() == before
    inside = ["predict", "--ckpt", threshold, folder / "a", "--no-overlay", "--probabilities"]
    inside += ["--out", folder / "a/p"]
    assert "1 predicted" in go(*inside)
    assert "0 predicted, 1 done before, 0 left out" in go(*inside)  # not its own


def write_set(root, n=4):
    for i in range(n):
        image, labels, _ = patient(i)
        if i == 1:
            labels[labels == 2] = 0  # predicted all the same
        save(root / f"imagesTr/c{i}.nii.gz", image)
        save(root / f"labelsTr/c{i}.nii.gz", labels[: -2 if i == 3 else None])


def test_the_numbers_of_amos_mean_mr_in_amos_alone(go, threshold, tmp_path, monkeypatch):
    write_set(tmp_path / "set", 1)
    opened, seen = ev.open_segmenter, []
    setting = {"task": "amos", "mr_after": 500}
    monkeypatch.setattr(ev, "range_of_case", lambda case, r, mr: seen.append(mr) or r)
    monkeypatch.setattr(
        ev, "open_segmenter", lambda a: (*opened(a)[:1], opened(a)[1] | setting, opened(a)[2])
    )
    for task in ("amos", "other"):
        data = ["--data", tmp_path / "set", "--task", task, "--split", "all"]
        go("seg", "--ckpt", threshold, *data, "--out", tmp_path / task)
    assert seen == [500, None]


def test_seg_scores_both_grids_in_one_pass(go, threshold, tmp_path):
    write_set(tmp_path / "set")  # the label of c3 is not on its image's grid
    out = tmp_path / "e"
    said = go("seg", "--ckpt", threshold, "--split", "all", "--out", out)
    assert "label 42x36x20" in rows_of(out / "skipped.csv")[0]["reason"]
    lines, rows = rows_of(out / "cases.csv"), metrics_in(out)["rows"]
    assert len(lines) == 2 * 3 * 3 and len(rows) == 2 * 3 and "volume_error_ml" in said
    for ball, box, _ in (rows[:3], rows[3:]):
        assert ball["dice"]["value"] > 0.85 and (ball["cases"], ball["missed"]) == (3, 0)
        assert ball["hd95_mm"]["value"] < 3 and (box["cases"], box["missed"]) == (3, 1)
        mine = [r for r in lines if (r["grid"], r["class"]) == (box["grid"], "box")]
        dice = [float(r["dice"]) for r in mine]
        assert min(dice) == 0  # a prediction without a target
        assert box["dice"]["value"] == pytest.approx(np.mean(dice), abs=1e-5)
        assert box["dice"]["low"] < np.mean(dice) < box["dice"]["high"]
    names = ("c0.png", "c2.png", "boxes.png")
    assert all((out / name).stat().st_size > 5000 for name in names)
    with pytest.raises(BadInput, match="one number, or one a class"):
        go("seg", "--ckpt", threshold, "--tolerance", 1, 2, 3)


def test_a_real_segmenter_is_scored_by_its_checkpoint_alone(go, tmp_path):
    net = Segmenter(Model(Config(width=24, layers=4, heads=2, patch=8)), 3, 4)
    setting = {**SETTING, "data": str(tmp_path / "set"), "overlap": 0.0}
    kept = {"config": vars(net.encoder.config), "setting": setting, "model": net.state_dict()}
    save_checkpoint(tmp_path / "best.pt", format=SEGMENTER, **kept)
    write_set(tmp_path / "set", 2)
    go(f"--ckpt={tmp_path}/best.pt", "--split", "all", "--dtype", "fp32")
    m = metrics_in(tmp_path / "eval-seg")
    assert [r["cases"] for r in m["rows"]] == [2] * 6 and m["args"]["overlap"] == 0
    assert 0 <= m["rows"][2]["dice"]["value"] < 0.6


# ---- a classifier ----------------------------------------------------------------------------


def test_cls_scores_the_split_that_is_named(go, tmp_path, monkeypatch):
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 6), ("val", 10), ("test", 16)):
        y = np.arange(n) % 2
        images = rng.integers(0, 60, (n, 16, 16, 16)) + 150 * y[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": y[:, None]}
    np.savez(tmp_path / "n.npz", **arrays)
    torch.manual_seed(0)
    model = Classifier(Model(TINY), 2)
    args = {"task": "nodule", "data": str(tmp_path / "n.npz")}
    args |= {"lists": None, "patient": None, "pool": "mean"}
    args |= {"volume": [16, 16, 16], "range": [0, 255]}
    kept = {"config": vars(TINY), "model": model.state_dict(), "args": args}
    path = tmp_path / "best.pt"
    save_checkpoint(path, format=CLASSIFIER, classes=["benign", "malignant"], step=1, **kept)
    monkeypatch.setattr("finetune_cls.CACHE", tmp_path / "cache")
    said = go("cls", "--ckpt", path, "--dtype", "fp32")
    out = tmp_path / "eval-cls"
    rows = [r for r in rows_of(out / "scores.csv") if r["split"] == "test"]
    assert len(rows) == 16 and "16 cases of 16 patients" in said
    with torch.no_grad():
        x = torch.from_numpy(arrays["test_images"] / np.float32(255)).half().float()
        expected = model(x).softmax(1)[:, 1].numpy()
    assert np.allclose([float(r["p_1"]) for r in rows], expected, atol=1e-4)
    area = metrics_in(out)["test"]["auc"]["value"]
    assert area == pytest.approx(auc(np.arange(16) % 2 == 1, expected))
    with pytest.raises(BadInput, match=f"format is '{CLASSIFIER}', and '{SEGMENTER}' is needed"):
        go("seg", "--ckpt", path)
    with pytest.raises(SystemExit):  # argparse lists the choices
        go("cls", "--ckpt", path, "--task", "nonsense")


# ---- probes ----------------------------------------------------------------------------------


def clusters(n, K, F, apart, seed=0):
    """n points of K Gaussian clusters, centres `apart` sd from the origin, each on an axis."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    return torch.randn(n, F, generator=g) + apart * torch.eye(F)[:K][y], y


def test_chosen_patches_by_hand():
    target = torch.zeros(8, 4, 2, dtype=torch.int16)  # 4 x 2 x 1 patches of 8 voxels
    target[:2, :2] = 3  # all of it
    target[:2, 2:, 0] = 2  # 4 of 2, 2 of 1
    target[0, 2:, 1] = target[2, 0, 0] = 1  # and one voxel
    rows, labels = ev.chosen_patches(target, 2, 0.25)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and labels.tolist() == [3, 2] + [0] * 6
    assert ev.chosen_patches(target, 2, 0.125)[1].tolist() == [3, 2, 1] + [0] * 5
    assert ev.chosen_patches(target, 2, 0.75)[1].tolist() == [3] + [0] * 7
    target[4:] = -1  # seen in another box
    assert ev.chosen_patches(target, 2)[0].tolist() == [0, 1, 2, 3]
    far = torch.cat(
        [target[:4], torch.zeros(12, 4, 2).short()]
    )  # 3 touched, 13 others: every fourth
    assert ev.chosen_patches(far, 2)[0].tolist() == [0, 1, 2, 3, 7, 11, 15]
    target[0, 2, 1] = 2
    target[1, 2:, 0] = 1  # three of each: the lower number
    assert ev.chosen_patches(target, 2, 0.25)[1][1] == 1
    assert not ev.chosen_patches(torch.zeros_like(target), 2, 0.25)[1].any()


@pytest.mark.parametrize("roi", [(8, 8, 8), (100, 100, 100), (12, 4, 9)])
def test_boxes_tile_a_scan_and_show_each_label_once(monkeypatch, roi):
    rng = np.random.default_rng(0)
    image, label = rng.random((22, 12, 9)), rng.integers(0, 5, (22, 12, 9)).astype(np.uint8)
    monkeypatch.setattr(ev, "opened", lambda case, what: image if what == "image" else label)
    pairs, shown = dict(zip(image.ravel(), label.ravel())), []
    for volume, target, part in ev.boxes_of([{"split": "train"}], roi, 4):
        assert part == ev.HELD and volume.shape == target.shape
        assert all(n <= max(4, r) and n % 4 == 0 for n, r in zip(volume.shape, roi))
        here = target >= 0
        assert target[here].tolist() == [pairs[v] for v in volume[here]]
        shown += volume[here].tolist()
    assert sorted(shown) == sorted(image[1:21, :12, :8].ravel())
    assert not [*ev.boxes_of([{"split": "train", "id": "thin"}], roi, 10)]  # less than a patch


def test_knn_is_brute_force():
    (x, y), (q, _) = clusters(70, 5, 8, 1.0), clusters(40, 5, 8, 1.0, seed=1)
    shares = ev.knn(x, y, 5, q, k=7, temperature=0.1)
    a, b = (v.double().numpy() / np.linalg.norm(v.double(), axis=1, keepdims=True) for v in (x, q))
    for cosine, got in zip(b @ a.T, shares):
        near = np.argsort(-cosine)[:7]
        weights = np.exp(cosine[near] / 0.1)
        vote = np.bincount(y.numpy()[near], weights, minlength=5)
        np.testing.assert_allclose(got, vote / vote.sum(), atol=1e-4)
    assert ev.knn(x[:3], y[:3], 5, q).shape == (40, 5)  # fewer than k: all of them


def test_the_linear_probe_takes_the_l2_that_held_out_rows_prefer():
    (x, y), held = clusters(120, 3, 40, 1.0), torch.arange(120) < 40
    strengths, losses = (1.0, 0.1, 0.01, 0.0001), []
    for l2 in strengths:
        logits = scores_of(logistic(x[~held], y[~held], 3, l2), x[held])
        losses.append(torch.nn.functional.cross_entropy(logits, y[held]).item())
    probs, l2 = ev.linear_probe(x, y, 3, x, held, strengths)
    assert l2 == strengths[np.argmin(losses)] and min(losses) < losses[-1] - 0.05  # it matters
    torch.testing.assert_close(probs, scores_of(logistic(x, y, 3, l2), x).softmax(1))


def test_class_scores_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    probs = torch.eye(4)[[0, 0, 0, 1, 1, 2, 3]]
    s = ev.class_scores(labels, probs)
    assert s["accuracy"] == pytest.approx(5 / 7)
    assert s["balanced_accuracy"] == pytest.approx((0.75 + 0.5 + 1) / 3)  # of those that are there
    assert s["f1"] == pytest.approx((6 / 7 + 0.5 + 1) / 3)
    areas = [auc(labels == c, probs[:, c].numpy()) for c in (0, 1, 3)]
    assert areas[0] == 0.875 and s["auc"] == pytest.approx(np.mean(areas))


def test_probes_find_what_is_there_whatever_its_scale():
    (x, y), (q, truth) = clusters(300, 3, 8, 3.0), clusters(120, 3, 8, 3.0, seed=1)
    parts = torch.tensor([[ev.HELD, ev.FIT, ev.FIT, ev.FIT][n % 4] for n in range(300)])
    parts = torch.cat([parts, torch.full((120,), ev.TEST)])
    x, y = torch.cat([x, q]), torch.cat([y, truth])
    scale = torch.tensor([1e-3, 1, 10, 1, 1, 1, 100, 1])
    odd = torch.cat([x * scale + 5, torch.full((420, 1), 7.0)], 1)  # and a constant
    noise = torch.randn(420, 8, generator=torch.Generator().manual_seed(5))
    rows = [ev.probe_scores(v, y, parts, 3) for v in (x, odd, noise)]
    for plain, scaled, blind in zip(*rows):
        assert plain["accuracy"] > 0.85 and blind["accuracy"] < 0.5
        assert scaled["accuracy"] == pytest.approx(plain["accuracy"], abs=0.02)
    assert rows[2][1]["l2"] >= 0.1  # nothing to learn: strong regularisation
    assert rows[0] == ev.probe_scores(x, y, parts, 3)


def test_load_encoder_takes_every_kind_of_checkpoint(tmp_path):
    encoder, args = Model(TINY), {"pool": "mean", "volume": [32, 32, 32]}
    seg, cls = Segmenter(Model(TINY), 3, 4), Classifier(encoder, 2)
    seg.encoder.load_state_dict(encoder.state_dict())
    kept = {"config": vars(TINY), "classes": CLASSES, "args": args}
    save_checkpoint(tmp_path / "a", **checkpoint_state(encoder), args={"volume": 64})
    setting = SETTING | {"classes": CLASSES}
    save_checkpoint(
        tmp_path / "b", format=SEGMENTER, model=seg.state_dict(), setting=setting, **kept
    )
    save_checkpoint(tmp_path / "c", format=CLASSIFIER, model=cls.state_dict(), **kept)
    x = torch.rand(1, 16, 16, 16)
    for name, run in (("a", {"volume": 64}), ("b", args), ("c", args)):
        model, known = ev.load_encoder(tmp_path / name)
        assert torch.equal(model.encode(x)[0], encoder.encode(x)[0]) and known == run


def test_probe_on_the_phantom(go, tmp_path):
    torch.manual_seed(0)
    args = {"volume": 32}
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)), args=args)
    words = ["--tasks", "phantom", "lesions", "--cases", 3, 1, "--layer", "all"]
    said = go("probe", "--ckpt", tmp_path / "ckpt.pt", *words)
    rows = metrics_in(tmp_path / "eval-probe")["rows"]
    scores = {(r["target"], r["features"], r["probe"]): r for r in rows}
    names = [f"{n}, block {i}" for n in ("checkpoint", "random weights") for i in (0, 1)]
    names += ["raw voxels", "position alone"]
    expected = [("phantom", n) for n in names] + [("lesions", n) for n in names[:-1]]
    assert [key[:2] for key in scores][::2] == expected and "balanced_accuracy" in said
    assert scores["phantom", "position alone", "linear"]["auc"] > 0.6  # bodies lie alike
    for target in ("phantom", "lesions"):  # the checkpoint is what --seed 0 draws
        for probe in ("knn", "linear"):
            ours, other, voxels = (
                {k: v for k, v in scores[target, name, probe].items() if k in ev.METRICS}
                for name in ("checkpoint, block 1", "random weights, block 1", "raw voxels")
            )
            assert ours == other != voxels
    assert (tmp_path / "eval-probe/probe.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ckpt", "none.pt"], "none.pt: no such checkpoint"),
        (["--ckpt", "{0}/odd.pt"], "neither a checkpoint of pretrain.py"),
        (["--ckpt", "{0}/ckpt.pt", "--layer", "2"], "blocks are 0 to 1"),
        (["--ckpt", "{0}/ckpt.pt", "--tasks", "amos", "--data", "{0}"], "no labelled scans"),
        (["--ckpt", "{0}/ckpt.pt", "--tasks", "phantom", "nonsense"], "no such folder"),
        (["--ckpt", "{0}/ckpt.pt", "--tasks", "lesions", "--corpus", "{0}"], "no corpus there"),
    ],
)
def test_probe_says_what_is_wrong(go, tmp_path, flags, message, monkeypatch):
    def too_late(*_):
        raise AssertionError("probed before the fault was found")

    monkeypatch.setattr(ev, "probe_target", too_late)
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)))
    torch.save({"x": 1}, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match=message):
        go("probe", *(f.format(tmp_path) for f in flags))


# ---- next patch ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "image"])
def test_completion_is_what_repeated_forward_passes_give(order):
    torch.manual_seed(1)
    model = Model(Config(width=24, layers=2, heads=2, patch=4, order=order)).eval()
    patches, grid, index = model.sequence(torch.rand(2, 8, 8, 16))
    completed = model.complete(patches, 5, grid, index)
    fed, (_, mean, scale) = patches.clone(), standardise(patches)
    back = torch.arange(16) if index is None else torch.argsort(index)
    for i in range(5, 16):
        with torch.no_grad():
            pred = model(unpatchify(fed[:, back], grid), torch.full((2,), 5))[1][:, i]
        torch.testing.assert_close(completed[:, i], pred, atol=2e-5, rtol=1e-4)
        fed[:, i] = (pred * scale[:, i] + mean[:, i]).clamp(0, 1)
    assert not completed[:, :5].any() and not torch.allclose(fed[:, 5:], patches[:, 5:])


def test_next_patch_on_the_phantom(go, corpus, tmp_path):
    torch.manual_seed(0)
    model, args = Model(TINY).eval(), {"volume": 32, "stride": 8}
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(model), args=args)
    words = ["--data", corpus, "--samples", 2, "--completions", 1, "--dtype", "fp32"]
    said = go("--ckpt", tmp_path / "ckpt.pt", *words)
    out = tmp_path / "eval-pretrain"
    rows = {(r["kind"], r["prefix"]): r for r in metrics_in(out)["rows"]}
    kinds = ("spatial", "contrast", "semantic")
    assert set(rows) == {(k, p) for k in kinds for p in (0, 16, 32, 48)}
    data = Sequences(corpus, "val", 32, 4, 8)
    batch = torch.utils.data.default_collate([data[n] for n in range(6)])
    for (k, p), row in rows.items():
        with torch.no_grad():
            volume, prefix = batch["volume"], torch.full((6,), p)
            errors, _ = model(volume, prefix, batch["ranges"], per_patch=True)
        mine = errors[kinds.index(k) :: 3, p:]
        assert row["loss"]["value"] == pytest.approx(mine.mean().item(), rel=1e-5)
        assert row["loss"]["low"] <= row["loss"]["value"] <= row["loss"]["high"]
        assert row["earlier_patch"] <= row["patch_mean"] + 1e-9
        assert row["teacher_forced"] == pytest.approx(mine[0].mean().item(), rel=1e-4)
        assert row["free_running"] > 0
    lines = [r for r in rows_of(out / "positions.csv") if r["kind"] == "contrast"]
    lines = [r for r in lines if r["prefix"] == "16"]
    assert [int(r["position"]) for r in lines] == list(range(16, 64))
    mean = np.mean([float(r["loss"]) for r in lines])
    assert mean == pytest.approx(rows["contrast", 16]["loss"]["value"]) and "free_running" in said
    pictures = [(out / f"{name}.png").stat().st_size for name in ("completions", "positions")]
    assert min(pictures) > 5000


def test_next_patch_says_what_is_wrong(go, tmp_path):
    codes = Config(width=24, layers=2, heads=2, patch=8, target="vq", codes=5)
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)))
    save_checkpoint(tmp_path / "vq.pt", **checkpoint_state(Model(codes)))
    save_checkpoint(tmp_path / "other.pt", format="other")
    for flags, message in (
        (["pretrain", "--ckpt", "vq.pt"], "predicts no voxels"),
        (["pretrain", "--ckpt", "ckpt.pt", "--data", "here"], "here: no corpus there"),
        (["--dtype", "fp32", "--ckpt", "ckpt.pt", "--data", "here"], "here: no corpus there"),
        (["pretrain", "--ckpt", "ckpt.pt", "--completions", 17], "--samples 16: at least 17"),
        (["--ckpt", "other.pt"], "'other' says no sub-command"),
    ):
        with pytest.raises(BadInput, match=message):
            go(*(tmp_path / f if str(f).endswith(".pt") else f for f in flags))


# ---- table -----------------------------------------------------------------------------------


def seg_run(folder, value, seed, init="scratch", labels=1.0, cases=None, **more):
    args = {"task": "amos", "init": init, "labels": labels, "seed": seed, "freeze": False}
    write_json(folder / "args.json", args | more)
    dice = {"liver": value, "spleen": None}
    write_json(
        folder / "metrics.json",
        {"mean_dice": value, "dice": dice, "cases": cases or {"c0": [value]}, "step": 6},
    )


def cls_run(folder, labels, scores, seed, init="scratch"):
    args = {"task": "phantom-cls", "init": init, "labels": 1.0, "seed": seed}
    write_json(folder / "args.json", {**args, "freeze": False})
    area = {"auc": {"value": auc(labels, scores), "low": None, "high": None}}
    write_json(folder / "metrics.json", {"seed": seed, "test": area})
    rows = [["v0", "v", "val", 0, 0.5, 0.5]]
    rows += [
        [f"f{i}", f"p{i // 2}", "test", int(y), 1 - s, s]
        for i, (y, s) in enumerate(zip(labels, scores))
    ]
    write_table(folder / "scores.csv", ["file", "patient", "split", "label", "p_0", "p_1"], rows)


@pytest.fixture
def tabled(go, tmp_path):
    def run(*runs):
        out = tmp_path / "table"
        said = go("table", *(runs or [tmp_path]), "--out", out)
        return said, rows_of(out / "table.csv"), rows_of(out / "tests.csv")

    return run


def test_table_means_and_paired_intervals(tabled, tmp_path):
    rng, cases = np.random.default_rng(0), {}
    for name, up in (("a", 0.1), ("b", 0.25)):
        for s in range(4):
            dice = rng.random(8) * 0.5 + up
            cases[name, s] = {f"c{i}": [v, None] for i, v in enumerate(dice.tolist())}
    for s, v in zip((0, 1, 2), (0.5, 0.6, 0.73)):
        seg_run(tmp_path / f"a{s}", v, s, cases=cases["a", s])
    for s, v in zip((1, 2, 3), (0.7, 0.75, 0.9)):
        seg_run(tmp_path / f"b{s}", v, s, init="out/pretrain/ckpt.pt", cases=cases["b", s])
    said, (scratch, ours), (test,) = tabled()
    assert (scratch["initialisation"], scratch["seeds"]) == ("scratch", "[0, 1, 2]")
    assert (ours["initialisation"], ours["seeds"]) == ("out/pretrain/ckpt.pt", "[1, 2, 3]")
    assert float(scratch["mean"]) == pytest.approx(0.61)
    assert float(scratch["sd"]) == pytest.approx(np.std([0.5, 0.6, 0.73], ddof=1))
    assert (test["seeds"], test["n"]) == ("[1, 2]", "8")
    gains = np.array(
        [[cases["b", s][f"c{i}"][0] - cases["a", s][f"c{i}"][0] for i in range(8)] for s in (1, 2)]
    )
    assert float(test["B - A"]) == pytest.approx(gains.mean())
    low, high = (float(test[k]) for k in ("low", "high"))
    of_seeds = 12.706 * gains.mean(1).std(ddof=1) / 2**0.5  # Student's, one degree of freedom
    of_cases = 1.96 * gains.mean(0).std() / 8**0.5
    assert low < gains.mean() < high
    assert (high - low) / 2 == pytest.approx(np.hypot(of_seeds, of_cases), rel=0.15)
    liver = rows_of(tmp_path / "table/classes.csv")[0]
    assert (liver["class"], float(liver["mean"])) == ("liver", pytest.approx(0.61))
    assert "| amos" in said and "0.1153" in (tmp_path / "table/table.md").read_text()
    assert (tmp_path / "table/table.png").stat().st_size > 5000


def test_three_seeds_do_not_make_an_effect_of_chance(monkeypatch):
    """Each seed has a luck of its own and nothing else differs: about 5 of 100 may look better."""
    monkeypatch.setattr(ev, "DRAWS", 40)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(100):
        a, b = [], []
        for seed, luck in enumerate(rng.normal(0, 1, 3)):
            for runs, shift in ((a, 0), (b, luck)):
                run = {"seed": seed, "cell": ("t", "1", "Dice", "i"), "cases": [*"abcdefgh"]}
                runs.append(run | {"scores": rng.normal(shift, 0.5, (8, 1))})
        found = ev.paired(a, b, 0)
        seen += not found["low"] < 0 < found["high"]
    assert seen <= 10  # a bootstrap over the seeds: 20 to 25


def test_hd95_is_compared_where_both_have_found_it_and_runs_of_a_seed_are_one():
    def run(seed, *values):
        cell = "t", "1", "hd95_mm, own grid", "i"
        return {"seed": seed, "cell": cell, "cases": [*"abcd"], "scores": np.array([values]).T}

    a, b = run(0, 2.0, 2, 50, 50), run(0, 2.5, 2.25, np.nan, 5)
    assert ev.paired([a], [b], 0)["B - A"] == pytest.approx((0.5 + 0.25 - 45) / 3)
    c, d = run(1, 3.0, 3, 40, 50), run(1, 2.5, 2.25, 8, 5)
    assert ev.paired([a, c] * 2, [b, d], 0) == ev.paired([a, c], [b, d], 0)


def test_table_takes_the_own_grid_from_scores_of_the_last_weights(tabled, tmp_path):
    head, scores = ["case", "grid", "class", *ev.SCORES], {}
    for name, init, up in (("a", "scratch", 0.0), ("b", "x.pth", 0.3)):
        seg_run(tmp_path / name, 0.5, 0, init=init, cases={f"c{i}": [0.5] for i in range(6)})
        own = 0.1 * np.arange(1, 7) + up
        scores[name] = own.mean()
        rows = [[f"c{i}", "own", "liver", v, v / 2, 9 if i else "", 1] for i, v in enumerate(own)]
        rows += [[f"c{i}", "resampled", "mean", 0, 0, 0, 0] for i in range(6)]
        rows += [[f"c{i}", "own", "mean", 0, 0, 0, 0] for i in range(6)]
        write_table(tmp_path / name / "eval-seg/cases.csv", head, rows)
        how = {"split": "val", "ckpt": f"{tmp_path}/{name}/ckpt.pt", "data": None, "mirror": False}
        how |= {"overlap": 0.5, "tolerance": [2]}
        write_json(tmp_path / name / "eval-seg/metrics.json", {"args": how})
    _, rows, tests = tabled()
    means = {(r["metric"], r["initialisation"]): float(r["mean"]) for r in rows}
    assert len(means) == 8 and means["hd95_mm, own grid", "scratch"] == 9
    assert means["dice, own grid", "x.pth"] == pytest.approx(scores["b"])
    gains = {t["metric"]: float(t["B - A"]) for t in tests}
    assert gains["dice, own grid"] == pytest.approx(0.3)
    assert gains["nsd, own grid"] == pytest.approx(0.15) and gains["Dice"] == 0
    # of weights that were trained on since
    write_json(tmp_path / "a/eval-seg/metrics.json", {"args": how | {"step": 3}})
    write_json(tmp_path / "b/eval-seg/metrics.json", {"args": how | {"step": 6}})
    said, rows, _ = tabled()
    assert f"not in the table: {tmp_path}/a: eval-seg is of an earlier step: run" in said
    assert len(rows) == 4 and {r["initialisation"] for r in rows} == {"x.pth"}
    # a surface that was found nowhere has no distance
    rows = [[f"c{i}", "own", "liver", 0, 0, "", 1] for i in range(6)]
    write_table(tmp_path / "b/eval-seg/cases.csv", head, rows)
    write_json(tmp_path / "b/eval-seg/metrics.json", {"args": how})
    found = {r["metric"]: (r["runs"], r["mean"]) for r in tabled()[1]}
    assert found["hd95_mm, own grid"] == ("0", "") and found["nsd, own grid"] == ("1", "0.0")
    # of best.pt, of another split or task: not what the others are of
    for wrong in ({"ckpt": "best.pt"}, {"split": "all"}, {"task": "mine"}):
        for name in "ab":
            write_json(tmp_path / name / "eval-seg/metrics.json", {"args": how | wrong})
        assert [r["metric"] for r in tabled()[1]] == ["Dice", "Dice"]


def test_table_bootstrap_of_auc(tabled, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "DRAWS", 300)
    rng = np.random.default_rng(0)
    y = np.arange(80) % 3 == 0
    good, bad = y + 0.5 * rng.standard_normal(80), rng.standard_normal(80)
    cls_run(tmp_path / "x/0", y, bad, 0)
    cls_run(tmp_path / "x/1", y, bad[::-1], 1)
    cls_run(tmp_path / "y", y, good, 0, "a/ckpt.pt")
    cls_run(tmp_path / "z", y, good + 0.01 * rng.standard_normal(80), 0, "b/ckpt.pt")
    _, rows, tests = tabled()
    assert rows[0]["task"] == "phantom-cls" and [r["runs"] for r in rows] == ["2", "1", "1"]
    far, _, near = tests
    assert (far["n"], far["seeds"]) == ("40", "[0]")
    low, middle, high = (float(far[k]) for k in ("low", "B - A", "high"))
    assert 0 < low < middle < high
    assert float(near["low"]) <= 0 <= float(near["high"])
    assert tabled()[2] == tests


def test_table_lists_what_it_leaves_out(tabled, tmp_path):
    seg_run(tmp_path / "a", 0.5, 0)
    seg_run(tmp_path / "b", 0.6, 1, init="x.pth")
    seg_run(tmp_path / "c", 0.7, 0, labels=0.1)
    seg_run(tmp_path / "c/earlier-1", 0.1, 5)
    seg_run(tmp_path / "h", 0.8, 3, labels=0.1, lr=0.3, workers=5)
    for name in "def":
        seg_run(tmp_path / name, 0.5, 2)
    (tmp_path / "d/metrics.json").unlink()
    (tmp_path / "e/metrics.json").write_text('{"mean_dice": 0.')
    write_json(tmp_path / "f/metrics.json", {"other": 1})
    write_json(tmp_path / "g/args.json", {"volume": 64, "init": None})  # pre-training: no row
    cls_run(tmp_path / "k", np.ones(4, int), np.ones(4), 0)
    write_json(tmp_path / "k/metrics.json", {"seed": 0, "test": {"auc": {"value": None}}})
    said, rows, (test,) = tabled()
    assert [(r["labels"], r["runs"]) for r in rows] == [("0.1", "2"), ("1", "1"), ("1", "1")]
    assert said.count("runs of amos, 0.1, Dice, scratch differ: lr 0.3\n") == 1
    assert test["n"] == "no seed or no cases in common"
    lines = [line for line in said.splitlines() if line.startswith("not in the table")]
    for name, line in zip("defk", lines, strict=True):
        assert str(tmp_path / name) in line
    assert "metrics.json: cannot be read as JSON (No such file" in lines[0]
    assert "cannot be read as JSON" in lines[1]
    assert "not as the fine-tuning scripts write it" in lines[2]
    assert "AUC is undefined" in lines[3]
    with pytest.raises(BadInput, match="(?s)no finished fine-tuning run.*No such file"):
        tabled(tmp_path / "d")
    with pytest.raises(BadInput, match="gone: no such folder"):
        tabled(tmp_path, tmp_path / "gone")


def test_the_bootstrap_counts_only_draws_where_the_auc_is_defined(monkeypatch):
    monkeypatch.setattr(ev, "DRAWS", 200)
    y = [True, False, False]  # about 30 of 100 draws lack the one positive
    runs = []
    for p in ([0.1, 0.5, 0.9], [0.9, 0.5, 0.1]):
        run = {"seed": 0, "value": auc(np.array(y), np.array(p)), "dice": {}}
        run["cases"] = [(f"f{i}", f"p{i}", int(v)) for i, v in enumerate(y)]
        run |= {"cell": ("t", "1", "AUC", "i"), "scores": np.stack([1 - np.array(p), p], 1)}
        runs.append([run])
    defined = sum(0 in at and {*at} != {0} for at in ev.resampled(range(3), 200, 0))
    test = ev.paired(*runs, 0)
    assert 100 < defined < 160 and test["B - A"] == 1 and test["high"] == 1
    never = {3: [1, 2, 2], 1: [0]}  # the positive
    monkeypatch.setattr(ev, "resampled", lambda of, *_: iter([never[len(of)]] * 200))
    assert ev.paired(*runs, 0)["low"] is None
