"""`lownibble serve`: one 4-bit base, many adapters, chosen per request, behind an OpenAI-compatible API."""
