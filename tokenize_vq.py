"""The visual tokenizer: a codebook of 3D patches learned on a corpus (`pretrain.py --target vq`).

    python tokenize_vq.py                     # CPU demo: 512 codes of 8³ of made-up patients
    python tokenize_vq.py --data data/corpus --out out/vq          # one GPU: 8,192 codes of 16³
    torchrun --nproc_per_node=8 tokenize_vq.py --data data/corpus  # eight GPUs, the same batch
    python tokenize_vq.py --resume            # goes on where out/vq/ckpt.pt left off

A patch is encoded by itself, so that finding its code is cheap; the decoder sees the neighbouring
codes too. It begins from data: principal components, k-means on unit vectors, least squares. The
codes then follow moving averages, dead ones are revived, and encoder and decoder are trained. The
paper publishes no tokenizer: every default here is ours.

Leaves in --out: args.json, log.jsonl, ckpt.pt (resumable), best.pt (lowest validation error),
metrics.json, curves.png, samples.png (held-out volumes beside their reconstructions), codebook.png
(the most used codes).

Sections: arguments · training · data · network · evaluation · pictures

B batch, S sub-images, G patches of a sequence, P³ voxels of a patch, K codes of D coordinates.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from tqdm import trange

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
    read_log,
    restored,
    resumed,
    setup,
    split_batch,
    to_device,
    training_flags,
    write_json,
)
from kernels.plain import read
from model import checkpoint_state, config_of, fit, grid_of, patchify, to_unit, unpatchify
from serialize import KINDS, draw_strips, sequence_flags, train_and_val

# ---- arguments -------------------------------------------------------------------------------

RECIPES = {  # what a flag that was not given stands for, and what has no flag
    "full": {
        "patch": 16,
        "codes": 8192,
        "hidden": 512,
        "width": 256,
        "start_patches": 262_144,  # that the start is fitted to, and the rival
        "volume": 128,
        "stride": 8,
        "mix": "published",
        "steps": 20_000,
        "batch": 64,
        "lr": 1e-3,
        "warmup": 100,
        "val_samples": 64,
        "val_every": 1000,
    },
    "nano": {
        "patch": 8,
        "codes": 512,
        "hidden": 256,
        "width": 128,
        "start_patches": 131_072,
        "volume": 64,
        "stride": 16,
        "mix": "equal",
        "steps": 300,
        "batch": 8,
        "lr": 2e-3,
        "warmup": 20,
        "val_samples": 16,
        "val_every": 100,
    },
}
DECAY = 0.95  # of the codes' moving averages
REVIVE = 0.1  # a code used less than this share of the mean starts anew
COMMIT = 0.25  # weight of the commitment loss
ENCODER_LR = 0.02  # of the encoder, which begins as principal components: a share of --lr


def parser():
    p = new_parser(__doc__)
    add = p.add_argument_group("codes").add_argument
    add("--size", choices=[*RECIPES], help="of all defaults (full with CUDA, else nano)")
    add("--patch", type=int, help="edge in voxels, the model's (full 16; nano 8)")
    add("--codes", type=int, help="K, up to 65,536 (full 8192; nano 512)")
    sequence_flags(p)
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="(full 20000; nano 300)")
    add("--batch", type=int, help="sequences a step, all ranks (full 64; nano 8)")
    add("--lr", type=float, help="peak rate of the decoder (full 1e-3; nano 2e-3)")
    training_flags(p, "out/vq", "full 1000; nano 100", kernels=False)
    return p


def settle(args, machine):
    """Fill in what was not given, in place, and check it."""
    if args.size is None:
        args.size = "full" if machine.cuda else "nano"
        machine.say(f"--size {args.size}: full with CUDA, nano without")
    fill(args, {**RECIPES[args.size], "workers": 8 if machine.cuda else 0})
    check_least(args)
    args.micro = None
    split_batch(args, machine, args.batch)  # one pass a step
    grid_of([args.volume] * 3, args.patch)


# ---- training --------------------------------------------------------------------------------


def train_step(net, tokenizer, loader, optimiser, lr, step, args, machine):
    """A step of the optimiser on this rank's sequences, then one of the codes.

    Returns this rank's share of the mean squared error and of the commitment loss.
    """
    b = next(loader)
    with machine.autocast():
        error, commitment, z, index = net(b["volume"], b["ranges"])
    share = len(b["volume"]) / args.units
    ((error + COMMIT * commitment) * (share * machine.world)).backward()
    optimiser_step(optimiser, lr)
    rng = np.random.default_rng([args.seed, 5, step, machine.rank])
    # at most a quarter of the codes start anew, and as many from each rank
    G = len(z) // len(b["volume"])
    most = min(-(-args.codes // (4 * machine.world)), args.units // machine.world * G)
    decay = torch.where(optimiser.found_inf > 0, 1.0, DECAY)  # a step that is left out changes none
    tokenizer.quantiser.move(z.nan_to_num(), index, rng, machine, most, decay)
    return {"loss": error.detach() * share, "commitment": commitment.detach() * share}


def main():
    args, state = resumed(parser(), TOKENIZER)
    machine = setup(args)
    settle(args, machine)
    out = Path(args.out)

    # data, model, optimiser
    train, val = train_and_val(args, machine)
    numbers = range(machine.rank, args.val_samples * len(val.kinds), machine.world)
    held_out = list(in_batches(val, numbers, "validation set", machine))
    config = TokenizerConfig(args.patch, args.codes, hidden=args.hidden, width=args.width)
    tokenizer = Tokenizer(config).to(machine.device)
    optimiser = make_optimiser(tokenizer)

    # go on, or start from data
    log = open_run(out, args, machine, state)
    first, best, owes = restored(state, optimiser, math.inf, owes=True)
    if state:
        fit(tokenizer, state["model"], out / "ckpt.pt")
    else:
        if machine.main:
            tokenizer.start(first_patches(train, args, machine), args.seed, machine)
        for buffer in tokenizer.buffers():  # all ranks begin with rank 0's; DDP sees to the weights
            machine.sum(buffer if machine.main else buffer.zero_())
    net = distribute(tokenizer, args, machine)

    def save(name, **more):
        log.save(name, **checkpoint_state(tokenizer, TOKENIZER), args=vars(args), **more)

    def validate(step):
        nonlocal best
        scores = evaluate(tokenizer.rebuild, held_out, args, machine)
        machine.say(f"step {step}: {in_words(scores)}")
        log.write(step=step, **scores)
        if machine.main:
            by_kind = [k for k in scores if k.startswith("psnr")]
            used = [k for k in scores if k.startswith(("codes", "perplexity"))]
            panels = ("PSNR, dB", by_kind, {}), ("codes", used, {}), ("training", ["loss"], {})
            draw_curves(out / "curves.png", read_log(out / "log.jsonl"), *panels)
        if not scores["val_mse"] >= best:
            save("best.pt", step=step)
            best = scores["val_mse"]

    # loop
    if owes:
        validate(first)
    loop = Loop(args, machine, log, first, "tokenizer", samples_per_s=args.batch)
    loader = loop.batches(train)
    for step in loop:
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        losses = train_step(net, tokenizer, loader, optimiser, lr, step, args, machine)
        loop.took(losses, optimiser, lr=lr)
        if loop.validates:
            with loop.paused():
                validate(loop.step)
        if loop.saves:
            save("ckpt.pt", **loop.state(optimiser, best))
    if loop.finished:
        report(tokenizer, train, val, held_out, args, machine)


def make_optimiser(tokenizer):
    decoder = [w for k, w in tokenizer.named_parameters() if not k.startswith("encoder")]
    groups = [{"params": tokenizer.encoder.parameters(), "scale": ENCODER_LR}, {"params": decoder}]
    return torch.optim.AdamW(groups, weight_decay=1e-4, betas=(0.9, 0.95), fused=True)


# ---- data ------------------------------------------------------------------------------------


def in_batches(data, numbers, desc, machine):
    """Those sequences of `data` in batches, with a bar."""
    for i in trange(0, len(numbers), 4, desc=desc, leave=False, disable=not machine.main):
        yield default_collate([data[n] for n in numbers[i : i + 4]])


def first_patches(data, args, machine):
    """All patches of the first sequences, shuffled: `start_patches` or a few more, [n, P³]."""
    G = math.prod(grid_of([args.volume] * 3, args.patch))
    numbers = range(-(-args.start_patches // G))
    loader = in_batches(data, numbers, "patches to start from", machine)
    patches = torch.cat([read(b["volume"], b["ranges"], args.patch).flatten(0, 1) for b in loader])
    order = np.random.default_rng([args.seed, 4]).permutation(len(patches))
    return patches[order].to(machine.device)


# ---- network ---------------------------------------------------------------------------------

TOKENIZER = "ar3d-vq-2"  # the `format` of the checkpoints


@dataclass
class TokenizerConfig:
    """The paper publishes no tokenizer: the numbers are ours."""

    patch: int = 16
    codes: int = 8192  # K
    dim: int = 32  # D, of a code; a point on the unit sphere
    hidden: int = 512  # width of the encoder's MLP
    width: int = 256  # of the decoder
    layers: int = 2  # of the decoder; each sees one patch further

    @property
    def least(self):
        """Weights of the codebook and the blocks: see `model.config_of`."""
        return self.codes * self.dim + 8 * self.layers * self.width**2 + self.patch**3 * self.dim

    def __post_init__(self):
        if not 2 <= self.codes <= 65536 or self.dim > self.patch**3:
            raise BadInput(
                f"{self.codes} codes of {self.dim} coordinates, patches of {self.patch}³ voxels: "
                "2 to 65,536 codes are needed, and no fewer voxels than coordinates"
            )


def with_ones(z):
    """[n, D] -> [n, D + 1]: a last column of ones, so that sums of rows know how many they are."""
    return F.pad(z, (0, 1), value=1.0)


def even(patches):
    """Contrast compressed by its square root: faint textures get codes of their own.

    0.02 of the intensity range is taken for noise.
    """
    mean = patches.mean(-1, keepdim=True)
    gain = (25 * (patches.var(-1, unbiased=False, keepdim=True) + 4e-4)) ** -0.25
    return mean + (patches - mean) * gain


class Quantiser(nn.Module):
    """K unit vectors, nearest by cosine (ViT-VQGAN), moved by averages (van den Oord 2017).

    Buffers: codes [K, D]; averages [K, D + 1], the moving averages of the sum of the vectors that a
    code stands for and, last, of their number, on a scale where the mean code has 1.
    """

    def __init__(self, codes, dim):
        super().__init__()
        self.register_buffer("codes", F.normalize(torch.randn(codes, dim)))
        self.register_buffer("averages", with_ones(self.codes))

    def nearest(self, z):
        """Unit vectors [n, D] -> the numbers of their codes [n]."""
        chunk = 2**27 // len(self.codes)  # half a GiB of scores at a time
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([(part @ self.codes.T).argmax(1) for part in z.split(chunk)])

    def forward(self, z):
        """[n, D] -> their codes [n, D], the codes' numbers [n], the commitment loss.

        The gradient of the codes goes straight through to z (Bengio 2013).
        """
        index = self.nearest(z.detach())
        code = self.codes[index]
        return z + (code - z).detach(), index, (z - code).square().sum(1).mean()

    @torch.no_grad()
    def move(self, z, index, rng, machine, most, decay):
        """One step of the averages, from the vectors z [n, D] of all ranks and their codes [n].

        A code whose average use falls below REVIVE starts anew at a vector; each rank offers up to
        `most`, drawn by the root of their distance to their codes: what the codes hold already,
        such as bit-identical background, is drawn next to never. All ranks end with the same codes.
        """
        K, rows = len(self.codes), with_ones(z)
        weight = (1 - (z * self.codes[index]).sum(1) - 1e-5).clamp(min=1e-12).sqrt()
        waits = torch.from_numpy(rng.exponential(size=len(z))).to(z.dtype)
        waits = waits.pin_memory() if z.is_cuda else waits
        keys = weight / waits.to(z.device, non_blocking=True)
        drawn = rows[keys.topk(min(most, len(z))).indices]  # without repetition
        message = rows.new_zeros(K + len(drawn) * machine.world, rows.shape[1])
        message.index_add_(0, index, rows)
        message[K + machine.rank :: machine.world] = drawn  # the ranks take turns
        totals, fresh = machine.sum(message).split([K, len(message) - K])
        self.averages.lerp_(totals * (K / totals[:, -1].sum()), 1 - decay)
        dead = self.averages[:, -1] < REVIVE
        turn = dead.cumsum(0) - 1  # of the fresh ones: without nonzero, no wait for a GPU
        dead &= turn < len(fresh)
        fresh = fresh[turn.clamp(0, len(fresh) - 1)]
        self.averages.copy_(fresh.where(dead[:, None], self.averages))
        self.codes.copy_(F.normalize(self.averages[:, :-1]))

    def start(self, z, seed, machine):
        """k-means on unit vectors [n, D] in random order, n ≥ K, by rank 0 alone."""
        K, alone, rng = len(self.codes), replace(machine, world=1), np.random.default_rng([seed, 4])
        self.codes.copy_(z[:K])
        for i in range(16):
            most = K if i < 14 else 1
            self.move(z, self.nearest(z), rng, alone, most, decay=0.0)


class Mix(nn.Module):
    """A depth-wise 3³ convolution over the patches and an MLP of width 4C (Liu et al. 2022).

    [B, C, x, y, z] -> the same.
    """

    def __init__(self, width):
        super().__init__()
        self.spread = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        return x + self.mlp(self.spread(x).movedim(1, -1)).movedim(-1, 1)


class Tokenizer(nn.Module):
    """Patches -> codes, each by itself; codes -> voxels, each patch with its neighbours.

    So edges between patches vanish.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        n = c.patch**3
        linear = nn.Linear(n, c.dim)  # starts as the principal components (`start`)
        mlp = nn.Sequential(nn.Linear(n, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.dim))
        self.encoder = nn.ModuleList([linear, mlp])  # their sum
        self.quantiser = Quantiser(c.codes, c.dim)
        self.register_buffer("mean", torch.zeros(c.dim))  # of the codes' coordinates
        self.register_buffer("scale", torch.ones(()))  # one over their deviation
        self.enter = nn.Linear(c.dim, c.width)
        self.blocks = nn.Sequential(*[Mix(c.width) for _ in range(c.layers)])
        self.leave = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, n))
        self.direct = nn.Linear(c.dim, n)  # starts as the least-squares map from codes to voxels
        for layer in (mlp[-1], self.leave[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def latents(self, patches):
        """[…, P³] in [0, 1] -> unit vectors [n, D], in float32: codes do not depend on who asks."""
        with torch.autocast(patches.device.type, enabled=False):
            x = even(patches)
            return F.normalize(sum(layer(x) for layer in self.encoder).flatten(0, -2))

    def reconstruct(self, code, grid):
        """Codes as vectors [B, G, D] -> patches [B, G, P³], not clipped."""
        v = self.enter((code - self.mean) * self.scale).mT.unflatten(2, grid)  # [B, C, x, y, z]
        v = self.blocks(v).flatten(2).mT  # [B, G, C]
        return (self.direct(code) + self.leave(v)).float()

    def forward(self, volume, ranges):
        """Mean squared error, commitment loss, vectors [B·G, D] and their codes' numbers [B·G]."""
        patches = read(volume, ranges, self.config.patch)
        z = self.latents(patches)
        code, index, commitment = self.quantiser(z)
        grid = grid_of(volume.shape[1:], self.config.patch)
        rebuilt = self.reconstruct(code.view(*patches.shape[:2], -1), grid)
        return (rebuilt - patches).square().mean(), commitment, z.detach(), index

    @torch.no_grad()
    def encode(self, volume, ranges=None):
        """[B, X, Y, Z] in [0, 1], or of any type with `ranges` [B, S, 2] -> codes [B, G].

        Patches are numbered as `patchify` does.
        """
        patches = read(volume, ranges, self.config.patch)
        return self.quantiser.nearest(self.latents(patches)).view(patches.shape[:2])

    @torch.no_grad()
    def decode(self, codes, grid):
        """Codes [B, G] on a grid of (x, y, z) patches -> volume [B, X, Y, Z] in [0, 1]."""
        return unpatchify(self.reconstruct(self.quantiser.codes[codes], grid), grid).clamp(0, 1)

    def rebuild(self, volume):
        """Volume in [0, 1] -> its reconstruction [B, X, Y, Z] and its codes [B, G]."""
        codes = self.encode(volume)
        return self.decode(codes, grid_of(volume.shape[1:], self.config.patch)), codes

    @torch.no_grad()
    def start(self, patches, seed, machine):
        """Begin from data [n, P³]: principal components, k-means, least squares.

        One more coordinate, the same for all, turns distances into angles: the components are
        vectors of a mean square length 0.2 on the plane that touches the sphere.
        """
        x = even(patches)
        with torch.autocast(x.device.type, enabled=False):
            values, axes = torch.linalg.eigh(torch.cov(x.T))  # rising
        kept = self.config.dim - 1
        axes = axes[:, -kept:].flip(1).T * (0.2 / values[-kept:].sum()).sqrt()  # [D − 1, P³]
        linear = self.encoder[0]
        linear.weight[:-1], linear.bias[:-1] = axes, -axes @ x.mean(0)
        linear.weight[-1], linear.bias[-1] = 0, 1
        z = self.latents(patches)
        self.quantiser.start(z, seed, machine)
        code = self.quantiser.codes[self.quantiser.nearest(z)]  # [n, D]
        self.mean.copy_(code.mean(0))
        self.scale.copy_(1 / code.std(0).mean().clamp(min=1e-6))
        a = with_ones(code).double()
        inverse = torch.linalg.pinv(a.T @ a, hermitian=True)
        solution = (inverse @ (a.T @ patches.double())).T  # [P³, D + 1]
        self.direct.weight[:], self.direct.bias[:] = solution[:, :-1], solution[:, -1]


def load_tokenizer(source, patch=None):
    """The Tokenizer in a checkpoint (a path, or the loaded dict), on the CPU, its weights frozen.

    patch: BadInput if the tokenizer's is another.
    """
    state, name = source, "the tokenizer in the checkpoint"
    if not isinstance(source, dict):
        state, name = load_checkpoint(source, TOKENIZER), source
    config = config_of(TokenizerConfig, state, name)
    if patch not in (None, config.patch):
        raise BadInput(
            f"{name}: its codes are of patches of {config.patch}³ voxels and the model's are of "
            f"{patch}³; make one with tokenize_vq.py --patch {patch}, or choose another --patch"
        )
    return fit(Tokenizer(config), state["model"], name).requires_grad_(False).eval()


# ---- evaluation ------------------------------------------------------------------------------


def report(tokenizer, train, val, held_out, args, machine):
    """The tokenizer beside k-means with as many codes: scores, metrics.json, pictures."""
    patches = first_patches(train, args, machine)  # the same on every rank, and so is the rival
    rebuilds = {"codes": tokenizer.rebuild, "k-means": kmeans(patches, args, machine)}
    metrics = {"step": args.steps, "bits": math.log2(args.codes)}
    for name, rebuild in rebuilds.items():
        metrics[name] = evaluate(rebuild, held_out, args, machine)
        machine.say(f"{name}: {in_words(metrics[name])}")
    if machine.main:
        out = Path(args.out)
        write_json(out / "metrics.json", metrics)
        draw_samples(out / "samples.png", rebuilds, val, machine)
        draw_codebook(out / "codebook.png", tokenizer)
        machine.say(f"wrote ckpt.pt, best.pt, log.jsonl, metrics.json and pictures in {out}")


@torch.no_grad()
def kmeans(patches, args, machine):
    """Plain k-means (Lloyd) on voxels [n, P³] with as many codes: its `rebuild`.

    Empty clusters are given to the patches worst represented.
    """

    def nearest(x):
        return torch.cat([torch.cdist(part, centres).argmin(1) for part in x.split(8192)])

    def rebuild(volume):
        p = patchify(volume, args.patch)
        codes = nearest(p.flatten(0, 1)).view(p.shape[:2])
        return unpatchify(centres[codes], grid_of(volume.shape[1:], args.patch)), codes

    centres = patches[: args.codes]
    for _ in trange(20, desc="k-means", disable=not machine.main, leave=False):
        index = nearest(patches)
        error = (patches - centres[index]).square().sum(1)
        centres = patches[error.topk(args.codes).indices]  # stay where there is nothing to average
        rows = index[:, None].expand_as(patches)
        centres.scatter_reduce_(0, rows, patches, "mean", include_self=False)
    machine.sum(centres if machine.main else centres.zero_())  # GPUs' sums differ: rank 0's
    return rebuild


@torch.no_grad()
def evaluate(rebuild, held_out, args, machine):
    """Scores of rebuild(volume) -> volume, codes on held-out patients, over all ranks.

    PSNR is of the mean squared error over all voxels of a kind, peak 1. `varied` leaves out patches
    of one value, such as the background of a skull-stripped brain, which are all one code whatever
    the codebook.
    """
    sums = torch.zeros(len(KINDS), 3, device=machine.device)  # squared error, SSIM, volumes
    counts = torch.zeros(2 * args.codes, dtype=torch.long, device=machine.device)
    for batch in held_out:
        b = to_device(batch, machine.device)
        volume = to_unit(b["volume"], b["ranges"])
        with machine.autocast():
            rebuilt, codes = rebuild(volume)
        error = (rebuilt - volume).square().mean((1, 2, 3))
        alike = ssim(volume, rebuilt, b["ranges"].shape[1])
        sums.index_add_(0, b["kind"], torch.stack([error, alike, torch.ones_like(error)], 1))
        patches = patchify(volume, args.patch)
        varied = patches.amax(-1) > patches.amin(-1)  # [B, G]
        counts += torch.bincount((2 * codes + varied).flatten(), minlength=len(counts))
    sums, counts = machine.sum(sums), machine.sum(counts).view(-1, 2)  # of one value, and varied
    used = counts.sum(1)
    mse, _, count = sums.sum(0).tolist()
    scores = {"val_mse": mse / count, "codes_used": used.count_nonzero().item()}
    for name, n in (("perplexity", used), ("perplexity_varied", counts[:, 1])):
        scores[name] = torch.special.entr(n / n.sum()).sum().exp().item()
    for kind, (mse, alike, count) in zip(KINDS, sums.tolist()):
        if count:
            psnr = -10 * math.log10(max(1e-12, mse / count))
            scores |= {f"psnr_{kind}": psnr, f"ssim_{kind}": alike / count}
    return scores


def in_words(scores):
    return ", ".join(f"{k} {v:.4g}" for k, v in scores.items())


def ssim(a, b, images):
    """Structural similarity (Wang et al. 2004) in 3D of [B, X, Y, Z] in [0, 1]: its mean, [B].

    Uniform windows of 7³, unbiased variances, K1 0.01 and K2 0.03, as in scikit-image; each
    sub-image (no deeper than wide) by itself. Written with sum and difference: 2ab = (s² − d²) / 2.
    """
    s, d = a + b, a - b
    maps = torch.stack([s, d, s * s, d * d]).unflatten(4, (images, -1))  # [4, B, X, Y, S, Z/S]
    n = min(7, maps.shape[5])
    for axis in (2, 3, 5):
        maps = maps.unfold(axis, n, 1).mean(-1)
    squares = maps[:2].square()
    (s, d), (vs, vd) = squares, (maps[2:] - squares) * n**3 / max(1, n**3 - 1)
    c1, c2 = 2e-4, 1.8e-3  # twice the squares of K1 and K2
    alike = (s - d + c1) * (vs - vd + c2) / ((s + d + c1) * (vs + vd + c2))
    return alike.flatten(1).mean(1)


# ---- pictures --------------------------------------------------------------------------------


@torch.no_grad()
def draw_samples(path, rebuilds, data, machine):
    """A held-out sequence of each kind: target and rebuilds."""
    views = {}
    for n, kind in enumerate(data.kinds):
        sample = data[n]
        volume = to_unit(sample["volume"][None], sample["ranges"][None]).to(machine.device)
        views[kind] = {"target": volume[0]}
        views[kind] |= {name: rebuild(volume)[0][0] for name, rebuild in rebuilds.items()}
    draw_strips(path, views, data.depth)


def draw_codebook(path, tokenizer):
    """The 96 most used codes, each decoded among 26 of its own kind: the middle slices."""
    P, uses = tokenizer.config.patch, tokenizer.quantiser.averages[:, -1]
    most = uses.argsort(descending=True).repeat(96)[:96]  # of fewer, some again
    volumes = tokenizer.decode(most[:, None].expand(-1, 27), (3, 3, 3))  # [96, 3P, 3P, 3P]
    tiles = F.pad(volumes[:, P:-P, P:-P, 3 * P // 2], (1, 1, 1, 1), value=1.0)
    rows = enumerate(tiles.permute(1, 2, 0).split(24, 2))  # [P + 2, P + 2, 24] each
    draw_strips(path, {f"from {24 * i}": {"the most used codes": row} for i, row in rows}, 1)


if __name__ == "__main__":
    cli(main)
