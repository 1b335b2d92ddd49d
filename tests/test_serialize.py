import csv
import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common import BadInput
from serialize import (CONTRASTS, KINDS, Sequences, build, collect, copyable, parse_mix, published_mix, read_index, read_scan,
                       resize, split_by_patient, to_int16, window_of)

NIBABEL = Path(nib.__file__).parent / "tests/data"
QUIET = dict(workers=0, say=lambda *words: None)


def save(path, values, affine=np.eye(4), slope=None, inter=0, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    img = nib.Nifti1Image(np.asarray(values, dtype), affine)
    if slope is not None:
        img.header.set_slope_inter(slope, inter)
        img = nib.Nifti1Image(np.asarray(values, dtype), affine, img.header)
    nib.save(img, path)
    if slope is not None:  # nibabel scales what it saves: put the numbers into the header of the file itself
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array([slope, inter], "<f4").tobytes()
        path.write_bytes(raw)
        data = np.asarray(values, dtype).ravel(order="F").tobytes()
        path.write_bytes(bytes(raw[:352]) + data)
    return path


def ramp(*shape):
    return np.arange(np.prod(shape)).reshape(shape) % 1000


def rows_and_skipped(out, *folders, **kw):
    rows = build(*collect(folders), out, **{**QUIET, **kw})
    with open(out / "skipped.csv") as f:
        return rows, {Path(r["source"]).name: r["reason"] for r in csv.DictReader(f)}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAI", "PIR", "SLA"])
def test_any_orientation_is_read_as_ras(tmp_path, codes):
    want = ramp(9, 10, 11)
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    own = np.diag([2, 3, 4, 1.0]) @ nib.orientations.inv_ornt_aff(to, want.shape)
    save(tmp_path / "a.nii", nib.orientations.apply_orientation(want, to), own)
    values, affine, raw = read_scan(tmp_path / "a.nii")
    assert np.array_equal(values, want) and np.allclose(affine, np.diag([2, 3, 4, 1])) and np.allclose(raw, own)


def test_slope_and_intercept_are_applied(tmp_path):
    stored = ramp(8, 8, 8)
    for slope, inter in ((1, -1024), (2, 0), (0.5, 3), (-1, 10)):
        values, _, _ = read_scan(save(tmp_path / "a.nii", stored, slope=slope, inter=inter))
        assert np.allclose(values, stored * slope + inter)
        assert (values.dtype.kind == "i") == (slope == 1)
    values, _, _ = read_scan(save(tmp_path / "b.nii", stored + 40_000, slope=1, inter=-1024, dtype=np.uint16))
    assert np.array_equal(values, stored + 40_000 - 1024)


def test_real_scans_become_a_corpus_and_the_unusable_are_explained(tmp_path):
    rows, skipped = rows_and_skipped(tmp_path / "c", NIBABEL)
    assert {Path(r["job"]).name for r in rows} == {"anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz",
                                                    "reoriented_anat_moved.nii"}
    assert sum("example4d" in r["source"] for r in rows) == 2  # 4D: one array a volume, one patient
    assert len({r["patient"] for r in rows if "example4d" in r["source"]}) == 1
    for name, words in (("functional.nii", "fewer than 8"), ("nifti1.hdr", "FileNotFoundError"), ("standard.nii.gz", "4x5x7"),
                        ("row_major.dconn.nii", "Cifti2Image"), ("analyze.hdr", "not a NIfTI")):
        assert words in skipped[name]
    want = nib.as_closest_canonical(nib.load(NIBABEL / "anatomical.nii")).get_fdata()
    row = next(r for r in rows if "anatomical" in r["source"])
    assert np.array_equal(np.load(tmp_path / "c" / row["file"]) * row["slope"] + row["inter"], want)


def test_every_kind_of_bad_file_has_its_reason(tmp_path):
    good = ramp(9, 9, 9)
    save(tmp_path / "s/good.nii", good)
    save(tmp_path / "s/flat.nii", good[..., :1])
    save(tmp_path / "s/thin.nii", good[..., :4])
    save(tmp_path / "s/constant.nii", np.full((9, 9, 9), 7))
    save(tmp_path / "s/nan.nii", np.where(good == 5, np.nan, good), dtype=np.float32)
    save(tmp_path / "s/vector.nii", np.zeros((9, 9, 9, 1, 3)))
    save(tmp_path / "s/complex.nii", good, dtype=np.complex64)
    raw = bytearray(save(tmp_path / "s/nowhere.nii", good).read_bytes())
    raw[252:256], raw[280:296] = np.array([0, 1], "<i2").tobytes(), bytes(16)  # the sform alone, its first row all zeros
    (tmp_path / "s/nowhere.nii").write_bytes(raw)
    (tmp_path / "s/cut.nii").write_bytes((tmp_path / "s/good.nii").read_bytes()[:1000])
    (tmp_path / "s/text.nii.gz").write_text("not a scan")
    (tmp_path / "s/._good.nii").write_text("macOS litter")
    (tmp_path / "s/volume.mha").write_text("ObjectType = Image")
    save(tmp_path / "s/labelsTr/good.nii", good)
    rows, skipped = rows_and_skipped(tmp_path / "c", tmp_path / "s")
    assert len(rows) == 1 and "._good.nii" not in skipped
    reasons = {"flat": "2D", "thin": "fewer than 8", "constant": r"all voxels are equal (7)", "nan": "1 voxels are NaN", "vector": "a vector",
               "complex": "complex64", "nowhere": "affine", "cut": "unreadable", "text.nii.gz": "unreadable", "good": "label map"}
    for name, words in reasons.items():
        assert words in skipped[name if "." in name else f"{name}.nii"], name
    assert "SimpleITK" in skipped["volume.mha"] or "unreadable" in skipped["volume.mha"]


def test_missing_simpleitk_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "a.nrrd").write_text("")
    with pytest.raises(BadInput, match="pip install SimpleITK"):
        read_scan(tmp_path / "a.nrrd")


def test_to_int16_is_exact_for_integers_and_fine_for_floats():
    for low, high in ((-1024, 3071), (0, 65535), (100_000, 150_000), (-40_000, 20_000)):
        values = np.linspace(low, high, 600).round().reshape(10, 6, 10).astype(np.int64)
        stored, slope, inter = to_int16(values)
        assert stored.dtype == np.int16 and np.array_equal(stored * slope + inter, values)
        assert np.array_equal(to_int16(values.astype(np.float32))[0], stored)
    values = np.linspace(40_000, 65_535, 1000).astype(np.uint16).reshape(10, 10, 10)
    stored, slope, inter = to_int16(values)
    assert np.array_equal(stored * slope + inter, values)
    values = np.random.default_rng(0).normal(0, 1, (40, 40, 40)).astype(np.float32)
    stored, slope, inter = to_int16(values)
    assert abs(stored * slope + inter - values).max() <= slope and slope < 2e-4
    values[0, 0, 0] = 1e6  # an outlier must not take the levels of all others
    stored, slope, inter = to_int16(values)
    assert np.delete(abs(stored * slope + inter - values).ravel(), 0).max() < 1e-3


# ---------------------------------------------------------------- corpora


def test_a_second_run_reads_what_is_new_or_changed_and_nothing_else(tmp_path):
    scans, out = tmp_path / "s", tmp_path / "c"
    for n in range(4):
        save(scans / f"{n}.nii", ramp(9, 9, 9 + n))
    rows, _ = rows_and_skipped(out, scans)
    times = {r["source"]: (out / r["file"]).stat().st_mtime_ns for r in rows}
    split = {r["source"]: r["split"] for r in rows}
    save(scans / "new.nii", ramp(10, 9, 9))
    save(scans / "1.nii", ramp(9, 9, 20))
    os.utime(scans / "1.nii", ns=(1, 1))
    again, _ = rows_and_skipped(out, scans)
    assert len(again) == 5 and again == read_index(out)
    for r in again:
        name = Path(r["source"]).name
        if name == "1.nii":
            assert r["shape"] == [9, 9, 20]
        elif name != "new.nii":
            assert (out / r["file"]).stat().st_mtime_ns == times[r["source"]] and r["split"] == split[r["source"]]


def test_a_build_that_is_killed_goes_on(tmp_path, monkeypatch):
    import serialize
    for n in range(6):
        save(tmp_path / f"s/{n}.nii", ramp(9, 9, 9 + n))
    read, clock = [], iter(range(0, 10_000, 20))  # the index is saved after each scan
    monkeypatch.setattr(serialize.time, "monotonic", lambda: next(clock))
    def read_scan(path):
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(Path(path).name)
        return real(path)
    real = serialize.read_scan
    monkeypatch.setattr(serialize, "read_scan", read_scan)
    with pytest.raises(KeyboardInterrupt):
        rows_and_skipped(tmp_path / "c", tmp_path / "s")
    with pytest.raises(BadInput, match="no corpus there"):  # nobody trains on half of it
        read_index(tmp_path / "c")
    read.append("")  # past the fourth
    rows, _ = rows_and_skipped(tmp_path / "c", tmp_path / "s")
    assert rows == read_index(tmp_path / "c") and not (tmp_path / "c/index.part.jsonl").exists()
    assert sorted(read) == ["", *(f"{n}.nii" for n in range(6))] and len(rows) == 6


def test_skipped_files_of_an_earlier_run_stay_listed_until_they_are_tried_again(tmp_path):
    save(tmp_path / "a/good.nii", ramp(9, 9, 9)), save(tmp_path / "a/flat.nii", ramp(9, 9, 1))
    save(tmp_path / "b/other.nii", ramp(9, 9, 10)), save(tmp_path / "b/thin.nii", ramp(9, 9, 4))
    rows_and_skipped(tmp_path / "c", tmp_path / "a")
    assert set(rows_and_skipped(tmp_path / "c", tmp_path / "b")[1]) == {"flat.nii", "thin.nii"}
    save(tmp_path / "a/flat.nii", ramp(9, 9, 11))
    assert set(rows_and_skipped(tmp_path / "c", tmp_path / "a")[1]) == {"thin.nii"}


def test_the_same_voxels_under_two_names_are_kept_once(tmp_path):
    save(tmp_path / "s/a.nii", ramp(9, 9, 9)), save(tmp_path / "s/b.nii", ramp(9, 9, 9)), save(tmp_path / "s/c.nii", ramp(9, 9, 10))
    rows, skipped = rows_and_skipped(tmp_path / "c", tmp_path / "s")
    assert len(rows) == 2 and "the same voxels as" in skipped["b.nii"]
    assert len(list((tmp_path / "c/arrays").iterdir())) == 2


def test_workers_make_no_difference(phantom_home, tmp_path):
    jobs, skipped = collect([], [phantom_home / "data/phantom/brats"])
    a = build(list(jobs), list(skipped), tmp_path / "a", **QUIET)
    b = build(list(jobs), list(skipped), tmp_path / "b", **{**QUIET, "workers": 2})
    assert a == b


def test_splits_are_by_patient_and_every_kind_can_validate(corpus):
    rows = read_index(corpus)
    for kind in KINDS:
        sides = [{r["patient"] for r in rows if r["kind"] == kind and r["split"] == s} for s in ("train", "val")]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert Sequences(corpus, "val", 64, 4, 4).have["semantic"] == 8


def test_a_split_does_not_change_when_a_corpus_grows():
    def rows(n):
        return [dict(kind="spatial", group="", patient=f"p{i}", hash=str(i)) for i in range(n)]
    small = {r["patient"]: r["split"] for r in split_by_patient(rows(40), 0.1, 0)}
    grown = [{**r, **({"split": small[r["patient"]]} if r["patient"] in small else {})} for r in rows(80)]
    grown = {r["patient"]: r["split"] for r in split_by_patient(grown, 0.1, 0)}
    assert all(grown[p] == s for p, s in small.items())
    assert list(small.values()).count("val") == 4 and list(grown.values()).count("val") == 8


def test_one_patient_a_folder_and_patient_flag(tmp_path):
    for p in "ab":
        save(tmp_path / f"s/{p}/ct.nii", ramp(9, 9, 9 + ord(p) % 7))
    jobs, _ = collect([tmp_path / "s"])
    assert [j["patient"] for j in jobs] == ["s/a", "s/b"]
    jobs, _ = collect([tmp_path / "s"], patient=r"(\w)/ct")
    assert [j["patient"] for j in jobs] == ["s/a", "s/b"]
    with pytest.raises(BadInput, match="does not match"):
        collect([tmp_path / "s"], patient="nobody")


@pytest.mark.parametrize("path, patient", [
    ("sub-03/ses-1/sub-03_ses-1_dwi.nii", "sub-03"), ("BraTS-GLI-00012-001/x.nii", "BraTS-GLI-00012"), ("amos_0007.nii", "amos_0007"),
    ("FLARE22_Tr_0001_0000.nii.gz", "FLARE22_Tr_0001"), ("s0004.nii", "s0004")])
def test_whose_scan_a_path_is(tmp_path, path, patient):
    from serialize import patient_of
    assert patient_of(tmp_path / path, tmp_path, False) == patient


def test_folders_that_overlap_and_folders_named_like_labels(tmp_path):
    home = tmp_path / "labels_seg-2024"  # what stands above the folder that was named does not matter
    for n in range(3):
        save(home / f"images/{n}.nii", ramp(9, 9, 9 + n))
        save(home / f"Mask/{n}.nii", ramp(9, 9, 9 + n) % 2)
    rows, skipped = rows_and_skipped(tmp_path / "c", home, home / "images", home)
    assert len(rows) == 3 and rows == read_index(tmp_path / "c") and len(skipped) == 3


def test_a_scan_of_two_kinds_validates_in_both_or_in_none():
    rows = [dict(kind=k, group=f"{k}{i}", patient=f"{k}{i}", hash=str(i)) for k in ("spatial", "contrast") for i in range(30)]
    rows = split_by_patient(rows, 0.2, 0)
    assert [r["split"] for r in rows[:30]] == [r["split"] for r in rows[30:]] and 6 <= sum(r["split"] == "val" for r in rows[:30]) <= 12


def test_more_scans_than_files_may_be_open(tmp_path):
    import resource
    for n in range(80):
        save(tmp_path / f"s/{n:03d}.nii", ramp(9, 9, 9 + n))
    rows_and_skipped(tmp_path / "c", tmp_path / "s")
    data, limits = Sequences(tmp_path / "c", size=8, stride=2, mix={"spatial": 1}), resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    try:
        for row in data.scans:
            data.array(row)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for row in data.scans[:5]:
        assert torch.equal(data.array(row), torch.from_numpy(np.load(tmp_path / "c" / row["file"])))


def test_an_array_that_was_cut_short_is_named(tmp_path):
    save(tmp_path / "s/a.nii", ramp(9, 9, 9)), save(tmp_path / "s/b.nii", ramp(9, 9, 12))
    rows, _ = rows_and_skipped(tmp_path / "c", tmp_path / "s")
    array = tmp_path / "c" / rows[0]["file"]
    array.write_bytes(array.read_bytes()[:200])
    with pytest.raises(BadInput, match=f"{array.name}: cut short"):
        read_index(tmp_path / "c")
    array.unlink()
    with pytest.raises(BadInput, match=f"{array.name}: missing"):
        read_index(tmp_path / "c")
    (tmp_path / "c/index.jsonl").write_text("half a li")
    with pytest.raises(BadInput, match="not an index"):
        read_index(tmp_path / "c")


# ---------------------------------------------------------------- sequences


def test_window_is_the_exact_percentile():
    rng = np.random.default_rng(0)
    for crop in (rng.normal(0, 300, (20, 20, 20)).astype(np.int16), rng.integers(-32768, 32767, (9, 9, 9)).astype(np.int16)):
        assert window_of(torch.from_numpy(crop)).tolist() == np.percentile(crop, [1, 99.9], method="lower").tolist()
    large = rng.normal(0, 300, (70, 70, 70)).astype(np.int16)
    assert window_of(torch.from_numpy(large)).tolist() == np.percentile(large[:, ::3], [1, 99.9], method="lower").tolist()


def test_a_sequence_depends_on_its_number_alone(corpus):
    data = Sequences(corpus, size=64, stride=4, mix={k: 1 for k in KINDS}, seed=3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[5, 6, 7], [8, 9, 10]], num_workers=2)
    batched = torch.cat([b["volume"] for b in loader])
    for i, n in enumerate(range(5, 11)):
        s = data[n]
        assert torch.equal(s["volume"], batched[i]) and torch.equal(s["volume"], data[n]["volume"])
        assert s["volume"].dtype == torch.int16 and s["volume"].shape == (64, 64, 64) and s["window"].shape == (4, 2)
        assert sum(v.nbytes for v in s.values() if isinstance(v, torch.Tensor)) <= 2 * 64 ** 3 + 32
    assert not torch.equal(data[5]["volume"], Sequences(corpus, size=64, stride=4, mix={k: 1 for k in KINDS}, seed=4)[5]["volume"])


def test_spatial_slabs_overlap_by_what_stride_says(corpus):
    for stride in (1, 4, 16):
        v = Sequences(corpus, size=64, stride=stride, mix={"spatial": 1})[0]["volume"]
        for s in range(1, 4):
            assert torch.equal(v[:, :, 16 * s:16 * s + 16 - stride], v[:, :, 16 * (s - 1) + stride:16 * s])
    with pytest.raises(BadInput, match="--stride 17"):
        Sequences(corpus, size=64, stride=17)


def test_contrast_takes_one_box_from_all_contrasts_of_a_patient(corpus):
    data = Sequences(corpus, size=32, stride=2, mix={"contrast": 1})
    volume = data[0]["volume"]
    found = []
    for case in data.cases:
        arrays = [np.load(corpus / r["file"]) for r in case]
        assert [r["contrast"] for r in case] == list(CONTRASTS) and len({r["patient"] for r in case}) == 1
        windows = np.lib.stride_tricks.sliding_window_view(arrays[0], (32, 32, 8))
        first = volume[:, :, :8].numpy()
        corner = np.argwhere((windows[..., 0, 0, 0] == first[0, 0, 0]) & (windows[..., -1, -1, -1] == first[-1, -1, -1])
                             & (windows[..., 16, 16, 4] == first[16, 16, 4]))
        for x, y, z in corner:
            if all(np.array_equal(a[x:x + 32, y:y + 32, z:z + 8], volume[:, :, 8 * s:8 * s + 8]) for s, a in enumerate(arrays)):
                found.append(case)
    assert len(found) == 1


def test_semantic_takes_lesions_of_one_type_from_four_patients(corpus, monkeypatch):
    data = Sequences(corpus, size=64, stride=4, mix={"semantic": 1})
    read = []
    monkeypatch.setattr(data, "array", lambda row: read.append(row) or Sequences.array(data, row))
    for n in range(20):
        read.clear()
        data[n]
        assert len(read) == 4 and len({r["group"] for r in read}) == 1 and len({r["patient"] for r in read}) == 4


def test_lesion_centres_survive_the_way_from_pixels_to_ras(phantom_home, corpus):
    """The voxel at the box's centre, read from the file as NIH's script wrote it, is the voxel at `centre` of the array."""
    rows = [r for r in read_index(corpus) if r["kind"] == "semantic"]
    with open(phantom_home / "data/phantom/deeplesion/DL_info.csv") as f:
        boxes = list(csv.DictReader(f))
    checked = 0
    for r in rows[::7]:
        case = "_".join(Path(r["source"]).name.split("_")[:3])
        raw = np.asanyarray(nib.load(r["source"]).dataobj)  # [row, col, slice]
        array = np.load(corpus / r["file"])
        for b in (b for b in boxes if b["File_name"].startswith(case) and b["Coarse_lesion_type"] == r["group"]):
            x1, y1, x2, y2 = (float(v) for v in b["Bounding_boxes"].split(","))
            col, row = (x1 + x2) / 2, (y1 + y2) / 2
            centre = [array.shape[0] - 1 - col, array.shape[1] - 1 - row]
            if np.allclose(centre, r["centre"], atol=0.11):
                line = array[round(centre[0]), round(centre[1])]
                assert np.array_equal(line, raw[array.shape[1] - 1 - round(centre[1]), array.shape[0] - 1 - round(centre[0])][::-1])
                checked += 1
    assert checked >= 5


def test_scans_thinner_than_the_crop_are_resized(tmp_path):
    for n in range(4):
        save(tmp_path / f"s/{n}.nii", ramp(70, 20, 9 + n))
    rows_and_skipped(tmp_path / "c", tmp_path / "s")
    v = Sequences(tmp_path / "c", size=32, stride=8, mix={"spatial": 1})[0]["volume"]
    assert v.shape == (32, 32, 32) and v.float().std() > 10
    line = torch.tensor([0, 10, 20, 30], dtype=torch.int16).expand(2, 2, 4)
    assert resize(line, (2, 2, 8))[0, 0].tolist() == [0, 2, 8, 12, 18, 22, 28, 30]  # half-voxel centres, rounded to even
    crop = torch.randint(-1000, 1000, (9, 20, 13), dtype=torch.int16)
    want = torch.nn.functional.interpolate(crop[None, None].float(), (16, 16, 16), mode="trilinear")[0, 0]
    assert (resize(crop, (16, 16, 16)) - want).abs().max() < 0.51


@pytest.mark.parametrize("order", ["raster", "image"])
def test_copyable_share_is_what_the_paper_s_code_implies(order):
    assert copyable(128, 16, 4, 8, order) == (3 / 8, 72 / 128)
    assert copyable(128, 16, 4, 32, order) == (0, 0)


def test_mix():
    have = dict(spatial=10, contrast=2, semantic=0)
    assert published_mix(have) == dict(spatial=500, contrast=200, semantic=0) == parse_mix("published", have)
    assert parse_mix("spatial=2,contrast=1", have) == dict(spatial=2, contrast=1)
    for bad in ("spatial", "x=1", "spatial=-1"):
        with pytest.raises(BadInput, match="--mix"):
            parse_mix(bad, have)


def test_the_mix_is_drawn(corpus):
    data = Sequences(corpus, size=32, stride=2, mix=dict(spatial=3, contrast=1, semantic=0))
    kinds = [data[n]["kind"] for n in range(200)]
    assert 0.65 < kinds.count(0) / 200 < 0.85 and kinds.count(2) == 0


# ---------------------------------------------------------------- the script


def test_script_inspects_and_says_what_is_wrong(script, corpus, tmp_path):
    done = script("serialize.py", "--out", corpus, "--inspect", "--volume", 64, "--patch", 8)
    assert "--order image  --stride  4: 37.5% of the tokens and 56.2%" in done.stdout
    assert (corpus / "inspect.png").read_bytes().startswith(b"\x89PNG")
    for flags, words in ((["--out", tmp_path, "--inspect"], "no corpus there"), (["--spatial", tmp_path], "no scans in it"),
                         ([], "nothing to do"), (["--semantic", "a.csv", "b"], "DL_info.csv"),
                         (["--contrast", tmp_path], "no case folders")):
        done = script("serialize.py", *flags, code=2)
        assert words in done.stderr and done.stderr.count("\n") == 1


def test_contrast_cases_that_do_not_fit(tmp_path):
    for case, shapes in (("A-00000-000", [9, 9, 9, 9]), ("A-00001-000", [9, 9, 10, 9]), ("A-00002-000", [9, 9, 9])):
        for c, n in zip(CONTRASTS, shapes):
            save(tmp_path / f"s/{case}/{case}-{c}.nii", ramp(9, 9, n) + len(c) * int(case[6]) + CONTRASTS.index(c))
    rows = build(*collect([], [tmp_path / "s"]), tmp_path / "c", **QUIET)
    skipped = (tmp_path / "c/skipped.csv").read_text()
    assert {r["group"] for r in rows} == {"A-00000-000"} and {r["patient"] for r in rows} == {"A-00000"}
    assert "A-00001-000,\"its contrasts" in skipped and "lacks A-00002-000-t2f" in skipped
    for c in CONTRASTS:  # the same shape in another place
        save(tmp_path / f"t/B-00000-000/B-00000-000-{c}.nii", ramp(9, 9, 9) + len(c), np.diag([1 + (c == "t2w"), 1, 1, 1.0]))
    with pytest.raises(BadInput, match="not co-registered: B-00000-000-t2w"):
        build(*collect([], [tmp_path / "t"]), tmp_path / "d", **QUIET)


def test_index_is_plain_json_lines(corpus):
    rows = [json.loads(line) for line in (corpus / "index.jsonl").read_text().splitlines()]
    wanted = {"kind", "source", "hash", "file", "shape", "spacing", "slope", "inter", "patient", "group", "split", "job", "stamp"}
    assert all(wanted <= r.keys() for r in rows) and {r["kind"] for r in rows} == set(KINDS)
