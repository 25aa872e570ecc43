"""Backbones of timm and transformers, the expander, the second branch, batch normalisation."""

MODALITIES = ("image", "text", "audio", "embedding")
"""Inputs of a branch: pixels; token ids; waveforms or spectrograms; precomputed vectors. They stand
here so that settings, which need them, do not import torch."""
