"""Rewards by name: what there is, what each needs, and how one is made. Heavy imports happen when one is made."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..plugins import import_name, is_outside, told
from .scores import Reward

GIVEN = "python:"  # before the name of a function that a run was given, in its saved settings


@dataclass(frozen=True)
class Entry:
    """A reward that is known by name.

    Args:
        summary: what it scores, and in which range.
        factory: ``module:name`` of what makes it.
        settings: arguments of the factory; None if that is the reward itself.
        extra: the extra of ``pip install 'tdm-r1[...]'`` that it needs.
        modules: what that extra has to bring.
        weights: what is downloaded on first use: hub ids, or ``OWNER/NAME:FILE`` for one file of it.
        environment: variables that have to be set.
        blind: whether it scores images without reading their prompts.
        check: ``module:name`` of a function of a prompt and its metadata that raises UserError or ValueError if the
            reward cannot score it.
        licence: of weights or of the engine, as far as its authors state one.
        bounds: between which a score of any picture lies.
    """

    summary: str
    factory: str
    settings: Mapping[str, Any] | None = field(default_factory=dict)
    extra: str | None = None
    modules: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    blind: bool = False
    check: str | None = None
    licence: str = "Apache-2.0"
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def lacking(self) -> list[str]:
        """Modules that are not installed."""
        return [m for m in self.modules if importlib.util.find_spec(m) is None]

    def make(self) -> Reward:
        """The reward."""
        made = import_name(self.factory, "reward")
        return made if self.settings is None else made(**self.settings)


HERE = "tdm_r1.rewards"
OCR = Entry(
    "Text fidelity, TDM-R1's formula, in [0, 1].",
    f"{HERE}.ocr:ocr",
    extra="ocr",
    modules=("rapidocr", "onnxruntime", "rapidfuzz"),
    check=f"{HERE}.ocr:target_of",
    licence="Apache-2.0 (PP-OCR)",
    bounds=(0, 1),
)
GENEVAL = Entry(
    "GenEval, graded as in Flow-GRPO, in [0, 1].",
    f"{HERE}.geneval:GenEvalReward",
    {"kind": "soft"},
    weights=("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"),
    check="tdm_r1.tasks.geneval_protocol:require_metadata",
    licence="MIT (CLIP); see the detector's card",
    bounds=(0, 1),
)


def _hps(summary: str, version: str) -> Entry:
    weights = (f"xswu/HPSv2:HPS_v{version}_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    factory = f"{HERE}.preference:HPSv2"
    return Entry(summary, factory, {"version": version}, weights=weights, licence="Apache-2.0 (HPSv2)", bounds=(0, 0.5))


BUILT_IN: dict[str, Entry] = {
    "mini": Entry(
        "Agreement with the mini world's prompts, half strict, half graded, in [0, 1].",
        "tdm_r1.mini.task:reward",
        None,
        bounds=(0, 1),
    ),
    "ocr": OCR,
    "ocr_line": replace(
        OCR,
        summary="As ocr, for an image that is one line of text: many times faster.",
        settings={"detect": False},
    ),
    "ocr_flow_grpo": replace(
        OCR,
        summary="Text fidelity that ignores case, spaces and surplus text, in [0, 1].",
        settings={"formula": "flow_grpo", "turn": False},
    ),
    "geneval": GENEVAL,
    "geneval_strict": replace(GENEVAL, summary="GenEval's own verdict, 0 or 1.", settings={"kind": "strict"}),
    "pickscore": Entry(
        "PickScore v1, about 20 to 23.",
        f"{HERE}.preference:PickScore",
        weights=("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K:preprocessor_config.json"),
        licence="see the model's card",
        bounds=(10, 30),
    ),
    "imagereward": Entry(
        "ImageReward v1.0, about -2 to 2.",
        f"{HERE}.image_reward:ImageReward",
        weights=("THUDM/ImageReward:ImageReward.pt", "google-bert/bert-base-uncased:tokenizer.json"),
        bounds=(-4, 4),
    ),
    "vlm": Entry(
        "A judge behind OpenAI's chat interface (OPENAI_BASE_URL, OPENAI_API_KEY), 1 to 5.",
        f"{HERE}.vlm:VLMJudge",
        extra="vlm",
        modules=("openai",),
        environment=("OPENAI_API_KEY",),
        licence="the judge's own",
        bounds=(1, 5),
    ),
    "hpsv2": _hps("HPS v2, about 0.2 to 0.35.", "2"),
    "hpsv2.1": _hps("HPS v2.1, about 0.2 to 0.35; not comparable with v2.", "2.1"),
    "clipscore": Entry(
        "CLIPScore of ViT-L/14, 2.5 max(cosine, 0).",
        f"{HERE}.preference:CLIPScore",
        weights=("openai/clip-vit-large-patch14",),
        licence="MIT (CLIP)",
        bounds=(0, 2.5),
    ),
    "aesthetic": Entry(
        "LAION's aesthetic predictor, about 1 to 10; does not use the prompt.",
        f"{HERE}.preference:Aesthetic",
        weights=("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"),
        blind=True,
        licence="MIT (CLIP); see the head's card",
        bounds=(-5, 15),
    ),
    "brisque": Entry(
        "Minus BRISQUE, about -100 to 0: how natural a photograph looks; does not use the prompt.",
        f"{HERE}.brisque:Brisque",
        extra="brisque",
        modules=("brisque", "cv2"),
        blind=True,
        licence="Apache-2.0 (package); see its model's origin",
        bounds=(-150, 10),
    ),
    "jpeg_incompressibility": Entry(
        "Size as JPEG of quality 95, in kB (DDPO).", f"{HERE}.jpeg:incompressibility", None, blind=True, bounds=(0, 1e5)
    ),
    "jpeg_compressibility": Entry(
        "Minus the size as JPEG of quality 95, in kB (DDPO).",
        f"{HERE}.jpeg:compressibility",
        None,
        blind=True,
        bounds=(-1e5, 0),
    ),
}


def named(reward: Reward) -> str:
    """What a run's settings call a function that it was given."""
    return f"{GIVEN}{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def load_reward(name: str) -> Reward:
    """A reward by name, or a user's own as ``path/to/file.py:function`` or ``package.module:Name`` (a function, or a
    class that is made without arguments). Raises ValueError on anything else."""
    if name in BUILT_IN:
        entry = BUILT_IN[name]
        if lacking := entry.lacking():
            raise ValueError(
                f"reward = {name!r} needs {', '.join(lacking)}, which is not installed: "
                f"pip install 'tdm-r1[{entry.extra}]'"
            )
        return entry.make()
    if name.startswith(GIVEN):
        raise ValueError(
            f"reward = {name!r} is a function that the run was given in Python: give it again as Run(..., reward=...), "
            f"or put it into a file and name it as my_rewards.py:{name.removeprefix(GIVEN)}"
        )
    path, colon, function = name.rpartition(":")
    if is_outside(name) and not path.endswith(".py"):
        found = import_name(name, "reward")
        return found() if isinstance(found, type) else found
    if not colon or not path.endswith(".py"):
        known = ", ".join(BUILT_IN)
        raise ValueError(
            f"reward = {name!r} is not known: use one of {known}, your own as my_rewards.py:function or "
            "package.module:Name, or the URL of a scoring server"
        )
    return _users_own(name, Path(path), function)


def _users_own(name: str, file: Path, function: str) -> Reward:
    if not file.is_file():
        raise ValueError(f"reward = {name!r}: no such file {str(file)!r}; give the path of an existing .py file")
    spec = importlib.util.spec_from_file_location(f"tdm_r1_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward = {name!r}: {str(file)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (beside := str(file.parent.resolve())) not in sys.path:
        sys.path.append(beside)  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is a user's: anything may be wrong with it
        raise ValueError(f"reward = {name!r}: {str(file)!r} cannot be imported: {told(error)}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        have = ", ".join(n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_"))
        raise ValueError(f"reward = {name!r}: {file} has no function {function!r}; it has: {have or 'none'}")
    return reward
