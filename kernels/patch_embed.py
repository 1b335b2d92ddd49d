"""Voxels to tokens, and the loss against the voxels of a patch, straight from the volume as loaded.

The embedding is a matrix product whose left side is never written down (an implicit GEMM): with u
the voxels mapped to [0, 1],  token[b, i] = Σ_k u[b, patch i, k]·W[·, k] + bias + table[i],  and the
address of voxel k = (x·P + y)·P + z of a patch is corner + x·stride_x + y·stride_y + z·stride_z.
Tiles of [patches, voxels] are read where they lie, in whatever type and strides, mapped
u = clamp((v − low)·scale, 0, 1)  in registers and multiplied; bias, position and, in row 0 of each
sample, the begin token are added before the one write. The gradient of the weight,
dW[c, k] = Σ_rows dtoken[row, c]·u[row, k],  sums over rows that lie anywhere: where each lies is
five integer divisions a row and tile, more than its product. So u is written down once, in the type
of the products, for as long as the BLAS multiplies it.

The loss is the mean squared error of each predicted patch against t = (u − mean)·r, r = 1/√(var +
1e-6), by the patch's own mean and unbiased variance. One program takes one patch. The backward,
dpred = 2·(pred − t)/P³ · derror, reads the voxels again and needs only mean and r. Beside volume
and pred, which are there anyway, nothing of their size is kept for the backward pass.

Sections: kernels · tiles · operators. What they mean: fused.py.

B batch, X Y Z voxels, P patch edge, K = P³ voxels of a patch, G patches of a volume, GY GZ of them
along y and z, S sub-images laid side by side along z, depth of each in voxels, C width, T tokens of
a sample (a begin token and the patches), M = B·T rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels

# ---- kernels ---------------------------------------------------------------------------------
#
# All of them take
#   source    volume [B, X, Y, Z], any type; low, scale [B, S] float32 or None; order [G] or None
#   sizes     S, depth, GY, GZ
#   strides   of the volume
#   STRADDLES whether a patch may have voxels of several sub-images: each then looks its own map up


@triton.jit
def find(b, i, inside, source, sizes, strides, P: tl.constexpr, STRADDLES: tl.constexpr):
    """Patch i of the sequence of sample b: b, offset in the volume (int64), z, low and scale."""
    _, low, scale, order = source
    S, depth, GY, GZ = sizes
    number = i
    if order is not None:
        number = tl.load(order + i, mask=inside, other=0)
    x, y, z = number // (GY * GZ) * P, number // GZ % GY * P, number % GZ * P
    corner = tl.cast(b, tl.int64) * strides[0] + tl.cast(x, tl.int64) * strides[1]
    corner += tl.cast(y, tl.int64) * strides[2] + tl.cast(z, tl.int64) * strides[3]
    lo, sc = 0.0, 1.0
    if low is not None and not STRADDLES:
        lo = tl.load(low + b * S + z // depth, mask=inside, other=0.0)
        sc = tl.load(scale + b * S + z // depth, mask=inside, other=0.0)
    return b, corner, z, lo, sc


@triton.jit
def read_unit(patch, inside, k, source, sizes, strides, P: tl.constexpr, STRADDLES: tl.constexpr):
    """Voxels k [1, n] of the patches [m, 1] that `find` gave, in [0, 1]: float32 [m, n]."""
    b, corner, z, lo, sc = patch
    volume, low, scale, _ = source
    inside = inside & (k < P * P * P)
    x, y, z_in = k // (P * P), k // P % P, k % P
    at = tl.cast(x, tl.int64) * strides[1] + tl.cast(y, tl.int64) * strides[2]
    at += tl.cast(z_in, tl.int64) * strides[3]
    v = tl.load(volume + corner + at, mask=inside, other=0).to(tl.float32)
    if low is not None:
        if STRADDLES:
            image = b * sizes[0] + (z + z_in) // sizes[1]
            lo = tl.load(low + image, mask=inside, other=0.0)
            sc = tl.load(scale + image, mask=inside, other=0.0)
        v = tl.minimum(tl.maximum((v - lo) * sc, 0.0), 1.0)
    return v


@triton.jit
def embed_kernel(source, sizes, strides,
                 weight,                 # [C, K], contiguous; its type is the products'
                 bias, begin,            # [C]; begin may be None
                 table,                  # [G, C], contiguous
                 out,                    # [M, C], contiguous, float32
                 M, T, C,
                 P: tl.constexpr, BEGIN: tl.constexpr, STRADDLES: tl.constexpr,
                 BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    K: tl.constexpr = P * P * P
    across = tl.cdiv(C, BC)
    # programs of the same patches run together
    r = tl.program_id(0) // across * BM + tl.arange(0, BM)[:, None]
    c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    i = r % T - BEGIN
    inside = (r < M) & (i >= 0)
    b, first = tl.where(inside, r // T, 0), tl.where(inside, i, 0)
    patch = find(b, first, inside, source, sizes, strides, P, STRADDLES)
    acc = tl.zeros([BM, BC], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        u = read_unit(patch, inside, k[None, :], source, sizes, strides, P, STRADDLES)
        w_inside = (c[:, None] < C) & (k[None, :] < K)
        w = tl.load(weight + c[:, None] * K + k[None, :], mask=w_inside, other=0.0)
        acc = tl.dot(u.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    # -- bias, position; the begin token takes the row that no patch has --
    c = c[None, :]
    acc += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    acc += tl.load(table + i * C + c, mask=inside & (c < C), other=0.0).to(tl.float32)
    if BEGIN:
        token = tl.load(begin + c, mask=c < C, other=0.0).to(tl.float32)
        acc = tl.where(i < 0, token, acc)
    at = out + tl.cast(r, tl.int64) * C + c
    tl.store(at, acc.to(out.dtype.element_ty), mask=(r < M) & (c < C))


@triton.jit
def read_patch(
    source, sizes, strides, prefix, G, P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr
):
    """This program's patch: row [1, 1] of B·G, whether it counts, voxel numbers k [1, BK], u."""
    r = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    b, i = r // G, r % G
    k = tl.arange(0, BK)[None, :]
    counts = i >= 0
    if prefix is not None:
        counts = i >= tl.load(prefix + b)  # nothing is read for those before
    patch = find(b, i, counts, source, sizes, strides, P, STRADDLES)
    u = read_unit(patch, counts, k, source, sizes, strides, P, STRADDLES)
    return tl.cast(r, tl.int64), counts, k, u


@triton.jit
def unfold_kernel(source, sizes, strides,
                  out,                     # [B, n, K], contiguous: the first n patches
                  n, P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    r, _, k, u = read_patch(source, sizes, strides, None, n, P, STRADDLES, BK)
    tl.store(out + r * P * P * P + k, u.to(out.dtype.element_ty), mask=k < P * P * P)


@triton.jit
def loss_kernel(source, sizes, strides,
                pred,                    # [B, G, K], contiguous
                prefix,                  # [B] or None
                errors, mean, rstd,      # [B, G], contiguous, float32
                G, P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    K: tl.constexpr = P * P * P
    r, counts, k, u = read_patch(source, sizes, strides, prefix, G, P, STRADDLES, BK)
    inside = counts & (k < K)
    m = tl.sum(tl.where(inside, u, 0.0), 1, keep_dims=True) / K
    u = tl.where(inside, u - m, 0.0)
    s = 1.0 / tl.sqrt_rn(tl.sum(u * u, 1, keep_dims=True) / (K - 1) + 1e-6)
    e = tl.load(pred + r * K + k, mask=inside, other=0.0).to(tl.float32) - u * s
    tl.store(errors + r, tl.sum(e * e, 1, keep_dims=True) / K)
    tl.store(mean + r, m)
    tl.store(rstd + r, s)


@triton.jit
def loss_backward_kernel(source, sizes, strides,
                         pred, dpred,            # [B, G, K], contiguous
                         prefix,                 # [B] or None
                         derrors, mean, rstd,    # [B, G], contiguous, float32
                         G, P: tl.constexpr, STRADDLES: tl.constexpr,
                         BK: tl.constexpr):  # fmt: skip
    K: tl.constexpr = P * P * P
    r, counts, k, u = read_patch(source, sizes, strides, prefix, G, P, STRADDLES, BK)
    e = tl.load(pred + r * K + k, mask=counts & (k < K), other=0.0).to(tl.float32)
    e -= (u - tl.load(mean + r)) * tl.load(rstd + r)
    e = tl.where(counts, e * (tl.load(derrors + r) * (2.0 / K)), 0.0)
    tl.store(dpred + r * K + k, e.to(dpred.dtype.element_ty), mask=k < K)


# ---- tiles -----------------------------------------------------------------------------------

TILE = ("BM", "BC", "BK", "num_warps", "num_stages")  # patches, columns, voxels
TILES = {80: (128, 128, 32, 8, 3), 90: (128, 128, 64, 8, 3)}  # by kernels.family, in 16 bits
STRADDLING = 64, 64, 32, 8, 2  # 16 bits, each voxel with a map of its own
EXACT = 32, 32, 32, 4, 1  # float32: products without the tensor cores, out of registers


def tile_of(device, dtype, straddles):
    """The embedding's tile, by the names of TILE."""
    tile = STRADDLING if straddles else TILES[kernels.family(device)]
    return dict(zip(TILE, EXACT if dtype == torch.float32 else tile))


def whole_patch(K):
    """A program takes a patch of K voxels at once."""
    BK = triton.next_power_of_2(K)
    return {"BK": BK, "num_warps": max(1, min(16, BK // 1024))}


# ---- operators -------------------------------------------------------------------------------

Maybe = Tensor | None
VOXELS = (torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32)


def packed(x):
    return None if x is None else x.contiguous()


def survey(volume, low, scale, order, K):
    """Check them -> (source, sizes, strides) as the kernels take them, G, {P, STRADDLES}."""
    P = round(K ** (1 / 3))
    if P**3 != K or not 2 <= P <= 32:
        raise ValueError(f"patches of {K} voxels: a cube of 2 to 32 a side is needed")
    if volume.dtype not in VOXELS:
        raise ValueError(f"a volume of {volume.dtype}: {', '.join(map(str, VOXELS))} are known")
    B, X, Y, Z = volume.shape
    if X % P or Y % P or Z % P:
        raise ValueError(f"volume {X}x{Y}x{Z} is not a multiple of the patch {P} along every axis")
    G, S = X // P * (Y // P) * (Z // P), 1
    if low is not None:
        S = low.shape[1]
        low, scale = low.float(), scale.float()
        if low.shape != (B, S) or scale.shape != (B, S) or Z % S:
            raise ValueError(f"low and scale must be [{B}, S], S a divisor of {Z}")
    if order is not None and order.shape != (G,):
        raise ValueError(f"order {list(order.shape)} must list all {G} patches")
    source = volume, packed(low), packed(scale), packed(order)
    sizes = S, Z // S, Y // P, Z // P
    return (source, sizes, volume.stride()), G, {"P": P, "STRADDLES": Z // S % P != 0}


@torch.library.custom_op("ar3d::patch_embed", mutates_args=())
def embed_op(
    volume: Tensor, low: Maybe, scale: Maybe, order: Maybe, weight: Tensor, bias: Tensor,
    table: Tensor, count: int, begin: Maybe, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """-> tokens [B, T, C], T = count, and one more where there is a begin token.

    They are float32, as the residual stream that begins with them; the products are of `dtype`.
    """
    (C, K), B, T = weight.shape, len(volume), count + (begin is not None)
    given, G, meta = survey(volume, low, scale, order, K)
    if not 0 <= count <= G or len(table) < count:
        raise ValueError(f"{count} patches of a volume of {G}, with {len(table)} positions")
    out = torch.empty((B, T, C), dtype=torch.float32, device=volume.device)
    tile = tile_of(volume.device, dtype, meta["STRADDLES"])
    programs = triton.cdiv(B * T, tile["BM"]) * triton.cdiv(C, tile["BC"])
    weight, bias, table = weight.to(dtype).contiguous(), bias.contiguous(), table.contiguous()
    given += weight, bias, packed(begin), table, out, B * T, T, C
    meta["BEGIN"] = begin is not None
    kernels.launch(embed_kernel, programs, volume.device, *given, **meta, **tile)
    return out


@embed_op.register_fake
def _(volume, low, scale, order, weight, bias, table, count, begin, dtype):
    T = count + (begin is not None)
    return volume.new_empty((volume.shape[0], T, weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("ar3d::patch_embed_weight", mutates_args=())
def embed_weight_op(
    volume: Tensor, low: Maybe, scale: Maybe, order: Maybe, dout: Tensor, K: int
) -> Tensor:
    """dout [B, n, C] of the first n patches -> gradient of the weight [C, K], in its type."""
    (B, n, C), (given, _, meta) = dout.shape, survey(volume, low, scale, order, K)
    u = torch.empty((B, n, K), dtype=dout.dtype, device=volume.device)
    kernels.launch(unfold_kernel, B * n, volume.device, *given, u, n, **meta, **whole_patch(K))
    return dout.reshape(-1, C).mT @ u.view(-1, K)


@embed_weight_op.register_fake
def _(volume, low, scale, order, dout, K):
    return dout.new_empty((dout.shape[2], K))


def keep_embed(ctx, inputs, output):
    *source, weight, bias, _, _, begin, ctx.dtype = inputs
    ctx.save_for_backward(*source)
    ctx.K = weight.shape[1]
    ctx.types = weight.dtype, bias.dtype, None if begin is None else begin.dtype


def differentiate_embed(ctx, dout):
    weight_type, bias_type, begin_type = ctx.types
    begin = begin_type is not None
    source = ctx.saved_tensors
    dweight = embed_weight_op(*source, dout[:, begin:].to(ctx.dtype), ctx.K).to(weight_type)
    dbias = dout[:, begin:].sum((0, 1), dtype=torch.float32).to(bias_type)
    dbegin = dout[:, 0].sum(0, dtype=torch.float32).to(begin_type) if begin else None
    return None, None, None, None, dweight, dbias, None, None, dbegin, None


embed_op.register_autograd(differentiate_embed, setup_context=keep_embed)


@torch.library.custom_op("ar3d::patch_loss", mutates_args=())
def loss_op(
    volume: Tensor, low: Maybe, scale: Maybe, order: Maybe, pred: Tensor, prefix: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """-> errors, mean and 1/√(var + 1e-6) of the patches, float32 [B, G] each.

    Before the prefix, errors are 0, mean and scale arbitrary.
    """
    B, G, K = pred.shape
    given, have, meta = survey(volume, low, scale, order, K)
    if have != G or len(volume) != B:
        raise ValueError(f"pred {list(pred.shape)} of {len(volume)} volumes of {have} patches")
    saved = [torch.empty((B, G), dtype=torch.float32, device=volume.device) for _ in range(3)]
    given += pred.contiguous(), packed(prefix), *saved, G
    kernels.launch(loss_kernel, B * G, volume.device, *given, **meta, **whole_patch(K))
    return tuple(saved)


@loss_op.register_fake
def _(volume, low, scale, order, pred, prefix):
    return tuple(pred.new_empty(pred.shape[:2], dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("ar3d::patch_loss_backward", mutates_args=())
def loss_backward_op(
    volume: Tensor, low: Maybe, scale: Maybe, order: Maybe, pred: Tensor, prefix: Maybe,
    mean: Tensor, rstd: Tensor, derrors: Tensor,
) -> Tensor:  # fmt: skip
    """derrors [B, G] and what loss_op took and gave -> dpred [B, G, K]."""
    B, G, K = pred.shape
    given, _, meta = survey(volume, low, scale, order, K)
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    given += pred.contiguous(), dpred, packed(prefix), derrors.contiguous(), mean, rstd, G
    kernels.launch(loss_backward_kernel, B * G, volume.device, *given, **meta, **whole_patch(K))
    return dpred


@loss_backward_op.register_fake
def _(volume, low, scale, order, pred, *_):
    return pred.new_empty(pred.shape)


def keep_loss(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def differentiate_loss(ctx, derrors, *_):
    dpred = loss_backward_op(*ctx.saved_tensors, derrors)
    return None, None, None, None, dpred, None


loss_op.register_autograd(differentiate_loss, setup_context=keep_loss)
