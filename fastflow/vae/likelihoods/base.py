"""What the likelihoods share."""

import torch
from torch import nn

from fastflow import checks

__all__ = ["Likelihood", "operands", "promoted", "sum_event"]


def sum_event(values, event_dims):
    """Sum over the last ``event_dims`` dimensions."""
    return values.flatten(-event_dims).sum(-1) if event_dims else values


def promoted(tensor, name=None):
    """The tensor in float32 at least; one that came from outside has a ``name``, under which it is checked."""
    if name is not None:
        checks.tensor(name, tensor)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def operands(x, output, integers):
    """(x, output) in one dtype, float32 or float64; ``integers`` in x, exact in every dtype, may have any."""
    checks.tensor("x", x, floating=False)
    checks.tensor("output", output)
    checks.same_device("output", output, "x", x)
    output = promoted(output)
    if x.is_floating_point() and not integers:
        checks.no_mixed_double([("output", output), ("x", x)])
    return x.to(output.dtype), output


class Likelihood(nn.Module):
    """p(x | z) whose elements are independent given the decoder's output.

    A family gives ``log_density(x, *params)``, ``mean_of(*params)`` and ``draw(generator, *params)``, all element by
    element. The decoder's output for x (B, C, *S) is (*, B, P*C, *S): P parameters for each element, packed along x's
    dim 1, parameter by parameter; x (B,) counts as (B, 1).

    Attributes:
        params_per_element: P.
        takes_integers: whether x holds integers (in any dtype), rather than real numbers.
    """

    params_per_element = 1
    takes_integers = False

    def output_shape(self, event_shape):
        """The shape of the decoder's output for one x of ``event_shape``."""
        channels, *spatial = tuple(event_shape) or (1,)
        return (self.params_per_element * channels, *spatial)

    def log_prob(self, x, output):
        """log p(x | z), in nats.

        Args:
            x: (B, *event).
            output: (*, B, *output_shape(event)).

        Returns:
            (*, B), float64 for a float64 output, else float32.

        Raises:
            ValueError: the output's shape or device does not fit x.
            TypeError: one is no tensor, the output is not floating, or x holds real numbers and one of the two is
                float64, the other in less.
        """
        x, output = operands(x, output, self.takes_integers)
        x = x[:, None] if x.dim() == 1 else x
        expected = (x.shape[0], *self.output_shape(x.shape[1:]))
        if output.shape[-x.dim():] != expected:
            raise ValueError(f"output: expected shape (*, {', '.join(map(str, expected))}), got {tuple(output.shape)}")
        return self.total(x, *self._params(output, 1 - x.dim()))

    def total(self, x, *params):
        """The sum of log_density over the event, (*, B); families that can sum before they scale do so here."""
        return sum_event(self.log_density(x, *params), x.dim() - 1)

    def mean(self, output):
        """E[x | z] (N, *event) of output (N, *output_shape)."""
        return self.mean_of(*self._params(promoted(output, "output"), 1))

    def sample(self, output, *, generator=None):
        """A draw of x (N, *event) for each output (N, *output_shape)."""
        checks.rng(generator)
        return self.draw(generator, *self._params(promoted(output, "output"), 1))

    def _params(self, output, dim):
        if self.params_per_element == 1:
            return (output,)
        checks.tensor("output", output)
        if output.shape[dim] % self.params_per_element:
            raise ValueError(f"output: expected a multiple of {self.params_per_element} channels, got "
                             f"{output.shape[dim]}")
        return output.chunk(self.params_per_element, dim)
