"""Images at addresses: a server on this machine, and file systems of fsspec."""

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from tenacity import wait_none

from cascadevlm import Cascade
from cascadevlm.base import remote
from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.errors import BackendError, DataError, ImageError
from cascadevlm.base.images import load_image, path_of, size_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.secrets import credentials_of, shown_address
from cascadevlm.base.tables import ColumnNames
from cascadevlm.evaluation.data import read_data
from cascadevlm.runs import bulk
from cascadevlm.runs.export import export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import FakeScorer, noise


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Counts requests per path. ``elsewhere`` is the address that redirects lead to, ``dead`` a missing path."""

    asked: Counter[str]
    elsewhere = ""
    dead = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked[path] += 1
        match path:
            case self.server.dead:
                self.answer(404)
            case "/moved.png":
                self.answer(302, location="/0.png")
            case "/elsewhere.png":
                self.answer(302, location=self.server.elsewhere)
            case "/circle.png":
                self.answer(302, location="/circle.png")
            case "/gone.png":
                self.answer(404)
            case "/forbidden.png":
                self.answer(403)
            case "/busy.png" if self.server.asked[path] < 3:
                self.answer(503)
            case "/down.png":
                self.answer(500)
            case "/page.png":
                self.answer(200, b"<html>no image</html>")
            case "/slow.png":
                self.answer(200, png(), pause=0.2)
            case _:
                self.answer(200, png())

    def answer(self, status: int, content: bytes = b"", *, location: str = "", pause: float = 0.0) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        if location:
            self.send_header("location", location)
        self.end_headers()
        for start in range(0, len(content), 1000):
            self.wfile.write(content[start : start + 1000])
            time.sleep(pause)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[None]:
    """A thread answers the requests to the server."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAIT", wait_none())
    serving = Server(("127.0.0.1", 0), Answers)
    serving.asked = Counter()
    with answering(serving):
        yield serving


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://h/a.jpg?T0KEN", "https://h/a.jpg?***"),
        ("https://h/a.jpg?T0KEN&w=5&more", "https://h/a.jpg?***&w=***&***"),
        ("https://u:p@h/a&b.jpg#t=T0KEN", "https://h/a&b.jpg#t=***"),
        ("s3://bucket/a&b=c#1.jpg", "s3://bucket/a&b=c#1.jpg"),
    ],
)
def test_no_part_of_an_address_that_may_be_secret_is_shown(address: str, shown: str) -> None:
    assert shown_address(address) == shown
    assert ("T0KEN" in credentials_of(address)) == ("T0KEN" in address)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of a file system in memory."""
    files = fsspec.filesystem("memory")
    for number in range(3):
        files.pipe(f"/bucket/images/{number}.png", png(number))
    files.pipe("/bucket/notes.md", b"no image")
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


def test_an_image_is_read_from_an_address(server: Server, bucket: str) -> None:
    for address in (
        f"{server.address}/0.png",
        f"{server.address}/moved.png",
        f"{server.address}/busy.png",
        f"{bucket}/images/0.png",
    ):
        assert load_image(address).tobytes() == noise(0).tobytes()
    assert server.asked["/busy.png"] == 3
    assert size_of(f"{server.address}/0.png") == (48, 32)


@pytest.mark.parametrize(
    ("path", "told", "times"),
    [
        ("gone.png", "does not exist", 1),
        ("forbidden.png", "cannot be downloaded: the server answers with status 403", 1),
        ("down.png", "cannot be downloaded: the server answers with status 500", remote.ATTEMPTS),
        ("circle.png", "the server redirects more than 5 times", remote.MOST_REDIRECTS + 1),
        ("page.png", "is not an image, or has an unknown format", 1),
    ],
)
def test_an_image_that_cannot_be_read_is_told_by_its_address(server: Server, path: str, told: str, times: int) -> None:
    with pytest.raises(ImageError, match=f"Image '{server.address}/{path}' .*{told}"):
        load_image(f"{server.address}/{path}")
    assert server.asked[f"/{path}"] == times


def test_a_redirect_to_another_server_is_refused(server: Server) -> None:
    other = Server(("127.0.0.1", 0), Answers)
    server.elsewhere = f"{other.address}/0.png"
    with other, pytest.raises(ImageError, match=f"redirects to another server, {other.address}"):
        load_image(f"{server.address}/elsewhere.png")


def test_downloads_are_bounded_in_size_and_time(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DOWNLOAD_SECONDS", 0.1)
    with pytest.raises(ImageError, match="cannot be downloaded: it takes longer than 0 seconds"):
        load_image(f"{server.address}/slow.png")
    monkeypatch.setattr(remote, "MAX_DOWNLOAD", 100)
    for address in (f"{server.address}/0.png", f"{bucket}/images/0.png"):
        with pytest.raises(ImageError, match="cannot be downloaded: it is larger than 0 MB"):
            load_image(address)


def test_only_this_machine_is_asked_if_others_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_ONLY, "1")
    for address in ("https://example.com/a.png?key=hunter2", "s3://bucket/a.png", "hf://datasets/a/b/c.png"):
        with pytest.raises(BackendError, match=f"is not on this machine, and {LOCAL_ONLY} is set") as caught:
            load_image(address)
        assert "hunter2" not in str(caught.value)


def test_only_images_are_read_over_https(server: Server) -> None:
    for name in ("table.csv", "folder"):
        with pytest.raises(BackendError, match="is not an image, and only images are read over https"):
            Inputs(f"{server.address}/{name}")


def test_a_missing_package_stops_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LOCAL_ONLY)
    (tmp_path / "list.txt").write_text("oci://bucket/a.png\n")
    with pytest.raises(BackendError, match="oci:// needs a package that is not installed"):
        bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), Inputs(tmp_path / "list.txt"), tmp_path / "run", config={})
    with pytest.raises(BackendError, match="Addresses with unknown:// cannot be read"):
        load_image("unknown://bucket/a.png")


def test_a_temporary_error_of_a_file_system_is_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", wait_none())
    opened, times = MemoryFileSystem.open, Counter[str]()

    def failing(self: MemoryFileSystem, path: str, mode: str) -> object:
        times[path] += 1
        if times[path] < 3:
            raise TimeoutError("slow down")
        return opened(self, path, mode)

    monkeypatch.setattr(MemoryFileSystem, "open", failing)
    assert load_image(f"{bucket}/images/0.png").tobytes() == noise(0).tobytes()
    with pytest.raises(ImageError, match=r"memory://bucket/images/9.png' does not exist"):
        load_image(f"{bucket}/images/9.png")


def test_a_run_over_addresses_has_one_failed_row_each_and_stores_no_credentials(server: Server, tmp_path: Path) -> None:
    login = server.address.replace("http://", "http://user:hunter2@")
    (tmp_path / "list.csv").write_text(
        f"n,url\n1,{login}/1.png?key=s3cret\n2,{server.address}/gone.png\n3,{server.address}/2.png\n"
    )
    images = Inputs(tmp_path / "list.csv", ColumnNames(image="url"))
    for _ in range(2):
        tally = bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), images, tmp_path / "run", config={})
    assert tally.counts == {"kept": 2, "unreadable": 1}
    assert server.asked == {"/1.png": 1, "/gone.png": 1, "/2.png": 1}
    stored = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert b"hunter2" not in stored
    assert b"s3cret" not in stored
    assert f"{server.address}/1.png?key=***".encode() in stored
    assert path_of(f"{login}/1.png?key=s3cret") == f"{server.address}/1.png?key=***"


def test_downloads_of_a_batch_run_at_the_same_time(server: Server) -> None:
    started = time.monotonic()
    predictions = Cascade(FakeScorer(), [], labels=["ant", "bee"]).classify([f"{server.address}/slow.png"] * 12)
    assert all(each.label for each in predictions)
    assert time.monotonic() - started < 12 * 5 * 0.2 * 0.6


def test_tables_and_folders_at_addresses(bucket: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/list.csv", b"image\nimages/2.png\nimages/0.png\n")
    names = [name for name, _ in Inputs(f"{bucket}/list.csv")]
    assert names == ["memory://bucket/images/2.png", "memory://bucket/images/0.png"]
    folder = Inputs("memory://bucket/images")
    assert len(folder) == 3
    assert [load_image(source).tobytes() for _, source in folder] == [noise(number).tobytes() for number in range(3)]


class Refused(Exception):
    """An error that is neither an OSError nor a ValueError, as of the packages for S3 and Google Cloud Storage."""


@pytest.mark.parametrize(
    ("method", "place"), [("isdir", "images"), ("find", "images"), ("open", "list.csv"), ("read", "list.csv")]
)
def test_every_error_of_a_file_system_is_one_sentence_without_credentials(
    bucket: str, monkeypatch: pytest.MonkeyPatch, method: str, place: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise Refused("key T0KEN is unknown\nmore")

    fsspec.filesystem("memory").pipe("/bucket/images?T0KEN/0.png", png())
    fsspec.filesystem("memory").pipe("/T0KEN@bucket/list.csv", b"image\n0.png\n")
    monkeypatch.setattr(MemoryFile if method == "read" else MemoryFileSystem, method, failing)
    with pytest.raises(DataError, match=r"cannot be read: Refused: key \*\*\* is unknown\.") as caught:
        len(Inputs(f"{bucket}/{place}?T0KEN" if place == "images" else f"memory://T0KEN@bucket/{place}"))
    assert "T0KEN" not in str(caught.value)


def test_a_chained_address_and_folders_of_other_systems_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_ONLY)
    login = server.address.replace("http://", "http://user:hunter2@")
    for name in ("a.png", "a.csv"):
        with pytest.raises(BackendError, match=f"'zip://{name}' is followed by '::' and another address") as caught:
            load_image(f"zip://{name}::{login}/x.zip") if name == "a.png" else Inputs(f"zip://{name}::{login}/x.zip")
        assert "hunter2" not in str(caught.value)
    assert not server.asked
    with pytest.raises(BackendError, match=r"The folder 'data:///x' is not read: folders are only read at s3://, gs://"):
        remote.files_below("data:///x")


def test_class_folders_at_an_address_are_labelled_images(bucket: str) -> None:
    files = fsspec.filesystem("memory")
    for number, name in enumerate(("ant", "bee")):
        files.pipe(f"/bucket/classes/{name}/{number}.png", png(number))
    data = read_data(f"{bucket}/classes", LabelSet.of(["ant", "bee"]))
    assert data.truths == ("ant", "bee")
    assert load_image(data.images[1]).tobytes() == noise(1).tobytes()


def run_over(tmp_path: Path, *addresses: str) -> Path:
    (tmp_path / "list.txt").write_text("\n".join(addresses))
    cascade = Cascade(FakeScorer(), [], labels=["ant", "bee"])
    bulk.run(cascade, Inputs(tmp_path / "list.txt"), tmp_path / "run", config={})
    return tmp_path / "run"


@pytest.mark.parametrize("to", ["hf", "coco"])
def test_an_address_that_is_dead_or_hidden_is_left_out_of_an_export(server: Server, tmp_path: Path, to: str) -> None:
    addresses = (f"{server.address}/late.png", f"{server.address}/0.png", f"{server.address}/1.png?key=s3cret")
    folder = run_over(tmp_path, *addresses)
    server.dead = "/late.png"
    done = export(folder, to, tmp_path / "out")
    assert (done.images, done.labelled, done.left_out) == (1, 1, 2)
    if to == "coco":
        written = json.loads((tmp_path / "out").read_text())
        assert [len(written[part]) for part in ("images", "annotations")] == [1, 1]


def test_label_studio_shows_web_addresses_and_fiftyone_only_files(server: Server, bucket: str, tmp_path: Path) -> None:
    folder = run_over(tmp_path, f"{server.address}/0.png", f"{bucket}/images/0.png", f"{server.address}/1.png?key=s3cret")
    done = export(folder, "label-studio", tmp_path / "out")
    assert (done.images, done.left_out) == (1, 2)
    assert done.how_to_load == "Make a project of Label Studio with label_config.xml, and import tasks.json."
    (task,) = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert task["data"]["image"] == task["data"]["path"] == f"{server.address}/0.png"
    with pytest.raises(DataError, match=r"addresses such as '.*/0.png', and the format 'fiftyone' names only files on this mac"):
        export(folder, "fiftyone", tmp_path / "labels.json")
