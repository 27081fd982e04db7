"""What a trained VAE makes: samples, reconstructions, traversals, interpolations."""

import inspect
import math

import torch
from torch import nn
from torch.distributions import Distribution

from fastflow import checks, reference
from fastflow.draws import drawn
from fastflow.flows import Flow
from fastflow.flows.base import as_base, seeded
from fastflow.nn import FusedSequential
from fastflow.nn.hooks import is_hooked
from fastflow.nn.precision import taken
from fastflow.vae.posteriors.closed import misplaced

__all__ = ["Generation", "lerp", "slerp"]


def lerp(start, end, weights):
    """Straight lines (T, B, *S) from ``start`` to ``end`` (B, *S) at weights (T,)."""
    weights = weights.to(start.dtype).view(-1, *[1] * start.dim())
    return start + weights * (end - start)


def slerp(start, end, weights):
    """Arcs (T, B, *S) from ``start`` to ``end`` (B, *S) at weights (T,), along which the length goes linearly and the
    direction turns evenly: (sin((1-t) a) u + sin(t a) v) / sin a for unit vectors u, v at angle a. Vectors that point
    the same way, or of length 0, are joined by a straight line.

    References:
        Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    flat = [t.flatten(1) for t in (start, end)]
    lengths = [torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in flat]
    tiny = torch.finfo(start.dtype).tiny
    u, v = (t / length.clamp_min(tiny) for t, length in zip(flat, lengths, strict=True))
    # atan2 of the chords keeps the digits that acos loses for small angles.
    angle = 2.0 * torch.atan2(torch.linalg.vector_norm(u - v, dim=1, keepdim=True),
                              torch.linalg.vector_norm(u + v, dim=1, keepdim=True))
    weights = weights.to(start.dtype).view(-1, 1, 1)
    sine = torch.sin(angle)
    straight = (sine < 1e-6) | (lengths[0] == 0) | (lengths[1] == 0)
    safe = torch.where(straight, 1.0, sine)
    direction = (torch.sin((1.0 - weights) * angle) * u + torch.sin(weights * angle) * v) / safe
    arc = (lengths[0] + weights * (lengths[1] - lengths[0])) * direction
    line = flat[0] + weights * (flat[1] - flat[0])
    return torch.where(straight, line, arc).unflatten(2, start.shape[1:])


PATHS = {"lerp": lerp, "slerp": slerp}


def way(start, end, steps, path):
    """(steps, B, *S) from ``start`` to ``end`` (B, *S), both included, along a path named in PATHS."""
    checks.choice("path", path, tuple(PATHS))
    if end.shape != start.shape:
        raise ValueError(f"end: expected a batch like start, with latents of shape {tuple(start.shape)}, got "
                         f"{tuple(end.shape)}")
    steps = checks.count("steps", steps, 2)
    return PATHS[path](start, end, torch.linspace(0.0, 1.0, steps, device=start.device, dtype=start.dtype))


def moved(z, dims, values):
    """(len(dims), V, *S): z (*S) with each of the flattened elements ``dims``, None for all, at each of values (V,)."""
    dims = range(z.numel()) if dims is None else dims
    for dim in dims:
        if not 0 <= dim < z.numel():
            raise ValueError(f"dims: expected indices from 0 to {z.numel() - 1}, got {dim}")
    points = z.flatten().expand(len(dims), len(values), -1).clone()
    for row, dim in enumerate(dims):
        points[row, :, dim] = values.to(points)
    return points.unflatten(2, z.shape)


class Generation:
    """The part of :class:`VAE` that generates. Contexts (labels or others) go where the model is a conditional one."""

    _shape_given = False  # whether latent_shape is binding; else it is that of the first call

    @torch.no_grad()
    def sample(self, n, context=None, *, generator=None, temperature=1.0, mean=False):
        """Draws of x: z from the prior, then x from the likelihood.

        Args:
            n: number of draws, for each context if one is given.
            context: (B, ...) or None.
            generator: torch.Generator, None for torch's own.
            temperature: factor on the prior's standard deviation.
            mean: return the likelihood's mean instead of a draw, as pictures usually do.

        Returns:
            (n, *event), with a context (n, B, *event).
        """
        check_temperature(temperature)
        checks.count("n", n)
        lead = (n,)
        if context is not None:
            context, lead = repeated(context, lead), (n, len(context))
        z = self.sample_latents(math.prod(lead), context, generator=generator, temperature=temperature)
        output = self.decode(z, context)
        x = self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator=generator)
        return x.unflatten(0, lead)

    def sample_latents(self, n, context=None, *, generator=None, temperature=1.0):
        """z (n, D, *S) from the prior, given n contexts if it is conditional.

        Raises:
            ValueError: the prior is not over the shape of z, or is the law of every element of a z whose shape is not
                known yet.
        """
        checks.rng(generator)
        if self.prior is not None:
            z = self._sample_prior(n, context, generator=generator, temperature=temperature)
            if self.latent_shape is not None and z.shape[1:] != self.latent_shape:
                raise misplaced(z.shape[1:], self.latent_shape)
            return z
        like = first_parameter(self.decoder)
        like = torch.zeros(()) if like is None else like
        dtype = torch.promote_types(like.dtype, torch.float32)
        return temperature * drawn(torch.randn, (n, *self._latent_shape()), like, generator, dtype)

    def _sample_prior(self, n, context, *, generator, temperature):
        prior, options = self.prior, {"generator": generator, "temperature": temperature}
        if isinstance(prior, Distribution):
            one = not prior.batch_shape + prior.event_shape
            prior = as_base(prior.expand(self._latent_shape()) if one else prior, first_parameter(self.decoder))
        if not self.conditional_prior:
            return _drawn_from(prior, n, generator, temperature)
        if isinstance(prior, Flow):  # which gives as many for each context as it is asked for
            return prior.sample(1, context, **options)[0]
        return prior.sample(n, context=context, **options)

    def encode(self, x, context=None):
        """The posterior's mean (B, D, *S) for each x."""
        mean = self.posterior.mean(self._encoded(x, context))
        if self.latent_shape is None and not torch.compiler.is_compiling():
            self.latent_shape = mean.shape[1:]
        return mean

    def reconstruct(self, x, context=None):
        """The likelihood's mean (B, *event) at the posterior's mean for each x."""
        return self.likelihood.mean(self.decode(self.encode(x, context), context))

    @torch.no_grad()
    def traverse(self, z, dims=None, values=None, context=None):
        """The likelihood's mean as single latents move while the others stay.

        Args:
            z: (D, *S), the point to leave from; a convolutional decoder takes other S than those of the first call, if
                the model was given no latent_shape.
            dims: indices into the flattened latent; None for all.
            values: (V,) that each takes in turn; None for 7 from -3 to 3.
            context: (1, ...) for a conditional model.

        Returns:
            (len(dims), V, *event).
        """
        checks.tensor("z", z)
        if self.latent_shape is not None:
            others = not self._shape_given and z.dim() == len(self.latent_shape)
            checks.shape("z", z, (self.latent_shape[0], *z.shape[1:]) if others else self.latent_shape)
        points = moved(z, dims, torch.linspace(-3.0, 3.0, 7) if values is None else torch.as_tensor(values))
        if context is not None:
            checks.tensor("context", context, floating=False)
            context = context.expand(points.shape[0] * points.shape[1], *context.shape[1:])
        return self.likelihood.mean(self.decode(points.flatten(0, 1), context)).unflatten(0, points.shape[:2])

    @torch.no_grad()
    def interpolate(self, start, end, steps=8, *, path="lerp", context=None):
        """The likelihood's mean on the way between the posteriors' means of two batches.

        Args:
            start, end: (B, *event).
            steps: points on each way, both ends included, at least 2.
            path: "lerp", straight lines; "slerp", arcs, which stay at the radius where a Gaussian prior has its mass.

        Returns:
            (steps, B, *event).
        """
        z = way(self.encode(start, context), self.encode(end, context), steps, path)
        if context is not None:
            context = repeated(context, (steps,))
        return self.likelihood.mean(self.decode(z.flatten(0, 1), context)).unflatten(0, z.shape[:2])

    def _latent_shape(self):
        if self.latent_shape is not None:
            return self.latent_shape
        modules = self.decoder.modules() if isinstance(self.decoder, nn.Module) else ()
        first = next((m for m in modules if not list(m.children())), None)
        if isinstance(first, nn.Linear):
            return (first.in_features,)
        raise ValueError("latent_shape: the shape of z is not known yet; pass VAE(latent_shape=...)")


def _drawn_from(prior, n, generator, temperature):
    """prior.sample(n), of one of another library too, whose sample takes neither generator nor temperature, and which
    may give (z, log p(z))."""
    options = {"generator": generator, "temperature": temperature}
    known = None if torch.compiler.is_compiling() else _keywords(prior.sample)  # no graph looks at signatures
    if known is None or known.issuperset(options):
        return prior.sample(n, **options)
    if "temperature" not in known and temperature != 1.0:
        raise ValueError(f"temperature: expected 1 for the prior {type(prior).__name__}, whose sample takes none, got "
                         f"{temperature}")
    with seeded(None if "generator" in known else generator):
        z = prior.sample(n, **{name: value for name, value in options.items() if name in known})
    return z[0] if isinstance(z, tuple) else z


def _keywords(function):
    """The names of the keywords that a function takes, None for any or if it doesn't tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def first_parameter(network):
    """A parameter of the network, which says the dtype and the device that it works in; None for a plain callable or
    one without."""
    return next(network.parameters(), None) if isinstance(network, nn.Module) else None


def encoded(x, network, event_shape, called="encoder"):
    """network(x), of an x that was checked."""
    check_input(x, network, event_shape, called)
    return network(x)


def check_input(x, network, event_shape=None, called="encoder"):
    """x is a tensor, (B, *event_shape) if that is known, of a dtype that the network takes, as far as one can know:
    float64 where it works in less is none, and any but that of its parameters is none where the first layer that
    changes x is a plain linear one or a convolution, for those cast nothing. So it is with the device, where all the
    network's layers are of known kinds, which move nothing.

    Raises:
        TypeError, ValueError: it is not.
    """
    checks.tensor("x", x, floating=False)
    if event_shape is not None:
        checks.events("x", x, event_shape)
    like = first_parameter(network)
    if like is None:
        return
    if x.device != like.device and not torch.compiler.is_compiling() and _moves_nothing(network):
        checks.same_device("x", x, f"the {called}'s parameters", like)
    if x.dtype is like.dtype:
        return
    if x.dtype is torch.float64 or not torch.compiler.is_compiling() and _begins_plainly(network) \
            and not autocasts(x.device):
        raise TypeError(f"x: expected {like.dtype} like the {called}'s parameters, got {x.dtype}")


def _begins_plainly(network):
    """Whether all that a network does to its input before a linear layer or a convolution is to reshape it."""
    plain, reshaping = (nn.Sequential.forward, FusedSequential.forward), (nn.Flatten, nn.Unflatten, nn.Identity)
    while getattr(type(network), "forward", None) in plain and not is_hooked(network):
        network = next((m for m in network if type(m) not in reshaping or is_hooked(m)), None)
    return type(network) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and not is_hooked(network)


def _moves_nothing(network):
    """Whether a network has layers of torch and of this library alone, and no hooks: nothing that would take x to the
    device of its parameters, nor those to x's."""
    return all(type(m).__module__.startswith(("torch.nn.modules.", "fastflow.")) and not is_hooked(m)
               for m in network.modules())


def autocasts(device):
    """Whether autocast is on for a device."""
    return reference.autocasts(device.type)


def for_network(z, network):
    """z, float32 or float64, as the network takes it."""
    like = first_parameter(network)
    return z if like is None or z.dtype is like.dtype or autocasts(z.device) else taken(z, like)


def with_context(network, z, context, called):
    """network(z, context).

    Raises:
        TypeError: the network takes z alone.
    """
    try:
        return network(z, context)
    except TypeError as error:
        if _takes_two(network):
            raise
        raise TypeError(f"context: expected None, because the {called} takes one argument, got "
                        f"{type(context).__name__}") from error


def _takes_two(network):
    """Whether a network can be called with two arguments, as far as one can know."""
    try:
        signature = inspect.signature(network.forward if isinstance(network, nn.Module) else network)
    except (TypeError, ValueError):  # it has none
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def repeated(context, lead):
    """The contexts (B, ...) of K samples for each, (K*B, ...); ``lead`` is (K,)."""
    checks.tensor("context", context, floating=False)
    if context.dim() == 0:
        raise ValueError("context: expected shape (B, ...), got ()")
    return context.expand(*lead, *context.shape).flatten(0, 1)


def check_temperature(temperature):
    if not isinstance(temperature, torch.Tensor):
        checks.number("temperature", temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
