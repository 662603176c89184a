"""A tiny, randomly initialised mini model of the same classes as the bundled one, and short runs on it.

GPUs are hidden from the tests; with ``TDM_R1_TEST_GPU=1`` they are used, but for what is held to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not os.environ.get("TDM_R1_TEST_GPU"):  # before anything that looks for GPUs is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tdm_r1.config.load import load_recipe
from tdm_r1.config.run import RunConfig
from tdm_r1.mini import autoencoder, build, features, pretrain, text
from tdm_r1.train.run import Run

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
for name in ("TDM_R1_TOKEN", "TDM_R1_MINI", "TDM_R1_MINI_SIGNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # what a developer may have set would change what is tested
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
os.environ["COLUMNS"] = "80"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder whose weights are random, none of them zero, so that every path carries gradient."""
    torch.manual_seed(0)
    tokenizer = text.build_tokenizer()
    model = pretrain.MiniBase(tokenizer, layers=2)
    weights = {k: torch.where(v == 0, 0.02 * torch.randn_like(v), v) for k, v in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("models") / "random"
    build.assemble(folder, autoencoder.build_autoencoder(), tokenizer, model, weights)
    features.save_features(features.FeatureNet(), folder / "features.safetensors")
    return folder


@pytest.fixture
def tiny_config(random_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the demo's recipe tiny and points it at the random model; nested settings as dicts."""
    return partial(_tiny, random_model, output=tmp_path)


@pytest.fixture(scope="session")
def finished_run(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one iteration; to be read, or copied."""
    run = Run(_tiny(random_model, output=tmp_path_factory.mktemp("runs"), iterations=1, model={"device": "cpu"}))
    run.fit()
    return run.folder


def _tiny(model: Path, /, **changes) -> RunConfig:
    values = load_recipe("mini").model_dump()
    values |= {"iterations": 2, "save_every": 1, "reward": f"{__file__}:left_brightness"}
    values["model"] |= {"path": str(model), "student_lora": None, "max_sequence_length": 1}
    values["batch"] = {"prompts": 3, "group": 4, "micro_batch": 12}
    values["evaluation"] |= {"every": 0, "prompts": 6, "images_per_prompt": 2, "grid_prompts": 2}
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random CLIP, its image processor and a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = text.build_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def left_brightness(images, prompts, metadata):
    """A reward that no picture ties on: mean of the left half."""
    return images[:, :, :32].mean((1, 2, 3)) / 255.0
