"""Fused losses and pseudo-label operations for training from class activation maps."""
