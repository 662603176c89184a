"""The mini world: coloured shapes on a plain light ground, and prompts in GenEval's six task families.

A *scene* is what is drawn; a *spec* is what a prompt asks for, written in GenEval's metadata format
(``{"tag": ..., "include": [{"class", "count", "color", "position"}]}``), so that the same readers serve both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 66),
    "blue": (40, 92, 214),
    "yellow": (238, 204, 30),
    "purple": (140, 60, 190),
    "orange": (244, 128, 24),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # unit vectors, y points down
COUNTS = {2: "two", 3: "three", 4: "four"}
WORDS = (
    "a",
    "and",
    *SHAPES,
    *(f"{s}{'es' if s.endswith('s') else 's'}" for s in SHAPES),
    *COLORS,
    *COUNTS.values(),
    *(word for relation in RELATIONS for word in relation.split()),
)
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RADIUS = (7.0, 10.0)  # px, drawn uniformly
GAP = 4.0  # px, least distance between the circumscribed circles of two objects
MARGIN = 2.0  # px, least distance of an object to the border

# How often a training caption is wrong, and how (see `noisy_spec`). Ours: raised from the rates measured on a
# prototype until the base obeys loosely while it draws cleanly; the model card repeats them.
CAPTION_NOISE = {
    "single_object": 0.10,
    "two_object": 0.30,
    "counting": 0.50,
    "colors": 0.15,
    "position": 0.45,
    "color_attr": 0.40,
}


@dataclass(frozen=True)
class Object:
    """One drawn shape. ``x``, ``y`` and ``radius`` in pixels, ``y`` pointing down."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Mark:
    """What stands where, for the metrics' network. ``x``, ``y`` in pixels, ``y`` pointing down."""

    kind: str
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    ground: float  # grey level in 0..255

    @property
    def marks(self) -> list[Mark]:
        return [Mark(o.shape, o.color, o.x, o.y) for o in self.objects]


# ---------------------------------------------------------------------------------------------- prompts


def make_spec(tag: str, rng: np.random.Generator) -> dict:
    """Draws what one prompt of task ``tag`` asks for, in GenEval's metadata format."""
    first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    color_a, color_b = (tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    match tag:
        case "single_object":
            include = [{"class": first, "count": 1}]
        case "two_object":
            include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        case "counting":
            include = [{"class": first, "count": int(rng.choice(list(COUNTS)))}]
        case "colors":
            include = [{"class": first, "count": 1, "color": color_a}]
        case "position":  # GenEval: the second object stands at `relation` of object 0
            relation = str(rng.choice(list(RELATIONS)))
            include = [{"class": first, "count": 1}, {"class": second, "count": 1, "position": [relation, 0]}]
        case "color_attr":
            include = [
                {"class": first, "count": 1, "color": color_a},
                {"class": second, "count": 1, "color": color_b},
            ]
        case _:
            raise ValueError(f"unknown task {tag!r}: known are {', '.join(TASKS)}")
    return {"tag": tag, "include": include}


def prompt_of(spec: dict) -> str:
    """The prompt of a spec, such as ``a red circle and a blue square`` or ``a cross left of a circle``."""
    parts = []
    for part in spec["include"]:
        noun = f"{part['color']} {part['class']}" if "color" in part else part["class"]
        count = part["count"]
        parts.append(f"a {noun}" if count == 1 else f"{COUNTS[count]} {noun}{'es' if noun.endswith('s') else 's'}")
    if spec["tag"] == "position":
        relation, _ = spec["include"][1]["position"]
        return f"{parts[1]} {relation} {parts[0]}"
    return " and ".join(parts)


def all_specs() -> list[dict]:
    """Every prompt that the world can ask for, in a fixed order."""
    specs: list[dict] = []
    colors = tuple(COLORS)
    for a in SHAPES:
        specs.append({"tag": "single_object", "include": [{"class": a, "count": 1}]})
        specs.extend({"tag": "counting", "include": [{"class": a, "count": n}]} for n in COUNTS)
        specs.extend({"tag": "colors", "include": [{"class": a, "count": 1, "color": c}]} for c in colors)
        for b in SHAPES:
            if a == b:
                continue
            pair = [{"class": a, "count": 1}, {"class": b, "count": 1}]
            specs.append({"tag": "two_object", "include": pair})
            specs.extend({"tag": "position", "include": [pair[0], pair[1] | {"position": [r, 0]}]} for r in RELATIONS)
            specs.extend(
                {"tag": "color_attr", "include": [pair[0] | {"color": c}, pair[1] | {"color": d}]}
                for c in colors
                for d in colors
                if c != d
            )
    return specs


def noisy_spec(spec: dict, rng: np.random.Generator) -> dict:
    """A caption's spec, wrong with the task's rate in the way that web captions are wrong.

    Objects are renamed, counts are off by one (mostly), colours are swapped between objects or misnamed, and
    relations are drawn anew at random. What is drawn stays as it was.
    """
    tag = spec["tag"]
    if rng.random() >= CAPTION_NOISE[tag]:
        return spec
    include = [dict(part) for part in spec["include"]]
    match tag:
        case "single_object" | "two_object":
            part = include[rng.integers(len(include))]
            used = {p["class"] for p in include}
            part["class"] = str(rng.choice([s for s in SHAPES if s not in used]))
        case "counting":
            near = [n for n in COUNTS if abs(n - include[0]["count"]) == 1]
            far = [n for n in COUNTS if n != include[0]["count"]]
            include[0]["count"] = int(rng.choice(near if rng.random() < 0.8 else far))
        case "colors":
            include[0]["color"] = str(rng.choice([c for c in COLORS if c != include[0]["color"]]))
        case "position":
            include[1]["position"] = [str(rng.choice(list(RELATIONS))), 0]
        case "color_attr":
            a, b = include
            if rng.random() < 0.8:
                a["color"], b["color"] = b["color"], a["color"]
            else:
                a["color"] = str(rng.choice([c for c in COLORS if c not in (a["color"], b["color"])]))
    return {"tag": tag, "include": include}


# ---------------------------------------------------------------------------------------------- scenes


def make_scene(spec: dict, rng: np.random.Generator) -> Scene:
    """Draws a scene that obeys ``spec``; whatever the spec leaves open is random."""
    for _ in range(1000):
        objects = _place(spec, rng)
        if objects is not None:
            break
    else:  # pragma: no cover - four objects of the largest radius fit in a few tries
        raise RuntimeError(f"could not place the objects of {spec}")
    return Scene(objects, ground=float(rng.uniform(214, 250)))


def _place(spec: dict, rng: np.random.Generator) -> tuple[Object, ...] | None:
    objects: list[Object] = []
    for part in spec["include"]:
        for _ in range(part["count"]):
            color = part.get("color") or str(rng.choice(list(COLORS)))
            for _try in range(30):
                radius = float(rng.uniform(*RADIUS))
                x, y = rng.uniform(radius + MARGIN, IMAGE_SIZE - radius - MARGIN, size=2)
                new = Object(part["class"], color, float(x), float(y), radius)
                apart = all(np.hypot(x - o.x, y - o.y) >= radius + o.radius + GAP for o in objects)
                if apart and ("position" not in part or _obeys(new, objects[0], part["position"][0])):
                    objects.append(new)
                    break
            else:
                return None
    return tuple(objects)


def _obeys(new: Object, anchor: Object, relation: str) -> bool:
    """Whether ``new`` stands clearly at ``relation`` of ``anchor``: within 35 degrees of the named direction."""
    dx, dy = RELATIONS[relation]
    along = (new.x - anchor.x) * dx + (new.y - anchor.y) * dy
    across = abs((new.x - anchor.x) * dy) + abs((new.y - anchor.y) * dx)
    return along > 0 and across < 0.7 * along


# ---------------------------------------------------------------------------------------------- rendering


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) to a ``shape`` of circumscribed ``radius`` at the origin."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.95 * radius
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
        case "triangle":  # equilateral, pointing up; the three half-planes lie at radius / 2 from the centroid
            slope = 0.5 * y - np.sqrt(3) / 2 * np.abs(x)
            return np.maximum(y, -slope) - 0.5 * radius
        case "cross":
            ax, ay = np.abs(x), np.abs(y)
            arm = 0.34 * radius
            return np.minimum(np.maximum(ax - arm, ay - radius), np.maximum(ax - radius, ay - arm))
        case _:
            raise ValueError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of the pixels whose centres lie at ``x``, ``y``."""
    return np.clip(0.5 - signed_distance(shape, x, y, radius), 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [64, 64, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = scene.ground
    for o in scene.objects:
        reach = int(np.ceil(o.radius)) + 1
        x0, y0 = max(int(o.x) - reach, 0), max(int(o.y) - reach, 0)
        x1, y1 = min(int(o.x) + reach + 1, IMAGE_SIZE), min(int(o.y) + reach + 1, IMAGE_SIZE)
        ys, xs = np.mgrid[y0:y1, x0:x1] + 0.5
        alpha = coverage(o.shape, xs - o.x, ys - o.y, o.radius)[..., None].astype(np.float32)
        window = image[y0:y1, x0:x1]
        window += alpha * (np.asarray(COLORS[o.color], dtype=np.float32) - window)
    return (image + 0.5).astype(np.uint8)
