"""Evaluation: scores of segmenters and classifiers, label maps of new scans, frozen features, next-patch errors, the table.

    python eval.py seg --ckpt out/seg-phantom/best.pt --grid both    # Dice, surface Dice, HD95, volumes: 1 minute on two cores
    python eval.py cls --ckpt out/cls-nodule-phantom/best.pt         # AUC and the rest, with intervals
    python eval.py predict --ckpt out/seg-amos/best.pt SCAN… --out out/predict       # label maps on the scans' own grids
    python eval.py seg --bench                                       # time to score a 512 x 512 x 200 case of 16 classes
    python eval.py --ckpt FILE                                       # the sub-command that fits the checkpoint

Surface scores (seg). The surface of a mask is its voxels with a face neighbour outside of it (or of the volume); distances are
between voxel centres, in mm, as in MONAI's `compute_hausdorff_distance` and `compute_surface_dice`. HD95: the larger of the two
directed 95th percentiles (linear interpolation). Surface Dice (NSD, Nikolov et al. 2018): the share of both surfaces together
that lies within the tolerance of the other; surface voxels count alike, where Nikolov's weigh by area.
Empty classes: absent in truth and prediction, a case is left out; absent in one of them, Dice and surface Dice are 0 and HD95
is undefined (left out, and counted as missed). Volume errors are prediction − truth.

Sections: surface scores · segmentation · classification · prediction · main

X Y Z voxels, K classes with the background, N cases.
"""
import argparse
import hashlib
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import cKDTree
from tqdm import tqdm

from common import (BadInput, cli, cores, decide, draw_confusion, draw_overlay, draw_roc, draw_slice, figure_of, label_legend, load_checkpoint,
                    parallel, place, read_json, save_figure, text_of, thresholds_of, with_intervals, write_beside, write_json, write_table)
from model import CLS_FORMAT, FORMAT, SEGMENTER, Classifier, Config, Model, fit, load_segmenter, overlap_counts, sliding_window
from serialize import (LABELS, NIFTI, SEG_TASKS, SITK, cls_data, cls_task, find_cases, invert, list_cases, load_volume, nearest, prepare,
                       prepare_whole, read_case, read_scan, scans_under, smooth, stem_of, suffix_of, to_own_axes, uncut, window_of_case)

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


def score_case(found, truth, spacing, tolerances):
    """SCORES of each class but the background: float64 [K − 1, 4].

    found, truth: integers [X, Y, Z] on one grid; spacing: mm of its voxels; tolerances: mm, [K − 1]. Each class is looked at in
    the box around it alone, which holds both surfaces, so that the size of the volume hardly matters.
    """
    K, spacing = len(tolerances) + 1, np.asarray(spacing, float)
    both, n_found, n_truth = overlap_counts(torch.from_numpy(found), torch.from_numpy(truth), K)[1:].double().numpy().T
    scores = np.full((K - 1, len(SCORES)), np.nan)
    present = (n_found + n_truth) > 0
    scores[present, 0] = 2 * both[present] / (n_found + n_truth)[present]
    scores[present, 1] = 0
    scores[present, 3] = (n_found - n_truth)[present] * spacing.prod() / 1000
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
    cases, classes = find_cases(task, data, None if task in SEG_TASKS else made["classes"], where)
    if len(classes) != len(made["classes"]):
        raise BadInput(f"--task {task}: {len(classes)} classes ({', '.join(classes[:4])} …), and {args.ckpt} knows {len(made['classes'])}")
    cases = [c for c in cases if args.split in ("all", c["split"])]
    tolerances = args.tolerance * len(classes) if len(args.tolerance) == 1 else args.tolerance
    if len(tolerances) != len(classes) or min(tolerances) < 0:
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
    made["overlap"] = made["overlap"] if args.overlap is None else args.overlap
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
        scores["own"] = score_case(back, truth, nib.affines.voxel_sizes(ras), tolerances)
    if "resampled" in grids:  # what the cut to the foreground leaves out of the truth counts as missed
        scores["resampled"] = score_case(found, nearest(truth, geometry["resampled"]), geometry["spacing"], tolerances)
    seen = nearest(truth, geometry["resampled"])
    areas = (seen > 0).sum((0, 1))
    z = int(areas.argmax())
    low, high = geometry["box"][2]
    image = np.zeros(geometry["resampled"][:2], np.float32)
    if low <= z < high:
        image[tuple(slice(a, b) for a, b in geometry["box"][:2])] = volume[:, :, z - low]
    views = dict(image=image, truth=seen[:, :, z], found=found[:, :, z], z=z, spacing=geometry["spacing"])
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
    draw_roc(out / "roc.png", {"val": scored["val"][1:], "test": (labels, probs)}, thresholds, found, classes)
    draw_confusion(out / "confusion.png", labels, probs, thresholds, classes)
    write_json(out / "metrics.json", dict(task=name, data=str(data), split=args.split, ckpt=str(args.ckpt), cases=len(cases), skipped=len(skipped),
               classes=classes, thresholds=thresholds, test=found))
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
    out, jobs = Path(args.out or "out/predict"), []
    for named in map(Path, args.scans):
        files = scans_under(named, LABELS)[0] if named.is_dir() else [named]
        jobs += [(f, out / (f.relative_to(named).parent if named.is_dir() and f != named else "") / (stem_of(f) or f.name)) for f in files]
    often = Counter(t for _, t in jobs)
    if len(often) < len(jobs):
        target, n = often.most_common(1)[0]
        raise BadInput(f"{n} scans would be written to one file, {target}.nii.gz: name their common folder instead")
    model = hashlib.blake2b(Path(args.ckpt).read_bytes(), digest_size=8).hexdigest()
    settings = [model, made["overlap"], args.mirror, args.modality, args.probabilities]
    write_json(out / "labels.json", {"0": "background", **{str(k + 1): c for k, c in enumerate(made["classes"])}})
    failed, kept = [], 0
    for scan, target in tqdm(jobs, desc="predicting", unit="scan"):
        try:
            stamp = [*settings, *stamp_of(scan)]
            if not args.redo and done_already(target, stamp):
                kept += 1
                continue
            predict_scan(scan, target, stamp, net, made, args, where)
        except BadInput as e:
            failed.append((str(scan), str(e)))
            tqdm.write(f"left out: {scan}: {e}")
    write_table(out / "skipped.csv", ["scan", "reason"], failed)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} scans have their label map in {out}"
          + (f" ({kept} had it already; --redo makes them anew)" if kept else "") + (f"; {len(failed)} left out, see {out / 'skipped.csv'}" if failed else ""))
    if len(failed) == len(jobs):
        raise BadInput(f"none of the scans could be used; the first: {failed[0][0]}: {failed[0][1]}")


def stamp_of(scan):
    """Size and time of the file, or of a folder's slices: another scan under the same name is another stamp."""
    if not scan.exists():
        raise BadInput("no such file")
    if scan.is_file() and not suffix_of(scan):
        raise BadInput(f"not a scan ({', '.join(NIFTI + SITK)})")
    files = sorted(f for f in scan.iterdir() if f.is_file()) if scan.is_dir() else [scan]
    return [len(files), sum(f.stat().st_size for f in files), max((f.stat().st_mtime_ns for f in files), default=0)]


def done_already(target, stamp):
    side = target.with_name(target.name + ".json")
    return side.exists() and target.with_name(target.name + ".nii.gz").exists() and read_json(side, "what a prediction was made of")["stamp"] == stamp


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
    voxel = float(np.prod(nib.affines.voxel_sizes(ras))) / 1000
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
        whole = torch.nn.functional.interpolate(whole[None, None], geometry["shape"], mode="trilinear")[0, 0]
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


# ---------------------------------------------------------------- main


def command(commands, name, help, **defaults):
    """A sub-parser with what all of them take."""
    p = commands.add_parser(name, help=help, description=help)
    p.add_argument("--ckpt", required="ckpt" not in defaults, help="checkpoint of the network")
    p.add_argument("--out", help="folder of the results (default: beside the checkpoint; out/predict, out/table)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the matrix products")
    return p


def window_flags(p):
    p.add_argument("--overlap", type=float, help="of the sliding windows (default: the checkpoint's; published 0.75)")
    p.add_argument("--windows", type=int, default=4, help="windows a forward pass (default %(default)s)")
    p.add_argument("--mirror", action="store_true", help="average the predictions of all eight mirror images")


COMMANDS = {"seg": (add_seg, segmentation), "cls": (add_cls, classification), "predict": (add_predict, prediction)}
FITS = {SEGMENTER: "seg", CLS_FORMAT: "cls", FORMAT: "pretrain"}  # the sub-command for each format of checkpoint


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for add, _ in COMMANDS.values():
        add(commands)
    words = sys.argv[1:]
    if words[:1] == ["--ckpt"] and len(words) > 1:  # no sub-command: the one that fits
        kind = load_checkpoint(words[1]).get("format")
        if kind not in FITS:
            raise BadInput(f"--ckpt {words[1]}: format {kind!r} says no sub-command; name one of {', '.join(COMMANDS)}")
        words = [FITS[kind], *words]
    args = p.parse_args(words)
    COMMANDS[args.command][1](args)


if __name__ == "__main__":
    cli(main)
