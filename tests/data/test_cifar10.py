"""CIFAR-10 from files of its true formats: what Python 2's cPickle wrote in 2009, rows of 3073 bytes, both archives."""

import hashlib
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from data_files import NAMES, archive, batch, extracted, files, pickled

from fastflow import data
from fastflow.data import cifar10


def check(found):
    assert found.train.shape == (15, 3, 32, 32) and found.test.shape == (3, 3, 32, 32) and found.n_bins == 256
    for i, (part, labels) in enumerate(zip((*found.train.split(3), found.test),
                                           (*found.train_labels.split(3), found.test_labels), strict=True)):
        pixels, want = batch(i)
        assert np.array_equal(part.flatten(1).numpy(), pixels) and labels.tolist() == want
    assert found.train_labels.dtype == torch.int64 and found.train.dtype == torch.uint8


def test_the_pickle_that_tests_write_is_one_that_numpy_reads():
    pixels, labels = batch(0)
    found = pickle.loads(pickled(pixels, labels), encoding="latin1")
    assert np.array_equal(found["data"], pixels) and found["labels"] == labels and len(found["filenames"]) == 3


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_extracted_and_archived(tmp_path, suffix):
    extracted(tmp_path, suffix)
    check(data.load(tmp_path, verify=False))
    check(data.load(tmp_path / cifar10.FOLDERS[suffix], verify=False))
    check(data.load(archive(tmp_path / "cifar-10-x.tar.gz", files(suffix)), verify=False))
    renamed = archive(tmp_path / "anything", {"cifar-10-batches-py/readme.html": b"", **files(suffix)})
    check(data.load(renamed, format="cifar10", verify=False))


@pytest.mark.parametrize("protocol", [2, 5])
def test_batches_pickled_again_by_a_newer_python(tmp_path, protocol):
    extracted(tmp_path, "")
    for i, name in enumerate(NAMES):
        pixels, labels = batch(i)
        again = pickle.dumps({"data": pixels, "labels": labels}, protocol)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(again)
    check(data.load(tmp_path, verify=False))


def test_published_checksums(tmp_path, monkeypatch):
    extracted(tmp_path, "")
    first = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    with pytest.raises(data.DataFileError, match="data_batch_1: has MD5 .* published is c99cafc"):
        data.load(tmp_path)
    path = archive(tmp_path / "cifar-10-python.tar.gz", files(""))
    with pytest.raises(data.DataFileError, match="tar.gz: has MD5 .* published is c58f301"):
        data.load(path)
    for i, name in enumerate(NAMES):
        monkeypatch.setitem(cifar10.BATCHES, name, hashlib.md5(pickled(*batch(i))).hexdigest())
    monkeypatch.setitem(cifar10.ARCHIVES, "", hashlib.md5(path.read_bytes()).hexdigest())
    check(data.load(tmp_path))
    check(data.load(path))
    content = bytearray(first.read_bytes())
    content[500] ^= 1  # one pixel: still a batch, but not the published one
    first.write_bytes(content)
    with pytest.raises(data.DataFileError, match="data_batch_1: has MD5"):
        data.load(tmp_path)
    binary_root = tmp_path / "binary"
    binary_root.mkdir()
    with pytest.raises(data.DataFileError, match="holds 3 images, expected 10000"):
        data.load(extracted(binary_root, ".bin"))


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_a_truncated_file_names_itself(tmp_path, suffix):
    extracted(tmp_path, suffix)
    path = tmp_path / cifar10.FOLDERS[suffix] / f"data_batch_4{suffix}"
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(data.DataFileError, match=f"data_batch_4{suffix}: "):
            data.load(tmp_path, verify=False)
    path.unlink()
    with pytest.raises(data.DataFileError, match=f"data_batch_4{suffix}: is missing"):
        data.load(tmp_path, verify=False)
    packed = archive(tmp_path / "cifar-10.tar.gz", files(suffix))
    packed.write_bytes(packed.read_bytes()[:-2000])
    with pytest.raises(data.DataFileError, match="cifar-10.tar.gz: "):
        data.load(packed, verify=False)
    lacking = {name: content for name, content in files(suffix).items() if "test_batch" not in name}
    with pytest.raises(data.DataFileError, match=f"cifar-10.tar.gz: lacks .*test_batch{suffix}"):
        data.load(archive(packed, lacking), verify=False)


def test_wrong_shapes_and_labels_are_refused(tmp_path):
    extracted(tmp_path, "")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    pixels, labels = batch(1)
    for content, reason in ((pickled(pixels, labels[:2]), "a label each"), (pickled(pixels, [1, 2, 10]), "0 to 9"),
                            (pickled(pixels[:, :3000], labels), "3072"), (pickle.dumps({"labels": []}, 2), "KeyError"),
                            (pickle.dumps({"data": np.zeros((3, 3072), "i4"), "labels": labels}, 2), "bytes"),
                            (pickle.dumps({"data": np.zeros((3, 3072), "i4"), "labels": labels}, 5), "bytes"),
                            (pickle.dumps({"data": pixels, "labels": [0.5, 1.0, 2.0]}, 2), "type float64")):
        path.write_bytes(content)
        with pytest.raises(data.DataFileError, match=f"data_batch_2: .*{reason}"):
            data.load(tmp_path, verify=False)


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.exec", "os.system", "posix.system", "subprocess.Popen",
                                  "builtins.getattr", "importlib.import_module", "pickle.loads", "numpy.load",
                                  "numpy.core.multiarray.fromfile", "numpy.testing._private.utils.runstring",
                                  "fastflow.data.cifar10.read", "builtins.open", "codecs.open"])
def test_nothing_in_a_pickle_is_run(tmp_path, name):
    extracted(tmp_path, "")
    canary = tmp_path / "canary"
    module, _, function = name.rpartition(".")
    call = f"c{module}\n{function}\n".encode()
    argument = f"open({str(canary)!r}, 'w')" if function in ("eval", "exec") else f"touch {canary}"
    malicious = b"\x80\x02" + call + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."
    for content in (malicious, pickled(*batch(0), call=call)):
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
        with pytest.raises(data.DataFileError, match=f"{module}.{function} is not part of CIFAR-10"):
            data.load(tmp_path, verify=False)
    assert not canary.exists()


def test_an_archive_is_not_extracted(tmp_path):
    contents = {"../escaped": b"x", "/tmp/escaped": b"x", **files("")}
    check(data.load(archive(tmp_path / "cifar-10.tar.gz", contents), verify=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar-10.tar.gz"]
    with tarfile.open(tmp_path / "cifar-10.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(data.DataFileError, match="data_batch_1 is not a batch"):
        data.load(tmp_path / "cifar-10.tar.gz", verify=False)
