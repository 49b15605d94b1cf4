"""Tiny random LLMs of several families, saved as Hugging Face folders, with a small real tokenizer.
All offline."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a network

import pytest
import torch

if not torch.cuda.is_available():  # the Triton kernels run in its interpreter, if it is installed
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llm import FrozenLLM, select_layers
from loading import load_llm
from model import ImageExpert

CPU = torch.device("cpu")
TEXT = [
    "a red circle left of a blue square",
    "the heart is to the left of the gold ring",
    "three small teal stars",
    "an orange cross",
]
SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "deep": lambda: transformers.Qwen2Config(**SMALL | {"num_hidden_layers": 6}),
    "long": lambda: transformers.Qwen2Config(**SMALL | {"max_position_embeddings": 1024}),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "cohere2": lambda: (
        transformers.Cohere2Config(  # pairs of neighbours turn; layers with and without positions
            **SMALL,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
}
DECODERS = ["qwen2", "llama", "gemma3", "cohere2", "gpt2"]


def save_tiny_llm(kind: str, folder: Path, seed: int = 0) -> Path:
    """A random model of this family and a byte-level BPE tokenizer; Llama and Gemma put a BOS token
    first, as theirs do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if kind in ("llama", "gemma3"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    auto = (
        transformers.AutoModelForTextEncoding if kind == "t5" else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(CONFIGS[kind]())
    with torch.no_grad():  # the library starts with weights so small that every prompt reads alike
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def save_tiny_instruct_llm(folder: Path) -> Path:
    """The same with a chat template, of Llama's kind: BOS first, in the template too."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tiny_llm("llama", folder))
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = (
        "{{ bos_token }}" + said + "{% if add_generation_prompt %}<say>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """kind -> the folder of a tiny LLM, made once."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_llm(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def tiny_llm(llm_folder):
    """kind -> a FrozenLLM with an empty cache, in float32."""
    return lambda kind, **options: load_llm(str(llm_folder(kind)), CPU, torch.float32, **options)


@pytest.fixture(scope="session")
def gemma() -> FrozenLLM:
    """gemma-3-270m from its package, in float32, read once; a test attaches its expert to it."""
    return load_llm("gemma-3-270m", CPU, torch.float32)


def random_expert(llm: FrozenLLM, depth: int = 2, part: str = "all", **options) -> ImageExpert:
    """An expert whose every weight is random (a new one answers 0: its head and gates start at
    zero)."""
    layers = select_layers(llm, depth, part)
    options = {
        "prediction": "velocity",
        "width": 32,
        "heads": 2 * layers[0]["kv_heads"],
        "patch": 4,
        "image_size": 16,
    } | options
    expert = ImageExpert(layers, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in expert.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    llm.keep(expert.reads)
    return expert


SIZES = "--batch-size 8 --width 32 --depth 2 --image-size 16 --patch 4"
TINY_RUN = f"--device cpu --dtype float32 --warmup 2 {SIZES}".split()


@pytest.fixture
def tiny_run(llm_folder, tmp_path):
    """Flags of a training run that takes a second; the run's folder is tmp_path / "run" unless
    --out says otherwise."""
    return ["--llm", str(llm_folder("qwen2")), "--out", str(tmp_path / "run"), *TINY_RUN]
