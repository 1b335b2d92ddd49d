"""Evaluation: scores of segmenters and classifiers, label maps of new scans, frozen features, next-patch errors, the table.

    python eval.py seg --ckpt out/seg-phantom/best.pt --grid both    # Dice, surface Dice, HD95, volumes: 8 s on two cores
    python eval.py cls --ckpt out/cls-nodule-phantom/best.pt         # AUC and the rest, with intervals
    python eval.py predict --ckpt out/seg-amos/best.pt SCAN… --out out/predict       # label maps on the scans' own grids
    python eval.py probe --ckpt out/pretrain/ckpt.pt                 # kNN and linear probes of frozen features: 21 s
    python eval.py pretrain --ckpt out/pretrain/ckpt.pt              # loss by kind, prefix and position, completions: 16 s
    python eval.py table out/*                                       # all fine-tuning runs: mean ± sd, paired tests
    python eval.py seg --bench                                       # time to score a 512 x 512 x 200 case of 16 classes
    python eval.py --ckpt FILE                                       # the sub-command that fits the checkpoint

Surface scores (seg). The surface of a mask is its voxels with a face neighbour outside of it (or of the volume); distances are
between voxel centres, in mm, as in MONAI's `compute_hausdorff_distance` and `compute_surface_dice`. HD95: the larger of the two
directed 95th percentiles (linear interpolation). Surface Dice (NSD, Nikolov et al. 2018): the share of both surfaces together
that lies within the tolerance of the other; surface voxels count alike, where Nikolov's weigh by area.
Empty classes: absent in truth and prediction, a case is left out; absent in one of them, Dice and surface Dice are 0 and HD95
is undefined (left out, and counted as missed). Volume errors are prediction − truth in cases.csv and in the box plots; tables and
metrics.json have the mean of their sizes.

Sections: surface scores · segmentation · classification · prediction · frozen features · next patch · table · main

X Y Z voxels, K classes with the background, N cases.
"""
import argparse
import csv
import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import cKDTree
from tqdm import tqdm

from common import (BadInput, auc, cli, cores, decide, draw_confusion, draw_overlay, draw_roc, draw_slice, figure_of, label_legend, load_checkpoint,
                    mean_of, parallel, place, read_json, save_figure, text_of, thresholds_of, with_intervals, write_beside, write_json,
                    write_table)
from kernels import choose
from model import (CLS_FORMAT, FORMAT, SEGMENTER, Classifier, Config, Model, dense_probe, fit, grid_of, load_pretrained, load_segmenter,
                   overlap_counts, patchify, positions, probe_scores, sliding_window, standardise, to_unit, token_grid, unpatchify, whole_patches)
from serialize import (CLS_TASKS, FLAVOURS, KINDS, LABELS, NIFTI, SEG_TASKS, SITK, Sequences, cls_data, cls_task, cut, find_cases,
                       find_corpus, invert, labelled_cases, list_cases, load_volume, nearest, open_array, prepare, prepare_whole, read_case,
                       read_index, read_scan, resize, scans_under, smooth, stem_of, suffix_of, to_own_axes, uncut, window_of, window_of_case)

# ---------------------------------------------------------------- surface scores

SCORES = ("dice", "nsd", "hd95_mm", "volume_error_ml")  # of a class of a case, in this order; NaN where undefined


def surface(mask, corner, spacing):
    """Voxel centres (mm) of the surface of a bool mask [X, Y, Z] whose first voxel is voxel `corner` of the volume: [n, 3]."""
    return (np.argwhere(mask & ~binary_erosion(mask)) + corner) * spacing


def surface_scores(a, b, tolerance):
    """Surface Dice at `tolerance` (mm) and HD95 (mm) of two surfaces [n, 3] and [m, 3], neither of them empty."""
    to_b, to_a = (cKDTree(q).query(p, workers=-1)[0] for p, q in ((a, b), (b, a)))
    close = sum(int((d <= tolerance).sum()) for d in (to_a, to_b))
    return close / (len(a) + len(b)), max(np.percentile(to_a, 95), np.percentile(to_b, 95))


def score_case(found, truth, spacing, tolerances, volume=None):
    """SCORES of each class but the background: float64 [K − 1, 4].

    found, truth: integers [X, Y, Z] on one grid; spacing: mm of its voxels; tolerances: mm, [K − 1]; volume: mm³ of a voxel, where
    axes are not at right angles (distances are then taken as if they were). Each class is looked at in the box around it alone, which holds both surfaces, so that the size of the volume hardly matters.
    """
    K, spacing = len(tolerances) + 1, np.asarray(spacing, float)
    both, n_found, n_truth = overlap_counts(torch.from_numpy(found), torch.from_numpy(truth), K)[1:].double().numpy().T
    scores = np.full((K - 1, len(SCORES)), np.nan)
    present = (n_found + n_truth) > 0
    scores[present, 0] = 2 * both[present] / (n_found + n_truth)[present]
    scores[present, 1] = 0
    scores[present, 3] = (n_found - n_truth)[present] * (volume or spacing.prod()) / 1000
    boxes = [find_objects(labels, K - 1) for labels in (found, truth)]
    for k in np.flatnonzero((n_found > 0) & (n_truth > 0)):
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(boxes[0][k], boxes[1][k]))
        surfaces = [surface(labels[box] == k + 1, [s.start for s in box], spacing) for labels in (found, truth)]
        scores[k, 1:3] = surface_scores(*surfaces, tolerances[k])
    return scores


# ---------------------------------------------------------------- segmentation


def add_seg(commands):
    p = command(commands, "seg", "scores of a segmenter on labelled cases", ckpt=None)
    p.add_argument("--task", help="of finetune_seg.py (default: what the checkpoint was trained for)")
    p.add_argument("--data", help="folder in the Decathlon layout (default: the checkpoint's)")
    p.add_argument("--split", choices=["val", "train", "all"], default="val", help="default %(default)s")
    p.add_argument("--grid", choices=["own", "resampled", "both"], default="own",
                   help="where scores are taken: the scan's own grid, the resampled one (published), or both (default own)")
    p.add_argument("--tolerance", type=float, nargs="+", default=[2.0], metavar="MM", help="of the surface Dice: one, or one a class (default 2)")
    window_flags(p)
    p.add_argument("--bench", action="store_true", help="time the scoring of a made-up 512 x 512 x 200 case of 16 classes; needs no checkpoint")


def segmentation(args):
    if args.bench:
        return bench_scores()
    net, made, where = open_segmenter(args)
    task = args.task or made["task"]
    data = args.data or (made.get("data") if task == made["task"] else None) or ("data/phantom/amos" if task == "phantom" else f"data/{task}")
    cases, classes = find_cases(task, data, made["classes"] if task == made["task"] or task not in SEG_TASKS else None, where)
    if len(classes) != len(made["classes"]):
        raise BadInput(f"--task {task}: {len(classes)} classes ({', '.join(classes[:4])} …), and {args.ckpt} knows {len(made['classes'])}")
    cases = [c for c in cases if args.split in ("all", c["split"])]
    tolerances = args.tolerance * len(classes) if len(args.tolerance) == 1 else args.tolerance
    if len(tolerances) != len(classes) or not all(t >= 0 for t in tolerances):
        raise BadInput(f"--tolerance {' '.join(f'{t:g}' for t in args.tolerance)}: one number, or {len(classes)}, none below 0")
    grids = ("own", "resampled") if args.grid == "both" else (args.grid,)
    out = Path(args.out or Path(args.ckpt).parent / f"eval-{args.split}")
    scored, sheet, failed = [], [], []
    for case in tqdm(cases, desc="scoring", unit="case"):
        try:
            on_grids, views = score_one(case, net, made, grids, tolerances, args, where)
        except BadInput as e:
            failed.append((case["id"], str(e)))
            continue
        scored.append((case["id"], on_grids))
        sheet.append(views)
    if not scored:
        raise BadInput("\n".join([f"{data}: no case of the {args.split} split can be scored", *(f"  {n}: {why}" for n, why in failed)]))
    report_seg(scored, sheet, failed, classes, tolerances, grids, dict(task=task, data=str(data), split=args.split, ckpt=str(args.ckpt)), args, out)


def open_segmenter(args):
    """The network on its device, what it was made for (--overlap and the like filled in), and the device."""
    if not args.ckpt:
        raise BadInput("--ckpt FILE is needed: a checkpoint of finetune_seg.py")
    where = place(args.device, args.dtype)
    net, made = load_segmenter(args.ckpt)
    if args.overlap is not None and not 0 <= args.overlap < 1:
        raise BadInput(f"--overlap {args.overlap:g}: from 0 to below 1")
    if args.windows < 1:
        raise BadInput(f"--windows {args.windows}: at least 1 is needed")
    made["overlap"] = made["overlap"] if args.overlap is None else args.overlap
    net.encoder.use(kernels_of(args, where))
    return net.to(where.device).eval(), made, where


def segment(net, made, volume, args, where):
    """Prepared volume [X, Y, Z] -> logits [K, X, Y, Z], averaged over sliding windows (and mirror images with --mirror)."""
    def predict(x):
        with where.autocast():
            return net(x)
    return sliding_window(predict, torch.from_numpy(volume), made["roi"], made["overlap"], args.windows, where.device,
                          (0, 1, 2) if args.mirror else ())


def score_one(case, net, made, grids, tolerances, args, where):
    """Predict one labelled case: {grid: scores [K − 1, 4]}, and three slices of it to look at."""
    values, ras, own, truth = read_case(case, len(tolerances) + 1)
    try:
        volume, geometry = prepare(values, ras, own, made["spacing"], window_of_case(case, made["window"], made["mr_after"]))
    except BadInput as e:
        raise BadInput(f"{case['image']}: {e}") from None
    found = uncut(segment(net, made, volume, args, where).argmax(0).byte().cpu().numpy(), geometry)
    scores, views = {}, None
    if "own" in grids:
        back = smooth(found, geometry["shape"])
        scores["own"] = score_case(back, truth, nib.affines.voxel_sizes(ras), tolerances, abs(np.linalg.det(ras[:3, :3])))
    if "resampled" in grids:  # what the cut to the foreground leaves out of the truth counts as missed
        scores["resampled"] = score_case(found, nearest(truth, geometry["resampled"]), geometry["spacing"], tolerances)
    seen = nearest(truth, geometry["resampled"])
    areas = (seen > 0).sum((0, 1))
    z = int(areas.argmax())
    low, high = geometry["box"][2]
    image = np.zeros(geometry["resampled"][:2], np.float32)
    if low <= z < high:
        image[tuple(slice(a, b) for a, b in geometry["box"][:2])] = volume[:, :, z - low]
    views = dict(image=image, truth=seen[:, :, z].copy(), found=found[:, :, z].copy(), z=z, spacing=geometry["spacing"])
    return scores, views


def bootstrap_mean(values, times=1000, seed=0):
    """Mean of the defined ones of [N, …] over cases, and its 95 % percentile interval over resampled cases: three of […]."""
    values = np.asarray(values, float)
    picks = np.random.default_rng([seed, 5]).integers(len(values), size=(times, len(values)))
    mean_over = lambda v, axis: np.nansum(v, axis) / np.maximum(1, (~np.isnan(v)).sum(axis)) + np.where(np.isnan(v).all(axis), np.nan, 0)  # noqa: E731
    drawn = np.stack([mean_over(values[p], 0) for p in picks])
    with np.errstate(all="ignore"):
        low, high = (np.nanpercentile(np.where(np.isnan(drawn).all(0), 0, drawn), q, axis=0) for q in (2.5, 97.5))
    mean = mean_over(values, 0)
    return mean, np.where(np.isnan(mean), np.nan, low), np.where(np.isnan(mean), np.nan, high)


def report_seg(scored, sheet, failed, classes, tolerances, grids, made_of, args, out):
    """Table, metrics.json, cases.csv, skipped.csv, box plots and the sheet of the best, the median and the worst case."""
    rows, metrics = [], dict(**made_of, tolerance_mm=tolerances, cases=len(scored), skipped=len(failed), grids={})
    plain = lambda x: None if np.isnan(x) else float(x)  # noqa: E731
    for grid in grids:
        table = np.stack([s[grid] for _, s in scored])                                 # [N, K − 1, 4]
        sized = np.abs(table)                                                          # volume errors by their size
        mean, low, high = bootstrap_mean(sized)
        over = bootstrap_mean(class_mean(sized))
        missed = (np.isnan(table[..., 2]) & ~np.isnan(table[..., 0])).sum(0)
        print(f"{grid} grid, {len(scored)} cases, mean [95 % interval over cases]; surface Dice at "
              + (f"{tolerances[0]:g} mm" if len(set(tolerances)) == 1 else "the tolerances given"))
        print(f"{'':>22}  {'Dice':^22}  {'surface Dice':^22}  {'HD95 mm':^22}  {'volume error ml':^22}  cases  missed")
        for k, name in enumerate([*classes, "mean"]):
            m, lo, hi = (x[k] for x in (mean, low, high)) if k < len(classes) else over
            n = int((~np.isnan(table[:, k, 0])).sum()) if k < len(classes) else len(scored)
            cells = [f"{m[i]:.{d}f} [{lo[i]:.{d}f}, {hi[i]:.{d}f}]" if not np.isnan(m[i]) else "-" for i, d in enumerate((3, 3, 1, 1))]
            print(f"{name:>22}  " + "  ".join(f"{c:^22}" for c in cells) + f"  {n:5}  {missed[k] if k < len(classes) else missed.sum():6}")
        spread = lambda m, lo, hi: {s: dict(value=plain(m[i]), low=plain(lo[i]), high=plain(hi[i])) for i, s in enumerate(SCORES)}  # noqa: E731
        metrics["grids"][grid] = dict(mean=spread(*over), classes={c: dict(spread(mean[k], low[k], high[k]), missed=int(missed[k]),
                                      cases=int((~np.isnan(table[:, k, 0])).sum())) for k, c in enumerate(classes)})
        rows += [[name, grid, c, *("" if np.isnan(x) else f"{x:.6g}" for x in s[grid][k])] for name, s in scored for k, c in enumerate(classes)]
        draw_boxes(out / f"boxes-{grid}.png", table, classes, grid)
    write_table(out / "cases.csv", ["case", "grid", "class", *SCORES], rows)
    write_table(out / "skipped.csv", ["case", "reason"], failed)
    mean_dice = [float(np.nanmean(s[grids[0]][:, 0])) if not np.isnan(s[grids[0]][:, 0]).all() else -1 for _, s in scored]
    order = np.argsort(mean_dice)
    draw_sheet(out / "cases.png", [(label, scored[i][0], mean_dice[i], sheet[i]) for label, i in
                                   zip(("best", "median", "worst"), (order[-1], order[len(order) // 2], order[0]))], classes)
    write_json(out / "metrics.json", metrics)
    for name, why in failed:
        print(f"left out: {name}: {why}")
    print("wrote " + ", ".join(str(out / f) for f in ("metrics.json", "cases.csv", "cases.png", *(f"boxes-{g}.png" for g in grids))))


def class_mean(table):
    """[N, K − 1, 4] -> the mean over the classes that a case has [N, 4]."""
    n = (~np.isnan(table)).sum(1)
    return np.where(n > 0, np.nansum(table, 1) / np.maximum(1, n), np.nan)


def draw_boxes(path, table, classes, grid):
    fig, axes = figure_of((12, 8), 2, 2)
    for ax, i, name in zip(axes.flat, range(4), ("Dice", "surface Dice", "HD95, mm", "volume error, ml")):
        columns = [c[~np.isnan(c)] for c in table[:, :, i].T]
        ax.boxplot(columns, widths=0.6, showmeans=True, medianprops=dict(color="tab:red"), flierprops=dict(ms=3))
        for k, c in enumerate(columns):
            ax.plot(np.full(len(c), k + 1), c, ".", color="tab:blue", ms=4, alpha=0.5)
        ax.set_xticks(range(1, len(classes) + 1), classes, rotation=60, ha="right", fontsize=8)
        ax.set(ylabel=name, ylim=(-0.02, 1.02) if i < 2 else None)
        ax.grid(alpha=0.3, axis="y")
    fig.suptitle(f"{len(table)} cases, {grid} grid")
    fig.tight_layout()
    save_figure(fig, path)


def draw_sheet(path, chosen, classes):
    """Scan, truth and prediction of a few cases, each on the slice with most of the labels."""
    fig, axes = figure_of((11, 3.7 * len(chosen)), len(chosen), 3)
    for row, (label, name, dice, v) in zip(axes, chosen):
        for ax, title, labels in zip(row, ("scan", "truth", "prediction"), (None, v["truth"], v["found"])):
            draw_slice(ax, v["image"], labels, v["spacing"][1] / v["spacing"][0], *np.percentile(v["image"], [1, 99.5]))
            ax.set_title(title)
        row[0].set_ylabel(f"{label}: {name}\nDice {dice:.3f}, z = {v['z']}")
    label_legend(fig, classes)
    save_figure(fig, path)


def bench_scores():
    """The seconds that `score_case` takes for a phantom of 512 x 512 x 200 voxels against itself, moved and dented."""
    from phantom import abdomen
    shape, spacing = (512, 512, 200), (0.72, 0.72, 1.9)
    print("making a patient of 512 x 512 x 200 voxels (a minute)")
    truth = abdomen(np.random.default_rng(0), shape, spacing)[1]
    found = np.roll(truth, (3, -2, 1), (0, 1, 2))
    found[np.random.default_rng(1).random(shape) < 0.02] = 0
    coarse = nearest(found, [246, 246, 190])                                           # AMOS's 1.5 x 1.5 x 2 mm
    start = time.perf_counter()
    smooth(coarse, list(shape))
    print(f"smooth, back to the scan's own grid: {time.perf_counter() - start:.1f} s on {cores()} cores")
    start = time.perf_counter()
    scores = score_case(found, truth, spacing, [2.0] * 15)
    print(f"score_case, all scores on that grid: {time.perf_counter() - start:.1f} s, 15 organs and the background, "
          f"{(truth > 0).sum() / 1e6:.1f} M labelled voxels; mean Dice {np.nanmean(scores[:, 0]):.3f}, HD95 {np.nanmean(scores[:, 2]):.1f} mm")


# ---------------------------------------------------------------- classification


def add_cls(commands):
    p = command(commands, "cls", "scores of a classifier on a split")
    p.add_argument("--task", help="of finetune_cls.py (default: what the checkpoint was trained for)")
    p.add_argument("--data", help="as for finetune_cls.py (default: the checkpoint's)")
    p.add_argument("--lists", nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="as for finetune_cls.py (default: the checkpoint's)")
    p.add_argument("--patient", metavar="REGEX", help="as for finetune_cls.py (default: the checkpoint's)")
    p.add_argument("--split", choices=["test", "val", "train"], default="test", help="default %(default)s")
    p.add_argument("--cache", default="data/cache-cls", help="where resized scans are kept (default %(default)s)")
    p.add_argument("--bootstrap", type=int, default=1000, help="resamplings of the patients (default %(default)s)")


def classification(args):
    state = load_checkpoint(args.ckpt, CLS_FORMAT)
    was, where = state["args"], place(args.device, args.dtype)
    model = Classifier(Model(Config(**state["config"])), len(state["classes"]), state["pool"])
    fit(model, state["model"], args.ckpt)
    model.encoder.use(kernels_of(args, where))
    model.to(where.device).eval()
    name = args.task or was["task"]
    task = cls_task(name, was["flavour"])
    data = cls_data(name, was["flavour"], args.data or (was["data"] if name == was["task"] else None), where)
    cases, classes = list_cases(task, data, args.lists or was["lists"], args.patient or was["patient"], where)
    if len(classes) != len(state["classes"]):
        raise BadInput(f"--data {data}: {len(classes)} classes, and {args.ckpt} knows {len(state['classes'])}: {', '.join(state['classes'])}")
    splits = dict.fromkeys(("val", args.split))
    scored, skipped = {}, []
    for split in splits:  # validation cases give Youden's thresholds
        ready = [c for c in cases if c["split"] == split]
        job = partial(prepare_whole, shape=tuple(state["volume"]), window=state["window"], cache=args.cache)
        arrays = list(parallel(job, ready, desc=f"reading {split}"))
        skipped += [(c["file"], split, why) for c, (_, _, why) in zip(ready, arrays) if why]
        ready = [dict(c, array=a) for c, (a, _, why) in zip(ready, arrays) if not why]
        if not ready:
            raise BadInput(f"{data}: no case of the {split} split can be read; the first: {skipped[0][0]}: {skipped[0][2]}")
        scored[split] = ready, np.array([c["label"] for c in ready]), class_probabilities(model, ready, where)
    cases, labels, probs = scored[args.split]
    thresholds = thresholds_of(*scored["val"][1:])
    found = with_intervals(labels, probs, np.array([c["patient"] for c in cases]), thresholds, args.bootstrap, 0)
    out = Path(args.out or Path(args.ckpt).parent / f"eval-{args.split}")
    print(f"{args.split}, {len(cases)} cases of {len({c['patient'] for c in cases})} patients, 95 % intervals over patients")
    for k, v in found.items():
        print(f"{k.replace('_', ' '):>26}  {text_of(v)}")
    write_table(out / "scores.csv", ["file", "patient", "split", "label", *(f"p_{c}" for c in range(len(classes))), "predicted"],
                [[c["file"], c["patient"], args.split, y, *(f"{x:.8f}" for x in p), d] for c, y, p, d in zip(cases, labels, probs, decide(probs))])
    write_table(out / "skipped.csv", ["file", "split", "reason"], skipped)
    draw_roc(out / "roc.png", {s: v[1:] for s, v in scored.items()}, thresholds, found, classes, args.split)
    draw_confusion(out / "confusion.png", labels, probs, thresholds, classes)
    write_json(out / "metrics.json", dict(task=name, data=str(data), split=args.split, ckpt=str(args.ckpt), cases=len(cases), skipped=len(skipped),
               classes=classes, thresholds=thresholds, scores=found))
    print("wrote " + ", ".join(str(out / f) for f in ("metrics.json", "scores.csv", "roc.png", "confusion.png")))


@torch.no_grad()
def class_probabilities(model, cases, where, batch=8):
    """Softmax of each case, float64 [N, K]."""
    probs = []
    for i in tqdm(range(0, len(cases), batch), desc="scoring"):
        volumes = torch.stack([load_volume(c) for c in cases[i:i + batch]]).to(where.device).float()
        with where.autocast():
            logits = model(volumes)
        probs.append(logits.double().softmax(1).cpu())
    return torch.cat(probs).numpy()


# ---------------------------------------------------------------- prediction


def add_predict(commands):
    p = command(commands, "predict", "label maps of new scans, each on its own grid")
    p.add_argument("scans", nargs="+", metavar="SCAN", help="NIfTI files, folders of them, or of DICOM slices (SimpleITK)")
    p.add_argument("--modality", choices=["auto", "ct", "mr"], default="auto", help="for a task of CT and MR (amos): which window; auto: CT where "
                   "a voxel is below −100 (default auto)")
    p.add_argument("--probabilities", action="store_true", help="write NAME.probabilities.nii.gz too: [X, Y, Z, K], steps of 1/255")
    p.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="a PNG of each scan")
    p.add_argument("--redo", action="store_true", help="predict scans again that are done already")
    window_flags(p)


def prediction(args):
    net, made, where = open_segmenter(args)
    out, jobs, failed, kept, unusable = Path(args.out or "out/predict"), [], [], 0, 0
    for named in map(Path, args.scans):
        try:
            files, labels = scans_under(named, LABELS) if named.is_dir() else ([named], [])
        except BadInput as e:
            failed.append((str(named), str(e)))
            continue
        failed += [(str(f), "looks like a label map: name the file itself") for f in labels if out.resolve() not in f.resolve().parents]
        files = [f for f in files if out.resolve() not in f.resolve().parents or f == named]  # not what an earlier call wrote
        jobs += [(f, out / (f.relative_to(named).parent if named.is_dir() and f != named else "") / (stem_of(f) or f.name)) for f in files]
    often = Counter(t for _, t in jobs)
    if len(often) < len(jobs):
        target, n = often.most_common(1)[0]
        raise BadInput(f"{n} scans would be written to one file, {target}.nii.gz: name their common folder instead")
    model = hashlib.blake2b(Path(args.ckpt).read_bytes(), digest_size=8).hexdigest()
    settings = [model, made["overlap"], args.mirror, args.modality]
    ends = [".nii.gz", *([".probabilities.nii.gz"] if args.probabilities else []), *([".png"] if args.overlay else [])]
    write_json(out / "labels.json", {"0": "background", **{str(k + 1): c for k, c in enumerate(made["classes"])}})
    for scan, target in tqdm(jobs, desc="predicting", unit="scan"):
        try:
            stamp = [*settings, *stamp_of(scan)]
            if done_already(target, stamp, ends) and not args.redo:
                kept += 1
                continue
            predict_scan(scan, target, stamp, net, made, args, where)
        except (BadInput, MemoryError, torch.OutOfMemoryError) as e:
            unusable += 1
            failed.append((str(scan), str(e) or "not enough memory"))
            tqdm.write(f"left out: {scan}: {failed[-1][1]}")
    write_table(out / "skipped.csv", ["scan", "reason"], failed)
    print(f"{len(jobs) - unusable} of {len(jobs)} scans have their label map in {out}"
          + (f" ({kept} had it already; --redo makes them anew)" if kept else "") + (f"; {len(failed)} left out, see {out / 'skipped.csv'}" if failed else ""))
    if unusable == len(jobs):
        raise BadInput(f"none of the scans could be used; the first: {failed[0][0]}: {failed[0][1]}")


def stamp_of(scan):
    """Size and time of the file, or of a folder's slices: another scan under the same name is another stamp."""
    if not scan.exists():
        raise BadInput("no such file")
    if scan.is_file() and not suffix_of(scan):
        raise BadInput(f"not a scan ({', '.join(NIFTI + SITK)})")
    files = sorted(f for f in scan.iterdir() if f.is_file()) if scan.is_dir() else [scan]
    return [len(files), sum(f.stat().st_size for f in files), max((f.stat().st_mtime_ns for f in files), default=0)]


def done_already(target, stamp, ends):
    """Whether all files of a prediction are there, made from this scan in this way. A JSON file of somebody else's is never replaced."""
    side = target.with_name(target.name + ".json")
    if not side.exists():
        return False
    notes = read_json(side, "what a prediction was made of")
    if not isinstance(notes, dict) or "stamp" not in notes:
        raise BadInput(f"{side} is not a prediction's and would be replaced; choose another --out")
    return notes["stamp"] == stamp and all(target.with_name(target.name + end).exists() for end in ends)


def predict_scan(scan, target, stamp, net, made, args, where):
    """NAME.nii.gz (labels on the scan's own grid, with its affine and header), NAME.png, and, written last, NAME.json."""
    label_file, side = (target.with_name(target.name + end) for end in (".nii.gz", ".json"))
    if label_file.exists() and label_file.resolve() == scan.resolve():
        raise BadInput(f"--out {args.out}: the label map would replace the scan; choose another folder")
    values, ras, own = read_scan(scan)
    window, lowest = made["window"], float(values.min())
    if made["mr_after"]:
        ct = args.modality == "ct" or args.modality == "auto" and lowest < -100
        window = window if ct else "percentiles"
    volume, geometry = prepare(values, ras, own, made["spacing"], window)
    logits = segment(net, made, volume, args, where)
    found = logits.argmax(0).byte().cpu().numpy()
    labels, affine = invert(found, geometry)
    save_like(scan, label_file, labels, affine)
    if args.probabilities:
        save_like(scan, target.with_name(target.name + ".probabilities.nii.gz"), shares(logits, geometry, own), affine, slope=1 / 255)
    if args.overlay:
        draw_overlay(target.with_name(target.name + ".png"), volume.astype(np.float32), None, found, made["classes"], geometry["spacing"], scan.name)
    voxel = abs(np.linalg.det(ras[:3, :3])) / 1000
    sizes = np.bincount(labels.reshape(-1), minlength=len(made["classes"]) + 1)[1:]
    write_json(side, dict(scan=str(scan), ckpt=str(args.ckpt), window=window, lowest=lowest, stamp=stamp,
                          volume_ml={c: round(float(n * voxel), 3) for c, n in zip(made["classes"], sizes)}))


def shares(logits, geometry, own):
    """Logits [K, …] on the prepared grid -> softmax in steps of 1/255 on the file's own grid: uint8 [X, Y, Z, K].

    Beyond the foreground all is background. A class at a time: K float32 volumes of a whole scan need not fit the memory.
    """
    parts = []
    logits = logits.float()
    norm = logits.logsumexp(0)
    for k, logit in enumerate(logits):
        whole = torch.full(geometry["resampled"], float(k == 0))
        whole[tuple(slice(a, b) for a, b in geometry["box"])] = (logit - norm).exp().cpu()
        whole = F.interpolate(whole[None, None], geometry["shape"], mode="trilinear")[0, 0]
        parts.append(to_own_axes((whole * 255).round().byte().numpy(), own)[0])
    return np.stack(parts, -1)


def save_like(scan, path, values, affine, slope=1):
    """uint8 values on the grid of `scan` as NIfTI, with its header (codes, units) where it is a NIfTI file."""
    header = nib.load(scan).header.copy() if scan.is_file() and suffix_of(scan) in NIFTI else None
    if header is not None and not isinstance(header, nib.Nifti1Header):
        header = None
    image = nib.Nifti1Image(values, affine, header)
    image.set_data_dtype(np.uint8)
    image.header["cal_min"], image.header["cal_max"] = 0, 0
    if header is None:
        image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, 0)  # set, so that the bytes are stored as they are
    with write_beside(path) as tmp:
        nib.save(image, tmp)


# ---------------------------------------------------------------- frozen features

RIVALS = ("random weights", "raw voxels", "position alone")  # what the checkpoint is compared with
POOLED = ("lesions", *CLS_TASKS, "phantom-cls")


def add_probe(commands):
    p = command(commands, "probe", "what frozen features know of organs, lesions and classes: kNN and linear probes")
    p.add_argument("--heads", type=int, help="of the published file's model (default width / 64)")
    p.add_argument("--layer", type=int, metavar="I", help="probe the output of block I, from 0 (default: the final norm)")
    p.add_argument("--k", type=int, default=20, help="neighbours (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the random weights")
    g = p.add_argument_group("patch tokens against organs")
    g.add_argument("--task", default="phantom", help=f"{', '.join(SEG_TASKS)}, a name of your own with --data, or none (default %(default)s)")
    g.add_argument("--data", help="folder in the Decathlon layout (default data/TASK; the phantom makes its own)")
    g.add_argument("--classes", nargs="+", help="names of labels 1, 2, … (default: the task's, else those of dataset.json)")
    g.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="(default: the task's, else percentiles)")
    g.add_argument("--spacing", nargs=3, type=float, metavar=("X", "Y", "Z"), help="mm (default: the task's)")
    g.add_argument("--roi", nargs=3, type=int, metavar=("X", "Y", "Z"), help="voxels encoded at once (default: the volume of pre-training)")
    g.add_argument("--cases", nargs=2, type=int, default=[40, 20], metavar=("TRAIN", "VAL"), help="at most (default 40 20)")
    g.add_argument("--cover", type=float, default=0.125, help="share of a patch that an organ must fill to be its label (default 1/8)")
    g = p.add_argument_group("mean of the tokens against classes")
    g.add_argument("--tasks", nargs="*", choices=POOLED, default=["lesions", "phantom-cls"], help="default: lesions phantom-cls")
    g.add_argument("--corpus", help="of serialize.py, with the lesions (default data/corpus; without one, the phantom's)")
    g.add_argument("--flavour", choices=list(FLAVOURS), default="nodule", help="of phantom-cls (default %(default)s)")
    g.add_argument("--cls-data", help="as --data of finetune_cls.py; one task then (default data/TASK)")
    g.add_argument("--cache", default="data/cache-cls", help="where resized scans are kept (default %(default)s)")


def probe(args):
    where = place(args.device, args.dtype, args.seed)
    model, was = load_encoder(args.ckpt, args.heads)
    c = model.config
    if args.layer is not None and not 0 <= args.layer < c.layers:
        raise BadInput(f"--layer {args.layer}: blocks are 0 to {c.layers - 1}")
    if args.cls_data and len([t for t in args.tasks if t != "lesions"]) != 1:
        raise BadInput(f"--cls-data {args.cls_data}: belongs to one task; name it alone in --tasks")
    if args.k < 1 or min(args.cases) < 1 or not 0 <= args.cover <= 1 or args.roi and min(args.roi) < c.patch:
        raise BadInput(f"--k {args.k} --cases {args.cases[0]} {args.cases[1]} --cover {args.cover:g} --roi {args.roi or ''}: 1 or more each, a share, and a patch of {c.patch} or more")
    edge = was.get("volume") if isinstance(was.get("volume"), int) else 64 if c.patch < 16 else 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        blank = Model(c)
    kernels = kernels_of(args, where)
    name = "checkpoint" + (f", block {args.layer}" if args.layer is not None else "")
    encoders = {name: tokens_of(model, args.layer, kernels, where), "random weights": tokens_of(blank, args.layer, kernels, where),
                "raw voxels": lambda x: voxels_of(x.to(where.device), c.patch), "position alone": partial(place_of, c.patch, c.width)}
    out = Path(args.out or Path(args.ckpt).parent / "eval-probe")
    found, shown = {}, None
    if args.task != "none":
        roi = args.roi or [edge] * 3
        train, val, classes, lost = labelled_cases(args.task, args.data, args.classes, args.window, args.spacing, args.cases, where)
        where.say(f"{args.task}: {len(train)} + {len(val)} cases, crops of up to {'x'.join(map(str, roi))}")
        scores = {n: dense_probe(e, [c[:2] for c in train], [c[:2] for c in val], len(classes) + 1, c.patch, roi, args.cover, args.k)
                  for n, e in tqdm(encoders.items(), desc="patch tokens", leave=False)}
        found[f"organs of {args.task}"] = dict(classes=["background", *classes], train=scores[name]["tokens"][0], test=scores[name]["tokens"][1],
                                               unit="patches", cases=[len(train), len(val)], skipped=lost, scores=scores)
        shown = {n: encoders[n] for n in list(encoders)[:3]}, val[:3], roi
    del encoders["position alone"]  # the same for every volume
    for task in args.tasks:
        target = lesions(args, was, c, edge, where) if task == "lesions" else classification_cases(task, args, c, where)
        title = target.pop("name")
        found[title] = pooled_probe(encoders, args.k, where, **target)
    if not found:
        raise BadInput("--task none and no --tasks: nothing to probe")
    where.say(report_probe(found))
    write_json(out / "metrics.json", dict(ckpt=str(args.ckpt), layer=args.layer, k=args.k, seed=args.seed, found=found))
    draw_probe(out / "probe.png", found)
    if shown:
        draw_pca(out / "pca.png", *shown, c.patch)
    where.say("wrote " + ", ".join(str(out / f) for f in ("metrics.json", "probe.png", *(("pca.png",) if shown else ()))))


def load_encoder(path, heads=None):
    """The encoder in `path`, and what its run was started with ({} where that is not known).

    path: a checkpoint of pretrain.py, finetune_seg.py or finetune_cls.py, or the published file.
    """
    state = load_checkpoint(path)
    if state.get("format") in (SEGMENTER, CLS_FORMAT):
        model = Model(Config(**state["config"]))
        fit(model, {k.removeprefix("encoder."): w for k, w in state["model"].items() if k.startswith("encoder.")}, path)
    else:
        model = load_pretrained(path, heads)
    beside = Path(path).parent / "args.json"
    known = "format" in state and (state.get("args") or beside.exists() and read_json(beside, "the arguments of a run"))
    return model.eval(), known or {}


def tokens_of(model, layer, kernels, where):
    """The function [B, X, Y, Z] on the host -> tokens [B, G, C] of the last layer, or of block `layer`."""
    model.to(where.device).use(kernels)

    @torch.no_grad()
    def encode(x):
        with where.autocast():
            last, hidden = model.encode(x.to(where.device))
        return (last if layer is None else hidden[layer]).float()
    return encode


def voxels_of(x, patch, side=4):
    """[B, X, Y, Z] -> the voxels of each patch, averaged down to side³: [B, G, side³]."""
    v = patchify(x, patch)
    v = F.adaptive_avg_pool3d(v.reshape(-1, 1, patch, patch, patch), min(side, patch))
    return v.reshape(len(x), -1, v[0].numel())


def place_of(patch, width, x):
    """What a token's position in the crop says by itself: the table that the model adds, [B, G, C]."""
    return positions(grid_of(x.shape[1:], patch), width).expand(len(x), -1, -1)


def lesions(args, was, config, edge, where):
    """The lesions of a corpus, each alone as it stands in a semantic sequence; patients that validate there are scored."""
    corpus = find_corpus(where, args.corpus)
    images = was.get("images") or config.images
    size, depth = edge, edge // images
    grid_of((size, size, depth), config.patch)
    rows = [r for r in read_index(corpus) if r["kind"] == "semantic"]
    types = sorted({r["group"] for r in rows})
    if len(types) < 2 or {r["split"] for r in rows} != {"train", "val"}:
        raise BadInput(f"{corpus}: {len(rows)} lesions of {len(types)} types; two types, training and validation patients are needed: "
                       "leave lesions out of --tasks, or name another --corpus")

    def load(row):
        array = open_array(str(Path(corpus) / row["file"]), tuple(row["shape"]))
        start = [int(np.clip(round(c) - size // 2, 0, max(0, n - size))) for c, n in zip(row["centre"], row["shape"])]
        crop = resize(cut(array, [*start, 0], [size, size, row["shape"][2]]), (size, size, depth))
        return to_unit(crop[None], torch.from_numpy(window_of(crop))[None, None])[0]

    people = sorted({r["patient"] for r in rows if r["split"] == "train"})
    held = set(people[::4])
    where.say(f"lesions of {corpus}: {size}x{size}x{depth}, one a volume")
    return dict(name="lesion types", items=rows, load=load, labels=[types.index(r["group"]) for r in rows], classes=types,
                split=["val" if r["split"] == "val" else "held" if r["patient"] in held else "train" for r in rows])


def classification_cases(name, args, config, where):
    """The cases of a classification task at its input size; l2 is chosen on its validation split, the test split is scored."""
    task = cls_task(name, args.flavour)
    data = cls_data(name, args.flavour, args.cls_data, where)
    cases, classes = list_cases(task, data, None, None, where)
    shape = tuple(task["nano" if config.patch < 16 else "volume"])
    grid_of(shape, config.patch)
    job = partial(prepare_whole, shape=shape, window=task["window"], cache=args.cache)
    arrays = [a for a, _, _ in parallel(job, cases, desc=f"reading {name}")]
    cases = [dict(c, array=a) for c, a in zip(cases, arrays) if a]
    where.say(f"{name}: {len(cases)} of {len(arrays)} scans of {data}, {'x'.join(map(str, shape))}")
    return dict(name=f"{name} ({args.flavour})" if name == "phantom-cls" else name, items=cases, load=lambda c: load_volume(c).float(),
                labels=[c["label"] for c in cases], classes=classes,
                split=[dict(train="train", val="held", test="val")[c["split"]] for c in cases])


def pooled_probe(encoders, k, where, items, load, labels, classes, split, batch=8):
    """kNN and linear probe on the mean of the tokens of volumes load(item) [X, Y, Z], each read once.

    split: of each item, train, held (training too, and l2 is chosen on it) or val (scored).
    """
    rows = {n: [] for n in encoders}
    for i in tqdm(range(0, len(items), batch), desc="pooled tokens", leave=False):
        x = torch.stack([load(item) for item in items[i:i + batch]])
        for n, encode in encoders.items():
            rows[n].append(encode(x).mean(1) if n != "raw voxels" else F.adaptive_avg_pool3d(x, 8).flatten(1))
    y, split = torch.tensor(labels), np.array(split)
    test = torch.from_numpy(split == "val")
    if not test.any() or not (split == "held").any() or not (split == "train").any():
        raise BadInput(f"{len(items)} volumes: none is left to fit a probe, to choose its l2, or to score it")
    held = torch.from_numpy(split[split != "val"] == "held")
    scores = {}
    for n, parts in rows.items():
        f = torch.cat(parts).cpu()                                                     # [N, F]; raw voxels: the volume at 8³
        scores[n] = probe_scores(f[~test], y[~test], held, f[test], y[test], len(classes), k)
    return dict(classes=list(classes), train=int((~test).sum()), test=int(test.sum()), unit="volumes", scores=scores)


def report_probe(found):
    """All scores as one table of text, and the recall of each class."""
    lines = [f"{'':>24}  {'k nearest neighbours':^35}  {'linear':^35}", f"{'':>24}" + f"  {'accuracy':>8} {'balanced':>8} {'F1':>8} {'AUC':>8}" * 2]
    cell = lambda v: f"{v:8.3f}" if v is not None else f"{'-':>8}"  # noqa: E731
    for target, f in found.items():
        lines.append(f"{target}: {len(f['classes'])} classes, {f['train']} {f['unit']} to fit, {f['test']} to score")
        for n, s in f["scores"].items():
            columns = [" ".join(cell(s[p][m]) for m in ("accuracy", "balanced_accuracy", "f1", "auc")) for p in ("knn", "linear")]
            lines.append("  ".join([f"{n:>24}", *columns]))
    for target, f in found.items():
        names = list(f["scores"])
        lines += [f"recall by class, linear; {target}", f"{'':>24}  " + "  ".join(f"{n:>14}" for n in names) + "   scored"]
        for i, label in enumerate(f["classes"]):
            each = [f["scores"][n]["linear"]["recall_each"][i] for n in names]
            n = f["scores"][names[0]]["linear"]["count_each"][i]
            lines.append(f"{label:>24}  " + "  ".join(f"{'-' if v is None else f'{v:.3f}':>14}" for v in each) + f"  {n:7}")
    return "\n".join(lines)


def draw_probe(path, found):
    fig, axes = figure_of((4.6 * len(found), 3.6), 1, len(found))
    for ax, (target, f) in zip(axes[0], found.items()):
        metric = "balanced_accuracy" if len(f["classes"]) > 2 else "auc"
        for i, (n, s) in enumerate(f["scores"].items()):
            values = [s[p][metric] or 0 for p in ("knn", "linear")]
            width = 0.8 / len(f["scores"])
            bars = ax.bar(np.arange(2) + (i - (len(f["scores"]) - 1) / 2) * width, values, width, label=n,
                          color={"random weights": "0.6", "raw voxels": "tab:orange", "position alone": "tab:green"}.get(n, "tab:blue"))
            ax.bar_label(bars, fmt="%.2f", fontsize=7)
        chance = 0.5 if metric == "auc" else 1 / sum(c > 0 for c in next(iter(f["scores"].values()))["knn"]["count_each"])
        ax.axhline(chance, color="k", ls=":", lw=1)
        ax.set_xticks([0, 1], ["kNN", "linear"])
        ax.set(ylim=(0, 1), ylabel=metric.replace("_", " ").replace("auc", "AUC") + " (dotted: chance)", title=f"{target}\n{f['test']} {f['unit']}")
        ax.legend(fontsize=7)
    fig.tight_layout()
    save_figure(fig, path)


def draw_pca(path, encoders, cases, roi, patch):
    """Scan, labels and the first three principal components of the tokens as red, green, blue, on one slice of each case.

    The components are those of the tokens of all these slices, so a colour means the same in every row of a column.
    """
    fig, axes = figure_of((3 * (2 + len(encoders)), 2.4 * len(cases)), len(cases), 2 + len(encoders))
    volumes, labels = ([whole_patches(c[i], patch) for c in cases] for i in (0, 1))
    slices = [int((v > 0).sum((0, 1)).argmax()) for v in labels]
    for row, v, seen, z, case in zip(axes, volumes, labels, slices, cases):
        for ax, shown in zip(row, (None, seen[:, :, z].numpy())):
            draw_slice(ax, v[:, :, z].float().numpy(), shown, 1, 0, 1)
        row[0].set_ylabel(f"{case[2]}, z = {z}")
    for column, (name, encode) in enumerate(encoders.items(), 2):
        found = [slice_tokens(encode, v, z, patch, roi) for v, z in zip(volumes, slices)]
        for row, rgb, v, (_, extent) in zip(axes, principal_colours([t for t, _ in found]), volumes, found):
            row[column].imshow(rgb.transpose(1, 0, 2), origin="lower", extent=extent, interpolation="nearest")
            row[column].set(xticks=[], yticks=[], xlim=(-0.5, v.shape[0] - 0.5), ylim=(-0.5, v.shape[1] - 0.5), facecolor="black")
    for ax, title in zip(axes[0], ("scan", "labels", *(f"tokens: {n}" for n in encoders))):
        ax.set_title(title, fontsize=10)
    fig.tight_layout()
    save_figure(fig, path)


def slice_tokens(encode, volume, z, patch, roi, steps=4):
    """Tokens of the patches that hold slice z, at the centres of patches that start a quarter of one apart: [x, y, F].

    The grid of patches is laid over the scan steps² times, moved in plane; also the extent (left, right, bottom, top) in voxels.
    """
    depth, layers = min(roi[2], volume.shape[2]) // patch, volume.shape[2] // patch
    first = min(max(0, z // patch - depth // 2), layers - depth)                       # patches along z: one box with the slice in it
    X, Y = (n - patch for n in volume.shape[:2])                                       # a move loses the last patch
    if min(X, Y) < patch:
        raise BadInput(f"a scan of {'x'.join(map(str, volume.shape))} voxels is too small for a picture of its {patch}³ patches")
    jump, fine = patch // steps, None
    for i in range(steps):
        for j in range(steps):
            part = volume[i * jump:i * jump + X, j * jump:j * jump + Y, first * patch:(first + depth) * patch]
            tokens = token_grid(encode, part, patch, roi)[:, :, z // patch - first].cpu()
            fine = tokens.new_empty(steps * tokens.shape[0], steps * tokens.shape[1], tokens.shape[2]) if fine is None else fine
            fine[i::steps, j::steps] = tokens
    low = patch / 2 - jump / 2 - 0.5
    return fine, (low, low + X, low, low + Y)


def principal_colours(grids):
    """Tokens [x, y, F] of several slices -> their first three principal components in [0, 1], NumPy [x, y, 3] each.

    From the 2nd to the 98th percentile; the sign of a component is such that its largest weight is positive.
    """
    tokens = torch.cat([g.flatten(0, 1) for g in grids]).double()
    mean = tokens.mean(0)
    axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean)).eigenvectors.flip(1)[:, :3]  # [F, 3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    low, high = np.percentile(((tokens - mean) @ axes).numpy(), [2, 98], axis=0)
    return [np.clip((((g.double() - mean) @ axes).numpy() - low) / np.maximum(high - low, 1e-12), 0, 1) for g in grids]


# ---------------------------------------------------------------- next patch

EIGHTHS = (0, 1, 2, 4, 6, 7)  # prefixes, in eighths of the sequence
SHOWN = (0, 2, 4, 6)          # those of the sheet


def add_pretrain(commands):
    p = command(commands, "pretrain", "next-patch errors by kind, prefix and position, and a sheet of completions")
    p.add_argument("--data", help="corpus of serialize.py (default: the run's; else data/corpus, else the phantom's)")
    p.add_argument("--heads", type=int, help="of the published file's model (default width / 64)")
    p.add_argument("--volume", type=int, help="edge in voxels (default: the run's; published 128)")
    p.add_argument("--stride", type=int, help="slices between the slabs of a spatial sequence (default: the run's; published 8)")
    p.add_argument("--samples", type=int, default=16, help="validation sequences of each kind (default %(default)s)")
    p.add_argument("--completions", type=int, default=2, help="sequences of each kind to complete patch after patch (default %(default)s)")
    p.add_argument("--free-running", action=argparse.BooleanOptionalAction, default=True, help="complete with predicted patches fed back too")
    p.add_argument("--seed", type=int, default=0, help="of the sequences and of the intervals")


def next_patch(args):
    where = place(args.device, args.dtype, args.seed)
    state = load_checkpoint(args.ckpt)
    if state.get("format") in (SEGMENTER, CLS_FORMAT):
        raise BadInput(f"{args.ckpt}: a fine-tuned network predicts no patches; name a checkpoint of pretrain.py")
    model, was = load_encoder(args.ckpt, args.heads)
    model = pixel_model(model, args.ckpt)
    if args.samples < 1 or not 0 <= args.completions <= args.samples:
        raise BadInput(f"--samples {args.samples} --completions {args.completions}: at least 1, and no more completions than samples")
    model.to(where.device).use(kernels_of(args, where))
    size = args.volume or was.get("volume") or 128
    corpus = find_corpus(where, args.data, was.get("data"))
    data = Sequences(corpus, "val", size, was.get("images") or model.config.images, args.stride or was.get("stride") or 8, seed=args.seed)
    G = int(np.prod(grid_of([size] * 3, model.config.patch)))
    prefixes = [G * e // 8 for e in EIGHTHS]
    where.say(f"{corpus}: {args.samples} validation sequences of each kind ({', '.join(data.kinds)}), {G} patches, stride {data.stride}")
    sets = [data[n] for n in range(args.samples * len(data.kinds))]
    errors = errors_by_prefix(model, sets, prefixes, where)                            # [N, prefixes, G]
    kinds = np.array([KINDS[s["kind"]] for s in sets])
    trivial = {k: trivial_by_prefix(model, [s for s in sets if KINDS[s["kind"]] == k], prefixes, where) for k in data.kinds}
    loss = {k: by_prefix(errors[kinds == k], trivial[k], prefixes, args.seed) for k in data.kinds}
    views, runs = completions(model, sets[:args.completions * len(data.kinds)], data, G, args.free_running, where) if args.completions else ({}, {})
    for k, per in runs.items():
        for p, found in per.items():
            loss[k][str(p)].update(found)
    where.say(report_next_patch(loss, G, args))
    out = Path(args.out or Path(args.ckpt).parent / "eval-pretrain")
    write_json(out / "metrics.json", dict(ckpt=str(args.ckpt), data=str(corpus), samples=args.samples, completions=args.completions, patches=G,
                                          seed=args.seed, loss=loss))
    write_table(out / "positions.csv", ["kind", "prefix", "position", "loss", "patch_mean", "earlier_patch"],
                [[k, p, i, *(f"{v:.6f}" for v in (errors[kinds == k][:, j, i].mean(), trivial[k]["mean"][i], trivial[k]["copy"][j][i]))]
                 for k in data.kinds for j, p in enumerate(prefixes) for i in range(p, G)])
    draw_positions(out / "positions.png", errors, kinds, trivial, loss, prefixes, data.kinds)
    if views:
        draw_completions(out / "completions.png", views, data, G)
    where.say("wrote " + ", ".join(str(out / f) for f in ("metrics.json", "positions.csv", "positions.png", "completions.png")[:4 if views else 3]))


def pixel_model(model, path):
    """`model` itself if it predicts voxels; of one that predicts codes too, a copy without them. BadInput if it predicts codes alone."""
    c = model.config
    if c.target == "pixel":
        return model
    if c.target == "vq":
        raise BadInput(f"{path}: was trained to predict codes (--target vq), and errors of voxels are measured here; "
                       "name a checkpoint of --target pixel or both")
    pixels = Model(Config(**{**asdict(c), "target": "pixel", "codes": 0, "groups": 1}))
    fit(pixels, {k: w[:c.patch ** 3] if k.startswith("head.") else w for k, w in model.state_dict().items()}, path)
    return pixels.eval()


def batches_of(sets, where, size=8):
    for i in range(0, len(sets), size):
        yield {k: v.to(where.device) for k, v in torch.utils.data.default_collate(sets[i:i + size]).items()}


@torch.no_grad()
def errors_by_prefix(model, sets, prefixes, where):
    """Squared error of each patch, the mean over its voxels, for each prefix length: float32 [N, prefixes, G], 0 before the prefix."""
    rows = []
    for b in tqdm(batches_of(sets, where), total=-(-len(sets) // 8), desc="next patch", leave=False):
        with where.autocast():
            found = [model(b["volume"], torch.full_like(b["kind"], p), b["window"], per_patch=True)[0] for p in prefixes]
        rows.append(torch.stack(found, 1).float().cpu())
    return torch.cat(rows).numpy()


@torch.no_grad()
def trivial_by_prefix(model, sets, prefixes, where):
    """What two predictors without a network reach on the targets of these sequences (of one kind), at each position.

    mean [G]: the patch's own mean, 0 once standardised. copy [prefixes, G]: the patch `distance` places earlier times a gain;
    both are fitted by least squares to the targets of the prefix length, as generous as can be; where there is none, the mean.
    """
    G = None
    for b in batches_of(sets, where, 1):
        t = standardise(model.sequence(b["volume"], b["window"])[0])[0][0]             # [G, P³]
        if G is None:
            G = len(t)
            back = torch.arange(G, device=t.device)[:, None] - torch.arange(G, device=t.device)  # row i, distance d: patch i − d
            there = (back >= 0).double()
            product, earlier, square = (torch.zeros(s, dtype=torch.float64, device=t.device) for s in ((G, G), (G, G), G))
        gram = (t @ t.T).double() / t.shape[1]                                         # [G, G]
        product += gram.gather(1, back.clamp(min=0)) * there                           # of target i and the patch d before it
        earlier += gram.diagonal()[back.clamp(min=0)] * there                          # squares of that patch
        square += gram.diagonal()
    product, earlier, square = (s.cpu().numpy() / len(sets) for s in (product, earlier, square))
    out = dict(mean=square, copy=[], distance=[])
    for p in prefixes:
        a, e = product[p:].sum(0), earlier[p:].sum(0)
        gain = np.maximum(a, 0) / np.maximum(e, 1e-12)
        saved = gain * np.maximum(a, 0)
        saved[0] = -1                                                                  # distance 0 is the patch itself
        d = int(saved.argmax())
        out["copy"].append(square - 2 * gain[d] * product[:, d] + gain[d] ** 2 * earlier[:, d])
        out["distance"].append(d)
    return out


def by_prefix(errors, trivial, prefixes, seed, times=1000):
    """Loss at each prefix length from errors [N, prefixes, G], with 95 % percentile intervals over resampled sequences."""
    out, pick = {}, np.random.default_rng([seed, 6]).integers(len(errors), size=(times, len(errors)))
    for j, p in enumerate(prefixes):
        each = errors[:, j, p:].mean(1, dtype=np.float64)                              # a sequence's own; all have G − p targets
        low, high = np.percentile(each[pick].mean(1), [2.5, 97.5])
        out[str(p)] = dict(loss=float(each.mean()), low=float(low), high=float(high), patch_mean=float(trivial["mean"][p:].mean()),
                           earlier_patch=float(trivial["copy"][j][p:].mean()), distance=trivial["distance"][j])
    return out


@torch.no_grad()
def complete(model, patches, prefix, grid, order=None):
    """Patches from `prefix` on, predicted one after the other and each fed back: standardised predictions [B, G, P³] (0 before).

    patches [B, G, P³] in [0, 1], in the order of the sequence. The target is a standardised patch, so the network says nothing of
    its brightness: to be fed back, a prediction gets the mean and the scale of the true patch. What is completed is the detail.
    Keys and values are kept: a later token changes nothing of what an earlier one computed, so a patch costs one token.
    """
    _, mean, scale = standardise(patches)
    (B, G, _), C, H = patches.shape, model.config.width, model.config.heads
    table = positions(grid, C, patches.device)
    table = table if order is None else table[order]
    kept, pred = [None] * model.config.layers, torch.zeros_like(patches)
    x = model.tokens(patches[:, :prefix], grid, order)                                 # [B, 1 + prefix, C], all visible to all
    for i in range(prefix, G):
        for n, block in enumerate(model.blocks):
            N = x.shape[1]
            q, k, v = block.qkv(block.norm1(x)).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
            if kept[n] is None:
                kept[n] = torch.empty(2, B, H, G, C // H, device=x.device, dtype=x.dtype)
            kept[n][:, :, :, i + 1 - N:i + 1] = torch.stack([k, v])
            seen = F.scaled_dot_product_attention(q, *kept[n][:, :, :, :i + 1])
            x = x + block.proj(seen.transpose(1, 2).reshape(B, N, C))
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        pred[:, i] = model.head(model.norm(x[:, -1]))
        fed = (pred[:, i] * scale[:, i] + mean[:, i]).clamp(0, 1)
        x = (model.embed(fed) + table[i])[:, None]
    return pred


@torch.no_grad()
def completions(model, sets, data, G, free_running, where):
    """Sequences completed from several prefixes, in float32: the views of one of each kind, and {kind: {prefix: errors}} of all.

    views: {kind: {row: [volume [X, Y, Z] a prefix]}}, the row "given" marking what the prefix gives; and one volume each
    under "truth" and "mean" (each patch's own).
    """
    b = next(batches_of(sets, where, len(sets)))
    patches, grid, order = model.sequence(b["volume"], b["window"])
    target, mean, scale = standardise(patches)
    back = None if order is None else torch.argsort(order)
    volume = lambda v: unpatchify(v if back is None else v[:, back], grid).clamp(0, 1).cpu()  # noqa: E731
    kinds, kind_of = len(data.kinds), b["kind"].tolist()
    views = {k: {"truth": v, "mean": m} for k, v, m in zip(data.kinds, volume(patches), volume(mean.expand_as(patches)))}
    runs, start = defaultdict(lambda: defaultdict(dict)), time.perf_counter()
    for e in tqdm(SHOWN, desc="completing", leave=False):
        p = G * e // 8
        rows = {"teacher_forced": model(b["volume"], torch.full_like(b["kind"], p), b["window"])[1].float()}
        if free_running:
            rows["free_running"] = complete(model, patches, p, grid, order)
        given = volume((torch.arange(G, device=patches.device) < p).float()[None, :, None].expand_as(patches[:1]))[0]
        for k in data.kinds:
            views[k].setdefault("given", []).append(given)
        for name, pred in rows.items():
            filled = volume(torch.cat([patches[:, :p], (pred * scale + mean)[:, p:]], 1))
            errors = (pred - target)[:, p:].square().mean((1, 2)).tolist()
            for k in range(kinds):
                views[data.kinds[k]].setdefault(name, []).append(filled[k])
                runs[data.kinds[k]][p][name] = float(np.mean([x for x, of in zip(errors, kind_of) if KINDS[of] == data.kinds[k]]))
    where.say(f"completed {len(sets)} sequences from {len(SHOWN)} prefixes in {time.perf_counter() - start:.0f} s")
    return views, runs


def report_next_patch(loss, G, args):
    free = any("free_running" in v for per in loss.values() for v in per.values())
    lines = [f"{'':>10}  prefix   loss [95 % interval]    patch mean  earlier patch     loss / patch mean"
             + (f"   of {args.completions}: teacher-forced  free-running" if free else "")]
    for k, per in loss.items():
        for p, v in per.items():
            lines.append(f"{k:>10}  {p:>6}  {v['loss']:6.3f} [{v['low']:.3f}, {v['high']:.3f}]  {v['patch_mean']:10.3f}  {v['earlier_patch']:6.3f} "
                         f"({v['distance']:3} back)  {v['loss'] / max(v['patch_mean'], 1e-12):15.3f}"
                         + (f"  {v['teacher_forced']:19.3f}  {v['free_running']:12.3f}" if "free_running" in v else ""))
    return "\n".join(lines)


def draw_positions(path, errors, kinds, trivial, loss, prefixes, names):
    """By kind: error against position, a line a prefix, in 32 bins; and in the last panel the loss against the prefix."""
    fig, axes = figure_of((4.6 * (len(names) + 1), 3.8), 1, len(names) + 1)
    G = errors.shape[2]
    import matplotlib.pyplot as plt
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(prefixes)))
    bins = np.linspace(0, G, min(32, G) + 1).astype(int)

    def line(ax, values, p, **style):
        at = [(a, b) for a, b in zip(np.maximum(bins[:-1], p), bins[1:]) if b > a]
        ax.plot([(a + b) / 2 for a, b in at], [values[a:b].mean() for a, b in at], **style)

    for ax, k in zip(axes[0], names):
        for j, p in enumerate(prefixes):
            line(ax, errors[kinds == k][:, j].mean(0), p, color=shades[j], lw=1.3, label=f"prefix {p}")
        line(ax, trivial[k]["mean"], 0, color="k", ls="--", lw=1, label="the patch mean")
        line(ax, trivial[k]["copy"][0], 0, color="tab:red", ls=":", lw=1.3, label=f"an earlier patch ({trivial[k]['distance'][0]} back)")
        ax.set(title=k, xlabel="position in the sequence", ylabel="mean squared error of standardised patches", ylim=(0, None))
        ax.legend(fontsize=6.5)
    for k, colour in zip(names, ("tab:blue", "tab:orange", "tab:green")):
        v = list(loss[k].values())
        ax = axes[0, -1]
        ax.errorbar(prefixes, [x["loss"] for x in v], [[x["loss"] - x["low"] for x in v], [x["high"] - x["loss"] for x in v]], color=colour,
                    marker="o", ms=3, capsize=2, label=k)
        ax.plot(prefixes, [x["patch_mean"] for x in v], color=colour, ls="--", lw=1)
        ax.plot(prefixes, [x["earlier_patch"] for x in v], color=colour, ls=":", lw=1)
    axes[0, -1].set(title="over all targets", xlabel="prefix, patches", ylim=(0, None))
    axes[0, -1].legend(fontsize=7, title="dashed: patch mean, dotted: earlier patch", title_fontsize=6.5)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save_figure(fig, path)


def draw_completions(path, views, data, G):
    """The middle slice of each sub-image; what was predicted has the mean and scale of the true patches. Lines: where the given part ends."""
    rows = [(k, r) for k, v in views.items() for r in ("teacher_forced", "free_running") if r in v]
    fig, axes = figure_of((3.1 * (2 + len(SHOWN)), 1.05 * len(rows) + 0.6), len(rows), 2 + len(SHOWN))
    middle = [s * data.depth + data.depth // 2 for s in range(data.images)]
    strip = lambda v: torch.cat([v[:, :, z] for z in middle]).T  # noqa: E731
    for axs, (k, r) in zip(axes, rows):
        for ax, v in zip(axs, (views[k]["truth"], views[k]["mean"], *views[k][r])):
            ax.imshow(strip(v), cmap="gray", origin="lower", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        for ax, given in zip(axs[2:], views[k]["given"]):
            if given.any():
                ax.contour(strip(given), [0.5], colors="tab:cyan", linewidths=1)
        axs[0].set_ylabel(f"{k}\n{r.replace('_', '-')}", fontsize=7)
    for ax, title in zip(axes[0], ("truth", "each patch's mean alone", *(f"prefix {G * e // 8} of {G}" for e in SHOWN))):
        ax.set_title(title, fontsize=8)
    fig.suptitle("teacher-forced: each patch from the true ones before it; free-running: from predicted ones. "
                 "The mean and the scale of each patch are given.", fontsize=8)
    fig.tight_layout()
    save_figure(fig, path)


# ---------------------------------------------------------------- table

# The paper's figures for a task, at all labels, by initialisation. None: nobody has read the cell here; never filled by guess.
PAPER = {task: {"metric": metric, "scratch": None, "pre-trained": None}
         for metric, tasks in (("Dice", [t for t in SEG_TASKS if t != "phantom"]), ("AUC", ("nodule", "ricord"))) for task in tasks}
ASIDE = set("""out resume cache device dtype workers micro compile log_every save_every stop_after bench seed seeds init labels task flavour
    heads bootstrap freeze kernels windows""".split())  # settings in which runs of one cell of the table may differ
RESAMPLED = 2000  # bootstrap samples of a paired test


def add_table(commands):
    text = "all fine-tuning runs by task, initialisation and share of the labels: mean ± sd, paired tests, as Markdown, CSV and PNG"
    p = commands.add_parser("table", help=text, description=text)
    p.add_argument("runs", nargs="*", default=["out"], metavar="DIR", help="folders of runs, or folders of such folders (default out)")
    p.add_argument("--out", default="out/table", help="folder of the table (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def table(args):
    runs, unusable = find_runs(args.runs)
    if not runs:
        raise BadInput("\n".join([f"{' '.join(args.runs)}: no finished fine-tuning run (args.json with a task, metrics.json) there or one level below",
                                  *(f"  {f}: {why}" for f, why in unusable)]))
    cells = {}
    for r in runs:
        cells.setdefault((r["task"], r["labels"], r["init"], r["metric"]), []).append(r)
    cells = dict(sorted(cells.items(), key=lambda c: (c[0][0], c[0][1], c[0][2] != "scratch", c[0][2])))
    rows = [summarise_cell(*key[:3], of) for key, of in cells.items()]
    tests = [paired_test(cells[a], cells[b], a, b, args.seed) for a, b in combinations(cells, 2) if (*a[:2], a[3]) == (*b[:2], b[3])]
    text = markdown(rows, tests, cells, unusable)
    print(text)
    out = Path(args.out)
    with write_beside(out / "table.md") as tmp:
        tmp.write_text(text + "\n")
    write_table(out / "table.csv", ["task", "labels", "initialisation", "metric", "runs", "seeds", "mean", "sd", "paper", "values", "folders"],
                [[r["task"], r["labels"], r["init"], r["metric"], len(r["values"]), " ".join(map(str, r["seeds"])), r["mean"], r["sd"], r["paper"],
                  " ".join(f"{v:.6f}" for v in r["values"]), " ".join(r["folders"])] for r in rows])
    columns = ["task", "labels", "a", "b", "difference", "low", "high", "p", "test", "n"]
    write_table(out / "tests.csv", [*columns, "seeds"], [[*(t[c] for c in columns), " ".join(map(str, t["seeds"]))] for t in tests])
    draw_table(out / "table.png", rows)
    print("\nwrote " + ", ".join(str(out / f) for f in ("table.md", "table.csv", "tests.csv", "table.png")))


def find_runs(folders):
    """The finished fine-tuning runs in `folders` and one and two levels below, and (folder, why) of those that cannot be used.

    A run is a folder with an args.json that names a task. What is in seed-N folders counts there, not in the summary above
    them; earlier-N folders are runs that a later one replaced.
    """
    found, runs, unusable = {}, [], []
    for f in map(Path, folders):
        if not f.exists():
            raise BadInput(f"{f}: no such folder; runs of finetune_seg.py and finetune_cls.py are wanted")
        for pattern in ("args.json", "*/args.json", "*/seed-*/args.json"):
            for a in sorted(f.glob(pattern)) if f.is_dir() else ():
                if not a.parent.name.startswith("earlier-"):
                    found[a.parent.resolve()] = a.parent
    for resolved, folder in found.items():
        if any(other.parent == resolved and other.name.startswith("seed-") for other in found):
            continue
        try:
            args = read_json(folder / "args.json", "the arguments of a run")
            if not isinstance(args, dict) or "task" not in args or "init" not in args:     # pre-training, or not ours
                continue
            runs.append(read_run(folder, args))
        except BadInput as e:
            unusable.append((str(folder), str(e).removeprefix(f"{folder}/")))
    by_name = defaultdict(set)
    for r in runs:
        by_name[r["init"]].add(r["from"])
    for r in runs:  # two checkpoints in folders of one name: their paths tell them apart
        r["init"] = r["init"] if len(by_name[r["init"]]) == 1 else r["from"]
    for r in runs:
        r["init"] += ", frozen" if r["args"].get("freeze") else ""
    return runs, unusable


def read_run(folder, args):
    """One run: task, labels, init, seed, metric, value; and what tests pair by, or None: cases {id: Dice} or scores {file: …}."""
    if not (folder / "metrics.json").exists():
        rows = [r for r in (folder / "log.jsonl").read_text().splitlines() if r.strip()] if (folder / "log.jsonl").exists() else []
        raise BadInput(f"unfinished: no metrics.json, {len(rows)} lines in log.jsonl")
    m = read_json(folder / "metrics.json", "the metrics of a run")
    try:
        if "mean_dice" in m:
            metric, value, per_class = "Dice", m["mean_dice"], m.get("dice") or {}
            seed, cases = args["seed"], {k: mean_defined(v) for k, v in (m.get("cases") or {}).items()}
        else:
            metric, value, seed, per_class = "AUC", m["test"]["auc"]["value"], m["seed"], {}
            cases = read_scores(folder / "scores.csv")
        if value is None or np.isnan(value):
            raise BadInput(f"its {metric} is undefined")
        flavour = f" ({args['flavour']})" if args["task"] == "phantom-cls" else ""
        return dict(folder=str(folder), task=args["task"] + flavour, labels=float(args["labels"]), **origin(args["init"]), seed=int(seed),
                    metric=metric, value=float(value), per_class=per_class, cases=cases or None, args=args)
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"metrics.json or args.json is not as finetune_seg.py and finetune_cls.py write it ({type(e).__name__}: {e})") from None


def origin(init):
    """--init -> its name in the table, and what it stands for: scratch, the folder of ckpt.pt or best.pt, or the file's name."""
    if init in (None, "scratch"):
        return {"init": "scratch", "from": "scratch"}
    path = Path(init)
    name = {"ckpt.pt": path.parent.name, "best.pt": f"best of {path.parent.name}"}.get(path.name, path.name)
    return {"init": name, "from": str(path.resolve() if path.exists() else path)}


def mean_defined(values):
    """Mean of what is not None (a case's Dice of the classes that it has); None if nothing is left."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def read_scores(path):
    """Test cases of a scores.csv: {file: (patient, label, probabilities)}; {} where there is no such file."""
    if not path.exists():
        return {}
    with open(path, newline="") as f:
        return {r["file"]: (r["patient"], int(r["label"]), [float(v) for k, v in r.items() if k.startswith("p_")])
                for r in csv.DictReader(f) if r["split"] == "test"}


def summarise_cell(task, labels, init, runs):
    values = [r["value"] for r in runs]
    paper = PAPER.get(task, {}).get("scratch" if init == "scratch" else "pre-trained") if labels == 1 and not init.endswith("frozen") else None
    settings = sorted({k for r in runs for k in r["args"] if k not in ASIDE and len({json.dumps(s["args"].get(k)) for s in runs}) > 1})
    return dict(task=task, labels=labels, init=init, metric=runs[0]["metric"], values=values, seeds=[r["seed"] for r in runs],
                mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)) if len(values) > 1 else None, paper=paper,
                folders=[r["folder"] for r in runs], differs=settings, twice=len({r["seed"] for r in runs}) < len(runs))


def paired_test(a_runs, b_runs, a, b, seed):
    """B − A of two initialisations at one task and label share, over the seeds that both have.

    Segmentation: Wilcoxon's signed-rank test over cases, each a mean over the seeds. Classification: bootstrap over test patients
    of the difference of the AUC's mean over the seeds, p = 2 · the smaller tail. Where runs share no cases: t-test over the seeds.
    """
    seeds = sorted({r["seed"] for r in a_runs} & {r["seed"] for r in b_runs})
    row = dict(task=a[0], labels=a[1], a=a[2], b=b[2], seeds=seeds, difference=None, low=None, high=None, p=None, n=0, test="no seed in common")
    if not seeds:
        return row
    pick = lambda runs: [r for r in runs if r["seed"] in seeds]  # noqa: E731
    per_seed = [np.array([np.mean([r["value"] for r in runs if r["seed"] == s]) for s in seeds]) for runs in (a_runs, b_runs)]
    row["difference"] = float((per_seed[1] - per_seed[0]).mean())
    chosen = pick(a_runs), pick(b_runs)
    known = [r["cases"] or {} for runs in chosen for r in runs]
    shared = sorted(set.intersection(*(set(c) for c in known)))
    if shared and all(len(c) == len(shared) for c in known):
        if a_runs[0]["metric"] == "Dice":
            return {**row, **over_cases(*chosen, shared)}
        if all(c[f][:2] == known[0][f][:2] for c in known for f in shared):
            return {**row, **over_patients(*chosen, shared, seed)}
    if len(seeds) > 1:
        from scipy.stats import ttest_rel
        p = float(ttest_rel(*per_seed[::-1]).pvalue)
        return {**row, "test": "paired t, seeds", "n": len(seeds), "p": None if np.isnan(p) else p}
    return {**row, "test": "one seed, no cases in common"}


def over_cases(a_runs, b_runs, cases):
    """Wilcoxon's signed-rank test of the cases' Dice (exact for few cases without ties, as SciPy chooses)."""
    from scipy.stats import wilcoxon
    means = [np.array([[np.nan if r["cases"][c] is None else r["cases"][c] for c in cases] for r in runs]).mean(0) for runs in (a_runs, b_runs)]
    d = means[1] - means[0]
    d = d[~np.isnan(d)]
    return dict(test="Wilcoxon, cases", n=len(d), p=float(wilcoxon(d).pvalue) if d.any() else None)


def macro_auc(labels, probs):
    """AUC of class 1, or of more than two the mean of each against the rest; None if undefined."""
    return mean_of(auc(labels == c, probs[:, c]) for c in ([1] if probs.shape[1] == 2 else range(probs.shape[1])))


def over_patients(a_runs, b_runs, files, seed):
    """Paired bootstrap of the AUC's difference over test patients, with all of their cases: 95 % interval and p."""
    first = a_runs[0]["cases"]
    labels = np.array([first[f][1] for f in files])
    _, who = np.unique([first[f][0] for f in files], return_inverse=True)
    members = [np.flatnonzero(who == p) for p in range(who.max() + 1)]
    probs = [[np.array([r["cases"][f][2] for f in files]) for r in runs] for runs in (a_runs, b_runs)]
    rng, drawn = np.random.default_rng([seed, 7]), []
    for _ in range(RESAMPLED):
        at = np.concatenate([members[p] for p in rng.integers(len(members), size=len(members))])
        a, b = (mean_of(macro_auc(labels[at], p[at]) for p in runs) for runs in probs)
        if a is not None:
            drawn.append(b - a)
    if len(drawn) < RESAMPLED / 2:
        return dict(test="bootstrap, patients (AUC undefined)", n=len(members))
    drawn = np.array(drawn)
    low, high = np.percentile(drawn, [2.5, 97.5])
    tail = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return dict(test="bootstrap, patients", n=len(members), low=float(low), high=float(high), p=float(min(1, 2 * (tail + 1) / (len(drawn) + 1))))


def markdown(rows, tests, cells, unusable):
    share = lambda s: f"{100 * s:g} %"  # noqa: E731
    lines = ["| task | labels | initialisation | metric | runs | mean ± sd | paper |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        paper = "" if r["paper"] is None else f"{r['paper']:.3f}"
        lines.append(f"| {r['task']} | {share(r['labels'])} | {r['init']} | {r['metric']} | {len(r['values'])} | {r['mean']:.3f}"
                     + (f" ± {r['sd']:.3f}" if r["sd"] is not None else "") + f" | {paper} |")
    lines += ["", "Dice: mean over classes of validation cases, with the weights of a run's last step. AUC: of the test split. sd: of the runs' "
              "values (n − 1). The paper's cells are empty where nobody has entered what it reports."]
    if tests:
        lines += ["", "| task | labels | A | B | B − A | p | test (n) | seeds in both |", "|---|---|---|---|---|---|---|---|"]
        for t in tests:
            difference = "" if t["difference"] is None else f"{t['difference']:+.3f}"
            difference += f" [{t['low']:+.3f}, {t['high']:+.3f}]" if t["low"] is not None else ""
            p, seeds = "" if t["p"] is None else f"{t['p']:.3g}", " ".join(map(str, t["seeds"]))
            lines.append(f"| {t['task']} | {share(t['labels'])} | {t['a']} | {t['b']} | {difference} | {p} | {t['test']} ({t['n']}) | {seeds} |")
        lines += ["", "p: two-sided, not corrected for the number of tests. Over cases or patients it says whether the difference would hold for "
                  "others of them, with these trained networks; only more seeds say whether it would hold for another training."]
    lines += class_tables(cells)
    named = [(f"- {r['task']}, {share(r['labels'])}, {r['init']}", r) for r in rows]
    notes = [f"{name}: these runs differ in {', '.join(r['differs'])}" for name, r in named if r["differs"]]
    notes += [f"{name}: more than one run of a seed ({', '.join(r['folders'])})" for name, r in named if r["twice"]]
    notes += [f"- not in the table: {f}: {why}" for f, why in unusable]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def class_tables(cells):
    """Dice of each class, a table a task: Markdown lines."""
    lines = []
    for task in dict.fromkeys(k[0] for k, runs in cells.items() if any(r["per_class"] for r in runs)):
        columns = {k: v for k, v in cells.items() if k[0] == task and k[3] == "Dice"}
        heads = " | ".join(f"{init}, {100 * labels:g} %" for _, labels, init, _ in columns)
        lines += ["", f"| {task}, Dice | {heads} |", "|---|" + "---|" * len(columns)]
        for name in dict.fromkeys(c for runs in columns.values() for r in runs for c in r["per_class"]):
            values = [[v for v in (r["per_class"].get(name) for r in runs) if v is not None] for runs in columns.values()]
            texts = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") if v else "" for v in values]
            lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def draw_table(path, rows):
    """A panel a task: bars by label share, coloured by initialisation, a dot a run; dashes: the paper's, where it was entered."""
    tasks, inits = list(dict.fromkeys(r["task"] for r in rows)), sorted({r["init"] for r in rows}, key=lambda i: (i != "scratch", i))
    colour = {init: "0.6" if init == "scratch" else f"C{n % 10}" for n, init in enumerate(inits)}
    columns = min(4, len(tasks))
    fig, axes = figure_of((4.2 * columns, 3.6 * -(-len(tasks) // columns)), -(-len(tasks) // columns), columns)
    for ax in axes.flat[len(tasks):]:
        ax.axis("off")
    for ax, task in zip(axes.flat, tasks):
        mine = [r for r in rows if r["task"] == task]
        shares = sorted({r["labels"] for r in mine})
        here = [i for i in inits if any(r["init"] == i for r in mine)]
        width = 0.8 / len(here)
        for r in mine:
            at = shares.index(r["labels"]) + (here.index(r["init"]) - (len(here) - 1) / 2) * width
            ax.bar(at, r["mean"], width * 0.92, color=colour[r["init"]], alpha=0.7, yerr=r["sd"], capsize=4)
            n = len(r["values"])
            ax.plot(at + np.linspace(-0.15, 0.15, n) * width * (n > 1), r["values"], "k.", ms=5)
            if r["paper"] is not None:
                ax.plot([at - width / 2, at + width / 2], [r["paper"]] * 2, "k--", lw=1)
        ax.set_xticks(range(len(shares)), [f"{100 * s:g} %" for s in shares])
        ax.set(title=task, xlabel="share of the labels", ylabel=mine[0]["metric"], ylim=(0, 1), xlim=(-0.5, len(shares) - 0.5))
        ax.grid(alpha=0.3, axis="y")
    from matplotlib.patches import Patch
    fig.tight_layout()
    fig.legend(handles=[Patch(color=colour[i], label=i) for i in inits], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    save_figure(fig, path)


# ---------------------------------------------------------------- main


def command(commands, name, help, **defaults):
    """A sub-parser with what all of them take."""
    p = commands.add_parser(name, help=help, description=help)
    p.add_argument("--ckpt", required="ckpt" not in defaults, help="checkpoint of the network")
    p.add_argument("--out", help="folder of the results (default: beside the checkpoint; out/predict, out/table)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the matrix products")
    p.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto", help="auto: Triton's (kernels/) on CUDA, else PyTorch")
    return p


def kernels_of(args, where):
    """torch or triton, and aloud why."""
    kernels, why = choose(args.kernels, where.device)
    where.say(f"--kernels {args.kernels}: {kernels} ({why})")
    return kernels


def window_flags(p):
    p.add_argument("--overlap", type=float, help="of the sliding windows (default: the checkpoint's; published 0.75)")
    p.add_argument("--windows", type=int, default=4, help="windows a forward pass (default %(default)s)")
    p.add_argument("--mirror", action="store_true", help="average the predictions of all eight mirror images")


COMMANDS = {"seg": (add_seg, segmentation), "cls": (add_cls, classification), "predict": (add_predict, prediction), "probe": (add_probe, probe),
            "pretrain": (add_pretrain, next_patch), "table": (add_table, table)}
FITS = {SEGMENTER: "seg", CLS_FORMAT: "cls", FORMAT: "pretrain"}  # the sub-command for each format of checkpoint


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for add, _ in COMMANDS.values():
        add(commands)
    words = sys.argv[1:]
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--ckpt")
    ckpt = named.parse_known_args(words)[0].ckpt
    if ckpt and not set(words) & set(COMMANDS):  # no sub-command: the one that fits
        kind = load_checkpoint(ckpt).get("format")
        if kind not in FITS:
            raise BadInput(f"--ckpt {ckpt}: format {kind!r} says no sub-command; name one of {', '.join(COMMANDS)}")
        words = [FITS[kind], *words]
    args = p.parse_args(words)
    COMMANDS[args.command][1](args)


if __name__ == "__main__":
    cli(main)
