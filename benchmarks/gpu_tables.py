"""What ``gpu`` has found: figures against each other, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.markdown import row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Records = Sequence[dict[str, Any]]

WIDE = 32
"""Rows at which as many adapters are compared with none, and with PEFT."""
MOST = 64
"""Rows at which throughput has a bar."""


def decoded(
    records: Records, base: str, rows: int, *, mixed: bool, graphs: bool | None = None
) -> dict[str, Any] | None:
    """Return the newest decode record of a base at so many rows, with adapters or without.

    ``graphs`` says whether steps were captured; None takes those that were, where there are any.
    """
    if graphs is None:
        graphs = any(r["graphs"] for r in records if r["kind"] == "decode" and r["base"] == base)
    wanted = (base, rows, mixed, graphs)
    found = [
        r
        for r in records
        if r["kind"] == "decode"
        and (r["base"], r["rows"], r["adapters"] > 0, r["graphs"]) == wanted
    ]
    return found[-1] if found else None


def peer(records: Records, name: str, rows: int) -> dict[str, Any] | None:
    """Return the newest record of a peer at so many rows."""
    found = [r for r in records if r["kind"] == "peer" and (r["peer"], r["rows"]) == (name, rows)]
    return found[-1] if found else None


def copy_bytes_per_s(records: Records) -> float | None:
    """Return the device's copy rate, if it was measured."""
    found = [r["bytes_per_s"] for r in records if r["kind"] == "copy"]
    return float(found[-1]) if found else None


def allowed_share(mixed: dict[str, Any]) -> float:
    """Return the share of the bare base's speed that a step with adapters can reach: by bytes."""
    base = float(mixed["base_bytes"])
    return base / (base + float(mixed["adapter_bytes"]))


def rate(record: dict[str, Any]) -> float:
    """Return the bytes a second that a decode step has moved."""
    moved = float(record["base_bytes"]) + float(record["adapter_bytes"])
    return moved / (float(record["step_ms"]) / 1e3)


def table_of(records: Records) -> str:
    """Return all that was measured as Markdown."""
    parts = [
        _copy(records),
        _decode(records),
        _peers(records),
        _kernels(records),
        _training(records),
        _failed(records),
    ]
    return "\n\n".join(part for part in parts if part) or "nothing was measured"


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    first = records[0]
    gpu = first["setup"]["gpu"]
    return "\n".join(
        [
            f"{first['date']}, {gpu['name']}, torch {first['versions']['torch']}, triton "
            f"{gpu['triton']}, commit `{first['commit'][:12]}`"
            f"{' with local changes' if first['modified'] else ''}; {first['setup']['shape']} with random "
            f"weights, {first['setup']['prompt_tokens']} prompt tokens, adapters of rank "
            f"{first['setup']['rank']} on every linear layer. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )


def _copy(records: Records) -> str:
    measured = copy_bytes_per_s(records)
    if measured is None:
        return ""
    return f"The card copies {measured / 1e12:.2f} TB/s, bytes read and bytes written counted."


def _decode(records: Records) -> str:
    titles = [
        *("base", "steps", "rows", "tokens/s, base only", "adapters", "tokens/s, with them"),
        *("share kept", "share that the bytes allow", "TB/s, base only", "TB/s, with them"),
        *("launches a step", "device ms of step ms"),
    ]
    lines = [row(titles), row(["---", "---", *["---:"] * (len(titles) - 2)])]
    decodes = [r for r in records if r["kind"] == "decode"]
    for base, graphs, rows in dict.fromkeys((r["base"], r["graphs"], r["rows"]) for r in decodes):
        bare = decoded(records, base, rows, mixed=False, graphs=graphs)
        mixed = decoded(records, base, rows, mixed=True, graphs=graphs)
        if bare is None or mixed is None:
            continue
        lines.append(
            row(
                [
                    *(base, "captured" if graphs else "eager", str(rows)),
                    *(f"{bare['tokens_per_s']:.0f}", str(mixed["adapters"])),
                    f"{mixed['tokens_per_s']:.0f}",
                    f"{mixed['tokens_per_s'] / bare['tokens_per_s']:.0%}",
                    f"{allowed_share(mixed):.0%}",
                    *(f"{rate(bare) / 1e12:.2f}", f"{rate(mixed) / 1e12:.2f}"),
                    str(mixed["launches"]),
                    f"{mixed['device_ms']:.2f} of {mixed['step_ms']:.2f}",
                ]
            )
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _peers(records: Records) -> str:
    lines = [
        row(["beside", "rows", "adapters", "tokens/s", "ours, bf16", "ours / it"]),
        row(["---", *["---:"] * 5]),
    ]
    for name, rows in dict.fromkeys((r["peer"], r["rows"]) for r in records if r["kind"] == "peer"):
        found = peer(records, name, rows)
        assert found is not None
        ours = decoded(records, "bf16", rows, mixed=found["adapters"] > 0)
        shown = ["-", "-"]
        if ours is not None:
            times = ours["tokens_per_s"] / found["tokens_per_s"]
            shown = [f"{ours['tokens_per_s']:.0f}", f"{times:.1f}x"]
        lines.append(
            row(
                [
                    *(name, str(rows), str(found["adapters"])),
                    *(f"{found['tokens_per_s']:.0f}", *shown),
                ]
            )
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _kernels(records: Records) -> str:
    found = [r for r in records if r["kind"] == "kernel"]
    if not found:
        return ""
    titles = ["microseconds", "rank", "rows' adapters", "shrink", "expand", "both", "bmm", "TB/s"]
    lines = [row(titles), row(["---", "---:", "---", *["---:"] * 5])]
    lines += [
        row(
            [
                *(r["group"], str(r["rank"]), r["pattern"]),
                *(f"{r[key]:.1f}" for key in ("shrink_us", "expand_us", "both_us", "bmm_us")),
                f"{r['adapter_bytes'] / r['both_us'] / 1e6:.2f}",
            ]
        )
        for r in found
    ]
    return "\n".join(
        [f"{found[0]['rows']} rows; *bmm* is torch's, over each row's own copy of its adapter:", "", *lines]
    )  # fmt: skip


def _training(records: Records) -> str:
    found = [r for r in records if r["kind"] == "training"]
    if not found:
        return ""
    lines = [
        row(
            [
                "method",
                "rows x tokens",
                "activations",
                "peak memory, GB",
                "expected, GB",
                "tokens/s",
            ]
        ),
        row(["---", "---", "---", "---:", "---:", "---:"]),
    ]
    for r in found:
        kept = "computed again" if r["gradient_checkpointing"] else "kept"
        size = f"{r['rows']} x {r['length']}"
        sizes = [f"{r[f'{what}_memory_bytes'] / 1e9:.1f}" for what in ("peak", "expected")]
        lines.append(row([r["method"], size, kept, *sizes, f"{r['tokens_per_s']:.0f}"]))
    return "\n".join(lines)


def _failed(records: Records) -> str:
    return "\n".join(
        f"Not measured: {r['part']}: {r['error']}" for r in records if r["kind"] == "failed"
    )
