import json

import pytest
import torch

from common import (BadInput, Log, cosine_lr, keep_earlier_run, load_checkpoint, parallel, read_json, read_log, save_checkpoint,
                    write_beside, write_json)


def test_write_beside_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with write_beside(path) as tmp:
            assert tmp.name.endswith(".nii.gz") and tmp.parent == tmp_path
            tmp.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.nii.gz"]
    with write_beside(path) as tmp:
        tmp.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, "s"]})
    assert read_json(tmp_path / "a.json", "a list") == {"x": [1, 2.5, "s"]}
    (tmp_path / "b.json").write_text("{")
    for name, words in (("b.json", "not JSON"), ("c.json", "no such file")):
        with pytest.raises(BadInput, match=f"{name}.*{words}.*a list"):
            read_json(tmp_path / name, "a list")


@pytest.mark.parametrize("workers", [0, 2])
def test_parallel_keeps_the_order(workers):
    assert list(parallel(abs, range(-50, 0), workers)) == list(range(50, 0, -1))


def test_cosine_lr_warms_up_and_ends_at_zero():
    rates = [cosine_lr(s, 100, 1.0, warmup=10) for s in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_log_drops_what_comes_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in (10, 20, 30)) + '{"step": 40, "lo')
    log = Log(path, resume_step=20)
    log.write(step=30, loss=-1)
    assert read_log(path) == [{"step": 10, "loss": 10}, {"step": 20, "loss": 20}, {"step": 30, "loss": -1}]
    Log(path)
    assert read_log(path) == []


def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(BadInput, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, format="ar3d-x", w=torch.ones(1000))
    assert load_checkpoint(path, "ar3d-x")["w"].sum() == 1000
    with pytest.raises(BadInput, match="'ar3d-x'.*'ar3d-y'"):
        load_checkpoint(path, "ar3d-y")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BadInput, match="cut short"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be read"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(BadInput, match="holds a list"):
        load_checkpoint(path)
    torch.save({"format": "ar3d-x", "f": pytest.approx}, path)  # a pickled function: never executed
    with pytest.raises(BadInput, match="cannot be read"):
        load_checkpoint(path, "ar3d-x")


def test_an_earlier_run_is_kept(tmp_path):
    for n in (1, 2):
        (tmp_path / "ckpt.pt").write_text(str(n))
        keep_earlier_run(tmp_path, lambda words: None)
    keep_earlier_run(tmp_path, lambda words: None)  # nothing there: nothing to do
    assert [(tmp_path / f"earlier-{n}/ckpt.pt").read_text() for n in (1, 2)] == ["1", "2"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["earlier-1", "earlier-2"]
