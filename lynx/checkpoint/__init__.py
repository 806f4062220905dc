"""Models on disk: our folders, and the checkpoints of the release."""

from lynx.checkpoint.folder import load, problems, save
from lynx.checkpoint.reference import convert, export_reference, load_reference

__all__ = ["convert", "export_reference", "load", "load_reference", "problems", "save"]
