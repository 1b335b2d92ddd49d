"""Scans on disk -> a corpus of memory-mapped int16 arrays -> an endless supply of sequences.

    python serialize.py --phantom       # made-up patients and their corpus, a minute on two cores
    python serialize.py --spatial data/amos/imagesTr data/flare --contrast data/brats \\
        --semantic data/deeplesion/DL_info.csv data/deeplesion/Images_nifti --out data/corpus
    python serialize.py --out data/corpus --inspect   # draws one sequence of each kind, numbered
    python serialize.py --out data/corpus --bench     # samples a second, bytes a sample
    python serialize.py --bench         # the same of noise in full size: half a minute, 0.7 GB
    python serialize.py --spatial data/amos --check   # what would be read, and what not and why
    python serialize.py --out data/corpus --check     # whether every array is as it was written
    python serialize.py --audit data/corpus --against data/msd  # test scans pre-trained on

Run it again to add scans, or to go on after a stop: what the corpus already holds is not read
again. A corpus is
    index.jsonl     a line an array (or a lesion): kind, source, hash, shape, spacing, patient, …
    arrays/*.npy    one int16 array a scan, [X, Y, Z] in RAS+; value = stored · slope + inter
    skipped.csv     every file that could not be used, and why

Sections: arguments · reading scans · jobs, one a scan or case · building a corpus · checking and
auditing · splits · sequences · finding a corpus · inspect · bench

X Y Z voxels, S sub-images of a sequence laid side by side along z, D = Z/S their depth.
"""

import argparse
import fnmatch
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from common import (
    BadInput,
    Machine,
    batches,
    check_least,
    cli,
    cores,
    figure_of,
    is_like,
    keep_freed_memory,
    lock_of,
    new_parser,
    parallel,
    read_table,
    save_figure,
    write_beside,
    write_table,
    write_text,
)
from model import SHEETS, SIZES, USE, Config, Model, timed, to_unit, token_order
from phantom import write_phantom

KINDS = ("spatial", "contrast", "semantic")
SPLITS = ("train", "val")
CONTRASTS = ("t1n", "t1c", "t2w", "t2f")  # BraTS 2023, in the published order
# crops a scan, boxes a patient, tuples a lesion type
PUBLISHED = {"spatial": 50, "contrast": 100, "semantic": 20_000}
NIFTI = (".nii", ".nii.gz", ".hdr")
SITK = (".mha", ".mhd", ".nrrd", ".nhdr", ".dcm")
ARRAYS = (".h5", ".npz")  # UA-MT's left atria, MedMNIST's volumes
ATRIUM = 0.625  # mm, isotropic: what the challenge's atria have and their HDF5 files do not say
# label maps: matched below the folder that is named, in lower case
LABELS = ("*/label*", "*/mask*", "*/segmentation*", "*/derivatives/*", "*/laendo.*", "*[-_]gt.*")
LABELS += ("*[-_]seg.*", "*[-_]mask.*", "*[-_]msk.*", "*[-_]label.*", "*[-_]segmentation.*")
SMALLEST = 8  # voxels along an axis; less is a 2D image or a scout
LARGEST = "AR3D_LARGEST"  # where --largest stands: in the environment, for worker processes
SLACK = 2**20  # bytes that may follow the voxels in a file
nib.imageglobals.logger.setLevel("CRITICAL")  # it would say of a header what names no file

# ---- arguments -------------------------------------------------------------------------------


def flags():
    p = new_parser(__doc__)
    add = p.add_argument_group("scans").add_argument
    add("--spatial", nargs="+", metavar="DIR", help="folders of CT or MR scans, searched below")
    add(
        "--contrast", nargs="+", metavar="DIR", help="folders of BraTS cases CASE/CASE-t1n.nii.gz …"
    )
    add("--semantic", nargs=2, metavar=("CSV", "DIR"), help="DeepLesion: DL_info.csv, Images_nifti")
    add("--phantom", action="store_true", help="made-up patients in data/phantom; a fifth validate")
    add("--exclude", nargs="*", default=LABELS, metavar="GLOB", help="label maps: %(default)s")
    add(
        "--patient",
        metavar="REGEX",
        help="names the patient (group 1, if any) in a scan's path; default: file or folder",
    )
    size_flag(add)
    add = p.add_argument_group("corpus").add_argument
    add("--out", help="folder (default data/corpus; --phantom: data/phantom/corpus)")
    add(
        "--val", type=float, default=0.05, help="share of the patients that validate (default 0.05)"
    )
    add("--spacing", nargs=3, type=float, metavar="MM", help="of what is stored (default: its own)")
    add("--workers", type=int, help="processes (default: one a core)")
    add("--seed", type=int, default=0, help="of the split and of made-up patients (default 0)")
    add("--check", action="store_true", help="of the scans named, or of a corpus: what is amiss")
    add("--audit", metavar="CORPUS", help="tell which scans of --against are in it")
    add("--against", metavar="DATA", help="by their voxels, and by patient")
    add = p.add_argument_group("sequences, for --inspect and --bench").add_argument
    add("--inspect", action="store_true", help="draw the token order; print the copyable share")
    add("--bench", action="store_true", help="samples/s, bytes; of noise if there is no --out")
    add("--volume", type=int, default=128, help="edge of a sequence (published: 128)")
    add("--patch", type=int, default=16, help="edge of a patch (published: 16)")
    add("--stride", type=int, help="slices between slabs (published, of 128: 8)")
    add("--order", choices=["raster", "image"], default="raster", help="published: raster")
    return p


def size_flag(add):
    """--largest of a script that reads scans."""
    words = "that a scan may have, as it is or resampled (default 512)"
    add("--largest", type=set_largest, metavar="MVOXELS", help=words)


def set_largest(text):
    """Have --largest, Mvoxels (2²⁰) above 0, hold here and in processes begun from here."""
    if not float(text) > 0:
        raise ValueError
    os.environ[LARGEST] = text
    return float(text)


def sequence_flags(p):
    """The flags of a stage that trains on a corpus."""
    add = p.add_argument_group("sequences").add_argument
    add("--data", nargs="+", help="corpora (default data/corpus; without one, the phantom's)")
    add("--volume", type=int, help="edge in voxels (default 128; nano 64)")
    words = "slices between slabs (published 8; nano 16: no copies; atria, 8 labels: Dice +0.07)"
    add("--stride", type=int, help=words)
    add("--mix", help="published (the kinds' counts), equal, or spatial=2,contrast=1,semantic=1")
    add("--val-samples", type=int, help="of each kind, to validate with (default 64; nano 16)")


def settle(args):
    if not 0 <= args.val <= 0.5:
        raise BadInput(f"--val {args.val}: a share between 0 and 0.5")
    check_least(args, volume=16, seed=0)
    if args.volume % args.patch:
        raise BadInput(f"--patch {args.patch}: not a divisor of --volume {args.volume}")
    args.scans = args.spatial or args.contrast or args.semantic
    if not (args.scans or args.phantom or args.inspect or args.bench or args.check or args.audit):
        raise BadInput(
            "nothing to do: name scans (--spatial, --contrast, --semantic), --phantom, --inspect, "
            "--bench, --check or --audit"
        )
    if args.audit and not args.against:
        raise BadInput(f"--audit {args.audit}: name the scans, --against DATA")
    if args.phantom and (args.scans or args.out or args.patient or args.spacing):
        raise BadInput(
            "--phantom has a folder and scans of its own: no --out, --patient, --spacing"
        )
    if args.scans or args.inspect or args.check:
        args.out = Path(args.out or "data/corpus")
    args.stride = args.stride or args.volume // 16


def main():
    args = flags().parse_args()
    settle(args)
    if args.phantom:
        args.out = ensure_phantom(args.seed, args.workers)
        print(f"{args.out} is there; delete {args.out.parent} to have others made")
    if args.audit:
        return audit(args)
    if args.scans:
        jobs = collect(  # and what is left out
            args.spatial or [], args.contrast or [], args.semantic, args.exclude, args.patient
        )
        if args.check:
            return check_scans(*jobs, args.workers)
        with lock_of(args.out):
            build(*jobs, args.out, args.val, args.seed, args.workers, args.spacing)
    elif args.check:
        return check_corpus(args.out, args.workers)
    if args.inspect or args.bench:
        with tempfile.TemporaryDirectory() as folder:
            if not args.out:
                print(f"no corpus named (--out): noise in full size it is, in {folder}")
                write_noise(folder)
            data = Sequences(
                args.out or folder, size=args.volume, stride=args.stride, seed=args.seed
            )
            if args.inspect:
                inspect(data, args.patch, args.order, args.out)
            if args.bench:
                bench(data)


# ---- reading scans ---------------------------------------------------------------------------


def suffix_of(path):
    """The (double) suffix of a scan's file, None if it has none of those that are read."""
    return next((s for s in NIFTI + SITK + ARRAYS if str(path).lower().endswith(s)), None)


def stem_of(path):
    """File name without its (double) suffix."""
    name = path.name
    return name[: len(name) - len(suffix_of(path) or "")]


def read_scan(path):
    """A scan in RAS+: values [X, Y, Z] or [X, Y, Z, T], its affine (mm), the affine of the file.

    Integers where the file holds integers and its slope is 1, else float32 with slope and intercept
    applied. DICOM (a folder), MHA and NRRD need SimpleITK, HDF5 h5py. Of a MedMNIST npz the volumes
    to train on are the frames. BadInput says what is wrong with a file.
    """
    readers = dict.fromkeys(NIFTI, read_nifti) | {".h5": read_h5, ".npz": read_npz}
    suffix = None if Path(path).is_dir() else suffix_of(path)
    values, affine = because(readers.get(suffix, read_sitk), path)
    check_volume(values.shape, values.dtype)
    axes = nib.orientations.io_orientation(affine)
    ras = affine @ nib.orientations.inv_ornt_aff(axes, values.shape[:3])
    return nib.orientations.apply_orientation(values, axes), ras, affine


def because(reader, *args):
    """reader(*args), where whatever a library raises becomes BadInput: one line that says why."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said in that line
            return reader(*args)
    except BadInput:
        raise
    except Exception as e:  # noqa: BLE001  (a dozen types; a user can mend them)
        why = str(e).split(":\n", 1)[-1]  # SimpleITK's begins with a place
        raise BadInput(f"unreadable: {type(e).__name__}: {why}".splitlines()[0][:180]) from None


def read_named(path, reader=read_scan):
    """reader(path), where BadInput names the file."""
    try:
        return because(reader, path)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def header_of(path):
    """The image of a NIfTI file, its voxels not read, and its affine in mm; BadInput: no volume."""
    img = nib.load(path)
    if not isinstance(img, nib.nifti1.Nifti1Pair):
        raise BadInput(f"a {type(img).__name__}, not a NIfTI volume")
    stored = img.get_data_dtype()
    check_volume(img.shape, stored)
    holder = img.file_map.get("header", img.file_map["image"])
    with holder.get_prepare_fileobj("rb") as f:  # as it is: nibabel mends what it shows
        bits = int(type(img.header).from_fileobj(f, check=False)["bitpix"])
    offset, least = img.dataobj.offset, img.header.is_single * img.header.single_vox_offset
    if bits != 8 * stored.itemsize or offset < least:
        raise BadInput(
            f"its header is damaged: bitpix {bits} with voxels of type {stored}, from byte {offset}"
        )
    unit = {"meter": 1000.0, "micron": 0.001}.get(img.header.get_xyzt_units()[0], 1.0)
    return img, checked_affine(np.diag([unit, unit, unit, 1]) @ img.affine)


def checked_affine(affine):
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise BadInput("its affine is singular: the header does not say where the voxels are")
    return affine


def check_volume(shape, dtype):
    """BadInput if an array of this shape and type is not a volume, or frames, of numbers."""
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise BadInput(f"2D ({text_of(shape)})")
    if len(shape) > 4 or min(shape) < 1:
        raise BadInput(f"{len(shape)} axes ({text_of(shape)}), as a vector field has, or none")
    if dtype.kind not in "iuf":
        raise BadInput(f"voxels of type {dtype}, neither integers nor floats")
    check_memory(shape)


def check_size(shape):
    """BadInput if a scan of this shape is too small to be cut."""
    if min(shape) < SMALLEST:
        raise BadInput(f"{text_of(shape)}: fewer than {SMALLEST} voxels along an axis")


def check_memory(shape):
    """BadInput if there are more voxels than --largest, or than the memory holds as float32."""
    most, memory = float(os.environ.get(LARGEST, "512")), machine_memory()
    if math.prod(map(int, shape)) > min(most * 2**20, memory / 4):
        raise BadInput(
            f"{text_of(shape)} voxels: more than the {most:g} Mvoxels of --largest, or than the "
            f"{memory / 1e9:.1f} GB of memory hold as float32; its header may be wrong (sizes, "
            "units), or --spacing too fine"
        )


def machine_memory():
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_nifti(path):
    img, affine = header_of(path)
    voxels = img.dataobj
    slope, inter = voxels.slope, voxels.inter
    raw = voxels_of(img.file_map["image"].filename, voxels.offset, voxels.dtype, voxels.shape)
    if img.shape[3:] == (1,):  # one frame: a volume
        raw = raw[..., 0]
    if raw.dtype.kind == "f" or slope != 1 or inter != int(inter):
        return raw.astype(np.float32) * np.float32(slope) + np.float32(inter), affine
    if inter:
        raw = raw.astype(np.int32 if raw.dtype.itemsize <= 2 else np.int64) + int(inter)
    return raw, affine


def voxels_of(path, offset, dtype, shape):
    """The array that begins at byte `offset` of a file, plain or gzip.

    The stream is read to its end, where gzip keeps the checksum; memory is taken as bytes come.
    """
    size, data = offset + math.prod(shape) * dtype.itemsize, bytearray()
    with (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rb") as f:
        while part := f.read(min(SLACK, size - len(data))):
            data += part
        rest = len(f.read(SLACK + 1))
    if len(data) < size or rest > SLACK:
        have = f"{len(data):,} bytes" if len(data) < size else f"over {SLACK:,} bytes more"
        raise BadInput(f"holds {have}, where its header says {size:,}: cut short, or damaged")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F")


def read_sitk(path):
    try:
        import SimpleITK as sitk
    except ImportError:
        raise BadInput("DICOM, MHA and NRRD files need SimpleITK: pip install SimpleITK") from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    file = str(path)
    if Path(path).is_dir():
        reader = sitk.ImageSeriesReader()
        series = reader.GetGDCMSeriesIDs(file)
        if len(series) != 1:
            raise BadInput(
                f"a folder with {len(series)} DICOM series; one folder a series is needed"
            )
        slices, where = reader.GetGDCMSeriesFileNames(file, series[0]), "0020|0032"
        reader.SetFileNames(slices)
        reader.MetaDataDictionaryArrayUpdateOn()
        img = reader.Execute()
        known = [i for i in range(len(slices)) if reader.HasMetaDataKey(i, where)]
        at = [[float(mm) for mm in reader.GetMetaData(i, where).split("\\")] for i in known]
        steps = [math.dist(a, b) for a, b in itertools.pairwise(at)]  # positions may be rounded
        if steps and max(steps) > 1.5 * min(steps):
            raise BadInput("its slices are not evenly spaced: some may be missing")
    else:
        img = sitk.ReadImage(file)
    axes, components = img.GetDimension(), img.GetNumberOfComponentsPerPixel()
    if axes != 3 or components != 1:
        raise BadInput(f"{axes}D with {components} components; a scalar 3D image is needed")
    matrix = np.array(img.GetDirection()).reshape(3, 3) * img.GetSpacing()
    affine = nib.affines.from_matvec(matrix, img.GetOrigin())
    affine[:2] *= -1  # ITK points to the left and posterior, NIfTI to the right and anterior
    return sitk.GetArrayFromImage(img).transpose(2, 1, 0), checked_affine(affine)


def read_h5(path, name="image"):
    """`image`, or another array of UA-MT's left atria, and its affine."""
    try:
        import h5py
    except ImportError:
        raise BadInput("HDF5 files need h5py: pip install h5py") from None
    with h5py.File(path) as f:
        if name not in f:
            raise BadInput(f"an HDF5 file without {name}")
        check_volume(f[name].shape, f[name].dtype)
        return f[name][:], np.diag([ATRIUM] * 3 + [1])


def read_npz(path, name="train_images"):
    with np.load(path) as z:
        images = z[name]
    if images.ndim != 4:
        raise BadInput(f"its {name} are {images.dtype} {images.shape}, not [N, X, Y, Z]")
    return np.moveaxis(images, 0, 3), np.eye(4)


def save_like(scan, path, values, affine, slope=1):
    """uint8 values on the grid of `scan` as NIfTI, with its header (codes, units) if it has one."""
    header = because(nib.load, scan).header if suffix_of(scan) in NIFTI else None
    image = nib.Nifti1Image(values, affine, header)
    image.header.set_xyzt_units("mm")
    image.set_data_dtype(np.uint8)
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header.set_slope_inter(slope, 0)  # set, so that the bytes are stored as they are
    with write_beside(path) as tmp:
        nib.save(image, tmp)


def text_of(shape):
    return "x".join(map(str, shape))


def apart(a, b, shape):
    """How far two affines place the corners of a volume of `shape` apart, in voxels of `b`."""
    corners = [*np.ndindex(2, 2, 2)] * np.subtract(shape[:3], 1)
    moved = nib.affines.apply_affine(np.linalg.inv(b) @ a, corners)
    return np.abs(moved - corners).max()


def check_finite(values):
    finite = np.isfinite(values)
    if not finite.all():
        raise BadInput(f"{(~finite).sum()} voxels are NaN or infinite")


def normalise(values, intensity_range):
    """Values -> float32: (low, high) or "percentiles" (1, 99.9) to [0, 1], or "zscore"."""
    values = np.asarray(values, np.float32)
    check_finite(values)
    if intensity_range == "zscore":
        return (values - values.mean()) / max(values.std(), 1e-6)
    if intensity_range == "percentiles":
        intensity_range = np.percentile(values, [1, 99.9])
    low, high = intensity_range
    return np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)


def to_int16(values):
    """Values -> int16 and the slope and inter that give them back: exact for 16 bits of integers.

    Floats are spread over the 65,535 levels from their minimum to their maximum, outliers clipped
    one span beyond the 0.01st and 99.99th percentiles.
    """
    check_finite(values)
    low, high = values.min().item(), values.max().item()
    if low == high:
        raise BadInput(f"all voxels are equal ({low:g})")
    whole = values.dtype.kind != "f" or np.array_equal(values, np.rint(values))
    if whole and high - low <= 65535:
        inter = 0 if low >= -32768 and high <= 32767 else int(low) + 32768
        moved = values.astype(np.int64) - inter if inter else values
        return np.ascontiguousarray(moved, np.int16), 1.0, inter
    a, b = np.percentile(values, [0.01, 99.99])
    if b > a:
        low, high = max(low, a - (b - a)), min(high, b + (b - a))
    slope = (high - low) / 65534
    inter = low + 32767 * slope
    levels = np.rint((np.clip(values, low, high) - inter) / slope)
    return np.ascontiguousarray(levels, np.int16), slope, inter


# ---- jobs, one a scan or case ----------------------------------------------------------------
# A job is a dict: kind, source (a path as it was named), job (the same, absolute), files (its
# scans), patient, group (contrast: the case) and lesions (semantic). The functions that look for
# jobs yield, in between, (source, reason) of what they leave out.


def collect(spatial=(), contrast=(), semantic=None, exclude=LABELS, patient=None):
    """Jobs for what the command line names, and what was left out before a file was opened."""
    seen = [*spatial_jobs(spatial, exclude, patient), *contrast_jobs(contrast, patient)]
    if semantic:
        seen += semantic_jobs(*semantic)
    return [j for j in seen if isinstance(j, dict)], [s for s in seen if isinstance(s, tuple)]


def job_of(kind, source, patient, group="", files=None, lesions=(None,)):
    return {
        "kind": kind,
        "source": source,
        "job": os.path.abspath(source),
        "files": files or [source],
        "patient": patient,
        "group": group,
        "lesions": lesions,
    }


def spatial_jobs(folders, exclude, patient):
    for folder in map(Path, folders):
        scans, labels = scans_under(folder, exclude)
        for f in labels:
            yield f, "looks like a label map (--exclude)"
        often = Counter(map(stem_of, scans))
        tests = names_in(folder, "test.list")
        for f in scans:
            if f.parent.name in tests:
                yield f, "stands in test.list"
                continue
            who = patient_of(f, folder, often[stem_of(f)] > 1, patient)
            yield job_of("spatial", f, f"{folder.name}/{who}")


def names_in(folder, title):
    """The names in UA-MT's lists of that title, which lie in the folder or beside it."""
    files = {*(f for f in below(folder) if f.name == title), *folder.parent.glob(title)}
    return {n for f in files for n in read_named(f, Path.read_text).lstrip("\ufeff").split()}


def below(folder):
    """The files below a folder, then those in linked folders, each folder once."""
    seen, tops = set(), [folder]  # a link may lead back
    for top in tops:
        for at, folders, files in os.walk(top):
            if (real := os.path.realpath(at)) in seen:
                folders.clear()
                continue
            seen.add(real)
            tops += filter(os.path.islink, (os.path.join(at, name) for name in sorted(folders)))
            yield from (Path(at, name) for name in files)


def scans_under(folder, exclude):
    """Scans (files, or folders of DICOM slices) below `folder`, and files that look like labels."""
    if not folder.exists():
        raise BadInput(f"{folder}: no such folder")
    scans, labels = {}, []  # scans: a dict, for an ordered set
    for f in sorted([folder] if folder.is_file() else below(folder)):
        litter = f.name.startswith("._")  # of macOS
        if litter or not f.is_file() or not (suffix_of(f) or is_dicom(f)):
            continue
        name = f"/{f.relative_to(folder) if folder.is_dir() else f.name}".lower()
        if any(fnmatch.fnmatch(name, p.lower()) for p in exclude):
            labels.append(f)
        else:
            scans[f.parent if suffix_of(f) in (".dcm", None) else f] = None
    if not scans:
        raise BadInput(
            f"{folder}: no scans in it ({', '.join(NIFTI + SITK + ARRAYS)}), {len(labels)} label "
            "files aside"
        )
    return list(scans), labels


def is_dicom(path):
    """Whether a file without a suffix is DICOM: slices are exported as IM0001, or as 1.2.840.1."""
    if re.search(r"\.\D", path.name):
        return False
    try:
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return True  # what cannot be read is tried, and listed with the reason


def patient_of(file, folder, shared_name, regex=None):
    """Whose scan it is, so that no patient stands on both sides of the split.

    What --patient finds in the path, a BIDS or BraTS patient in it, the first folder of a DICOM
    series (below train or test), the folder of a file whose name many have, or the file's name
    (less the day, CASE_day012, and nnU-Net's channel, CASE_0000).
    """
    if regex:
        try:
            match = re.search(regex, str(file))
        except re.error as e:
            raise BadInput(f"--patient {regex!r}: not a regular expression ({e})") from None
        who = match and match[min(1, match.re.groups)]
        if not who:
            raise BadInput(f"--patient {regex!r} does not match {file}")
        return who
    name = file.relative_to(folder) if folder.is_dir() else Path(file.name)
    if known := re.search(r"sub-[A-Za-z0-9]+|BraTS-[A-Za-z]+-\d{5}", str(name)):
        return known.group()
    if file.is_dir():
        return next(
            (p for p in name.parts if not re.fullmatch("(train|test)(_images)?", p)), file.name
        )
    if shared_name:
        return str(name.parent if name.parent.name else file.parent)
    return re.sub(r"(?<=\d)(_day\d+)?(_000\d)?$", "", stem_of(file))


def contrast_jobs(folders, patient=None):
    """A job a folder CASE/CASE-{t1n,…}.nii.gz."""
    for folder in map(Path, folders):
        cases = sorted(
            {f.parent for f in below(folder) if ".nii" in f.name and not f.name.startswith("._")}
        )
        if not cases:
            raise BadInput(
                f"{folder}: no such folder, or no case folders CASE/CASE-t1n.nii.gz in it"
            )
        for case in cases:
            paths = [[case / f"{case.name}-{c}{s}" for s in NIFTI] for c in CONTRASTS]
            files = [next(filter(Path.is_file, p), None) for p in paths]
            if None in files:
                yield case, f"lacks {case.name}-{CONTRASTS[files.index(None)]}.nii.gz"
            else:
                who = patient_of(files[0], folder, True, patient)
                yield job_of("contrast", case, who, str(case), files)


def semantic_jobs(table, folder):
    """A job a volume of DeepLesion with its lesions by DL_info.csv (columns 0, 6, 9 and 11)."""
    if not Path(folder).is_dir():
        raise BadInput(
            f"--semantic {table} {folder}: DL_info.csv and the folder Images_nifti are needed"
        )
    lesions = defaultdict(list)
    for n, row in enumerate(read_table(table, "DeepLesion's DL_info.csv"), 2):
        try:
            row = [*row.values()]
            x1, y1, x2, y2 = map(float, row[6].split(","))
            lesion = int(row[9]), (y1 + y2) / 2, (x1 + x2) / 2  # type, row, column
            start, end = map(int, row[11].split(","))
            if not 0 <= x1 + y1 + x2 + y2 < math.inf:
                raise ValueError
        except (IndexError, ValueError, AttributeError):
            yield f"{table}:{n}", "cannot be read as a row of DL_info.csv"
            continue
        if lesion[0] == -1:
            yield f"{table}:{n}", "lesion of unknown type (-1)"
            continue
        case = row[0].rsplit("_", 1)[0]
        lesions[Path(folder, f"{case}_{start:03d}-{end:03d}.nii.gz")].append(lesion)
    for volume, marked in sorted(lesions.items()):
        if os.path.isfile(volume):
            yield job_of("semantic", volume, volume.name.split("_")[0], lesions=marked)
        else:
            yield volume, "named in DL_info.csv, but no such file"


# ---- building a corpus -----------------------------------------------------------------------

job_key = itemgetter("kind", "job")  # of a job and of a row
voxel_key = itemgetter("kind", "hash")
patient_key = itemgetter("kind", "patient")


def build(jobs, skipped, out, val=0.05, seed=0, workers=None, spacing=None, say=print):
    """Run the jobs that the corpus in folder `out` does not hold yet; write index and skipped.csv.

    spacing: mm, three, None: as it is. Returns the rows of the index; BadInput if there is none.
    """
    part = "index.part.jsonl"
    jobs, todo = {job_key(j): j for j in jobs}, []  # a dict: folders may overlap
    rows, held = [], []
    for name in ("index.jsonl", part):  # part: of a stopped run
        if (out / name).exists():  # what it was to read again, and this call does not name, stays
            new = read_index(out, name, whole=False)
            held += new
            mine = {*jobs, *map(job_key, new)}
            rows = new + [r for r in rows if job_key(r) not in mine]
    stamps = {job_key(r): r["stamp"] for r in rows}
    stamps |= {job_key(r): None for r in rows if not holds(out, r)}
    # --exclude may be new; of DICOM slices the job is their folder
    aside = {os.path.abspath(p) for source, _ in skipped for p in (source, Path(source).parent)}
    stamps |= dict.fromkeys({("spatial", p) for p in aside} - jobs.keys())
    for key, job in jobs.items():
        how = json.dumps([job["lesions"], job["patient"], spacing])
        stamp = [*stamp_of(job["files"]), digest(how, 8)]
        if stamps.get(key) != stamp:
            stamps[key] = None
            todo.append({**job, "out": out, "stamp": stamp, "spacing": spacing})
    rows = [r for r in rows if stamps[job_key(r)]]
    say(f"{len(jobs)} scans or cases, {len(jobs) - len(todo)} of them in {out} already")
    spatial = [j for j in jobs.values() if j["kind"] == "spatial"]
    if spatial:
        say(
            f"patients are found in the paths ({spatial[0]['source']} is of "
            f"{spatial[0]['patient']}); --patient REGEX says otherwise"
        )
    sources = {voxel_key(r): r["source"] for r in rows}
    saved = time.monotonic()
    for job, new, reason in parallel(store, todo, workers, "reading scans"):
        twins = [sources[voxel_key(r)] for r in new if voxel_key(r) in sources]
        if twins:  # the same voxels twice could stand on both sides of the split
            reason = f"the same voxels as {twins[0]}"
            for r in new:
                (out / r["file"]).unlink(missing_ok=True)
        if reason:
            skipped.append((job["source"], reason))
            continue
        sources |= {voxel_key(r): r["source"] for r in new}
        rows += new
        if time.monotonic() - saved > 10:  # a kill costs ten seconds of work
            write_index(out, rows, part)
            saved = time.monotonic()
    write_skipped(out / "skipped.csv", skipped, jobs.values())
    if not rows:
        last = "".join(f"; the last: {scan}: {reason}" for scan, reason in skipped[-1:])
        raise BadInput(
            f"none of the files could be used, {len(skipped)} skipped ({out}/skipped.csv)" + last
        )
    write_index(out, split_by_patient(rows, val, seed, held))  # who is read again stays put
    (out / part).unlink(missing_ok=True)
    summarise(rows, skipped, out, say)
    return rows


def stamp_of(files):
    """Number, bytes and the sum of the times (ns) of files, or of what is in them that are folders.

    Files of the same stamp need not be read again.
    """
    stats = []
    for f in map(Path, files):
        stats += map(Path.stat, filter(Path.exists, f.iterdir()) if f.is_dir() else [f])
    return [len(stats), sum(s.st_size for s in stats), sum(s.st_mtime_ns for s in stats)]


def digest(data, size):
    """A hash of a text or of bytes, in hexadecimal digits."""
    data = os.fsencode(data) if isinstance(data, str) else data  # file names may hold any byte
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def store(job):
    """Read the scans of a job, write an array a scan or frame: (job, rows, why skipped or None)."""
    rows = []
    try:
        scans = [read_scan(path) for path in job["files"]]
        rows += store_scans(job, scans)  # those before an error stay in it
        if not all(map(oriented, job["files"])):
            rows[0]["unoriented"] = True
        return job, rows, None
    except (ValueError, OverflowError, MemoryError) as e:  # BadInput is a ValueError
        for row in rows:
            (job["out"] / row["file"]).unlink(missing_ok=True)
        return job, [], str(e) or type(e).__name__


def oriented(path):
    """Whether a scan says how it lies: a NIfTI file may have neither sform nor qform."""
    if suffix_of(path) not in NIFTI:
        return True
    header = because(nib.load, path).header
    return header["sform_code"] or header["qform_code"]


def store_scans(job, scans):
    """Write the arrays of a job; yields the rows of the index."""
    shapes, npz = [values.shape for values, _, _ in scans], suffix_of(job["source"]) == ".npz"
    if len(set(shapes)) > 1:
        raise BadInput(f"its contrasts differ in shape: {', '.join(map(text_of, shapes))}")
    if len(shapes[0]) > 3 and job["kind"] != "spatial":
        raise BadInput(f"4D ({text_of(shapes[0])}) where one volume is needed")
    for n, (path, (values, affine, own)) in enumerate(zip(job["files"], scans)):
        if apart(affine, scans[0][1], values.shape) > 0.5:
            raise BadInput(
                f"its contrasts are not co-registered: {path.name} lies elsewhere than the first"
            )
        frames = np.moveaxis(values.reshape(*values.shape[:3], -1), 3, 0)
        grid = resampled(values.shape[:3], affine, job["spacing"])
        for t, frame in enumerate(frames):
            row = store_array(job, frame, *grid, f"{path}#{t}" if len(frames) > 1 else path)
            if npz:  # which names no patients: a volume is one
                row["patient"] += f"#{t}"
            if job["kind"] == "contrast":
                row["contrast"] = CONTRASTS[n]
            for lesion in job["lesions"]:
                yield row | place_lesion(lesion, own, *grid) if lesion else row


def store_array(job, values, shape, affine, source):
    """Write values [X, Y, Z], resized to the grid that is given, as an array of the corpus in
    job["out"]; returns its row.
    """
    check_size(shape)
    whole, slope, inter = to_int16(values)
    array = resize(torch.from_numpy(whole), shape).contiguous().numpy()
    source = os.path.abspath(source)
    name = f"{job['kind']} {source}"
    file = f"arrays/{digest(name, 10)}.npy"
    with write_beside(job["out"] / file) as tmp:
        np.save(tmp, array)
    return {
        **{k: job[k] for k in ("kind", "job", "stamp", "patient", "group")},
        "source": source,
        "hash": digest(whole, 16),
        "stored": digest(array, 16),
        "file": file,
        "shape": shape,
        "spacing": nib.affines.voxel_sizes(affine).round(4).tolist(),
        "slope": slope,
        "inter": inter,
    }


def resampled(shape, affine, spacing):
    """The shape nearest to `spacing` (mm; None: as it is) over the same extent, and its affine."""
    if spacing and not min(spacing) > 0:
        raise BadInput(f"--spacing {text_of(spacing)}: millimetres, above 0")
    size = nib.affines.voxel_sizes(affine)
    new = [max(1, round(n)) for n in (np.multiply(shape, size) / (spacing or size)).tolist()]
    check_memory(new)
    scale = np.divide(shape, new)
    return new, affine @ nib.affines.from_matvec(np.diag(scale), (scale - 1) / 2)


def place_lesion(lesion, own, shape, grid):
    """Centre (x, y) in the stored voxels of a box given in the file's (row, col); group: the type.

    own, grid: affines of the file and of what is stored, whose shape is given.
    """
    group, row, column = lesion
    x, y, *_ = (np.linalg.inv(grid) @ own @ [row, column, 0, 1]).tolist()
    if not (-0.5 <= x < shape[0] and -0.5 <= y < shape[1]):
        raise BadInput(f"a lesion at row {row:g}, column {column:g} lies outside of it")
    return {"group": str(group), "centre": [round(x, 1), round(y, 1)]}


def summarise(rows, skipped, out, say):
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        patients = Counter({r["patient"]: r["split"] for r in mine}.values())
        if mine:
            say(
                f"{kind:>9}: {len(mine)} {'lesions' if kind == 'semantic' else 'scans'}, "
                f"{patients['train']} patients to train on, {patients['val']} to validate"
            )
    blind = [r["source"] for r in rows if "unoriented" in r]
    if blind:
        say(
            f"warning: {len(blind)} have neither sform nor qform, {blind[0]} first: their "
            "orientation is not known, and taken as NIfTI's default"
        )
    first = {reason: source for source, reason in reversed(skipped)}
    for reason, n in Counter(reason for _, reason in skipped).most_common(10):
        say(f"  {reason}: {n} skipped, the first {first[reason]}")
    if skipped:
        say(f"{len(skipped)} skipped in all, each with its reason in {out / 'skipped.csv'}")


def write_skipped(path, skipped, jobs):
    """List what was skipped, after what earlier runs skipped and this one has not tried again."""
    tried = {str(source) for source, _ in skipped} | {str(j["source"]) for j in jobs}
    rows = read_table(path) if path.exists() else []
    earlier = [r.values() for r in rows if r["source"] not in tried]
    write_table(path, ("source", "reason"), [*earlier, *skipped])


def write_index(out, rows, name="index.jsonl"):
    write_text(Path(out) / name, "".join(f"{json.dumps(r)}\n" for r in rows))


def holds(corpus, row):
    """Whether the array of a row is there, of the row's size: a stopped build may have left others.

    NumPy's header of three axes takes 128 bytes.
    """
    at = os.path.join(corpus, row["file"])
    return os.path.isfile(at) and os.path.getsize(at) == 128 + 2 * math.prod(row["shape"])


ROW = {"kind": str, "file": str, "patient": (str, int), "group": (str, int), "shape": [int]}
MORE = {"split": str, "centre": [(int, float)]}


def is_row(r):
    """Whether it is like what `build` writes into an index."""
    if not is_like(r, ROW | MORE) or ROW.keys() - r.keys() or r["kind"] not in KINDS:
        return False
    placed = r["kind"] != "semantic" or len(r.get("centre", ())) == 2
    right = len(r["shape"]) == 3 and min(r["shape"]) > 0 and r.get("split", "val") in SPLITS
    return placed and right


def read_index(corpus, name="index.jsonl", whole=True, keys=None):
    """The rows of a corpus; BadInput if there is none or (whole) if an array is not all there.

    keys: of what is in a row, what to keep (all).
    """
    path = Path(corpus) / name
    if not path.is_file():
        raise BadInput(
            f"{corpus}: no corpus there (index.jsonl); build one: python serialize.py --phantom, "
            "or --spatial DIR"
        )
    decode, rows = json.JSONDecoder(parse_constant=int).decode, []
    try:
        with open(path) as lines:
            for r in map(decode, lines):
                if not is_row(r) or whole and "split" not in r:
                    raise ValueError
                rows.append(r if keys is None else {k: r[k] for k in keys if k in r})
    except (ValueError, OSError, RecursionError):
        raise BadInput(
            f"{path}: not an index of serialize.py; delete it and build the corpus again"
        ) from None
    for r in rows:
        if whole and not holds(corpus, r):
            file = os.path.join(corpus, r["file"])
            raise BadInput(
                f"{file}: {'cut short, or too long' if os.path.isfile(file) else 'missing'}; "
                f"delete {path} and build the corpus again"
            )
    return rows


def read_corpora(folders):
    """The rows of one or several corpora, with what a sequence needs; files with their folders.

    Who validates in one corpus, or shares voxels with someone who does, is trained on in none.
    Cases of one name in two corpora stay two: their contrasts share no grid.
    """
    folders, rows = [folders] if isinstance(folders, str | Path) else folders, []
    for folder in folders:
        for r in read_index(folder, keys=[*ROW, *MORE, "hash"]):
            r["file"] = os.path.join(folder, r["file"])
            if r["kind"] == "contrast":
                r["group"] = f"{folder} {r['group']}"
            rows.append(r)
    return split_by_patient(rows, 0, 0) if len(folders) > 1 else rows


# ---- checking and auditing -------------------------------------------------------------------


def check_scans(jobs, skipped, workers):
    """Print what `build` would read and what not, from headers, and what it would cost."""
    facts, files = [], defaultdict(list)
    for job, rows, reason in parallel(headers_of, jobs, workers, "reading headers"):
        facts += rows
        skipped += [(job["source"], reason)] * bool(reason)
    for row in facts:
        if os.path.isfile(row["file"]):  # not a folder of DICOM
            files[os.path.getsize(row["file"])].append(row["file"])
    twins = Counter(
        digest(Path(f).read_bytes(), 16) for same in files.values() if len(same) > 1 for f in same
    )
    for source, reason in skipped:
        print(f"left out: {source}: {reason}")
    patients = len({row["patient"] for row in facts})
    print(f"{len(facts)} files of {patients} patients can be read, {len(skipped)} are left out")
    if not facts:
        return
    for name in ("type", "orientation", "units"):
        print(f"{name}: {dict(Counter(row[name] for row in facts).most_common())}")
    for name in ("shape", "spacing"):
        three = np.quantile([row[name] for row in facts], [0, 0.5, 1], 0)
        words = [" x ".join(f"{n:.4g}" for n in v) for v in three]
        print("{}: least {}, median {}, most {}".format(name, *words))
    print(f"files that others have too, byte for byte: {sum(n - 1 for n in twins.values())}")
    disk, part, start = sum(row["disk"] for row in facts), 0, time.perf_counter()
    for row in facts[:: len(facts) // 5 + 1]:
        hashes_of(row["file"])
        part += row["disk"]
    seconds = (time.perf_counter() - start) * disk / part
    seconds /= cores() if workers is None else max(1, workers)
    print(
        f"a corpus of them: {disk / 1e9:.3g} GB at their own spacing, about {seconds / 60:.1f} min"
    )


def headers_of(job):
    """In a worker: (job, facts of each file, why it cannot be read or None)."""
    rows = []
    try:
        for path in job["files"]:
            if suffix_of(path) in NIFTI:
                img, affine = because(header_of, path)
                shape, units = img.shape, img.header.get_xyzt_units()[0]
                units += " (no sform, no qform)" * (not oriented(path))
            else:
                values, affine, _ = read_scan(path)
                shape, units = values.shape, "mm"
            check_size(shape[:3])
            rows.append(
                {
                    "file": path,
                    "patient": job["patient"],
                    "type": job["kind"],
                    "orientation": "".join(nib.aff2axcodes(affine)),
                    "units": units,
                    "shape": shape[:3],
                    "spacing": nib.affines.voxel_sizes(affine),
                    "disk": 2 * math.prod(shape),
                }
            )
    except (BadInput, OSError) as e:
        return job, [], str(e)
    return job, rows, None


def check_corpus(corpus, workers):
    """Read every array of a corpus; BadInput names those that are not what was written."""
    rows = {r["file"]: r for r in read_index(corpus)}.values()
    faults = [f for f in parallel(partial(fault_of, corpus), rows, workers, "reading arrays") if f]
    if faults:
        raise BadInput(f"{corpus}: {len(faults)} of {len(rows)} arrays are damaged: {faults[:3]}")
    print(f"{corpus}: all {len(rows)} arrays are as they were written")


def fault_of(corpus, row):
    try:
        array = open_array(str(corpus / row["file"]), tuple(row["shape"]))
    except BadInput as e:
        return str(e)
    return None if digest(array.numpy(), 16) == row.get("stored") else row["file"]


def audit(args):
    """Print which scans of --against a corpus holds: the same voxels, or a patient of one name."""
    rows, data = read_index(args.audit), Path(args.against)
    hashes = {r["hash"]: r["source"] for r in rows}
    # of spatial scans the name of the folder that was named stands before the patient's
    names = {str(r["patient"]).split("/", r["kind"] == "spatial")[-1]: r["source"] for r in rows}
    scans, _ = scans_under(data, args.exclude)
    often, found = Counter(map(stem_of, scans)), Counter()
    read = parallel(hashes_of, scans, args.workers, "reading scans")
    for own, scan in zip(read, scans):  # in this order the processes are ended
        who = patient_of(scan, data, often[stem_of(scan)] > 1, args.patient)
        same = [hashes[h] for h in own if h in hashes]  # own: of what is unreadable, a text
        if same or who in names:
            what = "voxels" if same else "name"
            print(f"{scan}: the same {what} as {same[0] if same else names[who]}")
        elif isinstance(own, str):
            what = "unreadable"
            print(f"{scan}: {own}")
        else:
            continue
        found[what] += 1
    print(
        f"{len(scans)} scans of {data}: {found['voxels']} are in {args.audit} voxel for voxel, "
        f"{found['name']} by name alone, {found['unreadable']} could not be read"
    )


def hashes_of(path):
    """In a worker: as `store_array` has them, of each frame; or why it cannot be read, a text."""
    try:
        if suffix_of(path) == ".npz":  # of MedMNIST: what it is tested on
            values, _ = because(read_npz, path, "test_images")
        else:
            values, _, _ = read_scan(path)
        frames = np.moveaxis(values.reshape(*values.shape[:3], -1), 3, 0)
        return [digest(to_int16(frame)[0], 16) for frame in frames]
    except (ValueError, OverflowError, MemoryError) as e:
        return str(e) or "not enough memory"


# ---- splits ----------------------------------------------------------------------------------


def split_by_patient(rows, val, seed, earlier=()):
    """Give each row without one its split, by patient: those of the smallest hashes validate.

    A share `val` of the patients of each kind, at least one; semantic: of each type, at least
    four, since a sequence takes that many. None where that would leave fewer to train on.
    Patients that have a split, here or in `earlier` rows, keep it as a corpus grows.
    """
    placed = [r for r in (*earlier, *rows) if "split" in r]
    known = set(map(patient_key, placed))
    held = {patient_key(r) for r in placed if r["split"] == "val"}
    strata, owners = defaultdict(set), defaultdict(set)
    for r in rows:
        strata[r["kind"], r["kind"] == "semantic" and r["group"]].add(patient_key(r))
        owners[r.get("hash") or r["file"]].add(patient_key(r))
    for (kind, _), patients in sorted(strata.items()):
        least = 4 if kind == "semantic" else 1
        wanted = max(least, round(val * len(patients))) if len(patients) >= 2 * least else 0
        new = sorted(patients - known - held, key=lambda p: digest(f"{seed} {p[1]}", 8))
        held.update(new[: max(0, wanted - len(patients & held))])
    # the same voxels may serve two kinds: those who own them validate in both or in none
    while torn := [group for group in owners.values() if group & held and group - held]:
        held.update(*torn)
    for r in rows:
        r["split"] = "val" if patient_key(r) in held else "train"
    return rows


def label_subset(patients, share, seed=0, strata=None):
    """The `share` of `patients` whose labels a run may see: a set is part of every larger one.

    share: above 0, up to 1; or the path of a list of names.

    Patients stand in the order of a hash of (seed, patient), so neither the list's order nor its
    length matters. With `strata` (one a patient: its class) the share is of each, at least one.
    """
    try:
        share = float(share)
    except ValueError:
        return listed_names(share, patients)
    if not 0 < share <= 1:
        raise BadInput(f"--labels {share:g}: a share of the training patients, above 0, up to 1")
    groups, chosen = defaultdict(dict), set()
    for n, patient in enumerate(patients):
        groups[None if strata is None else strata[n]][patient] = digest(f"{seed} {patient}", 8)
    for group in groups.values():
        chosen.update(sorted(group, key=group.get)[: max(1, round(share * len(group)))])
    return [p for p in dict.fromkeys(patients) if p in chosen]


def listed_names(path, patients):
    """The names in a text file, which must all be among `patients`."""
    try:
        names = Path(path).read_text("utf-8-sig").split()
    except (OSError, ValueError) as e:
        raise BadInput(f"--labels {path}: neither a share nor a list of names ({e})") from None
    unknown = {*names} - {*patients}
    if unknown or not names:
        raise BadInput(
            f"--labels {path}: {len(unknown)} of its {len(names)} names are not in the training "
            f"split, or of no use: {', '.join(sorted(unknown)[:3])}"
        )
    return names


# ---- sequences -------------------------------------------------------------------------------


class Sequences(torch.utils.data.Dataset):
    """Sequence n of an endless supply, a function of (corpus, split, seed, n) alone.

    So a rank or a worker that takes other n has a stream of its own, and a run resumes from a step
    number. A sequence is
        volume  int16 [size, size, size], S sub-images side by side along z, as stored
        ranges  float32 [S, 2], the values that map to 0 and 1 (`intensity_range` of the crop or the
                sub-image)
        kind    int, an index of KINDS
    mix: {kind: weight}, or what `parse_mix` takes, or None: the kinds in turn (to validate).
    stride: between the starts of successive slabs, voxels. depth: D. kinds: those it draws from.
    have: {kind: scans, patients, or lesion types with enough patients}.
    corpus: a folder, several, or other Sequences, whose index is not read again. named: those.
    """

    def __init__(self, corpus, split="train", size=128, images=4, stride=8, mix=None, seed=0):
        if size % images:
            raise BadInput(f"volume {size} does not divide into {images} sub-images")
        self.size, self.images, self.stride = size, images, stride
        self.depth = size // images
        most = (size - self.depth) // max(1, images - 1)
        if not 1 <= stride <= most:
            raise BadInput(
                f"--stride {stride}: {images} slabs of {self.depth} slices reach beyond a crop "
                f"of {size}; at most {most}"
            )
        self.seed = [seed, SPLITS.index(split)]
        self.named = getattr(corpus, "named", corpus)
        self.index = corpus.index if isinstance(corpus, Sequences) else read_corpora(corpus)
        rows = [r for r in self.index if r["split"] == split]
        self.rows = {k: [r for r in rows if r["kind"] == k] for k in KINDS}
        self.scans, contrasts, lesions = self.rows.values()
        self.cases = grouped(contrasts, "group")  # each in the order of CONTRASTS, as built
        types = [grouped(rows, "patient") for rows in grouped(lesions, "group")]
        self.types = [patients for patients in types if len(patients) >= images]
        self.have = dict(zip(KINDS, map(len, (self.scans, self.cases, self.types))))
        if isinstance(mix, str):
            mix = parse_mix(mix, self.have)
        self.kinds = [k for k in KINDS if self.have[k] and (mix is None or mix.get(k))]
        if not self.kinds:
            raise BadInput(
                f"{self.named}: nothing to {'train on' if split == 'train' else 'validate with'}: "
                f"{self.have} scans, patients and lesion types with {images} patients"
            )
        self.weights = mix and np.array([mix[k] for k in self.kinds], float)

    def __getitem__(self, n):
        return self.whole(self.read(n))

    def whole(self, batch):
        """What `read` gave, a sample or a batch, with volume [(B,) size, size, size]: the slabs out
        of the slices that they share, side by side.
        """
        volume = batch["volume"]
        if volume.shape[-1] < self.size:
            volume = volume.unfold(-1, self.depth, self.stride).flatten(-2)
        return batch | {"volume": volume}

    def read(self, n, room=None):
        """Sequence n, its voxels in room["volume"] (room None: in new memory): int16 [size, size,
        size], or [size, size, D + (S − 1) · stride] where all sequences are spatial: see `whole`.
        """
        rng = np.random.default_rng([*self.seed, n])
        kind = self.kinds[n % len(self.kinds)]
        if self.weights is not None:
            kind = str(rng.choice(self.kinds, p=self.weights / self.weights.sum()))
        for _ in range(8):  # a box of nothing but background teaches nothing: draw another
            crops, measured = getattr(self, kind)(rng)
            ranges = torch.from_numpy(np.stack([*map(intensity_range, measured)])).float()
            if (ranges[:, 1] > ranges[:, 0]).all():
                break
        volume = torch.cat(crops, 2, out=room and room["volume"])
        ranges = ranges.repeat(self.images // len(ranges), 1)
        return {"volume": volume, "ranges": ranges, "kind": KINDS.index(kind)}

    def array(self, row):
        if not holds("", row):  # cut short under a run: reading on would kill the process
            raise BadInput(f"{row['file']}: cut short, replaced or removed since this run began")
        return open_array(row["file"], tuple(row["shape"]))

    # each draws S crops [X, Y, D] and says what their intensity ranges are of: one or each

    def spatial(self, rng):
        """Slabs of one crop: D slices each, `stride` apart, the first at a random z of the crop."""
        [crop] = self.boxes(rng, [drawn(rng, self.scans)], self.size)
        span = self.depth + (self.images - 1) * self.stride
        first = rng.integers(self.size - span + 1)
        slab = span if self.kinds == ["spatial"] else self.depth
        slabs = crop[:, :, first : first + span].unfold(2, slab, self.stride)  # [X, Y, S, D]
        return slabs.unbind(2), [crop]

    def contrast(self, rng):
        """The same box in the co-registered contrasts of one patient."""
        rows = (drawn(rng, self.cases) * self.images)[: self.images]
        crops = self.boxes(rng, rows, self.depth)
        return crops, crops

    def boxes(self, rng, rows, depth):
        """A box [size, size, depth] at random, the same of the arrays of all rows."""
        box = [self.size, self.size, depth]
        start = [rng.integers(max(1, n - b + 1)) for n, b in zip(rows[0]["shape"], box)]
        return [resize(cut(self.array(row), start, box), box) for row in rows]

    def semantic(self, rng):
        """Lesions of one type from as many patients."""
        patients = drawn(rng, self.types)
        crops = []
        for p in rng.choice(len(patients), self.images, replace=False):
            row = drawn(rng, patients[p])
            crops.append(lesion_crop(self.array(row), row, self.size, self.depth))
        return crops, crops


def drawn(rng, items):
    """One of a list, at random."""
    return items[rng.integers(len(items))]


def grouped(rows, key):
    """Rows by `key`, as lists in the order of the key."""
    by = itemgetter(key)
    return [[*group] for _, group in itertools.groupby(sorted(rows, key=by), by)]


def lesion_crop(array, row, size, depth):
    """A lesion's surroundings in plane, all the slices of its volume: int16 [size, size, depth]."""
    x, y = (max(0, min(round(c) - size // 2, n - size)) for c, n in zip(row["centre"], array.shape))
    return resize(array[x : x + size, y : y + size], (size, size, depth))


@lru_cache(256)  # maps have page tables, a 512th of what was read
def open_array(path, shape):
    """A .npy of int16 as a tensor in the page cache.

    Unlike NumPy's, the map keeps no file open: corpora outnumber `ulimit -n`. BadInput: another
    type, shape or order than the index has it.
    """

    def mapped(path):
        stored = np.load(path, mmap_mode="r")
        if (stored.dtype.str, stored.shape, stored.flags.c_contiguous) != ("<i2", shape, True):
            raise BadInput(
                f"{stored.dtype} {stored.shape}, where the index says int16 {shape}: build the "
                "corpus again"
            )
        size = os.path.getsize(path) // 2
        values = torch.from_file(path, shared=False, size=size, dtype=torch.int16)
        return values[-math.prod(shape) :].view(shape)  # without the header

    return read_named(path, mapped)


def cut(array, start, shape):
    """The box of `shape` (or what there is of it) at `start`: a view."""
    return array[tuple(slice(a, a + n) for a, n in zip(start, shape))]


def resize(crop, shape):
    """int16 [x, y, z] -> int16 of `shape`, trilinear, axis by axis: short ones by a product."""
    if crop.shape == tuple(shape):
        return crop
    volume = crop.float()
    for axis, (n, m) in enumerate(zip(crop.shape, shape)):
        if n != m:
            v = volume.movedim(axis, -1)
            v = F.interpolate(v, m, mode="linear") if n > 32 else v @ linear_weights(n, m)
            volume = v.movedim(-1, axis)
    return volume.round_().short()


@lru_cache(256)
def linear_weights(n, m):
    """Matrix [n, m] that resamples n values linearly to m, half-voxel centres."""
    return F.interpolate(torch.eye(n)[None], m, mode="linear")[0]


def intensity_range(crop):
    """The 1st and 99.9th percentiles of an int16 tensor [x, y, z]: order statistics, from a
    histogram.
    """
    # departs: of more than 64³ voxels (262,144) one row in nine is counted, of 128³ one in 25, and
    # so on: the upper end moves by 0.6 % of the range (12 atria), in a fraction of the time
    step = 1 + 2 * math.isqrt(crop.numel() // 262_145)
    values = crop[::step, ::step].reshape(-1).numpy()
    least = values.min()
    # the difference wraps around, its bits are right
    counts = np.bincount((values - least).view(np.uint16))
    rank = np.floor(np.array([1, 99.9]) / 100 * (values.size - 1))
    return np.searchsorted(np.cumsum(counts), rank, side="right") + int(least)


def parse_mix(text, have):
    """--mix published, equal or spatial=2,contrast=1,semantic=1 -> {kind: weight}.

    have: {kind: scans, cases or lesion types}, which the published counts are of.
    """
    if text == "published":
        return {k: PUBLISHED[k] * n for k, n in have.items()}
    if text == "equal":
        return dict.fromkeys(KINDS, 1.0)
    try:
        mix = {k: float(v) for k, v in (part.split("=") for part in text.split(","))}
    except ValueError:
        mix = {}
    if not mix or not all(k in KINDS and 0 <= w < math.inf for k, w in mix.items()):
        raise BadInput(
            f"--mix {text!r}: published, equal, or weights such as spatial=2,contrast=1,semantic=1"
        )
    return mix


def draw_strips(path, views, depth, numbers=None):
    """{row: {column: volume [X, Y, Z] in [0, 1]}}: the middle slice of each sub-image, in a row.

    numbers [x, y, z]: written on the patches.
    """

    def strip(volume):  # [X, Y, Z] -> [S·X, Y]
        return torch.cat(volume[:, :, depth // 2 :: depth].unbind(2)).numpy(force=True)

    columns, wide = len(next(iter(views.values()))), 6 if numbers is None else 12
    fig, axes = figure_of((wide * columns, wide * 0.3 * len(views)), len(views), columns)
    for line, (row, volumes) in zip(axes, views.items()):
        for ax, (name, volume) in zip(line, volumes.items()):
            if numbers is not None:
                edge = len(volume) // len(numbers)
                for (x, y), n in np.ndenumerate(strip(numbers.repeat_interleave(edge, 2))):
                    at = (x + 0.5) * edge, (y + 0.5) * edge
                    ax.text(*at, n, color="white", fontsize=7, ha="center", va="center")
            ax.imshow(strip(volume).T, cmap="gray", origin="lower", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], title=name, facecolor="tab:blue")
        line[0].set_ylabel(row)
    save_figure(fig, path)


# ---- finding a corpus ------------------------------------------------------------------------


def find_corpus(machine, named=None, before=None):
    """The corpora `named`, else those of the run `before` if they are there, else data/corpus, else
    the phantom's, made if need be: a list of folders. Every rank must call it: rank 0 decides while
    the others wait.
    """
    named, *known = ([c] if isinstance(c, str) else c for c in (named, before, "data/corpus"))
    there = (c for c in known if c and all(Path(f, "index.jsonl").exists() for f in c))
    corpora = named or next(there, None)
    if machine.main and not corpora:
        machine.say("no corpus named and no data/corpus: made-up patients it is")
        corpora = [str(ensure_phantom(say=machine.say))]
    return machine.gather(corpora)[0]


def train_and_val(args, machine):
    """The sequences that a run trains on and validates with; it is said aloud which."""
    args.data = find_corpus(machine, args.data)
    same = {"size": args.volume, "stride": args.stride, "seed": args.seed}
    train = Sequences(args.data, mix=args.mix, **same)
    val = Sequences(train, "val", **same)
    machine.say(f"{', '.join(args.data)}: train {train.have}, val {val.have}, mix {args.mix}")
    return train, val


def ensure_phantom(seed=0, workers=None, say=print):
    """The corpus of made-up patients, built if it is not there yet: its folder."""
    root = Path("data/phantom")
    corpus = root / "corpus"
    if not (corpus / "index.jsonl").exists():
        say(f"making phantom patients and their corpus in {root}")
        write_phantom(root, ("amos", "brats", "deeplesion"), seed, workers)
        semantic = root / "deeplesion/DL_info.csv", root / "deeplesion/Images_nifti"
        # not the scans that fine-tuning is scored on
        jobs = collect([root / "amos/imagesTr"], [root / "brats"], semantic)
        build(*jobs, corpus, 0.2, seed, workers, say=say)
    return corpus


# ---- inspect ---------------------------------------------------------------------------------


def inspect(data, patch, order, out):
    """Print the copyable share; draw a sequence of each kind, its patches numbered as tokens."""
    for stride in sorted({data.size // 16, data.stride, data.size // 4}):
        tokens, voxels = copyable(data.size, patch, data.images, stride)
        print(
            f"--stride {stride:2}: {tokens:5.1%} of the tokens and {voxels:5.1%} of the voxels of "
            "a spatial sequence are copies of earlier ones, in either order"
        )
    g, views = data.size // patch, {}
    places = token_order((g, g, g), data.images, order)
    numbers = torch.arange(g**3) if places is None else places.argsort()
    for n, kind in enumerate(data.kinds):
        volume = to_unit(data[n]["volume"][None], data[n]["ranges"][None])[0]
        views[kind] = {f"order {order}: place of each patch in the sequence": volume / 1.4}
    path = out / "inspect.png"
    draw_strips(path, views, data.depth, numbers.view(g, g, g))
    print(f"drew {path}")


def copyable(size, patch, images, stride):
    """Share of the tokens, and of the voxels, of a spatial sequence that are in earlier tokens too.

    A copy stands in the same column of patches along z, and both orders go along a column from its
    first patch to its last.
    """
    z, depth = np.arange(size), size // images
    source = z // depth * stride + z % depth  # the slice of the crop behind each
    _, first, back = np.unique(source, return_index=True, return_inverse=True)
    copied = (first[back] // patch < z // patch).reshape(-1, patch)
    return copied.all(1).mean(), copied.mean()


# ---- bench -----------------------------------------------------------------------------------


NOISE = {  # the sizes of the real data: CTs, the contrasts of two BraTS patients, lesions
    "spatial": [(512, 512, 285)] * 3,
    "contrast": [(240, 240, 155)] * 8,
    "semantic": [(512, 512, 50)] * 4,
}


def write_noise(out):
    """A corpus of smooth noise in folder `out`."""
    rows = []
    for kind, shapes in NOISE.items():
        for i, shape in enumerate(shapes):
            coarse = torch.randint(-1024, 2048, [n // 5 for n in shape], dtype=torch.int16)
            file = f"{kind}{i}.npy"
            np.save(Path(out, file), resize(coarse, shape).numpy())
            row = {"kind": kind, "file": file, "shape": shape, "split": "train", "patient": i}
            rows.append({**row, "group": i // 4, "centre": (256, 256)})
    write_index(out, rows)


def bench(data):
    """Samples a second, arrays in the page cache; bytes; the demand."""
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    keep_freed_memory()
    torch.set_num_threads(1)
    print(data.have)
    for kind in data.kinds:
        data.kinds = [kind]
        files = {r["file"] for r in data.rows[kind]}
        for file in files:  # into the page cache
            Path(file).read_bytes()
        times = np.array(timed(data.read, 104, machine)[4:])
        print(
            f"{kind:>9}: {1 / times.mean():6.0f} samples/s on one core (median "
            f"{1e3 * np.median(times):.1f} ms), "
            f"{1e-6 * data.read(0)['volume'].nbytes:.2f} MB a sample; {len(files)} scans"
        )
        lists = ([*range(n, n + 12)] for n in itertools.count(0, 12))
        handed = batches(data, lists, argparse.Namespace(workers=cores()), machine)
        next(handed)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < 5:
            count += len(next(handed)["kind"])
        print(f"{'':>9}  {count / seconds:.0f}/s handed over by {cores()} loader processes")
    with torch.device("meta"):
        models = {k: Model(Config(**v)) for k, v in SIZES.items()}
    rate, shape = USE * SHEETS["H100"], [data.size] * 3
    wanted = ", ".join(f"{k} {rate / m.flops(shape):,.0f}" for k, m in models.items())
    print(f"an H100 at {rate / 1e12:.0f} TFLOP/s would take, samples/s: {wanted}")


if __name__ == "__main__":
    cli(main)
