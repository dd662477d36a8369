"""The comparison of raw and averaged weights: a tiny one, and what is made of given curves."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from emaswap import DirectoryStore, EmaswapError
from tests.serving import ROOT
from tests.tasks import Noisy
from trainer.__main__ import main as train_main
from trainer.compare import CompareSettings, document, main, train, write
from trainer.curve import COLUMNS, Curve, reading, table
from trainer.settings import TrainerSettings
from trainer.tasks import find_task

TINY = ("--task", "digits", "--seeds", "2", "--steps", "20", "--evaluate-every", "4", "--device", "cpu")

CURVES = [
    Curve(0, (10, 20, 30, 40), (0.50, 0.90, 0.80, 0.70), (0.25, 0.90, 0.90, 0.90)),
    Curve(1, (10, 20, 30, 40), (0.50, 0.60, 0.70, 0.90), (0.25, 0.50, 0.70, 0.80)),
]
LATE = [curve.half(second=True) for curve in CURVES]


class Lossy(Noisy):
    """A task that measures its loss and no accuracy."""

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        return {"loss": self.loss(model, self.batch(0, 10, 0)).item()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a tiny comparison, and its document."""
    folder = tmp_path_factory.mktemp("compare") / "docs"
    threads = torch.get_num_threads()
    assert main([*TINY, "--folder", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder, (folder / "ema-vs-raw.md").read_text()


def test_a_document_and_a_picture_are_written(written: tuple[Path, str]) -> None:
    """The document has a row for each seed and one for all, and shows the picture, which is one."""
    folder, text = written
    assert sorted(path.name for path in folder.iterdir()) == ["ema-vs-raw.md", "ema-vs-raw.png"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == list(COLUMNS)
    assert [row[0] for row in rows[2:]] == ["0", "1", "all"]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert "](ema-vs-raw.png)" in text
    assert imread(folder / "ema-vs-raw.png").shape[:2] == (540, 960)


def test_the_terminal_shows_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal of 80 columns, no figure of a seed is cut short or broken in two."""
    monkeypatch.setenv("COLUMNS", "80")
    flags = ("--task", "digits", "--steps", "2", "--evaluate-every", "1", "--device", "cpu", "--folder", str(tmp_path))
    assert main(["--seeds", "2", *flags]) == 0
    rows = [line for line in (tmp_path / "ema-vs-raw.md").read_text().splitlines() if line.startswith(("| 0", "| 1"))]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert row.strip("| ").replace("|", " ").split() in shown


def test_the_named_command_has_all_settings(written: tuple[Path, str], tmp_path: Path) -> None:
    """The command in the document gives the settings that it was written with."""
    _, text = written
    (command,) = re.findall(r"^python -m trainer\.compare (.*)$", text, re.MULTILINE)
    assert CompareSettings.read([*shlex.split(command), "--folder", "x"]) == CompareSettings.read(
        [*TINY, "--folder", "x"]
    )


def test_the_same_seed_gives_the_same_curve(written: tuple[Path, str]) -> None:
    """A run depends on its seed and nothing else, and the document has just those figures."""
    settings = CompareSettings.read([*TINY, "--folder", str(written[0])])
    task = find_task("digits")
    again = [train(settings, task, seed) for seed in (1, 0)][::-1]
    assert again[0].steps == (4, 8, 12, 16, 20)
    assert again[0].raw != again[1].raw
    assert document(settings, again) == written[1]


def test_a_run_is_the_trainers_own(tmp_path: Path) -> None:
    """What is compared is what `python -m trainer --lr-schedule constant` publishes: the same accuracies."""
    curve = train(CompareSettings.read(TINY), find_task("digits"), 1)
    flags = ("--task", "digits", "--steps", "20", "--publish-every", "4", "--device", "cpu", "--threads", "1")
    assert train_main(["--store", str(tmp_path), *flags, "--seed", "1", "--lr-schedule", "constant"]) == 0
    store = DirectoryStore(tmp_path)
    published = [store.manifest(version).training for version in store.versions()]
    assert published[-1].step == 20
    at = [curve.steps.index(training.step) for training in published]
    for kind, line in (("raw", curve.raw), ("ema", curve.ema)):
        assert [training.metrics[f"{kind}_accuracy"] for training in published] == [line[index] for index in at]


def test_the_environment_does_not_change_what_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in the document is the whole truth: variables for the trainer have no part in it."""
    before = CompareSettings.read(TINY).trainer(3)
    monkeypatch.setenv("EMASWAP_EMA_TAU", "5")
    monkeypatch.setenv("EMASWAP_WEIGHT_DECAY", "0.5")
    assert CompareSettings.read(TINY).trainer(3) == before
    assert (before.seed, before.lr_schedule, before.steps) == (3, "constant", 20)


def test_the_table_has_the_noisy_phase() -> None:
    """Means, difference, lowest and last accuracy of the second half, and in how many evaluations which one was better."""
    assert table(LATE) == [
        ("0", "0.7500", "0.9000", "+0.1500", "0.7000", "0.9000", "0.7000", "0.9000", "2, 0, 0"),
        ("1", "0.8000", "0.7500", "-0.0500", "0.7000", "0.7000", "0.9000", "0.8000", "0, 1, 1"),
        (
            "all",
            "0.7750 ± 0.0354",
            "0.8250 ± 0.1061",
            "+0.0500 ± 0.1414",
            "0.7000 ± 0.0000",
            "0.8000 ± 0.1414",
            "0.8000 ± 0.1414",
            "0.8500 ± 0.0707",
            "2, 1, 1",
        ),
    ]
    assert [row[0] for row in table(LATE[:1])] == ["0"]


def test_the_reading_says_what_was_seen() -> None:
    """The words follow from the curves, to the disadvantage of the average, too."""
    assert reading(CURVES) == (
        "In the noisy phase, from step 30 to 40, the EMA was better than the raw weights in 2 of 4 evaluations, equal in "
        "1 and worse in 1. Its mean over that phase was better for 1 of 2 seeds, and its worst evaluation was better than "
        "the worst one of the raw weights for 1. In the first half it was better than the raw weights in 0 of 4 "
        "evaluations, equal in 1 and worse in 3."
    )
    assert "first half" not in reading([Curve(0, (10,), (0.5,), (0.6,))])


def test_the_defaults_are_the_trainers() -> None:
    """Nothing is chosen to suit the comparison: without flags, a run has the trainer's defaults."""
    default = TrainerSettings.model_construct(store="", task="mnist5k", seed=4, lr_schedule="constant", threads=1)
    assert CompareSettings.read([]).trainer(4) == default


@pytest.mark.parametrize(("steps", "late"), [((10, 20, 30), (20, 30)), ((10, 20), (20,)), ((60,), (60,))])
def test_the_second_half_is_never_empty(steps: tuple[int, ...], late: tuple[int, ...]) -> None:
    """However few evaluations there are, the last one is in the second half, and each is in one of the halves."""
    curve = Curve(0, steps, (0.5,) * len(steps), (0.5,) * len(steps))
    assert curve.half(second=True).steps == late
    assert curve.half(second=False).steps + late == steps


def test_a_run_without_an_evaluation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluating less often than there are steps is a wrong setting, and named."""
    with pytest.raises(SystemExit, match="2"):
        main(["--steps", "10", "--evaluate-every", "11"])
    assert "--evaluate-every: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "said"),
    [("tests.trainer.test_compare:Lossy", "measures no accuracy, only"), ("nothing", "unknown task 'nothing'")],
    ids=["no accuracy", "no task"],
)
def test_what_cannot_be_compared_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, said: str
) -> None:
    """A task without an accuracy, or none at all, ends with 1, a reason, and no document."""
    flags = ("--steps", "2", "--evaluate-every", "1", "--folder", str(tmp_path / "docs"))
    assert main(["--task", task, *flags]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Results that cannot be kept are an error that names the folder."""
    (tmp_path / "docs").write_text("")
    with pytest.raises(EmaswapError, match="cannot write to .*docs"):
        write(CompareSettings.read([*TINY, "--folder", str(tmp_path / "docs")]), CURVES)


def test_the_kept_document_is_of_the_default_settings() -> None:
    """`make compare` writes what is in docs/: its command has the settings that go without saying."""
    text = (ROOT / "docs" / "ema-vs-raw.md").read_text()
    (command,) = re.findall(r"^python -m trainer\.compare (.*)$", text, re.MULTILINE)
    assert CompareSettings.read(shlex.split(command)) == CompareSettings.read([])
    assert (ROOT / "docs" / "ema-vs-raw.png").exists()
