"""Reports: runs as one HTML page that needs no other file."""

from cascadevlm.evaluation.report.page import Run, read_run, render
from cascadevlm.evaluation.report.unlabelled import BulkRun, is_bulk_run, read_bulk_run, render_bulk

__all__ = ["BulkRun", "Run", "is_bulk_run", "read_bulk_run", "read_run", "render", "render_bulk"]
