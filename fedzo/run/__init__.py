"""What runs at the server and at a client: their contexts, the course of a run, and Flower's two apps."""
