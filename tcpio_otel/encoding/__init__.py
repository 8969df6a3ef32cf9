"""Records and connection events to bytes: pure functions of their input, no I/O."""
