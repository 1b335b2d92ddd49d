"""Voxels to tokens, and the loss against the voxels of a patch, straight from the volume as the loader gave it.

`patch_embed` is a matrix product whose left side is never written down (an implicit GEMM): with u the voxels mapped to
[0, 1],  token[b, i] = Σ_k u[b, patch i, k]·W[·, k] + bias + table[i],  and the address of voxel k = (x·P + y)·P + z of a
patch is corner + x·stride_x + y·stride_y + z·stride_z. Tiles of [patches, voxels] are read where they lie, in whatever
type and strides, mapped  u = clamp((v − low)·scale, 0, 1)  in registers and multiplied; bias, position and, in row 0 of
each sample, the begin token are added before the one write. The gradient of the weight is the same product turned:
dW[c, k] = Σ_rows dtoken[row, c]·u[row, k], its rows split over programs whose parts are then added in a fixed order.

`patch_loss` is the mean squared error of each predicted patch against t = (u − mean)·r, r = 1/√(var + 1e-6), by the
patch's own mean and unbiased variance. One program takes one patch. The backward, dpred = 2·(pred − t)/P³ · derror, reads
the voxels again and needs only mean and r. So the volume has no copy in floating point, and its patches no copy at all.

Sections: references · kernels · wrappers · operators · the public functions

B batch, X Y Z voxels, P patch edge, K = P³ voxels of a patch, G patches of a volume, S sub-images laid side by side along
z, C width, T tokens of a sample (a begin token and the patches), M = B·T rows.
"""
from typing import Optional

import torch
import triton
import triton.language as tl

import kernels

# ---------------------------------------------------------------- references


def unit_patches(volume, low, scale, P, order=None, dtype=torch.float32):
    """The voxels in [0, 1] of the patches, in order: [B, G, P³]. low, scale [B, S], or None: the voxels as they are."""
    B, X, Y, Z = volume.shape
    v = volume.to(dtype)
    if low is not None:
        low, scale = (w.to(dtype).repeat_interleave(Z // w.shape[1], 1)[:, None, None] for w in (low, scale))  # [B, 1, 1, Z]
        v = ((v - low) * scale).clamp(0, 1)
    v = v.reshape(B, X // P, P, Y // P, P, Z // P, P).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, P ** 3)
    return v if order is None else v[:, order]


def embed_reference(volume, low, scale, weight, bias, table, order=None, count=None, begin=None):
    """patch_embed in PyTorch, in the precision of `weight` (float64 too)."""
    u = unit_patches(volume, low, scale, round(weight.shape[1] ** (1 / 3)), order, weight.dtype)[:, :count]
    x = u @ weight.T + bias + table[:u.shape[1]].to(weight.dtype)                      # [B, count, C]
    return x if begin is None else torch.cat([begin.expand(len(x), 1, -1), x], 1)


def loss_reference(pred, volume, low, scale, order=None, prefix=None):
    """patch_loss in PyTorch, in the precision of `pred` (float64 too)."""
    u = unit_patches(volume, low, scale, round(pred.shape[2] ** (1 / 3)), order, pred.dtype)
    target = (u - u.mean(-1, keepdim=True)) / (u.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (pred - target).square().mean(-1)                                         # [B, G]
    return errors if prefix is None else errors * (torch.arange(errors.shape[1], device=pred.device) >= prefix[:, None])


# ---------------------------------------------------------------- kernels


@triton.jit
def locate(b, place, inside, order, GY, GZ, stride_b, stride_x, stride_y, stride_z, P: tl.constexpr):
    """Where the patch at `place` of sample b begins: its offset in the volume (int64) and its z."""
    patch = place
    if order is not None:
        patch = tl.load(order + place, mask=inside, other=0)
    x, y, z = patch // (GY * GZ) * P, patch // GZ % GY * P, patch % GZ * P
    corner = tl.cast(b, tl.int64) * stride_b + tl.cast(x, tl.int64) * stride_x
    return corner + tl.cast(y, tl.int64) * stride_y + tl.cast(z, tl.int64) * stride_z, z


@triton.jit
def to_unit(v, low, scale):
    return tl.minimum(tl.maximum((v - low) * scale, 0.0), 1.0)


@triton.jit
def read_unit(volume, corner, b, z, lo, sc, inside, k, low, scale, S, depth, stride_x, stride_y, stride_z,
              P: tl.constexpr, STRADDLES: tl.constexpr):
    """Voxels k [1, n] of patches at `corner` [m, 1], in [0, 1], float32 [m, n]. lo, sc [m, 1]: their sub-image's map."""
    K: tl.constexpr = P * P * P
    x, y, z_in = k // (P * P), k // P % P, k % P
    at = tl.cast(x, tl.int64) * stride_x + tl.cast(y, tl.int64) * stride_y + tl.cast(z_in, tl.int64) * stride_z
    v = tl.load(volume + corner + at, mask=inside & (k < K), other=0).to(tl.float32)
    if low is not None:
        if STRADDLES:  # a patch may have voxels of several sub-images: each voxel looks its own up
            image = b * S + (z + z_in) // depth
            lo = tl.load(low + image, mask=inside & (k < K), other=0.0)
            sc = tl.load(scale + image, mask=inside & (k < K), other=0.0)
        v = to_unit(v, lo, sc)
    return v


@triton.jit
def find_rows(r, M, T, order, low, scale, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
              P: tl.constexpr, BEGIN: tl.constexpr, STRADDLES: tl.constexpr):
    """For rows r [m, 1] of the tokens: sample, place in the sequence, whether there is a patch, its corner, z and map."""
    b, place = r // T, r % T - BEGIN
    inside = (r < M) & (place >= 0)
    b = tl.where(inside, b, 0)
    corner, z = locate(b, tl.where(inside, place, 0), inside, order, GY, GZ, stride_b, stride_x, stride_y, stride_z, P)
    lo, sc = 0.0, 1.0
    if low is not None:
        if not STRADDLES:
            lo = tl.load(low + b * S + z // depth, mask=inside, other=0.0)
            sc = tl.load(scale + b * S + z // depth, mask=inside, other=0.0)
    return b, place, inside, corner, z, lo, sc


@triton.jit
def embed_kernel(volume,                 # [B, X, Y, Z], any type and strides
                 low, scale,             # [B, S] float32, or None
                 weight,                 # [C, K], contiguous, of the type of `out`
                 bias, begin,            # [C]; begin may be None
                 table,                  # [G, C], contiguous
                 order,                  # [G] or None
                 out,                    # [M, C], contiguous
                 M, T, C, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                 P: tl.constexpr, BEGIN: tl.constexpr, STRADDLES: tl.constexpr,
                 BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    K: tl.constexpr = P * P * P
    across = tl.cdiv(C, BC)
    r = tl.program_id(0) // across * BM + tl.arange(0, BM)[:, None]                    # programs of the same patches run together
    c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    b, place, inside, corner, z, lo, sc = find_rows(r, M, T, order, low, scale, S, depth, GY, GZ,
                                                    stride_b, stride_x, stride_y, stride_z, P, BEGIN, STRADDLES)
    acc = tl.zeros([BM, BC], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        u = read_unit(volume, corner, b, z, lo, sc, inside, k[None, :], low, scale, S, depth, stride_x, stride_y, stride_z, P, STRADDLES)
        w = tl.load(weight + c[:, None] * K + k[None, :], mask=(c[:, None] < C) & (k[None, :] < K), other=0.0)
        acc = tl.dot(u.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    # -- bias, position; the begin token takes the row that no patch has --
    here = c[None, :] < C
    acc += tl.load(bias + c[None, :], mask=here, other=0.0).to(tl.float32)
    acc += tl.load(table + place * C + c[None, :], mask=inside & here, other=0.0).to(tl.float32)
    if BEGIN:
        acc = tl.where(place < 0, tl.load(begin + c[None, :], mask=here, other=0.0).to(tl.float32), acc)
    tl.store(out + tl.cast(r, tl.int64) * C + c[None, :], acc.to(out.dtype.element_ty), mask=(r < M) & here)


@triton.jit
def embed_weight_kernel(volume, low, scale, order,   # as embed_kernel has them
                        dout,                        # [M, C], contiguous
                        parts,                       # [splits, C, K], contiguous, float32: sums over `share` rows each
                        share, M, T, C, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                        P: tl.constexpr, BEGIN: tl.constexpr, STRADDLES: tl.constexpr,
                        BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    K: tl.constexpr = P * P * P
    down, across = tl.cdiv(C, BC), tl.cdiv(K, BK)
    split = tl.program_id(0) // (down * across)
    c = tl.program_id(0) % down * BC + tl.arange(0, BC)                                # programs of the same voxels run together
    k = tl.program_id(0) // down % across * BK + tl.arange(0, BK)
    acc = tl.zeros([BC, BK], tl.float32)
    for r0 in range(split * share, tl.minimum(M, (split + 1) * share), BM):
        r = r0 + tl.arange(0, BM)[:, None]
        b, place, inside, corner, z, lo, sc = find_rows(r, M, T, order, low, scale, S, depth, GY, GZ,
                                                        stride_b, stride_x, stride_y, stride_z, P, BEGIN, STRADDLES)
        u = read_unit(volume, corner, b, z, lo, sc, inside, k[None, :], low, scale, S, depth, stride_x, stride_y, stride_z, P, STRADDLES)
        g = tl.load(dout + tl.cast(r, tl.int64) * C + c[None, :], mask=inside & (c[None, :] < C), other=0.0)  # [BM, BC]
        acc = tl.dot(tl.trans(g), u.to(g.dtype), acc, input_precision="ieee")
    at = parts + (tl.cast(split, tl.int64) * C + c[:, None]) * K + k[None, :]
    tl.store(at, acc, mask=(c[:, None] < C) & (k[None, :] < K))


@triton.jit
def read_patch(volume, low, scale, order, prefix, G, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
               P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr):
    """This program's patch: row [1, 1] of B·G, whether it counts, its voxel numbers k [1, BK], and they, in [0, 1]."""
    r = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    b, place = r // G, r % G
    k = tl.arange(0, BK)[None, :]
    counts = place >= 0
    if prefix is not None:
        counts = place >= tl.load(prefix + b)                                          # nothing is read for those before
    corner, z = locate(b, place, counts, order, GY, GZ, stride_b, stride_x, stride_y, stride_z, P)
    lo, sc = 0.0, 1.0
    if low is not None:
        lo, sc = tl.load(low + b * S + z // depth), tl.load(scale + b * S + z // depth)
    u = read_unit(volume, corner, b, z, lo, sc, counts, k, low, scale, S, depth, stride_x, stride_y, stride_z, P, STRADDLES)
    return tl.cast(r, tl.int64), counts, k, u


@triton.jit
def loss_kernel(pred,                                # [B, G, K], contiguous
                volume, low, scale, order, prefix,   # as embed_kernel has them; prefix [B] or None
                errors, mean, rstd,                  # [B, G], contiguous, float32
                G, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr):
    K: tl.constexpr = P * P * P
    r, counts, k, u = read_patch(volume, low, scale, order, prefix, G, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                                 P, STRADDLES, BK)
    inside = counts & (k < K)
    m = tl.sum(tl.where(inside, u, 0.0), 1, keep_dims=True) / K
    u = tl.where(inside, u - m, 0.0)
    s = 1.0 / tl.sqrt_rn(tl.sum(u * u, 1, keep_dims=True) / (K - 1) + 1e-6)
    e = tl.load(pred + r * K + k, mask=inside, other=0.0).to(tl.float32) - u * s
    tl.store(errors + r, tl.sum(e * e, 1, keep_dims=True) / K)
    tl.store(mean + r, m)
    tl.store(rstd + r, s)


@triton.jit
def loss_backward_kernel(derrors, mean, rstd,        # [B, G], contiguous, float32
                         pred, dpred,                # [B, G, K], contiguous
                         volume, low, scale, order, prefix,
                         G, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                         P: tl.constexpr, STRADDLES: tl.constexpr, BK: tl.constexpr):
    K: tl.constexpr = P * P * P
    r, counts, k, u = read_patch(volume, low, scale, order, prefix, G, S, depth, GY, GZ, stride_b, stride_x, stride_y, stride_z,
                                 P, STRADDLES, BK)
    e = tl.load(pred + r * K + k, mask=counts & (k < K), other=0.0).to(tl.float32) - (u - tl.load(mean + r)) * tl.load(rstd + r)
    e = tl.where(counts, e * (tl.load(derrors + r) * (2.0 / K)), 0.0)
    tl.store(dpred + r * K + k, e.to(dpred.dtype.element_ty), mask=k < K)


# ---------------------------------------------------------------- wrappers

TILES = {  # family of GPU: (patches, columns, voxels, warps, stages) of the embedding and of its weight gradient, in 16 bits
    80: ((128, 128, 32, 8, 3), (32, 128, 128, 8, 3)),
    90: ((128, 128, 64, 8, 3), (32, 128, 128, 8, 3)),
}
EXACT = ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1))      # float32: exact products are made without the tensor cores, out of registers
STRADDLING = ((64, 64, 32, 8, 2), (32, 64, 32, 8, 2))  # 16 bits, each voxel with a map of its own


def tiles(kernel, device, dtype, straddles):
    """(patches, columns, voxels, warps, stages) of kernel 0 (embedding) or 1 (its weight gradient)."""
    return (EXACT if dtype == torch.float32 else STRADDLING if straddles else TILES[kernels.family(device)])[kernel]


def edge(K):
    """P of patches of K = P³ voxels."""
    P = round(K ** (1 / 3))
    if P ** 3 != K or not 2 <= P <= 32:
        raise ValueError(f"patches of {K} voxels: a cube of 2 to 32 a side is needed")
    return P


def survey(volume, low, scale, P):
    """Check the shapes. -> low and scale (contiguous), S, depth, GY, GZ, G, and whether a patch may lie in two sub-images."""
    B, X, Y, Z = volume.shape
    if X % P or Y % P or Z % P:
        raise ValueError(f"volume {X}x{Y}x{Z} is not a multiple of the patch {P} along every axis")
    if (low is None) != (scale is None) or low is not None and (low.shape != scale.shape or len(low) != B or Z % low.shape[1]):
        raise ValueError(f"low and scale must both be [{B}, S], S a divisor of {Z}, or both be None")
    S = 1 if low is None else low.shape[1]
    low, scale = (None if w is None else w.float().contiguous() for w in (low, scale))
    return low, scale, (S, Z // S, Y // P, Z // P), X // P * (Y // P) * (Z // P), Z // S % P != 0


def voxels_dtype(volume):
    if volume.dtype not in (torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"a volume of {volume.dtype}: uint8, int16, float16, bfloat16 or float32 is needed")


def listed(order, G):
    if order is not None and order.shape != (G,):
        raise ValueError(f"order {list(order.shape)} must list all {G} patches")
    return None if order is None else order.contiguous()


def per_sample(prefix):
    return None if prefix is None else prefix.contiguous()


def embed(volume, low, scale, weight, bias, table, order, count, begin, dtype):
    """-> tokens [B, T, C] of type `dtype`, T = count, and one more where there is a begin token."""
    voxels_dtype(volume)
    (C, K), B = weight.shape, len(volume)
    P, T = edge(K), count + (begin is not None)
    low, scale, sizes, G, straddles = survey(volume, low, scale, P)
    if not 0 <= count <= G or len(table) < count:
        raise ValueError(f"{count} patches of a volume that has {G}, with {len(table)} positions")
    out = torch.empty((B, T, C), dtype=dtype, device=volume.device)
    BM, BC, BK, warps, stages = tiles(0, volume.device, dtype, straddles)
    kernels.launch(embed_kernel, triton.cdiv(B * T, BM) * triton.cdiv(C, BC), volume.device,
                   volume, low, scale, weight.to(dtype).contiguous(), bias.contiguous(), None if begin is None else begin.contiguous(),
                   table.contiguous(), listed(order, G), out, B * T, T, C, *sizes, *volume.stride(),
                   P=P, BEGIN=begin is not None, STRADDLES=straddles, BM=BM, BC=BC, BK=BK, num_warps=warps, num_stages=stages)
    return out


def embed_weight(dout, volume, low, scale, order, K, begin):
    """dout [B, T, C] -> gradient of the weight, float32 [C, K]."""
    B, T, C = dout.shape
    P = edge(K)
    low, scale, sizes, G, straddles = survey(volume, low, scale, P)
    BM, BC, BK, warps, stages = tiles(1, volume.device, dout.dtype, straddles)
    programs = triton.cdiv(C, BC) * triton.cdiv(K, BK)
    # parts enough to fill a large GPU some times over, of the shapes alone, so that the order of the sums is the same everywhere
    splits = max(1, min(triton.cdiv(B * T, 8 * BM), triton.cdiv(768, programs)))
    share = triton.cdiv(triton.cdiv(B * T, splits), BM) * BM
    parts = torch.empty((splits, C, K), dtype=torch.float32, device=volume.device)
    kernels.launch(embed_weight_kernel, programs * splits, volume.device, volume, low, scale, listed(order, G), dout.contiguous(), parts,
                   share, B * T, T, C, *sizes, *volume.stride(),
                   P=P, BEGIN=begin, STRADDLES=straddles, BM=BM, BC=BC, BK=BK, num_warps=warps, num_stages=stages)
    return parts.sum(0)


def loss(pred, volume, low, scale, order, prefix):
    """-> errors, mean and 1/√(var + 1e-6) of the patches, float32 [B, G] each; arbitrary mean and scale before the prefix."""
    voxels_dtype(volume)
    B, G, K = pred.shape
    P = edge(K)
    low, scale, sizes, have, straddles = survey(volume, low, scale, P)
    if have != G or len(volume) != B:
        raise ValueError(f"pred {list(pred.shape)} against {len(volume)} volumes of {have} patches")
    errors, mean, rstd = (torch.empty((B, G), dtype=torch.float32, device=volume.device) for _ in range(3))
    BK = triton.next_power_of_2(K)
    kernels.launch(loss_kernel, B * G, volume.device, pred.contiguous(), volume, low, scale, listed(order, G), per_sample(prefix),
                   errors, mean, rstd, G, *sizes, *volume.stride(), P=P, STRADDLES=straddles, BK=BK, num_warps=max(1, min(16, BK // 1024)))
    return errors, mean, rstd


def loss_backward(derrors, pred, volume, low, scale, order, prefix, mean, rstd):
    """derrors [B, G] and what loss took and gave -> dpred [B, G, K]."""
    B, G, K = pred.shape
    P = edge(K)
    low, scale, sizes, _, straddles = survey(volume, low, scale, P)
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    BK = triton.next_power_of_2(K)
    kernels.launch(loss_backward_kernel, B * G, volume.device, derrors.contiguous(), mean, rstd, pred.contiguous(), dpred,
                   volume, low, scale, listed(order, G), per_sample(prefix), G, *sizes, *volume.stride(),
                   P=P, STRADDLES=straddles, BK=BK, num_warps=max(1, min(16, BK // 1024)))
    return dpred


# ---------------------------------------------------------------- operators

Maybe = Optional[torch.Tensor]


@torch.library.custom_op("ar3d::patch_embed", mutates_args=())
def embed_op(volume: torch.Tensor, low: Maybe, scale: Maybe, weight: torch.Tensor, bias: torch.Tensor, table: torch.Tensor,
             order: Maybe, count: int, begin: Maybe, dtype: torch.dtype) -> torch.Tensor:
    return embed(volume, low, scale, weight, bias, table, order, count, begin, dtype)


@embed_op.register_fake
def _(volume, low, scale, weight, bias, table, order, count, begin, dtype):
    return volume.new_empty((volume.shape[0], count + (begin is not None), weight.shape[0]), dtype=dtype)


@torch.library.custom_op("ar3d::patch_embed_weight", mutates_args=())
def embed_weight_op(dout: torch.Tensor, volume: torch.Tensor, low: Maybe, scale: Maybe, order: Maybe, K: int, begin: bool) -> torch.Tensor:
    return embed_weight(dout, volume, low, scale, order, K, begin)


@embed_weight_op.register_fake
def _(dout, volume, low, scale, order, K, begin):
    return dout.new_empty((dout.shape[2], K), dtype=torch.float32)


def keep_embed(ctx, inputs, output):
    volume, low, scale, weight, bias, _, order, _, begin, _ = inputs
    ctx.save_for_backward(volume, low, scale, order)
    ctx.K, ctx.types = weight.shape[1], (weight.dtype, bias.dtype, None if begin is None else begin.dtype)


def differentiate_embed(ctx, dout):
    weight_type, bias_type, begin_type = ctx.types
    begin = begin_type is not None
    dweight = embed_weight_op(dout, *ctx.saved_tensors, ctx.K, begin).to(weight_type)
    dbias = dout[:, begin:].sum((0, 1), dtype=torch.float32).to(bias_type)
    dbegin = dout[:, 0].sum(0, dtype=torch.float32).to(begin_type) if begin else None
    return None, None, None, dweight, dbias, None, None, None, dbegin, None


embed_op.register_autograd(differentiate_embed, setup_context=keep_embed)


@torch.library.custom_op("ar3d::patch_loss", mutates_args=())
def loss_op(pred: torch.Tensor, volume: torch.Tensor, low: Maybe, scale: Maybe, order: Maybe,
            prefix: Maybe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return loss(pred, volume, low, scale, order, prefix)


@loss_op.register_fake
def _(pred, volume, low, scale, order, prefix):
    return tuple(pred.new_empty(pred.shape[:2], dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("ar3d::patch_loss_backward", mutates_args=())
def loss_backward_op(derrors: torch.Tensor, pred: torch.Tensor, volume: torch.Tensor, low: Maybe, scale: Maybe, order: Maybe,
                     prefix: Maybe, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    return loss_backward(derrors, pred, volume, low, scale, order, prefix, mean, rstd)


@loss_backward_op.register_fake
def _(derrors, pred, volume, low, scale, order, prefix, mean, rstd):
    return pred.new_empty(pred.shape)


def keep_loss(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def differentiate_loss(ctx, derrors, *_):
    return loss_backward_op(derrors, *ctx.saved_tensors), None, None, None, None, None


loss_op.register_autograd(differentiate_loss, setup_context=keep_loss)

# ---------------------------------------------------------------- the public functions


def patch_embed(volume, low, scale, weight, bias, table, order=None, count=None, begin=None):
    """Voxels -> tokens [B, T, C], in the dtype of autocast where it is on, else of `weight`.

    volume [B, X, Y, Z] in uint8, int16, float16, bfloat16 or float32, any strides; low, scale [B, S] float32: voxels of
    sub-image s become clamp((v − low)·scale, 0, 1), both None: as they are. weight [C, P³], the voxels of a patch in
    (x, y, z) order, z fastest; bias [C]; table [G, C]: what is added at each place of the sequence; order [G] integers: place
    i of the sequence holds patch order[i] (x-major, z fastest), None: i; count: of the patches that are taken, from the
    first place on (None: all). With begin [C], it is token 0 of each sample, the patches follow, and T = 1 + count.
    Gradients: weight, bias and begin, summed in float32 in an order that does not change. None for the rest.
    """
    if count is None:
        count = volume.shape[1] * volume.shape[2] * volume.shape[3] // weight.shape[1]
    kind = volume.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return embed_op(volume, low, scale, weight, bias, table, order, count, begin, dtype)


def patch_loss(pred, volume, low, scale, order=None, prefix=None):
    """Mean squared error of each predicted patch against its voxels, standardised by their own mean and variance: [B, G].

    pred [B, G, P³]; volume, low, scale and order as patch_embed takes them. The variance is the unbiased one, plus 1e-6.
    With prefix [B], the errors of the patches before it are 0, and nothing is read for them. float32, also under autocast.
    The gradient is that of pred alone.
    """
    return loss_op(pred, volume, low, scale, order, prefix)[0]
