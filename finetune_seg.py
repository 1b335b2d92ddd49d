"""Segmentation: UNETR on the pre-trained encoder, for AMOS, six tasks of the Decathlon, the left atrium, or your own folder.

    python finetune_seg.py --task phantom              # CPU demo on made-up patients, nano: 6 minutes on two cores, Dice 0.64
    python finetune_seg.py --task amos --data data/amos --init out/pretrain/ckpt.pt    # one GPU, the published recipe
    python finetune_seg.py --task amos --preset quick  # a first result
    torchrun --nproc_per_node=4 finetune_seg.py --task amos                            # four GPUs, the same run
    python finetune_seg.py --task amos --labels 0.1 --out out/seg-amos-10              # a tenth of the labels
    python finetune_seg.py --task mine --data DIR --classes liver tumour --window -20 190 --spacing 1 1 1.5
    python finetune_seg.py --task amos --resume        # goes on where out/seg-amos/ckpt.pt left off, exactly

Scans are prepared once (RAS+, resampled, windowed, cut to the foreground) and kept in --cache; a run leaves in --out:
args.json, subset.json, skipped.csv, log.jsonl, ckpt.pt (resumable), best.pt (highest mean Dice), metrics.json, curves.png,
overlay.png. Every random choice is a function of (seed, sample), so any number of workers or GPUs trains one model.

Sections: arguments · preparation · crops · augmentation · loss · evaluation · pictures · training step · bench · main

B crops of a batch, K classes with the background, X Y Z voxels.
"""
import argparse
import csv
import hashlib
import os
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (BadInput, Log, StopRequest, cli, cores, cosine_lr, draw_overlay, keep_earlier_run, label_subset, leave, load_checkpoint,
                    parallel, peak_memory, place, random_states, read_json, read_log, resumed_args, save_checkpoint,
                    set_random_states, write_beside, write_json)
from kernels import choose
from model import (SEGMENTER, SIZES, Config, Model, Segmenter, fit, layer_decay_groups, load_pretrained,
                   overlap_counts, sliding_window)
from serialize import OWN_TASK, SEG_TASKS, find_cases, nearest, prepare, prepare_labels, read_case, window_of_case

# ---------------------------------------------------------------- arguments

PUBLISHED = dict(roi=(96, 96, 96), epochs=1000, batch=4, crops=4, lr=3e-4, wd=0.05, decay=0.75, warmup=0.05, overlap=0.75, flip=0.2, rotate=0.2,
                 intensity=0.1, clip=0.0, augment="standard", vals=20)
SCRATCH = dict(lr=1e-4, wd=1e-5)
PRESETS = {  # what departs from the published recipe
    "published": {},
    "quick": dict(steps=6000, batch=2, overlap=0.5, vals=6),
    "nano": dict(roi=(64, 64, 64), spacing=(4.5, 4.5, 4.5), steps=700, batch=1, crops=1, lr=2e-3, decay=1.0, warmup=0.05, overlap=0.5,
                 flip=0.0, rotate=0.0, intensity=0.3, clip=1.0, vals=4, augment="standard"),
}
FREE = {"resume", "data", "cache", "out", "device", "workers", "micro", "kernels", "compile", "log_every", "save_every", "stop_after"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--out", help="folder of the run (default out/seg-TASK)")
    g.add_argument("--preset", choices=list(PRESETS), help="published (the default with CUDA), quick, or nano (the default without)")
    g.add_argument("--resume", action="store_true", help="go on from out/ckpt.pt with the arguments of that run; a fresh start if there is none")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--stop-after", type=int, metavar="N", help="save and leave after N steps of this call")
    g.add_argument("--bench", action="store_true", help="crops/s of the loader, and a training step's share of waiting for it; writes nothing")
    g = p.add_argument_group("data")
    g.add_argument("--task", help=f"{', '.join(SEG_TASKS)}, or a name of your own with --data")
    g.add_argument("--data", help="folder in the Decathlon layout (default data/TASK; the phantom makes its own)")
    g.add_argument("--cache", default="data/cache", help="where prepared scans are kept (default %(default)s)")
    g.add_argument("--classes", nargs="+", help="names of labels 1, 2, … (default: the task's, else those of dataset.json)")
    g.add_argument("--window", nargs="+", help="LOW HIGH, percentiles or zscore (default: the task's, else percentiles)")
    g.add_argument("--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"), help="mm (default: the task's; nano 4.5)")
    g.add_argument("--labels", type=float, default=1.0, metavar="SHARE", help="of the training patients; smaller sets are parts of larger ones (default 1)")
    g = p.add_argument_group("model")
    g.add_argument("--init", metavar="FILE", help="scratch, a checkpoint of pretrain.py, or the published file (default: out/pretrain/ckpt.pt if it is there)")
    g.add_argument("--size", choices=list(SIZES), help="with --init scratch (default base with CUDA, nano without)")
    g.add_argument("--features", type=int, default=16, help="feature size of UNETR's decoder (published: 16)")
    g.add_argument("--freeze", action="store_true", help="train the decoder alone")
    g = p.add_argument_group("crops and augmentation")
    g.add_argument("--roi", nargs="+", type=int, help="edges in voxels, one or three (published: 96; la 192 192 64; nano 64)")
    g.add_argument("--foreground", type=float, default=0.5, help="share of the crops centred on a labelled voxel, its class drawn first (published: 0.5)")
    g.add_argument("--augment", choices=["none", "standard", "strong"], help="standard: the three below; strong: --flip and la's recipe (published: standard; la strong)")
    g.add_argument("--flip", type=float, help="probability an axis (published: 0.2; la mirrors, here 0.5; nano 0)")
    g.add_argument("--rotate", type=float, help="probability of a rotation by 90, 180 or 270° about z (published: 0.2; nano 0)")
    g.add_argument("--intensity", type=float, help="probability of a scale, and of a shift, by up to 10 %% (published: 0.1; nano 0.3)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, help="passes over the training volumes (published: 1000; pancreas, hepaticvessel 500)")
    g.add_argument("--steps", type=int, help="optimiser steps instead (quick 6000; nano 700)")
    g.add_argument("--batch", type=int, help="volumes a step, over all ranks (published: 4; quick 2; nano 1)")
    g.add_argument("--crops", type=int, help="crops of each volume (published: 4; nano 1)")
    g.add_argument("--micro", type=int, help="volumes a forward pass on one device (default: this rank's share of the batch)")
    g.add_argument("--lr", type=float, help="peak learning rate (published: 3e-4, from scratch 1e-4; nano 2e-3)")
    g.add_argument("--wd", type=float, help="AdamW weight decay (published: 0.05, from scratch 1e-5)")
    g.add_argument("--beta2", type=float, default=0.95, help="AdamW's second decay (published: 0.95)")
    g.add_argument("--decay", type=float, help="of the learning rate from layer to layer, downwards (published: 0.75; la 0.9; nano 1, none)")
    g.add_argument("--warmup", type=float, help="share of the run (published: 0.05, 50 epochs of 1000)")
    g.add_argument("--clip", type=float, help="gradient norm (published: 0, off; nano 1)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the products; losses are in float32 always")
    g.add_argument("--compile", action="store_true", help="torch.compile")
    g.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto", help="auto: Triton's (kernels/) on CUDA, else PyTorch")
    g.add_argument("--workers", type=int, help="loader processes a rank (default: 4 with CUDA, 0 without)")
    g = p.add_argument_group("validation and reports")
    g.add_argument("--overlap", type=float, help="of the sliding windows (published: 0.75; quick and nano 0.5)")
    g.add_argument("--windows", type=int, default=4, help="windows a forward pass (default %(default)s)")
    g.add_argument("--mirror", action="store_true", help="average the predictions of all eight mirror images")
    g.add_argument("--val-every", type=int, help="steps (published: a twentieth of the run, 50 epochs; quick a sixth, nano a quarter)")
    g.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    g.add_argument("--save-every", type=int, help="steps (default: at each validation)")
    return p


def settle(args, where):
    """Fill in what was not given, in place, and say what follows from the machine. Returns the task with its classes."""
    cuda = where.device.type == "cuda"
    if args.task not in SEG_TASKS and not args.data:
        raise BadInput(f"--task {args.task}: {', '.join(SEG_TASKS)}, or a name of your own with --data DIR in the Decathlon layout")
    task = SEG_TASKS.get(args.task, OWN_TASK)
    if args.preset is None:
        args.preset = "published" if cuda else "nano"
        if not cuda:
            where.say("no CUDA device: --preset nano on the CPU (--preset published is the published recipe)")
    if args.init is None:
        args.init = "out/pretrain/ckpt.pt" if Path("out/pretrain/ckpt.pt").exists() else "scratch"
        where.say(f"--init {args.init}" + (": no out/pretrain/ckpt.pt, so the encoder starts untrained" if args.init == "scratch" else ""))
    recipe = {**PUBLISHED, **(SCRATCH if args.init == "scratch" else {}), "spacing": task["spacing"], **task.get("recipe", {}), **PRESETS[args.preset]}
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.roi = list(args.roi) * 3 if len(args.roi) == 1 else list(args.roi)
    args.spacing = args.spacing and [float(s) for s in args.spacing]
    args.window = parse_window(args.window or task["window"])
    args.data = args.data or ("data/phantom/amos" if args.task == "phantom" else f"data/{args.task}")
    args.out = args.out or f"out/seg-{args.task}"
    args.workers = (4 if cuda else 0) if args.workers is None else args.workers
    for name in ("batch", "crops", "windows", "log_every"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if len(args.roi) != 3 or not 0 <= args.overlap < 1:
        raise BadInput(f"--roi {args.roi} --overlap {args.overlap}: one or three edges, and an overlap from 0 to below 1")
    if args.rotate and args.augment == "standard" and args.roi[0] != args.roi[1]:
        raise BadInput(f"--roi {args.roi} --rotate {args.rotate}: a rotation by 90° needs equal edges along x and y; --rotate 0")
    if args.batch % where.world:
        raise BadInput(f"--batch {args.batch} does not divide over {where.world} ranks")
    share = args.batch // where.world
    args.micro = share if args.micro is None else args.micro
    if args.micro < 1 or share % args.micro:
        raise BadInput(f"--micro {args.micro} does not divide the {share} volumes of a step on each of {where.world} ranks")
    return task


def parse_window(words):
    if words in (["percentiles"], ["zscore"]) or isinstance(words, str):
        return words if isinstance(words, str) else words[0]
    try:
        low, high = (float(w) for w in words)
    except ValueError:
        low = high = 0
    if low >= high:
        raise BadInput(f"--window {' '.join(map(str, words))}: LOW HIGH with LOW below HIGH, percentiles, or zscore")
    return [low, high]


# ---------------------------------------------------------------- preparation
# A prepared case is four files: ID.image.npy (float16), ID.label.npy (uint8), ID.voxels.npy (int16 [n, 3], up to 10,000 a
# class, class after class) and, written last, ID.json.

VERSION = 1  # of the files below; another one is another folder


def prepare_all(cases, classes, task, args, where):
    """Prepare what the cache does not hold yet, ranks sharing the work: the usable cases, and (id, reason) of the others."""
    key = hashlib.blake2b(repr((VERSION, os.path.abspath(args.data), args.spacing, len(classes))).encode(), digest_size=4).hexdigest()
    folder = Path(args.cache) / f"{args.task}-{key}"
    jobs = [dict(c, folder=str(folder), spacing=args.spacing, window=window_of_case(c, args.window, task.get("mr_after")), K=len(classes) + 1) for c in cases]
    for job in jobs:
        found = [os.stat(job[f]) for f in ("image", "label") if os.path.exists(job[f])]
        job["stamp"] = [[s.st_size, s.st_mtime_ns] for s in found] + [job["window"]]
    done = [prepared(j) for j in jobs]
    where.say(f"{len(jobs)} cases, {sum(done)} of them prepared in {folder} already")
    todo = [j for j, d in zip(jobs, done) if not d][where.rank::where.world]
    where.barrier()                                                                    # all ranks saw the same cache
    for _ in parallel(prepare_case, todo, max(1, cores() // where.world), "preparing scans" if where.main else None):
        pass
    where.barrier()
    ready, failed = [], []
    for job in jobs:
        meta = read_json(folder / f"{job['id']}.json", "a prepared case")
        if meta.get("error"):
            failed.append((job["id"], job["split"], meta["error"]))
        else:
            ready.append(dict(id=job["id"], split=job["split"], path=str(folder / job["id"]), **meta))
    return ready, failed


def prepared(job):
    """True if the cache holds this case, made from these very files."""
    files = [Path(job["folder"]) / f"{job['id']}.{end}" for end in ("json", "image.npy", "label.npy", "voxels.npy")]
    if not all(f.exists() for f in files):
        return False
    meta = read_json(files[0], "a prepared case")
    return meta["stamp"] == job["stamp"] and not meta.get("error")


def prepare_case(job):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in a process of its own a case has one core
    path = Path(job["folder"]) / job["id"]
    try:
        meta = store_case(job, path)
    except BadInput as e:
        meta = dict(error=str(e))
    write_json(f"{path}.json", dict(stamp=job["stamp"], **meta))
    torch.set_num_threads(threads)


def store_case(job, path):
    values, ras, own, labels = read_case(job, job["K"])
    try:
        image, geometry = prepare(values, ras, own, job["spacing"], job["window"])
    except BadInput as e:
        raise BadInput(f"{job['image']}: {e}") from None
    label = prepare_labels(labels, geometry)
    rng = np.random.default_rng(0)
    lists = [np.argwhere(label == k).astype(np.int16) for k in range(1, job["K"])]
    lists = [v if len(v) <= 10_000 else v[np.sort(rng.choice(len(v), 10_000, replace=False))] for v in lists]
    # what the cut to the foreground leaves out of the labels counts as missed
    whole, inside = (np.bincount(a.reshape(-1), minlength=job["K"]) for a in (nearest(labels, geometry["resampled"]), label))
    for name, array in (("image", image), ("label", label), ("voxels", np.concatenate(lists))):
        with write_beside(f"{path}.{name}.npy") as tmp:
            np.save(tmp, np.ascontiguousarray(array), allow_pickle=False)
    return dict(geometry=geometry, voxels=[len(v) for v in lists], outside=(whole - inside).tolist())


# ---------------------------------------------------------------- crops


class Crops(torch.utils.data.Dataset):
    """Draw n: `crops` crops of one volume, a function of (cases, seed, n) alone. Each pass over the cases has its own order.

    image float16 [crops, X, Y, Z], label uint8 of that shape, chance float64 [crops, 32]: numbers for the augmentation.
    """

    def __init__(self, cases, roi, crops, foreground=0.5, seed=0):
        self.cases, self.roi, self.crops, self.foreground, self.seed = cases, roi, crops, foreground, seed

    def __getitem__(self, n):
        epoch, i = divmod(n, len(self.cases))
        case = self.cases[order_of(len(self.cases), self.seed, epoch)[i]]
        rng = np.random.default_rng([self.seed, 1, n])
        image, label, voxels = (mapped(case, a) for a in ("image", "label", "voxels"))
        boxes = [self.place(rng, image.shape, voxels, case["voxels"]) for _ in range(self.crops)]
        return dict(image=torch.from_numpy(np.stack([cut_padded(image, b, self.roi) for b in boxes])),
                    label=torch.from_numpy(np.stack([cut_padded(label, b, self.roi) for b in boxes])),
                    chance=torch.from_numpy(rng.random((self.crops, 32))))

    def place(self, rng, shape, voxels, counts):
        """Where a crop starts: on a labelled voxel of a class drawn first, or anywhere."""
        room = [max(0, n - r) for n, r in zip(shape, self.roi)]
        if rng.random() < self.foreground and len(voxels):
            k = rng.choice(np.flatnonzero(counts))
            first = int(np.sum(counts[:k]))
            centre = voxels[rng.integers(first, first + counts[k])]
            return [int(np.clip(c - r // 2, 0, m)) for c, r, m in zip(centre, self.roi, room)]
        return [int(rng.integers(m + 1)) for m in room]


def mapped(case, what):
    return open_map(f"{case['path']}.{what}.npy")


@lru_cache(maxsize=4096)
def open_map(path):
    return np.load(path, mmap_mode="r", allow_pickle=False)


@lru_cache(maxsize=8)
def order_of(n, seed, epoch):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def cut_padded(array, start, roi):
    """The box at `start`, amid zeros where the volume is smaller than it."""
    part = array[tuple(slice(a, a + r) for a, r in zip(start, roi))]
    if part.shape == tuple(roi):
        return part
    whole = np.zeros(roi, array.dtype)
    whole[tuple(slice((r - n) // 2, (r - n) // 2 + n) for r, n in zip(roi, part.shape))] = part
    return whole


def micro_batches(first_step, args, where):
    """Endless lists of draws for this rank's loader, from step `first_step` on (as in pretrain.py)."""
    step, a = first_step, 0
    while True:
        start = step * args.batch + (a * where.world + where.rank) * args.micro
        yield list(range(start, start + args.micro))
        a += 1
        if a * where.world * args.micro == args.batch:
            step, a = step + 1, 0


def join(draws):
    return {k: torch.cat([d[k] for d in draws]) for k in draws[0]}


# ---------------------------------------------------------------- augmentation


def augment(image, label, chance, args):
    """A batch on its device, float32 [B, X, Y, Z] and uint8 of that shape, changed as the numbers in `chance` [B, 32] say."""
    if args.augment == "none":
        return image, label
    if args.augment == "strong":
        image, label = deform(image, label, chance)
        image = torch.stack([degrade(v, u) for v, u in zip(image, chance.tolist())])
    for i, u in enumerate(chance.tolist()):
        axes = [a for a in range(3) if u[a] < args.flip]
        turns = 1 + int(3 * u[4]) if args.augment == "standard" and u[3] < args.rotate else 0
        for t in (image, label):
            if axes or turns:
                t[i] = t[i].flip(axes).rot90(turns, (0, 1))
        if args.augment == "standard" and u[5] < args.intensity:
            image[i] *= 0.9 + 0.2 * u[6]
        if args.augment == "standard" and u[7] < args.intensity:
            image[i] += 0.2 * u[8] - 0.1
    return image, label


def deform(image, label, chance):
    """Rotation by up to 15° about each axis, scale 0.85 … 1.25, elastic: one resampling, trilinear and nearest."""
    B, *size = image.shape
    device = image.device
    u = chance.float().to(device)
    angle = (u[:, 9:12] * 2 - 1) * torch.pi / 12 * (u[:, 12:13] < 0.2)                 # [B, 3]
    scale = torch.where(u[:, 13] < 0.2, 0.85 + 0.4 * u[:, 14], 1.0)
    turn = torch.eye(3, device=device).expand(B, 3, 3)
    for axis in range(3):
        c, s, m = angle[:, axis].cos(), angle[:, axis].sin(), torch.eye(3, device=device).repeat(B, 1, 1)
        i, j = (a for a in range(3) if a != axis)
        m[:, i, i], m[:, j, j], m[:, i, j], m[:, j, i] = c, c, -s, s
        turn = turn @ m
    half = torch.tensor(size, device=device) / 2
    axes = [torch.arange(n, device=device) + 0.5 - n / 2 for n in size]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)          # [XYZ, 3] voxels from the centre
    at = at @ (turn / scale[:, None, None]).mT                                         # [B, XYZ, 3]
    bumps = torch.stack([noise((3, 5, 5, 5), seed, device) * (6 * p if p < 0.2 else 0) * 5 for seed, p in zip(u[:, 15].tolist(), u[:, 16].tolist())])
    at = at + F.interpolate(bumps, size, mode="trilinear", align_corners=True).flatten(2).mT
    at = (at / half).flip(-1).view(B, *size, 3)                                        # grid_sample: last axis first
    image = F.grid_sample(image[:, None], at, padding_mode="border", align_corners=False)[:, 0]
    return image, F.grid_sample(label[:, None].float(), at, mode="nearest", align_corners=False)[:, 0].to(label.dtype)


def noise(shape, seed, device):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(int(seed * 2 ** 31)), device=device)


def degrade(v, u):
    """Noise, blur, brightness, contrast, low resolution and gamma of one crop [X, Y, Z], with nnU-Net's probabilities."""
    if u[17] < 0.1:
        v = v + noise(v.shape, u[18], v.device) * (0.1 * u[19]) ** 0.5
    if u[20] < 0.2:
        sigma = 0.5 + 0.5 * u[21]
        bell = torch.exp(-0.5 * (torch.arange(-3, 4, device=v.device) / sigma) ** 2)
        bell = bell / bell.sum()
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = 7
            v = F.conv3d(v[None, None], bell.view(shape), padding=[3 * (a == axis) for a in range(3)])[0, 0]
    if u[22] < 0.15:
        v = v * (0.75 + 0.5 * u[23])
    low, high, mean = v.min(), v.max(), v.mean()
    if u[24] < 0.15:
        v = ((v - mean) * (0.75 + 0.5 * u[25]) + mean).clamp(low, high)
    if u[26] < 0.25:
        small = [max(1, round(n * (0.5 + 0.5 * u[27]))) for n in v.shape]
        v = F.interpolate(F.interpolate(v[None, None], small, mode="nearest"), v.shape, mode="trilinear")[0, 0]
    if u[28] < 0.3:
        low, high = v.min(), v.max()
        v = ((v - low) / (high - low).clamp(min=1e-6)) ** (0.7 + 0.8 * u[29]) * (high - low) + low
    return v


# ---------------------------------------------------------------- loss


def segmentation_loss(logits, label):
    """Soft Dice with squared denominator, the background included, plus cross-entropy: [B, K, X, Y, Z], [B, X, Y, Z].

    In float32 whatever the network ran in: sums of squares over a crop overflow fp16. ε = 1e-6 stands in the denominator
    alone, so a class that is not in a crop (nor predicted) costs 1/K of a crop, a constant.
    """
    logits = logits.float()
    p = logits.softmax(1)
    truth = label[:, None] == torch.arange(p.shape[1], device=p.device).view(-1, 1, 1, 1)  # [B, K, X, Y, Z]
    both = (p * truth).sum((2, 3, 4))                                                  # [B, K]
    dice = 2 * both / (p.square().sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1e-6)
    return 1 - dice.mean() + F.cross_entropy(logits, label.long())


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, cases, K, args, where):
    """Counts of every case [cases, K, 3] (see overlap_counts), ranks sharing the work, and rank 0's labels of the first."""
    def predict(x):
        with where.autocast():
            return model(x)

    counts, first = torch.zeros(len(cases), K, 3, dtype=torch.int64, device=where.device), None
    mine = range(where.rank, len(cases), where.world)
    for i in tqdm(mine, desc="validation", leave=False, disable=not where.main or len(mine) < 8):
        volume, truth = (torch.from_numpy(np.array(mapped(cases[i], a))) for a in ("image", "label"))
        found = sliding_window(predict, volume, args.roi, args.overlap, args.windows, where.device, (0, 1, 2) if args.mirror else ()).argmax(0).cpu()
        counts[i] = overlap_counts(found, truth, K).to(where.device)
        counts[i, :, 2] += torch.tensor(cases[i]["outside"], device=where.device)
        first = found.numpy() if i == 0 else first
    return where.sum(counts).cpu(), first


def dice_of(counts):
    """[cases, K, 3] -> Dice [cases, K − 1] without the background; NaN where a case does not have the class."""
    both, found, truth = counts[:, 1:].double().unbind(-1)
    return torch.where(truth > 0, 2 * both / (found + truth), torch.nan).numpy()


def class_means(dice):
    """Mean over the cases that have it, for each class; NaN where none has."""
    return [float(d[~np.isnan(d)].mean()) if (~np.isnan(d)).any() else float("nan") for d in dice.T]


# ---------------------------------------------------------------- pictures


def draw_curves(path, rows, classes):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_dice" in r]
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    axes[0].plot([r["step"] for r in train], [r["loss"] for r in train], color="0.3", lw=1)
    axes[0].set(xlabel="step", ylabel="soft Dice + cross-entropy", title="training loss")
    colours = plt.get_cmap("tab20")
    for k, name in enumerate(classes):
        axes[1].plot([r["step"] for r in val], [r["dice"][k] if r["dice"][k] is not None else np.nan for r in val], "-", lw=1,
                     color=colours(k % 20), label=name)
    axes[1].plot([r["step"] for r in val], [r["val_dice"] for r in val], "ko-", ms=4, lw=2, label="mean")
    axes[1].set(xlabel="step", ylabel="Dice", ylim=(0, 1), title="validation, by class")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for ax in axes:
        ax.grid(alpha=0.3)
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=110, bbox_inches="tight")
    plt.close(fig)


# ---------------------------------------------------------------- training step


def train_step(net, batches, optimiser, lr, args, where, logged=False):
    """One optimiser step on this rank's micro-batches: its part of the batch's loss, the gradient norm when logged, and
    the seconds spent on fetching and augmenting."""
    passes = args.batch // (args.micro * where.world)
    total, waited = torch.zeros((), device=where.device), 0.0
    for a in range(passes):
        start = time.perf_counter()
        image, label = next_batch(batches, args, where)
        waited += time.perf_counter() - start
        if where.world > 1:
            net.require_backward_grad_sync = a == passes - 1
        with where.autocast():
            logits = net(image)
        loss = segmentation_loss(logits, label) / passes
        loss.backward()
        total += loss.detach() / where.world
    norm = None
    weights = [w for w in net.parameters() if w.grad is not None]
    if args.clip:
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
    elif logged:
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights])
    for group in optimiser.param_groups:
        group["lr"] = group["scale"] * lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total, norm, waited


def next_batch(batches, args, where):
    b = next(batches)
    image, label = (b[k].to(where.device, non_blocking=True) for k in ("image", "label"))
    return augment(image.float(), label, b["chance"], args)  # chance stays on the host, where it is read


# ---------------------------------------------------------------- bench


def bench(net, loader, optimiser, args, where):
    """Crops a second of the loader with full augmentation, and the share of training steps spent on waiting for it."""
    wait = torch.cuda.synchronize if where.device.type == "cuda" else lambda: None
    batches, n, steps = iter(loader), args.micro * args.crops, 20 if where.device.type == "cuda" else 4
    for _ in range(3):
        next_batch(batches, args, where)
    wait()
    start, passes = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        next_batch(batches, args, where)
        passes += 1
    wait()
    rate = passes * n / (time.perf_counter() - start)
    times = []
    for _ in range(steps + 1):
        wait()
        start = time.perf_counter()
        _, _, waited = train_step(net, batches, optimiser, args.lr, args, where)
        wait()
        times.append((time.perf_counter() - start, waited))
    seconds, waited = np.median(times[1:], 0)
    where.say(f"{args.batch} volumes x {args.crops} crops of {'x'.join(map(str, args.roi))}, --augment {args.augment}, {args.workers} workers, "
              f"{str(where.dtype)[6:]} on {where.world} x {where.device.type}\n"
              f"loader and augmentation {rate:8.1f} crops/s a rank\n"
              f"step                    {1e3 * seconds:8.1f} ms: {args.batch * args.crops / seconds:.2f} crops/s, "
              f"{waited / seconds:.2%} of it waiting for data\n"
              f"peak memory             {peak_memory(where.device) / 2 ** 30:8.2f} GiB")


# ---------------------------------------------------------------- main


def build_model(args, state, classes, where):
    """Encoder from --init (or the run to resume) and a fresh decoder."""
    torch.manual_seed(args.seed)
    cuda = where.device.type == "cuda"
    if state:
        encoder = Model(Config(**state["config"]))
    elif args.init == "scratch":
        args.size = args.size or ("base" if cuda else "nano")
        encoder = Model(Config(**SIZES[args.size]))
    else:
        encoder = load_pretrained(args.init)
        have = {k: v for k, v in asdict(encoder.config).items() if k in SIZES["base"]}
        if args.size and have != SIZES[args.size]:
            raise BadInput(f"--init {args.init}: its model has {have}, --size {args.size} is {SIZES[args.size]}; leave --size out")
    if any(r % encoder.config.patch for r in args.roi):
        raise BadInput(f"--roi {' '.join(map(str, args.roi))}: not a multiple of the patch {encoder.config.patch} of --init {args.init}")
    if where.device.type == "cpu" and where.dtype == torch.bfloat16 and min(args.roi) < 4 * encoder.config.patch:
        # the bf16 weight gradient of a 3³ convolution over 2³ voxels reads memory that was never written (torch 2.13 on CPUs)
        where.dtype = torch.float32
        where.say(f"--roi {min(args.roi)} is less than 4 patches: float32, since bfloat16 convolutions of so small maps fail on CPUs")
    model = Segmenter(encoder, len(classes) + 1, args.features)
    if state:
        fit(model, state["model"], Path(args.out) / "ckpt.pt")
    if args.freeze:
        encoder.requires_grad_(False)
    kernels, why = choose(args.kernels, where.device)
    encoder.use(kernels)
    where.say(f"--kernels {args.kernels}: {kernels} ({why})")
    return model.to(where.device)


def main():
    p = parser()
    args = p.parse_args()
    if not args.task:
        raise BadInput(f"--task NAME is needed: {', '.join(SEG_TASKS)}, or a name of your own with --data DIR")
    out = Path(args.out or f"out/seg-{args.task}")
    state = None
    if args.resume and (out / "ckpt.pt").exists():
        state = load_checkpoint(out / "ckpt.pt", SEGMENTER)
        args = resumed_args(p, state["args"], FREE)
        args.out = str(out)

    # devices
    where = place(args.device, args.dtype, args.seed)
    stop = StopRequest()
    task = settle(args, where)

    # data
    cases, classes = find_cases(args.task, args.data, args.classes, where)
    ready, failed = prepare_all(cases, classes, task, args, where)
    report_failed(failed, ready, args, where)
    train, val = ([c for c in ready if c["split"] == s] for s in ("train", "val"))
    chosen = set(label_subset([c["id"] for c in train], args.labels, args.seed))
    train = [c for c in train if c["id"] in chosen]
    if args.steps is None:
        args.steps = max(1, round(args.epochs * len(train) / args.batch))
    args.val_every = args.val_every or max(1, -(-args.steps // args.vals))
    args.save_every = args.save_every or args.val_every
    where.say(f"{args.data}: {len(train)} volumes to train on{f' (--labels {args.labels:g})' if args.labels < 1 else ''}, {len(val)} to validate, "
              f"{len(classes)} classes; {args.steps} steps of {args.batch} volumes x {args.crops} crops of {'x'.join(map(str, args.roi))} at "
              f"{' x '.join(f'{s:g}' for s in args.spacing) + ' mm' if args.spacing else 'their own spacing'}")

    # model
    model = build_model(args, state, classes, where)
    K, L = len(classes) + 1, model.encoder.config.layers
    where.say(f"UNETR on a ViT of {L} layers, width {model.encoder.config.width}: encoder {sum(w.numel() for w in model.encoder.parameters()) / 1e6:.1f} M"
              f"{' (frozen)' if args.freeze else ''}, decoder {sum(w.numel() for w in model.decoder.parameters()) / 1e6:.1f} M parameters, "
              f"--init {args.init}, {str(where.dtype)[6:]} on {where.world} x {where.device.type}")
    if args.compile:
        model.compile()
    net = model
    if where.world > 1:
        net = DistributedDataParallel(model, device_ids=[where.device.index] if where.device.type == "cuda" else None, gradient_as_bucket_view=True)

    # resume, optimiser
    optimiser = torch.optim.AdamW(layer_decay_groups(model, args.lr, args.wd, args.decay), lr=args.lr, betas=(0.9, args.beta2), fused=True)
    first, best = 0, -1.0
    if state:
        if state["train"] != [c["id"] for c in train]:
            raise BadInput(f"--data {args.data}: holds other training cases than those that the run to resume was started with")
        optimiser.load_state_dict(state["optimiser"])
        first, best = state["step"], state["best"]
    draws = Crops(train, args.roi, args.crops, args.foreground, args.seed)
    loader = torch.utils.data.DataLoader(draws, batch_sampler=micro_batches(first, args, where), num_workers=args.workers, collate_fn=join,
                                         pin_memory=where.device.type == "cuda", prefetch_factor=4 if args.workers else None)
    if args.bench:
        return bench(net, loader, optimiser, args, where)
    if not state and where.main:
        if args.resume:
            where.say(f"no checkpoint in {out}: starting at step 0")
        keep_earlier_run(out, where.say)
    if where.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", resume_step=first if state else None)
        write_json(out / "args.json", vars(args))
        write_json(out / "subset.json", dict(labels=args.labels, seed=args.seed, train=[c["id"] for c in train], val=[c["id"] for c in val]))
        with write_beside(out / "skipped.csv") as tmp, open(tmp, "w", newline="") as f:
            csv.writer(f).writerows([("case", "split", "reason"), *failed])
    batches = iter(loader)
    if state:
        set_random_states(state["random"], where)
    made = dict(task=args.task, data=args.data, classes=classes, window=args.window, mr_after=task.get("mr_after"), spacing=args.spacing, roi=args.roi,
                features=args.features, overlap=args.overlap)
    kept = dict(format=SEGMENTER, config=asdict(model.encoder.config), made=made)

    def save(step):
        states = random_states(where)
        if where.main:
            save_checkpoint(out / "ckpt.pt", **kept, model=model.state_dict(), optimiser=optimiser.state_dict(), step=step, best=best,
                            train=[c["id"] for c in train], random=states, args=vars(args))

    def validate(step):
        nonlocal best
        start = time.perf_counter()
        counts, found = evaluate(model, val, K, args, where)
        dice = dice_of(counts)
        means = class_means(dice)
        mean = float(np.nanmean(means))
        where.say(f"step {step:>6}: validation Dice {mean:.3f} ({time.perf_counter() - start:.0f} s)")
        if where.main:
            log.write(step=step, val_dice=mean, dice=[None if np.isnan(d) else d for d in means])
            draw_curves(out / "curves.png", read_log(out / "log.jsonl"), classes)
            image, truth = (np.array(mapped(val[0], a), np.float32) for a in ("image", "label"))
            draw_overlay(out / "overlay.png", image, truth.astype(np.uint8), found, classes, val[0]["geometry"]["spacing"], f"{val[0]['id']}, step {step}")
            if mean > best:
                save_checkpoint(out / "best.pt", **kept, model=model.state_dict(), step=step, val_dice=mean)
        best = max(best, mean)
        return dice

    # loop
    last = min(args.steps, first + args.stop_after) if args.stop_after else args.steps
    running, since, waited = torch.zeros((), device=where.device), first, 0.0
    bar = tqdm(total=args.steps, initial=first, disable=not where.main, mininterval=1, desc="segmentation", unit="step")
    clock, step, dice = time.perf_counter(), first, None
    while step < last:
        lr = cosine_lr(step, args.steps, args.lr, round(args.warmup * args.steps))
        logged = (step + 1) % args.log_every == 0 or step + 1 == last or where.world == 1 and stop.asked
        loss, norm, seconds = train_step(net, batches, optimiser, lr, args, where, logged)
        running, waited = running + loss, waited + seconds
        step += 1
        bar.update()
        stopping = False
        if logged:
            mean = where.sum(running).item() / (step - since)
            seconds = time.perf_counter() - clock
            stopping = stop.agreed(where)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if where.main:
                log.write(step=step, loss=mean, lr=lr, grad_norm=norm.item(), samples_per_s=(step - since) * args.batch * args.crops / seconds,
                          waiting=waited / seconds, seconds=seconds)
            running, since, waited, clock = torch.zeros_like(running), step, 0.0, time.perf_counter()
        pause = time.perf_counter()
        if step % args.val_every == 0 or step == args.steps:
            dice = validate(step)
        if step % args.save_every == 0 or step == last or stopping:
            save(step)
        clock += time.perf_counter() - pause  # samples_per_s is of training alone
        if stopping:
            break
    bar.close()

    if step < args.steps:
        where.say(f"stopped at step {step} of {args.steps}, saved in {out / 'ckpt.pt'}: --resume goes on")
        return
    if dice is None:
        dice = dice_of(evaluate(model, val, K, args, where)[0])
    if where.main:
        report(dice, classes, val, step, best, failed, out, where)


def report_failed(failed, ready, args, where):
    """A line for each case that cannot be used; BadInput if too few are left to train or to validate."""
    lines = [f"  {split} {name}: {reason}" for name, split, reason in failed]
    for split in ("train", "val"):
        if not any(c["split"] == split for c in ready):
            raise BadInput("\n".join([f"{args.data}: no case left to {'train on' if split == 'train' else 'validate with'}", *lines]))
    if failed:
        where.say("\n".join([f"{len(failed)} cases cannot be used and are left out:", *lines]))


def report(dice, classes, val, step, best, failed, out, where):
    where.say(f"{'Dice':>22}   mean    min    max  cases")
    for k, name in enumerate(classes):
        d = dice[:, k][~np.isnan(dice[:, k])]
        where.say(f"{name:>22}  " + (f"{d.mean():.3f}  {d.min():.3f}  {d.max():.3f}  {len(d):5}" if len(d) else "none of the cases has it"))
    means = class_means(dice)
    where.say(f"{'mean':>22}  {np.nanmean(means):.3f}  (best {best:.3f})")
    write_json(out / "metrics.json", dict(step=step, mean_dice=float(np.nanmean(means)), best_mean_dice=best, skipped=len(failed),
               dice={c: None if np.isnan(m) else m for c, m in zip(classes, means)},
               cases={v["id"]: [None if np.isnan(x) else x for x in d] for v, d in zip(val, dice.tolist())}))
    where.say("wrote " + ", ".join(str(out / f) for f in ("ckpt.pt", "best.pt", "log.jsonl", "metrics.json", "curves.png", "overlay.png")))


if __name__ == "__main__":
    cli(main)
    leave()
