"""The visual tokenizer: its quantiser against numbers worked out by hand, tokenize_vq.py and pretrain.py --target vq as run."""
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain
import tokenize_vq
from common import BadInput, load_checkpoint, place, read_log
from model import (SIZES, Config, Model, Quantiser, Tokenizer, TokenizerConfig, checkpoint_state, load_pretrained, load_tokenizer,
                   tokenizer_state)
from serialize import KINDS, Sequences

TINY = dict(patch=8, codes=16, dim=8, hidden=16, width=16, layers=1)
RUN = ["--size", "nano", "--codes", 32, "--dim", 8, "--hidden", 16, "--width", 16, "--layers", 1, "--volume", 32, "--stride", 2, "--batch", 4,
       "--steps", 6, "--start-patches", 512, "--val-samples", 2, "--val-every", 3, "--save-every", 3, "--log-every", 1, "--workers", 0]
SMALL = ["--size", "nano", "--volume", 32, "--stride", 2, "--batch", 4, "--steps", 4, "--val-samples", 2, "--val-every", 2, "--log-every", 1,
         "--save-every", 2, "--dtype", "fp32", "--workers", 0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(scope="module")
def call(phantom_home):
    """call(module, "--steps", 3, …): its main() in the phantom's folder, in this process; what a clock would say is left out."""
    def run(module, *flags):
        with pytest.MonkeyPatch.context() as m:
            m.chdir(phantom_home)
            m.setattr(module, "StopRequest", lambda: type("Never", (), dict(agreed=lambda self, where: False))())
            m.setattr(pretrain, "matmul_rate", lambda *_: 1e12)
            m.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
            module.main()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, call):
    """The folder of one whole small run of tokenize_vq.py."""
    out = tmp_path_factory.mktemp("vq")
    call(tokenize_vq, *RUN, "--out", out)
    return out


# ---------------------------------------------------------------- quantiser


def test_the_gradient_goes_straight_through():
    torch.manual_seed(0)
    q, z = Quantiser(5, 2, 4), unit(7, 2, 4).requires_grad_()
    code, index, commitment = q(z)
    for i in range(7):
        for g in range(2):
            best = max(range(5), key=lambda k: (z[i, g] @ q.codes[g, k]).item())
            assert index[i, g] == best and torch.allclose(code[i, g], q.codes[g, best], atol=1e-6)
    weight = torch.randn(7, 2, 4)
    (code * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    z.grad = None
    commitment.backward()
    assert torch.allclose(z.grad, 2 * (z - q.look_up(index)).detach() / 14, atol=1e-6) and not q.codes.requires_grad


def test_moving_averages_against_a_step_by_hand():
    q = Quantiser(2, 1, 2)
    q.codes.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    q.sums.copy_(q.codes), q.uses.fill_(1)
    z = torch.tensor([[0.8, 0.6], [0.6, -0.8], [1.0, 0.0], [0.0, 1.0]])[:, None]       # three go to code 0, one to code 1
    index = q.nearest(z)
    assert index.flatten().tolist() == [0, 0, 0, 1]
    n, sums = q.totals(z, index)
    assert n.tolist() == [[3, 1]] and torch.allclose(sums, torch.tensor([[[2.4, -0.2], [0.0, 1.0]]]))
    q.update(n, sums, z[:1], decay=0.75, least=0.1)
    assert torch.allclose(q.uses, torch.tensor([[0.75 + 0.25 * 3 / 2, 0.75 + 0.25 * 1 / 2]]))
    moved = torch.tensor([[0.75 + 0.25 * 1.2, -0.25 * 0.1], [0.0, 0.75 + 0.25 * 0.5]])
    assert torch.allclose(q.sums[0], moved) and torch.allclose(q.codes[0], moved / moved.norm(dim=1, keepdim=True))


def test_dead_codes_are_revived_in_turn_and_no_others():
    torch.manual_seed(1)
    q = Quantiser(6, 1, 4)
    q.uses.copy_(torch.tensor([[1.0, 0.05, 1.0, 0.02, 1.0, 0.01]]))
    before, fresh = q.codes.clone(), unit(2, 1, 4)
    n = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    q.update(n, q.sums * n[..., None], fresh, decay=0.99, least=0.1)
    assert torch.allclose(q.codes[0, 1], fresh[0, 0]) and torch.allclose(q.codes[0, 3], fresh[1, 0])
    assert q.uses[0, 1] == q.uses[0, 3] == 1 and q.uses[0, 5] < 0.1                    # the third dead one waits for the next step
    assert torch.allclose(q.codes[0, [0, 2, 4, 5]], before[0, [0, 2, 4, 5]], atol=1e-6)


def test_candidates_are_what_the_codes_miss():
    torch.manual_seed(2)
    q = Quantiser(4, 1, 8)
    held, missed = q.codes[0, [0] * 60][:, None], unit(4, 1, 8)                        # sixty copies of a code, four others
    z = torch.cat([held, missed])
    draw = lambda seed: q.candidates(z, q.nearest(z), 4, torch.Generator().manual_seed(seed))  # noqa: E731
    found = draw(0)
    assert all(any(torch.equal(f, m) for m in missed) for f in found) and len({tuple(f.flatten().tolist()) for f in found}) == 4
    assert torch.equal(found, draw(0))


def test_a_codebook_that_starts_from_data_is_used_whole():
    torch.manual_seed(3)
    centres = torch.randn(32, 512) * 0.2
    patches = (centres[torch.randint(32, (2000,))] + 0.02 * torch.randn(2000, 512) + 0.5).clamp(0, 1)
    patches[:600] = 0                                                                  # background: all one value
    tokenizer = Tokenizer(TokenizerConfig(**{**TINY, "codes": 32, "groups": 2}))
    tokenizer.start(patches, torch.Generator().manual_seed(0))
    index = tokenizer.quantiser.nearest(tokenizer.latents(patches[None]))
    for g in range(2):
        assert len(index[:, g].unique()) == 32 and len(index[:600, g].unique()) == 1
    out = tokenizer.reconstruct(tokenizer.quantiser.look_up(index), (20, 10, 10))[0]
    assert (out - patches).square().mean() < 0.25 * patches.var(0).mean()
    with pytest.raises(BadInput, match="8 patches cannot start 32 codes"):
        tokenizer.quantiser.start(unit(8, 2, 8), torch.Generator())


def test_two_ranks_that_see_half_each_hold_the_codes_of_one_that_sees_all(tmp_path):
    """gloo, two processes: bitwise the same codebook on both after steps with revivals."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    a, b = (load_checkpoint(tmp_path / f"{r}.pt") for r in range(2))
    assert same(a["model"], b["model"]) and a["revived"] == b["revived"] > 0
    q, args = Quantiser(16, 2, 4), tokenize_vq.parser().parse_args(["--revive", "0"])
    q.load_state_dict(a["start"])
    z = torch.cat([a["z"], b["z"]])
    tokenize_vq.move_codes(q, z, q.nearest(z), 0, args, place("cpu", "fp32"))
    assert torch.allclose(q.codes, a["first"], atol=1e-5)


def _rank(rank, folder):
    import torch.distributed as dist
    from common import Place, save_checkpoint
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    where = Place(rank, 2, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    q, args = Quantiser(16, 2, 4), tokenize_vq.parser().parse_args(["--revive", "0"])
    start = {k: v.clone() for k, v in q.state_dict().items()}
    torch.manual_seed(1 + rank)
    z = unit(50, 2, 4)
    tokenize_vq.move_codes(q, z, q.nearest(z), 0, args, where)
    first, args.revive, args.decay = q.codes.clone(), 0.5, 0.5
    revived = 0
    for step in range(1, 6):
        part = unit(50, 2, 4)
        index, before = q.nearest(part), q.uses.clone()
        tokenize_vq.move_codes(q, part, index, step, args, where)
        revived += int(((q.uses == 1) & (before != 1)).sum())
    save_checkpoint(f"{folder}/{rank}.pt", format="test", model=q.state_dict(), start=start, z=z, first=first, revived=revived)
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------- tokenizer


def test_codes_survive_save_and_load_and_are_of_their_patch_alone(tmp_path):
    torch.manual_seed(4)
    tokenizer, volume = Tokenizer(TokenizerConfig(**TINY, groups=2)), torch.rand(2, 16, 16, 24)
    codes = tokenizer.encode(volume)
    torch.save(tokenizer_state(tokenizer), tmp_path / "t.pt")
    again = load_tokenizer(tmp_path / "t.pt", patch=8)
    assert codes.shape == (2, 12, 2) and torch.equal(again.encode(volume), codes)
    assert torch.equal(again.decode(codes, (2, 2, 3)), tokenizer.decode(codes, (2, 2, 3)))
    assert not any(w.requires_grad for w in again.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.encode(volume), codes)
    changed = volume.clone()
    changed[:, :8, :8, :8] = torch.rand(2, 8, 8, 8)
    assert torch.equal(tokenizer.encode(changed)[:, 1:], codes[:, 1:])
    with pytest.raises(BadInput, match=re.escape("patches of 8³ voxels and the model's are of 16³; make one with tokenize_vq.py --patch 16")):
        load_tokenizer(tmp_path / "t.pt", patch=16)
    for change, words in ((dict(codes=70_000), "70000 codes"), (dict(groups=0), "0 groups")):
        with pytest.raises(BadInput, match=words):
            TokenizerConfig(**{**TINY, **change})


def test_ssim_against_loops():
    torch.manual_seed(5)
    a = torch.rand(1, 8, 8, 16)
    b = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    values = []
    for s in range(2):
        for x, y, z in np.ndindex(2, 2, 2):
            p, q = (v[0, x:x + 7, y:y + 7, 8 * s + z:8 * s + z + 7].flatten().double() for v in (a, b))
            cov = ((p - p.mean()) * (q - q.mean())).sum() / 342
            values.append((2 * p.mean() * q.mean() + 1e-4) * (2 * cov + 9e-4)
                          / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var() + q.var() + 9e-4)))
    assert tokenize_vq.ssim(a, b, 2).item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)
    assert tokenize_vq.ssim(a, a, 2).item() == pytest.approx(1)


def test_the_rivals_are_at_least_as_good_as_they_must_be():
    torch.manual_seed(6)
    args = tokenize_vq.parser().parse_args(["--codes", "16"])
    basis = torch.linalg.qr(torch.randn(27, 27)).Q
    x = torch.randn(4000, 27) * torch.tensor([4.0, 2.0, 0.25] + [0.01] * 24) @ basis
    rebuild, spent = tokenize_vq.pca_rival(x, args)
    assert spent == [3, 1]  # Gaussians of deviation 4 and 2: 3 bits leave 16 · 0.0345, 1 bit 4 · 0.3634 of their variances
    want = 16 * 0.03454 + 4 * 0.3634 + 0.0625
    assert (rebuild(x[None]) - x).square().sum(-1).mean().item() == pytest.approx(want, rel=0.1)
    centres = torch.randn(16, 27)
    y = centres[torch.randint(16, (4000,))] + 0.01 * torch.randn(4000, 27)
    error = (tokenize_vq.kmeans_rival(y, args)(y[None])[0] - y).square().sum(-1)
    assert error.quantile(0.5) < 0.01 and error.mean() < 0.2 * y.var(0).sum()  # Lloyd may leave two clusters with one centre


# ---------------------------------------------------------------- predicting codes


def test_the_loss_of_codes_is_their_cross_entropy_after_the_prefix():
    torch.manual_seed(7)
    volume, prefix, codes = torch.rand(2, 8, 8, 16), torch.tensor([0, 5]), torch.randint(9, (2, 16, 2))
    tiny = dict(width=48, layers=2, heads=2, patch=4, images=2, codes=9, groups=2, order="image")
    vq = Model(Config(**tiny, target="vq"))
    loss, scores = vq(volume, prefix, codes=codes)
    ordered = codes[:, vq.sequence(volume)[2]]
    nats = [-scores[b, i, g].log_softmax(-1)[ordered[b, i, g]] for b in range(2) for i in range(prefix[b], 16) for g in range(2)]
    assert scores.shape == (2, 16, 2, 9) and loss.item() == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)
    per_patch, _ = vq(volume, prefix, codes=codes, per_patch=True)
    assert per_patch.shape == (2, 16) and per_patch[1, :5].abs().sum() == 0
    both = Model(Config(**tiny, target="both"))
    losses, (pixels, scores) = both(volume, prefix, codes=codes)
    pixel = Model(Config(**{**tiny, "target": "pixel", "codes": 0, "groups": 1}))
    pixel.load_state_dict({k: v[:64] if k.startswith("head") else v for k, v in both.state_dict().items()})
    want, pred = pixel(volume, prefix)
    assert torch.allclose(losses[0], want) and torch.allclose(pixels, pred, atol=1e-6) and losses.shape == (2,)
    with pytest.raises(ValueError, match="needs codes="):
        vq(volume, prefix)
    with pytest.raises(BadInput, match="needs the number of codes"):
        Config(target="vq")


def test_entropy_and_accuracy_against_loops(corpus):
    torch.manual_seed(8)
    where, data = place("cpu", "fp32"), Sequences(corpus, "val", 32, 4, 2)
    args = pretrain.parser().parse_args([str(f) for f in SMALL])
    pretrain.settle(args, where)
    tokenizer = Tokenizer(TokenizerConfig(**TINY))
    model = Model(Config(**SIZES["nano"], target="vq", codes=16))
    batches = pretrain.validation_set(data, 64, args, where)
    found, entropy = pretrain.evaluate_codes(model, tokenizer, batches, where), pretrain.unigram_entropy(model, tokenizer, batches, where)
    for kind in range(3):
        nats, first, five, true = [], [], [], []
        for b in batches:
            for i in (b["kind"] == kind).nonzero().flatten().tolist():
                codes = tokenizer.encode(b["volume"][i:i + 1], b["window"][i:i + 1])
                _, scores = model(b["volume"][i:i + 1], b["prefix"][i:i + 1], b["window"][i:i + 1], codes=codes)
                for at in range(int(b["prefix"][i]), 64):
                    s, c = scores[0, at, 0], codes[0, at, 0].item()
                    nats.append(-s.log_softmax(-1)[c].item()), true.append(c)
                    first.append(s.argmax().item() == c), five.append(c in s.argsort(descending=True)[:5].tolist())
        share = np.bincount(true) / len(true)
        share = share[share > 0]
        f = found[KINDS[kind]]
        assert entropy[KINDS[kind]] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)
        assert (f["nats"], f["top1"], f["top5"]) == pytest.approx((np.mean(nats), np.mean(first), np.mean(five)), rel=1e-4)


# ---------------------------------------------------------------- the scripts


def test_a_run_leaves_what_it_should(trained):
    for f in ("curves.png", "samples.png", "codebook.png"):
        assert (trained / f).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["step"] == 6 and metrics["bits"] == 5 and metrics["codes"]["used"] > 0.8
    for name in ("codes", "k-means", "PCA"):
        assert all(5 < metrics[name]["psnr"][k] < 40 and 0 < metrics[name]["ssim"][k] < 1 for k in KINDS)
    val = [r for r in read_log(trained / "log.jsonl") if "val_mse" in r]
    assert [r["step"] for r in val] == [0, 3, 6] and 1 < val[-1]["perplexity"] <= 32
    assert metrics["codes"]["mse"] == pytest.approx(val[-1]["val_mse"], rel=1e-6)
    assert json.loads((trained / "args.json").read_text())["codes"] == 32
    state = load_checkpoint(trained / "ckpt.pt")
    assert state["step"] == 6 and load_tokenizer(trained / "best.pt").config.codes == 32


def test_six_steps_are_three_and_three(call, trained, tmp_path):
    call(tokenize_vq, *RUN, "--out", tmp_path, "--stop-after", 3)
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    call(tokenize_vq, "--resume", "--out", tmp_path)
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (trained, tmp_path))
    assert same(a["model"], b["model"]) and a["best"] == b["best"]
    for k in a["optimiser"]["state"]:
        assert same(a["optimiser"]["state"][k], b["optimiser"]["state"][k])
    assert (trained / "metrics.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()


def test_codes_of_a_corpus(call, trained, corpus):
    call(tokenize_vq, "--encode", "--data", corpus, "--out", trained)
    codes = np.load(trained / "codes.npy", mmap_mode="r", allow_pickle=False)
    rows = [json.loads(line) for line in (trained / "codes.jsonl").read_text().splitlines()]
    assert codes.dtype == np.uint16 and len(codes) == sum(int(np.prod(r["grid"])) for r in rows) and codes.max() < 32
    row, tokenizer = rows[3], load_tokenizer(trained / "best.pt")
    scan = torch.from_numpy(np.load(corpus / row["file"]).astype(np.float32))
    low, high = row["window"]
    whole = F.pad(((scan - low) / (high - low)).clamp(0, 1)[None, None],
                  [s for g, n in zip(row["grid"][::-1], scan.shape[::-1]) for s in (0, 8 * g - n)], mode="replicate")[0]
    got = codes[row["first"]:row["first"] + int(np.prod(row["grid"]))].astype(np.int64)
    assert (torch.from_numpy(got) == tokenizer.encode(whole)[0]).float().mean() > 0.999


def test_two_ranks_learn_one_tokenizer(script, trained, tmp_path):
    script("tokenize_vq.py", *RUN, "--out", tmp_path, ranks=2)
    a, b = ({r["step"]: r["loss"] for r in read_log(p / "log.jsonl") if "loss" in r} for p in (trained, tmp_path))
    assert len(a) == 6 and a == pytest.approx(b, rel=2e-2)


def test_pretraining_on_codes_resumes_and_serves_as_encoder(call, trained, tmp_path, capsys):
    flags = [*SMALL, "--target", "vq", "--tokenizer", trained / "ckpt.pt"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    call(pretrain, *flags, "--out", whole)
    assert "unigram entropy" in capsys.readouterr().out
    for more in ([*flags, "--stop-after", 2], ["--resume"]):
        call(pretrain, *more, "--out", half)
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (whole, half))
    assert same(a["model"], b["model"]) and a["best"] == b["best"]
    assert same(a["tokenizer"]["model"], load_checkpoint(trained / "ckpt.pt")["model"])
    val = [r for r in read_log(whole / "log.jsonl") if "val_loss" in r]
    assert all(val[-1][f"nats_{k}"] < val[0][f"nats_{k}"] and 0 <= val[-1][f"top1_{k}"] <= val[-1][f"top5_{k}"] <= 1 for k in KINDS)
    model = load_pretrained(whole / "best.pt")
    assert model.config.target == "vq" and model.encode(torch.rand(1, 32, 32, 32))[0].shape == (1, 64, 192)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["unigram_entropy"].keys() == metrics["val"].keys() and (whole / "samples.png").stat().st_size > 0

    # a head for other codes is not kept, one for the same is
    other = load_checkpoint(trained / "ckpt.pt")
    other["model"]["quantiser.codes"] = other["model"]["quantiser.codes"].flip(1)
    torch.save(other, tmp_path / "other.pt")
    for tokenizer, anew in ((tmp_path / "other.pt", True), (trained / "ckpt.pt", False)):
        call(pretrain, *SMALL, "--steps", 1, "--target", "vq", "--tokenizer", tokenizer, "--init", whole / "ckpt.pt", "--out", tmp_path / f"from-{anew}")
        assert ("the head starts anew" in capsys.readouterr().out) == anew

    call(pretrain, *SMALL, "--steps", 1, "--target", "both", "--tokenizer", trained / "ckpt.pt", "--init", whole / "ckpt.pt", "--out", tmp_path / "both")
    assert "pixels_spatial" in read_log(tmp_path / "both/log.jsonl")[-1]
    for flags, words in ((["--target", "vq"], "make it with python tokenize_vq.py --patch 8"),
                         (["--tokenizer", "x.pt"], "--tokenizer x.pt: only --target vq and both"),
                         (["--target", "vq", "--tokenizer", whole / "ckpt.pt"], "'ar3d-vq-1' is needed here"),
                         (["--target", "vq", "--size", "base", "--tokenizer", trained / "ckpt.pt"], "the model's are of 16³")):
        with pytest.raises(BadInput, match=re.escape(words)):
            call(pretrain, *([] if "base" in flags else ["--size", "nano"]), *flags)


def test_an_old_checkpoint_is_one_of_pixels(tmp_path):
    model = Model(Config(width=48, layers=2, heads=2, patch=4))
    state = checkpoint_state(model)
    for k in ("target", "codes", "groups"):
        del state["config"][k]
    torch.save(state, tmp_path / "old.pt")
    assert load_pretrained(tmp_path / "old.pt").config == model.config


def test_bench_prints_the_share_of_finding_codes(call, capsys):
    call(pretrain, "--size", "nano", "--volume", 32, "--micro", 1, "--target", "vq", "--bench")
    assert re.search(r"finding codes +[\d.]+ ms .*% of the step", capsys.readouterr().out)


def test_bad_input_gets_one_line(call, tmp_path):
    for flags, words in ((["--codes", 1], "1 codes"), (["--volume", 60], "60x60x60 is not a multiple of the patch 8"),
                         (["--start-patches", 100], "fewer than --codes 512"), (["--decay", 1], "--decay 1.0: less than 1"),
                         (["--encode", "--out", tmp_path], "no such checkpoint"), (["--data", tmp_path], "no corpus there")):
        with pytest.raises(BadInput, match=re.escape(words)):
            call(tokenize_vq, "--size", "nano", *flags)
