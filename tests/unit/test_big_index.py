"""Offsets past 2^31 elements: views with huge strides over memory that is reserved but never touched."""

import mmap

import pytest
import torch
from cases import Case, cotangents_of, evaluate
from tolerances import assert_bitwise

from fastflow import backends, functional, reference

STRIDE = 2**31 + 64  # elements from one sample to the next


@pytest.fixture(scope="module")
def far():
    """A function that gives a tensor's values at a batch stride of 2^31 elements or more (8.6 GB of addresses per
    float32 operand, of which the few pages that hold values are real)."""
    maps = []

    def place(t, dim=0):
        size = (t.shape[dim] - 1) * STRIDE + t.numel()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            maps.append(mmap.mmap(-1, size * t.element_size(), flags=flags))
        except OSError:
            pytest.skip("the system does not reserve that much address space")
        flat = torch.frombuffer(maps[-1], dtype=t.dtype)
        strides = list(t.contiguous().stride())
        strides[dim] = STRIDE
        view = flat.as_strided(t.shape, strides)
        view.copy_(t)
        return view

    return place


CASES = (
    Case("packed", "affine_coupling", {"x": (3, 4, 5), "params": (3, 8, 5)}),
    Case("interleaved", "affine_coupling", {"x": (3, 4, 5), "params": (3, 8, 5), "passive": (3, 2, 5)},
         {"layout": "interleave", "inverse": True, "scale": "sigmoid"}),
    Case("pair", "affine_coupling", {"x": (3, 40), "raw": (3, 40), "shift": (3, 40)}, {"scale": "tanh"}),
    Case("slogdet", "slogdet_inverse", {"weight": (3, 6, 6)}),
    Case("big_slogdet", "slogdet_inverse", {"weight": (3, 50, 50)}),
    Case("plu", "plu_weight", {"lower": (3, 5, 5), "upper": (3, 5, 5), "log_s": (3, 5), "sign_s": (3, 5),
                               "perm": (3, 5)}),
    Case("gaussian", "gaussian_sample_kl", {"params": (3, 6, 5)},
         {"seed": 1, "reduce": "channel", "return_logq": True}),
    Case("gaussian_eps", "gaussian_sample_kl",
         dict.fromkeys(("mean", "raw", "prior_mean", "prior_raw", "eps"), (3, 9)), {"reduce": "none"}),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operands_and_incoming_gradients_far_apart(case, far):
    """Offsets (batch index times stride) that overflow a 32-bit integer, in every operand and every incoming
    gradient."""
    for name in [n for n in ("reference", "cpu") if backends.available()[n]]:
        tolerance = 1e-5 if name == "reference" else 1e-6  # LAPACK may round by the strides that it finds
        with backends.use_backend(name):
            tensors = case.tensors(torch.float32)
            cotangents = cotangents_of(case, tensors)
            near = evaluate(case, tensors, cotangents=cotangents)
            operands = {n: far(t) if n != "perm" else t for n, t in tensors.items()}
            cotangents = {n: far(t) if t.dim() > 1 else t for n, t in cotangents.items()}
            distant = evaluate(case, operands, cotangents=cotangents)
            for part in (0, 1):
                for result, t in near[part].items():
                    assert distant[part][result].shape == t.shape
                    torch.testing.assert_close(distant[part][result], t, rtol=tolerance, atol=tolerance,
                                               msg=lambda m, n=(name, part, result): f"{n}: {m}")


def test_far_views_are_really_far(far):
    t = far(torch.arange(6.0).view(3, 2))
    assert t.stride(0) * (t.shape[0] - 1) > 2**32 and t.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_far_spatial_stride(far):
    """The last dim 2^31 apart."""
    case = Case("spatial", "affine_coupling", {"x": (2, 3, 2), "params": (2, 6, 2)})
    tensors = case.tensors(torch.float32)
    for name in [n for n in ("reference", "cpu") if backends.available()[n]]:
        with backends.use_backend(name):
            near, distant = (evaluate(case, t)[0] for t in (tensors, {n: far(t, 2) for n, t in tensors.items()}))
            for result, t in near.items():
                torch.testing.assert_close(distant[result], t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [2**29 - 1, 2**30, 2**31 - 1, 2**32 - 1, 2**32, 2**33 + 7, 2**61])
def test_counters_past_32_bits(offset, backend, device):
    """The block counter is 64 bits wide: words 0 and 1."""
    zeros, ones = torch.zeros(3, 5, device=device), torch.ones(3, 5, device=device)
    z = functional.gaussian_sample_kl((zeros, ones), scale="std", seed=9, offset=offset)[0].cpu()
    assert (z - reference.philox_normal((3, 5), 9, offset)).abs().max() < 2e-6
    if offset >= 2**32:
        low = functional.gaussian_sample_kl((zeros, ones), scale="std", seed=9, offset=offset % 2**32)[0].cpu()
        assert not torch.equal(z, low)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """A bf16 tensor of 2^31 + 2^20 elements: the last rows equal eager's, and no row is left unwritten."""
    rows = 2**11 + 1
    x = torch.randn(rows, 2**20, device="cuda", dtype=torch.bfloat16)
    raw = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand_as(x)
    y, logdet = functional.affine_coupling(x, (raw, raw))
    assert_bitwise(y[-2:], x[-2:])
    assert_bitwise(logdet, torch.zeros(rows, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [65535, 65536, 131073])
def test_batches_past_a_grid_limit(batch):
    x, params, w = (torch.randn(s, device="cuda") for s in ((batch, 3), (batch, 6), (batch, 2, 2)))
    for got, want in zip(functional.affine_coupling(x, params), reference.affine_coupling(x, params), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(functional.slogdet(w)[0], reference.slogdet(w)[0])
