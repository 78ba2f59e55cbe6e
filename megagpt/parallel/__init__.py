"""Who is which rank, and collectives that autograd knows."""
