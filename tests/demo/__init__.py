"""`python -m tests.demo`: two services, one lost packet, and the trace that tells which request it hit."""
