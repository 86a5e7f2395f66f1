"""What ``lorary serve`` can be told. One frozen dataclass is the source of flags, checks and docs.

Every field carries its help and its range as metadata; the command line (``cli``) and the table in
docs/operations.md are made from them, and ``__post_init__`` checks the same ranges for callers who
build a ``ServerConfig`` in Python.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lorary.errors import ConfigError
from lorary.loopback import is_loopback
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.server.tls import TlsFiles

GIB = 2**30
_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Return the bytes that ``2GiB``, ``512MiB``, ``1.5GB`` or ``4096`` stands for.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"size {text!r} is not understood; write 2GiB, 512MiB or a byte count.")
    return int(float(match[1]) * unit)


def format_size(num_bytes: int) -> str:
    """Return bytes as people write them: the largest binary unit that divides them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)


def _option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    is_size: bool = False,
    env: str | None = None,
) -> Any:
    """Declare a field with its help, its range, its choices, or its environment variable."""
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "is_size": is_size,
        "env": env,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How one server runs.

    Raises:
        ConfigError: a value is out of its range, or two do not go together.
    """

    base: str = _option(
        dataclasses.MISSING, "Base model: a short name (smollm2-135m), a Hub id, or a folder."
    )
    registry: str = _option(
        DEFAULT_REGISTRY,
        "Registry of adapters: file:///path, a folder, or hf://owner.",
        env="LORARY_REGISTRY",
    )
    signatures: Literal["off", "warn", "enforce"] = _option(
        "off",
        "What is asked of adapters' signatures before they are loaded.",
        choices=("off", "warn", "enforce"),
        env="LORARY_SIGNATURES",
    )
    trusted_keys: str | None = _option(
        None,
        "Public keys and root certificates of signers: PEM files, with ':' between.",
        env="LORARY_TRUSTED_KEYS",
    )
    quantize: Literal["auto", "none", "int8", "nf4"] = _option(
        "auto",
        "How the base is quantized; auto is nf4 on CUDA and none on CPU.",
        choices=("auto", "none", "int8", "nf4"),
    )
    quantize_plan: Path | None = _option(  # noqa: RUF009 - it is dataclasses.field
        None,
        "YAML or JSON file that says how each linear layer is quantized; instead of --quantize.",
    )
    device: str = _option("auto", "cpu, cuda or cuda:N; auto takes CUDA where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Type of what is not quantized; auto is bfloat16 where the device multiplies it.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int = _option(0, "CPU threads for the maths; 0 leaves it to torch.", low=0, high=1024)
    pin_threads: bool = _option(
        True, "Give every CPU thread of the maths a core of its own, where it may use them all."
    )
    engine_process: bool = _option(
        False,
        "Run base, adapters and steps in a process of their own: the doors take no time from steps, and tell of "
        "an engine that dies.",
    )
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(50051, "gRPC port; 0 takes a free one.", low=0, high=65535)
    metrics_port: int = _option(
        9400, "Port of /metrics, on the same host; 0 takes a free one.", low=0, high=65535
    )
    router_metrics: bool = _option(
        False,
        "Add to /metrics, under vLLM's names, what endpoint pickers of llm-d and the Gateway API route by.",
    )
    tls_cert: Path | None = _option(  # noqa: RUF009 - it is dataclasses.field
        None, "PEM file of the server's certificate chain; with --tls-key, gRPC speaks TLS only."
    )
    tls_key: Path | None = _option(  # noqa: RUF009
        None, "PEM file of its private key. Changed files count from the next connection on."
    )
    tls_client_ca: Path | None = _option(  # noqa: RUF009
        None, "PEM file of authorities; every client must show a certificate of theirs (mTLS)."
    )
    access: Path | None = _option(  # noqa: RUF009
        None,
        "YAML file of tenants, their tokens and grants (docs/security.md); without it, no one is asked.",
    )
    http_port: int | None = _option(
        None,
        "Port of the OpenAI-compatible HTTP door; 0 takes a free one; left out, there is none.",
        low=0,
        high=65535,
    )
    http_host: str | None = _option(
        None, "Address that --http-port listens on; by default that of --host."
    )
    console: bool | None = _option(
        None,
        "Serve the console, a web page, at /console of the HTTP door; by default on a loopback host, or "
        "with --access.",
    )
    open_inference: bool = _option(
        False,
        "Speak the Open Inference Protocol of KServe and Triton, too: on the gRPC port, and at /v2 of the HTTP door.",
    )
    insecure_bind: bool = _option(
        False, "Allow a host that is not loopback without TLS, or without --access."
    )
    max_batch: int = _option(32, "Most answers in one step.", low=1, high=4096)
    max_context: int = _option(
        2048,
        "Most tokens of prompt and answer together; cut to what the base can.",
        low=16,
        high=2**20,
    )
    max_rank: int = _option(
        128,
        "Largest rank an adapter may have, and that adapters of one call may add up to.",
        low=1,
        high=512,
    )
    adapter_memory: int = _option(
        GIB, "Device memory for adapters, such as 2GiB.", low=2**20, high=2**44, is_size=True
    )
    host_adapter_memory: int | None = _option(
        None,
        "Host memory for copies of adapters that have left the device, such as 8GiB; 0 keeps none. "
        "By default 4GiB on CUDA, and none on a CPU, where --adapter-memory does more.",
        low=0,
        high=2**44,
        is_size=True,
    )
    failed_load_ttl: float = _option(
        5.0,
        "Seconds for which an adapter that could not be loaded is refused without trying again.",
        low=0.0,
        high=86_400.0,
    )
    disk_cache: int = _option(
        0,
        "Bytes of versions fetched from a Hub that are kept on disk, such as 50GiB; 0 sets no limit.",
        low=0,
        high=2**50,
        is_size=True,
    )
    state_dir: Path | None = _option(  # noqa: RUF009 - it is dataclasses.field
        None,
        "Folder in which to remember which adapters are loaded; the next start loads them again, "
        "hottest first, in the background.",
    )
    warm_before_ready: bool = _option(
        False, "Be ready only when the adapters that --state-dir remembers are loaded."
    )
    adapter_dtype: Literal["auto", "bfloat16", "int8", "fp8"] = _option(
        "auto",
        "Type that adapters are kept in; auto is that of dtype. 8 bits hold twice as many (fp8: GPUs only).",
        choices=("auto", "bfloat16", "int8", "fp8"),
    )
    verify: Literal["off", "warn", "enforce"] = _option(
        "warn",
        "What to do about golden probes of an adapter that is loaded: nothing, run them and say so, or "
        "serve it only once it has passed.",
        choices=("off", "warn", "enforce"),
    )
    merge_memory: int = _option(
        0,
        "Device memory for a copy of the layers that one adapter changes, with the adapter folded in, such as "
        "512MiB: calls may then ask for execution MERGED. 0 merges nothing.",
        low=0,
        high=2**44,
        is_size=True,
    )
    merge_share: float = _option(
        0.0,
        "Part of all generated tokens from which on one adapter is merged unasked, for calls with execution "
        "AUTO, such as 0.8; 0 never does it.",
        low=0.0,
        high=1.0,
    )
    kv_memory: int = _option(
        0,
        "Device memory for keys and values, such as 4GiB; 0 takes what --max-batch answers of "
        "--max-context tokens need, but no more than --memory-fraction.",
        low=0,
        high=2**44,
        is_size=True,
    )
    memory_fraction: float = _option(
        0.8,
        "Share of the memory left by base and adapters that keys and values may take.",
        low=0.01,
        high=1.0,
    )
    prefill_budget: int = _option(
        512, "Most prompt tokens in one step, so that streams keep flowing.", low=16, high=2**20
    )
    prefill_beside: int | None = _option(
        None,
        "Most prompt tokens in a step in which answers go on: what a prompt makes them wait. By default 128 on a "
        "CPU, and --prefill-budget on CUDA, which reads that many as fast.",
        low=16,
        high=2**20,
    )
    prefix_cache: bool = _option(
        True,
        "Do not read again what an earlier prompt with the same adapter (or, before an aLoRA's invocation, the "
        "base) began with.",
    )
    shared_layers: int = _option(
        0,
        "How many layers, from the first on, the base and all adapters that leave these alone share in the prefix "
        "cache: of what one has read, another runs only the layers behind. Takes memory for each position; 0 "
        "shares none.",
        low=0,
        high=1024,
    )
    draft_rows: int = _option(
        8,
        "Rows of a step up to which next tokens are guessed from the text so far; 0 guesses none.",
        low=0,
        high=256,
    )
    cuda_graphs: bool = _option(
        False,
        "Run decode steps in a few fixed shapes, captured as CUDA graphs at start: less time between steps, for a "
        "longer start and more GPU memory. Not yet run on a GPU.",
    )
    max_waiting: int = _option(
        1024, "Answers that may wait for a place; more are refused.", low=1, high=2**20
    )
    max_adapters_per_step: int = _option(
        0,
        "Most adapters that running answers may have between them; 0 sets no cap.",
        low=0,
        high=4096,
    )
    alias_poll: float = _option(
        1.0,
        "Seconds between two looks at the aliases in use, give or take a quarter.",
        low=0.01,
        high=3600.0,
    )
    tool_format: Literal["auto", "hermes", "llama3", "mistral"] = _option(
        "auto",
        "How the base writes calls of tools; auto asks its chat template.",
        choices=("auto", "hermes", "llama3", "mistral"),
    )
    patience: float = _option(
        5.0,
        "Seconds after which requests that were passed over for priority or fairness are owed a place.",
        low=0.0,
        high=86_400.0,
    )
    max_message: int = _option(
        4 * 2**20, "Largest message accepted.", low=2**10, high=2**30, is_size=True
    )
    tracked_adapters: int = _option(
        100, "Adapters with metrics of their own; the others share _other.", low=0, high=10_000
    )
    otlp_endpoint: str | None = _option(
        None,
        "Send traces of calls to this collector, by OpenTelemetry's protocol: http://host:4317 speaks gRPC, port "
        "4318 HTTP. Left out, there are none.",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    trace_share: float | None = _option(
        None,
        "Part of the calls that is traced where the caller has not decided, such as 0.05; by default "
        "OTEL_TRACES_SAMPLER says, and without it all are.",
        low=0.0,
        high=1.0,
    )
    drain_delay: float = _option(
        0.0,
        "Seconds to go on accepting calls after SIGTERM, until load balancers have noticed.",
        low=0.0,
        high=600.0,
    )
    drain_timeout: float = _option(
        30.0, "Seconds that running calls get after that.", low=0.0, high=86_400.0
    )
    stall_timeout: float = _option(
        60.0,
        "Seconds for which a stream waits for a caller who has stopped reading it; then it ends.",
        low=0.1,
        high=86_400.0,
    )
    stream_frames: int = _option(
        2000,
        "Frames of all streams in a second, above which a frame carries the tokens of several steps, none of "
        "which waits for more than 0.1 s; 0 sends each token at once.",
        low=0,
        high=1_000_000,
    )
    reflection: bool | None = _option(
        None, "Offer gRPC reflection; by default only on a loopback host."
    )
    ready_file: Path | None = _option(  # noqa: RUF009 - it is dataclasses.field
        None, "Write the addresses there as JSON once ready; removed at the end."
    )
    log_format: Literal["human", "json"] = _option(
        "human", "Form of the log on stderr.", choices=("human", "json")
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "info", "Least severe line that is logged.", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.metadata)
        self._check_tls()
        self._check_tracing()
        lacking = [
            what
            for what, given in (
                ("TLS (--tls-cert, --tls-key)", self.tls_cert),
                ("--access", self.access),
            )
            if given is None
        ]
        exposed = next((h for h in (self.host, self.http_address) if not is_loopback(h)), None)
        if exposed is not None and lacking and not self.insecure_bind:
            raise ConfigError(
                f"host '{exposed}' is not loopback, and there is no {' and no '.join(lacking)}: "
                "whoever reaches the port could listen, or use and unload adapters. Give both, use "
                "127.0.0.1, or pass --insecure-bind where the network is trusted."
            )
        ports = {
            "--port": self.port,
            "--metrics-port": self.metrics_port,
            "--http-port": self.http_port,
        }
        taken: dict[int, str] = {}
        for name, port in ports.items():
            if port and port in taken:
                raise ConfigError(
                    f"{taken[port]} and {name} are both {port}; choose two different ones."
                )
            taken[port or 0] = name
        if self.http_host is not None and self.http_port is None:
            raise ConfigError(
                f"--http-host is '{self.http_host}' and there is no --http-port; name one."
            )
        if self.console and self.http_port is None:
            raise ConfigError(
                "--console was given without --http-port, which opens the door that it is behind. Name a "
                "port, or leave it out."
            )
        if self.quantize_plan is not None and self.quantize != "auto":
            raise ConfigError(
                f"--quantize {self.quantize} and --quantize-plan '{self.quantize_plan}' were both "
                "given; the plan has a default of its own. Leave --quantize out."
            )
        if self.merge_share and not self.merge_memory:
            raise ConfigError(
                f"--merge-share is {self.merge_share:g} and --merge-memory is 0, so there is no room for a "
                "merged copy. Give it as much as the base's layers take, or leave --merge-share out."
            )
        if self.warm_before_ready and self.state_dir is None:
            raise ConfigError(
                "--warm-before-ready was given without --state-dir, so there is nothing to wait for. "
                "Give a folder, or leave it out."
            )
        if self.ready_file is not None and not self.ready_file.absolute().parent.is_dir():
            raise ConfigError(
                f"the folder of --ready-file '{self.ready_file}' does not exist; create it first."
            )

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "--tls-cert and --tls-key belong together, and only one was given. Give both or neither."
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError(
                f"--tls-client-ca '{self.tls_client_ca}' needs TLS; give --tls-cert and --tls-key."
            )

    def _check_tracing(self) -> None:
        if self.otlp_endpoint is None:
            if self.trace_share is not None:
                raise ConfigError(
                    f"--trace-share is {self.trace_share:g} and there is no --otlp-endpoint to send traces to. "
                    "Name one, or leave it out."
                )
            return
        parts = urlsplit(self.otlp_endpoint)
        try:
            is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no number, or none that a port can have
            is_good = False
        if not is_good:
            raise ConfigError(
                f"--otlp-endpoint is '{self.otlp_endpoint}'; it is a URL such as http://127.0.0.1:4317."
            )

    @property
    def tls(self) -> TlsFiles | None:
        """The files that TLS needs; None without it."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(certificate=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def http_address(self) -> str:
        """The address that the HTTP door listens on, where there is one."""
        return self.http_host or self.host

    @property
    def has_console(self) -> bool:
        """Whether the HTTP door has the console, where there is one."""
        if self.console is None:
            return self.access is not None or is_loopback(self.http_address)
        return self.console

    @property
    def has_reflection(self) -> bool:
        """Whether reflection is offered."""
        return self.is_loopback if self.reflection is None else self.reflection


def flag(name: str) -> str:
    """Return a field's flag: ``max_batch`` is ``--max-batch``."""
    return "--" + name.replace("_", "-")


def options_table() -> str:
    """Return every option as a Markdown table, for docs/operations.md."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(ServerConfig):
        meta = field.metadata
        default = _shown_default(field)
        text = str(meta["help"])
        if meta["choices"]:
            text += f" One of {', '.join(meta['choices'])}."
        elif meta["low"] is not None:
            shown = format_size if meta["is_size"] else _plain
            text += f" {shown(meta['low'])} to {shown(meta['high'])}."
        if meta["env"]:
            text += f" Or `{meta['env']}`."
        lines.append(f"| `{flag(field.name)}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _shown_default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"`{format_size(field.default) if field.metadata['is_size'] else field.default}`"


def _plain(value: float) -> str:
    return f"{value:.0f}" if value >= 1 or not value else f"{value:g}"


def _check(name: str, value: Any, meta: Any) -> None:
    """Check one value against its field's metadata."""
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{flag(name)} is '{value}'; it is one of {', '.join(meta['choices'])}.")
    if (
        value is not None
        and meta["low"] is not None
        and not (math.isfinite(value) and meta["low"] <= value <= meta["high"])
    ):
        shown = format_size if meta["is_size"] else _plain
        raise ConfigError(
            f"{flag(name)} is {value}; it must be between {shown(meta['low'])} and "
            f"{shown(meta['high'])}."
        )
    if isinstance(value, str) and not value:
        raise ConfigError(f"{flag(name)} is empty; give it a value or leave it out.")
