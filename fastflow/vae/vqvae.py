"""Autoencoders with quantised latents."""

import contextlib
import functools
import math

import torch

from fastflow import checks
from fastflow.draws import drawn
from fastflow.flows.base import Anchored
from fastflow.vae.elbo import ELBO, check_beta
from fastflow.vae.generation import check_temperature, encoded, for_network, moved, way
from fastflow.vae.likelihoods import Likelihood
from fastflow.vae.objectives import Objective
from fastflow.vae.quantizers import count_codes

__all__ = ["QuantizedVAE"]


class QuantizedVAE(Anchored):
    """x -> z -> codes -> x, the codes of a quantiser (VQ-VAE, FSQ).

    The posterior is certain of its codes, so log q = 0 and the rate is -log p(codes): with the uniform prior
    T log n_codes for T codes, with a learned prior less. log p(x | z) - rate is a bound on log p(x), in nats, whose
    only sample is the encoder's choice.

    Args:
        encoder: module from x (B, *event) to (B, D, *S).
        quantizer: a VectorQuantizer, an FSQ or an object like them.
        decoder: module from (B, D, *S) to the likelihood's parameters.
        likelihood: a likelihood object, see likelihoods/.
        prior: a CodePrior, trained along with the rest, which its gradient does not reach, or None, uniform.
        code_shape: S, needed by :meth:`sample` before the first call.
    """

    event_shape = None  # of one x, in models that come with their networks

    def __init__(self, encoder, quantizer, decoder, likelihood, prior=None, *, code_shape=None):
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood: expected a Likelihood, got {type(likelihood).__name__}")
        self.likelihood = likelihood
        if prior is not None and prior.n_codes != quantizer.n_codes:
            raise ValueError(f"prior: expected {quantizer.n_codes} codes like the quantizer's, got {prior.n_codes}")
        self.prior = prior
        self.code_shape = None if code_shape is None else checks.extent("code_shape", code_shape)
        self._shape_given = code_shape is not None  # else it is that of the first call, which binds no other

    def forward(self, x, n_samples=1, beta=1.0):
        """The training objective, an Objective: the bound (its rate times beta) less the quantiser's loss. There is one
        sample, whatever n_samples says."""
        bound, loss, codes = self._bound(x, n_samples, beta)
        shares = count_codes(codes, self.quantizer.n_codes, bound.elbo.dtype) / max(codes.numel(), 1)
        perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum())
        return Objective(bound.elbo - loss, bound, {"quantizer_loss": loss.detach().mean(), "perplexity": perplexity})

    def elbo(self, x, n_samples=1, beta=1.0, *, generator=None):
        """ELBO in nats; with n_samples = K the one sample is repeated. There is no noise for a generator to draw."""
        return self._bound(x, n_samples, beta)[0]

    def codes(self, x):
        """(B, *S) int64."""
        with self._looked_at():
            return self.quantizer(self._features(x)).codes

    def code_log_probs(self, codes):
        """(B, T) nats: log p(c_t | c_<t) of each of T codes (B, *S), row by row; their sum is minus the rate."""
        if self.prior is not None:
            return self.prior.log_probs(codes)
        rows = codes.flatten(1) if codes.dim() > 1 else codes[:, None]
        return torch.full_like(rows, -math.log(self.quantizer.n_codes), dtype=torch.float64)

    def decode(self, codes):
        """The decoder's output for codes (B, *S)."""
        return self.decoder(self.quantizer.lookup(codes).to(next(self.decoder.parameters()).dtype))

    def reconstruct(self, x):
        """The likelihood's mean (B, *event) at the codes of each x."""
        with self._looked_at():
            return self.likelihood.mean(self._decoded(self.quantizer(self._features(x)).z))

    @torch.no_grad()
    def sample(self, n, *, generator=None, temperature=1.0, mean=False):
        """(n, *event): codes from the prior at ``temperature``, then x from the likelihood, or its mean."""
        check_temperature(temperature)
        checks.rng(generator)
        checks.count("n", n)
        if self.code_shape is None:
            raise ValueError("code_shape: the shape of the codes is not known yet; pass QuantizedVAE(code_shape=...)")
        if self.prior is not None:
            codes = self.prior.sample(n, self.code_shape, generator=generator, temperature=temperature)
        else:
            codes = drawn(functools.partial(torch.randint, self.quantizer.n_codes), (n, *self.code_shape),
                          next(self.parameters()), generator, torch.int64)
        output = self.decode(codes)
        return self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator=generator)

    @torch.no_grad()
    def traverse(self, codes, dims=None, values=None):
        """The likelihood's mean as single codes change while the others stay.

        Args:
            codes: (*S) int64, the point to leave from; other S than those of the first call, if the model was given no
                code_shape.
            dims: positions in the flattened codes; None for all.
            values: (V,) codes that each takes in turn; None for all n_codes.

        Returns:
            (len(dims), V, *event).
        """
        if self.code_shape is not None and (self._shape_given or codes.dim() != len(self.code_shape)):
            checks.shape("codes", codes, self.code_shape)
        points = moved(codes, dims, torch.arange(self.quantizer.n_codes) if values is None else torch.as_tensor(values))
        return self.likelihood.mean(self.decode(points.flatten(0, 1))).unflatten(0, points.shape[:2])

    @torch.no_grad()
    def interpolate(self, start, end, steps=8, *, path="lerp"):
        """The likelihood's mean at the codes of points on the way between the encoder's outputs for two batches.
        Arguments and result as for VAE.interpolate."""
        z = way(self._features(start), self._features(end), steps, path)
        with self._looked_at():
            return self.likelihood.mean(self._decoded(self.quantizer(z.flatten(0, 1)).z)).unflatten(0, z.shape[:2])

    @contextlib.contextmanager
    def _looked_at(self):
        """Inside, the quantiser's averages do not follow what it is shown: they are those of training."""
        training = self.quantizer.training
        if training:
            self.quantizer.eval()
        try:
            yield
        finally:
            if training:
                self.quantizer.train()

    def _features(self, x):
        return encoded(x, self.encoder, self.event_shape)

    def _decoded(self, z):
        return self.decoder(for_network(z, self.decoder))

    def _bound(self, x, n_samples, beta):
        checks.count("n_samples", n_samples, 1)
        z, codes, loss = self.quantizer(self._features(x))
        if self.code_shape is None:
            self.code_shape = codes.shape[1:]
        output = self._decoded(z)
        checks.shape("decoder output", output, (x.shape[0], *self.likelihood.output_shape(x.shape[1:])))
        log_px_z = self.likelihood.log_prob(x, output)
        log_pz = self.code_log_probs(codes).sum(1).to(log_px_z.dtype)
        check_beta(beta, log_pz)
        repeated = [t.expand(n_samples, *t.shape) for t in (log_px_z, log_pz, torch.zeros_like(log_pz))]
        return ELBO(*repeated, log_w=repeated[0] + repeated[1], kl=-log_pz, distortion=-log_px_z, rate=-log_pz,
                    elbo=log_px_z + beta * log_pz), loss, codes
