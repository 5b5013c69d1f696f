"""Studies: runs in processes of their own, compared and reported."""
