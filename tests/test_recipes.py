"""What works on the mini model is what the recipes for real models say: they differ in what a table lists, in nothing
else."""

import re
from functools import reduce
from pathlib import Path

import pytest

from tdm_r1.config.load import differences, load_recipe
from tdm_r1.config.run import RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "real_models.md"
GROUPS = ("batch.", "sampler.", "tdm.", "surrogate.", "balance.")
ALGORITHM = ("algorithm", *GROUPS, "model.lora.", "model.dtype", "model.roles", "model.merge")
REAL = ("sd35m_geneval", "sd35m_ocr", "sd35m_imagereward", "sd35m_hps", "sd35m_judge", "zimage_geneval", "zimage_hpsv3")


def listed() -> dict[str, list[str]]:
    """setting -> the cells of its row: mini, SD3.5-M, Z-Image, reason."""
    rows = re.findall(r"^\| `([a-z_.]+)` \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    cells = [(name, [cell.strip() for cell in rest.split("|")]) for name, rest in rows]
    return {name: row for name, row in cells if len(row) == 4}


def apart(one: str, other: str) -> dict[str, tuple[object, object]]:
    found = differences(load_recipe(one), load_recipe(other))
    return {name: (a, b) for name, a, b in found if name.startswith(ALGORITHM)}


@pytest.mark.parametrize("recipe", REAL)
def test_real_recipes_differ_from_the_demo_in_what_the_table_lists(recipe: str):
    column = 2 if recipe.startswith("zimage") else 1
    table = listed()
    assert apart("mini", recipe).keys() <= table.keys()
    for name, cells in table.items():
        if name != "model.lora.targets":  # in words there
            assert (cells[0], cells[column]) == (value("mini", name), value(recipe, name)), name


def value(recipe: str, name: str) -> str:
    return str(reduce(getattr, name.split("."), load_recipe(recipe)))


def test_the_table_lists_nothing_that_does_not_differ():
    assert listed().keys() == {name for recipe in REAL for name in apart("mini", recipe)}


def test_signs_are_learned_with_the_demos_settings():
    assert apart("mini", "mini_ocr").keys() == {"batch.kl_prompts"}


def test_the_demos_settings_are_the_librarys():
    config = load_recipe("mini")
    sized = {"tdm.teacher_guidance", "tdm.generator.learning_rate", "tdm.fake.learning_rate"}
    sized |= {"surrogate.optimizer.learning_rate"}
    plain = {
        name for name, *_ in differences(RunConfig(), config) if name.startswith(("tdm.", "surrogate.", "balance."))
    }
    assert plain <= sized
