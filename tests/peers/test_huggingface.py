"""Hugging Face: a normal run of its Trainer publishes, and what is published is the average."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emaswap import Architecture, BadVersion, DirectoryStore, Fenced
from tests.peers.nets import Classifier, tiny_bert
from tests.peers.oracle import Recorder, assert_close, lines_of, published, weights_of
from tests.peers.trial import DECAY, IMAGES, LABELS, break_store, callback_settings, take_over
from tests.serving import ROOT

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="Transformers is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its warnings are about its own settings
]

BERT = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 8, "num_labels": 3,
}  # fmt: skip


def callback(store: DirectoryStore | Path, **options: Any) -> Any:
    """The callback, with a version every four steps."""
    from emaswap.integrations.huggingface import EmaswapCallback

    return EmaswapCallback(store, **callback_settings(**options))


class Fit:
    """A run over batches of 16, its model, and a recorder of its average."""

    def __init__(self, folder: Path, *callbacks: Any, model: nn.Module | None = None, **options: Any) -> None:
        from transformers import Trainer, TrainingArguments, set_seed

        set_seed(0)
        self.model = model or Classifier()
        self.recorder = Recorder(getattr(self.model, "net", self.model), lambda _: DECAY)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.recorder.follow(optimizer)
        rows: list[dict[str, Tensor]] = [
            {"images": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)
        ]
        if model is not None:
            rows = [{"input_ids": (torch.arange(5) + n) % 20, "labels": torch.tensor(n % 3)} for n in range(96)]
        settings: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 48,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "epoch",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(**settings | options)
        data: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows}
        self.trainer = Trainer(self.model, arguments, callbacks=list(callbacks), optimizers=(optimizer, None), **data)

    def train(self, **options: Any) -> "Fit":
        """Train to the end."""
        self.trainer.train(**options)
        return self

    def raw(self) -> dict[str, Tensor]:
        """The weights that the model has now."""
        return dict(self.recorder.module.state_dict())


def hooks(**methods: Any) -> Any:
    """A callback with these methods."""
    from transformers import TrainerCallback

    return type("Hooks", (TrainerCallback,), {name: staticmethod(method) for name, method in methods.items()})()


def test_a_run_publishes_its_average(store: DirectoryStore, tmp_path: Path) -> None:
    """A version every n steps and one at the end, each with the average of just that step, and the logged metrics."""
    fit = Fit(tmp_path, callback(store), num_train_epochs=3).train()
    versions = published(store)
    steps = [manifest.training.step for manifest in versions]
    assert steps[-1] == 18
    assert set(steps) <= {4, 8, 12, 16, 18}
    for manifest in versions:
        assert_close(weights_of(store, manifest), fit.recorder.averages[manifest.training.step])
    assert versions[-1].ema.updates == 18
    assert {"loss", "eval_loss"} <= versions[-1].training.metrics.keys()


def test_a_version_has_the_metrics_of_the_evaluation_after_its_step(store: DirectoryStore, tmp_path: Path) -> None:
    """A version that is due when an evaluation follows has that evaluation's metrics, and no older ones."""
    fit = Fit(tmp_path, callback(store, every_n_steps=6)).train()
    losses = [logs["eval_loss"] for logs in fit.trainer.state.log_history if "eval_loss" in logs]
    for manifest in published(store):
        assert manifest.training.metrics["eval_loss"] == pytest.approx(losses[manifest.training.step // 6 - 1])
    assert store.newest() >= 1


def test_a_network_of_transformers_is_published(store: DirectoryStore, tmp_path: Path) -> None:
    """A BERT, with token ids for its input and named outputs, becomes versions that are proven."""
    averaging = callback(
        store,
        name="bert",
        architecture=Architecture.of(tiny_bert, **BERT),
        probe={"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)},
        module="",
    )
    fit = Fit(tmp_path, averaging, model=tiny_bert(**BERT)).train()
    last = published(store)[-1]
    assert_close(weights_of(store, last), fit.recorder.averages[12])
    assert [field.name for field in last.signature.inputs] == ["input_ids", "attention_mask"]
    assert [field.name for field in last.signature.outputs] == ["logits"]


def test_accumulated_gradients_are_one_update(store: DirectoryStore, tmp_path: Path) -> None:
    """The average is updated once an optimizer step, not once a batch."""
    averaging = callback(store)
    fit = Fit(tmp_path, averaging, gradient_accumulation_steps=3).train()
    assert averaging.ema.updates == fit.trainer.state.global_step == 4
    assert_close(averaging.ema.ema.state_dict(), fit.recorder.averages[4])
    assert [manifest.training.step for manifest in published(store)] == [4]


def test_a_resumed_run_goes_on_exactly(store: DirectoryStore, tmp_path: Path) -> None:
    """Ended after a checkpoint and gone on in a new Trainer, raw and averaged weights are the same to the last bit."""
    at_once = callback(store)
    straight = Fit(tmp_path / "straight", at_once).train()

    def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 7

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    Fit(tmp_path, callback(tmp_path / "other"), hooks(on_step_end=stop), **saving).train()
    averaging = callback(tmp_path / "other")
    fit = Fit(tmp_path, averaging, **saving).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert averaging.ema.updates == at_once.ema.updates == 12
    torch.testing.assert_close(averaging.ema.ema.state_dict(), at_once.ema.ema.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fit.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)
    assert len(list((tmp_path / "out" / "checkpoint-10").glob("emaswap-digits.*.safetensors"))) == 1


def test_a_checkpoint_elsewhere_is_named_in_the_arguments(store: DirectoryStore, tmp_path: Path) -> None:
    """A checkpoint that was moved is gone on from with its average when the arguments name it."""
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    before = callback(store)
    Fit(tmp_path, before, **saving, num_train_epochs=1).train()
    moved = (tmp_path / "out" / "checkpoint-6").rename(tmp_path / "moved")
    averaging = callback(store)
    Fit(tmp_path, averaging, resume_from_checkpoint=str(moved)).train(resume_from_checkpoint=str(moved))
    assert averaging.ema.updates == 12


def test_a_run_resumed_without_a_saved_average_says_so(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of a run without the callback can be gone on from; that the average starts late is a warning."""
    Fit(tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    averaging = callback(store)
    Fit(tmp_path, averaging).train(resume_from_checkpoint=True)
    assert "resumes at step 6 without a saved average" in caplog.text
    assert averaging.ema.updates == 6


def test_a_damaged_average_is_noticed(store: DirectoryStore, tmp_path: Path) -> None:
    """Training does not go on from an average of which a bit has flipped."""
    Fit(tmp_path, callback(store), num_train_epochs=1, save_strategy="epoch").train()
    (path,) = (tmp_path / "out" / "checkpoint-6").glob("emaswap-digits.*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadVersion, match="digest_mismatch"):
        Fit(tmp_path, callback(store)).train(resume_from_checkpoint=True)


def test_a_publish_that_fails_does_not_end_training(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store cannot be written there are warnings; afterwards versions come again."""

    def fault(args: Any, state: Any, control: Any, **_: Any) -> None:
        break_store(store, state.global_step, averaging)

    averaging = callback(store)
    fit = Fit(tmp_path, averaging, hooks(on_step_begin=fault)).train()
    assert fit.trainer.state.global_step == 12
    assert "step 4 was not published" in caplog.text
    assert [manifest.training.step for manifest in published(store)] in ([8, 12], [12])  # 12 may come before 8 is begun


def test_a_fenced_run_ends(store: DirectoryStore, tmp_path: Path) -> None:
    """When another publisher has taken the store over, training stops with an error that says so."""

    def successor(args: Any, state: Any, control: Any, **_: Any) -> None:
        take_over(store, state.global_step, averaging)

    averaging = callback(store)
    fit = Fit(tmp_path, averaging, hooks(on_step_begin=successor))
    with pytest.raises(Fenced, match="another publisher has taken over"):
        fit.train()
    assert fit.trainer.state.global_step == 8


@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C within a step", "Ctrl-C in an evaluation"])
def test_a_run_that_is_stopped_publishes_its_last_average(store: DirectoryStore, tmp_path: Path, how: str) -> None:
    """Stopped between two versions that are due, the run publishes what it has come to, and the interrupt comes through."""

    def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            signal.raise_signal(signal.SIGINT)

    event = {
        "Ctrl-C": "on_step_begin",
        "Ctrl-C within a step": "on_pre_optimizer_step",
        "Ctrl-C in an evaluation": "on_prediction_step",
    }[how]
    fit = Fit(tmp_path, callback(store, validate_with_ema=True), hooks(**{event: stop}))
    with pytest.raises(KeyboardInterrupt):
        fit.train()
    last = published(store)[-1]
    assert last.training.step == last.ema.updates == 6
    assert_close(weights_of(store, last), fit.recorder.averages[6])
    with pytest.raises(AssertionError):
        assert_close(fit.raw(), fit.recorder.averages[6])


def test_a_run_that_crashes_publishes_nothing_more(store: DirectoryStore, tmp_path: Path) -> None:
    """An error of training comes through as it is, with the raw weights in the model; its average is not published."""

    def crash(args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise ValueError("this batch is broken")

    averaging = callback(store, validate_with_ema=True)
    fit = Fit(tmp_path, averaging, hooks(on_prediction_step=crash))
    with pytest.raises(ValueError, match="this batch is broken"):
        fit.train()
    assert [manifest.training.step for manifest in published(store)] == [4]
    with pytest.raises(AssertionError):
        assert_close(fit.raw(), fit.recorder.averages[6])


def test_the_average_can_be_evaluated(store: DirectoryStore, tmp_path: Path) -> None:
    """Evaluation sees the averaged weights; training and checkpoints go on with the raw ones, and nothing else changes."""
    seen: list[dict[str, Tensor]] = []

    def look(args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if len(seen) < state.epoch:
            seen.append({name: tensor.clone() for name, tensor in model.net.state_dict().items()})

    options: dict[str, Any] = {
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    plain = Fit(tmp_path / "plain", callback(tmp_path / "other"), **options).train()
    fit = Fit(tmp_path, callback(store, validate_with_ema=True), hooks(on_prediction_step=look), **options).train()
    for epoch, validated in enumerate(seen, start=1):
        assert_close(validated, fit.recorder.averages[6 * epoch])
    assert len(seen) == 2
    from safetensors.torch import load_file

    for step in (6, 12):
        saved = [
            load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors")
            for folder in (tmp_path, tmp_path / "plain")
        ]
        torch.testing.assert_close(*saved, rtol=0, atol=0)
    assert [logs["eval_loss"] for logs in fit.trainer.state.log_history if "eval_loss" in logs] != [
        logs["eval_loss"] for logs in plain.trainer.state.log_history if "eval_loss" in logs
    ]


def test_several_evaluation_datasets_are_warned_of(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer does not say that a second evaluation is coming, so it is not of the average: there is a warning."""
    fit = Fit(tmp_path, callback(store, validate_with_ema=True))
    rows = fit.trainer.eval_dataset
    fit.trainer.eval_dataset = {"first": rows, "second": rows}
    fit.train()
    assert "only the first" in caplog.text


def test_evaluating_outside_of_training_needs_no_average(store: DirectoryStore, tmp_path: Path) -> None:
    """`evaluate()` before and after training is of the raw weights."""
    fit = Fit(tmp_path, callback(store, validate_with_ema=True))
    before = fit.trainer.evaluate()["eval_loss"]
    fit.train()
    assert fit.trainer.evaluate()["eval_loss"] != before
    assert published(store)[-1].training.step == 12


def test_of_two_processes_one_publishes(tmp_path: Path) -> None:
    """With data parallelism over two processes, one of them publishes, and it is the average of what both train."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.peers.conftest import prepare\n"
        "prepare()\n"
        "from tests.peers.oracle import assert_close\n"
        "from tests.peers.test_huggingface import Fit, callback\n"
        "from trainer.distributed import leave_group\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "def main():\n"
        "    averaging = callback(folder / 'store')\n"
        "    fit = Fit(folder, averaging, save_strategy='epoch').train()\n"
        "    assert fit.trainer.state.global_step == 6\n"
        "    assert_close(averaging.ema.ema.state_dict(), fit.recorder.averages[6])\n"
        "main()\n"
        "leave_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=200)
    found = published(DirectoryStore(tmp_path / "store"))
    assert found[-1].training.step == 6
    assert {manifest.term for manifest in found} == {1}
    assert len(list((tmp_path / "out" / "checkpoint-6").glob("emaswap-digits.*.safetensors"))) == 1


def test_the_lines_in_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three statements of docs/integrations.md run as they stand, and publish."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    tokens = torch.arange(10).view(2, 5)
    names = {
        "Architecture": Architecture,
        "Trainer": Trainer,
        "arguments": TrainingArguments(
            str(tmp_path / "out"), max_steps=3, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        "config": BERT,
        "rows": [{"input_ids": tokens[0], "labels": torch.tensor(1)} for _ in range(24)],
        "tiny_bert": tiny_bert,
        "tokens": tokens,
    }
    lines = lines_of("Hugging Face")
    assert len(ast.parse(lines).body) == 3
    exec(lines, names)
    assert DirectoryStore(tmp_path / "store").manifest(1).training.step == 3
