"""Our loader and PyTorch's DataLoader on one corpus, in turn: sequences of 128³ a second.

    python tests/rival_loader.py               # noise in full size: three minutes, 0.7 GB of disk

Each has a process a core and batches of 12, handed over in the memory of the CPU. What both read is
the same data set of today, so that what is compared is the way from a worker to the training loop.
"""

import itertools
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Machine, batches, cores, keep_freed_memory
from serialize import KINDS, Sequences, write_noise

BATCH, SECONDS, TIMES = 12, 8, 3
MACHINE = Machine(0, 1, torch.device("cpu"), torch.float32)


def lists():
    return ([*range(n, n + BATCH)] for n in itertools.count(0, BATCH))


def ours(data):
    return batches(data, lists(), Namespace(workers=cores()), MACHINE)


def pytorch(data):
    return iter(DataLoader(data, batch_sampler=lists(), num_workers=cores()))


def rate(supply):
    for _ in range(4):
        next(supply)
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < SECONDS:
        count += len(next(supply)["kind"])
    return count / seconds


def main():
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_noise(folder)
        for kind in KINDS:
            data = Sequences(folder, mix=f"{kind}=1")
            pairs = [(rate(ours(data)), rate(pytorch(data))) for _ in range(TIMES)]
            words = ", ".join(f"{a:.0f} : {b:.0f} = {a / b:.2f}" for a, b in pairs)
            print(f"{kind:>9}  ours : PyTorch's, sequences/s  {words}", flush=True)


if __name__ == "__main__":
    main()
