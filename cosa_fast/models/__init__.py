"""The CoSA network, standalone segmentation networks and checkpoints."""
