"""Numbers as text for people."""

import math
from typing import Any


def number(value: Any, digits: int = 2) -> str:
    """A number with a true minus sign and thousands separated; a dash where there is none.

    Integers are shown whole, others with ``digits`` decimals, or in two significant digits where that
    would show nothing of them.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    small = 1e-9 < abs(value) < 0.5 * 10**-digits
    text = f"{value:.1e}" if small else f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) != 0 else text.lstrip("-")


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """Both ends of an interval; a dash where there is none."""
    return "–" if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash where there is none."""
    return "–" if value is None else f"{number(100 * value, digits)} %"


def size(count: int) -> str:
    """Bytes in decimal units."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def duration(seconds: float) -> str:
    """A time span in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
