"""Pairs to samples: order, blends, the index cache, masks and the sampler."""
