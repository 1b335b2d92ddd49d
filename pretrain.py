"""Pre-training: a transformer learns to predict the next patch of CT and MR sequences.

    python pretrain.py                                 # CPU demo on made-up patients: 2 minutes
    python pretrain.py --data data/corpus --size base  # one GPU, ViT-B, the published recipe
    torchrun --nproc_per_node=8 pretrain.py            # eight GPUs, the same run and batch
    python pretrain.py --resume                        # goes on with out/pretrain
    python pretrain.py --size base --bench             # one step timed: TFLOP/s, memory
    python pretrain.py --target vq                     # codes of tokenize_vq.py instead of voxels

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (lowest validation loss),
metrics.json, curves.png, samples.png. Every random choice is a function of (seed, step, sample), so
any number of workers or GPUs trains one model, and a run that was stopped goes on the same: on CPUs
bitwise, on GPUs but for the order of sums.

Sections: arguments · training · data · evaluation · pictures · bench and plan

B batch, S sub-images, G patches of a sequence, P³ voxels of a patch, K codes.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate

from common import (
    BadInput,
    Loop,
    check_least,
    cli,
    cosine_lr,
    distribute,
    draw_curves,
    fill,
    load_checkpoint,
    new_parser,
    open_run,
    optimiser_step,
    passes_of,
    read_log,
    restored,
    resumed,
    setup,
    split_batch,
    to_device,
    training_flags,
    write_json,
)
from kernels import hindrance
from model import (
    FORMAT,
    SHEETS,
    SIZES,
    USE,
    Config,
    Model,
    checkpoint_state,
    choose_kernels,
    data_sheet,
    fit,
    grid_of,
    load_pretrained,
    matmul_rate,
    peak_memory,
    random_scans,
    standardise,
    targets,
    timed,
    unpatchify,
    weights_of,
)
from serialize import KINDS, PUBLISHED, draw_strips, sequence_flags, train_and_val
from tokenize_vq import TOKENIZER, Tokenizer, TokenizerConfig, load_tokenizer

# ---- arguments -------------------------------------------------------------------------------

EPOCHS = 50  # published; in crops by the published counts, where --steps is not given
RECIPES = {  # what a flag that was not given stands for, and what has no flag
    "published": {  # AAAI 2025, ViT-B on 4 GPUs of 72 sequences each
        "volume": 128,
        "stride": 8,
        "mix": "published",
        "batch": 288,
        "optimiser": "adamw",
        "lr": 1e-4,
        "wd": 0.01,
        "beta2": 0.999,
        "warmup": 0,
        "clip": 0.0,
        "val_samples": 64,
        "val_every": 500,
    },
    "nano": {
        "volume": 64,
        "stride": 16,  # side by side
        "mix": "equal",
        "steps": 230,
        "batch": 8,
        "optimiser": "muon",
        "lr": 3e-3,
        "wd": 0.05,
        "beta2": 0.95,
        "warmup": 30,
        "clip": 1.0,
        "val_samples": 16,
        "val_every": 50,
    },
}


def parser():
    p = new_parser(__doc__)
    add = p.add_argument_group("model").add_argument
    add("--init", metavar="FILE", help="weights: a checkpoint, or the published file")
    add("--size", choices=[*SIZES], help="published: base (the default; nano without CUDA)")
    add("--patch", type=int, help="edge in voxels (default 16; nano 8); UNETR takes 2, 4, 8, 16")
    words = "published: pixel, standardised patches; vq: the codes of a tokenizer"
    add("--target", choices=["pixel", "vq"], default="pixel", help=words)
    words = "of tokenize_vq.py, for vq (default out/vq/ckpt.pt); kept in this run's checkpoints"
    add("--tokenizer", metavar="FILE", help=words)
    words = "published: prefix, a random start-up; causal: none"
    add("--attention", choices=["prefix", "causal"], default="prefix", help=words)
    words = "compute the blocks' activations again when they are needed: less memory, more time"
    add("--recompute", action="store_true", help=words)
    words = "of the patches; published: raster, over the joined volume"
    add("--order", choices=["raster", "image"], default="raster", help=words)
    sequence_flags(p)
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="(published: 50 epochs; nano 230)")
    add("--batch", type=int, help="sequences a step, all ranks (published 288; nano 8)")
    add("--micro", type=int, help="sequences a pass (default: up to 72 on CUDA, else 8)")
    words = "published: adamw; nano: muon for the blocks' matrices (left atria: half the steps)"
    add("--optimiser", choices=["adamw", "muon"], help=words)
    add("--lr", type=float, help="peak learning rate (published 1e-4; nano 3e-3)")
    add("--bench", action="store_true", help="time steps on random voxels and leave")
    add("--plan", metavar="8xH100", help="hours, memory and bytes of the run on them, and leave")
    add("--scans", type=int, help="of --plan: steps as of a corpus of so many CTs")
    training_flags(p, "out/pretrain", "500; nano 50", compiled=True)
    return p


def settle(args, machine):
    """Fill in what was not given, in place, and say what follows from the machine."""
    if args.size is None:
        args.size = "base" if machine.cuda else "nano"
        if args.size == "nano":
            machine.say(
                "no CUDA device: --size nano on the CPU (--size base is the published model)"
            )
    fill(args, RECIPES.get(args.size, RECIPES["published"]) | {"patch": SIZES[args.size]["patch"]})
    fill(args, {"compile": not hindrance(machine.device), "workers": 8 if machine.cuda else 0})
    check_least(args, scans=1)
    if args.scans and not args.plan:
        raise BadInput(f"--scans {args.scans}: of --plan")
    if args.tokenizer and args.target == "pixel":
        raise BadInput(f"--tokenizer {args.tokenizer}: only --target vq predicts codes")
    if not args.plan:  # which is of other machines
        split_batch(args, machine, 72 if machine.cuda else 8)


# ---- training --------------------------------------------------------------------------------


def make_optimiser(model, args, machine):
    """AdamW, or `MuonAndAdamW`."""
    rates = {"lr": args.lr, "betas": (0.9, args.beta2), "weight_decay": args.wd}
    if args.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **rates)
    matrices = dict.fromkeys(w for w in model.blocks.parameters() if w.ndim == 2)
    rest = [w for w in model.parameters() if w not in matrices]
    return MuonAndAdamW([*matrices], rest, machine.dtype, **rates)


class MuonAndAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for `matrices` [m, n], its products in `dtype`; AdamW for `rest`.

    Muon's steps are as long as AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate and
    decay for both. torch.optim.Muon multiplies in bf16 on any machine, and knows no `found_inf`.
    """

    def __init__(self, matrices, rest, dtype, **rates):
        super().__init__([{"params": matrices}, {"params": rest}], fused=True, **rates)
        self.dtype = dtype
        for w in matrices:  # AdamW looks for a step in all that it loads
            self.state[w] = {"step": torch.zeros(()), "momentum": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self):
        """Where `found_inf` (0-dim, float32) is not 0, nothing changes."""
        muon, taken = self.param_groups[0], self.found_inf == 0
        rate, share = muon["lr"] * taken, 0.05 * taken
        keep = 1 - muon["weight_decay"] * rate
        for w in muon["params"]:
            momentum, grad = self.state[w]["momentum"], w.grad.where(taken, 0)
            momentum.lerp_(grad, share)
            x = orthogonal(grad.lerp(momentum, 0.95), self.dtype)
            w.mul_(keep).addcmul_(x, rate, value=-0.2 * max(w.shape) ** 0.5)
            w.grad = None  # AdamW passes it over
        super().step()


def orthogonal(matrix, dtype):
    """[m, n] -> [m, n] of `dtype`: singular values brought near 1, by five Newton-Schulz steps
    (Jordan et al. 2024).
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T, dtype).T
    x = matrix.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x


def train_step(net, samples, encode, step, G, args, machine):
    """Forward and backward of this rank's passes: its part of the batch's mean loss.

    # departs: the published code averages the means of the GPUs; here each target of the global
    # batch weighs the same, so the gradient does not depend on how the batch is spread.
    """
    prefixes = draw_prefixes(step, G, args)  # [batch]
    count = args.units * G - int(prefixes.sum())
    passes, total = passes_of(args, machine), 0.0
    for places in passes:
        b, p = next(samples), prefixes[places]
        share = (p.size * G - int(p.sum())) / count
        prefix = torch.from_numpy(p).to(machine.device, non_blocking=True)
        if machine.world > 1:
            net.require_backward_grad_sync = places is passes[-1]
        codes = encode(b)
        with machine.autocast():
            loss = net(b["volume"], prefix, b["ranges"], codes=codes)[0]
        (loss * (share * machine.world)).backward()  # the ranks' gradients are averaged
        total += loss.detach() * share
    return total


def main():
    args, state = resumed(parser(), FORMAT)
    out = Path(args.out)

    # the machine, the model
    machine = setup(args)
    settle(args, machine)
    config = Config(**SIZES[args.size] | {"patch": args.patch}, order=args.order)
    tokenizer = find_tokenizer(args, config.patch, state, machine)
    if tokenizer is not None:
        config = replace(config, target="vq", codes=tokenizer.config.codes)
    G = math.prod(grid_of([args.volume] * 3, config.patch))
    torch.manual_seed(args.seed)
    if args.plan:
        with torch.device("meta"):
            model = Model(config)
        return plan(model, G, args, machine)
    model = build(config, args, state, tokenizer, machine)
    if machine.cuda:
        check_memory(model, G, args, torch.cuda.mem_get_info(machine.device)[1])
    net = distribute(model, args, machine)
    encode = partial(codes_of, model, tokenizer)
    optimiser = make_optimiser(model, args, machine)
    if args.bench:
        return bench(model, net, encode, optimiser, G, args, machine)

    # data
    train, val = train_and_val(args, machine)
    fill(args, {"steps": steps_of(train, args)})
    val_batches = validation_set(val, G, args, machine)
    rivals = find_rivals(model, tokenizer, encode, val_batches, G, machine)
    first, best, owes = restored(state, optimiser, math.inf, owes=True)
    log = open_run(out, args, machine, state)
    del state  # else the whole checkpoint is held to the end
    kept = {"args": vars(args)}
    if tokenizer is not None:
        kept["tokenizer"] = checkpoint_state(tokenizer, TOKENIZER)

    def save(name, **more):
        log.save(name, **checkpoint_state(model), **kept, **more)

    def validate(step):
        nonlocal best
        losses, scores = evaluate(model, val_batches, machine, encode)
        mean = sum(losses.values()) / len(losses)
        words = ", ".join(f"{k} {v:.3f}" for k, v in losses.items())
        machine.say(f"step {step:>6}: validation {words}")
        log.write(step=step, val_loss=mean, **{f"val_{k}": v for k, v in losses.items()}, **scores)
        if machine.main:
            draw_losses(out, rivals)
        if not mean >= best:
            save("best.pt", step=step, val_loss=mean)
            best = mean

    # the loop
    if owes:
        validate(first)
    flops = flops_of(model, args) * args.batch / machine.world
    speed = {"samples_per_s": args.batch}
    speed["of_matmul_rate"] = flops / matmul_rate(machine)  # measured just now
    bf16 = machine.cuda and machine.dtype == torch.bfloat16
    if sheet := data_sheet(torch.cuda.get_device_name() if bf16 else ""):
        speed["mfu"] = flops / sheet
    loop = Loop(args, machine, log, first, "pre-training", **speed)
    samples = loop.batches(train)
    for step in loop:
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        loss = train_step(net, samples, encode, step, G, args, machine)
        loop.update(optimiser, lr, loss, args.clip)
        if loop.validates:
            with loop.paused():
                validate(loop.step)
        if loop.saves:
            save("ckpt.pt", **loop.state(optimiser, best))
    if loop.finished and machine.main:
        draw_samples(out / "samples.png", model, val, tokenizer, machine)
        report(read_log(out / "log.jsonl"), rivals, out, machine)


def build(config, args, state, tokenizer, machine):
    """The model of a new run, of --init, or of the run that goes on, on its device."""
    model = Model(config)
    if state:
        fit(model, state["model"], f"{args.out}/ckpt.pt")
    elif args.init:
        model = start_from(args.init, model, tokenizer, machine)
    model = choose_kernels(model.to(machine.device), args, machine)
    model.recompute = args.recompute
    passes = len(passes_of(args, machine))
    machine.say(
        f"{args.size}: {weights_of(model) / 1e6:.1f} M parameters, "
        f"{str(machine.dtype)[6:]} on {machine.world} x {machine.device.type}; a step is "
        f"{args.batch} sequences: {machine.world} ranks x {passes} passes of up to {args.micro}"
    )
    return model


def start_from(path, fresh, tokenizer, machine):
    """The model in `path`, configured as `fresh`; for other targets it takes the head of that."""
    model, config = load_pretrained(path, fresh.config.heads), fresh.config
    for name in ("width", "layers", "heads", "patch"):
        have, want = getattr(model.config, name), getattr(config, name)
        if have != want:
            raise BadInput(
                f"--init {path}: its {name} is {have}, not {want}: choose another --size, --patch"
            )
    if config.target == "vq":
        codes = load_checkpoint(path).get("tokenizer", {}).get("model", {}).get("quantiser.codes")
        mine = tokenizer.quantiser.codes.cpu()
        same = codes is not None and codes.shape == mine.shape and torch.equal(codes, mine)
    else:
        same = model.config.target == "pixel"
    if not same:
        machine.say(f"--init {path}: predicted something else; the head starts anew")
        model.head = fresh.head
    model.config = config
    return model


# ---- data ------------------------------------------------------------------------------------


def steps_of(train, args):
    """Steps of the published number of epochs, of the published number of crops a scan."""
    crops = sum(PUBLISHED[k] * train.have[k] for k in train.kinds)
    return max(1, round(EPOCHS * crops / args.batch))


def find_tokenizer(args, patch, state, machine):
    """The tokenizer whose codes are predicted: the run's own, --tokenizer, or out/vq; or None."""
    if args.target == "pixel":
        return None
    if state:
        return load_tokenizer(state["tokenizer"], patch).to(machine.device)
    if args.tokenizer is None:
        if args.bench or args.plan:
            machine.say("no --tokenizer: a random one, the time is the same")
            config = TokenizerConfig(patch=patch, codes=8192 if patch == 16 else 512)
            return Tokenizer(config).requires_grad_(False).to(machine.device)
        args.tokenizer = "out/vq/ckpt.pt"
        if not Path(args.tokenizer).exists():
            raise BadInput(
                f"--target vq needs a tokenizer, and there is no {args.tokenizer}: make it with "
                f"python tokenize_vq.py --patch {patch}, or name one with --tokenizer"
            )
        machine.say(f"codes of {args.tokenizer} (--tokenizer FILE for others)")
    return load_tokenizer(args.tokenizer, patch).to(machine.device)


def codes_of(model, tokenizer, b):
    """The codes of a batch in the order of the sequence [B, G], or None without a tokenizer."""
    if tokenizer is None:
        return None
    codes, order = tokenizer.encode(b["volume"], b["ranges"]), model.layout(b["volume"])[1]
    return codes if order is None else codes[:, order]


def draw_prefixes(step, G, args):
    """Prefix lengths U{0, …, G−1} of a step's whole batch [B], the same on every rank."""
    if args.attention == "causal":
        return np.zeros(args.units, np.int64)
    return np.random.default_rng([args.seed, 2, step]).integers(G, size=args.units)


def validation_set(data, G, args, machine):
    """This rank's share of the sequences to validate with, in batches; each has its prefix."""
    mine = []
    for n in range(machine.rank, args.val_samples * len(data.kinds), machine.world):
        prefix = int(np.random.default_rng([args.seed, 3, n]).integers(G))
        mine.append({**data[n], "prefix": 0 if args.attention == "causal" else prefix})
    passes = max(1, -(-len(mine) // min(args.micro, 16)))
    size = max(1, -(-len(mine) // passes))  # as even as can be: one shape or two to compile for
    return [default_collate(mine[i : i + size]) for i in range(0, len(mine), size)]


# ---- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, val_batches, machine, encode=lambda b: None):
    """Mean loss of the targets {kind: loss}; of codes also {top1_kind, top5_kind: share}."""
    sums = torch.zeros(len(KINDS), 4, dtype=torch.float64, device=machine.device)
    for batch in val_batches:
        b = to_device(batch, machine.device)
        codes = encode(b)  # [B, G]
        with machine.autocast():
            errors, pred = model(b["volume"], b["prefix"], b["ranges"], per_patch=True, codes=codes)
        counted = targets(b["prefix"], errors.shape[1])  # [B, G]
        hits = errors.new_zeros(*errors.shape, 1)
        if codes is not None:
            best = pred.topk(min(5, pred.shape[-1]), -1).indices
            hits = (best == codes[..., None]) * counted[..., None]  # [B, G, 5]
        rows = [errors, hits[..., 0], hits.any(-1), counted]
        sums.index_add_(0, b["kind"], torch.stack([row.double().sum(1) for row in rows], 1))
    losses, scores = {}, {}
    for kind, (loss, top1, top5, count) in zip(KINDS, machine.sum(sums).tolist()):
        if count:
            losses[kind] = loss / count
            scores |= {f"top1_{kind}": top1 / count, f"top5_{kind}": top5 / count}
    return losses, scores if model.config.target == "vq" else {}


def find_rivals(model, tokenizer, encode, val_batches, G, machine):
    """What predictors without a network reach on the validation targets: {name: {kind: loss}}."""
    if tokenizer is not None:
        return {
            "unigram entropy": unigram_entropy(encode, tokenizer.config.codes, val_batches, machine)
        }
    rivals = {"patch mean": {}, "earlier patch": {}, "distance": {}}
    for kind, t in trivial_errors(model, val_batches, G, machine).items():
        rivals["patch mean"][kind] = float(np.average(t["mean"], weights=t["count"]))
        rivals["earlier patch"][kind] = float(np.average(t["copy"], weights=t["count"]))
        rivals["distance"][kind] = t["distance"]
    return rivals


@torch.no_grad()
def trivial_errors(model, val_batches, G, machine):
    """What two predictors that know nothing reach on the very same targets, by kind and position.

    {kind: {"mean" [G], "copy" [G], "count" [G], "distance"}}. mean: a patch's own mean, 0 once
    standardised. copy: the patch `distance` places earlier times a gain, both fitted to these
    targets by least squares, as generous as can be; where there is none, the mean.
    """
    sums = torch.zeros(len(KINDS), 2, G, G, dtype=torch.float64, device=machine.device)
    squares = torch.zeros(len(KINDS), 2, G, dtype=torch.float64, device=machine.device)
    place = torch.arange(G, device=machine.device)
    back = place[:, None] - place  # of target i at distance d: patch i − d
    there, back = (back >= 0).double(), back.clamp(min=0)
    for batch, i in ((b, i) for b in val_batches for i in range(len(b["kind"]))):
        # one at a time: of a batch, B·G² float64 may not fit
        b = to_device({k: v[i : i + 1] for k, v in batch.items()}, machine.device)
        t = standardise(model.sequence(b["volume"], b["ranges"])[0])[0]  # [1, G, P³]
        gram = (t @ t.mT).double() / t.shape[2]  # [1, G, G]
        square = gram.diagonal(dim1=1, dim2=2)  # [1, G]
        count = targets(b["prefix"], G).double()
        pairs = torch.stack([gram.gather(2, back.expand_as(gram)), square[:, back]], 1)
        sums.index_add_(0, b["kind"], pairs * (there * count[:, :, None])[:, None])
        squares.index_add_(0, b["kind"], torch.stack([square * count, count], 1))
    sums, squares = (machine.sum(t).cpu().numpy() for t in (sums, squares))
    out = {}
    for kind, (product, earlier), (square, count) in zip(KINDS, sums, squares):
        if not count.any():
            continue
        gain = np.maximum(product.sum(0), 0) / np.maximum(earlier.sum(0), 1e-12)  # [G]
        saved = gain * np.maximum(product.sum(0), 0)
        saved[0] = -1  # distance 0 is the patch itself
        d = int(saved.argmax())
        copied = square - 2 * gain[d] * product[:, d] + gain[d] ** 2 * earlier[:, d]
        errors = np.stack([square, copied]) / np.maximum(count, 1)
        out[kind] = {"mean": errors[0], "copy": errors[1], "count": count, "distance": d}
    return out


@torch.no_grad()
def unigram_entropy(encode, K, val_batches, machine):
    """Nats that the best predictor without context reaches on these very targets: {kind: entropy}.

    It knows how often each of the K codes occurs among them: no unigram predictor does better.
    """
    counts = torch.zeros(len(KINDS), K, dtype=torch.float64, device=machine.device)
    for batch in val_batches:
        b = to_device(batch, machine.device)
        codes = encode(b)  # [B, G]
        counted = targets(b["prefix"], codes.shape[1])
        number = (b["kind"][:, None] * K + codes)[counted]
        counts += torch.bincount(number, minlength=counts.numel()).view_as(counts)
    counts = machine.sum(counts).cpu()
    entropy = torch.special.entr(counts / counts.sum(1, keepdim=True).clamp(min=1)).sum(1)
    return {k: entropy[i].item() for i, k in enumerate(KINDS) if counts[i].any()}


def report(rows, rivals, out, machine):
    """The last validation beside its rivals: printed, and metrics.json."""
    last = [row for row in rows if "val_loss" in row][-1]
    losses = {k: last[f"val_{k}"] for k in KINDS if f"val_{k}" in last}
    rival = next(iter(rivals))
    heads = "".join(f"  {name:>15}" for name in rivals)
    machine.say(f"{'validation':>10}  {'loss':>6}{heads}  loss / {rival}")
    for k, loss in losses.items():
        cells = "".join(f"  {values[k]:15.4g}" for values in rivals.values())
        machine.say(f"{k:>10}  {loss:6.3f}{cells}  {loss / max(rivals[rival][k], 1e-12):.3f}")
    scores = {k: v for k, v in last.items() if k.startswith("top")}
    words = ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in scores.items())
    if words:
        machine.say(words)
    named = {name.replace(" ", "_"): values for name, values in rivals.items()}
    write_json(out / "metrics.json", {"step": last["step"], "val": losses, **scores, **named})
    machine.say(f"wrote {out}: ckpt.pt, best.pt, metrics.json, curves.png, samples.png")


# ---- pictures --------------------------------------------------------------------------------


def draw_losses(out, rivals):
    """curves.png: losses against the step, and what the rivals reach on the validation targets."""
    levels = {
        f"val_{k}": {n: values[k] for n, values in rivals.items() if n != "distance"}
        for k in rivals[next(iter(rivals))]
    }
    unit = "mean squared error of standardised patches"
    title = "cross-entropy, nats a code" if "unigram entropy" in rivals else unit
    rows = read_log(out / "log.jsonl")
    draw_curves(out / "curves.png", rows, (title, ["loss", *levels], levels))


@torch.no_grad()
def draw_samples(path, model, data, tokenizer, machine):
    """A sequence of each kind: truth, what the prefix shows, each next patch from the true ones.

    A predicted patch gets the true one's mean and scale; where codes are predicted, they are
    decoded.
    """
    names = ["truth: the middle slice of each sub-image", "what the prefix shows"]
    if tokenizer is not None:
        names.append("the truth's codes, decoded")
    names.append("each next patch, predicted from the true ones before it")
    views = {}
    for n, kind in enumerate(data.kinds):
        b = to_device(default_collate([data[n]]), machine.device)
        volumes = predicted_views(model, b, tokenizer, machine)
        views[kind] = {name: v[0] for name, v in zip(names, volumes)}
    draw_strips(path, views, data.depth)


def predicted_views(model, b, tokenizer, machine):
    """The volumes [1, X, Y, Z] of `draw_samples` for a batch of one sequence."""
    patches, grid, order = model.sequence(b["volume"], b["ranges"])
    G = patches.shape[1]
    number = torch.arange(G, device=machine.device)
    back = number if order is None else torch.argsort(order)  # to the numbering of patchify
    prefix = torch.tensor([G // 4], device=machine.device)
    shown = (number < prefix)[:, None]
    codes = codes_of(model, tokenizer, b)
    with machine.autocast():  # not the compiled one: a single picture
        _, pred = model.forward(b["volume"], prefix, b["ranges"], codes=codes)
    views = [patches, patches.where(shown, torch.nan)]
    if tokenizer is None:
        _, mean, scale = standardise(patches)
        views.append(patches.where(shown, pred.float() * scale + mean))
    views = [unpatchify(view[:, back], grid) for view in views]
    if tokenizer is not None:
        for numbers in (codes, codes.where(shown[:, 0], pred.argmax(-1))):
            views.append(tokenizer.decode(numbers[:, back], grid))
    return views


# ---- bench and plan --------------------------------------------------------------------------


def flops_of(model, args):
    """FLOP of a step on one sequence."""
    return model.flops([args.volume] * 3, 0 if args.attention == "causal" else None)


def memory_of(model, G, args, micro):
    """Bytes on a GPU: 16 a weight (it, its gradient, two moments), and a pass of `micro`.

    34 and 38 bytes a channel, token and block were counted in the code that Inductor generates for
    bf16 with the kernels (10.7 GiB of ViT-B, 31.8 of ViT-L, 72 sequences), 36 are taken; 4 are the
    residual stream, all that --recompute keeps of a block. Predictions (6 an output) and voxels (4)
    are estimates.
    """
    c = model.config
    blocks = 36 + 4 * c.layers if args.recompute else 36 * c.layers
    sequence = G * (blocks * c.width + 6 * c.outputs) + 4 * args.volume**3
    return 16 * weights_of(model) + micro * sequence


def check_memory(model, G, args, have):
    """BadInput, saying what would fit, where a pass cannot fit in `have` bytes."""
    fixed, need = (memory_of(model, G, args, micro) for micro in (0, args.micro))
    if need > have:
        fits = int(args.micro * (have - fixed) / (need - fixed))
        remedy = (
            f"--micro {fits}, or --recompute" if fits > 0 else "--recompute or a smaller --size"
        )
        raise BadInput(
            f"--micro {args.micro}: a pass takes about {need / 2**30:.0f} GiB, the GPU has "
            f"{have / 2**30:.0f}: {remedy}"
        )


def plan(model, G, args, machine):
    """Print what a run would take on --plan GPUs."""
    count, _, kind = args.plan.partition("x")
    if not count.isdecimal() or not int(count) or kind not in SHEETS:
        raise BadInput(f"--plan {args.plan}: a number and a kind, {', '.join(SHEETS)}: 8xH100")
    count, supply = int(count), None
    if args.scans:
        args.steps = round(EPOCHS * PUBLISHED["spatial"] * args.scans / args.batch)
    if args.steps is None or args.data:
        data, _ = train_and_val(args, machine)
        fill(args, {"steps": steps_of(data, args)})
        supply = 1 / float(np.median(timed(data.read, 16, machine)))
    args.micro = min(args.micro or 72, -(-args.batch // count))
    flops = args.batch * flops_of(model, args)
    weights = weights_of(model)
    seconds = flops / (USE * count * SHEETS[kind])
    sequences = args.batch / count / seconds
    reduced = 8 * weights * (count - 1) / count / seconds
    print(
        f"{args.size}: {weights / 1e6:.0f} M parameters, {args.steps:,} steps of {args.batch} "
        f"sequences of {G} tokens: {args.steps * args.batch * G:.3g} tokens, "
        f"{args.steps * flops:.3g} FLOP\n"
        f"compute     {args.steps * seconds / 3600:8.1f} hours at {USE:.0%} of {count} x "
        f"{SHEETS[kind] / 1e12:.0f} TFLOP/s (data sheet; the share is hoped for, not measured)\n"
        f"memory      {memory_of(model, G, args, args.micro) / 2**30:8.1f} GiB a GPU in passes of "
        f"{args.micro} (counted, not measured)\n"
        f"loader      {2 * args.volume**3 * sequences / 1e9:8.1f} GB/s and {sequences:.0f} "
        f"sequences/s a GPU at that pace"
        + (f"; a core here draws {supply:.0f}/s (measured)" if supply else "")
        + f"\nall-reduce  {reduced / 1e9:8.1f} GB/s a GPU, beside the backward pass (counted; data "
        "sheets: NVLink 300 and more, eight adapters of 400 Gbit/s a node 50)"
    )
    if supply:
        cores = sequences * count / supply
        print(f"so compute is the bound where {cores:.0f} cores or more draw sequences")


def bench(model, net, encode, optimiser, G, args, machine):
    """Steps of one pass a rank on random voxels: time, share of the matrix rate, peak memory."""
    args.units = args.micro * machine.world
    volume, ranges = random_scans(args.micro, args.volume, machine.device)
    batch = {"volume": volume, "ranges": ranges}
    rate = matmul_rate(machine)
    runs, skip = (205, 5) if machine.cuda else (5, 2)

    def step(n):
        train_step(net, iter([batch]), encode, n, G, args, machine)
        optimiser_step(optimiser, args.lr, args.clip)

    seconds = float(np.median(timed(step, runs, machine)[skip:]))
    achieved = flops_of(model, args) * args.micro / seconds
    rate = max(rate, matmul_rate(machine))
    threads = f"CPU, {torch.get_num_threads()} threads"
    machine.say(
        f"{torch.cuda.get_device_name() if machine.cuda else threads}, torch {torch.__version__}, "
        f"{str(machine.dtype)[6:]}, {args.size}, {args.micro} x {args.volume}³, {G} tokens\n"
        f"matrix rate        {rate / 1e12:8.3f} TFLOP/s (a large square product, best of many)\n"
        f"step               {1e3 * seconds:8.1f} ms (median of {runs - skip}): "
        f"{args.micro / seconds:.2f} sequences/s, {args.micro * G / seconds:,.0f} tokens/s\n"
        f"model FLOP         {achieved / 1e12:8.3f} TFLOP/s = {achieved / rate:.1%} of that rate\n"
        f"peak memory        {peak_memory(machine.device) / 2**30:8.2f} GiB"
    )
    if args.target == "vq":
        finding = float(np.median(timed(lambda n: encode(batch), 10, machine)[2:]))
        machine.say(
            f"finding codes      {1e3 * finding:8.1f} ms: {finding / seconds:.1%} of the step"
        )


if __name__ == "__main__":
    cli(main)
