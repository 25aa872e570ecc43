"""Pretraining: set up a run, take its steps, save, resume, finish."""
