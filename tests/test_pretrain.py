"""pretrain.py as its users run it: small volumes (32³ in 8³ patches), everything else as in a real run."""
import json
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch

import pretrain
from common import BadInput, load_checkpoint, place, read_log
from model import SIZES, Config, Model, load_pretrained, standardise
from serialize import KINDS, Sequences

SMALL = ["--size", "nano", "--volume", 32, "--stride", 2, "--batch", 4, "--steps", 10, "--val-samples", 2, "--val-every", 5,
         "--log-every", 1, "--save-every", 5, "--dtype", "fp32"]


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return {r["step"]: r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def args():
    args = pretrain.parser().parse_args([str(f) for f in SMALL])
    pretrain.settle(args, place("cpu", "fp32"))
    return args


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("ranks, workers", [(1, 2), (2, 0)])
def test_ten_steps_are_five_and_five(script, tmp_path, ranks, workers):
    flags = [*SMALL, "--workers", workers]
    whole, half = tmp_path / "whole", tmp_path / "half"
    script("pretrain.py", *flags, "--out", whole, ranks=ranks)
    script("pretrain.py", *flags, "--out", half, "--stop-after", 5, ranks=ranks)
    state = load_checkpoint(half / "ckpt.pt")
    assert state["step"] == 5 and state["samples"] == 20 and len(state["random"]) == ranks
    done = script("pretrain.py", "--resume", "--out", half, ranks=ranks)
    assert same(weights(whole / "ckpt.pt"), weights(half / "ckpt.pt"))
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (whole, half))
    for k in a["optimiser"]["state"]:
        assert same(a["optimiser"]["state"][k], b["optimiser"]["state"][k])
    assert a["best"] == b["best"] and same(weights(whole / "best.pt"), weights(half / "best.pt"))
    timeless = [[{k: v for k, v in r.items() if k not in ("samples_per_s", "mfu", "seconds")} for r in read_log(p / "log.jsonl")]
                for p in (whole, half)]
    assert timeless[0] == timeless[1] and len(losses(half)) == 10
    for f in ("args.json", "metrics.json", "curves.png", "samples.png"):
        assert (half / f).stat().st_size > 0
    assert "loss / patch mean" in done.stdout + done.stderr


def test_processes_and_accumulation_train_the_same_model(script, tmp_path):
    flags = ["--size", "nano", "--volume", 32, "--stride", 2, "--batch", 4, "--steps", 6, "--val-samples", 2, "--log-every", 1, "--dtype", "fp32"]
    script("pretrain.py", *flags, "--micro", 2, "--out", tmp_path / "a")
    script("pretrain.py", *flags, "--micro", 2, "--out", tmp_path / "b", ranks=2)
    script("pretrain.py", *flags, "--micro", 4, "--out", tmp_path / "c")
    a, b, c = (losses(tmp_path / x) for x in "abc")
    assert len(a) == 6 and a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5)
    va, vb = ([r["val_loss"] for r in read_log(tmp_path / x / "log.jsonl") if "val_loss" in r] for x in "ab")
    assert va == pytest.approx(vb, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_leaves(script, tmp_path, ranks):
    flags = [*SMALL[:SMALL.index("--steps")], "--steps", 4000, "--val-samples", 2, "--val-every", 5000, "--save-every", 5000, "--dtype", "fp32"]
    process = script("pretrain.py", *flags, "--out", tmp_path, popen=True, ranks=ranks)
    while not read_log(tmp_path / "log.jsonl")[-1:] or "loss" not in read_log(tmp_path / "log.jsonl")[-1]:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "--resume goes on" in said
    if ranks == 1:  # torchrun itself reports the signal, with a traceback of its own
        assert process.returncode == 0 and "Traceback" not in said
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 0 < step < 4000 and f"stopped at step {step} of 4000" in said


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_weights(script, tmp_path):
    flags = [*SMALL[:SMALL.index("--steps")], "--steps", 1500, "--val-samples", 2, "--val-every", 100, "--save-every", 7, "--dtype", "fp32",
             "--workers", 2]
    script("pretrain.py", *flags, "--out", tmp_path / "whole")
    draw, kills, steps = random.Random(0), 0, set()
    while kills < 20:
        process = script("pretrain.py", *flags, "--resume", "--out", tmp_path / "killed", popen=True)
        time.sleep(draw.uniform(3, 9))
        assert process.poll() is None, f"ended after {kills} kills: more steps are needed\n{process.stdout.read()}"
        process.kill()
        process.wait()
        kills += 1
        if (tmp_path / "killed/ckpt.pt").exists():
            steps.add(load_checkpoint(tmp_path / "killed/ckpt.pt")["step"])
    script("pretrain.py", "--resume", "--out", tmp_path / "killed")
    print(f"{kills} kills; checkpoints seen at steps {sorted(steps)}")
    assert len(steps) > 5 and same(weights(tmp_path / "whole/ckpt.pt"), weights(tmp_path / "killed/ckpt.pt"))


# ---------------------------------------------------------------- what goes in


def test_ranks_and_passes_share_the_samples_out(args):
    class Rank:
        world = 2
        def __init__(self, rank):
            self.rank = rank
    for micro in (1, 2):
        args.micro = micro
        taken = []
        for rank in range(2):
            stream = pretrain.micro_batches(3, args, Rank(rank))
            taken += [n for _ in range(2 * 2 // micro) for n in next(stream)]  # two steps
        assert sorted(taken) == list(range(12, 20))
    args.micro = 4


def test_prefixes_are_uniform_and_the_same_for_a_seed(args):
    drawn = np.concatenate([pretrain.draw_prefixes(s, 64, args) for s in range(2000)])
    counts = np.bincount(drawn, minlength=64)
    assert len(counts) == 64 and abs(counts - 125).max() < 60
    assert np.array_equal(pretrain.draw_prefixes(7, 64, args), pretrain.draw_prefixes(7, 64, args))


def test_causal_attention_draws_no_prefix(args):
    args.attention = "causal"
    assert not pretrain.draw_prefixes(0, 64, args).any()
    args.attention = "prefix"


# ---------------------------------------------------------------- evaluation


def test_trivial_predictors_against_loops(args, corpus):
    where = place("cpu", "fp32")
    data = Sequences(corpus, "val", 32, 4, 2)
    model = Model(Config(**SIZES["nano"]))
    batches = pretrain.validation_set(data, 64, args, where)
    found = pretrain.trivial_predictors(model, batches, 64, where)
    for kind in range(3):
        pairs = []
        for b in batches:
            targets = standardise(model.sequence(b["volume"], b["window"])[0])[0].double()
            pairs += [(targets[i], int(b["prefix"][i])) for i in range(len(targets)) if b["kind"][i] == kind]
        n = sum((64 - p) * 512 for _, p in pairs)
        best = {}
        for d in range(1, 64):
            now = torch.cat([t[max(p, d):].flatten() for t, p in pairs])
            earlier = torch.cat([t[max(p, d) - d:64 - d].flatten() for t, p in pairs])
            none = sum(t[p:max(p, d)].square().sum() for t, p in pairs)
            scale = (now @ earlier / (earlier @ earlier).clamp(min=1e-12)).clamp(min=0)
            best[d] = ((now - scale * earlier).square().sum() + none).item() / n
        mean, copy, distance = found[KINDS[kind]]
        assert mean == pytest.approx(sum(t[p:].square().sum().item() for t, p in pairs) / n, rel=1e-6)
        assert copy == pytest.approx(min(best.values()), rel=1e-5) and best[distance] == pytest.approx(copy, rel=1e-5)
        assert copy < mean <= 1


def test_a_rank_without_a_validation_sequence_takes_part(args, corpus):
    where, data = place("cpu", "fp32"), Sequences(corpus, "val", 32, 4, 2)
    model = Model(Config(**SIZES["nano"]))
    assert pretrain.trivial_predictors(model, [], 64, where) == {} == pretrain.evaluate(model, [], where)
    assert pretrain.validation_set(data, 64, args, type("Rank", (), dict(rank=6, world=7))) == []


def test_evaluation_is_the_loss_of_each_kind(args, corpus):
    where = place("cpu", "fp32")
    data = Sequences(corpus, "val", 32, 4, 2)
    torch.manual_seed(0)
    model = Model(Config(**SIZES["nano"]))
    batches = pretrain.validation_set(data, 64, args, where)
    found = pretrain.evaluate(model, batches, where)
    assert found == pretrain.evaluate(model, pretrain.validation_set(data, 64, args, where), where)  # the same prefixes
    with torch.no_grad():
        for kind in range(3):
            picked = [{k: v[i:i + 1] for k, v in b.items()} for b in batches for i in range(len(b["kind"])) if b["kind"][i] == kind]
            both = {k: torch.cat([b[k] for b in picked]) for k in picked[0]}
            loss, _ = model(both["volume"], both["prefix"], both["window"])
            assert found[KINDS[kind]] == pytest.approx(loss.item(), rel=1e-5)


# ---------------------------------------------------------------- the run as a whole


def test_the_demo_learns_and_its_checkpoint_loads(script, tmp_path):
    out = tmp_path / "run"
    done = script("pretrain.py", "--steps", 40, "--volume", 32, "--stride", 2, "--val-every", 40, "--val-samples", 8, "--out", out)
    log = read_log(out / "log.jsonl")
    val = [r for r in log if "val_loss" in r]
    assert [r["step"] for r in val] == [0, 40] and all(val[1][f"val_{k}"] < val[0][f"val_{k}"] for k in KINDS)
    row = next(r for r in log if "loss" in r)
    assert {"step", "loss", "lr", "samples_per_s", "mfu", "grad_norm"} <= row.keys() and 0 < row["mfu"] < 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 40 and all(metrics["earlier_patch"][k] < metrics["patch_mean"][k] <= 1 for k in KINDS)
    for f in ("curves.png", "samples.png"):
        assert (out / f).read_bytes().startswith(b"\x89PNG")
    assert "no CUDA device" in done.stdout + done.stderr or torch.cuda.is_available()
    model = load_pretrained(out / "best.pt")
    loss, pred = model(torch.rand(2, 32, 32, 32), torch.tensor([0, 63]))
    assert pred.shape == (2, 64, 512) and loss.isfinite()
    script("pretrain.py", *SMALL, "--steps", 2, "--init", out / "ckpt.pt", "--out", tmp_path / "warm")
    again = [r for r in read_log(tmp_path / "warm/log.jsonl") if r["step"] == 0][0]
    assert again["val_loss"] < val[0]["val_loss"] - 0.05  # it starts from what the first run learned


def test_a_new_run_overwrites_nothing(script, tmp_path):
    flags = [*SMALL, "--steps", 2, "--out", tmp_path]
    script("pretrain.py", *flags)
    before = weights(tmp_path / "ckpt.pt")
    done = script("pretrain.py", *flags, "--seed", 1)
    assert same(before, weights(tmp_path / "earlier-1/ckpt.pt")) and not same(before, weights(tmp_path / "ckpt.pt"))
    assert "earlier-1" in done.stdout + done.stderr


def test_image_order_and_causal_attention(script, tmp_path):
    script("pretrain.py", *SMALL, "--order", "image", "--attention", "causal", "--stride", 8, "--volume", 64, "--batch", 2, "--steps", 2,
           "--mix", "spatial=1", "--out", tmp_path / "a")
    assert load_pretrained(tmp_path / "a/ckpt.pt").config.order == "image"


@pytest.mark.slow
def test_triton_trains_the_same_model(script, tmp_path):
    """A step with the kernels, under Triton's interpreter, from int16 voxels and with sub-images that end within a patch."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has its own test of a step")
    flags = ["--size", "nano", "--dtype", "fp32", "--steps", 1, "--volume", 16, "--stride", 1, "--batch", 1, "--val-samples", 1, "--warmup", 0]
    for kernels in ("torch", "triton"):
        done = script("pretrain.py", *flags, "--kernels", kernels, "--out", tmp_path / kernels)
        assert f"--kernels {kernels}: {kernels} (asked for" in done.stdout
    a, b = ([[r[k] for k in ("loss", "grad_norm", "val_loss") if k in r] for r in read_log(tmp_path / k / "log.jsonl")] for k in ("torch", "triton"))
    assert len(a) == 3 and all(x == pytest.approx(y, rel=1e-4) for x, y in zip(a, b))


def test_two_ranks_probe_without_waiting_for_ever(script, tmp_path, phantom_home):
    script("pretrain.py", *SMALL, "--steps", 2, "--probe-every", 2, "--data", phantom_home / "data/phantom/corpus", "--probe-data", "data/phantom/amos",
           "--out", tmp_path / "two", ranks=2)
    assert [r["step"] for r in read_log(tmp_path / "two/log.jsonl") if "probe_knn_f1" in r] == [0, 2]


def test_probing_leaves_the_run_as_it_is(script, tmp_path):
    for every in (0, 2):
        script("pretrain.py", *SMALL, "--steps", 3, "--probe-every", every, "--out", tmp_path / str(every))
    a, b = (load_checkpoint(tmp_path / every / "ckpt.pt") for every in "02")
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())
    probed = [r for r in read_log(tmp_path / "2/log.jsonl") if "probe_linear_f1" in r]
    assert [r["step"] for r in probed] == [0, 2] and all(0 < r["probe_linear_f1"] < 1 and 0 < r["probe_knn_f1"] < 1 for r in probed)


def test_bench_prints_what_it_should(script):
    done = script("pretrain.py", "--size", "nano", "--volume", 32, "--micro", 1, "--bench")
    for words in ("matrix rate", "model FLOP", "peak memory", "tokens/s"):
        assert re.search(rf"{words}", done.stdout)


def test_bad_input_gets_one_line(script, phantom_home, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "StopRequest", object)  # pytest keeps its Ctrl-C
    monkeypatch.chdir(phantom_home)
    (tmp_path / "cut").mkdir()
    script("pretrain.py", *SMALL, "--steps", 1, "--out", tmp_path / "good")
    whole = (tmp_path / "good/ckpt.pt").read_bytes()
    (tmp_path / "cut/ckpt.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"format": "something else"}, tmp_path / "other.pt")
    for flags, words in (
            (["--resume", "--out", tmp_path / "cut"], "cut short"),
            (["--resume", "--out", tmp_path / "good", "--seed", 5], "--seed 5: the run to resume has 0"),
            (["--init", tmp_path / "other.pt"], "neither a checkpoint"),
            (["--init", tmp_path / "nothing.pt"], "no such checkpoint"),
            (["--init", tmp_path / "good/ckpt.pt", "--size", "small"], "choose another --size"),
            (["--data", tmp_path], "no corpus there"),
            (["--volume", 60], "60x60x60 is not a multiple of the patch 8"),
            (["--batch", 6, "--micro", 4], "--micro 4 does not divide"),
            (["--stride", 40], "--stride 40"),
            (["--batch", 0], "--batch 0"),
            (["--lr", "-1"], "--lr -1.0"), (["--seed", "-1"], "--seed -1"), (["--device", "mps"], "--device mps"),
            (["--device", "cuda"], "sees no CUDA device")):
        if "cuda" in flags and torch.cuda.is_available():
            continue
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *([] if "--resume" in flags or "--size" in flags else ["--size", "nano"]),
                                          *map(str, flags)])
        with pytest.raises(BadInput, match=re.escape(words)):
            pretrain.main()
    done = script("pretrain.py", "--init", tmp_path / "other.pt", code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_settle_refuses_what_does_not_divide(args):
    class Three:
        world, rank, main, device = 3, 0, True, torch.device("cpu")
        say = print
    bad = pretrain.parser().parse_args(["--size", "nano", "--batch", "8"])
    with pytest.raises(BadInput, match="--batch 8 does not divide over 3"):
        pretrain.settle(bad, Three())


@pytest.mark.gpu
def test_a_step_on_cuda_is_the_step_on_the_cpu(args, corpus):
    data = Sequences(corpus, size=32, stride=2, mix={k: 1 for k in KINDS})
    batch = torch.utils.data.default_collate([data[n] for n in range(4)])
    torch.manual_seed(0)
    model = Model(Config(**SIZES["nano"]))
    prefix = torch.tensor([0, 1, 30, 63])
    want, _ = model(batch["volume"], prefix, batch["window"])
    got, _ = model.cuda()(batch["volume"].cuda(), prefix.cuda(), batch["window"].cuda())
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
