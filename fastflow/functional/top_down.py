"""The top-down pass of a hierarchy of latents: the public operation."""

from fastflow import checks, reference
from fastflow.autograd import top_down as _top_down

__all__ = ["top_down"]


def top_down(h, features, levels, *, eps=None, seed=None, offset=0, generator=None):
    """Every level of a hierarchical VAE with fully connected networks, from the top down, as one kernel.

    Level after level makes prior p(z | h) = N(mean_p, sigma_p^2) and posterior q(z | h, d) = N(mean, sigma^2), samples
    z = mean + sigma*eps, and merges it into the next level's h. On a CPU a tile of samples goes through all levels in
    one call, and backward through all of them in another; elsewhere the levels run in eager PyTorch.

    Args:
        h: (B, H) float32 or float64, the state above the first level, any strides; one dtype and device for all.
        features: (B, F) of the data, one for each level.
        levels: sequence of LatentLevel(prior, posterior, merge, mode, scale), whose networks are
            MLPBlock(weights, biases, activation, residual).
        eps: noise (B, D), one for each level; carries no gradient. Excludes seed.
        seed: int of 64 bits, signed or not, or a 0-d int64 tensor. The levels take the counters of its stream
            one after the other, each as gaussian_sample_kl does.
        offset: first counter, a non-negative int below 2^63.
        generator: torch.Generator that a seed is drawn from when neither eps nor seed is given; None: torch's own.

    Returns:
        h: (B, H') below the last level.
        latents: list of z (B, D), one for each level.
        kl, log_q, log_p: (L, B) in nats: KL(q || p) in closed form, and both log-densities of z, each given the levels
        above.

    Raises:
        ValueError: a shape, device or option does not fit, or both eps and seed are given; the message names the
            argument.
        TypeError: not a tensor, LatentLevel or MLPBlock, or dtypes that differ or are neither float32 nor float64.

    References:
        Sonderby et al., "Ladder variational autoencoders", 2016, arXiv:1602.02282.
        Vahdat and Kautz, "NVAE", 2020, arXiv:2007.03898, section 3.2.
    """
    _top_down.check(h, features, levels, eps)
    checks.noise(eps, seed, generator, "h", h)
    offset = checks.count("offset", offset)
    if eps is None and seed is None:
        seed = reference.draw_seed(h.device, generator)
    return _top_down.run_levels(h, features, levels, eps, seed, offset)
