"""Diffusion transformers (DiT, SiT) trained on your own images, as one versioned pipeline."""

__version__ = "0.1.0"
