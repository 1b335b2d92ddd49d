"""The kernels and their rivals, timed in one run on the machine that it runs on.

    python -m kernels.bench                      # attention, patches and the whole step, on CUDA
    python -m kernels.bench --part attention --quick
    python -m kernels.bench --first-hour         # all that a new GPU should be asked

Prints a table and writes it to --out as each part ends, with a figure: median, p20 and p80 of
Triton's `do_bench` (it empties the cache between runs), of attention averaged over fresh sets of
inputs with uniform random prefixes. FLOP are the useful ones: visible pairs alone, a backward of
attention as 2.5 forwards.
What a rival may prepare once (dense masks, indices) is not timed; FlexAttention's block mask is,
since it changes with every batch. Without a CUDA device the PyTorch paths alone are timed, at small
sizes, which says nothing about a GPU: it shows that the script runs.

Sections: arguments · attention · patches · the step · tiles · timing · reports

B batch, N tokens, H heads, D width of a head, P patch edge, G patches of a volume, C width.
"""

import contextlib
import datetime
import math
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from common import (
    check_least,
    cli,
    draw_curves,
    machine_flags,
    new_parser,
    setup,
    write_table,
    write_text,
)
from kernels import plain
from model import SIZES, Config, Model, data_sheet, matmul_rate, positions, random_scans, timed

OURS, MASKED, EFFICIENT = "ours, Triton", "SDPA, mask", "SDPA, mask, EFFICIENT"
FLEX, CAUSAL = "FlexAttention", "SDPA, causal (floor)"
PERMUTE, CONV, ERRORS = "permute + F.linear", "Conv3d, voxels prepared", "permute + standardise"
PUBLISHED = "published way: Conv3d, dense mask, eager"
PLAIN, FAST = "ours, PyTorch (compiled on CUDA)", "ours, Triton, compiled"

# What the kernels have to reach on an H100 for n: at least this many times as fast, aim
TARGETS = {
    (MASKED, "both"): {512: (1.3, 1.6), 4096: (2.0, 2.5), 16384: (2.2, 2.7)},
    (EFFICIENT, "both"): {512: (2.5, 3.5), 4096: (4, 5), 16384: (4.5, 5.4)},
    (FLEX, "both"): {512: (1.2, 1.4), 4096: (1.0, 1.2), 16384: (1.0, 1.2)},
    (CAUSAL, "both"): {512: (0.9, 1.15), 4096: (1.0, 1.15), 16384: (1.0, 1.15)},
    (PERMUTE, "forward"): {512: (1.3, 1.6)},
    (PERMUTE, "both"): {512: (1.1, 1.3)},
    (CONV, "forward"): {512: (10, 10)},
    (PUBLISHED, "both"): {512: (2, 2)},
}

# n: tokens or patches; what: forward, backward or both; ms: the median
Row = namedtuple("Row", "part rival n what ms p20 p80 tflops")

HOUR = {  # --first-hour
    "gpu tests": "-m pytest -q -m gpu tests",
    "machine code": "-m pytest -q -k spill tests/test_kernels.py",
    "kernels and rivals": "-m kernels.bench",
    "tiles": "-m kernels.bench --part tiles --out kernels/results/tiles",
    "steps without the loader": "pretrain.py --bench",
    "steps with the loader": "pretrain.py --val-samples 8 --out out/first-hour --steps",
    "their log": "-c print(open('out/first-hour/log.jsonl').read())",
}

# ---- arguments -------------------------------------------------------------------------------


def main():
    parts = {"attention": bench_attention, "patches": bench_patches, "step": bench_step}
    usual, parts["tiles"] = list(parts), bench_tiles
    p = new_parser(__doc__)
    p.add_argument("--part", nargs="+", choices=parts, default=usual, help="default: all but tiles")
    p.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    p.add_argument("--batch", type=int, default=72, help="sequences of the step (published: 72)")
    p.add_argument("--out", type=Path, default="kernels/results", help="folder of table and figure")
    words = "tests, bench, tiles, steps with and without the loader; a summary; no other flags"
    p.add_argument("--first-hour", action="store_true", help=words)
    machine_flags(p, workers=None, kernels=False)
    args = p.parse_args()
    if args.first_hour:
        return first_hour(args.out)
    check_least(args)
    machine = setup(args)
    if machine.cuda:
        kernels.choose("triton", machine.device)
    else:
        machine.say("no CUDA device: PyTorch alone, at small sizes: it says nothing about a GPU")
        args.batch = 2
    rows = []
    for part in args.part:
        known = len(rows)
        for contest in parts[part](machine, args):
            rows += race(*contest, machine, args.quick)
        report(rows, known, machine, args)


def first_hour(out):
    """Run HOUR's commands one after the other; what they say, as Markdown in out/first-hour.md."""
    out.mkdir(parents=True, exist_ok=True)
    cuda, said = torch.cuda.is_available(), ""
    table = "| part | exit code | minutes |\n|---|---|---|\n"
    for name, words in HOUR.items():
        words = words.split() + ["200" if cuda else "2"] * words.endswith("--steps")
        start, lines = time.perf_counter(), []
        print(f"== {name}: python {' '.join(words)}", flush=True)
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout:  # a bar redraws itself with \r: its last state
                line = line.decode(errors="replace").rstrip("\r\n").split("\r")[-1] + "\n"
                print(line, end="", flush=True)
                lines.append(line)
        minutes = (time.perf_counter() - start) / 60
        table += f"| {name} | {process.returncode} | {minutes:.1f} |\n"
        said += f"\n### {name}\n\n```\n{''.join(lines[-200:])}```\n"
        write_text(out / "first-hour.md", table + said)
    print(f"wrote {out / 'first-hour.md'}")


# ---- attention -------------------------------------------------------------------------------
#
# A part yields contests, what `race` takes of one rival. A rival is a pair (prepare, run):
# run(*prepare(*given)) -> output, or run(*given) where prepare is None. Preparing is not timed.


def with_mask(qkv, prefix):
    return qkv, prefix, plain.dense_mask(qkv, prefix)


def sdpa(qkv, prefix, mask=None, backend=None):
    """PyTorch's fused attention, by one backend if it is named; causal without a mask."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


def flex():
    """FlexAttention, compiled, with the block mask of this batch built anew in each call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    make = torch.compile(create_block_mask, dynamic=False)

    def run(qkv, prefix):
        (B, N), seen = qkv.shape[:2], lambda b, h, i, j: (j <= i) | (j < prefix[b])
        blocks = make(seen, B, None, N, N, device=qkv.device)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return attend(q, k, v, block_mask=blocks).transpose(1, 2)

    return run


def attention_rivals(machine):
    if not machine.cuda:
        return {MASKED: (with_mask, sdpa), CAUSAL: (None, sdpa)}
    from kernels import fused

    return {
        OURS: (None, fused.attend),
        MASKED: (with_mask, sdpa),
        EFFICIENT: (with_mask, partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)),
        FLEX: (None, flex()),
        CAUSAL: (None, partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    }


def bench_attention(machine, args):
    H, D, rows, lengths = 12, 64, 32768, (512, 1024, 2048, 4096, 16384)
    if args.quick:
        lengths = 512, 4096
    if not machine.cuda:
        rows, lengths = 256, (64, 128)
    for N in lengths:
        torch._dynamo.reset()  # else FlexAttention meets the limit of recompilations at the last N
        B = max(2, rows // N)
        inputs, pairs = [], 0
        for _ in range(3):
            qkv = normal(machine, B, N, 3, H, D)
            prefix = torch.randint(1, N + 1, (B,), device=machine.device)
            inputs.append((qkv, prefix))
            pairs += plain.dense_mask(qkv, prefix).sum().item() / 3
        for name, rival in attention_rivals(machine).items():
            flops = 4 * D * H * (B * N * (N + 1) / 2 if name == CAUSAL else pairs)
            work = {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}
            if name == FLEX:  # compiled: its graph cannot be kept
                work.pop("backward")
            yield "attention", name, N, partial(ways, machine, *rival), inputs, work


def normal(machine, *shape):
    return torch.randn(shape, device=machine.device, dtype=machine.dtype, requires_grad=True)


# ---- patches ---------------------------------------------------------------------------------


def bench_patches(machine, args):
    """The embedding from int16 voxels, and the loss against them."""
    B, edge = (32, 128) if machine.cuda else (2, 32)
    P, C, device = 16, 768, machine.device
    grid = (edge // P,) * 3
    G = math.prod(grid)
    linear = (*torch.nn.Linear(P**3, C, device=device).parameters(), positions(grid, C).to(device))
    scan = random_scans(B, edge, device)
    inputs = {"embed": [(*scan, *linear)], "loss": [(*scan, normal(machine, B, G, P**3))]}

    def embed(ops, volume, ranges, *linear):
        return ops.embed(ops.read(volume, ranges, P), *linear)

    def loss(ops, volume, ranges, pred):
        return ops.loss(pred, ops.read(volume, ranges, P))

    def unit(volume, ranges, *linear):
        return plain.to_unit(volume, ranges).to(machine.dtype), None, *linear

    compiled = torch.compile if machine.cuda else lambda run: run
    rivals = [
        ("embed", PERMUTE, None, compiled(partial(embed, plain))),
        ("embed", CONV, unit, partial(embed, Published())),
        ("loss", ERRORS, None, compiled(partial(loss, plain))),
    ]
    if machine.cuda:
        from kernels import fused

        rivals += [
            ("embed", OURS, None, partial(embed, fused)),
            ("loss", OURS, None, partial(loss, fused)),
        ]
    flops = 2 * B * G * P**3 * C
    work = {"embed": {"forward": flops, "both": 2 * flops}, "loss": {"both": 0}}
    for part, name, *rival in rivals:
        yield part, name, G, partial(ways, machine, *rival), inputs[part], work[part]


# ---- the step --------------------------------------------------------------------------------


class Published:
    """Operations as the published recipe has them: a convolution, one dense mask for all layers.

    The volume is in [0, 1] already; its order is the raster's.
    """

    def read(self, volume, ranges, patch, order=None):
        self.patch, self.mask = patch, None
        return volume

    def embed(self, volume, weight, bias, table, count=None, begin=None):
        P = self.patch
        x = F.conv3d(volume[:, None], weight.view(-1, 1, P, P, P), bias, stride=P).flatten(2).mT
        return plain.prepended((x + table.to(x.dtype))[:, :count], begin)

    def attend(self, qkv, prefix):
        if self.mask is None:
            self.mask = plain.dense_mask(qkv, prefix)
        return sdpa(qkv, prefix, self.mask)

    def loss(self, pred, volume, prefix):
        return plain.loss(pred, plain.patchify(volume, self.patch), prefix)


def bench_step(machine, args):
    """One optimiser step: ViT-B at 128³, nano at 32³ without CUDA."""
    size, edge = ("base", 128) if machine.cuda else ("nano", 32)
    config = Config(**SIZES[size])
    G = (edge // config.patch) ** 3
    scans = random_scans(args.batch, edge, machine.device)
    for name in (PUBLISHED, PLAIN, FAST) if machine.cuda else (PUBLISHED, PLAIN):
        model = Model(config).to(machine.device).use("triton" if name == FAST else "torch")
        scan = scans
        if name == PUBLISHED:
            scan, ops = (plain.to_unit(*scans), None), Published()
            for module in (model, *model.blocks):
                module.ops = ops
        elif machine.cuda:
            model.compile()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        step = partial(train_step, model, optimiser, *scan, G, machine)
        work = {"both": args.batch * model.flops([edge] * 3)}
        yield "step", name, G, lambda run: {"both": run}, [step], work
        if name == FAST:
            args.out.mkdir(parents=True, exist_ok=True)
            with torch.profiler.profile() as trace:
                for _ in range(3):
                    step()
            trace.export_chrome_trace(str(args.out / "step.json.gz"))


def train_step(model, optimiser, volume, ranges, G, machine):
    prefix = torch.randint(G, (len(volume),), device=machine.device)
    with machine.autocast():
        loss, _ = model(volume, prefix, ranges)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


# ---- tiles -----------------------------------------------------------------------------------

TRIALS = (  # of attention's kernels, beside the shipped ones; none spills
    ("forward", [(64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)]),
    ("backward", [(64, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2)]),
    ("backward", [(64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2)]),
)


def bench_tiles(machine, args):
    """Attention with one kernel's tile changed: what TILES of prefix_attention.py should have."""
    if not machine.cuda:
        return
    from kernels import fused, prefix_attention

    for N in (512, 4096):
        key = kernels.family(machine.device), N > 1024, False
        qkv = normal(machine, 32768 // N, N, 3, 12, 64)
        inputs = [(qkv, torch.randint(1, N + 1, (len(qkv),), device=machine.device))]
        for i, (what, trials) in enumerate(TRIALS):
            shipped = prefix_attention.TILES[key]
            for tile in dict.fromkeys([shipped[i], *trials]):
                name = f"kernel {i} {tile}" + " shipped" * (tile == shipped[i])
                changed = {key: (*shipped[:i], tile, *shipped[i + 1 :])}
                with mock.patch.dict(prefix_attention.TILES, changed):
                    run = partial(ways, machine, None, fused.attend)
                    yield "tiles", name, N, run, inputs, {what: 0}


# ---- timing ----------------------------------------------------------------------------------


def quantiles(run, machine, rep):
    """Median, 20th and 80th percentile of the milliseconds of run(), of as many as fit `rep` ms."""
    shares = [0.5, 0.2, 0.8]
    if machine.cuda:
        from triton.testing import do_bench

        return do_bench(run, warmup=rep // 6, rep=rep, quantiles=shares)
    times = 1e3 * torch.tensor(timed(lambda _: run(), 5, machine)[1:])
    return times.quantile(torch.tensor(shares)).tolist()


def ways(machine, prepare, run, given):
    """{what: function to time} of a rival on a set of inputs; gradients by those that want one."""
    wanted = [t for t in given if t.requires_grad]
    if prepare:
        given = prepare(*given)

    def forward():
        with machine.autocast():
            return run(*given)

    out = forward()
    dout = torch.randn(out.shape, device=out.device, dtype=out.dtype)
    return {
        "forward": torch.no_grad()(forward),
        "backward": lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True),
        "both": lambda: torch.autograd.grad(forward(), wanted, dout),
    }


def race(part, name, n, ways, inputs, work, machine, quick):
    """Rows of one rival, means over the sets of `inputs`; none, and a line why, if it cannot run.

    ways: a set -> {what: function to time}; work: {what: useful FLOP} of those that are timed.
    """
    rep = 50 if quick else 300
    if part == "step":
        rep *= 10  # a dozen of them

    def times(given):
        runs = ways(given)
        return [quantiles(runs[what], machine, rep) for what in work]

    try:
        # one at a time: the dense masks and saved outputs of several would fill the memory at 16k
        means = torch.tensor([times(given) for given in inputs]).mean(0).tolist()
    except Exception as e:  # memory, a backend that refuses, compiling
        if OURS in name:
            raise  # the kernels under test have to run
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        machine.say(f"{part}, {name}, {n}: not timed ({why[:140]})")
        return
    finally:
        torch.cuda.empty_cache()  # nothing without CUDA
    for (what, flops), ms in zip(work.items(), means):
        tflops = float(f"{flops / ms[0] / 1e9:.4g}")
        yield Row(part, name, n, what, *(round(t, 4) for t in ms), tflops)


# ---- reports ---------------------------------------------------------------------------------


def report(rows, known, machine, args):
    """Print the rows after the `known`, ours beside the targets; write all and attention.png."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    threads = f"CPU, {torch.get_num_threads()} threads"
    info = {
        "device": torch.cuda.get_device_name() if machine.cuda else threads,
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.date.today(),
    }
    rate = matmul_rate(machine) / 1e12
    title = "{device}, torch {torch}, triton {triton}, cuDNN {cudnn}, {date}".format(**info)
    machine.say(f"\n{title}; products of matrices: {rate:.3g} TFLOP/s")
    ours = {(r.part, r.n, r.what): r for r in rows if OURS in r.rival}
    for r in (Row(*Row._fields), *rows[known:]):
        line = "{:<10} {:<42} {:>6} {:<9} {:>9} {:>9} {:>9} {:>9}".format(*r)
        if r.part == "step":
            line += (
                f"  {1e3 * args.batch / r.ms:.1f} sequences/s, {r.tflops / rate:.1%} of the rate"
            )
            if sheet := data_sheet(info["device"]):
                line += f", {1e12 * r.tflops / sheet:.1%} of its data sheet's"
        best, goals = ours.get((r.part, r.n, r.what)), TARGETS.get((r.rival, r.what), {})
        if best and r.n in goals:
            least, aim = goals[r.n]
            gain = r.ms / best.ms
            if r.rival == CAUSAL:  # which has less to do
                gain = best.tflops / r.tflops
            verdict = "reached" if gain >= aim else "met" if gain >= least else "MISSED"
            line += f"  ours {gain:.2f}x as fast (H100: at least {least}, aim {aim}): {verdict}"
        machine.say(line)
    write_table(args.out / "bench.csv", [*Row._fields, *info], [[*r, *info.values()] for r in rows])
    if timed := [r for r in rows if r.part == "attention"]:
        points = [{"tokens": r.n, f"{r.rival}, {r.what}": r.tflops} for r in timed]
        panels = []
        for what in dict.fromkeys(r.what for r in timed):
            keys = dict.fromkeys(f"{r.rival}, {what}" for r in timed)
            panels.append((f"{what}, useful TFLOP/s", keys, {}))
        draw_curves(args.out / "attention.png", points, *panels, x="tokens")
    machine.say(f"\nwrote {args.out}")


if __name__ == "__main__":
    cli(main)
