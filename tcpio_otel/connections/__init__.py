"""Records to connections: a table of who is talking to whom, and the rules by which a connection lives and ends."""
