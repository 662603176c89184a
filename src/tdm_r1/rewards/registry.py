"""Rewards by name: what there is, what each needs, and how one is made. Heavy imports stand inside the factories."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scores import Reward

GIVEN = "python:"  # before the name of a function that a run was given, in its saved settings


@dataclass(frozen=True)
class Entry:
    """A reward that is known by name.

    Args:
        summary: what it scores, and in which range.
        make: makes it; imports what it needs.
        extra: the extra of ``pip install 'tdm-r1[...]'`` that it needs.
        modules: what that extra has to bring.
        weights: what is downloaded on first use: hub ids, or ``OWNER/NAME:FILE`` for a file of it alone.
        environment: variables that have to be set.
        blind: whether it scores pictures without looking at their prompts.
        check: raises UserError or ValueError if the reward cannot score a prompt with its metadata.
        licence: of weights or of the engine, as far as its authors state one.
    """

    summary: str
    make: Callable[[], Reward]
    extra: str | None = None
    modules: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    blind: bool = False
    check: Callable[[str, dict[str, Any]], object] | None = None
    licence: str = "Apache-2.0"

    def lacking(self) -> list[str]:
        """Modules that are not installed."""
        return [m for m in self.modules if importlib.util.find_spec(m) is None]


def _mini() -> Reward:
    from ..mini.task import reward

    return reward


def _ocr() -> Reward:
    from .ocr import OCRReward, paper_fidelity

    return OCRReward(paper_fidelity)


def _ocr_line() -> Reward:
    from .ocr import OCRReward, paper_fidelity, rapidocr

    return OCRReward(paper_fidelity, rapidocr(detect=False))


def _ocr_flow_grpo() -> Reward:
    from .ocr import OCRReward, flow_grpo_fidelity, rapidocr

    return OCRReward(flow_grpo_fidelity, rapidocr(turn=False))


def _geneval() -> Reward:
    from .geneval import GenEvalReward

    return GenEvalReward("soft")


def _geneval_strict() -> Reward:
    from .geneval import GenEvalReward

    return GenEvalReward("strict")


def _pickscore() -> Reward:
    from .preference import PickScore

    return PickScore()


def _image_reward() -> Reward:
    from .image_reward import ImageReward

    return ImageReward()


def _vlm() -> Reward:
    from .vlm import VLMJudge

    return VLMJudge()


def _hpsv2() -> Reward:
    from .preference import HPSv2

    return HPSv2("2")


def _hpsv21() -> Reward:
    from .preference import HPSv2

    return HPSv2("2.1")


def _clipscore() -> Reward:
    from .preference import CLIPScore

    return CLIPScore()


def _aesthetic() -> Reward:
    from .preference import Aesthetic

    return Aesthetic()


def _jpeg_incompressibility() -> Reward:
    from .jpeg import incompressibility

    return incompressibility


def _jpeg_compressibility() -> Reward:
    from .jpeg import compressibility

    return compressibility


def _brisque() -> Reward:
    from .brisque import Brisque

    return Brisque()


def _has_target(prompt: str, metadata: dict[str, Any]) -> None:
    from .ocr import target_of

    target_of(prompt, metadata)


def _has_metadata(prompt: str, metadata: dict[str, Any]) -> None:
    from .geneval_protocol import why_not

    if why := why_not(metadata):
        raise ValueError(f"{prompt!r}: {why}")


def _ocr_entry(summary: str, make: Callable[[], Reward]) -> Entry:
    modules = ("rapidocr", "onnxruntime", "rapidfuzz")
    return Entry(summary, make, "ocr", modules, check=_has_target, licence="Apache-2.0 (PP-OCR)")


def _geneval_entry(summary: str, make: Callable[[], Reward]) -> Entry:
    weights = ("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14")
    return Entry(summary, make, weights=weights, check=_has_metadata, licence="MIT (CLIP); see the detector's card")


def _hps_entry(summary: str, make: Callable[[], Reward], version: str) -> Entry:
    weights = (f"xswu/HPSv2:HPS_v{version}_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    return Entry(summary, make, weights=weights, licence="Apache-2.0 (HPSv2)")


BUILT_IN: dict[str, Entry] = {
    "mini": Entry("Obedience to the mini world's prompts, half strict, half graded, in [0, 1].", _mini),
    "ocr": _ocr_entry("Text fidelity, TDM-R1's formula, in [0, 1].", _ocr),
    "ocr_line": _ocr_entry("As ocr, for a picture that is one line of text: many times faster.", _ocr_line),
    "ocr_flow_grpo": _ocr_entry("Text fidelity, blind to case, spaces and surplus text, in [0, 1].", _ocr_flow_grpo),
    "geneval": _geneval_entry("GenEval, graded as in Flow-GRPO, in [0, 1].", _geneval),
    "geneval_strict": _geneval_entry("GenEval's own verdict, 0 or 1.", _geneval_strict),
    "pickscore": Entry(
        "PickScore v1, about 20 to 23.",
        _pickscore,
        weights=("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K:preprocessor_config.json"),
        licence="see the model's card",
    ),
    "imagereward": Entry(
        "ImageReward v1.0, about -2 to 2.",
        _image_reward,
        weights=("THUDM/ImageReward:ImageReward.pt", "google-bert/bert-base-uncased:tokenizer.json"),
        licence="Apache-2.0",
    ),
    "vlm": Entry(
        "A judge behind OpenAI's chat interface (OPENAI_BASE_URL, OPENAI_API_KEY), 1 to 5.",
        _vlm,
        "vlm",
        ("openai",),
        environment=("OPENAI_API_KEY",),
        licence="the judge's own",
    ),
    "hpsv2": _hps_entry("HPS v2, about .2 to .35.", _hpsv2, "2"),
    "hpsv2.1": _hps_entry("HPS v2.1, about .2 to .35; not to be compared with v2.", _hpsv21, "2.1"),
    "clipscore": Entry(
        "CLIPScore of ViT-L/14, 2.5 max(cosine, 0).",
        _clipscore,
        weights=("openai/clip-vit-large-patch14",),
        licence="MIT (CLIP)",
    ),
    "aesthetic": Entry(
        "LAION's aesthetic predictor, about 1 to 10, blind to the prompt.",
        _aesthetic,
        weights=("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"),
        blind=True,
        licence="MIT (CLIP); see the head's card",
    ),
    "brisque": Entry(
        "Minus BRISQUE, about -100 to 0: how natural a photograph looks, blind to the prompt.",
        _brisque,
        "brisque",
        ("brisque", "cv2"),
        blind=True,
        licence="Apache-2.0 (package); see its model's origin",
    ),
    "jpeg_incompressibility": Entry("Size as JPEG of quality 95, in kB (DDPO).", _jpeg_incompressibility, blind=True),
    "jpeg_compressibility": Entry("The same, negated (DDPO).", _jpeg_compressibility, blind=True),
}


def named(reward: Reward) -> str:
    """What a run's settings call a function that it was given."""
    return f"{GIVEN}{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def load_reward(name: str) -> Reward:
    """A reward by name, or a user's own as ``path/to/file.py:function``. Raises ValueError on anything else."""
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
    if not colon or not path.endswith(".py"):
        known = ", ".join(BUILT_IN)
        raise ValueError(
            f"reward = {name!r} is not known: use one of {known}, your own as my_rewards.py:function, "
            "or the URL of a scoring server"
        )
    return _users_own(name, Path(path), function)


def _users_own(name: str, file: Path, function: str) -> Reward:
    if not file.is_file():
        raise ValueError(f"reward = {name!r}: no such file {str(file)!r}")
    spec = importlib.util.spec_from_file_location(f"tdm_r1_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward = {name!r}: {str(file)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (beside := str(file.parent.resolve())) not in sys.path:
        sys.path.append(beside)  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"reward = {name!r}: {str(file)!r} cannot be imported: {error}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        have = ", ".join(n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_"))
        raise ValueError(f"reward = {name!r}: {file} has no function {function!r}; it has: {have or 'none'}")
    return reward
