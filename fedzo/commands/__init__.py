"""What the commands do with runs: start, resume, replay, use."""
