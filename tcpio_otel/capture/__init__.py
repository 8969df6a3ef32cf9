"""Sources: the live probe and pcap files, each of which yields batches of records in time order."""
