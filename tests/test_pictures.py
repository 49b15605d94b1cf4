"""A vision-language model as the LLM: tiny random ones with their own processors, saved as Hugging Face folders."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

import sample
from conftest import CPU, SMALL, random_expert, save_tiny_llm
from model import FrozenLLM, load_llm, with_cache

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
TEXT = SMALL | {"vocab_size": 320, "max_position_embeddings": 96}
RED, BLUE = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))


def save_tiny_vlm(kind: str, folder) -> None:
    """ "llava", "gemma3" or "qwen2_vl", with four tokens for each picture of 28 x 28."""
    tokens = {"llava": {"image_token": "<image>"},
              "gemma3": {"image_token": "<soft>", "boi_token": "<picture>", "eoi_token": "</picture>"}}[kind]  # fmt: skip
    text = save_tiny_llm({"llava": "llama"}.get(kind, kind), folder / "text")
    tokenizer = AutoTokenizer.from_pretrained(text, extra_special_tokens=tokens)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    if kind == "llava":
        vision, language = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
        config = transformers.LlavaConfig(vision_config=vision, text_config=language, image_token_index=ids["image_token"])
        pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = transformers.LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    else:
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        vision = transformers.SiglipVisionConfig(**VISION)
        language = transformers.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=32, layer_types=layers)
        indices = {name.replace("token", "token_index"): index for name, index in ids.items()}
        config = transformers.Gemma3Config(vision_config=vision, text_config=language, mm_tokens_per_image=4, **indices)
        pictures = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        processor = transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session", params=["llava", "gemma3"])
def vlm_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_vlm(request.param, folder)
    return folder


def test_a_picture_is_more_entries_in_the_cache(vlm_folder):
    """What the model itself keeps of picture and prompt, turned back by their length; another picture is another context."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    plain, empty = llm.lookup(["a red circle"])["a red circle"], llm.lookup([""])[""]
    llm.look(RED)
    seen = llm.lookup(["a red circle"])["a red circle"]
    placeholder = getattr(llm.processor, "boi_token", None) or llm.processor.image_token
    inputs = llm.processor(text=[placeholder + "a red circle"], images=[RED], return_tensors="pt")
    with torch.no_grad():
        llm.model(**inputs, **with_cache(llm.model, cache := transformers.DynamicCache()))
    assert len(seen) == inputs["input_ids"].shape[1] >= len(plain) + 4
    whole = llm._pack(cache, torch.tensor([len(seen)]))[0]
    assert (whole - seen).abs().max() < 1e-5, f"{(whole - seen).abs().max():.2e}"
    assert torch.equal(llm.lookup([""])[""], empty), "the empty prompt of guidance has no picture"
    llm.look(BLUE)
    assert (llm.lookup(["a red circle"])["a red circle"] - seen).abs().max() > 1e-3
    llm.look(None)
    assert torch.equal(llm.lookup(["a red circle"])["a red circle"], plain)


def test_a_picture_neither_drops_the_thinking_nor_is_dropped(vlm_folder):
    """A checkpoint that was trained on what the LLM writes brings its thinking along: --image is refused, not ignored."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    llm.think("{} =>")
    with pytest.raises(ValueError, match="--image does not go with --think, --rewrite, or a checkpoint"):
        llm.look(RED)
    llm.think(None)
    llm.look(None)
    llm.look(RED)
    with pytest.raises(ValueError, match="--image does not go with"):
        llm.think("{} =>")


def test_a_chat_template_says_where_the_picture_stands(vlm_folder):
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    llm.look(RED)
    bare = llm.lookup(["a red circle"])["a red circle"]
    token = getattr(llm.processor, "boi_token", None) or llm.processor.image_token
    llm.processor.chat_template = (
        "User: {% for part in messages[0].content %}{% if part.type == 'image' %}[" + token + "]{% else %}{{ part.text }}"
        "{% endif %}{% endfor %} End"
    )
    llm.look(RED)
    framed = llm.lookup(["a red circle"])["a red circle"]
    assert len(framed) == len(bare) + 2, "the brackets around the picture, and nothing else of the template"


def test_drawing_after_a_picture(vlm_folder, tmp_path, monkeypatch, capsys):
    """sample.py --image, through the command, with an expert of this VLM."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    expert = random_expert(llm, made_for={"llm": str(vlm_folder), "llm_fingerprint": llm.fingerprint, "data": "shapes"})
    expert.save_pretrained(tmp_path / "run")
    drawn = []
    for name, picture in (("red", RED), ("blue", BLUE)):
        picture.save(tmp_path / f"{name}.png")
        monkeypatch.setattr("sys.argv", ["sample.py", "--ckpt", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32",
                                         "--prompt", "a star", "--image", str(tmp_path / f"{name}.png"), "--steps", "2",
                                         "--out", str(tmp_path / name)])  # fmt: skip
        sample.main()
        drawn.append(np.asarray(Image.open(tmp_path / name / "000-a-star-seed0.png")).astype(int))
    assert abs(drawn[0] - drawn[1]).max() > 0, "the picture before the prompt reaches the picture after it"


class PicturesOnly(transformers.Qwen2VLProcessor):
    """Qwen2-VL's own processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return argument


def test_a_picture_may_take_fewer_positions_than_tokens(tmp_path):
    """Qwen2-VL's M-RoPE: 16 tokens of a picture move the text by 4 places. What is drawn stands at the place after the text."""
    tokens = {"image_token": "<pad>", "video_token": "<video>", "start": "<see>", "end": "</see>"}
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llm("qwen2", tmp_path / "text"), extra_special_tokens=tokens)
    pad, video, start, end = (tokenizer.convert_tokens_to_ids(token) for token in tokens.values())
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=pad, video_token_id=video,
                                        vision_start_token_id=start, vision_end_token_id=end)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    llm = FrozenLLM(model, tokenizer, "qwen2-vl")
    assert [2 * len(rotary.frequencies) for rotary in llm.rotary] == [8] * 3
    llm.processor = PicturesOnly(transformers.Qwen2VLImageProcessor(min_pixels=112**2, max_pixels=112**2), tokenizer)
    llm.processor.chat_template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}<see><pad></see>{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}"
    )
    llm.look(Image.new("RGB", (112, 112), "red"))
    row = llm.lookup(["a red circle"])["a red circle"]
    words = len(tokenizer("a red circle").input_ids)
    assert len(row) == 16 + 2 + words and model.base_model.rope_deltas.item() == 4 - 16
    keys = row[:, : llm.kept[0].kv_heads * llm.kept[0].key_width].unflatten(-1, (llm.kept[0].kv_heads, -1))
    inputs = llm.processor(text=["<see><pad></see>a red circle"], images=[llm.picture], return_tensors="pt")
    with torch.no_grad():
        model.base_model(**inputs, **with_cache(model.base_model, cache := transformers.DynamicCache()))
    last_place = 1 + 4 + 1 + words - 1  # <see>, the picture, </see>, the words
    expected = llm.rotary[0](cache.layers[0].keys[:, :, -1:], torch.tensor([-(last_place + 1)]))[0, :, 0]
    assert (keys[-1] - expected).abs().max() < 1e-5


def test_bad_pictures_are_refused(tiny_llm, tmp_path):
    with pytest.raises(ValueError, match="--image: .*LlamaForCausalLM. reads text only; expected a vision-language model"):
        tiny_llm("llama").look(RED)
    (tmp_path / "no.png").write_bytes(b"not a picture")
    for path in ("no.png", "nowhere.png"):
        with pytest.raises(ValueError, match=f"--image .*{path} does not decode"):
            sample.open_picture(str(tmp_path / path))
