"""Readers: what stands around a caption, and what the LLM writes after it."""

import pytest
import torch
from tokenizers.normalizers import Strip

import assemble
import checkpoint
import sample
import train
from conftest import CPU, random_expert, save_tiny_instruct_llm
from extras.bridge_llm import BridgeLLM
from extras.readers import Template, chat, reader_from, reader_from_flags, with_reading
from extras.thinking import Thinking
from llm import Reading
from loading import load_llm


def bos_of(llm) -> list[int]:
    """The token that this tokenizer puts first, as a list of at most one place."""
    return [0] if llm.tokenizer("").input_ids else []


def write_by_hand(llm, ids: list[int], tokens: int) -> torch.Tensor:
    """What the LLM's own generate says after ids, up to the end of the line: all tokens."""
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    out = llm.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    for i in range(len(ids), len(out)):
        if "\n" in llm.tokenizer.decode(out[len(ids) : i + 1]):
            return out[: i + 1]
    return out


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "gpt2"])
def test_thinking_goes_into_the_cache_once(kind, tiny_llm):
    """What the LLM writes stands in the cache as if it had been read, no token is computed twice,
    and the frame is hidden."""
    llm = tiny_llm(kind, frozen=BridgeLLM)
    other = tiny_llm(kind, frozen=BridgeLLM)
    for one in (llm, other):
        one.keep(range(3), states=[0, 3])  # keys and values, and hidden states for some bridges
    empty = llm.lookup([""])[""]
    read = []
    frame = "red => blue\n{} =>"
    captions = ["a red circle", "an orange cross"]
    embed = llm.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    llm.reader = Thinking(llm, frame, 8)
    rows = llm.lookup(captions)
    hook.remove()
    written = llm.reader.written
    frame_tokens = len(llm.tokenizer(frame.split("{}")[0]).input_ids)
    computed = {}  # of each group of captions, by their length
    for caption in captions:
        ids = llm.tokenizer(frame.format(caption)).input_ids
        out = write_by_hand(llm, ids, 8)
        said = llm.tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
        assert written[caption] == said.strip()
        cache = llm.run(out[None, :-1])
        whole = llm.pack(cache, torch.tensor([len(out) - 1]))[0]
        expected = whole[[*bos_of(llm), *range(frame_tokens, len(out) - 1)]]
        assert rows[caption].shape == expected.shape
        difference = (rows[caption] - expected).abs().max()
        assert difference < 1e-4, f"written on the go = read in one pass: {difference}"
        computed[len(ids)] = max(computed.get(len(ids), 0), len(out) - 1 - frame_tokens)
    once = "the frame once for all captions, each other token in one step of its group"
    assert sum(read) == frame_tokens + sum(computed.values()), once
    assert torch.equal(llm.lookup([""])[""], empty), "the unconditional branch is as in training"

    # only what was written
    llm.reader = Thinking(llm, frame, 8, "written")
    for caption, row in llm.lookup(captions).items():
        tail = len(row) - len(bos_of(llm))
        assert torch.equal(row[-tail:], rows[caption][-tail:]), "a slice of the cache"
        if len(llm.reader.written[caption]) > 1:
            assert tail <= 8
        else:
            assert torch.equal(row, rows[caption]), "nothing written: the prompt"
    llm.reader = None
    first = captions[0]
    assert torch.equal(llm.lookup(captions)[first], other.lookup(captions)[first])
    with pytest.raises(ValueError, match="expected a text with one {}"):
        Thinking(llm, "no place", 8)


@pytest.mark.parametrize(
    "kind, show", [("qwen2", "all"), ("gpt2", "written"), ("gemma3", "all"), ("qwen2", "reencode")]
)
def test_side_by_side_is_one_by_one(kind, show, tiny_llm):
    """What the LLM writes about a caption depends on no other, to the bit: of whatever length they
    are, however many stand side by side, and wherever they end."""
    llm = tiny_llm(kind)
    frame = "red => blue\n{} =>"
    captions = [f"{n} {word}" for n in ("a", "three small") for word in ("red circle", "ring")]
    captions += ["", "a"] + [f"a {word} ring" for word in "red blue green black white".split()]
    captions += [f"a {word} star" for word in "red blue green black white".split()]
    llm.reader = Thinking(llm, frame, 12, show)
    together = llm.lookup(captions)
    said = dict(llm.reader.written)
    if kind != "gemma3":  # of random weights this one never ends a line
        assert len({len(text) for text in said.values()}) > 1, "they end at different places"
    llm.reader = Thinking(llm, frame, 12, show)
    for caption in reversed(captions):
        assert torch.equal(llm.lookup([caption])[caption], together[caption]), caption
    assert llm.reader.written == said and len(said) == len(captions) - 1


def test_any_of_several_ends_is_one(tiny_llm):
    """A model may have a list of tokens that end its writing (Llama 3, Gemma 3's chat)."""
    llm = tiny_llm("qwen2")
    frame = "red => blue\n{} =>"
    llm.reader = Thinking(llm, frame, 8)
    llm.lookup(["a red circle", "two red stars"])
    ids = llm.open_ids(frame.format("a red circle"))
    wrote = llm.reader.shown["a red circle"][len(ids) - len(llm.reader.beginning) :]
    assert len(wrote) > 2, "its last token is not shown"
    llm.model.generation_config.eos_token_id = [1, wrote[1]]
    llm.reader = Thinking(llm, frame, 8)
    llm.lookup(["two red stars", "a red circle"])
    end = wrote.index(wrote[1])  # the first of its kind
    shown = llm.reader.shown["a red circle"]
    assert shown[len(ids) - len(llm.reader.beginning) :] == wrote[:end]


@pytest.mark.parametrize("show", ["all", "written", "reencode"])
def test_a_caption_of_no_tokens_gives_nothing_to_write_about(show, tiny_llm):
    llm = tiny_llm("qwen2")  # no BOS
    llm.tokenizer.backend_tokenizer.normalizer = Strip()
    empty = llm.lookup([""])[""]
    llm.reader = Thinking(llm, "{}", 4, show)
    rows = llm.lookup([" ", "a red circle"])
    assert len(empty) == 0 and torch.equal(rows[" "], empty) and len(rows["a red circle"])


def test_what_is_kept_may_change_after_the_reader_is_set(tiny_llm):
    """train.py sets the reader before it knows the tower: the order must not matter."""
    rows = []
    for reader_first in (True, False):
        llm = tiny_llm("llama", frozen=BridgeLLM)
        if reader_first:
            llm.reader = Thinking(llm, "red => blue\n{} =>", 6)
        llm.keep([1], states=[0, 2])
        if not reader_first:
            llm.reader = Thinking(llm, "red => blue\n{} =>", 6)
        rows.append(llm.lookup(["a red circle"])["a red circle"])
    assert torch.equal(rows[0], rows[1])


def test_what_is_drawn_after_thinking(tiny_llm, tmp_path):
    """--read think shows the prompt and what follows it, rewrite what was written, and
    rewrite:reencode reads that alone."""
    llm = tiny_llm("qwen2")
    prompts = ["a red circle", "an orange cross"]
    plain = llm.lookup(prompts)
    frame = tmp_path / "frame.txt"
    frame.write_text("red => blue\n{} =>\n")
    lengths = {}
    shown = {"all": f"think:6:frame={frame}", "written": f"rewrite:6:frame={frame}"}
    for show, read in shown.items():
        llm.reader = with_reading(llm, read)
        reader = llm.reader
        assert (reader.frame, reader.tokens, reader.show) == ("red => blue\n{} =>", 6, show)
        lengths[show] = [len(llm.lookup(prompts)[prompt]) for prompt in prompts]
    most = max(lengths["written"])
    assert most <= 6 < min(lengths["all"]), "only what was written, or the prompt as well"

    llm.reader = with_reading(llm, f"rewrite:reencode:tokens=6:frame={frame}")
    rows = llm.lookup(prompts)
    texts = [llm.reader.written[prompt] or prompt for prompt in prompts]
    llm.reader = None
    first = prompts[0]
    assert texts != prompts
    assert torch.equal(llm.lookup(prompts)[first], plain[first]), "read as before"
    for prompt, text in zip(prompts, texts):
        assert torch.equal(llm.lookup([text])[text], rows[prompt])

    # a frame that is none
    with pytest.raises(ValueError, match="nowhere.txt cannot be read"):
        with_reading(llm, "think:6:frame=nowhere.txt")
    frame.write_text("Say it.")
    with pytest.raises(ValueError, match="expected a text with one {}"):
        with_reading(llm, f"think:6:frame={frame}")
    frame.write_text("red " * 80 + "{}")
    with pytest.raises(ValueError, match="leaves .* no room to think"):
        with_reading(llm, f"think:6:frame={frame}")


WRONG = [
    ("frame=x.txt", "--read frame=x.txt: expected one of think, rewrite, image"),
    ("after", "--read after: expected one of think, rewrite, image"),  # the checkpoint brings it
    ("think:0", "--read think: 0: expected a whole number"),
    ("think:four", "--read think: four: expected a whole number"),
    ("think:4:tokens=5", "expected the number of tokens once, not twice"),
    ("think:frame", "--read think:frame: expected frame=VALUE"),
    ("rewrite:reencode=no", "expected reencode without a value"),
    ("think:reencode", "--read think: reencode: expected a whole number"),
]


@pytest.mark.parametrize("read, message", WRONG)
def test_nonsense_is_refused(read, message, tiny_llm):
    with pytest.raises(ValueError, match=message):
        with_reading(tiny_llm("qwen2"), read)


def test_examples_are_turns_of_a_conversation(tmp_path):
    """Of an instruct model; a text that only has an arrow, or goes on after the last, is none."""
    llm = load_llm(str(save_tiny_instruct_llm(tmp_path / "instruct")), CPU, torch.float32)
    frame = "In English.\nOne line:\nein Kreis => a circle\ndue => two\n{} => a"
    first = "<user>In English.\nOne line:\nein Kreis\n<assistant>a circle\n"
    assert chat(llm, frame) == first + "<user>due\n<assistant>two\n<user>{}\n<say>a"
    for other in ("{}", "In English: {} =>", "due => two\n{} =>\nshort", "due => two\nand {}"):
        assert chat(llm, other) == f"<user>{other}\n<say>"


def test_flags_of_train(tiny_llm, tmp_path):
    """What --template and --read say, what a checkpoint keeps of it, and the reader out of that."""
    save_tiny_instruct_llm(tmp_path / "instruct")
    llm = load_llm(str(tmp_path / "instruct"), CPU, torch.float32)
    plain = {"template": "{}", "expose": "all", "thinking": None}
    assert reader_from_flags(llm, "{}", None) == (None, plain)
    assert reader_from(llm, plain) is None and reader_from(llm, {}) is None
    frame = tmp_path / "frame.txt"
    frame.write_text("say {}\n")
    said = "<user>{}\n<say>"
    thinking = ["<user>say {}\n<say>", 5, "all"]
    cases = {
        "after": {"template": "<{}>", "expose": "after"},
        "chat": {"template": "<user><{}>\n<say>"},
        "chat:after": {"template": "<user><{}>\n<say>", "expose": "after"},
        f"think:5:frame={frame}": {"template": "<{}>", "thinking": thinking},
        f"think:5:after:frame={frame}": {
            "template": "<{}>",
            "expose": "after",
            "thinking": thinking,
        },
    }
    for read, differs in cases.items():
        reader, stored = reader_from_flags(llm, "<{}>", read)
        assert stored == plain | {"template": "<{}>"} | differs, read
        again = reader_from(llm, stored)
        llm.reader = reader
        row = llm.lookup(["a red circle"])["a red circle"]
        llm.reader = again
        assert torch.equal(llm.lookup(["a red circle"])["a red circle"], row), read
    assert reader_from_flags(llm, "{}", "chat")[1]["template"] == said
    stored = reader_from_flags(llm, "{}", f"rewrite:reencode:chat:frame={frame}")[1]
    assert stored["template"] == said and stored["thinking"][1:] == [48, "reencode"]
    for template in ("no place", "{} {}", ""):
        with pytest.raises(ValueError, match="expected a text with one {}"):
            reader_from_flags(llm, template, None)
    with pytest.raises(ValueError, match="--read after: the template '{}' has no text after"):
        reader_from_flags(llm, "{}", "after")
    with pytest.raises(ValueError, match="after has no option 'chat'"):
        reader_from_flags(llm, "{}", "after:chat")
    with pytest.raises(ValueError, match="expected chat without a value"):
        reader_from_flags(llm, "{}", f"think:chat=no:frame={frame}")


def test_a_template_and_what_is_read_of_it(tiny_llm):
    """The caption within its text; "after" shows what follows it, and a long caption is cut."""
    llm = tiny_llm("qwen2")
    after = llm.tokenizer(" in English:", add_special_tokens=False).input_ids
    reader = Template(llm, "draw {} in English:", "after")
    whole = llm.tokenizer("draw a red circle").input_ids + after
    assert reader.read("a red circle") == Reading(whole, len(whole) - len(after))
    assert Template(llm, "draw {} in English:").read("a red circle") == Reading(whole)
    with pytest.warns(UserWarning, match="is cut to the"):
        long = reader.read("a red circle " * 50)
    assert len(long.ids) == llm.max_tokens and long.ids[-len(after) :] == after
    llm.reader = reader
    assert len(llm.lookup(["a red circle"])["a red circle"]) == len(after)
    with pytest.raises(ValueError, match="leaves no room for a caption"):
        Template(llm, "red " * 80 + "{}")
    bridge_llm = tiny_llm("qwen2", frozen=BridgeLLM)
    bridge_llm.reader = Template(bridge_llm, "red " * 10 + "{}")
    with pytest.raises(ValueError, match="the LLM takes 63 of which 50 stay free"):
        bridge_llm.keep([0], room=50)


def test_what_the_checkpoint_brings_stays_around_what_the_command_asks(tiny_llm, tmp_path):
    """--read think takes the place of the checkpoint's thinking, inside its template."""
    llm = tiny_llm("qwen2")
    llm.reader = reader_from(llm, {"template": "<{}>", "thinking": ["{} =>", 3, "all"]})
    frame = tmp_path / "frame.txt"
    frame.write_text("{} =>")
    reader = with_reading(llm, f"think:4:frame={frame}")
    assert reader.tokens == 4 and isinstance(reader.inside, Template)
    assert reader.read("") == Template(llm, "<{}>").read("")


def test_through_the_commands(tiny_run, tmp_path, capsys, monkeypatch):
    """train.py --read think, sample.py --read rewrite: what was written is printed."""
    frame = tmp_path / "frame.txt"
    frame.write_text("red => blue\n{} =>\n")
    run = str(tmp_path / "run")
    train.main([*tiny_run, "--steps", "2", "--read", f"think:3:frame={frame}"])
    expert = checkpoint.load_expert(run, CPU)
    assert expert.made_for["thinking"] == ["red => blue\n{} =>", 3, "all"]
    llm = assemble.llm_of(expert, None, CPU, torch.float32)
    assert isinstance(llm.reader, Thinking) and llm.reader.inside is None
    capsys.readouterr()
    words = ["--ckpt", run, "--prompt", "a red circle", "--steps", "2", "--device", "cpu"]
    sample.main([*words, "--read", f"rewrite:4:frame={frame}", "--out", str(tmp_path / "drawn")])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("a red circle -> ")]) == 1


def test_chat(tiny_llm, tmp_path):
    """The model's own chat template around the caption; a model without one is refused."""
    with pytest.raises(ValueError, match="has no chat template; expected an instruct model"):
        chat(tiny_llm("llama"))
    save_tiny_instruct_llm(tmp_path / "instruct")
    llm = load_llm(str(tmp_path / "instruct"), CPU, torch.float32)
    assert chat(llm, "draw {}") == "<user>draw {}\n<say>"
    llm.reader = Template(llm, chat(llm, "draw {}"), "after")
    ids = llm.read("a red circle").ids
    bos = llm.tokenizer.bos_token_id
    assert ids[0] == bos and bos not in ids[1:], "one BOS, the tokenizer's own"
    assert llm.tokenizer.decode(ids[1:]) == "<user>draw a red circle\n<say>"
    row = llm.lookup(["a red circle"])["a red circle"]
    assert len(row) == len(llm.tokenizer("\n<say>", add_special_tokens=False).input_ids)


def test_an_expert_draws_what_its_reader_shows(tiny_llm):
    """Another reader, another picture; and back to the first, the first."""
    llm = tiny_llm("llama")
    expert = random_expert(llm)
    pictures = []
    for reader in (None, Template(llm, "an orange {}"), None):
        llm.reader = reader
        pictures.append(sample.draw(expert, llm, ["cross"], [0], steps=2))
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()
