"""Learned numbers have shape (1,): they shard, and what was stored in shape () loads."""

import pytest
import torch
from torch import nn

from fastflow import estimators, vae


def test_a_learned_temperature_loads_from_a_state_dict_that_has_it_0d():
    estimator = estimators.REBAR(temperature=0.5)
    estimator.load_state_dict({"log_temperature": torch.tensor(0.7), "eta": torch.tensor(0.3)})
    assert torch.cat([estimator.log_temperature, estimator.eta]).tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("likelihood", [vae.GaussianLikelihood, vae.LaplaceLikelihood])
def test_a_learned_scale_loads_from_a_state_dict_that_has_it_0d(likelihood):
    model = vae.MLPVAE((3,), 2, (4,), likelihood=likelihood())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["likelihood.log_sigma"] = torch.tensor(0.7)
    model.load_state_dict(state)
    assert model.likelihood.log_sigma.tolist() == [pytest.approx(0.7)]
    state["likelihood.log_sigma"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="size mismatch for likelihood.log_sigma"):
        model.load_state_dict(state)


@pytest.mark.parametrize("make", [
    lambda: vae.MLPVAE((3,), 2, (4,), likelihood="gaussian"), lambda: vae.MLPVAE((3,), 2, (4,), likelihood="laplace"),
    lambda: vae.HamiltonianVAE(vae.mlp_encoder((3,), 2, (4,)), vae.mlp_decoder(2, (3,), (4,)), likelihood="gaussian"),
    lambda: vae.DiscreteVAE(nn.Linear(3, 2), nn.Linear(2, 3), 2, estimator="rebar")])
def test_models_with_learned_numbers_can_be_sharded(make, mesh):
    from torch.distributed.fsdp import fully_shard

    model, x = make(), torch.rand(4, 3)
    torch.manual_seed(1)
    want = model.elbo(x).elbo.detach()
    fully_shard(model, mesh=mesh)
    torch.manual_seed(1)
    bound = model(x)
    torch.testing.assert_close(bound.elbo, want)
    bound.elbo.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
