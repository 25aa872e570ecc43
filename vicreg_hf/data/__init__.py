"""From a data set to batches: splits, classes, loading workers, images that cannot be used."""
