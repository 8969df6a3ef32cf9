"""Which trace a TCP connection serves: what applications say about their own sockets."""
