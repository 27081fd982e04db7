"""The peers of the benchmarks are the same models: parameters counted, equal likelihood from equal weights, a step."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

for library in ("nflows", "normflows", "FrEIA", "zuko", "torchflows"):
    pytest.importorskip(library)
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import contest, counting, equal_time, glow, page, peer_launches, peers, realnvp, run, table  # noqa: E402
from benchmarks.neutral_realnvp import NeutralRealNVP  # noqa: E402

GLOW = {"n_steps": 2, "hidden_channels": 8, "image_shape": (3, 16, 16)}
LEVELS = (12, 24, 48)  # channels
# learned parameters beyond fastflow's: per step of C channels, per model
EXTRA_GLOW = {
    ("nflows", ""): (lambda c: c, 0),  # the bias of its 1x1 convolution
    ("normflows", "plain 1x1"): (lambda c: 0, 0),
    ("normflows", "LU 1x1"): (lambda c: c * c + c, 0),  # L and U whole, and log s
    # a scale on each last convolution; on the two splits' too, and the last level's convolution with its scale
    ("rosinality", "plain 1x1"): (lambda c: c, 12 + 24 + (48 * 9 + 1) * 96 + 96),
    ("rosinality", "LU 1x1"): (lambda c: c * c + 2 * c, 12 + 24 + (48 * 9 + 1) * 96 + 96),
    ("FrEIA", "strided squeeze"): (lambda c: -c * c, 0),  # no learned 1x1 weight
    ("FrEIA", "legacy squeeze"): (lambda c: -c * c, 0),
}
EXTRA_REALNVP = {("FrEIA", "AllInOneBlock"): 4 * 16 + 4 - 4}
GLOWS = [(name, setting) for name in peers.GLOW for setting in contest.settings(name, "glow")]
REALNVPS = [(name, setting) for name in peers.REALNVP for setting in contest.settings(name, "realnvp")]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def peer_glow(name, setting, **sizes):
    return glow.peer_glow(name, **{**GLOW, **sizes}, **contest.settings(name, "glow")[setting])


def peer_realnvp(name, setting):
    return realnvp.peer_realnvp(name, **contest.settings(name, "realnvp")[setting])


@pytest.mark.parametrize(("name", "setting"), GLOWS)
def test_glow_has_the_stated_parameters_and_takes_a_step(name, setting):
    own, peer = glow.fastflow_glow(**GLOW), peer_glow(name, setting)
    per_step, per_model = EXTRA_GLOW[name, setting]
    extra = sum(GLOW["n_steps"] * per_step(channels) for channels in LEVELS) + per_model
    assert peers.parameters(peer) == peers.parameters(own) + extra
    assert name in peers.GLOW_DIFFERENCES
    x = torch.rand(4, 3, 16, 16) - 0.5
    for memory_format in glow.FORMATS.values():
        takes_a_step(peer.to(memory_format=memory_format), x.contiguous(memory_format=memory_format))


@pytest.mark.parametrize(("name", "setting"), REALNVPS)
def test_realnvp_has_the_stated_parameters_and_takes_a_step(name, setting):
    own, peer = realnvp.fastflow_realnvp(), peer_realnvp(name, setting)
    assert peers.parameters(peer) == peers.parameters(own) + EXTRA_REALNVP.get((name, setting), 0)
    assert name in peers.REALNVP_DIFFERENCES
    with torch.no_grad():
        samples = peer.sample(7)
    assert samples.shape == (7, 2) and samples.isfinite().all()
    takes_a_step(peer, realnvp.two_moons(64))


def takes_a_step(model, x):
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    loss = contest.training_step(model, x)()
    assert loss.isfinite()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert moved > len(parameters) // 4  # behind a zero convolution there is no gradient at first


@pytest.mark.parametrize(("name", "setting"), [pair for pair in GLOWS if hasattr(peers.module(pair[0]), "load_glow")])
def test_glow_is_the_same_model_from_equal_weights(name, setting):
    own = glow.fastflow_glow(**GLOW, dialect="nflows" if name == "nflows" else "fastflow").double()
    peer = peer_glow(name, setting).double()
    peers.module(name).load_glow(peer, own)
    x = (torch.rand(3, 3, 16, 16) - 0.5).double()
    same_density_and_gradient(own, peer, x)


@pytest.mark.parametrize("name", list(peers.REALNVP))
def test_realnvp_is_the_same_model_from_equal_weights(name):
    own = realnvp.fastflow_realnvp(dialect=name).double()
    peer = peer_realnvp(name, next(iter(contest.settings(name, "realnvp")))).double()
    peers.module(name).load_realnvp(peer, own)
    same_density_and_gradient(own, peer, realnvp.two_moons(32).double())


def test_the_neutral_realnvp_is_fastflows_and_samples_its_own_density():
    own = realnvp.fastflow_realnvp()
    neutral = realnvp.neutral_realnvp(own)
    assert peers.parameters(neutral) == peers.parameters(own)
    same_density_and_gradient(own.double(), neutral.double(), realnvp.two_moons(32).double())
    torch.manual_seed(3)
    x = NeutralRealNVP.sample(neutral.float(), 5)
    torch.manual_seed(3)
    z = own.transform(x.double())[0]
    torch.testing.assert_close(z, torch.randn(5, 2).double(), atol=1e-4, rtol=1e-4)


def test_the_neutral_glow_decodes_as_fastflows():
    own = glow.fastflow_glow(**GLOW).double()
    neutral = glow.neutral_glow(own).double()
    z = torch.randn(2, 3 * 16 * 16, dtype=torch.float64)
    with torch.no_grad():
        decoded, x = neutral.decode(own.transform.unpack(z)), own.transform.inverse(z)[0]
        torch.testing.assert_close(decoded, x, atol=1e-10, rtol=1e-10)
        torch.manual_seed(0)
        drawn = neutral.to(memory_format=torch.channels_last).sample(3)
        assert drawn.shape == (3, 3, 16, 16) and drawn.isfinite().all()


@pytest.mark.parametrize("name", peers.SAMPLING_GLOW)
def test_samples_of_a_peers_glow(name):
    """As likely under the same model of fastflow's as its own samples, within six standard errors."""
    peer = peer_glow(name, next(iter(contest.settings(name, "glow"))))
    same = hasattr(peers.module(name), "load_glow")
    own = glow.fastflow_glow(**GLOW, dialect="nflows" if name == "nflows" else "fastflow")
    if same:
        peers.module(name).load_glow(peer, own)
    with torch.no_grad():
        samples = peer.sample(64)
        assert samples.shape == (64, 3, 16, 16) and samples.isfinite().all()
        error = 2**0.5 * (samples[0].numel() / 2 / 64) ** 0.5
        assert not same or (own(samples).mean() - own(own.sample(64)).mean()).abs() < 6 * error


def same_density_and_gradient(own, peer, x):
    own_x, peer_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, theirs = own(own_x), peer(peer_x)
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=0)
    grads = [torch.autograd.grad(log_prob.sum(), leaf)[0] for log_prob, leaf in ((mine, own_x), (theirs, peer_x))]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)
    assert grads[0].abs().max() > 0.1  # not a constant


@pytest.mark.parametrize("setting", contest.settings("rosinality", "glow"))
def test_the_research_glow_is_a_density(setting):
    """What was written here is held against change of variables: one level, its latents the whole z."""
    options = {**contest.settings("rosinality", "glow")[setting], "n_levels": 1}
    peer = glow.peer_glow("rosinality", image_shape=(1, 4, 4), n_steps=2, hidden_channels=4, **options).double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.rand(1, 1, 4, 4).double()
    (level,) = peer.levels
    jacobian = torch.autograd.functional.jacobian(lambda v: level(v)[0].flatten(), x).view(16, 16)
    z = level(x)[0]
    mean, log_sigma = level.prior(torch.zeros_like(z)).chunk(2, 1)
    expected = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(z).sum() + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(peer(x)[0], expected, atol=1e-8, rtol=1e-8)


def test_counting_counts_what_is_dispatched_and_kept():
    w = torch.randn(4, 4, requires_grad=True)
    with counting.Dispatched() as counted:
        y = (w.t() @ w).view(16).exp()  # a matrix product and an exp; views don't count
        y.sum().item()
    assert counted.by_op == {"aten::mm": 1, "aten::exp": 1, "aten::sum": 1}
    assert counted.launches == 3 and counted.reads == 1
    model = torch.nn.Linear(4, 8)
    x = torch.randn(2, 4)
    with counting.saved_for_backward(model) as saved:
        model(x).exp().square().sum()
    assert saved.bytes == 4 * (8 + 16)  # x, and exp(..) once although exp and square both keep it


def test_launches_and_bytes_of_a_glow():
    own = peer_launches.launches(glow.fastflow_glow, n_steps=1, hidden_channels=4)
    eager = peer_launches.launches(peer_launches.contenders()["eager"], n_steps=1, hidden_channels=4)
    assert own["launches"] == own["of_flow"] + own["of_conditioners"] + own["of_optimizer"]
    assert own["of_flow"] < eager["of_flow"] and own["of_optimizer"] == eager["of_optimizer"] == 1
    assert own["of_conditioners"] == eager["of_conditioners"] > 0  # no kernel of the CPU alone hides them
    two = peer_launches.saved_bytes(glow.fastflow_glow, n_steps=2, hidden_channels=64)
    one = peer_launches.saved_bytes(glow.fastflow_glow, n_steps=1, hidden_channels=64)
    hidden_maps = 2 * 64 * 4 * (16 * 16 + 8 * 8 + 4 * 4)  # bytes per image of one step in every level
    assert hidden_maps < two - one < 2 * hidden_maps


@pytest.mark.parametrize("name", equal_time.PEERS)
def test_equal_time_starts_from_the_same_likelihood(name):
    images = torch.rand(16, 3, 16, 16) - 0.5
    own, peer = equal_time.equal_models(name, GLOW, next(iter(contest.settings(name, "glow").values())), images)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), own(images), atol=2e-3, rtol=1e-5)


def test_equal_time_runs_and_the_same_batches_are_seen(tmp_path, threads):
    threads(1)
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8)
    batches = [equal_time.Batches(images, 4, memory_format)
               for memory_format in glow.FORMATS.values()]
    for _ in range(3):
        first, second = (draw() for draw in batches)
        assert torch.equal(first, second)
    small = "--seconds 0.2 --turn 0.1 --threads 1 --n-steps 1 --batch-size 4 --hidden-channels 4 --held-out 4"
    assert equal_time.main([*small.split(), "--results", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("cpu-equal-time-*.json")).read_text())
    for row in record["rows"]:
        own, peer = row["fastflow"]["curve"], row["of_peer"]["curve"]
        assert len(own) == len(peer) == 1 + len(equal_time.MARKS)
        assert own[0]["bits_per_dim"] == pytest.approx(peer[0]["bits_per_dim"], abs=2e-4)
        assert row["gain_bits_per_dim"] == pytest.approx(peer[-1]["bits_per_dim"] - own[-1]["bits_per_dim"], abs=1e-6)
        for model in (own, peer):
            assert model[-1]["seconds"] >= 0.2 and model[-1]["steps"] >= 1
    assert len(table.equal_time(record)) == 2 + 2 * len(equal_time.PEERS)


def test_the_fastest_setting_is_taken_and_a_broken_one_left_out(threads):
    threads(1)

    def broken():
        raise RuntimeError("not this one")
    call = contest.best({"slow": lambda: lambda: torch.randn(300, 300) @ torch.randn(300, 300), "fast": lambda: int,
                         "broken": broken})
    assert call.setting == "fast" and call() == 0
    with pytest.raises(RuntimeError, match="not this one"):
        contest.best({"broken": broken})()


def test_a_case_of_models_names_the_fastest_peer(monkeypatch, threads):
    threads(1)

    def build(device):
        def slow():
            return torch.randn(200, 200) @ torch.randn(200, 200)
        return {"fastflow": int, "eager": int, "nflows": slow, "zuko": contest.best({"a": lambda: int})}
    case = run.cases.Case("some case", "realnvp", build, ("fastflow", "eager", "nflows", "zuko"), ("nflows", "zuko"))
    for row in run.measure(case, "cpu", 3):
        assert row["over_fastest"] == {"of": ["nflows", "zuko"], "name": "zuko", "ratio": row["speedup_over"]["zuko"]}
        assert row["settings"] == {"zuko": "a"}
        cells = table.markdown({"rows": [row]})
        assert cells[0] == "| case | over eager | over nflows | over zuko | over the fastest peer |"
        assert cells[2].endswith(f"| {row['over_fastest']['ratio']:.2f} |")


def test_cases_hold_every_contender():
    for case in (*glow.CASES, *realnvp.CASES):
        assert set(case.peers) < set(case.variants)
        samplers = peers.SAMPLING_GLOW if "sampling" in case.name else peers.GLOW
        assert set(case.variants) == {"fastflow", "eager", *(samplers if case.group == "glow" else peers.REALNVP)}


def test_the_page_is_that_of_the_records():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert page.PAGE.read_text() == page.render(), "run python -m benchmarks.page"


def test_every_ratio_without_gain_stands_once_and_in_a_table():
    text = page.render()
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    section = text.partition("\n## No gain\n")[2].partition("\n## ")[0]
    lines = [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ") and line != "- none"]
    assert len(lines) == len(set(lines))
    for line in lines:
        case = line.rpartition(": ")[0].rpartition(" thread")[0].rpartition(", ")[0]
        ratio = line.rpartition(": ")[2].split()[0]
        assert any(row.startswith(f"| {case} |") and ratio in row for row in tables), line
