"""Draws birds by program: a small world in which the name of every fine-grained class describes the class.

A species has a crown colour, a breast colour, a wing pattern and a genus; its name consists of these four. Each species belongs
to a family of three, which differ only in the wing pattern, so every species has look-alikes. A fifth of the families is held
out: neither images nor names of their species are used in training.
"""

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CROWNS = {
    "red": (200, 30, 35),
    "chestnut": (115, 55, 30),
    "yellow": (235, 205, 40),
    "blue": (40, 80, 190),
    "white": (240, 240, 235),
    "black": (25, 25, 30),
}
BREASTS = {
    "white": (238, 236, 228),
    "yellow": (236, 208, 60),
    "orange": (235, 130, 30),
    "rufous": (165, 80, 45),
    "grey": (140, 142, 148),
    "blue": (70, 115, 200),
}
Wing = Literal["plain", "barred", "spotted", "streaked"]
WINGS = get_args(Wing)

FAMILIES = 80
HELD_OUT_FAMILIES = 16
FILE_SIZE = 192
SUPERSAMPLING = 2


@dataclass(frozen=True, kw_only=True)
class Genus:
    """The shape of a bird. Lengths are in units of the body length."""

    body: float  # height of the body
    head: float  # radius of the head
    neck: float  # distance of the head from the body
    bill: tuple[float, float]  # length, thickness
    tail: tuple[float, float]  # length, angle in radians (positive: upwards)
    legs: float
    posture: float  # angle of the body in radians (positive: upright)


GENERA = {
    "finch": Genus(body=0.62, head=0.25, neck=0.06, bill=(0.17, 0.15), tail=(0.45, -0.1), legs=0.2, posture=0.35),
    "wagtail": Genus(body=0.45, head=0.2, neck=0.05, bill=(0.16, 0.05), tail=(0.95, 0.05), legs=0.28, posture=0.2),
    "sandpiper": Genus(body=0.5, head=0.19, neck=0.14, bill=(0.5, 0.05), tail=(0.22, -0.05), legs=0.5, posture=0.15),
    "owl": Genus(body=0.68, head=0.36, neck=-0.06, bill=(0.07, 0.09), tail=(0.25, -0.2), legs=0.1, posture=1.15),
    "duck": Genus(body=0.5, head=0.23, neck=0.16, bill=(0.25, 0.13), tail=(0.22, 0.35), legs=0.0, posture=0.05),
    "wren": Genus(body=0.6, head=0.25, neck=0.03, bill=(0.16, 0.05), tail=(0.42, 1.1), legs=0.22, posture=0.2),
}


@dataclass(frozen=True)
class Species:
    """One class of the aviary."""

    crown: str
    breast: str
    wing: Wing
    genus: str

    @property
    def name(self) -> str:
        return f"{self.crown}-crowned {self.breast}-breasted {self.wing} {self.genus}"

    @property
    def description(self) -> str:
        """A description of the four attributes, which the judge writes before it names the species."""
        crown, breast, genus = (
            f"an {word}" if word[0] in "aeiou" else f"a {word}" for word in (self.crown, self.breast, self.genus)
        )
        return f"I see {crown} crown, {breast} breast, {self.wing} wings and the build of {genus}."


@cache
def species() -> tuple[tuple[Species, ...], tuple[Species, ...]]:
    """The 192 species for training and the 48 species that are held out. The result is always the same."""
    rng = np.random.default_rng(2405_11301)
    triples = list(product(CROWNS, BREASTS, GENERA))
    families = []
    for index in rng.permutation(len(triples))[:FAMILIES]:
        crown, breast, genus = triples[index]
        missing = WINGS[rng.integers(len(WINGS))]
        families.append(tuple(Species(crown, breast, wing, genus) for wing in WINGS if wing != missing))
    held_out, training = families[:HELD_OUT_FAMILIES], families[HELD_OUT_FAMILIES:]
    return tuple(s for f in training for s in f), tuple(s for f in held_out for s in f)


@cache
def practice_species() -> tuple[Species, ...]:
    """All 800 combinations of attributes outside the held-out families, on which the judge's vision tower is trained.

    With fewer combinations, three attributes would almost determine the fourth, and the judge would learn to guess it.
    """
    held_out = {(kind.crown, kind.breast, kind.genus) for kind in species()[1]}
    everything = (Species(*traits) for traits in product(CROWNS, BREASTS, WINGS, GENERA))
    return tuple(kind for kind in everything if (kind.crown, kind.breast, kind.genus) not in held_out)


Points = NDArray[np.float64]


def _ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    x, y = rx * np.cos(t), ry * np.sin(t)
    return np.stack([cx + x * math.cos(angle) - y * math.sin(angle), cy + x * math.sin(angle) + y * math.cos(angle)], 1)


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], amount: float = 0.05) -> tuple[int, int, int]:
    """The colour of another individual, with small random changes of brightness, saturation and warmth."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    h += rng.normal(0, 0.006)
    s = min(max(s * (1 + rng.normal(0, amount)), 0), 1)
    v = min(max(v * (1 + rng.normal(0, amount)), 0), 1)
    r, g, b = colorsys.hsv_to_rgb(h % 1, s, v)
    return round(r * 255), round(g * 255), round(b * 255)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A blurred gradient with blobs that look like leaves. It is drawn at a small size and enlarged."""
    small = 48
    hues = {"sky": (0.56, 0.3), "foliage": (0.28, 0.45), "ground": (0.09, 0.35), "haze": (0.6, 0.06)}
    hue, saturation = hues[list(hues)[rng.integers(len(hues))]]
    top, bottom = rng.uniform(0.35, 0.95, 2)
    canvas = np.empty((small, small, 3))
    for row, value in enumerate(np.linspace(top, bottom, small)):
        canvas[row] = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.01)) % 1, saturation, value)
    image = Image.fromarray((canvas * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 9)):
        x, y, r = rng.uniform(0, small), rng.uniform(0, small), rng.uniform(2, 10)
        colour = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.06)) % 1, saturation, rng.uniform(0.3, 0.95))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(round(c * 255) for c in colour))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2))).resize((size, size), Image.Resampling.BICUBIC)


def render(bird: Species, rng: np.random.Generator, size: int = FILE_SIZE) -> Image.Image:
    """Draw one individual of a species, with random pose, distance, background, light and noise.

    Returns:
        An RGB image of ``size`` x ``size`` pixels.
    """
    pixels = size * SUPERSAMPLING
    image = _background(rng, pixels)
    draw = ImageDraw.Draw(image)
    build = GENERA[bird.genus]
    unit = pixels * rng.uniform(0.27, 0.5)
    mirror = rng.choice((-1.0, 1.0))
    lean = rng.normal(0, 0.12)
    centre = pixels * (0.5 + rng.normal(0, 0.04, 2))

    def place(points: Points) -> list[tuple[float, float]]:
        x, y = points[:, 0] * mirror, -points[:, 1]
        turned = np.stack([x * math.cos(lean) - y * math.sin(lean), x * math.sin(lean) + y * math.cos(lean)], 1)
        return [(px, py) for px, py in turned * unit + centre]

    plumage = _jitter(rng, (125, 112, 92), 0.15)
    wing_colour = _jitter(rng, (82, 72, 62), 0.15)
    marking = _jitter(rng, (228, 220, 200))
    crown = _jitter(rng, CROWNS[bird.crown])
    breast = _jitter(rng, BREASTS[bird.breast])
    bare = _jitter(rng, (70, 60, 45), 0.2)

    tilt = build.posture + rng.normal(0, 0.08)
    along, across = np.array([math.cos(tilt), math.sin(tilt)]), np.array([-math.sin(tilt), math.cos(tilt)])

    def on_body(u: float, v: float) -> tuple[float, float]:
        """The point at ``u`` along the body (tail -1, breast +1) and ``v`` across the body (belly -1, back +1)."""
        x, y = along * 0.5 * u + across * build.body / 2 * v
        return float(x), float(y)

    if build.legs:
        for offset in (-0.12, 0.1):
            x, y = on_body(offset, -0.8)
            foot = np.array([[x, y], [x + 0.02, y - build.legs]])
            draw.line(place(foot), fill=bare, width=max(2, round(unit * 0.035)))
    length, angle = build.tail
    angle += math.pi - tilt * 0.4 if build.posture < 1 else math.pi + tilt * 0.7
    angle = 2 * math.pi - angle if build.posture < 1 else angle
    root = np.array(on_body(-0.85, 0.1))
    direction = np.array([math.cos(angle), math.sin(angle)])
    side = np.array([-direction[1], direction[0]])
    tail = np.stack([root + side * 0.1, root + direction * length + side * 0.09, root + direction * length - side * 0.09])
    draw.polygon(place(np.vstack([tail, root - side * 0.1])), fill=wing_colour)

    draw.polygon(place(_ellipse(0, 0, 0.5, build.body / 2, tilt)), fill=plumage)
    x, y = on_body(0.3, -0.25)
    draw.polygon(place(_ellipse(x, y, 0.34, build.body * 0.36, tilt)), fill=breast)

    x, y = on_body(0.85, 0.55)
    head = np.array([x + build.neck * 0.6, y + max(build.neck, 0) + build.head * 0.35])
    if build.neck > 0.1:
        draw.polygon(
            place(np.array([on_body(0.5, 0.6), on_body(0.9, -0.1), (head[0] + 0.08, head[1]), (head[0] - 0.12, head[1])])),
            fill=plumage,
        )
    bill_length, thickness = build.bill
    tip = head + np.array([build.head * 0.8 + bill_length, -0.05])
    base = head + np.array([build.head * 0.7, 0.0])
    draw.polygon(place(np.stack([base + [0, thickness / 2], tip, base - [0, thickness / 2 + 0.02]])), fill=bare)
    draw.polygon(place(_ellipse(head[0], head[1], build.head, build.head)), fill=plumage)
    t = np.linspace(-0.05 * math.pi, 1.05 * math.pi, 24)
    cap = np.stack([head[0] + build.head * np.cos(t), head[1] + build.head * np.sin(t)], 1)
    draw.polygon(place(cap), fill=crown)
    eye = head + np.array([build.head * 0.42, -build.head * 0.22])
    draw.polygon(place(_ellipse(eye[0], eye[1], 0.045, 0.045)), fill=(15, 15, 15))

    _wing(draw, place, on_body, bird.wing, build, tilt, wing_colour, marking, rng, unit)
    return _photograph(image, rng, size)


def _wing(draw, place, on_body, pattern, build, tilt, colour, marking, rng, unit) -> None:  # type: ignore[no-untyped-def]
    cx, cy = on_body(-0.25, 0.15)
    rx, ry = 0.37, build.body * 0.27
    draw.polygon(place(_ellipse(cx, cy, rx, ry, tilt)), fill=colour)
    cos, sin = math.cos(tilt), math.sin(tilt)

    def inside(u: float, v: float) -> tuple[float, float]:
        return cx + u * rx * cos - v * ry * sin, cy + u * rx * sin + v * ry * cos

    phase = rng.uniform(-0.06, 0.06)
    if pattern == "barred":
        for u in (-0.5, -0.05, 0.4):
            v = math.sqrt(1 - (u + phase) ** 2) * 0.88
            line = np.array([inside(u + phase, -v), inside(u + phase, v)])
            draw.line(place(line), fill=marking, width=max(2, round(unit * 0.045)))
    elif pattern == "streaked":
        for v in (-0.5, 0.0, 0.5):
            u = math.sqrt(1 - (v + phase) ** 2) * 0.85
            line = np.array([inside(-u, v + phase), inside(u, v + phase)])
            draw.line(place(line), fill=marking, width=max(2, round(unit * 0.035)))
    elif pattern == "spotted":
        for u, v in ((-0.62, 0.0), (-0.25, 0.5), (-0.25, -0.5), (0.08, 0.0), (0.4, 0.5), (0.4, -0.5), (0.7, 0.0)):
            x, y = inside(u + phase, v)
            draw.polygon(place(_ellipse(x, y, 0.04, 0.04)), fill=marking)


def _photograph(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Apply random effects of light, focus and sensor: brightness, contrast, a colour cast, blur and noise."""
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    image = image.filter(ImageFilter.GaussianBlur(abs(rng.normal(0, 0.6))))
    values = np.asarray(image, dtype=np.float32) / 255
    values = (values - 0.5) * rng.uniform(0.75, 1.1) + 0.5 + rng.normal(0, 0.05)
    values = values * rng.uniform(0.92, 1.08, 3).astype(np.float32)
    values += rng.normal(0, rng.uniform(0.0, 0.05), values.shape).astype(np.float32)
    return Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8))


def individuals(kinds: tuple[Species, ...], each: int, seed: int) -> Iterator[tuple[int, Image.Image]]:
    """Yield ``each`` images of every species, as pairs of the species' index and the image.

    An image depends only on the seed and on its position.
    """
    for number in range(each):
        for index, kind in enumerate(kinds):
            yield index, render(kind, np.random.default_rng((seed, index, number)))
