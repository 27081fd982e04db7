"""What a model does, measured: how exactly a flow inverts, depth by depth."""

from fastflow.diagnostics.inversion import InversionError, inversion_error

__all__ = ["InversionError", "inversion_error"]
