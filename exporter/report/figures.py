"""Numbers as people read them."""

from exporter.foundation.quantities import Pruning

# What is expected on a device: field of a prediction -> title.
ESTIMATES = {
    "decode_tokens_per_s": "decode",
    "sustained_decode_tokens_per_s": "decode, sustained",
    "prefill_tokens_per_s": "prefill",
    "time_to_first_token_ms": "time to first token",
    "peak_bytes": "peak memory",
    "load_ms": "first load",
    "energy_per_token_joules": "energy",
}
BYTE_UNITS = ("kB", "MB", "GB", "TB")


def significant(value: float) -> str:
    """Return a number with three significant digits, and never fewer than its whole part has."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")


def byte_size(size: float) -> tuple[str, str]:
    """Return a number of bytes in decimal units, as a number and its unit: `("105", "MB")`."""
    if abs(size) < 1000:
        return f"{size:,.0f}", "bytes"
    for unit in BYTE_UNITS:
        size /= 1000
        if abs(size) < 999.5 or unit == BYTE_UNITS[-1]:
            break
    return significant(size), unit


def amount(value: float, unit: str) -> tuple[str, str]:
    """Return a value with its unit as people read it: bytes scaled, fractions in percent, a ratio with ×."""
    if unit == "bytes":
        return byte_size(value)
    if unit == "fraction":
        return f"{100 * value:.1f}", "%"
    if unit == "ratio":
        return f"{value:.3f}", "×"
    return significant(value), unit


def text(value: float, unit: str) -> str:
    """Return `amount` as one text."""
    number, shown = amount(value, unit)
    return f"{number} {shown}".rstrip()


def interval(low: float, high: float, unit: str) -> str:
    """Return an interval, its ends with the unit of the higher one: `28 to 60 tokens/s`."""
    least, most = text(low, unit), text(high, unit)
    number, _, shown = least.rpartition(" ")
    return f"{number} to {most}" if shown and most.endswith(f" {shown}") else f"{least} to {most}"


def pruned(pruning: Pruning) -> str:
    """Return in words what was pruned and how the files hold the rest."""
    least, most = min(pruning.widths), max(pruning.widths)
    widths = f"{least}" if least == most else f"{least} to {most}"
    zeros = pruning.zero_bytes
    filled = f"; {text(zeros.value, zeros.unit)} of zeros" if zeros.value else ""
    share = text(pruning.removed.value, pruning.removed.unit)
    gone = f"{share} of the feed-forward channels ({pruning.removed.basis})"
    return f"{gone}, {widths} are left in a layer; {pruning.carried}{filled}"
