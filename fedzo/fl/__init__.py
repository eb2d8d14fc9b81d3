"""The federation: messages, client, server, log."""
