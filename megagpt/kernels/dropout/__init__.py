"""Keyed dropout: whether an element stays is a function of a key and its place."""
