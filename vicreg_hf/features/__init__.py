"""Any encoder and the features it gives for a data set, cached or written as parquet."""
