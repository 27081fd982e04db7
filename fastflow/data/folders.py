"""Folders of pictures, read with pillow."""

import contextlib
import io

import numpy as np

from fastflow.data.files import TEST_NAMES, DataFileError, named_parts, naming, optional, split

__all__ = ["SUFFIXES", "decode", "read"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
GREY = ("1", "L", "LA")
DEEP = ("I", "F")  # as modes of more than 8 bits begin: integers of 16 or 32, floats
BITS_PER_SAMPLE = 258  # TIFF's tag
ORIENTATION = 0x0112  # EXIF's tag
SIDEWAYS = (5, 6, 7, 8)  # its values for which width and height change places
ERRORS = (OSError, SyntaxError, ValueError, EOFError)


def read(path, size=None, test_fraction=0.1):
    """{"train", "test" and maybe "validation": uint8 (N, C, H, W)}, C = 1 if all pictures are grey, else 3, and for
    each part NAME "NAME_labels", (N,) int64 or None.

    Pictures are taken in the order of their names, turned as their EXIF orientation says; files and folders whose name
    begins with a dot are passed over. Where each lies in a folder of its class, labels are the ranks of the classes'
    names, else None.

    Args:
        path: a folder with train and test (or val, valid, validation in its place, or beside it as the validation
            part), or one whose pictures a fixed split divides.
        size: scale pictures so that the shorter side has this length and cut out the centre; None takes pictures of one
            size as they are.
        test_fraction: share of the test part where the folder has none.

    Raises:
        DataFileError: there are no pictures, one can't be decoded or has more than 8 bits, or sizes differ.
    """
    with naming(path, OSError):
        named = named_parts([name for name in ("train", *TEST_NAMES) if (path / name).is_dir()])
    roots = [path / folder for folder in named.values()] or [path]
    parts = [_pictures(root) for root in roots]
    files = [file for part in parts for file in part]
    labels = _labels(roots, parts)
    images = decode(files, size)
    if named:
        ends = np.cumsum([0, *map(len, parts)])
        rows = {name: slice(*ends[i:i + 2]) for i, name in enumerate(named)}
    else:
        rows = dict(zip(("train", "test"), split(len(files), test_fraction, path), strict=True))
    return {name: images[r] for name, r in rows.items()} | {
        f"{name}_labels": None if labels is None else labels[r] for name, r in rows.items()}


def _pictures(root):
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()
                   and not any(part.startswith(".") for part in f.relative_to(root).parts))
    if not files:
        raise DataFileError(root, f"holds no pictures ({', '.join(SUFFIXES)})")
    return files


def _labels(roots, parts):
    names = [f.relative_to(root).parts for root, part in zip(roots, parts, strict=True) for f in part]
    if any(len(name) != 2 for name in names):
        return None
    rank = {name: i for i, name in enumerate(sorted({name[0] for name in names}))}
    return np.array([rank[name[0]] for name in names], np.int64)


def decode(sources, size=None, named=None):
    """The pictures as one uint8 array (N, C, H, W).

    Args:
        sources: paths, or the bytes of encoded pictures.
        size: see :func:`read`.
        named: names of the sources in errors, if not they themselves.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size: expected a positive int or None, got {size!r}")
    errors = (*ERRORS, optional("PIL.Image", "data", "reading pictures").DecompressionBombError)
    names = sources if named is None else named
    grey, shapes, turned = True, [], []
    for name, source in zip(names, sources, strict=True):  # headers alone, so that what is allocated is known
        with naming(name, *errors), _open(source) as image:
            if image.mode.startswith(DEEP):
                raise DataFileError(name, f"has pixels of mode {image.mode}, expected 8 bits")
            if _deep(image):
                raise DataFileError(name, "has pixels of more than 8 bits a channel, expected 8")
            grey = grey and image.mode in GREY
            orientation = _orientation(image)
            turned.append(orientation != 1)
            shapes.append((image.width, image.height) if orientation in SIDEWAYS else (image.height, image.width))
    if size is None:
        for name, shape in zip(names, shapes, strict=True):
            if shape != shapes[0]:
                raise DataFileError(name, f"is {shape[0]}x{shape[1]} pixels, but {names[0]} is {shapes[0][0]}x"
                                          f"{shapes[0][1]}; give size to scale them alike")
    height, width = shapes[0] if size is None else (size, size)
    out = np.empty((len(names), 1 if grey else 3, height, width), np.uint8)
    for i, (name, source) in enumerate(zip(names, sources, strict=True)):
        with naming(name, *errors), _open(source) as image:
            upright = optional("PIL.ImageOps", "data", "").exif_transpose(image) if turned[i] else image
            plain = upright.convert("L" if grey else "RGB")
            pixels = np.asarray(plain if size is None else _fitted(plain, size))
            out[i] = pixels[None] if grey else pixels.transpose(2, 0, 1)
    return out


def _open(source):
    image = optional("PIL.Image", "data", "reading pictures")
    return image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _deep(image):
    """Whether the file has more than 8 bits a channel in colour, of which pillow would drop the lower ones unsaid."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8
    layouts = [tile[3] for tile in image.tile]
    if image.format == "PPM":
        return any(isinstance(layout, tuple) and layout[1] > 255 for layout in layouts)
    return any("16" in str(layout) for layout in layouts) if image.format == "PNG" else False


def _orientation(image):
    """What EXIF in the file's header says; 1 is upright. Of a TIFF pillow has heeded it already."""
    found = 1
    if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):  # else a PNG would be decoded whole
        with contextlib.suppress(Exception):  # EXIF that is damaged raises anything, and the pixels may be whole
            found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(2, 9) else 1


def _fitted(image, size):
    image_ops = optional("PIL.ImageOps", "data", "reading pictures")
    return image_ops.fit(image, (size, size), method=optional("PIL.Image", "data", "").Resampling.BICUBIC)
