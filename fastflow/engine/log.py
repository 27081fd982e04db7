"""The log of a run: one line of JSON for every entry, and TensorBoard's file beside it if asked for."""

import importlib.util

from fastflow.engine.errors import RunError, SettingsError
from fastflow.engine.files import read_log, to_json, write_text

__all__ = ["RunLog", "check_tensorboard"]


def check_tensorboard():
    """Raises SettingsError if TensorBoard's writer is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise SettingsError("train.tensorboard: needs tensorboard, not installed: pip install 'fastflow[tensorboard]'")


class RunLog:
    """Appends to metrics.jsonl; a context manager.

    Args:
        directory: the run's, or None in a process that writes nothing.
        tensorboard: whether to write TensorBoard's event file too, into ``directory``/tensorboard.
        step: the step that the run goes on from; what was logged after it goes: it will be written again.
    """

    def __init__(self, directory, tensorboard=False, step=0):
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._folder = directory / "tensorboard" if tensorboard and directory is not None else None
        self._step, self._file, self._writer = step, None, None

    def __enter__(self):
        if self._path is not None:
            if self._path.is_file():
                entries = read_log(self._path)
                write_text(self._path, "".join(to_json(e) + "\n" for e in entries if e["step"] <= self._step))
            self._file = open(self._path, "a", buffering=1, encoding="utf-8")
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)
        return self

    def __exit__(self, kind, *_):
        try:
            for file in (self._file, self._writer):
                if file is not None:
                    file.close()
        except OSError as error:  # what could not be written is tried once more
            if kind is None:
                raise self._failure(error) from error

    def write(self, step, figures):
        """{name: number} of that step; one that is not finite becomes null.

        Raises:
            RunError: the disk takes no more.
        """
        if self._file is None:
            return
        try:
            self._file.write(to_json({"step": step, **figures}) + "\n")
            if self._writer is not None:
                for name, value in figures.items():
                    group, _, rest = name.partition("_")
                    held_out = group in ("test", "validation")
                    self._writer.add_scalar(f"{group}/{rest}" if held_out else f"train/{name}", value, step)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error):
        return RunError(f"{self._path}: could not be written ({error.strerror or error}); the checkpoints are intact")

    def picture(self, step, name, path):
        """Shows the PNG at ``path`` in TensorBoard."""
        if self._writer is None:
            return
        import numpy
        from PIL import Image

        pixels = numpy.array(Image.open(path))
        self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")
