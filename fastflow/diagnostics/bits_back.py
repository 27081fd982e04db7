"""Lossless compression with a VAE: bits-back coding on the asymmetric numeral systems of ``constriction``.

Needs the extra ``compression``. Decoding z with the posterior takes -log q(z|x) off the stack, x and z then cost
-log p(x|z) and -log p(z). A message so costs -ELBO / log 2 bits per example where the bits that z is decoded from are
uniform. The first ones are; the later ones are what earlier examples left, which is uniform to the extent that the
aggregate posterior is the prior. Far from it the length is some percent off, longer as a rule.

References:
    Townsend, Bird and Barber, "Practical lossless compression with latent variables using bits back coding", 2019,
    arXiv:1901.04866.
"""

from typing import NamedTuple

import numpy as np
import torch

from fastflow import checks
from fastflow.diagnostics.latents import check_moments, params_of
from fastflow.diagnostics.mode import in_eval
from fastflow.vae.integers import embeds
from fastflow.vae.likelihoods import BernoulliLikelihood, CategoricalLikelihood, DiscretizedLogisticLikelihood
from fastflow.vae.posteriors.closed import is_diagonal, is_standard, prior_moments

__all__ = ["BitsBack", "Message"]

SYMBOL_BITS = 24  # the most that constriction spends on one symbol


class Message(NamedTuple):
    """What BitsBack.encode returns.

    Attributes:
        words: uint32 array, the stack.
        n: number of examples.
        initial_bits: what the stack held before; decoding gives these bits back.
        bits: what the stack holds now.
    """

    words: np.ndarray
    n: int
    initial_bits: int
    bits: int

    @property
    def net_bits(self):
        """bits - initial_bits: what the examples cost, about -ELBO / log 2 each, see above."""
        return self.bits - self.initial_bits


class BitsBack:
    """Encodes and decodes data sets with a trained VAE.

    z lives on the grid of step 2^-precision between -bound and bound; the grid's step should be well below the
    posteriors' standard deviations. Decoder and encoder must give bit for bit the same numbers on both sides: the
    same weights, machine, library version, number of threads and ``batch_size``.

    Args:
        model: a VAE with a GaussianPosterior, a prior of independent Gaussians, and a likelihood of bits or
            integers: Bernoulli, Categorical or DiscretizedLogistic.
        precision: minus the base-2 logarithm of the grid's step, 0 to 12.
        bound: largest |z|, at least one step of the grid and at most 64.
        batch_size: examples that go through the networks at a time.

    Raises:
        ImportError: constriction is not installed.
        TypeError: the model's posterior, prior or likelihood is another one, or z is moved after it was drawn.
    """

    def __init__(self, model, *, precision=8, bound=8.0, batch_size=16):
        self._ans, self._models = _constriction()
        check_moments(model)
        kinds = (BernoulliLikelihood, CategoricalLikelihood, DiscretizedLogisticLikelihood)
        if not isinstance(model.likelihood, kinds):
            raise TypeError(f"model: expected a Bernoulli, Categorical or DiscretizedLogistic likelihood, got "
                            f"{type(model.likelihood).__name__}")
        if not is_diagonal(model.prior):
            raise TypeError(f"model: expected a prior of independent Gaussians, got {type(model.prior).__name__}")
        if isinstance(precision, bool) or not isinstance(precision, int) or not 0 <= precision <= 12:
            raise ValueError(f"precision: expected an int from 0 to 12, got {precision!r}")
        batch_size = checks.count("batch_size", batch_size, 1)
        self.model, self.step, self.batch_size = model, 2.0**-precision, batch_size
        if not self.step <= bound <= 64.0:
            raise ValueError(f"bound: expected a number from the grid's step {self.step:g} to 64, got {bound!r}")
        limit = round(bound / self.step)
        self._gaussian = self._models.QuantizedGaussian(-limit, limit)

    @torch.no_grad()
    def encode(self, x, seed=0):
        """Message of x (N, *event), bits or integer levels in any dtype.

        Args:
            seed: of the random bits that the first posterior draws are made of.

        Raises:
            ValueError: x holds values that the likelihood gives no probability, or the networks give numbers that are
                not finite.
        """
        checks.tensor("x", x, floating=False)
        if len(x) < 1:
            raise ValueError("x: expected at least one example, got none")
        symbols = self._symbols(x)
        with in_eval(self.model):
            moments = self._moments(x[:self.batch_size])
            n_words = moments[0].size * SYMBOL_BITS // 32 + 4
            words = np.random.default_rng(seed).integers(1, 2**32, n_words, dtype=np.uint32)
            coder = self._ans(words)
            initial = coder.num_valid_bits()
            for i in range(0, len(x), self.batch_size):
                batch = x[i:i + self.batch_size]
                mean, sigma = self._moments(batch)
                if coder.num_valid_bits() < mean.size * SYMBOL_BITS:
                    raise ValueError("x: the stack ran out of bits, because the model gives x more probability than "
                                     "its entropy allows; encode fewer examples at a time")
                z = coder.decode(self._gaussian, mean, sigma)
                coder.encode_reverse(symbols[i:i + self.batch_size].reshape(-1), *self._likelihood(z, batch))
                coder.encode_reverse(z, self._gaussian, *self._prior(mean.size))
        return Message(coder.get_compressed(), len(x), initial, coder.num_valid_bits())

    @torch.no_grad()
    def decode(self, message, like):
        """(x, words): the examples (N, *event) in the dtype of ``like``, and the stack as it was before encode.

        Args:
            message: from encode.
            like: an example batch (1, *event) or larger, for shape, dtype and device.
        """
        coder = self._ans(message.words)
        starts = list(range(0, message.n, self.batch_size))
        parts = []
        with in_eval(self.model):
            for i in reversed(starts):
                count = min(self.batch_size, message.n - i)
                shape = like.new_empty((count, *like.shape[1:]))
                n_latents = count * self._latents(like)
                z = coder.decode(self._gaussian, *self._prior(n_latents))
                symbols = coder.decode(*self._likelihood(z, shape))
                x = torch.from_numpy(symbols.astype(np.int64)).view(shape.shape).to(like)
                coder.encode_reverse(z, self._gaussian, *self._moments(x))
                parts.append(x)
        return torch.cat(parts[::-1]), coder.get_compressed()

    def _moments(self, x):
        """The posterior's mean and sigma, flat, in grid steps."""
        mean, log_sigma = self.model.posterior.moments(params_of(self.model, _taken(x, self.model)))
        self._shape = mean.shape[1:]
        sigma = np.exp(_flat(log_sigma))
        _check_finite("encoder", _flat(mean), sigma)
        return _flat(mean) / self.step, np.maximum(sigma / self.step, 1e-6)

    def _latents(self, like):
        if not hasattr(self, "_shape"):
            self._moments(like[:1])
        return int(np.prod(self._shape))

    def _prior(self, size):
        if is_standard(self.model.prior):
            return np.zeros(size), np.full(size, 1.0 / self.step)
        mean, log_sigma = prior_moments(self.model.prior, torch.zeros(1, *self._shape))
        times = size // mean.numel()
        return np.tile(_flat(mean) / self.step, times), np.tile(np.exp(_flat(log_sigma)) / self.step, times)

    def _symbols(self, x):
        """x (N, *event) as an int32 array."""
        likelihood = self.model.likelihood
        n_levels = (2 if isinstance(likelihood, BernoulliLikelihood) else likelihood.params_per_element
                    if isinstance(likelihood, CategoricalLikelihood) else likelihood.n_bins)
        values = x.detach().cpu().double()
        if not ((values >= 0) & (values < n_levels) & (values == values.floor())).all():  # of which NaN is none
            raise ValueError(f"x: expected integers from 0 to {n_levels - 1}")
        return values.to(torch.int32).numpy()

    def _likelihood(self, z, x):
        """(entropy model, its parameters) of x (B, *event), of which the shape alone counts."""
        parameter = next(self.model.decoder.parameters(), torch.zeros(()))
        latents = torch.from_numpy(z.astype(np.float64) * self.step).to(parameter)
        output = self.model.decode(latents.view(len(x), *self._shape))
        likelihood = self.model.likelihood
        if isinstance(likelihood, BernoulliLikelihood):
            model, table = self._models.Bernoulli(perfect=False), _flat(torch.sigmoid(output.double()))
        else:
            probs = _table(likelihood, output)
            model, table = self._models.Categorical(perfect=False), probs.reshape(-1, probs.shape[-1])
        _check_finite("decoder", table)
        return model, table


def _table(likelihood, output):
    """Probabilities (N, C, *S, levels), float64, of a categorical or discretised logistic likelihood."""
    output = output.double()
    if hasattr(likelihood, "probs"):
        return likelihood.probs(output).cpu().numpy()
    params = output.chunk(likelihood.params_per_element, 1)
    levels = [likelihood.log_density(torch.full_like(params[0], float(v)), *params) for v in range(likelihood.n_bins)]
    return torch.exp(torch.stack(levels, -1)).cpu().numpy()


def _check_finite(network, *arrays):
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"model: expected finite numbers of its {network}, got some that are not")


def _flat(tensor):
    return np.ascontiguousarray(tensor.detach().double().cpu().numpy().reshape(-1))


def _taken(x, model):
    """x (N, *event) of integers in any dtype as the model's encoder takes them."""
    parameter = next(model.parameters(), torch.zeros(()))
    return x.to(torch.int64) if embeds(model.encoder, x, parameter.dtype) else x.to(parameter.dtype)


def _constriction():
    try:
        import constriction
    except ImportError as error:
        raise ImportError("bits-back coding needs constriction: pip install 'fastflow[compression]'") from error
    return constriction.stream.stack.AnsCoder, constriction.stream.model
