"""GenEval's rules on hand-made detections. Expected values are worked out by hand from the benchmark's definition
(arXiv 2310.11513 and its evaluation script) and from Flow-GRPO's reward (arXiv 2505.05470)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tdm_r1.tasks.geneval_protocol import Detection, judged, relations_of, soft, strict


@dataclass(frozen=True)
class Painted(Detection):
    color: str = ""


def det(name: str, x: float = 50, y: float = 50, *, size: float = 20, conf: float = 0.95, color: str = "") -> Painted:
    h = size / 2
    return Painted(name, conf, (x - h, y - h, x + h, y + h), color=color)


def color_of(found):
    return [d.color for d in found]


def n_of(name: str, n: int, **kwargs) -> list[Detection]:
    return [det(name, x=30 * i, **kwargs) for i in range(n)]


def part(name: str, count: int = 1, **kwargs) -> dict:
    return {"class": name, "count": count, **kwargs}


SINGLE = {"tag": "single_object", "include": [part("bench")]}
TWO = {"tag": "two_object", "include": [part("bench"), part("dog")]}
COUNTING = {"tag": "counting", "include": [part("clock", 2)], "exclude": [part("clock", 3)]}
COLOR = {"tag": "colors", "include": [part("car", color="red")]}
POSITION = {"tag": "position", "include": [part("dog"), part("cup", position=["left of", 0])]}
ATTR = {"tag": "color_attr", "include": [part("car", color="red"), part("dog", color="blue")]}

CASES = {
    # name: (metadata, detections, strict, soft)
    "single: found": (SINGLE, [det("bench")], True, 1.0),
    "single: nothing found": (SINGLE, [], False, 0.0),
    "single: another class": (SINGLE, [det("dog")], False, 0.0),
    "single: a surplus one is not judged": (SINGLE, n_of("bench", 2), True, 0.0),
    "single: other objects do no harm": (SINGLE, [det("bench"), det("dog")], True, 1.0),
    "single: at the threshold is not above it": (SINGLE, [det("bench", conf=0.3)], False, 0.0),
    "single: just above the threshold": (SINGLE, [det("bench", conf=0.301)], True, 1.0),
    "two: both": (TWO, [det("dog"), det("bench")], True, 1.0),
    "two: one of them": (TWO, [det("dog")], False, 0.5),
    "two: neither": (TWO, [det("cat")], False, 0.0),
    "two: one of them doubled": (TWO, [det("dog"), *n_of("bench", 2)], True, 0.5),
    "counting: right": (COUNTING, n_of("clock", 2), True, 1.0),
    "counting: one short": (COUNTING, n_of("clock", 1), False, 0.5),
    "counting: none": (COUNTING, [], False, 0.0),
    "counting: one too many is excluded": (COUNTING, n_of("clock", 3), False, 0.5),
    "counting: twice as many": (COUNTING, n_of("clock", 4), False, 0.0),
    "counting: three times as many is 0, not negative": (COUNTING, n_of("clock", 6), False, 0.0),
    "counting: .9 is not above .9": (COUNTING, [*n_of("clock", 1), det("clock", x=200, conf=0.9)], False, 0.5),
    "counting: unsure ones do not count": (COUNTING, [*n_of("clock", 2), det("clock", x=200, conf=0.6)], True, 1.0),
    "colour: right": (COLOR, [det("car", color="red")], True, 1.0),
    "colour: wrong": (COLOR, [det("car", color="blue")], False, 0.5),
    "colour: no object": (COLOR, [], False, 0.0),
    "colour: the most confident is judged": (
        COLOR,
        [det("car", conf=0.5, color="blue"), det("car", x=200, conf=0.9, color="red")],
        True,
        0.0,
    ),
    "colour: a less confident one cannot help": (
        COLOR,
        [det("car", conf=0.9, color="blue"), det("car", x=200, conf=0.5, color="red")],
        False,
        0.0,
    ),
    "colour: surplus objects cost colour too": (
        {"tag": "colors", "include": [part("car", 2, color="red")]},
        n_of("car", 3, color="red"),
        True,
        0.25,
    ),
    "colour: one of two": (
        {"tag": "colors", "include": [part("car", 2, color="red")]},
        [det("car", color="red"), det("car", x=200, color="blue")],
        False,
        0.75,
    ),
    "position: holds": (POSITION, [det("dog", x=100), det("cup", x=20)], True, 1.0),
    "position: the other way round": (POSITION, [det("dog", x=20), det("cup", x=100)], False, 2 / 3),
    "position: no anchor": (POSITION, [det("cup")], False, 1 / 3),
    "position: nothing to place": (POSITION, [det("dog")], False, 1 / 3),
    "position: above rather than left": (POSITION, [det("dog", y=100), det("cup", y=20)], False, 2 / 3),
    "position: two anchors, the surer one judged": (
        POSITION,
        [det("dog", x=100, conf=0.9), det("dog", x=0, conf=0.4), det("cup", x=50)],
        True,
        1 / 3,
    ),
    "attributes: both right": (ATTR, [det("car", color="red"), det("dog", color="blue")], True, 1.0),
    "attributes: swapped": (ATTR, [det("car", color="blue"), det("dog", color="red")], False, 0.5),
    "attributes: one wrong": (ATTR, [det("car", color="red"), det("dog", color="red")], False, 0.75),
    "attributes: one missing": (ATTR, [det("car", color="red")], False, 0.5),
    "exclude: below its count": (SINGLE | {"exclude": [part("dog", 2)]}, [det("bench"), det("dog")], True, 1.0),
    "exclude: at its count": (SINGLE | {"exclude": [part("dog", 1)]}, [det("bench"), det("dog")], False, 1.0),
}


@pytest.mark.parametrize(("metadata", "detections", "correct", "graded"), CASES.values(), ids=CASES.keys())
def test_verdict_and_graded_reward(metadata: dict, detections: list[Detection], correct: bool, graded: float):
    verdict = strict(detections, metadata, color_of)
    assert verdict.correct == correct, verdict.reasons
    assert bool(verdict.reasons) != correct
    assert soft(detections, metadata, color_of) == pytest.approx(graded)
    assert strict(detections[::-1], metadata, color_of).correct == correct, "the order of detections must not matter"


def test_reasons_name_what_is_missing():
    verdict = strict([det("car", color="blue")], ATTR, color_of)
    assert verdict.reasons == ("expected 1 red car, found blue", "expected 1 dog, found 0")
    assert strict(n_of("clock", 3), COUNTING, color_of).reasons == ("expected fewer than 3 clock, found 3",)
    assert strict([det("cup")], POSITION, color_of).reasons[1] == "nothing right for cup to be left of"


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-60, 0, {"left of"}),
        (60, 0, {"right of"}),
        (0, -60, {"above"}),
        (0, 60, {"below"}),
        (0, 0, set()),
        (4, 0, set()),  # a tenth of 20 + 20: nothing is left of the offset
        (4.001, 0, set()),  # what is left is no more than a rounding error
        (7.9, 0, set()),  # 3.9 / 7.9 is below a half
        (8.1, 0, {"right of"}),  # 4.1 / 8.1 is above it
        (60, 60, {"right of", "below"}),  # 56 / 84.9 = .66 in both
        (-60, 60, {"left of", "below"}),
        (60, 30, {"right of"}),  # 26 / 67.1 = .39
        (60, 42, {"right of", "below"}),  # 38 / 73.2 = .52
        (12, 12, set()),  # 8 / 17 = .47 in both: too near to tell, although clear of each other in part
    ],
)
def test_geometry_of_positions(dx: float, dy: float, expected: set[str]):
    assert relations_of(det("a", x=100 + dx, y=100 + dy), det("b", x=100, y=100)) == expected


def test_larger_objects_need_a_larger_offset():
    far, near = det("a", x=130, size=20), det("b", x=100, size=20)
    assert relations_of(far, near) == {"right of"}
    wide = det("b", x=100, size=300)
    assert relations_of(far, wide) == set()


def test_at_most_sixteen_of_a_class_are_judged():
    found = judged([det("clock", x=i, conf=0.91 + 0.001 * i) for i in range(20)], "counting")["clock"]
    assert len(found) == 16
    assert found[0].confidence == pytest.approx(0.929)
    assert found[-1].confidence == pytest.approx(0.914)


def test_colours_are_named_for_judged_objects_alone():
    seen: list[Detection] = []

    def spy(found):
        seen.extend(found)
        return color_of(found)

    wanted = det("car", conf=0.9, color="red")
    strict([wanted, det("car", x=200, conf=0.5, color="red"), det("dog", color="red")], COLOR, spy)
    assert seen == [wanted]
