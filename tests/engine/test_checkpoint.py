import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastflow.engine import CheckpointError, checkpoint


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"model": {"weight": torch.randn(4, 3, generator=generator), "empty": torch.empty(0, 2),
                      "counter": torch.tensor(7), "half": torch.randn(5, generator=generator).bfloat16(),
                      "transposed": torch.randn(3, 4, generator=generator).t()},
            "training": {"random.cpu": torch.get_rng_state(), "double": torch.tensor([float("nan"), -0.0]).double()}}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and \
        a.contiguous().numpy(force=True).tobytes() == b.contiguous().numpy(force=True).tobytes() \
        if a.dtype != torch.bfloat16 else same_bits(a.view(torch.int16), b.view(torch.int16))


def test_round_trip(tmp_path, tensors):
    path = checkpoint.save(tmp_path / "c", 12, tensors, {"settings": {"a": 1.5}, "title": "ü"})
    loaded = checkpoint.load(path)
    assert path.name == "step-000012" and loaded.step == 12 and loaded.path == path
    assert loaded.state["settings"] == {"a": 1.5} and loaded.state["title"] == "ü"
    assert loaded.tensors.keys() == tensors.keys()
    assert all(list(named) == sorted(named) for named in loaded.tensors.values())  # the same order in every process
    for stem, named in tensors.items():
        assert loaded.tensors[stem].keys() == named.keys()
        assert all(same_bits(loaded.tensors[stem][name], t) for name, t in named.items())
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model.safetensors", "state.json",
                                                      "training.safetensors"]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000012"]


def test_the_memory_format_comes_back(tmp_path):
    """Dense tensors in any order of their dimensions; what is not dense becomes row-major."""
    x = torch.randn(2, 3, 4, 5)
    named = {"channels_last": x.contiguous(memory_format=torch.channels_last), "swapped": x.permute(3, 0, 2, 1),
             "plain": x, "sliced": x[..., ::2], "expanded": torch.randn(3, 1).expand(3, 4)}
    path = checkpoint.save(tmp_path, 1, {"model": named}, {})
    loaded = checkpoint.load(path)
    for name, tensor in loaded.tensors["model"].items():
        assert torch.equal(tensor, named[name])
        dense = name not in ("sliced", "expanded")
        assert tensor.stride() == (named[name] if dense else named[name].contiguous()).stride()
    assert loaded.state.keys() == {"format", "step"}


@pytest.mark.parametrize("tensors, state, message", [
    ({"../evil": {}}, {}, "tensors: '../evil' can't name a file"), ({"Model": {}}, {}, "tensors: 'Model'"),
    ({}, {"step": 3}, "state: the keys step are"), ({}, {"memory_order": {}}, "state: the keys memory_order are")])
def test_names_that_can_not_be_are_refused_before_anything_is_written(tmp_path, tensors, state, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", 1, tensors, state)
    assert not (tmp_path / "c").exists()


def test_shared_memory_is_saved_twice(tmp_path):
    weight = torch.randn(3)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"model": {"a": weight, "b": weight}}, {}))
    assert torch.equal(loaded.tensors["model"]["a"], weight) and torch.equal(loaded.tensors["model"]["b"], weight)


def test_the_newest_is_by_number_and_temporaries_are_ignored(tmp_path):
    for step in (9, 10, 1_000_001):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.tensor(step)}}, {})
    (tmp_path / ".step-2000000.tmp-abc").mkdir()
    (tmp_path / "step-2000001x").mkdir()
    assert [step for step, _ in checkpoint.find(tmp_path)] == [9, 10, 1_000_001]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1_000_001
    checkpoint.clean(tmp_path)
    assert not (tmp_path / ".step-2000000.tmp-abc").exists() and (tmp_path / "step-2000001x").exists()
    assert checkpoint.newest(tmp_path / "none", pytest.fail) is None


def test_only_the_last_are_kept(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.tensor(step)}}, {}, keep=2)
    assert [step for step, _ in checkpoint.find(tmp_path)] == [4, 5]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_saved_is_kept_beside_a_bad_one_of_a_later_step(tmp_path, keep):
    for step in (400, 500, 1000):
        path = checkpoint.save(tmp_path, step, {"model": {"w": torch.tensor(step)}}, {})
    (path / "model.safetensors").write_bytes(b"")
    bad = []
    assert checkpoint.newest(tmp_path, bad.append).step == 500 and len(bad) == 1
    for step in (600, 700):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.tensor(step)}}, {}, keep=keep)
        assert checkpoint.newest(tmp_path, bad.append).step == step
    assert [step for step, _ in checkpoint.find(tmp_path)] == [600, 700, 1000][2 - keep:]


def test_the_same_step_again_replaces_the_old_one(tmp_path):
    for value in (1, 2):
        path = checkpoint.save(tmp_path, 3, {"model": {"w": torch.tensor(value)}}, {})
    assert checkpoint.load(path).tensors["model"]["w"] == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("harm, message", [
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: No such file"),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json: No such file"),
    (lambda p: (p / "model.safetensors").rename(p / "other.safetensors"), "other.safetensors: is not in the manifest"),
    (lambda p: shutil.copy(p / "training.safetensors", p / "model.safetensors"), "model.safetensors: "),
    (lambda p: p.rename(p.with_name("step-000006")), "of step 5 in a directory named for step 6"),
    (lambda p: edit_manifest(p, format=2), "format 2, this version reads 1"),
    (lambda p: edit_manifest(p, files={"../secret.json": {"bytes": 1, "sha256": ""}, "state.json": {}}), "can't be"),
    (lambda p: edit_manifest(p, files=[]), "lists no state.json"),
    (lambda p: edit_manifest(p, step=True), "of step True"),
    (lambda p: (p / "ema.safetensors").touch(), "ema.safetensors: is not in the manifest"),
    (lambda p: (p / ".hidden").mkdir(), ".hidden: is not in the manifest"),
    (lambda p: (p / "manifest.json").write_text('{"step": 5, "step": 5}'), "a key comes twice"),
    (lambda p: (p / "manifest.json").write_text("[" * 100_000), "not JSON"),
    (lambda p: (p / "manifest.json").write_text("[]"), "not a JSON object"),
    (lambda p: link(p / "model.safetensors"), "model.safetensors: "),
    (lambda p: (os.unlink(p / "model.safetensors"), os.mkfifo(p / "model.safetensors")), "not a regular file"),
    (lambda p: os.truncate(p / "manifest.json", 1 << 30), "expected at most"),
])
def test_what_was_not_written_so_is_refused(tmp_path, tensors, harm, message):
    harm(checkpoint.save(tmp_path, 5, tensors, {}))
    (_, path), = checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        checkpoint.load(path)


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def test_a_linked_directory_is_refused(tmp_path, tensors):
    path = checkpoint.save(tmp_path / "a", 5, tensors, {})
    (tmp_path / "step-000005").symlink_to(path)
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        checkpoint.load(tmp_path / "step-000005")


def test_a_bad_newest_is_passed_over_aloud(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.tensor(step)}}, {})
    (tmp_path / "step-000002" / "model.safetensors").write_bytes(b"")
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1 and "step-000002/model.safetensors" in warnings[0]
    (tmp_path / "step-000001" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
        checkpoint.newest(tmp_path, warnings.append)


@pytest.mark.parametrize("fail_at", range(5))
def test_a_full_disk_leaves_the_earlier_ones_intact(tmp_path, monkeypatch, fail_at):
    old = checkpoint.save(tmp_path, 1, {"model": {"w": torch.tensor(1)}}, {})
    calls = iter(range(100))

    def full(descriptor):
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="step-000002: could not be written .No space left"):
        checkpoint.save(tmp_path, 2, {"model": {"w": torch.tensor(2)}}, {})
    assert checkpoint.load(old).tensors["model"]["w"] == 1
    assert not list(tmp_path.glob(".*"))
    assert [step for step, _ in checkpoint.find(tmp_path)] == ([1, 2] if fail_at == 4 else [1])


def test_a_stored_checkpoint_of_format_1_loads():
    """Written once and never again: every later version must read it."""
    loaded = checkpoint.load(Path(__file__).with_name("format-1") / "step-000005")
    assert loaded.step == 5 and loaded.state["settings"] == {"a": 1.5}
    conv = loaded.tensors["model"]["conv"]
    assert torch.equal(conv, torch.arange(36.0).reshape(2, 2, 3, 3)) and conv.stride() == (18, 1, 6, 2)
    assert same_bits(loaded.tensors["model"]["half"], torch.arange(4.0).bfloat16())
    assert torch.equal(loaded.tensors["training"]["random.cpu"], torch.arange(9, dtype=torch.uint8))
