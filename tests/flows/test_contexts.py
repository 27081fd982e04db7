"""What of a flow gets a context, behind a conditional base and beside parts that take one."""

import math
from typing import Optional

import pytest
import torch
from flow_checks import check_bijection, scattered
from torch import nn

from fastflow import flows
from fastflow.flows import memory
from fastflow.flows.contexts import takes_context
from fastflow.nn import MLP, ActNorm, AffineCoupling


class Doubling:
    """A transform that is no module, and refuses a context."""

    def __call__(self, x, context=None):
        assert context is None
        return 2 * x, x.new_full((len(x),), x.shape[1] * math.log(2))

    def inverse(self, z, context=None):
        raise NotImplementedError


def test_a_transform_says_itself_whether_it_takes_a_context():
    class Says(Doubling):
        takes_context = False

    class Module(Doubling, nn.Module):
        def forward(self, x, context=None):
            raise NotImplementedError

    base = flows.ConditionalNormal(2, nn.Linear(1, 4))
    context, x = torch.randn(3, 1), torch.randn(3, 2)
    quiet, said = Module(), Module()
    said.takes_context = False
    for transform in (Says(), said):
        for whole in (transform, flows.Compose(transform), flows.Inverse(flows.Inverse(transform))):
            want = base.log_prob(2 * x, context=context) + 2 * math.log(2)
            torch.testing.assert_close(flows.Flow(whole, base).log_prob(x, context), want)
    for transform in (Doubling(), quiet, flows.Compose(Doubling()), flows.Compose(quiet)):
        with pytest.raises(AssertionError):  # it looks as if, and is handed it
            flows.Flow(transform, base).log_prob(x, context)


class OneInput(nn.Module):
    """With parts that have further inputs of their own."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.GRU(2, 4, batch_first=True)
        self.seen = nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), 1,
                                          enable_nested_tensor=False)

    def forward(self, x):
        return self.mixed(self.seen(x[:, None]))[0][:, 0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.c = nn.Linear(2, 4), nn.Linear(3, 4)

    def forward(self, x, c: Optional[torch.Tensor] = None):  # noqa: UP045 - as TorchScript reads it
        return self.x(x) if c is None else self.x(x) + self.c(c)


CONDITIONERS = {"one input": (OneInput, False), "two inputs": (TwoInputs, True),
                "chain": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), False),
                "wrapped": (lambda: nn.DataParallel(TwoInputs()), True),
                "script": (lambda: torch.jit.script(TwoInputs()), True),
                "script of one input": (lambda: torch.jit.script(nn.Linear(2, 4)), False),
                "function": (lambda: lambda x, c: torch.cat([x * c[:, :1], x], 1), True),
                "function of one input": (lambda: lambda x: torch.cat([x, x], 1), False)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CONDITIONERS)
def test_conditioners_behind_a_conditional_base_get_the_context_that_they_take(name):
    make, takes = CONDITIONERS[name]
    network, x, context = make(), torch.randn(5, 4), torch.randn(5, 3)
    coupling = AffineCoupling(network)
    base = flows.ConditionalNormal(4, nn.Linear(3, 8))
    z, logdet = coupling(x, context) if takes else coupling(x)
    for transform in (coupling, flows.Compose(coupling)):
        flow = flows.Flow(transform, base)
        torch.testing.assert_close(flow.log_prob(x, context), base.log_prob(z, context=context) + logdet)
        assert flow.sample(2, context).shape == (2, 5, 4)


def test_an_exchanged_conditioner_gets_the_context_too():
    base, x, context = flows.ConditionalNormal(4, nn.Linear(3, 8)), torch.randn(5, 4), torch.randn(5, 3)
    flow = flows.Flow(flows.Compose(AffineCoupling(nn.Linear(2, 4))), base)
    flow.log_prob(x, context)
    flow.transform.transforms[0].conditioner = TwoInputs()
    torch.testing.assert_close(flow.log_prob(x, context), flows.Flow(flow.transform, base).log_prob(x, context))
    moved = flow.log_prob(x, context + 1.0) - flow.base.log_prob(flow.transform(x, context)[0], context=context + 1.0)
    assert not torch.allclose(moved, flow.transform(x, context)[1])


def test_a_split_takes_the_context_of_its_prior_or_its_rest():
    rest = flows.RealNVP(2, n_layers=1, hidden=(4,), context_features=1).transform
    prior = MLP(2, 4, (4,), context_features=1)
    plain = flows.RealNVP(2, n_layers=1, hidden=(4,)).transform
    assert takes_context(flows.Split((4,), rest)) and not takes_context(flows.Split((4,), plain))
    assert takes_context(flows.Split((4,), prior=prior, conditional=True))
    assert takes_context(flows.Split((4,), rest, prior=nn.Linear(2, 4)))


def mixed(*transforms):
    return scattered(flows.Compose(*transforms)).double()


def real_nvp(context_features=None, features=4):
    return flows.RealNVP(features, n_layers=2, hidden=(4,), context_features=context_features).transform


# name: the parts, one after the other, of which some take a context
MIXED = {
    "compositions": lambda: [real_nvp(), real_nvp(3)],
    "layers": lambda: [AffineCoupling(nn.Linear(2, 4)), *real_nvp(3).transforms, ActNorm(4), AffineCoupling(MLP(2, 4))],
    "the other way": lambda: [flows.Inverse(flows.Compose(real_nvp(3), flows.Planar(4))),
                              flows.Planar(4, context_features=3)],
    "splits": lambda: [real_nvp(), flows.Split((4,), real_nvp(None, 2), prior=MLP(2, 4, context_features=3),
                                               conditional=True)],
    "rests": lambda: [flows.Split((4,), flows.Compose(real_nvp(3, 2), real_nvp(None, 2)), prior=nn.Linear(2, 4))],
    "many kinds": lambda: [flows.MAF(4, n_layers=1).transform, flows.NSF(4, n_layers=1, context_features=3).transform,
                           flows.Exp(), flows.Log(), flows.Sylvester(4)]}


def one_by_one(transforms, x, context):
    total = 0.0
    for transform in transforms:
        x, logdet = transform(x, context if takes_context(transform) else None)
        total = total + logdet
    return x, total


@pytest.mark.parametrize("name", MIXED)
def test_those_parts_that_take_a_context_get_it(name):
    transform = mixed(*MIXED[name]())
    x, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    check_bijection(transform, x, context)
    torch.testing.assert_close(transform(x, context), one_by_one(transform.transforms, x, context))
    assert (transform(x, context + 1.0)[1] != transform(x, context)[1]).all()
    flow = flows.Flow(transform, flows.StandardNormal(4).double())
    samples, log_prob = flow.sample_and_log_prob(2, context)
    torch.testing.assert_close(log_prob[1], flow.log_prob(samples[1], context))
    flow.initialize(x, context)
    with pytest.raises(ValueError, match="^context: expected shape"):
        flow.log_prob(x)
    want = torch.autograd.grad(flow.log_prob(x, context).sum(), list(flow.parameters()))
    for mode in ("save_z", "invert"):
        with memory.saving(memory.Mode(mode, flow)):
            value = flow.log_prob(x, context)
        got = torch.autograd.grad(value.sum(), list(flow.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_a_context_that_nothing_takes_is_refused():
    flow = flows.Flow(flows.Compose(real_nvp(), flows.Exp(), real_nvp()), flows.StandardNormal(4))
    context = torch.ones(3, 3)
    for call in (lambda: flow.log_prob(torch.zeros(3, 4), context), lambda: flow.sample(2, context),
                 lambda: flow.initialize(torch.zeros(3, 4), context)):
        with pytest.raises(ValueError, match="^context: expected None"):
            call()
    with pytest.raises(ValueError, match="^context: expected None"):
        flows.Flow(flows.Split((4,), real_nvp(None, 2)), flows.StandardNormal(4)).log_prob(torch.zeros(3, 4), context)


def test_a_function_that_does_not_tell_its_inputs_may_be_a_conditioner():
    transform, x = flows.Compose(AffineCoupling(torch.tanh, scale="additive"), real_nvp()), torch.randn(3, 4)
    torch.testing.assert_close(transform(x), one_by_one(transform.transforms, x, None))


def test_mixed_flows_compile_to_one_graph():
    transform = mixed(AffineCoupling(nn.Linear(2, 4)), *real_nvp(3).transforms, *MIXED["splits"]())
    x, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    compiled = torch.compile(transform, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, context), transform(x, context))


def test_sharded_modules_of_the_users_take_what_their_forward_takes():
    """FSDP2 makes of each class one of torch's."""
    sharded = type("FSDPTwoInputs", (TwoInputs,), {"__module__": "torch.distributed.fsdp._fully_shard"})
    assert takes_context(AffineCoupling(sharded()))
    network = type("FSDPOneInput", (OneInput,), {"__module__": "torch.distributed.fsdp._fully_shard"})
    assert not takes_context(AffineCoupling(network()))
