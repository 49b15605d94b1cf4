"""Any LLM is understood by what it does; what the library makes up, and another LLM, are
refused."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import Letters, tiny_config

import assemble
import checkpoint
import loading
import train
from conftest import CPU, TINY_RUN, save_tiny_instruct_llm, save_tiny_llm
from extras.bridges import BridgeLLM
from extras.plan import read_llm
from extras.readers import Template, chat
from extras.thinking import Thinking
from flags import make_parser
from inspection import check_same_llm
from llm import FrozenLLM
from loading import broken_file, check_words, load_llm, user_cache
from model import ImageExpert

BIG = 3000.0  # activations of real LLMs: a few dimensions, the same for nearly all tokens


def hostile(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights that move every token, a few huge activations, and keys with large biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1, generator=generator)
        model.get_input_embeddings().weight[:, :3] += BIG
        for name, bias in model.named_parameters():
            if name.endswith(("k_proj.bias", "query_key_value.bias")):
                bias.normal_(std=150.0, generator=generator)  # Qwen2's own reach hundreds
    for weight in model.parameters():
        weight.data = weight.data.to(
            dtype
        )  # not model.to(dtype), which would round the frequencies
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, turning, pairs",
    [
        ("qwen2", [8] * 8, False),
        ("llama", [16] * 8, False),
        ("phi", [4] * 8, False),
        ("gpt_neox", [2] * 8, False),
        ("gptj", [8] * 8, True),
        ("cohere2", [16, 16, 16, 0] * 2, True),
        ("gemma3_text", [16] * 8, False),
        ("smollm3", [8, 8, 8, 0] * 2, False),
        ("deepseek_v3", [8] * 8, False),
        ("gpt_oss", [16] * 8, False),
        ("gpt2", [0] * 8, False),
        ("opt", [0] * 8, False),
        ("bloom", [0] * 2, False),
        ("mpt", [0] * 8, False),
    ],
)
def test_how_the_keys_of_hostile_models_turn(family, turning, pairs, dtype):
    """Partial rotary, pairs, two thetas, layers without positions, latent attention, attention
    sinks, learned positions and ALiBi. The law that is found undoes what 40 other positions do to
    the first token's keys."""
    config = tiny_config(transformers.CONFIG_MAPPING[family])
    model = hostile(
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), dtype
    )
    llm = FrozenLLM(model, Letters(), family)
    assert [2 * len(law.frequencies) for law in llm.rotary] == turning
    assert all(
        law.order[1] - law.order[0] == 1 + pairs for law in llm.rotary if len(law.frequencies) > 1
    )
    if not any(turning):
        return
    ids, places = torch.arange(3, 11).repeat(2, 1), torch.arange(8).expand(2, 8)

    def keys_at(positions):
        cache = llm.run(ids, position_ids=positions)
        as_they_are = torch.zeros(2)  # turned back by nothing
        return llm.unpack(llm.pack(cache, as_they_are), torch.tensor([8, 8])).keys

    here, moved = keys_at(places), keys_at(places + 40)
    for law, before, after in zip(llm.rotary, here, moved):
        back = law(after[:, :, :1].float(), torch.tensor([-40, -40]))
        error = (back - before[:, :, :1]).norm() / before[:, :, :1].norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.03), f"{error:.1e}"


def test_a_layer_that_turns_by_no_known_law_is_named():
    """Two of three layers are as they should be; the second doubles its angles, as no configuration
    says."""
    model = hostile(
        transformers.LlamaForCausalLM(tiny_config(transformers.LlamaConfig)), torch.float32
    )

    def doubled(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = (cos * cos - sin * sin, 2 * sin * cos)
        return args, kwargs

    model.model.layers[1].register_forward_pre_hook(doubled, with_kwargs=True)
    with pytest.raises(
        ValueError, match="keys of attention layer 1 neither stay nor turn by a known law"
    ):
        FrozenLLM(model, Letters(), "llama")


def test_a_model_that_ignores_positions_is_refused():
    """Its keys turn all the same: the text cannot be turned back, and an image would stand in the
    wrong place."""
    model = hostile(
        transformers.LlamaForCausalLM(tiny_config(transformers.LlamaConfig)), torch.float32
    )

    def ignore(module, args, kwargs):
        return args, {key: value for key, value in kwargs.items() if key != "position_ids"}

    model.model.register_forward_pre_hook(ignore, with_kwargs=True)
    with pytest.raises(ValueError, match="takes no position_ids"):
        FrozenLLM(model, Letters(), "llama")


@pytest.mark.parametrize("std", [0.02, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bert_of_small_weights_is_not_causal(std, dtype):
    """What a later token changes in an earlier one is small where the weights are; a causal model
    changes nothing."""
    config = tiny_config(transformers.BertConfig, initializer_range=std)
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    with pytest.raises(ValueError, match="is not causal"):
        FrozenLLM(model, Letters(), "bert")


# -------------------------------------------------------------------------------------------------
# keys with large biases


def saturated(expert, llm: FrozenLLM, captions: list[str]) -> float:
    """The share of image tokens and heads that give 0.99 of their weight to a single token, in the
    first block."""
    img, modulations, _ = expert.tokens_of(
        torch.randn(len(captions), 3, 16, 16), torch.full((len(captions),), 0.5)
    )
    context, block = llm.context(captions), expert.blocks[0]
    img_q, img_k, _ = block.project(img, modulations[0])
    joint_k = torch.cat([block.scale_keys(context.keys[0]), img_k], 2).repeat_interleave(
        block.heads // img_k.shape[1], 1
    )
    T = context.keys[0].shape[2]
    padding = (torch.arange(joint_k.shape[2]) >= context.lengths[:, None]) & (
        torch.arange(joint_k.shape[2]) < T
    )
    scores = img_q @ joint_k.transpose(-2, -1) * img_q.shape[-1] ** -0.5
    weights = scores.masked_fill(padding[:, None, None], float("-inf")).softmax(-1)
    return (weights.amax(-1) > 0.99).float().mean().item()


def test_shared_attention_does_not_saturate_beside_keys_with_large_biases(tmp_path):
    """Qwen2's kind, beside the same LLM without: the gains start from the keys' measured size, and
    are learned and saved."""
    captions = [
        "a red circle",
        "three small teal stars",
        "the heart is to the left of the gold ring",
    ]
    for large in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            save_tiny_llm("qwen2", tmp_path / str(large))
        )
        if large:
            torch.manual_seed(0)
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.data.normal_(std=80.0)
        model.save_pretrained(tmp_path / str(large))
        llm = load_llm(str(tmp_path / str(large)), CPU, torch.float32)
        torch.manual_seed(0)
        expert = ImageExpert.beside(llm, 32, 2, 4, "all", patch=4, image_size=16, patcher="linear")
        assert bool(expert.config["text_gains"]) == large
        expert.attach(llm)
        assert saturated(expert, llm, captions) == 0
        if large:
            for block in expert.blocks:
                block.txt_gain.data /= block.start_gain  # the keys as they are
            assert saturated(expert, llm, captions) > 0.3
    flags = [
        "--llm",
        str(tmp_path / "True"),
        "--out",
        str(tmp_path / "run"),
        *TINY_RUN,
        "--layers",
        "all",
        "--steps",
        "4",
    ]
    train.main(flags)
    trained = checkpoint.load_expert(str(tmp_path / "run"), CPU)
    assert trained.config["text_gains"] == expert.config["text_gains"]
    assert not torch.equal(trained.blocks[0].txt_gain, torch.ones(2)), "it learns"


# -------------------------------------------------------------------------------------------------
# what the library would make up


def damaged(kind: str, folder: Path) -> str:
    """A tiny LLM's folder, hurt; -> what is said of it."""
    save_tiny_llm("qwen2", folder)
    weights = load_file(folder / "model.safetensors")
    if kind == "a layer is missing":
        weights = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    if kind == "nan":
        weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    if kind == "inf in one embedding":
        weights["model.embed_tokens.weight"][77, 3] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "another shape":
        change_config(folder, intermediate_size=64)
    if kind == "a git-lfs pointer":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    if kind == "half a file":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if kind == "half a configuration":
        (folder / "tokenizer_config.json").write_text("{")
    if kind == "an unknown kind of positions":
        change_config(folder, rope_scaling={"type": "unknown", "factor": 2.0})
    if kind == "an adapter alone":
        (folder / "config.json").rename(folder / "adapter_config.json")
    if kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    if kind == "a tokenizer of another format":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    if kind == "an adapter beside it":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    if kind == "more tokens than embeddings":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<extra{i}>" for i in range(60)] + ["circle"])
        tokenizer.save_pretrained(folder)
    return {
        "a layer is missing": "12 of its weights are missing, model.layers.1.",
        "nan": "its weight model.layers.1.mlp.down_proj.weight is not finite",
        "inf in one embedding": "its weight model.embed_tokens.weight is not finite",
        "another shape": "its weight .*mlp.* has the shape [(].*, and its config.json means [(]",
        "a git-lfs pointer": "model.safetensors is a git-lfs pointer .*: run git lfs pull there",
        "half a file": "model.safetensors is cut or damaged: fetch it again",
        "half a configuration": "tokenizer_config.json is cut or damaged",
        "an unknown kind of positions": "does not load: KeyError: 'unknown'",
        "an adapter alone": "has no config.json; expected a whole model",
        "no tokenizer": "reads every text alike|does not load",
        "a tokenizer of another format": "tokenizer.json is a git-lfs pointer",
        "an adapter beside it": "an adapter .* lies beside the model",
        "more tokens than embeddings": "has the token '<extra.*' as number 30., and the model "
        "embeddings of 300",
    }[kind]


DAMAGES = (
    "a layer is missing",
    "another shape",
    "nan",
    "inf in one embedding",
    "a git-lfs pointer",
    "half a file",
    "half a configuration",
    "an unknown kind of positions",
    "no tokenizer",
    "an adapter alone",
    "an adapter beside it",
    "a tokenizer of another format",
    "more tokens than embeddings",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_not_whole_is_refused(kind, tmp_path):
    message = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=f"^--llm {tmp_path}") as error:
        load_llm(str(tmp_path), CPU, torch.float32)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        load_llm(str(tmp_path), CPU, torch.float32)


def test_a_folder_beside_the_files_is_not_blamed(tmp_path):
    """A clone has .git, a download .cache; a link that leads nowhere is no folder."""
    save_tiny_llm("qwen2", tmp_path)
    for name in (".git", ".cache", "old.json"):
        (tmp_path / name).mkdir()
    assert broken_file(tmp_path) == ""
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=": model.safetensors is cut or damaged"):
        load_llm(str(tmp_path), CPU, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    try:
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    except OSError:
        pytest.skip("Windows lets not everybody make links")
    assert broken_file(tmp_path).startswith("model.safetensors is cut or damaged")


def test_what_is_left_out_of_a_model_is_said(tmp_path):
    """A config.json of fewer layers than the weights have, or scales of a quantization that it does
    not name."""
    folder = save_tiny_llm("qwen2", tmp_path)
    change_config(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.warns(
        UserWarning, match="12 weights in the LLM's files are not used, model.layers.2."
    ):
        load_llm(str(folder), CPU, torch.float32)


def test_what_is_no_model_is_named_so(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="it is a file; expected the model's folder"):
        load_llm(str(tmp_path / "model.safetensors"), CPU, torch.float32)
    for name in (str(tmp_path / "nowhere"), r"C:\llm", "https://huggingface.co/a/b", "a:8b"):
        with pytest.raises(
            ValueError, match="no such file or folder, and no name that a model on the Hub"
        ):
            load_llm(name, CPU, torch.float32)


@pytest.mark.parametrize("kind", ["garbage", "empty", "half", "objects"])
def test_pickled_weights_that_do_not_load_are_refused(kind, tmp_path):
    import argparse

    save_tiny_llm("qwen2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(
        {"a": argparse.Namespace(x=1)} if kind == "objects" else {"a": torch.zeros(1000)}, path
    )
    if kind != "objects":
        whole = path.read_bytes()
        path.write_bytes(
            {"garbage": b"version https://git-lfs", "empty": b"", "half": whole[: len(whole) // 2]}[
                kind
            ]
        )
    with pytest.raises(ValueError, match="--llm .* does not load") as error:
        load_llm(str(tmp_path), CPU, torch.float32)
    assert "\n" not in str(error.value)


def test_an_llm_without_its_head_draws_and_does_not_write(tmp_path, tiny_run):
    """As embedding LLMs are published: its keys are whole, and it is the same at each load."""
    save_tiny_llm("qwen2", tmp_path / "llm")
    body = transformers.AutoModel.from_pretrained(tmp_path / "llm")
    body.save_pretrained(tmp_path / "body")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "llm").save_pretrained(tmp_path / "body")
    train.main([*tiny_run, "--llm", str(tmp_path / "body"), "--steps", "1"])
    expert = checkpoint.load_expert(str(tmp_path / "run"), CPU)
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    whole = load_llm(str(tmp_path / "llm"), CPU, torch.float32)
    whole.keep(expert.reads)
    assert torch.equal(
        llm.context(["a red circle"]).keys[1], whole.context(["a red circle"]).keys[1]
    )
    with pytest.raises(ValueError, match="saved without its language-model head"):
        Thinking(llm, "{}")


# -------------------------------------------------------------------------------------------------
# another LLM


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_the_same_weights_under_another_config_or_tokenizer_are_another_llm(tmp_path, tiny_run):
    """rope theta and eps are in no weight; a tokenizer with two words exchanged reads other
    captions."""
    first = save_tiny_llm("qwen2", tmp_path / "llm")
    train.main([*tiny_run, "--llm", str(first), "--steps", "1"])
    expert = checkpoint.load_expert(str(tmp_path / "run"), CPU)
    changes = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
        "rms_norm_eps": 0.001,
    }
    for key, value in changes.items():
        other = shutil.copytree(first, tmp_path / key)
        change_config(other, **{key: value})
        with pytest.raises(ValueError, match=f"whose configuration had {key}"):
            assemble.llm_of(expert, str(other), CPU, torch.float32)
    other = shutil.copytree(first, tmp_path / "words")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the same weights and another tokenizer"):
        assemble.llm_of(expert, str(other), CPU, torch.float32)
    other = shutil.copytree(first, tmp_path / "unchanged")
    change_config(
        other, transformers_version="4.0", use_cache=False, architectures=["Qwen2ForCausalLM"]
    )
    assert assemble.llm_of(expert, str(other), CPU, torch.float32).name == str(other)


def test_an_older_checkpoint_is_compared_by_its_weights():
    now = {
        "llm": "b",
        "llm_fingerprint": "1",
        "llm_config": {"rope_theta": 5},
        "llm_tokenizer": "x",
    }
    check_same_llm({"llm": "a", "llm_fingerprint": "1"}, now)
    with pytest.raises(ValueError, match="was trained with a .* not with b"):
        check_same_llm({"llm": "a", "llm_fingerprint": "2"}, now)


# -------------------------------------------------------------------------------------------------
# what does not go together


def test_a_caption_with_a_text_after_it_has_no_end_before_that(tmp_path):
    """Tokenizers of embedding LLMs close every text with a token, which says that nothing
    follows."""
    folder = save_tiny_llm("qwen2", tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    closing = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.post_processor = closing
    tokenizer.save(str(folder / "tokenizer.json"))
    llm = load_llm(str(folder), CPU, torch.float32)
    assert llm.tokenize("red")[-1] == 1, "as it was trained"
    llm.reader = Template(llm, "say {} now", "after")
    assert 1 not in llm.read("red").ids[: -len(llm.reader.after)]


def test_a_template_longer_than_the_llm_takes(tiny_llm):
    llm = tiny_llm("gpt2", frozen=BridgeLLM.for_model)  # 63 tokens
    with pytest.raises(
        ValueError, match="leaves no room for a caption; expected a shorter --template"
    ):
        Template(llm, "please draw " * 20 + "{}")
    llm.reader = Template(llm, "please draw {} " + "now " * 3)
    with pytest.raises(ValueError, match="of which 60 stay free"):
        llm.keep([0], room=60)


def test_the_dense_bridge_hears_captions_under_any_template(tiny_llm):
    """Its own embedding of what stands after the caption would be the same for all captions."""
    llm = tiny_llm("qwen2", frozen=BridgeLLM.for_model)
    llm.keep([], tokens=True)
    llm.reader = Template(llm, '"{}" in English: "', "after")
    one, other = (llm.context([caption]).tokens for caption in ("a red circle", "two blue squares"))
    assert one.shape != other.shape or not torch.equal(one, other)
    assert llm.context(["a red circle"]).lengths.item() == len(llm.read("a red circle").ids)
    with pytest.raises(ValueError, match="--bridge dense hears nothing of it"):
        Thinking(llm, "{} =>")


def test_a_broken_chat_template_is_one_line(tmp_path):
    llm = load_llm(str(save_tiny_instruct_llm(tmp_path)), CPU, torch.float32)
    for broken in (
        "{{ raise_exception('no system') }}",
        "{% for %}",
        "{{ messages[5].content.x }}",
    ):
        llm.tokenizer.chat_template = broken
        with pytest.raises(ValueError, match="the chat template of .* fails"):
            chat(llm, "{}")


def test_one_long_prompt_costs_its_own_tokens(tmp_path):
    """Short captions are read 32 at a time, always in the same shape; a long one is not read 32
    times."""
    folder = save_tiny_llm("qwen2", tmp_path)
    change_config(folder, max_position_embeddings=8192)
    llm, seen = load_llm(str(folder), CPU, torch.float32), []
    llm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    llm.lookup(["a red circle " * 400, "a star"])
    length = len(llm.tokenize("a red circle " * 400))
    assert [shape for shape in seen if shape[1] > 1000] == [(1, -(-length // 4) * 4)]
    assert [shape[0] for shape in seen if shape[1] < 100] == [32]


def test_no_home(monkeypatch, tmp_path):
    """A container with a user that the system does not know: with a place for caches named, or
    without."""

    def unknown(kind):
        raise RuntimeError("Could not determine home directory.")  # what pathlib raises then

    monkeypatch.setattr(Path, "home", classmethod(unknown))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache().is_dir()


def test_a_tokenizer_of_single_letters_is_refused(llm_folder):
    """What transformers 5.17 makes of gemma's file; a tokenizer that knows the words is not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm_folder("llama"))
    check_words(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    without = tokenizers.Tokenizer.from_str(json.dumps(state))
    letters = transformers.PreTrainedTokenizerFast(tokenizer_object=without)
    with pytest.raises(ValueError, match="of single letters.*requirements.txt"):
        check_words(letters)


def test_a_gguf_header_is_read_once(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = str(tmp_path / "header.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = gguf.GGUFReader
    with loading.header_read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
    assert gguf.GGUFReader is own


def test_a_hub_model_that_is_here_in_part_is_asked_for(monkeypatch, llm_folder, tmp_path):
    """As Ctrl-C leaves it between weights and tokenizer: what is missing is fetched, and where the
    Hub cannot be reached, the line says what was missing."""
    snapshot = tmp_path / "models--a--tiny" / "snapshots" / ("0" * 40)
    tokenizer = shutil.ignore_patterns("tokenizer*", "special_tokens*", "vocab*", "merges*")
    shutil.copytree(llm_folder("qwen2"), snapshot, ignore=tokenizer)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []

    def no_hub(name):
        asked.append(name)
        return "it cannot be reached"

    def hub(name):
        asked.append(name)
        shutil.copytree(llm_folder("qwen2"), snapshot, dirs_exist_ok=True)

    monkeypatch.setattr("loading.ask_hub", no_hub)
    plan = make_parser().parse_args(["--llm", "a/tiny"])
    with pytest.raises(ValueError, match="--llm a/tiny does not load: its tokenizer"):
        load_llm("a/tiny", CPU, torch.float32)
    with pytest.raises(ValueError, match="--llm a/tiny does not load: its tokenizer"):
        read_llm(plan, torch.bfloat16)
    monkeypatch.setattr("loading.ask_hub", hub)
    assert load_llm("a/tiny", CPU, torch.float32).revision == "0" * 40
    assert asked == ["a/tiny"] * 3
    assert read_llm(plan, torch.bfloat16).layers and len(asked) == 3
