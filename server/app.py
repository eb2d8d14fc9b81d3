"""Flower ServerApp entry point."""

from fedzo.run.apps import make_server_app

app = make_server_app()
