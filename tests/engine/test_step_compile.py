"""TrainStep(compile=...): one graph without a break, for every batch size of 2 and more."""

import copy
import functools

import pytest
import torch
from sweeps import rest_slow
from torch import nn
from torch._dynamo.utils import counters

from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.vae import (
    HVAE,
    MLPVAE,
    VAE,
    WAE,
    AdversarialAutoencoder,
    BoundObjective,
    Capacity,
    ConditionalGaussianPrior,
    ConditionalVAE,
    DeltaGaussianPosterior,
    DiscreteVAE,
    FactorVAE,
    FlowPosteriorVAE,
    InfoVAE,
    KLBalance,
    LinearSchedule,
    MutualInformation,
    PenalizedELBO,
    mlp_decoder,
    mlp_encoder,
)


def glow(n_steps, n_levels=3, **options):
    side = 2 * 2**n_levels
    model = flows.Glow((3, side, side), n_levels, n_steps, hidden_channels=4, **options)
    model.initialize(torch.rand(8, 3, side, side) - 0.5)
    return model


def check(model, shape, batches=(4, 6, 9), backend="aot_eager", exact=True, integer=True, **options):
    """Equal losses and parameters, one graph, no break, at every one of several batch sizes."""
    twin = copy.deepcopy(model)
    steps = [TrainStep(m, torch.optim.Adam(m.parameters(), 1e-3, fused=True), compile=c, **options)
             for m, c in ((model, backend), (twin, False))]
    assert f"one graph for batches of 2 and more ({backend})" not in steps[1].explain()
    for batch in batches:
        x = torch.randint(256, (batch, *shape), dtype=torch.uint8) if integer else torch.rand(batch, *shape) - 0.5
        losses = []
        for step in steps:
            torch.manual_seed(batch)
            losses.append(step(x))
        tolerance = {} if exact else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(*losses, **tolerance)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert counters["graph_break"].total() == 0 and counters["recompile_limit"].total() == 0
    return steps[0]


def test_glow_traces_whole():
    step = check(glow(1, n_levels=2), (3, 8, 8))
    assert "compile: torch.compile on the loss (aot_eager), one graph for batches of 2 and more" in step.explain()


def test_with_other_options():
    check(glow(1, n_levels=1), (3, 4, 4), conditioner_dtype=torch.bfloat16, accumulate=3, ema_decay=0.9)


def test_a_vae_and_a_tabular_flow_trace_whole():
    check(VAE(mlp_encoder((1, 4, 4), 3, (8,)), mlp_decoder(3, (1, 4, 4), (8,))), (1, 4, 4), integer=False)
    torch._dynamo.reset()
    counters.clear()
    check(flows.RealNVP(4, n_layers=2, hidden=(8,)), (4,), integer=False)


def test_the_latents_shape_is_known_afterwards():
    """Of a decoder that does not begin with a linear layer; buffers and random numbers as without compiling."""
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 6))
    model = VAE(encoder, nn.Sequential(nn.Tanh(), nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4))))
    check(model, (1, 4, 4))
    assert model.latent_shape == (3,) and model.sample(2).shape == (2, 1, 4, 4)
    assert encoder[1].num_batches_tracked == 3


def test_inductor():
    check(flows.RealNVP(2, n_layers=1, hidden=(4,)), (2,), batches=(4, 6), backend="inductor", exact=False,
          integer=False)


@pytest.mark.slow
def test_glow_of_32_steps_traces_whole():
    check(glow(32), (3, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", ["plain", "plu"])
def test_glow_through_inductor(parametrization):
    check(glow(1, parametrization=parametrization), (3, 16, 16), backend="inductor", exact=False, integer=False)


@pytest.mark.parametrize("dtype", rest_slow([None, torch.bfloat16], [None]))
def test_conditioners_of_one_shape_share_a_graph(dtype):
    """Three couplings of each of two levels and one split: three graphs, and the steps of the plain model."""
    model = flows.Glow((3, 8, 8), 2, 3, hidden_channels=8)
    model.initialize(torch.rand(8, 3, 8, 8) - 0.5)
    twin = copy.deepcopy(model)
    steps = [TrainStep(m, torch.optim.Adam(m.parameters(), 1e-3, fused=True), compile=c, conditioner_dtype=dtype)
             for m, c in ((model, "conditioners"), (twin, False))]
    for i in range(3):
        x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        losses = []
        for step in steps:
            torch.manual_seed(i)
            losses.append(step(x))
        torch.testing.assert_close(*losses, rtol=1e-3 if dtype else 1e-5, atol=1e-3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 if dtype else 5e-4)
    assert counters["stats"]["unique_graphs"] == 3 and counters["graph_break"].total() == 0, dict(counters["stats"])
    assert "compile: 7 conditioners, one graph for all of one shape" in steps[0].explain()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_conditioners_is_refused():
    model = flows.Flow(flows.Planar(2), flows.StandardNormal((2,)))
    with pytest.raises(ValueError, match="compile: expected a bool for Flow, in which no network"):
        TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), compile="conditioners")


@pytest.mark.slow
def test_many_steps_with_compiled_conditioners_in_one_process():
    """Each has graphs of its own, and none is refused for those of the others."""
    for _ in range(5):
        model = glow(1)
        step = TrainStep(model, torch.optim.Adam(model.parameters(), 1e-3, fused=True), compile="conditioners",
                         memory="none")
        with torch._dynamo.config.patch(recompile_limit=6):
            step(torch.rand(2, 3, 16, 16) - 0.5)
    assert counters["recompile_limit"].total() == 0 and counters["stats"]["unique_graphs"] == 25


def test_many_compiled_steps_in_one_process():
    """Each has a cache of its own, whose limit is not reached by the graphs of the others."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for features in range(2, 5):
            model = flows.NICE(features, n_layers=1, hidden=(4,))
            step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), compile="eager")
            assert step(torch.randn(5, features)).isfinite()


def test_a_scheduled_weight_of_the_rate_is_followed_without_a_new_graph():
    model = VAE(mlp_encoder((12,), 2, (8,)), mlp_decoder(2, (12,), (8,)))
    twin, schedule = copy.deepcopy(model), LinearSchedule(0.0, 1.0, 4)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), 1e-2, fused=True), compile="aot_eager",
                     beta=schedule)
    plain = TrainStep(twin, torch.optim.Adam(twin.parameters(), 1e-2, fused=True))
    for _ in range(5):
        plain.objective.beta = schedule.value
        x = torch.rand(6, 12)
        losses = []
        for one in (step, plain):
            torch.manual_seed(0)
            losses.append(one(x))
        torch.testing.assert_close(*losses)
        schedule.step()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_scheduled_weight_has_the_precision_of_a_float64_model():
    model, schedule = MLPVAE((12,), 2, (8,)).double(), LinearSchedule(0.1, 1.0, 7)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.0), compile="eager", beta=schedule)
    schedule.step(3)
    x = torch.rand(6, 12, dtype=torch.float64)
    torch.manual_seed(0)
    loss = step(x)
    torch.manual_seed(0)
    bound = model(x, beta=schedule.value)
    torch.testing.assert_close(loss, -bound.elbo.mean().detach(), rtol=1e-14, atol=0)


@pytest.mark.slow
def test_a_scheduled_capacity_is_followed_without_a_graph_for_each_value():
    schedule, losses = LinearSchedule(0.0, 8.0, 4), []
    torch.manual_seed(0)
    model, x = MLPVAE((12,), 2, (8,), objective=PenalizedELBO(Capacity(schedule, 3.0))), torch.rand(6, 12)
    steps = [TrainStep(model, torch.optim.SGD(model.parameters(), 0.0), compile=c) for c in ("aot_eager", False)]
    for _ in range(4):
        for one in steps:
            torch.manual_seed(0)
            losses.append(one(x))
        torch.testing.assert_close(*losses[-2:])
        schedule.step()
    torch.testing.assert_close(losses[4] - losses[2], torch.tensor(6.0))  # 3 for each of 2 nats
    assert counters["stats"]["unique_graphs"] == 2  # the first call makes the tensor that follows


def discrete(estimator, n_classes=2, **options):
    size = 3 if n_classes == 2 else 3 * n_classes
    return DiscreteVAE(nn.Linear(8, size), nn.Linear(size, 8), 3, n_classes, estimator, **options)


@pytest.mark.parametrize("make", [
    functools.partial(discrete, "reinforce"),
    *(pytest.param(make, marks=pytest.mark.slow) for make in (
        lambda: WAE((8,), 2, sizes=(8,)), lambda: InfoVAE((8,), 2, sizes=(8,)),
        lambda: AdversarialAutoencoder((8,), 2, sizes=(8,)), lambda: FactorVAE((8,), 2, sizes=(8,)),
        *(functools.partial(discrete, name) for name in (
            "gumbel-softmax", "enumeration", "nvil", "rloo", "vimco", "straight-through", "arm", "disarm",
            "unordered-set")),
        lambda: discrete("gumbel-softmax", 3), lambda: discrete("rloo", 3), lambda: discrete("unordered-set", 3))),
    lambda: flows.Flow(flows.Compose(flows.VariationalDequantization(flows.ConditionalNormal(8, nn.Linear(8, 16))),
                                     flows.RealNVP(8, n_layers=2, hidden=(8,)).transform), flows.StandardNormal(8)),
])
def test_noise_is_drawn_for_any_batch_size(make):
    """Noise that the graph draws itself, not a kernel of fastflow's."""
    model = make()
    options = {"n_samples": 2} if isinstance(model, DiscreteVAE) else {}
    check(model, (8,), batches=(4, 6), integer=isinstance(model, flows.Flow), **options)


@pytest.mark.parametrize("bound, weight", rest_slow([("nwj", 1.0), ("info_nce", 1.0), ("leave_one_out", -1.0)],
                                                    [("nwj", 1.0)]))
def test_information_over_a_batch_of_any_size(bound, weight):
    model = MLPVAE((8,), 2, (8,), objective=PenalizedELBO(MutualInformation(bound, weight)))
    check(model, (8,), batches=(4, 6, 7), backend="eager", integer=False)


def test_a_conditional_prior_is_no_module_of_the_graph():
    model = ConditionalVAE((8,), 2, 3, (8,), prior=ConditionalGaussianPrior(2, nn.Embedding(3, 4)))
    steps = [TrainStep(m, torch.optim.SGD(m.parameters(), 0.1), compile=backend)
             for m, backend in ((model, "eager"), (copy.deepcopy(model), False))]
    for batch in (4, 6, 6):
        x, labels = torch.rand(batch, 8).round(), torch.arange(batch) % 3
        losses = []
        for step in steps:
            torch.manual_seed(batch)
            losses.append(step(x, labels))
        torch.testing.assert_close(*losses)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options, change", [
    ({"posterior": DeltaGaussianPosterior(0.2)}, lambda model: setattr(model.posterior, "least", 0.7)),
    ({"objective": BoundObjective("renyi", 4, alpha=0.5)}, lambda model: model.objective.options.update(alpha=0.3)),
], ids=["delta", "renyi"])
def test_numbers_that_a_graph_leaves_open(options, change):
    """With dynamic=True they are no constants of it."""
    model, x = MLPVAE((8,), 2, (8,), **options), torch.rand(5, 8).round()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for _ in range(2):
        values = []
        for one in (model, compiled):
            torch.manual_seed(1)
            bound = one(x)
            values.append(bound.value if model.objective else bound.elbo)
        torch.testing.assert_close(*values)
        change(model)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: MLPVAE((1, 4, 4), 3, (8,), objective=BoundObjective("stl", 3)),
    lambda: MLPVAE((1, 4, 4), 3, (8,), objective=BoundObjective("dreg", 3)),
    lambda: HVAE((1, 4, 4), (3, 2), 8, objective=PenalizedELBO(KLBalance())),
    lambda: HVAE((1, 4, 4), (3, 2), 8, objective=BoundObjective("iwae", 3)),
    lambda: HVAE((1, 4, 4), (3, 2), 8, objective=BoundObjective("stl", 3)),
    lambda: HVAE((1, 4, 4), (3, 2), 8, objective=BoundObjective("dreg", 3)),
    lambda: MLPVAE((1, 4, 4), 3, (8,), objective=BoundObjective("piwae", 4, groups=2)),
    lambda: HVAE((1, 4, 4), (3, 2), 8, objective=BoundObjective("piwae", 4, groups=2)),
    lambda: FlowPosteriorVAE((1, 4, 4), 3, sizes=(8,), flow="coupling", objective=BoundObjective("dreg", 3)),
], ids=["stl", "dreg", "levels", "levels-iwae", "levels-stl", "levels-dreg", "piwae", "levels-piwae", "dreg-flow"])
def test_objectives_of_vaes_trace_whole(make):
    """With the gradients that they have without a graph."""
    model = make()
    twin, beta, x = copy.deepcopy(model), torch.tensor(0.5), (torch.rand(5, 1, 4, 4) > 0.5).float()
    losses, before = [], [p.detach().clone() for p in model.parameters()]
    for one, backend in ((model, "aot_eager"), (twin, False)):
        step = TrainStep(one, torch.optim.SGD(one.parameters(), 1.0), compile=backend, beta=beta)
        torch.manual_seed(1)
        losses.append(step(x))
    torch.testing.assert_close(*losses)
    for a, b, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(a - old, b - old, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"].total() == 0
