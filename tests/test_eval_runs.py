"""eval.py: frozen features, next-patch errors and the table of results."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as ev
from common import BadInput, place, save_checkpoint, write_json, write_table
from model import CLS_FORMAT, SEGMENTER, Classifier, Config, Model, Segmenter, checkpoint_state, patchify, standardise
from serialize import Sequences

TINY = Config(width=24, layers=2, heads=2, patch=8)


@pytest.fixture(scope="module")
def where():
    return place("cpu", "fp32", 0)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(home, *words, code=0):
    done = subprocess.run([sys.executable, ev.__file__, *map(str, words)], cwd=home, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


# ---------------------------------------------------------------- frozen features


def test_load_encoder_takes_every_kind_of_checkpoint(tmp_path):
    model = Model(TINY)
    save_checkpoint(tmp_path / "a.pt", **checkpoint_state(model), args=dict(volume=64))
    save_checkpoint(tmp_path / "b.pt", format=SEGMENTER, config=vars(TINY), model=Segmenter(model, 3).state_dict(), made={})
    save_checkpoint(tmp_path / "c.pt", format=CLS_FORMAT, config=vars(TINY), model=Classifier(model, 2).state_dict(), args=dict(volume=[32, 32, 32]))
    x = torch.rand(1, 16, 16, 16)
    for name in "abc":
        assert torch.equal(ev.load_encoder(tmp_path / f"{name}.pt")[0].encode(x)[0], model.encode(x)[0])
    assert ev.load_encoder(tmp_path / "a.pt")[1] == dict(volume=64)
    write_json(tmp_path / "args.json", dict(volume=32))
    assert ev.load_encoder(tmp_path / "b.pt")[1] == dict(volume=32)                    # best.pt holds no arguments: those beside it
    golden = Path(__file__).parent / "golden/reference_tiny.npz"
    with np.load(golden, allow_pickle=False) as z:
        torch.save(dict(state_dict={k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("sd.")}), tmp_path / "published.pt")
    assert ev.load_encoder(tmp_path / "published.pt")[1] == {}                         # not of the run beside it


def test_voxels_and_places_of_patches():
    x = torch.rand(2, 16, 8, 8)
    v = ev.voxels_of(x, 8)
    assert v.shape == (2, 2, 64)
    assert v[1, 1, 0] == pytest.approx(x[1, 8:10, :2, :2].mean().item()) and v[0, 0, 1] == pytest.approx(x[0, :2, :2, 2:4].mean().item())
    assert torch.equal(ev.voxels_of(x[:, :8], 4), patchify(x[:, :8], 4))
    places = ev.place_of(8, 24, x)
    assert torch.equal(places[0], places[1]) and not torch.equal(places[0, 0], places[0, 1])


def test_pooled_probe_scores_the_right_rows(where):
    rng = np.random.default_rng(0)
    labels = [int(v) for v in rng.integers(0, 2, 60)]
    split = (["train"] * 3 + ["held", "val"]) * 12
    volumes = [torch.full((8, 8, 8), 0.2 + 0.5 * y) + 0.01 * torch.from_numpy(rng.standard_normal((8, 8, 8)).astype(np.float32)) for y in labels]
    told = lambda x: patchify(x, 4)  # noqa: E731
    blind = lambda x: torch.ones(len(x), 8, 3)  # noqa: E731
    encoders = {"told": told, "blind": blind, "raw voxels": None}
    found = ev.pooled_probe(encoders, 5, where, list(range(60)), volumes.__getitem__, labels, ["a", "b"], split, batch=7)
    assert (found["train"], found["test"]) == (48, 12)
    for n in ("told", "raw voxels"):
        assert found["scores"][n]["knn"]["accuracy"] == found["scores"][n]["linear"]["accuracy"] == found["scores"][n]["linear"]["auc"] == 1
    assert found["scores"]["blind"]["linear"]["auc"] == 0.5
    assert found["scores"]["told"]["knn"]["count_each"] == [sum(1 for y, s in zip(labels, split) if s == "val" and y == c) for c in (0, 1)]


def test_principal_colours_are_the_components():
    rng = np.random.default_rng(0)
    grids = [torch.from_numpy(rng.standard_normal((6, 4, 6)) * [9, 5, 3, 1, 1, 1]).float() for _ in range(2)]
    colours = ev.principal_colours(grids)
    assert [c.shape for c in colours] == [(6, 4, 3)] * 2 and min(c.min() for c in colours) == 0 and max(c.max() for c in colours) == 1
    joined, want = np.concatenate([c.reshape(-1, 3) for c in colours]), torch.cat([g.reshape(-1, 6) for g in grids]).numpy()
    for i in range(3):
        assert np.corrcoef(joined[:, i], want[:, i])[0, 1] > 0.9                       # positive: the sign is settled


def test_slice_tokens_stand_at_the_centres_of_their_patches():
    volume = torch.rand(24, 16, 16)
    tokens, extent = ev.slice_tokens(lambda x: patchify(x, 8).mean(-1, keepdim=True), volume, 11, 8, (8, 8, 8))
    assert tokens.shape == (8, 4, 1) and extent == (2.5, 18.5, 2.5, 10.5)              # edges of voxels: 8 quarters of a patch
    for a, b in ((0, 0), (5, 2), (7, 3)):
        assert tokens[a, b, 0] == pytest.approx(volume[2 * a:2 * a + 8, 2 * b:2 * b + 8, 8:16].mean().item(), rel=1e-5)
        centre = 2 * a + 3.5                                                           # of voxels 2a … 2a + 7, and of quarter a
        assert extent[0] + 2 * a + 1 == centre


def test_probe_on_the_phantom(phantom_home, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)), args=dict(volume=64, images=4))
    done = run(phantom_home, "probe", "--ckpt", tmp_path / "ckpt.pt", "--tasks", "lesions", "--cases", 4, 2)
    found = json.loads((tmp_path / "eval-probe/metrics.json").read_text())["found"]
    organs, types = found["organs of phantom"], found["lesion types"]
    assert list(organs["scores"]) == ["checkpoint", "random weights", "raw voxels", "position alone"] and organs["cases"] == [4, 2]
    assert len(organs["classes"]) == 16 and len(types["classes"]) == 8 and types["test"] == 37
    rows = [json.loads(r) for r in (phantom_home / "data/phantom/corpus/index.jsonl").read_text().splitlines()]
    assert types["train"] + types["test"] == sum(r["kind"] == "semantic" for r in rows)
    assert all(sum(s[p]["count_each"]) == organs["test"] for s in organs["scores"].values() for p in ("knn", "linear"))
    assert organs["scores"]["position alone"]["linear"]["auc"] > 0.8                   # bodies lie alike
    for f in (organs, types):                                                          # the checkpoint is what --seed 0 draws
        assert f["scores"]["checkpoint"] == f["scores"]["random weights"] != f["scores"]["raw voxels"]
    assert "recall by class, linear; lesion types" in done.stdout
    assert all((tmp_path / "eval-probe" / f).stat().st_size > 5000 for f in ("probe.png", "pca.png"))


@pytest.mark.parametrize("flags, message", [
    (["--ckpt", "none.pt"], "none.pt: no such checkpoint"),
    (["--ckpt", "{0}/odd.pt"], "neither a checkpoint of pretrain.py"),
    (["--ckpt", "{0}/ckpt.pt", "--layer", "2"], "blocks are 0 to 1"),
    (["--ckpt", "{0}/ckpt.pt", "--task", "amos", "--data", "{0}", "--tasks"], "no labelled scans"),
    (["--ckpt", "{0}/ckpt.pt", "--task", "nonsense"], "or a name of your own with --data"),
    (["--ckpt", "{0}/ckpt.pt", "--task", "none", "--tasks"], "nothing to probe"),
    (["--ckpt", "{0}/ckpt.pt", "--task", "none", "--tasks", "lesions", "--corpus", "{0}"], "no corpus there"),
])
def test_probe_says_what_is_wrong(tmp_path, monkeypatch, flags, message):
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)))
    torch.save(dict(x=1), tmp_path / "odd.pt")
    monkeypatch.setattr(sys, "argv", ["eval.py", "probe", *(f.format(tmp_path) for f in flags)])
    with pytest.raises(BadInput, match=message):
        ev.main()


# ---------------------------------------------------------------- next patch


@pytest.fixture(scope="module")
def sets(corpus):
    data = Sequences(corpus, "val", 32, 4, 8, seed=0)
    return data, [data[n] for n in range(6)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Model(TINY).eval()


def test_errors_by_prefix_are_the_models_loss(sets, net, where):
    _, sets = sets
    errors = ev.errors_by_prefix(net, sets, [0, 16, 56], where)
    assert errors.shape == (6, 3, 64)
    batch = torch.utils.data.default_collate(sets)
    for j, p in enumerate([0, 16, 56]):
        with torch.no_grad():
            loss, _ = net(batch["volume"], torch.full((6,), p), batch["window"])
        assert errors[:, j, p:].mean() == pytest.approx(loss.item(), rel=1e-5) and not errors[:, j, :p].any()
        found = ev.by_prefix(errors, dict(mean=np.ones(64), copy=[np.ones(64)] * 3, distance=[1] * 3), [0, 16, 56], 0)[str(p)]
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5) and found["low"] <= found["loss"] <= found["high"]


def test_trivial_predictors_by_hand(sets, net, where):
    _, sets = sets
    found = ev.trivial_by_prefix(net, sets[:2], [0, 48], where)
    batch = torch.utils.data.default_collate(sets[:2])
    t = standardise(net.sequence(batch["volume"], batch["window"])[0])[0].double()     # [2, G, P³]
    np.testing.assert_allclose(found["mean"], t.square().mean((0, 2)), rtol=1e-4)
    for j, p in enumerate([0, 48]):
        losses = {}
        for d in range(1, 64):
            old = torch.cat([torch.zeros(2, d, 512), t[:, :-d]], 1)[:, p:]
            gain = max(0, float((t[:, p:] * old).sum() / old.square().sum().clamp(min=1e-12)))
            losses[d] = float((t[:, p:] - gain * old).square().mean())
        best = min(losses, key=losses.get)
        assert found["distance"][j] == best
        assert found["copy"][j][p:].mean() == pytest.approx(losses[best], rel=1e-4)
        assert found["copy"][j][p:].mean() <= found["mean"][p:].mean()


@pytest.mark.parametrize("order", ["raster", "image"])
def test_completion_is_what_repeated_forward_passes_give(order):
    torch.manual_seed(1)
    model = Model(Config(width=24, layers=2, heads=2, patch=4, order=order)).eval()
    volume = torch.rand(2, 8, 8, 16)
    patches, grid, index = model.sequence(volume)
    got = ev.complete(model, patches, 5, grid, index)
    fed, (_, mean, scale) = patches.clone(), standardise(patches)
    from model import unpatchify
    back = torch.arange(16) if index is None else torch.argsort(index)
    for i in range(5, 16):
        with torch.no_grad():
            pred = model(unpatchify(fed[:, back], grid), torch.full((2,), 5))[1][:, i]
        torch.testing.assert_close(got[:, i], pred, atol=2e-5, rtol=1e-4)
        fed[:, i] = (pred * scale[:, i] + mean[:, i]).clamp(0, 1)
    assert not got[:, :5].any() and not torch.allclose(fed[:, 5:], patches[:, 5:])


def test_next_patch_on_the_phantom(phantom_home, corpus, tmp_path, net):
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(net), args=dict(volume=32, images=4, stride=8))
    done = run(phantom_home, "pretrain", "--ckpt", tmp_path / "ckpt.pt", "--data", corpus, "--samples", 2, "--completions", 1)
    found = json.loads((tmp_path / "eval-pretrain/metrics.json").read_text())
    assert list(found["loss"]) == ["spatial", "contrast", "semantic"] and list(found["loss"]["spatial"]) == ["0", "8", "16", "32", "48", "56"]
    for per in found["loss"].values():
        assert all(("free_running" in v) == (p in ("0", "16", "32", "48")) for p, v in per.items())
        assert all(np.isfinite(list(v.values())).all() for v in per.values())
    with open(tmp_path / "eval-pretrain/positions.csv") as f:
        rows = [r for r in csv.DictReader(f) if r["kind"] == "contrast" and r["prefix"] == "16"]
    assert [int(r["position"]) for r in rows] == list(range(16, 64))
    assert np.mean([float(r["loss"]) for r in rows]) == pytest.approx(found["loss"]["contrast"]["16"]["loss"], abs=1e-5)
    assert "free-running" in done.stdout and (tmp_path / "eval-pretrain/completions.png").stat().st_size > 5000


def test_a_model_of_both_targets_is_measured_by_its_voxels(sets, where, tmp_path):
    both = Model(Config(**{**vars(TINY), "target": "both", "codes": 5})).eval()
    batch = torch.utils.data.default_collate(sets[1][:2])
    codes = torch.zeros(2, 64, 1, dtype=torch.long)
    with torch.no_grad():
        want = both(batch["volume"], torch.full((2,), 16), batch["window"], codes=codes)[0][0]
    errors = ev.errors_by_prefix(ev.pixel_model(both, "x"), sets[1][:2], [16], where)
    assert errors[:, 0, 16:].mean() == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(BadInput, match="predict codes"):
        ev.pixel_model(Model(Config(**{**vars(TINY), "target": "vq", "codes": 5})), "x")


def test_next_patch_says_what_is_wrong(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "seg.pt", format=SEGMENTER, config=vars(TINY), model=Segmenter(Model(TINY), 2).state_dict(), made={})
    save_checkpoint(tmp_path / "ckpt.pt", **checkpoint_state(Model(TINY)))
    for flags, message in ((["--ckpt", "seg.pt"], "predicts no patches"), (["--ckpt", "ckpt.pt", "--data", "here"], "here: no corpus there"),
                           (["--ckpt", "ckpt.pt", "--samples", "2", "--completions", "3"], "no more completions")):
        monkeypatch.setattr(sys, "argv", ["eval.py", "pretrain", *flags])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BadInput, match=message):
            ev.main()


# ---------------------------------------------------------------- table


def seg_run(folder, value, seed, init="scratch", labels=1.0, cases=None, **more):
    write_json(folder / "args.json", dict(task="amos", init=init, labels=labels, seed=seed, out=str(folder), freeze=False, **more))
    if value is not None:
        write_json(folder / "metrics.json", dict(mean_dice=value, best_mean_dice=0.99, dice=dict(liver=value, spleen=None), cases=cases or {}))


def cls_run(folder, labels, scores, seed, init=None):
    write_json(folder / "args.json", dict(task="phantom-cls", flavour="nodule", init=init, labels=1.0, seeds=[seed], freeze=False))
    from common import auc
    write_json(folder / "metrics.json", dict(seed=seed, test=dict(auc=dict(value=auc(labels, scores), low=None, high=None))))
    rows = [[f"f{i}", f"p{i // 2}", "test", int(y), 1 - s, s, int(s > 0.5)] for i, (y, s) in enumerate(zip(labels, scores))]
    write_table(folder / "scores.csv", ["file", "patient", "split", "label", "p_0", "p_1", "predicted"], [["v0", "v", "val", 0, 0.5, 0.5, 1], *rows])


def make_table(monkeypatch, capsys, out, *runs):
    monkeypatch.setattr(sys, "argv", ["eval.py", "table", *map(str, runs), "--out", str(out)])
    ev.main()
    with open(out / "table.csv") as f, open(out / "tests.csv") as g:
        return capsys.readouterr().out, list(csv.DictReader(f)), list(csv.DictReader(g))


def test_table_mean_sd_and_wilcoxon(tmp_path, monkeypatch, capsys):
    from scipy.stats import wilcoxon
    rng = np.random.default_rng(0)
    ours, theirs = ({s: {f"c{i}": [float(v), None] for i, v in enumerate(rng.random(8) * 0.5 + up)} for s in (0, 1, 2)} for up in (0.1, 0.25))
    for s, v in zip((0, 1, 2), (0.5, 0.6, 0.73)):
        seg_run(tmp_path / f"a{s}", v, s, cases=ours[s])
    for s, v in zip((1, 2, 3), (0.7, 0.75, 0.9)):
        seg_run(tmp_path / f"b{s}", v, s, init="out/pretrain/ckpt.pt", cases=theirs[s % 3])
    text, rows, tests = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)
    assert [(r["initialisation"], r["runs"], r["seeds"]) for r in rows] == [("scratch", "3", "0 1 2"), ("pretrain", "3", "1 2 3")]
    assert float(rows[0]["mean"]) == pytest.approx(0.61) and float(rows[0]["sd"]) == pytest.approx(np.std([0.5, 0.6, 0.73], ddof=1))
    assert "| amos | 100 % | scratch | Dice | 3 | 0.610 ± 0.115 |  |" in text and "| liver | 0.610 ± 0.115 | 0.783 ± 0.104 |" in text
    t, = tests
    assert (t["a"], t["b"], t["seeds"], t["n"], t["test"]) == ("scratch", "pretrain", "1 2", "8", "Wilcoxon, cases")
    assert float(t["difference"]) == pytest.approx((0.7 - 0.6 + 0.75 - 0.73) / 2)
    a, b = ([np.mean([x[s][f"c{i}"][0] for s in (1, 2)]) for i in range(8)] for x in (ours, theirs))
    assert float(t["p"]) == pytest.approx(wilcoxon(np.subtract(b, a), method="exact").pvalue)
    assert (tmp_path / "table/table.md").read_text().strip() in text and (tmp_path / "table/table.png").stat().st_size > 5000


def test_table_t_test_where_cases_differ(tmp_path, monkeypatch, capsys):
    from scipy.stats import ttest_rel
    a, b = (0.5, 0.6, 0.7), (0.55, 0.7, 0.71)
    for s in range(3):
        seg_run(tmp_path / f"a{s}", a[s], s, cases={f"c{s}": [0.1]})
        seg_run(tmp_path / f"b{s}", b[s], s, init="published.pth")
    _, _, (t,) = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)
    assert (t["b"], t["test"], t["n"]) == ("published.pth", "paired t, seeds", "3") and float(t["p"]) == pytest.approx(ttest_rel(b, a).pvalue)


def test_table_bootstrap_of_auc(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 3 == 0
    good, bad = y + 0.5 * rng.standard_normal(80), rng.standard_normal(80)
    cls_run(tmp_path / "x/seed-0", y, bad, 0)
    cls_run(tmp_path / "x/seed-1", y, bad[::-1], 1)
    write_json(tmp_path / "x/args.json", dict(task="phantom-cls", flavour="nodule", init=None, labels=1.0, seeds=[0, 1]))
    write_json(tmp_path / "x/metrics.json", dict(task="phantom-cls", seeds=[0, 1], test={}, runs=[]))
    cls_run(tmp_path / "y", y, good, 0, "a/ckpt.pt")
    cls_run(tmp_path / "z", y, good + 0.01 * rng.standard_normal(80), 0, "b/ckpt.pt")
    monkeypatch.setattr(ev, "RESAMPLED", 400)
    _, rows, tests = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)
    assert [(r["task"], r["metric"], r["initialisation"], r["runs"]) for r in rows] == [("phantom-cls (nodule)", "AUC", i, n) for i, n in
                                                                                       (("scratch", "2"), ("a", "1"), ("b", "1"))]
    found = {(t["a"], t["b"]): t for t in tests}
    far, near = found["scratch", "a"], found["a", "b"]
    assert far["n"] == "40" and far["seeds"] == "0" and far["test"] == "bootstrap, patients"
    assert float(far["p"]) < 0.02 and 0 < float(far["low"]) < float(far["difference"]) < float(far["high"])
    assert float(near["p"]) > 0.05 and float(near["low"]) <= 0 <= float(near["high"])
    again = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)[2]
    assert again == tests


def test_table_lists_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    seg_run(tmp_path / "a", 0.5, 0, steps=700)
    seg_run(tmp_path / "b", 0.6, 0, steps=10)
    seg_run(tmp_path / "c", 0.7, 0, labels=0.1)
    seg_run(tmp_path / "c/earlier-1", 0.1, 5)
    seg_run(tmp_path / "d", None, 1)
    (tmp_path / "d/log.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    seg_run(tmp_path / "e", 0.5, 2)
    (tmp_path / "e/metrics.json").write_text('{"mean_dice": 0.')
    seg_run(tmp_path / "f", 0.5, 3)
    write_json(tmp_path / "f/metrics.json", dict(other=1))
    write_json(tmp_path / "g/args.json", dict(volume=64, init=None))                   # pre-training: no row of this table
    text, rows, tests = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)
    assert [(r["labels"], r["runs"], r["paper"]) for r in rows] == [("0.1", "1", ""), ("1.0", "2", "")] and not tests
    assert f"not in the table: {tmp_path / 'd'}: unfinished: no metrics.json, 2 lines in log.jsonl" in text
    assert f"not in the table: {tmp_path / 'e'}: metrics.json: not JSON" in text
    assert f"not in the table: {tmp_path / 'f'}: metrics.json or args.json is not as finetune_seg.py" in text
    assert "these runs differ in steps" in text and "more than one run of a seed" in text
    assert str(tmp_path / "g") not in text and "earlier" not in text
    with pytest.raises(BadInput, match="(?s)no finished fine-tuning run.*unfinished"):
        make_table(monkeypatch, capsys, tmp_path / "table", tmp_path / "d")
    with pytest.raises(BadInput, match="no such folder"):
        make_table(monkeypatch, capsys, tmp_path / "table", tmp_path / "nowhere")


def test_checkpoints_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    seg_run(tmp_path / "a", 0.5, 0, init="x/pretrain/ckpt.pt")
    seg_run(tmp_path / "b", 0.6, 0, init="y/pretrain/ckpt.pt")
    seg_run(tmp_path / "c", 0.7, 0, init="x/pretrain/best.pt")
    _, rows, tests = make_table(monkeypatch, capsys, tmp_path / "table", tmp_path)
    assert [r["initialisation"] for r in rows] == ["best of pretrain", "x/pretrain/ckpt.pt", "y/pretrain/ckpt.pt"] and len(tests) == 3
    assert {t["test"] for t in tests} == {"one seed, no cases in common"} and {t["p"] for t in tests} == {""}


def test_the_papers_cells_are_empty_until_read(monkeypatch):
    assert all(v is None for cell in ev.PAPER.values() for k, v in cell.items() if k != "metric")
    monkeypatch.setitem(ev.PAPER, "amos", dict(metric="Dice", scratch=0.25, **{"pre-trained": 0.75}))
    run = dict(value=0.5, metric="Dice", seed=0, folder="a", args={})
    assert [ev.summarise_cell("amos", share, init, [run])["paper"] for share, init in ((1.0, "scratch"), (1.0, "pretrain"), (0.1, "pretrain"),
                                                                                      (1.0, "pretrain, frozen"))] == [0.25, 0.75, None, None]
