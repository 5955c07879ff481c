"""CNN layers for PyTorch whose backward passes are derived by hand."""

from manual_ops import functional, nn
from manual_ops.convert import ConvertedLayers, convert, converted_layers, intercept
from manual_ops.modes import backend, current_backend, current_precision, precision, set_backend, set_precision
from manual_ops.recipes import lean

__version__ = "0.1.0"

__all__ = [
    "ConvertedLayers",
    "backend",
    "convert",
    "converted_layers",
    "current_backend",
    "current_precision",
    "functional",
    "intercept",
    "lean",
    "nn",
    "precision",
    "set_backend",
    "set_precision",
]
