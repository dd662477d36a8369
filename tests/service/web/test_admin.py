"""What operators may do: pin, unpin, refresh, with the token and only with it."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from emaswap import DirectoryStore, EmaswapError, Manifest
from emaswap.store.keys import manifest_key
from service.settings import ServiceSettings
from service.web.app import create_app
from tests.conftest import Publish
from tests.serving import ADMIN, Served, ServiceProcess, serve

TOKEN = "correct horse"
ROW = [[1.0, 2.0, 3.0]]

ROUTES = [
    pytest.param("POST", "/model/pin", {"version": 1}, id="pin"),
    pytest.param("DELETE", "/model/pin", None, id="unpin"),
    pytest.param("POST", "/model/refresh", None, id="refresh"),
]


def pin(served: Served, version: object, **more: object) -> httpx.Response:
    """POST /model/pin."""
    return served.client.post("/model/pin", json={"version": version, **more}, headers=ADMIN)


def unpin(served: Served) -> httpx.Response:
    """DELETE /model/pin."""
    return served.client.delete("/model/pin", headers=ADMIN)


def refresh(served: Served) -> httpx.Response:
    """POST /model/refresh."""
    return served.client.post("/model/refresh", headers=ADMIN)


def assert_refused(answer: httpx.Response, status: int, code: str) -> str:
    """The answer is a refusal, of the one shape that refusals have; its detail."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "detail"}
    assert body["error"] == code
    return str(body["detail"])


def commit(store: DirectoryStore, manifest: Manifest, **changes: Any) -> Manifest:
    """Commit a manifest like another one, and tell nobody."""
    changed = manifest.model_copy(update=changes)
    assert store.files.create(manifest_key(changed.version), changed.encode())
    return changed


def commit_without_weights(store: DirectoryStore, manifest: Manifest, version: int) -> Manifest:
    """Commit a version whose weights are not there."""
    missing = manifest.weights.model_copy(update={"digest": "blake3:" + "0" * 64})
    return commit(store, manifest, version=version, weights=missing)


# -- who may --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service over an empty store, without a token."""
    with serve(store=str(tmp_path_factory.mktemp("off"))) as served:
        yield served


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service over an empty store, with a token."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(TOKEN)
    (folder / "store").mkdir()
    with serve(store=str(folder / "store"), admin_token_file=folder / "token") as served:
        yield served


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_without_a_token_file_operators_can_do_nothing(
    off: Served, method: str, path: str, body: dict[str, int] | None
) -> None:
    """A service without a token file answers 403, and says how to turn it on."""
    answer = off.client.request(method, path, json=body, headers=ADMIN)
    assert "--admin-token-file" in assert_refused(answer, 403, "admin_is_off")


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(None, id="none"),
        pytest.param(b"", id="empty"),
        pytest.param(b"Bearer", id="no token"),
        pytest.param(b"Bearer correct", id="the beginning of the token"),
        pytest.param(b"Bearer correct horse battery", id="more than the token"),
        pytest.param(b"Bearer CORRECT HORSE", id="the token in capitals"),
        pytest.param(b"correct horse", id="the token without a scheme"),
        pytest.param(b"Basic correct horse", id="another scheme"),
        pytest.param(b"Bearer\xff\xfe correct horse", id="a scheme of odd bytes"),
        pytest.param(b"Bearer \xff\xfe\x80", id="a token of odd bytes"),
        pytest.param(b"Bearer " + b"x" * 10_000, id="a token of great length"),
    ],
)
@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_without_the_token_nothing_is_done(
    guarded: Served, method: str, path: str, body: dict[str, int] | None, authorization: bytes | None
) -> None:
    """Whatever stands in the Authorization header but the token is 401, and says what is expected."""
    headers = {} if authorization is None else {b"Authorization": authorization}
    answer = guarded.client.request(method, path, json=body, headers=headers)
    assert "Authorization: Bearer" in assert_refused(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_scheme_may_be_written_in_any_letters(guarded: Served) -> None:
    """The scheme of the Authorization header has no case (RFC 9110, 11.1)."""
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = guarded.client.post("/model/refresh", headers={"Authorization": f"{scheme} {TOKEN}"})
        assert answer.status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'{"version": "x"}'], ids=["half", "list", "bytes", "text"])
def test_who_has_no_token_learns_nothing_about_the_body(guarded: Served, body: bytes) -> None:
    """Without the token the answer is 401 whatever the body is."""
    answer = guarded.client.post("/model/pin", content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, 401, "unauthorized")


def test_who_has_no_token_is_not_waited_for(guarded: Served) -> None:
    """Without the token the answer comes before the body does, so that strangers can fill neither memory nor time."""
    url = urlsplit(guarded.url)
    assert url.hostname
    with socket.create_connection((url.hostname, url.port or 0), timeout=2) as connection:
        connection.sendall(b"POST /model/pin HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000\r\n\r\n")
        with HTTPResponse(connection, method="POST") as response:
            response.begin()
            assert response.status == 401
            assert json.loads(response.read())["error"] == "unauthorized"


def test_a_token_may_be_any_text(store: DirectoryStore, tmp_path: Path) -> None:
    """A token beyond ASCII opens, sent as the very bytes that are in the file."""
    token = "geheim-schlüssel-🐎".encode()
    (tmp_path / "token").write_bytes(token + b"\n")
    with serve(store=str(store.root), admin_token_file=tmp_path / "token") as served:
        answer = served.client.post("/model/refresh", headers={b"Authorization": b"Bearer " + token})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        pytest.param(None, "No such file", id="no file"),
        pytest.param("", "shorter than 8 bytes", id="an empty file"),
        pytest.param("secret7", "shorter than 8 bytes", id="too short a token"),
        pytest.param("  pad   \n\n", "shorter than 8 bytes", id="white space around too short a token"),
    ],
)
def test_a_bad_token_file_is_told_at_the_start(tmp_path: Path, token: str | None, problem: str) -> None:
    """The service does not start with a token that is not there or too short; it names the file, not the token."""
    file = tmp_path / "operators"
    if token is not None:
        file.write_text(token)
    with pytest.raises(EmaswapError, match=problem) as caught:
        create_app(ServiceSettings(store=str(tmp_path), admin_token_file=file))
    assert str(file) in str(caught.value)
    assert not token or not token.strip() or token.strip() not in str(caught.value)


def test_a_folder_is_no_token_file(tmp_path: Path) -> None:
    """A folder where the token file should be is a clear error, too."""
    with pytest.raises(EmaswapError, match="directory"):
        create_app(ServiceSettings(store=str(tmp_path), admin_token_file=tmp_path))


def test_the_token_is_never_told(store: DirectoryStore, tmp_path: Path, publish: Publish) -> None:
    """Neither the log nor any answer has the token in it, whether it was right or nearly right."""
    token = "correct-horse-battery-staple"
    (tmp_path / "token").write_text(token)
    publish()
    answers = []
    with ServiceProcess(store.root, "--admin-token-file", str(tmp_path / "token")) as served:
        for sent in (f"Bearer {token}", f"Bearer {token}!", token, f"Basic {token}"):
            headers = {"Authorization": sent}
            answers.append(served.client.post("/model/pin", json={"version": 1}, headers=headers))
            answers.append(served.client.post("/model/pin", json={"version": "x"}, headers=headers))
            answers.append(served.client.delete("/model/pin", headers=headers))
            answers.append(served.client.post("/model/refresh", headers=headers))
        paths = ("/model/version", "/model/versions", "/metrics", "/readyz", "/healthz", "/openapi.json", "/nothing")
        answers.extend(served.client.get(path) for path in paths)
        served.stop()
    assert {answer.status_code for answer in answers} == {200, 401, 404, 422}
    assert not any(token in answer.text or token in str(answer.headers) for answer in answers)
    assert not any(token in line for line in served.lines)


# -- what is done -----------------------------------------------------------------------------------------------------------


def test_a_pin_is_live_when_it_is_answered(served: Served, publish: Publish) -> None:
    """Pinning an older version rolls back at once: the answer says it is live, and it answers the next request."""
    for _ in range(3):
        served.wait_until_live(publish().version)
    answer = pin(served, 1, reason="3 is worse")
    assert answer.status_code == 200
    assert answer.json()["live"] == 1
    assert answer.json()["pin"]["version"] == 1
    assert answer.json()["pin"]["reason"] == "3 is worse"
    assert served.predict(ROW).headers["X-Model-Version"] == "1"
    assert served.client.get("/model/version").json()["pin"]["reason"] == "3 is worse"
    assert served.client.get("/model/versions").json()["pin"]["version"] == 1
    assert served.metric("emaswap_pinned_version") == 1


def test_a_pin_is_kept_in_the_store(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """The pin holds for services that start later."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    pin(served, 1, reason="known to be good")
    kept = store.orders.pin()
    assert kept is not None
    assert (kept.version, kept.reason) == (1, "known to be good")
    with serve(store=str(store.root)) as another:
        another.wait_until_live(1)


def test_a_pin_holds_while_newer_versions_come_and_is_given_up_by_unpinning(served: Served, publish: Publish) -> None:
    """Newer versions wait behind a pin; without it the newest is live at once."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    pin(served, 1)
    publish()
    assert refresh(served).json()["live"] == 1
    answer = unpin(served)
    assert answer.status_code == 200
    assert (answer.json()["live"], answer.json()["pin"]) == (3, None)
    assert served.predict(ROW).headers["X-Model-Version"] == "3"
    assert served.metric("emaswap_pinned_version") == 0


def test_a_client_that_wants_a_later_version_learns_of_the_order(served: Served, publish: Publish) -> None:
    """A 412 says whether the version has yet to arrive, or an operator holds an older one."""
    for _ in range(2):
        publish()
    served.wait_until_live(2)

    def reason(wanted: int) -> str:
        answer = served.predict([[1.0, 2.0, 3.0]], **{"X-Min-Model-Version": str(wanted)})
        assert (answer.status_code, answer.json()["error"]) == (412, "version_too_old")
        return str(answer.json()["reason"])

    assert reason(3) == "behind"
    pin(served, 1)
    assert reason(2) == "ordered"
    unpin(served)
    assert reason(3) == "behind"


def test_pinning_and_unpinning_twice_is_no_error(served: Served, publish: Publish) -> None:
    """Asking for what is already so changes nothing, and another pin takes the place of the first."""
    for _ in range(2):
        served.wait_until_live(publish().version)
    assert [pin(served, version).json()["live"] for version in (1, 1, 2)] == [1, 1, 2]
    assert [unpin(served).json()["live"] for _ in range(2)] == [2, 2]


def test_a_refresh_looks_at_the_store_at_once(store: DirectoryStore, tmp_path: Path, publish: Publish) -> None:
    """A version that nobody told of, and that no poll would find for an hour, is live when a refresh is answered."""
    (tmp_path / "token").write_text(TOKEN)
    first = publish()
    with serve(store=str(store.root), admin_token_file=tmp_path / "token", poll_s=3600) as served:
        served.wait_until_live(1)
        commit(store, first, version=2)
        answer = refresh(served)
        assert answer.status_code == 200
        assert answer.json() == {"pin": None, "live": 2, "status": "the newest version 2 is live"}


def test_a_pin_of_a_version_that_is_not_there_is_refused(served: Served, publish: Publish) -> None:
    """404 says which versions there are, and the store is left without a pin."""
    served.wait_until_live(publish().version)
    detail = assert_refused(pin(served, 7), 404, "unknown_version")
    assert "version 7 is not in" in detail
    assert "from 1 to 1" in detail
    assert refresh(served).json()["pin"] is None


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"version": 0}, id="version 0"),
        pytest.param({"version": -1}, id="a negative version"),
        pytest.param({"version": 10**16}, id="too high a version"),
        pytest.param({"version": 1.5}, id="a fraction"),
        pytest.param({"version": "newest"}, id="text"),
        pytest.param({"version": None}, id="null"),
        pytest.param({}, id="no version"),
        pytest.param([], id="a list"),
        pytest.param({"version": 1, "reason": "x" * 1001}, id="too long a reason"),
        pytest.param({"version": 1, "reason": 5}, id="a reason that is no text"),
        pytest.param({"version": 1, "reason": "\ud800"}, id="a reason of half a character"),
    ],
)
def test_a_pin_that_cannot_be_one_is_refused(guarded: Served, body: object) -> None:
    """What no version can be is 422, and says what is wrong with it."""
    headers = ADMIN | {"Content-Type": "application/json"}
    answer = guarded.client.post("/model/pin", content=json.dumps(body).encode(), headers=headers)
    assert assert_refused(answer, 422, "invalid_request")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 50_000], ids=["nothing", "half", "bytes", "brackets"])
def test_a_body_that_is_no_json_is_refused(guarded: Served, body: bytes) -> None:
    """A body that cannot be read is the client's fault, in the shape of all refusals."""
    answer = guarded.client.post("/model/pin", content=body, headers=ADMIN | {"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json().keys() == {"error", "detail"}


def test_a_body_that_is_too_large_is_refused_in_json(guarded: Served) -> None:
    """As every refusal is, and before it is read whole."""
    answer = guarded.client.post("/model/pin", content=b"[" * (65 << 10), headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]) == (413, "body_too_large")


@pytest.mark.parametrize("body", [b'{"version": ' + b"1" * 5000 + b"}", b"[" * 50000], ids=["digits", "nesting"])
def test_a_body_that_no_parser_takes_is_refused_in_json(guarded: Served, body: bytes) -> None:
    """What Python's parser gives up on is no JSON to us."""
    answer = guarded.client.post("/model/pin", content=body, headers=ADMIN | {"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_json")


def test_a_pin_of_a_rejected_version_is_refused(served: Served, store: DirectoryStore, publish: Publish) -> None:
    """409 repeats why the version was rejected, and the live version stays without a pin."""
    first = publish()
    commit_without_weights(store, first, 2)
    served.wait_until_rejected(2)
    detail = assert_refused(pin(served, 2), 409, "version_was_rejected")
    assert "version 2 was rejected: file_missing" in detail
    assert refresh(served).json() == {
        "pin": None,
        "live": 1,
        "status": "every version after the live 1 was rejected",
    }


def test_a_rejected_version_that_was_repaired_can_be_pinned(
    served: Served, store: DirectoryStore, publish: Publish
) -> None:
    """Once its bytes are right, a version can be rolled back to even though it was rejected before."""
    first = publish()
    second = commit_without_weights(store, first, 2)
    served.wait_until_rejected(2)
    third = commit(store, first, version=3)
    served.wait_until_live(third.version)
    repaired = second.model_copy(update={"weights": first.weights})
    store.files.replace(manifest_key(2), repaired.encode())
    answer = pin(served, 2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["live"] == 2


def test_before_there_is_a_store_a_pin_does_not_blame_permissions(tmp_path: Path) -> None:
    """Where the store does not exist yet, a pin is refused as of a version that is not there, or because of the store."""
    (tmp_path / "token").write_text(TOKEN)
    with serve(store=str(tmp_path / "later"), admin_token_file=tmp_path / "token") as served:
        answer = pin(served, 1)
        assert answer.status_code in (404, 503), answer.text


@pytest.fixture
def read_only(store: DirectoryStore, publish: Publish) -> Iterator[DirectoryStore]:
    """A store of two versions on a file system that is mounted read-only: permissions alone do not stop root."""
    publish()
    publish()
    mount = shutil.which("mount")
    unmount = shutil.which("umount")
    if mount is None or unmount is None:
        pytest.skip("there is no mount command here")
    bound = subprocess.run([mount, "--bind", store.root, store.root], capture_output=True, text=True, check=False)
    if bound.returncode:
        pytest.skip(f"this user may not mount a file system read-only: {bound.stderr.strip()}")
    try:
        subprocess.run([mount, "-o", "remount,ro,bind", store.root], capture_output=True, check=True)
        yield store
    finally:
        subprocess.run([unmount, "-l", store.root], capture_output=True, check=True)


def test_where_the_service_may_not_write_it_names_the_command(read_only: DirectoryStore, tmp_path: Path) -> None:
    """Over a read-only store the service serves, and tells operators what to run where the store can be written."""
    (tmp_path / "token").write_text(TOKEN)
    with serve(store=str(read_only.root), admin_token_file=tmp_path / "token", poll_s=0.05) as served:
        served.wait_until_live(2)
        assert f"emaswap pin --store {read_only.root} 1" in assert_refused(pin(served, 1), 409, "store_is_read_only")
        assert f"emaswap unpin --store {read_only.root}" in assert_refused(unpin(served), 409, "store_is_read_only")
        assert refresh(served).json()["live"] == 2
