"""The visual tokenizer: its parts against numbers worked out by hand, the script and its user."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter

import pretrain
import tokenize_vq
from common import BadInput, Machine, load_checkpoint, read_log, save_checkpoint
from model import Config, Model, checkpoint_state, patchify, unpatchify
from tokenize_vq import TOKENIZER, Quantiser, Tokenizer, TokenizerConfig, load_tokenizer

TINY = {"patch": 8, "codes": 16, "dim": 8, "hidden": 16, "width": 16, "layers": 1}
SMALL = "--size nano --volume 32 --stride 2 --batch 4 --val-samples 2 --log-every 1 --device cpu"
SMALL = [*SMALL.split(), "--dtype", "fp32"]
RUN = [*SMALL, "--codes", 32, "--steps", 6, "--val-every", 3]
ALONE = Machine(0, 1, torch.device("cpu"), torch.float32)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def run(module, home, *flags):
    """The script's main() in the folder `home`, in this process, with a smaller network."""
    small = {**tokenize_vq.RECIPES["nano"], "hidden": 16, "width": 16, "start_patches": 1024}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(home)
        m.setitem(tokenize_vq.RECIPES, "nano", small)
        m.setattr(pretrain, "matmul_rate", lambda *_: 1e12)
        m.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()


@pytest.fixture(scope="module")
def trained(phantom_home, tmp_path_factory):
    """The folder of one whole small run."""
    out = tmp_path_factory.mktemp("vq")
    run(tokenize_vq, phantom_home, *RUN, "--out", out)
    return out


# ---- quantiser -------------------------------------------------------------------------------


def test_the_gradient_goes_straight_through():
    torch.manual_seed(0)
    q, z = Quantiser(5, 4), unit(7, 4).requires_grad_()
    code, index, commitment = q(z)
    angles = torch.acos(z @ q.codes.T)
    assert index.equal(angles.argmin(1)) and torch.allclose(code, q.codes[index], atol=1e-6)
    weight = torch.randn(7, 4)
    (code * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    z.grad = None
    commitment.backward()
    assert torch.allclose(z.grad, 2 * (z - q.codes[index]).detach() / 7, atol=1e-6)


def test_moving_averages_against_a_step_by_hand():
    q = Quantiser(2, 2)
    q.codes.copy_(torch.eye(2))
    q.averages.copy_(torch.tensor([[1.0, 0, 1], [0, 1, 1]]))
    z = torch.tensor([[0.8, 0.6], [0.6, -0.8], [1.0, 0.0], [0.0, 1.0]])
    index = q.nearest(z)
    assert index.tolist() == [0, 0, 0, 1]
    q.move(z, index, np.random.default_rng(0), ALONE, most=1, decay=0.75)
    # a quarter of (2.4, −0.2) of three and (0, 1) of one, halved: a code has 1 on average
    want = torch.tensor([[1.05, -0.025, 1.125], [0, 0.875, 0.875]])
    assert torch.allclose(q.averages, want)
    assert torch.allclose(q.codes, F.normalize(want[:, :2]))


def test_dead_codes_start_anew_at_what_the_codes_miss():
    torch.manual_seed(2)
    q, z = Quantiser(6, 8), unit(2, 8)
    live, dead = [0, 2, 4], [1, 3, 5]
    q.averages[dead, -1] = 0.05
    before, missed = q.codes.clone(), z
    z = torch.cat([q.codes[live].repeat(20, 1), missed])  # sixty that the codes hold, two others
    q.move(z, q.nearest(z), np.random.default_rng(0), ALONE, most=2, decay=0.99)
    assert torch.cdist(missed, q.codes[[1, 3]]).min(1).values.max() < 1e-6
    assert (q.averages[[1, 3], -1] == 1).all()
    assert q.averages[5, -1] < 0.1  # the third dead one waits for the next step
    rest = [*live, 5]
    assert torch.allclose(q.codes[rest], before[rest], atol=0.01)


def test_a_codebook_that_starts_from_data_is_used_whole():
    torch.manual_seed(3)
    centres = torch.randn(32, 512) * 0.2
    patches = centres[torch.randint(32, (2000,))] + 0.02 * torch.randn(2000, 512) + 0.5
    patches = patches.clamp(0, 1)
    patches[::3] = 0  # background: all one value
    tokenizer = Tokenizer(TokenizerConfig(**{**TINY, "codes": 32}))
    tokenizer.start(patches, 0, ALONE)
    index = tokenizer.quantiser.nearest(tokenizer.latents(patches))
    assert len(index.unique()) == 32 and len(index[::3].unique()) == 1
    rebuilt = tokenizer.reconstruct(tokenizer.quantiser.codes[index][None], (20, 10, 10))[0]
    assert (rebuilt - patches).square().mean() < 0.5 * patches.var(0).mean()


# ---- tokenizer, scores -----------------------------------------------------------------------


def test_codes_survive_save_and_load_and_are_of_their_patch_alone(tmp_path):
    torch.manual_seed(4)
    tokenizer, volume = Tokenizer(TokenizerConfig(**TINY)), torch.rand(2, 16, 16, 24)
    codes = tokenizer.encode(volume)
    save_checkpoint(tmp_path / "t.pt", **checkpoint_state(tokenizer, TOKENIZER))
    again = load_tokenizer(tmp_path / "t.pt", patch=8)
    assert codes.shape == (2, 12) and torch.equal(again.encode(volume), codes)
    assert torch.equal(again.decode(codes, (2, 2, 3)), tokenizer.rebuild(volume)[0])
    assert not any(w.requires_grad for w in again.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.encode(volume), codes)
    ranges = torch.tensor([-5.0, 5]).expand(2, 4, 2)
    assert torch.equal(again.encode(10 * volume - 5, ranges), codes)
    changed = volume.clone()
    changed[:, :8, :8, :8] = torch.rand(2, 8, 8, 8)
    assert torch.equal(tokenizer.encode(changed)[:, 1:], codes[:, 1:])
    words = (
        "patches of 8³ voxels and the model's are of 16³; make one with tokenize_vq.py --patch 16"
    )
    with pytest.raises(BadInput, match=re.escape(words)):
        load_tokenizer(tmp_path / "t.pt", patch=16)


def test_ssim_of_each_sub_image_against_filters():
    torch.manual_seed(5)
    a = torch.rand(1, 8, 8, 16).double()
    b = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    values = []
    for p, q in ((a[0, ..., :8], b[0, ..., :8]), (a[0, ..., 8:], b[0, ..., 8:])):
        maps = [uniform_filter(v, 7)[3:-3, 3:-3, 3:-3] for v in (p, q, p * p, q * q, p * q)]
        m, n, mm, nn, mn = maps
        vm, vn, cov = (343 / 342 * v for v in (mm - m * m, nn - n * n, mn - m * n))
        above = (2 * m * n + 1e-4) * (2 * cov + 9e-4)
        values.append(above / (m**2 + n**2 + 1e-4) / (vm + vn + 9e-4))
    assert tokenize_vq.ssim(a, b, 2).item() == pytest.approx(np.mean(values))


def test_scores_and_k_means_against_loops():
    torch.manual_seed(6)
    args = tokenize_vq.parser().parse_args(["--codes", "16", "--patch", "4"])
    centres = torch.rand(16, 64)
    centres[:4] = centres[:4, :1]  # patches of one value
    patches = centres[torch.randint(16, (4, 64))] + 0.01 * torch.rand(4, 64, 1)
    rebuild = tokenize_vq.kmeans(patches.flatten(0, 1), args, ALONE)
    volume = unpatchify(patches, (4, 4, 4))
    rebuilt, codes = rebuild(volume)
    each = (patchify(rebuilt, 4) - patches).square().mean(-1)
    assert each.median() < 1e-3  # Lloyd may leave two clusters with one centre
    batch = {"volume": volume, "ranges": torch.tensor([0.0, 1]).expand(4, 4, 2)}
    batch["kind"] = torch.tensor([0, 2, 0, 2])
    scores = tokenize_vq.evaluate(rebuild, [batch], args, ALONE)
    assert "psnr_contrast" not in scores and scores["codes_used"] == len(codes.unique())
    assert scores["psnr_semantic"] == pytest.approx(-10 * each[1::2].mean().log10().item())
    assert scores["val_mse"] == pytest.approx(each.mean().item(), rel=1e-5)
    varied = codes[patches.std(-1) > 1e-3]
    for name, chosen in (("perplexity", codes.flatten()), ("perplexity_varied", varied)):
        share = np.bincount(chosen) / len(chosen)
        want = 2 ** -sum(p * np.log2(p) for p in share if p)
        assert scores[name] == pytest.approx(want, rel=1e-4)


# ---- the script ------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(trained):
    for f in ("curves.png", "samples.png", "codebook.png"):
        assert (trained / f).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["step"] == 6 and metrics["bits"] == 5 and metrics["codes"]["codes_used"] > 24
    assert 5 < metrics["k-means"]["psnr_semantic"] < 40
    rows = read_log(trained / "log.jsonl")
    assert [r["step"] for r in rows if "commitment" in r] == [1, 2, 3, 4, 5, 6]
    val = {r["step"]: r["val_mse"] for r in rows if "val_mse" in r}
    assert [*val] == [0, 3, 6] and metrics["codes"]["val_mse"] == val[6]
    assert load_checkpoint(trained / "ckpt.pt")["best"] == min(val.values())
    assert load_tokenizer(trained / "best.pt").config.codes == 32


def same_runs(a, b):
    a, b = load_checkpoint(a / "ckpt.pt"), load_checkpoint(b / "ckpt.pt")
    moments = [state["optimiser"]["state"] for state in (a, b)]
    assert same(a["model"], b["model"]) and a["best"] == b["best"] and a["step"] == b["step"] == 6
    assert all(same(moments[0][k], moments[1][k]) for k in moments[0])


def test_six_steps_are_three_and_three(phantom_home, trained, tmp_path):
    run(tokenize_vq, phantom_home, *RUN, "--out", tmp_path, "--stop-after", 3)
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    run(tokenize_vq, phantom_home, "--resume", "--out", tmp_path)
    same_runs(trained, tmp_path)
    assert (trained / "metrics.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()


def test_two_ranks_learn_one_tokenizer(phantom_home, trained, tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path, phantom_home), nprocs=2)
    a, b = (load_checkpoint(tmp_path / f"{rank}.pt") for rank in range(2))
    assert a["moved"].equal(b["moved"]) and a["revived"].equal(b["revived"])
    assert same(a["trained"], b["trained"])
    q = a_quantiser()  # of one rank that sees all
    z = torch.cat([a["z"], b["z"]])
    q.move(z, q.nearest(z), np.random.default_rng(0), ALONE, 4, 0.9)
    assert torch.allclose(q.codes, a["moved"], atol=1e-6)
    losses = []
    for out in (trained, tmp_path / "whole"):
        losses.append([r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=2e-2)
    same_runs(tmp_path / "whole", tmp_path / "half")


def a_quantiser():
    torch.manual_seed(0)
    q = Quantiser(16, 4)
    q.averages[:, -1] = 2  # no code is near its end
    return q


def one_of_two(rank, folder, home):
    """A rank's part: a step of the codes, steps that revive some, a whole run and one in halves."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    machine = Machine(rank, 2, torch.device("cpu"), torch.float32)
    q, rng = a_quantiser(), np.random.default_rng(rank)
    torch.manual_seed(1 + rank)
    z = unit(50, 4)
    q.move(z, q.nearest(z), rng, machine, 4, 0.9)
    out = {"format": "test", "z": z, "moved": q.codes.clone()}
    for _ in range(3):
        q.averages[:3, -1] = 0.01
        z = unit(50, 4)
        q.move(z, q.nearest(z), rng, machine, 4, 0.99)
        assert (q.averages[:3, -1] == 1).any()

    def keep(tokenizer, *_):
        out["trained"] = tokenizer.state_dict()

    tokenize_vq.report = keep
    for name, *flags in (["whole"], ["half", "--stop-after", 3], ["half", "--resume"]):
        run(tokenize_vq, home, *RUN, *flags, "--val-every", 6, "--out", folder / name)
        machine.barrier()
    save_checkpoint(folder / f"{rank}.pt", **out, revived=q.codes)
    torch.distributed.destroy_process_group()


def test_bad_input_gets_one_line(phantom_home, tmp_path):
    for flags, words in (
        (["--codes", 1], "1 codes of 32 coordinates"),
        (["--volume", 60], "60x60x60 is not a multiple of the patch 8"),
        (["--patch", 2, "--volume", 8, "--stride", 1], "patches of 2³ voxels"),
        (["--data", tmp_path], "no corpus there"),
    ):
        with pytest.raises(BadInput, match=re.escape(words)):
            run(tokenize_vq, phantom_home, *SMALL, *flags, "--out", tmp_path / "out")


# ---- predicting codes ------------------------------------------------------------------------


def test_the_loss_of_codes_is_their_cross_entropy_after_the_prefix():
    torch.manual_seed(7)
    volume, prefix, codes = torch.rand(2, 8, 8, 16), torch.tensor([0, 5]), torch.randint(9, (2, 16))
    vq = Model(Config(48, 2, 2, patch=4, images=2, order="image", codes=9, target="vq"))
    loss, scores = vq(volume, prefix, codes=codes)
    nats = -scores.log_softmax(-1).gather(2, codes[..., None])[..., 0]
    want = torch.cat([nats[0], nats[1, 5:]]).mean().item()
    assert scores.shape == (2, 16, 9) and loss.item() == pytest.approx(want, rel=1e-5)


def test_pretraining_on_codes_resumes(phantom_home, trained, tmp_path, capsys):
    flags = [*SMALL, "--steps", 4, "--val-every", 2, "--target", "vq", "--tokenizer"]
    known, whole, half = trained / "ckpt.pt", tmp_path / "whole", tmp_path / "half"
    run(pretrain, phantom_home, *flags, known, "--out", whole)
    assert "unigram entropy" in capsys.readouterr().out
    for more in ([*flags, known, "--stop-after", 2], ["--resume"]):
        run(pretrain, phantom_home, *more, "--out", half)
    a, b = (load_checkpoint(p / "ckpt.pt") for p in (whole, half))
    assert same(a["model"], b["model"]) and a["best"] == b["best"]
    assert same(a["tokenizer"]["model"], load_checkpoint(known)["model"])

    # a head for other codes is not kept, one for the same is
    other = load_checkpoint(known)
    other["model"]["quantiser.codes"] = other["model"]["quantiser.codes"].flip(1)
    save_checkpoint(tmp_path / "other.pt", **other)
    for file, anew in ((tmp_path / "other.pt", True), (known, False)):
        more = file, "--init", whole / "ckpt.pt", "--stop-after", 1
        run(pretrain, phantom_home, *flags, *more, "--out", tmp_path / "init")
        assert ("the head starts anew" in capsys.readouterr().out) == anew
