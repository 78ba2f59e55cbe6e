"""Checkpoints to and from Hugging Face folders."""
