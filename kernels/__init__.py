"""The Triton kernels of pre-training, each with a plain PyTorch reference beside it, and the choice between the two.

    prefix_attention.py   attention with a visible prefix, forward and backward
    patch_embed.py        voxels -> tokens, and the loss against the voxels of a patch, without an unfolded copy
    bench.py              python -m kernels.bench: the kernels and their rivals, timed in one run

Importing this package imports no Triton: machines without it have the PyTorch path of model.py.
"""
import os

import torch

from common import BadInput


def choose(kernels, device):
    """--kernels {auto, torch, triton} on `device` -> "torch" or "triton", and why. BadInput: triton asked for, but it cannot run."""
    device = torch.device(device)
    if kernels == "torch":
        return "torch", "asked for"
    if kernels == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton", "asked for; Triton's interpreter on the CPU is for tests, and slow"
    reason = hindrance(device)
    if reason is None:
        return "triton", f"{torch.cuda.get_device_name(device)}, compute capability {'%d.%d' % torch.cuda.get_device_capability(device)}"
    if kernels == "triton":
        raise BadInput(f"--kernels triton cannot run here: {reason}; use --kernels auto or torch")
    return "torch", reason


def hindrance(device):
    """What keeps Triton from running on `device`, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"Triton's kernels need a CUDA device, and this is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, which is for tests on a CPU"
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"Triton does not import ({e})"
    return None


def family(device):
    """The row of the tile tables: 90 where the tensor cores read shared memory (H100, B200), 80 where registers (A100, RTX).

    Tiles of 80 stay below the 99 KiB of shared memory that the smaller ones of its GPUs have.
    """
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10, 11) else 80


def launch(kernel, programs, device, *args, **meta):
    """`programs` programs of a Triton kernel on the current stream of `device`; args and meta as the kernel takes them."""
    if not programs:
        return
    if device.type != "cuda":
        kernel[(programs,)](*args, **meta)
        return
    with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments are on
        kernel[(programs,)](*args, enable_fp_fusion=True, **meta)

