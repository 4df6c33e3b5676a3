"""Adapters: where they go, that they start alike, and that the base comes back as it was."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, HYBRIDS, build, gpt2
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma4TextConfig, GenerationConfig, PreTrainedModel

from ia2.adapters import (
    ADAPTERS,
    adapter_state,
    attach,
    attention_projections,
    base_weights,
    check_adapter,
    default_learning_rate,
    detach,
    load_adapter_state,
    narrowed,
    peft_config,
    read_adapter_state,
    save_adapter,
    virtual_tokens,
)
from ia2.config import AdapterConfig
from ia2.errors import ConfigError, DataError, ModelError

SEPARATE = {"q_proj", "k_proj", "o_proj"}
EXPECTED = {
    "llama": SEPARATE,
    "qwen3": SEPARATE,
    "gemma3": SEPARATE,
    "mistral": SEPARATE,
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},  # the MLP has a c_proj too
    "gpt_neox": {"query_key_value", "dense"},
    "gptj": {"q_proj", "k_proj", "out_proj"},
    "opt": {"q_proj", "k_proj", "out_proj"},
    "falcon": {"query_key_value", "dense"},
    "bloom": {"query_key_value", "dense"},
    "mpt": {"Wqkv", "out_proj"},
    "qwen2": SEPARATE,
    "gemma2": SEPARATE,
    "olmo2": SEPARATE,
    "granite": SEPARATE,
    "cohere": SEPARATE,
    "stablelm": SEPARATE,
    "smollm3": SEPARATE,
    "mixtral": SEPARATE,
    "qwen3_moe": SEPARATE,
    "qwen3_next": SEPARATE,
    "lfm2": {"q_proj", "k_proj", "self_attn.out_proj"},  # a convolution has an out_proj too
}
family = pytest.mark.parametrize("name", list(FAMILIES))
kinds = pytest.mark.parametrize("kind", list(ADAPTERS))

# What PEFT prepends, and what a fresh adapter therefore changes at once.
PROMPTS = ("prefix", "prompt", "p-tuning")

# What cannot work, and what is said of it; everything else must.
REFUSED = {
    ("bottleneck", "mixtral"): "mixtures of experts have none",
    ("bottleneck", "qwen3_moe"): "mixtures of experts have none",
    ("prefix", "qwen3_next"): "has recurrent or convolutional ones",
    ("prefix", "lfm2"): "has recurrent or convolutional ones",
}
INPUTS = torch.arange(4, 24).reshape(2, 10)

PEFT: dict[str, dict[str, Any]] = {
    "IA3": {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["q_proj", "k_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "LORA": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def lora(model: PreTrainedModel, seed: int = 0, **fields: Any) -> Any:
    return attach(model, peft_config(model, AdapterConfig(rank=2, alpha=2, **fields)), seed)


def disturb(model: nn.Module, by: float | None = None) -> None:
    """Make the adapter do something: LoRA and others start as the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and by is None:
            parameter.data.add_(0.5)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


@pytest.mark.parametrize("name", list(ALL))
def test_projections(name: str) -> None:
    assert set(attention_projections(ALL[name]())) == EXPECTED[name]


@pytest.mark.parametrize("name", list(ALL))
@kinds
def test_every_type_in_every_family(kind: str, name: str) -> None:
    model = ALL[name]().requires_grad_(False)
    before = logits(model)
    config = AdapterConfig(type=kind)
    if (kind, name) in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind, name]):
            check_adapter(model, config)
        assert torch.equal(logits(model), before)
        return
    check_adapter(model, config)
    adapted: Any = attach(model, peft_config(model, config), seed=0)
    tokens = virtual_tokens(adapted)
    assert tokens == (16 if kind in PROMPTS else 0)
    if kind not in PROMPTS:
        assert torch.equal(logits(adapted), before), "a fresh adapter changes nothing"

    adapted.train()
    mask = torch.ones_like(INPUTS)
    mask[1, -3:] = 0
    output = adapted(input_ids=INPUTS, attention_mask=mask, logits_to_keep=4, use_cache=False)
    assert output.logits.shape[1] == 4
    output.logits.square().sum().backward()
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert not [n for n, p in trained if p.grad is None]
    assert any(p.grad.abs().sum() > 0 for _, p in trained)

    adapted.eval()
    disturb(adapted, 0.05)
    changed = logits(adapted)
    assert not torch.allclose(changed[:, -10:], before, atol=1e-4)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), changed)
    base = detach(adapted)
    assert base is model
    assert not any(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon", "bloom", "mpt", "qwen3_next"])
@pytest.mark.parametrize("kind", [*PROMPTS, "bottleneck", "full"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generates_what_it_predicts(kind: str, name: str) -> None:
    """PEFT puts virtual tokens into a generation by itself: the cache, positions and mask must fit."""
    if (kind, name) in REFUSED:
        return
    model = ALL[name]()
    adapted: Any = attach(model, peft_config(model, AdapterConfig(type=kind)), seed=0)
    disturb(adapted, 0.2)
    ids = INPUTS
    with torch.no_grad():
        for _ in range(10):
            output = adapted(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False
            )
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        model.generation_config = GenerationConfig()
        settings = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
        generated = adapted.generate(
            input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS), generation_config=settings
        )
    assert torch.equal(generated, ids)


@family
def test_virtual_tokens_count_as_tokens(name: str) -> None:
    """Virtual tokens with the embeddings, or keys and values, of real ones do what those would do."""
    model = FAMILIES[name]()
    start = torch.arange(30, 35)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([start.expand(2, -1), INPUTS], dim=1)).logits[:, 5:]
        cache = model(input_ids=start, use_cache=True).past_key_values
        keys = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    values = {
        "prompt": model.get_input_embeddings()(start[0]),
        # [layers, 2, heads, tokens, width] → [tokens, layers · 2 · heads · width]
        "prefix": torch.stack(keys).permute(3, 0, 1, 2, 4).flatten(1),
    }
    for kind, value in values.items():
        config = peft_config(model, AdapterConfig(type=kind, virtual_tokens=5))
        adapted: Any = attach(model, config, seed=0)
        adapted.prompt_encoder["default"].embedding.weight.data.copy_(value)
        assert torch.allclose(logits(adapted)[:, -10:], expected, atol=1e-4)
        detach(adapted)


@family
def test_attach_and_detach(name: str) -> None:
    model = FAMILIES[name]().requires_grad_(False)
    before = logits(model)
    names = [n for n, _ in model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = lora(model)
        trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 2 * len(EXPECTED[name])  # layers × (A, B) × modules
        assert all("lora_" in n for n in trainable)
        assert torch.equal(logits(adapted), before)  # B starts at zero
        disturb(adapted)
        assert not torch.allclose(logits(adapted), before, atol=1e-3)
        base = detach(adapted)
        assert base is model
        assert [n for n, _ in base.named_parameters()] == names
        assert not hasattr(base, "peft_config")
        assert not any(p.requires_grad for p in base.parameters())
        assert torch.equal(logits(base), before)
        again = lora(base)  # without a word about a second adapter
        assert torch.equal(logits(again), before)


@pytest.mark.parametrize("kind", list(PEFT))
def test_any_peft_configuration(kind: str, tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    given = {"peft_type": kind, **PEFT[kind]}
    adapted = attach(tiny_llama, peft_config(tiny_llama, AdapterConfig(peft=given)), seed=0)
    assert not adapted.training
    disturb(adapted)
    changed = logits(adapted)
    assert changed.shape != before.shape or not torch.allclose(changed, before, atol=1e-3)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), changed)
    state = adapter_state(adapted)
    base = detach(adapted)
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = attach(base, peft_config(base, AdapterConfig(peft=given)), seed=1)
    load_adapter_state(again, state)
    assert torch.equal(logits(again), changed)


def test_unknown_type(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"adapter type 'lore' is unknown\. Choose one of lora") as caught:
        peft_config(tiny_llama, AdapterConfig.model_construct(type="lore", peft=None))
    assert str(caught.value).endswith("Did you mean 'lora'?")


def test_peft_dictionaries_that_do_not_fit(tiny_llama: PreTrainedModel) -> None:
    def configure(**given: Any) -> Any:
        return peft_config(tiny_llama, AdapterConfig.model_construct(peft=given))

    with pytest.raises(ConfigError, match="needs the key peft_type"):
        configure(r=3)
    with pytest.raises(ConfigError, match="PEFT does not take this configuration"):
        configure(peft_type="LORA", ranks=3)
    with pytest.raises(ConfigError, match="PEFT does not take this configuration"):
        configure(peft_type="LORE")
    with pytest.raises(ConfigError, match="the adapter does not fit LlamaForCausalLM"):
        attach(tiny_llama, configure(peft_type="LORA", target_modules=["query"]), seed=0)


def test_failed_attach_leaves_the_base_usable(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    wrong = peft_config(
        tiny_llama, AdapterConfig.model_construct(peft={"peft_type": "LORA", "target_modules": ["query"]})
    )
    with pytest.raises(ConfigError):
        attach(tiny_llama, wrong, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = lora(tiny_llama)
    assert torch.equal(logits(adapted), before)


def test_same_seed_same_weights() -> None:
    states = []
    for seed, disturbance in ((5, 1), (5, 2), (6, 2)):
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        states.append(adapter_state(lora(FAMILIES["llama"](), seed)))
        assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state moved"
    first, same, other = states
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_own_target_modules(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama, target_modules=["v_proj"])
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("v_proj" in n for n in trainable)


def test_cross_attention_gets_no_adapter() -> None:
    model = gpt2(add_cross_attention=True)
    adapted = lora(model)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "crossattention" in n]


def test_attention_without_linear_layers() -> None:
    class Attention(nn.Module):
        layer_idx = 0

    class Config:
        model_type = "none"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.config = Config()

        def forward(self) -> None:
            raise NotImplementedError

    with pytest.raises(ModelError, match=r"no linear layers .* give adapter\.target_modules"):
        attention_projections(Model())


def test_base_weights_restores_what_is_trained(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama.requires_grad_(False))
    frozen = [p for n, p in adapted.named_parameters() if "layers.1" in n and "lora_A" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in adapted.named_parameters()}
    disturb(adapted)
    changed = logits(adapted)
    with base_weights(adapted):
        assert not torch.equal(logits(adapted), changed)
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="inside"), base_weights(adapted):
        raise RuntimeError("inside")
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == flags
    assert torch.equal(logits(adapted), changed), "the adapter is on again after an error"


def test_base_weights_of_a_bare_model(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    with base_weights(tiny_llama):
        assert torch.equal(logits(tiny_llama), before)


@family
def test_state_round_trip(name: str) -> None:
    adapted = lora(FAMILIES[name]())
    disturb(adapted)
    expected, state = logits(adapted), adapter_state(adapted)
    disturb(adapted)
    assert not torch.equal(logits(adapted), expected)
    load_adapter_state(adapted, state)
    assert torch.equal(logits(adapted), expected)
    # the state is a copy
    disturb(adapted)
    fresh = lora(FAMILIES[name](), seed=9)
    load_adapter_state(fresh, state)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("kind", list(PEFT))
def test_file_that_peft_has_written(kind: str, tmp_path: Path) -> None:
    given = {"peft_type": kind, **PEFT[kind]}

    def adapted(seed: int) -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(peft=given)), seed)

    first, second = adapted(0), adapted(1)
    before = adapter_state(second)
    expected = logits(second)
    disturb(first)
    first.save_pretrained(tmp_path)
    load_adapter_state(second, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(second), logits(first))
    load_adapter_state(second, before)
    assert torch.equal(logits(second), expected)


def test_state_of_other_shapes(tiny_llama: PreTrainedModel) -> None:
    state = adapter_state(lora(FAMILIES["llama"]()))
    config = peft_config(tiny_llama, AdapterConfig(rank=4, alpha=4))
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(attach(tiny_llama, config, 0), state)


def test_state_of_another_adapter(tiny_llama: PreTrainedModel) -> None:
    state = adapter_state(lora(FAMILIES["llama"](), target_modules=["v_proj"]))
    adapted = lora(tiny_llama)
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(adapted, state)


def test_part_of_a_state(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama)
    state = adapter_state(adapted)
    missing = next(iter(state))
    del state[missing]
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(adapted, state)


# ---------------------------------------------------------------------------------------- files


@kinds
def test_files_round_trip(kind: str, tmp_path: Path) -> None:
    def adapted(seed: int) -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(type=kind)), seed)

    first, second = adapted(0), adapted(1)
    disturb(first, 0.1)
    (tmp_path / "README.md").write_text("mine")
    save_adapter(first, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    written = (
        {"model.safetensors"} if kind == "full" else {"adapter_config.json", "adapter_model.safetensors"}
    )
    assert written <= names
    assert ("encoder.safetensors" in names) == (kind == "p-tuning")
    assert (tmp_path / "README.md").read_text() == "mine", "PEFT's card is not wanted"

    state = read_adapter_state(tmp_path)
    load_adapter_state(second, state)
    assert torch.equal(logits(second), logits(first))
    ours = adapter_state(first)
    if kind not in ("prefix", "prompt"):  # PEFT's name for the one tensor that there is differs
        assert state.keys() == ours.keys()
        assert all(torch.equal(state[name], ours[name]) for name in ours)
    if kind != "full":
        plain = PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path)
        assert torch.equal(logits(plain), logits(first))


@pytest.mark.parametrize("kind", ["lora", *PROMPTS, "full"])
def test_training_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    def adapted() -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(type=kind)), seed=0)

    def train(model: Any) -> None:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            model(input_ids=INPUTS, use_cache=False).logits.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    whole = adapted()
    train(whole)
    save_adapter(whole, tmp_path)
    train(whole)
    resumed = adapted()
    load_adapter_state(resumed, read_adapter_state(tmp_path))
    train(resumed)
    expected, state = adapter_state(whole), adapter_state(resumed)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_no_readme_is_left(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(lora(tiny_llama), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no adapter in it \(adapter_model\.safetensors or"):
        read_adapter_state(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter_state(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(DataError, match=r"two\.safetensors: no such file"):
        read_adapter_state(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    assert read_adapter_state(tmp_path).keys() == {"a", "b"}
    for broken in ("{", "{}", "[]"):
        index.write_text(broken)
        with pytest.raises(DataError, match=r"index\.json: not an index of weights"):
            read_adapter_state(tmp_path)


# ------------------------------------------------------------------------------- settings, refusals


def test_settings_of_the_types() -> None:
    fields = set(AdapterConfig.model_fields) - {"type", "peft"}
    assert all(set(kind.settings) <= fields for kind in ADAPTERS.values())
    assert fields == {name for kind in ADAPTERS.values() for name in kind.settings}


def test_narrowed() -> None:
    config = AdapterConfig(type="lora", rank=4, alpha=2, target_modules=["q_proj"])
    assert narrowed(config, "dora") == AdapterConfig(type="dora", rank=4, alpha=2, target_modules=["q_proj"])
    assert narrowed(config, "ia3") == AdapterConfig(type="ia3", target_modules=["q_proj"])
    assert narrowed(config, "prefix") == AdapterConfig(type="prefix")
    assert narrowed(AdapterConfig(peft={"peft_type": "LORA"}), "full") == AdapterConfig(type="full")
    with pytest.raises(ConfigError, match="Did you mean 'prompt'"):
        narrowed(config, "promt")


def test_default_learning_rates() -> None:
    for name, kind in ADAPTERS.items():
        assert default_learning_rate(AdapterConfig(type=name)) == kind.learning_rate

    def given(peft_type: str) -> float:
        return default_learning_rate(AdapterConfig(peft={"peft_type": peft_type}))

    assert given("IA3") == ADAPTERS["ia3"].learning_rate
    assert given("P_TUNING") == ADAPTERS["p-tuning"].learning_rate
    assert given("LOHA") == 1e-3
    with pytest.raises(ConfigError, match="adapter type 'lore' is unknown"):
        default_learning_rate(AdapterConfig(type="lore"))


def test_settings_reach_peft(tiny_llama: PreTrainedModel) -> None:
    def made(**fields: Any) -> Any:
        return peft_config(tiny_llama, AdapterConfig(**fields))

    assert (made().r, made().lora_alpha, made().lora_dropout) == (8, 8, 0.0)
    assert made(type="rslora", rank=2).use_rslora
    assert made(type="dora", dropout=0.1).use_dora
    assert made(type="dora", dropout=0.1).lora_dropout == 0.1
    assert made(type="vera").r == 256
    ia3 = made(type="ia3")
    assert ia3.target_modules == ia3.feedforward_modules == SEPARATE
    assert made(type="prefix", virtual_tokens=3).num_virtual_tokens == 3
    # two key-value heads of width 8, not the four heads of the queries
    prefix = made(type="prefix")
    assert (prefix.num_layers, prefix.num_attention_heads, prefix.token_dim) == (2, 2, 16)
    assert made(type="p-tuning").encoder_hidden_size == 32
    assert made(type="bottleneck", bottleneck_size=3).bottleneck_size == 3


def test_prompts_start_as_real_tokens(tiny_llama: PreTrainedModel) -> None:
    adapted: Any = attach(tiny_llama, peft_config(tiny_llama, AdapterConfig(type="prompt")), seed=0)
    weight = adapted.prompt_encoder["default"].embedding.weight
    table = tiny_llama.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "lore"}, r"adapter type 'lore' is unknown\. .* Did you mean 'lora'\?"),
        ({"type": "prefix", "rank": 4}, "adapter.rank is not a setting of prefix; it has virtual_tokens."),
        ({"type": "full", "dropout": 0.1}, "adapter.dropout is not a setting of full; it has none."),
        (
            {"virtual_tokens": 4},
            "adapter.virtual_tokens is not a setting of lora; it has rank, alpha, dropout,",
        ),
        ({"type": "bottleneck", "placement": "houlsby", "target_modules": ["mlp"]}, "placement does nothing"),
        ({"target_modules": ["q_prj"]}, "has no module named 'q_prj'. Did you mean 'q_proj'?"),
        ({"peft": {"peft_type": "IA3"}, "rank": 4}, "adapter.rank is given beside it"),
        ({"peft": {"peft_type": "IA3"}, "type": "ia3"}, "adapter.type is given beside it"),
    ],
)
def test_refused_settings(fields: dict[str, Any], message: str, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter(tiny_llama, AdapterConfig(**fields))
    text = str(caught.value)
    assert re.search(message, text) or message in text
    assert "\n" not in text


@pytest.mark.parametrize("fields", [{"type": "prefix"}, {"peft": {"peft_type": "PREFIX_TUNING"}}])
def test_prefix_tuning_needs_its_cache(fields: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    fields.get("peft", {}).setdefault("num_virtual_tokens", 3)
    config = AdapterConfig(**fields)
    check_adapter(tiny_llama, config)
    with pytest.raises(ConfigError, match="prefix tuning does not work with activation_checkpointing"):
        check_adapter(tiny_llama, config, activation_checkpointing=True)
    for name in HYBRIDS:
        with pytest.raises(ModelError, match="has recurrent or convolutional ones"):
            check_adapter(HYBRIDS[name](), config)


def test_models_with_a_table_in_every_layer() -> None:
    model = build(
        Gemma4TextConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128,
            num_kv_shared_layers=0,
            pad_token_id=0,
        )
    )
    for kind in ("prompt", "p-tuning"):
        with pytest.raises(ModelError, match="looks ids up in a table of every layer"):
            check_adapter(model, AdapterConfig(type=kind))
    # its two layers have heads of two widths
    with pytest.raises(ModelError, match="keys and values of one size in all layers"):
        check_adapter(model, AdapterConfig(type="prefix"))
    check_adapter(model, AdapterConfig(type="bottleneck"))


def test_models_that_read_no_embeddings(tiny_llama: PreTrainedModel, monkeypatch: Any) -> None:
    whole = tiny_llama.forward
    config = AdapterConfig(type="prompt")

    def refuses(inputs_embeds: Any = None, **given: Any) -> Any:
        if inputs_embeds is not None:
            raise ValueError("no embeddings here")
        return whole(**given)

    def differs(inputs_embeds: Any = None, **given: Any) -> Any:
        scaled = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds + 1}
        return whole(**given, **scaled)

    def forgets(position_ids: Any = None, **given: Any) -> Any:
        ids = given.get("input_ids")
        if position_ids is None and ids is not None:
            position_ids = torch.arange(ids.shape[1])[None]
        return whole(**given, position_ids=position_ids)

    for forward, message in (
        (refuses, r"takes no embeddings instead of ids \(no embeddings here\)"),
        (differs, "does not do with embeddings what it does with the ids"),
        (forgets, "counts positions anew at every step"),
    ):
        monkeypatch.setattr(tiny_llama, "forward", forward)
        with pytest.raises(ModelError, match=message):
            check_adapter(tiny_llama, config)


def test_quantised_weights_are_refused_where_they_do_not_work(tiny_llama: PreTrainedModel) -> None:
    """The refusals alone; ``test_quantised`` has quantised models."""
    model: Any = tiny_llama
    model.is_quantized = model.is_loaded_in_8bit = True
    for kind, message in (
        ("full", "cannot train the weights of a quantised model"),
        ("ia3", "ia3 does not work with quantised weights"),
        ("dora", "dora loses the scales of 8-bit weights on a CPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_adapter(model, AdapterConfig(type=kind))
    check_adapter(model, AdapterConfig())
