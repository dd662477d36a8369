"""The trainer's settings: which of them a run that resumes may change."""

import pytest

from trainer.settings import Resuming, TrainerSettings

FREE = {
    "store", "publish_every", "publish_dtype", "device", "tf32", "compile", "deterministic", "resume", "accumulate",
    "keep", "heartbeat", "log_dir", "log_every", "threads", "ranks_timeout_s",
}  # fmt: skip


@pytest.mark.parametrize("name", TrainerSettings.model_fields)
def test_every_setting_says_whether_it_may_change_when_a_run_resumes(name: str) -> None:
    """Where and how a run computes may change; what it learns from may not."""
    marks = [mark for mark in TrainerSettings.model_fields[name].metadata if isinstance(mark, Resuming)]
    assert marks == [Resuming.FREE if name in FREE else Resuming.FIXED]


def test_a_run_is_told_from_another_by_its_fixed_settings() -> None:
    """What makes a checkpoint another run's is exactly the settings that carry the mark, with their values."""
    settings = TrainerSettings.model_validate({"store": "s", "ema_variant": "short=0.05", "learning_rate": 0.1})
    assert settings.fixed().keys() == TrainerSettings.model_fields.keys() - FREE
    assert settings.fixed()["ema_variant"] == ("short=0.05",)
    assert settings.fixed()["learning_rate"] == 0.1
