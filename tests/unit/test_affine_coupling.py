"""affine_coupling: values and gradients of every scale map, option, dtype and rank against the float64 truth."""

import itertools

import pytest
import range_checks
import torch
from cases import Case, check_by_ratio, cotangents_of, evaluate, upcast
from tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_bitwise, assert_by_ratio

from fastflow import reference
from fastflow.functional import ScaleMap, affine_coupling

MAPS = {
    **{name: name for name in ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")},
    "exp_gains": ScaleMap("exp", gain=-0.8, offset=0.3, out_gain=0.7, shift_gain=-0.5),
    "sigmoid_gains": ScaleMap("sigmoid", gain=1.3, offset=-1.0, out_gain=2.0, shift_gain=0.1),
    "tanh_gains": ScaleMap("tanh", gain=0.1, offset=0.2, out_gain=1.5, clamp=2.0, shift_gain=0.1),
    "atan_gains": ScaleMap("atan", gain=2.0, offset=-0.2, out_gain=0.636, clamp=1.9),
    "softplus_gains": ScaleMap("softplus", gain=0.5, offset=1.0, shift_gain=2.0),
    "rational_gains": ScaleMap("rational", gain=1.5, offset=0.1, clamp=6.9),
    "exp_eps": ScaleMap("exp", eps=0.5),
    "sigmoid_eps": ScaleMap("sigmoid", offset=2.0, eps=1e-3),
    "tanh_eps": ScaleMap("tanh", clamp=1.5, eps=0.1),
    "softplus_eps_bounds": ScaleMap("softplus", eps=1e-3, hard_min=0.0, hard_max=1.0),
    "exp_bounds": ScaleMap("exp", hard_min=0.5, hard_max=2.0),
    "sigmoid_hard_min": ScaleMap("sigmoid", hard_min=0.4),
    "rational_hard_max": ScaleMap("rational", hard_max=1.2),
    "additive_eps": ScaleMap("additive", eps=0.25, shift_gain=3.0),
}
every_map = pytest.mark.parametrize("scale", MAPS.values(), ids=MAPS)


def case_of(shape, packing="packed", extra=(), **options):
    """A Case on x of ``shape`` with packed params, a pair, or additive's shift."""
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    if ScaleMap.of(options.get("scale", "exp")).kind == "additive":
        operands = {"params": shape}
    else:
        operands = {"raw": shape, "shift": shape} if packing == "pair" else {"params": doubled}
    shapes = {"x": shape, **operands}
    if "logdet" in extra:
        shapes["logdet"] = shape[:1]
    if "passive" in extra:
        shapes["passive"] = (shape[0], 3, *shape[2:])
    return Case(f"{packing}{list(shape)}{sorted(options.items(), key=str)}", "affine_coupling", shapes, options)


@every_map
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_of_every_map(scale, inverse, dtype, fused, device):
    """37 elements per sample: two full vectors of 16 and a tail."""
    for shift_first, packing in itertools.product((False, True), ("packed", "pair")):
        case = case_of((3, 37), packing, scale=scale, inverse=inverse, shift_first=shift_first)
        tensors = case.tensors(dtype, device)
        check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 9), (2, 3, 5, 4), (2, 2, 3, 4, 5), (1, 1, 1), (7, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["chunk", "interleave"])
@pytest.mark.parametrize("order", ["scale_shift", "shift_scale"])
def test_ranks_packings_and_extra_operands(shape, layout, order, fused, device):
    for extra, inverse in itertools.product(((), ("logdet",), ("passive",), ("logdet", "passive")), (False, True)):
        case = case_of(shape, extra=extra, scale="tanh", layout=layout, order=order, inverse=inverse)
        tensors = case.tensors(torch.float32, device)
        check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


@pytest.mark.parametrize("dtypes", [
    # x, params, passive -> y
    ("float32", "float32", None, "float32"), ("float32", "bfloat16", None, "float32"),
    ("float32", "float16", "bfloat16", "float32"), ("bfloat16", "bfloat16", None, "bfloat16"),
    ("bfloat16", "float32", None, "float32"), ("float16", "float16", "float16", "float16"),
    ("float16", "bfloat16", None, "float16"), ("bfloat16", "float16", "float16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32", "float32"), ("float64", "float64", "float64", "float64")], ids=str)
@pytest.mark.parametrize("packing", ["packed", "pair"])
def test_dtype_mixes(dtypes, packing, backend, device):
    """Result and gradient dtypes as the contract has them, errors within the ratio of eager's in the same dtypes."""
    x, params, passive, y = (d and getattr(torch, d) for d in dtypes)
    for inverse in (False, True):
        case = case_of((3, 4, 5), packing, ("logdet", "passive") if passive else ("logdet",), scale="sigmoid",
                       inverse=inverse)
        compute = torch.float64 if x == torch.float64 else torch.float32
        tensors = case.tensors(compute, device)
        kinds = {"x": x, "params": params, "raw": params, "shift": params, "passive": passive, "logdet": compute}
        tensors = {name: t.to(kinds[name]) for name, t in tensors.items()}
        results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
        assert results["y"].dtype == y and results["logdet"].dtype == compute
        assert {name: g.dtype for name, g in grads.items()} == {name: kinds[name] for name in tensors}


def test_pair_of_two_dtypes(backend, device):
    case = case_of((3, 6), "pair", scale="softplus")
    tensors = case.tensors(torch.bfloat16, device)
    tensors["shift"] = tensors["shift"].float()
    results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
    assert results["y"].dtype == torch.float32
    assert grads["raw"].dtype == torch.bfloat16 and grads["shift"].dtype == torch.float32


def test_logdet_is_added_to_in_float32_and_never_in_place(backend, device):
    """A bf16 flow carries its log-det in float32: 4096 + 2^-9 is lost in bf16."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, device=device)
    carried = torch.tensor([4096.0, -1.0], device=device)
    raw = torch.full_like(x, 2.0**-9)
    y, logdet = affine_coupling(x, (raw, torch.zeros_like(x)), logdet=carried)
    assert y.dtype == torch.bfloat16 and logdet.dtype == torch.float32
    assert logdet.tolist() == [4096.0 + 2.0**-9, -1.0 + 2.0**-9] and carried.tolist() == [4096.0, -1.0]


def test_logdet_is_of_the_active_part_alone(backend, device):
    """passive= adds nothing to the log-det and leaves the first channels bit for bit."""
    case = case_of((3, 4, 5), extra=("passive",), scale="exp")
    t = case.tensors(torch.float32, device)
    y, logdet = affine_coupling(t["x"], t["params"])
    both, logdet_both = affine_coupling(t["x"], t["params"], passive=t["passive"])
    assert torch.equal(both, torch.cat([t["passive"], y], 1)) and torch.equal(logdet_both, logdet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_own_channels_pass_as_a_tensor_in_front_or_behind(dtype, memory, backend, device):
    """An int as passive gives bit for bit what splitting and joining by hand gives, gradients included."""
    whole = torch.randn(3, 5, 17, 31, device=device, dtype=dtype).contiguous(memory_format=memory)
    for kept in (0, 2, 5, -1, -5):
        count = 5 - abs(kept)
        params = torch.randn(3, 2 * count, 17, 31, device=device)
        leaves = whole.clone().requires_grad_(), params.requires_grad_()

        def by_hand(x, p, kept=kept, count=count):
            sizes = (kept, count) if kept >= 0 else (count, -kept)
            parts = torch.split(x, sizes, 1)
            active, passive = parts[::-1] if kept >= 0 else parts
            y, logdet = affine_coupling(active, p, scale="tanh")
            passive = passive.to(y.dtype)
            return torch.cat([passive, y] if kept >= 0 else [y, passive], 1), logdet

        got, want = affine_coupling(*leaves, scale="tanh", passive=kept), by_hand(*leaves)
        for out, expected in zip(got, want, strict=True):
            assert_bitwise(out, expected, f"passive={kept}")
        assert got[0].is_contiguous(memory_format=memory)
        incoming = [torch.randn_like(t) for t in got]
        for used in ((0, 1), (0,), (1,)):
            found, right = (torch.autograd.grad([outs[i] for i in used], leaves, [incoming[i] for i in used],
                                                retain_graph=True, allow_unused=True, materialize_grads=True)
                            for outs in (got, want))
            for out, expected in zip(found, right, strict=True):
                assert_bitwise(out, expected, f"gradient for passive={kept}, {used}")


@pytest.mark.parametrize("scale", range_checks.MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_log_scale_and_derivatives_over_the_whole_range(scale, dtype, fused, device):
    range_checks.check_scale_map(range_checks.MAPS[scale], dtype, device)


def test_tanh_keeps_small_values_and_never_exceeds_its_clamp(fused, device):
    """log s within 2 ulp of itself, however small, in the order of the raw values and at most 1, full vectors and a
    tail."""
    raw = torch.cat([torch.logspace(-38, 1.3, 20_011), torch.tensor([8.9, 9.0, 9.1, 1e4, 3e38])]).sort().values
    for sign in (1.0, -1.0):
        r = (sign * raw).to(device)
        _, log_s = affine_coupling(torch.ones(len(r), 1, device=device), (r[:, None], torch.zeros_like(r)[:, None]),
                                   scale="tanh")
        truth = torch.tanh(r.double())
        assert ((log_s.double() - truth).abs() <= 2.01 * 2.0**-23 * truth.abs() + 2.0**-149).all()
        assert (sign * log_s).diff().min() >= -2.0**-23 and log_s.abs().max() == 1.0


@pytest.mark.parametrize("shape", [(2, 3, 41, 43), (1, 50_000), (3, 7, 4099)], ids=str)
def test_long_sums_of_one_sign(shape, backend, device):
    """Log-dets that don't cancel: 50,000 terms, where a running float32 sum is visibly wrong."""
    x = torch.randn(shape, device=device)
    raw = torch.rand(shape, device=device) + 0.5
    truth = raw.double().flatten(1).sum(1)
    _, logdet = affine_coupling(x, (raw, x))
    _, eager = reference.affine_coupling(x, (raw, x))
    assert_by_ratio(logdet, eager, truth, what="logdet")
    assert ((logdet.double() - truth).abs() / truth).max() < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", list(MAPS.values()), ids=MAPS)
def test_every_shape_up_to_two_vectors(scale, dtype, fused, device):
    """Sizes 1 to 39, pooled: the largest error of a few elements says little."""
    pooled = {}
    for size in range(1, 40):
        case = case_of((2, size), scale=scale, inverse=bool(size % 2))
        tensors = case.tensors(dtype, device, seed=size)
        cotangents = cotangents_of(case, tensors)
        runs = (evaluate(case, tensors, cotangents=cotangents),
                evaluate(case, tensors, cotangents=cotangents, module=reference),
                evaluate(case, upcast(tensors), cotangents=upcast(cotangents), module=reference))
        for part in (0, 1):
            for name in runs[0][part]:
                pooled.setdefault((part, name), []).append([run[part][name] for run in runs])
    for (part, name), triples in pooled.items():
        out, eager, truth = (torch.cat([t.flatten() for t in column]) for column in zip(*triples, strict=True))
        assert_by_ratio(out, eager, truth, factor=GRADIENT_FACTOR if part else VALUE_FACTOR, magnitude=6.0, what=name)


@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("image", [(53, 47), (210, 211)], ids=["in_caches", "past_caches"])
def test_large_results_have_the_bits_of_small_ones(image, scale, inverse, fused, device):
    """The numbers are those of one sample at a time, where a GPU splits each sample among blocks, and where results
    too large for any cache (8.5 MiB in float32) are stored otherwise. No sample is a multiple of a tile."""
    shape = (3, 16, *image)
    torch.manual_seed(0)
    x, grad_y = torch.randn(shape, device=device), torch.randn(shape, device=device)
    params = torch.randn(3, 16 if scale == "additive" else 32, *image, device=device)
    grad_logdet = torch.randn(3, device=device)

    def run(*which):
        leaves = [t[list(which)].clone().requires_grad_() for t in (x, params)]
        y, logdet = affine_coupling(*leaves, scale=scale, inverse=inverse)
        return y, logdet, *torch.autograd.grad((y, logdet), leaves, (grad_y[list(which)], grad_logdet[list(which)]))

    parts = zip(*(run(b) for b in range(3)), strict=True)
    for whole, part in zip(run(0, 1, 2), parts, strict=True):
        assert torch.equal(whole, torch.cat(part))
