"""Classification of whole scans: a pre-trained encoder and a linear layer, tuned on labelled cases, scored once on a test set.

    python finetune_cls.py --task phantom-cls                       # CPU demo on made-up nodules: 2 minutes, test AUC 0.84
    python finetune_cls.py --task nodule --init out/pretrain/ckpt.pt --seeds 0 1 2    # one GPU, the published recipe
    torchrun --nproc_per_node=4 finetune_cls.py --task ricord --init FILE             # four GPUs, the same run
    python finetune_cls.py --task mine --data cases.csv             # your scans: file,label,split[,patient]
    python finetune_cls.py --resume --out out/cls-nodule            # goes on with a run, exactly

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (best validation AUC), metrics.json, scores.csv (each
case), roc.png, confusion.png, cases.png, curves.png; with several seeds, a folder seed-N each and the mean in metrics.json.
The test set is scored once, at the end, with best.pt. Every random choice is a function of (seed, number of the sample).

Sections: tasks · arguments · cases · arrays, read once · batches · metrics · shortcut baseline · pictures · training step ·
evaluation · a run · main

B batch, X Y Z voxels, K classes, N cases.
"""
import argparse
import csv
import hashlib
import re
import time
import zipfile
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import rankdata
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (BadInput, Log, StopRequest, cli, cores, cosine_lr, keep_earlier_run, label_subset, leave, load_checkpoint,
                    parallel, place, poly_lr, read_json, read_log, resumed_args, save_checkpoint, write_beside, write_json)
from model import CLS_FORMAT, SIZES, Classifier, Config, Model, fit, grid_of, layer_decay_groups, load_pretrained
from serialize import read_scan, stem_of

# ---------------------------------------------------------------- tasks
# A task: how its cases are listed (npz: MedMNIST's file; lists: FILE LABEL a line; csv), its classes, the size of the input
# (and with --size nano), the intensities that become 0 and 1 (None: a scan's own 1st and 99.9th percentiles), and whose recipe it follows.

TASKS = {
    "nodule": dict(listed="npz", classes=["benign", "malignant"], volume=[128, 128, 128], nano=[32, 32, 32], window=[0, 255], recipe="nodule"),
    "ricord": dict(listed="lists", classes=["no COVID", "COVID"], volume=[128, 128, 64], nano=[64, 64, 32], window=[0, 1400], recipe="ricord"),
    "mine": dict(listed="csv", classes=None, volume=[128, 128, 128], nano=[64, 64, 64], window=None, recipe="ricord"),
}
# the phantom's scans are in HU: the published window, which is as wide, would make all of the lung 0
FLAVOURS = {"nodule": TASKS["nodule"], "ricord": {**TASKS["ricord"], "window": [-1000, 400]}}

RECIPES = {  # what a flag that was not given stands for; nodule and ricord are published
    "nodule": dict(batch=16, epochs=100, lr=1.5e-5, wd=0.01, beta2=0.999, decay=1.0, clip=0.0, schedule="cosine", warmup=0,
                   patience=30, flip=0.5, class_weights=False),
    "ricord": dict(batch=8, epochs=200, lr=5e-5, wd=0.05, beta2=0.95, decay=0.75, clip=12.0, schedule="poly", warmup=0,
                   patience=0, flip=0.0, class_weights=True),
    "nano": dict(batch=8, epochs=20, lr=1e-3, wd=0.05, beta2=0.95, decay=1.0, clip=1.0, schedule="cosine", warmup=30,
                 patience=0, flip=0.5, class_weights=True),
}
SCRATCH = {"ricord": dict(lr=1e-5, wd=1e-4)}  # published: what differs without pre-training
SPLITS = ("train", "val", "test")

# ---------------------------------------------------------------- arguments

FREE = {"resume", "data", "out", "cache", "seeds", "device", "workers", "micro", "log_every", "save_every", "stop_after"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--task", choices=[*TASKS, "phantom-cls"], default="phantom-cls", help="default %(default)s: made-up patients")
    g.add_argument("--flavour", choices=list(FLAVOURS), default="nodule", help="of phantom-cls (default %(default)s)")
    g.add_argument("--data", help="nodule: nodulemnist3d.npz or its folder (28³ before 64³); ricord: the folder that the lists' "
                   "paths start from; mine: a CSV with the columns file,label,split[,patient] (default data/TASK)")
    g.add_argument("--lists", nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="ricord: lines FILE LABEL (default {train,val,test}.txt in --data)")
    g.add_argument("--patient", metavar="REGEX", help="ricord, mine: what names the patient in a path (default: RICORD's names; else the file's)")
    g.add_argument("--out", help="folder of the run (default out/cls-TASK)")
    g.add_argument("--resume", action="store_true", help="go on from --out with the arguments of that run; a fresh start if there is none")
    g.add_argument("--init", metavar="FILE", help="pre-trained weights: a checkpoint of pretrain.py, or the published file (default: from scratch)")
    g.add_argument("--heads", type=int, help="of the published file's model (default width / 64)")
    g.add_argument("--labels", type=float, default=1.0, help="share of the training patients, stratified by label (default 1)")
    g.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run each, then mean ± sd (default 0)")
    g.add_argument("--stop-after", type=int, metavar="N", help="save and leave after N steps of this call")
    g = p.add_argument_group("model")
    g.add_argument("--size", choices=list(SIZES), help="without --init (published: base, the default with CUDA; nano without)")
    g.add_argument("--pool", choices=["mean", "attention"], default="mean", help="of the patch tokens (published: mean)")
    g.add_argument("--freeze", action="store_true", help="linear probe: the encoder stays as it is (lr 1e-3 unless given)")
    g = p.add_argument_group("input")
    g.add_argument("--volume", type=int, nargs=3, metavar=("X", "Y", "Z"),
                   help="voxels (published: nodule 128 128 128, ricord 128 128 64; nano 32 32 32, 64 64 32)")
    g.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities that become 0 and 1 (published: ricord 0 1400)")
    g.add_argument("--cache", default="data/cache-cls", help="where resized scans are kept (default %(default)s; 4 MB a case at 128³)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, help="published: nodule 100, ricord 200; nano 20")
    g.add_argument("--batch", type=int, help="cases a step, over all ranks (published: nodule 16, ricord 8; nano 8)")
    g.add_argument("--micro", type=int, help="cases a forward pass on one device (default: all of its share)")
    g.add_argument("--lr", type=float, help="published: nodule 1.5e-5, ricord 5e-5, from scratch 1e-5; nano 1e-3")
    g.add_argument("--wd", type=float, help="AdamW (published: nodule 0.01, ricord 0.05, from scratch 1e-4; nano 0.05)")
    g.add_argument("--beta2", type=float, help="AdamW (published: nodule 0.999, ricord 0.95)")
    g.add_argument("--decay", type=float, help="of lr a layer towards the input (published: nodule 1, ricord 0.75)")
    g.add_argument("--clip", type=float, help="gradient norm (published: nodule 0, off; ricord 12)")
    g.add_argument("--schedule", choices=["cosine", "poly"], help="published: nodule cosine, ricord polynomial of power 0.9")
    g.add_argument("--warmup", type=int, help="steps, of cosine (published: 0; nano 30)")
    g.add_argument("--patience", type=int, help="validations without a better AUC, 0: no limit (published: nodule 30, ricord 0)")
    g.add_argument("--flip", type=float, help="probability of a flip along each axis (published: nodule random flips, here 0.5; ricord 0)")
    g.add_argument("--class-weights", action=argparse.BooleanOptionalAction, help="cross-entropy by inverse class frequency (published: ricord)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the matrix products")
    g.add_argument("--workers", type=int, help="loader processes a rank (default: 4 with CUDA, 0 without)")
    g = p.add_argument_group("reports")
    g.add_argument("--bootstrap", type=int, default=1000, help="resamplings of the patients for the 95 %% intervals (default %(default)s)")
    g.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    g.add_argument("--val-every", type=int, default=1, help="epochs (default %(default)s)")
    g.add_argument("--save-every", type=int, default=5, help="epochs (default %(default)s)")
    return p


def task_of(args):
    return FLAVOURS[args.flavour] if args.task == "phantom-cls" else TASKS[args.task]


def settle(args, config, where):
    """Fill in what was not given, in place. config: of the encoder."""
    task, cuda = task_of(args), where.device.type == "cuda"
    nano = asdict(config) == asdict(Config(**SIZES["nano"], images=config.images, order=config.order))
    recipe = dict(RECIPES["nano" if nano else task["recipe"]])
    if not args.init:
        recipe.update({} if nano else SCRATCH.get(task["recipe"], {}))
    if args.freeze:
        recipe.update(lr=1e-3)
    recipe.update(volume=task["nano" if nano else "volume"], window=task["window"],
                  workers=4 if cuda else 0)
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "log_every", "val_every", "save_every", "bootstrap"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if len(set(args.seeds)) < len(args.seeds):
        raise BadInput(f"--seeds {' '.join(map(str, args.seeds))}: each once")
    if args.window and not args.window[0] < args.window[1]:
        raise BadInput(f"--window {args.window[0]:g} {args.window[1]:g}: LOW must be below HIGH")
    grid_of(args.volume, config.patch)
    if args.batch % where.world:
        raise BadInput(f"--batch {args.batch} does not divide over {where.world} ranks")
    share = args.batch // where.world
    args.micro = args.micro or share
    if args.micro < 1 or share % args.micro:
        raise BadInput(f"--micro {args.micro} does not divide the {share} cases of a step on each of {where.world} ranks")


# ---------------------------------------------------------------- cases
# A case is a dict: file (its name in reports), split, label, patient, and source: a path, or an array [x, y, z].


def cases_of_npz(path, classes):
    """MedMNIST's file: {train,val,test}_{images,labels}. It names no patients, so each image counts as one."""
    if path.is_dir():
        found = [path / f"nodulemnist3d{s}.npz" for s in ("", "_64") if (path / f"nodulemnist3d{s}.npz").is_file()]
        if not found:
            raise BadInput(f"{path}: no nodulemnist3d.npz or nodulemnist3d_64.npz in it; get one from medmnist.com")
        path = found[0]
    cases = []
    try:
        with np.load(path, allow_pickle=False) as z:
            lacking = [f"{s}_{k}" for s in SPLITS for k in ("images", "labels") if f"{s}_{k}" not in z.files]
            if lacking:
                raise BadInput(f"{path}: lacks {', '.join(lacking)}; MedMNIST's 3D files hold them")
            arrays = {s: (z[f"{s}_images"], z[f"{s}_labels"]) for s in SPLITS}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --data names the npz or its folder") from None
    except (zipfile.BadZipFile, OSError, EOFError) as e:
        raise BadInput(f"{path}: cannot be read as an npz ({e}); download it again") from None
    except ValueError as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{path}: holds Python objects, which only unpickling could read: refused") from None
    for split, (images, labels) in arrays.items():
        if images.ndim != 4 or images.dtype.kind not in "uif" or len(images) != len(labels) or labels.size != len(labels):
            raise BadInput(f"{path}: {split}_images {images.shape} {images.dtype}, {split}_labels {labels.shape}; "
                           "[N, x, y, z] numbers and [N, 1] are needed")
        cases += [dict(file=f"{split}/{i:05d}", split=split, label=check_label(y, classes, f"{path}: {split}_labels[{i}]"),
                       patient=f"{split}/{i:05d}", source=v) for i, (v, y) in enumerate(zip(images, labels.reshape(-1).tolist()))]
    return cases


def cases_of_lists(folder, lists, classes, pattern):
    """The authors' lists: lines `FILE LABEL`, files relative to `folder`."""
    cases = []
    for split, name in zip(SPLITS, lists or [folder / f"{s}.txt" for s in SPLITS]):
        try:
            lines = Path(name).read_text().splitlines()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            raise BadInput(f"{name}: no such list of lines FILE LABEL; see --lists") from None
        for n, line in enumerate(lines):
            if line.strip():
                file, _, label = line.strip().rpartition(" ")
                cases.append(case_of(folder, file.strip(), label, split, classes, pattern, f"{name}:{n + 1}"))
    return cases


def cases_of_csv(path, classes, pattern):
    """A CSV with the columns file,label,split and, if you like, patient; files relative to its folder."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise BadInput(f"{path}: no such CSV; --data names one with the columns file,label,split") from None
    lacking = [c for c in ("file", "label", "split") if not rows or c not in rows[0]]
    if lacking:
        raise BadInput(f"{path}: lacks the column {lacking[0]}, or has no rows; file,label,split are needed")
    cases = []
    for n, row in enumerate(rows):
        at = f"{path}:{n + 2}"
        if row["split"] not in SPLITS:
            raise BadInput(f"{at}: split {row['split']!r}; it is one of {', '.join(SPLITS)}")
        case = case_of(path.parent, row["file"] or "", row["label"], row["split"], classes, pattern, at)
        cases.append({**case, "patient": row.get("patient") or case["patient"]})
    return cases


def case_of(folder, file, label, split, classes, pattern, at):
    if not file or not (folder / file).exists():
        raise BadInput(f"{at}: no such file {folder / file}")
    match = re.search(pattern or r"RICORD(?:-1[ABC]-\d+)?-\d+", file)
    if pattern and not match:
        raise BadInput(f"{at}: --patient {pattern!r} does not match {file}")
    who = (match.group(1) if match.re.groups else match.group()) if match else stem_of(file)
    return dict(file=file, split=split, label=check_label(label, classes, at), patient=who, source=folder / file)


def check_label(value, classes, at):
    """A label as an int; BadInput if it is not one, or not one of `classes` (None: any from 0 on)."""
    if str(value).strip().isdecimal() and (classes is None or int(value) < len(classes)):
        return int(value)
    allowed = f"0 to {len(classes) - 1}" if classes else "an integer from 0 on"
    raise BadInput(f"{at}: label {value!r}; it is {allowed}")


def list_cases(args, where):
    """All cases of the task and the names of its classes."""
    task, pattern = task_of(args), args.patient
    data = Path(args.data)
    if task["listed"] == "npz":
        cases = cases_of_npz(data, task["classes"])
    elif task["listed"] == "lists":
        cases = cases_of_lists(data, args.lists, task["classes"], pattern)
    else:
        cases = cases_of_csv(data, task["classes"], pattern)
    classes = task["classes"] or [str(c) for c in range(max(2, 1 + max(c["label"] for c in cases)))]
    splits = {}
    for c in cases:
        splits.setdefault(c["patient"], set()).add(c["split"])
    both = [p for p, s in splits.items() if len(s) > 1]
    if both:
        raise BadInput(f"{args.data}: {len(both)} patients are in more than one split, {both[0]} in {' and '.join(sorted(splits[both[0]]))}; "
                       "give each patient one split (--patient REGEX says what names a patient)")
    for s in SPLITS:
        have = {c["label"] for c in cases if c["split"] == s}
        if not have or s == "train" and len(have) < len(classes):
            raise BadInput(f"{args.data}: the {s} split has no case" + (f" of class {min(set(range(len(classes))) - have)}" if have else ""))
    if task["listed"] == "npz":
        where.say("the file names no patients: cases are taken to be of different patients")
        prints = {}
        for c in cases:
            prints.setdefault(hashlib.blake2b(c["source"], digest_size=16).digest(), set()).add(c["split"])
        twice = sum(len(s) > 1 for s in prints.values())
        if twice:
            where.say(f"warning: {twice} images stand in more than one split, voxel for voxel")
    else:
        where.say("patients: " + ", ".join(f"{len({c['patient'] for c in cases if c['split'] == s})} {s}" for s in SPLITS)
                  + "; none is in two splits")
    return cases, classes


def find_data(args, where):
    if args.data is None and args.task == "phantom-cls":
        args.data = f"data/phantom/{args.flavour}"
        if where.main:
            from phantom import write_phantom
            done = Path(args.data, "nodulemnist3d.npz" if args.flavour == "nodule" else "test.txt").exists()
            where.say(f"made-up patients, {args.flavour}: {'from' if done else 'making them in'} {args.data}")
            done or write_phantom("data/phantom", parts=(args.flavour,))
        where.barrier()
    elif args.data is None:
        args.data = "data/mine.csv" if args.task == "mine" else f"data/{args.task}"


# ---------------------------------------------------------------- arrays, read once


def resize(values, shape):
    """[x, y, z] -> `shape`: area means along axes that shrink, then trilinear."""
    v = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    v = F.adaptive_avg_pool3d(v, [min(a, b) for a, b in zip(v.shape[2:], shape)])
    return F.interpolate(v, shape, mode="trilinear")[0, 0].numpy()


def statistics(values, affine, own):
    """What can be known of a scan without looking: the numbers of the header, and of its histogram."""
    axes = nib.orientations.io_orientation(own).ravel()
    header = [*values.shape, *nib.affines.voxel_sizes(affine), *affine[:3, 3], *axes, values.dtype.itemsize]
    return np.array([*header, values.mean(), values.std(), *np.percentile(values, [0, 1, 5, 25, 50, 75, 95, 99, 100])], np.float64)


def prepare(case, shape, window, cache):
    """A case's array at the size of the input, in [0, 1], and its statistics, in the cache: (file, statistics, None), or why not."""
    source, own = case["source"], isinstance(case["source"], np.ndarray)
    stat = None if own else source.stat()
    stamp = hashlib.blake2b(source, digest_size=16).hexdigest() if own else [str(source.resolve()), stat.st_size, stat.st_mtime_ns]
    path = Path(cache) / f"{hashlib.blake2b(f'1 {stamp} {shape} {window}'.encode(), digest_size=16).hexdigest()}.npz"
    try:
        if not path.exists():
            values, affine, header = (source, np.eye(4), np.eye(4)) if own else read_scan(source)
            if values.ndim != 3 or not np.isfinite(values).all():
                raise BadInput(f"{values.ndim}D, or with voxels that are NaN; one finite 3D volume is needed")
            low, high = window or np.percentile(values, [1, 99.9])
            unit = np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
            with write_beside(path) as tmp:
                np.savez(tmp, volume=resize(unit, shape).astype(np.float16), statistics=statistics(values, affine, header))
        with np.load(path, allow_pickle=False) as z:
            return str(path), z["statistics"], None
    except BadInput as e:
        return None, None, str(e)


def prepare_all(cases, args, where):
    """Give every case its array in the cache and its statistics, each rank a share of the reading: (cases, those skipped)."""
    job = partial(prepare, shape=tuple(args.volume), window=args.window, cache=args.cache)
    mine = list(parallel(job, cases[where.rank::where.world], max(1, cores() // where.world), "reading" if where.main else None))
    found, kept, skipped = where.gather(mine), [], []
    for n, case in enumerate(cases):
        array, stats, reason = found[n % where.world][n // where.world]
        if reason:
            skipped.append((case["file"], case["split"], reason))
        else:
            kept.append({**{k: v for k, v in case.items() if k != "source"}, "array": array, "statistics": stats})
    if skipped:
        where.say(f"{len(skipped)} of {len(cases)} scans left out, see skipped.csv; the first: {skipped[0][0]}: {skipped[0][2]}")
    for s in SPLITS:
        if not any(c["split"] == s for c in kept):
            raise BadInput(f"no scan of the {s} split can be used; the first: {skipped[0][0]}: {skipped[0][2]}")
    if args.window and not skipped and np.median([c["statistics"][-5] for c in kept]) < args.window[0]:
        where.say(f"warning: more than half of the voxels lie below --window {args.window[0]:g} and become 0: in HU, lung and air do; "
                  "--window -1000 400 keeps the lung")
    return kept, skipped


def load_volume(case):
    with np.load(case["array"], allow_pickle=False) as z:
        return torch.from_numpy(z["volume"])                                           # [X, Y, Z] float16


# ---------------------------------------------------------------- batches


class Stream(torch.utils.data.Dataset):
    """Sample n = 0, 1, … of training without end: each N in a row are all cases, in an order of their own.

    # departs: batches run across the ends of epochs, so that each is full whatever N is.
    """

    def __init__(self, cases, seed, flip):
        self.cases, self.seed, self.flip = cases, seed, flip
        self.order = lru_cache(4)(lambda epoch: np.random.default_rng([seed, 1, epoch]).permutation(len(cases)))

    def case(self, n):
        return self.cases[self.order(n // len(self.cases))[n % len(self.cases)]]

    def __getitem__(self, n):
        flips = np.random.default_rng([self.seed, 2, n]).random(3) < self.flip
        return dict(volume=load_volume(self.case(n)), label=self.case(n)["label"], flips=flips)


class Shown(torch.utils.data.Dataset):
    """Cases as they are, each with its number."""

    def __init__(self, cases):
        self.cases = cases

    def __getitem__(self, n):
        return dict(volume=load_volume(self.cases[n]), number=n)


def micro_batches(first_step, args, where):
    """Endless lists of sample numbers for this rank's loader: passes of `micro`, dealt to the ranks in turn."""
    start = first_step * args.batch + where.rank * args.micro
    while True:
        yield list(range(start, start + args.micro))
        start += args.micro * where.world


def augment(volume, flips):
    """Volumes [B, X, Y, Z] flipped along the axes that flips [B, 3] marks, on their device."""
    for axis in range(3):
        volume = torch.where(flips[:, axis, None, None, None], volume.flip(axis + 1), volume)
    return volume


# ---------------------------------------------------------------- metrics
# None stands for undefined: there is nothing to divide by.


def auc(y, score):
    """Area under the ROC curve = P(score of a positive > that of a negative), ties count half. y: bool [N]."""
    y = np.asarray(y, bool)
    pos, neg = int(y.sum()), int((~y).sum())
    if not pos or not neg or not np.isfinite(score).all():
        return None
    return float((rankdata(score)[y].sum() - pos * (pos + 1) / 2) / (pos * neg))


def roc(y, score):
    """False and true positive rates at each distinct threshold from the highest down, after (0, 0): fpr, tpr, thresholds."""
    order = np.argsort(-np.asarray(score), kind="stable")
    y, score = np.asarray(y, bool)[order], np.asarray(score)[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True))                        # the last of each run of ties
    tp = np.cumsum(y)[last]
    fp = last + 1 - tp
    return np.append(0, fp / max(1, fp[-1])), np.append(0, tp / max(1, tp[-1])), np.append(np.inf, score[last])


def youden(y, score):
    """The threshold (score >= it is positive) with the largest sensitivity + specificity; None if a class is missing."""
    if auc(y, score) is None:
        return None
    fpr, tpr, thresholds = roc(y, score)
    return float(thresholds[1:][np.argmax((tpr - fpr)[1:])])


def ratio(a, b):
    return float(a / b) if b else None


def mean_of(values):
    """Mean, undefined if any of them is."""
    values = list(values)
    return None if None in values else float(np.mean(values))


def at_point(y, hit):
    """Metrics of the decisions `hit` for the truth `y`, both bool [N]."""
    tp, tn, fp, fn = (int(np.sum(a & b)) for a, b in ((y, hit), (~y, ~hit), (~y, hit), (y, ~hit)))
    sensitivity, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return dict(accuracy=ratio(tp + tn, len(y)), f1=ratio(2 * tp, 2 * tp + fp + fn), sensitivity=sensitivity,
                specificity=specificity, balanced_accuracy=mean_of([sensitivity, specificity]))


def decide(probs):
    """Class of each row of probs [N, K]: of two, the second from 0.5 on; of more, the likeliest."""
    return (probs[:, 1] >= 0.5).astype(int) if probs.shape[1] == 2 else probs.argmax(1)


def measure(labels, probs, thresholds):
    """All metrics of probs [N, K]: of class 1, or with K > 2 the mean of each class against the rest (macro).

    thresholds: Youden's, one a class that is measured. Names with youden_ are taken there.
    """
    K = probs.shape[1]
    measured = [1] if K == 2 else range(K)
    top = decide(probs)
    out = dict(auc=mean_of(auc(labels == c, probs[:, c]) for c in measured))
    for prefix, hits in (("", [top == c for c in measured]), ("youden_", [probs[:, c] >= t for c, t in zip(measured, thresholds)])):
        rows = [at_point(labels == c, hit) for c, hit in zip(measured, hits)]
        out.update({prefix + k: mean_of(r[k] for r in rows) for k in rows[0]})
    if K > 2:  # the usual meaning of these two with several classes
        out.update(accuracy=float(np.mean(top == labels)), balanced_accuracy=out["sensitivity"])
    return out


def thresholds_of(labels, probs):
    """Youden's thresholds, of validation cases; 0.5 where undefined."""
    found = [youden(labels == c, probs[:, c]) for c in ([1] if probs.shape[1] == 2 else range(probs.shape[1]))]
    return [0.5 if t is None else t for t in found]


def with_intervals(labels, probs, patients, thresholds, times, seed):
    """{metric: {value, low, high}}: 95 % percentile intervals over resampled patients (with all of their cases)."""
    _, who = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(who == p) for p in range(who.max() + 1)]
    rng, drawn = np.random.default_rng([seed, 4]), []
    for _ in range(times):
        pick = np.concatenate([members[p] for p in rng.integers(len(members), size=len(members))])
        drawn.append(measure(labels[pick], probs[pick], thresholds))
    out = {}
    for name, value in measure(labels, probs, thresholds).items():
        defined = [d[name] for d in drawn if d[name] is not None]
        few = value is None or len(defined) < times / 2
        low, high = (None, None) if few else map(float, np.percentile(defined, [2.5, 97.5]))
        out[name] = dict(value=value, low=low, high=high)
    return out


def text_of(m):
    if m["value"] is None:
        return "undefined"
    return f"{m['value']:.3f}" + (f" [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else "")


# ---------------------------------------------------------------- shortcut baseline


def logistic(x, y, K, l2=1.0):
    """Multinomial logistic regression on x [N, F], the sum of cross-entropies + l2/2 · |W|²: a function x -> probs [N, K].

    Features are standardised by x; those that are constant in it are left out.
    """
    mean, sd = x.mean(0), x.std(0)
    varied = sd > 1e-9 * (1 + np.abs(mean))
    scaled = lambda a: np.clip((a[:, varied] - mean[varied]) / sd[varied], -5, 5)  # noqa: E731
    softmax = lambda z: (lambda e: e / e.sum(1, keepdims=True))(np.exp(z - z.max(1, keepdims=True)))  # noqa: E731
    a, target = np.c_[scaled(x), np.ones(len(x))], np.eye(K)[y]

    def loss(w):
        w = w.reshape(-1, K)
        p = softmax(a @ w)
        grad = a.T @ (p - target)
        grad[:-1] += l2 * w[:-1]                                                       # the bias is not shrunk
        return -np.log((p * target).sum(1) + 1e-300).sum() + l2 / 2 * (w[:-1] ** 2).sum(), grad.ravel()

    w = minimize(loss, np.zeros(a.shape[1] * K), jac=True, method="L-BFGS-B").x.reshape(-1, K)
    return lambda b: softmax(np.c_[scaled(b), np.ones(len(b))] @ w)


def shortcut(train, test, K, args, seed):
    """The test AUC that header and intensity statistics alone reach, and how many of them vary."""
    table = lambda cases: np.stack([c["statistics"] for c in cases])  # noqa: E731
    x, y = table(train), np.array([c["label"] for c in train])
    probs = logistic(x, y, K)(table(test))
    labels, patients = (np.array([c[k] for c in test]) for k in ("label", "patient"))
    found = with_intervals(labels, probs, patients, [0.5] * K, args.bootstrap, seed)["auc"]
    return {**found, "features": int((x.std(0) > 1e-9 * (1 + np.abs(x.mean(0)))).sum())}


# ---------------------------------------------------------------- pictures


def figure_of(size, rows=1, columns=1):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, squeeze=False)


def save_figure(fig, path):
    import matplotlib.pyplot as plt
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=100, bbox_inches="tight")
    plt.close(fig)


def draw_curves(path, rows):
    fig, axes = figure_of((11, 4), 1, 2)
    for ax, key, name in ((axes[0, 0], "loss", "training loss"), (axes[0, 0], "val_loss", "validation loss"),
                          (axes[0, 1], "val_auc", "validation AUC")):
        points = [(r["epoch"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), color="0.7" if key == "loss" else "tab:blue", lw=1, marker="o" if key != "loss" else None, ms=3, label=name)
            if key == "val_auc":
                best = max(points, key=lambda p: p[1])
                ax.plot(*best, "o", ms=9, mfc="none", color="tab:red", label=f"best, {best[1]:.3f}")
    axes[0, 0].set(xlabel="epoch", ylabel="cross-entropy")
    axes[0, 1].set(xlabel="epoch", ylabel="AUC", ylim=(min(0.4, axes[0, 1].get_ylim()[0]), 1.02))
    axes[0, 1].axhline(0.5, color="k", ls="--", lw=1, label="chance")
    for ax in axes[0]:
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    save_figure(fig, path)


def draw_roc(path, scored, thresholds, found, classes):
    """ROC of the test set (each class against the rest if more than two), the two operating points, and the validation's."""
    fig, axes = figure_of((5.2, 5))
    ax, K = axes[0, 0], len(classes)
    for i, c in enumerate([1] if K == 2 else range(K)):
        for split, style in (("val", dict(color="0.75")), ("test", dict(color=f"C{i}"))):
            labels, probs = scored[split]
            area = auc(labels == c, probs[:, c])
            if area is None or split == "val" and K > 2:
                continue
            fpr, tpr, _ = roc(labels == c, probs[:, c])
            name = ("validation" if split == "val" else "test") if K == 2 else classes[c]
            value = text_of(found["auc"]) if K == 2 and split == "test" else f"{area:.3f}"
            ax.plot(fpr, tpr, lw=2 if split == "test" else 1, label=f"{name}, AUC {value}", **style)
    for prefix, marker, name in (("", "o", "at 0.5"), ("youden_", "^", f"at {thresholds[0]:.2f}, Youden's of validation")):
        sens, spec = found[prefix + "sensitivity"]["value"], found[prefix + "specificity"]["value"]
        if K == 2 and None not in (sens, spec):
            ax.plot(1 - spec, sens, marker, color="tab:red", ms=8, mfc="none" if prefix else "tab:red", label=name, ls="none")
    ax.plot([0, 1], [0, 1], "k--", lw=1, label="chance")
    ax.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.legend(fontsize=8, loc="lower right")
    ax.grid(alpha=0.3)
    save_figure(fig, path)


def draw_confusion(path, labels, probs, thresholds, classes):
    K = len(classes)
    decisions = [("at 0.5" if K == 2 else "likeliest class", decide(probs))]
    if K == 2:
        decisions.append((f"at {thresholds[0]:.2f}, Youden's of validation", (probs[:, 1] >= thresholds[0]).astype(int)))
    fig, axes = figure_of(((2.2 + 0.7 * K) * len(decisions), 1.6 + 0.7 * K), 1, len(decisions))
    for ax, (name, chosen) in zip(axes[0], decisions):
        counts = np.zeros((K, K), int)
        np.add.at(counts, (labels, chosen), 1)
        share = counts / np.maximum(1, counts.sum(1, keepdims=True))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(K, K):
            ax.text(j, i, f"{counts[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", color="w" if share[i, j] > 0.6 else "k", fontsize=9)
        ax.set(xticks=range(K), yticks=range(K), xticklabels=classes, yticklabels=classes, xlabel="predicted", ylabel="true", title=name)
        ax.title.set_fontsize(10)
    fig.tight_layout()
    save_figure(fig, path)


def draw_cases(path, cases, probs, classes, count=6):
    """The surest right and the surest wrong decisions: three planes through the middle of each."""
    labels = np.array([c["label"] for c in cases])
    chosen = decide(probs)
    sure = probs[np.arange(len(probs)), chosen]
    rows = [(name, sorted(np.flatnonzero(mask), key=lambda i: -sure[i])[:count])
            for name, mask in (("right", chosen == labels), ("wrong", chosen != labels))]
    fig, axes = figure_of((2.1 * count, 13), 6, count)
    for ax in axes.flat:
        ax.set_axis_off()
    for block, (name, picked) in enumerate(rows):
        for j, i in enumerate(picked):
            v = load_volume(cases[i]).float().numpy()
            for plane, axis in enumerate((2, 1, 0)):
                ax = axes[3 * block + plane, j]
                ax.imshow(np.take(v, v.shape[axis] // 2, axis).T, cmap="gray", origin="lower", vmin=0, vmax=1)
                if not plane:
                    ax.set_title(f"is {classes[labels[i]]}\nscored {classes[chosen[i]]} {sure[i]:.2f}", fontsize=9,
                                 color="tab:green" if name == "right" else "tab:red")
        if not picked:
            axes[3 * block, 0].text(0, 0.5, f"no {name} decision", fontsize=10)
    fig.tight_layout()
    save_figure(fig, path)


# ---------------------------------------------------------------- training step


def class_weights(cases, K, args):
    """Weight of each class in the loss [K]: N / (K · its cases), or 1."""
    counts = np.bincount([c["label"] for c in cases], minlength=K)
    return torch.tensor(counts.sum() / (K * counts) if args.class_weights else np.ones(K), dtype=torch.float32)


def train_step(net, batches, stream, step, optimiser, lr, weights, args, where):
    """One optimiser step: this rank's part of the weighted mean cross-entropy of the global batch, and the gradient norm."""
    labels = [stream.case(n)["label"] for n in range(step * args.batch, (step + 1) * args.batch)]
    whole = weights[labels].sum().item()
    passes, total = args.batch // (args.micro * where.world), torch.zeros((), device=where.device)
    for a in range(passes):
        b = {k: v.to(where.device, non_blocking=True) for k, v in next(batches).items()}
        if where.world > 1:
            net.require_backward_grad_sync = a == passes - 1
        with where.autocast():
            logits = net(augment(b["volume"].float(), b["flips"]))
        loss = F.cross_entropy(logits.float(), b["label"], weight=weights.to(where.device), reduction="sum") / whole
        (loss * where.world).backward()  # the ranks' gradients are averaged
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_([w for w in net.parameters() if w.grad is not None], args.clip or float("inf"))
    for group in optimiser.param_groups:
        group["lr"] = group["scale"] * lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total, norm


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, cases, args, where):
    """Labels [N] and probabilities [N, K] of all cases, each rank a share of them, then reduced."""
    K = model.score.out_features
    probs = torch.zeros(len(cases), K, dtype=torch.float64, device=where.device)
    mine = list(range(where.rank, len(cases), where.world))
    passes = [mine[i:i + args.micro] for i in range(0, len(mine), args.micro)]
    for b in torch.utils.data.DataLoader(Shown(cases), batch_sampler=passes, num_workers=min(args.workers, len(passes))):
        with where.autocast():
            logits = model(b["volume"].to(where.device).float())
        probs[b["number"].to(where.device)] = logits.double().softmax(1)
    return np.array([c["label"] for c in cases]), where.sum(probs).cpu().numpy()


def loss_of(labels, probs, weights):
    w = weights.numpy()[labels]
    return float((-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)) * w).sum() / w.sum())


# ---------------------------------------------------------------- a run


def build_encoder(args, where):
    if args.init:
        encoder = load_pretrained(args.init, args.heads)
        same = [n for n, s in SIZES.items() if all(getattr(encoder.config, k) == v for k, v in s.items())]
        if args.size and args.size not in same:
            raise BadInput(f"--size {args.size}: {args.init} holds {same[0] if same else asdict(encoder.config)}; leave --size out")
        return encoder
    if args.size is None:
        args.size = "base" if where.device.type == "cuda" else "nano"
        if args.size == "nano":
            where.say("no CUDA device: --size nano on the CPU (--size base is the published model)")
    return Model(Config(**SIZES[args.size]))


def run(args, seed, out, cases, classes, skipped, stop, where):
    """Train with one seed, select by validation AUC, score the test set: its metrics, or None if it was asked to stop."""
    state = None
    if args.resume:
        if (out / "metrics.json").exists():
            where.say(f"{out}: has its metrics already")
            return read_json(out / "metrics.json", "the metrics of a run")
        if (out / "ckpt.pt").exists():
            state = load_checkpoint(out / "ckpt.pt", CLS_FORMAT)
        else:
            where.say(f"no checkpoint in {out}: starting at step 0")

    # model
    torch.manual_seed(seed)
    encoder = build_encoder(args, where)
    encoder.head.requires_grad_(False)  # predicts patches, is not used here
    if args.freeze:
        encoder.requires_grad_(False)
    K = len(classes)
    model = Classifier(encoder, K, args.pool)
    if state:
        fit(model, state["model"], out / "ckpt.pt")
    model.to(where.device)
    net = model
    if where.world > 1:
        net = DistributedDataParallel(model, device_ids=[where.device.index] if where.device.type == "cuda" else None)

    # data
    parts = {s: [c for c in cases if c["split"] == s] for s in SPLITS}
    chosen = set(label_subset([c["patient"] for c in parts["train"]], args.labels, seed, [c["label"] for c in parts["train"]]))
    parts["train"] = [c for c in parts["train"] if c["patient"] in chosen]
    where.say(f"seed {seed}: " + ", ".join(f"{len(parts[s])} {s} ({' + '.join(map(str, np.bincount([c['label'] for c in parts[s]], minlength=K)))})"
                                           for s in SPLITS) + f" cases of {' + '.join(classes)}; {args.init or 'from scratch'}")
    weights = class_weights(parts["train"], K, args)
    stream = Stream(parts["train"], seed, args.flip)
    epoch_steps = -(-len(stream.cases) // args.batch)
    steps = max(1, round(args.epochs * len(stream.cases) / args.batch))

    # resume, optimiser
    optimiser = torch.optim.AdamW(layer_decay_groups(model, args.lr, args.wd, args.decay), betas=(0.9, args.beta2), fused=True)
    first, best, stale = 0, [-1.0, float("inf")], 0
    if state:
        optimiser.load_state_dict(state["optimiser"])
        first, best, stale = state["step"], state["best"], state["stale"]
    if where.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", resume_step=first if state else None)
        write_json(out / "args.json", {**vars(args), "seeds": [seed]})
        if skipped:
            write_table(out / "skipped.csv", ["file", "split", "reason"], skipped)
    loader = torch.utils.data.DataLoader(stream, batch_sampler=micro_batches(first, args, where), num_workers=args.workers,
                                         pin_memory=where.device.type == "cuda")
    batches = iter(loader)

    def checkpoint(path, step, **more):
        save_checkpoint(path, format=CLS_FORMAT, config=asdict(encoder.config), model=model.state_dict(), pool=args.pool, classes=classes,
                        volume=list(args.volume), window=args.window, step=step, best=best, args=vars(args), **more)

    def validate(step):
        nonlocal best, stale
        labels, probs = evaluate(model, parts["val"], args, where)
        found = measure(labels, probs, thresholds_of(labels, probs))
        area, loss = found["auc"], loss_of(labels, probs, weights)
        key = [-1.0 if area is None else area, loss]
        better = key[0] > best[0] or key[0] == best[0] and key[1] < best[1]            # of equal AUCs the lower loss
        best, stale = (key, 0) if better else (best, stale + 1)
        where.say(f"epoch {step * args.batch / len(stream.cases):6.1f}: validation AUC {'undefined' if area is None else f'{area:.3f}'}, "
                  f"loss {loss:.3f}{', best so far' if better else ''}")
        if where.main:
            log.write(step=step, epoch=step * args.batch / len(stream.cases), val_loss=loss, val_auc=area, val_accuracy=found["accuracy"])
            if better:
                checkpoint(out / "best.pt", step, val_auc=area)

    # loop
    last = min(steps, first + args.stop_after) if args.stop_after else steps
    running, since = torch.zeros((), device=where.device), first
    bar = tqdm(total=steps, initial=first, disable=not where.main, mininterval=1, desc=f"seed {seed}", unit="step")
    clock, step, stopping, enough = time.perf_counter(), first, False, bool(args.patience and stale >= args.patience)
    while step < last and not enough:
        lr = cosine_lr(step, steps, args.lr, args.warmup) if args.schedule == "cosine" else poly_lr(step, steps, args.lr)
        loss, norm = train_step(net, batches, stream, step, optimiser, lr, weights, args, where)
        running += loss
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == last or where.world == 1 and stop.asked:
            mean, seconds = where.sum(running).item() / (step - since), time.perf_counter() - clock
            stopping = stop.agreed(where)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if where.main:
                log.write(step=step, epoch=step * args.batch / len(stream.cases), loss=mean, lr=lr, grad_norm=norm.item(),
                          samples_per_s=(step - since) * args.batch / seconds, seconds=seconds)
            running, since, clock = torch.zeros_like(running), step, time.perf_counter()
        pause = time.perf_counter()
        if step % (args.val_every * epoch_steps) == 0 or step == steps:
            validate(step)
            enough = bool(args.patience and stale >= args.patience)
        if where.main and (step % (args.save_every * epoch_steps) == 0 or step == last or stopping or enough):
            checkpoint(out / "ckpt.pt", step, optimiser=optimiser.state_dict(), stale=stale)
        clock += time.perf_counter() - pause
        if stopping:
            break
    bar.close()
    if step < steps and not enough:
        where.say(f"stopped at step {step} of {steps}, saved in {out / 'ckpt.pt'}: --resume goes on")
        return None
    return finish(model, parts, classes, seed, out, args, where)


def finish(model, parts, classes, seed, out, args, where):
    """The one look at the test set, with the selected weights: metrics, tables, pictures."""
    where.barrier()
    chosen = load_checkpoint(out / "best.pt", CLS_FORMAT)
    fit(model, chosen["model"], out / "best.pt")
    scored = {s: evaluate(model, parts[s], args, where) for s in ("val", "test")}
    thresholds = thresholds_of(*scored["val"])
    labels, probs = scored["test"]
    patients = np.array([c["patient"] for c in parts["test"]])
    found = with_intervals(labels, probs, patients, thresholds, args.bootstrap, seed)
    metrics = dict(task=args.task, seed=seed, init=args.init, step=chosen["step"], cases={s: len(parts[s]) for s in SPLITS},
                   classes=classes, selected_by="validation AUC", val_auc=chosen["val_auc"], thresholds=thresholds, test=found,
                   shortcut=shortcut(parts["train"], parts["test"], len(classes), args, seed))
    if len(classes) > 2:
        metrics["auc_each"] = {name: auc(labels == c, probs[:, c]) for c, name in enumerate(classes)}
    if not where.main:
        return metrics
    write_table(out / "scores.csv", ["file", "patient", "split", "label", *(f"p_{c}" for c in range(len(classes))), "predicted"],
                [[c["file"], c["patient"], s, y, *(f"{x:.8f}" for x in p), d] for s, (ys, ps) in scored.items()
                 for c, y, p, d in zip(parts[s], ys, ps, decide(ps))])
    draw_curves(out / "curves.png", read_log(out / "log.jsonl"))
    draw_roc(out / "roc.png", scored, thresholds, found, classes)
    draw_confusion(out / "confusion.png", labels, probs, thresholds, classes)
    draw_cases(out / "cases.png", parts["test"], probs, classes)
    report(metrics, len(set(patients)), where)
    write_json(out / "metrics.json", metrics)  # last: its presence says that the run is done
    where.say("wrote " + ", ".join(str(out / f) for f in ("best.pt", "metrics.json", "scores.csv", "roc.png", "confusion.png", "cases.png")))
    return metrics


def write_table(path, header, rows):
    with write_beside(path) as tmp, open(tmp, "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])


def report(m, patients, where):
    val = "undefined" if m["val_auc"] is None else f"{m['val_auc']:.3f}"
    where.say(f"test, {m['cases']['test']} cases of {patients} patients, weights of step {m['step']} (validation AUC {val}), 95 % intervals")
    where.say(f"{'AUC':>18}  {text_of(m['test']['auc'])}")
    points = ("at 0.5", f"at {m['thresholds'][0]:.3f} (Youden's, of validation)") if len(m["classes"]) == 2 else ("likeliest", "Youden's of each class")
    where.say(f"{'':>18}  {points[0]:<22} {points[1]}")
    for k in ("accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"):
        where.say(f"{k.replace('_', ' '):>18}  {text_of(m['test'][k]):<22} {text_of(m['test']['youden_' + k])}")
    where.say(f"{'shortcut baseline':>18}  AUC {text_of(m['shortcut'])}: logistic regression on {m['shortcut']['features']} "
              "statistics of header and histogram, which see no anatomy")


def summary(runs, args, where):
    """Mean ± sample sd over the seeds, printed and written."""
    spread = {}
    for k in runs[0]["test"]:
        values = [m["test"][k]["value"] for m in runs]
        spread[k] = None if None in values else dict(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))
    where.say(f"{len(runs)} seeds ({' '.join(map(str, args.seeds))}), test, mean ± sd: " + ", ".join(
        f"{k.replace('_', ' ')} " + (f"{v['mean']:.3f} ± {v['sd']:.3f}" if v else "undefined")
        for k, v in spread.items() if not k.startswith("youden")))
    if where.main:
        write_json(Path(args.out) / "metrics.json", dict(task=args.task, seeds=args.seeds, test=spread, runs=runs))


# ---------------------------------------------------------------- main


def main():
    p = parser()
    args = p.parse_args()
    args.out = args.out or f"out/cls-{args.flavour + '-phantom' if args.task == 'phantom-cls' else args.task}"
    out = Path(args.out)
    if args.resume and (out / "args.json").exists():
        args = resumed_args(p, read_json(out / "args.json", "the arguments of a run"), FREE)
        args.out, args.resume = str(out), True

    # devices, data
    where = place(args.device, args.dtype, args.seeds[0])
    stop = StopRequest()
    settle(args, build_encoder(args, where).config, where)
    find_data(args, where)
    cases, classes = list_cases(args, where)
    cases, skipped = prepare_all(cases, args, where)

    # a run a seed
    folders = [out if len(args.seeds) == 1 else out / f"seed-{seed}" for seed in args.seeds]
    if where.main:
        for folder in folders if not args.resume else []:
            keep_earlier_run(folder, where.say)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "args.json", vars(args))
    runs = []
    for seed, folder in zip(args.seeds, folders):
        metrics = run(args, seed, folder, cases, classes, skipped, stop, where)
        if metrics is None:
            return
        runs.append(metrics)
    if len(runs) > 1:
        summary(runs, args, where)


if __name__ == "__main__":
    cli(main)
    leave()
