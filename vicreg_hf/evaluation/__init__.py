"""Protocols that measure an encoder on a labelled data set, and their results."""
