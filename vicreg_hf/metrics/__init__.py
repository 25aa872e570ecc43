"""Measures of features and labels: pure functions of tensors, without data sets."""
