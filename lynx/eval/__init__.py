"""Evaluation: questions answered, counted and shown."""
