"""What an export is, and what the formats of other engines share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.exports import joined
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.modules import Architecture, LinearLayer
from tersor.checkpoint.names import LEVEL, Form, stored_forms
from tersor.errors import FormatError
from tersor.formats import Assignment, Pruned, Scheme

Layers = Sequence[tuple[LinearLayer, "Scheme | None"]]
"""Every linear layer but mixed and pruned ones, and every embedding asked for, with its scheme, `None` where it is left
alone."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors that a compressed weight [OC, IC] becomes.

    Attributes:
        tensors: Tersor's own name of each tensor (`checkpoint.names`) -> the tensor that is written for it; a row of it
            holds the first bytes of a row of ours.
        constants: further tensors with their bytes.
    """

    tensors: Mapping[str, TensorSpec]
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors that are written."""
        return (*self.tensors.values(), *(spec for spec, _ in self.constants))


class Export:
    """Tersor's own checkpoint; the others override what differs.

    Attributes:
        name: what users call the format.
        model_dtype: dtype of the model's activations, such as `bfloat16`; an empty string where it is not known.
        default_scale_dtype: scale dtype used when none is asked for; `None` means the one `get_scheme` takes.
    """

    name = "tersor"
    default_scale_dtype: str | None = None

    def __init__(self, model_dtype: str = "") -> None:
        self.model_dtype = model_dtype

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        """Return the tensors of a compressed layer.

        Raises:
            FormatError: the format cannot say this scheme.
        """
        return Stored(own_tensors(layer, scheme))

    def store_mixed(self, layer: LinearLayer, assignment: Assignment) -> Stored:
        """Return the tensors of a layer whose output features have different schemes.

        Raises:
            FormatError: the format cannot say that.
        """
        own = own_tensors(layer, assignment)
        return Stored(own, ((own.pop(LEVEL), assignment.level),))

    def store_sparse(self, layer: LinearLayer, pruned: Pruned) -> Stored:
        """Return the tensors of a layer whose weight is pruned.

        Raises:
            FormatError: the format cannot say that.
        """
        return Stored(own_tensors(layer, pruned))

    def check_layer(self, layer: LinearLayer) -> None:
        """Check that the format can hold a compressed layer of this kind; comes before `store`.

        Raises:
            FormatError: it cannot.
        """

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        """Check what only the whole model shows; comes before `quantization_config`, which may use what was seen.

        Raises:
            FormatError: the format cannot say it, or its readers would take it for something else.
        """

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        """Return what config.json says; `head` is the output head's module name."""
        return config.to_dict()


class ForeignExport(Export):
    """What the formats of other engines share.

    Attributes:
        can: the schemes that the format can say, in words.
        compresses_head: whether readers take a compressed output head.
        left_alone: names of everything a reader could take for a compressed layer and must not, by all names that
            readers give it; known after `check_model`.
    """

    can = ""
    compresses_head = False

    def __init__(self, model_dtype: str = "") -> None:
        super().__init__(model_dtype)
        # Their readers keep scales in the model's dtype and would round any other to it.
        self.default_scale_dtype = model_dtype if model_dtype in ("float16", "bfloat16") else None
        self.left_alone: list[str] = []

    def check_layer(self, layer: LinearLayer) -> None:
        if layer.stacked:
            raise FormatError(
                f"{self.name} readers expect a tensor of each expert, and {layer.served} holds all of a layer: ignore "
                "'experts', or export a checkpoint that stores experts one by one"
            )

    def store_mixed(self, layer: LinearLayer, assignment: Assignment) -> Stored:
        raise FormatError(f"{self.name} cannot say a mix of schemes in one layer ({layer.served}): leave levels out")

    def store_sparse(self, layer: LinearLayer, pruned: Pruned) -> Stored:
        raise FormatError(f"{self.name} cannot say what is left of a pruned weight ({layer.served}): store it dense")

    def refuse(self, scheme: Scheme, layer: LinearLayer) -> FormatError:
        """Return the error for a layer whose scheme the format cannot say."""
        return FormatError(f"{self.name} cannot say {_words(scheme)} ({layer.served}); it can say {self.can}")

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        packed = next((layer.served for layer, scheme in layers if layer.embedding and scheme is not None), None)
        if packed is not None:
            raise FormatError(f"{self.name} readers do not decode embeddings: leave {packed} out of the overrides")
        transposed = next((layer.served for layer, scheme in layers if layer.transposed and scheme is not None), None)
        if transposed is not None:
            raise FormatError(
                f"{self.name} readers expect the transposed layers of {architecture.name} ({transposed}) "
                "uncompressed: ignore them, or export a model without Conv1D layers"
            )
        self._check_head(architecture, layers)
        joined.served(self.name, layers)
        self.left_alone = _left_alone(architecture, layers)

    def _check_head(self, architecture: Architecture, layers: Layers) -> None:
        head = architecture.head
        if not any(layer.served == head and scheme is not None for layer, scheme in layers):
            return
        if architecture.tied:
            raise FormatError(
                f"{self.name} readers tie {head} to the embedding, which stays as it is: leave {head} out of the "
                "overrides"
            )
        if not self.compresses_head:
            raise FormatError(f"{self.name} readers never compress {head}: leave it alone for this export")


def default_scheme(config: QuantizationConfig, used: Iterable[Scheme]) -> Scheme:
    """Return the scheme to state for the whole model: the one asked for, or one in use where every layer has another.

    What is asked for and not used need not be a scheme that the format can say.
    """
    schemes = list(used)
    return next((scheme for scheme in schemes if scheme == config.scheme), schemes[0])


def own_tensors(layer: LinearLayer, form: Form) -> dict[str, TensorSpec]:
    """Return Tersor's own name -> the tensor of a compressed layer as Tersor's own checkpoint stores it."""
    return {
        name: TensorSpec(f"{layer.stem}.{name}", tensor.safetensors_dtype, tensor.shape)
        for name, tensor in stored_forms(form, layer.shape).items()
    }


def _words(scheme: Scheme) -> str:
    shared = "table" if scheme.has_table else "scale"
    group = f"one {shared} a row" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return scheme.name if scheme.is_mx else f"{scheme.name} with {group} in {scheme.scale_dtype}"


def _left_alone(architecture: Architecture, layers: Layers) -> list[str]:
    """Return the names of linears, routers and experts that stay as they are, under every name readers look for.

    Routers and fused experts are parameters of modules of transformers' own, yet linear layers elsewhere, and stand
    there under the checkpoint's names, where these differ.
    """
    compressed, names = set[str](), set[str]()
    for layer, scheme in layers:
        (names if scheme is None else compressed).update((layer.module, layer.served, layer.stem))
    names |= set(architecture.linears)
    if architecture.head:
        names.add(architecture.head)
    names |= joined.routers_and_experts(architecture.modules, [layer for layer, _ in layers])
    busy = {_block(experts) for experts in map(joined.experts_of, compressed) if experts}
    return sorted(name for name in names - compressed if not (name.endswith(".experts") and _block(name) in busy))


def _block(experts: str) -> str:
    """Return the decoder layer that experts are in: the module of the module that holds them."""
    return experts.rsplit(".", 2)[0]
