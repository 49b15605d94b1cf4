"""What the LLM says by habit is told apart from what it knows, and a probe is fitted on nothing that
it is asked."""

import pytest
import torch
from test_cli import refusal

from data import CANONICAL_COLORS, SHAPES
from extras import answers
from extras.suites import read_suite

FRAME = "{} => a"


def prompts(half: str) -> list:
    return [prompt for prompt in read_suite("languages", half=half) if prompt.is_of_one_thing]


def knows(asked: list, habit: float):
    """In the place of an LLM: it knows each answer by 1, and likes red circles by `habit`."""
    scenes = {answers.ask(FRAME, prompt): prompt.scene.groups[0] for prompt in asked}

    def choices(llm, texts: list[str], words: tuple[str, ...]) -> torch.Tensor:
        scores = torch.zeros(len(texts), len(words))
        scores[:, words.index("red" if "red" in words else "circle")] += habit
        for row, text in zip(scores, texts):
            group = scenes.get(text) or scenes[text.rpartition(" ")[0]]
            row[words.index(group.color if "red" in words else group.shape)] += 1
        return scores

    return choices


@pytest.mark.parametrize("habit", [0.0, 5.0])
def test_a_habit_is_taken_away(habit, monkeypatch):
    asked, others = prompts("report"), prompts("choose")
    monkeypatch.setattr(answers, "choices", knows(asked + others, habit))
    found = answers.answers(None, FRAME, asked, others)
    assert found["calibrated"]["both"]["score"] == 1
    assert len(found["calibrated"]["both"]["rows"]) == 22
    red = sum(prompt.scene.groups[0].color == "red" for prompt in asked) / len(asked)
    by_habit = found["as it is"]["color"]["score"]
    assert by_habit == (pytest.approx(red) if habit else 1)


def test_a_probe_is_fitted_on_other_scenes_in_other_languages(tiny_llm, monkeypatch):
    """Where the values say the caption's language and scene, a probe that had seen either would be
    right."""
    asked, others = prompts("report"), prompts("choose")
    fitted = []

    def ridge(X, Y, *strength):
        fitted.append(len(X))
        return lambda new: torch.zeros(len(new), Y.shape[1])

    monkeypatch.setattr(answers, "ridge", ridge)
    found = answers.probed(tiny_llm("qwen2"), asked, others, 0, 50)
    assert not {prompt.scene_id for prompt in asked} & {prompt.scene_id for prompt in others}
    # three layers, the best of them; then each language, without its own prompts
    of_one = sum(prompt.row == "French" for prompt in others)
    assert fitted == [50] * 3 + [50 + len(others) - of_one] * 22 + [50]
    assert found["English captions"]["both"]["rows"].keys() == {p.row for p in asked}


def test_a_random_llm_knows_nothing(tiny_llm):
    found = answers.probed(tiny_llm("qwen2"), prompts("report"), prompts("choose"), 0, 400)
    for way in ("English captions", "and other languages"):
        assert found[way]["both"]["score"] < 0.1
    assert found["layer"] in (0, 1, 2)


def test_words_that_begin_alike_are_refused(llm_folder, tmp_path, capsys):
    """A tokenizer of single letters cannot answer with a first token."""
    said = refusal(capsys, answers.main, "--llm", str(llm_folder("qwen2")), "--out", tmp_path)
    assert "begin alike" in said
    assert not list(tmp_path.iterdir())
    (tmp_path / "frame").write_text("no place for the prompt")
    said = refusal(capsys, answers.main, "--frame", tmp_path / "frame", "--out", tmp_path / "made")
    assert "one {}" in said
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_the_real_llm_answers_as_the_library_says(gemma):
    llm = gemma
    texts = ["The color of grass is", "Grass is", "The color of fresh snow is"]
    found = answers.choices(llm, texts, CANONICAL_COLORS)
    firsts = [llm.tokenizer(" " + color).input_ids[1] for color in CANONICAL_COLORS]
    for text, row in zip(texts, found):
        ids = torch.tensor([llm.tokenizer(text).input_ids])
        logits = llm.model(input_ids=ids).logits[0, -1, firsts]
        assert (row - logits).abs().max() < 1e-3
    assert CANONICAL_COLORS[found[0].argmax()] == "green"
    assert answers.choices(llm, texts, SHAPES).isfinite().all()
