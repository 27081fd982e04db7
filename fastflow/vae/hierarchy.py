"""Hierarchical VAEs: latents in levels, each with a prior that the levels above it make."""

from typing import NamedTuple

import torch
from torch import nn

from fastflow import checks, reference
from fastflow.autograd.top_down import run_levels
from fastflow.draws import drawn
from fastflow.vae import top_down
from fastflow.vae.elbo import ELBO, check_beta
from fastflow.vae.generation import check_temperature, encoded, moved, way
from fastflow.vae.level import log_priors
from fastflow.vae.likelihoods import Likelihood
from fastflow.vae.posteriors.gaussian import log_normal

__all__ = ["HierarchicalVAE", "HierarchyTerms"]


class HierarchyTerms(NamedTuple):
    """The terms of L levels, from the top down, for B examples and K samples, in nats.

    Attributes:
        latents: L tensors (K, B, D, *S).
        log_px_z: (K, B).
        log_pz, log_qz: (L, K, B), each given the levels above.
        kl: (L, K, B), analytic given the samples of the levels above.
        kl_by_element: L tensors like the latents, which sum to kl, or None where they were not asked for.
    """

    latents: list
    log_px_z: torch.Tensor
    log_pz: torch.Tensor
    log_qz: torch.Tensor
    kl: torch.Tensor
    kl_by_element: list | None = None


class HierarchicalVAE(nn.Module):
    """p(x) with latents in levels: h_0 is learned; level after level makes z and the next h; the last h is decoded.
    Calling the module is :meth:`elbo`, or the objective if one is given.

    Args:
        bottom_up: module from x (B, *event) to a list of features, one for each level from the top down.
        levels: Levels from the top down.
        decoder: module from the last h to the likelihood's parameters.
        likelihood: a likelihood object, see likelihoods/.
        top_shape: of h_0, (H, *S).
        objective: what training maximises instead of the ELBO, see objectives.py, or None: one with FreeBits of each
            level or KLBalance, for example.
    """

    event_shape = None  # of one x, in models that come with their networks

    def __init__(self, bottom_up, levels, decoder, likelihood, top_shape, *, objective=None):
        super().__init__()
        self.bottom_up = bottom_up
        self.levels = nn.ModuleList(levels)
        if not len(self.levels):
            raise ValueError("levels: expected at least one")
        self.decoder = decoder
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood: expected a Likelihood, got {type(likelihood).__name__}")
        if objective is not None and not callable(objective):
            raise TypeError(f"objective: expected None or a callable, got {type(objective).__name__}")
        self.likelihood = likelihood
        self.objective = objective
        self.top = nn.Parameter(torch.zeros(1, *checks.extent("top_shape", top_shape)))

    def forward(self, x, n_samples=1, beta=1.0, *, bound_only=False, **noise):
        """The ELBO, also with ``bound_only``; with an objective what that returns, as of VAE.forward."""
        if self.objective is None or bound_only:
            return self.elbo(x, n_samples, beta, **noise)
        return self.objective(self, x, n_samples, beta, **noise)

    def elbo(self, x, n_samples=1, beta=1.0, *, eps=None, seed=None, generator=None):
        """ELBO, summed over the levels; its KL is analytic given the levels above, whose samples it is averaged over.

        Arguments as for :meth:`infer`, beta as for VAE.elbo.
        """
        return self.elbo_of(x, self.infer(x, n_samples, eps=eps, seed=seed, generator=generator), beta)

    def elbo_of(self, x, terms, beta=1.0):
        """:meth:`elbo` at samples that :meth:`infer` has drawn."""
        log_pz, log_qz, kl = terms.log_pz.sum(0), terms.log_qz.sum(0), terms.kl.sum(0).mean(0)
        check_beta(beta, kl)
        distortion = -terms.log_px_z.mean(0)
        log_w = terms.log_px_z + log_pz - log_qz
        return ELBO(log_px_z=terms.log_px_z, log_pz=log_pz, log_qz=log_qz, log_w=log_w, kl=kl, distortion=distortion,
                    rate=kl, elbo=-distortion - beta * kl)

    def infer(self, x, n_samples=1, *, by_element=False, eps=None, seed=None, generator=None):
        """HierarchyTerms, for objectives that weigh the levels.

        Args:
            x: (B, *event).
            n_samples: K.
            by_element: give the KL of each latent too, for which no kernel takes several levels at once.
            eps: one tensor of noise (K, B, D, *S) for each level, or None.
            seed: int of 64 bits or 0-d int64 tensor; the levels take the counters of its stream one after the other.
            generator: torch.Generator that a seed is drawn from otherwise, None for torch's own.
        """
        checks.count("n_samples", n_samples, 1)
        h, terms = self._descend(x, n_samples, eps, seed, generator, by_element)
        return terms._replace(log_px_z=self._log_likelihood(x, h, n_samples))

    def log_joint(self, x, latents):
        """(log p(x | z) (K, B), log p(z) (L, K, B), each level's given those above), nats, of x (B, *event) and any
        latents, L tensors (K, B, D, *S)."""
        h, found = self._top(latents[0].shape[0] * x.shape[0]), []
        for level, z in zip(self.levels, self._rows(latents), strict=True):
            mean, _, log_sigma = level._prior(h)
            found.append(log_normal(z, mean, log_sigma).flatten(1).sum(1))
            h = level.down(h, z)
        k = latents[0].shape[0]
        return self._log_likelihood(x, h, k), torch.stack(found).unflatten(1, (k, -1))

    def log_posterior(self, x, latents):
        """log q(z | x) (L, K, B), each level's given those above, nats, of x (B, *event) and any latents, L tensors
        (K, B, D, *S)."""
        k, found = latents[0].shape[0], []
        h = self._top(k * x.shape[0])
        for level, d, z in zip(self.levels, self._features(x, k), self._rows(latents), strict=True):
            found.append(log_normal(z, *level.gaussians(h, d).moments()).flatten(1).sum(1))
            h = level.down(h, z)
        return torch.stack(found).unflatten(1, (k, -1))

    def _descend(self, x, n_samples, eps=None, seed=None, generator=None, by_element=False):
        """(the last h (K*B, H, *S), HierarchyTerms without log p(x | z)) of :meth:`infer`."""
        checks.noise(eps, seed, generator, "x", x)
        features = self._features(x, n_samples)
        if eps is not None and len(eps) != len(self.levels):
            raise ValueError(f"eps: expected {len(self.levels)} tensors, got {len(eps)}")
        if eps is None and seed is None:
            seed = reference.draw_seed(x.device, generator)
        h = self._top(n_samples * x.shape[0])  # len() would fix it in a graph
        if eps is not None:
            eps = [e.flatten(0, 1) for e in eps]
        runs = [(0, len(self.levels), None)] if by_element else top_down.runs(self.levels, h, features)
        latents, tables, offset, elements = [], [], 0, None
        for start, end, steps in runs:
            chosen = None if eps is None else eps[start:end]
            if steps is not None:
                h, found, table = _together(steps, h, features[start:end], chosen, seed, offset)
            else:
                h, found, table, elements = self._each(self.levels[start:end], h, features[start:end], chosen, seed,
                                                       offset, by_element)
            offset += sum(-(-z.numel() // 4) for z in found)  # four normals come of one counter
            latents += found
            tables.append(table)
        tables = tables[0] if len(tables) == 1 else map(torch.cat, zip(*tables, strict=True))
        lead = (n_samples, x.shape[0])
        latents, elements = ([t.unflatten(0, lead) for t in found] if found is not None else None
                             for found in (latents, elements))
        return h, HierarchyTerms(latents, None, *(t.unflatten(1, lead) for t in tables), elements)

    def _log_likelihood(self, x, h, n_samples):
        """log p(x | z) (K, B) of the last h (K*B, H, *S)."""
        output = self.decoder(h)
        checks.shape("decoder output", output, (n_samples * x.shape[0], *self.likelihood.output_shape(x.shape[1:])))
        return self.likelihood.log_prob(x, output.unflatten(0, (n_samples, x.shape[0])))

    @torch.no_grad()
    def latent_kl(self, x, *, seed=None, generator=None):
        """KL(q(z_d | x, z above) || p(z_d | z above)) of every latent at one sample of those above: a list of
        (B, D, *S) nats, one for each level from the top down. It sums to what :meth:`infer` calls kl."""
        _, terms = self._descend(x, 1, seed=seed, generator=generator, by_element=True)
        return [kl[0].clamp_min(0.0) for kl in terms.kl_by_element]

    def explain(self, x):
        """One line: which levels a call with x runs as one kernel, and why not the others."""
        with torch.no_grad():
            features = self._features(x)
        return top_down.explain(self.levels, self._top(len(x)), features)

    @staticmethod
    def _each(levels, h, features, eps, seed, offset, by_element):
        """(next h, latents, log p, log q and KL (L, B), KL by element or None) level by level."""
        found, reduce = [], {"reduce": "none"} if by_element else {}
        for index, (level, d) in enumerate(zip(levels, features, strict=True)):
            noise = {"seed": seed, "offset": offset} if eps is None else {"eps": eps[index]}
            z, kl, log_q, params, h = level.infer(h, d, **noise, **reduce)
            offset += -(-z.numel() // 4)
            found.append((z, params, log_q, kl))
        latents, params, log_q, kl = zip(*found, strict=True)
        sums = [one.flatten(1).sum(1) for one in kl] if by_element else kl
        tables = tuple(torch.stack(t) for t in (log_priors(latents, params), log_q, sums))
        return h, list(latents), tables, list(kl) if by_element else None

    @torch.no_grad()
    def sample(self, n, *, generator=None, temperature=1.0, mean=False):
        """(n, *event), level after level from the priors, then x from the likelihood.

        Args:
            generator: torch.Generator, None for torch's own.
            temperature: factor on the priors' standard deviations: a number, or one for each level from the top down.
            mean: return the likelihood's mean instead of a draw.
        """
        checks.count("n", n)
        checks.rng(generator)
        temperatures = self._temperatures(temperature)
        h = self._top(n)
        for level, t in zip(self.levels, temperatures, strict=True):
            _, h = level.generate(h, _noise(generator), t)
        output = self.decoder(h)
        return self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator=generator)

    @torch.no_grad()
    def reconstruct(self, x, n_levels=None, *, temperature=0.0, generator=None):
        """The likelihood's mean (B, *event) with the uppermost ``n_levels`` at their posteriors' means, all by default,
        and those below from their priors at ``temperature``: what each level adds."""
        n_levels = len(self.levels) if n_levels is None else n_levels
        if not 0 <= n_levels <= len(self.levels):
            raise ValueError(f"n_levels: expected 0 to {len(self.levels)}, got {n_levels!r}")
        temperatures = self._temperatures(temperature)
        checks.rng(generator)
        h = self._top(len(x))
        for index, (level, d) in enumerate(zip(self.levels, self._features(x), strict=True)):
            if index < n_levels:
                *_, h = level.infer(h, d, eps=_zeros(level, h))
            else:
                _, h = level.generate(h, _noise(generator), temperatures[index])
        return self.likelihood.mean(self.decoder(h))

    def encode(self, x):
        """The latents (B, D, *S) of each level from the top down, each at its posterior's mean given those above."""
        h, latents = self._top(x.shape[0]), []
        for level, d in zip(self.levels, self._features(x), strict=True):
            z, _, _, _, h = level.infer(h, d, eps=_zeros(level, h))
            latents.append(z)
        return latents

    def decode(self, latents):
        """The decoder's output for the latents (B, D, *S) of each level from the top down."""
        if len(latents) != len(self.levels):
            raise ValueError(f"latents: expected {len(self.levels)} tensors, got {len(latents)}")
        h = self._top(latents[0].shape[0])
        for level, z in zip(self.levels, latents, strict=True):
            h = level.down(h, z)
        return self.decoder(h)

    @torch.no_grad()
    def traverse(self, latents, dims=None, values=None, *, level=0):
        """The likelihood's mean as single latents of one level move while all others stay, those below too.

        Args:
            latents: (D, *S) of each level from the top down, as one row of :meth:`encode`.
            dims: indices into the level's flattened latent; None for all.
            values: (V,) that each takes in turn; None for 7 from -3 to 3.
            level: which moves, 0 at the top.

        Returns:
            (len(dims), V, *event).
        """
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level: expected 0 to {len(self.levels) - 1}, got {level!r}")
        values = torch.linspace(-3.0, 3.0, 7) if values is None else torch.as_tensor(values)
        points = moved(latents[level], dims, values)
        lead = points.shape[:2]
        rows = [z.expand(lead[0] * lead[1], *z.shape) for z in latents]
        rows[level] = points.flatten(0, 1)
        return self.likelihood.mean(self.decode(rows)).unflatten(0, lead)

    @torch.no_grad()
    def interpolate(self, start, end, steps=8, *, path="lerp"):
        """The likelihood's mean on the way between the latents of two batches, all levels at once. Arguments and result
        as for VAE.interpolate."""
        latents = [way(a, b, steps, path) for a, b in zip(self.encode(start), self.encode(end), strict=True)]
        return self.likelihood.mean(self.decode([z.flatten(0, 1) for z in latents])).unflatten(0, (steps, len(start)))

    def _top(self, n):
        """h_0 of n rows."""
        return self.top.expand(n, *self.top.shape[1:])

    def _rows(self, latents):
        """The latents (K, B, ...) as rows (K*B, ...)."""
        if len(latents) != len(self.levels):
            raise ValueError(f"latents: expected {len(self.levels)} tensors, got {len(latents)}")
        return [z.flatten(0, 1) for z in latents]

    def _features(self, x, n_samples=1):
        """What each level sees of x, (K*B, F, *S)."""
        features = encoded(x, self.bottom_up, self.event_shape, "bottom_up")
        if not isinstance(features, (list, tuple)) or len(features) != len(self.levels):
            raise ValueError(f"bottom_up: expected a list of {len(self.levels)} features, one for each level")
        if n_samples == 1:
            return features
        return [d.expand(n_samples, *d.shape).flatten(0, 1) for d in features]

    def _temperatures(self, temperature):
        several = hasattr(temperature, "__iter__") and not isinstance(temperature, str)
        values = list(temperature) if several else [temperature] * len(self.levels)
        if len(values) != len(self.levels):
            raise ValueError(f"temperature: expected a number or {len(self.levels)} of them, got {temperature!r}")
        for value in values:
            check_temperature(value)
        return values


def _together(levels, h, features, eps, seed, offset):
    """As HierarchicalVAE._each, of LatentLevels in one kernel."""
    h, latents, kl, log_q, log_p = run_levels(h, features, levels, eps, None if eps is not None else seed, offset)
    return h, latents, (log_p, log_q, kl)


def _zeros(level, h):
    """Noise that makes the posterior's mean of its sample."""
    return torch.zeros_like(level._prior(h)[0])


def _noise(generator):
    def draw(like):
        return drawn(torch.randn, like.shape, like, generator)
    return draw
