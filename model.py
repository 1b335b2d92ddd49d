"""The transformer that predicts the next patch of a 3D scan, its encoder and classifier, and the loading of weights.

    from model import load_pretrained
    m = load_pretrained("out/pretrain/ckpt.pt")        # ours, or the file that the authors of the paper published
    loss, pred = m(volume, prefix)                     # volume [B, X, Y, Z] in [0, 1], prefix [B] integers
    last, hidden = m.encode(volume)                    # last [B, G, C], hidden: a list of [B, G, C]

Sections: configuration · patches and positions · attention · the transformer · classifier · segmentation ·
frozen features · visual tokenizer · weights

B batch, X Y Z voxels, P patch edge, G patches of a volume, N tokens, C width, H heads, D width of a head, L layers,
S sub-images of a sequence, laid side by side along z.
"""
import contextlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from common import BadInput, auc, load_checkpoint

# ---------------------------------------------------------------- configuration

FORMAT = "ar3d-pretrain-1"  # the `format` of the checkpoints that hold this model
CLS_FORMAT = "ar3d-classifier-1"  # the classifiers of finetune_cls.py


@dataclass
class Config:
    """Everything that the shapes of the weights, and the order of the sequence, depend on."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 16
    images: int = 4         # S; matters to the order "image" alone
    order: str = "raster"   # raster: x-major over the joined volume, z fastest; image: one sub-image after the other
    target: str = "pixel"   # pixel: standardised patches; vq: the numbers of their codes; both
    codes: int = 0          # K, of the tokenizer, where codes are predicted
    groups: int = 1         # g codes a patch

    def __post_init__(self):
        if self.width % self.heads or self.width < 6:
            raise BadInput(f"width {self.width} must be a multiple of heads {self.heads}, and 6 or more")
        if self.order not in ("raster", "image"):
            raise BadInput(f"order {self.order!r}: raster or image")
        if self.target not in ("pixel", "vq", "both"):
            raise BadInput(f"target {self.target!r}: pixel, vq or both")
        if self.target != "pixel" and self.codes < 2:
            raise BadInput(f"target {self.target!r} needs the number of codes, not {self.codes}")

    @property
    def outputs(self):
        """Of the head: P³ voxels, g·K scores of codes, or both, in this order."""
        return (self.target != "vq") * self.patch ** 3 + (self.target != "pixel") * self.groups * self.codes


SIZES = {  # --size: ViT-S, ViT-B (published) and ViT-L, and one that a laptop trains in minutes
    "nano": dict(width=192, layers=6, heads=3, patch=8),
    "small": dict(width=384, layers=12, heads=6, patch=16),
    "base": dict(width=768, layers=12, heads=12, patch=16),
    "large": dict(width=1024, layers=24, heads=16, patch=16),
}

# ---------------------------------------------------------------- patches and positions


def grid_of(shape, patch):
    """Patches along each axis of a volume of `shape` voxels; BadInput where the patch does not divide it."""
    if any(n % patch or n < patch for n in shape):
        raise BadInput(f"volume {'x'.join(map(str, shape))} is not a multiple of the patch {patch} along every axis")
    return tuple(n // patch for n in shape)


def patchify(volume, patch):
    """[B, X, Y, Z] -> [B, G, P³]: patches x-major, z fastest; the voxels inside each in the same order."""
    x, y, z = grid_of(volume.shape[1:], patch)
    v = volume.reshape(-1, x, patch, y, patch, z, patch)
    return v.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, x * y * z, patch ** 3)


def unpatchify(patches, grid):
    """[B, G, P³] -> [B, X, Y, Z], the inverse of `patchify` for a grid of (x, y, z) patches."""
    (x, y, z), p = grid, round(patches.shape[-1] ** (1 / 3))
    v = patches.reshape(-1, x, y, z, p, p, p)
    return v.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, x * p, y * p, z * p)


@lru_cache(maxsize=32)
def token_order(grid, images, order, device="cpu"):
    """Place i of the sequence holds patch token_order[i] (numbered as `patchify` does): LongTensor [G], or None if i itself."""
    x, y, z = grid
    if order == "raster":
        return None
    if z % images:
        raise BadInput(f"--order image: {z} patches along z do not divide into {images} sub-images")
    raster = torch.arange(x * y * z, device=device).view(x, y, images, z // images)
    return raster.permute(2, 0, 1, 3).reshape(-1)


@lru_cache(maxsize=32)
def positions(grid, width, device="cpu"):
    """Fixed 3D sine-cosine table [G, C]: a third of C an axis, [sin(p·ω), cos(p·ω)], ω_i = 10000^(−i / (C/6)).

    Where 6 does not divide C (ViT-L), the last C mod 6 columns are zero.
    """
    n = width // 6
    omega = 10000.0 ** (-torch.arange(n, dtype=torch.float64, device=device) / n)
    axes = [torch.arange(g, dtype=torch.float64, device=device)[:, None] * omega for g in grid]  # [g, C/6] an axis
    axes = [torch.cat([a.sin(), a.cos()], 1) for a in axes]                            # [g, C/3]
    x, y, z = grid
    table = torch.cat([axes[0][:, None, None].expand(x, y, z, -1), axes[1][None, :, None].expand(x, y, z, -1),
                       axes[2][None, None, :].expand(x, y, z, -1)], -1).reshape(x * y * z, -1)
    return F.pad(table, (0, width - 6 * n)).float()


def to_unit(volume, window):
    """Integers [B, X, Y, Z] and their window [B, S, 2] (low, high; one a sub-image along z) -> float32 in [0, 1], clipped."""
    B, X, Y, Z = volume.shape
    low, scale = unit_map(window)
    v = volume.reshape(B, X, Y, window.shape[1], -1).float()                           # [B, X, Y, S, Z/S]
    return ((v - low[:, None, None, :, None]) * scale[:, None, None, :, None]).clamp_(0, 1).view(B, X, Y, Z)


def unit_map(window):
    """Windows [B, S, 2] -> low and scale [B, S] float32: voxels become clamp((v − low) · scale, 0, 1). None -> None, None."""
    if window is None:
        return None, None
    low, high = window.float().unbind(-1)
    return low, 1 / (high - low).clamp(min=1e-6)


def standardise(patches):
    """Each patch by its own mean and unbiased variance (+1e-6, as published): [B, G, P³] -> targets, mean, scale."""
    mean = patches.mean(-1, keepdim=True)
    scale = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / scale, mean, scale


# ---------------------------------------------------------------- attention


def prefix_attention(qkv, prefix=None):
    """Softmax attention in which row i of sample b sees key j where j <= i or j < prefix[b].

    qkv [B, N, 3, H, D], prefix [B] integers (None: every row sees every key) -> [B, N, H, D].
    """
    B, N, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                               # each [B, H, N, D]
    seen = None
    if prefix is not None:
        i = torch.arange(N, device=qkv.device)
        seen = ((i <= i[:, None]) | (i < prefix[:, None, None]))[:, None]              # [B, 1, N, N]
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        # PyTorch's fused attention for CPUs takes twice the time of three products in bfloat16
        q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
        if seen is None:
            scores = D ** -0.5 * q @ k.mT
        else:
            bias = torch.zeros(seen.shape, dtype=qkv.dtype).masked_fill_(~seen, float("-inf"))
            scores = torch.baddbmm(bias.expand(B, H, N, N).reshape(B * H, N, N), q, k.mT, alpha=D ** -0.5)
        out = (scores.softmax(-1) @ v).view(B, H, N, D)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.transpose(1, 2)


# ---------------------------------------------------------------- the transformer


class Block(nn.Module):
    """Pre-norm: attention (q, k, v without bias) and an MLP of width 4C with exact GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.attend = heads, prefix_attention
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, prefix=None):
        B, N, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, C // self.heads)
        attend = prefix_attention if prefix is None else self.attend
        x = x + self.proj(attend(qkv, prefix).reshape(B, N, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Model(nn.Module):
    """Begin token and patches -> the next patch (`forward`), or a feature a patch (`encode`)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.begin = nn.Parameter(torch.empty(c.width))
        self.embed = nn.Linear(c.patch ** 3, c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.outputs)
        self.fused = None
        self.initialise()

    def use(self, kernels):
        """torch, or triton: tokens, masked attention and the loss of voxels by the kernels of `kernels/`. The model itself."""
        self.fused, attend = None, prefix_attention
        if kernels == "triton":
            from kernels import patch_embed
            from kernels.prefix_attention import prefix_attention as attend
            self.fused = patch_embed
        for block in self.blocks:
            block.attend = attend
        return self

    @torch.no_grad()
    def initialise(self):
        """Xavier, the branches that add to the residual stream scaled by 1/√(2L); biases zero."""
        c = self.config
        nn.init.normal_(self.begin, std=0.02)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight, gain=(2 * c.layers) ** -0.5 if name.endswith(("proj", "fc2", "head")) else 1)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        # departs: the embedding starts nearly blind to a patch's brightness and, at the contrast that patches have inside
        # (about 0.1 of the window), as large as the positions; brightness drowns the texture that is to be predicted
        nn.init.normal_(self.embed.weight, std=10 * c.patch ** -1.5)
        self.embed.weight -= 0.95 * self.embed.weight.mean(1, keepdim=True)

    def tokens(self, patches, grid, order=None):
        """The first n patches of the sequence [B, n, P³] -> [B, 1 + n, C]: begin, then patches at their positions."""
        table = positions(grid, self.config.width, patches.device)
        table = table if order is None else table[order]
        x = self.embed(patches) + table[:patches.shape[1]].to(patches.dtype)
        begin = self.begin.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([begin, x], 1)

    def fused_tokens(self, volume, low, scale, grid, order, count):
        """The same from the volume as it is (low, scale: see `unit_map`), whose patches are never written down: [B, 1 + count, C]."""
        table = positions(grid, self.config.width, volume.device)
        return self.fused.patch_embed(volume, low, scale, self.embed.weight, self.embed.bias, table if order is None else table[order],
                                      order, count, self.begin)

    def sequence(self, volume, window=None):
        """Volume [B, X, Y, Z] (with `window` [B, S, 2]: integers) -> patches in order [B, G, P³], grid, order."""
        if window is not None:
            volume = to_unit(volume, window)
        grid = grid_of(volume.shape[1:], self.config.patch)
        order = token_order(grid, self.config.images, self.config.order, volume.device)
        patches = patchify(volume, self.config.patch)
        return patches if order is None else patches[:, order], grid, order

    def forward(self, volume, prefix, window=None, per_patch=False, codes=None):
        """Predict each patch from those before it, and from the begin token and the first `prefix` patches for all.

        volume [B, X, Y, Z] float in [0, 1], or integers with window [B, S, 2]; prefix [B] integers in 0 … G−1.
        Returns the mean squared error over the patches prefix … G−1 of the batch and pred [B, G, P³], standardised
        patches in the order of the sequence; with per_patch, [B, G] errors (0 before the prefix) instead of their mean.
        The last patch predicts nothing, so G tokens (begin and G−1 patches) are all that is computed.
        Target vq needs `codes` [B, G, g] (Tokenizer.encode) and returns cross-entropy, in nats a code, and scores
        [B, G, g, K]; target both the two losses [2] (pixels, codes; [2, B, G] with per_patch) and the pair of predictions.
        """
        c = self.config
        if c.target != "pixel" and codes is None:
            raise ValueError(f"a model of target {c.target!r} needs codes=: those of Tokenizer.encode for the same volume")
        if self.fused:
            grid = grid_of(volume.shape[1:], c.patch)
            order = token_order(grid, c.images, c.order, volume.device)
            low, scale = unit_map(window)
            x = self.fused_tokens(volume, low, scale, grid, order, grid[0] * grid[1] * grid[2] - 1)
        else:
            patches, grid, order = self.sequence(volume, window)
            x = self.tokens(patches[:, :-1], grid, order)                              # [B, G, C]
        for block in self.blocks:
            x = block(x, prefix + 1)                                                   # the begin token is visible too
        out = self.head(self.norm(x))                                                  # [B, G, P³], [B, G, g·K] or both side by side
        errors, preds = [], []
        if c.target != "vq":
            pixels = out[..., :c.patch ** 3]
            if self.fused:
                errors.append(self.fused.patch_loss(pixels, volume, low, scale, order, prefix))
            else:
                errors.append((pixels.float() - standardise(patches)[0]).square().mean(-1))  # [B, G]
            preds.append(pixels)
        if c.target != "pixel":
            codes = codes if order is None else codes[:, order]
            scores = out[..., -c.groups * c.codes:].unflatten(-1, (c.groups, c.codes))  # [B, G, g, K]
            errors.append(F.cross_entropy(scores.flatten(0, 2).float(), codes.flatten(), reduction="none").view_as(codes).mean(-1))
            preds.append(scores)
        both = c.target == "both"
        counted = torch.arange(out.shape[1], device=out.device) >= prefix[:, None]
        errors = (torch.stack(errors) if both else errors[0]) * counted                # [B, G], or [2, B, G]
        return (errors if per_patch else errors.sum((-2, -1)) / counted.sum()), tuple(preds) if both else preds[0]

    def encode(self, volume, window=None):
        """Features with everything visible: last [B, G, C], and hidden, a list of L of them: blocks 0 … L−2, then last.

        Patches come in the order of `patchify` whatever order the model was pre-trained in; the begin token is dropped.
        """
        grid = grid_of(volume.shape[1:], self.config.patch)
        if self.fused:
            x = self.fused_tokens(volume, *unit_map(window), grid, None, None)
        else:
            x = self.tokens(patchify(volume if window is None else to_unit(volume, window), self.config.patch), grid)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x[:, 1:])
        hidden[-1] = self.norm(x)[:, 1:]
        return hidden[-1], hidden

    def flops(self, shape, prefix=None):
        """Useful FLOP of one training step on one volume of `shape`: 2 a multiply-add, backward twice the forward.

        Attention counts the visible pairs only, for prefix length `prefix` (None: the mean over the uniform draw).
        """
        c, G = self.config, 1
        for n in grid_of(shape, c.patch):
            G *= n
        p = torch.arange(1, G + 1, dtype=torch.float64) if prefix is None else torch.tensor([prefix + 1.0])
        pairs = (G * (G + 1) / 2 + p * (p - 1) / 2).mean().item()
        embed, head = 2 * c.patch ** 3 * c.width * G, 2 * c.outputs * c.width * G
        blocks = c.layers * (24 * c.width ** 2 * G + 4 * c.width * pairs)
        return 2 * embed + 3 * head + 3 * blocks  # the embedding has no gradient to its input


# ---------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """Encoder, pooling, linear layer without bias: [B, X, Y, Z] -> logits [B, K].

    pool: mean over the patch tokens (published), or attention: their mean weighted by a softmax of learned scores, which
    starts as the plain mean.
    """

    def __init__(self, encoder, classes, pool="mean"):
        super().__init__()
        self.encoder = encoder
        self.score = nn.Linear(encoder.config.width, classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.attend = nn.Linear(encoder.config.width, 1, bias=False) if pool == "attention" else None
        if self.attend is not None:
            nn.init.zeros_(self.attend.weight)

    def forward(self, volume):
        return self.score(self.pool(self.encoder.encode(volume)[0]))

    def pool(self, last):
        """Tokens [B, G, C] -> [B, C]."""
        if self.attend is None:
            return last.mean(1)
        return (self.attend(last).softmax(1) * last).sum(1)


def layer_decay_groups(model, lr, wd, decay=1.0):
    """AdamW's groups for a network with an `encoder`, rates falling by `decay` a layer towards the input (Clark et al. 2020).

    Embedding and begin token are layer 0, block i is layer i + 1, all else (final norm, head, decoder) is on top at `lr`.
    A schedule sets group["lr"] = group["scale"] * lr. Frozen weights are left out; weight decay is for all, as published.
    """
    top, layers = model.encoder.config.layers + 1, {}
    for name, w in model.named_parameters():
        if w.requires_grad:
            part = name.split(".")
            block = part[:2] == ["encoder", "blocks"]
            at = int(part[2]) + 1 if block else 0 if part[0] == "encoder" and part[1] in ("embed", "begin") else top
            layers.setdefault(at, []).append(w)
    return [dict(params=ws, scale=decay ** (top - at), lr=lr * decay ** (top - at), weight_decay=wd)
            for at, ws in sorted(layers.items())]


# ---------------------------------------------------------------- segmentation

SEGMENTER = "ar3d-seg-1"  # the `format` of the checkpoints of finetune_seg.py


def instance_norm(x):
    """Each channel of each sample by its own mean and variance, no weights. A group a channel is the same, faster on a CPU."""
    return F.group_norm(x, x.shape[1]) if x.device.type == "cpu" else F.instance_norm(x)


class Residual(nn.Module):
    """Two 3³ convolutions with instance norm, a 1³ one beside them where the width changes."""

    def __init__(self, wide, narrow):
        super().__init__()
        self.conv1 = nn.Conv3d(wide, narrow, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(narrow, narrow, 3, padding=1, bias=False)
        self.beside = nn.Conv3d(wide, narrow, 1, bias=False) if wide != narrow else None

    def forward(self, x):
        y = F.leaky_relu(instance_norm(self.conv1(x)), 0.01)
        y = instance_norm(self.conv2(y))
        x = x if self.beside is None else instance_norm(self.beside(x))
        return F.leaky_relu(x + y, 0.01)


def upsampler(wide, narrow, stride):
    return nn.ConvTranspose3d(wide, narrow, stride, stride, bias=False)


class Decoder(nn.Module):
    """UNETR (Hatamizadeh et al. 2022): three hidden states and the last one, brought from the patch grid up to the voxels.

    The scan joins in at full resolution. Four up-samplings undo a patch of 16; a smaller patch needs fewer, and the first
    ones keep the size (stride 1). `f` is the feature size, 16 in the paper.
    """

    def __init__(self, width, patch, classes, f=16):
        super().__init__()
        if patch not in (2, 4, 8, 16):
            raise BadInput(f"patch {patch}: UNETR's decoder doubles the grid, so the patch must be 2, 4, 8 or 16")
        n = patch.bit_length() - 1
        s = [1] * (4 - n) + [2] * n                                                    # of the four stages, from the grid up
        self.skip0 = Residual(1, f)                                                    # the scan itself
        self.skip1 = self.climb(width, 2 * f, s[:3])
        self.skip2 = self.climb(width, 4 * f, s[:2])
        self.skip3 = self.climb(width, 8 * f, s[:1])
        self.up = nn.ModuleList(upsampler(a, b, k) for a, b, k in zip((width, 8 * f, 4 * f, 2 * f), (8 * f, 4 * f, 2 * f, f), s))
        self.join = nn.ModuleList(Residual(2 * b, b) for b in (8 * f, 4 * f, 2 * f, f))
        self.out = nn.Conv3d(f, classes, 1)

    @staticmethod
    def climb(width, narrow, strides):
        first, *rest = strides
        return nn.Sequential(upsampler(width, narrow, first),
                             *(m for k in rest for m in (upsampler(narrow, narrow, k), Residual(narrow, narrow))))

    def forward(self, scan, grids):
        """scan [B, 1, X, Y, Z], grids: four of [B, C, x, y, z], the last one the deepest -> logits [B, K, X, Y, Z]."""
        g1, g2, g3, x = grids
        for up, join, skip in zip(self.up, self.join, (self.skip3(g3), self.skip2(g2), self.skip1(g1), self.skip0(scan))):
            x = join(torch.cat([up(x), skip], 1))
        return self.out(x)


class Segmenter(nn.Module):
    """Encoder with everything visible and UNETR's decoder: [B, X, Y, Z] in [0, 1] -> logits [B, K, X, Y, Z].

    Any size that the patch divides, whatever the pre-training grid: positions are computed. Skips are the outputs of
    blocks L/4, L/2 and 3L/4 (0-based; 3, 6 and 9 of 12), and the final norm.
    """

    def __init__(self, encoder, classes, features=16):
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.decoder = Decoder(encoder.config.width, encoder.config.patch, classes, features)
        encoder.head.requires_grad_(False)                                             # predicts patches: no part in this

    def forward(self, volume):
        _, hidden = self.encoder.encode(volume)
        L, grid = len(hidden), grid_of(volume.shape[1:], self.encoder.config.patch)
        grids = [h.mT.reshape(len(volume), -1, *grid) for h in (*(hidden[L * i // 4] for i in (1, 2, 3)), hidden[-1])]
        return self.decoder(volume[:, None], grids)


def load_segmenter(path):
    """The Segmenter in a checkpoint of finetune_seg.py, and what it was made for: task, classes, window, spacing, roi, …"""
    state = load_checkpoint(path, SEGMENTER)
    made = state["made"]
    net = Segmenter(Model(Config(**state["config"])), len(made["classes"]) + 1, made["features"])
    fit(net, state["model"], path)
    return net, made


def window_starts(size, roi, overlap):
    """Where windows start along an axis: 1 + ceil((size − roi) / step) of them, step = roi · (1 − overlap); the last is flush."""
    step = max(1, int(roi * (1 - overlap)))
    return [min(i * step, size - roi) for i in range(1 + -(-max(0, size - roi) // step))] if size > roi else [0]


@torch.no_grad()
def sliding_window(predict, volume, roi, overlap=0.75, batch=4, device="cpu", mirror=()):
    """Mean of the windows' predictions with Gaussian weights (σ = roi / 8, as nnU-Net has it), float32 [K, X, Y, Z].

    predict: [B, *roi] on `device` -> [B, K, *roi]. volume: [X, Y, Z] on the host; padded with zeros where it is smaller
    than the window. mirror: axes (0, 1, 2); the mean over all flips of them. The sum stays on a GPU if it takes less than
    half of the free memory, else on the host.
    """
    roi, device, size = tuple(roi), torch.device(device), volume.shape
    short = [max(0, r - n) for r, n in zip(roi, size)]
    volume = F.pad(volume, [p for s in reversed(short) for p in (s // 2, s - s // 2)]) if any(short) else volume
    X, Y, Z = volume.shape
    corners = [(x, y, z) for x in window_starts(X, roi[0], overlap) for y in window_starts(Y, roi[1], overlap)
               for z in window_starts(Z, roi[2], overlap)]
    bells = [torch.exp(-0.5 * ((torch.arange(r) - (r - 1) / 2) / (r / 8)) ** 2) for r in roi]
    weight = (bells[0][:, None, None] * bells[1][:, None] * bells[2]).clamp(min=1e-3)  # the corners would all but vanish
    flips = [()]
    for axis in mirror:
        flips += [(*f, axis + 1) for f in flips]
    total = None
    for i in range(0, len(corners), batch):
        some = [tuple(slice(a, a + r) for a, r in zip(c, roi)) for c in corners[i:i + batch]]
        x = torch.stack([volume[box] for box in some]).to(device).float()              # [B, *roi]
        y = 0
        for axes in flips:
            z = predict(x.flip(axes)).float()                                          # [B, K, *roi]
            y = y + (z.flip([a + 1 for a in axes]) if axes else z)
        if total is None:
            K = y.shape[1]
            room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            home = device if 4 * (K + 1) * X * Y * Z < room / 2 else torch.device("cpu")
            total, norm, weight = torch.zeros(K, X, Y, Z, device=home), torch.zeros(X, Y, Z, device=home), weight.to(device)
        y = (y * (weight / len(flips))).to(home)
        for box, part in zip(some, y):
            total[(slice(None), *box)] += part
            norm[box] += weight.to(home)
    for x in range(X):                                                                 # a slice at a time: no second buffer
        total[:, x] /= norm[x]
    a, b, c = (s // 2 for s in short)
    return total[:, a:a + size[0], b:b + size[1], c:c + size[2]]


def overlap_counts(found, truth, classes):
    """Voxels of each class in both label maps, in `found`, and in `truth`: int64 [K, 3]. Dice = 2 · both / (found + truth)."""
    found, truth = found.reshape(-1).long(), truth.reshape(-1).long()
    both = torch.bincount(found[found == truth], minlength=classes)
    return torch.stack([both, torch.bincount(found, minlength=classes), torch.bincount(truth, minlength=classes)], 1)


# ---------------------------------------------------------------- frozen features
# Nothing here draws a random number: probing in the middle of a training run leaves the run as it was.


def patch_labels(labels, patch, cover=0.125):
    """Labels [X, Y, Z] -> the class of each patch [G], in the order of `patchify`, and whether it holds any labelled voxel.

    The organ with the most voxels in the patch (of equals the lower number) if it fills the share `cover` of the patch, else
    background, 0. Organs are small beside a patch: a majority (cover 0.5) leaves 8 of the phantom's 15 without a token.
    """
    v = patchify(labels[None].long(), patch)[0]                                        # [G, P³]
    K = int(v.max()) + 2                                                               # one organ at least, be it empty
    counts = torch.bincount((v + K * torch.arange(len(v))[:, None]).reshape(-1), minlength=K * len(v)).view(-1, K)
    most, organ = counts[:, 1:].max(1)
    return (organ + 1) * (most >= max(1, cover * patch ** 3)), counts[:, 1:].sum(1) > 0


def whole_patches(volume, patch):
    """The middle of [X, Y, Z], cut to a multiple of the patch along every axis: a view. BadInput where none fits."""
    cut = [n % patch // 2 for n in volume.shape]
    grid_of([n // patch * patch for n in volume.shape], patch)
    return volume[tuple(slice(c, c + n // patch * patch) for c, n in zip(cut, volume.shape))]


@torch.no_grad()
def token_grid(encode, volume, patch, roi, batch=8):
    """A feature for each patch of a scan [X, Y, Z] (a multiple of the patch): float32 [x, y, z, F] on the device of `encode`.

    encode: [B, *box] on the host -> [B, g, F], patches in the order of `patchify`. Boxes tile the scan, at most `roi` voxels
    along each axis; where the last one has to overlap the one before, its tokens count.
    """
    grid, out = grid_of(volume.shape, patch), None
    box = [min(g, max(1, r // patch)) for g, r in zip(grid, roi)]
    corners = [(x, y, z) for x in window_starts(grid[0], box[0], 0) for y in window_starts(grid[1], box[1], 0)
               for z in window_starts(grid[2], box[2], 0)]
    for i in range(0, len(corners), batch):
        boxes = [tuple(slice(a, a + b) for a, b in zip(c, box)) for c in corners[i:i + batch]]
        x = torch.stack([volume[tuple(slice(s.start * patch, s.stop * patch) for s in b)] for b in boxes]).float()
        tokens = encode(x).float()                                                     # [B, g, F]
        out = tokens.new_empty(*grid, tokens.shape[-1]) if out is None else out
        for b, t in zip(boxes, tokens):
            out[b] = t.view(*box, -1)
    return out


def dense_tokens(encode, cases, patch, roi, cover=0.125):
    """Tokens of labelled scans, cases a list of (volume, labels) [X, Y, Z]: features [N, F], classes [N], the case of each [N].

    Patches without a labelled voxel are class 0 and by far the most: evenly spaced ones are kept, as many as there are others.
    """
    x, y, who = [], [], []
    for n, (volume, labels) in enumerate(cases):
        tokens = token_grid(encode, whole_patches(volume, patch), patch, roi).flatten(0, 2)  # [G, F]
        label, touched = patch_labels(whole_patches(labels, patch), patch, cover)
        rest = (~touched).nonzero()[:, 0]
        few = min(len(rest), int(touched.sum()))
        kept = torch.cat([touched.nonzero()[:, 0], rest[torch.arange(few) * len(rest) // max(1, few)]])
        x.append(tokens[kept.to(tokens.device)])
        y.append(label[kept])
        who.append(torch.full_like(kept, n))
    return torch.cat(x), torch.cat(y).to(x[0].device), torch.cat(who).to(x[0].device)


def knn(x, y, K, query, k=20, temperature=0.07):
    """Vote of the k nearest by cosine, each with weight exp(cosine / 0.07), as in DINO (Caron et al. 2021).

    x [N, F] with classes y [N], query [M, F] -> shares of the vote [M, K].
    """
    x, shares = F.normalize(x), []
    for q in F.normalize(query).split(1024):
        near, at = (q @ x.T).topk(min(k, len(x)))                                      # [m, k]
        vote = torch.zeros(len(q), K, device=x.device).scatter_add_(1, y[at], ((near - 1) / temperature).exp())
        shares.append(vote / vote.sum(1, keepdim=True))
    return torch.cat(shares)


@torch.enable_grad()
def logistic(x, y, K, l2, start=None, tolerance=1e-5):
    """Multinomial logistic regression by L-BFGS: mean cross-entropy + l2/2 · |W|², the bias free; weights [K, F + 1].

    It stops where a step changes the weights, or the loss, by less than `tolerance`.
    """
    w = (x.new_zeros(K, x.shape[1] + 1) if start is None else start.clone()).requires_grad_()
    optimiser = torch.optim.LBFGS([w], max_iter=100, history_size=10, tolerance_change=tolerance, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(scores_of(w, x), y) + l2 / 2 * w[:, :-1].square().sum()
        loss.backward()
        return loss
    optimiser.step(closure)
    return w.detach()


def scores_of(w, x):
    return x @ w[:, :-1].T + w[:, -1]


def linear_probe(x, y, K, query, held, strengths=(1.0, 0.1, 0.01, 0.001, 0.0001)):
    """Logistic regression on x [N, F], y [N] -> probabilities of query [M, K], and the l2 of `strengths` that was chosen.

    Chosen by the cross-entropy of the rows that held [N] marks, when fitted to the others; then fitted to all of them.
    """
    losses, w = [], None
    for l2 in strengths:                                                               # from strong to weak, each from the last
        w = logistic(x[~held], y[~held], K, l2, w)
        losses.append(F.cross_entropy(scores_of(w, x[held]), y[held]).item())
    l2 = strengths[min(range(len(losses)), key=losses.__getitem__)]
    return scores_of(logistic(x, y, K, l2), query).softmax(1), l2


def probe_scores(x, y, held, query, truth, K, k=20):
    """kNN and linear probe on frozen features x [N, F], y [N]: what each scores on query [M, F], truth [M] (see `class_scores`).

    Features are standardised by x for both (departs: DINO's kNN takes them as they are), so that raw voxels, whose cosines
    are all near 1, have a chance.
    """
    mean, sd = x.mean(0), x.std(0)
    sd = torch.where(sd > 1e-5 * (1 + mean.abs()), sd, torch.inf)                      # a feature that is constant tells nothing
    x, query = (x - mean) / sd, (query - mean) / sd
    linear, l2 = linear_probe(x, y, K, query, held)
    return dict(knn=class_scores(truth, knn(x, y, K, query, k)), linear={**class_scores(truth, linear), "l2": l2})


def class_scores(truth, probs):
    """Scores of probs [M, K] for truth [M]: accuracy; recall, F1 and AUC, each the mean over the classes that truth holds.

    Also each class's own: recall, F1 and how often it occurs (None where truth has none of it).
    """
    K = probs.shape[1]
    truth, probs = truth.cpu(), probs.cpu()
    confusion = torch.bincount(truth * K + probs.argmax(1), minlength=K * K).view(K, K).double()
    hit, have, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    recall, f1 = hit / have, 2 * hit / (have + said)
    areas = [auc(truth == c, probs[:, c].numpy()) for c in range(K) if have[c]]
    areas = [a for a in areas if a is not None]
    there = have > 0
    each = lambda v: [a if h else None for a, h in zip(v.tolist(), there.tolist())]  # noqa: E731
    return dict(accuracy=(hit.sum() / have.sum()).item(), balanced_accuracy=recall[there].mean().item(), f1=f1[there].mean().item(),
                auc=sum(areas) / len(areas) if areas else None, recall_each=each(recall), f1_each=each(f1),
                count_each=have.long().tolist())


def dense_probe(encode, train, val, K, patch, roi, cover=0.125, k=20):
    """How well frozen patch tokens tell organs apart: {knn: scores, linear: scores, tokens: [train, val]} (see `class_scores`).

    encode: [B, *box] float on the host -> tokens [B, g, F]. train, val: lists of (volume in [0, 1], labels 0 … K − 1), tensors
    [X, Y, Z]; two training cases at least, since the linear probe's l2 is chosen on a quarter of them.
    """
    if len(train) < 2 or not val:
        raise BadInput(f"{len(train)} labelled cases to fit a probe and {len(val)} to score it; 2 and 1 are needed")
    x, y, who = dense_tokens(encode, train, patch, roi, cover)
    query, truth, _ = dense_tokens(encode, val, patch, roi, cover)
    for name, labels in (("fit", y), ("score", truth)):
        if not len(labels) or not labels.any():
            raise BadInput(f"no token of the cases to {name} a probe is of an organ: patches of {patch}³ voxels are too large for this spacing")
    held = who % min(4, len(train)) == 0                                               # every fourth case
    return {**probe_scores(x, y, held, query, truth, K, k), "tokens": [len(x), len(query)]}


# ---------------------------------------------------------------- visual tokenizer

TOKENIZER = "ar3d-vq-1"  # the `format` of the checkpoints of tokenize_vq.py


@dataclass
class TokenizerConfig:
    """K codes in each of g groups; the other numbers are ours: the paper publishes no tokenizer."""
    patch: int = 16
    codes: int = 8192       # K
    groups: int = 1         # g: product quantisation, g codes a patch
    dim: int = 32           # D, of a code; a point on the unit sphere
    hidden: int = 512       # width of the encoder's MLP
    width: int = 256        # of the decoder
    layers: int = 2         # of the decoder; each sees one patch further

    def __post_init__(self):
        if not 2 <= self.codes <= 65536 or min(self.groups, self.layers) < 1 or self.dim < 2:
            raise BadInput(f"{self.codes} codes in {self.groups} groups of {self.dim} dimensions, {self.layers} layers: 2 to 65,536 "
                           "codes (they are stored as uint16), 1 group or more, 2 dimensions or more, 1 layer or more")
        if self.groups * (self.dim - 1) > self.patch ** 3:
            raise BadInput(f"{self.groups} groups of {self.dim} dimensions: a patch of {self.patch}³ voxels has not so many components")


@contextlib.contextmanager
def exact_products(device):
    """Products in float32 whatever surrounds: neither autocast nor TF32, which gives one patch in twelve another code."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(was)


class Quantiser(nn.Module):
    """g codebooks of K unit vectors, nearest by cosine (ViT-VQGAN), moved by averages and not by gradients (van den Oord 2017).

    Buffers: codes [g, K, D]; uses [g, K], the moving average of a code's share of the patches times K (1: the mean share);
    sums [g, K, D], that of the vectors it stood for, on the same scale.
    """

    def __init__(self, codes, groups, dim):
        super().__init__()
        self.register_buffer("codes", F.normalize(torch.randn(groups, codes, dim), dim=-1))
        self.register_buffer("uses", torch.ones(groups, codes))
        self.register_buffer("sums", self.codes.clone())

    def nearest(self, z):
        """Unit vectors [n, g, D] -> the numbers of their codes [n, g]."""
        chunk = max(1, 2 ** 27 // (self.codes.shape[0] * self.codes.shape[1]))         # half a GiB of scores at a time
        with exact_products(z.device):
            return torch.cat([torch.einsum("ngd,gkd->gnk", part, self.codes).argmax(-1).T for part in z.split(chunk)])

    def look_up(self, index):
        """[..., g] -> [..., g, D]"""
        return self.codes[torch.arange(len(self.codes), device=index.device), index]

    def forward(self, z):
        """[n, g, D] -> codes whose gradient goes straight through to z (Bengio 2013), their numbers [n, g], the commitment loss."""
        with torch.no_grad():
            index = self.nearest(z)
            code = self.look_up(index)
        return z + (code - z).detach(), index, (z - code).square().sum(-1).mean()

    @torch.no_grad()
    def totals(self, z, index):
        """How often each code was chosen [g, K], and the sum of the vectors it was chosen for [g, K, D]."""
        g, K, D = self.codes.shape
        flat = (index + K * torch.arange(g, device=index.device)).reshape(-1)          # [n·g]
        n = torch.zeros(g * K, device=z.device).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
        return n.view(g, K), torch.zeros(g * K, D, device=z.device).index_add_(0, flat, z.reshape(-1, D).float()).view(g, K, D)

    @torch.no_grad()
    def candidates(self, z, index, count, generator):
        """`count` of the vectors [count, g, D], drawn without repetition by the root of their distance to their codes.

        What the codes hold already, such as bit-identical background, is drawn next to never. One generator, one answer.
        """
        weight = (1 - (z * self.look_up(index)).sum(-1) - 1e-5).clamp(min=1e-12).sqrt()  # [n, g]
        keys = torch.empty_like(weight).exponential_(generator=generator).reciprocal_().mul_(weight)
        pick = keys.topk(min(count, len(z)), 0).indices                                # [count, g]
        return z.float().gather(0, pick[..., None].expand(-1, -1, z.shape[-1]))

    @torch.no_grad()
    def update(self, n, sums, fresh, decay=0.9, least=0.1):
        """One step of the averages from what all ranks chose, n [g, K] and sums [g, K, D]; fresh [m, g, D] for dead codes.

        A code whose average use falls below `least` of the mean starts anew at one of `fresh`, at most m of them a step.
        No value leaves the device, and ranks that are given the same numbers hold the same codes.
        """
        scale = n.shape[1] / n.sum(1, keepdim=True)                                    # [g, 1]
        self.uses.lerp_(n * scale, 1 - decay)
        self.sums.lerp_(sums * scale[..., None], 1 - decay)
        dead = self.uses < least
        turn = dead.long().cumsum(1) - 1                                               # which of `fresh` a dead code takes
        dead &= turn < len(fresh)
        new = fresh.transpose(0, 1).gather(1, turn.clamp(0, len(fresh) - 1)[..., None].expand_as(self.sums))
        self.sums.copy_(torch.where(dead[..., None], new, self.sums))
        self.uses.masked_fill_(dead, 1.0)
        self.codes.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def start(self, z, generator, rounds=16):
        """k-means on the unit vectors [n, g, D] of a sample: the codes, and the averages as if this had been the last step."""
        pick = torch.randperm(len(z), generator=generator, device=z.device)[:self.codes.shape[1]]
        if len(pick) < self.codes.shape[1]:
            raise BadInput(f"{len(z):,} patches cannot start {self.codes.shape[1]:,} codes: lower --codes, or raise --start-patches")
        self.sums.copy_(z[pick].transpose(0, 1))
        self.codes.copy_(self.sums)
        for i in range(rounds):
            index = self.nearest(z)
            fresh = self.candidates(z, index, self.codes.shape[1], generator)
            self.update(*self.totals(z, index), fresh if i < rounds - 2 else fresh[:1], decay=0.0)


class Mix(nn.Module):
    """A depth-wise 3³ convolution over the grid of patches and an MLP of width 4C (Liu et al. 2022): [B, C, x, y, z] -> same."""

    def __init__(self, width):
        super().__init__()
        self.spread = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm(self.spread(x).movedim(1, -1))
        return x + self.fc2(F.gelu(self.fc1(y))).movedim(-1, 1)


class Tokenizer(nn.Module):
    """Patches -> codes, each by itself; codes -> voxels, each patch with its neighbours, so that edges between them vanish."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        n, out = c.patch ** 3, c.groups * c.dim
        self.linear = nn.Linear(n, out)                     # starts as the principal components (`start`)
        self.fc1, self.fc2 = nn.Linear(n, c.hidden), nn.Linear(c.hidden, out)
        self.quantiser = Quantiser(c.codes, c.groups, c.dim)
        self.register_buffer("mean", torch.zeros(out))      # of the codes' coordinates, and one over their deviation
        self.register_buffer("scale", torch.ones(out))
        self.enter = nn.Linear(out, c.width)
        self.blocks = nn.ModuleList(Mix(c.width) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.leave = nn.Linear(c.width, n)
        self.direct = nn.Linear(out, n)                     # starts as the least-squares map from codes to voxels
        for m in (self.fc2, self.leave):
            nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)

    @staticmethod
    def even(patches):
        """Contrast compressed by its square root, 0.02 of the window taken for noise: faint textures get codes of their own."""
        mean = patches.mean(-1, keepdim=True)
        gain = (25 * (patches.var(-1, unbiased=False, keepdim=True) + 4e-4)) ** -0.25
        return mean + (patches - mean) * gain

    def latents(self, patches):
        """[B, G, P³] in [0, 1] -> unit vectors [B·G, g, D], in float32 always: a code must not depend on who asks."""
        with exact_products(patches.device):
            x = self.even(patches)
            z = self.linear(x) + self.fc2(F.gelu(self.fc1(x)))
            return F.normalize(z.view(-1, self.config.groups, self.config.dim), dim=-1)

    def reconstruct(self, code, grid):
        """Codes as vectors [B·G, g, D] -> patches [B, G, P³], not clipped."""
        x, y, z = grid
        code = code.reshape(-1, x * y * z, self.mean.numel())                          # [B, G, g·D]
        v = self.enter((code - self.mean) * self.scale).mT.reshape(len(code), -1, x, y, z)
        for block in self.blocks:
            v = block(v)
        return self.direct(code) + self.leave(self.norm(v.flatten(2).mT))

    def forward(self, volume, window=None):
        """Mean squared error, commitment loss, patches [B, G, P³], vectors [B·G, g, D] and their codes' numbers [B·G, g]."""
        volume = volume if window is None else to_unit(volume, window)
        patches = patchify(volume, self.config.patch)
        z = self.latents(patches)
        code, index, commitment = self.quantiser(z)
        out = self.reconstruct(code, grid_of(volume.shape[1:], self.config.patch)).float()
        return (out - patches).square().mean(), commitment, out, z.detach(), index

    @torch.no_grad()
    def encode(self, volume, window=None):
        """Volume [B, X, Y, Z] (with `window` [B, S, 2]: integers) -> codes [B, G, g], patches numbered as `patchify` does."""
        volume = volume if window is None else to_unit(volume, window)
        patches = patchify(volume, self.config.patch)
        return self.quantiser.nearest(self.latents(patches)).view(*patches.shape[:2], -1)

    @torch.no_grad()
    def decode(self, codes, grid):
        """Codes [B, G, g] on a grid of (x, y, z) patches -> volume [B, X, Y, Z] in [0, 1]."""
        return unpatchify(self.reconstruct(self.quantiser.look_up(codes), grid).float(), grid).clamp(0, 1)

    @torch.no_grad()
    def start(self, patches, generator):
        """Begin from data [n, P³]: the encoder as principal components, the codes as k-means, the decoder by least squares.

        Component i goes to group i mod g. Each group has one more coordinate, the same for all, that turns distances into
        angles: vectors of a mean square length 0.2 on the plane that touches the sphere.
        """
        c = self.config
        x, want = self.even(patches), c.groups * (c.dim - 1)
        mean = x.mean(0)
        with exact_products(x.device):
            values, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))       # rising
        axes = axes[:, -want:].flip(1) * (0.2 * c.groups / values[-want:].sum()).sqrt()  # [P³, want], scaled
        axes = axes.T.reshape(c.dim - 1, c.groups, -1).transpose(0, 1)                 # [g, D − 1, P³]
        self.linear.weight.copy_(F.pad(axes, (0, 0, 0, 1)).reshape(-1, axes.shape[-1]))
        self.linear.bias.copy_(F.pad(-(axes @ mean), (0, 1), value=1.0).reshape(-1))
        z = self.latents(patches)
        self.quantiser.start(z, generator)
        code = self.quantiser.look_up(self.quantiser.nearest(z)).flatten(1)            # [n, g·D]
        self.mean.copy_(code.mean(0))
        self.scale.copy_(1 / code.std(0).mean().clamp(min=1e-6).expand_as(self.scale))
        a = F.pad(code, (0, 1), value=1.0).double()
        gram = a.T @ a / len(a) + 1e-6 * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        found = torch.linalg.solve(gram, a.T @ patches.double() / len(a))                # [g·D + 1, P³]
        self.direct.weight.copy_(found[:-1].T), self.direct.bias.copy_(found[-1])


def tokenizer_state(tokenizer):
    """What `load_tokenizer` needs: format, config, model."""
    return dict(format=TOKENIZER, config=asdict(tokenizer.config), model=tokenizer.state_dict())


def load_tokenizer(source, patch=None):
    """The Tokenizer in a checkpoint of tokenize_vq.py (a path, or the loaded dict), on the CPU, its weights frozen.

    patch: BadInput if the tokenizer's is another.
    """
    state = source if isinstance(source, dict) else load_checkpoint(source, TOKENIZER)
    name = "the tokenizer in the checkpoint" if isinstance(source, dict) else source
    config = TokenizerConfig(**state["config"])
    if patch not in (None, config.patch):
        raise BadInput(f"{name}: its codes are of patches of {config.patch}³ voxels and the model's are of {patch}³; "
                       f"make one with tokenize_vq.py --patch {patch}, or choose another --size")
    tokenizer = Tokenizer(config)
    fit(tokenizer, state["model"], name)
    return tokenizer.requires_grad_(False).eval()


# ---------------------------------------------------------------- weights


def load_pretrained(path, heads=None):
    """The model in `path`: a checkpoint of pretrain.py or the file that the authors published, on the CPU, in float32.

    The published file does not say its number of heads: width / 64 unless `heads` is given. Every key is accounted for:
    BadInput names those that are missing, left over or of the wrong shape; nothing is loaded in part.
    """
    state = load_checkpoint(path)
    if state.get("format") == FORMAT:
        config, weights = Config(**state["config"]), state["model"]
        if heads not in (None, config.heads):
            raise BadInput(f"{path}: was trained with {config.heads} heads, not {heads}; choose another --size, or leave heads out")
    elif isinstance(state.get("state_dict"), dict) and "model.embed_tokens.weight" in state["state_dict"]:
        config, weights = from_published(state["state_dict"], heads, path)
    else:
        raise BadInput(f"{path}: neither a checkpoint of pretrain.py (format {FORMAT}) nor the published weights "
                       f"(state_dict with model.embed_tokens.weight); its keys are {', '.join(map(str, list(state)[:6]))}")
    model = Model(config)
    fit(model, weights, path)
    return model


def fit(model, weights, path):
    """load_state_dict, strict, with one line for what does not fit."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [f"{k} {have.get(k, 'missing')} (needed {want.get(k, 'nothing')})" for k in sorted(want.keys() | have.keys())
             if want.get(k) != have.get(k)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise BadInput(f"{path}: {len(wrong)} weights do not fit: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(weights)


def from_published(sd, heads, path):
    """The published state_dict -> Config and our state_dict. Layers that it lacks show up when the result is fitted."""
    sd = dict(sd)
    try:
        C, _, *P = sd["model.patchifier.proj.weight"].shape
        if len(set(P)) != 1:
            raise BadInput(f"{path}: patches of {P} voxels; only cubes are known here")
        layers = 1 + max(int(k.split(".")[2]) for k in sd if k.startswith("model.layers."))
        out = {"begin": sd.pop("model.embed_tokens.weight")[1],  # row 2 is an end token that no loss ever reached
               "embed.weight": sd.pop("model.patchifier.proj.weight").reshape(C, -1),
               "embed.bias": sd.pop("model.patchifier.proj.bias")}
        for i in range(layers):
            old, new = f"model.layers.{i}.", f"blocks.{i}."
            out[new + "qkv.weight"] = torch.cat([sd.pop(f"{old}self_attn.{x}_proj.weight") for x in "qkv"])
            for a, b in (("self_attn.o_proj", "proj"), ("mlp.linear1", "fc1"), ("mlp.linear2", "fc2"),
                         ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
                for part in ("weight", "bias"):
                    out[f"{new}{b}.{part}"] = sd.pop(f"{old}{a}.{part}")
        for a, b in (("model.norm", "norm"), ("decoder_pred", "head")):
            for part in ("weight", "bias"):
                out[f"{b}.{part}"] = sd.pop(f"{a}.{part}")
    except KeyError as e:
        raise BadInput(f"{path}: the published weights lack {e.args[0]}") from None
    if sd:
        raise BadInput(f"{path}: {len(sd)} weights that nothing here uses: {', '.join(sorted(sd)[:4])}")
    return Config(width=C, layers=layers, heads=heads or max(1, C // 64), patch=P[0]), out


def checkpoint_state(model):
    """What `load_pretrained` needs, for `save_checkpoint`: format, config, model."""
    return dict(format=FORMAT, config=asdict(model.config), model=model.state_dict())
