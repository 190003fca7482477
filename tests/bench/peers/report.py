"""What came of it: a table, a plot, and one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PEERS = ("mlserver", "mlserver-batching", "litserve", "bentoml", "ray")


def table(result: dict[str, Any]) -> str:
    """A line per server and number in flight, and per peer that is left out."""
    heads = ("in flight", "images/s", "p50 ms", "p99 ms", "CPU ms", "client's", "MB", "lost when killed")
    lines = [f"| {result['model']} | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, found in result["targets"].items():
        for key in (key for key in found if key.isdigit()):
            one = found[key]
            latency = f"{one['p50_ms']:.1f} | {one['p99_ms']:.1f}"
            lines.append(
                f"| {name} {found['version']} | {key} | {one['per_s']:.1f} | {latency} | "
                f"{one['cpu_ms']:.1f} | {one['client_cpu_ms']:.1f} | {one['memory_mb']:.0f} | "
                f"{'-' if found['lost_when_killed'] is None else found['lost_when_killed']} |"
            )
    lines += [f"| {name} | left out: {reason} |" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Images per second by number in flight, a picture per model."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False)
    lines: dict[str, Any] = {}  # one colour each, though a server may be missing with a model
    for axis, result in zip(axes[0], results, strict=True):
        for name, found in result["targets"].items():
            keys = [key for key in found if key.isdigit()]
            colour = lines[name].get_color() if name in lines else f"C{len(lines)}"
            rates = [found[key]["per_s"] for key in keys]
            (lines[name],) = axis.plot(keys, rates, marker="o", color=colour, label=name)
        axis.set(title=result["model"], xlabel="in flight", ylabel="images/s", ylim=(0, None))
    figure.legend(handles=list(lines.values()), loc="outside right upper")
    figure.savefig(path, dpi=120)


def ratios(result: dict[str, Any], most: str, least: str) -> tuple[str, float, float, float] | None:
    """The best peer with this model; by how much Vigil, and with its variants, is faster; its p99 over the least."""
    targets = result["targets"]
    peers = {name: found for name, found in targets.items() if name in PEERS}
    if not peers or "vigil" not in targets:
        return None
    best = max(peers, key=lambda name: float(peers[name][most]["per_s"]))
    rate = peers[best][most]["per_s"]
    quickest = min(float(found[least]["p99_ms"]) for found in peers.values())
    auto = targets.get("vigil-auto", targets["vigil"])
    return (
        best,
        targets["vigil"][most]["per_s"] / rate,
        auto[most]["per_s"] / rate,
        (targets["vigil"][least]["p99_ms"] / quickest),
    )


def last_line(results: list[dict[str, Any]], most: str, least: str) -> str:
    """Throughput and p99 with the first model, variants with the second: the first has little to gain by them."""
    first = ratios(results[0], most, least)
    second = ratios(results[min(1, len(results) - 1)], most, least)
    if first is None or second is None:
        return "peers: nothing to compare, see the table"
    best, throughput, _, p99 = first
    return f"peers: best={best} throughput_vs_best={throughput:.2f} auto_vs_best={second[2]:.2f} p99_vs_best={p99:.2f}"
