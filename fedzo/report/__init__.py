"""From metrics to figures and pages."""
