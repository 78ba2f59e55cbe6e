"""Text and figures from a checkpoint."""
