"""The built-in sources: what the shapes' captions hold and what they must never hold; the emoji."""

import hashlib
import re

import numpy as np
import pytest
from PIL import ImageFont

from data import (
    BACKGROUND,
    CANONICAL_COLORS,
    COLORS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    Shapes,
    draw_things,
    lay_out,
    open_source,
)

N = 20_000


@pytest.fixture(scope="module")
def examples() -> list:
    """(caption, scene) of each example; drawing them would be most of the time."""
    source = Shapes(8, seed=3)
    assert source.example(5, 1)[0] == source.caption(5)[0]
    return [source.caption(i)[:2] for i in range(N)]


@pytest.fixture(scope="module")
def captions(examples) -> list[str]:
    return [caption for caption, _ in examples]


def test_no_held_out_pair_or_triple_in_the_stream(examples, captions):
    """Read from the words themselves, not from the scene behind them."""
    noun = "(?:" + "|".join(SHAPES) + ")"
    color = "(?:" + "|".join(sorted(COLORS, key=len, reverse=True)) + ")"
    after = re.compile(rf"\b({color})(?:[ -]colored)? ({noun})")
    before = re.compile(rf"\b({noun})(?:,| that is| colored| in| of| is| painted) ({color})\b")
    color_of = re.compile(rf"the color of the (?:small |large )?({noun}) is ({color})$")
    words = {
        "left of": "left of|left side of",
        "right of": "right of|right side of",
        "above": "above|over|higher than",
        "below": "below|under|beneath|underneath",
    }
    pairs = triples = 0
    for caption in captions:
        found = after.findall(caption)
        found += [(c, s) for s, c in before.findall(caption) + color_of.findall(caption)]
        pairs += len(found)
        assert not [pair for pair in found if pair in HELD_OUT_PAIRS], caption
        for relation, forms in words.items():
            if match := re.search(rf"\b(?:{forms})\b", caption):
                nouns = re.findall(rf"\b{noun}", caption)
                if inverted := caption[: match.start()].strip() in ("", "to the", "on the"):
                    nouns.reverse()
                assert len(nouns) == 2, caption
                triples += 1
                assert (nouns[0], relation, nouns[1]) not in HELD_OUT_TRIPLES, (caption, inverted)
    related = sum(scene.relation is not None for _, scene in examples)
    said = f"the patterns must find every relation: {pairs} pairs, {triples} triples"
    assert pairs > N and triples == related > N / 5, said


def test_captions_are_plain_english(captions):
    text = "\n".join(captions)
    letters = set("abcdefghijklmnopqrstuvwxyz ,-234\n")
    assert set(text) <= letters, "English words only: no hex code, no emoji, no other script"
    others = ("two", "three", "four", "small", "large", "left", "right", "above", "below")
    for word in (*SHAPES, *COLORS, *others):
        assert re.search(rf"\b{word}", text), f"{word} never occurs"
    assert len(set(captions)) > N / 2


def test_held_out_sets_are_a_fixed_tenth():
    assert 0.09 < len(HELD_OUT_PAIRS) / (len(COLORS) * len(SHAPES)) <= 0.105
    assert 0.08 < len(HELD_OUT_TRIPLES) / (len(SHAPES) ** 2 * len(RELATIONS)) <= 0.1
    assert ("blue", "star") in HELD_OUT_PAIRS  # by hash: the same for ever
    assert ("red", "circle") not in HELD_OUT_PAIRS
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for a, relation, b in HELD_OUT_TRIPLES:  # the same picture in other words is held out too
        assert (b, opposite[relation], a) in HELD_OUT_TRIPLES
    assert {c for c, _ in HELD_OUT_PAIRS} & set(CANONICAL_COLORS)


def test_the_stream_is_a_function_of_seed_and_index():
    a, b, other = Shapes(32, seed=1), Shapes(32, seed=1), Shapes(32, seed=2)
    assert a.example(41, 2)[0] == b.example(41, 2)[0]
    assert np.array_equal(a.example(41, 2)[1], b.example(41, 2)[1])
    first, second = a.example(41, 2)[1]
    assert not np.array_equal(first, second), "draws are different pictures of one caption"
    assert [a.example(i, 1)[0] for i in range(20)] != [other.example(i, 1)[0] for i in range(20)]


@pytest.mark.parametrize(
    "colored, expected", [(True, "826d7e262fc1593f"), (False, "33ed79454fb5d2b7")]
)  # colored: the shapes of before
def test_the_stream_is_what_it_was(colored, expected):
    """Runs of before go on, and results can be made again: a hash of captions and of what is drawn,
    not of its pixels, which are Pillow's."""
    digest = hashlib.sha256()
    for one_object in (False, True):
        source = Shapes(16, seed=5, one_object=one_object, colored=colored)
        for i in range(300):
            caption, scene, rng = source.caption(i)
            digest.update(caption.encode())
            for thing in lay_out(scene, rng):
                place = [round(float(value), 4) for value in (thing.x, thing.y, thing.radius)]
                digest.update(repr((thing.shape, thing.rgb, place)).encode())
    assert digest.hexdigest()[:16] == expected


def test_things_of_a_kind_often_have_no_named_colour():
    """And have one colour all the same."""
    for colored, low, high in ((False, 0.45, 0.7), (True, 0.08, 0.25)):
        source = Shapes(8, 0, colored=colored)
        open_ones = []
        for i in range(3000):
            _, scene, rng = source.caption(i)
            if len(scene.groups) == 1 and scene.groups[0].count > 1:
                open_ones.append(scene.groups[0].color is None)
                assert len({thing.rgb for thing in lay_out(scene, rng)}) == 1
        assert low < sum(open_ones) / len(open_ones) < high


def test_one_object_is_one_object():
    scenes = [Shapes(8, 0, one_object=True).caption(i)[1] for i in range(2000)]
    for scene in scenes:
        assert len(scene.groups) == 1 and scene.groups[0].count == 1 and not scene.is_held_out()
    assert {scene.groups[0].shape for scene in scenes} == set(SHAPES)
    assert open_source("shapes", 8, one_object=True).one_object
    assert not open_source("shapes", 8).one_object


def test_an_option_is_for_the_source_that_has_it(tmp_path):
    for name, options, message in (
        ("shapes", {"font": "x.ttf"}, "--data shapes has no option 'font'; it has one-object"),
        ("shapes", {"one_object": "2"}, "--data shapes:one-object: expected no value"),
        ("emoji", {"one_object": True}, "--data emoji has no option 'one-object'; it has font, v"),
        ("emoji", {"font": True}, "--data emoji:font: expected a value: font=VALUE"),
        (str(tmp_path), {"variants": True}, "has no option 'variants'; it has none"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(name, 8, **options)


def test_relations_hold_in_the_pictures():
    """The first named thing has its colour where the caption puts it."""
    rng = np.random.default_rng(0)
    for relation, direction in RELATIONS.items():
        for _ in range(50):
            scene = Scene((Group(1, "red", "heart"), Group(1, "blue", "ring", "large")), relation)
            pixels = draw_things(lay_out(scene, rng), 32).astype(int)
            ys, xs = np.nonzero((pixels[..., 0] - pixels[..., 2]) > 60)
            ys2, xs2 = np.nonzero((pixels[..., 2] - pixels[..., 0]) > 60)
            offset = np.array([xs.mean() - xs2.mean(), ys.mean() - ys2.mean()])
            assert offset @ direction > 8 and offset @ direction > 2 * abs(offset @ direction[::-1])


def test_emoji_are_pictures_with_english_names():
    from extras.emoji import emoji_font

    try:
        emoji_font()
    except ValueError as error:
        pytest.skip(str(error))
    source = open_source("emoji", 32)
    assert len(source.glyphs) > 1200 and len(source.names) == len(source.glyphs)
    assert source.names["\U0001f431"][:2] == ["cat face", "cat"] and len(source.missing) < 200
    sequences = [text for text in source.glyphs if len(text.rstrip("\ufe0f")) > 1]
    assert not sequences, "no skin tones, no flags"
    red = source.glyphs["\U0001f534"].astype(int)  # a large red circle
    assert (red[16, 16] - [200, 0, 0]).min() >= 0 and red[16, 16, 1] < 80
    assert (red[0, 0] == BACKGROUND).all()
    different = {glyph.tobytes() for glyph in source.glyphs.values()}
    assert len(different) > 0.98 * len(source.glyphs), "pictures differ"
    captions = {source.example(i, 1)[0] for i in range(3000)}
    forbidden = set()
    for text in source.held_out:
        name = source.names[text][0]
        forbidden |= {name, f"{name} emoji"}
    for text in source.trained:
        for name in source.names[text]:
            forbidden -= {name, f"{name} emoji"}
    assert len(source.held_out) == len(source.glyphs) // 10 and not captions & forbidden
    never = list(source.unseen())
    assert len(never) == len(source.held_out)
    assert {name for name, _ in never} == {source.names[text][0] for text in source.held_out}
    other = open_source("emoji", 32, seed=1)
    assert other.held_out == source.held_out and other.example(5, 1)[0] != source.example(5, 1)[0]
    assert source.about().startswith(f"{len(source.trained)} emoji to train on")
    other.seed = 0
    assert np.array_equal(source.example(7, 2)[1], other.example(7, 2)[1])
    before = source.fingerprint()
    assert other.fingerprint() == before, "the seed only orders them"
    source.names["\U0001f431"] = ["kitten"]
    other.glyphs["\U0001f431"] = 255 - other.glyphs["\U0001f431"]
    assert len({before, source.fingerprint(), other.fingerprint()}) == 3, "names and glyphs count"


def test_emoji_fonts_that_do_not_serve():
    with pytest.raises(ValueError, match="nowhere.ttf cannot be read.*fonts-noto-color-emoji"):
        open_source("emoji", 16, font="nowhere.ttf")
    try:
        plain = ImageFont.truetype("DejaVuSans.ttf", 20).path
    except OSError:
        pytest.skip("no DejaVu Sans here")
    with pytest.raises(ValueError, match="has no colours"):
        open_source("emoji", 16, font=plain)
