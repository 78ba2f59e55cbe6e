"""Set-up of a machine before training."""
