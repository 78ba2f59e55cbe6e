"""Typed configuration, command line, presets and the DeepSpeed JSON."""
