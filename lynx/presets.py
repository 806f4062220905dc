from lynx.recipes import tiny  # noqa: F401

PRESETS = {}
