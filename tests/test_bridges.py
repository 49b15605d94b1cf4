"""The mirrored tower: an image tower with the LLM's own architecture, reading the LLM's cache."""

import pytest
import torch
import transformers
from test_families import FAMILIES, LISTED_WITH, MORE, NOT_BUILT, REFUSED, Letters, listed, tiny_model

import train
from bridges import MirrorTower
from conftest import CPU, DECODERS, TINY_RUN
from model import FrozenLLM, fingerprint
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


@pytest.mark.parametrize("flags, message", [(["--width", "64"], "--width is not for --expert mirror"),
                                            (["--layers", "lower"], "--layers is not for --expert mirror")])  # fmt: skip
def test_flags_of_the_other_tower_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.parse_args(["--expert", "mirror", *flags])
    with pytest.raises(ValueError, match="--init is not for --expert tiny"):
        train.parse_args(["--init", "random"])


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
        assert len(mirrored) == 90
    assert {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "cohere2", "olmo2", "smollm3", "stablelm",
            "granite", "falcon", "gpt2", "gpt_neox", "phi"} <= mirrored  # fmt: skip
    for family, why in {"gpt_neo": "stays causal", "mpt": "padding changes the picture", "jamba": "in every layer"}.items():
        assert why in refused[family]
