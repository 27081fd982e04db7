"""The error-ratio rule: a result may be no further from the float64 truth than a small multiple of eager PyTorch's own
error in the same dtype, plus about one rounding of the result's magnitude.

Eager's error, not a hand-picked tolerance, sets the scale; the floor covers results that eager happens to hit exactly.
"""

import torch

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# The float64 truth is eager float64 itself, so its own error is unknown and depends on the processor's BLAS, as in the
# gradients of a chain of couplings: allow this many roundings instead.
FLOAT64_ROUNDINGS = 32.0
# The largest of a few errors says little about eager's accuracy: below this many elements allow a few roundings.
FEW_ELEMENTS, FEW_ROUNDINGS = 64, 4.0
# A GPU's eager sums in many short runs and fuses products, and so is often nearly exact itself.
GPU_ROUNDINGS = 2.0


def assert_same_nonfinite(out, expected, what="result", *, gradient=False):
    """NaN, +Inf and -Inf stand at exactly the same places.

    For a ``gradient``, an infinity is accepted where eager has NaN: autograd's formulas add an infinity to its opposite
    where an equal formula has one term (as d u/(1 + |u|) = 1/(1 + |u|)^2). Nothing finite is, and no NaN for an
    infinity.
    """
    finite_got, finite_want = torch.isfinite(out), torch.isfinite(expected)
    assert torch.equal(finite_got, finite_want), (
        f"{what}: not finite at {torch.nonzero(~finite_got & finite_want).tolist()[:4]} where eager is, "
        f"finite at {torch.nonzero(finite_got & ~finite_want).tolist()[:4]} where eager is not")
    excused = torch.isnan(expected) if gradient else torch.zeros_like(finite_want)
    for kind, mask in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        got, want = mask(out) & ~excused, mask(expected) & ~excused
        assert torch.equal(got, want), (
            f"{what}: {kind} at {torch.nonzero(got & ~want).tolist()[:4]} where it should not be, "
            f"missing at {torch.nonzero(want & ~got).tolist()[:4]}")


def assert_by_ratio(out, eager, truth, *, factor=VALUE_FACTOR, magnitude=0.0, what="result"):
    """max|out - truth| <= factor * max|eager - truth| + eps(dtype) * max(max|truth|, magnitude).

    Args:
        out: the result under test.
        eager: the same computed by eager PyTorch in the same dtype; fixes shape, dtype and the non-finite places.
        truth: the same computed in float64 from the same (upcast) inputs.
        factor: 2 for values, 3 for gradients.
        magnitude: size of what was added up, where cancellation makes the truth smaller than its terms.
        what: the name to report.
    """
    assert out.shape == eager.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(eager.shape)}"
    assert out.dtype == eager.dtype, f"{what}: dtype {out.dtype}, expected {eager.dtype}"
    assert out.device == eager.device, f"{what}: device {out.device}, expected {eager.device}"
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64"
    assert_same_nonfinite(out, eager, what)
    finite = torch.isfinite(eager) & torch.isfinite(truth)
    if not finite.any():
        return
    exact = truth[finite]
    error = (out[finite].double() - exact).abs().max().item()
    eager_error = (eager[finite].double() - exact).abs().max().item()
    roundings = FEW_ROUNDINGS if exact.numel() < FEW_ELEMENTS else GPU_ROUNDINGS if out.is_cuda else 1.0
    roundings = FLOAT64_ROUNDINGS if out.dtype == torch.float64 else roundings
    floor = roundings * torch.finfo(out.dtype).eps * max(exact.abs().max().item(), magnitude)
    assert error <= factor * eager_error + floor, (
        f"{what}: error {error:.3e} > {factor} x eager's {eager_error:.3e} + floor {floor:.3e}")


def assert_elementwise(out, eager, truth, *, roundings=4.0, factor=VALUE_FACTOR, scale=0.0, what="result"):
    """The same rule element by element, relative to each element: nothing small can hide behind something large.

    ``scale``: what an element's rounding is relative to where that is larger than the element itself, as 1 for the
    logarithm of a number near 1; a float or a tensor like ``truth``.
    """
    assert out.dtype == eager.dtype, f"{what}: dtype {out.dtype}, expected {eager.dtype}"
    info = torch.finfo(out.dtype)
    # Where a step of eager's overflows on the way to a result that is itself in range, the right result is accepted.
    better = torch.isfinite(out) & ~torch.isfinite(eager) & (truth.abs() < info.max)
    eager = torch.where(better, truth.to(eager.dtype), eager)
    assert_same_nonfinite(out, eager, what, gradient=True)
    finite = torch.isfinite(eager) & torch.isfinite(truth)
    exact = truth[finite]
    error = (out[finite].double() - exact).abs()
    scale = torch.as_tensor(scale, dtype=torch.float64, device=truth.device).expand_as(truth)
    size = torch.maximum(exact.abs(), scale[finite])
    allowed = factor * (eager[finite].double() - exact).abs() + roundings * info.eps * size + info.tiny
    worst = (error - allowed).argmax() if error.numel() else None
    assert worst is None or error[worst] <= allowed[worst], (
        f"{what}: at flat finite index {worst.item()} got {out[finite][worst].item()!r}, eager "
        f"{eager[finite][worst].item()!r}, truth {exact[worst].item()!r}: error {error[worst]:.3e} > "
        f"{allowed[worst]:.3e}")


def assert_bitwise(out, expected, what="result"):
    """Equal shape, dtype and values, NaN equal to NaN."""
    assert out.shape == expected.shape and out.dtype == expected.dtype, (
        f"{what}: {tuple(out.shape)} {out.dtype}, expected {tuple(expected.shape)} {expected.dtype}")
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {out.numel()} elements differ"
