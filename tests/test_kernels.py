"""The Triton kernels against plain.py in float64; and what the compiler makes of them.

Without a GPU they run under Triton's interpreter, whose dot is wrong for bfloat16 without saying
so: hence float32 and float16 here, bfloat16 on a GPU.

    python -m pytest tests/test_kernels.py -k spill -s           # registers, spills, shared memory
    python -m pytest tests/test_kernels.py -k spill -s --slow   # of every tile that is shipped
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch

import kernels
from common import BadInput, cores
from kernels import bench, plain
from model import SIZES, Config, Model
from pretrain import parser

triton = pytest.importorskip("triton")
from kernels import fused, patch_embed, prefix_attention

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def poison():
    """In this mode PyTorch fills with NaN what is allocated, until a kernel writes it."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(ours, exact, dtype, what):
    """Relative norm against float64."""
    error = (ours.detach().double() - exact.detach()).norm() / exact.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.1e}"


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def doubled(x):
    return x.detach().double().requires_grad_()


# ---- attention -------------------------------------------------------------------------------


def assert_attention(prefix, qkv, dout=None):
    """Output and each gradient."""
    B, N, _, H, D = qkv.shape
    dtype = qkv.dtype
    prefix = torch.as_tensor(prefix, device=DEVICE)
    dout = leaf(B, N, H, D, dtype=dtype) if dout is None else dout
    exact = doubled(qkv)
    out, exact_out = fused.attend(qkv, prefix), plain.attend(exact, prefix)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, exact_out, dtype, "out")
    (grad,) = torch.autograd.grad(out, qkv, dout)
    (exact_grad,) = torch.autograd.grad(exact_out, exact, dout.double())
    for i, name in enumerate(("dq", "dk", "dv")):
        if N > 1 or name == "dv":  # of one key the softmax is 1 whatever q and k are
            assert_close(grad[:, :, i], exact_grad[:, :, i], dtype, name)
        else:
            assert grad[:, :, i].abs().max() < TOLERANCE[dtype]


CASES = [(1, 1, 16), (2, 2, 8), (34, 1, 128), (63, 1, 80), (64, 1, 64), (65, 1, 48), (130, 1, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N, H, D", CASES)
def test_attention(N, H, D, dtype):
    prefix = [0, 1, N - 1, N] if dtype == torch.float32 else [N // 2]
    assert_attention(prefix, leaf(len(prefix), N, 3, H, D, dtype=dtype))


@pytest.mark.parametrize("N, rows, keys", [(130, 16, 64), (130, 64, 16), (513, 64, 128)])
def test_attention_by_tiles_of_unequal_sides(N, rows, keys, monkeypatch):
    tile = {"BM": rows, "BN": keys, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(prefix_attention, "tiles", lambda *_: tile)
    assert_attention([31], leaf(1, N, 3, 1, 16))


def test_attention_reads_through_strides():
    B, N, H, D = 2, 35, 2, 16
    heads_first = torch.randn(3, B, H, N, D, device=DEVICE).permute(1, 3, 0, 2, 4)
    assert_attention([10, 30], heads_first.requires_grad_())
    every_other = torch.randn(B, N, 3, H, 2 * D, device=DEVICE)[..., ::2].requires_grad_()
    assert_attention([10, 30], every_other, torch.randn(B, H, N, D, device=DEVICE).transpose(1, 2))
    constant = torch.ones((), device=DEVICE).expand(B, N, H, D)  # what sum().backward() hands over
    assert_attention(torch.tensor([20]).expand(2), leaf(B, N, 3, H, D), constant)


def test_attention_takes_any_prefix_and_large_scores():
    prefix = torch.tensor([-4, 900], dtype=torch.int32)
    assert_attention(prefix, leaf(2, 65, 3, 1, 16, scale=8.0))


def test_attention_does_not_see_the_future():
    qkv, prefix = torch.randn(1, 66, 3, 1, 16, device=DEVICE), torch.tensor([10], device=DEVICE)
    before = fused.attend(qkv, prefix)
    qkv[:, 40:] += 1
    after = fused.attend(qkv, prefix)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_attention_refuses_what_it_cannot_do():
    prefix = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match="width 160"):
        fused.attend(leaf(1, 4, 3, 1, 160), prefix)
    with pytest.raises(ValueError, match=r"prefix \[2\]"):
        fused.attend(leaf(1, 4, 3, 1, 16), prefix.expand(2))


# ---- patches ---------------------------------------------------------------------------------


def scans(B, shape, kind, S):
    """Volume whose axes are stored in another order, and ranges [B, S, 2] (None without S)."""
    X, Y, Z = shape
    v = torch.rand(B, Z, Y, X) * 255
    if kind != torch.uint8:
        v = (v - 128) * (5 if S else 0.01)
    v = v.to(kind).to(DEVICE).transpose(1, 3)
    if not S:
        return v, None
    low = torch.rand(B, S, device=DEVICE) * 300 - 400
    return v, torch.stack([low, low + 300 + torch.rand(B, S, device=DEVICE) * 500], -1)


PATCH_CASES = [  # voxels, dtype of the product, shape, P, S, C, ordered, with a begin token
    (torch.int16, torch.float32, (8, 8, 16), 4, 4, 40, True, True),
    (torch.uint8, torch.float16, (8, 12, 8), 4, 2, 36, False, True),
    (torch.float16, torch.float16, (8, 8, 8), 4, None, 32, True, False),
    # sub-images of 2 slices, and of 12: patches straddle them
    (torch.float32, torch.float32, (4, 8, 16), 4, 8, 70, False, False),
    (torch.int16, torch.float16, (8, 16, 24), 8, 2, 70, True, True),
    (torch.float32, torch.float32, (6, 6, 3), 3, 1, 32, False, True),  # 27 voxels, no power of two
]


@pytest.mark.parametrize("kind, dtype, shape, P, S, C, ordered, begins", PATCH_CASES)
def test_patches(kind, dtype, shape, P, S, C, ordered, begins):
    assert_patches(kind, dtype, shape, P, S, C, ordered, begins)


def assert_patches(kind, dtype, shape, P, S, C, ordered, begins):
    """Tokens and loss, and each of their gradients."""
    volume, ranges = scans(2, shape, kind, S)
    G = volume[0].numel() // P**3
    order = torch.randperm(G, device=DEVICE) if ordered else None
    source = fused.read(volume, ranges, P, order)
    patches = plain.read(volume, ranges, P, order).double()

    weights = [leaf(C, P**3, scale=P**-1.5), leaf(C)] + [leaf(C)] * begins
    exact = [doubled(w) for w in weights]
    table, count = torch.randn(G, C, device=DEVICE), G - 1
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        tokens = fused.embed(source, *weights[:2], table, count, *weights[2:])
    assert tokens.dtype == torch.float32 and tokens.shape == (2, count + begins, C)
    exact_tokens = plain.embed(patches, *exact[:2], table, count, *exact[2:])
    assert_close(tokens, exact_tokens, dtype, "tokens")
    dtokens = torch.randn_like(tokens)
    grads = torch.autograd.grad(tokens, weights, dtokens)
    exact_grads = torch.autograd.grad(exact_tokens, exact, dtokens.double())
    for name, grad, exact_grad in zip(("weight", "bias", "begin"), grads, exact_grads):
        assert grad.dtype == torch.float32
        assert_close(grad, exact_grad, dtype, name)

    pred, derrors = leaf(2, G, P**3, dtype=dtype), torch.randn(2, G, device=DEVICE)
    exact = doubled(pred)
    prefix = torch.tensor([G - 1, G // 2], device=DEVICE) if begins else None
    errors = fused.loss(pred, source, prefix)
    (grad,) = torch.autograd.grad(errors, pred, derrors)
    exact_errors = plain.loss(exact, patches, prefix)
    (exact_grad,) = torch.autograd.grad(exact_errors, exact, derrors.double())
    assert errors.dtype == torch.float32 and grad.dtype == dtype
    assert_close(errors, exact_errors, torch.float32, "errors")
    assert_close(grad, exact_grad, dtype, "gradient of the prediction")
    if begins:
        assert errors[0, : G - 1].eq(0).all() and grad[0, : G - 1].eq(0).all()


def test_both_paths_have_the_same_types_at_their_borders():
    """Under autocast: float32 tokens and errors, 16-bit attention, so one residual stream."""
    volume, ranges = scans(2, (8, 8, 8), torch.int16, 2)
    weight, table = leaf(96, 64), torch.randn(8, 96, device=DEVICE)
    prefix, kinds = torch.tensor([1, 3], device=DEVICE), []
    for ops in (plain, fused):
        source = ops.read(volume, ranges, 4)
        with torch.autocast(DEVICE, torch.float16):
            tokens = ops.embed(source, weight, leaf(96), table, 7, leaf(96))
            qkv = torch.nn.functional.linear(tokens, leaf(3 * 96, 96)).view(2, 8, 3, 3, 32)
            seen = ops.attend(qkv, prefix)
            stream = tokens + torch.nn.functional.linear(seen.reshape(2, 8, 96), leaf(96, 96))
            pred = torch.nn.functional.linear(stream, leaf(64, 96))
            errors = ops.loss(pred, source, prefix)
        kinds.append([t.dtype for t in (tokens, seen, stream, pred, errors)])
    half, full = torch.float16, torch.float32
    assert kinds == [[full, half, full, half, full]] * 2


def test_voxels_are_mapped_as_plain_maps_them_to_the_bit():
    volume = torch.randint(-30000, 30000, (2, 8, 8, 8), dtype=torch.int16, device=DEVICE)
    low = torch.tensor([[20000.0, -500], [-20100, 3]], device=DEVICE)
    ranges = torch.stack([low, low + 137], -1)
    eye, zeros = torch.eye(64, device=DEVICE), torch.zeros(8, 64, device=DEVICE)
    tokens = fused.embed(fused.read(volume, ranges, 4), eye, zeros[0], zeros)
    assert torch.equal(tokens, plain.read(volume, ranges, 4))


def test_patches_refuse_what_they_cannot_do():
    volume, ranges = scans(2, (8, 8, 8), torch.int16, 4)
    for source, message in (
        ((volume, ranges[:, :3], 4), "a divisor of 8"),
        ((volume[:, :6], ranges, 4), "not a multiple of the patch 4"),
        ((volume.int(), ranges, 4), "int32"),
        ((volume, ranges, 4, torch.arange(7)), "all 8 patches"),
    ):
        with pytest.raises(ValueError, match=message):
            fused.loss(torch.randn(2, 8, 64, device=DEVICE), fused.read(*source))


# ---- operators and model ---------------------------------------------------------------------


def test_operators_pass_opcheck():
    volume, ranges = scans(1, (4, 8, 8), torch.int16, 2)
    source = fused.read(volume, ranges, 4, torch.randperm(4, device=DEVICE))
    prefix, table = torch.tensor([2], device=DEVICE), torch.randn(4, 24, device=DEVICE)
    weights = leaf(24, 64), leaf(24), table, 3, leaf(24), torch.float32
    torch.library.opcheck(prefix_attention.attend_op, (leaf(1, 20, 3, 2, 16), prefix))
    torch.library.opcheck(patch_embed.embed_op, (*source, *weights))
    torch.library.opcheck(patch_embed.loss_op, (*source, leaf(1, 4, 64), prefix))


def tiny(order="raster", target="pixel"):
    config = Config(width=48, layers=2, heads=2, patch=4, order=order, target=target, codes=8)
    volume, ranges = scans(2, (4, 8, 16), torch.int16, 4)
    prefix, codes = torch.tensor([3, 6], device=DEVICE), torch.arange(16, device=DEVICE) % 5
    return Model(config).to(DEVICE), (volume, prefix, ranges, False, codes.view(2, 8))


@pytest.mark.parametrize("order, target", [("raster", "pixel"), ("image", "vq")])
def test_model_with_kernels_is_the_model_and_compiles_as_one_graph(order, target):
    model, batch = tiny(order, target)

    def step():
        loss, pred = model(*batch)
        loss.backward()
        results = [loss.detach(), pred, *(w.grad for w in model.parameters())]
        model.zero_grad()
        return results

    steps = [step()]
    model.use("triton")
    steps.append(step())
    model.compile(fullgraph=True, backend="aot_eager")
    steps.append(step())
    for exact, *others in zip(*steps, strict=True):
        for ours in others:
            assert_close(ours, exact.double(), torch.float32, "triton, compiled")
    scan = batch[0], batch[2]
    last, exact = model.encode(*scan)[0], model.use("torch").encode(*scan)[0]
    assert_close(last, exact.double(), torch.float32, "features")


# ---- choice and bench ------------------------------------------------------------------------


def test_choice(monkeypatch, tmp_path):
    assert kernels.choose("torch", "cuda") == ("torch", "asked for")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose("auto", "cpu")[0] == "torch"
    name, why = kernels.choose("triton", "cpu")
    assert name == "triton" and "interpreter" in why
    monkeypatch.delenv("TRITON_INTERPRET")
    name, why = kernels.choose("auto", "cpu")
    assert name == "torch" and "cpu" in why
    with pytest.raises(BadInput, match="--kernels triton cannot run here: .* cpu; use"):
        kernels.choose("triton", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (7, 5))
    assert kernels.choose("auto", "cuda") == ("torch", "GPU has compute capability below 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    name, why = kernels.choose("auto", "cuda")
    assert name == "torch" and "no Python.h" in why
    (tmp_path / "Python.h").touch()
    assert kernels.choose("auto", "cuda")[0] == "triton"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    name, why = kernels.choose("auto", "cuda")
    assert name == "torch" and "needs a C compiler" in why
    monkeypatch.setitem(sys.modules, "triton", None)
    name, why = kernels.choose("auto", "cuda")
    assert name == "torch" and "does not import" in why


def test_no_triton_is_imported_unless_its_kernels_are_used():
    code = "import sys, model, kernels.bench; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_published_way_is_the_same_mathematics():
    model, (volume, prefix, ranges, *_) = tiny()
    loss, pred = model(volume, prefix, ranges)
    ops = bench.Published()
    for module in (model, *model.blocks):
        module.ops = ops
    theirs, their_pred = model(plain.to_unit(volume, ranges), prefix)
    assert_close(their_pred, pred.double(), torch.float32, "pred")
    assert_close(theirs, loss.double(), torch.float32, "loss")


def test_bench_writes_its_table_and_figure(tmp_path, monkeypatch, capsys):
    flags = ["--quick", "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr(bench, "matmul_rate", lambda machine: 1e11)
    bench.main()
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert lines[0].startswith("part,rival,n,what,ms,p20,p80,tflops,device,torch,triton")
    assert len(lines) == 1 + 2 * 2 * 3 + 2 * 2 + 1 + 2  # attention, embedding, loss, step
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "sequences/s" in out and "not timed" not in out


def test_the_first_hour_asks_for_what_there_is():
    for words in map(str.split, bench.HOUR.values()):
        steps = ["2"] * (words[-1] == "--steps")
        if words[0] == "pretrain.py":
            parser().parse_args([*words[1:], *steps])
        elif words[1] == "pytest":
            ask = [sys.executable, *words, "--collect-only"]
            assert not subprocess.run(ask, cwd=ROOT, capture_output=True, check=False).returncode


def test_first_hour_runs_its_commands_and_keeps_what_they_say(tmp_path, monkeypatch):
    hour = {"says": "-c print('hello',flush=True)", "fails": "-c 1/0", "steps": "-c pass --steps"}
    monkeypatch.setattr(bench, "HOUR", hour)
    monkeypatch.setattr(sys, "argv", ["bench", "--first-hour", "--out", str(tmp_path / "new")])
    bench.main()
    told = (tmp_path / "new/first-hour.md").read_text()
    assert "| says | 0 |" in told and "| fails | 1 |" in told and "| steps | 0 |" in told
    assert "### says\n\n```\nhello\n```" in told and "ZeroDivisionError" in told


# ---- what the compiler makes of the shipped tiles --------------------------------------------

# bytes a program may have; 80 stands in for the smaller 8.6 and 8.9 too
SHARED = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
PRODUCTS = "forward_kernel", "backward_kv_kernel", "backward_q_kernel", "embed_kernel"
# integer divisions a kernel may have, for the addresses of patches; 2 elsewhere
DIVISIONS = {"embed_kernel": 42}
DIVISIONS |= dict.fromkeys(("unfold_kernel", "loss_kernel", "loss_backward_kernel"), 20)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int64: "i64",
}


def compile_job(kernel, args, meta, arch, label):
    """What a launch asks of the compiler, in plain types, specialised as a launch would have it."""
    options = {k: meta.pop(k) for k in ("num_warps", "num_stages") if k in meta}
    constants, aligned = dict(meta), {}

    def type_of(value, *path):
        if isinstance(value, tuple):
            return tuple(type_of(v, *path, i) for i, v in enumerate(value))
        if value is None or isinstance(value, int) and value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
        signature[name] = type_of(value, i)
    options["enable_fp_fusion"] = True
    kernel = kernel.fn
    return kernel.__module__, kernel.__name__, signature, constants, aligned, options, arch, label


def gate_jobs(quick):
    """Every launch of the shipped tiles, recorded, not run: what `compile_one` takes."""
    jobs, arch, what = {}, None, None
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    archs = (80, 90, 100) if quick else (80, 90, 100, 120)
    first = slice(1 if quick else None)
    heads, types = (64, 32, 48, 80, 96, 128)[first], (bf16, fp16, fp32)[first]
    patches = ((16, 768), (8, 192))[first]  # P and C
    voxels = (torch.int16, torch.uint8, bf16, fp32)[first]
    maps = ((bf16, 4, False), (fp32, 4, True), (bf16, 16, False), (bf16, None, False))[first]

    def record(kernel, programs, device, *args, **meta):
        label = f"sm_{arch} {kernel.fn.__name__} {what}"
        jobs[label] = compile_job(kernel, args, meta, arch, label)

    def family(device):
        return 90 if arch in (90, 100) else 80

    with mock.patch.multiple(kernels, launch=record, family=family):
        prefix = torch.zeros(1, dtype=torch.int64)
        for arch in archs:
            lengths = (4096,) if quick and arch != 90 else (512, 4096)
            for D, N, dtype in product(heads, lengths, types):
                what = f"{TYPES[dtype]} D={D} N={N}"
                qkv = torch.zeros(1, N, 3, 12, D, dtype=dtype, requires_grad=True)
                out = fused.attend(qkv, prefix)
                out.backward(torch.zeros_like(out))
            for (P, C), kind, (dtype, S, ordered) in product(patches, voxels, maps):
                what = f"{TYPES[kind]} to {TYPES[dtype]} P={P} S={S}{' ordered' * ordered}"
                volume = torch.zeros(1, 8 * P, 8 * P, 8 * P, dtype=kind)
                order = torch.arange(512) if ordered else None
                source = fused.read(volume, torch.zeros(1, S, 2) if S else None, P, order)
                weight = torch.zeros(C, P**3, dtype=dtype, requires_grad=True)
                bias, table = torch.zeros(C), torch.zeros(512, C)
                fused.embed(source, weight, bias, table, 511, bias).sum().backward()
                pred = torch.zeros(1, 512, P**3, dtype=dtype, requires_grad=True)
                fused.loss(pred, source, prefix).sum().backward()
    return list(jobs.values())


def compile_one(job):
    """-> label, registers, spilled bytes, shared memory; wgmma, mma, integer divisions."""
    module, name, signature, constants, aligned, options, arch, label = job
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    words = r"wgmma\.mma_async", r"\smma\.sync", r"\s(?:div|rem)\.[su]\d"
    counts = [len(re.findall(word, compiled.asm["ptx"])) for word in words]
    return label, registers, stack + local, compiled.metadata.shared, *counts


def test_kernels_neither_spill_nor_lack_shared_memory_on_gpus_that_are_not_here(
    request, monkeypatch
):
    jobs = gate_jobs(quick=not request.config.getoption("--slow"))
    assert {job[-2] for job in jobs} >= {80, 90, 100} and len(jobs) >= 28
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in the processes that compile
    bad = []
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        for job, facts in zip(jobs, pool.map(compile_one, jobs)):
            label, registers, spilled, shared, wgmma, mma, divisions = facts
            line = f"{label:<70} {registers} registers {spilled} B spilled {shared} B shared "
            line += f"{wgmma} wgmma {mma} mma {divisions} divisions"
            print(line)
            faults = [spilled, shared > SHARED[job[-2]], divisions > DIVISIONS.get(job[1], 2)]
            halves = "to fp32" not in label and "fp32 D" not in label
            if job[1] in PRODUCTS and "sm_90" in label and halves:
                faults += [mma, not wgmma]
            if any(faults):
                bad.append(line)
    assert not bad, "\n".join(bad)


# ---- on a GPU --------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
GPU_CASES = [
    (1, 64),
    (130, 64),
    (512, 64),
    (513, 128),
    (514, 80),
    (1500, 64),
    (1500, 128),
    (4097, 32),
]


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("N, D", GPU_CASES)
def test_gpu_attention(N, D, dtype):
    assert_attention([0, 1, N // 2, N], leaf(4, N, 3, 3, D, dtype=dtype))


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.bfloat16])
def test_gpu_patches(kind, dtype):
    assert_patches(kind, dtype, (64, 64, 64), 16, 4, 768, True, True)


@pytest.mark.gpu
def test_gpu_gradients_are_the_same_to_the_bit():
    qkv = leaf(4, 700, 3, 4, 64, dtype=torch.bfloat16)
    prefix = torch.tensor([0, 100, 650, 700], device=DEVICE)
    volume, ranges = scans(8, (64, 64, 64), torch.int16, 4)
    weights = leaf(768, 4096, dtype=torch.bfloat16), leaf(768)
    table = torch.randn(64, 768, device=DEVICE)

    def gradients():
        torch.manual_seed(1)
        seen = fused.attend(qkv, prefix)
        tokens = fused.embed(fused.read(volume, ranges, 16), *weights, table)
        grads = torch.autograd.grad(seen, qkv, torch.randn_like(seen))
        return *grads, *torch.autograd.grad(tokens, weights, torch.randn_like(tokens))

    for a, b in zip(gradients(), gradients()):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_training_step_compiles():
    """A pre-training step through torch.compile, with PyTorch's operations and with the kernels."""
    losses, norms = [], []
    volume, ranges = scans(4, (32, 32, 32), torch.int16, 4)
    prefix = torch.tensor([0, 5, 40, 63], device=DEVICE)
    for name in ("torch", "triton"):
        torch.manual_seed(0)
        model = Model(Config(**SIZES["nano"])).to(DEVICE).use(name)
        model.compile(fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(volume, prefix, ranges)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in model.parameters()]).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)


SANITIZED = """
import torch
from kernels import fused
torch.set_default_device("cuda")
x = torch.randn(2, 77, 3, 2, 48, dtype=torch.bfloat16, requires_grad=True)
fused.attend(x, torch.tensor([5, 70])).sum().backward()
v = torch.randint(-9, 9, (2, 24, 16, 16), dtype=torch.int16)
source = fused.read(v, torch.tensor([-9.0, 9.0]).expand(2, 4, 2), 8)
w, b = torch.randn(70, 512, requires_grad=True), torch.randn(70, requires_grad=True)
fused.embed(source, w, b, torch.randn(12, 70), 11, b).sum().backward()
fused.loss(torch.randn(2, 12, 512, requires_grad=True), source).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer on PATH")
def test_gpu_memory_is_not_overrun():
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = ["compute-sanitizer", "--error-exitcode", "7", "--report-api-errors", "no"]
    command += [sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-3000:]
