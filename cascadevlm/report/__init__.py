"""Reports: runs as one HTML page that needs nothing beside itself."""

from cascadevlm.report.page import Run, read_run, render
from cascadevlm.report.studies import StudyResult, read_studies

__all__ = ["Run", "StudyResult", "read_run", "read_studies", "render"]
