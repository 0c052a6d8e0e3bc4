"""Numbers, durations, times and prices as a person writes them."""

import math
from datetime import datetime

DASH, MINUS = "\u2013", "\u2212"


def tick_label(value: float) -> str:
    """Format a number for an axis: 1,200, 0.25, 1e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS, value < 0)
    return f"{value:,.6g}".replace("-", MINUS)


def number(value: float | None) -> str:
    """Format a measured number with three significant digits: 0.300, 12.0, 1,234."""
    if value is None or not math.isfinite(value):
        return DASH
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:#.3g}".removesuffix(".").replace("-", MINUS)
    return tick_label(round(value) if abs(value) >= 1 else float(f"{value:.3g}"))


def duration(seconds: float | None) -> str:
    """Format seconds: 12.3 s, 4 min 10 s, 2 h 05 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str, form: str = "%-d %B %Y, %H:%M %Z") -> str:
    """Format an ISO time: 23 November 2026, 23:10 UTC."""
    return datetime.fromisoformat(text).strftime(form)


def money(amount: float) -> str:
    """Format a price with two decimals and thousands separators."""
    return f"{amount:,.2f}"
