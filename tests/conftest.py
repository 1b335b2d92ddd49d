import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well (minutes each)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skipif(True, reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skipif(True, reason="needs a CUDA device"))


@pytest.fixture
def one_thread():
    """Threads cost more than they bring on tensors this small, and much more where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def phantom_home(tmp_path_factory):
    """A folder with data/phantom/{amos,brats,deeplesion,corpus}, as pretrain.py makes it in the current folder."""
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
    """script("pretrain.py", "--steps", 3, …): runs it in the phantom's folder, with `ranks` processes under torchrun."""
    def run(name, *flags, ranks=1, code=0, popen=False):
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1", "--master_port=0",
                       "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
        command = [*launch, str(ROOT / name), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else None
        if popen:
            return subprocess.Popen(command, cwd=phantom_home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run(command, cwd=phantom_home, env=env, capture_output=True, text=True, timeout=540)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done
    return run
