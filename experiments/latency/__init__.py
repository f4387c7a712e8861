"""`minference latency`: time of one attention layer, split into its parts, beside its peers."""
