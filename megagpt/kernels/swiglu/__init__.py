"""The gated activation of Llama's MLP."""
