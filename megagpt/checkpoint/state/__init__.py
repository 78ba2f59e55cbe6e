"""What a rank holds of weights and optimizer state, and copies of it."""
