"""Scans on disk -> a corpus of memory-mapped int16 arrays -> an endless supply of sequences for pre-training.

    python serialize.py --phantom                                   # made-up patients, 1 minute on two cores
    python serialize.py --spatial data/amos data/flare --contrast data/brats \\
        --semantic data/deeplesion/DL_info.csv data/deeplesion/Images_nifti --out data/corpus
    python serialize.py --out data/corpus --inspect                 # draws one sequence of each kind with its token order
    python serialize.py --out data/corpus --bench                   # samples a second, bytes a sample, disk

Run it again to add scans, or to go on after a stop: what the corpus already holds is not read again. A corpus is
    index.jsonl     a line an array (or a lesion): kind, source, hash, shape, spacing, patient, group, split, …
    arrays/*.npy    one int16 array a scan, [X, Y, Z] in RAS+; value = stored · slope + inter
    skipped.csv     every file that could not be used, and why

Sections: reading scans · scans to segment · data sets to segment · data sets to classify · jobs, one a file · building a corpus · splits · sequences · inspect · bench · main

X Y Z voxels, S sub-images of a sequence laid side by side along z, D = Z/S their depth.
"""
import argparse
import csv
import fnmatch
import hashlib
import json
import os
import re
import time
import zipfile
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import BadInput, cli, keep_freed_memory, parallel, read_json, write_beside

KINDS = ("spatial", "contrast", "semantic")
CONTRASTS = ("t1n", "t1c", "t2w", "t2f")            # BraTS 2023, in the published order
PUBLISHED = dict(spatial=50, contrast=100, semantic=20_000)  # crops a scan, boxes a patient, tuples a lesion type
NIFTI, SITK = (".nii", ".nii.gz", ".hdr"), (".mha", ".mhd", ".nrrd", ".nhdr", ".dcm")
LABELS = ("*/label*/*", "*/mask*/*", "*/segmentation*/*", "*/derivatives/*", "*[-_]seg.*", "*[-_]seg[-_.]*", "*[-_]mask.*", "*[-_]msk.*",
          "*[-_]label.*")                           # matched below the folder that is named, in lower case
SMALLEST = 8                                        # voxels along an axis; less is a 2D image or a scout

# ---------------------------------------------------------------- reading scans


def suffix_of(path):
    name = str(path).lower()
    return next((s for s in sorted(NIFTI + SITK, key=len, reverse=True) if name.endswith(s)), None)


def stem_of(path):
    """File name without its (double) suffix."""
    return Path(path).name[:-len(suffix_of(path) or "") or None]


def read_scan(path):
    """A scan in RAS+: values [X, Y, Z] or [X, Y, Z, T], its affine (mm), and the affine of the file's own axes.

    Integers where the file holds integers and its slope is 1, else float32 with slope and intercept applied.
    DICOM (a folder), MHA and NRRD need SimpleITK. BadInput says what is wrong with the file.
    """
    try:
        values, affine = read_sitk(path) if Path(path).is_dir() or suffix_of(path) in SITK else read_nifti(path)
    except BadInput:
        raise
    except Exception as e:  # the readers raise a dozen types; the message is what tells a user what to mend
        raise BadInput(f"unreadable: {type(e).__name__}: {str(e).splitlines()[0][:150] if str(e) else ''}") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise BadInput("its affine is singular: the header does not say where the voxels are")
    axes = nib.orientations.io_orientation(affine)
    ras = affine @ nib.orientations.inv_ornt_aff(axes, values.shape[:3])
    return nib.orientations.apply_orientation(values, axes), ras, affine


def read_nifti(path):
    img = nib.load(path)
    if not isinstance(img, nib.nifti1.Nifti1Pair) or isinstance(img, nib.Cifti2Image):
        raise BadInput(f"a {type(img).__name__}, not a NIfTI volume")
    shape = img.shape
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise BadInput(f"2D ({'x'.join(map(str, shape))})")
    if len(shape) == 5 and shape[3] == 1:           # vectors are stored along a fifth axis
        raise BadInput(f"a vector field ({'x'.join(map(str, shape))})")
    if len(shape) > 4:
        raise BadInput(f"{len(shape)} axes ({'x'.join(map(str, shape))})")
    if img.get_data_dtype().kind not in "iuf":
        raise BadInput(f"voxels of type {img.get_data_dtype()}, neither integers nor floats")
    raw = img.dataobj.get_unscaled()
    if shape[3:] == (1,):                           # one frame: a volume
        raw = raw[..., 0]
    slope, inter = float(img.dataobj.slope), float(img.dataobj.inter)
    if raw.dtype.kind in "iu" and slope == 1 and inter == int(inter):
        fits = raw.dtype.itemsize <= 2 and abs(inter) < 2 ** 20
        return (raw.astype(np.int32) if fits else raw.astype(np.int64)) + int(inter) if inter else raw, img.affine
    return raw.astype(np.float32) * np.float32(slope) + np.float32(inter), img.affine


def read_sitk(path):
    try:
        import SimpleITK as sitk
    except ImportError:
        raise BadInput("DICOM, MHA and NRRD files need SimpleITK: pip install SimpleITK") from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if Path(path).is_dir():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
        if len(series) != 1:
            raise BadInput(f"a folder with {len(series)} DICOM series; one folder a series is needed")
        img = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0]))
    else:
        img = sitk.ReadImage(str(path))
    if img.GetDimension() != 3 or img.GetNumberOfComponentsPerPixel() != 1:
        raise BadInput(f"{img.GetDimension()}D with {img.GetNumberOfComponentsPerPixel()} components; a scalar 3D image is needed")
    affine = np.eye(4)
    affine[:3, :3] = np.array(img.GetDirection()).reshape(3, 3) * img.GetSpacing()
    affine[:3, 3] = img.GetOrigin()
    affine[:2] *= -1                                # ITK points to the left and posterior, NIfTI to the right and anterior
    return sitk.GetArrayFromImage(img).transpose(2, 1, 0), affine


def to_int16(values):
    """Values -> int16 and the slope and inter that give them back: exact for integers that span 16 bits.

    Floats are spread over the 65,535 levels from their minimum to their maximum, outliers clipped one span beyond the
    0.01st and 99.99th percentiles.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BadInput(f"{int((~np.isfinite(values)).sum())} voxels are NaN or infinite")
        low, high = float(values.min()), float(values.max())
        whole = abs(low) < 2 ** 24 and abs(high) < 2 ** 24 and np.array_equal(values, np.rint(values))
    else:
        low, high, whole = int(values.min()), int(values.max()), True
    if low == high:
        raise BadInput(f"all voxels are equal ({low:g})")
    if whole and high - low <= 65535:
        inter = 0 if low >= -32768 and high <= 32767 else int(low) + 32768
        return (values.astype(np.int64) - inter if inter else values).astype(np.int16), 1.0, float(inter)
    a, b = np.percentile(values, [0.01, 99.99])
    if b > a:
        low, high = max(low, a - (b - a)), min(high, b + (b - a))
    slope = (high - low) / 65534
    inter = low + 32767 * slope
    return np.rint((np.clip(values, low, high) - inter) / slope).astype(np.int16), float(slope), float(inter)


# ---------------------------------------------------------------- scans to segment


def read_labels(path, classes, image, affine):
    """The label map that belongs to a scan [X, Y, Z] in RAS+ with `affine`: uint8. BadInput if it is not on the same grid."""
    labels, own, _ = read_scan(path)
    if labels.shape != image.shape:
        raise BadInput(f"{path}: label {'x'.join(map(str, labels.shape))}, image {'x'.join(map(str, image.shape))} voxels (RAS)")
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*image.shape, 1]
    apart = np.abs(corners @ (own - affine).T).max()
    if apart > 0.5 * nib.affines.voxel_sizes(affine).min():
        raise BadInput(f"{path}: the affine of the label is not the image's: corners are up to {apart:.1f} mm apart")
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all() or not np.array_equal(labels, np.rint(labels)):
            raise BadInput(f"{path}: labels that are not integers")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise BadInput(f"{path}: label values {low:g} ... {high:g}, where 0 ... {classes - 1} are expected")
    return labels.astype(np.uint8)


def normalise(values, window):
    """Values -> float32 by a window: (low, high) and "percentiles" (1, 99.9) to [0, 1], "zscore", or None for as they are."""
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise BadInput(f"{int((~np.isfinite(values)).sum())} voxels are NaN or infinite")
    if window == "zscore":
        return (values - values.mean()) / max(float(values.std()), 1e-6)
    if window is None:
        return values
    low, high = np.percentile(values, [1, 99.9]) if window == "percentiles" else window
    return np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)


def nearest(labels, shape):
    """[X, Y, Z] -> `shape` by the nearest voxel of the same extent: labels are picked, never mixed."""
    index = [((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape)]
    return labels if labels.shape == tuple(shape) else labels[np.ix_(*index)]


def prepare(values, ras, own, spacing, window):
    """What `read_scan` returned -> float16 [X, Y, Z] in RAS+ at `spacing` (mm; None: as it is), cut to its foreground,
    and the geometry (plain types) with which `prepare_labels` and `invert` follow.

    The grid keeps its directions and its extent, so an oblique scan stays oblique and a spacing is met to half a voxel
    over the whole extent. Foreground is the box of what the window leaves above its lowest value.
    """
    if values.ndim != 3:
        raise BadInput(f"{values.ndim}D ({'x'.join(map(str, values.shape))}), and one volume is needed")
    size = nib.affines.voxel_sizes(ras)
    shape = [int(max(1, round(n * a / b))) for n, a, b in zip(values.shape, size, spacing or size)]
    values = normalise(values, window)
    volume = torch.from_numpy(values)
    if shape != list(values.shape):
        volume = F.interpolate(volume[None, None], shape, mode="trilinear")[0, 0]
    volume = volume.numpy()
    inside = volume > volume.min()
    box = [[int(i) for i in np.flatnonzero(inside.any(others))[[0, -1]] + [0, 1]] if inside.any() else [0, n]
           for others, n in zip(((1, 2), (0, 2), (0, 1)), shape)]
    geometry = dict(shape=list(values.shape), affine=own.tolist(), resampled=shape, box=box,
                    spacing=[float(n * a / m) for n, a, m in zip(values.shape, size, shape)])
    return volume[boxed(box)].astype(np.float16), geometry


def boxed(box):
    return tuple(slice(a, b) for a, b in box)


def prepare_labels(labels, geometry):
    """Labels on the scan's RAS+ grid -> uint8 on the prepared one."""
    return np.ascontiguousarray(nearest(labels, geometry["resampled"])[boxed(geometry["box"])])


def smooth(labels, shape):
    """[X, Y, Z] -> `shape`: the share of each class is interpolated on its own (trilinear), and the largest wins a voxel."""
    if labels.shape == tuple(shape):
        return labels
    at = [np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1) for n, m in zip(labels.shape, shape)]
    best, won = np.zeros(shape, np.float32), np.zeros(shape, labels.dtype)
    rest = np.ones(shape, np.float32)                                                  # the background's share
    for k in np.unique(labels[labels > 0]):
        share, box = labels == k, []
        for axis, c in enumerate(at):
            hit = np.flatnonzero(share.any(tuple({0, 1, 2} - {axis})))
            reached = np.flatnonzero((c > hit[0] - 1) & (c < hit[-1] + 1))             # a class reaches no further than this
            low = c[reached].astype(int)
            w = (c[reached] - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            high = np.minimum(low + 1, labels.shape[axis] - 1)
            share = np.take(share, low, axis) * (1 - w) + np.take(share, high, axis) * w
            box.append(slice(reached[0], reached[-1] + 1) if len(reached) else slice(0, 0))
        box = tuple(box)
        rest[box] -= share
        better = share > best[box]
        best[box], won[box] = np.where(better, share, best[box]), np.where(better, k, won[box])
    won[rest > best] = 0
    return won


def uncut(volume, geometry):
    """An array on the prepared grid -> uint8 on the resampled one, before the cut to the foreground, with zeros around."""
    whole = np.zeros(geometry["resampled"], np.uint8)
    whole[boxed(geometry["box"])] = volume
    return whole


def invert(labels, geometry):
    """Labels on the prepared grid -> the same on the file's own grid, and the file's own affine."""
    return to_own_axes(smooth(uncut(labels, geometry), geometry["shape"]), geometry["affine"])


def to_own_axes(values, own):
    """An array in RAS+ (as `read_scan` returned it) -> in the axes of the file, whose affine is `own`, and that affine."""
    axes = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.orientations.io_orientation(np.array(own)))
    return np.ascontiguousarray(nib.orientations.apply_orientation(values, axes)), np.array(own)


# ---------------------------------------------------------------- data sets to segment
ORGANS = ("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
          "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
MSD = "Medical Segmentation Decathlon (http://medicaldecathlon.com)"
# classes without the background, window (HU; or percentiles, zscore), spacing in mm (None: as it is), where it comes from;
# recipe: where the published recipe of a task differs; mr_after: cases of a higher number are MR, windowed by percentiles
SEG_TASKS = {
    "amos": dict(classes=ORGANS, window=(-175, 250), spacing=(1.5, 1.5, 2), mr_after=500, source="AMOS22 (https://amos22.grand-challenge.org)"),
    "liver": dict(classes=("liver", "cancer"), window=(-21, 189), spacing=(1, 1, 1), source=f"Task03_Liver of the {MSD}"),
    "lung": dict(classes=("cancer",), window=(-1000, 1000), spacing=(1, 1, 1), source=f"Task06_Lung of the {MSD}"),
    "pancreas": dict(classes=("pancreas", "cancer"), window=(-87, 199), spacing=(1, 1, 1.5), source=f"Task07_Pancreas of the {MSD}",
                     recipe=dict(epochs=500)),
    "hepaticvessel": dict(classes=("vessel", "tumour"), window=(0, 230), spacing=(1, 1, 1.5),
                          source=f"Task08_HepaticVessel of the {MSD}", recipe=dict(epochs=500)),
    "spleen": dict(classes=("spleen",), window=(-57, 175), spacing=(1, 1, 1), source=f"Task09_Spleen of the {MSD}"),
    "colon": dict(classes=("colon cancer primaries",), window=(-57, 175), spacing=(1, 1, 1.5), source=f"Task10_Colon of the {MSD}"),
    "la": dict(classes=("left atrium",), window="zscore", spacing=None, source="2018 Left Atrium challenge (http://atriaseg2018.cardiacatlas.org), "
               "or UA-MT's copy (*/mri_norm2.h5, train.list, test.list)", recipe=dict(roi=(192, 192, 64), decay=0.9, augment="strong", flip=0.5)),
    "phantom": dict(classes=ORGANS, window=(-175, 250), spacing=(4.5, 4.5, 4.5), source="phantom.py"),
}
LAYOUT = "expected there: dataset.json, imagesTr/*.nii.gz and labelsTr/*.nii.gz (AMOS: imagesVa and labelsVa too)"
OWN_TASK = dict(classes=None, window="percentiles", spacing=None, source="a folder of your own")
# A case is a dict: id, image, label (paths), split.


def find_cases(name, data, classes, where):
    """The cases of task `name` in folder `data`, sorted by split and id, and the names of the classes (`classes`, if given)."""
    root, task = Path(data), SEG_TASKS.get(name, OWN_TASK)
    if name == "phantom" and not (root / "dataset.json").exists():
        if where.main:
            from phantom import write_amos
            where.say(f"making phantom patients in {root}")
            write_amos(root.parent)
        where.barrier()
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder. --task {name} needs {task['source']}; {LAYOUT}")
    notes = next((root / n for n in ("dataset_withVal.json", "dataset.json") if (root / n).exists()), None)
    notes = read_json(notes, "the table of contents of a data set in the Decathlon layout") if notes else {}
    named = {int(k): v for k, v in notes.get("labels", {}).items() if str(k).isdigit()}
    classes = classes or task["classes"] or [named[k] for k in sorted(named) if k]
    if not classes:
        raise BadInput(f"--task {name}: the names of its classes are needed, --classes NAME …, or labels in {root / 'dataset.json'}")
    if len(classes) > 255:
        raise BadInput(f"--task {name}: {len(classes)} classes; label maps here have 8 bits, 255 classes at most")
    cases = listed(root, notes) or listed_in_h5(root) or found_on_disk(root)
    if not cases:
        raise BadInput(f"{root}: no labelled scans ({LAYOUT}); {root / 'labelsTr'} "
                       + ("holds no *.nii.gz" if (root / "labelsTr").is_dir() else "does not exist"))
    if "val" not in {c["split"] for c in cases}:
        for c in cases:
            c["split"] = "val" if hash_share(c["id"]) < 0.2 else "train"
        if len({c["split"] for c in cases}) == 1:                                      # too few for a rule of shares
            min(cases, key=lambda c: hash_share(c["id"]))["split"] = "val"
            max(cases, key=lambda c: hash_share(c["id"]))["split"] = "train"
    return sorted(cases, key=lambda c: (c["split"], c["id"])), [str(c) for c in classes]


def hash_share(name):
    """A number in [0, 1) that depends on the name of a case alone: below 0.2 it validates, whatever else there is."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2 ** 64


def pair_of(image, label, split):
    return dict(id=stem_of(image) or Path(image).stem, image=str(image), label=str(label), split=split)


def listed(root, notes):
    """Cases that dataset.json lists with both an image and a label (entries without one are test scans)."""
    cases = []
    for split, key in (("train", "training"), ("val", "validation")):
        for e in notes.get(key, []):
            if isinstance(e, dict) and "image" in e and "label" in e and not Path(e["image"]).name.startswith("._"):
                cases.append(pair_of(root / e["image"], root / e["label"], split))
    return cases


def found_on_disk(root):
    """Pairs of files of one name in imagesTr and labelsTr (Va: validation), litter of macOS (._*) aside."""
    cases = []
    for split, tag in (("train", "Tr"), ("val", "Va")):
        for label in sorted((root / f"labels{tag}").glob("*.nii*")):
            image = next((f for f in (root / f"images{tag}" / label.name, root / f"images{tag}" / f"{stem_of(label)}_0000.nii.gz")
                          if f.exists()), root / f"images{tag}" / label.name)
            if not label.name.startswith("._"):
                cases.append({**pair_of(image, label, split), "id": stem_of(label)})
    return cases


def listed_in_h5(root):
    """UA-MT's copy of the left atria: NAME/mri_norm2.h5, and the names in train.list and test.list."""
    files = {f.parent.name: f for f in sorted(root.rglob("mri_norm2.h5"))}
    lists = {s: next(iter(sorted(root.rglob(f"{n}.list"))), None) for s, n in (("train", "train"), ("val", "test"))}
    if not files:
        return []
    if None in lists.values():
        return [dict(id=k, image=str(f), label=str(f), split="train") for k, f in files.items()]
    return [dict(id=name, image=str(files.get(name, root / name / "mri_norm2.h5")), label=str(files.get(name, root / name / "mri_norm2.h5")), split=s)
            for s, f in lists.items() for name in f.read_text().split()]


def window_of_case(case, window, mr_after):
    """The window of a case: `window`, or percentiles where the number in its id is above `mr_after` (AMOS: those are MR)."""
    number = re.search(r"(\d+)\D*$", case["id"])
    return "percentiles" if mr_after and number and int(number.group(1)) > mr_after else window

def read_case(case, K):
    """A case's scan as `read_scan` returns it, and its labels [X, Y, Z] uint8, 0 … K − 1. BadInput names the file at fault."""
    for what in ("image", "label"):
        if not Path(case[what]).exists():
            raise BadInput(f"{case[what]}: no such {what} file, though it is listed")
    if case["image"].endswith(".h5"):
        values, ras, labels = read_h5(case["image"], K)
        return values, ras, ras, labels
    try:
        values, ras, own = read_scan(case["image"])
    except BadInput as e:
        raise BadInput(f"{case['image']}: {e}") from None
    return values, ras, own, read_labels(case["label"], K, values, ras)


def read_h5(path, K):
    try:
        import h5py
    except ImportError:
        raise BadInput(f"{path}: HDF5 files need h5py: pip install h5py") from None
    try:
        with h5py.File(path) as f:
            values, labels = f["image"][:], f["label"][:]
    except (OSError, KeyError) as e:
        raise BadInput(f"{path}: not an HDF5 file with image and label ({str(e).splitlines()[0]})") from None
    if values.shape != labels.shape or labels.min() < 0 or labels.max() >= K:
        raise BadInput(f"{path}: image {values.shape}, label {labels.shape} with values {labels.min()} ... {labels.max()}")
    return values, np.eye(4), labels.astype(np.uint8)


def labelled_cases(task, data, classes, window, spacing, most, where):
    """Labelled scans as finetune_seg.py prepares them: train, val (lists of (volume in [0, 1] float16, labels uint8, id), tensors
    [X, Y, Z]), the names of the classes, and {id: why it was left out}.

    most: how many to take of each split, those whose ids hash lowest. BadInput where none is left.
    """
    if task not in SEG_TASKS and not data:
        raise BadInput(f"--task {task}: {', '.join(SEG_TASKS)}, or a name of your own with --data DIR in the Decathlon layout")
    recipe, lost = SEG_TASKS.get(task, OWN_TASK), {}
    data = data or ("data/phantom/amos" if task == "phantom" else f"data/{task}")
    cases, classes = find_cases(task, data, classes, where)
    parts = dict(train=[], val=[])
    for (split, ready), n in zip(parts.items(), most):
        chosen = sorted((c for c in cases if c["split"] == split), key=lambda c: hash_share(c["id"]))[:n]
        for case in tqdm(sorted(chosen, key=lambda c: c["id"]), desc=f"reading {split}", leave=False):
            try:
                *scan, labels = read_case(case, len(classes) + 1)
                hu = window_of_case(case, window or recipe["window"], recipe.get("mr_after"))
                volume, geometry = prepare(*scan, spacing or recipe["spacing"], hu)
                ready.append((torch.from_numpy(volume), torch.from_numpy(prepare_labels(labels, geometry)), case["id"]))
            except BadInput as e:
                lost[case["id"]] = str(e)
        if not ready:
            why = f"; the first: {next(iter(lost.values()))}" if lost else ""
            raise BadInput(f"{data}: no labelled case of the {split} split can be used{why}")
    if lost:
        where.say(f"{len(lost)} cases left out; the first: {next(iter(lost.values()))}")
    return parts["train"], parts["val"], classes, lost


# ---------------------------------------------------------------- data sets to classify
# A task: how its cases are listed (npz: MedMNIST's file; lists: FILE LABEL a line; csv), its classes, the size of the input
# (and with --size nano), the intensities that become 0 and 1 (None: a scan's own 1st and 99.9th percentiles), and whose recipe it follows.

CLS_TASKS = {
    "nodule": dict(listed="npz", classes=["benign", "malignant"], volume=[128, 128, 128], nano=[32, 32, 32], window=[0, 255], recipe="nodule"),
    "ricord": dict(listed="lists", classes=["no COVID", "COVID"], volume=[128, 128, 64], nano=[64, 64, 32], window=[0, 1400], recipe="ricord"),
    "mine": dict(listed="csv", classes=None, volume=[128, 128, 128], nano=[64, 64, 64], window=None, recipe="ricord"),
}
# the phantom's scans are in HU: the published window, which is as wide, would make all of the lung 0
FLAVOURS = {"nodule": CLS_TASKS["nodule"], "ricord": {**CLS_TASKS["ricord"], "window": [-1000, 400]}}
SPLITS = ("train", "val", "test")


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


def list_cases(task, data, lists, pattern, where):
    """All cases of a task (one of CLS_TASKS) in `data` and the names of its classes. No patient may be in two splits."""
    data = Path(data)
    if task["listed"] == "npz":
        cases = cases_of_npz(data, task["classes"])
    elif task["listed"] == "lists":
        cases = cases_of_lists(data, lists, task["classes"], pattern)
    else:
        cases = cases_of_csv(data, task["classes"], pattern)
    classes = task["classes"] or [str(c) for c in range(max(2, 1 + max(c["label"] for c in cases)))]
    splits = {}
    for c in cases:
        splits.setdefault(c["patient"], set()).add(c["split"])
    both = [p for p, s in splits.items() if len(s) > 1]
    if both:
        raise BadInput(f"{data}: {len(both)} patients are in more than one split, {both[0]} in {' and '.join(sorted(splits[both[0]]))}; "
                       "give each patient one split (--patient REGEX says what names a patient)")
    for s in SPLITS:
        have = {c["label"] for c in cases if c["split"] == s}
        if not have or s == "train" and len(have) < len(classes):
            raise BadInput(f"{data}: the {s} split has no case" + (f" of class {min(set(range(len(classes))) - have)}" if have else ""))
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


def cls_task(name, flavour):
    return FLAVOURS[flavour] if name == "phantom-cls" else CLS_TASKS[name]


def cls_data(name, flavour, data, where):
    """The folder or file of a task's data: `data`, else its default; the phantom's is made if it is not there."""
    if data is None and name == "phantom-cls":
        data = f"data/phantom/{flavour}"
        if where.main:
            from phantom import write_phantom
            done = Path(data, "nodulemnist3d.npz" if flavour == "nodule" else "test.txt").exists()
            where.say(f"made-up patients, {flavour}: {'from' if done else 'making them in'} {data}")
            done or write_phantom("data/phantom", parts=(flavour,))
        where.barrier()
    return data or ("data/mine.csv" if name == "mine" else f"data/{name}")


def resize_whole(values, shape):
    """[x, y, z] -> `shape`: area means along axes that shrink, then trilinear."""
    v = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    v = F.adaptive_avg_pool3d(v, [min(a, b) for a, b in zip(v.shape[2:], shape)])
    return F.interpolate(v, shape, mode="trilinear")[0, 0].numpy()


def statistics(values, affine, own):
    """What can be known of a scan without looking: the numbers of the header, and of its histogram."""
    axes = nib.orientations.io_orientation(own).ravel()
    header = [*values.shape, *nib.affines.voxel_sizes(affine), *affine[:3, 3], *axes, values.dtype.itemsize]
    return np.array([*header, values.mean(), values.std(), *np.percentile(values, [0, 1, 5, 25, 50, 75, 95, 99, 100])], np.float64)


def prepare_whole(case, shape, window, cache):
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
                np.savez(tmp, volume=resize_whole(unit, shape).astype(np.float16), statistics=statistics(values, affine, header))
        with np.load(path, allow_pickle=False) as z:
            return str(path), z["statistics"], None
    except BadInput as e:
        return None, None, str(e)


def load_volume(case):
    with np.load(case["array"], allow_pickle=False) as z:
        return torch.from_numpy(z["volume"])                                           # [X, Y, Z] float16


# ---------------------------------------------------------------- jobs, one a file
# A job is a dict: kind, source, patient, and what its rows need; `store` runs in a worker process.


def is_dicom(path):
    """Whether a file without a suffix is DICOM: scanners and archives export slices as IM0001."""
    if "." in path.name:
        return False
    with open(path, "rb") as f:
        return f.read(132)[128:] == b"DICM"


def scans_under(folder, exclude):
    """Files (and folders of DICOM slices) below `folder` -> scans, and those that look like labels."""
    folder = Path(folder)
    if not folder.exists():
        raise BadInput(f"{folder}: no such folder")
    found, labels, series = [], [], set()
    for f in sorted([folder] if folder.is_file() else folder.rglob("*")):
        if not f.is_file() or not (suffix_of(f) or is_dicom(f)) or f.name.startswith("._"):  # ._ is macOS litter
            continue
        below = f"/{f.relative_to(folder) if folder.is_dir() else f.name}".lower()
        if any(fnmatch.fnmatch(below, p) for p in exclude):
            labels.append(f)
        elif suffix_of(f) not in (".dcm", None):
            found.append(f)
        elif f.parent not in series:
            series.add(f.parent)
            found.append(f.parent)
    if not found:
        raise BadInput(f"{folder}: no scans in it ({', '.join(NIFTI + SITK)}), {len(labels)} label files aside")
    return found, labels


def spatial_jobs(folders, exclude, patient):
    jobs, skipped = [], []
    for folder in folders:
        found, labels = scans_under(folder, exclude)
        skipped += [(f, "looks like a label map (--exclude)") for f in labels]
        often = Counter(stem_of(f) for f in found)
        for f in found:
            who = patient_of(f, Path(folder), often[stem_of(f)] > 1, patient)
            jobs.append(dict(kind="spatial", source=f, patient=f"{Path(folder).name}/{who}", group=""))
    return jobs, skipped


def patient_of(file, folder, shared_name, regex=None):
    """Whose scan it is, so that no patient stands on both sides of the split: what --patient finds in the path, a BIDS or
    BraTS patient in it, the first folder of a DICOM series, the folder of a file whose name many have, or the file's name
    (less nnU-Net's channel, CASE_0000)."""
    if regex:
        try:
            match = re.search(regex, str(file))
        except re.error as e:
            raise BadInput(f"--patient {regex!r}: not a regular expression ({e})") from None
        who = match and (match.group(1) if match.groups() else match.group())
        if not who:
            raise BadInput(f"--patient {regex!r} does not match {file}")
        return who
    below = file.relative_to(folder) if folder.is_dir() else Path(file.name)
    if known := re.search(r"sub-[A-Za-z0-9]+|BraTS-[A-Za-z]+-\d{5}", str(below)):
        return known.group()
    if file.is_dir():
        return below.parts[0] if below.parts else file.name
    return str(below.parent) if shared_name else re.sub(r"(?<=\d)_000\d$", "", stem_of(file))


def contrast_jobs(folders):
    """A job a case folder CASE/CASE-{t1n,t1c,t2w,t2f}.nii.gz; cases of one patient differ in their last number."""
    jobs, skipped = [], []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        cases = sorted({f.parent for f in folder.rglob("*.nii*") if not f.name.startswith("._")})
        for case in cases:
            files = [next((f for f in case.glob(f"{case.name}-{c}.nii*") if f.is_file()), None) for c in CONTRASTS]
            if None in files:
                lack = [c for c, f in zip(CONTRASTS, files) if f is None]
                skipped.append((case, f"lacks {case.name}-{lack[0]}.nii.gz"))
                continue
            who = re.sub(r"-\d{3}$", "", case.name)
            jobs.append(dict(kind="contrast", source=case, files=files, patient=who, group=case.name))
        if not cases:
            raise BadInput(f"{folder}: no case folders CASE/CASE-t1n.nii.gz in it")
    return jobs, skipped


def semantic_jobs(table, folder):
    """A job a volume of DeepLesion with the lesions that DL_info.csv marks in it (columns 0, 6, 9 and 11)."""
    if not Path(table).is_file() or not Path(folder).is_dir():
        raise BadInput(f"--semantic {table} {folder}: DL_info.csv and the folder Images_nifti are needed")
    lesions, skipped = defaultdict(list), []
    with open(table, newline="", errors="replace") as f:
        for n, row in enumerate(csv.reader(f)):
            if n == 0:
                continue
            try:
                name, box, kind, slices = row[0], [float(x) for x in row[6].split(",")], int(row[9]), row[11].split(",")
                start, end = (int(x) for x in slices)
                case = "_".join(name.split("_")[:3])
                x1, y1, x2, y2 = box
            except (IndexError, ValueError):
                skipped.append((f"{table}:{n + 1}", "cannot be read as a row of DL_info.csv"))
                continue
            if kind == -1:
                skipped.append((f"{table}:{n + 1}", "lesion of unknown type (-1)"))
                continue
            volume = Path(folder) / f"{case}_{start:03d}-{end:03d}.nii.gz"
            lesions[volume].append(dict(type=kind, row=(y1 + y2) / 2, col=(x1 + x2) / 2))
    jobs = []
    for volume, found in sorted(lesions.items()):
        if volume.is_file():
            jobs.append(dict(kind="semantic", source=volume, lesions=found, patient=volume.name.split("_")[0], group=""))
        else:
            skipped.append((volume, "named in DL_info.csv, but no such file"))
    return jobs, skipped


def stamp_of(job):
    """Size and time of the job's files, and its lesions: a source with the same stamp is not read again."""
    source = Path(job["source"])
    files = job.get("files") or (sorted(source.iterdir()) if source.is_dir() else [source])
    stats = [os.stat(f) for f in files]
    return [sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats),
            hashlib.blake2b(json.dumps(job.get("lesions", len(files))).encode(), digest_size=8).hexdigest()]


def store(job):
    """Read the scans of a job and write their arrays: (job, rows, reason it was skipped or None)."""
    try:
        rows, first = [], None
        for n, path in enumerate(job.get("files", [job["source"]])):
            values, affine, own = read_scan(path)
            if first is not None and apart(affine, first, values.shape) > 0.5:
                raise BadInput(f"its contrasts are not co-registered: {path.name} lies elsewhere than {job['files'][0].name}")
            first = affine
            frames = [values] if values.ndim == 3 else np.moveaxis(values, 3, 0)
            if values.ndim == 4 and job["kind"] != "spatial":
                raise BadInput(f"4D ({values.shape}) where one volume is needed")
            for t, frame in enumerate(frames):
                row = store_array(job, frame, affine, f"{path}#{t}" if len(frames) > 1 else str(path))
                if job["kind"] == "contrast":
                    row["contrast"] = CONTRASTS[n]
                for lesion in job.get("lesions", [None]):
                    rows.append(row if lesion is None else {**row, **place_lesion(lesion, own, affine)})
        if len({tuple(r["shape"]) for r in rows}) > 1 and job["kind"] == "contrast":
            raise BadInput(f"its contrasts differ in shape: {[r['shape'] for r in rows]}")
        return job, rows, None
    except BadInput as e:
        return job, [], str(e)
    except (OverflowError, ValueError, MemoryError) as e:
        return job, [], f"{type(e).__name__}: {e}"


def apart(a, b, shape):
    """How far two affines place the corners of a volume of `shape` from each other, in voxels of `b`."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], [1])).reshape(4, -1)
    return np.abs(np.linalg.inv(b) @ a @ corners - corners).max()


def store_array(job, values, affine, source):
    if min(values.shape) < SMALLEST:
        raise BadInput(f"{'x'.join(map(str, values.shape))}: fewer than {SMALLEST} voxels along an axis")
    array, slope, inter = to_int16(values)
    array = np.ascontiguousarray(array)
    name = f"{job['kind']} {os.path.abspath(source)}"
    file = f"arrays/{hashlib.blake2b(name.encode(), digest_size=10).hexdigest()}.npy"
    with write_beside(Path(job["out"]) / file) as tmp:
        np.save(tmp, array, allow_pickle=False)
    spacing = [round(float(s), 4) for s in nib.affines.voxel_sizes(affine)]
    return dict(kind=job["kind"], source=os.path.abspath(source), hash=hashlib.blake2b(array, digest_size=16).hexdigest(),
                file=file, shape=list(array.shape), spacing=spacing, slope=slope, inter=inter, patient=job["patient"],
                group=job["group"], job=os.path.abspath(job["source"]), stamp=stamp_of(job))


def place_lesion(lesion, own, ras):
    """Centre (x, y) of a box given in the file's (row, col), as voxels of the RAS+ array; group is the type."""
    voxel = np.linalg.inv(ras) @ own @ [lesion["row"], lesion["col"], 0, 1]
    return dict(group=str(lesion["type"]), centre=[round(float(c), 1) for c in voxel[:2]])


# ---------------------------------------------------------------- building a corpus


def build(jobs, skipped, out, val=0.05, seed=0, workers=None, say=print):
    """Run the jobs that the corpus in folder `out` does not hold yet, then write its index and skipped.csv."""
    out = Path(out)
    partly = next((f for f in ("index.part.jsonl", "index.jsonl") if (out / f).exists()), None)
    rows = [r for r in read_index(out, partly, whole=False) if holds(out, r)] if partly else []
    jobs = list({(j["kind"], os.path.abspath(j["source"])): j for j in jobs}.values())  # folders may overlap
    held = {(r["kind"], r["job"], *r["stamp"]) for r in rows}
    todo = [{**j, "out": str(out)} for j in jobs
            if (j["kind"], os.path.abspath(j["source"]), *stamp_of(j)) not in held]
    stale = {(j["kind"], os.path.abspath(j["source"])) for j in todo}
    rows = [r for r in rows if (r["kind"], r["job"]) not in stale]      # the file has changed: its rows come anew
    say(f"{len(jobs)} scans or cases, {len(jobs) - len(todo)} of them in {out} already")
    if named := next((j for j in jobs if j["kind"] == "spatial"), None):
        say(f"patients are found in the paths ({named['source']} is of {named['patient']}); --patient REGEX says otherwise")
    seen = {(r["kind"], r["hash"]): r["source"] for r in rows}
    saved = time.monotonic()
    for job, new, reason in parallel(store, todo, workers, "reading scans"):
        twin = next((seen[k] for r in new if (k := (r["kind"], r["hash"])) in seen), None)
        if twin:                                    # the same voxels twice could stand on both sides of the split
            reason = f"the same voxels as {twin}"
            for file in {r["file"] for r in new} - {r["file"] for r in rows}:
                (out / file).unlink(missing_ok=True)
        if reason:
            skipped.append((job["source"], reason))
            continue
        seen.update({(r["kind"], r["hash"]): r["source"] for r in new})
        rows += new
        if time.monotonic() - saved > 10:           # a kill costs ten seconds of work
            write_index(out, rows, "index.part.jsonl")
            saved = time.monotonic()
    if not rows:
        first = f"; the first of {len(skipped)} reasons: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise BadInput(f"none of the files could be used{first}")
    write_index(out, split_by_patient(rows, val, seed))
    (out / "index.part.jsonl").unlink(missing_ok=True)
    write_skipped(out / "skipped.csv", skipped, {str(j["source"]) for j in jobs})
    summarise(rows, skipped, out, say)
    return rows


def summarise(rows, skipped, out, say):
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        patients = {s: len({r["patient"] for r in mine if r["split"] == s}) for s in ("train", "val")}
        if mine:
            say(f"{kind:>9}: {len(mine)} {'lesions' if kind == 'semantic' else 'scans'}, "
                f"{patients['train']} patients to train on, {patients['val']} to validate")
    reasons = defaultdict(list)
    for source, reason in skipped:
        reasons[reason].append(source)
    for reason, sources in list(reasons.items())[:10]:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        say(f"  skipped {sources[0]}{more}: {reason}")
    if skipped:
        say(f"{len(skipped)} skipped in all, each with its reason in {out / 'skipped.csv'}")


def write_skipped(path, skipped, tried):
    """List what was skipped, after what earlier runs skipped and this one has not tried again."""
    skipped = [(str(source), reason) for source, reason in skipped]
    now, earlier = tried | {source for source, _ in skipped}, []
    if path.exists():
        with open(path, newline="") as f:
            earlier = [(r["source"], r["reason"]) for r in csv.DictReader(f) if r["source"] not in now]
    with write_beside(path) as tmp, open(tmp, "w", newline="") as f:
        csv.writer(f).writerows([("source", "reason"), *earlier, *skipped])


def write_index(out, rows, name="index.jsonl"):
    with write_beside(Path(out) / name) as tmp:
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows))


def holds(corpus, row):
    """Whether the array of a row is there in full."""
    file = Path(corpus) / row["file"]
    return file.is_file() and file.stat().st_size >= 2 * np.prod(row["shape"])


def read_index(corpus, name="index.jsonl", whole=True):
    """The rows of a corpus; BadInput if it is not one, or (whole) if an array of it is missing or cut short."""
    path = Path(corpus) / name
    if not path.is_file():
        raise BadInput(f"{corpus}: no corpus there (index.jsonl); build one: python serialize.py --phantom, or --spatial DIR")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        arrays = {r["file"]: r for r in rows if r["shape"]}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BadInput(f"{path}: not an index of serialize.py; delete it and build the corpus again") from None
    for file, row in arrays.items() if whole else ():
        if not holds(corpus, row):
            full = Path(corpus) / file
            raise BadInput(f"{full}: {'cut short' if full.is_file() else 'missing'}; delete {path} and build the corpus again")
    return rows


# ---------------------------------------------------------------- splits


def split_by_patient(rows, val, seed, images=4):
    """Give each row without one its split, by patient: those with the smallest hash of (seed, patient) validate.

    A share `val` of the patients of each kind, at least one; semantic: of each type, at least `images`, since a sequence
    takes that many. None where that would leave fewer to train on. Patients that have a split keep it as a corpus grows.
    """
    def rank(patient):
        return hashlib.blake2b(f"{seed} {patient}".encode(), digest_size=8).hexdigest()
    split = {(r["kind"], r["patient"]): r["split"] for r in rows if "split" in r}
    strata = defaultdict(set)
    for r in rows:
        strata[r["kind"], r["group"] if r["kind"] == "semantic" else ""].add(r["patient"])
    for (kind, _), patients in sorted(strata.items()):
        least = images if kind == "semantic" else 1
        wanted = max(least, round(val * len(patients))) if len(patients) >= 2 * least else 0
        have = sum(split.get((kind, p)) == "val" for p in patients)
        for p in sorted(patients, key=rank):
            if (kind, p) not in split and have < wanted:
                split[kind, p] = "val"
                have += 1
    owners = defaultdict(set)                       # the same voxels may serve two kinds: they validate in both or in none
    for r in rows:
        owners[r["hash"]].add((r["kind"], r["patient"]))
    shared = [o for o in owners.values() if len(o) > 1]
    while moved := [p for o in shared if any(split.get(q) == "val" for q in o) for p in o if split.get(p) != "val"]:
        split.update(dict.fromkeys(moved, "val"))
    for r in rows:
        r["split"] = split.get((r["kind"], r["patient"]), "train")
    return rows


# ---------------------------------------------------------------- sequences


@lru_cache(maxsize=16384)
def open_array(path, shape):
    """A .npy of int16 as a tensor in the page cache. Unlike NumPy's, the map keeps no file open: corpora outnumber `ulimit -n`."""
    whole, used = os.path.getsize(path) // 2, int(np.prod(shape))
    return torch.from_file(path, shared=False, size=whole, dtype=torch.int16)[whole - used:].view(shape)


def window_of(crop, low=1.0, high=99.9):
    """The `low`th and `high`th percentiles of an int16 tensor [x, y, z], as order statistics, from a histogram.

    # departs: of a crop of more than 64³ voxels every third row is counted, a third of the time for the same window
    """
    values = crop[:, ::3 if crop.numel() > 64 ** 3 else 1].reshape(-1).numpy()
    least = int(values.min())
    counts = np.bincount((values - np.int16(least)).view(np.uint16))  # the difference wraps around, its bits are right
    rank = np.floor(np.array([low, high]) / 100 * (values.size - 1))
    return np.searchsorted(np.cumsum(counts), rank, side="right") + least


@lru_cache(maxsize=256)
def linear_weights(n, m):
    """Matrix [n, m] that resamples n values linearly to m, half-voxel centres."""
    return F.interpolate(torch.eye(n)[None], m, mode="linear")[0]


def resize(crop, shape):
    """int16 [x, y, z] -> int16 of `shape`, trilinear: a matrix product along each axis that changes."""
    if crop.shape == tuple(shape):
        return crop
    volume = crop.float()
    for axis, (n, m) in enumerate(zip(crop.shape, shape)):
        if n != m:
            volume = (volume.movedim(axis, -1) @ linear_weights(n, m)).movedim(-1, axis)
    return volume.round_().short()


def cut(array, start, shape):
    """The box of `shape` (or what there is of it) at `start`: a view."""
    return array[tuple(slice(a, a + n) for a, n in zip(start, shape))]


class Sequences(torch.utils.data.Dataset):
    """Sequence n of an endless supply, a function of (corpus, split, seed, n) alone.

    So a rank or a worker that takes other n has a stream of its own, and a run resumes from a step number. A sequence is
        volume  int16 [size, size, size], S sub-images side by side along z, as stored
        window  float32 [S, 2], the values that map to 0 and 1 (percentiles 1 and 99.9 of the crop or the sub-image)
        kind    int, an index of KINDS
    mix: {kind: weight}, or None: the kinds in turn (to validate). stride: between the starts of successive slabs, voxels.
    """

    def __init__(self, corpus, split="train", size=128, images=4, stride=8, mix=None, seed=0):
        if size % images:
            raise BadInput(f"volume {size} does not divide into {images} sub-images")
        self.root, self.size, self.images, self.depth, self.stride = Path(corpus), size, images, size // images, stride
        if not 1 <= stride <= (size - self.depth) // max(1, images - 1):
            raise BadInput(f"--stride {stride}: {images} slabs of {self.depth} slices reach beyond a crop of {size}")
        self.seed = [seed, ("train", "val").index(split)]
        rows = [r for r in read_index(corpus) if r["split"] == split]
        self.scans = [r for r in rows if r["kind"] == "spatial"]
        cases = self.group([r for r in rows if r["kind"] == "contrast"], "group")
        self.cases = [sorted(case, key=lambda r: CONTRASTS.index(r["contrast"])) for case in cases]
        types = self.group([r for r in rows if r["kind"] == "semantic"], "group")
        self.types = [t for t in (self.group(lesions, "patient") for lesions in types) if len(t) >= images]
        self.have = {"spatial": len(self.scans), "contrast": len(self.cases), "semantic": len(self.types)}
        self.kinds = [k for k in KINDS if self.have[k]]
        if mix is not None:
            self.kinds = [k for k in self.kinds if mix.get(k, 0) > 0]
            weights = np.array([mix[k] for k in self.kinds], float)
        if not self.kinds:
            raise BadInput(f"{corpus}: nothing to {'train on' if split == 'train' else 'validate with'}: "
                           f"{self.have} scans, patients and lesion types with {images} patients")
        self.weights = weights / weights.sum() if mix is not None else None

    @staticmethod
    def group(rows, key):
        """Rows by `key`, as lists in the order of the key."""
        groups = defaultdict(list)
        for r in rows:
            groups[r[key]].append(r)
        return [g for _, g in sorted(groups.items())]

    def __getitem__(self, n):
        rng = np.random.default_rng([*self.seed, n])
        kind = self.kinds[n % len(self.kinds)] if self.weights is None else str(rng.choice(self.kinds, p=self.weights))
        for _ in range(8):  # a box of nothing but background teaches nothing: draw another
            volume, window = getattr(self, kind)(rng)
            if (window[:, 1] > window[:, 0]).all():
                break
        return {"volume": volume, "window": window, "kind": KINDS.index(kind)}

    def array(self, row):
        return open_array(str(self.root / row["file"]), tuple(row["shape"]))

    def spatial(self, rng):
        """Slabs of one crop: D slices each, `stride` apart, the first at a random z of the crop."""
        array = self.array(self.scans[rng.integers(len(self.scans))])
        crop = cut(array, [rng.integers(max(1, n - self.size + 1)) for n in array.shape], [self.size] * 3)
        crop = resize(crop, [self.size] * 3)
        span = self.depth + (self.images - 1) * self.stride
        first = rng.integers(self.size - span + 1)
        slabs = crop[:, :, first:first + span].contiguous().unfold(2, self.depth, self.stride)  # [X, Y, S, D]
        return slabs.reshape(crop.shape), torch.from_numpy(window_of(crop)).float().expand(self.images, 2)

    def contrast(self, rng):
        """The same box in the co-registered contrasts of one patient."""
        case = self.cases[rng.integers(len(self.cases))]
        box = [self.size, self.size, self.depth]
        start = [rng.integers(max(1, n - b + 1)) for n, b in zip(case[0]["shape"], box)]
        return self.join([cut(self.array(case[s % len(case)]), start, box) for s in range(self.images)])

    def semantic(self, rng):
        """Lesions of one type from as many patients: the box's surroundings in plane, all the slices of the volume."""
        patients = self.types[rng.integers(len(self.types))]
        crops = []
        for p in rng.choice(len(patients), self.images, replace=False):
            row = patients[p][rng.integers(len(patients[p]))]
            start = [int(np.clip(round(c) - self.size // 2, 0, max(0, n - self.size)))
                     for c, n in zip(row["centre"], row["shape"])]
            crops.append(cut(self.array(row), [*start, 0], [self.size, self.size, row["shape"][2]]))
        return self.join(crops)

    def join(self, crops):
        """Sub-images side by side along z, each with the window of its own."""
        crops = [resize(crop, (self.size, self.size, self.depth)) for crop in crops]
        window = torch.stack([torch.from_numpy(window_of(crop)) for crop in crops]).float()
        return torch.cat(crops, 2), window


def published_mix(have):
    """Weights of the kinds by the published counts, for a dict kind -> scans, patients or lesion types."""
    return {k: PUBLISHED[k] * n for k, n in have.items()}


def parse_mix(text, have):
    """--mix published, equal or spatial=2,contrast=1,semantic=1 -> {kind: weight}."""
    if text == "published":
        return published_mix(have)
    if text == "equal":
        return {k: 1.0 for k in KINDS}
    try:
        mix = {k: float(v) for k, v in (part.split("=") for part in text.split(","))}
    except ValueError:
        mix = {}
    if not mix or set(mix) - set(KINDS) or not all(0 <= w < float("inf") for w in mix.values()):
        raise BadInput(f"--mix {text!r}: published, equal, or weights such as spatial=2,contrast=1,semantic=1")
    return mix


def ensure_phantom(size="small", seed=0, workers=None, say=print):
    """The corpus of made-up patients of `size`, built if it is not there yet: its folder."""
    from phantom import write_phantom
    root = Path("data") / ("phantom" if size == "small" else f"phantom-{size}")
    corpus = root / "corpus"
    if not (corpus / "index.jsonl").exists():
        say(f"making {size} phantom patients and their corpus in {root}")
        write_phantom(root, size=size, seed=seed, parts=("amos", "brats", "deeplesion"), workers=workers)
        jobs, skipped = collect([root / "amos"], [root / "brats"],
                                [root / "deeplesion/DL_info.csv", root / "deeplesion/Images_nifti"])
        build(jobs, skipped, corpus, val=0.2, seed=seed, workers=workers, say=say)
    return corpus


def find_corpus(where, named=None, before=None):
    """The corpus that was named, else that of an earlier run if it is there, else data/corpus, else the phantom's, which rank 0
    makes while the others wait."""
    for known in (named, before, "data/corpus"):
        if known and (known == named or Path(known, "index.jsonl").exists()):
            return str(known)
    where.say("no corpus named and no data/corpus: made-up patients it is")
    if where.main:
        ensure_phantom(say=where.say)
    where.barrier()
    return "data/phantom/corpus"


def collect(spatial=(), contrast=(), semantic=None, exclude=LABELS, patient=None):
    """Jobs for what the command line names, and what was left out before a file was opened."""
    parts = [spatial_jobs(spatial, exclude, patient), contrast_jobs(contrast)]
    if semantic:
        parts.append(semantic_jobs(*semantic))
    return [j for jobs, _ in parts for j in jobs], [s for _, skipped in parts for s in skipped]


# ---------------------------------------------------------------- inspect


def copyable(size, patch, images, stride, order):
    """Share of the tokens, and of the voxels, of a spatial sequence whose every voxel stands in an earlier token too."""
    from model import token_order
    g, depth = size // patch, size // images
    source = np.concatenate([s * stride + np.arange(depth) for s in range(images)])    # slice of the crop behind each z
    place = token_order((1, 1, g), images, order)                                       # one column (x, y) is as all others
    seen, tokens, voxels = set(), 0, 0
    for z in range(g) if place is None else place.tolist():
        slices = set(source[z * patch:(z + 1) * patch].tolist())
        tokens += slices <= seen
        voxels += len(slices & seen)
        seen |= slices
    return tokens / g, voxels / size


def inspect(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke
    from model import to_unit, token_order
    grid = (args.volume // args.patch,) * 3
    for order in ("raster", "image"):
        for stride in (args.volume // 16, args.volume // 4):
            tokens, voxels = copyable(args.volume, args.patch, args.images, stride, order)
            print(f"--order {order:6} --stride {stride:2}: {tokens:5.1%} of the tokens and {voxels:5.1%} of the voxels of a "
                  "spatial sequence are copies of earlier ones")
    data = Sequences(args.out, "train", args.volume, args.images, args.stride or args.volume // 16, None, args.seed)
    order = token_order(grid, args.images, args.order)
    place = torch.arange(grid[0] ** 3) if order is None else torch.argsort(order)      # place in the sequence of a patch
    place = place.view(grid)
    depth, p, S = data.depth, args.patch, args.images
    fig, axes = plt.subplots(len(data.kinds), S, figsize=(3 * S, 3.2 * len(data.kinds)), squeeze=False)
    for row, kind in enumerate(data.kinds):
        sample = data[row]
        volume = to_unit(sample["volume"][None], sample["window"][None])[0]
        for s, ax in enumerate(axes[row]):
            z = s * depth + depth // 2
            ax.imshow(volume[:, :, z].T, cmap="gray", origin="lower", vmin=0, vmax=1)
            numbers = place[:, :, z // p]
            colours = plt.get_cmap("viridis")(numbers / (grid[0] ** 3 - 1))
            for x in range(grid[0]):
                for y in range(grid[1]):
                    ax.text((x + .5) * p, (y + .5) * p, int(numbers[x, y]), color=colours[x, y], fontsize=7, ha="center", va="center",
                            path_effects=[withStroke(linewidth=1.5, foreground="black")])
            ax.set(xticks=np.arange(0, args.volume, p) - .5, yticks=np.arange(0, args.volume, p) - .5,
                   xticklabels=[], yticklabels=[])
            ax.set_title(f"{kind}, sub-image {s}", fontsize=9)
            ax.grid(color="white", alpha=0.15)
            ax.tick_params(length=0)
    fig.suptitle(f"place of each patch in the sequence (order {args.order}), middle slice of each sub-image")
    fig.tight_layout(h_pad=1.5)
    path = Path(args.out) / "inspect.png"
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=110)
    print(f"drew {path}")


# ---------------------------------------------------------------- bench


def bench(args):
    """Samples a second on one core with the arrays in the page cache, bytes a sample, and disk against pre-cut crops."""
    keep_freed_memory()
    torch.set_num_threads(1)
    stride = args.stride or args.volume // 16
    have = Sequences(args.out, "train", args.volume, args.images, stride, None, args.seed).have
    for kind in KINDS:
        if not have[kind]:
            print(f"{kind:>9}: none in {args.out}")
            continue
        data = Sequences(args.out, "train", args.volume, args.images, stride, {kind: 1.0}, args.seed)
        rows = {r["file"]: r for r in read_index(args.out) if r["kind"] == kind and r["split"] == "train"}
        for f in rows:                              # into the page cache
            (Path(args.out) / f).read_bytes()
        for n in range(4):
            data[n]
        times, end = [], time.perf_counter() + 5
        while time.perf_counter() < end:
            start = time.perf_counter()
            sample = data[4 + len(times)]
            times.append(time.perf_counter() - start)
        moved = sum(v.nbytes for v in sample.values() if isinstance(v, torch.Tensor))
        shapes = Counter("x".join(map(str, r["shape"])) for r in rows.values()).most_common(1)[0][0]
        print(f"{kind:>9}: {len(times) / sum(times):6.0f} samples/s on one core (median {1e3 * np.median(times):.1f} ms), "
              f"{moved / 1e6:.2f} MB a sample; {len(rows)} scans, mostly {shapes}")
        if kind == "spatial":
            disk = np.mean([(Path(args.out) / f).stat().st_size for f in rows])
            crops = 50 * 4 * args.volume ** 3
            print(f"{'':>9}  {disk / 1e6:.0f} MB of disk a scan for an endless supply of crops: {disk / crops:.0%} of the "
                  f"{crops / 1e6:.0f} MB of 50 pre-cut float32 crops")


# ---------------------------------------------------------------- main


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("scans")
    g.add_argument("--spatial", nargs="+", default=[], metavar="DIR", help="folders of CT or MR scans, searched below")
    g.add_argument("--contrast", nargs="+", default=[], metavar="DIR", help="folders of BraTS cases CASE/CASE-{t1n,t1c,t2w,t2f}.nii.gz")
    g.add_argument("--semantic", nargs=2, metavar=("CSV", "DIR"), help="DL_info.csv and Images_nifti of DeepLesion")
    g.add_argument("--phantom", nargs="?", const="small", choices=["small", "full"], help="made-up patients instead, in data/phantom[-full]")
    g.add_argument("--exclude", nargs="*", default=list(LABELS), metavar="GLOB", help="label maps, not scans (default: %(default)s)")
    g.add_argument("--patient", metavar="REGEX", help="finds the patient in a path (group 1, if any); default: the file's name, "
                   "or its folder where many files share a name")
    g = p.add_argument_group("corpus")
    g.add_argument("--out", help="folder of the corpus (default data/corpus; data/phantom/corpus with --phantom)")
    g.add_argument("--val", type=float, default=0.05, help="share of the patients kept for validation (default %(default)s)")
    g.add_argument("--workers", type=int, help="processes (default: one a core)")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("sequences, for --inspect and --bench")
    g.add_argument("--inspect", action="store_true", help="draw a sequence of each kind with its token order; print the copyable share")
    g.add_argument("--bench", action="store_true", help="samples a second, bytes a sample, disk")
    g.add_argument("--volume", type=int, default=128, help="edge of a sequence's volume (published: 128)")
    g.add_argument("--patch", type=int, default=16, help="edge of a patch (published: 16)")
    g.add_argument("--images", type=int, default=4, help="sub-images of a sequence (published: 4)")
    g.add_argument("--stride", type=int, help="slices between slabs (default a quarter of a slab; published: 8)")
    g.add_argument("--order", choices=["raster", "image"], default="raster", help="of the tokens (published: raster)")
    args = p.parse_args()
    if not 0 <= args.val <= 0.5:
        raise BadInput(f"--val {args.val}: a share between 0 and 0.5")
    for name in ("volume", "patch", "images"):
        if getattr(args, name) < 1 or args.volume % getattr(args, name):
            raise BadInput(f"--{name} {getattr(args, name)}: 1 or more, and a divisor of --volume {args.volume}")
    scans = args.spatial or args.contrast or args.semantic
    if not (scans or args.phantom or args.inspect or args.bench):
        raise BadInput("nothing to do: name scans (--spatial, --contrast, --semantic), or --phantom, --inspect or --bench")
    if args.phantom:
        if scans or args.out:
            raise BadInput("--phantom has a folder of its own: leave out --out, --spatial, --contrast and --semantic")
        args.out = ensure_phantom(args.phantom, args.seed, args.workers)
    args.out = args.out or "data/corpus"
    if scans:
        build(*collect(args.spatial, args.contrast, args.semantic, args.exclude, args.patient),
              args.out, args.val, args.seed, args.workers)
    if args.inspect:
        inspect(args)
    if args.bench:
        bench(args)


if __name__ == "__main__":
    cli(main)
