"""The mathematics of the data stages, without Ray: readers, cleaning, shards, sampling."""
