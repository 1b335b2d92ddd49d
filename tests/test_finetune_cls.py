"""finetune_cls.py: scores by hand, resume, selection, bad input, on volumes of 16³, 8³ patches."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import finetune_cls as cls
from common import BadInput, Machine, cli, load_checkpoint, read_log
from model import SIZES, Config, Model, load_pretrained

HERE = Path(__file__).parent
SMALL = ["--init", "scratch:nano", "--volume", 16, 16, 16, "--dtype", "fp32", "--log-every", 1]
PICTURES = ("curves", "roc", "confusion", "cases")
NANO = Model(Config(**SIZES["nano"]))
CPU = Machine(0, 1, torch.device("cpu"), torch.float32)


def make_npz(path, counts=(20, 8, 12), **change):
    """Noise with stripes along x in class 1, along y in class 0: no histogram tells them apart."""
    rng, arrays = np.random.default_rng(0), {}
    stripes = 30 * np.sign(np.sin(np.arange(12) * np.pi / 2 + 0.5))[:, None, None]
    for split, n in zip(cls.SPLITS, counts):
        images = (128 + stripes + 20 * rng.standard_normal((n, 12, 12, 12))).clip(0, 255)
        images[::2] = images[::2].swapaxes(1, 2).copy()
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 2
    np.savez(path, **{**arrays, **change})
    return path


def make_scans(folder, values):
    """s0.nii.gz, s1.nii.gz, … of values [N, x, y, z], the first axis to the left."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, v in enumerate(values):
        nib.save(nib.Nifti1Image(v, np.diag([-1, 1, 2, 1])), folder / f"s{i}.nii.gz")


def noise(count):
    return np.random.default_rng(0).integers(0, 900, (count, 10, 12, 9), dtype=np.int16)


@pytest.fixture
def go(monkeypatch, tmp_path):
    """go(flag, …): finetune_cls.main() in this process and in tmp_path, without its pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cls, "BOOTSTRAP", 50)

    def run(*flags, pictures=False):
        monkeypatch.setattr(sys, "argv", ["finetune_cls.py", *map(str, flags)])
        with monkeypatch.context() as m:
            for name in () if pictures else PICTURES:
                m.setattr(cls, f"draw_{name}", lambda *a: None)
            cls.main()

    return run


def weights(path):
    return load_checkpoint(path, cls.CLASSIFIER)["model"]


def same(a, b):
    return all(map(torch.equal, a.values(), b.values()))


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def scores_of(out, split="test"):
    """Labels and probabilities of class 1, from scores.csv."""
    rows = csv.DictReader((out / "scores.csv").read_text().splitlines())
    pairs = [(r["label"] == "1", float(r["p_1"])) for r in rows if r["split"] == split]
    return map(np.array, zip(*pairs))


# ---- scores, by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y, score, area",
    [
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.75),
        ([0, 1, 0, 1], [0.5, 0.5, 0.2, 0.9], 3.5 / 4),  # one tie, half a win
        ([0, 1, 1], [0.3, 0.3, 0.3], 0.5),  # all equal: chance, and defined
        ([1, 0], [0, 1], 0.0),
        ([1, 1, 1], [0.1, 0.2, 0.3], None),
        ([0, 1], [np.nan, 0.2], None),
    ],
)
def test_auc_and_the_area_under_the_curve(y, score, area):
    y, score = np.array(y) == 1, np.array(score)
    assert cls.auc(y, score) == area
    if area is not None:
        fpr, tpr, _ = cls.roc(y, score)
        assert np.trapezoid(tpr, fpr) == pytest.approx(area)


def test_metrics_at_both_points():
    labels = np.array([0, 0, 0, 1, 1])
    p1 = np.array([0.1, 0.3, 0.6, 0.4, 0.9])
    m = cls.measure(labels, np.stack([1 - p1, p1], 1), [0.4])
    want = {
        "auc": 5 / 6,
        "accuracy": 3 / 5,
        "f1": 1 / 2,
        "sensitivity": 1 / 2,
        "specificity": 2 / 3,
        "balanced_accuracy": 7 / 12,
        "youden_accuracy": 4 / 5,
        "youden_f1": 4 / 5,
        "youden_sensitivity": 1,
        "youden_specificity": 2 / 3,
        "youden_balanced_accuracy": 5 / 6,
    }
    assert m == pytest.approx(want)


def test_youden_is_the_best_threshold_of_any():
    rng = np.random.default_rng(1)
    y, s = rng.random(50) < 0.4, rng.integers(0, 12, 50) / 10
    gains = {t: np.mean(s[y] >= t) - np.mean(s[~y] >= t) for t in s}
    assert gains[cls.youden(y, s)] == max(gains.values())
    assert cls.youden(y | True, s) == 0.5


def test_several_classes_are_one_against_the_rest_and_undefined_stays_undefined():
    labels = np.array([0, 1, 2, 2])
    probs = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    m = cls.measure(labels, probs, [0.5] * 3)
    want = {"auc": (1 + 2 / 3 + 1) / 3, "accuracy": 0.5, "balanced_accuracy": (1 + 0 + 0.5) / 3}
    assert {k: m[k] for k in want} == pytest.approx(want)
    two = cls.with_intervals(labels[:2], probs[:2], [0, 1], [0.5] * 3, 0)
    assert two["auc"] == {"value": None, "low": None, "high": None}
    assert cls.text_of(two["auc"]) == "undefined" and two["specificity"]["value"] is not None
    assert cls.interval([0.5, None, None]) == (None, None) and cls.interval([1, np.nan]) == (1, 1)


def test_the_bootstrap_draws_patients_not_cases():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    p1 = 0.5 + 0.15 * (2 * y - 1) + 0.3 * rng.standard_normal(40)
    intervals = []
    for k in (1, 5):  # five scans of each patient tell no more
        probs = np.tile(np.stack([1 - p1, p1], 1), (k, 1))
        scores = cls.with_intervals(np.tile(y, k), probs, np.tile(range(40), k), [0.5], 0)
        intervals.append(scores["auc"])
    once, often = intervals
    assert once == pytest.approx(often) and once["low"] < once["value"] < once["high"]
    counts = [np.bincount(i, minlength=4) for i in cls.resampled(["b", "a", "b", "c"], 20, 0)]
    assert all(b == b_too and b + a + c == 3 for b, a, b_too, c in counts)


def test_logistic_regression_finds_its_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((99, 3)), rng.integers(0, 3, 99)
    w = cls.logistic(torch.from_numpy(x), torch.from_numpy(y), 3, 0.1, tolerance=1e-9)
    p = cls.scores_of(w, torch.from_numpy(x)).softmax(1).numpy()
    slope = (p - np.eye(3)[y]).T @ np.c_[x, np.ones(99)] / 99
    assert np.abs(slope + 0.1 * np.c_[w[:, :3], np.zeros(3)]).max() < 1e-4


# ---- recipes ----


@pytest.mark.parametrize(
    "given, follows",
    [
        ("nodule scratch:base", "1.5e-5 0.01 1 0.5 cosine 0 0"),
        ("ricord scratch:base", "1e-5 1e-4 0.75 0 poly 12 0"),
        ("ricord scratch:nano", "1e-3 0.05 1 0.5 cosine 1 30"),
        ("ricord x.pt", "5e-5 0.05 0.75 0 poly 12 0"),
    ],
)
def test_recipes(given, follows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        base = Model(Config(**SIZES["base"]))
    monkeypatch.setattr(cls, "new_encoder", lambda init, *_: NANO if "nano" in init else base)
    task, init = given.split()
    args = cls.parser().parse_args(["--task", task, "--init", init])
    cls.settle(args, None, CPU)
    names = ["lr", "wd", "layer_decay", "flip", "schedule", "clip", "warmup"]
    for value, wanted in zip((getattr(args, n) for n in names), follows.split(), strict=True):
        assert value == type(value)(wanted)


def test_the_rate_of_ricord_falls_as_a_power(go, tmp_path, monkeypatch):
    monkeypatch.setitem(cls.RECIPES["nano"], "schedule", "poly")
    flags = ["--task", "nodule", "--data", make_npz(tmp_path / "n.npz", (16, 8, 12))]
    go(*SMALL, *flags, "--steps", 4, "--lr", 1e-3, "--out", "o")
    rates = [r["lr"] for r in read_log(tmp_path / "o/log.jsonl") if "lr" in r]
    assert rates == pytest.approx([1e-3 * (1 - n / 4) ** 0.9 for n in range(4)])


# ---- the classifier and its input ------------------------------------------------------------


def test_golden_logits(tmp_path):
    with np.load(HERE / "golden/reference_tiny.npz", allow_pickle=False) as z:
        golden = {k: torch.tensor(z[k]) for k in z.files if z[k].dtype.kind != "U"}
    published = {k[3:]: v for k, v in golden.items() if k.startswith("sd.")}
    torch.save({"state_dict": published}, tmp_path / "p.pt")
    net = cls.Classifier(load_pretrained(tmp_path / "p.pt", int(golden["config"][2])), 2)
    net.score.weight.data = golden["classify.score_weight"]
    logits = net(golden["encoder.image"][:, 0])
    assert torch.allclose(logits, golden["classify.logits"], atol=1e-5)


def test_attention_pooling_starts_as_the_mean():
    encoder, v = Model(Config(width=24, layers=1, heads=2, patch=4)), torch.rand(2, 8, 8, 4)
    net = cls.Classifier(encoder, 2, "attention")
    mean = net.score(encoder.encode(v)[0].mean(1))
    assert torch.allclose(net(v), mean, atol=1e-6)
    net.attend.weight.data.normal_()
    assert not torch.allclose(net(v), mean, atol=1e-3)


def test_samples_are_functions_of_seed_and_number(tmp_path):
    np.savez(tmp_path / "v.npz", volume=np.arange(24.0).reshape(2, 3, 4))
    cases = [{"label": i, "array": tmp_path / "v.npz"} for i in range(5)]
    streams = [cls.Stream(cases, 0, 0.5), cls.Stream(cases, 1, 0.0)]
    streams = pickle.loads(pickle.dumps(streams))  # as workers that are spawned get them
    (labels, corners), (others, same_corner) = (
        zip(*((s[n]["label"], s[n]["volume"][0, 0, 0].item()) for n in range(60))) for s in streams
    )
    assert sorted(labels[:5]) == sorted(labels[5:10]) == list(range(5)) and labels != others
    assert set(corners) == {0, 3, 8, 11, 12, 15, 20, 23} and set(same_corner) == {0}


def test_scans_are_turned_to_ras_mapped_and_resized(tmp_path, monkeypatch):
    monkeypatch.setattr(cls, "CACHE", tmp_path)
    make_scans(
        tmp_path, np.tile(np.int16(200) * np.arange(8, dtype=np.int16)[:, None, None], (1, 1, 8, 8))
    )
    ready = cls.prepare_whole({"source": tmp_path / "s0.nii.gz"}, (4, 8, 16), [0, 1400])
    v = cls.load_volume(ready).float()
    want = torch.tensor([1300, 900, 500, 100]) / 1400
    assert v.shape == (4, 8, 16) and torch.allclose(v[:, 0, 0], want, atol=1e-3)
    assert ready["statistics"][:6].tolist() == [8, 8, 8, 1, 1, 2]


# ---- runs ------------------------------------------------------------------------------------


def test_a_run_resumes_bitwise_and_looks_at_the_test_set_last(go, tmp_path, monkeypatch, capsys):
    data = make_npz(tmp_path / "n.npz")
    flags = [*SMALL, "--task", "nodule", "--data", data, "--steps", 10, "--lr", 2e-3]
    flags += ["--init", "scratch"]  # which means nano here, and is what the run to resume has
    seen, real = [], cls.predict_probs

    def watched(net, cases, machine):
        seen.append((cases[0]["split"], {k: v.clone() for k, v in net.state_dict().items()}))
        return real(net, cases, machine)

    monkeypatch.setattr(cls, "predict_probs", watched)
    go(*flags, "--out", "whole", pictures=True)
    whole, half = tmp_path / "whole", tmp_path / "half"

    # the test set: once, last, with the weights of the best validation AUC
    assert [s for s, _ in seen] == ["val"] * 5 + ["test"]  # an epoch is three steps
    assert same(seen[-1][1], weights(whole / "best.pt"))
    rows = [r for r in read_log(whole / "log.jsonl") if "val_auc" in r]
    best, m = max(rows, key=lambda r: (r["val_auc"], -r["val_loss"])), metrics_of(whole)
    assert m["step"] == best["step"] == load_checkpoint(whole / "best.pt")["step"]
    assert cls.auc(*scores_of(whole)) == m["test"]["auc"]["value"]
    assert cls.auc(*scores_of(whole, "val")) == best["val_auc"] == m["val_auc"]
    assert all((whole / f"{f}.png").stat().st_size > 5000 for f in PICTURES)
    assert "shortcut baseline" in capsys.readouterr().out
    assert m["shortcut"]["features"] == 11  # of the histogram; the headers are all the same

    # stopped and resumed: the same, bit by bit; reading is from the cache
    for counts in ((21, 8, 12), (20, 8, 16)):  # to train on, to validate and to test with
        with pytest.raises(BadInput, match="other cases than the run to resume"):
            other = make_npz(tmp_path / f"{counts}.npz", counts)
            go("--resume", "--out", "whole", "--data", other)
    monkeypatch.setattr(cls, "resize_whole", lambda *a: pytest.fail("resized again"))
    go(*flags, "--out", "half", "--stop-after", 5)
    assert not (half / "metrics.json").exists()
    go(*flags, "--resume", "--out", "half")
    for name in ("ckpt.pt", "best.pt"):
        assert same(weights(whole / name), weights(half / name))
    logs = [read_log(p / "log.jsonl") for p in (whole, half)]
    for row in logs[0] + logs[1]:
        row.pop("samples_per_s", None), row.pop("seconds", None)
    assert logs[0] == logs[1] and metrics_of(half) == m


def test_the_best_is_kept_and_patience_ends_the_run(go, tmp_path, monkeypatch):
    """Validation is made to prefer the second of five; two more without a better one are enough."""
    areas = iter([0.5, 0.99, 0.5, 0.5, 0.5])
    monkeypatch.setattr(cls, "validate", lambda *a: [next(areas), 0.0, a[3]])
    monkeypatch.setitem(cls.RECIPES["nano"], "patience", 2)
    data, out = make_npz(tmp_path / "n.npz", (16, 8, 12)), tmp_path / "o"
    go(*SMALL, "--task", "nodule", "--data", data, "--steps", 10, "--out", "o")
    assert not same(weights(out / "best.pt"), weights(out / "ckpt.pt"))
    (out / "metrics.json").unlink()
    go("--resume", "--out", "o")  # as if killed before the test: it is at its end all the same
    assert metrics_of(out)["step"] == 4 and load_checkpoint(out / "ckpt.pt")["step"] == 8


def test_it_learns_texture_and_the_shortcut_does_not(go, tmp_path):
    data, out = make_npz(tmp_path / "n.npz", (60, 12, 40)), tmp_path / "o"
    flags = [*SMALL, "--task", "nodule", "--data", data, "--out", "o"]
    go(*flags, "--freeze", "--steps", 2)
    torch.manual_seed(0)
    start, end = Model(Config(**SIZES["nano"])), weights(out / "best.pt")
    assert all(torch.equal(v, end["encoder." + k]) for k, v in start.state_dict().items())
    go(*flags, "--steps", 60, "--val-every", 20)
    m = metrics_of(out)
    assert m["test"]["auc"]["value"] > 0.9 and (out / "earlier-1/best.pt").exists()
    assert m["shortcut"]["value"] < m["test"]["auc"]["value"] - 0.1


def test_two_processes_train_the_same_model_and_one_goes_on(go, tmp_path):
    data = make_npz(tmp_path / "n.npz", (18, 8, 11))
    flags = [*map(str, SMALL), "--task", "nodule", "--data", data, "--steps", "4", "--out"]
    go(*flags, "one")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    script = ["--rdzv_endpoint=127.0.0.1:0", HERE.parent / "finetune_cls.py", *flags, "two"]
    command = [sys.executable, *torchrun, *script, "--micro", "2", "--stop-after", "3"]
    subprocess.run(command, cwd=tmp_path, check=True)
    go("--resume", "--out", "two", "--stop-after", 9)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    one, two = ([r["loss"] for r in rows if "loss" in r] for rows in logs)
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-4)
    one, two = ([*scores_of(tmp_path / name)] for name in ("one", "two"))
    assert len(one[0]) == 11 and np.allclose(one, two, atol=1e-3)


def test_a_csv_of_three_classes_and_a_broken_scan(go, tmp_path):
    make_scans(tmp_path / "scans", noise(18))
    (tmp_path / "scans/s17.nii.gz").write_bytes(b"no scan")
    splits = ["train", "train", "train", "val", "test", "test"]
    rows = [f"scans/s{i}.nii.gz,{i % 3},{splits[i // 3]},p{i}" for i in range(18)]
    (tmp_path / "cases.csv").write_text("\n".join(["file,label,split,patient", *rows]))
    flags = [*SMALL, "--task", "mine", "--data", "cases.csv", "--pool", "attention", "--batch", 4]
    go(*flags, "--steps", 3, "--seed", 4, "--out", "o", "--stop-after", 2)
    go("--resume", "--out", "o", "--stop-after", 9, pictures=True)
    m = metrics_of(tmp_path / "o")
    assert m["seed"] == 4 and m["cases"]["test"] == 5
    skipped = (tmp_path / "o/skipped.csv").read_bytes()
    assert b"s17.nii.gz,test," in skipped and b"\r" not in skipped
    assert weights(tmp_path / "o/best.pt")["attend.weight"].any()


def test_rank_0_makes_the_phantom(monkeypatch):
    calls = []
    monkeypatch.setattr(cls, "write_phantom", lambda *a: calls.append(a))
    for rank in (0, 1):
        machine = Machine(rank, 2, CPU.device, CPU.dtype)  # a collective would fail here
        assert cls.data_of("phantom-covid", None, machine) == "data/phantom/ricord"
    assert calls == [("data/phantom", ("ricord",))]


# ---- bad input -------------------------------------------------------------------------------


def listing(task, data, pattern=None):
    return cls.list_cases(cls.TASKS[task], data, None, pattern, CPU)[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"val_labels": np.zeros(7, int)}, "n.npz: cannot be read .*argument 2 is shorter"),
        ({"test_labels": np.full(12, 2)}, "test/00000: label '2'; it is an integer from 0 to 1"),
        ({"train_images": np.array([{}])}, "allow_pickle=False"),
        ({"train_labels": np.zeros(20, int)}, "2 classes are needed in the train"),
    ],
)
def test_a_bad_npz(tmp_path, change, words):
    with pytest.raises(BadInput, match=words):
        listing("nodule", make_npz(tmp_path / "n.npz", **change))


def test_no_npz_or_half_of_one_or_flat_images(tmp_path, monkeypatch):
    monkeypatch.setattr(cls, "CACHE", tmp_path)
    with pytest.raises(BadInput, match="nodulemnist3d.npz: cannot be read .*No such file"):
        listing("nodule", tmp_path)
    path = make_npz(tmp_path / "nodulemnist3d.npz", val_images=np.zeros((8, 3, 3)))
    with pytest.raises(BadInput, match="no scan of the val split .*2D"):
        cls.prepare_all(listing("nodule", tmp_path), [8, 8, 8], [0, 255], CPU)
    path.write_bytes(path.read_bytes()[:9999])
    with pytest.raises(BadInput, match="cannot be read as MedMNIST's npz"):
        listing("nodule", tmp_path)


def test_bad_lists_and_tables(tmp_path, monkeypatch, capsys):
    make_scans(tmp_path, noise(4))
    good = {"train": "s0.nii.gz 0\n\ns1.nii.gz 1\n", "val": "s2.nii.gz 0", "test": "s3.nii.gz 1"}

    def refused(words, task="ricord", data=tmp_path, pattern=None, **change):
        for name, text in {**good, **change}.items():
            (tmp_path / f"{name}.txt").write_text(text)
        with pytest.raises(BadInput, match=words):
            listing(task, data, pattern)

    refused("gone.nii.gz: no such file", val="gone.nii.gz 0\n")
    refused("s3.nii.gz: label '7'; it is an integer from 0 to 1", test="s3.nii.gz 7\n")
    refused("needed in the val split, which has none", val="")
    twice = "s0.nii.gz is listed twice, as train with label 0 and test with label 1"
    refused(twice, test="s0.nii.gz 1\n")
    refused("--patient 'x' does not match s0.nii.gz", pattern="x")
    refused(r"--patient '\(': not a regular expression", pattern="(")
    refused("1 patients are in more than one split, s among", pattern=r"(s)\d")
    monkeypatch.setattr(cls, "CACHE", tmp_path / "cache")
    cases, _ = cls.prepare_all(listing("ricord", tmp_path), [8, 8, 8], [1000, 1400], CPU)
    assert len(cases) == 4 and "lie below --range 1000" in capsys.readouterr().out
    table = tmp_path / "c.csv"
    refused("c.csv: cannot be read .* columns file,label,split", "mine", table)
    for text, words in (
        ("file,label\ns0.nii.gz,0\n", "split ''; it is one of train, val, test"),
        ("file,label,split\ns0.nii.gz,0,dev\n", "c.csv: s0.nii.gz: split 'dev'"),
        ("file,label,split\ns0.nii.gz,-1,train\n", "label '-1'; it is an integer from 0 to 999"),
        ("label,split\n0,train\n", "no such file"),
    ):
        table.write_text(text)
        refused(words, "mine", table)


def test_a_ricord_name_names_its_patient():
    for name, patient in (
        ("MIDRC-RICORD-1A-419639-000082_s2.nii.gz", "RICORD-1A-419639-000082"),
        ("RICORD-000001.nii.gz", "RICORD-000001"),
        ("RICORD-1A/MIDRC-RICORD-1A-419639-000082/a.nii.gz", "RICORD-1A-419639-000082"),
        ("other_7.nii.gz", "other_7"),
    ):
        case = cls.case_of("x", 2, None, name, "train", "0", None, "anywhere")
        assert case["patient"] == patient


def test_bad_flags_are_one_line_and_exit_code_2(go, tmp_path, monkeypatch, capsys):
    data = make_npz(tmp_path / "n.npz")
    for flags, words in (
        (["--volume", 16, 16, 12], "16x16x12 is not a multiple"),
        (["--range", 5, 5], "LOW must be below"),
        (["--seed", -1], "a number from 0"),
        (["--steps", 0], "--steps 0: at least 1"),
        (["--init", data], "cannot be read as a checkpoint"),
    ):
        with pytest.raises(BadInput, match=words):
            go("--task", "nodule", "--data", data, *flags)
    monkeypatch.setattr(sys, "argv", ["finetune_cls.py", "--task", "ricord"])
    with pytest.raises(SystemExit, match="2"):
        cli(cls.main)
    assert capsys.readouterr().err.startswith("error: data/ricord/train.txt: cannot be read")
