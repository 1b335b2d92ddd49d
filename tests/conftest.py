import os
import subprocess
import sys
from pathlib import Path

import pytest

# The tests mean the CPU, where Triton's kernels run in its interpreter. Those of a GPU are asked
# for: python -m pytest -m gpu tests (xdist's processes inherit the answer). Threads cost more than
# they bring on tensors this small, far more where cores are shared. All this is said before
# PyTorch and Triton are imported.
os.environ["OMP_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ and not {"-m", "gpu"} <= {*sys.argv}:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

import torch

torch.backends.cuda.matmul.allow_tf32 = False  # as setup has it

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="run the tests marked slow as well (minutes each)"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skipif(True, reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skipif(True, reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom_home(tmp_path_factory):
    """A folder with data/phantom/{amos,brats,deeplesion,corpus}, as pretrain.py makes it."""
    from serialize import ensure_phantom

    home, here = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(home)
    try:
        ensure_phantom()
    finally:
        os.chdir(here)
    return home


@pytest.fixture(scope="session")
def corpus(phantom_home):
    return phantom_home / "data/phantom/corpus"


@pytest.fixture
def script(phantom_home):
    """script("pretrain.py", "--steps", 3, …) in the phantom's folder, by torchrun if ranks > 1."""

    def run(name, *flags, ranks=1, code=0, popen=False):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--rdzv_backend=c10d"]
            command += [f"--nproc_per_node={ranks}", "--rdzv_endpoint=127.0.0.1:0"]
        command += [str(ROOT / name), *map(str, flags)]
        start = {"args": command, "cwd": phantom_home, "text": True}
        if popen:
            start |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            return subprocess.Popen(**start, start_new_session=True)
        done = subprocess.run(**start, capture_output=True, timeout=540, check=False)
        said = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert done.returncode == code, f"exit code {done.returncode}\n{said}"
        return done

    return run
