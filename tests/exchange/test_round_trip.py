"""Folders of Hugging Face's come in and go out again as they were, and compute the same here and there."""

import json
import os
from pathlib import Path

import pytest
import torch

from ray_ds.artifacts import Checkpoint, open_artifact
from ray_ds.exchange.export_folder import export_checkpoint
from ray_ds.model.checkpoint_folder import load_checkpoint_folder, read_config
from ray_ds.model.hugging_face.shapes import shapes_on_disk
from ray_ds.serve.paged_decoder import PagedDecoder
from ray_ds.stages.import_hf import import_alone
from tests.exchange.hf_folders import CASES, make_folder, read_tensors

os.environ["HF_HUB_OFFLINE"] = "1"

NO_MEANING = {
    "_name_or_path",
    "max_window_layers",
    "architectures",
    "transformers_version",
    "initializer_range",
    "_from_model_config",
    "qk_head_dim",
}


def round_trip(source: Path, target: Path, **options: object) -> Checkpoint:
    artifact = import_alone(str(source), str(target / "runs"))
    assert isinstance(artifact, Checkpoint)
    export_checkpoint(artifact, str(target / "out"), **{"dtype": None, "max_shard_bytes": 50_000, **options})
    return artifact


def assert_same_tensors(found: Path, wanted: Path) -> None:
    ours, theirs = read_tensors(found), read_tensors(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.shows("A DeepSeek, Llama or Qwen folder comes in and goes out with the same tensors, bit for bit")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_comes_back_bitwise(case: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", case, dtype=torch.bfloat16)
    artifact = round_trip(source, tmp_path)
    assert_same_tensors(tmp_path / "out", source)
    assert_same_tensors(Path(artifact.path("model")), source)
    again = import_alone(str(tmp_path / "out"), str(tmp_path / "runs"))
    assert_same_tensors(Path(again.path("model")), Path(artifact.path("model")))
    assert read_config(Path(again.path("model"))) == read_config(Path(artifact.path("model")))
    assert again.fact("tokenizer_digest") == artifact.fact("tokenizer_digest")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_type_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "deepseek_v3", dtype=dtype)
    round_trip(source, tmp_path)
    assert_same_tensors(tmp_path / "out", source)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_config_from_both(case: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = make_folder(tmp_path / "in", case)
    round_trip(source, tmp_path)
    wanted, found = (AutoConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / "out"))
    for name in wanted.keys() - NO_MEANING:
        if name == "rope_parameters":
            assert {key: value for key, value in found[name].items() if key != "type"} == wanted[name]
        else:
            assert found.get(name) == wanted[name], name


@pytest.mark.shows("An imported DeepSeek, Llama or Qwen model gives the logits of transformers, to 1e-5")
@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_as_in_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_folder(tmp_path / "in", case)
    artifact = round_trip(source, tmp_path)
    ours = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    tokens = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(3))
    for folder in (source, tmp_path / "out"):
        theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        unexpected = {
            name for name in info["unexpected_keys"] if not name.startswith(("model.layers.3.", "model.layers.4."))
        }
        assert not any((unexpected, info["missing_keys"], info["mismatched_keys"])), info
        with torch.no_grad():
            found, wanted = ours(tokens), theirs.eval()(tokens).logits
        assert wanted.std() > 0.1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.shows("An imported model answers as transformers' `generate` does, by greedy decoding from a cache")
@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_answers_as_in_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_folder(tmp_path / "in", case)
    artifact = import_alone(str(source), str(tmp_path / "runs"))
    decoder = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    model, blocks = PagedDecoder(decoder, num_blocks=8, block_size=16, max_len=64), [5, 2, 7]
    prompt = torch.randint(decoder.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(4))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    wanted = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = []
    with torch.inference_mode():
        hidden = model.read(blocks, 0, prompt[0].tolist())[-1:]
        while len(tokens) < 16:
            tokens.append(int(model.logits(hidden).argmax()))
            hidden = model.write([blocks], [19 + len(tokens)], tokens[-1:])
    assert tokens == wanted[0, 20:].tolist()


@pytest.mark.shows("DeepSeek-V3's prediction module guesses as in transformers, to 1e-5, after import and export")
def test_prediction_modules_compute_as_in_transformers(tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    source = make_folder(tmp_path / "in", "deepseek_v3, predicts further")
    artifact = round_trip(source, tmp_path)
    ours = load_checkpoint_folder(Path(artifact.path("model")), dtype=torch.float32, device="cpu")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    # transformers looks for the published model's layer 61; this one has 3 layers.
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\..*"]
    modules = MtpModel.from_pretrained(theirs, dtype=torch.float32).eval()
    tokens = torch.randint(ours.config.vocab_size, (1, 26), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        states = theirs.model(tokens[:, :24]).last_hidden_state
        hidden = ours.hidden(tokens[:, :24])
        for depth in (1, 2):
            positions, ahead = torch.arange(depth, depth + 24)[None], tokens[:, depth : depth + 24]
            states = modules.forward_layer(depth - 1, states, positions, None, input_ids=ahead)
            found, hidden = ours.draft(hidden, ahead, depth=depth)
            wanted = modules.shared_head(states)
            assert wanted.std() > 0.05
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_expected_tensors_are_those_of_transformers(tmp_path: Path) -> None:
    for case in CASES:
        source = make_folder(tmp_path / case, case)
        wanted = {name: tuple(tensor.shape) for name, tensor in read_tensors(source).items()}
        assert shapes_on_disk(read_config(source)) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_on_export_can_be_chosen(dtype: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "deepseek_v3, groups, yarn")
    round_trip(source, tmp_path, dtype=dtype)
    wanted = getattr(torch, dtype)
    for name, tensor in read_tensors(tmp_path / "out").items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else wanted), name
        if not is_bias:
            assert torch.equal(tensor, read_tensors(source)[name].to(wanted))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_files_stay_below_the_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "qwen3")
    round_trip(source, tmp_path, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 3


@pytest.mark.shows("An import names the folder it came from and the hash of each of its files")
def test_the_manifest_names_every_file_of_the_folder(tmp_path: Path) -> None:
    import hashlib

    source = make_folder(tmp_path / "in", "llama")
    (source / "README.md").write_text("a model card is not read")
    artifact = import_alone(str(source), str(tmp_path / "runs"), source="example.org/llama@1", licence="MIT")
    found = {entry.uri: entry for entry in artifact.manifest.sources}
    names = {path.name for path in source.iterdir()} - {"README.md"}
    assert found.keys() == {f"{source}/{name}" for name in names}
    for name in names:
        entry = found[f"{source}/{name}"]
        assert entry.sha256 == hashlib.sha256((source / name).read_bytes()).hexdigest()
        assert (entry.source, entry.licence) == ("example.org/llama@1", "MIT")
    artifact.verify_files()
    assert open_artifact(artifact.uri, [Checkpoint]).digest == artifact.digest


def test_an_unchanged_folder_is_imported_once(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "llama")
    first = import_alone(str(source), str(tmp_path / "runs"))
    written = Path(first.path("manifest.json")).stat().st_mtime_ns
    assert import_alone(str(source), str(tmp_path / "runs")).uri == first.uri
    assert Path(first.path("manifest.json")).stat().st_mtime_ns == written
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    assert import_alone(str(source), str(tmp_path / "runs")).uri != first.uri


def test_an_import_reads_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory at once is a file of the result, however large the folder's files are."""
    from ray_ds.model import tensor_writer

    source = make_folder(tmp_path / "in", "llama", max_shard_size="1GB")
    held: list[int] = []
    save = tensor_writer.save_file

    def measured(tensors: dict[str, torch.Tensor], *rest: object, **named: object) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_writer, "save_file", measured)
    import_alone(str(source), str(tmp_path / "runs"), max_shard_bytes=80_000)
    assert len(held) > 3 and max(held) <= 80_000


def test_no_trace_of_prediction_modules_means_that_there_are_none(tmp_path: Path) -> None:
    """transformers leaves them out of what it saves, and their number in the config."""
    from tests.exchange.hf_folders import change_config

    source = make_folder(tmp_path / "in", "deepseek_v3")
    change_config(source, num_nextn_predict_layers=1)
    artifact = import_alone(str(source), str(tmp_path / "runs"))
    assert read_config(Path(artifact.path("model"))).num_nextn_predict_layers == 0
