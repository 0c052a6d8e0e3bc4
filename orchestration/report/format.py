"""Numbers, durations, times and prices as a person writes them."""

import math
import unicodedata
from datetime import datetime

DASH, MINUS, CUT = "\u2013", "\u2212", "\u2026"
WIDE = frozenset("mwMW@%\u2014")


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


def text_width(text: str) -> float:
    """Return about how wide a text of a chart is, in SVG units; its letters are 11 units high."""
    return sum(11 if letter in WIDE or unicodedata.east_asian_width(letter) in "WF" else 6 for letter in text)


def shortened(text: str, max_width: float) -> str:
    """Return a text that is cut to a width of a chart, in SVG units."""
    if text_width(text) <= max_width:
        return text
    kept = len(text)
    while kept and text_width(text[:kept]) + text_width(CUT) > max_width:
        kept -= 1
    return f"{text[:kept]}{CUT}"
