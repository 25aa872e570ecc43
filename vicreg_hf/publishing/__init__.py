"""Encoders that were trained: finding, loading, converting and publishing them."""
