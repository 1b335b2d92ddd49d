"""Pre-training: a transformer learns to predict the next patch of CT and MR sequences from a random start-up prefix.

    python pretrain.py                                 # CPU demo on made-up patients, nano: 4 minutes on two cores
    python pretrain.py --data data/corpus --size base  # one GPU, ViT-B, the published recipe (gradients accumulated)
    torchrun --nproc_per_node=8 pretrain.py            # eight GPUs, the same run: the global batch stays 288
    python pretrain.py --resume                        # goes on where out/pretrain/ckpt.pt left off, exactly
    python pretrain.py --size base --bench             # one step timed: TFLOP/s, share of the machine's rate, memory
    python pretrain.py --target vq                     # predicts codes of tokenize_vq.py (out/vq/ckpt.pt) instead of voxels

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (lowest validation loss), metrics.json, curves.png,
samples.png. Every random choice is a function of (seed, step, sample), so any number of workers or GPUs trains one model.

Sections: arguments · data · evaluation · pictures · training step · bench · main

B batch, S sub-images, G patches of a sequence, P³ voxels of a patch.
"""
import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (BadInput, Log, StopRequest, cli, cosine_lr, figure_of, keep_earlier_run, leave, load_checkpoint, matmul_rate,
                    peak_memory, place, random_states, read_log, resumed_args, save_checkpoint, save_figure, set_random_states,
                    write_json)
from kernels import choose
from model import (FORMAT, SIZES, Config, Model, Tokenizer, TokenizerConfig, checkpoint_state, dense_probe, fit, grid_of,
                   load_pretrained, load_tokenizer, standardise, tokenizer_state, unpatchify)
from serialize import KINDS, PUBLISHED, Sequences, find_corpus, labelled_cases, parse_mix

# ---------------------------------------------------------------- arguments

RECIPES = {  # what a flag that was not given stands for; published: AAAI 2025, ViT-B on 4 GPUs of 72 sequences each
    "published": dict(volume=128, batch=288, lr=1e-4, wd=0.01, beta2=0.999, warmup=0, clip=0.0, stride=8, mix="published", steps=None,
                      val_samples=64, val_every=500, save_every=500),
    "nano": dict(volume=64, batch=8, lr=3e-3, wd=0.05, beta2=0.95, warmup=30, clip=1.0, stride=4, mix="equal", steps=360,
                 val_samples=16, val_every=60, save_every=60),
}
FREE = {"resume", "data", "out", "device", "workers", "micro", "compile", "kernels", "log_every", "val_every", "save_every", "stop_after"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--data", help="corpus of serialize.py (default data/corpus; without one, the phantom's)")
    g.add_argument("--out", default="out/pretrain", help="folder of the run (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on from out/ckpt.pt with the arguments of that run; a fresh start if there is none")
    g.add_argument("--init", metavar="FILE", help="start from these weights: a checkpoint of ours, or the published file")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop-after", type=int, metavar="N", help="save and leave after N steps of this call")
    g.add_argument("--bench", action="store_true", help="time training steps on random voxels, write nothing")
    g = p.add_argument_group("model")
    g.add_argument("--size", choices=list(SIZES), help="published: base (the default with CUDA; nano without)")
    g.add_argument("--target", choices=["pixel", "vq", "both"], default="pixel", help="published: pixel, standardised patches; vq: the codes "
                   "of a tokenizer; both")
    g.add_argument("--tokenizer", metavar="FILE", help="checkpoint of tokenize_vq.py for vq and both (default out/vq/ckpt.pt); it is kept in "
                   "this run's checkpoints")
    g.add_argument("--code-weight", type=float, default=0.2, help="of the codes' loss in --target both, from 0 to 1; the rest is the pixels' "
                   "(default %(default)s)")
    g.add_argument("--attention", choices=["prefix", "causal"], default="prefix", help="published: prefix, a random start-up; causal: none")
    g.add_argument("--order", choices=["raster", "image"], default="raster", help="of the patches (published: raster, over the joined volume)")
    g = p.add_argument_group("sequences")
    g.add_argument("--volume", type=int, help="edge in voxels (published: 128; nano 64)")
    g.add_argument("--images", type=int, default=4, help="sub-images of a sequence (published: 4)")
    g.add_argument("--stride", type=int, help="slices between the slabs of a spatial sequence (published: 8; nano 4)")
    g.add_argument("--mix", help="of the kinds: published (by the published counts), equal, or spatial=2,contrast=1,semantic=1")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help="optimiser steps (default: --epochs; nano 360)")
    g.add_argument("--epochs", type=float, default=50, help="in crops by the published counts, where --steps is not given (published: 50)")
    g.add_argument("--batch", type=int, help="sequences a step, over all ranks (published: 288; nano 8)")
    g.add_argument("--micro", type=int, help="sequences a forward pass on one device (default: as many as 72 on CUDA, 8 on a CPU)")
    g.add_argument("--lr", type=float, help="peak learning rate (published: 1e-4; nano 3e-3)")
    g.add_argument("--wd", type=float, help="AdamW weight decay (published: 0.01; nano 0.05)")
    g.add_argument("--beta2", type=float, help="AdamW's second decay (published: 0.999; nano 0.95)")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up (published: 0; nano 30)")
    g.add_argument("--clip", type=float, help="gradient norm (published: 0, off; nano 1)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the matrix products (published: bf16)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    g.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto", help="auto: Triton's (kernels/) on CUDA, else PyTorch")
    g.add_argument("--workers", type=int, help="loader processes a rank (default: 8 with CUDA, 0 without)")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    g.add_argument("--val-every", type=int, help="steps (default 500; nano 60)")
    g.add_argument("--val-samples", type=int, help="sequences of each kind to validate with (default 64; nano 16)")
    g.add_argument("--save-every", type=int, help="steps (default 500; nano 60)")
    g.add_argument("--probe-every", type=int, default=0, metavar="N", help="steps: probe the frozen tokens against organs, F1 to log.jsonl (default 0, off)")
    g.add_argument("--probe-task", default="phantom", help="labelled scans for it, a task of finetune_seg.py (default %(default)s)")
    g.add_argument("--probe-data", metavar="DIR", help="their folder (default data/TASK; the phantom makes its own)")
    return p


def settle(args, where):
    """Fill in what was not given, in place, and say what follows from the machine."""
    if args.size is None:
        args.size = "base" if where.device.type == "cuda" else "nano"
        if args.size == "nano":
            where.say("no CUDA device: --size nano on the CPU (--size base is the published model)")
    for name, value in RECIPES["nano" if args.size == "nano" else "published"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cuda = where.device.type == "cuda"
    args.compile = cuda if args.compile is None else args.compile
    args.workers = (8 if cuda else 0) if args.workers is None else args.workers
    at_least = dict(probe_every=0, batch=1, images=1, val_samples=1, val_every=1, save_every=1, log_every=1, steps=1, stop_after=1,
                    workers=0, warmup=0, wd=0, clip=0, lr=1e-12, epochs=1e-6, beta2=0)
    for name, least in at_least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least} is needed")
    if not 0 <= args.code_weight <= 1:
        raise BadInput(f"--code-weight {args.code_weight}: a share from 0 to 1")
    if args.tokenizer and args.target == "pixel":
        raise BadInput(f"--tokenizer {args.tokenizer}: only --target vq and both predict codes")
    if args.beta2 >= 1:
        raise BadInput(f"--beta2 {args.beta2}: less than 1 is needed")
    if args.batch % where.world:
        raise BadInput(f"--batch {args.batch} does not divide over {where.world} ranks")
    share = args.batch // where.world
    if args.micro is None or args.resume and share % args.micro:  # the largest divisor of this rank's share that fits
        most = args.micro or (72 if cuda else 8)
        args.micro = max(m for m in range(1, min(share, most) + 1) if share % m == 0)
    if args.micro < 1 or share % args.micro:
        raise BadInput(f"--micro {args.micro} does not divide the {share} sequences of a step on each of {where.world} ranks")


def find_tokenizer(args, patch, state, where):
    """The tokenizer whose codes are predicted, or None for pixels: the one in the checkpoint, that of --tokenizer, or out/vq."""
    if args.target == "pixel":
        return None
    if state:
        return load_tokenizer(state["tokenizer"], patch).to(where.device)
    if args.tokenizer is None and args.bench:
        where.say("no --tokenizer: a random one, the time is the same")
        size = dict(codes=8192) if patch == 16 else dict(codes=512, hidden=256, width=128)
        return Tokenizer(TokenizerConfig(patch=patch, **size)).requires_grad_(False).to(where.device)
    if args.tokenizer is None and Path("out/vq/ckpt.pt").exists():
        args.tokenizer = "out/vq/ckpt.pt"
        where.say("codes of out/vq/ckpt.pt (--tokenizer FILE for others)")
    if args.tokenizer is None:
        raise BadInput(f"--target {args.target} needs a tokenizer, and there is no out/vq/ckpt.pt: make it with "
                       f"python tokenize_vq.py --patch {patch}{f' --data {args.data}' if args.data else ''}, or name one with --tokenizer")
    return load_tokenizer(args.tokenizer, patch).to(where.device)


def same_codes(path, tokenizer):
    """Whether the model in `path` predicted the codes of this very tokenizer."""
    theirs, ours = (load_checkpoint(path).get("tokenizer") or {}).get("model", {}), tokenizer.state_dict()
    return theirs.keys() == ours.keys() and all(torch.equal(w, ours[k].cpu()) for k, w in theirs.items())


# ---------------------------------------------------------------- data


def micro_batches(first_step, args, where):
    """Endless lists of sample numbers for this rank's loader, from step `first_step` on.

    A step takes `batch` successive samples; micro-batch a of rank r is the (a · world + r)th run of `micro` of them.
    """
    step, a = first_step, 0
    while True:
        start = step * args.batch + (a * where.world + where.rank) * args.micro
        yield list(range(start, start + args.micro))
        a += 1
        if a * where.world * args.micro == args.batch:
            step, a = step + 1, 0


def draw_prefixes(step, G, args):
    """Prefix lengths U{0, …, G−1} of a step's whole batch [B], the same on every rank."""
    if args.attention == "causal":
        return np.zeros(args.batch, np.int64)
    return np.random.default_rng([args.seed, 2, step]).integers(G, size=args.batch)


def validation_set(data, G, args, where):
    """This rank's share of the sequences to validate with, each with a prefix of its own, the same at each validation."""
    sets = []
    for n in range(where.rank, args.val_samples * len(data.kinds), where.world):
        prefix = 0 if args.attention == "causal" else int(np.random.default_rng([args.seed, 3, n]).integers(G))
        sets.append({**data[n], "prefix": prefix})
    size = min(args.micro, 16)
    return [torch.utils.data.default_collate(sets[i:i + size]) for i in range(0, len(sets), size)]


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, batches, where):
    """Mean squared error of the targets of each kind, over all ranks: {kind: loss}."""
    sums = torch.zeros(len(KINDS), 2, dtype=torch.float64, device=where.device)        # squared error, targets
    for batch in batches:
        b = to_device(batch, where.device)
        with where.autocast():
            errors, _ = model(b["volume"], b["prefix"], b["window"], per_patch=True)   # [B, G]
        targets = errors.shape[1] - b["prefix"]
        sums.index_add_(0, b["kind"], torch.stack([errors.double().sum(1), targets.double()], 1))
    sums = where.sum(sums).cpu()
    return {k: (sums[i, 0] / sums[i, 1]).item() for i, k in enumerate(KINDS) if sums[i, 1]}


@torch.no_grad()
def trivial_predictors(model, batches, G, where):
    """What two predictors that know nothing reach on the very same targets: {kind: (mean, copy, distance)}.

    mean: a patch's own mean, 0 once standardised (loss 1, less for patches of one value). copy: the patch `distance`
    places earlier in the sequence, scaled by least squares, both fitted to these targets; where there is none, the mean.
    """
    # products, squares of the earlier patch, squares of the targets, voxels of the targets; a column a distance
    sums = torch.zeros(len(KINDS), 4, G, dtype=torch.float64, device=where.device)
    apart = torch.arange(G)[:, None] - torch.arange(G)
    for batch in batches:
        for sample in range(len(batch["volume"])):
            b = {k: v[sample:sample + 1].to(where.device) for k, v in batch.items()}
            t = standardise(model.sequence(b["volume"], b["window"])[0])[0][0]         # [G, P³]
            first = b["prefix"].item()
            gram = (t @ t.T).double()                                                  # [G, G]
            rows, cols = (apart[first:] > 0).nonzero(as_tuple=True)
            rows, d = rows + first, apart[rows + first, cols]
            s = sums[b["kind"].item()]
            s[0].index_add_(0, d.to(where.device), gram[rows, cols])
            s[1].index_add_(0, d.to(where.device), gram.diagonal()[cols.to(where.device)])
            s[2] += gram.diagonal()[first:].sum()
            s[3] += (G - first) * t.shape[1]
    sums, found = where.sum(sums).cpu(), {}
    for i, kind in enumerate(KINDS):
        product, earlier, total, n = sums[i]
        if n[0]:
            gain = product[1:].clamp(min=0) ** 2 / earlier[1:].clamp(min=1e-12)
            found[kind] = ((total / n)[0].item(), ((total[0] - gain.max()) / n[0]).item(), int(gain.argmax()) + 1)
    return found


@torch.no_grad()
def evaluate_codes(model, tokenizer, batches, where):
    """Scores of the predicted codes of each kind, over all ranks: {kind: {"nats", "top1", "top5"[, "pixels"]}}, means a code.

    pixels, with --target both, is the mean squared error of the standardised voxels.
    """
    sums = torch.zeros(len(KINDS), 5, dtype=torch.float64, device=where.device)        # nats, top 1, top 5, error, targets
    for batch in batches:
        b = to_device(batch, where.device)
        codes = tokenizer.encode(b["volume"], b["window"])                             # [B, G, g]
        with where.autocast():
            errors, pred = model(b["volume"], b["prefix"], b["window"], per_patch=True, codes=codes)
        pixels, nats = errors if errors.ndim == 3 else (torch.zeros_like(errors), errors)
        scores = pred[1] if isinstance(pred, tuple) else pred                          # [B, G, g, K]
        order = model.sequence(b["volume"], b["window"])[2]
        true = codes if order is None else codes[:, order]
        hits = scores.topk(min(5, scores.shape[-1]), -1).indices == true[..., None]    # [B, G, g, 5]
        counted = torch.arange(nats.shape[1], device=where.device) >= b["prefix"][:, None]
        rows = [nats, hits[..., 0].float().mean(-1) * counted, hits.any(-1).float().mean(-1) * counted, pixels, counted]
        sums.index_add_(0, b["kind"], torch.stack([r.double().sum(1) for r in rows], 1))
    sums = where.sum(sums).cpu()
    means = sums[:, :4] / sums[:, 4:].clamp(min=1)
    names = ("nats", "top1", "top5", "pixels") if model.config.target == "both" else ("nats", "top1", "top5")
    return {k: dict(zip(names, means[i].tolist())) for i, k in enumerate(KINDS) if sums[i, 4]}


@torch.no_grad()
def unigram_entropy(model, tokenizer, batches, where):
    """Nats a code that the best predictor without context reaches on the very same targets: {kind: entropy}.

    It knows how often each code occurs among these targets, which is more than it should: no unigram predictor does better.
    """
    c = tokenizer.config
    counts = torch.zeros(len(KINDS), c.groups, c.codes, dtype=torch.float64, device=where.device)
    for batch in batches:
        b = to_device(batch, where.device)
        codes = tokenizer.encode(b["volume"], b["window"])
        order = model.sequence(b["volume"], b["window"])[2]
        codes = codes if order is None else codes[:, order]
        counted = torch.arange(codes.shape[1], device=where.device) >= b["prefix"][:, None]
        at = (b["kind"][:, None, None] * c.groups + torch.arange(c.groups, device=where.device)) * c.codes + codes
        counts.view(-1).index_add_(0, at[counted].flatten(), torch.ones(at[counted].numel(), dtype=torch.float64, device=where.device))
    counts = where.sum(counts).cpu()
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(-1).mean(-1)
    return {k: entropy[i].item() for i, k in enumerate(KINDS) if counts[i].sum()}


# ---------------------------------------------------------------- pictures


def draw_code_curves(path, rows, entropy):
    val = [r for r in rows if "val_loss" in r]
    fig, [(left, right)] = figure_of((11, 4), 1, 2)
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange", "tab:green")):
        points = [r for r in val if f"nats_{kind}" in r]
        if points:
            steps = [r["step"] for r in points]
            left.plot(steps, [r[f"nats_{kind}"] for r in points], "o-", ms=3, color=colour, label=f"validation, {kind}")
            left.axhline(entropy[kind], color=colour, ls=":", lw=1, label=f"unigram entropy, {kind}")
            for name, style in (("top1", "-"), ("top5", "--")):
                right.plot(steps, [r[f"{name}_{kind}"] for r in points], style, color=colour, label=f"{name}, {kind}")
    left.set(xlabel="step", ylabel="nats a code", title="next-patch prediction: cross-entropy of the codes")
    right.set(xlabel="step", ylabel="accuracy", title="the true code is the first, or one of five")
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save_figure(fig, path)


def draw_curves(path, rows, trivial):
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    val = [r for r in rows if "val_loss" in r]
    fig, [[ax]] = figure_of((8, 5))
    if train:
        ax.plot(*zip(*train), color="0.75", lw=1, label="training")
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange", "tab:green")):
        points = [(r["step"], r[f"val_{kind}"]) for r in val if f"val_{kind}" in r]
        if points:
            ax.plot(*zip(*points), "o-", ms=3, color=colour, label=f"validation, {kind}")
            ax.axhline(trivial[kind][1], color=colour, ls=":", lw=1, label=f"an earlier patch, {kind} ({trivial[kind][2]} back)")
    ax.axhline(np.mean([t[0] for t in trivial.values()]), color="k", ls="--", lw=1, label="the patch mean")
    ax.set(xlabel="step", ylabel="mean squared error of standardised patches", title="next-patch prediction")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.grid(alpha=0.3)
    save_figure(fig, path)


@torch.no_grad()
def draw_samples(path, model, data, where, args, tokenizer=None):
    """For one sequence of each kind: truth, what the prefix shows, predicted patches with their own mean and scale.

    Where codes are predicted, the decoded codes of the truth and the predicted ones, instead or as well.
    """
    names = ["truth: the middle slice of each sub-image", "what the prefix shows"]
    names += ["each next patch, predicted from the true ones before it"] * (args.target != "vq")
    names += ["the truth's codes, decoded", "each next code, predicted from what precedes it"] * (tokenizer is not None)
    fig, axes = figure_of((4.6 / 3 * len(names) * args.images, 1.8 * len(data.kinds)), len(data.kinds), len(names))
    middle = [s * data.depth + data.depth // 2 for s in range(args.images)]
    for row, kind in enumerate(data.kinds):
        b = to_device(torch.utils.data.default_collate([data[row]]), where.device)
        patches, grid, order = model.sequence(b["volume"], b["window"])
        G = patches.shape[1]
        prefix = torch.full((1,), G // 4, device=where.device)
        codes = None if tokenizer is None else tokenizer.encode(b["volume"], b["window"])
        with where.autocast():
            _, pred = model.forward(b["volume"], prefix, b["window"], codes=codes)  # not the compiled one: a single picture
        pixels, scores = pred if isinstance(pred, tuple) else (pred, pred)
        _, mean, scale = standardise(patches)
        shown = torch.arange(G, device=where.device)[:, None] < prefix
        back = torch.arange(G, device=where.device) if order is None else torch.argsort(order)  # to the numbering of patchify
        views = [patches, patches.where(shown, torch.nan)]
        if args.target != "vq":
            views.append(patches.where(shown, pixels.float() * scale + mean))
        views = [unpatchify(view[:, back], grid) for view in views]
        if tokenizer is not None:
            guess = codes.where(shown[back], scores.argmax(-1)[:, back])
            views += [tokenizer.decode(codes, grid), tokenizer.decode(guess, grid)]
        for i, (name, view) in enumerate(zip(names, views)):
            volume = view[0].clamp(0, 1).cpu()
            ax = axes[row, i]
            ax.imshow(torch.cat([volume[:, :, z] for z in middle]).T, cmap="gray", origin="lower", vmin=0, vmax=1)
            ax.set_facecolor("tab:blue")
            ax.set(xticks=[], yticks=[], ylabel=None if i else kind, title=None if row else name)
    fig.tight_layout()
    save_figure(fig, path)


# ---------------------------------------------------------------- training step


def weigh(loss, args):
    """The loss that is minimised: as it is, or of the pair (pixels, codes) of --target both."""
    return (1 - args.code_weight) * loss[0] + args.code_weight * loss[1] if args.target == "both" else loss


def train_step(net, batches, prefixes, G, optimiser, lr, args, where, logged=False, tokenizer=None):
    """One optimiser step on this rank's micro-batches: its part of the batch's loss and, when logged, the gradient norm.

    # departs: the published code averages the means of the GPUs; here each target of the global batch weighs the same,
    # so that the gradient does not depend on how the batch is spread over GPUs and passes.
    """
    targets = args.batch * G - int(prefixes.sum())
    passes = args.batch // (args.micro * where.world)
    total = torch.zeros((), device=where.device)
    for a in range(passes):
        b = to_device(next(batches), where.device)
        mine = prefixes[(a * where.world + where.rank) * args.micro:][:args.micro]
        share = (args.micro * G - int(mine.sum())) / targets
        prefix = torch.from_numpy(mine).to(where.device, non_blocking=True)
        if where.world > 1:
            net.require_backward_grad_sync = a == passes - 1
        codes = None if tokenizer is None else tokenizer.encode(b["volume"], b["window"])
        with where.autocast():
            loss, _ = net(b["volume"], prefix, b["window"], codes=codes)
        loss = weigh(loss, args)
        (loss * (share * where.world)).backward()  # the ranks' gradients are averaged
        total += loss.detach() * share
    norm = None
    if args.clip:
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    elif logged:
        norm = torch.nn.utils.get_total_norm([w.grad for w in net.parameters()])
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total, norm


def make_optimiser(model, args):
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.wd, betas=(0.9, args.beta2), fused=True)


# ---------------------------------------------------------------- bench


def bench(model, net, G, args, where, tokenizer):
    """Steps of one forward pass a rank on random voxels: time, share of the machine's matrix rate, peak memory."""
    cuda = where.device.type == "cuda"
    args.batch = args.micro * where.world
    gen = torch.Generator().manual_seed(args.seed)
    volume = torch.randint(-1000, 1000, (args.micro, *[args.volume] * 3), generator=gen, dtype=torch.int16)
    window = torch.tensor([-900.0, 900.0]).expand(args.micro, args.images, 2)
    batch = dict(volume=volume.to(where.device), window=window.to(where.device))
    rate = matmul_rate(where.device, where.dtype, 2.0)
    optimiser = make_optimiser(model, args)
    wait = torch.cuda.synchronize if cuda else lambda: None
    times, flops = [], []
    for step in range(25 if cuda else 5):
        prefixes = draw_prefixes(step, G, args)
        wait()
        start = time.perf_counter()
        train_step(net, iter([batch]), prefixes, G, optimiser, args.lr, args, where, tokenizer=tokenizer)
        wait()
        times.append(time.perf_counter() - start)
        mine = prefixes[where.rank * args.micro:][:args.micro]
        flops.append(sum(model.flops([args.volume] * 3, p) for p in mine))
    skip = 5 if cuda else 2
    seconds, achieved = float(np.median(times[skip:])), float(np.median(np.divide(flops, times)[skip:]))
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    again = matmul_rate(where.device, where.dtype, 2.0)
    rate = max(rate, again)
    where.say(f"{name}, torch {torch.__version__}, {str(where.dtype)[6:]}, {args.size}, {args.micro} x {args.volume}³, {G} tokens\n"
              f"matrix rate        {rate / 1e12:8.3f} TFLOP/s ({'8192' if cuda else '2048'}² product, best of many)\n"
              f"step               {1e3 * seconds:8.1f} ms (median of {len(times) - skip}): {args.micro / seconds:.2f} sequences/s, "
              f"{args.micro * G / seconds:,.0f} tokens/s\n"
              f"model FLOP         {achieved / 1e12:8.3f} TFLOP/s = {achieved / rate:.1%} of the matrix rate\n"
              f"peak memory        {peak_memory(where.device) / 2 ** 30:8.2f} GiB")
    if tokenizer is not None:
        times = []
        for _ in range(10):
            wait()
            start = time.perf_counter()
            tokenizer.encode(batch["volume"], batch["window"])
            wait()
            times.append(time.perf_counter() - start)
        found, c = float(np.median(times[2:])), tokenizer.config
        where.say(f"finding codes      {1e3 * found:8.1f} ms (median of {len(times) - 2}): {found / seconds:.1%} of the step; "
                  f"{c.groups} x {c.codes} codes of {c.patch}³ voxels")


# ---------------------------------------------------------------- main


def main():
    p = parser()
    args = p.parse_args()
    out = Path(args.out)
    state = None
    if args.resume and (out / "ckpt.pt").exists():
        state = load_checkpoint(out / "ckpt.pt", FORMAT)
        if "optimiser" not in state:
            raise BadInput(f"{out / 'ckpt.pt'}: holds weights alone; --init starts from them")
        args = resumed_args(p, state["args"], FREE)

    # devices
    where = place(args.device, args.dtype, args.seed)
    stop = StopRequest()
    settle(args, where)
    config = Config(**SIZES[args.size], images=args.images, order=args.order)
    tokenizer = find_tokenizer(args, config.patch, state, where)
    if tokenizer is not None:
        config = replace(config, target=args.target, codes=tokenizer.config.codes, groups=tokenizer.config.groups)
    shape = [args.volume] * 3
    G = int(np.prod(grid_of(shape, config.patch)))

    # model
    torch.manual_seed(args.seed)
    if args.init and state is None:
        model = load_pretrained(args.init, config.heads)
        if asdict(model.config) != asdict(config):
            have = {k: v for k, v in asdict(model.config).items() if v != asdict(config)[k]}
            want = {k: asdict(config)[k] for k in have}
            if set(have) - {"order", "images", "target", "codes", "groups"}:
                raise BadInput(f"--init {args.init}: its model has {have}, this run {want}; choose another --size")
            where.say(f"--init {args.init}: pre-trained with {have}, goes on with {want}")
            model.config = config
        if config.target != "pixel" and not same_codes(args.init, tokenizer):
            where.say(f"--init {args.init}: predicted no codes, or others; the head starts anew")
            model.head = Model(config).head
        elif model.head.out_features != config.outputs:
            model.head = Model(config).head
    else:
        model = Model(config)
    if state:
        fit(model, state["model"], out / "ckpt.pt")
    kernels, why = choose(args.kernels, where.device)
    model.to(where.device).use(kernels)
    where.say(f"--kernels {args.kernels}: {kernels} ({why})")
    where.say(f"{args.size}: {sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters, {G} tokens, "
              f"{str(where.dtype)[6:]} on {where.world} x {where.device.type}; a step is {args.batch} sequences: "
              f"{where.world} ranks x {args.batch // where.world // args.micro} passes x {args.micro}")
    if args.compile:
        model.compile()
    net = model
    if where.world > 1:
        net = DistributedDataParallel(model, device_ids=[where.device.index] if where.device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    if args.bench:
        return bench(model, net, G, args, where, tokenizer)

    # data
    corpus = args.data = find_corpus(where, args.data)
    sequences = dict(corpus=corpus, size=args.volume, images=args.images, stride=args.stride, seed=args.seed)
    probe = Sequences(**sequences, split="train")
    train = Sequences(**sequences, split="train", mix=parse_mix(args.mix, probe.have))
    val = Sequences(**sequences, split="val")
    lacking = [k for k in train.kinds if k not in val.kinds]
    where.say(f"{corpus}: train {train.have}, val {val.have}, mix {args.mix}"
              + (f"; too few patients to validate {', '.join(lacking)}" if lacking else ""))
    if args.steps is None:
        args.steps = max(1, round(args.epochs * sum(PUBLISHED[k] * probe.have[k] for k in probe.kinds) / args.batch))
    val_batches = validation_set(val, G, args, where)
    trivial = trivial_predictors(model, val_batches, G, where) if args.target != "vq" else None
    entropy = unigram_entropy(model, tokenizer, val_batches, where) if tokenizer is not None else None

    if args.probe_every:
        labelled, unseen, classes, _ = labelled_cases(args.probe_task, args.probe_data, None, None, None, (6, 3), where)

    # resume, optimiser
    optimiser = make_optimiser(model, args)
    first, best = 0, float("inf")
    if state:
        if Path(corpus).resolve() != Path(state["args"]["data"]).resolve():
            where.say(f"goes on with {corpus} instead of {state['args']['data']}")
        optimiser.load_state_dict(state["optimiser"])
        first, best = state["step"], state["best"]
    elif where.main:
        if args.resume:
            where.say(f"no checkpoint in {out}: starting at step 0")
        keep_earlier_run(out, where.say)
    if where.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", resume_step=first if state else None)
        write_json(out / "args.json", vars(args))
    loader = torch.utils.data.DataLoader(train, batch_sampler=micro_batches(first, args, where), num_workers=args.workers,
                                         pin_memory=where.device.type == "cuda", prefetch_factor=2 if args.workers else None)
    batches = iter(loader)
    rate = matmul_rate(where.device, where.dtype)
    if state:
        set_random_states(state["random"], where)
    flops = model.flops(shape, 0 if args.attention == "causal" else None) * args.batch / where.world

    kept = {} if tokenizer is None else dict(tokenizer=tokenizer_state(tokenizer))  # a few per cent of the weights: no file to lose

    def save(step):
        states = random_states(where)
        if where.main:
            save_checkpoint(out / "ckpt.pt", **checkpoint_state(model), **kept, optimiser=optimiser.state_dict(), step=step,
                            samples=step * args.batch, best=best, random=states, args=vars(args))

    def validate(step):
        nonlocal best
        if tokenizer is None:
            losses = evaluate(model, val_batches, where)
            notes = {f"copy_{k}": trivial[k][1] for k in losses} | {f"mean_{k}": trivial[k][0] for k in losses}
        else:
            scores = evaluate_codes(model, tokenizer, val_batches, where)
            losses = {k: weigh((s.get("pixels"), s["nats"]), args) if args.target == "both" else s["nats"] for k, s in scores.items()}
            notes = {f"{name}_{k}": v for k, s in scores.items() for name, v in s.items()} | {f"entropy_{k}": v for k, v in entropy.items()}
        mean = float(np.mean(list(losses.values())))
        where.say(f"step {step:>6}: validation " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
        if where.main:
            log.write(step=step, val_loss=mean, **{f"val_{k}": v for k, v in losses.items()}, **notes)
            if tokenizer is None:
                draw_curves(out / "curves.png", read_log(out / "log.jsonl"), trivial)
            else:
                draw_code_curves(out / "curves.png", read_log(out / "log.jsonl"), entropy)
            if mean < best:
                save_checkpoint(out / "best.pt", **checkpoint_state(model), **kept, step=step, val_loss=mean)
        best = min(best, mean)
        return losses if tokenizer is None else scores

    def probe_tokens(step):
        """How well frozen patch tokens tell organs apart; draws no random number, so that the run stays the same."""
        def encode(x):
            with where.autocast():
                return model.encode(x.to(where.device))[0]
        found = dense_probe(encode, [c[:2] for c in labelled], [c[:2] for c in unseen], len(classes) + 1, config.patch, shape)
        knn, linear = (found[k]["f1"] for k in ("knn", "linear"))
        where.say(f"step {step:>6}: organs from frozen tokens, F1 {knn:.3f} by neighbours, {linear:.3f} linear")
        log.write(step=step, probe_knn_f1=knn, probe_linear_f1=linear)

    # loop
    if first == 0:
        validate(0)
        if args.probe_every and where.main:
            probe_tokens(0)
    last = min(args.steps, first + args.stop_after) if args.stop_after else args.steps
    running, since = torch.zeros((), device=where.device), first
    bar = tqdm(total=args.steps, initial=first, disable=not where.main, mininterval=1, desc="pre-training", unit="step")
    clock, step, losses = time.perf_counter(), first, None
    ask_often = where.world == 1 or where.device.type == "cpu"  # whether to stop: asking costs a GPU its queue
    while step < last:
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        stopping = ask_often and stop.agreed(where)
        logged = (step + 1) % args.log_every == 0 or step + 1 == last or stopping
        loss, norm = train_step(net, batches, draw_prefixes(step, G, args), G, optimiser, lr, args, where, logged, tokenizer)
        running += loss
        step += 1
        bar.update()
        if logged:
            stopping = stopping or stop.agreed(where)
            mean = where.sum(running).item() / (step - since)
            seconds = where.sum(torch.tensor(time.perf_counter() - clock, device=where.device)).item() / where.world
            speed = (step - since) / seconds
            ask_often = ask_often or speed < 1
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if where.main:
                log.write(step=step, loss=mean, lr=lr, grad_norm=norm.item(), samples_per_s=speed * args.batch,
                          mfu=speed * flops / rate, seconds=seconds)
            running, since, clock = torch.zeros_like(running), step, time.perf_counter()
        pause = time.perf_counter()
        if step % args.val_every == 0 or step == args.steps:
            losses = validate(step)
        if args.probe_every and where.main and step % args.probe_every == 0:
            probe_tokens(step)
        if step % args.save_every == 0 or step == last or stopping:
            save(step)
        clock += time.perf_counter() - pause  # samples_per_s and mfu are of training alone
        if stopping:
            break
    bar.close()

    if step < args.steps:
        where.say(f"stopped at step {step} of {args.steps}, saved in {out / 'ckpt.pt'}: --resume goes on")
        return
    losses = losses or (evaluate(model, val_batches, where) if tokenizer is None else evaluate_codes(model, tokenizer, val_batches, where))
    if where.main:
        draw_samples(out / "samples.png", model, val, where, args, tokenizer)
        if tokenizer is None:
            report(losses, trivial, step, out, where)
        else:
            report_codes(losses, entropy, trivial, step, out, where)


def report(losses, trivial, step, out, where):
    where.say(f"{'validation':>10}  {'loss':>6}  {'patch mean':>10}  {'earlier patch':>13}  loss / patch mean")
    for k, v in losses.items():
        mean, copy, distance = trivial[k]
        where.say(f"{k:>10}  {v:6.3f}  {mean:10.3f}  {copy:6.3f} ({distance:3} back)  {v / mean:.3f}")
    write_json(out / "metrics.json", dict(step=step, val=losses, patch_mean={k: t[0] for k, t in trivial.items()},
               earlier_patch={k: t[1] for k, t in trivial.items()}, distance={k: t[2] for k, t in trivial.items()}))
    where.say("wrote " + ", ".join(str(out / f) for f in ("ckpt.pt", "best.pt", "log.jsonl", "metrics.json", "curves.png", "samples.png")))


def report_codes(scores, entropy, trivial, step, out, where):
    where.say(f"{'validation':>10}  {'nats':>6}  {'unigram entropy':>15}  {'below it':>8}  {'top-1':>6}  {'top-5':>6}"
              + (f"  {'pixels':>6}  patch mean" if trivial else ""))
    for k, s in scores.items():
        where.say(f"{k:>10}  {s['nats']:6.3f}  {entropy[k]:15.3f}  {1 - s['nats'] / max(entropy[k], 1e-12):8.1%}  {s['top1']:6.1%}  {s['top5']:6.1%}"
                  + (f"  {s['pixels']:6.3f}  {trivial[k][0]:10.3f}" if trivial else ""))
    write_json(out / "metrics.json", dict(step=step, val=scores, unigram_entropy=entropy)
               | (dict(patch_mean={k: t[0] for k, t in trivial.items()}) if trivial else {}))
    where.say("wrote " + ", ".join(str(out / f) for f in ("ckpt.pt", "best.pt", "log.jsonl", "metrics.json", "curves.png", "samples.png")))


if __name__ == "__main__":
    cli(main)
    leave()
