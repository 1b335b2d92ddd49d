"""What every script needs and no script should write twice.

Sections: errors · files · processes · flags · the machine · checkpoints and runs · batches and
schedules · the loop · logs and figures
"""

import argparse
import atexit
import contextlib
import csv
import ctypes
import fcntl
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from tqdm import tqdm

# ---- errors ----------------------------------------------------------------------------------


class BadInput(ValueError):
    """The user's input is at fault: the message names file or flag, value and remedy."""


class Unwritable(Exception):
    """A file cannot be written: no fault of a scan, which could be left out."""


def cli(main):
    """Run a script's main(): one line and exit code 2 for BadInput, Unwritable and a GPU's full
    memory, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may hold any byte
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (BadInput, Unwritable, torch.OutOfMemoryError) as e:
        rank = told("RANK")
        prefix = f"error (rank {rank})" if rank else "error"
        words = str(e)[:4000].replace("\n", " ")  # whatever the names and values in it
        if isinstance(e, torch.OutOfMemoryError):
            words += " A smaller --micro takes less where there is one, --recompute (pretrain) too"
        print(f"{prefix}: {words}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        # DDP holds the group's threads: one that lets a tensor go while the interpreter is taken
        # down would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ---- files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def write_beside(path):
    """Yield a temporary path beside `path` and rename it onto `path` once the block has ended well.

    A reader sees the old file or the new one, never half of either; a failed block leaves nothing.
    """
    path = Path(path)
    # two processes, of one number in two containers, may write one file; at most 255 bytes
    tmp = path.with_name(
        f".tmp.{os.urandom(8).hex()}." + os.fsdecode(os.fsencode(path.name)[-200:])
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise unwritable(path, e) from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def unwritable(path, e):
    return Unwritable(f"{path}: cannot be written ({e.strerror or e})")


def write_text(path, text):
    """A text file, whole or not at all; Unwritable."""
    with write_beside(path) as tmp:
        tmp.write_text(text)


def to_json(value, indent=None):
    """As JSON text, null where a number is not finite."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def write_json(path, value):
    write_text(path, to_json(value, 1) + "\n")


def read_json(path, what, shape=dict):
    """The JSON value in `path`; BadInput (naming `what` it should be) if there is none.

    shape: a type; or {key: shape} of a dict whose keys may be absent, or [shape] of a list.
    """
    try:
        value = json.loads(Path(path).read_text())
        if b"\\u0000" in os.fsencode(json.dumps(value, ensure_ascii=False)):
            raise ValueError("a text holds NUL")
    except (OSError, ValueError, RecursionError) as e:
        why = getattr(e, "strerror", None) or e
        raise BadInput(f"{path}: cannot be read as JSON ({why}); it should be {what}") from None
    if not is_like(value, shape):
        raise BadInput(f"{path}: not as expected of {what}, which is like {shape}")
    return value


def is_like(value, shape):
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            is_like(value[k], s) for k, s in shape.items() if k in value
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(is_like(v, shape[0]) for v in value)
    return isinstance(value, shape)


def write_table(path, header, rows):
    """A CSV file with line feeds."""
    with write_beside(path) as tmp, open(tmp, "w", newline="", errors="surrogateescape") as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])


def read_table(path, what="a CSV file"):
    """The rows of a CSV file as dicts, by the names in its first line."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
            return [*csv.DictReader(f)]
    except (OSError, csv.Error) as e:
        raise BadInput(f"{path}: cannot be read ({e}); it should be {what}") from None


# ---- processes -------------------------------------------------------------------------------


def cores():
    """CPU cores that this process may use (a container's or scheduler's share of the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def told(name, default=0):
    """A number that torchrun leaves in the environment."""
    return int(os.environ.get(name, default))


def start_worker():
    """In a new process of a pool: it ends with the one that it works for (Linux), however it ends.

    PyTorch's threads do not survive a fork, and a worker that waits for them never ends.
    """
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def parallel(fn, items, workers=None, desc=None):
    """Yield fn(item) in the order of `items`, from `workers` processes (default: one a core).

    0 or 1 worker is this process. A bar with `desc`, if it is given.
    """
    items = list(items)
    workers = min(cores() if workers is None else workers, len(items))
    bar = {"total": len(items), "desc": desc, "disable": None if desc else True}
    if workers <= 1:
        yield from tqdm(map(fn, items), **bar)
        return
    with ProcessPoolExecutor(workers, None, start_worker) as pool:
        try:
            yield from tqdm(pool.map(fn, items), **bar)
        except BrokenProcessPool:
            raise BadInput(
                f"one of {workers} processes was killed, perhaps for want of memory: taskset (or "
                "serialize.py --workers) gives it fewer"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- flags -----------------------------------------------------------------------------------

# what --resume may change: the run stays the same
FREE = (
    "resume data out device workers micro compile kernels log_every val_every save_every "
    "stop_after largest recompute asked"
)
FREE = {*FREE.split()}
MACHINES = "micro", "workers", "compile"  # what a machine decides where it is not asked for


def new_parser(words):
    """Of a script, whose --help begins with its docstring."""
    return argparse.ArgumentParser(
        description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def machine_flags(p, workers=8, kernels=True, compiled=False):
    """--device, --dtype and, for training (workers not None), --workers, --compile; --kernels."""
    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    words = "of the matrix products; auto: bf16 where the hardware has it"
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help=words)
    if kernels:
        words = "auto: Triton's (kernels/) on CUDA, else PyTorch"
        add("--kernels", choices=["auto", "torch", "triton"], default="auto", help=words)
    if workers is not None:
        add("--workers", type=int, help=f"loader processes a rank (default 0, CUDA {workers})")
        words = f"torch.compile (default: {'where Triton runs' if compiled else 'no'})"
        add("--compile", action=argparse.BooleanOptionalAction, help=words)


def training_flags(p, out, every, **machine):
    """The groups run, machine (see `machine_flags`) and reports: what every training script has.

    out: the default folder; every: the default of --val-every in words.
    """
    add = p.add_argument_group("run").add_argument
    add("--out", default=None if "TASK" in out else out, help=f"folder (default {out})")
    add("--resume", action="store_true", help="go on with the run in --out (on CPUs bitwise)")
    add("--stop-after", type=int, metavar="N", help="save and leave after N steps")
    add("--seed", type=int, default=0, help="of all random choices (default 0)")
    machine_flags(p, **machine)
    add = p.add_argument_group("reports").add_argument
    add("--log-every", type=int, default=10, help="steps (default 10)")
    add("--val-every", type=int, help=f"steps (default {every})")
    words = "between checkpoints (default 15); the last step is always saved"
    add("--save-every", type=float, metavar="MINUTES", default=15.0, help=words)


def fill(args, recipe):
    """Give each argument that is None its value in `recipe`, in place."""
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


LEAST = {"lr": 1e-12, "layer_decay": 1e-12, "workers": 0, "save_every": 0}
COUNTS = "batch micro steps patch stride stop_after log_every val_every val_samples"
LEAST |= dict.fromkeys(COUNTS.split(), 1)


def check_least(args, **more):
    """BadInput where an argument that is there and not None is less than LEAST or `more` say."""
    for name, low in (LEAST | more).items():
        value = getattr(args, name, None)
        if value is not None and not value >= low:
            raise BadInput(f"--{name.replace('_', '-')} {value}: at least {low} is needed")


def split_batch(args, machine, most):
    """args.units: the samples of a step, all ranks; args.micro: the most that a pass takes.

    BadInput where there are fewer samples than ranks. Shares need not be equal: every sample weighs
    the same, wherever it is.
    """
    args.units = args.batch * getattr(args, "crops", 1)
    if args.units < machine.world:
        raise BadInput(f"--batch {args.batch}: {args.units} samples for {machine.world} ranks")
    share = -(-args.units // machine.world)
    args.micro = min(share, args.micro or most)


def passes_of(args, machine):
    """This rank's passes of a step: arrays of places in the batch, as even as can be."""
    mine = np.array_split(np.arange(args.units), machine.world)[machine.rank]
    return np.array_split(mine, -(-len(mine) // args.micro))


# ---- the machine -----------------------------------------------------------------------------


@dataclass
class Machine:
    """This process: its rank among `world`, its device, and the type of its matrix products."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self):
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def say(self, words):
        if self.main:
            tqdm.write(words)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, tensor):
        """`tensor` added up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """`value` (anything that pickles) of every rank, as a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, fn, items, desc):
        """fn(item) of all items, in their order: each rank does a share, in its processes."""
        mine = items[self.rank :: self.world]
        workers = cores() // told("LOCAL_WORLD_SIZE", 1)
        shares = self.gather([*parallel(fn, mine, workers, self.main and desc)])
        return [shares[i % self.world][i // self.world] for i in range(len(items))]

    def barrier(self):
        if self.world > 1:  # NCCL, where no device is named, takes rank % the node's GPUs
            dist.barrier(device_ids=[self.device.index] if self.cuda else None)


def setup(args):
    """The Machine that --device and --dtype ask for; joins torchrun's group, seeds PyTorch.

    NCCL on CUDA, gloo on CPUs; bf16 by default where the hardware multiplies it. Products in
    float32 stay exact, not TF32: codes, neighbours, probes and rivals need them so.
    """
    world, rank, local = told("WORLD_SIZE", 1), told("RANK"), told("LOCAL_RANK")
    seed = getattr(args, "seed", 0)
    if not 0 <= seed < 2**32:
        raise BadInput(f"--seed {seed}: a number from 0 to {2**32 - 1}")
    name = args.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise BadInput(f"--device {name}: auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if device.type == "cuda":
        if device.index >= count:
            raise BadInput(
                f"--device {device}: this PyTorch ({torch.__version__}) sees {count} CUDA devices; "
                "use --device cpu, or lower --nproc_per_node"
            )
        if not torch.cuda.is_available():
            raise BadInput(
                f"--device {device}: too old a driver for this PyTorch (CUDA {torch.version.cuda});"
                " use a newer one, or --device cpu"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # convolutions too: its default is True
        torch.backends.cuda.matmul.allow_tf32 = False  # an environment variable can turn it on
    keep_freed_memory()
    wants_bf16 = args.dtype == "bf16" or args.dtype == "auto" and multiplies_bf16(device)
    if world > 1 and not dist.is_initialized():
        # rank 0 alone makes phantoms, pictures and probes, while the others wait
        backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(hours=2)
        # torchrun (2.13) keeps its store over a restart: the new ranks would call on the dead.
        # Nodes count restarts for themselves: with several, README's command has a new store made
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        if told("LOCAL_WORLD_SIZE") == world:
            store = dist.PrefixStore(str(told("TORCHELASTIC_RESTART_COUNT")), store)
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    torch.manual_seed(seed)
    return Machine(rank, world, device, torch.bfloat16 if wants_bf16 else torch.float32)


def keep_freed_memory():
    """Have glibc keep what tensors free on a CPU.

    Mapped anew, the kernel zeroes the pages each time: a third of a ViT-B step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library: its own policy stays
        return
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not handed back


def multiplies_bf16(device):
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def distribute(net, args, machine):
    """`net` for --compile and several ranks, their gradients averaged (buffers agree anyway).

    Nothing is sharded, on purpose: ViT-H with AdamW takes 10 GB of a GPU.
    """
    if args.compile:
        net.compile(dynamic=False)
    if machine.world == 1:
        return net
    ids = [machine.device.index] if machine.cuda else None
    # gradients and buckets are one memory; PyTorch 2.13 warns that it has another name for
    # broadcast_buffers, which 2.11 lacks
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(
            net, ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )


# ---- checkpoints and runs --------------------------------------------------------------------


def save_checkpoint(path, **state):
    """Write plain types and tensors, aside and then renamed; `format` names their kind."""
    with write_beside(path) as tmp, open(tmp, "wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # PyTorch's writer, after the file's own error
            raise e.__context__ or e from None


def load_checkpoint(path, format=None):
    """The dict that `save_checkpoint` wrote, on the CPU.

    BadInput if it is absent, cut short, not ours, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001  (half a dozen types, for a cut file or a pickle)
        reason = f"{type(e).__name__}: {e}".splitlines()[0][:120]
        raise BadInput(
            f"{path}: cannot be read as a checkpoint ({path.stat().st_size:,} bytes; {reason}); "
            "it may be cut short or not a PyTorch file: use an earlier one"
        ) from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if format and state.get("format") != format:
        raise BadInput(
            f"{path}: its format is {state.get('format')!r}, and {format!r} is needed here"
        )
    return state


# what a run goes on from
SAVED = {
    "args": {"steps": int, "asked": dict},
    "model": dict,
    "step": int,
    "best": (int, float, list),
}
SAVED["optimiser"] = {"state": dict, "param_groups": [dict]}


def resumed(parser, format, out=""):
    """With --resume and a checkpoint in --out: that run's arguments and its state, else as given.

    out: the default of --out, {task} in it being --task. A flag that this call gives and that is
    not FREE must have the run's value.
    """
    args = parser.parse_args()
    fill(args, {"out": out.format(**vars(args))})
    path = Path(args.out) / "ckpt.pt"
    # torchrun --max-restarts: what it starts again goes on
    args.resume = args.resume or told("TORCHELASTIC_RESTART_COUNT") > 0
    if not args.resume or not path.exists():
        return with_asked(args), None
    state = load_checkpoint(path, format)
    if "optimiser" not in state:
        raise BadInput(f"{path}: holds weights alone; --init starts from them")
    whole = is_like(state, SAVED) and not SAVED.keys() - state.keys()
    if not whole or not 0 < state["step"] <= state["args"].get("steps", math.inf):
        raise damaged(path)
    unset = object()
    blank = argparse.Namespace(**{k: unset for k in vars(args)})
    given = {k: v for k, v in vars(parser.parse_args(namespace=blank)).items() if v is not unset}
    saved = {**state["args"], **state["args"].get("asked", {}), "stop_after": None}
    for k, v in given.items():
        if k not in FREE and k in saved and v != saved[k]:
            raise BadInput(
                f"--{k.replace('_', '-')} {v}: the run to resume has {saved[k]}; leave the flag "
                "out, or start a new run in another --out"
            )
    args = argparse.Namespace(**{**vars(args), **saved, **given, "out": args.out})
    return with_asked(args), state | {"path": path}


def with_asked(args):
    """args.asked: what was asked for of MACHINES; on another machine the rest is decided anew."""
    args.asked = {k: v for k, v in vars(args).items() if k in MACHINES}
    return args


def damaged(path):
    return BadInput(
        f"{path}: its step, arguments, weights or optimiser are not as a run leaves them; use an "
        "earlier one"
    )


def restored(state, optimiser, best, owes=False):
    """Step, best score, and whether to validate before: of the run to resume, or of a new one.

    The optimiser takes up the state of the run to resume.
    """
    if state is None:
        return 0, best, owes
    try:
        optimiser.load_state_dict(state["optimiser"])
        moments = [(w, m) for w, of in optimiser.state.items() for m in of.values() if m.ndim]
        if not moments or any(w.shape != m.shape for w, m in moments):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):  # of hostile contents
        raise damaged(state["path"]) from None
    return state["step"], state["best"], state.get("owes", False)


def open_run(out, args, machine, state=None):
    """Make the folder of a run ready and return its Log (of which only rank 0's writes).

    state: the checkpoint of a run that goes on; without one, what `out` holds of an earlier run is
    moved to out/earlier-N.
    """
    if len({*machine.gather(state and state["step"])}) > 1:
        raise BadInput(f"{out}: not the same checkpoint on all nodes; they need one --out")
    if not machine.main:
        return Log(None)
    lock = lock_of(out)
    if state is None and {"ckpt.pt", "metrics.json"} & {*os.listdir(out)}:
        earlier = next(f for n in itertools.count(1) if not (f := out / f"earlier-{n}").exists())
        earlier.mkdir()
        for f in [*out.iterdir()]:
            if f.name != ".lock" and (f.is_file() or f.name.startswith("eval-")):
                os.replace(f, earlier / f.name)
        machine.say(f"{out} held an earlier run, which is now in {earlier.name} (--resume goes on)")
    elif state is None and args.resume:
        machine.say(f"no checkpoint in {out}: starting at step 0")
    write_json(out / "args.json", vars(args))
    for file in (out / "ckpt.pt", out / "log.jsonl"):
        if file.is_dir():
            raise BadInput(f"{file}: a folder is in the way of the file; remove it")
    log = Log(out / "log.jsonl", state and state["step"], state and state.get("owes"))
    log.lock = lock
    return log


def lock_of(out):
    """The locked file out/.lock, which says who writes here; BadInput if another process does.

    The system lets it go when its holder ends, however it ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a+")  # noqa: SIM115  (held as long as the run lasts)
    except OSError as e:
        raise BadInput(
            f"{out}: cannot be written to ({e.strerror}); choose another --out"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise BadInput(f"{out}: in use by {lock.read()}; choose another --out") from None
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
    return lock


# ---- batches and schedules -------------------------------------------------------------------


def micro_batches(first_step, args, machine):
    """Endless lists of sample numbers for this rank's loader, a pass a list, from a step on."""
    for step in itertools.count(first_step):
        for places in passes_of(args, machine):
            yield (step * args.units + places).tolist()


ENDS = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
SLOTS = 3  # batches in shared memory: one in use, the others being filled


def batches(dataset, numbers, args, machine):
    """The samples of `dataset` (dicts) that `numbers` lists, a batch a list, on the device.

    --workers processes write them in place into slots of shared memory, made once: no pickling, no
    collating. The first list is the longest; a batch lasts until the next is asked for. What
    `dataset.host_keys` names stays on the host. A dataset may have `read(n, room)`, which writes a
    sample into the tensors of `room` (None: new ones), and `whole(batch)`, which on the device
    makes a batch of what dataset[n] gives out of what `read` gave.
    """
    host_keys = getattr(dataset, "host_keys", ())
    if not args.workers:
        for some in numbers:
            yield to_device(default_collate([dataset[n] for n in some]), machine.device, host_keys)
        return
    first = next(numbers, None)
    if first is None:
        return
    read = getattr(dataset, "read", lambda n, _: dataset[n])
    sample = {k: torch.as_tensor(v) for k, v in read(first[0], None).items()}
    slots = [{k: shared(v, len(first)) for k, v in sample.items()} for _ in range(SLOTS)]
    crew = hire(read, slots, args.workers)
    supply = filled(slots, itertools.chain([first], numbers), crew)
    try:
        if machine.cuda:
            supply = copied(supply, slots, machine.device, host_keys)
        yield from map(getattr(dataset, "whole", dict), supply)
    finally:
        for _, pipe in crew:
            pipe.close()


def shared(like, count):
    """Room for `count` tensors as `like`, in memory that the processes forked from here share."""
    memory = mmap.mmap(-1, max(1, count * like.nbytes))
    values = torch.frombuffer(memory, dtype=like.dtype)[: count * like.numel()]
    return values.view(count, *like.shape)


def copied(batches, slots, device, host_keys):
    """Batches, views of the slots, on a GPU: copied by a stream of its own, from pinned memory,
    while an earlier one is computed on.
    """
    side, cuda = torch.cuda.Stream(device), torch.cuda.cudart()
    memory = [(t.data_ptr(), t.nbytes) for slot in slots for t in slot.values()]
    try:
        for where, size in memory:
            torch.cuda.check_error(cuda.cudaHostRegister(where, size, 0))
    except torch.cuda.CudaError as e:
        raise BadInput(f"--workers: their memory cannot be pinned ({e}); use --workers 0") from None
    try:
        for batch in batches:
            with torch.cuda.stream(side):
                batch = to_device(batch, device, host_keys)
            now = torch.cuda.current_stream(device)
            now.wait_stream(side)
            for tensor in batch.values():
                if tensor.is_cuda:
                    tensor.record_stream(now)
            yield batch
            side.synchronize()  # its slot is free again
    finally:
        side.synchronize()
        for where, _ in memory:
            torch.cuda.check_error(cuda.cudaHostUnregister(where))


def hire(read, slots, workers):
    """Processes that fill slots, each with a pipe on which it is asked; they end with this one."""
    fork, crew = multiprocessing.get_context("fork"), []
    for i in range(workers):
        ours, theirs = fork.Pipe()
        given = read, slots, i, workers, theirs, [ours, *(pipe for _, pipe in crew)]
        process = fork.Process(target=work, args=given, name=f"process {i}", daemon=True)
        process.start()
        theirs.close()
        atexit.register(ours.close)
        crew.append((process, ours))
    return crew


def filled(slots, numbers, crew):
    """Batches, views of the slots in turn. ChildProcessError where a process has died."""
    asked, free = deque(), deque(range(len(slots)))
    while True:
        for some in itertools.islice(numbers, len(free)):
            asked.append((free.popleft(), some))
            for _, pipe in crew:
                with contextlib.suppress(OSError):
                    pipe.send(asked[-1])
        if not asked:
            return
        slot, some = asked.popleft()
        for process, pipe in crew:
            try:
                fault = pipe.recv()
            except (EOFError, OSError):
                process.join()
                raise ChildProcessError(f"{process.name} ended with {process.exitcode}") from None
            if fault:
                raise fault
        yield {k: v[: len(some)] for k, v in slots[slot].items()}
        free.append(slot)


def work(read, slots, i, workers, pipe, others):
    """In a process of the loader: samples i, i + workers, … of each batch that is asked for.

    read: as `batches` has it.
    """
    for number in ENDS:  # for the process that it works for
        signal.signal(number, signal.SIG_IGN)
    for other in others:  # so that the pipe ends when the other side does
        other.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            slot, numbers = pipe.recv()
            fault = None
            try:
                for place in range(i, len(numbers), workers):
                    room = {k: v[place] for k, v in slots[slot].items()}
                    for k, v in read(numbers[place], room).items():
                        room[k].copy_(torch.as_tensor(v))  # onto itself: nothing
            except Exception as e:  # noqa: BLE001  (raised where the batch is due)
                fault = e
                fault.add_note(traceback.format_exc())  # it does not travel by itself
            pipe.send(fault)


def to_device(batch, device, host_keys=()):
    """A dict of tensors on the device, but for the keys that stay on the host."""
    return {k: v if k in host_keys else v.to(device, non_blocking=True) for k, v in batch.items()}


def optimiser_step(optimiser, lr, clip=0.0):
    """Step with the rate `lr` (times a group's "scale"), gradients clipped to the norm `clip`.

    Returns the gradients' norm and zeroes them. Where it is not finite, nothing changes.
    """
    weights = [w for group in optimiser.param_groups for w in group["params"]]
    grads = [w.grad for w in weights if w.grad is not None]
    length = torch.nn.utils.get_total_norm(grads)
    if clip:
        torch.nn.utils.clip_grads_with_norm_(weights, clip, length)
    for group in optimiser.param_groups:
        group["lr"] = group.get("scale", 1.0) * lr
    # what a GradScaler tells a fused optimiser, which then steps or not without asking the host
    optimiser.grad_scale, optimiser.found_inf = None, (~length.isfinite()).float()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return length


def cosine_lr(step, steps, lr, warmup):
    """Rate of `step` (0-based) out of `steps`: linear over `warmup` steps, then half a cosine."""
    if step < warmup:
        return lr * (step + 1) / warmup
    t = (step - warmup) / (steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * t))


# ---- the loop --------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C while a loop validated."""


class Loop:
    """The bookkeeping of a training loop: when to log, validate, save and stop; bar and clock.

        loop = Loop(args, machine, log, first, "training", samples_per_s=args.units)
        samples = loop.batches(dataset)
        for step in loop:                       # first, first + 1, … steps − 1
            loss = train_step(…)                # a tensor on the device
            loop.update(optimiser, lr, loss, args.clip)
            if loop.validates:
                with loop.paused():
                    validate(loop.step)
            if loop.saves:
                save(loop.step, owes=loop.owes)

    A row of the log has the means of the losses since the last row (each rank gives its share) and
    each quantity a step of `per_second` as a rate, validation left out. SIGTERM, SIGHUP and Ctrl-C
    end the loop after the step under way or in the midst of validation, which the run then owes (a
    second Ctrl-C is obeyed at once); --stop-after likewise.
    """

    def __init__(self, args, machine, log, first, desc, **per_second):
        self.args, self.machine, self.log, self.per_second = args, machine, log, per_second
        self.step, self.steps = first, args.steps
        self.last = min(args.steps, first + (args.stop_after or args.steps))
        self.asked = self.stopping = self.owes = self.hurried = False
        self.enough = False  # True: the step under way, or the last one, ends the run
        self.fault = None  # why the run cannot go on, once it is saved
        self.late, self.saved = False, time.perf_counter()
        # asking other ranks whether to stop costs a GPU its queue: there only when a row is logged
        self.asks = self.cheap = machine.world == 1 or not machine.cuda
        zero = torch.zeros((), device=machine.device)
        self.skipped, self.row, self.third = zero, zero, zero - 1  # of steps that were not finite
        bar = {"total": args.steps, "initial": first, "desc": desc, "disable": not machine.main}
        self.bar = tqdm(**bar, mininterval=1, unit="step")

    def __iter__(self):
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handlers = {s: signal.signal(s, self.hear) for s in ENDS[nohup:]}
        self.total, self.since, self.clock = 0, self.step, time.perf_counter()
        try:
            while self.step < self.last and not (self.stopping or self.enough):
                if self.asks:
                    self.stopping = self.agreed()
                last = self.step + 1 == self.last or self.stopping
                self.logged = (self.step + 1) % self.args.log_every == 0 or last
                yield self.step
        finally:
            self.bar.close()
            try:
                self.log.wait()  # before the handlers go: the signal's default loses the file
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        if not self.finished:
            self.machine.say(
                f"stopped at step {self.step} of {self.steps}, saved in {self.args.out}: --resume "
                "goes on"
            )
        if self.fault:
            raise BadInput(self.fault)

    def hear(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self.hurried:
            self.hurried = False
            raise Interrupted

    def agreed(self):
        """True on all ranks if any has been asked to stop."""
        if self.machine.world == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=self.machine.device)
        return bool(self.machine.sum(asked).item())

    def batches(self, dataset):
        """What this rank trains on from here on, a pass a batch.

        Where a process of the loader dies, this one reads what the step under way lacks, and the
        loop ends.
        """
        self.log.wait()  # processes are forked: none holds a file that is being written
        numbers, given = partial(micro_batches, self.step, self.args, self.machine), 0
        try:
            for batch in batches(dataset, numbers(), self.args, self.machine):
                yield batch
                given += 1
        except ChildProcessError as e:
            self.fault = f"a process of the loader died ({e}): fewer --workers, or more memory"
            self.asked = True
        rest = itertools.islice(numbers(), given, None)
        yield from batches(dataset, rest, argparse.Namespace(workers=0), self.machine)

    def update(self, optimiser, lr, loss, clip=0.0):
        """Step the optimiser; see `took`."""
        length = optimiser_step(optimiser, lr, clip)
        self.took({"loss": loss}, optimiser, lr=lr, grad_norm=length)

    def took(self, losses, optimiser, **values):
        """A step is done: its losses, a dict of tensors, and what else a row shows.

        A step whose gradients were not finite has changed nothing: it is counted and left out of
        the means. BadInput after three in a row.
        """
        bad = optimiser.found_inf
        self.total = self.total + torch.stack([v.where(bad == 0, 0) for v in losses.values()])
        self.skipped, self.row = self.skipped + bad, (self.row + bad) * bad
        self.third = torch.where((self.third < 0) & (self.row > 2), float(self.step), self.third)
        self.step += 1
        self.bar.update()
        self.late = time.perf_counter() - self.saved >= 60 * self.args.save_every
        if self.late:
            self.saved = time.perf_counter()
        if self.logged or self.saves or not self.machine.cuda:
            self.check_finite()
        if not self.logged:
            return
        self.stopping = self.stopping or self.agreed()
        steps, skipped = self.step - self.since, int(self.skipped)
        means = (self.machine.sum(self.total) / max(1, steps - skipped)).tolist()
        seconds = torch.tensor(time.perf_counter() - self.clock, device=self.machine.device)
        seconds = self.machine.sum(seconds).item() / self.machine.world  # one answer on all ranks
        # torchrun kills 30 s after SIGTERM; the first row, of compilation, is no measure of others
        self.asks = self.cheap or seconds > 10
        row = dict(zip(losses, means)) if skipped < steps else {}
        row |= {k: float(v) for k, v in values.items()}
        row |= {k: quantity * steps / seconds for k, quantity in self.per_second.items()}
        if skipped:
            row["skipped"] = skipped
        self.log.write(step=self.step, **row, seconds=seconds)
        self.bar.set_postfix({k: f"{row.get(k, math.nan):.3f}" for k in losses}, refresh=False)
        self.total, self.since, self.clock = 0, self.step, time.perf_counter()
        self.skipped = 0 * self.skipped

    def check_finite(self):
        third = int(self.third)
        if third < 0:
            return
        size = self.args.units
        raise BadInput(
            f"the gradients of steps {third - 2} to {third} were not finite (NaN or infinite), of "
            f"samples {(third - 2) * size} to {(third + 1) * size - 1}; nothing was saved since. "
            "Look at these samples, or begin again with a lower --lr"
        )

    @contextlib.contextmanager
    def paused(self):
        """The clock of the rates stands still.

        A signal breaks it off; not with several ranks, which would wait for one another.
        """
        start = time.perf_counter()
        try:
            self.hurried = self.machine.world == 1
            yield
            self.hurried = False
        except Interrupted:
            self.stopping = self.owes = True
        self.clock += time.perf_counter() - start

    def state(self, optimiser, best):
        """What `restored` takes up, for a checkpoint."""
        moments = optimiser.state_dict()
        return {"step": self.step, "best": best, "owes": self.owes, "optimiser": moments}

    @property
    def validates(self):
        """Whether to validate now. Not where it was asked to stop: the run then owes it."""
        due = self.step % self.args.val_every == 0 or self.step == self.steps or self.enough
        self.stopping = self.stopping or due and self.agreed()
        self.owes = due and self.stopping
        return due and not self.owes

    @property
    def saves(self):
        return self.late or self.step == self.last or self.stopping or self.enough

    @property
    def finished(self):
        return (self.step >= self.steps or self.enough) and not self.owes


# ---- logs and figures ------------------------------------------------------------------------


class Log:
    """What a run leaves: log.jsonl, one object a line, and checkpoints beside it.

    None for a path writes nothing. On resume, lines later than the checkpoint's step are dropped:
    they will come again.
    """

    def __init__(self, path, step=None, owes=False):
        self.path, self.writer, self.writing = path, ThreadPoolExecutor(1), None
        if path is None:
            return
        kept = [row for row in read_log(path) if step is not None and row["step"] <= step]
        if owes:  # what it owes comes again
            kept = [row for row in kept if row["step"] < step or "loss" in row]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row):
        if self.path is not None:
            try:
                with open(self.path, "a") as f:
                    f.write(to_json(row) + "\n")
            except OSError as e:
                raise unwritable(self.path, e) from None

    def save(self, name, **state):
        """Have the checkpoint NAME written while training goes on: from a copy, one at a time."""
        if self.path is not None:
            self.wait()
            self.writing = self.writer.submit(
                save_checkpoint, self.path.parent / name, **host_copy(state)
            )

    def wait(self):
        """Until the last one is written; Unwritable where it cannot be."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()


def host_copy(state):
    """A copy, tensors on the CPU, of nested dicts, lists and tuples."""
    if isinstance(state, dict):
        return {k: host_copy(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(host_copy, state))
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


def read_log(path):
    """The rows of a log.jsonl, oldest first; none if there is no file, nor a last one cut short."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not is_like(row, {"step": int}) or "step" not in row:
                break
            rows.append(row)
    return rows


def figure_of(size, rows=1, columns=1):
    """Figure of `size` inches and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    fig = Figure(size, layout="tight")
    return fig, fig.subplots(rows, columns, squeeze=False)


def save_figure(fig, path):
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=100, bbox_inches="tight")


def draw_curves(path, rows, *panels, x="step"):
    """Rows of a log against the step, a panel for each (title, keys, levels).

    keys: what is drawn, a curve a key; levels: {key: {name: value}}, lines in the key's colour.
    """
    fig, [axes] = figure_of((7 * len(panels), 4.5), 1, len(panels))
    for ax, (title, keys, levels) in zip(axes, panels):
        for i, key in enumerate(keys):
            points = [(row[x], row[key]) for row in rows if row.get(key) is not None]
            if points:
                ax.plot(*zip(*points), ".-", color=f"C{i}", lw=1, label=key)
            for (name, value), style in zip(levels.get(key, {}).items(), ("--", ":")):
                ax.axhline(value, color=f"C{i}", ls=style, lw=1, label=f"{name}, {key}")
        ax.set(xlabel=x, title=title)
        if ax.lines:
            ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(fig, path)
