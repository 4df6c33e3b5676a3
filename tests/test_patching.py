from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import icl_base
from families import ALL, HEADS, llama
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_icl import planted

from ia2.analysis import answer_runs
from ia2.analysis.answer_runs import AnswerRuns, Packed, Rows
from ia2.analysis.causal import MAX_POSITIONS, CausalCheck, CausalTrial, Patched, Units, partners, units_of
from ia2.analysis.causal_summary import summarise
from ia2.analysis.patching import Patch, Unit, patched_log_probs
from ia2.analysis.sites import SiteCapture, has_site
from ia2.capture import ActivationCapture
from ia2.errors import DataError, ModelError
from ia2.inference import answer_pass
from ia2.models import BaseModel
from ia2.report.causal_figures import causal_figures

Ids = tuple[int, ...]

PLANTED = (planted.LAYER, planted.HEAD)


def random_ids(count: int, seed: int) -> Ids:
    return tuple(np.random.default_rng(seed).integers(4, 120, count).tolist())


SHARED = random_ids(20, 0)
PROMPTS = [SHARED + random_ids(n, n) for n in (5, 3, 9)]
ANSWERS = [random_ids(1, 21), random_ids(3, 22), random_ids(2, 23)]
CONTEXTS = [random_ids(4, 31) + prompt for prompt in PROMPTS]


def sites_of(model: Any) -> list[str]:
    return ["output", "heads", "residual", *(["neurons"] if has_site(model, "neurons") else [])]


def read(model: Any, tokenizer: Any, prompts: Sequence[Ids]) -> tuple[list[Any], np.ndarray]:
    """Activations at answer positions and log-probabilities of the answers."""
    found: list[Any] = [None] * len(prompts)
    log_p = np.empty(len(prompts))
    with SiteCapture(model, sites_of(model)) as capture:
        for output in answer_pass(
            model, tokenizer, list(zip(prompts, ANSWERS, strict=True)), capture=capture
        ):
            assert output.activations is not None and output.logits is not None
            found[output.index] = capture.split(output.activations)
            answer = ANSWERS[output.index]
            rows = output.logits.log_softmax(-1)
            log_p[output.index] = sum(float(rows[g, token]) for g, token in enumerate(answer))
    return found, log_p


def some_patches(model: Any, layers: Sequence[int]) -> list[Patch]:
    """Every head and layer, two heads at once, some neurons, and many things at once."""
    found: list[Patch] = [()]
    for layer in layers:
        found += [(Unit("output", layer),), (Unit("residual", layer),), (Unit("heads", layer, (0, 3)),)]
        found += [(Unit("heads", layer, (head,)),) for head in range(HEADS)]
        if has_site(model, "neurons"):
            found.append((Unit("neurons", layer, (0, 5, 9)),))
    found.append(tuple(Unit("output", layer) for layer in layers))
    found.append(
        (Unit("heads", layers[0], (1,)), Unit("residual", layers[0], (2, 3)), Unit("output", layers[-1]))
    )
    return found


def plain(model: Any, prompt: Ids, answer: Ids, source: Any, patch: Patch) -> float:
    """One patch in one row without a cache, element by element."""
    handles = []
    for unit in patch:
        capture = ActivationCapture(model, site=unit.site)
        values = source[unit.site][capture.layers.index(unit.layer)]
        width = values.shape[-1]
        each = width // HEADS if unit.site == "heads" else 1
        columns = (
            range(width) if unit.parts is None else [p * each + c for p in unit.parts for c in range(each)]
        )

        def put(tensor: Any, values: Any = values, columns: Any = columns) -> Any:
            changed = tensor.clone().reshape(-1, tensor.shape[-1])
            for place in range(len(answer)):
                for column in columns:
                    changed[len(changed) - len(answer) + place, column] = values[place, column]
            return changed.reshape(tensor.shape)

        def on_output(module: Any, args: Any, output: Any, put: Any = put) -> Any:
            return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

        def on_input(module: Any, args: Any, put: Any = put) -> Any:
            return (put(args[0]), *args[1:])

        module = capture.hooked[unit.layer]
        handles.append(
            module.register_forward_pre_hook(on_input)
            if unit.site in ("heads", "neurons")
            else module.register_forward_hook(on_output)
        )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    rows = logits[0, -len(answer) :].log_softmax(-1)
    return sum(float(rows[place, token]) for place, token in enumerate(answer))


@contextmanager
def layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way each example was run."""
    seen: list[str] = []
    of: Callable[..., Any] = AnswerRuns.of

    def watched(self: Any, prompt: Ids, answer: Ids) -> Any:
        found = of(self, prompt, answer)
        seen.append(type(found).__name__)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(AnswerRuns, "of", watched)
        yield seen


def compare(model: Any, tokenizer: Any, source_model: Any = None) -> np.ndarray:
    """Against the plain implementation; the change that each patch makes, ``[n, U]``."""
    sources, _ = read(source_model or model, tokenizer, CONTEXTS)
    layers = ActivationCapture(model).layers
    patches = some_patches(model, layers)
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    expected = [
        [plain(model, prompt, answer, source, patch) for patch in patches]
        for prompt, answer, source in zip(PROMPTS, ANSWERS, sources, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    return found - found[:, :1]


# ------------------------------------------------------------------------------------------ exactness

# Rows: windows shorter than the prompts, distances that are told by other means than position ids; and
# recurrent layers, where there is no cache.
WAYS = {
    "llama": Packed,
    "gpt2": Packed,
    "gpt_neox": Packed,
    "opt": Packed,
    "mixtral": Packed,
    "gemma3": Rows,
    "bloom": Rows,
    "mpt": Rows,
    "lfm2": Rows,
}


@pytest.mark.parametrize("family", WAYS)
def test_against_a_plain_implementation(
    family: str, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ALL[family]()
    with layouts(monkeypatch) as seen:
        change = compare(model, word_tokenizer)
    assert set(seen) == {WAYS[family].__name__}
    assert np.median(np.abs(change[:, 1:])) > 1e-3  # not a comparison of nothing with nothing


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "lfm2"])
def test_its_own_activations_change_nothing(family: str, word_tokenizer: Any) -> None:
    model = ALL[family]()
    sources, log_p = read(model, word_tokenizer, PROMPTS)
    patches = some_patches(model, ActivationCapture(model).layers)
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    np.testing.assert_allclose(found, np.repeat(log_p[:, None], len(patches), 1), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_last_residual_is_the_other_run(family: str, word_tokenizer: Any) -> None:
    model = ALL[family]()
    sources, log_p = read(model, word_tokenizer, CONTEXTS)
    last = ActivationCapture(model).layers[-1]
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, [(Unit("residual", last),)])
    np.testing.assert_allclose(found[:, 0], log_p, atol=2e-5)


def test_windows_longer_than_the_prompts_are_packed(
    word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from families import _GROUPED, build
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    model = build(Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=64, layer_types=kinds))
    with layouts(monkeypatch) as seen:
        compare(model, word_tokenizer)
    assert set(seen) == {"Packed"}


def test_adapters_see_the_patch(word_tokenizer: Any) -> None:
    """Projections of the patched model are LoRA layers, which get the base model's activations."""
    base = llama()
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False, lora_alpha=16
    )
    model = get_peft_model(llama(), config).eval()
    change = compare(model, word_tokenizer, source_model=base)
    sources, _ = read(base, word_tokenizer, CONTEXTS)
    with model.disable_adapter():
        without = patched_log_probs(
            model, PROMPTS, ANSWERS, sources, some_patches(model, ActivationCapture(model).layers)
        )
    assert np.abs(change - (without - without[:, :1])).max() > 0.01


def test_virtual_tokens(word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with layouts(monkeypatch) as seen:
        change = compare(model, word_tokenizer)
    assert set(seen) == {"Rows"} and np.abs(change).max() > 1e-3


def test_ways_and_batches_do_not_matter(word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    patches = some_patches(model, ActivationCapture(model).layers)
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    small = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches, batch_tokens=4)
    np.testing.assert_allclose(small, found, atol=2e-5)
    alone = [
        patched_log_probs(model, [p], [a], [s], patches)[0]
        for p, a, s in zip(PROMPTS, ANSWERS, sources, strict=True)
    ]
    np.testing.assert_allclose(alone, found, atol=2e-5)

    # a family that does not take the mask as it is meant is found out, and run as rows
    packed = Packed.logits

    def unmasked(self: Packed, count: int) -> Any:
        return packed(self, count) + 0.1 * torch.arange(128)

    with monkeypatch.context() as patched, layouts(monkeypatch) as seen:
        patched.setattr(Packed, "logits", unmasked)
        np.testing.assert_allclose(
            patched_log_probs(model, PROMPTS, ANSWERS, sources, patches), found, atol=2e-5
        )
    assert set(seen) == {"Rows"}
    monkeypatch.setattr(answer_runs, "_may_pack", lambda model: False)
    rows = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches, batch_tokens=70)
    np.testing.assert_allclose(rows, found, atol=2e-5)


def test_another_answer_can_be_scored(word_tokenizer: Any) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    patch = (Unit("output", 0),)
    for token in (5, 99):
        found = patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], sources, [patch], scored=[(token,)])
        assert found[0, 0] == pytest.approx(plain(model, PROMPTS[0], (token,), sources[0], patch), abs=2e-5)


def test_a_prompt_of_one_token(word_tokenizer: Any) -> None:
    model = llama()
    with SiteCapture(model, ["output"]) as capture:
        output = next(answer_pass(model, word_tokenizer, [(PROMPTS[0], (7,))], capture=capture))
        assert output.activations is not None
        source = capture.split(output.activations)
    patch = (Unit("output", 1),)
    found = patched_log_probs(model, [(9,)], [(7,)], [source], [patch])
    assert found[0, 0] == pytest.approx(plain(model, (9,), (7,), source, patch), abs=2e-5)


def test_what_does_not_fit_is_refused(word_tokenizer: Any) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    with pytest.raises(ValueError, match=r"output are \(2, 1, 32\); \[2, 3, w\]"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[1:2], sources[:1], [(Unit("output", 0),)])
    with pytest.raises(ValueError, match="layer 7 has no attention"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], sources[:1], [(Unit("output", 7),)])
    with pytest.raises(ValueError, match="not there; there are 4"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], sources[:1], [(Unit("heads", 0, (4,)),)])
    odd = [{"heads": sources[0]["heads"][..., :30]}]
    with pytest.raises(ModelError, match="do not divide into 4 heads"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], odd, [(Unit("heads", 0, (0,)),)])


# ---------------------------------------------------------------------------------- planted mechanism


@pytest.fixture(scope="module")
def planted_base() -> BaseModel:
    return icl_base(Path(__file__).parent / "tiny_icl" / "planted_model")


@pytest.fixture(scope="module")
def queries(planted_base: BaseModel) -> tuple[list[Ids], list[Ids], list[Ids]]:
    """Prompts with demonstrations, without, and the right answers (which ICL gives)."""
    tokenizer = planted_base.tokenizer
    demos = "".join(f"{x}{y}\n\n" for x, y in planted.planted_examples(12, 1))
    rows = planted.planted_examples(16, 2)

    def ids(text: str, **options: Any) -> Ids:
        return tuple(tokenizer(text, **options)["input_ids"])

    return (
        [ids(demos + x) for x, _ in rows],
        [ids(x) for x, _ in rows],
        [ids(y, add_special_tokens=False) for _, y in rows],
    )


def sft(base: BaseModel, seed: int = 0, steps: int = 2) -> Any:
    """A copy of the model that is on its way to know the answers without demonstrations."""
    tokenizer = base.tokenizer
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(base.model), config)
    rows = planted.planted_examples(12, 1)
    prompts = torch.tensor([tokenizer(x)["input_ids"] for x, _ in rows])
    labels = torch.tensor([tokenizer(y, add_special_tokens=False)["input_ids"][0] for _, y in rows])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(input_ids=prompts).logits[:, -1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_one_head_carries_the_task(planted_base: BaseModel) -> None:
    """By ablation: without this head the answers are guesses, without any other one they are right."""
    model = planted_base.model
    assert planted.accuracy(model, tasks=60) > 0.98
    for layer in range(4):
        for head in range(4):
            with planted.without_head(model, layer, head):
                accuracy = planted.accuracy(model, tasks=60)
            right = accuracy < 0.3 if (layer, head) == PLANTED else accuracy > 0.95
            assert right, (layer, head, accuracy)


@pytest.fixture(scope="module")
def section(planted_base: BaseModel, queries: Any) -> dict[str, Any]:
    """Two trials, that is two adapters, on the same queries."""
    trials = []
    for seed in range(2):
        model = planted_base.model
        some = {
            "planted head and another": (Unit("heads", 1, (0, 3)),),
            "other heads": (Unit("heads", 1, (0, 1, 2)),),
        }
        check = CausalCheck(planted_base.tokenizer, units_of(model, sets=some), *queries, seed=seed)
        check.read_icl(model)
        for name, target in (("base", model), ("sft", sft(planted_base, seed))):
            check.read_target(name, target)
            check.read_reverse(name, model)
        trials.append(check.finish())
    return summarise(trials)


@pytest.mark.parametrize("target", ["base", "sft"])
@pytest.mark.parametrize(("direction", "fraction"), [("targets", "recovered"), ("reverse", "broken")])
def test_the_planted_head_and_layer_are_found(
    section: dict[str, Any], target: str, direction: str, fraction: str
) -> None:
    found = section[direction][target]
    layer, head = PLANTED
    heads, layers = np.array(found["heads"][fraction]), np.array(found["layers"][fraction])
    assert np.unravel_index(heads.argmax(), heads.shape) == PLANTED and layers.argmax() == layer
    assert heads[PLANTED] > 0.5 and layers[layer] > 0.5
    assert found["heads"]["low"][layer][head] > 0.5 and found["layers"]["low"][layer] > 0.5
    assert found["heads"]["q"][layer][head] < 1e-6 and found["layers"]["q"][layer] < 1e-6
    assert np.array(found["all"][fraction]) > 0.5
    # everybody else: bystanders write where nothing reads, the first layer gathers the query
    others = np.ones_like(heads, dtype=bool)
    others[PLANTED] = False
    assert np.abs(heads[others]).max() < 0.05
    assert np.abs(np.delete(layers, layer)).max() < 0.1
    assert np.array(found["heads"]["high"])[others].max() < 0.1
    bystanders = others & (np.arange(4)[:, None] >= layer)
    assert np.abs(heads[bystanders]).max() < 0.01
    assert found["sets"][fraction][0] > 0.5 and abs(found["sets"][fraction][1]) < 0.05
    # and nobody else is taken for one that carries the task
    assert np.argwhere(np.array(found["heads"]["q"]) < 0.05).tolist() == [list(PLANTED)]
    assert np.flatnonzero(np.array(found["layers"]["q"]) < 0.05).tolist() == [layer]


@pytest.mark.parametrize("target", ["base", "sft"])
def test_controls_recover_nothing(section: dict[str, Any], target: str) -> None:
    """Another query's activation brings that query's answer, the run's own one on another query nothing."""
    control = section["targets"][target]["control"]
    other, own = control["other"], control["own"]
    assert other["heads"]["recovered"][planted.LAYER][planted.HEAD] < -0.1
    assert np.array(other["heads"]["high"]).max() < 0.1 and np.array(other["layers"]["high"]).max() < 0.1
    # a model on its way to knowing the answers also loses its own one
    assert np.array(own["layers"]["high"]).max() < 0.1 and np.array(own["all"]["high"]) < 0.1
    assert np.abs(own["layers"]["recovered"][planted.LAYER]) < 0.05


def test_what_the_section_holds(section: dict[str, Any]) -> None:
    assert (section["queries"], section["trials"], section["heads"]) == (16, 2, 4)
    assert section["sets"] == ["planted head and another", "other heads"]
    found = section["targets"]["sft"]
    assert found["gap"]["low"] < found["gap"]["value"] < found["gap"]["high"]
    assert found["aim"] - found["clean"] == pytest.approx(found["gap"]["value"])
    assert np.shape(found["heads"]["by_trial"]) == (2, 4, 4) and np.shape(found["all"]["by_trial"]) == (2,)
    for trial in found["heads"]["by_trial"]:
        assert np.unravel_index(np.argmax(trial), (4, 4)) == PLANTED
    last = found["residual"]
    assert last["recovered"][3] == pytest.approx(1, abs=1e-3)
    assert last["change"][3] == pytest.approx(found["gap"]["value"], abs=1e-3)
    # where the runs are exchanged, so are their log-probabilities
    assert section["reverse"]["sft"]["clean"] == pytest.approx(found["aim"], abs=1e-4)
    assert section["reverse"]["sft"]["aim"] == pytest.approx(found["clean"], abs=1e-4)


def test_long_answers_and_missing_neurons(word_tokenizer: Any) -> None:
    """Controls of queries whose answers are of other lengths; a mixture of experts has no neurons."""
    model = ALL["mixtral"]()
    answers = [random_ids(n, n) for n in (1, 3, MAX_POSITIONS + 4)]
    check = CausalCheck(word_tokenizer, units_of(model), CONTEXTS, PROMPTS, answers)
    check.read_icl(model)
    check.read_target("base", model)
    check.read_reverse("base", model)
    trial = check.finish()
    assert list(trial.units.groups) == ["heads", "layers", "residual", "all"]
    cut = [answer[:MAX_POSITIONS] for answer in answers]
    for prompts, found in ((PROMPTS, trial.targets["base"]), (CONTEXTS, trial.reverse["base"])):
        expected = [plain(model, p, a, {}, ()) for p, a in zip(prompts, cut, strict=True)]
        np.testing.assert_allclose(found.clean, expected, atol=1e-4)
    assert trial.targets["base"].controls["other"]["heads"].shape == (3, 2, HEADS)
    np.testing.assert_allclose(
        trial.targets["base"].patched["residual"][:, -1], trial.targets["base"].aim, atol=1e-4
    )


# ----------------------------------------------------------------------------------------- statistics


def test_partners_have_other_answers_where_possible() -> None:
    answers: list[Ids] = [(1,)] * 4 + [(2,)] * 3 + [(3,)] * 1
    for seed in range(5):
        found = partners(answers, seed)
        assert sorted(found) == list(range(8))
        assert all(answers[i] != answers[j] for i, j in enumerate(found))
    many: list[Ids] = [(1,)] * 6 + [(2,)] * 2
    found = partners(many)
    assert sorted(found) == list(range(8)) and all(i != j for i, j in enumerate(found))
    assert sum(many[i] != many[j] for i, j in enumerate(found)) == 4
    assert partners([(1,), (1,), (1,)]) != [0, 1, 2] and partners(many, 1) != partners(many, 2)


def test_one_query_is_refused(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at least two queries, and there is 1"):
        CausalCheck(word_tokenizer, units_of(llama()), CONTEXTS[:1], PROMPTS[:1], ANSWERS[:1])


def made_trial(gap: float, seed: int, n: int = 40, layers: int = 3, heads: int = 8) -> CausalTrial:
    """Head 2 of the second layer recovers half of the gap; the others do nothing, with noise."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(-3, 0.5, n)
    aim = clean + rng.normal(gap, 0.3, n)
    change = rng.normal(0, 0.05, (n, layers, heads))
    change[:, 1, 2] += (aim - clean) / 2
    units = Units(
        list(range(layers)),
        heads,
        {
            "heads": tuple((Unit("heads", i, (h,)),) for i in range(layers) for h in range(heads)),
            "layers": tuple((Unit("output", i),) for i in range(layers)),
            "all": ((),),
        },
    )
    by_layer = change.sum(2)
    patched = {
        "heads": clean[:, None, None] + change,
        "layers": clean[:, None] + by_layer,
        "all": clean + by_layer.sum(1),
    }
    controls = {"other": {group: values - 0.01 for group, values in patched.items()}}
    return CausalTrial(units, list(range(n)), {"sft": Patched(clean, aim, patched, controls)})


def test_fractions_are_ratios_of_means() -> None:
    trials = [made_trial(2.0, seed) for seed in range(3)]
    found = summarise(trials)["targets"]["sft"]
    gap = np.concatenate([t.targets["sft"].aim - t.targets["sft"].clean for t in trials])
    change = np.concatenate(
        [t.targets["sft"].patched["heads"] - t.targets["sft"].clean[:, None, None] for t in trials]
    )
    np.testing.assert_allclose(found["heads"]["recovered"], change.mean(0) / gap.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["heads"]["change"], change.mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        found["heads"]["by_trial"][0], change[:40].mean(0) / gap[:40].mean(), rtol=1e-9
    )
    low, high = (np.array(found["heads"][end]) for end in ("low", "high"))
    assert (low <= np.array(found["heads"]["recovered"])).all()
    assert (high >= np.array(found["heads"]["recovered"])).all()
    assert 0.4 < low[1, 2] < 0.5 < high[1, 2] < 0.6
    certain = np.array(found["heads"]["q"]) < 0.05
    assert np.argwhere(certain).tolist() == [[1, 2]]
    # twice the same trial says no more about the heads than once
    twice, once = summarise([trials[0]] * 2)["targets"]["sft"], summarise(trials[:1])["targets"]["sft"]
    np.testing.assert_allclose(twice["heads"]["q"], once["heads"]["q"])
    np.testing.assert_allclose(twice["heads"]["low"], once["heads"]["low"], atol=0.02)


def test_small_changes_are_no_discoveries() -> None:
    """A mean change just at the least that counts is found as rarely as the level says."""
    hits = 0
    for seed in range(40):
        trial = made_trial(2.0, 100 + seed)
        target = trial.targets["sft"]
        noise = np.random.default_rng(seed).normal(0.02 * 2.0, 0.2, (40, 3))
        target.patched["layers"] = target.clean[:, None] + noise
        hits += (np.array(summarise([trial])["targets"]["sft"]["layers"]["q"]) < 0.05).any()
    assert hits <= 6
    # far beyond it, nearly always
    target.patched["layers"] = target.clean[:, None] + noise + 0.5
    assert (np.array(summarise([trial])["targets"]["sft"]["layers"]["q"]) < 0.05).all()


def test_no_fraction_of_nothing() -> None:
    found = summarise([made_trial(0.0, 0)])["targets"]["sft"]
    assert found["gap"]["low"] < 0 < found["gap"]["high"]
    for group in ("heads", "layers", "all"):
        for key in ("recovered", "low", "high"):
            assert np.isnan(np.array(found[group][key])).all()
        for key in ("change", "change_low", "change_high", "q"):
            assert np.isfinite(np.array(found[group][key])).all()
    # certain, but too small to divide by; a change that is always the same has no variance to test with
    trial = made_trial(0.0, 0)
    trial.targets["sft"].aim = trial.targets["sft"].clean + 0.02
    trial.targets["sft"].patched["layers"] = trial.targets["sft"].clean[:, None] + np.array([0, 0.5, 5e-4])
    found = summarise([trial])["targets"]["sft"]
    assert found["gap"]["low"] > 0 and np.isnan(found["layers"]["recovered"]).all()
    assert found["layers"]["q"][0] == 1 and found["layers"]["q"][2] == 1 and found["layers"]["q"][1] < 1e-9


# -------------------------------------------------------------------------------------------- figures


def test_figures(section: dict[str, Any], tmp_path: Path) -> None:
    import json

    kept = json.loads(json.dumps(section))
    figures = {figure.name: figure for figure in causal_figures(kept, "tiny")}
    assert list(figures) == [
        "causal-heads",
        "causal-layers",
        "causal-heads-reverse",
        "causal-layers-reverse",
    ]
    for name, figure in figures.items():
        assert figure.save(tmp_path / f"{name}.svg").stat().st_size > 5000
        assert len(figure.panels) == 2 and len(figure.pictures()) == 2
    layer, head = PLANTED
    found = section["targets"]["base"]["heads"]
    first = [entry.text for entry in figures["causal-heads"].numbers.rows[0]]
    assert first[0] == "base" and first[2] == f"layer {layer}, head {head}"
    assert first[3].startswith(f"{found['recovered'][layer][head]:.3f} [{found['low'][layer][head]:.3f},")
    by_layer = [entry.text for entry in figures["causal-layers"].numbers.rows[layer]]
    assert by_layer[:2] == ["base", str(layer)]
    assert by_layer[2].startswith(f"{section['targets']['base']['layers']['recovered'][layer]:.3f}")
    assert figures["causal-layers"].numbers.rows[4][1].text == "all at once"


@pytest.mark.parametrize("case", ["no fraction", "null", "one layer", "no controls", "no heads", "nothing"])
def test_figures_of_odd_sections(case: str, tmp_path: Path) -> None:
    layers, heads = (1, 1) if case == "one layer" else (3, 8)
    trial = made_trial(
        0.0 if case in ("no fraction", "null") else 2.0, 0, layers=max(layers, 2), heads=max(heads, 3)
    )
    target = trial.targets["sft"]
    if case == "one layer":
        trial.units.layers[1:] = []
        for values in (target.patched, target.controls["other"]):
            values["heads"], values["layers"] = values["heads"][:, :1, :1], values["layers"][:, :1]
    if case == "no controls":
        target.controls = {}
    if case == "no heads":
        del target.patched["heads"], target.controls["other"]["heads"]
    if case == "nothing":
        trial.targets = {}
    section = summarise([trial])
    if case == "null":
        section = _null(section)
    figures = causal_figures(section, "made up")
    assert [figure.name for figure in figures] == {
        "no heads": ["causal-layers"],
        "nothing": [],
    }.get(case, ["causal-heads", "causal-layers"])
    for figure in figures:
        assert figure.save(tmp_path / f"{figure.name}.svg").stat().st_size > 3000
        cells = [entry.text for row in figure.numbers.rows for entry in row]
        assert not any("nan" in cell for cell in cells)
        assert ("sft (change, nats)" in cells) == (
            figure.name == "causal-layers" and case in ("no fraction", "null")
        )


def _null(value: Any) -> Any:
    """As the writer of ``analysis.json`` leaves it."""
    if isinstance(value, dict):
        return {key: _null(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_null(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value
