"""A fuzz test of `generate`: random calls, an oracle that is plain `generate`, shrinking, and planted faults."""
