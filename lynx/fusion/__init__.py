"""How pictures enter the language model."""
