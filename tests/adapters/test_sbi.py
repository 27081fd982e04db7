"""sbi, unchanged: neural posterior estimation on nflows and zuko estimators reaches the same posterior accelerated."""

import pytest
import torch

import fastflow

NOISE = 0.5
OBSERVED = torch.tensor([[0.7, -0.4]])


def posterior_of(model, accelerated):
    """(log-density on a grid, samples, layers swapped) of p(theta | x) for theta ~ N(0, I), x ~ N(theta, NOISE^2 I)."""
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn

    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((2000,))
    x = theta + NOISE * torch.randn_like(theta)
    build, reports = posterior_nn(model=model, hidden_features=32, num_transforms=3), []

    def estimator(theta, x):
        net = build(theta, x)
        if accelerated:
            reports.append(fastflow.accelerate(net))
        return net

    inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
    inference.append_simulations(theta, x).train(training_batch_size=200, max_num_epochs=40, learning_rate=5e-3)
    posterior = inference.build_posterior()
    axis = torch.linspace(-1.0, 1.0, 9)
    log_prob = posterior.log_prob(torch.cartesian_prod(axis, axis), x=OBSERVED, norm_posterior=False)
    torch.manual_seed(1)
    samples = posterior.sample((4000,), x=OBSERVED, show_progress_bars=False)
    return log_prob.detach(), samples, reports


@pytest.mark.slow
@pytest.mark.parametrize("model", ["maf", "nsf", "zuko_maf", "zuko_nsf"])
def test_neural_posterior_estimation(model, tmp_path, monkeypatch):
    pytest.importorskip("sbi")
    monkeypatch.chdir(tmp_path)  # it writes logs
    log_prob, samples, _ = posterior_of(model, False)
    fast_log_prob, fast_samples, (report,) = posterior_of(model, True)
    assert report.swapped and report.verified
    # Rounding grows over the 360 steps of Adam; by quadrature, the KL divergence between both stays small.
    divergence = (log_prob.softmax(0) * (log_prob.log_softmax(0) - fast_log_prob.log_softmax(0))).sum()
    assert divergence < 0.03
    torch.testing.assert_close(fast_samples.mean(0), samples.mean(0), rtol=0.0, atol=0.02)
    exact = torch.distributions.Normal(OBSERVED[0] / (1.0 + NOISE**2), NOISE / (1.0 + NOISE**2) ** 0.5)
    torch.testing.assert_close(fast_samples.mean(0), exact.mean, rtol=0.0, atol=0.1)
    torch.testing.assert_close(fast_samples.std(0), exact.stddev, rtol=0.0, atol=0.1)
