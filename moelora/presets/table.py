"""The table of the methods, made of the presets."""

from __future__ import annotations

import dataclasses
import inspect
import re

from moelora.choices import Choice, Site
from moelora.errors import ConfigError
from moelora.preset_registry import about, available, find

HEADER = (
    "preset",
    "paper",
    "what is routed",
    "experts",
    "scores",
    "selection",
    "balance",
    "parameters per rank",
    "verified against",
)
BEGIN = "<!-- methods: `moelora presets --write FILE` makes this table of the presets -->"
END = "<!-- end of methods -->"


def rows() -> list[list[str]]:
    """A row for each preset, in the order of their names, with the cells of `HEADER` in Markdown."""
    return [_row(name) for name in sorted(available())]


def table() -> str:
    """The table in Markdown, between the two comments that mark where it stands."""
    rule = ["---"] * len(HEADER)
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, rule, *rows())]
    return "\n".join((BEGIN, "", *lines, "", END))


def with_table(text: str) -> str:
    """A page with today's table in the place of the one that it has.

    Raises:
        ConfigError: If the page does not have the two comments.
    """
    found = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, flags=re.DOTALL)
    if len(found) != 2:
        raise ConfigError(f"the page has {len(found) - 1} tables of methods; allowed: one, between {BEGIN} and {END}.")
    return table().join(found)


def parameters_per_rank(name: str) -> str:
    """Trainable parameters of a linear's experts per unit of the preset's word `r`, at its default, without the router.

    "8 (in + out)" says 8 times the sum of the linear's features. Of a preset without the word it is the whole number.
    "not linear" says that it is no sum of so many for each feature.
    """
    word = inspect.signature(find(name)).parameters.get("r")
    r = 1 if word is None else word.default
    constant, at_in, at_out, at_both = (_count(name, *size) / r for size in _SIZES)
    if abs(at_both - (2 * at_in + 2 * at_out - 3 * constant)) > 0.01 * at_both:
        return "not linear"
    return _phrase(constant, at_in, at_out)


_SIZES = ((0, 0), (6720, 0), (0, 6720), (13440, 13440))


def _count(name: str, in_features: int, out_features: int) -> float:
    """Trainable parameters of the experts of one linear."""
    config = find(name)()
    routed = config.placement.routes_any
    site = Site(
        name="linear",
        linears={"": (in_features, out_features)},
        num_experts=config.experts.num_experts if routed else 1,
        routed=routed,
        router_features=in_features,
    )
    return sum(param.num_trainable for param in config.expert_params(site))


def _phrase(constant: float, at_in: float, at_out: float) -> str:
    per_in, per_out = (at_in - constant) / _SIZES[1][0], (at_out - constant) / _SIZES[2][1]

    def term(factor: float, what: str) -> list[str]:
        return [] if factor == 0 else [what if factor == 1 else f"{factor:g} {what}"]

    if per_in == per_out:
        terms = term(per_in, "(in + out)") if per_in != 1 else ["in + out"]
    else:
        terms = [*term(per_in, "in"), *term(per_out, "out")]
    return " + ".join([*terms, *([f"{constant:g}"] if constant else [])]) or "0"


def _row(name: str) -> list[str]:
    config, source = find(name)(), about(name)
    arxiv = re.fullmatch(r"\d{4}\.\d{5}", source.paper or "")
    paper = f"[{source.paper}](https://arxiv.org/abs/{source.paper})" if arxiv else source.paper or "none"
    routed = config.placement.routes_any
    return [
        f"`{name}`",
        paper,
        config.placement.phrase(),
        f"{config.experts.num_experts} `{config.experts.kind}`" if routed else f"1 `{config.experts.kind}`",
        _choice(config.scores) if routed else "none",
        _choice(config.selection) if routed else "none",
        ", ".join(_choice(each) for each in config.balance if each.coef) or "none",
        parameters_per_rank(name),
        source.verified,
    ]


def _choice(choice: Choice) -> str:
    """A kind and those of its fields that are not its defaults."""
    fields = {f.name: (getattr(choice, f.name), f.default) for f in dataclasses.fields(choice)}
    words = ", ".join(f"{key}={value}" for key, (value, default) in fields.items() if value != default)
    return f"`{choice.kind}({words})`" if words else f"`{choice.kind}`"
