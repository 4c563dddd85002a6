"""The HTML report of a label job: one file that shows what a lake's masks look like, and how they came about."""

from __future__ import annotations

from tinysam.report.page import ReportConfig, ReportError, write_report

__all__ = ["ReportConfig", "ReportError", "write_report"]
