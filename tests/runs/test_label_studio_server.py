"""The whole way through a real Label Studio: tasks out, two people's labels in. It needs an installation of its own, so this test
is skipped unless LABEL_STUDIO names the program. CONTRIBUTING.md says how to run it.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import httpx2
import pytest
from pydantic import JsonValue

from cascadevlm.runs.corrections import read_corrections
from tests.cli.test_cli import run

PROGRAM = os.environ.get("LABEL_STUDIO", "")
AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))
ANN, BOB = "ann@example.org", "bob@example.org"
PASSWORD = "long enough 1"
SECONDS = 900
"""The longest time that Label Studio may take to start: a minute, or several on a busy machine."""

pytestmark = pytest.mark.skipif(not PROGRAM, reason="LABEL_STUDIO does not name the program label-studio")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over the bundled images, in the folder ``run`` beside them."""
    folder = tmp_path_factory.mktemp("birds")
    shutil.copytree(AVIARY / "images", folder / "images")
    options = (
        "--labels",
        AVIARY / "labels.txt",
        "--scorer",
        "open_clip:aviary",
        "--judge",
        "hf_chat:aviary",
        "--policy",
        "always",
    )
    run("run", folder / "images", "-o", folder / "run", *options)
    return folder / "images"


@pytest.fixture(scope="module")
def address(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Label Studio without any project. It may serve the images."""
    folder = tmp_path_factory.mktemp("label-studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(images.parent),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    options = ("--init", "--no-browser", "--username", ANN, "--password", PASSWORD, "--port", str(port))
    with (folder / "log").open("wb") as log:
        command = [PROGRAM, "start", "birds", *options]
        server = subprocess.Popen(command, env=os.environ | environment, cwd=folder, stdout=log, stderr=log)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while not _answers(address):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health").is_success
    except httpx2.TransportError:
        return False


@contextmanager
def logged_in(address: str, mail: str, page: str = "/user/login/") -> Iterator[httpx2.Client]:
    """The session of a person, as in a browser. The page of an invitation makes a new account."""
    with httpx2.Client(base_url=address, headers={"Referer": address}, timeout=60) as person:
        person.get(page)
        form = {"email": mail, "password": PASSWORD, "csrfmiddlewaretoken": person.cookies["csrftoken"]}
        assert person.post(page, data=form).status_code == 302
        person.headers["X-CSRFToken"] = person.cookies["csrftoken"]
        yield person


def _result(control: str, kind: str, value: JsonValue) -> JsonValue:
    return {"from_name": control, "to_name": "image", "type": kind, "value": {kind: value}}


def label(person: httpx2.Client, task: Mapping[str, object], choice: str, other: str = "") -> None:
    """Save the label of a person; "" skips the task."""
    chosen: list[JsonValue] = [_result("choice", "choices", [choice])] if choice else []
    listed: list[JsonValue] = [_result("other", "taxonomy", [[other]])] if other else []
    saved = person.post(f"/api/tasks/{task['id']}/annotations/", json={"result": chosen + listed, "was_cancelled": not choice})
    assert saved.status_code == 201, saved.text


def test_two_people_correct_a_run_in_label_studio(address: str, images: Path, tmp_path: Path) -> None:
    folder = images.parent / "run"
    run("export", folder, "--to", "label-studio", "--review", "random 30", "-o", tmp_path / "out")
    with logged_in(address, ANN) as ann, logged_in(address, BOB, ann.get("/api/invite").json()["invite_url"]) as bob:
        _work_in_label_studio(ann, bob, folder, tmp_path)


def _work_in_label_studio(ann: httpx2.Client, bob: httpx2.Client, folder: Path, tmp_path: Path) -> None:
    config = (tmp_path / "out" / "label_config.xml").read_text()
    project = ann.post("/api/projects", json={"title": "birds", "label_config": config, "maximum_annotations": 2}).json()["id"]
    storage = {"project": project, "path": str(folder.parent / "images"), "use_blob_urls": True, "title": "images"}
    assert ann.post("/api/storages/localfiles", json=storage).status_code == 201
    given = json.loads((tmp_path / "out" / "tasks.json").read_text())
    done = ann.post(f"/api/projects/{project}/import", json=given).json()
    assert (done["task_count"], done["prediction_count"]) == (30, 30)

    query = {"project": project, "fields": "all", "page_size": 100}
    first, second, third, fourth, *rest = bob.get("/api/tasks", params=query).json()["tasks"]
    shown = bob.get(first["data"]["image"])
    assert shown.content == Path(first["data"]["path"]).read_bytes()
    assert first["predictions"][0]["score"] == pytest.approx(given[0]["predictions"][0]["score"])
    one, two, *_ = (choice["value"] for choice in first["data"]["choices"])
    label(ann, first, one)
    label(bob, first, two)
    label(ann, second, "another label", other=(AVIARY / "labels.txt").read_text().splitlines()[0])
    label(bob, second, "none of the labels")
    label(ann, third, "")
    label(bob, fourth, fourth["data"]["choices"][0]["value"])
    for task in rest:
        label(bob, task, task["predictions"][0]["result"][0]["value"]["choices"][0])

    for form in ("JSON", "JSON_MIN"):
        exported = ann.get(f"/api/projects/{project}/export", params={"exportType": form})
        (tmp_path / f"{form}.json").write_bytes(exported.content)
    figures = json.loads(run("import", tmp_path / "JSON.json", "--into", folder, "--json").stdout)
    assert (figures["added"], figures["images"]) == (6 + len(rest), 3 + len(rest))
    assert figures["conflicts"] == [first["data"]["path"], second["data"]["path"]]
    corrections = read_corrections(folder)
    assert corrections.counting[first["data"]["path"]].label == two  # bob was later
    assert corrections.counting[second["data"]["path"]].label is None
    assert third["data"]["path"] in corrections.standing.keys() - corrections.counting.keys()
    for again in ("JSON", "JSON_MIN"):  # the short form lacks what was skipped
        known = json.loads(run("import", tmp_path / f"{again}.json", "--into", folder, "--json").stdout)
        assert known["added"] == 0
    told = json.loads(run("evaluate", folder, "--json").stdout)
    assert told["images"] == 2 + len(rest)
    assert "a random sample" in told["holds_for"]
