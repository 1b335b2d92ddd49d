"""Prefix-causal attention: row i of sample b sees key j where j <= i or j < prefix[b]. Forward and backward in Triton.

Forward (online softmax: Milakov & Gimelshein 2018; in tiles: FlashAttention-2, Dao 2023). With s_ij = c·q_i·k_j and
c = log2(e)/√D, so that exp2 takes the place of exp, a tile of rows walks over its keys and keeps, for each row, the
largest score m so far, l = Σ exp2(s − m) and a = Σ exp2(s − m)·v. A larger score m' found later scales l and a by
exp2(m − m'). In the end out = a / l, and L = m + log2(l), the base-2 log-sum-exp, is all that the backward needs.

Backward. P = exp2(s − L) is recomputed tile by tile. With dP = dO·Vᵀ and δ_i = Σ_j P_ij·dP_ij = dO_i·O_i (one pre-pass):
    dV = Pᵀ·dO        dS = P∘(dP − δ)        dQ = dS·K/√D        dK = dSᵀ·Q/√D
One kernel owns tiles of keys and walks over rows (dK, dV), one owns tiles of rows and walks over keys (dQ): the scores
are computed twice, but no two programs add to one place, so that the gradient is the same to the bit in every run.

Work that the mask rules out is never begun. A tile of rows from m0 on needs no mask for the keys before max(P, m0 + 1)
and sees none from max(P, m0 + rows) on, P being the prefix; a tile of keys from n0 on starts at row 0 where n0 < P, else
at its own diagonal. Mask or no mask is decided by the tile, and there is no N×N array anywhere, nor a prefix on the host.

Sections: reference · kernels · tiles · wrappers · operators · the public function

B batch, N tokens, H heads, D width of a head (DP: padded to a power of two), P prefix, c scale, m0 n0 first row, first key.
"""
import math

import torch
import triton
import triton.language as tl

import kernels

# ---------------------------------------------------------------- reference


def reference(qkv, prefix):
    """The same in PyTorch, in the precision of `qkv` (float64 too): out [B, N, H, D], base-2 log-sum-exp [B, H, N]."""
    B, N, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                               # each [B, H, N, D]
    i = torch.arange(N, device=qkv.device)
    seen = (i <= i[:, None]) | (i < prefix[:, None, None])                             # [B, N, N]
    scores = (q @ k.mT * D ** -0.5).masked_fill(~seen[:, None], float("-inf"))
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2), scores.logsumexp(-1) / math.log(2)


# ---------------------------------------------------------------- kernels


@triton.jit
def read(start, rows, cols, stride_n, stride_d, left, D: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a matrix of D columns that begins at `start`: [rows, cols], zero past column D and, unless WHOLE, past row `left`."""
    at = start + rows[:, None] * stride_n + cols[None, :] * stride_d
    if D == cols.shape[0]:
        if WHOLE:
            return tl.load(at)
        else:
            return tl.load(at, mask=rows[:, None] < left, other=0.0)
    else:
        if WHOLE:
            return tl.load(at, mask=cols[None, :] < D, other=0.0)
        else:
            return tl.load(at, mask=(rows[:, None] < left) & (cols[None, :] < D), other=0.0)


@triton.jit
def forward_keys(acc, total, top, q, k_start, v_start, i, P, lo, hi, N, stride_n, stride_d, c,
                 D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """Take the keys lo … hi − 1 into the running softmax of the rows i: acc [BM, DP], total [BM], top [BM]."""
    step = tl.cast(stride_n, tl.int64)
    rows = tl.arange(0, BN)
    cols = tl.arange(0, acc.shape[1])
    for n in range(lo, hi, BN):
        # -- scores --
        k = read(k_start + n * step, rows, cols, stride_n, stride_d, N - n, D, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                             # [BM, BN]
        if MASKED:
            j = n + rows
            s = tl.where((j[None, :] <= i[:, None]) | (j[None, :] < P), s, float("-inf"))
        # -- running softmax: the first tile holds key 0, which all rows see, so `larger` is finite --
        larger = tl.maximum(top, tl.max(s, 1) * c)
        p = tl.exp2(s * c - larger[:, None])
        shrink = tl.exp2(top - larger)
        total = total * shrink + tl.sum(p, 1)
        # -- values --
        v = read(v_start + n * step, rows, cols, stride_n, stride_d, N - n, D, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = larger
    return acc, total, top


@triton.jit
def forward_kernel(qkv,            # [B, N, 3, H, D], any strides
                   prefix,         # [B]
                   out,            # [B, N, H, D], contiguous
                   lse,            # [B, H, N], contiguous, float32
                   N, H, stride_b, stride_n, stride_t, stride_h, stride_d, c,
                   D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tiles = tl.cdiv(N, BM)
    head = tl.cast(tl.program_id(0) // tiles, tl.int64)                                # of B·H
    b, h = head // H, head % H
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BM                                   # the last rows see most: heaviest first
    P = tl.minimum(tl.load(prefix + b), N).to(tl.int32)
    q_start = qkv + b * stride_b + h * stride_h
    k_start = q_start + stride_t
    v_start = k_start + stride_t

    rows, cols = tl.arange(0, BM), tl.arange(0, DP)
    i = m0 + rows
    q = read(q_start + m0 * tl.cast(stride_n, tl.int64), rows, cols, stride_n, stride_d, N - m0, D, False)
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    plain = tl.maximum(P, m0 + 1) // BN * BN                                           # keys before this need no mask
    end = tl.minimum(N, tl.maximum(P, m0 + BM))
    acc, total, top = forward_keys(acc, total, top, q, k_start, v_start, i, P, 0, plain, N, stride_n, stride_d, c, D, BN, False)
    acc, total, top = forward_keys(acc, total, top, q, k_start, v_start, i, P, plain, end, N, stride_n, stride_d, c, D, BN, True)

    at = out + ((b * N + i[:, None]) * H + h) * D + cols[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(i[:, None] < N) & (cols[None, :] < D))
    tl.store(lse + head * N + i, top + tl.log2(total), mask=i < N)


@triton.jit
def delta_kernel(out, dout,        # [B, N, H, D]: contiguous; any strides
                 delta,            # [B, H, N], contiguous, float32
                 N, H, stride_b, stride_n, stride_h, stride_d,
                 D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """δ_i = dO_i · O_i"""
    tiles = tl.cdiv(N, BM)
    head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b, h = head // H, head % H
    m0 = tl.program_id(0) % tiles * BM
    rows, cols = tl.arange(0, BM), tl.arange(0, DP)
    do = read(dout + b * stride_b + m0 * tl.cast(stride_n, tl.int64) + h * stride_h, rows, cols, stride_n, stride_d, N - m0, D, False)
    o = read(out + ((b * N + m0) * H + h) * D, rows, cols, H * D, 1, N - m0, D, False)
    tl.store(delta + head * N + m0 + rows, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=m0 + rows < N)


@triton.jit
def backward_rows(dk, dv, k, v, q_start, do_start, lse, delta, j, P, lo, hi, N, stride_n, stride_d, do_stride_n, do_stride_d, c,
                  D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr):
    """Add what the rows lo … hi − 1 give to the keys j: dk, dv [BN, DP]. Everything is transposed: keys down, rows across."""
    step, do_step = tl.cast(stride_n, tl.int64), tl.cast(do_stride_n, tl.int64)
    rows = tl.arange(0, BM)
    cols = tl.arange(0, dk.shape[1])
    for m in range(lo, hi, BM):
        i = m + rows
        # -- probabilities; rows past N are read as zeros, and so add nothing --
        q = read(q_start + m * step, rows, cols, stride_n, stride_d, N - m, D, False)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")                             # [BN, BM]
        if MASKED:
            s = tl.where((j[:, None] <= i[None, :]) | (j[:, None] < P), s, float("-inf"))
        p = tl.exp2(s * c - tl.load(lse + i, mask=i < N, other=0.0)[None, :])
        # -- dV --
        do = read(do_start + m * do_step, rows, cols, do_stride_n, do_stride_d, N - m, D, False)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        # -- dS, dK --
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")                           # [BN, BM]
        ds = p * (dp - tl.load(delta + i, mask=i < N, other=0.0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_kv_kernel(qkv, prefix,      # [B, N, 3, H, D], any strides; [B]
                       dout,             # [B, N, H, D], any strides
                       lse, delta,       # [B, H, N], contiguous, float32
                       dqkv,             # [B, N, 3, H, D], contiguous: dK and dV are written here
                       N, H, stride_b, stride_n, stride_t, stride_h, stride_d,
                       do_stride_b, do_stride_n, do_stride_h, do_stride_d, c, scale,
                       D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tiles = tl.cdiv(N, BN)
    head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b, h = head // H, head % H
    n0 = tl.program_id(0) % tiles * BN                                                 # the first keys are seen by most: heaviest first
    P = tl.minimum(tl.load(prefix + b), N).to(tl.int32)
    q_start = qkv + b * stride_b + h * stride_h
    k_start = q_start + stride_t
    v_start = k_start + stride_t
    do_start = dout + b * do_stride_b + h * do_stride_h
    lse += head * N
    delta += head * N

    rows, cols = tl.arange(0, BN), tl.arange(0, DP)
    j = n0 + rows
    step = tl.cast(stride_n, tl.int64)
    k = read(k_start + n0 * step, rows, cols, stride_n, stride_d, N - n0, D, False)
    v = read(v_start + n0 * step, rows, cols, stride_n, stride_d, N - n0, D, False)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    start = tl.where(n0 < P, 0, n0 // BM * BM)
    plain = tl.where(n0 + BN <= P, 0, tl.cdiv(n0 + BN, BM) * BM)                       # rows from here on need no mask
    dk, dv = backward_rows(dk, dv, k, v, q_start, do_start, lse, delta, j, P, start, tl.minimum(plain, N), N,
                           stride_n, stride_d, do_stride_n, do_stride_d, c, D, BM, True)
    dk, dv = backward_rows(dk, dv, k, v, q_start, do_start, lse, delta, j, P, plain, N, N,
                           stride_n, stride_d, do_stride_n, do_stride_d, c, D, BM, False)

    at = dqkv + (((b * N + j[:, None]) * 3 + 1) * H + h) * D + cols[None, :]
    inside = (j[:, None] < N) & (cols[None, :] < D)
    tl.store(at, (dk * scale).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(at + H * D, dv.to(dqkv.dtype.element_ty), mask=inside)


@triton.jit
def backward_keys(dq, q, do, L, delta, k_start, v_start, i, P, lo, hi, N, stride_n, stride_d, c,
                  D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """Add what the keys lo … hi − 1 give to the rows i: dq [BM, DP]."""
    step = tl.cast(stride_n, tl.int64)
    rows = tl.arange(0, BN)
    cols = tl.arange(0, dq.shape[1])
    for n in range(lo, hi, BN):
        k = read(k_start + n * step, rows, cols, stride_n, stride_d, N - n, D, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                             # [BM, BN]
        if MASKED:
            j = n + rows
            s = tl.where((j[None, :] <= i[:, None]) | (j[None, :] < P), s, float("-inf"))
        p = tl.exp2(s * c - L[:, None])
        v = read(v_start + n * step, rows, cols, stride_n, stride_d, N - n, D, not MASKED)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def backward_q_kernel(qkv, prefix,       # [B, N, 3, H, D], any strides; [B]
                      dout,              # [B, N, H, D], any strides
                      lse, delta,        # [B, H, N], contiguous, float32
                      dqkv,              # [B, N, 3, H, D], contiguous: dQ is written here
                      N, H, stride_b, stride_n, stride_t, stride_h, stride_d,
                      do_stride_b, do_stride_n, do_stride_h, do_stride_d, c, scale,
                      D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tiles = tl.cdiv(N, BM)
    head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b, h = head // H, head % H
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BM
    P = tl.minimum(tl.load(prefix + b), N).to(tl.int32)
    q_start = qkv + b * stride_b + h * stride_h
    k_start = q_start + stride_t
    v_start = k_start + stride_t

    rows, cols = tl.arange(0, BM), tl.arange(0, DP)
    i = m0 + rows
    q = read(q_start + m0 * tl.cast(stride_n, tl.int64), rows, cols, stride_n, stride_d, N - m0, D, False)
    do = read(dout + b * do_stride_b + h * do_stride_h + m0 * tl.cast(do_stride_n, tl.int64), rows, cols,
              do_stride_n, do_stride_d, N - m0, D, False)
    L = tl.load(lse + head * N + i, mask=i < N, other=0.0)
    d = tl.load(delta + head * N + i, mask=i < N, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    plain = tl.maximum(P, m0 + 1) // BN * BN
    end = tl.minimum(N, tl.maximum(P, m0 + BM))
    dq = backward_keys(dq, q, do, L, d, k_start, v_start, i, P, 0, plain, N, stride_n, stride_d, c, D, BN, False)
    dq = backward_keys(dq, q, do, L, d, k_start, v_start, i, P, plain, end, N, stride_n, stride_d, c, D, BN, True)

    at = dqkv + ((b * N + i[:, None]) * 3 * H + h) * D + cols[None, :]
    tl.store(at, (dq * scale).to(dqkv.dtype.element_ty), mask=(i[:, None] < N) & (cols[None, :] < D))


# ---------------------------------------------------------------- tiles

# (family of GPU: kernels.family, N above 1024, padded D above 64): (rows, keys, warps, stages) of forward, dK/dV and dQ.
# A table instead of Triton's autotuner, since the ranks of one run could settle on different tiles.
TILES = {
    (80, False, False): ((64, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2)),
    (80, False, True): ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2)),
    (80, True, False): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    (80, True, True): ((128, 64, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2)),
    (90, False, False): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (90, False, True): ((64, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2)),
    (90, True, False): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (90, True, True): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
}
EXACT = {  # padded D: the same in float32, whose exact products are made without the tensor cores, out of registers
    32: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    64: ((32, 32, 8, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    128: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
FORWARD, BACKWARD_KV, BACKWARD_Q = range(3)


def tiles(kernel, device, N, DP, dtype):
    """(rows, keys, warps, stages) of a kernel: FORWARD, BACKWARD_KV or BACKWARD_Q."""
    if dtype == torch.float32:
        return EXACT[max(DP, 32)][kernel]
    return TILES[kernels.family(device), N > 1024, DP > 64][kernel]


# ---------------------------------------------------------------- wrappers


def padded(D):
    """The head's width as a tile has it: a power of two, 16 at least."""
    if D > 128:
        raise ValueError(f"heads of width {D}: these kernels take 1 to 128")
    return max(16, 1 << (D - 1).bit_length())


def addressable(x):
    """`x`, copied if its strides are so large that an offset within a tile would pass 2³¹."""
    return x if 128 * max(x.stride(1), x.stride(-1)) < 2 ** 31 else x.contiguous()


def forward(qkv, prefix):
    """qkv [B, N, 3, H, D], prefix [B] -> out [B, N, H, D], base-2 log-sum-exp [B, H, N]."""
    B, N, three, H, D = qkv.shape
    if three != 3 or prefix.shape != (B,) or qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32) or prefix.is_floating_point():
        raise ValueError(f"prefix_attention: qkv {list(qkv.shape)} {qkv.dtype} must be [B, N, 3, H, D] in 16 or 32 bits, "
                         f"and prefix {list(prefix.shape)} {prefix.dtype} integers [B]")
    qkv, prefix, DP = addressable(qkv), prefix.contiguous(), padded(D)
    out = torch.empty((B, N, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=qkv.device)
    BM, BN, warps, stages = tiles(FORWARD, qkv.device, N, DP, qkv.dtype)
    kernels.launch(forward_kernel, triton.cdiv(N, BM) * B * H, qkv.device, qkv, prefix, out, lse, N, H, *qkv.stride(),
                   D ** -0.5 * math.log2(math.e), D=D, DP=DP, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
    return out, lse


def backward(dout, qkv, prefix, out, lse):
    """dout [B, N, H, D] and what forward took and gave -> dqkv [B, N, 3, H, D]."""
    B, N, _, H, D = qkv.shape
    qkv, dout, prefix, out, DP = addressable(qkv), addressable(dout), prefix.contiguous(), out.contiguous(), padded(D)
    delta = torch.empty((B, H, N), dtype=torch.float32, device=qkv.device)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    BM = 4096 // DP
    kernels.launch(delta_kernel, triton.cdiv(N, BM) * B * H, qkv.device, out, dout, delta, N, H, *dout.stride(), D=D, DP=DP, BM=BM)
    given = (qkv, prefix, dout, lse, delta, dqkv, N, H, *qkv.stride(), *dout.stride(), D ** -0.5 * math.log2(math.e), D ** -0.5)
    BM, BN, warps, stages = tiles(BACKWARD_KV, qkv.device, N, DP, qkv.dtype)
    kernels.launch(backward_kv_kernel, triton.cdiv(N, BN) * B * H, qkv.device, *given,
                   D=D, DP=DP, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
    BM, BN, warps, stages = tiles(BACKWARD_Q, qkv.device, N, DP, qkv.dtype)
    kernels.launch(backward_q_kernel, triton.cdiv(N, BM) * B * H, qkv.device, *given,
                   D=D, DP=DP, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
    return dqkv


# ---------------------------------------------------------------- operators


@torch.library.custom_op("ar3d::prefix_attention", mutates_args=())
def forward_op(qkv: torch.Tensor, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(qkv, prefix)


@forward_op.register_fake
def _(qkv, prefix):
    B, N, _, H, D = qkv.shape
    return qkv.new_empty((B, N, H, D)), qkv.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op("ar3d::prefix_attention_backward", mutates_args=())
def backward_op(dout: torch.Tensor, qkv: torch.Tensor, prefix: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return backward(dout, qkv, prefix, out, lse)


@backward_op.register_fake
def _(dout, qkv, prefix, out, lse):
    return qkv.new_empty(qkv.shape)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, dout, _):
    return backward_op(dout, *ctx.saved_tensors), None


forward_op.register_autograd(differentiate, setup_context=keep)

# ---------------------------------------------------------------- the public function


def prefix_attention(qkv, prefix):
    """Softmax attention in which row i of sample b sees key j where j <= i or j < prefix[b].

    qkv [B, N, 3, H, D] in bfloat16, float16 or float32 (float32 is multiplied exactly, without TF32), of any strides, D up to
    128; prefix [B] integers on the same device, any value (below 0 as 0, above N as N) -> [B, N, H, D], contiguous.
    The gradient is one packed tensor as well, the same to the bit in every run.
    """
    return forward_op(qkv, prefix)[0]
