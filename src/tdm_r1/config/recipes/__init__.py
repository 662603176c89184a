"""The recipes that come with the package, by name."""

from importlib import resources


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text()
