"""What looks at each step and acts on it; the loop hands the step to each in turn."""
