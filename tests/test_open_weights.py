"""Open weights: the answers of transformers, recorded and live; folders that do not match; generation."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.flop_counter import FlopCounterMode

import decoder.flops  # noqa: F401 (registers formulas)
from benchmarks.parity_hf import (
    CASES,
    GOLDEN,
    NEW_TOKENS,
    TOLERANCE,
    compare,
    difference,
    prompts,
    step_by_step,
    write_weights,
)
from bridge import Bridge, BridgeConfig
from decoder.open import CheckpointError, OpenDecoder, PromptError, Tokenizer, read_config

RECORDED: dict[str, Any] = json.loads((GOLDEN / "recorded.json").read_text())["cases"]
V3, QWEN, OLMOE = "deepseek-v3", "qwen3-moe", "olmoe"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints that the recorded answers are of."""
    made = {}
    for name, recorded in RECORDED.items():
        made[name] = tmp_path_factory.mktemp(name)
        (made[name] / "config.json").write_text(json.dumps(CASES[name]))
        write_weights(made[name] / "model.safetensors", recorded["tensors"], recorded["seed"])
    return made


@pytest.fixture(scope="module")
def decoders(folders: dict[str, Path]) -> dict[str, OpenDecoder]:
    return {name: OpenDecoder.from_pretrained(folder, dtype=torch.float32) for name, folder in folders.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A DeepSeek-V3 checkpoint to damage."""
    shutil.copytree(folders[V3], tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        OpenDecoder.from_pretrained(folder)
    assert str(caught.value.file) in str(caught.value)
    return caught.value


# Parity


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_that_transformers_gave(name: str, decoders: dict[str, OpenDecoder]) -> None:
    decoder, ids = decoders[name], prompts(name, RECORDED[name]["seed"])
    recorded = load_file(GOLDEN / "logits.safetensors")
    expected = [recorded[f"{name}.{row}"] for row in range(len(ids))]
    assert difference([decoder(torch.tensor([each]))[0, 3::4] for each in ids], expected) <= TOLERANCE
    assert difference([step_by_step(decoder, each)[3::4] for each in ids], expected) <= TOLERANCE
    alone = [decoder.generate([each], NEW_TOKENS, eos=())[0].ids for each in ids]
    together = [each.ids for each in decoder.generate(ids, NEW_TOKENS, eos=())]
    assert alone == together == RECORDED[name]["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_transformers_here(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: uv pip install --group peers")
    prefill, decode, equal, compared, _ = compare(name, seed=1)
    assert max(prefill, decode) <= TOLERANCE
    assert equal == compared > 0


@pytest.mark.parametrize("name", [V3, QWEN, OLMOE])
def test_a_prompt_in_parts_gives_the_logits_of_the_whole(name: str, decoders: dict[str, OpenDecoder]) -> None:
    decoder = decoders[name]
    ids = torch.tensor([prompts(name, 0)[0]] * 2)
    cache = decoder.new_cache(2, ids.shape[1])
    parts = [decoder(part, cache) for part in ids.split((9, 15, 1, 12), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_close_to_single_precision(name: str, folders: dict[str, Path], decoders: Any) -> None:
    half = OpenDecoder.from_pretrained(folders[name], dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if ".router." not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in half.named_parameters() if ".router." in n} <= {torch.float32}
    ids = torch.tensor([prompts(name, 0)[0]])
    alike = torch.cosine_similarity(half(ids).float(), decoders[name](ids), dim=-1)
    assert float(alike.median()) > 0.99


def test_every_weight_of_a_checkpoint_bears_on_the_answer(decoders: dict[str, OpenDecoder]) -> None:
    ids = torch.tensor([prompts(V3, 0)[0]])
    before = decoders[V3](ids)
    for name, weight in decoders[V3].state_dict().items():
        kept = weight.clone()
        # Not by one value for all, which would leave the choice of experts as it is.
        weight += torch.linspace(-1, 1, len(weight)).view(-1, *[1] * (weight.ndim - 1))
        after = decoders[V3](ids)
        weight.copy_(kept)
        assert not torch.allclose(after, before), name


# Costs


@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_the_tensors(name: str, decoders: dict[str, OpenDecoder]) -> None:
    decoder = decoders[name]
    assert decoder.config.parameters == sum(p.numel() for p in decoder.parameters())
    cache = decoder.new_cache(1, 10)
    assert decoder.config.cache_bytes(cache.places) == sum(buffer.nbytes for buffer in cache.buffers)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_are_done(name: str, decoders: dict[str, OpenDecoder]) -> None:
    decoder, config = decoders[name], decoders[name].config
    cache = decoder.new_cache(1, 101)
    done = []
    for context in (0, 100):
        cache.empty, cache.used_B[:] = False, context
        with FlopCounterMode(display=False) as counter:
            decoder(torch.tensor([[5]]), cache)
        done.append(counter.get_total_flops())
    assert done[0] == pytest.approx(config.flops_per_token(), rel=0.01)
    assert done[1] - done[0] == pytest.approx(config.flops_per_token(100) - config.flops_per_token(), rel=0.01)


PUBLISHED = {
    # Sizes of the published configurations; parameters, active parameters and, for DeepSeek, cache values a token
    "deepseek-v3": (
        {"vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128}
        | {"num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048}
        | {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "first_k_dense_replace": 3}
        | {"topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128},
        671e9,
        37.5e9,
    ),
    "qwen3-moe": (
        {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128}
        | {"num_experts_per_tok": 8, "mlp_only_layers": []},
        30.5e9,
        3.35e9,
    ),
    "olmoe": (
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
        6.92e9,
        1.28e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_cost_what_was_published(name: str, tmp_path: Path) -> None:
    sizes, parameters, active = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(CASES[name] | sizes))
    config = read_config(tmp_path)
    assert config.parameters == pytest.approx(parameters, rel=0.01)
    assert config.active_parameters == pytest.approx(active, rel=0.01)


# Checkpoints


def test_shards_are_read_as_one_file_is(folder: Path, decoders: dict[str, OpenDecoder]) -> None:
    into_shards(folder)
    sharded = OpenDecoder.from_pretrained(folder, dtype=torch.float32)
    for name, value in sharded.state_dict().items():
        torch.testing.assert_close(value, decoders[V3].state_dict()[name], atol=0, rtol=0)


def test_a_shard_that_is_absent_is_named_with_what_it_holds(folder: Path) -> None:
    into_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = refused(folder)
    assert error.code == "missing-file"
    assert "model-00002-of-00003.safetensors is not there" in str(error)
    assert "model.embed_tokens.weight" in error.tensors


def test_an_index_leads_to_no_file_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert refused(folder).code == "damaged-file"


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(EXPERT), f"1 missing: {EXPERT}"),
        (lambda t: t.update({"model.layers.9.surplus": torch.zeros(3)}), "1 not expected: model.layers.9.surplus"),
        (lambda t: t.update({EXPERT: torch.zeros(32, 64)}), "has the shape [32, 64]: expected [32, 128]"),
        (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), "has the shape [128, 32]: expected [32, 128]"),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}), "is of type F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(folder: Path, edit: Any, said: str) -> None:
    change_tensors(folder, edit)
    error = refused(folder)
    assert error.code == "tensor-mismatch"
    assert error.file == folder / "model.safetensors"
    assert said in str(error)
    assert error.tensors


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({EXPERT: torch.zeros(32, 128)}, folder / "second.safetensors")
    error = refused(folder)
    assert f"{EXPERT} is in model.safetensors and in second.safetensors: expected once" in str(error)


def test_tensors_that_take_no_part_are_passed_over(folder: Path, folders: dict[str, Path]) -> None:
    draft = {"model.layers.3.eh_proj.weight": torch.zeros(128, 256)}
    change_tensors(folder, lambda tensors: tensors.update(draft))
    assert refused(folder).code == "tensor-mismatch"
    change(folder, num_nextn_predict_layers=1)
    OpenDecoder.from_pretrained(folder)
    shutil.copytree(folders["qwen3-moe-tied"], folder, dirs_exist_ok=True)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 128)}))
    OpenDecoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"model_type": "llama"}, "unknown-architecture", "deepseek_v2, deepseek_v3, qwen3_moe, olmoe"),
        ({"quantization_config": {"quant_method": "fp8"}}, "unsupported-option", "bfloat16"),
        ({"sliding_window": 512}, "unsupported-option", "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "unsupported-option", "sliding_attention"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unsupported-option", '"default" or "yarn"'),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "unsupported-option", "dynamic"),
        ({"hidden_act": "gelu"}, "unsupported-option", '"silu"'),
        ({"scoring_func": "softmax"}, "unsupported-option", '"sigmoid"'),
        ({"topk_method": "greedy"}, "unsupported-option", '"noaux_tc"'),
        ({"partial_rotary_factor": 0.5}, "unsupported-option", "partial_rotary_factor"),
        ({"kv_lora_rank": None}, "damaged-file", 'lacks "kv_lora_rank"'),
        ({"hidden_size": "128"}, "damaged-file", "\"hidden_size\" is '128': expected a whole number from 1"),
        ({"hidden_size": 100}, "damaged-file", "a multiple of 8"),
        ({"num_hidden_layers": -1}, "damaged-file", "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "damaged-file", "from 1 to 512"),
        ({"n_group": 3}, "damaged-file", '"n_group" to divide the experts'),
        ({"num_experts_per_tok": 9}, "damaged-file", "at most the 8 experts"),
        ({"rms_norm_eps": "small"}, "damaged-file", "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "damaged-file", "true or false"),
        ({"rope_scaling": {"type": "yarn"}}, "damaged-file", 'lacks "factor"'),
        ({"num_hidden_layers": 4}, "tensor-mismatch", "model.layers.3."),
    ],
)
def test_a_configuration_that_cannot_be_run_names_the_key(folder: Path, values: dict, code: str, said: str) -> None:
    change(folder, **values)
    error = refused(folder)
    assert error.code == code
    assert said in str(error)


def test_a_folder_without_its_files_says_which(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors.index.json" in str(refused(folder))
    (folder / "config.json").unlink()
    error = refused(folder)
    assert error.code == "missing-file"
    assert error.file == folder / "config.json"
    (folder / "config.json").write_text("{")
    assert refused(folder).code == "damaged-file"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_is_cut_or_has_a_damaged_header_is_refused(folder: Path, data: st.DataObject) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, 7 + header // 8))
        file.write_bytes(whole[:at] + bytes([data.draw(st.integers(128, 255))]) + whole[at + 1 :])
    try:
        assert refused(folder).code in ("damaged-file", "tensor-mismatch")
    finally:
        file.write_bytes(whole)


JSON = st.none() | st.booleans() | st.integers(-3, 1000) | st.floats(allow_nan=False) | st.text(max_size=5)
JSON_TREE = st.recursive(JSON, lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CASES)), data=st.data())
def test_any_value_in_a_configuration_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*CASES[name], "rope_parameters", "quantization_config", "layer_types"]))
    (tmp_path / "config.json").write_text(json.dumps(CASES[name] | {key: data.draw(JSON_TREE)}))
    try:
        config = read_config(tmp_path)
    except CheckpointError:
        return
    assert config.parameters > 0
    assert config.attention.rope.inverse_frequencies(config.attention.rotary_dim).isfinite().all()


def test_what_ends_a_text_comes_from_the_generation_configuration(folder: Path) -> None:
    assert read_config(folder).end_tokens == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert read_config(folder).end_tokens == (5, 7)


# Generation


def test_tokens_are_told_as_they_come_and_end_at_the_end_token(decoders: dict[str, OpenDecoder]) -> None:
    ids, expected = prompts(V3, 0), RECORDED[V3]["tokens"]
    told: dict[int, list[int]] = {0: [], 1: []}
    done = decoders[V3].generate(ids, NEW_TOKENS, eos=(expected[1][3],), on_token=lambda row, i: told[row].append(i))
    assert [each.ids for each in done] == [told[0], told[1]]
    assert done[1].ids == expected[1][:4]
    assert done[1].ended == "eos"
    assert (done[0].ids, done[0].ended) == (expected[0], "length")


def test_sampling_follows_its_seed_and_the_distribution(decoders: dict[str, OpenDecoder]) -> None:
    decoder, ids = decoders[QWEN], prompts(QWEN, 0)
    drawn = [[each.ids for each in decoder.generate(ids, 8, temperature=1.0, seed=seed, eos=())] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    p = (decoder(torch.tensor([ids[0][-6:]]))[0, -1] / 0.5).softmax(-1)
    many = decoder.generate([ids[0][-6:]] * 500, 1, temperature=0.5, seed=0, eos=())
    seen = torch.bincount(torch.tensor([each.ids[0] for each in many]), minlength=96) / len(many)
    assert float((seen - p).abs().max()) < 0.1


@pytest.mark.parametrize("name", [V3, QWEN])
def test_a_prompt_whose_logits_are_not_finite_ends_and_the_others_go_on(name: str, folders: dict[str, Path]) -> None:
    decoder = OpenDecoder.from_pretrained(folders[name], dtype=torch.float32)
    ids = prompts(name, RECORDED[name]["seed"])
    expected = RECORDED[name]["tokens"]
    spare = min(set(range(96)) - set(ids[0] + ids[1] + expected[0] + expected[1]))
    decoder.embedding.weight[spare] = float("nan")
    done = decoder.generate([ids[0], [*ids[1], spare], ids[1]], NEW_TOKENS, eos=())
    assert [each.ended for each in done] == ["length", "not-finite", "length"]
    assert [each.ids for each in done] == [expected[0], [], expected[1]]


def test_prompts_that_cannot_be_run_are_refused_before_any_runs(decoders: dict[str, OpenDecoder]) -> None:
    decoder = decoders[OLMOE]
    told: list[int] = []

    def refusal(prompt: list[int], new: int = 1) -> PromptError:
        with pytest.raises(PromptError) as caught:
            decoder.generate([[5, 6], prompt], new, on_token=lambda row, token: told.append(token))
        assert not told
        return caught.value

    assert refusal([5] * 256).code == "prompt-too-long"
    assert "prompt 1 has 250 positions, and 7 more" in str(refusal([5] * 250, 7))
    assert refusal([]).code == "prompt-empty"
    assert refusal([96]).code == refusal([-1]).code == "token-out-of-vocabulary"
    with pytest.raises(PromptError, match="there is room for 256"):
        decoder(torch.zeros(1, 257, dtype=torch.long))
    cache = decoder.new_cache(1, 4)
    decoder(torch.tensor([[5, 6, 7]]), cache)
    with pytest.raises(PromptError, match="there is room for 1"):
        decoder(torch.tensor([[5, 6]]), cache)
    assert decoder.generate([], 3) == []
    assert len(decoder.generate([[5] * 250], 6, eos=())[0].ids) == 6


# Behind the bridge


def test_a_prefix_of_embeddings_is_read_as_the_tokens_would_be(decoders: dict[str, OpenDecoder]) -> None:
    decoder, ids = decoders[V3], prompts(V3, 0)
    prefix = decoder.embed(torch.tensor([each[:8] for each in ids]))
    done = decoder.generate([each[8:] for each in ids], NEW_TOKENS, eos=(), prefix_BPD=prefix)
    assert [each.ids for each in done] == RECORDED[V3]["tokens"]
    with pytest.raises(PromptError, match="248 positions, and 10 more"):
        decoder.generate([[5], [6] * 240], 10, prefix_BPD=prefix)
    with pytest.raises(ValueError, match="for 2 prompts; there are 1"):
        decoder.generate([[5]], 10, prefix_BPD=prefix)


@pytest.mark.parametrize("name", [V3, QWEN, OLMOE])
def test_a_bridge_in_front_of_open_weights_learns(name: str, decoders: dict[str, OpenDecoder]) -> None:
    torch.manual_seed(0)
    decoder, visual = decoders[name], torch.randn(2, 16, 24)
    bridge = Bridge(BridgeConfig(visual_width=24, width=128, vocabulary=96, queries=4, layers=1, heads=4))
    optimizer = torch.optim.Adam(bridge.parameters(), lr=3e-3)
    wanted = torch.tensor([prompts(name, 0)[0][:6], prompts(name, 1)[0][:6]])
    losses = []
    for _ in range(12):
        read = bridge(visual, decoder.embedding.weight)
        logits = decoder.logits(decoder.hidden(torch.cat((read, decoder.embed(wanted)), 1)))[:, 3:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(weight.grad is None for weight in decoder.parameters())


# The tokenizer


def write_tokenizer(folder: Path, words: int) -> None:
    library = Library(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    library.pre_tokenizer = Whitespace()
    library.save(str(folder / "tokenizer.json"))


def test_text_goes_through_the_model_and_back(folder: Path) -> None:
    write_tokenizer(folder, 94)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("w5 w17") == [5, 17]
    assert tokenizer.decode([5, 17]) == "w5 w17"


@pytest.mark.parametrize("words", [97, 40])
def test_the_tokenizer_of_another_model_is_refused(folder: Path, words: int) -> None:
    write_tokenizer(folder, words)
    with pytest.raises(CheckpointError, match=f"go up to {words - 1}.*embed_tokens.weight has 96 rows") as caught:
        Tokenizer.from_pretrained(folder)
    assert (caught.value.code, caught.value.file) == ("tokenizer-mismatch", folder / "tokenizer.json")


def test_a_tokenizer_without_the_end_token_is_refused(folder: Path) -> None:
    write_tokenizer(folder, 94)
    change(folder, eos_token_id=95)
    with pytest.raises(CheckpointError, match="has no token 95"):
        Tokenizer.from_pretrained(folder)


def test_a_tokenizer_that_is_absent_or_damaged_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not there"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_pretrained(folder)
    assert caught.value.code == "damaged-file"
