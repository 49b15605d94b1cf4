"""Windows into the model: what the sampler went through, which word each patch looks at, prompts
typed at a terminal; and where sample.py puts its files."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refusal

import checkpoint
import sample
from conftest import CPU, DECODERS, random_expert
from extras import readers
from extras.bridges import KeyValueFusion, llm_options
from extras.interactive import half_blocks, obey
from extras.mirror import MirrorTower
from extras.readers import Template
from extras.sheets import enlarge, heat
from extras.thinking import Thinking
from extras.windows import Windows
from extras.word_maps import attend, shown_ids, text_of, word_maps, word_spans, words_of
from flow import euler_sample

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "assets" / "expert"
RED_LEFT = "a red circle left of a blue square"
FAST = "--device cpu --dtype float32 --steps 3".split()


@pytest.fixture
def a_run(tiny_llm, llm_folder, tmp_path):
    """An expert that draws something, beside a tiny LLM with a BOS, as a run's folder."""
    llm = tiny_llm("gemma3")
    made_for = {"llm": str(llm_folder("gemma3")), **llm.identity}
    random_expert(llm, made_for=made_for).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def drawn(a_run, *flags) -> None:
    sample.main(["--ckpt", str(a_run), *FAST, *map(str, flags)])


# -------------------------------------------------------------------------------------------------
# the trajectory


def windows_of(expert, llm, prompts, *flags) -> Windows:
    return Windows(sample.parse_args(["--maps", *flags]), expert, llm, prompts)


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_the_states_are_those_of_the_sampler(steps, tiny_llm):
    """Of every picture, in batches of two; more steps than are kept are thinned out evenly. Euler's
    last step, from where it was seen, ends at the picture that is drawn."""
    llm = tiny_llm("qwen2")
    expert = random_expert(llm)
    prompts = ["a red circle", "three small teal stars", "an orange cross"]
    windows = windows_of(expert, llm, prompts, "--steps", str(steps))
    pictures = sample.draw(expert, llm, prompts, [0, 1, 2], steps, batch_size=2, watch=windows)
    assert len(windows.pictures) == 3
    for states, picture in zip(windows.pictures, pictures):
        times = [state.t for state in states]
        assert len(times) == min(steps, 48) and times[0] == 0 and times == sorted(times)
        if steps <= 48:
            assert np.array_equal(states[-1].clean(), picture)


def test_who_watches_sees_the_guided_velocity():
    """x_{k+1} = x_k + (t' - t) v, from the noise to what comes out."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 4, 4, generator=generator)
    seen = []

    def predict(x, t, context):
        return context.scale.view(-1, 1, 1, 1) * x - t.view(-1, 1, 1, 1)

    class Side:
        def __init__(self, *scales):
            self.scale = torch.tensor(scales)

        def concat(self, other):
            return Side(*self.scale.tolist(), *other.scale.tolist())

    out = euler_sample(
        predict, noise, Side(1.0, 2.0), 4, Side(0.0, 0.0), 3.0, watch=lambda *s: seen.append(s)
    )
    assert [t for t, _, _ in seen] == [0, 0.25, 0.5, 0.75]
    assert torch.equal(seen[0][1], noise)
    for (_, x, v), (_, then, _) in zip(seen, [*seen[1:], (1, out, None)]):
        assert (x + 0.25 * v - then).abs().max() < 1e-6
    guided = (
        3 * Side(1.0, 2.0).scale.view(-1, 1, 1, 1) * noise
    )  # the other branch answers 0 at t = 0
    assert (seen[0][2] - guided).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------
# which word each patch looks at


def check_attend(expert, llm, prompts):
    """The velocity is forward's, and what is looked at adds up to one, none of it padding."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(prompts), 3, expert.image_size, expert.image_size)
    x_t = torch.randn(shape, generator=generator)
    t = torch.rand(len(prompts), generator=generator)
    context = llm.context(prompts)
    with torch.no_grad():
        forward = expert(x_t, t, context)
        velocity, seen = attend(expert, x_t, t, context)
    difference = (velocity - forward).abs().max()
    assert difference < 1e-5, f"{difference:.2e}"
    assert forward.std() > 1e-3, "an expert that says something"
    assert len(seen) == len(expert.blocks)
    T = context.keys[0].shape[2]
    N = (expert.image_size // expert.patch) ** 2
    for weights in seen:
        assert weights.shape == (len(prompts), N, T + N)
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        for row, length in zip(weights, context.lengths.tolist()):
            assert (row[:, :length] > 0).all() and (row[:, length:T] == 0).all()


@pytest.mark.parametrize("kind", DECODERS)
def test_the_weights_are_those_of_forward(kind, tiny_llm):
    llm = tiny_llm(kind)
    check_attend(random_expert(llm), llm, [RED_LEFT, "x", "three stars"])


def test_the_weights_of_key_value_fusion_too(tiny_llm):
    llm = tiny_llm("llama", **llm_options())
    plain = random_expert(llm)
    expert = KeyValueFusion(**plain.config)
    expert.load_state_dict(plain.state_dict(), strict=False)
    expert.attach(llm)
    check_attend(expert, llm, [RED_LEFT, "x"])


def test_tokens_make_words(tiny_llm):
    """Each token of the context belongs to one word, a word has all its letters, and BOS is none.
    (The tiny tokenizer has 300 entries: most words are several tokens.)"""
    prompt = "a reddish circle, über 猫🐱 at 3x4"
    for kind, start in (("qwen2", []), ("gemma3", ["(start)"])):
        llm = tiny_llm(kind)
        words = words_of(llm, prompt)
        said = [word for word, _ in words]
        assert said[len(start) :][:4] == ["a", "reddish", "circle,", "über"]
        assert said[-2:] == ["at", "3x4"] and said[: len(start)] == start
        tokens = [token for _, places in words for token in places]
        assert tokens == list(range(llm.context([prompt]).lengths.item()))
    assert words_of(llm, "") == [("(start)", [0])]


def test_letters_in_several_tokens_and_scripts_without_spaces(tiny_llm):
    tokenizer = tiny_llm("qwen2").tokenizer
    ids = tokenizer("ü猫").input_ids  # 2 and 3 bytes, a token each
    assert text_of(tokenizer, ids) == ("ü猫", [0, 0, 1, 1, 1])
    assert word_spans("三つの 星", [0, 1, 1, 2, 3]) == [(0, 1), (1, 2), (2, 3), (4, 5)]
    assert word_spans("a red", [0, 1, 2, 3]) == [(0, 1), (2, 5)]


@pytest.mark.parametrize("show", ["all", "written", "reencode"])
def test_words_are_those_that_the_image_sees(show, tiny_llm):
    """What the LLM wrote, too; of a template's words those that are exposed."""
    llm = tiny_llm("gemma3")
    llm.reader = Thinking(llm, "red => blue\n{} =>", 6, show)
    words = words_of(llm, "a red circle")
    length = llm.context(["a red circle"]).lengths.item()
    assert len(shown_ids(llm, "a red circle")) == length
    tokens = [token for _, places in words for token in places]
    assert tokens == sorted(set(tokens)) and 1 < len(tokens) <= length
    said = " ".join(word for word, _ in words)
    if show == "all":
        assert "red circle =>" in said
    llm.reader = Template(llm, '"{}" in blue:', "after")
    assert [word for word, _ in words_of(llm, "a red circle")] == ['"', "in", "blue:"]


def test_maps_of_a_drawing(tiny_llm):
    llm = tiny_llm("gemma3")
    expert = random_expert(llm)
    windows = windows_of(expert, llm, [RED_LEFT], "--steps", "4")
    sample.draw(expert, llm, [RED_LEFT], [0], 4, watch=windows)
    found = word_maps(expert, llm, RED_LEFT, windows.pictures[0])
    assert found.words == ["(start)", *RED_LEFT.split()]
    assert found.maps.shape == (9, 4, 2, 4, 4)
    total = found.mean().sum(0).mean()
    assert abs(total - found.text_share) < 1e-5 and 0.01 < total < 1
    assert found.words[found.index("Circle")] == "circle"
    assert found.index("") > 0, "the most uneven one is a word"


# -------------------------------------------------------------------------------------------------
# files


def test_windows_lie_beside_their_picture(a_run, tmp_path, capsys):
    drawn(
        a_run, "--prompt", RED_LEFT, "--maps", "circle", "--trajectory", "--out", tmp_path / "x.PNG"
    )
    names = {"x.PNG", "x-trajectory.png", "x-trajectory.webp", "x-maps.png", "x-layers.png"}
    told = capsys.readouterr().out.splitlines()[1:]
    assert {Path(line).name for line in told} == names
    for name in names:
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.size[0] >= 16 and len(np.unique(np.asarray(image.convert("RGB")))) > 9
    with Image.open(tmp_path / "x-trajectory.webp") as film:
        assert film.n_frames == 4  # three steps, and the finished picture
    drawn(a_run, "--prompt", "a cat", "--n", 2, "--trajectory", "--maps", "--out", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 11 and "000-a-cat-seed1-trajectory.webp" in names
    assert "000-a-cat-seed0-maps.png" in names and "grid.png" in names


def test_a_folder_may_be_named_like_a_picture(a_run, tmp_path):
    (tmp_path / "x.png").mkdir()
    drawn(a_run, "--prompt", "a", "--prompt", "b", "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png" / "grid.png").exists()
    for suffix in (".jpg", ".WEBP"):
        drawn(a_run, "--prompt", "a", "--out", tmp_path / f"y{suffix}")
        with Image.open(tmp_path / f"y{suffix}") as image:
            assert image.size == (16, 16)


def test_what_out_cannot_be(tmp_path, capsys):
    """Refused before the checkpoint is looked for (there is none), and nothing is lost."""
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    draw = ["--ckpt", tmp_path / "none", "--prompt", "a"]
    for out in (notes, notes / "x", notes / "x.png"):
        told = refusal(capsys, sample.main, *draw, "--out", out)
        assert f"{out}: nothing can be written there ({notes} is a file)" in told
    several = [*draw, "--prompt", "b", "--out", tmp_path / "x.png"]
    assert "is a file, for one picture" in refusal(capsys, sample.main, *several)
    told = refusal(capsys, sample.main, "--interactive", "--out", tmp_path / "x.png")
    assert "is a file, for one picture" in told
    assert notes.read_text() == "mine" and list(tmp_path.iterdir()) == [notes]


def test_what_the_windows_refuse(a_run, tiny_llm, tmp_path, capsys):
    draw = ["--ckpt", a_run, *FAST, "--prompt", "a red circle", "--out", tmp_path / "out"]
    told = refusal(capsys, sample.main, *draw, "--maps", "square")
    assert "--maps square: expected a word that the image sees: (start), a, red, circle" in told
    told = refusal(capsys, sample.main, *draw, "--trajectory", "--n", 65)
    assert "for 64 pictures at most, not 65" in told
    told = refusal(capsys, sample.main, *draw, "--maps", "--read", "image:x.png")
    assert "--read image a picture too" in told
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    files = ["--ckpt", a_run, "--prompts", f"{tmp_path / 'p.jsonl'}:geneval", "--maps"]
    assert "no place in the folders of geneval" in refusal(capsys, sample.main, *files)
    told = refusal(capsys, sample.main, "--interactive", "--prompt", "a")
    assert "--interactive asks for the prompts" in told
    assert not list((tmp_path / "out").glob("*"))
    mirror = MirrorTower.beside(tiny_llm("llama"), patch=4, image_size=16)
    with pytest.raises(ValueError, match="--maps .* a MirrorTower has a way of its own"):
        windows_of(mirror, None, ["a"])


def test_sheets_have_whole_pixels():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    large = enlarge(picture, 10)
    assert large.shape == (12, 12, 3) and np.array_equal(large[::3, ::3], picture)
    assert enlarge(np.zeros((512, 512, 3), np.uint8), 128).shape == (128, 128, 3)
    values = np.array([[0.0, 0.5, 1.0]])
    assert heat(values).sum(-1)[0].tolist() == sorted(heat(values).sum(-1)[0].tolist())


# -------------------------------------------------------------------------------------------------
# prompts at the terminal


def test_a_session(a_run, tmp_path):
    """Through the command: each line is drawn or refused in one line, and the session goes on."""
    frame = tmp_path / "frame.txt"
    frame.write_text("{} =>")
    typed = [
        "a red circle",
        "/steps 2",
        "/steps none",
        "/guidance 2:renorm",
        "/guidance",
        "/seed 7",
        "/sed 7",
        "/maps square",
        "a circle",
        "/maps",
        f"/think rewrite:3:frame={frame}",
        "",
        "a blue ring",
        "/think",
        "/think image:none.png",
        "/help",
        "猫",
    ]
    command = [sys.executable, ROOT / "sample.py", "--interactive", "--ckpt", a_run, *FAST]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        input="\n".join(typed).encode(),
        capture_output=True,
        timeout=600,
    )
    told = done.stderr.decode().splitlines()
    out = done.stdout.decode().splitlines()
    assert done.returncode == 0, told
    assert len(told) == 5, told
    assert "/steps none: expected a whole number" in told[0]
    assert "/guidance: expected a value" in told[1]
    assert "/sed: expected one of /steps" in told[2]
    assert "--maps square: expected a word" in told[3]
    assert "--read image" in told[4]
    assert "/guidance 2:renorm" in out and "/maps off" in out and "/think off" in out
    assert [line for line in out if line.startswith("a blue ring -> ")]
    assert "\x1b" not in done.stdout.decode(), "colours are for terminals"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-a-red-circle-seed0.png", "001-a-blue-ring-seed7.png", "002-猫-seed7.png"]
    assert {Path(line).name for line in out if line.endswith(".png")} == set(names)


def test_commands_change_what_comes_next(tiny_llm, tmp_path, monkeypatch):
    (tmp_path / "think.txt").write_text("{} =>")
    monkeypatch.setattr(readers, "FRAMES", tmp_path)  # the real one is too long for a tiny LLM
    llm = tiny_llm("gemma3")
    expert = random_expert(llm)
    args = sample.parse_args(["--interactive"])
    args.n = 1
    assert obey("/seed 5", args, expert, llm) == "/seed 5" and args.seed == 5
    assert obey("/maps", args, expert, llm) == "/maps on" and args.maps == ""
    assert obey("/maps red", args, expert, llm) == "/maps red" and args.maps == "red"
    assert obey("/think", args, expert, llm) == "/think think:40"
    assert isinstance(llm.reader, Thinking) and args.read == "think:40"
    with pytest.raises(ValueError, match="--read nonsense: expected one of"):
        obey("/think nonsense", args, expert, llm)
    assert isinstance(llm.reader, Thinking) and args.read == "think:40"
    assert obey("/think", args, expert, llm) == "/think off"
    assert llm.reader is None and args.read is None


def test_half_blocks_are_the_picture():
    """Two pixels a letter, in colours that can be read back."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    lines = half_blocks(picture).splitlines()
    assert len(lines) == 8
    for row, line in enumerate(lines):
        for ground, y in (("38", 2 * row), ("48", 2 * row + 1)):
            found = re.findall(rf"\x1b\[{ground};2;(\d+);(\d+);(\d+)m", line)
            assert np.array_equal(np.array(found, dtype=int), picture[y])
    wide = half_blocks(np.zeros((1000, 3000, 3), np.uint8)).splitlines()
    assert wide[0].count("\u2580") <= 3000 and len(wide) < 500


# -------------------------------------------------------------------------------------------------
# the real thing


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped expert is not there")
def test_each_word_is_looked_at_from_where_its_shape_is(gemma):
    """The circle is drawn on the left: there patches look at "circle" more than at "square", and on
    the right the other way round. A mean over four seeds."""
    args = sample.parse_args(["--ckpt", str(SHIPPED), "--prompt", RED_LEFT, "--maps"])
    expert = checkpoint.load_expert(str(SHIPPED), CPU)
    expert.attach(gemma)
    prompts = [RED_LEFT] * 4
    windows = Windows(args, expert, gemma, prompts)
    sample.draw(expert, gemma, prompts, [0, 1, 2, 3], watch=windows)
    left = {"circle": [], "square": []}
    for states in windows.pictures:
        found = word_maps(expert, gemma, RED_LEFT, states)
        for word, shares in left.items():
            values = found.mean()[found.index(word)]
            shares.append(values[:, : values.shape[1] // 2].sum() / values.sum())
    circle = np.mean(left["circle"])
    square = np.mean(left["square"])
    assert circle > 0.5 > square, f"on the left: circle {circle:.3f}, square {square:.3f}"
