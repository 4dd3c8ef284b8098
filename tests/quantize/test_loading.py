import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ds.config.quantize import Scheme
from ray_ds.errors import ArtifactError
from ray_ds.model.caches import SlotCache
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.quantize import integer_road, load_quantized, loading, quantize_folder, self_test
from ray_ds.quantize.kernels import Road
from tests.quantize.tiny_models import SEQ_LEN, Kind, make_tokens, write_checkpoint


@pytest.fixture(scope="module", params=["dense", "moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its INT8 model."""
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    source = write_checkpoint(folder / "model", kind)
    quantize_folder(source, folder / "int8", max_shard_bytes=1 << 30)
    return source, folder / "int8"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.03), (torch.bfloat16, 0.05)])
def test_logits_are_near_those_of_the_checkpoint(
    folders: tuple[Path, Path], dtype: torch.dtype, tolerance: float
) -> None:
    tokens = make_tokens(8, SEQ_LEN, seed=500)
    with torch.inference_mode():
        expected = load_checkpoint_folder(folders[0], dtype=torch.float32, device="cpu")(tokens)
        found = load_quantized(folders[1], dtype=dtype)(tokens)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < tolerance
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "tolerance"), [("w8a16", 0.02), ("fp8", 0.06)])
def test_experts_load_in_every_scheme(tmp_path: Path, scheme: Scheme, tolerance: float, dtype: torch.dtype) -> None:
    source = write_checkpoint(tmp_path / "model", "moe")
    quantize_folder(source, tmp_path / "out", max_shard_bytes=6000, scheme=scheme)
    tokens = make_tokens(8, SEQ_LEN, seed=506)
    with torch.inference_mode():
        expected = load_checkpoint_folder(source, dtype=torch.float32, device="cpu")(tokens)
        found = load_quantized(tmp_path / "out", dtype=dtype)(tokens)
    assert relative_error(found, expected) < tolerance


def test_it_predicts_as_well_as_the_checkpoint(folders: tuple[Path, Path]) -> None:
    tokens = make_tokens(64, SEQ_LEN + 1, seed=501)
    with torch.inference_mode():
        losses = [
            float(model(tokens[:, :-1], targets=tokens[:, 1:])) / tokens[:, 1:].numel()
            for model in (
                load_checkpoint_folder(folders[0], dtype=torch.float32, device="cpu"),
                load_quantized(folders[1]),
            )
        ]
    assert losses[0] < 2.0
    assert abs(losses[1] - losses[0]) < 0.01


def decode_with_cache(decoder: Decoder, tokens: Tensor, prompt: int) -> Tensor:
    """Return the logits of all positions from `prompt` - 1 on: the prompt at once, then token by token."""
    dtype = decoder.model.embed_tokens.weight.dtype
    cache = SlotCache(decoder.config, len(tokens), tokens.shape[1], dtype=dtype, device="cpu")
    slots = list(range(len(tokens)))
    with torch.inference_mode():
        logits = [decoder(tokens[:, :prompt], cache=cache.rows(slots, [prompt] * len(slots)))[:, -1]]
        for i in range(prompt, tokens.shape[1]):
            logits.append(decoder(tokens[:, i : i + 1], cache=cache.rows(slots, [1] * len(slots)))[:, 0])
    return torch.stack(logits, dim=1)


def test_decoding_with_a_cache_equals_the_whole_sequence(folders: tuple[Path, Path]) -> None:
    decoder = load_quantized(folders[1])
    tokens = make_tokens(3, SEQ_LEN, seed=502)
    with torch.inference_mode():
        expected = decoder(tokens)[:, 9:]
    found = decode_with_cache(decoder, tokens, prompt=10)
    # Attention sums in another order; where that moves an activation over a half, its integer is the next one.
    assert relative_error(found, expected) < 0.01
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_every_road_gives_the_same_bits(folders: tuple[Path, Path]) -> None:
    tokens = make_tokens(2, SEQ_LEN, seed=503)
    roads: tuple[Road, ...] = ("onednn_two_pass", "reference")
    with torch.inference_mode():
        expected = load_quantized(folders[1])(tokens)
        for road in roads:
            decoder = load_quantized(folders[1], road=road)
            assert integer_road(decoder) == road
            assert torch.equal(decoder(tokens), expected)


def test_the_road_is_found_for_the_models_own_shapes_and_logged(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, object]] = []
    monkeypatch.setattr(loading, "log_event", lambda name, **fields: events.append({"name": name, **fields}))
    road = integer_road(load_quantized(str(folders[1])))
    assert road == self_test(shapes=[(48, 96), (96, 48)]).road
    assert [(event["name"], event["road"], event["device"]) for event in events] == [("quantized_kernel", road, "cpu")]


def test_it_is_for_inference_only(folders: tuple[Path, Path]) -> None:
    decoder = load_quantized(folders[1])
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_a_tied_output_projection_stays_tied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    quantize_folder(source, tmp_path / "int8", max_shard_bytes=1 << 30)
    decoder = load_quantized(tmp_path / "int8")
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    tokens = make_tokens(2, SEQ_LEN, seed=504)
    with torch.inference_mode():
        expected = load_checkpoint_folder(source, dtype=torch.float32, device="cpu")(tokens)
        assert relative_error(decoder(tokens), expected) < 0.05


Q_PROJ = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[Q_PROJ]


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q_PROJ}_scale"]


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:, 1:].contiguous()


def make_float(tensors: dict[str, Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].float()


def cut_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][1:].contiguous()


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.9.extra.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"kv_a_proj_with_mqa.weight \(missing\) must be a tensor of shape \(32, 48\)"),
        (drop_scale, r"kv_a_proj_with_mqa.weight_scale \(missing\) must be a tensor of shape \(32, 1\)"),
        (cut, r"weight \(shape \(32, 47\), type torch.int8\) must have shape \(32, 48\) and type torch.int8"),
        (make_float, r"weight \(shape \(32, 48\), type torch.float32\) must have .* type torch.int8"),
        (cut_embedding, r"embed_tokens.weight \(shape \(60, 48\), .* must have shape \(61, 48\)"),
        (add, r"layers.9.extra.weight \(shape \(2,\)\) must not be there; restore the model or make it anew"),
    ],
)
def test_damaged_tensors_are_named(
    folders: tuple[Path, Path], tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = load_file(folders[1] / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=message):
        load_quantized(tmp_path)


def test_a_missing_file_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"model.safetensors \(missing\) must be there"):
        load_quantized(tmp_path)


def test_a_checkpoint_is_not_taken_for_an_int8_model(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ArtifactError, match=r"config.json \(no quantization_config\) must hold a quantization_conf"):
        load_quantized(folders[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_logits_of_the_cpu(folders: tuple[Path, Path], dtype: torch.dtype) -> None:
    tokens = make_tokens(8, SEQ_LEN, seed=505)
    with torch.inference_mode():
        expected = load_quantized(folders[1], dtype=dtype)(tokens)
        decoder = load_quantized(folders[1], device="cuda", dtype=dtype)
        found = decoder(tokens.cuda()).cpu()
    assert integer_road(decoder) == "cuda_triton"
    assert relative_error(found, expected) < 0.02
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
