"""The command line: front door 2."""
