"""The data plane: sources -> shards with an index -> a pure global order -> batches."""
