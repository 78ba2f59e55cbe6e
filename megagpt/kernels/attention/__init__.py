"""Causal attention, within documents where samples hold several."""
