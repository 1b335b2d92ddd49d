"""The visual tokenizer: a codebook of 3D patches, learned on a corpus, for `pretrain.py --target vq`.

    python tokenize_vq.py                              # CPU demo on made-up patients, nano: 512 codes of 8³ voxels, 3 minutes
    python tokenize_vq.py --data data/corpus --out out/vq              # one GPU: 8,192 codes of 16³ voxels
    torchrun --nproc_per_node=8 tokenize_vq.py --data data/corpus      # eight GPUs, the same global batch
    python tokenize_vq.py --resume                     # goes on where out/vq/ckpt.pt left off, exactly
    python tokenize_vq.py --encode --data data/corpus  # the corpus as codes: out/vq/codes.npy (uint16) and codes.jsonl

A patch is encoded by itself, so that finding its code is cheap; the decoder sees the neighbouring codes too. It begins from
data: principal components, k-means on unit vectors, least squares. The codes then follow moving averages, dead ones are
revived, and encoder and decoder are trained. The paper publishes no tokenizer: every default here is ours.

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (lowest validation error), metrics.json, curves.png,
samples.png (held-out volumes beside their reconstructions), codebook.png (the most used codes).

Sections: arguments · data · evaluation · rivals · pictures · training step · codes of a corpus · main

B batch, S sub-images, G patches of a sequence, P³ voxels of a patch, g groups, K codes in each.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (BadInput, Log, StopRequest, cli, cosine_lr, figure_of, keep_earlier_run, leave, load_checkpoint, place,
                    random_states, read_log, resumed_args, save_checkpoint, save_figure, set_random_states, write_beside, write_json)
from model import TOKENIZER, Tokenizer, TokenizerConfig, fit, grid_of, load_tokenizer, patchify, to_unit, tokenizer_state, unpatchify
from serialize import KINDS, Sequences, find_corpus, open_array, parse_mix, read_index, window_of

# ---------------------------------------------------------------- arguments

RECIPES = {  # what a flag that was not given stands for
    "full": dict(patch=16, codes=8192, hidden=512, width=256, layers=2, volume=128, batch=64, lr=1e-3, warmup=100, steps=20_000,
                 stride=8, mix="published", start_patches=262_144, val_samples=64, val_every=1000, save_every=1000),
    "nano": dict(patch=8, codes=512, hidden=256, width=128, layers=2, volume=64, batch=8, lr=2e-3, warmup=20, steps=300,
                 stride=4, mix="equal", start_patches=131_072, val_samples=16, val_every=100, save_every=100),
}
FREE = {"resume", "data", "out", "device", "workers", "log_every", "val_every", "save_every", "stop_after", "encode"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--data", help="corpus of serialize.py (default data/corpus; without one, the phantom's)")
    g.add_argument("--out", default="out/vq", help="folder of the run (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on from out/ckpt.pt with the arguments of that run; a fresh start if there is none")
    g.add_argument("--encode", action="store_true", help="write the codes of every scan of the corpus with the tokenizer in out/ckpt.pt")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop-after", type=int, metavar="N", help="save and leave after N steps of this call")
    g = p.add_argument_group("tokenizer (the paper publishes none: these are ours)")
    g.add_argument("--size", choices=list(RECIPES), help="of all defaults below (full with CUDA; nano without)")
    g.add_argument("--patch", type=int, help="edge in voxels; it must be the model's (full 16; nano 8)")
    g.add_argument("--codes", type=int, help="K, up to 65,536 (full 8192; nano 512)")
    g.add_argument("--groups", type=int, default=1, help="codes a patch, each from a codebook of its own (default %(default)s)")
    g.add_argument("--dim", type=int, default=32, help="of a code, a point on the unit sphere (default %(default)s)")
    g.add_argument("--hidden", type=int, help="width of the encoder's MLP (full 512; nano 256)")
    g.add_argument("--width", type=int, help="of the decoder (full 256; nano 128)")
    g.add_argument("--layers", type=int, help="of the decoder; each sees one patch further (default 2)")
    g.add_argument("--start-patches", type=int, help="that the start is found on, and the rivals (full 262144; nano 131072)")
    g.add_argument("--decay", type=float, default=0.95, help="of the codes' moving averages (default %(default)s)")
    g.add_argument("--revive", type=float, default=0.1, help="a code used less than this share of the mean starts anew (default %(default)s)")
    g.add_argument("--commit", type=float, default=0.25, help="weight of the commitment loss (default %(default)s)")
    g = p.add_argument_group("sequences")
    g.add_argument("--volume", type=int, help="edge in voxels (full 128; nano 64)")
    g.add_argument("--images", type=int, default=4, help="sub-images of a sequence (default %(default)s)")
    g.add_argument("--stride", type=int, help="slices between the slabs of a spatial sequence (full 8; nano 4)")
    g.add_argument("--mix", help="of the kinds: published (by the published counts), equal, or spatial=2,contrast=1,semantic=1")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help="optimiser steps (full 20000; nano 300)")
    g.add_argument("--batch", type=int, help="sequences a step, over all ranks (full 64; nano 8)")
    g.add_argument("--lr", type=float, help="AdamW, peak learning rate of the decoder (full 1e-3; nano 2e-3)")
    g.add_argument("--encoder-lr", type=float, default=0.02, help="of the encoder, as a share of --lr (default %(default)s)")
    g.add_argument("--wd", type=float, default=1e-4, help="AdamW weight decay (default %(default)s)")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up (full 100; nano 20)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the decoder (auto: bf16 on CUDA, fp32 on CPUs); "
                   "codes are always found in fp32")
    g.add_argument("--workers", type=int, help="loader processes a rank (default: 8 with CUDA, 0 without)")
    g = p.add_argument_group("reports")
    g.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="fit k-means and PCA at the same bits a patch at the end")
    g.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    g.add_argument("--val-every", type=int, help="steps (full 1000; nano 100)")
    g.add_argument("--val-samples", type=int, help="sequences of each kind to validate with (full 64; nano 16)")
    g.add_argument("--save-every", type=int, help="steps (full 1000; nano 100)")
    return p


def settle(args, where):
    """Fill in what was not given, in place, and say what follows from the machine."""
    cuda = where.device.type == "cuda"
    if args.size is None:
        args.size = "full" if cuda else "nano"
        if args.size == "nano":
            where.say("no CUDA device: --size nano on the CPU (--size full: 8,192 codes of 16³ voxels)")
    for name, value in RECIPES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.workers = (8 if cuda else 0) if args.workers is None else args.workers
    at_least = dict(batch=1, images=1, val_samples=1, val_every=1, save_every=1, log_every=1, steps=1, stop_after=1, start_patches=2,
                    workers=0, warmup=0, wd=0, lr=1e-12, encoder_lr=0, revive=0, commit=0, decay=0, patch=2, hidden=1, width=1)
    for name, least in at_least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least} is needed")
    for name in ("decay", "revive"):
        if getattr(args, name) >= 1:
            raise BadInput(f"--{name} {getattr(args, name)}: less than 1 is needed")
    if args.batch % where.world:
        raise BadInput(f"--batch {args.batch} does not divide over {where.world} ranks")
    if args.start_patches < args.codes:
        raise BadInput(f"--start-patches {args.start_patches}: fewer than --codes {args.codes}")


def config_of(args):
    return TokenizerConfig(**{k: getattr(args, k) for k in ("patch", "codes", "groups", "dim", "hidden", "width", "layers")})


# ---------------------------------------------------------------- data


def steps_of(first_step, args, where):
    """Endless lists of sample numbers for this rank's loader: its run of each step's `batch` successive samples."""
    share = args.batch // where.world
    step = first_step
    while True:
        start = step * args.batch + where.rank * share
        yield list(range(start, start + share))
        step += 1


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def validation_set(data, args, where):
    """This rank's share of the sequences to validate with, the same at each validation, in batches."""
    mine = [data[n] for n in range(where.rank, args.val_samples * len(data.kinds), where.world)]
    return [torch.utils.data.default_collate(mine[i:i + 4]) for i in range(0, len(mine), 4)]


def first_patches(data, args, where):
    """`start_patches` patches [n, P³], an equal number from each of the first training sequences."""
    G = math.prod(grid_of([args.volume] * 3, args.patch))
    rng, parts, have = np.random.default_rng([args.seed, 4]), [], 0
    each = min(G, max(64, -(-args.start_patches // 512)))  # from 512 sequences or more, or whole ones
    bar = tqdm(total=args.start_patches, disable=not where.main, desc="patches to start from", leave=False)
    while have < args.start_patches:
        sample = data[len(parts)]
        patches = patchify(to_unit(sample["volume"][None], sample["window"][None]), args.patch)[0]
        parts.append(patches[torch.from_numpy(rng.permutation(G)[:min(each, args.start_patches - have)])])
        have += len(parts[-1])
        bar.update(len(parts[-1]))
    bar.close()
    return torch.cat(parts).to(where.device)


# ---------------------------------------------------------------- evaluation


def ssim(a, b, images):
    """Structural similarity (Wang et al. 2004) in 3D of [B, X, Y, Z] in [0, 1], the mean over each volume: [B].

    Uniform windows of 7³, unbiased variances, K1 0.01 and K2 0.03, as in scikit-image; each sub-image by itself.
    """
    B, X, Y, Z = a.shape
    a, b = (v.reshape(B, X, Y, images, -1).permute(0, 3, 1, 2, 4).reshape(B * images, 1, X, Y, Z // images) for v in (a, b))
    n = min(7, X, Y, Z // images)

    def mean(v):
        for axis in range(3):
            v = F.avg_pool3d(v, [n if i == axis else 1 for i in range(3)], 1)
        return v

    ma, mb, unbiased = mean(a), mean(b), n ** 3 / max(1, n ** 3 - 1)
    va, vb, both = (unbiased * v for v in (mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb))
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    s = (2 * ma * mb + c1) * (2 * both + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return s.flatten(1).mean(1).view(B, images).mean(1)


@torch.no_grad()
def evaluate(rebuild, batches, args, where, structure=True):
    """Scores of rebuild(volume [B, X, Y, Z]) -> volume, codes [B, G, g] on held-out patients, over all ranks.

    {"psnr": {kind: dB}, "ssim": {kind: …}, "mse": …, "used": …, "perplexity": …, "perplexity_varied": …}. PSNR is of the mean
    squared error over all voxels of a kind, peak 1. Codes: the mean over the groups; `varied` leaves out patches of one value,
    such as the background of a skull-stripped brain, which are all one code whatever the codebook.
    """
    sums = torch.zeros(len(KINDS), 3, dtype=torch.float64, device=where.device)        # squared error, SSIM, volumes
    counts = torch.zeros(2, args.groups, args.codes, dtype=torch.float64, device=where.device)
    for batch in batches:
        b = to_device(batch, where.device)
        volume = to_unit(b["volume"], b["window"])
        out, codes = rebuild(volume)
        out = out.float().clamp(0, 1)
        error = (out - volume).square().mean((1, 2, 3))
        alike = ssim(volume, out, args.images) if structure else torch.zeros_like(error)
        sums.index_add_(0, b["kind"], torch.stack([error, alike, torch.ones_like(error)], 1).double())
        patches = patchify(volume, args.patch)
        varied = patches.amax(-1) > patches.amin(-1)                                   # [B, G]
        for i, some in enumerate((codes.flatten(0, 1), codes[varied]) if codes is not None else ()):
            for group in range(args.groups):
                counts[i, group].index_add_(0, some[:, group], torch.ones(len(some), dtype=torch.float64, device=where.device))
    sums, counts = where.sum(sums).cpu(), where.sum(counts).cpu()
    have = [i for i in range(len(KINDS)) if sums[i, 2]]
    found = dict(psnr={KINDS[i]: -10 * math.log10(max(1e-12, sums[i, 0] / sums[i, 2])) for i in have},
                 ssim={KINDS[i]: (sums[i, 1] / sums[i, 2]).item() for i in have},
                 mse=sum((sums[i, 0] / sums[i, 2]).item() for i in have) / max(1, len(have)))
    if counts[0].sum():
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        perplexity = torch.special.entr(share).sum(-1).exp().mean(-1)                  # all, varied
        found |= dict(used=(counts[0] > 0).double().mean().item(), perplexity=perplexity[0].item(), perplexity_varied=perplexity[1].item(),
                      constant=1 - (counts[1].sum() / counts[0].sum()).item(), counts=counts[0].long())
    return found


def rebuilder(tokenizer, where):
    """volume [B, X, Y, Z] -> its reconstruction and its codes [B, G, g]."""
    def rebuild(volume):
        codes = tokenizer.encode(volume)
        with where.autocast():
            return tokenizer.decode(codes, grid_of(volume.shape[1:], tokenizer.config.patch)), codes
    return rebuild


# ---------------------------------------------------------------- rivals


@torch.no_grad()
def kmeans_rival(patches, args, rounds=20, chunk=8192):
    """Plain k-means (Lloyd) on voxels with as many codes; with g groups, on g equal runs of a patch's voxels.

    Empty clusters are given to the patches worst represented. Returns rebuild(patches [B, G, P³]) -> patches.
    """
    edges = [patches.shape[1] * i // args.groups for i in range(args.groups + 1)]
    gen = torch.Generator(patches.device).manual_seed(args.seed)

    def nearest(x, centres):  # -> numbers, squared distance less |x|²
        offset = 0.5 * centres.square().sum(1)
        found = [(part @ centres.T).sub_(offset).max(1) for part in x.split(chunk)]
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])

    books = []
    bar = tqdm(total=args.groups * rounds, desc="k-means", leave=False)
    for a, b in zip(edges, edges[1:]):
        x = patches[:, a:b].contiguous()
        centres = x[torch.randperm(len(x), generator=gen, device=x.device)[:args.codes]].clone()
        for _ in range(rounds):
            index, score = nearest(x, centres)
            count = torch.bincount(index, minlength=args.codes)
            mean = torch.zeros_like(centres).index_add_(0, index, x) / count.clamp(min=1)[:, None]
            worst = (0.5 * x.square().sum(1) - score).topk(args.codes).indices
            turn = (count == 0).long().cumsum(0) - 1
            centres = torch.where((count == 0)[:, None], x[worst[turn.clamp(min=0)]], mean)
            bar.update()
        books.append(centres)
    bar.close()
    return lambda p: torch.cat([c[nearest(p[..., a:b].reshape(-1, b - a), c)[0]].view(*p.shape[:2], -1)
                                for a, b, c in zip(edges, edges[1:], books)], -1)


def lloyd_max(x, levels, rounds=50):
    """The scalar quantiser of least squared error for values x [n] (Lloyd 1982, Max 1960): sorted levels, its error."""
    x = x.double()
    centres = torch.quantile(x, (torch.arange(levels, dtype=x.dtype, device=x.device) + 0.5) / levels)
    for _ in range(rounds):
        index = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        count = torch.bincount(index, minlength=levels)
        centres = torch.where(count > 0, torch.zeros_like(centres).index_add_(0, index, x) / count.clamp(min=1), centres)
    index = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
    return centres, (x - centres[index]).square().mean().item()


@torch.no_grad()
def pca_rival(patches, args, sample=32_768):
    """Principal components, each with a Lloyd-Max quantiser; every bit goes where it lowers the squared error most.

    As many bits as the codes take, g · log2 K rounded up. Returns rebuild(patches [B, G, P³]) -> patches.
    """
    mean = patches.mean(0)
    _, axes = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    bits = math.ceil(args.groups * math.log2(args.codes))
    axes = axes[:, -min(len(axes), bits + 1):].flip(1)
    y = (patches[:sample * max(1, len(patches) // sample):max(1, len(patches) // sample)] - mean) @ axes
    spent = [0] * y.shape[1]
    now = [lloyd_max(y[:, i], 1) for i in range(len(spent))]
    then = [lloyd_max(y[:, i], 2) for i in range(len(spent))]
    for _ in range(bits):
        i = max(range(len(spent)), key=lambda j: now[j][1] - then[j][1])
        spent[i] += 1
        now[i], then[i] = then[i], lloyd_max(y[:, i], 2 ** (spent[i] + 1))
    levels = [c.float() for c, _ in now]

    def rebuild(p):
        y = (p - mean) @ axes
        for i, c in enumerate(levels):
            y[..., i] = c[torch.bucketize(y[..., i].contiguous(), (c[1:] + c[:-1]) / 2)]
        return y @ axes.T + mean
    return rebuild, [s for s in spent if s]


def of_patches(rebuild, patch):
    """A rival's rebuild of patches -> one of volumes, as `evaluate` wants it."""
    return lambda volume: (unpatchify(rebuild(patchify(volume, patch)), grid_of(volume.shape[1:], patch)), None)


# ---------------------------------------------------------------- pictures


def draw_curves(path, rows, args):
    val = [r for r in rows if "val_mse" in r]
    train = [(r["step"], -10 * math.log10(r["loss"])) for r in rows if "loss" in r]
    fig, [(left, right)] = figure_of((11, 4), 1, 2)
    if train:
        left.plot(*zip(*train), color="0.75", lw=1, label="training")
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange", "tab:green")):
        points = [(r["step"], r[f"psnr_{kind}"]) for r in val if f"psnr_{kind}" in r]
        if points:
            left.plot(*zip(*points), "o-", ms=3, color=colour, label=f"held out, {kind}")
    left.set(xlabel="step", ylabel="PSNR, dB", title="reconstruction")
    steps = [r["step"] for r in val]
    right.plot(steps, [r["perplexity"] for r in val], "o-", ms=3, label="perplexity, all patches")
    right.plot(steps, [r["perplexity_varied"] for r in val], "o-", ms=3, label="perplexity, patches of more than one value")
    right.plot(steps, [r["used"] * args.codes for r in val], "o-", ms=3, label="codes in use")
    right.axhline(args.codes, color="k", ls="--", lw=1)
    right.set(xlabel="step", ylabel="codes", ylim=(0, 1.05 * args.codes), title="use of the codes by held-out patches")
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save_figure(fig, path)


@torch.no_grad()
def draw_samples(path, rebuilds, data, where, args):
    """For a held-out sequence of each kind, the middle slice of each sub-image: truth, and each of {name: rebuild}."""
    columns = 1 + len(rebuilds)
    fig, axes = figure_of((1.5 * args.images * columns, 1.8 * len(data.kinds)), len(data.kinds), columns)
    middle = [s * data.depth + data.depth // 2 for s in range(args.images)]
    for row, kind in enumerate(data.kinds):
        b = to_device(torch.utils.data.default_collate([data[row]]), where.device)
        volume = to_unit(b["volume"], b["window"])
        views = {"truth": volume, **{name: rebuild(volume)[0].clamp(0, 1) for name, rebuild in rebuilds.items()}}
        for ax, (name, view) in zip(axes[row], views.items()):
            error = (view - volume).square().mean().item()
            ax.imshow(torch.cat([view[0, :, :, z] for z in middle]).T.cpu(), cmap="gray", origin="lower", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], ylabel=kind if name == "truth" else None,
                   title=name if not error else f"{name}: {-10 * math.log10(error):.1f} dB")
    fig.tight_layout()
    save_figure(fig, path)


@torch.no_grad()
def draw_codebook(path, tokenizer, counts, most=96):
    """The most used codes of each group, decoded among 26 of their own kind, the others at their most used: middle slices."""
    c, rows = tokenizer.config, []
    order = counts.argsort(1, descending=True)[:, :most]                               # [g, n]
    for group in range(c.groups):
        codes = order[:, 0].repeat(order.shape[1], 1)                                  # [n, g]
        codes[:, group] = order[group]
        codes = codes[:, None].expand(-1, 27, -1).to(tokenizer.mean.device)
        patch = patchify(tokenizer.decode(codes, (3, 3, 3)), c.patch)[:, 13]           # [n, P³], the one in the middle
        tiles = F.pad(patch.view(-1, c.patch, c.patch, c.patch)[..., c.patch // 2].mT, (1, 1, 1, 1), value=torch.nan)
        tiles = torch.cat([tiles, tiles.new_full((-len(tiles) % 24, *tiles.shape[1:]), torch.nan)])
        e = tiles.shape[-1]
        rows.append(tiles.view(-1, 24, e, e).transpose(1, 2).reshape(-1, 24 * e))
    image = torch.cat(rows).cpu()
    fig, [[ax]] = figure_of((12, 12 * image.shape[0] / image.shape[1] + 0.4))
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set_facecolor("tab:blue")
    ax.set(xticks=[], yticks=[], title=f"the {order.shape[1]} most used of {c.codes} codes, the most used first"
           + (f", of each of {c.groups} groups" if c.groups > 1 else ""))
    fig.tight_layout()
    save_figure(fig, path)


# ---------------------------------------------------------------- training step


def revive_seed(args, step, rank):
    return int(np.random.SeedSequence([args.seed, 5, step, rank]).generate_state(1)[0])


def move_codes(quantiser, z, index, step, args, where):
    """The averages of all ranks, and candidates from each for the codes that died: afterwards all hold the same codes."""
    g, K, D = quantiser.codes.shape
    n, sums = quantiser.totals(z, index)
    each = min(len(z), -(-K // (4 * where.world)))                                     # at most a quarter of the codes a step
    gen = torch.Generator(z.device).manual_seed(revive_seed(args, step, where.rank))
    fresh = torch.zeros(each, where.world, g, D, device=z.device)                      # the ranks take turns
    fresh[:, where.rank] = quantiser.candidates(z, index, each, gen)
    together = where.sum(torch.cat([n.flatten(), sums.flatten(), fresh.flatten()]))    # one message; zeros add nothing
    n, sums, fresh = (t.view(shape) for t, shape in zip(together.split([g * K, g * K * D, fresh.numel()]),
                                                        ((g, K), (g, K, D), (-1, g, D))))
    quantiser.update(n, sums, fresh, args.decay, args.revive)


def train_step(net, tokenizer, batch, optimiser, lr, step, args, where):
    """One optimiser step on this rank's sequences, then one of the codes: its part of the batch's error and commitment."""
    b = to_device(batch, where.device)
    with where.autocast():
        loss, commitment, _, z, index = net(b["volume"], b["window"])
    (loss + args.commit * commitment).backward()
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    move_codes(tokenizer.quantiser, z, index, step, args, where)
    return torch.stack([loss.detach(), commitment.detach()]) / where.world


def make_optimiser(tokenizer, args):
    """AdamW; the encoder, which begins as principal components, at a small share of the rate."""
    first = ("linear", "fc1", "fc2")
    parts = {True: [], False: []}
    for name, w in tokenizer.named_parameters():
        parts[name.split(".")[0] in first].append(w)
    return torch.optim.AdamW([dict(params=parts[True], scale=args.encoder_lr), dict(params=parts[False], scale=1.0)],
                             lr=args.lr, weight_decay=args.wd, betas=(0.9, 0.95), fused=True)


# ---------------------------------------------------------------- codes of a corpus


@torch.no_grad()
def encode_corpus(args, where):
    """codes.npy, uint16 [patches, g], the scans of the corpus one after the other, and codes.jsonl, a line a scan.

    A line: file, kind, split, shape [X, Y, Z], grid [x, y, z], first row, window (the values that are 0 and 1: percentiles 1 and
    99.9 of the scan). codes[first:first + x·y·z].reshape(x, y, z, g); edges are repeated up to whole patches.
    """
    out = Path(args.out)
    tokenizer = load_tokenizer(out / "ckpt.pt").to(where.device)  # the one that pretrain.py takes, too
    P, corpus = tokenizer.config.patch, find_corpus(where, args.data)
    rows, first = [], 0
    for row in {r["file"]: r for r in read_index(corpus)}.values():
        grid = [-(-n // P) for n in row["shape"]]
        rows.append(dict(file=row["file"], kind=row["kind"], split=row["split"], shape=row["shape"], grid=grid, first=first))
        first += math.prod(grid)
    with write_beside(out / "codes.npy") as tmp:
        codes = np.lib.format.open_memmap(tmp, "w+", np.uint16, (first, tokenizer.config.groups))
        for row in tqdm(rows, desc="scans"):
            array = open_array(str(Path(corpus) / row["file"]), tuple(row["shape"]))
            low, high = window_of(array)
            row["window"] = [float(low), float(high)]
            window, slab = torch.tensor([[row["window"]]], device=where.device), math.prod(row["grid"][1:])
            for x in range(row["grid"][0]):
                part = array[x * P:(x + 1) * P].to(where.device).float()[None, None]
                short = [s for n, have in zip((P * row["grid"][2], P * row["grid"][1], P), part.shape[:1:-1]) for s in (0, n - have)]
                part = F.pad(part, short, mode="replicate")[0]
                at = row["first"] + x * slab
                codes[at:at + slab] = tokenizer.encode(part, window)[0].cpu().numpy()
        codes.flush()
        del codes
    with write_beside(out / "codes.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where.say(f"{len(rows)} scans of {corpus}: {first:,} patches, {first * tokenizer.config.groups * 2 / 1e6:.1f} MB of codes in {out / 'codes.npy'}, "
              f"what is where in {out / 'codes.jsonl'}")


# ---------------------------------------------------------------- main


def main():
    p = parser()
    args = p.parse_args()
    out = Path(args.out)
    state = None
    if args.resume and (out / "ckpt.pt").exists():
        state = load_checkpoint(out / "ckpt.pt", TOKENIZER)
        args = resumed_args(p, state["args"], FREE)

    # devices
    cuda = torch.cuda.is_available() and args.device != "cpu"
    where = place(args.device, "fp32" if args.dtype == "auto" and not cuda else args.dtype, args.seed)
    if args.encode:
        if where.world > 1:
            raise BadInput("--encode runs in one process: leave torchrun out")
        return encode_corpus(args, where)
    stop = StopRequest()
    settle(args, where)
    grid_of([args.volume] * 3, args.patch)

    # model
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(config_of(args)).to(where.device)
    bits = args.groups * math.log2(args.codes)
    where.say(f"{args.size}: {args.groups} x {args.codes} codes of {args.patch}³ voxels, {bits:.1f} bits a patch, "
              f"{sum(w.numel() for w in tokenizer.parameters()) / 1e6:.1f} M parameters, {where.world} x {where.device.type}")

    # data
    corpus = args.data = find_corpus(where, args.data)
    sequences = dict(corpus=corpus, size=args.volume, images=args.images, stride=args.stride, seed=args.seed)
    probe = Sequences(**sequences, split="train")
    train = Sequences(**sequences, split="train", mix=parse_mix(args.mix, probe.have))
    val = Sequences(**sequences, split="val")
    where.say(f"{corpus}: train {train.have}, val {val.have}, mix {args.mix}")
    val_batches = validation_set(val, args, where)

    # resume, start from data, optimiser
    first, best, rng = 0, float("inf"), None
    if state:
        fit(tokenizer, state["model"], out / "ckpt.pt")
        first, best = state["step"], state["best"]
    else:
        if where.main:
            if args.resume:
                where.say(f"no checkpoint in {out}: starting at step 0")
            keep_earlier_run(out, where.say)
            begin = time.perf_counter()
            rng = torch.Generator(where.device).manual_seed(args.seed)
            tokenizer.start(first_patches(train, args, where), rng)
            where.say(f"started from {args.start_patches:,} patches in {time.perf_counter() - begin:.0f} s")
        for part in tokenizer.state_dict().values():  # the other ranks begin from what rank 0 found
            where.sum(part if where.main else part.zero_())
    optimiser = make_optimiser(tokenizer, args)
    net = tokenizer
    if where.world > 1:  # the codes are buffers, and agree by themselves
        net = DistributedDataParallel(tokenizer, device_ids=[where.device.index] if where.device.type == "cuda" else None,
                                      broadcast_buffers=False, gradient_as_bucket_view=True)
    if state:
        optimiser.load_state_dict(state["optimiser"])
    if where.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", resume_step=first if state else None)
        write_json(out / "args.json", vars(args))
    loader = torch.utils.data.DataLoader(train, batch_sampler=steps_of(first, args, where), num_workers=args.workers,
                                         pin_memory=where.device.type == "cuda", prefetch_factor=2 if args.workers else None)
    batches = iter(loader)
    if state:
        set_random_states(state["random"], where)

    def save(step):
        states = random_states(where)
        if where.main:
            save_checkpoint(out / "ckpt.pt", **tokenizer_state(tokenizer), optimiser=optimiser.state_dict(), step=step, best=best,
                            random=states, args=vars(args))

    def validate(step):
        nonlocal best
        found = evaluate(rebuilder(tokenizer, where), val_batches, args, where, structure=False)
        where.say(f"step {step:>6}: held out " + ", ".join(f"{k} {v:.2f} dB" for k, v in found["psnr"].items())
                  + f"; codes used {found['used']:.1%}, perplexity {found['perplexity']:.0f} (varied patches {found['perplexity_varied']:.0f})")
        if where.main:
            log.write(step=step, val_mse=found["mse"], used=found["used"], perplexity=found["perplexity"],
                      perplexity_varied=found["perplexity_varied"], **{f"psnr_{k}": v for k, v in found["psnr"].items()})
            draw_curves(out / "curves.png", read_log(out / "log.jsonl"), args)
            if found["mse"] < best:
                save_checkpoint(out / "best.pt", **tokenizer_state(tokenizer), step=step, val_mse=found["mse"])
        best = min(best, found["mse"])

    # loop
    if first == 0:
        validate(0)
    last = min(args.steps, first + args.stop_after) if args.stop_after else args.steps
    running, since = torch.zeros(2, device=where.device), first
    bar = tqdm(total=args.steps, initial=first, disable=not where.main, mininterval=1, desc="tokenizer", unit="step")
    clock, step = time.perf_counter(), first
    while step < last:
        stopping = stop.agreed(where) if where.device.type == "cpu" or where.world == 1 else False
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        running += train_step(net, tokenizer, next(batches), optimiser, lr, step, args, where)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == last or stopping:
            stopping = stopping or stop.agreed(where)
            loss, commitment = (where.sum(running) / (step - since)).tolist()
            seconds = time.perf_counter() - clock
            bar.set_postfix(psnr=f"{-10 * math.log10(loss):.2f}", refresh=False)
            if where.main:
                log.write(step=step, loss=loss, commitment=commitment, lr=lr, samples_per_s=(step - since) * args.batch / seconds)
            running, since, clock = torch.zeros_like(running), step, time.perf_counter()
        pause = time.perf_counter()
        if step % args.val_every == 0 or step == args.steps:
            validate(step)
        if step % args.save_every == 0 or step == last or stopping:
            save(step)
        clock += time.perf_counter() - pause
        if stopping:
            break
    bar.close()

    if step < args.steps:
        where.say(f"stopped at step {step} of {args.steps}, saved in {out / 'ckpt.pt'}: --resume goes on")
        return
    report(tokenizer, train, val, val_batches, step, out, args, where)


def report(tokenizer, train, val, val_batches, step, out, args, where):
    """The tokenizer beside two rivals of as many bits, on the same held-out patches: table, metrics.json, pictures."""
    rebuilds = {"codes": rebuilder(tokenizer, where)}
    if args.rivals:
        patches = first_patches(train, args, where)  # the same on every rank, and so are the rivals
        rebuilds["k-means"] = of_patches(kmeans_rival(patches, args), args.patch)
        pca, spent = pca_rival(patches, args)
        rebuilds["PCA"] = of_patches(pca, args.patch)
        where.say(f"PCA spends {sum(spent)} bits as {'+'.join(map(str, spent))}")
    found = {name: evaluate(rebuild, val_batches, args, where) for name, rebuild in rebuilds.items()}
    if not where.main:
        return
    ours = found["codes"]
    counts = ours.pop("counts")
    where.say("  held out" + "".join(f"  {name + ': PSNR, SSIM':>20}" for name in found))
    for k in ours["psnr"]:
        where.say(f"{k:>10}" + "".join(f"  {f['psnr'][k]:10.2f} dB {f['ssim'][k]:6.3f}" for f in found.values()))
    where.say(f"codes used by held-out patches {ours['used']:.1%}; perplexity {ours['perplexity']:.0f} of {args.codes} over all patches, "
              f"{ours['perplexity_varied']:.0f} without the {ours['constant']:.0%} of one value")
    write_json(out / "metrics.json", dict(step=step, bits=args.groups * math.log2(args.codes), **found))
    draw_samples(out / "samples.png", rebuilds, val, where, args)
    draw_codebook(out / "codebook.png", tokenizer, counts)
    where.say("wrote " + ", ".join(str(out / f) for f in ("ckpt.pt", "best.pt", "log.jsonl", "metrics.json", "curves.png", "samples.png",
                                                          "codebook.png")))


if __name__ == "__main__":
    cli(main)
    leave()
