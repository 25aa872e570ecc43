"""From a name, folder, archive or file to the splits of a data set."""

DEMO = "demo"
"""Name of the data set that is built in. It stands here so that settings do not import torch."""
