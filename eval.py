"""Scores, predictions on new scans, probes of frozen features, next-patch errors, the table.

    python eval.py seg --ckpt out/seg-phantom/ckpt.pt               # Dice, surface Dice, HD95, …
    python eval.py cls --ckpt out/cls-phantom-cls/best.pt           # AUC and the rest, intervals
    python eval.py predict --ckpt out/seg-amos/best.pt SCAN…        # label maps on the scans' grids
    python eval.py probe --ckpt out/pretrain/ckpt.pt --layer all    # kNN and linear probes by block
    python eval.py pretrain --ckpt out/pretrain/ckpt.pt             # loss by kind, prefix, position
    python eval.py table out/*                                      # fine-tuning runs, paired tests
    python eval.py --ckpt FILE                                      # the sub-command that fits it

Each leaves its figures in a folder beside the checkpoint (--out): metrics.json, CSV files, PNGs
(predict: label maps; table: in out/table).

Surface scores (seg), on the scan's own grid and on the resampled one (published). The surface of a
mask is its voxels with a face neighbour outside of it (or of the volume); distances are between
voxel centres, in mm, as in MONAI's `compute_hausdorff_distance` and `compute_surface_dice`. HD95:
the larger of the two directed 95th percentiles (linear interpolation). Surface Dice (NSD, Nikolov
et al. 2018): the share of both surfaces together that lies within the tolerance of the other;
surface voxels count alike, where Nikolov's weigh by area. Empty classes: absent in target and
prediction, a case is left out; absent in one of them, Dice and surface Dice are 0 and HD95 is
undefined (left out, and counted as missed). Volume errors are prediction − target in cases.csv and
in the box plots; tables and metrics.json have the mean of their sizes.

Sections: arguments · what the commands share · segmentation · surface scores · prediction ·
classification · probes · next patch · table

X Y Z voxels, K classes with the background, N cases or samples, B sequences, G patches of a volume,
P³ voxels of a patch, F features.
"""

import contextlib
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from collections import defaultdict
from functools import partial
from itertools import combinations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import cKDTree
from scipy.stats import t as student
from torch.utils.data import DataLoader
from tqdm import tqdm

import finetune_cls
import finetune_seg
from common import (
    FREE,
    BadInput,
    check_least,
    cli,
    draw_curves,
    figure_of,
    fill,
    load_checkpoint,
    machine_flags,
    new_parser,
    read_json,
    read_table,
    save_figure,
    setup,
    to_device,
    write_json,
    write_table,
    write_text,
)
from finetune_cls import (
    CLASSIFIER,
    at_point,
    auc,
    data_of,
    interval,
    list_cases,
    load_classifier,
    load_volume,
    logistic,
    macro_auc,
    resampled,
    score_split,
    scores_of,
    text_of,
)
from finetune_seg import (
    OWN_TASK,
    SEGMENTER,
    TASKS,
    boxed,
    class_means,
    draw_overlay,
    find_cases,
    hash_share,
    invert,
    labels_of,
    load_segmenter,
    make_phantom,
    nearest,
    opened,
    parse_range,
    plain,
    prepare,
    range_of_case,
    read_case,
    sliding_window,
    smooth,
    starts,
    to_own_axes,
    uncut,
)
from model import (
    FORMAT,
    Model,
    choose_kernels,
    grid_of,
    load_pretrained,
    patchify,
    positions,
    standardise,
    to_unit,
    unpatchify,
    untrained,
)
from pretrain import trivial_errors
from serialize import (
    LABELS,
    Sequences,
    draw_strips,
    find_corpus,
    intensity_range,
    lesion_crop,
    open_array,
    read_corpora,
    read_scan,
    save_like,
    scans_under,
    size_flag,
    stamp_of,
    stem_of,
)

# ---- arguments -------------------------------------------------------------------------------

FITS = {SEGMENTER: "seg", CLASSIFIER: "cls", FORMAT: "pretrain"}  # the command for a checkpoint
TASK = ("--task", str, "of the fine-tuning script (default: the checkpoint's)")
DATA = ("--data", str, "as for the fine-tuning script (default: the checkpoint's)")
SLIDING = (
    ("--overlap", float, "of the sliding window (default: the checkpoint's; published 0.75)"),
    ("--mirror", False, "average over all eight mirror images"),
)
FLAGS = {  # of each command: name, and number of values; default, or type; help; choices
    "seg": (
        TASK,
        DATA,
        ("--split", "val", "cases", ("val", "train", "all")),
        ("--tolerance +", [2.0], "of the surface Dice, mm: one, or one a class"),
        *SLIDING,
    ),
    "cls": (
        (*TASK, finetune_cls.TASKS),
        DATA,
        ("--lists 3", str, "as for finetune_cls.py (default: the checkpoint's)"),
        ("--patient", str, "as for finetune_cls.py (default: the checkpoint's)"),
        ("--split", "test", "cases", ("test", "val", "train")),
    ),
    "predict": (
        ("scans +", str, "NIfTI files, folders of them, or of DICOM slices (SimpleITK)"),
        ("--modality", "auto", "where a task has both; auto: CT from −100", ("auto", "ct", "mr")),
        ("--probabilities", False, "NAME.probabilities.nii.gz too: [X, Y, Z, K], steps of 1/255"),
        ("--overlay", True, "a PNG of each scan"),
        *SLIDING,
    ),
    "probe": (
        ("--layer +", str, "blocks, from 0, or all (default, as the last block: the final norm)"),
        ("--k", 20, "neighbours"),
        (
            "--tasks +",
            ["phantom", "lesions", "phantom-cls"],
            "of the fine-tuning scripts, lesions, or your own",
        ),
        ("--data", str, "of a task with organs (default: the task's own folder)"),
        ("--classes +", str, "names of labels 1, 2, … (default: the task's, or dataset.json's)"),
        ("--range +", str, "LOW HIGH, percentiles or zscore (default: the task's)"),
        ("--spacing 3", float, "mm (default: the task's)"),
        ("--roi 3", int, "voxels encoded at once (default: the volume of pre-training)"),
        ("--cases 2", [40, 20], "labelled cases to fit and to score, at most"),
        ("--corpus", str, "with lesions (default data/corpus; without one, the phantom's)"),
        ("--cls-data", str, "of a task with classes: as --data of finetune_cls.py"),
    ),
    "pretrain": (
        ("--data", str, "corpus (default: the run's, else data/corpus, else the phantom's)"),
        ("--volume", int, "edge in voxels (default: the run's; published 128)"),
        ("--stride", int, "slices between spatial slabs (default: the run's; published 8)"),
        ("--samples", 16, "validation sequences of each kind"),
        ("--completions", 2, "sequences of each kind to complete, each patch from predicted ones"),
    ),
    "table": (("runs *", ["out"], "folders of runs, or folders of such folders"),),
}
ALL = (
    ("--out", str, "folder (default: eval-COMMAND beside the checkpoint; out/table)"),
    ("--seed", 0, "of intervals, sequences and random weights"),
)
DRAWS = 1000  # bootstrap samples


def main():
    p = new_parser(__doc__)
    commands = p.add_subparsers(required=True)
    for run in (seg, cls, predict, probe, pretrain, table):
        q = commands.add_parser(run.__name__, help=run.__doc__)
        q.set_defaults(run=run)
        for flag in (*FLAGS[run.__name__], *ALL):
            add_flag(q, *flag)
        if run is not table:
            q.add_argument("--ckpt", required=True, help="checkpoint of the network")
            machine_flags(q, workers=None)
            size_flag(q.add_argument)
    words, finder = sys.argv[1:], ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--ckpt")
    path = finder.parse_known_args(words)[0].ckpt
    if path and words[0] not in FLAGS:  # no command: the one that fits
        kind = load_checkpoint(path).get("format")
        if kind not in FITS:
            raise BadInput(f"{path}: its format {kind!r} says no sub-command; name one")
        words = [FITS[kind], *words]
    args = p.parse_args(words)
    check_least(args, seed=0)
    run = vars(args).pop("run")
    folder = Path(args.ckpt).parent / f"eval-{run.__name__}" if "ckpt" in args else "out/table"
    run(args, Path(args.out or folder))


def add_flag(p, name, value, words, choices=None):
    name, _, count = name.partition(" ")
    if isinstance(value, bool):
        p.add_argument(name, action=BooleanOptionalAction, default=value, help=words)
        return
    more = {"nargs": int(count) if count.isdigit() else count or None, "choices": choices}
    if not isinstance(value, type):
        more["default"], words = value, f"{words} (default {value})"
        value = type(value[0] if count else value)
    p.add_argument(name, type=value, help=words, **more)


# ---- what the commands share -----------------------------------------------------------------


def opened_net(args, load):
    """What `load` reads from --ckpt, a network and what is known of it; and the machine."""
    machine = setup(args)
    net, known = load(args.ckpt)
    choose_kernels(getattr(net, "encoder", net), args, machine)
    return net.to(machine.device).eval(), known, machine


def finish(out, args, rows, **tables):
    """Print rows, write them to metrics.json, and each of tables to a CSV file; all are dicts."""
    print(text_table(rows))
    write_json(out / "metrics.json", {"args": vars(args), "rows": rows})
    for name, lines in tables.items():
        write_table(out / f"{name}.csv", *columns(lines))
    print(f"wrote metrics.json, tables and pictures to {out}")


def columns(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [[row.get(name) for name in names] for row in rows]


def text_table(rows):
    """Markdown, in columns; numbers to four digits."""
    names, rows = columns(rows)
    cells = [names, *([text_of_cell(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def text_of_cell(x):
    if isinstance(x, dict):
        return text_of(x)
    return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)


def mean_intervals(values, seed):
    """Columns of values [N, M] -> of each the mean of what is defined, 95 % interval over cases."""
    picks = np.transpose([*resampled(range(len(values)), DRAWS, seed)])  # [N, draws]
    drawn, means = class_means(values[picks]), plain(class_means(values))  # [draws, M], [M]
    ends = map(interval, drawn.T)
    return [{"value": m, "low": low, "high": high} for m, (low, high) in zip(means, ends)]


def draw_boxes(path, rows, title, name, scores):
    """Boxes of the scores of rows, a panel a title and score; triangles: means.

    title, name: format strings of a row.
    """
    panels = defaultdict(lambda: defaultdict(list))
    for row, score in product(rows, scores):
        box = panels[f"{title.format(**row)}: {score}"][name.format(**row)]
        if row[score] is not None:
            box.append(row[score])
    fig, [axes] = figure_of((5 * len(panels), 5), 1, len(panels))
    for ax, (words, boxes) in zip(axes, panels.items()):
        ax.boxplot([*boxes.values()], showmeans=True)
        ax.set_xticklabels(boxes, rotation=90)
        ax.set_title(words)
    save_figure(fig, path)


# ---- segmentation ----------------------------------------------------------------------------

SCORES = ("dice", "nsd", "hd95_mm", "volume_error_ml")  # of a class of a case; NaN: undefined
TOO_MUCH = BadInput, MemoryError, torch.OutOfMemoryError  # for one scan; the others go on


def seg(args, out):
    """Scores of a segmenter on labelled cases"""
    segment, setting, machine = open_segmenter(args)
    if args.task in (None, setting["task"]):
        fill(args, setting)
    classes, scored, skipped, rows = setting["classes"], [], [], []
    if len(args.tolerance) not in (1, len(classes)) or min(args.tolerance) < 0:
        raise BadInput(f"--tolerance {args.tolerance}: one number, or one a class; none below 0")
    cases, _ = labelled_cases(args.task, args.data, classes, machine)
    for case in tqdm(cases, desc="scoring"):
        if args.split not in ("all", case["split"]):
            continue
        try:
            scored.append(score_one(case, segment, setting, args, out))
        except TOO_MUCH as e:
            skipped.append({"case": case["id"], "reason": str(e) or "not enough memory"})
            tqdm.write(f"left out: {case['id']}: {skipped[-1]['reason']}")
    for mine in zip(*scored):  # of a grid and class
        values = np.array([[line[s] for s in SCORES] for line in mine], float)  # [N, 4]
        row = {name: mine[0][name] for name in ("grid", "class")}
        row |= zip(SCORES, mean_intervals(np.abs(values), args.seed))
        cases, _, hd95, _ = np.isfinite(values).sum(0).tolist()
        rows.append({**row, "cases": cases, "missed": cases - hd95})
    if not rows:
        raise BadInput(f"--split {args.split}: none of its cases can be scored")
    lines = [line for case in scored for line in case]
    draw_boxes(out / "boxes.png", lines, "{grid}", "{class}", SCORES)
    finish(out, args, rows, cases=lines, skipped=skipped)


def open_segmenter(args):
    """The function (scan, intensity range) -> labels, image, geometry; setting; machine.

    All are on the prepared grid [X, Y, Z]; with finish=softmax, labels are shares [K, X, Y, Z].
    """
    net, setting, machine = opened_net(args, load_segmenter)
    fill(args, {"overlap": setting["overlap"]})
    if not 0 <= args.overlap < 1:
        raise BadInput(f"--overlap {args.overlap:g}: from 0 to below 1")
    how = {"overlap": args.overlap, "device": machine.device, "mirror": range(3 * args.mirror)}

    def segment(scan, intensity_range, finish=labels_of):
        volume, geometry = prepare(*scan, setting["spacing"], intensity_range)
        with machine.autocast():
            image = torch.from_numpy(volume)
            labels = sliding_window(net, image, setting["roi"], finish=finish, **how)
        return labels, volume.astype(np.float32), geometry

    return segment, setting, machine


def labelled_cases(task, data, classes, machine):
    """The cases of a task in `data`, by default its own folder, and the names of its classes."""
    data = data or TASKS.get(task, {}).get("data", f"data/{task}")
    make_phantom(task, data, machine)
    return find_cases(task, data, classes, machine)


def score_one(case, segment, setting, args, out):
    """A labelled case, predicted, scored and drawn: a row a grid and class, one of their means."""
    classes, name, rows = setting["classes"], case["id"], []
    *scan, target = read_case(case, len(classes) + 1)
    mr_after = setting["mr_after"] if args.task == setting["task"] else None
    mapped = range_of_case(case, setting["intensity_range"], mr_after)
    labels, image, geometry = segment(scan, mapped)
    labels = labels.numpy()
    ras, spacing, coarse = scan[1], geometry["spacing"], nearest(target, geometry["resampled"])
    truth, whole = coarse[boxed(geometry["box"])], uncut(labels, geometry)
    draw_overlay(out / f"{name}.png", image, truth, labels, classes, spacing, name)
    fine, sizes = smooth(whole, geometry["shape"]), nib.affines.voxel_sizes(ras)
    # on the resampled grid, what the cut to the foreground leaves out counts as missed
    grids = {"own": (fine, target, sizes), "resampled": (whole, coarse, spacing)}
    for grid, maps in grids.items():
        scores = score_case(*maps, np.broadcast_to(args.tolerance, len(classes)))
        scores[:, 3] *= abs(np.linalg.det(ras)) / np.prod(sizes)  # axes may be off right angles
        means = class_means(np.abs(scores))
        for k, row in zip([*classes, "mean"], plain(np.vstack([scores, means]))):
            rows.append({"case": name, "grid": grid, "class": k, **dict(zip(SCORES, row))})
    return rows


# ---- surface scores --------------------------------------------------------------------------


def score_case(prediction, target, spacing, tolerances):
    """SCORES of each class but the background: float64 [K − 1, 4].

    prediction, target: integers [X, Y, Z] on one grid; spacing: mm of its voxels (axes are taken to
    be at right angles); tolerances: mm, [K − 1]. Each class is looked at in the box that holds both
    of its masks, so that the size of the volume hardly matters.
    """
    scores = np.full((len(tolerances), len(SCORES)), np.nan)
    boxes = (find_objects(labels, len(tolerances)) for labels in (prediction, target))
    for k, (a, b) in enumerate(zip(*boxes)):
        if not a and not b:
            continue
        box = boxed((min(i.start, j.start), max(i.stop, j.stop)) for i, j in zip(a or b, b or a))
        a, b = prediction[box] == k + 1, target[box] == k + 1
        more = (a.sum() - b.sum()) * np.prod(spacing) / 1000
        scores[k] = 2 * (a & b).sum() / (a.sum() + b.sum()), 0, np.nan, more
        if a.any() and b.any():
            scores[k, 1:3] = surface_scores(a, b, spacing, tolerances[k])
    return scores


def surface_scores(a, b, spacing, tolerance):
    """Surface Dice at `tolerance` (mm) and HD95 (mm) of two masks, neither of them empty."""
    a, b = (np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (a, b))  # [n, 3], mm
    to_b, to_a = cKDTree(b).query(a, workers=-1)[0], cKDTree(a).query(b, workers=-1)[0]
    close = np.mean(np.append(to_a, to_b) <= tolerance + 1e-4)  # mm: voxel sizes are float32's
    return close, max(np.percentile(to_a, 95), np.percentile(to_b, 95))


# ---- prediction ------------------------------------------------------------------------------


def predict(args, out):
    """Label maps of new scans, each on its own grid"""
    segment, setting, _ = open_segmenter(args)
    skipped, kept, done = [], 0, 0
    jobs = jobs_of(args.scans, out, skipped)
    write_json(out / "labels.json", dict(enumerate(["background", *setting["classes"]])))
    how = [args.overlap, args.mirror, args.modality, args.probabilities, args.overlay]
    how += stamp_of([args.ckpt])
    for target, scan in tqdm(jobs.items(), desc="predicting", unit="scan"):
        stamp, notes = [*how, str(scan), *stamp_of([scan])], f"{target}.prediction.json"
        there = Path(notes).exists() and Path(f"{target}.nii.gz").exists()
        if there and read_json(notes, "of a prediction")["stamp"] == stamp:
            kept += 1
            continue
        try:
            notes_of = predict_scan(scan, target, segment, setting, args)
            write_json(notes, notes_of | {"ckpt": args.ckpt, "stamp": stamp})
            done += 1
        except TOO_MUCH as e:
            skipped.append((scan, str(e) or "not enough memory"))
            tqdm.write(f"left out: {scan}: {skipped[-1][1]}")
    write_table(out / "skipped.csv", ["scan", "reason"], skipped)
    if not done + kept:
        why = [f"; the last: {scan}: {reason}" for scan, reason in skipped[-1:]]
        raise BadInput(f"none of the scans could be used{''.join(why)}")
    print(f"{out}: {done} predicted, {kept} done before, {len(skipped)} left out: skipped.csv")


def jobs_of(named, out, skipped):
    """{path of a prediction, without its suffix: its scan}; what is no scan is added to skipped."""
    jobs = {}
    for folder in map(Path, named):
        try:
            scans, labels = scans_under(folder, LABELS if folder.is_dir() else ())
        except BadInput as e:
            skipped.append((folder, e))
            continue
        for f in scans + labels:
            below = f.relative_to(folder).parent if folder in f.parents else ""
            target = out / below / (stem_of(f) or f.name)
            if f != folder and out.resolve() in f.resolve().parents:
                own = stem_of(f).removesuffix(".probabilities")
                if not f.with_name(f"{own}.prediction.json").exists():
                    skipped.append((f, "lies in --out, as what an earlier call wrote"))
            elif f in labels:
                skipped.append((f, "looks like a label map: name the file itself"))
            elif target in jobs:
                raise BadInput(
                    f"{target}.nii.gz: 2 scans would be written to one file: name their common "
                    "folder instead"
                )
            else:
                jobs[target] = f
    return jobs


def predict_scan(scan, target, segment, setting, args):
    """NAME.nii.gz (on the scan's own grid, with its header) and NAME.png; and what they are."""
    file, classes = f"{target}.nii.gz", setting["classes"]
    if Path(file).resolve() == scan.resolve():
        raise BadInput(f"{file}: the label map would replace the scan; choose another --out")
    values, ras, own = read_scan(scan)
    mapped, ct = setting["intensity_range"], args.modality == "ct"
    if setting["mr_after"] and not (ct or args.modality == "auto" and values.min() < -100):
        mapped = "percentiles"
    finish = partial(torch.softmax, dim=0) if args.probabilities else labels_of
    prediction, image, geometry = segment((values, ras, own), mapped, finish)
    shares = prediction
    if args.probabilities:
        prediction = shares.argmax(0).byte()
    prediction = prediction.numpy()
    labels, affine = invert(prediction, geometry)
    save_like(scan, file, labels, affine)
    if args.probabilities:
        shares = resampled_shares(shares, geometry, own)
        save_like(scan, f"{target}.probabilities.nii.gz", shares, affine, 1 / 255)
    if args.overlay:
        draw_overlay(
            f"{target}.png", image, None, prediction, classes, geometry["spacing"], scan.name
        )
    sizes = np.bincount(labels.flat, minlength=len(classes) + 1) * abs(np.linalg.det(ras)) / 1000
    volumes = dict(zip(classes, sizes[1:].round(3).tolist()))
    return {"scan": str(scan), "range": mapped, "volume_ml": volumes}


def resampled_shares(prepared, geometry, own):
    """Shares [K, …] on the prepared grid -> in steps of 1/255 on the file's own grid.

    uint8 [X, Y, Z, K]. Beyond the foreground all is background.
    """
    shares = []
    for k, share in enumerate(prepared):
        whole = torch.full(geometry["resampled"], float(k == 0))
        whole[boxed(geometry["box"])] = share
        whole = F.interpolate(whole[None, None], geometry["shape"], mode="trilinear")[0, 0]
        shares.append(to_own_axes((whole * 255).round().byte().numpy(), own)[0])
    return np.stack(shares, -1)


# ---- classification --------------------------------------------------------------------------


def cls(args, out):
    """Scores of a classifier on a split, with the thresholds of the validation split"""
    net, state, machine = opened_net(args, load_classifier)
    run, known, wanted = state["args"], state["classes"], ("val", args.split)
    if args.task in (None, run["task"]):
        fill(args, run)
    args.data = data_of(args.task, args.data, machine)
    task = finetune_cls.TASKS[args.task]
    cases, classes = list_cases(task, args.data, args.lists, args.patient, machine)
    if len(classes) != len(known):
        raise BadInput(f"{args.data}: {len(classes)} classes, and {args.ckpt} knows {known}")
    cases = [c for c in cases if c["split"] in wanted]
    cases, skipped = finetune_cls.prepare_all(cases, run["volume"], run["range"], machine)
    parts = {s: [c for c in cases if c["split"] == s] for s in wanted}
    write_table(out / "skipped.csv", ["file", "split", "reason"], skipped)
    score_split(net, parts, args.split, classes, out, machine, args.seed, args=vars(args))


# ---- probes ----------------------------------------------------------------------------------

FIT, HELD, TEST = range(3)  # parts of a target: fitted; fitted, and l2 is chosen on it; scored
COVER = 1 / 8  # share of a patch that an organ must fill to be its label
METRICS = ("accuracy", "balanced_accuracy", "f1", "auc")


def probe(args, out):
    """KNN and linear probes of frozen features: organs, lesions, classes"""
    model, run, machine = opened_net(args, load_encoder)
    c, layers, rows = model.config, args.layer or [], []
    check_least(args, k=1)
    blocks = [str(i) for i in range(c.layers)]
    layers = blocks if "all" in layers else layers
    if not {*layers} <= {*blocks}:
        raise BadInput(f"--layer {' '.join(layers)}: blocks are 0 to {c.layers - 1}, or all")
    torch.manual_seed(args.seed)
    blank = choose_kernels(Model(c), args, machine).to(machine.device)
    nets = {"checkpoint": model, "random weights": blank}
    encode = partial(tokens_of, nets, {f", block {i}": int(i) for i in layers} or {"": -1}, machine)
    edge = int(np.ravel(run.get("volume") or 8 * c.patch)[0])
    fill(args, {"roi": [edge] * 3})
    targets = []
    for task in args.tasks:  # what one of them lacks is said before any is probed
        if task == "lesions":
            target = lesions(args.corpus, edge, edge // c.images, machine)
        elif task in finetune_cls.TASKS:
            target = whole_scans(task, args, c.patch, machine)
        else:
            target = organs(task, args, c.patch, machine)
        targets.append((task, *target))
    for target in targets:
        rows += probe_target(*target, encode, c.patch, args.k)
    draw_boxes(out / "probe.png", rows, "{target}, {probe}", "{features}", METRICS[1:2])
    finish(out, args, rows, probes=rows)


def load_encoder(path):
    """The encoder in a checkpoint of any stage or the published file, and its run's arguments.

    {} where those are not known.
    """
    state = load_checkpoint(path)
    loader = {SEGMENTER: load_segmenter, CLASSIFIER: load_classifier}.get(state.get("format"))
    model = loader(path)[0].encoder if loader else load_pretrained(path)
    return model, state.get("args", {})


@torch.no_grad()
def tokens_of(nets, layers, machine, volume):
    """Volume [X, Y, Z] -> {name: tokens [G, F]}.

    Of each network the outputs of `layers`, and of what networks must beat: the voxels of a patch,
    averaged down to 4³, and its position, the table that the model adds.
    """
    x, tokens = volume[None].to(machine.device).float(), {}
    for name, net in nets.items():
        with machine.autocast():
            hidden = net.encode(x)[1]
        tokens |= {name + words: hidden[i][0].float() for words, i in layers.items()}
    c = net.config
    voxels = patchify(x, c.patch)[0].view(-1, 1, c.patch, c.patch, c.patch)
    tokens["raw voxels"] = F.adaptive_avg_pool3d(voxels, min(4, c.patch)).flatten(1)
    tokens["position alone"] = positions(grid_of(volume.shape, c.patch), c.width, net.axis)
    return tokens


def organs(task, args, patch, machine):
    """Classes and (volume, label map, part) of scans prepared as finetune_seg.py does.

    Of each split the cases whose ids hash lowest; l2 is chosen on every fourth training case.
    """
    cases, classes = labelled_cases(task, args.data, args.classes, machine)
    setting = TASKS.get(task, OWN_TASK) | {"task": task, "data": task, "classes": classes}
    setting["intensity_range"] = parse_range(args.range or setting["range"])
    setting["spacing"] = args.spacing or setting["spacing"]
    cases.sort(key=lambda c: hash_share(c["id"]))
    train, val = ([c for c in cases if c["split"] == split] for split in ("train", "val"))
    chosen = train[: args.cases[0]] + val[: args.cases[1]]
    train, val, _ = finetune_seg.prepare_all(chosen, setting, machine)
    return ["background", *classes], boxes_of(train + val, args.roi, patch)


def boxes_of(cases, roi, patch):
    """(volume, label map, part) of boxes that tile prepared cases, at most `roi` voxels an axis.

    Where the last box has to overlap the one before, the labels there are −1, for no voxel.
    """
    for n, c in enumerate(cases):
        part = TEST if c["split"] == "val" else FIT if n % 4 else HELD
        image, label = opened(c, "image"), np.array(opened(c, "label"), np.int16)
        if min(label.shape) < patch:
            tqdm.write(f"left out: {c['id']}: {label.shape} voxels, less than a patch")
            continue
        # the middle of the scan, where the patch does not divide it
        middle = boxed((m % patch // 2, m - (m % patch + 1) // 2) for m in label.shape)
        image, label = image[middle], label[middle]
        box = [min(m, max(1, r // patch) * patch) for m, r in zip(label.shape, roi)]
        for corner in product(*map(starts, label.shape, box, [0] * 3)):
            here = boxed((a, a + b) for a, b in zip(corner, box))
            yield image[here].copy(), label[here].copy(), part
            label[here] = -1


def lesions(corpus, edge, depth, machine):
    """Classes and (volume, class, part) of a corpus' lesions, as in a semantic sequence."""
    corpora = find_corpus(machine, corpus)
    rows = [r for r in read_corpora(corpora) if r["kind"] == "semantic"]
    types = sorted({r["group"] for r in rows})
    patients = {str(r["patient"]) for r in rows if r["split"] == "train"}
    held = sorted(patients, key=hash_share)[::4]
    if not types[1:]:
        raise BadInput(f"{corpora[0]}: two types of lesions are needed: --corpus, or other --tasks")

    def item(row):
        array = open_array(row["file"], tuple(row["shape"]))
        crop = lesion_crop(array, row, edge, depth)
        volume = to_unit(crop[None], torch.from_numpy(intensity_range(crop))[None, None])[0]
        part = TEST if row["split"] == "val" else HELD if str(row["patient"]) in held else FIT
        return volume, types.index(row["group"]), part

    return types, map(item, rows)


def whole_scans(name, args, patch, machine):
    """Classes and (volume, class, part) of a classification task; l2 is chosen on its val split."""
    task, parts = finetune_cls.TASKS[name], {"train": FIT, "val": HELD, "test": TEST}
    data = data_of(name, args.cls_data, machine)
    cases, classes = list_cases(task, data, None, None, machine)
    shape = task["nano" if patch < 16 else "volume"]
    cases, _ = finetune_cls.prepare_all(cases, shape, task["range"], machine)
    return classes, ((load_volume(c), c["label"], parts[c["split"]]) for c in cases)


def features_of(encode, volume, target, patch):
    """{name: features [n, F]} and classes [n]: of patches of a label map; of a class the means."""
    tokens = {name: t.cpu() for name, t in encode(torch.as_tensor(volume)).items()}
    if isinstance(target, np.ndarray):
        rows, labels = chosen_patches(torch.tensor(target), patch)
        return {name: t[rows] for name, t in tokens.items()}, labels
    del tokens["position alone"]  # the same for every volume
    tokens["raw voxels"] = F.adaptive_avg_pool3d(volume[None].float(), 8).flatten(1)
    return {name: t.mean(0, keepdim=True) for name, t in tokens.items()}, torch.tensor([target])


def chosen_patches(target, patch, cover=COVER):
    """Which patches of a label map [X, Y, Z] a probe uses [n], and their classes [n].

    The class is the organ with the most voxels in the patch (of equals the lower number) if it
    fills the share `cover` of it, else background, 0: organs are small beside a patch, and a
    majority leaves 8 of the phantom's 15 without a token. Patches without a labelled voxel are by
    far the most: evenly spaced ones are used, about as many as there are others.
    """
    v = patchify(target[None], patch)[0]  # [G, P³]
    counts = [(v == k).sum(1) for k in range(1, max(2, v.max() + 1))]
    most, organ = torch.stack(counts, 1).max(1)
    labels, touched = (organ + 1) * (most >= cover * patch**3), most.nonzero()[:, 0]
    rest = ((most == 0) & (v[:, 0] >= 0)).nonzero()[:, 0]
    rows = torch.cat([touched, rest[:: len(rest) // max(1, len(touched)) or 1]])
    return rows, labels[rows]


def probe_target(title, classes, items, encode, patch, k):
    """Scores of the probes of all features: rows."""
    features, labels, parts, rows = defaultdict(list), [], [], []
    for volume, target, part in tqdm(items, desc=title, leave=False):
        tokens, label = features_of(encode, volume, target, patch)
        for name, values in tokens.items():
            features[name].append(values)
        labels.append(label)
        parts += [part] * len(label)
    y, parts = torch.cat(labels), torch.tensor(parts)
    if not all(y[parts == part].any() for part in (FIT, HELD, TEST)):
        raise BadInput(f"{title}: nothing but {classes[0]} to fit, tune or score a probe")
    for name, values in tqdm(features.items(), f"{title}: fits", leave=False):
        row = {"target": title, "features": name, "scored": int((parts == TEST).sum())}
        rows += [row | of for of in probe_scores(torch.cat(values), y, parts, len(classes), k)]
    return rows


def probe_scores(x, y, parts, K, k=20):
    """Scores of both probes on frozen features x [N, F], y [N]: two rows.

    Features are standardised for both (departs: DINO's kNN takes them as they are), so that raw
    voxels, whose cosines are all near 1, have a chance.
    """
    test = parts == TEST
    mean, sd = x[~test].mean(0), x[~test].std(0)
    sd = torch.where(sd > 1e-5 * (1 + mean.abs()), sd, torch.inf)  # a constant tells nothing
    x = (x - mean) / sd
    fit = x[~test], y[~test], K, x[test]
    linear, l2 = linear_probe(*fit, parts[~test] == HELD)
    probs = {"knn": knn(*fit, k), "linear": linear}
    return [{"probe": name, **class_scores(y[test], p), "l2": l2} for name, p in probs.items()]


def knn(x, y, K, query, k=20, temperature=0.07):
    """Vote of the k nearest by cosine, with weights exp(cosine / 0.07) (DINO, Caron et al. 2021).

    x [N, F] with classes y [N], query [M, F] -> shares of the vote [M, K].
    """
    x, shares = F.normalize(x), []
    for q in F.normalize(query).split(1024):
        near, at = (q @ x.T).topk(min(k, len(x)))  # [m, k]
        votes = F.one_hot(y[at], K) * ((near - 1) / temperature).exp()[..., None]
        shares.append(F.normalize(votes.sum(1), p=1))
    return torch.cat(shares)


def linear_probe(x, y, K, query, held, strengths=(1.0, 0.1, 0.01, 0.001, 0.0001)):
    """Logistic regression on x [N, F], y [N] -> probabilities of query [M, K], and its l2.

    l2 is the one of `strengths` with the least cross-entropy of the rows that held [N] marks, when
    fitted to the others; then all are fitted.
    """
    losses, w = {}, None
    for l2 in strengths:  # from strong to weak, each from the last
        w = logistic(x[~held], y[~held], K, l2, w)
        losses[l2] = F.cross_entropy(scores_of(w, x[held]), y[held]).item()
    l2 = min(losses, key=losses.get)
    return scores_of(logistic(x, y, K, l2), query).softmax(1), l2


def class_scores(labels, probs):
    """METRICS of probs [M, K]; but accuracy, they are means over the classes that labels have."""
    labels, probs = labels.numpy(), probs.numpy()
    have, top = np.unique(labels), probs.argmax(1)
    y, hits = (v[:, None] == have for v in (labels, top))  # [M, classes]
    point, areas = at_point(y, hits), np.array([*map(auc, y.T, probs.T[have])], float)
    values = np.mean(top == labels), point["sensitivity"], point["f1"], areas.mean()
    return dict(zip(METRICS, plain(np.array(values))))


# ---- next patch ------------------------------------------------------------------------------

QUARTERS = range(4)  # of the sequence, that a prefix has
CURVES = ("loss", "patch_mean", "earlier_patch")  # errors by position


@torch.no_grad()
def pretrain(args, out):
    """Next-patch errors by kind, prefix and position, and completions"""
    model, run, machine = opened_net(args, load_encoder)
    c, kind = model.config, load_checkpoint(args.ckpt).get("format", FORMAT)
    if (kind, c.target) != (FORMAT, "pixel"):
        raise BadInput(f"{args.ckpt}: predicts no voxels: name one of pretrain.py --target pixel")
    check_least(args, completions=0, samples=max(1, args.completions))
    args.data = find_corpus(machine, args.data, run.get("data"))
    fill(args, {"volume": 128, "stride": 8, **run})
    data = Sequences(args.data, "val", args.volume, c.images, args.stride, seed=args.seed)
    n, G = len(data.kinds), (args.volume // c.patch) ** 3
    samples = [data[i] for i in range(args.samples * n)]  # the kinds in turn
    loader = DataLoader(samples, n * max(1, args.completions))
    batches = [to_device(b, machine.device) for b in loader]
    machine.say(f"{', '.join(args.data)}: {args.samples} sequences of each kind, {G} patches")
    rows, curves, strips = [], {}, defaultdict(dict)
    for e in tqdm(QUARTERS, desc="next patch", leave=False):
        p, errors = G * e // 4, []
        for b in batches:
            b["prefix"] = torch.full_like(b["kind"], p)
            with machine.autocast():
                losses, _ = model(b["volume"], b["prefix"], b["ranges"], per_patch=True)
            errors.append(losses.double().cpu())
        errors, rivals = torch.cat(errors).numpy(), trivial_errors(model, batches, G, machine)
        completed = completions(model, batches[0], p) if args.completions else {}
        for i, k in enumerate(data.kinds):
            mine, rival = errors[i::n, p:], rivals[k]  # [N, G − p]
            curves[k, p] = np.stack([mine.mean(0), rival["mean"][p:], rival["copy"][p:]])
            row = {"kind": k, "prefix": p, **dict(zip(CURVES, curves[k, p].mean(1)))}
            row["loss"] = mean_intervals(mine.mean(1, keepdims=True), args.seed)[0]
            for name, (volumes, loss) in completed.items():
                strips[f"{k}, {name}"][f"{p} given"] = volumes[i]
                row[name] = loss[i::n].mean().item()
            rows.append(row | {"distance": rival["distance"]})
    lines = [[*at, j, *v] for at, c in curves.items() for j, v in enumerate(c.T, at[1])]
    write_table(out / "positions.csv", ["kind", "prefix", "position", *CURVES], lines)
    points, panels = [], []
    for k in data.kinds:
        names = [f"{k}, {name}" for name in CURVES]
        points += [{"position": j, **dict(zip(names, v))} for j, v in enumerate(curves[k, 0].T)]
        panels.append((f"{k}, no prefix", names, {}))
    draw_curves(out / "positions.png", points, *panels, x="position")
    if strips:
        draw_strips(out / "completions.png", strips, data.depth)
    finish(out, args, rows)


def completions(model, b, p):
    """A batch completed from p patches on: {what: (volumes [B, X, Y, Z], errors [B])}.

    teacher_forced: each patch from the true ones before it; free_running: from predicted ones.
    """
    patches, grid, order = model.sequence(b["volume"], b["ranges"])
    target, mean, scale = standardise(patches)
    back, out = slice(None) if order is None else order.argsort(), {}
    preds = {"truth": target, "mean": 0 * target}
    preds["teacher_forced"] = model(b["volume"], b["prefix"], b["ranges"])[1]
    preds["free_running"] = model.complete(patches, p, grid, order)
    for name, pred in preds.items():
        filled = torch.cat([patches[:, :p], (pred * scale + mean)[:, p:]], 1)[:, back]
        errors = (pred - target)[:, p:].square().mean((1, 2))
        out[name] = unpatchify(filled, grid).clamp(0, 1).cpu(), errors
    return out


# ---- table -----------------------------------------------------------------------------------

CELL = ("task", "labels", "metric", "initialisation")
ASIDE = FREE - {"data"} | {"seed"}  # settings in which runs of a cell may differ
NOTE = """
Dice: mean over classes of validation cases, with the weights of a run's last step. AUC: of the test
split. sd: of the runs' values (n - 1). low, high: 95 % interval of B - A, A being the row's
initialisation: by a bootstrap over the cases (AUC: the patients), widened, as the root of the sum
of squares, by Student's interval over the seeds that both have; of a single seed, over cases alone.
HD95: B - A is of what both have found; a run's mean, of what it has found.
Where one pre-training is behind all seeds, its own chance is in no interval.
"""


def table(args, out):
    """Fine-tuning runs by task, initialisation and share of the labels, with paired tests"""
    runs, notes = find_runs(args.runs)
    if not runs:
        raise BadInput(
            "\n".join([f"{' '.join(args.runs)}: no finished fine-tuning run in it", *notes])
        )
    cells, rows, tests, classes = defaultdict(list), [], [], []
    for r in sorted(runs, key=lambda r: (r["cell"][:3], not untrained(r["cell"][3].split(",")[0]))):
        cells[r["cell"]].append(r)
    for cell, of in cells.items():
        row = dict(zip(CELL, cell))
        values, seeds, sets = ([r[k] for r in of] for k in ("value", "seed", "settings"))
        rows.append({**row, **spread(values), "seeds": seeds})
        differ = sorted(set.union(*sets) - set.intersection(*sets))
        if differ:
            notes.append(f"runs of {', '.join(map(str, cell))} differ: {', '.join(differ)}")
        for name in of[0]["dice"]:
            classes.append({**row, "class": name, **spread([r["dice"].get(name) for r in of])})
    for a, b in combinations(cells, 2):
        if a[:3] == b[:3]:
            tests.append({**dict(zip(CELL, a)), "B": b[3], **paired(cells[a], cells[b], args.seed)})
    draw_boxes(out / "table.png", runs, "{task}", "{name}", ["value"])
    tables = [text_table(t) for t in (rows, tests, classes) if t]
    write_text(out / "table.md", "\n\n".join([*tables, NOTE, *notes]))
    print(*tables[1:], NOTE, *notes, sep="\n\n")
    finish(out, args, rows, table=rows, tests=tests, classes=classes)


def spread(values):
    """Of the defined ones: how many, mean, and sd (n - 1)."""
    values = [v for v in values if v is not None]
    sd = np.std(values, ddof=1) if values[1:] else None
    return {"runs": len(values), "mean": np.mean(values) if values else None, "sd": sd}


def find_runs(folders):
    """The finished fine-tuning runs in `folders` and below, and notes on what is not one.

    A run is a folder with an args.json that names a task; earlier-N folders are runs that a later
    one replaced.
    """
    files, runs, notes = {}, [], []
    for folder in map(Path, folders):
        if not folder.exists():
            raise BadInput(f"{folder}: no such folder")
        files |= {f.resolve(): f.parent for f in sorted(folder.rglob("args.json"))}
    for file, folder in files.items():
        if folder.name.startswith("earlier-"):
            continue
        try:
            args = read_json(file, "the arguments of a run")
            if {"task", "init"} <= {*args}:  # else pre-training's
                runs += read_run(folder, args)
        except BadInput as e:
            notes.append(f"not in the table: {folder}: {e}")
    return runs, notes


def read_run(folder, args):
    """A run: cell, seed, value, settings, Dice of each class, cases and their scores.

    Cases are ids, or (file, patient, label); scores Dice [N, K], or probabilities [N, K]. Where
    `eval.py seg` has scored its ckpt.pt, once more for each of its scores on the scans' own grid.
    """
    m = read_json(folder / "metrics.json", "the metrics of a run")
    try:
        task, labels, init = args["task"], str(args["labels"]), args["init"]
        with contextlib.suppress(ValueError):  # a list of names stays as it is
            labels = f"{float(labels):g}"
        init += ", frozen" * args["freeze"]
        if "mean_dice" in m:
            metric, value, dice = "Dice", m["mean_dice"], m["dice"]
            cases, scores = [*m["cases"]], np.array([*m["cases"].values()], float)
        else:
            metric, value, dice = "AUC", m["test"]["auc"]["value"], {}
            cases, scores = read_scores(folder / "scores.csv")
        if value is None:
            raise BadInput(f"its {metric} is undefined: a class that no case has")
        run = {"seed": args["seed"], "value": float(value), "dice": dice, "cases": cases}
        run |= {"scores": scores, "task": f"{task}, {metric}", "name": f"{init}, {labels}"}
        settings = {f"{k} {v}" for k, v in args.items() if k not in ASIDE}
        run |= {"cell": (task, labels, metric, init), "settings": settings}
        path, runs, rows = folder / "eval-seg", [run], []
        if (path / "metrics.json").exists():
            how = read_json(path / "metrics.json", "the scores of eval.py seg")["args"]
            of = how["split"], Path(how["ckpt"]).name, how.get("task", task)
            if of == ("val", "ckpt.pt", task):
                if how.get("step", m["step"]) != m["step"]:
                    raise BadInput("eval-seg is of an earlier step: run eval.py seg again")
                rows = read_table(path / "cases.csv")
                scored = {
                    f"scored with {k} {how[k]}" for k in ("data", "mirror", "overlap", "tolerance")
                }
        rows = [r for r in rows if r["grid"] == "own" and r["class"] != "mean"]
        for name in SCORES[:3] if rows else ():
            own = {"cases": [*dict.fromkeys(r["case"] for r in rows)], "dice": {}}
            own["settings"] = settings | scored
            scores = [float(r[name] or "nan") for r in rows]  # by case, then class
            own["scores"] = np.reshape(scores, (len(own["cases"]), -1))
            own["cell"] = task, labels, f"{name}, own grid", init
            own |= {"value": plain(value_of(own, slice(None))), "task": f"{task}, {name}"}
            runs.append(run | own)
        return runs
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise BadInput(
            "metrics.json or args.json is not as the fine-tuning scripts write it "
            f"({type(e).__name__}: {e})"
        ) from None


def read_scores(path):
    """Test cases of a scores.csv: (file, patient, label) of each, and probabilities [N, K]."""
    rows = [r for r in read_table(path) if r["split"] == "test"]
    probs = [[float(v) for name, v in r.items() if name.startswith("p_")] for r in rows]
    return [(r["file"], r["patient"], int(r["label"])) for r in rows], np.array(probs)


def value_of(run, at):
    """A run's mean Dice or AUC over the rows `at` of its cases; NaN: undefined."""
    if run["cell"][2] != "AUC":
        return class_means(class_means(run["scores"][at])[:, None])[0]
    labels = np.array([label for _, _, label in run["cases"]])
    return np.array(macro_auc(labels[at], run["scores"][at]), float)


def paired(a_runs, b_runs, seed):
    """B − A, the runs of two initialisations, over the seeds that both have, and its interval.

    Cases (AUC: patients) are drawn with replacement; seeds are too few for that (of three, a
    bootstrap's 95 % cover 75 %), so that theirs is Student's interval, in quadrature. Runs of one
    seed count as one; HD95 is of what both have found.
    """
    pairs = [(a, b) for a in a_runs for b in b_runs if a["seed"] == b["seed"]]
    cases = {(*r["cases"],) for pair in pairs for r in pair}
    if len(cases) != 1 or () in cases:
        return {"n": "no seed or no cases in common"}
    groups = [case if isinstance(case, str) else case[1] for case in cases.pop()]

    if a_runs[0]["cell"][2].startswith("hd95"):  # NaN where one has missed it
        gaps = [0 * (a["scores"] + b["scores"]) for a, b in pairs]
        pairs = [[r | {"scores": r["scores"] + gap} for r in p] for p, gap in zip(pairs, gaps)]

    def differences(at):
        of = defaultdict(list)
        for a, b in pairs:
            of[a["seed"]].append(value_of(b, at) - value_of(a, at))
        return np.array([np.mean(v) for v in of.values()])

    each = differences(np.arange(len(groups)))
    mean, n = each.mean(), len(each)
    low, high = interval([differences(at).mean() for at in resampled(groups, DRAWS, seed)])
    if n > 1 and low is not None:
        wide = student.ppf(0.975, n - 1) * each.std(ddof=1) / n**0.5
        low, high = mean - np.hypot(mean - low, wide), mean + np.hypot(high - mean, wide)
    seeds = sorted({a["seed"] for a, _ in pairs})
    return {"B - A": mean, "low": low, "high": high, "seeds": seeds, "n": len({*groups})}


if __name__ == "__main__":
    cli(main)
