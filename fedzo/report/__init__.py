"""From metrics to figures and pages, and what a user can say about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What a run leaves for people to look at, beside log and metrics."""

    html: bool = True
    """``report.html`` and its figures."""
    progress: bool = True
    """Progress bars on the terminal."""
