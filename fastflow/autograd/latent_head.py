"""Between a VAE's encoder and decoder with torch's own noise: what the adapters of VAEs call."""

import _thread
import functools
import sys
import threading

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastflow import backends, extension, reference
from fastflow.autograd import differentiable
from fastflow.autograd.gaussian import sample_kl

LEAST = 16  # of fewer numbers torch makes its normals in another way
_OWN_MEMORY = (torch.Tensor, torch.nn.Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def sample_mean_kl(mean, logvar):
    """(z, the mean over the batch of KL(q || N(0, I)) in nats) of mean and logvar (B, ...), with the noise that
    torch.randn_like(logvar) would have drawn, to 2e-6, and the default generator left as by it.

    On a CPU one kernel runs the generator, too, where it is this thread's alone; torch's own draw takes most of the
    time of a large head. Elsewhere torch draws.
    """
    if _fits(mean, logvar):
        return _apply(mean, logvar)
    z, kl = sample_kl(mean, logvar, torch.randn_like(logvar))
    return z, kl.mean(0)


def _fits(mean, logvar):
    # Its looks show in a small head's time, so there is one of each kind.
    return (type(mean) in _OWN_MEMORY and type(logvar) in _OWN_MEMORY and not torch.compiler.is_compiling()
            and mean.is_cpu and logvar.is_cpu and mean.dtype is torch.float32 and logvar.dtype is torch.float32
            and mean.numel() >= LEAST and mean.shape == logvar.shape
            and mean.is_contiguous() and logvar.is_contiguous()
            and backends.requested() in (None, "cpu")
            and backends.transformed() is None
            # make_fx would keep today's state of the generator in its graph.
            and torch._C._get_dispatch_mode(_PROXY) is None and draws_as_torch() and _is_alone())


@functools.cache
def draws_as_torch():
    """Whether there is a kernel, and its noise and the state that it leaves are those of this torch."""
    if not backends.status()["cpu"].startswith("available"):
        return False
    generator = torch.Generator("cpu")
    generator.manual_seed(0)
    options = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    with _disable_current_modes():
        for count in (1000, 33):  # whole blocks of sixteen and not
            zeros, state = torch.zeros(1, count, **options), generator.get_state()
            eps = _kernels()[0](zeros, zeros, state)[2]
            expected = torch.randn(1, count, generator=generator, **options)
            if not torch.equal(state, generator.get_state()) or not torch.allclose(eps, expected, rtol=0, atol=4e-6):
                return False
    return True


@functools.cache
def _kernels():
    """What computes forward and backward, past the looks of extension.kernel, which _fits has had."""
    return tuple(extension.load("cpu")[name]._op for name in ("latent_head_fwd", "latent_head_bwd"))


class _Here(threading.local):
    def __init__(self):
        self.is_main = threading.get_ident() == threading.main_thread().ident


_here = _Here()


def _is_alone():
    """Whether this is the main thread, and no other thread of Python can draw between a look at the generator's state
    and setting it. tqdm's monitor, which redraws bars, doesn't. Threads that Python did not start aren't counted."""
    return _here.is_main and (_thread._count() == 0 or _others_do_not_draw())


def _others_do_not_draw():
    harmless = getattr(sys.modules.get("tqdm"), "TMonitor", ())
    own = threading.get_ident()
    return all(thread.ident == own or isinstance(thread, harmless) for thread in threading.enumerate())


@differentiable.direct
class LatentHead(torch.autograd.Function):
    """(z, mean KL) of contiguous float32 mean and logvar. Saves both and the noise."""

    @staticmethod
    def forward(ctx, mean, logvar):
        ctx.set_materialize_grads(False)
        generator = torch.default_generator
        state = generator.get_state()
        z, kl, eps = _kernels()[0](mean, logvar, state)
        generator.set_state(state)
        ctx.save_for_backward(mean, logvar, eps)
        return z, kl

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        mean, logvar, eps = ctx.saved_tensors
        if (torch.is_grad_enabled() or grad_z is None or grad_kl is None
                or differentiable.batched(grad_z) or differentiable.batched(grad_kl)):
            def both(mean, logvar):
                z, kl = reference.gaussian_sample_kl((mean, logvar), eps=eps)
                return z, kl.mean(0)
            return tuple(differentiable.reference_grads(both, (mean, logvar), ctx.needs_input_grad,
                                                        (grad_z, grad_kl)))
        return _kernels()[1](grad_z, grad_kl, mean, logvar, eps)


# Without Function.apply's own look for what _fits has ruled out.
_apply = super(torch.autograd.Function, LatentHead).apply
