"""Export: merging adapters, and checkpoints and files that other tools load."""
