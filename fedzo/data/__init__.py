"""Tasks, files, partitions and the order of rows."""
