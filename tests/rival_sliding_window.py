"""Our sliding window and MONAI's on one scan, in turn: seconds and peak memory (pip install monai).

    python tests/rival_sliding_window.py     # 320 x 320 x 160 voxels, 16 classes, windows of 96³

Each run is a process of its own; the network is one convolution, so that what is timed is the
window. Both end with a label map, which has to be the same but for ties.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
SHAPE, CLASSES, ROI, BATCH, TIMES = (320, 320, 160), 16, (96, 96, 96), 1, 3


def peak():
    """KiB of this program (ru_maxrss is inherited from the one that began it)."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@torch.no_grad()
def run(name):
    from finetune_seg import labels_of, sliding_window

    if name == "MONAI":
        from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    volume, net = torch.rand(SHAPE), torch.nn.Conv3d(1, CLASSES, 3, padding=1)
    net(volume[None, None, :32, :32, :32])
    before, start = peak(), time.perf_counter()
    if name == "MONAI":
        how = {"overlap": 0.5, "mode": "gaussian", "sigma_scale": 0.125}
        scores = sliding_window_inference(volume[None, None], ROI, BATCH, net, **how)
        labels = scores[0].argmax(0)
    else:
        predict = lambda windows: net(windows[:, None])
        labels = sliding_window(predict, volume, ROI, 0.5, BATCH, finish=labels_of)
    seconds = time.perf_counter() - start
    held = peak() - before
    counts = torch.bincount(labels.flatten().long(), minlength=CLASSES).tolist()
    print(json.dumps([seconds, held / 2**20, counts]))


def main():
    told = {"MONAI": [], "ours": []}
    for _ in range(TIMES):
        for name, runs in told.items():
            command = [sys.executable, __file__, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {runs[-1][0]:.1f} s, {runs[-1][1]:.2f} GiB", flush=True)
    pairs = [*zip(told["ours"], told["MONAI"])]
    differ = max(abs(a - b) for a, b in zip(told["ours"][0][2], told["MONAI"][0][2]))
    for what, i in (("time", 0), ("memory", 1)):
        print(f"{what}: {', '.join(f'{a[i] / b[i]:.2f}' for a, b in pairs)} of MONAI's")
    print(f"voxels of a class differ by {differ} at most")


if __name__ == "__main__":
    run(sys.argv[1]) if sys.argv[1:] else main()
