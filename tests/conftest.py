"""Settings of all tests: no hub, no paid endpoint, and a separate cache."""

import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import httpcore2
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # documented commands
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is computed here is small, and several threads get in each other's way
os.environ["CASCADEVLM_LOCAL_ONLY"] = "1"
os.environ["CASCADEVLM_CACHE_DIR"] = tempfile.mkdtemp(prefix="cascadevlm-tests-")

sys.dont_write_bytecode = False  # a hundred processes begin here: to compile torch anew would take each of them 15 seconds
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

httpcore2.default_ssl_context = cache(httpcore2.default_ssl_context)  # else 20 ms for each of thousands of clients

settings.register_profile("tests", deadline=None, max_examples=40)  # a busy machine is no defect
settings.load_profile("tests")

SLOWEST = ("test_documentation.py", "test_cluster.py", "test_notebooks.py", "test_journeys.py", "test_run.py", "test_bulk.py")
"""These files run first: a file runs in one process, and at the end the other process would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOWEST)
