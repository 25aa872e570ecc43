"""From a name, folder, archive or file to the splits of a data set."""
