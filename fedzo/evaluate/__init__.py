"""How a model is scored on rows."""
