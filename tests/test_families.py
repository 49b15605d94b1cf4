"""Every causal-LM family that the installed transformers knows, tiny and random: it draws, or is
refused for a known reason."""

import functools
import re
from contextlib import suppress

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from conftest import random_expert
from extras.mirror import MirrorTower
from extras.thinking import Thinking
from flow import euler_sample, flow_loss
from inspection import fingerprint
from llm import FrozenLLM

pytestmark = pytest.mark.slow

# (names of a size in the families' configurations, its tiny value); the first that matches counts
SIZES = [
    (r"(num_|n_)?((en|de)coder_)?(hidden_)?layers?", 8),
    (r"(num_|n_)?((en|de)coder_)?(attention_)?heads?", 4),
    (r"num_(key_value|kv)_heads|num_query_groups", 2),
    (r"(num|n_routed|num_local|moe_num)_experts", 4),
    (
        r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|n_group|num_expert_group"
        r"|topk_group",
        2,
    ),
    (
        r"hidden_size|d_model|n_embd|emb_dim|word_embed_proj_dim|embedding_(size|dim)"
        r"|attention_hidden_size|lru_width|dim",
        32,
    ),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size)|dim_ff|dff|d_inner", 48),
    (r"vocab_size.*|.*vocab_size", 300),
    (
        r"max_.*(positions|position_embeddings|seq_len|sequence_length)|n_positions|n_ctx"
        r"|context_length|model_max_length",
        64,
    ),
    (r"(attention_)?head_dim|d_head|dim_head|attention_head_size|kv_channels", 16),
    (r"qk_(rope|nope)_head_dim|rotary_dim|hidden_size_per_layer_input", 8),
    (r"v_head_dim", 12),
    (r".*lora_rank|.*linear.*head_dim|mamba_(d_state|d_head|headdim|head_dim)|ssm_state_size", 16),
    (r"(linear|mamba)_num.*heads|mamba_n_heads", 4),
    (r".*sliding_window", 32),
    (r"(mamba_)?chunk_size", 8),  # its default pads each text to 256 tokens
    (r"image_size", 28),
]
HYBRID = ["linear_attention", "full_attention"] * 4
MORE = {  # what the rules above leave at odds
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 5]},
    "blenderbot": {"encoder_layers": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"n_groups": 1, "num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention"] * 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 1,
        "ngram_vocab_size_base": 300,
    },
    "xlnet": {"d_head": 8},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 4,
        "attention_hidden_size": 64,
        "n_mamba_heads": 4,
    },
}


class Letters:
    """A tokenizer: a token for every letter."""

    bos_token_id = bos_token = eos_token_id = chat_template = None

    def __call__(self, text: str, **_):
        return type("Encoding", (), {"input_ids": [3 + ord(letter) % 200 for letter in text]})

    def decode(self, ids, **_) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


def tiny_config(kind: type, **more):
    """A configuration of this class with all its sizes small, and those of its parts."""
    default = kind()
    values = default.to_dict()
    small = {
        name: tiny_config(type(getattr(default, name)))
        for name in kind.sub_configs
        if getattr(default, name, None) is not None
    }
    for name, value in values.items():
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if name.endswith("_token_id") and isinstance(value, int) and value >= 300:
            small[name] = 3
        elif size and isinstance(value, int) and not isinstance(value, bool) and value > size:
            small[name] = size
    if "qk_rope_head_dim" in values:
        small.pop("head_dim", None)
    if "kv_lora_rank" in values:
        small["num_key_value_heads"] = 4
    return kind(**small | more)


def tiny_model(family: str, **more):
    config = tiny_config(CONFIG_MAPPING[family], **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 2e7, f"{size / 1e6:.0f} M parameters: {config}"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # the library starts with weights so small that every prompt reads alike
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1)
    return model


REFUSED = {  # families that no image can attend to, and what the user is told
    "is not causal": "bert bert-generation big_bird camembert data2vec-text electra ernie "
    "megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta "
    "xlm-roberta-xl",
    "keeps no key-value cache": "cpmant dory falcon_mamba gemma4_unified_assistant "
    "inkling2_loop_text longcat_flash mamba mamba2 minimax openai-gpt rwkv xlnet xlstm xmod",
    "neither stay nor turn by a known law": "deepseek_v4",  # its values turn too
}
# families that AutoModelForCausalLM does not build from a small configuration, so that nothing is
# known of them
NOT_BUILT = {
    "parts that must fit each other": "dots3_note dots3_note_text gemma4_assistant qwen4_exp "
    "reformer",
    "another package (timm)": "gemma3n",
    "errors of the library itself": "cohere_compass_text dbrx musicgen musicgen_melody",
    "parts that are never small": "blt",
}
# of transformers; a family that fails in another version is reported, and no failure
LISTED_WITH = "5.24."
CAPTIONS = ["a red circle", "", "two", "the ring is left of it"]


def listed(family: str, lists: dict[str, str]) -> str | None:
    return next((reason for reason, names in lists.items() if family in names.split()), None)


@functools.cache  # to build and to inspect them all takes longer than what is tested
def llm_of(family: str) -> FrozenLLM:
    return FrozenLLM(tiny_model(family, **MORE.get(family, {})), Letters(), family)


def draws(family: str) -> None:
    """Two steps of training and a drawing; the LLM is what it was; a batch is what its rows are
    alone."""
    llm = llm_of(family)
    before = fingerprint(llm.model)
    expert = random_expert(llm)
    optimizer = torch.optim.SGD(expert.parameters(), lr=1e-3)
    x, t, noise = torch.randn(4, 3, 16, 16), torch.rand(4), torch.randn(4, 3, 16, 16)
    for _ in range(2):
        loss = flow_loss(expert, x, noise, t, llm.context(CAPTIONS)).mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in expert.parameters())
        optimizer.zero_grad()
    assert fingerprint(llm.model) == before and not any(
        p.requires_grad for p in llm.model.parameters()
    )
    with torch.no_grad():
        drawn = euler_sample(expert, noise, llm.context(CAPTIONS), 2)
        for i, caption in enumerate(CAPTIONS):
            alone = euler_sample(expert, noise[i : i + 1], llm.context([caption]), 2)
            assert (alone[0] - drawn[i]).abs().max() < 1e-4 * drawn.abs().max(), caption
        other = euler_sample(expert, noise, llm.context(["an orange cross"] * 4), 2)
    assert (other - drawn).abs().max() > 1e-4, "the caption reaches the picture"


def as_listed(family: str) -> None:
    """It draws, or is refused, or is not built, as the lists say."""
    if listed(family, NOT_BUILT):
        with suppress(Exception):
            tiny_model(family, **MORE.get(family, {}))
            family = None
        assert family, "it can be built now: the list is out of date"
    elif reason := listed(family, REFUSED):
        try:
            llm_of(family)
        except ValueError as error:
            assert reason in str(error)
        else:
            raise AssertionError("it is not refused")
    else:
        draws(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    try:
        as_listed(family)
    except Exception as error:
        if transformers.__version__.startswith(LISTED_WITH):
            raise
        pytest.xfail(
            f"{family} in transformers {transformers.__version__}: {type(error).__name__}: {error}"
        )
    if reason := listed(family, NOT_BUILT):
        pytest.skip(f"not built: {reason}")


def test_at_least_a_hundred_families():
    refused = [
        family
        for lists in (REFUSED, NOT_BUILT)
        for names in lists.values()
        for family in names.split()
    ]
    assert len(refused) == len(set(refused)) and len(set(FAMILIES) - set(refused)) >= 100
    if transformers.__version__.startswith(LISTED_WITH):  # what README says
        assert (len(FAMILIES), len(set(FAMILIES) - set(refused))) == (196, 154)


def test_which_can_be_mirrored():
    """Of all families that draw, most can be mirrored; the others are refused in one line.
    MirrorTower.check asks gradients."""
    refused = {}
    for family in FAMILIES:
        if listed(family, REFUSED) or listed(family, NOT_BUILT):
            continue
        try:
            MirrorTower.beside(llm_of(family), patch=4, image_size=16)
        except ValueError as error:
            assert str(error).startswith("--bridge mirror: ") and "\n" not in str(error)
            refused[family] = str(error)
        else:
            refused[family] = None
    mirrored = {family for family, error in refused.items() if error is None}
    print(*(error for error in refused.values() if error), sep="\n")
    assert len(mirrored) >= 80, sorted(mirrored)
    if transformers.__version__.startswith(LISTED_WITH):  # what README says
        assert len(mirrored) == 93
    known = "llama qwen2 qwen3 gemma2 gemma3 mistral phi3 cohere2 olmo2 smollm3 stablelm granite"
    assert {*known.split(), "falcon", "gpt2", "gpt_neox", "phi"} <= mirrored
    whys = {
        "gpt_neo": "stays causal",
        "mpt": "padding changes the picture",
        "jamba": "in every layer",
    }
    for family, why in whys.items():
        assert why in refused[family]


@pytest.mark.parametrize(
    "family, turning, layout",
    [  # how many dimensions turn in each layer, and the first three
        ("llama", [16] * 8, [0, 1, 2]),
        ("gptj", [8] * 8, [0, 2, 4]),
        ("gpt_neox", [2] * 8, [0, 1, 2]),
        ("glm", [8] * 8, [0, 2, 4]),
        ("deepseek_v3", [8] * 8, [16, 17, 18]),
        ("smollm3", [8, 8, 8, 0] * 2, [0, 1, 2]),
        ("opt", [0] * 8, [0, 1, 2]),
        ("cohere2", [16, 16, 16, 0] * 2, [0, 2, 4]),
        ("mpt", [0] * 8, [0, 1, 2]),
        ("qwen3_next", [4] * 2, [0, 1, 2]),
    ],
)
def test_rotary_layouts(family, turning, layout):
    """Halves, pairs, a part of the width, its end, layers without rotation, hybrids, absolute
    positions and ALiBi."""
    llm = llm_of(family)
    assert [2 * len(rotary.frequencies) for rotary in llm.rotary] == turning
    assert llm.rotary[0].order[:3].tolist() == layout


class Pairs(Letters):
    """A token for every two letters: where a frame ends within one, it melts into the caption."""

    def __call__(self, text: str, **_):
        letters = super().__call__(text).input_ids
        pairs = [3 + sum(letters[i : i + 2]) % 200 for i in range(0, len(letters), 2)]
        return type("Encoding", (), {"input_ids": pairs})


@pytest.mark.parametrize(
    "family, tokenizer",
    [("bamba", Letters), ("jamba", Letters), ("recurrent_gemma", Pairs), ("falcon_h1", Pairs)],
)
def test_what_a_recurrent_llm_writes(family, tokenizer):
    """It stands in the cache as if it had been read in one pass: not every recurrent state goes on
    from a frame's by several tokens, and none goes back."""
    llm = FrozenLLM(tiny_model(family, **MORE.get(family, {})), tokenizer(), family)
    llm.keep(range(len(llm.layers)))
    frame = "red > r\n{} >"
    llm.reader = Thinking(llm, frame, 5)
    written = []
    for caption, row in llm.lookup(["a red circle", "two", "a blue circle"]).items():
        ids = llm.open_ids(frame.replace("{}", caption))
        start = llm.reader.shared(ids)
        assert start == (len(frame) - 4 if tokenizer is Letters else (len(frame) - 4) // 2)
        whole = ids[:start] + llm.reader.shown[caption]
        assert whole[: len(ids)] == ids, "the frame alone is hidden"
        written.append(len(whole) - len(ids))
        read = llm.pack(llm.run(torch.tensor([whole])), torch.tensor([len(whole)]))[0, start:]
        assert (row - read).abs().max() < 1e-4 * read.abs().max(), caption
    assert any(count > 1 for count in written)
