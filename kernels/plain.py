"""The four operations of pre-training in plain PyTorch: for CPUs, and what fused.py must equal.

read -> embed -> attend (in each block) -> loss; and what they are made of: patches, intensities.

B batch, X Y Z voxels, P patch edge, G patches of a volume, N tokens, C width, H heads, D width of a
head, S sub-images of a sequence, laid side by side along z.
"""

import torch
import torch.nn.functional as F

from common import BadInput


def grid_of(shape, patch):
    """Patches along each axis of `shape` voxels; BadInput where the patch does not divide it."""
    if any(n % patch or n < patch for n in shape):
        size = "x".join(map(str, shape))
        raise BadInput(f"volume {size} is not a multiple of the patch {patch} along every axis")
    return tuple(n // patch for n in shape)


def patchify(volume, patch):
    """[B, X, Y, Z] -> [B, G, P³]: patches x-major, z fastest; voxels inside each likewise."""
    x, y, z = grid_of(volume.shape[1:], patch)
    v = volume.reshape(-1, x, patch, y, patch, z, patch)
    return v.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, x * y * z, patch**3)


def unpatchify(patches, grid):
    """[B, G, P³] -> [B, X, Y, Z], the inverse of `patchify` for a grid of (x, y, z) patches."""
    (x, y, z), p = grid, round(patches.shape[-1] ** (1 / 3))
    v = patches.reshape(-1, x, y, z, p, p, p)
    return v.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, x * p, y * p, z * p)


def unit_map(ranges):
    """Intensity ranges [B, S, 2] -> low, scale [B, S]: v becomes clamp((v − low) · scale, 0, 1).

    None -> None, None: the voxels are in [0, 1] already.
    """
    if ranges is None:
        return None, None
    low, high = ranges.float().unbind(-1)
    return low, 1 / (high - low).clamp(min=1e-6)


def to_unit(volume, ranges):
    """[B, X, Y, Z] of any type and ranges [B, S, 2] (one a sub-image) -> float32 in [0, 1]."""
    if ranges is None:
        return volume
    B, X, Y, Z = volume.shape
    low, scale = (t[:, None, None, :, None] for t in unit_map(ranges))
    v = volume.reshape(B, X, Y, ranges.shape[1], -1).float()  # [B, X, Y, S, Z/S]
    return ((v - low) * scale).clamp_(0, 1).view(B, X, Y, Z)


def standardise(patches):
    """By each patch's mean and unbiased variance (+1e-6, as published) -> targets, mean, scale."""
    mean = patches.mean(-1, keepdim=True)
    scale = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / scale, mean, scale


# ---- the operations --------------------------------------------------------------------------


def read(volume, ranges, patch, order=None):
    """What `embed` and `loss` work on: the patches in the order of the sequence [B, G, P³]."""
    patches = patchify(to_unit(volume, ranges), patch)
    return patches if order is None else patches[:, order]


def embed(source, weight, bias, table, count=None, begin=None):
    """The first `count` patches (None: all) -> tokens: weight [C, P³], bias [C], positions [G, C].

    begin [C] stands first: [B, 1 + count, C]; None: [B, count, C].
    """
    patches = source[:, :count]
    return prepended(F.linear(patches, weight, bias) + table[:count].to(patches.dtype), begin)


def prepended(x, begin):
    """Tokens x [B, N, C] behind `begin` [C], if it is given."""
    if begin is None:
        return x
    return torch.cat([begin.to(x.dtype).expand(len(x), 1, -1), x], 1)


def attend(qkv, prefix=None):
    """Softmax attention: row i of sample b sees key j where j <= i or j < prefix[b].

    qkv [B, N, 3, H, D], prefix [B] integers (None: every row sees every key) -> [B, N, H, D].
    """
    B, N, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
    seen = None if prefix is None else dense_mask(qkv, prefix)
    if qkv.device.type != "cpu" or qkv.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    # PyTorch's fused attention for CPUs takes twice the time of three products in bfloat16
    q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
    if seen is None:
        scores = D**-0.5 * q @ k.mT
    else:
        bias = torch.zeros(seen.shape, dtype=qkv.dtype).masked_fill_(~seen, float("-inf"))
        bias = bias.expand(B, H, N, N).reshape(B * H, N, N)
        scores = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5)
    return (scores.softmax(-1) @ v).view(B, H, N, D).transpose(1, 2)


def dense_mask(qkv, prefix):
    """Which keys the rows see: bool [B, 1, N, N]."""
    i = torch.arange(qkv.shape[1], device=qkv.device)
    return ((i <= i[:, None]) | (i < prefix[:, None, None]))[:, None]


def loss(pred, source, prefix=None):
    """Mean squared error of the standardised patches [B, G], 0 before `prefix`; pred [B, G, P³]."""
    errors = (pred.float() - standardise(source)[0]).square().mean(-1)
    return errors if prefix is None else errors * targets(prefix, errors.shape[1])


def targets(prefix, G):
    """Which of the G patches are predicted, those from prefix [B] on: bool [B, G]."""
    return torch.arange(G, device=prefix.device) >= prefix[:, None]
