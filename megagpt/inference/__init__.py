"""Generation and evaluation from a checkpoint."""
