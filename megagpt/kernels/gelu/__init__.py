"""The activation of GPT-2's MLP."""
