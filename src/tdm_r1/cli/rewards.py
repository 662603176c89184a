"""`tdm-r1 rewards`."""

from __future__ import annotations

from rich.console import Console

from ..rewards.overview import list_rewards


def main(args: list[str]) -> int:
    if args:
        print("usage: tdm-r1 rewards\n\nLists the rewards that are known by name, and which of them work here.")
        return 0 if args[0] in ("-h", "--help") else 2
    list_rewards(Console())
    return 0
