"""Planning: memory, fit and speed of a training run; without torch."""
