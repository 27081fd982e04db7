"""The affine coupling kernels, called directly, against the reference and its float64 autograd."""

import itertools
import math

import layouts
import pytest
import torch
from fastflow.kernels import affine_coupling as kernels
from tolerances import GRADIENT_FACTOR, assert_by_ratio

from fastflow import reference
from fastflow.reference import ScaleMap

DIALECTS = {
    **{name: ScaleMap.of(name) for name in ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")},
    "nflows": ScaleMap.nflows(), "nflows_general": ScaleMap.nflows(general=True), "freia": ScaleMap.freia(),
    "freia_atan": ScaleMap.freia(kind="atan"), "zuko": ScaleMap.zuko(), "jet": ScaleMap.jet(),
    "tarflow": ScaleMap.tarflow(), "normflows_sigmoid": ScaleMap.normflows("sigmoid"),
    "all_at_once": ScaleMap("tanh", gain=0.7, offset=0.2, out_gain=1.3, clamp=1.5, eps=0.1, hard_min=0.5, hard_max=2.0,
                            shift_gain=0.5)}
ORDERS = list(itertools.product((False, True), (False, True)))  # shift_first, inverse


def call(x, params, shift=None, logdet=None, passive=None, *, scale, layout="chunk", order="scale_shift",
         shift_first=False, inverse=False, grads=None):
    """(y, logdet, gradients of x, params, shift) by the kernels; the gradients for incoming ``grads``."""
    flags = (layout == "interleave") + 2 * (order == "shift_scale") + 4 * shift_first + 8 * inverse
    kept, passive = (passive, None) if isinstance(passive, int) else (0, passive)
    y, total = kernels.affine_coupling_fwd(x, params, shift, logdet, passive, kept, flags, *scale.scalars)
    found = ()
    if grads is not None:
        found = kernels.affine_coupling_bwd(*grads, x, params, shift, kept, True, True, shift is not None, flags,
                                            *scale.scalars)
    return y, total, *(found if shift is not None else found[:2])


def expected(x, params, shift=None, logdet=None, passive=None, *, grads=None, dtype=None, **options):
    """The same by the reference, in ``dtype`` if given."""
    operands = [t.to(dtype) if dtype is not None and isinstance(t, torch.Tensor) else t
                for t in (x, params, shift, logdet, passive)]
    leaves = [t.detach().requires_grad_() for t in operands[:3] if t is not None]
    y, total = reference.affine_coupling(leaves[0], leaves[1] if shift is None else tuple(leaves[1:]),
                                         logdet=operands[3], passive=operands[4], **options)
    found = ()
    if grads is not None:
        through = [(o, g.to(o.dtype)) for o, g in zip((y, total), grads, strict=True)
                   if g is not None and o.requires_grad]
        found = torch.autograd.grad([o for o, _ in through], leaves, [g for _, g in through], allow_unused=True)
        found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return y.detach(), total.detach(), *found


def check(*operands, grads=None, what="", **options):
    got = call(*operands, grads=grads, **options)
    eager = expected(*operands, grads=grads, **options)
    truth = expected(*operands, grads=grads, dtype=torch.float64, **options)
    terms = math.sqrt(got[0].numel() / max(got[1].numel(), 1))
    for name, out, near, exact in zip(("y", "logdet", "grad_x", "grad_params", "grad_shift"), got, eager, truth,
                                      strict=False):
        assert_by_ratio(out, near, exact, factor=GRADIENT_FACTOR if "grad" in name else 2.0,
                        magnitude=terms if name == "logdet" else 0.0, what=f"{what} {name}")
    assert got[0].stride() == eager[0].stride() or got[0].numel() == 0
    return got


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("shift_first, inverse", ORDERS)
def test_every_map_and_order(dialect, shift_first, inverse):
    scale = DIALECTS[dialect]
    half = 1 if dialect == "additive" else 2
    options = {"scale": scale, "shift_first": shift_first, "inverse": inverse}
    check(randn(3, 4, 2, 5), randn(3, 4 * half, 2, 5), None, randn(3), grads=(randn(3, 4, 2, 5), randn(3)), **options)
    check(randn(3, 3, 7, dtype=torch.float64), randn(3, 3 * half, 7, dtype=torch.float64), None, None,
          randn(3, 2, 7, dtype=torch.float64), layout="interleave", order="shift_scale",
          grads=(randn(3, 5, 7, dtype=torch.float64), randn(3, dtype=torch.float64)), **options)


@pytest.mark.parametrize("x_dtype, params_dtype", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("pair", [False, True])
def test_mixed_dtypes(x_dtype, params_dtype, pair):
    x = randn(2, 4, 4, 4, dtype=x_dtype)
    out = reference.result_dtype(x, torch.empty(0, dtype=params_dtype))
    params = randn(2, 4 if pair else 8, 4, 4, dtype=params_dtype)
    shift = randn(2, 4, 4, 4, dtype=params_dtype) if pair else None
    check(x, params, shift, randn(2), randn(2, 3, 4, 4, dtype=x_dtype), scale=DIALECTS["sigmoid"],
          grads=(randn(2, 7, 4, 4, dtype=out), randn(2)))


@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
@pytest.mark.parametrize("what", ["x", "params", "passive", "grad", "all"])
def test_layouts(make, what):
    operands = {"x": randn(3, 4, 2, 6), "params": randn(3, 8, 2, 6), "passive": randn(3, 2, 2, 6),
                "grad": randn(3, 6, 2, 6)}
    t = {name: make(value) if what in (name, "all") else value for name, value in operands.items()}
    check(t["x"], t["params"], None, randn(1).expand(3), t["passive"], scale=DIALECTS["tanh"], layout="interleave",
          grads=(t["grad"], randn(1).expand(3)))


@pytest.mark.parametrize("shape", [(3, 1), (70, 2), (2, 5, 1, 1), (2, 300), (2, 3, 2, 2, 2, 2)])
def test_shapes_of_a_sample(shape):
    check(randn(*shape), randn(shape[0], 2 * shape[1], *shape[2:]), scale=DIALECTS["exp"],
          grads=(randn(*shape), randn(shape[0])))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (3, 4, 0), (0, 0)])
def test_zero_sizes(shape):
    running = randn(shape[0])
    y, total, gx, gparams = check(randn(*shape), randn(shape[0], 2 * shape[1], *shape[2:]), None, running,
                                  randn(shape[0], 2, *shape[2:]), scale=DIALECTS["exp"],
                                  grads=(randn(shape[0], 2 + shape[1], *shape[2:]), randn(shape[0])))
    if not math.prod(shape[1:]):
        assert torch.equal(total, running)


def test_large_samples_take_two_launches(launches):
    shape = (2, 2, 100, 90)
    check(randn(*shape), randn(2, 4, 100, 90), None, randn(2), randn(2, 3, 100, 90), scale=DIALECTS["sigmoid"],
          inverse=True)
    assert launches == ["affine_coupling_fwd_kernel", "row_sums_kernel"]


def test_launches_of_a_small_sample(launches):
    x, params = randn(3, 4), randn(3, 8)
    call(x, params, scale=DIALECTS["exp"], grads=(x, randn(3)))
    assert launches == ["affine_coupling_fwd_kernel", "affine_coupling_bwd_kernel"]


def test_gradients_that_are_not_needed_or_not_given():
    x, params = randn(2, 3, 4), randn(2, 6, 4)
    scale, flags = DIALECTS["tanh"].scalars, 8
    full = kernels.affine_coupling_bwd(x, randn(2), x, params, None, 0, True, True, False, flags, *scale)
    assert full[2].shape == (0,)
    only_x = kernels.affine_coupling_bwd(x, None, x, params, None, 0, True, False, False, flags, *scale)
    assert torch.equal(only_x[0], full[0]) and only_x[1].shape == (0,)
    no_y = kernels.affine_coupling_bwd(None, randn(2), x, params, None, 0, True, True, False, flags, *scale)
    assert not no_y[0].any() and not no_y[1][:, 3:].any() and no_y[1][:, :3].all()
    raw, shift = params[:, :3], params[:, 3:]
    only_shift = kernels.affine_coupling_bwd(x, None, x, raw, shift, 0, False, False, True, flags, *scale)
    assert [g.numel() for g in only_shift] == [0, 0, shift.numel()]
    torch.testing.assert_close(only_shift[2], full[1][:, 3:])


def test_a_sample_does_not_depend_on_its_batch():
    x, params = randn(5, 40), randn(5, 80)
    y, total = call(x, params, scale=DIALECTS["sigmoid"])
    for batch in (slice(3, 4), slice(2, 5)):
        part, part_total = call(x[batch], params[batch], scale=DIALECTS["sigmoid"])
        assert torch.equal(part, y[batch]) and torch.equal(part_total, total[batch])
