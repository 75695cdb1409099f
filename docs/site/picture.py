"""A picture of a configuration: what a token passes through, drawn from the choices on the axes."""

from __future__ import annotations

from html import escape

from moelora.config import MoeLoraConfig

_STYLE = "fill:none;stroke:currentColor;stroke-width:1.5"
_CHOSEN = "fill:var(--md-accent-fg-color);fill-opacity:.35;stroke:currentColor;stroke-width:1.5"
_MOST_DRAWN = 8


def picture(config: MoeLoraConfig) -> str:
    """An SVG that takes its colours from the page.

    Filled experts are those that a token goes to; all are dashed where their number differs from token to token.
    """
    routed = config.placement.routes_any
    experts = config.experts.num_experts if routed else 1
    chosen = _chosen(config, experts)
    drawn = min(experts, _MOST_DRAWN)
    width, left = 34, 140
    middle = left + drawn * 20
    parts = [
        _box(10, 85, 90, "input", "of the site"),
        _arrow(100, 110, 140, 110),
        _box(505, 85, 85, "+ base", "output"),
    ]
    if routed:
        few = "" if chosen is None else f"{chosen} of {experts}"
        parts += [
            _box(140, 20, 150, config.scores.kind, "scores"),
            _box(310, 20, 150, config.selection.kind, f"selection {few}".strip()),
            _line(120, 110, 120, 45),
            _arrow(120, 45, 140, 45),
            _arrow(290, 45, 310, 45),
            _line(385, 70, 385, 80),
            _line(385, 80, middle, 80),
            _arrow(middle, 80, middle, 92),
        ]
    for index in range(drawn):
        is_last = index == drawn - 1
        number = experts if is_last else index + 1
        gap = "…" if is_last and experts > drawn else ""
        style = _CHOSEN if chosen is not None and number <= chosen else _STYLE
        dashed = ";stroke-dasharray:4 3" if chosen is None else ""
        x = left + index * 40 + (drawn < experts and is_last) * 14
        if gap:
            parts.append(f'<text x="{x - 10}" y="116" text-anchor="middle">{gap}</text>')
        parts.append(f'<rect x="{x}" y="93" width="{width}" height="34" rx="4" style="{style}{dashed}"/>')
        parts.append(f'<text x="{x + 17}" y="115" text-anchor="middle">{number}</text>')
    what = f"{experts} x {config.experts.kind}" if routed else f"one {config.experts.kind}, no router"
    parts.append(f'<text x="{left}" y="148" class="small">experts: {escape(what)}</text>')
    parts.append(_arrow(left + drawn * 40 + (14 if drawn < experts else 0), 110, 505, 110))
    balance = ", ".join(choice.kind for choice in config.balance if choice.coef) or "none"
    parts.append(f'<text x="10" y="175" class="small">routed: {escape(config.placement.phrase())}</text>')
    parts.append(f'<text x="10" y="193" class="small">balance: {escape(balance)}</text>')
    label = f"{config.scores.kind} scores, {config.selection.kind} selection, {what}" if routed else what
    top, height = (0, 200) if routed else (75, 125)
    return (
        f'<div class="method"><svg viewBox="0 {top} 600 {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg></div>'
    )


def _chosen(config: MoeLoraConfig, experts: int) -> int | None:
    """How many experts a token goes to; None where it depends on the token."""
    if not config.placement.routes_any or config.selection.kind == "dense":
        return experts
    k = getattr(config.selection, "k", None)
    return None if k is None else min(int(k), experts)


def _box(x: int, y: int, width: int, title: str, below: str) -> str:
    middle = x + width // 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="50" rx="6" style="{_STYLE}"/>'
        f'<text x="{middle}" y="{y + 22}" text-anchor="middle">{escape(title)}</text>'
        f'<text x="{middle}" y="{y + 40}" text-anchor="middle" class="small">{escape(below)}</text>'
    )


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<path d="M{x1} {y1} L{x2} {y2}" style="{_STYLE}"/>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    tip = (
        f"M{x2 - 6} {y2 - 4} L{x2} {y2} L{x2 - 6} {y2 + 4}"
        if x1 != x2
        else f"M{x2 - 4} {y2 - 6} L{x2} {y2} L{x2 + 4} {y2 - 6}"
    )
    return f'<path d="M{x1} {y1} L{x2} {y2} {tip}" style="{_STYLE}"/>'
