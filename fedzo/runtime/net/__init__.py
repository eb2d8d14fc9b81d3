"""Real SuperLinks and SuperNodes: processes, identity, warm executor."""
