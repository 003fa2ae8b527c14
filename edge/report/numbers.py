"""How numbers are written for people."""

from __future__ import annotations


def count(value: float) -> str:
    """1,234"""
    return f"{value:,.0f}"


def mb(nbytes: float) -> str:
    """Bytes as megabytes (10**6): 1,234.5 MB, 12.34 MB, 0.123 MB."""
    size = nbytes / 1e6
    if not size:
        return "0 MB"
    return f"{size:,.1f} MB" if size >= 100 else f"{size:.2f} MB" if size >= 1 else f"{size:.3f} MB"


def seconds(value: float) -> str:
    """0.123 s, 12.3 s, 2:03 min, 1:02:03 h"""
    if not value:
        return "0 s"
    if value < 9.995:
        return f"{value:.3f} s" if value < 0.9995 else f"{value:.2f} s"
    if value < 119.95:
        return f"{value:.1f} s"
    minutes, second = divmod(round(value), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02} h" if hours else f"{minute}:{second:02} min"


def loss(value: float | None) -> str:
    """Four decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"


def share(part: float, whole: float) -> str:
    """12.3 %"""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def short(value: float) -> str:
    """Four digits that count: 0.0012, 1.2e-05"""
    return f"{value:.4g}"
