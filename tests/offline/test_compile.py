"""Every kernel compiles for every kind of GPU since sm_75, without spills, approximations or narrow accesses."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import calls  # noqa: E402  the path above
import compiling  # noqa: E402
import torch  # noqa: E402
from sweeps import rest_slow  # noqa: E402

QUICK = calls.quick_calls()
WIDE = calls.wide_calls()
OTHER_TRITON = "FASTFLOW_TRITON36_PYTHON"


def launches_on(call, capability):
    """What ``call`` launches on such a GPU."""
    with mock.patch.object(calls.conv_net, "_is_hopper", lambda device: capability == 90):
        return compiling.launches_of(call)


def check(call, capability):
    """Compile what ``call`` launches; returns the kernels."""
    kernels = [compiling.compiled(launch, capability) for launch in launches_on(call, capability)]
    assert kernels
    for kernel in kernels:
        found = compiling.APPROXIMATE.findall(kernel.ptx)
        assert not found, f"{kernel.name}: approximate instructions {sorted(set(found))}"
        assert ".local" not in kernel.ptx, f"{kernel.name}: local memory in the PTX"
        resources = kernel.resources()
        assert resources["STACK"] == resources["LOCAL"] == 0, f"{kernel.name}: spills, {resources}"
        assert kernel.shared <= compiling.CAPABILITIES[capability] * 1024, f"{kernel.name}: {kernel.shared} bytes"
        assert has_64_bit_offsets(kernel.ttir), f"{kernel.name}: no 64-bit product in its offsets"
    return kernels


def has_64_bit_offsets(ttir):
    """Whether offsets are 64-bit products, and no pointer is moved by a 32-bit one."""
    moved = re.findall(r"tt\.addptr .*, ((?:tensor<[^>]*x)?i\d+)", ttir)
    products = re.findall(r"arith\.muli .* : (?:tensor<[^>]*x)?i64", ttir)
    return bool(products) and not any("i32" in kind for kind in moved)


@pytest.mark.parametrize("name", rest_slow(QUICK, [name for name in QUICK if "bf16_f32-1-512" not in name
                                                   and "f64-1-contiguous" not in name]))
def test_compiles(name):
    check(QUICK[name], 90)


@pytest.mark.parametrize(("name", "capability"), rest_slow(
    itertools.product([name for name in WIDE if "-f32" in name], (75, 80, 100, 120)),
    {(name, 75 if "fwd" in name else 120) for name in WIDE}))
def test_compiles_for_other_gpus(name, capability):
    check(WIDE[name], capability)


@pytest.mark.slow
def test_compiles_everything(everything):
    name, capability = everything
    check(calls.all_calls()[name], capability)


def pytest_generate_tests(metafunc):
    """Thousands of rows, which take seconds to collect, where the slow suite runs."""
    if "everything" in metafunc.fixturenames:
        rows = []
        if "slow" in metafunc.config.getoption("markexpr").replace("not slow", ""):
            rows = [(name, capability) for name in calls.all_calls() for capability in compiling.CAPABILITIES
                    if capability >= 80 or not name.startswith("conv_net")]  # before, convolutions are left to cuDNN
        metafunc.parametrize("everything", rows, ids=lambda row: f"{row[0]}-{row[1]}")


# Fewest 16-byte (loads, stores): one per operand that is as large as the sample.
WIDE_ACCESSES = {"affine_coupling_fwd_kernel": (3, 1), "affine_coupling_bwd_kernel": (3, 3),
                 "gaussian_fwd_kernel": (4, 1), "gaussian_bwd_kernel": (5, 2), "shared_prior_bwd_kernel": (4, 0)}


@pytest.mark.parametrize("name", [name for name in WIDE if not name.startswith("spline")])
def test_aligned_accesses_are_16_bytes_wide(name):
    """All but the numbers per row: log-determinants, KL sums, seeds and their gradients."""
    for launch in compiling.launches_of(WIDE[name]):
        kernel = compiling.compiled(launch, 90)
        loads, stores = kernel.global_accesses()
        assert loads.count(16) >= WIDE_ACCESSES[kernel.name][0], f"{kernel.name}: loads of {loads} bytes"
        assert stores.count(16) >= WIDE_ACCESSES[kernel.name][1], f"{kernel.name}: stores of {stores} bytes"
        if kernel.name.endswith("fwd_kernel"):
            assert len(loads) - loads.count(16) <= 1, f"{kernel.name}: loads of {loads} bytes"
            assert len(stores) - stores.count(16) <= 2, f"{kernel.name}: stores of {stores} bytes"


@pytest.mark.parametrize("name", [name for name in WIDE if name.startswith("spline")])
def test_aligned_accesses_of_splines_are_16_bytes_wide(name):
    """Of each of the 4 elements of a thread only the slopes at both ends of its bin and the gradient of the row's
    log-determinant are read alone; of a row, its log-determinant."""
    launch, = compiling.launches_of(WIDE[name])
    loads, stores = compiling.compiled(launch, 90).global_accesses()
    assert loads.count(16) >= 7 and len(loads) - loads.count(16) <= 3 * 4, loads
    assert stores.count(16) >= (1 if "fwd" in name else 4) and len(stores) - stores.count(16) <= 1, stores


@pytest.mark.parametrize(("dtypes", "level"), rest_slow(itertools.product(("f32", "bf16"), range(3)),
                                                      {("f32", 0), ("bf16", 1)}))
def test_products_run_on_tensor_cores_and_hidden_maps_move_16_bytes_at_a_time(dtypes, level):
    """Loads go past the registers into shared memory, while the product before them runs; h alone does not, which the
    rectifier's gradient is by. Narrow are the bias's sums, of each quarter of a tile."""
    for direction, launches in ((d, launches_on(c, 90)) for d, c in calls.conv_net_calls(dtypes, level).items()):
        products = [launch for launch in launches if launch[0].fn.__name__ != "finish_kernel"
                    and launch[0].fn.__name__ != "sum_taps_kernel"]
        assert len(products) == (3 if "fwd" in direction else 4)
        for launch in products:
            kernel = compiling.compiled(launch, 90)
            assert "wgmma.mma_async" in kernel.ptx and "mma.sync" not in kernel.ptx, kernel.name
            loads, stores = kernel.global_accesses()
            if kernel.name == "product_kernel":
                assert stores.count(16) >= 4 and len(stores) - stores.count(16) <= 4, stores
            if launch is products[1] and "bwd" in direction:  # of a hidden map and a weight past the registers
                assert set(loads) == {16}, loads


def copies(kernel):
    """Width in bytes of every copy past the registers into shared memory."""
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", kernel.ptx)
    return [int(width, 0) for width in found]


@pytest.mark.parametrize(("dtypes", "level", "channels_last"), rest_slow(
    itertools.product(("f32", "bf16", "bf16_f32"), range(3), (True, False)),
    {("f32", 0, False), ("bf16", 1, True)}))
def test_hidden_maps_and_weights_prepared_are_copied_16_bytes_at_a_time(dtypes, level, channels_last):
    """In TF32 too, of which Hopper's tensor cores read only what has neighbours that are summed over: the weights are
    laid out so, and the maps that the weights' gradients are of turned. What is gathered from an image may be narrower.
    On an H200 two programs share a multiprocessor."""
    for call in calls.conv_net_calls(dtypes, level, channels_last).values():
        for launch in launches_on(call, 90):
            name, taps_are = launch[0].fn.__name__, launch[2].get("TAPS")
            if name != "weight_gradients_kernel" and taps_are in (None, calls.conv_net.INNER_TAPS):
                continue
            kernel = compiling.compiled(launch, 90)
            widths = copies(kernel)
            if name == "product_kernel":
                assert set(widths) == {16}, widths
            else:  # 3 stages of the tiles of W2, of which both operands count, and of W1 and W3
                assert widths.count(16) >= 48, widths
                assert not set(widths) - {16} or dtypes == "f32", widths
            assert 2 * (kernel.shared + 1024) <= 228 * 1024, kernel.shared
            if name == "product_kernel" or channels_last:
                assert kernel.resources()["REG"] <= 128, kernel.resources()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 120])  # which has less
def test_products_fit_in_the_shared_memory_of_smaller_gpus(capability):
    for call in calls.conv_net_calls("f32").values():  # the level of the largest tiles
        check(call, capability)


def test_a_misaligned_view_compiles_narrow():
    """The same call one element further in memory must not use the wide kernel."""
    buffer = torch.zeros(4 * 2048 + 1)
    x, params = buffer[1:].view(4, 8, 16, 16), torch.zeros(4, 16, 16, 16)
    launch, = compiling.launches_of(lambda: calls.affine_coupling.affine_coupling_fwd(
        x, params, None, None, None, 0, 0, *calls.scale_map("exp")))
    loads, _ = compiling.compiled(launch, 90).global_accesses()
    assert 4 in loads and 16 in loads


def affine_fwd(batch):
    calls.affine_coupling.affine_coupling_fwd(torch.zeros(batch, 6, 4, 4), torch.zeros(batch, 12, 4, 4), None, None,
                                              None, 0, 0, *calls.scale_map("exp"))


def affine_bwd(batch):
    x = torch.zeros(batch, 6)
    calls.affine_coupling.affine_coupling_bwd(x, x[:, 0], x, torch.zeros(batch, 12), None, 0, True, True, False, 0,
                                              *calls.scale_map("exp"))


def gaussian_fwd(batch):
    calls.gaussian.gaussian_fwd(torch.zeros(batch, 12), None, None, None, None, None, batch * 2**20, 0, None, 0, 0, 0,
                                True, False)


def gaussian_bwd(batch):
    z = torch.zeros(batch, 6)
    calls.gaussian.gaussian_bwd(z, z[:, 0], None, torch.zeros(batch, 12), None, None, None, None, None, 5 * batch, 0,
                                None, 0, 0, 0, True, False, False, False)


def spline_fwd(batch):
    calls.spline.spline_fwd(torch.zeros(batch, 6), torch.zeros(batch, 6 * 23), None, 0, False, 3.0, 1e-3, 1e-3, 1e-3,
                            1.0, 0.0, 1.0)


def spline_bwd(batch):
    x = torch.zeros(batch, 6)
    calls.spline.spline_bwd(x, x[:, 0], x, torch.zeros(batch, 6 * 23), True, True, 0, False, 3.0, 1e-3, 1e-3, 1e-3, 1.0,
                            0.0, 1.0)


def slogdet(batch):
    calls.slogdet.slogdet_fwd(torch.zeros(batch, 12, 12), True)


@pytest.mark.parametrize("make", [affine_fwd, affine_bwd, gaussian_fwd, gaussian_bwd, slogdet,
                                  spline_fwd, spline_bwd])
def test_twenty_batch_sizes_need_at_most_two_variants(make):
    sizes = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 48, 63, 64, 100, 127, 128, 255, 256]
    keys = {compiling.variant(launch) for batch in sizes for launch in compiling.launches_of(lambda b=batch: make(b))}
    assert len(keys) <= 2, keys


def test_with_triton_3_6():
    """The same tests under another Triton: FASTFLOW_TRITON36_PYTHON names a Python with Triton 3.6, torch, pytest and
    fastflow installed."""
    python = os.environ.get(OTHER_TRITON)
    if not python:
        pytest.skip(f"{OTHER_TRITON} is not set")
    environment = {name: value for name, value in os.environ.items() if name != OTHER_TRITON}
    version = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True,
                             env=environment, check=True).stdout
    assert version.startswith("3.6"), version
    result = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], capture_output=True,
                            text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
