"""The Triton kernels against float64 PyTorch: under Triton's interpreter without a GPU, on it with one; and the compile gate.

The interpreter's dot is wrong for bfloat16 without saying so, hence float32 and float16 here, bfloat16 on a GPU.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import kernels
from common import BadInput
from model import SIZES, Config, Model, patchify, prefix_attention, standardise, to_unit

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

pytest.importorskip("triton")
from kernels import patch_embed as patches  # noqa: E402
from kernels import prefix_attention as attention  # noqa: E402


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever the wrappers allocate is full of NaN until a kernel writes it."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size, **options):
        x = empty(*size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x
    monkeypatch.setattr(torch, "empty", poisoned)


def close(found, wanted, dtype, what):
    """Relative norm against float64."""
    error = ((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-30)).item()
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.1e}, {TOLERANCE[dtype]:.0e} allowed"


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


# ---------------------------------------------------------------- attention


def check_attention(N, prefix, dtype, D=16, H=1, qkv=None, dout=None):
    """Output, log-sum-exp and each gradient."""
    prefix = torch.as_tensor(prefix, device=DEVICE)
    B = len(prefix)
    qkv = leaf(B, N, 3, H, D, dtype=dtype) if qkv is None else qkv
    dout = torch.randn(B, N, H, D, device=DEVICE).to(dtype) if dout is None else dout
    exact = qkv.detach().double().requires_grad_()
    wanted, wanted_lse = attention.reference(exact, prefix)
    wanted.backward(dout.double())
    out = attention.prefix_attention(qkv, prefix)
    assert out.dtype == dtype and out.is_contiguous()
    grad, = torch.autograd.grad(out, qkv, dout)
    close(out, wanted, dtype, "out")
    close(attention.forward(qkv.detach(), prefix)[1], wanted_lse, dtype, "log-sum-exp")
    for i, name in enumerate(("dq", "dk", "dv")):
        if N > 1 or name == "dv":
            close(grad[:, :, i], exact.grad[:, :, i], dtype, name)
    if N == 1:  # one key: the softmax is 1 whatever q and k are
        assert grad[:, :, :2].abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 127, 130])
def test_attention_sizes_and_prefixes(N, dtype):
    check_attention(N, [0, 1, N - 1, N], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix, N", [([0, 511], 512), ([1, 513], 513)])
def test_attention_of_a_long_sequence(N, prefix, dtype, monkeypatch):
    if DEVICE == "cpu":  # the interpreter takes as long for a small tile
        monkeypatch.setattr(attention, "tiles", lambda *_: (64, 128, 4, 1))
    check_attention(N, prefix, dtype)


@pytest.mark.parametrize("D, H", [(48, 2), (80, 1), (96, 1), (32, 2), (64, 1), (128, 1), (8, 2)])
def test_attention_head_widths(D, H):
    check_attention(70, [33, 7], torch.float32, D, H)
    check_attention(70, [33, 7], torch.float16, D, H)


@pytest.mark.parametrize("rows, keys", [(16, 64), (64, 16), (32, 64), (128, 32)])
def test_attention_tiles_of_unequal_sides(rows, keys, monkeypatch):
    monkeypatch.setattr(attention, "tiles", lambda *_: (rows, keys, 4, 1))
    check_attention(130, [0, 31, 64, 129], torch.float32)


def test_attention_reads_through_strides():
    B, N, H, D = 2, 67, 2, 16
    heads_first = torch.randn(3, B, H, N, D, device=DEVICE).permute(1, 3, 0, 2, 4).requires_grad_()
    check_attention(N, [20, 50], torch.float32, D, H, qkv=heads_first)
    every_other = torch.randn(B, N, 3, H, 2 * D, device=DEVICE)[..., ::2].requires_grad_()
    dout = torch.randn(B, H, N, D, device=DEVICE).transpose(1, 2)
    check_attention(N, [20, 50], torch.float32, D, H, qkv=every_other, dout=dout)
    constant = torch.ones((), device=DEVICE).expand(B, N, H, D)  # what sum().backward() hands over
    check_attention(N, torch.tensor([20], device=DEVICE).expand(2), torch.float32, D, H, dout=constant)


def test_attention_is_what_the_model_computes():
    qkv, prefix = torch.randn(2, 65, 3, 2, 16, device=DEVICE), torch.tensor([3, 65], device=DEVICE)
    for kind in (torch.int32, torch.int64):
        assert torch.allclose(attention.prefix_attention(qkv, prefix.to(kind)), prefix_attention(qkv, prefix), atol=1e-5)
    beyond = attention.prefix_attention(qkv, torch.tensor([-4, 900], device=DEVICE))
    assert torch.allclose(beyond, prefix_attention(qkv, torch.tensor([0, 65], device=DEVICE)), atol=1e-5)


def test_attention_with_large_scores_stays_finite():
    check_attention(65, [1, 40], torch.float32, qkv=leaf(2, 65, 3, 1, 16, scale=8.0))


def test_no_token_sees_the_future():
    qkv, prefix = torch.randn(1, 66, 3, 1, 16, device=DEVICE), torch.tensor([10], device=DEVICE)
    before = attention.prefix_attention(qkv, prefix)
    qkv[:, 40:] = torch.randn_like(qkv[:, 40:])
    after = attention.prefix_attention(qkv, prefix)
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40:], after[:, 40:])


def test_attention_refuses_what_it_cannot_do():
    prefix = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match="width 160"):
        attention.prefix_attention(torch.randn(1, 4, 3, 1, 160, device=DEVICE), prefix)
    with pytest.raises(ValueError, match=r"prefix \[2\]"):
        attention.prefix_attention(torch.randn(1, 4, 3, 1, 16, device=DEVICE), prefix.expand(2))


# ---------------------------------------------------------------- patches


def scans(B, shape, kind, S):
    """Volume of `kind` with its axes stored in another order, low and scale [B, S] (None without S)."""
    X, Y, Z = shape
    v = torch.randint(0, 256, (B, Z, Y, X)) if kind == torch.uint8 else torch.randn(B, Z, Y, X) * (300 if S else 0.2) + (100 if S else 0.5)
    v = v.to(kind).to(DEVICE).transpose(1, 3)
    if not S:
        return v, None, None
    return v, torch.rand(B, S, device=DEVICE) * 300 - 400, 1 / (torch.rand(B, S, device=DEVICE) * 500 + 300)


PATCH_CASES = [  # voxels, dtype of the product, shape, P, S, C, ordered, begin
    (torch.int16, torch.float32, (8, 8, 16), 4, 4, 40, True, True),
    (torch.uint8, torch.float16, (8, 12, 8), 4, 2, 36, False, True),
    (torch.float16, torch.float16, (8, 8, 8), 4, None, 32, True, False),
    (torch.float32, torch.float32, (4, 8, 16), 4, 8, 70, False, False),   # sub-images of 2 slices: patches straddle them
    (torch.int16, torch.float16, (16, 16, 48), 8, 4, 130, True, True),    # of 12 slices
    (torch.float32, torch.float32, (6, 6, 6), 3, 1, 32, False, True),     # 27 voxels, no power of two
]


@pytest.mark.parametrize("kind, dtype, shape, P, S, C, ordered, starts", PATCH_CASES)
def test_patch_embedding(kind, dtype, shape, P, S, C, ordered, starts):
    B, G = 3, shape[0] * shape[1] * shape[2] // P ** 3
    volume, low, scale = scans(B, shape, kind, S)
    order = torch.randperm(G, device=DEVICE) if ordered else None
    weight, bias, begin = leaf(C, P ** 3, scale=P ** -1.5), leaf(C), leaf(C) if starts else None
    table, count = torch.randn(G, C, device=DEVICE), max(1, G - 1)
    given = [w for w in (weight, bias, begin) if w is not None]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = patches.patch_embed(volume, low, scale, weight, bias, table, order, count, begin)
    assert out.dtype == dtype and out.shape == (B, count + starts, C)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, given, dout)
    exact = [w.detach().double().requires_grad_() for w in given]
    wanted = patches.embed_reference(volume, low, scale, exact[0], exact[1], table, order, count, exact[2] if starts else None)
    close(out, wanted, dtype, "tokens")
    for name, g, w in zip(("weight", "bias", "begin"), grads, torch.autograd.grad(wanted, exact, dout.double())):
        assert g.dtype == torch.float32
        close(g, w, dtype, name)


@pytest.mark.parametrize("kind, dtype, shape, P, S, C, ordered, starts", PATCH_CASES)
@pytest.mark.parametrize("some", [False, True])
def test_patch_loss(kind, dtype, shape, P, S, C, ordered, starts, some):
    B, G = 2, shape[0] * shape[1] * shape[2] // P ** 3
    volume, low, scale = scans(B, shape, kind, S)
    order = torch.randperm(G, device=DEVICE) if ordered else None
    prefix = torch.tensor([G - 1, G // 2], device=DEVICE) if some else None
    pred, weight = leaf(B, G, P ** 3, dtype=dtype), torch.randn(B, G, device=DEVICE)
    errors = patches.patch_loss(pred, volume, low, scale, order, prefix)
    grad, = torch.autograd.grad(errors, pred, weight)
    exact = pred.detach().double().requires_grad_()
    wanted = patches.loss_reference(exact, volume, low, scale, order, prefix)
    assert errors.dtype == torch.float32 and grad.dtype == dtype
    close(errors, wanted, torch.float32, "errors")
    close(grad, torch.autograd.grad(wanted, exact, weight.double())[0], dtype, "dpred")
    if some:
        assert errors[0, :G - 1].eq(0).all() and grad[0, :G - 1].eq(0).all() and errors[0, G - 1] > 0


def test_weight_gradient_adds_its_parts(monkeypatch):
    """Rows enough for several parts, and a last one that is not full."""
    monkeypatch.setattr(patches, "tiles", lambda *_: (16, 32, 32, 4, 1))
    volume, low, scale = scans(9, (8, 8, 16), torch.int16, 4)
    weight, bias, table = leaf(20, 64), leaf(20), torch.randn(16, 20, device=DEVICE)
    out = patches.patch_embed(volume, low, scale, weight, bias, table, count=15)
    dout = torch.randn_like(out)
    taken = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda kernel, *a, **m: (taken.append(a), launch(kernel, *a, **m)))
    grad, = torch.autograd.grad(out, weight, dout)
    assert taken[0][7].shape == (2, 20, 64)  # the parts: 135 rows, 80 to a part
    exact = weight.detach().double().requires_grad_()
    wanted = patches.embed_reference(volume, low, scale, exact, bias.detach().double(), table, count=15)
    close(grad, torch.autograd.grad(wanted, exact, dout.double())[0], torch.float32, "weight")


def test_patches_are_what_the_model_computes():
    """The map from windows, bit for bit; targets and embedding to rounding."""
    volume = torch.randint(-30000, 30000, (2, 16, 16, 16), dtype=torch.int16, device=DEVICE)
    low = torch.tensor([[20000.0, -500], [-20100, 3]], device=DEVICE)
    window = torch.stack([low, low + 137], -1)
    low, high = window.unbind(-1)
    scale = 1 / (high - low).clamp(min=1e-6)
    unit = patchify(to_unit(volume, window), 8)
    eye = torch.eye(512, device=DEVICE)
    seen = patches.patch_embed(volume, low, scale, eye, torch.zeros(512, device=DEVICE), torch.zeros(8, 512, device=DEVICE))
    assert torch.equal(seen, unit)
    pred = torch.randn(2, 8, 512, device=DEVICE)
    errors = (pred - standardise(unit)[0]).square().mean(-1)
    assert torch.allclose(patches.patch_loss(pred, volume, low, scale), errors, rtol=1e-5)


def test_patches_refuse_what_they_cannot_do():
    volume, low, scale = scans(2, (8, 8, 8), torch.int16, 4)
    pred = torch.randn(2, 8, 64, device=DEVICE)
    with pytest.raises(ValueError, match="a divisor of 8"):
        patches.patch_loss(pred, volume, low[:, :3], scale[:, :3])
    with pytest.raises(ValueError, match="not a multiple of the patch 4"):
        patches.patch_loss(pred, volume[:, :6], low, scale)
    with pytest.raises(ValueError, match="int32"):
        patches.patch_loss(pred, volume.int(), low, scale)


# ---------------------------------------------------------------- operators


def test_operators_pass_opcheck():
    volume, low, scale = scans(2, (8, 8, 8), torch.int16, 2)
    order, prefix = torch.randperm(8, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    torch.library.opcheck(attention.forward_op, (leaf(2, 20, 3, 2, 16), prefix))
    table = torch.randn(8, 24, device=DEVICE)
    torch.library.opcheck(patches.embed_op, (volume, low, scale, leaf(24, 64), leaf(24), table, order, 7, leaf(24), torch.float32))
    torch.library.opcheck(patches.loss_op, (leaf(2, 8, 64), volume, low, scale, order, prefix))


def tiny_step(volume, low, scale, prefix, weight, bias, begin, table, head):
    """A model in miniature out of all the operators: the loss."""
    x = patches.patch_embed(volume, low, scale, weight, bias, table, None, 7, begin)   # [B, 8, C]
    y = attention.prefix_attention(torch.cat([x, x * 0.5, x + 1], -1).view(len(x), 8, 3, 2, -1), prefix + 1)
    return patches.patch_loss(y.flatten(2) @ head, volume, low, scale, None, prefix).sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_operators_compile_without_a_break(backend):
    volume, low, scale = scans(2, (8, 8, 8), torch.int16, 2)
    weights = leaf(32, 64), leaf(32), leaf(32), torch.randn(8, 32, device=DEVICE), leaf(32, 64)
    args = volume, low, scale, torch.tensor([0, 3], device=DEVICE), *weights
    wanted = [w for w in weights if w.requires_grad]
    compiled = torch.compile(tiny_step, fullgraph=True, backend=backend)
    for a, b in zip(torch.autograd.grad(compiled(*args), wanted), torch.autograd.grad(tiny_step(*args), wanted)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order, target", [("raster", "pixel"), ("image", "both")])
def test_the_model_with_kernels_is_the_model_and_compiles_as_one_graph(order, target):
    model = Model(Config(width=48, layers=2, heads=2, patch=4, order=order, target=target, codes=8)).to(DEVICE)
    volume = torch.randint(-100, 100, (2, 8, 8, 16), dtype=torch.int16, device=DEVICE)
    window, prefix = torch.tensor([-50.0, 60], device=DEVICE).expand(2, 4, 2).contiguous(), torch.tensor([3, 9], device=DEVICE)
    codes = torch.randint(0, 8, (2, 16, 1), device=DEVICE)

    def step():
        loss = model(volume, prefix, window, codes=codes)[0]
        loss.sum().backward()
        grads = [w.grad.clone() for w in model.parameters()]
        model.zero_grad()
        return [loss.detach(), *grads]
    plain = step()
    model.use("triton")
    fused = step()
    model.compile(fullgraph=True, backend="aot_eager")
    for name, found in (("triton", fused), ("compiled", step())):
        for a, b in zip(plain, found, strict=True):
            close(b, a.double(), torch.float32, name)


# ---------------------------------------------------------------- choice, bench, gate


def test_choice(monkeypatch):
    assert kernels.choose("torch", "cuda") == ("torch", "asked for")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.choose("auto", "cpu")[0] == "torch" and "cpu" in kernels.choose("auto", "cpu")[1]
    with pytest.raises(BadInput, match="--kernels triton cannot run here: .* cpu; use"):
        kernels.choose("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose("auto", "cpu")[0] == "torch"
    name, why = kernels.choose("triton", "cpu")
    assert name == "triton" and "interpreter" in why
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (7, 5))
    assert kernels.choose("auto", "cuda") == ("torch", "GPU has compute capability below 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (9, 0))
    assert kernels.choose("auto", "cuda")[0] == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels.choose("auto", "cuda")[0] == "torch" and "does not import" in kernels.choose("auto", "cuda")[1]


def run(*command, **env):
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **env}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=540)


def test_the_package_imports_no_triton():
    assert run("-c", "import sys, kernels; sys.exit('triton' in sys.modules)").returncode == 0


def test_bench_runs(tmp_path):
    done = run("-m", "kernels.bench", "--quick", "--device", "cpu", "--part", "attention", "patches", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert lines[0].startswith("part,rival,n,what,ms") and len(lines) == 1 + 12 + 4 + 1
    assert "no CUDA device" in done.stdout and (tmp_path / "attention.png").stat().st_size > 10_000


def test_kernels_compile_without_spills_for_gpus_that_are_not_here():
    done = run("-m", "kernels.bench", "--part", "gate", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {r[0] for r in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) == 36
    assert all(int(r[-3]) > 0 and int(r[-2]) == 0 for r in rows)
    assert "no spills" in done.stdout


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("N, D", [(1, 64), (130, 64), (512, 64), (513, 128), (514, 80), (1500, 64), (1500, 128), (4097, 32)])
def test_gpu_attention(N, D, dtype):
    check_attention(N, [0, 1, N // 2, N], dtype, D, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.bfloat16])
def test_gpu_patches(kind, dtype):
    test_patch_embedding(kind, dtype, (64, 64, 64), 16, 4, 768, True, True)
    test_patch_loss(kind, dtype, (64, 64, 64), 16, 4, 768, True, True, True)


@pytest.mark.gpu
def test_gpu_gradients_are_the_same_to_the_bit():
    qkv, prefix = leaf(4, 700, 3, 4, 64, dtype=torch.bfloat16), torch.tensor([0, 100, 650, 700], device=DEVICE)
    dout = torch.randn(4, 700, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    volume, low, scale = scans(8, (64, 64, 64), torch.int16, 4)
    weight, bias, table = leaf(768, 4096), leaf(768), torch.randn(64, 768, device=DEVICE)

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            x = patches.patch_embed(volume, low, scale, weight, bias, table)
        torch.manual_seed(1)
        return (*torch.autograd.grad(attention.prefix_attention(qkv, prefix), qkv, dout),
                *torch.autograd.grad(x, (weight, bias), torch.randn_like(x)))
    for a, b in zip(gradients(), gradients()):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_training_step_compiles():
    """A pre-training step of the model through torch.compile, once with PyTorch's operations and once with the kernels."""
    losses, norms = [], []
    for name in ("torch", "triton"):
        torch.manual_seed(0)
        model = Model(Config(**SIZES["nano"])).to(DEVICE)
        model.use(name)
        model.compile(fullgraph=True)
        volume = torch.randint(-1000, 1000, (4, 32, 32, 32), device=DEVICE, dtype=torch.int16)
        window = torch.tensor([-900.0, 900.0], device=DEVICE).expand(4, 4, 2)
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(volume, torch.tensor([0, 5, 40, 63], device=DEVICE), window)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in model.parameters()]).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and norms[1] == pytest.approx(norms[0], rel=5e-2)


SANITIZED = """
import torch
from kernels import prefix_attention as a, patch_embed as p
x = torch.randn(2, 77, 3, 2, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
a.prefix_attention(x, torch.tensor([5, 70], device="cuda")).sum().backward()
v = torch.randint(-9, 9, (2, 24, 16, 16), device="cuda", dtype=torch.int16)
low, scale = torch.full((2, 4), -9.0, device="cuda"), torch.full((2, 4), 0.05, device="cuda")
w, b = torch.randn(70, 512, device="cuda", requires_grad=True), torch.randn(70, device="cuda", requires_grad=True)
p.patch_embed(v, low, scale, w, b, torch.randn(12, 70, device="cuda"), None, 11, b).sum().backward()
y = torch.randn(2, 12, 512, device="cuda", requires_grad=True)
p.patch_loss(y, v, low, scale).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not on PATH")
def test_gpu_memory_is_not_overrun():
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["compute-sanitizer", "--error-exitcode", "7", sys.executable, "-c", SANITIZED], env=env, cwd=ROOT,
                          capture_output=True, text=True, timeout=540)
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
