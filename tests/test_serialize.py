import itertools
import os
import re
import resource
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import serialize
from common import BadInput, Machine, batches, lock_of, read_table
from model import token_order
from serialize import CONTRASTS, KINDS, Sequences, build, collect, read_index, read_scan, to_int16

NIBABEL = Path(nib.__file__).parent / "tests/data"
EYE = np.eye(4)
QUIET = {"workers": 0, "say": lambda *words: None}


def save(path, values, affine=EYE, dtype=np.int16, **fields):
    """A NIfTI file of exactly these stored values; fields: of its header."""
    values = np.asarray(values, dtype)
    header = nib.Nifti1Image(values, affine).header
    for name, value in {"scl_slope": 1, "scl_inter": 0, "vox_offset": 352, **fields}.items():
        header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.binaryblock + bytes(4) + values.tobytes("F"))
    return path


def ramp(*shape):
    return np.arange(np.prod(shape)).reshape(shape) % 1000


def ramps(folder, *depths):
    for n, depth in enumerate(depths):
        save(folder / f"{n}.nii", ramp(9, 9, depth))


def built(out, *folders):
    """The rows of a corpus of spatial scans, and {file: why it was skipped}."""
    rows = build(*collect(folders), out, **QUIET)
    listed = read_table(out / "skipped.csv")
    return rows, {Path(r["source"]).name: r["reason"] for r in listed}


# ---- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAI", "PIR", "SLA"])
def test_any_orientation_is_read_as_ras(tmp_path, codes):
    want = ramp(9, 10, 11)
    ras, own_axes = map(nib.orientations.axcodes2ornt, ("RAS", codes))
    to = nib.orientations.ornt_transform(ras, own_axes)
    own = np.diag([2, 3, 4, 1.0]) @ nib.orientations.inv_ornt_aff(to, want.shape)
    save(tmp_path / "a.nii", nib.orientations.apply_orientation(want, to), own)
    values, affine, raw = read_scan(tmp_path / "a.nii")
    assert np.array_equal(values, want)
    assert np.allclose(affine, np.diag([2, 3, 4, 1]))
    assert np.allclose(raw, own)


def test_slope_and_intercept_are_applied(tmp_path):
    stored = ramp(8, 8, 8) + 40_000
    for slope, inter in ((1, -1024), (1, -41_000), (2, 0), (0.5, 3), (-1, 10)):
        save(tmp_path / "a.nii", stored, dtype=np.uint16, scl_slope=slope, scl_inter=inter)
        values, _, _ = read_scan(tmp_path / "a.nii")
        assert np.allclose(values, stored * slope + inter)
        assert (values.dtype.kind == "i") == (slope == 1)


def test_simpleitk_reads_what_nibabel_reads(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    nifti, other = tmp_path / "a.nii", tmp_path / "a.mha"
    ras = [[0, 0, 2, 5], [-3, 0, 0, 6], [0, 4, 0, 7], [0, 0, 0, 1]]
    sitk.WriteImage(sitk.ReadImage(save(nifti, ramp(9, 10, 11), ras)), other)
    for a, b in zip(read_scan(nifti), read_scan(other)):
        assert np.allclose(a, b, atol=1e-4)
    with pytest.raises(BadInput, match="0 DICOM series"):
        read_scan(tmp_path)
    (tmp_path / "gone.dcm").symlink_to("/gone")  # a slice that was not fetched
    assert serialize.stamp_of([tmp_path])[0] == 2
    other.write_bytes(other.read_bytes()[:900])
    with pytest.raises(BadInput, match="RuntimeError: (?!Exception).*read"):  # why, not where
        read_scan(other)


@pytest.mark.parametrize("package, name", [("SimpleITK", "a.mha"), ("h5py", "a.h5")])
def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"pip install {package}"):
        read_scan(tmp_path / name)


def test_real_scans_become_a_corpus_and_the_unusable_are_explained(tmp_path):
    rows, skipped = built(tmp_path / "c", NIBABEL)
    patients = Counter(Path(r["patient"]).name for r in rows)
    assert patients["example4d"] == 2  # frames
    assert len(patients) == 4
    assert len({r["file"] for r in rows}) == len(rows)
    for name, reason in (
        ("standard.nii.gz", "4x5x7: fewer than 8"),
        ("nifti1.hdr", "FileNotFoundError"),
        ("analyze.hdr", "not a NIfTI"),
        ("row_major.dconn.nii", "Cifti2Image"),
    ):
        assert reason in skipped[name]


def test_every_kind_of_bad_file_has_its_reason(tmp_path):
    home, good = tmp_path / "s", ramp(9, 9, 9)
    for name, values, more in (
        ("good", good, {}),
        ("labelsTr/good", good, {}),
        ("2D", good[..., :1], {}),
        ("fewer than 8", good[..., :4], {}),
        ("all voxels are equal (7)", 0 * good + 7, {}),
        ("1 voxels are NaN", np.where(good == 5, np.nan, good), {"dtype": np.float32}),
        ("a vector", np.zeros((9, 9, 9, 1, 3)), {}),
        ("complex64", good, {"dtype": np.complex64}),
        ("affine", good, {"srow_x": 0, "sform_code": 2, "qform_code": 0}),
        ("._good", good, {}),  # litter of macOS
    ):
        save(home / f"{name}.nii", values, **more)
    (home / "cut short.nii").write_bytes((home / "good.nii").read_bytes()[:1000])
    (home / "unreadable.nii.gz").write_text("not a scan")
    rows, skipped = built(tmp_path / "c", home)
    assert len(rows) == 1
    assert len(skipped) == 10  # without the litter
    assert "label map" in skipped.pop("good.nii")
    for name, reason in skipped.items():
        assert name.split(".")[0] in reason
    assert (tmp_path / "c/skipped.csv").read_bytes().startswith(b"source,reason\n")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_to_int16_is_exact_for_whole_numbers(dtype):
    for low, high in ((-1024, 3071), (0, 65535), (100_000, 150_000), (-40_000, 20_000)):
        values = np.linspace(low, high, 600).round().reshape(10, 6, 10).astype(dtype)
        stored, slope, inter = to_int16(values)
        assert stored.dtype == np.int16
        assert np.array_equal(stored * slope + inter, values)


def test_a_scan_is_checked_against_a_limit_and_the_memory(tmp_path, monkeypatch):
    assert 0 < serialize.machine_memory()
    monkeypatch.setenv(serialize.LARGEST, "512")  # and so put back
    ramps(tmp_path / "s", 11, 11)
    words = ["serialize.py", "--spatial", tmp_path / "s", "--out", tmp_path / "c", "--workers=2"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--largest=0.0008"])
    with pytest.raises(BadInput, match="x11 voxels: more than the 0.0008 Mvoxels of --largest"):
        serialize.main()
    serialize.set_largest("1")
    serialize.check_memory((100, 1024, 10))
    monkeypatch.setattr(serialize, "machine_memory", lambda: 4e6)
    with pytest.raises(BadInput, match="0.0 GB of memory.*header.*--spacing"):
        serialize.check_memory((100, 1024, 10))


def test_another_spacing_is_another_corpus(tmp_path):
    values = np.indices((16, 20, 24))[0] * 10
    save(tmp_path / "s/a.nii", values)
    how = {"out": tmp_path / "c", **QUIET}
    (row,) = build(*collect([tmp_path / "s"]), spacing=(2, 2, 3), **how)
    assert (row["shape"], row["spacing"]) == ([8, 10, 8], [2, 2, 3])
    stored = np.load(tmp_path / "c" / row["file"])
    assert np.array_equal(stored, np.indices(stored.shape)[0] * 20 + 5)  # means of two
    (row,) = build(*collect([tmp_path / "s"]), **how)
    assert (row["shape"], row["spacing"]) == ([16, 20, 24], [1, 1, 1])
    assert np.array_equal(np.load(tmp_path / "c" / row["file"]), values)


def test_boxes_without_contrast_are_drawn_again(tmp_path):
    values = np.random.default_rng(0).integers(0, 900, (64, 16, 16))
    values[:30] = -1000
    save(tmp_path / "s/a.nii", values)
    build(*collect([tmp_path / "s"]), tmp_path / "c", **QUIET)
    data = Sequences(tmp_path / "c", size=16, stride=4)
    ranges = torch.stack([data[n]["ranges"] for n in range(30)])
    assert (ranges[..., 1] > ranges[..., 0]).all()


def test_to_int16_is_fine_for_floats():
    values = np.random.default_rng(0).normal(0, 1, (40, 40, 40)).astype(np.float32)
    for outlier, error in ((0, 2e-4), (1e6, 1e-3)):  # it must not take the levels of all others
        values[0, 0, 0] = outlier
        stored, slope, inter = to_int16(values)
        assert abs(stored * slope + inter - values).ravel()[1:].max() < error


# ---- corpora ---------------------------------------------------------------------------------


def test_a_second_run_reads_what_is_new_or_changed_or_lost(tmp_path):
    scans, out = tmp_path / "s", tmp_path / "c"
    ramps(scans, 9, 10, 11, 12)
    rows, _ = built(out, scans)
    for r in rows:
        os.utime(out / r["file"], ns=(1, 1))
    save(scans / "1.nii", ramp(9, 9, 20))
    save(scans / "4.nii", ramp(9, 9, 13))
    (out / rows[2]["file"]).write_bytes(b"half of it")
    again, _ = built(out, scans)
    assert again == read_index(out)
    depths = {Path(r["source"]).stem: r["shape"][2] for r in again}
    assert depths == dict(zip("01234", (9, 20, 11, 12, 13)))
    old = [r for r in again if (out / r["file"]).stat().st_mtime_ns == 1]
    assert old == [rows[0], rows[3]]  # their splits, too


def test_a_build_that_is_killed_goes_on(tmp_path, monkeypatch):
    ramps(tmp_path / "s", *range(9, 15))
    clock, read, real = itertools.count(0, 20), [], serialize.read_scan
    monkeypatch.setattr(serialize.time, "monotonic", lambda: next(clock))  # saves after each scan

    def read_or_die(path):
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(Path(path).stem)
        return real(path)

    monkeypatch.setattr(serialize, "read_scan", read_or_die)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "c", tmp_path / "s")
    with pytest.raises(BadInput, match="no corpus there"):  # nobody trains on half of it
        read_index(tmp_path / "c")
    read.append("")  # past the fourth
    rows, _ = built(tmp_path / "c", tmp_path / "s")
    assert rows == read_index(tmp_path / "c")
    assert not (tmp_path / "c/index.part.jsonl").exists()
    assert sorted(read) == ["", *"012345"]

    # again of files that have changed: who validates stays the same
    sides = {r["patient"]: r["split"] for r in rows}
    for file in (tmp_path / "s").iterdir():
        os.utime(file, ns=(1, 1))
    read.clear()
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "c", tmp_path / "s")
    # of other scans in between: those it was to read again stay
    read.append("")
    ramps(tmp_path / "other", 20)
    rows, _ = built(tmp_path / "c", tmp_path / "other")
    assert len(rows) == 7 and {r["patient"]: r["split"] for r in rows}.items() > sides.items()
    rows = build(*collect([tmp_path / "s"]), tmp_path / "c", 0.6, 1, **QUIET)
    assert {r["patient"]: r["split"] for r in rows}.items() > sides.items()
    # an array that a build with another --spacing wrote, before it was stopped
    old = np.load(tmp_path / "c" / rows[0]["file"])
    np.save(tmp_path / "c" / rows[0]["file"], np.repeat(old, 2, 2))
    built(tmp_path / "c", tmp_path / "s", tmp_path / "other")
    assert np.array_equal(np.load(tmp_path / "c" / rows[0]["file"]), old)


def test_a_corpus_without_patients_to_validate_is_named(tmp_path):
    ramps(tmp_path / "s", 20)
    built(tmp_path / "c", tmp_path / "s")
    how = {"size": 16, "stride": 1}
    with pytest.raises(BadInput, match=f"^{tmp_path}/c: nothing to validate with"):
        Sequences(Sequences(tmp_path / "c", **how), "val", **how)


def test_skipped_files_stay_listed_until_they_are_tried_again(tmp_path):
    for name, depth in (("a/good", 9), ("a/flat", 1), ("b/other", 10), ("b/thin", 4)):
        save(tmp_path / f"{name}.nii", ramp(9, 9, depth))
    built(tmp_path / "c", tmp_path / "a")
    assert set(built(tmp_path / "c", tmp_path / "b")[1]) == {"flat.nii", "thin.nii"}
    save(tmp_path / "a/flat.nii", ramp(9, 9, 11))
    assert set(built(tmp_path / "c", tmp_path / "a")[1]) == {"thin.nii"}


def test_the_same_voxels_and_folders_that_overlap_are_kept_once(tmp_path):
    home = tmp_path / "labels_seg-2024"  # what stands above a named folder does not matter
    ramps(home / "images", 9, 9, 10)
    ramps(home / "Mask", 11)
    rows, skipped = built(tmp_path / "c", home, home / "images", home)
    assert len(rows) == len(list((tmp_path / "c/arrays").iterdir())) == 2
    assert "the same voxels as" in skipped["1.nii"]
    assert "label map" in skipped["0.nii"]


def test_contrast_cases_that_do_not_fit(tmp_path):
    for case, depths, step in (
        ("BraTS-A-00000-000", (9, 9, 9, 9), 1),
        ("A-00001-000", (9, 9, 10, 9), 1),
        ("A-00002-000", (9, 9, 9), 1),
        ("B-00000-000", (9, 9, 9, 9), 2),  # the same shape in another place
    ):
        for c, n in zip(CONTRASTS, depths):
            affine = np.diag([step if c == "t2w" else 1, 1, 1, 1])
            save(tmp_path / f"s/{case}/{case}-{c}.nii", ramp(9, 9, n) + len(c), affine)
            if case.startswith("BraTS"):  # and another site's of that name
                save(tmp_path / f"s/two/{case}/{case}-{c}.nii", ramp(9, 9, n) ** 2, affine)
    rows = build(*collect([], [tmp_path / "s"]), tmp_path / "c", **QUIET)
    assert [r["contrast"] for r in rows] == [*CONTRASTS, *CONTRASTS]
    assert {r["patient"] for r in rows} == {"BraTS-A-00000"}  # and yet two cases:
    assert len(Sequences(tmp_path / "c", rows[0]["split"], size=8, stride=2).cases) == 2
    assert {j["patient"] for j in collect([], [tmp_path / "s/two"], patient="two")[0]} == {"two"}
    skipped = (tmp_path / "c/skipped.csv").read_text()
    assert 'A-00001-000,"its contrasts differ in shape: 9x9x9, 9x9x9, 9x9x10' in skipped
    assert "lacks A-00002-000-t2f" in skipped
    assert "not co-registered: B-00000-000-t2w" in skipped


def test_a_scan_that_does_not_say_how_it_lies_is_named(tmp_path):
    ramps(tmp_path / "s", 9)
    blind = save(tmp_path / "s/blind.nii", ramp(9, 9, 10), sform_code=0, qform_code=0)
    said = []
    build(*collect([tmp_path / "s"]), tmp_path / "c", workers=0, say=said.append)
    [warning] = [words for words in said if words.startswith("warning")]
    assert f"1 have neither sform nor qform, {blind} first" in warning


def test_whose_scan_a_path_is(tmp_path):
    names = "sub-03/ses-1/sub-03_dwi BraTS-GLI-00012-001/x amos_0007 FLARE22_Tr_0001_0000 a/ct b/ct"
    whose = ["sub-03", "BraTS-GLI-00012", "amos_0007", "FLARE22_Tr_0001", "a", "b"]
    for name in names.split():
        save(tmp_path / f"s/{name}.nii", ramp(9, 9, 9))
    jobs, _ = collect([tmp_path / "s"])
    assert {j["patient"] for j in jobs} == {f"s/{w}" for w in whose}
    for regex in (r"(\w)/ct", r"\w(?=/ct)"):
        jobs, _ = collect([tmp_path / "s/a"], patient=regex)
        assert jobs[0]["patient"] == "a/a"
    for regex, words in (("nobody", "does not match"), ("(", "not a regular expression")):
        with pytest.raises(BadInput, match=words):
            collect([tmp_path / "s"], patient=regex)


def test_an_index_and_its_splits_by_patient(corpus):
    rows = read_index(corpus)
    wanted = "kind source hash file shape spacing slope inter patient group split job stamp"
    assert all(set(wanted.split()) <= r.keys() for r in rows)
    for kind in KINDS:
        sides = {"train": set(), "val": set()}
        for r in rows:
            if r["kind"] == kind:
                sides[r["split"]].add(r["patient"])
        assert all(sides.values())
        assert not sides["train"] & sides["val"]
    assert Sequences(corpus, "val", 64, 4, 4).have["semantic"] == 8


def test_who_validates_in_one_of_several_corpora_trains_in_none(tmp_path):
    def write(name, *rows):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", np.full((8, 8, 8), ord(name), np.int16))
        same = {"kind": "spatial", "file": "a.npy", "shape": [8, 8, 8], "group": "case"}
        rows = [{**same, "patient": p, "hash": h, "split": split} for p, h, split in rows]
        rows += [{**rows[-1], "kind": "contrast"}] * 4
        serialize.write_index(tmp_path / name, rows)
        return str(tmp_path / name)

    a = write("a", ("p", 1, "val"), ("s", 5, "train"), ("r", 4, "train"))
    # p again, his voxels as those of another, who has further scans, one as that of s
    b = write("b", ("p", 2, "train"), ("q", 1, "train"), ("q", 5, "train"), ("t", 6, "train"))
    train = Sequences([a, b], size=8, stride=2)
    kept = [(r["patient"], r["file"]) for r in train.scans]
    assert kept == [("r", f"{a}/a.npy"), ("t", f"{b}/a.npy")]
    assert {int(train.array(r).max()) for r in train.scans} == {*b"ab"}
    assert [[r["file"] for r in case] for case in train.cases] == [
        [f"{f}/a.npy"] * 4 for f in (a, b)
    ]
    assert Sequences(train, "val", size=8, stride=2).have["spatial"] == 5
    assert Sequences(a, size=8, stride=2).have["spatial"] == 2


def test_a_split_stays_as_a_corpus_grows_and_is_one_for_a_scan_of_two_kinds():
    def rows(kind, n):
        names = [f"{kind}{i}" for i in range(n)]
        return [{"kind": kind, "group": "", "patient": p, "hash": p[-2:]} for p in names]

    split = serialize.split_by_patient
    small = split(rows("spatial", 40), 0.1, 0)
    before = [r["split"] for r in small]
    grown = [r["split"] for r in split(small + rows("spatial", 80)[40:], 0.1, 0)]
    assert grown[:40] == before
    assert (before.count("val"), grown.count("val")) == (4, 8)
    both = [r["split"] for r in split(rows("spatial", 30) + rows("contrast", 30), 0.2, 0)]
    assert both[10:30] == both[40:]  # whose hashes are alike, "10" to "29"
    assert 4 <= both[10:30].count("val") <= 12


def test_an_array_that_was_cut_short_is_named(tmp_path):
    ramps(tmp_path / "s", 9, 12)
    rows, _ = built(tmp_path / "c", tmp_path / "s")
    array, index = tmp_path / "c" / rows[0]["file"], tmp_path / "c/index.jsonl"
    for harm, words in (
        (lambda: array.write_bytes(bytes(200)), f"{array.name}: cut short"),
        (array.unlink, f"{array.name}: missing"),
        (lambda: index.write_text(index.read_text().replace("arrays", "x" * 5000)), "missing"),
        (lambda: index.write_text("half a li"), "not an index"),
    ):
        harm()
        with pytest.raises(BadInput, match=words):
            read_index(tmp_path / "c")
    np.savez(tmp_path / "a.npz", np.zeros((8, 8, 8), np.int16))
    with pytest.raises(BadInput, match=r"a\.npz: unreadable"):
        serialize.open_array(str(tmp_path / "a.npz"), (8, 8, 8))


def test_rank_0_finds_the_corpus_for_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serialize, "ensure_phantom", None)

    def find(*known, main=True):
        gather = lambda value: [value if main else "of rank 0", value]
        return serialize.find_corpus(SimpleNamespace(main=main, gather=gather, say=print), *known)

    assert find(main=False) == "of rank 0"  # and nothing made
    monkeypatch.setattr(serialize, "ensure_phantom", lambda say: Path("made"))
    assert find() == ["made"]
    for folder in ("data/corpus", "before"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "index.jsonl").touch()
    assert find(None, "gone") == find(None, ["before", "gone"]) == ["data/corpus"]
    assert find(None, "before") == ["before"]
    assert find(["named", "too"], "before") == ["named", "too"]
    assert find(main=False) == "of rank 0"  # whatever it sees itself


# ---- sequences -------------------------------------------------------------------------------


def test_more_scans_than_files_may_be_open(tmp_path):
    ramps(tmp_path / "s", *range(9, 69))
    built(tmp_path / "c", tmp_path / "s")
    data = Sequences(tmp_path / "c", size=8, stride=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        arrays = [data.array(row) for row in data.scans]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for row, array in zip(data.scans, arrays):
        assert np.array_equal(array, np.load(tmp_path / "c" / row["file"]))


@pytest.mark.parametrize("edge, step", [(20, 1), (64, 1), (70, 3), (128, 5)])
def test_an_intensity_range_is_two_exact_percentiles(edge, step):
    rng, shape = np.random.default_rng(0), [edge] * 3
    for crop in (rng.normal(0, 300, shape), rng.integers(-32768, 32767, shape)):
        crop = torch.from_numpy(crop.astype(np.int16))
        want = np.percentile(crop[::step, ::step], [1, 99.9], method="lower")
        assert np.array_equal(serialize.intensity_range(crop), want)


def test_a_sequence_depends_on_its_number_alone(corpus):
    data, other = (Sequences(corpus, size=64, stride=4, mix="equal", seed=s) for s in (3, 4))
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[5, 6], [7, 8]], num_workers=2)
    batched = torch.cat([b["volume"] for b in loader])
    for n, want in enumerate(batched, 5):
        volume, ranges = data[n]["volume"], data[n]["ranges"]
        assert torch.equal(volume, want)
        assert (volume.dtype, ranges.dtype) == (torch.int16, torch.float32)
        assert (volume.shape, ranges.shape) == ((64, 64, 64), (4, 2))
    assert not torch.equal(other[5]["volume"], batched[0])


# The oracles below draw as the supply has always drawn: sequence n of a corpus stays what it is.


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_spatial_slabs_are_of_one_crop_stride_apart(corpus, stride):
    data = Sequences(corpus, size=64, stride=stride, mix="spatial=1", seed=5)
    rng = np.random.default_rng([5, 0, 2])
    rng.random()  # the kind
    array = data.array(data.scans[rng.integers(len(data.scans))])
    start = [rng.integers(max(1, n - 63)) for n in array.shape]
    crop = serialize.resize(serialize.cut(array, start, [64] * 3), [64] * 3)
    first = rng.integers(64 - (16 + 3 * stride) + 1)
    for s, slab in enumerate(data[2]["volume"].split(16, 2)):
        assert torch.equal(slab, crop[:, :, first + s * stride :][:, :, :16])


def test_what_overlapping_slabs_share_is_handed_over_once(corpus):
    data = Sequences(corpus, size=64, stride=4, mix="spatial=1")
    lists, args = [[5, 6, 7], [8, 9]], SimpleNamespace(workers=2)
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    for batch, numbers in zip(batches(data, iter(lists), args, machine), lists, strict=True):
        assert torch.equal(batch["volume"], torch.stack([data[n]["volume"] for n in numbers]))
        assert torch.equal(batch["ranges"], torch.stack([data[n]["ranges"] for n in numbers]))
    assert data.read(5)["volume"].shape == (64, 64, 28) and data[5]["volume"].shape[2] == 64
    mixed = Sequences(corpus, size=64, stride=4, mix="equal")
    assert {mixed.read(n)["volume"].shape for n in range(9)} == {(64, 64, 64)}


def test_contrast_takes_one_box_from_all_contrasts_of_a_patient(corpus):
    data = Sequences(corpus, "val", size=32, stride=2, mix="contrast=1")
    rng = np.random.default_rng([0, 1, 9])
    rng.random()
    case, box = data.cases[rng.integers(len(data.cases))], (32, 32, 8)
    contrasts = {str(corpus / r["file"]): r.get("contrast") for r in read_index(corpus)}
    assert [contrasts[r["file"]] for r in case] == list(CONTRASTS)
    start = [rng.integers(n - b + 1) for n, b in zip(case[0]["shape"], box)]
    for row, image in zip(case, data[9]["volume"].split(8, 2)):
        assert torch.equal(image, serialize.cut(data.array(row), start, box))


def test_semantic_takes_lesions_of_one_type_from_four_patients(corpus):
    data = Sequences(corpus, size=64, stride=4, mix="semantic=1")
    for n in range(8):
        rng = np.random.default_rng([0, 0, n])
        rng.random()
        patients = data.types[rng.integers(len(data.types))]
        drawn = [patients[p] for p in rng.choice(len(patients), 4, replace=False)]
        rows = [lesions[rng.integers(len(lesions))] for lesions in drawn]
        assert len({r["group"] for r in rows}) == 1
        assert len({r["patient"] for r in rows}) == 4
        for row, image in zip(rows, data[n]["volume"].split(16, 2)):
            assert torch.equal(image, serialize.lesion_crop(data.array(row), row, 64, 16))


def test_a_lesion_at_the_edge_has_its_surroundings():
    array = torch.from_numpy(ramp(50, 40, 8).astype(np.int16))
    crop = serialize.lesion_crop(array, {"centre": [47.5, 3]}, 32, 8)
    assert torch.equal(crop, array[18:, :32])


def test_lesion_centres_survive_the_way_from_pixels_to_ras(phantom_home, corpus):
    """A box's centre, looked up in the file as NIH's script wrote it, is `centre` of the array."""
    table = phantom_home / "data/phantom/deeplesion/DL_info.csv"
    lesions = [r for r in read_index(corpus) if r["kind"] == "semantic"]
    for name, *_, box, _, _, kind in [[*r.values()][:10] for r in read_table(table)][::7]:
        case = name.rsplit("_", 1)[0]
        for r in [r for r in lesions if case in r["source"] and r["group"] == kind]:
            raw = np.asanyarray(nib.load(r["source"]).dataobj)  # [row, col, slice]
            array = np.load(corpus / r["file"])
            x1, y1, x2, y2 = map(float, box.split(","))
            centre = len(array) - 1 - (x1 + x2) / 2, array.shape[1] - 1 - (y1 + y2) / 2
            x, y = map(round, centre)
            assert np.array_equal(array[x, y], raw[-1 - y, -1 - x][::-1])
            if np.allclose(centre, r["centre"], atol=0.11):
                break
        else:
            assert kind == "-1"


def test_resizing_is_trilinear():
    crop = torch.randint(-1000, 1000, (9, 20, 13), dtype=torch.int16)
    want = torch.nn.functional.interpolate(crop[None, None].float(), [16] * 3, mode="trilinear")
    assert (serialize.resize(crop, [16] * 3) - want[0, 0]).abs().max() < 0.51


@pytest.mark.parametrize("order", ["raster", "image"])
def test_copyable_share_is_what_the_published_code_implies(order):
    assert serialize.copyable(128, 16, 4, 32) == (0, 0)
    assert serialize.copyable(128, 16, 4, 8) == (3 / 8, 72 / 128)
    places, seen, copies = token_order((2, 2, 8), 4, order), set(), 0
    for token in range(32) if places is None else places.tolist():
        column, z = divmod(token, 8)
        first = z // 2 * 8 + z % 2 * 16
        voxels = {(column, v) for v in range(first, first + 16)}
        copies += voxels <= seen
        seen |= voxels
    assert copies / 32 == 3 / 8


def test_the_mix_is_what_is_drawn(corpus):
    have = dict(zip(KINDS, (10, 2, 0)))
    assert list(serialize.parse_mix("published", have).values()) == [500, 200, 0]
    for bad in ("spatial", "x=1", "spatial=-1", "spatial=nan"):
        with pytest.raises(BadInput, match="--mix"):
            serialize.parse_mix(bad, have)
    data = Sequences(corpus, size=32, stride=2, mix="spatial=3,contrast=1")
    kinds = [data[n]["kind"] for n in range(200)]
    assert set(kinds) == {0, 1}
    assert 130 < kinds.count(0) < 170


# ---- the script ------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["serialize.py", *map(str, flags)])
        serialize.main()

    return run


def test_inspect_draws_and_bench_counts(run, corpus, capsys, monkeypatch):
    run("--out", corpus, "--inspect", "--volume", 64, "--patch", 32)  # deeper than a slab
    run("--out", corpus, "--inspect", "--volume", 64, "--patch", 8, "--order", "image")
    assert "--stride  4: 37.5% of the tokens and 56.2%" in capsys.readouterr().out
    assert (corpus / "inspect.png").read_bytes().startswith(b"\x89PNG")
    clock = itertools.count()  # a second each time it is asked
    monkeypatch.setattr(serialize.time, "perf_counter", lambda: next(clock))
    small = {k: [(40, 40, 40)] * len(v) for k, v in serialize.NOISE.items()}
    monkeypatch.setattr(serialize, "NOISE", small)
    run("--bench", "--volume", 32)
    told = capsys.readouterr().out
    for kind, scans in zip(KINDS, (3, 8, 4)):
        assert re.search(rf"{kind}: +1 samples/s.* {scans} scans\n +\d+/s handed over by", told)
    assert "an H100 at 396 TFLOP/s would take" in told
    assert not Path(told.split("\n")[0].split()[-1]).exists()


def test_what_is_wrong_is_said(run, script, corpus, tmp_path):
    for flags, words in (
        (["--out", tmp_path, "--inspect"], "no corpus there"),
        (["--spatial", tmp_path], "no scans in it"),
        (["--semantic", "a.csv", "b"], "DL_info.csv"),
        (["--contrast", tmp_path], "no case folders"),
        (["--phantom", "--out", tmp_path], "a folder and scans of its own"),
        (["--phantom", "--spacing", 1, 1, 1], "a folder and scans of its own"),
        (["--bench", "--volume", 100], "--patch 16: not a divisor"),
        (["--out", corpus, "--bench", "--stride", 40], "--stride 40: 4 slabs of 32 slices"),
        (["--bench", "--val", 0.7], "--val 0.7"),
    ):
        with pytest.raises(BadInput, match=words):
            run(*flags)
    done = script("serialize.py", code=2)
    assert "nothing to do" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_corpus_is_built_by_one_process(run, tmp_path):
    ramps(tmp_path / "s", 9)
    flags = "--spatial", tmp_path / "s", "--out", tmp_path / "c"
    with lock_of(tmp_path / "c"), pytest.raises(BadInput, match="in use by process"):
        run(*flags)
    run(*flags)
    assert len(read_index(tmp_path / "c")) == 1


def test_label_subsets_are_nested_and_stratified(tmp_path):
    patients = [f"p{i}" for i in range(40)]
    classes = [i % 4 == 0 for i in range(40)]
    small, large = (serialize.label_subset(patients, s, 0, classes) for s in (0.1, 0.5))
    assert len(small) == 4 and set(small) < set(large) and len(large) == 20
    assert sum(classes[int(p[1:])] for p in small) == 1
    assert (
        serialize.label_subset(patients[::-1], 0.1) == serialize.label_subset(patients, 0.1)[::-1]
    )
    assert serialize.label_subset(patients, 0.1, seed=1) != serialize.label_subset(patients, 0.1)
    with pytest.raises(BadInput, match="--labels 0"):
        serialize.label_subset(patients, 0)
    (tmp_path / "names").write_text("p3\np1\n", "utf-8-sig")  # as Windows' editors write it
    assert serialize.label_subset(patients, str(tmp_path / "names")) == ["p3", "p1"]
