"""A client's side of a round."""
