"""The mirrored tower, an image tower with the LLM's own architecture; and the other bridges between an LLM and an expert."""

import copy

import pytest
import torch
import transformers
from test_families import FAMILIES, LISTED_WITH, MORE, NOT_BUILT, REFUSED, Letters, listed, tiny_model

import train
from bridges import BRIDGES, MirrorTower, build_bridge, count_parameters
from conftest import CPU, DECODERS, TINY_RUN
from loading import fingerprint
from model import FrozenEncoder, FrozenLLM, ImageExpert
from sample import draw, llm_of, load_expert

CAPTIONS = ["a red circle", "the heart is to the left of the gold ring", ""]


def beside(llm, **options) -> MirrorTower:
    """A mirrored tower whose head says something (a new one is silent)."""
    tower = MirrorTower.beside(llm, patch=4, image_size=16, **options)
    torch.nn.init.normal_(tower.head.weight, std=0.1)
    return tower


@pytest.mark.parametrize("kind", DECODERS)
def test_a_copy_of_the_llm_reads_on_as_the_llm_does(kind, tiny_llm):
    """With the LLM's weights, and a word in place of a picture: the hidden state is what the LLM has after that word."""
    llm = tiny_llm(kind)
    tower = beside(llm)
    word = 17
    img = llm.model.get_input_embeddings()(torch.tensor([[word]] * len(CAPTIONS)))
    with torch.no_grad():
        ours = tower.decode(img, llm.context(CAPTIONS))
        for caption, state in zip(CAPTIONS, ours):
            ids = torch.tensor([[*llm.tokenize(caption), word]])
            theirs = llm.model.base_model(input_ids=ids).last_hidden_state[0, -1]
            assert (state[0] - theirs).abs().max() < 1e-4, f"{caption!r}: {(state[0] - theirs).abs().max():.2e}"


@pytest.mark.parametrize("kind", DECODERS)
def test_batch_equals_one_by_one(kind, tiny_llm):
    llm = tiny_llm(kind)
    tower = beside(llm, init="random")
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            assert (alone[0] - together[i]).abs().max() < 1e-4, f"{(alone[0] - together[i]).abs().max():.2e}"
        assert (tower(x, t, llm.context(CAPTIONS[::-1])) - together).abs().max() > 1e-3, "the caption reaches the picture"


def test_checkpointing_changes_no_gradient(tiny_llm):
    llm, gradients = tiny_llm("qwen2"), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = beside(llm, checkpointing=checkpointing)
        ran = []
        tower.blocks[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        tower.blocks[0].self_attn.register_forward_pre_hook(lambda *_, ran=ran: ran.append(2))
        x, t = torch.ones(2, 3, 16, 16), torch.tensor([0.2, 0.7])
        tower(x, t, llm.context(CAPTIONS[:2])).square().mean().backward()
        assert ran == [1, 2, 2] if checkpointing else ran == [1, 2], "a checkpointed layer computes its inside once more"
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"no gradient reaches {name}"
        assert (gradients[1][name] - gradient).abs().max() < 1e-6, name


MIRROR = [*TINY_RUN[:6], "--image-size", "16", "--patch", "4", "--warmup", "2", "--expert", "mirror"]


def test_training_resumes_and_the_llm_stays(llm_folder, tmp_path):
    """--expert mirror through the command: trained are its own weights alone, and killed and resumed gives the same ones."""
    flags = ["--llm", str(llm_folder("llama")), *MIRROR, "--steps", "4", "--save-every", "2", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    run = train.prepare(*train.settings([*flags, str(tmp_path / "halves")]))
    assert isinstance(run.expert, MirrorTower) and run.args.lr == train.RECIPES["mirror"]["lr"]
    before = fingerprint(run.llm.model)
    optimized = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in run.expert.parameters())
    assert not any(p.shape[0] == 300 for p in run.expert.parameters()), "no table of words: 300 is the vocabulary"
    for _, batch in zip(range(2), train.batches(run.source, run.llm, 8, run.args.draws, 0)):
        train.train_step(run, run.expert, *batch)
    train.save_run(run)
    assert fingerprint(run.llm.model) == before
    train.main(["--resume", "--out", str(tmp_path / "halves")])
    whole, halves = (load_expert(str(tmp_path / name), CPU) for name in ("whole", "halves"))
    assert isinstance(whole, MirrorTower) and whole.config == halves.config
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True))
    assert not torch.equal(whole.blocks[0].mlp.up_proj.weight, run.llm.model.base_model.layers[0].mlp.up_proj.weight)
    pictures = draw(whole, llm_of(whole, None, CPU, torch.float32), ["a red circle"], [0], steps=2)
    assert pictures.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("flags, message", [(["--width", "64"], "--width is for --expert tiny alone"),
                                            (["--layers", "lower"], "--layers is for --expert tiny alone")])  # fmt: skip
def test_flags_of_the_other_tower_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.parse_args(["--expert", "mirror", *flags])
    with pytest.raises(ValueError, match="--init is for --expert mirror alone"):
        train.parse_args(["--init", "random"])


# ---------------------------------------------------------------------------------------------------------------------
# the other bridges

SIZE = {"queries": 8, "width": 64, "depth": 6, "patch": 4, "image_size": 16}
FLAGS = [*TINY_RUN, "--width", "64", "--depth", "6", "--bridge"]


def bridge(name: str, llm: FrozenLLM, **options) -> ImageExpert:
    """A bridge whose every weight is random (a new one answers 0: its head and gates start at zero)."""
    tower = build_bridge(name, llm, **SIZE | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tower.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    tower.attach(llm)
    return tower


@pytest.mark.parametrize("name, kind", [*((name, "deep") for name in BRIDGES), ("kv", "gpt2"), ("metaqueries", "gpt2"),
                                        ("metaqueries", "gemma3")])  # fmt: skip
def test_a_bridge_hears_its_caption_and_no_other(name, kind, tiny_llm):
    """Batch = one by one, whatever the padding and with no text at all; and another caption gives another picture."""
    llm = tiny_llm(kind)
    tower = bridge(name, llm, depth=len(llm.layers))
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            assert (alone[0] - together[i]).abs().max() < 1e-4, f"{(alone[0] - together[i]).abs().max():.2e}"
        both = tower.prepare(llm.context(CAPTIONS)).concat(tower.prepare(llm.context([""] * 3)))
        guided = tower(torch.cat([x, x]), torch.cat([t, t]), both)
        assert (guided[:3] - together).abs().max() < 1e-4, "as for guidance: prepared, and in one batch with the empty prompt"
        assert (tower(x, t, llm.context(CAPTIONS[::-1]))[::2] - together[::2]).abs().max() > 1e-3
        twice = tower(x[[0, 0, 1]], t[[0, 0, 1]], llm.context([CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]]))
        assert (twice - together[[0, 0, 1]]).abs().max() < 1e-4, "a caption that comes twice is read once"


@pytest.mark.parametrize("name", BRIDGES)
def test_what_trains_and_what_is_frozen(name, llm_folder, tmp_path):
    """Through the command: every parameter of the bridge gets a gradient, the LLM's bytes stay, the file draws the same."""
    flags = ["--llm", str(llm_folder("deep")), *FLAGS, name, *(["--queries", "8"] if name == "metaqueries" else []), "--out"]
    run = train.prepare(*train.settings([*flags, str(tmp_path / "run"), "--steps", "3"]))
    mot = build_bridge("mot", run.llm, **SIZE)
    assert abs(count_parameters(run.expert) / count_parameters(mot) - 1) < 0.05
    before, start = fingerprint(run.llm.model), copy.deepcopy(run.expert.state_dict())
    optimized = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in run.expert.parameters()) and all(
        p.requires_grad for p in run.expert.parameters()
    )
    for _, batch in zip(range(3), train.batches(run.source, run.llm, 8, run.args.draws, 0)):
        train.train_step(run, run.expert, *batch)
    still = [key for key, value in run.expert.named_parameters() if torch.equal(value, start[key])]
    assert not still, f"these did not move: {still}"
    assert fingerprint(run.llm.model) == before and not any(p.requires_grad for p in run.llm.model.parameters())
    train.save_run(run)
    loaded = load_expert(str(tmp_path / "run"), CPU)
    assert type(loaded) is BRIDGES[name] and loaded.config == run.expert.config
    llm = llm_of(loaded, None, CPU, torch.float32)
    pictures = draw(loaded, llm, ["a red circle"], [0], steps=2)
    assert (pictures == draw(run.ema, run.llm, ["a red circle"], [0], steps=2)).all()


def test_hidden_states_are_standardized_over_real_tokens_alone(tiny_llm):
    llm = tiny_llm("deep")
    tower = bridge("lap", llm)
    tower.measure(llm, CAPTIONS)
    context = llm.context(CAPTIONS)
    valid = torch.arange(context.hidden[0].shape[1]) < context.lengths[:, None]
    for x in tower.standardized(context):
        deviation = x[valid].std(0)  # 1 but for the small number that keeps a still dimension from being blown up
        assert x[valid].mean(0).abs().max() < 1e-4 and deviation.max() <= 1 and deviation.mean() > 0.9


def test_what_the_text_takes_is_done_once_for_a_drawing(tiny_llm, monkeypatch):
    llm = tiny_llm("deep")
    tower, calls = bridge("lap", llm), []
    text = tower.text
    monkeypatch.setattr(tower, "text", lambda context: calls.append(len(context.lengths)) or text(context))
    draw(tower, llm, ["a red circle", "a red circle", "two"], [0, 1, 2], steps=5)
    assert calls == [2, 1], "the distinct captions, and the empty prompt of guidance"


def test_options_of_the_bridges(tiny_llm):
    llm = tiny_llm("deep")  # six layers
    assert build_bridge("last", llm, **SIZE).states == [6]
    assert build_bridge("last", llm, hidden_state="penultimate", **SIZE).states == [5]
    assert build_bridge("last", llm, hidden_state="1", **SIZE).states == [1]
    assert build_bridge("hsi", llm, **SIZE).states == [0, 1, 2, 4, 5, 6]
    assert build_bridge("lap", llm, stride=4, **SIZE).states == [0, 4]
    assert len(build_bridge("lap", llm, refiner=False, **SIZE).refine.blocks) == 0
    assert len(build_bridge("metaqueries", llm, **SIZE | {"queries": 5}).queries) == 5
    kv = build_bridge("kv", llm, **SIZE)
    assert (len(kv.blocks), kv.blocks[0].heads, kv.turned) == (6, 4, False)
    per_layer = bridge("lap", llm, per_layer=True, refiner=False, stride=6)
    assert len(per_layer.pools) == 6
    context = llm.context(CAPTIONS)
    assert per_layer.prepare(context).text.shape == (3, context.hidden[0].shape[1], 6 * 64)
    first = torch.tensor([llm.tokenize(caption)[0] for caption in CAPTIONS[:2]])
    assert torch.equal(context.hidden[0][:2, 0], llm.model.get_input_embeddings()(first))


def test_keys_of_key_value_fusion_are_as_the_llm_left_them(tiny_llm):
    llm = tiny_llm("llama")
    build_bridge("kv", llm, **SIZE | {"depth": 3}).attach(llm)
    ids = torch.tensor([llm.tokenize(CAPTIONS[0])])
    theirs = llm.model(input_ids=ids, use_cache=True).past_key_values.layers[1].keys
    assert (llm.context(CAPTIONS[:1]).keys[1][:, :, : ids.shape[1]] - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_in_the_place_of_the_llm(kind, llm_folder, tmp_path):
    """--bridge last and lap read T5 and BERT; batch = one by one, though these see their padding unless told not to."""
    flags = ["--llm", str(llm_folder(kind)), *FLAGS, "lap", "--stride", "2", "--steps", "2"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    tower = load_expert(str(tmp_path / "run"), CPU)
    llm = llm_of(tower, None, CPU, torch.float32)
    assert isinstance(llm, FrozenEncoder)
    tower = bridge("last", llm)
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            assert (alone[0] - together[i]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="--bridge kv needs keys and values"):
        build_bridge("kv", llm, **SIZE)
    with pytest.raises(ValueError, match="is an encoder and writes nothing"):
        llm.think("{}")


@pytest.mark.parametrize("flags, message", [
    (["--bridge", "lap", "--expert", "mirror"], "--bridge is for --expert tiny alone"),
    (["--bridge", "lap", "--layers", "upper"], "--layers is for --bridge mot alone"),
    (["--stride", "2"], "--stride is for --bridge lap alone"),
    (["--bridge", "lap", "--queries", "8"], "--queries is for --bridge metaqueries alone"),
    (["--bridge", "lap", "--stride", "4"], "--stride 4: .* has 3 layers"),
    (["--bridge", "last", "--hidden-state", "4"], "--hidden-state 4: expected last, penultimate, or a number from 0 to 3"),
    (["--bridge", "dense", "--width", "16"], "--bridge dense: with the .* parameters that --bridge mot has"),
])  # fmt: skip
def test_nonsense_is_refused(flags, message, llm_folder, tmp_path):
    given = [
        "--llm",
        str(llm_folder("qwen2")),
        *TINY_RUN,
        "--width",
        "64",
        "--depth",
        "3",
        "--out",
        str(tmp_path / "run"),
        *flags,
    ]
    if "mirror" in flags:
        given = flags
    with pytest.raises(ValueError, match=message):
        train.prepare(*train.settings(given))
    assert not (tmp_path / "run").exists()


def test_families():
    """Of all families that draw, most can be mirrored; the others are refused in one line. MirrorTower.check asks gradients."""
    refused = {}
    for family in FAMILIES:
        if listed(family, REFUSED) or listed(family, NOT_BUILT):
            continue
        llm = FrozenLLM(tiny_model(family, **MORE.get(family, {})), Letters(), family)
        try:
            MirrorTower.beside(llm, patch=4, image_size=16)
        except ValueError as error:
            assert str(error).startswith("--expert mirror: ") and "\n" not in str(error)
            refused[family] = str(error)
        else:
            refused[family] = None
    mirrored = {family for family, error in refused.items() if error is None}
    print(*(error for error in refused.values() if error), sep="\n")
    assert len(mirrored) >= 80, sorted(mirrored)
    if transformers.__version__.startswith(LISTED_WITH):  # what README says
        assert len(mirrored) == 93
    assert {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "cohere2", "olmo2", "smollm3", "stablelm",
            "granite", "falcon", "gpt2", "gpt_neox", "phi"} <= mirrored  # fmt: skip
    for family, why in {"gpt_neo": "stays causal", "mpt": "padding changes the picture", "jamba": "in every layer"}.items():
        assert why in refused[family]
