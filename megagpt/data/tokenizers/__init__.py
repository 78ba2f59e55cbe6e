"""Text to token ids: one protocol, and the tokenizers that speak it."""
