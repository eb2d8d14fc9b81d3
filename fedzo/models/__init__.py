"""Causal language models: loading, the loss on answer tokens, scores, generation."""
