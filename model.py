"""The transformer that predicts the next patch of a 3D scan, its encoder, and loading of weights.

    from model import load_pretrained
    m = load_pretrained("out/pretrain/ckpt.pt")   # ours, or the file that the authors published
    loss, pred = m(volume, prefix)                # volume [B, X, Y, Z] in [0, 1], prefix [B] int
    last, hidden = m.encode(volume)               # last [B, G, C], hidden: a list of [B, G, C]

Sections: configuration · positions · the transformer · fine-tuning · weights ·
measuring

B batch, X Y Z voxels, P patch edge, G patches of a volume, N tokens, C width, H heads, D width of a
head, L layers, K codes, S sub-images of a sequence, laid side by side along z.
"""

import math
import re
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import BadInput, load_checkpoint
from kernels import choose, plain
from kernels.plain import (  # noqa: F401  (what a patch is: the kernels need it too)
    grid_of,
    patchify,
    standardise,
    targets,
    to_unit,
    unpatchify,
)

# ---- configuration ---------------------------------------------------------------------------

FORMAT = "ar3d-pretrain-2"  # the `format` of the checkpoints that hold this model


@dataclass
class Config:
    """All that the shapes of the weights, and the order of the sequence, depend on."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 16
    images: int = 4  # S
    order: str = "raster"  # raster: over the joined volume, z fastest; image: sub-images in turn
    target: str = "pixel"  # pixel: standardised patches; vq: the numbers of their codes
    codes: int = 0  # K, of the tokenizer, where codes are predicted

    def __post_init__(self):
        if self.width % self.heads or self.width < 6:
            raise BadInput(f"width {self.width}: a multiple of heads {self.heads}, 6 or more")
        if not 2 <= self.patch <= 32:
            raise BadInput(f"patch {self.patch}: 2 to 32 voxels")
        if self.order not in ("raster", "image"):
            raise BadInput(f"order {self.order!r}: raster or image")
        if self.target not in ("pixel", "vq"):
            raise BadInput(f"target {self.target!r}: pixel or vq")
        if self.target == "vq" and self.codes < 2:
            raise BadInput(f"target vq needs the number of codes, not {self.codes}")

    @property
    def least(self):
        """Weights of the blocks and the embedding: a file of fewer is not of this configuration."""
        return 12 * self.layers * self.width**2 + self.patch**3 * self.width

    @property
    def outputs(self):
        return self.codes if self.target == "vq" else self.patch**3


SIZES = {  # --size: one that a laptop trains in minutes, ViT-S, ViT-B (published), ViT-L and -H
    "nano": {"width": 192, "layers": 6, "heads": 3, "patch": 8},
    "small": {"width": 384, "layers": 12, "heads": 6, "patch": 16},
    "base": {"width": 768, "layers": 12, "heads": 12, "patch": 16},
    "large": {"width": 1024, "layers": 24, "heads": 16, "patch": 16},
    "huge": {"width": 1280, "layers": 32, "heads": 20, "patch": 16},
}

# ---- positions -------------------------------------------------------------------------------

MOST = 256  # patches along an axis


def token_order(grid, images, order, device="cpu"):
    """Place i of the sequence holds patch token_order[i] (numbered as `patchify` does): [G].

    None: patch i itself (raster).
    """
    x, y, z = grid
    if order == "raster":
        return None
    if z % images:
        raise BadInput(f"--order image: {z} patches along z do not divide into {images} sub-images")
    raster = torch.arange(x * y * z, device=device).view(x, y, images, z // images)
    return raster.permute(2, 0, 1, 3).reshape(-1)


def waves(width):
    """Positions 0 … MOST − 1 along an axis: [sin(p·ω), cos(p·ω)], ω_i = 10000^(−i / (C/6))."""
    n = width // 6
    omega = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    angles = torch.arange(MOST, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()  # [MOST, C/3]


def positions(grid, width, axis=None):
    """Fixed 3D sine-cosine table [G, C]: a third of C for each of x, y, z (axis: `waves`).

    Where 6 does not divide C (ViT-L), the last C mod 6 columns are zero.
    """
    axis = waves(width) if axis is None else axis
    if max(grid) > len(axis):
        raise BadInput(f"{max(grid)} patches along an axis: {len(axis)} at most")
    x, y, z = grid
    parts = axis[:x, None, None], axis[None, :y, None], axis[None, None, :z]
    table = torch.cat([part.expand(x, y, z, -1) for part in parts], -1).reshape(x * y * z, -1)
    return F.pad(table, (0, width - table.shape[1]))


# ---- the transformer -------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm: attention (q, k, v without bias) and an MLP of width 4C with exact GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.ops = heads, plain
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, prefix=None, past=None):
        """[B, N, C] -> [B, N, C]; prefix [B]: see `plain.attend`, None: all see all.

        past: a list that holds this block's keys and values of earlier tokens [B, M, 2, H, D],
        which all of x see, and takes those of x (a key-value cache, to predict one by one).
        """
        B, N, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, C // self.heads)
        if past is None:
            seen = self.ops.attend(qkv, prefix)
        else:
            past[:] = [torch.cat([*past, qkv[:, :, 1:]], 1)]
            k, v = past[0].permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), k, v)
            seen = seen.transpose(1, 2)
        x = x + self.proj(seen.reshape(B, N, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Model(nn.Module):
    """Begin token and patches -> the next patch (`forward`), or a feature a patch (`encode`)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.begin = nn.Parameter(torch.empty(c.width))
        self.embed = nn.Linear(c.patch**3, c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.outputs)
        self.register_buffer("axis", waves(c.width), persistent=False)
        self.ops, self.recompute = plain, False  # True: blocks run again in the backward pass
        self.initialise()

    def use(self, kernels):
        """torch: the operations of kernels/plain.py; triton: fused.py's. Returns the model."""
        self.ops = plain
        if kernels == "triton":
            from kernels import fused

            self.ops = fused
        for block in self.blocks:
            block.ops = self.ops
        return self

    @torch.no_grad()
    def initialise(self):
        """As published: Xavier uniform, biases zero.

        # departs: below ViT-B it is Xavier normal, the head and the branches that add to the
        # residual stream are scaled by 1/√(2L), and the embedding starts nearly blind to a patch's
        # brightness, which drowns the texture that is to be predicted; at the contrast inside
        # patches (about 0.1) it is as large as the positions. So a nano model learns in minutes.
        """
        c = self.config
        nn.init.normal_(self.begin, std=0.02)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                branch = c.width < 768 and name.endswith(("proj", "fc2", "head"))
                init = nn.init.xavier_normal_ if c.width < 768 else nn.init.xavier_uniform_
                init(m.weight, gain=(2 * c.layers) ** -0.5 if branch else 1.0)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if c.width < 768:
            nn.init.normal_(self.embed.weight, std=10 * c.patch**-1.5)
            self.embed.weight -= 0.95 * self.embed.weight.mean(1, keepdim=True)

    def layout(self, volume):
        """Grid of a volume [B, X, Y, Z] and the order of its patches in the sequence."""
        grid = grid_of(volume.shape[1:], self.config.patch)
        return grid, token_order(grid, self.config.images, self.config.order, volume.device)

    def sequence(self, volume, ranges=None, ops=plain):
        """[B, X, Y, Z] (with ranges: any numbers) -> what `ops.read` gives (plain: the patches in
        order [B, G, P³]), grid, order.
        """
        grid, order = self.layout(volume)
        return ops.read(volume, ranges, self.config.patch, order), grid, order

    def tokens(self, source, grid, order=None, count=None, ops=plain):
        """The first `count` patches that `ops.read` gave -> [B, 1 + count, C], begin first."""
        table = positions(grid, self.config.width, self.axis)
        table = table if order is None else table[order]
        return ops.embed(source, self.embed.weight, self.embed.bias, table, count, self.begin)

    def forward(self, volume, prefix, ranges=None, per_patch=False, codes=None):
        """Predict each patch from those before it; the first `prefix` patches are seen by all.

        volume [B, X, Y, Z] float in [0, 1], or any numbers with intensity ranges [B, S, 2];
        prefix [B] integers in 0 … G−1. Returns the mean error of the patches prefix … G−1 of the
        batch (per_patch: that of each [B, G], 0 before the prefix) and the predictions, without
        gradients, in the order of the sequence. Target pixel: mean squared error of standardised
        patches, pred [B, G, P³]. Target vq: with codes [B, G] in that order, cross-entropy in nats,
        pred [B, G, K].
        The last patch predicts nothing, so G tokens (begin and G−1 patches) are all that is needed.
        """
        source, grid, order = self.sequence(volume, ranges, self.ops)
        G = math.prod(grid)
        x = self.tokens(source, grid, order, G - 1, self.ops)  # [B, G, C]
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, prefix + 1, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, prefix + 1)  # the begin token is visible too
        pred = self.head(self.norm(x))  # [B, G, P³] or [B, G, K]
        if self.config.target == "pixel":
            errors = self.ops.loss(pred, source, prefix)
        else:
            errors = F.cross_entropy(pred.mT.float(), codes, reduction="none")
            errors = errors * targets(prefix, G)
        pred = pred.detach()  # compiled, an output with a gradient would cost one of zeros
        if per_patch:
            return errors, pred
        return errors.sum() / (len(volume) * G - prefix.sum()), pred

    def encode(self, volume, ranges=None):
        """Features with all visible to all: last [B, G, C], hidden: blocks 0 … L−2, then last.

        Patches come in the order of `patchify` whatever order the model was trained in; the begin
        token is dropped.
        """
        grid = grid_of(volume.shape[1:], self.config.patch)
        x = self.tokens(self.ops.read(volume, ranges, self.config.patch, None), grid, ops=self.ops)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x[:, 1:])
        hidden[-1] = self.norm(x)[:, 1:]
        return hidden[-1], hidden

    @torch.no_grad()
    def complete(self, patches, prefix, grid, order=None):
        """Patches from `prefix` on, predicted one after the other and each fed back.

        patches [B, G, P³] in [0, 1], in the order of the sequence -> standardised predictions (0
        before the prefix). The target is a standardised patch, so the network says nothing of its
        brightness: to be fed back, a prediction gets the mean and the scale of the true patch.
        """
        _, mean, scale = standardise(patches)
        table = positions(grid, self.config.width, self.axis)
        table = table if order is None else table[order]
        caches, pred = [[] for _ in self.blocks], torch.zeros_like(patches)
        x = self.tokens(patches, grid, order, prefix)  # [B, 1 + prefix, C], all visible to all
        for i in range(prefix, patches.shape[1]):
            for block, past in zip(self.blocks, caches):
                x = block(x, past=past)
            pred[:, i] = self.head(self.norm(x[:, -1]))
            fed = (pred[:, i] * scale[:, i] + mean[:, i]).clamp(0, 1)
            x = (self.embed(fed) + table[i])[:, None]
        return pred

    def flops(self, shape, prefix=None):
        """Useful FLOP of a training step on a volume of `shape`: 2 a multiply-add, backward twice.

        Attention counts visible pairs only, for a prefix length (None: the mean over the draw).
        """
        c = self.config
        G = math.prod(grid_of(shape, c.patch))
        ahead = (G * G - 1) / 6 if prefix is None else prefix * (prefix + 1) / 2  # of the diagonal
        pairs = G * (G + 1) / 2 + ahead
        embed, head = 2 * c.patch**3 * c.width * G, 2 * c.outputs * c.width * G
        blocks = c.layers * (24 * c.width**2 * G + 4 * c.width * pairs)
        return 2 * embed + 3 * head + 3 * blocks  # the embedding has no gradient to its input


def choose_kernels(model, args, machine):
    """The model with the operations that --kernels asks for, and aloud why."""
    kernels, why = choose(args.kernels, machine.device)
    machine.say(f"--kernels {args.kernels}: {kernels} ({why})")
    return model.use(kernels)


# ---- fine-tuning -----------------------------------------------------------------------------


def untrained(init):
    """Whether --init is scratch or scratch:SIZE, not a file."""
    return init.partition(":")[0] == "scratch"


def new_encoder(init, size, machine):
    """The encoder that --init names: a file, or scratch[:SIZE] (by default `size`), untrained."""
    if not untrained(init):
        return load_pretrained(init)
    size = init.partition(":")[2] or size
    if size not in SIZES:
        raise BadInput(f"--init {init}: scratch, scratch:SIZE of {', '.join(SIZES)}, or a file")
    machine.say(f"--init {init}: an untrained encoder of size {size}")
    return Model(Config(**SIZES[size]))


def layer_decay_groups(net, wd, decay):
    """AdamW's groups for a net with an `encoder`: rates fall by `decay` a layer towards the input.

    (Clark et al. 2020.) Embedding and begin token are layer 0, block i is layer i + 1, all else is
    on top. A schedule sets group["lr"] = group["scale"] · lr. Frozen weights are left out.
    """
    top, layers = net.encoder.config.layers + 1, {}
    for name, w in net.named_parameters():
        match = re.match(r"encoder\.(embed|begin|blocks\.(\d+))", name)
        layer = int(match[2] or -1) + 1 if match else top
        if w.requires_grad:
            layers.setdefault(layer, []).append(w)
    return [
        {"params": weights, "scale": decay ** (top - layer), "weight_decay": wd}
        for layer, weights in sorted(layers.items())
    ]


# ---- weights ---------------------------------------------------------------------------------


def load_pretrained(path, heads=None):
    """The model in a checkpoint of pretrain.py or in the published file, on the CPU, float32.

    The published file does not say its number of heads: C / 64 unless given. Every key is accounted
    for: BadInput names what is missing, left over or of the wrong shape.
    """
    state = load_checkpoint(path)
    theirs = state.get("state_dict")
    if state.get("format") == FORMAT:
        config, weights = config_of(Config, state, path), state["model"]
        if heads not in (None, config.heads):
            raise BadInput(f"{path}: has {config.heads} heads, not {heads}; choose another --size")
    elif isinstance(theirs, dict) and "model.embed_tokens.weight" in theirs:
        config, weights = from_published(theirs, heads, path)
    else:
        raise BadInput(
            f"{path}: neither a checkpoint of pretrain.py (format {FORMAT}) nor the published "
            "weights (state_dict with model.embed_tokens.weight); its keys are "
            f"{', '.join(map(str, list(state)[:6]))}"
        )
    return fit(Model(config), weights, path)


def fit(net, weights, path):
    """load_state_dict, strict, with one line for what does not fit or is not finite: the net."""
    want = {k: kind_of(v) for k, v in net.state_dict().items()}
    have = {k: kind_of(v) for k, v in weights.items()}
    wrong = []
    for k in sorted(want.keys() | have.keys(), key=str):
        if want.get(k) != have.get(k):
            is_, should = (" ".join(map(str, of.get(k, ["missing"]))) for of in (have, want))
            wrong.append(f"{k} {is_.strip()} (needed {should.strip()})")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise BadInput(f"{path}: {len(wrong)} weights do not fit: {'; '.join(wrong[:4])}{more}")
    broken = [k for k, v in weights.items() if not v.isfinite().all()]
    if broken:
        raise BadInput(f"{path}: {len(broken)} weights are NaN or infinite, {broken[0]} first")
    net.load_state_dict(weights)
    return net


def kind_of(tensor):
    """What must agree for a weight to be loaded: its shape, and that it holds real numbers."""
    fine = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return tuple(tensor.shape), "" if fine else f"{tensor.dtype} {tensor.layout} {tensor.device}"


def config_of(cls, state, path):
    """cls(**state["config"]); BadInput where that is none, or too large for the weights beside."""
    try:
        config = cls(**state["config"])
        weights = sum(w.numel() for w in state["model"].values())
        wanted = config.least
        for k, v in vars(config).items():
            if not isinstance(v, str) and (not isinstance(v, int) or v < (k != "codes")):
                raise ValueError(f"{k} {v}")
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError) as e:
        raise BadInput(f"{path}: its configuration cannot be read ({e!r})") from None
    if not 0 < wanted <= weights:
        raise BadInput(f"{path}: its configuration wants more weights than the {weights:,} it has")
    return config


PUBLISHED_NAMES = (  # in a block: theirs, ours
    ("self_attn.o_proj", "proj"),
    ("mlp.linear1", "fc1"),
    ("mlp.linear2", "fc2"),
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
)


def from_published(theirs, heads, path):
    """The published state_dict -> Config and ours. What it lacks shows up when it is fitted."""
    theirs, ours = dict(theirs), {}
    try:
        C, _, *P = theirs["model.patchifier.proj.weight"].shape
        if len(set(P)) != 1:
            raise ValueError(f"patches of {P} voxels; only cubes are known here")
        # row 2 is an end token that no loss ever reached
        ours["begin"] = theirs.pop("model.embed_tokens.weight")[1]
        ours["embed.weight"] = theirs.pop("model.patchifier.proj.weight").reshape(C, -1)
        pairs = [("model.norm", "norm"), ("decoder_pred", "head")]
        layers = 1 + max(int(k.split(".")[2]) for k in theirs if k.startswith("model.layers."))
        for i in range(layers):
            old, new = f"model.layers.{i}.", f"blocks.{i}."
            qkv = [theirs.pop(f"{old}self_attn.{x}_proj.weight") for x in "qkv"]
            ours[new + "qkv.weight"] = torch.cat(qkv)
            pairs += [(old + a, new + b) for a, b in PUBLISHED_NAMES]
        for a, b in pairs:
            ours[f"{b}.weight"] = theirs.pop(f"{a}.weight")
            ours[f"{b}.bias"] = theirs.pop(f"{a}.bias")
        ours["embed.bias"] = theirs.pop("model.patchifier.proj.bias")
    except KeyError as e:
        raise BadInput(f"{path}: the published weights lack {e.args[0]}") from None
    except (ValueError, IndexError, RuntimeError) as e:
        raise BadInput(f"{path}: not as the published weights: {e}") from None
    if theirs:
        names = ", ".join(sorted(theirs)[:4])
        raise BadInput(f"{path}: {len(theirs)} weights that nothing here uses: {names}")
    return Config(width=C, layers=layers, heads=heads or max(1, C // 64), patch=P[0]), ours


def checkpoint_state(net, format=FORMAT):
    """What loading needs (`load_pretrained`, …), for `save_checkpoint`: format, config, model."""
    return {"format": format, "config": asdict(net.config), "model": net.state_dict()}


# ---- measuring -------------------------------------------------------------------------------


def weights_of(net):
    """How many weights it has."""
    return sum(w.numel() for w in net.parameters())


SHEETS = {  # FLOP/s, dense bf16; the first name that the GPU's own holds
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
USE = 0.4  # of that rate: what a step is hoped to reach; no GPU has been timed


def data_sheet(name):
    """FLOP/s in bf16 of the GPU called `name`, None where it is not known here."""
    return next((rate for gpu, rate in SHEETS.items() if gpu in name), None)


def timed(run, times, machine):
    """Seconds of run(0), run(1), … on the device."""
    wait = torch.cuda.synchronize if machine.cuda else int
    out = []
    for n in range(times):
        wait()
        start = time.perf_counter()
        run(n)
        wait()
        out.append(time.perf_counter() - start)
    return out


def random_scans(B, edge, device):
    """int16 [B, X, Y, Z] and the intensity ranges of four sub-images [B, 4, 2]."""
    volume = torch.randint(-1000, 1000, (B, edge, edge, edge), device=device, dtype=torch.int16)
    return volume, torch.tensor([-900.0, 900], device=device).repeat(B, 4, 1)


def matmul_rate(machine):
    """FLOP/s of one large square product in the machine's dtype: the best of ten."""
    n = 8192 if machine.cuda else 1024
    a, b = (torch.randn(n, n, device=machine.device).to(machine.dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda _: a @ b, 10, machine))


def peak_memory(device):
    """Peak bytes: of the CUDA allocator on a GPU, of the whole process (resident) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
