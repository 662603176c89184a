"""What rewards there are, and whether each works here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .registry import BUILT_IN, Entry


def list_rewards(console: Console) -> None:
    """Prints what rewards there are, and whether each works here as things are installed."""
    table = Table(title="Rewards")
    table.add_column("name", no_wrap=True)
    for title, width in (("what it scores", None), ("needs", 12), ("state here", None), ("licence", 14)):
        table.add_column(title, overflow="fold", max_width=width)
    for name, entry in BUILT_IN.items():
        table.add_row(name, entry.summary, escape(needs_of(entry)), escape(state_of(entry)), entry.licence)
    console.print(table)
    console.print("Also: your own as my_rewards.py:function, a scoring server's URL, and sums: 'ocr + 0.5*mini'.")
    console.print("HPSv3 and DeQA-Score run behind a server, in environments of their own: scorers/README.md.")


def needs_of(entry: Entry) -> str:
    """What a reward needs beside the core: an extra, weights from the hub, a key."""
    needs = {f"[{entry.extra}]": entry.extra, "hub": entry.weights, "a key": entry.environment}
    return ", ".join(name for name, wanted in needs.items() if wanted)


def state_of(entry: Entry) -> str:
    """Whether a reward works here: ready, or what is missing and how to get it."""
    if lacking := entry.lacking():
        return f"lacks {', '.join(lacking)}: pip install 'tdm-r1[{entry.extra}]'"
    for module in entry.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation may raise anything
            return f"{module} cannot be imported: {error}"
    if unset := [name for name in entry.environment if name not in os.environ]:
        return f"installed; set {', '.join(unset)}"
    if absent := [w for w in entry.weights if not is_cached(w)]:
        return f"installed; downloads {', '.join(w.partition(':')[0] for w in absent)} on first use"
    return "ready"


def is_cached(weights: str) -> bool:
    """Whether ``OWNER/NAME:FILE``, or a hub repository's weights in transformers' format, lie in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository, _, file = weights.partition(":")
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots"
    names = [file] if file else ["model*.safetensors", "pytorch_model*.bin"]  # as transformers looks for them
    return any(any(folder.glob(f"*/{name}")) for name in names)
