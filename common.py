"""What every script needs and no script should write twice: errors, files, processes, devices, checkpoints, schedules, logs.

Sections: errors · files · processes · devices · random states · checkpoints · schedules · subsets · logs ·
classification scores · pictures · measuring
"""
import argparse
import contextlib
import csv
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{path.parent}: a file is in the way of this folder; choose another --out") from None
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


def write_table(path, header, rows):
    with write_beside(path) as tmp, open(tmp, "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])


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


# ---------------------------------------------------------------- classification scores
# None stands for undefined: there is nothing to divide by.


def auc(y, score):
    """Area under the ROC curve = P(score of a positive > that of a negative), ties count half. y: bool [N]."""
    from scipy.stats import rankdata
    y = np.asarray(y, bool)
    pos, neg = int(y.sum()), int((~y).sum())
    if not pos or not neg or not np.isfinite(score).all():
        return None
    return float((rankdata(score)[y].sum() - pos * (pos + 1) / 2) / (pos * neg))


def roc(y, score):
    """False and true positive rates at each distinct threshold from the highest down, after (0, 0): fpr, tpr, thresholds."""
    order = np.argsort(-np.asarray(score), kind="stable")
    y, score = np.asarray(y, bool)[order], np.asarray(score)[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True))                        # the last of each run of ties
    tp = np.cumsum(y)[last]
    fp = last + 1 - tp
    return np.append(0, fp / max(1, fp[-1])), np.append(0, tp / max(1, tp[-1])), np.append(np.inf, score[last])


def youden(y, score):
    """The threshold (score >= it is positive) with the largest sensitivity + specificity; None if a class is missing."""
    if auc(y, score) is None:
        return None
    fpr, tpr, thresholds = roc(y, score)
    return float(thresholds[1:][np.argmax((tpr - fpr)[1:])])


def ratio(a, b):
    return float(a / b) if b else None


def mean_of(values):
    """Mean, undefined if any of them is."""
    values = list(values)
    return None if None in values else float(np.mean(values))


def at_point(y, hit):
    """Metrics of the decisions `hit` for the truth `y`, both bool [N]."""
    tp, tn, fp, fn = (int(np.sum(a & b)) for a, b in ((y, hit), (~y, ~hit), (~y, hit), (y, ~hit)))
    sensitivity, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return dict(accuracy=ratio(tp + tn, len(y)), f1=ratio(2 * tp, 2 * tp + fp + fn), sensitivity=sensitivity,
                specificity=specificity, balanced_accuracy=mean_of([sensitivity, specificity]))


def decide(probs):
    """Class of each row of probs [N, K]: of two, the second from 0.5 on; of more, the likeliest."""
    return (probs[:, 1] >= 0.5).astype(int) if probs.shape[1] == 2 else probs.argmax(1)


def measure(labels, probs, thresholds):
    """All metrics of probs [N, K]: of class 1, or with K > 2 the mean of each class against the rest (macro).

    thresholds: Youden's, one a class that is measured. Names with youden_ are taken there.
    """
    K = probs.shape[1]
    measured = [1] if K == 2 else range(K)
    top = decide(probs)
    out = dict(auc=mean_of(auc(labels == c, probs[:, c]) for c in measured))
    for prefix, hits in (("", [top == c for c in measured]), ("youden_", [probs[:, c] >= t for c, t in zip(measured, thresholds)])):
        rows = [at_point(labels == c, hit) for c, hit in zip(measured, hits)]
        out.update({prefix + k: mean_of(r[k] for r in rows) for k in rows[0]})
    if K > 2:  # the usual meaning of these two with several classes
        out.update(accuracy=float(np.mean(top == labels)), balanced_accuracy=out["sensitivity"])
    return out


def thresholds_of(labels, probs):
    """Youden's thresholds, of validation cases; 0.5 where undefined."""
    found = [youden(labels == c, probs[:, c]) for c in ([1] if probs.shape[1] == 2 else range(probs.shape[1]))]
    return [0.5 if t is None else t for t in found]


def with_intervals(labels, probs, patients, thresholds, times, seed):
    """{metric: {value, low, high}}: 95 % percentile intervals over resampled patients (with all of their cases)."""
    _, who = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(who == p) for p in range(who.max() + 1)]
    rng, drawn = np.random.default_rng([seed, 4]), []
    for _ in range(times):
        pick = np.concatenate([members[p] for p in rng.integers(len(members), size=len(members))])
        drawn.append(measure(labels[pick], probs[pick], thresholds))
    out = {}
    for name, value in measure(labels, probs, thresholds).items():
        defined = [d[name] for d in drawn if d[name] is not None]
        few = value is None or len(defined) < times / 2
        low, high = (None, None) if few else map(float, np.percentile(defined, [2.5, 97.5]))
        out[name] = dict(value=value, low=low, high=high)
    return out


def text_of(m):
    if m["value"] is None:
        return "undefined"
    return f"{m['value']:.3f}" + (f" [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else "")


# ---------------------------------------------------------------- pictures


def figure_of(size, rows=1, columns=1):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, squeeze=False)


def save_figure(fig, path):
    import matplotlib.pyplot as plt
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=100, bbox_inches="tight")
    plt.close(fig)


def draw_roc(path, scored, thresholds, found, classes, shown="test"):
    """ROC of the `shown` split of scored {split: (labels, probs)} (each class against the rest if more than two), the two operating points, and the validation's."""
    fig, axes = figure_of((5.2, 5))
    ax, K = axes[0, 0], len(classes)
    for i, c in enumerate([1] if K == 2 else range(K)):
        for split, style in (("val", dict(color="0.75")), (shown, dict(color=f"C{i}"))):
            labels, probs = scored[split]
            area = auc(labels == c, probs[:, c])
            if area is None or split != shown and K > 2:
                continue
            fpr, tpr, _ = roc(labels == c, probs[:, c])
            name = ("validation" if split == "val" else split) if K == 2 else classes[c]
            value = text_of(found["auc"]) if K == 2 and split == shown else f"{area:.3f}"
            ax.plot(fpr, tpr, lw=2 if split == shown else 1, label=f"{name}, AUC {value}", **style)
    for prefix, marker, name in (("", "o", "at 0.5"), ("youden_", "^", f"at {thresholds[0]:.2f}, Youden's of validation")):
        sens, spec = found[prefix + "sensitivity"]["value"], found[prefix + "specificity"]["value"]
        if K == 2 and None not in (sens, spec):
            ax.plot(1 - spec, sens, marker, color="tab:red", ms=8, mfc="none" if prefix else "tab:red", label=name, ls="none")
    ax.plot([0, 1], [0, 1], "k--", lw=1, label="chance")
    ax.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.legend(fontsize=8, loc="lower right")
    ax.grid(alpha=0.3)
    save_figure(fig, path)


def draw_confusion(path, labels, probs, thresholds, classes):
    K = len(classes)
    decisions = [("at 0.5" if K == 2 else "likeliest class", decide(probs))]
    if K == 2:
        decisions.append((f"at {thresholds[0]:.2f}, Youden's of validation", (probs[:, 1] >= thresholds[0]).astype(int)))
    fig, axes = figure_of(((2.2 + 0.7 * K) * len(decisions), 1.6 + 0.7 * K), 1, len(decisions))
    for ax, (name, chosen) in zip(axes[0], decisions):
        counts = np.zeros((K, K), int)
        np.add.at(counts, (labels, chosen), 1)
        share = counts / np.maximum(1, counts.sum(1, keepdims=True))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(K, K):
            ax.text(j, i, f"{counts[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", color="w" if share[i, j] > 0.6 else "k", fontsize=9)
        ax.set(xticks=range(K), yticks=range(K), xticklabels=classes, yticklabels=classes, xlabel="predicted", ylabel="true", title=name)
        ax.title.set_fontsize(10)
    fig.tight_layout()
    save_figure(fig, path)


def draw_overlay(path, image, truth, found, classes, spacing, title):
    """Scan, truth and prediction, each [X, Y, Z], on the middle slices of what is labelled, along each axis; spacing in mm.

    Without a truth (None) the prediction says where the middle is.
    """
    shown = [m for m in (("truth", truth), ("prediction", found)) if m[1] is not None]
    low, high = np.percentile(image, [1, 99.5])
    fig, axes = figure_of((3.7 * (1 + len(shown)), 10), 3, 1 + len(shown))
    for row, axis in enumerate((2, 1, 0)):
        hit = np.flatnonzero(shown[0][1].any(tuple({0, 1, 2} - {axis})))
        at = int(hit.mean()) if len(hit) else image.shape[axis] // 2
        a, b = (s for i, s in enumerate(spacing) if i != axis)
        for ax, (name, labels) in zip(axes[row], [("scan", None), *shown]):
            draw_slice(ax, image.take(at, axis), None if labels is None else labels.take(at, axis), b / a, low, high)
            ax.set_title("" if row else name)
        axes[row, 0].set_ylabel(f"{'xyz'[axis]} = {at}")
    fig.suptitle(title)
    label_legend(fig, classes)
    save_figure(fig, path)


def draw_slice(ax, image, labels, aspect, low, high):
    """A slice [a, b] in grey from `low` to `high`, and its labels, if any, in colours above it."""
    import matplotlib.pyplot as plt
    ax.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high, aspect=aspect)
    if labels is not None:
        colours = plt.get_cmap("tab20")(np.arange(256) % 20) * [1, 1, 1, 0.75]
        seen = labels.T.astype(int)
        ax.imshow(np.where(seen[..., None] > 0, colours[np.maximum(seen - 1, 0)], 0), origin="lower", aspect=aspect, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def label_legend(fig, classes):
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    fig.legend(handles=[Patch(color=plt.get_cmap("tab20")(k % 20), label=c) for k, c in enumerate(classes)], loc="center left",
               bbox_to_anchor=(1, 0.5), fontsize=9)
    fig.tight_layout()


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
