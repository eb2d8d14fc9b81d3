"""What Flower loads on the server."""
