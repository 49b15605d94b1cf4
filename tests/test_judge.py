"""The judge judged: true scenes are accepted; wrong ones, and pictures of nothing, are not."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import (
    BACKGROUND,
    CANONICAL_COLORS,
    COLORS,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    Shapes,
    Thing,
    draw_things,
    lay_out,
)
from extras.colors import basic_color, delta_e, lab
from extras.judge import _templates, judge, read_scene

SIZE = 32
CHANGES = ("color", "shape", "count", "relation", "missing", "extra")


def canonical_scene(rng: np.random.Generator) -> Scene:
    """A scene as data.Shapes samples it, all of whose colours are canonical or left open."""
    while True:
        scene = Shapes(SIZE).scene(rng)
        if all(group.color in (None, *CANONICAL_COLORS) for group in scene.groups):
            return scene


def as_a_network_draws(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur of half a pixel, faint seams every 8 pixels, noise of 6/255."""
    image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.5)), np.float64)
    seams = np.kron(rng.normal(0, 2, (len(image) // 8, len(image) // 8, 3)), np.ones((8, 8, 1)))
    return np.clip(np.round(image + seams + rng.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


def off_color(thing: Thing, rng: np.random.Generator) -> Thing:
    """The thing in another colour: as far as a random direction goes within delta E 12 of its own,
    and the RGB cube."""
    line = (
        np.clip(thing.rgb + np.outer(np.arange(120), rng.normal(size=3)), 0, 255)
        .round()
        .astype(int)
    )
    near = np.linalg.norm(lab(line) - lab(thing.rgb), axis=1) <= 12
    return replace(thing, rgb=tuple(line[near][-1].tolist()))


def changed(scene: Scene, change: str, rng: np.random.Generator) -> tuple[list[Thing], str] | None:
    """The things of the scene with one thing wrong, and the reason to be given.

    None if the change does not apply.
    """
    groups, relation = list(scene.groups), scene.relation
    i = int(rng.integers(len(groups)))
    group, total = groups[i], sum(g.count for g in groups)
    reason = f"wrong {change}"
    if change == "color":
        if group.color is None:
            return None
        groups[i] = replace(
            group, color=str(rng.choice([c for c in CANONICAL_COLORS if c != group.color]))
        )
    elif change == "shape":
        groups[i] = replace(group, shape=str(rng.choice([s for s in SHAPES if s != group.shape])))
    elif change == "count":
        count = group.count + int(rng.choice([-1, 1]))
        if count == 0 or total - group.count + count > 4:
            return None
        groups[i], relation = replace(group, count=count), None
    elif change == "relation":
        if relation is None:
            return None
        relation = str(rng.choice([r for r in RELATIONS if r != relation]))
    elif change == "extra":
        if total == 4:
            return None
        shape = str(rng.choice([s for s in SHAPES if s not in [g.shape for g in groups]]))
        groups, relation, reason = [*groups, Group(1, None, shape)], None, "extra"
    things = lay_out(Scene(tuple(groups), relation), rng)
    if change == "missing":
        of_group = [g for g in groups for _ in range(g.count)]
        k = int(rng.integers(total))
        things, reason = (
            things[:k] + things[k + 1 :],
            "missing" if of_group[k].count == 1 else "wrong count",
        )
    return things, reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, scenes, at_least",
    [
        ("clean", 32, 2000, 0.995),
        ("as a network draws", 32, 2000, 0.98),
        ("and off colour", 32, 1000, 0.98),
        ("clean", 64, 300, 0.995),
        ("as a network draws", 64, 300, 0.98),
    ],
)
def test_true_scenes_are_accepted(name, size, scenes, at_least):
    rng = np.random.default_rng(1)
    reasons, failures = Counter(), []
    for _ in range(scenes):
        scene = canonical_scene(rng)
        things = lay_out(scene, rng)
        if name == "and off colour":
            things = [off_color(thing, rng) for thing in things]
        image = draw_things(things, size)
        verdict = judge(image if name == "clean" else as_a_network_draws(image, rng), scene)
        reasons[verdict.reason] += 1
        failures += [] if verdict.ok else [(scene, verdict)]
    rate = reasons[None] / scenes
    assert rate >= at_least, (
        f"{name}, {size} px: accepted {rate:.4f} of {scenes}; {reasons}; e.g. {failures[:2]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, scenes",
    [("clean", 32, 2000), ("as a network draws", 32, 1000), ("clean", 64, 300)],
)
def test_scenes_with_one_thing_wrong_are_refused_and_the_reason_is_right(name, size, scenes):
    rng = np.random.default_rng(2)
    given = {change: Counter() for change in CHANGES}
    accepted, right, failures = 0, 0, []
    for k in range(scenes):
        change, wrong = CHANGES[k % len(CHANGES)], None
        while wrong is None:
            scene = canonical_scene(rng)
            wrong = changed(scene, change, rng)
        things, reason = wrong
        image = draw_things(things, size)
        verdict = judge(image if name == "clean" else as_a_network_draws(image, rng), scene)
        given[change][verdict.reason] += 1
        accepted += verdict.ok
        right += verdict.reason == reason
        failures += [] if verdict.reason == reason else [(scene, things, reason, verdict)]
    figures = (
        f"{name}, {size} px: accepted {accepted} of {scenes}, "
        f"reason as expected {right / scenes:.4f}; {given}"
    )
    assert accepted <= 0.005 * scenes, f"{figures}; e.g. {failures[:2]}"
    assert right >= 0.98 * scenes, f"{figures}; e.g. {failures[:2]}"


@pytest.mark.slow
def test_pictures_of_nothing_are_never_accepted():
    rng = np.random.default_rng(3)
    singles = [
        Scene((Group(1, color, shape),))
        for color, shape in product((None, *CANONICAL_COLORS), SHAPES)
    ]

    def flat(rgb) -> np.ndarray:
        return np.full((SIZE, SIZE, 3), rgb, np.uint8)

    pictures = {
        "background": [flat(BACKGROUND)],
        "white": [flat(255)],
        "black": [flat(0)],
        "flat colour": [flat(COLORS[color]) for color in CANONICAL_COLORS],
        "grey": [flat(level) for level in range(0, 256, 5)],
        "uniform noise": [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(200)],
        "grey noise": [
            np.repeat(rng.integers(0, 256, (SIZE, SIZE, 1), np.uint8), 3, axis=2)
            for _ in range(200)
        ],
        "gaussian noise": [
            np.clip(rng.normal(128, s, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
            for s in np.linspace(5, 80, 200)
        ],
        "soft noise": [
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIZE, SIZE))
            )
            for _ in range(200)
        ],
    }
    for name, images in pictures.items():
        scenes = (
            singles if len(images) <= 10 else [None]
        )  # None: one of the usual scenes for each picture
        verdicts = [
            judge(image, scene or canonical_scene(rng)) for image in images for scene in scenes
        ]
        reasons = Counter(verdict.reason for verdict in verdicts)
        assert reasons[None] == 0, f"{name}: accepted {reasons[None]} of {len(verdicts)}; {reasons}"


RED_CIRCLE, BLUE_STAR = ("circle", "red", 0.25, 0.5), ("star", "blue", 0.75, 0.5)
ONE = Scene((Group(1, "red", "circle"),))
THREE = Scene((Group(3, None, "circle"),))
TWO = Scene((Group(1, "red", "circle"), Group(1, "blue", "star")))
LEFT, RIGHT, ABOVE = (
    replace(TWO, relation=relation) for relation in ("left of", "right of", "above")
)


@pytest.mark.parametrize(
    "scene, drawn, reason",
    [
        (TWO, [RED_CIRCLE, BLUE_STAR], None),
        (TWO, [BLUE_STAR, RED_CIRCLE], None),  # in any order
        (LEFT, [RED_CIRCLE, BLUE_STAR], None),
        (RIGHT, [RED_CIRCLE, BLUE_STAR], "wrong relation"),
        (ABOVE, [RED_CIRCLE, BLUE_STAR], "wrong relation"),
        (
            LEFT,
            [("circle", "blue", 0.25, 0.5), ("star", "red", 0.75, 0.5)],
            "wrong color",
        ),  # colours swapped
        (TWO, [RED_CIRCLE, ("circle", "red", 0.75, 0.5)], "wrong shape"),
        (TWO, [RED_CIRCLE], "missing"),
        (TWO, [], "missing"),
        (ONE, [RED_CIRCLE, BLUE_STAR], "extra"),
        (ONE, [RED_CIRCLE, ("circle", "red", 0.75, 0.5)], "wrong count"),
        (TWO, [RED_CIRCLE, BLUE_STAR, ("star", "blue", 0.5, 0.2)], "wrong count"),
        (
            THREE,
            [("circle", "pink", x, y) for x, y in ((0.2, 0.2), (0.8, 0.3), (0.5, 0.8))],
            None,
        ),  # any one colour
        (
            THREE,
            [RED_CIRCLE, ("circle", "red", 0.75, 0.5), ("circle", "green", 0.5, 0.8)],
            "wrong color",
        ),
        (THREE, [RED_CIRCLE, ("circle", "red", 0.75, 0.5)], "wrong count"),
    ],
)
def test_reasons(scene, drawn, reason):
    verdict = judge(
        draw_things(
            [Thing(shape, COLORS[color], x, y, 0.15) for shape, color, x, y in drawn], SIZE
        ),
        scene,
    )
    assert (verdict.ok, verdict.reason) == (reason is None, reason), verdict


def test_specks_are_passed_over_and_a_bar_is_no_shape():
    image = draw_things([Thing("circle", COLORS["red"], 0.5, 0.5, 0.2)], SIZE).copy()
    image[2:4, 2:4] = COLORS["blue"]
    assert judge(image, ONE).ok, judge(image, ONE)
    image[2:4, 2:30] = COLORS["blue"]
    assert judge(image, ONE).reason == "extra", judge(image, ONE)


def test_things_of_different_colours_may_touch():
    rng = np.random.default_rng(4)
    failures = []
    for _ in range(400):
        colors = [str(color) for color in rng.choice(CANONICAL_COLORS, 2, replace=False)]
        shapes, radii = [str(shape) for shape in rng.choice(SHAPES, 2)], rng.uniform(0.14, 0.17, 2)
        offset = (
            np.array(RELATIONS[str(rng.choice(list(RELATIONS)))])
            * radii.sum()
            * rng.uniform(0.85, 1)
            / 2
        )
        places = (0.5 + offset, 0.5 - offset)
        things = [Thing(shapes[i], COLORS[colors[i]], *places[i], radii[i]) for i in range(2)]
        scene = Scene(
            tuple(Group(1, color, shape) for color, shape in zip(colors, shapes, strict=True))
        )
        verdict = judge(draw_things(things, SIZE), scene)
        failures += [] if verdict.ok else [(things, verdict)]
    assert len(failures) <= 8, f"refused {len(failures)} of 400, e.g. {failures[:2]}"


def test_places_and_sizes_are_read_to_a_fraction_of_a_pixel_and_colours_exactly():
    rng = np.random.default_rng(5)
    offsets, ratios, colors, rings = [], [], [], []
    for _ in range(300):
        things = lay_out(canonical_scene(rng), rng)
        for found in read_scene(draw_things(things, SIZE)):
            thing = min(things, key=lambda t: (t.x - found.x) ** 2 + (t.y - found.y) ** 2)
            offsets.append(SIZE * np.hypot(thing.x - found.x, thing.y - found.y))
            ratios.append(abs(found.radius / thing.radius - 1))
            colors.append(delta_e(found.rgb, thing.rgb))
            rings.append(thing.shape == "ring")
    figures = (
        f"{max(offsets):.2f} px off, radius {max(ratios):.3f}, delta E {max(colors):.2f} at most"
    )
    assert all(offset < 0.75 for offset in offsets), figures
    assert all(ratio < 0.15 for ratio in ratios), figures
    # a small ring may be so thin that it fills no pixel: its colour is then read a little too grey
    assert np.mean(np.array(colors) < 1) > 0.995 and all(color < 4 for color in colors), figures
    others = np.array(colors)[~np.array(rings)]
    assert (others < 1).all(), "every other shape's colour is exact"


def test_every_color_name_is_itself_and_its_distance_is_reported():
    for name, rgb in COLORS.items():
        verdict = judge(
            draw_things([Thing("heart", rgb, 0.5, 0.5, 0.25)], SIZE),
            Scene((Group(1, name, "heart"),)),
        )
        assert verdict.ok and verdict.rgb_distance < 2, f"{name} {rgb}: {verdict}"
    picture = draw_things([Thing("heart", COLORS["firebrick"], 0.5, 0.5, 0.25)], SIZE)
    assert judge(picture, Scene((Group(1, "brown", "heart"),))).ok  # by its basic term
    verdict = judge(picture, Scene((Group(1, "teal", "heart"),)))
    assert (
        verdict.reason == "wrong color"
        and abs(verdict.rgb_distance - np.linalg.norm((178, 94, 94))) < 2
    ), verdict
    assert judge(picture, Scene((Group(1, None, "heart"),))).rgb_distance is None
    with pytest.raises(ValueError, match="mauvish"):
        judge(picture, Scene((Group(1, "mauvish", "heart"),)))


def test_lab_has_the_published_values_and_the_canonical_colors_their_own_names():
    published = {
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
    }
    off = np.abs(lab(list(published)) - list(published.values())).max()
    assert off < 0.02, f"largest difference from the published values {off:.4f}"
    assert abs(delta_e((255, 0, 0), (0, 0, 255)) - 176.31) < 0.02, delta_e((255, 0, 0), (0, 0, 255))
    named = {color: basic_color(COLORS[color]) for color in CANONICAL_COLORS}
    assert (
        all(color == name for color, name in named.items()) and basic_color(BACKGROUND) == "grey"
    ), named


def test_the_same_pixels_get_the_same_verdict():
    rng = np.random.default_rng(6)
    scenes = [canonical_scene(rng) for _ in range(50)]
    cases = [
        (as_a_network_draws(draw_things(lay_out(scene, rng), SIZE), rng), scene) for scene in scenes
    ]
    before = [(image.copy(), judge(image, scene)) for image, scene in cases]
    _templates.cache_clear()
    for (image, scene), (copy, verdict) in reversed(list(zip(cases, before, strict=True))):
        assert judge(image, scene) == verdict and (image == copy).all(), verdict
    with pytest.raises(ValueError, match="float64"):
        judge(cases[0][0] / 255, cases[0][1])
