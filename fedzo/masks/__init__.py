"""Which weights a static mask trains."""
