"""Shared set-up of all tests: seeds, markers, poisoned memory, and a count of what was skipped for want of a GPU."""

import ctypes
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules beside this file

GPU_SKIP = "no CUDA device"
# After one of these every later call on the GPU fails in that process.
STICKY = ("an illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure",
          "an illegal instruction", "invalid address space", "hardware stack error")
_broken = []  # tests of this process that ended in one
POISON = 0x7F  # 0x7f7f7f7f is 3.4e38 as a float32, 1.4e306 as a float64, NaN as a float16


def pytest_configure(config):
    if importlib.util.find_spec("fastflow") is None or importlib.util.find_spec("fastflow.kernels") is None:
        pytest.exit("fastflow is not installed: run `make test`, or `pip install --no-build-isolation -e .`", 4)
    poison_fresh_memory()
    seed_no_absent_device()


def seed_no_absent_device():
    """torch.manual_seed keeps the seed for every device that is not there, and each time formats the whole stack for
    the error it may have later: a millisecond a call."""
    for name in ("cuda", "mtia", "xpu"):
        device = getattr(torch, name, None)
        if device is not None and not device.is_available():
            device.manual_seed_all = lambda seed: None


def poison_fresh_memory():
    """Make glibc fill what malloc returns, so that an output element nobody wrote can't pass as a plausible number."""
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        m_perturb = -6
        ctypes.CDLL(None).mallopt(m_perturb, POISON ^ 0xFF)


def pytest_collection_modifyitems(config, items):
    run_slow = "slow" in config.getoption("markexpr")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=GPU_SKIP))
        elif "slow" in item.keywords and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What was imported and collected stays: Python's garbage collector need not walk it again in every test, nor what
    is made since quite so often, which shows where graphs are compiled."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and any(error in str(report.longrepr) for error in STICKY):
        _broken.append(item.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """A worker of pytest-xdist whose GPU context is broken ends once that is reported; another one takes over."""
    if _broken and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    gpu = sum(1 for report in skipped if "gpu" in getattr(report, "keywords", ()))
    why = f" ({GPU_SKIP})" if gpu and not torch.cuda.is_available() else ""
    terminalreporter.write_line(f"GPU tests skipped: {gpu}{why}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision(request, monkeypatch):
    """Convolutions on a GPU multiply in float32 itself, so that errors are those of roundings; a test of TF32 asks."""
    if "gpu" in request.keywords:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """What a test has compiled is forgotten: it counts towards the limit of compilations of the same function."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture
def threads():
    """A setter of torch's thread count that is undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


_groups = []  # to the end of the process


@pytest.fixture
def process_group(tmp_path):
    """The default process group, of this process alone.

    It stays alive when it is destroyed: a DistributedDataParallel that dies as its last owner waits for gloo's thread
    with the GIL in its hands, which that thread may be waiting for to drop a tensor.
    """
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    _groups.append(torch.distributed.group.WORLD)
    try:
        yield _groups[-1]
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh(process_group):
    """A device mesh of this process alone."""
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
