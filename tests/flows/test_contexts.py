"""What of a flow gets a context behind a conditional base."""

import math
from typing import Optional

import pytest
import torch
from torch import nn

from fastflow import flows
from fastflow.flows.contexts import takes_context
from fastflow.nn import MLP, AffineCoupling


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
