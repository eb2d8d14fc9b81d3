"""Where a federation runs: in this process, on Ray, on a local SuperLink."""
