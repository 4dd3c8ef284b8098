"""The kinds of GPU that a plan knows, and the machines that a run is planned for."""

from dataclasses import dataclass

from ray_ds.errors import ConfigError

GPUS_PER_NODE = 8
"""Assumed where nobody says otherwise: an HGX or DGX board."""
NETWORK_GBIT_PER_S = 400.0
"""Assumed of a GPU's share of its node's network: a 400 Gbit/s adapter a GPU, as in a DGX H100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKind:
    """What one kind of GPU can do, from its maker's data sheet."""

    name: str
    memory_bytes: int
    """What nvidia-smi reports as its memory."""
    peak_flops: float
    """Dense bf16 and fp16 products with fp32 sums, per second."""
    fp32_flops: float
    """Plain fp32 products per second, which torch computes unless TF32 is allowed."""
    bandwidth: float
    """Bytes per second of its own memory."""
    link_bandwidth: float
    """Bytes per second to another GPU of the node, one way."""
    source: str


def _kind(
    name: str, mib: int, tflops: float, fp32_tflops: float, gb_per_s: float, link_gb_per_s: float, source: str
) -> DeviceKind:
    return DeviceKind(
        name=name,
        memory_bytes=mib << 20,
        peak_flops=tflops * 1e12,
        fp32_flops=fp32_tflops * 1e12,
        bandwidth=gb_per_s * 1e9,
        link_bandwidth=link_gb_per_s * 1e9,
        source=source,
    )


# Peaks without sparsity; NVLink's and PCIe's published figures count both directions and are halved here.
DEVICE_KINDS: tuple[DeviceKind, ...] = (
    _kind("h200", 143771, 989.4, 67.0, 4800, 450, "NVIDIA H200 data sheet, SXM; memory read on one"),
    _kind("h100", 81559, 989.4, 67.0, 3350, 450, "NVIDIA H100 data sheet, SXM 80 GB"),
    _kind("a100-80gb", 81920, 312.0, 19.5, 2039, 300, "NVIDIA A100 data sheet, SXM 80 GB"),
    _kind("a100-40gb", 40960, 312.0, 19.5, 1555, 300, "NVIDIA A100 data sheet, SXM 40 GB"),
    _kind("b200", 183359, 2250.0, 75.0, 8000, 900, "NVIDIA HGX B200 data sheet, a GPU of eight"),
    _kind("l40s", 46068, 362.05, 91.6, 864, 32, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
    _kind("rtx4090", 24564, 165.2, 82.6, 1008, 32, "NVIDIA Ada architecture white paper, appendix A; PCIe 4.0 x16"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The machines of a plan: `num_devices` alike, one worker on each."""

    kind: DeviceKind
    num_devices: int
    devices_per_node: int = GPUS_PER_NODE
    network_gbit_per_s: float = NETWORK_GBIT_PER_S
    """A GPU's share of its node's network, one way."""

    def wire_bandwidth(self, world_size: int) -> float:
        """Return the bytes per second that a worker sends to its neighbour in a ring over `world_size` workers."""
        if world_size <= self.devices_per_node:
            return self.kind.link_bandwidth
        return min(self.kind.link_bandwidth, self.network_gbit_per_s * 1e9 / 8)


def find_kind(name: str) -> DeviceKind:
    """Return the kind of GPU that a name means: ours, or nvidia-smi's or Ray's ("NVIDIA H200", "A100-80G").

    Raises:
        ConfigError: no kind is meant, or several.
    """
    plain = _plain(name)
    matches = [kind for kind in DEVICE_KINDS if _plain(kind.name) == plain]
    matches = matches or [kind for kind in DEVICE_KINDS if plain and (_plain(kind.name) in plain)]
    matches = matches or [kind for kind in DEVICE_KINDS if plain and (plain in _plain(kind.name))]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(kind.name for kind in DEVICE_KINDS)
    raise ConfigError("--gpu", name, f"must name one of {known}", "choose one of them")


def _plain(name: str) -> str:
    """Return a name in small letters and digits, without its maker and how it is plugged in."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "sxm4", "sxm5", "pcie"):
        letters = letters.replace(word, "")
    return letters.replace("gb", "g")
