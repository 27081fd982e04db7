"""The random stream: Philox4x32-10, its mapping to elements, the normals made from it, and where seeds come from."""

import math

import layouts
import pytest
import torch
from tolerances import assert_bitwise

from fastflow import backends, extension, functional, reference
from fastflow.functional import gaussian_sample_kl

# Known answers published with Random123 (Salmon et al., SC 2011), file kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
MASK = 0xFFFFFFFF


def philox(counter, key):
    """Ten rounds in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def normal(element, seed, offset=0):
    """Normal number ``element`` of the stream, in Python floats."""
    block = element // 4 + offset
    words = philox((block & MASK, block >> 32, 0, 0), (seed & MASK, (seed >> 32) & MASK))
    pair = element % 4 // 2 * 2
    u0, u1 = (((w >> 8) + 0.5) * 2.0**-24 for w in words[pair : pair + 2])
    angle = 2 * math.pi * u1
    return math.sqrt(-2 * math.log(u0)) * (math.cos(angle) if element % 2 == 0 else math.sin(angle))


def noise(shape, seed, *, dtype=torch.float32, device="cpu", layout=layouts.contiguous, offset=0, n_samples=None):
    """eps itself, as float64 on the CPU: z at mean 0 and sigma 1."""
    zeros, ones = layout(torch.zeros(shape, dtype=dtype, device=device)), torch.ones(shape, dtype=dtype, device=device)
    z, _ = gaussian_sample_kl((zeros, ones), scale="std", seed=seed, offset=offset, n_samples=n_samples)
    return z.cpu().double()


def philox_op(backend):
    return reference.philox4x32 if backend == "reference" else extension.kernel(backend, "philox4x32")


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words, backend, device):
    got = philox_op(backend)(torch.tensor([counter], device=device), torch.tensor([key], device=device))
    assert got.dtype == torch.int64 and got.tolist() == [list(words)]
    assert philox(counter, key) == list(words)


def test_integers_are_the_reference_s(backend, device):
    counter, key = torch.randint(0, 2**32, (4099, 4)), torch.randint(0, 2**32, (4099, 2))
    got = philox_op(backend)(counter.to(device), key.to(device)).cpu()
    assert_bitwise(got, reference.philox4x32(counter, key))
    assert got[17].tolist() == philox(counter[17].tolist(), key[17].tolist())
    assert philox_op(backend)(counter[:0].to(device), key[:0].to(device)).shape == (0, 4)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1, 2**63, 2**64 - 1, -1,
                                  -7])
@pytest.mark.parametrize("offset", [0, 1, 12345, 2**31 - 1, 2**32 - 2, 2**40 + 3])
def test_element_i_is_normal_i_mod_4_of_counter_i_div_4(seed, offset, backend, device):
    got = noise((2, 9), seed, offset=offset, device=device).flatten()
    expected = torch.tensor([normal(i, seed % 2**64, offset) for i in range(18)], dtype=torch.float64)
    assert (got - expected).abs().max() < 2e-6


# Counters of seed 7 at which a word's top 24 bits are extreme or a quarter turn: (counter, word).
EDGE_COUNTERS = [(32245323, 0), (13385049, 0), (12763568, 0), (2313274, 0), (20922799, 0), (13061623, 1), (17303141, 1),
                 (13139402, 1), (20391410, 1), (73950667, 1), (8785339, 1), (7349006, 1), (3207372, 1), (25266344, 1),
                 (6107189, 2), (39116132, 2), (29014625, 2), (7951311, 2), (6647514, 2), (19444830, 3), (24725633, 3),
                 (13348277, 3), (9569251, 3), (29202507, 3), (5153027, 3), (37697209, 3), (5120476, 3), (26722579, 3)]


@pytest.mark.parametrize(("counter", "word"), EDGE_COUNTERS)
def test_extreme_uniforms(counter, word, backend, device):
    """u = 2^-25 and 1 - 2^-25 (which float32 rounds to 1, whose log is 0), and angles at multiples of a quarter turn:
    the error is absolute 2e-6, and relative where the radius itself is tiny."""
    top = philox((counter, 0, 0, 0), (7, 0))[word] >> 8
    assert top in (0, 1, 0x7FFFFF, 0x800000, 0xFFFFFE, 0xFFFFFF, 0x200000, 0x3FFFFF, 0x400000, 0xBFFFFF, 0xC00000)
    got = noise((1, 4), 7, offset=counter, device=device).flatten().tolist()
    expected = [normal(i, 7, counter) for i in range(4)]
    assert got == pytest.approx(expected, abs=2e-6)
    if word in (0, 2) and top >= 0xFFFFFE:
        assert got[word : word + 2] == pytest.approx(expected[word : word + 2], rel=1e-5, abs=1e-10)


def test_normals_within_two_millionths_of_the_float64_truth(backend, device):
    got = noise((4, 2**16), 20260101, device=device).flatten()
    words = reference.philox4x32(
        torch.stack([torch.arange(2**16), *[torch.zeros(2**16, dtype=torch.int64)] * 3], 1),
        torch.tensor([[20260101, 0]]))
    u = ((words >> 8).double() + 0.5) * 2.0**-24
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    truth = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()
    assert truth.shape == got.shape and (got - truth).abs().max() < 2e-6


def test_moments_and_distribution(backend, device):
    """2^18 draws: mean, variance, skewness, kurtosis, neighbours' correlation and the Kolmogorov-Smirnov distance."""
    draws = noise((2, 2**17), 42, device=device).flatten()
    n = draws.numel()
    assert abs(draws.mean()) < 4 / n**0.5 and abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draws**3).mean()) < 4 * (15 / n) ** 0.5 and abs((draws**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs((draws[lag:] * draws[:-lag]).mean()) < 4 / n**0.5
    cdf = torch.special.ndtr(draws.sort().values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert torch.maximum((cdf - steps).abs(), (cdf - steps + 1 / n).abs()).max() < 1.63 / n**0.5  # 1% level
    assert 4 < draws.abs().max() < 6


def test_no_two_blocks_are_equal(backend, device):
    words = noise((1, 2**16), 3, device=device).reshape(-1, 4)
    assert len(torch.unique(words, dim=0)) == len(words)


@pytest.mark.parametrize("layout", layouts.ALL, ids=layouts.by_name)
def test_stream_ignores_the_memory_layout(layout, backend, device):
    shape = (3, 5, 4, 7)
    got, want = noise(shape, 9, layout=layout, device=device), noise(shape, 9, device=device)
    assert (got - want).abs().max() < 2e-6
    assert (want.flatten() - torch.tensor([normal(i, 9) for i in range(420)], dtype=torch.float64)).abs().max() < 2e-6


@pytest.mark.parametrize("packing", ["chunk", "interleave"])
def test_stream_ignores_the_packing_and_the_rank(packing, backend, device):
    mean, raw = torch.zeros(2, 6, 5, device=device), torch.ones(2, 6, 5, device=device)
    packed = torch.stack([mean, raw], 2).flatten(1, 2) if packing == "interleave" else torch.cat([mean, raw], 1)
    z, _ = gaussian_sample_kl(packed, scale="std", layout=packing, seed=4)
    flat, _ = gaussian_sample_kl((mean.flatten(1), raw.flatten(1)), scale="std", seed=4)
    assert (z.flatten(1) - flat).abs().max() < 2e-6


def test_stream_is_drawn_in_float32_whatever_the_dtype(backend, device):
    """The same normals everywhere, cast afterwards: float64 holds the float32 numbers, bf16 their rounding."""
    single = noise((3, 50), 6, device=device)
    assert_bitwise(noise((3, 50), 6, dtype=torch.float64, device=device), single)
    for dtype in (torch.bfloat16, torch.float16):
        assert_bitwise(noise((3, 50), 6, dtype=dtype, device=device), single.to(dtype).double())


@pytest.mark.parametrize("shape", [(2, 3), (3, 5, 7), (1, 1), (4, 64)], ids=str)
def test_fewer_samples_are_a_prefix_of_more(shape, backend, device):
    five = noise(shape, 8, n_samples=5, device=device)
    assert five.shape == (5, *shape)
    for k in (1, 2, 4):
        assert_bitwise(noise(shape, 8, n_samples=k, device=device), five[:k])
    assert_bitwise(noise(shape, 8, device=device), five[0])
    assert (five.flatten()[-1] - normal(five.numel() - 1, 8)).abs() < 2e-6


def test_offset_skips_blocks_of_four(backend, device):
    long = noise((1, 64), 5, device=device).flatten()
    assert_bitwise(noise((1, 40), 5, offset=6, device=device).flatten(), long[24:])


def test_seeds_as_int_scalar_and_per_sample_tensors(backend, device):
    """A 0-d tensor is the same as the int; with a (B,) tensor every sample has a key of its own, the counters
    unchanged."""
    shape, seeds = (4, 3, 5), [3, -1, 2**40 + 1, 3]
    per_sample = noise(shape, torch.tensor(seeds, device=device), device=device)
    samples = noise(shape, torch.tensor(seeds, device=device), n_samples=3, device=device)
    for b, seed in enumerate(seeds):
        by_int = noise(shape, seed, device=device)
        assert_bitwise(noise(shape, torch.tensor(seed, device=device), device=device), by_int)
        assert_bitwise(per_sample[b], by_int[b])
        assert_bitwise(samples[:, b], noise(shape, seed, n_samples=3, device=device)[:, b])
    assert not torch.equal(per_sample[0], per_sample[3])


def draw(device, **kwargs):
    return gaussian_sample_kl(torch.ones(3, 8, device=device), scale="std", **kwargs)[0]


def test_manual_seed_and_generators_reproduce(backend, device):
    torch.manual_seed(5)
    first, second = draw(device), draw(device)
    torch.manual_seed(5)
    assert_bitwise(draw(device), first)
    assert_bitwise(draw(device), second)
    assert not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(17)
    state = torch.get_rng_state()
    mine = draw(device, generator=generator)
    assert torch.equal(torch.get_rng_state(), state), "a given generator leaves torch's own alone"
    assert not torch.equal(draw(device, generator=generator), mine)
    assert_bitwise(draw(device, generator=torch.Generator(device).manual_seed(17)), mine)


def test_given_noise_or_seed_leave_the_generator_alone(backend, device):
    state = torch.get_rng_state()
    draw(device, seed=3)
    draw(device, eps=torch.zeros(3, 4, device=device))
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_sees_the_noise_of_the_forward(backend, device):
    """With z = mean + raw*eps, dz/draw is eps: for drawn and per-sample seeds, offsets and K samples."""
    for kwargs in ({}, {"seed": 3, "offset": 5}, {"seed": torch.arange(3, device=device)}, {"n_samples": 4},
                   {"seed": 9, "n_samples": 2, "offset": 2}):
        mean = torch.zeros(3, 7, device=device)
        raw = torch.ones(3, 7, device=device, requires_grad=True)
        z, _ = gaussian_sample_kl((mean, raw), scale="std", **kwargs)
        (grad,) = torch.autograd.grad(z.sum(), raw)
        eps = z.detach() if "n_samples" not in kwargs else z.detach().sum(0)
        torch.testing.assert_close(grad, eps, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("n_samples", [None, 3])
@pytest.mark.parametrize("seed", [3, torch.arange(1029)], ids=["one seed", "seeds"])
def test_large_noise_is_drawn_again_for_backward(seed, n_samples, backend, device):
    """The same gradients (on a CPU bit for bit) as where the same noise is given; and nothing of its size is kept."""
    shape, sizes = (1029, 513), []  # over 2 MiB
    mean = torch.randn(shape, device=device)
    raw = torch.randn(shape, device=device, requires_grad=True)
    seed = seed.to(device) if isinstance(seed, torch.Tensor) else seed
    eps = gaussian_sample_kl((torch.zeros(shape, device=device), torch.zeros(shape, device=device)), seed=seed,
                             n_samples=n_samples, offset=7)[0]
    weights = torch.randn_like(eps)

    def gradient(**noise):
        z, kl = gaussian_sample_kl((mean, raw), n_samples=n_samples, **noise)
        return torch.autograd.grad((z * weights).sum() + kl.sum(), raw)[0]

    expected = gradient(eps=eps)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        got = gradient(seed=seed, offset=7)
    if backend == "cpu":
        assert_bitwise(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    if backend != "reference":
        assert sizes.count(tuple(eps.shape)) == 1 + 2 * (n_samples is None)  # weights, and the parameters alike


def test_noise_is_drawn_where_the_params_are(backend, device):
    """Whatever torch's default device is."""
    params = torch.zeros(3, 8, device=device)
    want, _ = gaussian_sample_kl(params, seed=5)
    with torch.device("meta"):
        assert_bitwise(gaussian_sample_kl(params, seed=5)[0], want)
        assert gaussian_sample_kl(params)[0].device == params.device


def test_every_backend_draws_what_the_reference_draws():
    names = [name for name, usable in backends.available().items() if usable]
    assert "reference" in names
    for name in names:
        device = "cuda" if name in ("triton", "cuda") else "cpu"
        with backends.use_backend(name):
            drawn = noise((3, 101), 2**35 + 11, n_samples=2, offset=9, device=device)
        assert (drawn - reference.philox_normal((2, 3, 101), 2**35 + 11, 9).double()).abs().max() < 2e-6, name
    assert functional.gaussian_sample_kl is gaussian_sample_kl
