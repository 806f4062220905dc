"""Where ``tiny`` was before ``lynx.presets``."""

from lynx.presets import tiny

__all__ = ["tiny"]
