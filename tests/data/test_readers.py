"""ImageNet, folders of pictures, tables and Hugging Face datasets from small files of their true formats."""

import errno
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import imagenet, pictures, saved, table, write

from fastflow import data


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet(tmp_path, size):
    made = imagenet(tmp_path, size, parts=10)
    found = data.load(tmp_path, format=f"imagenet{size}")
    assert found.train.shape == (40, 3, size, size) and (found.image_shape, 256) == data.FORMATS[f"imagenet{size}"]
    assert np.array_equal(found.train.flatten(1).numpy(), np.concatenate([p for p, _ in made[:-1]]))  # 10 after 9
    assert np.array_equal(found.test_labels.numpy(), made[-1][1] - 1)
    with pytest.raises(ValueError, match="say which, imagenet32 or imagenet64"):
        data.load(tmp_path)
    with pytest.raises(data.DataFileError, match=r"train_data_batch_1.npz: data: expected uint8 \(N, "):
        data.load(tmp_path, format="imagenet64" if size == 32 else "imagenet32")
    (tmp_path / "train_data_batch_3.npz").unlink()
    with pytest.raises(data.DataFileError, match="lacks a part"):
        data.load(tmp_path, format=f"imagenet{size}")


def test_imagenet_in_the_folders_of_its_archives(tmp_path):
    imagenet(tmp_path / "Imagenet32_train")
    (tmp_path / "Imagenet32_val").mkdir()
    with pytest.raises(data.DataFileError, match="lacks train_data_batch_1.npz"):
        data.load(tmp_path / "Imagenet32_val", format="imagenet32")
    (tmp_path / "Imagenet32_train/val_data.npz").rename(tmp_path / "Imagenet32_val/val_data.npz")
    assert len(data.load(tmp_path, format="imagenet32").train) == 8
    (tmp_path / "Imagenet32_val/val_data.npz").unlink()
    with pytest.raises(data.DataFileError, match="val_data.npz: is missing"):
        data.load(tmp_path, format="imagenet32")


def test_imagenet_labels_are_checked(tmp_path):
    (pixels, labels), *_ = imagenet(tmp_path)
    path = tmp_path / "train_data_batch_1.npz"
    for wrong, reason in ((labels[:3], "holds 4 images and 3 labels"), (labels * 0, "labels: expected one from 1 to")):
        np.savez(path, data=pixels, labels=wrong)
        with pytest.raises(data.DataFileError, match=f"train_data_batch_1.npz: {reason}"):
            data.load(tmp_path, format="imagenet32")


def test_damaged_npz_files_name_themselves(tmp_path):
    imagenet(tmp_path)
    path = tmp_path / "train_data_batch_2.npz"
    whole = path.read_bytes()
    for length in (0, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(data.DataFileError, match="train_data_batch_2.npz: "):
            data.load(tmp_path, format="imagenet32")
    flipped = bytearray(whole)
    flipped[3000] ^= 1  # in the pixels: only the checksum tells
    path.write_bytes(flipped)
    with pytest.raises(data.DataFileError, match="train_data_batch_2.npz: .*CRC"):
        data.load(tmp_path, format="imagenet32")


def test_imagenet_is_written_once_and_mapped(tmp_path, monkeypatch):
    source, cache = tmp_path / "source", tmp_path / "cache"
    made = imagenet(source)
    first = data.load(source, format="imagenet32", cache=str(cache))
    assert len(list(cache.glob("*.npy"))) == 2 and not list(cache.glob("*tmp*")) and not list(source.glob("*.npy"))
    with monkeypatch.context() as patch:
        patch.setattr("fastflow.data.imagenet._images", None)  # the pixels are not read again
        again = data.load(source, format="imagenet32", cache=str(cache))
    assert again.fingerprint() == first.fingerprint() and torch.equal(again.train, first.train)
    maps = Path("/proc/self/maps").read_text()
    assert all(f"rw-p {'0' * 8}" in line for line in maps.splitlines() if str(cache) in line) and str(cache) in maps
    again.train[1] = 0  # the process's own: neither the file nor what others map changes
    assert first.train[1].any() and not again.train[1].any()
    assert data.load(source, format="imagenet32", cache=str(cache)).fingerprint() == first.fingerprint()
    pixels, labels = made[0]
    np.savez(source / "train_data_batch_1.npz", data=255 - pixels, labels=labels)
    changed = data.load(source, format="imagenet32", cache=str(cache))
    assert np.array_equal(changed.train[:4].flatten(1).numpy(), 255 - pixels) and len(list(cache.glob("*.npy"))) == 3


def test_several_processes_write_imagenet_once(tmp_path):
    imagenet(tmp_path)
    code = ("import sys, fastflow.data.imagenet as i; from pathlib import Path; real = i._images\n"
            "i._images = lambda *a: (print('read'), real(*a))[1]\n"
            "print(i.read(Path(sys.argv[1]), 32)[0].sum())")
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert sum(words.count("read") for words in said) == 3 and len({words[-1] for words in said}) == 1


def test_a_cache_that_is_damaged_or_in_the_way_names_itself(tmp_path):
    imagenet(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataFileError, match="file.*npy: can't be written .*data.cache says where"):
        data.load(tmp_path, format="imagenet32", cache=str(tmp_path / "file"))
    data.load(tmp_path, format="imagenet32")
    (cached,) = tmp_path.glob("fastflow-imagenet32-train-*.npy")
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(data.DataFileError, match="npy: can't be read .*delete it"):
        data.load(tmp_path, format="imagenet32")


def test_images_that_memory_has_no_room_to_copy_are_mapped_to_be_read(tmp_path, monkeypatch):
    imagenet(tmp_path)
    load = np.load

    def limited(path, mmap_mode, **options):
        if mmap_mode == "c":  # the kernel promises memory for what may be written
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(path, mmap_mode=mmap_mode, **options)

    monkeypatch.setattr(np, "load", limited)
    with pytest.warns(UserWarning, match="not writable"):
        assert len(data.load(tmp_path, format="imagenet32").train) == 8


def test_what_a_killed_conversion_left_goes(tmp_path):
    imagenet(tmp_path)
    data.load(tmp_path, format="imagenet32")
    (cached,) = tmp_path.glob("fastflow-imagenet32-train-*.npy")
    cached.rename(cached.with_suffix(".tmp-123"))
    data.load(tmp_path, format="imagenet32")
    assert cached.is_file() and not list(tmp_path.glob("*.tmp-*"))


class Evil:
    def __reduce__(self):
        return eval, ("__import__('sys').modules.__setitem__('canary', 1)",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_objects_are_refused_and_not_run(tmp_path, suffix):
    import sys

    path = tmp_path / f"table{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, np.array([[Evil()]], object))
    with pytest.raises(data.DataFileError, match="holds object, expected numbers"):
        data.load(path)
    assert "canary" not in sys.modules


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976, 8), }"
    header += b" " * (117 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(data.DataFileError, match=f"{name}: has 64 bytes of data where its header promises"):
            data.load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
def test_tables(tmp_path, suffix):
    rows, path = table(), tmp_path / f"table{suffix}"
    write(path, rows)
    found = data.load(path, test_fraction=0.2)
    assert found.train.dtype == torch.float32 and len(found.test) == 4 and found.event_shape == (3,)
    assert found.columns == (("x0", "x1", "x2") if suffix in (".npy", ".npz") else ("a", "b", "c"))
    together = {tuple(row) for part in (found.train, found.test) for row in part.tolist()}
    assert together == {tuple(row) for row in rows.tolist()}
    assert found.fingerprint() == data.load(path, test_fraction=0.2).fingerprint()
    assert found.fingerprint() != data.load(path, test_fraction=0.25).fingerprint()
    whole = path.read_bytes()
    for length in (0, 1) if suffix == ".csv" else (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(data.DataFileError, match=f"table{suffix}: "):
            data.load(path)
    if suffix == ".parquet":
        at = whole.index(rows[:, 1].tobytes()[:8])
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(data.DataFileError, match="table.parquet: .*CRC"):
            data.load(path)
    bad = rows.copy()
    bad[7, 1] = np.nan
    write(path, bad)
    with pytest.raises(data.DataFileError, match="row 7, column (b|x1): nan is missing, not finite"):
        data.load(path)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_tables_with_a_split(tmp_path, suffix):
    train, test = table(6), table(5)
    write(tmp_path / f"train{suffix}", train)
    write(tmp_path / f"valid{suffix}", test)
    found = data.load(tmp_path)
    assert np.array_equal(found.train, train) and np.array_equal(found.test, test)
    if suffix == ".csv":
        write(tmp_path / "valid.csv", test, ("a", "b", "z"))
        with pytest.raises(data.DataFileError, match="valid.csv: has columns a, b, z, the training part a, b, c"):
            data.load(tmp_path)
    np.savez(tmp_path / "both.npz", train=train, test=test)
    assert np.array_equal(data.load(tmp_path / "both.npz").test, test)
    more = table(4)
    write(tmp_path / f"test{suffix}", more)  # beside valid, which becomes the validation part
    np.savez(tmp_path / "three.npz", train=train, val=test, test=more)
    if suffix == ".csv":
        write(tmp_path / "valid.csv", test)
    for found in (data.load(tmp_path), data.load(tmp_path / "three.npz", validation_fraction=0.5)):
        for part, rows in (("train", train), ("validation", test), ("test", more)):
            assert np.array_equal(getattr(found, part), rows)


@pytest.mark.parametrize("kind", ["table", "pictures"])
def test_a_validation_part_is_taken_from_the_training_part(tmp_path, kind):
    if kind == "table":
        write(tmp_path / "t.npy", table(50))
        path = tmp_path / "t.npy"
    else:
        path = tmp_path / "p"
        pictures(path, [f"{i % 2}/{i:02}" for i in range(50)])
    whole, found = (data.load(path, test_fraction=0.2, validation_fraction=share) for share in (0.0, 0.25))
    assert whole.validation is None and [len(p) for p in (found.train, found.validation, found.test)] == [30, 10, 10]
    assert torch.equal(whole.test, found.test) and whole.fingerprint() != found.fingerprint()
    again = torch.cat([found.train, found.validation]).flatten(1)
    assert {tuple(row) for row in again.tolist()} == {tuple(row) for row in whole.train.flatten(1).tolist()}
    if kind == "pictures":
        assert len(found.validation_labels) == 10 and len(found.train_labels) == 30
    with pytest.raises(ValueError, match="validation_fraction: expected a number between 0 and 1"):
        data.load(path, validation_fraction=1.5)


def test_tables_that_ship():
    pytest.importorskip("sklearn")
    cells = data.load("breast-cancer")
    assert (len(cells.train), len(cells.test)) == (455, 114) and cells.columns[0] == "mean_radius"
    pytest.importorskip("skimage")
    patches = data.load("patches")
    assert patches.event_shape == data.TABLES["patches"] and len(patches.train) > 100_000
    last = -patches.train.sum(1)  # what was left out: all 64 have mean 0
    assert patches.train.abs().max() < 1.0 and last.abs().max() < 1.0
    assert data.load("patches").fingerprint() == patches.fingerprint()
    with pytest.raises(ValueError, match="test_fraction: patches has no such option"):
        data.load("patches", test_fraction=0.5)


def test_csv_without_names_and_what_is_no_number(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,2\n3,4\n5,6\n7,8\n")
    found = data.load(path, test_fraction=0.5)
    assert found.columns == ("x0", "x1") and len(found.train) == 2
    for content, reason in (("a,b\n1,x\n", "x"), ("a,b\n1,2\n3\n", "columns"), ("a,b\n", "holds no rows"),
                            ("a,b,c\n1,2\n3,4\n", "3 columns in its first line and 2"), ("a\n1e300\n2\n", "row 0"),
                            ("1,,3\n1,2,3\n", "line 1: '' is neither"), ("1,NA,3\n1,2,3\n", "line 1: 'NA' is neither"),
                            ("1,null,-\n1,2,3\n", "line 1: 'null'"), ("1,2,-\n1,2,3\n", "line 1: '-'"),
                            ("a,,b\n1,2,3\n", "line 1: '' is neither"), ("a,b\0\n1,2\n", "NUL")):
        path.write_text(content)
        with pytest.raises(data.DataFileError, match=f"t.csv: .*{reason}"):
            data.load(path)


def test_standardized(tmp_path):
    np.save(tmp_path / "t.npy", np.stack([5.0 + 3.0 * table(50)[:, 0], np.full(50, 2.0)], 1))
    found = data.load(tmp_path / "t.npy").standardized()
    assert torch.allclose(found.train[:, 0].mean(), torch.zeros(()), atol=1e-6)
    assert torch.allclose(found.train[:, 0].std(correction=0), torch.ones(()), atol=1e-6)
    assert found.train[:, 1].eq(0).all() and found.test[:, 0].std() > 0.3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folders_of_pictures(tmp_path, mode):
    train = pictures(tmp_path / "train", ["cat/1", "cat/2", "dog/1"], mode)
    test = pictures(tmp_path / "val", ["cat/3", "dog/9"], mode)
    found = data.load(tmp_path)
    assert np.array_equal(found.train, train) and np.array_equal(found.test, test)
    assert found.train_labels.tolist() == [0, 0, 1] and found.test_labels.tolist() == [0, 1]
    assert data.load(tmp_path, size=3).image_shape == (3 if mode == "RGB" else 1, 3, 3)
    more = pictures(tmp_path / "test", ["cat/7"], mode)
    found = data.load(tmp_path)  # val is the validation part now
    assert np.array_equal(found.validation, test) and found.validation_labels.tolist() == [0, 1]
    assert np.array_equal(found.test, more) and np.array_equal(found.train, train)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("colour", [True, False])
def test_pictures_of_more_than_8_bits_are_named(tmp_path, dtype, colour):
    """Beside 8-bit ones, in colour or grey, as well as alone."""
    image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra data, is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    for i in range(4):
        image.fromarray(pixels if colour else pixels[:, :, 0]).save(tmp_path / f"{i}.tif")
    image.fromarray(200 * pixels[:, :, 0].astype(dtype)).save(tmp_path / "2.tif")
    with pytest.raises(data.DataFileError, match=r"2.tif: has pixels of mode (I|I;16|F), expected 8 bits"):
        data.load(tmp_path)


def test_a_folder_without_a_split(tmp_path):
    made = pictures(tmp_path, [f"{i:02}" for i in range(10)])
    found = data.load(tmp_path, test_fraction=0.3)
    assert found.train_labels is None and (len(found.train), len(found.test)) == (7, 3)
    assert {p.tobytes() for p in made} == {p.numpy().tobytes() for p in (*found.train, *found.test)}
    whole = (tmp_path / "05.png").read_bytes()
    for damaged in (whole[:40], whole[: len(whole) // 2], b"", b"no picture"):
        (tmp_path / "05.png").write_bytes(damaged)
        with pytest.raises(data.DataFileError, match="05.png: can't be read"):
            data.load(tmp_path)
    pictures(tmp_path, ["05"], size=(5, 5))
    with pytest.raises(data.DataFileError, match="05.png: is 5x5 pixels, but .*00.png is 4x6; give size"):
        data.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataFileError, match="empty: holds no pictures"):
        data.load(tmp_path / "empty")


def test_hugging_face_tables(tmp_path):
    rows = table(12)
    last = saved(tmp_path / "d", {"a": rows[:, 0], "vector": [list(map(float, r[1:])) for r in rows]}, shards=3)
    found = data.load(tmp_path / "d", test_fraction=0.25)
    assert found.columns == ("a", "vector.0", "vector.1") and len(found.train) == 9
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for p in (found.train, found.test) for r in p.tolist()}
    whole = last.read_bytes()
    for length in (0, 30, len(whole) // 2, len(whole) - 1):
        last.write_bytes(whole[:length])
        with pytest.raises(data.DataFileError, match="data-00002-of-00003.arrow: "):
            data.load(tmp_path / "d")
    last.unlink()
    with pytest.raises(data.DataFileError, match="data-00002-of-00003.arrow: "):
        data.load(tmp_path / "d")


def test_hugging_face_pictures(tmp_path):
    made = pictures(tmp_path / "source", [str(i) for i in range(4)])
    cells = [{"bytes": (tmp_path / f"source/{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(4)]
    for name in ("train", "test"):
        saved(tmp_path / "d" / name, {"image": cells, "label": [3, 1, 2, 0]}, _split=name)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = data.load(tmp_path / "d")
    assert np.array_equal(found.train, made) and np.array_equal(found.test, made) and found.validation is None
    assert found.test_labels.tolist() == [3, 1, 2, 0]
    saved(tmp_path / "d" / "validation", {"image": cells[:2], "label": [3, 1]}, _split="validation")
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["validation", "train", "test"]}')
    found = data.load(tmp_path / "d")
    assert np.array_equal(found.validation, made[:2]) and found.validation_labels.tolist() == [3, 1]
    saved(tmp_path / "bare", {"image": [{"bytes": None, "path": "0.png"}]})
    with pytest.raises(data.DataFileError, match="bare, image 0: is not inside the dataset"):
        data.load(tmp_path / "bare")
    saved(tmp_path / "some", {"image": cells, "label": [3, None, 1, 2]})
    with pytest.raises(data.DataFileError, match="some: column label: 1 values are missing"):
        data.load(tmp_path / "some")


def test_hugging_face_metadata_is_checked(tmp_path):
    saved(tmp_path / "d", {"a": [1.0, 2.0, 3.0]}, _split="train")
    info = {"splits": {"train": {"num_examples": 4}}}  # as select() and filter() leave it: of what they chose from
    (tmp_path / "d/dataset_info.json").write_text(json.dumps(info))
    assert len(data.load(tmp_path / "d", test_fraction=0.4).train) == 2
    for i, state in enumerate(({"_data_files": [{"filename": "../d/data-00000-of-00001.arrow"}]}, {"_data_files": []},
                               {"_data_files": "x.arrow"}, {"_data_files": [{"filename": "/etc/passwd"}]},
                               {"_indices_data_files": [{"filename": "indices.arrow"}]})):
        saved(tmp_path / f"{i}", {"a": [1.0]}, **state)
        with pytest.raises(data.DataFileError, match="state.json: does not list .arrow files beside it"):
            data.load(tmp_path / f"{i}")
    for text in ("[" * 100_000, "[]", '{"_data_files"'):
        (tmp_path / "d/state.json").write_text(text)
        with pytest.raises(data.DataFileError, match="state.json: "):
            data.load(tmp_path / "d")
    for column, reason in ((["x", "y"], "expected numbers, got string"), ([1.0, None], "1 values are missing"),
                           ([[1.0], [1.0, 2.0]], "can't be read"), ([{"bytes": 1}] * 2, "numbers, got struct<bytes")):
        folder = tmp_path / reason[:5]
        saved(folder, {"a": column})
        with pytest.raises(data.DataFileError, match=reason):
            data.load(folder)


def test_what_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no data"):
        data.load(tmp_path / "nowhere.npy")
    with pytest.raises(ValueError, match="format: expected one of cifar10"):
        data.load(tmp_path, format="mnist")
    with pytest.raises(ValueError, match="verify: table has no such option; it has test_fraction"):
        data.load(tmp_path, format="table", verify=False)
    np.save(tmp_path / "t.npy", table())
    with pytest.raises(ValueError, match="test_fraction: expected a number between 0 and 1"):
        data.load(tmp_path / "t.npy", test_fraction=1.0)
    for name in ("test_fraction", "validation_fraction"):
        with pytest.raises(TypeError, match=f"{name}: expected a number, got str"):
            data.load(tmp_path / "t.npy", **{name: "0.1"})
    (tmp_path / "x.dat").write_bytes(b"")
    with pytest.raises(ValueError, match="format: can't tell"):
        data.load(tmp_path / "x.dat")
