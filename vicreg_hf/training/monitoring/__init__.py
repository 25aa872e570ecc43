"""Measurements, pictures and messages of a run."""
