"""Faults from outside, met for real: signals, dead processes, cut files, full disks, bad files."""

import gc
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_finetune_seg import SMALL, patient, save

import finetune_cls
import finetune_seg
import pretrain
import serialize
from common import Unwritable, cli, load_checkpoint, read_log

ROOT = Path(__file__).parent.parent
STEPS = 40
RUN = ["--size", "nano", "--volume", 16, "--stride", 1, "--batch", 4, "--val-samples", 2]
RUN += ["--dtype", "fp32", "--device", "cpu", "--log-every", 1, "--val-every", 5000]
RUN += ["--steps", STEPS]


# ---- runs, and what is seen of them from outside ----


def start(home, *flags, ranks=1, restarts=0, limit="", nodes=1, port=0):
    """pretrain.py in a process of its own (torchrun, if ranks > 1), which a test may harm."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--rdzv_backend=c10d", f"--nnodes={nodes}"]
        command += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
        command += [f"--rdzv_endpoint=127.0.0.1:{port}"]
    command += [str(ROOT / "pretrain.py"), *map(str, flags)]
    if limit:
        command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": home}
    return subprocess.Popen(command, **how)


def end(process, code=0, seconds=120):
    """What the process has said once it has ended, with this exit code, in time."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


def steps_of(out):
    return [row["step"] for row in read_log(out / "log.jsonl") if "loss" in row]


def losses_of(out):
    return [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]


def await_step(process, out, step=4):
    while len(steps_of(out)) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def state_and_parent(pid):
    """Of a process; none if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return words[0], int(words[1])


def below(pid):
    """The processes that this one began, and those that they did."""
    found, parents = [], {p: state_and_parent(p)[1] for p in os.listdir("/proc") if p.isdigit()}
    for child in (int(p) for p, parent in parents.items() if parent == pid):
        found += [child, *below(child)]
    return found


def words_of(pid, what="cmdline"):
    return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace").split("\0")


def the_line(said):
    """The one line in which a run says what ended it."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def main(home, *flags, module=pretrain):
    """The script in this process, in the folder `home`."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(home)
        m.setattr(pretrain, "matmul_rate", lambda *_: 1e12)
        m.setattr(finetune_seg, "FEATURES", 4)
        m.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()


def refused(capsys, home, *flags, module=pretrain):
    """The line that is all that a script says as it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli(lambda: main(home, *flags, module=module))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    del ended  # whose frames hold the lock of the folder
    gc.collect()
    return said


def same_runs(a, b):
    """Whether two runs ended in the same weights and moments, bit by bit."""
    a, b = (load_checkpoint(out / "ckpt.pt") for out in (a, b))
    assert a["step"] == b["step"] == STEPS and a["best"] == b["best"]
    pairs = [(a["model"], b["model"])]
    moments = [state["optimiser"]["state"] for state in (a, b)]
    pairs += [(moments[0][k], moments[1][k]) for k in moments[0]]
    return all(x[k].equal(y[k]) for x, y in pairs for k in x)


@pytest.fixture(scope="module")
def whole(phantom_home, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    end(start(phantom_home, *RUN, "--out", out))
    return out


@pytest.fixture(scope="module")
def whole_of_two(phantom_home, tmp_path_factory):
    """The same, of two ranks."""
    out = tmp_path_factory.mktemp("two")
    end(start(phantom_home, *RUN, "--out", out, ranks=2))
    return out


# ---- signals and dead processes ----


@pytest.mark.slow
def test_sigterm_under_torchrun_loses_nothing_and_leaves_no_process(
    phantom_home, whole_of_two, tmp_path
):
    process = start(phantom_home, *RUN, "--workers", 1, "--out", tmp_path, ranks=2)
    await_step(process, tmp_path)
    begun = below(process.pid)
    assert len(begun) >= 4  # two ranks, a loader's process each
    process.terminate()
    said, _ = process.communicate(timeout=30)
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 4 <= step < STEPS and f"stopped at step {step} of {STEPS}" in said
    assert steps_of(tmp_path) == list(range(1, step + 1))
    deadline = time.monotonic() + 10
    while any(state_and_parent(pid)[0] not in "ZX" for pid in begun):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
    end(start(phantom_home, "--resume", "--out", tmp_path, ranks=2))
    assert same_runs(whole_of_two, tmp_path)
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_goes_on_by_itself(phantom_home, whole_of_two, tmp_path):
    """From step 3; the checkpoint is that of a run with the same flags which was stopped there."""
    out, stopped = tmp_path / "killed", tmp_path / "stopped"
    end(start(phantom_home, *RUN, "--out", stopped, "--stop-after", 3, ranks=2))
    process = start(phantom_home, *RUN, "--out", out, ranks=2, restarts=1)
    await_step(process, out, 6)
    [rank] = [pid for pid in below(process.pid) if "RANK=1" in words_of(pid, "environ")]
    os.kill(rank, signal.SIGSTOP)
    before = read_log(out / "log.jsonl")
    os.replace(stopped / "ckpt.pt", out / "ckpt.pt")
    os.kill(rank, signal.SIGKILL)
    end(process)
    assert same_runs(whole_of_two, out) and not [*out.glob("earlier-*")]
    assert steps_of(out) == list(range(1, STEPS + 1))
    rows = [[r for r in log if r["step"] <= 3] for log in (before, read_log(out / "log.jsonl"))]
    assert rows[0] == rows[1]  # by their clocks, too


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_with_the_defaults_of_a_gpu_any_number_of_ranks_goes_on(phantom_home, whole, tmp_path):
    """Compiled, fed by processes, the batch's shares uneven on three ranks: one run."""
    flags = ["--compile", "--workers", 2, "--out", tmp_path]
    process = start(phantom_home, *RUN, *flags, ranks=2)
    await_step(process, tmp_path)
    process.terminate()
    process.communicate(timeout=60)
    assert len(steps_of(tmp_path)) < STEPS - 10
    end(start(phantom_home, "--resume", *flags, "--stop-after", 10), seconds=300)
    assert len(steps_of(tmp_path)) < STEPS
    end(start(phantom_home, "--resume", *flags, ranks=3), seconds=300)
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    assert losses_of(tmp_path) == pytest.approx(losses_of(whole), rel=1e-5)


@pytest.mark.slow
def test_a_node_that_dies_is_waited_for(phantom_home, tmp_path, monkeypatch):
    """Two agents of two ranks each, as in README's command; one is killed, another comes."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--resume", *RUN, "--steps", 300, "--save-every", 0.02, "--out", tmp_path]
    node = {"ranks": 2, "nodes": 2, "restarts": 3, "port": port}
    first = start(phantom_home, *flags, **node)  # the meeting place is with it
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    second = start(phantom_home, *flags, **node)
    await_step(first, tmp_path, 20)
    for pid in (second.pid, *below(second.pid)):
        os.kill(pid, signal.SIGKILL)
    second.wait()
    assert len(steps_of(tmp_path)) < 300
    third = start(phantom_home, *flags, **node)
    end(third, seconds=300)
    end(first, seconds=300)
    assert steps_of(tmp_path) == list(range(1, 301))


def test_ctrl_c_saves_and_resume_goes_on_bitwise(phantom_home, whole, tmp_path):
    process = start(phantom_home, *RUN, "--out", tmp_path)
    await_step(process, tmp_path)
    process.send_signal(signal.SIGINT)
    said = end(process)
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 4 <= step < STEPS and f"stopped at step {step} of {STEPS}" in said
    end(start(phantom_home, "--resume", "--out", tmp_path))
    assert same_runs(whole, tmp_path)


def test_a_killed_loader_process_ends_the_run_which_then_goes_on(phantom_home, whole, tmp_path):
    process = start(phantom_home, *RUN, "--workers", 2, "--out", tmp_path)
    await_step(process, tmp_path)
    workers = [p for p in below(process.pid) if "resource_tracker" not in " ".join(words_of(p))]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    said = end(process, 2)
    assert "a process of the loader died" in the_line(said)
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 4 <= step < STEPS and steps_of(tmp_path) == list(range(1, step + 1))
    assert f"stopped at step {step} of {STEPS}" in said
    end(start(phantom_home, "--resume", "--out", tmp_path))
    assert same_runs(whole, tmp_path)


# ---- a corpus that is cut short under a run ----


@pytest.fixture
def fragile(corpus, tmp_path):
    """A corpus to harm."""
    yield Path(shutil.copytree(corpus, tmp_path / "corpus"))
    shutil.rmtree(tmp_path / "corpus")


def cut_all(corpus, aside=False):
    """Halve the arrays, in place or by shorter files in their places.

    A process that is reading an array as it is cut in place dies of SIGBUS.
    """
    arrays = [*corpus.rglob("*.npy")]
    assert len(arrays) > 50
    for array in arrays:
        half = shutil.copy(array, f"{array}.half") if aside else array
        os.truncate(half, array.stat().st_size // 2)
        os.replace(half, array)


READER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common, serialize
data = serialize.Sequences(sys.argv[1], size=16, stride=1)
def read():
    for n, _ in enumerate(sys.stdin):
        print(data[n % 3]["volume"].sum().item(), flush=True)
common.cli(read)
"""


def test_a_cut_array_is_named_by_whoever_reads_it_next(fragile):
    how = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", READER, str(fragile)]
    with subprocess.Popen(command, text=True, **how) as reader:
        for _ in range(6):  # each kind, what is mapped already included
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline().strip().lstrip("-").isdigit()
        cut_all(fragile)
        _, said = reader.communicate("\n", timeout=60)
    assert reader.returncode == 2 and said.count("\n") == 1, said
    assert str(fragile) in said and ".npy: cut short" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corpus_that_is_cut_ends_the_run(phantom_home, fragile, tmp_path, workers):
    flags = ["--data", fragile, "--workers", workers, "--steps", 4000, "--out", tmp_path / "run"]
    process = start(phantom_home, *RUN, *flags)
    await_step(process, tmp_path / "run")
    cut_all(fragile, aside=not workers)
    line = the_line(end(process, 2))
    assert f"error: {fragile}" in line and ".npy: " in line


# ---- where the run is to be written ----


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(phantom_home, tmp_path):
    main(phantom_home, *RUN, "--stop-after", 2, "--out", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    flags = ["--resume", "--stop-after", 2, "--out", tmp_path]
    line = the_line(end(start(phantom_home, *flags, limit="ulimit -f 2000"), 2))
    assert f"{tmp_path}/ckpt.pt: cannot be written" in line
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not [*tmp_path.glob(".tmp*")]


def test_what_cannot_be_written_is_no_fault_of_a_scan(tmp_path, monkeypatch):
    """A full disk must not look like a data set with fewer cases."""
    image, label = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    for path, values in zip((image, label), patient(0)):
        save(path, values)
    (tmp_path / "file").write_text("where a folder would be made")
    monkeypatch.setattr(finetune_cls, "CACHE", tmp_path / "file/cache")
    job = serialize.job_of("spatial", image, "p") | {"out": tmp_path / "file/corpus"}
    case = {"image": str(image), "label": str(label), "path": f"{tmp_path}/file/cache/case"}
    for attempt in (
        lambda: serialize.store(job | {"stamp": 0, "spacing": None}),
        lambda: finetune_seg.prepare_case(case | {"how": [3, None, [0, 100]]}),
        lambda: finetune_cls.prepare_whole({"source": image}, (16, 16, 16), None),
    ):
        with pytest.raises(Unwritable, match="file/.*: cannot be written"):
            attempt()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(
    phantom_home, tmp_path, capsys
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("ckpt.pt", "log.jsonl", "args.json"):
        (tmp_path / name / name).mkdir(parents=True)
    for out, named in (
        (tmp_path / "file", "file"),
        (tmp_path / "file/run", "file/run"),
        (tmp_path / "link/run", "link/run"),
        ("/proc/ar3d/run", "/proc/ar3d/run"),
        (tmp_path / "ckpt.pt", "ckpt.pt/ckpt.pt"),
        (tmp_path / "log.jsonl", "log.jsonl/log.jsonl"),
        (tmp_path / "args.json", "args.json/args.json"),
    ):
        for more in ([], ["--resume"]):
            assert f"{named}: " in refused(capsys, phantom_home, *RUN, "--out", out, *more)
    assert (tmp_path / "file").read_text() == "mine" and not [*tmp_path.glob("*/earlier-*/log*")]


# ---- checkpoints that are none ----


class Code:
    """A pickle that would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def with_weights(state, change):
    weights = state["model"]
    return state | {"model": weights | {k: change(v) for k, v in [*weights.items()][:1]}}


def with_moments(state, change):
    moments = {k: change(v) for k, v in state["optimiser"]["state"].items()}
    return state | {"optimiser": state["optimiser"] | {"state": moments}}


FILES = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"this is not a checkpoint\n" * 100,
    "half": lambda whole: whole[: len(whole) // 2],
    "pickle": lambda whole: pickle.dumps({"step": Code()}, 2),
}
STATES = {
    "code": lambda s: s | {"args": Code()},
    "no format": lambda s: without(s, "format"),
    "another format": lambda s: s | {"format": "ar3d-other"},
    "no weights": lambda s: without(s, "model"),
    "NaN": lambda s: with_weights(s, lambda w: w * torch.nan),
    "shape": lambda s: with_weights(s, lambda w: w[:1]),
    "no arguments": lambda s: without(s, "args"),
    "no optimiser": lambda s: without(s, "optimiser"),
    "optimiser of another kind": lambda s: s | {"optimiser": [1]},
    "empty optimiser": lambda s: s | {"optimiser": {}},
    "no moments": lambda s: s | {"optimiser": s["optimiser"] | {"state": {}}},
    "moments of another shape": lambda s: with_moments(
        s, lambda m: {k: v.flatten()[:1] if v.ndim else v for k, v in m.items()}
    ),
    "no step": lambda s: without(s, "step"),
    "step -1": lambda s: s | {"step": -1},
    "step of text": lambda s: s | {"step": "2"},
    "step of no whole number": lambda s: s | {"step": 1.5},
    "step beyond the last": lambda s: s | {"step": 10**6},
    "best of text": lambda s: s | {"best": "low"},
}


def harm(path, whole, name):
    """Write the checkpoint `whole` to `path`, with the fault of that name; what is then there."""
    if name in FILES:
        path.write_bytes(FILES[name](whole.read_bytes()))
    else:
        torch.save(STATES[name](torch.load(whole, weights_only=True)), path)
    return path.read_bytes()


def assert_refused(name, whole, home, folder, capsys, module=pretrain, flags=()):
    before = harm(folder / "ckpt.pt", whole, name)
    said = refused(capsys, home, *flags, "--resume", "--out", folder, module=module)
    assert f"{folder}/ckpt.pt: " in said
    assert (folder / "ckpt.pt").read_bytes() == before
    assert not (home / "executed").exists() and not steps_of(folder)


@pytest.fixture(scope="module")
def stopped(phantom_home, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    main(phantom_home, *RUN, "--stop-after", 2, "--out", out)
    return out / "ckpt.pt"


@pytest.mark.parametrize("name", [*FILES, *STATES])
def test_pretraining_resumes_from_no_hostile_checkpoint(
    name, stopped, phantom_home, tmp_path, capsys
):
    assert_refused(name, stopped, phantom_home, tmp_path, capsys)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """A data set of three patients, flags for it, and the checkpoint of a run that was stopped."""
    home = tmp_path_factory.mktemp("segmented")
    for i, tag in enumerate(("Tr", "Tr", "Va")):
        image, label = patient(i)
        save(home / f"images{tag}/case_{i}.nii.gz", image)
        save(home / f"labels{tag}/case_{i}.nii.gz", label)
    flags = ["--task", "mine", "--data", home, *SMALL]
    main(home, *flags, "--stop-after", 1, "--out", home / "run", module=finetune_seg)
    return home, flags, home / "run/ckpt.pt"


@pytest.mark.parametrize("name", ["half", "code", "NaN", "no moments", "step beyond the last"])
def test_segmentation_resumes_from_no_hostile_checkpoint(name, segmented, tmp_path, capsys):
    home, flags, whole = segmented
    assert_refused(name, whole, home, tmp_path, capsys, finetune_seg, flags)
