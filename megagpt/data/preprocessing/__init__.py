"""Text files to pairs: documents, shards, workers and the encoder."""
