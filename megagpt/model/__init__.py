"""The GPT and its layers."""
