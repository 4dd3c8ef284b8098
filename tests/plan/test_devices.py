import pytest

from ray_ds.errors import ConfigError
from ray_ds.plan.devices import DEVICE_KINDS, find_kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("H100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-80G", "a100-80gb"),
        ("A100-40G", "a100-40gb"),
        ("B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_names_of_nvidia_and_ray(name: str, kind: str) -> None:
    assert find_kind(name).name == kind


@pytest.mark.parametrize("name", ["", "a100", "v100", "GB200x", "NVIDIA"])
def test_names_that_say_too_little(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu .* must name one of h200, h100, a100-80gb, "):
        find_kind(name)


def test_every_kind_has_a_source_and_fits_its_own_name() -> None:
    for kind in DEVICE_KINDS:
        assert find_kind(kind.name) is kind
        assert kind.source and kind.memory_bytes > 20 << 30 and kind.fp32_flops < kind.peak_flops
