"""The service's settings: each a flag and an `EMASWAP_...` variable, read once."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag, SettingsConfigDict

from emaswap.settings import CommandSettings, CommaSeparated
from emaswap.versions.architecture import TRUSTED_BY_DEFAULT


class ServiceSettings(CommandSettings):
    """Serve the newest (or the pinned) version in a store over HTTP, and follow the store as it changes."""

    model_config = SettingsConfigDict(cli_prog_name="python -m service")

    store: str = Field(description="Directory of the store to follow; it need not be there yet.")
    variant: str | None = Field(
        None, description="Which of a version's averages to serve, by the name of a variant; by default the main one."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one, which the log names.")
    uds: Path | None = Field(None, description="Unix socket to listen on, instead of an address and a port.")
    root_path: str = Field("", description="Path that a proxy in front takes off, so that /docs finds its schema.")
    trusted_proxies: CommaSeparated = Field(
        (),
        description="Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed; none by default.",
    )
    cors_origin: CommaSeparated = Field(
        (), description="Origin whose pages may ask, as `https://example.org`, or * for all; none by default."
    )
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        1,
        description="Processes that answer, all from one copy of the weights; `auto` for one on each processor. On CUDA, one.",
    )
    trust: CommaSeparated = Field(
        (),
        description="Factory to trust besides those of emaswap.models, as `package.module:factory` or `package.*`; "
        "may be repeated, or separated by commas.",
    )
    admin_token_file: Path | None = Field(
        None, description="File with the bearer token of /model/pin and /model/refresh; without it they are off."
    )
    predict_token_file: Path | None = Field(
        None,
        description="File with the bearer token that requests for predictions must carry; without it, anybody may ask.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to run the model.")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that torch computes with on the CPU; 0 for half of the processors that are there.",
    )
    batching: CliImplicitFlag[bool] = Field(
        True,
        description="Whether requests run through the model together; no for models whose answers depend on the batch.",
    )
    poll_s: float = Field(
        1.0, gt=0, le=3600, description="Seconds between looks at the store; notifications only make it quicker."
    )
    load_timeout_s: float = Field(
        300.0, gt=0, le=86400, description="Seconds that loading a version may take; then it is given up."
    )
    guard_s: float = Field(
        10.0,
        ge=0,
        le=86400,
        description="Seconds after a version went live in which the one before is kept ready, to answer again at once if "
        "the new one fails or answers with NaNs; 0 for none.",
    )
    max_model_bytes: int | None = Field(
        None, ge=1, description="Largest weights file to load, in bytes; a version with a larger one is rejected."
    )
    max_body_bytes: int = Field(8 << 20, ge=1, description="Largest request body; a larger one is answered 413.")
    max_batch_rows: int = Field(512, ge=1, description="Most rows of one request, and of one batch of requests.")
    max_waiting: int = Field(1024, ge=1, description="Requests that may wait for the model; more are answered 429.")
    max_waiting_bytes: int = Field(
        256 << 20, ge=1, description="Bytes of inputs that may wait for the model; more are answered 429."
    )
    max_connections: int = Field(
        4096,
        ge=1,
        description="Connections that may be open; where files are short, fewer. Idle ones make room for new.",
    )
    idle_timeout_s: float = Field(
        60.0, gt=0, le=86400, description="Seconds that a connection may wait for its next request."
    )
    head_timeout_s: float = Field(
        10.0, gt=0, le=86400, description="Seconds a client may take to send its headers; then 408."
    )
    body_timeout_s: float = Field(
        30.0, gt=0, le=86400, description="Seconds a client may take to send its body; then 408."
    )
    forward_timeout_s: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="Seconds that the model may take for a batch; then 503, and its version is given up.",
    )
    drain_s: float = Field(
        0.5, ge=0, le=3600, description="Seconds after SIGTERM in which /readyz says no, but requests are still taken."
    )
    shutdown_s: float = Field(30.0, gt=0, le=3600, description="Seconds that requests in flight then have to finish.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Log lines as JSON or as text; `auto` is text on a terminal and JSON elsewhere."
    )

    @property
    def trusted(self) -> tuple[str, ...]:
        """Every factory and package that models may be built from."""
        return (*TRUSTED_BY_DEFAULT, *self.trust)
