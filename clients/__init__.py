"""What Flower loads on a client site."""
