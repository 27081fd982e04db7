"""mlp_flow: values and gradients over sizes, maps, activations, depths; non-finite numbers; other instruction sets."""

import dataclasses
import itertools

import pytest
import torch
from cases import check_together as check
from cases import cotangents_of, evaluate, flow_case, kernels_run, upcast
from op_checks import check_with_instructions
from sweeps import rest_slow
from tolerances import assert_bitwise, assert_by_ratio, assert_same_nonfinite
from torch._subclasses import FakeTensorMode

from fastflow import extension, functional, reference
from fastflow.autograd import mlp_flow
from fastflow.functional import ScaleMap

OP = "mlp_flow"
# Features, hidden layers, context: thin and wide inputs and outputs, sizes that fill no vector, no hidden layer at all.
SIZES = ((2, (64, 64), None), (3, (5,), 2), (10, (32, 20), None), (64, (128,), 3), (33, (17, 40, 9), 1),
         (1, (7,), None), (1, (), 2), (9, (), None))
BATCHES = (1, 15, 64, 65, 200)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, inverse, fused, device):
    features, hidden, context = sizes
    for batch in BATCHES:
        case = flow_case(f"{sizes} batch {batch}", features, hidden, 3, batch=batch, context=context, scale="tanh",
                         inverse=inverse, activation="silu")
        check(case, torch.float32, device)
        relu = dataclasses.replace(case, options={**case.options, "activation": "relu"})  # its kinks: exact enough here
        check(relu, torch.float64, device)


MAPS = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive", ScaleMap.nflows(general=True),
        ScaleMap.freia(), ScaleMap.tarflow(), ScaleMap("tanh", clamp=20.0, eps=0.1, hard_min=0.2, shift_gain=0.5))


@pytest.mark.parametrize("scale", MAPS, ids=lambda s: s if isinstance(s, str) else s.kind)
def test_maps_packings_and_activations(scale, fused, device):
    options = itertools.product(("relu", "silu", "tanh"), (False, True), (False, True))
    for activation, inverse, other in options:
        case = flow_case(f"{activation} {inverse} {other}", 5, (19, 8), 2, batch=70, scale=scale, inverse=inverse,
                         activation=activation, layout="interleave" if other else "chunk", shift_first=other,
                         order="shift_scale" if other else "scale_shift")
        check(case, torch.float64 if activation == "relu" else torch.float32, device)


def test_inverse_undoes_and_log_dets_cancel(fused, device):
    case = flow_case("there", 6, (20,), 5, batch=40, context=2, scale="tanh")
    tensors = case.tensors(torch.float64, device)
    z, logdet = case.call(tensors)
    back = dataclasses.replace(case, options={**case.options, "inverse": True})
    x, opposite = back.call({**tensors, "x": z})
    torch.testing.assert_close(x, tensors["x"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opposite, -logdet, rtol=1e-12, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda v: case.call({**tensors, "x": v})[0].sum(0), tensors["x"])
    expected = torch.linalg.slogdet(jacobian.transpose(0, 1)).logabsdet
    torch.testing.assert_close(logdet, expected, rtol=1e-10, atol=1e-10)


def test_many_samples_and_a_deep_flow(fused, device):
    """The groups of samples whose gradients are summed apart, and more steps and layers than a launch takes."""
    case = flow_case("many", 2, (8,), 2, batch=9000 if device == "cuda" or fused == "cpu" else 300, scale="tanh")
    check(case, torch.float32, device)
    check(flow_case("deep", 2, (4, 4, 4), 40, batch=33, scale="tanh"), torch.float32, device, size=0.3)


def test_no_steps_no_samples_and_steps_of_one_kind(fused, device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    z, logdet = functional.mlp_flow(x, [])
    assert torch.equal(z, x) and not logdet.any() and z.data_ptr() != x.data_ptr()
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], torch.ones_like(x))
    case = flow_case("none", 3, (8,), 2, batch=0, context=1)
    tensors = case.tensors(torch.float32, device)
    results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
    assert results["z"].shape == (0, 3) and results["logdet"].shape == (0,)
    assert all(g.shape == tensors[n].shape and not g.any() for n, g in grads.items())
    check(flow_case("affine alone", 3, (), 0, batch=5), torch.float32, device)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_non_finite_numbers_come_out_where_eager_has_them(activation, poison, fused, device):
    """In one feature of one sample, in the context, in a weight and a bias; other samples keep their bits."""
    case = flow_case("poison", 4, (6,), 2, batch=18, context=1, scale="tanh", activation=activation)
    tensors = case.tensors(torch.float32, device)
    clean = evaluate(case, tensors)[0]
    cotangents = cotangents_of(case, tensors)
    for name, t in tensors.items():
        bad = {n: v.clone() for n, v in tensors.items()}
        bad[name][(16,) + (0,) * (t.dim() - 1) if name in ("x", "context") else 0] = poison
        got = evaluate(case, bad, cotangents=cotangents)
        eager = evaluate(case, bad, cotangents=cotangents, module=reference)
        for part in (0, 1):
            for result, out in got[part].items():
                assert_same_nonfinite(out, eager[part][result], f"{poison} in {name} -> {result}", gradient=part == 1)
        if name in ("x", "context"):
            for result, out in got[0].items():
                keep = torch.arange(18, device=device) != 16
                assert_bitwise(out[keep], clean[result][keep], f"{poison} in {name} -> {result}")


def test_a_context_that_is_only_read_and_parameters_shared_by_steps(fused, device):
    """One network in two steps: its gradient is the sum; no gradient of the context unless asked."""
    x, context = torch.randn(9, 4, device=device), torch.randn(9, 2, device=device)
    weight, bias = 0.3 * torch.randn(4, 4, device=device), torch.zeros(4, device=device)
    weight.requires_grad_()
    bias.requires_grad_()
    steps = [functional.MLPCoupling((weight,), (bias,), flip=flip, scale="tanh") for flip in (False, True)]
    found = []
    for module in (functional, reference):
        z, logdet = module.mlp_flow(x, steps, context=context)
        found.append(torch.autograd.grad(z.square().sum() + logdet.sum(), (weight, bias)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


PIECEWISE = 1024  # samples from which on the CPU makes a table of a first layer of one feature


def piecewise_case(hidden, inverse=False):
    """(case, tensors in float32): one coupling of two features, with units that make dead, constant, far and coinciding
    knots, and samples at every knot."""
    case = flow_case(f"pieces {hidden}", 2, hidden, 1, batch=PIECEWISE + 37, actnorm=False, scale="tanh",
                     inverse=inverse, activation="relu")
    tensors = case.tensors(torch.float32)
    weight, bias, x = tensors["1.w0"], tensors["1.b0"], tensors["x"]
    x[:len(weight)] = (-bias / weight[:, 0])[:, None]
    weight[0], bias[0] = 0.0, 0.5
    weight[1], bias[1] = 0.0, -0.5
    weight[2], bias[2] = 1e-30, 1.0
    weight[3], bias[3] = weight[4].clone(), bias[4].clone()
    return case, tensors


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("hidden", [(64, 64), (5, 16), (128, 32, 8), (16, 48, 7), (16, 7)], ids=str)
def test_one_feature_through_relu(hidden, inverse, fused, device):
    """Values and gradients where the table stands for two layers. Gradients as vectors: single ones jump where rounding
    moves a sample across a knot, eager's too. At the knots themselves, which hang on whether a product and a sum are
    rounded once or twice, they lie between those on both sides."""
    case, tensors = piecewise_case(hidden, inverse)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    cotangents, knots = cotangents_of(case, tensors), len(tensors["1.w0"])

    def evaluated(tensors, cotangents, module=reference):
        return evaluate(case, tensors, cotangents=cotangents, module=module)

    got, eager = (evaluated(tensors, cotangents, module) for module in (functional, reference))
    truth = evaluated(upcast(tensors), upcast(cotangents))
    for name, out in got[0].items():
        assert_by_ratio(out, eager[0][name], truth[0][name], what=name)
    sides = [evaluated(upcast(tensors) | {"x": tensors["x"].double() * (1 + nudge)}, upcast(cotangents))[1]["x"][:knots]
             for nudge in (-1e-6, 1e-6)]
    least, most = (bound(*sides) + sign * 1e-4 * (1 + sides[0].abs())
                   for bound, sign in ((torch.minimum, -1), (torch.maximum, 1)))
    assert ((least <= got[1]["x"][:knots]) & (got[1]["x"][:knots] <= most)).all()

    cotangents = {name: t.clone() for name, t in cotangents.items()}
    for cotangent in cotangents.values():
        cotangent[:knots] = 0.0
    got, eager = (evaluated(tensors, cotangents, module)[1] for module in (functional, reference))
    truth = evaluated(upcast(tensors), upcast(cotangents))[1]
    for name, out in got.items():
        error, allowed = ((g.double() - truth[name]).norm().item() for g in (out, eager[name]))
        assert error <= 3 * allowed + 4e-7 * truth[name].norm().item(), (name, error, allowed)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_numbers_of_one_feature(poison, fused, device):
    """As above: what is not finite is where eager has it, and other samples keep their bits."""
    case, tensors = piecewise_case((16, 16))
    tensors = {name: t.to(device) for name, t in tensors.items()}
    clean, cotangents = evaluate(case, tensors)[0], cotangents_of(case, tensors)
    for name in tensors:
        bad = {n: v.clone() for n, v in tensors.items()}
        bad[name][(100, slice(None)) if name == "x" else -1] = poison
        got = evaluate(case, bad, cotangents=cotangents)
        eager = evaluate(case, bad, cotangents=cotangents, module=reference)
        for part in (0, 1):
            for result, out in got[part].items():
                assert_same_nonfinite(out, eager[part][result], f"{poison} in {name} -> {result}", gradient=part == 1)
        if name == "x":
            for result, out in got[0].items():
                keep = torch.arange(len(out), device=device) != 100
                assert_bitwise(out[keep], clean[result][keep], f"{poison} in {name} -> {result}")


SCRIPT = """
import torch
from cases import flow_case
from test_mlp_flow import check
torch.set_num_threads(1)
for features, hidden, context in ((2, (64, 64), None), (33, (17, 40), 1)):
    for dtype in (torch.float32, torch.float64):
        check(flow_case("isa", features, hidden, 3, batch=75, context=context, scale="tanh", activation="silu"), dtype)
"""


@pytest.mark.parametrize("isa", rest_slow(["avx2", "baseline"], ["avx2"]))
def test_on_older_processors(isa):
    check_with_instructions(isa, SCRIPT)


def test_kept_activations_give_the_same_bits():
    """Backward from kept activations and from ones computed again: whole tiles, the last one's few samples."""
    for batch, activation, inverse in itertools.product((1, 64, 200), reference.ACTIVATIONS, (False, True)):
        layers, (weights, biases) = ((16, 80), (80, 48), (48, 64), (64, 17), (17, 64), (64, 32)), ([], [])
        for inputs, outputs in layers:
            weights.append((torch.randn(outputs, inputs) / inputs**0.5).requires_grad_())
            biases.append(torch.randn(outputs, requires_grad=True))
        steps = [functional.MLPCoupling(tuple(weights), tuple(biases), flip=flip, activation=activation, scale="tanh")
                 for flip in (False, True, False)]
        x, grads = torch.randn(batch, 32, requires_grad=True), []
        bytes_saved = []
        for save in (mlp_flow.SAVE_OVERWRITTEN, mlp_flow.SAVE_ACTIVATIONS):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1],
                                                          lambda t: t):
                z, logdet = mlp_flow.run_steps(x, steps, None, inverse, save)
            bytes_saved.append(sum(sizes))
            grads.append(torch.autograd.grad((z.square().sum(), logdet.sum()), (x, *weights, *biases)))
        for again, kept in zip(*grads, strict=True):
            assert_bitwise(kept, again)
        assert bytes_saved[1] - bytes_saved[0] == 3 * batch * (32 if activation == "silu" else 48 + 32)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("batch", [3, 150])
def test_permutations(batch, inverse):
    """Between couplings, in front and behind; and as a GPU takes them, with the features moved between kernels."""
    def steps():
        torch.manual_seed(batch)
        made, orders = [], [torch.randperm(7) for _ in range(4)]
        for index, flip in enumerate((False, True, False)):
            active = 3 if flip else 4
            made += [functional.Permutation(orders[index]),
                     functional.MLPCoupling((torch.randn(9, 7 - active) / 3, torch.randn(2 * active, 9) / 5),
                                            (torch.randn(9), torch.randn(2 * active) / 5), flip=flip, scale="tanh")]
        made += [functional.Permutation(orders[3]), functional.ChannelAffine(torch.randn(7), torch.randn(7) / 4)]
        return made

    x, found = torch.randn(batch, 7), []
    for run, dtype in ((functional.mlp_flow, torch.float32), (reference.mlp_flow, torch.float64),
                       (lambda x, s, inverse: mlp_flow._in_pieces(x, s, None, inverse, mlp_flow.SAVE_ACTIVATIONS),
                        torch.float32)):
        made = steps()
        leaves = [x.to(dtype).requires_grad_()]
        for step in made:
            for name in ("bias", "log_scale"):
                if hasattr(step, name):
                    setattr(step, name, getattr(step, name).to(dtype).requires_grad_())
                    leaves.append(getattr(step, name))
            if hasattr(step, "weights"):
                step.weights = tuple(w.to(dtype).requires_grad_() for w in step.weights)
                step.biases = tuple(b.to(dtype).requires_grad_() for b in step.biases)
                leaves += [*step.weights, *step.biases]
        ran = kernels_run(lambda run=run, made=made, leaves=leaves: found.append(
            [*run(leaves[0], made, inverse=inverse), *leaves]))
        assert (ran == {"fastflow_cpu::mlp_flow_fwd"}) == (dtype is torch.float32)
        z, logdet, *leaves = found[-1]
        found[-1] = [z, logdet, *torch.autograd.grad((z.sin().sum() + (logdet * logdet).sum()), leaves)]
    for got in (found[0], found[2]):
        for t, want in zip(got, found[1], strict=True):
            torch.testing.assert_close(t.double(), want, rtol=2e-5, atol=2e-5)


def test_an_order_that_is_no_permutation_is_refused_by_the_kernel_too():
    """The checks of a compiled call see no values."""
    for order in ([0, 0, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="no permutation"):
            mlp_flow.run_steps(torch.randn(4, 3), [functional.Permutation(torch.tensor(order))], None, False)


def test_an_order_of_any_strides():
    order, x = torch.tensor([[2, 0], [0, 1], [1, 2]])[:, 0], torch.randn(4, 3, requires_grad=True)
    z = functional.mlp_flow(x, [functional.Permutation(order)])[0]
    assert torch.equal(z, x[:, order])
    assert torch.equal(functional.mlp_flow(z, [functional.Permutation(order)], inverse=True)[0], x)


def test_an_order_without_values_to_look_at():
    """Meta and fake tensors, and one order for each member of an ensemble."""
    order, x = torch.tensor([2, 0, 1]), torch.randn(4, 3)
    assert functional.mlp_flow(x.to("meta"), [functional.Permutation(order.to("meta"))])[0].shape == (4, 3)
    mode = FakeTensorMode()
    with mode:
        z, logdet = functional.mlp_flow(mode.from_tensor(x), [functional.Permutation(mode.from_tensor(order))])
    assert z.shape == (4, 3) and logdet.shape == (4,)
    orders = torch.stack([order, order.flip(0)])
    got = torch.func.vmap(lambda o: functional.mlp_flow(x, [functional.Permutation(o)])[0])(orders)
    assert torch.equal(got, torch.stack([x[:, o] for o in orders]))


def test_the_operator_with_a_permutation():
    """Its schema and fake implementation; on a GPU no permutation comes to it."""
    steps = [functional.Permutation(torch.tensor([2, 0, 1])),
             functional.MLPCoupling((torch.randn(5, 1), torch.randn(4, 5)), (torch.randn(5), torch.randn(4)))]
    params, code, constants = mlp_flow.program(steps)
    x = torch.randn(4, 3)
    for save in (0, 1, 2):
        torch.library.opcheck(extension.load("cpu")["mlp_flow_fwd"], (x, None, params, code, constants, False, save))
    saved = torch.randn(2, 4)
    torch.library.opcheck(extension.load("cpu")["mlp_flow_bwd"],
                          (x, None, x, saved, None, params, code, constants, False, True, False, True))
