"""What every script needs and no script should write twice: errors, files, processes, devices, checkpoints, schedules, logs.

Sections: errors · files · processes · devices · random states · checkpoints · schedules · subsets · logs · measuring
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ---------------------------------------------------------------- errors


class BadInput(ValueError):
    """The user's input is at fault: the message names the file or flag, the value, and what to do."""


def cli(main):
    """Run a script's main(): BadInput becomes one line and exit code 2, Ctrl-C one line and exit code 130."""
    try:
        main()
    except BadInput as e:
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {e}" if rank == 0 else f"error (rank {rank}): {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def write_beside(path):
    """Yield a temporary path beside `path` (same suffixes) and rename it onto `path` once the block has ended well.

    A reader sees the old file or the new one, never half of either; a failed block leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".tmp.{path.name}")  # a fixed name: what a kill leaves behind is overwritten, not piled up
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with write_beside(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path, what):
    """The JSON value in `path`; BadInput (naming `what` it should be) if it is absent or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; it should be {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not JSON ({e}); it should be {what}") from None


# ---------------------------------------------------------------- processes


def cores():
    """CPU cores that this process may use (a container's or a scheduler's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread():
    """In a worker: PyTorch's threads do not survive a fork, and a worker that waits for them waits for ever."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def parallel(fn, items, workers=None, desc=None):
    """Yield fn(item) in the order of `items`, from `workers` processes (None: one a core; 0 or 1: this one), with a bar."""
    items = list(items)
    workers = min(cores() if workers is None else workers, len(items))
    bar = dict(total=len(items), desc=desc, disable=None if desc else True)
    if workers <= 1:
        yield from tqdm(map(fn, items), **bar)
        return
    with ProcessPoolExecutor(workers, initializer=one_thread) as pool:
        try:
            yield from tqdm(pool.map(fn, items), **bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------- devices


@dataclass
class Place:
    """Where this process runs: its rank among `world`, its device, and whether it is the one that prints and writes."""
    rank: int
    world: int
    device: object
    dtype: object

    @property
    def main(self):
        return self.rank == 0

    def say(self, *words):
        if self.main:
            tqdm.write(" ".join(str(w) for w in words))

    def autocast(self):
        import torch
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, tensor):
        """`tensor` added up over all ranks, in place."""
        if self.world > 1:
            import torch.distributed as dist
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """`value` (anything that pickles) of every rank, as a list."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self):
        if self.world > 1:
            import torch.distributed as dist
            dist.barrier()


def place(device="auto", dtype="auto", seed=0):
    """Join the process group if torchrun started us (NCCL on CUDA, gloo on CPU), choose device and dtype, seed everything.

    device: auto, cpu, cuda or cuda:i. dtype: auto (bfloat16 where the hardware multiplies it, else float32), bf16, fp32.
    """
    import torch
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= seed < 2 ** 32 - world:
        raise BadInput(f"--seed {seed}: a number from 0 to {2 ** 32 - world - 1}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise BadInput(f"--device {device}: auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: this PyTorch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device == "cuda":
        device = f"cuda:{local}"
    device = torch.device(device)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise BadInput(f"{device}: there are {torch.cuda.device_count()} CUDA devices; lower --nproc_per_node, or name another --device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if dtype == "auto":
        dtype = "bf16" if multiplies_bf16(device) else "fp32"
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    random.seed(seed + rank), np.random.seed(seed + rank), torch.manual_seed(seed)
    return Place(rank, world, device, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])


def keep_freed_memory():
    """Have glibc keep what tensors free on a CPU: each mapped anew, the kernel zeroes its pages, a third of a ViT-B step."""
    import ctypes
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library (macOS, musl, Windows): its own policy stays
        return
    mallopt(-4, 0)            # M_MMAP_MAX: large blocks come from the heap
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: which is not handed back


def multiplies_bf16(device):
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    ask = [getattr(torch.cpu, f"_is_{isa}_supported", None) for isa in ("avx512_bf16", "amx_tile")]
    return any(f() for f in ask if f)


def leave():
    """Leave the process group, if there is one."""
    import torch.distributed as dist
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class StopRequest:
    """SIGTERM and Ctrl-C, remembered instead of obeyed: the loop asks `agreed()` and ends at a step of its own choosing.

    A second Ctrl-C is obeyed at once.
    """

    def __init__(self):
        self.asked = False
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self._hear)

    def _hear(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def agreed(self, where):
        """True on all ranks if any has been asked to stop. Costs a small all-reduce where there are several ranks."""
        if where.world == 1:
            return self.asked
        import torch
        return bool(where.sum(torch.tensor(float(self.asked), device=where.device)).item())


# ---------------------------------------------------------------- random states


def random_states(where):
    """The state of every generator of every rank, in plain types: a list with one dict a rank."""
    import torch
    version, keys, pos, has_gauss, cached = np.random.get_state()
    mine = {"torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": [version, torch.from_numpy(keys.astype(np.int64)), int(pos), int(has_gauss), float(cached)]}
    if where.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(where.device)
    if where.world == 1:
        return [mine]
    import torch.distributed as dist
    all_ranks = [None] * where.world
    dist.all_gather_object(all_ranks, mine)
    return all_ranks


def set_random_states(states, where):
    """Put back what `random_states` returned; a rank that the saved run did not have keeps its fresh seed."""
    import torch
    if where.rank >= len(states):
        return
    mine = states[where.rank]
    version, state, gauss = mine["python"]
    random.setstate((version, tuple(state), gauss))
    version, keys, *rest = mine["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(mine["torch"])
    if where.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], where.device)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, **state):
    """Write a dict of plain types and tensors, aside and then renamed. It must hold `format`, the name of its kind."""
    import torch
    if "format" not in state:
        raise ValueError("a checkpoint needs its format")
    with write_beside(path) as tmp:
        torch.save(state, tmp)


def load_checkpoint(path, format=None, map_location="cpu"):
    """The dict that `save_checkpoint` wrote. BadInput if it is absent, cut short, not ours, or of another format."""
    import torch
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a file that is cut short or holds a pickle
        reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
        raise BadInput(f"{path}: cannot be read as a checkpoint ({path.stat().st_size:,} bytes; {reason}); "
                       "it may be cut short or not a PyTorch file: use an earlier one") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if format and state.get("format") != format:
        raise BadInput(f"{path}: its format is {state.get('format')!r}, and {format!r} is needed here")
    return state


def keep_earlier_run(out, say=print):
    """Move the files of an earlier run in folder `out` to out/earlier-N, so that a new run overwrites nothing."""
    out = Path(out)
    if not (out / "ckpt.pt").exists():
        return
    n = 1
    while (out / f"earlier-{n}").exists():
        n += 1
    (out / f"earlier-{n}").mkdir()
    for f in sorted(out.iterdir()):
        if f.is_file():
            os.replace(f, out / f"earlier-{n}" / f.name)
    say(f"{out} held an earlier run: it is now in {out / f'earlier-{n}'} (--resume goes on with a run)")


def resumed_args(parser, saved, free):
    """Arguments of a run that goes on: those it was started with, save for flags in `free`, which this call may set anew.

    BadInput if this call gives any other flag a value that the run was not started with.
    """
    unset = object()
    blank = argparse.Namespace(**{a.dest: unset for a in parser._actions if a.dest != "help"})
    given = {k: v for k, v in vars(parser.parse_args(namespace=blank)).items() if v is not unset}
    for k, v in given.items():
        if k not in free and k in saved and v != saved[k]:
            raise BadInput(f"--{k.replace('_', '-')} {v}: the run to resume has {saved[k]}; leave the flag out, "
                           "or start a new run in another --out")
    free_given = {k: v for k, v in given.items() if k in free}
    return argparse.Namespace(**{**vars(parser.parse_args([])), **saved, **free_given})


# ---------------------------------------------------------------- schedules


def cosine_lr(step, steps, lr, warmup=0, final=0.0):
    """Learning rate of `step` (0-based) out of `steps`: linear from 0 over `warmup` steps, then half a cosine to `final`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def poly_lr(step, steps, lr, power=0.9):
    """Learning rate of `step` (0-based) out of `steps`: from `lr` to 0 along a polynomial."""
    return lr * (1 - min(step, steps) / steps) ** power


# ---------------------------------------------------------------- subsets of labelled patients


def label_subset(patients, share, seed=0, strata=None):
    """The `share` of `patients` whose labels a run may see, in the order given: a set is part of every larger one.

    Patients stand in the order of a hash of (seed, patient), so neither the list's order nor its length matters to who
    comes first. With `strata` (one a patient: its class) the share is of each stratum. At least one a stratum.
    """
    if not 0 < share <= 1:
        raise BadInput(f"--labels {share:g}: a share of the training patients, above 0 and up to 1")
    groups = {}
    for patient, stratum in zip(patients, strata if strata is not None else [None] * len(patients)):
        groups.setdefault(stratum, {})[patient] = None
    rank = lambda p: hashlib.blake2b(f"{seed} {p}".encode(), digest_size=8).hexdigest()  # noqa: E731
    chosen = {p for g in groups.values() for p in sorted(g, key=rank)[:max(1, round(share * len(g)))]}
    return [p for p in dict.fromkeys(patients) if p in chosen]


# ---------------------------------------------------------------- logs


class Log:
    """log.jsonl: one object a line. On resume, lines later than the checkpoint's step are dropped: they will come again."""

    def __init__(self, path, resume_step=None):
        self.path = Path(path)
        kept = [row for row in read_log(self.path) if resume_step is not None and row["step"] <= resume_step]
        with write_beside(self.path) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")


def read_log(path):
    """The rows of a log.jsonl, oldest first; none if there is no file. A last line cut short by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


# ---------------------------------------------------------------- measuring


def matmul_rate(device, dtype, seconds=1.0):
    """FLOP/s of one large square matrix product in `dtype` on `device`: the best of the runs that fit in `seconds`."""
    import torch
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times)


def peak_memory(device):
    """Peak bytes: of the CUDA allocator on a GPU, of the whole process (resident set) elsewhere."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
