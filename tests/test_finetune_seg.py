"""finetune_seg.py as its users run it, on made-up volumes of 24³ voxels, and its parts against numbers worked out by hand."""
import csv
import json
import math
import os
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

import finetune_seg
from common import BadInput, load_checkpoint, read_log, save_checkpoint
from finetune_seg import Crops, augment, dice_of, parser, segmentation_loss
from model import (SIZES, Config, Decoder, Model, Segmenter, checkpoint_state, load_segmenter, overlap_counts, sliding_window,
                   window_starts)
from serialize import invert, prepare, prepare_labels, read_labels, read_scan

SMALL = ["--preset", "nano", "--roi", 16, "--spacing", 1, 1, 1, "--window", 0, 100, "--classes", "ball", "box", "--init", "scratch", "--batch", 2,
         "--steps", 6, "--val-every", 3, "--log-every", 1, "--dtype", "fp32", "--features", 4, "--workers", 0, "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def save(path, values, affine=np.eye(4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def patient(seed, edge=24):
    """A bright ball (1) and a less bright box (2) in the dark: image int16, label uint8."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1)
    label = np.zeros([edge] * 3, np.uint8)
    label[(np.abs(at - rng.integers(5, 8, 3)) < 4).all(-1)] = 2
    label[np.linalg.norm(at - rng.integers(15, 18, 3), axis=-1) < 5] = 1
    return (np.array([20, 80, 50])[label] + rng.normal(0, 5, label.shape)).astype(np.int16), label


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set in the Decathlon layout: six patients, litter of macOS, no table of contents."""
    root = tmp_path_factory.mktemp("mine")
    for i in range(6):
        image, label = patient(i)
        tag = "Tr" if i < 4 else "Va"
        save(root / f"images{tag}/case_{i:02d}.nii.gz", image)
        save(root / f"labels{tag}/case_{i:02d}.nii.gz", label)
    (root / "labelsTr/._case_00.nii.gz").write_bytes(b"litter")
    return root


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(data, flags): the script in this process, with the small recipe; the cache is shared by a test's runs."""
    def call(data, out, *flags, task="mine", small=SMALL):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        words = ["finetune_seg.py", "--task", task, "--data", data, "--cache", tmp_path / "cache", "--out", out, *small, *flags]
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        try:
            finetune_seg.main()
        finally:
            for s, h in handlers.items():
                signal.signal(s, h)
    return call


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return [r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r]


# ---------------------------------------------------------------- network


def test_decoder_has_the_published_number_of_parameters():
    assert sum(w.numel() for w in Decoder(768, 16, 2).parameters()) == 4_443_106


@pytest.mark.parametrize("patch, roi", [(16, (32, 48, 32)), (8, (16, 24, 16)), (4, (8, 8, 12))])
def test_logits_have_a_class_a_voxel_and_every_weight_but_the_head_learns(patch, roi):
    net = Segmenter(Model(Config(width=24, layers=4, heads=2, patch=patch)), 3, features=4)
    net(torch.rand(2, *roi)).square().mean().backward()
    assert net(torch.rand(1, *roi)).shape == (1, 3, *roi)
    assert [k for k, w in net.named_parameters() if w.grad is None] == ["encoder.head.weight", "encoder.head.bias"]
    assert all(w.grad.isfinite().all() for w in net.parameters() if w.grad is not None)


def test_skips_are_blocks_3_6_9_and_the_norm_in_their_places_on_the_grid():
    net = Segmenter(Model(Config(width=12, layers=12, heads=2, patch=8)), 2)
    seen = []
    net.decoder.forward = lambda scan, grids: seen.append(grids)
    x = torch.rand(1, 16, 24, 32)
    net(x)
    _, hidden = net.encoder.encode(x)
    for grid, i in zip(seen[0], (3, 6, 9, 11)):
        assert grid.shape == (1, 12, 2, 3, 4)
        assert torch.equal(grid[0, :, 1, 2, 3], hidden[i][0, 1 * 12 + 2 * 4 + 3])


# ---------------------------------------------------------------- loss


def test_loss_against_float64_by_hand():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(2, 3, 4, 5, 6)), rng.integers(0, 3, (2, 4, 5, 6))
    label[1] = 0                                                                       # two classes are not there
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    dice, entropy = [], []
    for b in range(2):
        for k in range(3):
            t = label[b] == k
            dice.append(2 * p[b, k][t].sum() / ((p[b, k] ** 2).sum() + t.sum() + 1e-6))
        entropy += [-math.log(p[b][(label[b, x, y, z], x, y, z)]) for x in range(4) for y in range(5) for z in range(6)]
    want = 1 - np.mean(dice) + np.mean(entropy)
    assert segmentation_loss(torch.from_numpy(logits).float(), torch.from_numpy(label).byte()).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 6e4])
def test_loss_is_finite(dtype, scale):
    for label in (torch.zeros(2, 12, 12, 12), torch.ones(2, 12, 12, 12)):              # all background; classes that are empty
        logits = (torch.randn(2, 4, 12, 12, 12).clamp(-1, 1) * scale).to(dtype).requires_grad_()
        loss = segmentation_loss(logits, label.byte())
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_in_autocast_is_finite(dtype):
    net = Segmenter(Model(Config(width=24, layers=4, heads=2, patch=8)), 3, 4)
    for x in (torch.zeros(1, 32, 32, 32), torch.rand(1, 32, 32, 32) * 1000):           # 4 patches: less runs in float32
        with torch.autocast("cpu", dtype):
            logits = net(x)
        loss = segmentation_loss(logits, torch.zeros(1, 32, 32, 32, dtype=torch.uint8))
        loss.backward()
        assert loss.isfinite()
        if dtype == torch.bfloat16:                                                    # fp16 needs a loss scale for its gradients
            assert all(w.grad.isfinite().all() for w in net.parameters() if w.grad is not None)


def test_dice_of_counts():
    truth, found = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0, 1, 1, 0, 1, 2])
    counts = overlap_counts(found, truth, 4)
    assert counts.tolist() == [[1, 2, 3], [2, 3, 3], [0, 1, 0], [0, 0, 0]]
    dice = dice_of(counts[None])
    assert dice[0, 0] == pytest.approx(4 / 6) and np.isnan(dice[0, 1:]).all()          # no Dice where the case has no such class


# ---------------------------------------------------------------- sliding window


@pytest.mark.parametrize("shape", [(16, 16, 8), (17, 31, 8), (40, 16, 23), (5, 6, 7), (3, 50, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_identity_comes_back(shape, overlap):
    volume, windows, roi = torch.rand(shape), [], (16, 16, 8)

    def predict(x):
        windows.append(len(x))
        assert x.shape[1:] == roi
        return torch.stack([x, -x], 1)

    out = sliding_window(predict, volume, roi, overlap, batch=3)
    assert out.shape == (2, *shape)
    assert (out[0] - volume).abs().max() < 1e-5 and (out[1] + volume).abs().max() < 1e-5
    assert sum(windows) == math.prod(1 + math.ceil(max(0, n - r) / int(r * (1 - overlap))) for n, r in zip(shape, roi))
    assert max(windows) <= 3


def test_windows_cover_an_axis():
    assert window_starts(200, 96, 0.75) == [0, 24, 48, 72, 96, 104] and window_starts(96, 96, 0.75) == [0] == window_starts(50, 96, 0.5)


def test_mirrors_are_turned_back():
    volume = torch.rand(20, 18, 9)
    out = sliding_window(lambda x: x[:, None], volume, (16, 16, 8), 0.5, 2, mirror=(0, 1, 2))
    assert (out[0] - volume).abs().max() < 1e-5
    ramp = torch.arange(16.0)[:, None, None].expand(16, 16, 8)
    out = sliding_window(lambda x: ramp.expand(len(x), 1, 16, 16, 8), torch.zeros(16, 16, 8), (16, 16, 8), mirror=(0,))
    assert torch.allclose(out, torch.full_like(out, 7.5))                              # a ramp and its mirror image


def test_a_large_volume_stays_below_8_gib():
    code = ("import resource, torch; from model import sliding_window; torch.set_num_threads(2);"
            "out = sliding_window(lambda x: x[:, None].expand(-1, 16, -1, -1, -1), torch.zeros(512, 512, 300, dtype=torch.float16),"
            "(192, 192, 160), 0.0, batch=1); assert out.shape == (16, 512, 512, 300);"
            "found = out.argmax(0); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)")
    done = subprocess.run([sys.executable, "-c", code], cwd=finetune_seg.__file__.rsplit("/", 1)[0], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8


# ---------------------------------------------------------------- preparation and back


def organ_map(shape, spacing):
    """Two organs whose size and place are in mm: an ellipsoid of 3 to 5 cm and a tube of 2.4 cm."""
    mm = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing)], indexing="ij"), -1)
    label = np.zeros(shape, np.uint8)
    label[np.linalg.norm((mm - [50, 45, 45]) / [25, 20, 15], axis=-1) < 1] = 1
    label[np.linalg.norm(mm[..., :2] - [85, 80], axis=-1) < 12] = 2
    return label


@pytest.mark.parametrize("grid", ["RAS", "LPS", "oblique"])
@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (1.5, 1.2, 2.0)])
def test_preparing_and_inverting_gives_the_labels_back(tmp_path, grid, spacing):
    label = organ_map([int(120 / s) for s in spacing], spacing)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-31.5, 12.25, 100]
    if grid == "LPS":
        affine[:2] *= -1
    if grid == "oblique":
        a, b = np.radians([20, 12])
        affine[:3, :3] = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]) @ np.array(
            [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]) @ affine[:3, :3]
    save(tmp_path / "image.nii.gz", np.where(label > 0, 100, -1000).astype(np.int16), affine)
    save(tmp_path / "label.nii.gz", label, affine)
    values, ras, own = read_scan(tmp_path / "image.nii.gz")
    volume, geometry = prepare(values, ras, own, (1, 1, 1), (-200, 200))
    small = prepare_labels(read_labels(tmp_path / "label.nii.gz", 3, values, ras), json.loads(json.dumps(geometry)))
    assert volume.shape == small.shape and volume.dtype == np.float16 and max(small.shape) < 121 and set(np.unique(small)) == {0, 1, 2}
    assert volume.min() >= 0 and volume.max() <= 1
    again, back = invert(small, json.loads(json.dumps(geometry)))
    assert np.array_equal(back, nib.load(tmp_path / "label.nii.gz").affine) and again.shape == label.shape
    for k in (1, 2):
        assert 2 * ((again == k) & (label == k)).sum() / ((again == k).sum() + (label == k).sum()) >= 0.98


# ---------------------------------------------------------------- crops and augmentation


@pytest.fixture
def prepared(run, home, tmp_path):
    run(home, tmp_path / "prepared", "--steps", 1)
    args = parser().parse_args(["--task", "mine", "--classes", "ball", "box"])
    args.data, args.cache, args.spacing, args.window, args.workers = str(home), str(tmp_path / "cache"), [1.0, 1.0, 1.0], [0.0, 100.0], 0
    cases, classes = finetune_seg.find_cases(args.task, args.data, args.classes, WHERE)
    return finetune_seg.prepare_all(cases, classes, {}, args, WHERE)[0]


class WHERE:
    main, rank, world = True, 0, 1
    say, barrier = staticmethod(lambda *words: None), staticmethod(lambda: None)


def test_a_crop_is_a_function_of_its_number_and_centred_on_a_class(prepared):
    a, b = (Crops(prepared, (8, 8, 8), 4, 1.0, seed=3) for _ in range(2))
    assert all(torch.equal(a[5][k], b[5][k]) for k in a[5]) and not torch.equal(a[5]["image"], a[11]["image"])
    assert a[5]["image"].shape == (4, 8, 8, 8) and a[5]["label"].dtype == torch.uint8
    middles = torch.cat([a[n]["label"][:, 4, 4, 4] for n in range(60)])
    assert 0.35 < (middles == 1).float().mean() < 0.65 and (middles == 0).float().mean() < 0.05  # the classes in equal shares
    few = torch.cat([Crops(prepared, (8, 8, 8), 4, 0.0)[n]["label"][:, 4, 4, 4] for n in range(60)])
    assert (few == 0).float().mean() > 0.5


def test_a_small_volume_is_padded(prepared):
    draw = Crops(prepared, (32, 32, 40), 1)[0]
    n = prepared[0]["geometry"]["box"][2]
    assert draw["image"].shape == (1, 32, 32, 40) and (draw["image"][..., :8] == 0).all() and n[1] - n[0] <= 24


@pytest.mark.parametrize("kind", ["standard", "strong"])
def test_image_and_label_move_together(kind):
    args = parser().parse_args(["--task", "la", "--flip", "0.5", "--rotate", "0.5", "--intensity", "0", "--augment", kind])
    label = torch.from_numpy(np.stack([patient(i)[1] for i in range(12)]))
    chance = torch.rand(12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chance[:, 17:] = 1                                                                 # leave the intensities alone
    a, b = (augment(label.float(), label.clone(), chance, args) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    moved = sum(not torch.equal(x, y) for x, y in zip(a[1], label))
    assert moved > 6 and a[1].dtype == torch.uint8
    agree = (a[0].round() == a[1]).float().mean() if kind == "strong" else (a[0] == a[1]).float().mean()
    assert agree > (0.97 if kind == "strong" else 0.9999)
    assert set(a[1].unique().tolist()) == {0, 1, 2}


def test_strong_augmentation_is_finite_and_changes_intensities():
    args = parser().parse_args(["--task", "la", "--augment", "strong", "--flip", "0.5"])
    x = torch.randn(6, 24, 24, 16, generator=torch.Generator().manual_seed(0))
    y, label = augment(x.clone(), torch.ones(6, 24, 24, 16, dtype=torch.uint8), torch.zeros(6, 32, dtype=torch.float64) + 0.05, args)
    assert y.shape == x.shape and y.isfinite().all() and not torch.allclose(y, x, atol=0.1)


# ---------------------------------------------------------------- runs


def test_six_steps_are_three_and_three_bitwise_and_leave_every_file(run, home, tmp_path, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--augment", "strong", "--crops", 2]
    run(home, whole, *flags)
    run(home, half, *flags, "--stop-after", 3)
    assert load_checkpoint(half / "ckpt.pt")["step"] == 3
    run(home, half, "--resume", small=())
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (whole, half))
    assert same(a["model"], b["model"]) and a["best"] == b["best"] and same(weights(whole / "best.pt"), weights(half / "best.pt"))
    for k in a["optimiser"]["state"]:
        assert same(a["optimiser"]["state"][k], b["optimiser"]["state"][k])
    assert losses(whole) == losses(half) and len(losses(half)) == 6
    for f in ("args.json", "metrics.json", "curves.png", "overlay.png", "subset.json", "skipped.csv"):
        assert (half / f).stat().st_size > 0
    assert "ball" in capsys.readouterr().out
    net, made = load_segmenter(half / "best.pt")
    assert made["classes"] == ["ball", "box"] and net(torch.rand(1, *made["roi"])).shape == (1, 3, 16, 16, 16)
    with pytest.raises(BadInput, match="the run to resume has"):
        run(home, half, "--resume", "--lr", 1, small=())


def test_two_volumes_are_learnt(run, home, tmp_path):
    """The very two cases that it validates with: mean Dice 0.95 or more."""
    both = [dict(image=f"imagesTr/case_{i:02d}.nii.gz", label=f"labelsTr/case_{i:02d}.nii.gz") for i in range(2)]
    (home / "dataset_withVal.json").write_text(json.dumps(dict(training=both, validation=both)))
    try:
        run(home, tmp_path / "fit", "--steps", 140, "--roi", 24, "--val-every", 140, "--log-every", 10, "--intensity", 0, "--features", 8)
    finally:
        (home / "dataset_withVal.json").unlink()
    found = losses(tmp_path / "fit")
    assert json.loads((tmp_path / "fit/metrics.json").read_text())["mean_dice"] >= 0.95
    assert found[-1] < found[0] / 3


def test_frozen_encoder_stays_and_the_decoder_learns(run, home, tmp_path):
    encoder = Model(Config(**SIZES["nano"]))
    save_checkpoint(tmp_path / "pre.pt", **checkpoint_state(encoder))
    run(home, tmp_path / "out", "--init", tmp_path / "pre.pt", "--freeze", "--steps", 2)
    after = weights(tmp_path / "out/ckpt.pt")
    assert all(torch.equal(v, after[f"encoder.{k}"]) for k, v in encoder.state_dict().items())
    run(home, tmp_path / "two", "--init", tmp_path / "pre.pt", "--steps", 2)
    assert not torch.equal(encoder.begin, weights(tmp_path / "two/ckpt.pt")["encoder.begin"])


def test_smaller_sets_of_labels_are_parts_of_larger_ones(run, home, tmp_path):
    sets = []
    for share in (0.25, 0.5, 1.0):
        run(home, tmp_path / f"{share}", "--labels", share, "--steps", 1)
        sets.append(set(json.loads((tmp_path / f"{share}/subset.json").read_text())["train"]))
    assert [len(s) for s in sets] == [1, 2, 4] and sets[0] < sets[1] < sets[2]


def test_amos_runs_the_same_way_as_the_phantom(run, phantom_home, tmp_path):
    small = ["--preset", "nano", "--roi", 32, "--steps", 2, "--val-every", 3, "--log-every", 1, "--init", "scratch", "--overlap", 0, "--features", 4]
    for task in ("phantom", "amos"):
        run(phantom_home / "data/phantom/amos", tmp_path / task, task=task, small=small)
    assert losses(tmp_path / "phantom") == losses(tmp_path / "amos")
    assert json.loads((tmp_path / "amos/metrics.json").read_text())["dice"].keys() >= {"spleen", "prostate/uterus"}


def test_two_processes_train_and_validate_as_one(run, home, script, tmp_path):
    flags = ["--task", "mine", "--data", home, "--cache", tmp_path / "cache", *SMALL]
    run(home, tmp_path / "one")
    script("finetune_seg.py", *flags, "--out", tmp_path / "two", ranks=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    one, two = (json.loads((tmp_path / p / "metrics.json").read_text())["cases"] for p in ("one", "two"))
    assert one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], abs=0.02) for k in one)


def test_bench_reports_crops_and_waiting(run, home, tmp_path, capsys, monkeypatch):
    run(home, tmp_path / "bench", "--bench")
    said = capsys.readouterr().out
    assert "crops/s" in said and "waiting for data" in said and not (tmp_path / "bench").exists()


# ---------------------------------------------------------------- bad input


def test_each_bad_case_has_its_line(run, tmp_path, capsys):
    root = tmp_path / "bad"
    image, label = patient(0)
    other = label.copy()
    other[0, 0, 0] = 9
    holes = image.astype(np.float32)
    holes[3, 4, 5] = np.nan
    shifted = np.eye(4)
    shifted[0, 3] = 3
    cases = dict(good1=(image, label), good2=(image, label), good3=(image, label), shape=(image, label[:-1]), affine=(image, label), range=(image, other),
                 nan=(holes, label), half=(image, label.astype(np.float32) + 0.5))
    for name, (i, k) in cases.items():
        save(root / f"imagesTr/{name}.nii.gz", i)
        save(root / f"labelsTr/{name}.nii.gz", k, shifted if name == "affine" else np.eye(4))
    (root / "imagesTr/._good1.nii.gz").write_bytes(b"litter")
    pairs = [dict(image=f"./imagesTr/{n}.nii.gz", label=f"./labelsTr/{n}.nii.gz") for n in [*cases, "absent"]]
    (root / "dataset_withVal.json").write_text(json.dumps(dict(training=pairs[1:], validation=pairs[:1])))
    run(root, tmp_path / "out", "--steps", 1)
    with open(tmp_path / "out/skipped.csv") as f:
        reasons = {r["case"]: r["reason"] for r in csv.DictReader(f)}
    said = capsys.readouterr().out
    for name, words in dict(shape="label 23x24x24, image 24x24x24", affine="up to 3.0 mm apart", range="0 ... 9, where 0 ... 2", nan="1 voxels are NaN",
                            half="not integers", absent="no such image file, though it is listed").items():
        assert words in reasons.pop(name) and words in said
    assert not reasons and "6 cases cannot be used" in said
    (root / "dataset_withVal.json").write_text(json.dumps(dict(training=pairs[3:5], validation=pairs[:1])))
    with pytest.raises(BadInput, match="(?s)no case left to train on.*3.0 mm apart.*label 23x24x24"):
        run(root, tmp_path / "out2", "--steps", 1)


def test_folders_flags_and_checkpoints_that_do_not_fit(run, home, tmp_path):
    with pytest.raises(BadInput, match="no such folder. --task spleen needs Task09_Spleen.*labelsTr"):
        run(tmp_path / "nowhere", tmp_path / "out", task="spleen")
    (tmp_path / "empty/labelsTr").mkdir(parents=True)
    (tmp_path / "empty/labelsTr/._a.nii.gz").write_bytes(b"litter")
    with pytest.raises(BadInput, match="labelsTr holds no"):
        run(tmp_path / "empty", tmp_path / "out")
    save_checkpoint(tmp_path / "p16.pt", **checkpoint_state(Model(Config(width=24, layers=4, heads=2, patch=16))))
    with pytest.raises(BadInput, match="--roi 24 24 24: not a multiple of the patch 16 of --init"):
        run(home, tmp_path / "out", "--init", tmp_path / "p16.pt", "--roi", 24)
    with pytest.raises(BadInput, match="'patch': 16.*--size nano is.*'patch': 8"):
        run(home, tmp_path / "out", "--init", tmp_path / "p16.pt", "--size", "nano")
    with pytest.raises(BadInput, match="--window 5 2: LOW HIGH"):
        run(home, tmp_path / "out", "--window", 5, 2)
    with pytest.raises(BadInput, match="--labels 0"):
        run(home, tmp_path / "out", "--labels", 0)
    with pytest.raises(BadInput, match="name of your own with --data"):
        finetune_seg.settle(parser().parse_args(["--task", "heart"]), finetune_seg.place("cpu"))


def test_without_a_list_the_split_is_a_rule_of_the_case_id(home, tmp_path):
    for i in range(30):
        for part in ("images", "labels"):
            (tmp_path / f"{part}Tr").mkdir(exist_ok=True)
            (tmp_path / f"{part}Tr/liver_{i}.nii.gz").touch()
    args = parser().parse_args(["--task", "liver", "--data", str(tmp_path)])
    split = lambda: {c["id"]: c["split"] for c in finetune_seg.find_cases("liver", args.data, args.classes, WHERE)[0]}  # noqa: E731
    before = split()
    assert 2 <= sum(s == "val" for s in before.values()) <= 12
    os.remove(tmp_path / "labelsTr/liver_7.nii.gz")
    assert split() == {k: v for k, v in before.items() if k != "liver_7"}
