"""What memory is used, what the planner says of it, and fitting into a budget."""
