"""Settings of an application: each field is a flag and an `EMASWAP_...` variable, and all are read once."""

import sys
from collections.abc import Sequence
from typing import Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class CommandSettings(BaseSettings):
    """What the settings of every application have in common; a flag wins over its variable."""

    model_config = SettingsConfigDict(env_prefix="EMASWAP_", frozen=True, cli_kebab_case=True, cli_hide_none_type=True)

    @classmethod
    def read(cls, arguments: Sequence[str] | None = None) -> Self:
        """The settings that a command line and the environment give. Ends the process with 2, naming what is wrong."""
        try:
            return cls(_cli_parse_args=list(sys.argv[1:] if arguments is None else arguments))
        except ValidationError as error:
            for problem in error.errors():
                print(f"--{'.'.join(map(str, problem['loc'])).replace('_', '-')}: {problem['msg']}", file=sys.stderr)
            print(f"see {cls.model_config.get('cli_prog_name')} --help", file=sys.stderr)
            raise SystemExit(2) from None
