"""Planning: what a training run needs, what fits, how long it takes; without torch."""
