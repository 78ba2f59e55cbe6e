"""Fused kernels: a folder an op, with one contract and several back ends; chosen by `registry.py`."""
