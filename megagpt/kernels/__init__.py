"""Fused kernels: a folder an op, one contract and several back ends; `registry.py` chooses."""
