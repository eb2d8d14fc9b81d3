"""Where a federation runs: in this process, on Ray, on a SuperLink of this machine, on sites elsewhere."""
