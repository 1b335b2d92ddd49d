"""Hostile inputs for every script, each in a process of its own: read right, refused in one line
that says why (exit code 2), or listed as skipped while the rest goes on.
"""

import gzip
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval as ev
import finetune_cls as cls
import finetune_seg as seg
from common import BadInput, read_table, setup
from model import Config, Model, checkpoint_state, load_pretrained
from serialize import Sequences, build, collect, label_subset, open_array, write_index
from tokenize_vq import TOKENIZER, Tokenizer, TokenizerConfig, load_tokenizer

FAULTS = ("crashed", "hung", "silent")
VERDICTS = ("read", "refused", "skipped", *FAULTS)
SECONDS, BYTES = 10, 2**31  # of an input, at most
# bars; what C++ prints of MetaImage files; PyTorch of a pickle in protocol 4
BESIDE = r"%\||Meta(Image|Object): |ElementType required|   ideal = "
ANY, READ = "", None  # what a refusal says: anything, as it may be read too; it must be read
EYE, EDGES = np.eye(4), (9, 10, 11)
RNG = np.random.default_rng(0)
NOISE, OTHER, SMALL = (RNG.integers(*r, EDGES, np.int16) for r in ((-999, 999), (0, 99), (0, 99)))
DATA = Path(nib.__file__).parent / "tests/data"
INPUTS = []  # surface, name, act(folder), words


def add(surface, act, *rows):
    """Inputs: a row is the words of the refusal, and what `act` takes after a folder; iterators in
    it stand for a row each.
    """
    for row in rows:
        ways = (x if isinstance(x, Iterator) else [x] for x in row)
        INPUTS.extend((surface, act, *one) for one in itertools.product(*ways))


def each(*values):
    return iter(values)


def attempt(folder, act, words, *args):
    """(verdict, what was said) of act(folder, *args) in a process with little time and memory."""
    said = folder / ".said"
    held = 4096 * int(Path("/proc/self/statm").read_text().split()[1])  # which a child inherits
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)  # its threads do not survive a fork
            for fd, path in ((1, os.devnull), (2, said)):  # of C libraries too
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
            sys.stdout, sys.stderr = (open(fd, "w") for fd in (1, 2))  # noqa: SIM115
            nib.imageglobals.logger.handlers[0].setStream(sys.stderr)
            warnings.showwarning = lambda words, *_: print("warning", words, file=sys.stderr)
            warnings.resetwarnings()  # pytest keeps them to itself
            warnings.simplefilter("ignore", ResourceWarning)  # as Python does
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor's time
            signal.alarm(60 * SECONDS)  # on a machine that is busy
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + BYTES,) * 2)
            common.cores = lambda: 1
            os.chdir(folder)
            common.cli(lambda: act(folder, *args))
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException as e:  # noqa: BLE001
            traceback.print_exc()
            code = 3 if isinstance(e, AssertionError) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    text = said.read_bytes().decode(errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.split("\n") if line]
    lines = [line for line in lines if not re.search(BESIDE, line)]
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGALRM, -signal.SIGPROF) or usage.ru_maxrss * 1024 > held + BYTES:
        return "hung", f"{usage.ru_maxrss >> 10} MB"
    one = code == 2 and len(lines) == 1 and len(lines[0]) < 4100 and words is not READ
    if one and re.search(words, lines[0]) and ("/" in words or named(folder, lines[0])):
        return "skipped" if "SKIPPED" in lines[0] else "refused", lines[0]
    if code == 3 or code == 0 and words:
        return "silent", lines[-1:]
    return ("read", "") if code == 0 and not lines else ("crashed", lines[-6:])


def named(folder, line):
    """Whether a line names a path in the folder, as it is or relative to it, or a flag."""
    below = [str(f.relative_to(folder)) for f in folder.rglob("*.*")]
    return re.search(rf"{folder}/[^ :]|--[a-z]", line) or any(f in line for f in below)


def left_out(rows):
    """BadInput of the first row of what was skipped: its file and why; each must say why."""
    rows = [[*r.values()] if isinstance(r, dict) else r for r in rows]
    assert all(r[-1].strip() for r in rows), rows
    if rows:
        raise BadInput(f"SKIPPED {rows[0][-1]}: {' '.join(map(os.fsdecode, rows[0][:-1]))}")


# ---- scans -----------------------------------------------------------------------------------


def nifti(values=NOISE, dtype=np.int16, affine=EYE, order="<", **fields):
    """The bytes of a .nii of exactly these stored values; fields: of its header."""
    values = np.asarray(values).astype(dtype)
    header = nib.Nifti1Image(values, affine, dtype=dtype).header
    for name, value in {"scl_slope": 1, "scl_inter": 0, "vox_offset": 352, **fields}.items():
        header[name] = value
    values = values.astype(values.dtype.newbyteorder(order))
    return header.as_byteswapped(order).binaryblock + bytes(4) + values.tobytes("F")


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def scan(folder, data, name="a.nii", truth=NOISE, spacing=None):
    """One scan beside a good one: build() reads it right or lists it; the good one gets in."""
    put(folder / "s/good.nii", nifti(OTHER))
    path = folder / "s" / name
    data(path) if callable(data) else put(path, data)
    jobs = collect([folder / "s"])
    rows = build(*jobs, folder / "c", workers=0, spacing=spacing)
    sources = [Path(r["source"].partition("#")[0]) for r in rows]
    assert folder / "s/good.nii" in sources, "the good scan is not in"
    mine = [r for r, source in zip(rows, sources) if source != folder / "s/good.nii"]
    if not mine:
        listed = read_table(folder / "c/skipped.csv")
        assert {Path(r["source"]) for r in listed} <= {path, path.parent}, listed
        left_out(listed)
        raise AssertionError("neither in nor listed")
    for n, row in enumerate(mine):
        array = open_array(str(folder / "c" / row["file"]), tuple(row["shape"])).numpy()
        values = array * row["slope"] + row["inter"]
        want = truth if truth.ndim == 3 else truth[..., n]
        assert values.shape == want.shape, f"shape {values.shape}"
        assert np.allclose(values, want, rtol=1e-4, atol=0.02 * (truth.dtype.kind == "f")), "voxels"
    return mine


def spaced(folder, data, spacing):
    (row,) = scan(folder, data)
    assert np.allclose(row["spacing"], spacing), row["spacing"]


def turned(codes):
    """NOISE with the axes of a file in that orientation, and the file's affine."""
    to = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", codes)))
    affine = nib.orientations.inv_ornt_aff(to, EDGES)
    return nifti(nib.orientations.apply_orientation(NOISE, to), affine=affine)


GOOD = nifti()
ZIPPED = gzip.compress(GOOD, mtime=0)
CUT = "cut short|damaged|unreadable|its header|2D|axes|not a"
axes = [c for p in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*p)]
add("orientations", scan, *((READ, turned(c)) for c in axes))
add(
    "NIfTI cut",
    scan,
    *((CUT, GOOD[:n]) for n in (0, 1, 100, 347, 348, 351, 352, 500, -1)),
    *((CUT, ZIPPED[:n], "a.nii.gz") for n in (0, 1, 5, 18, 999, -9, -8, -4, -1)),
    (READ, ZIPPED + bytes(512), "a.nii.gz"),
    (READ, gzip.compress(GOOD[:999]) + gzip.compress(GOOD[999:]), "a.nii.gz"),
    *((CUT, ZIPPED + more, "a.nii.gz") for more in (b"garbage", ZIPPED[:9])),
    (CUT, each(gzip.compress(ZIPPED), RNG.bytes(999)), "a.nii.gz"),
    (CUT, each(ZIPPED, RNG.bytes(5000), bytes(5000), GOOD + bytes(2**21))),
    (CUT, each(GOOD[:348], bytes(348)), "a.hdr"),
)


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


bits = [*RNG.choice(8 * len(ZIPPED), 25, replace=False), 8 * len(ZIPPED) - 40]
add("bits flipped", scan, *((ANY, flipped(ZIPPED, b), "a.nii.gz") for b in bits))


def fields():
    """What a refusal says, and the fields of the header that bring it about."""
    code, each = {"sform_code": 0, "qform_code": 1}, itertools.product
    nan, inf = np.nan, np.inf
    for name, words, values in (
        ("magic", ".", (b"n+2", b"", b"x")),
        ("sizeof_hdr", ANY, (0, 347, 540, -1)),
        ("bitpix", "damaged: bitpix", (0, 8, 32, -16)),
        ("datatype", ".", (0, 1, 2, 8, 255, 9999, 128, 2304, 32, 1792, 1536, -4)),
        ("srow_x", "affine", (0, nan, inf, -inf, [1e-30, 0, 0, 0], [0, 1, 0, 0])),
        ("srow_z", "affine", (0, nan, [0, 0, 0, 5])),
        ("scl_slope", ".", (1e38, -1e38)),
        ("scl_inter", ".", (inf, -inf, nan)),
        ("vox_offset", ".", (0, 100, 351, 353, 368, 1e9, -352, nan, inf, 1e30)),
    ):
        yield from ((words, {name: v}) for v in values)
    for at, n in [*each((1, 2, 3), (0, -1, 1, -9, 32767, 12)), *each([0], (0, 1, 2, 5, 7, 8, -1))]:
        dim = [3, *EDGES, 1, 1, 1, 1]
        dim[at] = n
        yield "2D|axes|unreadable|short|than|damaged", {"dim": dim}
    yield "more than the", {"dim": [3, *[32767] * 3, 1, 1, 1, 1]}
    yield READ, {"dim": [4, *EDGES, 1, 1, 1, 1]}
    yield from (("affine|unreadable", code | {"pixdim": [1, v, *[1] * 6]}) for v in (nan, inf))
    yield from (("affine|unreadable", code | {"quatern_b": v}) for v in (nan, 9))
    yield from ((READ, {"scl_slope": s, "scl_inter": i}) for s, i in ((0, 5), (nan, nan), (inf, 0)))
    yield from ((ANY, {"scl_slope": nan, "scl_inter": i}) for i in (0, 7))
    yield ANY, {"scl_slope": 0, "scl_inter": nan}


add("NIfTI header", lambda folder, f: scan(folder, nifti(**f)), *fields())
slopes = ((-2, 7), (0.5, 0), (1, -1024), (1, 0.5), (1e-3, 1))
kinds = ("int8", "uint8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
add(
    "NIfTI values",
    scan,
    *((READ, nifti(scl_slope=s, scl_inter=i), "a.nii", NOISE * s + i) for s, i in slopes),
    *((READ, nifti(SMALL, d, order=o), "a.nii", SMALL) for d in kinds for o in "<>"),
    *(("neither integers", nifti(NOISE, d)) for d in ("complex64", "complex128", rgb)),
    *(("NaN or", nifti(np.where(NOISE > 990, v, NOISE), "f4")) for v in (np.nan, np.inf)),
    ("NaN or", nifti(NOISE * np.nan, "f8")),
    *(("equal", nifti(0 * NOISE + v)) for v in (0, 7)),
    *(
        (READ, nifti(np.stack([NOISE, SMALL], 3), dtype), "a.nii", np.stack([NOISE, SMALL], 3))
        for dtype in "hf"
    ),
    ("2D", nifti(NOISE[..., 0])),
    ("2D", nifti(NOISE[:1])),
    ("fewer than 8", nifti(NOISE[:7])),
    ("axes", nifti(NOISE[..., None, None][..., [0, 0, 0]])),
    ("axes|2D", nifti(NOISE[..., :0])),
    ("axes|2D", nifti(np.zeros((*EDGES, 0)))),
    # without codes NIfTI's x points left
    (READ, nifti(sform_code=0, qform_code=0), "a.nii", NOISE[::-1]),
    (READ, nib.Nifti2Image(NOISE, EYE).to_bytes()),
    ("not a NIfTI", nib.Spm2AnalyzeImage(NOISE, EYE).header.binaryblock, "a.hdr"),
    ("Cifti2Image|unreadable", DATA.joinpath("row_major.dconn.nii").read_bytes()),
    ("more than the", nifti(affine=np.diag([700, 700, 700, 1])), "a.nii", NOISE, [0.7] * 3),
    ("more than the", nifti(), "a.nii", NOISE, [1e-30] * 3),
)
units = ((2, 1), (1, 1000), (3, 0.001), (0, 1))
add("units", spaced, *((READ, nifti(xyzt_units=u), s) for u, s in units))


# ---- files and their names -------------------------------------------------------------------

NAMES = (
    "a" * 244 + ".nii",
    "a" * 248 + ".nii.gz",
    "[1].nii",
    "$HOME.nii",
    "*?.nii",
    "a b,'\"c.nii",
)
NAMES += (
    "-x.nii",
    "%s{}.nii",
    "é\u202e.nii",
    os.fsdecode(b"\xff\xfe.nii"),
    "a.b.nii",
    "A.NII.GZ",
    "\n.nii",
)


def folder_instead(path):
    put(path / "x.nii", GOOD)


def link_to(target, path):
    path.symlink_to(target)


for name in NAMES:
    pack = gzip.compress if name.lower().endswith("gz") else bytes
    add("names", scan, (READ, pack(GOOD), name), ("SKIPPED", pack(GOOD[:999]), name))
add(
    "files",
    scan,
    (READ, folder_instead),
    (READ, folder_instead, "a.nii.gz"),
    *(
        (".", RNG.bytes(2000), f"a{s}")
        for s in (".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".h5", ".npz")
    ),
    *((".", b"", f"a{s}") for s in (".mha", ".nrrd", ".dcm", ".h5", ".npz")),
    (".", bytes(128) + b"DICM" + RNG.bytes(500), "IM0001"),
)


# ---- bombs -----------------------------------------------------------------------------------


def huge(shape, dtype, zeros):
    """A gzip of a header that claims `shape`, and of that many MB of zeros."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][:4] = 3, *shape
    header["vox_offset"], header["sform_code"], header["magic"] = 352, 1, b"n+1"
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="w", compresslevel=1) as f:
        f.write(header.binaryblock + bytes(4))
        for _ in range(zeros):
            f.write(bytes(2**20))
    return out.getvalue()


def extended(size, code=4):
    """A scan with a header extension that claims `size` bytes."""
    more = np.array([size, code], "<i4").tobytes() + bytes(8)
    return nifti(vox_offset=368)[:348] + bytes([1, 0, 0, 0]) + more + GOOD[352:]


def mha(dims, **more):
    head = {"ObjectType": "Image", "NDims": 3, "DimSize": dims, "ElementType": "MET_SHORT"} | more
    head["ElementDataFile"] = head.pop("ElementDataFile", "LOCAL")  # stands last
    return "".join(f"{k} = {v}\n" for k, v in head.items()).encode() + GOOD[352:]


add(
    "bombs",
    scan,
    ("more than the", huge((2000, 2000, 500), np.int16, 9), "a.nii.gz"),
    ("short", huge((800, 800, 800), np.float64, 9), "a.nii.gz"),
    ("short|MemoryError", gzip.decompress(huge((800, 800, 800), np.float64, 0)) + bytes(90_000)),
    ("bytes more", huge(EDGES, np.int16, 900), "a.nii.gz"),
    ("equal|Memory", huge((512, 512, 960), np.int16, 480), "a.nii.gz"),
    *((ANY, extended(n)) for n in (0, -1, 7, 8, 16, 2**31 - 16, -(2**31))),
)


# ---- arrays in other containers --------------------------------------------------------------


class Evil:
    """A pickle that would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def npy(data):
    out = io.BytesIO()
    np.save(out, data, allow_pickle=True)
    return out.getvalue()


def claims(shape, dtype="<i2"):
    """A .npy of a few bytes whose header claims `shape`."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(200)


def npz(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(f"{name}.npy", data if isinstance(data, bytes) else npy(data))
    return out.getvalue()


EVIL = np.array([Evil()] * 2, object)
VOLUMES = RNG.integers(0, 255, (4, 9, 9, 9), np.uint8)
MEMBERS = (
    *((7, 0 * 1j, "text", EVIL, b"garbage", b"", pickle.dumps(Evil()), claims((10**15,)))),
    *(
        claims((2**62, 9, 9, 9)),
        claims((-1, 9, 9, 9)),
        claims((4, 9, 9, 9), "|O"),
        VOLUMES[0, 0, 0],
    ),
    *(claims((40, 900, 900, 900)), VOLUMES.astype("m8[s]"), VOLUMES[..., None], npy(VOLUMES)[:999]),
)
add("npz, as scans", scan, *((".", npz(train_images=m), "a.npz") for m in MEMBERS))
add(
    "npz, as scans",
    scan,
    (READ, npz(train_images=VOLUMES), "a.npz", np.moveaxis(VOLUMES, 0, 3)),
    *((".", npz(train_images=VOLUMES)[:n], "a.npz") for n in (99, -9, -99)),
    (".", npz(), "a.npz"),
)


def medmnist(folder, member=None, value=None):
    every = {f"{s}_images": VOLUMES + i for i, s in enumerate(cls.SPLITS)}
    every |= {f"{s}_labels": np.array([[0], [1], [0], [1]]) for s in cls.SPLITS}
    every = {k: v for k, v in (every | {member: value}).items() if v is not None}
    cases_of(folder, "nodule", put(folder / "nodulemnist3d.npz", npz(**every)))


def cases_of(folder, task, data, lists=None):
    cases, _ = cls.list_cases(cls.TASKS[task], str(data), lists, None, MACHINE)
    usable, skipped = cls.prepare_all(cases, [8, 8, 8], None, MACHINE)
    assert len(usable) + len(skipped) == len(cases)
    assert not Path("executed").exists()
    left_out(skipped)


MACHINE = setup(Namespace(device="cpu", dtype="fp32"))
wrong = (b"", None, 7, np.zeros(3, int), np.full(4, 2), np.full(4, -1), np.full(4, np.nan), EVIL)
add(
    "npz, as classes",
    medmnist,
    (READ,),
    (".", "val_images", iter(MEMBERS)),
    (".", "train_labels", iter(wrong)),
    ("voxel for voxel", "val_images", VOLUMES),
)


def hdf5(path, **members):
    import h5py

    with h5py.File(path, "w") as f:
        for name, value in members.items():
            if isinstance(value, dict):
                f.create_dataset(name, **value)
            else:
                f[name] = value


text = np.array([["a"] * 9] * 9, "S1")
huge_h5 = {"shape": (1000, 1000, 1000), "dtype": "f8", "chunks": (10, 10, 10)}
sets = (
    7,
    "text",
    NOISE[0],
    NOISE * 1j,
    np.stack([text] * 9),
    huge_h5,
    EDGES,
    NOISE[..., None, None],
)
sets += (
    {"shape": (10**6,) * 3, "dtype": "i2", "chunks": (9, 9, 9)},
    {"shape": EDGES, "dtype": "S3"},
)
compound = np.zeros(EDGES, [("a", "i2"), ("b", "f4")])
if importlib.util.find_spec("h5py"):
    add(
        "HDF5",
        scan,
        (READ, partial(hdf5, image=NOISE), "a.h5"),
        *((".", partial(hdf5, image=v), "a.h5") for v in (*sets, compound)),
        (".", partial(hdf5, other=NOISE), "a.h5"),
        (".", partial(hdf5, **{"image/x": NOISE}), "a.h5"),
    )
if importlib.util.find_spec("SimpleITK"):
    add(
        "MHA and NRRD",
        scan,
        (READ, mha("9 10 11"), "a.mha", NOISE[::-1, ::-1]),
        *(
            (".", mha(d), "a.mha")
            for d in ("9 10 110", "99999 99999 99999", "0 9 9", "-1 9 9", "x")
        ),
        *((".", mha("9 10 11", **m), "a.mha") for m in ({"ElementSpacing": "0 0 0"},)),
        (ANY, mha("9 10 11", ElementSpacing="nan 1 1"), "a.mha", NOISE[::-1, ::-1]),
        (READ, mha("9 10 11", ElementSpacing="-1 1 1"), "a.mha", NOISE[:, ::-1]),
        (".", mha("900 900 900"), "a.mha"),
        (".", mha("9 10 11", ElementDataFile="none.raw"), "a.mhd"),
        (".", mha("100 100 100", ElementDataFile="/dev/zero"), "a.mhd"),
        (".", mha("9 10", NDims=2), "a.mha"),
        (".", mha("9 10 11 1", NDims=4), "a.mha"),
        (".", mha("9 10 11", ElementNumberOfChannels=3), "a.mha"),
        (
            ".",
            b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9999 9999 9999\nencoding: raw\n\n",
            "a.nrrd",
        ),
        (".", b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: gzip\n\nx", "a.nrrd"),
    )


# ---- segmentation ----------------------------------------------------------------------------

PAIR = {"image": "imagesTr/a.nii", "label": "labelsTr/a.nii"}
OTHERS = [{k: v.replace("a.nii", f"{n}.nii") for k, v in PAIR.items()} for n in "bc"]


def segment(folder, notes=None, label=None, names="abc", **more):
    """The cases of a folder, prepared; each must keep its own voxels."""
    for i, name in enumerate(names):
        put(folder / f"imagesTr/{name}.nii", nifti(np.roll(NOISE, i)))
        put(folder / f"labelsTr/{name}.nii", nifti(np.roll(TRUTH, i), np.uint8))
    if label is not None:
        (folder / "labelsTr/a.nii").unlink()
        label(folder) if callable(label) else put(folder / "labelsTr/a.nii", label)
    if notes is not None:
        put(
            folder / "dataset.json",
            notes if isinstance(notes, bytes) else json.dumps(notes).encode(),
        )
    cases, classes = seg.find_cases("mine", str(folder), more.get("classes"), MACHINE)
    setting = {"task": "mine", "data": str(folder), "classes": classes, "mr_after": None}
    setting |= {"spacing": None, "intensity_range": [-999, 999]}
    *usable, failed = seg.prepare_all(cases, setting, MACHINE)
    for case in itertools.chain(*usable):
        at = names.index(Path(case["image"]).stem) if "/d/" not in case["image"] else 2
        image, label = (seg.opened(case, k) for k in ("image", "label"))
        want = (np.roll(NOISE, at) + 999) / 1998
        box = seg.boxed(case["geometry"]["box"])
        assert np.allclose(image, want.clip(0, 1)[box], atol=1e-3), case["id"]
        assert np.array_equal(label, np.roll(TRUTH, at)[box]), case["id"]
    assert len(cases) == more.get("count", len(names)), len(cases)
    left_out(failed)


def listing(**changes):
    notes = {"labels": {"0": "back", "1": "x", "2": "y"}, "training": [PAIR, *OTHERS]}
    return notes | changes


TRUTH = RNG.integers(0, 3, EDGES, np.uint8)
add(
    "dataset.json",
    segment,
    (READ, listing()),
    ("dataset.json", each(5.5, [], "x", 5, True, b"", b"{", b"[" * 1000, b"\xff\xfe{}")),
    *(("dataset.json", b"NaN"), ("dataset.json", b'{"a":' * 1000), ("dataset.json", b"\0" * 9)),
    *(("dataset.json", listing(labels=v)) for v in ([], None, "x", 5, {}, {"x": 1})),
    (".", listing(labels={"9" * 5000: "x"})),
    *(("dataset.json", listing(training=v)) for v in ({}, None, "x", 5, [5], [None], [[PAIR]])),
    *(
        ("dataset.json", listing(training=[*OTHERS, PAIR | v]))
        for v in ({"image": 5}, {"label": None})
    ),
    *(("dataset.json", listing(validation=v)) for v in ({}, None, "x", [5], [OTHERS])),
    ("imagesTr/a .*list it once", listing(validation=[PAIR])),
    ("imagesTr/a .*list it once", listing(training=[PAIR, PAIR, *OTHERS])),
    (
        "imagesTr/a .*list it once",
        listing(training=[PAIR, PAIR | {"image": "./imagesTr/../imagesTr/a.nii"}]),
    ),
    *(
        (w, listing(training=[*OTHERS, PAIR | {key: v}]))
        for w, key, *values in (
            (r"/\d*: no such image", "image", "", ".", "/"),
            ("/dev/zero: no such", "image", "/dev/zero"),
            ("/dev/zero: no such", "label", "/dev/zero"),
            (".", "image", "none", "a\0b", "\ud800", "x" * 5000),
            (".", "label", "labelsTr", "\0"),
        )
        for v in values
    ),
)


def twins(folder):
    """Two cases of one name in different folders, and two whose names lack a known suffix."""
    for k, v in (("imagesTr", NOISE), ("labelsTr", TRUTH)):
        put(folder / k / "d/a.nii", nifti(np.roll(v, 2), v.dtype))
    more = {k: v.replace("/", "/d/") for k, v in PAIR.items()}
    segment(folder, listing(training=[PAIR, OTHERS[0], more]), names="ab", count=3)


def odd_suffix(folder):
    segment(folder, listing(training=[{k: f"{v}{n}/x.png" for k, v in PAIR.items()} for n in "de"]))


add("cases of one name", twins, (READ,))
add("cases of one name", odd_suffix, (".",))
values = (1e12, -1.0, 0.5, np.nan, np.inf, 3.0, 256.0, -256.0, 257.0)
add(
    "labels",
    lambda f, d: segment(f, label=d, classes=["x", "y"]),
    (READ, nifti(TRUTH, np.float64)),
    *(("a.nii", nifti(np.where(TRUTH == 1, v, TRUTH), np.float64)) for v in values),
    *(("a.nii", nifti(v, np.uint8)) for v in (TRUTH[1:], TRUTH[..., 0], TRUTH.swapaxes(0, 1))),
    ("a.nii", nifti(np.stack([TRUTH] * 2, 3), np.uint8)),
    *(("affine", nifti(TRUTH, np.uint8, np.diag(d))) for d in ((1, 1, 2, 1), (-1, 1, 1, 1))),
    ("affine", nifti(TRUTH, np.uint8, nib.affines.from_matvec(EYE[:3, :3], [5, 0, 0]))),
    ("a.nii", each(b"", GOOD[:999], nifti(TRUTH, np.complex64))),
    ("no such label", lambda f: (f / "labelsTr/a.nii").mkdir()),
    ("no labelled|no such label", lambda f: shutil.rmtree(f / "labelsTr")),
    ("list it once", lambda f: (f / "labelsTr/a.nii").symlink_to("b.nii")),
)
add(
    "names of cases",
    lambda f, n: segment(f, names=["b", "c", n], classes=["x", "y"]),
    (READ, each("[1]", "$x", "a b", "é", os.fsdecode(b"\xff\xfe"), "z" * 248, "'\",")),
)


# ---- classification --------------------------------------------------------------------------


def csv_of(folder, text, files=6):
    for n in range(files):
        put(folder / f"{n}.nii", nifti(np.roll(NOISE, n)))
    put(folder / "8.nii", GOOD)
    put(folder / "9.nii", GOOD[:999])
    text = text if isinstance(text, bytes) else os.fsencode(text)
    cases_of(folder, "mine", put(folder / "cases.csv", text))


HEAD = "file,label,split,patient\n"
LINES = [
    f"{n}.nii,{n % 2},{s},p{n}\n"
    for n, s in enumerate(("train", "train", "val", "val", "test", "test"))
]
FINE = HEAD + "".join(LINES)
ends = (
    "[5].nii,0,test,",
    "../x,0,test,",
    "5.nii,²,test,",
    f"5.nii,{'9' * 5000},test,",
    "5.nii,-1,test,",
)
ends += (
    "5.nii,1.0,test,",
    "5.nii,,test,",
    "5.nii,1,Test,",
    "5.nii,1,,",
    ",1,test,",
    "5.nii,1001,test,",
    "5.nii\n",
)
ends += ("5\0.nii,1,test,", f"{'x' * 140_000},1,test,", '"5.nii,1,test,')
add(
    "CSV",
    csv_of,
    (READ, each(FINE, "\ufeff" + FINE, FINE.replace("\n", "\r\n"), FINE + "\n\n")),
    (READ, each(FINE.replace("\n", ",more,and more\n"), FINE.replace(",p", ", p"))),
    ("cases.csv", each("", "\0", HEAD, "x", FINE[5:], b"\xff" * 99, GOOD, "\n" * 9)),
    *(("cases.csv", FINE.replace("file", "path")), ("cases.csv", FINE.replace("label", "l", 1))),
    *(("cases.csv", FINE.replace("5.nii,1,test,p5", e)) for e in ends),
    ("listed twice", FINE + LINES[0].replace(",0,", ",1,")),
    ("listed twice", FINE + "./0.nii,0,test,other\n"),
    ("more than one split", FINE.replace("p5", "p0")),
    ("voxel for voxel", FINE + "8.nii,0,test,p8\n"),
    ("SKIPPED.*9.nii", FINE + "9.nii,0,test,p9\n"),
    (r"DICOM( series|, MHA).*: \./\.", FINE + "./.,0,test,p9\n"),
    ("cases of 2 classes", FINE.replace("1.nii,1", "1.nii,0")),
)


def lists_of(folder, text):
    for n in range(4):
        put(folder / f"{n}.nii", nifti(np.roll(NOISE, n)))
    for split, fine in (("train", text), ("val", b"2.nii 0"), ("test", b"3.nii 1")):
        put(folder / f"{split}.txt", fine)
    cases_of(folder, "ricord", folder)


add(
    "lists",
    lists_of,
    (READ, b"0.nii 0\n1.nii 1\n"),
    (".", each(b"", b"0.nii", b"0.nii 0", b"0.nii 0\n0.nii 1", b"\xff\xfe 1", b"\0 1\n", GOOD)),
    *((".", b"0.nii 0\n1.nii " + t) for t in (b"2", b"one", b"9" * 5000, b"-1", b"\xb2")),
)


def names_of(folder, data):
    path = put(folder / "names", data) if isinstance(data, bytes) else folder / data
    chosen = label_subset([f"case_{n}" for n in range(5)], str(path))
    assert len(chosen) == len(set(chosen)) == len(data.split())


add(
    "--labels",
    names_of,
    (READ, b"case_1\ncase_3\n"),
    (".", each(b"", b"\n\n", b"case_9", b"case_1 case_x", b"\xff", b"\0", b"x" * 10**5)),
    (".", each("none", ".", "a\0b", "x" * 5000)),
)


# ---- DeepLesion ------------------------------------------------------------------------------

ROW = ["[1]_01_01_055.png", *"00000", "2,3,4,5", "0", "0", "1", "0", "1,11", *"000000"]


def lesions(folder, at, value, count=1):
    """A good row and one with another value at `at`, each of a volume of its own."""
    good, bad = [ROW.copy() for _ in range(2)]
    good[0] = "2_01_01_055.png"
    if at is not None:
        bad[at] = value
    text = "".join(
        ",".join(f'"{v}"' for v in row) + "\n" for row in ([f"c{n}" for n in range(18)], good, bad)
    )
    text = value if at is None and value else text
    put(folder / "DL_info.csv", text.encode() if isinstance(text, str) else text)
    for n, name in enumerate(("2", "[1]")):
        path = folder / f"Images [1] $/{name}_01_01_001-011.nii.gz"
        put(path, gzip.compress(nifti(np.roll(NOISE, n))))
    jobs = collect(semantic=(folder / "DL_info.csv", folder / "Images [1] $"))
    rows = build(*jobs, folder / "c", workers=0)
    assert any("2_01" in r["source"] for r in rows)
    if len(rows) < 2:
        left_out(read_table(folder / "c/skipped.csv"))


boxes = (
    "nan,1,2,3",
    "1,2,3",
    "",
    "x",
    "inf,1,2,3",
    "-50,-50,-40,-40",
    "500,500,600,600",
    "1e300,1,2,3",
    "1,2,3,4,5",
)
add(
    "DL_info.csv",
    lesions,
    (READ, None, None),
    ("SKIPPED", 6, iter(boxes)),
    ("SKIPPED", 9, each("-1", "x", "", "nan", "9" * 5000)),
    ("SKIPPED", 11, each("x", "1", "", "1,99", "9" * 5000 + ",1", "1,2,3")),
    ("SKIPPED", 0, each("", "none", "../x", "x" * 5000)),
    (".", None, each("a,b\n1,2\n", GOOD, "x" * 140_000, "\0\n\0\n")),
)


# ---- corpora ---------------------------------------------------------------------------------

KEYS = {"slope": 1.0, "inter": 0.0, "stored": "", "hash": "", "spacing": [1, 1, 1], "stamp": []}


def corpus(folder, key=None, value=None, array=None, text=None):
    """Sequences of a corpus, one row changed, or one array, or all of the index."""
    folder = folder / "c"
    folder.mkdir()
    rows, arrays = [], RNG.integers(-99, 99, (12, 24, 24, 24), np.int16)
    for n, kind in enumerate(["spatial"] + ["contrast"] * 4 + ["semantic"] * 4):
        row = {"kind": kind, "file": f"{n}.npy", "shape": [24] * 3, "split": "train"}
        row |= {"patient": f"p{n}", "group": "1", "centre": [9, 9], "source": f"{n}", "job": ""}
        rows.append(row | KEYS)
        np.save(folder / f"{n}.npy", arrays[n])
    for n in (0, 1, 5) if key else ():
        rows[n] |= {key: value}
        if value is DROP:
            del rows[n][key]
    if array is not None:
        put(folder / "0.npy", array)
    write_index(folder, rows)
    if text is not None:
        put(folder / "index.jsonl", text)
    data = Sequences(folder, size=16, stride=1)
    for n in range(12):
        volume = data[n]["volume"]
        assert volume.shape == (16, 16, 16) and volume.abs().max() < 100


DROP, A = object(), RNG.integers(-99, 99, (24, 24, 24), np.int16)
add(
    "index.jsonl",
    corpus,
    (READ,),
    ("nothing to train", None, None, None, b""),
    ("index.jsonl", each("kind", "file", "shape", "split"), each(DROP, None, 5, [], {})),
    ("index.jsonl", each("patient", "group"), each(DROP, [], {})),
    ("index.jsonl", "centre", each(DROP, None, 5, [], ["x", 1], [np.nan, 1])),
    (".", "shape", each([24, 24], [0, 24, 24], [-24, -24, 24], [24.0] * 3, [10**9] * 3, ["x"] * 3)),
    (".", "file", each("", ".", "none", "a\0", "x" * 5000, "index.jsonl")),
    ("index.jsonl", "kind", each("x", "Spatial")),
    (
        "index.jsonl",
        None,
        None,
        None,
        each(b"5", b"null", b"[]", b"{}", b"x", b"\xff", b"[" * 9999),
    ),
)
add(
    "arrays",
    corpus,
    *((".", None, None, npy(A.astype(d))) for d in ("f4", "i4", ">i2", "u2", "f8", "i1", "O")),
    (".", None, None, each(npy(np.asfortranarray(A)), npy(A)[:-1], npy(A)[:99], npy(A)[128:])),
    (
        ".",
        None,
        None,
        each(b"", RNG.bytes(40_000), npy(EVIL) + bytes(30_000), npy(A[0, 0]) + bytes(30_000)),
    ),
    *(
        (".", None, None, claims(s) + bytes(30_000))
        for s in ((24, 24, 25), (10**15,), "(24, 24,", -1)
    ),
    (".", None, None, pickle.dumps(Evil()) + bytes(30_000)),
)


# ---- checkpoints -----------------------------------------------------------------------------


def states():
    """By loader: what it reads."""
    encoder = Model(Config(width=24, layers=2, heads=2, patch=8))
    whole = checkpoint_state(encoder)
    setting = {"task": "mine", "data": "", "mr_after": None, "spacing": None, "overlap": 0.5}
    setting |= {"decoder": "unetr", "intensity_range": [-999, 999], "roi": [16] * 3}
    setting |= {"features": 4, "classes": ["x", "y"]}
    net = seg.Segmenter(encoder, 3, 4)
    config = TokenizerConfig(patch=4, codes=8, dim=4, hidden=8, width=8, layers=1)
    yield load_pretrained, whole
    yield (
        seg.load_segmenter,
        {
            "format": seg.SEGMENTER,
            "config": whole["config"],
            "model": net.state_dict(),
            "setting": setting,
        },
    )
    args = {"pool": "mean", "task": "mine"}
    weights = cls.Classifier(encoder, 2).state_dict()
    known = {"classes": ["a", "b"], "args": args, "model": weights, "config": whole["config"]}
    yield cls.load_classifier, known | {"format": cls.CLASSIFIER}
    yield load_tokenizer, checkpoint_state(Tokenizer(config), TOKENIZER)


def loaded(folder, load, state, at=(), value=None):
    """A checkpoint that differs in one place is loaded."""
    state = deepcopy(state)
    *way, last = at or [None]
    inner = state
    for k in way:
        inner = inner[next(iter(inner)) if k == 0 else k]
    if at:
        last = next(iter(inner)) if last == 0 else last
        inner[last] = value(inner[last]) if callable(value) else value
        if value is DROP:
            del inner[last]
    torch.save(state, folder / "x.pt")
    read(folder, load)


def raw(folder, load, data):
    if isinstance(data, bytes):
        put(folder / "x.pt", data)
    elif data is not None:
        torch.save(data, folder / "x.pt")
    read(folder, load)


def read(folder, load):
    try:
        load(folder / "x.pt")
    finally:
        assert not Path("executed").exists(), "executed"


STATES = dict(states())
out = io.BytesIO()
torch.save(STATES[load_pretrained], out)
out = out.getvalue()
OTHER_CONFIGS = (DROP, None, "x", 5, [], {}, {"x": 1})
numbers = (10**6, 10**12, -1, 0, 1.5, "2", None, np.nan, [2], 2**70)
for load, state in STATES.items():
    full = {"format": state["format"], "config": state["config"]}
    add(
        "checkpoints",
        raw,
        ("x.pt", load, each(b"", b"x", out[:99], out[:-99], out[: len(out) // 2], RNG.bytes(999))),
        (
            "x.pt",
            load,
            each(
                None, {}, [1], 5, torch.ones(2), {"format": "x"}, full, Evil(), full | {"x": Evil()}
            ),
        ),
        ("x.pt", load, pickle.dumps(Evil())),
    )
    names = [
        k
        for k, v in state["config"].items()
        if isinstance(v, int) and k not in ("codes" * (load is not load_tokenizer), "images")
    ]
    add(
        "checkpoints",
        loaded,
        (READ, load, state),
        (READ, load, state, ("model", 0), lambda w: w.half()),
        *(("x.pt", load, state, (k,), v) for k in ("config", "model") for v in OTHER_CONFIGS),
        *(
            ("x.pt", load, state, ("config", k), v)
            for k in names
            for v in numbers[:: 1 + 3 * (load is not load_pretrained)]
        ),
        ("x.pt", load, state, ("model", 0), each(DROP, None, 5, "x", [1.0])),
        *(("x.pt", load, state, ("model", 0), lambda w, v=v: w * v) for v in (np.nan, np.inf, 1j)),
        (
            "x.pt",
            load,
            state,
            ("model", 0),
            each(torch.Tensor.int, torch.Tensor.bool, lambda w: w[:1]),
        ),
        ("x.pt", load, state, ("model", 0), each(torch.Tensor.to_sparse, lambda w: w.to("meta"))),
        ("x.pt", load, state, ("model", "more"), torch.ones(2)),
        ("x.pt", load, state, ("model", 5), torch.ones(2)),
        *(
            ("x.pt", load, state, (k,), v)
            for k in state
            if k in ("setting", "classes", "args")
            for v in (DROP, None, 5, [])
        ),
    )
add(
    "checkpoints",
    loaded,
    *(
        ("x.pt", seg.load_segmenter, STATES[seg.load_segmenter], ("setting", k), v)
        for k in ("features", "decoder", "classes", "roi", "overlap", "spacing")
        for v in (DROP, "x", -1)
    ),
    ("x.pt", cls.load_classifier, STATES[cls.load_classifier], ("args", "pool"), each(DROP, [])),
)
PUBLISHED = {"model.embed_tokens.weight": torch.ones(3, 24)}
add(
    "checkpoints",
    raw,
    *(("x.pt", load_pretrained, {"state_dict": d}) for d in (PUBLISHED, None, 5, [], {"x": 1})),
)


# ---- predictions, and whole scripts ----------------------------------------------------------


def predict(folder, net, *files):
    """eval.py predict on a good scan and another: the good one is predicted on its own grid."""
    torch.save(net, folder / "x.pt")
    for name, data in (("good.nii", GOOD), *files):
        put(folder / "s" / name, data)
    words = ["predict", "--ckpt", folder / "x.pt", folder / "s", "--out", folder / "o"]
    sys.argv = [*map(str, ["eval.py", *words, "--no-overlay", "--device=cpu", "--dtype=fp32"])]
    ev.main()
    assert nib.load(folder / "o/good.nii.gz").shape == EDGES
    left_out(read_table(folder / "o/skipped.csv"))


NET = STATES[seg.load_segmenter]
NAN = NET | {"model": {k: v * np.nan for k, v in NET["model"].items()}}
add(
    "predict",
    predict,
    (READ, NET),
    ("NaN or infinite", NAN),
    *(("SKIPPED", NET, ("a.nii", d)) for d in (b"", GOOD[:999], nifti(scl_slope=np.float32(1e38)))),
    *(("SKIPPED", NET, ("[1].nii.gz", d)) for d in (GOOD, flipped(ZIPPED, 8 * len(ZIPPED) - 40))),
    ("SKIPPED", NET, ("a.npz", npz(train_images=EVIL))),
    ("SKIPPED", NET, ("a.nii", nifti(np.stack([NOISE] * 3, 3)))),
    ("one file|SKIPPED", NET, ("good.nii.gz", ZIPPED)),
)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_inputs(tmp_path, step):
    """Every third input of the table, 300 and more; with --slow all."""
    table, bad = {}, []
    for n, (surface, act, words, *args) in [*enumerate(INPUTS)][::step]:
        folder = tmp_path / str(n)
        folder.mkdir()
        verdict, said = attempt(folder, act, words, *args)
        if (folder / "executed").exists():  # a pickle was run
            verdict = "silent"
        shutil.rmtree(folder)
        table.setdefault(surface, Counter())[verdict] += 1
        if verdict in FAULTS:
            bad.append((n, surface, verdict, repr(args)[:80], repr(args)[-60:], words, said))
    print(f"{'':18}", *(f"{v:>8}" for v in VERDICTS))
    for surface, counts in {**table, "in all": sum(table.values(), Counter())}.items():
        print(f"{surface:18}", *(f"{counts[v]:8}" for v in VERDICTS))
    assert not bad, "\n".join(map(str, bad))
    assert sum(map(Counter.total, table.values())) > 300


@pytest.mark.parametrize(
    "words",
    [
        "serialize.py --spatial {}/s --out {}/c",
        "eval.py predict --ckpt {}/nan.pt {}/s --out {}/o",
        "finetune_cls.py --task mine --data {}/cases.csv --out {}/o",
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                "serialize.py --spatial {}/none --out {}/c",
                "finetune_seg.py --task mine --data {}/s --init {}/evil.pt --classes x --out {}/o",
                "finetune_cls.py --task mine --data {}/s --init {}/nan.pt --out {}/o",
                "pretrain.py --size nano --init {}/evil.pt --out {}/o --data {}/s",
            )
        ),
    ],
)
def test_a_script_ends_with_one_line_and_code_2(tmp_path, words):
    put(tmp_path / "s/a.nii", GOOD[:999])
    put(tmp_path / "cases.csv", b"\0" * 200_000)
    torch.save(NAN, tmp_path / "nan.pt")
    torch.save({"format": "x", "x": Evil()}, tmp_path / "evil.pt")
    name, *flags = words.replace("{}", str(tmp_path)).split()
    command = [sys.executable, str(ROOT / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "executed").exists()
