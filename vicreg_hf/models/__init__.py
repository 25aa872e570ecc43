"""Backbones of timm and transformers, the expander, the second branch, batch normalisation."""
