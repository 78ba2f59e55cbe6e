"""Output layer and cross entropy in one, so that logits never exist whole."""
