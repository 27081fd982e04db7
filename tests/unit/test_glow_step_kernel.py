"""glow_step, the operator behind a step of Glow on a CPU: values and gradients against float64 at many sizes and
layouts, what is asked singly, the order of sums, and what is not finite."""

import layouts
import pytest
import torch
from op_checks import check_with_instructions
from sweeps import rest_slow
from tolerances import GRADIENT_FACTOR, assert_bitwise, assert_by_ratio, assert_same_nonfinite

from fastflow.autograd import chain, glow_step
from fastflow.reference import ScaleMap

NAMES = ("x", "logdet", "matrix", "offset", "w1", "b1", "w2", "b2", "w3", "b3")
# (B, C, H, W), hidden, channels kept: Glow's own; two channels, fewer and more than a vector, more than a panel of them
# by one; odd everything; one pixel; a row; a column; more samples than groups.
SIZES = [((3, 12, 16, 16), 64, 6), ((5, 24, 8, 8), 32, 12), ((4, 48, 4, 4), 16, 24), ((2, 2, 4, 6), 16, 1),
         ((2, 5, 3, 7), 16, 2), ((2, 17, 5, 4), 16, 8), ((1, 65, 4, 4), 16, 32), ((2, 129, 2, 3), 16, 5),
         ((3, 4, 1, 1), 32, 3), ((2, 7, 1, 9), 16, 3), ((2, 6, 8, 1), 16, 3), ((40, 12, 12, 10), 16, 6)]


def operands(shape, hidden, kept, *, additive=False, seed=0):
    """Of unit scale, in float64: what each step of a trained flow meets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)
    channels, outputs = shape[1], (1 if additive else 2) * (shape[1] - kept)
    values = (normal(*shape), normal(shape[0]), normal(channels, channels, scale=channels**-0.5), normal(channels),
              normal(hidden, kept, 3, 3, scale=(9 * kept) ** -0.5), normal(hidden, scale=0.1),
              normal(hidden, hidden, 1, 1, scale=hidden**-0.5), normal(hidden, scale=0.1),
              normal(outputs, hidden, 3, 3, scale=(9 * hidden) ** -0.5), normal(outputs, scale=0.1))
    values = dict(zip(NAMES, values, strict=True))
    values["x"] = layouts.channels_last(values["x"])
    return values, layouts.channels_last(normal(*shape)), normal(shape[0])


def run(tensors, kept, cotangents, wanted=NAMES, scale=None, kernel=True, layout="chunk", order="shift_scale"):
    """(y, logdet) and the gradients {name: gradient} of what is wanted."""
    leaves = {n: t if t is None else t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
    x, logdet, matrix, offset, *network = leaves.values()
    step = glow_step.step(matrix, offset, network, kept, layout, order, True, scale or ScaleMap.glow())
    if kernel:
        y, total = chain.run(x, [step], logdet)
    else:
        y, total = step.kind.reference(x, step.tensors, step.consts)
        total = total if logdet is None else total + logdet
    asked = [(t, c) for t, c in zip((y, total), cotangents, strict=True) if c is not None and t.requires_grad]
    inputs = {n: leaves[n] for n in wanted if leaves[n] is not None}
    grads = torch.autograd.grad([t for t, _ in asked], list(inputs.values()), [c for _, c in asked], allow_unused=True)
    return (y.detach(), total.detach()), dict(zip(inputs, grads, strict=True))


def check(tensors, kept, cotangents, dtype, **options):
    """By the error-ratio rule, against the reference in the same dtype and in float64."""
    own = {n: None if t is None else t.to(dtype) for n, t in tensors.items()}
    exact = {n: None if t is None else t.double() for n, t in own.items()}
    asked = [None if c is None else c.to(dtype) for c in cotangents]
    got, grads = run(own, kept, asked, **options)
    eager, eager_grads = run(own, kept, asked, kernel=False, **options)
    asked = [None if c is None else c.double() for c in asked]
    truth, true_grads = run(exact, kept, asked, kernel=False, **options)
    for name, values in zip(("y", "logdet"), zip(got, eager, truth, strict=True), strict=True):
        assert_by_ratio(*values, what=name, magnitude=1.0)
    for name, grad in grads.items():
        if true_grads[name] is None:
            assert grad is None or not grad.any(), name
        else:
            assert_by_ratio(grad, eager_grads[name], true_grads[name], factor=GRADIENT_FACTOR, what=name, magnitude=1.0)


@pytest.mark.parametrize(("shape", "hidden", "kept"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes(shape, hidden, kept, dtype):
    tensors, *cotangents = operands(shape, hidden, kept)
    check(tensors, kept, cotangents, dtype)


@pytest.mark.parametrize("scale", [ScaleMap("exp"), ScaleMap("tanh", clamp=1.5, eps=0.1), ScaleMap("additive")],
                         ids=lambda scale: scale.kind)
@pytest.mark.parametrize("layout", ["chunk", "interleave"])
def test_scales_and_no_offset(scale, layout):
    tensors, *cotangents = operands((3, 6, 4, 4), 16, 3, additive=scale.kind == "additive")
    check({**tensors, "offset": None, "logdet": None}, 3, cotangents, torch.float32, scale=scale, layout=layout,
          order="scale_shift")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_gradient_of_one_result_alone(missing):
    tensors, *cotangents = operands((3, 6, 4, 5), 16, 3)
    cotangents[missing] = None
    check(tensors, 3, cotangents, torch.float32)


def test_gradients_asked_singly_and_together():
    tensors, *cotangents = operands((3, 6, 4, 4), 16, 3)
    every = run(tensors, 3, cotangents)[1]
    for wanted in (*((name,) for name in NAMES), ("x", "w2"), ("matrix", "b3"), ("offset", "x")):
        for name, grad in run(tensors, 3, cotangents, wanted=wanted)[1].items():
            torch.testing.assert_close(grad, every[name], rtol=1e-12, atol=1e-12)


def spread(t):
    """Adjacent channels, rows and samples apart, of a wider image."""
    wide = torch.full((t.shape[0] + 1, t.shape[2] + 1, t.shape[3] + 2, t.shape[1] + 3), float("nan"), dtype=t.dtype)
    view = wide[1:, :-1, 1:-1, 2:-1].movedim(-1, 1)
    view.copy_(t)
    return view


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channel_slice, layouts.odd_offset, spread,
                                    layouts.expanded(0)], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(3, 6, 4, 4), (3, 6, 5, 3)], ids=str)
def test_layouts_of_operands_and_gradients(layout, shape):
    """x's channels are adjacent in what layers hand over, but need not be in what hooks on saved tensors hand back."""
    tensors, grad_y, grad_logdet = operands(shape, 16, 3)
    laid = {n: layout(t) if n == "x" else layouts.permuted(t) for n, t in tensors.items()}
    check(laid, 3, (layout(grad_y), layouts.expanded(0)(grad_logdet)), torch.float32)


def test_saved_tensors_laid_out_anew():
    tensors, *cotangents = operands((3, 6, 4, 4), 16, 3)
    expected = run(tensors, 3, cotangents)[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t.mT.contiguous().mT
                                                  if t.dim() == 4 else t.clone()):
        found = run(tensors, 3, cotangents)[1]
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (2, 6, 4, 0)], ids=str)
def test_zero_sizes(shape):
    tensors, *cotangents = operands(shape, 16, 3)
    (y, logdet), grads = run(tensors, 3, cotangents)
    assert y.shape == shape
    assert_bitwise(logdet, tensors["logdet"])
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape and (name == "logdet" or not grad.any()), name


def in_float32(tensors, cotangents):
    return {n: t.float() for n, t in tensors.items()}, [c.float() for c in cotangents]


def assert_spoilt_where_the_reference_is(tensors, kept, cotangents, what):
    """In float64: oneDNN's float32 convolutions on a CPU pass over products of zeros with NaN. Returns gradients."""
    tensors_32, cotangents_32 = in_float32(tensors, cotangents)
    got = run(tensors_32, kept, cotangents_32)
    want = run(tensors, kept, cotangents, kernel=False)
    for a, b in zip(got[0], want[0], strict=True):
        assert_same_nonfinite(a, b, what, gradient=True)
    for key, grad in got[1].items():
        assert_same_nonfinite(grad, want[1][key], f"{what}: {key}", gradient=True)
    return got[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("width", [4, 5])  # Winograd's form and the plain one
def test_non_finite_inputs(value, width):
    tensors, *cotangents = operands((3, 8, 4, width), 16, 4)
    for name, index in (("x", (1, 2, 3, 1)), ("matrix", (5, 1)), ("offset", (6,)), ("b1", (5,)), ("b3", (1,))):
        spoilt = {n: t.clone() for n, t in tensors.items()}
        spoilt[name][index] = value
        assert_spoilt_where_the_reference_is(spoilt, 4, cotangents, f"{name}={value}")


@pytest.mark.parametrize("place", [(1, 2, 3, 4), (1, 7, 4, 3)], ids=str)
def test_an_infinite_gradient_stays_in_its_sample(place):
    """Of a channel that passes, and of one that does not; away from the border, whose zeros torch multiplies, too."""
    tensors, grad_y, grad_logdet = operands((3, 8, 8, 8), 16, 4)
    grad_y[place] = float("inf")
    found = assert_spoilt_where_the_reference_is(tensors, 4, (grad_y, grad_logdet), str(place))
    assert torch.isfinite(found["x"][0]).all() and torch.isfinite(found["x"][2]).all()


def test_samples_do_not_depend_on_their_neighbours_nor_results_on_threads(threads):
    tensors, *cotangents = operands((37, 12, 12, 8), 32, 6)
    tensors, cotangents = in_float32(tensors, cotangents)
    threads(1)
    (y, logdet), grads = run(tensors, 6, cotangents)
    alone = {n: t[5:6] if n in ("x", "logdet") else t for n, t in tensors.items()}
    (own_y, own_logdet), own = run(alone, 6, [c[5:6] for c in cotangents])
    assert_bitwise(own_y, y[5:6])
    assert_bitwise(own_logdet, logdet[5:6])
    assert_bitwise(own["x"], grads["x"][5:6])
    threads(2)
    (threaded_y, threaded_logdet), threaded = run(tensors, 6, cotangents)
    assert_bitwise(threaded_y, y)
    assert_bitwise(threaded_logdet, logdet)
    for name, grad in threaded.items():
        assert_bitwise(grad, grads[name])


SCRIPT = """
import torch
from test_glow_step_kernel import SIZES, check, operands
torch.set_num_threads(1)
for shape, hidden, kept in SIZES:
    for dtype in (torch.float32, torch.float64):
        tensors, *cotangents = operands(shape, hidden, kept)
        check(tensors, kept, cotangents, dtype)
"""


@pytest.mark.parametrize("isa", rest_slow(["avx2", "baseline"], ["avx2"]))
def test_on_older_processors(isa):
    check_with_instructions(isa, SCRIPT)
