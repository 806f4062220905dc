"""Models on disk: our own folders, and the checkpoints of the released Lynx."""

from lynx.checkpoint.folder import load, problems, save
from lynx.checkpoint.reference import convert, export_reference, load_reference

__all__ = ["convert", "export_reference", "load", "load_reference", "problems", "save"]
