"""Modules under the names that published model cards cite."""
