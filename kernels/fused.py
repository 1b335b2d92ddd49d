"""The four operations of plain.py by Triton: the same meaning, and the same gradients to rounding.

The source is the volume as it was loaded, with what is needed to read its patches where they lie.
"""

import math

import torch

from kernels import plain
from kernels.patch_embed import embed_op, loss_op
from kernels.prefix_attention import attend_op


def read(volume, ranges, patch, order=None):
    """-> source: volume, low, scale, order. Nothing is copied; `embed` and `loss` know the patch.

    volume [B, X, Y, Z] in uint8, int16, float16, bfloat16 or float32, any strides; ranges [B, S, 2]
    or None: the voxels as they are; order [G] or None: token i of the sequence is patch i.
    """
    return volume, *plain.unit_map(ranges), order


def embed(source, weight, bias, table, count=None, begin=None):
    """As `plain.embed`: float32 tokens; the products have autocast's type where it is on.

    Gradients: weight, bias and begin, summed in float32 in an order that does not change. No other.
    """
    if count is None:
        count = math.prod(source[0].shape[1:]) // weight.shape[1]
    kind = source[0].device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    return embed_op(*source, weight, bias, table, count, begin, dtype)


def attend(qkv, prefix=None):
    """As `plain.attend`. The gradient is one packed tensor, the same to the bit in every run.

    qkv [B, N, 3, H, D] in bfloat16, float16 or float32 (multiplied exactly, without TF32), any
    strides, D up to 128; prefix [B] integers on the same device, any value (below 0 as 0, above N
    as N). Without a prefix there is nothing to win over PyTorch's own attention.
    """
    return plain.attend(qkv) if prefix is None else attend_op(qkv, prefix)[0]


def loss(pred, source, prefix=None):
    """As `plain.loss`, float32 also under autocast. The gradient is that of pred alone.

    Nothing is read for the patches before the prefix.
    """
    return loss_op(*source, pred, prefix)[0]
