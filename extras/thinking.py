"""The LLM writes about a caption before it is drawn: Mural's reasoning, VERIFI's rewriting.

    python sample.py --prompt "a red ring" --read think:40
    python sample.py --prompt "a red ring" --read rewrite:reencode

What the flags mean, and what a reader is: readers.py.
"""

import copy

import torch
from torch import Tensor
from transformers import DynamicCache

from llm import CacheUpTo, FrozenLLM, Reading, with_cache

TOKENS = 48  # that the LLM writes at most, if no number is given
SIDE_BY_SIDE = 8  # captions that it writes about at a time: always so many, so that no bit of what
# it writes about one depends on how many there are


class Thinking:
    """The LLM reads the caption in a frame, where {} stands, and writes on, greedily, up to so many
    tokens or the end of the line.

    What the image then looks at: "all", the caption and what follows it (Mural's reasoning at
    inference); only what was "written", in its context (UniFusion's VERIFI); both out of the
    cache, with no second pass. Or "reencode": what was written, read as a caption of its own.
    The empty prompt of guidance stays as it was.

    written: caption -> what the LLM wrote; shown: its row's tokens. inside: the reader of the empty
    prompt and of what is read again. ValueError for no {} or two, or an LLM that cannot write.
    """

    def __init__(
        self, llm: FrozenLLM, frame: str, tokens: int = TOKENS, show: str = "all", inside=None
    ):
        self.llm = llm
        self.frame = frame
        self.tokens = tokens
        self.show = show
        self.inside = inside
        self.flag = "--read rewrite"
        if show == "all":
            self.flag = "--read think"
        self.written: dict[str, str] = {}
        self.shown: dict[str, list[int]] = {}
        check_heard(self, getattr(llm, "tokens", False))
        if hasattr(inside, "picture"):
            raise ValueError("--read image does not go with --read think or --read rewrite")
        self.check_writes()
        if frame.count("{}") != 1:
            raise ValueError(
                f"the frame {frame[-60:]!r}: expected a text with one {{}}, where the prompt stands"
            )
        # the frame's beginning is the same for every caption
        self.beginning = llm.open_ids(frame.split("{}")[0])
        if len(self.beginning) >= llm.max_tokens:
            raise ValueError(
                f"a frame of {len(self.beginning)} tokens leaves {llm.name} no room to think"
            )
        self.begun, self.begun_states = self.begin()

    def check_writes(self) -> None:
        llm = self.llm
        if not llm.layers:
            raise ValueError(
                f"{llm.name} ({type(llm.model).__name__}) is an encoder and writes nothing; "
                "leave out --read think and --read rewrite"
            )
        if not llm.writes:
            raise ValueError(
                f"{llm.name} was saved without its language-model head and cannot write: leave "
                "out --read think and --read rewrite"
            )

    @torch.no_grad()
    def begin(self) -> tuple[DynamicCache | None, tuple[Tensor, ...]]:
        """The cache of the frame's beginning, which goes through the LLM once, and its hidden
        states (1, T, d) of every layer. None where nothing can be shared: the state of a recurrent
        layer neither goes back nor, in every model, on by several tokens."""
        cache = CacheUpTo(self.llm.model.config)
        recurrent = any(hasattr(layer, "conv_states") for layer in cache.layers)
        if recurrent or not self.beginning:
            return None, ()
        ids = torch.tensor([self.beginning], device=self.llm.device)
        return cache, self.run(ids, cache)

    def read(self, caption: str) -> Reading | Tensor:
        return self.read_all([caption])[0]

    def read_all(self, captions: list[str]) -> list[Reading | Tensor]:
        """As read, of distinct captions. The LLM writes about several of them side by side."""
        rows = self.write([caption for caption in captions if caption])
        readings = []
        for caption in captions:
            if caption in rows:
                readings.append(rows[caption])
            else:  # to be read again, or nothing was there to write about
                readings.append(read_inside(self, self.written.get(caption) or caption))
        return readings

    def write(self, captions: list[str]) -> dict[str, Tensor]:
        """Write on after each caption, into `written` -> their rows (T, W).

        Captions of as many tokens stand side by side: then no row has padding, which not every LLM
        would take.
        """
        llm = self.llm
        groups: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
        for caption in captions:
            ids = llm.open_ids(self.frame.replace("{}", caption))
            if len(ids) >= llm.max_tokens:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens with its frame leaves {llm.name} no room to "
                    "think"
                )
            if ids:  # none: a frame of {} alone, before an LLM without BOS
                groups.setdefault((self.shared(ids), len(ids)), []).append((caption, ids))
        rows = {}
        for (shared, _), group in sorted(groups.items()):
            for start in range(0, len(group), SIDE_BY_SIDE):
                rows |= self.write_group(group[start : start + SIDE_BY_SIDE], shared)
        return rows

    def shared(self, ids: list[int]) -> int:
        """How many of these tokens stand in the frame's cache already: its end may have melted into
        the caption's first token, and one token at least must be left to start the writing."""
        shared = 0
        while shared < min(len(self.beginning), len(ids) - 1):
            if self.beginning[shared] != ids[shared]:
                break
            shared += 1
        return shared

    @torch.no_grad()
    def write_group(self, group: list[tuple[str, list[int]]], shared: int) -> dict[str, Tensor]:
        """At most SIDE_BY_SIDE captions and their tokens, as many of each -> their rows (T, W);
        none where what was written is read again."""
        llm = self.llm
        prompts = [ids for _, ids in group]
        prompts += prompts[-1:] * (SIDE_BY_SIDE - len(group))
        length = len(prompts[0])

        # the writing; each token's keys and values are in the cache as it is read
        prompt = torch.tensor(prompts, device=llm.device)
        cache, states = self.read_prompt(prompt, shared)
        out = self.generate(prompt, cache)
        ends = [length + self.count_written(row[length:]) for row in out.sequences]
        for (caption, _), tokens, end in zip(group, out.sequences, ends):
            said = llm.tokenizer.decode(tokens[length:end], skip_special_tokens=True)
            self.written[caption] = said.strip()
        if self.show == "reencode":
            return {}
        if out.hidden_states:
            parts = [*states, *out.hidden_states]
            cache.hidden_states = [torch.cat(layer, dim=1) for layer in zip(*parts)]
        # of each the last token has not been read, by a model that stops there
        read = torch.tensor(ends, device=llm.device) - 1
        packed = llm.pack(cache, read)

        # the frame stays out of sight, and the prompt too where something was written after it
        rows = {}
        for (caption, ids), tokens, end, row in zip(group, out.sequences, ends, packed):
            start = shared
            if self.show == "written" and end - 1 > length:
                start = length
            shown = list(range(start, end - 1))
            if start and ids[0] == llm.tokenizer.bos_token_id and self.shows_all():
                shown = [0, *shown]  # BOS was seen in training too
            self.shown[caption] = tokens[shown].tolist()
            rows[caption] = row[shown]
        return rows

    def count_written(self, tokens: Tensor) -> int:
        """How many of these the LLM has written, its end among them; after it stands padding."""
        ends = self.llm.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for i, token in enumerate(tokens.tolist()):
            if token in ends or self.ends_line(tokens[: i + 1]):
                return i + 1
        return len(tokens)

    def ends_line(self, written: Tensor) -> bool:
        """Whether the writing ends here. A chat model writes to the end of its turn."""
        tokenizer = self.llm.tokenizer
        return not tokenizer.chat_template and "\n" in tokenizer.decode(written)

    def shows_all(self) -> bool:
        """Whether the image looks at a caption's first token when nothing is written."""
        return getattr(self.inside, "expose", "all") == "all"

    def read_prompt(self, prompt: Tensor, shared: int) -> tuple[DynamicCache, list]:
        """prompt (B, T) of which `shared` tokens are the frame's -> the cache of all but the last
        token, with which the writing begins; and their hidden states, in parts.

        (From a longer piece `generate` takes the last state as a slice, for which torch copies the
        LLM's head once a row: 20 seconds for gemma-3's.)
        """
        # a copy of the frame's cache, with its shared tokens alone
        if self.begun is None or not shared:
            shared = 0
            cache = CacheUpTo(self.llm.model.config)
            states = []
        else:
            cache = copy.deepcopy(self.begun)
            if shared < len(self.beginning):
                cache.crop(shared - len(self.beginning))
            cache.batch_repeat_interleave(len(prompt))
            states = [[x[:, :shared].expand(len(prompt), -1, -1) for x in self.begun_states]]

        # the rest
        rest = prompt[:, shared:-1]
        if rest.shape[1]:
            states.append(self.run(rest, cache))
        return cache, states

    def run(self, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, ...]:
        """The LLM reads ids (B, T) into the cache -> their hidden states of every layer, which only
        the LLM of a bridge keeps."""
        decoder = self.llm.model.base_model
        options = {"output_hidden_states": hasattr(self.llm, "states")} | with_cache(decoder, cache)
        return decoder(input_ids=ids, **options).get("hidden_states") or ()

    def generate(self, prompt: Tensor, cache: DynamicCache):
        """Greedily on after each, to the line's end; of a chat model, to the end of its turn."""
        model = self.llm.model
        length = prompt.shape[1]

        def ended(so_far: Tensor, scores) -> Tensor:
            done = [self.ends_line(row[length:]) for row in so_far]
            return torch.tensor(done, device=so_far.device)

        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **with_cache(model, cache),
            stopping_criteria=[ended],
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(self.tokens, self.llm.max_tokens - length),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_hidden_states=bool(getattr(self.llm, "states", ())),
        )


def read_inside(reader, caption: str) -> Reading | Tensor:
    """What the reader inside another makes of a caption; without one, its tokens."""
    if reader.inside is None:
        return Reading(reader.llm.tokenize(caption))
    return reader.inside.read(caption)


def check_heard(reader, only_tokens: bool) -> None:
    """ValueError if a reader that gives finished rows meets a bridge that asks for tokens alone."""
    if only_tokens and hasattr(reader, "flag"):
        raise ValueError(
            f"{reader.flag} is for what the LLM reads, and --bridge dense hears nothing of it: "
            "leave one out"
        )
