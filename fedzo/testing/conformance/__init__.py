"""Checks that a plugin keeps the contract of its kind (``docs/how-to-test-a-plugin.md``)."""
