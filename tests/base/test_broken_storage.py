"""A server of S3 that breaks in the middle of a table or an image: one sentence or one failed row, and no traceback."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import fsspec.config
import pyarrow
import pyarrow.parquet
import pytest
from tenacity import wait_none

from cascadevlm.base import remote
from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.tables import ColumnNames
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import noise
from tests.base.test_remote import answering
from tests.cli.test_cli import run

s3fs = pytest.importorskip("s3fs")

ROWS = 200
ROWS_PER_GROUP = 20
BLOCK = 8 << 10
"""Number of bytes that s3fs asks for at once."""

Break = Literal["", "500", "403", "cut", "nonsense"]


class Storage(ThreadingHTTPServer):
    """A bucket. After ``answers_left`` requests for the file ``breaking``, further requests for it get the answer ``broken``."""

    files: dict[str, bytes]
    asked: Counter[str]
    broken: Break = ""
    breaking = ""
    answers_left = 0


class Answers(BaseHTTPRequestHandler):
    server: Storage

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, name = self.server, self.path.partition("?")[0].removeprefix("/bucket/")
        content = server.files[name]
        first, last = 0, len(content) - 1
        if asked := self.headers.get("range"):
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        part, kind = content[first : last + 1], server.broken
        server.asked[name] += self.command == "GET"
        if not kind or name != server.breaking or server.asked[name] <= server.answers_left or self.command == "HEAD":
            self.answer(206 if asked else 200, part, whole=len(part))
        elif kind == "cut":
            self.answer(206, part[: len(part) // 2], whole=len(part))
            self.close_connection = True
        else:
            code = {"500": "InternalError", "403": "AccessDenied"}.get(kind, "")
            text = b"<Error><Code>" if kind == "nonsense" else f"<Error><Code>{code}</Code></Error>".encode()
            self.answer(int((code and kind) or 500), text, whole=len(text))

    def answer(self, status: int, content: bytes, *, whole: int) -> None:
        self.send_response(status)
        self.send_header("content-length", str(whole))
        self.send_header("etag", '"1"')
        self.send_header("last-modified", "Fri, 01 May 2026 12:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket that s3fs asks, with images, and with a table in three forms."""
    serving = Storage(("127.0.0.1", 0), Answers)
    serving.asked = Counter()
    serving.files = {f"{number}.png": png(number) for number in range(3)}
    paths = [f"{number % 3}.png" for number in range(ROWS)]
    texts = [f"{noise(number, (16, 16)).tobytes().hex()}" for number in range(ROWS)]
    rows = [{"path": path, "text": text} for path, text in zip(paths, texts, strict=True)]
    serving.files["table.csv"] = "".join(["path,text\n", *(f"{row['path']},{row['text']}\n" for row in rows)]).encode()
    serving.files["table.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=ROWS_PER_GROUP)
    serving.files["table.parquet"] = file.getvalue()
    options = {
        "endpoint_url": f"http://127.0.0.1:{serving.server_port}",
        "key": "name",
        "secret": "hunter2",
        "default_block_size": BLOCK,
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "WAIT", wait_none())
    monkeypatch.delenv(LOCAL_ONLY)
    with answering(serving):
        yield serving


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed, (16, 16)).save(file, "PNG")
    return file.getvalue()


def run_over(place: str | Path, folder: Path, *more: str, check: bool = True) -> tuple[int, str]:
    """Exit code and messages of a run."""
    common = ("--scorer", "open_clip:aviary", "--set", 'labels=["ant", "bee"]')
    done = run("run", place, "-o", folder, *common, *more, check=check)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("table.csv", "500"),
        ("table.csv", "cut"),
        ("table.jsonl", "403"),
        ("table.parquet", "500"),
        ("table.parquet", "cut"),
        ("table.parquet", "nonsense"),
    ],
)
def test_a_table_that_breaks_off_is_one_sentence(storage: Storage, tmp_path: Path, name: str, broken: Break) -> None:
    inputs = Inputs(f"s3://bucket/{name}", ColumnNames(keep=("text",)))
    assert len([*inputs.about()]) == ROWS
    storage.broken, storage.breaking, storage.answers_left = broken, name, storage.asked[name] // 2
    storage.asked.clear()
    code, told = run_over(f"s3://bucket/{name}", tmp_path / "run", "--keep", "text", check=False)
    assert code == 2
    assert f"Error: 's3://bucket/{name}' cannot be read: " in told
    assert "Check the address, or repeat the command later." in " ".join(told.split())
    assert "Traceback" not in told
    assert "hunter2" not in told
    assert storage.asked[name] > storage.answers_left > 1  # in the middle


def test_a_run_whose_table_broke_off_continues(storage: Storage, tmp_path: Path) -> None:
    place, folder = "s3://bucket/table.parquet", tmp_path / "run"
    run_over(place, tmp_path / "whole", "--keep", "text")
    storage.broken, storage.breaking, storage.answers_left = "cut", "table.parquet", storage.asked["table.parquet"] * 2 // 3
    storage.asked.clear()
    assert run_over(place, folder, "--keep", "text", check=False)[0] == 2
    assert 0 < len((folder / "predictions.jsonl").read_bytes().splitlines()) < ROWS
    storage.broken = ""
    assert run_over(place, folder, "--keep", "text")[0] == 0
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("broken", ["500", "403", "cut", "nonsense"])
def test_an_image_that_breaks_off_is_a_failed_row(storage: Storage, tmp_path: Path, broken: Break) -> None:
    storage.broken, storage.breaking = broken, "1.png"
    (tmp_path / "list.txt").write_text("".join(f"s3://bucket/{number}.png\n" for number in range(3)))
    code, told = run_over(tmp_path / "list.txt", tmp_path / "run")
    assert code == 0
    assert "Traceback" not in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [bool(line["error"]) for line in lines] == [False, True, False]
    assert "Image 's3://bucket/1.png' cannot be " in lines[1]["error"]
    assert "hunter2" not in lines[1]["error"]
