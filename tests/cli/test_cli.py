"""The `emaswap` command, on stores that publishers have filled."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from emaswap import Architecture, DirectoryStore, Publisher, __version__, cli
from emaswap.store.keys import tensors_key
from emaswap.store.line import Term
from emaswap.store.retention import Retention
from tests.conftest import Publish
from tests.forging import FORGERIES, commit
from tests.models import Linear
from tests.programs import run

ALL = ["--trust", "tests.models.*"]


def emaswap(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_ls_shows_each_version_on_a_line(store: DirectoryStore, publish: Publish) -> None:
    """A line has number, step and digest; the pinned version is marked, and so is one whose weights were pruned."""
    manifests = [publish(step=step) for step in (10, 20, 30)]
    assert emaswap("pin", "--store", store.root, 2).exit_code == 0
    store.files.delete(tensors_key("weights", manifests[0].weights.digest))
    result = emaswap("ls", "--store", store.root)
    assert result.exit_code == 0
    _, first, second, third = result.output.strip().splitlines()
    assert first.split()[:3] == ["1", "1", "10"]
    assert "weights pruned" in first
    assert manifests[1].weights.digest[:19] in second
    assert second.rstrip().endswith("pinned")
    assert "pinned" not in third


def test_ls_shows_what_cannot_be_read(store: DirectoryStore) -> None:
    """A version with a broken manifest has a line, too."""
    commit(store, Term(store, "test"), FORGERIES["manifest not JSON"])
    assert "cannot be read: manifest_invalid" in emaswap("ls", "--store", store.root).output


def test_show_prints_the_manifest(store: DirectoryStore, publish: Publish) -> None:
    """What is printed is the JSON that is stored."""
    publish(step=7)
    shown = json.loads(emaswap("show", "--store", store.root, 1).output)
    assert shown == json.loads(store.manifest_bytes(1))


def test_verify_finds_the_bad_ones(store: DirectoryStore) -> None:
    """Every version is proven as a service would; the status is 1 when one is not right, 0 when all are."""
    term = Term(store, "test")
    commit(store, term)
    commit(store, term, FORGERIES["flipped bit"])
    commit(store, term, FORGERIES["wrong probe answer"])
    result = emaswap("verify", "--store", store.root, *ALL)
    assert result.exit_code == 1
    verdicts = dict(re.findall(r"^version (\d): (\w+)", result.output, re.MULTILINE))
    assert verdicts == {"1": "right", "2": "digest_mismatch", "3": "probe_mismatch"}
    assert emaswap("verify", "--store", store.root, *ALL, 1).exit_code == 0


def test_verify_rejects_a_zombies_version(store: DirectoryStore) -> None:
    """What every service rejects as behind a higher term is not right here either."""
    zombie = Term(store, "test")
    commit(store, zombie)
    commit(store, Term(store, "test"))
    zombie.version = 2
    commit(store, zombie)
    result = emaswap("verify", "--store", store.root, *ALL)
    verdicts = dict(re.findall(r"^version (\d): (\w+)", result.output, re.MULTILINE))
    assert verdicts == {"1": "right", "2": "right", "3": "stale_term"}


HOSTILE = "ema_[/x]\x1b[2J\x9b2J\u202e\u200b"


@pytest.mark.parametrize("command", [["ls"], ["show", 1]], ids=["ls", "show"])
def test_nothing_in_a_store_commands_the_terminal(store: DirectoryStore, command: list[object]) -> None:
    """Control characters and markup in a metric's name are shown, not obeyed."""
    with Publisher(store, name="test", architecture=Architecture.of(Linear), probe=torch.zeros(1, 3)) as publisher:
        publisher.publish(Linear(), metrics={HOSTILE: 0.5})
    result = emaswap(*command, "--store", store.root)
    assert result.exit_code == 0
    assert "[/x]" in result.output
    assert all(character.isprintable() for line in result.output.splitlines() for character in line)


def test_an_error_from_a_store_commands_no_terminal(tmp_path: Path) -> None:
    """What goes to standard error is escaped, too."""
    result = run("-m", "emaswap", "ls", "--store", "no\x1b[2Jwhere", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().isprintable()


def test_one_file_that_cannot_be_read_hides_no_other(store: DirectoryStore, publish: Publish) -> None:
    """A version whose manifest cannot be read has its line, and the others theirs."""
    publish()
    publish()
    path = store.root / "versions" / "00000001.json"
    path.unlink()
    path.mkdir()
    lines = emaswap("ls", "--store", store.root).output.strip().splitlines()
    assert len(lines) == 3
    assert "cannot be read" in lines[1]
    assert "version 2: right" in emaswap("verify", "--store", store.root, *ALL).output


def test_ages_are_never_negative(store: DirectoryStore, publish: Publish) -> None:
    """A version whose publisher's clock is two hours ahead is 0 s old."""
    manifest = publish()
    ahead = manifest.model_copy(update={"created_at": manifest.created_at + timedelta(hours=2)})
    (store.root / "versions" / "00000001.json").write_bytes(ahead.encode())
    assert "0 s ago" in emaswap("ls", "--store", store.root).output


def test_verify_trusts_no_more_than_it_is_told(store: DirectoryStore) -> None:
    """Without --trust, a factory of somebody's own is not run."""
    commit(store, Term(store, "test"))
    result = emaswap("verify", "--store", store.root)
    assert result.exit_code == 1
    assert "untrusted_factory" in result.output


def test_a_pin_that_cannot_be_understood_hides_no_version(store: DirectoryStore, publish: Publish) -> None:
    """Versions are listed and verified all the same, and `ls` says what is wrong and what to do."""
    publish()
    (store.root / "PIN").write_text("rubbish")
    listed = emaswap("ls", "--store", store.root)
    assert listed.exit_code != 0
    assert "pin again or unpin" in str(listed.exception)
    assert listed.stdout.splitlines()[1].split()[0] == "1"
    assert emaswap("verify", "--store", store.root, "--trust", "tests.models.*").exit_code == 0


def test_pin_and_unpin_write_the_store(store: DirectoryStore, publish: Publish) -> None:
    """A pin is there with its reason until it is unpinned; a version that is not there cannot be pinned."""
    publish()
    assert emaswap("pin", "--store", store.root, 1, "--reason", "the good one").exit_code == 0
    pin = store.orders.pin()
    assert pin is not None
    assert (pin.version, pin.reason) == (1, "the good one")
    assert emaswap("unpin", "--store", store.root).exit_code == 0
    assert store.orders.pin() is None
    assert emaswap("pin", "--store", store.root, 2).exit_code != 0
    assert store.orders.pin() is None


def test_prune_keeps_what_it_is_told_to(store: DirectoryStore, publish: Publish) -> None:
    """The newest, the pinned, and the manifest that opened the term remain."""
    for _ in range(5):
        publish()
    emaswap("pin", "--store", store.root, 3)
    result = emaswap("prune", "--store", store.root, "--keep", 1, "--grace", 0)
    assert "pruned 3 versions" in result.output
    assert store.versions() == [1, 3, 5]
    assert len(store.files.entries("weights")) == 2


def test_the_store_may_be_named_by_a_variable(
    store: DirectoryStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMASWAP_STORE stands in for --store."""
    publish()
    monkeypatch.setenv("EMASWAP_STORE", str(store.root))
    assert emaswap("ls").output.splitlines()[1].split()[0] == "1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["ls", "--store", "nowhere"], "does not exist"), (["ls", "--store", "ftp://x"], "cannot open 'ftp://x'")],
    ids=["no store", "a store of another kind"],
)
def test_an_error_is_one_line_and_status_1(tmp_path: Path, arguments: list[str], says: str) -> None:
    """What goes wrong is said without a traceback."""
    result = run("-m", "emaswap", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("emaswap: ")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_release_is_printed() -> None:
    """`emaswap --version` says which release this is."""
    assert emaswap("--version").output.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pin", "--store", "STORE", "1", "--reason", "x" * 1001], "at most 1000 characters"),
        (["pin", "--store", "STORE", "1", "--reason", "\udcff"], "reason"),
        (["pin", "--store", "STORE", "1" + "0" * 260], "10000"),
        (["unpin", "--store", "NOWHERE"], "does not exist"),
        (["ls", "--store", "x" * 300], "cannot be reached"),
        (["ls", "--store", ""], "got nothing"),
        (["ls", "--store", "FILE"], "is no directory"),
        (["pin", "--store", "FILE", "1"], "no directory"),
    ],
    ids=[
        "long reason",
        "reason in bytes",
        "huge number",
        "unpin nowhere",
        "long name",
        "no name",
        "file",
        "pin in a file",
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(
    store: DirectoryStore, publish: Publish, tmp_path: Path, arguments: list[str], said: str
) -> None:
    """No traceback, no pin that nobody can read, and no success that is none."""
    publish()
    (tmp_path / "file").touch()
    places = {"STORE": store.root, "NOWHERE": tmp_path / "nowhere", "FILE": tmp_path / "file"}
    ended = run("-m", "emaswap", *(str(places.get(each, each)) for each in arguments))
    assert ended.returncode not in (0, -6), ended.stdout
    assert "Traceback" not in ended.stderr
    assert said in " ".join(ended.stderr.replace("│", " ").split())
    assert store.orders.pin() is None


def test_a_store_that_was_pruned_verifies(store: DirectoryStore, publish: Publish) -> None:
    """Of the version that opens a term only the manifest is kept; nothing is wrong with that, and nobody can pin it."""
    for _ in range(4):
        publish()
    Retention(store, keep=2, grace_s=0).prune()
    result = emaswap("verify", "--store", store.root, *ALL)
    assert result.exit_code == 0, result.output
    assert "version 1: weights pruned" in result.output
    assert "version 4: right" in result.output
    refused = emaswap("pin", "--store", store.root, 1)
    assert refused.exit_code != 0
    assert "were pruned" in str(refused.exception)
    assert store.orders.pin() is None


def test_weights_that_are_missing_otherwise_are_a_problem(store: DirectoryStore, publish: Publish) -> None:
    """Retention removes a version as a whole unless that opens a term."""
    for _ in range(3):
        publish()
    store.files.delete(tensors_key("weights", store.manifest(2).weights.digest))
    assert "version 2: file_missing" in emaswap("verify", "--store", store.root, *ALL).output


def test_ls_tells_of_a_pin_that_names_no_version_there(store: DirectoryStore, publish: Publish) -> None:
    """A pinned version that is gone is mentioned, and another that has its number is not called pinned."""
    publish()
    (store.root / "PIN").write_text('{"version": 9, "at": "2026-01-01T00:00:00Z"}')
    assert "version 9 is pinned, and is not in the store" in emaswap("ls", "--store", store.root).output
    digest = "blake3:" + "0" * 64
    (store.root / "PIN").write_text(json.dumps({"version": 1, "digest": digest, "at": "2026-01-01T00:00:00Z"}))
    assert "another version 1 is pinned" in emaswap("ls", "--store", store.root).output
