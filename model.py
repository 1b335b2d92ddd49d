"""The transformer that predicts the next patch of a 3D scan, its encoder and classifier, and the loading of weights.

    from model import load_pretrained
    m = load_pretrained("out/pretrain/ckpt.pt")        # ours, or the file that the authors of the paper published
    loss, pred = m(volume, prefix)                     # volume [B, X, Y, Z] in [0, 1], prefix [B] integers
    last, hidden = m.encode(volume)                    # last [B, G, C], hidden: a list of [B, G, C]

Sections: configuration · patches and positions · attention · the transformer · classifier · weights

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
def token_order(grid, images, order):
    """Place i of the sequence holds patch token_order[i] (numbered as `patchify` does): LongTensor [G], or None if i itself."""
    x, y, z = grid
    if order == "raster":
        return None
    if z % images:
        raise BadInput(f"--order image: {z} patches along z do not divide into {images} sub-images")
    raster = torch.arange(x * y * z).view(x, y, images, z // images)
    return raster.permute(2, 0, 1, 3).reshape(-1)


@lru_cache(maxsize=32)
def positions(grid, width):
    """Fixed 3D sine-cosine table [G, C]: a third of C an axis, [sin(p·ω), cos(p·ω)], ω_i = 10000^(−i / (C/6)).

    Where 6 does not divide C (ViT-L), the last C mod 6 columns are zero.
    """
    n = width // 6
    omega = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    axes = [torch.arange(g, dtype=torch.float64)[:, None] * omega for g in grid]       # [g, C/6] an axis
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
        table = positions(grid, self.config.width).to(patches.device)
        table = table if order is None else table[order]
        x = self.embed(patches) + table[:patches.shape[1]].to(patches.dtype)
        begin = self.begin.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([begin, x], 1)

    def sequence(self, volume, window=None):
        """Volume [B, X, Y, Z] (with `window` [B, S, 2]: integers) -> patches in order [B, G, P³], grid, order."""
        if window is not None:
            volume = to_unit(volume, window)
        grid = grid_of(volume.shape[1:], self.config.patch)
        order = token_order(grid, self.config.images, self.config.order)
        patches = patchify(volume, self.config.patch)
        if order is not None:
            order = order.to(volume.device)
            patches = patches[:, order]
        return patches, grid, order

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
    """Encoder, mean over the patch tokens, linear layer without bias (as published): [B, X, Y, Z] -> logits [B, K]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.score = nn.Linear(encoder.config.width, classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, volume):
        last, _ = self.encoder.encode(volume)
        return self.score(last.mean(1))


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
