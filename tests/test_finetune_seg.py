"""finetune_seg.py as its users run it, on volumes of 24³ voxels, its parts against other sums."""

import csv
import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nibabel.eulerangles import euler2mat

import finetune_seg
from common import BadInput, load_checkpoint, read_log, save_checkpoint, setup
from finetune_seg import (
    Crops,
    Decoder,
    Segmenter,
    augment,
    dice_of,
    find_cases,
    invert,
    load_segmenter,
    nearest,
    overlap_counts,
    prepare,
    prepare_all,
    range_of_case,
    read_case,
    segmentation_loss,
    sliding_window,
    smooth,
    starts,
)
from model import SIZES, Config, Model, checkpoint_state

SMALL = ["--preset=nano", "--roi=16", "--batch=2", "--steps=6", "--val-every=3", "--log-every=1"]
SMALL += ["--init=scratch", "--dtype=fp32", "--workers=0", "--device=cpu"]
SMALL += ["--spacing", 1, 1, 1, "--range", 0, 100, "--classes", "ball", "box"]


def save(path, values, affine=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def patient(seed, edge=24):
    """A bright ball (1) and a less bright box (2) in the dark: image int16, label uint8."""
    rng = np.random.default_rng(seed)
    at = np.moveaxis(np.indices([edge] * 3), 0, -1)
    label = np.zeros([edge] * 3, np.uint8)
    label[(np.abs(at - rng.integers(5, 8, 3)) < 4).all(-1)] = 2
    label[np.linalg.norm(at - rng.integers(15, 18, 3), axis=-1) < 5] = 1
    return (np.array([20, 80, 50])[label] + rng.normal(0, 5, label.shape)).astype(np.int16), label


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set in the Decathlon layout: six patients, litter of macOS, no table of contents."""
    root = tmp_path_factory.mktemp("mine")
    for i in range(6):
        tag, (image, label) = "Tr" if i < 4 else "Va", patient(i)
        save(root / f"images{tag}/case_{i:02d}.nii.gz", image)
        save(root / f"labels{tag}/case_{i:02d}.nii.gz", label)
    (root / "labelsTr/._case_00.nii.gz").write_bytes(b"litter")
    return root


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(data, out, flags): the script in this process with a small recipe, a thin decoder."""
    monkeypatch.chdir(tmp_path)

    def call(data, out, *flags, task="mine", small=SMALL, features=4):
        monkeypatch.setattr(finetune_seg, "FEATURES", features)
        words = ["x", "--task", task, "--data", data, "--out", out, *small, *flags]
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        finetune_seg.main()

    return call


@pytest.fixture
def machine():
    return setup(Namespace(device="cpu", dtype="fp32", seed=0))


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return [r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r]


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def net_of(patch, classes=3, layers=4, width=24, decoder="unetr"):
    model = Model(Config(width=width, layers=layers, heads=2, patch=patch))
    return Segmenter(model, classes, 4, decoder)


# ---- network, loss ---------------------------------------------------------------------------


def test_decoder_has_the_published_number_of_parameters():
    assert sum(w.numel() for w in Decoder(768, 16, 2, f=16).parameters()) == 4_443_106


@pytest.mark.parametrize("decoder", ["unetr", "light"])
@pytest.mark.parametrize("patch, roi", [(16, (32, 48, 32)), (8, (16, 24, 16)), (4, (8, 8, 12))])
def test_logits_have_a_class_a_voxel_and_every_weight_but_the_head_learns(patch, roi, decoder):
    net = net_of(patch, decoder=decoder)
    logits = net(torch.rand(2, *roi))
    logits.square().mean().backward()
    grads = {k: w.grad for k, w in net.named_parameters()}
    assert logits.shape == (2, 3, *roi)
    assert grads.pop("encoder.head.weight") is None and grads.pop("encoder.head.bias") is None
    assert all(g.isfinite().all() and g.any() for g in grads.values())
    scans, grids = torch.rand(2, 1, 1, *roi), [torch.rand(1, 24, *(n // patch for n in roi))] * 4
    one, other = (net.decoder(scan, grids) for scan in scans)
    assert torch.equal(one, other) == (decoder == "light")  # no path from the scan


CUDA = pytest.param("cuda", "inductor", 1e-3, marks=pytest.mark.gpu)


@pytest.mark.parametrize("device, backend, error", [("cpu", "aot_eager", 1e-6), CUDA])
def test_network_compiles_as_one_graph(device, backend, error, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as setup has it
    net, x = net_of(8).to(device), torch.rand(2, 16, 24, 16, device=device)

    def results():
        net.zero_grad()
        logits = net(x)
        logits.square().mean().backward()
        with torch.no_grad():  # a last batch of windows: fewer
            return [logits, net(x[:1]), *(w.grad for w in net.decoder.parameters())]

    exact = results()
    net.compile(dynamic=False, fullgraph=True, backend=backend)
    for ours, other in zip(results(), exact, strict=True):
        torch.testing.assert_close(ours, other, rtol=error, atol=error * other.abs().max().item())


def test_skips_are_blocks_3_6_9_and_the_norm_in_their_places_on_the_grid():
    net, seen = net_of(8, layers=12, width=12), []
    net.decoder.forward = lambda scan, grids: seen.append(grids)
    x = torch.rand(1, 16, 24, 32)
    net(x)
    _, hidden = net.encoder.encode(x)
    for grid, i in zip(seen[0], (3, 6, 9, 11)):
        assert grid.shape == (1, 12, 2, 3, 4)
        assert torch.equal(grid[0, :, 1, 2, 3], hidden[i][0, 1 * 12 + 2 * 4 + 3])


def test_loss_against_float64_by_hand():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(2, 3, 4, 5, 6)), rng.integers(0, 3, (2, 4, 5, 6))
    label[1] = 0  # two classes are not there
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    t = np.moveaxis(np.eye(3)[label], -1, 1)
    both, squares = ((p * t).sum((2, 3, 4)), (p**2 + t).sum((2, 3, 4)))
    want = 1 - (2 * both / (squares + 1e-6)).mean() - np.log((p * t).sum(1)).mean()
    loss = segmentation_loss(torch.tensor(logits).float(), torch.tensor(label).byte())
    assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 6e4])
def test_loss_is_finite(dtype, scale):
    for value in (0, 1):  # all background; classes that are empty
        label = torch.full((2, 12, 12, 12), value, dtype=torch.uint8)
        logits = (torch.randn(2, 4, 12, 12, 12).clamp(-1, 1) * scale).to(dtype).requires_grad_()
        loss = segmentation_loss(logits, label)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()


def test_dice_of_counts():
    target, prediction = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0, 1, 1, 0, 1, 2])
    counts = overlap_counts(prediction, target, 4)
    assert counts.tolist() == [[1, 2, 3], [2, 3, 3], [0, 1, 0], [0, 0, 0]]
    dice = dice_of(counts[None])
    assert dice[0, 0] == pytest.approx(4 / 6)
    assert np.isnan(dice[0, 1:]).all()  # no Dice where the case has no such class


# ---- sliding window --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 8), (17, 31, 8), (40, 16, 23), (5, 6, 7), (3, 50, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_identity_comes_back(shape, overlap):
    volume, sizes, roi = torch.rand(shape), [], (16, 16, 8)

    def predict(x):
        sizes.append(len(x))
        return torch.stack([x, -x], 1)

    out = sliding_window(predict, volume, roi, overlap, batch=3)
    assert (out - torch.stack([volume, -volume])).abs().max() < 1e-5 and out.shape[1:] == shape
    counts = [len(starts(n, r, overlap)) for n, r in zip(shape, roi)]
    assert sum(sizes) == math.prod(counts) and max(sizes) <= 3


def test_windows_cover_an_axis():
    assert starts(200, 96, 0.75) == [0, 24, 48, 72, 96, 104]
    assert starts(96, 96, 0.75) == [0] == starts(50, 96, 0.5)


def test_mirrors_are_turned_back():
    scores = torch.rand(1, 1, 16, 16, 8)  # whatever it sees
    size = scores.shape[2:]
    out = sliding_window(lambda x: scores, torch.zeros(size), size, mirror=(0, 1, 2))
    for axis in (2, 3, 4):
        scores = (scores + scores.flip(axis)) / 2
    assert torch.allclose(out, scores[0])


def test_planes_are_finished_and_let_go():
    """Memory holds a few windows' depths of scores, of the 16 that there are, and labels."""
    code = (
        "import re, torch; from finetune_seg import labels_of, sliding_window\n"
        "def peak():  # of this program: ru_maxrss is inherited from the one that began it\n"
        "    return 1024 * int(re.search(r'HWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, volume = peak(), torch.rand(512, 96, 96)\n"
        "def predict(x): return torch.linspace(0, 1, 32).view(-1, 1, 1, 1) - x[:, None]\n"
        "out = sliding_window(predict, volume, (32, 96, 96), batch=1, finish=labels_of)\n"
        "assert out.shape == volume.shape and out.dtype == torch.uint8 and (out == 31).all()\n"
        "print((peak() - before) / (32 * 4 * volume.numel()))"
    )
    root = Path(finetune_seg.__file__).parent
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert float(said.stdout) < 0.45


# ---- preparation and back --------------------------------------------------------------------


@pytest.mark.parametrize("turn", [np.diag([-1, -1, 1]), euler2mat(0.35, 0.2, 0.1)])
@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (1.5, 1.2, 2.0)])
def test_preparing_and_inverting_gives_the_labels_back(tmp_path, turn, spacing):
    label = nearest(patient(0)[1], [int(120 / s) for s in spacing])  # 12 cm
    affine = nib.affines.from_matvec(turn * spacing, [-31.5, 12.25, 100])
    case = {what: str(tmp_path / f"{what}.nii") for what in ("image", "label")}
    save(case["image"], np.where(label > 0, 100, -1000).astype(np.int16), affine)
    save(case["label"], label, affine)
    *scan, labels = read_case(case, 3)
    volume, geometry = prepare(*scan, (1, 1, 1), (-200, 200))
    geometry = json.loads(json.dumps(geometry))
    small = nearest(labels, geometry["resampled"])[finetune_seg.boxed(geometry["box"])]
    assert volume.shape == small.shape and volume.dtype == np.float16 and volume.max() <= 1
    again, own = invert(small, geometry)
    assert np.allclose(own, affine) and again.shape == label.shape
    for k in (1, 2):
        both, either = ((again == k) & (label == k)).sum(), (again == k).sum() + (label == k).sum()
        assert 2 * both >= 0.98 * either


@pytest.mark.parametrize("shape", [(21, 33, 40), (7, 9, 5), (2, 2, 2)])
def test_smooth_takes_the_class_of_the_largest_share(shape):
    coarse = np.random.default_rng(0).integers(0, 4, (4, 5, 3)).astype(np.uint8)
    labels = nearest(coarse, (16, 18, 14))
    labels[0, 0, 0] = 4  # a class that shrinking skips
    found = torch.from_numpy(smooth(labels, shape)).long()
    classes = F.one_hot(torch.from_numpy(labels).long()).double().permute(3, 0, 1, 2)
    shares = F.interpolate(classes[None], shape, mode="trilinear")[0]
    assert (shares.gather(0, found[None]) > shares.amax(0) - 1e-5).all()


# ---- crops and augmentation ------------------------------------------------------------------


@pytest.fixture
def prepared(home, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune_seg, "CACHE", tmp_path)
    cases, classes = find_cases("mine", home, ["ball", "box"], machine)
    setting = {"task": "mine", "data": home, "classes": classes, "mr_after": None}
    return prepare_all(cases, setting | {"spacing": None, "intensity_range": [0, 100]}, machine)[0]


def test_a_crop_is_a_function_of_its_number_and_centred_on_a_class(prepared, monkeypatch):
    a, b = (Crops(prepared, (8, 8, 8), 4, seed=3) for _ in range(2))
    assert all(np.array_equal(a[5][k], b[5][k]) for k in ("image", "label", "chance"))
    assert not np.array_equal(a[5]["image"], a[11]["image"])
    for share, low, high in ((1.0, 0.95, 1.0), (0.0, 0.0, 0.5)):
        monkeypatch.setattr(finetune_seg, "FOREGROUND", share)
        middles = np.array([a[n]["label"][4, 4, 4] for n in range(240)])
        assert low <= (middles > 0).mean() <= high
        assert share == 0 or 0.35 < (middles == 1).mean() < 0.65  # the classes in equal shares


def test_a_small_volume_is_padded(prepared):
    image, label, _ = Crops(prepared, (32, 32, 40), 1, seed=0)[0].values()
    assert image.shape == label.shape == (32, 32, 40)
    assert image.any() and not image[..., :8].any() and not image[..., 32:].any()


@pytest.mark.parametrize("kind", ["none", "standard", "strong"])
def test_image_and_label_move_together(kind):
    odds = {"none": (0, 0, 0), "standard": (0.5, 0.5, 0), "strong": (0.5, 0, 0)}[kind]
    args = Namespace(augment=kind, flip=odds[0], rotate=odds[1], intensity=odds[2])
    label = torch.from_numpy(np.stack([patient(i)[1] for i in range(12)]))
    chance = torch.from_numpy(np.random.default_rng(0).random((12, 32)))
    chance[:, 17:] = 1  # leave the intensities alone
    image, moved = augment(label.float(), label.clone(), chance, args)
    again, _ = augment(label.float(), label.clone(), chance, args)
    count = (moved != label).flatten(1).any(1).sum()
    assert torch.equal(image, again) and (count == 0 if kind == "none" else count > 6)
    assert (image.round() == moved).float().mean() > (0.97 if kind == "strong" else 0.9999)
    chance[:, 17:] = 0.05
    changed, _ = augment(label.float(), label.clone(), chance, args)
    assert changed.isfinite().all()
    assert torch.allclose(image, changed, atol=0.1) == (kind != "strong")


CASES = """  what is named | what follows: steps, epochs, warm-up, validations, lr, weight decay, …
--task la --preset nano --init scratch       | 700 1000 0.05 4 2e-3 1e-5 0.75 strong 0 0
--task phantom --preset nano --init x        | 700 1000 0.05 4 2e-3 0.05 0.75 standard 0 0.3
--task amos --preset published --init x      | 0 1000 0.05 20 3e-4 0.05 0.75 standard 0.2 0.1
--task amos --preset published --init scratch:base | 0 1000 0.05 20 1e-4 1e-5 0.75 standard 0.2 0.1
--task pancreas --preset published --init scratch/x | 0 500 0.1 10 3e-4 0.05 0.75 standard 0.2 0.1
--task la --preset published --init x        | 0 1000 0.05 20 3e-4 0.05 0.9 strong 0.5 0
--task colon --preset quick --init x         | 6000 1000 0.05 6 3e-4 0.05 0.75 standard 0.2 0.1
--task spleen --init x                       | 700 1000 0.05 4 2e-3 0.05 0.75 standard 0 0.3
"""


@pytest.mark.parametrize("line", CASES.splitlines()[1:])
def test_recipes(line):
    given, follows = line.split("|")
    args = finetune_seg.parser().parse_args(given.split())
    finetune_seg.settle(args, setup(Namespace(device="cpu", dtype="fp32", seed=0)))
    names = ["epochs", "warmup", "vals", "lr", "wd", "layer_decay", "augment", "flip", "intensity"]
    have = [args.steps or 0, *(getattr(args, name) for name in names)]
    for value, wanted in zip(have, follows.split(), strict=True):
        assert value == type(value)(wanted)


# ---- runs ------------------------------------------------------------------------------------


def test_six_steps_are_three_and_three_bitwise_and_leave_every_file(run, home, tmp_path, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(home, whole, "--augment=strong")
    run(home, half, "--augment=strong", "--stop-after", 3)
    assert load_checkpoint(half / "ckpt.pt")["step"] == 3
    run(home, half, "--resume", "--workers", 2)  # the same flags again are no offence
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (whole, half))
    assert same(a["model"], b["model"]) and a["best"] == b["best"]
    for k in a["optimiser"]["state"]:
        assert same(a["optimiser"]["state"][k], b["optimiser"]["state"][k])
    rows = read_log(half / "log.jsonl")
    assert losses(whole) == losses(half) and len(losses(half)) == 6
    assert 0 < rows[0]["waiting"] < 1 and rows[0]["samples_per_s"] > 0
    for f in ("args.json", "curves.png", "overlay.png", "subset.json", "skipped.csv"):
        assert (half / f).stat().st_size > 0
    net, setting = load_segmenter(half / "best.pt")
    assert setting["classes"] == ["ball", "box"]
    assert net(torch.rand(1, *setting["roi"])).shape == (1, 3, 16, 16, 16)
    (half / "metrics.json").unlink()
    run(home, half, "--resume", small=())  # at its end: the last scores once more
    assert metrics(whole) == metrics(half) and "ball" in capsys.readouterr().out
    with pytest.raises(BadInput, match="the run to resume has"):
        run(home, half, "--resume", "--lr", 1, small=())
    fewer = shutil.copytree(home, tmp_path / "fewer")
    (fewer / "labelsVa/case_05.nii.gz").unlink()
    with pytest.raises(BadInput, match="other cases than the run to resume has"):
        run(fewer, half, "--resume", small=())


def test_two_volumes_are_learnt(run, home, tmp_path):
    """The very two cases that it validates with, as copies: mean Dice 0.95 or more."""
    lists, contents = {}, home / "dataset_withVal.json"
    for split, tag in (("training", "Tr"), ("validation", "Copy")):
        names = [f"{tag}/case_{i:02d}.nii.gz" for i in range(2)]
        lists[split] = [{"image": f"images{n}", "label": f"labels{n}"} for n in names]
    for kind in ("images", "labels"):
        shutil.copytree(home / f"{kind}Tr", home / f"{kind}Copy")
    contents.write_text(json.dumps(lists))
    flags = ["--steps", 50, "--roi", 24, "--val-every", 50, "--augment", "none", "--lr", 5e-3]
    try:
        run(home, tmp_path, *flags, features=8)
    finally:
        contents.unlink()
    assert metrics(tmp_path)["mean_dice"] >= 0.95


def test_frozen_encoder_stays_and_some_labels_do(run, home, tmp_path, capsys):
    encoder = Model(Config(**SIZES["nano"]))
    save_checkpoint(tmp_path / "pre.pt", **checkpoint_state(encoder))
    learnt, sets = [], []
    for share, more in ((0.25, ["--freeze"]), (0.5, ["--dtype", "bf16"])):
        flags = ["--init", tmp_path / "pre.pt", "--labels", share, "--steps", 1]
        run(home, tmp_path / "out", *flags, *more)
        net = load_segmenter(tmp_path / "out/best.pt")[0]
        learnt.append(not same(net.encoder.state_dict(), encoder.state_dict()))
        sets.append(set(json.loads((tmp_path / "out/subset.json").read_text())["train"]))
    assert learnt == [False, True] and sets[0] < sets[1] and [len(s) for s in sets] == [1, 2]
    said = capsys.readouterr().out
    assert "less than 4 patches, where bf16 fails" in said and "held an earlier run" in said


def test_amos_runs_the_same_way_as_the_phantom(run, phantom_home, tmp_path):
    small = [*SMALL[:2], "--init=scratch", "--steps", 1, "--spacing", 9, 9, 9]
    data = phantom_home / "data/phantom/amos"
    for task in ("phantom", "amos"):
        run(data, tmp_path / task, task=task, small=small)
    assert losses(tmp_path / "phantom") == losses(tmp_path / "amos")
    named = json.loads((data / "dataset.json").read_text())["labels"]
    assert [*metrics(tmp_path / "amos")["dice"]] == finetune_seg.TASKS["amos"]["classes"]
    assert [*metrics(tmp_path / "amos")["dice"]] == [*named.values()][1:]


def test_two_processes_go_on_train_and_validate_as_one(run, home, script, tmp_path):
    run(home, tmp_path / "one", features=16)
    run(home, tmp_path / "two", "--stop-after", 2, features=16)
    script("finetune_seg.py", "--resume", "--out", tmp_path / "two", "--stop-after", 9, ranks=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    one, two = (metrics(tmp_path / p)["cases"] for p in ("one", "two"))
    assert one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], abs=0.02) for k in one)


# ---- data sets, bad input --------------------------------------------------------------------


def test_each_bad_case_has_its_line(run, tmp_path, capsys):
    root, (image, label) = tmp_path / "bad", patient(0)
    other, holes, shifted = label.copy(), image.astype(float), np.eye(4)
    other[0, 0, 0], holes[3, 4, 5], shifted[0, 3] = 9, np.nan, 3
    cases = {
        "good1": (image, label, ""),
        "good2": (image, label, ""),
        "shape": (image, label[:-1], "label 23x24x24, image 24x24x24"),
        "range": (image, other, "0 ... 9, where 0 ... 2"),
        "half": (image, label + 0.5, "not integers"),
        "affine": (image, label, "up to 3.0 voxels apart"),
        "nan": (holes, label, "1 voxels are NaN"),
        "garbled": (image, label, "imagesTr/garbled.nii.gz: unreadable"),
        "absent": (image, label, "no such image file, though it is listed"),
        "._good1": (image, label, ""),
    }
    pairs, files = [], {n: f"imagesTr/{n}.nii.gz" for n in cases}
    for n, (scan, labels, _) in cases.items():
        pairs.append({"image": f"./{files[n]}", "label": f"./labelsTr/{n}.nii.gz"})
        save(root / files[n], scan)
        save(root / f"labelsTr/{n}.nii.gz", labels, shifted if n == "affine" else None)
    (root / files["garbled"]).write_bytes(b"no scan")
    (root / files["absent"]).unlink()

    def go(training):
        contents = {"training": training, "validation": pairs[:1]}
        (root / "dataset_withVal.json").write_text(json.dumps(contents))
        run(root, tmp_path / "out", "--steps", 1)

    go(pairs[1:])
    with open(tmp_path / "out/skipped.csv") as f:
        reasons = {r["case"]: r["reason"] for r in csv.DictReader(f)}
    said = capsys.readouterr().out
    assert [*reasons] == sorted(n for n, (*_, words) in cases.items() if words)
    assert all(cases[n][2] in reasons[n] and reasons[n] in said for n in reasons)
    with pytest.raises(BadInput, match="0 cases to train on and 1 to validate with, 2 that cannot"):
        go(pairs[2:4])


def test_folders_flags_and_checkpoints_that_do_not_fit(run, home, tmp_path):
    (tmp_path / "empty/labelsTr").mkdir(parents=True)
    (tmp_path / "empty/labelsTr/._a.nii.gz").write_bytes(b"litter")
    encoder = Model(Config(width=24, layers=4, heads=2, patch=16))
    save_checkpoint(tmp_path / "p16.pt", **checkpoint_state(encoder))
    thick = ["--init", tmp_path / "p16.pt", "--roi", 24]
    for flags, words in (
        (thick, r"--roi \[24, 24, 24\]: not a multiple of the patch 16"),
        (["--init", "scratch:tiny"], "--init scratch:tiny: scratch, scratch:SIZE"),
        (["--range", 5, 2], "--range 5 2: LOW HIGH"),
        (["--range", "zscore", 2], "--range zscore 2: LOW HIGH"),
        (["--roi", 16, 16], "one or three edges"),
        (["--data", tmp_path / "empty"], "labelsTr holds no"),
    ):
        with pytest.raises(BadInput, match=words):
            run(home, tmp_path / "out", *flags)
    with pytest.raises(
        BadInput, match="no such folder. --task spleen needs Task09_Spleen.*labelsTr"
    ):
        run(tmp_path / "nowhere", tmp_path / "out", task="spleen")
    with pytest.raises(BadInput, match="--task heart: amos, .*name of your own with --data"):
        run("", tmp_path / "out", task="heart")


def test_without_a_list_the_split_is_a_rule_of_the_case_id(tmp_path, machine):
    for part in ("images", "labels"):
        (tmp_path / f"{part}Tr").mkdir()
        for i in range(30):
            (tmp_path / f"{part}Tr/liver_{i}.nii.gz").touch()

    def splits():
        cases, _ = find_cases("liver", tmp_path, None, machine)
        return {c["id"]: c["split"] for c in cases}

    before = splits()
    assert 2 <= sum(s == "val" for s in before.values()) <= 12
    (tmp_path / "labelsTr/liver_7.nii.gz").unlink()
    assert splits() == {k: v for k, v in before.items() if k != "liver_7"}


def test_left_atria_are_read_from_h5_by_their_lists(tmp_path, machine):
    h5py = pytest.importorskip("h5py")
    image, label = patient(0)
    for name in ("p0", "p1"):
        (tmp_path / f"set/{name}").mkdir(parents=True)
        with h5py.File(tmp_path / f"set/{name}/mri_norm2.h5", "w") as f:
            f["image"], f["label"] = image.astype(float), label
    (tmp_path / "train.list").write_text("p1\np0\n")
    (tmp_path / "test.list").write_text("lost")
    cases, _ = find_cases("la", tmp_path, None, machine)
    splits = [(c["id"], c["split"]) for c in cases]
    assert splits == [("p0", "train"), ("p1", "train"), ("lost", "val")]
    *scan, labels = read_case(cases[0], 3)
    volume, _ = prepare(*scan, None, "zscore")
    assert np.array_equal(labels, label) and abs(volume.astype(float).std() - 1) < 0.01
    with pytest.raises(BadInput, match="lost/mri_norm2.h5: no such image file"):
        read_case(cases[2], 3)
    with pytest.raises(BadInput, match="label values 0 ... 2, where 0 ... 1"):
        read_case(cases[0], 2)


def test_amos_cases_above_500_are_mr():
    ranges = [range_of_case({"id": f"amos_0{n}"}, "ct", 500) for n in (500, 507)]
    assert [*ranges, range_of_case({"id": "x_507"}, "ct", None)] == ["ct", "percentiles", "ct"]
