"""nessai, unchanged: nested sampling on nflows' layers finds the same evidence and posterior accelerated."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import fastflow

SIDE, RHO = 20.0, 0.8  # of the uniform prior's square; correlation of the likelihood, a normalised Gaussian


def sample(kind, accelerated, output):
    """(log-evidence, its error, posterior samples (N, 2), [layers verified of each flow]) of a run of nessai."""
    import numpy as np
    from nessai import flows
    from nessai.flowsampler import FlowSampler
    from nessai.model import Model

    class Gaussian(Model):
        names, bounds = ["x", "y"], {"x": [-SIDE / 2, SIDE / 2], "y": [-SIDE / 2, SIDE / 2]}  # noqa: RUF012

        def log_prior(self, x):
            return np.log(self.in_bounds(x), dtype=float) - 2 * math.log(SIDE)

        def log_likelihood(self, x):
            rest = 1 - RHO**2
            return -0.5 * (x["x"] ** 2 + (x["y"] - RHO * x["x"]) ** 2 / rest) - math.log(2 * math.pi * rest**0.5)

    reports = []

    def flow(*args, **kwargs):
        made = getattr(flows, kind)(*args, **kwargs)
        if accelerated:
            reports.append(fastflow.accelerate(made))
        return made

    sampler = FlowSampler(Gaussian(), output=output, nlive=500, seed=1, resume=False, plot=False,
                          flow_config={"flow": flow, "n_blocks": 4, "n_neurons": 16}, pytorch_threads=1)
    sampler.run(plot=False, save=False)
    posterior = sampler.posterior_samples
    return (float(sampler.log_evidence), float(sampler.log_evidence_error),
            np.stack([posterior["x"], posterior["y"]], 1).tolist(), [len(report.verified) for report in reports])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RealNVP", "NeuralSplineFlow"])
def test_nested_sampling(kind, tmp_path):
    pytest.importorskip("nessai")
    results = []
    for accelerated in ("", "accelerated"):
        # A process of its own: glasflow takes any package "flows" on the path for nflows'.
        run = subprocess.run([sys.executable, __file__, kind, accelerated], cwd=tmp_path, capture_output=True,
                             text=True, timeout=280, check=False, env={**os.environ, "GLASFLOW_USE_NFLOWS": "1"})
        assert run.returncode == 0, run.stderr[-2000:]
        results.append(json.loads(run.stdout.splitlines()[-1]))
    (evidence, error, posterior, _), (fast_evidence, fast_error, fast_posterior, verified) = results
    posterior, fast_posterior = torch.tensor(posterior), torch.tensor(fast_posterior)
    assert verified and all(verified)
    # Errors as nessai states them, and those of means of independent samples of unit variance: 4 sigma.
    assert abs(fast_evidence - evidence) < 4 * math.hypot(error, fast_error)
    for value, sigma in ((evidence, error), (fast_evidence, fast_error)):
        assert abs(value + 2 * math.log(SIDE)) < 4 * sigma
    sigma = math.sqrt(1 / len(posterior) + 1 / len(fast_posterior))
    assert (fast_posterior.mean(0) - posterior.mean(0)).abs().max() < 4 * sigma
    assert (fast_posterior.mean(0)).abs().max() < 4 / math.sqrt(len(fast_posterior))
    assert abs(torch.corrcoef(fast_posterior.mT)[0, 1] - RHO) < 4 * (1 - RHO**2) / math.sqrt(len(fast_posterior))


if __name__ == "__main__":
    print(json.dumps(sample(sys.argv[1], bool(sys.argv[2]), "out")))
