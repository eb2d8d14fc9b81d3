"""What the commands do: with runs, with models, and with the folders of a server and its sites."""
