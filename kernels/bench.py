"""The kernels and their rivals, timed in one run on the machine that it runs on.

    python -m kernels.bench                        # attention, patch embedding and loss, the whole step: a CUDA device
    python -m kernels.bench --part attention --quick
    python -m kernels.bench --part gate            # no GPU: compiles every kernel for sm_80, 90, 100, counts spills

Prints a table and writes it to --out, with a figure: median, p20 and p80 of `triton.testing.do_bench` (it empties the cache
between runs), averaged over several fresh sets of inputs with uniform random prefixes. FLOP are the useful ones: visible
pairs alone, a backward of attention as 2.5 forwards. What a rival may prepare once (dense masks, indices) is not timed;
FlexAttention's block mask is, since it changes with every batch. Without a CUDA device the PyTorch paths alone are timed,
at small sizes, which says nothing about a GPU: it shows that the script runs.

Sections: timing · attention · patches · the step · compile gate · reports · main

B batch, N tokens, H heads, D width of a head, P patch edge, G patches of a volume, C width.
"""
import argparse
import csv
import datetime
import importlib
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from common import BadInput, cli, matmul_rate, parallel, write_beside
from model import SIZES, Config, Model, patchify, positions, prefix_attention, standardise, to_unit

# ---------------------------------------------------------------- timing


def quantiles(fn, device, quick):
    """Median, 20th and 80th percentile of the milliseconds of fn()."""
    if device.type == "cuda":
        from triton.testing import do_bench
        return do_bench(fn, warmup=10 if quick else 50, rep=50 if quick else 300, quantiles=[0.5, 0.2, 0.8])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return torch.tensor(times[1:]).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def timed(runs, device, quick):
    """Means over `runs` (functions, one a set of inputs) of their median, p20 and p80, in ms."""
    return torch.tensor([quantiles(run, device, quick) for run in runs]).mean(0).tolist()


def attempt(fn, name, say):
    """fn(), or None with a line that says what went wrong: a rival that cannot run does not end the bench."""
    try:
        return fn()
    except (RuntimeError, ImportError, TypeError) as e:  # out of memory, a backend that refuses, torch.compile's errors
        say(f"{name}: not timed ({type(e).__name__}: {str(e).strip().splitlines()[0][:120] if str(e).strip() else ''})")
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- attention


def visible(N, prefix):
    """Pairs that the mask leaves, summed over the samples of `prefix` (the lengths themselves: begin token included)."""
    p = prefix.double().clamp(1, N)
    return (N * (N + 1) / 2 + p * (p - 1) / 2).sum().item()


def dense_mask(N, prefix):
    i = torch.arange(N, device=prefix.device)
    return ((i <= i[:, None]) | (i < prefix[:, None, None]))[:, None]                  # [B, 1, N, N]


def sdpa(backend=None, causal=False):
    """prepare(qkv, prefix) -> fn(qkv, prefix) -> [B, N, H, D] by PyTorch's fused attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def prepare(qkv, prefix):
        mask = None if causal else dense_mask(qkv.shape[1], prefix)

        def run(qkv, prefix):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)
        return run
    return prepare


def flex():
    """FlexAttention, compiled, with the block mask of this batch built anew in each call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    attend, make = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)

    def run(qkv, prefix):
        B, N = qkv.shape[:2]
        blocks = make(lambda b, h, i, j: (j <= i) | (j < prefix[b]), B, None, N, N, device=qkv.device)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return attend(q, k, v, block_mask=blocks).transpose(1, 2)
    return lambda qkv, prefix: run


def flash_twice():
    """flash-attn varlen: the prefixes in both directions, then the rest, causal at the bottom right. Rows are sorted beforehand."""
    from flash_attn import flash_attn_varlen_func

    def prepare(qkv, prefix):
        B, N, _, H, D = qkv.shape
        p = prefix.clamp(0, N).int()
        early = torch.arange(N, device=qkv.device) < p[:, None]                        # [B, N]
        first, rest = early.flatten().nonzero()[:, 0], (~early).flatten().nonzero()[:, 0]
        ends = lambda n: F.pad(n.cumsum(0, dtype=torch.int32), (1, 0))  # noqa: E731
        cu_first, cu_rest, cu_all = ends(p), ends(N - p), ends(torch.full_like(p, N))

        def run(qkv, prefix):
            q, k, v = qkv.flatten(0, 1).unbind(1)                                      # each [B·N, H, D]
            out = torch.empty_like(q)
            out = out.index_copy(0, first, flash_attn_varlen_func(q[first], k[first], v[first], cu_first, cu_first, N, N))
            out = out.index_copy(0, rest, flash_attn_varlen_func(q[rest], k, v, cu_rest, cu_all, N, N, causal=True))
            return out.view(B, N, H, D)
        return run
    return prepare


OURS, MASKED, EFFICIENT = "ours, Triton", "SDPA, mask", "SDPA, mask, EFFICIENT"
FLEX, CAUSAL, TWICE = "FlexAttention", "SDPA, causal (floor)", "flash-attn, two calls"


def attention_rivals(device):
    """{name: function -> prepare}; made when they are timed, since some import what may be absent."""
    if device.type != "cuda":
        return {MASKED: lambda: lambda qkv, prefix: prefix_attention, CAUSAL: lambda: sdpa(causal=True)}

    def ours():
        from kernels import prefix_attention as fast
        return lambda qkv, prefix: fast.prefix_attention
    return {OURS: ours, MASKED: sdpa, EFFICIENT: lambda: sdpa("EFFICIENT_ATTENTION"), FLEX: flex,
            CAUSAL: lambda: sdpa("FLASH_ATTENTION", causal=True), TWICE: flash_twice}


def bench_attention(device, args, say):
    cuda = device.type == "cuda"
    lengths = [64, 128] if not cuda else [512, 4096] if args.quick else [512, 1024, 2048, 4096, 16384]
    H, D, dtype, sets = (12, 64, torch.bfloat16, 3) if cuda else (2, 32, torch.float32, 2)
    rows = []
    for N in lengths:
        torch._dynamo.reset()  # else FlexAttention meets the limit of recompilations at the last lengths, and runs uncompiled
        B = max(2, 32768 // N) if cuda else 2
        inputs = [(torch.randn(B, N, 3, H, D, device=device, dtype=dtype).requires_grad_(), torch.randint(1, N + 1, (B,), device=device),
                   torch.randn(B, N, H, D, device=device, dtype=dtype)) for _ in range(sets)]
        for name, make in attention_rivals(device).items():
            prepare = attempt(make, name, say)
            if prepare is None:
                continue
            pairs = sum(B * N * (N + 1) / 2 if name == CAUSAL else visible(N, p) for _, p, _ in inputs) / sets
            # one at a time: the dense masks and the saved outputs of several sets would fill the memory at 16k
            found = attempt(lambda: [attention_times(prepare, *i, device, args.quick) for i in inputs], f"{name}, N = {N}", say)
            if found is None and name == OURS:
                raise RuntimeError("the kernels under test do not run")
            for what, factor in (("forward", 1), ("backward", 2.5), ("both", 3.5)) if found else ():
                ms = torch.tensor([f[what] for f in found]).mean(0).tolist()
                rows.append(row("attention", name, N, what, ms, 4 * D * H * pairs * factor))
    return rows


def attention_times(prepare, qkv, prefix, dout, device, quick):
    """{forward, backward, both: (median, p20, p80)} of one rival on one set of inputs."""
    run = prepare(qkv, prefix)
    out = run(qkv, prefix)
    with torch.no_grad():
        forward = quantiles(lambda: run(qkv, prefix), device, quick)
    return dict(forward=forward,
                backward=quantiles(lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True), device, quick),
                both=quantiles(lambda: torch.autograd.grad(run(qkv, prefix), qkv, dout), device, quick))


# ---------------------------------------------------------------- patches

PERMUTE, CONV = "permute + F.linear", "Conv3d, voxels prepared"


def bench_patches(device, args, say):
    """The embedding from int16 voxels, and the loss against them; Conv3d gets voxels that are mapped and in bf16 already."""
    cuda = device.type == "cuda"
    B, edge, P, C, S = (32, 128, 16, 768, 4) if cuda else (2, 32, 8, 96, 4)
    dtype, G = torch.bfloat16 if cuda else torch.float32, (edge // P) ** 3
    weight = (torch.randn(C, P ** 3, device=device) / P ** 1.5).requires_grad_()
    bias = torch.randn(C, device=device).requires_grad_()
    table = positions((edge // P,) * 3, C, device)
    inputs = []
    for _ in range(2):
        volume = torch.randint(-1000, 1000, (B, edge, edge, edge), device=device, dtype=torch.int16)
        window = torch.stack([torch.rand(B, S, device=device) * -500 - 400, torch.rand(B, S, device=device) * 500 + 400], -1)
        dout, pred = (torch.randn(B, G, n, device=device, dtype=dtype) for n in (C, P ** 3))
        inputs.append((volume, window, dout, pred.requires_grad_(), to_unit(volume, window).to(dtype)[:, None]))
    compiled = torch.compile if cuda else lambda f: f

    def by_permute(volume, window, unit):
        return F.linear(patchify(to_unit(volume, window), P).to(dtype), weight.to(dtype), bias.to(dtype)) + table.to(dtype)

    def by_conv(volume, window, unit):
        kernel = weight.to(dtype).view(C, 1, P, P, P)
        return F.conv3d(unit, kernel, bias.to(dtype), stride=P).flatten(2).mT + table.to(dtype)

    def loss_by_permute(pred, volume, window):
        return (pred.float() - standardise(patchify(to_unit(volume, window), P))[0]).square().mean(-1)

    embeds, losses = {PERMUTE: compiled(by_permute), CONV: by_conv}, {PERMUTE: compiled(loss_by_permute)}
    if cuda:
        from kernels.patch_embed import patch_embed, patch_loss

        def by_kernel(volume, window, unit):
            low, high = window.unbind(-1)
            with torch.autocast("cuda", dtype):
                return patch_embed(volume, low, 1 / (high - low).clamp(min=1e-6), weight, bias, table)

        def loss_by_kernel(pred, volume, window):
            low, high = window.unbind(-1)
            return patch_loss(pred, volume, low, 1 / (high - low).clamp(min=1e-6))
        embeds, losses = {OURS: by_kernel, **embeds}, {OURS: loss_by_kernel, **losses}

    flops, rows, wanted = 2 * B * G * P ** 3 * C, [], (weight, bias)
    for name, run in embeds.items():
        def one(run=run):
            with torch.no_grad():
                ahead = timed([lambda i=i: run(i[0], i[1], i[4]) for i in inputs], device, args.quick)
            return ahead, timed([lambda i=i: torch.autograd.grad(run(i[0], i[1], i[4]), wanted, i[2]) for i in inputs], device, args.quick)
        found = attempt(one, f"embedding, {name}", say) if name != OURS else one()
        if found:
            rows += [row("embed", name, G, "forward", found[0], flops), row("embed", name, G, "both", found[1], 2 * flops)]
    ones = torch.ones(B, G, device=device)
    for name, run in losses.items():
        ms = timed([lambda i=i: torch.autograd.grad(run(i[3], i[0], i[1]), i[3], ones) for i in inputs], device, args.quick)
        rows.append(row("loss", name, G, "both", ms, 0))
    return rows


# ---------------------------------------------------------------- the step

PUBLISHED, PLAIN, FAST = "published way: Conv3d, dense mask, eager", "ours, PyTorch (compiled on CUDA)", "ours, Triton, compiled"


def published_forward(model, unit, prefix):
    """The loss the way the published recipe has it: a strided convolution, one dense mask for all layers, float32 targets."""
    c, B = model.config, len(unit)
    grid = [n // c.patch for n in unit.shape[1:]]
    x = F.conv3d(unit[:, None], model.embed.weight.view(c.width, 1, *[c.patch] * 3), model.embed.bias, stride=c.patch)
    x = x.flatten(2).mT + positions(tuple(grid), c.width, unit.device).to(x.dtype)     # [B, G, C]
    x = torch.cat([model.begin.to(x.dtype).expand(B, 1, -1), x[:, :-1]], 1)
    N, mask = x.shape[1], dense_mask(x.shape[1], prefix + 1)
    for block in model.blocks:
        q, k, v = block.qkv(block.norm1(x)).view(B, N, 3, c.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + block.proj(y.transpose(1, 2).reshape(B, N, -1))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    errors = (model.head(model.norm(x)).float() - standardise(patchify(unit, c.patch))[0]).square().mean(-1)
    counted = torch.arange(N, device=x.device) >= prefix[:, None]
    return (errors * counted).sum() / counted.sum()


def bench_step(device, args, say):
    """One optimiser step, ViT-B at 128³ (nano at 32³ without CUDA), by the published way, by ours, and by ours with the kernels."""
    cuda = device.type == "cuda"
    size, edge, batch, dtype = ("base", 128, args.batch, torch.bfloat16) if cuda else ("nano", 32, 2, torch.float32)
    config = Config(**SIZES[size])
    G = (edge // config.patch) ** 3
    rate = matmul_rate(device, dtype, 2.0)
    rows = []
    for name in (PUBLISHED, PLAIN, FAST) if cuda else (PUBLISHED, PLAIN):
        torch.manual_seed(0)
        model = Model(config).to(device)
        model.use("triton" if name == FAST else "torch")
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        volume = torch.randint(-1000, 1000, (batch, edge, edge, edge), device=device, dtype=torch.int16)
        window = torch.tensor([-900.0, 900.0], device=device).expand(batch, config.images, 2).contiguous()
        prefixes = torch.randint(0, G, (32, batch), device=device)
        unit, turn = to_unit(volume, window) if name == PUBLISHED else None, iter(range(10 ** 9))
        if name != PUBLISHED and cuda:
            model.compile()

        def step():
            prefix = prefixes[next(turn) % len(prefixes)]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = published_forward(model, unit, prefix) if name == PUBLISHED else model(volume, prefix, window)[0]
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        def one():
            for _ in range(3):
                step()
            return timed([step], device, args.quick)
        ms = attempt(one, name, say) if name != FAST else one()
        if ms:
            flops = sum(model.flops([edge] * 3, p) for p in prefixes.flatten().tolist()) / len(prefixes)
            rows.append(row("step", name, G, "both", ms, flops))
            share = flops / ms[0] * 1e3
            say(f"step, {name}: {ms[0]:.1f} ms, {1e3 * batch / ms[0]:.1f} sequences/s, {share / 1e12:.1f} TFLOP/s = {share / rate:.1%} of "
                f"this machine's {rate / 1e12:.0f}" + (f", {share / 989e12:.1%} of an H100's 989 on paper" if is_h100(device) else ""))
        del model, optimiser
    return rows


# ---------------------------------------------------------------- compile gate

SHARED = {80: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may have; 80 stands in for the smaller 8.6 and 8.9 too
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int16: "i16",
         torch.int32: "i32", torch.int64: "i64"}


def compile_job(kernel, args, meta, arch, label):
    """What one launch asks the compiler for, in plain types: signature, constants, alignments, as a launch would specialise them."""
    options = {k: meta[k] for k in ("num_warps", "num_stages") if k in meta}
    constants = {k: v for k, v in meta.items() if k not in options}
    signature, aligned = {}, {}
    for at, (name, value) in enumerate([*zip(kernel.arg_names, args), *constants.items()]):
        if name in constants or value is None or isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2 ** 31 else "i64"
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
            aligned[(at,)] = [["tt.divisibility", 16]]
    return kernel.fn.__module__, kernel.fn.__name__, signature, constants, aligned, {**options, "enable_fp_fusion": True}, arch, label


def compile_one(job):
    """-> label, registers, spilled bytes, shared memory."""
    module, name, signature, constants, aligned, options, arch, label = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    source = ASTSource(getattr(importlib.import_module(module), name), signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return label, registers, stack + local, made.metadata.shared


def gate_jobs(quick):
    """Every launch of the shipped tiles, recorded on tensors without storage: nothing is run."""
    from kernels import patch_embed, prefix_attention as attention
    jobs = {}
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    launch, family = kernels.launch, kernels.family
    bf16, fp32, i64 = torch.bfloat16, torch.float32, torch.int64
    maps = [(bf16, 4, None)] if quick else [(bf16, 4, None), (fp32, 4, empty(512, dtype=i64)), (bf16, 16, None), (bf16, None, None)]
    try:
        for arch in (80, 90, 100) if quick else (80, 90, 100, 120):
            what = ""

            def record(kernel, programs, device, *args, **meta):
                label = f"sm_{arch} {kernel.fn.__name__} {what}"
                jobs[label] = compile_job(kernel, args, meta, arch, label)
            kernels.launch, kernels.family = record, lambda device: {80: 80, 90: 90, 100: 90, 120: 80}[arch]
            for D in (64,) if quick else (32, 48, 64, 80, 96, 128):
                for N in (512, 4096):
                    for dtype in (bf16,) if quick else (bf16, torch.float16, fp32):
                        B, H, what = 8, 12, f"{TYPES[dtype]} D={D} N={N}"
                        qkv, prefix = empty(B, N, 3, H, D, dtype=dtype), empty(B, dtype=i64)
                        attention.backward(empty(B, N, H, D, dtype=dtype), qkv, prefix, *attention.forward(qkv, prefix))
            for P, C in ((16, 768),) if quick else ((16, 768), (8, 192)):
                for voxels in (torch.int16,) if quick else (torch.uint8, torch.int16, bf16, fp32):
                    for dtype, S, order in maps:
                        B, edge, what = 8, 8 * P, f"{TYPES[voxels]} to {TYPES[dtype]} P={P} S={S}{' ordered' if order is not None else ''}"
                        volume, map, weight = empty(B, edge, edge, edge, dtype=voxels), S and empty(B, S), empty(C, P ** 3)
                        bias, table, prefix = empty(C), empty(512, C), empty(B, dtype=i64)
                        out = patch_embed.embed(volume, map, map, weight, bias, table, order, 511, bias, dtype)
                        patch_embed.embed_weight(out, volume, map, map, order, P ** 3, True)
                        pred = empty(B, 512, P ** 3, dtype=dtype)
                        saved = patch_embed.loss(pred, volume, map, map, order, prefix)
                        patch_embed.loss_backward(saved[0], pred, volume, map, map, order, prefix, *saved[1:])
    finally:
        kernels.launch, kernels.family = launch, family
    return list(jobs.values())


def gate(quick, say):
    """Compile everything for GPUs that need not be here; RuntimeError if a kernel spills or takes more shared memory than there is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadInput("--part gate compiles the kernels: unset TRITON_INTERPRET")
    bad = []
    say(f"{'kernel, shipped tiles':<75} registers  spilled B  shared B")
    for label, registers, spilled, shared in parallel(compile_one, gate_jobs(quick), desc="compiling"):
        say(f"{label:<75} {registers:9} {spilled:10} {shared:9}")
        if spilled or shared > SHARED[int(label[3:].split()[0])]:
            bad.append(label)
    if bad:
        raise RuntimeError(f"{len(bad)} kernels spill, or take too much shared memory: {'; '.join(bad)}")
    say("no spills, shared memory within the limits")


# ---------------------------------------------------------------- reports

# What the kernels have to reach on an H100: (part, rival, N, what): at least this many times as fast, aim
TARGETS = {
    **{("attention", rival, N, "both"): goal for rival, goals in {
        MASKED: ((1.3, 1.6), (2.0, 2.5), (2.2, 2.7)), EFFICIENT: ((2.5, 3.5), (4, 5), (4.5, 5.4)),
        FLEX: ((1.2, 1.4), (1.0, 1.2), (1.0, 1.2)), CAUSAL: ((0.9, 1.15), (1.0, 1.15), (1.0, 1.15))}.items()
       for N, goal in zip((512, 4096, 16384), goals)},
    ("embed", PERMUTE, 512, "forward"): (1.3, 1.6), ("embed", PERMUTE, 512, "both"): (1.1, 1.3), ("embed", CONV, 512, "forward"): (10, 10),
    ("step", PUBLISHED, 512, "both"): (2, 2),
}


def row(part, rival, N, what, ms, flops):
    return dict(part=part, rival=rival, n=N, what=what, ms=round(ms[0], 4), p20=round(ms[1], 4), p80=round(ms[2], 4),
                tflops=float(f"{flops / ms[0] / 1e9:.4g}"))


def is_h100(device):
    return device.type == "cuda" and "H100" in torch.cuda.get_device_name(device)


def machine(device):
    """What the figures were taken on."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return dict(device=name, torch=torch.__version__, triton=triton, cudnn=torch.backends.cudnn.version() or "none",
                date=datetime.date.today().isoformat())


def ratios(rows):
    """[(target's key, at least, aim, measured)]: time of the rival over ours; per useful FLOP against the causal floor."""
    at, found = {(r["part"], r["rival"], r["n"], r["what"]): r for r in rows}, []
    for key, (least, aim) in TARGETS.items():
        part, rival, N, what = key
        theirs, ours = at.get(key), at.get((part, FAST if part == "step" else OURS, N, what))
        if theirs and ours:
            found.append((key, least, aim, ours["tflops"] / theirs["tflops"] if rival == CAUSAL else theirs["ms"] / ours["ms"]))
    return found


def draw(path, rows, title):
    """Speed against N, one line a rival; forward, backward and both side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for ax, what in zip(axes, ("forward", "backward", "both")):
        for rival in dict.fromkeys(r["rival"] for r in rows):
            points = [(r["n"], r["tflops"]) for r in rows if r["rival"] == rival and r["what"] == what]
            ax.plot(*zip(*points), "o-", label=rival)
        ax.set(xscale="log", xlabel="tokens", ylabel="useful TFLOP/s", title=what, ylim=(0, None))
        ax.set_xticks(sorted({r["n"] for r in rows}), [str(n) for n in sorted({r["n"] for r in rows})], minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    with write_beside(path) as tmp:
        fig.savefig(tmp, dpi=110, bbox_inches="tight")
    plt.close(fig)


def report(rows, device, out, say):
    info = machine(device)
    title = "{device}, torch {torch}, triton {triton}, cuDNN {cudnn}, {date}".format(**info)
    say(f"\n{title}\n{'part':<10} {'rival':<42} {'N':>6} {'':<9} {'ms':>9} {'p20':>9} {'p80':>9} {'TFLOP/s':>9}")
    for r in rows:
        say(f"{r['part']:<10} {r['rival']:<42} {r['n']:>6} {r['what']:<9} "
            f"{r['ms']:9.3f} {r['p20']:9.3f} {r['p80']:9.3f} {r['tflops']:9.2f}")
    goals = ratios(rows)
    if goals:
        say(f"\nours over its rivals; the targets are for an H100{'' if is_h100(device) else ', and this is none'}")
    for (part, rival, N, what), least, aim, measured in goals:
        verdict = "reached" if measured >= aim else "met" if measured >= least else "MISSED"
        say(f"{part:<10} {rival:<42} {N:>6} {what:<9} {measured:6.2f}x  (at least {least}, aim {aim})  {verdict}")
    with write_beside(Path(out) / "bench.csv") as tmp:
        with open(tmp, "w", newline="") as f:
            table = csv.DictWriter(f, [*rows[0], *info])
            table.writeheader()
            table.writerows({**r, **info} for r in rows)
    say(f"\nwrote {Path(out) / 'bench.csv'}")
    attention = [r for r in rows if r["part"] == "attention"]
    if attention:
        draw(Path(out) / "attention.png", attention, title)
        say(f"wrote {Path(out) / 'attention.png'}")


# ---------------------------------------------------------------- main


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", nargs="+", choices=["attention", "patches", "step", "gate"], default=["attention", "patches", "step"])
    p.add_argument("--quick", action="store_true", help="fewer sizes and repeats; gate: the kernels of ViT-B alone")
    p.add_argument("--batch", type=int, default=72, help="sequences of the step (published: 72 a GPU)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", default="kernels/results", help="folder of the table and the figure (default %(default)s)")
    args = p.parse_args()
    if "gate" in args.part:
        gate(args.quick, print)
    parts = dict(attention=bench_attention, patches=bench_patches, step=bench_step)
    chosen = [parts[name] for name in args.part if name in parts]
    if not chosen:
        return
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        raise BadInput(f"--device {args.device}: auto, cpu, cuda or cuda:N")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if device.type == "cuda":
        kernels.choose("triton", device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        print("no CUDA device: PyTorch's paths alone, at small sizes, which says nothing about a GPU")
    torch.manual_seed(0)
    report([r for bench in chosen for r in bench(device, args, print)], device, args.out, print)


if __name__ == "__main__":
    cli(main)
