"""Texts and pictures in any order: each part reads the cache of all before it, and that is the
plain joint forward over the whole sequence; a picture is described, each as if alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_cli import ending

import evaluate
import sample
import train
from attention import joint_attention_definition
from checkpoint import load_expert
from conftest import CPU
from data import COLORS, Scene, Shapes, Thing
from extras.caption_grammar import names_colors, scene_of
from extras.described_languages import LANGUAGES, read_languages_suite, why_not_in
from extras.describing import describe, why_wrong
from extras.joint import run_with_attention
from extras.lmfusion import Sequence, caption_loss, interleave, logits_of
from extras.lmfusion_training import Tasks, check_plain_attention
from extras.mirror import MirrorTower
from extras.suites import read_suite
from llm import FrozenLLM
from model import ImageExpert

SIDE = 16
FAMILIES = ["qwen2", "llama", "gemma3", "cohere2", "gpt2"]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def describing_expert(llm, depth: int = 2, layers: str = "all") -> ImageExpert:
    """With random weights everywhere, so that every part matters."""
    torch.manual_seed(1)
    shared = {"patch": 8, "image_size": SIDE, "reads_pictures": True}
    expert = ImageExpert.beside(llm, width=32, depth=depth, heads=None, layers=layers, **shared)
    return shaken(expert, llm)


def shaken(expert, llm):
    with torch.no_grad():
        for weight in expert.parameters():
            weight += 0.2 * torch.randn_like(weight)
    expert.attach(llm)
    return expert.eval()


def some_pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def plain_joint_forward(llm, expert, parts: list, x_t, t):
    """The whole sequence in one go, for one row: text causal, pictures bidirectional within and
    causal between parts; every layer of the LLM once, over all of its text. -> the logits of all
    text, and the velocity of x_t after all parts."""
    # what stands where
    before = llm.open_ids("")
    ids = list(before)
    text_place = list(range(len(before)))
    text_part = [0] * len(before)
    pictures = []  # tokens, modulations, place, part
    place = len(before)
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            new = llm.open_ids(part)[len(before) :]
            ids += new
            text_place += range(place, place + len(new))
            text_part += [number] * len(new)
            place += len(new)
            continue
        img, modulations, _ = expert.tokens_of(part, torch.ones(1))
        img = torch.cat([expert.begin_of_image.expand(1, 1, -1), img], dim=1)
        pictures.append([img, modulations, place, number])
        place += 1
    img, modulations, way_out = expert.tokens_of(x_t, t)
    pictures.append([img, modulations, place, len(parts) + 1])
    text_part = torch.tensor(text_part)
    T = len(ids)

    # who sees whom
    part_of = [text_part]
    for img, _, _, number in pictures:
        part_of.append(torch.full((img.shape[1],), number))
    part_of = torch.cat(part_of)
    index = torch.arange(len(part_of))
    is_text = index < T
    earlier = part_of[:, None] > part_of
    within = part_of[:, None] == part_of
    causal = index[:, None] >= index
    sees = earlier | (within & (~is_text[:, None] | causal))
    last_part = part_of == len(parts) + 1
    sees &= ~(last_part & ~last_part[:, None])  # nothing follows it

    def attend(module, q, k, v, attention_mask, scaling=None, **_):
        q = q * (scaling or q.shape[-1] ** -0.5)
        blocks = []
        for i, block in enumerate(expert.blocks):
            if llm.cache_index[block.layer.index] == module.layer_idx:
                blocks.append((i, block))
        if not blocks:
            text_sees = sees[:T, :T]
            out = joint_attention_definition(q, k, v, text_sees[None, None])
            return out.transpose(1, 2), None
        assert len(blocks) == 1
        i, block = blocks[0]
        rotary = llm.rotary[block.layer.index]
        img_q, img_k, img_v = [], [], []
        for img, modulations, where, _ in pictures:
            its_q, its_k, its_v = block.project(img, modulations[i])
            at = torch.tensor([where])
            img_q.append(rotary(its_q * its_q.shape[-1] ** -0.5, at))
            img_k.append(rotary(its_k, at))
            img_v.append(its_v)
        joint_k = torch.cat([k, *img_k], dim=2)
        joint_v = torch.cat([v, *img_v], dim=2)
        text_out = joint_attention_definition(q, joint_k, joint_v, sees[None, None, :T])
        img_out = joint_attention_definition(
            torch.cat(img_q, dim=2), joint_k, joint_v, sees[None, None, T:]
        )
        sizes = [picture[0].shape[1] for picture in pictures]
        for picture, attended in zip(pictures, img_out.split(sizes, dim=2)):
            picture[0] = block.finish(picture[0], attended, picture[1][i])
        return text_out.transpose(1, 2), None

    positions = torch.tensor([text_place])
    out = run_with_attention(llm, torch.tensor([ids]), attend, position_ids=positions)
    return logits_of(llm, out.last_hidden_state), expert.velocity_of(
        pictures[-1][0], way_out, x_t, t
    )


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_any_order_is_the_plain_joint_forward(kind, tiny_llm):
    """text, picture, text, picture, text, and a picture to draw."""
    llm = tiny_llm(kind)
    expert = describing_expert(llm)
    x_t = some_pictures(1, seed=3)
    t = torch.tensor([0.4])
    parts = ["a red circle", some_pictures(1), " left of", some_pictures(1, 1), " three stars"]
    logits, velocity = plain_joint_forward(llm, expert, parts, x_t, t)

    sequence = Sequence(llm, expert, 1)
    said = []
    for part in parts:
        if isinstance(part, str):
            hidden = sequence.read_tokens([sequence.tokens(part)])
            said.append(logits_of(llm, hidden))
        else:
            sequence.read_picture(part)
    drawn = expert(x_t, t, sequence.context())
    said = torch.cat(said, dim=1)
    off_text = largest(said, logits[:, -said.shape[1] :]) / logits.abs().max().item()
    off_picture = largest(drawn, velocity) / velocity.abs().max().item()
    assert off_text < 1e-5 and off_picture < 1e-5, (off_text, off_picture)

    # and each part matters
    for i in range(len(parts)):
        fewer = [[part] if isinstance(part, str) else part for part in parts[:i] + parts[i + 1 :]]
        other = expert(x_t, t, interleave(llm, expert, fewer).context())
        assert largest(other, drawn) > 1e-4, f"part {i} reaches nothing"


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_rows_of_unequal_length_are_read_as_if_alone(kind, tiny_llm):
    llm = tiny_llm(kind)
    expert = describing_expert(llm, depth=3)
    x_t = some_pictures(3, seed=3)
    t = torch.tensor([0.2, 0.4, 0.6])
    pictures = some_pictures(3, seed=4)
    before = ["a red circle left of a blue square", "", "two"]
    after = [" in", " three small teal stars", ""]
    together = expert(x_t, t, interleave(llm, expert, [before, pictures, after]).context())
    for i in range(3):
        row = slice(i, i + 1)
        alone = interleave(llm, expert, [before[row], pictures[row], after[row]])
        off = largest(expert(x_t[row], t[row], alone.context()), together[row])
        assert off / together.abs().max().item() < 1e-5, off


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_text_alone_is_the_context_that_drawing_has(kind, tiny_llm):
    llm = tiny_llm(kind)
    expert = describing_expert(llm)
    captions = ["a red circle", "three small teal stars"]
    theirs = llm.context(captions)
    ours = interleave(llm, expert, [captions]).context()
    T = int(ours.lengths.max())
    assert torch.equal(ours.lengths, theirs.lengths)
    for row, length in enumerate(ours.lengths):
        for a, b in zip(ours.keys + ours.values, theirs.keys + theirs.values):
            off = largest(a[row, :, :length], b[row, :, :length])
            assert off < 1e-5 * max(1, b.abs().max().item()), off
    assert T <= theirs.keys[0].shape[2]


@pytest.mark.parametrize("tower", ["mot", "two blocks a layer", "mirror"])
def test_the_loss_trains_the_tower_and_leaves_the_llm(tower, tiny_llm):
    llm = tiny_llm("llama")
    if tower == "mirror":
        shared = {"patch": 8, "image_size": SIDE, "reads_pictures": True}
        expert = shaken(MirrorTower.beside(llm, **shared), llm)
    else:
        layers = {"mot": "all", "two blocks a layer": "1"}[tower]
        expert = describing_expert(llm, layers=layers)
    before = {name: weight.clone() for name, weight in llm.model.state_dict().items()}
    optimizer = torch.optim.Adam(expert.parameters(), lr=3e-3)
    captions = ["a red circle", "three small teal stars"]
    losses = []
    for _ in range(40):
        loss = caption_loss(llm, expert, some_pictures(2), captions)
        assert loss.shape == (2,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert expert.begin_of_image.grad.abs().max() > 0
    for name, weight in llm.model.state_dict().items():
        assert torch.equal(weight, before[name]), f"{name} has moved"
    assert all(weight.grad is None for weight in llm.model.parameters())


def test_the_loss_is_the_llms_own(tiny_llm):
    """Of each caption as if alone, whatever the padding; and the mean over its tokens and its
    end."""
    llm = tiny_llm("gemma3")
    expert = describing_expert(llm)
    captions = ["a red circle", "the heart is to the left of the gold ring", "two"]
    pictures = some_pictures(3)
    together = caption_loss(llm, expert, pictures, captions)
    for i, caption in enumerate(captions):
        row = slice(i, i + 1)
        alone = caption_loss(llm, expert, pictures[row], [caption])
        assert largest(alone, together[row]) < 1e-4
        # token by token, each after all before it
        sequence = Sequence(llm, expert, 1)
        ids = sequence.tokens("\n") + sequence.tokens(caption) + [llm.tokenizer.eos_token_id]
        nats = []
        for n in range(len(sequence.tokens("\n")), len(ids)):
            whole = interleave(llm, expert, [pictures[row]])
            hidden = whole.read_tokens([ids[:n]])
            nats.append(-logits_of(llm, hidden)[0, -1].log_softmax(0)[ids[n]].item())
        assert sum(nats) / len(nats) == pytest.approx(alone.item(), abs=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_pictures_are_described_each_as_if_alone(kind, tiny_llm):
    llm = tiny_llm(kind)
    expert = describing_expert(llm)
    pictures = some_pictures(3)
    chance = {"temperature": 1.0, "seeds": [5, 6, 7]}
    of_three_lengths = {"beginnings": ["an orange", "", "three small teal stars and"]}
    for options in ({}, chance, of_three_lengths, chance | of_three_lengths):
        together = describe(llm, expert, pictures, tokens=6, **options)
        for i in range(3):
            own = dict(options)
            for name in ("seeds", "beginnings"):
                if name in own:
                    own[name] = own[name][i : i + 1]
            assert describe(llm, expert, pictures[i : i + 1], tokens=6, **own) == [together[i]]
        for text, beginning in zip(together, options.get("beginnings", [])):
            assert text.startswith(beginning)
    drawn = describe(llm, expert, pictures, temperature=1.0, seeds=[5, 5, 6])
    again = describe(llm, expert, pictures, temperature=1.0, seeds=[5, 5, 6])
    assert drawn == again and len(set(drawn)) == 3


def test_a_description_in_another_language():
    """Right with the colour's word of that language, and of no other colour; the suite's own
    captions are, and no caption of another colour or of English."""
    shown = read_languages_suite(16, None, None, "both")
    languages = json.loads(LANGUAGES.read_text("utf-8"))
    assert {one.row for one in shown} == set(languages) and len(languages) == 22
    prompts = {}
    for prompt in read_suite("languages", one=True):
        prompts.setdefault(prompt.row, {})[prompt.scene_id] = prompt
    same_in_english = 0
    for one in shown:
        color = one.scene.groups[0].color
        if not languages[one.row]["colors"][color]:
            same_in_english += 1
            continue
        for prompt in prompts[one.row].values():
            why = why_not_in(f"{one.beginning} {prompt.text}", one)
            assert (why is None) == (prompt.scene.groups[0].color == color), prompt.text
        if one.row != "English":
            assert why_not_in(f"{one.beginning} a {color} ring", one) == "in English"
    assert same_in_english < 10
    italian = next(one for one in shown if one.row == "Italian")
    assert why_not_in("Una foto di un", italian) == "no color"
    assert why_not_in("Una foto di verde e rosso", italian) == "another color"


def test_what_has_no_room_is_cut(tiny_llm):
    """GPT-2 has as many positions as it has; what is beyond them is left out, and said once."""
    llm = tiny_llm("gpt2")
    expert = describing_expert(llm)
    pictures = some_pictures(2)
    with pytest.warns(UserWarning, match="is cut to"):
        said = describe(llm, expert, pictures, tokens=200)
    assert said == describe(llm, expert, pictures, tokens=62)
    losses = caption_loss(llm, expert, pictures, ["a red circle " * 40, "two"])
    assert torch.isfinite(losses).all()
    short = caption_loss(llm, expert, pictures[1:], ["two"])
    assert largest(losses[1:], short) < 1e-4


def test_only_captions_that_name_the_colors_are_described():
    """Evenly from these, whatever the others are; of a folder's captions all are."""
    captions = ["a red star", "three stars", "a ring", "a blue ring above a star", "star, teal"] * 4
    pictures = np.arange(20).reshape(20, 1, 1, 1)
    tasks = Tasks(0.3, False, names_colors)
    drawn, rest = tasks.take(captions, pictures)
    described, shown = tasks.described
    assert len(described) == 6 and set(described) == {"a red star", "star, teal"}
    assert [captions[i] for i in shown.flatten()] == described
    assert sorted([*rest.flatten(), *shown.flatten()]) == list(range(20))
    assert drawn == [captions[i] for i in rest.flatten()]

    tasks.take(["three stars"] * 4, pictures[:4])
    assert tasks.described[0] == []  # nothing is fit
    everything = Tasks(0.3, False)
    everything.take(captions, pictures)
    assert "three stars" in everything.described[0]


# -------------------------------------------------------------------------------------------------
# through the commands


def trained(*flags) -> None:
    train.main([str(flag) for flag in flags])


def test_a_run_that_describes(tiny_run, tmp_path, capsys):
    """Trained, cut and resumed to the same end, begun from a run that only draws; its pictures are
    described and scored."""
    flags = [*tiny_run, "--describe", "0.25", "--steps", "8"]
    trained(*flags, "--out", tmp_path / "whole")
    train.train(train.prepare(*train.settings([*flags, "--out", str(tmp_path / "cut")])), until=3)
    trained("--resume", "--out", tmp_path / "cut")
    ours = load_file(tmp_path / "cut" / "train_state.safetensors")
    theirs = load_file(tmp_path / "whole" / "train_state.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    line = json.loads((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["lm_loss"] < 20

    # from a run that only draws, and back
    trained(*tiny_run, "--steps", 2, "--out", tmp_path / "draws")
    own = ["--steps", 2, "--device", "cpu", "--batch-size", 8, "--warmup", 1]
    trained("--from", tmp_path / "draws", *own, "--describe", "0.5", "--out", tmp_path / "both")
    trained("--from", tmp_path / "both", *own, "--out", tmp_path / "after")
    assert not load_expert(str(tmp_path / "after"), CPU).config["reads_pictures"]

    # what it says
    picture = tmp_path / "a.png"
    Image.new("L", (40, 20), 200).save(picture)
    capsys.readouterr()
    asked = ["--ckpt", tmp_path / "both", "--device", "cpu", "--describe", picture, picture]
    sample.main([str(word) for word in [*asked, "--prompt", "a red"]])
    told = capsys.readouterr().out.splitlines()
    assert f"{picture}: 40x20, its centre read at 16x16" in told
    lines = [line for line in told if line.startswith(f"{picture}: a red")]
    assert len(lines) == 2 and lines[0] == lines[1]
    suites = "--suite describe,describe-languages --limit 2 --device cpu"
    evaluate.main(f"--ckpt {tmp_path / 'both'} {suites}".split())
    scores = json.loads((tmp_path / "both" / "partial" / "evaluate.json").read_text())
    assert len(scores["describe"]["said"]) == 8
    spoken = scores["describe-languages"]
    assert len(spoken["said"]) == 44 and spoken["mean"]["n"] == 42  # all but English
    assert spoken["said"][2].startswith("Una foto di")
    assert (tmp_path / "both" / "partial" / "evaluate-describe.png").exists()


def test_a_run_goes_on_that_had_nothing_to_describe(tiny_run, tmp_path):
    """A parameter without a gradient so far has no moments: the run is saved, and goes on."""
    run = train.prepare(*train.settings([*tiny_run, "--describe", "0.25", "--steps", "4"]))
    run.tasks.tells_all = lambda caption: False
    train.train(run, until=2)
    state = load_file(tmp_path / "run" / "train_state.safetensors")
    assert "expert.begin_of_image" in state and "exp_avg.begin_of_image" not in state
    trained("--resume", "--out", tmp_path / "run")
    state = load_file(tmp_path / "run" / "train_state.safetensors")
    assert state["exp_avg.begin_of_image"].abs().max() > 0


def test_what_cannot_be_described_is_refused(tiny_run, tmp_path, capsys):
    trained(*tiny_run, "--steps", 1)
    run = str(tmp_path / "run")
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    broken = tmp_path / "b.png"
    broken.write_bytes(b"no picture")
    ask = ["--ckpt", run, "--device", "cpu", "--describe", str(picture)]
    cases = [
        (sample.main, ask, "never learned to describe"),
        (sample.main, [*ask[:-1], str(broken)], "b.png does not decode"),
        (sample.main, [*ask[:-1], str(tmp_path / "none.png")], "none.png does not decode"),
        (sample.main, [*ask, "--n", "2"], "leave out --n"),
        (sample.main, [*ask, "--maps"], "leave out --maps"),
        (sample.main, [*ask, "--prompt", "a", "--prompt", "b"], "takes one --prompt"),
        (evaluate.main, ["--ckpt", run, "--suite", "describe"], "never learned to describe"),
        (train.main, [*tiny_run, "--describe", "0.2", "--bridge", "last"], "has no image keys"),
        (train.main, [*tiny_run, "--describe", "2"], "argument --describe"),
        (train.main, [*tiny_run, "--describe", "1"], "argument --describe"),
    ]
    for command, flags, message in cases:
        status, told = ending(capsys, lambda: command([str(flag) for flag in flags]))
        assert status == 2 and message in told, (flags, told)


def test_captions_are_read_back():
    """By the grammar that writes them: every scene, but for a size that the caption leaves out."""
    source = Shapes(64, seed=11)
    for index in range(4000):
        caption, scene, _ = source.caption(index)
        told = scene_of(caption)
        if told is not None and scene.groups[0].size and not told.groups[0].size:
            told = Scene((replace(told.groups[0], size=scene.groups[0].size),), told.relation)
        assert told == scene, caption
    for text in ("", "a dog", "three star", "a red circle and a blue star and a ring"):
        assert scene_of(text) is None


def test_what_is_said_is_held_against_every_thing():
    red = Thing("circle", COLORS["red"], 0.25, 0.5, 0.15)
    blue = Thing("star", COLORS["blue"], 0.75, 0.5, 0.15)
    for said in (
        "a red circle and a blue star",
        "a blue star, a red circle",
        "the blue star is right of a red circle",
        "left of a blue star you see a red circle",
        "a red circle next to a blue star",
    ):
        assert why_wrong(said, [red, blue]) is None, said
    for said, why in {
        "a red circle": "wrong count",
        "a red circle and a blue ring": "wrong shape",
        "a blue circle and a red star": "wrong color",
        "a red circle and a star": "no color",
        "a red circle above a blue star": "wrong relation",
        "a red circle right of a blue star": "wrong relation",
        "two red circles": "wrong shape",
        "something": "no scene",
    }.items():
        assert why_wrong(said, [red, blue]) == why, said
    over = [Thing("circle", COLORS["yellow"], 0.5, y, 0.15) for y in (0.25, 0.75)]
    assert why_wrong("a yellow circle above a yellow circle", over) is None
    assert why_wrong("a yellow circle left of a yellow circle", over) == "wrong relation"
    assert why_wrong("two fuchsia rings", [Thing("ring", COLORS["magenta"], 0, 0, 1)] * 2) is None


def test_an_llm_with_another_attention_is_refused(tiny_llm):
    """Capped scores (Gemma 2) would be read without their cap."""
    for kind in FAMILIES:
        check_plain_attention(tiny_llm(kind))
    with pytest.raises(ValueError, match="cannot read on after a picture"):
        check_plain_attention(capped(tiny_llm("llama")))


def capped(llm):
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5)
    return FrozenLLM(model, llm.tokenizer, "capped")
