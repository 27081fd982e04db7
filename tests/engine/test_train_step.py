import math

import numpy as np
import pytest
import torch
from stand_in_models import Affine, Gauge
from torch.nn.parallel import DistributedDataParallel

from fastflow.engine import NonFiniteError, RunError, TrainStep
from fastflow.flows import Flow, Glow, RealNVP, dequantize
from fastflow.vae import VAE, mlp_decoder, mlp_encoder


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_step_is_the_step_one_would_write_by_hand():
    model, twin = Affine(), Affine()
    step, optimizer = TrainStep(model, sgd(model)), sgd(twin)
    for _ in range(3):
        x = torch.randn(5, 1, 2, 2)
        loss = step(x)
        optimizer.zero_grad()
        expected = -twin.log_prob(x).mean()
        expected.backward()
        optimizer.step()
        assert loss.ndim == 0 and not loss.requires_grad and torch.equal(loss, expected.detach())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_context_reaches_the_flow():
    model = Affine()
    x, context = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    expected = -model.log_prob(x, context).mean()
    assert torch.equal(TrainStep(model, sgd(model))(x, context), expected.detach())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("n_bins", [17, 256])
def test_integer_images_are_dequantised_and_every_constant_counted(dtype, n_bins):
    model = Affine()
    x = torch.randint(n_bins, (5, 1, 2, 2), dtype=dtype)
    torch.manual_seed(3)
    expected = -model.log_prob(dequantize(x, n_bins)).mean() + 4 * math.log(n_bins)
    torch.manual_seed(3)
    assert torch.allclose(TrainStep(model, sgd(model), n_bins=n_bins)(x), expected, rtol=1e-6)


def test_a_uniform_density_costs_eight_bits():
    class Uniform(Affine):
        def forward(self, x, context=None):
            assert (x >= -0.5).all() and (x < 0.5).all()
            return 0 * self.shift.sum() + x.new_zeros(len(x))

    loss = TrainStep(model := Uniform((3, 4, 4)), sgd(model))(torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8))
    assert abs(loss.item() / (48 * math.log(2)) - 8) < 1e-6


def test_a_vae_minimises_the_negative_elbo():
    model = Gauge()
    x = torch.rand(6, 1, 2, 2)
    expected = -model.elbo(x, n_samples=3, beta=0.25).elbo.mean()
    step = TrainStep(model, sgd(model), n_samples=3, beta=0.25)
    assert torch.equal(step(x), expected.detach())
    bound = Gauge().elbo(x, n_samples=3)
    assert torch.equal(step.parts["rate"], bound.rate.mean().detach()) and not step.parts["rate"].requires_grad
    assert torch.equal(step.parts["distortion"], bound.distortion.mean().detach())
    with pytest.raises(ValueError, match="context: a Gauge takes none"):
        step(x, context=x)


@pytest.mark.parametrize("n_bins", [2, 256])
def test_a_bernoulli_likelihood_gets_integers_as_numbers_from_0_to_1(n_bins):
    model = VAE(mlp_encoder((1, 2, 2), 3, (8,)), mlp_decoder(3, (1, 2, 2), (8,)))
    x = torch.randint(n_bins, (5, 1, 2, 2))
    torch.manual_seed(1)
    expected = -model.elbo(x.float() / (n_bins - 1)).elbo.mean()
    torch.manual_seed(1)
    torch.testing.assert_close(TrainStep(model, sgd(model), n_bins=n_bins)(x), expected.detach())


def test_a_model_in_double_precision_stays_there():
    model = Affine().double()
    loss = TrainStep(model, sgd(model))(torch.randint(256, (5, 1, 2, 2), dtype=torch.uint8))
    assert loss.dtype == torch.float64


def test_gradients_are_clipped_by_their_total_norm():
    model = Affine()
    x = torch.randn(5, 1, 2, 2) * 10
    (-model.log_prob(x).mean()).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    step = TrainStep(model, sgd(model, lr=1.0), clip_grad_norm=0.5)
    step(x)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert norm > 5 and torch.allclose(step.parts["grad_norm"], norm) and abs(moved.norm().item() - 0.5) < 1e-4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_changes_nothing(poison):
    model = Affine()
    optimizer = torch.optim.Adam(model.parameters())
    step = TrainStep(model, optimizer)
    x = torch.randn(5, 1, 2, 2)
    step(x)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    x[2, 0, 1, 1] = poison
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf); the step was not taken") as caught:
        step(x)
    assert isinstance(caught.value, RunError)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(step(torch.randn(5, 1, 2, 2)))


def test_a_non_finite_gradient_behind_a_finite_loss_changes_nothing():
    class Kink(Affine):
        def forward(self, x, context=None):
            return (self.shift * 0).abs().sqrt().sum() + super().forward(x)

    model = Kink()
    with pytest.raises(NonFiniteError, match="the gradients' norm is nan"):
        TrainStep(model, sgd(model))(torch.randn(5, 1, 2, 2))
    assert all((p == 0).all() for p in model.parameters())


def test_wrapped_models_run_through_their_wrapper():
    model = Affine()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    compiled = torch.compile(model, backend="eager")
    assert "of Affine" in TrainStep(compiled, sgd(model)).explain()
    TrainStep(compiled, sgd(model))(torch.randn(5, 1, 2, 2))
    assert calls


def test_compiled_it_computes_the_same():
    x = torch.randn(5, 1, 2, 2)
    plain, compiled = Affine(), Affine()
    first, second = TrainStep(plain, sgd(plain)), TrainStep(compiled, sgd(compiled), compile=True)
    second._loss = torch.compile(second.objective, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert torch.allclose(first(x), second(x))
    assert all(torch.allclose(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))


def test_distributed_data_parallel_is_unwrapped_only_to_be_recognised(process_group):
    model = Affine()
    step = TrainStep(DistributedDataParallel(model), sgd(model))
    x = torch.randn(5, 1, 2, 2)
    expected = -model.log_prob(x).mean().detach()
    assert torch.equal(step(x), expected) and "of Affine" in step.explain()


def test_explain_states_every_choice():
    text = TrainStep(model := Gauge(), sgd(model), clip_grad_norm=2.0, n_bins=17).explain()
    for words in ("negative ELBO of Gauge", "17 levels", "SGD, 2 parameters", "memory: none", "compile: off",
                  "norm above 2 ", "refused before the optimizer", "fused: nothing", "accumulation: off",
                  "average: off", "processes: one", "capture: off (the model is on cpu)"):
        assert words in text
    assert "'auto'" not in TrainStep(model, sgd(model), memory="none").explain()  # more in test_memory.py


def test_explain_names_what_is_fused_and_counts_launches():
    model = Glow((3, 8, 8), n_levels=2, n_steps=3, hidden_channels=4)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), accumulate=2, ema_decay=0.5)
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    before, generator = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    text = step.explain(x)
    for words in ("6 couplings, each with its log-determinant, on cpu",
                  "6 convolutional conditioners on PyTorch (the cpu kernel takes channels in multiples of 16, not 4)",
                  "6 invertible 1x1 convolutions of 2 sizes, 6 with", "accumulation: 2 calls make one update",
                  "average: exponential, decay 0.5", "launches of fastflow's",
                  "affine_coupling_bwd       7 launches      7 calls", "slogdet_fwd               2 launches"):
        assert words in text, text
    assert torch.equal(torch.get_rng_state(), generator) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_explain_says_which_layers_run_as_one_kernel():
    model = RealNVP(2, n_layers=3)
    step = TrainStep(model, sgd(model))
    assert "whole flow: 4 of 4 layers in 1 kernel on cpu" in step.explain(torch.zeros(4, 2))
    model.transform.transforms[2].conditioner.register_forward_hook(lambda *_: None)
    assert "hook" in step.explain(torch.zeros(4, 2))


@pytest.mark.parametrize("arguments, message", [
    ({"memory": "all"}, "memory: expected one of 'auto', 'none', 'save_z', 'invert', got 'all'"),
    ({"capture": True}, "capture: "),
    ({"clip_grad_norm": 0}, "clip_grad_norm: expected a positive number or None, got 0"),
    ({"clip_grad_norm": float("nan")}, "clip_grad_norm: "),
    ({"n_bins": 1}, "n_bins: "),
    ({"n_samples": 0}, "n_samples: "),
    ({"beta": -1.0}, "beta: "),
    ({"ema_warmup": 5}, "ema_warmup: expected 0, because it belongs to ema_decay, got 5"),
    ({"ema_warmup": "a"}, "ema_warmup: expected 0, because it belongs to ema_decay, got 'a'"),
    ({"channels_last": "x"}, "channels_last: expected True, False or None, got 'x'"),
])
def test_arguments_that_cannot_be_are_named(arguments, message):
    model = Gauge()
    with pytest.raises(ValueError) as caught:
        TrainStep(model, sgd(model), **arguments)
    assert str(caught.value).startswith(message)


def test_other_models_optimizers_and_batches_are_refused():
    model = Affine()
    with pytest.raises(TypeError, match="model: expected a Flow .* got Linear"):
        TrainStep(torch.nn.Linear(2, 2), sgd(model))
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer, got str"):
        TrainStep(model, "adam")
    with pytest.raises(TypeError, match="beta: expected a number"):
        TrainStep(Gauge(), sgd(Gauge()), beta="x")
    with pytest.raises(TypeError, match="ema_warmup: expected a number, got str"):
        TrainStep(model, sgd(model), ema_decay=0.9, ema_warmup="a")
    with pytest.raises(TypeError, match="drift_bound: expected a number, got str"):
        TrainStep(model, sgd(model), drift_bound="a")
    with pytest.raises(ValueError, match="optimizer: LBFGS evaluates the loss several times"):
        TrainStep(model, torch.optim.LBFGS(model.parameters()))
    step = TrainStep(model, sgd(model))
    for x, kind, message in ((None, TypeError, "x: expected a torch.Tensor, got NoneType"),
                             (torch.zeros(0, 1, 2, 2), ValueError, r"x: expected a batch .* got shape \(0, 1, 2, 2\)"),
                             (torch.zeros(()), ValueError, "x: expected a batch"),
                             (torch.zeros(2, 1, 2, 2, dtype=torch.bool), TypeError, "x: .* got torch.bool")):
        with pytest.raises(kind, match=message):
            step(x)


class Scale(torch.nn.Module):
    """z = x exp(a) of single numbers."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x, context=None):
        return x * self.a.exp(), self.a.expand(len(x))

    def inverse(self, z, context=None):
        return z * (-self.a).exp(), -self.a.expand(len(z))


def test_densities_of_single_numbers_train():
    """x of shape (B,), by the closed form: the loss is -a + (x e^a)^2/2 + log(2 pi)/2, its derivative x^2 e^2a - 1."""
    model, x = Flow(Scale(), torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)), torch.tensor(
        [0.3, -1.2, 2.0], dtype=torch.float64)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), accumulate=np.int64(1), n_bins=np.int32(256))
    z = x * math.exp(0.5)
    torch.testing.assert_close(step(x), (0.5 * z * z).mean() - 0.5 + 0.5 * math.log(2.0 * math.pi), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.transform.a.detach(), 0.5 - 0.1 * ((z * z).mean() - 1.0), rtol=1e-12, atol=0)


def test_a_model_whose_parameters_are_all_frozen_is_named():
    model = RealNVP(4, n_layers=2).requires_grad_(False)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="model: the loss has no gradient; are all parameters frozen"):
        step(torch.randn(8, 4))
    model.requires_grad_()
    with torch.no_grad(), pytest.raises(ValueError, match=r"model: .* is torch.no_grad\(\) in force"):
        step(torch.randn(8, 4))
    assert step(torch.randn(8, 4)).isfinite()


@pytest.mark.parametrize(("levels", "got"), [(40, 40), (-1, -1)])
def test_images_of_other_levels_are_refused(levels, got):
    x = torch.zeros(2, 1, 2, 2, dtype=torch.int64)
    x[1, 0, 1, 1] = levels
    model = Affine()
    with pytest.raises(ValueError, match=f"x: expected integers 0..31, got {got}"):
        TrainStep(model, sgd(model), n_bins=32)(x)


def test_counts_have_no_levels():
    model = VAE(torch.nn.Linear(4, 4), torch.nn.Linear(2, 4), likelihood="poisson")
    with torch.no_grad():
        model.encoder.weight.zero_()
    assert TrainStep(model, sgd(model))(torch.full((3, 4), 312)).isfinite()


def test_an_optimizer_of_another_model_is_refused():
    model, other = RealNVP(4, n_layers=2), RealNVP(4, n_layers=2)
    with pytest.raises(ValueError, match="optimizer: expected one over the parameters of the RealNVP"):
        TrainStep(model, torch.optim.SGD(other.parameters(), 0.1))


def test_a_context_that_a_flow_does_not_take_is_reported_with_its_own_size():
    model = RealNVP(4, n_layers=2)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"context: .*\(8, 3\)"):
        step(torch.randn(8, 4), torch.randn(8, 3))
    step(torch.randn(8, 4))
    assert step.memory.mode == "none"
