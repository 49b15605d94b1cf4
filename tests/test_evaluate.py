"""The suites ask for what training never saw; scores and intervals are right; the commands write what they promise."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import evaluate
import sample
import train
from conftest import CPU
from data import TEST_PROMPTS, Emoji, Shapes, Thing, draw_things, lay_out
from evaluate import SUITES, Grade, grade, is_in, read_suite, ridge, tally
from extras.intervals import difference, mean_of_rows, wilson
from judge import lab, learned_features, pixel_features, ranks
from loading import fingerprint
from model import load_llm

ROOT = Path(__file__).parent.parent
ALL = {name: read_suite(name) for name in SUITES}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_a_hundred_distinct_prompts(name):
    prompts = [(prompt.row, prompt.text) for prompt in ALL[name]]
    assert len(prompts) >= 100 and len(set(prompts)) == len(prompts)


def test_the_suites_have_the_rows_that_were_asked_for():
    def rows(name: str) -> list[str]:
        return list(dict.fromkeys(prompt.row for prompt in ALL[name]))

    assert rows("geneval") == ["single object", "two objects", "counting", "colors", "position", "color attribution"]
    assert set(rows("unseen")) < set(rows("geneval"))
    assert len(rows("languages")) >= 17 and {"English", "Italian", "Chinese", "Hindi"} <= set(rows("languages"))
    scenes = {row: [prompt.scene for prompt in ALL["languages"] if prompt.row == row] for row in rows("languages")}
    assert all(scenes[row] == scenes["English"] for row in scenes), "every language asks for the same scenes"
    assert rows("knowledge") == ["culture", "space and time", "nature"]
    held_out = [prompt.scene.is_held_out() for prompt in ALL["unseen"]]
    assert all(held_out) and not any(prompt.scene.is_held_out() for prompt in ALL["geneval"] + ALL["languages"])


def test_prompts_for_one_object():
    """What a run that was trained with --one-object is asked for."""
    for name in SUITES:
        ones = read_suite(name, one=True)
        assert 0 < len(ones) < len(ALL[name]) or name in ("colors", "position")
        assert ones == [p for p in ALL[name] if len(p.scene.groups) == 1 and p.scene.groups[0].count == 1]
    assert {p.row for p in read_suite("geneval", one=True)} == {"single object", "colors"}


def test_no_prompt_is_a_training_caption():
    """Word for word; nor do captions hold another script, a hex code, or a number beyond the counts."""
    captions = [Shapes(32, seed).caption(i)[0] for seed in range(3) for i in range(10_000)]
    assert not [caption for caption in captions if caption.lower() in TEST_PROMPTS]
    assert {prompt.text.lower() for prompts in ALL.values() for prompt in prompts} == TEST_PROMPTS
    words = {word for caption in captions for word in caption.replace(",", " ").split()}
    assert all(word.isascii() and (word.replace("-", "").isalpha() or word in ("2", "3", "4")) for word in words), words
    new = {prompt.text.split()[1] for prompt in ALL["colors"] if prompt.row == "new color words"}
    assert len(new) >= 50 and not new & words, "these colour words are never trained on"


@pytest.mark.parametrize("name", SUITES)
def test_the_true_picture_is_right_and_another_is_wrong(name):
    """Every scene, drawn by data.py as it is asked for; then the picture of another of the suite in its place."""
    rng = np.random.default_rng(0)
    prompts, pictures = list({p.scene_id: p for p in ALL[name]}.values()), []
    for prompt in prompts:
        things = lay_out(prompt.scene, rng)
        if prompt.rgb:
            things = [Thing(thing.shape, prompt.rgb, thing.x, thing.y, thing.radius) for thing in things]
        pictures.append(draw_things(things, 32))
    right = [grade(prompt, picture).reason is None for prompt, picture in zip(prompts, pictures)]
    assert sum(right) >= 0.99 * len(right), [prompt.text for prompt, ok in zip(prompts, right) if not ok]
    wrong = [grade(prompt, picture) for prompt, picture in zip(prompts, pictures[7:] + pictures[:7])]
    different = [(a.scene, a.rgb) != (b.scene, b.rgb) for a, b in zip(prompts, prompts[7:] + prompts[:7])]
    passed = [g for g, other in zip(wrong, different) if other and g.reason is None]
    assert len(passed) <= 0.08 * len(prompts), "only scenes that leave a colour or a place open may pass for one another"


def tallied(bits: str, *scenes: int) -> dict:
    """A row of pictures with these verdicts, of the prompts of a row of `position`, or of these."""
    prompts = [p for p in ALL["position"] if p.row == "early"]
    prompts = [prompts[i] for i in scenes] if scenes else prompts
    grades = [Grade(None if bit == "1" else "missing", None, None) for bit in bits]
    return tally(list(zip(prompts, grades)))


def test_tallies_and_their_means():
    row = tallied("1110000000")
    assert row["score"] == 0.3 and row["interval"] == wilson(3, 10) and row["right"] == "1110000000"
    assert row["scenes"].split() == [p.scene_id for p in ALL["position"][:10]]
    even = mean_of_rows({0: {"a": row, "b": tallied("1" * 9 + "0")}})
    assert even["score"] == pytest.approx(0.6) and even["wrong"] == {"missing": 8} and even["n"] == 20
    low, high = tallied("11110000", *[0] * 4, *[1] * 4)["interval"]
    assert high - low > 0.8, "two scenes, not eight"
    uneven = mean_of_rows({0: {"a": tallied("1100"), "b": tallied("10" * 25)}})
    assert uneven["score"] == 0.5 and uneven["interval"][0] < wilson(27, 54)[0], "few pictures in a row widen the interval"


def test_a_difference_is_paired():
    """Two runs that are wrong about the same scenes differ for sure; the same shares of other scenes do not tell."""
    control, better, other = "0" * 30 + "10" * 15, "0" * 24 + "1" * 6 + "10" * 15, "1" * 21 + "0" * 39
    same = difference({0: {"a": tallied(better)}}, {0: {"a": tallied(control)}})
    assert same["score"] == pytest.approx(0.1) and same["interval"][0] > 0.02
    apart = difference({0: {"a": tallied(other)}}, {0: {"a": tallied(control)}})
    assert apart["score"] == pytest.approx(0.1) and apart["interval"][0] < 0 < apart["interval"][1]
    old = {0: {"a": {"score": 0.5, "n": 60, "wrong": {}}}}
    assert difference(old, {0: {"a": tallied(control)}}) is None, "which scenes were right is not known"
    assert difference({0: {"a": tallied(control)}}, {1: {"a": tallied(control)}}) is None, "no seed in common"


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_a_half_to_choose_on_and_one_to_report(name):
    """No scene is on both sides, in whatever row, language or suite; and of every row about half is on each."""
    halves = {half: read_suite(name, half=half) for half in ("choose", "report")}
    assert sorted(map(repr, halves["choose"] + halves["report"])) == sorted(map(repr, ALL[name]))
    elsewhere = {p.scene_id for prompts in ALL.values() for p in prompts if is_in("choose", p.scene_id)}
    assert not elsewhere & {p.scene_id for p in halves["report"]}
    assert not {p.text for p in halves["choose"]} & {p.text for p in halves["report"]}
    for one in (False, True):
        for row in {p.row for p in read_suite(name, one=one)}:
            share = len(read_suite(name, only=[row], one=one, half="report")) / len(read_suite(name, only=[row], one=one))
            assert 0.4 <= share <= 0.6, f"{row}: {share}"


def test_by_chance_a_picture_is_wrong():
    """Pictures of their own prompts are all right; against another's of the row, hardly any is."""
    prompts = [p for p in ALL["geneval"] if p.row in ("colors", "position")]
    rng = np.random.default_rng(0)
    pictures = np.stack([draw_things(lay_out(prompt.scene, rng), 32) for prompt in prompts])
    assert all(share <= 0.02 for share in evaluate.chance(prompts, pictures).values())
    assert evaluate.chance(prompts[:1], pictures[:1]) == {}
    blind = [prompt for prompt in ALL["geneval"] if prompt.row == "single object"][:2]
    circle = np.stack([pictures[0], pictures[0]])
    shares = [grade(prompt, picture).reason is None for prompt, picture in zip(blind, circle)]
    assert evaluate.chance(blind, circle)["single object"] == np.mean(shares), "one picture for all is right by chance alone"


def test_readmes_intervals_are_those_of_the_committed_results():
    """Runs from before verdicts were kept: over languages and seeds."""
    results = ROOT / "assets" / "results"
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()

    def shown(entry: dict) -> str:
        low, high = entry["interval"]
        return f"{entry['score']:.2f} ({low:.2f} to {high:.2f})"

    logs = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("race/*/race.json"))]
    for log in logs:
        log["suites"] = {"languages": log["suites"]["languages"]}
    speeds = json.loads((results / "race" / "race.json").read_text("utf-8"))["speeds"]
    for racer, entry in evaluate.race_table(logs, speeds).items():
        languages = entry["suites"]["languages"]
        name = racer.split(":")[0]
        cells = [shown(languages)]
        if racer != evaluate.CONTROL:
            cells.append(shown(languages["minus control"]))
        rows = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert any(all(cell in row for cell in cells) for row in rows), f"{name}: {cells}"
    means = []
    for name in ("pretrained", "random"):
        rows = json.loads((results / f"{name}.json").read_text("utf-8"))["languages"]["rows"]
        means.append({0: {row: rows[row] for row in rows if row != "English"}})
    cells = " | ".join(shown(mean_of_rows(rows, True)) for rows in means)
    assert f"| `languages`, mean of 21 | {cells} | 840 |" in lines
    assert shown(difference(*means, True)) in "\n".join(lines)


def test_the_hex_probe_finds_what_is_there_and_nothing_else(tiny_llm, monkeypatch):
    """A tiny random LLM knows no colour; an LLM whose values were the code's own colour would."""
    llm = tiny_llm("qwen2")
    llm.keep(range(len(llm.layers)))
    blind = evaluate.probe_hex(llm, 0, 200)
    assert set(blind) == {"layer 0", "layer 1", "layer 2"}
    assert all(cells["interval"][0] < 0.05 and all(x < 0.5 for x in cells["R2"]) for cells in blind.values())

    def sees(llm, captions: list[str]) -> list[torch.Tensor]:
        codes = [bytes.fromhex(caption.split("#")[1]) for caption in captions]
        return [torch.tensor(lab([list(code) for code in codes]), dtype=torch.float32)] * len(llm.kept)

    monkeypatch.setattr(evaluate, "hear", sees)
    seen = evaluate.probe_hex(llm, 0, 800)
    assert all(x > 0.9 for cells in seen.values() for x in cells["R2"])


def test_ridge_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(200, 40, generator=generator), torch.randn(40, 3, generator=generator)
    new = torch.randn(50, 40, generator=generator)
    assert (ridge(X, X @ W + 2, 1e-4)(new) - (new @ W + 2)).abs().max() < 0.05


@pytest.fixture(scope="module")
def two_runs(llm_folder, tmp_path_factory):
    """A tiny run on the LLM as it is, and its control."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--llm", llm_folder("qwen2"), "--device", "cpu", "--dtype", "float32", "--batch-size", "8", "--width", "32",
             "--depth", "2", "--steps", "2"]  # fmt: skip
    for name, more in (("pretrained", []), ("control", ["--random-llm"])):
        train.main([str(flag) for flag in [*flags, "--out", folder / name, *more]])
    return folder / "pretrained", folder / "control"


def test_the_control_has_other_weights_and_is_built_again(two_runs, llm_folder):
    pretrained, control = (sample.load_expert(str(run), CPU) for run in two_runs)
    assert pretrained.made_for["random_llm"] is None and control.made_for["random_llm"] == 0
    trained = load_llm(str(llm_folder("qwen2")), CPU, torch.float32)
    fresh = sample.llm_of(control, None, CPU, torch.float32)
    assert fresh.fingerprint == fingerprint(fresh.model) == control.made_for["llm_fingerprint"] != trained.fingerprint
    assert [p.shape for p in fresh.model.parameters()] == [p.shape for p in trained.model.parameters()]
    assert fresh.tokenize("a red circle") == sample.llm_of(pretrained, None, CPU, torch.float32).tokenize("a red circle")
    other = load_llm(str(llm_folder("qwen2")), CPU, torch.float32, random_seed=1)
    assert other.fingerprint != fresh.fingerprint, "another seed gives other weights"


def test_evaluate_command(two_runs, capsys):
    ours, control = two_runs
    flags = ["--limit", "2", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    evaluate.main(["--ckpt", str(ours), "--versus", str(control), "--probe", *flags])
    out = ours / "partial"
    results = [json.loads((out / name).read_text("utf-8")) for name in ("evaluate.json", "versus.json")]
    for suite in SUITES:
        assert Image.open(out / f"evaluate-{suite}.png").width > 100
        rows = {prompt.row for prompt in ALL[suite]}
        for result in results:
            assert set(result[suite]["rows"]) == rows
            for entry in [result[suite]["mean"], *result[suite]["rows"].values()]:
                assert 0 <= entry["interval"][0] <= entry["score"] <= entry["interval"][1] <= 1
            for entry in result[suite]["rows"].values():
                assert round(entry["score"] * entry["n"]) + sum(entry["wrong"].values()) == entry["n"]
                assert entry["right"].count("1") == round(entry["score"] * entry["n"]) and len(entry["right"]) == entry["n"]
                assert 0 <= entry.get("chance", 0) <= 1  # two prompts of a row may ask for the same scene
            assert result[suite]["settings"]["half"] == "report"
        ours_better = results[0][suite]["difference"]
        assert set(ours_better) >= rows | {"mean"} and "difference" not in results[1][suite]
        means = [result[suite]["mean"]["score"] for result in results]
        assert ours_better["mean"]["score"] == pytest.approx(means[0] - means[1])
    assert results[0]["languages"]["mean"]["over"] == ["scenes", "rows"]
    assert set(results[0]["probe-hex"]) == {"layer 0", "layer 1", "layer 2"}
    assert set(results[0]["probe"]) == {"layer 0", "layer 1", "layer 2", "picture"}
    assert results[1]["made_for"]["random_llm"] == 0
    printed = capsys.readouterr().out
    assert "English" in printed and "one object" in printed and "layer 2" in printed
    evaluate.main(["--ckpt", str(ours), "--suite", "parrot", "--n", "2", *flags])  # puts one suite beside the others
    again = json.loads((out / "evaluate.json").read_text("utf-8"))
    assert again["parrot"]["mean"]["n"] == 8 and again["geneval"] == results[0]["geneval"]
    evaluate.main(["--ckpt", str(ours), "--suite", "languages", "--rows", "Hindi", "--out", str(ours / "hindi"), *flags])
    assert set(json.loads((ours / "hindi" / "evaluate.json").read_text("utf-8"))["languages"]["rows"]) == {"Hindi"}
    with pytest.raises(ValueError, match="Klingon"):
        evaluate.main(["--ckpt", str(ours), "--suite", "languages", "--rows", "Klingon", *flags])


def test_evaluate_refuses_bad_input(two_runs, tmp_path, capsys):
    def answer(*flags) -> str:
        with pytest.raises(SystemExit, match="2"):
            cli.one_line_errors(lambda: evaluate.main([str(flag) for flag in flags]))
        told = capsys.readouterr().err
        assert len(told.strip().splitlines()) == 1, told
        return told

    assert "--suite poems: for a run on shapes expected some of geneval,unseen,languages" in answer(
        "--ckpt", two_runs[0], "--suite", "poems"
    )
    assert "nothing" in answer("--ckpt", tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"no weights")
    assert "safetensors" in answer("--ckpt", tmp_path / "foreign")
    expert = sample.load_expert(str(two_runs[0]), CPU)
    expert.config["made_for"] = expert.made_for | {"data": "my-pictures"}
    expert.save_pretrained(tmp_path / "elsewhere")
    told = answer("--ckpt", tmp_path / "elsewhere")
    assert "was trained on my-pictures; the suites are geneval" in told and "recall,emoji-languages" in told


def test_layouts_of_the_official_evaluators(two_runs, tmp_path, monkeypatch):
    """GenEval: a folder a prompt with its metadata line and four samples. DPG-Bench: a two by two grid named after the
    prompt's file. WISE: one picture named after the prompt's id."""
    records = [{"tag": "colors", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a red star"},
               {"tag": "counting", "include": [], "prompt": "a photo of two rings"}]  # fmt: skip
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "COCOval2014000000001241.txt").write_text("A red star.\n")
    (tmp_path / "wise.json").write_text(json.dumps([{"Prompt": "a ripe banana", "Explanation": "yellow", "prompt_id": 401}]))

    def run(layout: str, prompts: str, *more: str) -> Path:
        out = tmp_path / f"for-{layout}"
        words = ["sample.py", "--ckpt", two_runs[0], "--prompts", tmp_path / prompts, "--layout", layout, "--out", out]
        words += ["--steps", 1, "--device", "cpu", "--dtype", "float32", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        sample.main()
        return out

    out = run("geneval", "evaluation_metadata.jsonl")
    files = [f"0000{i}/metadata.jsonl" for i in range(2)] + [f"0000{i}/samples/0000{k}.png" for i in range(2) for k in range(4)]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(files)
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == records[1]
    out = run("dpg", "dpg")
    assert [p.name for p in out.iterdir()] == ["COCOval2014000000001241.png"]
    grid = np.asarray(Image.open(out / "COCOval2014000000001241.png"))
    assert grid.shape == (64, 64, 3) and not np.array_equal(grid[:32, :32], grid[:32, 32:]), "four pictures, from four noises"
    assert [p.name for p in run("wise", "wise.json").iterdir()] == ["401.png"]
    refused = [("wise", "wise.json", ("--n", "2")), ("geneval", "dpg", ()), ("dpg", "dpg", ("--prompt", "x"))]
    for layout, prompts, more in refused:
        with pytest.raises(ValueError):
            run(layout, prompts, *more)
    (tmp_path / "broken.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="broken.jsonl"):
        run("geneval", "broken.jsonl")


def test_emoji_suites(llm_folder, tmp_path):
    """A tiny run on emoji, and its scores: pictures that are the true glyphs rank first, noise ranks by chance."""
    try:
        source = Emoji(16)
    except ValueError as error:
        pytest.skip(str(error))
    flags = ["--llm", llm_folder("qwen2"), "--device", "cpu", "--dtype", "float32", "--batch-size", "8", "--width", "32",
             "--depth", "2", "--steps", "2", "--image-size", "16", "--data", "emoji", "--out", tmp_path / "run"]  # fmt: skip
    train.main(list(map(str, flags)))
    short = ["--ckpt", str(tmp_path / "run"), "--limit", "40", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    evaluate.main([*short, "--rows", "en,it,zh", "--probe"])
    results = json.loads((tmp_path / "run" / "partial" / "evaluate.json").read_text("utf-8"))
    suite = results["emoji-languages"]
    assert list(suite["rows"]) == ["en", "it", "zh"] and suite["mean"]["pixels"]["n"] == 80, "the mean leaves English out"
    rows = results["unseen-names"]["rows"]
    assert rows["en"]["pixels"]["n"] + rows["as in English"]["pixels"]["n"] == 40
    asked = evaluate.read_emoji_suite("emoji-languages", source, 128)
    foreign = [prompt for row, prompt, _ in asked if row not in ("en", "as in English")]
    english = {name.lower() for text in source.trained for name in source.names[text]}
    assert not english & {prompt.lower() for prompt in foreign}, "a name as in English tests no other language"
    assert len([row for row, *_ in asked if row == "as in English"]) == 56 and len(foreign) == 13 * 128 - 56
    unseen = evaluate.read_emoji_suite("unseen-names", source, None)
    assert [prompt for row, prompt, _ in unseen if row == "as in English"] == ["rabbit", "kiss"], "others are called so too"
    halves = [evaluate.read_emoji_suite("recall", source, None, half=half) for half in ("choose", "report")]
    assert not set(halves[0]) & set(halves[1]) and sum(map(len, halves)) == len(source.trained)
    assert all(0.45 < len(half) / len(source.trained) < 0.55 for half in halves)
    found = results["probe"]["layer 1"]["nearest name"]
    assert 500 <= found["n"] < 13 * 40
    blind, middle = results["probe"]["layer 0"]["nearest name"], (len(source.trained) + 1) / 2
    assert blind["median rank"]["score"] == middle, (
        "the first layer's values after the caption know nothing of it: all are tied"
    )
    assert results["probe"]["layer 1"]["in a caption"]["n"] == 40
    with pytest.raises(ValueError, match="klingon: the rows of emoji-languages are en, "):
        evaluate.read_emoji_suite("emoji-languages", source, None, ["klingon"])
    assert Image.open(tmp_path / "run" / "partial" / "evaluate-emoji-languages.png").width > 100
    asked = evaluate.read_emoji_suite("emoji-languages", source, None)
    assert len({row for row, *_ in asked}) == 14 + 1 and {text for *_, text in asked} <= set(source.trained)
    assert ("it", "muso di gatto") in {
        (row, prompt) for row, prompt, _ in evaluate.read_emoji_suite("emoji-languages", source, 2000)}  # fmt: skip
    assert {text for *_, text in evaluate.read_emoji_suite("unseen-names", source, None)} == source.held_out
    glyphs = np.stack(list(source.glyphs.values()))
    noise = np.random.default_rng(0).integers(0, 256, glyphs.shape, np.uint8)
    for features in (pixel_features, learned_features(glyphs, steps=20)):
        assert (ranks(features(glyphs), features(glyphs), list(range(len(glyphs)))) == 1).all()
        places = ranks(features(noise), features(glyphs), list(range(len(glyphs))))
        assert 0.4 < np.median(places) / len(glyphs) < 0.6, "noise is as near to one glyph as to another"
    scores = evaluate.rank_scores(np.array([1] * 30 + [4] * 30 + [50] * 40), 100)
    assert scores["top 1"]["score"] == 0.3 and scores["top 5"]["score"] == 0.6 and scores["median rank"]["score"] == 4
    low, high = scores["top 1"]["interval"]
    assert 0.2 < low < 0.25 and 0.35 < high < 0.4, "a bootstrap of 100 prompts: about 1.96 sqrt(0.3 0.7 / 100) each way"


def test_the_llms_time_is_counted_whoever_runs_it(tiny_run):
    """The captions' pass, which stops early, and metaqueries' own."""
    run = train.prepare(train.parse_args([*tiny_run, "--bridge", "metaqueries", "--queries", "4"]), {}, {})
    with evaluate.stopwatch(run.llm.model.base_model) as clock:
        run.llm.lookup(["a red circle"])
        assert len(clock) == 2
        train.train_step(run, run.expert, ["a red circle"], np.zeros((1, 16, 16, 3), np.uint8))
        assert len(clock) == 4 and sorted(clock) == clock
    run.llm.lookup(["a blue square"])
    assert len(clock) == 4


def test_the_race_goes_on_where_it_stopped(llm_folder, tmp_path, monkeypatch, capsys):
    """Two bridges: as many pictures for each, each run trained and scored once, wherever the command was stopped."""
    flags = ["--race", "mot,last:hidden-state=2", "--seeds", "1", "--minutes", "0.001", "--out", str(tmp_path / "race"),
             "--suite", "geneval,position", "--limit", "1", "--steps", "1", "--device", "cpu", "--dtype", "float32",
             "--llm", str(llm_folder("qwen2")), "--batch-size", "8", "--width", "64", "--depth", "3"]  # fmt: skip
    asked, whole = [], evaluate.evaluate_shapes
    monkeypatch.setattr(evaluate, "evaluate_shapes", lambda args, runs: asked.append(args.ckpt) or whole(args, runs))
    save = train.save_run

    def dies(run: train.Run) -> None:
        save(run)
        if run.args.bridge == "last":
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_run", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(flags)
    monkeypatch.setattr(train, "save_run", save)
    evaluate.main(flags)
    assert [Path(name).name for name in asked] == ["mot-seed1", "last-hidden-state-2-seed1"]
    table = json.loads((tmp_path / "race" / "table.json").read_text("utf-8"))
    for weights in (tmp_path / "race").glob("*/*.safetensors"):
        weights.unlink()
    evaluate.main(flags)  # what is finished is kept without its weights
    assert len(asked) == 2 and json.loads((tmp_path / "race" / "table.json").read_text("utf-8")) == table
    assert set(table) == {"mot", "last:hidden-state=2"} and len({line["images"] for line in table.values()}) == 1
    for line in table.values():
        assert line["seeds"] == [1] and [len(curve) for curve in line["curves"]] == [evaluate.LEGS]
        assert line["curves"][0][-1]["minutes"] == line["images"] / line["images/s"] / 60 > 0
        assert line["suites"]["geneval"]["seeds"] == [line["suites"]["geneval"]["score"]], "of one seed, the mean is its own"
        assert set(line["suites"]) == {"geneval", "position"} and set(line["suites"]["position"]["rows"]) == {"early", "late"}
    assert Image.open(tmp_path / "race" / "race.png").width > 1000
    assert "last:hidden-state=2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", str(tmp_path), "--width", "3"])  # a flag of train.py means nothing without --race


def test_what_is_named_twice_is_one_run():
    args, _ = evaluate.parse_args(["--race", "mot,mot,lap", "--seeds", "1,1,2"])
    assert args.race == ["mot", "lap"] and args.seeds == [1, 2]
