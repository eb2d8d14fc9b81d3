"""What is written to disk and wire: dataclasses whose fields declare their ranges, and one strict decoder for them."""
