"""What saving and loading cost at up to 16,384 ranks: the real planning, a simulated network."""
