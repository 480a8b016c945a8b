"""Datasets: indexing, augmentation, loaders and the pseudo-label store."""
