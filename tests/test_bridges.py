"""The mirrored tower, an image tower with the LLM's own architecture; and the other bridges between
an LLM and an expert."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import train
from assemble import llm_of
from checkpoint import load_expert
from cli import colon_form
from conftest import CPU, DECODERS, TINY_RUN
from extras.bridge_llm import BridgeLLM, FrozenEncoder, any_class
from extras.bridges import BRIDGES, OPTIONS, build, count_parameters, llm_options
from extras.checkpointing import checkpoint_layers
from extras.mirror import MirrorTower
from extras.readers import with_reading
from extras.thinking import Thinking
from flags import RECIPES
from inspection import fingerprint
from llm import FrozenLLM
from loading import load_llm
from model import ImageExpert
from sample import draw
from weights import read_safetensors

CAPTIONS = ["a red circle", "the heart is to the left of the gold ring", ""]


def beside(llm, **options) -> MirrorTower:
    """A mirrored tower whose head says something (a new one is silent)."""
    tower = MirrorTower.beside(llm, patch=4, image_size=16, **options)
    torch.nn.init.normal_(tower.patcher.last.weight, std=0.1)
    return tower


@pytest.mark.parametrize("kind", DECODERS)
def test_a_copy_of_the_llm_reads_on_as_the_llm_does(kind, tiny_llm):
    """With the LLM's weights, and a word in place of a picture: the hidden state is what the LLM
    has after that word."""
    llm = tiny_llm(kind)
    tower = beside(llm)
    word = 17
    img = llm.model.get_input_embeddings()(torch.tensor([[word]] * len(CAPTIONS)))
    with torch.no_grad():
        ours = tower.decode(img, llm.context(CAPTIONS))
        for caption, state in zip(CAPTIONS, ours):
            ids = torch.tensor([[*llm.tokenize(caption), word]])
            theirs = llm.model.base_model(input_ids=ids).last_hidden_state[0, -1]
            difference = (state[0] - theirs).abs().max()
            assert difference < 1e-4, f"{caption!r}: {difference:.2e}"


@pytest.mark.parametrize("kind", DECODERS)
def test_batch_equals_one_by_one(kind, tiny_llm):
    llm = tiny_llm(kind)
    tower = beside(llm, init="random")
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            difference = (alone[0] - together[i]).abs().max()
            assert difference < 1e-4, f"{difference:.2e}"
        others = tower(x, t, llm.context(CAPTIONS[::-1]))
        assert (others - together).abs().max() > 1e-3, "the caption reaches the picture"


def test_checkpointing_changes_no_gradient(tiny_llm):
    llm = tiny_llm("qwen2")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = beside(llm)
        if checkpointing:
            checkpoint_layers(tower)
        ran = []
        tower.blocks[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        tower.blocks[0].self_attn.register_forward_pre_hook(lambda *_, ran=ran: ran.append(2))
        x, t = torch.ones(2, 3, 16, 16), torch.tensor([0.2, 0.7])
        tower(x, t, llm.context(CAPTIONS[:2])).square().mean().backward()
        expected = [1, 2, 2] if checkpointing else [1, 2]
        assert ran == expected, "a checkpointed layer computes its inside once more"
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"no gradient reaches {name}"
        assert (gradients[1][name] - gradient).abs().max() < 1e-6, name


MIRROR = "--device cpu --dtype float32 --batch-size 8 --image-size 16 --patch 4 --bridge mirror"


def take_steps(run: train.Run, n: int) -> None:
    batches = train.Batches(run.source, run.llm, 8, run.args.draws, run.step)
    for _, (captions, pictures) in zip(range(n), batches):
        train.train_step(run, run.expert, captions, pictures)


def check_what_is_optimized(run: train.Run) -> None:
    """The optimizers' set equals the trainable set, which is the whole expert."""
    optimized = []
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            optimized += [id(p) for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in run.expert.parameters())
    assert all(p.requires_grad for p in run.expert.parameters())
    assert not any(p.requires_grad for p in run.llm.model.parameters())


def test_training_resumes_and_the_llm_stays(llm_folder, tmp_path):
    """--bridge mirror through the command: trained are its own weights alone, and killed and
    resumed gives the same ones."""
    flags = ["--llm", str(llm_folder("llama")), *MIRROR.split()]
    flags += ["--steps", "4", "--save-every", "2", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    run = train.prepare(*train.settings([*flags, str(tmp_path / "halves")]))
    assert isinstance(run.expert, MirrorTower) and run.args.lr == RECIPES["mirror"]["lr"]
    before = fingerprint(run.llm.model)
    check_what_is_optimized(run)
    tables = [p for p in run.expert.parameters() if p.shape[0] == 300]
    assert not tables, "no table of words: 300 is the vocabulary"
    take_steps(run, 2)
    checkpoint.save_run(run)
    assert fingerprint(run.llm.model) == before
    train.main(["--resume", "--out", str(tmp_path / "halves")])
    whole = load_expert(str(tmp_path / "whole"), CPU)
    halves = load_expert(str(tmp_path / "halves"), CPU)
    assert isinstance(whole, MirrorTower) and whole.config == halves.config
    pairs = zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    theirs = run.llm.model.base_model.layers[0].mlp.up_proj.weight
    assert not torch.equal(whole.blocks[0].mlp.up_proj.weight, theirs)
    llm = llm_of(whole, None, CPU, torch.float32)
    pictures = draw(whole, llm, ["a red circle"], [0], steps=2)
    assert pictures.shape == (1, 16, 16, 3)


def test_a_run_of_when_checkpointing_was_the_mirrors_goes_on(llm_folder, tmp_path):
    """Then it was an option of --bridge, and stood in the tower's configuration."""
    flags = ["--llm", str(llm_folder("llama")), *MIRROR.split(), "--out", str(tmp_path / "run")]
    run = train.prepare(*train.settings([*flags, "--steps", "2"]))
    take_steps(run, 1)
    checkpoint.save_run(run)
    state = tmp_path / "run" / checkpoint.STATE
    metadata, tensors = read_safetensors(state)
    args = json.loads(metadata["args"]) | {"bridge": "mirror:init=random:checkpointing"}
    for later in ("checkpointing", "accumulate", "plan"):
        del args[later]
    config = json.loads(metadata["config"]) | {"checkpointing": True}
    metadata |= {"args": json.dumps(args), "config": json.dumps(config)}
    save_file(tensors, state, metadata=metadata)
    again = train.prepare(*train.settings(["--resume", "--out", str(tmp_path / "run")]))
    assert again.step == 1 and again.args.bridge == "mirror:init=random"
    assert again.args.checkpointing and "checkpointing" not in again.expert.config
    assert "forward" in again.expert.blocks[0].__dict__, "the layers are checkpointed"
    assert again.args.accumulate == 1
    take_steps(again, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bridge", "mirror:checkpointing"], "--bridge mirror:checkpointing is now --checkp"),
        (["--bridge", "mirror", "--width", "64"], "--width is not for --bridge mirror"),
        (["--bridge", "mirror", "--layers", "lower"], "--layers is not for --bridge mirror"),
    ],
)
def test_flags_of_the_other_towers_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_args(flags)


# -------------------------------------------------------------------------------------------------
# the other bridges

SIZE = {"width": 64, "depth": 6, "patch": 4, "image_size": 16}
FLAGS = [*TINY_RUN, "--width", "64", "--depth", "6", "--bridge"]
OURS = [name for name in BRIDGES if name != "mirror"]  # with blocks of our own, of any size


def built(spec: str, llm: FrozenLLM, **options):
    name, own = colon_form(spec, OPTIONS, "--bridge")
    if name == "metaqueries":
        own.setdefault("queries", "8")
    return build(name, own, llm, **SIZE | options)


def bridge(spec: str, llm: FrozenLLM, **options) -> ImageExpert:
    """A bridge whose every weight is random (a new one answers 0: its head and gates start at
    zero)."""
    tower = built(spec, llm, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tower.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    tower.attach(llm)
    return tower


CASES = [(name, "deep") for name in OURS]
CASES += [("kv", "gpt2"), ("metaqueries", "gpt2"), ("metaqueries", "gemma3")]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_bridge_hears_its_caption_and_no_other(name, kind, tiny_llm):
    """Batch = one by one, whatever the padding and with no text at all; and another caption gives
    another picture."""
    llm = tiny_llm(kind, frozen=BridgeLLM)
    tower = bridge(name, llm, depth=len(llm.layers))
    x = torch.randn(3, 3, 16, 16)
    t = torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            difference = (alone[0] - together[i]).abs().max()
            assert difference < 1e-4, f"{difference:.2e}"

        # as for guidance: in one batch with the empty prompt
        both = llm.context(CAPTIONS).concat(llm.context([""] * 3))
        guided = tower(torch.cat([x, x]), torch.cat([t, t]), both)
        assert (guided[:3] - together).abs().max() < 1e-4
        again = tower(torch.cat([x, x]), torch.cat([t, t]), both)
        assert torch.equal(again, guided), "the text that was kept from the step before"
        empty = tower(x, t, llm.context([""] * 3))
        assert (guided[3:] - empty).abs().max() < 1e-4

        others = tower(x, t, llm.context(CAPTIONS[::-1]))
        assert (others[::2] - together[::2]).abs().max() > 1e-3
        rows = [0, 0, 1]
        twice = tower(x[rows], t[rows], llm.context([CAPTIONS[i] for i in rows]))
        assert (twice - together[rows]).abs().max() < 1e-4, "a caption that comes twice"


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_what_trains_and_what_is_frozen(name, llm_folder, tmp_path):
    """Through the command: every parameter of the bridge gets a gradient, the LLM's bytes stay, the
    file draws the same."""
    spec = "metaqueries:queries=8" if name == "metaqueries" else name
    flags = ["--llm", str(llm_folder("deep")), *FLAGS, spec, "--out", str(tmp_path / "run")]
    run = train.prepare(*train.settings([*flags, "--steps", "3"]))
    mot = built("mot", run.llm)
    assert abs(count_parameters(run.expert) / count_parameters(mot) - 1) < 0.05
    before = fingerprint(run.llm.model)
    start = copy.deepcopy(run.expert.state_dict())
    check_what_is_optimized(run)
    take_steps(run, 3)
    still = [key for key, value in run.expert.named_parameters() if torch.equal(value, start[key])]
    assert not still, f"these did not move: {still}"
    assert fingerprint(run.llm.model) == before
    assert not any(p.requires_grad for p in run.llm.model.parameters())
    checkpoint.save_run(run)
    loaded = load_expert(str(tmp_path / "run"), CPU)
    assert type(loaded) is BRIDGES[name] and loaded.config == run.expert.config
    llm = llm_of(loaded, None, CPU, torch.float32)
    pictures = draw(loaded, llm, ["a red circle"], [0], steps=2)
    assert (pictures == draw(run.ema, run.llm, ["a red circle"], [0], steps=2)).all()


def test_hidden_states_are_standardized_over_real_tokens_alone(tiny_llm):
    llm = tiny_llm("deep", frozen=BridgeLLM)
    tower = bridge("lap", llm)
    tower.measure(llm, CAPTIONS)
    context = llm.context(CAPTIONS)
    valid = torch.arange(context.hidden_states[0].shape[1]) < context.lengths[:, None]
    for x in tower.standardized(context):
        # 1 but for the small number that keeps a still dimension from being blown up
        deviation = x[valid].std(0)
        assert x[valid].mean(0).abs().max() < 1e-4
        assert deviation.max() <= 1 and deviation.mean() > 0.9
    built_with_captions = built("lap", llm, captions=CAPTIONS)
    assert torch.equal(built_with_captions.mean, tower.mean)


def test_what_the_text_takes_is_done_once_for_a_drawing(tiny_llm, monkeypatch):
    llm = tiny_llm("deep", frozen=BridgeLLM)
    tower = bridge("lap", llm)
    calls = []
    make_text = tower.make_text

    def watch(context):
        calls.append(len(context.lengths))
        return make_text(context)

    monkeypatch.setattr(tower, "make_text", watch)
    always = (0.0, 1.0)  # guidance in every step
    draw(tower, llm, ["a red circle", "a red circle", "two"], [0, 1, 2], 5, interval=always)
    assert calls == [3], "the distinct captions, and the empty prompt of guidance"


def test_no_tower_reads_the_text_of_another(tiny_llm):
    """Nor its own of before, when its weights were others: what is kept is of one drawing."""
    llm = tiny_llm("deep", frozen=BridgeLLM)
    one = bridge("lap", llm)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    x = torch.randn(3, 3, 16, 16)
    t = torch.rand(3) * 0.9
    context = llm.context(CAPTIONS)
    with torch.no_grad():
        one(x, t, context)
        assert torch.equal(other(x, t, context), other(x, t, llm.context(CAPTIONS)))
    trained_on = llm.context(CAPTIONS)
    one(x, t, trained_on)
    assert trained_on.text is None, "a training step keeps none"


def test_options_of_the_bridges(tiny_llm):
    llm = tiny_llm("deep", frozen=BridgeLLM)  # six layers
    assert built("last", llm).states == [6]
    assert built("last:state=penultimate", llm).states == [5]
    assert built("last:state=1", llm).states == [1]
    assert built("hsi", llm).states == [0, 1, 2, 4, 5, 6]
    assert built("lap:stride=4", llm).states == [0, 4]
    assert len(built("lap:no-refiner", llm).refine.blocks) == 0
    assert len(built("metaqueries:queries=5", llm).queries) == 5
    kv = built("kv", llm)
    assert (len(kv.blocks), kv.blocks[0].heads) == (6, 4)
    kv.attach(llm)
    assert llm.turned is False
    like, mot = built("kv:as-mot", llm), built("mot", llm)
    shape = {name: value for name, value in mot.config.items() if name != "intermediate"}
    assert {name: like.config[name] for name in shape} == shape
    assert like.qk_norm is False and mot.qk_norm is True
    per_layer = bridge("lap:per-layer:no-refiner:stride=6", llm)
    assert len(per_layer.pools) == 6
    context = llm.context(CAPTIONS)
    text = per_layer.text_of(context)
    assert text.shape == (3, context.hidden_states[0].shape[1], 6 * 64)
    first = torch.tensor([llm.tokenize(caption)[0] for caption in CAPTIONS[:2]])
    embedded = llm.model.get_input_embeddings()(first)
    assert torch.equal(context.hidden_states[0][:2, 0], embedded)
    random = MirrorTower.beside(llm, init="random", patch=4, image_size=16)
    torch.manual_seed(0)
    assert build("mirror", {"init": "random"}, llm, **SIZE).config == random.config


def test_keys_of_key_value_fusion_are_as_the_llm_left_them(tiny_llm):
    llm = tiny_llm("llama", frozen=BridgeLLM)
    built("kv", llm, depth=3).attach(llm)
    ids = torch.tensor([llm.tokenize(CAPTIONS[0])])
    theirs = llm.model(input_ids=ids, use_cache=True).past_key_values.layers[1].keys
    ours = llm.context(CAPTIONS[:1]).keys[1][:, :, : ids.shape[1]]
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_in_the_place_of_the_llm(kind, llm_folder, tmp_path):
    """--bridge last and lap read T5 and BERT; batch = one by one, though these see their padding
    unless told not to."""
    flags = ["--llm", str(llm_folder(kind)), *FLAGS, "lap:stride=2", "--steps", "2"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    tower = load_expert(str(tmp_path / "run"), CPU)
    llm = llm_of(tower, None, CPU, torch.float32)
    assert isinstance(llm, FrozenEncoder)
    tower = bridge("last", llm)
    x = torch.randn(3, 3, 16, 16)
    t = torch.rand(3) * 0.9
    with torch.no_grad():
        together = tower(x, t, llm.context(CAPTIONS))
        for i, caption in enumerate(CAPTIONS):
            alone = tower(x[i : i + 1], t[i : i + 1], llm.context([caption]))
            assert (alone[0] - together[i]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="--bridge kv needs keys and values"):
        built("kv", llm)
    with pytest.raises(ValueError, match="is an encoder and writes nothing"):
        Thinking(llm, "{}")


def test_a_decoder_stays_a_decoder_where_an_encoder_would_do(llm_folder):
    """And an encoder is refused where keys and values are needed."""
    options = llm_options("lap:stride=1")
    assert options["auto_class"] is any_class
    llm = load_llm(str(llm_folder("llama")), CPU, torch.float32, **options)
    assert type(llm) is BridgeLLM and len(llm.layers) == 3
    for spec in ("kv", "metaqueries", "mirror"):
        with pytest.raises(ValueError, match="keeps no key-value cache|is not causal"):
            load_llm(str(llm_folder("bert")), CPU, torch.float32, **llm_options(spec))


def test_the_dense_bridge_hears_nothing_of_what_is_written(tiny_llm):
    """Refused in whichever order the two are asked for."""
    message = "--read think is for what the LLM reads, and --bridge dense hears nothing of it"
    llm = tiny_llm("qwen2", frozen=BridgeLLM)
    tower = built("dense", llm, width=96, depth=3)
    llm.reader = Thinking(llm, "{} =>")
    with pytest.raises(ValueError, match=message):
        tower.attach(llm)
    llm.reader = None
    tower.attach(llm)
    with pytest.raises(ValueError, match=message):
        with_reading(llm, "think:4")


MOT_HAS_TOO_FEW = "--bridge dense: with the .* parameters that --bridge mot has"
NONSENSE = [
    (["--bridge", "lap", "--layers", "upper"], "--layers is not for --bridge lap"),
    (["--bridge", "mot:stride=2"], "mot has no option 'stride'"),
    (["--bridge", "last:init=random"], "last has no option 'init'"),
    (["--bridge", "lap:queries=8"], "lap has no option 'queries'"),
    (["--bridge", "lop"], "--bridge lop: expected one of mot, dense"),
    (["--bridge", "lap:stride=4"], "--bridge lap:stride=4: .* has 3 layers"),
    (["--bridge", "lap:stride=0"], "--bridge lap:stride=0: expected a whole number above zero"),
    (["--bridge", "lap:no-refiner=1"], "expected no-refiner without a value"),
    (
        ["--bridge", "last:state=4"],
        "--bridge last:state=4: expected last, penultimate, or a number from 0 to 3",
    ),
    (["--bridge", "dense", "--width", "16"], MOT_HAS_TOO_FEW),
    (["--bridge", "metaqueries:queries=40"], "40 of them are too many for an LLM of 63 tokens"),
]


@pytest.mark.parametrize("flags, message", NONSENSE)
def test_nonsense_is_refused(flags, message, llm_folder, tmp_path):
    size = ["--width", "64", "--depth", "3", "--out", str(tmp_path / "run")]
    given = ["--llm", str(llm_folder("qwen2")), *TINY_RUN, *size, *flags]
    with pytest.raises(ValueError, match=message):
        train.prepare(*train.settings(given))
    assert not (tmp_path / "run").exists()


def test_nonsense_about_the_mirror_is_refused(llm_folder, tmp_path):
    flags = ["--llm", str(llm_folder("qwen2")), *MIRROR.split(), "--out", str(tmp_path / "run")]
    flags[flags.index("mirror")] = "mirror:init=copy"
    with pytest.raises(ValueError, match="--bridge mirror:init=copy: expected llm or random"):
        train.prepare(*train.settings(flags))
