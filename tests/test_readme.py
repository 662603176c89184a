"""The README's Python runs as it is printed, on fewer samples."""

import re
from pathlib import Path

import pytest

from tdm_r1.mini.bundle import bundle_path

pytestmark = pytest.mark.slow

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
FEWER = (
    '"iterations": 1, "batch.prompts": 2, "batch.group": 2, "evaluation.prompts": 6, "evaluation.images_per_prompt": 1'
)


def test_readme_python(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward, api, diffusers = BLOCKS
    (tmp_path / "my_rewards.py").write_text(reward)
    assert '"iterations": 20' in api
    names: dict = {}
    exec(api.replace('"iterations": 20', FEWER), names)
    assert names["pictures"].shape == (2, 64, 64, 3)
    assert "runs/mini/lora" in diffusers
    names = {"mini_path": bundle_path()}
    exec(diffusers.replace("runs/mini/lora", "runs/bright_py/lora"), names)
    assert names["image"].size == (64, 64)


def test_readme_files_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (root / target).exists(), target
