"""What only the emulation can check of the CUDA kernels: launches, thread orders, every path of a kernel."""

import math

import pytest
import torch
from cases import CASES, Case, check_by_ratio, cotangents_of, evaluate
from launch_cases import LAUNCH_CASES, operator_calls
from plugin import operators
from tolerances import assert_bitwise

from fastflow import extension, functional, reference
from fastflow.launches import CUDA, count

OPS = operators()
EXP = reference.ScaleMap("exp").scalars


def launches(emulator, function):
    emulator.simt_launches()
    result = function()
    return emulator.simt_launches(), result


ROWS = [row for row in LAUNCH_CASES if row[-1] is not None]
CASES_OF_LAUNCHES = [case for case, *_ in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].op}-{row[0]}")
def test_launches_are_those_declared(row, emulator):
    case, _, _, forward, backward = row
    tensors = case.tensors(torch.float32)
    with count("cuda") as declared:
        counted, _ = launches(emulator, lambda: evaluate(case, tensors))
    assert counted == declared.total == forward
    cotangents = cotangents_of(case, tensors)
    with count("cuda") as declared:
        counted, _ = launches(emulator, lambda: evaluate(case, tensors, cotangents=cotangents))
    assert counted == declared.total == forward + backward


def test_launches_of_every_operator_are_those_declared(emulator):
    for name, args in operator_calls("cpu", (0, 1, 3, 65), ((2,), (2, 0), (2, 5), (3, 1))):
        if name in extension.WITHOUT_CUDA:
            continue
        counted, _ = launches(emulator, lambda: OPS[name](*args))  # noqa: B023
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        assert counted == CUDA[name](*args), (name, shapes)


def test_nothing_is_launched_for_nothing(emulator):
    counted, _ = launches(emulator, lambda: functional.affine_coupling(torch.ones(0, 4), torch.ones(0, 8)))
    assert counted == 0


BIG = CASES_OF_LAUNCHES + list(CASES)


@pytest.mark.parametrize("case", BIG, ids=str)
def test_thread_order_does_not_change_a_bit(case, emulator):
    tensors = case.tensors(torch.float32)
    cotangents = cotangents_of(case, tensors)
    first = None
    for seed in range(3):
        emulator.simt_set_order(seed)
        results, grads = evaluate(case, tensors, cotangents=cotangents)
        found = {**results, **{f"gradient of {n}": g for n, g in grads.items() if g is not None}}
        first = first or found
        for name, t in found.items():
            assert_bitwise(t, first[name], f"{case} {name} with order {seed}")


@pytest.mark.parametrize("case", CASES_OF_LAUNCHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_right_on_every_size_class(case, dtype, emulator):
    if case.op.startswith("slogdet"):
        return  # test_slogdet_of_every_size
    tensors = case.tensors(dtype)
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


SHAPES = [(3, 8), (2, 16, 4, 4), (2, 8, 3, 3), (3, 5, 16), (2, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("params_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vector_paths(shape, memory, params_dtype, emulator):
    """Aligned operands in every layout, order and mixture of dtypes, without passive, with, and with x's own."""
    if memory is torch.channels_last and len(shape) != 4:
        return
    for layout in ("chunk", "interleave"):
        for order in ("scale_shift", "shift_scale"):
            options = {"layout": layout, "order": order, "scale": "sigmoid", "inverse": order == "shift_scale"}
            doubled = (shape[0], 2 * shape[1], *shape[2:])
            for shapes, extra in (({"x": shape}, {}), ({"x": shape, "passive": shape}, {}),
                                  ({"x": doubled}, {"passive": shape[1]}), ({"x": doubled}, {"passive": -shape[1]})):
                case = Case("vector", "affine_coupling", {**shapes, "params": doubled}, {**options, **extra})
                tensors = case.tensors(torch.float32)
                tensors["params"] = tensors["params"].to(params_dtype)
                tensors = {n: t.contiguous(memory_format=memory) for n, t in tensors.items()}
                check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors), what=f"{layout} {order}")


@pytest.mark.parametrize("size", [*range(1, 34), 40, 47, 48, 49, 56, 64])
def test_slogdet_of_every_size(size, emulator):
    case = Case("sizes", "slogdet_inverse", {"weight": (3, size, size)})
    weight = case.tensors(torch.float32)["weight"]
    if size <= reference.FLOAT64_UP_TO:
        check_by_ratio(case, {"weight": weight})
    else:  # one matrix's error in float32 says little beside another method's
        sign, logabsdet, inverse = OPS["slogdet_fwd"](weight, True)
        truth = torch.linalg.inv(weight.double())
        allowed = 8 * torch.finfo(torch.float32).eps * torch.linalg.cond(weight.double())
        assert ((inverse - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1) < allowed).all()
        torch.testing.assert_close(logabsdet.double(), torch.linalg.slogdet(weight.double())[1], rtol=0, atol=1e-4)
    weight = case.tensors(torch.float64)["weight"]
    for got, want in zip(OPS["slogdet_fwd"](weight, True), reference.slogdet_inverse(weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    sign, logabsdet, nothing = OPS["slogdet_fwd"](weight, False)
    assert_bitwise(sign, OPS["slogdet_fwd"](weight, True)[0])
    torch.testing.assert_close(logabsdet, reference.slogdet(weight)[1], rtol=1e-11, atol=1e-11)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("size", [96, 192])
def test_slogdet_of_large_matrices(size, emulator):
    weight = torch.linalg.qr(torch.randn(1, size, size, dtype=torch.float64))[0].float()
    counted, (sign, logabsdet, inverse) = launches(emulator, lambda: OPS["slogdet_fwd"](weight, True))
    truth = torch.linalg.slogdet(weight.double())
    assert counted == 1 and sign == truth.sign
    assert abs(logabsdet - truth.logabsdet) < 1e-5
    assert (inverse.double() - torch.linalg.inv(weight.double())).abs().max() < 1e-5


def test_slogdet_beyond_shared_memory(emulator):
    """The same bits from device memory as from shared memory."""
    weight = torch.randn(2, 60, 60)
    inside = OPS["slogdet_fwd"](weight, True)
    emulator.simt_set_shared_limit(8 * 1024)
    counted, outside = launches(emulator, lambda: OPS["slogdet_fwd"](weight, True))
    assert counted == 1
    for a, b in zip(inside, outside, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("size", [2, 4, 5, 12, 13, 31, 33, 50])
def test_bad_matrices_among_good_ones(size, emulator):
    weight = torch.randn(6, size, size) + 3 * torch.eye(size)
    weight[1, 0, size - 1] = math.nan
    weight[2, :, 1] = weight[2, :, 0]
    weight[2, 1] = 0
    weight[3] = 0
    weight[4] = torch.eye(size).flip(0)  # a permutation: pivots off the diagonal, ties
    good = [0, 4, 5]
    sign, logabsdet, inverse = OPS["slogdet_fwd"](weight, True)
    truth = torch.linalg.slogdet(weight[good].double())
    assert torch.equal(sign[good].double(), truth.sign)
    torch.testing.assert_close(logabsdet[good].double(), truth.logabsdet, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse[good].double(), torch.linalg.inv(weight[good].double()), rtol=1e-4, atol=1e-4)
    assert sign[1].isnan() and logabsdet[1].isnan()
    assert (sign[2:4] == 0).all() and (logabsdet[2:4] == -math.inf).all()
    assert inverse[1:4].isnan().all()


def test_slogdet_reads_any_strides(emulator):
    stack = torch.randn(2, 3, 2, 8, 8)
    for weight in (stack.mT, stack[:, :, 1], stack.permute(1, 0, 2, 3, 4), stack[:1].expand(4, 3, 2, 8, 8),
                   stack[..., ::2, 1::2]):
        for got, want in zip(OPS["slogdet_fwd"](weight, True), reference.slogdet_inverse(weight), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 40), (70, 1), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"inverse": True, "clamp": 6.9}, {"kind": "linear", "inverse": True}], ids=str)
def test_splines_read_in_place_give_the_same_bits(shape, options, emulator):
    """As where parameters that lie side by side go through shared memory."""
    per = functional.spline_params(options.get("kind", "rq"), 6)
    case = Case("staged", "spline", {"x": shape, "params": (shape[0], per * shape[1], *shape[2:])}, options)
    tensors = case.tensors(torch.float32)
    tensors["x"] = 2.0 * tensors["x"]
    if len(shape) == 4:
        tensors = {n: t.contiguous(memory_format=torch.channels_last) for n, t in tensors.items()}
    cotangents, found = cotangents_of(case, tensors), []
    for limit in (227 * 1024, 1024):
        emulator.simt_set_shared_limit(limit)
        found.append(evaluate(case, tensors, cotangents=cotangents))
    for staged, in_place in zip(*found, strict=True):
        for name, t in staged.items():
            assert_bitwise(in_place[name], t, name)
    check_by_ratio(case, tensors, cotangents=cotangents)


def test_splines_of_more_bins_than_fit_in_shared_memory(emulator):
    case = Case("bins", "spline", {"x": (2, 3), "params": (2, 3 * 2099)},
                {"min_width": 1e-4, "min_height": 1e-4, "inverse": True})
    tensors = case.tensors(torch.float64)
    cotangents = cotangents_of(case, tensors)
    got, want = (evaluate(case, tensors, cotangents=cotangents, module=m) for m in (functional, reference))
    for ours, eager in zip(got, want, strict=True):
        for name, exact in eager.items():
            torch.testing.assert_close(ours[name], exact, rtol=1e-9, atol=1e-9)


def gaussian_operands(case, tensors):
    """The operator's operands and constants of a packed case with a seed."""
    o = case.options
    consts = (o["seed"], o.get("offset", 0), o.get("n_samples"), reference.SCALES.index(o.get("scale", "logvar")), 0,
              ("sample", "channel", "none").index(o.get("reduce", "sample")))
    return (tensors["params"], None, None, None, None, None, *consts), consts


@pytest.mark.parametrize("shape", [(3, 8), (2, 16, 4), (3, 10), (2, 6, 5)], ids=str)
@pytest.mark.parametrize("n_samples", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_noise_drawn_again_is_the_noise_kept(shape, n_samples, dtype, emulator):
    """Backward from the seed equals backward from the eps that forward saved, bit for bit."""
    options = {"seed": 0x1234567890ABCDEF, "offset": (1 << 32) - 2, "n_samples": n_samples}
    case = Case("again", "gaussian_sample_kl", {"params": shape}, options)
    tensors = case.tensors(dtype)
    operands, consts = gaussian_operands(case, tensors)
    z, kl, logq, eps = OPS["gaussian_fwd"](*operands, True, True)
    grads = torch.randn_like(z), torch.randn_like(kl), torch.randn_like(logq)
    needs = (True, False, False, False)
    kept = OPS["gaussian_bwd"](*grads, tensors["params"], None, None, None, eps, None, *consts, *needs)[0]
    again = OPS["gaussian_bwd"](*grads, tensors["params"], None, None, None, None, None, *consts, *needs)[0]
    assert_bitwise(again, kept)
    want = reference.philox_normal(z.shape, options["seed"], options["offset"])
    assert (eps - want).abs().max() < 2e-6


@pytest.mark.parametrize("n_samples", [None, 2])
def test_a_seed_per_sample(n_samples, emulator):
    params, seeds = torch.randn(5, 12), torch.randint(0, 2**62, (5,))
    consts = (0, 7, n_samples, 0, 0, 0)
    eps = OPS["gaussian_fwd"](params, None, None, None, None, seeds, *consts, False, True)[3]
    want = reference.philox_normal(eps.shape, seeds, 7, batch_dim=0 if n_samples is None else 1)
    assert (eps - want).abs().max() < 2e-6
    strided = torch.stack([seeds, seeds + 1], 1)[:, 0]
    assert_bitwise(OPS["gaussian_fwd"](params, None, None, None, None, strided, *consts, False, True)[3], eps)


@pytest.mark.parametrize("shape", [(3, 8), (2, 40000)], ids=str)
def test_no_samples(shape, emulator):
    """K = 0: z and log q are empty, the KL is what it always is."""
    params, consts = torch.randn(shape), (1, 0, 0, 0, 0, 0)
    z, kl, logq, eps = OPS["gaussian_fwd"](params, None, None, None, None, None, *consts, True, True)
    assert z.shape == eps.shape == (0, shape[0], shape[1] // 2) and logq.shape == (0, shape[0])
    torch.testing.assert_close(kl, reference.gaussian_sample_kl(params, seed=1)[1])


# Random123's kat_vectors for philox4x32-10.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def test_philox_known_answers(emulator):
    counter, key, words = (torch.tensor(column) for column in zip(*KNOWN_ANSWERS, strict=True))
    assert torch.equal(OPS["philox4x32"](counter, key), words)
    many = torch.randint(0, 2**32, (1000, 4)), torch.randint(0, 2**32, (1000, 2))
    assert torch.equal(OPS["philox4x32"](*many), reference.philox4x32(*many))


def test_many_samples_need_no_second_grid_axis(emulator):
    x, params = torch.randn(70000, 1), torch.randn(70000, 2)
    y, logdet = OPS["affine_coupling_fwd"](x, params, None, None, None, 0, 0, *EXP)
    torch.testing.assert_close(y, x * params[:, :1].exp() + params[:, 1:])
    torch.testing.assert_close(logdet, params[:, 0])
