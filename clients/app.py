"""Flower ClientApp entry point."""

from fedzo.apps import make_client_app

app = make_client_app()
