"""Whole tabular flows: the public operation."""

from fastflow.autograd import mlp_flow as _mlp_flow

__all__ = ["mlp_flow"]


def mlp_flow(x, steps, *, context=None, inverse=False):
    """A whole tabular flow, affine couplings with fully connected conditioners, as one kernel.

    The steps run one after the other, for ``inverse`` each one's inverse from the last to the first; log-determinants
    add up. A tile of samples stays in fast memory from the first step to the last. Backward is a second kernel: from
    what each step overwrote, with the networks' activations computed again; a CPU keeps those of layers with 64 inputs
    and more, unless ``engine.TrainStep`` saves memory.

    Args:
        x: (B, D) float32 or float64, any strides; one dtype and device for all operands.
        steps: sequence of ChannelAffine(bias, log_scale), both (D,), Permutation(order), (D,) int64 (a GPU moves the
            features between kernels), and MLPCoupling(weights, biases, ...), whose weights are (out, in) matrices from
            D_passive + K inputs to the 2 * D_active params of affine_coupling (D_active for scale "additive"). Tensors
            of any strides.
        context: (B, K), which every network sees after the passive features, or None.
        inverse: noise to data.

    Returns:
        z: (B, D), contiguous, x's dtype.
        logdet: (B,) in nats, x's dtype.

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
        TypeError: not a tensor or not a step, or dtypes that differ or are neither float32 nor float64.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803.
        Mueller et al., "Real-time neural radiance caching for path tracing", 2021, arXiv:2106.12372 (a fully fused
        network: a tile of samples in fast memory through every layer).
    """
    _mlp_flow.check(x, steps, context)
    return _mlp_flow.run_steps(x, steps, context, bool(inverse))
