"""What pictures carry beside their pixels: depth, orientation, size; and what else lies in their folders."""

import struct
import zlib

import numpy as np
import pytest
from data_files import pictures

from fastflow import data

image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra data, is not installed")


def png(path, colour, channels):
    """A PNG of 16 bits a channel, 6x4 pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 6, 4, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(12 * channels) for _ in range(4))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def tiff(path):
    """A TIFF of 16 bits a channel in RGB, 6x4 pixels."""
    short, long = 3, 4
    entries = [(256, long, 1, 6), (257, long, 1, 4), (258, short, 3, 8), (259, short, 1, 1), (262, short, 1, 2),
               (273, long, 1, 14), (277, short, 1, 3), (278, long, 1, 4), (279, long, 1, 144)]
    path.write_bytes(struct.pack("<2sHI3H", b"II", 42, 158, 16, 16, 16) + bytes(144) + struct.pack("<H", len(entries))
                     + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4))


@pytest.mark.parametrize(("name", "write"), [
    ("rgb.png", lambda path: png(path, 2, 3)), ("rgba.png", lambda path: png(path, 6, 4)),
    ("grey-alpha.png", lambda path: png(path, 4, 2)), ("rgb.tif", tiff),
    ("rgb.ppm", lambda path: path.write_bytes(b"P6 6 4 65535\n" + bytes(144))),
    ("plain.ppm", lambda path: path.write_bytes(b"P3 6 4 1023\n" + b"0 " * 72))])
def test_colours_of_more_than_8_bits_are_named(tmp_path, name, write):
    """Which pillow would cut down to 8 without a word."""
    pictures(tmp_path, ["0", "1"])
    write(tmp_path / name)
    with image.open(tmp_path / name) as opened:
        opened.load()  # it is a picture
        assert opened.mode in ("RGB", "RGBA", "LA")
    with pytest.raises(data.DataFileError, match=f"{name}: has pixels of more than 8 bits a channel"):
        data.load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm", "bmp", "gif"])
def test_colours_of_8_bits_are_read(tmp_path, suffix):
    pictures(tmp_path, ["0", "1"], suffix=suffix)
    assert data.load(tmp_path, test_fraction=0.5).image_shape == (3, 4, 6)


def test_a_picture_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    pictures(tmp_path, ["0", "1"])
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(data.DataFileError, match="0.png: can't be read: Image size .24 pixels. exceeds limit"):
        data.load(tmp_path)


def test_what_begins_with_a_dot_is_no_picture(tmp_path):
    made = pictures(tmp_path, ["cat/1", "cat/2", "dog/3", "dog/4"])
    (tmp_path / "cat" / "._1.png").write_bytes(b"a resource fork of macOS")
    pictures(tmp_path / ".ipynb_checkpoints", ["1-checkpoint"], size=(9, 9))
    found = data.load(tmp_path, test_fraction=0.5)
    assert len(found.train) + len(found.test) == len(made) and int(found.train_labels.max()) <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_pictures_are_turned_as_exif_says(tmp_path, suffix, orientation):
    made = pictures(tmp_path / "train", ["0"], size=(4, 6) if orientation == 6 else (6, 4))
    (tmp_path / "test").mkdir()
    camera = image.fromarray(np.rot90(made[0].transpose(1, 2, 0), 1 if orientation == 6 else 2).copy())
    exif = image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    camera.save(tmp_path / "test" / f"0.{suffix}", exif=exif, **options)
    assert np.array_equal(data.load(tmp_path).test[0], made[0])


def test_damaged_exif_is_ignored(tmp_path):
    made = pictures(tmp_path, ["0", "1"])
    image.fromarray(made[1].transpose(1, 2, 0)).save(tmp_path / "1.png", exif=b"Exif\0\0MM\0*\xff")
    assert data.load(tmp_path, test_fraction=0.5).image_shape == (3, 4, 6)
