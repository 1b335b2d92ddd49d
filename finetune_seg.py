"""Segmentation: UNETR on the pre-trained encoder, for AMOS, the Decathlon, left atria, or your own.

    python finetune_seg.py --task phantom  # CPU demo on made-up patients, nano
    python finetune_seg.py --task amos --data data/amos --init out/pretrain/ckpt.pt  # one GPU
    python finetune_seg.py --task amos --preset quick                      # a first result
    torchrun --nproc_per_node=4 finetune_seg.py --task amos                # four GPUs, the same run
    python finetune_seg.py --task amos --labels 0.1 --out out/seg-amos-10  # a tenth of the labels
    python finetune_seg.py --task mine --data DIR --classes liver tumour --range -20 190
    python finetune_seg.py --task amos --resume     # goes on where out/seg-amos left off

Scans are prepared once (RAS+, resampled, intensities mapped to [0, 1], cut to the foreground) and
kept in data/cache. Leaves in --out: args.json, subset.json, skipped.csv, log.jsonl, ckpt.pt
(resumable), best.pt (highest mean Dice), metrics.json, curves.png, overlay.png. Every random choice
is a function of (seed, sample), so any number of workers or GPUs trains one model.

Sections: arguments · training · data sets · reading · preparation and back · the cache · crops ·
augmentation · network · loss · evaluation · pictures

B crops of a batch, K classes with the background, X Y Z voxels, C width, G patches.
"""

import itertools
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from scipy.ndimage import find_objects
from scipy.spatial.transform import Rotation
from torch import nn
from torch.signal.windows import gaussian
from tqdm import tqdm

from common import (
    BadInput,
    Loop,
    check_least,
    cli,
    cosine_lr,
    distribute,
    draw_curves,
    figure_of,
    fill,
    is_like,
    load_checkpoint,
    new_parser,
    open_run,
    passes_of,
    read_json,
    read_log,
    restored,
    resumed,
    save_figure,
    setup,
    split_batch,
    training_flags,
    write_beside,
    write_json,
    write_table,
)
from kernels import hindrance
from model import (
    Config,
    Model,
    checkpoint_state,
    choose_kernels,
    config_of,
    fit,
    grid_of,
    layer_decay_groups,
    new_encoder,
    untrained,
    weights_of,
)
from phantom import write_phantom
from serialize import (
    apart,
    below,
    cut,
    digest,
    label_subset,
    linear_weights,
    names_in,
    normalise,
    read_h5,
    read_named,
    resampled,
    set_largest,
    size_flag,
    stamp_of,
    stem_of,
    suffix_of,
    text_of,
)

# ---- arguments -------------------------------------------------------------------------------

SEGMENTER = "ar3d-seg-3"  # the `format` of the checkpoints that hold a Segmenter
FEATURES = 16  # of UNETR's decoder (published)
FOREGROUND = 0.5  # share of crops centred on a labelled voxel, its class drawn first (published)
WINDOWS = 4  # of the sliding window, a forward pass
CACHE = Path("data/cache")
PRETRAINED = "out/pretrain/ckpt.pt"

# What a flag that was not given stands for, and what has no flag. epochs: passes over the training
# volumes, where --steps is not given; crops: of a volume; warmup: share of the run; clip: gradient
# norm, 0 is off; overlap: of sliding windows; flip: probability an axis; rotate: of 90, 180 or 270°
# about z; intensity: of a scale, and of a shift, by up to 10 %; vals: validations of a run.
PUBLISHED = {
    "roi": [96],
    "epochs": 1000,
    "batch": 4,
    "crops": 4,
    "lr": 3e-4,
    "wd": 0.05,
    "layer_decay": 0.75,
    "warmup": 0.05,
    "clip": 0.0,
    "overlap": 0.75,
    "augment": "standard",
    "flip": 0.2,
    "rotate": 0.2,
    "intensity": 0.1,
    "vals": 20,
}
SCRATCH = {"lr": 1e-4, "wd": 1e-5}  # published, for an encoder that was not pre-trained
PRESETS = {  # what departs from the published recipe
    "published": {},
    "quick": {"steps": 6000, "batch": 2, "overlap": 0.5, "vals": 6},
    "nano": {
        "roi": [64],
        "spacing": [4.5, 4.5, 4.5],
        "steps": 700,
        "batch": 1,
        "crops": 1,
        "lr": 2e-3,
        "layer_decay": 0.75,
        "clip": 1.0,
        "overlap": 0.5,
        "flip": 0.0,
        "rotate": 0.0,
        "intensity": 0.3,
        "vals": 4,
    },
}

AMOS_ORGANS = (
    "spleen, right kidney, left kidney, gall bladder, esophagus, liver, stomach, aorta, postcava, "
    "pancreas, right adrenal gland, left adrenal gland, duodenum, bladder, prostate/uterus"
)
AMOS = "AMOS22 (https://amos22.grand-challenge.org)"
MSD = "of the Medical Segmentation Decathlon (http://medicaldecathlon.com)"
ATRIA = (
    "the 2018 Left Atrium challenge (http://atriaseg2018.cardiacatlas.org), or UA-MT's copy of it "
    "(*/mri_norm2.h5, train.list, test.list)"
)


def task_of(source, classes, intensity_range, spacing, **more):
    """A row of TASKS: where it comes from, classes without the background, range in HU (or
    percentiles, zscore), spacing in mm (None: as it is); more: what departs from PUBLISHED, and
    mr_after: cases of a higher number are MR, mapped by percentiles.
    """
    return {
        "classes": classes and classes.split(", "),
        "source": source,
        "range": intensity_range,
        "spacing": spacing,
        "mr_after": None,
        **more,
    }


HALF = {"epochs": 500, "warmup": 0.1, "vals": 10}  # warm-up and intervals as of 1000
TASKS = {
    "amos": task_of(AMOS, AMOS_ORGANS, [-175, 250], [1.5, 1.5, 2], mr_after=500),
    "liver": task_of(f"Task03_Liver {MSD}", "liver, cancer", [-21, 189], [1, 1, 1]),
    "lung": task_of(f"Task06_Lung {MSD}", "cancer", [-1000, 1000], [1, 1, 1]),
    "pancreas": task_of(
        f"Task07_Pancreas {MSD}", "pancreas, cancer", [-87, 199], [1, 1, 1.5], **HALF
    ),
    "hepaticvessel": task_of(
        f"Task08_HepaticVessel {MSD}", "vessel, tumour", [0, 230], [1, 1, 1.5], **HALF
    ),
    "spleen": task_of(f"Task09_Spleen {MSD}", "spleen", [-57, 175], [1, 1, 1]),
    "colon": task_of(f"Task10_Colon {MSD}", "colon cancer primaries", [-57, 175], [1, 1, 1.5]),
    # departs: published are z-scores, and --range zscore; pre-training saw [0, 1], and an encoder
    # that meets another scale loses (validation Dice 0.690 against 0.774, one seed of nano)
    "la": task_of(ATRIA, "left atrium", ["percentiles"], None, roi=[192, 192, 64], layer_decay=0.9)
    | {"augment": "strong", "flip": 0.5},
    "phantom": task_of("phantom.py", AMOS_ORGANS, [-175, 250], [4.5] * 3, data="data/phantom/amos"),
}
OWN_TASK = task_of("a folder of your own", None, ["percentiles"], None)
LAYOUT = (
    "expected there: dataset.json, imagesTr/*.nii.gz and labelsTr/*.nii.gz (AMOS: imagesVa and "
    "labelsVa too)"
)


def parser():
    p = new_parser(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--task", help=f"{', '.join(TASKS)}, or a name of your own with --data")
    add("--data", metavar="DIR", help="in the Decathlon layout (default: data/TASK)")
    add("--classes", nargs="+", help="labels 1, 2, … (default: the task's, or dataset.json's)")
    add("--range", nargs="+", help="LOW HIGH, zscore, percentiles (la: +0.08) (default: the task)")
    add("--spacing", nargs=3, type=float, metavar="MM", help="(default: the task's; nano 4.5)")
    size_flag(add)
    add("--labels", default="1", help="share of the training cases, or a list of names (default 1)")
    add = p.add_argument_group("training").add_argument
    add("--init", help=f"a file, scratch or scratch:SIZE (default: {PRETRAINED} if it is there)")
    words = "published: unetr; light: no path from the scan but through the tokens"
    add("--decoder", choices=["unetr", "light"], default="unetr", help=words)
    add("--freeze", action="store_true", help="train the decoder alone")
    add("--preset", choices=[*PRESETS], help="(default: published with CUDA, nano without)")
    words = "edges of a crop in voxels, one or three (published: 96; la 192 192 64; nano 64)"
    add("--roi", nargs="+", type=int, help=words)
    words = "published: standard (flips, 90°, intensities; nano: intensities alone); la strong"
    add("--augment", choices=["none", "standard", "strong"], help=words)
    words = "(published: 1000 epochs; pancreas, hepaticvessel 500; quick 6000 steps; nano 700)"
    add("--steps", type=int, help=words)
    add("--batch", type=int, help="volumes a step, all ranks (published: 4; quick 2; nano 1)")
    add("--micro", type=int, help="crops a pass on a device (default: its share)")
    add("--lr", type=float, help="(published: 3e-4, from scratch 1e-4; nano 2e-3)")
    words = "of --lr, a layer down (published, nano: 0.75, which gave atria Dice +0.045; la 0.9)"
    add("--layer-decay", type=float, help=words)
    words = "published: 50 epochs; quick a sixth of the run, nano a quarter"
    training_flags(p, "out/seg-TASK", words, workers=4, compiled=True)
    return p


def settle(args, machine):
    """Fill in what was not given, in place. Returns what checkpoints say of the task."""
    if not args.task or args.task not in TASKS and not args.data:
        raise BadInput(
            f"--task {args.task}: {', '.join(TASKS)}, or a name of your own with --data DIR in the "
            "Decathlon layout"
        )
    if not args.preset:
        args.preset = "published" if machine.cuda else "nano"
        machine.say(f"--preset {args.preset} (published: the full recipe, for CUDA devices)")
    if not args.init:
        args.init = PRETRAINED if os.path.exists(PRETRAINED) else "scratch"
        machine.say(f"--init {args.init} ({PRETRAINED} where it is there)")
    fill(args, PRESETS[args.preset])
    fill(args, TASKS.get(args.task, OWN_TASK))
    if untrained(args.init):
        fill(args, SCRATCH)
    fill(args, PUBLISHED | {"data": f"data/{args.task}", "compile": not hindrance(machine.device)})
    fill(args, {"workers": 4 if machine.cuda else 0})
    if args.largest:  # of the run that goes on, too
        set_largest(str(args.largest))
    check_least(args)
    split_batch(args, machine, args.batch * args.crops)
    roi = args.roi * 3 if len(args.roi) == 1 else args.roi
    if len(roi) != 3 or min(roi) < 1:
        raise BadInput(f"--roi {args.roi}: one or three edges in voxels")
    standard = args.augment == "standard"
    args.flip *= args.augment != "none"
    args.intensity *= standard
    args.rotate *= standard and roi[0] == roi[1]  # by 90° the edges along x and y change places
    kept = ("task", "data", "mr_after", "spacing", "overlap", "decoder")
    setting = {k: vars(args)[k] for k in kept}
    return setting | {"intensity_range": parse_range(args.range), "roi": roi, "features": FEATURES}


def parse_range(words):
    """--range -> [low, high], or the word."""
    if words in (["percentiles"], ["zscore"]):
        return words[0]
    try:
        low, high = map(float, words)
    except ValueError:
        low = high = 0
    if low < high:
        return [low, high]
    words = " ".join(words)
    raise BadInput(f"--range {words}: LOW HIGH with LOW below HIGH, percentiles, or zscore")


# ---- training --------------------------------------------------------------------------------


def train_step(net, samples, args, machine):
    """Forward and backward of this rank's passes: its share of the loss, the seconds it waited."""
    passes, total, waited = passes_of(args, machine), 0.0, 0.0
    for places in passes:
        start = time.perf_counter()
        b = next(samples)
        waited += time.perf_counter() - start
        image, label = augment(b["image"].float(), b["label"], b["chance"], args)
        if machine.world > 1:
            net.require_backward_grad_sync = places is passes[-1]
        with machine.autocast():
            logits = net(image)
        loss = segmentation_loss(logits, label) * (len(places) / args.units)
        (loss * machine.world).backward()  # the ranks' gradients are averaged
        total += loss.detach()
    return total, waited


def main():
    args, state = resumed(parser(), SEGMENTER, "out/seg-{task}")
    out = Path(args.out)
    machine = setup(args)
    torch.backends.cudnn.benchmark = machine.cuda  # crops and windows have one shape
    setting = settle(args, machine)

    # data
    make_phantom(args.task, args.data, machine)
    cases, classes = find_cases(args.task, args.data, args.classes, machine)
    setting["classes"] = classes
    train, val, failed = prepare_all(cases, setting, machine)
    names = label_subset([c["id"] for c in train], args.labels, args.seed)
    train = [c for c in train if c["id"] in names]
    subset = {"train": names, "val": [c["id"] for c in val]}
    fill(args, {"steps": max(1, round(args.epochs * len(train) / args.batch))})
    fill(args, {"val_every": -(-args.steps // args.vals)})
    machine.say(
        f"{args.data}: {len(train)} volumes to train on (--labels {args.labels}), {len(val)} to "
        f"validate, {len(classes)} classes; {args.steps} steps of {args.batch} volumes x "
        f"{args.crops} crops of {text_of(setting['roi'])} at {args.spacing or 'their own'} mm"
    )

    # model, optimiser
    model = build(args, state, setting, machine)
    net = distribute(model, args, machine)
    groups = layer_decay_groups(model, args.wd, args.layer_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    dice = None
    if state:
        if state.get("subset") != subset:
            raise BadInput(f"--data {args.data}: other cases than the run to resume has")
        fit(model, state["model"], out / "ckpt.pt")
    first, best, owes = restored(state, optimiser, -1.0)
    log = open_run(out, args, machine, state)
    if machine.main:
        write_json(out / "subset.json", subset)
        write_table(out / "skipped.csv", ("case", "split", "reason"), failed)

    def save(name, **more):
        log.save(name, **checkpoint_state(model, SEGMENTER), **more, setting=setting)

    def validate_at(step):
        nonlocal best, dice
        dice, mean = validate(model, val, setting, step, log, out, machine)
        if not mean <= best:
            save("best.pt", step=step, val_dice=mean)
            best = mean

    # loop
    if owes:
        validate_at(first)
    loop = Loop(args, machine, log, first, "segmentation", samples_per_s=args.units)
    waited = 0.0
    samples = loop.batches(Crops(train, setting["roi"], args.crops, args.seed))
    for step in loop:
        lr = cosine_lr(step, args.steps, args.lr, round(args.warmup * args.steps))
        loss, seconds = train_step(net, samples, args, machine)
        waited += seconds
        if loop.logged:  # seconds a step, so that their rate is the share of the time
            loop.per_second["waiting"], waited = waited / (step + 1 - loop.since), 0.0
        loop.update(optimiser, lr, loss, args.clip)
        if loop.validates:
            with loop.paused():
                validate_at(loop.step)
        if loop.saves:
            save("ckpt.pt", subset=subset, args=vars(args), **loop.state(optimiser, best))
    if loop.finished:
        if dice is None:  # the run to resume was at its end
            dice, _ = evaluate(model, val, setting, machine)
        metrics = {"step": loop.step, "best_mean_dice": best, "skipped": len(failed)}
        report(dice, val, classes, metrics, out, machine)


def build(args, state, setting, machine):
    """The encoder of --init (or of the run to resume) and a fresh decoder, on the device."""
    torch.manual_seed(args.seed)
    if state:
        encoder = Model(config_of(Config, state, args.out))
    else:
        encoder = new_encoder(args.init, "base" if machine.cuda else "nano", machine)
    encoder.requires_grad_(not args.freeze)
    patch, roi = encoder.config.patch, setting["roi"]
    if any(r % patch for r in roi):
        raise BadInput(f"--roi {roi}: not a multiple of the patch {patch} of {args.init}")
    if not machine.cuda and machine.dtype == torch.bfloat16 and min(roi) < 4 * patch:
        # the bf16 weight gradient of a 3³ convolution over 2³ voxels reads memory that was never
        # written (torch 2.13 on CPUs)
        machine.dtype = torch.float32
        machine.say(f"--roi {roi}: less than 4 patches, where bf16 fails on CPUs: float32")
    model = Segmenter(encoder, len(setting["classes"]) + 1, setting["features"], args.decoder)
    choose_kernels(encoder, args, machine)
    weights = weights_of(model) / 1e6
    machine.say(
        f"--init {args.init}: {encoder.config.layers} layers, width {encoder.config.width}"
        f"{' (frozen)' if args.freeze else ''}; with its decoder {weights:.1f} M parameters, "
        f"{str(machine.dtype)[6:]} on {machine.world} x {machine.device.type}"
    )
    return model.to(machine.device)


# ---- data sets -------------------------------------------------------------------------------
# A case is a dict: id, image, label (paths), split. What lists them yields these four.

SPLITS = (("train", "training", "Tr"), ("val", "validation", "Va"))
CONTENTS = {"labels": dict, "training": list, "validation": list}  # of dataset.json


def make_phantom(task, data, machine):
    """If the task is the phantom and is not there, rank 0 makes it. All ranks must call this."""
    there = Path(data, "dataset.json").exists() or Path(data).name != "amos"
    if machine.main and task == "phantom" and not there:
        machine.say(f"making phantom patients in {data}")
        write_phantom(Path(data).parent, parts=("amos",))
    machine.barrier()


def find_cases(name, data, classes, machine):
    """The cases of task `name` in folder `data`, by split and id, and the names of the classes.

    classes: those names, if they are given. Where no case is listed for validation, a hash of the
    case's id decides, so that its split does not depend on what else is there.
    """
    root, task, notes = Path(data), TASKS.get(name, OWN_TASK), {}
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder. --task {name} needs {task['source']}; {LAYOUT}")
    for file in ("dataset.json", "dataset_withVal.json"):  # the second has the last word
        if (root / file).exists():
            notes = read_json(root / file, "the Decathlon's table of contents", CONTENTS)
    labels = notes.get("labels", {}).items()
    named = {int(k[:9]): str(v) for k, v in labels if k.isdecimal() and k.strip("0")}
    classes = classes or task["classes"] or [named[k] for k in sorted(named)]
    if not 1 <= len(classes) <= 255:
        raise BadInput(
            f"--task {name}: {len(classes)} classes, where 1 to 255 are possible; name them with "
            f"--classes NAME …, or as labels in {root / 'dataset.json'}"
        )
    rows = [*listed(root, notes)] or [*listed_in_h5(root)] or [*found_on_disk(root)]
    if not rows:
        folder = root / "labelsTr"
        raise BadInput(
            f"{root}: no labelled scans ({LAYOUT}); {folder} "
            f"{'holds no *.nii.gz' if folder.is_dir() else 'does not exist'}"
        )
    cases = [dict(zip(("id", "image", "label", "split"), map(str, row))) for row in rows]
    often, several = Counter(c["id"] for c in cases), 0
    for c in cases:
        stem = c["image"].removesuffix(".nii.gz")
        if os.path.exists(f"{stem}_0000.nii.gz"):  # nnU-Net's names
            c["image"] = f"{stem}_0000.nii.gz"
        several += os.path.exists(f"{stem}_0001.nii.gz")
        if often[c["id"]] > 1:  # files of one name: told apart by their folders
            c["id"] = os.path.relpath(c["image"].removesuffix(suffix_of(c["image"]) or ""), root)
    if several:
        machine.say(f"{root}: cases with several channels, of which the first is read: {several}")
    for key in ("id", "image", "label"):
        seen = {}
        for c in cases:
            value = c[key] if key == "id" else os.path.realpath(c[key])
            first = seen.setdefault(value, c)
            if first is not c:
                both = f"{first['id']} ({first['split']}) and {c['id']} ({c['split']})"
                raise BadInput(f"{root}: cases {both} have one {key}, {c[key]}; list it once")
    if all(c["split"] == "train" for c in cases):
        machine.say(f"{root}: lists no validation cases; a hash of the id keeps a fifth")
        cases.sort(key=lambda c: hash_share(c["id"]))
        for c in cases:
            if hash_share(c["id"]) < 0.2:
                c["split"] = "val"
        cases[0]["split"], cases[-1]["split"] = "val", "train"  # however few there are
    return sorted(cases, key=lambda c: (c["split"], c["id"])), classes


def hash_share(name):
    """A number in [0, 1) that depends on the name of a case alone."""
    return int(digest(name, 8), 16) / 2**64


def listed(root, notes):
    """Cases of dataset.json with both image and label (entries without one are test scans)."""
    for split, key, _ in SPLITS:
        for e in notes.get(key, []):
            if not is_like(e, {"image": str, "label": str}):
                raise BadInput(
                    f"{root / 'dataset.json'}: lists {e!r} under {key}, where "
                    "{image: FILE, label: FILE} is needed"
                )
            if e.keys() >= {"image", "label"} and "/._" not in e["image"]:
                image = root / e["image"]
                yield stem_of(image), image, root / e["label"], split


def found_on_disk(root):
    """Pairs of one name in imagesTr and labelsTr (Va: validation), litter of macOS (._*) aside."""
    for split, _, tag in SPLITS:
        for label in (root / f"labels{tag}").glob("[!.]*.nii*"):
            yield stem_of(label), root / f"images{tag}" / label.name, label, split


def listed_in_h5(root):
    """UA-MT's copy of the left atria: NAME/mri_norm2.h5, the names in train.list and test.list."""
    files, splits = {f.parent.name: f for f in below(root) if f.name == "mri_norm2.h5"}, {}
    if not files:
        return
    for split, title in (("train", "train.list"), ("val", "test.list")):
        splits |= dict.fromkeys(names_in(root, title), split)
    for name, split in (splits or dict.fromkeys(files, "train")).items():
        file = files.get(name, root / name / "mri_norm2.h5")
        yield name, file, file, split


def range_of_case(case, intensity_range, mr_after):
    """`intensity_range`, or percentiles where the id's number is above `mr_after` (AMOS: MR)."""
    number = re.search(r"(\d+)\D*$", case["id"])
    return "percentiles" if mr_after and number and int(number[1]) > mr_after else intensity_range


# ---- reading ---------------------------------------------------------------------------------


def read_case(case, K):
    """A case's scan as `read_scan` returns it, and its labels [X, Y, Z] uint8, 0 … K − 1.

    BadInput names the file at fault.
    """
    for what in ("image", "label"):
        if not os.path.isfile(case[what]):
            raise BadInput(f"{case[what]}: no such {what} file, though it is listed")
    values, ras, own = read_named(case["image"])
    if case["image"].endswith(".h5"):
        labels, grid = read_named(case["label"], partial(read_h5, name="label"))
    else:
        labels, grid, _ = read_named(case["label"])
    gap = apart(grid, ras, values.shape)
    low, high = labels.min(), labels.max()
    if labels.shape != values.shape:
        wrong = f"label {text_of(labels.shape)}, image {text_of(values.shape)} voxels (RAS)"
    elif gap > 0.5:
        wrong = f"its affine is not the image's: corners are up to {gap:.1f} voxels apart"
    elif not 0 <= low <= high < K:
        wrong = f"label values {low:g} ... {high:g}, where 0 ... {K - 1} are expected"
    elif not np.array_equal(whole := labels.astype(np.uint8), labels):
        wrong = "labels that are not integers"
    else:
        return values, ras, own, whole
    raise BadInput(f"{case['label']}: {wrong}")


# ---- preparation and back --------------------------------------------------------------------


def prepare(values, ras, own, spacing, intensity_range):
    """What `read_scan` returned -> float16 [X, Y, Z] in RAS+ at `spacing` (mm; None: as it is), cut
    to its foreground, and the geometry (plain types) with which labels follow and come back.

    The grid keeps its directions and its extent, so an oblique scan stays oblique and a spacing is
    met to half a voxel over the whole extent. Foreground is the box of what is above the minimum.
    """
    if values.ndim != 3:
        raise BadInput(f"{values.ndim}D ({text_of(values.shape)}), and one volume is needed")
    shape, grid = resampled(values.shape, ras, spacing)
    volume = torch.from_numpy(normalise(values, intensity_range))[None, None]
    volume = F.interpolate(volume, shape, mode="trilinear")[0, 0].numpy()
    geometry = {
        "shape": list(values.shape),
        "affine": own.tolist(),
        "resampled": shape,
        "box": box_of(volume > volume.min()),
        "spacing": nib.affines.voxel_sizes(grid).tolist(),
    }
    return np.ascontiguousarray(volume[boxed(geometry["box"])], np.float16), geometry


def box_of(mask):
    """Where a mask begins and has ended along each axis; all of it where it has nothing."""
    box = []
    for axis, n in enumerate(mask.shape):
        hit = np.flatnonzero(mask.any(tuple({*range(mask.ndim)} - {axis}))).tolist()
        box.append([hit[0], hit[-1] + 1] if hit else [0, n])
    return box


def boxed(box):
    return tuple(slice(a, b) for a, b in box)


def nearest(labels, shape):
    """[X, Y, Z] -> `shape` by the nearest voxel of the same extent: labels are never mixed."""
    index = [((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape)]
    return labels[np.ix_(*index)]


def uncut(volume, geometry):
    """An array on the prepared grid -> uint8 on the resampled one, with zeros around."""
    whole = np.zeros(geometry["resampled"], np.uint8)
    whole[boxed(geometry["box"])] = volume
    return whole


def smooth(labels, shape):
    """[X, Y, Z] -> `shape`: each class's share is interpolated (trilinear), the largest wins."""
    if labels.shape == tuple(shape):
        return labels
    hats = [linear_weights(n, m).numpy() for n, m in zip(labels.shape, shape)]
    best, won = np.zeros(shape, np.float32), np.zeros(shape, labels.dtype)
    rest = np.ones(shape, np.float32)  # the background's share
    for k, box in enumerate(find_objects(labels), 1):
        if box is None:
            continue
        hits = [hat[part] for hat, part in zip(hats, box)]
        reached = boxed(box_of(hit)[1] for hit in hits)  # the class's share is 0 elsewhere
        hits = [hit[:, part] for hit, part in zip(hits, reached)]
        share = np.einsum("ix,jy,kz,ijk->xyz", *hits, labels[box] == k, optimize=True)
        rest[reached] -= share
        better = share > best[reached]
        best[reached][better] = share[better]
        won[reached][better] = k
    won[rest > best] = 0
    return won


def invert(labels, geometry):
    """Labels on the prepared grid -> on the file's own grid, and the file's own affine."""
    return to_own_axes(smooth(uncut(labels, geometry), geometry["shape"]), geometry["affine"])


def to_own_axes(values, own):
    """An array in RAS+ -> in the axes of the file, whose affine is `own`, and that affine."""
    own = np.array(own)
    ras, axes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(own)
    axes = nib.orientations.ornt_transform(ras, axes)
    return np.ascontiguousarray(nib.orientations.apply_orientation(values, axes)), own


# ---- the cache -------------------------------------------------------------------------------
# A prepared case is NAME.image.npy (float16), NAME.label.npy (uint8), NAME.voxels.npy (int16
# [n, 3], class after class) and, written last, NAME.json.

VERSION = 2  # of these files
MOST = 10_000  # voxels of a class that crops are centred on


def prepare_all(cases, setting, machine):
    """Prepare what the cache does not hold, ranks sharing the work.

    Returns the cases to train on, those to validate with, and (id, split, reason) of those that
    cannot be used. BadInput if too few are left.
    """
    folder, jobs = CACHE / setting["task"], []
    for c in cases:
        files = [*filter(os.path.exists, (c["image"], c["label"]))]
        intensity_range = range_of_case(c, setting["intensity_range"], setting["mr_after"])
        how = [len(setting["classes"]) + 1, setting["spacing"], intensity_range]
        key = repr((VERSION, files, stamp_of(files), how))
        path = f"{folder / c['id'].replace('/', '_')[:40]}-{digest(key, 6)}"
        jobs.append(c | {"path": path, "how": how})
    machine.say(f"{len(jobs)} cases; prepared scans are kept in {folder}")
    failed, usable = [], {"train": [], "val": []}
    for c in machine.share(prepare_case, jobs, "preparing scans"):
        name, split, reason = c["id"], c["split"], c.get("error")
        if reason:
            machine.say(f"{split} case {name} cannot be used and is left out: {reason}")
            failed.append((name, split, reason))
        else:
            usable[split].append(c)
    train, val = usable.values()
    if not train or not val:
        raise BadInput(
            f"{setting['data']}: {len(train)} cases to train on and {len(val)} to validate with, "
            f"{len(failed)} that cannot be used {[r[2] for r in failed[:1]]}; one of each is needed"
        )
    return train, val, failed


def prepare_case(job):
    """In a worker: the job with what its NAME.json holds, or with an error: why it is of no use."""
    side = f"{job['path']}.json"
    try:
        if not os.path.exists(side):
            write_json(side, store(job, *job["how"]))
        return job | read_json(side, "a prepared case")
    except (BadInput, MemoryError) as e:
        return job | {"error": str(e) or "not enough memory"}


def store(case, K, spacing, intensity_range):
    """Write the arrays of a case: its geometry, and by class the voxels listed and cut off."""
    *scan, labels = read_case(case, K)
    image, geometry = prepare(*scan, spacing, intensity_range)
    whole = nearest(labels, geometry["resampled"])
    label = whole[boxed(geometry["box"])]  # a view
    rng, voxels = default_rng(0), []
    for k in range(1, K):
        at = np.argwhere(label == k).astype(np.int16)
        if len(at) > MOST:
            at = at[np.sort(rng.choice(len(at), MOST, replace=False))]
        voxels.append(at)
    for name, array in ("image", image), ("label", label), ("voxels", np.concatenate(voxels)):
        with write_beside(f"{case['path']}.{name}.npy") as tmp:
            np.save(tmp, array)
    label[:] = 0
    outside = np.bincount(whole.reshape(-1), minlength=K).tolist()
    return {"geometry": geometry, "voxels": [len(v) for v in voxels], "outside": outside}


def opened(case, what):
    return np.load(f"{case['path']}.{what}.npy", mmap_mode="r")


# ---- crops -----------------------------------------------------------------------------------


@dataclass
class Crops:
    """Crop n, a function of (cases, seed, n) alone: `crops` in a row are of one volume.

    Each pass over the cases has its own order. A crop is image float16 [X, Y, Z], label uint8, and
    chance float64 [32]: numbers for the augmentation.
    """

    host_keys = ("chance",)  # augment reads it there

    cases: list
    roi: list
    crops: int
    seed: int

    def __getitem__(self, n):
        epoch, i = divmod(n // self.crops, len(self.cases))
        order = default_rng([self.seed, 0, epoch]).permutation(len(self.cases))
        case, rng = self.cases[order[i]], default_rng([self.seed, 1, n])
        image, label, voxels = (opened(case, a) for a in ("image", "label", "voxels"))
        counts, room = case["voxels"], np.subtract(image.shape, self.roi).clip(0)
        if rng.random() < FOREGROUND and len(voxels):  # around a voxel of a class drawn first
            k = rng.choice(np.flatnonzero(counts))
            centre = voxels[sum(counts[:k]) + rng.integers(counts[k])]
            corner = (centre - np.array(self.roi) // 2).clip(0, room)
        else:  # anywhere
            corner = rng.integers(room + 1)
        image, label = (cut_padded(a, corner, self.roi) for a in (image, label))
        return {"image": image, "label": label, "chance": rng.random(32)}


def margins(shape, roi):
    """Zeros before and after, along each axis, that bring a volume up to the size of a crop."""
    short = np.subtract(roi, shape).clip(0).tolist()
    return [(s // 2, s - s // 2) for s in short]


def cut_padded(array, start, roi):
    """The box at `start`, amid zeros where the volume is smaller than it."""
    part = cut(array, start, roi)
    return np.pad(part, margins(part.shape, roi))


# ---- augmentation ----------------------------------------------------------------------------


def augment(image, label, chance, args):
    """A batch on its device, float32 [B, X, Y, Z] and uint8, changed as `chance` [B, 32] says."""
    for i, u in enumerate(chance.tolist()):
        if args.augment == "strong":
            image[i], label[i] = deform(image[i], label[i], u)
            image[i] = degrade(image[i], u)
        if u[5] < args.intensity:
            image[i] *= 0.9 + 0.2 * u[6]
        if u[7] < args.intensity:
            image[i] += 0.2 * u[8] - 0.1
        axes = [a for a in range(3) if u[a] < args.flip]
        turns = 1 + int(3 * u[4]) if u[3] < args.rotate else 0
        for t in (image, label):
            t[i] = t[i].flip(axes).rot90(turns, (0, 1))
    return image, label


def deform(image, label, u):
    """A crop by up to 15° about each axis, 0.85 … 1.25 as large, bent: resampled once."""
    turn, half = np.eye(3), np.array(image.shape) / 2
    if u[12] < 0.2:
        angles = (2 * np.array(u[9:12]) - 1) * [15, -15, 15]
        turn = Rotation.from_euler("XYZ", angles, degrees=True).as_matrix()
    if u[13] < 0.2:
        turn = turn / (0.85 + 0.4 * u[14])
    # coordinates from −1 to 1, the last axis first, are what the functions of grids take
    turn = np.c_[(turn * half / half[:, None])[::-1, ::-1], np.zeros(3)]
    turn = torch.from_numpy(turn[None]).float()  # [1, 3, 4]
    turn = turn.to(image.device, non_blocking=True)
    at = F.affine_grid(turn, (1, 1, *image.shape), align_corners=False)  # [1, X, Y, Z, 3]
    if u[16] < 0.2:
        bumps = noise((1, 3, 5, 5, 5), np.float32(u[15]), image) * 30 * u[16]  # voxels
        bumps = F.interpolate(bumps, image.shape, mode="trilinear", align_corners=True)
        half = torch.from_numpy(half).float().to(image.device, non_blocking=True)
        at += (bumps.movedim(1, -1) / half).flip(-1)
    image = F.grid_sample(image[None, None], at, padding_mode="border", align_corners=False)
    label = F.grid_sample(label[None, None].float(), at, mode="nearest", align_corners=False)
    return image[0, 0], label[0, 0]


def noise(shape, seed, like):
    generator = torch.Generator(like.device).manual_seed(int(seed * 2**31))
    return torch.randn(shape, generator=generator, device=like.device)


def degrade(v, u):
    """Noise, blur, brightness, contrast, low resolution, gamma of a crop [X, Y, Z], as nnU-Net.

    # departs: its noise is of z-scores (deviation up to 0.1); here it is up to 0.32 of [0, 1]
    """
    if u[17] < 0.1:
        v = v + noise(v.shape, u[18], v) * (0.1 * u[19]) ** 0.5
    if u[20] < 0.2:
        weights = gaussian(7, std=0.5 + 0.5 * u[21]).to(v.device, non_blocking=True)
        for _ in range(3):  # the last axis, which then comes first
            v = (F.pad(v, (3, 3)).unfold(2, 7, 1) @ (weights / weights.sum())).movedim(2, 0)
    if u[22] < 0.15:
        v = v * (0.75 + 0.5 * u[23])
    if u[24] < 0.15:
        v = v.lerp(v.mean(), 0.25 - 0.5 * u[25]).clamp(*v.aminmax())
    if u[26] < 0.25:
        small = [max(1, round(n * (0.5 + 0.5 * u[27]))) for n in v.shape]
        small = F.interpolate(v[None, None], small, mode="nearest")
        v = F.interpolate(small, v.shape, mode="trilinear")[0, 0]
    if u[28] < 0.3:
        low, high = v.aminmax()
        span = high - low
        v = ((v - low) / span.clamp(min=1e-6)) ** (0.7 + 0.8 * u[29]) * span + low
    return v


# ---- network ---------------------------------------------------------------------------------


def instance_norm(x):
    """Each channel of each sample by its own mean and variance, no weights."""
    # a group a channel is the same, faster on a CPU
    return F.group_norm(x, x.shape[1]) if x.device.type == "cpu" else F.instance_norm(x)


class Residual(nn.Module):
    """Two 3³ convolutions with instance norm, a 1³ one beside them where the width changes."""

    def __init__(self, wide, narrow):
        super().__init__()
        self.conv1 = nn.Conv3d(wide, narrow, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(narrow, narrow, 3, padding=1, bias=False)
        self.beside = nn.Conv3d(wide, narrow, 1, bias=False) if wide != narrow else None

    def forward(self, x):
        y = F.leaky_relu(instance_norm(self.conv1(x)), 0.01)
        y = instance_norm(self.conv2(y))
        x = x if self.beside is None else instance_norm(self.beside(x))
        return F.leaky_relu(x + y, 0.01)


def upsampler(wide, narrow, stride):
    return nn.ConvTranspose3d(wide, narrow, stride, stride, bias=False)


def climb(wide, narrow, strides):
    """From the patch grid up to where a skip joins."""
    layers = [upsampler(wide, narrow, strides[0])]
    for stride in strides[1:]:
        layers += [upsampler(narrow, narrow, stride), Residual(narrow, narrow)]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """UNETR (Hatamizadeh et al. 2022): hidden states, from the patch grid up to the voxels.

    The scan joins in at full resolution. Four up-samplings undo a patch of 16; a smaller patch
    needs fewer, and the first ones keep the size (stride 1). f: feature size, 16 in the paper.
    """

    def __init__(self, width, patch, classes, f):
        super().__init__()
        doublings = patch.bit_length() - 1
        strides = [1] * (4 - doublings) + [2] * doublings  # of the four stages, from the grid up
        widths = width, 8 * f, 4 * f, 2 * f, f
        skips = [Residual(1, f)]  # the scan itself
        skips += [climb(width, widths[i], strides[:i]) for i in (3, 2, 1)]
        self.skips = nn.ModuleList(reversed(skips))
        self.ups = nn.ModuleList(map(upsampler, widths, widths[1:], strides))
        self.joins = nn.ModuleList(Residual(2 * narrow, narrow) for narrow in widths[1:])
        self.out = nn.Conv3d(f, classes, 1)

    def forward(self, scan, grids):
        """scan [B, 1, X, Y, Z], four grids [B, C, x, y, z], deepest last -> [B, K, X, Y, Z]."""
        *skipped, x = scan, *grids
        for up, join, skip, y in zip(self.ups, self.joins, self.skips, reversed(skipped)):
            x = join(torch.cat([up(x), skip(y)], 1))
        return self.out(x)


class Light(nn.Module):
    """Two transposed convolutions up from the tokens: no path from the scan but through them.

    So what it reaches is what the encoder knows (after Primus, Wald et al. 2025).
    """

    def __init__(self, width, patch, classes, f):
        super().__init__()
        first = 2 ** (patch.bit_length() // 2)
        self.enter = upsampler(4 * width, 8 * f, first)
        self.up = upsampler(8 * f, 2 * f, patch // first)
        self.out = nn.Conv3d(2 * f, classes, 1)

    def forward(self, scan, grids):
        """As `Decoder.forward`."""
        x = F.leaky_relu(instance_norm(self.enter(torch.cat(grids, 1))), 0.01)
        return self.out(F.leaky_relu(instance_norm(self.up(x)), 0.01))


DECODERS = {"unetr": Decoder, "light": Light}


class Segmenter(nn.Module):
    """Encoder with all visible to all, and a decoder: [B, X, Y, Z] -> logits [B, K, X, Y, Z].

    Any size that the patch divides, whatever the pre-training grid: positions are computed. Skips
    are the outputs of blocks L/4, L/2 and 3L/4 (0-based; 3, 6 and 9 of 12), and the final norm.
    """

    def __init__(self, encoder, classes, features=FEATURES, decoder="unetr"):
        super().__init__()
        c = self.config = encoder.config
        self.encoder = encoder
        if c.patch not in (2, 4, 8, 16):
            raise BadInput(f"patch {c.patch}: decoders double the grid, they take 2, 4, 8 or 16")
        self.decoder = DECODERS[decoder](c.width, c.patch, classes, features)
        encoder.head.requires_grad_(False)  # predicts patches: no part in this

    def forward(self, volume):
        _, hidden = self.encoder.encode(volume)  # [B, G, C] a block
        L, grid = len(hidden), grid_of(volume.shape[1:], self.encoder.config.patch)
        skipped = [hidden[i] for i in (L // 4, L // 2, 3 * L // 4, -1)]
        # [B, C, x, y, z], in that order in memory too: convolutions keep the layout they are given
        grids = [h.mT.reshape(len(volume), -1, *grid).contiguous() for h in skipped]
        return self.decoder(volume[:, None], grids)


SETTING = {"classes": [str], "roi": [int], "overlap": float, "features": int, "decoder": str}
SETTING |= {"spacing": (list, type(None)), "intensity_range": (list, str)}


def load_segmenter(path):
    """The Segmenter in a checkpoint, and its setting: task, classes, intensity range, roi, …"""
    state = load_checkpoint(path, SEGMENTER)
    setting, encoder = state.get("setting"), Model(config_of(Config, state, path))
    if not is_like(setting, SETTING) or SETTING.keys() - setting.keys():
        raise BadInput(f"{path}: its setting is {setting}, which should be like {SETTING}")
    shape = len(setting["classes"]) + 1, setting["features"], setting["decoder"]
    net = read_named(path, lambda _: Segmenter(encoder, *shape))
    return fit(net, state["model"], path), setting | {"step": state.get("step")}


# ---- loss ------------------------------------------------------------------------------------


def segmentation_loss(logits, label):
    """Soft Dice with squared denominator, the background included, plus cross-entropy.

    logits [B, K, X, Y, Z], label [B, X, Y, Z]; in float32 whatever the network ran in: sums of
    squares over a crop overflow fp16. ε = 1e-6 stands in the denominator alone, so a class that is
    not in a crop (nor predicted) costs 1/K of a crop, a constant.
    """
    logits, label = logits.float(), label.long()
    p = logits.softmax(1)
    target = torch.arange(p.shape[1], device=p.device).view(-1, 1, 1, 1) == label[:, None]
    both, squares, count = (v.sum((2, 3, 4)) for v in (p * target, p.square(), target))  # [B, K]
    return 1 - (2 * both / (squares + count + 1e-6)).mean() + F.cross_entropy(logits, label)


# ---- evaluation ------------------------------------------------------------------------------


def starts(size, roi, overlap):
    """Where the windows start along an axis: roi · (1 − overlap) apart, the last one flush."""
    return [*range(0, size - roi, max(1, int(roi * (1 - overlap)))), max(0, size - roi)]


@torch.no_grad()
def sliding_window(
    predict, volume, roi, overlap=0.75, batch=WINDOWS, device="cpu", mirror=(), finish=torch.clone
):
    """Mean of the windows' predictions with Gaussian weights (σ = roi / 8, as nnU-Net has it).

    predict: [B, *roi] on `device` -> [B, K, *roi]. volume: a tensor [X, Y, Z], padded with zeros
    where it is smaller than the window. mirror: axes, for the mean over all flips of them. finish:
    the means of some planes [K, n, Y, Z] -> what is wanted of them, such as labels [n, Y, Z]; only
    one window's depth of sums is held, and planes that no later window reaches are finished and let
    go. Returns those, joined on the host: float32 [K, X, Y, Z] without a `finish`.
    """
    room = margins(volume.shape, roi)
    inner = boxed((a, a + n) for (a, _), n in zip(room, volume.shape))
    pads = [n for pair in reversed(room) for n in pair]
    volume = volume.to(device).float()
    volume = F.pad(volume, pads) if any(pads) else volume
    weight = torch.cartesian_prod(*(gaussian(r, std=r / 8) for r in roi)).prod(1).view(*roi)
    weight = weight.clamp(min=1e-3).to(device)  # the corners would all but vanish
    xs, *rest = map(starts, volume.shape, roi, [overlap] * 3)
    corners, flips = [*itertools.product(*rest)], [()]
    for axis in mirror:
        flips += [(*f, axis - 3) for f in flips]
    weights, sums, done = volume.new_zeros(roi[0], *volume.shape[1:]), None, []
    weight /= len(flips)
    for x, end in zip(xs, [*xs[1:], volume.shape[0]]):
        for i in range(0, len(corners), batch):
            part = corners[i : i + batch]
            windows = torch.stack([cut(volume, (x, *c), roi) for c in part])  # [B, *roi]
            scores = predict(windows).float()
            for f in flips[1:]:
                scores = scores + predict(windows.flip(f)).float().flip(f)  # [B, K, *roi]
            if sums is None:
                sums = weights.new_zeros(scores.shape[1], *weights.shape)
            for c, score in zip(part, scores):
                cut(sums, (0, 0, *c), score.shape).addcmul_(score, weight)
                cut(weights, (0, *c), roi).add_(weight, alpha=len(flips))
            del scores, score  # not to be held beside the next ones
        n = end - x
        done.append(finish(sums[:, :n].div_(weights[:n])).cpu())
        for planes in (sums.transpose(0, 1), weights):  # what is left moves up
            for i in range(0, roi[0] - n, n):  # by as many as were let go: no copy in between
                chunk = planes[i + n : i + 2 * n]
                planes[i : i + len(chunk)] = chunk
            planes[roi[0] - n :] = 0
    return torch.cat(done, -3)[..., *inner]


def labels_of(scores):
    """[K, n, Y, Z] -> classes of the highest scores, uint8 [n, Y, Z]; those go into scores[0]."""
    best, labels = scores[0], torch.zeros_like(scores[0], dtype=torch.uint8)
    for k in range(1, len(scores)):
        labels.masked_fill_(scores[k] > best, k)
        torch.maximum(best, scores[k], out=best)
    return labels


def overlap_counts(prediction, target, classes):
    """Voxels of each class in both label maps, in the prediction, in the target: int64 [K, 3].

    Dice = 2 · both / (prediction + target).
    """
    maps = prediction[prediction == target], prediction, target
    return torch.stack([torch.bincount(m.flatten().long(), minlength=classes) for m in maps], 1)


@torch.no_grad()
def evaluate(model, cases, setting, machine):
    """Dice [cases, K − 1], ranks sharing the work, and rank 0's prediction of the first case."""
    K, mine = len(setting["classes"]) + 1, range(machine.rank, len(cases), machine.world)
    counts, first = torch.zeros(len(cases), K, 3, dtype=torch.int64), None
    for i in tqdm(mine, desc="validation", leave=False, disable=not machine.main):
        image, target = (torch.tensor(opened(cases[i], a)) for a in ("image", "label"))
        with machine.autocast():
            prediction = sliding_window(
                model,
                image,
                setting["roi"],
                setting["overlap"],
                device=machine.device,
                finish=labels_of,
            )
        counts[i] = overlap_counts(prediction, target, K)
        counts[i, :, 2] += torch.tensor(cases[i]["outside"])
        if i == 0:
            first = prediction
    return dice_of(machine.sum(counts.to(machine.device)).cpu()), first


def dice_of(counts):
    """[cases, K, 3] -> Dice [cases, K − 1], no background; NaN where a case lacks the class."""
    both, prediction, target = counts[:, 1:].double().unbind(-1)
    return torch.where(target > 0, 2 * both / (prediction + target), torch.nan).numpy()


def class_means(dice):
    """Mean over the cases that have it, for each class; NaN where none has."""
    return np.ma.masked_invalid(dice).mean(0).filled(np.nan)


def plain(values):
    """An array for JSON: None for NaN."""
    return np.where(np.isnan(values), None, values).tolist()


def validate(model, cases, setting, step, log, out, machine):
    """Dice [cases, K − 1] and the mean of the classes' means, which is logged and drawn."""
    dice, prediction = evaluate(model, cases, setting, machine)
    case, classes, means = cases[0], setting["classes"], class_means(dice)
    mean = float(np.nanmean(means))
    keys = [f"dice_{name}" for name in classes]
    log.write(step=step, val_dice=mean, **dict(zip(keys, plain(means))))
    machine.say(f"step {step:>6}: validation Dice {mean:.3f}")
    if machine.main:
        panels = ("Dice + cross-entropy", ["loss"], {}), ("Dice", ["val_dice", *keys], {})
        draw_curves(out / "curves.png", read_log(log.path), *panels)
        image, target = (np.float32(opened(case, a)) for a in ("image", "label"))
        title, spacing = f"{case['id']}, step {step}", case["geometry"]["spacing"]
        draw_overlay(
            out / "overlay.png", image, target, prediction.numpy(), classes, spacing, title
        )
    return dice, mean


def report(dice, cases, classes, metrics, out, machine):
    """Say the table of the last Dice scores, and write `metrics` and them to metrics.json."""
    machine.say(f"{'Dice':>22}   mean  cases")
    means, counts = class_means(dice), np.isfinite(dice).sum(0)
    for row in zip(classes, means, counts):
        machine.say("{:>22}  {:.3f}  {:5}".format(*row))
    metrics["mean_dice"] = mean = float(np.nanmean(means))
    machine.say(f"{'mean':>22}  {mean:.3f}  (best {metrics['best_mean_dice']:.3f})")
    if machine.main:
        metrics["dice"] = dict(zip(classes, plain(means)))
        metrics["cases"] = dict(zip([c["id"] for c in cases], plain(dice)))
        write_json(out / "metrics.json", metrics)
    machine.say(f"wrote {out}: ckpt.pt, best.pt, metrics.json, curves.png, overlay.png")


# ---- pictures --------------------------------------------------------------------------------


def draw_overlay(path, image, target, prediction, classes, spacing, title):
    """Scan, target and prediction, each [X, Y, Z], on the middle slices of what is labelled, along
    each axis; spacing in mm. Without a target (None) the prediction says where the middle is.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    panels = [("scan", 0 * prediction), ("target", target), ("prediction", prediction)]
    if target is None:
        del panels[1]
    box = box_of(panels[1][1])
    low, high = np.percentile(image, [1, 99.5])
    fig, axes = figure_of((3.7 * len(panels), 10), 3, len(panels))
    for row, axis in zip(axes, (2, 1, 0)):
        at = sum(box[axis]) // 2
        a, b = spacing[:axis] + spacing[axis + 1 :]
        for ax, (name, labels) in zip(row, panels):
            shown = np.ma.masked_equal(labels.take(at, axis).T, 0) - 1
            how = {"origin": "lower", "aspect": b / a, "interpolation": "nearest"}
            ax.imshow(image.take(at, axis).T, cmap="gray", vmin=low, vmax=high, **how)
            ax.imshow(shown % 20, cmap="tab20", vmin=0, vmax=19, alpha=0.75, **how)
            ax.set(xticks=[], yticks=[], title=name)
        row[0].set_ylabel(f"{'xyz'[axis]} = {at}")
    fig.suptitle(title)
    colours = colormaps["tab20"].colors * 13  # of up to 255 classes
    handles = [Patch(color=c, label=name) for c, name in zip(colours, classes)]
    fig.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
