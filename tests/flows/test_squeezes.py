"""Space to depth, Haar wavelets and checkerboards: where each pixel goes."""

import layouts
import pytest
import torch

from fastflow import flows


def test_haar_is_orthonormal_and_its_own_formula():
    layer, x = flows.HaarSqueeze(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    z, logdet = layer(x)
    p, q, r, s = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
    torch.testing.assert_close(z[:, :3], (p + q + r + s) / 2)
    for k, detail in enumerate((p - q + r - s, p + q - r - s, p - q - r + s)):
        torch.testing.assert_close(z[:, 3 + k::3], detail / 2)
    assert torch.equal(logdet, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(z.square().sum(), x.square().sum())
    basis = torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    matrix = layer(basis)[0].flatten(1)
    assert torch.equal(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))
    # Of numbers with few digits no sum is rounded: the inverse is exact.
    whole = torch.randint(-128, 128, (2, 3, 4, 4)).float()
    assert torch.equal(layer.inverse(layer(whole)[0])[0], whole)


def test_a_constant_image_has_averages_alone():
    z, _ = flows.HaarSqueeze()(torch.full((1, 2, 4, 4), 3.0))
    assert (z[:, :2] == 6).all() and (z[:, 2:] == 0).all()


@pytest.mark.parametrize("kind", [flows.Squeeze, flows.HaarSqueeze])
def test_memory_format(kind):
    x = torch.randn(2, 3, 4, 4)
    last = kind(channels_last=True)(x)[0]
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, kind()(x)[0])


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.channel_slice, layouts.permuted],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2), (0, 3, 4, 4), (2, 5, 0, 2)], ids=str)
def test_channels_last_has_the_same_elements_and_gradients(shape, layout):
    """Data, whose gradient nobody asks for, are copied otherwise than what has one, or is in a transform."""
    x = layout(torch.randn(shape, dtype=torch.float64))
    squeeze, expected = flows.Squeeze(channels_last=True), flows.Squeeze()(x)[0]
    leaf = x.detach().requires_grad_()
    z, logdet = squeeze(leaf)
    mapped = torch.func.vmap(lambda row: squeeze(row[None])[0][0])(x) if len(x) else z
    for values in (squeeze(x)[0], z.detach(), mapped):
        assert torch.equal(values, expected) and torch.equal(logdet, torch.zeros(len(x)))
    grad, = torch.autograd.grad(z, leaf, expected)
    assert torch.equal(grad, x)


def test_checkerboard_colours():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    z, logdet = flows.CheckerboardSqueeze()(x)
    colour = (torch.arange(4)[:, None] + torch.arange(6)) % 2
    assert torch.equal(z[0, 0].flatten(), x[0, 0][colour == 0]) and torch.equal(z[0, 1].flatten(), x[0, 0][colour == 1])
    assert torch.equal(logdet, torch.zeros(1)) and torch.equal(flows.CheckerboardSqueeze().inverse(z)[0], x)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: flows.HaarSqueeze()(torch.zeros(1, 1, 3, 2)), "x"),
    (lambda: flows.HaarSqueeze().inverse(torch.zeros(1, 3, 2, 2)), "z"),
    (lambda: flows.CheckerboardSqueeze()(torch.zeros(1, 1, 2, 3)), "x"),
    (lambda: flows.CheckerboardSqueeze().inverse(torch.zeros(1, 3, 2, 2)), "z"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4, squeeze="dct"), "squeeze"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        call()
