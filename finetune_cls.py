"""Classification of whole scans: a pre-trained encoder and a linear layer, tuned on labelled cases, scored once on a test set.

    python finetune_cls.py --task phantom-cls                       # CPU demo on made-up nodules: 2 minutes, test AUC 0.84
    python finetune_cls.py --task nodule --init out/pretrain/ckpt.pt --seeds 0 1 2    # one GPU, the published recipe
    torchrun --nproc_per_node=4 finetune_cls.py --task ricord --init FILE             # four GPUs, the same run
    python finetune_cls.py --task mine --data cases.csv             # your scans: file,label,split[,patient]
    python finetune_cls.py --resume --out out/cls-nodule            # goes on with a run, exactly

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (best validation AUC), metrics.json, scores.csv (each
case), roc.png, confusion.png, cases.png, curves.png; with several seeds, a folder seed-N each and the mean in metrics.json.
The test set is scored once, at the end, with best.pt. Every random choice is a function of (seed, number of the sample).

Sections: arguments · arrays, read once · batches · shortcut baseline · pictures · training step · evaluation · a run · main

B batch, X Y Z voxels, K classes, N cases.
"""
import argparse
import time
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (BadInput, Log, StopRequest, auc, cli, cores, cosine_lr, decide, draw_confusion, draw_roc, figure_of, keep_earlier_run, label_subset, leave,
                    load_checkpoint, measure, parallel, place, poly_lr, read_json, read_log, resumed_args, save_checkpoint,
                    save_figure, text_of, thresholds_of, with_intervals, write_json, write_table)
from kernels import choose
from model import CLS_FORMAT, SIZES, Classifier, Config, Model, fit, grid_of, layer_decay_groups, load_pretrained, logistic, scores_of
from serialize import CLS_TASKS, FLAVOURS, SPLITS, cls_data, cls_task, list_cases, load_volume, prepare_whole

# ---------------------------------------------------------------- arguments

RECIPES = {  # what a flag that was not given stands for; nodule and ricord are published
    "nodule": dict(batch=16, epochs=100, lr=1.5e-5, wd=0.01, beta2=0.999, decay=1.0, clip=0.0, schedule="cosine", warmup=0,
                   patience=30, flip=0.5, class_weights=False),
    "ricord": dict(batch=8, epochs=200, lr=5e-5, wd=0.05, beta2=0.95, decay=0.75, clip=12.0, schedule="poly", warmup=0,
                   patience=0, flip=0.0, class_weights=True),
    "nano": dict(batch=8, epochs=20, lr=1e-3, wd=0.05, beta2=0.95, decay=1.0, clip=1.0, schedule="cosine", warmup=30,
                 patience=0, flip=0.5, class_weights=True),
}
SCRATCH = {"ricord": dict(lr=1e-5, wd=1e-4)}  # published: what differs without pre-training
FREE = {"resume", "data", "out", "cache", "seeds", "device", "workers", "micro", "kernels", "log_every", "save_every", "stop_after"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--task", choices=[*CLS_TASKS, "phantom-cls"], default="phantom-cls", help="default %(default)s: made-up patients")
    g.add_argument("--flavour", choices=list(FLAVOURS), default="nodule", help="of phantom-cls (default %(default)s)")
    g.add_argument("--data", help="nodule: nodulemnist3d.npz or its folder (28³ before 64³); ricord: the folder that the lists' "
                   "paths start from; mine: a CSV with the columns file,label,split[,patient] (default data/TASK)")
    g.add_argument("--lists", nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="ricord: lines FILE LABEL (default {train,val,test}.txt in --data)")
    g.add_argument("--patient", metavar="REGEX", help="ricord, mine: what names the patient in a path (default: RICORD's names; else the file's)")
    g.add_argument("--out", help="folder of the run (default out/cls-TASK)")
    g.add_argument("--resume", action="store_true", help="go on from --out with the arguments of that run; a fresh start if there is none")
    g.add_argument("--init", metavar="FILE", help="pre-trained weights: a checkpoint of pretrain.py, or the published file (default: from scratch)")
    g.add_argument("--heads", type=int, help="of the published file's model (default width / 64)")
    g.add_argument("--labels", type=float, default=1.0, help="share of the training patients, stratified by label (default 1)")
    g.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run each, then mean ± sd (default 0)")
    g.add_argument("--stop-after", type=int, metavar="N", help="save and leave after N steps of this call")
    g = p.add_argument_group("model")
    g.add_argument("--size", choices=list(SIZES), help="without --init (published: base, the default with CUDA; nano without)")
    g.add_argument("--pool", choices=["mean", "attention"], default="mean", help="of the patch tokens (published: mean)")
    g.add_argument("--freeze", action="store_true", help="linear probe: the encoder stays as it is (lr 1e-3 unless given)")
    g = p.add_argument_group("input")
    g.add_argument("--volume", type=int, nargs=3, metavar=("X", "Y", "Z"),
                   help="voxels (published: nodule 128 128 128, ricord 128 128 64; nano 32 32 32, 64 64 32)")
    g.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities that become 0 and 1 (published: ricord 0 1400)")
    g.add_argument("--cache", default="data/cache-cls", help="where resized scans are kept (default %(default)s; 4 MB a case at 128³)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, help="published: nodule 100, ricord 200; nano 20")
    g.add_argument("--batch", type=int, help="cases a step, over all ranks (published: nodule 16, ricord 8; nano 8)")
    g.add_argument("--micro", type=int, help="cases a forward pass on one device (default: all of its share)")
    g.add_argument("--lr", type=float, help="published: nodule 1.5e-5, ricord 5e-5, from scratch 1e-5; nano 1e-3")
    g.add_argument("--wd", type=float, help="AdamW (published: nodule 0.01, ricord 0.05, from scratch 1e-4; nano 0.05)")
    g.add_argument("--beta2", type=float, help="AdamW (published: nodule 0.999, ricord 0.95)")
    g.add_argument("--decay", type=float, help="of lr a layer towards the input (published: nodule 1, ricord 0.75)")
    g.add_argument("--clip", type=float, help="gradient norm (published: nodule 0, off; ricord 12)")
    g.add_argument("--schedule", choices=["cosine", "poly"], help="published: nodule cosine, ricord polynomial of power 0.9")
    g.add_argument("--warmup", type=int, help="steps, of cosine (published: 0; nano 30)")
    g.add_argument("--patience", type=int, help="validations without a better AUC, 0: no limit (published: nodule 30, ricord 0)")
    g.add_argument("--flip", type=float, help="probability of a flip along each axis (published: nodule random flips, here 0.5; ricord 0)")
    g.add_argument("--class-weights", action=argparse.BooleanOptionalAction, help="cross-entropy by inverse class frequency (published: ricord)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="of the matrix products")
    g.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto", help="auto: Triton's (kernels/) on CUDA, else PyTorch")
    g.add_argument("--workers", type=int, help="loader processes a rank (default: 4 with CUDA, 0 without)")
    g = p.add_argument_group("reports")
    g.add_argument("--bootstrap", type=int, default=1000, help="resamplings of the patients for the 95 %% intervals (default %(default)s)")
    g.add_argument("--log-every", type=int, default=10, help="steps (default %(default)s)")
    g.add_argument("--val-every", type=int, default=1, help="epochs (default %(default)s)")
    g.add_argument("--save-every", type=int, default=5, help="epochs (default %(default)s)")
    return p


def settle(args, config, where):
    """Fill in what was not given, in place. config: of the encoder."""
    task, cuda = cls_task(args.task, args.flavour), where.device.type == "cuda"
    nano = asdict(config) == asdict(Config(**SIZES["nano"], images=config.images, order=config.order))
    recipe = dict(RECIPES["nano" if nano else task["recipe"]])
    if not args.init:
        recipe.update({} if nano else SCRATCH.get(task["recipe"], {}))
    if args.freeze:
        recipe.update(lr=1e-3)
    recipe.update(volume=task["nano" if nano else "volume"], window=task["window"],
                  workers=4 if cuda else 0)
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "log_every", "val_every", "save_every", "bootstrap"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if len(set(args.seeds)) < len(args.seeds):
        raise BadInput(f"--seeds {' '.join(map(str, args.seeds))}: each once")
    if args.window and not args.window[0] < args.window[1]:
        raise BadInput(f"--window {args.window[0]:g} {args.window[1]:g}: LOW must be below HIGH")
    grid_of(args.volume, config.patch)
    if args.batch % where.world:
        raise BadInput(f"--batch {args.batch} does not divide over {where.world} ranks")
    share = args.batch // where.world
    args.micro = args.micro or share
    if args.micro < 1 or share % args.micro:
        raise BadInput(f"--micro {args.micro} does not divide the {share} cases of a step on each of {where.world} ranks")


# ---------------------------------------------------------------- arrays, read once


def prepare_all(cases, args, where):
    """Give every case its array in the cache and its statistics, each rank a share of the reading: (cases, those skipped)."""
    job = partial(prepare_whole, shape=tuple(args.volume), window=args.window, cache=args.cache)
    mine = list(parallel(job, cases[where.rank::where.world], max(1, cores() // where.world), "reading" if where.main else None))
    found, kept, skipped = where.gather(mine), [], []
    for n, case in enumerate(cases):
        array, stats, reason = found[n % where.world][n // where.world]
        if reason:
            skipped.append((case["file"], case["split"], reason))
        else:
            kept.append({**{k: v for k, v in case.items() if k != "source"}, "array": array, "statistics": stats})
    if skipped:
        where.say(f"{len(skipped)} of {len(cases)} scans left out, see skipped.csv; the first: {skipped[0][0]}: {skipped[0][2]}")
    for s in SPLITS:
        if not any(c["split"] == s for c in kept):
            raise BadInput(f"no scan of the {s} split can be used; the first: {skipped[0][0]}: {skipped[0][2]}")
    if args.window and not skipped and np.median([c["statistics"][-5] for c in kept]) < args.window[0]:
        where.say(f"warning: more than half of the voxels lie below --window {args.window[0]:g} and become 0: in HU, lung and air do; "
                  "--window -1000 400 keeps the lung")
    return kept, skipped


# ---------------------------------------------------------------- batches


class Stream(torch.utils.data.Dataset):
    """Sample n = 0, 1, … of training without end: each N in a row are all cases, in an order of their own.

    # departs: batches run across the ends of epochs, so that each is full whatever N is.
    """

    def __init__(self, cases, seed, flip):
        self.cases, self.seed, self.flip = cases, seed, flip
        self.order = lru_cache(4)(lambda epoch: np.random.default_rng([seed, 1, epoch]).permutation(len(cases)))

    def case(self, n):
        return self.cases[self.order(n // len(self.cases))[n % len(self.cases)]]

    def __getitem__(self, n):
        flips = np.random.default_rng([self.seed, 2, n]).random(3) < self.flip
        return dict(volume=load_volume(self.case(n)), label=self.case(n)["label"], flips=flips)


class Shown(torch.utils.data.Dataset):
    """Cases as they are, each with its number."""

    def __init__(self, cases):
        self.cases = cases

    def __getitem__(self, n):
        return dict(volume=load_volume(self.cases[n]), number=n)


def micro_batches(first_step, args, where):
    """Endless lists of sample numbers for this rank's loader: passes of `micro`, dealt to the ranks in turn."""
    start = first_step * args.batch + where.rank * args.micro
    while True:
        yield list(range(start, start + args.micro))
        start += args.micro * where.world


def augment(volume, flips):
    """Volumes [B, X, Y, Z] flipped along the axes that flips [B, 3] marks, on their device."""
    for axis in range(3):
        volume = torch.where(flips[:, axis, None, None, None], volume.flip(axis + 1), volume)
    return volume


# ---------------------------------------------------------------- shortcut baseline


def fit_logistic(x, y, K, l2=1.0):
    """Logistic regression (`model.logistic`) on x [N, F], l2 against the sum of cross-entropies: a function x -> probs [N, K].

    Features are standardised by x; those that are constant in it are left out.
    """
    mean, sd = x.mean(0), x.std(0)
    varied = sd > 1e-9 * (1 + np.abs(mean))
    scaled = lambda a: torch.from_numpy(np.clip((a[:, varied] - mean[varied]) / sd[varied], -5, 5))  # noqa: E731
    w = logistic(scaled(x), torch.from_numpy(y), K, l2 / len(x), tolerance=1e-9)
    return lambda b: scores_of(w, scaled(b)).softmax(1).numpy()


def shortcut(train, test, K, args, seed):
    """The test AUC that header and intensity statistics alone reach, and how many of them vary."""
    table = lambda cases: np.stack([c["statistics"] for c in cases])  # noqa: E731
    x, y = table(train), np.array([c["label"] for c in train])
    probs = fit_logistic(x, y, K)(table(test))
    labels, patients = (np.array([c[k] for c in test]) for k in ("label", "patient"))
    found = with_intervals(labels, probs, patients, [0.5] * K, args.bootstrap, seed)["auc"]
    return {**found, "features": int((x.std(0) > 1e-9 * (1 + np.abs(x.mean(0)))).sum())}


# ---------------------------------------------------------------- pictures


def draw_curves(path, rows):
    fig, axes = figure_of((11, 4), 1, 2)
    for ax, key, name in ((axes[0, 0], "loss", "training loss"), (axes[0, 0], "val_loss", "validation loss"),
                          (axes[0, 1], "val_auc", "validation AUC")):
        points = [(r["epoch"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), color="0.7" if key == "loss" else "tab:blue", lw=1, marker="o" if key != "loss" else None, ms=3, label=name)
            if key == "val_auc":
                best = max(points, key=lambda p: p[1])
                ax.plot(*best, "o", ms=9, mfc="none", color="tab:red", label=f"best, {best[1]:.3f}")
    axes[0, 0].set(xlabel="epoch", ylabel="cross-entropy")
    axes[0, 1].set(xlabel="epoch", ylabel="AUC", ylim=(min(0.4, axes[0, 1].get_ylim()[0]), 1.02))
    axes[0, 1].axhline(0.5, color="k", ls="--", lw=1, label="chance")
    for ax in axes[0]:
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    save_figure(fig, path)


def draw_cases(path, cases, probs, classes, count=6):
    """The surest right and the surest wrong decisions: three planes through the middle of each."""
    labels = np.array([c["label"] for c in cases])
    chosen = decide(probs)
    sure = probs[np.arange(len(probs)), chosen]
    rows = [(name, sorted(np.flatnonzero(mask), key=lambda i: -sure[i])[:count])
            for name, mask in (("right", chosen == labels), ("wrong", chosen != labels))]
    fig, axes = figure_of((2.1 * count, 13), 6, count)
    for ax in axes.flat:
        ax.set_axis_off()
    for block, (name, picked) in enumerate(rows):
        for j, i in enumerate(picked):
            v = load_volume(cases[i]).float().numpy()
            for plane, axis in enumerate((2, 1, 0)):
                ax = axes[3 * block + plane, j]
                ax.imshow(np.take(v, v.shape[axis] // 2, axis).T, cmap="gray", origin="lower", vmin=0, vmax=1)
                if not plane:
                    ax.set_title(f"is {classes[labels[i]]}\nscored {classes[chosen[i]]} {sure[i]:.2f}", fontsize=9,
                                 color="tab:green" if name == "right" else "tab:red")
        if not picked:
            axes[3 * block, 0].text(0, 0.5, f"no {name} decision", fontsize=10)
    fig.tight_layout()
    save_figure(fig, path)


# ---------------------------------------------------------------- training step


def class_weights(cases, K, args):
    """Weight of each class in the loss [K]: N / (K · its cases), or 1."""
    counts = np.bincount([c["label"] for c in cases], minlength=K)
    return torch.tensor(counts.sum() / (K * counts) if args.class_weights else np.ones(K), dtype=torch.float32)


def train_step(net, batches, stream, step, optimiser, lr, weights, args, where):
    """One optimiser step: this rank's part of the weighted mean cross-entropy of the global batch, and the gradient norm."""
    labels = [stream.case(n)["label"] for n in range(step * args.batch, (step + 1) * args.batch)]
    whole = weights[labels].sum().item()
    passes, total = args.batch // (args.micro * where.world), torch.zeros((), device=where.device)
    for a in range(passes):
        b = {k: v.to(where.device, non_blocking=True) for k, v in next(batches).items()}
        if where.world > 1:
            net.require_backward_grad_sync = a == passes - 1
        with where.autocast():
            logits = net(augment(b["volume"].float(), b["flips"]))
        loss = F.cross_entropy(logits.float(), b["label"], weight=weights.to(where.device), reduction="sum") / whole
        (loss * where.world).backward()  # the ranks' gradients are averaged
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_([w for w in net.parameters() if w.grad is not None], args.clip or float("inf"))
    for group in optimiser.param_groups:
        group["lr"] = group["scale"] * lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total, norm


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, cases, args, where):
    """Labels [N] and probabilities [N, K] of all cases, each rank a share of them, then reduced."""
    K = model.score.out_features
    probs = torch.zeros(len(cases), K, dtype=torch.float64, device=where.device)
    mine = list(range(where.rank, len(cases), where.world))
    passes = [mine[i:i + args.micro] for i in range(0, len(mine), args.micro)]
    for b in torch.utils.data.DataLoader(Shown(cases), batch_sampler=passes, num_workers=min(args.workers, len(passes))):
        with where.autocast():
            logits = model(b["volume"].to(where.device).float())
        probs[b["number"].to(where.device)] = logits.double().softmax(1)
    return np.array([c["label"] for c in cases]), where.sum(probs).cpu().numpy()


def loss_of(labels, probs, weights):
    w = weights.numpy()[labels]
    return float((-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)) * w).sum() / w.sum())


# ---------------------------------------------------------------- a run


def build_encoder(args, where):
    if args.init:
        encoder = load_pretrained(args.init, args.heads)
        same = [n for n, s in SIZES.items() if all(getattr(encoder.config, k) == v for k, v in s.items())]
        if args.size and args.size not in same:
            raise BadInput(f"--size {args.size}: {args.init} holds {same[0] if same else asdict(encoder.config)}; leave --size out")
        return encoder
    if args.size is None:
        args.size = "base" if where.device.type == "cuda" else "nano"
        if args.size == "nano":
            where.say("no CUDA device: --size nano on the CPU (--size base is the published model)")
    return Model(Config(**SIZES[args.size]))


def run(args, seed, out, cases, classes, skipped, stop, where):
    """Train with one seed, select by validation AUC, score the test set: its metrics, or None if it was asked to stop."""
    state = None
    if args.resume:
        if (out / "metrics.json").exists():
            where.say(f"{out}: has its metrics already")
            return read_json(out / "metrics.json", "the metrics of a run")
        if (out / "ckpt.pt").exists():
            state = load_checkpoint(out / "ckpt.pt", CLS_FORMAT)
        else:
            where.say(f"no checkpoint in {out}: starting at step 0")

    # model
    torch.manual_seed(seed)
    encoder = build_encoder(args, where)
    encoder.head.requires_grad_(False)  # predicts patches, is not used here
    if args.freeze:
        encoder.requires_grad_(False)
    K = len(classes)
    model = Classifier(encoder, K, args.pool)
    if state:
        fit(model, state["model"], out / "ckpt.pt")
    kernels, why = choose(args.kernels, where.device)
    encoder.use(kernels)
    where.say(f"--kernels {args.kernels}: {kernels} ({why})")
    model.to(where.device)
    net = model
    if where.world > 1:
        net = DistributedDataParallel(model, device_ids=[where.device.index] if where.device.type == "cuda" else None)

    # data
    parts = {s: [c for c in cases if c["split"] == s] for s in SPLITS}
    chosen = set(label_subset([c["patient"] for c in parts["train"]], args.labels, seed, [c["label"] for c in parts["train"]]))
    parts["train"] = [c for c in parts["train"] if c["patient"] in chosen]
    where.say(f"seed {seed}: " + ", ".join(f"{len(parts[s])} {s} ({' + '.join(map(str, np.bincount([c['label'] for c in parts[s]], minlength=K)))})"
                                           for s in SPLITS) + f" cases of {' + '.join(classes)}; {args.init or 'from scratch'}")
    weights = class_weights(parts["train"], K, args)
    stream = Stream(parts["train"], seed, args.flip)
    epoch_steps = -(-len(stream.cases) // args.batch)
    steps = max(1, round(args.epochs * len(stream.cases) / args.batch))

    # resume, optimiser
    optimiser = torch.optim.AdamW(layer_decay_groups(model, args.lr, args.wd, args.decay), betas=(0.9, args.beta2), fused=True)
    first, best, stale = 0, [-1.0, float("inf")], 0
    if state:
        optimiser.load_state_dict(state["optimiser"])
        first, best, stale = state["step"], state["best"], state["stale"]
    if where.main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", resume_step=first if state else None)
        write_json(out / "args.json", {**vars(args), "seeds": [seed]})
        if skipped:
            write_table(out / "skipped.csv", ["file", "split", "reason"], skipped)
    loader = torch.utils.data.DataLoader(stream, batch_sampler=micro_batches(first, args, where), num_workers=args.workers,
                                         pin_memory=where.device.type == "cuda")
    batches = iter(loader)

    def checkpoint(path, step, **more):
        save_checkpoint(path, format=CLS_FORMAT, config=asdict(encoder.config), model=model.state_dict(), pool=args.pool, classes=classes,
                        volume=list(args.volume), window=args.window, step=step, best=best, args=vars(args), **more)

    def validate(step):
        nonlocal best, stale
        labels, probs = evaluate(model, parts["val"], args, where)
        found = measure(labels, probs, thresholds_of(labels, probs))
        area, loss = found["auc"], loss_of(labels, probs, weights)
        key = [-1.0 if area is None else area, loss]
        better = key[0] > best[0] or key[0] == best[0] and key[1] < best[1]            # of equal AUCs the lower loss
        best, stale = (key, 0) if better else (best, stale + 1)
        where.say(f"epoch {step * args.batch / len(stream.cases):6.1f}: validation AUC {'undefined' if area is None else f'{area:.3f}'}, "
                  f"loss {loss:.3f}{', best so far' if better else ''}")
        if where.main:
            log.write(step=step, epoch=step * args.batch / len(stream.cases), val_loss=loss, val_auc=area, val_accuracy=found["accuracy"])
            if better:
                checkpoint(out / "best.pt", step, val_auc=area)

    # loop
    last = min(steps, first + args.stop_after) if args.stop_after else steps
    running, since = torch.zeros((), device=where.device), first
    bar = tqdm(total=steps, initial=first, disable=not where.main, mininterval=1, desc=f"seed {seed}", unit="step")
    clock, step, stopping, enough = time.perf_counter(), first, False, bool(args.patience and stale >= args.patience)
    while step < last and not enough:
        lr = cosine_lr(step, steps, args.lr, args.warmup) if args.schedule == "cosine" else poly_lr(step, steps, args.lr)
        loss, norm = train_step(net, batches, stream, step, optimiser, lr, weights, args, where)
        running += loss
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == last or where.world == 1 and stop.asked:
            mean, seconds = where.sum(running).item() / (step - since), time.perf_counter() - clock
            stopping = stop.agreed(where)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if where.main:
                log.write(step=step, epoch=step * args.batch / len(stream.cases), loss=mean, lr=lr, grad_norm=norm.item(),
                          samples_per_s=(step - since) * args.batch / seconds, seconds=seconds)
            running, since, clock = torch.zeros_like(running), step, time.perf_counter()
        pause = time.perf_counter()
        if step % (args.val_every * epoch_steps) == 0 or step == steps:
            validate(step)
            enough = bool(args.patience and stale >= args.patience)
        if where.main and (step % (args.save_every * epoch_steps) == 0 or step == last or stopping or enough):
            checkpoint(out / "ckpt.pt", step, optimiser=optimiser.state_dict(), stale=stale)
        clock += time.perf_counter() - pause
        if stopping:
            break
    bar.close()
    if step < steps and not enough:
        where.say(f"stopped at step {step} of {steps}, saved in {out / 'ckpt.pt'}: --resume goes on")
        return None
    return finish(model, parts, classes, seed, out, args, where)


def finish(model, parts, classes, seed, out, args, where):
    """The one look at the test set, with the selected weights: metrics, tables, pictures."""
    where.barrier()
    chosen = load_checkpoint(out / "best.pt", CLS_FORMAT)
    fit(model, chosen["model"], out / "best.pt")
    scored = {s: evaluate(model, parts[s], args, where) for s in ("val", "test")}
    thresholds = thresholds_of(*scored["val"])
    labels, probs = scored["test"]
    patients = np.array([c["patient"] for c in parts["test"]])
    found = with_intervals(labels, probs, patients, thresholds, args.bootstrap, seed)
    metrics = dict(task=args.task, seed=seed, init=args.init, step=chosen["step"], cases={s: len(parts[s]) for s in SPLITS},
                   classes=classes, selected_by="validation AUC", val_auc=chosen["val_auc"], thresholds=thresholds, test=found,
                   shortcut=shortcut(parts["train"], parts["test"], len(classes), args, seed))
    if len(classes) > 2:
        metrics["auc_each"] = {name: auc(labels == c, probs[:, c]) for c, name in enumerate(classes)}
    if not where.main:
        return metrics
    write_table(out / "scores.csv", ["file", "patient", "split", "label", *(f"p_{c}" for c in range(len(classes))), "predicted"],
                [[c["file"], c["patient"], s, y, *(f"{x:.8f}" for x in p), d] for s, (ys, ps) in scored.items()
                 for c, y, p, d in zip(parts[s], ys, ps, decide(ps))])
    draw_curves(out / "curves.png", read_log(out / "log.jsonl"))
    draw_roc(out / "roc.png", scored, thresholds, found, classes)
    draw_confusion(out / "confusion.png", labels, probs, thresholds, classes)
    draw_cases(out / "cases.png", parts["test"], probs, classes)
    report(metrics, len(set(patients)), where)
    write_json(out / "metrics.json", metrics)  # last: its presence says that the run is done
    where.say("wrote " + ", ".join(str(out / f) for f in ("best.pt", "metrics.json", "scores.csv", "roc.png", "confusion.png", "cases.png")))
    return metrics


def report(m, patients, where):
    val = "undefined" if m["val_auc"] is None else f"{m['val_auc']:.3f}"
    where.say(f"test, {m['cases']['test']} cases of {patients} patients, weights of step {m['step']} (validation AUC {val}), 95 % intervals")
    where.say(f"{'AUC':>18}  {text_of(m['test']['auc'])}")
    points = ("at 0.5", f"at {m['thresholds'][0]:.3f} (Youden's, of validation)") if len(m["classes"]) == 2 else ("likeliest", "Youden's of each class")
    where.say(f"{'':>18}  {points[0]:<22} {points[1]}")
    for k in ("accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"):
        where.say(f"{k.replace('_', ' '):>18}  {text_of(m['test'][k]):<22} {text_of(m['test']['youden_' + k])}")
    where.say(f"{'shortcut baseline':>18}  AUC {text_of(m['shortcut'])}: logistic regression on {m['shortcut']['features']} "
              "statistics of header and histogram, which see no anatomy")


def summary(runs, args, where):
    """Mean ± sample sd over the seeds, printed and written."""
    spread = {}
    for k in runs[0]["test"]:
        values = [m["test"][k]["value"] for m in runs]
        spread[k] = None if None in values else dict(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))
    where.say(f"{len(runs)} seeds ({' '.join(map(str, args.seeds))}), test, mean ± sd: " + ", ".join(
        f"{k.replace('_', ' ')} " + (f"{v['mean']:.3f} ± {v['sd']:.3f}" if v else "undefined")
        for k, v in spread.items() if not k.startswith("youden")))
    if where.main:
        write_json(Path(args.out) / "metrics.json", dict(task=args.task, seeds=args.seeds, test=spread, runs=runs))


# ---------------------------------------------------------------- main


def main():
    p = parser()
    args = p.parse_args()
    args.out = args.out or f"out/cls-{args.flavour + '-phantom' if args.task == 'phantom-cls' else args.task}"
    out = Path(args.out)
    if args.resume and (out / "args.json").exists():
        args = resumed_args(p, read_json(out / "args.json", "the arguments of a run"), FREE)
        args.out, args.resume = str(out), True

    # devices, data
    where = place(args.device, args.dtype, args.seeds[0])
    stop = StopRequest()
    settle(args, build_encoder(args, where).config, where)
    task = cls_task(args.task, args.flavour)
    args.data = cls_data(args.task, args.flavour, args.data, where)
    cases, classes = list_cases(task, args.data, args.lists, args.patient, where)
    cases, skipped = prepare_all(cases, args, where)

    # a run a seed
    folders = [out if len(args.seeds) == 1 else out / f"seed-{seed}" for seed in args.seeds]
    if where.main:
        for folder in folders if not args.resume else []:
            keep_earlier_run(folder, where.say)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "args.json", vars(args))
    runs = []
    for seed, folder in zip(args.seeds, folders):
        metrics = run(args, seed, folder, cases, classes, skipped, stop, where)
        if metrics is None:
            return
        runs.append(metrics)
    if len(runs) > 1:
        summary(runs, args, where)


if __name__ == "__main__":
    cli(main)
    leave()
