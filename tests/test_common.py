import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import (
    BadInput,
    Log,
    Loop,
    Unwritable,
    batches,
    cli,
    cosine_lr,
    load_checkpoint,
    micro_batches,
    open_run,
    optimiser_step,
    parallel,
    read_json,
    read_log,
    resumed,
    save_checkpoint,
    setup,
    split_batch,
    write_beside,
    write_json,
)

ROOT = Path(__file__).parent.parent


def machine(world=1, rank=0):
    it = setup(argparse.Namespace(device="cpu", dtype="fp32"))
    it.world, it.rank = world, rank
    return it


def test_write_beside_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    with pytest.raises(RuntimeError), write_beside(path) as tmp:
        assert tmp.name.endswith(".nii.gz") and tmp.parent == tmp_path
        tmp.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.nii.gz"]
    with write_beside(path) as tmp:
        tmp.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, "s"]})
    assert read_json(tmp_path / "a.json", "a thing") == {"x": [1, 2.5, "s"]}
    (tmp_path / "b.json").write_text("{")
    for name, words in (("b.json", "cannot be read as JSON"), ("c.json", "No such file")):
        with pytest.raises(BadInput, match=f"{name}.*{words}.*a list"):
            read_json(tmp_path / name, "a list")


@pytest.mark.parametrize("workers", [0, 2])
def test_parallel_keeps_the_order(workers):
    assert list(parallel(abs, range(-50, 0), workers)) == list(range(50, 0, -1))


def killed(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line():
    with pytest.raises(BadInput, match="one of 2 processes was killed, perhaps for want of memory"):
        list(parallel(killed, range(4), 2))


def test_cosine_lr_warms_up_and_ends_at_zero():
    rates = [cosine_lr(s, 100, 1.0, warmup=10) for s in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)


def test_a_log_drops_what_comes_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [json.dumps({"step": s, "loss": s}) + "\n" for s in (10, 20, 30)]
    path.write_text("".join(rows) + '{"step": 40, "lo')
    log = Log(path, 20)
    log.write(step=30, loss=-1)
    assert [(row["step"], row["loss"]) for row in read_log(path)] == [(10, 10), (20, 20), (30, -1)]
    Log(path)
    assert read_log(path) == []
    for odd in ("5", "{}", '{"step": null}', "\xff"):
        path.write_text(rows[0] + odd + "\n" + rows[1], "latin-1")
        assert read_log(path) == [{"step": 10, "loss": 10}]


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
    args = argparse.Namespace(resume=False)
    for n in (1, 2):
        (tmp_path / "ckpt.pt").write_text(str(n))
        open_run(tmp_path, args, machine(1, 0))
    (tmp_path / "metrics.json").write_text("of a run whose ckpt.pt was deleted")
    open_run(tmp_path, args, machine(1, 0))
    open_run(tmp_path, args, machine(1, 0))  # nothing there: nothing to do
    kept = [(tmp_path / f"earlier-{n}/ckpt.pt").read_text() for n in (1, 2)]
    assert kept == ["1", "2"]
    assert [f.name for f in sorted(tmp_path.glob("earlier-*"))] == [
        f"earlier-{n}" for n in (1, 2, 3)
    ]
    assert (tmp_path / "earlier-3/metrics.json").exists()
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "metrics.json").exists()


def test_two_may_write_one_file(tmp_path):
    with write_beside(tmp_path / "a") as first, write_beside(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and [f.name for f in tmp_path.iterdir()] == ["a"]


def test_ranks_and_passes_share_the_samples_out():
    for units, world, micro, passes in ((4, 2, 1, [2, 2]), (4, 2, 2, [1, 1]), (7, 3, 2, [2, 1, 1])):
        args = argparse.Namespace(units=units, micro=micro)
        taken = []
        for rank in range(world):
            stream = micro_batches(3, args, machine(world, rank))
            for _ in range(2 * passes[rank]):  # two steps
                taken += next(stream)
        assert sorted(taken) == list(range(3 * units, 5 * units))


def test_a_batch_is_split_over_any_number_of_ranks():
    for world, asked, micro in ((1, None, 8), (2, None, 6), (5, None, 3), (5, 2, 2)):
        args = argparse.Namespace(batch=12, micro=asked)
        split_batch(args, machine(world), 8)
        assert args.micro == micro
    args = argparse.Namespace(batch=2, crops=4, micro=None)  # the unit is a crop
    split_batch(args, machine(8), 8)
    assert (args.units, args.micro) == (8, 1)
    with pytest.raises(BadInput, match="--batch 2: 2 samples for 3 ranks"):
        split_batch(argparse.Namespace(batch=2, micro=None), machine(3), 8)


def test_an_optimiser_step_clips_scales_and_zeroes():
    w, v = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimiser = torch.optim.SGD(
        [{"params": [w], "scale": 0.5}, {"params": [v]}], lr=1.0, fused=True
    )
    for clip, factor in ((0.0, 1.0), (1.0, 0.1)):
        w.data.zero_(), v.data.zero_()
        w.grad, v.grad = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0])
        assert optimiser_step(optimiser, 2.0, clip).item() == pytest.approx(10)
        assert w.tolist() == pytest.approx([-6 * factor, 0], rel=1e-4)
        assert v.tolist() == pytest.approx([0, -16 * factor], rel=1e-4) and w.grad is None


def run_loop(tmp_path, first=0, stop_after=None, at=None, save_every=99):
    """What a loop of ten steps takes, and when it validates and saves; `at`: SIGTERM there."""
    args = argparse.Namespace(
        log_every=4, save_every=save_every, val_every=5, stop_after=stop_after, out="out", units=8
    )
    args.steps = 10
    optimiser = argparse.Namespace(found_inf=torch.zeros(()))
    log = Log(tmp_path / "log.jsonl", first)
    loop = Loop(args, machine(), log, first, "test", samples_per_s=8)
    steps, validated, saved = [], [], []
    for step in loop:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        loop.took({"loss": torch.tensor(float(step))}, optimiser, lr=0.5)
        steps.append(step)
        if loop.validates:
            validated.append(loop.step)
        if loop.saves:
            saved.append(loop.step)
    return loop, steps, validated, saved


def test_a_loop_logs_validates_and_saves_when_it_should(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    loop, steps, validated, saved = run_loop(tmp_path)
    assert steps == list(range(10)) and validated == [5, 10] and saved == [10]
    rows = read_log(tmp_path / "log.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(4, 1.5), (8, 5.5), (10, 8.5)]
    assert all(row["lr"] == 0.5 and row["samples_per_s"] > 0 for row in rows)
    assert loop.finished and signal.getsignal(signal.SIGTERM) is before
    assert run_loop(tmp_path, save_every=0)[3] == list(range(1, 11))  # minutes


def test_a_second_ctrl_c_is_130_in_one_word(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_checkpoints_are_written_from_a_copy_and_their_faults_are_told(tmp_path):
    w, log = torch.zeros(3), Log(tmp_path / "log.jsonl")
    for n in range(4):
        w += 1
        log.save(f"{n}.pt", format="x", inside=[{"w": w}], step=n)
    w += 9
    log.wait()
    for n in range(4):
        state = load_checkpoint(tmp_path / f"{n}.pt", "x")
        assert state["step"] == n and state["inside"][0]["w"].tolist() == [n + 1] * 3
    log.save("0.pt/x.pt", format="x")
    with pytest.raises(Unwritable, match="0.pt/x.pt: cannot be written"):
        log.wait()
    log.wait()


def test_a_loop_that_is_stopped_saves_and_goes_on(tmp_path):
    loop, steps, _, saved = run_loop(tmp_path, stop_after=4)
    assert steps == [0, 1, 2, 3] and saved == [4] and not loop.finished
    loop, steps, _, saved = run_loop(tmp_path, first=4, at=6)
    assert steps[0] == 4 and steps[-1] in (6, 7) and saved[-1] == loop.step < 10
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == loop.step and not loop.finished


def test_validation_is_broken_off_and_owed(tmp_path):
    args = argparse.Namespace(
        log_every=4, save_every=9, val_every=5, stop_after=None, out="o", units=8, steps=10
    )
    for asked_in_step in (False, True):
        loop = Loop(args, machine(), Log(tmp_path / "log.jsonl"), 0, "test")
        reached, saved = [], []
        for step in loop:
            if asked_in_step and step == 4:
                loop.asked = loop.stopping = True
            loop.took({"loss": torch.zeros(())}, argparse.Namespace(found_inf=torch.zeros(())))
            if loop.validates:
                with loop.paused():
                    os.kill(os.getpid(), signal.SIGTERM)
                    reached.append(step)
            if loop.saves:
                saved.append((loop.step, loop.owes))
        assert (reached, saved, loop.finished) == ([], [(5, True)], False)


def test_steps_that_are_not_finite_change_nothing_and_three_in_a_row_end_the_run(tmp_path):
    w = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([w], lr=0.1, fused=True)
    args = argparse.Namespace(log_every=4, save_every=99, val_every=99, stop_after=None, units=8)
    args.out, args.steps = "o", 12
    loop = Loop(args, machine(), Log(tmp_path / "log.jsonl"), 0, "test")
    faults = {1: math.nan, 2: math.inf, 5: math.nan, 6: math.nan, 7: math.nan}
    with pytest.raises(BadInput, match="of steps 5 to 7 .* of samples 40 to 63; nothing was saved"):
        for step in loop:
            before = w.detach().clone()
            loss = (w * faults.get(step, 1.0)).sum()
            loss.backward()
            loop.update(optimiser, 0.1, loss.detach())
            assert torch.equal(w, before) == (step in faults) and w.isfinite().all()
    [row] = read_log(tmp_path / "log.jsonl")
    assert row["step"] == 4 and row["skipped"] == 2 and row["loss"] == pytest.approx(2.85, rel=1e-3)
    assert optimiser.state[w]["step"] == 3  # those that were taken


def test_gpus_ask_each_other_at_each_step_only_while_rows_take_long(tmp_path, monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    args = argparse.Namespace(log_every=4, save_every=99, val_every=99, stop_after=None, units=8)
    args.steps = 12
    two = argparse.Namespace(world=2, cuda=True, main=False, device=torch.device("cpu"))
    two.sum = lambda tensor: 2 * tensor
    loop = Loop(args, two, Log(tmp_path / "log.jsonl"), 0, "test")
    monkeypatch.setattr(loop, "agreed", lambda: asked.append(loop.step))
    for step in loop:
        clock[0] += 10 if step < 4 else 1  # the first steps compile
        loop.took({"loss": torch.zeros(())}, argparse.Namespace(found_inf=torch.zeros(())))
    assert asked == [4, *range(4, 8), 8, 12]


def test_a_dead_loader_process_ends_the_loop_with_what_the_step_lacks(tmp_path):
    args = argparse.Namespace(log_every=4, save_every=99, val_every=99, stop_after=None, units=2)
    args.out, args.micro, args.workers, args.steps = "o", 2, 1, 99
    loop, steps = Loop(args, machine(), Log(tmp_path / "log.jsonl"), 0, "test"), []
    samples = loop.batches(Numbers())
    with pytest.raises(BadInput, match="a process of the loader died"):
        for step in loop:
            if step == 3:
                [worker] = multiprocessing.active_children()
                worker.kill()
                worker.join()
            assert next(samples)["n"].tolist() == [2 * step, 2 * step + 1]
            loop.took({"loss": torch.zeros(())}, argparse.Namespace(found_inf=torch.zeros(())))
            steps.append((loop.step, loop.saves))
    assert 3 < len(steps) < 12 and steps[-1][1]  # a few were ready; the last is saved


class Numbers:
    def __getitem__(self, n):
        if n == 17:
            raise BadInput("sample 17 is broken")
        return {"n": n, "image": torch.full((2, 3), n, dtype=torch.int16), "x": np.full(4, n / 3)}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_what_their_numbers_say(workers):
    args, lists = argparse.Namespace(workers=workers), [[4, 5, 6], [7, 8], [2, 0, 1], [3], [9, 4]]
    seen = 0
    for batch, numbers in zip(batches(Numbers(), iter(lists), args, machine()), lists):
        n = torch.tensor(numbers)
        assert torch.equal(batch["n"], n) and batch["image"].dtype == torch.int16
        assert (batch["image"] == n[:, None, None]).all() and batch["image"].shape[1:] == (2, 3)
        assert torch.equal(batch["x"], (n.double() / 3)[:, None].expand(-1, 4))
        seen += 1
    assert seen == 5 and not list(batches(Numbers(), iter([]), args, machine()))
    with pytest.raises(BadInput, match="sample 17 is broken") as e:
        list(batches(Numbers(), iter([[15, 16], [17, 18], [19]]), args, machine()))
    told = "".join(getattr(e.value, "__notes__", []))  # of the process where it was raised
    assert "in __getitem__" in told or not workers
    for process in multiprocessing.active_children():  # they end with their loader
        process.join(10)
    assert not multiprocessing.active_children()


class StandIn:
    """What `copied` asks of CUDA: says in `calls` what was asked; refuses to pin block `refuse`."""

    def __init__(self, monkeypatch, refuse=None):
        self.calls, self.refuse = [], refuse
        for name in ("Stream", "current_stream", "stream", "cudart", "check_error"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def cudaHostRegister(self, where, size, flags):
        self.calls.append(("pinned", where, size))
        return len(self.calls) == self.refuse

    def cudaHostUnregister(self, where):
        self.calls.append(("freed", where))

    def check_error(self, refused):
        if refused:
            error = torch.cuda.CudaError.__new__(torch.cuda.CudaError)
            RuntimeError.__init__(error, "operation not supported (801)")
            raise error

    def cudart(self):
        return self

    Stream = current_stream = stream = lambda self, *_: self

    def __enter__(self):
        self.calls.append("copies")

    def __exit__(self, *_):
        self.calls.append("copied")

    def wait_stream(self, other):
        self.calls.append("waits")

    def synchronize(self):
        self.calls.append("synchronised")


def test_slots_are_pinned_copied_on_a_stream_and_let_go(monkeypatch):
    gpu = argparse.Namespace(cuda=True, device=torch.device("cpu"))
    args, cuda = argparse.Namespace(workers=2), StandIn(monkeypatch)
    for batch, numbers in zip(batches(Numbers(), iter(lists := [[4, 5], [6]]), args, gpu), lists):
        assert batch["n"].tolist() == numbers
        cuda.calls.append("used")
    step = ["copies", "copied", "waits", "used", "synchronised"]
    assert [c for c in cuda.calls if isinstance(c, str)] == [*step * 2, "synchronised"]
    pinned = [c for c in cuda.calls if c[0] == "pinned"]
    assert len(pinned) == 9 and sum(c[2] for c in pinned) == 3 * 2 * (8 + 12 + 32)
    assert [c[1] for c in cuda.calls if c[0] == "freed"] == [c[1] for c in pinned]


def test_a_gpu_without_its_driver_is_one_line(monkeypatch):
    for name, value in ("device_count", 1), ("is_available", False):  # as of an old driver
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(BadInput, match="--device cuda:0: too old a driver .* or --device cpu"):
        setup(argparse.Namespace(device="auto", dtype="auto"))


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch):
    gpu = argparse.Namespace(cuda=True, device=torch.device("cpu"))
    StandIn(monkeypatch, refuse=2)
    with pytest.raises(BadInput, match=r"not supported \(801\)\); use --workers 0"):
        next(batches(Numbers(), iter([[4, 5]]), argparse.Namespace(workers=1), gpu))


def test_a_folder_is_written_to_by_one_run(tmp_path):
    args = argparse.Namespace(resume=False)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import time
from common import lock_of, parallel
from pathlib import Path
lock = lock_of(Path({str(tmp_path)!r}))
for _ in parallel(time.sleep, [0, 600, 600], 2):  # in processes, which inherit the lock
    print("locked", flush=True)
"""
    how = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **how) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BadInput, match=f"in use by process {other.pid} on "):
            open_run(tmp_path, args, machine())
        other.kill()
    for n in range(50):  # what the dead one held is free, once its processes have ended too
        with contextlib.suppress(BadInput) if n < 49 else contextlib.nullcontext():
            open_run(tmp_path, args, machine())
            break
        time.sleep(0.1)


@pytest.mark.parametrize("main", [True, False])
def test_nodes_that_share_no_folder_are_refused(tmp_path, main):
    two = argparse.Namespace(main=main, gather=lambda step: [7, step])
    for state in (None, {"step": 6}):  # the other node has a checkpoint, or a later one
        with pytest.raises(BadInput, match="not the same checkpoint on all nodes"):
            open_run(tmp_path, argparse.Namespace(resume=True), two, state)


def test_a_restarted_rank_resumes(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--lr", type=float, default=1.0)
    state = {"optimiser": {}, "args": {"lr": 3.0}, "model": {}, "step": 1, "best": 0.5}
    save_checkpoint(tmp_path / "ckpt.pt", format="x", **state)
    args = parser.parse_args([])
    monkeypatch.setattr(sys, "argv", ["script"])
    assert resumed(parser, "x", str(tmp_path))[1] is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args, state = resumed(parser, "x", str(tmp_path))
    assert state is not None and args.lr == 3.0


def test_what_the_machine_decided_is_decided_anew_on_another(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    for name, kind in (("--resume", None), ("--micro", int), ("--workers", int)):
        parser.add_argument(name, **({"type": kind} if kind else {"action": "store_true"}))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        args, _ = resumed(parser, "x", str(tmp_path))
        before = args.micro, args.workers
        args.micro, args.workers = args.micro or 5, args.workers or 8  # as settle() would
        state = {"optimiser": {}, "args": vars(args), "model": {}, "step": 1, "best": 0.5}
        save_checkpoint(tmp_path / "ckpt.pt", format="x", **state)
        return before

    assert call("--workers", "3") == (None, 3)
    assert call("--resume") == (None, 3)  # not 5
    assert call("--resume", "--micro", "2") == (2, 3)
    assert call("--resume") == (2, 3)


def test_a_full_gpu_is_one_line(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")

    with pytest.raises(SystemExit) as ended:
        cli(full)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: CUDA out of memory. Tried") and "--micro" in said


def test_a_process_of_a_group_leaves_before_the_interpreter_is_taken_down(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        f"import atexit, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n"
        f"meet = 'file://{tmp_path}/meet'\n"
        "common.dist.init_process_group('gloo', init_method=meet, rank=0, world_size=1)\n"
        "atexit.register(print, 'taken down')\ncommon.cli(lambda: print('done'))\n"
    )
    run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    assert run.stdout == "done\n"


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "ckpt.pt", format="x", n=1)
    before = (tmp_path / "ckpt.pt").read_bytes()
    script = tmp_path / "full.py"
    script.write_text(
        f"import sys, resource, signal, torch\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import common\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"common.cli(lambda: common.save_checkpoint({str(tmp_path / 'ckpt.pt')!r}, format='x', "
        "w=torch.zeros(10**6)))\n"
    )
    run = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "ckpt.pt: cannot be written" in run.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not [*tmp_path.glob(".tmp*")]


def test_undefined_numbers_are_null(tmp_path):
    Log(tmp_path / "log.jsonl").write(step=1, loss=math.nan, low=[-math.inf, 2.0])
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": None, "low": [None, 2.0]}]


def test_json_of_another_shape_is_one_line(tmp_path):
    shape = {"labels": dict, "training": [str]}
    for text, fine in (
        ('{"labels": {"1": "a"}, "training": ["x"]}', True),
        ('{"labels": []}', False),
        ('{"training": ["x", 3]}', False),
        ("[1]", False),
        ("[" * 100_000, False),
        ("{", False),
    ):
        (tmp_path / "a.json").write_text(text)
        if fine:
            assert read_json(tmp_path / "a.json", "a thing", shape)["training"] == ["x"]
        else:
            with pytest.raises(BadInput, match="a.json: .*a thing"):
                read_json(tmp_path / "a.json", "a thing", shape)


def test_bad_devices_and_seeds_get_one_line():
    for device, seed, words in (
        ("mps", 0, "--device mps"),
        ("cpu", -1, "--seed -1"),
        ("cuda:99", 0, "CUDA device"),
    ):
        with pytest.raises(BadInput, match=words):
            setup(argparse.Namespace(device=device, dtype="fp32", seed=seed))
