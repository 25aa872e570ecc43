"""Segmentation by a linear head on the feature maps of a frozen encoder."""
