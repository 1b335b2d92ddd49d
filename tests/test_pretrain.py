"""pretrain.py as its users run it: small volumes (16³ in 8³ patches), all else as in a real run."""

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import pretrain
from common import BadInput, load_checkpoint, optimiser_step, read_log, setup
from model import SIZES, Config, Model, data_sheet, load_pretrained, standardise
from serialize import KINDS, Sequences

RUN = ["--size", "nano", "--volume", 16, "--stride", 1, "--batch", 4, "--val-samples", 2]
RUN += ["--dtype", "fp32"]
SMALL = [*RUN, "--steps", 10, "--val-every", 5, "--log-every", 1]


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return {row["step"]: row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row}


def validations(out):
    return [row["val_loss"] for row in read_log(out / "log.jsonl") if "val_loss" in row]


@pytest.fixture(scope="module")
def args():
    args = pretrain.parser().parse_args([*map(str, SMALL), "--device", "cpu"])
    pretrain.settle(args, setup(args))
    return args


# ---- optimiser ----


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(args):
    """As PyTorch's two on the same gradients; a step that is not finite leaves all as it was."""
    model, twin = (Model(Config(**SIZES["nano"])) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    assert args.optimiser == "muon"
    optimiser = pretrain.make_optimiser(model, args, argparse.Namespace(dtype=torch.bfloat16))
    rest = dict(twin.named_parameters())
    names = [k for k in rest if re.search(r"(qkv|proj|fc\d)\.weight", k)]
    assert len(names) == 4 * twin.config.layers == len(optimiser.state)
    rates = {"lr": 0.01, "weight_decay": args.wd}
    muon = torch.optim.Muon([*map(rest.pop, names)], adjust_lr_fn="match_rms_adamw", **rates)
    adamw = torch.optim.AdamW(rest.values(), betas=(0.9, args.beta2), fused=True, **rates)
    for step, fault in enumerate([math.nan, 1, 1, math.inf, 1]):
        torch.manual_seed(step)
        for w, v in zip(model.parameters(), twin.parameters()):
            w.grad = torch.randn_like(w) * fault
            v.grad = w.grad.clone()
        before = {k: w.clone() for k, w in model.state_dict().items()}
        optimiser_step(optimiser, 0.01)
        if fault != 1:
            assert same(model.state_dict(), before)
            continue
        muon.step()
        adamw.step()
        for (k, w), v in zip(model.named_parameters(), twin.parameters()):
            assert torch.allclose(w, v, 0, 1e-6 if k in names else 0), k


def test_newton_schulz_brings_singular_values_near_1():
    torch.manual_seed(0)
    for shape in (48, 96), (96, 48), (64, 64):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        x = pretrain.orthogonal(matrix, torch.float32)
        values = torch.linalg.svdvals(x)
        assert 0.3 < values.min() and values.max() < 1.3
        assert torch.allclose(u.T @ x @ v.T, (u.T @ x @ v.T).diag().diag(), atol=1e-4)


# ---- resume ----


@pytest.mark.parametrize(
    "ranks, workers, optimiser", [(1, 2, "adamw"), (1, 0, "muon"), (2, 0, "muon")]
)
def test_ten_steps_are_five_and_five(script, tmp_path, ranks, workers, optimiser):
    flags = [*SMALL, "--workers", workers, "--optimiser", optimiser]
    whole, half = tmp_path / "whole", tmp_path / "half"
    script("pretrain.py", *flags, "--out", whole, ranks=ranks)
    script("pretrain.py", *flags, "--out", half, "--stop-after", 5, ranks=ranks)
    assert load_checkpoint(half / "ckpt.pt")["step"] == 5
    done = script("pretrain.py", "--resume", "--val-every", 5, "--out", half, ranks=ranks)
    a, b = (load_checkpoint(run / "ckpt.pt") for run in (whole, half))
    assert same(a["model"], b["model"]) and a["best"] == b["best"]
    for k, moments in a["optimiser"]["state"].items():
        assert same(moments, b["optimiser"]["state"][k])
    assert same(weights(whole / "best.pt"), weights(half / "best.pt"))
    timeless = []
    for run in (whole, half):
        rows = read_log(run / "log.jsonl")
        for row in rows:
            for k in ("samples_per_s", "of_matmul_rate", "seconds"):
                row.pop(k, None)
        timeless.append(rows)
    assert timeless[0] == timeless[1] and len(losses(half)) == 10
    for f in ("args.json", "metrics.json", "curves.png", "samples.png"):
        assert (half / f).stat().st_size > 0
    assert "loss / patch mean" in done.stdout + done.stderr


def test_processes_and_accumulation_train_the_same_model(script, tmp_path):
    """Three share four sequences; two begin and one goes on."""
    flags = [*RUN, "--steps", 6, "--log-every", 1]
    for name, micro, ranks in (("a", 2, 1), ("b", 1, 3), ("c", 4, 1)):
        script("pretrain.py", *flags, "--micro", micro, "--out", tmp_path / name, ranks=ranks)
    script("pretrain.py", *flags, "--stop-after", 3, "--out", tmp_path / "d", ranks=2)
    script("pretrain.py", "--resume", "--out", tmp_path / "d")
    a, *others = (losses(tmp_path / x) for x in "abcd")
    assert len(a) == 6 and all(a == pytest.approx(other, rel=1e-5) for other in others)
    assert validations(tmp_path / "a") == pytest.approx(validations(tmp_path / "b"), rel=1e-5)


TERM, CTRL_C, HANG_UP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    "ranks, workers, sent", [(1, 0, TERM), (2, 0, TERM), (2, 0, HANG_UP), (1, 2, CTRL_C)]
)
def test_a_signal_saves_and_leaves(script, tmp_path, ranks, workers, sent):
    """To the process; to torchrun; to the whole group, the loader's processes included."""
    flags = [*RUN, "--steps", 4000, "--val-every", 5000, "--workers", workers, "--out", tmp_path]
    process = script("pretrain.py", *flags, popen=True, ranks=ranks)
    while not losses(tmp_path):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    (os.killpg if workers else os.kill)(process.pid, sent)
    said, _ = process.communicate(timeout=60)
    assert "--resume goes on" in said
    if ranks == 1:  # torchrun itself reports the signal, with a traceback of its own
        assert process.returncode == 0 and "Traceback" not in said
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 0 < step < 4000 and f"stopped at step {step} of 4000" in said


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_weights(script, tmp_path):
    flags = [*RUN, "--steps", 1500, "--val-every", 100, "--save-every", 0.01, "--workers", 2]
    script("pretrain.py", *flags, "--out", tmp_path / "whole")
    draw, steps, killed = random.Random(0), set(), tmp_path / "killed"
    for kill in range(20):
        process = script("pretrain.py", *flags, "--resume", "--out", killed, popen=True)
        time.sleep(draw.uniform(3, 9))
        assert process.poll() is None, f"ended after {kill} kills\n{process.stdout.read()}"
        process.kill()
        process.wait()
        if (killed / "ckpt.pt").exists():
            steps.add(load_checkpoint(killed / "ckpt.pt")["step"])
    script("pretrain.py", "--resume", "--out", killed)
    assert len(steps) > 5 and same(weights(tmp_path / "whole/ckpt.pt"), weights(killed / "ckpt.pt"))


# ---- what goes in ----


def test_prefixes_are_uniform_and_the_same_for_a_seed(args):
    drawn = np.concatenate([pretrain.draw_prefixes(s, 64, args) for s in range(2000)])
    counts = np.bincount(drawn, minlength=64)
    assert len(counts) == 64 and abs(counts - 125).max() < 60
    assert np.array_equal(*(pretrain.draw_prefixes(7, 64, args) for _ in range(2)))
    args.attention = "causal"
    assert not pretrain.draw_prefixes(0, 64, args).any()
    args.attention = "prefix"


# ---- evaluation ----


@pytest.fixture(scope="module")
def evaluated(args, corpus):
    """A machine, a fresh model and the validation batches, twice."""
    machine = setup(args)
    model = Model(Config(**SIZES["nano"]))
    data = Sequences(corpus, "val", 32, 4, 2)
    return machine, model, *(pretrain.validation_set(data, 64, args, machine) for _ in range(2))


def test_trivial_errors_against_loops(evaluated):
    machine, model, batches, _ = evaluated
    trivial = pretrain.trivial_errors(model, batches, 64, machine)
    for kind in range(3):
        pairs = []
        for b in batches:
            t = standardise(model.sequence(b["volume"], b["ranges"])[0])[0].double()
            for i in np.flatnonzero(b["kind"] == kind):
                pairs.append((t[i], int(b["prefix"][i])))
        n = sum((64 - p) * 512 for _, p in pairs)
        best = {}
        for d in range(1, 64):
            now = torch.cat([t[max(p, d) :].flatten() for t, p in pairs])
            earlier = torch.cat([t[max(p, d) - d : 64 - d].flatten() for t, p in pairs])
            alone = sum(t[p : max(p, d)].square().sum() for t, p in pairs)
            gain = (now @ earlier / (earlier @ earlier).clamp(min=1e-12)).clamp(min=0)
            best[d] = ((now - gain * earlier).square().sum() + alone).item() / n
        mine = trivial[KINDS[kind]]
        assert mine["count"].tolist() == [sum(p <= i for _, p in pairs) for i in range(64)]
        mean, copy = (np.average(mine[k], weights=mine["count"]) for k in ("mean", "copy"))
        squares = sum(t[p:].square().sum().item() for t, p in pairs)
        assert mean == pytest.approx(squares / n, rel=1e-6)
        assert copy == pytest.approx(min(best.values()), rel=1e-5) and copy < mean <= 1
        assert best[mine["distance"]] == pytest.approx(copy, rel=1e-5)


def test_a_rank_without_a_validation_sequence_takes_part(evaluated):
    machine, model, *_ = evaluated
    assert pretrain.trivial_errors(model, [], 64, machine) == {}
    assert pretrain.evaluate(model, [], machine) == ({}, {})


def test_evaluation_is_the_loss_of_each_kind(evaluated):
    machine, model, batches, again = evaluated
    by_kind, _ = pretrain.evaluate(model, batches, machine)
    assert by_kind == pretrain.evaluate(model, again, machine)[0]  # the same prefixes
    whole = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    for kind, name in enumerate(KINDS):
        b = {k: v[whole["kind"] == kind] for k, v in whole.items()}
        with torch.no_grad():
            loss, _ = model(b["volume"], b["prefix"], b["ranges"])
        assert by_kind[name] == pytest.approx(loss.item(), rel=1e-5)


# ---- the run as a whole ----


def test_the_demo_learns_and_its_checkpoint_loads(script, tmp_path):
    out = tmp_path / "run"
    flags = ["--volume", 32, "--stride", 2, "--steps", 40, "--val-every", 40, "--val-samples", 8]
    done = script("pretrain.py", *flags, "--out", out)
    log = read_log(out / "log.jsonl")
    before, after = [row for row in log if "val_loss" in row]
    assert (before["step"], after["step"]) == (0, 40)
    assert all(after[f"val_{k}"] < before[f"val_{k}"] for k in KINDS)
    row = next(row for row in log if "loss" in row)
    assert {"step", "loss", "lr", "samples_per_s", "of_matmul_rate", "grad_norm"} <= row.keys()
    assert 0 < row["of_matmul_rate"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 40
    assert all(metrics["earlier_patch"][k] < metrics["patch_mean"][k] <= 1 for k in KINDS)
    for f in ("curves.png", "samples.png"):
        assert (out / f).read_bytes().startswith(b"\x89PNG")
    assert "no CUDA device" in done.stdout + done.stderr or torch.cuda.is_available()
    model = load_pretrained(out / "best.pt")
    loss, pred = model(torch.rand(2, 32, 32, 32), torch.tensor([0, 63]))
    assert pred.shape == (2, 64, 512) and loss.isfinite()
    warm = ["--steps", 1, "--init", out / "ckpt.pt", "--out", tmp_path / "warm"]
    script("pretrain.py", *flags, *warm)
    assert validations(tmp_path / "warm")[0] < before["val_loss"] - 0.05  # what the first learned


def test_a_new_run_overwrites_nothing_and_other_orders_run(script, tmp_path):
    flags = [*SMALL, "--steps", 2, "--out", tmp_path]
    script("pretrain.py", *flags)
    before = weights(tmp_path / "ckpt.pt")
    other = ["--order", "image", "--attention", "causal", "--stride", 8, "--mix", "spatial=1"]
    done = script("pretrain.py", *flags, *other, "--volume", 64, "--batch", 2)
    assert same(before, weights(tmp_path / "earlier-1/ckpt.pt"))
    assert "earlier-1" in done.stdout + done.stderr
    assert load_pretrained(tmp_path / "ckpt.pt").config.order == "image"


@pytest.mark.slow
def test_triton_trains_the_same_model(script, tmp_path):
    """A step with the kernels, interpreted, from int16 and sub-images that end within a patch."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has its own test of a step")
    flags = ["--size", "nano", "--dtype", "fp32", "--steps", 1, "--volume", 16, "--stride", 1]
    flags += ["--batch", 1, "--val-samples", 1]
    rows = []
    for kernels in ("torch", "triton"):
        out = tmp_path / kernels
        done = script("pretrain.py", *flags, "--kernels", kernels, "--out", out)
        assert f"--kernels {kernels}: {kernels} (asked for" in done.stdout
        values = [
            [row.get(k, 0) for k in ("loss", "val_loss")] for row in read_log(out / "log.jsonl")
        ]
        rows.append(np.array(values))
    assert rows[0].shape == (3, 2) and np.allclose(*rows, rtol=1e-4)


def test_bench_prints_what_it_should(script):
    flags = "--size nano --volume 32 --patch 4 --micro 1 --bench"
    done = script("pretrain.py", *flags.split())
    for words in ("1 x 32³, 512 tokens", "matrix rate", "model FLOP", "peak memory", "tokens/s"):
        assert re.search(words, done.stdout)


def test_a_plan_counts_what_a_run_would_take(args, capsys):
    args.plan, args.size, args.volume, args.batch, args.steps = "8xH100", "base", 128, 288, 1000
    args.micro = None
    model = Model(Config(**SIZES["base"]))
    pretrain.plan(model, 512, args, setup(args))
    said = capsys.readouterr().out
    # 288 sequences at 40 % of 8 x 989 TFLOP/s; 36 in a pass; 4.2 MB a sequence
    seconds = 288 * model.flops([128] * 3) / (0.4 * 8 * 989e12)
    assert f"{1000 * seconds / 3600:8.1f} hours" in said and "in passes of 36" in said
    assert f"{2 * 128**3 * 36 / seconds / 1e9:8.1f} GB/s" in said
    # what was counted in Inductor's code: 10.7 GiB kept for the backward pass
    weights = 16 * sum(w.numel() for w in model.parameters())
    assert 10.7 < (pretrain.memory_of(model, 512, args, 72) - weights) / 2**30 < 14
    args.micro = 72
    pretrain.check_memory(model, 512, args, 16 << 30)
    fits, over = (pretrain.memory_of(model, 512, args, micro) for micro in (37, 38))
    assert fits < 8 << 30 < over
    with pytest.raises(BadInput, match="--micro 72: .* 14 GiB, the GPU has 8: --micro 37, or"):
        pretrain.check_memory(model, 512, args, 8 << 30)
    with pytest.raises(BadInput, match="the GPU has 1: --recompute or a smaller --size"):
        pretrain.check_memory(model, 512, args, 1 << 30)
    args.recompute = True
    assert (pretrain.memory_of(model, 512, args, 72) - weights) / 2**30 < 4
    named = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "Tesla T4": None}
    assert {name: data_sheet(name) for name in named} == named
    args.steps, args.scans = None, 2304
    pretrain.plan(model, 512, args, setup(args))  # 50 epochs of 50 crops a scan, by 288
    assert "20,000 steps of 288 sequences" in capsys.readouterr().out
    for wrong in ("H100", "8xV100", "0xH100"):
        args.plan = wrong
        with pytest.raises(BadInput, match=f"--plan {wrong}: a number and a kind"):
            pretrain.plan(model, 512, args, setup(args))


def test_bad_input_gets_one_line(script, phantom_home, tmp_path, monkeypatch):
    monkeypatch.chdir(phantom_home)
    (tmp_path / "cut").mkdir()
    script("pretrain.py", *SMALL, "--steps", 1, "--out", tmp_path / "good")
    whole = (tmp_path / "good/ckpt.pt").read_bytes()
    (tmp_path / "cut/ckpt.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"format": "something else"}, tmp_path / "other.pt")
    good = ["--resume", "--out", tmp_path / "good"]
    for flags, words in (
        (["--resume", "--out", tmp_path / "cut"], "cut short"),
        ([*good, "--seed", 5], "--seed 5: the run to resume has 0"),
        (["--init", tmp_path / "other.pt"], "neither a checkpoint"),
        (["--init", tmp_path / "nothing.pt"], "no such checkpoint"),
        (["--init", tmp_path / "good/ckpt.pt", "--size", "small"], "choose another --size"),
        (["--data", tmp_path], "no corpus there"),
        (["--volume", 60], "60x60x60 is not a multiple of the patch 8"),
        (["--patch", 33], "patch 33: 2 to 32 voxels"),
        (["--scans", 5], "--scans 5: of --plan"),
        (["--scans", -5, "--plan", "8xH100"], "--scans -5: at least 1"),
        (["--stride", 40], "--stride 40"),
        (["--batch", 0], "--batch 0"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--target", "vq", "--tokenizer", tmp_path / "nothing.pt"], "no such checkpoint"),
        (["--tokenizer", "x.pt"], "only --target vq"),
    ):
        size = [] if "--resume" in flags or "--size" in flags else ["--size", "nano"]
        command = ["pretrain.py", "--device", "cpu", *size, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(BadInput, match=re.escape(words)):
            pretrain.main()
    done = script("pretrain.py", "--init", tmp_path / "other.pt", code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.gpu
def test_a_step_on_cuda_is_the_step_on_the_cpu(corpus):
    data = Sequences(corpus, size=32, stride=2)
    batch = default_collate([data[n] for n in range(4)])
    torch.manual_seed(0)
    model = Model(Config(**SIZES["nano"]))
    prefix = torch.tensor([0, 1, 30, 63])
    want, _ = model(batch["volume"], prefix, batch["ranges"])
    got, _ = model.cuda()(batch["volume"].cuda(), prefix.cuda(), batch["ranges"].cuda())
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
