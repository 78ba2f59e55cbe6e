"""Text to tokens to samples: formats, tokenizers, datasets and the sampler; without torch."""
