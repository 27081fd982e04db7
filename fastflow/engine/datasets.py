"""The data that settings name, checked against them, and what of the data a model is built from."""

from pathlib import Path

from fastflow import data
from fastflow.engine.errors import SettingsError
from fastflow.engine.settings import from_dict

__all__ = ["completed", "example_shape", "is_table", "levels_of_values", "load_data"]

OPTIONS = ("size", "test_fraction", "verify", "cache")


def load_data(settings):
    """The :class:`~fastflow.data.ImageData` or :class:`~fastflow.data.TableData` of ``settings.data``.

    Raises:
        SettingsError: nothing is at the path (the message says what to get and where to put it), the data are of
            another kind or shape than the settings say, an option is not theirs, or a library that they need is not
            installed.
        DataFileError: a file is truncated or corrupt; the message names it.
    """
    chosen = settings.data
    defaults = type(chosen).model_fields
    options = {name: getattr(chosen, name) for name in OPTIONS if getattr(chosen, name) != defaults[name].default}
    try:
        # As a Path, for text may name data that ship: a folder of the user's own may be called digits, too.
        found = data.load(chosen.name or Path(chosen.path), format=chosen.format,
                          validation_fraction=chosen.validation_fraction, **options)
    except ImportError as error:
        raise SettingsError(f"data.{'path' if chosen.name is None else 'name'}: {error}") from error
    except FileNotFoundError as error:
        if chosen.name is not None or error.filename != str(Path(chosen.path)):
            raise
        what = chosen.where_from()
        put = f"put {what} there, or " if what else ""
        raise SettingsError(f"data.path: there is nothing at {chosen.path}; {put}say where the data are with --set "
                            f"data.path=PATH (nothing is downloaded)") from error
    except data.DataFileError:
        raise
    except ValueError as error:
        raise SettingsError(f"data.{error}") from error
    completed(settings, found)
    return found


def completed(settings, found):
    """The settings with ``data.shape`` and ``data.columns`` as the data have them: what a model can be built from, and
    rows drawn from it be named by, without them.

    Raises:
        SettingsError: they name another shape or size, or a model for another kind of data.
    """
    shape, known = found.event_shape, settings.data.known_shape()
    if known and known != shape:
        raise SettingsError(f"data.shape: the settings have {list(known)}, the data at {found.name} {list(shape)}")
    columns = getattr(found, "columns", ())
    if settings.data.columns and settings.data.columns != columns:
        raise SettingsError(f"data.columns: the settings have {', '.join(settings.data.columns)}, the data at "
                            f"{found.name} {', '.join(columns) or 'none'}")
    size = getattr(settings.model, "dataset_size", 0)
    if size and size != len(found.train):
        raise SettingsError(f"model.dataset_size: {size}, and {found.name} has {len(found.train)} training images")
    raw = settings.model_dump()
    return from_dict(raw | {"data": raw["data"] | {"shape": shape, "columns": columns}})


def example_shape(settings):
    """(C, H, W) of an image or (D,) of a row.

    Raises:
        SettingsError: only the data can tell.
    """
    shape = settings.data.known_shape()
    if not shape:
        raise SettingsError("data.shape: can't be known without the data; give it, such as --set data.shape=[3,64,64]")
    return shape


def is_table(settings):
    """Whether the data are rows of real numbers."""
    return len(example_shape(settings)) == 1


def levels_of_values(settings):
    """How many levels the values of the images have."""
    return data.DATASETS[settings.data.name][1] if settings.data.name in data.DATASETS else 256
