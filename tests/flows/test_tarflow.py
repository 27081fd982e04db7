"""TarFlow: its map, causality, three ways to sample, guidance, denoising, published sizes, training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from flow_checks import check_bijection, check_gradients, scattered

from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.flows import decode

SIZES = [((1, 4, 4), 2), ((2, 2, 3), 1), ((3, 2, 4), 2)]  # 4, 6 and 2 patches


def tarflow(image_shape=(2, 4, 6), patch_size=2, *, blocks=3, layers=2, classes=4, size=0.2, dtype=torch.float64):
    """A small TarFlow with every parameter moved off its start."""
    model = flows.TarFlow(image_shape, patch_size, 8, blocks, layers, num_classes=classes, head_dim=4)
    return scattered(model.to(dtype), size)


def images(model, n=5):
    dtype = next(model.parameters()).dtype
    return torch.rand(n, *model.image_shape, dtype=dtype) - 0.5, torch.arange(n) % 5 - 1


def plain_log_prob(model, x, labels):
    """The same density written out, each token's params from a pass of its own over the tokens before it."""
    patches, *blocks = model.transform.transforms
    size = patches.patch_size
    x = F.unfold(2.0 * x, size, stride=size).transpose(1, 2)
    logdet = math.log(2.0) * x[0].numel()
    for block in blocks:
        net = block.network
        x = x.flip(1) if block.flip else x
        z = [x[:, 0]]
        for i in range(1, x.shape[1]):
            table = torch.cat([net.class_embed, net.class_embed.mean(0, keepdim=True)])
            h = net.proj_in(x[:, :i]) + net.pos_embed[:i] + table[labels][:, None]
            for layer in net.layers:
                q, k, v = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2)
                           for t in layer.qkv(layer.attention_norm(h)).chunk(3, 2))
                scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(torch.ones(i, i).triu(1) > 0, -1e9)
                h = h + layer.proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
                h = h + layer.down(F.gelu(layer.up(layer.mlp_norm(h))))
            alpha, mu = net.proj_out(h)[:, -1].chunk(2, 1)
            z.append((x[:, i] - mu) * torch.exp(-alpha))
            logdet = logdet - alpha.sum(1)
        x = torch.stack(z, 1).flip(1) if block.flip else torch.stack(z, 1)
    return logdet - 0.5 * x.square().sum((1, 2)) - 0.5 * x[0].numel() * math.log(2.0 * math.pi)


def test_equals_the_plain_model():
    model = tarflow()
    x, labels = images(model)
    torch.testing.assert_close(model(x, labels), plain_log_prob(model, x, labels), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("image_shape", "patch_size"), SIZES)
def test_bijection(image_shape, patch_size):
    for seed in range(4):
        torch.manual_seed(seed)
        model = tarflow(image_shape, patch_size, blocks=2, layers=1)
        x, labels = images(model, 2)
        check_bijection(model.transform, x, labels if seed % 2 else None)


def test_gradients():
    model = tarflow((1, 2, 4), 2, blocks=2, layers=1, classes=0)
    check_gradients(flows.Compose(*model.transform.transforms[1:]), torch.randn(2, 2, 4, dtype=torch.float64))


def test_starts_as_the_scaled_patches():
    model = flows.TarFlow((3, 4, 4), 2, 64, 2, 1)
    x, _ = images(model)
    z, logdet = model.transform(x)
    assert torch.equal(z, flows.Patchify((3, 4, 4), 2)(2.0 * x)[0])
    torch.testing.assert_close(logdet, torch.full((5,), 48 * math.log(2.0)))


@pytest.mark.parametrize("flip", [False, True])
def test_a_token_depends_on_those_before_it_alone(flip):
    block = scattered(flows.TarFlowBlock(6, 2, 8, 2, flip=flip, head_dim=4).double())
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda t: block(t)[0], x).abs().amax((0, 2, 3, 5))  # (6, 6)
    matrix = matrix.flip(0, 1) if flip else matrix
    assert torch.equal(matrix > 0, torch.ones(6, 6).tril() > 0)


@pytest.mark.parametrize(("method", "dtype", "tolerance"), [
    ("sequential", torch.float32, 1e-5), ("sequential", torch.float64, 1e-10), ("jacobi", torch.float32, 1e-5),
    (flows.GaussSeidelJacobi(4, tolerance=0.0), torch.float32, 1e-5),
    (flows.GaussSeidelJacobi(4, tolerance=1e-13), torch.float64, 1e-10)])
def test_sampling_inverts_the_parallel_pass(method, dtype, tolerance):
    """Token by token with the cache, or by iteration: the forward pass brings the noise back."""
    model = tarflow((3, 8, 8), dtype=dtype, size=0.1)
    labels = torch.tensor([0, 3, -1])
    noise = model._noise(2, labels, torch.Generator().manual_seed(3), 0.7)[0]
    x = model.sample(2, labels, generator=torch.Generator().manual_seed(3), temperature=0.7, method=method)
    assert x.shape == (2, 3, 3, 8, 8) and x.dtype == dtype
    with torch.no_grad():
        z, logdet = model.transform(x.flatten(0, 1), labels.repeat(2))
        torch.testing.assert_close(z, noise, rtol=0, atol=tolerance)
        back, opposite = model.transform.inverse(noise, labels.repeat(2))
    torch.testing.assert_close(back, x.flatten(0, 1), rtol=0, atol=tolerance)
    torch.testing.assert_close(opposite, -logdet, rtol=0, atol=100 * tolerance)
    with_gradients = model.transform.inverse(noise, labels.repeat(2))[0]
    assert with_gradients.requires_grad
    torch.testing.assert_close(with_gradients, back, rtol=0, atol=tolerance)


def test_jacobi_stops_early_at_its_tolerance_and_at_its_cap():
    model = tarflow((1, 8, 8), 1, size=0.03)
    exact = model.sample(3, generator=torch.Generator().manual_seed(1))
    solver = flows.GaussSeidelJacobi(tolerance=1e-8)
    x = model.sample(3, generator=torch.Generator().manual_seed(1), method=solver)
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-6)
    assert solver.converged and len(solver.iterations) == 3 and max(map(max, solver.iterations)) < 40
    solver = flows.GaussSeidelJacobi(32, tolerance=0.0, max_iterations=2)
    x = model.sample(3, generator=torch.Generator().manual_seed(1), method=solver)
    assert solver.iterations == [[2, 2]] * 3 and not solver.converged and not torch.allclose(x, exact)


def test_jacobi_survives_guesses_that_overflow():
    """A first guess of x from all of z at once can pass float32's range where the answer is tame."""
    model = tarflow((1, 1, 12), 1, blocks=1, classes=0, dtype=torch.float32)
    x = torch.randn(4, 1, 1, 12)
    with torch.no_grad():
        model.transform.transforms[1].network.proj_out.bias[:] = torch.tensor([-30.0, 0.0])
        z = model.transform(x)[0]
        block = model.transform.transforms[1]
        start = block.inverse(z)[0]
        found = decode.decoder(flows.GaussSeidelJacobi(tolerance=0.0), 0.0, None)(block, z, None)[0]
    assert z.abs().max() > 1e10
    torch.testing.assert_close(found, start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, flows.Guidance(1.5, 1.4, annealed=True)])
def test_the_step_that_is_captured(monkeypatch, guidance):
    """On tensors at fixed addresses, over the whole cache: what a CUDA graph replays is the body once recorded."""
    model = tarflow(size=0.1)
    runs = []

    def record(body, device):
        body()  # as the recorder warms up
        return lambda: runs.append(body())

    expected = model.sample(3, torch.tensor([2]), generator=torch.Generator().manual_seed(0), guidance=guidance)
    monkeypatch.setattr(decode, "_record", record)
    x = model.sample(3, torch.tensor([2]), generator=torch.Generator().manual_seed(0), guidance=guidance, capture=True)
    assert len(runs) == 3 * 5
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [0.0, flows.Guidance(1.5, 1.4)])
def test_captured_in_a_cuda_graph(guidance):
    model = tarflow(dtype=torch.float32, size=0.1).cuda()
    labels = torch.tensor([0, -1], device="cuda")
    draws = [model.sample(3, labels, generator=torch.Generator().manual_seed(0), guidance=guidance, capture=capture)
             for capture in (None, True, False)]
    for x in draws[:2]:
        torch.testing.assert_close(x, draws[2], rtol=0, atol=1e-5)


def test_labels_condition_the_density():
    model = tarflow()
    x, _ = images(model)
    values = torch.stack([model(x, torch.full((5,), label)) for label in range(-1, 4)])
    assert torch.pdist(values.detach()).min() > 1e-6
    torch.testing.assert_close(model(x), values[0])  # no label is the mean of the embeddings
    assert not torch.allclose(*(model.sample(1, torch.tensor([k]), generator=torch.Generator().manual_seed(0))
                                for k in (0, 1)))


def test_guidance():
    model, labels = tarflow(size=0.1), torch.tensor([1])

    def sample(guidance, labels=labels, **options):
        return model.sample(2, labels, generator=torch.Generator().manual_seed(0), guidance=guidance, **options)

    plain = sample(0.0)
    assert torch.equal(sample(flows.Guidance(0.0, 1.7)), plain)
    torch.testing.assert_close(sample(-1.0), sample(0.0, torch.tensor([-1])))  # all the way to the unlabelled one
    torch.testing.assert_close(sample(flows.Guidance(2.0), torch.tensor([-1])), sample(0.0, torch.tensor([-1])))
    variants = [plain, sample(1.0), *(sample(flows.Guidance(1.0, 1.5, parts, annealed))
                                      for parts in ("both", "scale", "shift") for annealed in (False, True))]
    assert torch.pdist(torch.stack([v.flatten() for v in variants])).min() > 1e-6
    for guidance in (1.0, flows.Guidance(0.7, 1.5, "shift", True)):
        torch.testing.assert_close(sample(guidance, method=flows.GaussSeidelJacobi(3, tolerance=0.0)), sample(guidance))


def test_guided_params_are_extrapolated_from_the_weaker_ones():
    """One token ahead: weight and temperature against the params of plain passes."""
    model = tarflow((1, 1, 2), 1, blocks=1, classes=0)
    block = model.transform.transforms[1]
    z = torch.randn(3, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        x = decode.decoder("sequential", flows.Guidance(0.8, 2.0), None)(block, z, None)[0]
        p = block.network(z[:, :1])[:, 0]
        q = block.network(z[:, :1], temperature=torch.full((3, 1, 1, 1), 2.0, dtype=torch.float64))[:, 0]
        alpha, mu = (p + 0.8 * (p - q)).chunk(2, 1)
    torch.testing.assert_close(x[:, 1], z[:, 1] * torch.exp(alpha) + mu)


def test_denoising_is_exact_for_a_gaussian():
    """N(0, v + s^2), noise of variance s^2 added: the posterior mean of the clean image is y v / (v + s^2)."""
    model = flows.TarFlow((1, 2, 2), 1, 8, 1, 1, head_dim=4, num_classes=2).double()
    std = 0.3
    v = 0.25 - std**2  # the untrained model is N(0, 1/4) in units of the image
    y = model.sample(3, torch.tensor([0, 1]))
    torch.testing.assert_close(model.denoise(y, std, torch.tensor([0, 1])), y * v / (v + std**2))
    torch.testing.assert_close(model.denoise(y[0], 0.0), y[0])
    with torch.inference_mode():
        torch.testing.assert_close(model.denoise(y.clone(), std, torch.tensor([0, 1])), y * v / (v + std**2))


def test_reparametrised_samples():
    model = tarflow((1, 2, 4), 2, classes=0)
    x, log_prob = model.sample_and_log_prob(3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.log_prob(x), log_prob)
    log_prob.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.as_distribution().event_shape == (1, 2, 4) and model.sample(0).shape == (0, 1, 2, 4)
    assert model.sample(0, method="jacobi").shape == (0, 1, 2, 4)


def test_bfloat16_transformers_under_autocast():
    model = tarflow((3, 8, 8), dtype=torch.float32, size=0.05)
    x, labels = images(model)
    expected = model(x, labels)
    samples = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert ((model(x, labels) - expected).abs() / 192).max() < 0.02
            samples.append(model.sample(2, labels, generator=torch.Generator().manual_seed(0), guidance=0.5))
    assert samples[1].dtype == torch.float32
    torch.testing.assert_close(*samples, rtol=0, atol=0.05)


@pytest.mark.parametrize(("name", "count"), [("imagenet64-2-768-8-8", 460_142_784),
                                             ("imagenet64-2-1024-8-8", 814_850_240 + 8_192_000),
                                             ("imagenet128-4-1024-8-8", 815_735_552 + 8_192_000),
                                             ("afhq256-8-768-8-8", 463_463_424 + 18_432)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = flows.TarFlow.from_config(name)
    assert sum(p.numel() for p in model.parameters()) == count and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"conditioner_dtype": torch.bfloat16}, {"memory": "save_z"},
                                     {"memory": "invert"}])
def test_a_reduced_configuration_trains(options):
    model = flows.TarFlow.from_config("imagenet64-2-768-8-8", image_shape=(3, 8, 8), channels=16, blocks=2,
                                      layers_per_block=2, head_dim=8, num_classes=4)
    scattered(model, 0.05)
    x, labels = torch.rand(16, 3, 8, 8) * 0.2, torch.arange(16) % 5 - 1
    step = TrainStep(model, torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95)), **options)
    with torch.no_grad():
        expected = -plain_log_prob(copy.deepcopy(model), x, labels).mean()
    losses = [step(x, labels).item() for _ in range(10)]
    assert losses[0] == pytest.approx(expected.item(), rel=3e-2 if "conditioner_dtype" in options else 1e-5)
    assert losses[-1] < losses[0] - 20
    bits = model.bits_per_dim(torch.randint(0, 50, (4, 3, 8, 8)), context=labels[:4])
    assert bits.shape == (4,) and bits.isfinite().all()


def test_compiles_to_one_graph():
    model = tarflow(dtype=torch.float32, blocks=2, layers=1)
    x, labels = images(model)
    weight = model.transform.transforms[1].network.proj_in.weight
    value = torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels)
    torch.testing.assert_close(value, model(x, labels))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), weight),
                               torch.autograd.grad(model(x, labels).sum(), weight))


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: flows.TarFlow((3, 8), 2, 64), ValueError, "image_shape"),
    (lambda: flows.TarFlow((3, 8, 9), 2, 64), ValueError, "image_shape"),
    (lambda: flows.TarFlow((3, 8, 8), 8, 64), ValueError, "patch_size"),
    (lambda: flows.TarFlow((3, 8, 8), 0, 64), ValueError, "patch_size"),
    (lambda: flows.TarFlow((3, 8, 8), 2, 60), ValueError, "channels"),
    (lambda: flows.TarFlow((3, 8, 8), 2, 64, 0), ValueError, "blocks"),
    (lambda: flows.TarFlow((3, 8, 8), 2, 64, 1, 0), ValueError, "layers"),
    (lambda: flows.TarFlow((3, 8, 8), 2, 64, data_scale=0.0), ValueError, "scale"),
    (lambda: flows.TarFlow.from_config("imagenet64"), ValueError, "name"),
    (lambda: tarflow()(torch.zeros(1, 2, 4, 4).double()), ValueError, "x: expected"),
    (lambda: tarflow()(torch.zeros(1, 2, 4, 6)), TypeError, "weight|x: expected"),
    (lambda: tarflow(classes=0)(torch.zeros(1, 2, 4, 6).double(), torch.zeros(1).long()), ValueError, "context"),
    (lambda: tarflow()(torch.zeros(1, 2, 4, 6).double(), torch.zeros(2).long()), ValueError, "context"),
    (lambda: tarflow()(torch.zeros(1, 2, 4, 6).double(), torch.tensor([4])), ValueError, "context"),
    (lambda: tarflow()(torch.zeros(1, 2, 4, 6).double(), torch.zeros(1)), TypeError, "context"),
    (lambda: tarflow().sample(1, method="newton"), ValueError, "method"),
    (lambda: tarflow().sample(1, method=3), TypeError, "method"),
    (lambda: tarflow().sample(1, capture=True), ValueError, "capture"),
    (lambda: tarflow().sample(1, method="jacobi", capture=True), ValueError, "capture"),
    (lambda: tarflow().sample(1, guidance=1.0), ValueError, "guidance"),
    (lambda: flows.Guidance(math.nan), ValueError, "guidance"),
    (lambda: flows.Guidance(1.0, 0.0), ValueError, "attention_temperature"),
    (lambda: flows.Guidance(1.0, parts="ab"), ValueError, "parts"),
    (lambda: flows.GaussSeidelJacobi(0), ValueError, "segment_length"),
    (lambda: flows.GaussSeidelJacobi(tolerance=-1.0), ValueError, "tolerance"),
    (lambda: flows.GaussSeidelJacobi(max_iterations=0), ValueError, "max_iterations"),
    (lambda: tarflow().denoise(torch.zeros(2, 4, 4).double(), 0.1), ValueError, "x: expected"),
    (lambda: tarflow().denoise(torch.zeros(2, 4, 6).double(), -0.1), ValueError, "noise_std"),
])
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
