"""torch.func, forward-mode AD, vmapped gradients and tensor subclasses: the reference serves them, and rightly."""

import pytest
import torch
from cases import CPU_CASES, Case
from torch.autograd import forward_ad

from fastflow import backends, functional, reference

# Small calls of every op on one sample or matrix: (name, function of one operand given a module, that operand).
X, PARAMS, W = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64), torch.eye(
    3, dtype=torch.float64) + 0.3 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def coupling(w):
    """A step of mlp_flow on three features."""
    return reference.MLPCoupling((w[:, :1], torch.cat([w, w[:1]])), (w[0], w[1, [0, 1, 2, 0]]), activation="tanh",
                                 scale="tanh")


def level(w):
    """A level of top_down with one latent, three features of data and a state of three."""
    block = reference.MLPBlock
    return reference.LatentLevel(block((w[:2],), (w[0, :2],)), block((torch.cat([w, w], 1)[:2],), (w[1, :2],)),
                                 block((w[:, [0, 1, 2, 0]],), (w[2],)), scale="logstd")


CALLS = {
    "affine y by x": (lambda m, x: m.affine_coupling(x, PARAMS, scale="tanh")[0], X),
    "affine logdet by params": (lambda m, p: m.affine_coupling(X, p, scale="sigmoid")[1], PARAMS),
    "affine inverse by params": (lambda m, p: m.affine_coupling(X, p, scale="softplus", inverse=True)[0], PARAMS),
    "additive by params": (lambda m, p: m.affine_coupling(X, p, scale="additive")[0].sin(), X),
    "slogdet": (lambda m, w: m.slogdet(w)[1], W),
    "inverse": (lambda m, w: m.slogdet_inverse(w)[2], W),
    "plu": (lambda m, w: m.plu_weight(w[None], w[None] * 2, w[:1], torch.ones(1, 3, dtype=torch.float64),
                                      torch.tensor([[2, 0, 1]])), W),
    "gaussian z": (lambda m, p: m.gaussian_sample_kl(p, eps=X)[0], PARAMS),
    "gaussian kl": (lambda m, p: m.gaussian_sample_kl(p, eps=X, scale="soft_tanh")[1], PARAMS),
    "gaussian logq": (lambda m, p: m.gaussian_sample_kl(p, seed=3, scale="logstd", return_logq=True)[2], PARAMS),
    "spline y by params": (lambda m, p: m.spline(X, p, kind="linear")[0], PARAMS),
    "spline logdet by params": (lambda m, p: m.spline(X[:, :1], p[:, :5])[1], PARAMS),
    "spline inverse by x": (lambda m, x: m.spline(x[:, :1], PARAMS[:, :5], inverse=True)[0], X),
    "bernoulli": (lambda m, x: m.bernoulli_log_prob(torch.sigmoid(X), x), X),
    "mlp": (lambda m, w: m.mlp(X, [w, w * 2], [w[0], w[1]], activation="tanh"), W),
    "wide mlp": (lambda m, w: m.wide_mlp(X, [w, w * 2], [w[0], w[1]], activation="relu"), W),
    "flow z by x": (lambda m, x: m.mlp_flow(x, [coupling(W)])[0], X),
    "flow logdet by weights": (lambda m, w: m.mlp_flow(X, [coupling(w)])[1], W),
    "top down h by weights": (lambda m, w: m.top_down(X, [X], [level(w)], seed=5)[0], W),
    "top down kl by h": (lambda m, x: m.top_down(x, [X], [level(W)], seed=5)[2], X),
}
every_call = pytest.mark.parametrize("name", CALLS)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@every_call
def test_func_grad_jacrev_jacfwd_and_hessian(name):
    function, operand = CALLS[name]

    def ours(t):
        return function(functional, t)

    def theirs(t):
        return function(reference, t)

    def scalar(f):
        return lambda t: f(t).square().sum()

    wanted = torch.autograd.functional.jacobian(theirs, operand)
    close(torch.func.grad(scalar(ours))(operand), torch.autograd.functional.jacobian(scalar(theirs), operand))
    close(torch.func.jacrev(ours)(operand), wanted)
    close(torch.func.jacfwd(ours)(operand), wanted)
    close(torch.func.hessian(scalar(ours))(operand), torch.autograd.functional.hessian(scalar(theirs), operand))


@every_call
def test_transforms_of_the_backward_of_a_graph_made_outside(name):
    """It is linear in the incoming gradient, and that of a kernel's graph must be to every transform what eager
    PyTorch's is."""
    function, operand = CALLS[name]
    found = []
    for module in (functional, reference):
        leaf = operand.clone().requires_grad_()
        out = function(module, leaf)
        torch.manual_seed(1)
        v, w = torch.randn(2, *out.shape, dtype=out.dtype)

        def pulled(v, out=out, leaf=leaf, **options):
            return torch.autograd.grad(out, leaf, v, retain_graph=True, **options)[0]

        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(pulled(forward_ad.make_dual(v, w))).tangent
        found.append((pulled(w), torch.func.jvp(pulled, (v,), (w,))[1], tangent, torch.func.jacfwd(pulled)(v),
                      torch.func.vmap(pulled)(torch.stack([v, w])),
                      torch.func.grad(lambda v, pulled=pulled: pulled(v, create_graph=True).square().sum())(v)))
    noise = 1e-5 if "top down" in name else 1e-10  # the kernel's normals are the reference's to 2e-6
    torch.testing.assert_close(*found, rtol=noise, atol=0.1 * noise)
    close(found[0][1:3], (found[0][0],) * 2)


@pytest.mark.parametrize("channels", [(3, 0), (0, 2), (0, 0)])
def test_vmapped_gradients_without_active_or_passive_channels(channels):
    active, kept = channels
    x, params, passive = (torch.randn(2, c, dtype=torch.float64, requires_grad=True)
                          for c in (active, 2 * active, kept))
    y, logdet = functional.affine_coupling(x, params, passive=passive)
    leaves, several = [x, params, passive], torch.randn(4, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad((y, logdet), leaves, (several, several.new_ones(4, 2)), is_grads_batched=True,
                                retain_graph=True)
    for i, one in enumerate(several):
        wanted = torch.autograd.grad((y, logdet), leaves, (one, one.new_ones(2)), retain_graph=True)
        close([t[i] for t in found], list(wanted))


@every_call
def test_func_vmap_vjp_and_jvp(name):
    function, operand = CALLS[name]
    many = torch.stack([operand, operand * 0.5, operand + 0.1])
    close(torch.func.vmap(lambda t: function(functional, t))(many), torch.stack([function(reference, t) for t in many]))
    grad = torch.func.vmap(torch.func.grad(lambda t: function(functional, t).square().sum()))(many)
    close(grad, torch.stack([torch.autograd.functional.jacobian(lambda t: function(reference, t).square().sum(), t)
                             for t in many]))
    tangent = torch.randn_like(operand)
    value, jvp = torch.func.jvp(lambda t: function(functional, t), (operand,), (tangent,))
    expected = torch.autograd.functional.jvp(lambda t: function(reference, t), operand, tangent)
    close(value, expected[0])
    close(jvp, expected[1])


@every_call
def test_forward_mode_with_dual_numbers(name):
    function, operand = CALLS[name]
    tangent = torch.randn_like(operand)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(functional, forward_ad.make_dual(operand, tangent)))
    expected = torch.autograd.functional.jvp(lambda t: function(reference, t), operand, tangent)[1]
    close(dual.tangent, expected)


@every_call
def test_batched_gradients(name, backend, device):
    """is_grads_batched and jacobian(vectorize=True): the incoming gradient is a batch that no raw pointer can read."""
    if device != "cpu":
        return pytest.skip("the operands of these calls live on the CPU")
    function, operand = CALLS[name]
    leaf = operand.clone().requires_grad_()
    out = function(functional, leaf)
    batch = torch.randn(4, *out.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(out, leaf, batch, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in batch])
    close(got, want)
    jacobians = [torch.autograd.functional.jacobian(lambda t: function(functional, t), operand, vectorize=v)
                 for v in (False, True)]
    close(jacobians[1], jacobians[0])


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_vmap_over_backward(case):
    """torch.func.vmap of torch.autograd.grad, as Jacobians are taken of a pass made once."""
    leaves = {n: t.requires_grad_(n in case.differentiable) for n, t in case.tensors(torch.float64).items()}
    outputs = [t for t in case.call(leaves) if t.requires_grad]
    wanted = [leaves[n] for n in case.differentiable]
    batch = [torch.randn(3, *t.shape, dtype=torch.float64) for t in outputs]

    def gradients(*grads):
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    for got, want in zip(torch.func.vmap(gradients)(*batch), zip(*map(gradients, *batch), strict=True), strict=True):
        close(got, torch.stack(want))


def test_vmap_over_samples_of_noise():
    """randomness="different" draws anew for each entry, a given seed gives each the same."""
    params = torch.randn(4, 2, 6, dtype=torch.float64)
    drawn = torch.func.vmap(lambda p: functional.gaussian_sample_kl(p, seed=7)[0])(params)
    for z, p in zip(drawn, params, strict=True):
        close(z, reference.gaussian_sample_kl(p, seed=7)[0])


def test_functional_call_and_ensembles():
    """A module's parameters mapped over with vmap, as torch.func ensembles do."""
    class Coupling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 6, dtype=torch.float64)

        def forward(self, x):
            return functional.affine_coupling(x, self.net(x), scale="tanh")

    models = [Coupling() for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(models)
    y, logdet = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (X,)))(stacked, buffers)
    for i, model in enumerate(models):
        close(y[i], model(X)[0])
        close(logdet[i], model(X)[1])


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, which unwraps at the dispatcher: its data pointer is nothing to read."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                   device=inner.device, requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Wrapped({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = func(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, out)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_wrapper_subclasses_go_to_the_reference(case):
    tensors = case.tensors()
    assert backends.explain(case.op, *map(Wrapped, tensors.values())).split()[0] == "reference"
    for one in tensors:  # one operand wrapped, then all
        for names in ((one,), tuple(tensors)):
            mixed = {n: Wrapped(t) if n in names else t for n, t in tensors.items()}
            for got, want in zip(case.call(mixed), case.call(tensors, reference), strict=True):
                close(got.inner if isinstance(got, Wrapped) else got, want)


class Tagged(torch.Tensor):
    """A subclass with ordinary memory and no rules of its own."""


def test_plain_subclasses_and_parameters_are_right():
    case = Case("x", "affine_coupling", {"x": (3, 4), "params": (3, 8)})
    tensors = case.tensors()
    want = case.call(tensors, reference)
    for convert in (lambda t: t.as_subclass(Tagged), torch.nn.Parameter, torch.nn.Buffer):
        for got, expected in zip(case.call({n: convert(t) for n, t in tensors.items()}), want, strict=True):
            close(got.as_subclass(torch.Tensor), expected)


def test_conjugate_and_negative_views_are_read_as_what_they_show():
    """A view with the lazy negative bit (the imaginary part of a conjugate) holds the opposite of what it shows."""
    case = Case("x", "affine_coupling", {"x": (3, 4), "params": (3, 8)})
    tensors = case.tensors()
    lazy = {n: torch.complex(torch.zeros_like(t), -t).conj().imag for n, t in tensors.items()}
    assert all(t.is_neg() and torch.equal(t, tensors[n]) for n, t in lazy.items())
    for got, want in zip(case.call(lazy), case.call(tensors, reference), strict=True):
        close(got, want)
    weight = torch.complex(torch.zeros_like(W), -W).conj().imag
    close(functional.slogdet(weight)[1], reference.slogdet(W)[1])
    noise = torch.complex(torch.zeros_like(X), -X).conj().imag
    close(functional.gaussian_sample_kl(PARAMS, eps=noise)[0], reference.gaussian_sample_kl(PARAMS, eps=X)[0])
    leaf = tensors["x"].clone().requires_grad_()
    y, logdet = functional.affine_coupling(leaf, tensors["params"])
    (grad,) = torch.autograd.grad(y, leaf, lazy["x"])
    y, logdet = reference.affine_coupling(leaf, tensors["params"])
    close(grad, torch.autograd.grad(y, leaf, tensors["x"])[0])


def test_zero_tensors_of_autograd_are_read_as_zeros():
    """_efficientzerotensor has no storage: a kernel that takes its pointer reads nowhere."""
    x, p = torch.randn(2, 3), torch.randn(2, 6)
    zero = torch._efficientzerotensor((2, 3))
    y, _ = functional.affine_coupling(zero, p)
    close(y, reference.affine_coupling(torch.zeros(2, 3), p)[0])
    leaf = x.clone().requires_grad_()
    y, _ = functional.affine_coupling(leaf, p)
    (grad,) = torch.autograd.grad(y, leaf, zero)
    close(grad, torch.zeros(2, 3))


@pytest.mark.parametrize("op", ["affine", "spline"])
def test_vmap_over_channels_last_operands(op):
    """vmap knows no memory format but the contiguous one."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    params = torch.randn(3, 2, 6 if op == "affine" else 33, 4, 4, dtype=torch.float64)
    call = ((lambda p: functional.affine_coupling(x, p)) if op == "affine" else
            (lambda p: functional.spline(x, p)))
    for got, want in zip(torch.func.vmap(call)(params), zip(*map(call, params), strict=True), strict=True):
        close(got, torch.stack(want))
