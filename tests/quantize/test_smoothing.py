"""Smoothing leaves every family's float function as it is, bit for bit, and levels its channels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.quantize.calibration import Maxima, measure_maxima, merge_maxima
from ray_ds.quantize.folds import Fold, plan_folds
from ray_ds.quantize.smoothing import TensorFactors, channel_factors, find_factors
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import CASES, make_folder
from tests.quantize.tiny_models import config_of, make_split, write_checkpoint


def calibrate(folder: Path, scratch: Path) -> tuple[Decoder, Maxima]:
    """Return a folder's model and the maxima of its activations on random text."""
    decoder = load_checkpoint_folder(folder, dtype=torch.float32, device="cpu")
    split, spans = make_split(scratch, num_rows=12, vocab_size=decoder.config.vocab_size)
    return decoder, measure_maxima(decoder, split, spans)


def fold_in(source: Path, target: Path, factors: dict[str, TensorFactors]) -> Decoder:
    """Write a checkpoint with its factors folded in, in its own types, and load it."""
    target.mkdir()
    state = load_file(source / "model.safetensors")
    for name, parts in factors.items():
        state[name] = parts.apply(state[name]).to(state[name].dtype)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return load_checkpoint_folder(target, dtype=torch.float32, device="cpu")


@pytest.mark.shows("Smoothing changes no bit of the float model: heads of values shared, experts, router, biases, MTP")
@pytest.mark.parametrize("case", CASES)
def test_the_float_function_stays_the_same_bit_for_bit(case: str, tmp_path: Path) -> None:
    artifact = import_alone(str(make_folder(tmp_path / "in", case)), str(tmp_path / "runs"))
    source = Path(artifact.path("model"))
    decoder, maxima = calibrate(source, tmp_path)
    state = load_file(source / "model.safetensors")
    factors = find_factors(decoder.config, state, maxima, alpha=0.7)
    smoothed = fold_in(source, tmp_path / "smoothed", factors)
    changed = [
        name for name, parts in factors.items() if not torch.equal(parts.apply(state[name]), state[name].float())
    ]
    assert len(changed) > len(factors) // 2
    tokens = torch.randint(decoder.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(smoothed(tokens), decoder(tokens))
        hidden = decoder.hidden(tokens)
        for depth in range(1, 1 + decoder.config.num_nextn_predict_layers):
            assert torch.equal(*(model.draft(hidden, tokens, depth=depth)[0] for model in (smoothed, decoder)))


def test_every_quantized_weight_but_those_behind_rounding_is_smoothed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "moe")
    decoder, maxima = calibrate(source, tmp_path)
    factors = find_factors(decoder.config, load_file(source / "model.safetensors"), maxima, alpha=0.5)
    columns = {name for name, parts in factors.items() if parts.columns is not None}
    folds = plan_folds(decoder.config)
    assert columns == {name for fold in folds for name in (*fold.readers, *fold.float_readers)}
    assert "model.layers.1.mlp.gate.weight" in columns  # the router's input is scaled, so its weight is too
    assert {"model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.self_attn.q_b_proj.weight"} <= columns


def test_maxima_are_those_of_the_inputs(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "moe")
    decoder, maxima = calibrate(source, tmp_path)
    seen: dict[str, Tensor] = {}

    def keep(path: str, x: Tensor) -> None:
        seen[path] = torch.cat([seen[path], x.flatten(0, -2)]) if path in seen else x.flatten(0, -2)

    for path in (
        "model.layers.0.self_attn.q_a_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
    ):
        decoder.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: keep(path, inputs[0]))
    split, spans = make_split(tmp_path, num_rows=12, vocab_size=decoder.config.vocab_size)
    with torch.inference_mode():
        for span in spans:
            decoder(torch.from_numpy(split.shard_tokens(0)[span.start : span.stop].astype("int64"))[None])
    points = ("model.layers.0.input_layernorm", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
    for point, inputs in zip(points, (seen[path] for path in seen), strict=True):
        torch.testing.assert_close(maxima[point], inputs.abs().amax(dim=0), rtol=1e-5, atol=1e-6)


def test_merged_maxima_are_those_of_all_text_in_any_order(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "moe")
    decoder, whole = calibrate(source, tmp_path)
    split, spans = make_split(tmp_path, num_rows=12, vocab_size=decoder.config.vocab_size)
    parts = [measure_maxima(decoder, split, spans[i::3]) for i in range(3)]
    for order in (parts, parts[::-1]):
        merged = merge_maxima(order)
        assert merged.keys() == whole.keys()
        for point, largest in merged.items():
            torch.testing.assert_close(largest, whole[point], rtol=1e-5, atol=1e-6)


def test_an_outlier_moves_into_the_weights_by_a_power_of_two() -> None:
    fold = Fold(point="norm", producers=("norm.weight",), readers=("a.weight",))
    maxima = torch.tensor([64.0, 1.0, 0.0, 1.0])
    weight = torch.tensor([[1.0, -1.0, 1.0, 0.0], [0.5, 1.0, 1.0, 0.0]])
    assert channel_factors(fold, [weight], maxima, alpha=0.5).tolist() == [8.0, 1.0, 1.0, 1.0]
    assert channel_factors(fold, [weight], maxima, alpha=1.0).tolist() == [64.0, 1.0, 1.0, 1.0]


def test_query_heads_that_share_a_value_share_its_factors() -> None:
    fold = Fold(point="o_proj", producers=("v",), readers=("o",), heads=2, repeats=2)
    maxima = torch.tensor([1.0, 16.0, 4.0, 1.0, 1.0, 1.0, 1.0, 4.0])  # 4 query heads of 2 channels, 2 heads of values
    factors = channel_factors(fold, [torch.ones(3, 8)], maxima, alpha=1.0)
    assert factors.tolist() == [4.0, 16.0, 1.0, 4.0]
    assert fold.to_columns(factors).tolist() == [4.0, 16.0, 4.0, 16.0, 1.0, 4.0, 1.0, 4.0]
    assert fold.to_rows(factors).tolist() == [4.0, 16.0, 1.0, 4.0]


def test_rows_of_keys_are_left_alone_where_values_are_scaled() -> None:
    fold = Fold(point="o_proj", producers=("kv_b",), readers=("o",), heads=2, skipped_rows=1)
    assert fold.to_rows(torch.tensor([2.0, 4.0, 8.0, 16.0])).tolist() == [1.0, 2.0, 4.0, 1.0, 8.0, 16.0]


def test_points_without_maxima_stay_as_they_are(tmp_path: Path) -> None:
    state = load_file(write_checkpoint(tmp_path / "model", "moe") / "model.safetensors")
    expert = "model.layers.1.mlp.experts.2"
    maxima = {f"{expert}.down_proj": torch.full((40,), 1e3)}
    factors = find_factors(config_of("moe"), state, maxima, alpha=0.5)
    assert set(factors) == {f"{expert}.down_proj.weight", f"{expert}.up_proj.weight"}
    assert find_factors(config_of("moe"), state, {}, alpha=0.5) == {}
