"""The public data sets as they unpack, in files of a few voxels: what is read, whose it is."""

import csv
import json
import locale
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import nibabel as nib
import numpy as np
import pytest

import finetune_cls
import serialize
from common import BadInput
from finetune_seg import find_cases, read_case
from serialize import CONTRASTS, build, collect

QUIET = {"workers": 0, "say": lambda *words: None}
MACHINE = SimpleNamespace(say=QUIET["say"])

# A line a file: its patient (- a label map, . neither), its path below the folder that is named.
# A path that ends in / is a DICOM series.
SPATIAL = """\
ribfrac
RibFrac1-image    ribfrac-train-images-1/Part1/RibFrac1-image.nii.gz
RibFrac421-image  ribfrac-val-images/RibFrac421-image.nii.gz
-                 ribfrac-train-labels-1/Part1/RibFrac1-label.nii.gz
-                 ribfrac-val-labels/RibFrac421-label.nii.gz
.                 ribfrac-train-info-1.csv

covid
volume-covid19-A-0012  volume-covid19-A-0012.nii.gz
volume-covid19-A-0705  volume-covid19-A-0705_day004.nii.gz
volume-covid19-A-0705  volume-covid19-A-0705_day043.nii.gz

amos
amos_0001  amos22/imagesTr/amos_0001.nii.gz
amos_0008  amos22/imagesVa/amos_0008.nii.gz
amos_0002  amos22/imagesTs/amos_0002.nii.gz
-          amos22/labelsTr/amos_0001.nii.gz
-          amos22/labelsVa/amos_0008.nii.gz
.          amos22/dataset.json
.          amos22/.DS_Store
.          amos22/imagesTr/._amos_0001.nii.gz
.          __MACOSX/amos22/imagesTr/._amos_0001.nii.gz

isles
sub-strokecase0001  sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_dwi.nii.gz
sub-strokecase0001  sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_adc.nii.gz
sub-strokecase0001  sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz
sub-strokecase0002  sub-strokecase0002/ses-0001/dwi/sub-strokecase0002_ses-0001_dwi.nii.gz
-  derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz
.  dataset_description.json
.  README

abdomenct-1k
Case_00001  AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz
Case_00335  AbdomenCT-1K-ImagePart2/Case_00335_0000.nii.gz
-           Mask/Case_00001.nii.gz
-           Mask/Case_00335.nii.gz

totalsegmentator
s0000  s0000/ct.nii.gz
s0001  s0001/ct.nii.gz
-      s0000/segmentations/liver.nii.gz
-      s0001/segmentations/rib_left_1.nii.gz
.      meta.csv

verse
sub-gl003     dataset-01training/rawdata/sub-gl003/sub-gl003_dir-ax_ct.nii.gz
sub-verse401  dataset-03test/rawdata/sub-verse401/sub-verse401_split-verse253_ct.nii.gz
sub-verse401  dataset-03test/rawdata/sub-verse401/sub-verse401_split-verse254_ct.nii.gz
-  dataset-01training/derivatives/sub-gl003/sub-gl003_dir-ax_seg-vert_msk.nii.gz
.  dataset-01training/derivatives/sub-gl003/sub-gl003_dir-ax_seg-subreg_ctd.json

rsna-2022
1.2.826.0.1.3680043.10001  train_images/1.2.826.0.1.3680043.10001/
1.2.826.0.1.3680043.10633  train_images/1.2.826.0.1.3680043.10633/
1.2.826.0.1.3680043.22327  test_images/1.2.826.0.1.3680043.22327/
-                          segmentations/1.2.826.0.1.3680043.10633.nii
.                          train.csv

rsna-2020
6897fa9de148  train/6897fa9de148/2bfbb7fd2e8b/
014f6cfca8ac  train/014f6cfca8ac/0e8ae2bb0a3d/
014f6cfca8ac  train/014f6cfca8ac/1f9bf3cc1b4e/
df06fad17bc3  test/df06fad17bc3/e7a1c8b0f2d4/
.             train.csv

stoic
3      data/mha/3.mha
10042  data/mha/10042.mha
.      metadata/reference.csv

flare22
FLARE22_Tr_0001  images/FLARE22_Tr_0001_0000.nii.gz
FLARE22_Tr_0002  images/FLARE22_Tr_0002_0000.nii.gz
-                labels/FLARE22_Tr_0001.nii.gz
-                labels/FLARE22_Tr_0002.nii.gz

flare23
FLARE23_0001    imagesTr2200/FLARE23_0001_0000.nii.gz
FLARE23_2201    unlabelTr1800/FLARE23_2201_0000.nii.gz
FLARE23Ts_0001  validation/FLARE23Ts_0001_0000.nii.gz
-               labelsTr2200/FLARE23_0001.nii.gz

kits
case_00000  case_00000/imaging.nii.gz
case_00001  case_00001/imaging.nii.gz
-           case_00000/segmentation.nii.gz
-           case_00001/label.nii.gz

lits
volume-0  batch1/volume-0.nii
volume-1  batch1/volume-1.nii
-         batch1/segmentation-0.nii
-         batch1/volume-0_gt.nii

vs-seg
VS-SEG-001_t1  VS-SEG-001_t1.nii.gz
VS-SEG-002_t1  VS-SEG-002_t1.nii.gz"""


def voxels(seed, *shape):
    rng = np.random.default_rng(crc32(str(seed).encode()))
    return rng.integers(0, 900, shape or (9, 10, 11), np.int16)


def write(path, affine=None, values=None):
    """A scan, or what else may have this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = voxels(path) if values is None else values
    if path.name.startswith(".") or ".nii" not in path.name:
        path.write_bytes(b"Mac OS X" * 40)
    else:
        nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def write_sitk(path, step=1.0):
    """An .mha file, or a folder with a DICOM series, `step` mm from slice to slice."""
    sitk = pytest.importorskip("SimpleITK")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    if path.suffix == ".mha":
        path.parent.mkdir(parents=True, exist_ok=True)
        return writer.Execute(sitk.GetImageFromArray(voxels(path)), str(path), False, -1)
    path.mkdir(parents=True)
    before = locale.setlocale(locale.LC_CTYPE)
    for z, values in enumerate(voxels(path)):
        image = sitk.GetImageFromArray(values)
        image.SetMetaData("0020|000e", f"1.2.3.{crc32(str(path).encode())}")
        image.SetMetaData("0020|0032", f"0\\0\\{z * step:.1f}")
        writer.Execute(image, str(path / f"{z + 1}.dcm"), False, -1)
    locale.setlocale(locale.LC_CTYPE, before)  # to write DICOM makes it C


@pytest.fixture
def run(monkeypatch, capsys):
    """run(flag, …): what serialize.py prints."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["serialize.py", *map(str, flags), "--workers=0"])
        serialize.main()
        return capsys.readouterr().out

    return run


def splits_of(cases, key="id"):
    return [(c[key], c["split"]) for c in cases]


# ---- pre-training ----------------------------------------------------------------------------


@pytest.mark.parametrize("files", SPATIAL.split("\n\n"), ids=lambda files: files.split()[0])
def test_spatial_sets(tmp_path, files):
    name, *files = files.splitlines()
    whose, labels = {}, set()
    for who, file in map(str.split, files):
        path = tmp_path / name / file
        (write_sitk if file.endswith(("/", ".mha")) else write)(path)
        if who == "-":
            labels.add(path)
        elif who != ".":
            whose[str(path)] = f"{name}/{who}"
    jobs, left = collect([tmp_path / name])
    assert {path for path, _ in left} == labels
    before = locale.setlocale(locale.LC_CTYPE)
    rows = build(jobs, left, tmp_path / "c", **QUIET)
    assert locale.setlocale(locale.LC_CTYPE) == before
    assert {r["source"]: r["patient"] for r in rows} == whose
    splits = dict(splits_of(rows, "patient"))
    assert list(splits.values()).count("val") == 1
    assert set(splits_of(rows, "patient")) == set(splits.items())


def test_contrast_sets(tmp_path):
    cases = """BraTS-GLI-00000-000 BraTS-GLI-00000-001 BraTS-MEN-00004-000 BraTS-MET-00002-000
    BraTS-PED-00002-000 BraTS-SSA-00002-000 MS-patient07 MS-patient19 PGBM-002 PGBM-003"""
    for case in cases.split():
        home = tmp_path / "brats" / case[:9] / case
        for c in (*CONTRASTS, "seg"):
            write(home / f"{case}-{c}.nii.gz")
        write(home / f"._{case}-t1n.nii.gz")
        for c in CONTRASTS:
            (home / f"{case}-{c}.nii.gz.md5").write_text("")
    (home / "PGBM-003-t2f.nii.gz").unlink()
    jobs, left = collect([], [tmp_path / "brats"])
    assert left == [(home, "lacks PGBM-003-t2f.nii.gz")]
    rows = build(jobs, left, tmp_path / "c", **QUIET)
    read = [(case, c) for case in cases.split()[:-1] for c in CONTRASTS]
    assert [(Path(r["group"]).name, r["contrast"]) for r in rows] == read
    whose = {case: re.sub("(?<=^BraTS-.{9})-00.$", "", case) for case, _ in read}
    assert {Path(r["group"]).name: Path(r["patient"]).name for r in rows} == whose


# File_name, Bounding_boxes, Coarse_lesion_type, Slice_range
LESIONS = """\
000089_01_01_037.png;"13.5, 17.5, 16.5, 21.5";-1;"31, 43"
000090_01_01_115.png;"26.5, 21.0, 28.5, 22.0";2;"109, 121"
000091_03_01_057.png;"34.0, 27.0, 36.0, 29.0";2;"51, 63"
000091_03_01_093.png;"23.0, 22.0, 25.0, 24.0";2;"87, 99"
000091_03_01_093.png;"20.0, 23.0, 26.0, 25.0";5;"87, 99"
000092_01_01_004.png;"20.0, 23.0, 26.0, 25.0";3;"1, 12"
"""


def test_deeplesion(tmp_path):
    table, images = tmp_path / "DL_info.csv", tmp_path / "Images_nifti"
    with open(table, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(f"column {n}" for n in range(18))
        for name, box, kind, slices in csv.reader(LESIONS.splitlines(), delimiter=";"):
            rows.writerow([name, *"12345", box, *"78", kind, 0, slices, *"234567"])
    turned = np.diag([-0.8, -0.8, -5, 1])[[1, 0, 2, 3]]  # as DL_save_nifti.py has it
    names = "000089_01_01_031-043 000090_01_01_109-121 000091_03_01_051-063 000091_03_01_087-099"
    for name in names.split():  # [row, column, slice]
        write(images / f"{name}.nii.gz", turned, voxels(name, 40, 50, 13))
    jobs, left = collect(semantic=(table, images))
    missing = images / "000092_01_01_001-012.nii.gz"
    assert left == [
        (f"{table}:2", "lesion of unknown type (-1)"),
        (missing, "named in DL_info.csv, but no such file"),
    ]
    rows = build(jobs, left, tmp_path / "c", **QUIET)
    assert [(r["patient"], r["group"], r["centre"]) for r in rows] == [
        ("000090", "2", [21.5, 17.5]),
        ("000091", "2", [14, 11]),
        ("000091", "2", [25, 16]),
        ("000091", "5", [26, 15]),
    ]
    assert rows[0]["shape"] == [50, 40, 13]


# ---- fine-tuning -----------------------------------------------------------------------------

DECATHLON = """\
liver          Task03_Liver          liver_0,liver_1,liver_2               liver,cancer
lung           Task06_Lung           lung_001,lung_003,lung_004            cancer
pancreas       Task07_Pancreas       pancreas_001,pancreas_004           pancreas,cancer
hepaticvessel  Task08_HepaticVessel  hepaticvessel_001,hepaticvessel_002   Vessel,Tumour
spleen         Task09_Spleen         spleen_2,spleen_3,spleen_6            spleen
colon          Task10_Colon          colon_001,colon_005,colon_006         colon_cancer_primaries"""


def write_pairs(root, tag, names):
    """Scans and labels, and what dataset.json says of them."""
    for name in names:
        pair = {"image": f"./images{tag}/{name}.nii.gz", "label": f"./labels{tag}/{name}.nii.gz"}
        for what, file in pair.items():
            path = write(root / file, None, voxels(name) % 2 if what == "label" else None)
            write(path.with_name(f"._{path.name}"))
        yield pair


@pytest.mark.parametrize("line", DECATHLON.splitlines(), ids=lambda line: line.split()[0])
def test_the_decathlon(tmp_path, line):
    task, folder, names, classes = line.split()
    root, names, classes = tmp_path / folder, names.split(","), classes.split(",")
    notes = {
        "labels": dict(enumerate(["background", *classes])),
        "training": [*write_pairs(root, "Tr", names)],
        "test": ["./imagesTs/test_1.nii.gz"],
    }
    write(root / notes["test"][0])
    write(root / "._dataset.json")
    (root / "dataset.json").write_text(json.dumps(notes))
    cases, known = find_cases(task, root, None, MACHINE)
    assert len(known) == len(classes)
    assert sorted(c["id"] for c in cases) == names
    assert {c["split"] for c in cases} == {"train", "val"}
    values, _, _, labels = read_case(cases[0], 2)
    assert np.array_equal(values, voxels(cases[0]["image"]))
    assert np.array_equal(labels, voxels(cases[0]["id"]) % 2)
    notes["validation"] = [notes["training"].pop()]
    (root / "dataset_withVal.json").write_text(json.dumps(notes))
    cases, _ = find_cases(task, root, None, MACHINE)
    assert splits_of(cases) == [*((n, "train") for n in names[:-1]), (names[-1], "val")]
    first = Path(cases[0]["image"])  # nnU-Net's first version lists names without the channel
    os.rename(first, first.with_name(f"{names[0]}_0000.nii.gz"))
    cases, _ = find_cases(task, root, None, MACHINE)
    assert cases[0]["id"] == names[0] and os.path.exists(cases[0]["image"])
    said, second = [], write(first.with_name(f"{names[0]}_0001.nii.gz"))
    find_cases(task, root, None, SimpleNamespace(say=said.append))
    assert said == [f"{root}: cases with several channels, of which the first is read: 1"]
    second.unlink()
    os.rename(cases[0]["image"], first)
    jobs, left = collect([root])  # to pre-train on
    assert {j["patient"] for j in jobs} == {f"{folder}/{n}" for n in (*names, "test_1")}
    assert len(left) == len(names)


def test_amos_to_fine_tune_on(tmp_path):
    notes = {
        "training": [*write_pairs(tmp_path, "Tr", ["amos_0001", "amos_0507"])],
        "validation": [*write_pairs(tmp_path, "Va", ["amos_0008"])],
        "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
    }
    want = [("amos_0001", "train"), ("amos_0507", "train"), ("amos_0008", "val")]
    assert splits_of(find_cases("amos", tmp_path, None, MACHINE)[0]) == want
    (tmp_path / "dataset.json").write_text(json.dumps(notes))
    assert splits_of(find_cases("amos", tmp_path, None, MACHINE)[0]) == want


def test_left_atria(tmp_path):
    h5py = pytest.importorskip("h5py")
    names = ["0RZDK210BSMWAA6467LU", "4CIJFCEFSPJNZBGXGPFQ"]
    atria = tmp_path / "2018LA_Seg_Training Set"
    for name, split in zip(names, ("train", "test")):
        (atria / name).mkdir(parents=True)
        with h5py.File(atria / name / "mri_norm2.h5", "w") as f:
            f["image"], f["label"] = np.float32(voxels(name)), np.uint8(voxels(name) % 2)
        (tmp_path / f"{split}.list").write_text(f"{name}\n", "utf-8-sig")
    cases, _ = find_cases("la", tmp_path, None, MACHINE)
    assert splits_of(cases) == [*zip(names, ("train", "val"))]
    assert np.array_equal(read_case(cases[0], 2)[3], voxels(names[0]) % 2)
    for folder in (tmp_path, atria):  # the lists lie in it, or beside it
        assert splits_of(find_cases("la", folder, None, MACHINE)[0]) == splits_of(cases)
        jobs, left = collect([folder])
        assert [j["source"].parent.name for j in jobs] == names[:1]
        assert left == [(atria / names[1] / "mri_norm2.h5", "stands in test.list")]


def test_ricord(tmp_path):
    names = {"train": "1A-419639-000082 1A-419639-000082-2 1B-419639-000101"}
    names |= {"val": "1A-419639-000083 1B-419639-000102", "test": "1A-419639-000084"}
    for split, files in names.items():
        with open(tmp_path / f"{split}.txt", "w") as f:
            for name in files.split():
                file = write(tmp_path / f"MIDRC-RICORD-{name}.nii.gz").name
                f.write(f"{file} {name.startswith('1A'):d}\n")
    task = finetune_cls.TASKS["ricord"]
    cases, _ = finetune_cls.list_cases(task, tmp_path, None, None, MACHINE)
    assert [c["split"] for c in cases] == ["train", "train", "train", "val", "val", "test"]
    assert [c["label"] for c in cases] == [1, 1, 0, 1, 0, 1]
    assert len({c["patient"] for c in cases}) == 5


@pytest.mark.parametrize("size, name", [(28, "nodulemnist3d"), (64, "nodulemnist3d_64")])
def test_nodules(tmp_path, size, name):
    arrays = {}
    for split, n in (("train", 3), ("val", 2), ("test", 2)):
        arrays[f"{split}_images"] = np.uint8(voxels(split, n, size, size, size) % 256)
        arrays[f"{split}_labels"] = np.uint8([[0], [1], [0]])[:n]
    file = tmp_path / f"{name}.npz"
    np.savez(file, **arrays)
    task = finetune_cls.TASKS["nodule"]
    for data in (file, tmp_path):
        cases, _ = finetune_cls.list_cases(task, data, None, None, MACHINE)
        assert [c["split"] for c in cases] == ["train"] * 3 + ["val"] * 2 + ["test"] * 2
        assert [c["label"] for c in cases] == [0, 1, 0, 0, 1, 0, 1]
    rows = build(*collect([file]), tmp_path / "c", **QUIET)
    assert len({r["patient"] for r in rows}) == len(rows) == 3
    for row, image in zip(rows, arrays["train_images"]):
        assert np.array_equal(np.load(tmp_path / "c" / row["file"]), image)


def test_what_is_said_anew_holds_for_what_was_there_before(tmp_path):
    for name in ("P1/a", "P1/b", "P2/c"):
        write(tmp_path / f"s/{name}.nii.gz")
    folder, out = [tmp_path / "s"], tmp_path / "c"
    assert {r["patient"] for r in build(*collect(folder), out, **QUIET)} == {"s/a", "s/b", "s/c"}
    rows = build(*collect(folder, patient=r"P\d"), out, **QUIET)
    assert sorted(r["patient"] for r in rows) == ["s/P1", "s/P1", "s/P2"]
    (row,) = build(*collect(folder, exclude=["*/p1/*"], patient=r"P\d"), out, **QUIET)
    assert row["patient"] == "s/P2"


def test_series_may_be_excluded_later_and_patients_stay_on_their_side(tmp_path):
    write_sitk(tmp_path / "s/one")
    for n in range(8):
        write(tmp_path / f"s/a{n}.nii.gz")
    folder, out = [tmp_path / "s"], tmp_path / "c"
    before = dict(splits_of(build(*collect(folder), out, **QUIET), "patient"))
    moved = [*before.values()].index("val")
    splits = {p: "val" if n == moved - 1 else "train" for n, p in enumerate(before)}
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    lines = [row | {"split": splits[row["patient"]]} for row in lines]  # another one validates
    serialize.write_index(out, lines)
    rows = build(*collect(folder), out, spacing=(1, 1, 1.1), **QUIET)  # all are read again
    assert dict(splits_of(rows, "patient")) == splits
    rows = build(*collect(folder, exclude=["*/one/*"]), out, spacing=(1, 1, 1.1), **QUIET)
    assert {r["patient"] for r in rows} == {f"s/a{n}" for n in range(8)}


def test_linked_folders_are_searched_once_under_their_own_names(tmp_path):
    write(tmp_path / "t/labelsTr/a.nii.gz")
    write(tmp_path / "t/imagesTr/a.nii.gz")
    (tmp_path / "t/gt").symlink_to(tmp_path / "t/labelsTr")  # sorts first
    scans, labels = serialize.scans_under(tmp_path / "t", serialize.LABELS)
    assert [len(scans), len(labels)] == [1, 1]
    scans = [write(tmp_path / f"{place}/x{n}.nii.gz") for n, place in enumerate(("s", "far/in"))]
    (tmp_path / "s/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "s")
    (tmp_path / "s/broken").symlink_to(tmp_path / "nowhere")
    rows = build(*collect([tmp_path / "s"]), tmp_path / "c", **QUIET)
    assert [r["source"] for r in rows] == [str(tmp_path / "s/link/in/x1.nii.gz"), str(scans[0])]


def test_slices_may_be_named_by_uid_and_none_may_be_missing(tmp_path):
    write_sitk(tmp_path / "s/one", 0.625)  # rounded to 0.1
    for path in (tmp_path / "s/one").iterdir():
        path.rename(path.with_name(f"CT.1.2.840.{path.stem}"))
    (row,) = build(*collect([tmp_path / "s"]), tmp_path / "c", **QUIET)
    assert len(row["shape"]) == 3
    for n in (4, 5):
        (tmp_path / f"s/one/CT.1.2.840.{n}").unlink()
    with pytest.raises(BadInput, match="not evenly spaced: some may be missing"):
        build(*collect([tmp_path / "s"]), tmp_path / "d", **QUIET)


# ---- checking and auditing -------------------------------------------------------------------


def test_check_says_what_would_be_read(tmp_path, run):
    write(tmp_path / "s0000/ct.nii.gz", np.diag([2, 2, 3, 1]))
    twin = write(tmp_path / "s0001/ct.nii.gz", np.diag([-2, -2, 3, 1]))
    flat = write(tmp_path / "s0002/ct.nii.gz", None, voxels("flat", 9, 10, 4))
    label = write(tmp_path / "s0002/segmentations/liver.nii.gz")
    write(tmp_path / "s0003/ct.nii.gz").write_bytes(twin.read_bytes())
    told = run("--spatial", tmp_path, "--check", "--out", tmp_path / "c")
    for words in (
        f"left out: {label}: looks like a label map (--exclude)",
        f"left out: {flat}: 9x10x4: fewer than 8 voxels along an axis",
        "3 files of 3 patients can be read, 2 are left out",
        "type: {'spatial': 3}",
        "orientation: {'LPS': 2, 'RAS': 1}",
        "shape: least 9 x 10 x 11, median 9 x 10 x 11, most 9 x 10 x 11",
        "spacing: least 2 x 2 x 3, median 2 x 2 x 3, most 2 x 2 x 3",
        "files that others have too, byte for byte: 1",
    ):
        assert f"{words}\n" in told
    assert not (tmp_path / "c").exists()


def test_a_corpus_is_checked_and_audited(tmp_path, run, monkeypatch):
    corpus, data = tmp_path / "c", tmp_path / "msd"
    scans = [write(tmp_path / f"ct/sub-0{n}_ct.nii.gz") for n in range(3)]
    rows = build(*collect([tmp_path / "ct"]), corpus, **QUIET)
    assert "all 3 arrays are as they were written" in run("--out", corpus, "--check")

    flipped = voxels(scans[1])[::-1]
    same = write(data / "imagesTr/spleen_2.nii.gz", np.diag([-1, 1, 1, 1]), flipped)
    named = write(data / "imagesTr/sub-02_mr.nii.gz")
    other = write(data / "imagesTr/spleen_3.nii.gz")
    half = write(data / "imagesTr/spleen_6.nii.gz")
    half.write_bytes(b"half a scan")
    vast = data / "imagesTr/spleen_7.nii.gz"  # beyond 63 bits
    values = np.arange(2**63, 2**63 + 1000, dtype=np.uint64).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(values, np.eye(4), dtype=np.uint64), vast)
    write(data / "labelsTr/spleen_2.nii.gz")
    real, ended = serialize.parallel, []

    def parallel(*args):
        yield from real(*args)
        ended.append(args)

    monkeypatch.setattr(serialize, "parallel", parallel)
    told = run("--audit", corpus, "--against", data)
    assert ended  # its processes, too: those of a generator left half-way end in a traceback
    assert f"{same}: the same voxels as {scans[1]}\n" in told
    assert f"{named}: the same name as {scans[2]}\n" in told
    assert f"{other}:" not in told and f"{half}: unreadable: " in told and f"{vast}: " in told
    words = f"1 are in {corpus} voxel for voxel, 1 by name alone, 2 could not be read"
    assert f"5 scans of {data}: {words}" in told

    array = corpus / rows[1]["file"]
    damaged = bytearray(array.read_bytes())
    damaged[-7] ^= 1
    array.write_bytes(damaged)
    with pytest.raises(BadInput, match=f"1 of 3 arrays are damaged.*{array.name}"):
        run("--out", corpus, "--check")
