"""Training on transformers' Trainer."""
