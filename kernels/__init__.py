"""The operations of pre-training, in plain PyTorch and as Triton kernels, and the choice of them.

    plain.py              voxels -> tokens, attention with a visible prefix, the loss: PyTorch
    fused.py              the same four by Triton: patch_embed.py and prefix_attention.py
    bench.py              python -m kernels.bench: the kernels and their rivals, timed in one run

Importing this package imports no Triton: machines without it have plain.py.
"""

import os
import shutil
import sysconfig

import torch

from common import BadInput


def choose(kernels, device):
    """--kernels {auto, torch, triton} on `device` -> "torch" or "triton", and why.

    BadInput: triton was asked for, but it cannot run.
    """
    device = torch.device(device)
    if kernels == "torch":
        return "torch", "asked for"
    if kernels == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton", "asked for; Triton's interpreter on the CPU is for tests, and slow"
    reason = hindrance(device)
    if reason is None:
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return "triton", f"{name}, compute capability {major}.{minor}"
    if kernels == "triton":
        raise BadInput(f"--kernels triton cannot run here: {reason}; use --kernels auto or torch")
    return "torch", reason


def hindrance(device):
    """What keeps Triton from running on `device`, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"Triton's kernels need a CUDA device, and this is {device.type}"
    if torch.version.hip:
        return "the kernels' tiles are for NVIDIA's GPUs, and this PyTorch is for AMD's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, which is for tests on a CPU"
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"Triton does not import ({e})"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "Triton needs a C compiler, and there is no gcc or clang (or CC)"
    if not os.path.exists(f"{sysconfig.get_path('include', 'posix_prefix')}/Python.h"):
        return "Triton needs Python's headers, and there is no Python.h (python3-dev)"
    return None


def family(device):
    """The row of the tile tables: 90 where tensor cores read shared memory (H100, B200), else 80.

    Tiles of 80 stay below the 99 KiB of shared memory that the smaller ones of its GPUs have.
    """
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device)[0] in (9, 10, 11) else 80


def launch(kernel, programs, device, *args, **meta):
    """`programs` programs of a Triton kernel on the current stream of `device`."""
    if not programs:
        return
    if device.type != "cuda":
        kernel[(programs,)](*args, **meta)
        return
    with torch.cuda.device(device):  # Triton launches on the current device
        kernel[(programs,)](*args, enable_fp_fusion=True, **meta)
