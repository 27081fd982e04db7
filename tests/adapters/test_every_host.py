"""What accelerated models of every library go through alike: copies, state dicts, DDP, activation checkpointing,
torch.compile, Lightning."""

import copy
import functools
import io
import pickle

import pytest
import torch
from adapter_checks import close, scattered
from torch import nn
from torch.utils import checkpoint

import fastflow
from fastflow.adapters import layers as adapter_layers
from fastflow.adapters.swap import swap_of

D = 6
X = torch.randn(16, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _dense(i, o):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


def nflows():
    library = pytest.importorskip("nflows")
    from nflows.flows.realnvp import SimpleRealNVP

    assert library
    return SimpleRealNVP(D, 8, 2, 1), lambda flow, x: -flow.log_prob(x).mean()


def normflows():
    library = pytest.importorskip("normflows")
    layers = [library.flows.AffineCouplingBlock(library.nets.MLP([D // 2, 8, D])),
              library.flows.LULinearPermute(D), library.flows.AutoregressiveRationalQuadraticSpline(D, 1, 8)]
    return library.NormalizingFlow(library.distributions.DiagGaussian(D), layers), lambda flow, x: flow.forward_kld(x)


def freia():
    framework = pytest.importorskip("FrEIA.framework")
    from FrEIA import modules

    net = framework.SequenceINN(D)
    for block in (modules.RNVPCouplingBlock, modules.GLOWCouplingBlock):
        net.append(block, subnet_constructor=_dense, clamp_activation="TANH")  # other clamps can't be pickled

    def loss(net, x):
        z, logdet = net(x)
        return (0.5 * z.square().sum(1) - logdet).mean()
    return net, loss


def zuko():
    library = pytest.importorskip("zuko")
    return library.flows.NSF(D, transforms=2, hidden_features=(8,)), lambda flow, x: -flow().log_prob(x).mean()


def torchflows():
    flows = pytest.importorskip("torchflows.flows")
    from torchflows.bijections.finite.autoregressive import architectures

    flow = flows.Flow(architectures.CouplingRQNSF(D))
    return flow.eval(), lambda flow, x: -flow.log_prob(x).mean()


def pyro():
    dist = pytest.importorskip("pyro.distributions")

    def loss(layers, x):
        base = dist.Normal(torch.zeros(D).to(x), torch.ones(D).to(x)).to_event(1)
        return -dist.TransformedDistribution(base, list(layers)).log_prob(x.clone()).mean()  # it caches by identity
    return nn.ModuleList([dist.transforms.affine_coupling(D, [8]),
                          dist.transforms.Spline(D, 4, order="quadratic")]), loss


def pythae():
    models = pytest.importorskip("pythae.models")
    model = models.IWAE(models.IWAEConfig(input_dim=(1, 2, 3), latent_dim=2, number_samples=3))

    def loss(model, x):
        torch.manual_seed(1)
        return model({"data": x.view(-1, 1, 2, 3).sigmoid()}).loss
    return model, loss


def diffusers():
    library = pytest.importorskip("diffusers")
    model = library.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, sample_size=8)

    def loss(model, x):
        torch.manual_seed(1)
        images = x.reshape(2, 3, 4, 4)
        posterior = model.encode(images).latent_dist
        return (model.decode(posterior.sample()).sample - images).square().mean() + 1e-2 * posterior.kl().mean()
    return model, loss


EVERY = (nflows, normflows, freia, zuko, torchflows, pyro, pythae, diffusers)
HOSTS = pytest.mark.parametrize("host", EVERY)


class Loss(nn.Module):
    """The model's loss as a forward pass."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x):
        return self.loss(self.model, x)


@pytest.fixture(autouse=True)
def every_call_goes_to_the_kernel(monkeypatch):
    monkeypatch.setattr(adapter_layers, "SMALL", 0)


def build(host):
    """(model in float64, its loss, the original's loss and gradients)."""
    torch.manual_seed(2)
    model, loss = host()
    model = scattered(model.double())
    want = evaluated(model, loss)
    with torch.no_grad():  # Pyro keeps the last call, and what has a graph can't be copied
        loss(model, X)
    return model, loss, want


def evaluated(model, loss):
    model.zero_grad()
    value = loss(model, X)
    value.backward()
    return [value, *(p.grad for p in model.parameters() if p.grad is not None)]


def same(model, loss, want):
    found = evaluated(model, loss)
    assert len(found) == len(want)
    for got, w in zip(found, want, strict=True):
        close(got, w, 1e-9)


def as_wanted_twice(call, model, want):
    """Loss and gradients are those wanted, at the first call and at another."""
    for _ in range(2):
        model.zero_grad()
        value = call(X)
        value.backward()
        found = [value, *(p.grad for p in model.parameters() if p.grad is not None)]
        for got, w in zip(found, want, strict=True):
            close(got, w, 1e-9)


def swapped(model):
    return [name for name, module in model.named_modules() if swap_of(module) is not None]


@HOSTS
def test_copies_before_and_after_the_first_call(host):
    model, loss, want = build(host)
    report = fastflow.accelerate(model)
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert swapped(other) == swapped(model) == list(report.swapped)
            same(other, loss, want)
            assert fastflow.restore(other) == list(report.swapped)
            same(other, loss, want)
        same(model, loss, want)
        with torch.no_grad():
            loss(model, X)
    assert report.verified


@HOSTS
def test_layers_that_a_swapped_layers_class_made_itself(host):
    """They hold nothing of what accelerate finds out."""
    model, loss, want = build(host)
    fastflow.accelerate(model)
    kinds = {name: type(module) for name, module in model.named_modules() if swap_of(module) is not None}
    fastflow.restore(model)
    for name, kind in kinds.items():
        model.get_submodule(name).__class__ = kind
    for _ in range(2):
        same(model, loss, want)
    assert swapped(model) == list(kinds)


@HOSTS
def test_state_dicts_go_either_way(host):
    model, loss, want = build(host)
    fused = host()[0].double()
    fastflow.accelerate(fused)
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.load_state_dict(model.state_dict())
    same(fused, loss, want)
    other = host()[0].double()
    other.load_state_dict(fused.state_dict())
    if host is not zuko:  # whose flows have a mask that no state dict holds
        assert not swapped(other)
    same(other, loss, want)


@HOSTS
def test_distributed_data_parallel_before_and_after(host, process_group):
    for before in (True, False):
        model, loss, want = build(host)
        if before:
            fastflow.accelerate(model)
        ddp = nn.parallel.DistributedDataParallel(Loss(model, loss), find_unused_parameters=True)
        if not before:
            fastflow.accelerate(ddp)
        assert swapped(ddp)
        as_wanted_twice(ddp, model, want)


def _products_saved(context, op, *args, **kwargs):
    return checkpoint.CheckpointPolicy.MUST_SAVE if "mm" in str(op) else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


@HOSTS
@pytest.mark.parametrize("contexts", [checkpoint.noop_context_fn, functools.partial(
    checkpoint.create_selective_checkpoint_contexts, _products_saved)], ids=["all", "selective"])
def test_activation_checkpointing_repeats_what_the_first_call_saved(host, contexts):
    model, loss, want = build(host)
    report = fastflow.accelerate(model)
    call = functools.partial(checkpoint.checkpoint, Loss(model, loss), use_reentrant=False, context_fn=contexts)
    as_wanted_twice(call, model, want)
    assert bool(report.verified) == (contexts is checkpoint.noop_context_fn)
    as_wanted_twice(Loss(model, loss), model, want)
    assert report.verified and swapped(model) == list(report.swapped)  # none was put back


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", [host for host in EVERY if host is not pythae])  # which torch.compile can't trace
@pytest.mark.parametrize("before", [True, False])
def test_compiled_before_and_after(host, before):
    model, loss, want = build(host)
    if before:
        fastflow.accelerate(model)
    compiled = torch.compile(Loss(model, loss), backend="aot_eager")
    if not before:
        fastflow.accelerate(compiled)
    assert swapped(model)
    as_wanted_twice(compiled, model, want)


@HOSTS
def test_verified_after_calls_without(host):
    model, loss, want = build(host)
    fastflow.accelerate(model, verify=False)
    same(model, loss, want)
    report = fastflow.accelerate(model)
    same(model, loss, want)
    assert report.verified and swapped(model) == list(report.swapped)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@HOSTS
@pytest.mark.parametrize("when", ["never", "before", "inside"])
def test_lightning_trains_the_same(host, when, tmp_path):
    lightning = pytest.importorskip("lightning")
    model, loss, _ = build(host)
    reference = copy.deepcopy(model)

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return loss(self.model, batch[0])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    if when == "before":
        fastflow.accelerate(model)
    module = Module(model)
    if when == "inside":
        fastflow.accelerate(module)
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
                                precision="64-true")
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.repeat(3, 1)), batch_size=len(X))
    trainer.fit(module, batches)
    assert bool(swapped(model)) == (when != "never")
    optimizer = torch.optim.Adam(reference.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(reference, X).backward()
        optimizer.step()
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        close(got, want, 1e-9)
