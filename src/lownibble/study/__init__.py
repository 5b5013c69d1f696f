"""Studies: runs in separate processes, compared and reported."""
