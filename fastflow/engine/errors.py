"""What stops a run. Each message is one line that a user can act on; the command line prints it and exits."""

__all__ = ["CheckpointError", "DriftError", "NonFiniteError", "RunError", "SettingsError"]


class RunError(RuntimeError):
    """A run can't start or go on."""


class SettingsError(RunError):
    """A recipe or an override asks for something that isn't offered; the message names the field."""


class CheckpointError(RunError):
    """A checkpoint can't be written, or is not what was written; the message names the file and the reason."""


class NonFiniteError(RunError):
    """The loss or a gradient is NaN or infinite; no parameter was changed by that step.

    Attributes:
        module: name in the model of the first module whose output was not finite ("" is the model itself), None if it
            is not known.
    """

    def __init__(self, message, module=None):
        super().__init__(message)
        self.module = module


class DriftError(RunError):
    """z recovered by inverting the steps of a flow is too far from what it was; no parameter was changed."""
