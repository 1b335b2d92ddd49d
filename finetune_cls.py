"""Classification of whole scans: a pre-trained encoder and a linear layer, tuned on labelled cases.

    python finetune_cls.py --task phantom-cls       # CPU demo on made-up nodules, nano
    python finetune_cls.py --task nodule --init out/pretrain/ckpt.pt   # one GPU
    torchrun --nproc_per_node=4 finetune_cls.py --task ricord --init FILE    # four, the same run
    python finetune_cls.py --task mine --data cases.csv      # yours: file,label,split[,patient]
    python finetune_cls.py --resume --out out/cls-nodule     # goes on with a run

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (best validation AUC),
metrics.json, scores.csv (each case), roc.png, confusion.png, cases.png, curves.png, skipped.csv.
The test set is scored once, at the end, with best.pt. Every random choice is a function of (seed,
number of the sample); `eval.py table` gives the mean ± sd of the runs of several seeds.

Sections: arguments · training · tasks and their lists · arrays, read once · the classifier ·
scores · logistic regression · reports · pictures

B batch, X Y Z voxels, G patches, C width, K classes, N cases.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import fmean

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from scipy.stats import rankdata
from torch import nn

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
    load_checkpoint,
    new_parser,
    open_run,
    passes_of,
    read_log,
    read_table,
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
from model import (
    SIZES,
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
)
from phantom import write_phantom
from serialize import (
    check_volume,
    digest,
    label_subset,
    normalise,
    patient_of,
    read_named,
    read_scan,
    set_largest,
    size_flag,
    stamp_of,
    suffix_of,
)

# ---- arguments -------------------------------------------------------------------------------

CLASSIFIER = "ar3d-classifier-2"  # the `format` of the checkpoints that hold a classifier
CACHE = Path("data/cache-cls")  # resized scans, 4 MB a case at 128³
BOOTSTRAP = 1000  # resamplings behind an interval
RECIPES = {  # what a flag that was not given stands for, and what has no flag
    "nodule": {  # published; of its flips no more is known than that they are random
        "batch": 16,
        "epochs": 100,
        "lr": 1.5e-5,
        "wd": 0.01,
        "beta2": 0.999,
        "patience": 30,
        "class_weights": False,
    },
    "ricord": {  # published
        "epochs": 200,
        "lr": 5e-5,
        "layer_decay": 0.75,
        "clip": 12.0,
        "schedule": "poly",
        "flip": 0.0,
    },
    "nano": {"epochs": 20, "lr": 1e-3, "clip": 1.0, "warmup": 30},
}
USUAL = {  # what a recipe does not say
    "batch": 8,
    "wd": 0.05,
    "beta2": 0.95,
    "layer_decay": 1.0,
    "clip": 0.0,
    "schedule": "cosine",
    "warmup": 0,
    "patience": 0,  # validations without a better AUC, or the same at less loss; 0: no limit
    "flip": 0.5,  # probability, along each axis
    "class_weights": True,  # cross-entropy by inverse class frequency
}


def parser():
    p = new_parser(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--task", choices=TASKS, default="phantom-cls", help="(default phantom-cls, made up)")
    add(
        "--data",
        help="""nodule: nodulemnist3d.npz or its folder (28³ before 64³); ricord: the folder that
        the lists' paths start from; mine: a CSV with the columns file,label,split[,patient]
        (default data/TASK, data/mine.csv; made-up ones in data/phantom)""",
    )
    add("--lists", nargs=3, help="ricord: train, val, test; lines FILE LABEL (default in --data)")
    add("--patient", help="a patient's pattern in a path (default RICORD's names; else the file's)")
    words = "share of the training patients of each class, or a list of their names (default 1)"
    add("--labels", default="1", help=words)
    add("--volume", type=int, nargs=3, help="X Y Z voxels (published: 128³, ricord 128x128x64)")
    size_flag(add)
    add("--range", type=float, nargs=2, help="intensities for 0 and 1 (published: ricord 0 1400)")
    add = p.add_argument_group("training").add_argument
    add(
        "--init",
        default="scratch",
        help="""a checkpoint of pretrain.py, the published file, scratch or scratch:SIZE (default
        scratch, its size base with CUDA, as published, else nano)""",
    )
    add("--pool", choices=["mean", "attention"], default="mean", help="of tokens (published: mean)")
    add("--freeze", action="store_true", help="linear probe: the encoder stays (lr 1e-3)")
    add("--steps", type=int, help="(published: nodule 100 epochs, ricord 200; nano 20)")
    add("--batch", type=int, help="cases a step, all ranks (published: nodule 16; ricord, nano 8)")
    add("--micro", type=int, help="cases a pass on a device (default: up to 16)")
    add("--lr", type=float, help="(published: nodule 1.5e-5, ricord 5e-5, scratch 1e-5; nano 1e-3)")
    add("--layer-decay", type=float, help="of lr, a layer down (published: nodule 1, ricord 0.75)")
    training_flags(p, "out/cls-TASK", "an epoch")
    return p


def settle(args, state, machine):
    """Fill in what was not given, in place, and check it; returns the task, one of TASKS, and the
    encoder of --init, or one as in the run to resume, whose weights come later.

    What depends on the number of cases comes later.
    """
    if state:
        encoder = Model(config_of(Config, state, args.out))
    else:
        encoder = new_encoder(args.init, "base" if machine.cuda else "nano", machine)
    config = encoder.config
    task = TASKS[args.task]
    recipe, volume = task["recipe"], task["volume"]
    if config.width == SIZES["nano"]["width"]:
        recipe, volume = "nano", task["nano"]
    if args.freeze:
        fill(args, {"lr": 1e-3})
    if recipe == "ricord" and untrained(args.init):
        fill(args, {"lr": 1e-5, "wd": 1e-4})  # published: what differs without pre-training
    given = {"volume": volume, "range": task["range"], "workers": 8 if machine.cuda else 0}
    fill(args, USUAL | RECIPES[recipe] | given)
    if args.largest:  # of the run that goes on, too
        set_largest(str(args.largest))
    check_least(args)
    low, high = args.range or (0, 1)
    if not low < high:
        raise BadInput(f"--range {low:g} {high:g}: LOW must be below HIGH")
    grid_of(args.volume, config.patch)
    split_batch(args, machine, 16)
    return task, encoder


# ---- training --------------------------------------------------------------------------------


def train_step(net, samples, weights, args, machine):
    """Forward and backward of this rank's passes: its part of the batch's weighted mean loss."""
    samples = ({k: v.clone() for k, v in b.items()} for b in samples)  # a pass outlasts the next
    passes = [*islice(samples, len(passes_of(args, machine)))]
    whole = machine.sum(sum(weights[b["label"]].sum() for b in passes))
    total = 0
    for b in passes:
        if machine.world > 1:
            net.require_backward_grad_sync = b is passes[-1]
        with machine.autocast():
            logits = net(b["volume"].float()).float()
        loss = F.cross_entropy(logits, b["label"], weight=weights, reduction="sum") / whole
        (loss * machine.world).backward()  # the ranks' gradients are averaged
        total += loss.detach()
    return total


def main():
    args, state = resumed(parser(), CLASSIFIER, "out/cls-{task}")
    out = Path(args.out)
    machine = setup(args)
    task, encoder = settle(args, state, machine)

    # data
    args.data = data_of(args.task, args.data, machine)
    machine.barrier()
    cases, classes = list_cases(task, args.data, args.lists, args.patient, machine)
    cases, skipped = prepare_all(cases, args.volume, args.range, machine)
    train, val, test = ([c for c in cases if c["split"] == s] for s in SPLITS)
    K = len(classes)
    chosen = label_subset(column(train, "patient"), args.labels, args.seed, column(train, "label"))
    train = [c for c in train if c["patient"] in chosen]
    counts = np.bincount(column(train, "label"), minlength=K)
    if not counts.all():
        raise BadInput(f"--labels {args.labels}: leaves {counts} training cases of {classes}")
    drawn = [f"{c['split']} {c['label']} {c['voxels']}" for c in train + val + test]
    if state and state.get("cases") != drawn:
        raise BadInput(f"--data {args.data}: other cases than the run to resume has")
    machine.say(f"{len(train)} training cases, {counts} of {', '.join(classes)}")
    weights = (len(train) / (K * counts)) ** args.class_weights  # False: all 1
    weights = torch.from_numpy(weights).float().to(machine.device)
    epoch = len(train) / args.batch  # steps
    fill(args, {"steps": ceil(args.epochs * epoch), "val_every": ceil(epoch)})

    # model, optimiser
    encoder.requires_grad_(not args.freeze)
    encoder.head.requires_grad_(False)  # predicts patches, is not used here
    choose_kernels(encoder, args, machine)
    model = Classifier(encoder, K, args.pool).to(machine.device)
    net = distribute(model, args, machine)
    groups = layer_decay_groups(model, args.wd, args.layer_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, args.beta2), fused=True)
    if state:
        fit(model, state["model"], out / "ckpt.pt")
    # best: AUC, −loss, step
    first, best, owes = restored(state, optimiser, [-1.0, -np.inf, 0])
    log = open_run(out, args, machine, state)
    if machine.main:
        write_table(out / "skipped.csv", ["file", "split", "reason"], skipped)

    def save(name, **more):
        more |= {"classes": classes, "args": vars(args), "cases": drawn}
        log.save(name, **checkpoint_state(model, CLASSIFIER), **more)

    def validate_at(step):
        nonlocal best
        reached = validate(model, val, log, step, machine)
        if reached[:2] > best[:2]:  # of equal AUCs the lower loss
            save("best.pt", step=step)
            best = reached

    # loop
    if owes:
        validate_at(first)
    loop = Loop(args, machine, log, first, "training", samples_per_s=args.batch)
    enough = args.patience * args.val_every or args.steps  # steps without a better AUC
    loop.enough = first - best[2] >= enough
    samples = loop.batches(Stream(train, args.seed, args.flip))
    for step in loop:
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        if args.schedule == "poly":  # RICORD's
            lr = args.lr * (1 - step / args.steps) ** 0.9
        loss = train_step(net, samples, weights, args, machine)
        loop.update(optimiser, lr, loss, args.clip)
        if loop.validates:
            with loop.paused():
                validate_at(loop.step)
                loop.enough = loop.step - best[2] >= enough
        if loop.saves:
            save("ckpt.pt", **loop.state(optimiser, best))
    if not loop.finished:
        return

    # the one look at the test set
    machine.barrier()
    fit(model, load_checkpoint(out / "best.pt", CLASSIFIER)["model"], out / "best.pt")
    if machine.main:
        levels = {"val_auc": {f"of the weights chosen, step {best[2]}": best[0]}}
        panels = ("cross-entropy", ["loss", "val_loss"], {}), ("AUC", ["val_auc"], levels)
        draw_curves(out / "curves.png", read_log(log.path), *panels)
    baseline = shortcut(train, test, K, args.seed)
    machine.say(
        f"shortcut baseline: AUC {text_of(baseline)} by logistic regression on "
        f"{baseline['features']} statistics of header and histogram, which see no anatomy"
    )
    facts = {"task": args.task, "init": args.init, "step": best[2], "shortcut": baseline}
    parts = {"train": train, "val": val, "test": test}
    score_split(model, parts, "test", classes, out, machine, args.seed, **facts)


def validate(model, cases, log, step, machine):
    """AUC (−1 if it is undefined) and −cross-entropy of the validation cases, and the step."""
    labels, probs = predict_probs(model, cases, machine)
    area = macro_auc(labels, probs)
    loss = float(-np.log(probs[np.arange(len(labels)), labels] + 1e-12).mean())
    machine.say(f"step {step:>6}: validation AUC {text_of({'value': area})}, loss {loss:.3f}")
    log.write(step=step, val_auc=area, val_loss=loss)
    return [-1.0 if area is None else area, -loss, step]


# ---- tasks and their lists -------------------------------------------------------------------


def data_of(name, data, machine):
    """Folder or file of a task's data: `data`, else its default.

    Rank 0 makes the phantom's if it is not there; the others must wait for it (a barrier).
    """
    part = PHANTOMS.get(name)
    if data or not part:
        return data or ("data/mine.csv" if name == "mine" else f"data/{name}")
    machine.say(f"made-up patients: data/phantom/{part}, made where they are not there")
    if machine.main:
        write_phantom("data/phantom", (part,))
    return f"data/phantom/{part}"


def list_cases(task, data, lists, pattern, machine):
    """All cases of a task (one of TASKS) in `data`, and the names of its classes.

    A case is a dict: file (its name in reports), split, label, patient, and source: a path, or an
    array [x, y, z]. No patient may be in two splits.
    """
    rows, classes = task["listed"](Path(data), lists), task["classes"]
    most = len(classes or range(1000))
    cases = [case_of(f"--data {data}: {row[0]}", most, pattern, *row) for row in rows]
    classes = classes or [str(k) for k in range(1 + max([1, *column(cases, "label")]))]
    for split in SPLITS:
        least = len(classes) if split == "train" else 1
        have = {c["label"] for c in cases if c["split"] == split}
        if len(have) < least:
            raise BadInput(
                f"--data {data}: cases of {least} classes are needed in the {split} split, which "
                f"has {sorted(have) or 'none'}"
            )
    seen = {}
    for c in cases:
        key = c["file"] if isinstance(c["source"], np.ndarray) else os.path.realpath(c["source"])
        first = seen.setdefault(key, c)
        if first is not c:
            both = " and ".join(f"{r['split']} with label {r['label']}" for r in (first, c))
            raise BadInput(f"{data}: {c['file']} is listed twice, as {both}; list it once")
    both = shared(cases, "patient")
    if both:
        raise BadInput(
            f"{data}: {len(both)} patients are in more than one split, {both[0]} among them; give "
            "each patient one split (--patient REGEX says what names a patient)"
        )
    machine.say(f"{data}: {len(cases)} cases of {len({c['patient'] for c in cases})} patients")
    return cases, classes


def shared(cases, key):
    """The values of the key that occur in more than one split."""
    splits = {}
    for c in cases:
        splits.setdefault(c[key], set()).add(c["split"])
    return [value for value, its in splits.items() if len(its) > 1]


def case_of(at, most, pattern, file, split, label, patient, source):
    """What a list says of a case, as a case; BadInput if its file, split or label is none."""
    if not file or isinstance(source, Path) and not os.path.exists(source):
        raise BadInput(f"{at}: no such file {source}")
    if split not in SPLITS:
        raise BadInput(f"{at}: split {split!r}; it is one of {', '.join(SPLITS)}")
    if not label.isdecimal() or len(label) > 9 or int(label) >= most:
        raise BadInput(f"{at}: label {label!r}; it is an integer from 0 to {most - 1}")
    if not patient and pattern:
        patient = patient_of(file, None, None, pattern)
    known = re.search(r"RICORD(?:-1[ABC]-\d+)?-\d{6}|$", file)[0]
    return {
        "file": file,
        "split": split,
        "label": int(label),
        "patient": patient or known or file.removesuffix(suffix_of(file) or ""),
        "source": source,
    }


def listed_in_npz(path, _):
    """MedMNIST's file: {train,val,test}_{images,labels}. It names no patients: an image is one."""
    if path.is_dir():  # nodulemnist3d.npz comes before nodulemnist3d_64.npz
        path = min(path.glob("nodulemnist3d*.npz"), default=path / "nodulemnist3d.npz")
    try:
        with np.load(path) as z:
            for split in SPLITS:
                images, labels = z[f"{split}_images"], z[f"{split}_labels"].ravel()
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    name = f"{split}/{i:05d}"
                    yield name, split, str(label), name, image
    except Exception as e:  # noqa: BLE001  (a dozen types, for a damaged file)
        raise BadInput(
            f"{path}: cannot be read as MedMNIST's npz ({e}); --data names nodulemnist3d.npz or "
            "nodulemnist3d_64.npz, from medmnist.com, or its folder"
        ) from None


def listed_in_lists(folder, lists):
    """The authors' lists: lines `FILE LABEL`, files relative to `folder`."""
    for split, path in zip(SPLITS, lists or [folder / f"{s}.txt" for s in SPLITS]):
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(
                f"{path}: cannot be read ({e}); a list of lines FILE LABEL is needed, see --lists"
            ) from None
        for line in filter(str.strip, lines):
            file, _, label = line.strip().replace("\t", " ").rpartition(" ")
            yield file.strip(), split, label, None, folder / file.strip()


def listed_in_csv(path, _):
    """A CSV with the columns file,label,split and, if you like, patient; paths relative to it."""
    for row in read_table(path, "a CSV with columns file,label,split[,patient]"):
        file, split, label = (row.get(k) or "" for k in ("file", "split", "label"))
        yield file, split, label.strip(), row.get("patient"), path.parent / file


def column(cases, key):
    return np.array([c[key] for c in cases])


# A task: who reads its list, its classes (None: as many as there are labels), the size of the input
# (and with a nano encoder), the intensities that become 0 and 1 (None: a scan's own 1st and 99.9th
# percentiles), and whose recipe it follows.
FIELDS = ("listed", "classes", "volume", "nano", "range", "recipe")
ROWS = {
    "nodule": (listed_in_npz, ["benign", "malignant"], [128] * 3, [32] * 3, [0, 255], "nodule"),
    "ricord": (
        listed_in_lists,
        ["no COVID", "COVID"],
        [128, 128, 64],
        [64, 64, 32],
        [0, 1400],
        "ricord",
    ),
    "mine": (listed_in_csv, None, [128] * 3, [64] * 3, None, "ricord"),
}
TASKS = {name: dict(zip(FIELDS, row)) for name, row in ROWS.items()}
# the phantom's scans are in HU: the published range, which is as wide, would make all of the lung 0
TASKS |= {
    "phantom-covid": TASKS["ricord"] | {"range": [-1000, 400]},
    "phantom-cls": TASKS["nodule"],
}
PHANTOMS = {"phantom-cls": "nodule", "phantom-covid": "ricord"}  # the parts of phantom.py
SPLITS = ("train", "val", "test")


# ---- arrays, read once -----------------------------------------------------------------------


def prepare_all(cases, shape, intensity_range, machine):
    """Each case with its array in the cache and its statistics, each rank reads a share.

    Returns the cases that can be used, without their source, and rows [file, split, reason].
    """
    job = partial(prepare_whole, shape=tuple(shape), intensity_range=intensity_range)
    ready = machine.share(job, cases, "reading")
    usable = [c for c in ready if "reason" not in c]
    skipped = [[c["file"], c["split"], c["reason"]] for c in ready if "reason" in c]
    if skipped:
        words = f"{len(skipped)} of {len(cases)} scans left out, as {': '.join(skipped[0])}"
        machine.say(words)
    for split in {*column(cases, "split")} - {*column(usable, "split")}:
        raise BadInput(f"--data: no scan of the {split} split can be used: {words}")
    twice = shared(usable, "voxels")
    if twice:
        files = ", ".join(f"{c['file']} ({c['split']})" for c in usable if c["voxels"] == twice[0])
        raise BadInput(
            f"--data: {len(twice)} images stand in more than one split, voxel for voxel, as "
            f"{files}: list each once"
        )
    if intensity_range and np.median(column(usable, "statistics")[:, -5]) < intensity_range[0]:
        machine.say(
            f"warning: more than half of the voxels lie below --range {intensity_range[0]:g} and "
            "become 0: in HU, lung and air do; --range -1000 400 keeps the lung"
        )
    return usable, skipped


def prepare_whole(case, shape, intensity_range):
    """The case with the file of its array, of the size of the input, in [0, 1], and its statistics.

    Both are kept in the cache; the source is dropped. reason: why it cannot be used, if so.
    """
    source = case["source"]
    listed = isinstance(source, np.ndarray)
    stamp = digest(source.tobytes(), 16) if listed else [str(source.resolve()), *stamp_of([source])]
    path = CACHE / f"{digest(f'3 {stamp} {shape} {intensity_range}', 16)}.npz"
    ready = case | {"source": None, "array": str(path)}
    try:
        if not path.exists():
            values, *affines = (source, np.eye(4), np.eye(4)) if listed else read_scan(source)
            check_volume(values.shape, values.dtype)
            if values.ndim != 3:
                raise BadInput(f"{values.ndim}D, and one volume is needed")
            unit = normalise(values, intensity_range or "percentiles")
            volume = resize_whole(unit, shape).astype(np.float16)
            with write_beside(path) as tmp:
                voxels = digest(np.ascontiguousarray(values), 16)
                np.savez(tmp, volume=volume, statistics=statistics(values, *affines), voxels=voxels)
        with np.load(path) as z:
            return ready | {"statistics": z["statistics"], "voxels": str(z["voxels"])}
    except (BadInput, MemoryError) as e:
        return ready | {"reason": str(e) or "not enough memory"}


def resize_whole(values, shape):
    """float32 [x, y, z] -> `shape`: area means along axes that shrink, then trilinear."""
    v = torch.from_numpy(values)[None, None]
    v = F.adaptive_avg_pool3d(v, [min(a, b) for a, b in zip(values.shape, shape)])
    return F.interpolate(v, shape, mode="trilinear")[0, 0].numpy()


def statistics(values, affine, own):
    """What can be known of a scan without looking: numbers of the header, and of its histogram."""
    return np.array(
        [
            *values.shape,
            *nib.affines.voxel_sizes(affine),
            *affine[:3, 3],
            *nib.orientations.io_orientation(own).ravel(),
            values.dtype.itemsize,
            values.mean(),
            values.std(),
            *np.percentile(values, [0, 1, 5, 25, 50, 75, 95, 99, 100]),
        ]
    )


def load_volume(case):
    """[X, Y, Z] float16."""
    with np.load(case["array"]) as z:
        return torch.from_numpy(z["volume"])


@dataclass
class Stream:
    """Sample n = 0, 1, … without end: each N in a row are all cases, shuffled; some are flipped.

    # departs: batches run across the ends of epochs, so that each is full whatever N is.
    """

    cases: list
    seed: int
    flip: float  # probability, along each axis

    def __getitem__(self, n):
        epoch, i = divmod(n, len(self.cases))
        order = default_rng([self.seed, 1, epoch]).permutation(len(self.cases))
        flips = default_rng([self.seed, 2, n]).random(3) < self.flip
        case = self.cases[order[i]]
        volume = load_volume(case).flip(np.flatnonzero(flips).tolist())
        return {"volume": volume, "label": case["label"]}


# ---- the classifier --------------------------------------------------------------------------


class Classifier(nn.Module):
    """Encoder, pooling, linear layer without bias: [B, X, Y, Z] -> logits [B, K].

    pool: attention is the mean over the patch tokens, weighted by a softmax of learned scores that
    start as zeros; mean (published) keeps them there.
    """

    def __init__(self, encoder, classes, pool="mean"):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.score = nn.Linear(encoder.config.width, classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.attend = nn.Linear(encoder.config.width, 1, bias=False)
        learned = bool(("mean", "attention").index(pool))
        nn.init.zeros_(self.attend.weight).requires_grad_(learned)

    def forward(self, volume):
        tokens, _ = self.encoder.encode(volume)  # [B, G, C]
        return self.score((self.attend(tokens).softmax(1) * tokens).sum(1))


def load_classifier(path):
    """The classifier in `path` (best.pt or ckpt.pt), on the CPU, and the checkpoint itself.

    Of its keys, scoring needs classes, step and args (task, data, lists, patient, volume,
    range).
    """
    state = load_checkpoint(path, CLASSIFIER)
    encoder = Model(config_of(Config, state, path))
    make = lambda _: Classifier(encoder, len(state["classes"]), state["args"]["pool"])
    net = read_named(path, make)
    return fit(net, state["model"], path), state


@torch.no_grad()
def predict_probs(net, cases, machine):
    """Labels [N] and probabilities [N, K] of prepared cases: each rank a share, then reduced."""
    probs = torch.zeros(len(cases), net.score.out_features).double().to(machine.device)
    for i in range(8 * machine.rank, len(cases), 8 * machine.world):
        volume = torch.stack([load_volume(c) for c in cases[i : i + 8]])
        with machine.autocast():
            logits = net(volume.to(machine.device).float())
        probs[i : i + 8] = logits.double().softmax(1)
    return column(cases, "label"), machine.sum(probs).cpu().numpy()


# ---- scores ----------------------------------------------------------------------------------
# None stands for undefined: there is nothing to divide by.


def auc(y, score):
    """Area under the ROC curve = P(score of a positive > that of a negative), ties count half.

    y: bool [N].
    """
    pos, neg = y.sum(), (~y).sum()
    if not pos or not neg or not np.isfinite(score).all():
        return None
    return float((rankdata(score)[y].mean() - (pos + 1) / 2) / neg)


def roc(y, score):
    """fpr, tpr and thresholds: infinity, then each score that occurs, from the highest down."""
    thresholds = np.append(np.inf, np.unique(score)[::-1])  # [T]
    hits = score >= thresholds[:, None]  # [T, N]
    fpr, tpr = ((hits & of).sum(1) / max(1, of.sum()) for of in (~y, y))
    return fpr, tpr, thresholds


def youden(y, score):
    """The threshold (positive: score >= it) of the largest sensitivity + specificity, or 0.5."""
    fpr, tpr, thresholds = roc(y, score)
    at = np.argmax((tpr - fpr)[1:]) + 1
    return 0.5 if auc(y, score) is None else float(thresholds[at])


def at_point(y, hits):
    """Metrics of the decisions `hits` for the truth y, both bool [N, C]: means over C (macro)."""
    tp, tn, pos, neg = (x.sum(0) for x in (y & hits, ~y & ~hits, y, ~y))  # [C]
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = tp / pos, tn / neg
        each = {
            "accuracy": (tp + tn) / len(y),
            "f1": 2 * tp / (pos + hits.sum(0)),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "balanced_accuracy": (sensitivity + specificity) / 2,
        }
    return {k: None if np.isnan(v).any() else float(v.mean()) for k, v in each.items()}


def one_or_each(labels, probs):
    """y and score [N, C]: of class 1 (C = 1), or of more than two each against the rest (C = K)."""
    first = int(probs.shape[1] == 2)
    return labels[:, None] == np.arange(first, probs.shape[1]), probs[:, first:]


def of_each(fn, labels, probs):
    """fn(y, score) of each class that is measured."""
    y, score = one_or_each(labels, probs)
    return [fn(*pair) for pair in zip(y.T, score.T)]


def macro_auc(labels, probs):
    """AUC of class 1, or with K > 2 the mean of each class against the rest."""
    areas = of_each(auc, labels, probs)
    return None if None in areas else fmean(areas)


def measure(labels, probs, thresholds):
    """All metrics of probs [N, K]: of class 1, or the mean of each class against the rest (macro).

    thresholds: Youden's, one a class that is measured. Names with youden_ are taken there.
    """
    top = probs.argmax(1)
    y, score = one_or_each(labels, probs)
    out = {"auc": macro_auc(labels, probs), **at_point(y, one_or_each(top, probs)[0])}
    out |= {f"youden_{k}": v for k, v in at_point(y, score >= thresholds).items()}
    if len(thresholds) > 1:  # the usual meaning of these two with several classes
        out |= {"accuracy": float(np.mean(top == labels)), "balanced_accuracy": out["sensitivity"]}
    return out


def resampled(groups, times, seed):
    """Bootstrap: yields `times` index arrays into the N rows that `groups` [N] names.

    Groups are drawn with replacement, as many as there are, each with all of its rows: patients
    with all of their cases. For rows that stand alone give range(N). The same seed draws the same.
    """
    _, group = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    rng = default_rng([seed, 4])
    for _ in range(times):
        yield np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])


def interval(draws):
    """95 % percentile interval (low, high) of a statistic's values over `resampled` rows.

    Draws where it was undefined (None, NaN) are left out; both None if they are more than half.
    """
    draws = np.array(draws, float)
    if np.isnan(draws).mean() > 0.5:
        return None, None
    return tuple(np.nanpercentile(draws, [2.5, 97.5]).tolist())


def with_intervals(labels, probs, patients, thresholds, seed):
    """{metric: {value, low, high}}: 95 % intervals over patients (with all of their cases)."""
    picks = resampled(patients, BOOTSTRAP, seed)
    drawn = [measure(labels[pick], probs[pick], thresholds) for pick in picks]
    out = {}
    for name, value in measure(labels, probs, thresholds).items():
        low, high = interval([d[name] for d in drawn])
        out[name] = {"value": value, "low": low, "high": high}
    return out


def text_of(score):
    if score["value"] is None:
        return "undefined"
    ends = f" [{score['low']:.3f}, {score['high']:.3f}]" if score.get("low") is not None else ""
    return f"{score['value']:.3f}{ends}"


# ---- logistic regression ---------------------------------------------------------------------


@torch.enable_grad()
def logistic(x, y, K, l2, start=None, tolerance=1e-5):
    """Multinomial logistic regression by L-BFGS: weights [K, F + 1] for x [N, F], y [N].

    Mean cross-entropy + l2/2 · |W|², the bias free. It stops where a step changes the weights, or
    the loss, by less than `tolerance`.
    """
    w = (x.new_zeros(K, x.shape[1] + 1) if start is None else start.clone()).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=100,
        history_size=10,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(scores_of(w, x), y) + l2 / 2 * w[:, :-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return w.detach()


def scores_of(w, x):
    return x @ w[:, :-1].T + w[:, -1]


def shortcut(train, test, K, seed):
    """The test AUC that header and histogram reach by logistic regression, and how many they are.

    Features are standardised by the training cases; those that are constant there are left out.
    """
    x, query = (torch.from_numpy(column(cases, "statistics")) for cases in (train, test))
    sd, centre = torch.std_mean(x, 0, correction=0)
    varied = sd > 1e-9 * (1 + centre.abs())
    x, query = (((a - centre) / sd)[:, varied].clamp(-5, 5) for a in (x, query))
    w = logistic(x, torch.from_numpy(column(train, "label")), K, 1 / len(x), tolerance=1e-9)
    probs = scores_of(w, query).softmax(1).numpy()
    scores = with_intervals(column(test, "label"), probs, column(test, "patient"), [0.5] * K, seed)
    return scores["auc"] | {"features": x.shape[1]}


# ---- reports ---------------------------------------------------------------------------------


def score_split(net, parts, split, classes, out, machine, seed, **facts):
    """Score the prepared cases parts[split], once, with the thresholds of parts["val"].

    Prints the scores and writes scores.csv (both splits), roc.png, confusion.png, cases.png and at
    last metrics.json under `out`: `facts` and what is known here, the scores {metric: {value, low,
    high}} under the name of the split. All ranks must call it.
    """
    scored = {s: predict_probs(net, parts[s], machine) for s in ("val", split)}
    labels, probs = scored[split]
    thresholds = of_each(youden, *scored["val"])
    patients = column(parts[split], "patient")
    scores = with_intervals(labels, probs, patients, thresholds, seed)
    metrics = {
        **facts,
        "seed": seed,
        "cases": {s: len(part) for s, part in parts.items()},
        "classes": classes,
        "val_auc": macro_auc(*scored["val"]),
        "thresholds": thresholds,
        split: scores,
        "auc_each": of_each(auc, labels, probs),
    }
    if not machine.main:
        return
    print(f"{split}: {len(probs)} cases of {len(set(patients))} patients, 95 % intervals over them")
    for name, score in scores.items():
        print(f"{name.replace('_', ' '):>26}  {text_of(score)}")
    keys, columns = ["file", "patient", "split", "label"], [f"p_{k}" for k in range(len(classes))]
    rows = [
        [*map(c.get, keys), *p.tolist(), p.argmax()]
        for s, (_, ps) in scored.items()
        for c, p in zip(parts[s], ps)
    ]
    write_table(out / "scores.csv", [*keys, *columns, "predicted"], rows)
    draw_roc(out / "roc.png", scored, split, scores, classes)
    draw_confusion(out / "confusion.png", labels, probs, thresholds, classes)
    draw_cases(out / "cases.png", parts[split], probs, classes)
    write_json(out / "metrics.json", metrics)  # last: its presence says that a run is done
    print(f"wrote metrics.json, scores.csv, roc.png, confusion.png and cases.png in {out}")


# ---- pictures --------------------------------------------------------------------------------

PLAIN, YOUDEN = "the likeliest", "Youden's, of validation"  # the two points of a decision


def draw_roc(path, scored, split, scores, classes):
    """ROC curves of a split and of validation, and the two points where the split is decided."""
    fig, ((ax,),) = figure_of((5.2, 5))
    for s, pair in scored.items():  # of two classes the curve of the last alone
        for name, (fpr, tpr, _) in zip(classes[::-1], of_each(roc, *pair)[::-1]):
            ax.plot(fpr, tpr, "-" if s == split else ":", label=f"{s}, {name}")
    for prefix, name in (("", PLAIN), ("youden_", YOUDEN)):
        point = [scores[prefix + k]["value"] for k in ("specificity", "sensitivity")]
        spec, sens = np.array(point, float)  # NaN, where they are undefined, is not drawn
        ax.plot(1 - spec, sens, "o", label=name)
    title = f"{split}: AUC {text_of(scores['auc'])}"
    ax.set(xlabel="1 − specificity", ylabel="sensitivity", title=title)
    ax.legend(fontsize=8)
    save_figure(fig, path)


def draw_confusion(path, labels, probs, thresholds, classes):
    """Cases of each class, at the plain decision and, of two, at Youden's threshold."""
    decisions, ticks = {PLAIN: probs.argmax(1)}, range(len(classes))
    if len(classes) == 2:
        decisions[YOUDEN] = (probs[:, 1] >= thresholds[0]).astype(int)
    fig, [axes] = figure_of((4.5 * len(decisions), 4), 1, len(decisions))
    for ax, (name, decided) in zip(axes, decisions.items()):
        counts = [[np.sum((labels == i) & (decided == j)) for j in ticks] for i in ticks]
        ax.imshow(counts, "Blues", vmax=2 * np.max(counts))  # pale enough for black digits
        for (i, j), count in np.ndenumerate(counts):
            ax.text(j, i, count, ha="center", va="center")
        ax.set_xticks(ticks, classes)
        ax.set_yticks(ticks, classes)
        ax.set(xlabel="predicted", ylabel="true", title=name)
    save_figure(fig, path)


def draw_cases(path, cases, probs, classes):
    """The six surest right and, below, the six surest wrong decisions: three planes of each."""
    labels, decided = column(cases, "label"), probs.argmax(1)
    order = np.argsort(-probs.max(1))
    fig, axes = figure_of((13, 15), 6, 6)
    fig.subplots_adjust(hspace=0.26)  # room for two lines
    for ax in axes.flat:
        ax.axis("off")
    for rows, mask in zip(np.split(axes, 2), (decided == labels, decided != labels)):
        for i, planes in zip(order[mask[order]], rows.T):
            volume = load_volume(cases[i])
            for ax, axis in zip(planes, (2, 1, 0)):
                view = volume.select(axis, volume.shape[axis] // 2).T
                ax.imshow(view.numpy(), "gray", vmin=0, vmax=1, origin="lower", aspect="auto")
            words = f"is {classes[labels[i]]}\nscored {classes[decided[i]]} {probs[i].max():.2f}"
            planes[0].set_title(words, fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
