"""From a corpus of Parquet files to the rows of a shard."""
