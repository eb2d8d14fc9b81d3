"""From metrics to figures and pages, and what a user can say about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """The report of a run and its progress bars."""

    html: bool = True
    """``report.html`` and its figures."""
    progress: bool = True
    """Progress bars on the terminal."""
