"""Megatron's .bin/.idx pairs: reading, writing, checking, and the manifest beside them."""
