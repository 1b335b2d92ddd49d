"""The transformer that predicts the next patch of a 3D scan, its encoder and classifier, and the loading of weights.

    from model import load_pretrained
    m = load_pretrained("out/pretrain/ckpt.pt")        # ours, or the file that the authors of the paper published
    loss, pred = m(volume, prefix)                     # volume [B, X, Y, Z] in [0, 1], prefix [B] integers
    last, hidden = m.encode(volume)                    # last [B, G, C], hidden: a list of [B, G, C]

Sections: configuration · patches and positions · attention · the transformer · classifier · segmentation · weights

B batch, X Y Z voxels, P patch edge, G patches of a volume, N tokens, C width, H heads, D width of a head, L layers,
S sub-images of a sequence, laid side by side along z.
"""
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from common import BadInput, load_checkpoint

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

    def __post_init__(self):
        if self.width % self.heads or self.width < 6:
            raise BadInput(f"width {self.width} must be a multiple of heads {self.heads}, and 6 or more")
        if self.order not in ("raster", "image"):
            raise BadInput(f"order {self.order!r}: raster or image")


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
    low, high = window.float().unbind(-1)                                              # [B, S]
    scale = 1 / (high - low).clamp(min=1e-6)
    v = volume.reshape(B, X, Y, window.shape[1], -1).float()                           # [B, X, Y, S, Z/S]
    return ((v - low[:, None, None, :, None]) * scale[:, None, None, :, None]).clamp_(0, 1).view(B, X, Y, Z)


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
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, prefix=None):
        B, N, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, C // self.heads)
        x = x + self.proj(prefix_attention(qkv, prefix).reshape(B, N, C))
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
        self.head = nn.Linear(c.width, c.patch ** 3)
        self.initialise()

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

    def sequence(self, volume, window=None):
        """Volume [B, X, Y, Z] (with `window` [B, S, 2]: integers) -> patches in order [B, G, P³], grid, order."""
        if window is not None:
            volume = to_unit(volume, window)
        grid = grid_of(volume.shape[1:], self.config.patch)
        order = token_order(grid, self.config.images, self.config.order, volume.device)
        patches = patchify(volume, self.config.patch)
        return patches if order is None else patches[:, order], grid, order

    def forward(self, volume, prefix, window=None, per_patch=False):
        """Predict each patch from those before it, and from the begin token and the first `prefix` patches for all.

        volume [B, X, Y, Z] float in [0, 1], or integers with window [B, S, 2]; prefix [B] integers in 0 … G−1.
        Returns the mean squared error over the patches prefix … G−1 of the batch and pred [B, G, P³], standardised
        patches in the order of the sequence; with per_patch, [B, G] errors (0 before the prefix) instead of their mean.
        The last patch predicts nothing, so G tokens (begin and G−1 patches) are all that is computed.
        """
        patches, grid, order = self.sequence(volume, window)
        x = self.tokens(patches[:, :-1], grid, order)                                  # [B, G, C]
        for block in self.blocks:
            x = block(x, prefix + 1)                                                   # the begin token is visible too
        pred = self.head(self.norm(x))                                                 # [B, G, P³]
        target, _, _ = standardise(patches)
        errors = (pred.float() - target).square().mean(-1)                             # [B, G]
        counted = torch.arange(errors.shape[1], device=errors.device) >= prefix[:, None]
        errors = errors * counted
        return (errors if per_patch else errors.sum() / counted.sum()), pred

    def encode(self, volume, window=None):
        """Features with everything visible: last [B, G, C], and hidden, a list of L of them: blocks 0 … L−2, then last.

        Patches come in the order of `patchify` whatever order the model was pre-trained in; the begin token is dropped.
        """
        if window is not None:
            volume = to_unit(volume, window)
        x = self.tokens(patchify(volume, self.config.patch), grid_of(volume.shape[1:], self.config.patch))
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
        patch = 2 * c.patch ** 3 * c.width * G
        blocks = c.layers * (24 * c.width ** 2 * G + 4 * c.width * pairs)
        return 2 * patch + 3 * patch + 3 * blocks  # the embedding has no gradient to its input


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
