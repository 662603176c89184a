"""Tables of an evaluation's result."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

HELD_OUT = "held_out"  # the task's own metrics, among the rewards
TOTALS = ("mean", "overall")  # of a reward's numbers


def columns_of(result: dict) -> dict[tuple[str, str], str]:
    """(metric, number) -> title: the trained reward first, by family where prompts have one, and what it is made of;
    then the others."""
    return {
        (metric, number): number if metric == HELD_OUT else metric if number in TOTALS else f"{metric}: {number}"
        for model in result["models"]
        for metric, numbers in model["scores"].items()
        for number in numbers
        if number != "missing" and not (number.endswith("mean") and f"{number[:-4]}overall" in numbers)
    }


def with_other_prompts(result: dict, other: dict, path: str) -> dict:
    """The result with the metrics of the same models on other prompts, those of ``path``, each by the name of both."""
    name = Path(path).stem
    models = [
        m | {"scores": m["scores"] | {f"{k} ({name})": v for k, v in o["scores"].items() if k != HELD_OUT}}
        for m, o in zip(result["models"], other["models"], strict=True)
    ]
    asked = {"name": name, "path": path, "prompts": other["prompts"], "images_per_prompt": other["images_per_prompt"]}
    return result | {"models": models, "other_prompts": asked}


def markdown(result: dict) -> str:
    """Models down, metrics across, as in the paper's tables."""
    o = result.get("other_prompts")
    elsewhere = f" ({o['name']}): {o['prompts']} prompts of {o['path']}, {o['images_per_prompt']} each." if o else ""
    columns = columns_of(result)
    lines = [
        f"{result['prompts']} prompts, {result['images_per_prompt']} pictures each, the same noise for every model."
        f"{elsewhere} Missing scores are left out and counted in results.json.",
        "",
        "| model | NFE | " + " | ".join(columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for m in result["models"]:
        cells = [f"{m['scores'][metric].get(number, float('nan')):.3f}" for metric, number in columns]
        lines.append(f"| {m['model']} | {m['network_evaluations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(result: dict) -> Table:
    """The table for a terminal: metrics down, since they are many."""
    table = Table("metric", *(m["model"] for m in result["models"]))
    table.add_row("NFE", *(str(m["network_evaluations"]) for m in result["models"]))
    for (metric, number), title in columns_of(result).items():
        table.add_row(title, *(f"{m['scores'][metric].get(number, float('nan')):.3f}" for m in result["models"]))
    return table
