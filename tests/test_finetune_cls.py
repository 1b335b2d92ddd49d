"""finetune_cls.py: metrics by hand, resume, selection, and bad input, on volumes of 16³ in 8³ patches."""
import csv
import json
import signal
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

import common
import finetune_cls as cls
import serialize
from common import BadInput, label_subset, load_checkpoint, place, poly_lr, read_log
from model import CLS_FORMAT, SIZES, Classifier, Config, Model, fit, layer_decay_groups
from serialize import case_of, cls_task, list_cases, load_volume, prepare_whole, resize_whole

SMALL = ["--size", "nano", "--volume", 16, 16, 16, "--dtype", "fp32", "--bootstrap", 50, "--log-every", 1, "--warmup", 2]
PICTURES = ("draw_curves", "draw_roc", "draw_confusion", "draw_cases")


def make_npz(path, counts=(20, 8, 12), **change):
    """Images of noise, those of class 1 with stripes along x: no first-order statistic tells them apart."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in zip(cls.SPLITS, counts):
        y = np.arange(n) % 2
        v = 128 + 20 * rng.standard_normal((n, 12, 12, 12))
        stripes = 30 * np.sign(np.sin(np.arange(12) * np.pi / 2 + 0.5))[None, :, None, None] * y[:, None, None, None]
        v += stripes + np.sqrt(900) * (1 - y)[:, None, None, None] * rng.choice([-1, 1], v.shape)
        arrays.update({f"{split}_images": v.clip(0, 255).astype(np.uint8), f"{split}_labels": y[:, None].astype(np.uint8)})
    arrays.update(change)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.fixture
def go(monkeypatch, tmp_path):
    """go(flag, …): finetune_cls.main() in this process and in tmp_path, without its pictures."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)

    def run(*flags, pictures=False):
        monkeypatch.setattr(sys, "argv", ["finetune_cls.py", *map(str, flags)])
        with monkeypatch.context() as m:
            for name in () if pictures else PICTURES:
                m.setattr(cls, name, lambda *a, **k: None)
            cls.main()
    yield run
    for s, h in handlers.items():
        signal.signal(s, h)


def arguments(*flags):
    return cls.parser().parse_args(list(map(str, flags)))


def weights(path):
    return load_checkpoint(path, CLS_FORMAT)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


# ---------------------------------------------------------------- shared functions


def test_rates_fall_towards_the_input():
    model = Classifier(Model(Config(width=24, layers=3, heads=2, patch=4)), 2)
    model.encoder.head.requires_grad_(False)
    rate = {id(w): g["lr"] for g in layer_decay_groups(model, 8.0, 0.1, 0.5) for w in g["params"]}
    want = {"encoder.embed": 0.5, "encoder.begin": 0.5, "encoder.blocks.0": 1, "encoder.blocks.1": 2, "encoder.blocks.2": 4,
            "encoder.norm": 8, "score": 8}
    for name, w in model.named_parameters():
        if name.startswith("encoder.head"):
            assert id(w) not in rate
        else:
            assert [v for k, v in want.items() if name.startswith(k)] == [rate.pop(id(w))], name
    assert not rate


def test_subsets_of_labels_are_nested_and_stratified():
    patients, strata = [f"p{i}" for i in range(60)], [int(i >= 40) for i in range(60)]
    chosen = [set(label_subset(patients, s, 3, strata)) for s in (0.01, 0.1, 0.25, 0.5, 1)]
    assert [len(c) for c in chosen] == [2, 6, 15, 30, 60] and all(a < b for a, b in zip(chosen, chosen[1:]))
    assert sum(int(p[1:]) >= 40 for p in chosen[2]) == 5
    assert chosen[1] == set(label_subset(patients[::-1], 0.1, 3, strata[::-1])) != set(label_subset(patients, 0.1, 4, strata))
    assert label_subset(["a", "a", "b"], 1) == ["a", "b"]
    with pytest.raises(BadInput, match="--labels 1.5"):
        label_subset(patients, 1.5)


def test_polynomial_schedule():
    assert poly_lr(0, 10, 2.0) == 2 and poly_lr(5, 10, 2.0) == pytest.approx(2 * 0.5 ** 0.9) and poly_lr(10, 10, 2.0) == 0


def test_attention_pooling_starts_as_the_mean():
    encoder, v = Model(Config(width=24, layers=1, heads=2, patch=4)), torch.rand(2, 8, 8, 4)
    a, b = Classifier(encoder, 2), Classifier(encoder, 2, "attention")
    b.score = a.score
    assert torch.allclose(a(v), b(v), atol=1e-6)
    b.attend.weight.data.normal_()
    assert not torch.allclose(a(v), b(v), atol=1e-3)


# ---------------------------------------------------------------- metrics, by hand


@pytest.mark.parametrize("y, score, area", [
    ([0, 0, 1, 1], [.1, .4, .35, .8], 0.75),
    ([0, 1, 0, 1], [.5, .5, .2, .9], 3.5 / 4),        # one tie, half a win
    ([0, 1, 1], [.3, .3, .3], 0.5),                   # all equal: chance, and defined
    ([1, 0], [0, 1], 0.0), ([1, 1, 1], [.1, .2, .3], None), ([0, 0], [.1, .2], None), ([0, 1], [np.nan, .2], None)])
def test_auc(y, score, area):
    assert common.auc(np.array(y) == 1, np.array(score)) == area
    if area is not None:
        fpr, tpr, _ = common.roc(np.array(y) == 1, np.array(score))
        assert np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2) == pytest.approx(area)


def test_metrics_at_both_points():
    labels = np.array([0, 0, 0, 1, 1])
    p1 = np.array([.1, .3, .6, .4, .9])
    assert common.youden(labels == 1, p1) == 0.9 or common.youden(labels == 1, p1) == 0.4
    m = common.measure(labels, np.stack([1 - p1, p1], 1), [0.4])
    assert m["auc"] == pytest.approx(5 / 6)
    assert (m["sensitivity"], m["specificity"], m["accuracy"]) == pytest.approx((1 / 2, 2 / 3, 3 / 5))
    assert (m["f1"], m["balanced_accuracy"]) == pytest.approx((1 / 2, 7 / 12))
    assert (m["youden_sensitivity"], m["youden_specificity"], m["youden_f1"]) == pytest.approx((1, 2 / 3, 4 / 5))


def test_youden_is_the_best_threshold_of_any():
    rng = np.random.default_rng(1)
    y, s = rng.random(50) < 0.4, rng.integers(0, 12, 50) / 10
    gain = lambda t: np.mean(s[y] >= t) - np.mean(s[~y] >= t)  # noqa: E731
    assert gain(common.youden(y, s)) == pytest.approx(max(gain(t) for t in np.arange(-0.05, 1.3, 0.1)))
    assert common.youden(np.ones(3, bool), np.arange(3.)) is None


def test_several_classes_are_one_against_the_rest():
    labels = np.array([0, 1, 2, 2])
    probs = np.array([[.6, .3, .1], [.5, .4, .1], [.1, .2, .7], [.2, .5, .3]])
    m = common.measure(labels, probs, [.5, .5, .5])
    assert m["auc"] == pytest.approx(np.mean([1, 2 / 3, 1]))
    assert m["accuracy"] == 0.5 and m["balanced_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert common.measure(labels[:2], probs[:2], [.5] * 3)["auc"] is None


def test_undefined_stays_undefined():
    one = common.with_intervals(np.ones(4, int), np.full((4, 2), 0.5), np.arange(4), [0.5], 20, 0)
    assert one["auc"] == dict(value=None, low=None, high=None) and common.text_of(one["auc"]) == "undefined"
    assert one["specificity"]["value"] is None and one["balanced_accuracy"]["value"] is None and one["sensitivity"]["value"] == 1
    assert common.at_point(np.zeros(3, bool), np.zeros(3, bool))["f1"] is None


def test_the_bootstrap_draws_patients_not_cases():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    p1 = np.clip(0.5 + 0.15 * (2 * y - 1) + 0.3 * rng.standard_normal(40), 0, 1)
    wide = lambda k, who: (lambda m: m["high"] - m["low"])(common.with_intervals(  # noqa: E731
        np.tile(y, k), np.tile(np.stack([1 - p1, p1], 1), (k, 1)), np.tile(who, k), [0.5], 400, 0)["auc"])
    assert wide(1, np.arange(40)) == pytest.approx(wide(9, np.arange(40)), rel=0.02)  # nine scans of each patient tell no more
    ours = common.with_intervals(y, np.stack([1 - p1, p1], 1), np.arange(40), [0.5], 400, 0)["auc"]
    assert ours["low"] < ours["value"] < ours["high"]


def test_logistic_regression_finds_its_minimum():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 3))
    y = (x[:, 0] + 0.3 * rng.standard_normal(300) > 0).astype(int)
    probs = cls.fit_logistic(np.c_[x, np.ones(300)], y, 2)(np.c_[x, np.full(300, 7.0)])   # a constant column is left out
    assert common.auc(y == 1, probs[:, 1]) > 0.97 and np.allclose(probs.sum(1), 1)
    noise = cls.fit_logistic(x, rng.integers(0, 2, 300), 2)(rng.standard_normal((300, 3)))
    assert 0.4 < common.auc(y == 1, noise[:, 1]) < 0.6


# ---------------------------------------------------------------- golden logits


def test_golden_logits_through_the_scripts_own_model(tmp_path):
    with np.load("tests/golden/reference_tiny.npz", allow_pickle=False) as z:
        golden = {k: z[k] for k in z.files}
    torch.save({"state_dict": {k[3:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("sd.")}}, tmp_path / "p.pt")
    where = place("cpu", "fp32")
    args = arguments("--task", "ricord", "--init", tmp_path / "p.pt", "--heads", int(golden["config"][2]), "--micro", 1)
    args.workers = 0
    model = Classifier(cls.build_encoder(args, where), 2)
    model.score.weight.data = torch.from_numpy(golden["classify.score_weight"])
    cases = []
    for i, v in enumerate(golden["encoder.image"][:, 0]):
        np.savez(tmp_path / f"{i}.npz", volume=v)
        cases.append(dict(array=tmp_path / f"{i}.npz", label=i % 2))
    labels, probs = cls.evaluate(model, cases, args, where)
    assert np.allclose(probs, torch.from_numpy(golden["classify.logits"]).softmax(1), atol=1e-5)
    assert labels.tolist() == [c["label"] for c in cases]


# ---------------------------------------------------------------- runs


def test_a_run_resumes_bitwise_and_selects_before_it_looks_at_the_test_set(go, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--task", "nodule", "--data", make_npz(tmp_path / "n.npz"), "--epochs", 4, "--save-every", 1, "--lr", 2e-3]
    seen, real = [], cls.evaluate

    def watched(model, cases, *rest):
        seen.append((cases[0]["split"], {k: v.clone() for k, v in model.state_dict().items()}))
        return real(model, cases, *rest)
    monkeypatch.setattr(cls, "evaluate", watched)
    go(*flags, "--out", "whole", pictures=True)
    whole, half = tmp_path / "whole", tmp_path / "half"

    # the test set: once, last, with the weights of the best validation AUC
    assert [s for s, _ in seen].count("test") == 1 and seen[-1][0] == "test" and same(seen[-1][1], weights(whole / "best.pt"))
    rows = [r for r in read_log(whole / "log.jsonl") if "val_auc" in r]
    best = max(rows, key=lambda r: (r["val_auc"], -r["val_loss"]))
    m = metrics_of(whole)
    assert len(rows) == 4 and m["step"] == best["step"] == load_checkpoint(whole / "best.pt")["step"] and m["val_auc"] == best["val_auc"]
    table = list(csv.DictReader(open(whole / "scores.csv")))
    for split, value in (("test", m["test"]["auc"]["value"]), ("val", m["val_auc"])):
        part = [r for r in table if r["split"] == split]
        assert common.auc(np.array([r["label"] == "1" for r in part]), np.array([float(r["p_1"]) for r in part])) == pytest.approx(value)
    assert all((whole / f).stat().st_size > 5000 for f in ("roc.png", "confusion.png", "cases.png", "curves.png"))
    assert "shortcut baseline" in capsys.readouterr().out

    # stopped and resumed: the same, bit by bit; reading is from the cache
    monkeypatch.setattr(serialize, "resize_whole", lambda *a: pytest.fail("resized again"))
    go(*flags, "--out", "half", "--stop-after", 5)
    assert not (half / "metrics.json").exists() and load_checkpoint(half / "ckpt.pt")["step"] == 5
    go("--resume", "--out", "half")
    assert same(weights(whole / "ckpt.pt"), weights(half / "ckpt.pt")) and same(weights(whole / "best.pt"), weights(half / "best.pt"))
    timeless = [[{k: v for k, v in r.items() if k not in ("samples_per_s", "seconds")} for r in read_log(p / "log.jsonl")] for p in (whole, half)]
    assert timeless[0] == timeless[1] and metrics_of(half) == m
    count = len(seen)
    go("--resume", "--out", "half")  # done: the test set is left alone
    assert len(seen) == count
    with pytest.raises(BadInput, match="--batch 4: the run to resume has 8"):
        go("--resume", "--out", "half", "--batch", 4)


def test_the_last_weights_are_not_taken_for_the_best(go, tmp_path, monkeypatch):
    """Validation is made to prefer epoch 2 of 4: the test scores are those of epoch 2."""
    real, calls = common.measure, []

    def doctored(labels, probs, thresholds):
        m = real(labels, probs, thresholds)
        if len(labels) == 8 and len(calls) < 4:  # the validation set, while training
            calls.append(1)
            m["auc"] = 0.99 if len(calls) == 2 else 0.5
        return m
    monkeypatch.setattr(cls, "measure", doctored)
    go(*SMALL, "--task", "nodule", "--data", make_npz(tmp_path / "n.npz", (16, 8, 12)), "--epochs", 4, "--out", "o")
    assert metrics_of(tmp_path / "o")["step"] == 4 and load_checkpoint(tmp_path / "o/ckpt.pt")["step"] == 8
    assert not same(weights(tmp_path / "o/best.pt"), weights(tmp_path / "o/ckpt.pt"))
    model = Classifier(Model(Config(**SIZES["nano"])), 2)
    fit(model, weights(tmp_path / "o/best.pt"), "best.pt")
    rows = [r for r in csv.DictReader(open(tmp_path / "o/scores.csv")) if r["split"] == "test"]
    with np.load(tmp_path / "n.npz") as z:
        v = np.stack([resize_whole(np.float32(i / 255), (16, 16, 16)).astype(np.float16) for i in z["test_images"]])
    with torch.no_grad():
        assert np.allclose(model(torch.from_numpy(v).float()).softmax(1)[:, 1], [float(r["p_1"]) for r in rows], atol=1e-5)


def test_it_learns_texture_and_the_shortcut_does_not(go, tmp_path):
    go(*SMALL, "--task", "nodule", "--data", make_npz(tmp_path / "n.npz", (60, 12, 40)), "--epochs", 12, "--out", "o", "--freeze", "--lr", 0.02)
    frozen = metrics_of(tmp_path / "o")["test"]["auc"]["value"]
    start, end = Model(Config(**SIZES["nano"])), weights(tmp_path / "o/best.pt")
    torch.manual_seed(0)
    start = Model(Config(**SIZES["nano"]))
    assert all(torch.equal(v, end["encoder." + k]) for k, v in start.state_dict().items())
    go(*SMALL, "--task", "nodule", "--data", tmp_path / "n.npz", "--epochs", 12, "--out", "o")
    m = metrics_of(tmp_path / "o")
    assert m["test"]["auc"]["value"] > 0.9 and (tmp_path / "o/earlier-1/best.pt").exists()
    assert frozen is not None and m["shortcut"]["value"] < m["test"]["auc"]["value"] - 0.1


def test_two_processes_train_the_same_model(script, tmp_path):
    data = make_npz(tmp_path / "n.npz", (18, 8, 11))
    flags = [*SMALL, "--task", "nodule", "--data", data, "--epochs", 2, "--cache", tmp_path / "cache"]
    script("finetune_cls.py", *flags, "--out", tmp_path / "one", "--micro", 4)
    script("finetune_cls.py", *flags, "--out", tmp_path / "two", "--micro", 2, ranks=2)
    a, b = ({r["step"]: r["loss"] for r in read_log(tmp_path / x / "log.jsonl") if "loss" in r} for x in ("one", "two"))
    assert len(a) == 4 and a == pytest.approx(b, rel=1e-4)
    a, b = ([float(r["p_1"]) for r in csv.DictReader(open(tmp_path / x / "scores.csv"))] for x in ("one", "two"))
    assert len(a) == 19 and a == pytest.approx(b, abs=1e-3)


def make_scans(folder, count, values=lambda i: np.random.default_rng(i).integers(0, 900, (10, 12, 9)).astype(np.int16)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        nib.save(nib.Nifti1Image(values(i), np.diag([-1, 1, 2, 1])), folder / f"s{i}.nii.gz")


def test_a_csv_of_three_classes_two_seeds_and_a_broken_scan(go, tmp_path, capsys):
    make_scans(tmp_path / "scans", 18)
    (tmp_path / "scans/s17.nii.gz").write_bytes(b"no scan")
    rows = [f"scans/s{i}.nii.gz,{i % 3},{'train' if i < 9 else 'val' if i < 12 else 'test'},p{i}" for i in range(18)]
    (tmp_path / "cases.csv").write_text("\n".join(["file,label,split,patient", *rows]))
    go(*SMALL, "--task", "mine", "--data", "cases.csv", "--epochs", 1, "--seeds", 3, 4, "--out", "o", "--pool", "attention", "--batch", 4)
    m = metrics_of(tmp_path / "o")
    assert [r["seed"] for r in m["runs"]] == [3, 4] and m["runs"][0]["cases"] == dict(train=9, val=3, test=5)
    values = [r["test"]["accuracy"]["value"] for r in m["runs"]]
    assert m["test"]["accuracy"] == dict(mean=pytest.approx(np.mean(values)), sd=pytest.approx(np.std(values, ddof=1)))
    assert "s17.nii.gz" in (tmp_path / "o/seed-3/skipped.csv").read_text() and "±" in capsys.readouterr().out
    assert "attend.weight" in weights(tmp_path / "o/seed-4/best.pt")


def test_flips_are_those_of_the_sample():
    v = torch.arange(2 * 2 * 3 * 4.).view(2, 2, 3, 4)
    out = cls.augment(v, torch.tensor([[True, False, True], [False, False, False]]))
    assert torch.equal(out[0], v[0].flip(0, 2)) and torch.equal(out[1], v[1])
    a, b = (cls.Stream([dict(label=i) for i in range(5)], s, 0.5) for s in (0, 1))
    assert sorted(a.case(n)["label"] for n in range(5, 10)) == list(range(5))
    assert [a.case(n)["label"] for n in range(40)] != [b.case(n)["label"] for n in range(40)]


def test_scans_are_turned_to_ras_windowed_and_resized(tmp_path):
    make_scans(tmp_path, 1, lambda i: np.broadcast_to(np.arange(8)[:, None, None] * 200, (8, 8, 8)).astype(np.int16))
    case = dict(source=tmp_path / "s0.nii.gz")
    file, stats, reason = prepare_whole(case, (4, 8, 16), [0, 1400], tmp_path / "cache")
    v = load_volume(dict(array=file)).float()
    assert reason is None and v.shape == (4, 8, 16)
    assert torch.allclose(v[:, 0, 0], torch.tensor([1300, 900, 500, 100]) / 1400, atol=1e-3)  # the first axis pointed left
    assert stats[:3].tolist() == [8, 8, 8] and stats[3:6].tolist() == [1, 1, 2]


# ---------------------------------------------------------------- bad input


def listing(args):
    return list_cases(cls_task(args.task, args.flavour), args.data, args.lists, args.patient, place("cpu", "fp32"))


def refused(args, words):
    with pytest.raises(BadInput, match=words):
        listing(args)


@pytest.mark.parametrize("change, words", [
    (dict(val_labels=None), "lacks val_labels"),
    (dict(test_labels=np.full((12, 1), 2, np.uint8)), r"test_labels\[0\]: label 2; it is 0 to 1"),
    (dict(train_images=np.array([{}] * 20, object)), "Python objects.*refused"),
    (dict(train_labels=np.zeros((20, 1), np.uint8)), "no case of class 1"),
    (dict(val_images=np.zeros((8, 3), np.uint8)), r"val_images \(8, 3\)")])
def test_a_bad_npz(tmp_path, change, words):
    refused(arguments("--task", "nodule", "--data", make_npz(tmp_path / "n.npz", **change)), words)


def test_no_npz_or_half_of_one(tmp_path):
    refused(arguments("--task", "nodule", "--data", tmp_path), "no nodulemnist3d.npz")
    refused(arguments("--task", "nodule", "--data", tmp_path / "x.npz"), "no such file")
    whole = make_npz(tmp_path / "n.npz").read_bytes()
    (tmp_path / "n.npz").write_bytes(whole[:len(whole) // 2])
    refused(arguments("--task", "nodule", "--data", tmp_path / "n.npz"), "n.npz: cannot be read as an npz")


def test_bad_lists_and_tables(tmp_path):
    make_scans(tmp_path, 4)
    args = arguments("--task", "ricord", "--data", tmp_path)
    refused(args, "train.txt: no such list")
    good = dict(train="s0.nii.gz 0\ns1.nii.gz 1\n", val="s2.nii.gz 0\n", test="s3.nii.gz 1\n")

    def lists(**change):
        for name, text in {**good, **change}.items():
            (tmp_path / f"{name}.txt").write_text(text)
    lists()
    assert len(listing(args)[0]) == 4
    for change, words in ((dict(val="gone.nii.gz 0\n"), r"val.txt:1: no such file .*gone.nii.gz"),
                          (dict(test="s3.nii.gz 7\n"), "test.txt:1: label '7'; it is 0 to 1"),
                          (dict(test="s3.nii.gz yes\n"), "label 'yes'"), (dict(val=""), "the val split has no case"),
                          (dict(test="s0.nii.gz 0\n"), "1 patients are in more than one split, s0 in test and train")):
        lists(**change)
        refused(args, words)
    lists()
    refused(arguments("--task", "ricord", "--data", tmp_path, "--patient", r"s(\d)\d"), "does not match")
    refused(arguments("--task", "ricord", "--data", tmp_path, "--patient", r"\.nii"), "3 patients|1 patients are in more")
    table, mine = tmp_path / "c.csv", arguments("--task", "mine", "--data", tmp_path / "c.csv")
    refused(mine, "no such CSV")
    for text, words in (("file,label\na,0\n", "lacks the column split"), ("file,label,split\ns0.nii.gz,0,dev\n", "c.csv:2: split 'dev'"),
                        ("file,label,split\ns0.nii.gz,-1,train\n", "label '-1'")):
        table.write_text(text)
        refused(mine, words)


def test_a_ricord_name_names_its_patient(tmp_path):
    who = lambda name: case_of(tmp_path, name, "0", "train", ["a", "b"], None, "x")["patient"]  # noqa: E731
    for name in ("MIDRC-RICORD-1A-419639-000082_s2.nii.gz", "RICORD-000001.nii.gz", "other_7.nii.gz"):
        (tmp_path / name).touch()
    assert [who(n.name) for n in sorted(tmp_path.iterdir())] == ["RICORD-1A-419639-000082", "RICORD-000001", "other_7"]


def test_bad_flags_are_one_line_and_exit_code_2(script, go, tmp_path):
    data = make_npz(tmp_path / "n.npz")
    for flags, words in ((["--volume", 16, 16, 12], "16x16x12 is not a multiple"), (["--window", 5, 5], "LOW must be below"),
                         (["--batch", 8, "--micro", 3], "--micro 3 does not divide"), (["--seeds", 1, 1], "each once"),
                         (["--init", data], "cannot be read as a checkpoint")):
        with pytest.raises(BadInput, match=words):
            go("--task", "nodule", "--data", data, "--size", "nano", *flags)
    done = script("finetune_cls.py", "--task", "nodule", "--data", tmp_path / "none.npz", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error:") and "Traceback" not in done.stderr
