"""Rotary positions of queries and keys, in one."""
