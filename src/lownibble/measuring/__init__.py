"""How things are measured: processes that take turns, and statistics over runs."""
