"""Exported models give the same log-density in a process of their own."""

import json
import resource
import subprocess
import sys

import pytest
import torch

from fastflow import cli, flows, vae
from fastflow.engine import RunError
from fastflow.engine.export import export, load_exported

MODELS = {
    "realnvp": (lambda: flows.RealNVP(4), "mlp_flow_fwd"),
    "nsf": (lambda: flows.NSF(4), "spline_fwd"),
    "glow": (lambda: flows.Glow((1, 4, 4), n_levels=1, n_steps=1, hidden_channels=4), "affine_coupling_fwd"),
}

READ = """
import sys, torch
from fastflow.engine.export import load_exported
for path in sys.argv[1:]:
    log_prob = load_exported(path)
    batches = torch.load(path + ".batches", weights_only=True)
    torch.save([log_prob(x) for x in batches], path + ".found")
"""
# In one process: torch alone, then a graph before its operators are there and after, then the rest.
STEPWISE = """
import sys, torch
def run(path, load):
    log_prob = load(path)
    batches = torch.load(path + ".batches", weights_only=True)
    torch.save([log_prob(x).detach() for x in batches], path + ".found")
def bare(path):
    return torch.export.load(path).module()
plain, fused, *others = sys.argv[1:]
run(plain, bare)
assert not any(name.startswith("fastflow") for name in sys.modules)
try:
    run(fused, bare)
except Exception as error:
    print("refused", error)
from fastflow import extension
extension.load("cpu")
run(fused, bare)
from fastflow.engine.export import load_exported
for path in others:
    run(path, load_exported)
"""


def perturbed(name):
    torch.manual_seed(3)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def exported(model, path, format, **options):
    """The path, and what the model says about batches of several sizes, one of them 1."""
    path = export(model, path, format, **options)
    batches = [model.sample(n) for n in (1, 3, 7)]
    torch.save(batches, f"{path}.batches")
    with torch.no_grad():
        return path, [model.eval().log_prob(x) for x in batches]


def described(path):
    return path.with_name(f"{path.name}.json")


def read(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=False)


def check(path, want):
    found = torch.load(f"{path}.found", weights_only=True)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_graphs_reload_elsewhere(tmp_path):
    """One of torch's operators alone, without fastflow; fused ones, once fastflow's operators are registered."""
    plain, want = exported(perturbed("realnvp"), tmp_path / "plain", "torch_export", backend="reference")
    assert json.loads(described(plain).read_text())["operators"] == []
    wants = {plain: want}
    for name, (_, operator) in MODELS.items():
        path, values = exported(perturbed(name), tmp_path / name, "torch_export")
        about = json.loads(described(path).read_text())
        assert f"fastflow_cpu.{operator}" in about["operators"] and about["backends"] == ["cpu"]
        wants[path] = values
    done = read(STEPWISE, *wants)
    assert done.returncode == 0 and done.stdout.startswith("refused"), done.stderr
    for path, values in wants.items():
        check(path, values)


@pytest.mark.slow  # each compiles for a minute
@pytest.mark.parametrize("name", MODELS)
def test_compiled_packages_reload_elsewhere(tmp_path, name):
    path, want = exported(perturbed(name), tmp_path / name, "aoti")
    assert f"fastflow_cpu.{MODELS[name][1]}" in json.loads(described(path).read_text())["operators"]
    done = read(READ, path)
    assert done.returncode == 0, done.stderr
    check(path, want)


def test_weights_keep_values_and_memory_format(tmp_path):
    model = perturbed("glow")
    weight = next(m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.shape[2] == 3)
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    strides = {name: t.stride() for name, t in model.state_dict().items()}
    path = export(model, tmp_path / "glow.pt2")
    assert path == tmp_path / "glow.safetensors"
    other = load_exported(path, MODELS["glow"][0]())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) and tensor.stride() == strides[name], name
    assert model.training
    with pytest.raises(RunError, match="has no settings to build the model from"):
        load_exported(path)
    with pytest.raises(RunError, match="is of another model"):
        load_exported(path, MODELS["nsf"][0]())


def test_formats_of_one_name_stand_side_by_side(tmp_path):
    model = perturbed("realnvp")
    weights, graph = (export(model, tmp_path / "model-v1.2", format) for format in ("safetensors", "torch_export"))
    assert {path.name for path in tmp_path.iterdir()} == {f"model-v1.2.{end}" for end in (
        "safetensors", "safetensors.json", "pt2", "pt2.json")}
    x = model.sample(3)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(graph)(x), model.eval().log_prob(x), rtol=1e-5, atol=1e-5)
    described(weights).rename(weights.with_suffix(".json"))  # as earlier versions called it
    assert torch.equal(load_exported(weights, MODELS["realnvp"][0]()).eval().log_prob(x), model.log_prob(x))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = export(perturbed("realnvp"), tmp_path / "m")
    beside, whole = described(path), path.read_bytes()
    for content in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b""):
        path.write_bytes(content)
        with pytest.raises(RunError, match="m.safetensors: corrupt"):
            load_exported(path, MODELS["realnvp"][0]())
    about = json.loads(beside.read_text())
    for text, reason in (("{", "is not JSON"), ("[]", "does not describe"), ('{"format": "x"}', "does not describe"),
                         (json.dumps({**about, "fastflow_export": 2}), "reads 1")):
        beside.write_text(text)
        with pytest.raises(RunError, match=f"m.safetensors.json: .*{reason}"):
            load_exported(path)
    path.unlink()
    beside.write_text(json.dumps(about))
    with pytest.raises(RunError, match="m.safetensors: No such file"):
        load_exported(path)


def test_what_export_refuses(tmp_path):
    model = perturbed("realnvp")
    with pytest.raises(ValueError, match="format: expected one of safetensors, torch_export, aoti, got 'onnx'"):
        export(model, tmp_path / "m", "onnx")
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model: expected one with log_prob or a VAE, got Linear; use safetensors"):
        export(plain, tmp_path / "m", "torch_export")
    with pytest.raises(ValueError, match="function: MLPVAE has no log_prob; use elbo, encode or decode"):
        export(vae.MLPVAE((4,), 2, (8,)), tmp_path / "m", "torch_export", function="log_prob")
    with pytest.raises(ValueError, match="function: elbo of a RealNVP can't be exported"):
        export(model, tmp_path / "m", "torch_export", function="elbo")
    with pytest.raises(ValueError, match="function: expected one of log_prob, elbo, encode, decode, got 'loss'"):
        export(model, tmp_path / "m", "torch_export", function="loss")
    with pytest.raises(ValueError, match="n_samples: expected an int >= 1, got 0"):
        export(vae.MLPVAE((4,), 2, (8,)), tmp_path / "m", "torch_export", n_samples=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        export(model, tmp_path / "file" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("format", ["safetensors", "torch_export"])
def test_a_full_disk_is_named_and_nothing_is_left_of_the_file(tmp_path, format):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond
    try:
        with pytest.raises(RunError, match=r"m\.\w+: could not be written \(File too large\)"):
            export(perturbed("realnvp"), tmp_path / "m", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_others_may_read_exported_weights_as_far_as_the_mask_says(tmp_path):
    path = export(torch.nn.Linear(2, 2), tmp_path / "m")
    assert path.stat().st_mode == described(path).stat().st_mode


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["model.n_levels=1", "model.n_steps=1", "model.hidden_channels=4", "train.steps=1", "train.device=cpu",
            "train.eval_every=0", "train.checkpoint_every=0", "sample.count=1"]
    cli.main(["train", "glow-digits", "--out", "run", *(part for s in tiny for part in ("--set", s))])
    capsys.readouterr()
    cli.main(["export", "run"])
    path = capsys.readouterr().out.strip()
    assert path == "run/export/step-000001-safetensors.safetensors"
    model = load_exported(path)
    cli.main(["export", "run", "--format", "torch_export", "--out", "density.pt2"])
    assert capsys.readouterr().out.strip() == "density.pt2"
    x = model.sample(3)
    with torch.no_grad():
        torch.testing.assert_close(load_exported("density.pt2")(x), model.eval().log_prob(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        cli.main(["export", "nowhere"])
    assert "nowhere: holds no checkpoints" in capsys.readouterr().err
