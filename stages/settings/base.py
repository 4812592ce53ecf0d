"""The section `base` of params.yaml."""

from typing import Literal

from pydantic import Field

from stages.settings.section import Settings


class Base(Settings):
    """The model to start from. What makes room for a method changes nothing of what it computes."""

    model: str
    """`bundled:smollm2-135m-instruct`, a hub id (with `revision`), a local folder or a .gguf file."""
    revision: str | None = None
    """The commit of a hub model."""
    sha256: str | None = None
    """Hash of a local folder's weight files or of a .gguf file. It pins the content, of which the path says nothing; a
    model that has changed is refused."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; `auto` is bfloat16 where the processor multiplies it natively, else float32."""
    add_biases: bool = False
    """Give it biases of zero wherever the architecture knows a flag for them, for `method: bitfit` to train."""
    extra_neurons: int = Field(default=0, ge=0)
    """Give every MLP so many neurons of zero, for `method: bottleneck` to train; multiples of 64 keep kernels fast."""
    adapter_size: int = Field(default=0, ge=0)
    """Put an adapter of so many neurons behind every attention and MLP, for `method: houlsby` to train."""
