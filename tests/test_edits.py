"""Pairs and instructions are what they say; an edit is judged exactly; a run learns to edit from
pictures, and a text-only LLM reads them through the tower."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import ending, refusal
from test_lmfusion import SIDE, describing_expert, largest, some_pictures, trained

import evaluate
import sample
import train
from conftest import CPU
from data import HELD_OUT_PAIRS, open_source
from extras.editing import read_edit_suite, why_wrong
from extras.edits import KINDS, Edits, edit_of, is_held_out, random_edit, random_scene
from extras.lmfusion import draw_edits, edit_contexts
from extras.lmfusion_training import Tasks
from flags import data_form
from sample import to_tensor


def some_edits(n: int):
    rng = np.random.default_rng(7)
    return [random_edit(rng) for _ in range(n)]


def test_every_edit_is_right_as_drawn_and_wrong_as_it_was():
    source = Edits(64)
    kinds = set()
    for edit in some_edits(300):
        kinds.add(edit.kind)
        assert why_wrong(source.picture(edit.after), edit) is None, edit
        assert why_wrong(source.picture(edit.before), edit) is not None, edit
    assert kinds == set(KINDS)


def test_what_else_has_changed_is_seen():
    source = Edits(64)
    checked = 0
    for edit in some_edits(200):
        kept = [one for one in edit.after if one in edit.before]
        if not kept:
            continue
        one = kept[0]
        rest = tuple(other for other in edit.after if other != one)
        assert why_wrong(source.picture(rest), edit) == "not kept"
        free = [(x, y) for x in range(3) for y in range(3)]
        taken = [other.cell for other in (*edit.after, *edit.before)]
        cell = next(cell for cell in free if cell not in taken)
        moved = (*rest, replace(one, cell=cell))
        assert why_wrong(source.picture(moved), edit) == "not kept"
        assert why_wrong(source.picture((*edit.after, replace(one, cell=cell))), edit) == "extra"
        checked += 1
    assert checked > 100


def test_a_run_sees_the_same_pairs_and_no_held_out_ones():
    source = Edits(32, seed=3)
    for index in (0, 5, 5):
        instruction, pictures = source.example(index, 4)
        again, same = Edits(32, seed=3).example(index, 4)
        assert instruction == again and np.array_equal(pictures, same)
        assert pictures.shape == (4, 2, 32, 32, 3) and pictures.dtype == np.uint8
        assert not np.array_equal(pictures[0, 0], pictures[0, 1])
    held_out = 0
    for edit in some_edits(400):
        pairs = {(one.color, one.shape) for one in (*edit.before, *edit.after)}
        assert is_held_out(edit) == bool(pairs & HELD_OUT_PAIRS)
        held_out += is_held_out(edit)
    assert held_out > 20
    assert source.shown().shape == (len(source.prompts), 32, 32, 3)


def test_the_suite_has_each_kind_and_other_languages():
    rows = {}
    for one in read_edit_suite(None, None, "both"):
        rows.setdefault(one.prompt.row, []).append(one)
        assert "{" not in one.prompt.text
    assert list(rows)[0] == "color" and set(KINDS) < set(rows) and len(rows) == 5 + 6
    for row, members in rows.items():
        assert len(members) == (40 if row in KINDS else 120), row
    italian = {one.prompt.text for one in rows["Italian"]}
    assert any(text.startswith("sposta ") for text in italian)
    halves = [len(read_edit_suite(None, None, half)) for half in ("choose", "report")]
    assert sum(halves) == sum(map(len, rows.values())) and min(halves) > 300
    with pytest.raises(ValueError, match="the rows of edits are color, "):
        read_edit_suite(None, ["Klingon"], "both")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_what_is_left_out_of_a_batch_is_left_out(kind, tiny_llm):
    """With a first token of the tokenizer's and without. One reading a pair serves all its draws;
    a row without instruction, and one without picture, read what drawing will have for them."""
    llm = tiny_llm(kind)
    expert = describing_expert(llm)
    source = Edits(SIDE)
    pairs = [source.example(i, 2) for i in range(3)]
    instructions = [text for text, _ in pairs for _ in range(2)]
    pictures = np.concatenate([pictures for _, pictures in pairs])

    class Run:
        args = type("", (), {"draws": 2, "caption_dropout": 0.2})

    Run.llm, Run.expert, Run.device = llm, expert, CPU
    tasks = Tasks(0.0, True)
    assert tasks.take(instructions, pictures)[1].shape == (6, SIDE, SIDE, 3)
    context = tasks.context(Run, instructions, torch.tensor([0.05, 0.15, 0.5, 0.9, 0.0, 0.19]))
    x_t = some_pictures(6, seed=8)
    t = torch.full((6,), 0.3)
    drawn = expert(x_t, t, context)
    before = to_tensor(pictures[:, 0], CPU)
    branches = edit_contexts(llm, expert, before, instructions)
    wanted = [expert(x_t, t, branch) for branch in branches]
    for row, branch in enumerate([0, 1, 2, 2, 0, 1]):
        off = largest(drawn[row], wanted[branch][row]) / wanted[branch][row].abs().max().item()
        assert off < 1e-5, (row, off)
    assert largest(wanted[0], wanted[1]) > 1e-3 and largest(wanted[1], wanted[2]) > 1e-3


def test_pictures_are_edited_each_as_if_alone(tiny_llm):
    llm = tiny_llm("gemma3")
    expert = describing_expert(llm)
    before = Edits(SIDE).shown()[:3]
    asked = ["make the circle red", "turn the star into a heart", ""]
    together = draw_edits(expert, llm, before, asked, [4, 5, 6], steps=3).astype(int)
    for i in range(3):
        row = slice(i, i + 1)
        alone = draw_edits(expert, llm, before[row], asked[row], [4 + i], steps=3).astype(int)
        assert abs(alone - together[row]).max() <= 1
    other = draw_edits(expert, llm, before[::-1].copy(), asked, [4, 5, 6], steps=3).astype(int)
    assert abs(other[0] - together[0]).max() > 1, "the picture before must matter"


def test_a_run_that_edits(tiny_run, tmp_path, capsys):
    """Trained from a run that draws, cut and resumed to the same end; asked and scored."""
    trained(*tiny_run, "--steps", 2, "--out", tmp_path / "draws")
    own = ["--steps", 6, "--device", "cpu", "--dtype", "float32", "--batch-size", 8]
    flags = ["--from", tmp_path / "draws", *own, "--data", "edits"]
    trained(*flags, "--out", tmp_path / "whole")
    cut = [str(flag) for flag in [*flags, "--out", tmp_path / "cut"]]
    train.train(train.prepare(*train.settings(cut)), until=3)
    trained("--resume", "--out", tmp_path / "cut")
    ours = load_file(tmp_path / "cut" / "train_state.safetensors")
    theirs = load_file(tmp_path / "whole" / "train_state.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 30), "gray").save(picture)
    ask = ["--ckpt", tmp_path / "cut", "--device", "cpu", "--steps", 2, "--image", picture]
    ask += ["--prompt", "make the circle red"]
    capsys.readouterr()
    sample.main([str(word) for word in [*ask, "--out", tmp_path / "b.png"]])
    assert "20x30, its centre read at 16x16" in capsys.readouterr().out
    assert Image.open(tmp_path / "b.png").size == (16, 16)
    many = [*ask, "--prompt", "remove the ring", "--n", 2, "--out", tmp_path / "many"]
    sample.main([str(word) for word in many])
    assert len(list((tmp_path / "many").glob("*.png"))) == 5
    evaluate.main(
        f"--ckpt {tmp_path / 'cut'} --suite edits --limit 1 --device cpu --steps 2".split()
    )
    scores = json.loads((tmp_path / "cut" / "partial" / "evaluate.json").read_text())["edits"]
    assert scores["unchanged"] == 0 and len(scores["rows"]) == 11


def test_a_mirrored_tower_describes_and_edits(tiny_run, tmp_path, capsys):
    cut = tiny_run.index("--width")  # and its depth: a mirror has the LLM's
    flags = [*tiny_run[:cut], *tiny_run[cut + 4 :], "--bridge", "mirror", "--steps", 2]
    trained(*flags, "--describe", "0.25", "--out", tmp_path / "describes")
    trained(*flags, "--data", "edits", "--out", tmp_path / "edits")
    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(picture)
    sample.main(f"--ckpt {tmp_path / 'describes'} --device cpu --describe {picture}".split())
    assert f"{picture}: " in capsys.readouterr().out
    ask = f"--ckpt {tmp_path / 'edits'} --device cpu --steps 2 --image {picture} --prompt x"
    sample.main([*ask.split(), "--out", str(tmp_path / "b.png")])
    assert Image.open(tmp_path / "b.png").size == (16, 16)


def test_what_cannot_be_edited_is_refused(tiny_run, tmp_path, capsys):
    trained(*tiny_run, "--steps", 1)
    other = [*tiny_run, "--out", tmp_path / "other"]
    run = str(tmp_path / "run")
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    ask = ["--ckpt", run, "--device", "cpu", "--prompt", "x", "--image"]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    shutil.copy(picture, pairs / "a.png")
    line = {"file_name": "a.png", "before": "a.png", "text": "leave it"}
    (pairs / "metadata.jsonl").write_text(json.dumps(line))
    cases = [
        (train.main, [*other, "--data", f"shapes,{pairs}"], "pairs for edits, and stands alone"),
        (train.main, [*other, "--data", pairs, "--bridge", "last"], "has no image keys"),
        (train.main, [*other, "--data", pairs, "--plan"], "describes or edits cannot be planned"),
        (sample.main, [*ask, picture], "never learned to edit"),
        (sample.main, [*ask, tmp_path / "none.png"], "none.png does not decode"),
        (sample.main, [*ask, picture, "--trajectory"], "leave out --trajectory"),
        (sample.main, [*ask, picture, "--size", "16x32"], "leave out --size"),
        (sample.main, [*ask, picture, "--guidance", "3:renorm"], "a scale alone, as in 1.5"),
        (sample.main, [*ask[:-3], "--describe", picture, "--size", "8x8"], "leave out --size"),
        (sample.main, [*ask[:-3], "--describe", picture, "--out", picture], "leave out --out"),
        (evaluate.main, ["--ckpt", run, "--suite", "edits"], "never learned to edit"),
        (train.main, [*other, "--data", "edits,shapes"], "edits has pairs for edits, and stands alone"),
        (train.main, [*other, "--data", "edits", "--describe", "0.1"], "leave one out"),
        (train.main, [*other, "--data", "edits", "--bridge", "last"], "has no image keys"),
    ]
    for command, flags, message in cases:
        status, told = ending(capsys, lambda: command([str(flag) for flag in flags]))
        assert status == 2 and message in told, (flags, told)


def test_a_scene_without_room_has_no_such_edit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        edit = edit_of("remove", scene, rng)
        assert (edit is None) == (len(scene) == 1)
    assert data_form("edits") == ("edits", {})


def test_pairs_of_ones_own(tiny_run, tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, color in [("a", "red"), ("b", "blue"), ("c", "green")]:
        Image.new("RGB", (20, 20), color).save(folder / f"{name}.png")
    lines = [
        {"before": "a.png", "text": "make it blue", "file_name": "b.png"},
        {"before": "b.png", "text": "make it green", "file_name": "c.png"},
        {"before": "a.png", "text": "now green", "file_name": "c.png"},
        {"before": "gone.png", "text": "make it red", "file_name": "a.png"},
    ]
    metadata = folder / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    source = open_source(str(folder), 16)
    shown = {}
    for i in range(3):
        said, pictures = source.example(i, 2)
        assert pictures.shape == (2, 2, 16, 16, 3)
        shown[said] = [tuple(picture[0, 0]) for picture in pictures[0]]
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert shown == {
        "make it blue": [red, blue],
        "make it green": [blue, green],
        "now green": [red, green],
    }
    assert "3 left" not in source.about() and "1 left out whose picture before" in source.about()
    before = source.fingerprint()
    Image.new("RGB", (30, 30), "red").save(folder / "a.png")
    assert open_source(str(folder), 16).fingerprint() != before

    trained(*tiny_run, "--data", str(folder), "--steps", 2)
    run = ["--ckpt", str(tmp_path / "run"), "--device", "cpu", "--steps", "2"]
    asked = ["--image", str(folder / "a.png"), "--prompt", "make it blue"]
    sample.main([*run, *asked, "--out", str(tmp_path / "edited.png")])
    assert Image.open(tmp_path / "edited.png").size == (16, 16)

    # a line without its picture before, and a folder in which none has one
    metadata.write_text("\n".join(map(json.dumps, [*lines, {"text": "x", "file_name": "a.png"}])))
    other = [*tiny_run, "--data", folder, "--out", tmp_path / "other"]
    told = refusal(capsys, train.main, *other)
    assert "line 5" in told and '"before"' in told
    metadata.write_text(json.dumps(lines[3]))
    told = refusal(capsys, train.main, *other)
    assert "no captioned picture" in told and "1 left out" in told
