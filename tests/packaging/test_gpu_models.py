"""The benchmark of whole models on a GPU, rehearsed without one; its plain models compute what fastflow's do."""

import contextlib
import copy
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import contest, glow, gpu_models, page, realnvp, timing  # noqa: E402
from benchmarks.gpu import glow as gpu_glow  # noqa: E402
from benchmarks.gpu import measuring, tokens  # noqa: E402
from benchmarks.gpu.unfused import UnfusedGlow  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def short(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(measuring, "ROUND_SECONDS", 1e-5)
    monkeypatch.setattr(gpu_glow, "TRIES", 1)


def test_every_kind_of_case_runs_on_small_models(short, tmp_path, capsys):
    """Cases that differ in their full sizes or precision alone are the same here."""
    names = ["glow-64", "realnvp-training", "realnvp-log-prob", "realnvp-sampling", "glow-64-unfused", "vae", "kernels",
             "depth-48", "tarflow-sampling", "jet", "conditioners"]
    assert {name.split("-")[0] for name in names} == {name.split("-")[0] for name in gpu_models.CASES}
    only = [word for name in names for word in ("--only", name)]
    before = torch.backends.cuda.matmul.allow_tf32
    assert gpu_models.main(["--device", "cpu", "--tiny", "--budget", "1000", "--case-limit", "1000",
                            "--results", str(tmp_path), *only]) == 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
    written, = tmp_path.iterdir()
    record = json.loads(written.read_text())
    assert record["tiny"] and record["failed"] == {} and record["left_out"] == []
    assert {row["name"] for row in record["rows"]} == set(record["seconds"]) == set(names)
    for row in record["rows"]:
        assert row["failed"] == {}, row
        for own, ratios in row.get("ratios", {}).items():
            for other, ratio in ratios.items():
                assert ratio == pytest.approx(row["median_ms"][other] / row["median_ms"][own], rel=0.05)
        for goal in row.get("goals", ()):
            assert goal["ratio"] == row["ratios"][goal["of"]][goal["over"]]
    printed = capsys.readouterr().out
    assert "fastflow, captured, bf16" in printed and "fastflow, invert, every 8" in printed


def test_a_case_that_raises_or_takes_too_long_is_reported_and_the_budget_kept(monkeypatch, tmp_path, capsys):
    def broken(device, tiny):
        raise RuntimeError("no such size\nand many details")

    def endless(device, tiny):
        yield {"case": "endless", "group": "x", "failed": {}}
        while True:
            pass

    def sound(device, tiny):
        yield measuring.measure(measuring.Contest("sound", "x", {"fastflow": lambda: int, "eager": lambda: missing()},
                                                  1), device)

    def missing():
        raise ImportError("No module named 'peer'")
    monkeypatch.setattr(gpu_models, "CASES", {"broken": broken, "endless": endless, "sound": sound})
    saved = []
    record = gpu_models.measure(["broken", "endless", "sound"], "cpu", True, 100, 0.2,
                                lambda record: saved.append(json.loads(json.dumps(record))))
    assert record["failed"] == {"broken": "RuntimeError: no such size",
                                "endless": "TimeoutError: not done within 0.2 s"}
    assert [len(each["rows"]) for each in saved] == [0, 1, 2]
    assert record["rows"][1]["failed"] == {"eager": "No module named 'peer'"}
    none = gpu_models.measure(["broken", "sound"], "cpu", True, -1, 1, saved.append)
    assert none["left_out"] == ["broken", "sound"] and none["rows"] == []
    assert gpu_models.main(["--device", "cpu", "--tiny", "--only", "sound", "--results", str(tmp_path)]) == 0
    assert gpu_models.main(["--device", "cpu", "--tiny", "--only", "broken"]) == 1
    assert "broken failed: RuntimeError: no such size" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["constructing", "running", "between", "recording"])
def test_the_limit_ends_a_case_that_passes_over_failures(short, monkeypatch, where):
    """The variant that the alarm meets is not taken for one that fails while the rest is measured."""
    def waits():
        while True:
            pass

    @contextlib.contextmanager
    def recording():
        try:
            yield
        finally:
            raise RuntimeError("what was begun can not be ended")

    def case(device, tiny):
        late = {"constructing": waits, "running": lambda: waits, "recording": recording()(waits)}
        late = late.get(where, lambda: int)
        variants = {"eager": lambda: int, "late": late, "fastflow": lambda: int}
        yield measuring.measure(measuring.Contest("case", "x", variants, 1), device)
        waits()
    monkeypatch.setattr(gpu_models, "AGAIN", 0.3)
    monkeypatch.setattr(gpu_models, "CASES", {"one": case, "two": lambda *a: iter(())})
    record = gpu_models.measure(["one", "two"], "cpu", True, 100, 0.1, lambda record: None)
    assert record["failed"] == {"one": "TimeoutError: not done within 0.1 s"}
    assert len(record["rows"]) == (where in ("between", "recording")) and list(record["seconds"]) == ["one", "two"]
    assert record["seconds"]["one"] < 5


def test_a_device_that_no_longer_answers_ends_the_run(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def case(device, tiny):
        yield {"case": "case", "group": "x", "failed": {}}
    monkeypatch.setattr(gpu_models, "CASES", {"one": case, "two": case})
    monkeypatch.setattr(measuring, "release", lost)
    saved = []
    record = gpu_models.measure(["one", "two"], "cpu", True, 100, 10, saved.append)
    assert record["left_out"] == ["two"] and len(record["rows"]) == 1 and saved[-1] is record
    assert record["failed"] == {"device": "after one: CUDA error: an illegal memory access was encountered"}


@pytest.mark.gpu
def test_small_models_are_captured_on_a_gpu(short, tmp_path):
    assert gpu_models.main(["--tiny", "--budget", "1000", "--case-limit", "1000", "--results", str(tmp_path)]) == 0
    written, = tmp_path.iterdir()
    rows = json.loads(written.read_text())["rows"]
    kernels, = (row["profiled"]["fastflow"] for row in rows if row["group"] == "launches")
    assert kernels["launch calls"] > 0 and kernels["kernels"] > 0
    assert all(row["peak_bytes"] > 0 for row in rows if row["group"] == "depth" and not row["failed"])


@pytest.mark.gpu
def test_a_captured_step_trains_as_the_same_step_does():
    neutral = glow.neutral_glow(glow.fastflow_glow(2, 2, 8, (3, 8, 8))).cuda()
    x = torch.rand(8, 3, 8, 8, device="cuda") - 0.5
    one, other = copy.deepcopy(neutral), copy.deepcopy(neutral)
    models = [UnfusedGlow(model.cpu(), backend=None).cuda() for model in (one, other)]
    captured, eager = measuring.captured_training_step(models[0], x, "cuda"), contest.training_step(models[1], x)
    for _ in range(3):  # that came before the recording
        eager()
    for _ in range(4):
        torch.testing.assert_close(captured(), eager())
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cpu", "--tiny", "--only", "no such case"]])
def test_what_can_not_be_run_is_said(arguments, capsys):
    assert gpu_models.main(arguments) == 1
    assert arguments[1 if len(arguments) == 2 else 4] in capsys.readouterr().err


def test_the_unfused_glow_is_the_neutral_one_and_compiles_once_per_level():
    fused = glow.fastflow_glow(2, 3, 8, (3, 8, 8))
    neutral = glow.neutral_glow(fused).double()
    unfused = UnfusedGlow(copy.deepcopy(neutral), backend="aot_eager")
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64) - 0.5
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    expected, found = neutral(x), unfused(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    expected.mean().backward()
    found.mean().backward()
    # levels: an assembly and a flow step each, and a split between the two
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 + 2 + 1
    for level, steps in zip(unfused.levels, neutral.levels, strict=True):
        for index, (actnorm, _, coupling) in enumerate(steps):
            torch.testing.assert_close(level.bias.grad[index], actnorm.bias.grad.flatten())
            torch.testing.assert_close(level.log_scale.grad[index], actnorm.log_scale.grad.flatten())
            for mine, theirs in zip(level.nets[index], coupling.net.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad)
    torch.compiler.reset()


def test_the_unfused_glow_learns_its_1x1_weights_as_the_neutral_one_does():
    """The gradient of W = P L (U + diag(s)) follows from that of W by the chain rule; log s has one of its own."""
    neutral = glow.neutral_glow(glow.fastflow_glow(1, 1, 8, (3, 8, 8))).double()
    unfused = UnfusedGlow(copy.deepcopy(neutral), backend=None)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64) - 0.5
    level, step = unfused.levels[0], 1e-6
    unfused(x).sum().backward()
    weight = neutral.levels[0][0][1].weight
    upper = level.upper[0].detach().triu(1) + torch.diag(level.sign[0] * level.log_s[0].detach().exp())
    lower = level.lower[0].detach()
    with torch.no_grad():
        for place in range(3):
            values = []
            for sign in (1, -1):
                moved = upper.clone()
                moved[place, place] *= torch.exp(torch.tensor(sign * step, dtype=torch.float64))
                weight.copy_(level.permutation[0] @ lower @ moved)
                values.append(neutral(x).sum())
            assert level.log_s.grad[0, place] == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("construct", [tokens.jet, tokens.tarflow])
def test_the_plain_token_flows_are_fastflows(construct):
    flow = construct(tiny=True).double()
    x = torch.rand(3, *flow.image_shape, dtype=torch.float64) - 0.5
    plain = tokens.NeutralTokenFlow(flow)
    torch.testing.assert_close(plain(x), flow(x), rtol=1e-5, atol=1e-4)  # its couplings are in float32
    compiled = tokens.compile_layers(copy.deepcopy(flow), "aot_eager")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(compiled(x), flow(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # which all layers share
    torch.compiler.reset()


def test_the_published_sampler_inverts_the_flow():
    flow = tokens.tarflow(tiny=True)
    z = torch.randn(2, *flow.transform.transforms[0].token_shape)
    x = tokens.published_inverse(flow, z)
    with torch.no_grad():
        torch.testing.assert_close(flow.transform(x)[0], z, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_convolutions_and_products():
    """One level of one step with 8 hidden channels on 3x4x4, by hand: forward, and twice that backward, but for the
    gradient of the first convolution's input, which the 1x1 before it asks for as well."""
    pixels = 2 * 2
    forward = 2 * pixels * (12 * 12 + 6 * 8 * 9 + 8 * 8 + 8 * 12 * 9)
    inputs = 2 * pixels * 12 * 12  # the gradient of the image itself may be counted or not
    found = gpu_glow.flops(1, {"n_levels": 1, "n_steps": 1, "hidden_channels": 8, "image_shape": (3, 4, 4)})
    assert 3 * forward - inputs <= found <= 3 * forward + 12**3 * 4


def test_flags_of_peers_stay_on_the_host():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].register_buffer("initialized", torch.tensor(True))
    assert measuring.flags_on_host(model)[0].initialized.device.type == "cpu"


def test_medians_are_of_the_rounds(short, monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda *a: ({"fastflow": [1.0, 3.0, 2.0], "other": [8.0, 6.0, 4.0]}, {}))
    row = measuring.measure(measuring.Contest("case", "x", {}, 10, goals={("fastflow", "other"): 2.0}), "cpu")
    assert row["median_ms"] == {"fastflow": 2e3, "other": 6e3}
    assert row["ratios"] == {"fastflow": {"other": 3.0}} and row["goals"][0]["ratio"] == 3.0
    assert row["examples_per_s"]["fastflow"] == 10 / statistics.median([1, 3, 2])


def test_the_page_shows_a_record(monkeypatch, tmp_path):
    for path in page.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert "Nothing on this page has been measured on a GPU" in page.render() or list(tmp_path.glob("cuda-*.json"))
    contest = {"case": "a step", "group": "glow", "median_ms": {"fastflow": 2.0, "eager": 8.0, "other": 1.0},
               "examples_per_s": {"fastflow": 10.0, "eager": 2.5, "other": 20.0}, "mfu": {"fastflow": 0.25},
               "ratios": {"fastflow": {"eager": 4.0, "other": 0.5}}, "settings": {"eager": "channels_last"},
               "notes": {}, "failed": {"nflows": "not installed"}}
    depth = {"case": "Glow", "group": "depth", "limit_bytes": 40e9}
    rows = [contest, {**depth, "mode": "fastflow, none", "peak_bytes": 7.5e9, "ms": 120.0, "failed": {}},
            {**depth, "mode": "normflows", "failed": {"normflows": "out of memory"}},
            {"case": "kernels", "group": "launches", "profiled": {"fastflow": {"kernels": 1553}}, "failed": {}}]
    machine = {"processor": "some CPU", "gpu": "some GPU", "cores": 16, "torch": "2.11.0", "python": "3.12.0",
               "date": "2999-01-01T00:00:00+00:00", "commit": "0123456789abcdef"}
    (tmp_path / "cuda-gpu-models-2999-01-01.json").write_text(
        json.dumps({"machine": machine, "rows": rows, "failed": {"jet": "out of memory"}, "left_out": ["tarflow"]}))
    text = page.render()
    for line in ("Nothing on this page has been measured on a GPU",):
        assert line not in text
    for line in ("| eager | 8.000 | 2 |  | 4.00 |", "| fastflow | 2.000 | 10 | 0.250 |  |", "eager channels_last.",
                 "| Glow | fastflow, none | 7.50 | 120.0 |", "| Glow | normflows | out of memory |  |",
                 "- fastflow, as the profiler counts: kernels 1553", "- jet: out of memory",
                 "- a step, nflows: not installed", "- a step: fastflow 0.50 over other", "some GPU"):
        assert line in text, line
    assert "Left out for want of time: tarflow." in text


def test_realnvp_cases_cover_its_work():
    assert {name for name in gpu_models.CASES if name.startswith("realnvp")} == {
        f"realnvp-{work.split()[0].replace('_', '-')}" for work in realnvp.WORK}
