"""Checkpoints under attack, bit rot, full disks and kills: what is read is what was written, or an error says so."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import signal
import struct
import time

import pytest
import torch

from fastflow.engine import CheckpointError, SettingsError, checkpoint, load_settings
from fastflow.engine.run import checkpoint_to_resume

STEP = "step-000005"


@pytest.fixture
def good(tmp_path):
    """(path, {file: bytes}) of a small checkpoint with three files of tensors."""
    draw = torch.Generator().manual_seed(0)
    tensors = {"model": {"w": torch.randn(4, 3, generator=draw), "conv": torch.randn(2, 2, 3, 3, generator=draw).to(
                   memory_format=torch.channels_last)},
               "ema": {"w": torch.randn(4, 3, generator=draw), "conv": torch.randn(2, 2, 3, 3, generator=draw)},
               "training": {"random.0.cpu": torch.arange(9, dtype=torch.uint8)}}
    path = checkpoint.save(tmp_path / "good", 5, tensors, {"settings": {"a": 1.5}})
    return path, {p.name: p.read_bytes() for p in path.iterdir()}


def write(path, contents):
    """Makes the directory hold exactly these files."""
    path.mkdir(parents=True, exist_ok=True)
    for name in {p.name for p in path.iterdir()} - contents.keys():
        (path / name).unlink()
    for name, data in contents.items():
        if not (path / name).exists() or (path / name).read_bytes() != data:
            (path / name).write_bytes(data)


def signed(contents, step=5):
    """The files with a manifest that fits them, as an attacker or a broken writer would make it."""
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
             if name != "manifest.json"}
    return {**contents, "manifest.json": json.dumps({"format": 1, "step": step, "files": files}).encode()}


def flip(files, draw):
    name = draw.choice(sorted(files))
    data = bytearray(files[name])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return {**files, name: bytes(data)}


def truncate(files, draw):
    name = draw.choice(sorted(files))
    return {**files, name: files[name][:draw.randrange(len(files[name]))]}


def lose(files, draw):
    gone = draw.sample(sorted(files), draw.randint(1, len(files)))
    return {name: data for name, data in files.items() if name not in gone}


def swap(files, draw):
    a, b = draw.sample(sorted(files), 2)
    return {**files, a: files[b], b: files[a]}


def rename(files, draw):
    name = draw.choice(sorted(files))
    new = f"{''.join(draw.choices('abcdef', k=6))}.{name.rpartition('.')[2]}"
    return {new if n == name else n: data for n, data in files.items()}


def add(files, draw):
    return {**files, f"{''.join(draw.choices('abcdef', k=6))}.safetensors": files["model.safetensors"]}


def zero(files, draw):
    """A block that never reached the disk."""
    name = draw.choice(sorted(files))
    begin = draw.randrange(len(files[name]))
    end = draw.randint(begin + 1, len(files[name]))
    return {**files, name: files[name][:begin] + bytes(end - begin) + files[name][end:]}


def outdate(files, draw):
    """A manifest or a state of a later version."""
    name = draw.choice(["manifest.json", "state.json"])
    later = json.dumps({**json.loads(files[name]), "format": draw.randint(2, 99)}).encode()
    return {**files, name: later} if name == "manifest.json" else signed({**files, name: later})


def restep(files, draw):
    """Files of another step under this step's name."""
    if draw.random() < 0.5:
        return signed(files, draw.randint(6, 99))
    return signed({**files, "state.json": files["state.json"].replace(b'"step": 5', b'"step": 4')})


MUTATIONS = [(flip, 400), (truncate, 250), (zero, 100), (lose, 50), (swap, 50), (rename, 50), (add, 50), (outdate, 25),
             (restep, 25)]


def test_of_1000_damaged_checkpoints_none_is_loaded_wrong(good, tmp_path):
    path, files = good
    expected, target, draw = checkpoint.load(path), tmp_path / "bad" / STEP, random.Random(0)
    refused = harmless = 0
    for mutate, count in MUTATIONS:
        for _ in range(count):
            write(target, mutate(files, draw))
            try:
                loaded = checkpoint.load(target)
            except CheckpointError as error:
                assert str(target) in str(error)
                refused += 1
                continue
            # A flip of one character of white space or, by chance, zeros over zeros: nothing that is read changed.
            assert mutate in (flip, zero) and loaded.state == expected.state
            assert loaded.tensors.keys() == expected.tensors.keys()
            for stem, named in expected.tensors.items():
                assert loaded.tensors[stem].keys() == named.keys()
                assert all(torch.equal(loaded.tensors[stem][n], t) and loaded.tensors[stem][n].stride() == t.stride()
                           for n, t in named.items())
            harmless += 1
    assert refused + harmless == 1000 and harmless < 40


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def torch_pickle(attack, tmp_path, **options):
    torch.save(attack, tmp_path / "attack.pt", **options)
    return (tmp_path / "attack.pt").read_bytes()


def header(entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def headers():
    """{name: safetensors file that lies}."""
    def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    return {
        "length 2^63": struct.pack("<Q", 2**63) + b"{}", "length 2^64 - 1": struct.pack("<Q", 2**64 - 1),
        "length over 100 MB": struct.pack("<Q", 100_000_001) + b"{" + b" " * 1000, "empty": b"",
        "2^60 elements": header({"w": entry(shape=[2**60], offsets=[0, 2**62])}, bytes(4)),
        "a product that wraps": header({"w": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
        "negative": header({"w": entry(shape=[-1])}, bytes(4)), "hole": header({"w": entry(offsets=[4, 8])}, bytes(8)),
        "overlap": header({"v": entry(), "w": entry()}, bytes(4)), "trailing": header({"w": entry()}, bytes(400)),
        "unknown dtype": header({"w": entry("EXEC")}, bytes(4)), "reversed": header({"w": entry(offsets=[4, 0])}),
        "deep": header(b"[" * 100_000), "not text": header(b"\xff" * 64), "code": header(b"__import__('os')")}


def malicious(files, canary, tmp_path):
    """{name: files}: everything with a manifest that fits, so that only what parses the content can refuse it."""
    attack = Attack(canary)
    pickles = {f"protocol {p}": pickle.dumps(attack, p) for p in range(6)}
    pickles["torch zip"] = torch_pickle(attack, tmp_path)
    pickles["torch legacy"] = torch_pickle(attack, tmp_path, _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "training.safetensors", "state.json", "manifest.json"):
        for kind in ("protocol 0", "protocol 5", "torch zip", "torch legacy"):
            bad = {**files, name: pickles[kind]}
            yield f"{kind} as {name}", bad if name == "manifest.json" else signed(bad)
    for name in ("model.pt", "model.bin", "model.pkl", ".metadata", "data.pickle", "model.py"):
        yield f"listed {name}", signed({**files, name: pickles["protocol 4"]})
        yield f"unlisted {name}", {**files, name: pickles["torch zip"]}
    for name, data in headers().items():
        yield f"header: {name}", signed({**files, "model.safetensors": data})
    for name, path in {"parent": "../../secret.json", "absolute": "/etc/passwd", "dot": "./model.safetensors",
                       "null": "model\0.safetensors", "nested": "a/model.safetensors",
                       "itself": "manifest.json"}.items():
        manifest = json.loads(signed(files)["manifest.json"])
        manifest["files"][path] = manifest["files"]["model.safetensors"]
        yield f"path: {name}", {**files, "manifest.json": json.dumps(manifest).encode()}
    for name, orders in {"bomb": {"model": {"conv": [0] * 10**5}}, "not there": {"model": {"x": [0]}},
                         "code": "__import__('os')", "text": {"model": {"conv": "0123"}}}.items():
        state = {**json.loads(files["state.json"]), "memory_order": orders}
        yield f"order: {name}", signed({**files, "state.json": json.dumps(state).encode()})
    yield "deep JSON", signed({**files, "state.json": b'{"a":' * 10**5})
    yield "a long integer", signed({**files, "state.json": b'{"format": ' + b"9" * 10**5 + b"}"})
    yield "UTF-7", signed({**files, "state.json": "+AHs-".encode("utf-7")})


def test_nothing_malicious_is_executed(good, tmp_path):
    path, files = good
    canary, target, tried = tmp_path / "canary", tmp_path / "bad" / STEP, 0
    for name, contents in malicious(files, canary, tmp_path):
        write(target, contents)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(target)
            pytest.fail(name)
        assert STEP in str(caught.value) and not canary.exists(), name
        tried += 1
    assert tried >= 40
    pickle.loads(pickle.dumps(Attack(canary)))  # the attack would have worked
    assert canary.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "hard to read", "device", "directory"])
def test_what_is_no_regular_file_is_refused(good, tmp_path, name, kind):
    path, files = good
    (path / name).unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(files[name])  # with the right content, and still not followed
        (path / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "dangling":
        (path / name).symlink_to(path / name)
    elif kind == "directory":
        (path / name).mkdir()
    else:
        with open(path / name, "wb") as file:
            file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)


@pytest.mark.parametrize("text", [
    'description = "!!python/object/apply:os.mkdir [{canary}]"\n[data]\nname = "digits"\n_target_ = "os.mkdir"',
    "!!python/object/apply:os.mkdir ['{canary}']", "data: !!python/name:os.mkdir",
    "{{__import__('os').mkdir('{canary}')}}",
    '[data]\nname = "__import__(\'os\').mkdir(\'{canary}\')"', '[model]\nkind = "os.mkdir"\n[data]\nname = "digits"',
    '[data]\nname = "../../../etc/passwd"', "a = " + "[" * 100_000, "[data]\nname = '$(mkdir {canary})'",
])
def test_recipes_are_data(tmp_path, text):
    canary, recipe = tmp_path / "canary", tmp_path / "recipe.toml"
    recipe.write_text(text.replace("{canary}", str(canary)))
    with pytest.raises(SettingsError):
        load_settings(str(recipe))
    for value in (f"__import__('os').mkdir('{canary}')", f"!!python/object/apply:os.mkdir ['{canary}']"):
        with pytest.raises(SettingsError):
            load_settings("glow-digits", [f"data.name={value}"])
    assert not canary.exists()


def weights(step):
    return {"w": torch.full((20_000,), float(step))}


def keep_saving(directory, first, report):
    """A process that saves step after step, each twice, and says so after each."""
    for step in itertools.count(first):
        for _ in range(2):
            checkpoint.save(directory, step, {"model": weights(step), "ema": weights(step)}, {"title": "t"}, keep=2)
            os.write(report, struct.pack("<q", step))


def test_50_kills_during_saving_leave_a_newest_that_can_be_read(tmp_path):
    draw, last = random.Random(0), 0
    seen_temporary = 0
    for _ in range(50):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                keep_saving(tmp_path, last + 1, writer)
            finally:
                os._exit(1)
        os.close(writer)
        reported = os.read(reader, 8)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        while piece := os.read(reader, 8):
            reported = piece
        os.close(reader)
        promised, = struct.unpack("<q", reported)
        seen_temporary += any(p.name.startswith(".") for p in tmp_path.iterdir())
        for _, path in checkpoint.find(tmp_path):
            checkpoint.load(path)
        checkpoint.put_back(tmp_path)
        newest = checkpoint.newest(tmp_path, pytest.fail)
        checkpoint.clean(tmp_path)
        assert newest.step >= promised > last
        assert torch.equal(newest.tensors["model"]["w"], weights(newest.step)["w"])
        assert 1 <= len(list(tmp_path.iterdir())) <= 3
        last = newest.step
    assert seen_temporary > 25  # the kills came in the midst of it


def test_a_checkpoint_about_to_be_replaced_is_put_back(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"model": weights(3)}, {})
    path.rename(tmp_path / ".step-000003.old-0123")
    (tmp_path / ".step-000003.tmp-4567").mkdir()
    checkpoint.clean(tmp_path)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_run_goes_on_from_one_that_was_about_to_be_replaced(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", 3, {"model": weights(3)}, {})
    path.rename(path.with_name(".step-000003.old-0123"))
    assert checkpoint_to_resume(tmp_path, True, pytest.fail).step == 3


def test_a_disk_that_is_full_in_the_midst_of_a_file(tmp_path):
    """The kernel itself refuses the bytes: the limit on the size of a file stands for the size of the disk."""
    old = checkpoint.save(tmp_path, 1, {"model": weights(1)}, {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written .* earlier checkpoints are intact"):
            checkpoint.save(tmp_path, 2, {"model": weights(2)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_directory_that_can_not_be_written(tmp_path, monkeypatch, code):
    old = checkpoint.save(tmp_path, 1, {"model": weights(1)}, {})

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=os.strerror(code)):
        checkpoint.save(tmp_path, 2, {"model": weights(2)}, {})
    assert checkpoint.load(old).step == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "checkpoints", 2, {"model": weights(2)}, {})
