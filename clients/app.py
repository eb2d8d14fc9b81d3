"""Flower ClientApp entry point."""

from fedzo.run.apps import make_client_app

app = make_client_app()
