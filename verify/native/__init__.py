"""The C sources of forward passes of small batches, compiled on the user's machine at first use."""
