"""Settings of an application: each field is a flag and an `EMASWAP_...` variable, and all are read once."""

import sys
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BeforeValidator, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split(value: object) -> object:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return values
    return tuple(part.strip() for text in values for part in str(text).split(",") if part.strip())


CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Texts that may be given one by one, by repeating the flag, or separated by commas."""


class CommandSettings(BaseSettings):
    """What the settings of every application have in common; a flag wins over its variable."""

    model_config = SettingsConfigDict(env_prefix="EMASWAP_", frozen=True, cli_kebab_case=True, cli_hide_none_type=True)

    @classmethod
    def read(cls, arguments: Sequence[str] | None = None) -> Self:
        """Return the settings that a command line and the environment give. Ends the process with 2, naming what is wrong."""
        try:
            return cls(_cli_parse_args=list(sys.argv[1:] if arguments is None else arguments))
        except ValidationError as error:
            for problem in error.errors():
                print(f"--{'.'.join(map(str, problem['loc'])).replace('_', '-')}: {problem['msg']}", file=sys.stderr)
            print(f"see {cls.model_config.get('cli_prog_name')} --help", file=sys.stderr)
            raise SystemExit(2) from None
