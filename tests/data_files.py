"""Small files of the true formats that fastflow.data reads."""

import io
import json
import struct
import tarfile

import numpy as np
import pytest

from fastflow.data import cifar10

RNG = np.random.default_rng(0)
NAMES = (*cifar10.TRAIN, cifar10.TEST)


def batch(seed, n=3):
    """(pixels (n, 3072), labels) of one batch."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 10, n).tolist()


def text(value):
    return b"U" + bytes([len(value)]) + value


def pickled(pixels, labels, call=b"cnumpy.core.multiarray\n_reconstruct\n"):
    """The opcodes of cPickle's protocol 2 for such a batch; its strings are bytes, its keys in this order."""
    raw = pixels.tobytes()
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    dtype = (b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
             + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb")
    array = (call + b"cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01" + shape + dtype + b"\x89T"
             + struct.pack("<i", len(raw)) + raw + b"tb")
    return (b"\x80\x02}(" + text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + b"]("
            + b"".join(b"K" + bytes([label]) for label in labels) + b"e" + text(b"data") + array
            + text(b"filenames") + b"](" + text(b"camion_s_000148.png") * len(labels) + b"eu.")


def binary(pixels, labels):
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()


def files(suffix):
    write = binary if suffix else pickled
    return {f"{cifar10.FOLDERS[suffix]}/{name}{suffix}": write(*batch(i)) for i, name in enumerate(NAMES)}


def extracted(root, suffix):
    for name, content in files(suffix).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


def archive(path, contents):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def imagenet(folder, size=32, parts=2):
    """The files' arrays as the authors' scripts write them: data, labels, mean."""
    folder.mkdir(exist_ok=True)
    made = []
    for name in [*(f"train_data_batch_{i}" for i in range(1, parts + 1)), "val_data"]:
        pixels, labels = RNG.integers(0, 256, (4, 3 * size**2), np.uint8), RNG.integers(1, 1001, 4)
        np.savez(folder / f"{name}.npz", data=pixels, labels=labels, mean=pixels.mean(0))
        made.append((pixels, labels))
    return made


def table(n=20, d=3):
    return RNG.normal(size=(n, d)).astype(np.float32)


def write(path, rows, names=("a", "b", "c")):
    if path.suffix == ".npy":
        np.save(path, np.asfortranarray(rows.astype(">f8")))
    elif path.suffix == ".npz":
        np.savez_compressed(path, rows)
    elif path.suffix == ".csv":
        np.savetxt(path, rows, "%.9g", ",", header=",".join(names), comments="")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table(dict(zip(names, rows.T, strict=True)))
        parquet.write_table(table, path, write_page_checksum=True)


def pictures(root, names, mode="RGB", size=(6, 4), suffix="png"):
    image = pytest.importorskip("PIL.Image")
    made = []
    for name in names:
        pixels = RNG.integers(0, 256, (*size[::-1], 3)[:3 if mode == "RGB" else 2], np.uint8)
        path = root / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)
        made.append(pixels.transpose(2, 0, 1) if mode == "RGB" else pixels[None])
    return np.stack(made)


def saved(folder, columns, shards=1, **state):
    """What Dataset.save_to_disk of the datasets library 5.2 leaves."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    whole = arrow.table(columns)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    step = -(-len(whole) // shards)
    for i, name in enumerate(names):
        part = whole.slice(i * step, step)
        with arrow.ipc.new_stream(folder / name, part.schema) as writer:
            writer.write_table(part)
    entry = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "4dbaaf97fb9ef444",
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
             "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(entry))
    info = {"features": {}, "splits": {"train": {"name": "train", "num_examples": len(whole)}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder / names[-1]
